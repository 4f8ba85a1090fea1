"""What only an NVIDIA GPU can show; skipped without one. `benchmarks/gpu_day.sh sync` runs it."""

import dataclasses

import numpy as np
import pytest
import torch

import brc_sac
from brc_sac import Learner
from suites.vector import Step
from tests.test_sac import make_args

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
GPU = torch.device("cuda")


def make_learner(device: torch.device, **changes) -> Learner:
    learner = Learner(make_args(precision="fp32", width=64, **changes), 3, 2, device, device)
    for step in range(40):
        store(learner, step)
    return learner


def store(learner: Learner, step: int) -> None:
    draw = np.random.default_rng(step).normal
    obs, next_obs = draw(size=(2, 2, 3)).astype(np.float32)
    result = Step(next_obs, draw(size=2), np.zeros(2, bool), np.full(2, step % 10 == 9), next_obs, np.zeros(2))
    learner.observe(obs, np.tanh(draw(size=(2, 2))), result)


def parameters(learner: Learner) -> list[torch.Tensor]:
    networks = learner.agent.critic, learner.agent.target, learner.agent.actor
    return [p.detach().cpu() for network in networks for p in network.parameters()]


@pytest.mark.parametrize("compile", [False, True])
def test_updates_through_a_graph_are_those_without(compile):
    eager, graphed = make_learner(GPU), make_learner(GPU, cuda_graph=True, compile=compile)
    for step in range(100, 110):
        expected, metrics = eager.update(), graphed.update()
        for name in expected:
            assert metrics[name].item() == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-4), (step, name)
        store(eager, step)
        store(graphed, step)  # what is stored between two replays is sampled by the next
    assert graphed.update.graph is not None
    assert torch.equal(eager.batch.task_id, graphed.batch.task_id)
    for one, other in zip(parameters(eager), parameters(graphed), strict=True):
        # Ten AdamW steps, whose direction rounding decides where gradients vanish.
        assert (one - other).abs().max() < 3e-3


def test_updating_and_storing_never_wait_for_the_device():
    learner = make_learner(GPU)
    learner.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.update()
        store(learner, 101)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_update_that_waits_is_not_captured_and_said_to_be(capsys):
    learner = make_learner(GPU, cuda_graph=True)
    updates = learner.updates

    def waiting():
        metrics = updates()
        metrics["critic_loss"].item()
        return metrics

    learner.update = brc_sac.UpdateGraph(waiting, learner.generators.values())
    for _ in range(6):
        metrics = learner.update()
    assert metrics["critic_loss"].isfinite() and learner.update.graph is None
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("No CUDA graph") == 1


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
    assert len(results) == 2 and "160" in (tmp_path / "run" / "metrics.csv").read_text()
