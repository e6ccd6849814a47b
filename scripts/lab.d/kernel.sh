# shellcheck shell=bash
# The lab kernel: Debian's kernel source with iommufd, which Debian's own builds
# leave out, and everything built in. It starts the lab host where iommufd is
# needed and is a fast guest besides.

lab_kernel_source=linux-source-7.3
lab_kernel_packages=(bc bison flex gcc libc6-dev libelf-dev libssl-dev make python3-minimal rsync xz-utils)

# A ready one, if this machine has it: building takes a quarter of an hour.
lab_kernel_cache=${RAVELIN_LAB_CACHE:-$project/../shared/lab}

ensure_lab_kernel() {
    artefact lab/kernel \
        "$(printf '%s\n' "$lab_kernel_source" "$(<"$parts/kernel.config")" && declare -f build_lab_kernel)" \
        "making the lab kernel ($(lab_kernel_origin))" make_lab_kernel bzImage
    artefact lab/host-lab "$(initramfs_recipe "$(readlink "$cache/lab/kernel")" "$(<"$parts/host-early-init")")" \
        "making the lab host's initramfs (lab kernel)" make_lab_host kernel initramfs
    artefact guest/lab "$(initramfs_recipe "$(readlink "$cache/lab/kernel")" "$(<"$parts/guest-init")")" \
        "making the guest lab (lab kernel)" make_guest_of_lab kernel initramfs
}

lab_kernel_is_cached() {
    [[ -s $lab_kernel_cache/bzImage && -s $lab_kernel_cache/bzImage.sha256 ]] || return 1
    # One built from another configuration is not the one asked for.
    [[ ! -e $lab_kernel_cache/kernel.config ]] || cmp -s "$lab_kernel_cache/kernel.config" "$parts/kernel.config"
}

lab_kernel_origin() {
    if lab_kernel_is_cached; then
        echo "copy of $lab_kernel_cache/bzImage"
    else
        echo "build from $lab_kernel_source"
    fi
}

make_lab_kernel() {
    local at=$1 sum
    set -e
    if lab_kernel_is_cached; then
        cp "$lab_kernel_cache/bzImage" "$at/bzImage"
        read -r sum _ <"$lab_kernel_cache/bzImage.sha256"
        if sha256sum --check --status <<<"$sum  $at/bzImage"; then
            return
        fi
        echo "$lab_kernel_cache/bzImage does not have the checksum in bzImage.sha256: building instead"
        rm -f "$at/bzImage"
    fi
    build_lab_kernel "$at"
}

# Built in a copy of the lab's root, with the compiler of that Debian release:
# this machine may have another or none. What is done is kept until the end, so
# an interrupted build goes on where it was.
build_lab_kernel() {
    local at=$1 build=$1/build
    set -e
    if ((EUID != 0)); then
        echo "building the lab kernel needs root (chroot): run \`scripts/lab setup --kernel\` as root once, with the same RAVELIN_CACHE"
        return 1
    fi
    if [[ ! -e $build/root-copied ]]; then
        rm -rf "$build"
        cp -a --reflink=auto "$root" "$build"
        : >"$build/root-copied"
    fi
    if [[ ! -e $build/packages-installed ]]; then
        in_root "$build" apt-get update
        in_root "$build" apt-get --yes install "${lab_kernel_packages[@]}"
        in_root "$build" apt-get --yes --target-release "$root_suite-backports" install "$lab_kernel_source"
        : >"$build/packages-installed"
    fi
    if [[ ! -e $build/source-unpacked ]]; then
        rm -rf "$build/linux"
        mkdir "$build/linux"
        # In there, where xz is for certain.
        in_root "$build" tar -xf "/usr/src/$lab_kernel_source.tar.xz" -C /linux --strip-components=1
        : >"$build/source-unpacked"
    fi
    cp "$parts/kernel.config" "$build/linux/lab.config"
    # A fixed date and name make two builds of one source the same.
    in_root "$build" sh -ec '
        cd /linux
        export KBUILD_BUILD_TIMESTAMP="1970-01-01" KBUILD_BUILD_USER=lab KBUILD_BUILD_HOST=lab
        make x86_64_defconfig kvm_guest.config
        scripts/kconfig/merge_config.sh -m .config lab.config
        make olddefconfig
        nice make -j"$(nproc)" bzImage'
    check_lab_config "$build/linux/.config"
    cp "$build/linux/arch/x86/boot/bzImage" "$at/bzImage"
    rm -rf --one-file-system "$build"
}

# An option that Kconfig dropped for a missing dependency shows up here rather
# than as a lab without iommufd.
check_lab_config() {
    local option missing=0
    while read -r option; do
        if ! grep -qxF "$option" "$1"; then
            echo "the kernel's configuration has no $option"
            missing=1
        fi
    done < <(grep -E '^CONFIG_(KVM|VFIO|IOMMUFD|AMD_IOMMU|INTEL_IOMMU|VIRTIO|9P|NET_9P|OVERLAY|TUN|BRIDGE|HIST)[A-Z0-9_]*=y' "$parts/kernel.config")
    return "$missing"
}

make_lab_host() {
    cp "$cache/lab/kernel/bzImage" "$1/kernel"
    make_host_initramfs "$1" none
}

make_guest_of_lab() {
    make_guest "$1" "$cache/lab/kernel/bzImage" none
}
