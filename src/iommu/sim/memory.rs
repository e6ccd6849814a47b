//! The memory of the model's machine: guest RAM at its own addresses, and above it what the host needs for itself.

use std::io;

use crate::iommu::amd::memory::{SystemMemory, Unreachable};
use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;
use crate::platform::ram::{self, RamOptions};

/// Where the host's own memory begins, below what host tables of four levels can map. Guest RAM ends before it.
pub(super) const OWN: u64 = 1 << 46;
/// Bytes of it. The process has those that were ever written.
const OWN_LEN: u64 = 0x100_0000;

/// All memory there is. Cloning shares it.
#[derive(Clone)]
pub struct SimMemory {
    guest: GuestRam,
    own: GuestRam,
}

impl SimMemory {
    /// Memory of a host whose guest has `guest`.
    ///
    /// # Errors
    /// When the host has no memory, or guest RAM reaches where the model's host has its own.
    pub(super) fn new(name: &str, guest: GuestRam) -> Result<Self, HostError> {
        if guest.ranges().any(|range| range.last().0 >= OWN) {
            let what = format!("place the host's memory of {name} behind guest RAM");
            return Err(HostError::new(what, io::ErrorKind::InvalidInput));
        }
        let range = GpaRange::new(Gpa(OWN), OWN_LEN).expect("far from the end");
        let own = ram::allocate(&[range], &RamOptions::default())?;
        Ok(Self { guest, own })
    }

    /// Guest RAM.
    pub(super) fn guest(&self) -> &GuestRam {
        &self.guest
    }

    /// The first byte after the host's own memory.
    pub(super) const fn end() -> u64 {
        OWN + OWN_LEN
    }

    /// Whose memory is at `at`.
    fn of(&self, at: Gpa) -> &GuestRam {
        if at.0 < OWN { &self.guest } else { &self.own }
    }
}

impl SystemMemory for SimMemory {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        SystemMemory::read(self.of(at), at, data)
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        SystemMemory::write(self.of(at), at, data)
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        self.of(at).load(at)
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        self.of(at).store(at, value)
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        self.of(at).compare_exchange(at, old, new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn guest(at: u64) -> GuestRam {
        GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(at), 0x1000)]).expect("a page"))
    }

    #[test]
    fn the_guest_has_its_addresses_and_the_host_those_above() {
        let memory = SimMemory::new("iommu0", guest(0)).expect("memory");
        memory.store(Gpa(8), 1).expect("the guest's");
        memory.store(Gpa(OWN), 2).expect("the host's");
        assert_eq!(memory.guest().read_obj::<u64>(Gpa(8)), Ok(1));
        assert_eq!(memory.load(Gpa(OWN)), Ok(2));
        assert_eq!(memory.compare_exchange(Gpa(OWN), 2, 3), Ok(Ok(())));
        for at in [0x1000, OWN - 8, SimMemory::end(), u64::MAX - 7] {
            assert_eq!(memory.load(Gpa(at)), Err(Unreachable), "{at:#x}");
        }
    }

    #[test]
    fn guest_ram_where_the_host_has_its_own_is_refused() {
        assert!(SimMemory::new("iommu0", guest(OWN - 0x1000)).is_ok());
        assert!(SimMemory::new("iommu0", guest(OWN)).is_err());
    }
}
