"""Time of one gradient update of the authors' JAX code and bytes of its replay, to put beside throughput.py's.

    git clone https://github.com/naumix/BiggerRegularizedCategorical
    python3 -m venv .jax
    .jax/bin/pip install "jax==0.4.35" "flax==0.8.5" "distrax==0.1.5" "numpy==1.26.4" "gymnasium==1.0.0"
    .jax/bin/python benchmarks/authors_throughput.py BiggerRegularizedCategorical --csv out.csv

Needs none of this project's packages, and the project none of these. Times pairs of updates in one call, as their loop
makes them, so what JAX spends on a call is shared by two.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import flax
import jax
import jax.numpy as jnp
import numpy as np

UPDATES = 2  # per call


def measure(width: int, args: argparse.Namespace) -> dict:
    """Median and smallest milliseconds of one update, compiled and warm."""
    from jaxrl.agent.brc_learner import BRC
    from jaxrl.utils import Batch

    draw, shape = np.random.default_rng(0), (UPDATES, args.batch_size)
    fields = {
        "observations": draw.normal(size=(*shape, args.obs_dim)).astype(np.float32),
        "actions": np.tanh(draw.normal(size=(*shape, args.act_dim))).astype(np.float32),
        "rewards": draw.normal(size=shape).astype(np.float32),
        "masks": np.ones(shape, np.float32),
        "next_observations": draw.normal(size=(*shape, args.obs_dim)).astype(np.float32),
        "task_ids": draw.integers(0, args.num_tasks, shape).astype(np.int32),
    }
    batches = Batch(**{name: fields[name] for name in Batch._fields})
    agent = BRC(0, jnp.zeros((1, args.obs_dim)), jnp.zeros((1, args.act_dim)), args.num_tasks, width_critic=width)
    milliseconds = []
    for call in range(2 + args.repeats):
        start = time.perf_counter()
        info = agent.update(batches, UPDATES, call)
        jax.block_until_ready((agent.critic.params, agent.target_critic.params, agent.actor.params, info))
        milliseconds.append(1e3 * (time.perf_counter() - start) / UPDATES)
    milliseconds = milliseconds[2:]  # the first ones compile
    return {"width": width, "ms": round(statistics.median(milliseconds), 2), "ms_min": round(min(milliseconds), 2),
            "updates": UPDATES * len(milliseconds)}


def replay_bytes(args: argparse.Namespace) -> float:
    """Bytes of one transition in their replay, with observations as MetaWorld and dm_control give them."""
    from jaxrl.replay_buffer import ParallelReplayBuffer

    obs = SimpleNamespace(shape=(args.num_tasks, args.obs_dim), dtype=np.dtype(np.float64))
    buffer = ParallelReplayBuffer(obs, args.act_dim, 1000, args.num_tasks)
    return sum(x.nbytes for x in vars(buffer).values() if isinstance(x, np.ndarray)) / (1000 * args.num_tasks)


def facts() -> dict:
    """Hardware, versions, date and command."""
    name = jax.devices()[0].device_kind
    if name == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return {"hardware": f"{name}, {os.cpu_count()} cores", "jax": jax.__version__, "flax": flax.__version__,
            "python": platform.python_version(), "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/authors_throughput.py", "RELEASE", *sys.argv[2:]])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("release", type=Path, help="their repository")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024], help="critic widths")
    parser.add_argument("--batch-size", type=int, default=1024, help="transitions per update")
    parser.add_argument("--num-tasks", type=int, default=50)
    parser.add_argument("--obs-dim", type=int, default=39)
    parser.add_argument("--act-dim", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=6, help="timed calls per width, of two updates each")
    parser.add_argument("--csv", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if not (args.release / "jaxrl").is_dir():
        parser.exit(2, f"{args.release} is not their repository: it holds no folder jaxrl.\n")
    sys.path.insert(0, str(args.release))
    per_transition, rows = replay_bytes(args), []
    print(f"replay: {per_transition:.1f} bytes per transition")
    for width in args.widths:
        rows.append(row := measure(width, args))
        print(f"width {width}: {row['ms']:.1f} ms an update (fastest {row['ms_min']:.1f})", flush=True)
    if args.csv:
        more = {"batch_size": args.batch_size, "replay_bytes_per_transition": round(per_transition, 1)} | facts()
        with open(args.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [[*rows[0], *more], *([*row.values(), *more.values()] for row in rows)])


if __name__ == "__main__":
    main()
