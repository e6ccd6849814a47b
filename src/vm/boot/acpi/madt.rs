//! MADT: the processors' interrupt controllers and the I/O APIC.
//!
//! ACPI specification 6.5, section 5.2.12.

use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};
use zerocopy::{Immutable, IntoBytes};

use super::board;
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::platform::addr::GpaRange;
use crate::vm::layout;

/// Polarity and trigger mode of an interrupt (MPS INTI flags, ACPI 6.5, table 5.26).
mod inti {
    /// As the bus has it.
    pub(super) const CONFORMS: u16 = 0;
    /// Active high, level-triggered.
    pub(super) const HIGH_LEVEL: u16 = 0b1101;
}

/// The revision that goes with the FADT's 6.5.
const REVISION: u8 = 6;
/// The ISA bus, the only one whose interrupts can be overridden.
const ISA: u8 = 0;
/// The local interrupt input that carries NMI.
const LINT1: u8 = 1;

/// Processor Local x2APIC (type 9), for APIC IDs that 8 bits cannot hold.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: [u8; 2],
    x2apic_id: [u8; 4],
    flags: [u8; 4],
    processor_uid: [u8; 4],
}

/// Interrupt Source Override (type 2).
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct InterruptSourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: [u8; 4],
    flags: [u8; 2],
}

/// Local APIC NMI (type 4).
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct LocalApicNmi {
    kind: u8,
    length: u8,
    processor_uid: u8,
    flags: [u8; 2],
    input: u8,
}

/// Local x2APIC NMI (type 0Ah).
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct LocalX2ApicNmi {
    kind: u8,
    length: u8,
    flags: [u8; 2],
    processor_uid: [u8; 4],
    input: u8,
    reserved: [u8; 3],
}

macro_rules! entry {
    ($name:ty, $kind:literal, $length:literal) => {
        const _: () = assert!(size_of::<$name>() == $length);

        impl $name {
            const KIND: u8 = $kind;
            const LENGTH: u8 = $length;
        }

        impl Aml for $name {
            fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
                sink.vec(self.as_bytes());
            }
        }
    };
}

entry!(InterruptSourceOverride, 2, 10);
entry!(LocalApicNmi, 4, 6);
entry!(LocalX2Apic, 9, 16);
entry!(LocalX2ApicNmi, 0x0a, 12);

/// The table for processors with these APIC IDs, in the order of their UIDs: processor `n` has UID `n`,
/// here and in the DSDT.
///
/// An ID below 255 is a local APIC entry and any other an x2APIC entry (5.2.12.12). `hpet` says whether
/// there is an HPET, whose legacy replacement puts ISA interrupt 0 on input 2.
pub(super) fn madt(apic_ids: &[u32], hpet: bool) -> Vec<u8> {
    // PCAT_COMPAT stays clear: there is no pair of 8259s.
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(below_4_gib(layout::LOCAL_APIC)),
    );
    for (uid, &apic_id) in (0..).zip(apic_ids) {
        match (u8::try_from(uid), u8::try_from(apic_id)) {
            (Ok(uid), Ok(apic_id)) if apic_id < u8::MAX => {
                madt.add_structure(ProcessorLocalApic::new(uid, apic_id, EnabledStatus::Enabled));
            }
            _ => madt.add_structure(x2apic(uid, apic_id)),
        }
    }
    madt.add_structure(IoApic::new(board::IOAPIC_ID, below_4_gib(layout::IOAPIC), 0));
    if hpet {
        madt.add_structure(isa_override(0, board::HPET_LEGACY_GSI, inti::CONFORMS));
    }
    madt.add_structure(isa_override(board::SCI_IRQ, board::SCI_GSI, inti::HIGH_LEVEL));
    madt.add_structure(LocalApicNmi {
        kind: LocalApicNmi::KIND,
        length: LocalApicNmi::LENGTH,
        // All ones: every processor.
        processor_uid: u8::MAX,
        flags: inti::CONFORMS.to_le_bytes(),
        input: LINT1,
    });
    if apic_ids.iter().any(|&id| id >= u32::from(u8::MAX)) {
        madt.add_structure(LocalX2ApicNmi {
            kind: LocalX2ApicNmi::KIND,
            length: LocalX2ApicNmi::LENGTH,
            flags: inti::CONFORMS.to_le_bytes(),
            processor_uid: u32::MAX.to_le_bytes(),
            input: LINT1,
            reserved: [0; 3],
        });
    }
    revised(bytes_of(&madt))
}

/// The crate calls every MADT the first revision, which has no x2APIC entries.
fn revised(mut table: Vec<u8>) -> Vec<u8> {
    const REVISION_AT: usize = 8;
    const CHECKSUM_AT: usize = 9;
    let change = REVISION.wrapping_sub(table[REVISION_AT]);
    table[REVISION_AT] = REVISION;
    table[CHECKSUM_AT] = table[CHECKSUM_AT].wrapping_sub(change);
    table
}

fn x2apic(uid: u32, apic_id: u32) -> LocalX2Apic {
    LocalX2Apic {
        kind: LocalX2Apic::KIND,
        length: LocalX2Apic::LENGTH,
        reserved: [0; 2],
        x2apic_id: apic_id.to_le_bytes(),
        flags: (EnabledStatus::Enabled as u32).to_le_bytes(),
        processor_uid: uid.to_le_bytes(),
    }
}

fn isa_override(source: u8, gsi: u8, flags: u16) -> InterruptSourceOverride {
    InterruptSourceOverride {
        kind: InterruptSourceOverride::KIND,
        length: InterruptSourceOverride::LENGTH,
        bus: ISA,
        source,
        gsi: u32::from(gsi).to_le_bytes(),
        flags: flags.to_le_bytes(),
    }
}

fn below_4_gib(unit: GpaRange) -> u32 {
    u32::try_from(unit.start().0).expect("the fixed units lie below 4 GiB")
}
