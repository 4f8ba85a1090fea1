"""ablations/ and benchmarks/diagnose.py. Every test that imports an ablation does so in a forked process of its own."""

import csv
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  what every forked process would import again
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.tensorboard  # noqa: F401
import tyro  # noqa: F401

import brc_sac
import harness
import suites
import transfer
from benchmarks import diagnose, report
from conftest import ROOT, Pendulum

MSE, RAW = {"Critic", "critic_loss"}, {"Critic", "critic_loss", "ReturnNormalizer"}
SAC = RAW | {"Args", "Actor", "TaskEmbedding", "resolve"}
REPLACED = {"mse": MSE, "mse_raw": RAW, "bro": RAW | {"resolve"}, "mlp": {"Critic"}, "simba": {"Critic", "Agent"},
            "separate_heads": {"Critic", "Actor"}, "mse_heads": RAW | {"Actor"}, "sac": SAC, "mh_sac": SAC}
FLAGS = ("--width 16 --actor-width 8 --workers 0 --learning-starts 20 --total-steps 40 --eval-interval 20 "
         "--log-interval 20 --eval-episodes 1 --batch-size 16 --device cpu").split()


def forked(test):
    """What `test` imports and replaces ends with its process."""
    @functools.wraps(test)
    def run(*args, **kwargs):
        process = os.fork()
        if not process:
            code = 1
            try:
                test(*args, **kwargs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    return run


def load(name: str) -> None:
    """The script as transfer.py and diagnose.py import it."""
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location("script", ROOT / "ablations" / f"{name}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def make_agent(**changes):
    small = dict(tasks=("reach", "push"), width=4, actor_width=4, num_atoms=5, embedding_dim=2, compile=False,
                 embedding_norm="l1")
    return brc_sac.Agent(brc_sac.Args(**brc_sac.PAPER | small | changes), 3, 2, 2)


def make_batch(size: int = 6) -> brc_sac.Batch:
    return brc_sac.Batch(torch.randn(size, 3), torch.rand(size, 2), torch.arange(size) + 1.0,
                         (torch.arange(size) % 3 == 0).float(), torch.randn(size, 3), torch.arange(size) % 2)


def program(name: str, *arguments: str) -> None:
    """Runs a script's main program here, on toy tasks."""
    for module in [module for module in sys.modules if module.startswith(("ablations", "brc_sac"))]:
        del sys.modules[module]  # with what an earlier program has replaced in it
    sys.argv = [name, *arguments]
    harness.PROGRAM = Path(name)
    suites.make = lambda task, seed, render_mode=None: Pendulum()
    runpy.run_path(str(ROOT / name), run_name="__main__")


def test_every_script_is_tested_short_and_started_alike():
    texts = {path.stem: path.read_text() for path in (ROOT / "ablations").glob("*.py")}
    assert texts.keys() == REPLACED.keys()
    for name, text in texts.items():
        assert 15 <= text.count("\n") <= 60, name
        assert text.endswith('\n\nif __name__ == "__main__":\n    brc_sac.harness.exit_on_error(brc_sac.main)\n'), name


@pytest.mark.parametrize("name", REPLACED)
@forked
def test_replaces_what_it_says_and_nothing_else(name):
    before, base = dict(vars(brc_sac)), make_agent()
    load(name)
    assert {key for key, value in vars(brc_sac).items() if value is not before[key]} == REPLACED[name]
    agent = make_agent(critic_depth=2, actor_depth=2 if "sac" in name else 1)

    def shapes(part):
        return {key: tuple(value.shape) for key, value in part.state_dict().items()}

    old, new = shapes(base.critic), shapes(agent.critic)
    body = {key for key in old.keys() | new.keys() if key.startswith(("members.0.0.", "members.1.0."))}
    head = {f"members.{k}.1.{part}" for k in (0, 1) for part in ("weight", "bias")}
    task = {"embedding.weight", "members.0.0.dense0.weight", "members.1.0.dense0.weight"}
    changed, outputs = {  # parameters of the critic, and how many outputs its last layer has
        "mlp": (body, 5), "simba": (body | {"mean", "var", "count"}, 5), "separate_heads": (task | head, 10),
        "mse_heads": (task | head, 2), "sac": (body | head | task, 1), "mh_sac": (body | head | task, 2),
    }.get(name, (head, 1))
    assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} == changed
    assert new["members.0.1.weight"] == (outputs, 4)
    if "Actor" in REPLACED[name]:
        rows = 2 if name == "sac" else 4  # A, or N A
        assert shapes(agent.actor)["mean.weight"] == shapes(agent.actor)["log_std.weight"] == (rows, 4)
    else:
        assert shapes(base.actor) == shapes(agent.actor)
    for part in ("critic_optimizer", "actor_optimizer", "temperature_optimizer"):
        changes = {"weight_decay": 0.0} if "sac" in name and part != "temperature_optimizer" else {}
        assert getattr(agent, part).defaults == getattr(base, part).defaults | changes


@pytest.mark.parametrize("name", REPLACED)
@forked
def test_trains_resumes_and_evaluates(name, tmp_path):
    os.chdir(tmp_path)
    script = f"ablations/{name}.py"
    tasks = ["reach"] if name == "bro" else ["reach", "push"]
    program(script, "--tasks", *tasks, *FLAGS, "--run-dir", "run")
    facts = json.loads(Path("run/args.json").read_text())
    assert facts["exp_name"].startswith(f"{name}-reach") and Path(facts["program"]).name == f"{name}.py"
    assert facts["go_on"] == f"python {script} --resume run"
    program(script, "--resume", "run", "--total-steps", "60")
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert saved["env_step"] == 60 and all(value.isfinite().all() for value in saved["agent"]["critic"].values())
    program(script, "--evaluate", "run")
    with open("run/metrics.csv") as file:
        assert [row["env_step"] for row in csv.DictReader(file) if row["env_name"] == "mean"
                and row["metric"] == "return"] == ["20", "40", "60"]


def test_runs_from_any_directory(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([sys.executable, str(ROOT / "ablations" / "sac.py"), "--tasks", "nonsense"], cwd=tmp_path,
                            env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("sac.py: Unknown task 'nonsense'")


@pytest.mark.parametrize(("name", "target_q", "q"), [("mse", 6.0, 2.0), ("mse_raw", 6.0, 2.0), ("sac", 5.0, 1.0)])
@forked
def test_squared_error_by_hand(name, target_q, q):
    load(name)
    agent, noise = make_agent(), torch.zeros(2, 2)
    for critic, values in ((agent.critic, (1.0, 3.0)), (agent.target, (5.0, 7.0))):
        for member, value in zip(critic.members, values, strict=True):
            member[-1].weight.data.zero_()
            member[-1].bias.data.fill_(value)
    batch = make_batch(2)._replace(reward=torch.tensor([2.0, 2.0]), terminated=torch.tensor([0.0, 1.0]))
    _, log_prob = brc_sac.sample_action(*agent.actor(batch.next_obs, agent.critic.embed(batch.task_id)), noise)
    y = 2 + 0.5 * (target_q - 0.1 * log_prob[0].item())
    loss, metrics = agent.critic_loss(agent.critic, agent.target, agent.actor, torch.tensor(0.1), 0.5, batch, noise)
    assert loss.item() == pytest.approx(((1 - y) ** 2 + (3 - y) ** 2 + (1 - 2) ** 2 + (3 - 2) ** 2) / 2, rel=1e-5)
    assert metrics["target_q"].item() == pytest.approx((y + 2) / 2, rel=1e-5)
    values = agent.critic(batch.obs, batch.action, agent.critic.embed(batch.task_id))
    assert values.shape == (2, 2, 1) and agent.critic.q_values(values).tolist() == [q, q]

    normalizer = brc_sac.ReturnNormalizer(brc_sac.Args(**brc_sac.PAPER), 2, 2)
    reward, *others = torch.tensor([0.1, -700.0]), torch.tensor([0, 1]), torch.tensor(0.1)
    for _ in range(2 if name != "mse" else 0):  # raw from the first step on, and whatever the returns are
        assert normalizer.normalize(reward, *others).tolist() == reward.tolist()
        assert normalizer.denormalize(reward, *others).tolist() == reward.tolist()
        normalizer.observe(np.full(2, 9.0), np.ones(2, bool), np.zeros(2, bool))


@forked
def test_bro_is_single_task():
    load("bro")
    args = brc_sac.resolve(brc_sac.Args(tasks=("reach",), width=4))
    assert args.batch_size == 256 and brc_sac.Agent(args, 3, 2, 1).critic.embedding is None
    with pytest.raises(harness.UsageError, match="give --tasks one name"):
        brc_sac.resolve(brc_sac.Args(tasks=("reach", "push")))


@forked
def test_sac_has_one_hots_and_its_own_sizes():
    load("sac")
    args = brc_sac.resolve(brc_sac.Args(tasks=("reach", "push", "window-open")))
    assert (args.width, args.actor_width, args.weight_decay, args.batch_size) == (256, 256, 0.0, 1024)
    agent = make_agent(width=8, actor_depth=2)
    assert agent.critic.embed(agent.task_ids).tolist() == [[1, 0], [0, 1]]
    for net, sizes in ((agent.critic.members[0], [(8, 7), (8, 8), (1, 8)]), (agent.actor.body, [(4, 5), (4, 4)])):
        assert [tuple(p.shape) for p in net.parameters() if p.ndim == 2] == sizes


@forked
def test_mlp_by_hand():
    load("mlp")
    critic, x = make_agent().critic, torch.randn(6, 3 + 2 + 2)
    (first, _, second, _), last = critic.members[0]
    hidden = F.relu(F.relu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    by_hand = hidden @ last.weight.T + last.bias
    torch.testing.assert_close(critic(x[:, :3], x[:, 3:5], x[:, 5:])[0], by_hand)


@forked
def test_simba_by_hand():
    load("simba")
    agent, batches, embedding = make_agent(critic_depth=1), [make_batch(), make_batch(4)], torch.randn(6, 2)
    brc_sac.devices.add = lambda tensors: [tensor.mul_(1 / agent.share) for tensor in tensors]  # as of two equal ranks
    for agent.share, batch in ((1, batches[0]), (1, batches[1]), (0.5, batches[1])):
        agent.update(batch, *torch.randn(2, len(batch.obs), 2))
    obs, batch = torch.cat([batches[i].obs for i in (0, 1, 1, 1)]), batches[0]
    for critic in (agent.critic, agent.target):
        torch.testing.assert_close(critic.mean, obs.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(critic.var, obs.var(0, correction=0), rtol=1e-3, atol=1e-4)
    (first, (norm, up, _, down), last_norm), last = agent.critic.members[1]
    x = first(torch.cat([(batch.obs - agent.critic.mean) / agent.critic.var.sqrt(), batch.action, embedding], -1))
    x = x + down(F.relu(up(F.layer_norm(x, (4,), norm.weight, norm.bias, 1e-6))))
    logits = agent.critic(batch.obs, batch.action, embedding)[1]
    torch.testing.assert_close(logits, last(last_norm(x)), rtol=1e-4, atol=1e-5)
    assert {"mean", "var", "count"} <= agent.state_dict()["critic"].keys()
    agent.share, still = 1, batch._replace(obs=torch.tensor([[0.7, 30.1, -90.3]]) + 1e-5 * torch.rand(6, 3))
    agent = make_agent(critic_depth=1)
    for _ in range(3):
        agent.update(still, *torch.randn(2, 6, 2))
        assert (agent.critic.var >= 0).all() and agent.critic(still.obs, still.action, embedding).isfinite().all()
    assert ((still.obs - agent.critic.mean) / (agent.critic.var + 1e-8).sqrt()).abs().max() < 1


@forked
def test_heads_by_hand():
    load("separate_heads")
    agent, batch = make_agent(), make_batch()
    one_hot = agent.critic.embed(batch.task_id)
    logits = agent.critic(batch.obs, batch.action, one_hot)  # [E, 6, 5]
    body, heads = agent.critic.members[1]
    for row, task in enumerate(batch.task_id.tolist()):
        x = body(torch.cat([batch.obs, batch.action], -1))[row]
        by_hand = heads.weight[5 * task:5 * task + 5] @ x + heads.bias[5 * task:5 * task + 5]
        torch.testing.assert_close(logits[1, row], by_hand)
    for weight in heads.weight.chunk(2):  # each head starts as the one layer of the base does
        torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(4))
    mean, log_std = agent.actor(batch.obs, one_hot)
    x = agent.actor.body(batch.obs)
    torch.testing.assert_close(mean[1], agent.actor.mean.weight[2:] @ x[1] + agent.actor.mean.bias[2:])
    assert log_std.shape == (6, 2)
    logits[:, batch.task_id == 0].sum().backward()  # a task trains its own head
    assert heads.weight.grad[:5].any() and not heads.weight.grad[5:].any()


# ----------------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize("max_bytes", [1e9, 1, 40])
def test_gram_matrix_conflicts_and_principal_components_by_hand(max_bytes):
    a, b, unused = (torch.zeros(size, requires_grad=True) for size in (2, 1, 3))
    gradients = [((1.0, 0.0), 2.0), ((-3.0, 1.0), 1.0), ((0.0, 2.0), -1.0)]  # with respect to a and b

    def loss(task):
        of_a, of_b = gradients[task]
        return (a * torch.tensor(of_a)).sum() + of_b * b.sum()

    gram = diagnose.gram_matrix(loss, 3, [a, unused, b], max_bytes)
    assert gram.tolist() == [[5, -1, -2], [-1, 11, 1], [-2, 1, 5]]
    assert diagnose.conflicts(gram).tolist() == [1.0, 0.5, 0.5]  # two of the three pairs
    gram[0, 0] = np.inf  # the square of a gradient too long for float32
    assert np.isnan(diagnose.conflicts(gram)).tolist() == [True, False, False]
    points, shares = diagnose.principal_components(np.array([[1.0, 1, 0], [4, 5, 0], [7, 9, 0]]))
    np.testing.assert_allclose(points, [[-5, 0], [0, 0], [5, 0]], atol=1e-12)
    np.testing.assert_allclose(shares, [1, 0], atol=1e-12)
    points, shares = diagnose.principal_components(np.array([[1.0], [5]]))  # --embedding-dim 1
    assert points.tolist() == [[-2, 0], [2, 0]] and shares.tolist() == [1, 0]


@pytest.mark.parametrize("script", ["brc_sac.py", "ablations/mse.py", "ablations/mh_sac.py"])
@forked
def test_diagnoses_a_run_and_only_reads_it(script, tmp_path):
    os.chdir(tmp_path)
    program(script, "--tasks", "reach", "push", *FLAGS, "--run-dir", "run")

    def files():
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in Path("run").rglob("*") if path.is_file()}

    before = files()
    rows = {row[:2]: row[2] for row in diagnose.main(diagnose.Args(Path("run"), batch_per_task=8, out=Path("out")))}
    assert files() == before
    assert Path("out/embedding.png").exists() == (script != "ablations/mh_sac.py")
    if script == "ablations/mh_sac.py":
        with pytest.raises(harness.UsageError, match="learned no task embeddings"):
            transfer.load_pretrained(transfer.Args("model", "run"))
    with open("out/diagnostics.csv") as file:
        assert {row["env_step"] for row in csv.DictReader(file)} == {"40"}

    args, agent, normalizer, buffer, _ = diagnose.load_run(Path("run"), "cpu")
    torch.manual_seed(0)
    batches = diagnose.task_batches(buffer, 8)
    noise, _ = torch.randn(2, 8, 2)
    for task, batch in enumerate(batches):
        assert batch.task_id.tolist() == [task] * 8
        batch = batch._replace(reward=normalizer.normalize(batch.reward, batch.task_id, agent.temperature))
        networks = agent.critic, agent.target, agent.actor
        loss, _ = agent.critic_loss(*networks, agent.temperature, args.gamma, batch, noise)
        agent.critic.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in agent.critic.parameters()).sqrt().item()
        assert rows["td_loss", args.tasks[task]] == pytest.approx(loss.item(), rel=1e-5)
        assert rows["gradient_norm", args.tasks[task]] == pytest.approx(norm, rel=1e-4)
    losses = [rows["td_loss", task] for task in args.tasks]
    assert rows["td_loss", "std"] == pytest.approx(abs(losses[0] - losses[1]) / 2)
    assert rows["td_loss", "relative_std"] == pytest.approx(rows["td_loss", "std"] / (sum(losses) / 2))

    Path("file").touch()
    with pytest.raises(harness.UsageError, match="out cannot be made"):
        diagnose.main(diagnose.Args(Path("run"), out=Path("file/out")))
    own, written = Path("out/diagnostics.csv"), Path("out/diagnostics.csv").read_text()
    own.write_text(written.replace(",reach,", ",walker-run,") + written.replace(",40,", ",20,").split("\n", 1)[1])
    diagnose.main(diagnose.Args(Path("run"), batch_per_task=8, out=Path("out")))
    kept = [line for line in own.read_text().splitlines() if ",walker-run," in line or ",20," in line]
    assert len(own.read_text().splitlines()) == len(written.splitlines()) + len(kept) and len(kept) > len(rows)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(harness.RunError, match="is as before"):
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        before = own.read_text()
        diagnose.main(diagnose.Args(Path("run"), batch_per_task=4, out=Path("out")))
    assert own.read_text() == before
    Path("other").mkdir()
    Path("other/diagnostics.csv").write_bytes(b"of,another,script\n\x89")
    with pytest.raises(harness.UsageError, match="no diagnostics.csv of this script"):
        diagnose.main(diagnose.Args(Path("run"), out=Path("other")))
    facts = json.loads(Path("run/args.json").read_text())
    with pytest.MonkeyPatch.context() as patch:  # stopped before its last step: nothing is waited for
        patch.setattr(diagnose, "PATIENCE", -1)
        Path("run/args.json").write_text(json.dumps(facts | {"total_steps": 60}))
        followed = diagnose.main(diagnose.Args(Path("run"), batch_per_task=8, out=Path("out"), follow=True))
        assert {row[:2]: row[2] for row in followed} == rows
        with open("run/lock") as lock:
            assert not diagnose.is_training(Path("run"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert diagnose.is_training(Path("run"))
    Path("run/args.json").write_text(json.dumps(facts | {"critic_depth": 1}))
    with pytest.raises(harness.UsageError, match="are not those of .*brc_sac.py"):
        diagnose.main(diagnose.Args(Path("run")))
    root = {"format": facts["format"], "program": "transfer.py", "own": {}}
    Path("other/args.json").write_text(json.dumps(root))
    for follow in (False, True):  # where no checkpoint will ever be
        with pytest.raises(harness.UsageError, match="other holds the runs of several tasks"):
            diagnose.main(diagnose.Args(Path("other"), follow=follow))
    Path("run/args.json").write_text(json.dumps(facts | {"ranks": 2}))
    with pytest.raises(harness.UsageError, match="a run of 2 processes"):
        diagnose.main(diagnose.Args(Path("run")))


@forked
def test_follows_a_run_to_its_last_step(tmp_path, monkeypatch):
    os.chdir(tmp_path)
    save, written = harness.Run.save, Path("run/diagnostics/diagnostics.csv")

    def steps():
        return [row["env_step"] for row in csv.DictReader(written.open())] if written.exists() else []

    def save_and_wait(run, env_step, *rest):
        save(run, env_step, *rest)
        deadline = time.monotonic() + 120
        while 0 < env_step < 40 and str(env_step) not in steps() and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(harness.Run, "save", save_and_wait)
    process = os.fork()
    if not process:
        try:
            program("ablations/mse.py", "--tasks", "reach", "push", *FLAGS, "--run-dir", "run")
        finally:
            os._exit(0)
    while not Path("run/args.json").exists():
        time.sleep(0.01)
    rows = diagnose.main(diagnose.Args(Path("run"), batch_per_task=8, follow=True))
    os.waitpid(process, 0)
    assert list(dict.fromkeys(steps())) == ["20", "40"]  # step 0 has no transitions yet
    assert len(steps()) == 2 * len(rows)
    diagnose.main(diagnose.Args(Path("run"), batch_per_task=8))
    assert list(dict.fromkeys(steps())) == ["20", "40"] and len(steps()) == 2 * len(rows), "again, in its place"

    args = report.Args((Path("run"),), metric="td_loss", out=Path("x.png"), csv=Path("x.csv"))
    report.main(args)
    of_report = {row["task"]: row for row in csv.DictReader(open("x.csv"))}
    assert list(of_report) == ["reach", "push", "mean of 2 tasks", "std of tasks", "relative_std of tasks"]
    for name, value in (("mean of 2 tasks", "mean"), ("std of tasks", "std"), ("push", "push")):
        assert float(of_report[name]["value"]) == pytest.approx(dict((r[:2], r[2]) for r in rows)["td_loss", value],
                                                               abs=6e-4)
    assert of_report["push"]["method"].startswith("mse") and of_report["push"]["env_step"] == "40"
    report.main(dataclasses.replace(args, mean_only=True))
    assert [row["task"] for row in csv.DictReader(open("x.csv"))] == list(of_report)[2:]
    with pytest.raises(harness.UsageError, match="runs that diagnose.py was run on"):
        report.main(dataclasses.replace(args, runs=(Path("run/tensorboard"),)))
