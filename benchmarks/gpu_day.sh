#!/usr/bin/env bash
# What to measure on a machine with an NVIDIA GPU, in pieces of under ten minutes that leave small files in OUT, in this
# order (what comes first matters most):
#
#   benchmarks/gpu_day.sh setup OUT     installs what the plan needs beside torch, from the folder WHEELS or PyPI
#   benchmarks/gpu_day.sh sync OUT      tests: the graph equals eager updates, nothing waits for the device, GPU equals CPU
#   benchmarks/gpu_day.sh update OUT    one update at every width, in TF32 and bf16, compiled or not, as a graph or not
#   benchmarks/gpu_day.sh authors OUT   the authors' update on the same card: RELEASE is their repository, JAX the Python
#                                       that has what authors_throughput.py needs, JAX for CUDA included
#   benchmarks/gpu_day.sh profile OUT   the parts of an update at widths 256 and 4096, each against its floor
#   benchmarks/gpu_day.sh loop OUT      the whole loop on MetaWorld-50 at width 4096: who waits, steps per second
#   benchmarks/gpu_day.sh parity OUT    the reference vectors on the GPU: fp32, tf32 and bf16, eager and compiled
#   benchmarks/gpu_day.sh learn OUT     MetaWorld-50 at width 4096; every further call goes on where the last one stopped
#   benchmarks/gpu_day.sh report OUT    its learning curve next to the authors'
#
# For a machine without a network, in a folder that is carried there:
#   benchmarks/gpu_day.sh wheels OUT    downloads what setup needs into OUT, for Linux and Python PYTHON_VERSION (3.12)
#
# The same on a CPU, at a tiny size:
#   DEVICE=cpu WIDTHS="32 64" PRECISIONS="fp32 bf16" LOOP=demo PIECE=60 RUN_DIR=/tmp/learn \
#   LEARN="--tasks reach drawer-close --width 32 --learning-starts 50 --total-steps 400" benchmarks/gpu_day.sh ...
set -euo pipefail
pieces="setup, sync, update, authors, profile, loop, parity, learn, report or wheels"
if [ $# -ne 2 ]; then
    echo "gpu_day.sh: $# arguments: give a piece ($pieces) and OUT." >&2
    exit 2
fi
piece=$1
out=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
piece_seconds=${PIECE:-540}

needed() { grep -Ev '^(torch|ale-py|opencv|rliable)' requirements.txt; }  # torch is there; games and transfer are not run

case $piece in
wheels)
    needed > "$out/requirements.txt"
    "$python" -m pip download -q --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux2014_x86_64 \
        --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 --only-binary=:all: -d "$out" \
        -r "$out/requirements.txt"
    du -sh "$out"
    ;;
setup)
    needed > "$out/requirements.txt"
    # shellcheck disable=SC2086
    "$python" -m pip install -q ${WHEELS:+--no-index --find-links "$WHEELS"} -r "$out/requirements.txt"
    "$python" -c "import torch; print(torch.__version__, torch.cuda.is_available())" | tee "$out/setup.txt"
    ;;
sync)
    "$python" -m pytest -q tests/test_gpu.py tests/test_fast_path.py | tee "$out/sync.txt"
    ;;
update)
    # One width a file, the small and the paper's first; a width that does not get its turn is left to the next call.
    end=$((SECONDS + piece_seconds))
    for width in ${WIDTHS:-256 4096 8192 1024 512 2048}; do
        if [ -e "$out/update_$width.csv" ] || [ $SECONDS -ge $end ]; then continue; fi
        code=0
        timeout $((end - SECONDS)) "$python" benchmarks/throughput.py --widths "$width" --seconds 5 \
            --csv "$out/update_$width.part.csv" || code=$?
        case $code in
        0) mv "$out/update_$width.part.csv" "$out/update_$width.csv" ;;
        124) echo "width $width is left for another call" ;;
        *) exit $code ;;
        esac
    done
    ;;
authors)
    # shellcheck disable=SC2086
    "${JAX:?is not set: give the Python that has JAX}" benchmarks/authors_throughput.py \
        "${RELEASE:?is not set: give the folder of their repository}" --widths ${WIDTHS:-256 4096 8192} \
        --csv "$out/authors.csv"
    ;;
profile)
    # shellcheck disable=SC2086  # WIDTHS is a list
    "$python" benchmarks/throughput.py --widths ${WIDTHS:-256 4096} --seconds 3 --profile \
        --csv "$out/profile.csv"
    ;;
loop)
    for precision in ${PRECISIONS:-tf32 bf16}; do
        # shellcheck disable=SC2086
        "$python" benchmarks/throughput.py --widths ${WIDTHS:-4096} --precisions "$precision" --loop "${LOOP:-mw}" \
            --csv "$out/loop_$precision.csv"
    done
    ;;
parity)
    : > "$out/parity.txt"
    failed=0
    for precision in fp32 ${PRECISIONS:-tf32 bf16}; do
        for compile in "" --compile; do
            echo "$precision $compile" | tee -a "$out/parity.txt"
            # shellcheck disable=SC2086
            "$python" -m tests.parity --device "${DEVICE:-cuda}" --precision $precision $compile tests/reference/*task.npz \
                | tee -a "$out/parity.txt" | grep quantities || failed=1
        done
    done
    exit $failed
    ;;
learn)
    run=${RUN_DIR:-runs/gpu_learn}  # its checkpoints and replay are gigabytes: not in OUT
    if [ -e "$run/checkpoint.pt" ]; then arguments="--resume $run"; else
        arguments="${LEARN:---suite mw --width 4096 --precision bf16 --eval-interval 5000} --run-dir $run"; fi
    # SIGTERM: the run finishes its step and writes a checkpoint; timeout then exits with 124.
    # shellcheck disable=SC2086
    timeout --signal TERM "$piece_seconds" "$python" brc_sac.py $arguments || { code=$?; [ $code -eq 124 ] || exit $code; }
    cp "$run/metrics.csv" "$out/learn_metrics.csv"
    cp "$run/args.json" "$out/learn_args.json"
    ;;
report)
    "$python" benchmarks/curves.py --runs "$out/learn_metrics.csv" --official mw | tee "$out/report.txt"
    ;;
*)
    echo "gpu_day.sh: unknown piece '$piece': give $pieces." >&2
    exit 2
    ;;
esac
