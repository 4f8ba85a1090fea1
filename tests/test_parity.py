"""The agent agrees with the authors' code on every number of tests/reference; the check notices when it does not."""

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
    "multitask": ["u1/critic_loss", "u1/next/log_probs", "u1/target/probs", "u1/critic_logits", "u2/actor/q_values",
                  "u1/grad/critic.0.block1.dense1.kernel", "u2/grad/critic.embedding", "u2/grad/actor.log_std.bias",
                  "u2/new/critic.1.out.kernel", "u2/new/target.embedding", "u1/new/log_temp", "u2/temp_loss",
                  "official_after2/actor.mean.kernel", "eval/actions_temperature0", "pristine/critic.0.out.kernel",
                  "init/target.1.ln0.scale", "batch/rewards", "u1/noise_actor", "cfg/tau"],
    "units": ["adamw_lr1e-1/params", "temp/log_temps", "layernorm/y", "embedding/out", "projection/target_probs"],
    "normalizer": ["returns_min", "returns_max", "normalized_rewards", "masks"],
}

# One wrong formula in the agent: the file that shows it, the text of brc_sac.py and what stands there instead.
WRONG_FORMULAS = {
    "no weight decay": ("multitask", "weight_decay=args.weight_decay", "weight_decay=0.0"),
    "torch's weight decay": ("units", "weight_decay: float = 1e-4", "weight_decay: float = 1e-2"),
    "torch's LayerNorm eps": ("units", "eps=1e-6", "eps=1e-5"),
    "LayerNorm eps in the networks": ("multitask", "eps=1e-6", "eps=1e-5"),
    "beta2 of AdamW": ("units", "betas=(0.9, 0.999)", "betas=(0.9, 0.99)"),
    "beta1 of the temperature": ("units", "betas=(0.5, 0.999)", "betas=(0.9, 0.999)"),
    "discount": ("multitask", "gamma: float = 0.99", "gamma: float = 0.9901"),
    "Polyak coefficient": ("singletask", "tau: float = 0.005", "tau: float = 0.00501"),
    "L1 embedding": ("units", '"release": 2', '"release": 1'),
    "first critic only, target": ("singletask", "target_logits.softmax(-1).mean(0)", "target_logits.softmax(-1)[0]"),
    "minimum over critics, actor": (
        "multitask", "return (logits.softmax(-1).mean(0) * self.atoms).sum(-1)",
        "return (logits.softmax(-1) * self.atoms).sum(-1).amin(0)",
    ),
    "mean of logits, not of probabilities": (
        "multitask", "target_logits.softmax(-1).mean(0)", "target_logits.mean(0).softmax(-1)"
    ),
    "mean over critics in the loss": ("singletask", "cross_entropy.mean(1).sum()", "cross_entropy.mean()"),
    "target's embedding for the next action": (
        "multitask", "actor(batch.next_obs, critic.embed(batch.task_id))",
        "actor(batch.next_obs, target.embed(batch.task_id))",
    ),
    "activation after the last block": (
        "multitask", "return self.blocks(F.relu(self.ln0(self.dense0(x))))",
        "return F.relu(self.blocks(F.relu(self.ln0(self.dense0(x)))))",
    ),
    "tanh correction with an epsilon": (
        "multitask", "correction = 2 * (math.log(2) - u - F.softplus(-2 * u))",
        "correction = torch.log(1 - torch.tanh(u).square() + 1e-6)",
    ),
    "temperature loss through log alpha": (
        "multitask", "return log_temperature.exp() * (entropy", "return log_temperature * (entropy"
    ),
    "gain 1 in every layer": ("singletask", "gain: float = 2**0.5", "gain: float = 1.0"),
    "entropy share twice too large": ("normalizer", "-self.target_entropy / 2 /", "-self.target_entropy /"),
    "largest return, not its size": ("normalizer", "abs(self.return_min[task])", "self.return_min[task]"),
    "no bootstrap of truncated episodes": ("normalizer", "G = rewards.mean() / (1 - self.gamma)", "G = 0.0"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in parity.main
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def right():
    """The rows and the tolerances of each file, for the right agent and the right numbers."""
    results = {}
    for path in sorted(REFERENCE.glob("*.npz")):
        measured, original = {}, parity.measure

        def measure(observe):
            values, tolerance = original(observe)
            measured.update(tolerance)
            return values, dict(tolerance)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parity, "measure", measure)
            results[path.stem] = parity.check(str(path)), measured
    return results


@pytest.fixture
def same_tolerances(right, monkeypatch):
    """Holds a changed agent or file to the tolerances of the right one; saves measuring them anew, too."""

    def use(name: str) -> None:
        monkeypatch.setattr(parity, "measure", lambda observe: (parity.numbers(observe()), dict(right[name][1])))

    return use


@pytest.mark.parametrize("name", ["multitask", "singletask", "units", "normalizer"])
def test_agrees_with_the_authors_code(right, name):
    rows, _ = right[name]
    assert [row for row in rows if not row.ok] == []
    # Nearly all of the room is for other machines and sizes.
    assert max(row.used for row in rows) < 0.8


@pytest.mark.parametrize("name, array", [(name, array) for name, arrays in WRONG_NUMBERS.items() for array in arrays])
def test_notices_a_wrong_number(same_tolerances, tmp_path, name, array):
    arrays = dict(np.load(REFERENCE / f"{name}.npz"))
    x = arrays[array].astype(np.float64)
    largest = np.unravel_index(np.where(np.isfinite(x), np.abs(x), 0).argmax(), x.shape)
    x[largest] += 10.0 ** (np.floor(np.log10(abs(x[largest]))) - 3)
    arrays[array] = x.astype(np.float32)
    np.savez(tmp_path / "wrong.npz", **arrays)
    same_tolerances(name)
    assert not all(row.ok for row in parity.check(str(tmp_path / "wrong.npz")))


@pytest.mark.parametrize("name", ["multitask", "singletask"])
def test_bf16_agrees_within_its_rounding(same_tolerances, name):
    same_tolerances(name)
    assert [row for row in parity.check(str(REFERENCE / f"{name}.npz"), "bf16") if not row.ok] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_gpu_agrees_too(same_tolerances, precision):
    same_tolerances("multitask")
    rows = parity.check(str(REFERENCE / "multitask.npz"), precision, device="cuda:0")
    assert [row for row in rows if not row.ok] == []


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


@pytest.mark.skipif(not parity.brc_sac.has_compiler(), reason="no C++ compiler")
def test_a_compiled_update_agrees_to_the_last_digits(same_tolerances):
    same_tolerances("multitask")
    rows = parity.check(str(REFERENCE / "multitask.npz"), compile=True)
    assert [row for row in rows if not row.ok] == []
    assert sum("/grad/" in row.name for row in rows) > 100


@pytest.mark.parametrize("formula", ["discount", "minimum over critics, actor", "mean of logits, not of probabilities"])
def test_bf16_does_not_hide_a_wrong_formula(same_tolerances, monkeypatch, formula):
    name, old, new = WRONG_FORMULAS[formula]
    monkeypatch.setattr(parity, "brc_sac", agent_with((old, new)))
    same_tolerances(name)
    assert not all(row.ok for row in parity.check(str(REFERENCE / f"{name}.npz"), "bf16"))


def agent_with(*changes: tuple[str, str]) -> types.ModuleType:
    """The module brc_sac with other text in places."""
    text = (ROOT / "brc_sac.py").read_text()
    for old, new in changes:
        assert old in text, f"brc_sac.py no longer has {old!r}: adapt this test"
        text = text.replace(old, new)
    module = types.ModuleType("altered_brc_sac")
    module.__file__ = str(ROOT / "brc_sac.py")
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    exec(compile(text, "brc_sac.py with a change", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("formula", WRONG_FORMULAS)
def test_notices_a_wrong_formula(same_tolerances, monkeypatch, formula):
    name, old, new = WRONG_FORMULAS[formula]
    monkeypatch.setattr(parity, "brc_sac", agent_with((old, new)))
    same_tolerances(name)
    assert not all(row.ok for row in parity.check(str(REFERENCE / f"{name}.npz")))


def reordered_update(agent, batch, next_noise, noise, order: str):
    """Agent.update with its steps in another order: c critic, p Polyak, a actor, t temperature."""
    brc, temperature = parity.brc_sac, agent.temperature
    metrics, entropy = {"temperature": temperature}, torch.tensor(0.0)
    for step in order:
        if step == "c":
            loss, more = brc.critic_loss(agent.critic, agent.target, agent.actor, temperature, agent.args.gamma, batch,
                                         next_noise)
            brc.optimize(agent.critic_optimizer, loss)
        elif step == "p":
            with torch.no_grad():
                torch._foreach_lerp_(agent.target_parameters, agent.critic_parameters, agent.args.tau)
            more = {}
        elif step == "a":
            agent.critic.requires_grad_(False)
            loss, log_prob, more = brc.actor_loss(agent.critic, agent.actor, agent.temperature, batch, noise)
            agent.critic.requires_grad_(True)
            brc.optimize(agent.actor_optimizer, loss)
            entropy = -log_prob.mean()
        else:
            loss = brc.temperature_loss(agent.log_temperature, entropy, agent.target_entropy)
            brc.optimize(agent.temperature_optimizer, loss)
            more = {"temperature_loss": loss.detach()}
        metrics |= more
    return metrics, log_prob


@pytest.mark.parametrize("order", ["cpat", "pcat", "acpt", "capt", "cpta"])
def test_notices_another_order_of_the_steps(same_tolerances, monkeypatch, order):
    monkeypatch.setattr(parity.brc_sac.Agent, "update", lambda *args: reordered_update(*args, order=order))
    same_tolerances("singletask")
    assert all(row.ok for row in parity.check(str(REFERENCE / "singletask.npz"))) == (order == "cpat")


def test_exit_codes(tmp_path, capsys, same_tolerances):
    same_tolerances("normalizer")
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
