//! Guest RAM: bounds-checked accesses that never yield a Rust reference.
//!
//! The guest writes while we read, so every access copies, and a field is read once. The mapping itself
//! is vm-memory's; this type adds the machine's own addresses and the accesses the platform needs.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::addr::{Gpa, GpaRange};

/// The guest's RAM. Cloning shares it.
#[derive(Clone)]
pub struct GuestRam {
    regions: Arc<GuestMemoryMmap<()>>,
}

/// An access that leaves guest RAM: whose fault that is, the caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {at} are not all guest RAM")]
pub struct OutsideRam {
    /// Where the access began.
    pub at: Gpa,
    /// How many bytes it wanted.
    pub len: usize,
}

impl GuestRam {
    /// RAM made of mappings that are already in place.
    #[must_use]
    pub fn new(regions: GuestMemoryMmap<()>) -> Self {
        Self {
            regions: Arc::new(regions),
        }
    }

    /// The mappings, for the crates that speak vm-memory.
    #[must_use]
    pub fn backend(&self) -> &GuestMemoryMmap<()> {
        &self.regions
    }

    /// Where RAM lies, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.regions.iter().map(|region| {
            GpaRange::new(Gpa(region.start_addr().0), region.len())
                .expect("a mapped region is not empty and does not wrap")
        })
    }

    /// Bytes of RAM in all.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ranges().map(GpaRange::len).sum()
    }

    /// Copy `data.len()` bytes out.
    pub fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), OutsideRam> {
        let len = data.len();
        self.regions
            .read_slice(data, GuestAddress(at.0))
            .map_err(|_| OutsideRam { at, len })
    }

    /// Copy `data` in. Nothing is written when a part of the target is not RAM.
    pub fn write(&self, at: Gpa, data: &[u8]) -> Result<(), OutsideRam> {
        let outside = OutsideRam { at, len: data.len() };
        if !GuestMemoryBackend::check_range(&*self.regions, GuestAddress(at.0), data.len()) {
            return Err(outside);
        }
        self.regions
            .write_slice(data, GuestAddress(at.0))
            .map_err(|_| outside)
    }

    /// Copy a structure out, once.
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, at: Gpa) -> Result<T, OutsideRam> {
        let mut value = T::new_zeroed();
        self.read(at, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copy a structure in.
    pub fn write_obj<T: IntoBytes + Immutable>(&self, at: Gpa, value: &T) -> Result<(), OutsideRam> {
        self.write(at, value.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> GuestRam {
        let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(0x10_0000), 0x1000)];
        GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("small mappings"))
    }

    #[test]
    fn what_is_written_is_read_back() {
        let ram = two_regions();
        ram.write_obj(Gpa(0x1ff8), &0x1122_3344_5566_7788_u64)
            .expect("inside");
        assert_eq!(ram.read_obj::<u32>(Gpa(0x1ffc)), Ok(0x1122_3344));
    }

    #[test]
    fn a_write_across_the_end_of_ram_changes_nothing() {
        let ram = two_regions();
        let outside = ram
            .write(Gpa(0x1ffe), &[1, 2, 3, 4])
            .expect_err("crosses the end");
        assert_eq!(
            outside,
            OutsideRam {
                at: Gpa(0x1ffe),
                len: 4
            }
        );
        assert_eq!(ram.read_obj::<u16>(Gpa(0x1ffe)), Ok(0));
    }

    #[test]
    fn an_access_that_would_wrap_is_outside() {
        let ram = two_regions();
        assert!(ram.read(Gpa(u64::MAX), &mut [0; 2]).is_err());
        assert!(ram.write(Gpa(u64::MAX - 1), &[0; 8]).is_err());
    }

    #[test]
    fn ranges_come_in_order_and_add_up() {
        let ram = two_regions();
        assert_eq!(
            ram.ranges().map(|r| r.start().0).collect::<Vec<_>>(),
            [0, 0x10_0000]
        );
        assert_eq!(ram.size(), 0x3000);
    }
}
