# To be sourced by scripts that train many agents one after the other, with the demo's sizes; they set seed and out.
python=${PYTHON:-python}
# One core for each run.
export OMP_NUM_THREADS=1
sizes="--width 128 --actor-width 128 --learning-rate 6e-4 --gamma 0.95 --tau 0.02 --init-temperature 0.01
    --eval-episodes 5 --workers 0"

run() { # NAME SCRIPT ARGUMENTS...: that run, from where it was stopped; what is complete is left as it is
    local dir="$out/$1" script=$2
    shift 2
    if [ -e "$dir/complete" ]; then
        return
    elif [ -e "$dir/args.json" ]; then
        "$python" "$script" --resume "$dir"
    else
        "$python" "$script" "$@" --seed "$seed" --run-dir "$dir"
    fi
    touch "$dir/complete"
}
