"""Steps per second of the environments of each suite: in this process against K worker processes, in one run.

    python benchmarks/env_steps.py                                     # every suite that is installed
    python benchmarks/env_steps.py --suites mw dmc-dogs --workers 0 1 2 4 8
    python benchmarks/env_steps.py --suites mw --csv mw.csv
    python benchmarks/env_steps.py --suites atari                      # brc_drq.py's native games against Gymnasium's

One vector step moves every environment of the suite by one step under uniformly random actions. The time includes the
automatic resets that fall into it: 200 vector steps are one whole episode of MetaWorld. No agent runs beside it. A step
of a game is four frames; `native` is what brc_drq.py trains on, 0 workers is Gymnasium's, one game after the other.
"""

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import devices  # noqa: E402
import harness  # noqa: E402
import suites  # noqa: E402
from suites.atari import Games  # noqa: E402
from suites.vector import VectorEnv, default_workers, num_cores  # noqa: E402

COLUMNS = "suite,num_envs,workers,env_steps_per_s,ms_per_vector_step,hardware,load,versions,date,command".split(",")
PACKAGES = {"mujoco", "gymnasium", "dm_control", "metaworld", "numpy", "ale-py"}


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
        return seconds_per_step(envs.step, actions, repeats)
    finally:
        envs.close()


def seconds_per_step(step: Callable[[np.ndarray], object], actions: np.ndarray, repeats: int) -> float:
    """The median over repeats of the mean over `actions`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for action in actions:
            step(action)
        times.append((time.perf_counter() - start) / len(actions))
    return statistics.median(times)


def measure_games(games: tuple[str, ...], native: bool, steps: int, repeats: int) -> float:
    """Seconds per step of all `games`, by ale-py's own environments or by Gymnasium's."""
    actions = np.random.default_rng(0).integers(18, size=(steps, len(games)))
    if native:
        envs = Games(games)
        envs.reset(seed=0)
        try:
            return seconds_per_step(envs.step, actions, repeats)
        finally:
            envs.close()
    envs = [suites.make(game, seed=0) for game in games]
    for env in envs:
        env.reset()

    def step(action: np.ndarray) -> None:
        for env, choice in zip(envs, action.tolist()):
            *_, terminated, truncated, _ = env.step(choice)
            if terminated or truncated:
                env.reset()

    return seconds_per_step(step, actions, repeats)


def main(args: Args | None = None) -> None:
    args = args or tyro.cli(Args, description=__doc__.split("\n\n")[0])
    if unknown := [suite for suite in args.suites if suite not in suites.SUITES]:
        raise harness.UsageError(f"Unknown suite '{unknown[0]}': the suites are {', '.join(suites.SUITES)}.")
    versions = [f"python {platform.python_version()}"]
    versions += sorted(f"{package.name} {package.version}" for package in importlib.metadata.distributions()
                       if package.name in PACKAGES)
    rows = []
    for suite in args.suites:
        tasks = installed(suite)
        if not tasks:
            continue
        cores = num_cores()
        choices = args.workers or sorted({0, 2, cores, default_workers(tasks)})
        for workers in ("native", 0) if suite == "atari" else sorted({min(n, len(tasks)) for n in choices}):
            load = os.getloadavg()[0]  # of the minute before: what else the machine was doing
            if suite == "atari":
                seconds = measure_games(tasks, workers == "native", args.steps, args.repeats)
            else:
                seconds = measure(tasks, workers, args.steps, args.repeats)
            rows.append(
                {
                    "suite": suite,
                    "num_envs": len(tasks),
                    "workers": workers,
                    "env_steps_per_s": f"{len(tasks) / seconds:.0f}",
                    "ms_per_vector_step": f"{seconds * 1e3:.2f}",
                    "hardware": devices.processor(),
                    "load": f"{load:.1f}",
                    "versions": " ".join(versions),
                    "date": datetime.date.today().isoformat(),
                    "command": " ".join(sys.argv),
                }
            )
            where = {"native": "native", 0: "in-process"}.get(workers, f"{workers} workers")
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
    harness.exit_on_error(main)
