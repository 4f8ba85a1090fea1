"""What every run needs and no method is in: arguments, a run directory with logs and checkpoints, signals, errors.

args.json        every argument, the program, git commit, versions, hardware, and a record of every resume
metrics.csv      exp_name,env_name,seed,metric,env_step,value: one row per task and metric, append-only
checkpoint.pt    the learner's state; checkpoint.previous.pt is the one before it
replay/*.bin     the replay's rows, append-only: a checkpoint names the pieces that it needs, with checksums
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import json
import os
import re
import shlex
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import progress
import suites
from suites.base import UsageError
from suites.vector import EnvError

PROGRAM = Path(sys.argv[0])  # the script that runs: an agent, a copy of it, or one that imports it
FORMAT = 2  # of args.json and checkpoints


class RunError(RuntimeError):
    """A run that cannot go on; its message says why and what is left of it."""


def exit_on_error(function: Callable, *args: Any) -> Any:
    """Runs `function`. Bad input ends the program with its one sentence and exit code 2, a failed run with 1."""
    progress.make_streams_unfailing()
    try:
        return function(*args)
    except (UsageError, RunError, EnvError) as error:
        print(f"{PROGRAM.name}: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from None
    except (RuntimeError, MemoryError, OSError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if not any(refusal in text for refusal in ("MemoryError", "DefaultCPUAllocator", "No space left")):
            raise
        what = "disk space" if isinstance(error, OSError) else "memory"
        print(f"{PROGRAM.name}: Out of {what}: {text}. Try a smaller network, batch or --buffer-size.", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


# ------------------------------------------------------------------------------------------------------- arguments

# What may change beside --resume or --evaluate: nothing that the learner's numbers depend on.
MAY_CHANGE = ("total_steps", "device", "replay_device", "threads", "workers", "assets", "track", "capture_video",
              "log_interval", "checkpoint_interval", "save_replay", "compile", "cuda_graph")


def fill(args: Any, **defaults: Any) -> Any:
    """`args` with those of `defaults` that were not given."""
    return dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def check_range(args: Any, low: float, high: float, *names: str) -> None:
    """Raises UsageError where one of the arguments `names` is given and not from `low` to `high`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} is {value}: give a number of at least {low:g}"
                             + f" and at most {high:g}" * (high < float("inf")) + ".")


def parse_args(Args: type, resolve: Callable, may_change: tuple[str, ...] = MAY_CHANGE) -> Any:
    """The command line, resolved; with --resume or --evaluate, that run's arguments and what is given beside them."""
    import tyro
    args = tyro.cli(Args, description=(sys.modules["__main__"].__doc__ or "").split("\n\n")[0])
    evaluate = getattr(args, "evaluate", None)
    run_dir = args.resume if evaluate is None else evaluate
    if "" in (evaluate, args.resume, args.run_dir) or None not in (evaluate, args.resume):
        raise UsageError("--resume, --evaluate and --run-dir take a directory, and of the first two only one is given.")
    if run_dir is None:
        return resolve(args)
    saved, facts = read_args(Path(run_dir), Args)
    owner = Path(facts.get("agent", facts["program"]) if evaluate else facts["program"])  # transfer.py's is another
    if owner.name != PROGRAM.name:
        several = "tasks" not in facts  # runs of transfer.py, each of which can be evaluated
        command = ["python", str(owner), "--evaluate"] if evaluate and not several else shlex.split(facts["go_on"])[:-1]
        raise UsageError(f"{run_dir} is a run of {owner.name}, and this is {PROGRAM.name}: "
                         + shlex.join([*command, run_dir]))
    args = tyro.cli(Args, default=saved)
    may_change = [name for name in may_change + ("eval_episodes",) * bool(evaluate) if hasattr(args, name)]
    for field in dataclasses.fields(Args):
        old, new = getattr(saved, field.name), getattr(args, field.name)
        if old != new and field.name not in (*may_change, "resume", "evaluate"):
            flags = [name.replace("_", "-") for name in (field.name, *may_change)]
            raise UsageError(f"--{flags[0]} is {old} in {run_dir} and cannot become {new}: beside "
                             f"{'--evaluate' if evaluate else '--resume'} only --{', --'.join(flags[1:])} may change.")
    return resolve(args)


def read_args(run_dir: Path, Args: type) -> tuple[Any, dict]:
    """The arguments of the run in a directory, those of transfer.py or offline.py first, and all of its args.json."""
    try:
        facts = json.loads((run_dir / "args.json").read_text())
        given = facts | {"threads": facts.get("threads_given")}
        given |= facts.get("own", {}) if Path(facts["program"]).name == PROGRAM.name else {}
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_dir} holds no run to continue (args.json: {error}): give a run directory.") from None
    if facts.get("format") != FORMAT:
        raise UsageError(f"{run_dir} is of another version of this program: start anew, or use commit "
                         f"{facts.get('git_commit')}, which wrote it.")
    return Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
                   if name in Args.__dataclass_fields__}), facts


def derived_seed(seed: int, purpose: str, env_step: int = 0) -> int:
    """Independent seeds for every purpose and step, from the run's one seed."""
    return int(np.random.SeedSequence(seed, spawn_key=(*purpose.encode(), env_step)).generate_state(1)[0] >> 1)


# ------------------------------------------------------------------------------------------------------------- run


class Run:
    """A run: its directory, logs, checkpoints and progress bar, and the signals that stop it.

    SIGTERM, SIGINT and SIGHUP set `stop`, a second SIGINT ends at once, SIGUSR1 sets `asked`, for a checkpoint.
    """

    def __init__(self, args: Any, arguments: str = "", **facts: Any):
        """Creates nothing. `arguments` stand before --resume in the command that continues, `facts` in args.json."""
        self.args, self.arguments, self.facts = args, arguments, facts
        default = f"runs/{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = self.root = Path(args.resume or args.run_dir or default)
        if args.run_dir and not args.resume:
            check_empty(self.dir)
        if args.track and find_spec("wandb") is None:
            raise UsageError("--track needs W&B, which is not installed: pip install wandb, or leave --track out.")
        self.state: dict = {}  # the last checkpoint, for a resumed run
        self.saved_step: int | None = None  # of the last checkpoint
        self.stop, self.asked = 0, False
        self.evaluated: set[int] = set()  # the steps whose evaluations are in metrics.csv
        self.unwritten: list[tuple] = []  # rows
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            self.asked = True
        else:
            self.stop = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def go_on(self) -> str:
        """The command that continues this run."""
        of_node, size = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        nodes = ["--nnodes", str(size // of_node)] * (size > of_node)
        torchrun = ["torchrun", *nodes, "--nproc-per-node", str(of_node)]
        launcher = torchrun if "LOCAL_WORLD_SIZE" in os.environ else ["python"]
        return shlex.join([*launcher, str(PROGRAM), *self.arguments.split(), "--resume", str(self.root)])

    def open(self, buffer: Any) -> None:
        """Claims the directory, with --resume reads the last checkpoint, writes args.json, starts the logs.

        Under torchrun all ranks but the first have directories of their own in it, log nothing, and agree on a step.
        """
        import devices
        self.rank, size = devices.ranks()
        self.dir, self.lock = (self.dir, None) if self.rank else claim(self.dir, self.args)
        self.root = Path(devices.gather(str(self.dir))[0])
        if self.rank:
            self.dir, self.lock = claim(self.root / f"rank{self.rank}", self.args)
        if self.args.resume:
            if size != (before := json.loads((self.root / "args.json").read_text())["ranks"]):
                raise UsageError(f"{self.root} is a run of {before} processes and cannot go on with {size}: start as "
                                 f"many, with torchrun --nproc-per-node {before} on one machine, or without for one.")
            self.state = read_checkpoint(self.dir, buffer, goes_on=True)
            step = -devices.largest([-self.state.get("env_step", 0)])[0]
            if step < self.state.get("env_step", 0):  # another rank has lost its newest
                self.state = read_checkpoint(self.dir, buffer, goes_on=True, at=step)
            devices.gather(None)  # the first rank has put its files in order
            if self.rank and self.state:  # which only the first rank writes
                self.state["agent"] = read_checkpoint(self.root, at=step)["agent"]
            self.saved_step = self.state.get("env_step")
            if (self.saved_step or 0) > self.args.total_steps:
                raise UsageError(f"{self.root} has made {self.saved_step:,} steps already: give more than that.")
        self.facts["ranks"] = size
        self.threads = devices.Threads(self.args.threads, self.args.device, self.state.get("threads"))
        self.written = self._write_args()
        if self.args.track and not self.rank:
            import wandb
            wandb.init(project=os.environ.get("WANDB_PROJECT", "brc"), name=self.dir.name, resume="allow",
                       id=self.written["run_id"], config=dataclasses.asdict(self.args), dir=str(self.dir),
                       sync_tensorboard=True)
        print(f"{self.args.exp_name} in {self.dir}, {self.threads}", flush=True)
        self.bar = progress.Bar(self.args.total_steps, self.saved_step or 0, shown=self.rank == 0)
        if not self.rank:
            with progress.survives("metrics.csv"):
                self._read_csv()
            self._append_csv()

    @functools.cached_property
    def tensorboard(self) -> Any:
        """The writer; one that has failed, which it then does for good, is made anew the next time."""
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(self.dir / "tensorboard"), purge_step=self.saved_step + 1 if self.saved_step else None)

    def _write_args(self) -> dict:
        """Writes and returns args.json: the arguments, what else a reader needs to repeat the run, every resume."""
        import devices
        here = devices.environment(self.args.device) | {
            "command": shlex.join(sys.argv), "threads": self.threads.number}
        arguments = dataclasses.asdict(self.args) | {
            "resume": None, "evaluate": None, "run_dir": str(self.dir), "threads_given": self.args.threads,
            "threads": self.threads.number}
        if self.args.resume:
            facts = json.loads((self.root / "args.json").read_text()) | arguments | self.facts
            facts["resumed"] = [*facts.get("resumed", []), {"env_step": self.saved_step} | here]
            with contextlib.suppress(OSError):
                write_json(self.dir / "args.json", facts)
        else:
            facts = arguments | {"format": FORMAT, "run_id": os.urandom(6).hex(), "program": str(PROGRAM.resolve()),
                                 "go_on": self.go_on} | self.facts | here
            begin(self.dir, facts)
        return facts

    def _read_csv(self) -> None:
        """Learns which evaluations metrics.csv holds; cuts half of one, and those of a checkpoint that is lost."""
        path = self.dir / "metrics.csv"
        data = path.read_bytes() if path.exists() else b""
        held = set(map(int, re.findall(rb",mean,[^,\n]*,score,(\d+),[^,\n]*\n", data)))
        last = (self.saved_step or 0) - (self.saved_step not in held)
        self.evaluated, rows = {step for step in held if step <= last}, data.splitlines(keepends=True)
        while rows and (not rows[-1].endswith(b"\n")
                        or int((re.findall(rb",(\d+),[^,]*\n$", rows[-1]) or [-1])[0]) > last):
            rows.pop()
        if not rows:
            self.unwritten.append(("exp_name", "env_name", "seed", "metric", "env_step", "value"))
        if data:
            os.truncate(path, sum(map(len, rows)))

    def _append_csv(self) -> None:
        """Writes the rows of metrics.csv that wait to be written: all of them, or none until the next time."""
        path = self.dir / "metrics.csv"
        with progress.survives("metrics.csv"):
            size = path.stat().st_size if path.exists() else 0
            try:
                with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
                    csv.writer(file, lineterminator="\n").writerows(self.unwritten)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
            self.unwritten.clear()

    def step(self, learning: bool = True) -> None:
        """Counts a step that has just ended, with updates or not, and chooses the number of threads for the next."""
        self.bar.step(learning)
        if learning and self.threads.step():
            tqdm.write(f"step {self.bar.n:>9,}: {self.threads.report}")
            with progress.survives("args.json"):
                write_json(self.dir / "args.json", self.written | {"threads": self.threads.number})

    def log_evaluation(self, results: list[dict], frames: list, env_step: int, embedding: Any) -> None:
        """A row per task and metric, last env_name=mean; a GIF per task; the task embeddings [N, D] or [N, 0]."""
        if self.rank:
            return
        means, scalars = suites.mean_result(results), {}
        for task, result in [*zip(self.args.tasks, results, strict=True), ("mean", means)]:
            for metric, value in result.items():
                scalars[f"eval_{metric}/{task}"] = value
                self.unwritten.append((self.args.exp_name, task, self.args.seed, metric, env_step, f"{value:.6g}"))
        self._append_csv()
        self.evaluated.add(env_step)
        self.log(scalars, env_step)
        with progress.survives("TensorBoard's log or the videos", lambda: vars(self).pop("tensorboard", None)):
            for summary in suites.write_videos(self.args.tasks, frames, self.dir, env_step):
                self.tensorboard._get_file_writer().add_summary(summary, env_step)
            if embedding.numel():
                self.tensorboard.add_embedding(embedding.detach().cpu(), list(self.args.tasks), tag="task_embedding",
                                               global_step=env_step)
        tqdm.write(f"step {env_step:>9,}: {progress.in_words(self.args.tasks, results, means)}")
        self.bar.set_postfix(score=f"{means['score']:.3f}", refresh=False)
        self.bar.resume()

    def log(self, scalars: dict[str, float], env_step: int) -> None:
        """Scalars, and the bar's own speed, for TensorBoard."""
        if self.rank == 0:
            with progress.survives("TensorBoard's log", lambda: vars(self).pop("tensorboard", None)):
                for name, value in {"time/env_steps_per_second": self.bar.format_dict["rate"] or 0, **scalars}.items():
                    self.tensorboard.add_scalar(name, value, env_step)

    def save(self, env_step: int, state: dict, buffer: Any) -> None:
        """A checkpoint of `state`, torch's random states and the replay's new rows; on failure warns, and goes on."""
        import torch
        import devices

        self.asked = False
        if env_step == self.saved_step:
            return
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        failed = True
        with progress.survives(f"The checkpoint of step {env_step:,}"):
            replay = append_replay(self.dir / "replay", buffer, self.state) if self.args.save_replay else {}
            state = state | {"format": FORMAT, "env_step": env_step, "replay": replay,
                             "threads": self.threads.number, "random": {"cpu": torch.get_rng_state(), "cuda": cuda}}
            write_file(self.dir / "checkpoint.new.pt", lambda file: torch.save(state, file))
            failed = False
        if devices.largest([failed]) == [False]:  # all ranks have theirs
            with progress.survives(f"The checkpoint of step {env_step:,}"):
                if (self.dir / "checkpoint.pt").exists():
                    os.replace(self.dir / "checkpoint.pt", self.dir / "checkpoint.previous.pt")
                os.replace(self.dir / "checkpoint.new.pt", self.dir / "checkpoint.pt")
                self.saved_step, self.state = env_step, {"replay": replay}
        self.bar.resume()

    def check_finite(self, values: dict, env_step: int) -> None:
        """Raises RunError if one of the tensors or arrays is not finite. Waits for the device."""
        for name, value in values.items():
            if not np.isfinite(value.tolist()).all():
                raise RunError(f"{name} is not finite at step {env_step:,}: the networks have diverged. The last "
                               f"checkpoint is from step {self.saved_step}; to go on from there: {self.go_on}")

    def close(self) -> None:
        """Ends the logs, and lets go of the directory: transfer.py goes on in the same process."""
        self.bar.close()
        if "tensorboard" in vars(self):
            with progress.survives("TensorBoard's log"):
                self.tensorboard.close()
        if self.lock:
            self.lock.close()

    def finish(self, env_step: int, results: list[dict]) -> None:
        """Table and curves of the evaluations; after a signal, what is saved, and the exit code that says so."""
        last = f"Last checkpoint: {'none' if self.saved_step is None else f'step {self.saved_step:,}'}"
        if results and not self.stop:
            print(suites.table(self.args.tasks, results))
        if self.evaluated:
            print(f"Curves: {self.dir / 'metrics.csv'}; to draw them: {progress.drawing(self.dir)}")
        if self.stop:
            print(f"Stopped by {signal.Signals(self.stop).name} at step {env_step:,}. {last}. To go on: {self.go_on}",
                  file=sys.stderr)
            raise SystemExit(128 + self.stop)
        if self.saved_step != env_step:
            raise RunError(f"The checkpoint of step {env_step:,} could not be written to {self.dir}. {last}.")


def check_empty(directory: Path) -> None:
    """Raises UsageError if a new run cannot have `directory`; the lock of one that never began is in nobody's way."""
    if os.path.exists(directory) and (not directory.is_dir() or set(os.listdir(directory)) - {"lock"}):
        raise UsageError(f"Run directory {directory} already holds files: give another --run-dir, or --resume "
                         f"{shlex.quote(str(directory))} to continue the run that is there.")


def begin(directory: Path, facts: dict) -> None:
    """Writes a new run's args.json. Raises UsageError where that cannot be done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "args.json", facts)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written ({error}): give another --run-dir.") from None


def claim(directory: Path, args: Any) -> tuple[Path, Any]:
    """Makes the directory, or for a new run one beside it, this process's own; returns it and the locked file."""
    lock = None
    try:
        while True:
            with contextlib.suppress(FileExistsError):  # another run began in this second
                directory.mkdir(parents=True, exist_ok=bool(args.resume or args.run_dir))
                break
            directory = directory.with_name(directory.name + "+")
        lock = open(directory / "lock", "ab")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{directory} belongs to a run that is still going on: wait for it or stop it, or give "
                         "another --run-dir.") from None
    except OSError:
        pass  # a file system without locks, or one that cannot be written: args.json will tell
    if not args.resume:
        check_empty(directory)  # again: two processes may have found it empty
    return directory, lock


# ----------------------------------------------------------------------------------------------------- checkpoints


def write_file(path: Path, write: Callable[[Any], object]) -> None:
    """Calls `write` with a file aside, syncs and renames it: `path` is complete, or as before. Raises OSError."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except RuntimeError as error:  # torch.save reports a full disk as an error of its own
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_json(path: Path, facts: dict) -> None:
    write_file(path, lambda file: file.write(json.dumps(facts, indent=2).encode() + b"\n"))


# buffer.rings is a dict of name -> (ring, stop, kept): the last `kept` of `stop` rows written so far are in the ring,
# row i at ring[i % len(ring)]. In the file of that name row i is i row sizes from the start.


def append_replay(folder: Path, buffer: Any, state: dict) -> dict:
    """Appends the rows that checkpoint `state` lacks to the rings' files; returns the pieces [first, stop, CRC-32]."""
    folder.mkdir(exist_ok=True)
    pieces = {name: list(state.get("replay", {}).get(name, [])) for name in buffer.rings}
    for name, (ring, stop, kept) in buffer.rings.items():
        first, size = max(0, stop - kept, *(piece[1] for piece in pieces[name][-1:])), ring[0].nbytes
        with open(os.open(folder / f"{name}.bin", os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            while first < stop:
                row = first % len(ring)
                count = min(stop - first, len(ring) - row, 1 + 2**26 // size)  # 64 MB at a time
                data = ring[row:row + count].cpu().numpy().tobytes()
                file.seek(first * size)
                file.write(data)
                pieces[name].append([first, first + count, zlib.crc32(data)])
                first += count
            file.flush()
            os.fsync(file.fileno())
    return pieces


def load_replay(folder: Path, buffer: Any, state: dict) -> None:
    """Reads the kept rows into `buffer.rings`. Raises OSError or ValueError for a file that is short or damaged."""
    import torch
    for name, (ring, end, kept) in buffer.rings.items():
        row, path = ring[0].cpu().numpy(), folder / f"{name}.bin"
        for first, stop, checksum in state["replay"][name]:
            if stop > end - kept:
                rows = np.fromfile(path, row.dtype, (stop - first) * row.size, offset=first * row.nbytes)
                if zlib.crc32(rows) != checksum:
                    raise ValueError(f"rows {first} to {stop} of {path} fail their checksum")
                number = np.arange(max(first, end - kept), stop)
                rows = torch.from_numpy(rows.reshape(-1, *row.shape)[number - first])
                ring[torch.from_numpy(number % len(ring))] = rows.to(ring.device)


def read_checkpoint(run_dir: Path, buffer: Any = None, goes_on: bool = False, at: int | None = None) -> dict:
    """The newest complete checkpoint of `run_dir`, and its replay into `buffer`; changes nothing in the directory.

    For a run that goes on, sets the random states, and puts the previous checkpoint in a damaged one's place; {} if
    there is none yet. Raises UsageError where there is no complete one.
    """
    import torch
    paths, failures = [run_dir / "checkpoint.pt", run_dir / "checkpoint.previous.pt"], []
    if goes_on and not any(path.exists() for path in paths):
        print(f"{run_dir} has no checkpoint yet: starting from the beginning.", file=sys.stderr)
        return {}
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"record {damaged} fails its checksum")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state.get("format") != FORMAT:
                raise ValueError("it is of another version of this program")
            if at is not None and state["env_step"] != at:
                raise ValueError(f"it is of step {state['env_step']} and not of {at}")
            if buffer:
                if not state["replay"]:
                    raise ValueError("it was saved without its replay, which --resume and transfer.py data need")
                buffer.load_state_dict(state["buffer"])
                load_replay(run_dir / "replay", buffer, state)
            if goes_on:
                torch.set_rng_state(state["random"]["cpu"])
                if len(state["random"]["cuda"]) == torch.cuda.device_count():  # else the run has changed its machine
                    torch.cuda.set_rng_state_all(state["random"]["cuda"])
        except Exception as error:  # a flipped bit can surface as almost any exception of zipfile, pickle or torch
            failures.append(f"{path} is missing or cannot be used ({error})")
            continue
        if failures:
            print(f"{failures[0]}; {path.name}, of step {state['env_step']:,}, takes its place.", file=sys.stderr)
            if goes_on:  # so that the next checkpoint does not push this one out for the damaged one
                with contextlib.suppress(OSError):  # a read-only disk
                    os.replace(path, paths[0])
        return state
    raise UsageError(f"No complete checkpoint in {run_dir}: {'; '.join(failures)}.")
