"""How updates run: the choice of precision, compilation and CUDA graph; the graph on a stand-in for CUDA."""

import contextlib
import copy
import weakref

import numpy as np
import pytest
import torch

import brc_sac
from brc_sac import Learner, UpdateGraph
from suites.vector import Step
from tests.test_sac import make_args

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
TOOLS = ("c++", "triton")


@pytest.fixture
def machine(monkeypatch):
    """Sets which tools the machine has."""

    def use(*tools: str) -> None:
        monkeypatch.setattr(brc_sac.shutil, "which", lambda name: name if name in tools else None)
        monkeypatch.setattr(brc_sac.importlib.util, "find_spec", lambda name: name if name in tools else None)

    return use


LONG, SHORT = dict(total_steps=50_000), dict(total_steps=100)


@pytest.mark.parametrize(
    ("device", "replay", "tools", "given", "chosen", "printed"),
    [
        (CPU, CPU, TOOLS, LONG, ("fp32", True, False), "fp32, compiled"),
        (CPU, CPU, TOOLS, SHORT, ("fp32", False, False), "eager (a short run)"),
        (CPU, CPU, TOOLS, LONG | dict(compile=False), ("fp32", False, False), "eager (--compile False)"),
        (CPU, CPU, TOOLS, SHORT | dict(compile=False), ("fp32", False, False), "eager (--compile False)"),
        (CPU, CPU, (), LONG, ("fp32", False, False), "eager (no compiler"),
        (CPU, CPU, TOOLS, SHORT | dict(compile=True, precision="bf16"), ("bf16", True, False), "bf16, compiled"),
        (GPU, GPU, TOOLS, LONG, ("tf32", True, True), "tf32, compiled, one CUDA graph per step"),
        (GPU, GPU, ("c++",), LONG, ("tf32", False, True), "eager (no compiler"),
        (GPU, CPU, TOOLS, LONG, ("tf32", True, False), "tf32, compiled"),
        (GPU, GPU, TOOLS, SHORT | dict(cuda_graph=False, precision="fp32"), ("fp32", False, False), "fp32, eager"),
    ],
)
def test_the_choice_follows_the_machine_and_says_why(machine, capsys, device, replay, tools, given, chosen, printed):
    machine(*tools)
    args = brc_sac.fast_path(make_args(**given), device, replay)
    assert (args.precision, args.compile, args.cuda_graph) == chosen
    out = capsys.readouterr().out
    assert printed in out and ("CUDA graph" in out) == args.cuda_graph


@pytest.mark.parametrize(("before", "given", "compiled"), [
    (False, LONG, False), (True, SHORT, True), (False, LONG | dict(compile=True), True),
    (True, SHORT | dict(compile=False), False)])
def test_a_resumed_run_stays_as_it_was_unless_told_otherwise(machine, before, given, compiled):
    machine(*TOOLS)
    assert brc_sac.fast_path(make_args(**given), CPU, CPU, before).compile == compiled


def test_tf32_is_refused_where_there_is_none():
    with pytest.raises(brc_sac.UsageError, match="tf32 is of NVIDIA GPUs, and the device is cpu"):
        brc_sac.fast_path(make_args(precision="tf32"), CPU, CPU)


@pytest.mark.parametrize(("device", "replay"), [(CPU, CPU), (GPU, CPU)])
def test_a_graph_that_cannot_be_is_refused(device, replay):
    with pytest.raises(brc_sac.UsageError, match=f"networks are on {device} and the replay on {replay}: leave it out"):
        brc_sac.fast_path(make_args(cuda_graph=True), device, replay)


def test_asking_to_compile_without_a_compiler_is_refused(machine):
    machine()
    with pytest.raises(brc_sac.UsageError, match="install it, or use --compile False"):
        brc_sac.fast_path(make_args(compile=True), CPU, CPU)


def test_a_compiler_that_fails_leaves_the_updates_eager_and_says_why(monkeypatch, tmp_path, capsys):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    eager, failing = make_learner(), make_learner(compile=True)
    restore(failing, state(eager))
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        failing.update()
        failing.update()
    for _ in range(2):
        eager.update()
    assert all(map(torch.equal, flat(eager), flat(failing)))
    out = capsys.readouterr().out
    for name in ("critic_loss", "actor_loss"):
        assert out.count(f"{name} stays eager, for it could not be compiled: ") == 1


# ------------------------------------------------------------------------------------------------------- CUDA graph


def make_learner(device: torch.device = CPU, **changes) -> Learner:
    """A learner with a few random transitions."""
    learner = Learner(make_args(**changes), 3, 2, device, device)
    for step in range(40):
        store(learner, step)
    return learner


def store(learner: Learner, step: int) -> None:
    """Stores one random step of both tasks; every tenth ends their episodes."""
    draw = np.random.default_rng(step).normal
    obs, next_obs = draw(size=(2, 2, 3)).astype(np.float32)
    result = Step(next_obs, draw(size=2), np.zeros(2, bool), np.full(2, step % 10 == 9), next_obs, np.zeros(2))
    learner.observe(obs, np.tanh(draw(size=(2, 2))), result)


def state(learner: Learner) -> dict:
    """All that an update changes."""
    generators = {name: generator.get_state() for name, generator in learner.generators.items()}
    return {"agent": copy.deepcopy(learner.agent.state_dict()), "generators": generators,
            "entropy": learner.normalizer.entropy.clone()}


def restore(learner: Learner, saved: dict) -> None:
    learner.agent.load_state_dict(saved["agent"])
    learner.normalizer.entropy.copy_(saved["entropy"])
    for name, generator in learner.generators.items():
        generator.set_state(saved["generators"][name])


def flat(learner: Learner) -> list[torch.Tensor]:
    networks = (learner.agent.critic, learner.agent.target, learner.agent.actor)
    return [p.detach() for network in networks for p in network.parameters()] + [learner.agent.log_temperature.detach()]


@pytest.fixture
def stand_in(monkeypatch):
    """A learner whose updates go through a graph that records nothing as it captures and runs when it is replayed."""
    learner, events = make_learner(), []

    class Graph:
        def register_generator_state(self, generator):
            events.append(generator)

        def replay(self):
            events.append("replay")
            for name, value in learner.updates().items():
                learner.graph.metrics[name].detach().copy_(value)

    @contextlib.contextmanager
    def capturing(graph, stream):
        events.append("capture")
        before = state(learner)
        yield
        restore(learner, before)

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    learner.graph = UpdateGraph(learner.generators.values())
    return learner, events


def test_updates_through_a_graph_are_those_without(stand_in):
    learner, events = stand_in
    eager = make_learner()
    for call in range(6):
        expected, metrics = eager.update(), learner.update()
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()})
        for one, other in zip(flat(eager), flat(learner), strict=True):
            assert torch.equal(one, other)
    assert events == [*learner.generators.values(), "capture", "replay", "replay", "replay"]


@pytest.mark.parametrize(("cause", "raised"), [
    (RuntimeError("operation not permitted when stream is capturing\nmore"), brc_sac.RunError),
    (torch.OutOfMemoryError("2 GiB too many"), torch.OutOfMemoryError),
])
def test_updates_that_cannot_be_recorded_end_the_run_with_the_cause(stand_in, monkeypatch, cause, raised):
    learner, events = stand_in

    @contextlib.contextmanager
    def failing(graph, stream):
        try:
            raise cause
        finally:  # as the end of a capture does
            raise RuntimeError("operation failed due to a previous error during capture")
        yield

    monkeypatch.setattr(torch.cuda, "graph", failing)
    monkeypatch.setattr(torch.cuda, "set_stream", events.append)
    for _ in range(UpdateGraph.WARM_UP):
        learner.update()
    with pytest.raises(raised) as error:
        learner.update()
    if raised is brc_sac.RunError:
        assert "(operation not permitted when stream is capturing): take out what waits" in str(error.value)
    assert type(events[-1]) is torch.cuda.Stream  # the main one again


def test_a_learner_is_freed_with_its_last_name():
    """At a billion parameters none may wait for the garbage collector."""
    learner = make_learner()
    learner.update()
    alive = weakref.ref(learner)
    del learner
    assert alive() is None
