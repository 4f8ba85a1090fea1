"""N tasks' environments, padded to common sizes and stepped in lockstep, in this process or in K worker processes.

    envs = VectorEnv(("cartpole-swingup", "walker-walk"), seed=0, workers=2)
    obs = envs.reset()                    # [N, O]
    step = envs.step(action)              # action [N, A] -> Step
    envs.step_async(action); ...; step = envs.step_wait()
    envs.close()

Worker k holds the environments k, k + K, k + 2K, ... (neighbours in a suite cost alike, so this spreads the expensive
ones), steps them one after the other and writes the results into their rows of one block of shared memory. A pipe
carries the commands only. Gymnasium's AsyncVectorEnv has a process per environment, each of which imports the main
script and torch with it; suites/README.md has the comparison.
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
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

import suites
from suites.base import SuiteError
from suites.cores import default_workers, num_cores

__all__ = ["EnvError", "Step", "VectorEnv", "default_workers", "env_seed", "num_cores"]

MEMORY = "/dev/shm"  # where files lie in memory


class Step(NamedTuple):
    """What one step of all N environments led to."""

    next_obs: np.ndarray  # [N, O] float32, the true next observation, also where an episode ended
    reward: np.ndarray  # [N] float32
    terminated: np.ndarray  # [N] bool, the task ended the episode
    truncated: np.ndarray  # [N] bool, a time limit ended the episode
    success: np.ndarray  # [N] float32, 0 or 1 of this step, NaN where the task defines none
    obs: np.ndarray  # [N, O] float32, what to act on next: the reset's where an episode ended, next_obs elsewhere


class EnvError(RuntimeError):
    """An environment raised or returned what is no finite number, or the worker that held it died.

    The message names the tasks concerned and holds the original traceback, where there is one.
    """


def env_seed(seed: int, index: int) -> int:
    """The seed of environment `index` of a vector environment seeded with `seed`: 31 bits, for simulators in C."""
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1)[0] >> 1)


def _row_dtype(obs_dim: int, act_dim: int) -> np.dtype:
    """What lies in shared memory for one environment: its action, and what Step holds of it."""
    return np.dtype(
        [
            ("action", np.float32, (act_dim,)),
            ("next_obs", np.float32, (obs_dim,)),
            ("reward", np.float32),
            ("terminated", np.bool_),
            ("truncated", np.bool_),
            ("success", np.float32),
            ("obs", np.float32, (obs_dim,)),
        ],
        align=True,
    )


def _shared_file(size: int) -> Any:
    """A file of `size` bytes to share memory through, without a name: nothing stays behind, however this process ends.

    Its space is taken now: memory of a file that a full disk has no room for would kill by SIGBUS when it is written.
    """
    allocate = getattr(os, "posix_fallocate", lambda fd, start, size: os.truncate(fd, size))  # macOS lacks it
    reasons = []
    for directory in (MEMORY, None):  # None: the temporary directory
        try:
            file = tempfile.TemporaryFile(dir=directory)
            allocate(file.fileno(), 0, size)
            return file
        except OSError as error:
            reasons.append(f"{directory or 'the temporary directory'}: {error.strerror or error}")
    raise SuiteError(
        f"The worker processes have no {size:,} bytes to share with this one ({'; '.join(reasons)}): free some space, "
        "set TMPDIR to a directory that has some, or do without workers by --workers 0."
    )


def _float32(name: str, value: Any) -> np.ndarray:
    """`value` as float32. Raises ValueError, saying what and where, if an element is no finite number as such."""
    array = np.asarray(value, np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        first = np.flatnonzero(~finite)[0]
        where = f" in element {first} of {array.size}" if array.ndim else ""
        raise ValueError(f"The {name} is {np.ravel(value)[first]}{where}, which is no finite float32 number.")
    return array


class EnvGroup:
    """Some of the environments, those of the rows `own` of all N, stepped one after the other."""

    def __init__(self, own: slice, make: Callable[..., gym.Env], tasks: Sequence[str], seeds: list, options: dict):
        self.own, self.tasks, self.envs = own, tasks[own], []
        self.episode_steps = [0] * len(self.tasks)
        for i, (task, seed) in enumerate(zip(self.tasks, seeds[own], strict=True)):
            with self._blame(i, "while it was made"):
                self.envs.append(make(task, seed, **options))

    @contextlib.contextmanager
    def _blame(self, i: int, when: str) -> Iterator[None]:
        """Turns what an environment raises into an EnvError that names it; a SuiteError names it already."""
        try:
            yield
        except SuiteError:
            raise
        except Exception as error:
            if self.episode_steps[i]:
                when += f", at step {self.episode_steps[i]} of its episode"
            detail = "".join(traceback.format_exception(error))
            raise EnvError(f"The environment of task '{self.tasks[i]}' failed {when}.\n\n{detail}") from error

    def send(self, command: str, *args: Any) -> None:
        self.command = command, args

    def receive(self) -> Any:
        """Carries out the command that was sent last, and returns its result."""
        command, args = self.command
        return getattr(self, command)(*args)

    def dims(self) -> list[tuple[int, int]]:
        """(observation size, action size) of each environment."""
        return [(env.observation_space.shape[0], env.action_space.shape[0]) for env in self.envs]

    def connect(self, block: np.ndarray, memory: Any = None) -> None:
        """Takes the block of all N environments, from whose rows actions are read and to which results go."""
        rows = block[self.own]
        self.action, self.out = rows["action"], Step(*(rows[name] for name in Step._fields))

    def reset(self, seeds: list[int | None]) -> None:
        for i, seed in enumerate(seeds[self.own]):
            self._reset(i, seed)

    def _reset(self, i: int, seed: int | None = None) -> None:
        with self._blame(i, "in reset"):
            obs = _float32("observation", self.envs[i].reset(seed=seed)[0])
        self.episode_steps[i] = 0
        self.out.obs[i, : len(obs)] = obs

    def step(self) -> None:
        out = self.out
        for i, env in enumerate(self.envs):
            self.episode_steps[i] += 1
            with self._blame(i, "in step"):
                # A copy: the environment may keep its action, and the next one is written over this memory.
                action = self.action[i, : env.action_space.shape[0]].copy()
                obs, reward, terminated, truncated, info = env.step(action)
                obs, out.reward[i] = _float32("observation", obs), _float32("reward", reward)
            out.next_obs[i, : len(obs)] = obs
            out.terminated[i], out.truncated[i] = terminated, truncated
            out.success[i] = info.get("success", math.nan)
            if terminated or truncated:
                self._reset(i)
            else:
                out.obs[i, : len(obs)] = obs

    def close(self, kill: bool = False) -> None:
        for env in self.envs if not kill else ():
            env.close()

    def join(self) -> None:
        pass


class _Worker:
    """An EnvGroup in a process of its own.

    The process is a fresh interpreter and not one of `multiprocessing`: fork would copy a parent that holds threads
    and a CUDA context; spawn and forkserver import the main script again, and torch with it, in every worker.
    """

    # Ctrl-C, a terminal that closes and a scheduler's signals reach the workers too: the parent decides what they mean.
    BOOT = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
from suites.vector import _worker_main
_worker_main(int(sys.argv[1]))
"""

    def __init__(self, own: slice, make: Callable[..., gym.Env], tasks: Sequence[str], *args: Any):
        self.tasks = tasks[own]
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", self.BOOT, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],  # and no others: the pipe ends when this process does, however it does
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.send(own, make, tasks, *args)

    def send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # a dead worker is reported by receive()
            self.pipe.send(message)

    def receive(self) -> Any:
        try:
            result, error = self.pipe.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            if code == -signal.SIGKILL:
                how += " (out of memory?)"
            message = f"The worker process that held the environments of {', '.join(self.tasks)} {how}."
            raise EnvError(message) from None
        if error is not None:
            raise error
        return result

    def connect(self, block: np.ndarray, memory: Any) -> None:
        self.send("connect", block.dtype)
        with contextlib.suppress(OSError):
            send_handle(self.pipe, memory.fileno(), self.process.pid)
        self.receive()

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


def _worker_main(pipe_fd: int) -> None:
    os.set_inheritable(pipe_fd, False)
    pipe, group = Connection(pipe_fd), None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has closed, or is gone
        arguments = pipe.recv()
        while True:
            command, *args = pipe.recv()
            if command == "connect":
                memory_fd = recv_handle(pipe)
                args = [np.frombuffer(mmap.mmap(memory_fd, 0), *args)]
                os.close(memory_fd)
            try:
                group = group or EnvGroup(*arguments)
                reply = getattr(group, command)(*args), None
            except (EnvError, SuiteError) as error:
                reply = None, error
            pipe.send(reply)
    if group:
        group.close()


class VectorEnv:
    """The environments of `tasks`, one each, that step together.

    Observations are padded with zeros to the longest, O; each environment is given only its own slice of the actions.
    The seed of an environment depends on `seed` and its row alone: trajectories are the same whatever `workers` is.

    tasks: N task names. workers: number of worker processes, 0 steps in this one, None is by the cores. render: make
    `render()` possible, which steps in this one as well. make: `make(task, seed, render_mode=...)`, instead of
    `suites.make`, for tasks of the suites or of its own; workers import it by its name. pad_to: least O and A. rows:
    the row of each task in the whole run, by default 0 to N - 1, for processes that share a run's tasks, and agree:
    what makes O and A the same in all of them. goals: as for `suites.make`; "frozen" makes every environment with
    `seed` itself, as the authors do, and so with their goals.

    Raises SuiteError, before anything is made, for what is missing here or cannot be drawn. Every method raises
    EnvError where an environment or a worker fails; the vector environment is closed then.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        seed: int,
        workers: int | None = 0,
        render: bool = False,
        make: Callable[..., gym.Env] | None = None,
        pad_to: tuple[int, int] = (0, 0),
        rows: Sequence[int] | None = None,
        goals: str = "fresh",
        agree: Callable[[list[int]], list[int]] = list,
    ):
        self.tasks, self.num_envs = tuple(tasks), len(tasks)
        workers = 0 if render else default_workers(tasks) if workers is None else workers
        checked = self.tasks
        if make:  # which may have tasks of its own
            checked = tuple(task for task in tasks if any(module.owns(task) for module in suites.BENCHMARKS))
        suites.check(checked)
        if render:
            suites.check_rendering(checked)
        self._rows = range(self.num_envs) if rows is None else rows
        seeds = [seed] * self.num_envs if goals == "frozen" else self._seeds(seed)
        options = {"render_mode": "rgb_array" if render else None} | ({} if goals == "fresh" else {"goals": goals})
        self._groups, self._pending = [], None  # a command whose results were not collected yet
        try:
            num_groups = min(max(workers, 1), self.num_envs)
            owned = [slice(k, None, num_groups) for k in range(num_groups)]
            for own in owned:
                group = _Worker if workers else EnvGroup
                self._groups.append(group(own, make or suites.make, self.tasks, seeds, options))
            dims = np.empty((self.num_envs, 2), int)
            for own, result in zip(owned, self._call("dims"), strict=True):
                dims[own] = result
            self.obs_dims, self.act_dims = dims.T
            self.obs_dim, self.act_dim = agree(np.maximum(dims.max(axis=0), pad_to).tolist())

            dtype = _row_dtype(self.obs_dim, self.act_dim)
            size = self.num_envs * dtype.itemsize
            with _shared_file(size) if workers else contextlib.nullcontext() as memory:
                self._block = np.frombuffer(mmap.mmap(memory.fileno(), 0) if workers else bytearray(size), dtype)
                for group in self._groups:
                    group.connect(self._block, memory)
        except BaseException:
            self._close(kill=True)
            raise

    def _seeds(self, seed: int | None) -> list[int | None]:
        return [None if seed is None else env_seed(seed, row) for row in self._rows]

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Starts an episode everywhere, reseeding every environment where a seed is given. Returns obs [N, O]."""
        self._call("reset", self._seeds(seed))
        return self._block["obs"].copy()

    def step_async(self, action: np.ndarray) -> None:
        """Sends the actions, float32 [N, A] in [-1, 1], and returns at once; workers step meanwhile.

        Raises ValueError for a wrong shape, NaN or infinity.
        """
        if action.shape != (self.num_envs, self.act_dim):
            raise ValueError(f"The actions have shape {action.shape}, not {(self.num_envs, self.act_dim)}.")
        if not np.isfinite(action).all():
            names = [self.tasks[row] for row in np.flatnonzero(~np.isfinite(action).all(axis=1))]
            raise ValueError(f"The actions for {', '.join(names)} contain NaN or infinity.")
        self._require_idle()
        self._block["action"] = action
        self._send("step")

    def step_wait(self) -> Step:
        """What the actions that were sent last led to."""
        if self._pending != "step":
            raise RuntimeError("step_wait() was called without step_async() before it.")
        self._receive()
        return Step(*(self._block[name].copy() for name in Step._fields))

    def step(self, action: np.ndarray) -> Step:
        """`step_async` and `step_wait`."""
        self.step_async(action)
        return self.step_wait()

    def render(self) -> list[np.ndarray]:
        """One RGB frame, uint8 [height, width, 3], per environment; sizes may differ between tasks."""
        self._require_idle()
        if isinstance(self._groups[0], _Worker):
            raise RuntimeError("Frames are rendered in this process only: make the environments with workers=0.")
        return [env.render() for env in self._groups[0].envs]

    def close(self) -> None:
        """Closes every environment and ends the workers. May be called more than once, and after an error."""
        self._close(kill=False)

    def _close(self, kill: bool) -> None:
        groups, self._groups = self._groups, []
        for group in groups:
            group.close(kill)
        for group in groups:
            group.join()

    def _require_idle(self) -> None:
        if not self._groups:
            raise RuntimeError("The vector environment is closed.")
        if self._pending:
            raise RuntimeError(f"The results of the last {self._pending} were not collected: call step_wait() first.")

    def _send(self, command: str, *args: Any) -> None:
        self._require_idle()
        self._pending = command
        for group in self._groups:
            group.send(command, *args)

    def _receive(self) -> list:
        """What the pending command returned in each group."""
        try:
            results = [group.receive() for group in self._groups]
        except Exception:
            self._close(kill=True)
            raise
        self._pending = None
        return results

    def _call(self, command: str, *args: Any) -> list:
        self._send(command, *args)
        return self._receive()
