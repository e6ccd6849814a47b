//! Guests behind an emulated IOMMU: Linux finds it, uses all of it, and has nothing to complain about.

use std::fmt::Write as _;
use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::machine::Machine;

/// What every kernel must make of its IOMMUs, however many there are.
const LOOK_AROUND: &str = r#"
say units "$(ls /sys/class/iommu | grep -c ivhd)"
check remaps_interrupts sh -c 'dmesg | grep -q "AMD-Vi: Interrupt remapping enabled"'
check x2apic sh -c 'dmesg | grep -Eiq "x2apic( mode)? enabled"'
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
const WORK: &str = r#"
check disk_works round_trip "behind the unit"
dd if=/dev/urandom of=/tmp/random bs=1M count=4 2>/dev/null
dd if=/tmp/random of=/dev/vda bs=64k seek=32 conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
check random_data_comes_back test "$(dd if=/dev/vda bs=64k skip=32 count=64 2>/dev/null | sha256sum)" = "$(sha256sum </tmp/random)"
if [ -e /dev/hwrng ]; then
    check entropy_comes test "$(dd if=/dev/hwrng bs=512 count=1 2>/dev/null | wc -c)" = 512
fi
"#;

/// A machine with a disk, a NIC without a link and an entropy source behind one unit.
fn one_unit(guest: &'static str, viommu: &str) -> Machine {
    let machine = Machine::new(guest).deadline(Duration::from_secs(300));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    machine
        .arguments(["--cpus", "2", "--memory", "384M"])
        .arguments(["--disk", &disk, "--rng", "rng0", "--net", "backend=none"])
        .arguments(["--viommu", viommu])
}

/// Boot it, work behind the unit, and return what the console said.
fn works_behind(machine: Machine) -> crate::console::Console {
    machine
        .script(&format!("{DISK_TOOLS}{LOOK_AROUND}{WORK}"))
        .run()
        .well()
        .console
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

/// A machine with a disk on the last of `count` root complexes, each behind a unit.
fn units(guest: &'static str, count: usize) -> Machine {
    let machine = Machine::new(guest).deadline(Duration::from_secs(600));
    let disk = machine.disk("disk.img", 16);
    let mut toml = String::new();
    for at in 0..count {
        let _ = write!(
            toml,
            "[[root-complex]]\nid = \"rc{at}\"\n[[viommu]]\nmode = \"emulated\"\non = \"rc{at}\"\n"
        );
    }
    let _ = write!(
        toml,
        "[[rng]]\non = \"rc0\"\n[[disk]]\npath = \"{}\"\non = \"rc{}\"\n",
        disk.display(),
        count - 1
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
    let console = works_behind(units("lab", 16));
    assert_eq!(console.said("units"), "16");
}

/// What the unit's tables are called in the kernel's log, and the type of its domains.
fn with_words(viommu: &str, words: &str) -> crate::console::Console {
    works_behind(one_unit("lab", viommu).cmdline(words))
}

#[test]
fn an_unmodified_guest_uses_v2_tables_when_the_machine_says_so() {
    let console = with_words("emulated,page-table=v2", "");
    assert!(
        console.section("amd_vi").contains("V2 page table enabled"),
        "{}",
        console.section("amd_vi")
    );
}

#[test]
fn a_guest_may_choose_v2_tables_itself() {
    let console = with_words("emulated", "amd_iommu=pgtbl_v2");
    assert!(
        console.section("amd_vi").contains("V2 page table enabled"),
        "{}",
        console.section("amd_vi")
    );
}

#[test]
fn a_guest_may_choose_v1_tables_itself() {
    let console = with_words("emulated", "amd_iommu=pgtbl_v1");
    assert!(!console.section("amd_vi").contains("V2 page table enabled"));
}

#[test]
fn strict_and_lazy_invalidation_work_alike() {
    let strict = with_words("emulated", "iommu.passthrough=0 iommu.strict=1");
    assert!(strict.section("amd_vi").contains("strict mode"));
    let lazy = with_words("emulated", "iommu.passthrough=0 iommu.strict=0");
    assert!(lazy.section("amd_vi").contains("lazy mode"));
}

#[test]
fn a_guest_reboots_with_its_iommu_left_on() {
    let machine = one_unit("lab", "emulated");
    let script = format!(
        r#"
if [ -z "$(dd if=/dev/vda bs=8 count=1 2>/dev/null | tr -d '\0')" ]; then
    printf written! | dd of=/dev/vda bs=8 count=1 conv=notrunc,fsync 2>/dev/null
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
