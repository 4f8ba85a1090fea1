"""BRC+BC: the agent of brc_sac.py learns from transitions on disk, and never acts (BRC, arXiv 2505.23150, Figure 12).

    python offline.py --data runs/<run> [runs/<run> ...]           the replays of runs of brc_sac.py, joined by task
    python offline.py --data runs/<run> --last 100000              the newest 100,000 transitions of each task alone
    python offline.py --data mt80 --max-transitions 500000         TD-MPC2's published files, folders of chunk_*.pt
    python offline.py --data mt80 --bc-only                        the baseline: plain behavioural cloning
    python offline.py --resume runs/<run>                          go on after a crash or a kill

Critic, target and temperature learn as online, from batches that are uniform over tasks and each task's transitions.
The actor's loss has a term more, `cloning_loss`, so that it does not leave the data for actions whose value nobody saw.
Without environments to step, a run counts updates: env_step in metrics.csv is the number of them. Sections, in order:
    arguments      what is read, and how it is learned from
    learning       the cloning term, and one update
    data           the return scales of what offline_data/ reads
    training loop  update, evaluate, log
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import harness
from harness import UsageError
from offline_data import tdmpc2

# ------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Args:
    """Train BRC offline, with a behavioural-cloning loss, from the replays of runs or from TD-MPC2's files."""

    data: tuple[str, ...] = ()  # run directories, or folders of TD-MPC2's chunk_*.pt
    last: int | None = None  # newest transitions of each task to take from each run; default all that its replay holds
    max_transitions: int | None = None  # per task, drawn evenly from each folder of TD-MPC2's; default all
    tasks: tuple[str, ...] | None = None  # tasks to learn; default all that the data hold
    updates: int = 1_000_000  # gradient updates
    bc_weight: float = 0.1  # of the cloning term, the same for all tasks; see docs/choices.md
    bc_only: bool = False  # clone the data's actions and learn no values
    # As in brc_sac.py, whose help has their sources; what counts environment steps there counts updates here.
    variant: Literal["paper", "release"] = "paper"  # where paper and release differ; see docs/choices.md
    width: int | None = None  # critic width in units; default 4096
    actor_width: int | None = None  # actor width in units; default 256
    learning_rate: float | None = None  # of critic, actor and temperature; default 3e-4
    gamma: float | None = None  # discount per step of the data; default 0.99
    tau: float | None = None  # Polyak coefficient of the target critics; default 0.005
    init_temperature: float | None = None  # initial entropy temperature; default 0.1
    batch_size: int | None = None  # transitions per update over all tasks; default 1024, for one task 256
    embedding_norm: Literal["l1", "l2"] | None = None  # norm of every task embedding; default by --variant
    goals: Literal["fresh", "frozen"] | None = None  # of MetaWorld, in evaluations; default by --variant
    seed: int = 0  # seed of networks, noise, batches and evaluations
    run_dir: str | None = None  # where to write; default runs/<exp>__<seed>__<time>
    exp_name: str | None = None  # name in metrics.csv; default offline-<tasks>-<variant>, and -bc with --bc-only
    resume: str | None = None  # run directory to go on with; all other arguments are read from there
    evaluate: str | None = None  # run directory whose agent to evaluate, and nothing else
    track: bool = False  # also log to Weights & Biases
    capture_video: bool = False  # record the first evaluation episode of every task as a GIF
    eval_interval: int | None = None  # updates between evaluations; default as brc_sac.py's
    eval_episodes: int = 10  # evaluation episodes per task
    log_interval: int = 500  # updates between TensorBoard scalars
    checkpoint_interval: int | None = None  # updates between checkpoints; default every evaluation
    threads: int | None = None  # threads of torch on a CPU; default OMP_NUM_THREADS, or as many as make steps fastest
    workers: int | None = None  # processes that step the environments; default by the number of cores
    assets: str | None = None  # ShadowHand's folder dex_envs/assets; default $SHADOWHAND_ASSETS
    device: str = "auto"  # cpu, cuda or cuda:N; auto takes a GPU if there is one
    replay_device: str | None = None  # device of the data; default the training device
    precision: Literal["tf32", "bf16", "fp32"] = "tf32"  # of matrix products
    compile: bool = True  # torch.compile the losses where it is worth it
    cuda_graph: bool = True  # launch an update as one CUDA graph, where networks and data are on one GPU


def resolve(args: Args) -> Args:
    """Checks what it can before torch is imported. Raises UsageError."""
    if args.evaluate:
        return args
    published = [bool(tdmpc2.chunks(Path(path))) for path in args.data]
    if not args.data:
        raise UsageError("No --data was given: name run directories, or folders of TD-MPC2's chunk_*.pt.")
    for path, is_published in zip(args.data, published):
        if not is_published and not (Path(path) / "args.json").exists():
            moved = ": if it has moved, give --data beside --resume" if args.resume else ""
            raise UsageError(f"{path} holds neither a run (args.json) nor files of TD-MPC2's (chunk_*.pt){moved}.")
    if len({Path(path).resolve() for path in args.data}) < len(args.data):
        raise UsageError("--data names a directory twice, whose transitions would count twice: name each once.")
    if len(set(published)) > 1:
        raise UsageError("Runs and TD-MPC2's files cannot be joined, for theirs is every second step: give one kind.")
    if (args.max_transitions, args.last)[published[0]]:
        raise UsageError("--last is for runs and --max-transitions for TD-MPC2's files: leave the other one out.")
    harness.check_range(harness.fill(args, last=1, max_transitions=1), 1, math.inf, "last", "max_transitions")
    harness.check_range(args, 2, math.inf, "updates")
    harness.check_range(args, 0, 1e6, "bc_weight")
    if args.bc_only and args.bc_weight != Args.bc_weight:
        raise UsageError("--bc-weight has no effect with --bc-only, which clones alone: leave one of them out.")
    return args


# Parsed before torch is imported, so that --help and a mistyped name answer at once. The data may have moved.
PARSE = Args, resolve, (*harness.MAY_CHANGE, "updates", "data")
ARGS = harness.exit_on_error(harness.parse_args, *PARSE) if __name__ == "__main__" else None

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import brc_sac  # noqa: E402
import devices  # noqa: E402
from brc_sac import Actor, Agent, Batch, Critic, ReturnNormalizer, VectorEnv, evaluate  # noqa: E402
from offline_data.episodes import Episodes  # noqa: E402
from offline_data.runs import RunReplay  # noqa: E402
from offline_data.transitions import Transitions  # noqa: E402

SHARED = set(Args.__dataclass_fields__) & set(brc_sac.Args.__dataclass_fields__)


def learner_args(args: Args, tasks: tuple[str, ...]) -> brc_sac.Args:
    """The arguments of the same learner online. Raises UsageError or SuiteError."""
    shared = {name: getattr(args, name) for name in SHARED} | {"tasks": tasks}
    learner = brc_sac.resolve(brc_sac.Args(**shared, total_steps=args.updates, updates_per_step=1, learning_starts=1,
                                           save_replay=False))
    return dataclasses.replace(learner, exp_name=args.exp_name or learner.exp_name + "-bc" * args.bc_only)


# -------------------------------------------------------------------------------------------------------- learning


def cloning_loss(actor: Actor, embedding: Tensor, batch: Batch) -> Tensor:
    """How far the policy's action is from the data's: |tanh(mean) - a|^2, as in TD3+BC.

    A sum over the action's numbers: how much each is drawn to the data does not depend on how many are padding.
    """
    mean, _ = actor(batch.obs, embedding)  # [B, A]
    return (torch.tanh(mean) - batch.action).square().sum(-1).mean()


def actor_loss(bc_weight: float, critic: Critic, actor: Actor, temperature: Tensor, batch: Batch, noise: Tensor
               ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """brc_sac.py's, and the cloning term. Q is in units of each task's return scale: one weight serves all tasks."""
    loss, log_prob, metrics = brc_sac.actor_loss(critic, actor, temperature, batch, noise)
    cloning = cloning_loss(actor, critic.embed(batch.task_id).detach(), batch)
    return loss + bc_weight * cloning, log_prob, metrics | {"cloning_loss": cloning.detach()}


def update(agent: Agent, normalizer: ReturnNormalizer, batch: Batch) -> dict[str, Tensor]:
    """One update, as online, from a batch with raw rewards; returns tensors to log."""
    reward = normalizer.normalize(batch.reward, batch.task_id, agent.temperature)
    next_noise, noise = torch.randn(2, *batch.action.shape, device=agent.device)
    metrics, log_prob = agent.update(batch._replace(reward=reward), next_noise, noise)
    normalizer.observe_entropy(log_prob, batch.task_id)
    return metrics


def clone(agent: Agent, batch: Batch) -> dict[str, Tensor]:
    """One update of plain cloning: no reward is seen, and the task embeddings stay as they were drawn."""
    loss = cloning_loss(agent.actor, agent.critic.embed(batch.task_id).detach(), batch)
    brc_sac.optimize(agent.actor_optimizer, loss, agent.share)
    return {"cloning_loss": loss.detach()}


# ------------------------------------------------------------------------------------------------------------ data


def observe_returns(normalizer: ReturnNormalizer, task: int, episodes: Episodes) -> None:
    """Widens a task's return scale to these episodes, before anything is learned.

    Whole ones count, as online, or all if none is whole. Where an episode was truncated, or the data are cut, its mean
    reward goes on for ever, as in the release: there is no critic yet to bootstrap with.
    """
    lengths = episodes.lengths.tolist()
    counts = episodes.whole | ~episodes.whole.any()
    for reward, terminated, count in zip(episodes.reward.split(lengths), episodes.terminated.split(lengths), counts):
        if count:
            normalizer.episode_rewards[task] = reward.tolist()
            normalizer.finish(task, bool(terminated[-1]), reward.double().mean().item() / (1 - normalizer.gamma))


# --------------------------------------------------------------------------------------------------- training loop


def step_as_in_data(action_repeat: int) -> None:
    """Makes evaluations take each action as often as it was taken in the data."""
    brc_sac.VectorEnv = functools.partial(VectorEnv, make=tdmpc2.make) if action_repeat > 1 else VectorEnv


def train(args: Args) -> list[dict]:
    """Trains as `args` say; returns the last evaluation's means, one dict per task. Raises as brc_sac.train does."""
    if devices.ranks()[1] > 1:
        raise UsageError("offline.py trains in one process: start it without torchrun.")
    sources = [tdmpc2.Dataset(path, args.tasks, args.max_transitions) if tdmpc2.chunks(path) else
               RunReplay(path, args.tasks, args.last) for path in map(Path, args.data)]
    held = dict.fromkeys(task for source in sources for task in source.tasks)
    if missing := [task for task in args.tasks or () if task not in held]:
        raise UsageError(f"There are no transitions of {missing[0]} in {' '.join(args.data)}: leave it out of --tasks.")
    learner = learner_args(args, args.tasks or tuple(held))
    device, data_device = map(devices.choose_device, (learner.device, learner.replay_device or learner.device))
    own = {name: value for name, value in dataclasses.asdict(args).items() if name not in SHARED}
    run = harness.Run(learner, action_repeat=sources[0].action_repeat, own=own)
    step_as_in_data(sources[0].action_repeat)
    envs = brc_sac.VectorEnv(learner.tasks, args.seed + 42, learner.workers, args.capture_video, goals=learner.goals)
    torch.manual_seed(harness.derived_seed(args.seed, "networks"))
    agent = Agent(learner, envs.obs_dim, envs.act_dim, len(learner.tasks), device=device)
    agent.actor_loss = functools.partial(actor_loss, args.bc_weight)
    if learner.compile:
        agent.actor_loss = devices.compiled(agent.actor_loss)
    normalizer = ReturnNormalizer(learner, len(learner.tasks), envs.act_dim, device)
    data = Transitions(sources, envs, functools.partial(observe_returns, normalizer), data_device)
    run.facts["fingerprint"] = data.fingerprint
    if args.resume and harness.read_args(run.dir, Args)[1]["fingerprint"] != data.fingerprint:
        raise UsageError(f"{' '.join(args.data)}: these are not the transitions with which {run.dir} began; give them.")
    print(f"obs {envs.obs_dim}, act {envs.act_dim}; {device}, {agent}", flush=True)
    run.open(None)
    metrics, results, step = {}, [], run.saved_step or 0
    if run.state:
        agent.load_state_dict(run.state["agent"])
        normalizer.load_state_dict(run.state["normalizer"])

    def updates() -> dict[str, Tensor]:
        batch = Batch(*(field.to(device, non_blocking=True) for field in data.sample(learner.batch_size)))
        return clone(agent, batch) if args.bc_only else update(agent, normalizer, batch)

    if learner.cuda_graph and device.type == "cuda" and device == data_device:
        updates = devices.as_cuda_graph(updates)
    try:
        while True:
            due = step > 0 and (step % learner.eval_interval == 0 or step == learner.total_steps)
            if due or step % learner.checkpoint_interval == 0 or run.stop or run.asked:
                run.check_finite(metrics, step)  # never over the last good one
                run.save(step, {"agent": agent.state_dict(), "normalizer": normalizer.state_dict()}, None)
            if due and not run.stop and step not in run.evaluated:
                seed = harness.derived_seed(args.seed, "evaluation", step)
                results, frames = evaluate(agent, envs, args.eval_episodes, seed, args.capture_video, lambda: run.stop)
                if results:
                    run.log_evaluation(results, frames, step, agent.critic.embed(agent.task_ids))
            if run.stop or step >= learner.total_steps:
                break
            metrics = updates()
            step += 1
            run.step()
            if step % args.log_interval == 0:
                run.check_finite(metrics, step)
                scales = zip(learner.tasks, normalizer.denominator(agent.temperature).tolist())  # waits for the device
                run.log({f"train/{name}": value.item() for name, value in metrics.items()}
                        | {f"return_scale/{task}": scale for task, scale in scales}, step)
    except brc_sac.EnvError as error:
        raise harness.RunError(f"{error}\nStopped at step {step:,}. To go on: {run.go_on}") from None
    finally:
        run.close()
        envs.close()
    run.finish(step, results)
    return results


def main(args: Args | None = None) -> list[dict]:
    """The program: its command line, or `args`."""
    args = args or harness.parse_args(*PARSE)
    if not args.evaluate:
        return train(args)
    step_as_in_data(harness.read_args(Path(args.evaluate), Args)[1].get("action_repeat", 1))
    return brc_sac.evaluate_run(learner_args(args, args.tasks))


if __name__ == "__main__":
    harness.exit_on_error(main, ARGS)
