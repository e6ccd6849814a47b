//! Guests behind a unit that a model of the hardware serves: Linux finds what it finds in front of real hardware.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::machine::Machine;
use crate::network::exchange;
use crate::viommu::{self, LOOK_AROUND, NOT_NAMED, WORK, one_unit, with_a_disk_on_the_last};
use crate::{console::Console, devices::DISK_TOOLS};

/// A unit that serves guests remaps no interrupts of theirs. Told so, Linux does not look for what is missing then.
const WORDS: &str = "intremap=off";

/// What a machine told at its end.
struct Told(Value);

impl Told {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("statistics were written");
        Self(serde_json::from_str(&text).expect("they are JSON"))
    }

    /// A count, by its place.
    fn count(&self, at: &str) -> u64 {
        let value = self.0.pointer(at).and_then(Value::as_u64);
        value.unwrap_or_else(|| panic!("no count at {at} in {}", self.0))
    }

    /// What the first unit asked of its host.
    fn asked(&self, what: &str) -> u64 {
        self.count(&format!("/viommus/0/host/{what}"))
    }
}

/// Boot `machine`, work behind its units, and return what the console and the statistics said.
fn works(machine: Machine) -> (Console, Told) {
    runs(machine, &format!("{DISK_TOOLS}{LOOK_AROUND}{WORK}"))
}

/// Boot `machine`, run `script`, and return what the console and the statistics said.
fn runs(machine: Machine, script: &str) -> (Console, Told) {
    let stats = machine.path("stats.json");
    let ended = machine
        .arguments([OsStr::new("--stats"), stats.as_os_str()])
        .script(script)
        .run();
    let foreseen = |line: &str| NOT_NAMED.iter().any(|said| line.contains(said));
    // The folder goes with what is returned.
    let told = Told::read(&stats);
    (ended.well_but(foreseen).console, told)
}

/// An unmodified guest uses v2 tables, which the model walks, and its rings, which the model works on.
fn is_found_and_used(guest: &'static str, words: &str) -> Told {
    let (console, told) = works(one_unit(guest, "sim").cmdline(words));
    let log = console.section("amd_vi");
    assert_eq!(console.said("units"), "1", "{log}");
    assert!(log.contains("V2 page table enabled"), "{log}");
    assert!(
        console.section("interrupts").contains("PCI-MSIX"),
        "interrupts as they come"
    );
    // Two functions that work, at least.
    assert!(told.asked("nested") >= 2, "{}", told.0);
    assert_eq!(told.asked("refusals"), 0, "{}", told.0);
    assert!(
        told.count("/viommus/0/commands/completion_wait") > 10,
        "{}",
        told.0
    );
    assert!(told.count("/viommus/0/hits") > 0, "{}", told.0);
    assert!(
        told.count("/viommus/0/commands/invalidate_iommu_pages") > 0,
        "{}",
        told.0
    );
    told
}

/// Entries of the device table are written 16 bytes at a time, an instruction that KVM leaves to Ravelin.
#[test]
fn debian_7_3_uses_a_unit_that_a_model_serves() {
    let told = is_found_and_used("debian-7.3", "");
    assert!(told.count("/watched_pages/compare_exchanges") > 0, "{}", told.0);
    // Reads and writes of the device table are not to cost more than a boot's share.
    assert!(told.count("/watched_pages/stores") < 1000, "{}", told.0);
}

/// A kernel that does not know that there are no v1 tables (HATDis) has to be told, and writes entries 8 bytes at a time.
#[test]
fn debian_6_12_uses_a_unit_that_a_model_serves_when_told_which_tables() {
    let told = is_found_and_used("debian-6.12", "amd_iommu=pgtbl_v2");
    assert!(told.asked("stores") > 0, "{}", told.0);
}

#[test]
fn the_lab_kernel_uses_a_unit_that_a_model_serves() {
    let told = is_found_and_used("lab", "");
    assert!(told.count("/watched_pages/compare_exchanges") > 0, "{}", told.0);
}

#[test]
fn strict_and_lazy_invalidation_work_alike_before_a_model() {
    for (strict, said) in [("1", "strict mode"), ("0", "lazy mode")] {
        let words = format!("{WORDS} iommu.passthrough=0 iommu.strict={strict}");
        let (console, _) = works(one_unit("lab", "sim").cmdline(&words));
        assert!(
            console.section("amd_vi").contains(said),
            "{}",
            console.section("amd_vi")
        );
    }
}

/// A root complex of one bus behind a unit of `mode`. Linux flushes what each unit may have kept of every function up to
/// the last of the segment, one command at a time, where no unit offers more.
fn root(at: usize, segment: usize, bus: usize, mode: &str) -> String {
    format!(
        "[[root-complex]]\nid = \"rc{at}\"\nsegment = {segment}\nbus = \"{bus:#04x}-{bus:#04x}\"\n[[viommu]]\nmode = \
         \"{mode}\"\non = \"rc{at}\"\n"
    )
}

/// As it starts, Linux flushes what the unit may have of each function number, about six commands each, and rings for each
/// of them.
#[test]
fn a_boot_before_a_model_whose_doorbell_is_polled_costs_few_exits() {
    let exits = |viommu| {
        let (_, told) = runs(one_unit("lab", viommu).cmdline(WORDS), "say up yes\n");
        let devices = told.0["exits"]["by_device"].as_array().expect("a list").clone();
        let unit = devices
            .iter()
            .find(|device| device["name"] == told.0["viommus"][0]["name"]);
        let writes = unit.and_then(|unit| unit["writes"].as_u64()).expect("a count");
        let rung = told.count("/viommus/0/doorbells");
        (writes, rung, told.count("/viommus/0/polled"))
    };
    let (writes, rung, polled) = exits("sim");
    assert!(
        rung > 600 && polled == 0,
        "{rung} doorbells, {polled} of them polled"
    );
    assert!(writes >= rung, "{writes} registers written, {rung} doorbells");
    let (few, rung, polled) = exits("sim,doorbell=poll");
    assert!(
        few < writes / 2,
        "{few} registers written, {writes} without; {polled} of {rung} doorbells polled"
    );
}

/// Each in a segment of its own, so that each has a device table of its own.
#[test]
fn eight_units_that_models_serve() {
    let roots: Vec<_> = (0..8).map(|at| root(at, at, 0, "sim")).collect();
    let (console, told) = works(with_a_disk_on_the_last("lab", &roots).cmdline(WORDS));
    assert_eq!(console.said("units"), "8");
    for unit in 0..8 {
        assert_eq!(told.count(&format!("/viommus/{unit}/host/refusals")), 0);
    }
    assert!(told.asked("nested") >= 1, "{}", told.0);
    assert!(told.count("/viommus/7/host/nested") >= 1, "{}", told.0);
}

/// Both in one segment: one device table, a page of it each.
#[test]
fn two_units_that_models_serve_share_a_device_table() {
    let roots = [root(0, 0, 0, "sim"), root(1, 0, 1, "sim")];
    let (console, told) = works(with_a_disk_on_the_last("debian-7.3", &roots));
    assert_eq!(console.said("units"), "2");
    assert!(told.asked("nested") >= 1, "{}", told.0);
    assert!(told.count("/viommus/1/host/nested") >= 1, "{}", told.0);
}

/// Some functions behind a unit that is emulated, others behind one that a model serves: the guest sees two units alike.
#[test]
fn emulated_and_served_units_share_a_guest() {
    let roots = [root(0, 0, 0, "sim"), root(1, 0, 1, "emulated")];
    let (console, told) = works(with_a_disk_on_the_last("debian-7.3", &roots));
    assert_eq!(console.said("units"), "2");
    assert!(told.asked("nested") >= 1, "{}", told.0);
    assert!(told.0.pointer("/viommus/1/host").is_none(), "{}", told.0);
    assert!(told.count("/viommus/1/hits") > 0, "{}", told.0);
}

/// The hybrid machine, whose file says what it stands for: three NICs before two models, and a disk before neither.
#[test]
fn the_hybrid_guest_of_the_machine_file_works() {
    let machine = Machine::new("debian-7.3").deadline(Duration::from_secs(300));
    machine.disk("disk.img", 16);
    let machine = machine
        .file(include_str!("../../configs/talk.toml"))
        .arguments(["--rng", "rng0"])
        .cmdline(WORDS);
    let (console, told) = works(machine);
    assert_eq!(console.said("units"), "3");
    for function in ["01:00.0", "02:00.0", "04:00.0", "05:01.0"] {
        let domain = console.said(&format!("domain_0000:{function}"));
        assert!(domain.starts_with("DMA"), "{function}: {domain}");
    }
    assert!(told.asked("nested") >= 2, "{}", told.0);
    assert!(told.count("/viommus/1/host/nested") >= 1, "{}", told.0);
    assert!(told.count("/viommus/2/hits") > 0, "{}", told.0);
}

#[test]
fn network_traffic_before_a_model_arrives_whole() {
    exchange("rvtest2", 25, &["--viommu", "sim"], WORDS);
}

#[test]
fn a_guest_reboots_with_a_served_unit_left_on() {
    viommu::reboots("sim", WORDS);
}

#[test]
fn devices_before_a_model_are_unbound_and_bound_while_they_work() {
    viommu::unbinds_and_binds("sim", WORDS);
}

/// The model writes the fault into the guest's own event log, by the guest's own device number; of guest tables, as flag 0
/// says.
#[test]
fn what_a_hostile_driver_aims_at_is_out_of_reach_of_the_model() {
    viommu::stops_a_hostile_driver("sim", WORDS, "0x0021");
}

/// Beside the model's own doorbell, which hardware has no exit for, mapping and unmapping cost none.
#[test]
fn mapping_costs_no_exit_before_a_model() {
    viommu::maps_and_unmaps_by_doorbells_alone("sim", WORDS);
}

#[test]
fn a_doorbell_that_is_polled_costs_no_exit_before_a_model() {
    viommu::maps_and_unmaps_by_few_exits("sim,doorbell=poll", WORDS);
}

#[test]
fn a_guest_reboots_with_a_polled_doorbell_before_a_model() {
    viommu::reboots("sim,doorbell=poll", WORDS);
}

/// A guest's word for the numbers behind two of its ports, and then for what the device behind one of them may reach: by
/// the entry of the number that it has now.
const RENUMBERS: &str = r#"
# renumber FUNCTION BUS: the port above FUNCTION leads to BUS from here on, and Linux finds again what is there.
renumber() {
    port=$(basename "$(dirname "$(readlink -f "/sys/bus/pci/devices/$1")")")
    echo 1 >"/sys/bus/pci/devices/$1/remove"
    setpci -s "$port" "PRIMARY_BUS.L=00$2${2}00"
    echo 1 >"/sys/bus/pci/devices/$port/remove"
    echo 1 >/sys/bus/pci/rescan
}
renumber 0000:01:00.0 05
renumber 0000:02:00.0 06
for gone in 0000:01:00.0 0000:02:00.0; do
    check "nothing_at_$gone" test ! -e /sys/bus/pci/devices/$gone
done
check is_behind_the_unit test -e /sys/bus/pci/devices/0000:06:00.0/iommu_group
say domain "$(cat /sys/bus/pci/devices/0000:06:00.0/iommu_group/type)"
check entropy_comes test "$(dd if=/dev/hwrng bs=512 count=4 2>/dev/null | wc -c)" = 2048

device=0000:05:00.0
echo $device >/sys/bus/pci/drivers/pci-endpoint-test/unbind
setpci -s $device COMMAND=6:6
bar=$(($(head -n 1 /sys/bus/pci/devices/$device/resource | cut -d ' ' -f 1)))
register() { devmem $((bar + $1)) 32 $2; }
unit=$(($(printf 0x%s "$(setpci -s 00:00.2 CAP0f+4.L)") & ~1))
table=$(($(devmem $unit 64) & ~0xfff))
# entry NUMBER WORD: the first word of the entry of that function number.
entry() { devmem $((table + 32 * $1)) 64 $2; }
# reads NAME: whether the device read memory untranslated, which changes nothing there.
reads() {
    register 0x0c 0x1000000
    register 0x10 0
    register 0x1c 256
    register 0x24 9
    register 0x04 0x8
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ $(($(devmem $((bar + 4)) 32))) = 0 ] && break
        sleep 1
    done
    say "source_refused_$1" $(($(devmem $((bar + 8)) 32) >> 7 & 1))
}
everything=0x6000000000000003 nothing=3
entry 0x100 $nothing
entry 0x500 $everything
reads by_its_own
entry 0x100 $everything
entry 0x500 $nothing
reads by_the_old_one
entry 0x500 $everything
reads again
"#;

/// What the old number's entry says concerns nobody, whatever it is; what is behind the unit goes on behind it.
#[test]
fn what_a_guest_renumbers_before_a_model_has_the_entry_of_its_new_number() {
    let port = |at: u32, device: &str| {
        format!("[[root-port]]\nid = \"rp{at}\"\non = \"rc0\"\n[[{device}]]\nport = \"rp{at}\"\n")
    };
    let machine = Machine::new("lab")
        .deadline(Duration::from_secs(300))
        .file(&format!(
            "[[root-complex]]\nid = \"rc0\"\nbus = \"0x00-0x07\"\n[[viommu]]\nmode = \"sim\"\non = \"rc0\"\n{}{}",
            port(0, "test-device"),
            port(1, "rng")
        ))
        .arguments(["--cpus", "2", "--memory", "384M"])
        .cmdline(WORDS)
        .guest_program("/usr/bin/setpci");
    let stats = machine.path("stats.json");
    let ended = machine
        .arguments([OsStr::new("--stats"), stats.as_os_str()])
        .script(RENUMBERS)
        .run();
    let told = Told::read(&stats);
    let foreseen = |line: &str| {
        let blocked = line.contains("Event logged") && line.contains("05:00.0");
        // Of windows that a port has and nothing behind it needs.
        let unused = line.contains("disabling bridge window") && line.contains("(unused)");
        blocked || unused || NOT_NAMED.iter().any(|said| line.contains(said))
    };
    let console = ended.well_but(foreseen).console;
    let domain = console.said("domain");
    assert!(domain.starts_with("DMA"), "{domain}");
    for (entry, refused) in [("by_its_own", "0"), ("by_the_old_one", "1"), ("again", "0")] {
        assert_eq!(
            console.said(&format!("source_refused_{entry}")),
            refused,
            "{entry}"
        );
    }
    assert_eq!(told.asked("refusals"), 0, "{}", told.0);
}
