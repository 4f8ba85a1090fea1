"""How many processor cores this process may use, and how many worker processes to give a set of tasks."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def num_cores(root: str = "/") -> int:
    """The processor cores that this process may use: its affinity mask's, or fewer where a container has a limit.

    root: where to look for /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([cores, *map(math.ceil, _cpu_limits(Path(root)))]))


def _cpu_limits(root: Path) -> Iterator[float]:
    """The limits on CPU time, in cores, of the control group of this process and of all groups that hold it."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # version 1, or 2
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):  # of a container, often the mount alone is there
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if int(quota) > 0:  # -1: no limit
                    yield int(quota) / int(period)
            if folder == mount:
                break


def default_workers(tasks: Sequence[str]) -> int:
    """How many worker processes suit `tasks` on this machine: one per core, but none that would not shorten a step.

    A vector step takes as long as the worker with the most environments, so 20 tasks on 16 cores get 10 workers of two.
    """
    cores = num_cores()
    if cores == 1:
        return 0
    envs_per_worker = math.ceil(len(tasks) / min(cores, 32))  # at most 32, for their memory: 105 MB each and more
    return math.ceil(len(tasks) / envs_per_worker)
