"""Time of one gradient update of brc_sac.py against what this device could do at best.

    python benchmarks/throughput.py                              widths 256, 512, 1024 (to 8192 on a GPU), batch 1024
    python benchmarks/throughput.py --widths 4096 --json out.json

Floor = FLOPs / matmul peak + bytes / copy bandwidth, with both peaks measured in the same run. FLOPs of an update are
2 B (6 critic weights + 4 actor weights): the critics' target forward, forward, backward (twice a forward), and forward
and input gradient in the actor step; the actor's two forwards and its backward. Bytes are AdamW's 28 a
parameter (read parameter, gradient and two moments, write parameter and moments) and Polyak's 12 (read both, write the
target).
"""

import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402


@dataclass(frozen=True)
class Args:
    widths: tuple[int, ...] | None = None
    """Critic widths; default 256 512 1024, on a GPU also 2048 4096 8192."""
    batch_size: int = 1024
    """Transitions per update."""
    num_tasks: int = 50
    """Tasks (rows of the embedding table)."""
    obs_dim: int = 39
    """Observation dimension; the default is MetaWorld's."""
    act_dim: int = 4
    """Action dimension; the default is MetaWorld's."""
    repeats: int = 15
    """Timed updates per width, after 3 to warm up; the median counts."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    seconds: float = 60.0
    """Most seconds to spend on the timed updates of one width; at least 3 are timed."""
    compile: bool = False
    """torch.compile the losses, as training does for long runs."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Of the matrix products and of their peak; default as in training, tf32 on a GPU and fp32 on a CPU."""
    json: Path | None = None
    """Also write the results to this file."""


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that `function` takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product in the precision that training uses, best of 10."""
    n = 8192 if device.type == "cuda" else 2048
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    seconds, deadline = [], time.perf_counter() + 10  # bf16 takes minutes on a CPU that does not have it
    while len(seconds) < 10 and time.perf_counter() < deadline:
        seconds.append(timed(lambda: torch.mm(a, b, out=out), device))
    return 2 * n**3 / min(seconds)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, best of 10."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(10))


def measure(args: Args, width: int, device: torch.device, flops_per_s: float, bytes_per_s: float) -> dict:
    """Median seconds of one update at `width`, and its floor."""
    tasks = tuple(str(task) for task in range(args.num_tasks))
    agent_args = dataclasses.replace(brc_sac.Args(), tasks=tasks, width=width, batch_size=args.batch_size,
                                     compile=args.compile, precision=args.precision)
    agent = brc_sac.Agent(agent_args, args.obs_dim, args.act_dim, args.num_tasks, device)
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    batch = brc_sac.Batch(
        obs=draw(args.batch_size, args.obs_dim),
        action=draw(args.batch_size, args.act_dim).tanh(),
        reward=draw(args.batch_size),
        terminated=torch.zeros(args.batch_size, device=device),
        next_obs=draw(args.batch_size, args.obs_dim),
        task_id=torch.randint(args.num_tasks, (args.batch_size,), device=device),
    )
    next_noise, noise = draw(2, args.batch_size, args.act_dim)

    seconds, deadline = [], float("inf")
    for repeat in range(3 + args.repeats):
        if repeat == 3:
            seconds, deadline = [], time.perf_counter() + args.seconds
        seconds.append(timed(lambda: agent.update(batch, next_noise, noise), device))
        if repeat >= 5 and time.perf_counter() > deadline:
            break
    weights = {name: sum(p.numel() for p in getattr(agent, name).parameters() if p.ndim == 2)
               for name in ("critic", "actor")}
    critic, actor = (sum(p.numel() for p in getattr(agent, name).parameters()) for name in ("critic", "actor"))
    flops = 2 * args.batch_size * (6 * weights["critic"] + 4 * weights["actor"])
    moved = 28 * (critic + actor) + 12 * critic
    floor = flops / flops_per_s + moved / bytes_per_s
    median = statistics.median(seconds)
    return {"width": width, "parameters": 2 * critic + actor, "gflop": flops / 1e9, "ms": 1e3 * median,
            "ms_min": 1e3 * min(seconds), "floor_ms": 1e3 * floor, "ratio": median / floor, "updates": len(seconds)}


def main(args: Args) -> None:
    device = brc_sac.choose_device(args.device)
    precision = args.precision or ("tf32" if device.type == "cuda" else "fp32")
    widths = args.widths or ((256, 512, 1024) + ((2048, 4096, 8192) if device.type == "cuda" else ()))
    flops_per_s, bytes_per_s = matmul_peak(device, precision), copy_bandwidth(device)
    threads = f"CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    print(f"{hardware}, torch {torch.__version__}, matmul {flops_per_s / 1e9:,.0f} GFLOP/s "
          f"in {precision}, copy {bytes_per_s / 1e9:,.1f} GB/s")
    print(f"{'width':>6} {'parameters':>13} {'GFLOP':>8} {'update ms':>10} {'floor ms':>9} {'ratio':>6}")
    rows = []
    for width in widths:
        rows.append(row := measure(args, width, device, flops_per_s, bytes_per_s))
        print(f"{row['width']:>6} {row['parameters']:>13,} {row['gflop']:>8,.1f} {row['ms']:>10.2f} "
              f"{row['floor_ms']:>9.2f} {row['ratio']:>6.2f}", flush=True)
    if args.json:
        facts = {"hardware": hardware, "machine": platform.machine(), "torch": torch.__version__,
                 "date": datetime.date.today().isoformat(), "command": " ".join(sys.argv),
                 "batch_size": args.batch_size, "compile": args.compile, "precision": precision,
                 "matmul_gflops": flops_per_s / 1e9, "copy_gb_per_s": bytes_per_s / 1e9}
        args.json.write_text(json.dumps(facts | {"updates": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
