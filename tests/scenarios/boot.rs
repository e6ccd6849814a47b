//! Each kernel gets from the first instruction to its init and switches the machine off again.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::machine::Machine;

/// What every kernel must find, whatever it has drivers for.
const LOOK_AROUND: &str = r#"
say release "$(uname -r)"
say clocksource "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
check two_processors test "$(nproc)" = 2
check lists_of_processors_agree test "$(cat /sys/devices/system/cpu/online)" = "$(cat /sys/devices/system/cpu/possible)"
check one_processor_object_each test "$(ls -d /sys/bus/acpi/devices/ACPI0007:* | wc -l)" = 2
check serial_port_is_a_16550A sh -c 'dmesg | grep -q "ttyS0 .*I/O.0x3f8 .* 16550A"'
check no_boot_processor_errors test "$(awk '/^(ERR|MIS):/ { sum += $2 } END { print sum + 0 }' /proc/interrupts)" = 0
check ecam_is_trusted grep -q 'PCI ECAM 0000 \[bus 00-' /proc/iomem
check bus_is_express test -e /sys/bus/pci/devices/0000:00:14.0
check isa_bridge_is_where_the_ioapic_points grep -q '^0x0601' /sys/bus/pci/devices/0000:00:14.0/class
check power_button_is_fixed_hardware test -e /sys/firmware/acpi/interrupts/ff_pwr_btn
section interrupts </proc/interrupts
"#;

fn boots(guest: &'static str) {
    boots_as(Machine::new(guest));
}

fn boots_as(machine: Machine) {
    let ended = machine
        .arguments(["--cpus", "2"])
        .script(LOOK_AROUND)
        .deadline(Duration::from_secs(240))
        .run()
        .well();
    let clock = ended.console.said("clocksource");
    assert!(
        ["kvm-clock", "tsc"].contains(&clock),
        "the guest keeps time by {clock}"
    );
    let interrupts = ended.console.section("interrupts");
    let serial = interrupts.lines().find(|line| line.contains("ttyS0"));
    assert!(
        serial.is_some_and(|line| line.contains("IO-APIC")),
        "the serial port's interrupt:\n{interrupts}"
    );
}

#[test]
fn debian_7_3_boots_unmodified_and_powers_off() {
    boots("debian-7.3");
}

#[test]
fn debian_6_12_boots_unmodified_and_powers_off() {
    boots("debian-6.12");
}

#[test]
fn an_elf_kernel_boots_by_pvh() {
    boots_as(Machine::new("debian-7.3").elf("pvh"));
}

#[test]
fn an_elf_kernel_boots_by_linux_own_protocol() {
    boots_as(Machine::new("debian-6.12").elf("linux"));
}

#[test]
fn the_lab_kernel_boots_and_powers_off() {
    boots("lab");
}

#[test]
fn a_boot_leaves_its_milestones_and_exits_in_the_statistics() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let path = file.path().to_str().expect("a plain path");
    let ended = Machine::new("lab")
        .arguments(["--stats", path])
        .script("exit 0")
        .run()
        .well();
    let text = fs::read_to_string(path).expect("statistics were written");
    let stats: Value = serde_json::from_str(&text).expect("they are JSON");
    let milestones = ["first_vcpu_entry", "kernel_start", "init", "end"].map(|name| {
        let at = stats["milestones_ms"][name].as_f64();
        at.unwrap_or_else(|| panic!("no {name} in {text}"))
    });
    assert!(milestones.is_sorted() && milestones[0] > 0.0, "{milestones:?}");
    // A count that no boot should come near: the bench says how few they are. The script's sections add a
    // port write per byte of output.
    let output = u64::try_from(ended.console.text().len()).expect("small");
    let exits = stats["exits"]["total"].as_u64().expect("a count");
    assert!(
        exits < 20_000 + 2 * output,
        "{exits} exits for {output} bytes of output: {text}"
    );
    let beyond = stats["memory"]["peak_without_guest_ram"].as_u64().expect("bytes");
    assert!(beyond < 64 << 20, "{beyond} bytes beyond guest RAM: {text}");
}
