"""brc_drq.py part by part, against naive models and numbers worked out by hand; then whole, tiny runs."""

import csv
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brc_drq
import suites
from brc_drq import Agent, Args, Batch, Learner, ReplayBuffer, ReturnNormalizer
from suites.atari import Games, Step

CPU = torch.device("cpu")
SCRIPT = Path(brc_drq.__file__)


def make_args(**changes) -> Args:
    """An encoder of one and two channels, for milliseconds; two games, so that there is an embedding."""
    small = dict(tasks=("Pong", "Breakout"), encoder_scale=1 / 128, hidden_width=16, batch_size=8, learning_starts=30,
                 total_steps=80, updates_per_step=1, checkpoint_interval=20, precision="fp32")
    return Args(**small | changes)


def make_batch(size: int = 8, num_tasks: int = 2) -> Batch:
    obs, next_obs = torch.rand(2, size, 4, 84, 84)
    return Batch(obs, torch.randint(18, (size,)), torch.randn(size), torch.full((size,), 0.97), next_obs,
                 torch.randint(num_tasks, (size,)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- networks


def test_the_encoder_halves_the_image_three_times():
    encoder, shapes = brc_drq.Encoder((3, 5, 6)), []
    for stage in encoder.stages:
        stage.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    assert encoder(torch.rand(2, 4, 84, 84)).shape == (2, 6 * 11 * 11)
    assert shapes == [(2, 3, 42, 42), (2, 5, 21, 21), (2, 6, 11, 11)]


@pytest.mark.parametrize(
    ("num_tasks", "scale", "count"),
    # Convolutions 9 in out + out, layer norm 2 per feature, dense layers in out + out, embedding 32 a game:
    # at scale 1: 4,736 + 590,336 and 295,168 + 2,360,320 and 590,080 + 2,360,320; 61,952; 15,876,608 with the embedding
    # (15,860,224 without), 262,656, 932,634; 832.
    [(26, 1.0, 23_335_642), (1, 1.0, 23_318_426), (2, 0.125, 3_300_202)],
)
def test_parameter_counts(num_tasks, scale, count):
    with mock.patch("torch.nn.init.orthogonal_"):  # which takes seconds
        critic = brc_drq.Critic(make_args(encoder_scale=scale, hidden_width=512), num_tasks)
    assert sum(parameter.numel() for parameter in critic.parameters()) == count


def test_a_block_adds_to_its_input_and_relu_comes_first():
    block = brc_drq.ImpalaBlock(2)
    x = -torch.rand(1, 2, 5, 5)  # relu leaves nothing of it, and biases are 0
    assert torch.equal(block(x), x) and not torch.equal(block(-x), -x)


def test_head_sees_normalised_features_and_the_embedding_and_the_encoder_no_task():
    critic, seen = brc_drq.Critic(make_args(), 2), []
    critic.dense1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    obs = torch.rand(1, 4, 84, 84).expand(2, -1, -1, -1)
    logits = critic(obs, critic.embed(torch.tensor([0, 1])))
    assert logits.shape == (2, 18, 101) and not torch.equal(*logits)
    features, embedding = seen[0][:, :-32], seen[0][:, -32:]
    assert torch.equal(*features)
    np.testing.assert_allclose([features.mean().item(), features.std(correction=0).item()], [0, 1], atol=1e-3)
    np.testing.assert_allclose(embedding.abs().sum(-1).detach(), 1, rtol=1e-5)


def test_a_single_task_has_no_embedding():
    critic = brc_drq.Critic(make_args(), 1)
    assert critic.embedding is None and critic.dense1.in_features == 2 * 11 * 11
    assert critic(torch.rand(3, 4, 84, 84), critic.embed(torch.zeros(3, dtype=int))).shape == (3, 18, 101)


def test_bf16_is_for_convolutions_and_products_alone():
    agent, seen, batch = Agent(make_args(precision="bf16"), 2), {}, make_batch()
    for name in ("encoder", "norm", "logits"):
        part = getattr(agent.critic, name)
        part.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    loss = agent.update(batch)["critic_loss"]
    assert seen == {"encoder": torch.bfloat16, "norm": torch.float32, "logits": torch.float32}
    torch.manual_seed(0)
    exact = Agent(make_args(), 2).update(make_batch())["critic_loss"]
    assert loss != exact
    np.testing.assert_allclose(loss, exact, rtol=0.05)


# -------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("shift", [(0, 0), (4, -4), (-3, 2), (1, 0)])
def test_random_shift_is_a_crop_of_the_replicated_image(shift):
    obs = torch.randint(256, (1, 4, 84, 84), dtype=torch.uint8)
    padded = np.pad(obs[0].numpy(), ((0, 0), (4, 4), (4, 4)), "edge")
    expected = padded[:, 4 + shift[0]:88 + shift[0], 4 + shift[1]:88 + shift[1]]
    np.testing.assert_array_equal(brc_drq.random_shift(obs, torch.tensor([shift]))[0], expected)


def test_augmentation_differs_per_sample_and_keeps_statistics():
    args, generator = make_args(), torch.Generator().manual_seed(0)
    image = torch.full((4, 84, 84), 100, dtype=torch.uint8)
    image[:, 40, 50] = 255  # its brightest pixel tells the shift, and its background the intensity
    obs = brc_drq.augment(image.expand(900, -1, -1, -1), args, generator)
    where = obs.flatten(2).argmax(-1)
    assert (where == where[:, :1]).all(), "the frames of a stack move together"
    rows, columns = where[:, 0] // 84 - 40, where[:, 0] % 84 - 50
    for moved in (rows, columns):
        assert sorted(set(moved.tolist())) == list(range(-4, 5))
        assert (torch.bincount(moved + 4) > 900 / 9 * 0.6).all()
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.1
    intensity = obs[:, 0, 0, 0] / (100 / 255)
    assert intensity.min() >= 0.9 - 1e-6 and intensity.max() <= 1.1 + 1e-6 and len(intensity.unique()) > 700
    # 0.05 times the standard deviation of a standard normal clipped at 2, which is 0.9593
    np.testing.assert_allclose([intensity.mean(), intensity.std()], [1, 0.048], atol=0.006)
    np.testing.assert_allclose(obs.mean(), image.float().mean() / 255, rtol=0.01)


def test_the_two_observations_of_a_transition_are_augmented_apart():
    learner = fed_learner()
    learner.buffer.frame[:] = torch.randint(256, learner.buffer.frame.shape, dtype=torch.uint8)
    batch = learner.buffer.sample(8, torch.Generator().manual_seed(1))
    with mock.patch.object(learner, "next_batch", lambda: batch._replace(next_obs=batch.obs)):
        learner.update()
    same = (learner.batch.obs == learner.batch.next_obs).flatten(1).all(1)
    assert not same.any()


# -------------------------------------------------------------------------------------- projection and normaliser


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), num_atoms=st.integers(2, 60), spread=st.sampled_from([0.1, 1.0, 3.0, 1e6]))
def test_projection_equals_the_naive_loop(seed, num_atoms, spread):
    rng = np.random.default_rng(seed)
    atoms, exact = torch.linspace(-10, 10, num_atoms), np.linspace(-10, 10, num_atoms)
    probs = rng.dirichlet(np.full(num_atoms, 0.3), 4).astype(np.float32)
    positions = (10 * spread * rng.normal(size=(4, num_atoms))).astype(np.float32)
    expected = np.zeros((4, num_atoms))
    for row, column in np.ndindex(probs.shape):
        position = min(max(float(positions[row, column]), -10), 10)
        right = max(1, int(np.searchsorted(exact, position)))
        share = (position - exact[right - 1]) / (exact[right] - exact[right - 1])
        expected[row, right - 1] += probs[row, column] * (1 - share)
        expected[row, right] += probs[row, column] * share
    projected = brc_drq.project_categorical(torch.from_numpy(probs), torch.from_numpy(positions), atoms)
    assert (projected >= 0).all()
    np.testing.assert_allclose(projected.sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(projected, expected, atol=5e-5)


def finish_episode(normalizer: ReturnNormalizer, rewards: list, terminated: bool, last_value: float | None) -> None:
    for t, reward in enumerate(rewards):
        last = np.array([t == len(rewards) - 1])
        normalizer.observe(np.array([reward], np.float32), last & terminated, last & (not terminated),
                           None if last_value is None else np.array([last_value]))


@pytest.mark.parametrize(
    ("rewards", "terminated", "last_value", "scale"),
    [  # gamma = 0.5
        ([1, 2, 4], True, 100, 4),  # G = 4; 2 + 4/2 = 4; 1 + 4/2 = 3: a terminal state has no value
        ([-6, 1], True, None, 5.5),  # 1; -6 + 1/2 = -5.5
        ([1, 2, 4], False, 8, 8),  # 4 + 8/2 = 8; 2 + 8/2 = 6; 1 + 6/2 = 4
        ([1, 2, 4], False, None, 4),  # the critic has learned nothing yet
    ],
)
def test_return_scale_of_one_episode(rewards, terminated, last_value, scale):
    normalizer = ReturnNormalizer(make_args(gamma=0.5), 1)
    finish_episode(normalizer, rewards, terminated, last_value)
    assert normalizer.return_scale.tolist() == [scale]


def test_rewards_fit_the_support_and_are_0_before_the_first_finished_episode():
    normalizer = ReturnNormalizer(make_args(), 3)
    normalizer.return_scale[:2] = torch.tensor([4.0, 0.0])  # nothing but zeros so far in the second
    task_id = torch.tensor([0, 1, 2, 0])
    normalized = normalizer.normalize(torch.tensor([2.0, 0.0, 5.0, -4.0]), task_id)
    assert normalized.tolist() == [5, 0, 0, -10]
    assert normalizer.denormalize(normalized, task_id).tolist() == [2, 0, 0, -4]


# -------------------------------------------------------------------------------------------------- replay buffer


class Stream:
    """Unending episodes of every task, whose frames are numbered (in 2x2 pixels of one byte), and a naive replay.

    plans: per task, the (length, terminates) of its episodes, repeated for ever. A life is lost in every step whose
    number is divisible by `life`. Per task, `episodes` is a list of dicts with lists of frames, and of the action,
    reward and `dead` (terminated or a life lost) that followed each but the last frame.
    """

    def __init__(self, plans: list[list[tuple[int, bool]]], life: int = 5):
        self.life, self.numbers, self.steps = life, itertools.count(1), 0
        self.plans = [itertools.cycle(plan) for plan in plans]
        self.running = [next(plan) for plan in self.plans]
        self.episodes = [[self.new_episode()] for _ in plans]

    def new_episode(self) -> dict:
        return dict(frames=[next(self.numbers)], actions=[], rewards=[], dead=[])

    def obs(self) -> np.ndarray:
        """What the environments' frame stacks show: [N, 4, 2, 2] uint8, zero before the episode."""
        return np.stack([self.stack(episodes[-1], len(episodes[-1]["frames"]) - 1) for episodes in self.episodes])

    def stack(self, episode: dict, t: int) -> np.ndarray:
        numbers = [episode["frames"][i] if i >= 0 else 0 for i in range(t - 3, t + 1)]
        return np.array(numbers, np.uint32).view(np.uint8).reshape(4, 2, 2)

    def feed(self, num_steps: int, *buffers: ReplayBuffer) -> None:
        for _ in range(num_steps):
            self.steps += 1
            obs, rng = self.obs(), np.random.default_rng(self.steps)
            action, reward = rng.integers(18, size=len(self.plans)), rng.normal(size=len(self.plans)).astype(np.float32)
            terminated, truncated, life_lost = np.zeros((3, len(self.plans)), bool)
            for task, (length, terminates) in enumerate(self.running):
                episode = self.episodes[task][-1]
                over = len(episode["frames"]) == length
                terminated[task], truncated[task] = over and terminates, over and not terminates
                life_lost[task] = not over and (self.steps + task) % self.life == 0
                episode["frames"].append(next(self.numbers))
                episode["actions"].append(int(action[task]))
                episode["rewards"].append(float(reward[task]))
                episode["dead"].append(bool(terminated[task] or life_lost[task]))
            for buffer in buffers:
                buffer.add(obs, action, reward, terminated, truncated, life_lost, self.obs())
            for task in np.flatnonzero(terminated | truncated):
                self.next_episode(task)

    def next_episode(self, task: int) -> None:
        self.running[task] = next(self.plans[task])
        self.episodes[task].append(self.new_episode())

    def cut(self, *buffers: ReplayBuffer) -> None:
        for buffer in buffers:
            buffer.cut()
        for task, episodes in enumerate(self.episodes):
            if episodes[-1]["actions"]:
                self.next_episode(task)

    def kept(self, buffer: ReplayBuffer, capacity: int | None = None) -> dict:
        """The transitions that a buffer of these sizes holds: first frame's number -> the rest."""
        kept = {}
        for task, episodes in enumerate(self.episodes):
            rows = []
            for episode in episodes:
                running = episode is episodes[-1]
                steps = len(episode["actions"])
                complete = steps - (buffer.n_step - 1) * running  # the transitions whose n steps are there
                rows += [self.transition(task, episode, t, buffer) if t < complete else None for t in range(steps)]
                rows += [] if running else ["final"]
            rows = rows[-(buffer.rows - 4):]  # all but the current frame and three older ones
            kept |= dict(row for row in [row for row in rows if row != "final"][-buffer.capacity:] if row)
        return kept

    def transition(self, task: int, episode: dict, t: int, buffer: ReplayBuffer) -> tuple[int, tuple]:
        """Step by step, as a textbook has it."""
        reward, discount, end = 0.0, 1.0, t
        while end < min(t + buffer.n_step, len(episode["actions"])):
            reward += discount * episode["rewards"][end]
            discount *= buffer.gamma
            end += 1
            if episode["dead"][end - 1]:
                discount = 0.0
                break
        next_obs = self.stack(episode, end)
        return episode["frames"][t], (task, self.stack(episode, t), episode["actions"][t], reward, discount, next_obs)


def make_buffer(stream: Stream, capacity: int, n_step: int = 3) -> ReplayBuffer:
    with mock.patch.object(brc_drq, "SIZE", 2):
        return ReplayBuffer(len(stream.plans), capacity, 0.9, n_step)


def assert_samples(buffer: ReplayBuffer, expected: dict) -> None:
    """The buffer samples the expected transitions and no others (it would miss one of 80 with probability e-50)."""
    batch = buffer.sample(4000, torch.Generator().manual_seed(0))
    numbers = batch.obs[:, -1].reshape(-1, 4).numpy().copy().view(np.uint32)[:, 0]
    found, first = np.unique(numbers, return_index=True)
    assert set(found.tolist()) == set(expected)
    for number, i in zip(found.tolist(), first, strict=True):
        task, obs, action, reward, discount, next_obs = expected[number]
        assert (batch.task_id[i], batch.action[i]) == (task, action)
        np.testing.assert_array_equal(batch.obs[i], obs)
        np.testing.assert_allclose([batch.reward[i], batch.discount[i]], [reward, discount], rtol=1e-5, atol=1e-6)
        if discount > 0:
            np.testing.assert_array_equal(batch.next_obs[i], next_obs)


def plans_of(min_length: int, max_length: int):
    episode = st.tuples(st.integers(min_length, max_length), st.booleans())
    return st.lists(st.lists(episode, min_size=1, max_size=5), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(plans=plans_of(1, 12), n_step=st.integers(1, 5), extra=st.integers(0, 20), life=st.integers(1, 9),
       bouts=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_stacks_and_n_step_returns_equal_those_of_a_list_of_episodes(plans, n_step, extra, life, bouts):
    stream = Stream(plans, life)
    buffer = make_buffer(stream, n_step + extra, n_step)
    stream.feed(n_step - 1, buffer)
    for num_steps in bouts:
        stream.feed(num_steps, buffer)
        assert_samples(buffer, stream.kept(buffer))
    stream.cut(buffer)
    assert_samples(buffer, stream.kept(buffer))
    stream.feed(3, buffer)
    assert_samples(buffer, stream.kept(buffer))


def test_a_ring_wraps_at_every_phase_of_an_episode():
    stream = Stream([[(70, True)], [(64, False), (3, True), (100, True)]], life=11)
    buffer = make_buffer(stream, 100)
    for step in range(330):
        stream.feed(1, buffer)
        if step >= 2 and step % 13 == 0:
            assert_samples(buffer, stream.kept(buffer))
    assert len(stream.kept(buffer)) == 2 * (100 - 2)  # all of its capacity, but what waits for n steps


@settings(deadline=None, max_examples=30)
@given(plans=plans_of(1, 12), capacity=st.integers(3, 25), new_capacity=st.integers(3, 25),
       bouts=st.lists(st.integers(3, 40), min_size=1, max_size=4))
def test_buffer_survives_export_and_load(plans, capacity, new_capacity, bouts):
    stream = Stream(plans)
    buffer = make_buffer(stream, capacity)
    segments, exported = [], np.zeros(len(plans), np.int64)
    for num_steps in bouts:
        stream.feed(num_steps, buffer)
        segments.append({name: values.flip(0) for name, values in buffer.export(exported).items()})
        exported = buffer.head.copy()
    same, other = make_buffer(stream, capacity), make_buffer(stream, new_capacity)
    same.load(segments=segments, counters=buffer.state_dict())
    other.load(segments=segments, counters=buffer.state_dict())
    assert_samples(same, stream.kept(buffer))
    both = stream.kept(buffer).items()
    assert_samples(other, {number: row for number, row in both if number in stream.kept(other)})
    stream.cut(buffer, same, other)
    stream.feed(7, buffer, same, other)
    assert_samples(same, stream.kept(buffer))
    for expected, loaded in zip(*(b.sample(500, torch.Generator().manual_seed(1)) for b in (buffer, same))):
        assert torch.equal(expected, loaded)
    # A cut after a checkpoint changes a row that is saved already: the next segment has to hold it.
    segments.append(same.export(exported))
    again = make_buffer(stream, capacity)
    again.load(segments=segments, counters=same.state_dict())
    assert_samples(again, stream.kept(buffer))


def test_sampling_is_uniform_over_games_and_their_transitions():
    stream = Stream([[(3, True), (7, False)], [(20, False)], [(5, True)]])
    buffer = make_buffer(stream, 20)
    stream.feed(53, buffer)
    batch = buffer.sample(60_000, torch.Generator().manual_seed(0))
    numbers = batch.obs[:, -1].reshape(-1, 4).numpy().copy().view(np.uint32)[:, 0]
    drawn, counts = np.unique(numbers, return_counts=True)
    kept = stream.kept(buffer)
    per_task = np.bincount([row[0] for row in kept.values()])
    expected = np.array([60_000 / 3 / per_task[kept[number][0]] for number in drawn.tolist()])
    chi_square, degrees = ((counts - expected) ** 2 / expected).sum(), len(kept) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_26_games_of_100k_transitions_fit_in_19_gb():
    buffer = ReplayBuffer(26, 100_000, 0.99, 3, device="meta")
    assert 26 * 100_000 * 84 * 84 < buffer.nbytes < 19e9


def test_stored_stacks_are_those_that_the_environment_showed():
    games = Games(("Breakout", "Pong"), max_frames=400)  # lost lives, games that end, and truncations after 100 steps
    buffer = ReplayBuffer(2, 260, 0.99, 1)
    obs, rng, seen, ends = games.reset(seed=0), np.random.default_rng(0), [], np.zeros(3)
    for _ in range(260):
        action = rng.integers(18, size=2)
        step = games.step(action)
        buffer.add(obs, action, step.reward, step.terminated, step.truncated, step.life_lost, step.next_obs)
        seen.append((obs, step))
        ends += [step.terminated.any(), step.truncated.any(), step.life_lost.any()]
        obs = step.obs
    games.close()
    assert ends[1:].all()
    for t, (obs, step) in enumerate(seen):
        task_id = torch.arange(2)
        row = buffer.row_of[:, t].long()
        np.testing.assert_array_equal(buffer.stack(task_id, row), obs)
        reward, discount, next_row = buffer.n_step_return(task_id, row)
        np.testing.assert_array_equal(buffer.stack(task_id, next_row), step.next_obs)
        np.testing.assert_array_equal(reward, step.reward)
        np.testing.assert_array_equal(discount == 0, step.terminated | step.life_lost)


# ---------------------------------------------------------------------------------------------------------- update


class Table:
    """In place of a Critic: the same logits [A, K] for every observation."""

    def __init__(self, logits: torch.Tensor):
        self.table, self.atoms = logits, torch.linspace(-10, 10, 101)

    def embed(self, task_id):
        return None

    def __call__(self, obs, embedding):
        return self.table.expand(len(obs), -1, -1)

    q_values = brc_drq.Critic.q_values


def certain(*atoms: int) -> torch.Tensor:
    """Logits of 18 actions, the first of which are certain of these atoms, the others of the lowest one."""
    logits = torch.zeros(18, 101)
    for action, atom in enumerate([*atoms, *[0] * (18 - len(atoms))]):
        logits[action, atom] = 50
    return logits


def test_the_critic_chooses_the_next_action_and_the_target_evaluates_it():
    # The critic prefers action 1; of it the target expects 2, atom 60, though it expects 9 of action 0.
    critic, target = Table(certain(50, 70)), Table(certain(95, 60))
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0]),
                  torch.zeros(2, 1), torch.zeros(2, dtype=int))
    _, metrics = brc_drq.critic_loss(critic, target, batch)
    np.testing.assert_allclose(metrics["target_q"], ((1 + 0.5 * 2) + 1) / 2, atol=1e-4)  # the second has ended


def test_the_loss_is_the_cross_entropy_of_the_action_that_was_taken():
    critic = Table(torch.randn(18, 101))
    batch = Batch(torch.zeros(3, 1), torch.tensor([4, 0, 17]), torch.tensor([1.0, 0.0, -20.0]), torch.zeros(3),
                  torch.zeros(3, 1), torch.zeros(3, dtype=int))
    loss, _ = brc_drq.critic_loss(critic, critic, batch)
    log_probs = critic.table.log_softmax(-1)  # atoms of 1.0, 0.0 and, clipped, -10
    np.testing.assert_allclose(loss, -(log_probs[4, 55] + log_probs[0, 50] + log_probs[17, 0]) / 3, rtol=1e-5)


def test_one_update_moves_the_critic_and_the_target_follows_by_tau():
    agent = Agent(make_args(learning_rate=0.01, tau=0.25), 2)
    old, old_target = ([p.detach().clone() for p in part.parameters()] for part in (agent.critic, agent.target))
    agent.update(make_batch())
    for before, was, target, critic in zip(old, old_target, agent.target_parameters, agent.critic_parameters):
        assert not torch.equal(before, critic)
        torch.testing.assert_close(target, 0.75 * was + 0.25 * critic)


def test_the_loss_of_a_fixed_batch_goes_down():
    # With discount 0 what is to be learned of every observation is one reward.
    agent, batch = Agent(make_args(learning_rate=3e-3), 2), make_batch()._replace(discount=torch.zeros(8))
    losses = [agent.update(batch)["critic_loss"].item() for _ in range(100)]
    assert np.isfinite(losses).all() and losses[-1] < 0.6 * losses[0]


def test_actions_are_greedy_but_for_a_share_of_epsilon():
    agent, generator = Agent(make_args(), 2), torch.Generator().manual_seed(0)
    obs = torch.randint(256, (1, 4, 84, 84), dtype=torch.uint8).expand(3000, -1, -1, -1)
    with mock.patch.object(agent, "q_values", lambda obs, task_id: torch.eye(18)[5].expand(len(obs), 18)):
        task_id = torch.zeros(3000, dtype=int)
        actions = {epsilon: agent.act(obs, task_id, epsilon, generator) for epsilon in (0, 0.36, 1)}
    assert (actions[0] == 5).all()
    others = (actions[0.36] != 5).float().mean()
    np.testing.assert_allclose(others, 0.36 * 17 / 18, atol=0.03)
    assert (torch.bincount(actions[1], minlength=18) > 3000 / 18 * 0.7).all()


@pytest.mark.parametrize(("env_step", "epsilon"), [(0, 1.0), (1600, 1.0), (2600, 0.802), (4100, 0.505), (6600, 0.01),
                                                   (90_000, 0.01)])
def test_epsilon_falls_over_5000_steps_once_learning_starts(env_step, epsilon):
    learner = Learner(make_args(learning_starts=1600), CPU, CPU)
    learner.env_step = env_step
    assert learner.epsilon() == pytest.approx(epsilon)


# --------------------------------------------------------------------------------------------------------- learner


class FakeGames:
    """In place of Games: episodes of 20 steps that end by truncation, a life lost in every seventh, no randomness."""

    hook = staticmethod(lambda games: None)  # what else a test wants to happen in a step

    def __init__(self, tasks, max_frames=0):
        self.tasks, self.num_envs = tuple(tasks), len(tasks)
        self.steps = 0  # of all episodes

    def reset(self, seed: int) -> np.ndarray:
        self.t = np.zeros(self.num_envs, int)
        self.stacks = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        self.push(np.arange(self.num_envs), np.zeros(self.num_envs, int))
        return self.stacks.copy()

    def push(self, rows, action) -> None:
        self.stacks[rows, :-1] = self.stacks[rows, 1:]
        self.stacks[rows, -1] = 0
        self.stacks[rows, -1, 4 * self.t[rows], 4 * action] = 200

    def step_async(self, action, rows=None) -> None:
        self.rows, self.action = np.arange(self.num_envs) if rows is None else rows, action

    def step_wait(self) -> Step:
        rows, action = self.rows, self.action
        self.steps += 1
        self.hook(self)
        self.t[rows] += 1
        self.push(rows, action)
        next_obs, over = self.stacks[rows].copy(), self.t[rows] == 20
        reward = np.where(action % 2 == 0, 3.0, -1.0).astype(np.float32)
        life_lost = (self.t[rows] % 7 == 0) & ~over
        self.t[rows[over]] = 0
        self.stacks[rows[over]] = 0
        self.push(rows[over], np.zeros(over.sum(), int))
        return Step(next_obs, reward, np.zeros_like(over), over, life_lost, self.stacks[rows].copy())

    def step(self, action, rows=None) -> Step:
        self.step_async(action, rows)
        return self.step_wait()

    def close(self) -> None:
        pass


def fed_learner(steps: int = 30, **changes) -> Learner:
    """A learner that has observed two fake games, and not learned yet."""
    learner = Learner(make_args(**changes), CPU, CPU)
    games = FakeGames(learner.args.tasks)
    obs = games.reset(0)
    for _ in range(steps):
        action = learner.act(obs)
        result = games.step(action)
        learner.env_step += 1
        learner.observe(obs, action, result)
        obs = result.obs
    return learner


@pytest.mark.parametrize("clip", [True, False])
def test_rewards_are_clipped_for_learning_unless_the_switch_is_off(clip):
    learner = fed_learner(clip_rewards=clip, n_step=1)
    assert set(learner.buffer.sample(200).reward.tolist()) == {1.0 if clip else 3.0, -1.0}


def test_a_lost_life_ends_the_episode_of_learner_and_normaliser_and_not_the_stack():
    learner = fed_learner(steps=10, n_step=1)  # a life is lost in step 7
    assert [len(rewards) for rewards in learner.normalizer.episode_rewards] == [3, 3]
    task_id, row = torch.zeros(10, dtype=int), learner.buffer.row_of[0, :10].long()
    _, discount, _ = learner.buffer.n_step_return(task_id, row)
    assert (discount == 0).tolist() == [t == 6 for t in range(10)]
    stack = learner.buffer.stack(task_id, row)[8]
    assert (stack != 0).flatten(1).any(1).all()


def test_a_truncated_episode_bootstraps_with_the_critic_in_raw_units():
    learner = fed_learner(steps=19)
    learner.normalizer.return_scale[:] = 2.0
    learner.env_step = 100
    games = FakeGames(learner.args.tasks)
    obs = games.reset(0)
    games.t[:] = 19
    final = games.step(np.array([0, 0])).next_obs
    q = learner.agent.q_values(torch.from_numpy(final), torch.arange(2)).amax(-1)
    np.testing.assert_allclose(learner.raw_value(final), q * 2 / 10, rtol=1e-5)
    seen = []
    with mock.patch.object(learner.normalizer, "observe", lambda *inputs: seen.append(inputs)):
        games.reset(0)
        games.t[:] = 19
        learner.observe(obs, np.zeros(2, int), games.step(np.array([0, 0])))
    np.testing.assert_allclose(seen[0][3], q * 2 / 10, rtol=1e-5)


def test_prefetching_gives_the_same_batches_one_update_ahead():
    direct, ahead = fed_learner(), fed_learner()
    ahead.prefetch = True
    for _ in range(5):
        direct.update()
        ahead.update()
        for expected, batch in zip(direct.batch, ahead.batch):
            assert torch.equal(expected, batch)
    expected = direct.buffer.sample(8, direct.generators["replay"])
    assert all(torch.equal(x, y) for x, y in zip(expected, ahead.prefetched))


def test_the_replay_goes_where_there_is_room():
    args, gpu = make_args(buffer_size=100_000, total_steps=100_000), torch.device("cuda:0")
    for free, device in ((20e9, gpu), (1e9, CPU)):
        with mock.patch("torch.cuda.mem_get_info", lambda device, free=free: (free, 0)):
            assert brc_drq.choose_replay_device(args, gpu) == device
            assert brc_drq.choose_replay_device(dataclasses.replace(args, replay_device="cpu"), gpu) == CPU
    assert brc_drq.choose_replay_device(args, CPU) == CPU


def test_evaluation_plays_one_episode_in_every_environment():
    class Lengths(FakeGames):
        """Episodes of 3 steps for every first copy and 7 for every second."""

        def step_wait(self):
            assert self.steps < 7
            step = super().step_wait()
            played.append(self.rows.tolist())
            over = self.t[self.rows] == np.where(self.rows % 2, 7, 3)
            return step._replace(truncated=over, reward=self.rows + 1.0)

    agent, played = Agent(make_args(), 2), []
    results, frames = brc_drq.evaluate(agent, Lengths(("Pong", "Pong", "Breakout", "Breakout")), seed=1, video=True)
    assert played == [[0, 1, 2, 3]] * 3 + [[1, 3]] * 4
    assert [result["return"] for result in results] == [(3 * 1 + 7 * 2) / 2, (3 * 3 + 7 * 4) / 2]
    random, human = -20.7, 14.6
    assert results[0]["score"] == pytest.approx((8.5 - random) / (human - random))
    assert [len(episode) for episode in frames] == [1, 1]  # every fourth step of the first copy's
    assert brc_drq.evaluate(agent, Lengths(("Pong", "Breakout")), seed=1, stop=lambda: True) is None


# ------------------------------------------------------------------------------------------- checkpoint and resume


@pytest.fixture
def args(monkeypatch, tmp_path):
    """Arguments of a run of 80 steps on two fake games, with a checkpoint and an evaluation every 20."""
    monkeypatch.setattr(brc_drq, "Games", FakeGames)
    monkeypatch.setattr(FakeGames, "hook", staticmethod(FakeGames.hook))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield make_args(exp_name="test", run_dir=str(tmp_path / "run"), device="cpu", eval_interval=20, eval_episodes=2,
                    log_interval=40, batch_size=4)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_until(args: Args, step: int) -> None:
    """Trains up to `step`, where the process is asked to stop."""
    def hook(games):
        if games.num_envs == 2 and games.steps == step:
            os.kill(os.getpid(), signal.SIGTERM)

    FakeGames.hook = staticmethod(hook)
    with pytest.raises(SystemExit) as stopped:
        brc_drq.train(args)
    assert stopped.value.code == 128 + signal.SIGTERM
    FakeGames.hook = staticmethod(lambda games: None)


def learner_of(args: Args, prefetch: bool = False) -> Learner:
    """The learner that the last checkpoint of `args.run_dir` holds, its replay included."""
    learner = Learner(args, CPU, CPU)
    learner.prefetch = prefetch
    brc_drq.load_checkpoint(Path(args.run_dir), learner)
    return learner


def flat(state, prefix="") -> dict:
    """A nested state as {path: leaf}."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def assert_same_learner(first: Learner, second: Learner) -> None:
    ours, theirs = (flat({name: value for name, value in learner.state_dict().items() if name != "global_random"})
                    for learner in (first, second))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert torch.equal(leaf, theirs[path]) if isinstance(leaf, torch.Tensor) else leaf == theirs[path], path
    batches = [learner.buffer.sample(200, torch.Generator().manual_seed(0)) for learner in (first, second)]
    assert all(torch.equal(x, y) for x, y in zip(*batches))


@pytest.mark.parametrize(("buffer_size", "prefetch"), [(1000, False), (30, True)])
def test_a_resumed_learner_equals_one_that_never_stopped(args, buffer_size, prefetch, tmp_path, monkeypatch):
    create = Learner.__init__

    def create_prefetching(self, *inputs):
        create(self, *inputs)
        self.prefetch = prefetch

    monkeypatch.setattr(Learner, "__init__", create_prefetching)
    args = dataclasses.replace(args, buffer_size=buffer_size)
    brc_drq.train(args)
    stopped = dataclasses.replace(args, run_dir=str(tmp_path / "stopped"))
    run_until(stopped, 60)  # at the end of an episode
    assert learner_of(stopped).env_step == 60
    brc_drq.train(dataclasses.replace(stopped, resume=stopped.run_dir))
    assert_same_learner(learner_of(args), learner_of(stopped))
    first, second = ((Path(run.run_dir) / "metrics.csv").read_text() for run in (args, stopped))
    assert first == second and first.count("\n") == 1 + 4 * 3 * 2


def test_an_episode_that_was_cut_is_stored_as_truncated(args):
    run_until(args, 31)
    learner = learner_of(args)
    learner.cut_episodes()
    assert learner.normalizer.episode_rewards == [[], []] and (learner.buffer.stop == 31).all()
    row = learner.buffer.row_of[0, 28:31].long()
    _, discount, next_row = learner.buffer.n_step_return(torch.zeros(3, dtype=int), row)
    np.testing.assert_allclose(discount, [0.99**3, 0.99**2, 0.99], rtol=1e-6)
    assert len(next_row.unique()) == 1


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(args, capsys):
    brc_drq.train(args)
    path = Path(args.run_dir) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert learner_of(args).env_step == 60
    assert "going on from" in capsys.readouterr().err
    brc_drq.train(dataclasses.replace(args, resume=args.run_dir))
    assert learner_of(args).env_step == 80


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_batch(args, monkeypatch):
    def critic_loss(*inputs):
        loss, metrics = original(*inputs)
        calls.append(loss)
        factor = 1.0 if len(calls) < 20 else torch.nan
        return loss * factor, metrics | {"critic_loss": loss.detach() * factor}

    original, calls = brc_drq.critic_loss, []
    monkeypatch.setattr(brc_drq, "critic_loss", critic_loss)
    with pytest.raises(brc_drq.RunError, match="critic_loss is nan at step 50"):
        brc_drq.train(args)
    batch = torch.load(Path(args.run_dir) / "nonfinite_batch.pt", weights_only=True)
    assert batch["obs"].shape == (4, 4, 84, 84)
    assert learner_of(args).env_step == 40


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given_args", "message"),
    [
        (dict(suite="nonsense"), "Unknown suite 'nonsense'.*atari"),
        (dict(suite="mw"), "assembly is not an Atari game.*brc_sac.py"),
        (dict(tasks=("Pong", "reach")), "reach is not an Atari game.*brc_sac.py"),
        (dict(tasks=("Pnog",)), "Unknown task 'Pnog': did you mean Pong"),
        (dict(tasks=("Pong", "Pong")), "'Pong' was given more than once"),
        *((dict([(name, value)]), f"--{name.replace('_', '-')} is {value}: give .*{bound}") for name, value, bound in (
            *((name, 0, "at least 1") for name in (
                "total_steps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval",
                "updates_per_step", "batch_size", "n_step", "hidden_width", "embedding_dim", "epsilon_decay_steps",
                "max_frames")),
            ("learning_starts", 2, "3"), ("buffer_size", 2, "3"), ("num_atoms", 1, "2"), ("seed", -1, "0"),
            ("encoder_scale", 0.0, ""), ("encoder_scale", float("nan"), ""), ("gamma", 1.0, ""), ("tau", 1.5, "1"),
            ("epsilon", -0.1, "0"), ("eval_epsilon", 2.0, "1"), ("learning_rate", 0.0, ""), ("adam_eps", 0.0, ""),
            ("v_max", -10.0, ""), ("weight_decay", -1.0, "0"), ("shift_pad", -1, "0"), ("intensity", -1.0, "0"),
        )),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(given_args, message):
    with pytest.raises((brc_drq.UsageError, suites.SuiteError)) as refusal:
        brc_drq.resolve(Args(**given_args))
    text = str(refusal.value)
    assert re.search(message, text)
    assert "\n" not in text and text[-1] in ".?" and not re.search(r"[.?] [A-Z]", text)


@pytest.mark.parametrize(
    ("given_args", "resolved"),
    [
        (dict(), dict(batch_size=256, updates_per_step=2, learning_starts=1600, total_steps=100_000, n_step=3,
                      gamma=0.99, learning_rate=1e-4, checkpoint_interval=5000, exp_name="brc_drq-atari", epsilon=0.01,
                      tasks=suites.SUITES["atari"].tasks, buffer_size=100_000, eval_epsilon=0.001)),
        (dict(tasks=("Pong", "Venture")), dict(exp_name="brc_drq-Pong-Venture", total_steps=100_000)),
        (dict(encoder_scale=0.125), dict(batch_size=32, updates_per_step=1, eval_episodes=3)),
        (dict(encoder_scale=0.125, batch_size=8, updates_per_step=3), dict(batch_size=8, updates_per_step=3)),
        (dict(total_steps=7), dict(total_steps=7, checkpoint_interval=1)),
    ],
)
def test_defaults(given_args, resolved):
    args = brc_drq.resolve(Args(**given_args))
    assert {name: getattr(args, name) for name in resolved} == resolved


# ------------------------------------------------------------------------------------------------------ end to end

SMALL = ("--tasks Pong Qbert --encoder-scale 0.02 --hidden-width 16 --batch-size 8 --learning-starts 30 "
         "--total-steps 120 --eval-interval 50 --eval-episodes 2 --checkpoint-interval 50 --log-interval 20 "
         "--max-frames 160 --device cpu")  # episodes of 40 steps


def brc(arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments.split()], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def metrics_of(path: Path) -> dict[tuple[str, str, int], float]:
    with open(path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = {(row["env_name"], row["metric"], int(row["env_step"])): float(row["value"]) for row in rows}
    assert len(values) == len(rows), "a step appears twice"
    return values


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    cwd = tmp_path_factory.mktemp("end-to-end")
    process = brc(f"{SMALL} --run-dir run --capture-video", cwd)
    assert process.returncode == 0, process.stderr
    return cwd / "run", process.stdout


def test_a_run_leaves_what_the_readme_says(run):
    path, stdout = run
    values = metrics_of(path)
    names, metrics, steps = ("Pong", "Qbert", "mean"), ("return", "score"), (50, 100, 120)
    assert values.keys() == set(itertools.product(names, metrics, steps))
    for step in (50, 100, 120):
        assert values["Pong", "score", step] == pytest.approx((values["Pong", "return", step] + 20.7) / 35.3, abs=1e-4)
    facts = json.loads((path / "args.json").read_text())
    assert facts["tasks"] == ["Pong", "Qbert"] and facts["precision"] is None and "ale-py" in facts["versions"]
    names = {file.name for file in path.iterdir()}
    assert names == {"args.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "replay", "tensorboard",
                     "videos"}
    assert {file.name for file in (path / "videos").iterdir()} >= {"Pong-120.gif", "Qbert-120.gif"}
    rows = {line.split()[0]: line.split() for line in stdout.splitlines() if line.split()}
    assert float(rows["mean"][-1]) == pytest.approx(values["mean", "score", 120], abs=6e-4)


def test_evaluate_prints_what_the_run_found_last(run):
    path, _ = run
    before = (path / "metrics.csv").read_bytes()
    process = brc(f"--evaluate {path}", path.parent)
    assert process.returncode == 0, process.stderr
    rows = {line.split()[0]: line.split() for line in process.stdout.splitlines() if line.split()}
    for task in ("Pong", "Qbert", "mean"):
        assert float(rows[task][1]) == pytest.approx(metrics_of(path)[task, "return", 120], abs=0.051)
    assert (path / "metrics.csv").read_bytes() == before


def test_a_killed_run_resumes_and_misses_nothing(run, tmp_path):
    process = subprocess.Popen([sys.executable, str(SCRIPT), *f"{SMALL} --run-dir killed".split()], cwd=tmp_path,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    resumed = brc("--resume killed", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    values, uninterrupted = metrics_of(tmp_path / "killed"), metrics_of(run[0])
    assert values.keys() == uninterrupted.keys()
    assert all(values[key] == uninterrupted[key] for key in values if key[2] == 50)  # that agent came back as it was


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks Pong reach", "reach is not an Atari game"),
        ("--tasks Pong --encoder-scale 0", "--encoder-scale is 0.0"),
        ("--tasks Pong --device quantum", "Device 'quantum' is not on this machine"),
        ("--resume nowhere", "nowhere holds no run"),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_create_nothing(arguments, message, tmp_path):
    process = brc(arguments, tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("brc_drq.py: ") and re.search(message, line)
    assert not any(tmp_path.iterdir())


def test_a_run_directory_that_holds_another_run_is_left_alone(args):
    other = Path(args.run_dir) / "metrics.csv"
    other.parent.mkdir()
    other.write_text("somebody's results\n")
    with pytest.raises(brc_drq.UsageError, match="already holds files.*--resume"):
        brc_drq.train(args)
    assert list(other.parent.iterdir()) == [other] and other.read_text() == "somebody's results\n"


def test_help_imports_neither_torch_nor_the_emulator(tmp_path):
    process = subprocess.run([sys.executable, "-X", "importtime", str(SCRIPT), "--help"], cwd=tmp_path,
                             capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and "--encoder-scale" in process.stdout
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "suites" in imported and not imported & {"torch", "ale_py", "cv2", "tensorboard"}
