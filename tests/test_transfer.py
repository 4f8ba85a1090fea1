"""transfer.py on real, tiny checkpoints: what each protocol starts from, what it changes, and what it refuses."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import brc_drq
import brc_sac
import harness
import suites
import transfer
from benchmarks import transfer_report
from suites.vector import Step

SCRIPT = Path(transfer.__file__)
PRETRAINING = ("reach", "drawer-close", "button-press")
EVALUATION = "--eval-episodes 1 --workers 0"
BUDGET = f"--total-steps 40 --learning-starts 10 --batch-size 16 --eval-interval 20 {EVALUATION}"
TRIAL = f"--transitions-per-candidate 5 {EVALUATION}"
MODES = {"zero-shot": EVALUATION, "select": TRIAL, "tune": f"{TRIAL} --tune-transitions 30 --tune-updates 1"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def signals():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def pretrain(run_dir, tasks=PRETRAINING):
    args = brc_sac.Args(tasks=tasks, width=16, actor_width=16, batch_size=16, learning_starts=190, total_steps=205,
                        eval_interval=205, eval_episodes=1, workers=0, device="cpu", seed=1, run_dir=str(run_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "PROGRAM", Path(brc_sac.__file__))
        brc_sac.train(brc_sac.resolve(args))
    return run_dir


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A run on three tasks, just long enough for an episode of each and some updates."""
    return pretrain(tmp_path_factory.mktemp("pretraining") / "pre")


@pytest.fixture
def made(monkeypatch):
    """What the protocols set up, with the agent's state and the return scale right after that."""
    found, prepare = [], transfer.prepare

    def spy(pretrained, run, agent, normalizer, buffer):
        replay = prepare(pretrained, run, agent, normalizer, buffer)
        found.append(SimpleNamespace(run=run, agent=agent, normalizer=normalizer, buffer=buffer, replay=replay,
                                     state=clone(agent.state_dict()), scale=normalizer.return_scale.clone(),
                                     entropy=normalizer.entropy.clone(), steps=buffer.steps))
        return replay

    monkeypatch.setattr(transfer, "prepare", spy)
    return found


def clone(state):
    return {name: clone(value) if isinstance(value, dict) else value.clone() if isinstance(value, torch.Tensor)
            else value for name, value in state.items()}


def parsed(monkeypatch, arguments):
    monkeypatch.setattr(harness, "PROGRAM", SCRIPT)
    monkeypatch.setattr(sys, "argv", ["transfer.py", *arguments.split()])
    return harness.parse_args(*transfer.PARSE)


def go(monkeypatch, arguments):
    """Runs transfer.py in this process; returns the results."""
    return transfer.main(parsed(monkeypatch, arguments))


def refused(monkeypatch, arguments):
    with pytest.raises((harness.UsageError, suites.SuiteError)) as refusal:
        go(monkeypatch, arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def networks(run_dir):
    """Everything in a checkpoint's agent that is a weight."""
    agent = checkpoint(run_dir)["agent"]
    return {f"{part}.{name}": value for part in ("critic", "target", "actor") for name, value in agent[part].items()
            } | {"log_temperature": agent["log_temperature"]}


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def files_under(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- model transfer


@pytest.mark.parametrize("start", ["mean", "best"])
def test_model_transfer_starts_from_the_checkpoint(pretrained, made, monkeypatch, tmp_path, start):
    trials = "--start best --transitions 17" * (start == "best")
    go(monkeypatch, f"model --checkpoint {pretrained} --task window-open --run-dir {tmp_path / 'run'} {trials} "
                    + BUDGET)
    (new,), before, saved = made, networks(pretrained), checkpoint(pretrained)
    for name, value in before.items():
        if "embedding" not in name:
            part, _, key = name.partition(".")
            assert torch.equal(new.state[part][key] if key else new.state[part], value), name
    for name in ("critic", "target"):
        rows = before[f"{name}.embedding.weight"]
        directions, ours = rows / rows.abs().sum(1, keepdim=True), new.state[name]["embedding.weight"][0]
        if start == "mean":
            mean = directions.mean(0)
            torch.testing.assert_close(ours / ours.abs().sum(), mean / mean.abs().sum())
            torch.testing.assert_close(ours.norm(), rows.norm(dim=1).mean())
        else:
            assert (ours == rows).all(1).any()
    assert not new.state["critic_optimizer"]["state"] and not new.state["actor_optimizer"]["state"]
    torch.testing.assert_close(new.entropy, saved["normalizer"]["entropy"].mean().expand(1))
    # 17 transitions for three are five each, in the replay and with every cut-off episode's end in it
    assert new.steps == (15 if start == "best" else 0) and new.buffer.steps == 40
    assert {int(row["env_step"]) for row in table(tmp_path / "run" / "metrics.csv")} == {new.steps, 20, 40}
    if start == "best":
        assert new.buffer.end[:15, 0].nonzero().flatten().tolist() == [4, 9, 14]
        assert [row["transitions"] for row in table(tmp_path / "run" / "candidates.csv")] == ["5"] * 3


def test_temperature_and_names(pretrained, made, monkeypatch, tmp_path):
    trained = networks(pretrained)["log_temperature"]
    for name, options in (("model-transfer", ""), ("model-transfer-initial", "--temperature initial"),
                          ("scratch", "--baseline")):
        go(monkeypatch, f"model --checkpoint {pretrained} --task window-open --run-dir {tmp_path / name} {BUDGET} "
                        + options)
        assert {row["exp_name"] for row in table(tmp_path / name / "metrics.csv")} == {f"brc_sac-{name}"}
        assert torch.equal(made[-1].state["log_temperature"], trained) == (name == "model-transfer")
    assert made[1].state["log_temperature"].item() == np.log(np.float32(0.1))
    sizes = [{name: value.shape for name, value in new.state["critic"].items()} for new in (made[0], made[2])]
    assert sizes[0] == sizes[1] and sizes[0]["embedding.weight"] == (1, 32)


def test_a_pretrained_critic_learns_nothing_before_the_first_episode_has_ended(pretrained, monkeypatch, tmp_path):
    """Its rewards are 0 until then: there is no return scale."""
    prepare, steps, random = transfer.prepare, {}, []

    def spy(pretrained, run, agent, normalizer, buffer):
        replay, update = prepare(pretrained, run, agent, normalizer, buffer), agent.update
        agent.update = lambda *batch: (steps.setdefault(run.dir.name, []).append(buffer.steps), update(*batch))[1]
        return replay

    monkeypatch.setattr(transfer, "prepare", spy)
    monkeypatch.setattr(torch, "rand", lambda *size, rand=torch.rand, **on: (random.append(1), rand(*size, **on))[1])
    for name, options in (("model", ""), ("scratch", "--baseline")):
        go(monkeypatch, f"model --checkpoint {pretrained} --task window-open --run-dir {tmp_path / name} {BUDGET} "
                        f"--total-steps 203 --eval-interval 203 {options}")
        assert len(random) == (0 if name == "model" else 10)  # the policy acts from the first step, or random actions
    assert sorted(set(steps["model"])) == [200, 201, 202] and set(steps["scratch"]) == set(range(10, 203))


# --------------------------------------------------------------------------------------------------- embedding transfer


@pytest.mark.parametrize(("mode", "played"), [("zero-shot", []), ("select", [15]), ("tune", [15, 30, 5])])
def test_embedding_transfer_changes_the_embedding_alone_and_counts_every_transition(
        pretrained, made, monkeypatch, tmp_path, capsys, mode, played):
    steps = {"trial": 0, "agent": 0}

    def counting(kind):
        class Counting(brc_sac.VectorEnv):
            def step_async(self, action):
                super().step_async(action)
                steps[kind] += 1
        return Counting

    monkeypatch.setattr(transfer, "VectorEnv", counting("trial"))
    monkeypatch.setattr(brc_sac, "VectorEnv", counting("agent"))
    run_dir, evaluations = tmp_path / "run", 1 + 2 * (mode == "tune")
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open --mode {mode} {MODES[mode]} "
                    f"--run-dir {run_dir}")
    total = sum(played)
    assert steps == {"trial": total - (30 if mode == "tune" else 0), "agent": (30 if mode == "tune" else 0)
                     + 200 * evaluations}
    assert f"new task: {total} in all" in capsys.readouterr().out.splitlines()[-1]
    assert int(table(run_dir / "metrics.csv")[-1]["env_step"]) == total == checkpoint(run_dir)["env_step"]
    before, after, start = networks(pretrained), networks(run_dir), made[0]
    for name in before.keys() - {"critic.embedding.weight", "target.embedding.weight"}:
        assert torch.equal(before[name], after[name]), name
    rows = before["critic.embedding.weight"]
    (row,) = (start.state["critic"]["embedding.weight"] == rows).all(1).nonzero()  # a pretrained one, to the last bit
    assert torch.equal(start.state["target"]["embedding.weight"], before["target.embedding.weight"][row])
    assert torch.equal(start.scale, checkpoint(pretrained)["normalizer"]["return_scale"][row])
    if mode == "tune":  # what was learned, before the last trial: the first stage's end
        assert len(made) == 2 and made[1].steps == 45  # of the tuned one's trial nothing is stored
        assert not torch.equal(made[0].agent.critic.embedding.weight, start.state["critic"]["embedding.weight"])
    else:
        assert torch.equal(after["critic.embedding.weight"], start.state["critic"]["embedding.weight"])


def test_in_tune_the_targets_embedding_lags_behind(pretrained):
    saved = checkpoint(pretrained)["agent"]
    agent = brc_sac.Agent(brc_sac.resolve(harness.read_args(pretrained, brc_sac.Args)[0]), *saved["sizes"])
    agent.load_state_dict(saved)
    transfer.freeze_all_but_embedding(agent, brc_sac.optimize)
    for _ in range(3):
        before = clone(agent.state_dict())
        batch = brc_sac.Batch(torch.randn(8, 39), torch.rand(8, 4), torch.rand(8), torch.zeros(8), torch.randn(8, 39),
                              torch.randint(3, (8,)))
        _, log_prob = agent.update(batch, torch.randn(8, 4), torch.randn(8, 4))
        after = agent.state_dict()
        assert log_prob.shape == (8,) and not log_prob.requires_grad
        critic, target = (after[name].pop("embedding.weight") for name in ("critic", "target"))
        old = before["target"].pop("embedding.weight")
        torch.testing.assert_close(target, 0.995 * old + 0.005 * critic)
        assert not torch.equal(critic, before["critic"].pop("embedding.weight")) and not torch.equal(target, critic)
        for part in ("critic", "target", "actor"):
            assert all(torch.equal(value, before[part][name]) for name, value in after[part].items())


@pytest.mark.parametrize("tuned", [0.1, 0.9])
def test_the_tuned_embedding_is_kept_only_if_it_did_better(pretrained, made, monkeypatch, tmp_path, tuned):
    scores, trial = iter([0.2, 0.5, 0.3, tuned]), transfer.trial
    monkeypatch.setattr(transfer, "trial", lambda *inputs: trial(*inputs) | {"return": 1.0, "score": next(scores)})
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open --mode tune {MODES['tune']} "
                    f"--run-dir {tmp_path / 'run'}")
    row, rows = networks(tmp_path / "run")["critic.embedding.weight"], networks(pretrained)["critic.embedding.weight"]
    assert (row == rows).all(1).any() == (tuned < 0.5)
    assert torch.equal(made[1].agent.critic.embedding.weight, row)


class Episodes:
    """In VectorEnv's place: a reward of 1 a step, and episodes of scripted lengths."""

    def __init__(self, *lengths):
        self.lengths, self.seeds, self.calls = lengths, [], 0

    def __call__(self, tasks, seed, pad_to):
        self.left = list(self.lengths)
        return self

    def reset(self, seed):
        self.seeds.append(seed)
        return np.zeros((1, 39), np.float32)

    def step(self, action):
        self.calls += 1
        self.left[0] -= 1
        ended = self.left[0] == 0
        self.left = self.left[ended:]
        obs, one = np.zeros((1, 39), np.float32), np.ones(1, np.float32)
        return Step(obs=obs, reward=one, terminated=np.array([ended]), truncated=np.zeros(1, bool), next_obs=obs,
                    success=np.full(1, np.nan, np.float32))

    def close(self):
        pass


def test_a_trial_does_not_rank_a_cut_off_episode_against_whole_ones(monkeypatch):
    args = transfer.Args(method="embedding", candidates=1, transitions_per_candidate=300)
    source = SimpleNamespace(args=args, space=(39, 4))
    run = SimpleNamespace(args=SimpleNamespace(tasks=("walker-walk",), seed=0), stop=0,
                          bar=SimpleNamespace(update=lambda: None))
    agent = SimpleNamespace(device="cpu", act=lambda obs, noise: torch.zeros(1, 4))
    for lengths, expected in (((290, 99), 290), ((150, 150, 99), 150), ((100, 150, 99), 125), ((1000,), 300)):
        envs = Episodes(*lengths)
        monkeypatch.setattr(transfer, "VectorEnv", envs)
        assert transfer.trial(source, run, agent, "x")["return"] == expected and envs.calls == 300


def test_chance_orders_the_candidates_by_seed_and_task(pretrained, monkeypatch, tmp_path):
    tasks = SimpleNamespace(old=SimpleNamespace(tasks=tuple(range(85))), args=SimpleNamespace(candidates=3))
    drawn = {(seed, task): tuple(transfer.draw(tasks, SimpleNamespace(args=SimpleNamespace(seed=seed, tasks=(task,)))))
             for seed in range(2) for task in ("apple", "bell")}
    assert len(set(drawn.values())) == 4 and all(len(set(rows)) == 3 for rows in drawn.values())
    monkeypatch.setattr(transfer, "trial", lambda *inputs: {"return": 0.0, "score": 0.0})  # all equal
    seen, set_embedding = [], transfer.set_embedding
    monkeypatch.setattr(transfer, "set_embedding", lambda *inputs: (seen.append(inputs[2]), set_embedding(*inputs)))
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open {TRIAL} --run-dir {tmp_path / 'equal'}")
    assert seen.pop() == seen[0] and sorted(seen) == [0, 1, 2]  # of equals the first that was drawn
    seen.clear()
    results = iter([{"return": 9.0, "score": 0.0}, {"return": 1.0, "score": 0.5}, {"return": 2.0, "score": 0.5}])
    monkeypatch.setattr(transfer, "trial", lambda *inputs: next(results))
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open {TRIAL} --run-dir {tmp_path / 'run'}")
    assert seen[3] == seen[2]  # by score, then by return


@pytest.mark.parametrize(("options", "numbers"), [
    ("--mode select", (3, 300, 900, 900)), ("--mode select --candidates 2", (2, 300, 600, 600)),
    ("--mode select --transitions 100", (3, 33, 99, 99)), ("--mode select --candidates 2 --transitions 300",
                                                           (2, 150, 300, 300)),
    ("--mode tune --transitions 300", (3, 100, 300, 999)), ("--mode tune", (3, 300, 900, 2100)),
    ("--mode tune --transitions 300 --tune-transitions 50", (3, 100, 300, 450)), ("--mode zero-shot", (3, 300, 0, 0))])
def test_budgets(pretrained, monkeypatch, options, numbers):
    args = parsed(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open {options}")
    assert (args.candidates, args.transitions_per_candidate, args.spent, args.cost) == numbers


# -------------------------------------------------------------------------------------------------------- data transfer


@pytest.mark.parametrize("prior", ["separate", "merged"])
def test_half_of_each_batch_comes_from_the_pretraining_replay(pretrained, made, monkeypatch, tmp_path, prior):
    before = files_under(pretrained)
    go(monkeypatch, f"data --checkpoint {pretrained} --task cartpole-balance --run-dir {tmp_path / 'run'} {BUDGET} "
                    f"--prior-tasks {prior}")
    assert files_under(pretrained) == before
    (new,), saved = made, checkpoint(pretrained)["normalizer"]
    source = brc_sac.ReplayBuffer(3, 39, 4, 205)
    harness.read_checkpoint(pretrained, source)
    if prior == "separate":
        assert new.agent.sizes == (39, 4, 1, 4) and torch.equal(new.scale, torch.cat([torch.tensor([math.inf]),
                                                                                     saved["return_scale"]]))
    else:
        assert new.agent.sizes == (39, 4, 1, 0) and new.scale == saved["return_scale"].max()
    steps = source.rows[:205]  # [T, N, O + A + 2]
    for _ in range(3):
        batch = new.replay.sample(17)
        whole = torch.cat([batch.obs, batch.action, batch.reward[:, None], batch.terminated[:, None]], 1)
        known = (whole[:, None, None] == steps).all(-1).any(1)  # [B, N]
        assert known.any(1).tolist() == [False] * 9 + [True] * 8
        expected = known[9:].int().argmax(1) + 1 if prior == "separate" else torch.zeros(8)
        assert (batch.task_id[:9] == 0).all() and torch.equal(batch.task_id[9:], expected.long())
        assert (batch.obs[:9, :5] != 0).any() and (batch.obs[:9, 5:] == 0).all()  # a smaller task is padded
    assert new.agent.target_entropy == -2
    assert {row["env_name"] for row in table(tmp_path / "run" / "metrics.csv")} == {"cartpole-balance", "mean"}


def test_the_replay_is_needed_for_data_transfer_alone_and_a_damaged_checkpoint_left_as_it_is(
        pretrained, monkeypatch, tmp_path):
    run_dir = tmp_path / "pre"
    shutil.copytree(pretrained, run_dir)
    torch.save(checkpoint(pretrained) | {"replay": {}}, run_dir / "checkpoint.previous.pt")
    (run_dir / "checkpoint.pt").write_bytes(b"damaged")
    before = files_under(run_dir)
    assert "saved without its replay" in refused(
        monkeypatch, f"data --checkpoint {run_dir} --task window-open --run-dir {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
    go(monkeypatch, f"embedding --checkpoint {run_dir} --task window-open --mode zero-shot {EVALUATION} "
                    f"--run-dir {tmp_path / 'run'}")
    assert files_under(run_dir) == before


# ------------------------------------------------------------------------------------------------- programs, refusals


def test_the_agent_is_the_program_that_wrote_the_checkpoint(pretrained, monkeypatch, tmp_path, capsys):
    idea, ablation = tmp_path / "my_idea.py", tmp_path / "my_ablation.py"
    idea.write_text(Path(brc_sac.__file__).read_text().replace("class Agent:", "class Agent:\n    MINE = True\n"))
    ablation.write_text("import brc_sac\n\nbrc_sac.Agent.ABLATED = True\n")
    for path, mark in ((idea, "MINE"), (ablation, "ABLATED"), (Path("/nowhere/brc_sac.py"), "PARTS")):
        run_dir = tmp_path / f"{path.stem}-run"
        shutil.copytree(pretrained, run_dir)
        facts = json.loads((pretrained / "args.json").read_text()) | {"program": str(path)}
        (run_dir / "args.json").write_text(json.dumps(facts))
        go(monkeypatch, f"embedding --mode zero-shot --checkpoint {run_dir} --task window-open {EVALUATION} --run-dir "
                        f"{tmp_path / path.stem}")
        assert hasattr(transfer.load_pretrained(transfer.Args("model", str(run_dir))).agent.Agent, mark)
        assert {row["exp_name"] for row in table(tmp_path / path.stem / "metrics.csv")} == {
            f"{path.stem}-embedding-zero-shot"}
        source = transfer.load_pretrained(transfer.Args("model", str(tmp_path / path.stem)))  # a transferred run
        assert hasattr(source.agent.Agent, mark) and len(source.embeddings["critic"]) == 2
    del brc_sac.Agent.ABLATED
    (run_dir / "args.json").write_text(json.dumps(facts | {"program": "/nowhere/lost_idea.py"}))
    assert "written by lost_idea.py" in refused(monkeypatch, f"model --checkpoint {run_dir} --task window-open")


@pytest.mark.parametrize(("arguments", "message"), [
    ("model --checkpoint {pre} --task walker-walk", "observation size 24 and action size 6, .* take 39 and 4"),
    ("model --checkpoint {pre} --task window-opne", "Unknown task 'window-opne': did you mean window-open"),
    ("model --checkpoint {pre} --task window-open window-open", "'window-open' was given more than once"),
    ("data --checkpoint {pre} --task reach", "reach was in the pretraining of .*--allow-seen"),
    ("model --checkpoint {pre} --task Pong", "Pong is an Atari game"),
    ("model --checkpoint {pre} --suite demo", "'demo' has no transfer tasks: .* mw, hb-medium, hb-hard, sh, atari"),
    ("model --checkpoint {pre}", "Give either --task .* or --suite"),
    ("model --task window-open", "No --checkpoint was given"),
    ("model --checkpoint nowhere --task window-open", "nowhere holds no run"),
    ("model --checkpoint {damaged} --task window-open", "No complete checkpoint in .*damaged"),
    ("model --checkpoint {other} --task window-open", "does not fit its args.json"),
    ("model --checkpoint {several} --task window-open", "several holds the runs of several tasks"),
    ("model --checkpoint {pre} --task window-open --total-steps 0", "--total-steps 0"),
    ("model --checkpoint {pre} --task window-open --start best --total-steps 900 --learning-starts 5",
     "--total-steps is 900 and the trials take 900"),
    ("model --checkpoint {pre} --task window-open --device quantum", "Device 'quantum' is not on this machine"),
    ("model --resume {pre}", "pre is not a run of transfer.py: to go on with it, python .*brc_sac.py --resume"),
    ("model --checkpoint {games} --task Boxing --temperature initial", "--temperature has no effect .* in Atari"),
    ("model --checkpoint {pre} --task window-open --baseline --temperature initial", "no effect with model --baseline"),
    ("embedding --checkpoint {pre} --task window-open --start best", "--start has no effect with embedding"),
    ("embedding --checkpoint {pre} --task window-open --full-map --mode zero-shot", "--full-map has no effect"),
    ("embedding --checkpoint {pre} --task window-open --tune-updates 2", "no effect with embedding --mode select:"),
    ("embedding --checkpoint {pre} --task window-open --total-steps 9", "--total-steps has no effect with embedding"),
    ("model --checkpoint {pre} --task window-open --candidates 2", "no effect with model --start mean"),
    ("embedding --checkpoint {pre} --task window-open --candidates 4", "--candidates is 4: .* at least 1 and at most 3"),
    ("embedding --checkpoint {pre} --task window-open --transitions 2", "--transitions is 2: .* at least 3"),
    ("embedding --checkpoint {pre} --task window-open --transitions 9 --transitions-per-candidate 3", "has no effect"),
    ("embedding --checkpoint {pre} --task window-open --mode tune --transitions 800", "at least 3 and at most 741"),
    ("embedding --checkpoint {pre} --task window-open --mode tune --transitions 300 --tune-transitions 600",
     "at least 10 and at most 599"),
    ("embedding --checkpoint {single} --task window-open", "has no task embeddings"),
])
def test_what_cannot_be_run_is_refused_in_one_sentence_and_creates_nothing(
        pretrained, monkeypatch, tmp_path, arguments, message):
    folders = {name: tmp_path / name for name in ("games", "damaged", "other", "single", "several")} | {"pre": pretrained}
    facts = json.loads((pretrained / "args.json").read_text())
    for name, change in (("games", {"tasks": ["Pong"]}), ("damaged", {}), ("other", {"width": 32}),
                         ("single", {}), ("several", {"tasks": None})):
        folders[name].mkdir()
        kept = {key: value for key, value in (facts | change).items() if value is not None or key != "tasks"}
        (folders[name] / "args.json").write_text(json.dumps(kept))
        shutil.copy(pretrained / "checkpoint.pt", folders[name])
    (folders["damaged"] / "checkpoint.pt").write_bytes((pretrained / "checkpoint.pt").read_bytes()[:5000])
    if "{single}" in arguments:
        shutil.rmtree(folders["single"])
        pretrain(folders["single"], ("reach",))
    before = files_under(tmp_path) | files_under(pretrained)
    monkeypatch.chdir(tmp_path)
    text = refused(monkeypatch, arguments.format(**folders))
    assert re.search(message, text), text
    assert files_under(tmp_path) | files_under(pretrained) == before


def test_the_script_itself_exits_with_2_and_a_sentence(pretrained, tmp_path):
    process = subprocess.run([sys.executable, SCRIPT, *f"model --checkpoint {pretrained} --task walker-walk".split()],
                             cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("transfer.py: walker-walk has observation size") and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- resuming


def test_several_tasks_go_on_after_a_stop_and_draw_the_map(pretrained, monkeypatch, tmp_path, capsys):
    """Stopped in the first task's trials, which are made again, and after them, when they are not."""
    run_dir, tasks, trial, trials = tmp_path / "run", ("window-open", "cartpole-balance"), transfer.trial, []

    def stopping(pretrained, run, agent, name, *into):
        trials.append((run.args.tasks[0], name))
        if len(trials) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return trial(pretrained, run, agent, name, *into)

    monkeypatch.setattr(transfer, "trial", stopping)
    arguments = (f"embedding --checkpoint {pretrained} --task {' '.join(tasks)} --mode select {TRIAL} --full-map "
                 f"--run-dir {run_dir}")
    with pytest.raises(SystemExit) as stopped:
        go(monkeypatch, arguments)
    assert stopped.value.code == 128 + signal.SIGTERM
    del stopped  # its traceback holds the run, and so the lock
    assert not (run_dir / tasks[0] / "checkpoint.pt").exists()
    with monkeypatch.context() as patch:
        patch.setattr(brc_sac, "evaluate", lambda *inputs: (os.kill(os.getpid(), signal.SIGINT), ([], []))[1])
        with pytest.raises(SystemExit):
            go(patch, f"embedding --resume {run_dir}")
    results = go(monkeypatch, f"embedding --resume {run_dir}")
    assert [task for task, _ in trials] == [tasks[0]] * 5 + [tasks[1]] * 3 and len(results) == 2
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith((*tasks, "mean"))][-3:] == [*tasks, "mean"]
    rows = [list(row.values()) for row in table(run_dir / "embedding_map.csv")]
    scores = {task: table(run_dir / task / "candidates.csv") for task in tasks}
    assert rows == [[task, *(row["score"] for row in scores[task])] for task in tasks]
    assert [row["embedding"] for row in scores[tasks[0]]] == list(PRETRAINING)
    assert (run_dir / "embedding_map.png").stat().st_size > 1000
    # Once more changes nothing in them, and neither brc_sac.py nor another method takes a run for its own.
    before = files_under(run_dir / tasks[0])
    go(monkeypatch, f"embedding --resume {run_dir}")
    assert files_under(run_dir / tasks[0]) == before and "window-open is finished." in capsys.readouterr().out
    assert "cannot become data" in refused(monkeypatch, f"data --resume {run_dir}")
    assert "--seed is 0" in refused(monkeypatch, f"embedding --resume {run_dir / tasks[0]} --seed 7")
    assert "already holds files" in refused(monkeypatch, arguments)
    monkeypatch.setattr(harness, "PROGRAM", Path("brc_sac.py"))
    monkeypatch.setattr(sys, "argv", ["brc_sac.py", "--resume", str(run_dir / tasks[1])])
    with pytest.raises(harness.UsageError, match="transfer.py embedding --resume"):
        harness.parse_args(brc_sac.Args, brc_sac.resolve, "")


def test_a_stopped_tune_goes_on_to_the_same_bits(pretrained, monkeypatch, tmp_path):
    add, tune = brc_sac.ReplayBuffer.add, MODES["tune"]
    start = f"embedding --checkpoint {pretrained} --task window-open --mode tune {tune} --run-dir {tmp_path}/"
    go(monkeypatch, start + "whole")

    def add_and_stop(buffer, *step):
        add(buffer, *step)
        if buffer.steps == 45:  # as the first stage ends: no episode is cut
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(brc_sac.ReplayBuffer, "add", add_and_stop)
    with pytest.raises(SystemExit):
        go(monkeypatch, start + "stopped")
    monkeypatch.setattr(brc_sac.ReplayBuffer, "add", add)
    go(monkeypatch, f"embedding --resume {tmp_path / 'stopped'}")
    whole, stopped = networks(tmp_path / "whole"), networks(tmp_path / "stopped")
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    assert table(tmp_path / "whole" / "metrics.csv")[-3:] == table(tmp_path / "stopped" / "metrics.csv")[-3:]


def test_a_run_goes_on_with_more_steps_and_is_evaluated_by_the_agent(pretrained, made, monkeypatch, tmp_path, capsys):
    for method, name in (("data", "data"), ("embedding --mode zero-shot", "zero")):
        go(monkeypatch, f"{method} --checkpoint {pretrained} --task cartpole-balance --run-dir {tmp_path / name} "
                        + (BUDGET if name == "data" else EVALUATION))
    go(monkeypatch, f"data --resume {tmp_path / 'data'} --total-steps 60")
    assert [row["env_step"] for row in table(tmp_path / "data" / "metrics.csv") if row["env_name"] == "mean"
            and row["metric"] == "score"] == ["20", "40", "60"]
    monkeypatch.setattr(harness, "PROGRAM", Path("brc_sac.py"))
    for name in ("data", "zero"):
        monkeypatch.setattr(sys, "argv", ["brc_sac.py", "--evaluate", str(tmp_path / name)])
        capsys.readouterr()
        brc_sac.main()
        assert "cartpole-balance" in capsys.readouterr().out


def test_a_suite_is_all_of_its_transfer_tasks(pretrained, monkeypatch):
    assert parsed(monkeypatch, f"model --checkpoint {pretrained} --suite mw").task == suites.SUITES["mw"].transfer


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_draws_curves_and_a_table_with_intervals(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for method, level in (("scratch", 0.1), ("model", 0.6)):
        for seed in range(3):
            folder = tmp_path / f"{method}{seed}"
            folder.mkdir()
            rows = [f"{method},{task},{seed},score,{step},{level + 0.1 * rng.random():.4f}"
                    for task in ("a", "b") for step in (0, 10, 20)]
            (folder / "metrics.csv").write_text("\n".join(["exp_name,env_name,seed,metric,env_step,value", *rows, ""]))
    (tmp_path / "select").mkdir()
    (tmp_path / "select" / "metrics.csv").write_text(
        "exp_name,env_name,seed,metric,env_step,value\nselect,a,0,score,15,0.5\nselect,mean,0,score,15,0.5\n")
    transfer_report.main(transfer_report.Args(runs=(tmp_path,), png=tmp_path / "x.png", csv=tmp_path / "x.csv"))
    assert (tmp_path / "x.png").stat().st_size > 5000
    with open(tmp_path / "x.csv", newline="") as file:
        rows = {(row["task"], row["method"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {("a", "scratch"), ("b", "scratch"), ("a", "model"), ("b", "model"), ("a", "select")}
    for method, level in (("scratch", 0.1), ("model", 0.6)):
        row = rows["a", method]
        assert row["seeds"] == "3" and row["env_step"] == "20"
        low, last, high = (float(row[name]) for name in ("last_low", "last", "last_high"))
        assert level <= low < last < high <= level + 0.1
    assert float(rows["a", "select"]["last"]) == 0.5
    assert "| a | model | 3 | 20 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="No metrics.csv"):
        transfer_report.main(transfer_report.Args(runs=(tmp_path,), metric="nonsense"))



# ---------------------------------------------------------------------------------------------------------------- Atari


@pytest.mark.skipif(not hasattr(brc_drq, "Start"), reason="brc_drq.py does not run on harness.py yet")
def test_all_protocols_take_a_checkpoint_of_brc_drq(monkeypatch, tmp_path):
    pre, budget = tmp_path / "pre", "--total-steps 16 --learning-starts 10 --batch-size 4 --eval-interval 16 --no-compile"
    args = brc_drq.Args(tasks=("Pong", "Breakout"), encoder_scale=1 / 128, hidden_width=8, batch_size=4, max_frames=80,
                        learning_starts=20, total_steps=24, eval_episodes=1, final_eval_episodes=1, device="cpu", compile=False,
                        run_dir=str(pre))
    monkeypatch.setattr(harness, "PROGRAM", Path(brc_drq.__file__))
    brc_drq.train(brc_drq.resolve(args))
    trial = "--transitions-per-candidate 5 --tune-transitions 12 --tune-updates 1"
    for name, arguments in (("model", f"model {budget}"), ("data", f"data {budget}"),
                            ("zero-shot", "embedding --mode zero-shot"), ("tune", f"embedding --mode tune {trial}")):
        go(monkeypatch, f"{arguments} --checkpoint {pre} --task Bowling --eval-episodes 1 --run-dir {tmp_path / name}")
    agents = {name: checkpoint(tmp_path / name)["agent"] for name in ("pre", "zero-shot", "tune")}
    for part in ("critic", "target"):
        for name, value in agents["pre"][part].items():
            if name != "embedding.weight":
                assert all(torch.equal(value, agent[part][name]) for agent in agents.values())
    rows = agents["pre"]["critic"]["embedding.weight"]
    assert (agents["zero-shot"]["critic"]["embedding.weight"] == rows).all(1).any()
    assert [int(table(tmp_path / name / "metrics.csv")[-1]["env_step"]) for name in ("model", "data", "zero-shot", "tune")
            ] == [16, 16, 0, 27]
    assert "reach" in refused(monkeypatch, f"model --checkpoint {pre} --task reach")
