"""What tests share: one thread, toy tasks that cost nothing, and programs in forked processes, which import nothing."""

import csv
import dataclasses
import importlib
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, and for every process that a test starts: several of them share the cores.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

import harness  # noqa: E402
import suites  # noqa: E402
from suites.atari import Step  # noqa: E402

EPISODE = 10
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
TRAIN = ("--learning-starts 10 --total-steps 80 --eval-interval 20 --checkpoint-interval 20 --log-interval 20 "
         "--eval-episodes 1 --batch-size 4 --updates-per-step 1 --device cpu")
SMALL = {  # two tasks of 80 steps, with a checkpoint and an evaluation every 20
    "brc_sac": f"--tasks reach drawer-close --width 16 --actor-width 8 --workers 0 {TRAIN}",
    "brc_drq": f"--tasks Pong Breakout --encoder-scale 0.03125 --hidden-width 16 {TRAIN}",
}


class Pendulum(gym.Env):
    """Deterministic, with episodes of 10 steps that end by truncation: a run that stops between episodes loses none."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    steps = 0  # of all episodes

    def reset(self, *, seed=None, options=None):
        self.t, self.state = 0, np.array([0.5, -0.5, 0.0], np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        self.state = (0.9 * self.state + 0.1 * np.array([action[0], action[1], np.sin(self.t)])).astype(np.float32)
        Toys.hook(self)
        return self.state.copy(), float(-np.abs(self.state).sum()), False, self.t == EPISODE, {"success": 0.0}

    def render(self):
        return np.full((4, 4, 3), self.t, np.uint8)


class FakeGames:
    """In place of suites.atari.Games: episodes of 10 steps that end by truncation, a life lost in every seventh."""

    def __init__(self, tasks, max_frames=0):
        self.tasks, self.num_envs = tuple(tasks), len(tasks)
        self.steps = 0  # of all episodes

    def reset(self, seed: int) -> np.ndarray:
        self.t = np.zeros(self.num_envs, int)
        self.stacks = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        self.push(np.arange(self.num_envs), np.zeros(self.num_envs, int))
        return self.stacks.copy()

    def push(self, rows, action) -> None:
        self.stacks[rows, :-1] = self.stacks[rows, 1:]
        self.stacks[rows, -1] = 0
        self.stacks[rows, -1, 4 * self.t[rows], 4 * action] = 200

    def step_async(self, action, rows=None) -> None:
        self.rows, self.action = np.arange(self.num_envs) if rows is None else rows, action

    def step_wait(self) -> Step:
        rows, action = self.rows, self.action
        self.steps += 1
        Toys.hook(self)
        self.t[rows] += 1
        self.push(rows, action)
        next_obs, over = self.stacks[rows].copy(), self.t[rows] == EPISODE
        reward = np.where(action % 2 == 0, 3.0, -1.0).astype(np.float32)
        life_lost = (self.t[rows] % 7 == 0) & ~over
        self.t[rows[over]] = 0
        self.stacks[rows[over]] = 0
        self.push(rows[over], np.zeros(over.sum(), int))
        return Step(next_obs, reward, np.zeros_like(over), over, life_lost, self.stacks[rows].copy())

    def step(self, action, rows=None) -> Step:
        self.step_async(action, rows)
        return self.step_wait()

    def close(self) -> None:
        pass


class Toys:
    """What else a test wants to happen in a step: `hook(env)`, whose `steps` says in which."""

    hook: Callable = staticmethod(lambda env: None)


def at_step(step: int, action: Callable[[], object]) -> None:
    """What the training environments do in this step, once."""
    actions = {step: action}
    Toys.hook = staticmethod(lambda env: actions.pop(env.steps, lambda: None)())


def make_env(task: str, seed: int = 0, **options) -> gym.Env:
    """suites.make; skips the test where what the task needs is not installed."""
    try:
        suites.check((task,))
    except suites.SuiteError as error:
        pytest.skip(f"not installed ({error})")
    return suites.make(task, seed, **options)


def episode(env: gym.Env, steps: int, seed: int | None = None, after_reset: Callable[[], object] = lambda: None
            ) -> np.ndarray:
    """All that `steps` fixed pseudo-random actions lead to, over as many episodes as it takes, flattened."""
    env.action_space.seed(0)
    trace = [env.reset(seed=seed)[0].ravel()]
    after_reset()
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        numbers = [reward, terminated, truncated, info.get("success", 0.0), info.get("lives", 0)]
        trace += [obs.ravel(), numbers]
        if terminated or truncated:
            trace.append(env.reset()[0].ravel())
    return np.concatenate(trace)


@dataclasses.dataclass
class Program:
    """An agent's script on toy tasks: in this process by `train`, or as a user runs it by `start` and `run`."""

    module: object
    folder: Path

    @property
    def name(self) -> str:
        return self.module.__name__

    def args(self, **changes):
        """Arguments of the small run, resolved, in <folder>/run."""
        given = tyro.cli(self.module.Args, args=SMALL[self.name].split())
        changes = {"exp_name": "test", "run_dir": str(self.folder / "run")} | changes
        return self.module.resolve(dataclasses.replace(given, **changes))

    def resumed(self, args, **changes):
        return self.module.resolve(dataclasses.replace(args, resume=args.run_dir, **changes))

    def train_until(self, args, step: int) -> None:
        """Trains up to `step`, where the process is asked to stop."""
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            self.module.train(args)
        assert stopped.value.code == 128 + signal.SIGTERM

    def start(self, arguments: str, prepare: Callable[[], object] = lambda: None) -> int:
        """The script with these arguments in a forked process, its output in <folder>/out and err. Returns its id."""
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            os.chdir(self.folder)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            for number in SIGNALS:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            sys.argv = [f"{self.name}.py", *shlex.split(arguments)]
            prepare()
            try:
                harness.exit_on_error(self.module.main)
                code = 0
            except SystemExit as stop:
                code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, process: int) -> int:
        """Its exit code, or minus the signal that ended it."""
        deadline = time.monotonic() + 600
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(ended[1])

    def run(self, arguments: str, prepare: Callable[[], object] = lambda: None) -> int:
        return self.wait(self.start(arguments, prepare))

    out = property(lambda self: (self.folder / "out").read_text())
    err = property(lambda self: (self.folder / "err").read_text())

    def refused(self, arguments: str, code: int = 2) -> str:
        """Its one sentence on stderr, after the exit code was checked."""
        assert self.run(arguments) == code, self.err
        (line,) = self.err.splitlines()
        assert line.startswith(f"{self.name}.py: ") and line[-1] in ".?"
        return line


def checkpoint(run_dir: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(run_dir / name, weights_only=True)


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", errors="replace") as file:
        return list(csv.DictReader(file))


def steps_of(args) -> list[int]:
    """The steps of the evaluations in metrics.csv, each of which is complete."""
    rows = [row for row in read_csv(Path(args.run_dir, "metrics.csv")) if row["env_step"] and row["env_step"].isdigit()]
    metrics = {row["metric"] for row in rows}
    steps = [int(row["env_step"]) for row in rows if (row["env_name"], row["metric"]) == ("mean", "score")]
    for step in steps:
        held = [(row["env_name"], row["metric"]) for row in rows if int(row["env_step"]) == step]
        assert sorted(held) == sorted((name, metric) for name in (*args.tasks, "mean") for metric in metrics), step
    return steps


def files_under(folder: Path) -> dict:
    """Each file and folder in it, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def as_a_program(monkeypatch):
    """Every test has the script's name, the default signal handlers and the default random state of its own."""
    monkeypatch.setattr(harness, "PROGRAM", Path("brc_sac.py"))
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    Toys.hook = staticmethod(lambda env: None)


def on_toys(name: str, tmp_path: Path, monkeypatch) -> Program:
    module = importlib.import_module(name)
    monkeypatch.setattr(harness, "PROGRAM", Path(f"{name}.py"))
    monkeypatch.setattr(suites, "make", lambda task, seed, render_mode=None, **_: Pendulum())
    monkeypatch.setattr(suites, "check_rendering", lambda tasks: None)
    if name == "brc_drq":
        monkeypatch.setattr(module, "Games", FakeGames)
    return Program(module, tmp_path)


@pytest.fixture(params=list(SMALL))
def program(request, tmp_path, monkeypatch) -> Program:
    """Both agents, on toy tasks."""
    return on_toys(request.param, tmp_path, monkeypatch)


@pytest.fixture
def sac(tmp_path, monkeypatch) -> Program:
    """For what has nothing to do with the agent: one is enough."""
    return on_toys("brc_sac", tmp_path, monkeypatch)
