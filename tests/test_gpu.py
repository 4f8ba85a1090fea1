"""What only an NVIDIA GPU can show; skipped without one. `benchmarks/gpu_day.sh sync` runs it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import brc_sac
from brc_sac import Learner
from tests.test_fast_path import flat, store
from tests.test_fast_path import make_learner as small_learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
GPU, ROOT = torch.device("cuda", 0), Path(brc_sac.__file__).parent


def make_learner(device: torch.device, **changes) -> Learner:
    return small_learner(device, precision="fp32", width=64, **changes)


@pytest.mark.parametrize("compile", [False, True])
def test_updates_through_a_graph_are_those_without(compile):
    eager, graphed = make_learner(GPU), make_learner(GPU, cuda_graph=True, compile=compile)
    for step in range(100, 110):
        expected, metrics = eager.update(), graphed.update()
        for name in ("obs", "action", "terminated", "next_obs", "task_id"):
            assert torch.equal(getattr(eager.batch, name), getattr(graphed.batch, name)), (step, name)
        for name in expected:
            assert metrics[name].item() == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-4), (step, name)
        store(eager, step)
        store(graphed, step)  # what is stored between two replays is sampled by the next
    assert graphed.graph.graph
    for one, other in zip(flat(eager), flat(graphed), strict=True):
        # Twenty AdamW steps, whose direction rounding decides where gradients vanish.
        assert (one - other).abs().max() < 3e-3


def test_updating_and_storing_never_wait_for_the_device():
    learner = make_learner(GPU, variant="release")  # the paper's truncations bootstrap with a value: they wait for it
    learner.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.update()
        for step in (108, 109):  # the second ends episodes
            store(learner, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_update_that_waits_cannot_be_captured_and_says_so():
    """In a process of its own: a broken capture leaves CUDA's allocator and generators unusable."""
    script = """
import pytest, brc_sac
from tests.test_gpu import GPU, make_learner
learner = make_learner(GPU, cuda_graph=True)
updates = learner.updates
learner.updates = lambda: {name: value + value.item() for name, value in updates().items()}
for _ in range(3):
    learner.update()
with pytest.raises(brc_sac.RunError, match="take out what waits for the device"):
    learner.update()
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def test_an_update_agrees_with_the_cpu():
    on_cpu, on_gpu = make_learner(torch.device("cpu")), make_learner(GPU)
    on_gpu.agent.load_state_dict(on_cpu.agent.state_dict())
    batch = on_cpu.buffer.sample(64)
    noise = torch.randn(2, 64, 2)
    expected, _ = on_cpu.agent.update(batch, *noise)
    metrics, _ = on_gpu.agent.update(type(batch)(*(field.to(GPU) for field in batch)), *noise.to(GPU))
    for name in expected:
        assert metrics[name].item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-5), name
    for one, other in zip(on_cpu.agent.critic.parameters(), on_gpu.agent.critic.parameters(), strict=True):
        assert (one.grad - other.grad.cpu()).norm() <= 1e-3 * one.grad.norm() + 1e-7


def test_a_run_trains_stops_and_goes_on(tmp_path):
    args = brc_sac.resolve(brc_sac.Args(
        tasks=("reach", "drawer-close"), width=32, actor_width=32, batch_size=64, learning_starts=50, total_steps=120,
        eval_interval=60, eval_episodes=1, workers=0, run_dir=str(tmp_path / "run"), device="cuda"))
    brc_sac.train(args)
    results = brc_sac.train(dataclasses.replace(args, resume=args.run_dir, total_steps=160))
    assert len(results) == 2
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert {int(row[4]) for row in rows} == {60, 120, 160}
