"""brc_sac.py part by part, and what brc_drq.py has of the same, against naive models and numbers worked out by hand.

What an update computes is compared with the authors' numbers by test_parity.py, in the release's variant; here is the
paper's, and what parity does not see: projection of extremes, buffer, loop, evaluation, arguments.
"""

import dataclasses
import itertools
import random
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import brc_drq
import brc_sac
import harness
import suites
from brc_sac import Agent, Args, Batch, ReplayBuffer, ReturnNormalizer
from conftest import Pendulum
from suites.vector import Step

MODULES = brc_sac, brc_drq


def make_args(**changes) -> Args:
    """Small enough for milliseconds; two tasks, so that there is an embedding."""
    small = dict(tasks=("reach", "cartpole-swingup"), width=16, actor_width=16, batch_size=64, learning_starts=4,
                 total_steps=1000)
    args = brc_sac.resolve(Args(**small | changes))
    return dataclasses.replace(args, compile=changes.get("compile", False))  # which resolve leaves to long runs


def make_agent(**changes) -> Agent:
    """For 3 observations, 2 actions and 2 tasks."""
    return Agent(make_args(**changes), 3, 2, 2)


def make_batch() -> Batch:
    """64 random transitions with 3 observations and 2 actions, of 2 tasks."""
    obs, action, next_obs, reward = (torch.randn(shape) for shape in ((64, 3), (64, 2), (64, 3), (64,)))
    terminated, task_id = (torch.randint(2, (64,)) for _ in range(2))
    return Batch(obs, action.tanh(), reward, terminated.float(), next_obs, task_id)


# ----------------------------------------------------------------------------------------- categorical projection


def naive_projection(probs: np.ndarray, positions: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """One particle after the other, in float64."""
    projected = np.zeros_like(probs, dtype=np.float64)
    for row, column in np.ndindex(probs.shape):
        position = min(max(float(positions[row, column]), atoms[0]), atoms[-1])
        right = max(1, int(np.searchsorted(atoms, position)))
        share = (position - atoms[right - 1]) / (atoms[right] - atoms[right - 1])
        projected[row, right - 1] += probs[row, column] * (1 - share)
        projected[row, right] += probs[row, column] * share
    return projected


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), num_atoms=st.integers(2, 60), v_max=st.floats(0.5, 200),
       spread=st.sampled_from([0.1, 0.5, 1.0, 3.0, 1e6]))
def test_projection_equals_the_naive_loop(module, seed, num_atoms, v_max, spread):
    rng, project = np.random.default_rng(seed), module.project_categorical
    probs = torch.from_numpy(rng.dirichlet(np.full(num_atoms, 0.3), 4).astype(np.float32))
    atoms, exact_atoms = torch.linspace(-v_max, v_max, num_atoms), np.linspace(-v_max, v_max, num_atoms)
    positions = torch.from_numpy((spread * v_max * rng.normal(size=(4, num_atoms))).astype(np.float32))
    positions[0] = positions[0, 0]  # all of the mass in one place: a terminal state's target
    projected = project(probs, positions, atoms)
    assert (projected >= 0).all()
    np.testing.assert_allclose(projected.sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(projected, naive_projection(probs.numpy(), positions.numpy(), exact_atoms), atol=5e-5)
    np.testing.assert_allclose(project(probs, atoms.expand(4, -1), atoms), probs, atol=2e-5)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_clipped_mass_stays_on_the_outermost_atoms_and_nan_reaches_the_loss(module):
    project = module.project_categorical
    for num_atoms, v_max in itertools.product(range(2, 130), (0.5, 1.0, 7.3, 10.0, 33.0, 150.0)):
        atoms, probs = torch.linspace(-v_max, v_max, num_atoms), torch.full((4, num_atoms), 1 / num_atoms)
        positions = torch.tensor([-3 * v_max, 3 * v_max, -torch.inf, torch.inf])[:, None].expand(4, num_atoms)
        projected = project(probs, positions, atoms)
        assert (projected >= 0).all(), (num_atoms, v_max)
        np.testing.assert_allclose(projected[range(4), [0, -1, 0, -1]], 1, atol=2e-5)
    # A network that diverged has to be told from its loss: NaN as an index would be an error without a name.
    assert project(torch.full((1, 5), 0.2), torch.full((1, 5), torch.nan), torch.arange(-2.0, 3)).isnan().any()


# ------------------------------------------------------------------------------------------------- replay buffer


class Stream:
    """Unending episodes of every task, whose observations, actions and rewards are all different numbers.

    plans: per task, the (length, end) of its episodes, repeated for ever; end is terminated 1, truncated 2 or both 3.
    `rows` is the naive model of a buffer: per task, a list of all transitions; `ends`: (step, task) of episodes' ends.
    """

    def __init__(self, plans: list[list[tuple[int, int]]]):
        self.numbers, self.plans = itertools.count(1), [itertools.cycle(plan) for plan in plans]
        self.rows, self.ends, self.oldest = [[] for _ in plans], [], 0  # what a ring has lost stays lost
        self.running, self.age = [next(plan) for plan in self.plans], np.zeros(len(plans), int)
        self.obs = self.reset_obs()

    def draw(self, width: int) -> np.ndarray:
        return np.array([[next(self.numbers)] * width for _ in self.plans], np.float32)

    def reset_obs(self) -> np.ndarray:
        return self.draw(2)

    def advance(self) -> np.ndarray:
        """Whether the next step of each task is terminated [N], and whether it is truncated [N]."""
        self.age += 1
        lengths, ends = np.array(self.running).T
        return (self.age == lengths) & (np.array([[1], [2]]) & ends > 0)

    def feed(self, num_steps: int, *buffers: ReplayBuffer) -> None:
        for _ in range(num_steps):
            action, reward, next_obs, (terminated, truncated) = self.draw(1), self.draw(1), self.draw(2), self.advance()
            for buffer in buffers:
                buffer.add(self.obs, action, reward[:, 0], terminated, truncated, next_obs)
            columns = self.obs[:, 0], action[:, 0], reward[:, 0], terminated.astype(float), next_obs[:, 0]
            for task, step in enumerate(zip(*columns)):
                self.rows[task].append((task, *step))
            self.obs = next_obs
            self.begin(terminated | truncated)

    def begin(self, over: np.ndarray) -> None:
        """New episodes of these tasks [N]."""
        for task in np.flatnonzero(over):
            self.ends.append((len(self.rows[0]) - 1, task))
            self.running[task], self.age[task] = next(self.plans[task]), 0
        self.obs = np.where(over.reshape(-1, *[1] * (self.obs.ndim - 1)), self.reset_obs(), self.obs)

    def cut(self, *buffers: ReplayBuffer) -> None:
        """As a resume does: the running episodes end, and new ones begin."""
        for buffer in buffers:
            buffer.end_episodes(np.flatnonzero(getattr(buffer, "episode_steps", self.age)))  # brc_drq.py's knows itself
        self.begin(self.age > 0)

    def oldest_kept(self, capacity: int, room: int) -> int:
        """Of a buffer with this capacity and room for so many final observations."""
        steps = len(self.rows[0])
        self.oldest = max(self.oldest, steps - capacity, *(end + 1 for end, _ in self.ends[-room:-room + 1]))
        return self.oldest

    def last(self, count: int) -> set:
        return {row for rows in self.rows for row in rows[-count:]}


def sampleable(buffer: ReplayBuffer) -> set:
    """All transitions that the buffer can sample (it would miss one of 80 with probability e-50)."""
    with torch.random.fork_rng():
        batch = buffer.sample(4000)
    assert (batch.obs[:, 0] == batch.obs[:, 1]).all() and (batch.next_obs[:, 0] == batch.next_obs[:, 1]).all()
    columns = (batch.task_id, batch.obs[:, 0], batch.action[:, 0], batch.reward, batch.terminated, batch.next_obs[:, 0])
    return set(zip(*(column.tolist() for column in columns)))


def assert_holds(buffer: ReplayBuffer, stream: Stream) -> None:
    """The last transitions, every one of them: as many as the capacity, or as the final observations have room for."""
    oldest, steps = stream.oldest_kept(buffer.capacity, len(buffer.last_obs)), len(stream.rows[0])
    assert buffer.window.tolist() == [oldest, steps - oldest]
    assert sampleable(buffer) == stream.last(steps - oldest)


def assert_survives_checkpoints(stream, buffer, bouts: list[tuple], assert_holds, make_buffer) -> None:
    """With a checkpoint after each bout and, where a bout names another capacity, a resume with that."""
    saved = {}
    with tempfile.TemporaryDirectory() as folder:
        for num_steps, new_capacity in bouts:
            stream.feed(num_steps, buffer)
            assert_holds(buffer, stream)
            saved = {"replay": harness.append_replay(Path(folder), buffer, saved), "buffer": buffer.state_dict()}
            if new_capacity is not None:
                same, other = make_buffer(stream, buffer.capacity), make_buffer(stream, new_capacity)
                for loaded in (same, other):
                    loaded.load_state_dict(saved["buffer"])
                    harness.load_replay(Path(folder), loaded, saved)
                stream.cut(buffer, same, other)  # which changes the newest step: the next checkpoint has to hold it
                batches = []
                for ring in (buffer, same):
                    torch.manual_seed(1)
                    batches.append(ring.sample(300))
                assert all(map(torch.equal, *batches))
                assert_holds(other, stream)
                buffer = other


def plans_of(min_length: int, max_length: int):
    episode = st.tuples(st.integers(min_length, max_length), st.integers(1, 3))
    return st.lists(st.lists(episode, min_size=1, max_size=5), min_size=1, max_size=3)


def make_buffer(stream: Stream, capacity: int) -> ReplayBuffer:
    return ReplayBuffer(len(stream.plans), obs_dim=2, act_dim=1, capacity=capacity)


@settings(deadline=None, max_examples=50)
@given(plans=plans_of(1, 12) | plans_of(1, 1) | plans_of(16, 40), capacity=st.integers(1, 40),
       bouts=st.lists(st.tuples(st.integers(1, 60), st.none() | st.integers(1, 40)), min_size=1, max_size=5))
@mock.patch("os.fsync", lambda file: None)
def test_buffer_samples_exactly_what_a_list_of_episodes_holds(plans, capacity, bouts):
    stream = Stream(plans)
    assert_survives_checkpoints(stream, make_buffer(stream, capacity), bouts, assert_holds, make_buffer)


@pytest.mark.parametrize("capacity", [1, 15, 16, 17, 33, 64, 80, 500])
def test_buffer_keeps_its_whole_capacity_when_episodes_have_16_steps(capacity):
    stream = Stream([[(16, 1)], [(17, 2), (16, 3)], [(16, 2)]])
    buffer = make_buffer(stream, capacity)
    stream.feed(capacity - 1, buffer)
    for _ in range(100):
        stream.feed(1, buffer)
        assert buffer.window.tolist()[1] == capacity
    assert sampleable(buffer) <= stream.last(capacity)


def test_sampling_is_uniform_over_tasks_and_steps():
    stream = Stream([[(3, 1), (7, 2)], [(20, 2)], [(5, 3)]])
    buffer = make_buffer(stream, 20)
    stream.feed(53, buffer)
    drawn, counts = np.unique(buffer.sample(60_000).reward, return_counts=True)
    assert set(drawn) == {row[3] for row in stream.last(20)}
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 59 + 4 * (2 * 59) ** 0.5  # its mean, and four standard deviations


def test_a_metaworld_transition_takes_less_than_a_third_of_the_authors_bytes():
    buffer = ReplayBuffer(num_tasks=3, obs_dim=39, act_dim=4, capacity=6400)
    held = sum(value.nbytes for value in vars(buffer).values() if hasattr(value, "nbytes"))
    assert buffer.nbytes <= held <= buffer.nbytes + 100
    assert held / (3 * 6400) < 0.32 * 648  # theirs: two observations of 39 float64, and the rest in float32


# ---------------------------------------------------------------------------------------------- return normaliser
NORMALIZERS = {  # with gamma = 0.5; of four action dimensions
    "paper": lambda num_tasks: ReturnNormalizer(make_args(gamma=0.5), num_tasks, 4),
    "release": lambda num_tasks: ReturnNormalizer(make_args(gamma=0.5, variant="release"), num_tasks, 4),
    "games": lambda num_tasks: brc_drq.ReturnNormalizer(brc_drq.Args(gamma=0.5), num_tasks),
}


@pytest.mark.parametrize(("variants", "rewards", "end", "last_value", "scale"), [
    ("paper games", [1, 2, 4], "terminated", 100, 4),  # 4; 2 + 4/2 = 4; 1 + 4/2 = 3: no value of a terminal state
    ("paper games release", [-6, 1], "terminated", None, 5.5),  # 1; -6 + 1/2 = -5.5
    ("paper games", [1, 2, 4], "truncated", 8, 8),  # 4 + 8/2 = 8; 2 + 8/2 = 6; 1 + 6/2 = 4
    ("paper games", [1, 2, 4], "truncated", -20, 6),  # 4 - 20/2 = -6; 2 - 6/2 = -1; 1 - 1/2 = 0.5
    ("paper games", [1, 2, 4], "truncated", None, 4),  # the critic has learned nothing yet
    ("paper games", [1, 2, 4], "both", 8, 4),  # a termination, whatever the clock says
    ("release", [1, 2, 3], "both", None, 3.5),  # 3; 2 + 3/2 = 3.5; 1 + 3.5/2 = 2.75
    ("release", [1, 2, 3], "truncated", 100, 5)])  # mean 2, worth 2 / (1 - 0.5) = 4: 3 + 4/2 = 5
def test_return_scale_of_one_episode(variants, rewards, end, last_value, scale):
    value = None if last_value is None else np.array([last_value], np.float32)
    for variant in variants.split():
        normalizer = NORMALIZERS[variant](1)
        for t, reward in enumerate(rewards, 1 - len(rewards)):
            over = (np.array([t == 0 and end in (way, "both")]) for way in ("terminated", "truncated"))
            normalizer.observe(np.array([reward], np.float32), *over, None if t else value)
        assert normalizer.return_scale.tolist() == [scale], variant


@pytest.mark.parametrize(("variant", "entropy_share"), [  # alpha 0.1, 4 action dimensions
    ("release", 0.2),  # alpha (4/2) / 2 / (1 - gamma)
    ("paper", 0.5545177), ("games", 0)])  # alpha H / (1 - gamma), H = 4 log 2 of the uniform start; none
def test_rewards_fit_the_support_and_are_0_before_the_first_return_and_where_all_are(variant, entropy_share):
    normalizer, task_id = NORMALIZERS[variant](3), torch.arange(3)
    temperature = [torch.tensor(0.1)] * (variant != "games")
    for _ in range(100 * len(temperature)):  # an entropy below 0 is no share
        normalizer.observe_entropy(torch.full((8,), 50.0), torch.ones(8, dtype=torch.int64))
    no, yes = False, True
    normalizer.observe(np.array([-4, 0, 9], np.float32), np.array([yes, yes, no]), np.array([no, no, no]))
    normalizer.observe(np.array([1, 0, 9], np.float32), np.array([yes, no, no]), np.array([no, yes, no]))
    reward = torch.tensor([3.0, 0.0, 9.0])
    normalized = normalizer.normalize(reward, task_id, *temperature)
    np.testing.assert_allclose(normalized, [30 / (4 + entropy_share), 0, 0], rtol=1e-6)  # v_max = 10
    values = normalizer.denormalize(normalized + 2 * (task_id == 2), task_id, *temperature)
    np.testing.assert_allclose(values, [3, 0, 0], rtol=1e-6)


def test_policy_entropy_is_averaged_per_task():
    normalizer = NORMALIZERS["paper"](2)
    # Both start at 4 log 2 = 2.772589. Task 0 then has entropies -1 and -3: 2.772589 + 0.01 (-2 - 2.772589).
    normalizer.observe_entropy(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    np.testing.assert_allclose(normalizer.entropy, [2.724863, 2.772589], rtol=1e-6)
    for _ in range(2000):
        normalizer.observe_entropy(torch.tensor([-1.0, 3.0, 5.0]), torch.tensor([0, 1, 1]))
    np.testing.assert_allclose(normalizer.entropy, [1, -4], atol=1e-4)
    normalizer.return_scale[:] = 7.0
    # lambda = 0.1 * 1 / (1 - 0.5) = 0.2, and never below 0 though the entropy of task 1 is.
    np.testing.assert_allclose(normalizer.denominator(torch.tensor(0.1)), [7.2, 7], rtol=1e-6)


# ---------------------------------------------------------------------------------------------- networks, update


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_on_metaworld():
    args = make_args(width=256, actor_width=256)
    # block = 2 (256² + 256 bias + 2·256 LayerNorm) = 132,608
    # critic member = 75·256 + 256 + 512 + 2 blocks + 256·101 + 101 = 311,141; two of them and 50·32 embeddings
    # actor = 71·256 + 256 + 512 + 1 block + 2 (256·4 + 4) = 153,608
    assert (count(brc_sac.Critic(args, 39, 4, 50)), count(brc_sac.Actor(args, 39, 4, 50))) == (623_882, 153_608)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_embeddings_have_unit_norm_whatever_the_weights(module, norm, order):
    embedding = module.TaskEmbedding(2000, 32, norm)
    assert embedding.weight.mean().abs() < 0.003 and embedding.weight.var().item() == pytest.approx(1 / 32, rel=0.02)
    embedding.weight.data *= torch.linspace(0.1, 10, 2000)[:, None]
    np.testing.assert_allclose(embedding(torch.arange(2000)).detach().norm(order, dim=-1), 1, rtol=1e-5)


def test_actions_are_sampled_with_the_noise_and_have_a_density_where_tanh_saturates():
    agent, obs, noise = make_agent(), torch.randn(2, 3), torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    mean, log_std = agent.actor(obs, agent.critic.embed(torch.tensor([0, 1])))
    torch.testing.assert_close(agent.act(obs, noise), torch.tanh(mean + log_std.exp() * noise))
    mean, log_std = torch.tensor([[50.0, -50.0]]), torch.tensor([[2.0, -10.0]])
    action, log_prob = brc_sac.sample_action(mean, log_std, torch.zeros(1, 2))
    assert action.tolist() == [[1, -1]]
    # -log_std - log(2 pi)/2 - 2 (log 2 - |u|) each: -2.9189 + 98.6137 and 9.0811 + 98.6137
    np.testing.assert_allclose(log_prob, 203.3896, rtol=1e-6)


def test_no_update_computes_gradients_that_nobody_uses():
    agent, batch, noise = make_agent(), make_batch(), torch.randn(2, 64, 2)
    loss, _ = agent.critic_loss(agent.critic, agent.target, agent.actor, agent.temperature, 0.99, batch, noise[0])
    loss.backward()
    assert all(p.grad is None for p in (*agent.actor.parameters(), *agent.target.parameters(), agent.log_temperature))
    seen = []
    agent.critic_optimizer.register_step_post_hook(lambda *_: [p.grad.zero_() for p in agent.critic.parameters()])
    agent.actor_optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in agent.critic.parameters()))
    agent.update(batch, *noise)
    assert seen and not any(gradient.any() for gradient in seen)


class ProductTypes(TorchDispatchMode):
    """Collects the names of the operators that read or write bfloat16."""

    names = frozenset()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in tree_leaves((args, result))):
            self.names |= {function.overloadpacket.__name__}
        return result


def test_in_bf16_only_matrix_products_change():
    names = {}
    for precision in ("fp32", "bf16"):
        agent = make_agent(precision=precision, width=64)
        with ProductTypes() as operators:
            agent.update(make_batch(), *torch.randn(2, 64, 2))
        names[precision] = operators.names
        assert {p.grad.dtype for p in agent.critic.parameters()} == {torch.float32}
    assert names["fp32"] == set()
    # Products, views of their operands, the conversions around them, and the sum that is a bias's gradient.
    assert {"addmm", "mm"} < names["bf16"] <= {"addmm", "mm", "t", "view", "detach", "_to_copy", "sum"}, names


# -------------------------------------------------------------------------------------------------- training loop


class Scripted(Pendulum):
    """Episodes of three steps that end by truncation; observes the step's number, from a reset -3; rewards of 0."""

    def reset(self, **options):
        super().reset(**options)
        return np.full(3, -3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t, np.float32), 0.0, False, self.t == 3, {"success": 0.0}


def test_the_start_is_uniformly_random(sac, monkeypatch):
    monkeypatch.setattr(brc_sac, "evaluate", lambda *args: ([], []))
    brc_sac.train(sac.args(total_steps=401, learning_starts=400))
    actions = np.fromfile(sac.folder / "run/replay/rows.bin", np.float32).reshape(400, 2, -1)[:, :, 3:5]
    shares, _ = np.histogram(actions, bins=4, range=(-1, 1))
    assert (np.abs(shares / actions.size - 0.25) < 0.06).all() and actions.size > 1000


@pytest.mark.parametrize(("variant", "overlap"), [("paper", True), ("paper", False), ("release", True)])
def test_the_loop_stores_and_values_the_true_final_observation(sac, monkeypatch, variant, overlap):
    """From the second step on, the updates see it; only the paper's variant asks the critic, once it has learned."""
    asked, sizes, parts, sample = [], [], {}, ReplayBuffer.sample
    monkeypatch.setattr(suites, "make", lambda task, seed, render_mode=None, **_: Scripted())
    monkeypatch.setattr(brc_sac, "raw_value", lambda agent, normalizer, obs: (
        asked.append(obs), parts.update(normalizer=normalizer), np.full(2, 8.0))[-1])
    monkeypatch.setattr(ReplayBuffer, "sample", lambda buffer, size: (
        sizes.append(buffer.steps), parts.update(buffer=buffer), sample(buffer, size))[-1])
    brc_sac.train(sac.args(variant=variant, overlap=overlap, learning_starts=6, total_steps=12, gamma=0.5))
    assert sizes == list(range(6 + (not overlap), 12 + (not overlap)))
    assert [obs.tolist() for obs in asked] == [[[3] * 3] * 2] * 2  # after 9 and 12 steps, never -3
    batch = parts["buffer"].sample(200)
    assert set(zip(batch.obs[:, 0].tolist(), batch.next_obs[:, 0].tolist())) == {(-3, 1), (1, 2), (2, 3)}
    assert not batch.terminated.any()
    # Rewards of 0 and then the critic's value: gamma V. The release takes the mean reward in its place.
    assert parts["normalizer"].return_scale.tolist() == ([4, 4] if variant == "paper" else [0, 0])


def test_values_are_known_in_raw_reward_units():
    agent, normalizer = make_agent(), ReturnNormalizer(make_args(variant="release"), 2, 2)
    for member in agent.critic.members:  # certain of 6, atom 80 of 101
        member[1].weight.data.zero_()
        member[1].bias.data[80] = 100
    normalizer.return_scale[:] = torch.tensor([95.0, torch.inf])
    raw = brc_sac.raw_value(agent, normalizer, np.ones((2, 3), np.float32))
    np.testing.assert_allclose(raw, [0.6 * (95 + 5), 0], rtol=1e-5)  # lambda = 0.1 (2/2) / 2 / (1 - 0.99) = 5


# ---------------------------------------------------------------------------------------------------- evaluation


class ScriptedEnvs:
    """In place of a VectorEnv: episodes of fixed lengths; every reward is the number of the episode, from 1.

    Task 0 succeeds in the second and third step, and only there, of its odd episodes. Task 1 defines no success.
    """

    tasks, num_envs, lengths = ("reach", "cartpole-swingup"), 2, (7, 3)

    def reset(self, seed: int) -> np.ndarray:
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.episode, self.t, self.seen = np.ones(2, int), np.zeros(2, int), []
        self.obs = self.rng.normal(size=(2, 3)).astype(np.float32)
        return self.obs

    def step(self, action: np.ndarray) -> Step:
        self.seen.append((self.obs, action))
        assert len(self.seen) < 100, "an evaluation without end"
        self.t += 1
        over = self.t == self.lengths
        success = np.array([float(self.t[0] in (2, 3) and self.episode[0] % 2), np.nan], np.float32)
        reward = self.episode.astype(np.float32)
        self.episode, self.t = self.episode + over, np.where(over, 0, self.t)
        self.obs = self.rng.normal(size=(2, 3)).astype(np.float32)
        return Step(self.obs + 1, reward, over & [True, False], over & [False, True], success, self.obs)

    def render(self) -> list[np.ndarray]:
        return [np.full((2, 2, 3), self.t[task], np.uint8) for task in range(2)]


@pytest.mark.parametrize(("episodes", "means"), [
    # Returns 7·1, 7·2, ... and 3·1, 3·2, ...: further episodes would raise the means.
    (1, [{"return": 7.0, "score": 1.0, "success": 1.0}, {"return": 3.0, "score": 0.003}]),
    (3, [{"return": 14.0, "score": pytest.approx(2 / 3), "success": pytest.approx(2 / 3)},
         {"return": 6.0, "score": pytest.approx(0.006)}])])
def test_evaluation_counts_exactly_the_episodes_asked_for(episodes, means):
    agent, envs = make_agent(), ScriptedEnvs()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    results, frames = brc_sac.evaluate(agent, envs, episodes, seed=5, video=True)
    assert results == means and envs.seed == 5
    assert len(envs.seen) == 7 * episodes, "it stops with the last episode of the slowest task"
    # The actions are the means; no random state is touched.
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    for obs, action in envs.seen:
        np.testing.assert_allclose(action, agent.act(torch.from_numpy(obs), None), atol=1e-6)
    times = [[int(frame[0, 0, 0]) for frame in episode] for episode in frames]
    assert times == [list(range(0, length, suites.VIDEO_STRIDE)) for length in envs.lengths]  # of the first one
    assert brc_sac.evaluate(agent, envs, episodes, seed=5) == (means, [[], []])
    assert brc_sac.evaluate(agent, envs, episodes, seed=5, stop=lambda: len(envs.seen) > 2) == ([], [])


def test_means_over_tasks_and_the_table():
    results = [{"return": 10.0, "score": 0.5, "success": 0.5}, {"return": 30.0, "score": 0.3}]
    assert suites.mean_result(results) == {"return": 20.0, "success": 0.5, "score": pytest.approx(0.4)}
    rows = [line.split() for line in suites.table(("reach", "walker-run"), results).splitlines()]
    assert rows == [["task", "return", "success", "score"], ["reach", "10.0", "0.50", "0.500"],
                    ["walker-run", "30.0", "-", "0.300"], ["mean", "20.0", "0.50", "0.400"]]


# ----------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("given_args", "resolved"), [
    (dict(), dict(width=4096, batch_size=1024, learning_starts=5000, total_steps=500_000, eval_interval=25_000,
                  checkpoint_interval=25_000, exp_name="brc_sac-mw-paper", tasks=suites.SUITES["mw"].tasks,
                  embedding_norm="l1", goals="fresh")),
    (dict(variant="release"), dict(embedding_norm="l2", goals="frozen")),
    (dict(tasks=("ball_in_cup-catch",), variant="release"),
     dict(width=4096, batch_size=256, exp_name="brc_sac-ball_in_cup-catch-release", embedding_norm="l2",
          goals="fresh")),  # it has none to freeze
    (dict(tasks=("h1-walk", "reach")), dict(total_steps=1_000_000, eval_interval=25_000)),  # the longest of the budgets
    (dict(split="pretrain"), dict(exp_name="brc_sac-mw-pretrain-paper", tasks=suites.SUITES["mw"].pretrain)),
    (dict(suite="demo"),
     dict(tasks=suites.SUITES["demo"].tasks, width=128, actor_width=128, batch_size=128, learning_starts=1000,
          learning_rate=6e-4, gamma=0.95, tau=0.02, init_temperature=0.01, eval_episodes=5, eval_interval=1000)),
    (dict(suite="demo", width=64, learning_rate=3e-4), dict(width=64, learning_rate=3e-4, batch_size=128)),
    (dict(suite="demo", tasks=("reach",)),  # a task of one's own is not the demo
     dict(width=4096, actor_width=256, learning_rate=3e-4, gamma=0.99, tau=0.005, init_temperature=0.1,
          eval_episodes=10)),
    (dict(total_steps=10, learning_starts=5), dict(total_steps=10, eval_interval=1, checkpoint_interval=1)),
    (edges := dict(gamma=0.0, tau=1.0, weight_decay=0.0, workers=0), edges)])
def test_defaults_depend_on_suite_and_tasks(given_args, resolved):
    args = brc_sac.resolve(Args(**given_args))
    assert {name: getattr(args, name) for name in resolved} == resolved
    assert brc_sac.resolve(args) == args  # as a resume does


@pytest.mark.parametrize(("given", "goals"), [(dict(), "fresh"), (dict(goals="frozen"), "frozen"),
                                              (dict(variant="release"), "frozen")])
def test_a_run_has_its_goals_in_training_and_in_evaluation(sac, monkeypatch, given, goals):
    def make(tasks, seed, *inputs, **options):
        made.append((seed, options["goals"]))
        return of(tasks, seed, *inputs, **options)

    made, of = [], brc_sac.VectorEnv
    monkeypatch.setattr(brc_sac, "VectorEnv", make)
    args = sac.args(seed=5, total_steps=20, **given)
    brc_sac.train(args)
    brc_sac.evaluate_run(dataclasses.replace(harness.read_args(Path(args.run_dir), Args)[0], evaluate=args.run_dir))
    assert made == [(5, goals), (47, goals), (47, goals)]
