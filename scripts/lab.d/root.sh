# shellcheck shell=bash
# The lab's root: Debian trixie with QEMU from trixie-backports.
#
# It has two uses. Its QEMU runs on this machine, whose own may be too old to
# model an AMD server (Debian 12's crashes a nested host with two CPUs); and it
# is the root file system of the host inside, exported read-only. It also holds
# Debian's kernels: one of them starts the lab host, all of them are guests.

root_suite=trixie

# In the lab host by name; everything else comes as a dependency.
root_packages=(
    acpica-tools busybox-static cpio e2fsprogs ethtool fio iperf3 iproute2 iputils-ping
    kmod libcap-ng-utils numactl pciutils procps socat strace stress-ng
    xz-utils zstd
)
root_backports=(qemu-system-x86 qemu-utils)

# Guests' names and the suites whose `linux-image-amd64` they are.
declare -A debian_guests=(
    [debian-7.3]=trixie-backports
    [debian-6.12]=trixie
)
# The lab host's own, of these.
debian_host=debian-7.3

ensure_root() {
    local recipe
    recipe=$(
        printf '%s\n' "$root_suite" "${root_packages[@]}" "${root_backports[@]}"
        printf '%s %s\n' "${!debian_guests[@]}" "${debian_guests[@]}"
        declare -f make_root fetch_kernel in_root
    )
    artefact lab/root "$recipe" "making the lab's root from Debian $root_suite packages" make_root \
        usr/bin/qemu-system-x86_64 etc/ravelin-kernels
    root=$(readlink -f "$cache/lab/root")
}

debian_mirror() {
    if [[ -n ${RAVELIN_LAB_MIRROR:-} ]]; then
        printf '%s\n' "$RAVELIN_LAB_MIRROR"
        return
    fi
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 2>/dev/null | sed -n 1p)
    if [[ -z $mirror ]]; then
        echo "apt knows no Debian mirror on this machine: run apt-get update, or name one in RAVELIN_LAB_MIRROR" >&2
        return 1
    fi
    printf '%s\n' "${mirror%/}"
}

# in_root ROOT CMD...: in a mount namespace of its own, so that nothing stays
# mounted whatever becomes of this script. Package scripts want /proc.
in_root() {
    local at=$1
    shift
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare --mount --propagation private -- sh -c '
        at=$1; shift
        mount -t proc proc "$at/proc" || echo "going on without /proc in $at"
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 HOME=/root \
            DEBIAN_FRONTEND=noninteractive ${http_proxy:+http_proxy="$http_proxy"} \
            chroot "$at" "$@"' sh "$at" "$@"
}

make_root() {
    local at=$1 mirror proxy debs=$cache/lab/debs
    set -e
    if ((EUID != 0)); then
        echo "making the lab's root needs root (debootstrap): run \`scripts/lab setup\` as root once, with the same RAVELIN_CACHE"
        return 1
    fi
    need_packages debootstrap debian-archive-keyring
    mirror=$(debian_mirror)
    eval "$(apt-config shell proxy Acquire::http::Proxy)"
    if [[ -n ${proxy:-} ]]; then export http_proxy=$proxy; fi
    mkdir -p "$debs"

    # Packages stay in $debs until the root is complete: a second attempt
    # downloads only what is still missing.
    if [[ ! -e $at/bootstrapped ]]; then
        find "$at" -mindepth 1 -delete
        debootstrap --variant=minbase --cache-dir="$debs" "$root_suite" "$at" "$mirror"
        : >"$at/bootstrapped"
    fi

    printf '%s\n' 'deb MIRROR trixie main' 'deb MIRROR trixie-backports main' |
        sed "s|MIRROR|$mirror|; s|trixie|$root_suite|" >"$at/etc/apt/sources.list"
    printf '%s\n' 'APT::Sandbox::User "root";' 'APT::Install-Recommends "false";' \
        'Acquire::Languages "none";' 'Binary::apt-get::APT::Keep-Downloaded-Packages "true";' \
        'APT::Keep-Downloaded-Packages "true";' >"$at/etc/apt/apt.conf.d/50lab"
    # The root is renamed into place when complete and made again when lost, so
    # that flushing every file to disk buys nothing.
    echo force-unsafe-io >"$at/etc/dpkg/dpkg.cfg.d/lab"
    # Nothing that a package installs is to be started on this machine.
    printf '#!/bin/sh\nexit 101\n' >"$at/usr/sbin/policy-rc.d"
    chmod +x "$at/usr/sbin/policy-rc.d"
    cp -n "$debs"/*.deb "$at/var/cache/apt/archives/" 2>/dev/null || true

    in_root "$at" apt-get update
    in_root "$at" apt-get --yes --download-only install "${root_packages[@]}"
    in_root "$at" apt-get --yes --download-only --target-release "$root_suite-backports" install "${root_backports[@]}"
    cp -n "$at"/var/cache/apt/archives/*.deb "$debs/" 2>/dev/null || true
    in_root "$at" apt-get --yes install "${root_packages[@]}"
    in_root "$at" apt-get --yes --target-release "$root_suite-backports" install "${root_backports[@]}"

    local name
    : >"$at/etc/ravelin-kernels"
    for name in "${!debian_guests[@]}"; do
        fetch_kernel "$at" "$name" "${debian_guests[$name]}"
    done

    in_root "$at" apt-get clean
    rm -rf "$at"/var/lib/apt/lists/* "$debs" "$at/bootstrapped"
    echo ravelin-lab >"$at/etc/hostname"
    mkdir -p "$at/ravelin" "$at/guest" "$at/share"
}

# fetch_kernel ROOT NAME SUITE: Debian's kernel of that suite with its modules,
# unpacked rather than installed, as nothing in here is to boot by a boot loader.
# From 7.x on, image and modules are packages of their own.
fetch_kernel() {
    local at=$1 name=$2 suite=$3 plan version packages
    plan=$(in_root "$at" apt-get --simulate --target-release "$suite" install linux-image-amd64)
    version=$(sed -n 's/^Inst linux-image-\([0-9][^ ]*\) .*/\1/p' <<<"$plan")
    if [[ -z $version ]]; then
        echo "linux-image-amd64 of $suite depends on no kernel image"
        return 1
    fi
    packages=$(sed -n "s/^Inst \(linux-[a-z]*-${version//./\\.}\) .*/\1/p" <<<"$plan")
    # shellcheck disable=SC2086 # one word per package
    in_root "$at" sh -ec '
        version=$1 suite=$2; shift 2
        cd /var/cache/apt/archives
        for package do
            apt-get download "$package/$suite"
            dpkg-deb --fsys-tarfile "$package"_*.deb |
                tar -x -C / --keep-directory-symlink --exclude=./usr/share
        done
        depmod "$version"' sh "$version" "$suite" $packages
    test -e "$at/usr/lib/modules/$version/modules.dep.bin"
    if [[ -e $at/usr/lib/modules/$version/vmlinuz ]]; then
        mv "$at/usr/lib/modules/$version/vmlinuz" "$at/boot/vmlinuz-$version"
    fi
    test -s "$at/boot/vmlinuz-$version"
    printf '%s %s\n' "$name" "$version" >>"$at/etc/ravelin-kernels"
}

# debian_version NAME: the release of a Debian guest's kernel.
debian_version() {
    sed -n "s/^$1 //p" "$root/etc/ravelin-kernels"
}

# from_root PROGRAM ARGS...: runs a program of the lab's root on this machine,
# seeing this machine's files. Its own loader and libraries make it independent
# of what is installed here, and of being root.
from_root() {
    local program=$1
    shift
    "$root/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/$program" "$@"
}
