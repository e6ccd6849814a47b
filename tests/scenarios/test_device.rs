//! The test device under Linux's own driver for it: BARs, interrupts of every kind, and DMA with checksums.
//!
//! The driver is asked by the same requests as the kernel's selftest
//! (`tools/testing/selftests/pci_endpoint`), through a few lines of Perl: all that is needed is `ioctl`. The guest
//! is the lab's kernel, since Debian's own builds leave the driver out.

use std::time::Duration;

use crate::machine::{Ended, Machine};

/// `pcitest NAME=VALUE...`: each request with what it was answered. Requests are those of `linux/pcitest.h`.
const PCITEST: &str = r#"#!/bin/perl
my %requests = (
    bar => 0x5001, intx => 0x5002, msi => 0x40045003, write => 0x40085004, read => 0x40085005,
    copy => 0x40085006, msix => 0x40045007, type => 0x40045008, which => 0x5009, bars => 0x500a,
    doorbell => 0x500b, subrange => 0x500c, clear => 0x5010,
);
sysopen(my $device, '/dev/pci-endpoint-test.0', 2) or die "no test device: $!\n";
for (@ARGV) {
    my ($name, $value) = split /=/;
    # The three transfers take a structure: bytes, and whether by DMA.
    my $argument = $name =~ /^(read|write|copy)$/ ? pack('Q C x7', split(/,/, $value)) : $value + 0;
    my $answer = ioctl($device, $requests{$name}, $argument);
    printf "%s=%s: %d\n", $name, $value, defined $answer ? $answer + 0 : -$!;
}
"#;

const BEHIND_A_PORT: [&str; 4] = ["--root-port", "rp0", "--test-device", "port=rp0"];

/// Sizes of transfers, as the kernel's selftest has them.
const SIZES: [u32; 5] = [1, 1024, 1025, 1_024_000, 1_024_001];

/// Ask the driver, in this order.
fn asked(requests: &[String]) -> Ended {
    asked_behind(&[], "", requests)
}

/// The same in a machine with these further arguments, and of a kernel that is told `words`.
fn asked_behind(arguments: &[&str], words: &str, requests: &[String]) -> Ended {
    Machine::new("lab")
        .arguments(BEHIND_A_PORT)
        .arguments(arguments)
        .cmdline(words)
        .deadline(Duration::from_secs(300))
        .guest_program("/usr/bin/perl")
        .guest_file("bin/pcitest", PCITEST.as_bytes())
        .script(&format!(
            "check driver ls /dev/pci-endpoint-test.0\npcitest {} >/tmp/answers\nsection answers </tmp/answers",
            requests.join(" ")
        ))
        .run()
        .well()
}

/// What it answered to each.
fn answers(ended: &Ended) -> Vec<String> {
    let text = ended.console.section("answers");
    text.lines().map(str::to_owned).collect()
}

/// Each request, as it is answered by `answer`.
fn all(requests: &[String], answer: i32) -> Vec<String> {
    requests
        .iter()
        .map(|request| format!("{request}: {answer}"))
        .collect()
}

fn requests(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// Reads, writes and copies of every size, with and without the flag that asks for DMA.
fn transfers(irq_type: u32) -> Vec<String> {
    let each = SIZES.iter().flat_map(|size| {
        [0, 1]
            .into_iter()
            .flat_map(move |dma| ["read", "write", "copy"].map(|transfer| format!("{transfer}={size},{dma}")))
    });
    [format!("type={irq_type}")].into_iter().chain(each).collect()
}

#[test]
fn bars_are_memory_each_for_itself_and_in_halves() {
    let good = requests(&[
        "bar=0",
        "bar=1",
        "bar=2",
        "bar=4",
        "bar=5",
        "bars=0",
        "type=3",
        "subrange=1",
        "subrange=2",
        "subrange=4",
        "subrange=5",
    ]);
    // The upper half of BAR 2 is none (ENODATA), and the registers keep their place (EBUSY).
    let refused = requests(&["bar=3", "subrange=0"]);
    let asked_for = [good.clone(), refused].concat();
    let ended = asked(&asked_for);
    let expected = [all(&good, 0), requests(&["bar=3: -61", "subrange=0: -16"])].concat();
    assert_eq!(answers(&ended), expected);
}

#[test]
fn interrupts_of_every_kind_arrive_by_their_number() {
    let msix = (1..=32).map(|number| format!("msix={number}"));
    let asked_for = [
        requests(&[
            "type=0",
            "intx=0",
            "intx=0",
            "type=1",
            "msi=1",
            "doorbell=0",
            "type=2",
        ]),
        msix.collect(),
        requests(&["doorbell=0", "clear=0"]),
    ]
    .concat();
    let ended = asked(&asked_for);
    assert_eq!(answers(&ended), all(&asked_for, 0));
}

#[test]
fn transfers_of_every_size_have_the_right_checksum_whatever_interrupts() {
    let asked_for: Vec<_> = [0, 1, 2].into_iter().flat_map(transfers).collect();
    let ended = asked(&asked_for);
    assert_eq!(answers(&ended), all(&asked_for, 0));
}

/// Through an IOMMU, also one that a model serves, for which the device also asks for translations where the guest switches
/// that on.
#[test]
fn behind_an_iommu_bars_interrupts_and_transfers_are_the_same() {
    let asked_for = [
        requests(&["bar=0", "bar=2", "type=1", "msi=1", "type=2", "msix=32"]),
        transfers(2),
    ]
    .concat();
    for (unit, words) in [
        ("emulated", ""),
        ("emulated,ats=on,pasid-bits=16", ""),
        ("sim", "intremap=off"),
        ("sim,ats=on,pasid-bits=16", "intremap=off"),
    ] {
        let ended = asked_behind(&["--viommu", unit], words, &asked_for);
        assert_eq!(answers(&ended), all(&asked_for, 0), "{unit}");
    }
}

#[test]
fn after_a_reset_and_under_a_new_driver_it_works_as_before() {
    let ended = Machine::new("lab")
        .arguments(BEHIND_A_PORT)
        .deadline(Duration::from_secs(300))
        .guest_program("/usr/bin/perl")
        .guest_file("bin/pcitest", PCITEST.as_bytes())
        .script(
            r#"
driver=/sys/bus/pci/drivers/pci-endpoint-test
device=$(basename "$(ls -d $driver/0*)")
ask() { pcitest bar=1 type=2 msix=32 read=1025,1 write=1025,1 copy=1025,1; }
ask >/tmp/before
check reset sh -c "echo 1 >/sys/bus/pci/devices/$device/reset"
# The driver's interrupts are gone with the reset; a new one asks for its own.
check unbind sh -c "echo $device >$driver/unbind"
check bind sh -c "echo $device >$driver/bind"
ask >/tmp/after
section before </tmp/before
section after </tmp/after
"#,
        )
        .run()
        .well();
    let before = ended.console.section("before");
    let good = |text: &str| text.lines().filter(|line| line.ends_with(": 0")).count();
    assert_eq!(good(&before), 6, "{before}");
    assert_eq!(ended.console.section("after"), before);
}
