//! The memory-mapped configuration space of one segment (PCI Express Base Specification 7.2.2).

use std::sync::Arc;

use super::access::{read_dwords, write_dwords};
use super::topology::Topology;
use crate::platform::addr::Bdf;
use crate::platform::bus::BusDevice;

/// Bytes of a function's configuration space, and the shift from one function to the next.
const FUNCTION_BYTES: u64 = 4096;

/// A segment's ECAM: 256 MiB, 4 KiB per function in order of BDF.
///
/// An access that runs beyond a function's 4 KiB sees all ones there and writes nothing.
pub struct Ecam {
    topology: Arc<Topology>,
    segment: u16,
}

impl Ecam {
    /// The ECAM of segment `segment`.
    #[must_use]
    pub fn new(topology: Arc<Topology>, segment: u16) -> Self {
        Self { topology, segment }
    }
}

/// Function and offset of a byte of the ECAM; `None` beyond bus 255.
fn split(offset: u64) -> Option<(Bdf, u64)> {
    let function = u16::try_from(offset / FUNCTION_BYTES).ok()?;
    Some((Bdf::from_requester_id(function), offset % FUNCTION_BYTES))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Some((bdf, register)) = split(offset) else {
            return data.fill(0xff);
        };
        read_dwords(register, data, |dword| {
            u16::try_from(dword).map_or(u32::MAX, |dword| {
                self.topology.config_read(self.segment, bdf, dword)
            })
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((bdf, register)) = split(offset) else {
            return;
        };
        write_dwords(register, data, |dword, write| {
            if let Ok(dword) = u16::try_from(dword) {
                self.topology.config_write(self.segment, bdf, dword, write);
            }
        });
    }
}

#[cfg(test)]
mod tests;
