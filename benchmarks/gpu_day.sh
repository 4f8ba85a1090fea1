#!/usr/bin/env bash
# What to measure on a machine with a GPU, in pieces of under ten minutes that leave small files in OUT. The packages of
# requirements.txt must be there (torch may be the machine's own, 2.11 or later):
#
#   benchmarks/gpu_day.sh update OUT    time of one update at every width against its floor, eager and compiled
#   benchmarks/gpu_day.sh parity OUT    the reference vectors (float32, on the CPU of that machine and its torch)
#   benchmarks/gpu_day.sh learn OUT     MetaWorld-50 at width 4096; every further call goes on where the last one stopped
#   benchmarks/gpu_day.sh report OUT    its learning curve next to the authors'
#
# The same on a CPU, at a tiny size:
#   WIDTHS="32 64" LEARN="--tasks reach drawer-close --width 32 --learning-starts 50 --total-steps 400" PIECE=60 ...
set -euo pipefail
piece=$1
out=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

case $piece in
update)
    # shellcheck disable=SC2086  # WIDTHS is a list
    for compile in no-compile compile; do
        "$python" benchmarks/throughput.py ${WIDTHS:+--widths $WIDTHS} "--$compile" --json "$out/update_$compile.json"
    done
    ;;
parity)
    for file in tests/reference/*.npz; do "$python" -m tests.parity "$file"; done | tee "$out/parity.txt" | grep quantities
    ;;
learn)
    run=${RUN_DIR:-runs/gpu_learn}  # its checkpoints and replay are gigabytes: not in OUT
    if [ -e "$run/checkpoint.pt" ]; then arguments="--resume $run"; else
        arguments="${LEARN:---suite mw --width 4096 --eval-interval 5000} --run-dir $run"; fi
    # SIGTERM: finish the step, write a checkpoint, exit with 143
    # shellcheck disable=SC2086
    timeout --signal TERM "${PIECE:-540}" "$python" brc_sac.py $arguments || [ $? -eq 143 ] || [ $? -eq 124 ]
    cp "$run/metrics.csv" "$out/learn_metrics.csv"
    cp "$run/args.json" "$out/learn_args.json"
    ;;
report)
    "$python" benchmarks/curves.py --runs "$out/learn_metrics.csv" --official mw | tee "$out/report.txt"
    ;;
*)
    echo "gpu_day.sh: unknown piece '$piece': give update, parity, learn or report." >&2
    exit 2
    ;;
esac
