"""The agent agrees with the authors' code on every number of tests/reference; the check notices when it does not."""

import functools
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, on_gpu
from tests import parity

REFERENCE = ROOT / "tests" / "reference"

# One wrong number in the file: the array, of which the largest entry is changed in its fourth digit.
WRONG_NUMBERS = {
    "multitask": ["u1/critic_loss", "u1/target/probs", "u1/grad/critic.0.block1.dense1.kernel",
                  "u2/grad/critic.embedding", "u2/new/critic.1.out.kernel", "u2/new/target.embedding", "u2/temp_loss",
                  "official_after2/actor.mean.kernel", "eval/actions_temperature0", "batch/rewards", "cfg/tau"],
    "units": ["adamw_lr1e-1/params", "layernorm/y", "projection/target_probs"],
    "normalizer": ["returns_min", "normalized_rewards"],
}


def reordered(*order: int) -> Callable[[str], str]:
    """A change to the order of the steps in Agent.update, which are 0 critic, 1 Polyak, 2 actor."""
    def change(text: str) -> str:
        before, *steps, after = re.split(r"(?m)^(?=        # (?:1-3|4|5|6): )", text)
        return "".join([before, *(steps[number] for number in order), after])
    return change


# One wrong formula in the agent: the file that shows it, the text of brc_sac.py and what stands there instead.
WRONG_FORMULAS = {
    "no weight decay": ("multitask", "weight_decay=args.weight_decay", "weight_decay=0.0"),
    "torch's LayerNorm eps": ("units", "eps=1e-6", "eps=1e-5"),
    "beta2 of AdamW": ("units", "betas=(beta1, 0.999)", "betas=(beta1, 0.99)"),
    "discount": ("multitask", "gamma=0.99,", "gamma=0.9901,"),
    "L1 embedding": ("units", '"l2": 2', '"l2": 1'),
    "minimum over critics, actor": ("multitask", "(logits.softmax(-1).mean(0) * self.atoms).sum(-1)",
                                    "(logits.softmax(-1) * self.atoms).sum(-1).amin(0)"),
    "mean of logits": ("multitask", "target_logits.softmax(-1).mean(0)", "target_logits.mean(0).softmax(-1)"),
    "target's embedding for the next action": ("multitask", "actor(batch.next_obs, critic.embed(batch.task_id))",
                                               "actor(batch.next_obs, target.embed(batch.task_id))"),
    "tanh correction with an epsilon": ("multitask", "correction = 2 * (math.log(2) - u - F.softplus(-2 * u))",
                                        "correction = torch.log(1 - torch.tanh(u).square() + 1e-6)"),
    "entropy share twice too large": ("normalizer", "-self.target_entropy / 2 /", "-self.target_entropy /"),
    "no bootstrap of truncated episodes": ("normalizer", "G = rewards.mean() / (1 - self.gamma)", "G = 0.0"),
    **{f"steps {order}": ("singletask", reordered(*order)) for order in ((1, 0, 2), (2, 0, 1), (0, 2, 1))},
}


@functools.cache
def right(name: str) -> tuple[list, dict]:
    """The rows and the tolerances of a file, for the right agent and the right numbers."""
    measured, original = [], parity.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "measure", lambda observe: measured.append(original(observe)) or measured[0])
        return parity.check(str(REFERENCE / f"{name}.npz")), measured[0][1]


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


@pytest.mark.parametrize(("precision", "device"), [
    ("bf16", "cpu"), *(pytest.param(precision, "cuda:0", marks=on_gpu) for precision in ("bf16", "tf32", "fp32"))])
def test_other_precisions_and_devices_agree_within_their_rounding(precision, device):
    assert failures("multitask", precision, False, device) == []


@pytest.mark.parametrize("precision, formula", [
    *(("fp32", formula) for formula in WRONG_FORMULAS),
    *(("bf16", formula) for formula in ("discount", "minimum over critics, actor", "mean of logits"))])
def test_notices_a_wrong_formula(monkeypatch, precision, formula):
    name, *change = WRONG_FORMULAS[formula]
    right(name)
    text = (ROOT / "brc_sac.py").read_text()
    altered = change[0](text) if callable(change[0]) else text.replace(*change)
    assert altered != text, "brc_sac.py no longer has what is to be changed: adapt this test"
    module = types.ModuleType("altered_brc_sac")
    module.__file__ = str(ROOT / "brc_sac.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look themselves up there
    exec(compile(altered, "brc_sac.py with a change", "exec"), module.__dict__)
    monkeypatch.setattr(parity, "brc_sac", module)
    assert failures(name, precision)


def test_exit_codes_and_sentences(tmp_path, capsys):
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
    assert parity.main(["--device", "quantum", str(REFERENCE / "units.npz")]) == 2
    assert "Device 'quantum' is not on this machine" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parity.main(["--precision", "tf32", str(REFERENCE / "units.npz")])
    assert "tf32 is NVIDIA GPUs'" in capsys.readouterr().err
