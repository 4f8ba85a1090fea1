"""The agent agrees with the authors' code on every number of tests/reference; the check notices when it does not."""

import functools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import parity

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference"

# One wrong number in the file: the array, of which the largest entry is changed in its fourth digit.
WRONG_NUMBERS = {
    "multitask": ["u1/critic_loss", "u1/target/probs", "u1/grad/critic.0.block1.dense1.kernel",
                  "u2/grad/critic.embedding", "u2/new/critic.1.out.kernel", "u2/new/target.embedding", "u2/temp_loss",
                  "official_after2/actor.mean.kernel", "eval/actions_temperature0", "batch/rewards", "cfg/tau"],
    "units": ["adamw_lr1e-1/params", "layernorm/y", "projection/target_probs"],
    "normalizer": ["returns_min", "normalized_rewards"],
}

# One wrong formula in the agent: the file that shows it, the text of brc_sac.py and what stands there instead.
WRONG_FORMULAS = {
    "no weight decay": ("multitask", "weight_decay=args.weight_decay", "weight_decay=0.0"),
    "torch's LayerNorm eps": ("units", "eps=1e-6", "eps=1e-5"),
    "beta2 of AdamW": ("units", "betas=(beta1, 0.999)", "betas=(beta1, 0.99)"),
    "discount": ("multitask", "gamma: float = 0.99", "gamma: float = 0.9901"),
    "L1 embedding": ("units", '"l2": 2', '"l2": 1'),
    "minimum over critics, actor": (
        "multitask", "return (logits.softmax(-1).mean(0) * self.atoms).sum(-1)",
        "return (logits.softmax(-1) * self.atoms).sum(-1).amin(0)",
    ),
    "mean of logits, not of probabilities": (
        "multitask", "target_logits.softmax(-1).mean(0)", "target_logits.mean(0).softmax(-1)"
    ),
    "target's embedding for the next action": (
        "multitask", "actor(batch.next_obs, critic.embed(batch.task_id))",
        "actor(batch.next_obs, target.embed(batch.task_id))",
    ),
    "tanh correction with an epsilon": (
        "multitask", "correction = 2 * (math.log(2) - u - F.softplus(-2 * u))",
        "correction = torch.log(1 - torch.tanh(u).square() + 1e-6)",
    ),
    "entropy share twice too large": ("normalizer", "-self.target_entropy / 2 /", "-self.target_entropy /"),
    "no bootstrap of truncated episodes": ("normalizer", "G = rewards.mean() / (1 - self.gamma)", "G = 0.0"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in parity.main
    yield
    torch.set_num_threads(threads)


@functools.cache
def right(name: str) -> tuple[list, dict]:
    """The rows and the tolerances of a file, for the right agent and the right numbers."""
    measured, original = {}, parity.measure

    def measure(observe):
        values, tolerance = original(observe)
        measured.update(tolerance)
        return values, tolerance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "measure", measure)
        return parity.check(str(REFERENCE / f"{name}.npz")), measured


def failures(name: str, *options, path: Path | None = None) -> list:
    """The rows that are out, of an altered agent or file, held to the tolerances of the right one."""
    _, tolerance = right(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "measure", lambda observe: (parity.numbers(observe()), tolerance))
        return [row for row in parity.check(str(path or REFERENCE / f"{name}.npz"), *options) if not row.ok]


@pytest.mark.parametrize("name", ["multitask", "singletask", "units", "normalizer"])
def test_agrees_with_the_authors_code(name):
    rows, _ = right(name)
    assert [row for row in rows if not row.ok] == []
    assert max(row.used for row in rows) < 0.8  # nearly all of the room is for other machines and sizes


@pytest.mark.parametrize("name, array", [(name, array) for name, arrays in WRONG_NUMBERS.items() for array in arrays])
def test_notices_a_wrong_number(tmp_path, name, array):
    arrays = dict(np.load(REFERENCE / f"{name}.npz"))
    x = arrays[array].astype(np.float64)
    largest = np.unravel_index(np.where(np.isfinite(x), np.abs(x), 0).argmax(), x.shape)
    x[largest] += 10.0 ** (np.floor(np.log10(abs(x[largest]))) - 3)
    np.savez(tmp_path / "wrong.npz", **arrays | {array: x.astype(np.float32)})
    assert failures(name, path=tmp_path / "wrong.npz")


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.mark.parametrize(("precision", "device"), [
    ("bf16", "cpu"), *(pytest.param(precision, "cuda:0", marks=GPU) for precision in ("bf16", "tf32", "fp32"))])
def test_other_precisions_and_devices_agree_within_their_rounding(precision, device):
    assert failures("multitask", precision, False, device) == []


@pytest.mark.parametrize(("options", "message"), [
    (["--precision", "tf32"], "tf32 is NVIDIA GPUs'"),
    (["--device", "quantum"], "Device 'quantum' is not on this machine"),
])
def test_refuses_what_the_device_cannot_do(capsys, options, message):
    try:
        code = parity.main([*options, str(REFERENCE / "units.npz")])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


def agent_with(old: str, new: str) -> types.ModuleType:
    """The module brc_sac with another text in a place."""
    text = (ROOT / "brc_sac.py").read_text()
    assert old in text, f"brc_sac.py no longer has {old!r}: adapt this test"
    module = types.ModuleType("altered_brc_sac")
    module.__file__ = str(ROOT / "brc_sac.py")
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    exec(compile(text.replace(old, new), "brc_sac.py with a change", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("precision, formula", [
    *(("fp32", formula) for formula in WRONG_FORMULAS), ("bf16", "discount"), ("bf16", "minimum over critics, actor"),
    ("bf16", "mean of logits, not of probabilities"),
])
def test_notices_a_wrong_formula(monkeypatch, precision, formula):
    name, old, new = WRONG_FORMULAS[formula]
    right(name)
    monkeypatch.setattr(parity, "brc_sac", agent_with(old, new))
    assert failures(name, precision)


def reordered_update(agent, batch, next_noise, noise, order: str):
    """Agent.update with its steps in another order: c critic, p Polyak, a actor, t temperature."""
    brc, temperature, metrics, entropy = parity.brc_sac, agent.temperature, {}, torch.tensor(0.0)
    for step in order:
        if step == "c":
            loss, more = brc.critic_loss(agent.critic, agent.target, agent.actor, temperature, agent.args.gamma, batch,
                                         next_noise)
            brc.optimize(agent.critic_optimizer, loss)
        elif step == "p":
            with torch.no_grad():
                torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), agent.args.tau)
            more = {}
        elif step == "a":
            loss, log_prob, more = brc.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise)
            brc.optimize(agent.actor_optimizer, loss)
            entropy = -log_prob.mean()
        else:
            loss = brc.temperature_loss(agent.log_temperature, entropy, agent.target_entropy)
            brc.optimize(agent.temperature_optimizer, loss)
            more = {"temperature_loss": loss.detach()}
        metrics |= more
    return metrics | {"temperature": temperature}, log_prob


@pytest.mark.parametrize("order", ["cpat", "pcat", "acpt", "capt", "cpta"])
def test_notices_another_order_of_the_steps(monkeypatch, order):
    right("singletask")
    monkeypatch.setattr(parity.brc_sac.Agent, "update", lambda *args: reordered_update(*args, order=order))
    assert (failures("singletask") == []) == (order == "cpat")


def test_exit_codes(tmp_path, capsys):
    arrays = dict(np.load(REFERENCE / "normalizer.npz"))
    np.savez(tmp_path / "wrong.npz", **arrays | {"returns_max": arrays["returns_max"] * 1.001})
    np.savez(tmp_path / "lacking.npz", **{name: x for name, x in arrays.items() if name != "masks"})
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    (tmp_path / "text.npz").write_text("not an archive")

    assert parity.main([str(REFERENCE / "normalizer.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "7 of 7 quantities agree"
    assert parity.main([str(tmp_path / "wrong.npz")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 7 quantities agree, 1 do NOT"
    for name in ("missing", "lacking", "other", "text"):
        assert parity.main([str(tmp_path / f"{name}.npz")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("parity: ") and err.count("\n") == 1 and name in err
