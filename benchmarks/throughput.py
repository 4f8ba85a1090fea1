"""Time of one gradient update of brc_sac.py against what this device could do at best; its parts; the whole loop.

    python benchmarks/throughput.py                              widths 256, 512, 1024 (to 8192 on a GPU), batch 1024
    python benchmarks/throughput.py --widths 4096 --precisions bf16 --csv out.csv
    python benchmarks/throughput.py --widths 256 --profile       which part of the update is how far from its floor
    python benchmarks/throughput.py --widths 4096 --loop mw      with real environments: which side waits

Every width runs in every precision that the device is made for, eager, compiled, and on a GPU as a CUDA graph. An
update is timed as training makes it: sampling from a replay on the device included.

Floor = FLOPs / matmul peak + bytes / copy bandwidth, with both peaks measured in the same run. FLOPs of an update are
2 B (6 critic weights + 4 actor weights): the critics' target forward, forward, backward (twice a forward), and forward
and input gradient in the actor step; the actor's two forwards and its backward. Bytes are AdamW's 28 a
parameter (read parameter, gradient and two moments, write parameter and moments) and Polyak's 12 (read both, write the
target).
"""

import csv
import datetime
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
import suites  # noqa: E402
from benchmarks.env_steps import hardware  # noqa: E402
from suites.vector import VectorEnv, default_workers  # noqa: E402


@dataclass(frozen=True)
class Args:
    widths: tuple[int, ...] | None = None
    """Critic widths; default 256 512 1024, on a GPU also 2048 4096 8192."""
    precisions: tuple[Literal["fp32", "tf32", "bf16"], ...] | None = None
    """Of the matrix products and of their peak; default tf32 and bf16 on a GPU, fp32 on a CPU, with bf16 where the CPU
    has instructions for it."""
    compile: bool | None = None
    """torch.compile the losses; default both without and with."""
    cuda_graph: bool | None = None
    """Launch updates as one CUDA graph; default both without and with on a GPU, without on a CPU."""
    batch_size: int = 1024
    """Transitions per update."""
    num_tasks: int = 50
    """Tasks (rows of the embedding table)."""
    obs_dim: int = 39
    """Observation dimension; the default is MetaWorld's."""
    act_dim: int = 4
    """Action dimension; the default is MetaWorld's."""
    repeats: int = 15
    """Timed pairs of updates per case, after 5 to warm up; the median counts."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    seconds: float = 60.0
    """Most seconds to spend on the timed updates of one case; at least 3 pairs are timed."""
    profile: bool = False
    """Also time the parts of the update, each against its own floor."""
    loop: str | None = None
    """Suite whose environments to step in the whole loop, in place of timing updates alone; it then runs as training
    would."""
    loop_steps: int = 200
    """Environment steps of the loop that are timed."""
    workers: int | None = None
    """Processes that step the loop's environments; default by the number of cores."""
    json: Path | None = None
    """Also write the results to this file."""
    csv: Path | None = None
    """Also write the results to this file: one row per case, with hardware, versions, date and command."""


class Peaks(NamedTuple):
    flops_per_s: float
    bytes_per_s: float


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


def native_precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions that the device has instructions for, and that training would choose."""
    if device.type == "cuda":
        return ("tf32", "bf16")
    capabilities = torch.cpu.get_capabilities()
    bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    return ("fp32", "bf16") if bf16 else ("fp32",)


def make_learner(args: Args, width: int, precision: str, compile: bool, cuda_graph: bool, device: torch.device
                 ) -> brc_sac.Learner:
    """A learner with 500 random transitions per task, in episodes of 100."""
    run = brc_sac.Args(tasks=tuple(str(task) for task in range(args.num_tasks)), width=width, total_steps=1000,
                       batch_size=args.batch_size, learning_starts=1, compile=compile, precision=precision,
                       cuda_graph=cuda_graph)
    learner = brc_sac.Learner(run, args.obs_dim, args.act_dim, device, device)
    draw = np.random.default_rng(0).normal
    for step in range(500):
        result = brc_sac.Step(
            obs=draw(size=(args.num_tasks, args.obs_dim)).astype(np.float32), reward=draw(size=args.num_tasks),
            terminated=np.zeros(args.num_tasks, bool), truncated=np.full(args.num_tasks, step % 100 == 99),
            next_obs=draw(size=(args.num_tasks, args.obs_dim)).astype(np.float32), success=np.zeros(args.num_tasks),
        )
        learner.observe(result.obs, np.tanh(draw(size=(args.num_tasks, args.act_dim))), result)
    return learner


def sizes(agent: brc_sac.Agent) -> dict[str, dict[str, int]]:
    """Numbers in the matrices that batches are multiplied with, and in all parameters, of critic and actor."""
    networks = {"critic": agent.critic, "actor": agent.actor}
    return {
        "weights": {name: sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, brc_sac.Dense))
                    for name, network in networks.items()},
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
    }


def floor(args: Args, peaks: Peaks, weights: float, bytes_moved: float = 0.0) -> float:
    """Milliseconds of products of a batch with matrices of `weights` numbers in all, and of moving bytes."""
    return 1e3 * (2 * args.batch_size * weights / peaks.flops_per_s + bytes_moved / peaks.bytes_per_s)


def replay_bytes(learner: brc_sac.Learner) -> float:
    """Bytes of one transition in a full replay of the paper's size (the ring's spare rows are a 64th of it)."""
    buffer = brc_sac.ReplayBuffer(1, *learner.buffer.fields[:2], 1_000_000)
    return buffer.nbytes / buffer.capacity


def measure(args: Args, learner: brc_sac.Learner, peaks: Peaks) -> dict:
    """Median milliseconds of one update, and its floor."""
    times = repeated(learner.update, learner.device, args.repeats, args.seconds)
    milliseconds = [1e3 * seconds / learner.args.updates_per_step for seconds in times]
    weights, parameters = sizes(learner.agent).values()
    products = 6 * weights["critic"] + 4 * weights["actor"]
    least = floor(args, peaks, products, 28 * sum(parameters.values()) + 12 * parameters["critic"])
    median = statistics.median(milliseconds)
    return {"width": learner.args.width, "parameters": 2 * parameters["critic"] + parameters["actor"],
            "gflop": 2 * args.batch_size * products / 1e9, "ms": median, "ms_min": min(milliseconds), "floor_ms": least,
            "ratio": median / least, "updates": len(times) * learner.args.updates_per_step,
            "replay_bytes_per_transition": replay_bytes(learner)}


def profile(args: Args, learner: brc_sac.Learner, peaks: Peaks) -> list[tuple[str, float, float]]:
    """Name, milliseconds and floor of every part of an update, each run alone; those of a loss by differences."""
    agent, device = learner.agent, learner.device
    compiled = torch.compile if learner.args.compile else lambda function: function
    target_distribution = compiled(brc_sac.target_distribution)
    learner.update()
    batch, noise = learner.batch, torch.randn(args.batch_size, args.act_dim, device=device)
    shared = agent.critic, agent.target, agent.actor, agent.temperature, agent.args.gamma, batch, noise

    def sample() -> None:
        sampled = learner.buffer.sample(args.batch_size, learner.generators["replay"])
        learner.normalizer.normalize(sampled.reward, sampled.task_id, agent.temperature)

    def target() -> None:
        with agent.autocast:
            target_distribution(*shared)

    def critic_forward() -> torch.Tensor:
        with agent.autocast:
            return agent.critic_loss(*shared)[0]

    def critic_backward() -> None:
        agent.critic_optimizer.zero_grad(set_to_none=True)
        critic_forward().backward()

    def actor_forward() -> torch.Tensor:
        with agent.autocast:
            return agent.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise)[0]

    def actor_backward() -> None:
        agent.critic.requires_grad_(False)
        agent.actor_optimizer.zero_grad(set_to_none=True)
        actor_forward().backward()
        agent.critic.requires_grad_(True)

    @torch.no_grad()
    def polyak() -> None:
        torch._foreach_lerp_(agent.target_parameters, agent.critic_parameters, agent.args.tau)

    def milliseconds(function: Callable[[], object]) -> float:
        return 1e3 * statistics.median(repeated(function, device, args.repeats, args.seconds))

    weights, parameters = sizes(agent).values()
    t_target, t_critic, t_critic_all = (milliseconds(f) for f in (target, critic_forward, critic_backward))
    agent.critic.requires_grad_(False)
    t_actor = milliseconds(actor_forward)
    agent.critic.requires_grad_(True)
    t_actor_all = milliseconds(actor_backward)
    parts = [
        ("sampling", milliseconds(sample), floor(args, peaks, 0, sum(x.nbytes for x in batch))),
        ("target", t_target, floor(args, peaks, weights["critic"] + weights["actor"])),
        ("critic forward", t_critic - t_target, floor(args, peaks, weights["critic"])),
        ("critic backward", t_critic_all - t_critic, floor(args, peaks, 2 * weights["critic"])),
        ("AdamW, critic", milliseconds(agent.critic_optimizer.step), floor(args, peaks, 0, 28 * parameters["critic"])),
        ("Polyak", milliseconds(polyak), floor(args, peaks, 0, 12 * parameters["critic"])),
        ("actor forward", t_actor, floor(args, peaks, weights["critic"] + weights["actor"])),
        ("actor backward", t_actor_all - t_actor, floor(args, peaks, weights["critic"] + 2 * weights["actor"])),
        ("AdamW, actor", milliseconds(agent.actor_optimizer.step), floor(args, peaks, 0, 28 * parameters["actor"])),
    ]
    return parts


def loop(args: Args, width: int, precision: str | None, device: torch.device) -> dict:
    """Seconds of the steps of a real run: acting, stepping all environments, updating, storing; and who waits."""
    tasks = suites.resolve(args.loop, None, "all")
    suites.check(tasks)
    run = brc_sac.fast_path(
        brc_sac.Args(suite=args.loop, tasks=tasks, width=width, batch_size=args.batch_size, learning_starts=100,
                     total_steps=100_000, buffer_size=2000, precision=precision, compile=args.compile,
                     cuda_graph=args.cuda_graph), device, device)
    workers = default_workers(tasks) if args.workers is None else args.workers
    envs = VectorEnv(tasks, seed=0, workers=workers)
    try:
        learner = brc_sac.Learner(run, envs.obs_dim, envs.act_dim, device, device)
        obs, spent = envs.reset(seed=0), dict.fromkeys(("act", "update", "wait for environments", "store"), 0.0)
        for step in range(run.learning_starts + 20 + args.loop_steps):
            if step == run.learning_starts + 20:  # compiled and warm
                spent, start = dict.fromkeys(spent, 0.0), time.perf_counter()
            marks = [time.perf_counter()]
            action = learner.act(obs)
            envs.step_async(action)
            marks.append(time.perf_counter())
            if step >= run.learning_starts:
                learner.update()
            marks.append(time.perf_counter())
            result = envs.step_wait()
            marks.append(time.perf_counter())
            learner.env_step += 1
            learner.observe(obs, action, result)
            obs = result.obs
            marks.append(time.perf_counter())
            spent = {name: total + later - earlier
                     for (name, total), earlier, later in zip(spent.items(), marks, marks[1:])}
        total = (time.perf_counter() - start) / args.loop_steps
        spent = {name: seconds / args.loop_steps for name, seconds in spent.items()}
        updates = statistics.median(repeated(learner.update, device, args.repeats, args.seconds))
        random_actions = np.random.default_rng(0).uniform(-1, 1, (len(tasks), envs.act_dim)).astype(np.float32)
        stepping = statistics.median(repeated(lambda: envs.step(random_actions), device, args.repeats, args.seconds))
    finally:
        envs.close()
    # What the GPU is asked for runs on while the host goes on: the host then waits for it where it acts.
    return {"suite": args.loop, "tasks": len(tasks), "width": width, "precision": run.precision, "compile": run.compile,
            "cuda_graph": run.cuda_graph, "workers": workers, "ms_step": 1e3 * total, "ms_updates_alone": 1e3 * updates,
            "ms_environments_alone": 1e3 * stepping, "updates_share": updates / total,
            "env_steps_per_s": len(tasks) / total,
            "waits": "learner" if spent["wait for environments"] > 0.1 * total else "environments",
            } | {f"ms_host_{name.replace(' ', '_')}": 1e3 * seconds for name, seconds in spent.items()}


def facts_of(device: torch.device) -> dict:
    """Hardware, versions, date and command."""
    name = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return {"hardware": f"{name}{hardware()}, {torch.get_num_threads()} threads",
            "machine": platform.machine(), "torch": torch.__version__, "python": platform.python_version(),
            "date": datetime.date.today().isoformat(), "command": " ".join(["python", *sys.argv])}


def cases(args: Args, device: torch.device) -> list[tuple[bool, bool]]:
    """The (compile, cuda_graph) to run."""
    compiles = [args.compile] if args.compile is not None else [False, True] if brc_sac.has_compiler() else [False]
    if device.type == "cuda" and args.compile is None and importlib.util.find_spec("triton") is None:
        compiles = [False]
    graphs = [args.cuda_graph] if args.cuda_graph is not None else [False, True] if device.type == "cuda" else [False]
    return [(compile, graph) for compile in compiles for graph in graphs]


def run_case(args: Args, width: int, precision: str, compile: bool, graph: bool, device: torch.device, peaks: Peaks
             ) -> dict:
    """Times one case and prints its line; its learner is gone before the next one's is made."""
    torch.compiler.reset()  # else a second width makes sizes dynamic, which no run's are
    learner = make_learner(args, width, precision, compile, graph, device)
    row = measure(args, learner, peaks)
    print(f"{width:>6} {row['parameters']:>13,} {row['gflop']:>8,.1f} {'yes' if compile else 'no':>8} "
          f"{'yes' if graph else 'no':>6} {row['ms']:>10.2f} {row['floor_ms']:>9.2f} {row['ratio']:>6.2f}", flush=True)
    if args.profile and not graph:
        for name, milliseconds, least in profile(args, learner, peaks):
            row |= {f"{name} ms": milliseconds, f"{name} floor_ms": least}
            print(f"{name:>39} {'':>6} {milliseconds:>10.2f} {least:>9.2f} {milliseconds / least:>6.2f}", flush=True)
    return ({"precision": precision, "compile": compile, "cuda_graph": graph, "batch_size": args.batch_size} | row
            | {"matmul_gflops": peaks.flops_per_s / 1e9, "copy_gb_per_s": peaks.bytes_per_s / 1e9})


def write(args: Args, facts: dict, rows: list[dict]) -> None:
    if args.json:
        args.json.write_text(json.dumps(facts | {"updates" if not args.loop else "loop": rows}, indent=2) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            table = [{name: f"{value:.5g}" if isinstance(value, float) else value
                      for name, value in (row | facts).items()} for row in rows]
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def main(args: Args) -> None:
    device = brc_sac.choose_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise brc_sac.UsageError(f"--cuda-graph needs an NVIDIA GPU, and the device is {device}: leave it out.")
    widths = args.widths or ((256, 512, 1024) + ((2048, 4096, 8192) if device.type == "cuda" else ()))
    facts, rows = facts_of(device), []
    print(f"{facts['hardware']}, torch {torch.__version__}")
    if args.loop:
        for width in widths:
            for precision in args.precisions or (None,):
                rows.append(row := loop(args, width, precision, device))
                for name, value in row.items():
                    print(f"{name:<30} {value:.3f}" if isinstance(value, float) else f"{name:<30} {value}", flush=True)
                write(args, facts, rows)
        return
    bytes_per_s = copy_bandwidth(device)
    for precision in args.precisions or native_precisions(device):
        peaks = Peaks(matmul_peak(device, precision), bytes_per_s)
        print(f"\n{precision}: matmul {peaks.flops_per_s / 1e9:,.0f} GFLOP/s, copy {bytes_per_s / 1e9:,.1f} GB/s\n"
              f"{'width':>6} {'parameters':>13} {'GFLOP':>8} {'compile':>8} {'graph':>6} {'update ms':>10} "
              f"{'floor ms':>9} {'ratio':>6}")
        for width in widths:
            for compile, graph in cases(args, device):
                rows.append(run_case(args, width, precision, compile, graph, device, peaks))
                write(args, facts, rows)  # each as it comes: a lent machine may be taken back
    print(f"\nreplay: {rows[0]['replay_bytes_per_transition']:.1f} bytes per transition")


if __name__ == "__main__":
    brc_sac.exit_on_error(lambda: main(tyro.cli(Args, description=__doc__.split("\n\n")[0])))
