"""HumanoidBench: what is said when it is missing, and, where it is installed, its environments."""

import importlib.machinery
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import suites
from suites import humanoidbench
from suites.base import SuiteError

INSTALLED = importlib.util.find_spec("humanoid_bench") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="skipped: not installed")

# Observation sizes of the h1hand tasks; those of h1 are all 51.
OBS_DIMS = {
    "walk": 151, "stand": 151, "run": 151, "stair": 151, "crawl": 151, "pole": 151, "slide": 151, "hurdle": 151,
    "maze": 151, "sit_simple": 151, "sit_hard": 164, "balance_simple": 164, "balance_hard": 177, "reach": 157,
    "spoon": 167, "window": 171, "insert_small": 190, "insert_normal": 190, "bookshelf_simple": 308,
    "bookshelf_hard": 308, "truck": 216, "powerlift": 164, "room": 229, "door": 155, "basketball": 164, "push": 163,
    "cabinet": 213,
}  # fmt: skip
GLOBAL_RANDOM = ("reach", "sit_hard", "bookshelf_hard", "room", "push", "basketball")


def make(task: str, seed: int = 0):
    try:
        humanoidbench.check((task,))
    except SuiteError as error:  # an incomplete clone
        pytest.skip(f"skipped: not installed ({error})")
    return suites.make(task, seed)


def rollout(env, steps: int, seed: int | None = None, between=None) -> np.ndarray:
    """Everything that `steps` fixed pseudo-random actions lead to, over as many episodes as it takes, flattened."""
    rng = np.random.default_rng(0)
    trace = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        if between:
            between()
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        trace.append([*obs, reward])
        if terminated or truncated:
            trace.append(env.reset()[0])
    return np.concatenate(trace)


# ---------------------------------------------------------------------------------------------------------- errors
def test_every_task_has_its_returns():
    medium, hard = suites.SUITES["hb-medium"], suites.SUITES["hb-hard"]
    assert {*medium.tasks, *hard.tasks, *hard.transfer} == set(humanoidbench.RETURNS)


@pytest.fixture
def fake_package(tmp_path, monkeypatch) -> Path:
    """An installation of humanoid_bench without any file in it."""
    spec = importlib.machinery.ModuleSpec("humanoid_bench", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "humanoid_bench" else None)
    return tmp_path


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for use in (lambda: suites.make("h1-walk", 0), lambda: suites.check(("h1-walk", "h1-run"))):
        with pytest.raises(SuiteError) as error:
            use()
        assert str(error.value) == (
            "HumanoidBench is not installed and h1-walk needs it: run "
            "`git clone https://github.com/carlosferrazza/humanoid-bench && pip install --no-deps -e humanoid-bench`."
        )


def test_missing_models_and_textures_are_named(fake_package):
    with pytest.raises(SuiteError, match="lacks .*h1_pos_walk.xml, which h1-walk needs: .*git clone.*--tasks"):
        suites.make("h1-walk", 0)
    assets = fake_package / "assets"
    (assets / "envs").mkdir(parents=True)
    (assets / "tasks").mkdir()
    include = '<mujoco><include file="../tasks/push.xml"/></mujoco>'
    (assets / "envs" / "h1hand_pos_push.xml").write_text(include)
    texture = '<mujoco><asset><texture type="2d" name="t" file="../tasks/plywood.png"/></asset></mujoco>'
    (assets / "tasks" / "push.xml").write_text(texture)
    with pytest.raises(SuiteError, match="lacks .*tasks/plywood.png, which h1hand-push needs"):
        suites.check(("reach", "h1hand-push"))
    (assets / "tasks" / "plywood.png").touch()
    suites.check(("reach", "h1hand-push"))


# --------------------------------------------------------------------------------------------------- environments
@installed
@pytest.mark.parametrize("task", humanoidbench.RETURNS)
def test_contract(task, capfd):
    env = make(task)
    obs_dim, act_dim = (51, 19) if task.startswith("h1-") else (OBS_DIMS[task.removeprefix("h1hand-")], 61)
    assert env.observation_space.shape == (obs_dim,) and env.observation_space.dtype == np.float32
    assert env.action_space.shape == (act_dim,) and env.action_space.dtype == np.float32
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    for action in (np.full(act_dim, -1, np.float32), np.ones(act_dim, np.float32)):
        obs, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(obs) and np.isfinite(obs).all()
        assert type(reward) is float and np.isfinite(reward)
        assert type(terminated) is bool and type(truncated) is bool
    names = ("bookshelf_simple", "bookshelf_hard", "truck", "basketball", "push", "cabinet")
    defines_success = task.removeprefix("h1hand-") in names
    assert type(info["success"]) is float if defines_success else "success" not in info
    env.close()
    assert capfd.readouterr().out == ""


@installed
def test_time_limits():
    for task, length in (("h1-walk", 1000), ("h1hand-bookshelf_hard", 1000), ("h1hand-insert_small", 500),
                         ("h1hand-insert_normal", 500)):
        assert make(task).get_wrapper_attr("_max_episode_steps") == length


@installed
def test_falling_terminates_and_time_truncates():
    walk, crawl = make("h1-walk"), make("h1-crawl")  # crawling, one cannot fall
    for env, steps, expected in ((walk, None, (True, False)), (crawl, 1000, (False, True))):
        rng = np.random.default_rng(0)
        env.reset()
        for step in range(1, 1001):
            *_, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            if terminated or truncated:
                break
        assert (terminated, truncated) == expected
        assert steps in (None, step)


@installed
@pytest.mark.parametrize("task", ["h1-walk", *(f"h1hand-{name}" for name in GLOBAL_RANDOM)])
def test_episodes_depend_on_the_seed_only(task):
    env = make(task, seed=7)
    np.random.seed(1)
    before = np.random.get_state(legacy=False)
    expected = rollout(env, 60)
    after = np.random.get_state(legacy=False)
    assert before["state"]["pos"] == after["state"]["pos"]
    np.testing.assert_array_equal(before["state"]["key"], after["state"]["key"])

    assert len({env.reset()[0].tobytes() for _ in range(5)}) > 1  # episodes differ
    np.testing.assert_array_equal(rollout(env, 60, seed=7), expected)  # a reset with a seed starts over
    assert not np.array_equal(rollout(make(task, seed=8), 60), expected)

    # The same with another environment that draws from numpy's global generator, and with a user who does.
    neighbour = make("h1hand-reach", seed=0)

    def disturb():
        neighbour.reset()
        np.random.uniform()

    np.testing.assert_array_equal(rollout(make(task, seed=7), 60, between=disturb), expected)


@installed
@pytest.mark.parametrize("task", ["h1-pole", "h1hand-sit_hard", "h1hand-bookshelf_hard"])
def test_adapter_changes_nothing_else(task):
    import gymnasium as gym

    expected = rollout(make(task, seed=5), 60)
    original = gym.make(f"{task}-v0", render_mode=None, disable_env_checker=True)
    np.random.seed(5)
    np.testing.assert_array_equal(rollout(original, 60, seed=5).astype(np.float32), expected.astype(np.float32))


@installed
def test_actions_are_clipped():
    env, other = make("h1-stand", seed=0), make("h1-stand", seed=0)
    env.reset(), other.reset()
    for sign in (-1, 1):
        np.testing.assert_array_equal(env.step(np.full(19, 5.0 * sign))[0], other.step(np.full(19, 1.0 * sign))[0])
