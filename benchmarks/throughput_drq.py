"""Time of one update of brc_drq.py against what this device could do at best, and the games' frames per second.

    python benchmarks/throughput_drq.py                          scales 0.0625, 0.125, 0.25 (to 1 on a GPU)
    python benchmarks/throughput_drq.py --scales 1 --json out.json
    python benchmarks/throughput_drq.py --no-update              the games only

An update is what training does after sampling: augmentation, the critic's forward on the next observations, the
target's, the critic's forward and backward, AdamW, Polyak. Floor = FLOPs / matmul peak + bytes / copy bandwidth, with
both peaks measured in the same run. FLOPs are counted layer by layer, two per multiply-add of convolutions and dense
layers: five forwards (two without gradient, one with, and a backward of two), less the input gradient that the first
layer does not need. Bytes are AdamW's 28 a parameter and Polyak's 12; activations are left out.

A step of the games moves each of them by four frames under random actions, resets included: `Games` is what
brc_drq.py trains on, Gymnasium is `suites.make`, one after the other in this process.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_drq  # noqa: E402
import harness  # noqa: E402
import suites  # noqa: E402
from benchmarks.throughput import copy_bandwidth, matmul_peak, timed  # noqa: E402
from suites.atari import Games  # noqa: E402


@dataclass(frozen=True)
class Args:
    scales: tuple[float, ...] | None = None
    """Encoder scales; default 0.0625 0.125 0.25, on a GPU also 0.5 and 1."""
    batch_size: int | None = None
    """Transitions per update; default 32, on a GPU 256."""
    num_tasks: int = 26
    """Games (rows of the embedding table)."""
    repeats: int = 9
    """Timed updates per scale, after 3 to warm up; the median counts."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Of the update and of the matmul peak; default as in training, tf32 on a GPU and fp32 on a CPU."""
    compile: bool = False
    """torch.compile the loss."""
    update: bool = True
    """Measure the update."""
    games: tuple[str, ...] = ("Pong", "Breakout", "MsPacman", "Freeway")
    """Games to step, one at a time and all at once."""
    steps: int = 300
    """Steps per measurement of the games; three of them, of which the median counts."""
    json: Path | None = None
    """Also write the results to this file."""


def layer_macs(critic: brc_drq.Critic) -> list[int]:
    """Multiply-adds of one sample's forward in every convolution and dense layer, in order."""
    macs, hooks = [], []
    for layer in critic.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            pixels = lambda output: output[0, 0].numel() if output.ndim == 4 else 1  # noqa: E731
            hooks.append(layer.register_forward_hook(
                lambda layer, _, output: macs.append(layer.weight.numel() * pixels(output))))
    obs, task_id = torch.zeros(1, 4, 84, 84), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        critic(obs.to(critic.atoms.device), critic.embed(task_id.to(critic.atoms.device)))
    for hook in hooks:
        hook.remove()
    return macs


def measure(args: Args, scale: float, device: torch.device, flops_per_s: float, bytes_per_s: float) -> dict:
    """Median seconds of one update at `scale`, and its floor."""
    batch_size = args.batch_size or (256 if device.type == "cuda" else 32)
    agent_args = dataclasses.replace(brc_drq.Args(), encoder_scale=scale, batch_size=batch_size, compile=args.compile,
                                     precision=args.precision or "tf32")
    agent = brc_drq.Agent(agent_args, args.num_tasks, device=device)
    obs = torch.randint(256, (2, batch_size, 4, 84, 84), dtype=torch.uint8, device=device)
    batch = brc_drq.Batch(
        obs=obs[0],
        action=torch.randint(brc_drq.ACTIONS, (batch_size,), device=device),
        reward=torch.randn(batch_size, device=device),
        discount=torch.full((batch_size,), 0.97, device=device),
        next_obs=obs[1],
        task_id=torch.randint(args.num_tasks, (batch_size,), device=device),
    )

    def update() -> None:
        images = (brc_drq.augment(field, agent_args) for field in (batch.obs, batch.next_obs))
        agent.update(batch._replace(**dict(zip(("obs", "next_obs"), images))))

    seconds = [timed(update, device) for _ in range(3 + args.repeats)][3:]
    macs = layer_macs(agent.critic)
    parameters = sum(parameter.numel() for parameter in agent.critic.parameters())
    flops = 2 * batch_size * (5 * sum(macs) - macs[0])
    floor = flops / flops_per_s + 40 * parameters / bytes_per_s
    median = statistics.median(seconds)
    return {"encoder_scale": scale, "batch_size": batch_size, "parameters": parameters, "gflop": flops / 1e9,
            "ms": 1e3 * median, "ms_min": 1e3 * min(seconds), "floor_ms": 1e3 * floor, "ratio": median / floor}


def step_games(games: tuple[str, ...], steps: int) -> tuple[float, float]:
    """Milliseconds of one step of all `games`: native and by Gymnasium. Median of three."""
    actions = np.random.default_rng(0).integers(brc_drq.ACTIONS, size=(steps, len(games)))
    native, envs = Games(games), [suites.make(game, seed=0) for game in games]
    native.reset(seed=0)
    for env in envs:
        env.reset()
    native_ms, gymnasium_ms = [], []
    for _ in range(3):  # in turns, so that other work on the machine falls on both
        start = time.perf_counter()
        for action in actions:
            native.step(action)
        native_ms.append(1e3 * (time.perf_counter() - start) / steps)
        start = time.perf_counter()
        for action in actions:
            for env, choice in zip(envs, action.tolist()):
                *_, terminated, truncated, _ = env.step(choice)
                if terminated or truncated:
                    env.reset()
        gymnasium_ms.append(1e3 * (time.perf_counter() - start) / steps)
    native.close()
    return statistics.median(native_ms), statistics.median(gymnasium_ms)


def main(args: Args) -> None:
    device = harness.choose_device(args.device)
    threads = f"CPU, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    precision = args.precision or ("tf32" if device.type == "cuda" else "fp32")
    facts = {"hardware": hardware, "machine": platform.machine(), "torch": torch.__version__,
             "ale-py": importlib.metadata.version("ale-py"), "date": datetime.date.today().isoformat(),
             "command": " ".join(["benchmarks/throughput_drq.py", *sys.argv[1:]]), "compile": args.compile,
             "precision": precision}
    updates, steps = [], []
    if args.update:
        flops_per_s, bytes_per_s = matmul_peak(device, precision), copy_bandwidth(device)
        facts |= {"matmul_gflops": flops_per_s / 1e9, "copy_gb_per_s": bytes_per_s / 1e9}
        print(f"{hardware}, torch {torch.__version__}, {precision} matmul {flops_per_s / 1e9:,.0f} GFLOP/s, "
              f"copy {bytes_per_s / 1e9:,.1f} GB/s")
        print("".join(f"{name:>11}" for name in ("scale", "batch", "parameters", "GFLOP", "ms", "floor ms", "ratio")))
        for scale in args.scales or ((0.0625, 0.125, 0.25) + ((0.5, 1.0) if device.type == "cuda" else ())):
            updates.append(row := measure(args, scale, device, flops_per_s, bytes_per_s))
            print(f"{scale:>11}{row['batch_size']:>11}{row['parameters']:>11,}{row['gflop']:>11,.1f}{row['ms']:>11.2f}"
                  f"{row['floor_ms']:>11.2f}{row['ratio']:>11.2f}", flush=True)
    print(f"{'games':>24} {'native ms':>10} {'frames/s':>9} {'Gymnasium ms':>13} {'frames/s':>9}")
    for games in [*((game,) for game in args.games), args.games]:
        native_ms, gymnasium_ms = step_games(games, args.steps)
        row = {"games": " ".join(games), "native_ms": native_ms, "native_frames_per_s": 4e3 * len(games) / native_ms,
               "gymnasium_ms": gymnasium_ms, "gymnasium_frames_per_s": 4e3 * len(games) / gymnasium_ms}
        steps.append(row)
        print(f"{row['games'][:24]:>24} {native_ms:>10.2f} {row['native_frames_per_s']:>9,.0f} {gymnasium_ms:>13.2f} "
              f"{row['gymnasium_frames_per_s']:>9,.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(facts | {"updates": updates, "steps": steps}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
