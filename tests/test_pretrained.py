"""pretrained/: small, and of use for what its README says, and for nothing else."""

import dataclasses
import shlex
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
import transfer
from benchmarks import slim
from conftest import ROOT, Program

AGENT = ROOT / "pretrained/mw7"


def run(folder: Path, *words: object) -> tuple[int, str, str]:
    """A script with its arguments in a forked process: its exit code and what it printed on both streams."""
    script, *arguments = map(str, words)
    program = Program({"brc_sac.py": brc_sac, "transfer.py": transfer}[script], folder)
    code = program.run(shlex.join(arguments), lambda: setattr(harness, "PROGRAM", ROOT / script))
    return code, program.out, program.err


def test_it_is_evaluated_and_transferred_from(tmp_path):
    assert sum(path.stat().st_size for path in AGENT.iterdir() if path.is_file()) < 2e6
    code, out, err = run(tmp_path, "brc_sac.py", "--evaluate", AGENT, "--eval-episodes", 1, "--workers", 0, "--device",
                         "cpu")
    assert code == 0, err
    success = {line.split()[0]: float(line.split()[2]) for line in out.splitlines()[2:]}
    assert len(success) == 8 and success["mean"] >= 4 / 7  # seed 0's worst of ten on two processors was 6 / 7
    command = [sys.executable, ROOT / "transfer.py", "embedding", "--checkpoint", AGENT, "--task", "reach-wall",
               "--mode", "zero-shot", "--eval-episodes", "1", "--workers", "0", "--run-dir", tmp_path / "run"]
    transfers = subprocess.run(command, capture_output=True, text=True)  # as the program that a user starts
    assert transfers.returncode == 0 and "starts from the embedding of" in transfers.stdout, transfers.stderr


@pytest.mark.parametrize("command", [
    "brc_sac.py --device cpu --workers 0 --resume {}",
    "transfer.py data --device cpu --task reach-wall --checkpoint {}"])
def test_what_needs_a_replay_says_so(command, tmp_path):
    copy = shutil.copytree(AGENT, tmp_path / "agent")
    code, _, err = run(tmp_path, *shlex.split(command.format(copy)))
    assert code == 2 and "it was saved without its replay" in err, err


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


def test_another_script_is_told_whose_it_is(tmp_path):
    code, _, err = run(tmp_path, "transfer.py", "model", "--resume", AGENT)
    assert code == 2 and "is a run of brc_sac.py" in err, err


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
