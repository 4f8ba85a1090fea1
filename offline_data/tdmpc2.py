"""The transitions that TD-MPC2 was trained on (Hansen et al. 2024): their sets mt30 and mt80, folders of chunk_*.pt.

A chunk is a TensorDict of episodes x rows: 501 rows in mt30, whose episodes are dm_control's; 101 in mt80, where those
are cut into five, and MetaWorld's are whole. The action and reward of a row led to its observation, those of the first
row mean nothing. Nothing terminates, and a cut is no end. Each action was taken for two steps: a reward is the sum of
both, and whoever learns from it has to be evaluated by `make`.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import suites
from offline_data.episodes import Episodes
from suites.base import UsageError

ACTION_REPEAT = 2
FIELDS = ("obs", "action", "reward", "task")
AT_ONCE = 1000  # episodes
SETS = {501: ("mt30", 30, 24, 6), 101: ("mt80", 80, 39, 6)}  # rows of an episode: name, tasks, O and A, padded with 0

# The numbers in the field `task` are places in this list: 19 stock tasks of dm_control, 11 custom ones, MetaWorld's 50.
# They write "cup-catch", "walker-walk-backwards" and "mw-reach".
TASKS = (
    "walker-stand", "walker-walk", "walker-run", "cheetah-run", "reacher-easy", "reacher-hard", "acrobot-swingup",
    "pendulum-swingup", "cartpole-balance", "cartpole-balance_sparse", "cartpole-swingup", "cartpole-swingup_sparse",
    "ball_in_cup-catch", "finger-spin", "finger-turn_easy", "finger-turn_hard", "fish-swim", "hopper-stand",
    "hopper-hop",
    "walker-walk_backwards", "walker-run_backwards", "cheetah-run_backwards", "cheetah-run_front", "cheetah-run_back",
    "cheetah-jump", "hopper-hop_backwards", "reacher-three_easy", "reacher-three_hard", "ball_in_cup-spin",
    "pendulum-spin",
    "assembly", "basketball", "button-press-topdown", "button-press-topdown-wall", "button-press", "button-press-wall",
    "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble", "door-open", "door-close",
    "drawer-close", "drawer-open", "faucet-open", "faucet-close", "hammer", "handle-press-side", "handle-press",
    "handle-pull-side", "handle-pull", "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole",
    "pick-place", "pick-place-wall", "plate-slide", "plate-slide-side", "plate-slide-back", "plate-slide-back-side",
    "push-back", "push", "push-wall", "reach", "reach-wall", "shelf-place", "soccer", "stick-push", "stick-pull",
    "sweep-into", "sweep", "window-open", "window-close", "bin-picking", "box-close", "door-lock", "door-unlock",
    "hand-insert",
)  # fmt: skip


class Repeated(gym.Wrapper):
    """Takes every action for two steps; the reward is the sum of both, a success that of either."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        total, success = 0.0, np.nan
        for _ in range(ACTION_REPEAT):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total, success = total + reward, np.fmax(success, info.get("success", np.nan))
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info | ({} if np.isnan(success) else {"success": float(success)})


def make(task: str, seed: int, render_mode: str | None = None, goals: str = "fresh") -> gym.Env:
    """The environment of one task as TD-MPC2 steps it."""
    return Repeated(suites.make(task, seed, render_mode, goals))


def chunks(folder: Path) -> list[Path]:
    """The files of a folder, chunk_2.pt before chunk_10.pt."""
    return sorted(folder.glob("chunk_*.pt"), key=lambda path: (len(path.name), path.name))


class Dataset:
    """A folder's transitions, of all its tasks or of `tasks`: at most `max_transitions` of each, drawn evenly.

    Evenly: the task's episodes, in the order of the files, are dealt into as many equal parts as are needed, and one of
    each part is drawn, always the same. Reads only the tasks' numbers now, and the files one by one in `read`. Raises
    UsageError for what is no such file, naming it and the place in it.
    """

    action_repeat = ACTION_REPEAT

    def __init__(self, folder: Path, tasks: tuple[str, ...] | None = None, max_transitions: int | None = None):
        self.files = chunks(folder)
        numbers, rows = [], set()
        for path in self.files:
            chunk = load(path)
            numbers.append(chunk["task"][:, 0].long().numpy())
            rows.add(chunk["task"].shape[1])
            if len(rows) > 1:
                raise UsageError(f"{path} has episodes of another length than the files before it: mt30 and mt80 are "
                                 "folders of their own.")
        if not any(map(len, numbers)):
            raise UsageError(f"{folder} holds no episodes: its chunk_*.pt are all empty.")
        self.first = np.cumsum([0] + [len(of_file) for of_file in numbers])  # episode of each file
        self.length, = (count - 1 for count in rows)
        self.episodes, self.transitions = {}, {}  # of each task: which of all are drawn; how many of theirs
        for number, task in enumerate(TASKS):
            episodes = np.flatnonzero(np.concatenate(numbers) == number)
            kept = min(max_transitions or np.inf, len(episodes) * self.length)
            if kept and task in (tasks or TASKS):
                count = -int(-kept // self.length)
                edges = np.arange(count + 1) * len(episodes) // count
                drawn = edges[:-1] + np.random.default_rng(number).random(count) * np.diff(edges)
                self.episodes[task], self.transitions[task] = episodes[drawn.astype(int)], int(kept)
        self.tasks, counts = tuple(self.episodes), [len(drawn) for drawn in self.episodes.values()]
        self.rows = sum(self.transitions.values()) + sum(counts)
        self.block = self.length * min(max(counts, default=0), AT_ONCE)
        # A file is in memory as far as it was read, and of a block four copies: those before it, and its checks'.
        _, _, *widths = SETS[self.length + 1]
        self.nbytes = max(path.stat().st_size for path in self.files) + self.block * 16 * (sum(widths) + 2)

    def read(self, own: dict[str, tuple[int, int]]) -> Iterator[Episodes]:
        """The episodes drawn, AT_ONCE at most at a time; of each task's last one what is still wanted."""
        import torch

        for path, first, stop in zip(self.files, self.first, self.first[1:]):
            chunk = load(path)
            for task, episodes in self.episodes.items():
                here = episodes[(episodes >= first) & (episodes < stop)]
                for start in range(0, len(here), AT_ONCE):
                    numbers = here[start : start + AT_ONCE]
                    row = torch.from_numpy(numbers - first)
                    obs, action, reward = (chunk[name][row].float() for name in FIELDS[:3])
                    refuse(path, row, ~obs.isfinite().all(-1), "an observation that is not finite")
                    padding = f"{task} with other numbers than 0 after its first"
                    size, act_size = own[task]
                    refuse(path, row, obs[..., size:].any(-1), f"an observation of {padding} {size}")
                    action, reward = action[:, 1:], reward[:, 1:]
                    refuse(path, row, ~action.isfinite().all(-1), "an action that is not finite", 1)
                    refuse(path, row, (action.abs() > 1 + 1e-6).any(-1), "an action outside [-1, 1]", 1)
                    refuse(path, row, action[..., act_size:].any(-1), f"an action of {padding} {act_size}", 1)
                    refuse(path, row, ~reward.isfinite(), "a reward that is not finite", 1)
                    lengths = torch.full((len(numbers),), self.length)
                    lengths[numbers == episodes[-1]] = self.transitions[task] - (len(episodes) - 1) * self.length
                    taken = torch.arange(self.length) < lengths.unsqueeze(1)  # [E, T]
                    yield Episodes(path, task, obs[:, :-1][taken], action[taken], reward[taken],
                                   torch.zeros(taken.sum()), obs[torch.arange(len(lengths)), lengths], lengths,
                                   lengths == self.length)


def load(path: Path) -> dict[str, Any]:
    """The fields of a chunk, on disk until they are read. Raises UsageError if they are not as they should be."""
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise UsageError(f"TD-MPC2's files need tensordict ({error}): pip install tensordict==0.15.3.") from error
    import torch

    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is not a file of torch.save's, or cut short")
        # No code of the file's runs. Files of older versions know the class by another name.
        with torch.serialization.safe_globals([(TensorDict, "tensordict.tensordict.TensorDict")]):
            chunk = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(chunk, (dict, TensorDict)):
            raise ValueError(f"it holds a {type(chunk).__name__} and not the fields {', '.join(FIELDS)}")
    except pickle.UnpicklingError:  # whose text is advice to run the file's code
        raise UsageError(f"{path} cannot be read (it holds other things than tensors, or is damaged): get the file "
                         "again.") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"{path} cannot be read ({reason.splitlines()[0]}): get the file again.") from None
    chunk = dict(chunk.items())
    if missing := [name for name in FIELDS if name not in chunk]:
        raise UsageError(f"{path} has no field {missing[0]}: TD-MPC2's files have {', '.join(FIELDS)}.")
    for name in FIELDS:
        value = chunk[name]
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or value.is_complex() or value.dtype == torch.bool or value.layout != torch.strided:
            found = f"{value.layout} and {value.dtype}" if is_tensor else type(value).__name__
            raise UsageError(f"{path} has {name} as {found}, where TD-MPC2's files have a plain tensor of numbers.")
    shape = tuple(chunk["obs"].shape)
    if len(shape) != 3 or shape[1] not in SETS:
        known = " and ".join(f"{rows} in {name}" for rows, (name, *_) in SETS.items())
        raise UsageError(f"{path} has observations of shape {list(shape)}: TD-MPC2's are [episodes, rows, numbers], "
                         f"with {known} for rows.")
    name, num_tasks, *widths = SETS[shape[1]]
    for field, width in zip(FIELDS, ((widths[0],), (widths[1],), (), ())):
        if tuple(chunk[field].shape) != (expected := (*shape[:2], *width)):
            raise UsageError(f"{path} has {field} of shape {list(chunk[field].shape)}, and as a file of {name}, with "
                             f"episodes of {shape[1]} rows, should have it of shape {list(expected)}.")
    task = chunk["task"]
    odd = ~((task >= 0) & (task < num_tasks))
    if task.is_floating_point():
        odd |= task != task.floor()
    refuse(path, range(shape[0]), odd, f"a task that is no whole number from 0 to {num_tasks - 1}")
    refuse(path, range(shape[0]), task != task[:, :1], "another task than its episode's first row")
    return chunk


def refuse(path: Path, episodes: Any, bad: Any, what: str, first_row: int = 0) -> None:
    """Raises UsageError for the first of the rows `bad` [E, T] of a file."""
    if bad.any():
        episode, row = bad.nonzero()[0].tolist()
        raise UsageError(f"{path} has {what}, in row {first_row + row} of episode {int(episodes[episode])}: get the "
                         "file again, or move it away.")
