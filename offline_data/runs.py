"""The replays of runs of brc_sac.py."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import brc_sac
import harness
import suites
from harness import UsageError
from offline_data.episodes import Episodes


class RunReplay:
    """The replay of a run of brc_sac.py: the newest `last` transitions of each of its tasks, or all that it holds."""

    action_repeat = 1

    def __init__(self, run_dir: Path, tasks: tuple[str, ...] | None, last: int | None):
        args, facts = harness.read_args(run_dir, brc_sac.Args)
        if "tasks" not in facts:  # of transfer.py
            raise UsageError(f"{run_dir} holds the runs of several tasks: give a folder in it.")
        if suites.benchmark(args.tasks[0]) is suites.atari:
            raise UsageError(f"{run_dir} is a run on Atari games: give runs of brc_sac.py.")
        self.tasks = tuple(task for task in args.tasks if task in (tasks or args.tasks))
        self.parts, self.transitions, self.rows, self.block, self.nbytes = [], {}, 0, 0, 0
        for rank in range(size := facts.get("ranks", 1)):  # those of torchrun had a share of the tasks each
            folder, names = run_dir / f"rank{rank}" if rank else run_dir, args.tasks[rank::size]
            state = harness.read_checkpoint(folder)
            if not state.get("buffer"):  # of transfer.py, or of slim.py
                raise UsageError(f"{folder} holds no replay: give runs of brc_sac.py.")
            if not rank:
                *sizes, _, _ = state["agent"]["sizes"]
            room = int(min(last or math.inf, state["buffer"]["steps"] - state["buffer"]["oldest"]))
            census = Census(len(names), *sizes, room)
            state = harness.read_checkpoint(folder, census)
            steps = kept(census)
            if not len(steps):
                raise UsageError(f"{folder} holds no transitions yet: give a run that has made steps.")
            for i in [i for i, task in enumerate(names) if task in self.tasks]:
                self.transitions[names[i]] = len(steps)
                end = census.end[steps, i] > 0
                self.rows += len(steps) + int(end.sum()) + int(not end[-1])
            self.parts.append((folder, names, (*sizes, room), {name: state[name] for name in ("buffer", "replay")}))
            self.block = max(self.block, len(steps))
            self.nbytes = max(self.nbytes, census.all_nbytes + len(steps) * (4 * sum(census.fields) + 16))

    def read(self, own: dict[str, tuple[int, int]]) -> Iterator[Episodes]:
        for folder, names, sizes, state in self.parts:
            buffer = brc_sac.ReplayBuffer(len(names), *sizes)
            try:
                buffer.load_state_dict(state["buffer"])
                harness.load_replay(folder / "replay", buffer, state)
            except (OSError, ValueError) as error:
                raise UsageError(f"{folder} has changed while it was read ({error}): start again.") from None
            row = kept(buffer)
            for i in [i for i, task in enumerate(names) if task in self.tasks]:
                obs, action, reward, terminated = buffer.rows[row, i].split(buffer.fields, dim=-1)
                end = buffer.end[row, i].long()  # 0, or the number of the end and 1
                last_obs = buffer.last_obs[(end[end > 0] - 1) % len(buffer.last_obs)]
                stop, running = end.nonzero().squeeze(-1) + 1, not end[-1]
                if running:
                    stop = torch.cat([stop, torch.tensor([len(row)])])
                    last_obs = torch.cat([last_obs, buffer.current_obs()[i:i + 1]])
                whole = torch.arange(len(stop)) >= (buffer.oldest > 0)  # else the first may have begun before
                whole[-1] &= not running
                yield Episodes(folder, names[i], obs, action, reward.squeeze(-1), terminated.squeeze(-1), last_obs,
                               stop.diff(prepend=torch.tensor([0])), whole)


class Census(brc_sac.ReplayBuffer):
    """Reads a replay with its checksums, and keeps only where episodes ended: how much there is, in little memory."""

    @property
    def rings(self) -> dict[str, tuple[Tensor, int, int]]:
        rings = super().rings
        self.all_nbytes = sum(ring.nbytes for ring, _, _ in rings.values())
        return {name: (ring if name in ("end", "end_step") else ring[:1], *window)
                for name, (ring, *window) in rings.items()}


def kept(buffer: brc_sac.ReplayBuffer) -> Tensor:
    """The rows of the steps in a replay that has been read, in order."""
    buffer.end_episodes(np.array([], int))  # gives up what a smaller ring has no last observations for
    return torch.arange(buffer.oldest, buffer.steps) % len(buffer.rows)
