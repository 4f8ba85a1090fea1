"""Two processes of torchrun on a CPU: they make the update of one process, stop, go on and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

import brc_sac
import devices
import harness
from conftest import ROOT, SMALL, Program, at_step, checkpoint

TASKS = ("cartpole-swingup", "reacher-easy", "ball_in_cup-catch")
SIZES = dict(width=16, actor_width=16, batch_size=32, embedding_norm="l1")


def make_batch(tasks: list[int], seed: int = 0) -> tuple[brc_sac.Batch, torch.Tensor, torch.Tensor]:
    """A batch of as many samples as there are tasks in the list, of observations [5] and actions [2]; and its noise."""
    rng = torch.Generator().manual_seed(seed)
    count = len(tasks)
    batch = brc_sac.Batch(
        obs=torch.randn(count, 5, generator=rng), action=torch.rand(count, 2, generator=rng) * 2 - 1,
        reward=torch.randn(count, generator=rng), terminated=(torch.rand(count, generator=rng) < 0.2).float(),
        next_obs=torch.randn(count, 5, generator=rng), task_id=torch.tensor(tasks))
    return batch, *torch.randn(2, count, 2, generator=rng)


def make_agent(num_tasks: int) -> brc_sac.Agent:
    torch.manual_seed(0)
    return brc_sac.Agent(brc_sac.Args(compile=False, **brc_sac.PAPER | SIZES), 5, 2, num_tasks)


def gradients(agent: brc_sac.Agent) -> torch.Tensor:
    parameters = [*agent.critic.parameters(), *agent.actor.parameters(), agent.log_temperature]
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


def update_as_rank(rank: int, port: int, tasks: list[int], num_tasks: int, folder: str) -> None:
    """Makes three updates of this rank's part of the batch; saves the first's gradients and the last's parameters."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    devices.join()
    agent = make_agent(num_tasks)
    agent.share = len(range(rank, num_tasks, 2)) / num_tasks
    result = {}
    for number in range(3):
        batch, next_noise, noise = make_batch(tasks, number)
        own = batch.task_id % 2 == rank
        agent.update(brc_sac.Batch(*(field[own] for field in batch)), next_noise[own], noise[own])
        result.setdefault("gradients", gradients(agent))
    result["parameters"] = torch.cat([p.detach().flatten() for p in [*agent.critic.parameters(),
                                      *agent.target.parameters(), *agent.actor.parameters(), agent.log_temperature]])
    torch.save(result, f"{folder}/{rank}.pt")


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("num_tasks", [4, 3])
def test_ranks_add_up_to_one_process(tmp_path, num_tasks):
    """Gradients on a batch in which every task has its share; uneven counts of tasks weigh right."""
    tasks = sorted(list(range(num_tasks)) * 8)
    multiprocessing.start_processes(update_as_rank, (free_port(), tasks, num_tasks, str(tmp_path)), nprocs=2,
                                    start_method="fork")
    alone = make_agent(num_tasks)  # after the forks, which a backward on a machine with a GPU would break
    alone.update(*make_batch(tasks))
    expected = gradients(alone)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (first["gradients"] - expected).norm() < 1e-6 * expected.norm()
    assert torch.equal(first["parameters"], second["parameters"])
    embedding = make_agent(num_tasks).critic.embedding.weight
    moved = first["parameters"][:embedding.numel()].view_as(embedding) != embedding
    assert moved.any(1).all()  # the rows of both ranks' tasks


def test_trajectories_do_not_depend_on_the_number_of_ranks():
    def rollout(rank: int, size: int) -> np.ndarray:
        envs = brc_sac.VectorEnv(TASKS[rank::size], 0, pad_to=(8, 2), rows=range(rank, len(TASKS), size))
        obs = [envs.reset(seed=5)]
        for step in range(20):
            action = np.random.default_rng(step).uniform(-1, 1, (len(TASKS), 2)).astype(np.float32)
            obs.append(envs.step(action[rank::size]).obs)
        envs.close()
        return np.stack(obs, axis=1)

    together = rollout(0, 1)
    for rank in range(2):
        np.testing.assert_array_equal(rollout(rank, 2), together[rank::2])


class Ranks:
    """Forked processes with the environment that torchrun gives its own, on toy tasks, each with output of its own."""

    def __init__(self, sac: Program, size: int):
        self.programs = [Program(sac.module, sac.folder / f"rank{rank}") for rank in range(size)]
        for program in self.programs:
            program.folder.mkdir(exist_ok=True)

    def run(self, arguments: str, prepare: Callable[[int], object] = lambda rank: None) -> list[int]:
        """Their exit codes, or minus the signals that ended them."""
        def as_rank(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            prepare(rank)

        size, port = str(len(self.programs)), str(free_port())
        started = [program.start(arguments, partial(as_rank, rank)) for rank, program in enumerate(self.programs)]
        return [program.wait(process) for program, process in zip(self.programs, started, strict=True)]


def test_a_signal_to_one_rank_stops_all_and_they_go_on_together(sac):
    run_dir, ranks = sac.folder / "run", Ranks(sac, 2)
    codes = ranks.run(f"{SMALL['brc_sac']} --run-dir {run_dir}",
                      lambda rank: rank and at_step(45, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    first, second = ranks.programs
    assert codes == [128 + signal.SIGTERM] * 2, second.err
    assert "Stopped by SIGTERM" in first.err and "torchrun --nproc-per-node 2 brc_sac.py --resume" in first.err
    assert checkpoint(run_dir)["env_step"] == checkpoint(run_dir / "rank1")["env_step"] > 40
    assert json.loads((run_dir / "args.json").read_text())["ranks"] == 2
    assert "is a run of 2 processes" in sac.refused(f"--resume {run_dir}")
    (run_dir / "rank1/checkpoint.pt").unlink()  # then both take the one before
    assert ranks.run(f"--resume {run_dir}") == [0, 0], second.err
    assert json.loads((run_dir / "args.json").read_text())["resumed"][-1]["env_step"] == 40
    assert ranks.run(f"--evaluate {run_dir}", cannot_meet) == [2, 2] and "--evaluate takes one process" in second.err
    rows = [row.rsplit(",", 1)[0] for row in (run_dir / "metrics.csv").read_text().splitlines()[1:]]
    metrics, evaluations = ("return", "success", "score"), (20, 40, 60, 80)
    assert len(rows) == len(set(rows)) == len(metrics) * len(evaluations) * 3


def test_an_environment_that_fails_on_one_rank_leaves_all_of_them_at_one_checkpoint(sac):
    def fail(*_):
        raise brc_sac.EnvError("Task 'b' failed.")

    run_dir, ranks = sac.folder / "run", Ranks(sac, 2)
    codes = ranks.run(f"{SMALL['brc_sac']} --run-dir {run_dir}", lambda rank: rank and at_step(45, fail))
    failed = ranks.programs[1]
    assert codes[1] == 1 and codes[0], failed.err
    assert re.search(r"Task 'b' failed.(?s:.*)Stopped at step 4\d. To go on: torchrun", failed.err)
    assert checkpoint(run_dir)["env_step"] == checkpoint(run_dir / "rank1")["env_step"] == 40


def test_the_command_that_goes_on_names_the_nodes(monkeypatch):
    monkeypatch.setattr(harness.signal, "signal", lambda *_: None)
    for local, size, launcher in (("2", "6", "torchrun --nnodes 3 --nproc-per-node 2"), ("2", "2", "torchrun --nproc")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert harness.Run(brc_sac.Args(run_dir="x", exp_name="x")).go_on.startswith(launcher)


def test_the_death_of_a_rank_ends_the_other(sac):
    first, second = Ranks(sac, 2).run(f"{SMALL['brc_sac']} --run-dir {sac.folder / 'run'}", lambda rank: rank and
                                      at_step(45, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert first > 0 and second == -signal.SIGKILL
    assert checkpoint(sac.folder / "run")["env_step"] == 40


def cannot_meet(rank: int) -> None:
    """What is refused is refused without the other ranks, of which one may have ended before the rest have met it."""
    devices.join = None


def test_more_processes_than_tasks_are_refused(sac):
    ranks = Ranks(sac, 3)
    assert ranks.run(f"{SMALL['brc_sac']} --run-dir {sac.folder / 'run'}", cannot_meet) == [2, 2, 2]
    assert "torchrun has started 3 processes for 2 tasks" in "".join(rank.err for rank in ranks.programs)
    assert not (sac.folder / "run").exists()


def test_a_directory_that_is_taken_is_refused_by_all(sac):
    run_dir, ranks = sac.folder / "run", Ranks(sac, 2)
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    assert ranks.run(f"{SMALL['brc_sac']} --run-dir {run_dir}", cannot_meet) == [2, 2]
    assert "already holds files" in ranks.programs[1].err and len(list(run_dir.iterdir())) == 1


def processes(run_dir: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in entry.read_bytes() and b"torch.distributed" not in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            pass
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_itself_ends_with_a_rank_that_is_told_to_stop_or_dies(tmp_path, number):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), ROOT / "brc_sac.py", "--tasks", *TASKS, "--width", "16", "--actor-width", "16",
               "--batch-size", "24", "--total-steps", "100000", "--learning-starts", "20", "--eval-interval", "100000",
               "--checkpoint-interval", "20", "--workers", "0", "--no-compile", "--run-dir", run_dir]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    while not (run_dir / "checkpoint.pt").exists() or not (run_dir / "rank1/checkpoint.pt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.kill(processes(run_dir)[-1], number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode and not processes(run_dir)
    if number == signal.SIGKILL:
        assert "rank" in output and "-9" in output
    else:
        assert f"To go on: torchrun --nproc-per-node 2 {ROOT / 'brc_sac.py'} --resume {run_dir}" in output
        step, other = (checkpoint(folder)["env_step"] for folder in (run_dir, run_dir / "rank1"))
        assert step == other
