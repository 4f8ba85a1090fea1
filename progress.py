"""What a run shows: standard streams that end no run, its bar, how far an evaluation is, and how to draw its curves."""

import contextlib
import io
import itertools
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm


class Unfailing(io.FileIO):
    """A standard stream that ends no run: what a full disk, a closed pipe or a lost terminal refuses is dropped."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def make_streams_unfailing() -> None:
    """Puts an Unfailing in the place of standard output and of standard error; opens what a daemon has closed."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # else the next file would be taken for one of them
        os.set_inheritable(number, True)  # by what simulators start
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper) and not isinstance(stream.buffer, Unfailing):
            raw = Unfailing(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", write_through=True))


@contextlib.contextmanager
def survives(what: str, then: Callable[[], object] = bool) -> Iterator[None]:
    """A disk that fails costs what was to be written, never the run; `then` is called."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"{what} cannot be written ({error}); the run goes on, and tries again.", file=sys.stderr)
        then()


def seconds_between_lines(in_a_file: float) -> float:
    return 0.5 if sys.stderr.isatty() else in_a_file


class Bar(tqdm):
    """The bar of a run's steps: its speed is that of the last half minute, of steps of the kind that goes on.

    Random steps are many times as fast as those that learn, and the first of these compiles for half a minute: neither
    says how long the run will take. Evaluations and checkpoints do not count for the speed; for the time left they do,
    in proportion to the steps. Until the second step that learns the time left is "?".
    """

    MEMORY = 30  # seconds in which the weight of a step falls to 1 / e

    def __init__(self, total: int, done: int, shown: bool):
        self.first = done  # tqdm, where it shows nothing, does not keep it
        self.learning, self.last = False, None  # when the last step ended, in seconds of the monotonic clock
        self.steps = self.seconds = 0.0  # of this kind, by weight
        self.paused = self.pause_per_step = 0.0  # seconds
        line = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
        super().__init__(total=total, initial=done, unit="step", dynamic_ncols=True, miniters=1, bar_format=line,
                         mininterval=seconds_between_lines(15), disable=not shown)

    def step(self, learning: bool = True) -> None:
        """Counts a step that has just ended, and that had updates or not."""
        now, first = time.monotonic(), self.last is None or learning != self.learning
        if first:
            self.steps = self.seconds = 0.0
        else:
            kept = math.exp((self.last - now) / self.MEMORY)
            self.steps, self.seconds = kept * self.steps + 1, kept * self.seconds + now - self.last
        self.learning, self.last = learning, now
        self.update()

    def resume(self) -> None:
        """What went on since the last step was none: an evaluation, or a checkpoint."""
        if self.last is not None:
            now = time.monotonic()
            self.paused += now - self.last
            self.pause_per_step, self.last = self.paused / max(1, self.n - self.first), now

    @property
    def format_dict(self) -> dict:
        speed, left = self.steps / self.seconds if self.seconds else 0.0, "?"  # tqdm shows a speed of 0 as "?"
        if speed and self.learning:
            seconds = (self.total - self.n) * (1 / speed + self.pause_per_step)
            left = self.format_interval(round(seconds))
        return super().format_dict | {"rate": speed, "left": left}


def steps_of_evaluation(ended: list[list], episodes: int) -> Iterator[int]:
    """0, 1, 2, ... until each of the lists `ended`, a task's, holds `episodes`; from the third second on with a bar.

    It stands in the place of the run's bar, which does not move meanwhile.
    """
    with tqdm(total=len(ended) * episodes, desc="evaluation", unit="episode", position=0, leave=False, delay=3,
              miniters=0, smoothing=0, dynamic_ncols=True, mininterval=seconds_between_lines(5),
              disable=int(os.environ.get("RANK", 0)) > 0) as bar:
        for step in itertools.count():
            done = sum(map(len, ended))
            if done == bar.total:
                return
            bar.set_postfix_str(f"step {step:,}", refresh=False)
            bar.update(done - bar.n)
            yield step


def in_words(tasks: Sequence[str], results: list[dict], means: dict) -> str:
    """An evaluation in a line: the means, and each task's score where they are few enough to be read."""
    line = ", ".join(f"mean {name} {value:.3f}" for name, value in means.items())
    if 1 < len(tasks) <= 8:
        scores = (f"{task} {result['score']:.2f}" for task, result in zip(tasks, results, strict=True))
        line += f" ({', '.join(scores)})"
    return line


def drawing(run_dir: Path) -> str:
    """The command that draws a run's curves, for the shell and the directory in which this program was started."""
    python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).parent / "benchmarks" / "report.py")
    return shlex.join([python, script, str(run_dir), "--out", str(run_dir / "curves.png")])
