"""What torchrun costs and gains on a CPU: steps per second of one process and of several, one thread each.

    python benchmarks/ranks.py --suite mw --width 256 --sizes 1 2 --csv benchmarks/results/ranks_cpu.csv

Every run is a run of brc_sac.py as a user would start it; its speed is that between two of its own TensorBoard entries,
after compilation and the first updates. The runs take turns, `--repeats` times.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import devices  # noqa: E402
import harness  # noqa: E402


@dataclass(frozen=True)
class Args:
    """Steps per second of brc_sac.py under torchrun, by the number of processes."""

    suite: str = "mw"
    """Task collection."""
    width: int = 256
    """Critic width in units."""
    sizes: tuple[int, ...] = (1, 2)
    """Numbers of processes."""
    steps: int = 100
    """Environment steps per task that are timed."""
    repeats: int = 3
    """Runs of each size."""
    csv: Path | None = None
    """File to write the table to."""


def steps_per_second(args: Args, size: int) -> float:
    """One run's speed over its last `steps` steps. Raises RunError if it fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", "29511"] if size > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        options = {"suite": args.suite, "width": args.width, "learning-starts": 20, "total-steps": 60 + args.steps,
                   "log-interval": args.steps // 2, "eval-interval": 10**6, "eval-episodes": 1, "workers": 0,
                   "checkpoint-interval": 10**6, "run-dir": f"{folder}/run"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, *start, str(ROOT / "brc_sac.py"), *words, "--no-save-replay", "--no-compile"]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        events = EventAccumulator(f"{folder}/run/tensorboard")
        events.Reload()
        if "train/critic_loss" not in events.Tags()["scalars"]:
            raise harness.RunError(f"The run of {size} processes failed: {done.stderr[-500:]}")
        logged = events.Scalars("train/critic_loss")
    return (logged[-1].step - logged[0].step) / (logged[-1].wall_time - logged[0].wall_time)


def main(args: Args) -> None:
    speeds: dict[int, list[float]] = {size: [] for size in args.sizes}
    for _ in range(args.repeats):
        for size, of_size in speeds.items():
            of_size.append(steps_per_second(args, size))
            print(f"{size} processes: {of_size[-1]:.2f} steps per second", flush=True)
    rows = [{"suite": args.suite, "width": args.width, "processes": size, "threads_each": 1,
             "steps_per_second": f"{statistics.median(of_size):.3f}", "lowest": f"{min(of_size):.3f}",
             "highest": f"{max(of_size):.3f}", "hardware": devices.processor(), "command": " ".join(sys.argv)}
            for size, of_size in speeds.items()]
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    harness.exit_on_error(lambda: main(tyro.cli(Args)))
