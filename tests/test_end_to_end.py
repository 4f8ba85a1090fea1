"""The scripts as a user runs them: tiny runs on real tasks, streams that fail, and every way of being refused."""

import dataclasses
import itertools
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import brc_sac
from conftest import ROOT, SMALL, checkpoint, files_under, read_csv
from harness import read_checkpoint

SCRIPT = ROOT / "brc_sac.py"
TINY = ("--width 32 --actor-width 16 --batch-size 32 --learning-starts 50 --total-steps 250 --eval-interval 100 "
        "--eval-episodes 1 --log-interval 50 --device cpu")
EVALUATED = (100, 200, 250)  # every interval, and the end
METAWORLD = f"--tasks reach drawer-close {TINY}"  # episodes of 200 steps: one ends within the run
# Run name -> arguments. "single" goes where runs go by default; "again" must not differ, however its tasks are stepped.
RUNS = {
    "metaworld": f"{METAWORLD} --variant paper --run-dir metaworld --workers 2",
    "again": f"{METAWORLD} --variant paper --run-dir again --workers 0 --exp-name again",
    "dmc": f"--tasks cartpole-swingup reacher-easy {TINY} --variant release --run-dir dmc --seed 1 --workers 0",
    "single": f"--tasks drawer-close {TINY} --variant release --goals fresh --no-overlap",
}


def shell(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=os.environ | env, capture_output=True, text=True,
                          timeout=300)


def python(*words: object) -> str:
    return shlex.join(map(str, [sys.executable, *words]))


def brc(arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return shell(f"{python(SCRIPT)} {arguments}", cwd)


def assert_table_of_the_last_evaluation(stdout: str, values: dict) -> None:
    rows = {words[0]: words for words in map(str.split, stdout.splitlines()) if words}
    for task in {task for task, _, _ in values}:
        assert float(rows[task][1]) == pytest.approx(values[task, "return", 250], abs=0.051)
        assert float(rows[task][-1]) == pytest.approx(values[task, "score", 250], abs=6e-4)


def run_of(name: str, cwd: Path) -> tuple[Path, str, dict]:
    """The directory of this run, its output, and its metrics: (env_name, metric, env_step) -> value."""
    process = brc(RUNS[name], cwd)
    assert process.returncode == 0, process.stderr
    path = cwd / name if name != "single" else next((cwd / "runs").iterdir())
    rows = read_csv(path / "metrics.csv")
    values = {(row["env_name"], row["metric"], int(row["env_step"])): float(row["value"]) for row in rows}
    assert len(values) == len(rows)
    return path, process.stdout, values


def assert_leaves_arguments_metrics_checkpoint_logs_and_table(name: str, path: Path, stdout: str, values: dict) -> None:
    args = json.loads((path / "args.json").read_text())
    assert {field.name for field in dataclasses.fields(brc_sac.Args)} | {"git_commit", "hardware"} <= args.keys()
    assert args["versions"]["torch"] == torch.__version__ and "mujoco" in args["versions"]
    tasks, variant = {"metaworld": (["reach", "drawer-close"], "paper"), "single": (["drawer-close"], "release"),
                      "dmc": (["cartpole-swingup", "reacher-easy"], "release")}[name]
    expected = dict(tasks=tasks, variant=variant, width=32, batch_size=32, total_steps=250, checkpoint_interval=100,
                    gamma=0.99, seed=int(name == "dmc"), overlap=name != "single",
                    exp_name=f"brc_sac-{'-'.join(tasks)}-{variant}")
    assert {key: args[key] for key in expected} == expected
    if name == "single":
        assert re.fullmatch(r"brc_sac-drawer-close-release__0__\d{8}-\d{6}", path.name)

    metrics = ["return", "score"] + ["success"] * (name != "dmc")
    assert values.keys() == set(itertools.product([*tasks, "mean"], metrics, EVALUATED))
    named = {(row["exp_name"], row["seed"]) for row in read_csv(path / "metrics.csv")}
    assert named == {(args["exp_name"], str(args["seed"]))}
    for step in EVALUATED:
        for metric in metrics:
            mean = np.mean([values[task, metric, step] for task in tasks])
            assert math.isfinite(mean) and values["mean", metric, step] == pytest.approx(mean, rel=1e-4)
        for task in tasks:
            score = values[task, "return", step] / 1000 if name == "dmc" else values[task, "success", step]
            assert values[task, "score", step] == pytest.approx(score, rel=1e-4)

    assert checkpoint(path)["env_step"] == 250
    assert {file.name for file in path.iterdir()} == {"args.json", "metrics.csv", "checkpoint.pt", "lock", "replay",
                                                          "checkpoint.previous.pt", "tensorboard"}
    assert_table_of_the_last_evaluation(stdout, values)

    # TensorBoard: losses, scales, embeddings and the same evaluations.
    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for tag in ("critic_loss", "actor_loss", "entropy", "temperature"):
        logged = scalars[f"train/{tag}"]
        assert list(logged) == [100, 150, 200, 250] and all(map(math.isfinite, logged.values()))
    assert scalars["train/temperature"][250] != scalars["train/temperature"][100]
    for (task, metric, step), value in values.items():
        assert scalars[f"eval_{metric}/{task}"][step] == pytest.approx(value, rel=1e-4, abs=1e-6)
    for task in tasks:  # the first of MetaWorld's episodes ended at step 200; dm_control's last for 1000
        scales = scalars[f"return_scale/{task}"]
        assert math.isinf(scales[150]) and math.isinf(scales[250]) == (name == "dmc")
    if name != "single":
        latest = max((path / "tensorboard").glob("*/*/tensors.tsv"), key=lambda path: int(path.parts[-3]))
        vectors = np.loadtxt(latest)
        assert int(latest.parts[-3]) == 250 and vectors.shape == (2, 32)
        np.testing.assert_allclose(np.linalg.norm(vectors, 2 - (name == "metaworld"), axis=-1), 1, rtol=1e-3)
        assert (latest.parent / "metadata.tsv").read_text().split() == tasks


@pytest.mark.parametrize("name", ["dmc", "single"])
def test_a_run_leaves_arguments_metrics_checkpoint_logs_and_table(name, tmp_path):
    assert_leaves_arguments_metrics_checkpoint_logs_and_table(name, *run_of(name, tmp_path))


def test_a_run_with_workers_leaves_the_same_and_its_seed_gives_the_same_metrics_without_and_at_evaluate(tmp_path):
    (path, stdout, values), (again, *_) = run_of("metaworld", tmp_path), run_of("again", tmp_path)
    assert_leaves_arguments_metrics_checkpoint_logs_and_table("metaworld", path, stdout, values)
    text = [(run_dir / "metrics.csv").read_text() for run_dir in (path, again)]
    assert text[0].replace("brc_sac-reach-drawer-close-paper", "again") == text[1]
    before = files_under(path)
    process = brc(f"--evaluate {path}", tmp_path)
    assert process.returncode == 0, process.stderr
    assert_table_of_the_last_evaluation(process.stdout, values)
    assert files_under(path) == before


def test_a_copy_of_the_script_in_a_folder_with_spaces_is_a_program_of_its_own(tmp_path):
    folder = tmp_path / "my 'ideas'"
    folder.mkdir()
    shutil.copy(SCRIPT, folder / "my_idea.py")
    env = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = folder / "my_idea.py"
    first = shell(f"{python(script)} {METAWORLD} --workers 0 --total-steps 60 --run-dir 'a run'", folder, **env)
    assert first.returncode == 0, first.stderr
    facts = json.loads((folder / "a run/args.json").read_text())
    assert facts["exp_name"] == "my_idea-reach-drawer-close-paper" and facts["program"] == str(script)
    resumed = shell(f"{facts['go_on']} --total-steps 70", folder, **env)
    assert resumed.returncode == 0, resumed.stderr
    assert "my_idea-reach-drawer-close-paper,mean,0,score,70" in (folder / "a run/metrics.csv").read_text()
    other = brc("--resume 'a run'", folder)
    assert other.returncode == 2
    assert other.stderr == f"brc_sac.py: a run is a run of my_idea.py, and this is brc_sac.py: {facts['go_on']}\n"


# ---------------------------------------------------------------------------------------------------------- faults
LONG = ("--tasks reach drawer-close --width 32 --actor-width 16 --batch-size 32 --learning-starts 50 "
        "--total-steps 1000000 --eval-interval 200000 --eval-episodes 1 --checkpoint-interval 100 --device cpu "
        "--no-compile --workers 2 --run-dir run")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_ends_the_run_after_a_checkpoint_and_a_killed_run_its_workers(tmp_path):
    def last_step() -> int:
        saved = (tmp_path / "run/checkpoint.previous.pt").exists()  # from the second checkpoint on
        return read_checkpoint(tmp_path / "run")["env_step"] if saved else 0

    step, deadline = 0, time.monotonic() + 480
    for victim, arguments in (("worker", LONG), ("run", "--resume run")):
        process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments.split()], cwd=tmp_path, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while last_step() <= step:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) == 4  # two to train, two to evaluate
        os.kill(int(workers[1]) if victim == "worker" else process.pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        step = last_step()
        if victim == "worker":
            assert process.returncode == 1 and "Traceback" not in stderr, stderr
            assert re.search(rf"the environments of drawer-close was killed by SIGKILL .*\nStopped at step {step:,}\. "
                             rf"To go on: python {re.escape(str(SCRIPT))} --resume run\n", stderr), stderr
    resumed = brc(f"--resume run --total-steps {step + 10} --workers 0", tmp_path)
    assert resumed.returncode == 0, resumed.stderr


# --------------------------------------------------------------------------------------------------------- streams
ON_TOYS = """
import runpy, sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, suites
suites.make = lambda task, seed, render_mode=None, **_: conftest.Pendulum()
sys.argv[:] = [{script!r}, *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture
def toys(tmp_path) -> str:
    """The command of a small run on toy tasks, in a process of its own with an interpreter that ends as it does."""
    (tmp_path / "toys.py").write_text(ON_TOYS.format(root=str(ROOT), tests=str(ROOT / "tests"), script=str(SCRIPT)))
    return f"{python('toys.py')} {SMALL['brc_sac']} --run-dir run"


@pytest.mark.parametrize("streams", ["> /dev/full 2>&1", ">&- 2>&- <&-", "2>&1 | head -1"])
def test_a_run_whose_output_nobody_takes_ends_well(toys, tmp_path, streams):
    process = shell(f"{toys} {streams}; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert process.returncode == 0, process.stderr
    assert "Exception" not in process.stderr and "Traceback" not in process.stderr and "Errno" not in process.stderr
    assert checkpoint(tmp_path / "run")["env_step"] == 80
    assert (tmp_path / "run" / "metrics.csv").read_text().count("mean,0,score") == 4


def test_a_run_goes_on_when_its_terminal_goes_away(toys, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(["bash", "-c", f"trap '' HUP; exec {toys}"], cwd=tmp_path, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)
    os.close(theirs)
    while b"run" not in os.read(ours, 1000):
        pass
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert checkpoint(tmp_path / "run")["env_step"] == 80


SCRIPTS = [path for pattern in ("*.py", "benchmarks/*.py", "ablations/mse.py") for path in sorted(ROOT.glob(pattern))
           if '__name__ == "__main__"' in path.read_text() and "import flax" not in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_may_be_cut_short(script, tmp_path):
    process = shell(f"{python(script)} --help | head -1; exit ${{PIPESTATUS[0]}}", tmp_path, PYTHONPATH=str(ROOT))
    assert process.stdout.startswith("usage:") and process.stderr == "" and process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_help_lists_the_flags_without_importing_torch_or_a_simulator(tmp_path):
    process = shell(f"{python('-X', 'importtime', SCRIPT)} --help", tmp_path)
    assert process.returncode == 0
    for field in dataclasses.fields(brc_sac.Args):
        assert re.search(rf"(?<![\w-])--(no-)?{field.name.replace('_', '-')}(?![\w-])", process.stdout), field.name
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "suites" in imported  # the check itself works
    assert not imported & {"torch", "mujoco", "dm_control", "metaworld", "ale_py", "cv2", "humanoid_bench",
                           "tensorboard", "wandb"}


# ---------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(("names", "values"), [  # arguments, and values beside their ranges
    ("width critic_depth actor_depth actor_width embedding_dim batch_size updates_per_step learning_starts buffer_size "
     "eval_interval eval_episodes log_interval checkpoint_interval", (0, -3)),
    ("total_steps workers", (-1,)), ("seed", (-1, 2**32 - 42)), ("num_atoms", (1,)), ("weight_decay", (-1e-4,)),
    ("gamma", (1.0, -0.1, math.nan)), ("tau", (1.5, -0.5)),
    ("learning_rate v_max init_temperature", (0.0, -10.0, math.nan, math.inf))])
def test_every_number_has_its_range(names, values):
    for name, value in itertools.product(names.split(), values):
        with pytest.raises(brc_sac.UsageError) as refusal:
            brc_sac.resolve(brc_sac.Args(**{name: value}))
        flag = name.replace("_", "-")
        assert re.fullmatch(rf"--{flag} is {value}: give a number of at least [^\n]*\d\.", str(refusal.value))


@pytest.mark.parametrize(("arguments", "message"), [
    ("--tasks reach draw-close", "Unknown task 'draw-close': did you mean drawer-close"),
    ("--tasks reach Pong", "Pong is an Atari game.*leave the games out, or use brc_drq.py"),
    ("--tasks reach --total-steps 30 --learning-starts 30", "With --total-steps 30 and --learning-starts 30 nothing"),
    ("--resume nowhere", "nowhere holds no run"), ("--evaluate nowhere", "nowhere holds no run"),
    ("--resume ''", "--resume, --evaluate and --run-dir take a directory"), ("--run-dir ''", "take a directory"),
    ("--resume a --evaluate b", "of the first two only one"),
    ("--tasks reach --device quantum", "Device 'quantum' is not on this machine .*: give cpu"),
    ("--tasks reach --track", "--track needs W&B, which is not installed")])
def test_bad_arguments_end_in_one_sentence_and_create_nothing(sac, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("harness.find_spec", lambda name: None)
    assert re.search(message, sac.refused(arguments))
    assert {path.name for path in sac.folder.iterdir()} == {"out", "err"} and sac.out == ""


@pytest.mark.parametrize("arguments", ["--wdith 64", "--tasks reach --width wide", "--variant both", "reach"])
def test_what_is_no_argument_is_refused(sac, arguments):
    assert sac.run(arguments) == 2 and "Traceback" not in sac.err
    assert {path.name for path in sac.folder.iterdir()} == {"out", "err"}


def test_what_a_run_learned_with_cannot_change_at_resume(program):
    assert program.run(f"{SMALL[program.name]} --total-steps 25 --run-dir run") == 0, program.err
    before = files_under(program.folder / "run")
    resume = program.refused("--resume run --batch-size 64")
    assert "--batch-size is 4 in run and cannot become 64: beside --resume only --total-steps, --device" in resume
    assert "--eval-episodes" not in resume and "--resume," not in resume and "--run-dir" not in resume
    assert "--eval-episodes is 1 in run and cannot become 3" in program.refused("--resume run --eval-episodes 3")
    assert "run has made 25 steps already" in program.refused("--resume run --total-steps 24")
    evaluate = program.refused("--evaluate run --batch-size 64")
    assert "beside --evaluate only" in evaluate and ", --eval-episodes may change." in evaluate
    assert program.run("--evaluate run --eval-episodes 3") == 0 and "3 episodes" in program.out, program.err
    assert files_under(program.folder / "run") == before


@pytest.mark.parametrize("held", ["metrics.csv", ".hidden", "replay/rows.bin", "lock"])
def test_a_new_run_takes_no_directory_that_holds_files(program, held):
    path = program.folder / "taken it" / held
    path.parent.mkdir(parents=True)
    path.write_text("" if held == "lock" else "somebody's results")
    arguments = f"{SMALL[program.name]} --total-steps 25 --run-dir 'taken it'"
    if held == "lock":  # of a run that never began
        assert program.run(arguments) == 0, program.err
    else:
        assert re.search("taken it already holds files: .*--resume 'taken it'", program.refused(arguments))
        assert path.read_text() == "somebody's results" and len(list((program.folder / "taken it").iterdir())) == 1
