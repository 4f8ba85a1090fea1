"""Checkpoints: exact resume, damaged files, failing disks, signals, and numbers that are not finite."""

import dataclasses
import gc
import json
import os
import random
import signal

import gymnasium as gym
import numpy as np
import pytest
import torch

import brc_sac
import suites

EPISODE = 20


class Pendulum(gym.Env):
    """Deterministic, with episodes of 20 steps that end by truncation: a run that stops between episodes loses none."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    steps = 0  # of all episodes

    def hook(self):
        """What else a test wants to happen in a step."""

    def reset(self, *, seed=None, options=None):
        self.t, self.state = 0, np.array([0.5, -0.5, 0.0], np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.t, self.steps = self.t + 1, self.steps + 1
        self.state = (0.9 * self.state + 0.1 * np.array([action[0], action[1], np.sin(self.t)])).astype(np.float32)
        self.hook()
        return self.state.copy(), float(-np.abs(self.state).sum()), False, self.t == EPISODE, {}


@pytest.fixture
def args(monkeypatch, tmp_path):
    """Arguments of a run of 160 steps on two such tasks, with a checkpoint and an evaluation every 40."""
    monkeypatch.setattr(suites, "make", lambda task, seed, render_mode=None: Pendulum())
    monkeypatch.setattr(suites, "check", lambda tasks: None)
    monkeypatch.setattr(suites, "score", lambda task, episode_return, success: episode_return)
    monkeypatch.setattr(Pendulum, "hook", Pendulum.hook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield dataclasses.replace(
        brc_sac.Args(), tasks=("a", "b"), exp_name="test", run_dir=str(tmp_path / "run"), device="cpu", workers=0,
        width=16, actor_width=8, batch_size=8, learning_starts=20, total_steps=160, eval_interval=40, eval_episodes=1,
        checkpoint_interval=40, log_interval=40, compile=False,
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_at(step, number=signal.SIGTERM):
    """Makes the training environment of task a send this process a signal in its `step`-th step."""

    def hook(env):
        if env.steps == step:
            os.kill(os.getpid(), number)

    Pendulum.hook = hook


def resumed(args, **changes):
    return dataclasses.replace(args, resume=args.run_dir, **changes)


def run_until(args, step):
    """Trains up to `step`, where the process is asked to stop."""
    stop_at(step)
    with pytest.raises(SystemExit) as stopped:
        brc_sac.train(args)
    assert stopped.value.code == 128 + signal.SIGTERM
    Pendulum.hook = lambda env: None


def learner_of(args):
    """The learner that the last checkpoint of `args.run_dir` holds, its replay included."""
    learner = brc_sac.Learner(args, 3, 2, torch.device("cpu"), torch.device("cpu"))
    brc_sac.load_checkpoint(brc_sac.Path(args.run_dir), learner)
    return learner


def flat(state, prefix=""):
    """A nested state as {path: leaf}."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def same(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def assert_same_learner(first, second):
    ours, theirs = (flat({name: value for name, value in learner.state_dict().items() if name != "global_random"})
                    for learner in (first, second))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert same(leaf, theirs[path]), path
    one, other = (learner.buffer.export(np.zeros(2, np.int64)) for learner in (first, second))
    for segment in (one, other):
        segment["row"][segment["transition"] < 0, 3:] = 0  # a final row holds nothing but its observation
    for name in one:
        assert torch.equal(one[name], other[name]), name
    # the next batch is the same too: indices, order and random stream
    for learner in (first, second):
        learner.generators["replay"].manual_seed(0)
    batches = [learner.buffer.sample(64, learner.generators["replay"]) for learner in (first, second)]
    assert all(torch.equal(x, y) for x, y in zip(*batches, strict=True))


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("buffer_size", [1000, 50])
def test_a_resumed_learner_equals_one_that_never_stopped(args, variant, buffer_size, tmp_path):
    args = dataclasses.replace(args, variant=variant, buffer_size=buffer_size)
    brc_sac.train(args)
    stopped = dataclasses.replace(args, run_dir=str(tmp_path / "stopped"))
    run_until(stopped, 3 * EPISODE)
    assert learner_of(stopped).env_step == 3 * EPISODE
    brc_sac.train(resumed(stopped))
    assert_same_learner(learner_of(args), learner_of(stopped))
    assert metrics(stopped) == metrics(args)


def metrics(args):
    return (brc_sac.Path(args.run_dir) / "metrics.csv").read_text()


def test_an_episode_that_was_cut_is_stored_as_truncated(args):
    run_until(args, EPISODE + 7)
    learner = learner_of(args)
    assert [len(rewards) for rewards in learner.normalizer.episode_rewards] == [7, 7]
    learner.cut_episodes()
    assert learner.normalizer.episode_rewards == [[], []]
    assert (learner.buffer.stop == EPISODE + 7).all()
    learner.buffer.add(*(np.full((2, *shape), 9, np.float32) for shape in ((3,), (2,), ())),
                       np.zeros(2, bool), np.zeros(2, bool), np.full((2, 3), 9, np.float32))
    batch = learner.buffer.sample(2000, learner.generators["replay"])
    new, new_next = (batch.obs == 9).all(1), (batch.next_obs == 9).all(1)
    assert new.any() and torch.equal(new, new_next)  # nothing leads from the cut episode into the next
    assert not batch.terminated.any()


def test_more_steps_may_be_asked_for_and_the_ring_grows(args):
    run_until(args, 2 * EPISODE)
    brc_sac.train(resumed(args, total_steps=400))
    learner = learner_of(dataclasses.replace(args, total_steps=400))
    assert learner.env_step == 400
    # Short episodes take a row more for each final observation than the ring has to spare: some of the oldest are gone.
    assert (learner.buffer.stop - learner.buffer.first > 380).all()


def damage_nothing_left(path):
    path.write_bytes(b"")


def damage_cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_torn(path):
    """The length is right, but the last blocks never reached the disk."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def damage_hole(path):
    content = bytearray(path.read_bytes())
    content[1024:5120] = bytes(4096)
    path.write_bytes(content)


def damage_gone(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_nothing_left, damage_cut_off, damage_flipped_bit, damage_torn,
                                    damage_hole, damage_gone])
@pytest.mark.parametrize("file", ["checkpoint.pt", "replay/0000000160.pt"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(args, damage, file, capsys):
    brc_sac.train(args)
    damage(brc_sac.Path(args.run_dir) / file)
    capsys.readouterr()
    assert learner_of(args).env_step == 120
    message = capsys.readouterr().err
    assert os.path.basename(file) in message and "going on from" in message and message.count("\n") == 1
    brc_sac.train(resumed(args))
    assert learner_of(args).env_step == 160
    assert sorted(os.listdir(args.run_dir)) == ["args.json", "checkpoint.previous.pt", "checkpoint.pt", "metrics.csv",
                                                "replay", "tensorboard"]


def test_any_flipped_bit_is_noticed_or_harmless(args):
    brc_sac.train(args)
    path = brc_sac.Path(args.run_dir) / "checkpoint.pt"
    content, expected = path.read_bytes(), flat(brc_sac.read_file(path))
    draw = random.Random(0)
    noticed = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            state = flat(brc_sac.read_file(path))
        except brc_sac.CheckpointError:
            noticed += 1
            continue
        assert state.keys() == expected.keys()
        assert all(same(leaf, expected[name]) for name, leaf in state.items())
    assert noticed > 75


def test_two_damaged_checkpoints_are_refused_in_one_sentence(args):
    brc_sac.train(args)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage_cut_off(brc_sac.Path(args.run_dir) / name)
    with pytest.raises(brc_sac.UsageError, match="No complete checkpoint in"):
        brc_sac.train(resumed(args))


def test_a_damaged_segment_that_both_checkpoints_need_is_named(args):
    brc_sac.train(args)
    damage_flipped_bit(brc_sac.Path(args.run_dir) / "replay" / "0000000040.pt")
    with pytest.raises(brc_sac.UsageError, match="No complete checkpoint in .*0000000040.pt is missing or damaged"):
        brc_sac.train(resumed(args))
    brc_sac.evaluate_run(dataclasses.replace(args, evaluate=args.run_dir))  # which needs no replay


def test_a_checkpoint_without_replay_can_be_evaluated_and_not_resumed(args, capsys):
    args = dataclasses.replace(args, save_replay=False)
    brc_sac.train(args)
    assert not (brc_sac.Path(args.run_dir) / "replay").exists()
    capsys.readouterr()
    brc_sac.evaluate_run(dataclasses.replace(args, evaluate=args.run_dir))
    assert "test at step 160" in capsys.readouterr().out
    with pytest.raises(brc_sac.UsageError, match="--no-save-replay"):
        brc_sac.train(resumed(args))


def test_only_new_rows_are_written_and_old_segments_go(args):
    args = dataclasses.replace(args, buffer_size=50)
    brc_sac.train(args)
    segments = {path.name: brc_sac.read_file(path) for path in (brc_sac.Path(args.run_dir) / "replay").iterdir()}
    assert "0000000040.pt" not in segments  # its rows have left the ring of about 50
    rows = EPISODE * 2 + 2  # of 40 steps, with two final observations
    assert len(segments["0000000160.pt"]["row"]) == 2 * (rows + 1)  # and the current one, of two tasks


@pytest.fixture
def failing_disk(monkeypatch):
    """write_file fails while this list is not empty, as on a full disk."""
    failures, write_file = [], brc_sac.write_file

    def write(path, content):
        if failures:
            raise OSError(28, failures.pop())
        write_file(path, content)

    monkeypatch.setattr(brc_sac, "write_file", write)
    return failures


def test_a_full_disk_is_survived(args, failing_disk, capsys):
    failing_disk.extend(["No space left on device"] * 2)  # the checkpoints at 40 and 80
    brc_sac.train(args)
    assert "Checkpoint at step 40 failed" in "".join(capsys.readouterr())
    assert learner_of(args).env_step == 160
    batch = learner_of(args).buffer.sample(2000)
    assert batch.obs.isfinite().all() and len(batch.obs.unique(dim=0)) > 100  # the rows of the missed ones are there


def test_checkpoints_that_fail_leave_nothing_behind_on_a_full_disk(args, monkeypatch, capsys):
    class FullDisk:
        def write(self, content):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    def write(path, content):
        """The segment still fits, the networks do not, from the third checkpoint on."""
        if path.name == "checkpoint.new.pt" and content["env_step"] > 80:
            monkeypatch.setattr(torch, "save", lambda content, file: save(content, FullDisk()))
        try:
            write_file(path, content)
        finally:
            monkeypatch.setattr(torch, "save", save)

    save, write_file = torch.save, brc_sac.write_file
    monkeypatch.setattr(brc_sac, "write_file", write)
    brc_sac.train(args)
    output = "".join(capsys.readouterr())
    assert "Checkpoint at step 120 failed ([Errno 28] No space left on device)" in output
    assert "The last checkpoint is from step 80 of 160" in output
    assert sorted(os.listdir(brc_sac.Path(args.run_dir) / "replay")) == ["0000000040.pt", "0000000080.pt"]
    assert learner_of(args).env_step == 80


def test_a_run_is_resumed_where_nothing_can_be_written_at_first(args, failing_disk, monkeypatch, capsys):
    run_until(args, 50)
    metrics = brc_sac.Path(args.run_dir) / "metrics.csv"
    complete = metrics.read_bytes()
    metrics.write_bytes(complete + b"test,a,0,return,8")  # half a line, from a kill
    failing_disk.append("No space left on device")  # the checkpoint at 80

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(brc_sac, "SummaryWriter", full_disk)
    monkeypatch.setattr(brc_sac, "write_args", full_disk)
    brc_sac.train(resumed(args))
    assert "the run goes on" in "".join(capsys.readouterr())
    assert learner_of(args).env_step == 160
    rows = [line.split(",") for line in metrics.read_text().splitlines()]
    assert metrics.read_bytes().startswith(complete) and all(len(row) == 6 for row in rows)
    assert [int(row[4]) for row in rows if row[1:4] == ["a", "0", "return"]] == [40, 80, 120, 160]


def test_args_json_keeps_the_first_command_and_records_every_resume(args, monkeypatch):
    monkeypatch.setattr("sys.argv", ["first"])
    run_until(args, 40)
    monkeypatch.setattr("sys.argv", ["second"])
    brc_sac.train(resumed(args, total_steps=200))
    facts = json.loads((brc_sac.Path(args.run_dir) / "args.json").read_text())
    assert (facts["command"], facts["total_steps"], facts["resume"]) == ("first", 200, None)
    assert [(entry["env_step"], entry["command"]) for entry in facts["resumed"]] == [(40, "second")]


def test_a_run_that_could_never_write_a_checkpoint_says_so(args, failing_disk):
    failing_disk.extend(["No space left on device"] * 100)
    with pytest.raises(brc_sac.RunError, match="No checkpoint"):
        brc_sac.train(args)


def test_sigusr1_writes_a_checkpoint_and_goes_on(args):
    args = dataclasses.replace(args, checkpoint_interval=1000, eval_interval=1000)
    stop_at(33, signal.SIGUSR1)
    brc_sac.train(args)
    assert {path.name for path in (brc_sac.Path(args.run_dir) / "replay").iterdir()} >= {"0000000033.pt"}
    assert learner_of(args).env_step == 160


def test_a_second_sigint_exits_at_once(args):
    def hook(env):
        if env.steps == 50:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the step went on")

    Pendulum.hook = hook
    with pytest.raises(KeyboardInterrupt):
        brc_sac.train(args)
    assert learner_of(args).env_step == 40


def test_sigterm_during_an_evaluation_leaves_the_evaluation_to_the_resumed_run(args, monkeypatch, tmp_path):
    brc_sac.train(args)
    stopped = dataclasses.replace(args, run_dir=str(tmp_path / "stopped"))

    def interrupted(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*inputs)

    evaluate = brc_sac.evaluate
    monkeypatch.setattr(brc_sac, "evaluate", interrupted)
    with pytest.raises(SystemExit) as exit:
        brc_sac.train(stopped)
    assert exit.value.code == 128 + signal.SIGTERM
    assert metrics(stopped).count("\n") == 1 and learner_of(stopped).env_step == 40
    monkeypatch.setattr(brc_sac, "evaluate", evaluate)
    brc_sac.train(resumed(stopped))
    assert metrics(stopped) == metrics(args)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_does_not_grow_over_fifty_checkpoints(args, monkeypatch):
    def save(run_dir, learner):
        save_checkpoint(run_dir, learner)
        gc.collect()
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)

    save_checkpoint, resident = brc_sac.save_checkpoint, []
    monkeypatch.setattr(brc_sac, "save_checkpoint", save)
    brc_sac.train(dataclasses.replace(args, width=64, buffer_size=64, total_steps=300, checkpoint_interval=5,
                                      eval_interval=300, updates_per_step=1))
    assert len(resident) == 60
    assert max(resident[30:]) - max(resident[10:30]) < 4, resident  # MB; a checkpoint is 0.5


def test_an_environment_that_returns_nan_is_named_and_a_checkpoint_is_left(args):
    def hook(env):
        if env.steps == 50:
            env.state[:] = np.nan

    Pendulum.hook = hook
    with pytest.raises(brc_sac.RunError, match=r"(?s)\ba\b.*--resume"):
        brc_sac.train(args)
    assert learner_of(args).env_step == 49


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_batch(args, monkeypatch):
    def critic_loss(*inputs):
        loss, metrics = original(*inputs)
        calls.append(loss)
        factor = 1.0 if len(calls) < 60 else torch.nan
        return loss * factor, metrics | {"critic_loss": loss.detach() * factor}

    original, calls = brc_sac.critic_loss, []
    monkeypatch.setattr(brc_sac, "critic_loss", critic_loss)
    with pytest.raises(brc_sac.RunError, match="critic_loss is nan at step 50"):
        brc_sac.train(args)
    batch = torch.load(brc_sac.Path(args.run_dir) / "nonfinite_batch.pt", weights_only=True)
    assert batch["obs"].shape == (8, 3)
    assert learner_of(args).env_step == 40


def test_more_steps_do_not_turn_a_resumed_run_from_eager_to_compiled(args, monkeypatch):
    def spy(*inputs):
        seen.append(inputs[3])
        return fast_path(*inputs)

    seen, fast_path = [], brc_sac.fast_path
    monkeypatch.setattr(brc_sac, "fast_path", spy)
    brc_sac.train(args)
    brc_sac.train(dataclasses.replace(args, resume=args.run_dir, total_steps=args.total_steps + 1))
    assert seen == [None, False]
