"""Two processes of torchrun on a CPU: they make the update of one process, stop, go on and end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

import brc_sac
import devices
from conftest import checkpoint

ROOT = Path(brc_sac.__file__).parent
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
    alone = make_agent(num_tasks)
    alone.update(*make_batch(tasks))
    expected = gradients(alone)
    multiprocessing.spawn(update_as_rank, (free_port(), tasks, num_tasks, str(tmp_path)), nprocs=2)
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


def torchrun(*arguments: str, size: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port",
               str(free_port()), str(ROOT / "brc_sac.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def arguments(run_dir: Path, total_steps: int) -> list[str]:
    return ["--tasks", *TASKS, "--width", "16", "--actor-width", "16", "--batch-size", "24", "--total-steps",
            str(total_steps), "--learning-starts", "20", "--eval-interval", "100", "--eval-episodes", "1",
            "--checkpoint-interval", "20", "--workers", "0", "--no-compile", "--run-dir", str(run_dir)]


def processes(run_dir: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in entry.read_bytes() and b"torch.distributed" not in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            pass
    return sorted(found)


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc")
def test_stop_resume_and_death(tmp_path):
    run_dir = tmp_path / "run"
    process = torchrun(*arguments(run_dir, 100_000))
    awaited = run_dir / "checkpoint.pt", run_dir / "rank1/checkpoint.previous.pt"
    wait_for(lambda: all(path.exists() for path in awaited), process)
    os.kill(processes(run_dir)[-1], signal.SIGTERM)  # one of the ranks alone
    output, _ = process.communicate(timeout=120)
    assert "Stopped by SIGTERM" in output and f"torchrun --nproc-per-node 2 {ROOT / 'brc_sac.py'} --resume" in output
    step, other = (checkpoint(folder)["env_step"] for folder in (run_dir, run_dir / "rank1"))
    assert step == other and not processes(run_dir)
    assert json.loads((run_dir / "args.json").read_text())["ranks"] == 2

    alone = subprocess.run([sys.executable, str(ROOT / "brc_sac.py"), "--resume", str(run_dir)], capture_output=True,
                           text=True, cwd=ROOT)
    assert alone.returncode == 2 and "is a run of 2 processes" in alone.stderr

    (run_dir / "rank1/checkpoint.pt").unlink()  # then both take the one before
    previous = checkpoint(run_dir / "rank1", "checkpoint.previous.pt")["env_step"]
    last = (previous // 100 + 1) * 100
    process = torchrun("--resume", str(run_dir), "--total-steps", str(last))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert json.loads((run_dir / "args.json").read_text())["resumed"][-1]["env_step"] == previous
    rows = (run_dir / "metrics.csv").read_text().splitlines()[1:]
    assert len(rows) == len(set(row.rsplit(",", 1)[0] for row in rows))
    assert sum(f",{last}," in row for row in rows) == 2 * (len(TASKS) + 1)

    process = torchrun("--resume", str(run_dir), "--total-steps", "100000")
    wait_for(lambda: checkpoint(run_dir)["env_step"] > last, process)
    os.kill(processes(run_dir)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode and "rank" in output and "-9" in output
    assert not processes(run_dir)


def test_more_processes_than_tasks_are_refused(tmp_path):
    process = torchrun(*arguments(tmp_path / "run", 100), size=4)
    output, _ = process.communicate(timeout=120)
    assert process.returncode and "torchrun has started 4 processes for 3 tasks" in output
    assert not (tmp_path / "run").exists()
