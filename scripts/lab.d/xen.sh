# shellcheck shell=bash
# The Xen hypervisor of the lab root's Debian release: what multiboot is for in practice.

ensure_xen() {
    artefact guest/xen "$(printf '%s\n' "$root_suite" && declare -f make_xen)" "fetching the Xen hypervisor" make_xen xen
}

# Unpacked: boot loaders do that, and Ravelin does not. A copy of the lab's root finds the package, which keeps the root
# as it is.
make_xen() {
    local at=$1 build=$1/build
    set -e
    if ((EUID != 0)); then
        echo "fetching Xen needs root (chroot): run \`scripts/lab setup --kernel\` as root once, with the same RAVELIN_CACHE"
        return 1
    fi
    rm -rf "$build"
    cp -a --reflink=auto "$root" "$build"
    in_root "$build" apt-get update
    # shellcheck disable=SC2016 # expanded by the inner shell
    in_root "$build" sh -ec '
        package=$(apt-cache depends xen-system-amd64 | sed -n "s/.*Depends: \(xen-hypervisor-[0-9.]*-amd64\).*/\1/p")
        mkdir /xen
        cd /xen
        apt-get download "$package"
        dpkg-deb -x ./*.deb .
        gunzip --to-stdout boot/xen-*-amd64.gz >xen'
    cp "$build/xen/xen" "$at/"
    rm -rf --one-file-system "$build"
}
