//! Functions of the host that reach one another's memory: a NIC sends what it reads in the registers of a disk.
//!
//! The guest is a VFIO host itself, and what it maps for the NIC is a dma-buf of the disk's BAR: the way is the guest's
//! tables, their copy, the address space with guest RAM and both BARs in it, and the host's IOMMU.

use std::time::Duration;

use crate::given::Given;
use crate::machine::Machine;
use crate::nested_vfio::{NIC, TO_VFIO, VFIO};

/// What the NIC sends is 64 bytes of the controller's registers: once, again after the controller was reset, which ends all
/// mappings of it, and where they are not mapped any more. `PROGRAM iommufd NIC DISK`.
const REGISTERS: &str = r#"
my ($at, $in, $length, $turn) = (0x40000000, 0x30000000, 64, 0);
opendir(my $nodes, "/sys/bus/pci/devices/$ARGV[2]/vfio-dev") or die "vfio-dev: $!\n";
my ($node) = grep /^vfio/, readdir $nodes;
my $disk = file("/dev/vfio/devices/$node");
request($disk, 118, my $bound = pack 'L2 l L', 16, 0, fileno $iommu, 0);
# The controller decodes its memory.
syscall(18, fileno $disk, my $command = pack('S', 2), 2, $config + 4) == 2 or die "command: $!\n";
sub registers {
    my $bytes = "\0" x $length;
    syscall(17, fileno $disk, $bytes, $length, 0) == $length or die "registers: $!\n";
    return $bytes;
}
print 'version ', unpack('x8 L', registers()), "\n";

# Its first page, as a dma-buf, where the NIC finds it.
sub map_registers {
    open(my $buffer, '+<&=', request($disk, 117, my $feature = pack 'L6 Q2', 40, 1 << 16 | 11, 0, 0x80002, 0, 1, 0, $page))
        or die "dma-buf: $!\n";
    request($iommu, 0x8f, my $of = pack 'L3 l Q3', 40, 7, $ioas, fileno $buffer, 0, $page, $at);
}
sub sends_registers {
    poke($theirs, "\0" x 512);
    my $came = loop_back($at, $length, $in, $turn++);
    return $came && peek($theirs, $length) eq registers() ? 'registers' : 'nothing of them';
}
$map->($theirs, $in, $page);
map_registers();
print 'mapped: ', sends_registers(), "\n";
$unmap->($at, $page);
request($disk, 111, 0);
map_registers();
print 'after a reset: ', sends_registers(), "\n";
$unmap->($at, $page);
print 'not mapped: ', sends_registers(), "\n";
"#;

#[test]
fn a_nic_of_the_host_reads_the_registers_of_a_disk_beside_it() {
    let (nic, disk) = (Given::nic(), Given::disk());
    let [first, second] =
        [(&nic, 0), (&disk, 1)].map(|(given, port)| format!("host={},port=rp{port},id=fn{port}", given.at));
    let ended = Machine::new("lab")
        .deadline(Duration::from_secs(200))
        .arguments([
            "--memory", "384M", "--cpus", "2", "--viommu", "emulated", "--log", "info",
        ])
        .arguments(["--root-port", "rp0", "--root-port", "rp1"])
        .arguments(["--vfio-device", &first, "--vfio-device", &second])
        .guest_program("/usr/bin/perl")
        .guest_file("bin/vfio_peers", format!("{VFIO}{NIC}{REGISTERS}").as_bytes())
        .script(&format!(
            r#"{TO_VFIO}
of_class() {{
    for at in /sys/bus/pci/devices/*; do
        [ "$(cat "$at/class")" != "$1" ] || basename "$at"
    done
}}
nic=$(of_class 0x020000)
disk=$(of_class 0x010802)
check binds_the_nic to_vfio "$nic"
check binds_the_disk to_vfio "$disk"
check peers sh -c "vfio_peers iommufd $nic $disk >/tmp/peers 2>&1"
section peers </tmp/peers
"#
        ))
        .run()
        .well();
    let peers = ended.console.section("peers");
    let (version, sent) = peers.trim().split_once('\n').expect("several lines");
    assert_ne!(version, "version 0");
    assert_eq!(
        sent,
        "mapped: registers\nafter a reset: registers\nnot mapped: nothing of them"
    );
    let reached = "other functions of the host reach memory of this one";
    assert_eq!(ended.log.matches(reached).count(), 2, "{}", ended.log);
    nic.works_on_the_host();
    // Its driver finds what is on it.
    disk.back().block();
}
