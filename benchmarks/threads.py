"""Milliseconds of a training step alone and beside busy processes: torch's threads as it has them, and as chosen.

    python benchmarks/threads.py --csv benchmarks/results/threads_cpu.csv
    python benchmarks/threads.py --cases demo --rehearse            the same in small, in seconds, for a test

A real run of each case, environment workers included, goes through these situations in turn: alone, beside one busy
process at the lowest priority, beside two, beside one of the same priority; each is a loop of Python. In each it makes
steps with all cores' threads, as torch has them ("all"), and with as many as devices.Threads chooses ("chosen"), which
has to notice first that something has changed. Large networks are timed alone only. The busy processes are of this
session or of another: where Linux groups processes by session, priorities count within one only. Run it on an otherwise
idle machine.
"""

import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
import devices  # noqa: E402
import harness  # noqa: E402
from benchmarks.throughput import facts_of  # noqa: E402

SMALL = dict(width=16, actor_width=16, batch_size=8, workers=0, compile=False)
# How many busy processes, their priority (19 is the lowest, 0 this program's), and whose session they are of.
SITUATIONS = [(0, "", ""), (1, 19, "this"), (1, 19, "another"), (2, 19, "this"), (1, 0, "this")]
# Suite, width, and situations; all else is the suite's default.
CASES = {"demo": ("demo", None, SITUATIONS), "mw-256": ("mw", 256, SITUATIONS), "mw-512": ("mw", 512, SITUATIONS[:1]),
         "mw-1024": ("mw", 1024, SITUATIONS[:1])}
BUSY = "import os; os.nice({nice})\nwhile True: pass"


@dataclass(frozen=True)
class Args:
    cases: tuple[Literal[*CASES], ...] = tuple(CASES)
    """What to train: the demo, or MetaWorld-50 at a width."""
    steps: int = 40
    """Steps to time in each situation; the median counts."""
    seconds: float = 8.0
    """Most seconds for them; at least 10 are timed."""
    notice: int = 60
    """Steps before them, for the choice to be made."""
    rehearse: bool = False
    """Tiny networks and few steps."""
    csv: Path | None = None
    """Table to write."""


class AllCores(devices.Threads):
    """As before there was a choice: as many threads as torch has."""

    def step(self) -> str:
        return ""


def measure(case: str, args: Args) -> list[dict]:
    """Rows of one case: situation, threads, milliseconds of a step."""
    rows, busy = [], []
    suite, width, its_situations = CASES[case]

    def situations(run: harness.Run):
        """Is resumed after every step that learned."""
        ways = {"all": AllCores(None, "cpu"), "chosen": devices.Threads(None, "cpu")}
        for number, nice, session in its_situations:
            while busy:
                busy.pop().kill()
            program = [sys.executable, "-c", BUSY.format(nice=nice)]
            busy.extend(subprocess.Popen(program, start_new_session=session == "another") for _ in range(number))
            for way, run.threads in ways.items():
                torch.set_num_threads(run.threads.number)
                run.threads.last = None
                for _ in range(args.notice if way == "chosen" else 5):
                    yield
                times, start = [], time.perf_counter()
                while len(times) < 10 or len(times) < args.steps and sum(times) < args.seconds:
                    yield
                    now = time.perf_counter()
                    times.append(now - start)
                    start = now
                row = {"suite": suite, "width": run.args.width, "batch": run.args.batch_size, "busy": number,
                       "nice": nice, "session": session, "way": way, "threads": run.threads.number,
                       "ms_step": f"{1e3 * statistics.median(times):.1f}",
                       "ms_mean": f"{1e3 * statistics.mean(times):.1f}", "steps": len(times)}
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                rows.append(row)
        run.stop = 15

    def step(run: harness.Run, learning: bool = True) -> None:
        count(run, learning)
        if learning:
            if "situation" not in vars(run):
                run.situation = situations(run)
            next(run.situation, None)

    count, harness.Run.step = harness.Run.step, step
    sizes = SMALL if args.rehearse else {"width": width}
    with tempfile.TemporaryDirectory() as folder:
        given = brc_sac.Args(suite=suite, device="cpu", learning_starts=60, save_replay=False, eval_interval=10**9,
                             run_dir=f"{folder}/run", **sizes)
        try:
            brc_sac.train(brc_sac.resolve(given))
        except SystemExit:
            pass
        finally:
            harness.Run.step = count
            while busy:
                busy.pop().kill()
    return rows


def main(args: Args) -> None:
    if os.environ.get("OMP_NUM_THREADS"):
        raise harness.UsageError("OMP_NUM_THREADS is set, and leaves nothing to choose: start this without it.")
    if args.rehearse:
        args = dataclasses.replace(args, steps=10, seconds=0.1, notice=5)
    facts = facts_of(torch.device("cpu"))
    rows: list[dict] = []
    for case in args.cases:
        rows += measure(case, args)
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
                writer.writeheader()
                writer.writerows(row | facts for row in rows)


if __name__ == "__main__":
    harness.exit_on_error(lambda: main(tyro.cli(Args, description=__doc__.split("\n\n")[0])))
