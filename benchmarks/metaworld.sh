#!/usr/bin/env bash
# MetaWorld-50 beside the authors' curve, on one core: 50,000 steps in about two hours at width 128.
#
#     benchmarks/metaworld.sh WIDTH SEED [GOALS] [DIR]
#
# GOALS is fresh, as in the published curves, or frozen, as in their release. Stopped, it goes on when it is called
# again. A quarter of the paper's batch and half of its actor; all else is the release's.
# Results: DIR/*/metrics.csv, which benchmarks/report.py --official mw --metric success draws beside theirs.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "metaworld.sh: $# arguments: give WIDTH and SEED, then GOALS (fresh or frozen) and DIR if you like." >&2
    exit 2
fi
cd "$(dirname "$0")/.."
source benchmarks/resumable.sh
width=$1 seed=$2 goals=${3:-fresh} out=${4:-runs/metaworld}
steps=${STEPS:-50000}

run "width-$width-$goals-$seed" brc_sac.py --suite mw --variant release --goals "$goals" --width "$width" \
    --actor-width 128 --batch-size 256 --total-steps "$steps" --eval-interval $((steps / 4)) --eval-episodes 5 \
    --workers 0 --exp-name "brc-$width-$goals"
