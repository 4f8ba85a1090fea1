"""What makes updates fast changes no number: compilation, its failures, and CUDA graphs, which only a GPU can show."""

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

import brc_sac
import devices
from conftest import ROOT, SMALL, on_gpu
from test_sac import make_agent, make_args, make_batch

HAS_COMPILER = brc_sac.resolve(brc_sac.Args(suite="demo")).compile


@pytest.mark.parametrize(("given", "compiler", "compiled"), [
    ({}, True, True), ({}, False, False), ({"compile": False}, True, False), ({"total_steps": 6_000}, True, False)])
def test_a_long_run_is_compiled_where_there_is_a_compiler(monkeypatch, given, compiler, compiled):
    monkeypatch.setattr(brc_sac.shutil, "which", lambda name: name if compiler and name == "g++" else None)
    assert brc_sac.resolve(brc_sac.Args(**given)).compile == compiled
    monkeypatch.setattr(brc_sac.shutil, "which", lambda name: "g++")  # a longer run goes on as it was
    resumed = brc_sac.resolve(brc_sac.Args(**given | {"compile": compiled, "total_steps": 500_000}))
    assert resumed.compile == compiled


def backward_fails(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd
    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=lambda *_: 1 / 0)(graph, inputs)


def both_agents() -> tuple[list, list[dict]]:
    """An eager and a compiled agent after an update from the same batch, and what that returned."""
    torch._dynamo.reset()
    agents, batch, noise, metrics = [], make_batch(), torch.randn(2, 64, 2), []
    for compile in (False, True):
        torch.manual_seed(0)
        agents.append(make_agent(compile=compile, critic_depth=1))
        metrics.append(agents[-1].update(batch, *noise)[0])
    return agents, metrics


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    """A backward that fails: a forward does where there is no compiler."""
    of = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: of(function, backend=backward_fails))
    agents, _ = both_agents()
    for part in ("critic", "target", "actor"):
        parameters = (getattr(agent, part).parameters() for agent in agents)
        assert all(torch.equal(*pair) for pair in zip(*parameters, strict=True)), part


def test_a_run_without_a_compiler_is_eager_and_ends_well(sac):
    """Also where it was told to compile: on this PATH there is none, and torch finds none."""
    def prepare():
        torch._inductor.config.cpp.cxx = ("no-such-compiler",)
        resolve = sac.module.resolve
        sac.module.resolve = lambda args: brc_sac.dataclasses.replace(resolve(args), compile=True)
    assert sac.run(f"{SMALL['brc_sac']} --total-steps 25 --run-dir run", prepare) == 0, sac.err


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_compiled_equals_eager_on_one_batch_and_serves_any_number_of_threads():
    """To compile it anew for another number would take half a minute."""
    agents, metrics = both_agents()
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    for name, value in metrics[0].items():
        assert metrics[1][name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    for one, other in zip(*(agent.critic.parameters() for agent in agents), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-4 * one.grad.norm() + 1e-7
    compiled, threads = dict(torch._dynamo.utils.counters["frames"]), torch.get_num_threads()
    try:
        for number in (2, 1):
            torch.set_num_threads(number)
            agents[1].update(make_batch(), *torch.randn(2, 64, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch._dynamo.utils.counters["frames"] == compiled


def test_an_agent_is_freed_with_its_last_name():
    """At a billion parameters none may wait for the garbage collector."""
    agent = make_agent()
    agent.update(make_batch(), *torch.randn(2, 64, 2))
    alive = weakref.ref(agent)
    del agent
    assert alive() is None


# -------------------------------------------------------------------------------------------------------------- GPU


def make_learner(graph: bool, **changes):
    """An agent on a GPU, its updates as `train` has them, eager or as a graph, and what stores a random step."""
    torch.manual_seed(0)
    args = make_args(width=64, updates_per_step=2, **changes)
    agent, normalizer = brc_sac.Agent(args, 3, 2, 2, device="cuda"), brc_sac.ReturnNormalizer(args, 2, 2, "cuda")
    buffer, batches = brc_sac.ReplayBuffer(2, 3, 2, 1000, "cuda"), []

    def store(step: int) -> None:
        draw = np.random.default_rng(step).normal
        obs, next_obs = draw(size=(2, 2, 3)).astype(np.float32)
        over, reward = np.full(2, step % 10 == 9), draw(size=2).astype(np.float32)
        buffer.add(obs, np.tanh(draw(size=(2, 2))), reward, np.zeros(2, bool), over, next_obs)
        normalizer.observe(reward, np.zeros(2, bool), over)

    def updates() -> dict:
        for _ in range(2):
            batch = buffer.sample(64)
            reward = normalizer.normalize(batch.reward, batch.task_id, agent.temperature)
            metrics, log_prob = agent.update(batch._replace(reward=reward), *torch.randn(2, 64, 2, device="cuda"))
            normalizer.observe_entropy(log_prob, batch.task_id)
        batches[:] = [batch.reward]
        return metrics

    for step in range(40):
        store(step)
    return agent, devices.as_cuda_graph(updates) if graph else updates, store, batches


@on_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("tf32", 2e-2), ("bf16", 5e-2)])
def test_updates_through_a_graph_are_those_without(precision, tolerance, compile):
    """With actions and new transitions between the replays, and the same random numbers."""
    logs = []
    for graph in (False, True):
        agent, updates, store, batches = make_learner(graph, precision=precision, compile=compile)
        logs.append([])
        for step in range(100, 110):
            metrics = updates()
            action = agent.act(torch.ones(2, 3, device="cuda"), torch.randn(2, 2, device="cuda"))
            numbers = {name: value.item() for name, value in metrics.items()}
            logs[-1].append((batches[0].clone(), numbers, action.clone()))
            store(step)
    for (batch, metrics, action), (graph_batch, graph_metrics, graph_action) in zip(*logs, strict=True):
        assert torch.equal(batch, graph_batch)
        assert graph_metrics == pytest.approx(metrics, rel=tolerance, abs=tolerance)
        torch.testing.assert_close(graph_action, action, rtol=0, atol=20 * tolerance)


@on_gpu
def test_updating_and_storing_never_wait_for_the_device():
    _, updates, store, _ = make_learner(graph=False, variant="release")  # the paper's truncations bootstrap: they wait
    updates()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second of the device's time, in front of what follows
    store(108)
    store(109)  # ends episodes
    assert not torch.cuda.current_stream().query(), "the device was done before the host went on"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        updates()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_an_update_that_waits_cannot_be_captured_and_shows_its_line():
    """In a process of its own: a broken capture leaves CUDA's allocator and generators unusable."""
    script = ("from test_speed import *; agent, updates, *_ = make_learner(False); "
              "waiting = lambda: {name: value + value.item() for name, value in updates().items()}; "
              "graph = devices.as_cuda_graph(waiting); "
              "[graph() for _ in range(4)]")
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tests", capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}, timeout=300)
    assert process.returncode == 1 and "value.item()" in process.stderr and "capturing" in process.stderr
