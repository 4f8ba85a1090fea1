"""What brc_drq.py alone has, part by part, against naive models and numbers worked out by hand; then a short run.

What it shares with brc_sac.py (files, signals, damage, the command line, the projection) is tested over both elsewhere.
"""

import dataclasses
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brc_drq
import harness
import suites
from brc_drq import Agent, Args, Batch, ReplayBuffer, ReturnNormalizer
from suites.atari import Games, Step

CPU = torch.device("cpu")


def make_args(**changes) -> Args:
    """An encoder of one and two channels, for milliseconds; two games, so that there is an embedding."""
    small = dict(tasks=("Pong", "Breakout"), encoder_scale=1 / 128, hidden_width=16, batch_size=8, learning_starts=30,
                 total_steps=80, updates_per_step=1, checkpoint_interval=20, eval_episodes=2, exp_name="test",
                 device="cpu", precision="fp32")
    return brc_drq.resolve(Args(**small | changes))


def make_batch(size: int = 8, num_tasks: int = 2) -> Batch:
    obs, next_obs = torch.rand(2, size, 4, 84, 84)
    return Batch(obs, torch.randint(18, (size,)), torch.randn(size), torch.full((size,), 0.97), next_obs,
                 torch.randint(num_tasks, (size,)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given_args", "resolved"),
    [
        (dict(), dict(batch_size=256, updates_per_step=2, learning_starts=1600, total_steps=100_000, n_step=3,
                      learning_rate=1e-4, checkpoint_interval=5000, epsilon=0.01, eval_epsilon=0.001, encoder_scale=1.0,
                      eval_episodes=10, final_eval_episodes=100, tasks=suites.SUITES["atari"].tasks,
                      buffer_size=100_000, embedding_norm="l1")),
        (dict(tasks=("Pong",)), dict(batch_size=64, updates_per_step=2, encoder_scale=1.0)),
        (dict(encoder_scale=0.125), dict(batch_size=256, updates_per_step=2, eval_episodes=10)),
        (dict(small=True), dict(encoder_scale=0.125, batch_size=32, updates_per_step=1, eval_episodes=3,
                                final_eval_episodes=3)),
        (dict(small=True, encoder_scale=0.5, batch_size=8, eval_episodes=2),
         dict(encoder_scale=0.5, batch_size=8, updates_per_step=1, eval_episodes=2, final_eval_episodes=2)),
    ],
)
def test_defaults(given_args, resolved):
    args = brc_drq.resolve(Args(**given_args))
    assert {name: getattr(args, name) for name in resolved} == resolved


@pytest.mark.parametrize(
    ("given_args", "message"),
    [
        (dict(suite="mw"), "assembly is not an Atari game.*brc_sac.py"),
        (dict(learning_starts=2), "--learning-starts is 2: give a number of at least 3"),
        (dict(encoder_scale=float("nan")), "--encoder-scale is nan"),
        (dict(shift_pad=84), "--shift-pad is 84.*at most 83"),
        (dict(total_steps=1600), "--total-steps 1600 and --learning-starts 1600 nothing would be learned"),
    ],
)
def test_bad_arguments_are_refused(given_args, message):
    with pytest.raises(harness.UsageError, match=message):
        brc_drq.resolve(Args(**given_args))


# -------------------------------------------------------------------------------------------------------- networks


def test_the_encoder_halves_the_image_three_times():
    encoder, shapes = brc_drq.Encoder((3, 5, 6)), []
    for stage in encoder.stages:
        stage.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    assert encoder(torch.rand(2, 4, 84, 84)).shape == (2, 6 * 11 * 11)
    assert shapes == [(2, 3, 42, 42), (2, 5, 21, 21), (2, 6, 11, 11)]


@pytest.mark.parametrize(
    ("num_embeddings", "scale", "count"),
    # Convolutions 9 in out + out, layer norm 2 per feature, dense layers in out + out, embedding 32 a game:
    # at scale 1: 4,736 + 590,336 and 295,168 + 2,360,320 and 590,080 + 2,360,320; 61,952; 15,876,608 with the embedding
    # (15,860,224 without), 262,656, 932,634; 832.
    [(26, 1.0, 23_335_642), (0, 1.0, 23_318_426), (2, 0.125, 3_300_202)],
)
def test_parameter_counts(num_embeddings, scale, count):
    with torch.device("meta"):
        critic = brc_drq.Critic(make_args(encoder_scale=scale, hidden_width=512), num_embeddings)
    assert sum(parameter.numel() for parameter in critic.parameters()) == count


def test_a_block_adds_to_its_input_and_relu_comes_first():
    block = brc_drq.ImpalaBlock(2)
    x = -torch.rand(1, 2, 5, 5)  # relu leaves nothing of it, and biases are 0
    assert torch.equal(block(x), x) and not torch.equal(block(-x), -x)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_head_sees_normalised_features_and_the_embedding_and_the_encoder_no_task(norm, order):
    critic, seen = brc_drq.Critic(make_args(embedding_norm=norm), 2), []
    critic.dense1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    obs = torch.rand(1, 4, 84, 84).expand(2, -1, -1, -1)
    logits = critic(obs, critic.embed(torch.tensor([0, 1])))
    assert logits.shape == (2, 18, 101) and not torch.equal(*logits)
    features, embedding = seen[0][:, :-32], seen[0][:, -32:]
    assert torch.equal(*features)
    np.testing.assert_allclose([features.mean().item(), features.std(correction=0).item()], [0, 1], atol=1e-3)
    np.testing.assert_allclose(embedding.detach().norm(order, -1), 1, rtol=1e-5)


def test_a_single_task_has_no_embedding():
    critic = Agent(make_args(tasks=("Pong",)), 1).critic
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


# ----------------------------------------------------------------------------------------------- return normaliser


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


def test_rewards_fit_the_support_and_are_0_before_the_first_return():
    normalizer = ReturnNormalizer(make_args(), 3)
    normalizer.return_scale[:2] = torch.tensor([4.0, 0.0])  # nothing but zeros so far in the second: no scale either
    task_id = torch.tensor([0, 1, 1, 2, 0])
    normalized = normalizer.normalize(torch.tensor([2.0, 0.0, 1.0, 5.0, -4.0]), task_id)
    assert normalized.tolist() == [5, 0, 0, 0, -10]
    assert normalizer.denormalize(normalized, task_id).tolist() == [2, 0, 0, 0, -4]


# --------------------------------------------------------------------------------------------------- replay buffer


class Stream:
    """Unending episodes of every task, whose frames are numbered (in 2x2 pixels of one byte), and a naive replay.

    plans: per task, the (length, terminates) of its episodes, repeated for ever. A life is lost in every step whose
    number is divisible by `life`. Per task, `episodes` is a list of dicts with lists of frames, and of the action,
    reward and `dead` (terminated or a life lost) that followed each but the last frame; `ends` are the steps in which
    the episodes ended, in order.
    """

    def __init__(self, plans: list[list[tuple[int, bool]]], life: int = 5):
        self.life, self.numbers, self.steps, self.ends = life, itertools.count(1), 0, []
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
        self.ends.append(self.steps - 1)

    def cut(self, *buffers: ReplayBuffer) -> None:
        for buffer in buffers:
            buffer.end_episodes(np.flatnonzero(buffer.episode_steps))
        for task, episodes in enumerate(self.episodes):
            if episodes[-1]["actions"]:
                self.next_episode(task)

    def kept(self, buffer: ReplayBuffer) -> dict:
        """The transitions that a buffer of these sizes holds: first frame's number -> the rest."""
        kept, places = {}, len(buffer.last_frame)
        full_since = self.ends[-places] if len(self.ends) >= places else -1
        oldest = max(self.steps - buffer.capacity, full_since + 1)
        for task, episodes in enumerate(self.episodes):
            rows = []
            for episode in episodes:
                steps = len(episode["actions"])
                complete = steps - (buffer.n_step - 1) * (episode is episodes[-1])  # those whose n steps are there
                rows += [self.transition(task, episode, t, buffer) if t < complete else None for t in range(steps)]
            kept |= dict(row for row in rows[max(0, oldest):] if row)
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


def numbers_of(batch: Batch) -> np.ndarray:
    return batch.obs[:, -1].reshape(-1, 4).numpy().copy().view(np.uint32)[:, 0]


def assert_samples(buffer: ReplayBuffer, expected: dict) -> None:
    """The buffer samples the expected transitions and no others (it would miss one of 80 with probability e-50)."""
    torch.manual_seed(0)
    batch = buffer.sample(4000)
    found, first = np.unique(numbers_of(batch), return_index=True)
    assert set(found.tolist()) == set(expected)
    for number, i in zip(found.tolist(), first, strict=True):
        task, obs, action, reward, discount, next_obs = expected[number]
        assert (batch.task_id[i], batch.action[i]) == (task, action)
        np.testing.assert_array_equal(batch.obs[i], obs)
        np.testing.assert_allclose([batch.reward[i], batch.discount[i]], [reward, discount], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.next_obs[i], next_obs)


def plans_of(min_length: int, max_length: int):
    episode = st.tuples(st.integers(min_length, max_length), st.booleans())
    return st.lists(st.lists(episode, min_size=1, max_size=5), min_size=1, max_size=3)


@settings(deadline=None, max_examples=50)
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


@settings(deadline=None, max_examples=12)
@given(plans=plans_of(1, 12), capacity=st.integers(3, 25), new_capacity=st.integers(3, 25),
       bouts=st.lists(st.integers(3, 40), min_size=1, max_size=4))
@mock.patch("os.fsync", lambda file: None)
def test_buffer_survives_its_files(plans, capacity, new_capacity, bouts):
    stream, folder = Stream(plans), Path(tempfile.mkdtemp())
    buffer, other, saved = make_buffer(stream, capacity), make_buffer(stream, new_capacity), {}
    for num_steps in bouts:
        stream.feed(num_steps, buffer)
        saved = {"replay": harness.append_replay(folder, buffer, saved), "buffer": buffer.state_dict()}
    same = make_buffer(stream, capacity)
    for loaded in (same, other):
        loaded.load_state_dict(saved["buffer"])
        harness.load_replay(folder, loaded, saved)
    stream.cut(buffer, same, other)  # a resumed run cuts: its environments start anew
    assert_samples(same, stream.kept(buffer))
    both = stream.kept(buffer).items()
    assert_samples(other, {number: row for number, row in both if number in stream.kept(other)})
    stream.feed(7, buffer, same)
    assert_samples(same, stream.kept(buffer))
    # The cut changed the step that was the newest then: the next checkpoint has to hold it.
    saved = {"replay": harness.append_replay(folder, same, saved), "buffer": same.state_dict()}
    again = make_buffer(stream, capacity)
    again.load_state_dict(saved["buffer"])
    harness.load_replay(folder, again, saved)
    shutil.rmtree(folder)
    stream.cut(buffer, again)
    assert_samples(again, stream.kept(buffer))


def test_sampling_is_uniform_over_games_and_their_transitions():
    stream = Stream([[(3, True), (7, False)], [(20, False)], [(5, True)]])
    buffer = make_buffer(stream, 20)
    stream.feed(53, buffer)
    drawn, counts = np.unique(numbers_of(buffer.sample(60_000)), return_counts=True)
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
    np.testing.assert_array_equal(buffer.current_obs(), seen[-1][1].next_obs)
    for t, (obs, step) in enumerate(seen):
        task_id, row = torch.arange(2), torch.tensor([t, t])
        np.testing.assert_array_equal(buffer.stack(task_id, row), obs)
        reward, discount, last = buffer.n_step_return(task_id, row)
        np.testing.assert_array_equal(buffer.next_obs(task_id, last), step.next_obs)
        np.testing.assert_array_equal(reward, step.reward)
        np.testing.assert_array_equal(discount == 0, step.terminated | step.life_lost)


def test_the_replay_goes_where_there_is_room():
    args, gpu, made = make_args(total_steps=100_000, buffer_size=100_000), torch.device("cuda:0"), []
    with mock.patch.object(brc_drq, "ReplayBuffer", lambda *inputs: made.append(inputs[-1]) or mock.Mock(nbytes=1.5e9)):
        for free in (20e9, 1e9):
            with mock.patch("torch.cuda.mem_get_info", lambda device, free=free: (free, 0)):
                brc_drq.make_buffer(args, gpu)
                brc_drq.make_buffer(dataclasses.replace(args, replay_device="cpu"), gpu)
    assert [str(device) for device in made if device != "meta"] == ["cuda:0", "cpu", "cpu", "cpu"]


# ---------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("shift", [(0, 0), (4, -4), (-3, 2), (1, 0)])
def test_random_shift_is_a_crop_of_the_replicated_image(shift):
    obs = torch.randint(256, (1, 4, 84, 84), dtype=torch.uint8)
    padded = np.pad(obs[0].numpy(), ((0, 0), (4, 4), (4, 4)), "edge")
    expected = padded[:, 4 + shift[0]:88 + shift[0], 4 + shift[1]:88 + shift[1]]
    np.testing.assert_array_equal(brc_drq.random_shift(obs, torch.tensor([shift]))[0], expected)


def test_augmentation_differs_per_sample_and_keeps_statistics():
    image = torch.full((4, 84, 84), 100, dtype=torch.uint8)
    image[:, 40, 50] = 255  # its brightest pixel tells the shift, and its background the intensity
    obs = brc_drq.augment(image.expand(600, -1, -1, -1), make_args())
    where = obs.flatten(2).argmax(-1)
    assert (where == where[:, :1]).all(), "the frames of a stack move together"
    rows, columns = 40 - where[:, 0] // 84, 50 - where[:, 0] % 84  # what is shown lies so far from the crop's corner
    for moved in (rows, columns):
        assert sorted(set(moved.tolist())) == list(range(-4, 4))
        assert (torch.bincount(moved + 4) > 600 / 8 * 0.6).all()
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.15
    intensity = obs[:, 0, 0, 0] / (100 / 255)
    assert intensity.min() >= 0.9 - 1e-6 and intensity.max() <= 1.1 + 1e-6 and len(intensity.unique()) > 450
    # 0.05 times the standard deviation of a standard normal clipped at 2, which is 0.9593
    np.testing.assert_allclose([intensity.mean(), intensity.std()], [1, 0.048], atol=0.007)
    assert torch.equal(brc_drq.augment(image[None], make_args(shift_pad=0, intensity=0.0)), image[None] / 255)


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


# ----------------------------------------------------------------------------------------------------------- agent


def test_one_update_moves_the_critic_and_the_target_follows_by_tau():
    agent = Agent(make_args(learning_rate=0.01, tau=0.25), 2)
    old, old_target = ([p.detach().clone() for p in part.parameters()] for part in (agent.critic, agent.target))
    agent.update(make_batch())
    for before, was, target, critic in zip(old, old_target, agent.target.parameters(), agent.critic.parameters()):
        assert not torch.equal(before, critic)
        torch.testing.assert_close(target, 0.75 * was + 0.25 * critic)


def test_the_loss_of_a_fixed_batch_goes_down():
    # With discount 0 what is to be learned of every observation is one reward.
    agent, batch = Agent(make_args(learning_rate=5e-3), 2), make_batch()._replace(discount=torch.zeros(8))
    losses = [agent.update(batch)["critic_loss"].item() for _ in range(50)]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


def test_actions_are_greedy_but_for_a_share_of_epsilon():
    agent = Agent(make_args(), 2)
    obs, task_id = torch.zeros(3000, 1), torch.zeros(3000, dtype=int)
    with mock.patch.object(agent, "q_values", lambda obs, task_id: torch.eye(18)[5].expand(len(obs), 18)):
        actions = {epsilon: agent.act(obs, task_id, epsilon) for epsilon in (0, 0.36, 1)}
    assert (actions[0] == 5).all()
    others = (actions[0.36] != 5).float().mean()
    np.testing.assert_allclose(others, 0.36 * 17 / 18, atol=0.03)
    assert (torch.bincount(actions[1], minlength=18) > 3000 / 18 * 0.7).all()


@pytest.mark.parametrize(("env_step", "epsilon"), [(0, 1.0), (1600, 1.0), (2600, 0.802), (4100, 0.505), (6600, 0.01),
                                                   (90_000, 0.01)])
def test_epsilon_falls_over_5000_steps_once_learning_starts(env_step, epsilon):
    assert brc_drq.exploration(Args(), env_step) == pytest.approx(epsilon)


# --------------------------------------------------------------------------------------- evaluation, training loop


class FakeGames:
    """In place of Games: episodes of 20 steps that end by truncation, a life lost in every seventh, no randomness."""

    hook = staticmethod(lambda games: None)  # what else a test wants to happen in a step

    def __init__(self, tasks, max_frames=0):
        self.tasks, self.num_envs, self.steps = tuple(tasks), len(tasks), 0  # steps: of all episodes

    def reset(self, seed: int) -> np.ndarray:
        self.t = np.zeros(self.num_envs, int)
        self.stacks = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        self.push(np.arange(self.num_envs), np.zeros(self.num_envs, int))
        return self.stacks.copy()

    def push(self, rows, action) -> None:
        self.stacks[rows, :-1] = self.stacks[rows, 1:]
        self.stacks[rows, -1] = 0
        self.stacks[rows, -1, 4 * self.t[rows], 4 * action] = 200

    def over(self, rows) -> np.ndarray:
        return self.t[rows] == 20

    def step_async(self, action, rows=None) -> None:
        self.rows, self.action = np.arange(self.num_envs) if rows is None else rows, action

    def step_wait(self) -> Step:
        rows, action = self.rows, self.action
        self.steps += 1
        self.hook(self)
        self.t[rows] += 1
        self.push(rows, action)
        next_obs, over = self.stacks[rows].copy(), self.over(rows)
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


@pytest.mark.parametrize(("episodes", "played", "returns", "filmed"), [
    # Rewards are the row's number + 1 in each step; first copies' episodes are of 3 steps, second ones' of 7.
    (2, [[0, 1, 2, 3]] * 3 + [[1, 3]] * 4, [(3 * 1 + 7 * 2) / 2, (3 * 3 + 7 * 4) / 2], 1),
    (3, [[0, 1, 2, 3]] * 6 + [[1, 3]], [(2 * 3 * 1 + 7 * 2) / 3, (2 * 3 * 3 + 7 * 4) / 3], 1),
    (1, [[0, 2]] * 3, [3 * 1, 3 * 3], 1),
])
def test_evaluation_plays_exactly_as_many_episodes(episodes, played, returns, filmed):
    class Lengths(FakeGames):
        def over(self, rows):
            return self.t[rows] == np.where(rows % 2, 7, 3)

        def step_wait(self):
            seen.append(self.rows.tolist())
            return super().step_wait()._replace(reward=self.rows + 1.0)

    agent, seen = Agent(make_args(), 2), []
    results, frames = brc_drq.evaluate(agent, Lengths(("Pong", "Pong", "Breakout", "Breakout")), episodes, 1, True)
    assert seen == played
    np.testing.assert_allclose([result["return"] for result in results], returns)
    random, human = -20.7, 14.6
    assert results[0]["score"] == pytest.approx((returns[0] - random) / (human - random))
    assert [len(episode) for episode in frames] == [filmed, filmed]  # every fourth step of the first copy's first
    assert brc_drq.evaluate(agent, Lengths(("Pong", "Breakout")), 1, 1, stop=lambda: True) == ([], [])


@pytest.fixture
def args(monkeypatch, tmp_path):
    """Arguments of a run of 80 steps on two fake games, with a checkpoint and an evaluation every 20."""
    monkeypatch.setattr(brc_drq, "Games", FakeGames)
    monkeypatch.setattr(FakeGames, "hook", staticmethod(FakeGames.hook))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                                                                signal.SIGUSR1)}
    yield make_args(run_dir=str(tmp_path / "run"), eval_interval=20, log_interval=40, batch_size=4)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def parts_of(args: Args) -> tuple[dict, ReplayBuffer]:
    """What the last checkpoint of a run holds."""
    buffer = brc_drq.make_buffer(args, CPU)
    return harness.read_checkpoint(Path(args.run_dir), buffer), buffer


def flat(state, prefix="") -> dict:
    """A nested state as {path: leaf}."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


@pytest.mark.parametrize(("buffer_size", "stop_at"), [(1000, 60), (30, 40)])
def test_a_resumed_run_equals_one_that_never_stopped(args, buffer_size, stop_at, tmp_path):
    args = dataclasses.replace(args, buffer_size=buffer_size)
    brc_drq.train(args)
    stopped = dataclasses.replace(args, run_dir=str(tmp_path / "stopped"))

    def hook(games):
        if games.num_envs == 2 and games.steps == stop_at:  # at the end of an episode
            os.kill(os.getpid(), signal.SIGTERM)

    FakeGames.hook = staticmethod(hook)
    with pytest.raises(SystemExit) as end:
        brc_drq.train(stopped)
    assert end.value.code == 128 + signal.SIGTERM and parts_of(stopped)[0]["env_step"] == stop_at
    del end  # its traceback holds the run, and so the directory's lock
    FakeGames.hook = staticmethod(lambda games: None)
    brc_drq.train(dataclasses.replace(stopped, resume=stopped.run_dir))
    (first, buffer), (second, other) = parts_of(args), parts_of(stopped)
    ours, theirs = (flat({name: saved[name] for name in ("env_step", "agent", "normalizer", "random")})
                    for saved in (first, second))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert torch.equal(leaf, theirs[path]) if isinstance(leaf, torch.Tensor) else leaf == theirs[path], path
    batches = []
    for replay in (buffer, other):
        replay.end_episodes(np.flatnonzero(replay.episode_steps))
        torch.manual_seed(0)
        batches.append(replay.sample(200))
    assert all(torch.equal(x, y) for x, y in zip(*batches))
    tables = [(Path(run.run_dir) / "metrics.csv").read_text() for run in (args, stopped)]
    assert tables[0] == tables[1] and tables[0].count("\n") == 1 + 4 * 3 * 2


def test_what_is_learned_from_are_clipped_rewards_and_lives(args):
    """The loop's own part: clipping, lives that end the normaliser's episode, and a bootstrap in raw units."""
    seen, observe = [], ReturnNormalizer.observe

    def spy(self, reward, terminated, truncated, last_value=None):
        seen.append((set(reward.tolist()), terminated.all(), truncated.all(), last_value))
        observe(self, reward, terminated, truncated, last_value)

    with mock.patch.object(ReturnNormalizer, "observe", spy):
        brc_drq.train(args)
    assert set().union(*(rewards for rewards, *_ in seen)) == {1.0, -1.0}
    assert [step for step, (_, lost, _, _) in enumerate(seen[:20], 1) if lost] == [7, 14]
    assert [step for step, (_, _, ended, _) in enumerate(seen, 1) if ended] == [20, 40, 60, 80]
    assert seen[19][3] is None and (np.abs(seen[59][3]) > 0).all()  # nothing was learned before step 30
    raw = dataclasses.replace(args, run_dir=args.run_dir + "2", clip_rewards=False, total_steps=40)
    brc_drq.train(raw)
    assert parts_of(raw)[1].sample(200).reward.abs().max() > 2


def test_a_transfer_starts_where_it_says(args):
    def prepare(run, agent, normalizer, buffer):
        seen.append((agent.sizes, len(normalizer.return_scale), run.state))
        return buffer

    seen, epsilons, act = [], [], Agent.act
    start = brc_drq.Start(prepare, num_embeddings=5, acts=True, first_step=10, facts={"method": "model"})
    with mock.patch.object(Agent, "act", lambda self, obs, task_id, epsilon, generator=None: (
            epsilons.append(epsilon), act(self, obs, task_id, epsilon, generator))[1]):
        brc_drq.train(args, start)
    assert seen == [((2, 5), 5, {})] and set(epsilons) == {args.epsilon, args.eval_epsilon}
    metrics = (Path(args.run_dir) / "metrics.csv").read_text()
    assert {int(line.split(",")[4]) for line in metrics.splitlines()[1:]} == {10, 20, 40, 60, 80}


def test_a_short_run_of_real_games(tmp_path, capsys):
    args = make_args(tasks=("Pong", "Qbert"), total_steps=60, eval_interval=60, final_eval_episodes=3, max_frames=80,
                     run_dir=str(tmp_path / "run"), capture_video=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                                                                signal.SIGUSR1)}
    results = brc_drq.main(args)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert [set(result) for result in results] == [{"return", "score"}] * 2
    assert {file.name for file in (tmp_path / "run" / "videos").iterdir()} == {"Pong-60.gif", "Qbert-60.gif"}
    evaluated = brc_drq.main(dataclasses.replace(args, evaluate=args.run_dir, eval_episodes=3))
    assert evaluated == results and "test at step 60, 3 episodes per task" in capsys.readouterr().out
