"""Neither cross-entropy with return normalisation nor task embeddings: mse_raw.py with separate heads (Figure 6).

    python ablations/mse_heads.py --suite demo --width 64       every argument, output and --resume as of brc_sac.py

The corner of Figure 6 that has none of BRC's three parts, once --width is small as well. The other corners are
brc_sac.py, mse_raw.py and separate_heads.py, each at a large and at a small width. That raw rewards go with the mean
squared error there is our reading, and mse.py with the heads of separate_heads.py would be the other one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import brc_sac  # noqa: E402
from ablations import mse_raw  # noqa: E402, F401, I001  its critic
from ablations import separate_heads  # noqa: E402, F401  gets the heads: this order

if __name__ == "__main__":
    brc_sac.harness.exit_on_error(brc_sac.main)
