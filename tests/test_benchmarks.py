"""The benchmark scripts: what they count, what they write, and what they refuse. No test looks at a time."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import brc_sac
from benchmarks import curves, throughput

BENCHMARKS = Path(throughput.__file__).parent
PEAKS = throughput.Peaks(1e12, 1e10)


@pytest.fixture
def small(monkeypatch):
    """Peaks at once, in place of seconds of measuring them."""
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, precision: PEAKS.flops_per_s)
    monkeypatch.setattr(throughput, "copy_bandwidth", lambda device: PEAKS.bytes_per_s)
    return dict(num_tasks=3, batch_size=8, repeats=3, device="cpu", compile=False)


def test_the_floor_is_the_papers_network_by_hand():
    args = throughput.Args()
    learner = throughput.make_learner(args, 256, "fp32", False, False, torch.device("cpu"))
    row = throughput.measure(throughput.Args(repeats=1), learner, PEAKS)
    critic = 2 * (75 * 256 + 4 * 256 * 256 + 256 * 101)  # weights of both: 39 + 4 + 32 in, 101 atoms out
    actor = 71 * 256 + 2 * 256 * 256 + 2 * 256 * 4
    all_of_critic = critic + 2 * (15 * 256 + 101) + 50 * 32  # with biases, norms and the embedding
    all_of_actor = actor + 9 * 256 + 2 * 4
    flops = 2 * 1024 * (6 * critic + 4 * actor)
    moved = 40 * all_of_critic + 28 * all_of_actor
    assert row["gflop"] == pytest.approx(flops / 1e9) and row["gflop"] == pytest.approx(8.8, abs=0.05)
    assert row["floor_ms"] == pytest.approx(1e3 * (flops / PEAKS.flops_per_s + moved / PEAKS.bytes_per_s))
    assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"]) and row["updates"] == 6
    assert row["parameters"] == sum(p.numel() for name in ("critic", "target", "actor")
                                    for p in getattr(learner.agent, name).parameters())


def test_a_case_per_width_and_precision_goes_into_both_files(small, tmp_path, capsys):
    throughput.main(throughput.Args(**small, widths=(16, 24), precisions=("fp32", "bf16"), profile=True,
                                    json=tmp_path / "out.json", csv=tmp_path / "out.csv"))
    rows = json.loads((tmp_path / "out.json").read_text())["updates"]
    assert [(row["precision"], row["width"]) for row in rows] == [(p, w) for p in ("fp32", "bf16") for w in (16, 24)]
    with open(tmp_path / "out.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(rows, table, strict=True):
        assert float(line["ms"]) == pytest.approx(row["ms"], rel=1e-3)
        assert all(line[name] for name in ("hardware", "torch", "python", "date", "command", "Polyak ms"))
    printed = capsys.readouterr().out
    for part in ("sampling", "target", "critic forward", "critic backward", "AdamW", "Polyak", "actor forward"):
        assert printed.count(part) >= 4


def test_the_loop_steps_real_environments_and_says_who_waits(small, tmp_path):
    small |= dict(widths=(16,), precisions=("fp32",), loop="demo", loop_steps=10, workers=0)
    throughput.main(throughput.Args(**small, csv=tmp_path / "loop.csv"))
    with open(tmp_path / "loop.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    step = float(row["ms_step"])
    waiting = float(row["ms_host_wait_for_environments"]) > 0.1 * step
    assert row["tasks"] == "4" and row["waits"] == ("learner" if waiting else "environments")
    parts = [float(row[f"ms_host_{part}"]) for part in ("act", "update", "wait_for_environments", "store")]
    assert sum(parts) == pytest.approx(step, rel=0.05) and all(parts)
    assert float(row["env_steps_per_s"]) == pytest.approx(4e3 / step, rel=1e-3)


def test_a_transition_takes_less_than_a_third_of_two_float64_observations():
    """39 numbers of observation and 4 of action, as in MetaWorld; the release's replay takes 648 bytes."""
    buffer = brc_sac.ReplayBuffer(10, 39, 4, 1000)
    assert buffer.nbytes / (10 * 1000) <= 0.3 * (2 * 8 * 39 + 4 * (4 + 1 + 1))


def run(*command):
    process = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=120)
    return process.returncode, process.stderr.strip()


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "metrics.csv").write_text(brc_sac.Logger.COLUMNS + "\n")
    for command, message in (
            ([sys.executable, BENCHMARKS / "throughput.py", "--cuda-graph", "True", "--device", "cpu"], "NVIDIA GPU"),
            ([sys.executable, BENCHMARKS / "curves.py", "--runs", tmp_path / "metrics.csv"], "no evaluation yet"),
            ([sys.executable, BENCHMARKS / "curves.py", "--runs", tmp_path / "none.csv"], "No such file"),
            (["bash", BENCHMARKS / "gpu_day.sh", "dance", tmp_path], "unknown piece 'dance'"),
            (["bash", BENCHMARKS / "gpu_day.sh"], "give a piece")):
        code, error = run(*map(str, command))
        assert code == 2 and message in error and "\n" not in error


def test_curves_of_two_runs_and_the_authors_stand_side_by_side(tmp_path, capsys):
    rows = [f"a,mean,0,score,{step},{step / 1e6}" for step in (0, 100_000)]
    (tmp_path / "metrics.csv").write_text("\n".join([brc_sac.Logger.COLUMNS, *rows]) + "\n")
    curves.main(curves.Args((tmp_path / "metrics.csv",), "mw"))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["env_step", "a", "seed", "0", "official"]
    assert lines[-1].split()[:2] == ["100000", "0.100"] and len(lines[-1].split()) == 3
