"""A run's last networks as a small run directory, to be evaluated or transferred: no replay, no optimisers' moments.

    python benchmarks/slim.py runs/pre1 pretrained/mw7

The target is the critic here (one copy in the file), the optimisers are as new. `--evaluate` and transfer.py (model and
embedding) take the result; --resume and transfer.py data, which need the replay, say that they cannot.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
import harness  # noqa: E402


@dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]
    """Run directory with a checkpoint."""
    out: tyro.conf.Positional[Path]
    """Where to write: a directory that is new or empty."""


def slim(state: dict) -> dict:
    """The checkpoint without what only training needs."""
    agent = dict(state["agent"], target=state["agent"]["critic"])
    for name, part in agent.items():
        if name.endswith("optimizer"):
            agent[name] = dict(part, state={})
    return state | {"agent": agent, "buffer": {}, "replay": {}, "random": {}}


def main(args: Args | None = None) -> None:
    args = args or tyro.cli(Args, description=__doc__.split("\n\n")[0])
    _, facts = harness.read_args(args.run, brc_sac.Args)
    state = harness.read_checkpoint(args.run)
    if not (args.run / "metrics.csv").exists():
        raise harness.UsageError(f"{args.run} has no metrics.csv, which says how good its networks are: put it there.")
    harness.check_empty(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    program = Path(facts["program"]).name
    facts |= {"program": program, "run_dir": str(args.out), "go_on": f"python {program} --evaluate {args.out}"}
    harness.write_json(args.out / "args.json", facts)
    torch.save(slim(state), args.out / "checkpoint.pt")
    shutil.copy(args.run / "metrics.csv", args.out)
    print(f"{args.out}: step {state['env_step']:,}, {(args.out / 'checkpoint.pt').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    harness.exit_on_error(main)
