"""What a run shows, how it chooses its threads, and what the README says of Python. No test asserts a real time."""

import csv
import importlib.metadata
import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import devices
import progress
from conftest import ROOT, SMALL


class Clock:
    """In place of the time module: stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Screen(io.StringIO):
    """A terminal, or a file, that keeps what was written to it: standard error from `show` on."""

    def __init__(self, terminal: bool, monkeypatch):
        super().__init__()
        self.isatty, self.show = lambda: terminal, lambda: monkeypatch.setattr(sys, "stderr", self)


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def screen(request, monkeypatch):
    return Screen(request.param, monkeypatch)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def walk(bar, clock, steps: int, seconds: float, learning: bool = True) -> None:
    """`steps` steps that take `seconds` each."""
    for _ in range(steps):
        clock.now += seconds
        bar.step(learning)


def test_speed_and_time_left_are_those_of_learning_from_its_second_step_on(clock, screen):
    screen.show()
    bar = progress.Bar(11_000, 0, shown=True)
    walk(bar, clock, 1000, 0.01, learning=False)
    assert bar.format_dict["rate"] == pytest.approx(100) and bar.format_dict["left"] == "?"
    walk(bar, clock, 1, 40)  # compiles
    assert bar.format_dict["rate"] == 0 and bar.format_dict["left"] == "?"
    walk(bar, clock, 1, 0.5)
    assert bar.format_dict["rate"] == pytest.approx(2) and bar.format_dict["left"] == "1:23:19"
    walk(bar, clock, 998, 0.5)
    assert bar.format_dict["rate"] == pytest.approx(2) and bar.format_dict["left"] == "1:15:00"
    bar.refresh()
    assert "2000/11000" in screen.getvalue() and "<1:15:00,  2.00step/s" in screen.getvalue()
    walk(bar, clock, 200, 1)  # slower by other work: a minute later the bar knows
    assert bar.format_dict["rate"] == pytest.approx(1, rel=0.01)


def test_after_a_resume_only_what_was_made_since_counts(clock, screen):
    screen.show()
    bar = progress.Bar(100_000, 90_000, shown=True)
    walk(bar, clock, 1, 30)
    assert bar.format_dict["left"] == "?"
    walk(bar, clock, 1, 2)
    assert bar.format_dict["rate"] == pytest.approx(0.5) and bar.format_dict["left"] == "5:33:16"


def test_evaluations_count_for_the_time_left_and_not_for_the_speed(clock, screen):
    screen.show()
    bar = progress.Bar(1000, 0, shown=True)
    bar.resume()  # the checkpoint of step 0
    walk(bar, clock, 100, 1)
    clock.now += 100
    bar.resume()
    walk(bar, clock, 100, 1)
    clock.now += 100
    bar.resume()
    assert bar.format_dict["rate"] == pytest.approx(1) and bar.format_dict["left"] == "26:40"  # 800 steps of 1 + 1 s


def test_streams_that_a_daemon_has_closed_are_open_for_what_simulators_start(tmp_path):
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import progress; progress.make_streams_unfailing(); "
            "file = open('told', 'w'); print(file.fileno(), [os.get_inheritable(n) for n in range(3)], file=file)")
    for closed in ("<&-", ">&- 2>&-", "<&- >&- 2>&-"):
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
        number, inherited = (tmp_path / "told").read_text().split(" ", 1)
        assert int(number) > 2 and inherited == "[True, True, True]\n"


@pytest.mark.parametrize(("tasks", "line"), [(2, "mean score 0.600 (0 1.00, 1 0.20)"), (9, "mean score 0.600")])
def test_an_evaluation_in_words_names_each_score_of_few_tasks(tasks, line):
    results = [{"score": 1.0}, *[{"score": 0.2}] * (tasks - 1)]
    assert progress.in_words(list(map(str, range(tasks))), results, {"score": 0.6}) == line


def test_a_bar_that_is_not_shown_counts_and_writes_nothing(clock, screen):
    screen.show()
    bar = progress.Bar(10, 0, shown=False)
    walk(bar, clock, 3, 1)
    bar.close()
    assert screen.getvalue() == "" and bar.format_dict["rate"] == pytest.approx(1)


def test_an_evaluation_shows_its_episodes_and_steps_and_then_nothing(screen, monkeypatch):
    screen.show()
    real, ended, seen = progress.tqdm, [[], []], []

    def at_once(*args, delay, mininterval, **options):
        assert delay <= 10 and mininterval <= 10
        return real(*args, delay=1e-9, mininterval=0, **options)

    monkeypatch.setattr(progress, "tqdm", at_once)
    for step in progress.steps_of_evaluation(ended, 2):
        seen.append(step)
        if step % 3 == 2:
            for of_task in ended:
                of_task.append((0.0, 0.0))
    lines = screen.getvalue().split("\r")
    assert seen == [0, 1, 2, 3, 4, 5] and any("2/4" in line and "step 4" in line for line in lines)
    assert lines[-1] == "" and lines[-2].strip() == ""  # wiped out


def test_a_short_evaluation_shows_nothing(screen):
    screen.show()
    ended = [[]]
    for _ in progress.steps_of_evaluation(ended, 1):
        ended[0].append((0.0, 0.0))
    assert screen.getvalue() == ""


def test_the_end_names_the_one_command_that_draws_the_curves(sac):
    assert sac.run(f"{SMALL['brc_sac']} --run-dir 'the run'") == 0, sac.err
    line = sac.out.splitlines()[-1]
    assert line.startswith("Curves: the run/metrics.csv; to draw them: ")
    command = line.partition("to draw them: ")[2]
    assert shlex.split(command)[2:] == ["the run", "--out", "the run/curves.png"]
    drawn = subprocess.run(command, shell=True, cwd=sac.folder, capture_output=True, text=True, timeout=300)
    assert drawn.returncode == 0, drawn.stderr
    assert (sac.folder / "the run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_stopped_names_it_too_once_it_has_curves(sac, capsys):
    for step, curves in ((15, False), (45, True)):
        args = sac.args(run_dir=str(sac.folder / str(step)))
        sac.train_until(args, step)
        assert (f"--out {args.run_dir}/curves.png" in capsys.readouterr().out) == curves


# --------------------------------------------------------------------------------------------------------- threads


class Machine:
    """Cores on which a step takes `seconds[threads]`."""

    def __init__(self, cores: int, clock, monkeypatch):
        self.number, self.clock, self.told = cores, clock, []
        self.alone = {max(1, cores >> k): 0.1 * 2**k for k in range(cores.bit_length())}
        self.busy = {threads: seconds * (10 if threads == cores else 1) for threads, seconds in self.alone.items()}
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(devices, "time", clock)
        monkeypatch.setattr(devices, "num_cores", lambda: cores)
        monkeypatch.setattr(devices, "ALL_THREADS", cores)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(self, "number", number))

    def run(self, threads: devices.Threads, seconds: dict, steps: int) -> list[int]:
        """The number of threads that each of so many steps was made with."""
        made = []
        for _ in range(steps):
            made.append(self.number)
            self.clock.now += seconds[self.number]
            self.told += [report] if (report := threads.step()) else []
        return made


@pytest.fixture(params=[2, 16], ids="{} cores".format)
def machine(request, clock, monkeypatch):
    return Machine(request.param, clock, monkeypatch)


def test_all_cores_threads_stay_while_they_are_fastest(machine):
    cores, threads = machine.number, devices.Threads(None, "cpu")
    made = machine.run(threads, machine.alone, 3000)
    assert made.count(cores) >= 2990 and threads.number == cores == made[-1]
    assert machine.told == [f"threads: {cores}; a step takes 200 ms with {cores // 2}, 100 ms with {cores}"]


def test_fewer_are_chosen_within_some_steps_beside_other_work_and_all_again_after_it(machine):
    cores, threads = machine.number, devices.Threads(None, "cpu")
    machine.run(threads, machine.alone, 100)
    made = machine.run(threads, machine.busy, 1500)
    assert made.count(cores) <= 45 and set(made[60:1000]) == {cores // 2}
    machine.run(threads, machine.alone, 1100)
    assert threads.number == cores and len(machine.told) == 3


def test_where_one_thread_is_fastest_from_the_start_it_is_found(machine):
    threads = devices.Threads(None, "cpu")
    small = {number: 0.01 * number for number in machine.alone}
    made = machine.run(threads, small, 5000)
    assert threads.number == 1 and made.count(1) > 4900


def test_the_next_run_of_a_process_begins_with_all_cores_again(machine):
    cores = machine.number
    machine.run(devices.Threads(None, "cpu"), {number: number for number in machine.alone}, 100)
    assert machine.number == 1 and devices.Threads(None, "cpu").number == cores == machine.number


def test_an_evaluation_between_two_steps_changes_nothing(machine):
    cores, threads = machine.number, devices.Threads(None, "cpu")
    for _ in range(100):
        machine.run(threads, machine.alone, 40)
        machine.clock.now += 60
    assert threads.number == cores and len(machine.told) == 1


@pytest.mark.parametrize("given", ["flag", "OMP_NUM_THREADS", "a GPU"])
def test_what_is_given_stays(machine, monkeypatch, given):
    if given == "OMP_NUM_THREADS":
        monkeypatch.setenv("OMP_NUM_THREADS", str(machine.number))
    if given == "a GPU":
        monkeypatch.setattr(devices, "choose_device", lambda name: torch.device("cuda"))
    number = 3 if given == "flag" else machine.number
    threads = devices.Threads(3 if given == "flag" else None, "auto", before=1)
    assert set(machine.run(threads, {number: 0.1}, 2000)) == {number} and not machine.told
    assert str(threads) == f"threads: {number}"


def test_a_run_that_goes_on_begins_with_the_number_it_had(machine):
    threads = devices.Threads(None, "cpu", before=1)
    made = machine.run(threads, machine.busy, 900)
    assert set(made) == {1}


def test_the_number_is_in_args_json_and_the_flag_is_kept(sac, monkeypatch):
    """Chosen: written when it changes; given: the same after a resume."""
    monkeypatch.delenv("OMP_NUM_THREADS")

    def facts(run_dir: str) -> dict:
        return json.loads((sac.folder / run_dir / "args.json").read_text())

    def choose(threads) -> str:
        threads.number, threads.report = 7, "threads: 7"
        return threads.report

    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # two threads on one core take minutes
    assert sac.run(f"{SMALL['brc_sac']} --run-dir given --threads 2 --total-steps 40") == 0, sac.err
    assert "threads: 2\n" in sac.out and (facts("given")["threads"], facts("given")["threads_given"]) == (2, 2)
    assert sac.run("--resume given --total-steps 60") == 0 and "threads: 2\n" in sac.out, sac.err
    assert facts("given")["resumed"][0]["threads"] == 2
    assert sac.run("--resume given --total-steps 80 --threads 1") == 0 and facts("given")["threads"] == 1, sac.err
    prepare = (lambda: monkeypatch.setattr(devices.Threads, "step", choose))
    assert sac.run(f"{SMALL['brc_sac']} --run-dir chosen", prepare) == 0 and "threads: 7" in sac.out, sac.err
    assert facts("chosen")["threads"] == 7 and facts("chosen")["threads_given"] is None
    assert torch.load(sac.folder / "chosen/checkpoint.pt", weights_only=True)["threads"] == 7
    assert "--threads is 0: give a number of at least 1" in sac.refused(f"{SMALL['brc_sac']} --run-dir no --threads 0")


def test_the_benchmark_runs_in_small(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/threads.py", "--cases", "demo", "--rehearse", "--csv"]
    command += [tmp_path / "a.csv"]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["busy"], row["way"]) for row in rows] == [
        (busy, way) for busy in "01121" for way in ("all", "chosen")] and all(row["hardware"] for row in rows)
    process = subprocess.run(command, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert process.returncode == 2 and "OMP_NUM_THREADS is set" in process.stderr


# ---------------------------------------------------------------------------------------------------------- README


def test_the_readme_names_the_python_versions_that_the_requirements_allow():
    from packaging.specifiers import SpecifierSet  # a requirement of pytest

    text = (ROOT / "README.md").read_text()
    named = re.search(r"^Python (3\.\d+) or (3\.\d+) on", text, re.MULTILINE).groups()
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named, "these tests run on another version"
    makers = re.findall(r"uv venv --python (3\.\d+)|conda create [^`]*python=(3\.\d+)", text)
    assert len(makers) == 2 and {"".join(version) for version in makers} <= set(named)
    requirements = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    allowed = [importlib.metadata.metadata(name)["Requires-Python"] or "" for name in requirements]
    for version in named:
        assert all(SpecifierSet(range_).contains(version) for range_ in allowed), f"{version}: {allowed}"
    first = min(named, key=lambda version: int(version[2:]))
    before = f"3.{int(first[2:]) - 1}"
    assert not all(SpecifierSet(range_).contains(before) for range_ in allowed), f"{before} would do as well"
