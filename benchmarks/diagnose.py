"""What a run's tasks do to each other: the paper's diagnostics (Figures 3, 5 and 7) from its checkpoints.

    python benchmarks/diagnose.py runs/<run>                                        from its last checkpoint
    python benchmarks/diagnose.py runs/<run> --follow                               and the later ones, while it trains
    python benchmarks/report.py runs/* --metric conflict_share --out conflicts.png  the curves, as of any metric

Works for runs of brc_sac.py, of a copy of it and of ablations/ that keep their replay; a run saves a checkpoint before
each evaluation, and one that the next replaces before it is read is missed. Draws a batch per task from the replay and
writes, in metrics.csv's columns and beside the rows of other steps, for every task and as mean, std and, where there
are several, relative_std = std / mean of tasks
    td_loss          the critics' loss, as the run's own script defines it
    gradient_norm    L2, of that loss's gradient for all critic parameters, the task embedding included
    entropy          of the policy, from one action per state
    conflict_share   of the other tasks, those whose gradient has a negative cosine with this task's (Yu et al. 2020);
                     its mean is the share of conflicting pairs
    embedding_pc1/2  principal components of the task embeddings as the networks read them, and their variance_share;
                     also drawn
"""

import csv
import dataclasses
import fcntl
import functools
import importlib.util
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds without a process that trains, after which a run is no longer followed
sys.path.insert(0, str(ROOT))
import devices  # noqa: E402
import harness  # noqa: E402
from harness import UsageError  # noqa: E402


@dataclass(frozen=True)
class Args:
    run_dir: tyro.conf.Positional[Path] = tyro.MISSING
    """Run directory; it is only read, but for `out`."""
    follow: bool = False
    """Also from every later checkpoint that is found, until that of the run's last step, or until a minute after the
    run was stopped."""
    batch_per_task: int = 32
    """Transitions per task, as in the release. Conflicts vary with the batch, of 1024 far less."""
    out: Path | None = None
    """Where to write diagnostics.csv and embedding.png; default <run_dir>/diagnostics."""
    seed: int = 0
    """Of the batches and the actions."""
    gradient_gb: float = 4.0
    """Memory for gradients in GB: of all tasks, for as many of the critic's layers at a time as fit."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU if there is one."""


@functools.cache  # an ablation replaces parts of brc_sac each time that it is loaded
def load_program(path: Path) -> ModuleType:
    """The module with the agent of the script at `path`: it, or brc_sac as it leaves it. Raises UsageError."""
    places = [path, ROOT / path.name, ROOT / "ablations" / path.name]  # the run may come from another machine
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise UsageError(f"The run is of {path}, which is not here: put the script there, or beside brc_sac.py.")
    if found != path:
        print(f"{path} is not here: its place is taken by {found}.", file=sys.stderr)
    spec = importlib.util.spec_from_file_location(found.stem, found)
    module = sys.modules[found.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module = module if hasattr(module, "ReplayBuffer") else getattr(module, "brc_sac", module)
    if not hasattr(module, "ReturnNormalizer") or not hasattr(module, "sample_action"):
        raise UsageError(f"The run is of {path.name}: give one of brc_sac.py, of a copy of it, or of ablations/.")
    return module


def read_facts(run_dir: Path) -> dict:
    """The args.json of a run that can be diagnosed. Raises UsageError."""
    _, facts = harness.read_args(run_dir, Args)
    if "tasks" not in facts:
        raise UsageError(f"{run_dir} holds the runs of several tasks: give a folder in it.")
    if facts["ranks"] > 1:
        raise UsageError(f"{run_dir} is a run of {facts['ranks']} processes, each of which keeps the replay of its own "
                         "tasks: give one of a single process.")
    return facts


def load_run(run_dir: Path, device: str) -> tuple:
    """Arguments, agent, normaliser, replay and step of the last checkpoint, in eager float32. Raises UsageError."""
    facts = read_facts(run_dir)
    program = load_program(Path(facts.get("agent", facts["program"])))
    args, _ = harness.read_args(run_dir, program.Args)
    args = dataclasses.replace(args, compile=False, precision="fp32")
    obs_dim, act_dim, num_tasks, num_embeddings = harness.read_checkpoint(run_dir)["agent"]["sizes"]
    device = devices.choose_device(device)
    agent = program.Agent(args, obs_dim, act_dim, num_tasks, num_embeddings, device)
    normalizer = program.ReturnNormalizer(args, max(num_tasks, num_embeddings), act_dim, device)
    buffer = program.ReplayBuffer(num_tasks, obs_dim, act_dim, min(args.buffer_size, args.total_steps))
    state = harness.read_checkpoint(run_dir, buffer)
    try:
        agent.load_state_dict(state["agent"])
    except (RuntimeError, LookupError):
        raise UsageError(f"The networks in {run_dir} are not those of {program.__file__}: diagnose it with the script "
                         f"as it was, of commit {facts['git_commit']}.") from None
    normalizer.load_state_dict(state["normalizer"])
    buffer.end_episodes(np.array([], int))  # none; it makes the loaded rows the ones to sample from
    return args, agent, normalizer, buffer, state["env_step"]


def saved_at(run_dir: Path) -> int | None:
    """When the last checkpoint was saved, in ns; None before the first, and while one takes another's place."""
    try:
        return (run_dir / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def is_training(run_dir: Path) -> bool:
    """Whether a process holds the run's lock; true also where a file system has no locks."""
    try:
        with open(run_dir / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def wait_for_checkpoint(run_dir: Path, seen: int | None) -> bool:
    """Waits for one that was not saved at `seen`; false if the run has been stopped."""
    deadline = time.monotonic() + PATIENCE
    while saved_at(run_dir) in (None, seen):
        if is_training(run_dir):
            deadline = time.monotonic() + PATIENCE
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def task_batches(buffer, size: int) -> list:
    """A batch of `size` transitions for every task."""
    batch = buffer.sample(buffer.num_tasks * (4 * size + 40))  # so many that no task gets fewer than `size`
    rows = [(batch.task_id == task).nonzero()[:size, 0] for task in range(buffer.num_tasks)]
    return [batch._replace(**{name: field[row] for name, field in batch._asdict().items()}) for row in rows]


def gram_matrix(loss: Callable, num_tasks: int, parameters: list, max_bytes: float):
    """Inner products [N, N] of the gradients of loss(0) .. loss(N - 1), `max_bytes` of them in memory at a time."""
    import torch
    gram, group = torch.zeros(num_tasks, num_tasks, dtype=torch.float64), []
    for index, parameter in enumerate(parameters):
        group.append(parameter)
        size, last = sum(p.numel() for p in group), index + 1 == len(parameters)
        if last or 4 * num_tasks * (size + parameters[index + 1].numel()) > max_bytes:
            gradients = torch.empty(num_tasks, size, device=parameter.device)
            for task in range(num_tasks):
                parts = torch.autograd.grad(loss(task), group, materialize_grads=True)
                torch.cat([part.flatten() for part in parts], out=gradients[task])
            gram += (gradients @ gradients.T).double().cpu()
            group = []
    return gram.numpy()


def conflicts(gram: np.ndarray) -> np.ndarray:
    """For each of N > 1 tasks, the share of the others whose gradient has a negative inner product with its own.

    NaN where a product is not finite.
    """
    return np.where(np.isfinite(gram).all(1), (gram < 0).sum(1) / (len(gram) - 1), np.nan)


def principal_components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two coordinates [N, 2] of rows [N, D], and their shares of the variance [2]."""
    centred = np.pad(rows - rows.mean(0), ((0, 0), (0, max(0, 2 - rows.shape[1]))))
    _, scale, axes = np.linalg.svd(centred, full_matrices=True)
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]  # a sign that repeats
    variance = np.append(scale, 0)[:2] ** 2
    return centred @ axes[:2].T, variance / max((scale**2).sum(), 1e-30)


def diagnose(run_args, agent, normalizer, batches: list, max_bytes: float) -> dict[str, np.ndarray]:
    """Metric -> its values [N]."""
    import torch
    temperature, losses = agent.temperature, {}
    batches = [type(batch)(*(field.to(agent.device) for field in batch)) for batch in batches]
    batches = [batch._replace(reward=normalizer.normalize(batch.reward, batch.task_id, temperature))
               for batch in batches]
    next_noise, noise = torch.randn(2, *batches[0].action.shape, device=agent.device)  # the same for every task

    def loss(task: int):
        result, _ = agent.critic_loss(agent.critic, agent.target, agent.actor, temperature, run_args.gamma,
                                      batches[task], next_noise)
        losses[task] = result.item()
        return result

    gram = gram_matrix(loss, len(batches), list(agent.critic.parameters()), max_bytes)
    with torch.no_grad():
        entropy = [-agent.actor_loss(agent.critic, agent.actor, temperature, batch, noise)[1].mean().item()
                   for batch in batches]
    values = {"td_loss": np.array([losses[task] for task in range(len(batches))]),
              "gradient_norm": gram.diagonal() ** 0.5, "entropy": np.array(entropy)}
    return values | ({"conflict_share": conflicts(gram)} if len(batches) > 1 else {})


def draw(tasks: tuple[str, ...], points: np.ndarray, shares: np.ndarray, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    ax.scatter(*points.T, s=15)
    ax.margins(0.15)  # for the names
    for task, point in zip(tasks, points, strict=True):
        ax.annotate(task, point, xytext=(3, 3), textcoords="offset points", fontsize=7)
    ax.set_xlabel(f"PC 1 ({shares[0]:.0%} of the variance)")
    ax.set_ylabel(f"PC 2 ({shares[1]:.0%})")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(run_args, agent, metrics: dict[str, np.ndarray], out: Path) -> list[tuple]:
    """Rows (metric, task or statistic, value) of diagnostics.csv, printed in short; draws the embeddings into `out`."""
    import torch
    rows = []
    for metric, values in metrics.items():
        summary = {"mean": values.mean()} | ({"std": values.std()} if len(values) > 1 else {})
        if len(values) > 1 and metric in ("td_loss", "gradient_norm"):  # an entropy has no zero to be relative to
            summary["relative_std"] = values.std() / max(values.mean(), 1e-30)
        rows += [(metric, *row) for row in (*zip(run_args.tasks, values, strict=True), *summary.items())]
        print(metric.ljust(16) + ", ".join(f"{name} {value:.4g}" for name, value in summary.items()))
    if isinstance(agent.critic.embedding, torch.nn.Module):  # not in single-task mode, nor a one-hot or heads
        points, shares = principal_components(agent.critic.embed(agent.task_ids).detach().cpu().double().numpy())
        rows += [(f"embedding_pc{k + 1}", *row) for k in range(2)
                 for row in zip((*run_args.tasks, "variance_share"), (*points[:, k], shares[k]), strict=True)]
        draw(run_args.tasks, points, shares, out / "embedding.png")
    return rows


def write(path: Path, run_args, env_step: int, rows: list[tuple]) -> None:
    """Puts a run's rows of a step behind all others, and in the place of older ones. Raises UsageError or OSError."""
    header, kept = ["exp_name", "env_name", "seed", "metric", "env_step", "value"], []
    new = [[run_args.exp_name, name, str(run_args.seed), metric, str(env_step), f"{value:.6g}"]
           for metric, name, value in rows]
    if path.exists():
        with open(path, newline="", errors="replace") as file:
            reader = csv.reader(file)
            if next(reader, None) != header:
                raise UsageError(f"{path} is no diagnostics.csv of this script: give another --out.")
            again = {tuple(row[:-1]) for row in new}
            kept = [row for row in reader if tuple(row[:-1]) not in again]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *kept, *new])
    harness.write_file(path, lambda file: file.write(text.getvalue().encode()))


def diagnose_checkpoint(args: Args) -> tuple[list[tuple], bool]:
    """Writes what the last checkpoint says; returns its rows of diagnostics.csv and whether the run ends with it.

    Raises UsageError or RunError.
    """
    import torch
    run_args, agent, normalizer, buffer, env_step = load_run(args.run_dir, args.device)
    if not buffer.steps and args.follow:
        return [], False
    if not buffer.steps:
        raise UsageError(f"The checkpoint in {args.run_dir} is of step 0, with an empty replay: wait for the next one, "
                         "or give --follow.")
    out = args.out or args.run_dir / "diagnostics"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out} cannot be made ({error.strerror}): give another --out.") from None
    torch.manual_seed(args.seed)
    batches = task_batches(buffer, args.batch_per_task)
    metrics = diagnose(run_args, agent, normalizer, batches, 1e9 * args.gradient_gb)
    try:
        rows = table(run_args, agent, metrics, out)
        write(out / "diagnostics.csv", run_args, env_step, rows)
    except OSError as error:
        raise harness.RunError(f"{out} cannot be written to ({error.strerror}); its diagnostics.csv is as "
                               "before.") from None
    print(f"{run_args.exp_name} at step {env_step:,}: {out}", flush=True)
    return rows, env_step >= run_args.total_steps


def main(args: Args | None = None) -> list[tuple]:
    """The program; returns the last step's rows of diagnostics.csv."""
    args = args or tyro.cli(Args, description=__doc__.split("\n\n")[0])
    harness.check_range(args, 1, float("inf"), "batch_per_task")
    harness.check_range(args, 0, float("inf"), "gradient_gb")
    harness.check_range(args, 0, 2**63 - 1, "seed")
    read_facts(args.run_dir)  # what cannot be diagnosed is not waited for
    if not args.follow:
        return diagnose_checkpoint(args)[0]
    rows, is_last, seen = [], False, None
    while not is_last and wait_for_checkpoint(args.run_dir, seen):
        seen = saved_at(args.run_dir)
        rows, is_last = diagnose_checkpoint(args)
    if not is_last:
        print(f"{args.run_dir} was stopped before its last step: to go on, resume it and call this again.")
    return rows


if __name__ == "__main__":
    harness.exit_on_error(main)
