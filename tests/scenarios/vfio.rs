//! The host's own NIC and disk in a guest, and on the host again afterwards.
//!
//! What they need of the host: an IOMMU, iommufd, vfio-pci, an e1000e on a network that hands out addresses, and an
//! NVMe disk whose content nobody wants; the lab has all of it. Elsewhere RAVELIN_NIC and RAVELIN_DISK name the two.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::given::{AtHost, Given, Interface};
use crate::machine::{Ended, INIT, Machine, REBOOT};

/// The exit status for a guest that was ended before it shut down.
const KILLED: i32 = 4;
/// How long one boot may take; it takes half a minute.
pub(crate) const DEADLINE: Duration = Duration::from_secs(150);
/// With two processors, for the software CPU of the lab (docs/status.md).
pub(crate) const BEHIND_AN_IOMMU: [&str; 4] = ["--cpus", "2", "--viommu", "emulated"];
/// What of the disk is written and read, in MiB.
pub(crate) const AMOUNT: usize = 16;

/// What finds the NIC in the guest and asks for an address; `packets` counts what it received.
pub(crate) const NETWORK: &str = r#"
at=$(ls -d /sys/bus/pci/drivers/e1000e/0000:* | head -n 1)
nic=$(ls "$at/net")
ip link set "$nic" up
waited=0
until [ "$(cat /sys/class/net/$nic/carrier)" = 1 ] || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
cat >/tmp/lease <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/24" dev "$interface"
echo "$ip" >/tmp/address
END
chmod +x /tmp/lease
check asks_for_an_address udhcpc -f -q -n -t 10 -i "$nic" -s /tmp/lease
say address "$(cat /tmp/address)"
check gateway_answers ping -c 10 -i 0.2 -s 1400 10.0.2.2
"#;

/// A guest called `guest` with the function behind a port; `more` are further keys.
pub(crate) fn machine(guest: &'static str, given: &Given, more: &str) -> Machine {
    Machine::new(guest).deadline(DEADLINE).arguments([
        "--root-port",
        "id=rp0",
        "--vfio-device",
        &format!("host={},port=rp0{more}", given.at),
    ])
}

#[test]
fn the_hosts_nic_gets_an_address_in_a_guest_by_msix_and_works_on_the_host_again() {
    let nic = Given::nic();
    let ended = machine("debian-7.3", &nic, ",id=nic0")
        .arguments(["--memory", "384M"])
        .script(&format!(
            r#"{NETWORK}
check interrupts_by_msix test -n "$(ls $at/msi_irqs 2>/dev/null)"
check interrupts_came test "$(awk -v nic="$nic" '$0 ~ nic {{ sum += $2 }} END {{ print sum + 0 }}' /proc/interrupts)" -gt 5
check rom_is_hidden test ! -e "$at/rom"
check no_virtual_functions test ! -e "$at/sriov_totalvfs"
lspci -vv -s "$(basename $at)" | section lspci
"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    nic.works_on_the_host();
}

/// The VFIO device node of the function at `at`.
fn node(at: &str) -> String {
    let mut names = fs::read_dir(format!("/sys/bus/pci/devices/{at}/vfio-dev")).expect("bound to vfio-pci");
    let name = names.next().expect("one").expect("readable").file_name();
    format!("/dev/vfio/devices/{}", name.to_str().expect("plain"))
}

#[test]
fn the_hosts_nic_works_by_descriptors_that_were_handed_over() {
    let nic = Given::nic();
    let wrong = machine("lab", &nic, ",fd=7")
        .arguments(["--iommufd", "fd=8"])
        .descriptor(7, "/dev/iommu")
        .descriptor(8, "/dev/iommu")
        .run()
        .with(1);
    let expected = format!("cannot use the descriptor 7 as the VFIO device of {}", nic.at);
    assert!(wrong.log.contains(&expected), "{}", wrong.log);
    let ended = machine("lab", &nic, ",fd=7")
        .arguments(["--iommufd", "fd=8"])
        .descriptor(7, &node(&nic.at))
        .descriptor(8, "/dev/iommu")
        .script(NETWORK)
        .run()
        .well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    nic.works_on_the_host();
}

#[test]
fn the_hosts_nic_works_after_its_driver_and_its_reset_and_by_wire() {
    let nic = Given::nic();
    machine("lab", &nic, "")
        .cmdline("pci=nomsi")
        .script(&format!(
            r#"{NETWORK}
check no_messages test ! -e "$at/msi_irqs"
check interrupts_came test "$(awk -v nic="$nic" '$0 ~ nic {{ sum += $2 }} END {{ print sum + 0 }}' /proc/interrupts)" -gt 5
address=$(basename $at)
ip link set "$nic" down
echo "$address" >/sys/bus/pci/drivers/e1000e/unbind
check resets sh -c "echo 1 >/sys/bus/pci/devices/$address/reset"
echo "$address" >/sys/bus/pci/drivers/e1000e/bind
{NETWORK}
"#
        ))
        .run()
        .well();
    nic.works_on_the_host();
}

/// Hash of what is at the start of a disk.
pub(crate) fn hash_of(disk: &Path) -> String {
    let script = r#"dd if="$1" bs=1M count="$2" iflag=direct status=none | sha256sum | cut -c 1-64"#;
    shell(script, &[&disk.display(), &AMOUNT])
}

/// What is at the start of a disk from now on, by its hash: nothing that was there before.
pub(crate) fn filled_anew(disk: &Path) -> String {
    let script = r#"dd if=/dev/urandom of="$1" bs=1M count="$2" oflag=direct status=none"#;
    shell(script, &[&disk.display(), &AMOUNT]);
    hash_of(disk)
}

/// What a script of the host's prints, whose `$1` and so on are `arguments`.
fn shell(script: &str, arguments: &[&dyn std::fmt::Display]) -> String {
    let output = Command::new("bash")
        .args(["-c", &format!("set -euo pipefail; {script}"), "bash"])
        .args(arguments.iter().map(ToString::to_string))
        .output()
        .expect("bash is there");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

/// What finds a disk of the host in the guest, as `$block`, and its function, as `$at`; `hash` is that of its start.
pub(crate) const DISK: &str = r#"
block=/dev/$(ls /sys/block | grep nvme | head -n 1)
at=$(readlink -f "/sys/block/${block##*/}/device/device")
check has_the_disk test -b "$block"
# hash MIB: of what it begins with
hash() {
    dd if="$block" bs=1M count="$1" iflag=direct 2>/dev/null | sha256sum | cut -c 1-64
}
"#;

#[test]
fn what_the_host_wrote_to_its_disk_the_guest_reads_and_the_other_way_round() {
    let disk = AtHost::disk();
    let by_host = filled_anew(&disk.block());
    let disk = disk.give();
    let ended = machine("debian-6.12", &disk, ",id=disk")
        .arguments(["--memory", "384M"])
        .script(&format!(
            r#"{DISK}
say read "$(hash {AMOUNT})"
dd if=/dev/urandom of=/tmp/data bs=1M count={AMOUNT} 2>/dev/null
dd if=/tmp/data of="$block" bs=1M oflag=direct conv=fsync 2>/dev/null
say wrote "$(sha256sum </tmp/data | cut -c 1-64)"
"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("read"), by_host);
    let disk = disk.back();
    assert_eq!(hash_of(&disk.block()), ended.console.said("wrote"));
}

/// Counts the boots of a machine, on its first disk: `$count`.
const COUNT_BOOTS: &str = r#"
count=$(dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\0')
count=$((${count:-0} + 1))
printf %s "$count" >/tmp/count
truncate -s 512 /tmp/count
dd if=/tmp/count of=/dev/vda bs=512 conv=fsync 2>/dev/null
"#;

#[test]
fn the_hosts_nic_behind_an_iommu_works_after_each_of_five_reboots() {
    let nic = Given::nic();
    let machine = machine("lab", &nic, "").arguments(BEHIND_AN_IOMMU);
    let count = machine.disk("count.img", 4);
    let ended = machine
        .arguments(["--disk".to_owned(), format!("path={}", count.display())])
        .script(&format!(
            r#"{NETWORK}{COUNT_BOOTS}
# As it is: the interface up, its rings in memory.
[ "$count" -gt 5 ] || exit {REBOOT}
{BEHIND}"#
        ))
        .deadline(7 * DEADLINE)
        .run()
        .well();
    assert_eq!(ended.console.said_each("address"), ["10.0.2.15"; 6]);
    nic.works_on_the_host();
}

/// What a guest says whose units shadow, and in which domain the function named by `$at` is.
pub(crate) const BEHIND: &str = r#"
say domain "$(cat "$at/iommu_group/type")"
check no_fault sh -c '! dmesg | grep -q "IO_PAGE_FAULT"'
"#;

fn works_behind_an_iommu_with(tables: &str) {
    let nic = Given::nic();
    let ended = machine("lab", &nic, ",viommu=iommu0")
        .arguments(["--cpus", "2"])
        .arguments(["--viommu", &format!("emulated,page-table={tables}")])
        .script(&format!("{NETWORK}{BEHIND}"))
        .run()
        .well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    // Lazy was not asked for, and would not be had: the units keep what is not present.
    assert_eq!(ended.console.said("domain"), "DMA");
    nic.works_on_the_host();
}

#[test]
fn the_hosts_nic_works_behind_an_iommu_of_the_guest_with_v1_tables() {
    works_behind_an_iommu_with("v1");
}

#[test]
fn the_hosts_nic_works_behind_an_iommu_of_the_guest_with_v2_tables() {
    works_behind_an_iommu_with("v2");
}

/// Without a word about places: a root complex and an IOMMU for the host's, a port for the NIC's group.
#[test]
fn the_layout_mirrors_the_host_and_the_nic_has_a_group_of_its_own() {
    let nic = Given::nic();
    let ended = Machine::new("debian-6.12")
        .deadline(DEADLINE)
        .arguments(["--cpus", "2", "--memory", "384M"])
        .arguments(["--viommu", "auto", "--vfio-device", &nic.at])
        .script(&format!(
            r#"{NETWORK}{BEHIND}
say group "$(ls "$at/iommu_group/devices" | wc -l)"
say above "$(basename "$(dirname "$(readlink -f "$at")")")"
lspci -n -s "$(basename "$(dirname "$(readlink -f "$at")")")" | section port
"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    assert_eq!(ended.console.said("domain"), "DMA");
    assert_eq!(ended.console.said("group"), "1");
    assert!(ended.console.section("port").contains("0604"));
    nic.works_on_the_host();
}

#[test]
fn the_hosts_nic_works_behind_an_iommu_that_passes_it_through() {
    let nic = Given::nic();
    let ended = machine("lab", &nic, "")
        .arguments(BEHIND_AN_IOMMU)
        .cmdline("iommu=pt")
        .script(&format!("{NETWORK}{BEHIND}"))
        .run()
        .well();
    assert_eq!(ended.console.said("domain"), "identity");
    nic.works_on_the_host();
}

#[test]
fn the_hosts_nic_behind_an_iommu_survives_its_driver_and_its_reset() {
    let nic = Given::nic();
    machine("lab", &nic, "")
        .arguments(BEHIND_AN_IOMMU)
        .script(&format!(
            r#"{NETWORK}
address=$(basename $at)
ip link set "$nic" down
echo "$address" >/sys/bus/pci/drivers/e1000e/unbind
check resets sh -c "echo 1 >/sys/bus/pci/devices/$address/reset"
echo "$address" >/sys/bus/pci/drivers/e1000e/bind
{NETWORK}
ip link set "$nic" down
ip addr flush dev "$nic"
# Down and up again.
{NETWORK}{BEHIND}
"#
        ))
        .run()
        .well();
    nic.works_on_the_host();
}

#[test]
fn a_disk_behind_an_iommu_of_the_guest_carries_data_both_ways() {
    let disk = AtHost::disk();
    let by_host = filled_anew(&disk.block());
    let disk = disk.give();
    let ended = machine("lab", &disk, ",id=disk")
        .arguments(BEHIND_AN_IOMMU)
        .arguments(["--memory", "384M"])
        .script(&format!(
            r#"{DISK}
say read "$(hash {AMOUNT})"
check writes dd if=/dev/urandom of="$block" bs=1M count={AMOUNT} oflag=direct
say wrote "$(hash {AMOUNT})"
{BEHIND}"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("read"), by_host);
    let disk = disk.back();
    assert_eq!(hash_of(&disk.block()), ended.console.said("wrote"));
    assert_ne!(ended.console.said("wrote"), by_host);
}

#[test]
fn a_file_system_made_by_a_guest_behind_an_iommu_is_whole_on_the_host() {
    let disk = Given::disk();
    let ended = machine("debian-6.12", &disk, ",id=disk")
        .arguments(BEHIND_AN_IOMMU)
        .arguments(["--memory", "384M"])
        .guest_program("/usr/sbin/mkfs.ext4")
        .guest_program("/usr/sbin/e2fsck")
        .script(&format!(
            r#"{DISK}
check formats mkfs.ext4 -q -F "$block"
modprobe ext4
mkdir -p /tmp/disk
check mounts mount -t ext4 "$block" /tmp/disk
check writes dd if=/dev/urandom of=/tmp/disk/data bs=1M count={AMOUNT}
check copies cp -a /bin /tmp/disk/programs
say wrote "$(cat /tmp/disk/data /tmp/disk/programs/busybox | sha256sum | cut -c 1-64)"
check unmounts umount /tmp/disk
check is_whole e2fsck -f -n "$block"
{BEHIND}"#
        ))
        .run()
        .well();
    let disk = disk.back();
    let read = shell(
        r#"e2fsck -f -n "$1" >&2; at=$(mktemp -d); mount -o ro "$1" $at;
         cat $at/data $at/programs/busybox | sha256sum | cut -c 1-64; umount $at"#,
        &[&disk.block().display()],
    );
    assert_eq!(read, ended.console.said("wrote"));
}

/// Has the driver of the NIC `$nic` try it without the network, and says what it found by test.
const SELF_TEST: &str = r#"{ ethtool -t "$nic" offline || true; } | sed -n 's/^\(.*test\)  *(.*)[^0-9-]*\([0-9-]*\)$/\1=\2/p' | tr '\n' ' '"#;

/// Of what [`SELF_TEST`] said, the tests that found nothing wrong.
fn tests_passed(said: &str) -> BTreeSet<&str> {
    let tests = said.split("=0 ").filter_map(|test| test.strip_suffix(" test"));
    tests
        .map(|test| test.rsplit(' ').next().unwrap_or_default())
        .collect()
}

#[test]
fn of_a_self_test_those_count_as_passed_that_found_nothing() {
    let said = "Register test=376 Eeprom test=0 Interrupt test=4 Loopback test=0 Link test=0 ";
    assert_eq!(tests_passed(said), BTreeSet::from(["Eeprom", "Loopback", "Link"]));
    assert!(tests_passed("").is_empty());
}

#[test]
fn the_hosts_nic_passes_as_much_of_its_drivers_own_test_in_a_guest_as_on_the_host() {
    let nic = Given::nic();
    let ended = machine("lab", &nic, "")
        .arguments(BEHIND_AN_IOMMU)
        .guest_program("/usr/sbin/ethtool")
        .script(&format!(
            r#"{NETWORK}
say tested "$({SELF_TEST}; echo .)"
{BEHIND}"#
        ))
        .run()
        .well();
    let returned = nic.back();
    let interface = Interface::of(&returned.at);
    interface.up();
    let on_the_host = shell(&format!("nic=$1; {SELF_TEST}; echo ."), &[&interface.name()]);
    interface.down();
    let in_the_guest = tests_passed(ended.console.said("tested"));
    // QEMU's model has not all registers, and its loop-back passes now and then.
    let on_the_host = tests_passed(&on_the_host);
    assert!(on_the_host.contains("Eeprom"), "{on_the_host:?}");
    assert!(
        on_the_host.is_subset(&in_the_guest),
        "{on_the_host:?}, and in the guest {in_the_guest:?}"
    );
}

#[test]
fn a_guest_that_is_killed_while_it_uses_the_nic_leaves_it_to_the_host() {
    let nic = Given::nic();
    let mut running = machine("lab", &nic, "")
        .script(&format!("{NETWORK}\necho @@ready; ping 10.0.2.2 >/dev/null"))
        .start();
    running.wait_for(INIT, 1);
    running.wait_for("@@ready", 1);
    running.signal("TERM");
    running.signal("TERM");
    running.end().with(KILLED);
    nic.works_on_the_host();
}

/// A guest that uses the NIC until `gone` succeeds in it, and then runs `after`; meanwhile the host takes the NIC back.
fn taken_from_a_guest(before: &str, gone: &str, after: &str) -> Ended {
    let nic = Given::nic();
    let mut running = machine("debian-7.3", &nic, "")
        .arguments(["--cpus", "2", "--memory", "384M", "--log", "info"])
        .guest_program("/usr/bin/setpci")
        .script(&format!(
            r#"{NETWORK}
address=$(basename $at)
{before}
echo @@ready
waited=0
until {gone} || [ $waited -gt 600 ]; do sleep 0.1; waited=$((waited + 1)); done
check is_gone test $waited -le 600
{after}"#
        ))
        .start();
    running.wait_for(INIT, 1);
    running.wait_for("@@ready", 1);
    let returned = nic.taken_back();
    returned.has_a_link();
    // What the guest's drivers say of a NIC that leaves is theirs.
    let ended = running
        .end()
        .well_but(|line| line.contains("e1000e") || line.contains("pcieport"));
    assert!(
        ended.log.contains("the host has the function again"),
        "{}",
        ended.log
    );
    returned.after_its_machine().works();
    ended
}

#[test]
fn a_guest_lets_go_of_the_nic_that_the_host_wants_back() {
    let ended = taken_from_a_guest(
        "",
        r#"[ ! -e "/sys/bus/pci/devices/$address" ]"#,
        "check slot_is_off grep -q 0 /sys/bus/pci/slots/*/power",
    );
    assert!(
        ended.log.contains("the guest let go of the function"),
        "{}",
        ended.log
    );
    assert!(!ended.log.contains("WARN"), "{}", ended.log);
}

/// Nobody in the guest listens to the slot: the NIC answers all ones from one moment to the next.
#[test]
fn the_host_takes_its_nic_from_a_guest_that_cannot_be_asked() {
    let ended = taken_from_a_guest(
        r#"
for slot in /sys/bus/pci_express/drivers/pciehp/0000:*; do check unbinds sh -c "echo ${slot##*/} >${slot%/*}/unbind"; done
"#,
        r#"setpci -s "$address" 0.w | grep -q -i ffff"#,
        r#"check is_still_listed test -e "/sys/bus/pci/devices/$address""#,
    );
    assert!(
        ended.log.contains("cannot be asked to let go of it"),
        "{}",
        ended.log
    );
}

#[test]
fn a_function_that_the_host_uses_is_refused_with_the_command_that_helps() {
    let nic = AtHost::nic();
    let ended = Machine::new("lab")
        .arguments(["--vfio-device", &nic.at])
        .run()
        .with(2);
    let expected = format!(
        "the driver e1000e has it; `scripts/bind-vfio bind {}` gives it to vfio-pci",
        nic.at
    );
    assert!(ended.log.contains(&expected), "{}", ended.log);
}
