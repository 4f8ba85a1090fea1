"""Transfer: a pretrained BRC agent learns new tasks faster than a fresh one (BRC, arXiv 2505.23150, section 5).

    python brc_sac.py --suite mw --split pretrain --run-dir runs/pre                  what all of these start from
    python transfer.py model --checkpoint runs/pre --task assembly                    go on from the pretrained networks
    python transfer.py embedding --checkpoint runs/pre --task assembly --mode select  frozen networks, a new embedding
    python transfer.py data --checkpoint runs/pre --task assembly                     fresh networks, the old replay
    python transfer.py embedding --checkpoint runs/pre --suite mw --full-map          all of a suite's; Figure 24

Every protocol is a run of the agent's own loop on one new task: `prepare` sets its fresh learner up, the rest are
arguments. The agent is the script that wrote the checkpoint: brc_sac.py, brc_drq.py, a copy of one.

    model      Critic, target, actor and temperature go on, the policy acts from the first step. Optimiser, buffer and
               return scale are fresh; learning waits for --learning-starts and a whole episode, which gives that scale.
    embedding  Weights and temperature are frozen. zero-shot: a random pretrained embedding. select (few-shot): each is
               tried on the new task for 300 transitions, the best one kept; the paper spends 300 on all of them, see
               --transitions. tune is not in the paper: from the best, the vector alone learns through TD, its target a
               Polyak copy; then it is tried too, and kept if it did better. Trials are a run's first steps and count.
    data       A fresh learner; half of each batch is from the pretraining replay (RLPD, arXiv 2302.02948). With
               --prior-tasks merged it is the paper's "fresh single-task learner": no embedding, one return scale. By
               default, separate, which is not in the paper, the old tasks stay tasks, with their return scales.
    --baseline A fresh learner of the same sizes, embedding row included, on the new task alone.
"""

import csv
import dataclasses
import importlib
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

import harness
import suites
from harness import UsageError

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    """A pretrained agent on new tasks."""

    method: tyro.conf.Positional[Literal["model", "embedding", "data"]] = tyro.MISSING
    """Go on from the networks, keep them frozen and find an embedding, or learn from scratch with the old replay."""
    checkpoint: str | None = None  # run directory of the pretrained agent; data reads its replay again at --resume
    task: tuple[str, ...] = ()  # new task, or several, one after another, each in a folder of its own
    suite: str | None = None  # in place of --task, the transfer tasks of mw, hb-medium, hb-hard, sh or atari
    allow_seen: bool = False  # accept tasks that were in the pretraining
    seed: int = 0  # seed of networks, noise, environments and of the embeddings that are drawn
    run_dir: str | None = None  # where to write; default runs/<exp>-<task or suite>__<seed>__<time>
    exp_name: str | None = None  # name in metrics.csv; default the agent and the protocol
    resume: str | None = None  # run directory to go on with; all other arguments are read from there
    device: str = "auto"  # cpu, cuda or cuda:N; auto takes a GPU if there is one
    replay_device: str | None = None  # device of the replay buffers; default the training device
    threads: int | None = None  # threads of torch on a CPU; default OMP_NUM_THREADS, or as many as make steps fastest
    workers: int | None = None  # processes that step environments (0 = in this one); default by the number of cores
    assets: str | None = None  # ShadowHand's folder dex_envs/assets; default $SHADOWHAND_ASSETS
    track: bool = False  # also log to Weights & Biases
    capture_video: bool = False  # record the first evaluation episode as a GIF
    eval_episodes: int | None = None  # fresh per evaluation, never learned from; default the agent's
    # model and data alone
    baseline: bool = False  # learn from scratch instead, with the same budget and sizes
    total_steps: int | None = None  # environment steps on each new task; default its suite's in the paper
    learning_starts: int | None = None  # steps before the first update, a trial's included; default 5000, Atari 1600
    batch_size: int | None = None  # transitions per update; default the agent's for one task
    eval_interval: int | None = None  # environment steps between evaluations; default as brc_sac.py's
    log_interval: int = 500  # environment steps between TensorBoard scalars
    checkpoint_interval: int | None = None  # environment steps between checkpoints; default every evaluation
    save_replay: bool = True  # keep the replay in the checkpoints; without it a run cannot be resumed
    compile: bool = True  # torch.compile the losses where it is worth it; in Atari where the pretraining did
    start: Literal["mean", "best"] = "mean"  # model: the embedding at first: mean of the old ones, or the best by trial
    temperature: Literal["pretrained", "initial"] = "pretrained"  # model: SAC's at first; the initial one explores anew
    prior_tasks: Literal["separate", "merged"] = "separate"  # data: old tasks as their own, or in the new one's buffer
    mode: Literal["zero-shot", "select", "tune"] = "select"  # embedding: random, best by trial, or trained from there
    full_map: bool = False  # select: a CSV and a heat map, the score of every pretrained embedding on every new task
    # select, tune and --start best: trials
    candidates: int | None = None  # how many pretrained embeddings, drawn at random, are tried; default all
    transitions_per_candidate: int | None = None  # of the new task, for each of them; default 300
    transitions: int | None = None  # in place of that, for all of them together (paper: 300); tune's are < 1000 then
    tune_transitions: int | None = None  # tune: learned from after the trial; default 900, or what is left of 999
    tune_updates: int = 4  # tune: updates of the embedding per transition

    tunes = property(lambda self: self.method == "embedding" and self.mode == "tune")
    uses_networks = property(lambda self: self.method == "embedding" or self.method == "model" and not self.baseline)
    uses_replay = property(lambda self: self.method == "data" and not self.baseline)
    tries = property(lambda self: self.start == "best" or self.method == "embedding" and self.mode != "zero-shot")
    # Transitions, once `resolve` has filled in the numbers: spent before anything is learned, and what finding takes.
    spent = property(lambda self: self.tries * self.candidates * self.transitions_per_candidate)
    cost = property(lambda self: self.spent + self.tunes * (self.tune_transitions + self.transitions_per_candidate))

    @property
    def label(self) -> str:
        options = {"best": self.start, "initial": self.temperature, "merged": self.prior_tasks}
        changes = "".join(f"-{name}" for name, value in options.items() if value == name)
        learns = "scratch" if self.baseline else f"{self.method}-transfer{changes}"
        return f"embedding-{self.mode}" if self.method == "embedding" else learns


def resolve(args: Args) -> Args:
    """Checks what it can before torch is imported, fills in tasks and numbers. Raises UsageError or SuiteError."""
    if not args.checkpoint:
        raise UsageError("No --checkpoint was given: name the run directory of a pretrained agent.")
    if bool(args.task) == bool(args.suite) and not args.resume:
        raise UsageError("Give either --task with a new task's name, or --suite for all of a suite's transfer tasks.")
    suite = {name: suite.transfer for name, suite in suites.SUITES.items() if suite.transfer}
    if args.suite and args.suite not in suite:
        raise UsageError(f"Suite '{args.suite}' has no transfer tasks: the suites that have are {', '.join(suite)}.")
    pretraining, program = read_facts(args.checkpoint)
    atari = suites.benchmark(pretraining[0]) is suites.atari
    embedding, model = args.method == "embedding", args.method == "model" and args.uses_networks
    used = dict.fromkeys(("baseline", "total_steps", "learning_starts", "batch_size", "eval_interval", "log_interval",
                          "checkpoint_interval", "save_replay", "compile"), not embedding)
    used |= {"start": model, "temperature": model and not atari, "prior_tasks": args.uses_replay, "mode": embedding,
             "candidates": args.tries, "transitions": args.tries, "tune_transitions": args.tunes,
             "transitions_per_candidate": args.tries and not args.transitions, "tune_updates": args.tunes,
             "full_map": args.label == "embedding-select" and not args.candidates}
    beside = f" --mode {args.mode}" * embedding + " --baseline" * (args.baseline and not embedding)
    beside += f" --start {args.start}" * model + " in Atari" * atari
    beside += (" --candidates" * bool(args.candidates) + " --transitions" * bool(args.transitions)) * args.tries
    for name, value in vars(args).items():
        if not used.get(name, True) and value != getattr(Args, name) and not args.resume:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with {args.method}{beside}: leave it out.")
    args = harness.fill(dataclasses.replace(args, task=suite.get(args.suite, args.task)), candidates=len(pretraining))
    harness.check_range(args, 1, len(pretraining), "candidates")
    most = 989 * args.candidates // (args.candidates + 1) if args.tunes else math.inf  # leaves 10 of 999 to learn from
    harness.check_range(args, args.candidates, most, "transitions")
    each = args.transitions // args.candidates if args.transitions else 300
    left = 999 - args.candidates * each - each if args.tunes and args.transitions else math.inf
    args = harness.fill(args, transitions_per_candidate=each, tune_transitions=min(left, 900))
    harness.check_range(args, 1, math.inf, "eval_episodes", "tune_updates", "transitions_per_candidate")
    harness.check_range(args, 10, left, "tune_transitions")
    if seen := [task for task in suites.resolve(None, args.task, "all") if task in pretraining and not args.allow_seen]:
        raise UsageError(f"{seen[0]} was in the pretraining of {args.checkpoint}: choose another, or --allow-seen.")
    if not program.exists():
        raise UsageError(f"{args.checkpoint} was written by {program.name}: put that script beside transfer.py.")
    return args


def read_facts(checkpoint: str) -> tuple[tuple[str, ...], Path]:
    """The tasks of the run in a directory, and the agent's program. Raises UsageError."""
    facts = harness.read_args(Path(checkpoint), Args)[1]
    if "tasks" not in facts or facts["ranks"] > 1 or "action_repeat" in facts:
        raise UsageError(f"{checkpoint} holds the runs of several tasks, or a run of several ranks or of offline.py: "
                         "give the folder of one online run.")
    program = Path(facts.get("agent", facts["program"]))  # the program of a transferred run is this one
    return tuple(facts["tasks"]), program if program.exists() else Path(__file__).with_name(program.name)


# Parsed before torch is imported, so that --help and a mistyped name answer at once. A checkpoint may have moved.
PARSE = Args, resolve, (*harness.MAY_CHANGE, "checkpoint")
ARGS = harness.exit_on_error(harness.parse_args, *PARSE) if __name__ == "__main__" else None

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
import devices  # noqa: E402

# ----------------------------------------------------------------------------------------------------- pretraining


class Pretrained(NamedTuple):
    args: Args  # of the transfer
    old: Any  # arguments of the pretraining
    program: Path  # the agent's script
    agent: Any  # the same, imported
    space: tuple[int, ...]  # O and A of its networks; none for games
    state: dict  # of its agent and normaliser
    embeddings: dict[str, Tensor]  # of critic and target [N + 1, D]: each task's, and last what stands for their mean
    prior: Any  # its replay, for data transfer


def load_pretrained(args: Args) -> Pretrained:
    """Reads --checkpoint, and changes nothing there. Raises UsageError."""
    run_dir, (tasks, program), embeddings, prior = Path(args.checkpoint), read_facts(args.checkpoint), {}, None
    sys.path.insert(0, str(program.resolve().parent))  # as when it ran itself
    module, device = importlib.import_module(program.stem), devices.choose_device(args.device)
    if not hasattr(module, "Agent"):  # an ablation, which has replaced something in it
        module = getattr(module, "brc_sac", None) or module.brc_drq
    old, state = harness.read_args(run_dir, module.Args)[0], harness.read_checkpoint(run_dir)
    try:
        *space, num_tasks, rows = state["agent"]["sizes"]
        agent = module.Agent(dataclasses.replace(old, compile=False), *space, num_tasks, rows, device)
        agent.load_state_dict(state["agent"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UsageError(f"The checkpoint in {run_dir} does not fit its args.json ({str(error).splitlines()[0]}): give "
                         "a run directory as it was written.") from None
    if not isinstance(agent.critic.embedding, torch.nn.Module) and (rows or args.method == "embedding" or args.tries):
        raise UsageError(f"{run_dir} has learned no task embeddings: give a run of several tasks that learns them.")
    if args.uses_replay:
        n_step = (old.gamma, old.n_step) if hasattr(old, "n_step") else ()  # brc_drq.py
        prior = module.ReplayBuffer(num_tasks, *space, min(old.buffer_size, old.total_steps), *n_step,
                                    devices.choose_device(args.replay_device or args.device))
        harness.read_checkpoint(run_dir, prior)
        prior.end_episodes(np.array([], int))  # makes what was read known to `sample`
        if prior.window[-1].min() < 1:
            raise UsageError(f"The checkpoint in {run_dir} is of its start, without transitions: wait for the next.")
    for name, network in {"critic": agent.critic, "target": agent.target}.items() if rows else ():
        table = network.embedding.weight.detach()[:len(tasks)]
        mean = network.embed(torch.arange(len(tasks), device=device)).detach().mean(0, keepdim=True)
        # The network sees directions alone; the length, here as long as the others are, sets how fast one turns.
        embeddings[name] = torch.cat([table, mean * table.norm(dim=-1).mean() / mean.norm()])
    return Pretrained(args, old, program, module, tuple(space), state, embeddings, prior)


# ------------------------------------------------------------------------------------------------------- protocols


def learner_args(pretrained: Pretrained, exp_name: str, task: str, folder: Path) -> Any:
    """The agent's own arguments for one new task: those of the pretraining, but for what the transfer sets."""
    args, old, most, Agent = pretrained.args, pretrained.old, pretrained.space, pretrained.agent.Args
    first = getattr(old, "n_step", 1)  # of brc_drq.py
    unset = harness.read_args(folder, Agent)[0] if (folder / "args.json").exists() else Agent  # a number in brc_drq.py
    changes = {name: getattr(unset, name) if value is None else value
               for name, value in vars(args).items() if hasattr(old, name)} | dict(
        suite=Agent.suite, tasks=(task,), resume=None, run_dir=str(folder), exp_name=exp_name,
        replay_device=str(pretrained.prior.device) if args.uses_replay else args.replay_device)
    changes |= {} if most else {"final_eval_episodes": args.eval_episodes, "compile": args.compile and old.compile}
    changes |= {"goals": None} if most and not hasattr(suites.benchmark(task), "GOALS") else {}
    if args.method == "embedding":  # of zero-shot and select there is nothing to learn
        changes |= dict(total_steps=args.cost + first + 1, learning_starts=max(first, args.spent), compile=False,
                        eval_interval=args.cost or 1, checkpoint_interval=100, updates_per_step=args.tune_updates)
    result = pretrained.agent.resolve(dataclasses.replace(old, **changes))
    if args.method == "embedding":
        result = dataclasses.replace(result, total_steps=args.cost)
    elif result.total_steps <= args.spent:
        raise UsageError(f"--total-steps is {result.total_steps} and the trials take {args.spent} of them: give more.")
    if most:
        env = suites.make(task, 0)
        sizes = (*env.observation_space.shape, *env.action_space.shape)
        env.close()
        if sizes[0] > most[0] or sizes[1] > most[1]:
            raise UsageError(f"{task} has observation size {sizes[0]} and action size {sizes[1]}, and the networks of "
                             f"{args.checkpoint} take {most[0]} and {most[1]}: choose a smaller task, which is padded.")
    return result


def prepare(pretrained: Pretrained, of_all: dict, run: harness.Run, agent: Any, normalizer: Any, buffer: Any) -> Any:
    """Sets up the fresh learner of one new task as the protocol says; returns what to sample batches from."""
    args = pretrained.args
    if of_all:  # several tasks have one more args.json, for --resume; here nothing can be refused any more
        harness.begin(run.root.parent, of_all)
    if args.uses_replay:
        count, separate = len(pretrained.old.tasks), args.prior_tasks == "separate"
        copy_scales(pretrained, slice(count), normalizer, slice(1, None) if separate else slice(1))
        task_ids = torch.arange(1, count + 1) if separate else torch.zeros(count, dtype=torch.int64)
        return HalfPrior(buffer, pretrained.prior, task_ids.to(buffer.device))
    if args.uses_networks and not run.state:
        begin(pretrained, run, agent, normalizer, buffer)
    elif args.tunes and run.state["env_step"] == args.spent + args.tune_transitions < run.args.total_steps:
        keep_better(pretrained, run, agent)
    if args.tunes:
        freeze_all_but_embedding(agent, pretrained.agent.optimize)
    return buffer


class HalfPrior:
    """Batches half from a learner's own buffer and half from the pretraining replay."""

    def __init__(self, own: Any, prior: Any, task_ids: Tensor):  # task_ids: what the old tasks' are here
        self.own, self.prior, self.task_ids = own, prior, task_ids

    def sample(self, batch_size: int) -> Any:
        prior, own = self.prior.sample(batch_size // 2), self.own.sample(batch_size - batch_size // 2)
        prior = prior._replace(task_id=self.task_ids[prior.task_id])
        return type(own)(*(torch.cat(pair) for pair in zip(own, prior, strict=True)))


def copy_scales(pretrained: Pretrained, rows: slice, normalizer: Any, at: slice) -> None:
    """Copies return scales of pretraining tasks; of several for one task, the scale that spans them."""
    saved = {name: value[rows] for name, value in pretrained.state["normalizer"].items() if name.startswith("return")}
    if at == slice(1):
        low, high = saved["return_min"].min(), saved["return_max"].max()
        scale = torch.maximum(high, low.abs())  # where all returns were 0 there is none yet
        saved = {"return_min": low, "return_max": high, "return_scale": scale.where(scale > 0, torch.inf)}
    for name, value in saved.items():
        getattr(normalizer, name)[at] = value


def set_embedding(pretrained: Pretrained, agent: Any, row: int) -> None:
    for name, rows in pretrained.embeddings.items():
        getattr(agent, name).embedding.weight.data.copy_(rows[row])


def begin(pretrained: Pretrained, run: harness.Run, agent: Any, normalizer: Any, buffer: Any) -> None:
    """Copies the networks, and finds an embedding; trials go into the replay, the return scale and candidates.csv."""
    args, saved, tasks, results = pretrained.args, pretrained.state["agent"], pretrained.old.tasks, {}
    for name in {"critic", "target", "actor"} & saved.keys():
        rows = {"embedding.weight": pretrained.embeddings[name][-1:]} if name in pretrained.embeddings else {}
        getattr(agent, name).load_state_dict(saved[name] | rows)
    drawn = draw(pretrained, run)
    for row in drawn if args.tries else ():
        set_embedding(pretrained, agent, row)
        results[row] = trial(pretrained, run, agent, tasks[row], normalizer, buffer)
        normalizer.episode_rewards[0] = []  # of an episode that was cut, and so has no return
    if results:
        table = [[tasks[row], args.transitions_per_candidate, *results[row].values()] for row in sorted(drawn)]
        text = "".join(",".join(map(str, row)) + "\n" for row in [["embedding", "transitions", *results[row]], *table])
        harness.write_file(run.dir / "candidates.csv", lambda file: file.write(text.encode()))
        drawn.sort(key=lambda row: rank(results[row]), reverse=True)  # keeps the order of equals
    if args.tries or args.method == "embedding":
        print(f"{run.args.tasks[0]}: starts from the embedding of {tasks[drawn[0]]}")
        set_embedding(pretrained, agent, drawn[0])
    if "log_temperature" in saved:  # brc_drq.py has none
        normalizer.entropy[:] = pretrained.state["normalizer"]["entropy"].mean()
        if args.temperature == "pretrained":
            agent.log_temperature.data.copy_(saved["log_temperature"])
    if args.method == "embedding":
        copy_scales(pretrained, slice(drawn[0], drawn[0] + 1), normalizer, slice(1))


def draw(pretrained: Pretrained, run: harness.Run) -> list[int]:
    """The embeddings to try, in an order of chance, so that the first of several best is any of them."""
    rng = np.random.default_rng(harness.derived_seed(run.args.seed, f"embeddings for {run.args.tasks[0]}"))
    return rng.permutation(len(pretrained.old.tasks))[:pretrained.args.candidates].tolist()


def rank(result: dict) -> tuple[float, float]:
    return float(result["score"]), float(result["return"])


def trial(pretrained: Pretrained, run: harness.Run, agent: Any, name: str, normalizer: Any = None, buffer: Any = None
          ) -> dict[str, float]:
    """Plays greedily for one candidate's transitions, from the same starts every time, so that luck does not choose.

    Returns the means over whole episodes, or what the only one came to. After a signal --resume makes all trials anew.
    """
    args, seed, (task,) = run.args, harness.derived_seed(run.args.seed, "trial"), run.args.tasks
    if pretrained.space:
        envs, how = suites.vector.VectorEnv((task,), args.seed, pad_to=pretrained.space, goals=args.goals), (None,)
    else:  # brc_drq.py
        envs = suites.atari.Games((task,), args.max_frames)
        how = agent.task_ids, args.eval_epsilon, torch.Generator(agent.device).manual_seed(seed)
    episodes, running, obs = [], (0.0, np.nan), envs.reset(seed=seed)
    for left in reversed(range(pretrained.args.transitions_per_candidate)):
        if run.stop:
            run.finish(run.bar.n, [])
        action = agent.act(torch.from_numpy(obs).to(agent.device), *how).cpu().numpy()
        step = envs.step(action)
        if buffer:
            lost = [step.life_lost] if hasattr(step, "life_lost") else []
            reward = step.reward.clip(-1, 1) if getattr(args, "clip_rewards", False) else step.reward
            buffer.add(obs, action, reward, step.terminated, step.truncated | (left == 0), *lost, step.next_obs)
            normalizer.observe(reward, np.logical_or.reduce([step.terminated, *lost]), step.truncated)
        running = running[0] + float(step.reward[0]), float(np.fmax(running[1], getattr(step, "success", [np.nan])[0]))
        if step.terminated[0] or step.truncated[0]:
            episodes, running = [*episodes, running], (0.0, np.nan)
        obs = step.obs
        run.step(learning=pretrained.args.label == "embedding-select")  # whose steps are all of this kind
    envs.close()
    result = suites.mean_episode(task, episodes or [running])
    print(f"{task} with {name}'s embedding: score {result['score']:.3f}, return {result['return']:.1f}", flush=True)
    return result


def freeze_all_but_embedding(agent: Any, optimize: Any) -> None:
    """Puts a critic step of the embedding alone, and of its copy in the target, in agent.update's place."""
    agent.critic.requires_grad_(False)  # the optimiser passes over what has no gradient
    agent.critic.embedding.requires_grad_(True)

    def update(batch: Any, *noise: Tensor) -> Any:
        sac = (agent.actor, agent.temperature, agent.args.gamma) if hasattr(agent, "actor") else ()  # brc_drq.py: none
        loss, metrics = agent.critic_loss(agent.critic, agent.target, *sac, batch, *noise[:1])
        optimize(agent.critic_optimizer, loss)
        with torch.no_grad():
            agent.target.embedding.weight.lerp_(agent.critic.embedding.weight, agent.args.tau)
            if not sac:
                return metrics
            _, log_prob, more = agent.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise[1])
            return metrics | more, log_prob

    agent.update = update


def keep_better(pretrained: Pretrained, run: harness.Run, agent: Any) -> None:
    """Tries the tuned embedding, and puts the best pretrained one back into the checkpoint where that did as well."""
    tasks, saved = pretrained.old.tasks, {row["embedding"]: row for row in read_csv(run.dir / "candidates.csv")}
    best = max(draw(pretrained, run), key=lambda row: rank(saved[tasks[row]]))
    agent.load_state_dict(run.state["agent"])
    if rank(trial(pretrained, run, agent, "the tuned one")) <= rank(saved[tasks[best]]):
        print(f"{tasks[best]}'s embedding did as well or better, and is kept.")
        set_embedding(pretrained, agent, best)
    run.state |= {"agent": agent.state_dict(), "env_step": pretrained.args.cost}


# ------------------------------------------------------------------------------------------------------------ runs


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(errors="replace").splitlines())) if path.exists() else []


def outcome(run_dir: Path, env_step: int) -> dict[str, float]:
    """The evaluation at `env_step` from metrics.csv; nothing if it is not there yet."""
    return {row["metric"]: float(row["value"]) for row in read_csv(run_dir / "metrics.csv")
            if row["env_name"] == "mean" and row["env_step"] == str(env_step)}


def main(args: Args | None = None) -> list[dict[str, float]]:
    """Transfers to every new task in turn; returns their last evaluations. Goes on where a run was stopped."""
    args = args or harness.parse_args(*PARSE)
    pretrained, several = load_pretrained(args), bool(args.suite) or len(args.task) > 1
    exp_name = args.exp_name or f"{pretrained.program.stem}-{args.label}"
    name = f"{exp_name}-{args.suite or '-'.join(args.task[:3])}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    root = Path(args.resume or args.run_dir or f"runs/{name}")
    folders = {task: root / task if several else root for task in args.task}
    runs = [(folder, learner_args(pretrained, exp_name, task, folder)) for task, folder in folders.items()]
    go_on = shlex.join(["python", str(harness.PROGRAM), args.method, "--resume", str(root)])
    if not args.resume:
        harness.check_empty(root)
    if several:
        print(f"{len(runs)} tasks, one after another; to go on with all of them after a stop: {go_on}", flush=True)
    top = several and {"format": harness.FORMAT, "program": str(harness.PROGRAM.resolve()), "go_on": go_on,
                       "own": vars(args) | {"resume": None}}  # args.json of all the tasks
    own = {"suite": None} | {key: value for key, value in vars(args).items()
                             if key == "eval_episodes" or not hasattr(pretrained.old, key)}
    rows = 1 + len(pretrained.old.tasks) * args.uses_replay if pretrained.embeddings or args.uses_replay else 0
    start = pretrained.agent.Start(lambda *new: prepare(pretrained, top, *new), rows * (args.prior_tasks == "separate"),
                                   pretrained.space, args.uses_networks, args.spent, args.method)
    for folder, one in runs:
        if outcome(folder, one.total_steps):
            print(f"{one.tasks[0]} is finished.")
            continue
        this = start._replace(facts={"own": own | {"task": one.tasks}, "agent": str(pretrained.program.resolve())})
        done = harness.read_checkpoint(folder)["env_step"] if args.tunes and (folder / "checkpoint.pt").exists() else 0
        for total in (args.spent + args.tune_transitions,) * args.tunes + (one.total_steps,):
            if total >= done:
                resume = str(folder) if (folder / "args.json").exists() else None
                pretrained.agent.train(dataclasses.replace(one, total_steps=total, resume=resume), this)
        if args.track:  # a run of its own for each task
            sys.modules["wandb"].finish()
    results = [outcome(folder, one.total_steps) for folder, one in runs]
    if not all(results):
        raise harness.RunError(f"An evaluation could not be written to {root}: free some disk space, then {go_on}")
    if several:
        print(suites.table(args.task, results))
    print(f"Transitions of each new task: {one.total_steps:,} in all; {args.spent:,} were to try pretrained embeddings "
          f"on, {args.tunes * args.transitions_per_candidate:,} to try the tuned one.")
    if args.full_map:
        from benchmarks import report
        report.embedding_map(root, folders, pretrained.old.tasks)
    return results


if __name__ == "__main__":
    harness.exit_on_error(main, ARGS)
