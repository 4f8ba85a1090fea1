"""Transfer: a pretrained BRC agent learns new tasks faster than a fresh one (BRC, arXiv 2505.23150, section 5).

    python brc_sac.py --suite mw --split pretrain --run-dir runs/pre                  what all of these start from
    python transfer.py model --checkpoint runs/pre --task assembly                    go on from the pretrained networks
    python transfer.py embedding --checkpoint runs/pre --task assembly --mode select  frozen networks, a new embedding
    python transfer.py data --checkpoint runs/pre --task assembly                     fresh networks, the old replay
    python transfer.py model --checkpoint runs/pre --task assembly --baseline         from scratch, for comparison
    python transfer.py model --checkpoint runs/pre --suite mw                         all of a suite's transfer tasks
    python transfer.py model --resume runs/<run>                                      go on after a crash or a kill
    python transfer.py embedding --checkpoint runs/pre --suite mw --mode select --full-map       the paper's Figure 24

Every protocol is a run of the agent's own training loop on one new task: `prepare` below sets its fresh learner up, and
the rest are arguments. The agent, brc_sac.py or brc_drq.py, is the one that wrote the checkpoint.

    model      Critic, target and actor continue from the pretrained ones, with a fresh optimiser, buffer and return
               scale, and the initial temperature, or with --temperature pretrained the last one. The new task's
               embedding starts from the mean of the pretrained ones, or from the best by trial. The policy acts from
               the first step: there are no random ones.
    embedding  All weights are frozen, and the temperature. zero-shot: a random pretrained embedding. select: each is
               tried on the new task, the best one is kept. tune: from the best, the vector alone learns through TD.
               It starts with the best one's return scale too: the frozen critic's values are in its unit.
    data       A fresh learner; half of each batch is from the pretraining replay (RLPD, arXiv 2302.02948). Rewards of
               different tasks do not mix, so the learner is a multi-task one: embedding row 0 is the new task, which
               alone steps and is evaluated, rows 1, 2, ... the pretraining tasks in their order. Their return scales
               are final in the checkpoint and taken from there; the new task's starts fresh. Temperature and entropy
               are the new learner's, over both halves.
    --baseline A fresh learner of the same sizes, embedding row included, on the new task alone.

Transitions are counted in full: those that trying embeddings costs are the run's first env_steps. Sections, in order:
    arguments      one class per protocol
    pretraining    the checkpoint to start from, and whether the new tasks fit it
    protocols      what each does to the fresh learner
    suites         task after task, the tables and the embedding map
"""

import csv
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

import suites

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Transfer:
    """What all protocols share."""

    checkpoint: str | None = None
    """Run directory of the pretrained agent, written by brc_sac.py or brc_drq.py."""
    task: tuple[str, ...] = ()
    """New task, or several, one after another."""
    suite: str | None = None
    """Suite whose transfer tasks to go through, in place of --task: mw, hb-medium, hb-hard, sh or atari."""
    allow_seen: bool = False
    """Accept tasks that were in the pretraining."""
    seed: int = 0
    """Seed of networks, noise and environments."""
    run_dir: str | None = None
    """Where to write; default runs/<exp>-<task or suite>__<seed>__<time>. Several tasks get a folder each in it."""
    exp_name: str | None = None
    """Name in metrics.csv; default the agent and the protocol."""
    resume: str | None = None
    """Run directory to continue; all other arguments are read from there, finished tasks are skipped."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    replay_device: str | None = None
    """Device of the replay buffers; default the training device."""
    workers: int | None = None
    """Processes that step the environments (0 = in this process); default by the number of cores."""
    assets: str | None = None
    """ShadowHand's folder dex_envs/assets; default $SHADOWHAND_ASSETS."""
    track: bool = False
    """Also log to Weights & Biases."""
    capture_video: bool = False
    """Record the first evaluation episode as a GIF."""
    eval_episodes: int = 10
    """Fresh episodes per evaluation; none of them is learned from or counted."""


@dataclass(frozen=True)
class Learning(Transfer):
    """What the protocols that train networks share."""

    baseline: bool = False
    """Learn from scratch instead, with the same budget and sizes."""
    total_steps: int | None = None
    """Environment steps on each new task; default its suite's budget in the paper."""
    learning_starts: int | None = None
    """Environment steps before the first update; default 5000 (release)."""
    batch_size: int | None = None
    """Transitions per update; default 256 (paper, single-task)."""
    eval_interval: int | None = None
    """Environment steps between evaluations; default a twentieth of the run."""
    log_interval: int = 500
    """Environment steps between TensorBoard scalars."""
    checkpoint_interval: int | None = None
    """Environment steps between checkpoints; default every evaluation."""
    save_replay: bool = True
    """Keep the new task's replay in the checkpoints; without it a run cannot be resumed."""
    compile: bool | None = None
    """torch.compile the losses; default as in the agent."""


@dataclass(frozen=True)
class Model(Learning):
    """Go on from the pretrained networks on a new task."""

    method: ClassVar[str] = "model"
    start: Literal["mean", "best"] = "mean"
    """The new task's embedding at first: the mean of the pretrained ones, or the best of them, found as by select."""
    transitions_per_candidate: int = 300
    """Transitions of the new task that each pretrained embedding is tried on, with --start best."""
    temperature: Literal["initial", "pretrained"] = "initial"
    """SAC's entropy temperature at first: as at pretraining's start, which soon makes the policy explore anew, or as at
    its end."""

    @property
    def label(self) -> str:
        changes = "-best" * (self.start == "best") + "-cool" * (self.temperature == "pretrained")
        return "scratch" if self.baseline else "model-transfer" + changes


@dataclass(frozen=True)
class Embedding(Transfer):
    """Keep all weights frozen and find an embedding for a new task."""

    method: ClassVar[str] = "embedding"
    mode: Literal["zero-shot", "select", "tune"] = "select"
    """A random pretrained embedding, the best one by trial, or the best one trained further through TD."""
    transitions_per_candidate: int = 300
    """Transitions of the new task that each pretrained embedding is tried on (select, tune)."""
    tune_transitions: int = 900
    """Transitions of the new task that tune collects and learns from after the trial; fewer than 1000 (paper)."""
    tune_updates: int = 4
    """Updates of the embedding per transition, from a third of tune's transitions on."""
    full_map: bool = False
    """With select: write the score of every pretrained embedding on every new task, as a CSV and a heat map."""

    @property
    def label(self) -> str:
        return f"embedding-{self.mode}"


@dataclass(frozen=True)
class Data(Learning):
    """Learn a new task from scratch, with half of each batch from the pretraining replay."""

    method: ClassVar[str] = "data"

    @property
    def label(self) -> str:
        return "scratch" if self.baseline else "data-transfer"


METHODS = {"model": Model, "embedding": Embedding, "data": Data}

# What may change beside --resume: nothing that the learner's numbers depend on. A checkpoint may have moved.
MAY_CHANGE = ("checkpoint", "total_steps", "device", "replay_device", "workers", "assets", "track", "capture_video",
              "log_interval", "checkpoint_interval", "save_replay", "compile", "run_dir", "resume")

BOUNDS = {"seed": (0, None), "transitions_per_candidate": (1, None), "tune_transitions": (10, 999),
          "tune_updates": (1, None), "eval_episodes": (1, None)}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class TransferError(suites.SuiteError):
    """Arguments or a checkpoint that cannot be used; its message is one sentence for the user."""


def parse_args() -> Transfer:
    """The command line, checked as far as that goes without torch; with --resume, that run's arguments."""
    import tyro

    args = tyro.extras.subcommand_cli_from_dict(METHODS, description=__doc__.split("\n\n")[0])
    if args.resume:
        saved = read_transfer(Path(args.resume), type(args))
        args = tyro.cli(type(args), default=saved, args=sys.argv[2:])
        for field in dataclasses.fields(args):
            old, new = getattr(saved, field.name), getattr(args, field.name)
            if old != new and field.name not in MAY_CHANGE:
                raise TransferError(f"{flag(field.name)} is {old} in {args.resume} and cannot become {new}: leave it "
                                    "as it is, or start another run.")
    check(args)
    return args


def read_transfer(run_dir: Path, method: type[Transfer]) -> Transfer:
    """The arguments with which `run_dir` was started: its own args.json has them, for several tasks alone."""
    try:
        facts = json.loads((run_dir / "args.json").read_text())
        facts = facts.get("transfer", facts)
        if facts["method"] != method.method:
            raise TransferError(f"{run_dir} is a run of transfer.py {facts['method']}: "
                                f"continue it with python transfer.py {facts['method']} --resume {run_dir}.")
        saved = {field.name: facts[field.name] for field in dataclasses.fields(method)}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, TransferError):
            raise
        raise TransferError(f"{run_dir} holds no run of transfer.py to continue (args.json: {error}): "
                            "give a run directory.") from None
    return method(**saved | {"task": tuple(saved["task"]), "resume": None})


def check(args: Transfer) -> None:
    """Raises TransferError or suites.SuiteError for what can be told before torch is imported."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name, low)
        if value < low or high and value > high:
            raise TransferError(f"{flag(name)} is {value}: give a number of at least {low}"
                                + (f" and at most {high}." if high else "."))
    if not args.checkpoint:
        raise TransferError("No --checkpoint was given: name the run directory of a pretrained agent.")
    if bool(args.task) == bool(args.suite):
        raise TransferError("Give either --task with a new task's name, or --suite to go through a suite's transfer "
                            "tasks.")
    if getattr(args, "full_map", False) and args.mode != "select":
        raise TransferError(f"--full-map needs --mode select, and not {args.mode}: only select tries every embedding.")
    mode, baseline = getattr(args, "mode", None), getattr(args, "baseline", False)
    unused = ("start", "transitions_per_candidate", "temperature") if baseline else {
        "zero-shot": ("transitions_per_candidate", "tune_transitions", "tune_updates"),
        "select": ("tune_transitions", "tune_updates")}.get(mode, ())
    for field in dataclasses.fields(args):
        if field.name in unused and getattr(args, field.name) != field.default:
            beside = "--baseline" if baseline else f"--mode {mode}"
            raise TransferError(f"{flag(field.name)} has no effect with {beside}: leave it out.")
    if getattr(args, "full_map", False) and importlib.util.find_spec("matplotlib") is None:
        raise TransferError("--full-map needs matplotlib, which is not installed: pip install -r requirements.txt, or "
                            "leave --full-map out.")
    tasks, pretrained = new_tasks(args), pretraining_tasks(Path(args.checkpoint))
    seen = [task for task in tasks if task in pretrained]
    if seen and not args.allow_seen:
        raise TransferError(f"{seen[0]} was in the pretraining of {args.checkpoint}: choose a task that was "
                            "not, or give --allow-seen.")
    atari = suites.benchmark(pretrained[0]) is suites.atari
    misfits = [task for task in tasks if (suites.benchmark(task) is suites.atari) != atari]
    if misfits:
        there, here = ("Atari games", "continuous control") if atari else ("continuous control", "an Atari game")
        raise TransferError(f"{args.checkpoint} was trained on {there} and {misfits[0]} is {here}: "
                            "choose a task that the agent can play.")
    if atari and getattr(args, "temperature", None) == "pretrained":
        raise TransferError("--temperature pretrained is of brc_sac.py, and brc_drq.py has no entropy temperature: "
                            "leave it out.")
    if importlib.util.find_spec(agent_name(pretrained)) is None:
        raise TransferError(f"{args.checkpoint} was trained on {pretrained[0]} by {agent_name(pretrained)}.py, which "
                            "is not here: give a checkpoint of brc_sac.py.")
    root = Path(args.resume or args.run_dir or "")
    if args.run_dir and not args.resume and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise TransferError(f"Run directory {root} already holds files: give another --run-dir, or --resume {root} to "
                            "continue the run that is there.")
    if args.assets:
        os.environ["SHADOWHAND_ASSETS"] = str(Path(args.assets).resolve())
    suites.check(tasks)


def new_tasks(args: Transfer) -> tuple[str, ...]:
    """The tasks to transfer to. Raises suites.SuiteError for names that are unknown or given twice."""
    if args.task:
        return suites.resolve(None, args.task, "all")
    names = [name for name, suite in suites.SUITES.items() if suite.transfer]
    if args.suite not in names:
        raise TransferError(f"Suite '{args.suite}' has no transfer tasks: the suites that have are {', '.join(names)}.")
    return suites.SUITES[args.suite].transfer


def pretraining_tasks(run_dir: Path) -> tuple[str, ...]:
    """The tasks that the run in `run_dir` was trained on."""
    try:
        tasks = tuple(json.loads((run_dir / "args.json").read_text())["tasks"])
        suites.benchmark(tasks[0])
        return tasks
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TransferError(f"--checkpoint {run_dir} holds no run of brc_sac.py or brc_drq.py (args.json: {error}): "
                            "give a run directory.") from None


def agent_name(pretrained: tuple[str, ...]) -> str:
    return "brc_drq" if suites.benchmark(pretrained[0]) is suites.atari else "brc_sac"


# Parsed before torch is imported, so that --help and a mistyped name answer at once.
if __name__ == "__main__":
    try:
        ARGS = parse_args()
    except suites.SuiteError as error:
        print(f"transfer.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None

import torch  # noqa: E402

# ----------------------------------------------------------------------------------------------------- pretraining


class Pretrained(NamedTuple):
    """What a transfer starts from."""

    agent: ModuleType  # brc_sac or brc_drq
    args: Any  # pretraining's Args
    sizes: tuple[int, ...]  # O and A of its networks; none for games
    learner: Any  # its networks and return scales, and for data transfer its replay


def load_pretrained(args: Transfer) -> Pretrained:
    """Reads --checkpoint. Raises the agent's CheckpointError, or TransferError for one of another program."""
    run_dir = Path(args.checkpoint)
    agent = importlib.import_module(agent_name(pretraining_tasks(run_dir)))
    (pretraining, _), device = agent.read_args(run_dir), agent.choose_device(args.device)
    replay_device = agent.choose_device(args.replay_device) if args.replay_device else device
    with_replay = args.label == "data-transfer"
    buffer_size = pretraining.buffer_size if with_replay else 8  # more than an n-step return, for brc_drq.py
    kept = dataclasses.replace(pretraining, compile=False, buffer_size=buffer_size)

    def make(state: dict) -> Any:
        return agent.Learner(kept, *agent.checkpoint_sizes(state, pretraining), device, replay_device)

    try:
        learner = agent.load_checkpoint(run_dir, None, with_replay, make)
    except agent.UsageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TransferError(f"The checkpoint in {run_dir} does not fit its args.json ({str(error).splitlines()[0]}): "
                            f"give a run directory of {agent.__name__}.py as it was written.") from None
    sizes = getattr(learner.buffer, "fields", ())[:2]  # the games of brc_drq.py are all of one size
    return Pretrained(agent, pretraining, sizes, learner)


def check_sizes(tasks: tuple[str, ...], pretrained: Pretrained, checkpoint: str) -> None:
    """Raises TransferError for a task that is too large for the networks; a smaller one is padded."""
    for task in tasks:
        if suites.benchmark(task) is suites.atari:  # all of one size
            continue
        env = suites.make(task, 0)
        sizes = env.observation_space.shape[0], env.action_space.shape[0]
        env.close()
        if any(new > old for new, old in zip(sizes, pretrained.sizes, strict=True)):
            raise TransferError(
                f"{task} has observation size {sizes[0]} and action size {sizes[1]}, and {checkpoint} takes at most "
                f"{pretrained.sizes[0]} and {pretrained.sizes[1]}: choose smaller tasks, which are padded, or pretrain "
                "with a task of that size among the others.")


# ------------------------------------------------------------------------------------------------------- protocols


def learner_args(args: Transfer, pretrained: Pretrained, task: str, run_dir: Path) -> Any:
    """The agent's own arguments for one new task: those of the pretraining, but for what the transfer sets."""
    agent, tasks = pretrained.agent, pretrained.args.tasks
    defaults = {field.name: field.default for field in dataclasses.fields(agent.Args)}
    embedded = pretrained.learner.agent.critic.embedding is not None
    if args.method == "embedding" and not embedded:
        raise TransferError(f"{args.checkpoint} was trained on one task and has no task embeddings: use model "
                            "transfer, or a checkpoint of several tasks.")
    changes = {name: defaults[name] if value is None else value for name, value in vars(args).items()
               if name in defaults}
    changes |= dict(
        suite=pretrained.args.suite, tasks=(task,), split="all", evaluate=None, resume=None, run_dir=str(run_dir),
        exp_name=args.exp_name or f"{agent.__name__}-{args.label}", pad_to=pretrained.sizes,
        embedding_rows=1 + len(tasks) if args.label == "data-transfer" else int(embedded),
        random_start=args.label in ("scratch", "data-transfer"), cuda_graph=None,
    )
    if args.label == "data-transfer":  # the learner's own transitions where the old ones are
        changes["replay_device"] = str(pretrained.learner.buffer.device)
    spent = trial_transitions(args, pretrained)
    if args.method == "embedding":
        tuned = args.tune_transitions * (args.mode == "tune")
        changes |= dict(
            embedding_only=True, total_steps=max(1, spent + tuned), eval_interval=max(1, spent + tuned),
            checkpoint_interval=100, log_interval=100, learning_starts=spent + max(4, tuned // 3),
            updates_per_step=args.tune_updates, batch_size=defaults["batch_size"], compile=False, save_replay=True,
        )
    changes = {name: value for name, value in changes.items() if name in defaults}
    resolved = agent.resolve(dataclasses.replace(pretrained.args, **changes))
    if args.method == "embedding":
        return dataclasses.replace(resolved, total_steps=spent + tuned)  # 0 for zero-shot, which is evaluated only
    if resolved.total_steps <= spent:
        raise TransferError(f"--total-steps is {resolved.total_steps} and trying the embeddings takes {spent} of them: "
                            "give more steps, or fewer --transitions-per-candidate.")
    return dataclasses.replace(resolved, learning_starts=resolved.learning_starts + spent)


def trial_transitions(args: Transfer, pretrained: Pretrained) -> int:
    """Transitions of each new task that go into trying the pretrained embeddings."""
    tries = getattr(args, "mode", None) in ("select", "tune") or getattr(args, "start", None) == "best"
    return len(pretrained.args.tasks) * args.transitions_per_candidate if tries else 0


def prepare(learner: Any, args: Transfer, pretrained: Pretrained) -> None:
    """Sets up the fresh learner of one new task as the protocol says."""
    if getattr(args, "baseline", False):
        return
    count = len(pretrained.args.tasks)
    if args.method == "data":
        learner.buffer = HalfPrior(learner.buffer, pretrained.learner.buffer)
        learner.task_names += tuple(f"{task} (pretraining)" for task in pretrained.args.tasks)
        copy_scales(pretrained.learner.normalizer, slice(count), learner.normalizer, slice(1, None))
        return
    row = None
    if getattr(args, "mode", None) == "zero-shot":
        seed = pretrained.agent.derived_seed(args.seed, "zero-shot")
        row = int(np.random.default_rng(seed).integers(count))
    elif trial_transitions(args, pretrained):
        row = select(learner, args, pretrained)
    load_networks(learner, pretrained, row)
    keep_temperature = args.method == "embedding" or args.temperature == "pretrained"
    if keep_temperature and hasattr(learner.agent, "log_temperature"):  # brc_drq.py has none
        learner.agent.log_temperature.data.copy_(pretrained.learner.agent.log_temperature)
    if args.method == "embedding":
        copy_scales(pretrained.learner.normalizer, slice(row, row + 1), learner.normalizer, slice(1))
        print(f"{learner.args.tasks[0]}: starts from the embedding of {pretrained.args.tasks[row]}")
    learner.env_step = trial_transitions(args, pretrained)


def load_networks(learner: Any, pretrained: Pretrained, row: int | None) -> None:
    """Copies the pretrained networks; the one embedding becomes their `row`, or the mean of their rows."""
    count = len(pretrained.args.tasks)
    for name in ("target", "critic", "actor"):  # critic last: with frozen weights the target shares its embedding
        if not hasattr(learner.agent, name):
            continue
        network = getattr(pretrained.learner.agent, name)
        weights = network.state_dict()
        if "embedding.weight" in weights:
            table = weights["embedding.weight"][:count]
            if row is None:
                # The mean of what the networks see, and as long as the rows are: length sets the speed of learning.
                mean = network.embed(torch.arange(count, device=table.device)).detach().mean(0, keepdim=True)
                weights["embedding.weight"] = mean * table.norm(dim=-1).mean() / mean.norm()
            else:
                weights["embedding.weight"] = table[row:row + 1]
        getattr(learner.agent, name).load_state_dict(weights)


def copy_scales(source: Any, rows: slice, target: Any, at: slice) -> None:
    """Copies the return scales and entropies of some tasks from one ReturnNormalizer to another."""
    for name in ("return_scale", "return_min", "return_max", "entropy"):
        if hasattr(source, name):
            getattr(target, name)[at] = getattr(source, name)[rows]


class HalfPrior:
    """A learner's buffer whose batches are half from the pretraining replay, with task ids 1, 2, ..."""

    def __init__(self, own: Any, prior: Any):
        self.own, self.prior = own, prior

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Any:
        prior = self.prior.sample(batch_size // 2, generator)
        own = self.own.sample(batch_size - batch_size // 2, generator)
        prior = prior._replace(task_id=prior.task_id + 1)
        return type(own)(*(torch.cat(pair) for pair in zip(own, prior, strict=True)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)  # storing, saving and loading concern the learner's own transitions only


def select(learner: Any, args: Transfer, pretrained: Pretrained) -> int:
    """Tries every pretrained embedding on the new task; returns the best one's row: by score, then by return.

    The results go into candidates.csv, and are read from there after a resume.
    """
    (task,), path = learner.args.tasks, Path(learner.args.run_dir) / "candidates.csv"
    if not path.exists():
        results = []
        for row, name in enumerate(pretrained.args.tasks):
            results.append(trial(pretrained, task, row, args.transitions_per_candidate, args.seed))
            print(f"{task} with the embedding of {name}: "
                  + ", ".join(f"{metric} {value:.3f}" for metric, value in results[-1].items()), flush=True)
        write_csv(path, ["embedding", "transitions", *results[0]],
                  [[name, args.transitions_per_candidate, *result.values()]
                   for name, result in zip(pretrained.args.tasks, results, strict=True)])
    rows = read_csv(path)
    return max(range(len(rows)), key=lambda row: (float(rows[row]["score"]), float(rows[row]["return"])))


def trial(pretrained: Pretrained, task: str, row: int, transitions: int, seed: int) -> dict[str, float]:
    """Plays `task` greedily with pretrained embedding `row` for exactly `transitions` steps.

    Returns the means over the episodes that these begin; the last one counts as far as it came. Every row meets the
    same starts, so that luck does not choose.
    """
    agent, player = pretrained.agent, pretrained.learner.agent
    task_id = torch.tensor([row], device=player.device)
    seed = agent.derived_seed(seed, "trial")
    if agent.__name__ == "brc_drq":
        envs, generator = agent.Games((task,), player.args.max_frames), torch.Generator(player.device).manual_seed(seed)
    else:
        envs, player.task_ids = agent.VectorEnv((task,), seed=seed, pad_to=pretrained.sizes), task_id
    episodes, ended, obs = [], True, envs.reset(seed=seed)
    for _ in range(transitions):
        observed = torch.from_numpy(obs).to(player.device)
        if agent.__name__ == "brc_drq":
            action = player.act(observed, task_id, player.args.eval_epsilon, generator)
        else:
            action = player.act(observed, None)
        result = envs.step(action.cpu().numpy())
        if ended:
            episodes.append([0.0, np.nan])
        total, success = episodes[-1]
        episodes[-1] = [total + float(result.reward[0]), np.fmax(success, getattr(result, "success", [np.nan])[0])]
        ended, obs = bool(result.terminated[0] | result.truncated[0]), result.obs
    envs.close()
    succeeds = not np.isnan(episodes[0][1])
    scores = [suites.score(task, total, float(success) if succeeds else None) for total, success in episodes]
    totals, successes = np.mean(episodes, axis=0).tolist()
    return {"return": totals} | ({"success": successes} if succeeds else {}) | {"score": float(np.mean(scores))}


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    """Writes a table aside and renames it, so that it is complete or not there."""
    aside = path.with_suffix(".tmp")
    with open(aside, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    aside.replace(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------- suites


def outcome(run_dir: Path, task: str, env_step: int) -> dict[str, float] | None:
    """The evaluation of `task` at `env_step` from metrics.csv; None if it is not there yet."""
    if not (run_dir / "metrics.csv").exists():
        return None
    rows = [row for row in read_csv(run_dir / "metrics.csv") if row["env_step"] == str(env_step)]
    if not any(row["env_name"] == "mean" and row["metric"] == "score" for row in rows):  # written last
        return None
    return {row["metric"]: float(row["value"]) for row in rows if row["env_name"] == task}


def run(args: Transfer) -> list[dict[str, float]]:
    """Transfers to every new task in turn; returns their last evaluations. Goes on where a run was stopped."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a checkpoint is asked for: between two tasks all is saved
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    pretrained, tasks = load_pretrained(args), new_tasks(args)
    check_sizes(tasks, pretrained, args.checkpoint)
    agent, label = pretrained.agent, args.exp_name or f"{pretrained.agent.__name__}-{args.label}"
    name = args.suite or (tasks[0] if len(tasks) == 1 else f"{len(tasks)}tasks")
    root = Path(args.resume or args.run_dir or f"runs/{label}-{name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    folders = {task: root / task if args.suite or len(tasks) > 1 else root for task in tasks}
    runs = {task: learner_args(args, pretrained, task, folder) for task, folder in folders.items()}
    facts = {"method": args.method} | dataclasses.asdict(args) | {"resume": None}
    for task, folder in folders.items():
        if outcome(folder, task, runs[task].total_steps):
            print(f"{task} is finished.")
            continue
        learners = []

        def prepare_and_keep(learner: Any, folder: Path = folder, learners: list = learners) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            if folder != root:
                write_json(root / "args.json", facts)
            prepare(learner, args, pretrained)
            learners.append(learner)

        begun = (folder / "args.json").exists()
        if args.resume and not begun:  # what a kill before its first file can have left
            for leftover in ("candidates.csv", "candidates.tmp", "args.tmp"):
                (folder / leftover).unlink(missing_ok=True)
        alone = facts | ({"task": (task,), "suite": None, "run_dir": str(folder)} if folder != root else {})
        try:
            agent.train(dataclasses.replace(runs[task], resume=str(folder) if begun else None), prepare_and_keep,
                        f"python transfer.py {args.method} --resume {root}", transfer=alone)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if runs[task].total_steps == trial_transitions(args, pretrained):  # nothing was trained, so nothing was saved
            agent.save_checkpoint(folder, learners[0])
        if args.track:  # a run of its own for each task
            import wandb

            wandb.finish()
    results = [outcome(folders[task], task, runs[task].total_steps) for task in tasks]
    if not all(results):
        raise agent.RunError(f"The last evaluation could not be written to {root}: free some disk space, and go on "
                             f"with python transfer.py {args.method} --resume {root}.")
    return report(args, pretrained, root, folders, runs, results)


def report(args: Transfer, pretrained: Pretrained, root: Path, folders: dict[str, Path], runs: dict[str, Any],
           results: list[dict]) -> list[dict]:
    """Prints the table of all new tasks and what they took, and draws the embedding map."""
    tasks = tuple(folders)
    tried, steps = trial_transitions(args, pretrained), runs[tasks[0]].total_steps
    if len(tasks) > 1:
        print(f"\n{runs[tasks[0]].exp_name} from {args.checkpoint}, seed {args.seed}, {len(tasks)} new tasks")
        print(pretrained.agent.table(tasks, results))
    how = f" to try {len(pretrained.args.tasks)} embeddings on, and {steps - tried:,}" if tried else ""
    print(f"Transitions of each new task: {tried or steps:,}{how} to learn from; {args.eval_episodes} fresh episodes "
          "evaluated the result.")
    if getattr(args, "full_map", False):
        candidates = {task: read_csv(folder / "candidates.csv") for task, folder in folders.items()}
        scores = [[float(row["score"]) for row in rows] for rows in candidates.values()]
        write_csv(root / "embedding_map.csv", ["task", *pretrained.args.tasks],
                  [[task, *row] for task, row in zip(tasks, scores, strict=True)])
        draw_map(root / "embedding_map.png", tasks, pretrained.args.tasks, scores)
        print(f"The score of every embedding on every new task is in {root}/embedding_map.csv and .png.")
    return results


def draw_map(path: Path, tasks: tuple[str, ...], embeddings: tuple[str, ...], scores: list[list[float]]) -> None:
    """A heat map, a row per new task and a column per pretrained embedding."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2 + 0.3 * len(embeddings), 2 + 0.3 * len(tasks)), layout="constrained")
    image = axes.imshow(scores, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(embeddings)), embeddings, rotation=90)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("embedding of the pretraining task")
    figure.colorbar(image, label="score on the new task")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_json(path: Path, content: dict) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)


def main(args: Transfer) -> list[dict[str, float]]:
    """Runs the transfer under the agent's rule for errors: one sentence, exit code 2 for input, 1 for a failed run."""
    agent = importlib.import_module(agent_name(pretraining_tasks(Path(args.checkpoint))))
    return agent.exit_on_error(lambda: run(args))


if __name__ == "__main__":
    main(ARGS)
