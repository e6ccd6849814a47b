# shellcheck shell=bash
# What benchmarks in the lab host share: guests of several VMMs in turn, their consoles and
# their exits. Sourced; the result is samples, one `VMM MEASURE VALUE` a line.

# Where programs and results are, where this writes otherwise, and where the host's kernel counts: in the lab host
# always the same.
share=${RAVELIN_BENCH_SHARE:-/share}
work=${RAVELIN_BENCH_WORK:-/tmp}
tracing=${RAVELIN_BENCH_TRACING:-/sys/kernel/tracing}
trace=$tracing/events/kvm/kvm_userspace_exit
calls=$tracing/events/raw_syscalls/sys_enter
entries=$tracing/events/kvm/kvm_entry
# Events are switched on and off only while no guest runs, for that changes the kernel's code (docs/status.md).

say() {
    echo "bench: $*" >&2
}

# sample VMM MEASURE VALUE
samples=$share/samples
sample() {
    echo "$1 $2 $3" >>"$samples"
}

# attempt CMD...: a measurement with one guest, whose samples count when it comes to its end. On the lab's software CPU
# a guest in thirty or so does not (docs/status.md); so there are three chances, in public.
attempt() {
    local chance status
    for chance in 1 2 3; do
        : >"$work/samples"
        # Not in a condition, where errexit would be off.
        set +e
        (
            set -e
            samples=$work/samples
            "$@"
        )
        status=$?
        set -e
        if ((status == 0)); then
            cat "$work/samples" >>"$samples"
            return
        fi
        say "$*: attempt $chance of 3 came to nothing"
    done
    exit 1
}

# begin VMM CMD...: CMD is a guest of that VMM from here on, and $pid and $begun say which
# process and since when, in microseconds.
begin() {
    vmm=$1
    shift
    echo '!hist:keys=reason' >"$trace/trigger" 2>/dev/null || true
    echo 'hist:keys=reason' >"$trace/trigger"
    rm -f "$work/console"
    mkfifo "$work/console"
    # A mark for first_entry, too.
    echo begun >"$tracing/trace_marker"
    begun=${EPOCHREALTIME/./}
    "$@" </dev/null >"$work/console" 2>"$share/$vmm.log" &
    pid=$!
    exec 7<"$work/console"
    : >"$share/$vmm.console"
}

# on_a_terminal CMD...: CMD with a terminal of its own as standard input, for alioth
# starts with no other. All of them get one, so that they differ in nothing else.
on_a_terminal() {
    # TIOCSPTLCK and TIOCGPTN; the other end stays open in CMD.
    exec perl -e '
        $^F = 255;
        open(my $other, "+<", "/dev/ptmx") or die "/dev/ptmx: $!\n";
        my $number = pack("i", 0);
        ioctl($other, 0x40045431, $number) and ioctl($other, 0x80045430, $number) or die "a terminal: $!\n";
        open(STDIN, "+<", "/dev/pts/" . unpack("i", $number)) or die "/dev/pts: $!\n";
        exec(@ARGV) or die "$ARGV[0]: $!\n"' "$@"
}

# make_initramfs BASE FILE...: to $work/initramfs: the guest's own, BASE, with what `scenario`
# prints as its script, programs of this host, with their libraries, or of $share in its /bin, and further libraries.
make_initramfs() {
    local base=$1 tree=$work/tree program library
    shift
    mkdir -p "$tree/bin" "$tree/lib64" "$tree/lib/x86_64-linux-gnu"
    scenario >"$tree/scenario"
    cp /lib64/ld-linux-x86-64.so.2 "$tree/lib64/"
    for program in "$@"; do
        if [[ $program == *.so.* ]]; then
            cp "$program" "$tree/lib/x86_64-linux-gnu/"
            continue
        fi
        cp "$program" "$tree/bin/"
        [[ $program == /* ]] || continue
        /lib64/ld-linux-x86-64.so.2 --list "$program" | sed -n 's/.* => \(.*\) (0x.*/\1/p' |
            while read -r library; do
                [[ $library == */ld-linux* ]] || cp "$library" "$tree/lib/x86_64-linux-gnu/"
            done
    done
    chmod +x "$tree/bin/"*
    # The base is padded to where another archive may begin.
    { cat "$base" && (cd "$tree" && find . -mindepth 1 | cpio --quiet --create --format=newc); } >"$work/initramfs"
}

# next_line: the guest's next line in $line; fails at the end, and after two and a half minutes.
next_line() {
    read -r -t 150 line <&7 || return
    line=${line%$'\r'}
    echo "$line" >>"$share/$vmm.console"
}

# exits: to user space since the guest began.
exits() {
    awk '/^ *Hits:/ { print $2 }' "$trace/hist"
}

# count_calls: the requests (ioctl, number 16) of each thread are counted from here on, for mapping_ended.
counting=0
count_calls() {
    counting=1
    echo '!hist:keys=common_pid' >"$calls/trigger" 2>/dev/null || true
    echo 'hist:keys=common_pid if id == 16' >"$calls/trigger"
}

# requests: of the VMM to the host since count_calls, without those that enter the guest, of which there is one
# for each exit to user space. Reads the exits first, so that it never counts too few of the rest.
requests() {
    local exits threads=("/proc/$pid/task/"*)
    exits=$(exits)
    awk -v exits="$exits" -v threads="${threads[*]##*/}" '
        BEGIN { split(threads, list, " "); for (i in list) own[list[i]] }
        $1 == "{" && $3 in own { sum += $6 }
        END { print sum - exits }' "$calls/hist"
}

# watch_entry: has the next guest's first entry recorded.
watch_entry() {
    echo 0 >"$tracing/tracing_on"
    # What comes first is kept, and what no longer fits is not.
    echo mono >"$tracing/trace_clock"
    echo 0 >"$tracing/options/overwrite"
    echo 64 >"$tracing/buffer_size_kb"
    : >"$tracing/trace"
    echo 1 >"$entries/enable"
    echo 1 >"$tracing/tracing_on"
}

# first_entry: waits for the first entry of a processor of the guest; $entered then says when that was, in microseconds
# from its beginning.
first_entry() {
    entered=
    for _ in {1..1200}; do
        entered=$(awk '
            match($0, / [0-9]+\.[0-9]+: (tracing_mark_write: begun|kvm_entry:)/) {
                time = substr($0, RSTART, RLENGTH) + 0
                if (/tracing_mark_write/) begun = time
                else if (begun && !entered) entered = time
            }
            END { if (entered) printf "%d", (entered - begun) * 1e6 }' "$tracing/trace")
        [[ -z $entered ]] || break
        sleep 0.1
    done
    echo 0 >"$tracing/tracing_on"
    [[ -n $entered ]] || give_up "no processor entered the guest"
}

# Whether the doorbell of the guest's unit is the host's, whose rings nobody counts.
hardware=0

# rung: doorbells so far that were exits, as Ravelin says, among what is information, when it is asked.
rung() {
    local log=$share/$vmm.log before
    [[ $vmm == ravelin ]] || return 0
    ((!hardware)) || { echo 0; return; }
    before=$(grep -c 'doorbells, ' "$log" || true)
    kill -USR1 "$pid"
    for _ in {1..500}; do
        (($(grep -c 'doorbells, ' "$log" || true) > before)) && break
        sleep 0.02
    done
    (($(grep -c 'doorbells, ' "$log" || true) > before)) || give_up "it does not tell its doorbells"
    sed -n 's/.* \([0-9]*\) doorbells, \([0-9]*\) of them polled.*/\1 \2/p' "$log" | awk 'END { print $1 - $2 }'
}

# beside: processor time so far of the VMM's threads that are no processors of the guest, in hundredths of a second.
beside() {
    local task name fields sum=0
    for task in "/proc/$pid/task/"*; do
        name=$(<"$task/comm")
        [[ $name != vcpu* ]] || continue
        fields=$(<"$task/stat")
        # From the state on, which follows the name: utime and stime are the twelfth and the thirteenth.
        read -ra fields <<<"${fields##*) }"
        sum=$((sum + fields[11] + fields[12]))
    done
    echo "$sum"
}

# mapping_begins: the guest is about to map and unmap.
mapping_begins() {
    rung_before=$(rung)
    beside_before=$(beside)
    mapping_since=${EPOCHREALTIME/./}
    ((!counting)) || requests_before=$(requests)
    exits_before=$(exits)
}

# mapping_ended PREFIX THREADS GRANULE MAP UNMAP: it has, for $seconds, and says how long each took, in units of
# 100 ns. Samples of that, and of exits, of those that were no doorbells, and of requests to the host if they are counted, in
# hundredths per map and unmap; and of the processor time that went to other threads of Ravelin's than the guest's
# processors, in thousandths of the time that passed.
mapping_ended() {
    local exits requests doorbells=0 spent passed
    spent=$(($(beside) - beside_before))
    passed=$((${EPOCHREALTIME/./} - mapping_since))
    exits=$(($(exits) - exits_before))
    ((!counting)) || requests=$(($(requests) - requests_before))
    [[ $vmm != ravelin ]] || doorbells=$(($(rung) - rung_before))
    sample "$vmm" "$1map-$2-$3" "$4"
    sample "$vmm" "$1unmap-$2-$3" "$5"
    sample "$vmm" "$1pair-$2-$3" $(($4 + $5))
    sample "$vmm" "$1exits-$2-$3" "$(per "$exits" "$4" "$5" "$2")"
    ((!counting)) || sample "$vmm" "$1requests-$2-$3" "$(per "$requests" "$4" "$5" "$2")"
    [[ $vmm != ravelin ]] || sample "$vmm" "$1beside-$2-$3" $((spent * 10000 * 1000 / passed))
    [[ $vmm != ravelin ]] || sample "$vmm" "$1others-$2-$3" "$(per $((exits - doorbells)) "$4" "$5" "$2")"
}

# per COUNT MAP UNMAP THREADS: so many in hundredths per map and unmap. How often that was, from how long one takes.
per() {
    awk -v count="$1" -v each=$(($2 + $3)) -v time=$(($4 * seconds)) 'BEGIN { printf "%.0f", 100 * count * each / (time * 1e7) }'
}

# finish: no guest from here on, and no entry is watched for.
finish() {
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    exec 7<&-
    echo 0 >"$entries/enable"
    echo 1 >"$tracing/tracing_on"
}

# give_up PROBLEM: with what the guest and its VMM said last.
give_up() {
    finish
    say "$vmm: $1; the end of its console, and its errors:"
    tail -n 20 "$share/$vmm.console" "$share/$vmm.log" >&2
    exit 1
}
