//! A guest that does to a function what no driver would. The machine lives, and what the guest left alone
//! works as before.

use std::path::Path;
use std::time::Duration;

use ravelin::vm::config::Config;
use ravelin::vm::plan::Plan;

use crate::devices::DISK_TOOLS;
use crate::machine::Machine;

/// The disk on the first root complex is kept; everything on the second is the victim. The guest's driver of the IOMMU is
/// switched off, so that nobody but this script talks to the unit.
const MACHINE: &str = r#"
[[root-complex]]
id = "rc0"
[[root-complex]]
id = "rc1"
[[viommu]]
mode = "emulated"
on = "rc1"
intremap = false
[[root-port]]
id = "rp1"
on = "rc1"
[[test-device]]
port = "rp1"
"#;

/// Where the machine's parts are, as variables of the script.
fn places(toml: &str) -> String {
    let config = Config::parse(Path::new("machine.toml"), toml).unwrap_or_else(|error| panic!("{error}"));
    let plan = Plan::resolve(&config).unwrap_or_else(|error| panic!("{error}"));
    let ecam = plan.pci.segments[0].ecam.start();
    let unit = plan.viommus[0].mmio;
    format!(
        "ecam={} unit={} unit_size={}\n",
        ecam.0,
        unit.start().0,
        unit.len()
    )
}

#[test]
fn random_accesses_to_functions_and_their_iommu_harm_no_other_that_is_busy() {
    let machine = Machine::new("lab")
        .deadline(Duration::from_secs(400))
        .cmdline("amd_iommu=off iomem=relaxed");
    let disks = ["kept.img", "victim.img"].map(|name| machine.disk(name, 8).display().to_string());
    let toml = format!(
        "{MACHINE}[[disk]]\npath = \"{}\"\non = \"rc0\"\n[[disk]]\npath = \"{}\"\non = \"rc1\"\n",
        disks[0], disks[1]
    );
    let script = r#"
victim=$(readlink -f /sys/block/vdb/device/.. | sed 's|.*/||')
tester=$(basename "$(ls -d /sys/bus/pci/drivers/pci-endpoint-test/0*)")
check two_disks test "$victim" != "$disk"
check works_before round_trip before
echo $victim >/sys/bus/pci/drivers/virtio-pci/unbind
echo $tester >/sys/bus/pci/drivers/pci-endpoint-test/unbind

# The kept disk is read all the time.
dd if=/dev/urandom of=/dev/vda bs=64k seek=16 count=64 conv=fsync 2>/dev/null
read_it() {
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/vda bs=64k skip=16 count=64 2>/dev/null | sha256sum
}
whole=$(read_it)
while [ ! -e /tmp/enough ]; do read_it; done >/tmp/read &
reader=$!

# storm FIRST SIZE COUNT: reads and writes of every width at random places. The same ones each time.
storm() {
    awk -v size=$2 -v count=$3 'BEGIN {
        srand(48882)
        for (n = 0; n < count; n++) {
            width = 2 ^ int(rand() * 4)
            at = int(rand() * size / width) * width
            printf "%d %d %s\n", at, width * 8, n % 3 ? int(rand() * (width == 1 ? 256 : 65536)) : ""
        }
    }' | while read -r at width value; do devmem $(($1 + at)) $width $value; done >/dev/null
}
# Memory BARs: registers, doorbells, MSI-X table and pending bits, and what lies between and behind them. The test
# device may not reach memory: it would do what the bits say.
setpci -s $victim COMMAND=6:6
setpci -s $tester COMMAND=2:6
for function in $victim $tester; do
    while read -r first last flags; do
        [ $((first)) != 0 ] && [ $((flags & 0x200)) != 0 ] || continue
        storm $((first)) $((last - first + 1)) 60
    done </sys/bus/pci/devices/$function/resource
done
check lives_after_bar_accesses round_trip bars

# Configuration space by its addresses, and that of functions that are not there.
ids=$(setpci -s $victim VENDOR_ID.L)
address=${victim#*:}
bus=$((0x${address%%:*})) slot=${victim##*:}
at=$((ecam + (bus << 20) + (0x${slot%.*} << 15) + (${slot#*.} << 12)))
check ecam_is_where_it_should_be test "$(devmem $at 32)" = "$(printf 0x%X 0x$ids)"
storm $at 4096 120
storm $((ecam + (bus << 20) + (0x1e << 15))) 65536 40
# By the kernel's own way as well, with decoding on and off as the bits fall.
for _ in 1 2 3; do
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
check identity_is_what_it_was test "$(setpci -s $victim VENDOR_ID.L)" = "$ids"

# A device aimed at what is no memory: itself, another function, the unit, configuration space, the I/O APIC.
setpci -s $tester COMMAND=6:6
check resets sh -c "echo 1 >/sys/bus/pci/devices/$tester/reset"
setpci -s $tester COMMAND=6:6
bar_of() { echo $(($(head -n 1 /sys/bus/pci/devices/$1/resource | cut -d ' ' -f 1))); }
own=$(bar_of $tester)
other=0
while read -r first last flags; do
    [ $((flags & 0x200)) = 0 ] || { other=$((first)); break; }
done </sys/bus/pci/devices/$disk/resource
check another_bar test $other != 0
register() { devmem $((own + $1)) 32 $2; }
for target in $own $other $unit $ecam $((0xfec00000)); do
    register 0x14 $((target & 0xffffffff))
    register 0x18 $((target >> 32))
    register 0x1c 64
    register 0x24 0
    register 0x04 0x10
    sleep 1
    # Bit 3: the write failed; bit 8: because of its destination; bit 2: it did not.
    check "no_target_$target" test $(($(devmem $((own + 8)) 32) & 0x10c)) = $((0x108))
done

# The unit's registers last: whatever it is told now concerns the victims only.
storm $unit $unit_size 150
check lives_after_unit_accesses round_trip unit

touch /tmp/enough
wait $reader
say readings "$(wc -l </tmp/read)"
check every_reading_was_right test "$(sort -u /tmp/read)" = "$whole"
"#;
    let ended = machine
        .file(&toml)
        .arguments(["--cpus", "2"])
        .script(&format!("{DISK_TOOLS}{}{script}", places(&toml)))
        .run()
        .well();
    let readings: u32 = ended.console.said("readings").parse().expect("a number");
    assert!(readings > 2, "{readings} readings meanwhile");
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
