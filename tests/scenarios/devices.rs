//! Disks, NICs, processors and interrupts at work, and functions handled roughly.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::machine::{Machine, REBOOT};
use crate::network::{Bridge, Echo, exchange};

fn disk_of(machine: &Machine, name: &str, mebibytes: u64) -> String {
    format!("path={}", machine.disk(name, mebibytes).display())
}

#[test]
fn what_is_written_to_a_disk_survives_a_reboot() {
    let machine = Machine::new("debian-6.12").deadline(Duration::from_secs(300));
    let disk = disk_of(&machine, "disk.img", 64);
    let ended = machine
        .arguments(["--disk", &disk])
        .script(&format!(
            r#"
# The first MiB says what the rest must be.
known=$(dd if=/dev/vda bs=64 count=1 2>/dev/null | tr -d '\0')
if [ -z "$known" ]; then
    dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=63 conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    sum=$(dd if=/dev/vda bs=1M skip=1 2>/dev/null | sha256sum | cut -c 1-64)
    printf %s "$sum" | dd of=/dev/vda bs=64 count=1 conv=notrunc,fsync 2>/dev/null
    say written "$sum"
    exit {REBOOT}
fi
say read "$(dd if=/dev/vda bs=1M skip=1 2>/dev/null | sha256sum | cut -c 1-64)"
"#
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("written"), ended.console.said("read"));
}

#[test]
fn two_guests_exchange_100_mib_over_a_bridge() {
    exchange("rvtest0", 100, &[], "");
}

#[test]
fn host_and_guest_exchange_a_file() {
    let bridge = Bridge::new("rvtest2", 1);
    bridge.address("10.9.2.1/24");
    let echo = Echo::at("10.9.2.1:5000");
    Machine::new("debian-7.3")
        .deadline(Duration::from_secs(300))
        .arguments(["--memory", "384M", "--net", &format!("tap={}", bridge.tap(0))])
        .script(
            r#"
nic=$(ls /sys/bus/virtio/drivers/virtio_net/virtio*/net | grep -v : | head -n 1)
ip addr add 10.9.2.2/24 dev "$nic"
ip link set "$nic" up
dd if=/dev/urandom of=/tmp/data bs=1M count=20 2>/dev/null
nc 10.9.2.1 5000 </tmp/data
nc 10.9.2.1 5000 </dev/null >/tmp/back
check it_came_back_whole cmp /tmp/data /tmp/back
"#,
        )
        .run()
        .well();
    assert_eq!(echo.received(), 20 << 20);
}

#[test]
fn the_clock_tells_the_hosts_time_and_its_alarm_wakes() {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970")
            .as_secs()
    };
    let before = now();
    let ended = Machine::new("lab")
        .script(
            r#"
say clock "$(cat /sys/class/rtc/rtc0/since_epoch)"
say system "$(date +%s)"
alarms() { awk '/rtc0/ { sum += $2 } END { print sum + 0 }' /proc/interrupts; }
before=$(alarms)
echo +2 >/sys/class/rtc/rtc0/wakealarm
waited=0
until [ "$(alarms)" -gt "$before" ] || [ $waited -gt 60 ]; do sleep 1; waited=$((waited + 1)); done
check alarm_came test "$(alarms)" -gt "$before"
check alarm_is_over test -z "$(cat /sys/class/rtc/rtc0/wakealarm)"
"#,
        )
        .run()
        .well();
    let after = now();
    for name in ["clock", "system"] {
        let said: u64 = ended.console.said(name).parse().expect("seconds");
        // The guest's own second may be the one before.
        assert!(
            (before - 1..=after).contains(&said),
            "{name}: {said} is not in {before}..={after}"
        );
    }
}

#[test]
fn eight_processors_all_take_device_interrupts() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(300));
    let disk = format!("{},queues=8", disk_of(&machine, "disk.img", 16));
    machine
        .arguments(["--cpus", "8", "--memory", "512M", "--disk", &disk])
        .script(
            r#"
check eight_online test "$(cat /sys/devices/system/cpu/online)" = 0-7
# A queue per processor, so that I/O from one interrupts the same.
counts() { awk -v cpu="$1" '/virtio.*req/ { sum += $(cpu + 2) } END { print sum + 0 }' /proc/interrupts; }
for cpu in 0 1 2 3 4 5 6 7; do
    before=$(counts $cpu)
    taskset $(printf %x $((1 << cpu))) dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null
    check disk_interrupts_cpu_$cpu test "$(counts $cpu)" -gt "$before"
    check timer_interrupts_cpu_$cpu test "$(awk -v cpu=$cpu '/^ *LOC:/ { print $(cpu + 2) }' /proc/interrupts)" -gt 0
done
section interrupts </proc/interrupts
"#,
        )
        .run()
        .well();
}

/// Hashes of the same random data written and read back through a disk, and how its interrupts come.
fn disk_round_trip(cmdline: &str) -> (String, String) {
    let machine = Machine::new("lab").cmdline(cmdline);
    let disk = disk_of(&machine, "disk.img", 32);
    let ended = machine
        .arguments(["--disk", &disk])
        .script(
            r#"
yes 'a pattern that the hash can be told by' | head -c 16777216 >/tmp/data
dd if=/tmp/data of=/dev/vda bs=256k conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
say hash "$(dd if=/dev/vda bs=256k count=64 2>/dev/null | sha256sum)"
section interrupts </proc/interrupts
"#,
        )
        .run()
        .well();
    (
        ended.console.said("hash").to_owned(),
        ended.console.section("interrupts"),
    )
}

#[test]
fn a_disk_works_alike_with_and_without_msi() {
    let (with, interrupts) = disk_round_trip("");
    assert!(
        interrupts
            .lines()
            .any(|l| l.contains("PCI-MSIX") && l.contains("virtio")),
        "{interrupts}"
    );
    let (without, interrupts) = disk_round_trip("pci=nomsi");
    assert!(
        interrupts
            .lines()
            .any(|l| l.contains("IO-APIC") && l.contains("virtio")),
        "{interrupts}"
    );
    assert!(!interrupts.contains("MSI"), "{interrupts}");
    assert_eq!(with, without);
}

/// Finds the disk's function, and tells whether the disk works.
pub(crate) const DISK_TOOLS: &str = r#"
disk=$(readlink -f /sys/block/vda/device/.. | sed 's|.*/||')
pattern() { yes "$1" | head -c 1048576; }
# round_trip WORD: write a pattern, read it back from the medium
round_trip() {
    pattern "$1" | dd of=/dev/vda bs=64k conv=fsync 2>/dev/null || return 1
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(dd if=/dev/vda bs=64k count=16 2>/dev/null | sha256sum)" = "$(pattern "$1" | sha256sum)" ]
}
# came_back: wait for the disk
came_back() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -e /dev/vda ] && return 0; sleep 1; done
    return 1
}
"#;

#[test]
fn a_function_survives_removal_reset_and_reprogramming() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(240));
    let disk = disk_of(&machine, "disk.img", 16);
    let script = r#"
check works_at_first round_trip first
bar() { sed -n "$1p" /sys/bus/pci/devices/$disk/resource; }
before=$(cat /sys/bus/pci/devices/$disk/resource)

echo 1 >/sys/bus/pci/devices/$disk/remove
check removed test ! -e /dev/vda
echo 1 >/sys/bus/pci/rescan
check found_again came_back
check works_after_rescan round_trip second
check keeps_its_addresses test "$(cat /sys/bus/pci/devices/$disk/resource)" = "$before"

# Unbind, reset by whatever the function offers, bind.
driver=/sys/bus/pci/drivers/virtio-pci
for method in $(cat /sys/bus/pci/devices/$disk/reset_method); do
    say reset_method $method
    echo $disk >$driver/unbind
    echo $method >/sys/bus/pci/devices/$disk/reset_method
    check reset_by_$method sh -c "echo 1 >/sys/bus/pci/devices/$disk/reset"
    echo $disk >$driver/bind
    check back_after_$method came_back
    check works_after_$method round_trip $method
done

# What is read-only stays, in whatever width it is written.
ids=$(setpci -s $disk VENDOR_ID.L) class=$(setpci -s $disk REVISION.L) header=$(setpci -s $disk HEADER_TYPE.B)
setpci -s $disk VENDOR_ID.B=ff DEVICE_ID.B=ff VENDOR_ID.W=ffff DEVICE_ID.W=ffff VENDOR_ID.L=ffffffff
setpci -s $disk REVISION.B=ff CLASS_DEVICE.W=ffff REVISION.L=ffffffff HEADER_TYPE.B=ff
check identity_is_read_only test "$(setpci -s $disk VENDOR_ID.L) $(setpci -s $disk REVISION.L) $(setpci -s $disk HEADER_TYPE.B)" = "$ids $class $header"
for at in $(seq 0 4 252); do setpci -s $disk $(printf %x $at).L >/dev/null || echo $at; done >/tmp/unread
check every_dword_reads test ! -s /tmp/unread
check config_space_is_4_kib test "$(wc -c </sys/bus/pci/devices/$disk/config)" = 4096
check works_after_all round_trip last
"#;
    machine
        .arguments(["--disk", &disk])
        .script(&format!("{DISK_TOOLS}{script}"))
        .run()
        .well();
}

#[test]
fn a_bar_that_the_guest_moves_takes_the_device_along() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(240));
    let disk = disk_of(&machine, "disk.img", 16);
    // The function's place is the default topology's: the first endpoint.
    let script = r#"
# The first memory BAR that has an address, and its size.
index=0
while read -r first last flags; do
    [ $((first)) != 0 ] && [ $((flags & 0x200)) != 0 ] && break
    index=$((index + 1))
done </sys/bus/pci/devices/$disk/resource
size=$((last - first + 1))
register=$(printf %x $((16 + 4 * index)))
say bar "$index at $first, $size bytes"
bus=${disk%:*} slot=${disk##*:}

echo $disk >/sys/bus/pci/drivers/virtio-pci/unbind
saved=$(setpci -s $disk COMMAND)
old=$(setpci -s $disk $register.L)
# Size it by hand, with decoding off.
setpci -s $disk COMMAND=0:2
setpci -s $disk $register.L=ffffffff
mask=$(setpci -s $disk $register.L)
check sizing_tells_the_size test $(( (~(0x$mask & ~15) & 0xffffffff) + 1 )) = $(( size > 0xffffffff ? 0 : size ))
setpci -s $disk $register.L=$old
setpci -s $disk COMMAND=$saved
echo $disk >/sys/bus/pci/drivers/virtio-pci/bind
check back came_back
check works_after_sizing round_trip sized

# Have the kernel itself place the function anew: removed, and found with its BARs cleared.
echo 1 >/sys/bus/pci/devices/$disk/remove
setpci -A intel-conf1 -H1 -s ${disk#*:} COMMAND=0 $register.L=0
[ $((flags & 0x100000)) = 0 ] || setpci -A intel-conf1 -H1 -s ${disk#*:} $(printf %x $((0x$register + 4))).L=0
echo 1 >/sys/bus/pci/rescan
check found_again came_back
check works_where_it_was_put round_trip moved
say now "$(sed -n "$((index + 1))p" /sys/bus/pci/devices/$disk/resource)"
"#;
    machine
        .arguments(["--disk", &disk])
        .script(&format!("{DISK_TOOLS}{script}"))
        .run()
        .well();
}

#[test]
fn the_console_carries_what_is_typed() {
    let mut running = Machine::new("lab")
        .script("echo @@listening; read -r line </dev/console; say heard \"$line\"")
        .start();
    running.wait_for("@@listening", 1);
    running.write("all the way in\n");
    let ended = running.end().well();
    assert_eq!(ended.console.said("heard"), "all the way in");
}

#[test]
fn an_entropy_source_feeds_the_guest() {
    Machine::new("lab")
        .arguments(["--rng", "rng0"])
        .script(
            r#"
check driver_is_bound test -e /dev/hwrng
dd if=/dev/hwrng of=/tmp/one bs=512 count=1 2>/dev/null
dd if=/dev/hwrng of=/tmp/two bs=512 count=1 2>/dev/null
check enough_bytes test "$(cat /tmp/one /tmp/two | wc -c)" = 1024
check no_two_alike sh -c '! cmp -s /tmp/one /tmp/two'
"#,
        )
        .run()
        .well();
}
