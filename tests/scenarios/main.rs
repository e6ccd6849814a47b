//! Scenarios: real guests under the real binary.
//!
//! Each boots one or more machines, runs a script in the guest and judges what came out of the console.
//! They are written once, and run where KVM can run Linux: in the lab (`scripts/test lab [FILTER]`) or on a
//! host with `kvm_amd` or `kvm_intel` (`scripts/test native [FILTER]`). Plain `cargo test` does not build
//! them: the feature `scenarios` does.
//!
//! Some need another host than the rest: `scripts/test` says which modules, and starts a lab host for each.
//!
//! The environment says what to run: `RAVELIN_BIN` is the binary and `RAVELIN_GUESTS` a folder with
//! `NAME/kernel` and `NAME/initramfs` for each guest, and `kernel-tests` with programs of the kernel's; `RAVELIN_BY_HAND`
//! is the crate's own test program. What is missing fails, it is never skipped.

mod complaints;
mod console;
mod cpio;
mod given;
mod machine;
mod network;
mod prerequisites;
mod tree;
mod vmlinux;

mod acpi;
mod backends;
mod boot;
mod by_hand;
mod card;
mod debugfs;
mod devices;
mod hardware;
mod host;
mod hostile;
mod hw;
mod hypervisor;
mod intel_host;
mod iommufd;
mod kernel_tests;
mod kexec;
mod legacy_host;
mod life;
mod multiboot;
mod nested_vfio;
mod pause;
mod peers;
mod refused;
mod sim;
mod terminal;
mod test_device;
mod together;
mod topologies;
mod vfio;
mod viommu;
mod virtual_functions;
mod wired;
