"""suites/vector.py: the same trajectories however many workers, true final observations, and every way of failing."""

import errno
import math
import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import suites
from suites import cores, vector
from suites.vector import EnvError, VectorEnv, default_workers, env_seed, num_cores

WORKERS = (0, 2)
REAL_TASKS = "reach", "cartpole-swingup", "reacher-easy"
PATIENCE = 30.0  # seconds, for what takes well under one on an idle machine


class Counter(gym.Env):
    """Observes (step, episode, noise); the reward is the sum of its action; what else it does is in its task name."""

    def __init__(self, seed: int, obs_dim: int, act_dim: int, length: int, trouble: str):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (act_dim,), np.float32)
        self.seed, self.length, self.trouble, self.episode = seed, length, trouble, -1

    def reset(self, *, seed=None, options=None):
        if seed is not None or self.episode < 0:
            self.np_random = np.random.default_rng(self.seed if seed is None else seed)
        self.steps, self.episode = 0, self.episode + 1
        return self._obs(np.inf if self.trouble == "infinite_reset" and self.episode == 1 else 0.0), {}

    def _obs(self, second=0.0):
        obs = self.np_random.normal(size=self.observation_space.shape)
        obs[:2] = self.steps, self.episode + second
        return obs

    def step(self, action):
        assert action.shape == self.action_space.shape
        self.steps += 1
        time.sleep(0.3 * (self.trouble == "slow"))
        trouble = self.trouble if self.steps == 3 else ""
        if trouble == "raise":
            raise ZeroDivisionError("the simulator is unwell")
        obs = self._obs({"nan_obs": math.nan, "huge_obs": -1e39}.get(trouble, 0.0))
        reward = {"nan_reward": math.nan, "huge_reward": 1e39}.get(trouble, float(action.sum()))
        over, terminates = self.steps == self.length, self.trouble == "terminates"
        info = {"success": float(self.steps == 2)} if self.trouble == "success" else {}
        return obs, reward, over and terminates, over and not terminates, info

    def render(self):
        return np.full((2, 2, 3), self.action_space.shape[0], np.uint8)


def make(task: str, seed: int, render_mode: str | None = None) -> gym.Env:
    """Makes a Counter from a name such as `3-2-5-raise`: its sizes, its episodes' length and its trouble."""
    if task == "absent":
        raise suites.SuiteError("The simulator of task 'absent' is not installed.")
    if task == "unmakeable":
        raise KeyError("no such model")
    *sizes, trouble = task.split("-")
    return Counter(seed, *map(int, sizes), trouble)


COUNTERS = "3-2-5-fine", "6-1-3-terminates", "4-4-7-success"


@pytest.fixture
def vector_env(request):
    """Makes vector environments, and closes them after the test."""
    def build(*args, make=make, **kwargs):
        envs = VectorEnv(*args, make=make, **kwargs)
        request.addfinalizer(envs.close)
        return envs
    return build


def worker_pids(envs: VectorEnv) -> list[int]:
    return [worker.process.pid for worker in envs._groups if isinstance(worker, vector._Worker)]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def rollout(envs: VectorEnv, num_steps: int, seed: int | None = None) -> list[np.ndarray]:
    """The first observation and everything that `num_steps` random steps return, one array per quantity."""
    rng, first_obs = np.random.default_rng(0), envs.reset(seed)
    actions = rng.uniform(-1.0, 1.0, (num_steps, envs.num_envs, envs.act_dim)).astype(np.float32)
    steps = [envs.step(action) for action in actions]
    return [first_obs, *(np.stack(values) for values in zip(*steps, strict=True))]


def test_trajectories_do_not_depend_on_workers_and_a_seed_starts_over(vector_env):
    both = [vector_env(REAL_TASKS, seed=3, workers=workers, make=None) for workers in WORKERS]
    serial, parallel = (rollout(envs, 1010) for envs in both)
    assert serial[4].sum(axis=0).tolist() == [5, 1, 1]  # automatic resets, of MetaWorld and of dm_control
    np.testing.assert_equal(parallel, serial)
    for envs in both:
        first, again, other = (rollout(envs, 20, seed) for seed in (5, 5, 6))
        np.testing.assert_equal(again, first)
        assert not np.array_equal(first[0], other[0])
    serial, *parallel = (rollout(vector_env(COUNTERS, seed=3, workers=k), 40) for k in (0, 1, 2, 9))
    np.testing.assert_equal(parallel, [serial] * 3)


@pytest.mark.parametrize("workers", WORKERS)
def test_steps_are_padded_and_return_the_true_final_observation_and_the_reset_one(vector_env, workers):
    envs = vector_env(COUNTERS, seed=0, workers=workers)
    assert (envs.tasks, envs.num_envs, envs.obs_dim, envs.act_dim) == (COUNTERS, 3, 6, 4)
    assert (envs.obs_dims.tolist(), envs.act_dims.tolist()) == ([3, 6, 4], [2, 1, 4])
    obs, action = envs.reset(), np.full((3, 4), 0.5, np.float32)
    step = envs.step(action)
    for array in (obs, step.obs, step.next_obs):
        assert array.shape == (3, 6) and array.dtype == np.float32 and array.flags.c_contiguous
        assert not array[0, 3:].any() and not array[2, 4:].any()
    for name, dtype in dict(reward="f4", success="f4", terminated="?", truncated="?").items():
        assert getattr(step, name).shape == (3,) and getattr(step, name).dtype == dtype, name
    assert step.reward.tolist() == [1.0, 0.5, 2.0]  # the sum over each environment's own slice
    np.testing.assert_array_equal(step.success, np.array([np.nan, np.nan, 0.0], np.float32))

    step = envs.step(action)
    assert step.next_obs[:, 0].tolist() == [2.0, 2.0, 2.0] and step.success[2] == 1.0
    np.testing.assert_array_equal(step.obs, step.next_obs)
    before = step.obs.copy(), step.obs
    step = envs.step(action)  # the second environment's episode ends
    np.testing.assert_array_equal(*before)  # what was returned is not overwritten
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([False, True, False], [False] * 3)
    assert step.next_obs[:, :2].tolist() == [[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]]
    assert step.obs[:, :2].tolist() == [[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]]
    _, step = envs.step(action), envs.step(action)
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([False] * 3, [True, False, False])
    wide = vector_env(COUNTERS, seed=0, workers=workers, pad_to=(9, 2))
    assert (wide.obs_dim, wide.act_dim, wide.reset().shape) == (9, 4, (3, 9))


def test_seeds(vector_env):
    same = ("4-1-5-fine",) * 2
    first = vector_env(same, seed=0).reset()
    assert (first[0, 2:] != first[1, 2:]).all(), "two environments share a seed"
    np.testing.assert_array_equal(first, vector_env(same, seed=0).reset())
    assert (first[:, 2:] != vector_env(same, seed=1).reset()[:, 2:]).all()
    # An environment's seed depends on its row in the whole run, not on how many others there are here.
    for workers in WORKERS:
        mine = vector_env(same, seed=0, workers=workers, rows=[1, 7])
        for seed in (None, 5):
            whole = vector_env(same * 4, seed=0).reset(seed)
            np.testing.assert_array_equal(mine.reset(seed)[:, 2:], whole[[1, 7], 2:])
    with pytest.raises(ValueError):
        vector_env(same, seed=0, rows=[1])
    assert len({env_seed(seed, index) for seed in range(100) for index in range(100)}) == 10_000


@pytest.mark.parametrize("workers", WORKERS)
def test_goals_of_metaworld(vector_env, workers):
    """Fresh in every episode, or for ever those that MetaWorld draws in its constructor from the seed that is given."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as ORIGINAL

    def goals(envs):  # of 5 episodes, three of them reseeded: those of training, and of evaluations
        obs = np.array([envs.reset(seed) for seed in (None, None, 1, 2, 3)])[:, :, 36:39]
        return [len(np.unique(obs[:, row], axis=0)) for row in (0, 1)], obs

    tasks = ("push", "drawer-close", "cartpole-balance")
    for seed in (0, 42):  # training, and evaluation of the same run
        assert goals(vector_env(tasks, seed=seed, workers=workers, make=None))[0] == [5, 5]
        drawn, obs = goals(vector_env(tasks, seed=seed, workers=workers, make=None, goals="frozen"))
        assert drawn == [1, 1]
        for row, task in enumerate(tasks[:2]):
            expected, _ = ORIGINAL[f"{task}-v3-goal-observable"](seed=seed).reset()
            np.testing.assert_array_equal(obs[0, row], expected[36:].astype(np.float32))


def test_workers_step_while_the_caller_goes_on(vector_env):
    envs, start = vector_env(COUNTERS, seed=0, workers=2), time.monotonic()
    envs.reset()
    envs.step_async(np.ones((3, 4), np.float32))
    while envs._block["reward"].tolist() != [2.0, 1.0, 4.0]:  # nothing was waited for, and yet the results arrive
        assert time.monotonic() < start + PATIENCE
        time.sleep(0.01)
    assert envs.step_wait().reward.tolist() == [2.0, 1.0, 4.0]


STEP = "in step, at step 3 of its episode"
FAILURES = {
    "raise": (STEP, "ZeroDivisionError: the simulator is unwell"),
    "nan_obs": (STEP, "The observation is nan in element 1 of 3"),
    "huge_obs": (STEP, "The observation is -1e+39 in element 1 of 3"),  # finite, but not as float32
    "nan_reward": (STEP, "The reward is nan"),
    "huge_reward": (STEP, "The reward is 1e+39"),
    "infinite_reset": ("in reset", "The observation is inf in element 1 of 3"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("workers", "trouble"), [*((0, trouble) for trouble in FAILURES), (2, "raise")])
def test_environment_that_fails_is_named(vector_env, workers, trouble):
    bad, (where, original) = f"3-2-4-{trouble}", FAILURES[trouble]
    envs = vector_env((COUNTERS[0], bad, COUNTERS[1]), seed=0, workers=workers)
    pids = worker_pids(envs)
    envs.reset()
    with pytest.raises(EnvError) as error:
        for _ in range(4):
            envs.step(np.zeros((3, 2), np.float32))
    for text in (f"'{bad}' failed {where}", original, "Traceback (most recent call last)"):
        assert text in str(error.value)
    envs.close()
    assert gone(pids)
    with pytest.raises(RuntimeError, match="closed"):
        envs.step(np.zeros((3, 2), np.float32))


@pytest.mark.parametrize("workers", WORKERS)
def test_task_that_cannot_be_made(vector_env, workers):
    with pytest.raises(suites.SuiteError, match="'absent' is not installed"):
        vector_env((COUNTERS[0], "absent"), seed=0, workers=workers)
    with pytest.raises(EnvError, match="(?s)'unmakeable' failed while it was made.*KeyError: 'no such model'"):
        vector_env((COUNTERS[0], "unmakeable"), seed=0, workers=workers)


@pytest.mark.parametrize("killed", ("idle", "stepping", "never"))
def test_killed_worker_is_reported_with_its_tasks_and_close_ends_all_at_once(vector_env, killed):
    tasks = COUNTERS[0], "3-1-9-slow", COUNTERS[1], "3-1-8-slow"
    envs = vector_env(tasks, seed=0, workers=2)
    envs.reset()
    pids, start = worker_pids(envs), time.monotonic()
    if killed == "idle":
        os.kill(pids[1], signal.SIGKILL)
        time.sleep(0.1)
    envs.step_async(np.zeros((4, 2), np.float32))
    if killed == "stepping":
        os.kill(pids[1], signal.SIGKILL)
    if killed != "never":
        with pytest.raises(EnvError, match=f"environments of {tasks[1]}, {tasks[3]} was killed by SIGKILL"):
            envs.step_wait()
        assert time.monotonic() - start < PATIENCE
    envs.close()
    envs.close()
    assert gone(pids)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_workers_leave_signals_to_the_parent_and_do_not_hold_torch(vector_env):
    envs = vector_env(REAL_TASKS[1:], seed=0, workers=2, make=None)
    envs.reset()
    for pid in worker_pids(envs):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
    envs.step(np.zeros((2, envs.act_dim), np.float32))


def test_misuse(vector_env):
    envs = vector_env(COUNTERS, seed=0)
    envs.reset()
    with pytest.raises(RuntimeError, match="without step_async"):
        envs.step_wait()
    with pytest.raises(ValueError, match=r"\(3, 5\), not \(3, 4\)"):
        envs.step(np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match=f"actions for {COUNTERS[1]} contain NaN"):
        envs.step(np.array([[0] * 4, [np.nan] + [0] * 3, [0] * 4], np.float32))
    envs.step_async(np.zeros((3, 4), np.float32))
    for call in (envs.reset, envs.render, lambda: envs.step_async(np.ones((3, 4), np.float32))):
        with pytest.raises(RuntimeError, match="step_wait"):
            call()
    assert not envs.step_wait().reward.any()


def test_frames_are_rendered_in_this_process_only(vector_env):
    for workers in (0, 1):
        envs = vector_env(COUNTERS, seed=0, workers=workers, render=True)
        assert [int(frame[0, 0, 0]) for frame in envs.render()] == [2, 1, 4]
    with pytest.raises(RuntimeError, match="workers=0"):
        vector_env(COUNTERS[:1], seed=0, workers=1).render()


# ------------------------------------------------------------------------------------- what a container leaves over


def test_shared_memory_falls_back_to_the_temporary_directory(vector_env, monkeypatch, tmp_path):
    expected, full, allocate = rollout(vector_env(COUNTERS, seed=0), 10), [], os.posix_fallocate
    no_space, read_only = (OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EROFS))

    def allocate_on_a_full_disk(*args):
        if full:
            raise full.pop()
        allocate(*args)

    monkeypatch.setattr(os, "posix_fallocate", allocate_on_a_full_disk)
    (tmp_path / "file").touch()
    for memory, error in (("absent", None), ("file", None), (".", no_space)):  # a file is a folder that takes no files
        monkeypatch.setattr(vector, "MEMORY", str(tmp_path / memory))
        full += [error] if error else []
        np.testing.assert_equal(rollout(vector_env(COUNTERS, seed=0, workers=2), 10), expected)
        assert not full
    full += [read_only, no_space]
    with pytest.raises(suites.SuiteError, match="No space left on device.*Read-only.*TMPDIR.*--workers 0"):
        vector_env(COUNTERS, seed=0, workers=2)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(("membership", "files", "expected"), [
    ("", {}, 8),
    ("0::/", {"cpu.max": "1000 100000"}, 1),
    ("0::/", {"cpu.max": "1600000 100000"}, 8),  # more than the affinity mask has
    ("0::/pod/box", {"pod/cpu.max": "900000 100000", "pod/box/cpu.max": "350000 100000"}, 4),
    ("0::/../elsewhere", {"cpu.max": "200000 100000"}, 2),
    ("3:memory:/a\n2:cpu,cpuacct:/", {QUOTA: "-1", PERIOD: "9"}, 8),
    ("2:cpuacct,cpu:/pod\n0::/", {QUOTA: "300", PERIOD: "200"}, 2),
    ("2:cpuset:/pod", {QUOTA: "300", PERIOD: "200"}, 8)])
def test_num_cores_respects_a_container_s_limit(tmp_path, monkeypatch, membership, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (files | ({"proc/self/cgroup": membership} if membership else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert num_cores(str(tmp_path)) == expected


@pytest.mark.parametrize(("num", "num_tasks", "workers"), [
    (1, 50, 0), (2, 50, 2), (2, 1, 1), (16, 50, 13), (16, 20, 10), (128, 85, 29)])
def test_default_workers(monkeypatch, num, num_tasks, workers):
    monkeypatch.setattr(cores, "num_cores", lambda: num)
    assert default_workers(("reach",) * num_tasks) == workers
