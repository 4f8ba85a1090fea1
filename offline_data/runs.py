"""The replays of runs of brc_sac.py."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

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
        if suites.benchmark(args.tasks[0]) is suites.atari:
            raise UsageError(f"{run_dir} is a run on Atari games: give runs of brc_sac.py.")
        self.tasks = tuple(task for task in args.tasks if task in (tasks or args.tasks))
        self.parts, self.transitions, self.rows, self.nbytes = [], 0, 0, 0  # nbytes: of memory while it is read
        for rank in range(size := facts.get("ranks", 1)):  # those of torchrun had a share of the tasks each
            folder, names = run_dir / f"rank{rank}" if rank else run_dir, args.tasks[rank::size]
            state = harness.read_checkpoint(folder)
            if "buffer" not in state:
                raise UsageError(f"{folder} holds no replay: give runs of brc_sac.py.")
            obs_dim, act_dim = sizes = sizes if rank else state["agent"]["sizes"][:2]
            kept = int(min(last or math.inf, state["buffer"]["steps"] - state["buffer"]["oldest"]))
            taken = len(set(names) & set(self.tasks))
            self.parts.append((folder, names, sizes, kept))
            self.transitions += taken * kept
            # One row more for each end, of which there is room for so many, and for each running episode.
            self.rows += taken * (kept + 1) + min(state["buffer"]["ends"], len(names) * (kept // 16 + 4))
            self.nbytes = max(self.nbytes, len(names) * kept * 4 * (obs_dim + act_dim + 3))

    def read(self) -> Iterator[Episodes]:
        for folder, names, sizes, kept in self.parts:
            buffer = brc_sac.ReplayBuffer(len(names), *sizes, kept)
            harness.read_checkpoint(folder, buffer)
            buffer.end_episodes(np.array([], int))  # gives up what a smaller ring has no last observations for
            row = torch.arange(buffer.oldest, buffer.steps) % len(buffer.rows)
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
                yield Episodes(names[i], obs, action, reward.squeeze(-1), terminated.squeeze(-1), last_obs,
                               stop.diff(prepend=torch.tensor([0])), whole)
