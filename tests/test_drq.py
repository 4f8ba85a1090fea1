"""What brc_drq.py alone has, part by part, against naive models and numbers worked out by hand; then a short run.

What it shares with brc_sac.py (files, signals, resume, the command line, the projection, the normaliser) is tested over
both elsewhere.
"""

import dataclasses
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brc_drq
import harness
import suites
import test_sac
from brc_drq import Agent, Args, Batch, ReplayBuffer, ReturnNormalizer
from conftest import FakeGames


def make_args(**changes) -> Args:
    """An encoder of one and two channels, for milliseconds; two games, so that there is an embedding."""
    small = dict(tasks=("Pong", "Breakout"), encoder_scale=1 / 128, hidden_width=16, batch_size=8, learning_starts=30,
                 total_steps=80, updates_per_step=1, checkpoint_interval=20, eval_episodes=2, exp_name="test",
                 device="cpu", precision="fp32")
    return brc_drq.resolve(Args(**small | changes))


def make_batch() -> Batch:
    obs, next_obs = torch.rand(2, 8, 4, 84, 84)
    return Batch(obs, torch.randint(18, (8,)), torch.randn(8), torch.full((8,), 0.97), next_obs, torch.randint(2, (8,)))


# ------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("given_args", "resolved"), [
    (dict(), dict(batch_size=256, updates_per_step=2, learning_starts=1600, total_steps=100_000, n_step=3,
                  learning_rate=1e-4, checkpoint_interval=5000, epsilon=0.01, eval_epsilon=0.001, encoder_scale=1.0,
                  eval_episodes=10, final_eval_episodes=100, tasks=suites.SUITES["atari"].tasks, buffer_size=100_000,
                  embedding_norm="l1")),
    (dict(tasks=("Pong",)), dict(batch_size=64, updates_per_step=2, encoder_scale=1.0)),
    (dict(small=True), dict(encoder_scale=0.125, batch_size=32, updates_per_step=1, eval_episodes=3,
                            final_eval_episodes=3)),
    (dict(small=True, encoder_scale=0.5, batch_size=8, eval_episodes=2),
     dict(encoder_scale=0.5, batch_size=8, updates_per_step=1, eval_episodes=2, final_eval_episodes=2))])
def test_defaults(given_args, resolved):
    args = brc_drq.resolve(Args(**given_args))
    assert {name: getattr(args, name) for name in resolved} == resolved


@pytest.mark.parametrize(("given_args", "message"), [
    (dict(suite="mw"), "assembly is not an Atari game.*brc_sac.py"),
    (dict(learning_starts=2), "--learning-starts is 2: give a number of at least 3"),
    (dict(encoder_scale=float("nan")), "--encoder-scale is nan"),
    (dict(shift_pad=84), "--shift-pad is 84.*at most 83"),
    (dict(total_steps=1600), "--total-steps 1600 and --learning-starts 1600 nothing would be learned")])
def test_bad_arguments_are_refused(given_args, message):
    with pytest.raises(harness.UsageError, match=message):
        brc_drq.resolve(Args(**given_args))


# -------------------------------------------------------------------------------------------------------- networks


def test_the_encoder_halves_the_image_three_times_and_a_block_adds_to_its_input():
    encoder, shapes = brc_drq.Encoder((3, 5, 6)), []
    for stage in encoder.stages:
        stage.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    assert encoder(torch.rand(2, 4, 84, 84)).shape == (2, 6 * 11 * 11)
    assert shapes == [(2, 3, 42, 42), (2, 5, 21, 21), (2, 6, 11, 11)]
    block, x = brc_drq.ImpalaBlock(2), -torch.rand(1, 2, 5, 5)  # relu comes first and leaves nothing; biases are 0
    assert torch.equal(block(x), x) and not torch.equal(block(-x), -x)


# Convolutions 9 in out + out, layer norm 2 per feature, dense layers in out + out, embedding 32 a game:
# at scale 1: 4,736 + 590,336 and 295,168 + 2,360,320 and 590,080 + 2,360,320; 61,952; 15,876,608 with the embedding
# (15,860,224 without), 262,656, 932,634; 832.
@pytest.mark.parametrize(("games", "scale", "count"), [(26, 1, 23_335_642), (0, 1, 23_318_426), (2, 1 / 8, 3_300_202)])
def test_parameter_counts(games, scale, count):
    with torch.device("meta"):
        critic = brc_drq.Critic(make_args(encoder_scale=scale, hidden_width=512), games)
    assert test_sac.count(critic) == count


def test_head_sees_normalised_features_and_the_embedding_and_the_encoder_no_task():
    critic, seen = brc_drq.Critic(make_args(), 2), []
    critic.dense1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    obs, embedding = torch.rand(1, 4, 84, 84).expand(2, -1, -1, -1), critic.embed(torch.tensor([0, 1]))
    logits = critic(obs, embedding)
    assert logits.shape == (2, 18, 101) and not torch.equal(*logits)
    features = seen[0][:, :-32]
    assert torch.equal(*features) and torch.equal(seen[0][:, -32:], embedding)
    np.testing.assert_allclose([features.mean().item(), features.std(correction=0).item()], [0, 1], atol=1e-3)


def test_a_single_task_has_no_embedding():
    critic = Agent(make_args(tasks=("Pong",)), 1).critic
    assert critic.embedding is None and critic.dense1.in_features == 2 * 11 * 11
    assert critic(torch.rand(3, 4, 84, 84), critic.embed(torch.zeros(3, dtype=int))).shape == (3, 18, 101)


def test_bf16_is_for_convolutions_and_products_alone():
    exact = Agent(make_args(), 2).update(make_batch())["critic_loss"].item()
    torch.manual_seed(0)
    agent, seen = Agent(make_args(precision="bf16"), 2), {}
    for name in ("encoder", "norm", "logits"):
        part = getattr(agent.critic, name)
        part.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    loss = agent.update(make_batch())["critic_loss"].item()
    assert seen == {"encoder": torch.bfloat16, "norm": torch.float32, "logits": torch.float32}
    assert loss != exact and loss == pytest.approx(exact, rel=0.05)


# --------------------------------------------------------------------------------------------------- replay buffer


class Stream(test_sac.Stream):
    """Frames are numbered, in 2x2 pixels of one byte. A life is lost in every step whose number is divisible by `life`.

    `rows` has of every step obs, action, reward, `dead` (terminated or a life lost) and the true next obs.
    """

    life = 5

    def frames(self) -> np.ndarray:
        return np.array([next(self.numbers) for _ in self.plans], np.uint32).view(np.uint8).reshape(-1, 1, 2, 2)

    def reset_obs(self) -> np.ndarray:
        return np.pad(self.frames(), ((0, 0), (3, 0), (0, 0), (0, 0)))  # as the environments' frame stacks

    def feed(self, num_steps: int, *buffers: ReplayBuffer) -> None:
        for _ in range(num_steps):
            time, tasks, obs, (terminated, truncated) = len(self.rows[0]) + 1, len(self.plans), self.obs, self.advance()
            rng, over = np.random.default_rng(time), terminated | truncated
            action, reward = rng.integers(18, size=tasks), rng.normal(size=tasks).astype(np.float32)
            life_lost = ~over & ((time + np.arange(tasks)) % self.life == 0)
            self.obs = next_obs = np.concatenate([obs[:, 1:], self.frames()], 1)
            for buffer in buffers:
                buffer.add(obs, action, reward, terminated, truncated, life_lost, next_obs)
            for rows, *step in zip(self.rows, obs, action, reward, terminated | life_lost, next_obs):
                rows.append(step)
            self.begin(over)

    def kept(self, buffer: ReplayBuffer) -> dict:
        """The transitions that a buffer of these sizes holds, by their newest frame's number."""
        oldest = self.oldest_kept(buffer.capacity, len(buffer.last_frame))
        transitions = (self.transition(task, t, buffer) for task in range(len(self.rows))
                       for t in range(oldest, len(self.rows[0])))
        return {numbers_of(transition[1]).item(): transition for transition in transitions if transition}

    def transition(self, task: int, t: int, buffer: ReplayBuffer) -> tuple | None:
        """Step by step, as a textbook has it; none where its n steps are not there yet."""
        (obs, action, *_), *_ = steps = self.rows[task][t:t + buffer.n_step]
        overs, reward, discount = [(i, task) in self.ends for i in range(t, t + len(steps))], 0.0, 1.0
        if len(steps) < buffer.n_step and not any(overs):
            return None
        for (_, _, step_reward, dead, next_obs), over in zip(steps, overs):
            reward += discount * step_reward
            discount *= 0.0 if dead else buffer.gamma
            if dead or over:
                break
        return task, obs, action, reward, discount, next_obs


def make_buffer(stream: Stream, capacity: int, n_step: int = 3) -> ReplayBuffer:
    with mock.patch.object(brc_drq, "SIZE", 2):
        return ReplayBuffer(len(stream.plans), capacity, 0.9, n_step)


def numbers_of(obs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(obs[..., 3, :, :]).reshape(-1, 4).view(np.uint32)[:, 0]


def assert_samples(buffer: ReplayBuffer, stream: Stream) -> None:
    """The buffer samples what it shall and nothing else (it would miss one of 80 with probability e-50)."""
    torch.manual_seed(0)
    batch, expected = buffer.sample(4000), stream.kept(buffer)
    found, first = np.unique(numbers_of(batch.obs.numpy()), return_index=True)
    assert set(found.tolist()) == set(expected)
    for number, i in zip(found.tolist(), first, strict=True):
        task, obs, action, reward, discount, next_obs = expected[number]
        assert (batch.task_id[i], batch.action[i]) == (task, action)
        np.testing.assert_array_equal(batch.obs[i], obs)
        np.testing.assert_allclose([batch.reward[i], batch.discount[i]], [reward, discount], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.next_obs[i], next_obs)


@settings(deadline=None, max_examples=50)
@given(plans=test_sac.plans_of(1, 12), n_step=st.integers(1, 5), more=st.integers(0, 20), life=st.integers(1, 9),
       bouts=st.lists(st.tuples(st.integers(1, 60), st.none() | st.integers(5, 25)), min_size=1, max_size=4))
@mock.patch("os.fsync", lambda file: None)
def test_buffer_samples_exactly_what_a_list_of_episodes_holds(plans, n_step, more, life, bouts):
    stream = Stream(plans)
    stream.life, buffer = life, make_buffer(stream, n_step + more, n_step)
    stream.feed(n_step - 1, buffer)
    test_sac.assert_survives_checkpoints(stream, buffer, bouts, assert_samples, partial(make_buffer, n_step=n_step))


def test_a_ring_wraps_at_every_phase_of_an_episode_and_is_sampled_uniformly():
    stream = Stream([[(70, 1)], [(64, 2), (3, 1), (100, 1)]])
    buffer = make_buffer(stream, 100)
    for _ in range(25):
        stream.feed(13, buffer)
        assert_samples(buffer, stream)
    kept = 2 * (100 - 2)  # all of its capacity, but what waits for n steps
    drawn, counts = np.unique(numbers_of(buffer.sample(60_000).obs.numpy()), return_counts=True)
    chi_square = ((counts - 60_000 / kept) ** 2 / (60_000 / kept)).sum()
    assert len(drawn) == kept and chi_square < kept - 1 + 4 * (2 * (kept - 1)) ** 0.5


def test_26_games_of_100k_transitions_fit_in_19_gb():
    buffer = ReplayBuffer(26, 100_000, 0.99, 3, device="meta")
    assert 26 * 100_000 * 84 * 84 < buffer.nbytes < 19e9


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


def test_the_critic_chooses_the_next_action_and_the_target_evaluates_it():
    # The critic prefers action 1; of it the target expects 2, atom 60, though it expects 9 of action 0.
    networks, (critic, target) = [brc_drq.Critic(make_args(), 2) for _ in range(2)], torch.zeros(2, 18, 101)
    critic[[0, 1], [50, 70]], target[[0, 1], [95, 60]] = 50.0, 50.0  # their logits, for every observation
    critic += torch.randn(18, 101)
    for network, logits in zip(networks, (critic, target)):
        network.logits.weight.data.zero_()
        network.logits.bias.data.copy_(logits.flatten())
    batch = Batch(*(field[:2] for field in make_batch()))._replace(
        action=torch.tensor([0, 1]), reward=torch.tensor([1.0, -20.0]), discount=torch.tensor([0.5, 0.0]))
    loss, metrics = brc_drq.critic_loss(*networks, batch)
    targets = [1 + 0.5 * 2, -10]  # the second has ended, and is clipped
    assert metrics["target_q"].item() == pytest.approx(np.mean(targets), abs=1e-4)
    log_probs = critic.log_softmax(-1)  # of the actions that were taken, at the targets' atoms
    assert loss.item() == pytest.approx(-(log_probs[0, 60] + log_probs[1, 0]).item() / 2, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- agent


def test_updates_lower_the_loss_of_a_fixed_batch_and_the_target_follows_by_tau():
    # With discount 0 what is to be learned of every observation is one reward.
    agent, batch = Agent(make_args(learning_rate=5e-3, tau=0.25), 2), make_batch()._replace(discount=torch.zeros(8))
    old, old_target = ([p.detach().clone() for p in part.parameters()] for part in (agent.critic, agent.target))
    losses = [agent.update(batch)["critic_loss"].item()]
    for before, was, target, critic in zip(old, old_target, agent.target.parameters(), agent.critic.parameters()):
        assert not torch.equal(before, critic)
        torch.testing.assert_close(target, 0.75 * was + 0.25 * critic)
    losses += [agent.update(batch)["critic_loss"].item() for _ in range(49)]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


def test_actions_are_greedy_but_for_a_share_of_epsilon():
    agent = Agent(make_args(), 2)
    obs, task_id = torch.zeros(3000, 1), torch.zeros(3000, dtype=int)
    with mock.patch.object(agent, "q_values", lambda obs, task_id: torch.eye(18)[5].expand(len(obs), 18)):
        actions = {epsilon: agent.act(obs, task_id, epsilon) for epsilon in (0, 0.36, 1)}
    assert (actions[0] == 5).all()
    assert (actions[0.36] != 5).float().mean().item() == pytest.approx(0.36 * 17 / 18, abs=0.03)
    assert (torch.bincount(actions[1], minlength=18) > 3000 / 18 * 0.7).all()


def test_epsilon_falls_over_5000_steps_once_learning_starts():
    epsilons = [brc_drq.exploration(Args(), env_step) for env_step in (0, 1600, 2600, 4100, 6600, 90_000)]
    assert epsilons == pytest.approx([1, 1, 0.802, 0.505, 0.01, 0.01])


# --------------------------------------------------------------------------------------- evaluation, training loop


@pytest.mark.parametrize(("episodes", "played", "returns"), [
    # Rewards are the row's number + 1 in each step; first copies' episodes are of 3 steps, second ones' of 7.
    (2, [[0, 1, 2, 3]] * 3 + [[1, 3]] * 4, [(3 * 1 + 7 * 2) / 2, (3 * 3 + 7 * 4) / 2]),
    (3, [[0, 1, 2, 3]] * 6 + [[1, 3]], [(2 * 3 * 1 + 7 * 2) / 3, (2 * 3 * 3 + 7 * 4) / 3]),
    (1, [[0, 2]] * 3, [3 * 1, 3 * 3])])
def test_evaluation_plays_exactly_as_many_episodes(episodes, played, returns):
    class Lengths(FakeGames):
        def step_wait(self):
            seen.append(self.rows.tolist())
            step, over = super().step_wait(), self.t[self.rows] == np.where(self.rows % 2, 7, 3)
            self.t[self.rows[over]] = 0
            return step._replace(truncated=over, reward=self.rows + 1.0)

    agent, seen = Agent(make_args(), 2), []
    results, frames = brc_drq.evaluate(agent, Lengths(("Pong", "Pong", "Breakout", "Breakout")), episodes, 1, True)
    assert seen == played
    np.testing.assert_allclose([result["return"] for result in results], returns)
    random, human = -20.7, 14.6
    assert results[0]["score"] == pytest.approx((returns[0] - random) / (human - random))
    assert [len(episode) for episode in frames] == [1, 1]  # every fourth step of the first copy's first
    assert brc_drq.evaluate(agent, Lengths(("Pong", "Breakout")), 1, 1, stop=lambda: True) == ([], [])


@pytest.mark.parametrize("clip", [True, False])
def test_what_is_learned_from_are_clipped_rewards_and_lives(monkeypatch, tmp_path, clip):
    """The loop's own part: clipping, lives that end the normaliser's episode, and a bootstrap in raw units."""
    args = make_args(run_dir=str(tmp_path / "run"), eval_interval=20, log_interval=40, batch_size=4, clip_rewards=clip)
    seen, observe = [], ReturnNormalizer.observe
    monkeypatch.setattr(brc_drq, "Games", FakeGames)

    def spy(self, reward, terminated, truncated, last_value=None):
        seen.append((set(reward.tolist()), terminated.all(), truncated.all(), last_value))
        observe(self, reward, terminated, truncated, last_value)

    with mock.patch.object(ReturnNormalizer, "observe", spy):
        brc_drq.train(args)
    assert set().union(*(rewards for rewards, *_ in seen)) == {1.0 if clip else 3.0, -1.0}
    for fate, steps in ((1, range(7, 81, 10)), (2, range(10, 81, 10))):  # a life lost, a time limit
        assert [step for step, row in enumerate(seen, 1) if row[fate]] == list(steps)
    values = [seen[step - 1][3] for step in range(10, 81, 10)]
    assert values[:3] == [None] * 3 and (np.abs(values[3:]) > 0).all()  # nothing was learned before step 30
    stored = np.fromfile(tmp_path / "run/replay/rows.bin", np.float32).reshape(-1, 4)
    assert set(stored[:, 1]) == {1.0 if clip else 3.0, -1.0}


def test_a_short_run_of_real_games_whose_stacks_are_stored_as_they_were_shown(tmp_path, capsys, monkeypatch):
    def add_and_look(buffer, obs, action, reward, terminated, truncated, life_lost, next_obs):
        add(buffer, obs, action, reward, terminated, truncated, life_lost, next_obs)
        newest = torch.full((2,), (buffer.steps - 1) % len(buffer.rows))
        np.testing.assert_array_equal(buffer.stack(torch.arange(2), newest), obs)
        np.testing.assert_array_equal(buffer.next_obs(torch.arange(2), newest), next_obs)
        ends.append((truncated.any(), life_lost.any()))

    ends, add = [], ReplayBuffer.add
    monkeypatch.setattr(ReplayBuffer, "add", add_and_look)
    args = make_args(tasks=("Pong", "Breakout"), total_steps=90, eval_interval=90, final_eval_episodes=3,
                     max_frames=160, run_dir=str(tmp_path / "run"), capture_video=True)
    results = brc_drq.main(args)
    assert [set(result) for result in results] == [{"return", "score"}] * 2
    assert np.any(ends, axis=0).all()
    assert {file.name for file in (tmp_path / "run" / "videos").iterdir()} == {"Pong-90.gif", "Breakout-90.gif"}
    evaluated = brc_drq.main(dataclasses.replace(args, evaluate=args.run_dir, eval_episodes=3))
    assert evaluated == results and "test at step 90, 3 episodes per task" in capsys.readouterr().out
