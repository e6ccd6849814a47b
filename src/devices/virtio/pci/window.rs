//! The window by which configuration accesses reach the BAR (4.1.4.9).

use super::BAR;
use crate::pci::ConfigEffect;
use crate::pci::access::DwordWrite;
use crate::pci::capability::{Capability, CapabilityId};

/// Structure type of the capability.
pub(super) const CFG_PCI: u8 = 5;

/// The capability.
#[derive(Debug, Default)]
pub(super) struct Window {
    bar: u8,
    offset: u32,
    length: u32,
}

impl Window {
    /// Its last dword: the data.
    pub(super) const DATA: u16 = 4;

    /// Offset and length of the access, if they make one.
    pub(super) fn target(&self) -> Option<(u64, usize)> {
        let len = match self.length {
            1 | 2 | 4 => self.length,
            _ => return None,
        };
        let fits = self.bar == BAR.index
            && self.offset.is_multiple_of(len)
            && u64::from(self.offset) + u64::from(len) <= BAR.size;
        let len = usize::try_from(len).expect("at most 4");
        fits.then_some((u64::from(self.offset), len))
    }
}

impl Capability for Window {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x09)
    }

    fn len(&self) -> u16 {
        20
    }

    fn read(&self, dword: u16) -> u32 {
        match dword {
            0 => u32::from(CFG_PCI) << 24 | 20 << 16,
            1 => u32::from(self.bar),
            2 => self.offset,
            3 => self.length,
            _ => 0,
        }
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        match dword {
            1 => self.bar = write.store(u32::from(self.bar), 0xff).to_le_bytes()[0],
            2 => self.offset = write.store(self.offset, u32::MAX),
            3 => self.length = write.store(self.length, u32::MAX),
            _ => {}
        }
        ConfigEffect::empty()
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}
