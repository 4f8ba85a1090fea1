"""ShadowHand: what is said when its assets are missing, and, where they are at hand, what no other suite has."""

from pathlib import Path

import numpy as np
import pytest

import suites
from conftest import make_env
from suites import shadowhand
from suites.base import SuiteError, missing_file


# ---------------------------------------------------------------------------------------------------------- errors


def test_task_list():
    assert len({*shadowhand.TASKS, *shadowhand.TRANSFER}) == 114 and not shadowhand.owns("hammer")


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """A folder with the layout of the real one and models that lack only mesh files."""
    for file in ("textures/block.png", "stls/hand/palm.stl", "hand/shared.xml"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    (tmp_path / "hand" / "shared.xml").write_text('<mujoco><mesh name="palm" file="palm.stl"/></mujoco>')
    for name in ("apple", "mug"):
        (tmp_path / "hand" / f"manipulate_{name}.xml").write_text(
            '<mujoco><compiler meshdir="../stls/hand" texturedir="../textures"/><asset><include file="shared.xml"/>'
            f'<texture name="texture:object" file="block.png"/><mesh name="mesh:object" file="{name}.stl"/>'
            "</asset></mujoco>"
        )
    monkeypatch.setenv("SHADOWHAND_ASSETS", str(tmp_path))
    return tmp_path


def test_no_assets_or_another_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SHADOWHAND_ASSETS", raising=False)
    for use in (lambda: suites.make("sh-apple", 0), lambda: suites.check(("reach", "sh-apple"))):
        with pytest.raises(SuiteError, match="sh-apple, and SHADOWHAND_ASSETS is not set: set it, or --assets, "):
            use()
    monkeypatch.setenv("SHADOWHAND_ASSETS", str(tmp_path))
    with pytest.raises(SuiteError, match=f"SHADOWHAND_ASSETS={tmp_path} has no folder 'hand'.*dex_envs/assets"):
        suites.check(("sh-apple",))


def test_missing_files_are_named_with_a_way_out(assets):
    model, hand = assets / "hand" / "manipulate_apple.xml", assets / "stls" / "hand"
    (hand / "apple.stl").touch()
    suites.check(("sh-apple",))
    with pytest.raises(SuiteError, match="lack .*stls/hand/mug.stl, which sh-mug needs: .*--tasks to leave sh-mug out"):
        suites.check(("sh-apple", "sh-mug"))
    with pytest.raises(SuiteError, match="manipulate_torus.xml"):
        suites.make("sh-torus", 0)
    assert missing_file(model) is None
    for lost in (hand / "palm.stl", assets / "hand" / "shared.xml"):  # in an included file, and that file
        lost.unlink()
        assert missing_file(model).name == lost.name


# --------------------------------------------------------------------------------------------------- environments
# Numbers from the original environment (gymnasium-robotics 1.4.2, mujoco 3.3.0) under the same seed and actions: the
# sum of the first observation, the last two numbers of the goal's quaternion, the sum of the observation after 10
# steps, and the successful steps of 100. Tolerances leave room for another machine's rounding, which contacts amplify.
ORIGINAL = [
    ("sh-apple", 3, 15.597293, (-0.0, -0.956594), 22.065976, 0),
    ("sh-wood_block", 3, 15.402091, (-0.0, -0.956594), 17.084413, 0),
    ("sh-golf_ball", 3, 15.773310, (-0.0, -0.956594), 22.625351, 2),
    ("sh-scissors", 11, 15.848381, (-0.0, -0.893946), 35.641644, 15),
]


@pytest.mark.parametrize(("task", "seed", "first_sum", "goal", "tenth_sum", "successes"), ORIGINAL)
def test_replays_the_original(task, seed, first_sum, goal, tenth_sum, successes):
    env, rng = make_env(task), np.random.default_rng(seed)
    first, _ = env.reset(seed=seed)
    steps = [env.step(rng.uniform(-1, 1, 20).astype(np.float32)) for _ in range(100)]
    assert first.sum() == pytest.approx(first_sum, abs=1e-3)
    assert first[-2:] == pytest.approx(goal, abs=1e-5)
    assert steps[9][0].sum() == pytest.approx(tenth_sum, abs=1e-2)
    # 1e-14 rad at the start, another machine's rounding, moves sh-scissors between 15 and 18.
    assert sum(info["success"] for *_, info in steps) == pytest.approx(successes, abs=5)


def test_goal_and_start():
    """The goal is a rotation about the vertical, at the place of the object, which starts in the palm."""
    env = make_env("sh-cube")
    for _ in range(5):
        obs, _ = env.reset()
        position, goal = obs[54:57], obs[61:68]
        np.testing.assert_allclose(goal[:3], position, atol=1e-6)
        assert goal[4] == goal[5] == 0 and np.linalg.norm(goal[3:]) == pytest.approx(1)
        assert position[2] > 0.04


def test_success_is_the_angle_to_the_goal():
    env = make_env("sh-cube")
    env.reset()
    still = np.zeros(20, np.float32)
    for sign, expected in ((1, 1.0), (-1, 0.0)):  # the negative quaternion, though the same orientation, is no success
        quaternion = env.unwrapped.data.joint("object:joint").qpos[3:]
        env.unwrapped.goal[3:] = sign * quaternion
        *_, info = env.step(still)
        assert info["success"] == expected


def test_actions_span_the_actuators():
    env = make_env("sh-cube")
    env.reset()
    for sign, side in ((-1, 0), (1, 1)):
        env.step(np.full(20, sign, np.float32))
        np.testing.assert_allclose(env.unwrapped.data.ctrl, env.unwrapped.model.actuator_ctrlrange[:, side], atol=1e-12)
