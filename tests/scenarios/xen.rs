//! Debian's Xen hypervisor: a kernel that shares no driver with Linux, started by multiboot 1 with a Linux in it.

use std::process::Command;
use std::time::Duration;

use crate::machine::{INIT, Running};
use crate::prerequisites::{binary, guest, hypervisor, kvm};

/// What Xen must say on its way: its timer is the HPET by way of the I/O APIC, it takes the PCI tree from our tables
/// and makes the first domain of our modules.
const SAID: [&str; 5] = [
    "(XEN) Xen version 4.",
    "(XEN) Bootloader: ",
    "Platform timer is 10.000MHz HPET",
    "(XEN) PCI: MCFG area at ",
    "*** Serial input to DOM0",
];

/// What it must not say.
const COMPLAINTS: [&str; 6] = [
    "Panic on CPU",
    "FATAL",
    "IO-APIC + timer doesn't work",
    "ACPI Error",
    "ACPI Warning",
    "Not using MCFG",
];

#[test]
fn xen_boots_by_multiboot_with_the_hpet_as_its_timer_and_starts_its_first_domain() {
    kvm();
    let linux = guest("debian-7.3");
    let mut command = Command::new(binary());
    command
        .args(["run", "--memory", "1G", "--board", "hpet=on", "--rng", "rng0"])
        .arg("--kernel")
        .arg(hypervisor("xen"))
        .args([
            "--cmdline",
            "console=com1 com1=115200,8n1 loglvl=info dom0_mem=512M noreboot",
        ])
        .arg("--module")
        .arg(format!(
            "path={},cmdline=\"console=hvc0 quiet\"",
            linux.kernel.display()
        ))
        .arg("--module")
        .arg(format!("path={}", linux.initramfs.display()));
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = Running::spawn(command, Duration::from_secs(300), folder);
    for text in SAID {
        running.wait_for(text, 1);
    }
    // Linux as the first domain, with the devices that Xen leaves to it.
    running.wait_for(INIT, 1);
    running.wait_for("ravelin-guest: shell", 1);
    running.signal("TERM");
    running.signal("TERM");
    let ended = running.end().with(4);
    let text = ended.console.text();
    let complaints: Vec<_> = text
        .lines()
        .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    assert!(text.contains("Virtio"), "the domain's lspci:\n{}", ended.story());
}
