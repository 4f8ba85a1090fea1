"""Multi-head SAC, the naive multi-task baseline of Figure 1: sac.py with an output head per task in place of a one-hot.

    python ablations/mh_sac.py --suite demo         every argument, output and --resume as of brc_sac.py

The heads are those of separate_heads.py, on SAC's two critics and its actor; everything below them is shared. That is
the multi-task multi-head SAC of Meta-World (Yu et al. 2019). With one task it is sac.py. The paper does not say what
its SAC shares with BRC besides the algorithm: sac.py lists what we keep.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
from ablations import sac  # noqa: E402, F401, I001  its critic and actor
from ablations import separate_heads  # noqa: E402, F401  get the heads: this order

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
