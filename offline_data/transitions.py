"""The transitions of all sources in memory, to draw batches from."""

import zlib
from collections.abc import Callable

import torch

from brc_sac import Batch, VectorEnv
from offline_data.episodes import Episodes, fit


class Transitions:
    """Transitions of N tasks, every observation stored once, in float32; rewards are raw.

    A row holds an observation and the action, reward and terminated that followed it; next_obs is the obs of the row
    after it. Where an episode ends there is a row more, for its last observation.
    """

    def __init__(self, sources: list, envs: VectorEnv, observe: Callable[[int, Episodes], None], device: torch.device):
        """Reads the sources and pads to O and A. Raises UsageError for unfit data.

        envs: the tasks, and their sizes. observe: is shown the number of a task and its episodes.
        """
        widths, num_rows = (envs.obs_dim, envs.act_dim), sum(source.rows for source in sources)
        self.fields = (*widths, 1, 1)  # of a row: obs, action, reward, terminated
        count = [sum(source.transitions.get(task, 0) for source in sources) for task in envs.tasks]
        size = 4 * num_rows * sum(self.fields) + 8 * sum(count)
        # A block is there three times here, padded, joined and as rows, beside the places of its transitions.
        more = max(source.nbytes + source.block * (12 * sum(self.fields) + 24) for source in sources)
        print(f"{sum(count):,} transitions of {len(envs.tasks)} tasks: {size / 1e9:.3f} GB on {device}, and on the "
              f"host up to {more / 1e9:.3f} GB more while they are read", flush=True)
        self.rows, stop, self.fingerprint = torch.empty(num_rows, sum(self.fields), device=device), 0, 0
        self.place = torch.empty(sum(count), dtype=torch.int64, device=device)  # the rows that are transitions
        self.count = torch.tensor(count, device=device)  # [N]
        self.first = self.count.cumsum(0) - self.count  # [N] where in `place` a task's begin
        own, filled = dict(zip(envs.tasks, zip(envs.obs_dims, envs.act_dims))), self.first.tolist()
        for episodes in (episodes for source in sources for episodes in source.read(own)):
            task = envs.tasks.index(episodes.task)
            episodes = fit(episodes, own[episodes.task], widths)
            place = torch.arange(len(episodes.obs)) + torch.repeat_interleave(episodes.lengths)
            rows = torch.zeros(len(place) + len(episodes.lengths), sum(self.fields))
            rows[place] = torch.cat([episodes.obs, episodes.action, episodes.reward.unsqueeze(-1),
                                     episodes.terminated.unsqueeze(-1)], dim=-1)
            rows[(episodes.lengths + 1).cumsum(0) - 1, :envs.obs_dim] = episodes.last_obs
            for part in (episodes.task.encode(), episodes.lengths.numpy(), rows.numpy()):
                self.fingerprint = zlib.crc32(part, self.fingerprint)
            self.rows[stop:stop + len(rows)] = rows.to(device)
            self.place[filled[task]:filled[task] + len(place)] = (stop + place).to(device)
            filled[task] += len(place)
            stop += len(rows)
            observe(task, episodes)

    def sample(self, batch_size: int) -> Batch:
        """A batch with raw rewards, uniform over tasks and over the transitions of each."""
        draw = {"size": (batch_size,), "device": self.rows.device}
        task_id = torch.randint(len(self.count), **draw)
        row = self.place[self.first[task_id] + torch.randint(2**62, **draw) % self.count[task_id]]
        obs, action, reward, terminated = self.rows[row].split(self.fields, dim=-1)
        next_obs = self.rows[row + 1, :obs.shape[1]]
        return Batch(obs, action, reward.squeeze(-1), terminated.squeeze(-1), next_obs, task_id)
