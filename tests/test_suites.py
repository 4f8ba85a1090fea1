"""The suites: task lists, scores, what holds for the environments of all of them, and what each has of its own.

HumanoidBench and ShadowHand need files that no package index has; where those are missing, their tests are skipped.
"""

import importlib.machinery
import importlib.util
import math
import sys
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest

import suites
from conftest import episode, make_env
from suites import dmc, humanoidbench, metaworld, shadowhand
from suites.base import SuiteError, missing_file


# ------------------------------------------------------------------------------------------------- task lists


def test_suites_have_their_sizes_and_splits():
    sizes = {name: (len(suite.tasks), len(suite.pretrain), len(suite.transfer), suite.steps)
             for name, suite in suites.SUITES.items()}
    assert sizes == {
        "mw": (50, 45, 5, 500_000), "demo": (3, 0, 0, 16_000), "dmc-dogs": (4, 0, 0, 500_000),
        "dmc-humanoids": (3, 0, 0, 500_000), "mw-dmc": (80, 0, 0, 500_000), "hb-medium": (9, 6, 3, 1_000_000),
        "hb-hard": (20, 20, 7, 2_000_000), "sh": (85, 85, 29, 1_000_000), "atari": (26, 26, 20, 100_000)}
    for suite in suites.SUITES.values():
        assert len(set(suite.tasks + suite.transfer)) == len(set(suite.tasks) | set(suite.transfer))
        assert not set(suite.pretrain) & set(suite.transfer)
        for task in suite.tasks + suite.transfer:
            assert sum(module.owns(task) for module in suites.BENCHMARKS) == 1, task
    for name in ("push", "walk", "h1-push", "SpaceInvaders", "pong", "sh-reach"):
        assert sum(module.owns(name) for module in suites.BENCHMARKS) == (name == "push")
    mw = suites.SUITES["mw"]
    assert mw.transfer == ("assembly", "disassemble", "dial-turn", "lever-pull", "push-back")
    for name in ("mw", "hb-medium"):
        suite = suites.SUITES[name]
        assert set(suite.pretrain) | set(suite.transfer) == set(suite.tasks)


def test_task_tables_agree_with_the_simulators():
    from dm_control import suite
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {f"{task}-v3" for task in metaworld.TASKS} == set(ALL_V3_ENVIRONMENTS)
    assert {f"{domain}-{task}" for domain, task in suite.ALL_TASKS} == dmc.TASKS - dmc.CUSTOM.keys()
    assert dmc.CUSTOM.keys() < set(dmc.TASKS_30) <= dmc.TASKS


@pytest.mark.parametrize(("selection", "message"), [
    ((None, ("walker-wlak",), "all"), "'walker-wlak'.*walker-walk"),
    ((None, ("reach", "push", "reach"), "all"), "'reach' was given more than once"),
    (("metaworld", None, "all"), "Unknown suite 'metaworld'.* mw"),
    (("metaworld", ("reach",), "all"), "Unknown suite 'metaworld'.* mw"),
    (("dmc-dogs", None, "pretrain"), "'dmc-dogs' has no pretrain split.* mw"),
    (("mw", (), "all"), "--tasks was given without names"),
    (("mw", ("reach,push",), "all"), "separated by spaces, .*: --tasks reach push."),
    (("mw", ("reach, push,",), "all"), "separated by spaces, .*: --tasks reach push.")])
def test_resolve_refuses(selection, message):
    with pytest.raises(SuiteError, match=message):
        suites.resolve(*selection)


def test_goals_are_frozen_only_where_there_are_some():
    assert suites.resolve_goals(("reach", "walker-run"), "frozen", "fresh") == "frozen"
    for given, goals in ((None, "frozen"), ("fresh", "fresh"), ("frozen", "frozen")):
        assert suites.resolve_goals(("walker-run", "reach"), given, "frozen") == goals
    assert suites.resolve_goals(("walker-run",), None, "frozen") == "fresh"
    assert suites.resolve_goals(("walker-run",), "fresh", "frozen") == "fresh"
    with pytest.raises(SuiteError, match="frozen in MetaWorld's tasks only"):
        suites.resolve_goals(("walker-run", "h1-walk", "Pong"), "frozen", "fresh")
    with pytest.raises(ValueError, match="'freezing', which is none of fresh, frozen"):
        suites.make("reach", 0, goals="freezing")
    first, second = (suites.make("cheetah-run", 0, goals=goals).reset()[0] for goals in ("fresh", "frozen"))
    np.testing.assert_array_equal(first, second)


def test_tasks_win_over_the_suite_and_their_budget_is_that_of_the_largest():
    for tasks, steps in ((("drawer-close",), 500_000),  # not the demo's
                         (("h1-walk", "push-back"), 1_000_000), (("swimmer-swimmer6",), 500_000)):  # in no suite
        assert suites.resolve("mw", tasks, "pretrain") == tasks and suites.steps(tasks) == steps


@pytest.mark.parametrize(("task", "module", "name"), [
    ("reach", "metaworld.env_dict", "metaworld"), ("dog-run", "dm_control", "dm_control"),
    ("Pong", "ale_py", "ale-py")])
def test_missing_simulator_says_what_to_install(task, module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SuiteError, match=f"'{task}' needs {name}.*requirements.txt"):
        suites.make(task, 0)


@pytest.mark.parametrize(("task", "zero", "one"), [  # the returns of a score of 0 and of 1, whatever success is
    ("dog-run", 0.0, 1000.0), ("cheetah-jump", 0.0, 1000.0), ("h1-walk", 2.377, 700.0), ("h1-maze", 106.441, 1200.0),
    ("h1hand-crawl", 278.868, 800.0), ("h1hand-reach", -50.024, 12000.0), ("h1hand-push", -526.8, 700.0),
    ("Alien", 227.8, 7127.7), ("Breakout", 1.7, 30.5), ("Pong", -20.7, 14.6), ("UpNDown", 533.4, 11693.2),
    ("DoubleDunk", -18.6, -16.4), ("YarsRevenge", 3092.9, 54576.9)])
def test_score(task, zero, one):
    for episode_return, expected in ((zero, 0.0), (one, 1.0), (2 * one - zero, 2.0), ((zero + one) / 2, 0.5)):
        assert suites.score(task, episode_return, 0.0) == suites.score(task, episode_return, None)
        assert suites.score(task, episode_return, None) == pytest.approx(expected)
    for success in (0.0, 1.0):
        assert suites.score("reach", one, success) == suites.score("sh-apple", one, success) == success


# ----------------------------------------------------------------------------------------------- environments
DIMS = (
    dict.fromkeys(metaworld.TASKS, (39, 4))
    | dict.fromkeys(dmc.TASKS_30 + suites.SUITES["dmc-dogs"].tasks + suites.SUITES["dmc-humanoids"].tasks)
    | dict.fromkeys(("quadruped-escape", "lqr-lqr_2_1", "humanoid_CMU-walk", "swimmer-swimmer15"))
    | {"dog-run": (223, 38), "humanoid-run": (67, 21), "reacher-three_easy": (8, 3), "reacher-three_hard": (8, 3),
       "walker-walk_backwards": (24, 6), "cheetah-jump": (17, 6)}
    | dict.fromkeys(humanoidbench.RETURNS) | dict.fromkeys(humanoidbench.H1, (51, 19))
    | {"h1hand-walk": (151, 61), "h1hand-truck": (216, 61), "h1hand-bookshelf_hard": (308, 61)}
    | dict.fromkeys(shadowhand.TASKS + shadowhand.TRANSFER, (68, 20))
)  # fmt: skip
SUCCEED = (*metaworld.TASKS, *shadowhand.TASKS, *shadowhand.TRANSFER, *(f"h1hand-{name}" for name in (
    "bookshelf_simple", "bookshelf_hard", "truck", "basketball", "push", "cabinet")))


@pytest.mark.parametrize("task", DIMS)
def test_contract(task, capfd):
    env = make_env(task)
    assert isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.dtype == np.float32
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    dims = env.observation_space.shape + env.action_space.shape
    assert dims == (DIMS[task] or dims)
    assert task not in suites.SUITES["mw-dmc"].tasks or (dims[0] <= 39 and dims[1] <= 6)
    obs, _ = env.reset()
    for sign in (-1, 1):
        assert env.observation_space.contains(obs) and np.isfinite(obs).all()
        obs, reward, terminated, truncated, info = env.step(np.full(env.action_space.shape, sign, np.float32))
        assert type(reward) is float and math.isfinite(reward)
        assert type(terminated) is bool and type(truncated) is bool and not truncated
        assert not terminated or task in humanoidbench.RETURNS
        assert type(info["success"]) is float if task in SUCCEED else "success" not in info
        assert not suites.benchmark(task) is shadowhand or reward == info["success"] - 1
    env.close()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("task", [
    "reach", "pick-place", "hammer", "walker-run_backwards", "reacher-three_hard", "ball_in_cup-spin",
    "finger-turn_hard", "dog-run", "MsPacman", "sh-scissors", "h1-walk", "h1hand-reach", "h1hand-sit_hard",
    "h1hand-bookshelf_hard", "h1hand-room", "h1hand-push", "h1hand-basketball"])  # fmt: skip
def test_a_seed_fixes_all_episodes(task):
    first, second, other, neighbour = (make_env(task, seed) for seed in (3, 3, 4, 5))
    np.random.seed(0)
    episodes = [episode(first, 20) for _ in range(2)]
    np.random.seed(1)  # must not matter, and is not drawn from

    def disturb():  # another environment, and a user who draws from the global generator
        neighbour.reset()
        np.random.uniform()

    np.testing.assert_array_equal([episode(second, 20, after_reset=disturb) for _ in range(2)], episodes)
    assert np.random.uniform() == np.random.RandomState(1).uniform(size=3)[-1]
    assert not np.array_equal(episodes[0], episodes[1])
    assert not np.array_equal(episodes[0], episode(other, 20))

    # Reseeding an environment that has been used makes it the same as a new one of that seed, on from there too.
    np.testing.assert_array_equal(episode(other, 20, seed=3), episodes[0])
    np.testing.assert_array_equal(episode(other, 20), episodes[1])


@pytest.mark.parametrize("task", ["humanoid-walk", "h1-stand", "sh-cube"])
def test_actions_are_clipped(task):
    """Also where a reward charges for the control as it was given."""
    env, other = make_env(task), make_env(task)
    np.testing.assert_array_equal(env.reset()[0], other.reset()[0])
    for sign in (-1, 1):
        action = np.full(env.action_space.shape, sign, np.float32)
        (obs, reward, *_), (clipped_obs, clipped_reward, *_) = env.step(5 * action), other.step(action)
        np.testing.assert_array_equal(obs, clipped_obs)
        assert reward == clipped_reward


@pytest.mark.parametrize(("task", "length"), [("push-back", 200), ("acrobot-swingup", 1000), ("pendulum-spin", 1000),
                                              ("lqr-lqr_2_1", 1000), ("sh-hammer", 100), ("h1-crawl", 1000)])
def test_episodes_are_truncated_at_their_length(task, length):
    env = make_env(task)
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(env.action_space.shape, np.float32))[2:4] for _ in range(length)]
        assert ends == [(False, False)] * (length - 1) + [(False, True)]


def test_frames_are_drawn_lazily_where_the_check_allows_it():
    tasks = "reach", "cheetah-jump"
    try:
        suites.check_rendering(("Pong", *tasks))
    except SuiteError as error:
        pytest.skip(str(error))
    for task in tasks:
        env = suites.make(task, seed=0, render_mode="rgb_array")
        env.reset()
        frame = env.render()
        assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8 and frame.std() > 10
        assert frame.flags.c_contiguous
        for _ in range(10):
            env.step(np.ones(env.action_space.shape, np.float32))
        assert (env.render() != frame).any()
        env.close()


@pytest.mark.parametrize(("setting", "library", "reason"), [
    ("nonsense", "", "'?nonsense"), ("glfw", "", ""), ("egl", "raise ImportError('none here')", "none here"),
    ("egl", "import os; os.abort()", "SIGABRT")])
@pytest.mark.skipif(sys.platform != "linux", reason="these backends are Linux's")
def test_a_machine_that_cannot_draw_is_told_so(setting, library, reason, monkeypatch, tmp_path):
    if library:  # in place of PyOpenGL
        (tmp_path / "OpenGL.py").write_text(library)
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", setting)
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(display, raising=False)
    with pytest.raises(SuiteError, match=f"No frame of reach can be drawn here .*{reason}.*: set MUJOCO_GL to egl"):
        suites.check_rendering(("reach", "push"))
    suites.check_rendering(("Pong", "Breakout"))  # they need no OpenGL


# --------------------------------------------------------------------------------------------- MetaWorld, dm_control


def test_metaworld_success_by_its_scripted_policy():
    from metaworld.policies.sawyer_reach_v3_policy import SawyerReachV3Policy
    env, policy = suites.make("reach", seed=0), SawyerReachV3Policy()
    for _ in range(2):
        obs, successes = env.reset()[0].astype(np.float64), []
        for _ in range(200):
            obs, *_, info = env.step(policy.get_action(obs))
            successes.append(info["success"])
        assert successes[0] == 0.0 and max(successes) == 1.0


def test_metaworld_actions_are_clipped():
    env = suites.make("pick-place", seed=0)
    env.reset()
    with mock.patch.object(env.unwrapped, "step", side_effect=env.unwrapped.step) as step:
        env.step(np.array([3.0, -0.5, -2.0, 9.0], np.float32))
    np.testing.assert_array_equal(step.call_args.args[0], [1.0, -0.5, -1.0, 1.0])


def test_dmc_observation_is_the_dictionary_in_its_order():
    from dm_control import suite

    reference = suite.load("humanoid", "walk", task_kwargs={"random": 7})
    env = suites.make("humanoid-walk", seed=7)
    timestep, (obs, _) = reference.reset(), env.reset()
    for _ in range(5):
        expected = np.concatenate([np.ravel(value) for value in timestep.observation.values()])
        np.testing.assert_array_equal(obs, expected.astype(np.float32))
        action = np.full(21, 0.3, np.float32)
        timestep, (obs, reward, *_) = reference.step(action), env.step(action)
        assert reward == timestep.reward


def test_dmc_actions_span_the_actuators_and_are_clipped():
    env = suites.make("quadruped-walk", seed=0)
    env.reset()
    physics = env.unwrapped.dm_env.physics
    low, high = physics.model.actuator_ctrlrange.T
    assert (high != 1).any()  # else this test shows nothing
    for action, expected in ((-1, low), (0, (low + high) / 2), (1, high), (7, high), (-3, low)):
        env.step(np.full(12, action, np.float32))
        np.testing.assert_allclose(physics.control(), expected)  # what some rewards charge for, clipped too


@pytest.mark.parametrize(("discount", "expected"), [(0.0, (True, False)), (1.0, (False, True))])
def test_dmc_discount_tells_termination_from_truncation(discount, expected, monkeypatch):
    import dm_env

    env = suites.make("cartpole-balance", seed=0)
    env.reset()
    observation = env.unwrapped.dm_env.task.get_observation(env.unwrapped.dm_env.physics)
    last = dm_env.TimeStep(dm_env.StepType.LAST, 0.5, discount, observation)
    monkeypatch.setattr(env.unwrapped.dm_env, "step", lambda action: last)
    assert env.step(np.zeros(1, np.float32))[2:4] == expected


# ------------------------------------------------------------------------- the eleven custom tasks of mw-dmc
# From the original tasks, github.com/nicklashansen/tdmpc2 at e9f5932, under dm_control 1.0.28 and mujoco 3.3.0: seed,
# return of 100 steps with action i at step k = sign(sin(k / 9 + i)), sum of the observation after 50 of them; over 200
# more episodes, sums of the first observations and of the rewards of ten random states around each start, where a
# reacher's target is put close to its finger.
@pytest.mark.parametrize(("task", "seed", "episode_return", "middle_sum", "start_sum", "reward_sum"), [
    ("walker-walk_backwards", 1, 11.145460, 0.668252, 302.895027, 574.707252),
    ("walker-run_backwards", 1, 10.160741, 0.668252, 302.895027, 341.659607),
    ("cheetah-run_backwards", 1, 0.834746, -3.933875, -25.013862, 134.892730),
    ("cheetah-run_front", 1, 5.357360, -3.933875, -25.013862, 82.376611),
    ("cheetah-run_back", 1, 10.508430, -3.933875, -25.013862, 73.882907),
    ("cheetah-jump", 1, 39.107449, -3.933875, -25.013862, 464.660465),
    ("reacher-three_easy", 4, 6.000000, 5.972463, -9.396680, 893.000000),
    ("reacher-three_hard", 8, 3.000000, 5.267772, 7.556978, 152.000000),
    ("pendulum-spin", 1, 48.209251, -3.817972, -14.114071, 234.047644),
    ("ball_in_cup-spin", 1, 37.922824, 0.733347, 69.643232, 907.305559),
    ("hopper-hop_backwards", 14, 1.451017, 31.102654, -16.191704, 58.237729)])
def test_custom_task_replays_the_original(task, seed, episode_return, middle_sum, start_sum, reward_sum):
    env = suites.make(task, seed)
    physics, dm_task = env.unwrapped.dm_env.physics, env.unwrapped.dm_env.task
    env.reset()
    steps = [env.step(np.sign(np.sin(k / 9 + np.arange(env.action_space.shape[0])))) for k in range(100)]
    assert sum(reward for _, reward, *_ in steps) == pytest.approx(episode_return, rel=1e-5)
    assert steps[49][0].sum(dtype=np.float64) == pytest.approx(middle_sum, abs=1e-4)
    rng, starts, rewards = np.random.default_rng(0), [], []
    for _ in range(200):
        starts.append(env.reset()[0].sum(dtype=np.float64))
        qpos = physics.data.qpos.copy()
        for _ in range(10):
            with physics.reset_context():
                physics.data.qpos[:] = qpos + rng.uniform(-0.6, 0.6, qpos.size)
                physics.data.qvel[:] = 10 ** rng.uniform(-1, 1) * rng.uniform(-1, 1, physics.data.qvel.size)
            if "reacher" in task:
                with physics.reset_context():
                    finger = physics.named.data.geom_xpos["finger", :2]
                    physics.named.model.geom_pos["target", :2] = finger + rng.uniform(-0.08, 0.08, 2)
            rewards.append(dm_task.get_reward(physics))
    assert sum(starts) == pytest.approx(start_sum, abs=1e-4)
    assert sum(rewards) == pytest.approx(reward_sum, rel=1e-6)


# ------------------------------------------------------------------------------- HumanoidBench and ShadowHand: files


def test_what_is_not_installed_is_named_with_a_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("SHADOWHAND_ASSETS", raising=False)
    for task, message in (("h1-walk", "HumanoidBench is not installed and h1-walk needs it: run `git clone https://.*"
                                      "/humanoid-bench && pip install --no-deps -e humanoid-bench`[.]$"),
                          ("sh-apple", "sh-apple, and SHADOWHAND_ASSETS is not set: set it, or --assets, ")):
        for use in (lambda: suites.make(task, 0), lambda: suites.check(("reach", task))):
            with pytest.raises(SuiteError, match=message):
                use()
    monkeypatch.setenv("SHADOWHAND_ASSETS", str(tmp_path))
    with pytest.raises(SuiteError, match=f"SHADOWHAND_ASSETS={tmp_path} has no folder 'hand'.*dex_envs/assets"):
        suites.check(("sh-apple",))


def write(path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_humanoidbenchs_missing_models_are_named(monkeypatch, tmp_path):
    spec = importlib.machinery.ModuleSpec("humanoid_bench", None, is_package=True)  # an installation without a file
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(SuiteError, match="lacks .*h1_pos_walk.xml, which h1-walk needs: .*git clone.*--tasks"):
        suites.make("h1-walk", 0)
    model = tmp_path / "assets" / "envs" / "h1hand_pos_push.xml"
    write(model, '<mujoco><include file="../tasks/push.xml"/></mujoco>')
    with pytest.raises(SuiteError, match="lacks .*tasks/push.xml, which h1hand-push needs"):
        suites.check(("reach", "h1hand-push"))
    write(model, "<mujoco/>")
    suites.check(("reach", "h1hand-push"))


def test_shadowhands_missing_files_are_named_with_a_way_out(monkeypatch, tmp_path):
    hand, meshes = tmp_path / "hand", tmp_path / "stls" / "hand"
    for name in ("apple", "mug"):
        write(hand / f"manipulate_{name}.xml", (
            '<mujoco><compiler meshdir="../stls/hand" texturedir="../textures"/><asset><include file="shared.xml"/>'
            f'<texture name="texture:object" file="block.png"/><mesh name="mesh:object" file="{name}.stl"/>'
            "</asset></mujoco>"))
    write(hand / "shared.xml", '<mujoco><mesh name="palm" file="palm.stl"/></mujoco>')
    for path in (tmp_path / "textures" / "block.png", meshes / "palm.stl", meshes / "apple.stl"):
        write(path)
    monkeypatch.setenv("SHADOWHAND_ASSETS", str(tmp_path))
    suites.check(("sh-apple",))
    with pytest.raises(SuiteError, match="lack .*stls/hand/mug.stl, which sh-mug needs: .*--tasks to leave sh-mug out"):
        suites.check(("sh-apple", "sh-mug"))
    with pytest.raises(SuiteError, match="manipulate_torus.xml"):
        suites.make("sh-torus", 0)
    assert missing_file(hand / "manipulate_apple.xml") is None
    for lost in (meshes / "palm.stl", hand / "shared.xml"):  # in an included file, and that file
        lost.unlink()
        assert missing_file(hand / "manipulate_apple.xml").name == lost.name


# ------------------------------------------------------------------------------------------------ HumanoidBench


def test_humanoidbenchs_time_limits():
    for task, length in (("h1-walk", 1000), ("h1hand-bookshelf_hard", 1000), ("h1hand-insert_small", 500),
                         ("h1hand-insert_normal", 500)):
        assert make_env(task).get_wrapper_attr("_max_episode_steps") == length


def test_a_fall_of_a_humanoid_terminates():
    env, ends = make_env("h1-walk"), (False, False)
    env.reset()
    while ends == (False, False):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        ends = terminated, truncated
    assert ends == (True, False)


@pytest.mark.parametrize("task", ["h1-pole", "h1hand-sit_hard", "h1hand-bookshelf_hard"])
def test_humanoidbenchs_adapter_changes_nothing_else(task):
    expected = episode(make_env(task, seed=5), 60)
    original = gym.make(f"{task}-v0", render_mode=None, disable_env_checker=True)
    np.random.seed(5)
    np.testing.assert_array_equal(episode(original, 60, seed=5).astype(np.float32), expected.astype(np.float32))


# --------------------------------------------------------------------------------------------------- ShadowHand
# Numbers from the original environment (gymnasium-robotics 1.4.2, mujoco 3.3.0) under the same seed and actions: the
# sum of the first observation, the last two numbers of the goal's quaternion, the sum of the observation after 10
# steps, and the successful steps of 100. Tolerances leave room for another machine's rounding, which contacts amplify.
@pytest.mark.parametrize(("task", "seed", "first_sum", "goal", "tenth_sum", "successes"), [
    ("sh-apple", 3, 15.597293, (-0.0, -0.956594), 22.065976, 0),
    ("sh-wood_block", 3, 15.402091, (-0.0, -0.956594), 17.084413, 0),
    ("sh-golf_ball", 3, 15.773310, (-0.0, -0.956594), 22.625351, 2),
    ("sh-scissors", 11, 15.848381, (-0.0, -0.893946), 35.641644, 15)])
def test_shadowhand_replays_the_original(task, seed, first_sum, goal, tenth_sum, successes):
    env, rng = make_env(task), np.random.default_rng(seed)
    first, _ = env.reset(seed=seed)
    steps = [env.step(rng.uniform(-1, 1, 20).astype(np.float32)) for _ in range(100)]
    assert first.sum() == pytest.approx(first_sum, abs=1e-3)
    assert first[-2:] == pytest.approx(goal, abs=1e-5)
    assert steps[9][0].sum() == pytest.approx(tenth_sum, abs=1e-2)
    # 1e-14 rad at the start, another machine's rounding, moves sh-scissors between 15 and 18.
    assert sum(info["success"] for *_, info in steps) == pytest.approx(successes, abs=5)


def test_shadowhands_goal_and_start():
    """The goal is a rotation about the vertical, at the place of the object, which starts in the palm."""
    env = make_env("sh-cube")
    for _ in range(5):
        obs, _ = env.reset()
        position, goal = obs[54:57], obs[61:68]
        np.testing.assert_allclose(goal[:3], position, atol=1e-6)
        assert goal[4] == goal[5] == 0 and np.linalg.norm(goal[3:]) == pytest.approx(1)
        assert position[2] > 0.04


def test_shadowhands_success_is_the_angle_to_the_goal():
    env = make_env("sh-cube")
    env.reset()
    still = np.zeros(20, np.float32)
    for sign, expected in ((1, 1.0), (-1, 0.0)):  # the negative quaternion, though the same orientation, is no success
        quaternion = env.unwrapped.data.joint("object:joint").qpos[3:]
        env.unwrapped.goal[3:] = sign * quaternion
        *_, info = env.step(still)
        assert info["success"] == expected
