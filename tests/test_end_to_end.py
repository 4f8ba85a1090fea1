"""brc_sac.py as a user runs it: whole, tiny runs on real tasks, and every way of being refused."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import brc_sac

SCRIPT = Path(brc_sac.__file__)
SMALL = ("--width 32 --actor-width 16 --batch-size 32 --learning-starts 50 --total-steps 250 --eval-interval 100 "
         "--eval-episodes 1 --log-interval 50 --device cpu")
EVALUATED = (100, 200, 250)  # every interval, and the end
METAWORLD = f"--tasks reach drawer-close {SMALL}"  # episodes of 200 steps: one ends within the run
# Run name -> arguments. "single" goes where runs go by default; "again" must not differ, however its tasks are stepped.
RUNS = {
    "metaworld": f"{METAWORLD} --variant paper --run-dir metaworld",
    "again": f"{METAWORLD} --variant paper --run-dir again --workers 2",
    "other-seed": f"{METAWORLD} --variant paper --run-dir other-seed --seed 1",
    "dmc": f"--tasks cartpole-swingup reacher-easy {SMALL} --variant release --run-dir dmc",
    "single": f"--tasks drawer-close {SMALL} --variant release --no-overlap",
}
LEARNING = ("metaworld", "dmc", "single")


def command(arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments.split()]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}  # several runs share the cores


def brc(arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


@dataclasses.dataclass
class Run:
    path: Path
    stdout: str

    @property
    def args(self) -> dict:
        return json.loads((self.path / "args.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        with open(self.path / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def values(self) -> dict[tuple[str, str, int], float]:
        """(env_name, metric, env_step) -> value."""
        return {(row["env_name"], row["metric"], int(row["env_step"])): float(row["value"]) for row in self.metrics}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    cwd = tmp_path_factory.mktemp("end-to-end")
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(RUNS, pool.map(lambda arguments: brc(arguments, cwd), RUNS.values())))
    for name, process in done.items():
        assert process.returncode == 0, f"{name}: {process.stderr}"
    paths = {name: cwd / name for name in RUNS}
    (paths["single"],) = (cwd / "runs").iterdir()
    return {name: Run(paths[name], done[name].stdout) for name in RUNS}


def test_the_default_run_directory_is_named_after_experiment_seed_and_time(runs):
    assert re.fullmatch(r"brc_sac-drawer-close-release__0__\d{8}-\d{6}", runs["single"].path.name)


@pytest.mark.parametrize("name", LEARNING)
def test_args_json_holds_the_resolved_arguments_and_their_surroundings(runs, name):
    args = runs[name].args
    fields = {field.name for field in dataclasses.fields(brc_sac.Args)}
    assert fields <= args.keys() and {"git_commit", "hardware", "versions"} <= args.keys()
    assert args["versions"]["torch"] == torch.__version__ and "mujoco" in args["versions"]
    tasks, variant = {"metaworld": (["reach", "drawer-close"], "paper"), "single": (["drawer-close"], "release"),
                      "dmc": (["cartpole-swingup", "reacher-easy"], "release")}[name]
    expected = dict(tasks=tasks, variant=variant, width=32, batch_size=32, total_steps=250, checkpoint_interval=100,
                    gamma=0.99, seed=0, overlap=name != "single", exp_name=f"brc_sac-{'-'.join(tasks)}-{variant}")
    assert {key: args[key] for key in expected} == expected


@pytest.mark.parametrize("name", LEARNING)
def test_metrics_csv_holds_every_task_and_the_mean_once_per_evaluation(runs, name):
    run, values = runs[name], runs[name].values()
    header = (run.path / "metrics.csv").read_text().splitlines()[0]
    assert header == "exp_name,env_name,seed,metric,env_step,value"
    tasks, metrics = run.args["tasks"], ["return", "score"] + ["success"] * (name != "dmc")
    expected = {(task, metric, step) for task in [*tasks, "mean"] for metric in metrics for step in EVALUATED}
    assert values.keys() == expected and len(run.metrics) == len(expected)
    assert {(row["exp_name"], row["seed"]) for row in run.metrics} == {(run.args["exp_name"], "0")}
    assert all(math.isfinite(value) for value in values.values())
    for metric in metrics:
        for step in EVALUATED:
            mean = np.mean([values[task, metric, step] for task in tasks])
            assert values["mean", metric, step] == pytest.approx(mean, rel=1e-4)
    for task in tasks:
        for step in EVALUATED:
            if name == "dmc":
                assert values[task, "score", step] == pytest.approx(values[task, "return", step] / 1000, rel=1e-4)
            else:
                assert values[task, "score", step] == values[task, "success", step] in (0, 1)


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(runs):
    text = {name: (runs[name].path / "metrics.csv").read_bytes() for name in ("metaworld", "again", "other-seed")}
    assert text["metaworld"] == text["again"]
    first, other = runs["metaworld"].values(), runs["other-seed"].values()
    assert first.keys() == other.keys()
    assert all(first[task, "return", step] != other[task, "return", step]
               for task in ("reach", "drawer-close") for step in EVALUATED)


@pytest.mark.parametrize("name", LEARNING)
def test_tensorboard_holds_losses_scales_and_the_same_evaluations(runs, name):
    run = runs[name]
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    for tag in ("critic_loss", "actor_loss", "entropy", "temperature"):
        logged = scalars(f"train/{tag}")
        assert list(logged) == [100, 150, 200, 250] and all(map(math.isfinite, logged.values()))
    assert scalars("train/temperature")[250] != scalars("train/temperature")[100]
    assert all(speed > 0 for speed in scalars("time/env_steps_per_second").values())
    for (task, metric, step), value in run.values().items():
        assert scalars(f"eval_{metric}/{task}")[step] == pytest.approx(value, rel=1e-4, abs=1e-6)
    for task in run.args["tasks"]:
        scales = scalars(f"return_scale/{task}")
        assert math.isinf(scales[150])
        # The first of MetaWorld's episodes ended at step 200; dm_control's last for 1000.
        assert math.isinf(scales[250]) if name == "dmc" else scales[250] > 0


@pytest.mark.parametrize(("name", "order"), [("metaworld", 1), ("dmc", 2)])
def test_the_projector_shows_the_task_embeddings(runs, name, order):
    folder = runs[name].path / "tensorboard"
    assert "tensors.tsv" in (folder / "projector_config.pbtxt").read_text()
    latest = max(folder.glob("*/*/tensors.tsv"), key=lambda path: int(path.parts[-3]))
    assert int(latest.parts[-3]) == 250
    vectors = np.loadtxt(latest)
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, order, axis=-1), 1, rtol=1e-3)
    assert (latest.parent / "metadata.tsv").read_text().split() == runs[name].args["tasks"]


@pytest.mark.parametrize("name", LEARNING)
def test_a_run_leaves_a_checkpoint_and_nothing_temporary(runs, name):
    path = runs[name].path
    assert torch.load(path / "checkpoint.pt", weights_only=True)["env_step"] == 250
    assert any((path / "replay").iterdir())
    names = {file.name for file in path.iterdir()} - {"videos", "replay", "tensorboard"}
    assert names == {"args.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt"}
    assert all(file.suffix == ".pt" for file in (path / "replay").iterdir())


@pytest.mark.parametrize("name", LEARNING)
def test_the_run_ends_with_a_table_of_tasks(runs, name):
    run, values = runs[name], runs[name].values()
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines() if line.split()}
    for task in [*run.args["tasks"], "mean"]:
        assert float(rows[task][1]) == pytest.approx(values[task, "return", 250], abs=0.051)
        assert float(rows[task][-1]) == pytest.approx(values[task, "score", 250], abs=6e-4)
    assert "device cpu" in run.stdout and "parameters" in run.stdout and "replay" in run.stdout


def test_evaluate_prints_what_the_run_found_last(runs):
    run, before = runs["metaworld"], (runs["metaworld"].path / "metrics.csv").read_bytes()
    process = brc(f"--evaluate {run.path}", run.path.parent)
    assert process.returncode == 0, process.stderr
    rows = {line.split()[0]: line.split() for line in process.stdout.splitlines() if line.split()}
    for task in ("reach", "drawer-close", "mean"):
        assert float(rows[task][1]) == pytest.approx(run.values()[task, "return", 250], abs=0.051)
    assert (run.path / "metrics.csv").read_bytes() == before


def kill_when(arguments: str, cwd: Path, exists: Path) -> None:
    """Starts a run, and ends it with SIGKILL as soon as a file is there."""
    process = subprocess.Popen(command(arguments), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not exists.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_resumes_and_misses_nothing(runs, tmp_path):
    path = tmp_path / "killed"
    kill_when(f"{METAWORLD} --run-dir killed", tmp_path, path / "args.json")  # before it has anything to go on from
    kill_when("--resume killed", tmp_path, path / "checkpoint.pt")  # at step 100, which is not evaluated yet
    resumed = brc("--resume killed", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    run, uninterrupted = Run(path, resumed.stdout), runs["metaworld"].values()
    values = run.values()
    assert len(run.metrics) == len(values), "a step appears twice"
    assert values.keys() == uninterrupted.keys()
    # The agent of step 100 came back as it was. After that the environments' new episodes make another run of it.
    for key in uninterrupted:
        if key[2] == 100:
            assert values[key] == uninterrupted[key]
    assert torch.load(path / "checkpoint.pt", weights_only=True)["env_step"] == 250
    assert not [file for file in path.rglob("*") if file.suffix == ".tmp" or ".new" in file.name]


def test_overlap_changes_the_updates_and_not_the_trajectories(tmp_path, monkeypatch):
    """The same actions lead to the same replay, whether the updates run while the environments step or after it."""

    def act(learner, obs):
        return np.random.default_rng(learner.env_step).uniform(-1, 1, (2, 4)).astype(np.float32)

    monkeypatch.setattr(brc_sac.Learner, "act", act)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    rows = {}
    for overlap in (True, False):
        args = brc_sac.Args(tasks=("reach", "drawer-close"), width=16, actor_width=8, batch_size=8,
                            learning_starts=20, total_steps=60, eval_interval=60, eval_episodes=1, device="cpu",
                            workers=2, overlap=overlap, run_dir=str(tmp_path / str(overlap)))
        args = brc_sac.resolve(args)
        brc_sac.train(args)
        learner = brc_sac.Learner(args, 39, 4, torch.device("cpu"), torch.device("cpu"))
        brc_sac.load_checkpoint(Path(args.run_dir), learner)
        rows[overlap] = learner.buffer.export(np.zeros(2, np.int64))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    real = rows[True]["transition"] >= 0  # the others hold an observation only
    assert real.sum() == 120
    for name in rows[True]:
        assert torch.equal(rows[True][name][real], rows[False][name][real]), name


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = ("--tasks reach drawer-close --width 32 --actor-width 16 --batch-size 32 --learning-starts 150 "
        "--total-steps 1000000 --eval-interval 2000 --eval-episodes 1 --checkpoint-interval 100 --device cpu "
        "--compile False")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_ends_the_run_after_a_checkpoint(tmp_path):
    process = subprocess.Popen(command(f"{LONG} --workers 2 --run-dir run"), cwd=tmp_path, env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    path, deadline = tmp_path / "run" / "checkpoint.previous.pt", time.monotonic() + 120
    while not path.exists():  # the second checkpoint
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    assert len(workers) == 4  # two to train, two to evaluate
    os.kill(workers[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    stopped = re.search(r"the environments of drawer-close was killed by SIGKILL .*\nStopped at step ([\d,]+)\. "
                        r"To go on: python brc_sac.py --resume run\n", stderr)
    assert stopped and "Traceback" not in stderr, stderr
    assert_gone(workers)
    step = int(stopped[1].replace(",", ""))
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["env_step"] == step
    resumed = brc(f"--resume run --total-steps {step + 10}", tmp_path)
    assert resumed.returncode == 0, resumed.stderr


FAILING = """
import gymnasium as gym
from suites import metaworld

class Failing(gym.Wrapper):
    steps = 0
    def step(self, action):
        self.steps += 1
        if self.steps == 500:
            raise ZeroDivisionError("the simulator is unwell")
        return self.env.step(action)

def make(task, seed, render_mode=None):
    env = original(task, seed, render_mode=render_mode)
    return Failing(env) if task == "drawer-close" else env

original, metaworld.make = metaworld.make, make
"""


def test_an_environment_that_raises_at_step_500_is_named_after_a_checkpoint(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAILING)  # in the run and in its workers, however they are started
    paths = os.pathsep.join([str(tmp_path), str(SCRIPT.parent)])
    process = subprocess.Popen(command(f"{LONG} --workers 2 --checkpoint-interval 2000 --run-dir run"),
                               cwd=tmp_path, env=environment() | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    for text in ("The environment of task 'drawer-close' failed in step, at step 100 of its episode.",
                 "Traceback (most recent call last)", 'raise ZeroDivisionError("the simulator is unwell")',
                 "Stopped at step 499. To go on: python brc_sac.py --resume run"):
        assert text in stderr
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["env_step"] == 499


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def assert_refused(process: subprocess.CompletedProcess, message: str) -> None:
    """Exit code 2, and one sentence on stderr that says what was given and what to do."""
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("brc_sac.py: ") and re.search(message, line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite nonsense", "Unknown suite 'nonsense': .*demo"),
        ("--tasks reach draw-close", "Unknown task 'draw-close': did you mean drawer-close"),
        ("--tasks reach --width -4", "--width is -4"),
        ("--tasks reach Pong", "Pong is an Atari game.*leave the games out, or use brc_drq.py"),
        ("--resume nowhere", "nowhere holds no run"),
        pytest.param("--tasks reach --device cuda", "Device 'cuda' is not on this machine: give cpu",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")),
        ("--tasks reach --device quantum", "Device 'quantum' is not on this machine: give cpu"),
    ],
)
def test_bad_arguments_end_in_one_sentence_and_create_nothing(arguments, message, tmp_path):
    assert_refused(brc(arguments, tmp_path), message)
    assert not files_under(tmp_path)


def test_a_run_directory_that_holds_another_run_is_left_alone(tmp_path):
    other = tmp_path / "taken" / "metrics.csv"
    other.parent.mkdir()
    other.write_text("somebody's results\n")
    assert_refused(brc(f"{METAWORLD} --run-dir taken", tmp_path), "taken already holds files: .*--resume taken")
    assert files_under(tmp_path) == {other.parent, other} and other.read_text() == "somebody's results\n"


def test_what_a_run_learned_with_cannot_change_at_resume(runs):
    path = runs["metaworld"].path
    before = {file: file.stat().st_mtime_ns for file in files_under(path)}
    assert_refused(brc(f"--resume {path} --width 64", path.parent), "--width is 32 .*cannot become 64")
    assert {file: file.stat().st_mtime_ns for file in files_under(path)} == before


def test_help_lists_the_flags_without_importing_torch_or_a_simulator(tmp_path):
    process = subprocess.run([sys.executable, "-X", "importtime", str(SCRIPT), "--help"], cwd=tmp_path,
                             capture_output=True, text=True, timeout=60)
    assert process.returncode == 0
    for flag in ("--suite", "--tasks", "--split", "--width", "--seed", "--total-steps", "--variant", "--run-dir",
                 "--device", "--replay-device", "--resume", "--track", "--capture-video"):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", process.stdout), flag
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "suites" in imported  # the check itself works
    assert not imported & {"torch", "mujoco", "dm_control", "metaworld", "tensorboard", "wandb"}
    assert not files_under(tmp_path)
