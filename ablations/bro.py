"""BroNet with a mean squared error, one network per task, as in BRO (Figures 3 and 4): mse_raw.py on a single task.

    for task in reach push drawer-open; do python ablations/bro.py --tasks $task --exp-name bro; done

Our reading of the paper's single networks: one agent for one task, so no task embedding, raw rewards and the batch of
256 that BRC itself has in single-task mode. Of BRO (Nauman et al. 2024) it takes network, loss and the mean of two
critics. BRO's quantiles, optimistic exploration, resets and 10 updates per step are not in it: what is compared is the
value network, and all else is as in BRC. Its critic has 512 units: --width 512.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
from ablations import mse_raw  # noqa: E402, F401  its import replaces critic, loss and normaliser

resolve_any = brc_sac.resolve


def resolve(args: brc_sac.Args) -> brc_sac.Args:
    """As in brc_sac.py, for one task. Raises UsageError for several."""
    args = resolve_any(args)
    if len(args.tasks) > 1:
        raise brc_sac.UsageError(f"One network is for one task, and these are {len(args.tasks)}: give --tasks one "
                                 "name, in a run for each of them; for one network on all of them, take mse_raw.py.")
    return args


brc_sac.resolve = resolve

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
