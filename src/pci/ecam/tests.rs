//! Offsets, widths and edges of the ECAM.

use super::*;
use crate::pci::testing::{Machine, two_ports};

fn ecam() -> (Machine, Ecam) {
    let machine = Machine::new(two_ports());
    let ecam = Ecam::new(machine.topology.clone(), 0);
    (machine, ecam)
}

/// Offset of a function's first byte.
fn offset(machine: &Machine, name: &str) -> u64 {
    u64::from(machine.node(name).bdf.requester_id()) << 12
}

fn read<const N: usize>(ecam: &Ecam, offset: u64) -> [u8; N] {
    let mut data = [0xee; N];
    ecam.read(offset, &mut data);
    data
}

#[test]
fn bus_device_function_and_register_are_in_the_offset() {
    let (machine, ecam) = ecam();
    let at = offset(&machine, "left");
    assert_eq!(read(&ecam, at), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(read(&ecam, at + 2), [0x78, 0x56]);
    assert_eq!(read(&ecam, at + 0xb), [0x02]);
}

#[test]
fn eight_bytes_are_two_dwords() {
    let (machine, ecam) = ecam();
    let at = offset(&machine, "left");
    assert_eq!(read::<8>(&ecam, at)[..4], [0x34, 0x12, 0x78, 0x56]);
    ecam.write(at + 0x10, &[0, 0, 0x50, 0xd0, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(read(&ecam, at + 0x12), [0x50, 0xd0]);
}

#[test]
fn class_12_an_unaligned_write_changes_only_its_bytes() {
    let (machine, ecam) = ecam();
    let at = offset(&machine, "left");
    ecam.write(at + 4, &[0x06, 0x04]);
    // The upper byte of Command and the lower of Status.
    ecam.write(at + 5, &[0x00, 0xff]);
    assert_eq!(read(&ecam, at + 4), [0x06, 0x00, 0x10, 0x00]);
    // Across two dwords: the upper byte of the class, and the cache line size.
    ecam.write(at + 0xb, &[0xaa, 0x10]);
    assert_eq!(read(&ecam, at + 0xb), [0x02, 0x10]);
}

#[test]
fn absent_functions_and_what_runs_beyond_a_function_are_all_ones() {
    let (machine, ecam) = ecam();
    let at = offset(&machine, "left");
    assert_eq!(read(&ecam, 0xfff_f000), [0xff; 4]);
    assert_eq!(read(&ecam, at + 0xffe), [0, 0, 0xff, 0xff]);
    ecam.write(at + 0xffe, &[0; 4]);
    assert_eq!(read(&ecam, 1 << 28), [0xff; 4]);
    assert_eq!(read(&ecam, u64::MAX), [0xff]);
    ecam.write(u64::MAX, &[0]);
}

#[test]
fn another_segment_has_functions_of_its_own() {
    let (machine, _) = ecam();
    let other = Ecam::new(machine.topology.clone(), 3);
    assert_eq!(read(&other, offset(&machine, "left")), [0xff; 4]);
}
