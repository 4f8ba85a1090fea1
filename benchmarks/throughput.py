"""Time of one gradient update against what this device could do at best; its kernels; the whole loop.

    python benchmarks/throughput.py                              brc_sac.py: widths 256 512 1024, on a GPU to 8192
    python benchmarks/throughput.py --widths 4096 --precisions bf16 --json out.json
    python benchmarks/throughput.py --widths 4096 --compile True --cuda-graph True --profile    its kernels, by kind
    python benchmarks/throughput.py --widths 4096 --loop mw      with real environments: which side waits
    python benchmarks/throughput.py --agent drq                  brc_drq.py: encoder scales to 0.25, on a GPU to 1

Every size runs in every precision that the device is made for, eager, compiled, and on a GPU as a CUDA graph. SAC's
update is timed as training makes it, sampling included; DrQ's from a batch that is there, augmentation included.

Floor = FLOPs / matmul peak + bytes / copy bandwidth, both peaks measured in the same run: the median of 50 warm calls,
so that the clock is the one that an update gets too. FLOPs are two per multiply-add. SAC: 2 B (6 critic + 4 actor
weights): the target's forward, the critic's forward and backward (twice a forward), and forward and input gradient in
the actor step; the actor's two forwards and its backward. DrQ: five forwards (two without gradient, one with, and a
backward of two), less the first layer's input gradient. Bytes are AdamW's 28 a parameter (read parameter, gradient and
two moments, write parameter and moments) and Polyak's 12 (read both, write the target); activations are left out.
"""

import csv
import datetime
import importlib.util
import json
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
import devices  # noqa: E402
import harness  # noqa: E402
import suites  # noqa: E402
from suites.vector import VectorEnv, default_workers  # noqa: E402


@dataclass(frozen=True)
class Args:
    agent: Literal["sac", "drq"] = "sac"
    """Whose update: brc_sac.py's or brc_drq.py's."""
    widths: tuple[int, ...] | None = None
    """Critic widths of sac; default 256 512 1024, on a GPU also 2048 4096 8192."""
    scales: tuple[float, ...] | None = None
    """Encoder scales of drq; default 0.0625 0.125 0.25, on a GPU also 0.5 and 1."""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] | None = None
    """Of the matrix products and of their peak; default tf32 and bf16 on a GPU, fp32 on a CPU, with bf16 where the CPU
    has instructions for it."""
    compile: bool | None = None
    """torch.compile the losses; default both without and with."""
    cuda_graph: bool | None = None
    """Launch sac's updates as one CUDA graph; default both without and with on a GPU, without on a CPU."""
    batch_size: int | None = None
    """Transitions per update; default 1024, for drq 256 on a GPU and 32 on a CPU."""
    num_tasks: int | None = None
    """Tasks (rows of the embedding table); default 50, for drq 26."""
    obs_dim: int = 39
    """Observation dimension of sac; the default is MetaWorld's."""
    act_dim: int = 4
    """Action dimension of sac; the default is MetaWorld's."""
    repeats: int = 15
    """Timed calls per case, of two updates (drq: one), after 5 to warm up; the median counts."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    seconds: float = 60.0
    """Most seconds to spend on the timed updates of one case; at least 3 calls are timed."""
    profile: bool = False
    """Also print torch.profiler's table of the kernels in ten calls, and their sums by kind."""
    loop: str | None = None
    """Suite whose environments to step in the whole loop, in place of timing updates alone; it then runs as training
    would."""
    loop_steps: int = 200
    """Environment steps of the loop that are timed."""
    workers: int | None = None
    """Processes that step the loop's environments; default by the number of cores."""
    json: Path | None = None
    """Also write the results to this file, the kernels included."""
    csv: Path | None = None
    """Also write the results to this file: one row per case, with hardware, versions, date and command."""


class Peaks(NamedTuple):
    flops_per_s: float
    bytes_per_s: float


class Case(NamedTuple):
    """What is timed."""

    updates: Callable[[], object]
    count: int  # updates in one call
    flops: float  # of one update
    bytes_moved: float  # by one update's optimisers
    parameters: int
    parts: tuple  # SAC's agent, normaliser and replay, for the loop


# --------------------------------------------------------------------------------------------------------- timing


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that `function` takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def repeated(function: Callable[[], object], device: torch.device, repeats: int, seconds: float) -> list[float]:
    """Seconds of each call after 5 to warm up; at least 3, and no more than fit into `seconds`."""
    for _ in range(5):
        timed(function, device)
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() < deadline):
        times.append(timed(function, device))
    return times


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product in the precision that training uses."""
    n = 8192 if device.type == "cuda" else 2048
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / statistics.median(repeated(lambda: torch.mm(a, b, out=out), device, 50, 10))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(repeated(lambda: target.copy_(source), device, 50, 10))


def native_precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions that the device has instructions for, and that training would choose."""
    if device.type == "cuda":
        return ("tf32", "bf16")
    capabilities = torch.cpu.get_capabilities()
    bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return ("fp32", "bf16") if bf16 else ("fp32",)


# ----------------------------------------------------------------------------------------------------- the updates


def sac(run: brc_sac.Args, obs_dim: int, act_dim: int, device: torch.device) -> Case:
    """`updates` of brc_sac.train, with an empty replay."""
    num_tasks = len(run.tasks)
    agent = brc_sac.Agent(run, obs_dim, act_dim, num_tasks, device=device)
    normalizer = brc_sac.ReturnNormalizer(run, num_tasks, act_dim, device)
    buffer = brc_sac.ReplayBuffer(num_tasks, obs_dim, act_dim, 2000, device)

    def updates() -> dict:
        for _ in range(run.updates_per_step):
            batch = buffer.sample(run.batch_size)
            reward = normalizer.normalize(batch.reward, batch.task_id, agent.temperature)
            next_noise, noise = torch.randn(2, run.batch_size, act_dim, device=device)
            metrics, log_prob = agent.update(batch._replace(reward=reward), next_noise, noise)
            normalizer.observe_entropy(log_prob, batch.task_id)
        return metrics

    critic, actor = (sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, brc_sac.Dense))
                     for network in (agent.critic, agent.actor))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (agent.critic, agent.actor)]
    graph = run.cuda_graph and device.type == "cuda"
    return Case(devices.as_cuda_graph(updates) if graph else updates, run.updates_per_step,
                2 * run.batch_size * (6 * critic + 4 * actor), 40 * sizes[0] + 28 * sizes[1], 2 * sizes[0] + sizes[1],
                (agent, normalizer, buffer))


def fill(case: Case, steps: int = 500) -> None:
    """Puts random steps into SAC's replay, in episodes of 100."""
    agent, normalizer, buffer = case.parts
    draw, (obs_dim, act_dim, num_tasks, _) = np.random.default_rng(0).standard_normal, agent.sizes
    for step in range(steps):
        reward, terminated = draw(num_tasks, np.float32), np.zeros(num_tasks, bool)
        truncated = np.full(num_tasks, step % 100 == 99)
        obs, action, next_obs = (draw((num_tasks, size), np.float32) for size in (obs_dim, act_dim, obs_dim))
        buffer.add(obs, np.tanh(action), reward, terminated, truncated, next_obs)
        normalizer.observe(reward, terminated, truncated)


def drq(run: Any, device: torch.device) -> Case:
    """The update of brc_drq.train, on one batch over and over."""
    import brc_drq

    num_tasks, batch_size = len(run.tasks), run.batch_size
    agent = brc_drq.Agent(run, num_tasks, device=device)
    obs = torch.randint(256, (2, batch_size, 4, 84, 84), dtype=torch.uint8, device=device)
    batch = brc_drq.Batch(
        obs=obs[0], action=torch.randint(brc_drq.ACTIONS, (batch_size,), device=device),
        reward=torch.randn(batch_size, device=device), discount=torch.full((batch_size,), 0.97, device=device),
        next_obs=obs[1], task_id=torch.randint(num_tasks, (batch_size,), device=device))

    def updates() -> dict:
        images = (brc_drq.augment(field, run) for field in (batch.obs, batch.next_obs))
        return agent.update(batch._replace(**dict(zip(("obs", "next_obs"), images))))

    macs = layer_macs(agent.critic, lambda: agent.critic(
        torch.zeros(1, 4, 84, 84, device=device), agent.critic.embed(batch.task_id[:1])))
    parameters = sum(p.numel() for p in agent.critic.parameters())
    return Case(updates, 1, 2 * batch_size * (5 * sum(macs) - macs[0]), 40 * parameters, 2 * parameters, ())


@torch.no_grad()
def layer_macs(network: torch.nn.Module, forward: Callable[[], object]) -> list[int]:
    """Multiply-adds of one sample's forward in every convolution and dense layer, in order."""
    macs = []

    def count(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        macs.append(layer.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))

    hooks = [layer.register_forward_hook(count) for layer in network.modules()
             if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    forward()
    for hook in hooks:
        hook.remove()
    return macs


def sac_args(args: Args, tasks: tuple[str, ...], width: int, precision: str, compile: bool, graph: bool
             ) -> brc_sac.Args:
    """The paper's, at this width; `resolve` knows no tasks that are mere numbers."""
    given = dict(width=width, batch_size=args.batch_size or 1024, precision=precision, compile=compile,
                 cuda_graph=graph, embedding_norm="l1")
    return brc_sac.Args(tasks=tasks, **brc_sac.PAPER | given)


def make_case(args: Args, size: float, precision: str, compile: bool, graph: bool, device: torch.device) -> Case:
    """One case of the given width or encoder scale."""
    tasks = tuple(str(task) for task in range(args.num_tasks or (50 if args.agent == "sac" else 26)))
    if args.agent == "sac":
        run = sac_args(args, tasks, size, precision, compile, graph)
        case = sac(run, args.obs_dim, args.act_dim, device)
        fill(case)
        return case
    import brc_drq

    batch_size = args.batch_size or (256 if device.type == "cuda" else 32)
    return drq(brc_drq.Args(tasks=tasks, encoder_scale=size, batch_size=batch_size, precision=precision,
                            compile=compile), device)


def measure(args: Args, case: Case, peaks: Peaks, device: torch.device) -> dict:
    """Median milliseconds of one update, and its floor."""
    milliseconds = [1e3 * seconds / case.count
                    for seconds in repeated(case.updates, device, args.repeats, args.seconds)]
    median = statistics.median(milliseconds)
    least = 1e3 * (case.flops / peaks.flops_per_s + case.bytes_moved / peaks.bytes_per_s)
    return {"parameters": case.parameters, "gflop": case.flops / 1e9, "ms": median, "ms_min": min(milliseconds),
            "floor_ms": least, "ratio": median / least, "updates": len(milliseconds) * case.count}


# --------------------------------------------------------------------------------------------------------- kernels

KINDS = {  # the first one that is in a kernel's name
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|addmm|(^|::)mm|bmm|linear|conv|splitK",
    "AdamW": r"adam", "Polyak": r"lerp", "norms": r"norm", "casts and copies": r"copy|memcpy|memset|_to_",
}


def kernels(case: Case, device: torch.device) -> list[dict]:
    """What ten calls run: name, kind, runs and milliseconds in one update, longest first; on a CPU, torch's operations.

    Products that take a quarter of the time of the long ones (the 95 % quantile) or more are the `large` ones.
    """
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * gpu) as trace:
        for _ in range(10):
            case.updates()
        if gpu:
            torch.cuda.synchronize(device)
    events = [(event.name, event.self_device_time_total if gpu else event.self_cpu_time_total)
              for event in trace.events() if (event.device_type == torch.autograd.DeviceType.CUDA) == gpu]
    kind_of = {name: next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)),
                          "the rest") for name in dict(events)}
    products = sorted(time for name, time in events if kind_of[name] == "matrix products")
    long = products[int(0.95 * len(products))] if products else 0
    rows: dict[tuple, list] = {}
    for name, microseconds in events:
        kind = kind_of[name]
        large = "large " * (kind == "matrix products" and microseconds >= long / 4)
        row = rows.setdefault((name, large + kind), [0, 0.0])
        row[0] += 1 / (10 * case.count)
        row[1] += 1e-3 * microseconds / (10 * case.count)
    table = [{"kernel": name, "kind": kind, "runs": runs, "ms": ms} for (name, kind), (runs, ms) in rows.items()]
    return sorted(table, key=lambda row: -row["ms"])


def print_kernels(table: list[dict], longest: int = 25) -> dict[str, float]:
    """Prints the longest kernels and the sums by kind, which it returns."""
    print(f"{'kernel':<90} {'runs':>7} {'ms an update':>13}")
    for row in table[:longest]:
        print(f"{row['kernel'][:90]:<90} {row['runs']:>7.1f} {row['ms']:>13.4f}")
    kinds: dict[str, list[float]] = {}
    for row in table:
        total = kinds.setdefault(row["kind"], [0.0, 0.0])
        total[0] += row["runs"]
        total[1] += row["ms"]
    kinds["all"] = [sum(column) for column in zip(*kinds.values())]
    for kind, (runs, ms) in kinds.items():
        print(f"{'= ' + kind:<90} {runs:>7.1f} {ms:>13.4f}", flush=True)
    return {f"{kind} ms": ms for kind, (_, ms) in kinds.items()}


# -------------------------------------------------------------------------------------------------------- the loop


def loop(args: Args, width: int, precision: str, compile: bool, graph: bool, device: torch.device) -> dict:
    """Seconds of the steps of a real run: acting, stepping all environments, updating, storing; and who waits."""
    tasks = suites.resolve(args.loop, None, "all")
    suites.check(tasks)
    workers = default_workers(tasks) if args.workers is None else args.workers
    envs = VectorEnv(tasks, seed=0, workers=workers)
    try:
        run = sac_args(args, tasks, width, precision, compile, graph)
        case = sac(run, envs.obs_dim, envs.act_dim, device)
        agent, normalizer, buffer = case.parts
        obs, spent = envs.reset(seed=0), dict.fromkeys(("act", "update", "wait for environments", "store"), 0.0)
        for step in range(100 + 20 + args.loop_steps):
            if step == 120:  # compiled and warm
                spent, start = dict.fromkeys(spent, 0.0), time.perf_counter()
            marks = [time.perf_counter()]
            noise = torch.randn(len(tasks), envs.act_dim, device=device)
            action = agent.act(torch.from_numpy(obs).to(device, non_blocking=True), noise).cpu().numpy()
            envs.step_async(action)
            marks.append(time.perf_counter())
            if step >= 100:
                case.updates()
            marks.append(time.perf_counter())
            result = envs.step_wait()
            marks.append(time.perf_counter())
            buffer.add(obs, action, result.reward, result.terminated, result.truncated, result.next_obs)
            normalizer.observe(result.reward, result.terminated, result.truncated)
            obs = result.obs
            marks.append(time.perf_counter())
            spent = {name: total + later - earlier
                     for (name, total), earlier, later in zip(spent.items(), marks, marks[1:])}
        total = (time.perf_counter() - start) / args.loop_steps
        spent = {name: seconds / args.loop_steps for name, seconds in spent.items()}
        updates = statistics.median(repeated(case.updates, device, args.repeats, args.seconds))
        random_actions = np.random.default_rng(0).uniform(-1, 1, (len(tasks), envs.act_dim)).astype(np.float32)
        stepping = statistics.median(repeated(lambda: envs.step(random_actions), device, args.repeats, args.seconds))
    finally:
        envs.close()
    # What the GPU is asked for runs on while the host goes on: the host then waits for it where it acts.
    return {"suite": args.loop, "tasks": len(tasks), "width": width, "precision": precision, "compile": compile,
            "cuda_graph": graph, "workers": workers, "ms_step": 1e3 * total, "ms_updates_alone": 1e3 * updates,
            "ms_environments_alone": 1e3 * stepping, "updates_share": updates / total,
            "env_steps_per_s": len(tasks) / total,
            "waits": "learner" if spent["wait for environments"] > 0.1 * total else "environments",
            } | {f"ms_host_{name.replace(' ', '_')}": 1e3 * seconds for name, seconds in spent.items()}


# ------------------------------------------------------------------------------------------------------------ main


def facts_of(device: torch.device) -> dict:
    """Hardware, versions, date and command."""
    name = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return {"hardware": f"{name}{devices.processor()}, {torch.get_num_threads()} threads",
            "machine": platform.machine(), "torch": torch.__version__, "python": platform.python_version(),
            "date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv])}


def cases(args: Args, device: torch.device) -> list[tuple[bool, bool]]:
    """The (compile, cuda_graph) to run; in the loop only what training would do."""
    can = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    can &= device.type != "cuda" or importlib.util.find_spec("triton") is not None
    gpu = device.type == "cuda" and args.agent == "sac"
    compiles, graphs = ([can], [gpu]) if args.loop else ([False, True][:1 + can], [False, True][:1 + gpu])
    return [(compile, graph) for compile in (compiles if args.compile is None else [args.compile])
            for graph in (graphs if args.cuda_graph is None else [args.cuda_graph])]


def run_case(args: Args, size: float, precision: str, compile: bool, graph: bool, device: torch.device, peaks: Peaks
             ) -> dict:
    """Times one case and prints its line; its networks are gone before the next one's are made."""
    torch.compiler.reset()  # else a second width makes sizes dynamic, which no run's are
    if args.profile and compile and device.type == "cpu":
        torch._inductor.config.cpp.enable_kernel_profile = True
    case = make_case(args, size, precision, compile, graph, device)
    row = measure(args, case, peaks, device)
    print(f"{size:>6} {row['parameters']:>13,} {row['gflop']:>8,.1f} {'yes' if compile else 'no':>8} "
          f"{'yes' if graph else 'no':>6} {row['ms']:>10.2f} {row['floor_ms']:>9.2f} {row['ratio']:>6.2f}", flush=True)
    if args.profile:
        table = kernels(case, device)
        row |= print_kernels(table) | {"kernels": table}
    return ({"agent": args.agent, "precision": precision, "compile": compile, "cuda_graph": graph,
             "width" if args.agent == "sac" else "encoder_scale": size} | row
            | {"matmul_gflops": peaks.flops_per_s / 1e9, "copy_gb_per_s": peaks.bytes_per_s / 1e9})


def write(args: Args, facts: dict, rows: list[dict]) -> None:
    if args.json:
        args.json.write_text(json.dumps(facts | {"loop" if args.loop else "updates": rows}, indent=2) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            table = [{name: f"{value:.5g}" if isinstance(value, float) else value
                      for name, value in (row | facts).items() if name != "kernels"} for row in rows]
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)),
                                    lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def main(args: Args | None = None) -> None:
    args = args or tyro.cli(Args, description=__doc__.split("\n\n")[0])
    device = devices.choose_device(args.device)
    if args.cuda_graph and (device.type != "cuda" or args.agent == "drq"):
        raise harness.UsageError(f"--cuda-graph is for sac on an NVIDIA GPU, and this is {args.agent} on {device}: "
                                 "leave it out.")
    if (args.agent == "drq" and (args.widths or args.loop)) or (args.agent == "sac" and args.scales):
        raise harness.UsageError("--widths and --loop are for --agent sac, --scales for --agent drq.")
    gpu = device.type == "cuda"
    sizes = args.widths or (256, 512, 1024) + (2048, 4096, 8192) * gpu
    if args.agent == "drq":
        sizes = args.scales or (0.0625, 0.125, 0.25) + (0.5, 1.0) * gpu
    facts, rows = facts_of(device), []
    print(f"{facts['hardware']}, torch {torch.__version__}")
    for precision in args.precisions or native_precisions(device)[:1 if args.loop else None]:
        if not args.loop:
            peaks = Peaks(matmul_peak(device, precision), copy_bandwidth(device))
            print(f"\n{precision}: matmul {peaks.flops_per_s / 1e9:,.0f} GFLOP/s, copy {peaks.bytes_per_s / 1e9:,.1f} "
                  f"GB/s\n{'size':>6} {'parameters':>13} {'GFLOP':>8} {'compile':>8} {'graph':>6} {'update ms':>10} "
                  f"{'floor ms':>9} {'ratio':>6}")
        for size in sizes:
            for compile, graph in cases(args, device):
                if args.loop:
                    rows.append(loop(args, size, precision, compile, graph, device))
                    for name, value in rows[-1].items():
                        print(f"{name:<30} {value:.3f}" if isinstance(value, float) else f"{name:<30} {value}")
                else:
                    rows.append(run_case(args, size, precision, compile, graph, device, peaks))
                write(args, facts, rows)  # each as it comes: the rest may not come


if __name__ == "__main__":
    harness.exit_on_error(main)
