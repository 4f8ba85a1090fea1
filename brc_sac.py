"""BRC on SAC: one large, regularised, categorical value network trained on many continuous-control tasks online.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners", arXiv 2505.23150.
SAC + two BroNet critics with categorical cross-entropy TD + learned task embeddings + per-task return normalisation.

    python brc_sac.py --suite demo                          three MetaWorld tasks on a laptop's CPU, minutes
    python brc_sac.py --suite mw --width 4096               MetaWorld-50 as in the paper (one GPU)
    python brc_sac.py --suite mw --split pretrain           the 45 tasks that the paper pretrains on, for transfer.py
    python brc_sac.py --tasks ball_in_cup-catch             single-task mode: batch 256, no task embedding
    python brc_sac.py --tasks walker-run reach hopper-hop   any mix of tasks; observations and actions are padded
    python brc_sac.py --resume runs/<run>                   go on after a crash or a kill
    torchrun --nproc-per-node 8 brc_sac.py --suite sh --width 8192     several GPUs: tasks and batch are dealt out

Sections, in reading order:
    arguments           every hyper-parameter, with its source
    networks            BroNet, Critic, Actor, TaskEmbedding
    return normaliser   one reward scale per task
    replay buffer       one row per step of all tasks, every observation stored once
    losses              the categorical projection and the three losses
    agent               the six steps of one update
    evaluation          deterministic episodes in environments of their own
    training loop       act, step and update, store, log

Run directory, logs, checkpoint files and signals are in harness.py, which no idea about the method has to touch.
Shapes: B batch, E ensemble, K atoms, N tasks, O observation, A action, H width.
"""

import copy
import dataclasses
import math
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import harness
import progress
import suites
from harness import UsageError
from suites.vector import EnvError, VectorEnv

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    """Train BRC (SAC) on many continuous-control tasks with one network."""

    suite: str = "mw"
    """Task collection: mw, dmc-dogs, dmc-humanoids, hb-medium, hb-hard, sh, mw-dmc or demo."""
    tasks: tuple[str, ...] | None = None
    """Task names, in place of --suite's; any names the suites know. One task = single-task mode."""
    split: Literal["all", "pretrain"] = "all"
    """All of the suite's tasks, or those that the paper pretrains on before transfer."""
    goals: Literal["fresh", "frozen"] | None = None
    """MetaWorld's goals: drawn anew every episode, or once for a whole run as in the release; default by --variant."""
    seed: int = 0
    """Seed of networks, noise and environments."""
    total_steps: int | None = None
    """Environment steps per task; default the suite's budget in the paper."""
    workers: int | None = None
    """Processes that step the environments (0 = in this process); default by the number of cores."""
    assets: str | None = None
    """ShadowHand's folder dex_envs/assets; default $SHADOWHAND_ASSETS."""

    run_dir: str | None = None
    """Where to write; default runs/<exp>__<seed>__<time>."""
    exp_name: str | None = None
    """Name in metrics.csv; default <script>-<suite>-<variant>, or -<tasks>- with --tasks."""
    resume: str | None = None
    """Run directory to continue from its last complete checkpoint; all other arguments are read from there."""
    evaluate: str | None = None
    """Run directory whose agent to evaluate, and nothing else; all other arguments are read from there."""
    track: bool = False
    """Also log to Weights & Biases (pip install wandb), project brc or $WANDB_PROJECT."""
    capture_video: bool = False
    """Record the first evaluation episode of every task as a GIF, in <run dir>/videos and in TensorBoard."""
    eval_interval: int | None = None
    """Environment steps per task between evaluations; default 25,000 (release), in a short run a twentieth of it."""
    eval_episodes: int | None = None
    """Evaluation episodes per task; default 10, demo 5."""
    log_interval: int = 500
    """Environment steps per task between TensorBoard scalars."""
    checkpoint_interval: int | None = None
    """Environment steps per task between checkpoints; default every evaluation."""
    save_replay: bool = True
    """Keep the replay in the checkpoints; without it a run serves --evaluate and transfer.py, but not --resume."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    replay_device: str | None = None
    """Device of the replay buffer; default the training device."""
    threads: int | None = None
    """Threads of torch on a CPU; default OMP_NUM_THREADS, or as many as make steps fastest, tried while it trains."""
    precision: Literal["tf32", "bf16", "fp32"] = "tf32"
    """Of matrix products: bf16 in the critics' bodies only, tf32 on NVIDIA GPUs only; all else is float32."""
    compile: bool = True
    """torch.compile the losses, where there is a C++ compiler and the run is of 20,000 updates or more."""
    cuda_graph: bool = True
    """Launch all updates of an environment step as one CUDA graph, where networks and replay are on one NVIDIA GPU."""
    overlap: bool = True
    """Update while the environments step (the newest transition is then sampled one step later); off = step first."""

    variant: Literal["paper", "release"] = "paper"
    """Where the paper's text and the authors' code differ, follow the text or the code; see docs/choices.md."""
    width: int | None = None
    """Critic width H in units; default 4096 (paper), for the demo 128."""
    critic_depth: int = 2
    """Residual blocks of each critic (paper)."""
    actor_width: int | None = None
    """Actor width in units; default 256 (paper), for the demo 128."""
    actor_depth: int = 1
    """Residual blocks of the actor (paper)."""
    embedding_dim: int = 32
    """Numbers per task embedding (paper)."""
    embedding_norm: Literal["l1", "l2"] | None = None
    """Norm of every task embedding, which is 1; default by --variant: l1 (paper, C.4) or l2 (release)."""
    num_atoms: int = 101
    """Atoms K of the categorical value (paper)."""
    v_max: float = 10.0
    """Support [-v_max, v_max] of the normalised value (paper)."""
    updates_per_step: int = 2
    """Gradient updates per environment step of all tasks in parallel (paper)."""
    batch_size: int | None = None
    """Transitions per update over all tasks; default 1024 multi-task, 256 single-task (paper), demo 128."""
    learning_starts: int | None = None
    """Random environment steps per task before the first update; default 5000 (release), demo 1000."""
    buffer_size: int = 1_000_000
    """Replay capacity in transitions per task (paper)."""
    learning_rate: float | None = None
    """AdamW step size of critic and actor, Adam's of the temperature; default 3e-4 (paper), demo 6e-4."""
    weight_decay: float = 1e-4
    """Decoupled, on every parameter of critic and actor: biases, LayerNorm and embedding too (release)."""
    gamma: float | None = None
    """Discount per environment step; default 0.99 (paper), demo 0.95."""
    tau: float | None = None
    """Polyak coefficient of the target critics, every update; default 0.005 (paper), demo 0.02."""
    init_temperature: float | None = None
    """Initial entropy temperature alpha; default 0.1 (paper, Table 3), demo 0.01."""


PAPER = dict(width=4096, actor_width=256, learning_starts=5000, learning_rate=3e-4, gamma=0.99, tau=0.005,
             init_temperature=0.1)
# What a laptop's CPU can do in minutes; measured in benchmarks/README.md.
DEMO = dict(width=128, actor_width=128, batch_size=128, learning_starts=1000, learning_rate=6e-4, gamma=0.95,
            tau=0.02, init_temperature=0.01, eval_interval=1000, eval_episodes=5)


def resolve(args: Args) -> Args:
    """Fills in the defaults that depend on other arguments. Raises UsageError or suites.SuiteError for bad ones."""
    if args.assets:  # through the environment, which the worker processes inherit
        args = dataclasses.replace(args, assets=os.path.abspath(args.assets))
        os.environ["SHADOWHAND_ASSETS"] = args.assets
    tasks = suites.resolve(args.suite, args.tasks, args.split)
    goals = suites.resolve_goals(tasks, args.goals, {"paper": "fresh", "release": "frozen"}[args.variant])
    if games := [task for task in tasks if suites.benchmark(task) is suites.atari]:
        raise UsageError(f"{games[0]} is an Atari game, played from pixels: {Path(__file__).name} runs continuous "
                         "control only, so leave the games out, or use brc_drq.py for them.")
    label = args.suite + "-pretrain" * (args.split == "pretrain")
    if args.tasks:
        label = "-".join(tasks) if len(tasks) <= 3 else f"{len(tasks)}tasks"
    defaults = PAPER | {
        "batch_size": 1024 if len(tasks) > 1 else 256, "eval_episodes": 10,
        "total_steps": suites.steps(tasks) if args.tasks else suites.SUITES[args.suite].steps,
        "exp_name": f"{harness.PROGRAM.stem}-{label}-{args.variant}",
        "embedding_norm": {"paper": "l1", "release": "l2"}[args.variant],
    } | (DEMO if args.suite == "demo" and not args.tasks else {})
    args = harness.fill(dataclasses.replace(args, tasks=tasks, goals=goals), **defaults)
    args = harness.fill(args, eval_interval=min(25_000, max(1, args.total_steps // 20)))
    args = harness.fill(args, checkpoint_interval=args.eval_interval)
    harness.check_range(args, 1, math.inf, "width", "eval_interval", "eval_episodes", "log_interval",
                        "checkpoint_interval", "updates_per_step", "batch_size", "learning_starts", "buffer_size",
                        "critic_depth", "actor_depth", "actor_width", "embedding_dim", "threads")
    harness.check_range(args, 0, 2**32 - 43, "seed")  # NumPy's most; evaluation's is 42 more
    harness.check_range(args, 0, 1e12, "workers", "weight_decay", "total_steps")  # 0: to evaluate alone
    harness.check_range(args, 2, math.inf, "num_atoms")
    harness.check_range(args, 1e-12, 1e6, "learning_rate", "v_max", "init_temperature")
    harness.check_range(args, 0, 0.99999, "gamma")
    harness.check_range(args, 0, 1, "tau")
    if args.total_steps <= args.learning_starts and not args.evaluate:
        raise UsageError(f"With --total-steps {args.total_steps} and --learning-starts {args.learning_starts} nothing "
                         "would be learned: give more steps, or a smaller --learning-starts.")
    worth = (args.total_steps - args.learning_starts) * args.updates_per_step >= 20_000
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return dataclasses.replace(args, compile=args.compile and worth and compiler)


# Parsed before torch is imported, so that --help and a mistyped name answer at once.
ARGS = harness.exit_on_error(harness.parse_args, Args, resolve) if __name__ == "__main__" else None

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
import devices  # noqa: E402

# -------------------------------------------------------------------------------------------------------- networks


class Dense(nn.Linear):
    """Linear layer with orthogonal weights and zero bias (release); float32 out, also under autocast to bf16."""

    def __init__(self, in_features: int, out_features: int, gain: float = 2**0.5):
        super().__init__(in_features, out_features)
        nn.init.orthogonal_(self.weight, gain)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)  # flax's epsilon; torch's default is 1e-5


class BroNetBlock(nn.Module):
    """x + LN(W2 relu(LN(W1 x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.dense1, self.ln1 = Dense(width, width), layer_norm(width)
        self.dense2, self.ln2 = Dense(width, width), layer_norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ln2(self.dense2(F.relu(self.ln1(self.dense1(x)))))


class BroNet(nn.Module):
    """Regularised residual network (Nauman et al. 2024; BRC section 3). No activation after the last block."""

    def __init__(self, in_features: int, width: int, depth: int):
        super().__init__()
        self.dense0, self.ln0 = Dense(in_features, width), layer_norm(width)
        self.blocks = nn.Sequential(*(BroNetBlock(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.ln0(self.dense0(x))))  # [B, H]


class TaskEmbedding(nn.Module):
    """One learned vector per task, scaled to unit L1 norm (paper, appendix C.4) or unit L2 norm (release)."""

    def __init__(self, num_tasks: int, dim: int, norm: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim) / dim**0.5)
        self.order = {"l1": 1, "l2": 2}[norm]

    def forward(self, task_id: Tensor) -> Tensor:
        weight = self.weight[task_id]
        return weight / torch.linalg.vector_norm(weight, ord=self.order, dim=-1, keepdim=True)  # [B, D]


class Critic(nn.Module):
    """E = 2 independent BroNets that map (obs, action, embedding) to K logits, and the task embedding they share."""

    Body = BroNet

    def __init__(self, args: Args, obs_dim: int, act_dim: int, num_embeddings: int):
        """num_embeddings: one per task; 0 in single-task mode (paper)."""
        super().__init__()
        self.embedding, in_features, self.bf16 = None, obs_dim + act_dim, args.precision == "bf16"
        if num_embeddings:
            self.embedding = TaskEmbedding(num_embeddings, args.embedding_dim, args.embedding_norm)
            in_features += args.embedding_dim
        # A plain loop over two members beats vmap and batched matmuls on CPU.
        self.members = nn.ModuleList(
            nn.Sequential(self.Body(in_features, args.width, args.critic_depth), Dense(args.width, args.num_atoms))
            for _ in range(2)
        )
        self.register_buffer("atoms", torch.linspace(-args.v_max, args.v_max, args.num_atoms), persistent=False)  # [K]

    def embed(self, task_id: Tensor) -> Tensor:
        """Embeddings [B, D] of tasks [B], D = embedding_dim; [B, 0] in single-task mode."""
        return self.atoms.new_empty(len(task_id), 0) if self.embedding is None else self.embedding(task_id)

    def forward(self, obs: Tensor, action: Tensor, embedding: Tensor) -> Tensor:
        x = torch.cat([obs, action, embedding], dim=-1)  # [B, O + A + D]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):  # nearly all of an update's work is here
            features = [body(x) for body, _ in self.members]  # E of [B, H]
        return torch.stack([head(h) for (_, head), h in zip(self.members, features)])  # [E, B, K]

    def q_values(self, logits: Tensor) -> Tensor:
        """Expected value [B] of logits [E, B, K]: the mean over the ensemble, no minimum."""
        return (logits.softmax(-1).mean(0) * self.atoms).sum(-1)


class Actor(nn.Module):
    """BroNet with mean and log-std heads of a tanh-squashed Gaussian."""

    Body = BroNet

    def __init__(self, args: Args, obs_dim: int, act_dim: int, num_embeddings: int):
        super().__init__()
        in_features = obs_dim + (args.embedding_dim if num_embeddings else 0)
        self.body = self.Body(in_features, args.actor_width, args.actor_depth)
        self.mean = Dense(args.actor_width, act_dim)
        self.log_std = Dense(args.actor_width, act_dim, gain=1.0)

    def forward(self, obs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, A] and log standard deviation [B, A], in [-10, 2], of the Gaussian before tanh."""
        x = self.body(torch.cat([obs, embedding], dim=-1))  # [B, O + D] -> [B, actor width]
        return self.mean(x), -10 + 6 * (1 + torch.tanh(self.log_std(x)))


def sample_action(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(mean + std noise) [B, A] and its log-probability [B], for standard normal noise [B, A].

    The tanh correction log(1 - tanh(u)^2) is in its exact, stable form: no clamp, no epsilon.
    """
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    correction = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), (gaussian - correction).sum(-1)


# ----------------------------------------------------------------------------------------------- return normaliser


class ReturnNormalizer:
    """Scales the rewards of each task so that its returns fit the critic's support (paper, appendix C.2, Eq. 2-4).

    r_normalised = r v_max / (G_i + lambda_i), where G_i is the largest |Monte-Carlo return| seen from any state of
    task i's finished episodes, and lambda_i the share of the entropy bonus. Before a task's first finished episode its
    G_i is infinite and its rewards are 0.

    variant  return after a truncation                     lambda_i
    paper    the critic's value of the last state          alpha H_i / (1 - gamma), H_i task i's policy entropy
    release  mean reward of the episode / (1 - gamma)      alpha (-target entropy) / 2 / (1 - gamma), the same for all
    """

    ENTROPY_RATE = 0.01  # of H_i's running mean per update; the paper does not state how it averages

    def __init__(self, args: Args, num_tasks: int, act_dim: int, device: str | torch.device = "cpu"):
        self.gamma, self.v_max, self.variant = args.gamma, args.v_max, args.variant
        self.target_entropy = -act_dim / 2
        # The extremes are kept where episodes end, on the host, and what every update reads of them on the device.
        self.return_min = np.full(num_tasks, np.inf, np.float32)
        self.return_max = np.full(num_tasks, -np.inf, np.float32)
        self.episode_rewards: list[list[float]] = [[] for _ in range(num_tasks)]  # of the running episodes
        self.return_scale = torch.full((num_tasks,), torch.inf, device=device)  # G_i
        # The random start is a uniform policy, of entropy A log 2.
        self.entropy = torch.full((num_tasks,), act_dim * math.log(2), device=device)  # H_i

    def observe(self, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray,
                last_value: np.ndarray | None = None) -> None:
        """Takes in one step of every task ([N] each) and the returns of the episodes that it ends.

        last_value [N]: the critic's value of the last state in raw reward units, for the paper variant; without it
        (before the critic has learned anything) a truncated episode bootstraps with 0.
        """
        for rewards, value in zip(self.episode_rewards, reward.tolist()):  # transfer.py has tasks that do not step
            rewards.append(value)
        for task in np.flatnonzero(terminated | truncated):
            self.finish(task, terminated[task], 0.0 if last_value is None else last_value[task])

    def finish(self, task: int, terminated: bool, last_value: float) -> None:
        """Ends the running episode of `task` and takes in its Monte-Carlo returns G_t = r_t + gamma G_t+1."""
        rewards = np.array(self.episode_rewards[task])  # float64
        if terminated:
            G = 0.0
        elif self.variant == "release":
            G = rewards.mean() / (1 - self.gamma)
        else:
            G = float(last_value)
        returns = np.empty_like(rewards)
        for t in reversed(range(len(rewards))):
            returns[t] = G = rewards[t] + self.gamma * G
        self.return_min[task] = min(self.return_min[task], returns.min())
        self.return_max[task] = max(self.return_max[task], returns.max())
        scale = float(max(self.return_max[task], abs(self.return_min[task])))
        if scale > 0 or self.variant == "release":  # a task whose returns were all 0 has no scale yet
            self.return_scale[task].fill_(scale)  # never waits for the device; an assignment may
        self.episode_rewards[task] = []

    @torch.no_grad()
    def observe_entropy(self, log_prob: Tensor, task_id: Tensor) -> None:
        """Moves H_i towards the mean of -log pi [B] over the batch's samples of task i."""
        count = torch.zeros_like(self.entropy).scatter_add_(0, task_id, torch.ones_like(log_prob))
        total = torch.zeros_like(self.entropy).scatter_add_(0, task_id, -log_prob)
        self.entropy += self.ENTROPY_RATE * (total - count * self.entropy) / count.clamp(min=1)

    def state_dict(self) -> dict:
        return {"return_min": torch.from_numpy(self.return_min), "return_max": torch.from_numpy(self.return_max),
                "return_scale": self.return_scale, "entropy": self.entropy, "episode_rewards": self.episode_rewards}

    def load_state_dict(self, state: dict) -> None:
        self.return_min, self.return_max = state["return_min"].numpy(), state["return_max"].numpy()
        self.return_scale.copy_(state["return_scale"])
        self.entropy.copy_(state["entropy"])
        self.episode_rewards = state["episode_rewards"]

    def denominator(self, temperature: Tensor) -> Tensor:
        """G_i + lambda_i [N], in raw reward units; infinite before the first finished episode."""
        if self.variant == "release":
            entropy_share = temperature * -self.target_entropy / 2 / (1 - self.gamma)
        else:
            entropy_share = (temperature * self.entropy / (1 - self.gamma)).clamp(min=0)
        return self.return_scale + entropy_share

    def normalize(self, reward: Tensor, task_id: Tensor, temperature: Tensor) -> Tensor:
        """Raw rewards [B] of tasks [B] in units of the critic's support."""
        return reward / (self.denominator(temperature) / self.v_max)[task_id]

    def denormalize(self, value: Tensor, task_id: Tensor, temperature: Tensor) -> Tensor:
        """The critic's values [B] of tasks [B] in raw reward units; 0 before a task's first finished episode."""
        scale = self.denominator(temperature)[task_id] / self.v_max
        return torch.where(scale.isfinite(), value * scale, 0.0)


# --------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    obs: Tensor  # [B, O]
    action: Tensor  # [B, A]
    reward: Tensor  # [B], raw as sampled, normalised as the losses take it
    terminated: Tensor  # [B], 1.0 where the episode ended in a terminal state: no bootstrap; truncations do bootstrap
    next_obs: Tensor  # [B, O]
    task_id: Tensor  # [B]


class ReplayBuffer:
    """The last `capacity` steps of N tasks, which step together: a ring of rows, in float32; rewards are raw.

    Row t holds every task's obs_t and the action, reward and terminated that followed it. next_obs is the obs of row
    t + 1, so every observation is stored once; only where an episode ended does row t + 1 begin another one. There
    `end` numbers the end, and the true last observation is in the ring `last_obs` at that number.
    """

    def __init__(self, num_tasks: int, obs_dim: int, act_dim: int, capacity: int, device: str | torch.device = "cpu"):
        """capacity: steps kept per task; fewer if episodes are shorter than 16 steps on average."""
        self.num_tasks, self.capacity, self.device = num_tasks, capacity, torch.device(device)
        self.fields = (obs_dim, act_dim, 1, 1)  # of a row: obs, action, reward, terminated
        # One row more for the current observation. Empty, so that a CPU gives memory page by page as the ring fills.
        self.rows = torch.empty(capacity + 1, num_tasks, sum(self.fields), device=device)
        self.end = torch.zeros(capacity + 1, num_tasks, dtype=torch.int32, device=device)  # 0: none, or its number + 1
        self.last_obs = torch.empty(num_tasks * (capacity // 16 + 4), obs_dim, device=device)
        self.end_step = torch.full((len(self.last_obs),), -1)  # at which step each of them ended, on the host
        self.window = torch.zeros(2, dtype=torch.int64, device=device)  # the oldest step kept, how many are
        self.steps, self.oldest, self.ends = 0, 0, 0  # steps and ends so far: the host knows the layout, and never asks
        self.nbytes = sum(ring.nbytes for ring, _, _ in self.rings.values())

    @property
    def rings(self) -> dict[str, tuple[Tensor, int, int]]:
        """For harness.py: each ring with the number of rows so far, and of the last ones that it keeps. Final ones: the
        newest step, which a resume can make the last of its episode, is left to `state_dict`."""
        steps, ends = max(0, self.steps - 1), (self.ends, min(self.ends, len(self.last_obs)))
        return {"rows": (self.rows, steps, steps - self.oldest), "end": (self.end, steps, steps - self.oldest),
                "last_obs": (self.last_obs, *ends), "end_step": (self.end_step, *ends)}

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray,
            truncated: np.ndarray, next_obs: np.ndarray) -> None:
        """Stores one step of every task: [N, O], [N, A], [N], [N], [N], [N, O]; next_obs is never a reset's."""
        row = self.steps % len(self.rows)
        values = np.concatenate([obs, action, reward[:, None], terminated[:, None]], axis=1, dtype=np.float32)
        self.rows[row] = devices.send(values, self.device)
        self.end[row].zero_()
        self.steps += 1
        self.current_obs().copy_(devices.send(next_obs, self.device))
        self.end_episodes(np.flatnonzero(terminated | truncated))

    def current_obs(self) -> Tensor:
        return self.rows[self.steps % len(self.rows), :, :self.fields[0]]  # [N, O]

    def end_episodes(self, tasks: np.ndarray) -> None:
        """Makes the newest step the last of the episodes of `tasks`, and the current observation its true next one."""
        if len(tasks):
            numbers = self.ends + np.arange(len(tasks))
            places = numbers % len(self.last_obs)
            self.end_step.numpy()[places] = self.steps - 1
            self.ends += len(tasks)
            index = devices.send(np.stack([tasks, places, numbers + 1]), self.device)
            self.last_obs[index[1]] = self.current_obs()[index[0]]
            self.end[(self.steps - 1) % len(self.rows), index[0]] = index[2].int()
        # The step whose end has the place that is the next to be taken is given up, and what is older.
        taken = int(self.end_step[self.ends % len(self.last_obs)])
        self.oldest = max(self.oldest, self.steps - self.capacity, 1 + taken)
        self.window.copy_(devices.send(np.array([self.oldest, self.steps - self.oldest]), self.device))

    def sample(self, batch_size: int) -> Batch:
        """A batch with raw rewards, uniform over tasks and over the steps kept."""
        draw = {"size": (batch_size,), "device": self.device}
        task_id, (oldest, size) = torch.randint(self.num_tasks, **draw), self.window
        # How many steps there are is known on the device only; of 2^62 numbers the remainder is as good as uniform.
        step = oldest + torch.randint(2**62, **draw) % size
        row = step % len(self.rows)
        obs, action, reward, terminated = self.rows[row, task_id].split(self.fields, dim=-1)
        end = self.end[row, task_id].long()
        next_obs = torch.where(end.unsqueeze(-1) > 0, self.last_obs[(end - 1) % len(self.last_obs)],
                               self.rows[(row + 1) % len(self.rows), task_id, :obs.shape[1]])
        return Batch(obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs, task_id)

    def state_dict(self) -> dict:
        """All but the rings, and their newest and current rows."""
        newest = torch.arange(self.steps - 1, self.steps + 1) % len(self.rows)
        return {"steps": self.steps, "oldest": self.oldest, "ends": self.ends, "rows": self.rows[newest].cpu(),
                "end": self.end[newest].cpu()}

    def load_state_dict(self, state: dict) -> None:
        """Before the rings are loaded. The capacity may have changed."""
        self.steps, self.ends = state["steps"], state["ends"]
        self.oldest = max(state["oldest"], self.steps - self.capacity)
        newest = torch.arange(self.steps - 1, self.steps + 1) % len(self.rows)
        self.rows[newest], self.end[newest] = state["rows"].to(self.device), state["end"].to(self.device)
        self.end_step.fill_(-1)
        self.end_episodes(np.array([], int))


# ---------------------------------------------------------------------------------------------------------- losses


def project_categorical(probs: Tensor, positions: Tensor, atoms: Tensor) -> Tensor:
    """Projects mass `probs` [B, K] that lies at `positions` [B, K] onto the evenly spaced `atoms` [K]: C51, Eq. 7.

    Positions beyond the support are clipped to it. Mass is conserved, to the rounding of a sum: each particle splits
    between its two neighbouring atoms, one of which gets all of it where it falls on an atom.
    """
    low, spacing = atoms[0], (atoms[-1] - atoms[0]) / (len(atoms) - 1)
    # Fractional atom number in [0, K - 1]; the second clamp is for the rounding of the division.
    index = ((positions.clamp(atoms[0], atoms[-1]) - low) / spacing).clamp(max=len(atoms) - 1)
    lower = index.floor().clamp(max=len(atoms) - 2)
    upper_mass = probs * (index - lower)
    lower = lower.long().clamp(min=0)  # NaN shall reach the loss, not fail as an index
    projected = torch.zeros_like(probs).scatter_add_(-1, lower, probs - upper_mass)
    return projected.scatter_add_(-1, lower + 1, upper_mass)  # [B, K]


def target_positions(batch: Batch, next_log_prob: Tensor, temperature: Tensor, atoms: Tensor, gamma: float) -> Tensor:
    """Where the atoms of the next state's value move to [B, K]: r + gamma (1 - terminated)(z - alpha log pi)."""
    soft_atoms = atoms - (temperature * next_log_prob).unsqueeze(-1)
    return batch.reward.unsqueeze(-1) + gamma * (1 - batch.terminated).unsqueeze(-1) * soft_atoms


def critic_loss(critic: Critic, target: Critic, actor: Actor, temperature: Tensor, gamma: float, batch: Batch,
                noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy between both critics' logits and the projected value of the next action, and what to log."""
    with torch.no_grad():
        next_action, next_log_prob = sample_action(*actor(batch.next_obs, critic.embed(batch.task_id)), noise)
        target_logits = target(batch.next_obs, next_action, target.embed(batch.task_id))  # [E, B, K]
        next_probs = target_logits.softmax(-1).mean(0)  # [B, K]: the mean over the critics, no minimum
        positions = target_positions(batch, next_log_prob, temperature, critic.atoms, gamma)  # [B, K]
        target_probs = project_categorical(next_probs, positions, critic.atoms)  # [B, K]
    logits = critic(batch.obs, batch.action, critic.embed(batch.task_id))  # [E, B, K]
    cross_entropy = -(target_probs * logits.log_softmax(-1)).sum(-1)  # [E, B]
    loss = cross_entropy.mean(1).sum()
    return loss, {"critic_loss": loss.detach(), "target_q": (target_probs * critic.atoms).sum(-1).mean()}


def actor_loss(critic: Critic, actor: Actor, temperature: Tensor, batch: Batch, noise: Tensor
               ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """alpha log pi - Q (SAC, Eq. 7), the log-probabilities [B], and what to log; no gradient for the critic."""
    embedding = critic.embed(batch.task_id).detach()
    action, log_prob = sample_action(*actor(batch.obs, embedding), noise)
    q = critic.q_values(critic(batch.obs, action, embedding))  # [B]
    loss = (temperature * log_prob - q).mean()
    log_prob = log_prob.detach()
    return loss, log_prob, {"actor_loss": loss.detach(), "q": q.detach().mean(), "entropy": -log_prob.mean()}


def temperature_loss(log_temperature: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """alpha (entropy - target entropy): SAC's dual update, through alpha and not log alpha (release)."""
    return log_temperature.exp() * (entropy - target_entropy)


def make_adamw(parameters: Iterable[nn.Parameter], args: Args, beta1: float = 0.9, decays: bool = True
               ) -> torch.optim.AdamW:
    """AdamW: decoupled decay on every parameter, no mask (release)."""
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(beta1, 0.999), eps=1e-8,
                                  weight_decay=args.weight_decay * decays, fused=True, capturable=True)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps of a CUDA graph, and of all other runs
    return optimizer


# ----------------------------------------------------------------------------------------------------------- agent


class Agent:
    """Critic, target, actor and temperature with their optimisers, and the six steps of one update."""

    PARTS = ("critic", "target", "actor", "critic_optimizer", "actor_optimizer", "temperature_optimizer")

    def __init__(self, args: Args, obs_dim: int, act_dim: int, num_tasks: int, num_embeddings: int | None = None,
                 device: str | torch.device = "cpu"):
        """num_embeddings: rows of the task embedding; by default one per task, none in single-task mode (paper)."""
        if num_embeddings is None:
            num_embeddings = num_tasks if num_tasks > 1 else 0
        self.sizes = obs_dim, act_dim, num_tasks, num_embeddings
        self.args, self.num_tasks, self.device = args, num_tasks, torch.device(device)
        self.share = 1.0  # of all tasks, from which this rank's batches are
        self.target_entropy = -act_dim / 2
        with self.device:
            self.critic = Critic(args, obs_dim, act_dim, num_embeddings)
            self.target = copy.deepcopy(self.critic).requires_grad_(False)
            self.actor = Actor(args, obs_dim, act_dim, num_embeddings)
            self.log_temperature = nn.Parameter(torch.tensor(args.init_temperature).log())
            self.task_ids = torch.arange(num_tasks)
        self.target_and_critic = list(self.target.parameters()), list(self.critic.parameters())
        self.critic_optimizer = make_adamw(self.critic.parameters(), args)
        self.actor_optimizer = make_adamw(self.actor.parameters(), args)
        self.temperature_optimizer = make_adamw([self.log_temperature], args, beta1=0.5, decays=False)  # release
        # With the critics' bf16 and the graph in `train` all that makes an update fast; eager float32 is the same code.
        slow = args.precision == "fp32" or str(device) == "cpu"
        torch.set_float32_matmul_precision("highest" if slow else "high")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.critic_loss, self.actor_loss = (devices.compiled(loss) if args.compile else loss
                                             for loss in (critic_loss, actor_loss))

    def __str__(self) -> str:
        sizes = [f"{name} {sum(p.numel() for p in getattr(self, name).parameters()):,}" for name in self.PARTS[:3]]
        return f"{self.args.precision}, {'compiled' if self.args.compile else 'eager'}; parameters: {', '.join(sizes)}"

    @property
    def temperature(self) -> Tensor:
        """alpha, without gradient."""
        return self.log_temperature.detach().exp()

    def update(self, batch: Batch, next_noise: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One gradient update from a batch with normalised rewards and standard normal noise [B, A], [B, A].

        Steps in the paper's order; returns tensors to log and the log-probabilities [B] of the actor step.
        """
        temperature = self.temperature
        # 1-3: next action and target distribution, cross-entropy, critic and embedding step
        loss, critic_metrics = self.critic_loss(self.critic, self.target, self.actor, temperature, self.args.gamma,
                                                batch, next_noise)
        optimize(self.critic_optimizer, loss, self.share)
        # 4: target <- tau critic + (1 - tau) target
        with torch.no_grad():
            torch._foreach_lerp_(*self.target_and_critic, self.args.tau)
        # 5: actor step through the new critic
        self.critic.requires_grad_(False)  # its weight gradients would be a seventh of all the work
        loss, log_prob, actor_metrics = self.actor_loss(self.critic, self.actor, temperature, batch, noise)
        self.critic.requires_grad_(True)
        optimize(self.actor_optimizer, loss, self.share)
        # 6: temperature step with the entropy of step 5
        loss = temperature_loss(self.log_temperature, -log_prob.mean(), self.target_entropy)
        optimize(self.temperature_optimizer, loss, self.share)
        metrics = critic_metrics | actor_metrics | {"temperature": temperature, "temperature_loss": loss.detach()}
        return metrics, log_prob

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Actions [N, A] for observations [N, O] of tasks 0..N-1: sampled with noise [N, A], or tanh(mean) without."""
        mean, log_std = self.actor(obs, self.critic.embed(self.task_ids))
        return torch.tanh(mean) if noise is None else sample_action(mean, log_std, noise)[0]

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """Normalised value [N] of observations [N, O] of tasks 0..N-1 under the deterministic action."""
        embedding = self.critic.embed(self.task_ids)
        return self.critic.q_values(self.critic(obs, self.act(obs, None), embedding))

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {"log_temperature": self.log_temperature, "sizes": self.sizes}

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.log_temperature.data.copy_(state["log_temperature"])


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor, share: float = 1.0) -> None:
    """One step. Where the loss is the mean over a share of all tasks only, the ranks' gradients are added."""
    optimizer.zero_grad(set_to_none=True)
    (loss if share == 1 else share * loss).backward()
    if share < 1:
        devices.add([parameter.grad for group in optimizer.param_groups for parameter in group["params"]])
    optimizer.step()


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(agent: Agent, envs: VectorEnv, episodes: int, seed: int, video: bool = False,
             stop: Callable[[], object] = lambda: None) -> tuple[list[dict], list]:
    """Runs the deterministic policy, tanh of the mean, for exactly `episodes` episodes of every task.

    `envs` are evaluation's own; they are seeded anew each time, so that nothing carries over between evaluations. The
    success of an episode is any success in it. Returns one dict per task with the means of `return`, `score` and,
    where the task defines it, `success`; and, with `video`, the frames of each task's first episode. Both are empty as
    soon as `stop()` is true.
    """
    ended: list[list[tuple[float, float]]] = [[] for _ in envs.tasks]  # return and success of the episodes that count
    episode_return, episode_success = np.zeros(envs.num_envs), np.full(envs.num_envs, np.nan)
    frames: list[list[np.ndarray]] = [[] for _ in envs.tasks]
    obs = envs.reset(seed=seed)
    for step in progress.steps_of_evaluation(ended, episodes):
        if stop():
            return [], []
        if video and step % suites.VIDEO_STRIDE == 0 and not all(ended):
            for task, frame in enumerate(envs.render()):
                if not ended[task]:
                    frames[task].append(frame[::2, ::2])  # 240 x 240
        action = agent.act(torch.from_numpy(obs).to(agent.device), noise=None)
        result = envs.step(action.cpu().numpy())
        obs = result.obs
        episode_return += result.reward
        episode_success = np.fmax(episode_success, result.success)  # NaN only where the task defines no success
        for task in np.flatnonzero(result.terminated | result.truncated):
            if len(ended[task]) < episodes:  # faster tasks go on, uncounted, until the last is done
                ended[task].append((float(episode_return[task]), float(episode_success[task])))
            episode_return[task], episode_success[task] = 0.0, np.nan
    return [suites.mean_episode(task, of_task) for task, of_task in zip(envs.tasks, ended, strict=True)], frames


# --------------------------------------------------------------------------------------------------- training loop


class Start(NamedTuple):
    """Where a run starts: from a fresh agent, or as transfer.py says."""

    prepare: Callable = lambda run, agent, normalizer, buffer: buffer  # returns what to sample batches from
    num_embeddings: int | None = None  # rows of the task embedding
    pad_to: tuple[int, int] = (0, 0)  # least sizes of observation and action
    acts: bool = False  # the policy acts from the first step on; else random actions do until learning starts
    first_step: int = 0  # environment steps that `prepare` takes
    arguments: str = ""  # between program and --resume in the command that continues the run
    facts: dict = {}  # for args.json


def train(args: Args, start: Start = Start()) -> list[dict]:
    """Trains as `args` say; returns the last evaluation's means, one dict per task.

    Raises UsageError or SuiteError, before anything is created, and RunError for a run that cannot go on.
    """
    rank, size = devices.ranks()  # of torchrun; 0 and 1 without
    num_tasks, tasks, rows = len(args.tasks), args.tasks[rank::size], range(rank, len(args.tasks), size)
    if size > num_tasks:
        raise UsageError(f"torchrun has started {size} processes for {num_tasks} tasks: give it at most one per task.")
    replay_device = devices.choose_device(args.replay_device or args.device)
    device = devices.choose_device(args.device)
    run = harness.Run(args, start.arguments, **start.facts)
    devices.join()
    more = {"workers": args.workers, "pad_to": start.pad_to, "goals": args.goals, "rows": rows,
            "agree": devices.largest}
    envs = VectorEnv(tasks, args.seed, **more)
    eval_envs = VectorEnv(tasks, args.seed + 42, render=args.capture_video, **more)  # the release's seeds
    torch.manual_seed(harness.derived_seed(args.seed, "networks"))
    agent = Agent(args, envs.obs_dim, envs.act_dim, num_tasks, start.num_embeddings, device)
    agent.task_ids, agent.share = agent.task_ids[rank::size], len(tasks) / num_tasks
    batch_size = devices.share(args.batch_size, num_tasks)
    normalizer = ReturnNormalizer(args, max(len(tasks), agent.sizes[-1]), envs.act_dim, device)
    capacity = min(args.buffer_size, args.total_steps)
    buffer = ReplayBuffer(len(tasks), envs.obs_dim, envs.act_dim, capacity, replay_device)
    print(f"{num_tasks} tasks, obs {envs.obs_dim}, act {envs.act_dim}, {args.total_steps:,} steps each\n"
          f"{device}, {agent}; replay {buffer.nbytes / 1e9:.2f} GB when full, on {replay_device}", flush=True)
    if device.type == "cpu" and args.width > 1024:
        print("This is a size for a GPU. For results in minutes on a CPU: --suite demo", flush=True)
    run.open(buffer)
    replay = start.prepare(run, agent, normalizer, buffer)
    env_step = restore(run.state, agent, normalizer, buffer) if run.state else start.first_step  # of each task
    if rank and not run.state:
        torch.manual_seed(harness.derived_seed(args.seed, f"rank {rank}"))

    def sample() -> Batch:
        """A batch on its way to the training device."""
        return Batch(*(devices.send(field, device) for field in replay.sample(batch_size)))

    def updates(batch: Batch | None = None) -> dict[str, Tensor]:
        """The gradient updates of one environment step, the first of them from `batch`. Never waits for the device."""
        for _ in range(args.updates_per_step):
            batch = batch or sample()
            reward = normalizer.normalize(batch.reward, batch.task_id, agent.temperature)
            next_noise, noise = torch.randn(2, batch_size, envs.act_dim, device=device)
            of_all = batch._replace(reward=reward, task_id=batch.task_id * size + rank)  # the task's number among all
            metrics, log_prob = agent.update(of_all, next_noise, noise)
            normalizer.observe_entropy(log_prob, batch.task_id)
            batch = None
        return metrics

    if args.cuda_graph and device.type == "cuda" and device == replay_device:
        updates = devices.as_cuda_graph(updates)

    def save() -> None:
        parts = {"normalizer": normalizer, "buffer": buffer} | ({} if rank else {"agent": agent})
        run.save(env_step, {name: part.state_dict() for name, part in parts.items()}, buffer)

    metrics, results = {}, []
    obs = envs.reset(seed=harness.derived_seed(args.seed, "environments", env_step))
    try:
        while True:
            # Checkpoint first: a run that dies while it evaluates comes back here, and evaluates.
            due = env_step % args.eval_interval == 0 or env_step in (start.first_step, args.total_steps)
            due &= env_step > 0 or start.acts
            stop, asked, done = devices.largest([run.stop, run.asked, env_step in run.evaluated])
            if due or env_step % args.checkpoint_interval == 0 or stop or asked:
                run.check_finite(metrics, env_step)  # never over the last good one
                save()
            if due and not stop and not done:
                seed = harness.derived_seed(args.seed, "evaluation", env_step)
                parts = devices.gather(evaluate(agent, eval_envs, args.eval_episodes, seed, args.capture_video,
                                              lambda: run.stop))
                stop, = devices.largest([run.stop])
                if all(part[0] for part in parts):
                    results, frames = ([parts[i % size][k][i // size] for i in range(num_tasks)] for k in range(2))
                    embedding = agent.critic.embed(torch.arange(num_tasks, device=device))
                    run.log_evaluation(results, frames, env_step, embedding)
            if stop or env_step >= args.total_steps:
                run.stop = stop
                break

            # act
            if env_step < args.learning_starts and not start.acts:
                action = 2 * torch.rand(len(tasks), envs.act_dim, device=device) - 1
            else:
                noise = torch.randn(len(tasks), envs.act_dim, device=device)
                action = agent.act(devices.send(obs, device), noise)
            # a pretrained critic would unlearn from the rewards of 0 before the first episode has given a return scale
            learning = env_step >= args.learning_starts and not (start.acts and np.isinf(normalizer.return_max).any())
            batch = [sample()] if learning and args.overlap and device != replay_device else []  # the device is busy
            action = action.cpu().numpy()  # waits for the device: the simulators need the actions
            run.check_finite({"action": action}, env_step)
            # step, and update while the simulators work: the newest transition is sampled a step later
            envs.step_async(action)
            if learning and args.overlap:
                metrics = updates(*batch)
            result = envs.step_wait()
            env_step += 1
            # store
            buffer.add(obs, action, result.reward, result.terminated, result.truncated, result.next_obs)
            last_value = raw_value(agent, normalizer, result.next_obs) if learning and result.truncated.any() else None
            normalizer.observe(result.reward, result.terminated, result.truncated, last_value)
            obs = result.obs
            if learning and not args.overlap:
                metrics = updates()
            # log
            run.step(learning)
            if env_step % args.log_interval == 0 and metrics:
                run.check_finite(metrics, env_step)
                scales = zip(tasks, normalizer.denominator(agent.temperature).tolist())  # waits for the device
                scalars = {f"return_scale/{task}": scale for task, scale in scales}
                scalars |= {f"train/{name}": value.item() for name, value in metrics.items()}
                run.log(ChainMap(*devices.gather(scalars)), env_step)  # of losses, the first rank's
    except EnvError as error:
        run.check_finite(metrics, env_step)
        if size == 1:  # other ranks are in the midst of a step
            save()
        raise harness.RunError(f"{error}\nStopped at step {env_step:,}. To go on: {run.go_on}") from None
    finally:
        run.close()
        envs.close()
        eval_envs.close()
    run.finish(env_step, results)
    return results


def raw_value(agent: Agent, normalizer: ReturnNormalizer, obs: np.ndarray) -> np.ndarray:
    """The critic's value [N] of observations [N, O] in raw reward units. Waits for the device, once per episode."""
    value = agent.value(torch.from_numpy(obs).to(agent.device))
    return normalizer.denormalize(value, torch.arange(len(obs)).to(agent.device), agent.temperature).cpu().numpy()


def restore(state: dict, agent: Agent, normalizer: ReturnNormalizer, buffer: ReplayBuffer) -> int:
    """Sets a run to its checkpoint's state; returns the step. Environments start anew: running episodes are cut.

    The returns of these are not counted: the release would take their first rewards for the mean of a whole one.
    """
    agent.load_state_dict(state["agent"])
    normalizer.load_state_dict(state["normalizer"])
    running = [task for task, rewards in enumerate(normalizer.episode_rewards) if rewards]
    normalizer.episode_rewards = [[] for _ in normalizer.episode_rewards]
    buffer.end_episodes(np.array(running, int))
    return state["env_step"]


def evaluate_run(args: Args) -> list[dict]:
    """--evaluate: prints the table of tasks for a run's last checkpoint, with or without its replay."""
    if devices.ranks()[1] > 1:
        raise UsageError("--evaluate takes one process: start it with python, and not with torchrun.")
    saved, run_dir = harness.read_checkpoint(Path(args.evaluate)), Path(args.evaluate)
    args = dataclasses.replace(args, compile=False)
    threads = args.threads or (None if "OMP_NUM_THREADS" in os.environ else 1)  # acting is too little work for more
    agent = Agent(args, *saved["agent"]["sizes"], devices.choose_device(args.device, threads))
    agent.load_state_dict(saved["agent"])
    envs = VectorEnv(args.tasks, args.seed + 42, args.workers, args.capture_video, pad_to=agent.sizes[:2],
                     goals=args.goals)
    seed = harness.derived_seed(args.seed, "evaluation", saved["env_step"])
    results, frames = evaluate(agent, envs, args.eval_episodes, seed, args.capture_video)
    envs.close()
    print(f"{args.exp_name} at step {saved['env_step']:,}, {args.eval_episodes} episodes per task")
    print(suites.table(args.tasks, results))
    with progress.survives("The videos"):
        list(suites.write_videos(args.tasks, frames, run_dir, saved["env_step"]))
    return results


def main(args: Args | None = None) -> list[dict]:
    """The program: its command line, or `args`."""
    args = args or harness.parse_args(Args, resolve)
    return evaluate_run(args) if args.evaluate else train(args)


if __name__ == "__main__":
    harness.exit_on_error(main, ARGS)
