//! Extended interrupt remapping: where interrupts of guests' units go.
//!
//! A table of two levels that the entry of the unit's own function names by its interrupt root, in system memory
//! ([`InterruptTablePointer`] has the index). An entry names a processor of the guest by its virtual APIC, as AMD's driver
//! writes it, or like any other remapping entry a vector and a processor of the machine.
//!
//! | what stands there | what becomes of the interrupt |
//! |---|---|
//! | no table: IV is 0, or IntCtl does not say "remapped" | held back |
//! | no second level, or RemapEn is 0, or a vector below 16 | held back |
//! | GuestMode 0 | a message |
//! | GuestMode 1 | the vector's bit in the IRR of the backing page |
//! | memory that does not answer | held back, and VIOMMU_HARDWARE_ERROR |
//!
//! Nothing of it is cached, so that INVALIDATE_INTERRUPT_TABLE has nothing to do here.

use super::maps::Broken;
use crate::iommu::amd::device_table::{InterruptControl, interrupt_half_is_reserved, read_pair};
use crate::iommu::amd::memory::{SystemMemory, Unreachable, change};
use crate::iommu::amd::remap::Delivery;
use crate::iommu::amd::spec::irte::{IrteGa, IrteGuest};
use crate::iommu::amd::spec::viommu::InterruptTablePointer;
use crate::iommu::amd::{Effects, Unit};
use crate::platform::addr::{Bdf, Gpa};

/// Where the backing page of a virtual APIC has the IRR: 32 bits each, 16 bytes apart (publication 24593, section 15.29).
const IRR: u64 = 0x200;
/// Lower vectors are no interrupts of a local APIC.
pub const FIRST_VECTOR: u8 = 16;

/// By which log a guest is interrupted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestLog {
    /// The event log, and COMPLETION_WAIT.
    Event,
    /// The PPR log.
    Ppr,
}

impl GuestLog {
    /// Bits 17:16 of the index.
    const fn number(self) -> u64 {
        match self {
            Self::Event => 0,
            Self::Ppr => 1,
        }
    }

    /// The entry of the interrupt of this log of `guest`, of 2^18.
    #[must_use]
    pub fn index(self, guest: u16) -> u64 {
        self.number() << 16 | u64::from(guest)
    }
}

/// What became of an interrupt of a guest's unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestInterrupt {
    /// It is to be sent, by the unit itself.
    Message(Delivery),
    /// It stands in the IRR of a virtual APIC.
    Posted(Posted),
}

/// An interrupt in a virtual APIC, and what its entry says of the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Posted {
    /// What software calls the processor.
    pub tag: u32,
    /// It runs, at `destination`.
    pub running: bool,
    /// APIC ID of the machine's processor.
    pub destination: u32,
    /// Vector.
    pub vector: u8,
}

impl<M: SystemMemory> Unit<M> {
    /// Send the interrupt of `log` of `guest` wherever its entry says; `None` when it is held back.
    pub fn remap_guest_interrupt(&self, guest: u16, log: GuestLog) -> (Option<GuestInterrupt>, Effects) {
        let Some((guests, known)) = self.guest(guest) else {
            return (None, Effects::default());
        };
        let Some(root) = self.interrupt_root(guests.own) else {
            return (None, Effects::default());
        };
        match self.deliver(root, log.index(guest)) {
            Ok(found) => (found, Effects::default()),
            Err(broken) => (None, self.unbroken(&known, Err(broken))),
        }
    }

    /// Where the first level is, if there is one.
    fn interrupt_root(&self, own: Bdf) -> Option<u64> {
        let dte = self.entry(own).ok()?;
        let remapped = InterruptControl::of(dte.interrupt) == InterruptControl::Remap;
        let usable = dte.interrupt.iv() && remapped && !interrupt_half_is_reserved(&dte);
        usable.then(|| (dte.interrupt.root() << 6) & !(InterruptTablePointer::TABLE_LEN - 1))
    }

    fn deliver(&self, root: u64, index: u64) -> Result<Option<GuestInterrupt>, Broken> {
        let at = root + (index >> 8) * InterruptTablePointer::LEN;
        let pointer = self.memory.load(Gpa(at)).map_err(|Unreachable| Broken { at })?;
        let pointer = InterruptTablePointer::from_bits(pointer);
        if !pointer.valid() {
            return Ok(None);
        }
        let at = (pointer.root() << 6) + (index & 0xff) * IrteGa::LEN;
        let [low, high] = read_pair(&self.memory, Gpa(at)).map_err(|Unreachable| Broken { at })?;
        let bits = u128::from(low) | u128::from(high) << 64;
        let entry = IrteGuest::from_bits(bits);
        if !entry.remap_en() || entry.vector() < FIRST_VECTOR {
            return Ok(None);
        }
        if entry.guest_mode() {
            return self.post(entry).map(Some);
        }
        let entry = IrteGa::from_bits(bits);
        let message = Delivery {
            destination: u32::from(entry.destination_31_24()) << 24 | entry.destination_23_0(),
            logical: entry.dm(),
            arbitrated: entry.int_type() == 1,
            vector: entry.vector(),
            level: false,
            asserted: false,
        };
        Ok((entry.int_type() <= 1).then_some(GuestInterrupt::Message(message)))
    }

    /// Set the vector's bit in the virtual APIC.
    fn post(&self, entry: IrteGuest) -> Result<GuestInterrupt, Broken> {
        let vector = entry.vector();
        let at = (entry.backing_page() << 12) + IRR + u64::from(vector >> 5) * 0x10;
        change(&self.memory, Gpa(at), |irr| irr | 1 << (vector & 31)).map_err(|Unreachable| Broken { at })?;
        Ok(GuestInterrupt::Posted(Posted {
            tag: entry.ga_tag(),
            running: entry.is_run(),
            destination: u32::from(entry.destination_31_24()) << 24 | entry.destination_23_0(),
            vector,
        }))
    }
}
