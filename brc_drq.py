"""BRC on DrQ-eps: one large, regularised, categorical value network that learns many Atari games from pixels, online.

"Bigger, Regularized, Categorical: High-Capacity Value Functions are Efficient Multi-Task Learners", arXiv 2505.23150.
DrQ-eps (Agarwal et al. 2021) + an Impala encoder with categorical cross-entropy TD + learned task embeddings + per-task
return normalisation. The authors did not release this agent; docs/choices.md lists what the paper leaves open.

    python brc_drq.py --suite atari                         26 games of Atari-100k as in the paper (one GPU)
    python brc_drq.py --tasks Pong                          single-task mode: batch 64, no task embedding
    python brc_drq.py --tasks Pong Breakout --small --total-steps 3000      on a laptop's CPU, minutes
    python brc_drq.py --resume runs/<run>                   go on after a crash or a kill

Sections, in reading order:
    arguments           every hyper-parameter, with its source
    networks            Encoder, TaskEmbedding, Critic
    return normaliser   one reward scale per task
    replay buffer       one row per step of all tasks, every frame stored once; stacks and n-step returns at sampling
    losses              the augmentation, the categorical projection and the loss
    agent               the two steps of one update, and actions
    evaluation          whole games in environments of their own, with epsilon 0.001
    training loop       act, step and update, store, log

Run directory, logs, checkpoint files and signals are in harness.py, which no idea about the method has to touch.
Shapes: B batch, K atoms, N tasks, A actions, C channels, D embedding, H width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import harness
import progress
import suites
from harness import UsageError
from suites.atari import Games

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    """Train BRC (DrQ-eps) on many Atari games with one network."""

    suite: str = "atari"
    """Task collection: atari."""
    tasks: tuple[str, ...] | None = None
    """Games, in place of --suite's: any of the 26 to train on and the 20 held out. One game = single-task mode."""
    seed: int = 0
    """Seed of networks, exploration and environments."""
    total_steps: int | None = None
    """Environment steps per task, of four frames each; default 100,000 (Atari-100k)."""
    small: bool = False
    """Sizes for a laptop's CPU: an eighth of the encoder's channels, batch and updates of DrQ-eps, few episodes."""

    run_dir: str | None = None
    """Where to write; default runs/<exp>__<seed>__<time>."""
    exp_name: str | None = None
    """Name in metrics.csv; default <script>-<suite>, or -<tasks> with --tasks."""
    resume: str | None = None
    """Run directory to continue from its last complete checkpoint; all other arguments are read from there."""
    evaluate: str | None = None
    """Run directory whose agent to evaluate, and nothing else; all other arguments are read from there."""
    track: bool = False
    """Also log to Weights & Biases (pip install wandb), project brc or $WANDB_PROJECT."""
    capture_video: bool = False
    """Record the first evaluation episode of every task as a GIF, in <run dir>/videos and in TensorBoard."""
    eval_interval: int = 10_000
    """Environment steps per task between evaluations; the last step is evaluated too."""
    eval_episodes: int | None = None
    """Evaluation episodes per task; default 10, with --small 3."""
    final_eval_episodes: int | None = None
    """The same at the last step; default --eval-episodes where that is given, else 100 (DrQ-eps), with --small 3."""
    eval_epsilon: float = 0.001
    """Share of random actions in evaluation (DrQ-eps)."""
    log_interval: int = 500
    """Environment steps per task between TensorBoard scalars."""
    checkpoint_interval: int | None = None
    """Environment steps per task between checkpoints; default a twentieth of the run."""
    save_replay: bool = True
    """Keep the replay in the checkpoints; without it a run serves --evaluate and transfer.py, but not --resume."""

    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    replay_device: str | None = None
    """Device of the replay buffer; default the training device if its free memory is enough, else cpu."""
    threads: int | None = None
    """Threads of torch on a CPU; default OMP_NUM_THREADS, or as many as make steps fastest, tried while it trains."""
    precision: Literal["tf32", "bf16", "fp32"] = "tf32"
    """Of convolutions and matrix products; all else is float32. tf32 is of NVIDIA GPUs, and float32 elsewhere."""
    compile: bool = False
    """torch.compile the loss."""

    encoder_scale: float | None = None
    """Factor on the encoder's channels 128, 256, 256; default 1 (paper), with --small 0.125."""
    hidden_width: int = 512
    """Width H of the two dense layers after the encoder, in units (paper)."""
    embedding_dim: int = 32
    """Numbers per task embedding (paper)."""
    embedding_norm: Literal["l1", "l2"] = "l1"
    """Norm that is 1 in every task embedding (paper, C.4; the release of SAC has l2)."""
    num_atoms: int = 101
    """Atoms K of the categorical value (paper)."""
    v_max: float = 10.0
    """Support [-v_max, v_max] of the normalised value (paper)."""
    updates_per_step: int | None = None
    """Gradient updates per environment step of all tasks in parallel; default 2 (paper), with --small 1 (DrQ-eps)."""
    batch_size: int | None = None
    """Transitions per update over all tasks; default 256 multi-task, 64 single-task (paper), --small 32 (DrQ-eps)."""
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
    epsilon: float = 0.01
    """Share of random actions in training at the end of its decay from 1 (paper)."""
    epsilon_decay_steps: int = 5000
    """Environment steps of that decay, counted from --learning-starts (paper; from where as DrQ-eps)."""
    max_frames: int = 108_000
    """Frames after which an episode is truncated, four per environment step (Atari-100k)."""
    clip_rewards: bool = True
    """Learn from rewards clipped to [-1, 1] (DrQ-eps); scores are of raw rewards."""
    shift_pad: int = 4
    """Random shift of the augmentation in pixels (paper): -shift_pad to shift_pad - 1, as DrQ-eps's code draws it."""
    intensity: float = 0.05
    """Scale of the augmentation's random brightness (DrQ-eps)."""


# What --small sets where it is not given: what a laptop's CPU can do in minutes; measured in benchmarks/README.md.
SMALL = dict(encoder_scale=0.125, batch_size=32, updates_per_step=1, eval_episodes=3)


def resolve(args: Args) -> Args:
    """Fills in the defaults that depend on other arguments. Raises UsageError or suites.SuiteError for bad ones."""
    tasks = suites.resolve(args.suite, args.tasks, "all")
    if others := [task for task in tasks if suites.benchmark(task) is not suites.atari]:
        raise UsageError(f"{others[0]} is not an Atari game: {Path(__file__).name} learns from pixels with discrete "
                         "actions, so leave it out, or use brc_sac.py for it.")
    label = args.suite
    if args.tasks:
        label = "-".join(tasks) if len(tasks) <= 3 else f"{len(tasks)}tasks"
    defaults = {
        "encoder_scale": 1.0, "batch_size": 256 if len(tasks) > 1 else 64, "updates_per_step": 2, "eval_episodes": 10,
        "final_eval_episodes": args.eval_episodes or (3 if args.small else 100),
        "total_steps": suites.SUITES["atari"].steps, "exp_name": f"{harness.PROGRAM.stem}-{label}",
    } | (SMALL if args.small else {})
    args = harness.fill(dataclasses.replace(args, tasks=tasks), **defaults)
    args = harness.fill(args, checkpoint_interval=max(1, args.total_steps // 20))
    harness.check_range(args, 0, math.inf, "total_steps")  # none for a zero-shot transfer
    harness.check_range(args, 1, math.inf, "eval_interval", "eval_episodes", "final_eval_episodes",
                        "log_interval", "checkpoint_interval", "updates_per_step", "batch_size", "n_step",
                        "hidden_width", "embedding_dim", "epsilon_decay_steps", "max_frames", "threads")
    # An n-step return is complete n steps later, so there is nothing to learn from before.
    harness.check_range(args, args.n_step, math.inf, "learning_starts", "buffer_size")
    harness.check_range(args, 0, math.inf, "seed")
    harness.check_range(args, 0, 1e12, "weight_decay")
    harness.check_range(args, 2, math.inf, "num_atoms")
    harness.check_range(args, 1e-12, 1e6, "learning_rate", "adam_eps", "v_max")
    harness.check_range(args, 1 / 128, 64, "encoder_scale")
    harness.check_range(args, 0, 0.99999, "gamma")
    harness.check_range(args, 0, 1, "tau", "epsilon", "eval_epsilon", "intensity")
    harness.check_range(args, 0, 83, "shift_pad")
    if args.total_steps <= args.learning_starts and not args.evaluate:
        raise UsageError(f"With --total-steps {args.total_steps} and --learning-starts {args.learning_starts} nothing "
                         "would be learned: give more steps, or a smaller --learning-starts.")
    return args


# Parsed before torch is imported, so that --help and a mistyped name answer at once.
ARGS = harness.exit_on_error(harness.parse_args, Args, resolve) if __name__ == "__main__" else None

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import devices  # noqa: E402

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
    """One learned vector per task, scaled to unit L1 norm (paper, appendix C.4) or unit L2 norm."""

    def __init__(self, num_tasks: int, dim: int, norm: str):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_tasks, dim) / dim**0.5)
        self.order = {"l1": 1, "l2": 2}[norm]

    def forward(self, task_id: Tensor) -> Tensor:
        weight = self.weight[task_id]
        return weight / torch.linalg.vector_norm(weight, ord=self.order, dim=-1, keepdim=True)  # [B, D]


class Critic(nn.Module):
    """Impala encoder and two dense layers that map (obs, embedding) to K logits per action, and the task embedding."""

    def __init__(self, args: Args, num_embeddings: int):
        """num_embeddings: one per task; 0 in single-task mode (paper)."""
        super().__init__()
        rows = num_embeddings
        self.embedding = TaskEmbedding(rows, args.embedding_dim, args.embedding_norm) if rows else None
        self.encoder = Encoder(tuple(max(1, round(args.encoder_scale * channels)) for channels in (128, 256, 256)))
        self.norm = layer_norm(self.encoder.out_features)
        in_features = self.encoder.out_features + (args.embedding_dim if rows else 0)
        self.dense1, self.dense2 = Dense(in_features, args.hidden_width), Dense(args.hidden_width, args.hidden_width)
        self.logits = Dense(args.hidden_width, ACTIONS * args.num_atoms)
        self.register_buffer("atoms", torch.linspace(-args.v_max, args.v_max, args.num_atoms), persistent=False)  # [K]

    def embed(self, task_id: Tensor) -> Tensor:
        """Embeddings [B, D] of tasks [B], D = embedding_dim; [B, 0] in single-task mode."""
        return self.atoms.new_empty(len(task_id), 0) if self.embedding is None else self.embedding(task_id)

    def forward(self, obs: Tensor, embedding: Tensor) -> Tensor:
        x = self.encoder(obs).float()  # [B, 4, 84, 84], from 0 to 1 -> [B, 121 C]
        x = torch.cat([self.norm(x), embedding], dim=-1)  # [B, 121 C + D]
        x = F.relu(self.dense2(F.relu(self.dense1(x))))  # [B, H]
        return self.logits(x).unflatten(-1, (ACTIONS, -1))  # [B, A, K]

    def q_values(self, logits: Tensor) -> Tensor:
        """Expected values [B, A] of logits [B, A, K]."""
        return (logits.softmax(-1) * self.atoms).sum(-1)  # a matrix product would fall under autocast


# ----------------------------------------------------------------------------------------------- return normaliser


class ReturnNormalizer:
    """Scales the rewards of each task so that its returns fit the critic's support (paper, appendix C.2, Eq. 2-4).

    r_normalised = r v_max / G_i, where G_i is the largest |Monte-Carlo return| seen from any state of task i's finished
    episodes; there is no share of an entropy bonus. Before a task's first finished episode with a reward its G_i is
    infinite and its rewards are 0. Rewards and episodes are the learner's: clipped, and ended by a lost life. A
    truncated episode's return bootstraps with the critic's value of its last state.
    """

    def __init__(self, args: Args, num_tasks: int, device: str | torch.device = "cpu"):
        self.gamma, self.v_max = args.gamma, args.v_max
        # The extremes are kept where episodes end, on the host, and what every update reads of them on the device.
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
        # fill_ never waits for the device; an assignment may.
        self.return_scale[task].fill_(float(max(self.return_max[task], abs(self.return_min[task]))))
        self.episode_rewards[task] = []

    def state_dict(self) -> dict:
        return {"return_min": torch.from_numpy(self.return_min), "return_max": torch.from_numpy(self.return_max),
                "return_scale": self.return_scale, "episode_rewards": self.episode_rewards}

    def load_state_dict(self, state: dict) -> None:
        self.return_min, self.return_max = state["return_min"].numpy(), state["return_max"].numpy()
        self.return_scale.copy_(state["return_scale"])
        self.episode_rewards = state["episode_rewards"]

    def denominator(self) -> Tensor:
        """G_i [N], in raw reward units; infinite before the first finished episode with a reward."""
        return torch.where(self.return_scale > 0, self.return_scale, torch.inf)

    def normalize(self, reward: Tensor, task_id: Tensor) -> Tensor:
        """Raw rewards [B] of tasks [B] in units of the critic's support."""
        return reward / (self.denominator() / self.v_max)[task_id]

    def denormalize(self, value: Tensor, task_id: Tensor) -> Tensor:
        """The critic's values [B] of tasks [B] in raw reward units; 0 as long as its scale is infinite."""
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
    """The last `capacity` steps of N games, which step together: a ring of rows; rewards are raw.

    Row t holds the newest frame of every task's obs_t, in uint8, and the action, reward and terminated that followed
    it. The newest frame of obs_t+1 is that of row t + 1, so every frame is stored once; only where an episode ended
    does row t + 1 begin another one. There `end` numbers the end, and the true last frame is in the ring `last_frame`
    at that number. A lost life is terminated, and the frames go on: so does the environments' stack.

    Stacks and n-step returns are made at sampling. `age` says how many older frames of its stack a row's episode has:
    the others are zero, as in the environments. A transition can be sampled once its n steps are there.
    """

    def __init__(self, num_tasks: int, capacity: int, gamma: float, n_step: int, device: str | torch.device = "cpu"):
        """capacity: steps kept per task; fewer if episodes are shorter than 64 steps on average."""
        self.num_tasks, self.capacity, self.gamma, self.n_step = num_tasks, capacity, gamma, n_step
        self.device = torch.device(device)
        # Rows more than steps: for the current frame, and for the older frames of the oldest stack. Empty, so that a
        # CPU gives memory page by page as the ring fills.
        self.frames = torch.empty(capacity + STACK, num_tasks, SIZE, SIZE, dtype=torch.uint8, device=device)
        self.rows = torch.empty(len(self.frames), num_tasks, 4, device=device)  # action, reward, terminated, age
        self.end = torch.zeros(len(self.rows), num_tasks, dtype=torch.int32, device=device)  # 0, or its number + 1
        ends = num_tasks * (capacity // 64 + n_step + 1)  # n_step + 1: at least one complete transition is always there
        self.last_frame = torch.empty(ends, SIZE, SIZE, dtype=torch.uint8, device=device)
        self.end_step = torch.full((ends,), -1)  # at which step each of them ended, on the host
        self.window = torch.zeros(2, num_tasks, dtype=torch.int64, device=device)  # the oldest step, how many to sample
        self.steps, self.oldest, self.ends = 0, 0, 0  # steps and ends so far: the host knows the layout, and never asks
        self.episode_steps = np.zeros(num_tasks, np.int64)  # of the running episodes
        self.nbytes = sum(ring.nbytes for ring, _, _ in self.rings.values())

    @property
    def rings(self) -> dict[str, tuple[Tensor, int, int]]:
        """For harness.py: each ring with the number of rows so far, and of the last ones that it keeps. Final ones: the
        newest step, which a resume can make the last of its episode, is left to `state_dict`."""
        steps, ends = max(0, self.steps - 1), (self.ends, min(self.ends, len(self.last_frame)))
        kept = steps - self.oldest
        return {"frames": (self.frames, steps, min(steps, kept + STACK - 1)), "rows": (self.rows, steps, kept),
                "end": (self.end, steps, kept), "last_frame": (self.last_frame, *ends),
                "end_step": (self.end_step, *ends)}

    def add(self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminated: np.ndarray,
            truncated: np.ndarray, life_lost: np.ndarray, next_obs: np.ndarray) -> None:
        """Stores one step of every task: [N, 4, 84, 84], five [N], [N, 4, 84, 84]; next_obs is never a reset's."""
        row, age = self.steps % len(self.rows), np.minimum(self.episode_steps, STACK - 1)
        values = np.stack([action, reward, terminated | life_lost, age], 1, dtype=np.float32)
        self.rows[row] = devices.send(values, self.device)
        self.frames[row] = devices.send(obs[:, -1], self.device)
        self.end[row].zero_()
        self.steps += 1
        self.episode_steps += 1
        self.frames[self.steps % len(self.rows)] = devices.send(next_obs[:, -1], self.device)
        self.end_episodes(np.flatnonzero(terminated | truncated))

    def end_episodes(self, tasks: np.ndarray) -> None:
        """Makes the newest step the last of the episodes of `tasks`, and the current frame their true last one."""
        if len(tasks):
            numbers = self.ends + np.arange(len(tasks))
            places = numbers % len(self.last_frame)
            self.end_step.numpy()[places] = self.steps - 1
            self.ends += len(tasks)
            self.episode_steps[tasks] = 0
            index = devices.send(np.stack([tasks, places, numbers + 1]), self.device)
            self.last_frame[index[1]] = self.frames[self.steps % len(self.rows), index[0]]
            self.end[(self.steps - 1) % len(self.rows), index[0]] = index[2].int()
        # Where `last_frame` is full, the steps up to the oldest end in it are given up.
        full_since = int(self.end_step[self.ends % len(self.end_step)])
        self.oldest = max(self.oldest, self.steps - self.capacity, full_since + 1)
        incomplete = np.minimum(self.episode_steps, self.n_step - 1)  # the newest steps' n-step returns are
        size = self.steps - self.oldest - incomplete
        self.window.copy_(devices.send(np.stack([np.full_like(size, self.oldest), size]), self.device))

    def sample(self, batch_size: int) -> Batch:
        """A batch with raw rewards, uniform over tasks and over the steps of each that can be sampled."""
        draw = {"size": (batch_size,), "device": self.device}
        task_id = torch.randint(self.num_tasks, **draw)
        oldest, size = self.window[:, task_id]
        # How many steps there are is known on the device only; of 2^62 numbers the remainder is as good as uniform.
        row = (oldest + torch.randint(2**62, **draw) % size) % len(self.rows)
        reward, discount, last = self.n_step_return(task_id, row)
        action = self.rows[row, task_id, 0].long()
        return Batch(self.stack(task_id, row), action, reward, discount, self.next_obs(task_id, last), task_id)

    def n_step_return(self, task_id: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of transitions [B]: the discounted sum of rewards [B], the discount [B] and the row [B] of the last step.

        The sum ends early where the game ended or a life was lost, with discount 0, and where a time limit ended it.
        """
        running, last = torch.ones_like(row, dtype=torch.bool), row - 1
        reward, discount = torch.zeros_like(row, dtype=torch.float32), torch.ones_like(row, dtype=torch.float32)
        for _ in range(self.n_step):
            last = torch.where(running, (last + 1) % len(self.rows), last)
            _, step_reward, terminated, _ = self.rows[last, task_id].unbind(-1)
            reward = torch.where(running, reward + discount * step_reward, reward)
            discount = torch.where(running, self.gamma * discount * (1 - terminated), discount)
            running = running & (terminated == 0) & (self.end[last, task_id] == 0)
        return reward, discount, last

    def stack(self, task_id: Tensor, row: Tensor) -> Tensor:
        """Observations [B, 4, 84, 84] whose newest frames are in rows [B]."""
        back = torch.arange(STACK - 1, -1, -1, device=self.device)  # 3, 2, 1, 0 frames ago
        frames = self.frames[(row.unsqueeze(1) - back) % len(self.rows), task_id.unsqueeze(1)]  # [B, 4, 84, 84]
        there = back <= self.rows[row, task_id, 3].unsqueeze(1)  # [B, 4]
        return frames * there[:, :, None, None]

    def next_obs(self, task_id: Tensor, row: Tensor) -> Tensor:
        """Observations [B, 4, 84, 84] that followed the steps in rows [B]: their stacks, moved on by one frame."""
        end = self.end[row, task_id].long()
        frame = torch.where(end[:, None, None] > 0, self.last_frame[(end - 1) % len(self.last_frame)],
                            self.frames[(row + 1) % len(self.rows), task_id])
        return torch.cat([self.stack(task_id, row)[:, 1:], frame.unsqueeze(1)], dim=1)

    def state_dict(self) -> dict:
        """All but the rings, and their newest and current rows."""
        newest = torch.arange(self.steps - 1, self.steps + 1) % len(self.rows)
        return {"steps": self.steps, "oldest": self.oldest, "ends": self.ends, "frames": self.frames[newest].cpu(),
                "rows": self.rows[newest].cpu(), "end": self.end[newest].cpu(),
                "episode_steps": torch.tensor(self.episode_steps)}

    def load_state_dict(self, state: dict) -> None:
        """Before the rings are loaded. The capacity may have changed."""
        self.steps, self.oldest, self.ends = state["steps"], state["oldest"], state["ends"]
        self.episode_steps = state["episode_steps"].numpy().copy()
        newest = torch.arange(self.steps - 1, self.steps + 1) % len(self.rows)
        for name in ("frames", "rows", "end"):
            getattr(self, name)[newest] = state[name].to(self.device)
        self.end_step.fill_(-1)
        self.end_episodes(np.array([], int))


# ---------------------------------------------------------------------------------------------------------- losses


def random_shift(obs: Tensor, shift: Tensor) -> Tensor:
    """Moves each of obs [B, 4, 84, 84] by its shift [B, 2] in rows and columns; border pixels are replicated."""
    pixel = torch.arange(SIZE, device=obs.device)
    rows, columns = (pixel + shift.unsqueeze(-1)).clamp(0, SIZE - 1).unbind(1)  # [B, 84] each
    sample = torch.arange(len(obs), device=obs.device)[:, None, None]
    # [B, 84, 84, 4] in memory, which is the layout of channels-last, without another copy
    return obs.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(obs: Tensor, args: Args) -> Tensor:
    """DrQ-eps's augmentation of obs [B, 4, 84, 84] in uint8: a random shift and a random intensity of each sample."""
    shift = torch.randint(-args.shift_pad, max(1, args.shift_pad), (len(obs), 2), device=obs.device)
    intensity = 1 + args.intensity * torch.randn(len(obs), device=obs.device).clamp(-2, 2)
    return random_shift(obs, shift).float() / 255 * intensity[:, None, None, None]


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


def critic_loss(critic: Critic, target: Critic, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy between the critic's logits and the projected target, and what to log."""
    embedding, sample = critic.embed(batch.task_id), torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        next_action = critic.q_values(critic(batch.next_obs, embedding)).argmax(-1)  # [B]: the critic chooses ...
        target_logits = target(batch.next_obs, target.embed(batch.task_id))  # [B, A, K]
        next_probs = target_logits[sample, next_action].softmax(-1)  # [B, K]: ... the target evaluates (double Q)
        positions = batch.reward.unsqueeze(-1) + batch.discount.unsqueeze(-1) * critic.atoms  # [B, K]: R + gamma^n z
        target_probs = project_categorical(next_probs, positions, critic.atoms)  # [B, K]
    logits = critic(batch.obs, embedding)[sample, batch.action]  # [B, K]
    cross_entropy = -(target_probs * logits.log_softmax(-1)).sum(-1)  # [B]
    loss = cross_entropy.mean()
    return loss, {"critic_loss": loss.detach(), "target_q": (target_probs * critic.atoms).sum(-1).mean(),
                  "q": critic.q_values(logits.detach()).mean()}


def make_adamw(parameters: Iterable[nn.Parameter], args: Args) -> torch.optim.AdamW:
    """AdamW of the critic: decoupled decay on every parameter, no mask (release)."""
    return torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.999), eps=args.adam_eps,
                             weight_decay=args.weight_decay, fused=True)


# ----------------------------------------------------------------------------------------------------------- agent


class Agent:
    """Critic and target with their optimiser, and the steps of one update."""

    PARTS = ("critic", "target", "critic_optimizer")

    def __init__(self, args: Args, num_tasks: int, num_embeddings: int | None = None,
                 device: str | torch.device = "cpu"):
        """num_embeddings: rows of the task embedding; by default one per task, none in single-task mode (paper)."""
        if num_embeddings is None:
            num_embeddings = num_tasks if num_tasks > 1 else 0
        self.sizes = num_tasks, num_embeddings
        self.args, self.num_tasks, self.device = args, num_tasks, torch.device(device)
        with self.device:
            self.critic = Critic(args, num_embeddings)
            self.target = Critic(args, num_embeddings).requires_grad_(False)
            self.task_ids = torch.arange(num_tasks)
        self.target.load_state_dict(self.critic.state_dict())
        for network in (self.critic, self.target):  # what convolutions are fastest with: twice as fast on a CPU
            network.to(memory_format=torch.channels_last)
        self.critic_optimizer = make_adamw(self.critic.parameters(), args)
        # All that makes an update fast, but for cudnn's search in `update`; eager float32 is the same code.
        tf32 = args.precision == "tf32" and self.device.type == "cuda"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16")
        self.critic_loss = devices.compiled(critic_loss) if args.compile else critic_loss

    def __str__(self) -> str:
        sizes = [f"{name} {sum(p.numel() for p in getattr(self, name).parameters()):,}" for name in self.PARTS[:2]]
        return f"{self.args.precision}, {'compiled' if self.args.compile else 'eager'}; parameters: {', '.join(sizes)}"

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient update from a batch with augmented observations and normalised rewards; returns what to log."""
        torch.backends.cudnn.benchmark = True  # all its batches are of one size: the search for fast convolutions pays
        # 1: target distribution, cross-entropy, critic and embedding step
        with self.autocast:
            loss, metrics = self.critic_loss(self.critic, self.target, batch)
        optimize(self.critic_optimizer, loss)
        # 2: target <- tau critic + (1 - tau) target
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.args.tau)
        return metrics

    @torch.no_grad()
    def act(self, obs: Tensor, task_id: Tensor, epsilon: float, generator: torch.Generator | None = None) -> Tensor:
        """Actions [B] for observations [B, 4, 84, 84] in uint8 of tasks [B]: uniform with probability epsilon."""
        draw = {"size": (len(obs),), "generator": generator, "device": self.device}
        explore, action = torch.rand(**draw) < epsilon, torch.randint(ACTIONS, **draw)
        return action if epsilon == 1 else torch.where(explore, action, self.q_values(obs, task_id).argmax(-1))

    @torch.no_grad()
    def q_values(self, obs: Tensor, task_id: Tensor) -> Tensor:
        """Normalised values [B, A] of observations [B, 4, 84, 84] in uint8 of tasks [B]."""
        torch.backends.cudnn.benchmark = False  # evaluation's batches shrink: every size would be searched anew
        return self.critic.q_values(self.critic(obs.float() / 255, self.critic.embed(task_id)))

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {"sizes": self.sizes}

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def exploration(args: Args, env_step: int) -> float:
    """Epsilon: 1 until learning starts, then linearly down to the final one (the schedule of Dopamine)."""
    left = 1 - (env_step - args.learning_starts) / args.epsilon_decay_steps
    return args.epsilon + (1 - args.epsilon) * min(1.0, max(0.0, left))


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(agent: Agent, envs: Games, episodes: int, seed: int, video: bool = False,
             stop: Callable[[], object] = lambda: None) -> tuple[list[dict], list]:
    """Plays exactly `episodes` games of every task to their ends, greedily but for `eval_epsilon`.

    `envs` are evaluation's own, as many for every task, which share its episodes; they are seeded anew each time, so
    that nothing carries over. Returns one dict per task with the means of `return`, of raw rewards, and `score`; and,
    with `video`, the frames of each task's first episode. Both are empty as soon as `stop()` is true.
    """
    copies = envs.num_envs // agent.num_tasks
    left = np.array([len(range(copy, episodes, copies)) for copy in range(copies)] * agent.num_tasks)  # to be played
    first = left.max()  # as many are left in the first copies during their first episode
    ended: list[list[tuple[float, float]]] = [[] for _ in range(agent.num_tasks)]  # return, and no success
    episode_return = np.zeros(envs.num_envs)
    frames: list[list[np.ndarray]] = [[] for _ in range(agent.num_tasks)]
    generator = torch.Generator(agent.device).manual_seed(seed)
    rows = np.flatnonzero(left)  # of the environments that still play
    obs = envs.reset(seed=seed)[rows]
    for step in progress.steps_of_evaluation(ended, episodes):
        if stop():
            return [], []
        if video and step % suites.VIDEO_STRIDE == 0:
            for row, stack in zip(rows, obs, strict=True):
                if row % copies == 0 and left[row] == first:
                    frames[row // copies].append(stack[-1])
        observed, task_id = devices.send(obs, agent.device), devices.send(rows // copies, agent.device)
        result = envs.step(agent.act(observed, task_id, agent.args.eval_epsilon, generator).cpu().numpy(), rows)
        episode_return[rows] += result.reward
        for row in rows[result.terminated | result.truncated]:
            ended[row // copies].append((float(episode_return[row]), math.nan))
            episode_return[row] = 0.0
            left[row] -= 1
        rows, obs = rows[left[rows] > 0], result.obs[left[rows] > 0]
    return [suites.mean_episode(task, of_task) for task, of_task in zip(agent.args.tasks, ended, strict=True)], frames


# --------------------------------------------------------------------------------------------------- training loop


class Start(NamedTuple):
    """Where a run starts: from a fresh agent, or as transfer.py says."""

    prepare: Callable = lambda run, agent, normalizer, buffer: buffer  # returns what to sample batches from
    num_embeddings: int | None = None  # rows of the task embedding
    pad_to: tuple[int, ...] = ()  # nothing here: all games are of one size
    acts: bool = False  # the policy acts from the first step on, at the final epsilon; else exploration decays
    first_step: int = 0  # environment steps that `prepare` takes
    arguments: str = ""  # between program and --resume in the command that continues the run
    facts: dict = {}  # for args.json


def train(args: Args, start: Start = Start()) -> list[dict]:
    """Trains as `args` say; returns the last evaluation's means, one dict per task.

    Raises UsageError or SuiteError, before anything is created, and RunError for a run that cannot go on.
    """
    if devices.ranks()[1] > 1:
        raise UsageError("The games are played by one process: start it with python, and not with torchrun.")
    num_tasks, device = len(args.tasks), devices.choose_device(args.device)
    run = harness.Run(args, start.arguments, **start.facts)
    envs, eval_envs = make_envs(args), make_envs(args, evaluation=True)
    torch.manual_seed(harness.derived_seed(args.seed, "networks"))
    agent = Agent(args, num_tasks, start.num_embeddings, device)
    normalizer = ReturnNormalizer(args, max(num_tasks, agent.sizes[-1]), device)
    buffer = make_buffer(args, device)
    print(f"{num_tasks} games, {args.total_steps:,} steps each; encoder scale {args.encoder_scale:g}, updates per step "
          f"{args.updates_per_step}, batch {args.batch_size}, evaluation episodes {args.eval_episodes}, at last "
          f"{args.final_eval_episodes}{' (--small)' * args.small}\n"
          f"{device}, {agent}; replay {buffer.nbytes / 1e9:.2f} GB when full, on {buffer.device}", flush=True)
    if device.type == "cpu" and args.encoder_scale > 0.25:
        print("A size for a GPU; in minutes on a CPU: --tasks Pong Breakout --small --total-steps 3000", flush=True)
    run.open(buffer)
    replay = start.prepare(run, agent, normalizer, buffer)
    env_step = restore(run.state, agent, normalizer, buffer) if run.state else start.first_step  # of each task

    def sample() -> Batch:
        """A batch on its way to the training device."""
        return Batch(*(devices.send(field, device) for field in replay.sample(args.batch_size)))

    def updates(batch: Batch) -> dict[str, Tensor]:
        """The gradient updates of one environment step, the first of them from `batch`. Never waits for the device."""
        for left in reversed(range(args.updates_per_step)):
            reward = normalizer.normalize(batch.reward, batch.task_id)
            obs, next_obs = augment(batch.obs, args), augment(batch.next_obs, args)
            metrics = agent.update(batch._replace(obs=obs, next_obs=next_obs, reward=reward))
            batch = sample() if left else batch  # from host memory while the device computes
        return metrics

    def save() -> None:
        parts = {"agent": agent, "normalizer": normalizer, "buffer": buffer}
        run.save(env_step, {name: part.state_dict() for name, part in parts.items()}, buffer)

    metrics, results = {}, []
    obs = envs.reset(seed=harness.derived_seed(args.seed, "environments", env_step))
    try:
        while True:
            # Checkpoint first: a run that dies while it evaluates comes back here, and evaluates.
            due = env_step % args.eval_interval == 0 or env_step in (start.first_step, args.total_steps)
            due &= env_step > 0 or start.acts
            if due or env_step % args.checkpoint_interval == 0 or run.stop or run.asked:
                run.check_finite(metrics, env_step)  # never over the last good one
                save()
            if due and not run.stop and env_step not in run.evaluated:
                seed = harness.derived_seed(args.seed, "evaluation", env_step)
                episodes = args.eval_episodes if env_step < args.total_steps else args.final_eval_episodes
                results, frames = evaluate(agent, eval_envs, episodes, seed, args.capture_video, lambda: run.stop)
                if results:
                    run.log_evaluation(results, frames, env_step, agent.critic.embed(agent.task_ids))
            if run.stop or env_step >= args.total_steps:
                break

            # act
            epsilon = args.epsilon if start.acts else exploration(args, env_step)
            action = agent.act(devices.send(obs, device), agent.task_ids, epsilon)
            # a pretrained critic would unlearn from the rewards of 0 before the first episode has given a return scale
            learning = env_step >= args.learning_starts and not (start.acts and np.isinf(normalizer.return_max).any())
            batch = sample() if learning else None  # from host memory while the device is busy with the last updates
            action = action.cpu().numpy()  # waits for the device: the games need the actions
            # step, and update while the games step: the newest transition is sampled a step later
            envs.step_async(action)
            if learning:
                metrics = updates(batch)
            result = envs.step_wait()
            env_step += 1
            # store; what is learned from are clipped rewards, and episodes that a lost life ends
            reward = result.reward.clip(-1, 1) if args.clip_rewards else result.reward
            buffer.add(obs, action, reward, result.terminated, result.truncated, result.life_lost, result.next_obs)
            last_value = raw_value(agent, normalizer, result.next_obs) if learning and result.truncated.any() else None
            normalizer.observe(reward, result.terminated | result.life_lost, result.truncated, last_value)
            obs = result.obs
            # log
            run.step(learning)
            if env_step % args.log_interval == 0 and metrics:
                run.check_finite(metrics, env_step)
                scales = zip(args.tasks, normalizer.denominator().tolist())  # waits for the device
                run.log({f"train/{name}": value.item() for name, value in metrics.items()} | {"train/epsilon": epsilon}
                        | {f"return_scale/{task}": scale for task, scale in scales}, env_step)
    finally:
        run.close()
        envs.close()
        eval_envs.close()
    run.finish(env_step, results)
    return results


def make_envs(args: Args, evaluation: bool = False) -> Games:
    """One environment of each task, or for evaluation as many as it has episodes, ten at most. Raises SuiteError."""
    copies = min(10, max(args.eval_episodes, args.final_eval_episodes)) if evaluation else 1
    return Games([task for task in args.tasks for _ in range(copies)], args.max_frames)


def make_buffer(args: Args, device: torch.device) -> ReplayBuffer:
    """The replay on --replay-device, or on the training device if its free memory is enough, or else on the cpu."""
    sizes = len(args.tasks), min(args.buffer_size, args.total_steps), args.gamma, args.n_step
    if args.replay_device or device.type == "cpu":
        return ReplayBuffer(*sizes, devices.choose_device(args.replay_device or "cpu"))
    # Networks, optimiser and the activations of an update, estimated: 16 GB at the paper's size, in float32.
    update, (free, _) = 16e9 * args.encoder_scale * args.batch_size / 256, torch.cuda.mem_get_info(device)
    return ReplayBuffer(*sizes, device if ReplayBuffer(*sizes, "meta").nbytes + update < free else "cpu")


def raw_value(agent: Agent, normalizer: ReturnNormalizer, obs: np.ndarray) -> np.ndarray:
    """The greedy action's value [N] of observations [N, 4, 84, 84] in raw reward units. Waits for the device."""
    value = agent.q_values(devices.send(obs, agent.device), agent.task_ids).amax(-1)
    return normalizer.denormalize(value, agent.task_ids).cpu().numpy()


def restore(state: dict, agent: Agent, normalizer: ReturnNormalizer, buffer: ReplayBuffer) -> int:
    """Sets a run to its checkpoint's state; returns the step. Environments start anew: running episodes are cut.

    The returns of these are not counted: they may be far from those of a whole one.
    """
    agent.load_state_dict(state["agent"])
    normalizer.load_state_dict(state["normalizer"])
    normalizer.episode_rewards = [[] for _ in normalizer.episode_rewards]
    buffer.end_episodes(np.flatnonzero(buffer.episode_steps))  # a life that was just lost has ended the normaliser's
    return state["env_step"]


def evaluate_run(args: Args) -> list[dict]:
    """--evaluate: prints the table of tasks for a run's last checkpoint, with or without its replay."""
    if devices.ranks()[1] > 1:
        raise UsageError("--evaluate takes one process: start it with python, and not with torchrun.")
    saved, run_dir = harness.read_checkpoint(Path(args.evaluate)), Path(args.evaluate)
    args = dataclasses.replace(args, compile=False)
    agent = Agent(args, *saved["agent"]["sizes"], devices.choose_device(args.device, args.threads))
    agent.load_state_dict(saved["agent"])
    envs = make_envs(args, evaluation=True)
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
