"""Learning curves of runs, side by side, with the authors' next to them.

    python benchmarks/curves.py --runs runs/a/metrics.csv runs/b/metrics.csv
    python benchmarks/curves.py --runs runs/mw/metrics.csv --official mw

Prints the mean score over tasks at every evaluation. benchmarks/results/official.csv holds the authors' curves: mw,
dmc-dogs and dmc-humanoids are means over tasks and five seeds at width 4096; cartpole-swingup and ball_in_cup-catch are
one seed of their code at width 256.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Args:
    runs: tuple[Path, ...]
    """metrics.csv files."""
    official: str | None = None
    """Name in results/official.csv to print in the last column."""


def read_run(path: Path) -> tuple[str, dict[int, float]]:
    """The run's name, and its mean score by environment step per task. Raises ValueError if there is none."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["env_name"] == "mean" and row["metric"] == "score"]
    if not rows:
        raise ValueError(f"{path} has no evaluation yet: give a run's metrics.csv after its first one.")
    return f"{rows[0]['exp_name']} seed {rows[0]['seed']}", {int(row["env_step"]): float(row["value"]) for row in rows}


def read_official(name: str) -> tuple[str, dict[int, float]]:
    """The authors' curve called `name`. Raises ValueError if there is none."""
    with open(Path(__file__).parent / "results" / "official.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = {int(row["env_step"]): float(row["score"]) for row in rows if row["name"] == name}
    if not curve:
        names = ", ".join(dict.fromkeys(row["name"] for row in rows))
        raise ValueError(f"No official curve is called '{name}': the names are {names}.")
    return "official", curve


def main(args: Args) -> None:
    curves = [read_run(path) for path in args.runs]
    if args.official:
        curves.append(read_official(args.official))
    last = max(step for _, curve in curves[: len(args.runs)] for step in curve)
    widths = [max(len(name), 6) for name, _ in curves]
    print("env_step  " + "  ".join(f"{name:>{width}}" for (name, _), width in zip(curves, widths, strict=True)))
    for step in sorted({step for _, curve in curves for step in curve if step <= last}):
        cells = [f"{curve[step]:.3f}" if step in curve else "" for _, curve in curves]
        print(f"{step:>8}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, OSError, KeyError) as error:
        print(f"curves.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
