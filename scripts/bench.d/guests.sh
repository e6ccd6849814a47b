# shellcheck shell=bash
# What benchmarks in the lab host share: guests of several VMMs in turn, their consoles and
# their exits. Sourced; the result is samples, one `VMM MEASURE VALUE` a line.

trace=/sys/kernel/tracing/events/kvm/kvm_userspace_exit

say() {
    echo "bench: $*" >&2
}

sample() {
    echo "$1 $2 $3" >>/share/samples
}

# begin VMM CMD...: CMD is a guest of that VMM from here on, and $pid and $begun say which
# process and since when, in microseconds.
begin() {
    vmm=$1
    shift
    echo '!hist:keys=reason' >"$trace/trigger" 2>/dev/null || true
    echo 'hist:keys=reason' >"$trace/trigger"
    rm -f /tmp/console
    mkfifo /tmp/console
    begun=${EPOCHREALTIME/./}
    "$@" </dev/null >/tmp/console 2>"/share/$vmm.log" &
    pid=$!
    exec 7</tmp/console
    : >"/share/$vmm.console"
}

# next_line: the guest's next line in $line; fails at the end, and after five minutes.
next_line() {
    read -r -t 300 line <&7 || return
    line=${line%$'\r'}
    echo "$line" >>"/share/$vmm.console"
}

# exits: to user space since the guest began.
exits() {
    awk '/^ *Hits:/ { print $2 }' "$trace/hist"
}

# finish: no guest from here on.
finish() {
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    exec 7<&-
}

# give_up PROBLEM: with what the guest and its VMM said last.
give_up() {
    finish
    say "$vmm: $1; the end of its console, and its errors:"
    tail -n 20 "/share/$vmm.console" "/share/$vmm.log" >&2
    exit 1
}
