//! Each kernel gets from the first instruction to its init and switches the machine off again.

use std::time::Duration;

use crate::machine::Machine;

/// What every kernel must find, whatever it has drivers for.
const LOOK_AROUND: &str = r#"
say release "$(uname -r)"
say clocksource "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
check two_processors test "$(nproc)" = 2
check lists_of_processors_agree test "$(cat /sys/devices/system/cpu/online)" = "$(cat /sys/devices/system/cpu/possible)"
check one_processor_object_each test "$(ls -d /sys/bus/acpi/devices/ACPI0007:* | wc -l)" = 2
check serial_port_is_a_16550A sh -c 'dmesg | grep -q "ttyS0 at I/O 0x3f8 .* 16550A"'
check no_boot_processor_errors test "$(awk '/^(ERR|MIS):/ { sum += $2 } END { print sum + 0 }' /proc/interrupts)" = 0
check ecam_is_trusted grep -q 'PCI ECAM 0000 \[bus 00-ff\]' /proc/iomem
check bus_is_express test -e /sys/bus/pci/devices/0000:00:14.0
check isa_bridge_is_where_the_ioapic_points grep -q '^0x0601' /sys/bus/pci/devices/0000:00:14.0/class
check power_button_is_fixed_hardware test -e /sys/firmware/acpi/interrupts/ff_pwr_btn
section interrupts </proc/interrupts
"#;

fn boots(guest: &'static str) {
    let ended = Machine::new(guest)
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
fn the_lab_kernel_boots_and_powers_off() {
    boots("lab");
}

#[test]
fn kernel_and_init_are_told_apart_in_the_statistics() {
    let machine = Machine::new("lab").script("exit 0");
    let stats = machine.path("stats.json");
    let folder = stats.parent().expect("a folder").to_owned();
    let copy = tempfile::NamedTempFile::new().expect("a temporary file");
    let ended = machine
        .arguments(["--stats", copy.path().to_str().expect("a plain path")])
        .run()
        .well();
    assert!(!folder.join("stats.json").exists());
    let text = std::fs::read_to_string(copy.path()).expect("statistics were written");
    let stats: serde_json::Value = serde_json::from_str(&text).expect("they are JSON");
    assert!(stats.is_object(), "{text}\n{}", ended.story());
}
