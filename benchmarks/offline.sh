#!/usr/bin/env bash
# Finds the weight of offline.py's cloning term, and sets BRC+BC beside cloning alone and beside learning online.
#
#     benchmarks/offline.sh [DIR]          hours on two cores; stopped, it goes on when it is called again
#
# The data are whole replays, from the first random step to the last policy: four tasks of MetaWorld and four
# of dm_control, each seed's own. An offline run makes as many updates as its sources' online ones, 2 x 36,000, on all
# eight tasks with one network. Results: DIR/*/metrics.csv; benchmarks/report.py draws and tabulates them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/offline}
python=${PYTHON:-python}
sizes="--width 128 --batch-size 256 --eval-interval 12000"

run() { # NAME SCRIPT ARGUMENTS...: that run, from where it was stopped
    local dir="$out/$1" script=$2
    shift 2
    if [ -e "$dir/args.json" ]; then
        "$python" "$script" --resume "$dir"
    else
        "$python" "$script" "$@" --run-dir "$dir"
    fi
}

for seed in 0 1 2; do
    run "online-mw-$seed" brc_sac.py --tasks reach drawer-close handle-press coffee-button --width 128 \
        --batch-size 256 --learning-starts 1000 --total-steps 36000 --eval-interval 2000 --seed $seed
    run "online-dmc-$seed" brc_sac.py --tasks cartpole-swingup ball_in_cup-catch reacher-easy finger-spin --width 128 \
        --batch-size 256 --learning-starts 1000 --total-steps 36000 --eval-interval 2000 --seed $seed
    data="--data $out/online-mw-$seed $out/online-dmc-$seed"
    for weight in 0 0.1 0.3 1 3 10 30; do
        run "bc$weight-$seed" offline.py $data --updates 72000 --bc-weight $weight --exp-name "offline-$weight" $sizes \
            --seed $seed
    done
    run "cloning-$seed" offline.py $data --updates 72000 --bc-only --exp-name offline-cloning $sizes --seed $seed
done
