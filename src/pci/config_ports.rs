//! Configuration by ports 0xCF8 and 0xCFC: segment 0, first 256 bytes of each function.
//!
//! PCI Local Bus Specification 3.2.2.3.2.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::access::{DwordWrite, read_dwords, write_dwords};
use super::topology::Topology;
use crate::platform::addr::Bdf;
use crate::platform::bus::BusDevice;

/// CONFIG_ADDRESS: configuration accesses on.
const ENABLE: u32 = 1 << 31;
/// CONFIG_ADDRESS: enable, bus, device, function, dword. The others read zero.
const ADDRESS: u32 = 0x80ff_fffc;
/// Offset of CONFIG_DATA.
const DATA: u64 = 4;

/// CONFIG_ADDRESS and CONFIG_DATA: the eight ports from 0xCF8 on.
///
/// Only a whole dword reaches CONFIG_ADDRESS; narrower accesses there are nobody's here, so that whoever
/// claims the ports can put the reset control register of chipsets, a byte at 0xCF9, in front.
pub struct ConfigPorts {
    topology: Arc<Topology>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The ports in front of segment 0 of `topology`.
    #[must_use]
    pub fn new(topology: Arc<Topology>) -> Self {
        Self {
            topology,
            address: AtomicU32::new(0),
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }

    /// The function and dword that CONFIG_DATA stands for at present.
    fn target(&self) -> Option<(Bdf, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let [register, low, high, _] = address.to_le_bytes();
        let bdf = Bdf::from_requester_id(u16::from_le_bytes([low, high]));
        (address & ENABLE != 0).then(|| (bdf, u16::from(register / 4)))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            return data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        }
        match (offset.checked_sub(DATA), self.target()) {
            (Some(lane), Some((bdf, dword))) => read_dwords(lane, data, |index| {
                if index == 0 {
                    self.topology.config_read(0, bdf, dword)
                } else {
                    u32::MAX
                }
            }),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            return self
                .address
                .store(u32::from_le_bytes(address) & ADDRESS, Ordering::Relaxed);
        }
        if let (Some(lane), Some((bdf, dword))) = (offset.checked_sub(DATA), self.target()) {
            write_dwords(lane, data, |index, write: DwordWrite| {
                if index == 0 {
                    self.topology.config_write(0, bdf, dword, write);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
