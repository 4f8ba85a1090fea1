"""HumanoidBench: what is said when it is missing, and, where it is installed, what no other suite has."""

import importlib.machinery
import importlib.util
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import suites
from conftest import episode, make_env
from suites import humanoidbench
from suites.base import SuiteError


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


def test_missing_models_are_named(fake_package):
    with pytest.raises(SuiteError, match="lacks .*h1_pos_walk.xml, which h1-walk needs: .*git clone.*--tasks"):
        suites.make("h1-walk", 0)
    model = fake_package / "assets" / "envs" / "h1hand_pos_push.xml"
    model.parent.mkdir(parents=True)
    model.write_text('<mujoco><include file="../tasks/push.xml"/></mujoco>')
    with pytest.raises(SuiteError, match="lacks .*tasks/push.xml, which h1hand-push needs"):
        suites.check(("reach", "h1hand-push"))
    model.write_text("<mujoco/>")
    suites.check(("reach", "h1hand-push"))


# --------------------------------------------------------------------------------------------------- environments


def test_time_limits():
    for task, length in (("h1-walk", 1000), ("h1hand-bookshelf_hard", 1000), ("h1hand-insert_small", 500),
                         ("h1hand-insert_normal", 500)):
        assert make_env(task).get_wrapper_attr("_max_episode_steps") == length


def test_falling_terminates():
    env, ends = make_env("h1-walk"), (False, False)
    env.reset()
    while ends == (False, False):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        ends = terminated, truncated
    assert ends == (True, False)


@pytest.mark.parametrize("task", ["h1-pole", "h1hand-sit_hard", "h1hand-bookshelf_hard"])
def test_adapter_changes_nothing_else(task):
    expected = episode(make_env(task, seed=5), 60)
    original = gym.make(f"{task}-v0", render_mode=None, disable_env_checker=True)
    np.random.seed(5)
    np.testing.assert_array_equal(episode(original, 60, seed=5).astype(np.float32), expected.astype(np.float32))
