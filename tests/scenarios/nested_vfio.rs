//! A guest that is itself a VFIO host: its programs have devices of their own behind the emulated IOMMU, by VFIO's
//! groups and by iommufd, and map and unmap memory while those work. One of the devices is the host's own.
//!
//! The programs are Perl, which has all that is needed: `ioctl`, and any system call by its number. The guest has
//! none of its modules.

use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::given::Given;
use crate::machine::{Ended, Machine};

/// What both programs begin with: `PROGRAM WAY FUNCTION`, where WAY is `group`, `iommufd`, or `pasid` for a domain of
/// iommufd's in which PASIDs may be used. Structures are those of `linux/vfio.h` and `linux/iommufd.h`, whose requests
/// are numbers and nothing else.
pub(crate) const VFIO: &str = r#"#!/bin/perl
my ($way, $function) = @ARGV;
my ($page, $memory) = (0x1000, 0x20000000);

sub file { sysopen(my $file, $_[0], 2) or die "$_[0]: $!\n"; return $file }
sub request {
    my $answer = ioctl($_[0], 0x3b00 | $_[1], $_[2]);
    defined $answer or die "request $_[1]: $!\n";
    return $answer + 0;
}

# Sixteen pages of ours where we want them; perl reads memory by a pointer, and writes it by read(2) from a pipe.
syscall(9, $memory, 16 * $page, 3, 0x32, -1, 0) == $memory or die "mmap: $!\n";
pipe(my $source, my $sink) or die "pipe: $!\n";
sub peek { return unpack "P$_[1]", pack 'Q', $_[0] }
sub poke {
    my ($at, $bytes) = @_;
    syswrite($sink, $bytes) == length $bytes or die "pipe: $!\n";
    syscall(0, fileno $source, $at + 0, length $bytes) == length $bytes or die "pipe: $!\n";
}

my ($device, $map, $unmap, $iommu, $ioas);
if ($way eq 'group') {
    my ($number) = readlink("/sys/bus/pci/devices/$function/iommu_group") =~ /(\d+)$/;
    my ($container, $group) = (file('/dev/vfio/vfio'), file("/dev/vfio/$number"));
    request($group, 104, my $of = pack 'l', fileno $container);
    request($container, 102, 3);
    open($device, '+<&=', request($group, 106, my $name = "$function\0")) or die "device: $!\n";
    $map = sub { request($container, 113, my $of = pack 'L2 Q3', 32, 3, $_[0], $_[1], $_[2]) };
    $unmap = sub { request($container, 114, my $of = pack 'L2 Q2', 24, 0, $_[0], $_[1]) };
    # Kept open for as long as the program runs.
    our @open = ($container, $group);
} else {
    opendir(my $nodes, "/sys/bus/pci/devices/$function/vfio-dev") or die "vfio-dev: $!\n";
    my ($node) = grep /^vfio/, readdir $nodes;
    $iommu = file('/dev/iommu');
    $device = file("/dev/vfio/devices/$node");
    request($device, 118, my $bound = pack 'L2 l L', 16, 0, fileno $iommu, 0);
    request($iommu, 0x81, my $space = pack 'L3', 12, 0, 0);
    (my $id, $ioas) = (unpack('x12 L', $bound), unpack('x8 L', $space));
    my $table = $ioas;
    if ($way eq 'pasid') {
        request($iommu, 0x89, my $domain = pack 'L8 Q L2', 48, 8, $id, $ioas, (0) x 7);
        $table = unpack 'x16 L', $domain;
    }
    request($device, 119, my $attached = pack 'L3', 12, 0, $table);
    $map = sub { request($iommu, 0x85, my $of = pack 'L4 Q3', 40, 7, $ioas, 0, $_[0], $_[2], $_[1]) };
    $unmap = sub { request($iommu, 0x86, my $of = pack 'L2 Q2', 24, $ioas, $_[0], $_[1]) };
}

# Registers are bytes of the device's file: BAR N from N << 40 on, configuration space from 7 << 40 on.
my %form = (1 => 'C', 2 => 'S', 4 => 'L', 8 => 'Q');
sub get {
    my $bytes = "\0" x $_[1];
    syscall(17, fileno $device, $bytes, $_[1], $_[0]) == $_[1] or die "read at $_[0]: $!\n";
    return unpack $form{$_[1]}, $bytes;
}
sub set {
    my $bytes = pack $form{$_[1]}, $_[2];
    syscall(18, fileno $device, $bytes, $_[1], $_[0]) == $_[1] or die "write at $_[0]: $!\n";
}
my $config = 7 << 40;
set($config + 4, 2, 6);
"#;

/// A driver of a virtio entropy source: each turn maps a page somewhere else, has it filled, and unmaps it; the last has
/// the device fill a page that is not mapped any more.
const RNG: &str = r#"
my (%at, $step);
for (my $cap = get($config + 0x34, 1); $cap; $cap = get($config + $cap + 1, 1)) {
    next if get($config + $cap, 1) != 9;
    my $type = get($config + $cap + 3, 1);
    $at{$type} //= (get($config + $cap + 4, 1) << 40) + get($config + $cap + 8, 4);
    $step = get($config + $cap + 16, 4) if $type == 2;
}
my ($common, $rings, $filled) = ($at{1}, 0x10000000, 0);
my ($available, $used) = (0x400, 0x800);
$map->($memory, $rings, $page);
set($common + 0x14, 1, $_) for 0, 1, 3;
# Version 1, and addresses are the IOMMU's.
set($common + 8, 4, 1);
set($common + 0xc, 4, 3);
set($common + 0x14, 1, 11);
get($common + 0x14, 1) & 8 or die "the device takes no features\n";
set($common + 0x16, 2, 0);
set($common + 0x18, 2, 16);
set($common + 0x20, 8, $rings);
set($common + 0x28, 8, $rings + $available);
set($common + 0x30, 8, $rings + $used);
set($common + 0x1c, 2, 1);
my $notify = $at{2} + $step * get($common + 0x1e, 2);
set($common + 0x14, 1, 15);

# Have 256 bytes at $_[0] filled, as buffer number $_[1]; whether the device says that they are.
sub fill {
    my ($buffer, $turn) = @_;
    poke($memory, pack 'Q L S2', $buffer, 256, 2, 0);
    poke($memory + $available + 4 + 2 * ($turn % 16), pack 'S', 0);
    poke($memory + $available + 2, pack 'S', $turn + 1);
    set($notify, 2, 0);
    for (1 .. 500) {
        return 1 if unpack('S', peek($memory + $used + 2, 2)) == $turn + 1;
        select undef, undef, undef, 0.01;
    }
    return 0;
}

my $turns = 40;
for my $turn (0 .. $turns - 1) {
    my ($ours, $theirs) = ($memory + (1 + $turn % 15) * $page, 0x30000000 + $turn * 0x201000);
    poke($ours, "\0" x 256);
    $map->($ours, $theirs, $page);
    $filled++ if fill($theirs, $turn) && peek($ours, 256) ne "\0" x 256;
    $unmap->($theirs, $page);
}
poke($memory + $page, "\0" x 256);
$map->($memory + $page, 0x30000000, $page);
$unmap->(0x30000000, $page);
fill(0x30000000, $turns);
my $kept = peek($memory + $page, 256) eq "\0" x 256 ? 'kept' : 'written';
print "$way: $filled of $turns filled, unmapped memory $kept\n";
"#;

/// A driver of the test device: copies between two pages of ours, by requests in process address space 0, and again when
/// the second is unmapped.
const COPY: &str = r#"
my ($from, $to, $copied, $stopped) = (0x10000000, 0x30000000, 0, 0);
sysopen(my $own, "/sys/bus/pci/devices/$function/config", 0) or die "config: $!\n";
sysread($own, my $space, 0x1000) == 0x1000 or die "config: $!\n";
for (my $cap = 0x100; $cap; $cap = unpack("x$cap L", $space) >> 20) {
    my ($id, $control) = (unpack("x$cap S", $space), $cap + 6);
    print "pasid control ", unpack("x$control S", $space), "\n" if $id == 0x1b;
}
# Nothing interrupts; bit 31 of the flags: in the process address space of the register at 0x100.
set(0x24, 4, 9);
set(0x2c, 4, 1 << 31);
set(0x100, 4, 0);
sub copy {
    set(0x0c, 8, $from);
    set(0x14, 8, $to);
    set(0x1c, 4, $page);
    set(0x04, 4, 0x20);
    select undef, undef, undef, 0.01 while get(0x04, 4);
    return get(0x08, 4) & 0x30;
}
$map->($memory, $from, $page);
my $turns = 20;
for my $turn (1 .. $turns) {
    my $bytes = pack 'Q*', map { $turn * 0x10001 * $_ } 1 .. $page / 8;
    poke($memory, $bytes);
    poke($memory + $page, "\0" x $page);
    $map->($memory + $page, $to, $page);
    $copied++ if copy() == 0x10 && peek($memory + $page, $page) eq $bytes;
    $unmap->($to, $page);
    poke($memory + $page, "\0" x $page);
    $stopped++ if copy() == 0x20 && peek($memory + $page, $page) eq "\0" x $page;
}
print "$way: $copied of $turns copied, $stopped stopped\n";
"#;

/// A driver of an e1000e, the host's own NIC: frames go out and come in again by the controller's loopback. Registers and
/// descriptors are those of the 82574's datasheet, sections 3.2, 3.3 and 10.2.
pub(crate) const NIC: &str = r#"
my ($rings, $received, $sent) = (0x10000000, 0x800, 0);
sub comes {
    my ($done, $tries) = @_;
    for (1 .. $tries) {
        return 1 if $done->();
        select undef, undef, undef, 0.01;
    }
    return 0;
}
# Reset, nothing interrupts, link up.
set(0x0000, 4, get(0x0000, 4) | 1 << 26);
select undef, undef, undef, 0.1;
set(0x00d8, 4, 0xffffffff);
set(0x0000, 4, get(0x0000, 4) | 1 << 6);
comes(sub { get(0x0008, 4) & 2 }, 500) or die "no link\n";
$map->($memory, $rings, $page);
# Two rings of eight legacy descriptors.
for my $ring ([0x3800, $rings], [0x2800, $rings + $received]) {
    my ($at, $address) = @$ring;
    set($at, 4, $address);
    set($at + 0x04, 4, 0);
    set($at + 0x08, 4, 128);
    set($at + 0x10, 4, 0);
    set($at + 0x18, 4, 0);
    set($at + 0x28, 4, get($at + 0x28, 4) | 1 << 25);
}
# Everything is received, by loopback.
set(0x0100, 4, 1 << 26 | 0x805a);
set(0x0400, 4, 0x0004_00fa);

# Send the $_[1] bytes at $_[0] and have them received at $_[2] in turn $_[3].
sub loop_back {
    my ($from, $length, $to, $turn) = @_;
    my $slot = 16 * ($turn % 8);
    poke($memory + $received + $slot, pack 'Q2', $to, 0);
    poke($memory + $slot, pack 'Q S C4 S', $from, $length, 0, 0x0b, 0, 0, 0);
    set(0x2818, 4, ($turn + 1) % 8);
    set(0x3818, 4, ($turn + 1) % 8);
    my $done = sub { unpack('C', peek($memory + $_[0] + $slot + 12, 1)) & 1 };
    $sent++ if comes(sub { $done->(0) }, 500);
    return comes(sub { $done->($received) }, 100);
}
my ($ours, $theirs) = ($memory + $page, $memory + 2 * $page);
"#;

/// Frames each from and to pages mapped for it alone; then from and to pages that are not mapped any more.
const FRAMES: &str = r#"
my ($out, $in, $turns) = (0x20000000, 0x30000000, 8);
my ($returned, $kept, $hidden) = (0, 0, 0);
for my $turn (0 .. $turns - 1) {
    my $frame = "\xff" x 6 . "\x02\0\0\0\0\1" . pack('n', 0x88b5) . pack('L*', map { ($turn + 3) * 0x01000193 * $_ } 1 .. 96);
    poke($ours, $frame);
    poke($theirs, "\0" x 512);
    my ($from, $to) = ($out + $turn * 0x201000, $in + $turn * 0x3000);
    $map->($ours, $from, $page);
    $map->($theirs, $to, $page);
    $returned++ if loop_back($from, length $frame, $to, $turn) && peek($theirs, length $frame) eq $frame;
    $unmap->($from, $page);
    $unmap->($to, $page);
}
# Where nothing is mapped any more the NIC neither writes nor reads.
my $secret = "\xff" x 12 . pack('n', 0x88b5) . 'secret' x 40;
poke($ours, $secret);
$map->($ours, $out, $page);
poke($theirs, "\0" x 512);
loop_back($out, length $secret, $in, $turns);
$kept = 1 if peek($theirs, 512) eq "\0" x 512;
$unmap->($out, $page);
$map->($theirs, $in, $page);
loop_back($out, length $secret, $in, $turns + 1);
$hidden = 1 if index(peek($theirs, 512), 'secret') < 0;
$unmap->($in, $page);
$unmap->($rings, $page);
print "$way: $sent sent, $returned of $turns came back, kept $kept, hidden $hidden\n";
"#;

/// Hands function `$1` of the guest to VFIO.
pub(crate) const TO_VFIO: &str = r#"
to_vfio() {
    [ -e /sys/bus/pci/drivers/vfio-pci ] || modprobe -a vfio-pci vfio_iommu_type1
    [ ! -e "/sys/bus/pci/devices/$1/driver" ] || echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"
    echo vfio-pci >"/sys/bus/pci/devices/$1/driver_override"
    echo "$1" >/sys/bus/pci/drivers/vfio-pci/bind
}
"#;

/// `faults NAME` says how many page faults the kernel's log has, and leaves the rest of it to be judged.
const FAULTS: &str = r#"
faults() {
    dmesg -c >/tmp/log
    say "$1" "$(grep -c IO_PAGE_FAULT /tmp/log)"
    grep -v IO_PAGE_FAULT /tmp/log | section dmesg
}
"#;

/// Run `script` in a guest that has both programs.
fn host(guest: &'static str, arguments: &[&str], script: &str) -> Ended {
    let machine = Machine::new(guest).deadline(Duration::from_secs(300));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    machine
        .arguments(["--memory", "384M", "--disk", &disk])
        .arguments(arguments)
        .guest_program("/usr/bin/perl")
        .guest_program("/usr/bin/setpci")
        .guest_file("bin/vfio_rng", format!("{VFIO}{RNG}").as_bytes())
        .guest_file("bin/vfio_nic", format!("{VFIO}{NIC}{FRAMES}").as_bytes())
        .guest_file("bin/vfio_copy", format!("{VFIO}{COPY}").as_bytes())
        .script(&format!("{DISK_TOOLS}{TO_VFIO}{FAULTS}{script}"))
        .run()
        .well()
}

/// An entropy source under a program of the guest's, by each of `ways`.
fn drives_an_entropy_source(guest: &'static str, viommu: &str, ways: &[&str]) {
    let arguments = ["--viommu", viommu, "--root-port", "rp0", "--rng", "port=rp0"];
    let script = format!(
        r#"
function=$(basename "$(dirname "$(readlink -f /sys/bus/virtio/drivers/virtio_rng/virtio*)")")
check binds to_vfio "$function"
for way in {}; do
    check "$way" sh -c "vfio_rng $way $function >/tmp/$way"
    section "$way" <"/tmp/$way"
    faults "faults_$way"
done
check disk_works round_trip "beside VFIO"
"#,
        ways.join(" ")
    );
    let console = host(guest, &arguments, &script).console;
    for way in ways {
        assert_eq!(
            console.section(way).trim(),
            format!("{way}: 40 of 40 filled, unmapped memory kept")
        );
        assert_ne!(console.said(&format!("faults_{way}")), "0", "{way}");
    }
}

#[test]
fn programs_of_the_guest_drive_a_device_by_groups_and_by_iommufd() {
    drives_an_entropy_source("lab", "emulated", &["group", "iommufd"]);
}

#[test]
fn programs_of_debians_guest_drive_a_device_by_groups() {
    drives_an_entropy_source("debian-7.3", "emulated", &["group"]);
}

#[test]
fn programs_of_the_guest_drive_a_device_in_v2_tables() {
    drives_an_entropy_source("lab", "emulated,page-table=v2", &["group", "iommufd"]);
}

/// PASIDs through a root port and a switch, which say that they forward them; and the switch told not to.
#[test]
fn process_address_spaces_work_behind_ports_that_forward_prefixes() {
    let arguments = [
        "--viommu",
        "emulated,ats=on,pasid-bits=16",
        "--root-port",
        "rp0",
        "--switch",
        "id=sw0,on=rp0,downstream=1",
        "--test-device",
        "port=sw0.0",
    ];
    let script = r#"
function=$(basename "$(ls -d /sys/bus/pci/drivers/pci-endpoint-test/0*)")
upstream=$(readlink -f "/sys/bus/pci/devices/$function/../.." | sed 's|.*/||')
check binds to_vfio "$function"
check forwarded sh -c "vfio_copy pasid $function >/tmp/forwarded"
section forwarded </tmp/forwarded
faults faults
# End-End TLP Prefix Blocking, in Device Control 2.
check blocks setpci -s "$upstream" CAP_EXP+28.W=8000:8000
check blocked sh -c "vfio_copy pasid $function >/tmp/blocked"
section blocked </tmp/blocked
# What a switch stops, no IOMMU hears of.
faults faults_when_blocked
check disk_works round_trip "beside VFIO"
"#;
    let console = host("lab", &arguments, script).console;
    let forwarded = console.section("forwarded");
    assert_eq!(
        forwarded.trim(),
        "pasid control 1\npasid: 20 of 20 copied, 20 stopped"
    );
    assert_ne!(console.said("faults"), "0");
    assert_eq!(
        console.section("blocked").trim(),
        "pasid control 1\npasid: 0 of 20 copied, 20 stopped"
    );
    assert_eq!(console.said("faults_when_blocked"), "0");
}

/// What a program of the guest maps for the host's NIC is mapped at the host, and nothing else.
fn drives_the_hosts_nic(viommu: &str, ways: &[&str]) {
    let nic = Given::nic();
    let function = format!("host={},port=rp0", nic.at);
    let arguments = [
        "--cpus",
        "2",
        "--viommu",
        viommu,
        "--root-port",
        "rp0",
        "--vfio-device",
        &function,
    ];
    let script = format!(
        r#"
function=$(basename "$(ls -d /sys/bus/pci/devices/*/ | while read -r at; do [ "$(cat "$at/class")" = 0x020000 ] && echo "$at"; done | head -n 1)")
check binds to_vfio "$function"
for way in {}; do
    check "$way" sh -c "vfio_nic $way $function >/tmp/$way"
    section "$way" <"/tmp/$way"
done
check disk_works round_trip "beside VFIO"
"#,
        ways.join(" ")
    );
    let console = host("lab", &arguments, &script).console;
    for way in ways {
        assert_eq!(
            console.section(way).trim(),
            format!("{way}: 10 sent, 8 of 8 came back, kept 1, hidden 1")
        );
    }
    nic.works_on_the_host();
}

#[test]
fn programs_of_the_guest_drive_the_hosts_nic_and_it_reaches_nothing_else() {
    drives_the_hosts_nic("emulated", &["group", "iommufd"]);
}

#[test]
fn programs_of_the_guest_drive_the_hosts_nic_in_v2_tables_and_it_reaches_nothing_else() {
    drives_the_hosts_nic("emulated,page-table=v2", &["iommufd"]);
}
