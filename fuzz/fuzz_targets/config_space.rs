//! Configuration accesses of any width to ports and devices, and accesses to whatever BARs they leave open.
//!
//! Nothing may panic, answer outside the root complex, or survive a reset.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::pci::config_ports::ConfigPorts;
use ravelin::pci::dump::Dump;
use ravelin::pci::ecam::Ecam;
use ravelin::pci::testing::{Machine, two_ports};
use ravelin::platform::bus::BusDevice;

#[derive(Arbitrary, Debug)]
enum Access {
    /// Twelve bits of register, sixteen of function.
    EcamWrite { offset: u32, bytes: [u8; 8], len: u8 },
    EcamRead { offset: u32, len: u8 },
    /// The same, among the buses and registers that exist.
    NearWrite { bus: u8, device: u8, register: u8, bytes: [u8; 4], len: u8 },
    PortWrite { offset: u8, bytes: [u8; 4], len: u8 },
    PortRead { offset: u8, len: u8 },
    /// In some BAR that answers at present.
    Memory { which: u8, offset: u32, bytes: [u8; 8], len: u8, write: bool },
}

fn width(len: u8, most: usize) -> usize {
    usize::from(len) % most + 1
}

fuzz_target!(|accesses: Vec<Access>| {
    let machine = Machine::new(two_ports());
    let ecam = Ecam::new(machine.topology.clone(), 0);
    let ports = ConfigPorts::new(machine.topology.clone());
    for access in accesses.into_iter().take(256) {
        match access {
            Access::EcamWrite { offset, bytes, len } => {
                ecam.write(u64::from(offset), &bytes[..width(len, 8)]);
            }
            Access::EcamRead { offset, len } => ecam.read(u64::from(offset), &mut [0; 8][..width(len, 8)]),
            Access::NearWrite { bus, device, register, bytes, len } => {
                let function = u64::from(bus % 4) << 8 | u64::from(device % 4) << 3;
                ecam.write(function << 12 | u64::from(register), &bytes[..width(len, 4)]);
            }
            Access::PortWrite { offset, bytes, len } => {
                ports.write(u64::from(offset % 8), &bytes[..width(len, 4)]);
            }
            Access::PortRead { offset, len } => {
                ports.read(u64::from(offset % 8), &mut [0; 4][..width(len, 4)]);
            }
            Access::Memory { which, offset, bytes, len, write } => {
                let open = machine.mmio.traffic();
                if let Some(bar) = open.get(usize::from(which) % open.len().max(1)) {
                    let at = bar.start.saturating_add(u64::from(offset) % 0x1000);
                    let data = &mut bytes.clone()[..width(len, 8)];
                    if write {
                        machine.mmio.write(at, data);
                    } else {
                        machine.mmio.read(at, data);
                    }
                }
            }
        }
        machine.check();
    }
    let _text = Dump(&machine.topology).to_string();
    machine.topology.reset();
    machine.enable();
    machine.check_as_planned();
});
