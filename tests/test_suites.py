"""The suites: task lists, MetaWorld and dm_control environments, scores."""

import math
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

import suites
from suites import dmc, metaworld
from suites.base import SuiteError


def episode(env: gym.Env, steps: int, seed: int | None = None) -> np.ndarray:
    """Everything the environment returns over one reset and `steps` fixed pseudo-random actions, flattened."""
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=seed)
    trace = [obs]
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, env.action_space.shape))
        trace.append([*obs, reward, terminated, truncated, info.get("success", 0.0)])
    return np.concatenate(trace)


# ------------------------------------------------------------------------------------------------- task lists
SIZES = {  # suite: tasks, of them to pretrain on; to transfer to; steps
    "mw": (50, 45, 5, 500_000), "demo": (4, 0, 0, 36_000), "dmc-dogs": (4, 0, 0, 500_000),
    "dmc-humanoids": (3, 0, 0, 500_000), "mw-dmc": (80, 0, 0, 500_000), "hb-medium": (9, 6, 3, 1_000_000),
    "hb-hard": (20, 20, 7, 2_000_000), "sh": (85, 85, 29, 1_000_000), "atari": (26, 26, 20, 100_000),
}  # fmt: skip


def test_suites_have_their_sizes_and_splits():
    found = {name: (len(suite.tasks), len(suite.pretrain), len(suite.transfer), suite.steps)
             for name, suite in suites.SUITES.items()}
    assert found == SIZES
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


def test_resolve():
    assert suites.resolve("mw", None, "all") == metaworld.TASKS
    assert len(suites.resolve("mw", None, "pretrain")) == 45
    assert suites.resolve("mw", ("swimmer-swimmer6", "reach"), "all") == ("swimmer-swimmer6", "reach")
    assert suites.resolve("mw", ("push-back",), "pretrain") == ("push-back",)


@pytest.mark.parametrize(("selection", "message"), [
    ((None, ("walker-wlak",), "all"), "'walker-wlak'.*walker-walk"),
    ((None, ("raech",), "all"), "'raech'.*reach"),
    ((None, ("quadruped-wlak",), "all"), "'quadruped-wlak'.*quadruped-walk"),
    ((None, ("reach", "push", "reach"), "all"), "'reach' was given more than once"),
    (("metaworld", None, "all"), "Unknown suite 'metaworld'.* mw"),
    (("dmc-dogs", None, "pretrain"), "'dmc-dogs' has no pretrain split.* mw"),
    (("mw", (), "all"), "--tasks was given without names"),
    (("mw", ("reach,push",), "all"), "separated by spaces, .*: --tasks reach push."),
    (("mw", ("reach, push,",), "all"), "separated by spaces, .*: --tasks reach push."),
])
def test_resolve_refuses(selection, message):
    with pytest.raises(SuiteError, match=message):
        suites.resolve(*selection)


def test_goals_are_frozen_only_where_there_are_some():
    suites.check_goals(("reach", "walker-run"), "frozen")
    suites.check_goals(("walker-run",), "fresh")
    with pytest.raises(SuiteError, match="frozen in MetaWorld's tasks only"):
        suites.check_goals(("walker-run", "h1-walk", "Pong"), "frozen")
    with pytest.raises(ValueError, match="'freezing', which is none of fresh, frozen"):
        suites.make("reach", 0, goals="freezing")
    first, second = (suites.make("cheetah-run", 0, goals=goals).reset()[0] for goals in ("fresh", "frozen"))
    np.testing.assert_array_equal(first, second)


def test_budget_is_that_of_the_largest_task():
    assert suites.steps(("reach",)) == 500_000  # not the demo's
    assert suites.steps(("reach", "h1-walk")) == 1_000_000
    assert suites.steps(("swimmer-swimmer6",)) == 500_000  # in no suite


def test_importing_suites_imports_no_simulator():
    heavy = "{'mujoco', 'metaworld', 'dm_control', 'torch', 'ale_py', 'cv2', 'humanoid_bench'}"
    code = f"import sys, suites; suites.benchmark('quadruped-walk'); print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(("task", "module", "name"), [
    ("reach", "metaworld.env_dict", "metaworld"), ("dog-run", "dm_control", "dm_control"),
    ("Pong", "ale_py", "ale-py")])
def test_missing_simulator_says_what_to_install(task, module, name, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SuiteError, match=f"'{task}' needs {name}.*requirements.txt"):
        suites.make(task, 0)


SCORES = {  # of these returns a score of 0 and of 1, whatever is said of success; None: the success
    "reach": None, "sh-apple": None, "dog-run": (0.0, 1000.0), "cheetah-jump": (0.0, 1000.0), "h1-walk": (2.377, 700.0),
    "h1-maze": (106.441, 1200.0), "h1hand-crawl": (278.868, 800.0), "h1hand-reach": (-50.024, 12000.0),
    "h1hand-push": (-526.8, 700.0), "Alien": (227.8, 7127.7), "Breakout": (1.7, 30.5), "Pong": (-20.7, 14.6),
    "UpNDown": (533.4, 11693.2), "DoubleDunk": (-18.6, -16.4), "YarsRevenge": (3092.9, 54576.9),
}  # fmt: skip


@pytest.mark.parametrize("task", SCORES)
def test_score(task):
    zero, one = SCORES[task] or (-100.0, -40.0)
    assert (suites.score(task, zero, 0.0), suites.score(task, one, 1.0)) == (0.0, 1.0)
    if SCORES[task]:
        for episode_return, expected in ((zero, 0.0), (one, 1.0), (2 * one - zero, 2.0), ((zero + one) / 2, 0.5)):
            assert suites.score(task, episode_return, None) == pytest.approx(expected)
    else:
        assert suites.score(task, one, 0.0) == 0.0


# ----------------------------------------------------------------------------------------------- environments
EVERY_TASK = metaworld.TASKS + dmc.TASKS_30 + suites.SUITES["dmc-dogs"].tasks + suites.SUITES["dmc-humanoids"].tasks
OTHER_DMC = ("quadruped-escape", "lqr-lqr_2_1", "humanoid_CMU-walk", "swimmer-swimmer15")
DIMS = dict.fromkeys(metaworld.TASKS, (39, 4)) | {
    "dog-run": (223, 38), "humanoid-run": (67, 21), "reacher-three_easy": (8, 3), "reacher-three_hard": (8, 3),
    "walker-walk_backwards": (24, 6), "cheetah-jump": (17, 6),
}  # fmt: skip


@pytest.mark.parametrize("task", EVERY_TASK + OTHER_DMC)
def test_contract(task):
    env = suites.make(task, seed=0)
    assert isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.dtype == np.float32
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)
    dims = env.observation_space.shape + env.action_space.shape
    assert dims == DIMS.get(task, dims)
    assert task not in suites.SUITES["mw-dmc"].tasks or (dims[0] <= 39 and dims[1] <= 6)
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    obs, reward, terminated, truncated, info = env.step(np.ones(env.action_space.shape, np.float32))
    assert env.observation_space.contains(obs) and np.isfinite(obs).all()
    assert type(reward) is float and math.isfinite(reward)
    assert type(terminated) is bool and type(truncated) is bool and not (terminated or truncated)
    assert type(info["success"]) is float if task in metaworld.TASKS else "success" not in info


@pytest.mark.parametrize("task", ["reach", "pick-place", "hammer", "walker-run_backwards", "reacher-three_hard",
                                  "ball_in_cup-spin", "finger-turn_hard", "dog-run"])  # fmt: skip
def test_a_seed_fixes_all_episodes(task):
    first, second, other = (suites.make(task, seed) for seed in (3, 3, 4))
    np.random.seed(0)
    episodes = [episode(first, 20) for _ in range(2)]
    np.random.seed(1)  # must not matter, and is not drawn from
    np.testing.assert_array_equal([episode(second, 20) for _ in range(2)], episodes)
    assert np.random.randint(1 << 30) == np.random.RandomState(1).randint(1 << 30)
    assert not np.array_equal(episodes[0], episodes[1])
    assert not np.array_equal(episodes[0], episode(other, 20))

    # Reseeding an environment that has been used makes it the same as a new one of that seed, on from there too.
    np.testing.assert_array_equal(episode(other, 20, seed=3), episodes[0])
    np.testing.assert_array_equal(episode(other, 20), episodes[1])


@pytest.mark.parametrize(("task", "length"), [("push-back", 200), ("acrobot-swingup", 1000), ("pendulum-spin", 1000),
                                              ("lqr-lqr_2_1", 1000)])  # fmt: skip
def test_episodes_are_truncated_at_their_length(task, length):
    env = suites.make(task, seed=0)
    for _ in range(2):
        env.reset()
        ends = [env.step(np.zeros(env.action_space.shape, np.float32))[2:4] for _ in range(length)]
        assert ends == [(False, False)] * (length - 1) + [(False, True)]


@pytest.mark.parametrize("task", ["reach", "cheetah-jump"])
def test_frames_are_drawn_lazily_where_the_check_allows_it(task):
    try:
        suites.check_rendering(("Pong", task))
    except SuiteError as error:
        pytest.skip(str(error))
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


# -------------------------------------------------------------------------------------------------- MetaWorld
@pytest.mark.parametrize("task", ["reach", "push", "drawer-close", "door-close", "coffee-button"])
def test_metaworld_goals_are_fresh_and_visible(task):
    env = suites.make(task, seed=0)
    goals = np.array([env.reset()[0][36:] for _ in range(5)])
    assert len(np.unique(goals, axis=0)) == 5
    np.testing.assert_array_equal(goals[-1], env.unwrapped._target_pos.astype(np.float32))


@pytest.mark.parametrize("task", ["reach", "drawer-close", "button-press"])
def test_metaworld_success_by_its_scripted_policy(task):
    from metaworld.policies import ENV_POLICY_MAP

    env, policy = suites.make(task, seed=0), ENV_POLICY_MAP[f"{task}-v3"]()
    for _ in range(2):
        obs, _ = env.reset()
        successes = []
        for _ in range(200):
            obs, _, _, _, info = env.step(policy.get_action(obs.astype(np.float64)).astype(np.float32))
            successes.append(info["success"])
        assert successes[0] == 0.0 and max(successes) == 1.0


def test_metaworld_actions_are_clipped(monkeypatch):
    env = suites.make("pick-place", seed=0)
    env.reset()
    simulator, received = env.unwrapped, []
    step = simulator.step
    monkeypatch.setattr(simulator, "step", lambda action: received.append(action) or step(action))
    env.step(np.array([3.0, -0.5, -2.0, 9.0], np.float32))
    np.testing.assert_array_equal(received, [[1.0, -0.5, -1.0, 1.0]])


# ------------------------------------------------------------------------------------------------- dm_control
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
# return of 100 steps with action i at step k = sign(sin(k / 9 + i)), sum of the observation at the start and after 50.
ORIGINAL = (
    ("walker-walk_backwards", 1, 11.145459542, 4.235348128, 0.668252289),
    ("walker-run_backwards", 1, 10.160740649, 4.235348128, 0.668252289),
    ("cheetah-run_backwards", 1, 0.834745937, 0.436025141, -3.933874949),
    ("cheetah-run_front", 1, 5.357360453, 0.436025141, -3.933874949),
    ("cheetah-run_back", 1, 10.508429865, 0.436025141, -3.933874949),
    ("cheetah-jump", 1, 39.107448664, 0.436025141, -3.933874949),
    ("reacher-three_easy", 4, 6.000000000, 4.468137998, 5.972462857),
    ("reacher-three_hard", 8, 3.000000000, 4.799749793, 5.267772405),
    ("pendulum-spin", 1, 48.209251081, 0.369074352, -3.817971986),
    ("ball_in_cup-spin", 1, 37.922824226, 0.381379019, 0.733347081),
    ("hopper-hop_backwards", 14, 1.451017169, -0.050099133, 31.102654181),
)


@pytest.mark.parametrize(("task", "seed", "episode_return", "first_sum", "middle_sum"), ORIGINAL)
def test_custom_task_replays_the_original(task, seed, episode_return, first_sum, middle_sum):
    env = suites.make(task, seed)
    obs, total = [env.reset()[0]], 0.0
    for step in range(100):
        action = np.sign(np.sin(step / 9 + np.arange(env.action_space.shape[0]))).astype(np.float32)
        next_obs, reward, *_ = env.step(action)
        obs.append(next_obs)
        total += reward
    assert total == pytest.approx(episode_return, rel=1e-5)
    assert obs[0].sum(dtype=np.float64) == pytest.approx(first_sum, abs=1e-5)
    assert obs[50].sum(dtype=np.float64) == pytest.approx(middle_sum, abs=1e-4)


def ramp(x, zero, one):
    """0 at `zero`, 1 at `one`, linear between, constant beyond."""
    return float(np.clip((x - zero) / (one - zero), 0, 1))


def up(height):
    """1 from 1.2 m up, 0.1 at 0.6 m."""
    return 0.1 ** (max(0.0, 1.2 - height) / 0.6) ** 2


def expected_reward(task: str, model, data) -> float:
    """The reward from mujoco's raw state, with the slopes written as the two points they run between."""

    def z(body):
        return data.body(body).xpos[2]

    if task.startswith("walker"):
        v = data.sensor("torso_subtreelinvel").data[0]
        stand = (3 * up(z("torso")) + (1 + data.body("torso").xmat[8]) / 2) / 4
        return stand * (1 + 5 * (ramp(v, 0, -1) if "walk_" in task else ramp(v, 0, -8))) / 6
    if task.startswith("cheetah"):
        v = data.sensor("torso_subtreelinvel").data[0]
        if task == "cheetah-run_backwards":
            return ramp(v, 0, -8)
        if task == "cheetah-jump":
            heights = [(z("torso") + z(foot)) / 2 for foot in ("ffoot", "bfoot")]
            return (5 * (up(heights[0]) + up(heights[1])) / 2 + ramp(abs(v), 1, 0.5)) / 6
        foot = {"cheetah-run_front": "bfoot", "cheetah-run_back": "ffoot"}[task]
        return (0.6 * up(z(foot)) + 0.4 * up(z("torso"))) * (1 + 5 * ramp(v, 0, 6)) / 6
    if task == "hopper-hop_backwards":
        height = data.body("torso").xipos[2] - data.body("foot").xipos[2]
        return (0.6 <= height <= 2) * ramp(data.sensor("torso_subtreelinvel").data[0], 0, -1)
    if task == "pendulum-spin":
        return ramp(abs(data.qvel[0]), 0, 9)
    if task == "ball_in_cup-spin":
        x, _, height = data.site("target").xpos - data.body("ball").xpos
        caught = max(abs(x), abs(height)) < 0.05 - 0.025
        return (not caught) * (ramp(np.hypot(x, height), 0, 0.5) + 2 * ramp(np.hypot(*data.qvel[2:]), 0, 6)) / 3
    raise ValueError(task)


@pytest.mark.parametrize("task", sorted(dmc.CUSTOM.keys() - {"reacher-three_easy", "reacher-three_hard"}))
def test_custom_rewards(task):
    """At 200 random states that reach the slopes and the plateaus of every term."""
    dm = suites.make(task, seed=0).unwrapped.dm_env
    rng = np.random.default_rng(0)
    rewards = []
    for _ in range(200):
        with dm.physics.reset_context():
            data = dm.physics.data
            data.qpos[:] = rng.uniform(-0.6, 0.6, data.qpos.size)
            data.qvel[:] = rng.uniform(-1, 1, data.qvel.size)
            if task == "ball_in_cup-spin":
                data.qvel[:] *= 5
                data.qpos[2:] = rng.uniform([-0.3, 0.2], [0.3, 0.5]) if rng.random() < 0.7 else (0, 0.35)
            elif task == "pendulum-spin":
                data.qvel[:] *= 12
            else:
                data.qvel[dm.physics.model.joint("rootx").id] += rng.uniform(-10, 8) * rng.choice([1, 0.1])
                data.qpos[dm.physics.model.joint("rootz").id] = rng.uniform(-0.5, 1.0)
        rewards.append(dm.task.get_reward(dm.physics))
        assert rewards[-1] == pytest.approx(expected_reward(task, dm.physics.model, dm.physics.data), abs=1e-9)
    assert max(rewards) - min(rewards) > 0.5 and len(np.unique(np.round(rewards, 6))) > 15


def test_ball_in_cup_spin_starts():
    """One draw decides whether the ball may start outside the cup; then x and z in turn until a place is free."""
    env = suites.make("ball_in_cup-spin", seed=0)
    dm, outside = env.unwrapped.dm_env, []
    for seed in range(60):
        env.reset(seed=seed)
        stream = np.random.RandomState(seed)
        anywhere = stream.uniform() < 0.1
        while (stream.uniform(-0.2, 0.2), stream.uniform(0.2, 0.5)) != tuple(dm.physics.data.qpos[2:]):
            pass
        assert dm.task.random.uniform() == stream.uniform()
        assert dm.physics.data.ncon == 0
        assert anywhere or dm.physics.in_target()
        outside.append(not dm.physics.in_target())
    assert 0 < np.mean(outside) < 0.25


@pytest.mark.parametrize(("task", "radius"), [("reacher-three_easy", 0.05), ("reacher-three_hard", 0.015)])
def test_three_link_reacher(task, radius):
    dm = suites.make(task, seed=0).unwrapped.dm_env
    dm.reset()
    physics, model, data = dm.physics, dm.physics.model, dm.physics.data
    for kind in ("joint", "actuator"):
        assert [model.id2name(i, kind) for i in range(3)] == ["shoulder0", "shoulder1", "wrist"]
    np.testing.assert_array_equal(model.jnt_limited, [False, True, True])
    np.testing.assert_allclose(np.rad2deg(model.jnt_range[1:]), [[-80, 80], [-80, 80]])
    # Half the length of each capsule: the hand's reaches 1 cm past the finger's centre.
    np.testing.assert_allclose([model.geom(name).size[1] for name in ("arm0", "arm1", "hand")], [0.045, 0.045, 0.05])

    target = np.array([0.06, -0.03])
    for distance, reward in ((0.0, 1.0), (radius + 0.01 - 1e-6, 1.0), (radius + 0.01 + 1e-6, 0.0)):
        with physics.reset_context():
            data.qpos[:] = 0.4, -0.9, 1.2
            angles = np.cumsum(data.qpos)
            finger = 0.09 * np.array([np.cos(angles).sum(), np.sin(angles).sum()])
            physics.named.model.geom_pos["target", :2] = finger + distance * target / np.linalg.norm(target)
        np.testing.assert_allclose(data.geom("finger").xpos[:2], finger)
        assert dm.task.get_reward(physics) == reward
