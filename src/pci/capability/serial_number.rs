//! The device serial number (PCI Express Base Specification 7.9.3).

use super::{Capability, CapabilityId};
use crate::pci::access::DwordWrite;
use crate::pci::function::ConfigEffect;

/// A 64-bit EUI-64 that names one device.
pub struct SerialNumber(pub u64);

impl Capability for SerialNumber {
    fn id(&self) -> CapabilityId {
        CapabilityId::Extended {
            id: 0x0003,
            version: 1,
        }
    }

    fn len(&self) -> u16 {
        12
    }

    fn read(&self, dword: u16) -> u32 {
        let [a, b, c, d, e, f, g, h] = self.0.to_le_bytes();
        match dword {
            1 => u32::from_le_bytes([a, b, c, d]),
            2 => u32::from_le_bytes([e, f, g, h]),
            _ => 0,
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
    fn the_lower_half_comes_first_and_nothing_is_writable() {
        let mut serial = SerialNumber(0x1122_3344_5566_7788);
        let _ = serial.write(1, DwordWrite::whole(0));
        assert_eq!((serial.read(1), serial.read(2)), (0x5566_7788, 0x1122_3344));
    }
}
