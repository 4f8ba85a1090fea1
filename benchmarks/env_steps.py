"""Steps per second of the environments of each suite: in this process against K worker processes, in one run.

    python benchmarks/env_steps.py                                     # every suite that is installed
    python benchmarks/env_steps.py --suites mw dmc-dogs --workers 0 1 2 4 8
    python benchmarks/env_steps.py --suites mw --csv mw.csv

One vector step moves every environment of the suite by one step under uniformly random actions. The time includes the
automatic resets that fall into it: 200 vector steps are one whole episode of MetaWorld. No agent runs beside it.
"""

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import suites  # noqa: E402
from suites.vector import VectorEnv, default_workers, num_cores  # noqa: E402

COLUMNS = "suite,num_envs,workers,env_steps_per_s,ms_per_vector_step,hardware,load,versions,date,command".split(",")
PACKAGES = ("mujoco", "gymnasium", "dm_control", "metaworld", "numpy")


@dataclass(frozen=True)
class Args:
    suites: tuple[str, ...] = ("mw", "dmc-dogs", "dmc-humanoids", "hb-medium", "hb-hard", "sh", "mw-dmc")
    """Suites to measure; of one that is not installed, the reason is printed."""
    workers: tuple[int, ...] | None = None
    """Numbers of worker processes, 0 is in-process; default: 0, 2, the number of cores and the suite's default."""
    steps: int = 200
    """Vector steps per repeat, after 10 to warm up."""
    repeats: int = 3
    """Repeats; the median counts."""
    csv: Path | None = None
    """Table to write; default benchmarks/results/env_steps.csv."""


def installed(suite: str) -> tuple[str, ...]:
    """The tasks of `suite` that can be made here. Prints why for the first one that cannot."""
    tasks, found, reasons = suites.SUITES[suite].tasks, [], []
    for task in tasks:
        try:
            suites.check((task,))
            found.append(task)
        except suites.SuiteError as error:
            reasons.append(str(error))
    if reasons:
        print(f"{suite:14} not installed: {len(reasons)} of {len(tasks)} tasks. {reasons[0]}")
    return tuple(found)


def measure(tasks: tuple[str, ...], workers: int, steps: int, repeats: int) -> float:
    """Seconds per vector step: the median over repeats of their mean."""
    envs = VectorEnv(tasks, seed=0, workers=workers)
    try:
        envs.reset()
        rng = np.random.default_rng(0)
        actions = rng.uniform(-1.0, 1.0, (steps, envs.num_envs, envs.act_dim)).astype(np.float32)
        for action in actions[:10]:
            envs.step(action)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for action in actions:
                envs.step(action)
            times.append((time.perf_counter() - start) / steps)
    finally:
        envs.close()
    return statistics.median(times)


def hardware() -> str:
    """This machine's processor, and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {num_cores()} cores"


def main(args: Args) -> None:
    versions = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        versions.append(f"{package} {importlib.metadata.version(package)}")
    rows = []
    for suite in args.suites:
        tasks = installed(suite)
        if not tasks:
            continue
        cores = num_cores()
        choices = args.workers or sorted({0, 2, cores, default_workers(tasks)})
        for workers in sorted({min(workers, len(tasks)) for workers in choices}):
            load = os.getloadavg()[0]  # of the minute before: what else the machine was doing
            seconds = measure(tasks, workers, args.steps, args.repeats)
            rows.append(
                {
                    "suite": suite,
                    "num_envs": len(tasks),
                    "workers": workers,
                    "env_steps_per_s": f"{len(tasks) / seconds:.0f}",
                    "ms_per_vector_step": f"{seconds * 1e3:.2f}",
                    "hardware": hardware(),
                    "load": f"{load:.1f}",
                    "versions": " ".join(versions),
                    "date": datetime.date.today().isoformat(),
                    "command": " ".join(sys.argv),
                }
            )
            where = f"{workers} workers" if workers else "in-process"
            print(
                f"{suite:14} {len(tasks):3} environments  {where:12} {seconds * 1e3:8.2f} ms per vector step "
                f"{len(tasks) / seconds:8.0f} steps/s"
            )
    path = args.csv or ROOT / "benchmarks" / "results" / "env_steps.csv"
    if rows:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(f"Written to {path}.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
