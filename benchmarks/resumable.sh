# To be sourced: `run` for scripts that train many agents one after the other. They set python, seed and out.

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
