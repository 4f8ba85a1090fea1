"""Transfer against learning from scratch: curves and a table of scores with confidence intervals over seeds.

    python benchmarks/transfer_report.py --runs runs/* --png transfer.png --csv transfer.csv

Takes any runs of transfer.py and groups them by exp_name: a panel per new task and, where there are several, one for
their mean. Intervals are rliable's stratified bootstrap over seeds (Agarwal et al. 2021), 95 %: with three seeds they
show how far the seeds are apart, and no more. Curves are drawn at the steps that all seeds of a method have.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass(frozen=True)
class Args:
    runs: tuple[Path, ...]
    """metrics.csv files, or directories that hold them at any depth."""
    png: Path = Path("transfer.png")
    """Where to draw the curves."""
    csv: Path | None = None
    """Where to write the table, beside printing it."""
    metric: str = "score"
    """Of metrics.csv: score, success or return."""
    reps: int = 2000
    """Bootstrap resamples."""


Curves = dict[str, dict[str, dict[int, dict[int, float]]]]  # method -> task -> seed -> environment step -> value


def read_runs(paths: tuple[Path, ...], metric: str) -> Curves:
    """The curves in all metrics.csv files under `paths`. Raises ValueError if there are none."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"There is no {path}: give run directories of transfer.py.")
    files = sorted({file for path in paths for file in (path.rglob("metrics.csv") if path.is_dir() else [path])})
    curves: Curves = {}
    for path in files:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["metric"] == metric and row["env_name"] != "mean":
                    seeds = curves.setdefault(row["exp_name"], {}).setdefault(row["env_name"], {})
                    seeds.setdefault(int(row["seed"]), {})[int(row["env_step"])] = float(row["value"])
    if not curves:
        raise ValueError(f"No metrics.csv with rows of '{metric}' is under {', '.join(map(str, paths))}: give run "
                         "directories of transfer.py.")
    return curves


def matrix(tasks: dict[str, dict[int, dict[int, float]]]) -> tuple[list[int], np.ndarray]:
    """The steps and seeds that all tasks share, as steps and values [seeds, tasks, steps]."""
    seeds = sorted(set.intersection(*(set(runs) for runs in tasks.values())))
    steps = sorted(set.intersection(*(set(curve) for runs in tasks.values() for curve in runs.values())))
    return steps, np.array([[[tasks[task][seed][step] for step in steps] for task in tasks] for seed in seeds])


def interval(values: np.ndarray, reps: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds and tasks of values [seeds, tasks, steps], and their 95 % intervals [2, steps]."""
    from rliable import library

    if len(values) == 1:  # one seed says nothing about others
        mean = values.mean((0, 1))
        return mean, np.stack([mean, mean])
    np.random.seed(0)  # rliable draws from the global generator, whatever random_state it is given
    means, intervals = library.get_interval_estimates({"": values}, lambda scores: scores.mean((0, 1)), reps=reps)
    return means[""], intervals[""]


def panels(curves: Curves) -> dict[str, dict[str, dict]]:
    """Panel -> method -> its tasks: one panel per task, and one for the mean over the tasks that all methods ran."""
    names = list(dict.fromkeys(task for tasks in curves.values() for task in tasks))
    result = {name: {method: {name: tasks[name]} for method, tasks in curves.items() if name in tasks}
              for name in names}
    shared = [name for name in names if all(name in tasks for tasks in curves.values())]
    if len(shared) > 1:
        result["mean"] = {method: {name: tasks[name] for name in shared} for method, tasks in curves.items()}
    return result


def embedding_map(root: Path, folders: dict[str, Path], embeddings: tuple[str, ...]) -> None:
    """A table and a heat map of transfer.py's trials: a row per new task, a column per pretrained embedding."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = []
    for folder in folders.values():
        with open(folder / "candidates.csv", newline="") as file:
            trials = {row["embedding"]: float(row["score"]) for row in csv.DictReader(file)}
        scores.append([trials[name] for name in embeddings])
    with open(root / "embedding_map.csv", "w", newline="") as file:
        rows = [[task, *row] for task, row in zip(folders, scores, strict=True)]
        csv.writer(file, lineterminator="\n").writerows([["task", *embeddings], *rows])
    figure, axes = plt.subplots(figsize=(2 + 0.3 * len(embeddings), 2 + 0.3 * len(folders)), layout="constrained")
    image = axes.imshow(scores, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(embeddings)), embeddings, rotation=90)
    axes.set_yticks(range(len(folders)), list(folders))
    axes.set_xlabel("embedding of the pretraining task")
    figure.colorbar(image, label="score on the new task")
    figure.savefig(root / "embedding_map.png", dpi=100)
    plt.close(figure)
    print(f"The score of every embedding on every new task is in {root}/embedding_map.csv and .png.")


def main(args: Args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = read_runs(args.runs, args.metric)
    drawn, rows = panels(curves), []
    figure, axes = plt.subplots(1, len(drawn), figsize=(0.5 + 3.2 * len(drawn), 3), squeeze=False, sharey=True,
                                layout="constrained")
    colors = {method: f"C{index}" for index, method in enumerate(curves)}
    for ax, (name, methods) in zip(axes[0], drawn.items(), strict=True):
        for method, tasks in methods.items():
            steps, values = matrix(tasks)
            if not steps:
                continue
            mean, (low, high) = interval(values, args.reps)
            if len(steps) > 1:
                ax.plot(steps, mean, color=colors[method], label=method)
                ax.fill_between(steps, low, high, color=colors[method], alpha=0.2, linewidth=0)
            else:
                ax.errorbar(steps, mean, [mean - low, high - mean], color=colors[method], label=method, marker="o",
                            capsize=3)
            average, (average_low, average_high) = interval(values.mean(-1, keepdims=True), args.reps)
            rows.append([name, method, len(values), steps[-1]] + [f"{value:.3f}" for value in (
                mean[-1], low[-1], high[-1], average[0], average_low[0], average_high[0])])
        ax.set_title(name)
        ax.set_xlabel("steps on the new task")
    axes[0][0].set_ylabel(args.metric)
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(args.png, dpi=90)
    header = ["task", "method", "seeds", "env_step", "last", "last_low", "last_high", "mean", "mean_low", "mean_high"]
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    print("| task | method | seeds | steps | at the end | mean of all evaluations |\n|---|---|---|---|---|---|")
    for task, method, seeds, step, last, last_low, last_high, mean, mean_low, mean_high in rows:
        print(f"| {task} | {method} | {seeds} | {step:,} | {last} [{last_low}, {last_high}] | "
              f"{mean} [{mean_low}, {mean_high}] |")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, OSError, KeyError) as error:
        print(f"transfer_report.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
