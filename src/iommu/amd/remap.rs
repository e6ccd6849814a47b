//! Interrupt remapping: from a device's message to the interrupt its table names (section 2.2.5).

use super::device_table::{InterruptControl, interrupt_half_is_reserved, read_pair};
use super::events::{Event, Kind, PageFault, Source, Tag};
use super::memory::SystemMemory;
use super::spec::dte::{Dte, Interrupt};
use super::spec::irte::{Irte, IrteGa};
use super::spec::registers::Control;
use crate::platform::addr::{Bdf, Gpa};
use crate::platform::msi::MsiMessage;

/// Address bits 63:20 of a message that is an interrupt.
const WINDOW: u64 = 0xfee;

/// Largest logarithm of a table's length.
const LONGEST_TABLE: u8 = 11;

/// Whether a write to `address` is an interrupt rather than a memory write.
#[must_use]
pub const fn is_interrupt(address: u64) -> bool {
    address >> 20 == WINDOW
}

/// What a device's message became.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remapped {
    /// It goes out as it came.
    Unchanged,
    /// It goes out as this.
    To(Delivery),
    /// It is no interrupt: a memory write, to be translated like one.
    MemoryWrite,
}

/// An interrupt as its remapping entry describes it. A 32-bit destination fits no message, so it has none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Delivery {
    /// APIC ID, or a logical destination.
    pub destination: u32,
    /// How `destination` is meant.
    pub logical: bool,
    /// Arbitrated (lowest priority) rather than fixed.
    pub arbitrated: bool,
    /// Vector.
    pub vector: u8,
    /// Level-triggered, as the message said.
    pub level: bool,
    /// The line is asserted, of a level-triggered one.
    pub asserted: bool,
}

/// Why a message went nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lost {
    /// What is reported, if anything is.
    pub event: Option<Event>,
}

impl Lost {
    const SILENTLY: Self = Self { event: None };
}

/// Delivery modes of a message, data bits 10:8.
mod delivery_mode {
    pub(super) const FIXED: u32 = 0;
    pub(super) const ARBITRATED: u32 = 1;
    pub(super) const NMI: u32 = 4;
    pub(super) const INIT: u32 = 5;
    pub(super) const EXT_INT: u32 = 7;
}

/// One message on its way through a unit that is on.
#[derive(Clone, Copy, Debug)]
pub struct Remapping<'a> {
    /// Who sent it.
    pub device: Bdf,
    /// What it sent.
    pub message: MsiMessage,
    /// The device's entry.
    pub dte: &'a Dte,
    /// Control.
    pub control: Control,
}

impl Remapping<'_> {
    /// By what the message is reported.
    fn source(&self) -> Source {
        Source {
            device: self.device,
            address: self.message.address,
            tag: Tag::Domain(self.dte.guest.domain()),
            write: false,
            kind: Kind::Interrupt,
        }
    }

    /// A page fault, unless the device's entry suppresses those.
    fn fault(&self, fault: PageFault) -> Lost {
        let source = self.source();
        let event = Event::PageFault { source, fault };
        Lost {
            event: (!self.dte.interrupt.ig()).then_some(event),
        }
    }

    fn illegal(&self, reserved: bool) -> Lost {
        let source = self.source();
        let event = Event::IllegalDeviceTableEntry { source, reserved };
        Lost { event: Some(event) }
    }

    /// Whether the message's data holds nothing but an index: 2,048-entry mode, and the address says so.
    fn is_plain_index(&self) -> bool {
        self.control.num_int_remap_mode() == 1 && self.message.address & 4 != 0
    }

    /// What becomes of the message (the order of the questions counts).
    pub fn outcome<M: SystemMemory>(&self, memory: &M) -> Result<Remapped, Lost> {
        let interrupt = self.dte.interrupt;
        if !interrupt.iv() {
            return Ok(Remapped::Unchanged);
        }
        if interrupt_half_is_reserved(self.dte) {
            return Err(self.illegal(true));
        }
        if !self.is_plain_index() {
            match self.message.data >> 8 & 7 {
                delivery_mode::FIXED | delivery_mode::ARBITRATED => {}
                delivery_mode::NMI => return self.pass(interrupt.nmi_pass()),
                delivery_mode::INIT => return self.pass(interrupt.init_pass()),
                delivery_mode::EXT_INT => return self.pass(interrupt.eint_pass()),
                // SMI, which this machine has not, and reserved codes.
                _ => return Err(Lost::SILENTLY),
            }
        }
        match InterruptControl::of(interrupt) {
            InterruptControl::Forward => Ok(Remapped::Unchanged),
            InterruptControl::Remap => self.remap(memory, interrupt).map(Remapped::To),
            InterruptControl::Reserved => Err(self.illegal(true)),
            InterruptControl::Abort => {
                let source = self.source();
                let event = Event::InvalidDeviceRequest { source, kind: 5 };
                Err(Lost { event: Some(event) })
            }
        }
    }

    /// An interrupt that no table remaps passes by a bit of the entry.
    fn pass(&self, allowed: bool) -> Result<Remapped, Lost> {
        if allowed {
            Ok(Remapped::Unchanged)
        } else {
            Err(self.fault(PageFault::NotPresent))
        }
    }

    fn remap<M: SystemMemory>(&self, memory: &M, interrupt: Interrupt) -> Result<Delivery, Lost> {
        if interrupt.table_length() > LONGEST_TABLE {
            return Err(self.illegal(false));
        }
        let index = u64::from(self.message.data & 0x7ff);
        if index >> interrupt.table_length() != 0 {
            return Err(self.fault(PageFault::NotPresent));
        }
        let root = interrupt.root() << 6;
        if self.control.ga_en() {
            self.long(memory, Gpa(root + index * IrteGa::LEN))
        } else {
            self.short(memory, Gpa(root + index * Irte::LEN))
        }
    }

    fn unreadable(&self, at: Gpa) -> Lost {
        let source = self.source();
        let event = Event::PageTableHardwareError { source, at };
        Lost { event: Some(event) }
    }

    /// By a 32-bit entry.
    fn short<M: SystemMemory>(&self, memory: &M, at: Gpa) -> Result<Delivery, Lost> {
        let quadword = memory.load(Gpa(at.0 & !7)).map_err(|_| self.unreadable(at))?;
        let [b0, b1, b2, b3, b4, b5, b6, b7] = quadword.to_le_bytes();
        let bytes = if at.0 & 4 == 0 {
            [b0, b1, b2, b3]
        } else {
            [b4, b5, b6, b7]
        };
        let entry = Irte::from_bits(u32::from_le_bytes(bytes));
        let reserved = entry.into_bits() & Irte::RESERVED != 0;
        let malformed = reserved || entry.guest_mode() || entry.int_type() > 1;
        self.check(entry.remap_en(), entry.sup_iopf(), malformed)?;
        Ok(self.delivery(
            u32::from(entry.destination()),
            entry.dm(),
            entry.int_type(),
            entry.vector(),
        ))
    }

    /// By a 128-bit entry.
    fn long<M: SystemMemory>(&self, memory: &M, at: Gpa) -> Result<Delivery, Lost> {
        let [low, high] = read_pair(memory, at).map_err(|_| self.unreadable(at))?;
        let entry = IrteGa::from_bits(u128::from(low) | u128::from(high) << 64);
        let reserved = entry.into_bits() & IrteGa::RESERVED != 0;
        let malformed = reserved || entry.guest_mode() || entry.int_type() > 1;
        self.check(entry.remap_en(), entry.sup_iopf(), malformed)?;
        let destination = if self.control.xt_en() {
            u32::from(entry.destination_31_24()) << 24 | entry.destination_23_0()
        } else {
            entry.destination_23_0() & 0xff
        };
        Ok(self.delivery(destination, entry.dm(), entry.int_type(), entry.vector()))
    }

    /// Whether an entry can be used. An entry that is off says nothing else, not even to stay silent: what
    /// Linux leaves in entries it has reserved sets every other bit.
    fn check(&self, remap_en: bool, sup_iopf: bool, malformed: bool) -> Result<(), Lost> {
        match (remap_en, malformed) {
            (false, _) => Err(self.fault(PageFault::NotPresent)),
            (true, true) if sup_iopf => Err(Lost::SILENTLY),
            (true, true) => Err(self.fault(PageFault::Reserved)),
            (true, false) => Ok(()),
        }
    }

    fn delivery(&self, destination: u32, logical: bool, int_type: u8, vector: u8) -> Delivery {
        Delivery {
            destination,
            logical,
            arbitrated: int_type == 1,
            vector,
            level: self.message.data >> 15 & 1 == 1,
            asserted: self.message.data >> 14 & 1 == 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_writes_to_one_mebibyte() {
        assert!(is_interrupt(0xfee0_0000) && is_interrupt(0xfeef_ffff));
        for address in [0xfedf_ffff, 0xfef0_0000, 0x1_fee0_0000, u64::MAX] {
            assert!(!is_interrupt(address), "{address:#x}");
        }
    }
}
