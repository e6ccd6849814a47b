//! The ACPI tables: what the guest is told about the machine.
//!
//! One blob, addresses resolved and checksums right, for the boot part to copy to where it was made for:
//!
//! ```text
//! RSDP -> XSDT -> FADT -> FACS, DSDT
//!              -> MADT, MCFG, SPCR, and HPET and IVRS where there is something to say in them
//! ```
//!
//! ACPI specification 6.5, chapter 5. Everything here is the machine's description, not its behaviour: the
//! devices' own files hold that.

mod board;
mod dsdt;
mod fadt;
mod host_bridge;
mod hpet;
mod ivrs;
mod madt;
mod resource;
mod spcr;

use acpi_tables::Aml;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::pci::tree::PciTree;
use crate::platform::addr::Gpa;
use crate::vm::plan::{Plan, ViommuPlan};

pub use board::IOAPIC_ID;

const OEM_ID: [u8; 6] = *b"RAVELN";
const OEM_TABLE_ID: [u8; 8] = *b"RAVELIN ";
const OEM_REVISION: u32 = 1;
/// Bytes of the header that every table but RSDP and FACS starts with.
const TABLE_HEADER: u32 = 36;

/// What of the machine the tables describe beyond the board's fixed devices.
#[derive(Debug, Clone, Copy)]
pub struct Hardware<'a> {
    /// APIC ID of each vCPU, in order; at most 4,096 of them.
    pub apic_ids: &'a [u32],
    /// The PCI hierarchy; at most 4,096 root complexes.
    pub pci: &'a PciTree,
    /// The IOMMUs of the hierarchy.
    pub viommus: &'a [ViommuPlan],
    /// Whether there is an HPET.
    pub hpet: bool,
    /// Whether there is a pvpanic port.
    pub pvpanic: bool,
}

/// The tables, ready to be copied to guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// The bytes, for the address they were made for.
    pub bytes: Vec<u8>,
    /// The root pointer, which boot protocols hand over. It is the start of the blob, and its
    /// [`RSDP_LEN`] bytes may be copied anywhere else: all it holds is the XSDT's address.
    pub rsdp: Gpa,
}

/// Bytes of the root pointer.
pub const RSDP_LEN: usize = 36;
/// The blob's address must be a multiple of this: a FACS lies on a 64-byte border (5.2.10).
pub const ALIGNMENT: u64 = 64;

impl<'a> From<&'a Plan> for Hardware<'a> {
    fn from(plan: &'a Plan) -> Self {
        Self {
            apic_ids: &plan.cpus.apic_ids,
            pci: &plan.pci,
            viommus: &plan.viommus,
            hpet: plan.board.hpet,
            pvpanic: plan.board.pvpanic,
        }
    }
}

/// Describe the machine of `plan` in tables that lie at `at`, which must be a multiple of [`ALIGNMENT`].
///
/// A guest finds them through the root pointer only, so `at` may lie anywhere in RAM that the memory map
/// calls ACPI or reserved.
#[must_use]
pub fn tables(plan: &Plan, at: Gpa) -> AcpiTables {
    describe(&Hardware::from(plan), at)
}

/// [`tables`] for hardware that no plan was made for.
#[must_use]
pub fn describe(hardware: &Hardware<'_>, at: Gpa) -> AcpiTables {
    assert!(
        at.0.is_multiple_of(ALIGNMENT),
        "ACPI tables are placed on a 64-byte border"
    );
    let mut blob = Blob {
        at,
        // The root pointer's place: it needs the XSDT's address.
        bytes: vec![0; RSDP_LEN],
    };
    let facs = blob.push(&fadt::facs());
    let dsdt = blob.push(&dsdt::dsdt(hardware));
    let mut listed = vec![
        blob.push(&fadt::fadt(dsdt, facs)),
        blob.push(&madt::madt(hardware.apic_ids, hardware.hpet)),
        blob.push(&mcfg(hardware.pci)),
        blob.push(&spcr::spcr()),
    ];
    if hardware.hpet {
        listed.push(blob.push(&hpet::hpet()));
    }
    if !hardware.viommus.is_empty() {
        listed.push(blob.push(&ivrs::ivrs(hardware)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in listed {
        xsdt.add_entry(table.0);
    }
    let xsdt = blob.push(&bytes_of(&xsdt));
    let mut bytes = blob.bytes;
    bytes[..RSDP_LEN].copy_from_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt.0)));
    AcpiTables { bytes, rsdp: at }
}

/// A table that nothing but `body` follows the header of.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(
        signature,
        TABLE_HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// Tables one after the other, each on a border that suits the strictest of them.
struct Blob {
    at: Gpa,
    bytes: Vec<u8>,
}

impl Blob {
    fn push(&mut self, table: &[u8]) -> Gpa {
        let alignment = usize::try_from(ALIGNMENT).expect("64 fits");
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
        let offset = u64::try_from(self.bytes.len()).expect("tables are small");
        self.bytes.extend_from_slice(table);
        self.at
            .checked_add(offset)
            .expect("tables lie in guest RAM, which does not wrap")
    }
}

/// MCFG: each root complex's part of its segment's ECAM, which begins with bus 0 whatever the part (PCI Firmware
/// Specification 3.3, section 4.1.2). Guests look for devices on every bus that is listed.
fn mcfg(pci: &PciTree) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for segment in &pci.segments {
        for root in &segment.roots {
            let (first, last) = (*root.buses.start(), *root.buses.end());
            mcfg.add_ecam(segment.ecam.start().0, segment.number, first, last);
        }
    }
    bytes_of(&mcfg)
}

/// A table or an AML object as bytes.
fn bytes_of(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
