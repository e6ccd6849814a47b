//! Address and data ports by every width, and the register in between.

use std::sync::Mutex;

use super::*;
use crate::pci::testing::{Machine, two_ports};

/// Remembers what was written to port 0xCF9.
#[derive(Default)]
struct ResetControl(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x06);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().expect("not poisoned").push((offset, data.to_vec()));
    }
}

fn parts() -> (Machine, ConfigPorts, Arc<ResetControl>) {
    let (machine, reset) = (Machine::new(two_ports()), Arc::new(ResetControl::default()));
    let ports = ConfigPorts::new(machine.topology.clone(), Some(reset.clone()));
    (machine, ports, reset)
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
    let (machine, ports, _) = parts();
    select(&machine, &ports, "left", 0);
    assert_eq!(read(&ports, 4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(read(&ports, 6), [0x78, 0x56]);
    assert_eq!(read(&ports, 7), [0x56]);
}

#[test]
fn a_byte_written_to_the_data_port_changes_only_its_lane() {
    let (machine, ports, _) = parts();
    select(&machine, &ports, "left", 4);
    ports.write(4, &[0x06]);
    ports.write(5, &[0x04]);
    ports.write(6, &[0xff, 0xff]);
    assert_eq!(read(&ports, 4), [0x06, 0x04, 0x10, 0x00]);
}

#[test]
fn without_the_enable_bit_nobody_answers() {
    let (machine, ports, _) = parts();
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
    let (_, ports, _) = parts();
    ports.write(0, &u32::MAX.to_le_bytes());
    assert_eq!(u32::from_le_bytes(read(&ports, 0)), ADDRESS);
    assert_eq!(read(&ports, 4), [0xff; 4]);
}

#[test]
fn narrow_accesses_to_the_address_are_not_for_it() {
    let (machine, ports, reset) = parts();
    select(&machine, &ports, "left", 0);
    for (offset, data) in [(0, &[0][..]), (0, &[0, 0]), (2, &[0, 0]), (1, &[0, 0]), (3, &[0])] {
        ports.write(offset, data);
    }
    assert_eq!(read(&ports, 4), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(read(&ports, 0), [0xff]);
    assert_eq!(read(&ports, 2), [0xff; 2]);
    assert!(reset.0.lock().expect("not poisoned").is_empty());
}

#[test]
fn a_byte_at_cf9_is_for_the_reset_control_register() {
    let (machine, ports, reset) = parts();
    select(&machine, &ports, "left", 0);
    ports.write(1, &[0x0e]);
    assert_eq!(*reset.0.lock().expect("not poisoned"), [(0, vec![0x0e])]);
    assert_eq!(read(&ports, 1), [0x06]);
    assert_eq!(read(&ports, 4), [0x34, 0x12, 0x78, 0x56]);
    let without = ConfigPorts::new(machine.topology.clone(), None);
    without.write(1, &[0x0e]);
    assert_eq!(read(&without, 1), [0xff]);
}

#[test]
fn what_runs_beyond_the_data_port_is_all_ones() {
    let (machine, ports, _) = parts();
    select(&machine, &ports, "left", 0);
    assert_eq!(read(&ports, 6), [0x78, 0x56, 0xff, 0xff]);
    ports.write(7, &[0, 0]);
    assert_eq!(read(&ports, u64::MAX), [0xff]);
}
