"""Where a run computes: devices, compilation, CUDA graphs, and the ranks of torchrun."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from suites.base import UsageError


def choose_device(name: str) -> torch.device:
    """The device called `name`, made the current one; auto is a GPU, under torchrun the rank's own, if there is one.

    Raises UsageError if this machine does not have it.
    """
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


def send(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`, without waiting for it: a GPU copies from pinned memory while it computes."""
    values = torch.as_tensor(values)
    pin = device.type == "cuda" and values.device.type == "cpu"
    return (values.contiguous().pin_memory() if pin else values).to(device, non_blocking=True)


def compiled(function: Callable) -> Callable:
    """`function`, compiled at its first call; what cannot be compiled runs as it is, with torch's warning."""
    torch._dynamo.config.suppress_errors = True
    if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):  # torch 2.13
        # Compiles the backward at once too, where its failure is suppressed as well.
        torch._functorch.config.force_non_lazy_backward_lowering = True
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # to try the processor's instruction sets takes 8 s
    return torch.compile(function)


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


def join() -> tuple[int, int]:
    """This process's rank and the number of ranks; all but rank 0 print no more."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(dist.destroy_process_group)
        if rank:
            sys.stdout = open(os.devnull, "w")
    return rank, size


def share(batch_size: int, num_tasks: int) -> int:
    """This rank's part of a batch, in proportion to its tasks, of which rank r has r, r + size, r + 2 size ..."""
    rank, size = join()
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
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)])
