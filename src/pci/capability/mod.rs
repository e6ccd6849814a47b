//! Capabilities, and the list that links them.
//!
//! A capability knows its registers, by dword from its own start; the list owns identifiers, offsets and
//! next pointers (PCI Express Base Specification 7.5.1.1.11 and 7.6.3). Guests walk the lists once per
//! capability they look for, so those that are looked for most go first.

mod access_control;
mod error_reporting;
mod express;
mod msi;
mod msix;
mod one_register;
mod page_requests;
mod power;
mod process_address_space;
mod subsystem;
mod translation_services;
mod vendor;

pub use access_control::AccessControl;
pub use error_reporting::{ErrorReporting, Severity};
pub use express::{Express, PortType};
pub use msi::Msi;
pub use msix::{Msix, MsixLayout, MsixTable, Raised, VectorChanged};
pub use page_requests::PageRequests;
pub use power::PowerManagement;
pub use process_address_space::ProcessAddressSpace;
pub use subsystem::Subsystem;
pub use translation_services::TranslationServices;
pub use vendor::VendorSpecific;

use std::any::Any;

use super::access::DwordWrite;
use super::function::{CONFIG_DWORDS, ConfigEffect};

/// First byte behind the header that a capability may use.
const STANDARD_START: u16 = 0x40;
/// First byte of extended configuration space, where the first extended capability is.
const EXTENDED_START: u16 = 0x100;
/// One past the last byte of extended configuration space.
const END: u16 = CONFIG_DWORDS * 4;

/// Which of the two lists a capability is in, and as what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CapabilityId {
    /// In the first 256 bytes, by capability ID.
    Standard(u8),
    /// In extended configuration space.
    Extended {
        /// Extended capability ID.
        id: u16,
        /// Version of its layout, 1 to 15.
        version: u8,
    },
}

/// One capability of a function.
#[expect(clippy::len_without_is_empty, reason = "a capability has a header at least")]
pub trait Capability: Any + Send {
    /// What it is.
    fn id(&self) -> CapabilityId;

    /// Bytes it takes, header included.
    fn len(&self) -> u16;

    /// Read its `dword`-th dword. What is returned for the header's own bits (the lower half of dword 0 of
    /// a standard capability, all of it of an extended one) does not matter.
    fn read(&self, dword: u16) -> u32;

    /// Write its `dword`-th dword; lanes of the header's own bits never arrive.
    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect;

    /// As after power-on.
    fn reset(&mut self);
}

/// Every capability of one function, linked.
#[derive(Default)]
pub struct CapabilityList {
    /// In ascending order of offset.
    entries: Vec<Entry>,
}

struct Entry {
    /// In bytes.
    offset: u16,
    /// Offset of the next one in the same list, or 0.
    next: u16,
    capability: Box<dyn Capability>,
}

impl Entry {
    fn end(&self) -> u16 {
        self.offset + self.capability.len().next_multiple_of(4)
    }

    fn is_extended(&self) -> bool {
        self.offset >= EXTENDED_START
    }

    /// The header's own bits, and which bits they are.
    fn header(&self) -> (u32, u32) {
        match self.capability.id() {
            CapabilityId::Standard(id) => (u32::from(id) | u32::from(self.next) << 8, 0xffff),
            CapabilityId::Extended { id, version } => (
                u32::from(id) | u32::from(version) << 16 | u32::from(self.next) << 20,
                u32::MAX,
            ),
        }
    }
}

impl CapabilityList {
    /// Add `capability` at the end of its list and return its offset in bytes.
    ///
    /// # Panics
    ///
    /// When its list has no room left: the device's code is wrong then.
    pub fn push(&mut self, capability: Box<dyn Capability>) -> u16 {
        let extended = matches!(capability.id(), CapabilityId::Extended { .. });
        let (start, end) = if extended {
            (EXTENDED_START, END)
        } else {
            (STANDARD_START, EXTENDED_START)
        };
        let previous = self
            .entries
            .iter_mut()
            .rfind(|entry| entry.is_extended() == extended);
        let offset = previous.as_ref().map_or(start, |entry| entry.end());
        assert!(
            capability.len() >= 4
                && offset
                    .checked_add(capability.len())
                    .is_some_and(|last| last <= end),
            "{:?} of {} bytes does not fit at {offset:#x}",
            capability.id(),
            capability.len()
        );
        if let Some(previous) = previous {
            previous.next = offset;
        }
        let at = self.entries.partition_point(|entry| entry.offset < offset);
        self.entries.insert(
            at,
            Entry {
                offset,
                next: 0,
                capability,
            },
        );
        offset
    }

    /// The Capabilities Pointer: offset of the first standard capability, or 0.
    #[must_use]
    pub fn first(&self) -> u8 {
        let first = self.entries.first().filter(|entry| !entry.is_extended());
        first.map_or(0, |entry| entry.offset.to_le_bytes()[0])
    }

    /// The first capability of type `C`.
    #[must_use]
    pub fn get<C: Capability>(&self) -> Option<&C> {
        self.entries.iter().find_map(|entry| {
            let any: &dyn Any = &*entry.capability;
            any.downcast_ref()
        })
    }

    /// The first capability of type `C`, to change what the guest sees of it.
    pub fn get_mut<C: Capability>(&mut self) -> Option<&mut C> {
        self.entries.iter_mut().find_map(|entry| {
            let any: &mut dyn Any = &mut *entry.capability;
            any.downcast_mut()
        })
    }

    /// Read a dword behind the header; 0 where no capability is.
    #[must_use]
    pub fn read(&self, dword: u16) -> u32 {
        self.index(dword).map_or(0, |(index, within)| {
            let entry = &self.entries[index];
            let value = entry.capability.read(within);
            if within > 0 {
                return value;
            }
            let (header, mask) = entry.header();
            value & !mask | header
        })
    }

    /// Write a dword behind the header; ignored where no capability is.
    pub fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let Some((index, within)) = self.index(dword) else {
            return ConfigEffect::empty();
        };
        let entry = &mut self.entries[index];
        let mask = if within == 0 { entry.header().1 } else { 0 };
        write.restrict(!mask).map_or(ConfigEffect::empty(), |write| {
            entry.capability.write(within, write)
        })
    }

    /// Every capability as after power-on.
    pub fn reset(&mut self) {
        for entry in &mut self.entries {
            entry.capability.reset();
        }
    }

    /// Which entry `dword` belongs to, and the dword inside it.
    fn index(&self, dword: u16) -> Option<(usize, u16)> {
        let byte = dword.checked_mul(4)?;
        let index = self
            .entries
            .partition_point(|entry| entry.offset <= byte)
            .checked_sub(1)?;
        let entry = &self.entries[index];
        (byte < entry.end()).then(|| (index, (byte - entry.offset) / 4))
    }
}

#[cfg(test)]
mod tests;
