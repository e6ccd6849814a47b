//! DSDT: host bridges, processors, and the devices that no bus enumerates.
//!
//! ACPI specification 6.5, sections 5.2.11.1, 8.4 and 9.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, Name, Package, Path, ResourceTemplate, Scope};

use super::resource::{UsedMemory, isa_interrupt, ports};
use super::{Hardware, board, bytes_of, host_bridge, table};
use crate::vm::layout;

/// Revision 2 and above: integers have 64 bits.
const REVISION: u8 = 2;

/// The table for this hardware.
pub(super) fn dsdt(hardware: &Hardware<'_>) -> Vec<u8> {
    let mut system_bus = Vec::new();
    for (index, root) in hardware.pci.roots().enumerate() {
        system_bus.extend(host_bridge::to_aml_bytes(root, index));
    }
    system_bus.extend(motherboard(hardware));
    system_bus.extend(device(
        "COM1",
        &EISAName::new("PNP0501"),
        &[
            &ports(board::COM1_PORT, board::COM1_PORTS),
            &isa_interrupt(board::COM1_GSI),
        ],
    ));
    system_bus.extend(device(
        "RTC0",
        &EISAName::new("PNP0B00"),
        &[
            &ports(board::RTC_PORT, board::RTC_PORTS),
            &isa_interrupt(board::RTC_GSI),
        ],
    ));
    if hardware.hpet {
        let registers = UsedMemory(layout::HPET);
        system_bus.extend(device("HPET", &EISAName::new("PNP0103"), &[&registers]));
    }
    if hardware.pvpanic {
        system_bus.extend(device("PEVT", &"QEMU0001", &[&ports(board::PVPANIC_PORT, 1)]));
    }
    for uid in (0_u32..).take(hardware.apic_ids.len()) {
        system_bus.extend(processor(uid));
    }

    let mut body = Scope::raw(Path::new("_SB_"), system_bus);
    body.extend(soft_off());
    table(*b"DSDT", REVISION, &body)
}

/// `_S5`: what SLP_TYP switches the machine off. There is no other sleep state.
fn soft_off() -> Vec<u8> {
    let values = Package::new(vec![&board::SLP_TYP_S5, &board::SLP_TYP_S5, &0_u8, &0_u8]);
    bytes_of(&Name::new(Path::new("_S5_"), &values))
}

/// What the board itself uses, so that the guest places nothing there and trusts the ECAMs.
fn motherboard(hardware: &Hardware<'_>) -> Vec<u8> {
    let ecams: Vec<_> = hardware
        .pci
        .segments
        .iter()
        .map(|segment| UsedMemory(segment.ecam))
        .collect();
    let pm1a = ports(board::PM1A_EVENT_PORT, board::PM1A_PORTS);
    let mut resources: Vec<&dyn Aml> = vec![&pm1a];
    resources.extend(ecams.iter().map(|ecam| ecam as &dyn Aml));
    device("MBRD", &EISAName::new("PNP0C02"), &resources)
}

/// A processor device; its UID is the one in the MADT.
fn processor(uid: u32) -> Vec<u8> {
    assert!(uid <= 0xfff, "the plan has at most 4,096 processors");
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid_name = Name::new("_UID".into(), &uid);
    bytes_of(&Device::new(
        Path::new(&format!("C{uid:03X}")),
        vec![&hid, &uid_name],
    ))
}

/// A device with an ID and current resources, the only one of its kind.
fn device(name: &str, id: &dyn Aml, resources: &[&dyn Aml]) -> Vec<u8> {
    let hid = Name::new("_HID".into(), id);
    let uid = Name::new("_UID".into(), &0_u8);
    let current = Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()));
    bytes_of(&Device::new(Path::new(name), vec![&hid, &uid, &current]))
}
