"""Atari: the games, how they are set up, and their scores."""

from unittest import mock

import gymnasium as gym
import numpy as np
import pytest

import suites
from suites import atari
from suites.atari import Games


def same_start(games: Games, game: str, max_frames: int = 108_000) -> tuple:
    """Starts a game natively and by Gymnasium with the same number of no-ops.

    Returns the native observation, Gymnasium's environment, observation and info. Both start from a ROM just loaded: in
    some games a later start depends on what was left in memory.
    """
    games.reset(seed=0)  # for the lives
    native, start = games.envs[0].reset(seed=3)
    noops = int(start["episode_frame_number"][0])
    assert noops >= 1  # as Gymnasium's are
    limit = {"max_num_frames_per_episode": max_frames + noops}  # Gymnasium counts them
    make = gym.make
    with mock.patch.object(gym, "make", lambda name, **kwargs: make(name, **kwargs | limit)):
        env = suites.make(game, seed=0)
    env._seed = None  # a seed would draw the no-ops
    draw = mock.Mock(integers=lambda low, high: noops)
    with mock.patch.object(type(env.unwrapped), "np_random", draw):
        obs, info = env.reset()
    assert info["episode_frame_number"] == noops
    return native[0], env, obs, info


# Games whose first episodes end within 400 random steps, and others.
@pytest.mark.parametrize(("game", "over"), [
    ("Breakout", True), ("Qbert", True), ("Pong", False), ("Freeway", False), ("Seaquest", False), ("Venture", False)])
def test_native_frames_rewards_lives_and_ends_equal_gymnasiums(game, over):
    games = Games((game,))
    native, env, obs, info = same_start(games, game)
    np.testing.assert_array_equal(native, obs)
    rng, episodes, total = np.random.default_rng(0), 0, 0.0
    for _ in range(400):
        action, lives, frame = int(rng.integers(18)), info["lives"], info["episode_frame_number"]
        step = games.step(np.array([action]))
        obs, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(step.next_obs[0], obs)  # the final one too, not the reset's
        assert (step.reward[0], step.terminated[0], step.truncated[0]) == (reward, terminated, truncated)
        assert step.life_lost[0] == (info["lives"] < lives and not terminated)
        assert terminated or info["episode_frame_number"] == frame + 4
        total = max(total, abs(reward))
        if terminated:
            episodes += 1
            assert not step.obs[0, :3].any() and step.obs[0, 3].any()  # a new episode has begun
            break
        np.testing.assert_array_equal(step.obs, step.next_obs)
    assert episodes == over and (total > 1 if game == "Qbert" else total > 0 or game != "Pong")  # rewards are raw
    games.close()


def test_native_starts_have_0_to_29_noops_and_follow_the_seed():
    games = Games(("Pong", "Pong"))

    def noops():  # of the next episode of each
        return [int(env.reset()[1]["episode_frame_number"][0]) for env in games.envs]

    np.testing.assert_array_equal(games.reset(seed=1), games.reset(seed=1))
    following = [noops() for _ in range(150)]
    assert {n for both in following for n in both} == set(range(30))
    assert [both[0] for both in following] != [both[1] for both in following]  # each game has a seed of its own
    games.reset(seed=1)
    assert [noops() for _ in range(5)] == following[:5]
    games.reset(seed=2)
    assert [noops() for _ in range(5)] != following[:5]


def test_a_truncated_game_shows_its_final_frame_and_starts_anew():
    games = Games(("Pong",), max_frames=80)
    _, env, *_ = same_start(games, "Pong", max_frames=80)
    for t in range(1, 21):
        step = games.step(np.array([3]))
        obs, reward, terminated, truncated, _ = env.step(3)
        np.testing.assert_array_equal(step.next_obs[0], obs)
        assert step.truncated[0] == truncated == (t == 20) and not step.terminated[0] and not step.life_lost[0]
    assert not step.obs[0, :3].any() and step.obs[0, 3].any() and step.next_obs[0, :3].any()


def test_the_rows_of_some_games_step_alone():
    games, alone = Games(("Pong", "Breakout", "Alien")), Games(("Pong", "Breakout", "Alien"))
    games.reset(seed=0)
    alone.reset(seed=0)
    for _ in range(5):
        expected = games.step(np.array([0, 3, 5]))
        alone.step(np.array([0]), np.array([0]))
    for _ in range(5):
        step = alone.step(np.array([3, 5]), np.array([1, 2]))
    np.testing.assert_array_equal(step.obs, expected.obs[1:])


@pytest.mark.parametrize("game", atari.TASKS + atari.TRANSFER)
def test_all_46_games_run_natively(game):
    games = Games((game, game))
    obs = games.reset(seed=0)
    assert obs.shape == (2, 4, 84, 84) and obs.dtype == np.uint8 and obs[:, 3].any((1, 2)).all()
    for _ in range(5):
        step = games.step(np.full(2, 17))
    assert step.reward.dtype == np.float32 and step.obs.shape == (2, 4, 84, 84)
    games.close()
