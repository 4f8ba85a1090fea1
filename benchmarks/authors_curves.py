"""Learning curves of the authors' JAX code and of ours: the same tasks, sizes, seeds and steps, on one core each.

    git clone https://github.com/naumix/BiggerRegularizedCategorical
    python3 -m venv .jax
    .jax/bin/pip install jax==0.4.35 jaxlib==0.4.35 flax==0.10.2 optax==0.2.4 distrax==0.1.5 \\
        tensorflow-probability==0.25.0 numpy==1.26.4 gymnasium==1.0.0 mujoco==3.3.0 dm_control==1.0.28
    python benchmarks/authors_curves.py authors three-tasks --release BiggerRegularizedCategorical \\
        --python .jax/bin/python --core 0
    python benchmarks/authors_curves.py ours three-tasks --variant release --core 1
    python benchmarks/report.py runs/authors --out authors.png --csv authors.csv

`authors` runs their train.py itself and hands it our environments (suites.make), the sizes that it has no flags for
(actor, batch) and a log that writes metrics.csv; `ours` runs brc_sac.py. A seed whose last evaluation is written is not
run again, so a stopped call can be repeated. Settings: three-tasks and ball_in_cup, see SETTINGS.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("exp_name", "env_name", "seed", "metric", "env_step", "value")  # of brc_sac.py's metrics.csv
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu",
              "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}


@dataclass(frozen=True)
class Setting:
    """What both sides run."""

    tasks: tuple[str, ...]
    width: int
    actor_width: int
    batch_size: int
    learning_starts: int  # random steps per task
    total_steps: int  # per task
    eval_interval: int
    eval_episodes: int


SETTINGS = {
    "three-tasks": Setting(("cartpole-swingup", "ball_in_cup-catch", "reacher-easy"), 128, 128, 256, 1000, 15_000,
                           1500, 5),
    "ball_in_cup": Setting(("ball_in_cup-catch",), 256, 256, 256, 5000, 20_000, 2500, 10),
}


class UsageError(ValueError):
    """Arguments that cannot be run; its message is one sentence for the user."""


def last_step(path: Path) -> int:
    """The last evaluated step in a metrics.csv, 0 if there is none."""
    if not path.exists():
        return 0
    with open(path, newline="") as file:
        return max((int(row["env_step"]) for row in csv.DictReader(file) if row["env_name"] == "mean"), default=0)


def seeds_to_run(args: argparse.Namespace, method: str) -> list[tuple[int, Path]]:
    """The seeds that are not done, and their run directories."""
    dirs = {seed: args.out / f"{args.setting}-{method}_s{seed}" for seed in args.seeds}
    return [(seed, path) for seed, path in dirs.items() if last_step(path / "metrics.csv") < args.total_steps]


# ------------------------------------------------------------------------------------------------------------ theirs


def authors(args: argparse.Namespace) -> None:
    """Runs their train.py for every seed, in this Python or in --python."""
    if not (args.release / "jaxrl").is_dir() or not (args.release / "train.py").is_file():
        raise UsageError(f"{args.release} is not their repository: it holds no folder jaxrl, or no train.py.")
    if args.python:
        command = [args.python, __file__, "authors", args.setting, "--release", args.release, "--out", args.out,
                   "--total-steps", args.total_steps, "--seeds", *args.seeds]
        code = subprocess.run([str(word) for word in command], env=os.environ | ONE_THREAD).returncode
        if code:
            raise SystemExit(code)
        return
    os.environ |= ONE_THREAD
    setting = SETTINGS[args.setting]
    for seed, run_dir in seeds_to_run(args, "authors"):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "metrics.csv").unlink(missing_ok=True)  # of a stopped run: theirs cannot be resumed
        train_authors(args.release, setting, args.total_steps, seed, f"{args.setting}-authors", run_dir)


def train_authors(release: Path, setting: Setting, total_steps: int, seed: int, exp_name: str, run_dir: Path) -> None:
    """One run of their train.main, with the parts that decide tasks, sizes and the log exchanged."""
    sys.path[:0] = [str(release), str(ROOT)]
    sys.modules.setdefault("wandb", type(sys)("wandb"))  # imported by their logger, not used here
    import jaxrl.envs
    import train
    from jaxrl.agent.brc_learner import BRC
    from jaxrl.logger import EpisodeRecorder
    from jaxrl.replay_buffer import ParallelReplayBuffer

    import suites

    os.environ["MUJOCO_GL"] = "disable"  # their train.py asks for EGL; nothing is drawn here
    (run_dir / "args.json").write_text(json.dumps(
        asdict(setting) | {"total_steps": total_steps, "seed": seed} | facts(release), indent=2) + "\n")

    class SeededEnv(jaxrl.envs.ParallelEnv):
        """Theirs draws the random actions at the start from an unseeded generator."""

        def __init__(self, env_names, seed):
            super().__init__(env_names, seed=seed)
            self.action_space.seed(seed)

    class Replay(ParallelReplayBuffer):
        def sample(self, batch_size, num_batches):
            return super().sample(setting.batch_size, num_batches)

    class Recorder(EpisodeRecorder):
        def log(self, flags, agent, replay_buffer, reward_normalizer, step, *rest, **more):
            infos = super().log(flags, agent, replay_buffer, reward_normalizer, step, *rest, **more)
            write_rows(run_dir / "metrics.csv", exp_name, setting.tasks, seed, step, infos)
            return infos

    jaxrl.envs.make_env = suites.make
    train.get_environment_list = lambda name: list(setting.tasks)
    train.BRC = partial(BRC, width_actor=setting.actor_width)
    train.ParallelEnv, train.ParallelReplayBuffer, train.EpisodeRecorder = SeededEnv, Replay, Recorder
    train.FLAGS(["train.py", f"--seed={seed}", f"--eval_episodes={setting.eval_episodes}",
                 f"--eval_interval={setting.eval_interval}", f"--max_steps={total_steps}",
                 f"--start_training={setting.learning_starts}", f"--width_critic={setting.width}", "--nolog_to_wandb",
                 "--norender"])
    train.main(None)


def write_rows(path: Path, exp_name: str, tasks: tuple[str, ...], seed: int, step: int, infos: dict) -> None:
    """Appends an evaluation: return and score per task and their means, then what their log has beside them."""
    import suites

    values = {"return": infos["return"],
              "score": [suites.score(task, value, None) for task, value in zip(tasks, infos["return"], strict=True)]}
    values |= {name: value for name, value in infos.items() if name not in ("return", "goal", "goal_online")}
    rows = [(exp_name, task, seed, name, step, f"{float(value[i]):.6g}")
            for name, value in values.items() for i, task in enumerate(tasks)]
    rows += [(exp_name, "mean", seed, name, step, f"{sum(map(float, values[name])) / len(tasks):.6g}")
             for name in ("return", "score")]
    new = not path.exists()
    with open(path, "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS] * new + rows)


def facts(release: Path) -> dict:
    """Their commit, hardware, versions, date and command."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")
    commit = subprocess.run(["git", "-C", release, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ("jax", "jaxlib", "flax", "optax", "distrax", "numpy", "gymnasium", "mujoco", "dm_control")
    return {"authors_commit": commit or None, "hardware": f"{name}, one of {os.cpu_count()} cores",
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "date": datetime.date.today().isoformat(), "command": shlex.join(sys.argv)}


# -------------------------------------------------------------------------------------------------------------- ours


def ours(args: argparse.Namespace) -> None:
    """Runs brc_sac.py for every seed, one after the other."""
    setting = SETTINGS[args.setting]
    for seed, run_dir in seeds_to_run(args, args.variant):
        go_on = (run_dir / "checkpoint.pt").exists()
        if not go_on and (run_dir / "args.json").exists():  # stopped before its first checkpoint
            shutil.rmtree(run_dir)
        command = [sys.executable, ROOT / "brc_sac.py", "--resume", run_dir] if go_on else [
            sys.executable, ROOT / "brc_sac.py", "--tasks", *setting.tasks, "--variant", args.variant, "--seed", seed,
            "--width", setting.width, "--actor-width", setting.actor_width, "--batch-size", setting.batch_size,
            "--learning-starts", setting.learning_starts, "--total-steps", args.total_steps,
            "--eval-interval", setting.eval_interval, "--eval-episodes", setting.eval_episodes, "--workers", 0,
            "--device", "cpu", "--exp-name", f"{args.setting}-{args.variant}", "--run-dir", run_dir]
        code = subprocess.run([str(word) for word in command], env=os.environ | ONE_THREAD, cwd=ROOT).returncode
        if code:
            raise SystemExit(code)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("authors", "ours"):
        run = commands.add_parser(name)
        run.add_argument("setting", choices=SETTINGS)
        run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        run.add_argument("--out", type=Path, default=Path("runs/authors"), help="a run directory per seed in it")
        run.add_argument("--core", type=int, help="the one core to run on")
        run.add_argument("--total-steps", type=int, help="steps per task; default the setting's")
        if name == "authors":
            run.add_argument("--release", type=Path, required=True, help="their repository")
            run.add_argument("--python", help="a Python that has their packages; default this one")
        else:
            run.add_argument("--variant", choices=("release", "paper"), default="release")
    return parser.parse_args()


def main() -> None:
    args = parse()
    setting = SETTINGS[args.setting]
    args.total_steps = args.total_steps or setting.total_steps
    if args.total_steps % setting.eval_interval or args.total_steps <= setting.learning_starts:
        raise UsageError(f"--total-steps is {args.total_steps}: give a multiple of {setting.eval_interval}, the steps "
                         f"between evaluations, above the {setting.learning_starts} random ones.")
    args.out = args.out.resolve()
    if args.core is not None:  # inherited by the runs
        if args.core not in os.sched_getaffinity(0):
            raise UsageError(f"--core is {args.core}: give one of {sorted(os.sched_getaffinity(0))}.")
        os.sched_setaffinity(0, {args.core})
    {"authors": authors, "ours": ours}[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyError) as error:
        print(f"authors_curves.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
