"""Atari: the games, how they are set up, and their scores."""

import sys

import numpy as np
import pytest

import suites
from suites import atari
from suites.base import SuiteError

GAMES = atari.TASKS + atari.TRANSFER


def rollout(env, steps: int, seed: int | None = None) -> tuple[list, list]:
    """The observations and (reward, terminated, truncated, lives) of `steps` fixed pseudo-random actions."""
    rng = np.random.default_rng(0)
    obs, info = env.reset(seed=seed)
    frames, rest = [obs], []
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(int(rng.integers(18)))
        frames.append(obs)
        rest.append((reward, terminated, truncated, info["lives"]))
    return frames, rest


def test_task_lists():
    suite = suites.SUITES["atari"]
    assert (len(suite.tasks), len(suite.transfer), suite.steps) == (26, 20, 100_000)
    assert suite.pretrain == suite.tasks
    assert len(set(GAMES)) == 46 == len(atari.RETURNS)
    assert not atari.owns("SpaceInvaders") and not atari.owns("pong")


@pytest.mark.parametrize(
    ("game", "random", "human"),
    [("Alien", 227.8, 7127.7), ("Breakout", 1.7, 30.5), ("Pong", -20.7, 14.6), ("UpNDown", 533.4, 11693.2),
     ("DoubleDunk", -18.6, -16.4), ("YarsRevenge", 3092.9, 54576.9)],
)  # fmt: skip
def test_score_is_human_normalised(game, random, human):
    assert suites.score(game, random, None) == 0.0
    assert suites.score(game, human, None) == 1.0
    assert suites.score(game, 2 * human - random, None) == pytest.approx(2.0)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(SuiteError, match="'Pong' needs ale-py.*requirements.txt"):
        suites.make("Pong", 0)


def test_every_game_has_its_rom():
    for game in GAMES:
        env = suites.make(game, 0)
        assert env.action_space.n == 18
        assert env.observation_space.shape == (4, 84, 84) and env.observation_space.dtype == np.uint8
        env.close()


def test_emulator_settings():
    ale = suites.make("Pong", 0).unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == 0.0
    assert ale.getInt("max_num_frames_per_episode") == 108_000


@pytest.mark.parametrize("game", ["Pong", "Qbert", "BankHeist"])
def test_steps(game):
    env = suites.make(game, seed=0)
    starts = set()
    for _ in range(10):
        obs, info = env.reset()
        starts.add(info["episode_frame_number"])
        assert env.observation_space.contains(obs)
        assert not obs[:3].any()  # there is one frame so far
    assert starts <= set(range(1, 31)) and len(starts) > 1  # no-ops
    before = info["episode_frame_number"]
    obs_1, *_ = env.step(0)
    obs_2, reward, terminated, truncated, info = env.step(0)
    assert info["episode_frame_number"] == before + 8
    np.testing.assert_array_equal(obs_2[:3], obs_1[1:])  # the newest frame is the last
    assert np.isfinite(reward) and not terminated and not truncated


def test_a_seed_fixes_all_episodes():
    env, other = suites.make("MsPacman", seed=3), suites.make("MsPacman", seed=4)
    first, second = rollout(env, 100), rollout(env, 100)
    for again in (suites.make("MsPacman", seed=3), other):
        seed = 3 if again is other else None
        for expected, actual in zip((first, second), (rollout(again, 100, seed), rollout(again, 100)), strict=True):
            np.testing.assert_array_equal(expected[0], actual[0])
            assert expected[1] == actual[1]


def test_rewards_are_raw_and_a_lost_life_does_not_end_the_episode():
    _, steps = rollout(suites.make("Qbert", seed=0), 400)
    assert max(reward for reward, *_ in steps) > 1.0
    lost = next(i for i in range(1, 400) if steps[i][3] < steps[i - 1][3])
    assert not steps[lost][1] and not steps[lost][2]
