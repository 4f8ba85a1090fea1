"""BRC with a SimBa critic (Lee et al. 2024; Figure 4).

    python ablations/simba.py --suite demo          every argument, output and --resume as of brc_sac.py

Blocks x + W2 relu(W1 LN(x)) of 8 H^2 weights, four times BroNet's, a last LayerNorm, SimBa's first weights but for the
last layer's, and observations normalised by running moments of sampled batches (in SimBa of every step).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import brc_sac  # noqa: E402
from brc_sac import Dense, layer_norm  # noqa: E402


class Block(torch.nn.Sequential):
    def __init__(self, width):
        super().__init__(layer_norm(width), Dense(width, 4 * width), torch.nn.ReLU(), Dense(4 * width, width))
        torch.nn.init.kaiming_normal_(self[1].weight)
        torch.nn.init.kaiming_normal_(self[3].weight)

    def forward(self, x):
        return x + super().forward(x)


def simba(in_features, width, depth):
    return torch.nn.Sequential(Dense(in_features, width, gain=1.0), *map(Block, [width] * depth), layer_norm(width))


class SimbaCritic(brc_sac.Critic):
    Body = staticmethod(simba)

    def __init__(self, args, obs_dim, *sizes):
        super().__init__(args, obs_dim, *sizes)
        self.mean, self.var = torch.nn.Buffer(torch.zeros(obs_dim)), torch.nn.Buffer(torch.ones(obs_dim))
        self.count = torch.nn.Buffer(torch.tensor(1e-4))  # of observations; checkpoints hold buffers

    def forward(self, obs, action, embedding):
        return super().forward((obs - self.mean) / (self.var + 1e-8).sqrt(), action, embedding)


class SimbaAgent(brc_sac.Agent):
    def update(self, batch, *noise):
        obs, count = batch.obs.double(), len(batch.obs) / self.share  # in float32 a small variance may come out below 0
        mean, square = moments = self.share * torch.stack([obs, obs.square()]).mean(1)
        brc_sac.devices.add([moments])  # of all ranks' batches
        for critic in (self.critic, self.target):  # Polyak averages parameters only
            delta, share = mean - critic.mean, count / critic.count.add_(count)
            critic.var.lerp_((square - mean.square()).float(), share).add_(share * (1 - share) * delta.square())
            critic.mean.add_(share * delta)
        return super().update(batch, *noise)


brc_sac.Critic, brc_sac.Agent = SimbaCritic, SimbaAgent

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
