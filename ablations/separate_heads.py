"""BRC with an output head per task in place of the task embedding (Figures 5 and 6).

    python ablations/separate_heads.py --suite demo     every argument, output and --resume as of brc_sac.py

Critic and actor share all but their last layers, of which every task has its own; the choice of the head is all that
tells the task. It changes the Critic and Actor that it finds: see mse_heads.py and mh_sac.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import brc_sac  # noqa: E402


class Heads(brc_sac.Dense):  # N layers like `layer` in one matrix: [B, H] -> [B, N, outputs]
    def __init__(self, layer, num_tasks, gain=2**0.5):
        super().__init__(layer.in_features, num_tasks * layer.out_features)
        self.num_tasks = num_tasks
        for weight in self.weight.data.chunk(num_tasks):
            nn.init.orthogonal_(weight, gain)

    def forward(self, x):
        return super().forward(x).unflatten(-1, (self.num_tasks, -1))


def choose(heads, one_hot):  # [..., B, N, outputs], [B, N]; a matrix product would fall under autocast
    return (heads * one_hot.unsqueeze(-1)).sum(-2)


class HeadsCritic(brc_sac.Critic):
    def __init__(self, args, obs_dim, act_dim, num_tasks):  # 0 tasks: single-task mode
        super().__init__(args, obs_dim, act_dim, 0)
        for member in self.members:
            member[-1] = Heads(member[-1], max(1, num_tasks))

    def embed(self, task_id):
        return F.one_hot(task_id, self.members[0][-1].num_tasks).float()  # [B, N]

    def forward(self, obs, action, one_hot):
        return choose(super().forward(obs, action, one_hot[:, :0]), one_hot)  # [E, B, N, K] -> [E, B, K]


class HeadsActor(brc_sac.Actor):
    def __init__(self, args, obs_dim, act_dim, num_tasks):
        super().__init__(args, obs_dim, act_dim, 0)
        self.mean = Heads(self.mean, max(1, num_tasks))
        self.log_std = Heads(self.log_std, max(1, num_tasks), gain=1.0)

    def forward(self, obs, one_hot):
        return tuple(choose(heads, one_hot) for heads in super().forward(obs, one_hot[:, :0]))  # [B, N, A] -> [B, A]


brc_sac.Critic, brc_sac.Actor = HeadsCritic, HeadsActor

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
