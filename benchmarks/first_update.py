"""Seconds from the start of the demo to its first update, with an empty compiler cache and with a full one.

    python benchmarks/first_update.py --csv out.csv
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.throughput import facts_of  # noqa: E402

# The demo up to its first update. Its own arguments, imports, environments and random steps are part of the time.
RUN = """
import os, sys, time
import brc_sac

update = brc_sac.Learner.update_once

def first_update(learner):
    before = time.time()
    update(learner)
    print(before, time.time(), flush=True)
    os._exit(0)

brc_sac.Learner.update_once = first_update
brc_sac.train(brc_sac.resolve(brc_sac.Args(suite="demo", run_dir=sys.argv[1])))
"""


@dataclass(frozen=True)
class Args:
    csv: Path | None = None
    """Also write the results to this file."""


def measure(folder: Path, name: str) -> dict[str, float]:
    """Seconds until the random steps and until the first update are done."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    start = time.time()
    process = subprocess.run([sys.executable, "-c", RUN, str(folder / name)], env=environment, capture_output=True,
                             text=True, check=True)
    before, after = map(float, process.stdout.splitlines()[-1].split())
    return {"random_steps_s": round(before - start, 1), "first_update_s": round(after - start, 1)}


def main(args: Args) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "full"):
            rows.append({"compiler_cache": cache} | measure(Path(folder), cache) | facts_of(torch.device("cpu")))
            print(f"{cache} cache: first update after {rows[-1]['first_update_s']} s", flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([list(rows[0]), *(row.values() for row in rows)])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
