//! The vendor-specific capability (PCI Express Base Specification 7.9.4): virtio's register locations.

use std::ops::Range;

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;

/// A vendor's bytes behind the three that the specification defines.
pub struct VendorSpecific {
    registers: Vec<Register>,
    len: u16,
}

impl VendorSpecific {
    /// A capability whose bytes from offset 3 on are `body`, all read-only.
    ///
    /// # Panics
    ///
    /// When `body` is empty or longer than the 189 bytes the list could hold.
    #[must_use]
    pub fn new(body: &[u8]) -> Self {
        Self::with_writable(body, 0..0)
    }

    /// The same, where the guest may change the bytes at `writable`, offsets from the capability's start.
    ///
    /// # Panics
    ///
    /// As [`VendorSpecific::new`].
    #[must_use]
    pub fn with_writable(body: &[u8], writable: Range<usize>) -> Self {
        assert!(
            (1..=189).contains(&body.len()),
            "{} bytes are no vendor capability",
            body.len()
        );
        let len = u8::try_from(body.len() + 3).expect("at most 192");
        let mut bytes = vec![0, 0, len];
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let mask = |at: usize| if writable.contains(&at) && at > 2 { 0xff } else { 0 };
        let register = |(index, dword): (usize, &[u8])| {
            let value = u32::from_le_bytes(dword.try_into().expect("chunks of four"));
            Register::writable(
                value,
                u32::from_le_bytes([0, 1, 2, 3].map(|lane| mask(index * 4 + lane))),
            )
        };
        Self {
            registers: bytes.chunks_exact(4).enumerate().map(register).collect(),
            len: u16::from(len),
        }
    }
}

impl Capability for VendorSpecific {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x09)
    }

    fn len(&self) -> u16 {
        self.len
    }

    fn read(&self, dword: u16) -> u32 {
        self.registers
            .get(usize::from(dword))
            .map_or(0, |register| register.get())
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        if let Some(register) = self.registers.get_mut(usize::from(dword)) {
            register.write(write);
        }
        ConfigEffect::empty()
    }

    fn reset(&mut self) {
        self.registers.iter_mut().for_each(Register::reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_byte_comes_before_the_body() {
        let capability = VendorSpecific::new(&[0xaa, 0xbb, 0xcc]);
        assert_eq!(
            (capability.len(), capability.read(0), capability.read(1)),
            (6, 0xaa06_0000, 0xccbb)
        );
        assert_eq!(capability.read(2), 0);
    }

    #[test]
    fn only_the_bytes_that_are_writable_change_and_reset_brings_them_back() {
        let mut capability = VendorSpecific::with_writable(&[1, 2, 3, 4, 5], 4..6);
        let _ = capability.write(0, DwordWrite::whole(u32::MAX));
        let _ = capability.write(1, DwordWrite::whole(u32::MAX));
        let _ = capability.write(2, DwordWrite::whole(u32::MAX));
        assert_eq!(
            (capability.read(0), capability.read(1)),
            (0x0108_0000, 0x0504_ffff)
        );
        capability.reset();
        assert_eq!(capability.read(1), 0x0504_0302);
    }
}
