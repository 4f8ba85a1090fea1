#!/usr/bin/env bash
# Finds the weight of offline.py's cloning term, and sets BRC+BC beside cloning alone and beside learning online.
#
#     benchmarks/offline.sh seed S [DIR]       online, BRC+BC and cloning; data: the whole replay, and its last fifth
#     benchmarks/offline.sh weights S [DIR]    online, and other weights of the cloning term
#
# Stopped, it goes on when it is called again. An offline run makes as many updates as the online run whose replay it
# learns from. Results: DIR/*/metrics.csv; benchmarks/report.py draws and tabulates them.
set -euo pipefail
if [ $# -lt 2 ] || [[ $1 != seed && $1 != weights ]]; then
    echo "offline.sh: arguments are '$*': give seed or weights, and a seed's number." >&2
    exit 2
fi
cd "$(dirname "$0")/.."
source benchmarks/resumable.sh
what=$1 seed=$2 out=${3:-runs/offline}
steps=${STEPS:-12000} start=1000
updates=$((2 * (steps - start)))
sizes+=" --batch-size 128"

offline() { # NAME ARGUMENTS...: a run of offline.py on this seed's replay
    local name=$1
    shift
    run "$name-$seed" offline.py --data "$out/online-$seed" --updates $updates --eval-interval $((updates / 4)) $sizes \
        --exp-name "$name" "$@"
}

run "online-$seed" brc_sac.py --tasks drawer-close door-close cartpole-balance walker-stand $sizes \
    --learning-starts $start --total-steps "$steps" --eval-interval $(((steps - start) / 4)) --exp-name online
fifth="--last $((steps / 5))"
if [ "$what" = weights ]; then
    for weight in 0 0.01 1; do
        offline "weight-$weight-whole" --bc-weight $weight
    done
    offline weight-0.01-last-fifth --bc-weight 0.01 $fifth
else
    offline brc-bc-whole
    offline cloning-whole --bc-only
    offline brc-bc-last-fifth $fifth
    offline cloning-last-fifth --bc-only $fifth
fi
