//! Functions of the host that work at once in one guest: a NIC, two virtual functions of another, and a disk.
//!
//! What they need of the host is what `vfio` and `virtual_functions` need.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use crate::given::{AtHost, Given};
use crate::machine::{Ended, Machine, REBOOT};
use crate::vfio::{AMOUNT, DISK, NETWORK, filled_anew, hash_of};
use crate::virtual_functions::{Pair, TWO_NETWORKS, traffic};

/// How long a boot and the work may take; it takes a minute.
const DEADLINE: Duration = Duration::from_secs(400);

/// All four, and what is at the start of the disk, by its hash.
pub(crate) struct Four {
    nic: Given,
    pair: Pair,
    disk: Given,
    by_host: String,
}

impl Four {
    pub(crate) fn new() -> Self {
        let (nic, pair, disk) = (Given::nic(), Pair::new(), AtHost::disk());
        let by_host = filled_anew(&disk.block());
        Self {
            nic,
            pair,
            disk: disk.give(),
            by_host,
        }
    }

    /// Their addresses on the host: the NIC, both virtual functions, the disk.
    pub(crate) fn at(&self) -> [&str; 4] {
        let [first, second] = [0, 1].map(|at| self.pair.functions[at].at.as_str());
        [&self.nic.at, first, second, &self.disk.at]
    }

    /// The host has all of them again as they were, nothing of it is a guest's, and each works; the disk has what the guest
    /// `wrote`.
    fn work_on_the_host(self, wrote: &str) {
        self.nic.works_on_the_host();
        self.pair.works_on_the_host();
        assert_eq!(hash_of(&self.disk.back().block()), wrote);
    }

    /// Run `machine`, a guest with all four behind units: each works, all at once, and by a domain of its own; then `more`, a
    /// script.
    pub(crate) fn work_in(self, machine: Machine, more: &str) -> Ended {
        // Lazy is not had, whatever was asked for: the units keep what is not present.
        self.work(machine, more, "DMA 1")
    }

    /// Of each function the guest says `domain`, the kind and how many functions its group has.
    fn work(self, machine: Machine, more: &str, domain: &str) -> Ended {
        let ended = machine
            .deadline(DEADLINE)
            .guest_program("/usr/bin/setpci")
            .script(&format!("{}{more}", at_work()))
            .run()
            .well();
        let console = &ended.console;
        assert_eq!(console.said("address"), "10.0.2.15");
        assert_eq!(console.said("read"), self.by_host);
        assert_eq!(console.said_each("domain"), [domain; 4]);
        self.work_on_the_host(console.said("wrote"));
        ended
    }
}

/// The NIC gets an address, and goes on asking the gateway in a network of its own while the disk is written and read, and
/// while data goes from one virtual function to the other and back.
fn at_work() -> String {
    let traffic = traffic();
    format!(
        r#"{NETWORK}
nic_at=$at
unshare -n sleep 100000 &
own=$!
while [ "$(readlink /proc/$own/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link set "$nic" netns "$own"
alone() {{ nsenter -t "$own" -n "$@"; }}
alone ip addr add 10.0.2.15/24 dev "$nic"
alone ip link set "$nic" up
waited=0
until alone ip link show "$nic" | grep -q LOWER_UP || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
nsenter -t "$own" -n ping -i 0.5 -s 1400 10.0.2.2 >/tmp/pings &
pings=$!
{DISK}
disk_at=$at
say read "$(hash {AMOUNT})"
dd if=/dev/urandom of=/tmp/written bs=1M count={AMOUNT} 2>/dev/null
check writes dd if=/tmp/written of="$block" bs=1M oflag=direct
wrote=$(sha256sum </tmp/written | cut -c 1-64)
rm /tmp/written
say wrote "$wrote"
while [ ! -e /tmp/enough ]; do
    [ "$(hash {AMOUNT})" = "$wrote" ] || echo differs >>/tmp/differs
    echo >>/tmp/turns
done &
reads=$!
{TWO_NETWORKS}
for function in "$nic_at" "$1" "$2" "$disk_at"; do
    say domain "$(cat "$function/iommu_group/type") $(ls "$function/iommu_group/devices" | wc -l)"
    say place "$(readlink -f "$function" | sed 's|^/sys/devices/||')"
done
connect
{traffic}
touch /tmp/enough
wait "$reads"
check disk_was_read_meanwhile test "$(wc -l </tmp/turns)" -ge 1
check disk_was_read_right test ! -e /tmp/differs
kill -INT "$pings"
wait "$pings"
tail -n 3 /tmp/pings | section pings
check gateway_answered_meanwhile grep -q ' 0% packet loss' /tmp/pings
check no_fault sh -c '! dmesg | grep -q IO_PAGE_FAULT'
"#
    )
}

/// Only said which: the layout mirrors the host.
#[test]
fn a_nic_two_virtual_functions_and_a_disk_of_the_host_work_at_once_by_one_command_line() {
    let four = Four::new();
    let [nic, first, second, disk] = four.at();
    let machine = Machine::new("debian-7.3").arguments([
        "--cpus",
        "2",
        "--memory",
        "512M",
        "--viommu",
        "per-host",
        "--vfio-device",
        nic,
        "--vfio-device",
        first,
        "--vfio-device",
        second,
        "--vfio-device",
        disk,
    ]);
    four.work_in(machine, "");
}

/// Huge pages of the host, as many more as it had; as before when dropped.
struct HugePages(u64);

impl HugePages {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn more(pages: u64) -> Self {
        let before = Self::reserved();
        // Pieces that are free become one.
        fs::write("/proc/sys/vm/compact_memory", "1").expect("root");
        Self::reserve(before + pages);
        let all = Self::reserved();
        let kept = Self(all - before);
        assert_eq!(kept.0, pages, "the host has too few huge pages to spare");
        kept
    }

    fn reserved() -> u64 {
        let count = fs::read_to_string(Self::COUNT).expect("readable");
        count.trim().parse().expect("a number")
    }

    fn reserve(pages: u64) {
        fs::write(Self::COUNT, pages.to_string()).expect("root");
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        Self::reserve(Self::reserved() - self.0);
    }
}

/// The machine file that ships, with addresses of this host; it names three, and a flag adds the disk.
#[test]
fn functions_of_the_host_work_at_once_as_the_machine_file_says() {
    let _pages = HugePages::more(512);
    let four = Four::new();
    let [nic, first, second, disk] = four.at();
    let file = include_str!("../../configs/vfio.toml");
    let addresses = BTreeMap::from([
        ("0000:41:00.0", first),
        ("0000:42:00.0", second),
        ("0000:c1:00.0", nic),
    ]);
    let file = addresses.iter().fold(file.to_owned(), |file, (theirs, ours)| {
        let quoted = format!("host = \"{theirs}\"");
        assert!(file.contains(&quoted), "the file has no {quoted}");
        file.replace(&quoted, &format!("host = \"{ours}\""))
    });
    let machine = Machine::new("lab")
        .file(&file)
        .arguments(["--memory", "1G", "--vfio-device", disk]);
    four.work_in(machine, "");
}

/// What the guest's kernel has of each, from the root bus on.
const PLACES: &str = r#"
below_a_switch() { [ "$(readlink -f "$1" | tr / '\n' | grep -c ':..:')" = 4 ]; }
check nic_is_below_a_switch below_a_switch "$nic_at"
check a_virtual_function_is_integrated test "$(basename "$(dirname "$(readlink -f "$1")")")" = pci0000:00
check a_virtual_function_is_below_the_same_switch below_a_switch "$2"
check the_disk_is_on_another_root_complex sh -c "readlink -f '$disk_at' | grep -q pci0000:40/"
"#;

/// Unbound, reset and bound again, each with all that it had.
pub(crate) const AGAIN: &str = r#"
again() {
    address=$(basename "$(readlink -f "$1")")
    driver=$(readlink -f "$1/driver")
    check "lets_go_$2" sh -c "echo $address >$driver/unbind"
    check "resets_$2" sh -c "echo 1 >/sys/bus/pci/devices/$address/reset"
    check "takes_$2" sh -c "echo $address >$driver/bind"
}
first_at=$(readlink -f "$1")
second_at=$(readlink -f "$2")
disk_at=$(readlink -f "$disk_at")
again "$disk_at" the_disk
waited=0
until [ -b "$block" ] || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
check disk_has_it_still test "$(hash 16)" = "$wrote"
again "$first_at" the_first
again "$second_at" the_second
first=$(ls "$first_at/net")
second=$(ls "$second_at/net")
connect
check gateway_answers_the_first_again ping -c 5 -i 0.2 -s 1400 -I "$first" 10.0.2.2
check gateway_answers_the_second_again away ping -c 5 -i 0.2 -s 1400 10.0.2.2
check the_second_answers_the_first_again ping -c 5 -i 0.2 -s 1400 10.0.2.31
check no_fault_at_last sh -c '! dmesg | grep -q IO_PAGE_FAULT'
"#;

/// Below a switch, integrated on a root bus, on a second root complex, each behind a unit, and asked to be lazy.
#[test]
fn functions_of_the_host_work_in_every_place_behind_units_and_after_their_drivers_came_and_went() {
    let four = Four::new();
    let [nic, first, second, disk] = four.at();
    let machine = Machine::new("lab")
        .cmdline("iommu.passthrough=0 iommu.strict=0")
        .arguments(["--cpus", "2", "--memory", "512M"])
        .arguments(["--root-complex", "id=rc0,bus=0x00-0x0f"])
        .arguments(["--root-complex", "id=rc1,bus=0x40-0x4f"])
        .arguments([
            "--viommu",
            "mode=emulated,on=rc0",
            "--viommu",
            "mode=emulated,on=rc1",
        ])
        .arguments(["--root-port", "id=rp0,on=rc0", "--root-port", "id=rp1,on=rc1"])
        .arguments(["--switch", "id=sw0,on=rp0,downstream=2"])
        .arguments([
            "--vfio-device".to_owned(),
            format!("host={nic},port=sw0.0"),
            "--vfio-device".to_owned(),
            format!("host={first},port=sw0.1"),
            "--vfio-device".to_owned(),
            format!("host={second},on=rc0,slot=9.0"),
            "--vfio-device".to_owned(),
            format!("host={disk},port=rp1"),
        ]);
    four.work_in(machine, &format!("{PLACES}{AGAIN}"));
}

/// The unmodified guest by tables that processors have, too.
#[test]
fn functions_of_the_host_work_at_once_by_v2_tables_of_debian_7_3() {
    let four = Four::new();
    let [nic, first, second, disk] = four.at();
    let machine = Machine::new("debian-7.3")
        .arguments(["--cpus", "2", "--memory", "512M"])
        .arguments(["--viommu", "per-host,page-table=v2"])
        .arguments(["--vfio-device", nic, "--vfio-device", first])
        .arguments(["--vfio-device", second, "--vfio-device", disk]);
    four.work_in(
        machine,
        "check by_v2_tables sh -c 'dmesg | grep -q \"V2 page table enabled\"'\n",
    );
}

/// The guest reboots with disk and virtual function as they are: what one boot wrote the next one reads, and the gateway
/// answers in each.
#[test]
fn the_hosts_disk_and_a_virtual_function_work_behind_a_unit_after_each_of_five_reboots() {
    work_after_each_reboot(5, &["--viommu", "emulated"]);
}

/// In a guest with these arguments more, which reboots so often.
pub(crate) fn work_after_each_reboot(reboots: usize, arguments: &[&str]) {
    let (pair, disk) = (Pair::new(), AtHost::disk());
    filled_anew(&disk.block());
    let disk = disk.give();
    let [function, disk_at] = [&pair.functions[0].at, &disk.at];
    let machine = Machine::new("lab").deadline(7 * Duration::from_secs(120));
    let kept = machine.disk("kept.img", 4);
    let ended = machine
        .arguments(["--cpus", "2", "--memory", "384M"])
        .arguments(arguments)
        .arguments(["--root-port", "rp0", "--root-port", "rp1"])
        .arguments(["--vfio-device".to_owned(), format!("host={function},port=rp0")])
        .arguments(["--vfio-device".to_owned(), format!("host={disk_at},port=rp1")])
        .arguments(["--disk".to_owned(), format!("path={}", kept.display())])
        .script(&format!(
            r#"{DISK}
at=$(ls -d /sys/bus/pci/drivers/igbvf/0000:*)
nic=$(ls "$at/net")
ip addr add 10.0.2.30/24 dev "$nic"
ip link set "$nic" up
waited=0
until [ "$(cat /sys/class/net/$nic/carrier)" = 1 ] || [ $waited -gt 300 ]; do sleep 0.2; waited=$((waited + 1)); done
check gateway_answers ping -c 5 -i 0.2 -s 1400 10.0.2.2
# The boots so far, and the hash of what the last one wrote.
read -r count wrote <<END
$(dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -d '\0')
END
count=$((${{count:-0}} + 1))
say boot "$count"
[ "$count" = 1 ] || check has_what_was_written test "$(hash {AMOUNT})" = "$wrote"
if [ "$count" -le {reboots} ]; then
    dd if=/dev/urandom of="$block" bs=1M count={AMOUNT} oflag=direct 2>/dev/null
    echo "$count $(hash {AMOUNT})" >/tmp/kept
    truncate -s 512 /tmp/kept
    dd if=/tmp/kept of=/dev/vda bs=512 conv=fsync 2>/dev/null
    # As they are, and the disk at work.
    dd if="$block" of=/dev/null bs=64k iflag=direct 2>/dev/null &
    [ "$failures" != 0 ] || exit {REBOOT}
fi
say wrote "$wrote"
check no_fault sh -c '! dmesg | grep -q IO_PAGE_FAULT'
"#
        ))
        .run()
        .well();
    let boots: Vec<_> = (1..=reboots + 1).map(|boot| boot.to_string()).collect();
    assert_eq!(ended.console.said_each("boot"), boots);
    pair.works_on_the_host();
    assert_eq!(hash_of(&disk.back().block()), ended.console.said("wrote"));
}
