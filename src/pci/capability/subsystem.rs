//! The subsystem IDs of a bridge, whose header has no room for them (PCI Express Base Specification 7.9.23).

use super::{Capability, CapabilityId};
use crate::pci::access::DwordWrite;
use crate::pci::function::ConfigEffect;

/// Subsystem vendor ID and subsystem ID of a function with a type 1 header.
pub struct Subsystem {
    /// Who made the board.
    pub vendor: u16,
    /// What they call it.
    pub id: u16,
}

impl Capability for Subsystem {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x0d)
    }

    fn len(&self) -> u16 {
        8
    }

    fn read(&self, dword: u16) -> u32 {
        if dword == 1 {
            u32::from(self.vendor) | u32::from(self.id) << 16
        } else {
            0
        }
    }

    fn write(&mut self, _dword: u16, _write: DwordWrite) -> ConfigEffect {
        ConfigEffect::empty()
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vendor_comes_first_and_nothing_is_writable() {
        let mut subsystem = Subsystem {
            vendor: 0x1af4,
            id: 0x1100,
        };
        let _ = subsystem.write(1, DwordWrite::whole(0));
        assert_eq!((subsystem.read(0), subsystem.read(1)), (0, 0x1100_1af4));
    }
}
