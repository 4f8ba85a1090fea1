"""transfer.py on real, tiny checkpoints: what each protocol starts from, what it changes, and what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import brc_drq
import brc_sac
import suites
import transfer
from benchmarks import transfer_report

SCRIPT = Path(transfer.__file__)
PRETRAINING = ("reach", "drawer-close", "button-press")
BUDGET = "--total-steps 40 --learning-starts 10 --batch-size 16 --eval-interval 20 --eval-episodes 1 --workers 0"
EVALUATION = "--eval-episodes 1 --workers 0"
TRIAL = f"--transitions-per-candidate 5 {EVALUATION}"
MODES = {"zero-shot": EVALUATION, "select": TRIAL, "tune": f"{TRIAL} --tune-transitions 30"}


def pretrain(run_dir, tasks=PRETRAINING):
    args = brc_sac.Args(tasks=tasks, width=16, actor_width=16, batch_size=16, learning_starts=190, total_steps=205,
                        eval_interval=205, eval_episodes=1, workers=0, device="cpu", seed=1, run_dir=str(run_dir))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    brc_sac.train(brc_sac.resolve(args))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return run_dir


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A run on three tasks, just long enough for an episode of each and some updates."""
    return pretrain(tmp_path_factory.mktemp("pretraining") / "pre")


@pytest.fixture
def learners(monkeypatch):
    """The learners that the protocols set up, each with its state dict right after that."""
    found, prepare = [], transfer.prepare

    def spy(learner, args, pretrained):
        prepare(learner, args, pretrained)
        found.append((learner, clone(learner.agent.state_dict())))

    monkeypatch.setattr(transfer, "prepare", spy)
    return found


def clone(state):
    return {name: clone(value) if isinstance(value, dict) else value.clone() if isinstance(value, torch.Tensor)
            else value for name, value in state.items()}


def go(monkeypatch, arguments):
    """Runs transfer.py in this process; returns the results."""
    monkeypatch.setattr(sys, "argv", ["transfer.py", *arguments.split()])
    return transfer.main(transfer.parse_args())


def networks(run_dir):
    """Everything in a checkpoint's agent that is a weight."""
    agent = brc_sac.read_file(run_dir / "checkpoint.pt")["agent"]
    return {f"{part}.{name}": value for part in ("critic", "target", "actor") for name, value in agent[part].items()
            } | {"log_temperature": agent["log_temperature"]}


def metrics(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def files_under(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------- model transfer


@pytest.mark.parametrize("start", ["mean", "best"])
def test_model_transfer_starts_from_the_checkpoints_outputs(pretrained, learners, monkeypatch, tmp_path, start):
    go(monkeypatch, f"model --checkpoint {pretrained} --task window-open --run-dir {tmp_path / 'run'} --start {start} "
                    f"{BUDGET} --transitions-per-candidate 5")
    (learner, before), = learners
    args, _ = brc_sac.read_args(pretrained)
    old = brc_sac.Learner(args, 39, 4, torch.device("cpu"), torch.device("cpu"))
    brc_sac.load_checkpoint(pretrained, old, replay=False)
    new = brc_sac.Learner(learner.args, 39, 4, torch.device("cpu"), torch.device("cpu"))
    new.agent.load_state_dict(before)
    obs, action, embedding = torch.randn(9, 39), torch.rand(9, 4), torch.randn(9, 32)
    for name in ("critic", "target"):
        assert torch.equal(getattr(new.agent, name)(obs, action, embedding),
                           getattr(old.agent, name)(obs, action, embedding))
    for ours, theirs in zip(new.agent.actor(obs, embedding), old.agent.actor(obs, embedding), strict=True):
        assert torch.equal(ours, theirs)
    for name in ("critic", "target"):
        ours = getattr(new.agent, name).embed(torch.tensor([0]))[0]
        theirs = getattr(old.agent, name).embed(torch.arange(3))
        if start == "mean":
            mean = theirs.mean(0)
            torch.testing.assert_close(ours, mean / mean.norm(p=old.agent.critic.embedding.order))
        else:
            assert (ours == theirs).all(1).any()
    assert before["log_temperature"].item() == np.log(np.float32(0.1))
    assert not before["critic_optimizer"]["state"] and not before["actor_optimizer"]["state"]
    assert learner.env_step == 40 and learner.buffer.stop.item() == (40 if start == "mean" else 25)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["transfer"]["method"] == "model"


def test_the_temperature_goes_on_from_pretraining_on_request(pretrained, learners, monkeypatch, tmp_path):
    trained = networks(pretrained)["log_temperature"]
    for name, options in (("cool", "--temperature pretrained"), ("scratch", "--baseline")):
        go(monkeypatch, f"model --checkpoint {pretrained} --task window-open --run-dir {tmp_path / name} {BUDGET} "
                        + options)
    cool, scratch = (before["log_temperature"] for _, before in learners)
    assert torch.equal(cool, trained) and not torch.equal(scratch, trained)
    assert {row["exp_name"] for row in metrics(tmp_path / "cool")} == {"brc_sac-model-transfer-cool"}


def test_the_policy_acts_from_the_first_step_of_model_transfer(pretrained, learners, monkeypatch, tmp_path):
    for name, options in (("model", ""), ("scratch", "--baseline")):
        go(monkeypatch, f"model --checkpoint {pretrained} --task window-open --run-dir {tmp_path / name} {BUDGET} "
                        + options)
    model, scratch = (learner for learner, _ in learners)
    assert not model.args.random_start and scratch.args.random_start
    sizes = [{name: value.shape for name, value in learner.agent.critic.state_dict().items()}
             for learner in (model, scratch)]
    assert sizes[0] == sizes[1] and sizes[0]["embedding.weight"] == (1, 32)
    assert {row["exp_name"] for row in metrics(tmp_path / "model")} == {"brc_sac-model-transfer"}
    assert {row["exp_name"] for row in metrics(tmp_path / "scratch")} == {"brc_sac-scratch"}
    for name in ("model", "scratch"):
        rows = metrics(tmp_path / name)
        assert [int(row["env_step"]) for row in rows if row["env_name"] == "mean" and row["metric"] == "score"
                ] == [0, 20, 40]
        assert list(rows[0]) == ["exp_name", "env_name", "seed", "metric", "env_step", "value"]
        assert any((tmp_path / name / "tensorboard").iterdir())


# --------------------------------------------------------------------------------------------------- embedding transfer


@pytest.mark.parametrize("mode", ["zero-shot", "select", "tune"])
def test_in_embedding_transfer_nothing_changes_but_the_embedding(pretrained, learners, monkeypatch, tmp_path, mode):
    (result,) = go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open --mode {mode} "
                                f"{MODES[mode]} --run-dir {tmp_path / 'run'}")
    before, after = networks(pretrained), networks(tmp_path / "run")
    assert before.keys() == after.keys()
    embeddings = {"critic.embedding.weight", "target.embedding.weight"}
    for name in before.keys() - embeddings:
        assert torch.equal(before[name], after[name]), name
    (learner, start), = learners
    rows = before["critic.embedding.weight"]
    assert (start["critic"]["embedding.weight"] == rows).all(1).any()  # one of the pretrained, to the last bit
    for name in embeddings:
        assert torch.equal(after[name], start["critic"]["embedding.weight"]) == (mode != "tune")
    assert torch.equal(after["critic.embedding.weight"], after["target.embedding.weight"])  # there is only one
    assert result["score"] == float(metrics(tmp_path / "run")[-1]["value"])


@pytest.mark.parametrize(("mode", "spent"), [("zero-shot", 0), ("select", 15), ("tune", 45)])
def test_transitions_are_counted_to_the_last(pretrained, monkeypatch, tmp_path, capsys, mode, spent):
    steps = []

    class Counting(brc_sac.VectorEnv):
        def step_async(self, action):
            super().step_async(action)
            steps[self.index] += 1

        def reset(self, seed=None):
            self.index = len(steps)
            steps.append(0)
            return super().reset(seed)

    monkeypatch.setattr(brc_sac, "VectorEnv", Counting)
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open --mode {mode} {MODES[mode]} "
                    f"--run-dir {tmp_path / 'run'}")
    trials = 0 if mode == "zero-shot" else 3
    assert steps == [5] * trials + [30 if mode == "tune" else 0] + [200]  # the trials, the training, one evaluation
    assert {int(row["env_step"]) for row in metrics(tmp_path / "run")} == {spent}
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith({"zero-shot": "Transitions of each new task: 0 to learn from",
                               "select": "Transitions of each new task: 15 to try 3 embeddings on, and 0 to learn from",
                               "tune": "Transitions of each new task: 15 to try 3 embeddings on, and 30 to learn from",
                               }[mode])


def test_the_trial_keeps_the_embedding_with_the_best_score_and_then_return(pretrained, learners, monkeypatch, tmp_path):
    results = iter([{"return": 9.0, "score": 0.0}, {"return": 1.0, "score": 0.5}, {"return": 2.0, "score": 0.5}])
    monkeypatch.setattr(transfer, "trial", lambda *inputs: next(results))
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open {TRIAL} --run-dir {tmp_path / 'run'}")
    row = networks(tmp_path / "run")["critic.embedding.weight"][0]
    assert torch.equal(row, networks(pretrained)["critic.embedding.weight"][2])


def test_the_full_map_has_every_embedding_on_every_new_task(pretrained, monkeypatch, tmp_path):
    run_dir = tmp_path / "run"
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task window-open cartpole-balance --mode select {TRIAL} "
                    f"--full-map --run-dir {run_dir}")
    with open(run_dir / "embedding_map.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["task", *PRETRAINING] and [row[0] for row in rows] == ["window-open", "cartpole-balance"]
    with open(run_dir / "cartpole-balance" / "candidates.csv", newline="") as file:
        candidates = list(csv.DictReader(file))
    assert rows[1][1:] == [row["score"] for row in candidates]
    assert [row["transitions"] for row in candidates] == ["5"] * 3 and "success" not in candidates[0]
    # cartpole pays up to 1 a step, and the score is a thousandth of the return
    assert all(0 < float(row["return"]) <= 5 and float(row["score"]) == pytest.approx(float(row["return"]) / 1000)
               for row in candidates)
    assert (run_dir / "embedding_map.png").stat().st_size > 1000


# -------------------------------------------------------------------------------------------------------- data transfer


def test_half_of_each_batch_comes_from_the_pretraining_replay(pretrained, learners, monkeypatch, tmp_path):
    go(monkeypatch, f"data --checkpoint {pretrained} --task window-open --run-dir {tmp_path / 'run'} {BUDGET}")
    (learner, _), = learners
    source = brc_sac.Learner(brc_sac.read_args(pretrained)[0], 39, 4, torch.device("cpu"), torch.device("cpu"))
    brc_sac.load_checkpoint(pretrained, source)
    assert learner.agent.critic.embedding.weight.shape == (4, 32)  # the new task and three old ones
    assert torch.equal(learner.normalizer.return_scale[1:], source.normalizer.return_scale)
    assert not torch.equal(learner.agent.actor.mean.weight, source.agent.actor.mean.weight)
    for _ in range(5):
        batch = learner.buffer.sample(17, learner.generators["replay"])
        assert (batch.task_id == 0).sum() == 9 and (batch.task_id > 0).sum() == 8 and batch.task_id.max() <= 3
    assert len(learner.batch.obs) == 16 and (learner.batch.task_id > 0).sum() == 8  # the last that was learned from
    seen = source.buffer.sample(5000)
    for obs, action, task_id in zip(batch.obs, batch.action, batch.task_id, strict=True):
        known = ((seen.obs == obs).all(1) & (seen.action == action).all(1)).nonzero().flatten()
        assert (len(known) > 0) == (task_id > 0)
        assert (seen.task_id[known] + 1 == task_id).all()
    assert {row["env_name"] for row in metrics(tmp_path / "run")} == {"window-open", "mean"}


def test_a_checkpoint_without_replay_serves_all_but_data_transfer(pretrained, monkeypatch, tmp_path):
    run_dir = tmp_path / "pre"
    run_dir.mkdir()
    shutil.copy(pretrained / "args.json", run_dir)
    state = torch.load(pretrained / "checkpoint.pt", weights_only=True)
    torch.save(state | {"segments": []}, run_dir / "checkpoint.pt")
    code, message = refused(monkeypatch, f"data --checkpoint {run_dir} --task window-open --run-dir {tmp_path / 'run'}")
    assert code == 2 and "saved without its replay" in message and not (tmp_path / "run").exists()
    go(monkeypatch, f"embedding --checkpoint {run_dir} --task window-open --mode zero-shot {EVALUATION} "
                    f"--run-dir {tmp_path / 'run'}")


# ------------------------------------------------------------------------------------------------- sizes and refusals


def test_a_smaller_task_is_padded_to_the_checkpoints_sizes(pretrained, learners, monkeypatch, tmp_path):
    go(monkeypatch, f"model --checkpoint {pretrained} --task cartpole-balance --run-dir {tmp_path / 'run'} {BUDGET}")
    (learner, _), = learners
    batch = learner.buffer.sample(100, learner.generators["replay"])
    assert batch.obs.shape == (100, 39) and batch.action.shape == (100, 4)
    assert (batch.obs[:, :5] != 0).any() and (batch.obs[:, 5:] == 0).all()
    assert learner.agent.target_entropy == -2


def refused(monkeypatch, arguments):
    """The exit code of transfer.py, and what it prints to stderr."""
    monkeypatch.setattr(sys, "argv", ["transfer.py", *arguments.split()])
    try:
        args = transfer.parse_args()
    except suites.SuiteError as error:
        return 2, str(error)
    lines = []
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, file=None, **options: lines.append(text[0]) if file else None)
        with pytest.raises(SystemExit) as stopped:
            transfer.main(args)
    return stopped.value.code, "\n".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--checkpoint {pre} --task walker-walk",
         "walker-walk has observation size 24 and action size 6, and .* at most 39 and 4"),
        ("--checkpoint {pre} --task window-opne", "Unknown task 'window-opne': did you mean window-open"),
        ("--checkpoint {pre} --task window-open window-open", "'window-open' was given more than once"),
        ("--checkpoint {pre} --task reach", "reach was in the pretraining of .*--allow-seen"),
        ("--checkpoint {pre} --task Pong", "continuous control and Pong is an Atari game"),
        ("--checkpoint {pre} --suite demo", "'demo' has no transfer tasks: .* mw, hb-medium, hb-hard, sh, atari"),
        ("--checkpoint {pre} --suite atari", "Asteroids is an Atari game"),
        ("--checkpoint {pre}", "Give either --task .* or --suite"),
        ("--task window-open", "No --checkpoint was given"),
        ("--checkpoint nowhere --task window-open", "nowhere holds no run of brc_sac.py or brc_drq.py"),
        ("--checkpoint {foreign} --task window-open", "foreign holds no run of brc_sac.py or brc_drq.py"),
        ("--checkpoint {damaged} --task window-open", "No complete checkpoint in .*damaged"),
        ("--checkpoint {other} --task window-open", "does not fit its args.json"),
        ("--checkpoint {alien} --task window-open", "is not a checkpoint of this program"),
        ("--checkpoint {pre} --task window-open --total-steps 0", "--total-steps is 0"),
        ("--checkpoint {pre} --task window-open --start best --total-steps 900",
         "--total-steps is 900 and trying the embeddings takes 900"),
        ("--checkpoint {pre} --task window-open --device quantum", "Device 'quantum' is not on this machine"),
        ("--resume {pre}", "holds no run of transfer.py to continue"),
        ("--checkpoint {games} --task Boxing --temperature pretrained", "brc_drq.py has no entropy temperature"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence_and_creates_nothing(
        pretrained, monkeypatch, tmp_path, arguments, message):
    folders = {name: tmp_path / name for name in ("foreign", "games", "damaged", "other", "alien")}
    folders["pre"] = pretrained
    for name in ("damaged", "other", "alien"):
        folders[name].mkdir()
        shutil.copy(pretrained / "args.json", folders[name])
    for name, facts in (("foreign", {"env": "CartPole-v1"}), ("games", {"tasks": ["Pong"]})):
        folders[name].mkdir()
        (folders[name] / "args.json").write_text(json.dumps(facts))
    (folders["damaged"] / "checkpoint.pt").write_bytes((pretrained / "checkpoint.pt").read_bytes()[:5000])
    shutil.copy(pretrained / "checkpoint.pt", folders["other"])
    facts = json.loads((pretrained / "args.json").read_text())
    (folders["other"] / "args.json").write_text(json.dumps(facts | {"width": 32}))
    torch.save({"weights": torch.zeros(3)}, folders["alien"] / "checkpoint.pt")
    before = files_under(tmp_path) | files_under(pretrained)
    monkeypatch.chdir(tmp_path)
    code, text = refused(monkeypatch, "model " + arguments.format(**folders))
    assert code == 2 and "\n" not in text
    assert re.search(message, text), text
    assert files_under(tmp_path) | files_under(pretrained) == before


def test_embedding_and_data_refuse_what_they_cannot_do(pretrained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
            ("embedding --task window-open --full-map --mode zero-shot", "--full-map needs --mode select"),
            ("embedding --task window-open --mode tune --tune-transitions 1000", "at least 10 and at most 999"),
            ("embedding --task window-open --mode select --tune-updates 2", "no effect with --mode select: leave it"),
            ("embedding --task window-open --mode zero-shot --tune-updates 2", "no effect with --mode zero-shot:"),
            ("model --task window-open --baseline --temperature pretrained", "--temperature has no effect with --base"),
            ("data --task reach", "was in the pretraining")):
        code, text = refused(monkeypatch, f"{arguments} --checkpoint {pretrained}")
        assert code == 2 and message in text
    single = pretrain(tmp_path / "single", tasks=("reach",))
    code, text = refused(monkeypatch, f"embedding --task window-open --checkpoint {single}")
    assert code == 2 and "has no task embeddings" in text
    assert list(tmp_path.iterdir()) == [single]
    go(monkeypatch, f"model --checkpoint {single} --task window-open --run-dir {tmp_path / 'run'} {BUDGET}")


def test_a_task_of_the_pretraining_is_accepted_on_request(pretrained, monkeypatch, tmp_path):
    go(monkeypatch, f"embedding --checkpoint {pretrained} --task reach --mode zero-shot --allow-seen {EVALUATION} "
                    f"--run-dir {tmp_path / 'run'}")


def test_a_suite_is_all_of_its_transfer_tasks(pretrained, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"transfer.py model --checkpoint {pretrained} --suite mw".split())
    assert transfer.new_tasks(transfer.parse_args()) == suites.SUITES["mw"].transfer


def transfer_py(arguments, cwd):
    return subprocess.Popen([sys.executable, str(SCRIPT), *arguments.split()], cwd=cwd, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_script_itself_exits_with_2_and_a_sentence(pretrained, tmp_path):
    """One error that is found before torch is imported, and one after."""
    for task in ("reech", "walker-walk"):
        process = transfer_py(f"model --checkpoint {pretrained} --task {task}", tmp_path)
        out, error = process.communicate(timeout=120)
        assert process.returncode == 2 and out == ""
        (line,) = error.splitlines()
        assert line.startswith("transfer.py: ")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_suite_that_was_killed_goes_on_where_it_was(pretrained, monkeypatch, tmp_path, capsys):
    run_dir, tasks = tmp_path / "run", ("assembly", "lever-pull", "push-back")
    process = transfer_py(f"model --checkpoint {pretrained} --task {' '.join(tasks)} --run-dir {run_dir} {BUDGET}",
                          tmp_path)
    deadline = time.monotonic() + 200
    while not (run_dir / tasks[1] / "checkpoint.pt").exists():  # at step 20 of the second task
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = files_under(run_dir / tasks[0])
    results = go(monkeypatch, f"model --resume {run_dir}")
    assert files_under(run_dir / tasks[0]) == finished
    assert json.loads((run_dir / tasks[1] / "args.json").read_text())["resumed"][0]["env_step"] >= 20
    out = capsys.readouterr().out
    assert f"{tasks[0]} is finished." in out and out.count("is finished.") == 1
    summary = out[out.index("3 new tasks"):].splitlines()[2:6]
    assert [line.split()[0] for line in summary] == [*tasks, "mean"] and len(results) == 3
    for task in tasks:
        keys = [(row["env_name"], row["metric"], row["env_step"]) for row in metrics(run_dir / task)]
        assert len(keys) == len(set(keys)) and ("mean", "score", "40") in keys and ("mean", "score", "20") in keys
    # The whole once more changes nothing, and neither brc_sac.py nor another protocol takes the run for its own.
    before = files_under(run_dir)
    go(monkeypatch, f"model --resume {run_dir}")
    assert files_under(run_dir) == before
    code, text = refused(monkeypatch, f"data --resume {run_dir}")
    assert code == 2 and "is a run of transfer.py model" in text
    code, text = refused(monkeypatch, f"model --resume {run_dir} --seed 7")
    assert code == 2 and "--seed is 0" in text
    monkeypatch.setattr(sys, "argv", ["brc_sac.py", "--resume", str(run_dir / tasks[1])])
    with pytest.raises(brc_sac.UsageError, match="python transfer.py model --resume"):
        brc_sac.parse_args()


def test_a_tune_that_was_stopped_goes_on_without_another_trial(pretrained, learners, monkeypatch, tmp_path):
    arguments = (f"embedding --checkpoint {pretrained} --task window-open --mode tune {TRIAL} --tune-transitions 150 "
                 f"--run-dir {tmp_path / 'run'}")
    observe, trial = brc_sac.Learner.observe, transfer.trial

    def observe_and_stop(learner, *inputs):
        observe(learner, *inputs)
        if learner.env_step == 120:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(brc_sac.Learner, "observe", observe_and_stop)
    with pytest.raises(SystemExit) as stopped:
        go(monkeypatch, arguments)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(brc_sac.Learner, "observe", observe)
    monkeypatch.setattr(transfer, "trial", lambda *inputs: pytest.fail("tried again"))
    go(monkeypatch, f"embedding --resume {tmp_path / 'run'}")
    assert {int(row["env_step"]) for row in metrics(tmp_path / "run")} == {165}
    assert learners[1][0].env_step == 165 and learners[1][0].buffer.stop.item() == 150
    monkeypatch.setattr(transfer, "trial", trial)


def test_transferred_runs_can_be_evaluated_by_the_agent(pretrained, monkeypatch, tmp_path, capsys):
    tune = f"embedding --mode tune --tune-transitions 20 {TRIAL}"
    zero_shot = f"embedding --mode zero-shot {EVALUATION}"
    for name, arguments in (("zero-shot", zero_shot), ("tune", tune), ("data", f"data {BUDGET}")):
        go(monkeypatch, f"{arguments} --checkpoint {pretrained} --task cartpole-balance --run-dir {tmp_path / name}")
        monkeypatch.setattr(sys, "argv", ["brc_sac.py", "--evaluate", str(tmp_path / name)])
        capsys.readouterr()
        brc_sac.evaluate_run(brc_sac.parse_args())
        assert "cartpole-balance" in capsys.readouterr().out


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


def test_all_protocols_take_a_checkpoint_of_brc_drq(monkeypatch, tmp_path, learners):
    pre, budget = tmp_path / "pre", "--total-steps 16 --learning-starts 10 --batch-size 4 --eval-interval 16"
    args = brc_drq.Args(tasks=("Pong", "Breakout"), encoder_scale=1 / 128, hidden_width=8, batch_size=4, max_frames=80,
                        learning_starts=20, total_steps=24, eval_episodes=1, device="cpu", run_dir=str(pre))
    brc_drq.train(brc_drq.resolve(args))
    trial = "--transitions-per-candidate 5 --tune-transitions 12 --tune-updates 1"
    for name, arguments in (("model", f"model {budget}"), ("data", f"data {budget}"),
                            ("zero-shot", "embedding --mode zero-shot"), ("tune", f"embedding --mode tune {trial}")):
        go(monkeypatch, f"{arguments} --checkpoint {pre} --task Bowling --eval-episodes 1 --run-dir {tmp_path / name}")
    agents = {name: brc_drq.read_file(tmp_path / name / "checkpoint.pt")["agent"]
              for name in ("pre", "zero-shot", "tune")}
    for part in ("critic", "target"):
        for name, value in agents["pre"][part].items():
            if name != "embedding.weight":
                assert all(torch.equal(value, agent[part][name]) for agent in agents.values())
    rows = agents["pre"]["critic"]["embedding.weight"]
    assert (agents["zero-shot"]["critic"]["embedding.weight"] == rows).all(1).any()
    assert not (agents["tune"]["critic"]["embedding.weight"] == rows).all(1).any()
    model, data = learners[0][1], learners[1][0]
    assert torch.equal(model["critic"]["logits.weight"], agents["pre"]["critic"]["logits.weight"])
    batch = data.buffer.sample(9, data.generators["replay"])
    assert (batch.task_id == 0).sum() == 5 and (batch.task_id > 0).sum() == 4
    assert [int(metrics(tmp_path / name)[-1]["env_step"]) for name in ("model", "data", "zero-shot", "tune")
            ] == [16, 16, 0, 22]
    code, text = refused(monkeypatch, f"model --checkpoint {pre} --task reach")
    assert code == 2 and "trained on Atari games and reach is continuous control" in text
    monkeypatch.setattr(sys, "argv", ["brc_drq.py", "--evaluate", str(tmp_path / "zero-shot")])
    brc_drq.evaluate_run(brc_drq.parse_args())
