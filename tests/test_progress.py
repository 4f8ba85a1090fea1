"""What a run shows while it goes on and at its end, and what the README says of Python. No test asserts a real time."""

import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys

import pytest

import progress
from conftest import ROOT, SMALL


class Clock:
    """In place of the time module: stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


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


def test_the_end_names_the_one_command_that_draws_the_curves(program):
    assert program.run(f"{SMALL[program.name]} --run-dir 'the run'") == 0, program.err
    line = program.out.splitlines()[-1]
    assert line.startswith("Curves: the run/metrics.csv; to draw them: ")
    command = line.partition("to draw them: ")[2]
    assert shlex.split(command)[2:] == ["the run", "--out", "the run/curves.png"]
    drawn = subprocess.run(command, shell=True, cwd=program.folder, capture_output=True, text=True, timeout=300)
    assert drawn.returncode == 0, drawn.stderr
    assert (program.folder / "the run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_stopped_names_it_too_once_it_has_curves(sac, capsys):
    for step, curves in ((15, False), (45, True)):
        args = sac.args(run_dir=str(sac.folder / str(step)))
        sac.train_until(args, step)
        assert (f"--out {args.run_dir}/curves.png" in capsys.readouterr().out) == curves


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
