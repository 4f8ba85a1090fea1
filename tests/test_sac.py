"""brc_sac.py part by part: against naive models, numbers worked out by hand, and small problems with a known answer."""

import itertools
import random
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import brc_sac
import suites
from brc_sac import Agent, Args, Batch, Learner, ReplayBuffer, ReturnNormalizer
from suites.vector import Step, VectorEnv

VARIANTS = ("paper", "release")
CPU = torch.device("cpu")


def make_args(**changes) -> Args:
    """Small enough for milliseconds; two tasks, so that there is an embedding."""
    small = dict(tasks=("reach", "cartpole-swingup"), width=16, actor_width=16, batch_size=64, learning_starts=4,
                 total_steps=1000, eval_interval=100, checkpoint_interval=100)
    return Args(**small | changes)


def make_batch(rng: np.random.Generator, num_tasks: int = 2) -> Batch:
    """64 random transitions with 3 observations and 2 actions."""
    obs, action, next_obs, reward = (torch.from_numpy(rng.normal(size=shape).astype(np.float32))
                                     for shape in ((64, 3), (64, 2), (64, 3), 64))
    terminated, task_id = (torch.from_numpy(rng.integers(0, high, 64)) for high in (2, num_tasks))
    return Batch(obs, action.tanh(), reward, terminated.float(), next_obs, task_id)


@pytest.fixture
def rng():
    torch.manual_seed(0)
    return np.random.default_rng(0)


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


def random_probs(rng: np.random.Generator, rows: int, num_atoms: int) -> torch.Tensor:
    return torch.from_numpy(rng.dirichlet(np.full(num_atoms, 0.3), rows).astype(np.float32))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_atoms=st.integers(2, 60), v_max=st.floats(0.5, 200),
       spread=st.sampled_from([0.1, 0.5, 1.0, 3.0, 1e6]))
def test_projection_equals_the_naive_loop(seed, num_atoms, v_max, spread):
    rng = np.random.default_rng(seed)
    atoms, probs = torch.linspace(-v_max, v_max, num_atoms), random_probs(rng, 4, num_atoms)
    positions = torch.from_numpy((spread * v_max * rng.normal(size=(4, num_atoms))).astype(np.float32))
    projected = brc_sac.project_categorical(probs, positions, atoms)
    assert (projected >= 0).all()
    np.testing.assert_allclose(projected.sum(-1), 1, atol=2e-6)
    exact_atoms = np.linspace(-v_max, v_max, num_atoms)
    np.testing.assert_allclose(projected, naive_projection(probs.numpy(), positions.numpy(), exact_atoms), atol=5e-5)


@pytest.mark.parametrize(
    ("position", "where"),
    # Atoms -2, -1, 0, 1, 2: index and mass of what one particle becomes.
    [(0.0, {2: 1.0}), (-2.0, {0: 1.0}), (2.0, {4: 1.0}), (1.0, {3: 1.0}),
     (-7.0, {0: 1.0}), (7.0, {4: 1.0}), (float("inf"), {4: 1.0}), (float("-inf"), {0: 1.0}),
     (0.25, {2: 0.75, 3: 0.25}), (1.9, {3: 0.1, 4: 0.9}), (-1.5, {0: 0.5, 1: 0.5})],
)
def test_projection_of_one_particle(position, where):
    expected = np.zeros(5)
    for index, mass in where.items():
        expected[index] = mass
    # All of the mass lies at `position`, wherever it started: what a terminal state's target is.
    probs, positions = torch.full((1, 5), 0.2), torch.full((1, 5), position)
    projected = brc_sac.project_categorical(probs, positions, torch.arange(-2.0, 3))
    np.testing.assert_allclose(projected[0], expected, atol=1e-6)


def test_clipped_mass_stays_on_the_outermost_atoms_and_never_turns_negative():
    for num_atoms, v_max in itertools.product(range(2, 130), (0.5, 1.0, 7.3, 10.0, 33.0, 150.0)):
        atoms, probs = torch.linspace(-v_max, v_max, num_atoms), torch.full((2, num_atoms), 1 / num_atoms)
        positions = torch.tensor([[-3 * v_max], [3 * v_max]]).expand(2, num_atoms)
        projected = brc_sac.project_categorical(probs, positions, atoms)
        assert (projected >= 0).all(), (num_atoms, v_max)
        np.testing.assert_allclose(projected[[0, 1], [0, -1]], 1, atol=2e-5)


def test_projection_passes_nan_on_to_the_loss():
    # A network that diverged has to be told from its loss: NaN as an index would be an error without a name.
    probs, positions = torch.full((1, 5), 0.2), torch.full((1, 5), torch.nan)
    assert brc_sac.project_categorical(probs, positions, torch.arange(-2.0, 3)).isnan().any()


def test_projection_keeps_the_mean_of_targets_within_the_support(rng):
    atoms, probs = torch.linspace(-10, 10, 101), random_probs(rng, 200, 101)
    positions = 0.5 * atoms + torch.from_numpy(rng.uniform(-5, 5, (200, 1)).astype(np.float32))
    projected = brc_sac.project_categorical(probs, positions, atoms)
    np.testing.assert_allclose(projected @ atoms, (probs * positions).sum(-1), atol=2e-5)


def test_projection_of_the_atoms_themselves_changes_nothing(rng):
    atoms, probs = torch.linspace(-10, 10, 101), random_probs(rng, 50, 101)
    projected = brc_sac.project_categorical(probs, atoms.expand(50, -1), atoms)
    np.testing.assert_allclose(projected, probs, atol=2e-5)


def test_targets_bootstrap_after_truncations_and_not_after_terminations():
    # gamma 0.5, alpha 0.1, log pi -10 (entropy bonus 1), atoms -2, 0, 2.
    batch = Batch(None, None, torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0]), None, None)
    log_prob, alpha, atoms = torch.full((2,), -10.0), torch.tensor(0.1), torch.tensor([-2.0, 0.0, 2.0])
    positions = brc_sac.target_positions(batch, log_prob, alpha, atoms, gamma=0.5)
    np.testing.assert_allclose(positions, [[2.5, 3.5, 4.5], [3.0, 3.0, 3.0]])


# ------------------------------------------------------------------------------------------------- replay buffer


class Stream:
    """Unending episodes of every task, whose observations, actions and rewards are all different numbers.

    plans: per task, the (length, terminated) of its episodes, repeated for ever. `rows` is the naive model of a buffer:
    per task, a list of the transitions, with None where an episode's final observation takes a row of its own.
    """

    def __init__(self, plans: list[list[tuple[int, bool]]]):
        self.numbers = itertools.count(1)
        self.plans = [itertools.cycle(plan) for plan in plans]
        self.rows: list[list] = [[] for _ in plans]
        self.episodes = [next(plan) for plan in self.plans]
        self.steps = [0 for _ in plans]
        self.obs = self.draw(2)

    def draw(self, width: int) -> np.ndarray:
        return np.array([[next(self.numbers)] * width for _ in self.plans], np.float32)

    def feed(self, num_steps: int, *buffers: ReplayBuffer) -> None:
        for _ in range(num_steps):
            action, reward, next_obs, reset_obs = self.draw(1), self.draw(1)[:, 0], self.draw(2), self.draw(2)
            terminated, truncated = np.zeros((2, len(self.plans)), bool)
            for task, (length, terminates) in enumerate(self.episodes):
                self.steps[task] += 1
                over = self.steps[task] == length
                terminated[task], truncated[task] = over and terminates, over and not terminates
                self.rows[task].append((task, self.obs[task, 0], action[task, 0], reward[task], float(terminated[task]),
                                        next_obs[task, 0]))
                if over:
                    self._next_episode(task)
            for buffer in buffers:
                buffer.add(self.obs, action, reward, terminated, truncated, next_obs)
            self.obs = np.where((terminated | truncated)[:, None], reset_obs, next_obs)

    def _next_episode(self, task: int) -> None:
        self.rows[task].append(None)
        self.episodes[task], self.steps[task] = next(self.plans[task]), 0

    def cut(self, *buffers: ReplayBuffer) -> None:
        for buffer in buffers:
            buffer.cut()
        for task, steps in enumerate(self.steps):
            if steps > 0:
                self._next_episode(task)
        self.obs = self.draw(2)

    def last(self, capacity: int, num_rows: int | None = None) -> set:
        """The last `capacity` transitions of every task, of those among its last `num_rows` rows."""
        kept = (rows[-num_rows:] if num_rows else rows for rows in self.rows)
        return {row for rows in kept for row in [row for row in rows if row][-capacity:]}


def sampleable(buffer: ReplayBuffer) -> set:
    """All transitions that the buffer can sample (it would miss one of 80 with probability e-50)."""
    batch = buffer.sample(4000, torch.Generator().manual_seed(0))
    assert (batch.obs[:, 0] == batch.obs[:, 1]).all() and (batch.next_obs[:, 0] == batch.next_obs[:, 1]).all()
    columns = (batch.task_id, batch.obs[:, 0], batch.action[:, 0], batch.reward, batch.terminated, batch.next_obs[:, 0])
    return set(zip(*(column.tolist() for column in columns)))


def plans_of(min_length: int, max_length: int):
    episode = st.tuples(st.integers(min_length, max_length), st.booleans())
    return st.lists(st.lists(episode, min_size=1, max_size=5), min_size=1, max_size=3)


def make_buffer(stream: Stream, capacity: int) -> ReplayBuffer:
    return ReplayBuffer(len(stream.plans), obs_dim=2, act_dim=1, capacity=capacity)


@settings(deadline=None)
@given(plans=plans_of(1, 12), capacity=st.integers(1, 25), bouts=st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_buffer_samples_exactly_what_a_list_of_episodes_holds(plans, capacity, bouts):
    stream = Stream(plans)
    buffer = make_buffer(stream, capacity)
    for num_steps in bouts:
        stream.feed(num_steps, buffer)
        # The ring's rows but one, the current observation's, hold transitions and final observations.
        assert sampleable(buffer) == stream.last(capacity, buffer.rows - 1)
        stream.cut(buffer)
        assert sampleable(buffer) == stream.last(capacity, buffer.rows - 1)


@settings(deadline=None, max_examples=30)
@given(plans=plans_of(64, 80), capacity=st.integers(1, 40) | st.sampled_from([63, 64, 65, 80]))
def test_buffer_keeps_its_whole_capacity_when_episodes_have_64_steps(plans, capacity):
    stream = Stream(plans[:1])
    buffer = make_buffer(stream, capacity)
    for num_steps in (capacity, 61, 64, 1, 1, 1, 130):
        stream.feed(num_steps, buffer)
        assert sampleable(buffer) == stream.last(capacity)


def test_buffer_with_large_capacity_wraps_at_every_phase_of_an_episode():
    stream = Stream([[(64, True)], [(70, False)]])
    buffer = make_buffer(stream, 200)
    for _ in range(450):
        stream.feed(1, buffer)
        first, size = buffer.window
        assert size.tolist() == [min(200, int(stop)) for stop in first + size]
    batch = buffer.sample(20_000, torch.Generator().manual_seed(0))
    assert len(set(batch.reward.tolist())) == 400
    assert set(batch.reward.tolist()) == {row[3] for row in stream.last(200)}


def test_sampling_is_uniform_over_tasks_and_their_transitions():
    stream = Stream([[(3, True), (7, False)], [(20, False)], [(5, True)]])
    buffer = make_buffer(stream, 20)
    stream.feed(53, buffer)
    rewards = buffer.sample(60_000, torch.Generator().manual_seed(0)).reward.numpy()
    # Tasks are equally likely, also where short episodes leave some of them fewer transitions.
    expected = {}
    for rows in stream.rows:
        kept = [row for row in rows[-(buffer.rows - 1):] if row][-20:]
        expected |= {row[3]: 60_000 / 3 / len(kept) for row in kept}
    drawn, counts = np.unique(rewards, return_counts=True)
    assert set(drawn) == set(expected)
    chi_square = sum((count - expected[reward]) ** 2 / expected[reward] for reward, count in zip(drawn, counts))
    degrees = len(expected) - 1  # the statistic's mean; its variance is twice that
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_observations_are_stored_once_in_float32():
    buffer = ReplayBuffer(num_tasks=3, obs_dim=39, act_dim=4, capacity=6400)
    held = [value for value in vars(buffer).values() if hasattr(value, "nbytes")]
    assert buffer.nbytes <= sum(value.nbytes for value in held) <= buffer.nbytes + 1000
    per_transition = buffer.nbytes / (3 * 6400)
    once = 4 * (39 + 4 + 1 + 1)  # observation, action, reward, terminated
    assert once < per_transition < 1.02 * once + 8  # 1/64 more rows for final observations, and two 4-byte indices


def backwards(segment: dict) -> dict:
    """Its rows in another order, which must not matter: torch writes to equal indices in any order.

    It does so on a GPU and, with threads, on a CPU. Transitions that lie a capacity apart share a place in the ring.
    """
    return {name: values.flip(0) for name, values in segment.items()}


@settings(deadline=None, max_examples=60)
@given(plans=plans_of(1, 12), capacity=st.integers(1, 25), new_capacity=st.integers(1, 25),
       bouts=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_buffer_survives_export_and_load(plans, capacity, new_capacity, bouts):
    stream = Stream(plans)
    buffer = make_buffer(stream, capacity)
    segments, exported = [], np.zeros(len(plans), np.int64)
    for num_steps in bouts:  # a segment after every bout; with bouts longer than the ring some rows are never saved
        stream.feed(num_steps, buffer)
        segments.append(backwards(buffer.export(exported)))
        exported = buffer.head.copy()

    same, other = make_buffer(stream, capacity), make_buffer(stream, new_capacity)
    same.load(segments=segments, counters=buffer.state_dict())
    other.load(segments=segments, counters=buffer.state_dict())
    assert sampleable(other) == sampleable(buffer) & stream.last(new_capacity, other.rows - 1)
    stream.feed(17, buffer, same, other)
    stream.cut(buffer, same, other)
    stream.feed(5, buffer, same, other)
    for expected, loaded in zip(*(b.sample(500, torch.Generator().manual_seed(1)) for b in (buffer, same))):
        assert torch.equal(expected, loaded)
    assert sampleable(other) <= stream.last(new_capacity, other.rows - 1)
    if new_capacity <= capacity:
        assert sampleable(other) == stream.last(new_capacity, other.rows - 1)


def test_a_segment_holds_only_what_is_new():
    stream = Stream([[(100, False)]])
    buffer = make_buffer(stream, 1000)
    stream.feed(500, buffer)
    head = buffer.head.copy()
    stream.feed(30, buffer)
    assert len(buffer.export(head)["number"]) == 31  # with the current observation


def test_loading_a_full_ring_of_one_long_episode():
    # Without final observations the ring holds more rows with transitions than its capacity.
    stream = Stream([[(1000, False)]])
    buffer, loaded = make_buffer(stream, 128), make_buffer(stream, 128)
    stream.feed(300, buffer)
    loaded.load(segments=[backwards(buffer.export(np.zeros(1, np.int64)))], counters=buffer.state_dict())
    assert sampleable(loaded) == sampleable(buffer) == stream.last(128)


# ------------------------------------------------------------------------------------------------------- padding


class SliceEnv(gym.Env):
    """Observes ones, and rewards with the sum of an action that has to be of its own size."""

    def __init__(self, obs_dim: int, act_dim: int):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (act_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.ones(self.observation_space.shape, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.ones(self.observation_space.shape, np.float32), float(action.sum()), False, False, {}


def test_mixed_embodiments_are_padded():
    sizes = {"reach": (2, 3), "cartpole-swingup": (5, 1)}
    envs = VectorEnv(tuple(sizes), seed=0, make=lambda task, seed, render_mode: SliceEnv(*sizes[task]))
    assert (envs.obs_dim, envs.act_dim) == (5, 3)
    learner = Learner(make_args(learning_starts=2), envs.obs_dim, envs.act_dim, CPU, CPU)
    obs, actions = envs.reset(), []
    for _ in range(20):  # random actions, then the policy's
        actions.append(learner.act(obs))
        result = envs.step(actions[-1])
        learner.env_step += 1
        learner.observe(obs, actions[-1], result)
        obs = result.obs
    actions = np.stack(actions)
    assert actions.shape == (20, 2, 3) and (np.abs(actions) > 0).all() and (np.abs(actions) <= 1).all()

    batch, seen = learner.buffer.sample(100), []
    for task, (obs_dim, act_dim) in enumerate(sizes.values()):
        mine = batch.task_id == task
        assert mine.any()
        for padded in (batch.obs[mine], batch.next_obs[mine]):
            assert (padded[:, :obs_dim] == 1).all() and (padded[:, obs_dim:] == 0).all()
        np.testing.assert_allclose(batch.action[mine, :act_dim].sum(-1), batch.reward[mine], atol=1e-6)
    learner.agent.critic.members[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    learner.update()
    assert all(x.shape == (64, 5 + 3 + 32) for x in seen)
    first = seen[0]  # the critic step: stored observations of both tasks
    assert set(first[:, 2:5].sum(-1).tolist()) == {0.0, 3.0}


# ---------------------------------------------------------------------------------------------- return normaliser


def make_normalizer(variant: str, num_tasks: int = 1, act_dim: int = 4) -> ReturnNormalizer:
    return ReturnNormalizer(make_args(variant=variant, gamma=0.5), num_tasks, act_dim)


def finish_episode(normalizer: ReturnNormalizer, rewards: list, end: str, last_value: float | None = None) -> None:
    """An episode of a single task; `end` is how it ends: terminated, truncated or both."""
    for t, reward in enumerate(rewards):
        last = t == len(rewards) - 1
        value = None if last_value is None else np.array([last_value], np.float32)
        normalizer.observe(np.array([reward], np.float32), np.array([last and end in ("terminated", "both")]),
                           np.array([last and end in ("truncated", "both")]), value if last else None)


@pytest.mark.parametrize(
    ("variant", "rewards", "end", "last_value", "scale"),
    [  # gamma = 0.5
        ("paper", [1, 2, 4], "terminated", None, 4),  # G = 4; 2 + 4/2 = 4; 1 + 4/2 = 3
        ("release", [1, 2, 4], "terminated", None, 4),
        ("paper", [1, 2, 4], "terminated", 100, 4),  # a terminal state has no value
        ("paper", [4, 2, 1], "terminated", None, 5.25),  # 1; 2 + 1/2 = 2.5; 4 + 2.5/2 = 5.25
        ("release", [-6, 1], "terminated", None, 5.5),  # 1; -6 + 1/2 = -5.5
        ("release", [1, 2, 3], "truncated", None, 5),  # mean 2, worth 2 / (1 - 0.5) = 4: 3 + 4/2 = 5; 4.5; 3.25
        ("release", [1, 2, 3], "truncated", 100, 5),  # the critic is not asked
        ("release", [-1, -3], "truncated", None, 5),  # mean -2, worth -4: -3 - 4/2 = -5; -1 - 5/2 = -3.5
        ("paper", [1, 2, 4], "truncated", 8, 8),  # 4 + 8/2 = 8; 2 + 8/2 = 6; 1 + 6/2 = 4
        ("paper", [1, 2, 4], "truncated", -20, 6),  # 4 - 20/2 = -6; 2 - 6/2 = -1; 1 - 1/2 = 0.5
        ("paper", [1, 2, 4], "truncated", None, 4),  # the critic has learned nothing yet
        ("paper", [1, 2, 4], "both", 8, 4),  # a termination, whatever the clock says
        ("release", [1, 2, 3], "both", None, 3.5),  # 3; 2 + 3/2 = 3.5; 1 + 3.5/2 = 2.75
        ("paper", [7], "terminated", None, 7),  # an episode of one step
        ("release", [7], "truncated", None, 14),  # 7 + 14/2
    ],
)
def test_return_scale_of_one_episode(variant, rewards, end, last_value, scale):
    normalizer = make_normalizer(variant)
    finish_episode(normalizer, rewards, end, last_value)
    assert normalizer.return_scale.tolist() == [scale]


def test_return_scale_is_a_running_maximum_per_task():
    normalizer = make_normalizer("release", num_tasks=3)
    no, yes = False, True
    trace = [  # rewards, terminated, truncated -> scales after the step
        ([1, 4, 9], [no, yes, no], [no, no, no], [np.inf, 4, np.inf]),
        ([2, 3, 9], [yes, yes, no], [no, no, no], [2, 4, np.inf]),  # task 0: 2; 1 + 2/2 = 2
        ([-9, 5, 9], [yes, no, no], [no, yes, no], [9, 10, np.inf]),  # task 1: 5 + (5 / 0.5) / 2 = 10
        ([8, 0, 9], [yes, yes, no], [no, no, no], [9, 10, np.inf]),  # smaller ones change nothing
    ]
    for reward, terminated, truncated, scales in trace:
        normalizer.observe(np.array(reward, np.float32), np.array(terminated), np.array(truncated))
        assert normalizer.return_scale.tolist() == scales


@pytest.mark.parametrize(
    ("variant", "entropy_share"),
    # gamma 0.5, alpha 0.1, 4 action dimensions
    [("release", 0.2),  # alpha (4/2) / 2 / (1 - gamma)
     ("paper", 0.5545177)],  # alpha H / (1 - gamma), H = 4 log 2 of the uniform start
)
def test_normalized_rewards(variant, entropy_share):
    normalizer = make_normalizer(variant, num_tasks=2)
    normalizer.return_scale[:] = torch.tensor([4.0, 100.0])
    alpha, task_id, reward = torch.tensor(0.1), torch.tensor([0, 1, 0]), torch.tensor([1.0, 1.0, -3.0])
    np.testing.assert_allclose(normalizer.denominator(alpha), [4 + entropy_share, 100 + entropy_share], rtol=1e-6)
    normalized = normalizer.normalize(reward, task_id, alpha)
    expected = [10 / (4 + entropy_share), 10 / (100 + entropy_share), -30 / (4 + entropy_share)]  # v_max = 10
    np.testing.assert_allclose(normalized, expected, rtol=1e-6)
    np.testing.assert_allclose(normalizer.denormalize(normalized, task_id, alpha), reward, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_are_zero_before_the_first_finished_episode(variant):
    normalizer = make_normalizer(variant, num_tasks=2)
    normalizer.observe(np.array([5, 5], np.float32), np.array([True, False]), np.array([False, False]))
    alpha, task_id = torch.tensor(0.1), torch.tensor([0, 1])
    normalized = normalizer.normalize(torch.tensor([5.0, 5.0]), task_id, alpha)
    assert normalized[0] > 0 and normalized[1] == 0
    values = normalizer.denormalize(torch.tensor([3.0, 3.0]), task_id, alpha)
    assert values[0] > 0 and values[1] == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("log_prob", [0.0, 50.0])
def test_a_task_whose_rewards_are_all_zero_stays_zero(variant, log_prob):
    normalizer = make_normalizer(variant)
    for _ in range(100):
        normalizer.observe_entropy(torch.full((8,), log_prob), torch.zeros(8, dtype=torch.int64))
    finish_episode(normalizer, [0, 0, 0], "truncated", 0.0)
    assert normalizer.normalize(torch.zeros(1), torch.tensor([0]), torch.tensor(0.1)).tolist() == [0]


def test_policy_entropy_is_averaged_per_task():
    normalizer = make_normalizer("paper", num_tasks=2)
    # Both start at 4 log 2 = 2.772589. Task 0 then has entropies -1 and -3: 2.772589 + 0.01 (-2 - 2.772589).
    normalizer.observe_entropy(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    np.testing.assert_allclose(normalizer.entropy, [2.724863, 2.772589], rtol=1e-6)
    for _ in range(2000):
        normalizer.observe_entropy(torch.tensor([-1.0, 3.0, 5.0]), torch.tensor([0, 1, 1]))
    np.testing.assert_allclose(normalizer.entropy, [1, -4], atol=1e-4)
    normalizer.return_scale[:] = 7.0
    # lambda = 0.1 * 1 / (1 - 0.5) = 0.2, and never below 0 though the entropy of task 1 is.
    np.testing.assert_allclose(normalizer.denominator(torch.tensor(0.1)), [7.2, 7], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_normalizer_state_goes_on_in_the_middle_of_an_episode(variant):
    original, restored = make_normalizer(variant), make_normalizer(variant)
    finish_episode(original, [1, 2], "terminated")
    original.observe_entropy(torch.tensor([9.0]), torch.tensor([0]))
    original.observe(np.array([40], np.float32), np.array([False]), np.array([False]))
    restored.load_state_dict(original.state_dict())
    finish_episode(restored, [2], "terminated")  # 40 + 2/2
    assert restored.return_scale.tolist() == [41] and restored.entropy.tolist() == original.entropy.tolist()


# ---------------------------------------------------------------------------------------------- networks, update


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("width", "millions"), [(256, 1.40), (512, 4.74), (1024, 17.7), (2048, 68.8), (4096, 271.7), (8192, 1080)]
)
def test_parameter_counts_on_metaworld(width, millions):
    args = make_args(width=width, actor_width=256)
    with torch.device("meta"):  # shapes without memory
        critic, actor = brc_sac.Critic(args, 39, 4, 50), brc_sac.Actor(args, 39, 4, 50)
    assert 2 * count(critic) + count(actor) == pytest.approx(millions * 1e6, rel=4e-3)  # the target is a second critic
    if width == 256:
        # block = 2 (256² + 256 bias + 2·256 LayerNorm) = 132,608
        # critic member = 75·256 + 256 + 512 + 2 blocks + 256·101 + 101 = 311,141; two of them and 50·32 embeddings
        # actor = 71·256 + 256 + 512 + 1 block + 2 (256·4 + 4) = 153,608
        assert (count(critic), count(actor)) == (623_882, 153_608)


@pytest.mark.parametrize(("variant", "order"), [("paper", 1), ("release", 2)])
def test_embeddings_have_unit_norm_and_stay_so(variant, order, rng):
    agent = Agent(make_args(variant=variant, learning_rate=0.1), 3, 2, 2)
    for _ in range(3):
        np.testing.assert_allclose(agent.critic.embed(agent.task_ids).norm(order, dim=-1).detach(), [1, 1], rtol=1e-5)
        before = agent.critic.embed(agent.task_ids).detach()
        agent.update(make_batch(rng), torch.randn(64, 2), torch.randn(64, 2))
        assert (agent.critic.embed(agent.task_ids) - before).abs().max() > 1e-3  # they learn


def test_embeddings_start_with_variance_one_over_their_size():
    weight = brc_sac.TaskEmbedding(2000, 32, "paper").weight
    assert weight.mean().abs() < 0.003 and weight.var().item() == pytest.approx(1 / 32, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_task_has_no_embedding(variant, rng):
    agent = Agent(make_args(variant=variant, tasks=("reach",)), 3, 2, 1)
    assert agent.critic.embedding is None
    assert agent.critic.members[0][0].dense0.in_features == 3 + 2 and agent.actor.body.dense0.in_features == 3
    agent.update(make_batch(rng, num_tasks=1), torch.randn(64, 2), torch.randn(64, 2))
    assert agent.act(torch.zeros(1, 3), None).shape == (1, 2)


def test_networks_start_orthogonal_with_the_release_gains():
    args = make_args()
    critic, actor = brc_sac.Critic(args, 3, 2, 2), brc_sac.Actor(args, 3, 2, 2)
    layers = {name: layer for net in (critic, actor) for name, layer in net.named_modules()
              if isinstance(layer, torch.nn.Linear)}
    for name, layer in layers.items():
        gain = 1 if name == "log_std" else 2**0.5
        singular_values = torch.linalg.svdvals(layer.weight.detach())
        np.testing.assert_allclose(singular_values, gain, rtol=1e-4, err_msg=name)
        assert not layer.bias.any()
    norms = [layer for net in (critic, actor) for layer in net.modules() if isinstance(layer, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 5 + 3 and {norm.eps for norm in norms} == {1e-6}


def test_blocks_are_residual_and_end_without_an_activation(rng):
    net, x = brc_sac.BroNet(3, 16, depth=2), torch.randn(5, 3)
    for block in net.blocks:  # now each one adds -3 to its input, and nothing else
        block.ln2.weight.data.zero_()
        block.ln2.bias.data.fill_(-3)
    stem = torch.relu(net.ln0(net.dense0(x)))
    assert (stem > 0).any() and (stem == 0).any()
    torch.testing.assert_close(net(x), stem - 6)


def test_the_ensemble_is_averaged_without_a_minimum():
    critic = brc_sac.Critic(make_args(), 3, 2, 2)
    logits = torch.full((2, 1, 101), -1e9)
    logits[0, 0, 0] = logits[1, 0, 75] = 0  # one critic is certain of -10, the other of 5
    assert critic.q_values(logits).tolist() == [pytest.approx(-2.5, abs=1e-5)]


def test_the_two_critics_and_their_target_start_as_they_should():
    agent = Agent(make_args(), 3, 2, 2)
    first, second = (member[0].dense0.weight for member in agent.critic.members)
    assert not torch.equal(first, second), "an ensemble of twins"
    for parameter, copy in zip(agent.critic.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(parameter, copy) and parameter is not copy and not copy.requires_grad


def test_log_probability_integrates_to_one():
    # The density of tanh(mean + std noise) on [-1, 1], from its samples on a fine grid of noise.
    noise = torch.linspace(-8, 8, 100_001, dtype=torch.float64).unsqueeze(-1)
    for mean, log_std in [(0.0, 0.0), (1.5, -1.0), (-3.0, 0.5)]:
        action, log_prob = brc_sac.sample_action(torch.tensor(mean), torch.tensor(log_std), noise)
        assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_log_probability_is_finite_where_tanh_saturates():
    mean, log_std = torch.tensor([[50.0, -50.0]]), torch.tensor([[2.0, -10.0]])
    action, log_prob = brc_sac.sample_action(mean, log_std, torch.zeros(1, 2))
    assert action.tolist() == [[1, -1]]
    # -log_std - log(2 pi) / 2 - 2 (log 2 - |u|) per dimension: -2.9189 + 98.6137 and 9.0811 + 98.6137
    np.testing.assert_allclose(log_prob, 203.3896, rtol=1e-6)


def parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_the_actor_step_leaves_critic_and_embedding_alone(rng):
    # Two agents that differ in the noise of their actor step only: nothing of it may reach the critic or its target.
    batch, next_noise, agents = make_batch(rng), torch.randn(64, 2), []
    for _ in range(2):
        torch.manual_seed(0)
        agents.append(Agent(make_args(), 3, 2, 2))
        before = parameters_of(agents[-1].critic)
        agents[-1].update(batch, next_noise, torch.randn(64, 2) + len(agents))
    first, second = agents
    for part in ("critic", "target"):
        assert all(map(torch.equal, getattr(first, part).parameters(), getattr(second, part).parameters())), part
    gradients = zip(first.critic.parameters(), second.critic.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients), "work for nothing: nobody uses these gradients"
    assert not any(map(torch.equal, before, first.critic.parameters())), "the critic step moves every parameter"
    weights = first.actor.body.dense0.weight, second.actor.body.dense0.weight
    assert not torch.equal(*weights)


def test_the_actor_reads_the_embedding_without_gradient(rng):
    agent, batch, noise = Agent(make_args(), 3, 2, 2), make_batch(rng), torch.randn(64, 2)
    loss, log_prob, _ = brc_sac.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise)
    assert not log_prob.requires_grad
    assert torch.autograd.grad(loss, agent.critic.embedding.weight, retain_graph=True, allow_unused=True) == (None,)
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, list(agent.actor.parameters())))


def test_the_critic_step_leaves_actor_target_and_temperature_alone(rng):
    agent, batch = Agent(make_args(), 3, 2, 2), make_batch(rng)
    loss, _ = brc_sac.critic_loss(agent.critic, agent.target, agent.actor, agent.temperature, 0.99, batch,
                                  torch.randn(64, 2))
    loss.backward()
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())
    for part in (agent.actor, agent.target):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert agent.log_temperature.grad is None


class ProductTypes(TorchDispatchMode):
    """Collects the names of the operators that read or write bfloat16."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in tree_leaves((args, result))):
            self.names.add(function.overloadpacket.__name__)
        return result


def updated(precision: str, rng_seed: int = 0):
    """An agent after one update of this precision from a fixed start, its metrics and low-precision operators."""
    torch.manual_seed(0)
    agent = Agent(make_args(precision=precision, width=64), obs_dim=3, act_dim=2, num_tasks=2)
    batch, noise = make_batch(np.random.default_rng(rng_seed)), torch.randn(2, 64, 2)
    with ProductTypes() as operators:
        metrics, _ = agent.update(batch, *noise)
    return agent, metrics, operators.names


def test_in_bf16_only_matrix_products_change():
    (precise, exact, none), (rough, close, names) = updated("fp32"), updated("bf16")
    assert none == set()
    # Products, views of their operands, the conversions around them, and the sum that is a bias's gradient.
    assert {"addmm", "mm"} < names <= {"addmm", "mm", "t", "view", "detach", "_to_copy", "sum"}, names
    for name in exact:  # stated: 1 % of the value, or 0.01 where it is below 1
        assert close[name].item() == pytest.approx(exact[name].item(), rel=0.01, abs=0.01), name
    for one, other in zip(precise.critic.parameters(), rough.critic.parameters(), strict=True):
        cosine = F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0)
        assert other.grad.dtype == other.dtype == torch.float32 and cosine > 0.99


def test_the_target_follows_the_new_critic_by_tau(rng):
    agent = Agent(make_args(learning_rate=0.01, tau=0.25), 3, 2, 2)
    old_target = parameters_of(agent.target)
    agent.update(make_batch(rng), torch.randn(64, 2), torch.randn(64, 2))
    for old, target, critic in zip(old_target, agent.target.parameters(), agent.critic.parameters(), strict=True):
        assert not torch.equal(old, critic)
        torch.testing.assert_close(target, 0.75 * old + 0.25 * critic)


@pytest.mark.parametrize(("log_std_bias", "rises"), [(-3.0, True), (1.0, False)])
def test_the_temperature_moves_towards_the_target_entropy(log_std_bias, rises, rng):
    agent = Agent(make_args(), 3, 2, 2)
    for head, bias in ((agent.actor.mean, 0.0), (agent.actor.log_std, log_std_bias)):
        head.weight.data.zero_()
        head.bias.data.fill_(bias)
    metrics, _ = agent.update(make_batch(rng), torch.randn(64, 2), torch.randn(64, 2))
    assert (metrics["entropy"] < agent.target_entropy) == rises
    assert (agent.temperature > 0.1) == rises and agent.temperature != 0.1


def test_the_deterministic_action_is_tanh_of_the_mean():
    agent, obs = Agent(make_args(), 3, 2, 2), torch.randn(2, 3)
    mean, log_std = agent.actor(obs, agent.critic.embed(torch.tensor([0, 1])))
    torch.testing.assert_close(agent.act(obs, None), torch.tanh(mean))
    noise = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(agent.act(obs, noise), torch.tanh(mean + log_std.exp() * noise))


# ------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_of_a_fixed_batch_goes_down(variant, rng):
    agent, batch = Agent(make_args(variant=variant, width=32), 3, 2, 2), make_batch(rng)
    losses = [agent.update(batch, torch.randn(64, 2), torch.randn(64, 2))[0]["critic_loss"].item() for _ in range(150)]
    assert all(np.isfinite(losses)) and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def bandit_batch(best: torch.Tensor, terminated: float) -> Batch:
    """Two tasks told apart by their embedding alone: the reward is 5 - 5 (action - best of the task)²."""
    task_id, action = torch.randint(2, (128,)), 2 * torch.rand(128, 1) - 1
    obs = torch.ones(128, 3)
    reward = 5 - 5 * (action[:, 0] - best[task_id]) ** 2
    return Batch(obs, action, reward, torch.full((128,), terminated), obs, task_id)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bandit_is_solved_for_both_tasks(variant, rng):
    best = torch.tensor([0.5, -0.5])
    agent = Agent(make_args(variant=variant, width=64, learning_rate=2e-3, init_temperature=0.01), 3, 1, 2)
    for _ in range(400):
        agent.update(bandit_batch(best, terminated=1.0), torch.randn(128, 1), torch.randn(128, 1))
    test = bandit_batch(best, terminated=1.0)
    with torch.no_grad():
        q = agent.critic.q_values(agent.critic(test.obs, test.action, agent.critic.embed(test.task_id)))
    assert (q - test.reward).abs().mean() < 0.4, "not the reward alone: a terminal state has no value"
    np.testing.assert_allclose(agent.act(torch.ones(2, 3), None)[:, 0], best, atol=0.25)


def test_a_state_that_never_ends_is_worth_its_discounted_rewards(rng):
    # Reward 2 for ever at gamma 0.5 is worth 2 / (1 - 0.5) = 4, whatever the action.
    agent = Agent(make_args(width=32, learning_rate=2e-3, gamma=0.5, tau=0.1, init_temperature=1e-4), 3, 1, 2)
    for _ in range(300):
        batch = bandit_batch(torch.zeros(2), terminated=0.0)._replace(reward=torch.full((128,), 2.0))
        agent.update(batch, torch.randn(128, 1), torch.randn(128, 1))
    np.testing.assert_allclose(agent.value(torch.ones(2, 3)), [4, 4], atol=0.3)


def test_values_are_learned_from_the_target_network(rng):
    # The target is frozen (tau 0) and certain of 6, atom 80 of 101: what is learned is 2 + 0.5 * 6.
    agent = Agent(make_args(width=32, learning_rate=2e-3, gamma=0.5, tau=0.0, init_temperature=1e-4), 3, 1, 2)
    for _, head in agent.target.members:
        head.weight.zero_()
        head.bias[80] = 100
    for _ in range(200):
        batch = bandit_batch(torch.zeros(2), terminated=0.0)._replace(reward=torch.full((128,), 2.0))
        agent.update(batch, torch.randn(128, 1), torch.randn(128, 1))
    np.testing.assert_allclose(agent.value(torch.ones(2, 3)), [5, 5], atol=0.3)


def test_the_learner_knows_values_in_raw_reward_units(rng):
    # Every episode is one step long; its reward is 700 in the first task, -0.03 in the second.
    learner = Learner(make_args(width=32, learning_rate=2e-3, init_temperature=1e-5), 3, 1, CPU, CPU)
    obs, no, yes = np.ones((2, 3), np.float32), np.zeros(2, bool), np.ones(2, bool)
    result = Step(obs, np.array([700, -0.03], np.float32), yes, no, np.full(2, np.nan, np.float32), obs)
    for _ in range(10):
        learner.env_step += 1
        learner.observe(obs, learner.act(obs), result)
    for _ in range(200):
        learner.update()
    np.testing.assert_allclose(learner.raw_value(obs), [700, -0.03], rtol=0.05)


def test_the_learner_stores_and_values_the_true_final_observation():
    learner = Learner(make_args(learning_starts=4), 3, 1, CPU, CPU)
    learner.env_step, learner.normalizer.return_scale[:] = 10, 1.0
    first, final, reset = (np.full((2, 3), number, np.float32) for number in (1, 2, -3))
    value_of_final, value_of_reset = learner.raw_value(final), learner.raw_value(reset)
    no, yes, nothing = np.zeros(2, bool), np.ones(2, bool), np.zeros(2, np.float32)
    learner.observe(first, np.zeros((2, 1), np.float32), Step(final, nothing, no, yes, nothing, reset))
    batch = learner.buffer.sample(20)
    assert (batch.obs == 1).all() and (batch.next_obs == 2).all() and not batch.terminated.any()
    # A reward of 0 and then the critic's value: G = gamma V.
    np.testing.assert_allclose(learner.normalizer.return_scale, 0.99 * np.abs(value_of_final), rtol=1e-5)
    assert not np.allclose(value_of_final, value_of_reset, rtol=1e-2)


def test_only_the_paper_variant_asks_the_critic_and_only_once_it_has_learned():
    obs = np.ones((2, 3), np.float32)
    for variant, env_step, asked in (("paper", 4, False), ("paper", 5, True), ("release", 5, False)):
        learner = Learner(make_args(variant=variant, learning_starts=4), 3, 1, CPU, CPU)
        learner.normalizer.return_scale[:] = 1.0
        learner.env_step = env_step
        assert (learner.raw_value(obs) is not None) == asked


def test_the_start_is_uniformly_random_and_follows_the_seed():
    obs, actions = np.ones((2, 3), np.float32), {}
    for seed in (0, 0, 1):
        learner = Learner(make_args(seed=seed, learning_starts=500), 3, 2, CPU, CPU)
        torch.manual_seed(random.getrandbits(30))  # the learner draws from generators of its own
        actions.setdefault(seed, []).append(np.stack([learner.act(obs) for _ in range(500)]))
    np.testing.assert_array_equal(*actions[0])
    assert not np.array_equal(actions[0][0], actions[1][0])
    shares, _ = np.histogram(actions[0][0], bins=4, range=(-1, 1))
    assert (np.abs(shares / 2000 - 0.25) < 0.05).all()


# ---------------------------------------------------------------------------------------------------- evaluation


class ScriptedEnvs:
    """In place of a VectorEnv: episodes of fixed lengths; every reward is the number of the episode, from 1.

    Task 0 succeeds in the second and third step, and only there, of its odd episodes. Task 1 defines no success.
    """

    tasks, num_envs, obs_dim, act_dim = ("reach", "cartpole-swingup"), 2, 3, 2
    lengths = (7, 3)

    def reset(self, seed: int) -> np.ndarray:
        self.seeds = [*getattr(self, "seeds", []), seed]
        self.rng = np.random.default_rng(seed)
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
        return Step(self.obs, reward, over & [True, False], over & [False, True], success, self.obs)

    def render(self) -> list[np.ndarray]:
        return [np.full((2, 2, 3), self.t[task], np.uint8) for task in range(2)]


@pytest.mark.parametrize(
    ("episodes", "means"),
    # Returns 7·1, 7·2, ... and 3·1, 3·2, ...: further episodes would raise the means.
    [(1, [{"return": 7.0, "score": 1.0, "success": 1.0}, {"return": 3.0, "score": 0.003}]),
     (3, [{"return": 14.0, "score": pytest.approx(2 / 3), "success": pytest.approx(2 / 3)},
          {"return": 6.0, "score": pytest.approx(0.006)}])],
)
def test_evaluation_counts_exactly_the_episodes_asked_for(episodes, means):
    envs = ScriptedEnvs()
    results, frames = brc_sac.evaluate(Agent(make_args(), 3, 2, 2), envs, episodes, seed=5)
    assert results == means and envs.seeds == [5]
    assert len(envs.seen) == 7 * episodes, "it stops with the last episode of the slowest task"
    assert frames == [[], []]


def test_evaluation_is_deterministic_and_touches_no_random_state():
    agent, envs = Agent(make_args(), 3, 2, 2), ScriptedEnvs()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    brc_sac.evaluate(agent, envs, 2, seed=0)
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    with torch.no_grad():
        for obs, action in envs.seen:
            mean, _ = agent.actor(torch.from_numpy(obs), agent.critic.embed(torch.tensor([0, 1])))
            np.testing.assert_allclose(action, torch.tanh(mean), atol=1e-6)


def test_evaluation_films_the_first_episode_of_every_task():
    _, frames = brc_sac.evaluate(Agent(make_args(), 3, 2, 2), ScriptedEnvs(), 2, seed=0, video=True)
    for episode, length in zip(frames, ScriptedEnvs.lengths):
        times = [int(frame[0, 0, 0]) for frame in episode]
        assert times[0] == 0 and times == sorted(set(times)) and times[-1] < length


def test_evaluation_leaves_the_training_environments_alone():
    tasks = ("reach", "cartpole-swingup")  # all in this process, where simulators could share a random state
    envs, eval_envs = VectorEnv(tasks, seed=0), VectorEnv(tasks, seed=0)
    agent, action = Agent(make_args(), envs.obs_dim, envs.act_dim, 2), np.full((2, 4), 0.3, np.float32)

    def trajectory(interrupted: bool) -> np.ndarray:
        observations = [envs.reset(seed=1)]
        for step in range(205):  # reach starts a new episode, with a new goal, after 200
            if interrupted and step == 100:
                brc_sac.evaluate(agent, eval_envs, 1, seed=2)
            observations.append(envs.step(action).obs)
        return np.stack(observations)

    np.testing.assert_array_equal(trajectory(False), trajectory(True))
    envs.close()
    eval_envs.close()


def test_means_over_tasks_and_the_table():
    results = [{"return": 10.0, "score": 0.5, "success": 0.5}, {"return": 30.0, "score": 0.3}]
    assert brc_sac.mean_result(results) == {"return": 20.0, "success": 0.5, "score": pytest.approx(0.4)}
    rows = [line.split() for line in brc_sac.table(("reach", "walker-run"), results).splitlines()]
    assert rows == [["task", "return", "success", "score"], ["reach", "10.0", "0.50", "0.500"],
                    ["walker-run", "30.0", "-", "0.300"], ["mean", "20.0", "0.50", "0.400"]]


# ----------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given_args", "message"),
    [
        (dict(suite="nonsense"), "Unknown suite 'nonsense'.*mw.*demo"),
        (dict(tasks=("reahc",)), "Unknown task 'reahc': did you mean reach"),
        (dict(tasks=("reach", "walker-run", "reach")), "'reach' was given more than once"),
        (dict(tasks=("reach", "Pong")), "Pong is an Atari game.*leave the games out, or use brc_drq.py"),
        (dict(suite="atari"), "Atari game.*leave the games out, or use brc_drq.py"),
        (dict(suite="dmc-dogs", split="pretrain"), "'dmc-dogs' has no pretrain split.*mw"),
        *((dict([(name, value)]), f"--{name.replace('_', '-')} is {value}: give .*{bound}") for name, value, bound in (
            *((name, value, "at least 1") for value in (0, -3) for name in (
                "width", "total_steps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval",
                "updates_per_step", "batch_size", "learning_starts", "buffer_size", "critic_depth", "actor_depth",
                "actor_width", "embedding_dim")),
            ("num_atoms", 1, "2"), ("seed", -1, "0"), ("workers", -1, "0"),
            ("gamma", 1.0, ""), ("gamma", -0.1, "0"), ("gamma", float("nan"), "0"),
            ("tau", 1.5, "1"), ("tau", -0.5, "0"), ("weight_decay", -1e-4, "0"),
            ("learning_rate", 0.0, ""), ("learning_rate", float("nan"), ""), ("learning_rate", float("inf"), ""),
            ("v_max", -10.0, ""), ("v_max", float("inf"), ""), ("init_temperature", 0.0, ""),
        )),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(given_args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((brc_sac.UsageError, suites.SuiteError)) as refusal:
        brc_sac.resolve(Args(**given_args))
    text = str(refusal.value)
    assert re.search(message, text)
    assert "\n" not in text and text[-1] in ".?" and not re.search(r"[.?] [A-Z]", text)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(brc_sac.UsageError, match="not on this machine.*cpu"):
        brc_sac.choose_device(name)


@pytest.mark.parametrize(
    ("given_args", "resolved"),
    [
        (dict(), dict(width=4096, batch_size=1024, learning_starts=5000, total_steps=500_000, eval_interval=25_000,
                      checkpoint_interval=25_000, exp_name="brc_sac-mw-paper", tasks=suites.SUITES["mw"].tasks)),
        (dict(tasks=("ball_in_cup-catch",), variant="release"),
         dict(width=4096, batch_size=256, learning_starts=5000, exp_name="brc_sac-ball_in_cup-catch-release")),
        (dict(tasks=("reach", "walker-run")), dict(batch_size=1024, total_steps=500_000)),
        (dict(tasks=("h1-walk", "reach")), dict(total_steps=1_000_000)),  # the longest budget of the tasks' suites
        (dict(split="pretrain"), dict(exp_name="brc_sac-mw-pretrain-paper", tasks=suites.SUITES["mw"].pretrain)),
        (dict(suite="demo"), dict(tasks=suites.SUITES["demo"].tasks, width=128, batch_size=256, learning_starts=1000)),
        (dict(suite="demo", width=64, batch_size=32, total_steps=7), dict(width=64, batch_size=32, total_steps=7)),
        (dict(suite="demo", tasks=("reach",)), dict(width=4096)),  # a task of one's own is not the demo
        (dict(total_steps=10), dict(total_steps=10, eval_interval=1, checkpoint_interval=1)),
        (dict(eval_interval=50, checkpoint_interval=20), dict(eval_interval=50, checkpoint_interval=20)),
        (dict(gamma=0.0, tau=1.0, weight_decay=0.0, workers=0), dict(gamma=0.0, tau=1.0, weight_decay=0.0, workers=0)),
    ],
)
def test_defaults_depend_on_suite_and_tasks(given_args, resolved):
    args = brc_sac.resolve(Args(**given_args))
    assert {name: getattr(args, name) for name in resolved} == resolved
