# shellcheck shell=bash
# Making everything at once, and saying what is there.

lab_setup() {
    local kernel=0
    while (($#)); do
        case $1 in
            --kernel) kernel=1; shift ;;
            *) usage_error "setup: unknown option '$1'; there is --kernel" ;;
        esac
    done
    ensure_for_run debian
    if ((kernel)); then
        ensure_lab_kernel
        ensure_kernel_tests
        ensure_xen
    fi
    lab_info
}

lab_guests() {
    (($# == 0)) || usage_error "guests: takes no options"
    ensure_guests
    readlink -f "$cache/guest"
}

# lab_kernel_version BZIMAGE: the release in the image's header (offset at 0x20e).
lab_kernel_version() {
    local offset
    offset=$(od -A n -t u2 -j $((0x20e)) -N 2 "$1")
    dd if="$1" bs=1 skip=$((offset + 0x200)) count=64 status=none | tr '\0' '\n' | sed -n '1s/ .*//p'
}

lab_info() {
    (($# == 0)) || usage_error "info: takes no options"
    echo "cache: $cache"
    local artefact
    for artefact in lab/root lab/kernel lab/host-debian lab/host-lab guest/debian-7.3 guest/debian-6.12 guest/lab guest/kernel-tests guest/xen; do
        describe "$artefact"
    done
    if lab_kernel_is_cached; then
        echo "ready-made lab kernel: $lab_kernel_cache/bzImage"
    else
        echo "ready-made lab kernel: none that matches at $lab_kernel_cache; --kernel lab builds it"
    fi
}

describe() {
    local at=$cache/$1 file
    if [[ ! -e $at/complete ]]; then
        printf '%-18s not made\n' "$1"
        return
    fi
    printf '%-18s %s, made %s\n' "$1" "$(du -sh "$at/" | cut -f1)" "$(date --reference="$at/complete" '+%F %R')"
    case $1 in
        lab/root)
            root=$(readlink -f "$at")
            from_root usr/bin/qemu-system-x86_64 --version | sed -n '1s/^/    /p'
            sed 's/^/    kernel /' "$at/etc/ravelin-kernels"
            ;;
        guest/kernel-tests | guest/xen) ;;
        lab/kernel) echo "    $(lab_kernel_version "$at/bzImage")" ;;
        *) echo "    $(lab_kernel_version "$at/kernel"), initramfs $(du -h --apparent-size "$at/initramfs" | cut -f1)" ;;
    esac
    if [[ -s $at/SHA256SUMS ]]; then
        while read -r sum file; do
            printf '    %.16s %s\n' "$sum" "$file"
        done <"$at/SHA256SUMS"
    fi
}
