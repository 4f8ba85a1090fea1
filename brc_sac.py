"""BRC on SAC: one large, regularised, categorical value network trained on many continuous-control tasks online.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners", arXiv 2505.23150.
SAC + two BroNet critics with categorical cross-entropy TD + learned task embeddings + per-task return normalisation.

    python brc_sac.py --suite demo                          four MetaWorld tasks on a laptop's CPU, minutes
    python brc_sac.py --suite mw --width 4096               MetaWorld-50 as in the paper (one GPU)
    python brc_sac.py --suite mw --split pretrain           the 45 tasks that the paper pretrains on, for transfer.py
    python brc_sac.py --tasks ball_in_cup-catch             single-task mode: batch 256, no task embedding
    python brc_sac.py --tasks walker-run reach hopper-hop   any mix of tasks; observations and actions are padded
    python brc_sac.py --suite demo --total-steps 300 --learning-starts 100 --eval-episodes 1     CPU smoke test
    python brc_sac.py --resume runs/<run>                   go on after a crash or a kill

Sections, in reading order:
    arguments           every hyper-parameter, with its source
    networks            BroNet, Critic, Actor, TaskEmbedding
    return normaliser   one reward scale per task
    replay buffer       one ring per task, every observation stored once
    update              the categorical projection, the three losses, the six steps of one update, its speed
    evaluation          deterministic episodes in environments of their own
    logging             metrics.csv, TensorBoard, W&B
    checkpoint          one function writes it, one reads it
    training loop       act, update, step, store, log

Shapes: B batch, E ensemble, K atoms, N tasks, O observation, A action, H width.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import suites
from suites.vector import EnvError, Step, VectorEnv, default_workers

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
    variant: Literal["paper", "release"] = "paper"
    """Where the paper's text and the authors' code differ (embedding norm, truncation bootstrap, entropy share of the
    return scale): follow the text or the code. Neither learned faster on the demo."""
    width: int | None = None
    """Critic width H in units; default 4096 (paper), for the demo 128."""
    seed: int = 0
    """Seed of networks, noise and environments."""
    total_steps: int | None = None
    """Environment steps per task; default the suite's budget in the paper."""
    run_dir: str | None = None
    """Where to write; default runs/<exp>__<seed>__<time>."""
    exp_name: str | None = None
    """Name in metrics.csv; default brc_sac-<suite>-<variant>, or -<tasks>- with --tasks."""
    resume: str | None = None
    """Run directory to continue from its last complete checkpoint; all other arguments are read from there."""
    evaluate: str | None = None
    """Run directory whose agent to evaluate, and nothing else; all other arguments are read from there."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    replay_device: str | None = None
    """Device of the replay buffer; default the training device."""
    workers: int | None = None
    """Processes that step the environments (0 = in this process); default by the number of cores."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Of the matrix products; all else is float32. Default tf32 on NVIDIA GPUs (float32 elsewhere), fp32 on a CPU."""
    compile: bool | None = None
    """torch.compile the losses: 1.1 to 1.6 times as fast on a CPU, after half a minute of compilation; default on for
    runs of 20,000 updates or more where there is a compiler."""
    cuda_graph: bool | None = None
    """Launch all updates of an environment step as one CUDA graph; default on where the networks and the replay are on
    the same NVIDIA GPU."""
    overlap: bool = True
    """Update while the environments step (the newest transition is then sampled one step later); off = step first."""
    assets: str | None = None
    """ShadowHand's folder dex_envs/assets; default $SHADOWHAND_ASSETS."""
    track: bool = False
    """Also log to Weights & Biases (pip install wandb), project brc or $WANDB_PROJECT."""
    capture_video: bool = False
    """Record the first evaluation episode of every task as a GIF, in <run dir>/videos and in TensorBoard."""

    eval_interval: int | None = None
    """Environment steps per task between evaluations; default a twentieth of the run."""
    eval_episodes: int = 10
    """Evaluation episodes per task."""
    log_interval: int = 500
    """Environment steps per task between TensorBoard scalars."""
    checkpoint_interval: int | None = None
    """Environment steps per task between checkpoints; default every evaluation."""
    save_replay: bool = True
    """Keep the replay in the checkpoints; without it a run can be evaluated, and serve transfer.py model and embedding,
    but not be resumed."""

    updates_per_step: int = 2
    """Gradient updates per environment step of all tasks in parallel (paper)."""
    batch_size: int | None = None
    """Transitions per update over all tasks; default 1024 multi-task, 256 single-task (paper), demo 256."""
    learning_starts: int | None = None
    """Random environment steps per task before the first update; default 5000 (release), demo 1000."""
    buffer_size: int = 1_000_000
    """Replay capacity in transitions per task (paper)."""
    learning_rate: float = 3e-4
    """AdamW step size of critic and actor, Adam's of the temperature (paper)."""
    weight_decay: float = 1e-4
    """Decoupled, on every parameter of critic and actor: biases, LayerNorm and embedding too (release)."""
    gamma: float = 0.99
    """Discount per environment step (paper)."""
    tau: float = 0.005
    """Polyak coefficient of the target critics, every update (paper)."""
    num_atoms: int = 101
    """Atoms K of the categorical value (paper)."""
    v_max: float = 10.0
    """Support [-v_max, v_max] of the normalised value (paper)."""
    critic_depth: int = 2
    """Residual blocks of each critic (paper)."""
    actor_depth: int = 1
    """Residual blocks of the actor (paper)."""
    actor_width: int = 256
    """Actor width in units (paper)."""
    embedding_dim: int = 32
    """Numbers per task embedding (paper)."""
    init_temperature: float = 0.1
    """Initial entropy temperature alpha (release)."""

    embedding_rows: int | None = None
    """Rows of the task embedding; default one per task, none in single-task mode (paper). Set by transfer.py."""
    embedding_only: bool = False
    """Freeze everything but the task embedding. Set by transfer.py."""
    random_start: bool = True
    """Act at random until learning starts (release); off = by the policy. Set by transfer.py."""
    pad_to: tuple[int, int] = (0, 0)
    """Least sizes of observation and action, up to which they are padded with zeros. Set by transfer.py."""


class UsageError(ValueError):
    """Arguments that cannot be run; its message is one sentence for the user."""


class RunError(RuntimeError):
    """A run that cannot go on; its message says why and what is left of it."""


# What a laptop's CPU can do in minutes; measured in benchmarks/README.md.
DEMO = dict(width=128, batch_size=256, learning_starts=1000, eval_interval=2_000)

# Smallest and largest value of each number.
BOUNDS = dict.fromkeys(
    ("width", "total_steps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval",
     "updates_per_step", "batch_size", "learning_starts", "buffer_size", "critic_depth", "actor_depth", "actor_width",
     "embedding_dim"),
    (1, float("inf")),
) | {
    "seed": (0, float("inf")), "workers": (0, float("inf")), "num_atoms": (2, float("inf")),
    "gamma": (0, 0.99999), "tau": (0, 1), "weight_decay": (0, 1e6), "learning_rate": (1e-12, 1e6),
    "v_max": (1e-6, 1e6), "init_temperature": (1e-12, 1e6), "embedding_rows": (0, float("inf")),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(args: Args) -> Args:
    """Fills in the defaults that depend on other arguments and checks all values, before anything is created.

    Raises UsageError or suites.SuiteError.
    """
    if args.assets:  # through the environment, which the worker processes inherit
        os.environ["SHADOWHAND_ASSETS"] = str(Path(args.assets).resolve())
        args = dataclasses.replace(args, assets=os.environ["SHADOWHAND_ASSETS"])
    tasks = suites.resolve(args.suite, args.tasks, args.split)
    atari = [task for task in tasks if suites.benchmark(task) is suites.atari]
    if atari:
        raise UsageError(f"{atari[0]} is an Atari game, played from pixels: brc_sac.py runs continuous control only, "
                         "so leave the games out, or use brc_drq.py for them.")
    label = args.suite + "-pretrain" * (args.split == "pretrain")
    if args.tasks:
        label = "-".join(tasks) if len(tasks) <= 3 else f"{len(tasks)}tasks"
    defaults = {
        "width": 4096, "batch_size": 1024 if len(tasks) > 1 else 256, "learning_starts": 5000,
        "total_steps": suites.steps(tasks) if args.tasks else suites.SUITES[args.suite].steps,
        "exp_name": f"brc_sac-{label}-{args.variant}",
    } | (DEMO if args.suite == "demo" and not args.tasks else {})
    args = fill(dataclasses.replace(args, tasks=tasks), **defaults)
    args = fill(args, eval_interval=max(1, args.total_steps // 20))
    args = fill(args, checkpoint_interval=args.eval_interval)
    if args.embedding_rows and args.embedding_rows < len(tasks):
        raise UsageError(f"--embedding-rows is {args.embedding_rows} for {len(tasks)} tasks: give one row per task or "
                         "more, or 0 for no task embedding.")
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag(name)} is {value}: give a number of at least {low:g}"
                             + (f" and at most {high:g}." if high < float("inf") else "."))
    return args


def fill(args: Args, **defaults) -> Args:
    """`args` with those of `defaults` that were not given."""
    return dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


# What may change beside --resume or --evaluate: nothing that the learner's numbers depend on.
MAY_CHANGE = ("total_steps", "device", "replay_device", "workers", "assets", "track", "capture_video",
              "log_interval", "checkpoint_interval", "save_replay", "compile", "cuda_graph", "resume", "evaluate")


def parse_args() -> Args:
    """The command line; with --resume or --evaluate, that run's arguments and what is given beside them."""
    import tyro

    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    run_dir = args.resume or args.evaluate
    if not run_dir:
        return resolve(args)
    saved, facts = read_args(Path(run_dir))
    if args.resume and "transfer" in facts:
        raise UsageError(f"{run_dir} is a run of transfer.py: continue it with "
                         f"python transfer.py {facts['transfer']['method']} --resume {run_dir}.")
    args = tyro.cli(Args, default=saved)
    may_change = MAY_CHANGE + (("eval_episodes",) if args.evaluate else ())
    for field in dataclasses.fields(Args):
        old, new = getattr(saved, field.name), getattr(args, field.name)
        if old != new and field.name not in may_change:
            raise UsageError(f"{flag(field.name)} is {old} in {run_dir} and cannot become {new}: "
                             f"beside a run directory only {', '.join(map(flag, may_change[:-2]))} may change.")
    if args.evaluate:  # a zero-shot transfer has no steps
        args = dataclasses.replace(args, total_steps=max(1, args.total_steps))
    return resolve(args)


def read_args(run_dir: Path) -> tuple[Args, dict]:
    """The arguments in a run directory, and all of its args.json. Raises UsageError."""
    try:
        facts = json.loads((run_dir / "args.json").read_text())
        names = [field.name for field in dataclasses.fields(Args) if field.name in facts]  # an older run lacks some
        lists = {name: tuple(facts[name]) for name in ("tasks", *names) if isinstance(facts[name], list)}
        return Args(**{name: facts[name] for name in names} | lists), facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_dir} holds no run to continue (args.json: {error}): give a run directory.") from None


def exit_on_error(function):
    """Runs `function`. Bad input ends the program with its one sentence and exit code 2, a failed run with 1."""
    try:
        return function()
    except (UsageError, suites.SuiteError, RunError, EnvError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from None


# Parsed before torch is imported, so that --help and a mistyped name answer at once.
ARGS = exit_on_error(parse_args) if __name__ == "__main__" else None

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402
from tqdm import tqdm  # noqa: E402

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
    """One learned vector per task, of unit L1 norm (paper, section 3) or unit L2 norm (release)."""

    def __init__(self, num_tasks: int, dim: int, variant: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim) / dim**0.5)
        self.order = {"paper": 1, "release": 2}[variant]

    def forward(self, task_id: Tensor) -> Tensor:
        weight = self.weight[task_id]
        return weight / torch.linalg.vector_norm(weight, ord=self.order, dim=-1, keepdim=True)  # [B, 32]


def embedding_rows(args: Args, num_tasks: int) -> int:
    """One per task, none in single-task mode (paper), or as transfer.py says."""
    default = num_tasks if num_tasks > 1 else 0
    return default if args.embedding_rows is None else args.embedding_rows


class Critic(nn.Module):
    """Two independent BroNets that map (obs, action, embedding) to K logits, and the task embedding they share."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, num_tasks: int):
        super().__init__()
        rows = embedding_rows(args, num_tasks)
        self.embedding = TaskEmbedding(rows, args.embedding_dim, args.variant) if rows else None
        in_features = obs_dim + act_dim + (args.embedding_dim if rows else 0)
        # A plain loop over two members beats vmap and batched matmuls on CPU.
        self.members = nn.ModuleList(
            nn.Sequential(BroNet(in_features, args.width, args.critic_depth), Dense(args.width, args.num_atoms))
            for _ in range(2)
        )
        self.register_buffer("atoms", torch.linspace(-args.v_max, args.v_max, args.num_atoms), persistent=False)  # [K]

    def embed(self, task_id: Tensor) -> Tensor:
        """Embeddings [B, 32] of tasks [B]; [B, 0] in single-task mode."""
        return self.embedding(task_id) if self.embedding else self.atoms.new_empty(len(task_id), 0)

    def forward(self, obs: Tensor, action: Tensor, embedding: Tensor) -> Tensor:
        x = torch.cat([obs, action, embedding], dim=-1)  # [B, O + A + 32]
        return torch.stack([member(x) for member in self.members])  # [E, B, K]

    def q_values(self, logits: Tensor) -> Tensor:
        """Expected value [B] of logits [E, B, K]: the mean over the ensemble, no minimum."""
        return (logits.softmax(-1).mean(0) * self.atoms).sum(-1)  # a matrix product would fall under autocast


class Actor(nn.Module):
    """BroNet with mean and log-std heads of a tanh-squashed Gaussian."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, num_tasks: int):
        super().__init__()
        in_features = obs_dim + (args.embedding_dim if embedding_rows(args, num_tasks) else 0)
        self.body = BroNet(in_features, args.actor_width, args.actor_depth)
        self.mean = Dense(args.actor_width, act_dim)
        self.log_std = Dense(args.actor_width, act_dim, gain=1.0)

    def forward(self, obs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, A] and log standard deviation [B, A], in [-10, 2], of the Gaussian before tanh."""
        x = self.body(torch.cat([obs, embedding], dim=-1))  # [B, O + 32] -> [B, 256]
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
    """Scales the rewards of each task so that its returns fit the critic's support (paper, section 3 and Eq. 4).

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
        # fill_ never waits for the device; an assignment may.
        self.return_scale[task].fill_(float(max(self.return_max[task], abs(self.return_min[task]))))
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
            # Above 0, so that a task whose rewards were all 0 so far stays 0 and does not become 0 / 0.
            entropy_share = (temperature * self.entropy / (1 - self.gamma)).clamp(min=1e-8)
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
    """One ring of rows per task; every observation is stored once, in float32; rewards are raw.

    Row r holds obs_t and the action, reward and terminated that followed it; next_obs is the obs of row r + 1. An
    episode of T steps takes T + 1 rows: the last one holds only its true final observation and is never sampled as a
    transition. `row_of` lists the rows that are transitions, so that sampling is uniform and never crosses an episode.
    """

    def __init__(self, num_tasks: int, obs_dim: int, act_dim: int, capacity: int, device: str | torch.device = "cpu"):
        """capacity: transitions per task (fewer are kept if episodes are shorter than 64 steps on average)."""
        self.num_tasks, self.capacity, self.device = num_tasks, capacity, torch.device(device)
        self.rows = capacity + capacity // 64 + 2  # room for final observations
        self.fields = (obs_dim, act_dim, 1, 1)  # of a row: obs, action, reward, terminated
        # empty, not zeros: a CPU gives memory page by page as the ring fills.
        self.ring = torch.empty(num_tasks, self.rows, sum(self.fields), device=device)
        self.row_of = torch.empty(num_tasks, capacity, dtype=torch.int32, device=device)  # transition % capacity -> row
        self.window = torch.zeros(2, num_tasks, dtype=torch.int64, device=device)  # first kept transition, how many
        # The host knows the whole layout, so that adding never asks the device. These counters only ever grow:
        self.head = np.zeros(num_tasks, np.int64)  # row of the current observation
        self.first = np.zeros(num_tasks, np.int64)  # oldest transition kept
        self.stop = np.zeros(num_tasks, np.int64)  # one past the newest transition
        self.transition_at = np.full((num_tasks, self.rows), -1, np.int32)  # -1: a final observation, or nothing yet

    @property
    def nbytes(self) -> int:
        """Bytes of the rings when full."""
        return self.ring.nbytes + self.row_of.nbytes + self.transition_at.nbytes

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray,
            truncated: np.ndarray, next_obs: np.ndarray) -> None:
        """Stores one step of every task: [N, O], [N, A], [N], [N], [N], [N, O]; next_obs is never a reset's."""
        tasks, row = np.arange(self.num_tasks), self.head % self.rows
        values = np.concatenate([obs, action, reward[:, None], terminated[:, None]], axis=1, dtype=np.float32)
        self._write(self.ring, tasks, row, values)
        self._write(self.row_of, tasks, self.stop % self.capacity, row.astype(np.int32))
        self.transition_at[tasks, row] = self.stop
        self.stop += 1
        self._open_row(tasks)
        self._write(self.ring[..., :obs.shape[1]], tasks, self.head % self.rows, next_obs)
        self._open_row(np.flatnonzero(terminated | truncated))
        self._write_window()

    def cut(self) -> None:
        """Ends every running episode as truncated: its current observation becomes the final one."""
        running = self.transition_at[np.arange(self.num_tasks), (self.head - 1) % self.rows] >= 0
        self._open_row(np.flatnonzero(running))
        self._write_window()

    def current_obs(self) -> Tensor:
        """The newest observation [N, O] of every task."""
        return self.ring[np.arange(self.num_tasks), self.head % self.rows, :self.fields[0]]

    def _open_row(self, tasks: np.ndarray) -> None:
        """Moves the heads of `tasks` by one row, over whatever was oldest there."""
        self.head[tasks] += 1
        row = self.head[tasks] % self.rows
        self.first[tasks] = np.maximum(self.first[tasks], self.transition_at[tasks, row] + 1)
        self.first = np.maximum(self.first, self.stop - self.capacity)
        self.transition_at[tasks, row] = -1

    def _write(self, ring: Tensor, tasks: np.ndarray, row: np.ndarray, values: np.ndarray) -> None:
        # Sent without waiting for the device, the index too.
        task, row, values = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in (tasks, row, values))
        ring[task, row] = values

    def _write_window(self) -> None:
        self.window.copy_(torch.from_numpy(np.stack([self.first, self.stop - self.first])), non_blocking=True)

    def export(self, since: np.ndarray) -> dict[str, Tensor]:
        """Rows from number `since` [N] up to and with the current one, which holds only its observation."""
        since = np.maximum(since, self.head - self.rows + 1)
        task = np.repeat(np.arange(self.num_tasks), self.head - since + 1)
        number = np.concatenate([np.arange(first, last + 1) for first, last in zip(since, self.head, strict=True)])
        layout = {"task": task, "number": number, "transition": self.transition_at[task, number % self.rows]}
        return {name: torch.from_numpy(values) for name, values in layout.items()} | {
            "row": self.ring[task, number % self.rows].cpu()
        }

    def load(self, counters: dict[str, Tensor], segments: Iterable[dict[str, Tensor]]) -> None:
        """Restores `state_dict` and what `export` returned, oldest first; the capacity may have changed."""
        self.head, self.first, self.stop = (counters[name].numpy() for name in ("head", "first", "stop"))
        self.transition_at[:] = -1
        for segment in segments:
            kept = segment["number"].numpy() > self.head[segment["task"]] - self.rows
            task, number, transition = (segment[name].numpy()[kept] for name in ("task", "number", "transition"))
            row = number % self.rows
            self.ring[task, row] = segment["row"][kept].to(self.device)
            self.transition_at[task, row] = transition
            real = transition >= np.maximum(0, self.stop[task] - self.capacity)
            self._write(self.row_of, task[real], transition[real] % self.capacity, row[real].astype(np.int32))
        oldest = np.where(self.transition_at >= 0, self.transition_at, self.stop[:, None]).min(1)
        self.first = np.maximum.reduce([self.first, oldest, self.stop - self.capacity])
        self._write_window()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("head", "first", "stop")}

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """A batch with raw rewards, uniform over tasks and over each task's kept transitions."""
        draw = {"size": (batch_size,), "generator": generator, "device": self.device}
        task_id = torch.randint(self.num_tasks, **draw)
        first, size = self.window[:, task_id]
        transition = first + torch.randint(2**62, **draw) % size
        row = self.row_of[task_id, transition % self.capacity].long()
        obs, action, reward, terminated = self.ring[task_id, row].split(self.fields, dim=-1)
        next_obs = self.ring[task_id, (row + 1) % self.rows, :obs.shape[1]]
        return Batch(obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs, task_id)


# ---------------------------------------------------------------------------------------------------------- update


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


@torch.no_grad()
def target_distribution(critic: Critic, target: Critic, actor: Actor, temperature: Tensor, gamma: float, batch: Batch,
                        noise: Tensor) -> Tensor:
    """Distribution [B, K] of the return under the policy's next action, on the atoms: the mean of both targets'."""
    next_action, next_log_prob = sample_action(*actor(batch.next_obs, critic.embed(batch.task_id)), noise)
    target_logits = target(batch.next_obs, next_action, target.embed(batch.task_id))  # [E, B, K]
    next_probs = target_logits.softmax(-1).mean(0)  # [B, K]: the mean over the critics, no minimum
    positions = target_positions(batch, next_log_prob, temperature, critic.atoms, gamma)  # [B, K]
    return project_categorical(next_probs, positions, critic.atoms)


def critic_loss(critic: Critic, target: Critic, actor: Actor, temperature: Tensor, gamma: float, batch: Batch,
                noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy between both critics' logits and the projected target (paper, Eq. 3), and what to log."""
    target_probs = target_distribution(critic, target, actor, temperature, gamma, batch, noise)  # [B, K]
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


def make_adamw(parameters: list[nn.Parameter], args: Args) -> torch.optim.AdamW:
    """AdamW of critic and actor: decoupled decay on every parameter, no mask (release)."""
    return torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8,
                             weight_decay=args.weight_decay, fused=True, capturable=True)


def make_temperature_adam(log_temperature: nn.Parameter, args: Args) -> torch.optim.Adam:
    """Adam with beta1 = 0.5 and no decay (release)."""
    return torch.optim.Adam([log_temperature], lr=args.learning_rate, betas=(0.5, 0.999), eps=1e-8,
                            fused=True, capturable=True)


class Agent:
    """Critic, target, actor and temperature with their optimisers, and the six steps of one update."""

    PARTS = ("critic", "target", "actor", "critic_optimizer", "actor_optimizer", "temperature_optimizer")

    def __init__(self, args: Args, obs_dim: int, act_dim: int, num_tasks: int, device: str | torch.device = "cpu"):
        self.args, self.act_dim, self.num_tasks, self.device = args, act_dim, num_tasks, torch.device(device)
        self.target_entropy = -act_dim / 2
        with self.device:
            self.critic = Critic(args, obs_dim, act_dim, num_tasks)
            self.target = Critic(args, obs_dim, act_dim, num_tasks).requires_grad_(False)
            self.actor = Actor(args, obs_dim, act_dim, num_tasks)
            self.log_temperature = nn.Parameter(torch.tensor(args.init_temperature).log())
            self.task_ids = torch.arange(num_tasks)
        self.target.load_state_dict(self.critic.state_dict())
        if args.embedding_only:
            self.critic.members.requires_grad_(False)
            self.target.embedding = self.critic.embedding  # the one that learns is the only one there is
        self.critic_parameters, self.target_parameters = list(self.critic.parameters()), list(self.target.parameters())
        self.critic_optimizer = make_adamw([p for p in self.critic_parameters if p.requires_grad], args)
        self.actor_optimizer = make_adamw(list(self.actor.parameters()), args)
        self.temperature_optimizer = make_temperature_adam(self.log_temperature, args)
        self.critic_loss, self.actor_loss = critic_loss, actor_loss
        if args.compile:
            self.critic_loss, self.actor_loss = compiled(critic_loss), compiled(actor_loss)
        torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16")

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
        with self.autocast:
            loss, critic_metrics = self.critic_loss(self.critic, self.target, self.actor, temperature, self.args.gamma,
                                                    batch, next_noise)
        optimize(self.critic_optimizer, loss)
        if self.args.embedding_only:
            with torch.no_grad(), self.autocast:
                _, log_prob, actor_metrics = self.actor_loss(self.critic, self.actor, temperature, batch, noise)
            return critic_metrics | actor_metrics | {"temperature": temperature}, log_prob
        # 4: target <- tau critic + (1 - tau) target
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.args.tau)
        # 5: actor step through the new critic
        self.critic.requires_grad_(False)  # its weight gradients would be a seventh of all the work
        with self.autocast:
            loss, log_prob, actor_metrics = self.actor_loss(self.critic, self.actor, temperature, batch, noise)
        self.critic.requires_grad_(True)
        optimize(self.actor_optimizer, loss)
        # 6: temperature step with the entropy of step 5
        loss = temperature_loss(self.log_temperature, -log_prob.mean(), self.target_entropy)
        optimize(self.temperature_optimizer, loss)
        metrics = critic_metrics | actor_metrics | {"temperature": temperature, "temperature_loss": loss.detach()}
        return metrics, log_prob

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {"log_temperature": self.log_temperature}

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.log_temperature.data.copy_(state["log_temperature"])

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


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def fast_path(args: Args, device: torch.device, replay_device: torch.device, compiled_before: bool | None = None
              ) -> Args:
    """The one place that decides how updates run: precision, compiled, as a CUDA graph. Eager fp32 is the same code.

    A run that is resumed stays as it was, `compiled_before` or not, unless told otherwise. Prints the choice and what
    it lacks. Raises UsageError for what was asked for and cannot be.
    """
    on_gpu, one_device = device.type == "cuda", device == replay_device
    if args.cuda_graph and not (on_gpu and one_device):
        where = f"the networks are on {device} and the replay on {replay_device}"
        raise UsageError(f"--cuda-graph needs networks and replay on one NVIDIA GPU, and {where}: leave it out.")
    compiler = has_compiler() and (not on_gpu or importlib.util.find_spec("triton") is not None)
    if args.compile and not compiler:
        raise UsageError("--compile needs a C++ compiler (c++, g++ or clang++ on the PATH), on a GPU triton too, and "
                         "that is not here: install it, or use --compile False.")
    if args.precision == "tf32" and not on_gpu:
        raise UsageError(f"--precision tf32 is of NVIDIA GPUs, and the device is {device}: give fp32 or bf16.")
    worth = compiled_before
    if worth is None:
        worth = (args.total_steps - args.learning_starts) * args.updates_per_step >= 20_000
    why_eager = "--compile False" if args.compile is not None else "a short run" if not worth else (
        "no compiler: a C++ compiler, and on a GPU triton, would make it faster")
    args = fill(args, precision="tf32" if on_gpu else "fp32", compile=worth and compiler,
                cuda_graph=on_gpu and one_device)
    # Trusts the compiler with the processor's instructions: to try them one by one takes 8 s.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    print(f"updates: {args.precision}, {'compiled' if args.compile else f'eager ({why_eager})'}"
          + ", one CUDA graph per step" * args.cuda_graph)
    return args


def compiled(function: Callable) -> Callable:
    """`function`, compiled at its first call; as it is, and says why, where that fails."""
    fast = torch.compile(function)

    def call(*inputs):
        nonlocal fast
        try:
            return fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = " ".join(str(error).splitlines()[:2])
            tqdm.write(f"{function.__name__} stays eager, for it could not be compiled: {why}")
            fast = function
            return function(*inputs)

    return call


class UpdateGraph:
    """The updates of one environment step as one CUDA graph, sampling included: one launch in place of thousands.

    The first calls run eagerly, beside the main stream as capture asks for; they are updates like all others. What
    changes between calls lies in tensors that stay in place (ring, window, return scales, networks, moments) or in the
    generators, which every replay advances as an eager call would.
    """

    WARM_UP = 3  # calls; compilation ends in the first, the allocator and the optimisers settle in the others

    def __init__(self, generators: Iterable[torch.Generator]):
        self.generators, self.calls, self.graph, self.stream = list(generators), 0, None, torch.cuda.Stream()

    def __call__(self, updates: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                metrics = updates()
            torch.cuda.current_stream().wait_stream(self.stream)
            return metrics
        if not self.graph:
            self.capture(updates)
        self.graph.replay()
        return self.metrics

    def capture(self, updates: Callable[[], dict[str, Tensor]]) -> None:
        """Records the updates without running them. Raises RunError for what a graph cannot hold."""
        graph, main_stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            for generator in self.generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=self.stream):
                self.metrics = updates()
        except RuntimeError as error:
            torch.cuda.set_stream(main_stream)  # a failed capture stays on its own
            cause = error.__context__ or error  # what broke the capture, before the error of its end
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise RunError(f"The updates cannot be recorded as a CUDA graph ({str(cause).splitlines()[0]}): take out "
                           "what waits for the device, or give --cuda-graph False.") from error
        self.graph = graph


class Learner:
    """Everything that a run must not lose: agent, normaliser, replay, random states and the step count."""

    def __init__(self, args: Args, obs_dim: int, act_dim: int, device: torch.device, replay_device: torch.device):
        num_tasks = len(args.tasks)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose streams and graphs are meant
        torch.manual_seed(derived_seed(args.seed, "networks"))
        self.args, self.device, self.noise_shape = args, device, (args.batch_size, act_dim)
        self.agent = Agent(args, obs_dim, act_dim, num_tasks, device)
        self.task_names = args.tasks  # of the normaliser's rows; transfer.py adds those of a pretraining replay
        self.normalizer = ReturnNormalizer(args, max(num_tasks, embedding_rows(args, num_tasks)), act_dim, device)
        capacity = min(args.buffer_size, args.total_steps)
        self.buffer = ReplayBuffer(num_tasks, obs_dim, act_dim, capacity, replay_device)
        self.generators = {name: torch.Generator(where).manual_seed(derived_seed(args.seed, name))
                           for name, where in (("noise", device), ("replay", replay_device))}
        self.env_step = 0  # environment steps per task so far
        self.segments: list[dict] = []  # replay files of the last checkpoint
        self.graph = UpdateGraph(self.generators.values()) if args.cuda_graph else None

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Exploring actions [N, A] for observations [N, O]: uniform until learning starts, then the policy's."""
        shape = (len(obs), self.agent.act_dim)
        if self.args.random_start and self.env_step < self.args.learning_starts:
            action = 2 * torch.rand(shape, generator=self.generators["noise"], device=self.device) - 1
        else:
            noise = torch.randn(shape, generator=self.generators["noise"], device=self.device)
            action = self.agent.act(torch.from_numpy(obs).to(self.device, non_blocking=True), noise)
        return action.cpu().numpy()  # waits for the device: the simulators need the actions

    def update(self) -> dict[str, Tensor]:
        """The gradient updates of one environment step, as a graph where there is one; returns the last metrics."""
        return self.graph(self.updates) if self.graph else self.updates()

    def updates(self) -> dict[str, Tensor]:
        """The same, launch by launch. Never waits for the device; reads and writes only tensors that stay in place, so
        that a graph can repeat it. A replay overwrites the metrics and the batch of the one before."""
        for _ in range(self.args.updates_per_step):
            metrics = self.update_once()
        return metrics

    def update_once(self) -> dict[str, Tensor]:
        """Samples a batch, normalises its rewards and makes one gradient update."""
        batch = self.buffer.sample(self.args.batch_size, self.generators["replay"])
        batch = Batch(*(field.to(self.device, non_blocking=True) for field in batch))
        reward = self.normalizer.normalize(batch.reward, batch.task_id, self.agent.temperature)
        next_noise, noise = torch.randn((2, *self.noise_shape), generator=self.generators["noise"], device=self.device)
        self.batch = batch._replace(reward=reward)
        metrics, log_prob = self.agent.update(self.batch, next_noise, noise)
        self.normalizer.observe_entropy(log_prob, batch.task_id)
        return metrics

    def observe(self, obs: np.ndarray, action: np.ndarray, result: Step) -> None:
        """Stores one step of every task and the returns of the episodes that it ends."""
        self.buffer.add(obs, action, result.reward, result.terminated, result.truncated, result.next_obs)
        last_value = self.raw_value(result.next_obs) if result.truncated.any() else None
        self.normalizer.observe(result.reward, result.terminated, result.truncated, last_value)

    def raw_value(self, obs: np.ndarray) -> np.ndarray | None:
        """The critic's value [N] of observations [N, O] in raw reward units; None if nothing was learned or needed."""
        if self.args.variant == "release" or self.env_step <= self.args.learning_starts:
            return None
        value = self.agent.value(torch.from_numpy(obs).to(self.device))
        value = self.normalizer.denormalize(value, self.agent.task_ids, self.agent.temperature)
        return value.cpu().numpy()  # waits for the device, once per episode

    def cut_episodes(self) -> None:
        """Ends the running episodes as truncated: environments start anew after a resume."""
        tasks = np.arange(len(self.args.tasks))
        last_value = self.raw_value(self.buffer.current_obs().cpu().numpy())
        for task in tasks:
            if self.normalizer.episode_rewards[task]:
                self.normalizer.finish(task, False, 0.0 if last_value is None else last_value[task])
        self.buffer.cut()

    def state_dict(self) -> dict:
        """All but the replay's rows."""
        algorithm, key, *rest = np.random.get_state()
        return {
            "env_step": self.env_step,
            "agent": self.agent.state_dict(),
            "normalizer": self.normalizer.state_dict(),
            "buffer": self.buffer.state_dict(),
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            # The learner draws from its own generators only; these are for code that is added to it.
            "global_random": {"python": random.getstate(), "numpy": (algorithm, key.tolist(), *rest),
                              "torch": torch.get_rng_state(),
                              "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []},
        }

    def load_state_dict(self, state: dict) -> None:
        self.env_step, self.segments = state["env_step"], state["segments"]
        self.agent.load_state_dict(state["agent"])
        self.normalizer.load_state_dict(state["normalizer"])
        for name, generator in self.generators.items():
            if generator.get_state().shape == state["generators"][name].shape:  # else the run has changed its device
                generator.set_state(state["generators"][name])
        random.setstate(state["global_random"]["python"])
        np.random.set_state(state["global_random"]["numpy"])
        torch.set_rng_state(state["global_random"]["torch"])
        if torch.cuda.device_count() == len(state["global_random"]["cuda"]):
            torch.cuda.set_rng_state_all(state["global_random"]["cuda"])


# ------------------------------------------------------------------------------------------------------ evaluation


VIDEO_STRIDE = 4  # environment steps per frame


def evaluate(agent: Agent, envs: VectorEnv, episodes: int, seed: int, video: bool = False,
             stop: Callable[[], object] = lambda: None) -> tuple[list[dict], list] | None:
    """Runs the deterministic policy, tanh of the mean, for exactly `episodes` episodes of every task.

    `envs` are evaluation's own; they are seeded anew each time, so that nothing carries over between evaluations. The
    success of an episode is any success in it. Returns one dict per task with the means of `return`, `score` and,
    where the task defines it, `success`; and, with `video`, the frames of each task's first episode. Returns None as
    soon as `stop()` is true.
    """
    results = [{"return": [], "success": [], "score": []} for _ in envs.tasks]
    episode_return, episode_success = np.zeros(envs.num_envs), np.full(envs.num_envs, np.nan)
    frames: list[list[np.ndarray]] = [[] for _ in envs.tasks]
    obs = envs.reset(seed=seed)
    for step in itertools.count():
        if all(len(result["return"]) == episodes for result in results):
            break
        if stop():
            return None
        if video and step % VIDEO_STRIDE == 0 and not all(result["return"] for result in results):
            for task, frame in enumerate(envs.render()):
                if not results[task]["return"]:
                    frames[task].append(frame[::2, ::2])  # 240 x 240
        action = agent.act(torch.from_numpy(obs).to(agent.device), noise=None)
        result = envs.step(action.cpu().numpy())
        obs = result.obs
        episode_return += result.reward
        episode_success = np.fmax(episode_success, result.success)  # NaN only where the task defines no success
        for task in np.flatnonzero(result.terminated | result.truncated):
            if len(results[task]["return"]) < episodes:  # faster tasks go on, uncounted, until the last is done
                success = None if np.isnan(episode_success[task]) else float(episode_success[task])
                results[task]["return"].append(float(episode_return[task]))
                results[task]["score"].append(suites.score(envs.tasks[task], float(episode_return[task]), success))
                if success is not None:
                    results[task]["success"].append(success)
            episode_return[task], episode_success[task] = 0.0, np.nan
    means = [{metric: float(np.mean(values)) for metric, values in result.items() if values} for result in results]
    return means, frames


def table(tasks: tuple[str, ...], results: list[dict]) -> str:
    """The results of an evaluation as text, a row per task and one for the mean."""
    width = max(len(task) for task in (*tasks, "mean"))
    lines = [f"{'task':<{width}}  {'return':>9}  {'success':>7}  {'score':>6}"]
    for task, result in [*zip(tasks, results, strict=True), ("mean", mean_result(results))]:
        success = f"{result['success']:7.2f}" if "success" in result else " " * 6 + "-"
        lines.append(f"{task:<{width}}  {result['return']:9.1f}  {success}  {result['score']:6.3f}")
    return "\n".join(lines)


def mean_result(results: list[dict]) -> dict:
    """Means over tasks; `success` over the tasks that define it."""
    return {
        metric: float(np.mean([result[metric] for result in results if metric in result]))
        for metric in ("return", "success", "score") if any(metric in result for result in results)
    }


# --------------------------------------------------------------------------------------------------------- logging


class Logger:
    """metrics.csv (tidy, append-only), TensorBoard, and W&B with --track. A full disk costs rows, never the run."""

    COLUMNS = "exp_name,env_name,seed,metric,env_step,value"

    def __init__(self, args: Args, run_dir: Path, first_step: int):
        self.args, self.run_dir, self.path = args, run_dir, run_dir / "metrics.csv"
        if args.track:
            import wandb

            wandb.init(project=os.environ.get("WANDB_PROJECT", "brc"), name=run_dir.name, id=run_dir.name,
                       resume="allow", config=dataclasses.asdict(args), dir=str(run_dir), sync_tensorboard=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        complete = text.rfind(b"\n") + 1
        rows = [line.split(",") for line in text[:complete].decode().splitlines()[1:]]
        self.written = {(row[1], row[3], int(row[4])) for row in rows}
        self.unwritten = b"" if complete else f"{self.COLUMNS}\n".encode()
        self.writer = None
        try:
            if complete < len(text):  # a kill left half a line
                os.truncate(self.path, complete)
            self.append()
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        except OSError as error:
            tqdm.write(f"The logs in {run_dir} cannot be written ({error}); the run goes on without TensorBoard.")

    def append(self) -> None:
        """Writes the rows of metrics.csv that wait to be written; those that cannot be wait for the next time."""
        try:
            with open(self.path, "ab", buffering=0) as file:
                self.unwritten = self.unwritten[file.write(self.unwritten):]
                os.fsync(file.fileno())
        except OSError as error:
            tqdm.write(f"metrics.csv cannot be written ({error}); its new rows wait for the next evaluation.")

    def has(self, env_step: int) -> bool:
        """Whether the evaluation at `env_step` is recorded; the mean score is its last row."""
        return ("mean", "score", env_step) in self.written

    def evaluation(self, results: list[dict], learner: Learner) -> None:
        """One row per task and metric, and `env_name=mean` for the mean over tasks; then the task embeddings."""
        named = [*zip(self.args.tasks, results, strict=True), ("mean", mean_result(results))]
        rows = {(task, metric, learner.env_step): value for task, result in named for metric, value in result.items()}
        for (task, metric, env_step), value in rows.items():
            if (task, metric, env_step) not in self.written:  # a kill can leave half an evaluation
                row = f"{self.args.exp_name},{task},{self.args.seed},{metric},{env_step},{value:.6g}\n"
                self.unwritten += row.encode()
        self.written |= rows.keys()
        self.append()
        self.tensorboard(lambda writer: [writer.add_scalar(f"eval_{metric}/{task}", value, env_step)
                                         for (task, metric, env_step), value in rows.items()])
        if learner.agent.critic.embedding:
            vectors = learner.agent.critic.embed(learner.agent.task_ids).detach().cpu()
            self.tensorboard(lambda writer: writer.add_embedding(vectors, list(self.args.tasks), tag="task_embedding",
                                                                 global_step=learner.env_step))

    def training(self, learner: Learner, metrics: dict[str, Tensor], steps_per_second: float) -> None:
        """Losses, entropy, temperature, return scales and speed. Waits for the device."""
        scales = learner.normalizer.denominator(learner.agent.temperature).tolist()
        scalars = {f"train/{name}": value.item() for name, value in metrics.items()}
        scalars |= {f"return_scale/{task}": scale for task, scale in zip(learner.task_names, scales, strict=True)}
        scalars["time/env_steps_per_second"] = steps_per_second
        self.tensorboard(lambda writer: [writer.add_scalar(name, value, learner.env_step)
                                         for name, value in scalars.items()])

    def videos(self, frames: list[list[np.ndarray]], env_step: int) -> None:
        """One GIF per task, as a file and in TensorBoard."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        paths = write_videos(self.args.tasks, frames, self.run_dir, env_step)
        images = [Summary.Image(colorspace=3, encoded_image_string=path.read_bytes()) for path in paths]
        summary = Summary(value=[Summary.Value(tag=f"video/{task}", image=image)
                                 for task, image in zip(self.args.tasks, images)])
        self.tensorboard(lambda writer: writer._get_file_writer().add_summary(summary, env_step))

    def tensorboard(self, write: Callable[[SummaryWriter], object]) -> None:
        """Calls `write`; a failing disk is reported once and ends TensorBoard's log, not the run."""
        try:
            if self.writer:
                write(self.writer)
        except OSError as error:
            tqdm.write(f"TensorBoard's log cannot be written ({error}); it ends here.")
            self.writer = None


def write_videos(tasks: tuple[str, ...], frames: list[list[np.ndarray]], run_dir: Path, env_step: int) -> list[Path]:
    """Writes the frames of each task's episode as a GIF under `run_dir`/videos; none if the disk fails."""
    import imageio.v3 as imageio

    paths = [run_dir / "videos" / f"{task}-{env_step}.gif" for task in tasks]
    try:
        (run_dir / "videos").mkdir(exist_ok=True)
        for path, episode in zip(paths, frames, strict=True):
            imageio.imwrite(path, np.stack(episode), duration=20 * VIDEO_STRIDE, loop=0)
    except OSError as error:
        tqdm.write(f"The videos cannot be written ({error}).")
        return []
    return paths


# ------------------------------------------------------------------------------------------------------ checkpoint
#
# checkpoint.pt            networks, optimisers, normaliser, counters, random states, and the list of replay segments
# checkpoint.previous.pt   the one before, kept until the next one is complete
# replay/<env step>.pt     a segment: the rows that the buffer gained since the checkpoint before. A checkpoint writes
#                          one segment and rewrites none; those whose rows have all left the rings are deleted.
#
# Every file is written aside, synced and renamed, so that it is either complete or not there. torch.save writes zip
# files, which hold a CRC-32 of every record: reading checks them, and a damaged checkpoint falls back to the previous.


class CheckpointError(UsageError):
    """A checkpoint that cannot be used."""


def write_file(path: Path, content: dict) -> None:
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(path.parent)
    except RuntimeError as error:  # torch.save reports a full disk as an error of its own
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        aside.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Makes renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"record {damaged} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a flipped bit can surface as almost any exception of zipfile, pickle or torch
        raise CheckpointError(f"{path} is missing or damaged ({error})") from error


def save_checkpoint(run_dir: Path, learner: "Learner") -> None:
    """Writes the learner's state, and the replay rows it gained since the last checkpoint; OSError if it cannot."""
    segments, name = [], f"{learner.env_step:010d}.pt"
    try:
        if learner.args.save_replay:
            (run_dir / "replay").mkdir(exist_ok=True)
            oldest = learner.buffer.head - learner.buffer.rows
            segments = [segment for segment in learner.segments if (segment["head"].numpy() > oldest).any()]
            since = segments[-1]["head"].numpy() if segments else np.zeros_like(oldest)
            write_file(run_dir / "replay" / name, learner.buffer.export(since))
            segments.append({"file": name, "head": torch.from_numpy(learner.buffer.head.copy())})
        path, previous = run_dir / "checkpoint.pt", run_dir / "checkpoint.previous.pt"
        write_file(run_dir / "checkpoint.new.pt", learner.state_dict() | {"segments": segments})
    except (OSError, RuntimeError):  # the next try writes these rows again: on a full disk they must not pile up
        with contextlib.suppress(OSError):
            (run_dir / "replay" / name).unlink(missing_ok=True)
        raise
    if path.exists():
        os.replace(path, previous)
    os.replace(run_dir / "checkpoint.new.pt", path)
    sync_directory(run_dir)
    keep = {segment["file"] for segment in [*segments, *learner.segments]}
    for file in (run_dir / "replay").glob("*"):
        if file.name not in keep:
            file.unlink()
    learner.segments = segments


def checkpoint_sizes(state: dict, args: Args) -> tuple[int, int]:
    """The sizes O and A of the observations and actions that a checkpoint's networks take."""
    actor = state["agent"]["actor"]
    embedding_dim = args.embedding_dim if embedding_rows(args, len(args.tasks)) else 0
    return actor["body.dense0.weight"].shape[1] - embedding_dim, len(actor["mean.bias"])


def load_checkpoint(run_dir: Path, learner: "Learner | None", replay: bool = True,
                    make: Callable[[dict], "Learner"] | None = None) -> "Learner":
    """Restores what `save_checkpoint` wrote, from the newest complete checkpoint of `run_dir`.

    For transfer.py: `make` makes the learner of the checkpoint's state, and `run_dir` stays as it is. Raises
    CheckpointError if there is no checkpoint, or none with a replay where `replay` asks for it.
    """
    names, failures = ("checkpoint.pt", "checkpoint.previous.pt"), []
    if replay and not make and not any((run_dir / name).exists() for name in names):
        print(f"{run_dir} has no checkpoint yet: starting from step 0.", file=sys.stderr)
        return learner
    for name in names:
        try:
            state = read_file(run_dir / name)
            if not isinstance(state, dict) or "segments" not in state:
                raise CheckpointError(f"{run_dir / name} is not a checkpoint of this program")
            if replay and not state["segments"]:
                raise CheckpointError(f"{run_dir / name} was saved without its replay (--no-save-replay): it serves "
                                      "--evaluate and transfer.py model and embedding, but no --resume and no "
                                      "transfer.py data")
            learner = make(state) if make else learner
            if replay:  # one segment at a time: all of them would double the memory
                files = [run_dir / "replay" / segment["file"] for segment in state["segments"]]
                learner.buffer.load(state["buffer"], map(read_file, files))
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if failures:
            print(f"{failures[0]}; going on from {run_dir / name} at step {state['env_step']:,}.", file=sys.stderr)
            if replay and not make:  # so that the next checkpoint does not push this one out for the damaged one
                with contextlib.suppress(OSError):  # a read-only disk
                    os.replace(run_dir / name, run_dir / "checkpoint.pt")
        learner.load_state_dict(state)
        return learner
    raise CheckpointError(f"No complete checkpoint in {run_dir}: {'; '.join(failures)}.")


# --------------------------------------------------------------------------------------------------- training loop


def choose_device(name: str) -> torch.device:
    """The torch device called `name`; raises UsageError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else []),
                 *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in available:
        raise UsageError(f"Device '{name}' is not on this machine: give {', '.join(available)} or auto.")
    device = torch.device(name)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def derived_seed(seed: int, purpose: str, env_step: int = 0) -> int:
    """Independent seeds for every purpose and step, from the run's one seed."""
    key = (*purpose.encode(), env_step)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0] >> 1)


def write_args(args: Args, run_dir: Path, device: torch.device, env_step: int, **more) -> None:
    """args.json: the arguments, what else a reader needs to repeat the run, and, under `resumed`, every resume."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    here = Path(__file__).resolve().parent
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    packages = ("torch", "numpy", "gymnasium", "mujoco", "dm_control", "metaworld")
    facts = {
        "git_commit": commit or None,
        "command": " ".join(sys.argv),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
    } | more
    path = run_dir / "args.json"
    if args.resume:
        first = json.loads(path.read_text())
        resumed = first.get("resumed", []) + [{"env_step": env_step} | facts]
        facts = {name: first.get(name) for name in facts} | {"resumed": resumed}
    arguments = dataclasses.asdict(args) | {"resume": None, "evaluate": None}
    aside = run_dir / "args.tmp"
    try:
        aside.write_text(json.dumps(arguments | facts, indent=2) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def describe(learner: Learner, run_dir: Path) -> None:
    """Prints what is about to run, and whether this machine can."""
    args, agent, device = learner.args, learner.agent, learner.device
    parameters = {name: sum(p.numel() for p in getattr(agent, name).parameters()) for name in agent.PARTS[:3]}
    print(f"{args.exp_name}: {len(args.tasks)} task{'s' * (len(args.tasks) > 1)}, obs {learner.buffer.fields[0]}, "
          f"act {agent.act_dim}, {args.total_steps:,} steps per task, in {run_dir}")
    print(f"device {device}, {torch.get_num_threads()} threads; {sum(parameters.values()):,} parameters ("
          + ", ".join(f"{name} {count:,}" for name, count in parameters.items())
          + f"); replay {learner.buffer.nbytes / 1e9:.2f} GB when full, on {learner.buffer.device}", flush=True)
    if device.type == "cpu":
        obs, action = torch.zeros(args.batch_size, learner.buffer.fields[0]), torch.zeros(learner.noise_shape)
        start = time.perf_counter()
        with torch.no_grad():
            agent.critic(obs, action, agent.critic.embed(torch.zeros(args.batch_size, dtype=torch.int64)))
        forward = time.perf_counter() - start
        updates = max(0, args.total_steps - args.learning_starts) * args.updates_per_step
        if forward * 6 * updates > 86400:  # in forwards: target 1, critic 1 + 2 back, actor 2
            print(f"On this CPU the updates alone would take about {forward * 6 * updates / 86400:,.1f} days. For "
                  "results in minutes: python brc_sac.py --suite demo", flush=True)


class Signals:
    """SIGTERM and SIGINT stop the run after the current step, a second SIGINT at once; SIGUSR1 checkpoints."""

    def __init__(self):
        self.stop: int | None = None
        self.checkpoint = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if number == signal.SIGUSR1:
            self.checkpoint = True
        else:
            self.stop = number
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_finite(learner: Learner, metrics: dict[str, Tensor], run_dir: Path, action: np.ndarray | None = None) -> None:
    """Raises RunError, and dumps the batch, if a loss or an action is not finite. The device was just waited for."""
    losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist())) if losses else {}
    if action is not None:
        values["action"] = float(action.sum())
    for name, value in values.items():
        if not math.isfinite(value):
            culprits = {f"{field} of {learner.task_names[task]}"
                        for field, rows in learner.batch._asdict().items()
                        for task in learner.batch.task_id[~rows.isfinite().view(len(rows), -1).all(1)].tolist()}
            with contextlib.suppress(OSError, RuntimeError):  # a full disk shall not hide the cause
                torch.save(learner.batch._asdict(), run_dir / "nonfinite_batch.pt")
            raise RunError(f"{name} is {value} at step {learner.env_step:,}; not finite in its batch: "
                           f"{', '.join(sorted(culprits)) or 'nothing, so the network diverged'}. The batch is in "
                           f"{run_dir / 'nonfinite_batch.pt'}; the last checkpoint is from before.")


def train(args: Args, prepare: Callable[["Learner"], None] | None = None, go_on: str | None = None, **facts
          ) -> list[dict]:
    """Trains as `args` say; returns the last evaluation's means, one dict per task.

    For transfer.py: `prepare` sets up the fresh learner, which is then evaluated at its first step too; `go_on` is the
    command that continues the run; `facts` are added to args.json.
    Raises UsageError or suites.SuiteError, before anything is created, for arguments that cannot be run, and RunError
    for a run that cannot go on.
    """
    device = choose_device(args.device)
    replay_device = choose_device(args.replay_device) if args.replay_device else device
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = Path(args.resume or args.run_dir or f"runs/{args.exp_name}__{args.seed}__{stamp}")
    go_on = go_on or f"python brc_sac.py --resume {run_dir}"
    if not args.resume and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UsageError(f"Run directory {run_dir} already holds files: give another --run-dir, or --resume {run_dir} "
                         "to continue the run that is there.")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise UsageError("--track needs W&B, which is not installed: pip install wandb, or leave --track out.")
    suites.check(args.tasks)
    before = read_args(run_dir)[1].get("updates", {}) if args.resume else {}
    fast_args = fast_path(args, device, replay_device, before.get("compile"))
    workers = default_workers(args.tasks) if args.workers is None else args.workers
    signals = Signals()
    envs = VectorEnv(args.tasks, seed=args.seed, workers=workers, pad_to=args.pad_to)
    eval_envs = VectorEnv(args.tasks, seed=args.seed, workers=0 if args.capture_video else workers,
                          render=args.capture_video, pad_to=args.pad_to)
    try:
        learner = Learner(fast_args, envs.obs_dim, envs.act_dim, device, replay_device)
    except RuntimeError as error:  # torch's, also for a CPU
        raise UsageError(f"The networks and the replay do not fit in memory ({str(error).splitlines()[0]}): give "
                         "--replay-device cpu, or a smaller --buffer-size or --width.") from None
    if prepare:
        prepare(learner)
    if args.resume:
        load_checkpoint(run_dir, learner)
        learner.cut_episodes()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        updates = {name: getattr(fast_args, name) for name in ("precision", "compile", "cuda_graph")}
        write_args(args, run_dir, device, learner.env_step, updates=updates, **facts)
    except OSError as error:
        if not args.resume:
            raise UsageError(f"Run directory {run_dir} cannot be written ({error}): give another --run-dir.") from None
        print(f"{run_dir} cannot be written ({error}); the run goes on and tries again.", file=sys.stderr)
    logger = Logger(args, run_dir, learner.env_step)
    describe(learner, run_dir)
    start_step, saved_step = learner.env_step, learner.env_step

    def checkpoint() -> None:
        """Saves what is new since the last time; on failure warns, and the run goes on to the next interval."""
        nonlocal saved_step
        signals.checkpoint = False
        if learner.env_step == saved_step:
            return
        check_finite(learner, metrics, run_dir)  # never over the last good one
        try:
            save_checkpoint(run_dir, learner)
            saved_step = learner.env_step
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            bar.write(f"Checkpoint at step {learner.env_step:,} failed ({error}); trying again at the next interval.")

    def evaluation() -> list[dict]:
        seed = derived_seed(args.seed, "evaluation", learner.env_step)
        outcome = evaluate(learner.agent, eval_envs, args.eval_episodes, seed, args.capture_video, lambda: signals.stop)
        if outcome is None:
            return []
        results, frames = outcome
        logger.evaluation(results, learner)
        if args.capture_video:
            logger.videos(frames, learner.env_step)
        means = mean_result(results)
        bar.write(f"step {learner.env_step:>9,}: " + ", ".join(f"mean {name} {means[name]:.3f}" for name in means))
        bar.set_postfix(score=f"{means['score']:.3f}")
        return results

    metrics, results, first_update = {}, [], time.perf_counter()
    bar = tqdm(total=args.total_steps, initial=learner.env_step, unit="step", dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 15)
    try:
        obs = envs.reset(seed=derived_seed(args.seed, "environments", learner.env_step))
        while True:
            # Checkpoint first: a run that dies while it evaluates comes back here, and evaluates.
            due = learner.env_step % args.eval_interval == 0 or learner.env_step == args.total_steps
            if due or learner.env_step % args.checkpoint_interval == 0 or signals.stop or signals.checkpoint:
                checkpoint()
            if due and (learner.env_step > 0 or prepare) and not signals.stop and not logger.has(learner.env_step):
                results = evaluation()
            if signals.stop or learner.env_step >= args.total_steps:
                break

            action = learner.act(obs)
            check_finite(learner, metrics, run_dir, action)
            envs.step_async(action)
            learning = learner.env_step >= args.learning_starts
            if learning and args.overlap:  # while the simulators work; the newest transition is sampled a step later
                metrics = learner.update()
            result = envs.step_wait()
            learner.env_step += 1
            learner.observe(obs, action, result)
            obs = result.obs
            if learning and not args.overlap:
                metrics = learner.update()

            bar.update()
            step = learner.env_step - max(start_step, args.learning_starts)
            if step == 10:  # compiled and warm
                first_update = time.perf_counter()
            elif step == 60:
                seconds = (time.perf_counter() - first_update) / 50
                left = timedelta(seconds=round(seconds * (args.total_steps - learner.env_step)))
                bar.write(f"{1e3 * seconds:.1f} ms per step of all tasks with {args.updates_per_step} updates: about "
                          f"{left} to go, and evaluations")
            if learner.env_step % args.log_interval == 0 and metrics:
                speed = (learner.env_step - start_step) / bar.format_dict["elapsed"]
                logger.training(learner, metrics, speed)
    except torch.OutOfMemoryError as error:
        raise RunError(f"{device} is out of memory at step {learner.env_step:,} ({str(error).splitlines()[0]}): resume "
                       f"with --replay-device cpu ({go_on}), or start with a smaller --batch-size or --width."
                       ) from None
    except EnvError as error:
        checkpoint()
        raise RunError(f"{error}\nStopped at step {learner.env_step:,}. To go on: {go_on}") from None
    finally:
        bar.close()
        envs.close()
        eval_envs.close()
        logger.tensorboard(lambda writer: writer.close())
    if signals.stop:
        last = f"The last checkpoint is from step {saved_step:,}" if saved_step else "There is no checkpoint yet"
        print(f"Stopped by {signal.Signals(signals.stop).name} at step {learner.env_step:,}. {last}; to go on: {go_on}",
              file=sys.stderr)
        raise SystemExit(128 + signals.stop)
    if saved_step == start_step < learner.env_step:
        raise RunError(f"No checkpoint of {args.exp_name} could be written to {run_dir}.")
    if saved_step < learner.env_step:
        print(f"The last checkpoint is from step {saved_step:,} of {learner.env_step:,}: later ones could not be "
              "written.", file=sys.stderr)
    if results:
        print(table(args.tasks, results))
    return results


def evaluate_run(args: Args) -> None:
    """--evaluate: prints the table of tasks for a run's last checkpoint, with or without its replay."""
    run_dir, device = Path(args.evaluate), choose_device(args.device)
    suites.check(args.tasks)
    workers = 0 if args.capture_video else default_workers(args.tasks) if args.workers is None else args.workers
    envs = VectorEnv(args.tasks, seed=args.seed, workers=workers, render=args.capture_video, pad_to=args.pad_to)
    no_replay = dataclasses.replace(args, buffer_size=1)  # eager and in float32, unless --precision was given
    learner = Learner(no_replay, envs.obs_dim, envs.act_dim, device, choose_device("cpu"))
    load_checkpoint(run_dir, learner, replay=False)
    seed = derived_seed(args.seed, "evaluation", learner.env_step)
    results, frames = evaluate(learner.agent, envs, args.eval_episodes, seed, args.capture_video)
    envs.close()
    if args.capture_video:
        write_videos(args.tasks, frames, run_dir, learner.env_step)
    print(f"{args.exp_name} at step {learner.env_step:,}, {args.eval_episodes} episodes per task")
    print(table(args.tasks, results))


if __name__ == "__main__":
    exit_on_error(lambda: evaluate_run(ARGS) if ARGS.evaluate else train(ARGS))
