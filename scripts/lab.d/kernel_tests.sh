# shellcheck shell=bash
# The kernel's own tests of VFIO and of PCI endpoints, built from the lab kernel's
# source for guests to run: programs that need no library.

kernel_tests=(
    vfio/vfio_dma_mapping_test vfio/vfio_iommufd_setup_test vfio/vfio_pci_device_test vfio/vfio_pci_driver_test
    pci_endpoint/pci_endpoint_test
)
# What of the source they are built from; drivers share some headers with the kernel.
kernel_tests_source=(
    Makefile scripts/subarch.include tools/arch tools/include tools/scripts
    tools/testing/selftests/lib.mk 'tools/testing/selftests/*.h'
    tools/testing/selftests/vfio tools/testing/selftests/pci_endpoint
    include/linux/pci_ids.h include/uapi/linux/pcitest.h 'drivers/dma/*.h' 'drivers/net/ethernet/intel/igb/*.h'
)
kernel_tests_packages=(gcc libc6-dev make uuid-dev xz-utils)

ensure_kernel_tests() {
    artefact guest/kernel-tests \
        "$(printf '%s\n' "$lab_kernel_source" "${kernel_tests[@]}" "${kernel_tests_source[@]}" &&
            declare -f make_kernel_tests)" \
        "building the kernel's tests for guests" make_kernel_tests "${kernel_tests[@]##*/}"
}

# In a copy of the lab's root, as the kernel is and for the same reason.
make_kernel_tests() {
    local at=$1 build=$1/build test
    set -e
    if ((EUID != 0)); then
        echo "building the kernel's tests needs root (chroot): run \`scripts/lab setup --kernel\` as root once, with the same RAVELIN_CACHE"
        return 1
    fi
    rm -rf "$build"
    cp -a --reflink=auto "$root" "$build"
    in_root "$build" apt-get update
    in_root "$build" apt-get --yes --no-install-recommends install "${kernel_tests_packages[@]}"
    in_root "$build" apt-get --yes --no-install-recommends --target-release "$root_suite-backports" install \
        "$lab_kernel_source" linux-libc-dev
    mkdir "$build/linux"
    in_root "$build" tar -xf "/usr/src/$lab_kernel_source.tar.xz" -C /linux --strip-components=1 --wildcards \
        "${kernel_tests_source[@]/#/$lab_kernel_source/}"
    # The kernel's headers are those of the package, of the same release.
    in_root "$build" sh -ec '
        cd /linux/tools/testing/selftests
        for part in vfio pci_endpoint; do
            make -C "$part" -j"$(nproc)" KHDR_INCLUDES=-I/usr/include EXTRA_CFLAGS=-static LDFLAGS="-static -pthread"
        done'
    for test in "${kernel_tests[@]}"; do
        cp "$build/linux/tools/testing/selftests/$test" "$at/"
    done
    rm -rf --one-file-system "$build"
}
