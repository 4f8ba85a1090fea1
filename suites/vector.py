"""N tasks' environments, padded to common sizes and stepped in lockstep, in this process or in K worker processes.

    envs = VectorEnv(("cartpole-swingup", "walker-walk"), seed=0, workers=2)
    obs = envs.reset()                    # [N, O]
    step = envs.step(action)              # action [N, A] -> Step
    envs.step_async(action); ...; step = envs.step_wait()
    envs.close()

Worker k holds the environments k, k + K, k + 2K, ... (neighbours in a suite cost alike, so this spreads the expensive
ones), steps them one after the other and writes the results into their rows of one block of shared memory. A pipe
carries the commands only.

Why not gymnasium.vector.AsyncVectorEnv with a group of environments in the place of each environment: it was tried
(gymnasium 1.4.0, forkserver, 2 workers, on 2 cores that were busy with other work). A vector step of 50 trivial
environments took 0.7 ms, here 0.25 to 0.4 (medians of 2000, two runs). Its workers import the main script again, and
torch with it: 285 MB each, here 105. It needs the padded sizes before there is an environment to ask, and builds one
group more in the parent to check them. When a worker was killed, step() raised a bare ConnectionResetError and close()
did not return within the 15 seconds or more that it was given.
"""

import contextlib
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

import suites
from suites.base import SuiteError


class Step(NamedTuple):
    """What one step of all N environments led to."""

    next_obs: np.ndarray  # [N, O] float32, the true next observation, also where an episode ended
    reward: np.ndarray  # [N] float32
    terminated: np.ndarray  # [N] bool, the task ended the episode
    truncated: np.ndarray  # [N] bool, a time limit ended the episode
    success: np.ndarray  # [N] float32, 0 or 1 of this step, NaN where the task defines none
    obs: np.ndarray  # [N, O] float32, what to act on next: the reset's where an episode ended, next_obs elsewhere


class EnvError(RuntimeError):
    """An environment raised or returned NaN or infinity, or the worker that held it died.

    tasks: the names of the tasks concerned. The message holds the original traceback, where there is one.
    """

    def __init__(self, message: str, tasks: tuple[str, ...]):
        super().__init__(message, tasks)  # all arguments, so that it survives pickling
        self.tasks = tasks

    def __str__(self) -> str:
        return self.args[0]


def env_seed(seed: int, index: int) -> int:
    """The seed of environment `index` of a vector environment seeded with `seed`: 31 bits, for simulators in C."""
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1)[0] >> 1)


def _views(buffer, num_envs: int, obs_dim: int, act_dim: int) -> tuple[np.ndarray, Step]:
    """The actions [N, A] and the results of a step, as arrays that lie one after the other in `buffer`."""
    shapes = {
        "action": (num_envs, act_dim),
        "next_obs": (num_envs, obs_dim),
        "obs": (num_envs, obs_dim),
        "reward": (num_envs,),
        "success": (num_envs,),
        "terminated": (num_envs,),  # the bools last, so that every float is aligned
        "truncated": (num_envs,),
    }
    arrays, offset = {}, 0
    for name, shape in shapes.items():
        dtype = np.bool_ if name in ("terminated", "truncated") else np.float32
        arrays[name] = np.frombuffer(buffer, dtype, math.prod(shape), offset).reshape(shape)
        offset += arrays[name].nbytes
    return arrays.pop("action"), Step(**arrays)


def _views_size(num_envs: int, obs_dim: int, act_dim: int) -> int:
    """Bytes that `_views` needs."""
    return num_envs * (4 * (act_dim + 2 * obs_dim + 2) + 2)


def _require_finite(name: str, value: np.ndarray | float) -> None:
    """Raises ValueError, saying what and where, if `value` holds NaN or infinity."""
    finite = np.isfinite(value)
    if not finite.all():
        first = np.flatnonzero(np.logical_not(finite))[0]
        where = f", first in element {first} of {np.size(value)}" if np.ndim(value) else ""
        raise ValueError(f"The {name} holds NaN or infinity{where}: {np.ravel(value)[first]}.")


class EnvGroup:
    """Some of the environments, those of `rows`, stepped one after the other. Reads and writes only their rows."""

    def __init__(
        self, make: Callable[..., gym.Env], tasks: Sequence[str], rows: Sequence[int], seed: int, render: bool
    ):
        self.tasks = tasks
        self.rows = rows
        self.envs = []
        self.episode_steps = dict.fromkeys(rows, 0)
        for row in rows:
            with self._blame(row, "while it was made"):
                env = make(tasks[row], env_seed(seed, row), render_mode="rgb_array" if render else None)
                self.envs.append(env)

    @contextlib.contextmanager
    def _blame(self, row: int, when: str) -> Iterator[None]:
        """Turns what an environment raises into an EnvError that names it; a SuiteError names it already."""
        try:
            yield
        except SuiteError:
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error))
            message = f"The environment of task '{self.tasks[row]}' failed {when}"
            if self.episode_steps[row]:
                message += f", at step {self.episode_steps[row]} of its episode"
            raise EnvError(f"{message}.\n\n{detail}", (self.tasks[row],)) from error

    def dims(self) -> list[tuple[int, int]]:
        """(observation size, action size) of each environment."""
        return [(env.observation_space.shape[0], env.action_space.shape[0]) for env in self.envs]

    def connect(self, action: np.ndarray, out: Step) -> None:
        """Takes the arrays of all N environments: actions are read from the one, results written to the others."""
        self.action, self.out = action, out

    def reset(self, seed: int | None = None) -> None:
        for row, env in zip(self.rows, self.envs, strict=True):
            self._reset(row, env, None if seed is None else env_seed(seed, row))

    def _reset(self, row: int, env: gym.Env, seed: int | None = None) -> None:
        with self._blame(row, "in reset"):
            obs, _ = env.reset(seed=seed)
            _require_finite("observation", obs)
        self.episode_steps[row] = 0
        self.out.obs[row, : len(obs)] = obs

    def step(self) -> None:
        out = self.out
        for row, env in zip(self.rows, self.envs, strict=True):
            self.episode_steps[row] += 1
            with self._blame(row, "in step"):
                # A copy: the environment may keep its action, and the next one is written over this memory.
                action = self.action[row, : env.action_space.shape[0]].copy()
                obs, reward, terminated, truncated, info = env.step(action)
                _require_finite("observation", obs)
                _require_finite("reward", reward)
            out.next_obs[row, : len(obs)] = obs
            out.reward[row] = reward
            out.terminated[row] = terminated
            out.truncated[row] = truncated
            out.success[row] = info.get("success", math.nan)
            if terminated or truncated:
                self._reset(row, env)
            else:
                out.obs[row, : len(obs)] = obs

    def render(self) -> list[np.ndarray]:
        frames = []
        for row, env in zip(self.rows, self.envs, strict=True):
            with self._blame(row, "in render"):
                frames.append(env.render())
        return frames

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _execute(group: EnvGroup | None, memory_fd: int, command: str, args: tuple) -> tuple[EnvGroup, Any]:
    """Carries out one command of VectorEnv. Returns the group and the command's result."""
    if command == "make":
        group = EnvGroup(*args)
        return group, group.dims()
    if command == "connect":
        return group, group.connect(*_views(mmap.mmap(memory_fd, 0), *args))
    return group, getattr(group, command)(*args)


class _InProcess:
    """A group in this process, behind the interface of `_Worker`. What is sent is done once the result is asked for."""

    def __init__(self, memory_fd: int):
        self.memory_fd = memory_fd
        self.group = None

    def send(self, command: str, args: tuple) -> None:
        self.command = command, args

    def receive(self) -> Any:
        self.group, result = _execute(self.group, self.memory_fd, *self.command)
        return result

    def close(self, kill: bool) -> None:
        if self.group and not kill:
            self.group.close()

    def join(self) -> None:
        pass


class _Worker:
    """A group in a process of its own.

    The process is a fresh interpreter and not one of `multiprocessing`: fork would copy a parent that holds threads
    and a CUDA context; spawn and forkserver import the main script again, and torch with it, in every worker.
    """

    BOOT = "import sys; from suites.vector import _worker_main; _worker_main(*map(int, sys.argv[1:]))"

    def __init__(self, memory_fd: int, tasks: Sequence[str]):
        self.tasks = tuple(tasks)
        self.pipe, theirs = Pipe()
        fds = theirs.fileno(), memory_fd
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", self.BOOT, *map(str, fds)],
            pass_fds=fds,  # and no others: the pipe ends when this process does, however it does
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()

    def send(self, command: str, args: tuple) -> None:
        with contextlib.suppress(OSError):  # a dead worker is reported by receive()
            self.pipe.send((command, args))

    def receive(self) -> Any:
        try:
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            if code == -signal.SIGKILL:
                how += " (out of memory?)"
            message = f"The worker process that held the environments of {', '.join(self.tasks)} {how}."
            raise EnvError(message, self.tasks) from None
        if error is not None:
            raise error
        return result

    def close(self, kill: bool) -> None:
        if kill:
            self.process.kill()
        self.pipe.close()

    def join(self) -> None:
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _worker_main(pipe_fd: int, memory_fd: int) -> None:
    # Ctrl-C at a terminal and a scheduler's signals reach the workers too: what they mean is for the parent to decide.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(pipe_fd, False)
    os.set_inheritable(memory_fd, False)
    pipe = Connection(pipe_fd)
    group = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed, or is gone
        while True:
            command, args = pipe.recv()
            try:
                group, result = _execute(group, memory_fd, command, args)
                reply = result, None
            except (EnvError, SuiteError) as error:
                reply = None, error
            pipe.send(reply)
    if group:
        group.close()


class VectorEnv:
    """The environments of `tasks`, one each, that step together.

    Observations are padded with zeros to the longest, O; each environment is given only its own slice of the actions.
    The seed of an environment depends on `seed` and its index alone: trajectories are the same whatever `workers` is.

    tasks: N task names. workers: number of worker processes, 0 steps in this one. render: make `render()` possible.
    make: `make(task, seed, render_mode=...)`, instead of `suites.make`; workers import it by its name. pad_to: least O
    and A.
    Raises SuiteError where a task cannot be made. Every method raises EnvError where an environment or a worker
    fails; the vector environment is closed then.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int,
        workers: int = 0,
        render: bool = False,
        make: Callable[..., gym.Env] | None = None,
        pad_to: tuple[int, int] = (0, 0),
    ):
        self.tasks = tuple(tasks)
        self.num_envs = len(self.tasks)
        num_groups = min(max(workers, 1), self.num_envs)
        self._groups = [range(k, self.num_envs, num_groups) for k in range(num_groups)]
        self._workers = []
        self._pending = None  # the command whose results were not collected yet
        # A file without a name: nothing stays behind, however this process ends.
        with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as memory:
            for rows in self._groups:
                held = [self.tasks[row] for row in rows]
                worker = _Worker(memory.fileno(), held) if workers > 0 else _InProcess(memory.fileno())
                worker.send("make", (make or suites.make, self.tasks, rows, seed, render))
                self._workers.append(worker)
            self._pending = "make"
            self.obs_dims, self.act_dims = np.array(self._by_row(self._receive())).T
            self.obs_dim = max(int(self.obs_dims.max()), pad_to[0])
            self.act_dim = max(int(self.act_dims.max()), pad_to[1])
            sizes = self.num_envs, self.obs_dim, self.act_dim
            memory.truncate(_views_size(*sizes))
            self._action, self._out = _views(mmap.mmap(memory.fileno(), 0), *sizes)
            self._call("connect", *sizes)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Starts an episode everywhere, reseeding every environment where a seed is given. Returns obs [N, O]."""
        self._call("reset", seed)
        return self._out.obs.copy()

    def step_async(self, action: np.ndarray) -> None:
        """Sends the actions, float32 [N, A] in [-1, 1], and returns at once; workers step meanwhile.

        Raises ValueError for a wrong shape, NaN or infinity.
        """
        if action.shape != self._action.shape:
            raise ValueError(f"The actions have shape {action.shape}; these environments take {self._action.shape}.")
        finite = np.isfinite(action).all(axis=1)
        if not finite.all():
            names = [task for task, ok in zip(self.tasks, finite, strict=True) if not ok]
            raise ValueError(f"The actions for {', '.join(names)} contain NaN or infinity.")
        self._check_idle()
        self._action[:] = action
        self._send("step")

    def step_wait(self) -> Step:
        """What the actions that were sent last led to."""
        if self._pending != "step":
            raise RuntimeError("step_wait() was called without step_async() before it.")
        self._receive()
        return Step(*(array.copy() for array in self._out))

    def step(self, action: np.ndarray) -> Step:
        """`step_async` and `step_wait`."""
        self.step_async(action)
        return self.step_wait()

    def render(self) -> list[np.ndarray]:
        """One RGB frame, uint8 [height, width, 3], per environment; sizes may differ between tasks."""
        return self._by_row(self._call("render"))

    def close(self) -> None:
        """Closes every environment and ends the workers. May be called more than once, and after an error."""
        self._close(kill=False)

    def _close(self, kill: bool) -> None:
        for worker in self._workers:
            worker.close(kill)
        for worker in self._workers:
            worker.join()
        self._workers = []

    def _check_idle(self) -> None:
        if not self._workers:
            raise RuntimeError("The vector environment is closed.")
        if self._pending:
            raise RuntimeError(f"The results of the last {self._pending} were not collected: call step_wait() first.")

    def _send(self, command: str, *args: Any) -> None:
        self._check_idle()
        self._pending = command
        for worker in self._workers:
            worker.send(command, args)

    def _receive(self) -> list:
        """What the pending command returned in each worker."""
        try:
            results = [worker.receive() for worker in self._workers]
        except Exception:
            self._close(kill=True)
            raise
        self._pending = None
        return results

    def _call(self, command: str, *args: Any) -> list:
        self._send(command, *args)
        return self._receive()

    def _by_row(self, results: list[list]) -> list:
        """Lists of one item per environment of each worker, as one list in the order of the tasks."""
        items = {}
        for rows, values in zip(self._groups, results, strict=True):
            items.update(zip(rows, values, strict=True))
        return [items[row] for row in range(self.num_envs)]


def num_cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def default_workers(tasks: Sequence[str]) -> int:
    """How many worker processes suit `tasks` on this machine: one per core, but none that would not shorten a step.

    A vector step takes as long as the worker with the most environments, so 20 tasks on 16 cores get 10 workers of two.
    """
    # ms per vector step on 2 cores (mujoco 3.3.0), in this process / in 2 workers / in 2 threads, each the fastest of
    # four short runs that had priority over other work on the machine:
    #     50 tasks of mw 18.9 / 10.6 / 23.7, dmc-dogs 3.1 / 2.3 / 3.5, dmc-humanoids 0.7 / 1.0 / 0.9,
    #     hb-medium 5.3 / 4.9, 8 tasks of hb-hard 14.6 / 9.9 (its environments exclude threads),
    #     one walker-walk 0.12, in 1 worker 0.19.
    # Workers cost the cheap suites some 0.1 to 0.3 ms, little beside the updates. More cores were not measured.
    cores = num_cores()
    if cores == 1:
        return 0
    envs_per_worker = math.ceil(len(tasks) / min(cores, 32))  # at most 32, for their memory: 105 MB each and more
    return math.ceil(len(tasks) / envs_per_worker)
