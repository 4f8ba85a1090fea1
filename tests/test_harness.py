"""harness.py under both agents on toy tasks: exact resume, kills, signals, damaged files, failing disks, sentences."""

import contextlib
import errno
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import brc_sac
import harness
from conftest import EPISODE, SMALL, at_step, checkpoint, files_under, read_csv, steps_of


def run_dir(args) -> Path:
    return Path(args.run_dir)


def saved(args, name: str = "checkpoint.pt") -> dict:
    return checkpoint(run_dir(args), name)


def flat(state, prefix=""):
    """A nested state as {path: leaf}."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def same(first, second) -> bool:
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def assert_same_run(ours, theirs) -> None:
    """The same learner bit for bit, and so the same next batches; the same metrics and replay files."""
    first, second = flat(saved(ours)), flat(saved(theirs))
    for state in (first, second):  # the current row holds no action and no reward yet, in brc_drq.py nothing
        state["/buffer/rows"][1, :, 3 if "actor_width" in vars(ours) else 0:] = 0
    pieces = {path for path in {*first, *second} if path.startswith("/replay")}  # they follow the stops
    assert first.keys() - pieces == second.keys() - pieces
    assert not [path for path in first.keys() - pieces if not same(first[path], second[path])]
    for path in (run_dir(ours) / "replay").iterdir():
        assert path.read_bytes() == (run_dir(theirs) / "replay" / path.name).read_bytes(), path
    assert (run_dir(ours) / "metrics.csv").read_text() == (run_dir(theirs) / "metrics.csv").read_text()


# ---------------------------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize(("variant", "buffer_size"), [("paper", 1000), ("paper", 50), ("release", 50)])
def test_a_resumed_run_equals_one_that_never_stopped(program, monkeypatch, variant, buffer_size):
    """Also where a signal comes in the midst of an evaluation, which is then left to the resumed run."""
    def stop_in_evaluation(*inputs, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*inputs, **options)

    changes = {"buffer_size": buffer_size} | ({"variant": variant} if program.name == "brc_sac" else {})
    straight = program.args(run_dir=str(program.folder / "straight"), **changes)
    stopped = program.args(run_dir=str(program.folder / "stopped"), **changes)
    program.module.train(straight)
    evaluate = program.module.evaluate
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(program.module, "evaluate", stop_in_evaluation)
        program.module.train(stopped)
    assert saved(stopped)["env_step"] == 2 * EPISODE and steps_of(stopped) == []
    program.train_until(program.resumed(stopped), 3 * EPISODE)  # its own
    assert saved(stopped)["env_step"] == 5 * EPISODE
    program.module.train(program.resumed(stopped))
    assert_same_run(straight, stopped)


def test_a_resume_cuts_the_running_episodes_and_may_ask_for_more_steps_and_a_larger_ring(program, monkeypatch):
    args, ended, finish = program.args(), [], program.module.ReturnNormalizer.finish
    program.train_until(args, EPISODE + 6)
    rewards = saved(args)["normalizer"]["episode_rewards"]
    monkeypatch.setattr(program.module.ReturnNormalizer, "finish", lambda normalizer, task, *end: (
        ended.append(len(normalizer.episode_rewards[task])), finish(normalizer, task, *end)))
    program.module.train(program.resumed(args, total_steps=120))
    assert [len(of_task) for of_task in rewards] == [6, 6], "which give no return"
    assert ended[:2] == [EPISODE if program.name == "brc_sac" else 7] * 2  # a whole one, or a game's first life
    ends = np.fromfile(run_dir(args) / "replay" / "end.bin", np.int32).reshape(-1, 2)
    assert (ends[:, 0] > 0).nonzero()[0][:3].tolist() == [9, 15, 25]
    assert saved(args)["env_step"] == 120 and steps_of(args) == [20, 40, 60, 80, 100, 120]


@pytest.mark.parametrize(("program", "seed"), [("brc_sac", 0), ("brc_sac", 1), ("brc_drq", 2)], indirect=["program"])
def test_a_run_that_is_killed_at_random_moments_is_complete_in_the_end(program, seed):
    def kill_at(line: int) -> None:
        """Of the lines that the process executes, in the midst of a file as well as of a step."""
        def trace(*_):
            if next(lines, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        lines = iter(range(line))
        sys.settrace(trace)

    draw, args = random.Random(seed), program.args()
    for line in (*(draw.randrange(60_000) for _ in range(8)), None):
        begun = (program.folder / "run/args.json").exists()
        code = program.run("--resume run" if begun else f"{SMALL[program.name]} --checkpoint-interval 7 --run-dir run",
                           lambda: line and kill_at(line))
        assert code in (0, -signal.SIGKILL), program.err
    assert code == 0 and steps_of(args) == [20, 40, 60, 80] and saved(args)["env_step"] == 80
    assert all(line.count(",") == 5 for line in (run_dir(args) / "metrics.csv").read_text().splitlines())


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("step", [0, 27])
def test_a_signal_stops_the_run_with_a_checkpoint(sac, number, step):
    """Also during the start-up, which it does not interrupt."""
    def prepare():
        if step:
            at_step(step, lambda: os.kill(os.getpid(), number))
        else:
            opened = harness.Run.open
            harness.Run.open = lambda self, buffer: (os.kill(os.getpid(), number), opened(self, buffer))
    assert sac.run(f"{SMALL['brc_sac']} --run-dir 'the run'", prepare) == 128 + number
    last = sac.err.splitlines()[-1]
    assert last == (f"Stopped by {number.name} at step {step}. Last checkpoint: step {step}. To go on: "
                    "python brc_sac.py --resume 'the run'")
    assert sac.run("--resume 'the run'") == 0, sac.err
    assert steps_of(sac.args(run_dir=str(sac.folder / "the run"))) == [20, 40, 60, 80]


@pytest.mark.parametrize(("number", "ignored"), [(signal.SIGHUP, True), (signal.SIGUSR1, False)])
def test_a_run_under_nohup_and_one_asked_for_a_checkpoint_go_on(sac, number, ignored):
    def prepare():
        if ignored:
            signal.signal(number, signal.SIG_IGN)
        at_step(27, lambda: os.kill(os.getpid(), number))
        save = harness.Run.save
        harness.Run.save = lambda self, step, *args: (print("saved", step, flush=True), save(self, step, *args))
    assert sac.run(f"{SMALL['brc_sac']} --run-dir run", prepare) == 0, sac.err
    assert ("saved 27" in sac.out.splitlines()) != ignored and steps_of(sac.args()) == [20, 40, 60, 80]


def test_a_second_sigint_ends_at_once(sac):
    def prepare():
        at_step(27, lambda: (os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT), os._exit(99)))
    assert sac.run(f"{SMALL['brc_sac']} --run-dir run", prepare) == 128 + signal.SIGINT
    assert saved(sac.args())["env_step"] == 20 and "Traceback" not in sac.err
    assert sac.run("--resume run") == 0, sac.err  # the directory is free again


# --------------------------------------------------------------------------------------------------- damaged files


def flipped_bit(content: bytes) -> bytes:
    middle = len(content) // 2 if content[:2] == b"PK" else len(content) * 7 // 8  # what only the last checkpoint needs
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


DAMAGE = {"gone": None, "empty": lambda content: b"", "cut off": lambda content: content[:len(content) // 2],
          "flipped bit": flipped_bit,  # and torn: the last blocks never reached the disk
          "torn": lambda content: content[:len(content) * 7 // 8].ljust(len(content), b"\0")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Agent name -> a finished run, to copy: made when first asked for."""
    made = {}

    def copy(program):
        if program.name not in made:
            made[program.name] = tmp_path_factory.mktemp(program.name) / "run"
            program.module.train(program.args(run_dir=str(made[program.name])))
        shutil.copytree(made[program.name], program.folder / "run")
        return program.args()

    return copy


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_falls_back_to_the_previous_checkpoint(sac, finished, damage, capsys):
    args = finished(sac)
    files = [run_dir(args) / "checkpoint.pt", *(run_dir(args) / "replay").iterdir()]
    for path in files:
        good = path.read_bytes()
        if DAMAGE[damage]:
            path.write_bytes(DAMAGE[damage](good))
        else:
            path.unlink()
        # A file that the previous checkpoint needs too, and that is gone or cut before its end, is refused by name.
        lost = path.parent.name == "replay" and damage in ("gone", "empty", "cut off")
        capsys.readouterr()
        if lost:
            with pytest.raises(harness.UsageError, match=f"(?s)No complete checkpoint in .*{path.name}"):
                sac.module.train(sac.resumed(args))
            path.write_bytes(good)
        else:
            assert len(sac.module.train(sac.resumed(args))) == 2  # evaluated again, as another agent
            message = capsys.readouterr().err
            assert "checkpoint.previous.pt, of step 60, takes its place." in message
        assert saved(args)["env_step"] == 80 and steps_of(args) == [20, 40, 60, 80], path
    sac.module.train(sac.resumed(args, total_steps=100))
    assert steps_of(args) == [20, 40, 60, 80, 100]


def test_any_flipped_bit_of_a_checkpoint_is_noticed_or_harmless(sac, finished):
    args, draw, harmless = finished(sac), random.Random(0), 0
    (run_dir(args) / "checkpoint.previous.pt").unlink()
    path = run_dir(args) / "checkpoint.pt"
    content, expected = path.read_bytes(), flat(saved(args))
    for _ in range(120):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(harness.UsageError):
            state, harmless = flat(harness.read_checkpoint(run_dir(args))), harmless + 1
            assert state.keys() == expected.keys() and all(same(leaf, expected[name]) for name, leaf in state.items())
    assert harmless < 60


def test_where_both_checkpoints_are_damaged_one_sentence_says_so(program, finished):
    args = finished(program)
    piece = next(path for path in (run_dir(args) / "replay").iterdir() if path.stat().st_size > 1000)
    content, middle = piece.read_bytes(), piece.stat().st_size * 6 // 10  # step 48, which both need
    piece.write_bytes(content[:middle] + b"\xff" * 10 + content[middle + 10:])
    refusal = program.refused("--resume run")
    assert re.search(rf"No complete checkpoint in run: .*{piece.name} fail their checksum", refusal)
    assert program.run("--evaluate run") == 0, program.err  # which needs no replay
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run_dir(args) / name).write_bytes(b"PK")
    for arguments in ("--resume run", "--evaluate run"):
        assert "No complete checkpoint in run" in program.refused(arguments)


def test_a_run_without_its_replay_can_be_evaluated_and_not_resumed(program):
    assert program.run(f"{SMALL[program.name]} --run-dir run --no-save-replay") == 0, program.err
    assert not (program.folder / "run/replay").exists()
    assert "saved without its replay, which --resume" in program.refused("--resume run")
    assert program.run("--evaluate run") == 0 and "at step 80" in program.out


def test_foreign_files_stay_and_cost_nothing(sac, finished, capsys):
    args = finished(sac)
    foreign = [run_dir(args) / name for name in ("notes.txt", "checkpoint.pt.tmp~", "old.tmp/x",
                                                 "replay/mine", "replay/rows.bin.tmp", "lock.tmp", "tensorboard/y/z")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("mine")
    capsys.readouterr()
    sac.module.train(sac.resumed(args, total_steps=100))
    assert all(path.read_text() == "mine" for path in foreign)
    assert saved(args)["env_step"] == 100 and "cannot be written" not in "".join(capsys.readouterr())


# --------------------------------------------------------------------------------------------------- failing disks


def limit_files(size: int) -> None:
    """From now on the kernel refuses to write to a file of this process behind `size` bytes, as a full disk does."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


@pytest.mark.parametrize(("program", "size"), [("brc_sac", 0), ("brc_sac", 20_000), ("brc_drq", 0)],
                         indirect=["program"])
def test_a_full_disk_costs_checkpoints_and_rows_and_not_the_run(program, size):
    """And no row in the end: with room again, those that waited are written. The output lies on that disk too."""
    flags = f"{SMALL[program.name]} --run-dir run --exp-name test"
    full = lambda: (limit_files(size), at_step(50, lambda: limit_files(-1)))  # noqa: E731
    assert program.run(flags, lambda: at_step(15, full)) == 0
    assert steps_of(program.args()) == [20, 40, 60, 80] and saved(program.args())["env_step"] == 80
    assert saved(program.args(), "checkpoint.previous.pt")["env_step"] == 60
    assert program.run("--resume run --total-steps 100") == 0, program.err  # the replay's file holds every row


@pytest.mark.parametrize(("program", "start"), [("brc_sac", 15), ("brc_sac", 45), ("brc_drq", 15)],
                         indirect=["program"])
def test_a_run_whose_last_checkpoint_cannot_be_written_ends_with_1(program, start):
    def prepare():
        def tell(error, sentence):
            limit_files(-1)  # the sentence itself may lie on the full disk; here it goes elsewhere
            (program.folder / "sentence").write_text(sentence)
        harness.RunError.__init__ = tell
        at_step(start, lambda: limit_files(2_000))

    assert program.run(f"{SMALL[program.name]} --run-dir run", prepare) == 1
    last = "step 0" if start < 20 else "step 40"
    told = f"The checkpoint of step 80 could not be written to run. Last checkpoint: {last}."
    assert (program.folder / "sentence").read_text() == told
    assert program.run("--resume run") == 0, program.err
    assert steps_of(program.args()) == [20, 40, 60, 80] and saved(program.args())["env_step"] == 80


def test_a_disk_that_reports_at_sync_that_it_is_full(sac, monkeypatch, capsys):
    def sync(number):
        if failures:
            raise OSError(errno.ENOSPC, failures.pop())
        fsync(number)

    fsync, failures, args = os.fsync, [], sac.args()
    monkeypatch.setattr(os, "fsync", sync)
    at_step(15, lambda: failures.extend(["no space"] * 2))  # the replay's at 20, and the rows
    sac.module.train(args)
    assert "The checkpoint of step 20 cannot be written ([Errno 28] no space)" in "".join(capsys.readouterr())
    assert steps_of(args) == [20, 40, 60, 80] and saved(args)["env_step"] == 80


def test_a_directory_that_cannot_be_written_at_a_resume_costs_its_files_only(sac, finished, monkeypatch, capsys):
    """Root may write anywhere, so that here every write says what a read-only file system says."""
    def read_only(function, writes):
        def call(path, *arguments, **options):
            if str(path).startswith(args.run_dir) and writes(*arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return function(path, *arguments, **options)
        return call

    args = finished(sac)
    before = {path: path.read_bytes() for path in run_dir(args).rglob("*") if path.is_file()}
    monkeypatch.setattr(harness, "open", read_only(open, lambda mode="r", *_: set(mode) & set("wa+")), raising=False)
    monkeypatch.setattr(os, "open", read_only(os.open, lambda flags, *_: flags & (os.O_RDWR | os.O_WRONLY)))
    for name in ("replace", "truncate", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, read_only(getattr(os, name), lambda *_: True))
    with pytest.raises(harness.RunError, match="The checkpoint of step 90 could not be written .* checkpoint: step 80"):
        sac.module.train(sac.resumed(args, total_steps=90))
    assert "metrics.csv cannot be written ([Errno 30]" in "".join(capsys.readouterr())
    assert {path for path, content in before.items() if path.read_bytes() != content} == set()


def test_a_directory_that_cannot_be_made_is_one_sentence(sac):
    assert "cannot be written" in sac.refused(f"{SMALL['brc_sac']} --run-dir {'x' * 300}")


def test_an_old_run_directory_is_refused_in_one_sentence(program, finished):
    args = finished(program)
    facts = json.loads((run_dir(args) / "args.json").read_text())
    del facts["format"]
    (run_dir(args) / "args.json").write_text(json.dumps(facts))
    for arguments in ("--resume run", "--evaluate run"):
        assert "run is of another version of this program" in program.refused(arguments)
    for content in ("", "[]", "{}", "\0\0"):
        (run_dir(args) / "args.json").write_text(content)
        program.refused("--resume run")


# ----------------------------------------------------------------------------------------------- rows and args.json
DAMAGED = (b"\x93\xff\0\xfe", b"\0" * 300, b"test,reach,0", b'"', b"test,mean,0,score,80", b"\n,,,", b"a,b,c,d,e,f",
           b'"test,reach', b"test,mean,0,score,\xb2,1")


@pytest.mark.parametrize("half", [b"test,mean,0,score,99999,0.", b"\0" * 300, b'"test', b"\xff"])
def test_damaged_lines_of_metrics_csv_cost_themselves_only(sac, finished, half):
    """At the end, where a kill leaves half a line, and in the midst, where only a bad disk does."""
    args = finished(sac)
    path = run_dir(args) / "metrics.csv"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:5], *(line + b"\n" for line in DAMAGED), *rows[5:], half]))
    assert sac.run("--resume run --total-steps 90") == 0, sac.err
    kept = path.read_bytes()
    assert all(kept.count(row) == 1 for row in rows) and all(line + b"\n" in kept for line in DAMAGED)
    new = kept[kept.index(rows[-1]) + len(rows[-1]):].decode().splitlines()
    assert {line.split(",")[4] for line in new} == {"90"} and all(line.count(",") == 5 for line in new)
    assert len(new) == len(set(new)) == (len(rows) - 1) / 4


@pytest.mark.parametrize("exp_name", ['a,b "ü∂" - ', "mean,0,score,1,"])
def test_any_name_of_an_experiment_stays_one_field(sac, exp_name):
    args = sac.args(exp_name=exp_name)
    sac.train_until(args, 45)
    sac.module.train(sac.resumed(args))
    assert {row["exp_name"] for row in read_csv(run_dir(args) / "metrics.csv")} == {exp_name}
    assert steps_of(args) == [20, 40, 60, 80]


def test_args_json_keeps_the_first_command_and_records_every_resume(sac, monkeypatch):
    args = sac.args()
    monkeypatch.setattr("sys.argv", ["first"])
    sac.train_until(args, 20)
    monkeypatch.setattr("sys.argv", ["second"])
    sac.module.train(sac.resumed(args, total_steps=100))
    facts = json.loads((run_dir(args) / "args.json").read_text())
    assert (facts["command"], facts["total_steps"], facts["resume"]) == ("first", 100, None)
    assert [(entry["env_step"], entry["command"]) for entry in facts["resumed"]] == [(20, "second")]
    assert facts["program"] == os.path.abspath("brc_sac.py") and facts["go_on"].endswith(f"--resume {args.run_dir}")


def test_runs_in_weights_and_biases_have_ids_of_their_own_that_a_resume_keeps(sac, monkeypatch):
    calls, fake = [], types.ModuleType("wandb")
    fake.init, fake.__spec__ = lambda **settings: calls.append(settings), types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    first, second = (sac.args(track=True, run_dir=str(sac.folder / name)) for name in ("x", "y"))
    sac.train_until(first, 25)
    sac.module.train(second)
    sac.module.train(sac.resumed(first))
    ids = [call["id"] for call in calls]
    assert ids[0] == ids[2] != ids[1] and all(call["resume"] == "allow" for call in calls)


# ------------------------------------------------------------------------------------------------------- ownership


@pytest.mark.parametrize(("given", "codes"), [("", [0, 0, 0, 0]), ("--run-dir runs/run", [0, 2, 2, 2])])
def test_of_new_runs_in_one_second_each_has_a_directory_and_one_that_which_all_want(sac, given, codes):
    fixed = lambda: setattr(harness.time, "strftime", lambda form: "20000101-000000")  # noqa: E731
    processes = [sac.start(f"{SMALL['brc_sac']} {given}", fixed) for _ in range(4)]
    assert sorted(sac.wait(process) for process in processes) == codes
    steps = [steps_of(sac.args(run_dir=str(path))) for path in (sac.folder / "runs").iterdir()]
    assert steps == [[20, 40, 60, 80]] * codes.count(0)


def test_a_directory_belongs_to_one_run_at_a_time(sac):
    begin, resume, started = f"{SMALL['brc_sac']} --run-dir run", "--resume run", sac.folder / "started"
    for first in (begin, resume):
        process = sac.start(first, lambda: at_step(15, lambda: (started.touch(), signal.pause())))
        while not started.exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0), sac.err
        started.unlink()
        held = files_under(sac.folder / "run")
        assert "already holds files" in sac.refused(begin)
        assert "belongs to a run that is still going on" in sac.refused(resume)
        assert files_under(sac.folder / "run") == held
        os.kill(process, signal.SIGKILL)
        assert sac.wait(process) == -signal.SIGKILL
    assert sac.run(resume) == 0 and steps_of(sac.args()) == [20, 40, 60, 80], sac.err


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("error", "told"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True), (MemoryError("no more"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x5 and 6x16)"), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False), (TypeError("memory"), False)])
def test_only_the_allocators_errors_become_a_sentence_about_memory(sac, error, told):
    def prepare():
        def forward(*inputs):
            raise error
        brc_sac.Critic.forward = forward
    code = sac.run(f"{SMALL['brc_sac']} --run-dir run", prepare)
    assert code == 1 and ("Traceback" in sac.err) != told and ("in forward" in sac.err) != told
    assert ("brc_sac.py: Out of memory: " in sac.err.splitlines()[-1]) == told


@pytest.mark.parametrize(("program", "value", "step"), [("brc_sac", float("nan"), 15), ("brc_drq", float("inf"), 47)],
                         indirect=["program"])
def test_a_diverged_network_ends_the_run_and_leaves_the_last_good_checkpoint(program, value, step):
    def prepare():
        def init(agent, *args, **kwargs):
            of(agent, *args, **kwargs)
            networks = [getattr(agent, name) for name in ("critic", "actor") if hasattr(agent, name)]
            at_step(step, lambda: [next(network.parameters()).data.fill_(value) for network in networks])
        of, program.module.Agent.__init__ = program.module.Agent.__init__, init

    code = program.run(f"{SMALL[program.name]} --run-dir run --exp-name test", prepare)
    line = program.err.splitlines()[-1]
    last = step // 20 * 20
    assert code == 1 and "Traceback" not in program.err, program.err
    assert re.search(r"\w+ is not finite at step \d+: the networks have diverged. The last "
                     rf"checkpoint is from step {last}; to go on from there: python", line)
    assert all(leaf.isfinite().all() for leaf in flat(saved(program.args())["agent"]).values()
               if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    assert program.run("--resume run") == 0 and steps_of(program.args()) == [20, 40, 60, 80]


def test_memory_does_not_grow_over_thirty_checkpoints(sac, monkeypatch):
    def save(run, *args):
        of(run, *args)
        gc.collect()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)

    of, resident = harness.Run.save, []
    monkeypatch.setattr(harness.Run, "save", save)
    gc.freeze()  # what is there before is not looked through thirty times
    try:
        sac.module.train(sac.args(width=64, buffer_size=64, total_steps=150, checkpoint_interval=5, eval_interval=150))
    finally:
        gc.unfreeze()
    assert len(resident) == 31
    assert max(resident[20:]) - max(resident[5:20]) < 4, resident  # MB; a checkpoint is 0.5
