"""suites/vector.py: the same trajectories however many workers, true final observations, and every way of failing."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import suites
from suites import vector
from suites.vector import EnvError, VectorEnv, default_workers, env_seed

WORKERS = (0, 1, 2)
REAL_TASKS = ("reach", "cartpole-swingup", "reacher-easy")
PATIENCE = 30.0  # seconds, for what takes well under one on an idle machine


class Counter(gym.Env):
    """Observes (step, episode, noise); the reward is the sum of its action; what else it does is in its task name."""

    def __init__(self, seed: int, obs_dim: int, act_dim: int, length: int, trouble: str):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (act_dim,), np.float32)
        self.length, self.trouble = length, trouble
        self.seed = seed
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        if seed is not None or self.episode < 0:
            self.np_random = np.random.default_rng(self.seed if seed is None else seed)
        self.steps = 0
        self.episode += 1
        if self.trouble == "infinite_reset" and self.episode == 1:
            return np.full(self.observation_space.shape, np.inf, np.float32), {}
        return self._obs(), {}

    def _obs(self):
        obs = self.np_random.normal(size=self.observation_space.shape).astype(np.float32)
        obs[:2] = self.steps, self.episode
        return obs

    def step(self, action):
        assert action.shape == self.action_space.shape
        self.steps += 1
        obs, reward, info = self._obs(), float(action.sum()), {}
        if self.trouble == "success":
            info["success"] = float(self.steps == 2)
        if self.trouble == "slow":
            time.sleep(0.3)
        if self.steps == 3 and self.trouble == "raise":
            raise ZeroDivisionError("the simulator is unwell")
        if self.steps == 3 and self.trouble == "nan_obs":
            obs[1] = math.nan
        if self.steps == 3 and self.trouble == "nan_reward":
            reward = math.nan
        over = self.steps == self.length
        return obs, reward, over and self.trouble == "terminates", over and self.trouble != "terminates", info

    def render(self):
        return np.full((2, 2, 3), self.action_space.shape[0], np.uint8)


def make(task: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """Makes a Counter from a name such as `obs3-act2-length5-raise`."""
    if task == "absent":
        raise suites.SuiteError("The simulator of task 'absent' is not installed.")
    if task == "unmakeable":
        raise KeyError("no such model")
    obs, act, length, trouble = task.split("-")
    sizes = (int(part.lstrip("obsactlength")) for part in (obs, act, length))
    return Counter(seed, *sizes, trouble)


COUNTERS = ("obs3-act2-length5-fine", "obs6-act1-length3-terminates", "obs4-act4-length7-success")


@pytest.fixture
def vector_env():
    """Makes vector environments, and closes them after the test."""
    made = []

    def build(*args, **kwargs):
        made.append(VectorEnv(*args, **kwargs))
        return made[-1]

    yield build
    for envs in made:
        envs.close()


def worker_pids(envs: VectorEnv) -> list[int]:
    return [worker.process.pid for worker in envs._workers]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def assert_gone(pids: list[int], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)


def rollout(envs: VectorEnv, num_steps: int, seed: int | None = None) -> list[np.ndarray]:
    """The first observation and everything that `num_steps` random steps return, one array per quantity."""
    rng = np.random.default_rng(0)
    first_obs = envs.reset(seed)
    steps = []
    for _ in range(num_steps):
        action = rng.uniform(-1.0, 1.0, (envs.num_envs, envs.act_dim)).astype(np.float32)
        steps.append(envs.step(action))
    return [first_obs, *(np.stack(values) for values in zip(*steps, strict=True))]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_real_trajectories_do_not_depend_on_workers(vector_env):
    # 1010 steps: five automatic resets of MetaWorld and one of dm_control.
    serial, *parallel = (rollout(vector_env(REAL_TASKS, seed=3, workers=k), 1010) for k in WORKERS)
    truncated = serial[4]
    assert truncated.sum(axis=0).tolist() == [5, 1, 1]
    for other in parallel:
        assert_same(serial, other)


def test_counter_trajectories_do_not_depend_on_workers(vector_env):
    serial, *parallel = (rollout(vector_env(COUNTERS, seed=3, workers=k, make=make), 40) for k in (0, 1, 2, 3, 9))
    for other in parallel:
        assert_same(serial, other)


@pytest.mark.parametrize("workers", WORKERS)
def test_step_returns_the_true_final_observation_and_the_reset_one(vector_env, workers):
    envs = vector_env(COUNTERS, seed=0, workers=workers, make=make)
    envs.reset()
    action = np.zeros((3, 4), np.float32)
    for _ in range(2):
        step = envs.step(action)
    assert step.next_obs[:, 0].tolist() == [2.0, 2.0, 2.0]
    np.testing.assert_array_equal(step.obs, step.next_obs)
    before = step.obs.copy(), step.obs
    step = envs.step(action)  # the second environment's episode ends
    np.testing.assert_array_equal(*before)  # what was returned is not overwritten
    assert step.terminated.tolist() == [False, True, False]
    assert step.truncated.tolist() == [False, False, False]
    assert step.next_obs[:, :2].tolist() == [[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]]
    assert step.obs[:, :2].tolist() == [[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]]
    for _ in range(2):
        step = envs.step(action)
    assert step.terminated.tolist() == [False, False, False]
    assert step.truncated.tolist() == [True, False, False]


@pytest.mark.parametrize("workers", WORKERS)
def test_shapes_types_padding_and_action_slices(vector_env, workers):
    envs = vector_env(COUNTERS, seed=0, workers=workers, make=make)
    assert (envs.tasks, envs.num_envs, envs.obs_dim, envs.act_dim) == (COUNTERS, 3, 6, 4)
    assert (envs.obs_dims.tolist(), envs.act_dims.tolist()) == ([3, 6, 4], [2, 1, 4])
    obs = envs.reset()
    assert (obs.shape, obs.dtype) == ((3, 6), np.float32)
    step = envs.step(np.full((3, 4), 0.5, np.float32))
    for name, shape, dtype in [
        ("next_obs", (3, 6), np.float32),
        ("obs", (3, 6), np.float32),
        ("reward", (3,), np.float32),
        ("success", (3,), np.float32),
        ("terminated", (3,), np.bool_),
        ("truncated", (3,), np.bool_),
    ]:
        assert (getattr(step, name).shape, getattr(step, name).dtype) == (shape, dtype), name
    assert step.reward.tolist() == [1.0, 0.5, 2.0]  # the sum over each environment's own slice
    for padded in (obs, step.obs, step.next_obs):
        assert not padded[0, 3:].any() and not padded[2, 4:].any()
    np.testing.assert_array_equal(step.success, np.array([np.nan, np.nan, 0.0], np.float32))
    assert envs.step(np.zeros((3, 4), np.float32)).success[2] == 1.0


def test_seeds(vector_env):
    same = ("obs4-act1-length5-fine",) * 2
    a, b, c = (vector_env(same, seed=seed, make=make) for seed in (0, 0, 1))
    first = a.reset()
    assert (first[0, 2:] != first[1, 2:]).all(), "two environments share a seed"
    np.testing.assert_array_equal(first, b.reset())
    assert (first[:, 2:] != c.reset()[:, 2:]).all()
    # An environment's seed does not depend on how many others there are.
    np.testing.assert_array_equal(first[:1], vector_env(same[:1], seed=0, make=make).reset())
    assert len({env_seed(seed, index) for seed in range(100) for index in range(100)}) == 10_000


@pytest.mark.parametrize("workers", (0, 2))
def test_reset_with_a_seed_starts_over(vector_env, workers):
    envs = vector_env(REAL_TASKS, seed=0, workers=workers)
    first, again, other = (rollout(envs, 20, seed) for seed in (5, 5, 6))
    assert_same(first, again)
    assert not np.array_equal(first[0], other[0])


def test_workers_step_while_the_caller_goes_on(vector_env):
    envs = vector_env(COUNTERS, seed=0, workers=2, make=make)
    envs.reset()
    envs.step_async(np.ones((3, 4), np.float32))
    deadline = time.monotonic() + PATIENCE
    while envs._out.reward.tolist() != [2.0, 1.0, 4.0]:  # nothing was waited for, and yet the results arrive
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert envs.step_wait().reward.tolist() == [2.0, 1.0, 4.0]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("trouble", "where", "original"),
    [
        ("raise", "in step, at step 3 of its episode", "ZeroDivisionError: the simulator is unwell"),
        ("nan_obs", "in step, at step 3 of its episode", "observation holds NaN or infinity, first in element 1 of 3"),
        ("nan_reward", "in step, at step 3 of its episode", "The reward holds NaN or infinity: nan"),
        ("infinite_reset", "in reset", "The observation holds NaN or infinity, first in element 0 of 3: inf"),
    ],
)
def test_environment_that_fails_is_named(vector_env, workers, trouble, where, original):
    bad = f"obs3-act2-length4-{trouble}"
    envs = vector_env((COUNTERS[0], bad, COUNTERS[1]), seed=0, workers=workers, make=make)
    pids = worker_pids(envs) if workers else []
    envs.reset()
    with pytest.raises(EnvError) as error:
        for _ in range(4):
            envs.step(np.zeros((3, 2), np.float32))
    assert error.value.tasks == (bad,)
    for text in (f"'{bad}' failed {where}", original, "Traceback (most recent call last)"):
        assert text in str(error.value)
    envs.close()
    assert_gone(pids)
    with pytest.raises(RuntimeError, match="closed"):
        envs.step(np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("workers", WORKERS)
def test_task_that_cannot_be_made(workers):
    with pytest.raises(suites.SuiteError, match="'absent' is not installed"):
        VectorEnv((COUNTERS[0], "absent"), seed=0, workers=workers, make=make)
    with pytest.raises(EnvError, match="'unmakeable' failed while it was made") as error:
        VectorEnv((COUNTERS[0], "unmakeable"), seed=0, workers=workers, make=make)
    assert "KeyError: 'no such model'" in str(error.value)


@pytest.mark.parametrize("when", ("idle", "stepping"))
def test_killed_worker_is_reported_with_its_tasks(vector_env, when):
    tasks = (COUNTERS[0], "obs3-act1-length9-slow", COUNTERS[1], "obs3-act1-length8-slow")
    envs = vector_env(tasks, seed=0, workers=2, make=make)
    envs.reset()
    pids = worker_pids(envs)
    start = time.monotonic()
    if when == "idle":
        os.kill(pids[1], signal.SIGKILL)
        time.sleep(0.1)
    envs.step_async(np.zeros((4, 2), np.float32))
    if when == "stepping":
        os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EnvError, match="SIGKILL") as error:
        envs.step_wait()
    assert error.value.tasks == (tasks[1], tasks[3])
    assert all(task in str(error.value) for task in (tasks[1], tasks[3]))
    assert time.monotonic() - start < PATIENCE
    envs.close()
    assert_gone(pids)


def test_close_ends_the_workers_also_in_the_middle_of_a_step(vector_env):
    envs = vector_env(("obs3-act1-length9-slow",) * 2, seed=0, workers=2, make=make)
    pids = worker_pids(envs)
    envs.reset()
    envs.step_async(np.zeros((2, 1), np.float32))
    envs.close()
    envs.close()
    assert_gone(pids, seconds=0.0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_workers_ignore_ctrl_c_and_do_not_hold_torch(vector_env):
    envs = vector_env(REAL_TASKS[1:], seed=0, workers=2)
    envs.reset()
    for pid in worker_pids(envs):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        os.kill(pid, signal.SIGINT)
    envs.step(np.zeros((2, envs.act_dim), np.float32))


@pytest.mark.parametrize("doing", ("idle", "stepping"))
def test_no_orphans_when_the_parent_is_killed(doing):
    script = f"""
import numpy as np, time
from {__name__} import VectorEnv, make, worker_pids
envs = VectorEnv(("obs3-act1-length9-slow",) * 2, seed=0, workers=2, make=make)
envs.reset()
print(*worker_pids(envs), flush=True)
while True:
    envs.step(np.zeros((2, 1), np.float32)) if {doing == "stepping"} else time.sleep(1)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(is_running(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert_gone(pids)


def test_misuse(vector_env):
    envs = vector_env(COUNTERS, seed=0, make=make)
    envs.reset()
    with pytest.raises(RuntimeError, match="without step_async"):
        envs.step_wait()
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 4\)"):
        envs.step(np.zeros((3, 5), np.float32))
    action = np.zeros((3, 4), np.float32)
    action[1, 0] = np.nan
    with pytest.raises(ValueError, match=f"actions for {COUNTERS[1]} contain NaN"):
        envs.step(action)
    envs.step_async(np.zeros((3, 4), np.float32))
    with pytest.raises(RuntimeError, match="step_wait"):
        envs.step_async(np.zeros((3, 4), np.float32))
    envs.step_wait()


@pytest.mark.parametrize("workers", (0, 2))
def test_render_keeps_the_order_of_the_tasks(vector_env, workers):
    envs = vector_env(COUNTERS, seed=0, workers=workers, render=True, make=make)
    envs.reset()
    assert [int(frame[0, 0, 0]) for frame in envs.render()] == [2, 1, 4]


def test_suites_make_is_the_default(monkeypatch, vector_env):
    monkeypatch.setattr(suites, "make", make)
    assert vector_env(COUNTERS, seed=0).obs_dims.tolist() == [3, 6, 4]


@pytest.mark.parametrize(
    ("cores", "num_tasks", "workers"),
    [(1, 50, 0), (2, 50, 2), (2, 1, 1), (16, 50, 13), (16, 20, 10), (128, 85, 29)],
)
def test_default_workers(monkeypatch, cores, num_tasks, workers):
    monkeypatch.setattr(vector, "num_cores", lambda: cores)
    assert default_workers(("reach",) * num_tasks) == workers
