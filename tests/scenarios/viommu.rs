//! Guests behind an emulated IOMMU: Linux finds it, uses all of it, and has nothing to complain about.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::console::Console;
use crate::devices::DISK_TOOLS;
use crate::machine::{Ended, Machine};
use crate::network::exchange;

/// What every kernel must make of units that remap, with destinations of 32 bits.
const REMAPS: &str = r#"
check remaps_interrupts sh -c 'dmesg | grep -q "AMD-Vi: Interrupt remapping enabled"'
check x2apic sh -c 'dmesg | grep -Eiq "x2apic( mode)? enabled"'
"#;

/// What every kernel must make of its IOMMUs, however many there are.
pub(crate) const LOOK_AROUND: &str = r#"
say units "$(ls /sys/class/iommu | grep -c ivhd)"
say groups "$(ls /sys/kernel/iommu_groups | wc -l)"
section amd_vi <<EOF
$(dmesg | grep -E 'AMD-Vi|iommu|IOMMU|x2apic')
EOF
section interrupts </proc/interrupts
# Every virtio function is in a group of its own or with those it cannot be told from.
for function in /sys/bus/pci/drivers/virtio-pci/0*; do
    check "in_a_group_${function##*/}" test -e "$function/iommu_group"
    say "domain_${function##*/}" "$(cat "$function/iommu_group/type")"
done
"#;

/// Work for each kind of device, checked by hash.
pub(crate) const WORK: &str = r#"
check disk_works round_trip "behind the unit"
dd if=/dev/urandom of=/tmp/random bs=1M count=4 2>/dev/null
dd if=/tmp/random of=/dev/vda bs=64k seek=32 conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
check random_data_comes_back test "$(dd if=/dev/vda bs=64k skip=32 count=64 2>/dev/null | sha256sum)" = "$(sha256sum </tmp/random)"
if [ -e /dev/hwrng ]; then
    check entropy_comes test "$(dd if=/dev/hwrng bs=512 count=1 2>/dev/null | wc -c)" = 512
fi
"#;

/// What the kernel says where no unit remaps the IOAPIC's interrupts, and calls a bug of the firmware.
pub(crate) const NOT_NAMED: [&str; 3] = [
    "IOAPIC[0] not in IVRS table",
    "No southbridge IOAPIC found",
    "Disabling interrupt remapping",
];

/// A machine with a disk, a NIC without a link and an entropy source behind one unit.
pub(crate) fn one_unit(guest: &'static str, viommu: &str) -> Machine {
    let machine = Machine::new(guest).deadline(Duration::from_secs(300));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    machine
        .arguments(["--cpus", "2", "--memory", "384M"])
        .arguments(["--disk", &disk, "--rng", "rng0", "--net", "backend=none"])
        .arguments(["--viommu", viommu])
}

/// Boot it, work behind the unit, and return what the console said.
fn works_behind(machine: Machine) -> Console {
    works(machine, REMAPS)
}

/// The same with other expectations of its interrupts.
fn works(machine: Machine, interrupts: &str) -> Console {
    run(machine, interrupts).well().console
}

pub(crate) fn run(machine: Machine, interrupts: &str) -> Ended {
    machine
        .script(&format!("{DISK_TOOLS}{LOOK_AROUND}{interrupts}{WORK}"))
        .run()
}

fn is_found_and_used(guest: &'static str) {
    let console = works_behind(one_unit(guest, "emulated"));
    assert_eq!(console.said("units"), "1", "{}", console.section("amd_vi"));
    let groups: u32 = console.said("groups").parse().expect("a number");
    assert!(groups >= 3, "{groups} groups");
    let interrupts = console.section("interrupts");
    let remapped = |line: &str| line.contains("IR-PCI-MSIX") && line.contains("virtio");
    assert!(interrupts.lines().any(remapped), "{interrupts}");
    let serial = interrupts.lines().find(|line| line.contains("ttyS0"));
    assert!(
        serial.is_some_and(|line| line.contains("IR-IO-APIC")),
        "{interrupts}"
    );
}

#[test]
fn debian_7_3_finds_the_iommu_and_uses_it() {
    is_found_and_used("debian-7.3");
}

#[test]
fn debian_6_12_finds_the_iommu_and_uses_it() {
    is_found_and_used("debian-6.12");
}

#[test]
fn the_lab_kernel_finds_the_iommu_and_uses_it() {
    is_found_and_used("lab");
}

/// The first steps of a driver for AMD's vIOMMU hardware, from the guest's user space: the registers of guests are where
/// the capability says, and guests that nobody serves change nothing for the kernel that has the unit.
const GUESTS_REGISTERS: &str = r#"
unit=0000:00:00.2
part() { setpci -s $unit CAP09+$1.L; }
say serves "$(($(cat /sys/class/iommu/ivhd0/amd-iommu/features | cut -d: -f1 | sed 's/^/0x/') >> 55 & 1))"
check pages_answer test $((0x$(part 8) & 1)) = 1
check control_answers test $((0x$(part 10) & 1)) = 1
pages=$(((0x$(part c) << 32) | (0x$(part 8) & ~0xfff)))
control=$(((0x$(part 14) << 32) | (0x$(part 10) & ~0xfff)))
say pages "$(printf %x $pages)"
say control "$(printf %x $control)"
for guest in 1 2 65535; do
    own=$((control + guest * 64))
    page=$((pages + guest * 4096))
    check "nothing_at_first_$guest" test $(($(devmem $((own + 0x10)) 32) | $(devmem $((page + 8)) 32))) = 0
    devmem $((own + 0x10)) 32 $(((0x4000 + guest % 256) << 16))
    check "control_keeps_$guest" test $(($(devmem $((own + 0x10)) 32))) = $(((0x4000 + guest % 256) << 16))
    devmem $((page + 8)) 32 0x20
    check "page_keeps_$guest" test $(($(devmem $((page + 8)) 32))) = 32
    # A ring in memory that the guest has not: the unit is not told to serve anybody.
    devmem $((own + 0x20)) 64 0x1308
    check "no_ring_runs_$guest" test $(($(devmem $((page + 0x20)) 32) & 0x10)) = 0
done
check others_are_untouched test $(($(devmem $((pages + 0x3008)) 32))) = 0
"#;

#[test]
fn a_unit_that_serves_guests_is_used_like_any_and_its_guests_registers_are_where_it_says() {
    let machine = one_unit("lab", "mode=emulated,virtualizable=on");
    let console = works(machine, &format!("{REMAPS}{GUESTS_REGISTERS}"));
    assert_eq!(console.said("serves"), "1");
    assert_eq!(console.said("pages"), "100000000");
    assert_eq!(console.said("control"), "110000000");
}

/// A machine with a disk on the last of `count` root complexes, each behind a unit.
fn units(guest: &'static str, count: usize) -> Machine {
    let unit =
        |at| format!("[[root-complex]]\nid = \"rc{at}\"\n[[viommu]]\nmode = \"emulated\"\non = \"rc{at}\"\n");
    with_a_disk_on_the_last(guest, &(0..count).map(unit).collect::<Vec<_>>())
}

/// A machine of root complexes named rc0, rc1 and so on, of which the first has an entropy source and the last a disk.
pub(crate) fn with_a_disk_on_the_last(guest: &'static str, roots: &[String]) -> Machine {
    let machine = Machine::new(guest).deadline(Duration::from_secs(600));
    let disk = machine.disk("disk.img", 16);
    let toml = format!(
        "{}[[rng]]\non = \"rc0\"\n[[disk]]\npath = \"{}\"\non = \"rc{}\"\n",
        roots.concat(),
        disk.display(),
        roots.len() - 1
    );
    machine.file(&toml).arguments(["--cpus", "2", "--memory", "384M"])
}

#[test]
fn two_units_serve_one_guest() {
    let console = works_behind(units("debian-7.3", 2));
    assert_eq!(console.said("units"), "2");
}

#[test]
fn sixteen_units_serve_one_guest() {
    let console = works_behind(units("debian-7.3", 16));
    assert_eq!(console.said("units"), "16");
}

/// What `guest`, told `words`, says of a unit that it works behind.
fn with_words(guest: &'static str, viommu: &str, words: &str) -> Console {
    works_behind(one_unit(guest, viommu).cmdline(words))
}

#[test]
fn an_unmodified_guest_uses_v2_tables_when_the_machine_says_so() {
    let console = with_words("debian-7.3", "emulated,page-table=v2", "");
    assert!(
        console.section("amd_vi").contains("V2 page table enabled"),
        "{}",
        console.section("amd_vi")
    );
}

#[test]
fn a_guest_may_choose_v2_tables_itself() {
    let console = with_words("debian-6.12", "emulated", "amd_iommu=pgtbl_v2");
    assert!(
        console.section("amd_vi").contains("V2 page table enabled"),
        "{}",
        console.section("amd_vi")
    );
}

#[test]
fn a_guest_may_choose_v1_tables_itself() {
    let console = with_words("lab", "emulated", "amd_iommu=pgtbl_v1");
    assert!(!console.section("amd_vi").contains("V2 page table enabled"));
}

#[test]
fn strict_and_lazy_invalidation_work_alike() {
    let strict = with_words("lab", "emulated", "iommu.passthrough=0 iommu.strict=1");
    assert!(strict.section("amd_vi").contains("strict mode"));
    let lazy = with_words("lab", "emulated", "iommu.passthrough=0 iommu.strict=0");
    assert!(lazy.section("amd_vi").contains("lazy mode"));
}

#[test]
fn a_guest_reboots_with_its_iommu_left_on() {
    reboots("emulated", "");
}

/// Without a word to the unit, which is on and whose devices are busy, and work before and after it. The kernel is given
/// `words`.
pub(crate) fn reboots(viommu: &str, words: &str) {
    let machine = one_unit("lab", viommu).cmdline(words);
    let script = format!(
        r#"
if [ -z "$(dd if=/dev/vda bs=8 count=1 2>/dev/null | tr -d '\0')" ]; then
    printf written! | dd of=/dev/vda bs=8 count=1 conv=notrunc,fsync 2>/dev/null
    while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct; done 2>/dev/null &
    while :; do dd if=/dev/hwrng of=/dev/null bs=512 count=8; done 2>/dev/null &
    exit {}
fi
say after "$(dd if=/dev/vda bs=8 count=1 2>/dev/null)"
{WORK}
"#,
        crate::machine::REBOOT
    );
    let console = machine
        .script(&format!("{DISK_TOOLS}{script}"))
        .run()
        .well()
        .console;
    assert_eq!(console.said("after"), "written!");
}

#[test]
fn a_unit_without_extended_destinations_remaps_as_well() {
    let console = works(
        one_unit("debian-7.3", "emulated,xt=off"),
        r#"
check remaps_interrupts sh -c 'dmesg | grep -q "AMD-Vi: Interrupt remapping enabled"'
check no_x2apic_by_the_unit sh -c '! dmesg | grep -q "AMD-Vi: X2APIC enabled"'
"#,
    );
    assert!(console.section("interrupts").contains("IR-PCI-MSIX"));
}

#[test]
fn where_the_ioapic_is_not_named_no_interrupt_is_remapped() {
    let ended = run(
        one_unit("debian-7.3", "emulated,intremap=off"),
        r#"
check remaps_no_interrupt sh -c '! dmesg | grep -q "AMD-Vi: Interrupt remapping enabled"'
check says_why sh -c 'dmesg | grep -q "IOAPIC\[0\] not in IVRS table"'
"#,
    );
    let foreseen = |line: &str| NOT_NAMED.iter().any(|said| line.contains(said));
    let console = ended.well_but(foreseen).console;
    let interrupts = console.section("interrupts");
    assert!(
        interrupts.contains("PCI-MSIX") && !interrupts.contains("IR-"),
        "{interrupts}"
    );
}

#[test]
fn network_traffic_behind_a_unit_arrives_whole() {
    exchange("rvtest1", 25, &["--viommu", "emulated"], "");
}

/// Of 300 processors the guest starts eight, the last by their IDs, and each takes a device's interrupts.
#[test]
fn processors_with_ids_above_255_take_device_interrupts() {
    Machine::new("lab")
        .deadline(Duration::from_secs(300))
        .cmdline("maxcpus=1")
        .arguments([
            "--cpus", "300", "--memory", "1G", "--rng", "rng0", "--viommu", "emulated",
        ])
        .script(&format!(
            r#"{REMAPS}
check possible test "$(cat /sys/devices/system/cpu/possible)" = 0-299
irq=$(awk '/virtio0-input/ {{ sub(":", "", $1); print $1; exit }}' /proc/interrupts)
# Columns are those of processors that are online.
count() {{
    awk -v irq="$irq:" -v cpu="CPU$1" '
        NR == 1 {{ for (i = 1; i <= NF; i++) if ($i == cpu) at = i + 1 }}
        $1 == irq && at {{ print $at }}' /proc/interrupts
}}
for cpu in 292 293 294 295 296 297 298 299; do
    check "online_$cpu" sh -c "echo 1 >/sys/devices/system/cpu/cpu$cpu/online"
    check "apic_id_$cpu" grep -q "^apicid.*: $cpu\$" /proc/cpuinfo
    check "affinity_$cpu" sh -c "echo $cpu >/proc/irq/$irq/smp_affinity_list"
    before=$(count $cpu)
    dd if=/dev/hwrng of=/dev/null bs=512 count=8 2>/dev/null
    check "interrupts_$cpu" test "$(count $cpu)" -gt "$before"
done
"#
        ))
        .run()
        .well();
}

/// `map_benchmark SECONDS [THREADS [PAGES]]`.
const MAP_BENCHMARK: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/scripts/bench.d/map_benchmark"
));

/// What a unit did.
#[derive(Debug)]
pub(crate) struct AtWork {
    /// Invalidations of pages.
    unmapped: u64,
    /// Doorbells, and those of them that were polled.
    doorbells: u64,
    polled: u64,
    /// Registers read and written by exits.
    reads: u64,
    writes: u64,
}

/// What setting up the unit and its devices costs in exits.
const SET_UP: u64 = 300;

impl AtWork {
    /// Of the unit named `iommu0`, from the statistics at `path`.
    fn from_stats(path: &Path) -> Self {
        let text = fs::read_to_string(path).expect("statistics were written");
        let stats: Value = serde_json::from_str(&text).expect("they are JSON");
        let unit = &stats["viommus"][0];
        let devices = stats["exits"]["by_device"].as_array().expect("a list");
        let exits = devices.iter().find(|device| device["name"] == unit["name"]);
        let exits = exits.unwrap_or_else(|| panic!("no exits of the unit in {text}"));
        let number = |count: &Value| {
            count
                .as_u64()
                .unwrap_or_else(|| panic!("a count is missing in {text}"))
        };
        Self {
            unmapped: number(&unit["commands"]["invalidate_iommu_pages"]),
            doorbells: number(&unit["doorbells"]),
            polled: number(&unit["polled"]),
            reads: number(&exits["reads"]),
            writes: number(&exits["writes"]),
        }
    }
}

/// Run the kernel's own benchmark of mapping and unmapping behind `viommu`, in strict mode, on one thread and on two. The
/// kernel is given `words`.
fn maps_and_unmaps(viommu: &str, words: &str) -> AtWork {
    let machine = Machine::new("lab")
        .deadline(Duration::from_secs(300))
        .cmdline("iommu.passthrough=0 iommu.strict=1")
        .cmdline(words);
    let stats = machine.path("stats.json");
    let ended = machine
        .arguments([
            "--cpus",
            "2",
            "--viommu",
            viommu,
            "--root-port",
            "rp0",
            "--test-device",
            "port=rp0",
        ])
        .arguments([OsStr::new("--stats"), stats.as_os_str()])
        .guest_program("/usr/bin/perl")
        .guest_file("bin/map_benchmark", MAP_BENCHMARK.as_bytes())
        .script(
            r#"
device=$(basename "$(ls -d /sys/bus/pci/drivers/pci-endpoint-test/0*)")
echo "$device" >/sys/bus/pci/drivers/pci-endpoint-test/unbind
echo dma_map_benchmark >"/sys/bus/pci/devices/$device/driver_override"
check bind sh -c "echo $device >/sys/bus/pci/drivers/dma_map_benchmark/bind"
check one_thread map_benchmark 3 1
check two_threads map_benchmark 3 2
"#,
        )
        .run()
        .well();
    let work = AtWork::from_stats(&stats);
    drop(ended);
    assert!(work.unmapped > 500, "few in six seconds: {work:?}");
    assert!(work.reads < SET_UP, "{} registers read by exits", work.reads);
    work
}

/// Exits of the unit, counted: mapping costs none, unmapping in strict mode two (the command and the wait behind it), and
/// registers are read while it is set up and never again.
#[test]
fn mapping_costs_no_exit_and_unmapping_two() {
    let work = maps_and_unmaps_by_doorbells_alone("emulated", "");
    assert!(
        work.doorbells <= 2 * work.unmapped + SET_UP,
        "{} doorbells for {}",
        work.doorbells,
        work.unmapped
    );
}

/// Behind `viommu`, with `words` for the kernel, what costs exits once it is set up are doorbells.
pub(crate) fn maps_and_unmaps_by_doorbells_alone(viommu: &str, words: &str) -> AtWork {
    let work = maps_and_unmaps(viommu, words);
    assert_eq!(work.polled, 0);
    assert!(
        work.writes <= work.doorbells + SET_UP,
        "{} registers written, {} of them doorbells",
        work.writes,
        work.doorbells
    );
    work
}

/// A doorbell that is polled costs no exit. How many are is the machine's speed: the thread sleeps when none comes for
/// ten milliseconds, in which the lab's software CPU unmaps two pages or three, and comes back after a burst by exits.
#[test]
fn a_doorbell_that_is_polled_costs_no_exit() {
    maps_and_unmaps_by_few_exits("emulated,doorbell=poll", "");
}

/// Behind `viommu`, whose doorbell is polled, with `words` for the kernel.
pub(crate) fn maps_and_unmaps_by_few_exits(viommu: &str, words: &str) {
    let AtWork {
        unmapped,
        doorbells,
        polled,
        writes,
        ..
    } = maps_and_unmaps(viommu, words);
    assert!(
        writes <= doorbells - polled + SET_UP,
        "{writes} registers written, {polled} of {doorbells} doorbells polled"
    );
    assert!(
        polled > 100,
        "{polled} of {doorbells} doorbells polled, {unmapped} unmapped"
    );
}

#[test]
fn a_unit_whose_doorbell_is_polled_serves_its_guest_like_any_other() {
    let console = works_behind(one_unit("debian-7.3", "emulated,doorbell=poll"));
    assert_eq!(console.said("units"), "1");
}

#[test]
fn a_guest_reboots_with_a_polled_doorbell() {
    reboots("emulated,doorbell=poll", "");
}

/// Drivers come and go while their devices are busy, and the unit forgets and learns with them.
#[test]
fn devices_are_unbound_and_bound_while_they_work() {
    unbinds_and_binds("emulated", "");
}

/// Behind `viommu`, with `words` for the kernel.
pub(crate) fn unbinds_and_binds(viommu: &str, words: &str) {
    one_unit("lab", viommu)
        .cmdline(words)
        .script(&format!(
            r#"{DISK_TOOLS}
virtio=$(basename "$(ls -d /sys/bus/virtio/drivers/virtio_rng/virtio*)")
function=$(basename "$(dirname "$(readlink -f "/sys/bus/virtio/devices/$virtio")")")
while :; do dd if=/dev/hwrng of=/dev/null bs=512 count=1; done 2>/dev/null &
busy=$!
for turn in 1 2 3 4 5; do
    check "unbind_$turn" sh -c "echo $function >/sys/bus/pci/drivers/virtio-pci/unbind"
    check "disk_meanwhile_$turn" round_trip "turn $turn"
    check "bind_$turn" sh -c "echo $function >/sys/bus/pci/drivers/virtio-pci/bind"
done
kill $busy
check entropy_comes test "$(dd if=/dev/hwrng bs=512 count=1 2>/dev/null | wc -c)" = 512
"#
        ))
        .run()
        .well();
}

/// A driver that aims its device at what is not mapped: the access is stopped and named, and all goes on.
#[test]
fn what_a_hostile_driver_aims_at_is_out_of_reach_and_logged() {
    stops_a_hostile_driver("emulated", "", "0x0020");
}

/// Behind `viommu`, with `words` for the kernel; its log has `flags` for a write.
pub(crate) fn stops_a_hostile_driver(viommu: &str, words: &str, flags: &str) {
    let machine =
        one_unit("lab", viommu)
            .cmdline(words)
            .arguments(["--root-port", "rp0", "--test-device", "port=rp0"]);
    let ended = machine
        .guest_program("/usr/bin/setpci")
        .script(&format!(
            r#"{DISK_TOOLS}
device=$(basename "$(ls -d /sys/bus/pci/drivers/pci-endpoint-test/0*)")
say device "$device"
echo "$device" >/sys/bus/pci/drivers/pci-endpoint-test/unbind
setpci -s "$device" COMMAND=6:6
bar=$(($(head -n 1 "/sys/bus/pci/devices/$device/resource" | cut -d ' ' -f 1)))
register() {{ devmem $((bar + $1)) 32 $2; }}
# What is at the address that RAM has for a processor, and must stay.
victim=$((0x1000000))
before=$(devmem $victim 32)
for target in $victim $((0xdead0000)) $((0xfee00000)); do
    register 0x14 $target
    register 0x18 0
    register 0x1c 256
    register 0x24 9
    register 0x04 0x10
    sleep 1
    say "status_$target" "$(devmem $((bar + 8)) 32)"
done
check memory_is_as_before test "$(devmem $victim 32)" = "$before"
check disk_works round_trip "beside a hostile driver"
dmesg | grep "Event logged" >/tmp/events
section events </tmp/events
"#
        ))
        .run();
    // Its device's events and nobody else's.
    let device = ended.console.said("device").to_owned();
    let console = ended
        .well_but(|line| line.contains("Event logged") && line.contains(&device))
        .console;
    let events = console.section("events");
    for address in ["0x1000000", "0xdead0000"] {
        let wanted = |line: &str| {
            line.contains(&device)
                && line.contains("IO_PAGE_FAULT")
                && line.contains(address)
                && line.contains(flags)
        };
        assert!(events.lines().any(wanted), "no fault at {address}:\n{events}");
    }
    for target in [0x100_0000_u32, 0xdead_0000, 0xfee0_0000] {
        let status = console.said(&format!("status_{target}"));
        let status = u32::from_str_radix(status.trim_start_matches("0x"), 16).expect("a number");
        // Bit 3: the write failed; bit 8: because of the destination.
        assert_eq!(status & 0x10c, 0x108, "a write to {target:#x}");
    }
}
