//! IVRS: which IOMMU translates for which functions, and as whom the IOAPIC sends.
//!
//! Publication 48882, chapter 5. Each unit is described three times, by IVHDs of type 10h for old software, 11h
//! and 40h for those that read the feature registers here before they can map them. Software takes one type
//! for all units, so each unit has every type.
//!
//! Software sizes its tables by the last function that the device entries name, and uses all other functions
//! named here as an index: a unit's entries therefore end with the last function of its last bus.

use super::{Hardware, board, table};
use crate::iommu::amd::features::Features;
use crate::iommu::emulated;
use crate::pci::tree::{NodeKind, RootComplex};
use crate::platform::addr::Bdf;
use crate::vm::plan::{PageTable, ViommuPlan};

/// The revision that has IVHDs of type 11h and 40h.
const REVISION: u8 = 2;
/// IVinfo: the IVHDs' feature fields mean something.
const EFR_SUPPORTED: u32 = 1;
/// The HPET's number, as its own table has it.
const HPET_NUMBER: u8 = 0;

/// Types of IVHD, in the order software compares them.
const TYPES: [u8; 3] = [0x10, 0x11, 0x40];

/// IVHD flags.
mod flags {
    pub(super) const IOTLB: u8 = 1 << 4;
    pub(super) const COHERENT: u8 = 1 << 5;
    /// In type 10h only, as the next: others have the feature register for it.
    pub(super) const PREFETCH: u8 = 1 << 6;
    pub(super) const PPR: u8 = 1 << 7;
}

/// IVHD attributes of types 11h and 40h: the host tables are not to be used.
const HOST_TABLES_DISABLED: u32 = 1;

/// Device entries.
mod entry {
    pub(super) const SELECT: u8 = 0x02;
    pub(super) const RANGE_START: u8 = 0x03;
    pub(super) const RANGE_END: u8 = 0x04;
    pub(super) const SPECIAL: u8 = 0x48;
    /// Varieties of a special device.
    pub(super) const IOAPIC: u8 = 1;
    pub(super) const HPET: u8 = 2;
    /// What a board's interrupt controller may send past remapping: INIT, ExtINT, NMI and both LINTs. Its
    /// entries are the kernel's own.
    pub(super) const BOARD_INTERRUPTS: u8 = 0b1100_0111;
}

/// The table for this hardware, which has an IOMMU at least.
pub(super) fn ivrs(hardware: &Hardware<'_>) -> Vec<u8> {
    let sizes = hardware
        .viommus
        .first()
        .map_or(0, |unit| unit.offer.features().misc0().into_bits());
    let mut body = (sizes | EFR_SUPPORTED).to_le_bytes().to_vec();
    body.extend([0; 8]);
    for unit in hardware.viommus {
        let root = hardware
            .pci
            .roots()
            .find(|root| root.name == unit.root_complex)
            .expect("a planned IOMMU covers a planned root complex");
        let devices = devices(hardware, unit, root);
        for kind in TYPES {
            body.extend(ivhd(kind, unit, &devices));
        }
    }
    table(*b"IVRS", REVISION, &body)
}

/// One description of `unit`, by type.
fn ivhd(kind: u8, unit: &ViommuPlan, devices: &[u8]) -> Vec<u8> {
    let features = unit.offer.features();
    let old = kind == 0x10;
    let mut flags = flags::COHERENT;
    let mut set = |bit: u8, on: bool| flags |= if on { bit } else { 0 };
    set(flags::IOTLB, features.ats());
    set(flags::PREFETCH, old && features.efr.prefetch());
    set(flags::PPR, old && features.efr.ppr());
    let mut bytes = vec![kind, flags, 0, 0];
    bytes.extend(unit.bdf.requester_id().to_le_bytes());
    bytes.extend(emulated::CAPABILITY_AT.to_le_bytes());
    bytes.extend(unit.mmio.start().0.to_le_bytes());
    bytes.extend(unit.segment.to_le_bytes());
    // Message 0, unit 0.
    bytes.extend([0; 2]);
    if old {
        bytes.extend(feature_reporting(&features).to_le_bytes());
    } else {
        let disabled = unit.offer.page_table == PageTable::V2;
        let attributes = if disabled { HOST_TABLES_DISABLED } else { 0 };
        bytes.extend(attributes.to_le_bytes());
        bytes.extend(features.efr.into_bits().to_le_bytes());
        bytes.extend(features.efr2.into_bits().to_le_bytes());
    }
    bytes.extend(devices);
    let length = u16::try_from(bytes.len()).expect("a few entries");
    bytes[2..4].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// What type 10h has for the feature register (table 98).
fn feature_reporting(features: &Features) -> u32 {
    let efr = features.efr;
    let bit = |at: u32, on: bool| u32::from(on) << at;
    bit(0, efr.xt())
        | bit(2, efr.gt())
        | u32::from(efr.glx()) << 3
        | bit(5, efr.ia())
        | bit(6, efr.ga())
        | u32::from(efr.pas_max()) << 8
        | u32::from(efr.gats()) << 28
        | u32::from(efr.hats()) << 30
}

/// The functions that `unit` covers on `root`: all but the host bridge and itself, wherever the guest moves
/// them.
fn devices(hardware: &Hardware<'_>, unit: &ViommuPlan, root: &RootComplex) -> Vec<u8> {
    let own = unit.bdf.requester_id();
    let mut bytes = Vec::new();
    // Who else is in front of it on device 0.
    for node in &root.functions {
        let before = node.bdf.requester_id() < own;
        if before && node.kind != NodeKind::HostBridge {
            bytes.extend(device(entry::SELECT, node.bdf.requester_id()));
        }
    }
    let last = Bdf::new(*unit.buses.end(), 31, 7).expect("in range");
    bytes.extend(device(entry::RANGE_START, own + 1));
    bytes.extend(device(entry::RANGE_END, last.requester_id()));
    if unit.remaps_ioapic {
        let sender = ioapic_sender(hardware);
        bytes.extend(special(board::IOAPIC_ID, sender, entry::IOAPIC));
        if hardware.hpet {
            bytes.extend(special(HPET_NUMBER, sender, entry::HPET));
        }
    }
    bytes
}

/// As whom the IOAPIC sends: the ISA bridge.
fn ioapic_sender(hardware: &Hardware<'_>) -> Bdf {
    let bridge = hardware
        .pci
        .nodes()
        .find(|(_, node)| node.kind == NodeKind::IsaBridge);
    bridge.expect("every machine has an ISA bridge").1.bdf
}

fn device(kind: u8, id: u16) -> [u8; 4] {
    let [low, high] = id.to_le_bytes();
    [kind, low, high, 0]
}

fn special(handle: u8, sender: Bdf, variety: u8) -> [u8; 8] {
    let [low, high] = sender.requester_id().to_le_bytes();
    let data = entry::BOARD_INTERRUPTS;
    [entry::SPECIAL, 0, 0, data, handle, low, high, variety]
}
