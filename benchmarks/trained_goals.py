"""Whether MetaWorld agents with frozen goals fail on a task, or on the one goal of it that they are tested on.

    python benchmarks/trained_goals.py runs/metaworld/width-*-frozen-* --out trained_goals.csv

Evaluates the last checkpoint of each run, without noise, on the goals that it was trained with and on those of its
evaluations, one episode a task, as with frozen goals all are the same. Writes metrics.csv's columns, with the goals
behind exp_name, and prints the mean score of each.
"""

import csv
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import devices  # noqa: E402
import harness  # noqa: E402
import suites  # noqa: E402
from benchmarks import report  # noqa: E402
from harness import UsageError  # noqa: E402


@dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of brc_sac.py with --goals frozen."""
    out: Path = Path("trained_goals.csv")
    """Where to write the evaluations."""


def read_args(run_dir: Path) -> Any:
    """The arguments of a run with frozen goals. Raises UsageError."""
    import brc_sac
    args, facts = harness.read_args(run_dir, brc_sac.Args)
    if Path(facts["program"]).name != "brc_sac.py" or facts.get("goals") != "frozen" or facts["ranks"] > 1:
        raise UsageError(f"{run_dir} is no run of brc_sac.py in one process with --goals frozen: give those.")
    return dataclasses.replace(args, compile=False)


def evaluations(run_dir: Path, args: Any) -> list[tuple]:
    """Rows of metrics.csv, of every task on both goals. Raises UsageError."""
    import brc_sac
    saved = harness.read_checkpoint(run_dir)
    agent = brc_sac.Agent(args, *saved["agent"]["sizes"], devices.choose_device("cpu", threads=1))
    agent.load_state_dict(saved["agent"])
    rows = []
    for goals, seed in (("trained", args.seed), ("tested", args.seed + 42)):  # of the environments, as in train
        envs = brc_sac.VectorEnv(args.tasks, seed, workers=0, pad_to=agent.sizes[:2], goals="frozen")
        results, _ = brc_sac.evaluate(agent, envs, 1, seed=0)
        envs.close()
        rows += [(f"{args.exp_name}, {goals} goals", task, args.seed, metric, saved["env_step"], value)
                 for task, result in zip(args.tasks, results, strict=True) for metric, value in result.items()]
        mean = suites.mean_result(results)["score"]
        print(f"{run_dir} at step {saved['env_step']:,}: score {mean:.2f} on {goals} goals", flush=True)
    return rows


def main(args: Args | None = None) -> None:
    args = args or tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if not args.runs:
        raise UsageError("No run was given: give run directories with --goals frozen.")
    if args.out.exists() or not os.access(args.out.parent, os.W_OK):
        raise UsageError(f"--out is {args.out}: give a file that is not there, in a folder that is.")
    of_runs = {run_dir: read_args(run_dir) for run_dir in args.runs}
    rows = [row for run_dir, run_args in of_runs.items() for row in evaluations(run_dir, run_args)]
    with report.writing(args.out), open(args.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("exp_name", "env_name", "seed", "metric", "env_step", "value"))
        writer.writerows(row[:-1] + (f"{row[-1]:.6g}",) for row in rows)


if __name__ == "__main__":
    harness.exit_on_error(main)
