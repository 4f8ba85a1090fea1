"""BRC with a vanilla MLP as critic (Figure 4).

    python ablations/mlp.py --suite demo            every argument, output and --resume as of brc_sac.py

Our reading of vanilla, whose depth the paper does not say: SAC's critic, critic_depth = 2 dense layers of H units with
ReLU, without LayerNorm and residual connections. It has a quarter of BroNet's weights at the same width, and with
--critic-depth 5 the same number. The actor stays BroNet.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.nn as nn  # noqa: E402

import brc_sac  # noqa: E402


class MLP(nn.Sequential):
    def __init__(self, in_features: int, width: int, depth: int):
        sizes = [in_features] + [width] * depth
        super().__init__(*(layer for size in zip(sizes, sizes[1:]) for layer in (brc_sac.Dense(*size), nn.ReLU())))


class MlpCritic(brc_sac.Critic):
    Body = MLP


brc_sac.Critic = MlpCritic

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
