"""transfer.py on real, tiny checkpoints: what each protocol starts from, what it changes, and what it refuses."""

import dataclasses
import json
import math
import re
import shutil
import signal
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import brc_drq
import brc_sac
import harness
import suites
import transfer
from benchmarks import report
from conftest import Pendulum, Program, checkpoint, files_under, read_csv, steps_of
from suites.vector import VectorEnv

SCRIPT = Path(transfer.__file__)
PRETRAINING = ("reach", "drawer-close", "button-press")
BUDGET = "--total-steps 40 --learning-starts 10 --batch-size 16 --eval-interval 20"
PROTOCOLS = {"model": f"model {BUDGET}", "data": f"data {BUDGET}", "zero-shot": "embedding --mode zero-shot",
             "select": "embedding --mode select --transitions-per-candidate 5",
             "tune": "embedding --mode tune --transitions-per-candidate 5 --tune-transitions 30 --tune-updates 1"}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A run on three tasks, just long enough for an episode of each and some updates."""
    run_dir = tmp_path_factory.mktemp("pretraining") / "pre"
    args = brc_sac.Args(tasks=PRETRAINING, width=16, actor_width=16, batch_size=16, learning_starts=190, workers=0,
                        total_steps=205, eval_interval=205, eval_episodes=1, device="cpu", seed=1, run_dir=str(run_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "PROGRAM", Path(brc_sac.__file__))
        brc_sac.train(brc_sac.resolve(args))
    return run_dir


@dataclasses.dataclass
class Transfers:
    """transfer.py in this process; `made` is what its protocols set up, with the learner's state right after that."""

    pre: Path
    folder: Path
    patch: pytest.MonkeyPatch
    made: list = dataclasses.field(default_factory=list)

    def spy(self, pretrained, of_all, run, agent, normalizer, buffer, prepare=transfer.prepare):
        replay = prepare(pretrained, of_all, run, agent, normalizer, buffer)
        state = deepcopy(agent.state_dict()) | {"normalizer": deepcopy(normalizer.state_dict()), "steps": buffer.steps}
        self.made.append(SimpleNamespace(agent=agent, buffer=buffer, replay=replay, **state))
        return replay

    def program(self, script, arguments: str) -> None:
        self.patch.setattr(harness, "PROGRAM", Path(script))
        self.patch.setattr(sys, "argv", [Path(script).name, *arguments.split()])

    def parse(self, arguments: str) -> transfer.Args:
        self.program(SCRIPT, arguments)
        return harness.parse_args(*transfer.PARSE)

    def call(self, arguments: str) -> list[dict]:
        return transfer.main(self.parse(arguments))

    def go(self, protocol: str, options="", run="run", task="window-open", pre: Path | None = None) -> Path:
        """Runs the protocol with its small budget; returns the run directory."""
        self.call(f"{PROTOCOLS[protocol]} --eval-episodes 1 --workers 0 --checkpoint {pre or self.pre} --task {task} "
                  f"--run-dir {self.folder / run} {options}")
        return self.folder / run

    def refused(self, arguments: str) -> str:
        with pytest.raises((harness.UsageError, suites.SuiteError)) as refusal:
            self.call(arguments)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    def copy(self, name: str, **changes) -> Path:
        """A copy of the pretraining with other facts in its args.json."""
        shutil.copytree(self.pre, self.folder / name)
        facts = json.loads((self.pre / "args.json").read_text()) | changes
        (self.folder / name / "args.json").write_text(json.dumps(facts))
        return self.folder / name


@pytest.fixture
def transfers(pretrained, tmp_path, monkeypatch) -> Transfers:
    transfers = Transfers(pretrained, tmp_path, monkeypatch)
    monkeypatch.setattr(transfer, "prepare", transfers.spy)
    return transfers


def networks(agent: dict) -> dict:
    """Everything in an agent's state that is a weight."""
    return {f"{part}.{name}": value for part in ("critic", "target", "actor") for name, value in agent[part].items()
            } | {"log_temperature": agent["log_temperature"]}


# ------------------------------------------------------------------------------------------------------- model transfer


@pytest.mark.parametrize(("name", "options", "spent"), [
    ("model-transfer", "", 0), ("model-transfer-initial", "--temperature initial", 0), ("scratch", "--baseline", 0),
    ("model-transfer-best", "--start best --transitions 17", 15)])  # 17 transitions for three are five each
def test_model_transfer_starts_from_the_checkpoint(transfers, name, options, spent):
    run_dir = transfers.go("model", options)
    (new,), saved, baseline = transfers.made, checkpoint(transfers.pre), name == "scratch"
    before, state = networks(saved["agent"]), networks(vars(new))
    assert {key: value.shape for key, value in state.items()} == {
        key: (1, 32) if "embedding" in key else value.shape for key, value in before.items()}
    weights = {key for key in before if "embedding" not in key}
    changed = {"log_temperature"} if name == "model-transfer-initial" else weights if baseline else set()
    assert {key for key in weights if torch.equal(state[key], before[key])} == weights - changed
    assert not changed or state["log_temperature"].item() == np.log(np.float32(0.1))
    for network in () if baseline else ("critic", "target"):
        rows, ours = before[f"{network}.embedding.weight"], state[f"{network}.embedding.weight"][0]
        mean = (rows / rows.abs().sum(1, keepdim=True)).mean(0)
        if spent:
            assert (ours == rows).all(1).any()
        else:
            torch.testing.assert_close(ours / ours.abs().sum(), mean / mean.abs().sum())
            torch.testing.assert_close(ours.norm(), rows.norm(dim=1).mean())
    assert not new.critic_optimizer["state"] and not new.actor_optimizer["state"]
    if not baseline:
        torch.testing.assert_close(new.normalizer["entropy"], saved["normalizer"]["entropy"].mean().expand(1))
    rows = read_csv(run_dir / "metrics.csv")
    assert {row["exp_name"] for row in rows} == {f"brc_sac-{name}"}
    assert {int(row["env_step"]) for row in rows} == {20, 40} | ({spent}, set())[baseline]
    assert new.steps == spent and new.buffer.steps == 40
    if spent:  # in the replay, with every cut-off episode's end in it, and without a return scale, that of whole ones
        assert new.normalizer["return_scale"].isinf().all() and new.normalizer["episode_rewards"] == [[]]
        assert new.buffer.end[:15, 0].nonzero().flatten().tolist() == [4, 9, 14]
        assert [row["transitions"] for row in read_csv(run_dir / "candidates.csv")] == ["5"] * 3


def test_more_steps_at_resume_change_no_interval(transfers, monkeypatch):
    run_dir = transfers.folder / "run"
    monkeypatch.setattr(brc_sac, "evaluate", lambda *inputs: ([{"return": 0.0, "success": 0.0, "score": 0.0}], [[]]))
    begin = (f"--learning-starts 10 --batch-size 16 --checkpoint {transfers.pre} --task window-open --eval-episodes 2 "
             f"--workers 0 --run-dir {run_dir}")
    for total_steps, arguments in ((40, begin), (80, f"--resume {run_dir}")):
        transfers.call(f"model {arguments} --total-steps {total_steps}")
        facts = json.loads((run_dir / "args.json").read_text())
        assert (facts["total_steps"], facts["eval_interval"], facts["eval_episodes"]) == (total_steps, 2, 2)


def test_a_pretrained_critic_learns_nothing_before_the_first_episode_has_ended(transfers, monkeypatch):
    """Its rewards are 0 until then: there is no return scale."""
    update, steps, random = brc_sac.Agent.update, {"model": [], "scratch": []}, []
    monkeypatch.setattr(torch, "rand", lambda *size, rand=torch.rand, **on: (random.append(1), rand(*size, **on))[1])
    for name, options in (("model", ""), ("scratch", "--baseline")):
        monkeypatch.setattr(brc_sac.Agent, "update", lambda *inputs, name=name: (
            steps[name].append(transfers.made[-1].buffer.steps), update(*inputs))[1])
        transfers.go("model", f"--total-steps 203 --eval-interval 203 {options}", name)
        assert len(random) == (0 if name == "model" else 10)  # the policy acts from the first step, or random actions
    assert sorted(set(steps["model"])) == [200, 201, 202] and set(steps["scratch"]) == set(range(10, 203))


# --------------------------------------------------------------------------------------------------- embedding transfer


@pytest.mark.parametrize(("mode", "spent", "tuned"), [("zero-shot", 0, 0), ("select", 15, 0), ("tune", 15 + 5, 30)])
def test_embedding_transfer_changes_the_embedding_alone_and_counts_every_transition(
        transfers, monkeypatch, capsys, mode, spent, tuned):
    steps, step_async = [], VectorEnv.step_async
    monkeypatch.setattr(VectorEnv, "step_async", lambda envs, action: (steps.append(1), step_async(envs, action)))
    run_dir, total = transfers.go(mode), spent + tuned
    assert len(steps) == total + 200 * (3 if tuned else 1)  # those of evaluations are not counted
    assert f"new task: {total} in all" in capsys.readouterr().out.splitlines()[-1]
    assert int(read_csv(run_dir / "metrics.csv")[-1]["env_step"]) == total == checkpoint(run_dir)["env_step"]
    saved, start = checkpoint(transfers.pre), transfers.made[0]
    before, after = networks(saved["agent"]), networks(checkpoint(run_dir)["agent"])
    for name in before.keys() - {"critic.embedding.weight", "target.embedding.weight"}:
        assert torch.equal(before[name], after[name]), name
    first = start.critic["embedding.weight"]
    (row,) = (first == before["critic.embedding.weight"]).all(1).nonzero()  # a pretrained one, to the last bit
    assert torch.equal(start.target["embedding.weight"], before["target.embedding.weight"][row])
    assert torch.equal(start.normalizer["return_scale"], saved["normalizer"]["return_scale"][row])
    if tuned:  # what was learned, before the last trial: the first stage's end
        assert len(transfers.made) == 2 and transfers.made[1].steps == 45  # of the tuned one's trial nothing is stored
        moved, lagging = (
            (getattr(start.agent, network).embedding.weight - getattr(start, network)["embedding.weight"]).norm()
            for network in ("critic", "target"))
        assert 0 < lagging < 0.5 * moved
    else:
        assert torch.equal(after["critic.embedding.weight"], first)


@pytest.mark.parametrize("tuned", [0.1, 0.9])
def test_the_tuned_embedding_is_kept_only_if_it_did_better(transfers, monkeypatch, tuned):
    scores, trial = iter([0.2, 0.5, 0.3, tuned]), transfer.trial
    monkeypatch.setattr(transfer, "trial", lambda *inputs: trial(*inputs) | {"return": 1.0, "score": next(scores)})
    row = networks(checkpoint(transfers.go("tune"))["agent"])["critic.embedding.weight"]
    rows = checkpoint(transfers.pre)["agent"]["critic"]["embedding.weight"]
    assert (row == rows).all(1).any() == (tuned < 0.5)
    assert torch.equal(transfers.made[1].agent.critic.embedding.weight, row)


class Scripted(Pendulum):
    """A reward of 1 a step, and episodes of these lengths."""

    def reset(self, **options):
        self.length = next(self.lengths)
        return super().reset(**options)

    def step(self, action):
        obs, *_, info = super().step(action)
        return obs, 1.0, self.t == self.length, False, info


@pytest.mark.parametrize(("lengths", "expected"), [
    ((290, 99), 290), ((150, 150, 99), 150), ((100, 150, 99), 125), ((1000,), 300)])
def test_a_trial_does_not_rank_a_cut_off_episode_against_whole_ones(monkeypatch, lengths, expected):
    source = SimpleNamespace(args=transfer.Args("embedding", transitions_per_candidate=300), space=(39, 4))
    run = SimpleNamespace(args=SimpleNamespace(tasks=("walker-walk",), seed=0, goals="fresh"), stop=0, step=mock.Mock())
    agent, env = SimpleNamespace(device="cpu", act=lambda obs, noise: torch.zeros(1, 4)), Scripted()
    env.lengths = iter(lengths)
    monkeypatch.setattr(suites, "make", lambda *args, **options: env)
    assert transfer.trial(source, run, agent, "x")["return"] == expected and env.steps == 300


def test_chance_orders_the_candidates_by_seed_and_task(transfers, monkeypatch):
    tasks = SimpleNamespace(old=SimpleNamespace(tasks=tuple(range(85))), args=SimpleNamespace(candidates=3))
    drawn = {tuple(transfer.draw(tasks, SimpleNamespace(args=SimpleNamespace(seed=seed, tasks=(task,)))))
             for seed in range(2) for task in ("apple", "bell")}
    assert len(drawn) == 4 and all(len(set(rows)) == 3 for rows in drawn)
    assert any(list(rows) != sorted(rows) for rows in drawn)  # else the first rows would win where all are equal
    # Of equals the first that was drawn; else by score, then by return.
    for best, results in ((0, [(0, 0.0)] * 3), (2, [(9, 0.0), (1, 0.5), (2, 0.5)])):
        results = [{"return": float(total), "score": score} for total, score in results]
        monkeypatch.setattr(transfer, "trial", mock.Mock(side_effect=results))
        with mock.patch.object(transfer, "set_embedding", side_effect=transfer.set_embedding) as chosen:
            transfers.go("select", run=f"best{best}")
        seen = [call.args[2] for call in chosen.call_args_list]
        assert sorted(seen[:3]) == [0, 1, 2] and seen[3:] == [seen[best]]


@pytest.mark.parametrize(("options", "numbers"), [
    ("--mode select", (3, 300, 900, 900)), ("--mode select --candidates 2", (2, 300, 600, 600)),
    ("--mode select --transitions 100", (3, 33, 99, 99)), ("--mode zero-shot", (3, 300, 0, 0)),
    ("--mode select --candidates 2 --transitions 300", (2, 150, 300, 300)), ("--mode tune", (3, 300, 900, 2100)),
    ("--mode tune --transitions 300", (3, 100, 300, 999)),
    ("--mode tune --transitions 300 --tune-transitions 50", (3, 100, 300, 450))])
def test_budgets_are_the_same_for_all_of_a_suites_transfer_tasks(transfers, options, numbers):
    args = transfers.parse(f"embedding --checkpoint {transfers.pre} --suite mw {options}")
    assert (args.candidates, args.transitions_per_candidate, args.spent, args.cost) == numbers
    assert args.task == suites.SUITES["mw"].transfer


# -------------------------------------------------------------------------------------------------------- data transfer


@pytest.mark.parametrize("prior", ["separate", "merged"])
def test_half_of_each_batch_comes_from_the_pretraining_replay(transfers, capsys, prior):
    before = files_under(transfers.pre)
    run_dir = transfers.go("data", f"--prior-tasks {prior}", task="cartpole-balance")
    assert files_under(transfers.pre) == before
    (new,), source = transfers.made, brc_sac.ReplayBuffer(3, 39, 4, 205)
    scale, scales = new.normalizer["return_scale"], checkpoint(transfers.pre)["normalizer"]["return_scale"]
    harness.read_checkpoint(transfers.pre, source)
    if prior == "separate":
        assert new.sizes == (39, 4, 1, 4) and scale.tolist() == [math.inf, *scales.tolist()]
    else:
        assert new.sizes == (39, 4, 1, 0) and scale == scales.max()
    torch.testing.assert_close(new.normalizer["entropy"], torch.full((len(scale),), 4 * math.log(2)))  # of a new policy
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
    # It goes on with more steps, and is evaluated by the agent.
    transfers.call(f"data --resume {run_dir} --total-steps 60")
    assert steps_of(new.agent.args) == [20, 40, 60]
    transfers.program(brc_sac.__file__, f"--evaluate {run_dir}")
    capsys.readouterr()
    brc_sac.main()
    assert "cartpole-balance" in capsys.readouterr().out
    if prior == "merged":
        refusal = transfers.refused(f"embedding --checkpoint {run_dir} --task window-open")
        assert "has learned no task embeddings" in refusal


@pytest.mark.parametrize(("lows", "highs", "scale"), [((0, 0), (0, 0), math.inf), ((-3, 0), (0, 2), 3),
                                                      ((math.inf, 1), (-math.inf, 4), 4)])
def test_one_scale_spans_the_returns_of_all_old_tasks(lows, highs, scale):
    saved = {"return_min": torch.tensor(lows) * 1.0, "return_max": torch.tensor(highs) * 1.0}
    pretrained = SimpleNamespace(state={"normalizer": saved})
    normalizer = brc_sac.ReturnNormalizer(brc_sac.Args(gamma=0.9), 1, 2)
    transfer.copy_scales(pretrained, slice(2), normalizer, slice(1))
    assert normalizer.return_scale.item() == scale


def test_a_replay_of_the_first_step_is_refused(transfers):
    pre = transfers.copy("young")
    empty = brc_sac.ReplayBuffer(3, 39, 4, 205)
    torch.save(checkpoint(pre) | {"buffer": empty.state_dict(), "replay": {name: [] for name in empty.rings}},
               pre / "checkpoint.pt")
    assert "without transitions: wait" in transfers.refused(f"data --checkpoint {pre} --task window-open")


def test_the_replay_is_needed_for_data_transfer_alone_and_a_damaged_checkpoint_left_as_it_is(transfers):
    pre = transfers.copy("pre")
    torch.save(checkpoint(pre) | {"replay": {}}, pre / "checkpoint.previous.pt")
    (pre / "checkpoint.pt").write_bytes(b"damaged")
    before = files_under(pre)
    assert "saved without its replay" in transfers.refused(
        f"data --checkpoint {pre} --task window-open --run-dir {transfers.folder / 'run'}")
    assert not (transfers.folder / "run").exists()
    transfers.go("zero-shot", pre=pre)
    assert files_under(pre) == before


# ------------------------------------------------------------------------------------------------- programs, refusals


def test_the_agent_is_the_program_that_wrote_the_checkpoint(transfers, tmp_path):
    idea, ablation = tmp_path / "my_idea.py", tmp_path / "my_ablation.py"
    idea.write_text(Path(brc_sac.__file__).read_text().replace("class Agent:", "class Agent:\n    MINE = True\n"))
    ablation.write_text("import brc_sac\n\nbrc_sac.Agent.ABLATED = True\n")
    for path, mark in ((idea, "MINE"), (ablation, "ABLATED"), (Path("/nowhere/brc_sac.py"), "PARTS")):
        pre = transfers.copy(f"{path.stem}-pre", program=str(path))
        run_dir = transfers.go("zero-shot", run=path.stem, pre=pre)
        assert {row["exp_name"] for row in read_csv(run_dir / "metrics.csv")} == {f"{path.stem}-embedding-zero-shot"}
        for source, rows in ((pre, 4), (run_dir, 2)):  # of a transferred run it is the same
            loaded = transfer.load_pretrained(transfer.Args("model", str(source)))
            assert hasattr(loaded.agent.Agent, mark) and len(loaded.embeddings["critic"]) == rows
    del brc_sac.Agent.ABLATED
    lost = transfers.copy("lost", program="/nowhere/lost_idea.py")
    assert "written by lost_idea.py" in transfers.refused(f"model --checkpoint {lost} --task window-open")


@pytest.mark.parametrize(("arguments", "message"), [
    ("model {pre} --task walker-walk", "observation size 24 and action size 6, .* take 39 and 4"),
    ("data {pre} --task reach", "reach was in the pretraining of .*--allow-seen"),
    ("model {pre} --task Pong", "Pong is an Atari game"),
    ("model {pre} --suite demo", "'demo' has no transfer tasks: .* mw, hb-medium, hb-hard, sh, atari"),
    ("model {pre}", "Give either --task .* or --suite"),
    ("model --task window-open", "No --checkpoint was given"),
    ("model --checkpoint {other} --task window-open", "does not fit its args.json"),
    ("model {new} --start best --total-steps 900 --learning-starts 5", "--total-steps is 900 and the trials take 900"),
    ("model --checkpoint {games} --task Boxing --temperature initial", "--temperature has no effect .* in Atari"),
    ("model {new} --baseline --temperature initial", "no effect with model --baseline"),
    ("embedding {new} --full-map --mode zero-shot", "--full-map has no effect"),
    ("model {new} reach-wall --replay-device nope", "Device 'nope' is not on this machine"),
    ("embedding {new} --tune-updates 2", "no effect with embedding --mode select:"),
    ("embedding {new} --total-steps 9", "--total-steps has no effect with embedding"),
    ("embedding {new} --candidates 4", "--candidates is 4: .* at least 1 and at most 3"),
    ("embedding {new} --transitions 2", "--transitions is 2: .* at least 3"),
    ("embedding {new} --transitions 9 --transitions-per-candidate 3", "has no effect"),
    ("embedding {new} --mode tune --transitions 800", "at least 3 and at most 741"),
    ("embedding {new} --mode tune --transitions 300 --tune-transitions 600", "at least 10 and at most 599")])
def test_what_cannot_be_run_is_refused_in_one_sentence_and_creates_nothing(transfers, tmp_path, arguments, message):
    folders = {"other": transfers.copy("other", width=32), "games": transfers.copy("games", tasks=["Pong"]),
               "pre": f"--checkpoint {transfers.pre}", "new": f"--checkpoint {transfers.pre} --task window-open"}
    transfers.patch.setattr(harness, "PROGRAM", Path("transfer.py"))
    (tmp_path / "out").touch()
    (tmp_path / "err").touch()
    before = files_under(transfers.pre), files_under(tmp_path).keys()
    assert re.search(message, Program(transfer, tmp_path).refused(arguments.format(**folders)))
    assert (files_under(transfers.pre), files_under(tmp_path).keys()) == before
# ------------------------------------------------------------------------------------------------------------- resuming


def test_several_tasks_go_on_after_a_stop_and_draw_the_map(transfers, monkeypatch, tmp_path, capsys):
    """Stopped in the first task's trials, which are made again, and after them, when they are not."""
    run_dir, tasks, trial, trials = tmp_path / "run", ("window-open", "cartpole-balance"), transfer.trial, []
    resume = f"embedding --resume {run_dir}"

    def stopping(pretrained, run, agent, name, *into):
        trials.append((run.args.tasks[0], name))
        if len(trials) == 2:
            signal.raise_signal(signal.SIGTERM)
        return trial(pretrained, run, agent, name, *into)

    monkeypatch.setattr(transfer, "trial", stopping)
    with pytest.raises(SystemExit) as stopped:
        transfers.go("select", "--full-map", task=" ".join(tasks))
    assert stopped.value.code == 128 + signal.SIGTERM
    del stopped  # its traceback holds the run, and so the lock
    assert not (run_dir / tasks[0] / "checkpoint.pt").exists()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(brc_sac, "evaluate", lambda *inputs: (signal.raise_signal(signal.SIGINT), ([], []))[1])
        transfers.call(resume)
    assert len(transfers.call(resume)) == 2
    assert [task for task, _ in trials] == [tasks[0]] * 5 + [tasks[1]] * 3
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith((*tasks, "mean"))][-3:] == [*tasks, "mean"]
    scores = {task: read_csv(run_dir / task / "candidates.csv") for task in tasks}
    assert [list(row.values()) for row in read_csv(run_dir / "embedding_map.csv")] == [
        [task, *(row["score"] for row in scores[task])] for task in tasks]
    assert [row["embedding"] for row in scores[tasks[0]]] == list(PRETRAINING)
    assert (run_dir / "embedding_map.png").stat().st_size > 1000
    # Once more changes nothing in them, and neither brc_sac.py nor another method takes a run for its own.
    before = files_under(run_dir / tasks[0])
    transfers.call(resume)
    assert files_under(run_dir / tasks[0]) == before and "window-open is finished." in capsys.readouterr().out
    for arguments, message in ((f"data --resume {run_dir}", "cannot become data"),
                               (f"{resume}/{tasks[0]} --seed 7", "--seed is 0"),
                               (f"model --resume {transfers.pre}", "is a run of brc_sac.py, and this is transfer.py"),
                               (f"model --checkpoint {run_dir} --task reach", "holds the runs of several tasks"),
                               (f"model --checkpoint {transfers.pre} --task window-open --run-dir {run_dir}",
                                "already holds files"),
                               (f"model --checkpoint {transfers.pre} --task window-open push --run-dir "
                                f"{run_dir / 'args.json' / 'new'}", "cannot be written")):
        assert message in transfers.refused(arguments)
    transfers.program("brc_sac.py", f"--resume {run_dir / tasks[1]}")
    with pytest.raises(harness.UsageError, match="transfer.py embedding --resume"):
        harness.parse_args(brc_sac.Args, brc_sac.resolve, "")
    report.main(report.Args((run_dir,), out=tmp_path / "x.png", csv=tmp_path / "x.csv"))  # of one evaluation each
    assert {(row["task"], row["method"], row["env_step"]) for row in read_csv(tmp_path / "x.csv")} == {
        (task, "brc_sac-embedding-select", "15") for task in (*tasks, f"mean of {len(tasks)} tasks")}


@pytest.mark.parametrize("moment", ["as the first stage ends", "in the last evaluation"])
def test_a_stopped_tune_goes_on_to_the_same_bits(transfers, monkeypatch, moment):
    add, evaluate, whole = brc_sac.ReplayBuffer.add, brc_sac.evaluate, transfers.go("tune", run="whole")

    def add_and_stop(buffer, *step):
        add(buffer, *step)
        if buffer.steps == 45 and moment == "as the first stage ends":  # no episode is cut
            signal.raise_signal(signal.SIGTERM)

    def evaluate_and_stop(agent, envs, episodes, seed, *options):
        if seed == harness.derived_seed(0, "evaluation", 50) and moment == "in the last evaluation":
            signal.raise_signal(signal.SIGTERM)
        return evaluate(agent, envs, episodes, seed, *options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(brc_sac.ReplayBuffer, "add", add_and_stop)
        patch.setattr(brc_sac, "evaluate", evaluate_and_stop)
        transfers.go("tune", run="stopped")
    stopped = transfers.folder / "stopped"
    transfers.call(f"embedding --resume {stopped}")
    ours, theirs = (networks(checkpoint(run_dir)["agent"]) for run_dir in (whole, stopped))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert read_csv(whole / "metrics.csv")[-3:] == read_csv(stopped / "metrics.csv")[-3:]


def test_goals_stay_those_of_the_pretraining_where_the_new_task_has_some(transfers):
    frozen = transfers.copy("frozen", goals="frozen")
    for task, goals in (("window-open", "frozen"), ("cartpole-balance", "fresh")):
        args = transfers.parse(f"model --checkpoint {frozen} --task {task}")
        assert transfer.learner_args(transfer.load_pretrained(args), "x", task, transfers.folder / "x").goals == goals


def test_more_steps_of_several_tasks_keep_the_intervals_they_began_with(transfers, tmp_path):
    args = transfers.parse(f"model --checkpoint {transfers.pre} --task window-open --total-steps 10000")
    pretrained = transfer.load_pretrained(args)
    begun = transfer.learner_args(pretrained, "x", "window-open", tmp_path)
    facts = dataclasses.asdict(begun) | {"format": harness.FORMAT, "program": "transfer.py"}
    (tmp_path / "args.json").write_text(json.dumps(facts))
    for more, interval in (({"total_steps": 20_000}, 500), ({"total_steps": 20_000, "eval_interval": 50}, 50)):
        longer = pretrained._replace(args=dataclasses.replace(args, **more))
        assert transfer.learner_args(longer, "x", "window-open", tmp_path).eval_interval == interval
        assert transfer.learner_args(longer, "x", "window-open", tmp_path / "new").eval_interval in (1000, 50)


# ---------------------------------------------------------------------------------------------------------------- Atari


def test_all_protocols_take_a_checkpoint_of_brc_drq(transfers, monkeypatch, tmp_path):
    args = brc_drq.Args(tasks=("Pong", "Breakout"), encoder_scale=1 / 128, hidden_width=8, batch_size=4, max_frames=80,
                        learning_starts=20, total_steps=24, eval_episodes=1, device="cpu",
                        run_dir=str(tmp_path / "pre"))
    monkeypatch.setattr(harness, "PROGRAM", Path(brc_drq.__file__))
    brc_drq.train(brc_drq.resolve(args))
    agents = {"pre": checkpoint(tmp_path / "pre")["agent"]}
    budget = "--total-steps 22 --batch-size 4 --eval-interval 22 --learning-starts 5 --no-compile"
    epsilons, updates, act, update = [], [], brc_drq.Agent.act, brc_drq.Agent.update
    monkeypatch.setattr(brc_drq.Agent, "act", lambda *inputs: (epsilons.append(inputs[3]), act(*inputs))[1])
    monkeypatch.setattr(brc_drq.Agent, "update", lambda *inputs: (updates.append(1), update(*inputs))[1])
    for name, options, steps in (("model", budget, 22), ("data", budget, 22), ("zero-shot", "", 0),
                                 ("tune", "--tune-transitions 12", 27)):
        run_dir = transfers.go(name, options, run=name, task="Bowling", pre=tmp_path / "pre")
        agents[name] = checkpoint(run_dir)["agent"]
        assert int(read_csv(run_dir / "metrics.csv")[-1]["env_step"]) == steps
        if name == "model":  # acts from the first step on, and learns once an episode of 20 steps has ended
            assert set(epsilons) == {args.epsilon, args.eval_epsilon} and len(updates) == 2 * 2
    for part in ("critic", "target"):
        for name, value in agents["pre"][part].items():
            if name != "embedding.weight":
                assert all(torch.equal(value, agents[frozen][part][name]) for frozen in ("zero-shot", "tune"))
    rows = agents["pre"]["critic"]["embedding.weight"]
    assert (agents["zero-shot"]["critic"]["embedding.weight"] == rows).all(1).any()
    assert "reach" in transfers.refused(f"model --checkpoint {tmp_path / 'pre'} --task reach")
    for options, games in (("", (10, 100)), ("--eval-episodes 3", (3, 3))):
        own = transfers.parse(f"data --checkpoint {tmp_path / 'pre'} --task Bowling {options}")
        learner = transfer.learner_args(transfer.load_pretrained(own), "x", "Bowling", tmp_path / "x")
        assert (learner.learning_starts, learner.eval_interval, learner.compile) == (1600, 10_000, False)
        assert (learner.eval_episodes, learner.final_eval_episodes) == games
