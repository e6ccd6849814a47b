//! The stretch below 1 MiB from which boot information is handed out piece by piece.

use vm_memory::ByteValued;

use super::images::{BootError, no_room};
use crate::platform::addr::Gpa;
use crate::platform::memory::GuestRam;

/// Where it begins: below are the page tables and the command line.
const START: Gpa = Gpa(0x3_0000);
/// Bytes of it; above it the legacy hole begins soon.
const ROOM: usize = 0x6_0000;
/// Every piece begins on a border of this.
const ALIGN: usize = 8;

/// Hands out addresses from the bottom up.
pub(super) struct LowMemory<'a> {
    ram: &'a GuestRam,
    used: usize,
}

impl<'a> LowMemory<'a> {
    /// Nothing handed out yet.
    pub(super) fn new(ram: &'a GuestRam) -> Self {
        Self { ram, used: 0 }
    }

    /// Put `bytes` somewhere below 1 MiB.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<u32, BootError> {
        let at = self.used.next_multiple_of(ALIGN);
        let end = at.checked_add(bytes.len()).filter(|end| *end <= ROOM);
        let Some(end) = end else {
            let room = (ROOM - self.used) as u64;
            return Err(no_room(
                "the boot information",
                bytes.len() as u64,
                "below 1 MiB",
                room,
            ));
        };
        self.used = end;
        let at = Gpa(START.0 + at as u64);
        self.ram
            .write(at, bytes)
            .expect("the plan's lowest RAM range holds the first MiB");
        Ok(u32::try_from(at.0).expect("below 1 MiB"))
    }

    /// Put `text` and its final zero.
    pub(super) fn text(&mut self, text: &str) -> Result<u32, BootError> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(&bytes)
    }

    /// Put `entries` one behind the other.
    pub(super) fn table<T: ByteValued>(&mut self, entries: &[T]) -> Result<u32, BootError> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.as_slice().to_vec())
            .collect();
        self.put(&bytes)
    }
}
