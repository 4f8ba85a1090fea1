#!/usr/bin/env bash
# The paper's claims at laptop scale: six tasks whose returns differ by orders of magnitude, in one network or in six.
#
#     benchmarks/ablations.sh methods S [DIR]    BRC and each ablation and baseline, one network each
#     benchmarks/ablations.sh widths S [DIR]     BRC with 32, 64 and 256 units in place of 128
#     benchmarks/ablations.sh single S [DIR]     BRC and BRO on every task alone, with a quarter of the batch
#
# S is the seed. Stopped, it goes on when it is called again. Results: DIR/*/metrics.csv, and for five
# methods DIR/*/diagnostics; benchmarks/report.py draws and tabulates them.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "ablations.sh: $# arguments: give methods, widths or single, and a seed." >&2
    exit 2
fi
cd "$(dirname "$0")/.."
source benchmarks/resumable.sh
what=$1 seed=$2 out=${3:-runs/ablations}
steps=${STEPS:-16000} start=1000
# Returns of a random policy: 10 to 1,300, 10, 60; 320, 130, 4.
tasks="drawer-close door-close button-press cartpole-balance walker-stand cheetah-run"
common="$sizes --learning-starts $start --total-steps $steps --eval-interval $((steps / 8))"

followed() { # NAME SCRIPT ARGUMENTS...: that run, with diagnose.py on each of its checkpoints
    (until [ -e "$out/$1/args.json" ]; do sleep 1; done
     exec "$python" benchmarks/diagnose.py "$out/$1" --follow --device cpu) &
    run "$@"
    wait
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

case $what in
methods)
    followed "brc-$seed" brc_sac.py --tasks $tasks $common --batch-size 128 --exp-name brc
    for name in mse mse_raw separate_heads mlp; do
        followed "$name-$seed" ablations/$name.py --tasks $tasks $common --batch-size 128 --exp-name $name
    done
    for name in simba mse_heads sac mh_sac; do
        run "$name-$seed" ablations/$name.py --tasks $tasks $common --batch-size 128 --exp-name $name
    done
    ;;
widths)
    for width in 32 64 256; do
        run "width-$width-$seed" brc_sac.py --tasks $tasks $common --batch-size 128 --width $width --exp-name brc-$width
    done
    ;;
single)
    for task in $tasks; do
        run "single-$task-$seed" brc_sac.py --tasks $task $common --batch-size 32 --exp-name brc-single
        run "bro-$task-$seed" ablations/bro.py --tasks $task $common --batch-size 32 --exp-name bro
    done
    ;;
*)
    echo "ablations.sh: unknown piece '$what': give methods, widths or single." >&2
    exit 2
    ;;
esac
