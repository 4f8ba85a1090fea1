"""Time and bytes of a checkpoint of brc_sac.py: the first one of a filled replay, and later ones.

    python benchmarks/checkpoint_cost.py --csv benchmarks/results/checkpoint_cost.csv

A later checkpoint writes the networks again and of the replay only what is new. Ten tasks with MetaWorld's dimensions.
"""

import csv
import dataclasses
import datetime
import os
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


def fill(learner: brc_sac.Learner, steps: int, draw: np.random.Generator) -> None:
    """Puts `steps` random transitions per task, episodes of 200, where `ReplayBuffer.add` would, at once."""
    buffer = learner.buffer
    transition = np.arange(learner.env_step, learner.env_step + steps)
    learner.env_step += steps
    row = transition + transition // 200  # a final observation takes a row too; the ring never wraps here
    for task in range(buffer.num_tasks):
        values = draw.standard_normal((steps, buffer.ring.shape[-1]), np.float32)
        buffer.ring[task, row] = torch.from_numpy(values)
    buffer.row_of[:, transition] = torch.from_numpy(row.astype(np.int32))
    buffer.transition_at[:, row] = transition
    buffer.stop[:] = learner.env_step
    buffer.head[:] = learner.env_step + learner.env_step // 200


def main(args: Args) -> None:
    columns = ("transitions_per_task", "tasks", "width", "checkpoint", "seconds", "megabytes_written", "load_seconds",
               "hardware", "torch", "date", "command")
    rows = []
    print("transitions  checkpoint  seconds  MB written")
    for transitions in args.transitions:
        with tempfile.TemporaryDirectory(dir=args.directory) as run_dir:
            path, draw, cpu = Path(run_dir), np.random.default_rng(0), torch.device("cpu")
            tasks = tuple(str(task) for task in range(args.num_tasks))
            run = dataclasses.replace(brc_sac.Args(), tasks=tasks, width=args.width, batch_size=1024, learning_starts=1,
                                      total_steps=transitions + args.later * args.new)
            learner = brc_sac.Learner(run, 39, 4, cpu, cpu)
            for number in range(1 + args.later):
                fill(learner, args.new if number else transitions, draw)
                before = {file: file.stat().st_mtime_ns for file in path.rglob("*.pt")}
                start = time.perf_counter()
                brc_sac.save_checkpoint(path, learner)
                seconds = time.perf_counter() - start
                new = [path / "checkpoint.pt", *(file for file in path.rglob("replay/*.pt") if file not in before)]
                megabytes = sum(file.stat().st_size for file in new) / 1e6
                name = "first" if number == 0 else f"later {number}"
                print(f"{transitions:>11,}  {name:>10}  {seconds:>7.2f}  {megabytes:>10.1f}", flush=True)
                rows.append([transitions, args.num_tasks, args.width, name, round(seconds, 3), round(megabytes, 1), ""])
            start = time.perf_counter()
            brc_sac.load_checkpoint(path, brc_sac.Learner(run, 39, 4, cpu, cpu))
            rows[-1][-1] = round(time.perf_counter() - start, 3)
            print(f"{transitions:>11,}  {'load':>10}  {rows[-1][-1]:>7.2f}")
    if args.csv:
        facts = [f"CPU, {os.cpu_count()} cores", torch.__version__, datetime.date.today().isoformat(),
                 " ".join(sys.argv)]
        with open(args.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *(row + facts for row in rows)])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
