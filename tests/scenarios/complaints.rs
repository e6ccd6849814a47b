//! What a guest's kernel says when something about the machine is wrong.
//!
//! One list for every scenario. Complaints about time (stalls, soft lockups, an unstable TSC) are not in it:
//! in the lab they tell how slow the software CPU is, nothing about the machine.

/// Phrases, in lower case, that make a line of the kernel's log a complaint.
const COMPLAINTS: &[&str] = &[
    // The kernel's own words for something that should not be.
    "warning:",
    "bug:",
    "oops",
    "call trace",
    "general protection",
    "unchecked msr access",
    "firmware bug",
    "firmware warn",
    "hardware error",
    "badness",
    // ACPI
    "acpi error",
    "acpi warning",
    "acpi bios error",
    "acpi bios warning",
    "acpi exception",
    "acpi: failed",
    "acpi: unable",
    "invalid checksum",
    "incorrect checksum",
    "not reserved",
    "unable to map mcfg",
    "no apic/madt",
    "duplicate apic id",
    "duplicate acpi",
    "could not derive",
    // PCI: numbers, windows and BARs
    "no compatible bridge window",
    "can't claim",
    "can't assign",
    "can't allocate",
    "failed to assign",
    "no space for",
    "address space collision",
    "address conflict",
    "conflicts with",
    "bogus",
    "invalid bar",
    "bar size",
    "unknown header type",
    "invalid class",
    "bridge configuration invalid",
    "has invalid",
    "no bus number available",
    "is hidden behind",
    "broken device",
    "non-compliant",
    "ignoring class",
    "can't find device",
    "device disabled",
    "not ready",
    "device not accessible",
    "unable to change power state",
    "d3cold",
    "pcieport: probe",
    "failed to set up",
    // Interrupts
    "nobody cared",
    "disabling",
    "no irq handler",
    "no gsi",
    "can't derive routing",
    "can't find irq",
    "unassigned irq",
    "unable to register gsi",
    "irq setup",
    "io-apic",
    "apic error",
    "apic: failed",
    "spurious",
    "msi-x initialization",
    "failed to setup irq",
    "timer not connected",
    "not responding",
    // IOMMU
    "io_page_fault",
    "illegal_dev_table_entry",
    "dev_tab_hardware_error",
    "page_tab_hardware_error",
    "illegal_command_error",
    "command_hardware_error",
    "invalid_device_request",
    "iotlb_inv_timeout",
    "invalid_ppr_request",
    "unknown event",
    "completion-wait loop timed out",
    "event log overflow",
    "ppr log overflow",
    "amd-vi: failed",
    "amd-vi: error",
    "amd-vi: unable",
    "amd-vi: disabling interrupt remapping",
    "amd-vi: no available",
    "not in ivrs table",
    "enabling irq remapping failed",
    "fallback to v1",
    // Devices
    "probe failed",
    "probe with driver",
    "failed with error",
    "i/o error",
    "blk_update_request",
    "device error",
    "is not a head",
    "out of range",
    "tx timeout",
    "transmit queue",
    "no valid",
    "not supported by",
];

/// Phrases that make a line harmless although it has one of the above, and why.
const HARMLESS: &[(&str, &str)] = &[
    (
        "io-apic-",
        "the name of an interrupt chip, in a list of interrupts",
    ),
    (
        "spurious interrupt bug",
        "a note on the vulnerability list of some processors",
    ),
    ("debug:", "the name of a debug facility"),
    (
        "vulnerab",
        "what the processor model lacks is reported as a vulnerability",
    ),
    (
        "spectre",
        "what the processor model lacks is reported as a vulnerability",
    ),
    (
        "mitigation",
        "what the processor model lacks is reported as a vulnerability",
    ),
    (
        "kernel command line",
        "the command line may name what it switches",
    ),
    (
        "disabling unused",
        "clocks and power domains that no driver took are switched off at the end of a boot",
    ),
    (
        "disabling memory control group subsystem",
        "said by a command line that asks for it",
    ),
    ("command line:", "the command line may name what it switches"),
    (
        "ignoring bogus namespace identifiers",
        "said of the lab's NVMe model by its IDs, on the host as in a guest",
    ),
];

/// The lines of a kernel's log that complain.
pub(crate) fn complaints(log: &str) -> Vec<&str> {
    log.lines()
        .filter(|line| is_complaint(&line.to_lowercase()))
        .collect()
}

fn is_complaint(line: &str) -> bool {
    COMPLAINTS.iter().any(|phrase| line.contains(phrase))
        && !HARMLESS.iter().any(|(phrase, _)| line.contains(phrase))
}

#[test]
fn each_kind_of_complaint_is_found_and_a_healthy_log_has_none() {
    let log = "\
        [    0.000000] Linux version 7.3.0\n\
        [    0.100000] ACPI BIOS Error (bug): Could not resolve symbol\n\
        [    0.200000] pci 0000:00:01.0: BAR 13 [io  size 0x1000]: can't assign; no space\n\
        [    0.300000] pci 0000:00:01.0: PCI bridge to [bus 01]\n\
        [    0.400000] irq 16: nobody cared (try booting with the \"irqpoll\" option)\n\
        [    0.500000] clk: Disabling unused clocks\n\
        [    0.600000] Kernel command line: console=ttyS0 debug:\n";
    assert_eq!(complaints(log).len(), 3);
    assert!(complaints("[    0.300000] pci 0000:00:01.0: PCI bridge to [bus 01]").is_empty());
}
