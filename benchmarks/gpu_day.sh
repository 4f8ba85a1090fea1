#!/usr/bin/env bash
# What to measure on a machine with an NVIDIA GPU and no network, in pieces of under ten minutes that are each of use
# alone and leave small files in OUT; what matters most comes first:
#
#   benchmarks/gpu_day.sh setup OUT     installs the wheels in the folder WHEELS (.whl), beside what is there
#   benchmarks/gpu_day.sh kernels OUT   one update at width 4096, and the kernels of ten graph replays by kind, to hold
#                                       against the predictions in benchmarks/README.md
#   benchmarks/gpu_day.sh tests OUT     what only a GPU can show, and the reference vectors in every precision
#   benchmarks/gpu_day.sh widths OUT    one update at every other width, in TF32 and bf16, eager, compiled, as a graph
#   benchmarks/gpu_day.sh loop OUT      the whole loop on MetaWorld-50 at width 4096: a step against its updates alone
#   benchmarks/gpu_day.sh learn OUT     MetaWorld-50 at width 1024 to 150,000 steps, in a session of its own: it runs on
#                                       when the piece ends, and every further call looks at it again, or resumes it
#   benchmarks/gpu_day.sh stop OUT      ends that run with a checkpoint
#
# Before, where there is a network:
#   benchmarks/gpu_day.sh wheels DIR    downloads what setup needs, 46 MB, for Linux and Python PYTHON_VERSION (3.12).
#                                       torch, numpy, scipy, tqdm, tensorboard, matplotlib, pytest have to be there.
# The same on a CPU at a tiny size, a few minutes in all:  REHEARSE=1 benchmarks/gpu_day.sh ...
# The learning curve beside the authors', afterwards:      python benchmarks/report.py OUT --official mw --mean-only
set -euo pipefail
pieces="wheels, setup, kernels, tests, widths, loop, learn or stop"
if [ $# -ne 2 ]; then
    echo "gpu_day.sh: $# arguments: give a piece ($pieces) and OUT." >&2
    exit 2
fi
piece=$1
out=$(mkdir -p "$2" && cd "$2" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
end=$((SECONDS + ${PIECE:-540}))
run=${RUN_DIR:-runs/gpu_learn}  # its checkpoint and replay are gigabytes: not in OUT

if [ -n "${REHEARSE:-}" ]; then
    device=cpu fast="" width=32 widths="16 24" loop="demo --loop-steps 10" precisions="fp32"
    size="--batch-size 32 --num-tasks 3 --repeats 3 --compile False"
    learn="--tasks reach drawer-close --width 32 --batch-size 32 --learning-starts 50 --total-steps 300"
    learn+=" --eval-interval 100 --eval-episodes 1"
else
    device=cuda fast="--compile True --cuda-graph True" width=4096 widths="256 1024 2048 512 8192" loop=mw precisions="tf32 bf16"
    size=""
    learn="--suite mw --variant release --goals fresh --width 1024 --total-steps 150000 --checkpoint-interval 1000000"
fi
throughput() { "$python" benchmarks/throughput.py --device $device --seconds 5 "$@"; }

# shellcheck disable=SC2086  # the variables above are lists
case $piece in
wheels)
    packages=$(grep -E '^(gymnasium|tyro|mujoco|metaworld)==' requirements.txt)
    "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp -d "$out" \
        --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
        $packages farama-notifications cloudpickle glfw pyopengl docstring-parser typeguard
    du -sh "$out"
    ;;
setup)
    "$python" -m pip install -q --no-index --no-deps "${WHEELS:-.whl}"/*.whl
    "$python" - <<'PY' | tee "$out/setup.txt"
import numpy, scipy, tensorboard, torch, tqdm
import suites
suites.make("reach", seed=0).reset(seed=0)
print("torch", torch.__version__, "numpy", numpy.__version__, "scipy", scipy.__version__, "GPU", torch.cuda.is_available())
PY
    ;;
kernels)
    throughput --widths $width $fast --precisions $precisions $size --profile \
        --json "$out/kernels.json" | tee "$out/kernels.txt"
    ;;
tests)
    failed=0
    "$python" -m pytest -q -p no:cacheprovider tests/test_speed.py | tee "$out/tests.txt" || failed=1
    for precision in fp32 ${precisions/fp32/}; do
        echo "$precision" | tee -a "$out/tests.txt"
        "$python" -m tests.parity --device $device --precision $precision tests/reference/*task.npz \
            | tee -a "$out/tests.txt" | tail -n 1 || failed=1
    done
    exit $failed
    ;;
widths)
    for width in $widths; do  # a file each: a width that does not get its turn is left to the next call
        if [ -e "$out/width_$width.csv" ] || [ $SECONDS -ge $end ]; then continue; fi
        code=0
        timeout $((end - SECONDS)) "$python" benchmarks/throughput.py --device $device --seconds 5 --widths "$width" \
            --precisions $precisions $size --csv "$out/width_$width.part.csv" || code=$?
        case $code in
        0) mv "$out/width_$width.part.csv" "$out/width_$width.csv" ;;
        124) echo "width $width is left for another call" ;;
        *) exit $code ;;
        esac
    done
    ;;
loop)
    throughput --widths $width --precisions $precisions --loop $loop ${size/--num-tasks 3/} --csv "$out/loop.csv"
    ;;
learn)
    mkdir -p "$(dirname "$run")"
    if ! kill -0 "$(cat "$run.pid" 2>/dev/null)" 2>/dev/null; then
        # A session of its own, so that the run outlives this piece. SIGTERM makes it write a checkpoint and stop.
        if [ -e "$run/checkpoint.pt" ]; then arguments="--resume $run"; else
            arguments="$learn --device $device --run-dir $run"; fi
        setsid nohup "$python" brc_sac.py $arguments >> "$run.log" 2>&1 < /dev/null &
        echo $! > "$run.pid"
    fi
    while kill -0 "$(cat "$run.pid")" 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 2; done
    cp "$run.log" "$out/learn.log"
    cp "$run/metrics.csv" "$run/args.json" "$out/"
    kill -0 "$(cat "$run.pid")" 2>/dev/null && echo "still running: call again" || tail -n 3 "$run.log"
    ;;
stop)
    kill -TERM "$(cat "$run.pid")"
    while kill -0 "$(cat "$run.pid")" 2>/dev/null && [ $SECONDS -lt $end ]; do sleep 1; done
    cp "$run.log" "$out/learn.log"
    cp "$run/metrics.csv" "$run/args.json" "$out/"
    ;;
*)
    echo "gpu_day.sh: unknown piece '$piece': give $pieces." >&2
    exit 2
    ;;
esac
