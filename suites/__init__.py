"""What the agents train on: task lists, environments and scores. Nothing here knows about agents.

One file per benchmark. Each defines
    SUITES              name -> Suite, the named task collections it contributes
    owns(task)          whether a task name belongs to this benchmark
    check(tasks)        optional: raises SuiteError where something to be installed by hand is missing, in milliseconds
    make(task, seed)    one Gymnasium environment of it; its simulator is imported only there
    GOALS               optional: what `make` takes as `goals`, where a task's goals can be frozen
    score(task, ...)    the paper's normalised score of one episode (or of a mean over episodes)

    suites.SUITES["mw"].tasks            the task names of a suite
    suites.make("reach", seed=0)         an environment: flat float32 observation, actions in [-1, 1]
    suites.score("reach", 812.0, 1.0)    its normalised score
"""

import difflib
import os
import signal
import subprocess
import sys
from types import ModuleType

import gymnasium as gym

from suites import atari, dmc, humanoidbench, metaworld, shadowhand
from suites.base import Suite, SuiteError
from suites.results import VIDEO_STRIDE, mean_episode, mean_result, table, write_videos

__all__ = [
    "BENCHMARKS", "SUITES", "VIDEO_STRIDE", "Suite", "SuiteError", "benchmark", "check", "check_rendering", "make",
    "mean_episode", "mean_result", "resolve", "resolve_goals", "score", "steps", "table", "write_videos",
]  # fmt: skip

# dmc comes last: it owns every remaining `domain-task` name of dm_control.
BENCHMARKS: tuple[ModuleType, ...] = (metaworld, humanoidbench, shadowhand, atari, dmc)

SUITES: dict[str, Suite] = {name: suite for module in BENCHMARKS for name, suite in module.SUITES.items()}
SUITES["mw-dmc"] = Suite(tasks=SUITES["mw"].tasks + dmc.TASKS_30, steps=500_000)


def benchmark(task: str) -> ModuleType:
    """The benchmark module that `task` belongs to. Raises SuiteError for an unknown name."""
    for module in BENCHMARKS:
        if module.owns(task):
            return module
    known = {name for suite in SUITES.values() for name in suite.tasks + suite.transfer} | dmc.TASKS
    close = difflib.get_close_matches(task, sorted(known), n=3)
    listing = f"the suites that list task names are {', '.join(SUITES)}."
    raise SuiteError(f"Unknown task '{task}': " + (f"did you mean {' or '.join(close)}?" if close else listing))


def resolve(suite: str | None, tasks: tuple[str, ...] | None, split: str) -> tuple[str, ...]:
    """The task names that `--suite`, `--tasks` and `--split` select, in order.

    Explicit task names win over the suite; None stands for its own. Raises SuiteError for unknown names, for none, for
    names joined by commas, for a task given twice, and for a split the suite does not have.
    """
    if suite is not None and suite not in SUITES:
        raise SuiteError(f"Unknown suite '{suite}': the suites are {', '.join(SUITES)}.")
    if tasks is not None:
        if not tasks:
            raise SuiteError("--tasks was given without names: name one or more, or leave it out for the suite's.")
        if any("," in task for task in tasks):
            names = " ".join(" ".join(tasks).replace(",", " ").split())
            raise SuiteError(f"Task names are separated by spaces, without commas: --tasks {names}".rstrip() + ".")
        for task in tasks:
            benchmark(task)
        duplicates = sorted({task for task in tasks if tasks.count(task) > 1})
        if duplicates:
            raise SuiteError(f"Task '{duplicates[0]}' was given more than once: name each task once.")
        return tuple(tasks)
    if split == "all":
        return SUITES[suite].tasks
    if not SUITES[suite].pretrain:
        having = ", ".join(name for name, candidate in SUITES.items() if candidate.pretrain)
        raise SuiteError(f"Suite '{suite}' has no pretrain split: use --split all, or one of the suites {having}.")
    return SUITES[suite].pretrain


def check(tasks: tuple[str, ...]) -> None:
    """Raises SuiteError if a task needs something that is installed by hand and is missing. Takes milliseconds."""
    for module in BENCHMARKS:
        owned = tuple(task for task in tasks if benchmark(task) is module)
        if owned and hasattr(module, "check"):
            module.check(owned)


def resolve_goals(tasks: tuple[str, ...], goals: str | None, default: str) -> str:
    """`goals` or, where it is None, `default`; "fresh" where no task has goals to freeze. In a mix, MetaWorld's are.

    Raises SuiteError for other goals where no task has them.
    """
    if any(hasattr(benchmark(task), "GOALS") for task in tasks):
        return goals or default
    if goals not in (None, "fresh"):
        raise SuiteError(f"Goals can be {goals} in MetaWorld's tasks only, and none of these tasks is one of them.")
    return "fresh"


def check_rendering(tasks: tuple[str, ...]) -> None:
    """Raises SuiteError if no frame of `tasks` can be drawn here, so that a run says so before its first video.

    Draws one of the first task of each benchmark, in a process of its own, which a GL library may crash. Takes seconds.
    """
    first = {benchmark(task): task for task in reversed(tasks) if benchmark(task) is not atari}  # Atari needs no GL
    if not first:
        return
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", "import suites, sys; suites._draw(sys.argv[1:])", *first.values()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        reason = "OpenGL did not answer within 5 minutes"
    else:
        if process.returncode == 0:
            return
        reason = (process.stdout.strip() or process.stderr.strip()).rpartition("\n")[2]
        if process.returncode < 0:
            reason = f"OpenGL ended in {signal.Signals(-process.returncode).name}"
    raise SuiteError(
        f"No frame of {' and '.join(first.values())} can be drawn here ({reason}): set MUJOCO_GL to egl, osmesa or "
        "glfw, whichever works, or leave out --capture-video."
    )


def _draw(tasks: list[str]) -> None:
    """Draws a frame of each task and ends the process. Prints why, where that fails."""
    try:
        envs = [make(task, 0, render_mode="rgb_array") for task in tasks]
        for env in envs:
            env.reset()
            env.render()
    except Exception as error:
        print(error.__cause__ or error, flush=True)
        os._exit(1)
    os._exit(0)  # at once: some GL libraries fail when they are left, which matters to nobody


def make(task: str, seed: int, render_mode: str | None = None, goals: str = "fresh") -> gym.Env:
    """One environment of `task`: flat float32 Box observation, float32 Box action in [-1, 1]; Atari's are its own.

    Its `info["success"]` (0.0 or 1.0) exists where the task defines success. Two environments made with the same seed
    produce the same episodes. goals: "fresh" or, as the authors have MetaWorld's, "frozen"; other tasks have no such
    goals, and both are the same. Raises SuiteError, naming what to install, when the simulator is missing.
    """
    module = benchmark(task)
    options = {"goals": goals} if hasattr(module, "GOALS") else {}
    return module.make(task, seed, render_mode=render_mode, **options)


def score(task: str, episode_return: float, success: float | None) -> float:
    """The paper's normalised score of `task` from an episode's undiscounted return and its success (0 or 1)."""
    return benchmark(task).score(task, episode_return, success)


def steps(tasks: tuple[str, ...]) -> int:
    """The paper's budget in environment steps per task: a task's is that of its suite (of the smallest, where several
    hold it; the demo does not count), and the largest of these tasks' is all tasks'. 500,000 where no suite has one.
    """
    budgets = [
        min(suite.steps for name, suite in SUITES.items() if name != "demo" and task in suite.tasks + suite.transfer)
        for task in tasks
        if any(task in suite.tasks + suite.transfer for suite in SUITES.values())
    ]
    return max(budgets, default=500_000)
