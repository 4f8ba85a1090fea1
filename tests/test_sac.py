"""brc_sac.py part by part: against naive models, numbers worked out by hand, and small problems with a known answer."""

import itertools
import random
import tempfile
from pathlib import Path

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
import harness
import suites
from brc_sac import Agent, Args, Batch, ReplayBuffer, ReturnNormalizer
from conftest import SMALL, agent_module
from suites.vector import Step, VectorEnv

VARIANTS = ("paper", "release")


def make_args(**changes) -> Args:
    """Small enough for milliseconds; two tasks, so that there is an embedding."""
    small = dict(tasks=("reach", "cartpole-swingup"), width=16, actor_width=16, batch_size=64, learning_starts=4,
                 total_steps=1000, eval_interval=100, checkpoint_interval=100, compile=False, embedding_norm="l1")
    return Args(**small | changes)


def make_agent(**changes) -> Agent:
    """For 3 observations, 2 actions and 2 tasks."""
    return Agent(make_args(**changes), 3, 2, 2)


def make_batch(num_tasks: int = 2) -> Batch:
    """64 random transitions with 3 observations and 2 actions."""
    obs, action, next_obs, reward = (torch.randn(shape) for shape in ((64, 3), (64, 2), (64, 3), (64,)))
    terminated, task_id = (torch.randint(high, (64,)) for high in (2, num_tasks))
    return Batch(obs, action.tanh(), reward, terminated.float(), next_obs, task_id)


def update(agent: Agent, batch: Batch | None = None) -> dict:
    batch = batch or make_batch()
    return agent.update(batch, *torch.randn(2, *batch.action.shape))[0]


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


@pytest.mark.parametrize("agent", SMALL)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), num_atoms=st.integers(2, 60), v_max=st.floats(0.5, 200),
       spread=st.sampled_from([0.1, 0.5, 1.0, 3.0, 1e6]))
def test_projection_equals_the_naive_loop(agent, seed, num_atoms, v_max, spread):
    rng, project = np.random.default_rng(seed), agent_module(agent).project_categorical
    probs = torch.from_numpy(rng.dirichlet(np.full(num_atoms, 0.3), 4).astype(np.float32))
    atoms, exact_atoms = torch.linspace(-v_max, v_max, num_atoms), np.linspace(-v_max, v_max, num_atoms)
    positions = torch.from_numpy((spread * v_max * rng.normal(size=(4, num_atoms))).astype(np.float32))
    projected = project(probs, positions, atoms)
    assert (projected >= 0).all()
    np.testing.assert_allclose(projected.sum(-1), 1, atol=2e-6)
    np.testing.assert_allclose(projected, naive_projection(probs.numpy(), positions.numpy(), exact_atoms), atol=5e-5)
    np.testing.assert_allclose(project(probs, atoms.expand(4, -1), atoms), probs, atol=2e-5)


@pytest.mark.parametrize("agent", SMALL)
@pytest.mark.parametrize(
    ("position", "where"),
    # Atoms -2, -1, 0, 1, 2: index and mass of what one particle becomes.
    [(0.0, {2: 1.0}), (-2.0, {0: 1.0}), (2.0, {4: 1.0}), (1.0, {3: 1.0}),
     (-7.0, {0: 1.0}), (7.0, {4: 1.0}), (float("inf"), {4: 1.0}), (float("-inf"), {0: 1.0}),
     (0.25, {2: 0.75, 3: 0.25}), (1.9, {3: 0.1, 4: 0.9}), (-1.5, {0: 0.5, 1: 0.5})],
)
def test_projection_of_one_particle(agent, position, where):
    expected = np.zeros(5)
    for index, mass in where.items():
        expected[index] = mass
    # All of the mass lies at `position`, wherever it started: what a terminal state's target is.
    probs, positions = torch.full((1, 5), 0.2), torch.full((1, 5), position)
    projected = agent_module(agent).project_categorical(probs, positions, torch.arange(-2.0, 3))
    np.testing.assert_allclose(projected[0], expected, atol=1e-6)


@pytest.mark.parametrize("agent", SMALL)
def test_clipped_mass_stays_on_the_outermost_atoms_and_nan_reaches_the_loss(agent):
    project = agent_module(agent).project_categorical
    for num_atoms, v_max in itertools.product(range(2, 130), (0.5, 1.0, 7.3, 10.0, 33.0, 150.0)):
        atoms, probs = torch.linspace(-v_max, v_max, num_atoms), torch.full((2, num_atoms), 1 / num_atoms)
        positions = torch.tensor([[-3 * v_max], [3 * v_max]]).expand(2, num_atoms)
        projected = project(probs, positions, atoms)
        assert (projected >= 0).all(), (num_atoms, v_max)
        np.testing.assert_allclose(projected[[0, 1], [0, -1]], 1, atol=2e-5)
    # A network that diverged has to be told from its loss: NaN as an index would be an error without a name.
    assert project(torch.full((1, 5), 0.2), torch.full((1, 5), torch.nan), torch.arange(-2.0, 3)).isnan().any()


# --------------------------------------------------------------------------------------------------------- losses


def test_targets_bootstrap_after_truncations_and_not_after_terminations():
    # gamma 0.5, alpha 0.1, log pi -10 (entropy bonus 1), atoms -2, 0, 2.
    batch = Batch(None, None, torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0]), None, None)
    log_prob, alpha, atoms = torch.full((2,), -10.0), torch.tensor(0.1), torch.tensor([-2.0, 0.0, 2.0])
    positions = brc_sac.target_positions(batch, log_prob, alpha, atoms, gamma=0.5)
    np.testing.assert_allclose(positions, [[2.5, 3.5, 4.5], [3.0, 3.0, 3.0]])


class Fixed(torch.nn.Module):
    """A critic or target of two members with these logits, or an actor with this mean and log-std, for any input."""

    atoms = torch.tensor([-1.0, 0.0, 1.0])
    q_values = brc_sac.Critic.q_values

    def __init__(self, *outputs: torch.Tensor):
        super().__init__()
        self.outputs, self.inputs = outputs, []

    def embed(self, task_id):
        return torch.zeros(len(task_id), 0)

    def forward(self, *inputs):
        self.inputs.append(inputs)
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def test_the_losses_by_hand():
    # One transition with reward 0.5, gamma 0.5, alpha 0.1. Action tanh(0 + 1 * 0) = 0 with log pi = -log(2 pi)/2.
    batch = Batch(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.5]), torch.zeros(1), torch.ones(1, 1),
                  torch.tensor([0]))
    log_prob, alpha, noise = -0.918939, torch.tensor(0.1), torch.zeros(1, 1)
    actor = Fixed(torch.zeros(1, 1), torch.zeros(1, 1))
    target = Fixed(torch.tensor([[[0.0, -99, -99]], [[-99, -99, 0.0]]]))  # certain of -1, and of 1: half each
    critic = Fixed(torch.log(torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.1, 0.8]]])))
    loss, metrics = brc_sac.critic_loss(critic, target, actor, alpha, 0.5, batch, noise)
    # 0.5 + 0.5 (-1 + 0.0918939) = 0.0459470 and 0.5 + 0.5 (1 + 0.0918939) = 1.0459470, clipped to 1.
    p = np.array([0, 0.5 * (1 - 0.0459470), 0.5 * 0.0459470 + 0.5])
    assert loss.item() == pytest.approx(-(p * np.log([0.5, 0.3, 0.2])).sum() - (p * np.log([0.1, 0.1, 0.8])).sum())
    assert metrics["target_q"].item() == pytest.approx(p[2])
    ((_, action, _),), ((next_obs, next_action, _),) = critic.inputs, target.inputs
    assert (action, next_action, next_obs) == (1, 0, 1)
    loss, log_probs, metrics = brc_sac.actor_loss(critic, actor, alpha, batch, noise)
    q = (0.2 + 0.8) / 2 - (0.5 + 0.1) / 2
    assert log_probs.item() == pytest.approx(log_prob) and metrics["entropy"].item() == pytest.approx(-log_prob)
    assert loss.item() == pytest.approx(0.1 * log_prob - q) and metrics["q"].item() == pytest.approx(q)
    log_alpha = torch.tensor(0.1).log().requires_grad_()
    loss = brc_sac.temperature_loss(log_alpha, torch.tensor(3.0), -1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.4) and log_alpha.grad.item() == pytest.approx(0.4)


# ------------------------------------------------------------------------------------------------- replay buffer


class Stream:
    """Unending episodes of every task, whose observations, actions and rewards are all different numbers.

    plans: per task, the (length, end) of its episodes, repeated for ever; end is terminated 1, truncated 2 or both 3.
    `rows` is the naive model of a buffer: per task, a list of all transitions; `ends` the steps that ended episodes.
    """

    def __init__(self, plans: list[list[tuple[int, int]]]):
        self.numbers, self.plans = itertools.count(1), [itertools.cycle(plan) for plan in plans]
        self.rows: list[list] = [[] for _ in plans]
        self.oldest = 0  # what a ring has lost stays lost
        self.episodes, self.steps, self.ends = [next(plan) for plan in self.plans], [0 for _ in plans], []
        self.obs = self.draw(2)

    def draw(self, width: int) -> np.ndarray:
        return np.array([[next(self.numbers)] * width for _ in self.plans], np.float32)

    def feed(self, num_steps: int, *buffers: ReplayBuffer) -> None:
        for _ in range(num_steps):
            action, reward, next_obs, reset_obs = self.draw(1), self.draw(1)[:, 0], self.draw(2), self.draw(2)
            terminated, truncated = np.zeros((2, len(self.plans)), bool)
            for task, (length, end) in enumerate(self.episodes):
                self.steps[task] += 1
                over = self.steps[task] == length
                terminated[task], truncated[task] = over and end & 1, over and end & 2
                self.rows[task].append((task, self.obs[task, 0], action[task, 0], reward[task], float(terminated[task]),
                                        next_obs[task, 0]))
            for buffer in buffers:
                buffer.add(self.obs, action, reward, terminated, truncated, next_obs)
            self.begin(np.flatnonzero(terminated | truncated))
            self.obs = np.where((terminated | truncated)[:, None], reset_obs, next_obs)

    def begin(self, tasks: np.ndarray) -> None:
        for task in tasks:
            self.ends.append(len(self.rows[0]) - 1)
            self.episodes[task], self.steps[task] = next(self.plans[task]), 0

    def cut(self, *buffers: ReplayBuffer) -> None:
        """As a resume does: the running episodes end, and new ones begin."""
        running = np.flatnonzero(self.steps)
        for buffer in buffers:
            buffer.end_episodes(running)
        self.begin(running)
        self.obs = self.draw(2)

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
    steps, room = len(stream.rows[0]), len(buffer.last_obs)
    stream.oldest = max(stream.oldest, steps - buffer.capacity, *(end + 1 for end in stream.ends[-room:-room + 1]))
    assert buffer.window.tolist() == [stream.oldest, steps - stream.oldest]
    assert sampleable(buffer) == stream.last(steps - stream.oldest)


def plans_of(min_length: int, max_length: int):
    episode = st.tuples(st.integers(min_length, max_length), st.integers(1, 3))
    return st.lists(st.lists(episode, min_size=1, max_size=5), min_size=1, max_size=3)


def make_buffer(stream: Stream, capacity: int) -> ReplayBuffer:
    return ReplayBuffer(len(stream.plans), obs_dim=2, act_dim=1, capacity=capacity)


@settings(deadline=None, max_examples=50)
@given(plans=plans_of(1, 12) | plans_of(1, 1) | plans_of(16, 40), capacity=st.integers(1, 40),
       bouts=st.lists(st.tuples(st.integers(1, 60), st.none() | st.integers(1, 40)), min_size=1, max_size=5))
def test_buffer_samples_exactly_what_a_list_of_episodes_holds(plans, capacity, bouts):
    """With a checkpoint after each bout and, where a bout names another capacity, a resume with that."""
    stream = Stream(plans)
    buffer, saved = make_buffer(stream, capacity), {}
    with tempfile.TemporaryDirectory() as folder:
        for num_steps, new_capacity in bouts:
            stream.feed(num_steps, buffer)
            assert_holds(buffer, stream)
            saved = {"replay": harness.append_replay(Path(folder), buffer, saved)}
            if new_capacity:
                same, other = make_buffer(stream, buffer.capacity), make_buffer(stream, new_capacity)
                for loaded in (same, other):
                    loaded.load_state_dict(buffer.state_dict())
                    harness.load_replay(Path(folder), loaded, saved)
                stream.cut(buffer, same, other)
                batches = []
                for ring in (buffer, same):
                    torch.manual_seed(1)
                    batches.append(ring.sample(300))
                assert all(map(torch.equal, *batches))
                buffer = other
                assert_holds(buffer, stream)


@settings(deadline=None, max_examples=30)
@given(plans=plans_of(16, 20), capacity=st.integers(1, 40) | st.sampled_from([63, 64, 65, 80]))
def test_buffer_keeps_its_whole_capacity_when_episodes_have_16_steps(plans, capacity):
    stream = Stream(plans)
    buffer = make_buffer(stream, capacity)
    for num_steps in (capacity, 61, 64, 1, 1, 1, 330):
        stream.feed(num_steps, buffer)
        assert buffer.window.tolist()[1] == capacity and sampleable(buffer) <= stream.last(capacity)


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
        return np.ones(self.observation_space.shape, np.float32), float(action.sum()), False, False, {"success": 0.0}


def learned(args: Args) -> tuple[Agent, ReturnNormalizer, ReplayBuffer]:
    """What a resume finds in the last checkpoint of a run."""
    agent = Agent(args, *torch.load(Path(args.run_dir) / "checkpoint.pt", weights_only=True)["agent"]["sizes"])
    normalizer = ReturnNormalizer(args, len(args.tasks), agent.sizes[1])
    buffer = ReplayBuffer(len(args.tasks), *agent.sizes[:2], min(args.buffer_size, args.total_steps))
    brc_sac.restore(harness.read_checkpoint(Path(args.run_dir), buffer), agent, normalizer, buffer)
    return agent, normalizer, buffer


def test_mixed_embodiments_are_padded(sac, monkeypatch):
    sizes, seen = {"reach": (2, 3), "drawer-close": (5, 1)}, []
    monkeypatch.setattr(suites, "make", lambda task, seed, render_mode=None, **_: SliceEnv(*sizes[task]))
    monkeypatch.setattr(brc_sac, "evaluate", lambda *args: ([], []))
    act = Agent.act
    monkeypatch.setattr(Agent, "act", lambda self, obs, noise: seen.append(obs.clone()) or act(self, obs, noise))
    args = sac.args(total_steps=230, learning_starts=200)
    brc_sac.train(args)
    agent, _, buffer = learned(args)
    assert agent.sizes == (5, 3, 2, 2) and len(seen) >= 30
    shares, _ = np.histogram(buffer.rows[:200, :, 5:8], bins=4, range=(-1, 1))
    assert (np.abs(shares / 1200 - 0.25) < 0.06).all(), "the start is uniformly random"
    assert agent.critic.members[0][0].dense0.in_features == 5 + 3 + 32
    batch = buffer.sample(200)
    assert (batch.action != 0).all() and (batch.action.abs() <= 1).all()
    for task, (obs_dim, act_dim) in enumerate(sizes.values()):
        mine = batch.task_id == task
        for padded in (batch.obs[mine], batch.next_obs[mine], seen[-1][task:task + 1]):
            assert (padded[:, :obs_dim] == 1).all() and (padded[:, obs_dim:] == 0).all()
        np.testing.assert_allclose(batch.action[mine, :act_dim].sum(-1), batch.reward[mine], atol=1e-6)


# ---------------------------------------------------------------------------------------------- return normaliser


def make_normalizer(variant: str, num_tasks: int = 1, act_dim: int = 4) -> ReturnNormalizer:
    return ReturnNormalizer(make_args(variant=variant, gamma=0.5), num_tasks, act_dim)


def finish_episode(normalizer: ReturnNormalizer, rewards: list, end: str, last_value: float | None = None) -> None:
    """An episode of a single task; `end` is how it ends: terminated, truncated or both."""
    value = None if last_value is None else np.array([last_value], np.float32)
    for t, reward in enumerate(rewards, 1 - len(rewards)):
        terminated, truncated = (np.array([t == 0 and end in (way, "both")]) for way in ("terminated", "truncated"))
        normalizer.observe(np.array([reward], np.float32), terminated, truncated, None if t else value)


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


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_embeddings_have_unit_norm_and_stay_so(norm, order):
    agent = make_agent(embedding_norm=norm, learning_rate=0.1)
    for _ in range(3):
        before = agent.critic.embed(agent.task_ids).detach()
        np.testing.assert_allclose(before.norm(order, dim=-1), [1, 1], rtol=1e-5)
        update(agent)
        assert (agent.critic.embed(agent.task_ids) - before).abs().max() > 1e-3  # they learn
    weight = brc_sac.TaskEmbedding(2000, 32, norm).weight
    assert weight.mean().abs() < 0.003 and weight.var().item() == pytest.approx(1 / 32, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_task_has_no_embedding(variant):
    agent = Agent(make_args(variant=variant, tasks=("reach",)), 3, 2, 1)
    assert agent.critic.embedding is None
    assert agent.critic.members[0][0].dense0.in_features == 3 + 2 and agent.actor.body.dense0.in_features == 3
    update(agent, make_batch(num_tasks=1))
    assert agent.act(torch.zeros(1, 3), None).shape == (1, 2) and agent.value(torch.zeros(1, 3)).shape == (1,)


def test_networks_start_orthogonal_with_the_release_gains():
    agent = make_agent()
    modules = [*agent.critic.named_modules(), *agent.actor.named_modules()]
    for name, layer in modules:
        if isinstance(layer, torch.nn.Linear):
            gain = 1 if name == "log_std" else 2**0.5
            np.testing.assert_allclose(torch.linalg.svdvals(layer.weight.detach()), gain, rtol=1e-4, err_msg=name)
            assert not layer.bias.any()
    norms = [layer for _, layer in modules if isinstance(layer, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 5 + 3 and {norm.eps for norm in norms} == {1e-6}
    first, second = (member[0].dense0.weight for member in agent.critic.members)
    assert not torch.equal(first, second), "an ensemble of twins"
    for parameter, copy in zip(agent.critic.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(parameter, copy) and parameter is not copy and not copy.requires_grad


def test_blocks_are_residual_and_end_without_an_activation():
    net, x = brc_sac.BroNet(3, 16, depth=2), torch.randn(5, 3)
    for block in net.blocks:  # now each one adds -3 to its input, and nothing else
        block.ln2.weight.data.zero_()
        block.ln2.bias.data.fill_(-3)
    stem = torch.relu(net.ln0(net.dense0(x)))
    assert (stem > 0).any() and (stem == 0).any()
    torch.testing.assert_close(net(x), stem - 6)


def test_the_policy_is_a_squashed_gaussian():
    agent, obs = make_agent(), torch.randn(2, 3)
    mean, log_std = agent.actor(obs, agent.critic.embed(torch.tensor([0, 1])))
    torch.testing.assert_close(agent.act(obs, None), torch.tanh(mean))
    noise = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(agent.act(obs, noise), torch.tanh(mean + log_std.exp() * noise))
    for bias, bound in ((-50, -10), (50, 2), (0, -4)):
        agent.actor.log_std.weight.data.zero_()
        agent.actor.log_std.bias.data.fill_(bias)
        _, log_std = agent.actor(obs, agent.critic.embed(agent.task_ids))
        torch.testing.assert_close(log_std, torch.full((2, 2), float(bound)))
    # Its density on [-1, 1], from samples on a fine grid of noise, integrates to 1.
    noise = torch.linspace(-8, 8, 100_001, dtype=torch.float64).unsqueeze(-1)
    for mean, log_std in [(0.0, 0.0), (1.5, -1.0), (-3.0, 0.5)]:
        action, log_prob = brc_sac.sample_action(torch.tensor(mean), torch.tensor(log_std), noise)
        assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-4)
    mean, log_std = torch.tensor([[50.0, -50.0]]), torch.tensor([[2.0, -10.0]])
    action, log_prob = brc_sac.sample_action(mean, log_std, torch.zeros(1, 2))
    assert action.tolist() == [[1, -1]]
    # Where tanh saturates: -log_std - log(2 pi)/2 - 2 (log 2 - |u|) each: -2.9189 + 98.6137 and 9.0811 + 98.6137
    np.testing.assert_allclose(log_prob, 203.3896, rtol=1e-6)


def parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_the_actor_step_leaves_critic_and_embedding_alone():
    # Two agents that differ in the noise of their actor step only: nothing of it may reach the critic or its target.
    batch, next_noise, agents = make_batch(), torch.randn(64, 2), []
    for shift in (0, 1):
        torch.manual_seed(0)
        agents.append(make_agent())
        before = parameters_of(agents[-1].critic)
        agents[-1].update(batch, next_noise, torch.randn(64, 2) + shift)
    first, second = agents
    for part in ("critic", "target"):
        assert all(map(torch.equal, getattr(first, part).parameters(), getattr(second, part).parameters())), part
    gradients = zip(first.critic.parameters(), second.critic.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients), "work for nothing: nobody uses these gradients"
    assert not any(map(torch.equal, before, first.critic.parameters())), "the critic step moves every parameter"
    assert not torch.equal(first.actor.body.dense0.weight, second.actor.body.dense0.weight)


def test_each_loss_has_gradients_for_its_own_network_only():
    agent, batch, noise = make_agent(), make_batch(), torch.randn(64, 2)
    loss, _ = brc_sac.critic_loss(agent.critic, agent.target, agent.actor, agent.temperature, 0.99, batch, noise)
    loss.backward()
    assert all(parameter.grad.any() for parameter in agent.critic.parameters()), "the embedding too"
    assert all(parameter.grad is None for part in (agent.actor, agent.target) for parameter in part.parameters())
    loss, log_prob, _ = brc_sac.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise)
    assert not log_prob.requires_grad
    assert torch.autograd.grad(loss, agent.critic.embedding.weight, retain_graph=True, allow_unused=True) == (None,)
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, list(agent.actor.parameters())))
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


def updated(precision: str):
    """An agent after one update of this precision from a fixed start, its metrics and low-precision operators."""
    torch.manual_seed(0)
    agent = make_agent(precision=precision, width=64)
    with ProductTypes() as operators:
        metrics = update(agent)
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


def test_an_update_takes_its_steps_in_the_papers_order(monkeypatch):
    agent, order = make_agent(), []
    for owner, name in ((agent, "critic_loss"), (agent, "actor_loss"), (brc_sac, "temperature_loss"),
                        (torch, "_foreach_lerp_")):
        of = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, of=of, name=name: order.append(name) or of(*args))
    names = ("critic_optimizer", "actor_optimizer", "temperature_optimizer")
    for name in names:
        getattr(agent, name).register_step_post_hook(lambda *_, name=name: order.append(name))
    update(agent)
    assert order == ["critic_loss", names[0], "_foreach_lerp_", "actor_loss", names[1], "temperature_loss", names[2]]


def test_the_target_follows_the_new_critic_by_tau():
    agent = make_agent(learning_rate=0.01, tau=0.25)
    old_target = parameters_of(agent.target)
    update(agent)
    for old, target, critic in zip(old_target, agent.target.parameters(), agent.critic.parameters(), strict=True):
        assert not torch.equal(old, critic)
        torch.testing.assert_close(target, 0.75 * old + 0.25 * critic)


@pytest.mark.parametrize(("log_std_bias", "rises"), [(-3.0, True), (1.0, False)])
def test_the_temperature_moves_towards_the_target_entropy(log_std_bias, rises):
    agent = make_agent()
    for head, bias in ((agent.actor.mean, 0.0), (agent.actor.log_std, log_std_bias)):
        head.weight.data.zero_()
        head.bias.data.fill_(bias)
    metrics = update(agent)
    assert agent.target_entropy == -1 and (metrics["entropy"] < -1) == rises
    assert (agent.temperature > 0.1) == rises and agent.temperature != 0.1


# ------------------------------------------------------------------------------------------------------ learning


def bandit_batch() -> Batch:
    """Two tasks told apart by their embedding alone: the reward is 5 - 5 (action ∓ 0.5)², and the episode ends."""
    task_id, action, obs = torch.randint(2, (128,)), 2 * torch.rand(128, 1) - 1, torch.ones(128, 3)
    reward = 5 - 5 * (action[:, 0] - torch.tensor([0.5, -0.5])[task_id]) ** 2
    return Batch(obs, action, reward, torch.ones(128), obs, task_id)


def test_a_bandit_is_solved_for_both_tasks():
    agent = Agent(make_args(width=32, learning_rate=4e-3, init_temperature=0.01), 3, 1, 2)
    for _ in range(250):
        update(agent, bandit_batch())
    test = bandit_batch()
    with torch.no_grad():
        q = agent.critic.q_values(agent.critic(test.obs, test.action, agent.critic.embed(test.task_id)))
    assert (q - test.reward).abs().mean() < 0.4, "not the reward alone: a terminal state has no value"
    np.testing.assert_allclose(agent.act(torch.ones(2, 3), None)[:, 0], [0.5, -0.5], atol=0.25)


# -------------------------------------------------------------------------------------------------- training loop


class Scripted(gym.Env):
    """Episodes of three steps that end by truncation; observes the step's number, from a reset -3; rewards of 0."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.full(3, -3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t, np.float32), self.reward(self.t), False, self.t == 3, {"success": 0.0}


@pytest.mark.parametrize(("variant", "overlap"), [("paper", True), ("paper", False), ("release", True)])
def test_the_loop_stores_and_values_the_true_final_observation(sac, monkeypatch, variant, overlap):
    """From the second step on, the updates see it; only the paper's variant asks the critic, once it has learned."""
    asked, sizes, value, sample = [], [], brc_sac.raw_value, ReplayBuffer.sample
    monkeypatch.setattr(suites, "make", lambda task, seed, render_mode=None, **_: Scripted())
    monkeypatch.setattr(Scripted, "reward", lambda self, t: 0.0, raising=False)
    monkeypatch.setattr(brc_sac, "raw_value", lambda agent, normalizer, obs: asked.append(obs) or np.full(2, 8.0))
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, size: sizes.append(self.steps) or sample(self, size))
    args = sac.args(variant=variant, overlap=overlap, learning_starts=6, total_steps=12, gamma=0.5)
    brc_sac.train(args)
    assert sizes == list(range(6 + (not overlap), 12 + (not overlap)))
    assert [obs.tolist() for obs in asked] == [[[3] * 3] * 2] * 2  # after 9 and 12 steps, never -3
    monkeypatch.setattr(brc_sac, "raw_value", value)
    _, normalizer, buffer = learned(args)
    batch = buffer.sample(200)
    assert set(zip(batch.obs[:, 0].tolist(), batch.next_obs[:, 0].tolist())) == {(-3, 1), (1, 2), (2, 3)}
    assert not batch.terminated.any()
    # Rewards of 0 and then the critic's value: gamma V. The release takes the mean reward in its place.
    assert normalizer.return_scale.tolist() == [4, 4] if variant == "paper" else [0, 0]


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
    agent, envs = make_agent(), ScriptedEnvs()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    results, frames = brc_sac.evaluate(agent, envs, episodes, seed=5)
    assert results == means and envs.seed == 5 and frames == [[], []]
    assert len(envs.seen) == 7 * episodes, "it stops with the last episode of the slowest task"
    # The actions are the means; no random state is touched.
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    for obs, action in envs.seen:
        np.testing.assert_allclose(action, agent.act(torch.from_numpy(obs), None), atol=1e-6)
    assert brc_sac.evaluate(agent, envs, episodes, seed=5, stop=lambda: len(envs.seen) > 2) == ([], [])


def test_evaluation_films_the_first_episode_of_every_task():
    _, frames = brc_sac.evaluate(make_agent(), ScriptedEnvs(), 2, seed=0, video=True)
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
    assert suites.mean_result(results) == {"return": 20.0, "success": 0.5, "score": pytest.approx(0.4)}
    rows = [line.split() for line in suites.table(("reach", "walker-run"), results).splitlines()]
    assert rows == [["task", "return", "success", "score"], ["reach", "10.0", "0.50", "0.500"],
                    ["walker-run", "30.0", "-", "0.300"], ["mean", "20.0", "0.50", "0.400"]]


# ----------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given_args", "resolved"),
    [
        (dict(), dict(width=4096, batch_size=1024, learning_starts=5000, total_steps=500_000, eval_interval=25_000,
                      checkpoint_interval=25_000, exp_name="brc_sac-mw-paper", tasks=suites.SUITES["mw"].tasks,
                      embedding_norm="l1")),
        (dict(tasks=("ball_in_cup-catch",), variant="release"),
         dict(width=4096, batch_size=256, exp_name="brc_sac-ball_in_cup-catch-release", embedding_norm="l2")),
        (dict(tasks=("h1-walk", "reach")),  # the longest of the budgets
         dict(batch_size=1024, total_steps=1_000_000, eval_interval=25_000)),
        (dict(split="pretrain"), dict(exp_name="brc_sac-mw-pretrain-paper", tasks=suites.SUITES["mw"].pretrain)),
        (dict(suite="demo"), dict(tasks=suites.SUITES["demo"].tasks, width=128, batch_size=256, learning_starts=1000)),
        (dict(suite="demo", width=64, batch_size=32), dict(width=64, batch_size=32)),
        (dict(suite="demo", tasks=("reach",)), dict(width=4096)),  # a task of one's own is not the demo
        (dict(total_steps=10, learning_starts=5), dict(total_steps=10, eval_interval=1, checkpoint_interval=1)),
        (dict(eval_interval=50, checkpoint_interval=20), dict(eval_interval=50, checkpoint_interval=20)),
        (dict(gamma=0.0, tau=1.0, weight_decay=0.0, workers=0), dict(gamma=0.0, tau=1.0, weight_decay=0.0, workers=0)),
    ],
)
def test_defaults_depend_on_suite_and_tasks(given_args, resolved):
    args = brc_sac.resolve(Args(**given_args))
    assert {name: getattr(args, name) for name in resolved} == resolved
