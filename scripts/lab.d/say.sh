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
# shows life without drowning in it. It gets a process group of its own, which
# is ended as a whole when this script is, because debootstrap and make start
# many processes.
step() {
    local text=$1 log=$2
    shift 2
    local started=$SECONDS said=$SECONDS status=0
    mkdir -p "$(dirname "$log")"
    set -m
    ("$@") >"$log" 2>&1 </dev/null &
    local job=$!
    set +m
    step_job=$job
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
    if ((status != 0)); then
        if [[ -t 2 ]]; then printf '\n' >&2; fi
        say "error: $text failed with status $status; the end of $log:"
        tail -n 20 "$log" | sed 's/^/    /' >&2
        exit 125
    fi
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    say "$text: done in $(clock $((SECONDS - started)))"
}

end_step() {
    if [[ -n ${step_job:-} ]]; then
        kill -TERM -- "-$step_job" 2>/dev/null || true
    fi
}
