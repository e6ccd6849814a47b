//! A guest that does to a function what no driver would. The machine lives, and what the guest left alone
//! works as before.

use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::machine::Machine;

#[test]
fn random_accesses_to_one_function_harm_no_other() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(300));
    let disks = ["kept.img", "victim.img"].map(|name| format!("path={}", machine.disk(name, 8).display()));
    let script = r#"
victim=$(readlink -f /sys/block/vdb/device/.. | sed 's|.*/||')
check two_disks test "$victim" != "$disk"
check works_before round_trip before
echo $victim >/sys/bus/pci/drivers/virtio-pci/unbind

# Reads and writes of every width at random places of its memory BARs: registers, doorbells, MSI-X table and
# pending bits, and what lies between and behind them. The same ones each time.
setpci -s $victim COMMAND=6:6
while read -r first last flags; do
    [ $((first)) != 0 ] && [ $((flags & 0x200)) != 0 ] || continue
    awk -v size=$((last - first + 1)) 'BEGIN {
        srand(48882)
        for (n = 0; n < 120; n++) {
            width = 2 ^ int(rand() * 4)
            at = int(rand() * size / width) * width
            printf "%d %d %s\n", at, width * 8, n % 3 ? int(rand() * (width == 1 ? 256 : 65536)) : ""
        }
    }' | while read -r at width value; do devmem $((first + at)) $width $value; done >/dev/null
done </sys/bus/pci/devices/$victim/resource
check lives_after_bar_accesses round_trip bars

# Its configuration space, all 4 KiB, with decoding on and off as the bits fall.
for _ in 1 2 3 4 5; do
    head -c 4096 /dev/urandom >/sys/bus/pci/devices/$victim/config
    for at in 0 4 6 e 10 14 18 1c 20 24 30 34 3c 40 44 48 50 60 62 70 80 98 fe; do
        setpci -s $victim $at.B=ff $at.W=ffff
    done
    for at in 0 4 8 c 10 14 18 1c 20 24 28 2c 30 34 38 3c 40 44 48 4c 50 60 70 80 90 a0 b0 c0 fc; do
        setpci -s $victim $at.L=ffffffff
    done
done
setpci -s $victim COMMAND=0:7
check lives_after_configuration_accesses round_trip config
check identity_is_what_it_was test "$(setpci -s $victim VENDOR_ID.L)" = "$(setpci -s $disk VENDOR_ID.L)"
"#;
    machine
        .arguments(["--disk", &disks[0], "--disk", &disks[1]])
        .script(&format!("{DISK_TOOLS}{script}"))
        .run()
        .well();
}

#[test]
fn ports_and_addresses_that_nobody_owns_read_all_ones_and_take_writes() {
    Machine::new("lab")
        .script(
            r#"
# One byte of the port space.
port() { dd if=/dev/port bs=1 skip=$1 count=1 2>/dev/null | hexdump -e '1/1 "%02x"'; }
for at in 32 96 97 100 513 888 1536 49152 65535; do
    [ $at = 1536 ] || check port_$at test "$(port $at)" = ff
done
check southbridge_is_not_there test "$(devmem 0xfed803c0 32)" = 0xFFFFFFFF
check southbridge_takes_writes devmem 0xfed803c0 32 0
check nothing_below_the_ioapic test "$(devmem 0xfeb00000 8)" = 0xFF
# A function that does not exist, by the configuration ports.
ids=$(setpci -A intel-conf1 -H1 -s 00:1e.7 VENDOR_ID.L 2>/dev/null)
check no_such_function test "${ids:-ffffffff}" = ffffffff
"#,
        )
        .run()
        .well();
}
