# shellcheck shell=bash
# The guests' and the lab host's initramfs: busybox, pciutils and the modules
# that can be of use there.

# For a guest on any PCI Express topology, its own IOMMUs and guests included.
guest_modules=(
    virtio_pci virtio_mmio virtio_net virtio_blk virtio_console virtio-rng
    virtio_balloon virtio_iommu virtio_scsi virtio_pmem vmw_vsock_virtio_transport
    9p 9pnet_virtio ext4 loop overlay tun bridge veth macvtap pktgen
    nvme igb igbvf e1000e e1000 ixgbevf iavf
    vfio-pci vfio_iommu_type1 iommufd pci-stub pci_endpoint_test
    pvpanic-pci pvpanic-mmio button rtc-cmos sp5100_tco i2c-piix4 lpc_ich
    pcspkr shpchp ahci kvm-amd msr cpuid dma_map_benchmark
)
host_modules=(
    virtio_pci 9pnet_virtio 9p overlay virtio_console virtio-rng
    kvm-amd tun bridge vhost_net vfio-pci vfio_iommu_type1
    virtio_net e1000e igb igbvf nvme
)

# PCI vendors a guest here can meet; the full list of names is 1.5 MB.
named_vendors='1022|1af4|1b36|8086|1b21|144d|15b3|14e4|10ec|1b73'

# guest_initramfs DIR INIT VERSION MODULES...: fills DIR/initramfs. VERSION is
# the kernel's, or `none` for one without modules.
make_initramfs() {
    local at=$1 init=$2 version=$3 tree
    shift 3
    set -e
    tree=$at/tree
    rm -rf "$tree"
    mkdir -p "$tree"/{bin,dev,proc,sys,run,tmp,root,etc,mnt,lower,upper,new,lib64,share/misc}
    ln -s bin "$tree/sbin"
    ln -s . "$tree/usr"
    install -m 0755 "$parts/$init" "$tree/init"

    install -m 0755 "$root/usr/bin/busybox" "$tree/bin/busybox"
    local applet
    for applet in $(from_root usr/bin/busybox --list); do
        [[ $applet == busybox ]] || ln -s busybox "$tree/bin/$applet"
    done
    add_program "$tree" usr/bin/lspci usr/bin/setpci
    awk -v vendors="^($named_vendors)\$" '
        /^C / { classes = 1 }
        /^[0-9a-f]/ { wanted = $1 ~ vendors }
        classes || wanted' "$root/usr/share/misc/pci.ids" >"$tree/share/misc/pci.ids"
    echo 'root::0:0:root:/root:/bin/sh' >"$tree/etc/passwd"

    if [[ $version != none ]]; then
        add_modules "$tree" "$version" "$@"
    fi

    # Same input, same bytes. The length is a multiple of 512, so that a further
    # cpio may be appended: the kernel wants its start aligned to 4.
    find "$tree" -depth -exec touch --no-dereference --date=@0 {} +
    (cd "$tree" && find . -mindepth 1 -printf '%P\0' | LC_ALL=C sort -z |
        from_root usr/bin/cpio --quiet --null --create --format=newc --owner=0:0 --reproducible) |
        from_root usr/bin/zstd --quiet -15 --check >"$at/initramfs"
    truncate --size=%512 "$at/initramfs"
    rm -rf "$tree"
}

# add_program TREE PROGRAM...: with the libraries it loads.
add_program() {
    local tree=$1 program library
    shift
    for program in "$@"; do
        install -m 0755 "$root/$program" "$tree/bin/"
        "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" --list "$root/$program" |
            sed -n 's/.* => \(.*\) (0x.*/\1/p' |
            while read -r library; do
                mkdir -p "$tree/lib/x86_64-linux-gnu"
                [[ $library == */ld-linux* ]] || install -m 0755 "$library" "$tree/lib/x86_64-linux-gnu/"
            done
    done
    install -m 0755 "$root/usr/lib64/ld-linux-x86-64.so.2" "$tree/lib64/"
}

# Modules go in unpacked: the archive is compressed as a whole, and a guest on a
# slow CPU unpacks once.
add_modules() {
    local tree=$1 version=$2 from=$root/usr/lib/modules/$2 to=$1/lib/modules/$2 module file
    shift 2
    mkdir -p "$to"
    cp "$from"/modules.{order,builtin,builtin.modinfo} "$to"
    for module in "$@"; do
        # A name this kernel has built in, or has not at all, prints no file.
        { from_root usr/sbin/modprobe --dirname="$root" --set-version="$version" --show-depends "$module" 2>/dev/null || true; } |
            sed -n "s|^insmod $root/*\(usr/\)*lib/modules/$version/\([^ ]*\).*|\2|p"
    done | sort -u | while read -r file; do
        mkdir -p "$to/$(dirname "$file")"
        case $file in
            *.xz) from_root usr/bin/xz --decompress --stdout "$from/$file" >"$to/${file%.xz}" ;;
            *.zst) from_root usr/bin/zstd --quiet --decompress --stdout "$from/$file" >"$to/${file%.zst}" ;;
            *) cp "$from/$file" "$to/$file" ;;
        esac
    done
    from_root usr/sbin/depmod --basedir="$tree" "$version"
    rm -f "$to"/modules.*.bin "$to"/modules.{symbols,devname,order,builtin,builtin.modinfo,weakdep}
}

make_guest() {
    local at=$1 kernel=$2 version=$3
    set -e
    cp "$kernel" "$at/kernel"
    make_initramfs "$at" guest-init "$version" "${guest_modules[@]}"
}

make_host_initramfs() {
    make_initramfs "$1" host-early-init "$2" "${host_modules[@]}"
}

initramfs_recipe() {
    readlink "$cache/lab/root"
    declare -f make_initramfs add_program add_modules make_guest make_host_initramfs
    printf '%s\n' "$named_vendors" "$@"
}

# ensure_guest NAME: one of Debian's kernels as a guest.
ensure_guest() {
    local name=$1 version
    version=$(debian_version "$name")
    artefact "guest/$name" "$(initramfs_recipe "$version" "${guest_modules[@]}" "$(<"$parts/guest-init")")" \
        "making the guest $name ($version)" make_guest_of_debian kernel initramfs
}

ensure_guests() {
    local name
    ensure_root
    for name in "${!debian_guests[@]}"; do
        ensure_guest "$name"
    done
    # The ready-made lab kernel costs a copy, and is a guest that boots fast.
    if lab_kernel_is_cached; then
        ensure_lab_kernel
    fi
}

make_guest_of_debian() {
    make_guest "$1" "$root/boot/vmlinuz-$version" "$version"
}

ensure_debian_host() {
    local version
    version=$(debian_version "$debian_host")
    artefact lab/host-debian "$(initramfs_recipe "$version" "${host_modules[@]}" "$(<"$parts/host-early-init")")" \
        "making the lab host's initramfs ($version)" make_debian_host kernel initramfs
}

make_debian_host() {
    cp "$root/boot/vmlinuz-$version" "$1/kernel"
    make_host_initramfs "$1" "$version"
}
