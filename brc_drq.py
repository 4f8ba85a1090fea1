"""BRC on DrQ-eps: one large, regularised, categorical value network that learns many Atari games from pixels, online.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners", arXiv 2505.23150.
DrQ-eps (Agarwal et al. 2021) + an Impala encoder with categorical cross-entropy TD + learned task embeddings + per-task
return normalisation. The authors did not release this agent; README.md lists what the paper leaves open.

    python brc_drq.py --suite atari                         26 games of Atari-100k as in the paper (one GPU)
    python brc_drq.py --tasks Pong                          single-task mode: no task embedding
    python brc_drq.py --tasks Pong Breakout Freeway         any games
    python brc_drq.py --tasks Pong Breakout --encoder-scale 0.125 --total-steps 3000     on a CPU, minutes
    python brc_drq.py --resume runs/<run>                   go on after a crash or a kill

Sections, in reading order:
    arguments           every hyper-parameter, with its source
    networks            Encoder, TaskEmbedding, Critic
    return normaliser   one reward scale per task
    replay buffer       one ring per task, every frame stored once; stacks and n-step returns are made at sampling
    update              augmentation, the categorical projection, the loss, and the steps of one update
    evaluation          episodes in environments of their own, with epsilon 0.001
    logging             metrics.csv, TensorBoard, W&B
    checkpoint          one function writes it, one reads it
    training loop       act, update, step, store, log

Shapes: B batch, K atoms, N tasks, A actions, C channels, H width.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
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
from suites.atari import Games, Step

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    """Train BRC (DrQ-eps) on many Atari games with one network."""

    suite: str = "atari"
    """Task collection: atari."""
    tasks: tuple[str, ...] | None = None
    """Games, in place of --suite's: any of the 26 to train on and the 20 held out. One game = single-task mode."""
    encoder_scale: float = 1.0
    """Factor on the encoder's channels 128, 256, 256 (paper: 1)."""
    seed: int = 0
    """Seed of networks, exploration and environments."""
    total_steps: int | None = None
    """Environment steps per task, of four frames each; default 100,000 (Atari-100k)."""
    run_dir: str | None = None
    """Where to write; default runs/<exp>__<seed>__<time>."""
    exp_name: str | None = None
    """Name in metrics.csv; default brc_drq-<suite>, or -<tasks> with --tasks."""
    resume: str | None = None
    """Run directory to continue from its last complete checkpoint; all other arguments are read from there."""
    evaluate: str | None = None
    """Run directory whose agent to evaluate, and nothing else; all other arguments are read from there."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    replay_device: str | None = None
    """Device of the replay buffer; default the training device if its free memory is enough, else cpu."""
    precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Of convolutions and matrix products; all else is float32. Default tf32 on NVIDIA GPUs (float32 elsewhere), fp32
    on a CPU."""
    compile: bool = False
    """torch.compile the loss."""
    track: bool = False
    """Also log to Weights & Biases (pip install wandb), project brc or $WANDB_PROJECT."""
    capture_video: bool = False
    """Record the first evaluation episode of every task as a GIF of what the agent sees, in <run dir>/videos and in
    TensorBoard."""

    eval_interval: int = 10_000
    """Environment steps per task between evaluations; the last step is evaluated too."""
    eval_episodes: int | None = None
    """Evaluation episodes per task; default 10, at an encoder scale of a quarter or less 3."""
    eval_epsilon: float = 0.001
    """Share of random actions in evaluation (DrQ-eps)."""
    log_interval: int = 500
    """Environment steps per task between TensorBoard scalars."""
    checkpoint_interval: int | None = None
    """Environment steps per task between checkpoints; default a twentieth of the run."""
    save_replay: bool = True
    """Keep the replay in the checkpoints; without it a run can be evaluated, and serve transfer.py model and embedding,
    but not be resumed."""

    updates_per_step: int | None = None
    """Gradient updates per environment step of all tasks in parallel; default 2 (paper), at an encoder scale of a
    quarter or less, which is for a CPU, 1 (DrQ-eps)."""
    batch_size: int | None = None
    """Transitions per update over all tasks; default 256 (paper), at an encoder scale of a quarter or less 32
    (DrQ-eps)."""
    learning_starts: int = 1600
    """Random environment steps per task before the first update (DrQ-eps)."""
    buffer_size: int = 100_000
    """Replay capacity in transitions per task (paper)."""
    learning_rate: float = 1e-4
    """AdamW step size (paper)."""
    adam_eps: float = 1.5e-4
    """AdamW epsilon (DrQ-eps; the paper does not state one)."""
    weight_decay: float = 1e-4
    """Decoupled, on every parameter: biases, LayerNorm and embedding too (paper; which ones as the release of SAC)."""
    gamma: float = 0.99
    """Discount per environment step (paper)."""
    n_step: int = 3
    """Steps of rewards before the target bootstraps (paper)."""
    tau: float = 0.005
    """Polyak coefficient of the target network, every update (paper)."""
    num_atoms: int = 101
    """Atoms K of the categorical value (paper)."""
    v_max: float = 10.0
    """Support [-v_max, v_max] of the normalised value (paper)."""
    hidden_width: int = 512
    """Width H of the two dense layers after the encoder, in units (paper)."""
    embedding_dim: int = 32
    """Numbers per task embedding (paper)."""
    epsilon: float = 0.01
    """Share of random actions in training at the end of its decay from 1 (paper)."""
    epsilon_decay_steps: int = 5000
    """Environment steps of that decay, counted from --learning-starts (paper; from where as DrQ-eps)."""
    max_frames: int = 108_000
    """Frames after which an episode is truncated, four per environment step (Atari-100k)."""
    clip_rewards: bool = True
    """Learn from rewards clipped to [-1, 1] (DrQ-eps); scores are of raw rewards."""
    shift_pad: int = 4
    """Largest random shift of the augmentation in pixels (paper)."""
    intensity: float = 0.05
    """Scale of the augmentation's random brightness (DrQ-eps)."""

    embedding_rows: int | None = None
    """Rows of the task embedding; default one per task, none in single-task mode (paper). Set by transfer.py."""
    embedding_only: bool = False
    """Freeze everything but the task embedding. Set by transfer.py."""
    random_start: bool = True
    """Act at random until learning starts, then ever less (DrQ-eps); off = at the final epsilon from the first step.
    Set by transfer.py."""


class UsageError(ValueError):
    """Arguments that cannot be run; its message is one sentence for the user."""


class RunError(RuntimeError):
    """A run that cannot go on; its message says why and what is left of it."""


# For a CPU: DrQ-eps's own batch and updates, a sixteenth of the work, and evaluations to match.
SMALL = dict(batch_size=32, updates_per_step=1, eval_episodes=3)

# Smallest and largest value of each number.
BOUNDS = dict.fromkeys(
    ("total_steps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval", "updates_per_step",
     "batch_size", "n_step", "hidden_width", "embedding_dim", "epsilon_decay_steps", "max_frames"),
    (1, float("inf")),
) | {
    "seed": (0, float("inf")), "num_atoms": (2, float("inf")), "encoder_scale": (1 / 128, 64),
    "gamma": (0, 0.99999), "tau": (0, 1), "weight_decay": (0, 1e6), "learning_rate": (1e-12, 1e6),
    "adam_eps": (1e-12, 1), "v_max": (1e-6, 1e6), "epsilon": (0, 1), "eval_epsilon": (0, 1), "shift_pad": (0, 83),
    "intensity": (0, 0.5), "embedding_rows": (0, float("inf")),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(args: Args) -> Args:
    """Fills in the defaults that depend on other arguments and checks all values, before anything is created.

    Raises UsageError or suites.SuiteError.
    """
    tasks = suites.resolve(args.suite, args.tasks, "all")
    others = [task for task in tasks if suites.benchmark(task) is not suites.atari]
    if others:
        raise UsageError(f"{others[0]} is not an Atari game: brc_drq.py learns from pixels with discrete actions, "
                         "so leave it out or use brc_sac.py for it.")
    label = args.suite
    if args.tasks:
        label = "-".join(tasks) if len(tasks) <= 3 else f"{len(tasks)}tasks"
    defaults = {"total_steps": suites.SUITES["atari"].steps, "exp_name": f"brc_drq-{label}"}
    defaults |= SMALL if args.encoder_scale <= 0.25 else dict(batch_size=256, updates_per_step=2, eval_episodes=10)
    args = fill(dataclasses.replace(args, tasks=tasks), **defaults)
    args = fill(args, checkpoint_interval=max(1, args.total_steps // 20))
    if args.compile and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise UsageError("--compile needs a C++ compiler, and none of c++, g++ and clang++ is on the PATH: install "
                         "one, or leave --compile out.")
    if args.embedding_rows and args.embedding_rows < len(tasks):
        raise UsageError(f"--embedding-rows is {args.embedding_rows} for {len(tasks)} tasks: give one row per task or "
                         "more, or 0 for no task embedding.")
    # An n-step return is complete n steps later, so there is nothing to learn from before.
    bounds = BOUNDS | dict.fromkeys(("learning_starts", "buffer_size"), (args.n_step, float("inf")))
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag(name)} is {value}: give a number of at least {low:g}"
                             + (f" and at most {high:g}." if high < float("inf") else "."))
    return args


def fill(args: Args, **defaults) -> Args:
    """`args` with those of `defaults` that were not given."""
    return dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


# What may change beside --resume or --evaluate: nothing that the learner's numbers depend on.
MAY_CHANGE = ("total_steps", "device", "replay_device", "track", "capture_video",
              "log_interval", "checkpoint_interval", "save_replay", "compile", "resume", "evaluate")


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
    except (UsageError, suites.SuiteError, RunError) as error:
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

ACTIONS, STACK, SIZE = 18, 4, 84  # of the environments: the full action set, frames per observation, pixels


class Dense(nn.Linear):
    """Linear layer with orthogonal weights and zero bias (release); float32 out, also under autocast to bf16."""

    def __init__(self, in_features: int, out_features: int, gain: float = 2**0.5):
        super().__init__(in_features, out_features)
        nn.init.orthogonal_(self.weight, gain)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Conv(nn.Conv2d):
    """3x3 convolution that keeps the image's size, initialised as `Dense`."""

    def __init__(self, in_channels: int, out_channels: int, gain: float = 2**0.5):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        nn.init.orthogonal_(self.weight, gain)
        nn.init.zeros_(self.bias)


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)  # flax's epsilon; torch's default is 1e-5


class ImpalaBlock(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels), Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Encoder(nn.Module):
    """The residual network of Impala (Espeholt et al. 2018), which knows nothing of the task."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.stages = nn.Sequential(*(
            nn.Sequential(Conv(c_in, c_out), nn.MaxPool2d(3, stride=2, padding=1),
                          ImpalaBlock(c_out), ImpalaBlock(c_out))
            for c_in, c_out in zip((STACK, *channels), channels, strict=False)
        ))
        self.out_features = channels[-1] * 11 * 11

    def forward(self, obs: Tensor) -> Tensor:
        x = F.relu(self.stages(obs))  # [B, 4, 84, 84] -> [B, C, 42, 42] -> [B, C, 21, 21] -> [B, C, 11, 11]
        return x.flatten(1)  # [B, 121 C]


class TaskEmbedding(nn.Module):
    """One learned vector per task, of unit L1 norm (paper, section 3)."""

    def __init__(self, num_tasks: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim) / dim**0.5)

    def forward(self, task_id: Tensor) -> Tensor:
        weight = self.weight[task_id]
        return weight / torch.linalg.vector_norm(weight, ord=1, dim=-1, keepdim=True)  # [B, 32]


def embedding_rows(args: Args, num_tasks: int) -> int:
    """One per task, none in single-task mode (paper), or as transfer.py says."""
    default = num_tasks if num_tasks > 1 else 0
    return default if args.embedding_rows is None else args.embedding_rows


class Critic(nn.Module):
    """Impala encoder and two dense layers that map (obs, embedding) to K logits per action, and the task embedding."""

    def __init__(self, args: Args, num_tasks: int):
        super().__init__()
        rows = embedding_rows(args, num_tasks)
        self.embedding = TaskEmbedding(rows, args.embedding_dim) if rows else None
        self.encoder = Encoder(tuple(max(1, round(args.encoder_scale * channels)) for channels in (128, 256, 256)))
        self.norm = layer_norm(self.encoder.out_features)
        in_features = self.encoder.out_features + (args.embedding_dim if rows else 0)
        self.dense1, self.dense2 = Dense(in_features, args.hidden_width), Dense(args.hidden_width, args.hidden_width)
        self.logits = Dense(args.hidden_width, ACTIONS * args.num_atoms)
        self.register_buffer("atoms", torch.linspace(-args.v_max, args.v_max, args.num_atoms), persistent=False)  # [K]

    def embed(self, task_id: Tensor) -> Tensor:
        """Embeddings [B, 32] of tasks [B]; [B, 0] in single-task mode."""
        return self.embedding(task_id) if self.embedding else self.atoms.new_empty(len(task_id), 0)

    def forward(self, obs: Tensor, embedding: Tensor) -> Tensor:
        x = self.encoder(obs).float()  # [B, 4, 84, 84], from 0 to 1 -> [B, 121 C]
        x = torch.cat([self.norm(x), embedding], dim=-1)  # [B, 121 C + 32]
        x = F.relu(self.dense2(F.relu(self.dense1(x))))  # [B, H]
        return self.logits(x).unflatten(-1, (ACTIONS, -1))  # [B, A, K]

    def q_values(self, logits: Tensor) -> Tensor:
        """Expected values [B, A] of logits [B, A, K]."""
        return (logits.softmax(-1) * self.atoms).sum(-1)  # a matrix product would fall under autocast


# ----------------------------------------------------------------------------------------------- return normaliser


class ReturnNormalizer:
    """Scales the rewards of each task so that its returns fit the critic's support (paper, section 3 and Eq. 4).

    r_normalised = r v_max / G_i, where G_i is the largest |Monte-Carlo return| seen from any state of task i's finished
    episodes; there is no share of an entropy bonus. Before a task's first finished episode its G_i is infinite and its
    rewards are 0. Rewards and episodes are the learner's: clipped, and ended by a lost life. A truncated episode's
    return bootstraps with the critic's value of its last state.
    """

    def __init__(self, args: Args, num_tasks: int, device: str | torch.device = "cpu"):
        self.gamma, self.v_max = args.gamma, args.v_max
        self.return_min = np.full(num_tasks, np.inf, np.float32)
        self.return_max = np.full(num_tasks, -np.inf, np.float32)
        self.episode_rewards: list[list[float]] = [[] for _ in range(num_tasks)]  # of the running episodes
        self.return_scale = torch.full((num_tasks,), torch.inf, device=device)  # G_i

    def observe(self, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray,
                last_value: np.ndarray | None = None) -> None:
        """Takes in one step of every task ([N] each) and the returns of the episodes that it ends.

        last_value [N]: the critic's value of the last state in raw reward units; without it (before the critic has
        learned anything) a truncated episode bootstraps with 0.
        """
        for rewards, value in zip(self.episode_rewards, reward.tolist()):  # transfer.py has tasks that do not step
            rewards.append(value)
        for task in np.flatnonzero(terminated | truncated):
            self.finish(task, terminated[task], 0.0 if last_value is None else last_value[task])

    def finish(self, task: int, terminated: bool, last_value: float) -> None:
        """Ends the running episode of `task` and takes in its Monte-Carlo returns G_t = r_t + gamma G_t+1."""
        rewards = np.array(self.episode_rewards[task])  # float64
        G = 0.0 if terminated else float(last_value)
        returns = np.empty_like(rewards)
        for t in reversed(range(len(rewards))):
            returns[t] = G = rewards[t] + self.gamma * G
        self.return_min[task] = min(self.return_min[task], returns.min())
        self.return_max[task] = max(self.return_max[task], returns.max())
        self.return_scale[task] = float(max(self.return_max[task], abs(self.return_min[task])))
        self.episode_rewards[task] = []

    def state_dict(self) -> dict:
        return {"return_min": torch.from_numpy(self.return_min), "return_max": torch.from_numpy(self.return_max),
                "return_scale": self.return_scale, "episode_rewards": self.episode_rewards}

    def load_state_dict(self, state: dict) -> None:
        self.return_min, self.return_max = state["return_min"].numpy(), state["return_max"].numpy()
        self.return_scale.copy_(state["return_scale"])
        self.episode_rewards = state["episode_rewards"]

    def denominator(self) -> Tensor:
        """G_i [N], in raw reward units; infinite before the first finished episode."""
        # Above 0, so that a task whose rewards were all 0 so far stays 0 and does not become 0 / 0.
        return self.return_scale.clamp(min=1e-8)

    def normalize(self, reward: Tensor, task_id: Tensor) -> Tensor:
        """Raw rewards [B] of tasks [B] in units of the critic's support."""
        return reward / (self.denominator() / self.v_max)[task_id]

    def denormalize(self, value: Tensor, task_id: Tensor) -> Tensor:
        """The critic's values [B] of tasks [B] in raw reward units; 0 before a task's first finished episode."""
        scale = self.denominator()[task_id] / self.v_max
        return torch.where(scale.isfinite(), value * scale, 0.0)


# --------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    obs: Tensor  # [B, 4, 84, 84], uint8 as sampled; augmented and from 0 to 1 as the loss takes it
    action: Tensor  # [B]
    reward: Tensor  # [B], discounted sum over n steps, raw as sampled, normalised as the loss takes it
    discount: Tensor  # [B], of next_obs's value: gamma^n; 0 where the game ended or a life was lost in these steps
    next_obs: Tensor  # [B, 4, 84, 84], n steps later, or fewer where the episode was truncated: its true last one
    task_id: Tensor  # [B]


class ReplayBuffer:
    """One ring of rows per task; every frame is stored once, in uint8; rewards are raw.

    Row r holds the newest frame of obs_t and the action, reward and terminated that followed it; row r + 1 that of
    obs_t+1. An episode of T steps takes T + 1 rows: the last one, marked `final`, holds only its true final frame and
    is never sampled as a transition. A lost life is terminated, and the frames go on: so does the environments' stack.
    `row_of` lists the rows that are transitions, so that sampling is uniform and never crosses an episode.

    Stacks and n-step returns are made at sampling. `age` says how many older frames of its stack a row's episode has:
    the others are zero, as in the environments. A transition can be sampled once its n steps are there, and is dropped
    together with the oldest frame of its stack.
    """

    RINGS = ("frame", "action", "reward", "terminated", "final", "age")

    def __init__(self, num_tasks: int, capacity: int, gamma: float, n_step: int, device: str | torch.device = "cpu"):
        """capacity: transitions per task (fewer are kept if episodes are shorter than 64 steps on average)."""
        self.num_tasks, self.capacity, self.gamma, self.n_step = num_tasks, capacity, gamma, n_step
        self.device = torch.device(device)
        self.rows = capacity + capacity // 64 + 2 + STACK - 1  # room for final frames, and for older frames of stacks
        # empty, not zeros: a CPU gives memory page by page as the ring fills.
        self.frame = torch.empty(num_tasks, self.rows, SIZE, SIZE, dtype=torch.uint8, device=device)
        self.action = torch.empty(num_tasks, self.rows, dtype=torch.uint8, device=device)
        self.reward = torch.empty(num_tasks, self.rows, device=device)
        self.terminated = torch.empty(num_tasks, self.rows, dtype=torch.bool, device=device)
        self.final = torch.empty(num_tasks, self.rows, dtype=torch.bool, device=device)
        self.age = torch.empty(num_tasks, self.rows, dtype=torch.uint8, device=device)
        self.row_of = torch.empty(num_tasks, capacity, dtype=torch.int32, device=device)  # transition % capacity -> row
        self.window = torch.zeros(2, num_tasks, dtype=torch.int64, device=device)  # first kept transition, how many
        # The host knows the whole layout, so that adding never asks the device. These counters only ever grow:
        self.head = np.zeros(num_tasks, np.int64)  # row of the current observation
        self.first = np.zeros(num_tasks, np.int64)  # oldest transition kept
        self.stop = np.zeros(num_tasks, np.int64)  # one past the newest transition
        self.episode_steps = np.zeros(num_tasks, np.int64)  # of the running episodes
        self.transition_at = np.full((num_tasks, self.rows), -1, np.int32)  # -1: a final frame, or nothing yet

    @property
    def nbytes(self) -> int:
        """Bytes of the rings when full."""
        return sum(getattr(self, ring).nbytes for ring in (*self.RINGS, "row_of", "transition_at"))

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray,
            truncated: np.ndarray, life_lost: np.ndarray, next_obs: np.ndarray) -> None:
        """Stores one step of every task: [N, 4, 84, 84], five [N], [N, 4, 84, 84]; next_obs is never a reset's."""
        tasks, row = np.arange(self.num_tasks), self.head % self.rows
        self._write_frame(obs)
        self._write(self.action, tasks, row, action.astype(np.uint8))
        self._write(self.reward, tasks, row, reward)
        self._write(self.terminated, tasks, row, terminated | life_lost)
        self._write(self.final, tasks, row, np.zeros_like(terminated))
        self._write(self.row_of, tasks, self.stop % self.capacity, row.astype(np.int32))
        self.transition_at[tasks, row] = self.stop
        self.stop += 1
        self.episode_steps += 1
        self._open_row(tasks)
        self._write_frame(next_obs)
        self._end_episodes(np.flatnonzero(terminated | truncated))
        self._write_window()

    def cut(self) -> None:
        """Ends every running episode as truncated: its current frame becomes the final one."""
        self._end_episodes(np.flatnonzero(self.episode_steps))
        self._write_window()

    def current_obs(self) -> Tensor:
        """The newest observation [N, 4, 84, 84] of every task."""
        return self.stack(torch.arange(self.num_tasks, device=self.device),
                          torch.from_numpy(self.head % self.rows).to(self.device))

    def _end_episodes(self, tasks: np.ndarray) -> None:
        self._write(self.final, tasks, self.head[tasks] % self.rows, np.ones(len(tasks), bool))
        self._open_row(tasks)
        self.episode_steps[tasks] = 0

    def _open_row(self, tasks: np.ndarray) -> None:
        """Moves the heads of `tasks` by one row, over whatever was oldest there."""
        self.head[tasks] += 1
        # The STACK - 1 rows after the head serve as older frames only.
        oldest = self.transition_at[tasks, (self.head[tasks] + STACK - 1) % self.rows]
        self.first[tasks] = np.maximum(self.first[tasks], oldest + 1)
        self.first = np.maximum(self.first, self.stop - self.capacity)
        self.transition_at[tasks, self.head[tasks] % self.rows] = -1

    def _write_window(self) -> None:
        incomplete = np.minimum(self.episode_steps, self.n_step - 1)  # their n-step returns are
        window = np.stack([self.first, self.stop - incomplete - self.first])
        self.window.copy_(torch.from_numpy(window), non_blocking=True)

    def _write_frame(self, obs: np.ndarray) -> None:
        """Writes the newest frame of obs [N, 4, 84, 84] to the head."""
        tasks, row = np.arange(self.num_tasks), self.head % self.rows
        self._write(self.frame, tasks, row, obs[:, -1])
        self._write(self.age, tasks, row, np.minimum(self.episode_steps, STACK - 1).astype(np.uint8))

    def _write(self, ring: Tensor, tasks: np.ndarray, row: np.ndarray, values: np.ndarray) -> None:
        ring[tasks, row] = torch.from_numpy(values).to(self.device, non_blocking=True)

    def export(self, since: np.ndarray) -> dict[str, Tensor]:
        """Rows from number `since` [N] up to and with the current one, which holds only its frame."""
        since = np.maximum(since, self.head - self.rows + 1)
        task = np.repeat(np.arange(self.num_tasks), self.head - since + 1)
        number = np.concatenate([np.arange(first, last + 1) for first, last in zip(since, self.head, strict=True)])
        layout = {"task": task, "number": number, "transition": self.transition_at[task, number % self.rows]}
        return {name: torch.from_numpy(values) for name, values in layout.items()} | {
            name: getattr(self, name)[task, number % self.rows].cpu() for name in self.RINGS
        }

    def load(self, counters: dict[str, Tensor], segments: Iterable[dict[str, Tensor]]) -> None:
        """Restores `state_dict` and what `export` returned, oldest first; the capacity may have changed."""
        self.head, self.first, self.stop, self.episode_steps = (counters[name].numpy() for name in self.COUNTERS)
        self.transition_at[:] = -1
        for segment in segments:
            kept = segment["number"].numpy() > self.head[segment["task"]] - self.rows
            task, number, transition = (segment[name].numpy()[kept] for name in ("task", "number", "transition"))
            row = number % self.rows
            for name in self.RINGS:
                getattr(self, name)[task, row] = segment[name][kept].to(self.device)
            self.transition_at[task, row] = transition
            real = transition >= np.maximum(0, self.stop[task] - self.capacity)
            self._write(self.row_of, task[real], transition[real] % self.capacity, row[real].astype(np.int32))
        usable = self.transition_at.copy()
        gap = (self.head[:, None] + np.arange(1, STACK)) % self.rows  # rows that serve as older frames only
        np.put_along_axis(usable, gap, -1, axis=1)
        oldest = np.where(usable >= 0, usable, self.stop[:, None]).min(1)
        self.first = np.maximum.reduce([self.first, oldest, self.stop - self.capacity])
        self._write_window()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in self.COUNTERS}

    COUNTERS = ("head", "first", "stop", "episode_steps")

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        """A batch with raw rewards, uniform over tasks and over each task's kept transitions."""
        draw = {"size": (batch_size,), "generator": generator, "device": self.device}
        task_id = torch.randint(self.num_tasks, **draw)
        first, size = self.window[:, task_id]
        transition = first + torch.randint(2**62, **draw) % size
        row = self.row_of[task_id, transition % self.capacity].long()
        reward, discount, next_row = self.n_step_return(task_id, row)
        return Batch(
            obs=self.stack(task_id, row),
            action=self.action[task_id, row].long(),
            reward=reward,
            discount=discount,
            next_obs=self.stack(task_id, next_row),
            task_id=task_id,
        )

    def n_step_return(self, task_id: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of transitions [B]: the discounted sum of rewards [B], the discount [B] and the row [B] of what follows.

        The sum ends early where the game ended or a life was lost, with discount 0, and at a final frame, with its own.
        """
        running = torch.ones_like(row, dtype=torch.bool)
        reward, discount = torch.zeros_like(row, dtype=torch.float32), torch.ones_like(row, dtype=torch.float32)
        for _ in range(self.n_step):
            # where, not a product: what lies behind an end may be memory that was never written
            reward = torch.where(running, reward + discount * self.reward[task_id, row], reward)
            terminated = self.terminated[task_id, row]
            row = torch.where(running, (row + 1) % self.rows, row)
            discount = torch.where(running, self.gamma * discount * ~terminated, discount)
            running = running & ~terminated & ~self.final[task_id, row]
        return reward, discount, row

    def stack(self, task_id: Tensor, row: Tensor) -> Tensor:
        """Observations [B, 4, 84, 84] whose newest frames are in rows [B]."""
        back = torch.arange(STACK - 1, -1, -1, device=self.device)  # 3, 2, 1, 0 frames ago
        frames = self.frame[task_id.unsqueeze(1), (row.unsqueeze(1) - back) % self.rows]  # [B, 4, 84, 84]
        there = back <= self.age[task_id, row].unsqueeze(1)  # [B, 4]
        return frames * there[:, :, None, None]


# ---------------------------------------------------------------------------------------------------------- update


def random_shift(obs: Tensor, shift: Tensor) -> Tensor:
    """Moves each of obs [B, 4, 84, 84] by its shift [B, 2] in rows and columns; border pixels are replicated."""
    pixel = torch.arange(SIZE, device=obs.device)
    rows, columns = (pixel + shift.unsqueeze(-1)).clamp(0, SIZE - 1).unbind(1)  # [B, 84] each
    sample = torch.arange(len(obs), device=obs.device)[:, None, None]
    # [B, 84, 84, 4] in memory, which is the layout of channels-last, without another copy
    return obs.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(obs: Tensor, args: Args, generator: torch.Generator) -> Tensor:
    """DrQ-eps's augmentation of obs [B, 4, 84, 84] in uint8: a random shift and a random intensity of each sample."""
    draw = {"generator": generator, "device": obs.device}
    shift = torch.randint(-args.shift_pad, args.shift_pad + 1, (len(obs), 2), **draw)
    intensity = 1 + args.intensity * torch.randn(len(obs), **draw).clamp(-2, 2)
    return to_float(random_shift(obs, shift)) * intensity[:, None, None, None]


def to_float(obs: Tensor) -> Tensor:
    """Observations in uint8 as the networks take them, from 0 to 1."""
    return obs.float() / 255


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


def target_positions(batch: Batch, atoms: Tensor) -> Tensor:
    """Where the atoms of the next state's value move to [B, K]: the n-step reward + gamma^n (1 - terminated) z."""
    return batch.reward.unsqueeze(-1) + batch.discount.unsqueeze(-1) * atoms


def critic_loss(critic: Critic, target: Critic, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy between the critic's logits and the projected target (paper, Eq. 3), and what to log."""
    embedding, sample = critic.embed(batch.task_id), torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        next_action = critic.q_values(critic(batch.next_obs, embedding)).argmax(-1)  # [B]: the critic chooses ...
        target_logits = target(batch.next_obs, target.embed(batch.task_id))  # [B, A, K]
        next_probs = target_logits[sample, next_action].softmax(-1)  # [B, K]: ... the target evaluates (double Q)
        positions = target_positions(batch, critic.atoms)  # [B, K]
        target_probs = project_categorical(next_probs, positions, critic.atoms)  # [B, K]
    logits = critic(batch.obs, embedding)[sample, batch.action]  # [B, K]
    cross_entropy = -(target_probs * logits.log_softmax(-1)).sum(-1)  # [B]
    loss = cross_entropy.mean()
    return loss, {"critic_loss": loss.detach(), "target_q": (target_probs * critic.atoms).sum(-1).mean(),
                  "q": critic.q_values(logits.detach()).mean()}


def make_adamw(parameters: list[nn.Parameter], args: Args) -> torch.optim.AdamW:
    """AdamW of the critic: decoupled decay on every parameter, no mask (release)."""
    return torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.999), eps=args.adam_eps,
                             weight_decay=args.weight_decay, fused=True)


class Agent:
    """Critic and target with their optimiser, and the steps of one update."""

    PARTS = ("critic", "target", "critic_optimizer")

    def __init__(self, args: Args, num_tasks: int, device: str | torch.device = "cpu"):
        self.args, self.num_tasks, self.device = args, num_tasks, torch.device(device)
        with self.device:
            self.critic = Critic(args, num_tasks)
            self.target = Critic(args, num_tasks).requires_grad_(False)
            self.task_ids = torch.arange(num_tasks)
        self.target.load_state_dict(self.critic.state_dict())
        if args.embedding_only:
            self.critic.requires_grad_(False)
            self.critic.embedding.requires_grad_(True)
            self.target.embedding = self.critic.embedding  # the one that learns is the only one there is
        for part in (self.critic, self.target):  # what convolutions are fastest with: twice as fast on a CPU
            part.to(memory_format=torch.channels_last)
        self.critic_parameters, self.target_parameters = list(self.critic.parameters()), list(self.target.parameters())
        self.critic_optimizer = make_adamw([p for p in self.critic_parameters if p.requires_grad], args)
        # The one place that decides how the update runs: eager in float32 is the same code.
        self.critic_loss = torch.compile(critic_loss) if args.compile else critic_loss
        precision = args.precision or ("tf32" if self.device.type == "cuda" else "fp32")
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient update from a batch with augmented observations and normalised rewards; returns what to log."""
        # target distribution, cross-entropy, critic and embedding step
        with self.autocast:
            loss, metrics = self.critic_loss(self.critic, self.target, batch)
        optimize(self.critic_optimizer, loss)
        if self.args.embedding_only:
            return metrics
        # target <- tau critic + (1 - tau) target
        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.args.tau)
        return metrics

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def act(self, obs: Tensor, task_id: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        """Actions [B] for observations [B, 4, 84, 84] in uint8 of tasks [B]: uniform with probability epsilon."""
        draw = {"size": (len(obs),), "generator": generator, "device": self.device}
        explore, action = torch.rand(**draw) < epsilon, torch.randint(ACTIONS, **draw)
        return action if epsilon == 1 else torch.where(explore, action, self.q_values(obs, task_id).argmax(-1))

    @torch.no_grad()
    def q_values(self, obs: Tensor, task_id: Tensor) -> Tensor:
        """Normalised values [B, A] of observations [B, 4, 84, 84] in uint8 of tasks [B]."""
        return self.critic.q_values(self.critic(to_float(obs), self.critic.embed(task_id)))


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


class Learner:
    """Everything that a run must not lose: agent, normaliser, replay, random states and the step count."""

    def __init__(self, args: Args, device: torch.device, replay_device: torch.device):
        num_tasks = len(args.tasks)
        torch.manual_seed(derived_seed(args.seed, "networks"))
        self.args, self.device = args, device
        self.agent = Agent(args, num_tasks, device)
        self.task_names = args.tasks  # of the normaliser's rows; transfer.py adds those of a pretraining replay
        self.normalizer = ReturnNormalizer(args, max(num_tasks, embedding_rows(args, num_tasks)), device)
        self.buffer = make_buffer(args, replay_device)
        self.generators = {name: torch.Generator(where).manual_seed(derived_seed(args.seed, name))
                           for name, where in (("exploration", device), ("augmentation", device),
                                               ("replay", replay_device))}
        self.prefetch = replay_device != device
        self.prefetched: Batch | None = None  # on its way to the device
        self.copies = torch.cuda.Stream(device) if self.prefetch and device.type == "cuda" else None
        self.env_step = 0  # environment steps per task so far
        self.segments: list[dict] = []  # replay files of the last checkpoint

    def epsilon(self) -> float:
        """1 until learning starts, then linearly down (the schedule of Dopamine)."""
        if not self.args.random_start:
            return self.args.epsilon
        left = 1 - (self.env_step - self.args.learning_starts) / self.args.epsilon_decay_steps
        return self.args.epsilon + (1 - self.args.epsilon) * min(1.0, max(0.0, left))

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Exploring actions [N] for observations [N, 4, 84, 84]."""
        action = self.agent.act(torch.from_numpy(obs).to(self.device), self.agent.task_ids, self.epsilon(),
                                self.generators["exploration"])
        return action.cpu().numpy()  # waits for the device: the games need the actions

    def update(self) -> dict[str, Tensor]:
        """Samples a batch, augments it, normalises its rewards and makes one gradient update; returns what to log."""
        batch = self.next_batch()
        obs, next_obs = (augment(field, self.args, self.generators["augmentation"])
                         for field in (batch.obs, batch.next_obs))
        reward = self.normalizer.normalize(batch.reward, batch.task_id)
        self.batch = batch._replace(obs=obs, next_obs=next_obs, reward=reward)
        metrics = self.agent.update(self.batch)
        if self.prefetch:  # the device has an update to compute: meanwhile gather the next batch and send it
            self.prefetched = self.send_batch()
        return metrics

    def next_batch(self) -> Batch:
        """The next batch on the training device. From a replay in host memory it was sampled one update earlier."""
        if not self.prefetch:
            return self.buffer.sample(self.args.batch_size, self.generators["replay"])
        batch = self.prefetched or self.send_batch()
        if self.copies:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)
            for field in batch:
                field.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def send_batch(self) -> Batch:
        """Samples in host memory and starts the copy to the device, from pinned memory, on a stream of its own."""
        batch = self.buffer.sample(self.args.batch_size, self.generators["replay"])
        with torch.cuda.stream(self.copies):  # does nothing without a GPU
            return Batch(*((field.pin_memory() if self.copies else field).to(self.device, non_blocking=True)
                           for field in batch))

    def observe(self, obs: np.ndarray, action: np.ndarray, result: Step) -> None:
        """Stores one step of every task and the returns of the episodes that it ends."""
        reward = result.reward.clip(-1, 1) if self.args.clip_rewards else result.reward
        self.buffer.add(obs, action, reward, result.terminated, result.truncated, result.life_lost, result.next_obs)
        last_value = self.raw_value(result.next_obs) if result.truncated.any() else None
        self.normalizer.observe(reward, result.terminated | result.life_lost, result.truncated, last_value)

    def raw_value(self, obs: np.ndarray) -> np.ndarray | None:
        """The greedy action's value [N] of observations [N, 4, 84, 84] in raw reward units; None before learning."""
        if self.env_step <= self.args.learning_starts:
            return None
        value = self.agent.q_values(torch.from_numpy(obs).to(self.device), self.agent.task_ids).amax(-1)
        return self.normalizer.denormalize(value, self.agent.task_ids).cpu().numpy()  # waits, once per episode

    def cut_episodes(self) -> None:
        """Ends the running episodes as truncated: environments start anew after a resume."""
        last_value = self.raw_value(self.buffer.current_obs().cpu().numpy())
        for task in range(len(self.args.tasks)):
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
            "prefetched": self.prefetched._asdict() if self.prefetched else None,
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
        if self.prefetch and state["prefetched"]:
            self.prefetched = Batch(**{name: field.to(self.device) for name, field in state["prefetched"].items()})
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


def evaluate(agent: Agent, envs: Games, seed: int, video: bool = False,
             stop: Callable[[], object] = lambda: None) -> tuple[list[dict], list] | None:
    """Plays one game to its end in each of `envs`, greedily but for `eval_epsilon`.

    `envs` are evaluation's own, the same number for every task, task by task; they are seeded anew each time, so that
    nothing carries over between evaluations. Returns one dict per task with the means of `return`, of raw rewards, and
    `score`; and, with `video`, the frames of each task's first episode. Returns None as soon as `stop()` is true.
    """
    num_tasks, episodes = agent.num_tasks, envs.num_envs // agent.num_tasks
    episode_return = np.zeros(envs.num_envs)
    frames: list[list[np.ndarray]] = [[] for _ in range(num_tasks)]
    generator = torch.Generator(agent.device).manual_seed(seed)
    rows, obs = np.arange(envs.num_envs), envs.reset(seed=seed)  # of the games that are not over
    for step in itertools.count():
        if not len(rows):
            break
        if stop():
            return None
        if video and step % VIDEO_STRIDE == 0:
            for row, stack in zip(rows, obs, strict=True):
                if row % episodes == 0:
                    frames[row // episodes].append(stack[-1])
        task_id = torch.from_numpy(rows // episodes).to(agent.device)
        action = agent.act(torch.from_numpy(obs).to(agent.device), task_id, agent.args.eval_epsilon, generator)
        result = envs.step(action.cpu().numpy(), rows)
        episode_return[rows] += result.reward
        running = ~(result.terminated | result.truncated)
        rows, obs = rows[running], result.obs[running]
    returns = episode_return.reshape(num_tasks, episodes)
    scores = [[suites.score(task, value, None) for value in values]
              for task, values in zip(agent.args.tasks, returns.tolist(), strict=True)]
    return [{"return": float(value), "score": float(score)}
            for value, score in zip(returns.mean(1), np.mean(scores, 1), strict=True)], frames


def table(tasks: tuple[str, ...], results: list[dict]) -> str:
    """The results of an evaluation as text, a row per task and one for the mean."""
    width = max(len(task) for task in (*tasks, "mean"))
    lines = [f"{'task':<{width}}  {'return':>9}  {'score':>6}"]
    for task, result in [*zip(tasks, results, strict=True), ("mean", mean_result(results))]:
        lines.append(f"{task:<{width}}  {result['return']:9.1f}  {result['score']:6.3f}")
    return "\n".join(lines)


def mean_result(results: list[dict]) -> dict:
    """Means over tasks."""
    return {metric: float(np.mean([result[metric] for result in results])) for metric in ("return", "score")}


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
        """Losses, epsilon, return scales and speed. Waits for the device."""
        scales = learner.normalizer.denominator().tolist()
        scalars = {f"train/{name}": value.item() for name, value in metrics.items()}
        scalars |= {f"return_scale/{task}": scale for task, scale in zip(learner.task_names, scales, strict=True)}
        scalars |= {"train/epsilon": learner.epsilon(), "time/env_steps_per_second": steps_per_second}
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


def checkpoint_sizes(state: dict, args: Args) -> tuple[()]:
    """No sizes that a new game could fail to fit: all are played from the same pixels with the same actions."""
    return ()


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
    packages = ("torch", "numpy", "gymnasium", "ale-py")
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
        facts = {name: first[name] for name in facts} | {"resumed": resumed}
    arguments = dataclasses.asdict(args) | {"resume": None, "evaluate": None}
    aside = run_dir / "args.tmp"
    try:
        aside.write_text(json.dumps(arguments | facts, indent=2) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def make_buffer(args: Args, device: str | torch.device) -> ReplayBuffer:
    """The run's replay buffer; on the device `meta` it takes no memory, and tells its size all the same."""
    capacity = min(args.buffer_size, args.total_steps)
    return ReplayBuffer(len(args.tasks), capacity, args.gamma, args.n_step, device)


def choose_replay_device(args: Args, device: torch.device) -> torch.device:
    """--replay-device, or the training device if its free memory is enough for the replay and the update, or cpu."""
    if args.replay_device or device.type == "cpu":
        return choose_device(args.replay_device or "cpu")
    free, _ = torch.cuda.mem_get_info(device)
    # Networks, optimiser and the activations of an update, estimated: 16 GB at the paper's size, in float32.
    update = 16e9 * args.encoder_scale * args.batch_size / 256
    return device if make_buffer(args, "meta").nbytes + update < free else torch.device("cpu")


def describe(learner: Learner, run_dir: Path) -> None:
    """Prints what is about to run, and whether this machine can."""
    args, agent, device = learner.args, learner.agent, learner.device
    parameters = sum(parameter.numel() for parameter in agent.critic_parameters)
    print(f"{args.exp_name}: {len(args.tasks)} game{'s' * (len(args.tasks) > 1)}, {args.total_steps:,} steps per task, "
          f"in {run_dir}")
    print(f"device {device}, {torch.get_num_threads()} threads; {parameters:,} parameters, and as many of the target; "
          f"replay {learner.buffer.nbytes / 1e9:.2f} GB when full, on {learner.buffer.device}", flush=True)
    if device.type == "cpu":
        obs, task_id = torch.zeros(8, STACK, SIZE, SIZE, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
        start = time.perf_counter()
        agent.q_values(obs, task_id)
        forward = (time.perf_counter() - start) * args.batch_size / 8
        updates = max(0, args.total_steps - args.learning_starts) * args.updates_per_step
        if forward * 5 * updates > 86400:  # in forwards: target 1, next action 1, critic 1 + 2 back
            print(f"On this CPU the updates alone would take about {forward * 5 * updates / 86400:,.1f} days. For "
                  "minutes: python brc_drq.py --tasks Pong Breakout --encoder-scale 0.125 --total-steps 3000",
                  flush=True)


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


def check_finite(learner: Learner, metrics: dict[str, Tensor], run_dir: Path) -> None:
    """Raises RunError, and dumps the batch, if the loss is NaN or infinite. The device was just waited for."""
    if metrics and not metrics["critic_loss"].isfinite():
        culprits = {f"{field} of {learner.task_names[task]}"
                    for field, values in learner.batch._asdict().items()
                    for task in learner.batch.task_id[~values.isfinite().reshape(len(values), -1).all(1)].tolist()}
        with contextlib.suppress(OSError, RuntimeError):  # a full disk shall not hide the cause
            torch.save(learner.batch._asdict(), run_dir / "nonfinite_batch.pt")
        raise RunError(f"critic_loss is {metrics['critic_loss'].item()} at step {learner.env_step:,}; not finite in "
                       f"its batch: {', '.join(sorted(culprits)) or 'nothing, so the network diverged'}. The batch is "
                       f"in {run_dir / 'nonfinite_batch.pt'}; the last checkpoint is from before.")


def train(args: Args, prepare: Callable[["Learner"], None] | None = None, go_on: str | None = None, **facts
          ) -> list[dict]:
    """Trains as `args` say; returns the last evaluation's means, one dict per task.

    For transfer.py: `prepare` sets up the fresh learner, which is then evaluated at its first step too; `go_on` is the
    command that continues the run; `facts` are added to args.json.
    Raises UsageError or suites.SuiteError, before anything is created, for arguments that cannot be run, and RunError
    for a run that cannot go on.
    """
    device = choose_device(args.device)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_dir = Path(args.resume or args.run_dir or f"runs/{args.exp_name}__{args.seed}__{stamp}")
    go_on = go_on or f"python brc_drq.py --resume {run_dir}"
    if not args.resume and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UsageError(f"Run directory {run_dir} already holds files: give another --run-dir, or --resume {run_dir} "
                         "to continue the run that is there.")
    if args.track and importlib.util.find_spec("wandb") is None:
        raise UsageError("--track needs W&B, which is not installed: pip install wandb, or leave --track out.")
    suites.check(args.tasks)
    signals = Signals()
    envs = Games(args.tasks, args.max_frames)
    eval_envs = Games([task for task in args.tasks for _ in range(args.eval_episodes)], args.max_frames)
    try:
        learner = Learner(args, device, choose_replay_device(args, device))
    except RuntimeError as error:  # torch's, also for a CPU
        raise UsageError(f"The networks and the replay do not fit in memory ({str(error).splitlines()[0]}): give "
                         "--replay-device cpu, or a smaller --buffer-size or --encoder-scale.") from None
    if prepare:
        prepare(learner)
    if args.resume:
        load_checkpoint(run_dir, learner)
        learner.cut_episodes()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_args(args, run_dir, device, learner.env_step, **facts)
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
        outcome = evaluate(learner.agent, eval_envs, seed, args.capture_video, lambda: signals.stop)
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
            check_finite(learner, metrics, run_dir)
            envs.step_async(action)
            updates = args.updates_per_step if learner.env_step >= args.learning_starts else 0
            for _ in range(updates):  # while the games step; the newest transition is visible one step later
                metrics = learner.update()
            result = envs.step_wait()
            learner.env_step += 1
            learner.observe(obs, action, result)
            obs = result.obs

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
                       f"with --replay-device cpu ({go_on}), or start with a smaller "
                       "--batch-size or --encoder-scale.") from None
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
    envs = Games([task for task in args.tasks for _ in range(args.eval_episodes)], args.max_frames)
    no_replay = dataclasses.replace(args, buffer_size=args.n_step)
    learner = Learner(no_replay, device, choose_device("cpu"))
    load_checkpoint(run_dir, learner, replay=False)
    seed = derived_seed(args.seed, "evaluation", learner.env_step)
    results, frames = evaluate(learner.agent, envs, seed, args.capture_video)
    envs.close()
    if args.capture_video:
        write_videos(args.tasks, frames, run_dir, learner.env_step)
    print(f"{args.exp_name} at step {learner.env_step:,}, {args.eval_episodes} episodes per task")
    print(table(args.tasks, results))


if __name__ == "__main__":
    exit_on_error(lambda: evaluate_run(ARGS) if ARGS.evaluate else train(ARGS))
