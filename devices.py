"""Where a run computes: devices, threads, compilation, CUDA graphs, and the ranks of torchrun."""

import atexit
import collections
import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from suites.base import UsageError
from suites.cores import num_cores

ALL_THREADS = torch.get_num_threads()  # as torch has them, before anything is chosen


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device called `name`, made the current one; auto is a GPU, under torchrun the rank's own, if there is one.

    threads: --threads; torch keeps its own number without. Raises UsageError if this machine has no such device.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"nothing was ever run on {device.type}")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"Device '{name}' is not on this machine ({str(error).splitlines()[0]}): give cpu, cuda, "
                         "cuda:N or auto.") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams and graphs are meant
    return device


def processor() -> str:
    """This machine's CPU, and how many of its cores this process may use."""
    model, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = num_cores()
    return f"{model}, {cores} core{'s' * (cores > 1)}"


def environment(name: str) -> dict[str, Any]:
    """For args.json: commit, hardware and versions with which a run on device `name` computes."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    gpu = torch.cuda.is_available() and name != "cpu"
    return {"git_commit": commit or None,
            "hardware": torch.cuda.get_device_name() if gpu else processor(),
            "versions": {"python": sys.version.split()[0]} | {x.name: x.version for x in distributions() if x.name}}


class Threads:
    """With how many threads torch computes on a CPU: as many as make real steps fastest, beside whatever else runs.

    An update is hundreds of operations, after each of which the threads wait for the last one. While one of them is
    kept from its core, by a worker that steps environments or by another program, all wait; fewer are faster then, and
    for small networks always. So a few steps are made with half and with twice as many, and the fastest number stays:
    at the start, when a step takes longer than it did, and every 1000 steps while there are cores left that may have
    become free. What --threads or OMP_NUM_THREADS gave stays, and so does what torch has beside a GPU.
    """

    WORTH = 0.95  # a number is taken if its steps take less than this share of the time
    SLOWER = 1.3  # times as long a step: something has changed
    EVERY = 1000  # steps

    def __init__(self, given: int | None, device: str, before: int | None = None):
        """given: --threads. device: --device. before: the number in the checkpoint of a run that goes on."""
        self.chosen = not given and not os.environ.get("OMP_NUM_THREADS") and choose_device(device).type == "cpu"
        self.most = min(ALL_THREADS, num_cores()) if self.chosen else given or ALL_THREADS
        self.number = min(before or self.most, self.most) if self.chosen else self.most
        torch.set_num_threads(self.number)
        self.report, self.last = "", None
        self.steps = self._steps(tries=before is None)
        next(self.steps)

    def __str__(self) -> str:
        if self.chosen and self.most > 1:
            return f"threads: {self.number}, then as many of {self.most} as make steps fastest"
        return f"threads: {self.number}"

    def step(self) -> str:
        """After every step with updates: sets the number for the next one. Returns in words what was chosen, or ""."""
        now, before, self.report = time.perf_counter(), self.last, ""
        self.last = now
        if self.chosen and self.most > 1 and before is not None:  # the first one compiles
            self.steps.send(now - before)
        return self.report

    def _steps(self, tries: bool) -> Generator[None, float, None]:
        """Is sent the seconds of every step."""
        best, told = (yield from self._time(self.number)), None
        while True:
            tried = {self.number: best}
            for factor in (0.5, 2) if tries else ():
                while (other := min(self.most, max(1, int(factor * self.number)))) not in tried:
                    tried[other] = yield from self._time(other, 2 * tried[self.number])
                    if tried[other] > self.WORTH * tried[self.number]:
                        break
                    self.number = other
            torch.set_num_threads(self.number)
            best, tries = tried[self.number], True
            if self.number != told and len(tried) > 1:
                times = (f"{1e3 * seconds:.0f} ms with {number}" for number, seconds in sorted(tried.items()))
                self.report, told = f"threads: {self.number}; a step takes {', '.join(times)}", self.number
            recent: collections.deque[float] = collections.deque(maxlen=20)
            for count in itertools.count(1):
                recent.append((yield))
                now = mean_but_longest(recent) if count >= 20 else best
                if count % self.EVERY == 0 and self.number < self.most or now > self.SLOWER * best:
                    break
                best = min(best, now)
            best = yield from self._time(self.number)

    @staticmethod
    def _time(number: int, most: float = math.inf) -> Generator[None, float, float]:
        """Seconds of a step with that many threads: of eight, or of fewer if they are slow or all take over `most`."""
        torch.set_num_threads(number)
        yield  # the first one also wakes the threads up
        seconds: list[float] = []
        while len(seconds) < 2 or len(seconds) < 8 and sum(seconds) < 2 and min(seconds) < most:
            seconds.append((yield))
        return mean_but_longest(seconds)


def mean_but_longest(seconds: Collection[float]) -> float:
    """Without the step after which there was an evaluation. No median: beside other work, times are of two kinds."""
    return (sum(seconds) - max(seconds)) / (len(seconds) - 1)


def send(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`, without waiting for it: a GPU copies from pinned memory while it computes."""
    values = torch.as_tensor(values)
    pin = device.type == "cuda" and values.device.type == "cpu"
    return (values.contiguous().pin_memory() if pin else values).to(device, non_blocking=True)


def compiled(function: Callable) -> Callable:
    """`function`, compiled at its first call; what cannot be compiled runs as it is, with torch's warning.

    For any number of threads: else another number compiles it anew, for half a minute.
    """
    torch._dynamo.config.suppress_errors = True
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):  # torch 2.13
        # Compiles the backward at once too, where its failure is suppressed as well.
        torch._functorch.config.force_non_lazy_backward_lowering = True
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # to try the processor's instruction sets takes 8 s
    torch._inductor.config.cpp.dynamic_threads = True
    # What is global, such as the number of threads and whether gradients are needed, is the same at every call.
    return torch.compile(function, options={"guard_filter_fn": lambda guards: [
        guard.guard_type != "GLOBAL_STATE" for guard in guards]})


def as_cuda_graph(update: Callable[[], dict]) -> Callable[[], dict]:
    """`update` as one launch in place of thousands: recorded at the fourth call, replayed ever after.

    The first calls run eagerly, beside the main stream as capture asks for. What changes between calls has to lie in
    tensors that stay in place or in torch's own generator: an optimiser that loads a state later is lost to the graph.
    """

    def calls() -> Iterator[dict]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for _ in range(3):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                metrics = update()
            torch.cuda.current_stream().wait_stream(stream)
            yield metrics
        # thread_local: NCCL's watchdog asks for events meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            metrics = update()
        while True:
            graph.replay()
            yield metrics

    return calls().__next__


# --------------------------------------------------------------------------------------------------------- torchrun
# Several processes train one agent, each with its share of the tasks. Without torchrun there is one rank, with all.


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks. What they refuse they refuse by this, before they meet."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join() -> None:
    """Meets the other ranks; all but rank 0 print no more. Once one has ended, the others cannot meet either."""
    rank, size = ranks()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
        if rank:
            sys.stdout = open(os.devnull, "w")


def share(batch_size: int, num_tasks: int) -> int:
    """This rank's part of a batch, in proportion to its tasks, of which rank r has r, r + size, r + 2 size ..."""
    rank, size = ranks()
    before, up_to = (sum(len(range(other, num_tasks, size)) for other in range(stop)) for stop in (rank, rank + 1))
    return round(batch_size * up_to / num_tasks) - round(batch_size * before / num_tasks)


def largest(numbers: list[int]) -> list[int]:
    """Of each number the largest that a rank has."""
    if not dist.is_initialized():
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(item: Any) -> list[Any]:
    """What every rank has, in their order."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def add(tensors: list[torch.Tensor]) -> None:
    """Makes each tensor the sum of every rank's."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)])
