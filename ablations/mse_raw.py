"""BRC with a mean squared error and raw rewards: mse.py without its return normalisation (Figures 3, 4 and 6).

    python ablations/mse_raw.py --suite demo        every argument, output and --resume as of brc_sac.py

The critics learn returns in the units of each task's reward, whatever their size. `return_scale` in TensorBoard stays
at v_max, which stands for a factor of 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import brc_sac  # noqa: E402
from ablations import mse  # noqa: E402, F401  its import replaces critic and loss


class RawRewards(brc_sac.ReturnNormalizer):
    """Scales all rewards by 1 = v_max / v_max."""

    def denominator(self, temperature: Tensor) -> Tensor:
        return torch.full_like(self.return_scale, self.v_max)  # [N]


brc_sac.ReturnNormalizer = RawRewards

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
