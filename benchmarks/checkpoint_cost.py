"""Time and bytes of a checkpoint of brc_sac.py: the first one of a filled replay, later ones, and loading.

    python benchmarks/checkpoint_cost.py --csv benchmarks/results/checkpoint_cost.csv

A later checkpoint writes the networks again and appends to the replay's files only what is new: harness.Run.save. Ten
tasks with MetaWorld's dimensions, in episodes of 200 steps.
"""

import csv
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
import harness  # noqa: E402
from benchmarks.throughput import facts_of  # noqa: E402


@dataclass(frozen=True)
class Args:
    transitions: tuple[int, ...] = (100_000, 500_000)
    """Transitions per task in the replay at the first checkpoint."""
    new: int = 25_000
    """Transitions per task between checkpoints."""
    later: int = 3
    """Checkpoints after the first; each is a row."""
    num_tasks: int = 10
    """Tasks."""
    width: int = 1024
    """Critic width."""
    directory: Path | None = None
    """Where to write the checkpoints; default a temporary directory."""
    csv: Path | None = None
    """Also write the rows to this file."""


def fill(buffer: brc_sac.ReplayBuffer, steps: int) -> None:
    """Adds `steps` random steps of every task, at once; the ring never wraps here."""
    for stop in range(buffer.steps + 200, buffer.steps + steps + 1, 200):
        buffer.rows[buffer.steps:stop + 1].normal_()
        buffer.steps = stop
        buffer.end_episodes(np.arange(buffer.num_tasks))


def measure(args: Args, transitions: int, run_dir: Path) -> list[dict]:
    total = transitions + args.later * args.new
    run_args = brc_sac.resolve(brc_sac.Args(tasks=brc_sac.suites.SUITES["mw"].tasks[:args.num_tasks], device="cpu",
                                            width=args.width, total_steps=total, learning_starts=1,
                                            run_dir=str(run_dir), compile=False))
    agent = brc_sac.Agent(run_args, 39, 4, args.num_tasks)
    normalizer = brc_sac.ReturnNormalizer(run_args, args.num_tasks, 4)
    buffer = brc_sac.ReplayBuffer(args.num_tasks, 39, 4, total)
    parts = {"agent": agent, "normalizer": normalizer, "buffer": buffer}
    run, rows = harness.Run(run_args), []
    run.open(buffer)
    run.bar.close()
    for number in range(1 + args.later):
        fill(buffer, args.new if number else transitions)
        replay = sum(file.stat().st_size for file in run_dir.glob("replay/*"))
        start = time.perf_counter()
        run.save(buffer.steps, {name: part.state_dict() for name, part in parts.items()}, buffer)
        seconds = time.perf_counter() - start
        written = sum(file.stat().st_size for file in [run_dir / "checkpoint.pt", *run_dir.glob("replay/*")]) - replay
        rows.append({"transitions_per_task": transitions, "tasks": args.num_tasks, "width": args.width,
                     "checkpoint": f"later {number}" if number else "first", "seconds": round(seconds, 3),
                     "megabytes_written": round(written / 1e6, 1)})
    start = time.perf_counter()
    harness.read_checkpoint(run_dir, brc_sac.ReplayBuffer(args.num_tasks, 39, 4, total))
    rows.append(rows[0] | {"checkpoint": "load", "seconds": round(time.perf_counter() - start, 3),
                           "megabytes_written": 0})
    return rows


def main(args: Args | None = None) -> None:
    args, rows = args or tyro.cli(Args, description=__doc__.split("\n\n")[0]), []
    if any(number < 200 or number % 200 for number in (*args.transitions, args.new)):
        raise harness.UsageError("--transitions and --new are whole episodes: give multiples of 200.")
    for transitions in args.transitions:
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            rows += measure(args, transitions, Path(folder) / "run")
    print("transitions  checkpoint  seconds  MB written")
    for row in rows:
        print(f"{row['transitions_per_task']:>11,}  {row['checkpoint']:>10}  {row['seconds']:>7.2f}  "
              f"{row['megabytes_written']:>10.1f}")
    if args.csv:
        facts = facts_of(torch.device("cpu"))
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | facts for row in rows)


if __name__ == "__main__":
    harness.exit_on_error(main)
