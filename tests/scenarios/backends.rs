//! What disks and NICs are connected to on the host, in each of the ways that can be said.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ravelin::platform::tap::Tap;
use rustix::io::{FdFlags, fcntl_setfd};

use crate::machine::Machine;
use crate::network::Bridge;

const MIB: u64 = 1 << 20;

/// What the image at `path` takes of its file system, in bytes.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).expect("the image is there").blocks() * 512
}

/// Whether all `len` bytes from `at` are zero.
fn is_zero(path: &Path, at: u64, len: u64) -> bool {
    let mut file = fs::File::open(path).expect("the image is there");
    file.seek(SeekFrom::Start(at)).expect("a regular file");
    let mut bytes = Vec::new();
    file.take(len).read_to_end(&mut bytes).expect("readable");
    assert_eq!(bytes.len() as u64, len, "{} ends early", path.display());
    bytes.iter().all(|byte| *byte == 0)
}

/// `zero_out DEVICE OFFSET BYTES`: what `BLKZEROOUT` of `linux/fs.h` asks for.
const ZERO_OUT: &str = r#"#!/bin/perl
my ($device, $at, $bytes) = @ARGV;
sysopen(my $disk, $device, 2) or die "$device: $!\n";
ioctl($disk, 0x127f, pack('Q2', $at, $bytes)) or die "BLKZEROOUT: $!\n";
"#;

/// One that is only read, one with a queue for each processor, one past the host's cache, one whose sectors are given
/// back.
#[test]
fn disks_are_read_only_wide_direct_and_sparse_as_described() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(300));
    let kept = machine.path("kept.img");
    let text = b"what nobody can change\n".repeat(1 << 15);
    fs::write(&kept, &text[..text.len() / 512 * 512]).expect("the folder takes a file");
    let before = fs::read(&kept).expect("written");
    let [wide, direct, sparse] = ["wide.img", "direct.img", "sparse.img"].map(|name| machine.disk(name, 16));
    let said = |path: &Path, more: &str| format!("path={}{more}", path.display());
    let mut running = machine
        .arguments(["--cpus", "4", "--memory", "384M"])
        .arguments(["--disk", &said(&kept, ",readonly=on")])
        .arguments(["--disk", &said(&wide, ",queues=4,queue-size=64")])
        .arguments(["--disk", &said(&direct, ",direct=on,serial=past-the-cache")])
        .arguments(["--disk", &said(&sparse, "")])
        .guest_program("/usr/bin/perl")
        .guest_file("bin/zero_out", ZERO_OUT.as_bytes())
        .script(
            r#"
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
hash=$(sha256sum </tmp/data)
# comes_back DISK: what was written is read from the medium
comes_back() {
    dd if=/tmp/data of=/dev/$1 bs=256k conv=fsync 2>/dev/null || return 1
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(dd if=/dev/$1 bs=256k count=32 2>/dev/null | sha256sum)" = "$hash" ]
}
check says_that_it_is_read_only test "$(cat /sys/block/vda/ro)" = 1
check cannot_be_written sh -c '! dd if=/tmp/data of=/dev/vda bs=512 count=1 conv=fsync 2>/dev/null'
check can_be_read sh -c 'head -c 23 /dev/vda | grep -q "^what nobody can change$"'

check has_four_queues test "$(ls /sys/block/vdb/mq | wc -l)" = 4
check has_its_depth test "$(cat /sys/block/vdb/queue/nr_requests)" -le 64
check each_queue_works comes_back vdb
for cpu in 0 1 2 3; do
    check "from_processor_$cpu" taskset $(printf %x $((1 << cpu))) dd if=/dev/vdb of=/dev/null bs=64k count=8 iflag=direct
done

check has_its_serial_number test "$(cat /sys/block/vdc/serial)" = past-the-cache
check past_the_cache comes_back vdc
dd if=/tmp/data of=/tmp/odd bs=512 count=7 2>/dev/null
dd if=/tmp/odd of=/dev/vdc bs=512 seek=3 oflag=direct conv=notrunc 2>/dev/null
check single_sectors_past_the_cache sh -c 'dd if=/dev/vdc bs=512 skip=3 count=7 iflag=direct 2>/dev/null | cmp - /tmp/odd'

check is_written comes_back vdd
say discards "$(cat /sys/block/vdd/queue/discard_max_bytes)"
echo @@written
read -r line </dev/console
check is_discarded blkdiscard -o $((1 << 20)) -l $((2 << 20)) /dev/vdd
check is_zeroed zero_out /dev/vdd $((4 << 20)) $((2 << 20))
echo 3 >/proc/sys/vm/drop_caches
# hash_of FIRST COUNT FILE: of whole MiB
hash_of() { dd if=$3 bs=1M skip=$1 count=$2 2>/dev/null | sha256sum; }
check discarded_sectors_are_zero test "$(hash_of 1 2 /dev/vdd)" = "$(hash_of 0 2 /dev/zero)"
check zeroed_sectors_are_zero test "$(hash_of 4 2 /dev/vdd)" = "$(hash_of 0 2 /dev/zero)"
for at in 0 3 6 7; do
    check "others_are_as_they_were_$at" test "$(hash_of $at 1 /dev/vdd)" = "$(hash_of $at 1 /tmp/data)"
done
"#,
        )
        .start();
    running.wait_for("@@written", 1);
    assert!(allocated(&sparse) >= 8 * MIB, "{}", allocated(&sparse));
    assert!(!is_zero(&sparse, MIB, MIB));
    running.write("\n");
    let ended = running.end().well();
    assert_ne!(ended.console.said("discards"), "0");
    // What was discarded gave its blocks back. BLKZEROOUT asks for zeros whose blocks stay.
    assert!(allocated(&sparse) <= 6 * MIB, "{}", allocated(&sparse));
    assert!(is_zero(&sparse, MIB, 2 * MIB) && is_zero(&sparse, 4 * MIB, 2 * MIB));
    assert!(
        fs::read(&kept).expect("still there") == before,
        "the image that is only read"
    );
}

/// What the C library loads when a thread of iperf3 ends, and no list of libraries has.
const UNWINDER: &str = "/usr/lib/x86_64-linux-gnu/libgcc_s.so.1";

/// An iperf3 server on this host that serves one client; it goes with the value.
struct Server(Child);

impl Server {
    fn new(address: &str) -> Self {
        let child = Command::new("iperf3")
            .args(["--server", "--bind", address])
            .stdout(Stdio::null())
            .spawn();
        Self(child.expect("iperf3 is there"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two NICs of two queue pairs, one by the tap's name and one by descriptors: streams in both directions over each, and
/// interrupts of each pair.
#[test]
fn nics_of_several_queues_by_name_and_by_descriptor_carry_streams_both_ways() {
    let bridges = ["rvtest3", "rvtest4"].map(Bridge::of_several_queues);
    bridges[0].address("10.9.3.1/24");
    bridges[1].address("10.9.4.1/24");
    let _servers = ["10.9.3.1", "10.9.4.1"].map(Server::new);
    let queues = Tap::open(bridges[1].tap(0), 2).expect("a tap that was made for several");
    // Open in the process that is started, by the same numbers.
    let numbers: Vec<String> = queues
        .iter()
        .map(|queue| {
            fcntl_setfd(queue.as_fd(), FdFlags::empty()).expect("an open descriptor");
            std::os::fd::AsRawFd::as_raw_fd(&queue.as_fd()).to_string()
        })
        .collect();
    let running = Machine::new("debian-7.3")
        .deadline(Duration::from_secs(400))
        .arguments(["--cpus", "2", "--memory", "512M"])
        .arguments(["--net", &format!("tap={},queues=2", bridges[0].tap(0))])
        .arguments(["--net", &format!("fd=[{}],mtu=1400", numbers.join(","))])
        .guest_program("/usr/bin/iperf3")
        .guest_file(
            UNWINDER.trim_start_matches("/usr/"),
            &fs::read(UNWINDER).expect("Debian's libgcc-s1 is there"),
        )
        .script(
            r#"
check two_nics test "$(ls -d /sys/bus/virtio/drivers/virtio_net/virtio* | wc -l)" = 2
# received NIC: interrupts of each of its receive queues, on one line
received() {
    device=$(basename "$(readlink -f /sys/class/net/$1/device)")
    for queue in 0 1; do
        awk -v name="$device-input.$queue" '$NF == name { for (i = 2; i <= 3; i++) sum += $i } END { print sum + 0 }' /proc/interrupts
    done
}
subnet=3
for nic in $(ls -d /sys/bus/virtio/drivers/virtio_net/virtio*/net/* | sed 's|.*/||'); do
    check "pairs_of_$subnet" test "$(ls -d /sys/class/net/$nic/queues/*x-* | wc -l)" = 4
    ip addr add 10.9.$subnet.2/24 dev $nic
    ip link set $nic up
    check "link_of_$subnet" test "$(cat /sys/class/net/$nic/carrier)" = 1
    say "mtu_of_$subnet" "$(cat /sys/class/net/$nic/mtu)"
    check "to_the_host_$subnet" iperf3 -c 10.9.$subnet.1 -P 4 -n 4M
    check "from_the_host_$subnet" iperf3 -c 10.9.$subnet.1 -P 8 -n 1M -R
    check "datagrams_$subnet" iperf3 -c 10.9.$subnet.1 -u -b 5M -n 512K
    for count in $(received $nic); do
        check "each_queue_receives_$subnet" test "$count" -gt 0
    done
    subnet=$((subnet + 1))
done
section interrupts </proc/interrupts
"#,
        )
        .start();
    drop(queues);
    let ended = running.end().well();
    assert_eq!(ended.console.said("mtu_of_3"), "1500");
    assert_eq!(ended.console.said("mtu_of_4"), "1400");
}
