# shellcheck shell=bash
# What the scripts say on standard error, and long steps with their progress.

say() {
    printf '%s: %s\n' "${tool:-lab}" "$*" >&2
}

die() {
    say "error: $*"
    exit 125
}

usage_error() {
    say "error: $*"
    exit 2
}

# clock SECONDS: as minutes and seconds.
clock() {
    printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}

# step TEXT LOG FUNCTION [ARGS...]
#
# Runs FUNCTION in a subshell with its output in LOG and says how long it has
# been at it: in place on a terminal, else one line every 15 s, so that a CI log
# shows life without drowning in it. It gets a process group of its own, because
# debootstrap and make start many processes: all of them end when this script
# does, be it by Ctrl-C, a signal or kill -9. Callers have no traps for signals.
step() {
    local text=$1 log=$2
    shift 2
    local started=$SECONDS said=$SECONDS status=0 self=$BASHPID
    mkdir -p "$(dirname "$log")"
    trap 'end_step; exit 130' INT
    trap 'end_step; exit 143' TERM HUP
    set -m
    (without_lock "$@") >"$log" 2>&1 </dev/null &
    local job=$!
    step_job=$job
    # For when this script cannot end the job. It holds what this script locked until that is done.
    (tail --follow --pid="$self" /dev/null; end_step) >/dev/null 2>&1 </dev/null &
    step_guard=$!
    set +m
    while kill -0 "$job" 2>/dev/null; do
        if [[ -t 2 ]]; then
            printf '\r%s: %s (%s) ' "${tool:-lab}" "$text" "$(clock $((SECONDS - started)))" >&2
        elif ((said == started || SECONDS - said >= 15)); then
            say "$text ($(clock $((SECONDS - started))))"
            said=$SECONDS
            # The first line came at once; count the next interval from it.
            ((said == started)) && said=$((said + 1))
        fi
        sleep 1
    done
    wait "$job" || status=$?
    step_job=
    end_step
    trap - INT TERM HUP
    if ((status != 0)); then
        if [[ -t 2 ]]; then printf '\n' >&2; fi
        say "error: $text failed with status $status; the end of $log:"
        tail -n 20 "$log" | sed 's/^/    /' >&2
        exit 125
    fi
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    say "$text: done in $(clock $((SECONDS - started)))"
}

# end_step: returns when nothing of the step runs any more.
end_step() {
    local signal _
    if [[ -n ${step_job:-} ]]; then
        for signal in TERM KILL; do
            for _ in {1..50}; do
                kill "-$signal" -- "-$step_job" 2>/dev/null || break 2
                sleep 0.1
            done
        done
    fi
    # The guard last, as it holds the lock.
    [[ -z ${step_guard:-} ]] || kill -TERM -- "-$step_guard" 2>/dev/null || true
    step_job= step_guard=
}

# without_lock CMD...: what a step starts may outlive it, and does not hold the lock of artefact.sh.
without_lock() {
    [[ -z ${store_lock:-} ]] || exec {store_lock}>&-
    "$@"
}
