//! Alternative routing-ID interpretation of an endpoint (PCI Express Base Specification 7.8.8).

use super::{Capability, CapabilityId};
use crate::pci::access::DwordWrite;
use crate::pci::function::ConfigEffect;

/// ARI without function groups: the functions of a device as a linked list.
pub struct AlternativeRouting {
    /// The next higher function number of the device, or 0 for the last.
    pub next_function: u8,
}

impl Capability for AlternativeRouting {
    fn id(&self) -> CapabilityId {
        CapabilityId::Extended {
            id: 0x000e,
            version: 1,
        }
    }

    fn len(&self) -> u16 {
        8
    }

    fn read(&self, dword: u16) -> u32 {
        if dword == 1 {
            u32::from(self.next_function) << 8
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
    fn the_next_function_is_in_the_second_byte_and_stays() {
        let mut ari = AlternativeRouting { next_function: 9 };
        let _ = ari.write(1, DwordWrite::whole(u32::MAX));
        assert_eq!(ari.read(1), 0x0900);
    }
}
