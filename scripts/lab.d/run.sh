# shellcheck shell=bash
# One run of the lab host: QEMU, the devices asked for, and a command in it.

lab_shell() {
    lab_run --tty "$@" -- bash -l
}

lab_run() {
    local host_kernel=debian iommu=amd memory=3072 cpus=2 timeout= share= append=
    local tty=0 stdin=0 console=0
    local nics=() wires=() nvmes=() environment=() command=()
    while (($#)); do
        case $1 in
            --kernel) host_kernel=$(choice "$1" "${2-}" debian lab) || exit 2; shift 2 ;;
            --iommufd) host_kernel=lab; shift ;;
            --iommu) iommu=$(choice "$1" "${2-}" amd intel none) || exit 2; shift 2 ;;
            --nic) nics+=("$(nic_model "$1" "${2-}")") || exit 2; shift 2 ;;
            --wire) wires+=("$(nic_model "$1" "${2-}")") || exit 2; shift 2 ;;
            --nvme) nvmes+=("$(matching "$1" "${2-}" '^[0-9]+[KMGT]?$' 'a size such as 64M')") || exit 2; shift 2 ;;
            --memory) memory=$(matching "$1" "${2-}" '^[1-9][0-9]*$' 'a number of MiB') || exit 2; shift 2 ;;
            --cpus) cpus=$(matching "$1" "${2-}" '^[1-9][0-9]*$' 'a number') || exit 2; shift 2 ;;
            --timeout) timeout=$(matching "$1" "${2-}" '^[1-9][0-9]*$' 'a number of seconds') || exit 2; shift 2 ;;
            --share) share=$(matching "$1" "${2-}" '.' 'a folder') || exit 2; shift 2 ;;
            --env) environment+=("$(matching "$1" "${2-}" '^[A-Za-z_][A-Za-z0-9_]*=' 'KEY=VALUE')") || exit 2; shift 2 ;;
            --append) append+=" ${2-}"; shift 2 ;;
            --stdin) stdin=1; shift ;;
            --tty) tty=1; shift ;;
            --console) console=1; shift ;;
            --) shift; command+=("$@"); break ;;
            *) usage_error "run: unknown option '$1'; see scripts/lab help (the command goes behind --)" ;;
        esac
    done
    ((${#command[@]})) || usage_error "run: no command; it goes behind --, as in: scripts/lab run -- uname -a"
    ((!tty || !stdin)) || usage_error "run: --tty and --stdin exclude each other"
    if ((tty)) && ! [[ -t 0 && -t 1 ]]; then
        usage_error "run: --tty needs a terminal on standard input and output; --stdin passes a pipe"
    fi
    if [[ -n $share ]]; then
        [[ -d $share && -w $share ]] || usage_error "run: --share $share: not a folder that can be written to"
        share=$(cd "$share" && pwd -P)
    fi

    ensure_for_run "$host_kernel"

    # From here on there is something to leave behind; end_run takes it away.
    trap end_run EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    run_folder=$(mktemp -d "${TMPDIR:-/tmp}/ravelin-lab.XXXXXX")
    mkdir "$run_folder/run"
    if [[ -z $share ]]; then
        share=$run_folder/share
        mkdir "$share"
    fi
    write_run

    local qemu=()
    qemu_arguments
    if ((timeout)); then
        sleep "$timeout" &
        run_timer=$!
    fi
    start_qemu
    wait_qemu
}

ensure_for_run() {
    ensure_guests
    if [[ $1 == lab ]]; then
        ensure_lab_kernel
    else
        ensure_debian_host
    fi
}

# choice OPTION VALUE CHOICE...
choice() {
    local option=$1 value=$2 word
    shift 2
    for word in "$@"; do
        if [[ $value == "$word" ]]; then
            echo "$value"
            return
        fi
    done
    usage_error "run: $option '$value': must be one of $*"
}

# matching OPTION VALUE PATTERN MEANING
matching() {
    if ! [[ $2 =~ $3 ]]; then
        usage_error "run: $1 '$2': must be $4"
    fi
    echo "$2"
}

# nic_model OPTION VALUE: the model, how many virtual functions each of its functions has, and how many functions it has.
nic_model() {
    case $1/$2 in
        */e1000e | */igb | */virtio-net) echo "$2:0:1" ;;
        */igb:vfs=[0-7]) echo "igb:${2#igb:vfs=}:1" ;;
        --nic/e1000e:functions=2 | --nic/igb:functions=2) echo "${2%%:*}:0:2" ;;
        --wire/*:functions=*) usage_error "run: $1 '$2': a wire has two ends; functions are for --nic" ;;
        *) usage_error "run: $1 '$2': must be e1000e, igb, igb:vfs=N (N at most 7) or virtio-net, behind --nic also e1000e:functions=2 or igb:functions=2" ;;
    esac
}

write_run() {
    local variable rows=24 columns=80 functions=() drivers= nic model virtual count
    if ((tty)); then
        read -r rows columns < <(stty size)
        ((rows)) || rows=24 columns=80
    fi
    for nic in "${nics[@]}" "${wires[@]}" ${wires[0]:+virtio-net:0:1}; do
        IFS=: read -r model virtual count <<<"$nic"
        case $model in
            igb)
                for ((; count > 0; count--)); do functions+=("$virtual"); done
                drivers+=" igb igbvf"
                ;;
            *) drivers+=" ${model//-/_}" ;;
        esac
    done
    ((${#nvmes[@]} == 0)) || drivers+=" nvme"
    {
        printf 'tty=%d stdin=%d rows=%d columns=%d term=%q\n' "$tty" "$stdin" "$rows" "$columns" "${TERM:-vt100}"
        printf 'drivers="%s" igb_functions="%s"\n' "$drivers" "${functions[*]}"
    } >"$run_folder/run/settings"
    {
        printf 'export RAVELIN_LAB=1 RAVELIN_GUESTS=/guest\n'
        for variable in "${environment[@]}"; do
            printf 'export %q\n' "$variable"
        done
        printf 'cd /share || exit 125\n'
        printf 'exec'
        printf ' %q' "${command[@]}"
        printf '\n'
    } >"$run_folder/run/command"
    install -m 0755 "$parts/host-init" "$run_folder/run/host-init"
}

# In QEMU's options a comma in a value is written twice.
escape() {
    printf '%s' "${1//,/,,}"
}

export_folder() {
    qemu+=(-virtfs "local,mount_tag=$1,path=$(escape "$2"),security_model=none,multidevs=remap,readonly=$3")
}

# Each NIC and disk gets a root port, thus an IOMMU group, of its own.
root_port() {
    ports=$((ports + 1))
    qemu+=(-device "pcie-root-port,id=rp$ports,chassis=$ports,slot=$ports")
}

# add_nic MODEL NETWORK [KIND]: a NIC behind a root port, each of its functions at that network of QEMU's, for itself. An
# address has the number of the function, the kind and the number of the port.
add_nic() {
    local model count function words type=${2%%,*}
    IFS=: read -r model _ count <<<"$1"
    root_port
    for ((function = 0; function < count; function++)); do
        words="netdev=n$ports.$function,bus=rp$ports,addr=0.$function,romfile="
        words+=",mac=52:54:00:00:$function${3:-0}:$(printf %02x "$ports")"
        if ((count > 1 && function == 0)); then
            words+=",multifunction=on"
            # Where functions are found by ARI, this one names the next.
            [[ $model != igb ]] || words+=",x-pcie-ari-nextfn-1=on"
        fi
        # What QEMU's e1000e has none of, whatever it is asked for.
        ((count == 1)) || [[ $model != igb ]] || words+=",x-pcie-flr-init=off"
        qemu+=(-netdev "$type,id=n$ports.$function,${2#*,}" -device "${model/%virtio-net/virtio-net-pci},$words")
    done
}

qemu_arguments() {
    local ports=0 hubs=0 nic nvme words
    # nohz=off: going tickless patches code while other CPUs run it; host-init says
    # what comes of that. no_timer_check: the kernel counts ticks in a stretch of
    # time of which a busy machine may give QEMU nothing, and panics without any.
    words="console=ttyS0 panic=-1 quiet loglevel=4 iommu=nopt mitigations=off dma_debug=off nohz=off no_timer_check"
    qemu=(
        # EPYC-Milan's model has XSAVE sizes that a nested guest finds wrong.
        -machine q35 -accel "tcg,thread=multi" -cpu "EPYC-Rome-v4,+svm,+npt"
        # One more than asked for: the first runs no guests (host-init says why).
        -smp "$((cpus + 1))" -m "$memory" -nodefaults -no-user-config -display none -no-reboot
        -L "$root/usr/share/qemu" -L "$root/usr/share/seabios"
        -kernel "$cache/lab/host-$host_kernel/kernel"
        -initrd "$cache/lab/host-$host_kernel/initramfs"
        -device virtio-rng-pci
    )
    case $iommu in
        amd)
            qemu+=(-device "amd-iommu,intremap=on,xtsup=on,dma-remap=on")
            # Linux turns AMD interrupt remapping off in this machine (no
            # southbridge function at the IOAPIC's device ID), and VFIO wants it.
            words+=" iommufd.allow_unsafe_interrupts=1 vfio_iommu_type1.allow_unsafe_interrupts=1"
            ;;
        intel)
            qemu+=(-device "intel-iommu,intremap=on")
            words+=" intel_iommu=on"
            ;;
        none) ;;
    esac
    export_folder root "$root" on
    export_folder run "$run_folder/run" off
    export_folder share "$share" off
    export_folder ravelin "$project" on
    export_folder guest "$(readlink -f "$cache/guest")" on

    # The host's own console is for what goes wrong before there is a command.
    qemu+=(-chardev "file,id=console,path=$(escape "$run_folder/console")" -serial chardev:console)
    # Output goes to files, which never make QEMU wait, and by a device that is
    # done with a write when the guest's store that announces it returns: what
    # the command wrote is all there when the guest powers off. Output still in a
    # queue, because the reader of a pipe was slow, would be lost then.
    qemu+=(-device "virtio-serial-pci,ioeventfd=off")
    if ((tty)); then
        qemu+=(-chardev "stdio,id=tty,signal=off" -device "virtconsole,chardev=tty")
    else
        qemu+=(-chardev "file,id=out,path=$(escape "$run_folder/stdout")" -device "virtserialport,chardev=out,name=lab.stdout"
            -chardev "file,id=err,path=$(escape "$run_folder/stderr")" -device "virtserialport,chardev=err,name=lab.stderr")
        if ((stdin)); then
            qemu+=(-chardev "stdio,id=in,signal=off" -device "virtserialport,chardev=in,name=lab.stdin")
        fi
    fi

    for nic in "${nics[@]}"; do
        # No way out of the lab: what runs here must not depend on the outside.
        # The gateway, 10.0.2.2, answers pings and hands out addresses.
        add_nic "$nic" user,restrict=on
    done
    for nic in "${wires[@]}"; do
        # Two ports of a hub that has no third.
        hubs=$((hubs + 1))
        add_nic "$nic" "hubport,hubid=$hubs" 1
        add_nic virtio-net:0:1 "hubport,hubid=$hubs" 2
    done
    for nvme in "${nvmes[@]}"; do
        root_port
        truncate --size="$nvme" "$run_folder/nvme$ports"
        qemu+=(-drive "file=$(escape "$run_folder/nvme$ports"),id=d$ports,if=none,format=raw"
            -device "nvme,drive=d$ports,serial=lab$ports,bus=rp$ports")
    done
    qemu+=(-append "$words$append")
}

start_qemu() {
    say "host kernel $host_kernel ($(host_kernel_version)), IOMMU $iommu, $cpus CPUs, $memory MiB"
    if ((tty)); then
        saved_terminal=$(stty -g)
    fi
    # QEMU makes its standard streams non-blocking for everybody who has them
    # open; a caller's pipe it must not get hold of.
    if ((tty)); then
        exec 5>&1 6<&0
    elif ((stdin)); then
        exec 5>/dev/null 6< <(exec cat)
        run_in=$!
    else
        exec 5>/dev/null 6</dev/null
    fi
    # Its own messages (each CPU feature that TCG lacks) matter when it fails.
    # It dies with this script, also when that is killed and cannot clean up.
    QEMU_MODULE_DIR=$root/usr/lib/x86_64-linux-gnu/qemu \
        setpriv --pdeathsig KILL "$root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/qemu-system-x86_64" \
        "${qemu[@]}" <&6 >&5 2>"$run_folder/qemu" &
    run_qemu=$!
    exec 5>&- 6<&-
    if ((!tty)); then
        follow stdout &
        run_out=$!
        follow stderr >&2 &
        run_err=$!
    fi
    if ((console)); then
        follow console >&2 &
        run_console=$!
    fi
}

# follow NAME: a file of the run as it grows, until QEMU is gone.
follow() {
    : >>"$run_folder/$1"
    exec tail --follow --bytes=+1 --sleep-interval=0.1 --pid="$run_qemu" "$run_folder/$1"
}

host_kernel_version() {
    if [[ $host_kernel == debian ]]; then
        debian_version "$debian_host"
    else
        lab_kernel_version "$cache/lab/host-lab/kernel"
    fi
}

wait_qemu() {
    local first= status= qemu_status=0
    if ((timeout)); then
        wait -n -p first "$run_qemu" "$run_timer" || qemu_status=$?
    else
        wait "$run_qemu" || qemu_status=$?
        first=$run_qemu
    fi
    if [[ $first != "$run_qemu" ]]; then
        run_timer=
        stop_qemu
        say "the time limit of $timeout s is over"
        exit 124
    fi
    run_qemu=
    drain_output
    if [[ -s $run_folder/run/status ]]; then
        read -r status <"$run_folder/run/status"
        exit "$status"
    fi
    # 0: the host reset itself, as by a triple fault; above 128: a signal ended QEMU.
    say "error: the lab host ended without the command's status, QEMU with $qemu_status; their last words:"
    { tail -n 30 "$run_folder/console" && grep -v "TCG doesn't support" "$run_folder/qemu"; } |
        tr -d '\r' | sed 's/^/    /' >&2
    exit 125
}

# Waits until everything that was written has been passed on.
drain_output() {
    local reader
    for reader in ${run_out:-} ${run_err:-} ${run_console:-}; do
        wait "$reader" || true
    done
}

stop_qemu() {
    if [[ -n ${run_qemu:-} ]]; then
        # On SIGTERM it leaves the terminal as it was.
        kill -TERM "$run_qemu" 2>/dev/null || true
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 "$run_qemu" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$run_qemu" 2>/dev/null || true
        wait "$run_qemu" 2>/dev/null || true
        run_qemu=
        drain_output
    fi
}

end_run() {
    trap - EXIT
    trap '' INT TERM HUP
    stop_qemu
    [[ -z ${run_in:-} ]] || kill "$run_in" 2>/dev/null || true
    [[ -z ${run_timer:-} ]] || kill "$run_timer" 2>/dev/null || true
    [[ -z ${saved_terminal:-} ]] || stty "$saved_terminal" || true
    rm -rf --one-file-system "$run_folder"
}
