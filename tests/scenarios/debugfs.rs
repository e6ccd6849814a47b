//! What the guest's kernel sees of its IOMMU, by its own debugging files, beside what the unit says of itself.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::machine::Machine;

/// Registers by offset, and what the state in the log calls each: those of a name come in this order.
const REGISTERS: [(&str, &str); 9] = [
    ("0x0018", "control"),
    ("0x2020", "status"),
    ("0x0000", "device table"),
    ("0x0008", "commands"),
    ("0x2000", "head"),
    ("0x2008", "tail"),
    ("0x0010", "events"),
    ("0x0030", "EFR"),
    ("0x01a0", "EFR2"),
];

/// Values by name, of a unit's line in the log: the first of each name.
fn state(line: &str) -> BTreeMap<&str, u64> {
    let mut values = BTreeMap::new();
    for part in line.split(&[',', ';'][..]) {
        if let Some((name, value)) = part.trim().rsplit_once(" 0x") {
            let name = name.rsplit(": ").next().unwrap_or(name);
            let value = u64::from_str_radix(value, 16).expect("a number in hexadecimal");
            values.entry(name).or_insert(value);
        }
    }
    values
}

#[test]
fn a_line_of_state_is_read_by_name_and_the_first_of_each_counts() {
    let line = "INFO unit: control 0x1d, status 0x8, device table 0x1, commands 0x2, head 0x30, tail 0x30, events 0x4, \
        head 0x40; 7 doorbells";
    let values = state(line);
    assert_eq!((values["control"], values["device table"]), (0x1d, 1));
    assert_eq!((values["head"], values["tail"], values.len()), (0x30, 0x30, 7));
}

/// After load nothing waits: the guest finds the unit's registers as the unit says they are, its command buffer empty, and
/// its devices' entries in use.
fn agree(viommu: &str) {
    let machine = Machine::new("lab").deadline(Duration::from_secs(300));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    let offsets = REGISTERS.map(|(offset, _)| offset).join(" ");
    let mut running = machine
        .arguments(["--memory", "384M", "--disk", &disk, "--viommu", viommu])
        .arguments(["--log", "info"])
        .cmdline("iommu.passthrough=0 iommu.strict=1")
        .script(&format!(
            r#"{DISK_TOOLS}
check disk_works round_trip "before a look"
debug=/sys/kernel/debug/iommu/amd
for offset in {offsets}; do
    echo "$offset" >$debug/iommu00/mmio
    say "at_$offset" "$(sed 's/.*Value://' $debug/iommu00/mmio)"
done
head -n 1 $debug/iommu00/cmdbuf | section cmdbuf
echo "$disk" >$debug/devid
section devtbl <$debug/devtbl
check no_misuse_of_dma test "$(cat /sys/kernel/debug/dma-api/error_count)" = 0
check dma_is_checked test "$(cat /sys/kernel/debug/dma-api/disabled)" = N
echo @@quiet
read -r line </dev/console
"#
        ))
        .start();
    running.wait_for("@@quiet", 1);
    running.signal("USR1");
    running.write("seen\n");
    let ended = running.end().well();

    let line = ended.log.lines().find(|line| line.contains("device table 0x"));
    let line = line.unwrap_or_else(|| panic!("the unit did not say its state\n{}", ended.log));
    let units = state(line);
    for (offset, name) in REGISTERS {
        let seen = ended.console.said(&format!("at_{offset}"));
        let seen = u64::from_str_radix(seen.trim_start_matches("0x"), 16).expect("a number");
        assert_eq!(seen, units[name], "{name} at {offset}; {line}");
    }
    assert_eq!(units["head"], units["tail"]);
    let entry = units["head"] >> 4;
    assert_eq!(
        ended.console.section("cmdbuf").trim(),
        format!("CMD Buffer Head Offset:{entry} Tail Offset:{entry}")
    );

    let table = ended.console.section("devtbl");
    let row = table.lines().nth(1).expect("the disk's entry");
    let words: Vec<u64> = row
        .split_whitespace()
        .skip(1)
        .take(4)
        .map(|word| u64::from_str_radix(word, 16).expect("a word of the entry"))
        .collect();
    // The highest first: V and TV are in the last, IV in the second.
    assert_eq!((words[3] & 3, words[1] & 1), (3, 1), "{row}");
}

#[test]
fn the_guest_and_the_unit_agree_about_its_state() {
    agree("emulated");
}

#[test]
fn the_guest_and_a_polled_unit_agree_about_its_state() {
    agree("emulated,doorbell=poll");
}
