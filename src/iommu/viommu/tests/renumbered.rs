//! Functions behind real ports, whose bus numbers the guest writes.

use std::sync::{Arc, Weak};

use super::super::testing::{DEVICE_TABLE, Reached, Rig, dte};
use crate::iommu::amd::spec::dte::Dte;
use crate::pci::testing::{Machine, Probe, two_ports};
use crate::pci::topology::Observer;
use crate::platform::addr::{Bdf, Gpa};

const BUSES: u16 = 6;

/// A unit whose driver is through with its start, and two ports with a function of it behind each.
fn behind_ports() -> (Rig, Machine) {
    let rig = Rig::running();
    let machine = Machine::with_devices(two_ports(), |node| {
        let behind = [("left", 0), ("right", 2)].into_iter();
        let found = behind
            .filter(|(name, _)| *name == node.name)
            .map(|(_, index)| index);
        let requester = found.map(|index| rig.requesters[index].clone()).next();
        Probe::issuing_as(node, requester.unwrap_or_default())
    });
    assert_eq!(
        [machine.node("left").bdf, machine.node("right").bdf],
        [bus(1), bus(2)]
    );
    let weak = Arc::downgrade(&rig.unit);
    machine.topology.tell(weak as Weak<dyn Observer>);
    (rig, machine)
}

fn bus(number: u8) -> Bdf {
    Bdf::new(number, 0, 0).expect("in range")
}

fn set_bus(machine: &Machine, port: &str, number: u8) {
    let buses = u32::from_le_bytes([0, number, number, 0]);
    machine.write(machine.node(port).bdf, BUSES, buses);
}

#[test]
fn what_a_function_reaches_is_what_the_entry_of_its_new_number_says_at_every_store() {
    let (rig, machine) = behind_ports();
    rig.entry(0, dte(0x5000, 7));
    rig.host.granted();
    set_bus(&machine, "rp0", 5);
    // Nobody wrote there, so that nothing is valid: everything passes.
    assert_eq!(
        (rig.host.place(0), rig.host.name(0)),
        (Reached::Memory, Some(bus(5)))
    );
    let page = Gpa(DEVICE_TABLE + 32 * 0x500);
    assert!(rig.protection.watched().contains(&page));
    rig.check();
    rig.entry(0, dte(0x6000, 8));
    assert_eq!(
        rig.host.place(0),
        Reached::Tables(Dte::from_quadwords(dte(0x6000, 8)))
    );
    rig.check();
    // The old entry is nobody's.
    rig.word(0x0100, 0, 0);
    rig.check();
}

#[test]
fn functions_that_change_places_one_after_the_other_have_each_others_entries() {
    let (rig, machine) = behind_ports();
    let entries = [dte(0x5000, 7), dte(0x6000, 8)];
    rig.entry(0, entries[0]);
    rig.entry(2, entries[1]);
    // For a moment both ports lead to bus 2, of which only the first has it.
    set_bus(&machine, "rp0", 2);
    rig.host.check();
    set_bus(&machine, "rp1", 1);
    let places = [0, 2].map(|index| rig.host.place(index));
    assert_eq!(
        places,
        [1, 0].map(|index| Reached::Tables(Dte::from_quadwords(entries[index])))
    );
    assert_eq!(
        [0, 2].map(|index| rig.host.name(index)),
        [Some(bus(2)), Some(bus(1))]
    );
    rig.check();
}
