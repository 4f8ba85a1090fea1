"""Learning curves of any runs, with the authors' next to them: a figure, and a table with confidence intervals.

    python benchmarks/report.py runs/demo* --out demo.png
    python benchmarks/report.py runs/mw* --official mw mw-single --mean-only --at 0.5 1 --threshold 0.8
    python benchmarks/report.py runs/mw* --official mw-single --mean-only --x updates     per gradient update
    python benchmarks/report.py runs/tr --metric success --csv transfer.csv               runs of transfer.py
    python benchmarks/report.py runs/select/embedding_map.csv --out map.png               the map of --full-map

A panel per task, and one for the mean over the tasks that all methods ran. Runs are one method if they have one
exp_name and one set of arguments in their args.json, but for those that no result depends on, and for the checkpoint
or data that a run began with, which may be its seed's; where one name has several sets, what differs is added to it. A
method's tasks may be spread over runs (a run per task), its seeds must be: two runs of one seed are refused. Intervals
are rliable's bootstrap over seeds (Agarwal et al. 2021), 95 %: with three seeds they show how far the seeds are apart,
and no more. For a mean over tasks, a network's tasks are drawn together, and networks of one task each for every task
anew (stratified). Curves are drawn at the steps that all seeds of a method have, and what that leaves out is said.

The authors' curves (results/official.csv.gz) are returns and successes per task and seed; `-single` is their
single-task agents, `cpu` two tasks of their code at width 256 on a CPU. To lay runs beside those of MetaWorld, give
them fresh goals (benchmarks/README.md says why).
"""

import contextlib
import csv
import gzip
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import harness  # noqa: E402
import suites  # noqa: E402
from harness import UsageError  # noqa: E402

SPREAD = ("std", "relative_std")  # of tasks, in diagnostics.csv
OFFICIAL = Path(__file__).resolve().parent / "results" / "official.csv.gz"

# In args.json, but no setting of the method: facts about the run, and arguments that no result depends on.
FREE = {"format", "run_id", "go_on", "git_commit", "command", "threads", "threads_given", "hardware",
        "versions", "resumed", "updates", "seed", "exp_name", "run_dir", "resume", "evaluate", "device",
        "replay_device", "workers", "assets", "track", "capture_video", "log_interval", "checkpoint_interval",
        "eval_interval", "save_replay", "compile", "cuda_graph", "total_steps", "suite", "split", "pad_to",
        "checkpoint", "task", "full_map", "allow_seen", "data", "fingerprint"}


@dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories, directories that hold some at any depth, or their CSV files; or one embedding_map.csv."""
    official: tuple[str, ...] = ()
    """The authors' curves to put beside: mw, dmc-dogs, dmc-humanoids, hb-medium, hb-hard, sh, each also with -single
    behind it, or cpu."""
    tasks: tuple[str, ...] | None = None
    """Of these tasks only."""
    metric: Literal["score", "success", "return", "td_loss", "gradient_norm", "entropy", "conflict_share"] = "score"
    """Of metrics.csv, or from td_loss on of the diagnostics.csv that diagnose.py has written."""
    methods: tuple[str, ...] | None = None
    """Of these methods only, by their names in the table, in this order; the authors' too."""
    single: tuple[str, ...] = ()
    """Methods that are a network per task, where no args.json says so."""
    mean_only: bool = False
    """Only the mean over the tasks that all methods ran, in place of a panel per task as well."""
    x: Literal["steps", "updates"] = "steps"
    """The x axis: environment steps of a task, or gradient updates of all networks that the tasks need, counted from
    --learning-starts on (transfer.py's pretrained agents begin no earlier than their first episode ends)."""
    at: tuple[float, ...] = (1.0,)
    """Shares of the budget to give scores at, in the table."""
    budget: int | None = None
    """Environment steps of a task that the shares are of, and that the mean of all evaluations ends with; default a
    method's --total-steps, or its last evaluation."""
    threshold: float | None = None
    """Also give the steps at which each seed first reaches this value, if it does so by its last evaluation."""
    out: Path = Path("report.png")
    """Where to draw the curves."""
    columns: int = 5
    """Most panels in a row."""
    csv: Path | None = None
    """Where to write the table, beside printing it in Markdown."""
    reps: int = 2000
    """Bootstrap resamples."""


@dataclass
class Method:
    """Runs that are seeds of one thing."""

    curves: dict[str, dict[int, dict[int, float]]] = field(default_factory=dict)  # task -> seed -> env step -> value
    files: dict[tuple[str, int], Path] = field(default_factory=dict)  # of each task and seed
    total_steps: dict[str, int] = field(default_factory=dict)  # of each task, where an args.json tells
    learning_starts: int | None = None
    updates_per_step: int = 2
    official: bool = False
    single: bool = False  # a network per task

    def add(self, path: Path, rows: list[dict]) -> None:
        for row in rows:
            task, seed = row["env_name"], row["seed"]
            if self.files.setdefault((task, seed), path) != path:
                raise UsageError(f"{self.files[task, seed].parent} and {path.parent} are both seed {seed} of "
                                 f"{row['exp_name']} on {task}, with the same arguments: leave one of them out.")
            curve = self.curves.setdefault(task, {}).setdefault(seed, {})
            if row["env_step"] in curve:
                raise UsageError(f"{path} has two values of {row['exp_name']}, seed {seed}, on {task} at step "
                                 f"{row['env_step']}: give runs of other arguments another exp_name there.")
            curve[row["env_step"]] = row["value"]

    def x_of(self, steps: list[int], x: str, num_tasks: int) -> np.ndarray:
        """Positions on the x axis of evaluations of `num_tasks` tasks at `steps`. Raises UsageError."""
        if x == "steps":
            return np.array(steps)
        if self.learning_starts is None:
            raise UsageError(f"{next(iter(self.files.values()))} has no args.json beside it, which says how many "
                             "updates a step has: give run directories, or --x steps.")
        networks = num_tasks if self.single else 1
        return np.maximum(0, np.array(steps) - self.learning_starts) * self.updates_per_step * networks


# --------------------------------------------------------------------------------------------------------- reading


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.csv, packed or not; of a last one that was cut short what can be read. Raises UsageError."""
    rows: list[dict] = []
    cut, fate = False, "is used, though its value may be cut short too"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
            lines = file.readlines()
        reader = csv.DictReader(lines)
        for row in reader:
            cut = reader.line_num == len(lines) and not lines[-1].endswith("\n")
            rows.append({"exp_name": row["exp_name"], "env_name": row["env_name"], "seed": int(row["seed"] or ""),
                         "metric": row["metric"], "env_step": int(row["env_step"] or ""),
                         "value": float(row["value"] or "")})
            if not 0 <= rows[-1]["env_step"] < 2**63:
                raise ValueError(f"a step of {row['env_step']}")
    except (OSError, EOFError, LookupError, ValueError, csv.Error) as error:
        if not (cut and isinstance(error, ValueError)):
            raise UsageError(f"{path} cannot be read (row {len(rows) + 1}: {error}): give run directories or their "
                             "metrics.csv, as a run has written it.") from None
        fate = "is left out"
    if cut:
        print(f"{path} ends within a line, which {fate}: {lines[-1]}", file=sys.stderr)
    return [row for row in rows if row["env_name"] != "mean"]


def read_facts(path: Path) -> dict[str, Any]:
    """The args.json of a run's CSV file, empty where there is none. Raises UsageError."""
    if path.parent.name == "diagnostics":
        path = path.parent
    try:
        facts = json.loads((path.parent / "args.json").read_text())
        for name in ("tasks", "total_steps", "learning_starts", "updates_per_step"):
            if not isinstance(facts[name], list if name == "tasks" else int):
                raise ValueError(f"{name}: {facts[name]}")
        return facts
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{path.parent / 'args.json'} is not that of a run ({error!r}): leave that directory out, or "
                         "give its metrics.csv in a folder without args.json.") from None


def settings_of(facts: dict[str, Any]) -> dict[str, str]:
    """The arguments among a run's `facts` that make up the method."""
    facts = facts | {name: Path(str(facts[name])).name for name in ("program", "agent") if facts.get(name)}
    for name, value in list(facts.items()):
        if isinstance(value, dict):  # transfer.py's own arguments
            more = facts.pop(name)
            facts |= {f"{name}.{inner}": of_inner for inner, of_inner in more.items() if inner not in facts}
    if "tasks" in facts:
        if not any(map(suites.metaworld.owns, facts["tasks"])):
            facts["goals"] = None  # "fresh", but there are none to freeze
        facts["tasks"] = "one each" if len(facts["tasks"]) == 1 else ",".join(map(str, facts["tasks"]))
    return {name: str(value) for name, value in facts.items()
            if value is not None and not {name.split(".")[0], name.split(".")[-1]} & FREE}


def read_methods(paths: Sequence[Path], metric: str) -> dict[str, Method]:
    """The methods whose runs are under `paths`, by name. Raises UsageError."""
    file_name = "metrics.csv" if metric in ("score", "success", "return") else "diagnostics.csv"
    for path in paths:
        if not path.exists():
            raise UsageError(f"There is no {path}: give run directories or their {file_name}.")
    files = {file.resolve(): file for path in paths
             for file in (sorted(path.rglob(file_name)) if path.is_dir() else [path])}
    runs: dict[str, list] = {}  # by exp_name
    without: list[Path] = []
    for file in files.values():
        rows = [row for row in read_rows(file) if row["metric"] == metric]
        without += [] if rows else [file]
        if wrong := [row for row in rows if not math.isfinite(row["value"])]:
            print(f"{file} is not finite on {wrong[0]['env_name']} at step {wrong[0]['env_step']:,}, and {len(wrong) - 1} "
                  "times more; nor are the means that these are in.", file=sys.stderr)
        for name in dict.fromkeys(row["exp_name"] for row in rows):
            of_name = [row for row in rows if row["exp_name"] == name]
            runs.setdefault(name, []).append((file, of_name, read_facts(file)))
    methods: dict[str, Method] = {}
    for name, of_name in runs.items():
        settings = [settings_of(facts) for *_, facts in of_name]
        known = [of_run for of_run in settings if of_run]
        differs = [key for key in sorted(set().union(*known))
                   if len({of_run.get(key) for of_run in known if key in of_run or key != "goals"}) > 1]
        for (file, rows, facts), of_run in zip(of_name, settings, strict=True):
            suffix = ", ".join(f"{key} {of_run.get(key, 'unset')}" for key in differs)
            if known and not of_run:
                suffix = "no args.json"
            method = methods.setdefault(f"{name} ({suffix})" if suffix else name, Method())
            method.add(file, rows)
            if facts:
                for task in {row["env_name"] for row in rows}:
                    method.total_steps[task] = max(facts["total_steps"], method.total_steps.get(task, 0))
                method.learning_starts = 0 if "updates" in facts else facts["learning_starts"]  # offline.py's are updates
                method.updates_per_step = facts["updates_per_step"]
                method.single = len(facts["tasks"]) == 1
    if methods and without:
        print(f"Without any evaluation of '{metric}', and left out: {', '.join(map(str, without))}", file=sys.stderr)
    if paths and not methods:
        raise UsageError(f"{', '.join(map(str, paths))} has no evaluation of '{metric}' yet: give the directories of "
                         + ("runs after their first one, or another --metric." if file_name == "metrics.csv"
                            else "runs that diagnose.py was run on."))
    return methods


def read_official(names: Sequence[str], metric: str) -> dict[str, Method]:
    """The authors' curves called `names`. Raises UsageError."""
    rows = read_rows(OFFICIAL) if names else []
    methods: dict[str, Method] = {}
    for name in names:
        known = dict.fromkeys(row["exp_name"].removeprefix("authors-") for row in rows)
        if name not in known:
            raise UsageError(f"No curves of the authors are called '{name}': the names are {', '.join(known)}.")
        method = Method(official=True, learning_starts=5000, single=name == "cpu" or name.endswith("-single"))
        methods[f"authors, {name}"] = method
        for row in rows:
            if row["exp_name"] == f"authors-{name}" and metric in (row["metric"], "score"):
                if metric == "score":
                    row = row | {"value": suites.score(row["env_name"], row["value"], row["value"])}
                method.add(OFFICIAL, [row])
        if not method.curves:
            raise UsageError(f"The authors' curves '{name}' have no {metric}: give --metric score.")
    return methods


def is_table(path: Path) -> bool:
    """Whether a file is a table of --csv."""
    with open(path, errors="replace") as file:
        return file.readline().startswith("task,method,")


def is_map(path: Path) -> bool:
    """Whether a CSV file is an embedding_map.csv, and neither a metrics.csv nor a table of --csv."""
    with open(path, errors="replace") as file:
        return file.readline().startswith("task,") and not is_table(path)


def read_map(path: Path) -> tuple[list[str], list[str], list[list[float]]]:
    """New tasks, pretrained embeddings, and the scores of each of these on each of those. Raises UsageError."""
    with open(path, newline="", errors="replace") as file:
        (_, *embeddings), *rows = csv.reader(file)
    try:
        scores = [[float(value) for value in values] for _, *values in rows]
    except ValueError:
        scores = []
    if not scores or {len(values) for values in scores} != {len(embeddings)}:
        raise UsageError(f"{path} is no complete embedding_map.csv: give one that transfer.py --full-map has written.")
    return [task for task, *_ in rows], embeddings, scores


# ------------------------------------------------------------------------------------------------------ statistics


def matrix(tasks: dict[str, dict[int, dict[int, float]]]) -> tuple[list[int], np.ndarray]:
    """The steps and seeds that all tasks share, as steps and values [seeds, tasks, steps]."""
    seeds = sorted(set.intersection(*(set(runs) for runs in tasks.values())))
    steps = sorted(set.intersection(*(set(runs[seed]) for runs in tasks.values() for seed in seeds or runs)))
    return steps, np.array([[[tasks[task][seed][step] for step in steps] for task in tasks] for seed in seeds])


def interval(values: np.ndarray, reps: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds and strata of values [seeds, strata, steps], and their 95 % intervals [2, steps]."""
    from rliable import library

    if len(values) == 1:  # one seed says nothing about others
        mean = values.mean((0, 1))
        return mean, np.stack([mean, mean])
    np.random.seed(0)  # rliable draws from the global generator, whatever random_state it is given
    means, intervals = library.get_interval_estimates({"": values}, lambda scores: scores.mean((0, 1)), reps=reps)
    return means[""], intervals[""]


def first_reached(tasks: dict[str, dict[int, dict[int, float]]], threshold: float) -> list[tuple[int, bool]]:
    """Per seed of all tasks, the first step with a mean over tasks of `threshold` and True, or its last and False."""
    reached = []
    for seed in sorted(set.intersection(*(set(runs) for runs in tasks.values()))):
        steps, values = matrix({task: {seed: runs[seed]} for task, runs in tasks.items()})
        there = [step for step, value in zip(steps, values.mean((0, 1)), strict=True) if value >= threshold]
        reached.append((there[0], True) if there else (steps[-1], False))
    return reached


def left_out(tasks: dict[str, dict[int, dict[int, float]]], num_steps: int, num_seeds: int) -> str:
    """In words, what `tasks` have beyond the steps and seeds that all of them share; empty if nothing."""
    seeds = set().union(*tasks.values())
    steps = set().union(*(curve for runs in tasks.values() for curve in runs.values()))
    return " and ".join(filter(None, (
        f"{num_seeds} of {len(seeds)} seeds, as others lack a task" if num_seeds < len(seeds) else "",
        f"{num_steps} of {len(steps)} steps, as not all seeds have the others" if num_steps < len(steps) else "")))


class Result(NamedTuple):
    """A method in a panel."""

    steps: list[int]
    averaged: list[int]  # steps of the mean of all evaluations
    x: np.ndarray
    mean: np.ndarray  # [steps]
    low: np.ndarray
    high: np.ndarray
    rows: list[dict]  # of the table, one per share


def evaluate(args: Args, panel: str, name: str, method: Method, tasks: Sequence[str]) -> Result | None:
    curves = {task: method.curves[task] for task in tasks}
    steps, values = matrix(curves)
    if not steps or not len(values):
        print(f"{name} has no seed or no step in common on {panel}: left out there.", file=sys.stderr)
        return None
    strata = values if method.single else values.mean(1, keepdims=True)
    mean, (low, high) = interval(strata, args.reps)
    if cut := left_out(curves, len(steps), len(values)):
        print(f"{name} on {panel}: only {cut}.", file=sys.stderr)
    within = np.searchsorted(steps, args.budget or steps[-1], "right")
    overall = {}
    if within:
        average, (average_low, average_high) = interval(strata[..., :within].mean(-1, keepdims=True), args.reps)
        overall = {"mean": average[0], "mean_low": average_low[0], "mean_high": average_high[0]}
    else:
        print(f"{name} on {panel}: no evaluation by step {args.budget:,}, and so no mean.", file=sys.stderr)
    budgets, rows = sorted({args.budget or method.total_steps.get(task, steps[-1]) for task in tasks}), []
    if len(budgets) > 1:
        print(f"{name} on {panel}: no shares of a budget, as its tasks have from {budgets[0]:,} to {budgets[-1]:,} "
              "steps: give --budget, or --tasks of one suite.", file=sys.stderr)
    reached = {} if args.threshold is None else {"reached": first_reached(curves, args.threshold)}
    for share in args.at:
        step = round(share * budgets[0])
        row = {"task": panel, "method": name, "seeds": len(values), "at": share}
        if len(budgets) == 1 and steps[0] <= step <= steps[-1]:
            last = np.searchsorted(steps, step, "right") - 1
            row |= {"env_step": steps[last], "value": mean[last], "low": low[last], "high": high[last]}
        rows.append(row | overall | reached)
    return Result(steps, steps[:within], method.x_of(steps, args.x, len(tasks)), mean, low, high, rows)


def panels(args: Args, methods: dict[str, Method]) -> dict[str, list[str]]:
    """Panel -> its tasks: one per task of the runs, for the mean over those that all methods ran, and for spreads."""
    own = [method for method in methods.values() if not method.official] or list(methods.values())
    known = list(dict.fromkeys(task for method in own for task in method.curves))
    tasks = [task for task in known if task not in SPREAD]
    if missing := [task for task in args.tasks or () if task not in tasks]:
        raise UsageError(f"No run is of task '{missing[0]}': the tasks are {', '.join(tasks)}.")
    tasks = list(dict.fromkeys(args.tasks or tasks))
    shared = [task for task in tasks if all(task in method.curves for method in methods.values())]
    if args.mean_only and not shared:
        raise UsageError("No task is in all of these methods, so there is no mean to compare: leave --mean-only out.")
    if len(shared) < 2 <= len(tasks) and not args.mean_only:
        print(f"No mean over tasks, as all methods have {' and '.join(shared) or 'none'} in common.", file=sys.stderr)
    mean = {f"mean of {len(shared)} tasks": shared} if len(shared) > 1 or args.mean_only else {}
    spread = {} if args.tasks else {f"{name} of tasks": [name] for name in SPREAD if name in known}
    return ({} if args.mean_only else {task: [task] for task in tasks}) | mean | spread


def say_what_differs(results: dict[str, dict[str, Result]]) -> None:
    """Names means of all evaluations that are not of the same ones."""
    for panel, of_panel in results.items():
        spans = {name: result.averaged for name, result in of_panel.items() if result.averaged}
        if any(steps != next(iter(spans.values())) for steps in spans.values()):
            spans = [f"{name}: {len(steps)} from {steps[0]:,} to {steps[-1]:,}" for name, steps in spans.items()]
            print(f"The means of all evaluations are not of the same steps, as on {panel} ({'; '.join(spans)}).",
                  file=sys.stderr)
            return


# ---------------------------------------------------------------------------------------------------------- output


def draw(args: Args, results: dict[str, dict[str, Result]], methods: dict[str, Method]) -> None:
    """The figure: a grid of panels, a line with its interval per method, dashed for the authors'."""
    plt = pyplot()
    from matplotlib.ticker import EngFormatter
    columns = min(args.columns, len(results))
    rows = -(-len(results) // columns)
    legend_columns = min(4, columns)
    height = 0.4 + 2.4 * rows + 0.2 * -(-len(methods) // legend_columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.5 + 3.2 * columns, height), squeeze=False,
                                sharey=args.metric in ("score", "success", "conflict_share"), layout="constrained")
    palette = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors
    if len(methods) > len(palette):
        palette = plt.get_cmap("turbo")(np.linspace(0, 1, len(methods)))
    colors = dict(zip(methods, palette, strict=False))
    for ax, (panel, of_panel) in zip(axes.flat, results.items()):
        for name, result in of_panel.items():
            if len(result.steps) > 1:
                ax.plot(result.x, result.mean, "--" if methods[name].official else "-", color=colors[name], label=name)
                ax.fill_between(result.x, result.low, result.high, color=colors[name], alpha=0.2, linewidth=0)
            else:
                ax.errorbar(result.x, result.mean, [result.mean - result.low, result.high - result.mean],
                            color=colors[name], label=name, marker="o", capsize=3)
        if own := [result.x[-1] for name, result in of_panel.items() if not methods[name].official]:
            ax.set_xlim(-0.04 * max(*own, 1), 1.04 * max(*own, 1))
        if args.metric in ("td_loss", "gradient_norm") and not panel.startswith("relative"):
            ax.set_yscale("log")
        ax.set_title(panel)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(results):]:
        ax.set_axis_off()
    for column in range(columns):
        axes[(len(results) - 1 - column) // columns, column].set_xlabel({
            "steps": "environment steps", "updates": "gradient updates"}[args.x])
    for ax in axes[:, 0]:
        ax.set_ylabel(args.metric)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    names = [name.replace("$", r"\$") for name in handles]  # no formula
    figure.legend(handles.values(), names, loc="outside lower center", ncols=legend_columns, fontsize="small")
    save(figure, args.out)


def draw_map(path: Path, tasks: Sequence[str], embeddings: Sequence[str], scores: Sequence[Sequence[float]]) -> None:
    """A heat map, a row per new task and a column per pretrained embedding (the paper's Figure 24)."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(2 + 0.3 * len(embeddings), 2 + 0.3 * len(tasks)), layout="constrained")
    image = axes.imshow(scores, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(embeddings)), embeddings, rotation=90)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("embedding of the pretraining task")
    figure.colorbar(image, label="score on the new task")
    save(figure, path)


def embedding_map(root: Path, folders: dict[str, Path], embeddings: Sequence[str]) -> None:
    """Table and heat map of transfer.py's trials, which lie in a folder per new task."""
    scores = []
    for folder in folders.values():
        with open(folder / "candidates.csv", newline="") as file:
            trials = {row["embedding"]: float(row["score"]) for row in csv.DictReader(file)}
        scores.append([trials[name] for name in embeddings])
    with writing(root / "embedding_map.csv"), open(root / "embedding_map.csv", "w", newline="") as file:
        rows = [[task, *row] for task, row in zip(folders, scores, strict=True)]
        csv.writer(file, lineterminator="\n").writerows([["task", *embeddings], *rows])
    draw_map(root / "embedding_map.png", list(folders), embeddings, scores)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunError where writing fails."""
    try:
        yield
    except OSError as error:
        raise harness.RunError(f"{path} cannot be written ({error.strerror}).") from None


def save(figure: Any, path: Path) -> None:
    """As a PNG of 255 colours, a third of the bytes; other formats as they are. Raises RunError."""
    with writing(path):
        figure.savefig(path, dpi=90)
        if path.suffix == ".png":
            from PIL import Image

            with Image.open(path) as image:
                image.convert("RGB").quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    pyplot().close(figure)
    print(f"Drawn: {path}", file=sys.stderr)


def table(args: Args, rows: list[list[dict]]) -> str:
    """The results in Markdown: a line per task and method, a column per share of the budget."""
    header = ["task", "method", "seeds", *(f"at {share:g} of the budget (steps)" for share in args.at),
              "mean of all evaluations"]
    header += [f"steps to {args.threshold:g}: median, seeds"] if args.threshold is not None else []
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]

    def between(value: float, low: float, high: float, seeds: int) -> str:
        return f"{value:.3f} [{low:.3f}, {high:.3f}]" if seeds > 1 else f"{value:.3f}"

    for shares in rows:
        first = shares[0]
        cells = [first["task"], first["method"].replace("|", r"\|"), str(first["seeds"])]
        cells += [f"{between(row['value'], row['low'], row['high'], row['seeds'])} ({row['env_step']:,})"
                  if "value" in row else "" for row in shares]
        cells.append(between(first["mean"], first["mean_low"], first["mean_high"], first["seeds"])
                     if "mean" in first else "")
        if "reached" in first:
            times = [step if there else math.inf for step, there in first["reached"]]
            median = statistics.median(times)
            cells.append(f"{'not reached' if median == math.inf else f'{median:,.0f}'}, "
                         f"{sum(map(math.isfinite, times))} of {len(times)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[list[dict]]) -> None:
    """The table, a row per task, method and share. Raises RunError."""
    flat = [{name: f"{value:.3f}" if isinstance(value, float) and name != "at" else value
             for name, value in row.items()} for shares in rows for row in shares]
    for row in flat:
        if "reached" in row:
            row["reached"] = " ".join(str(step) if there else f">{step}" for step, there in row["reached"])
    with writing(path), open(path, "w", newline="") as file:
        columns = "task,method,seeds,at,env_step,value,low,high,mean,mean_low,mean_high".split(",")
        writer = csv.DictWriter(file, columns + ["reached"] * ("reached" in flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def check(args: Args) -> None:
    """Raises UsageError for arguments that no figure or table can be made with."""
    harness.check_range(args, 1, float("inf"), "budget", "columns", "reps")
    if not args.at or not all(0 < share <= 1 for share in args.at):
        raise UsageError(f"--at is {' '.join(map(str, args.at)) or 'empty'}: give shares of the budget from above 0 "
                         "to 1.")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise UsageError(f"--threshold is {args.threshold}: give a number.")
    for path in filter(None, (args.out, args.csv)):
        if os.path.isdir(path) or not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written: give a file in a folder that exists and is yours.")
    if args.csv and args.csv.is_file() and args.csv.stat().st_size and not is_table(args.csv):
        raise UsageError(f"--csv {args.csv} is there, and no table of this script: give another name to write to.")
    if args.csv and args.csv.resolve() == args.out.resolve():
        raise UsageError(f"--csv and --out are both {args.out}: give two names.")
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--out is {args.out}: give a name that ends in .png, .pdf or .svg.")


def main(args: Args | None = None) -> None:
    args = args or tyro.cli(Args, description=__doc__.split("\n\n")[0])
    check(args)
    maps = [path for path in args.runs if path.suffix == ".csv" and path.is_file() and is_map(path)]
    if maps and (len(args.runs) > 1 or args.official or args.csv):
        raise UsageError(f"{maps[0]} is a map of embeddings: give it alone, with --out.")
    if maps:
        return draw_map(args.out, *read_map(maps[0]))
    if not args.runs and not args.official:
        raise UsageError("Nothing to draw: give run directories, --official, or both.")
    methods = read_methods(args.runs, args.metric) | read_official(args.official, args.metric)
    if args.out.resolve() in {file.resolve() for method in methods.values() for file in method.files.values()}:
        raise UsageError(f"{args.out} is a file of these runs: give another name to write to.")
    for flag in ("methods", "single"):
        for name in getattr(args, flag) or ():
            if name not in methods:
                raise UsageError(f"--{flag} {name} is none of the methods: they are {', '.join(methods)}.")
    for name in args.single:
        methods[name].single = True
    methods = {name: methods[name] for name in args.methods or methods}
    results: dict[str, dict[str, Result]] = {}
    tasks_of = panels(args, methods)
    names_of = {panel: [name for name, method in methods.items() if all(task in method.curves for task in tasks)]
                for panel, tasks in tasks_of.items()}
    if absent := [name for name in methods if not any(name in names for names in names_of.values())]:
        print(f"Not drawn, having none of these tasks: {', '.join(absent)}.", file=sys.stderr)
    for panel, names in names_of.items():
        here = {name: evaluate(args, panel, name, methods[name], tasks_of[panel]) for name in names}
        results[panel] = {name: result for name, result in here.items() if result}
    say_what_differs(results)
    rows = [result.rows for of_panel in results.values() for result in of_panel.values()]
    if not rows:
        raise UsageError("No method has a step that all of its seeds share: give runs that have been evaluated alike.")
    if args.csv:
        write_csv(args.csv, rows)
    print(table(args, rows))
    draw(args, results, methods)


if __name__ == "__main__":
    harness.exit_on_error(main)
