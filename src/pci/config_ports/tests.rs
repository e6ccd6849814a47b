//! Address and data ports by every width.

use super::*;
use crate::pci::testing::{Machine, two_ports};

fn parts() -> (Machine, ConfigPorts) {
    let machine = Machine::new(two_ports());
    let ports = ConfigPorts::new(machine.topology.clone());
    (machine, ports)
}

fn select(machine: &Machine, ports: &ConfigPorts, name: &str, register: u32) {
    let bdf = u32::from(machine.node(name).bdf.requester_id());
    ports.write(0, &(ENABLE | bdf << 8 | register).to_le_bytes());
}

fn read<const N: usize>(ports: &ConfigPorts, offset: u64) -> [u8; N] {
    let mut data = [0xee; N];
    ports.read(offset, &mut data);
    data
}

#[test]
fn the_data_port_reads_what_the_address_selects_by_every_width() {
    let (machine, ports) = parts();
    select(&machine, &ports, "left", 0);
    assert_eq!(read(&ports, 4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(read(&ports, 6), [0x78, 0x56]);
    assert_eq!(read(&ports, 7), [0x56]);
}

#[test]
fn a_byte_written_to_the_data_port_changes_only_its_lane() {
    let (machine, ports) = parts();
    select(&machine, &ports, "left", 4);
    ports.write(4, &[0x06]);
    ports.write(5, &[0x04]);
    ports.write(6, &[0xff, 0xff]);
    assert_eq!(read(&ports, 4), [0x06, 0x04, 0x10, 0x00]);
}

#[test]
fn without_the_enable_bit_nobody_answers() {
    let (machine, ports) = parts();
    let bdf = u32::from(machine.node("left").bdf.requester_id());
    ports.write(0, &(bdf << 8).to_le_bytes());
    assert_eq!(read(&ports, 4), [0xff; 4]);
    select(&machine, &ports, "left", 4);
    ports.reset();
    ports.write(4, &[7]);
    select(&machine, &ports, "left", 4);
    assert_eq!(read(&ports, 4), [0]);
}

#[test]
fn reserved_bits_of_the_address_read_zero() {
    let (_, ports) = parts();
    ports.write(0, &u32::MAX.to_le_bytes());
    assert_eq!(u32::from_le_bytes(read(&ports, 0)), ADDRESS);
    assert_eq!(read(&ports, 4), [0xff; 4]);
}

#[test]
fn narrow_accesses_to_the_address_are_not_for_it() {
    let (machine, ports) = parts();
    select(&machine, &ports, "left", 0);
    for (offset, data) in [(0, &[0][..]), (0, &[0, 0]), (2, &[0, 0]), (1, &[0, 0]), (3, &[0])] {
        ports.write(offset, data);
    }
    assert_eq!(read(&ports, 4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(read(&ports, 0), [0xff]);
    assert_eq!(read(&ports, 2), [0xff; 2]);
}

#[test]
fn what_runs_beyond_the_data_port_is_all_ones() {
    let (machine, ports) = parts();
    select(&machine, &ports, "left", 0);
    assert_eq!(read(&ports, 6), [0x78, 0x56, 0xff, 0xff]);
    ports.write(7, &[0, 0]);
    assert_eq!(read(&ports, u64::MAX), [0xff]);
}
