"""pretrained/: small, and of use for what its README says, and for nothing else."""

import dataclasses
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import brc_sac
import devices
import harness
from benchmarks import slim

ROOT = Path(brc_sac.__file__).parent
AGENT = ROOT / "pretrained/mw7"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True)


def test_it_is_evaluated_and_transferred_from(tmp_path):
    assert sum(path.stat().st_size for path in AGENT.iterdir() if path.is_file()) < 2e6
    evaluation = run("brc_sac.py", "--evaluate", AGENT, "--eval-episodes", 1, "--workers", 0)
    assert evaluation.returncode == 0, evaluation.stderr
    success = {line.split()[0]: float(line.split()[2]) for line in evaluation.stdout.splitlines()[2:]}
    assert len(success) == 8 and success["mean"] >= 4 / 7  # seed 0's worst of ten on two processors was 6 / 7
    transfer = run("transfer.py", "embedding", "--checkpoint", AGENT, "--task", "reach-wall", "--mode", "zero-shot",
                   "--eval-episodes", 1, "--workers", 0, "--run-dir", tmp_path / "run")
    assert transfer.returncode == 0 and "starts from the embedding of" in transfer.stdout, transfer.stderr


@pytest.mark.parametrize("command", ["brc_sac.py --resume {}", "transfer.py data --task reach-wall --checkpoint {}"])
def test_what_needs_a_replay_says_so(command, tmp_path):
    copy = shutil.copytree(AGENT, tmp_path / "agent")
    script, *arguments = command.format(copy).split()
    process = run(script, *arguments)
    assert process.returncode == 2 and "it was saved without its replay" in process.stderr, process.stderr


def test_a_slim_run_has_the_networks_of_the_whole_one(tmp_path, monkeypatch):
    args = brc_sac.resolve(brc_sac.Args(tasks=("cartpole-swingup", "reacher-easy"), width=16, actor_width=16,
                                        batch_size=16, learning_starts=5, total_steps=10, eval_interval=10,
                                        eval_episodes=1, workers=0, device="cpu", run_dir=str(tmp_path / "run")))
    monkeypatch.setattr(harness, "PROGRAM", ROOT / "brc_sac.py")
    brc_sac.train(args)
    slim.main(slim.Args(tmp_path / "run", tmp_path / "slim"))
    whole, small = (harness.read_checkpoint(tmp_path / name)["agent"] for name in ("run", "slim"))
    assert small["critic_optimizer"]["state"] == {} != whole["critic_optimizer"]["state"]
    for network, source in (("critic", "critic"), ("target", "critic"), ("actor", "actor")):
        assert all(torch.equal(value, whole[source][name]) for name, value in small[network].items()), network
    agent = brc_sac.Agent(args, *small["sizes"])
    agent.load_state_dict(small)
    with pytest.raises(harness.UsageError, match="already holds files"):
        slim.main(slim.Args(tmp_path / "run", tmp_path / "slim"))


def test_another_script_is_told_whose_it_is():
    process = run("transfer.py", "model", "--resume", AGENT)
    assert process.returncode == 2 and "is a run of brc_sac.py" in process.stderr, process.stderr


@pytest.mark.parametrize(("environment", "given", "threads"), [(None, None, 1), ("2", None, None), (None, 3, 3)])
def test_an_evaluation_alone_takes_one_thread_unless_it_is_told(monkeypatch, environment, given, threads):
    """Beside other programs two threads took more than six times as long: they wait for each other at every layer."""
    asked = []
    monkeypatch.setattr(devices, "choose_device", lambda name, number: asked.append(number) or torch.device("cpu"))
    monkeypatch.setattr(brc_sac, "VectorEnv", lambda *inputs, **options: types.SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(brc_sac, "evaluate", lambda *inputs: ([{"return": 0.0, "score": 0.0}] * 7, []))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    args, _ = harness.read_args(AGENT, brc_sac.Args)
    brc_sac.evaluate_run(dataclasses.replace(args, evaluate=str(AGENT), threads=given))
    assert asked == [threads]
