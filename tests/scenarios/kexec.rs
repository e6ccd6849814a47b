//! A kernel that starts another: the second finds the IOMMU as the first left it.

use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::machine::{Ended, Machine, initramfs, scenario};
use crate::prerequisites::guest;
use crate::viommu::NOT_NAMED;

/// Debian's kernels alone can load another from files.
const GUEST: &str = "debian-7.3";

/// `load_kernel FLAGS WORDS`: kexec_file_load(2) of /root/kernel with /root/initramfs; `start_kernel` goes there.
const LOAD: &str = r#"#!/bin/perl
my ($flags, $words) = @ARGV;
sysopen(my $kernel, '/root/kernel', 0) or die "kernel: $!\n";
sysopen(my $initramfs, '/root/initramfs', 0) or die "initramfs: $!\n";
$words .= "\0";
syscall(320, fileno $kernel, fileno $initramfs, length $words, $words, $flags + 0) == 0 or die "kexec_file_load: $!\n";
"#;
const START: &str = r#"#!/bin/perl
syscall(169, 0xfee1dead, 0x28121969, 0x45584543, 0);
die "reboot: $!\n";
"#;

/// A guest with a disk behind a unit of `mode` that runs `first`, which starts the same kernel again, which runs `second`.
fn two_kernels(mode: &str, words: &str, first: &str, second: &str) -> Ended {
    let image = guest(GUEST);
    let second = scenario(&format!("{DISK_TOOLS}{second}"));
    let second = initramfs(&image.initramfs, [("scenario", second.as_bytes())].into_iter());
    let kernel = std::fs::read(&image.kernel).expect("the guest's kernel is readable");
    let machine = Machine::new(GUEST).deadline(Duration::from_secs(400));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    machine
        .arguments(["--memory", "1G", "--disk", &disk, "--viommu", mode])
        .cmdline(words)
        .guest_program("/usr/bin/perl")
        .guest_file("bin/load_kernel", LOAD.as_bytes())
        .guest_file("bin/start_kernel", START.as_bytes())
        .guest_file("root/kernel", &kernel)
        .guest_file("root/initramfs", &second)
        .script(&format!("{DISK_TOOLS}{first}"))
        .run()
}

/// What the seconds do: their disk works, their log is judged.
const SECOND: &str = r#"
check disk_works round_trip "under the second kernel"
section amd_vi <<EOF
$(dmesg | grep -E 'AMD-Vi')
EOF
say kernel second
"#;

/// A kernel that crashes while its disk is read, after it loaded another, for which memory is set aside.
const CRASH: &str = r#"
check disk_works round_trip "under the first kernel"
check loads load_kernel 2 "$(sed 's/crashkernel=[^ ]*//' /proc/cmdline) maxcpus=1 reset_devices"
dd if=/dev/vda of=/dev/null bs=4k &
echo c >/proc/sysrq-trigger
"#;

/// What they do where their unit remaps as well.
const REMAPS: &str =
    "check remaps_interrupts sh -c 'dmesg | grep -q \"AMD-Vi: Interrupt remapping enabled\"'\n";

#[test]
fn a_kernel_that_another_started_uses_the_iommu() {
    let first = r#"
check disk_works round_trip "under the first kernel"
check loads load_kernel 0 "$(cat /proc/cmdline)"
start_kernel
"#;
    let console = two_kernels("emulated", "", first, &format!("{REMAPS}{SECOND}"))
        .well()
        .console;
    assert_eq!(console.said("kernel"), "second");
}

/// Whether the crash kernel meets what the first left behind: its timer was set, its disk's interrupt under way.
fn is_left_over(line: &str) -> bool {
    line.contains("Spurious LAPIC timer interrupt") || line.contains("No irq handler for")
}

/// A kernel that crashes leaves the unit on, and its devices at work; the crash kernel takes over tables and rings.
#[test]
fn a_crash_kernel_takes_over_an_iommu_that_was_left_on() {
    let second = format!("{REMAPS}{SECOND}");
    let console = two_kernels("emulated", "crashkernel=320M", CRASH, &second)
        .well_but(is_left_over)
        .console;
    assert_eq!(console.said("kernel"), "second");
    let said = console.section("amd_vi");
    assert!(said.contains("Reused DEV table from previous kernel"), "{said}");
}

/// The same before a model: the host's unit goes on with the first kernel's tables and rings until the second moves them.
#[test]
fn a_crash_kernel_takes_over_a_unit_that_a_model_serves() {
    let foreseen = |line: &str| is_left_over(line) || NOT_NAMED.iter().any(|said| line.contains(said));
    let words = "crashkernel=320M intremap=off";
    let console = two_kernels("sim", words, CRASH, SECOND)
        .well_but(foreseen)
        .console;
    assert_eq!(console.said("kernel"), "second");
    let said = console.section("amd_vi");
    assert!(said.contains("Reused DEV table from previous kernel"), "{said}");
}
