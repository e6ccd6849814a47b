//! Host (v1) tables of the model's host, four levels each.

use std::io;

use super::memory::SimMemory;
use crate::iommu::amd::memory::SystemMemory;
use crate::iommu::amd::spec::pte::HostPte;
use crate::platform::addr::{Gpa, PAGE_SIZE};

/// Levels of every table.
pub(super) const LEVELS: u8 = 4;
/// The largest page is of this level: 1 GiB.
const LARGEST: u8 = 3;

/// Logarithm of what an entry of `level` spans.
const fn span(level: u8) -> u32 {
    9 * level as u32 + 3
}

/// Pages for tables, given out and never taken back: the host makes its tables once.
pub(super) struct TablePages {
    next: u64,
    end: u64,
}

impl TablePages {
    /// Pages from `first` to before `end`, all zero.
    pub(super) const fn new(first: u64, end: u64) -> Self {
        Self { next: first, end }
    }

    /// An empty table.
    pub(super) fn table(&mut self) -> io::Result<u64> {
        if self.next >= self.end {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let table = self.next;
        self.next += PAGE_SIZE;
        Ok(table)
    }

    /// Map `len` bytes at `iova` to `target` in the table `root`, readable and writable, by pages as large as fit. All
    /// three are multiples of 4 KiB.
    pub(super) fn map(
        &mut self,
        memory: &SimMemory,
        root: u64,
        iova: u64,
        target: u64,
        len: u64,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (at, to) = (iova + done, target + done);
            let fits = |level: &u8| {
                let size = 1 << span(*level);
                (at | to).is_multiple_of(size) && len - done >= size
            };
            let level = (1..=LARGEST).rev().find(fits).unwrap_or(1);
            let table = self.table_of(memory, root, at, level)?;
            let page = HostPte::new().with_frame(to >> 12);
            set(memory, table, at, level, page);
            done += 1 << span(level);
        }
        Ok(())
    }

    /// The table of `level` on the way to `at`.
    fn table_of(&mut self, memory: &SimMemory, root: u64, at: u64, level: u8) -> io::Result<u64> {
        let mut table = root;
        for step in (level + 1..=LEVELS).rev() {
            let found =
                HostPte::from_bits(memory.load(slot(table, at, step)).expect("the host's own memory"));
            table = if found.pr() {
                found.frame() << 12
            } else {
                let next = self.table()?;
                let pointer = HostPte::new().with_next_level(step - 1).with_frame(next >> 12);
                set(memory, table, at, step, pointer);
                next
            };
        }
        Ok(table)
    }
}

/// Where `table` of `level` has the entry of `at`.
const fn slot(table: u64, at: u64, level: u8) -> Gpa {
    Gpa(table + (at >> span(level) & 0x1ff) * 8)
}

fn set(memory: &SimMemory, table: u64, at: u64, level: u8, entry: HostPte) {
    let entry = entry.with_pr(true).with_ir(true).with_iw(true);
    memory
        .store(slot(table, at, level), entry.into_bits())
        .expect("the host's own memory");
}

#[cfg(test)]
mod tests {
    use super::super::memory::OWN;
    use super::*;
    use crate::iommu::amd::request::Access;
    use crate::iommu::amd::walk::{HostTable, Track};
    use crate::platform::memory::GuestRam;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn memory() -> SimMemory {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
        SimMemory::new("iommu0", GuestRam::new(ram)).expect("memory")
    }

    #[test]
    fn what_is_mapped_is_found_by_the_largest_page_that_fits() {
        let memory = memory();
        let mut pages = TablePages::new(OWN, OWN + 0x10_0000);
        let root = pages.table().expect("room");
        pages
            .map(&memory, root, 0x3fff_f000, 0x3fff_f000, 0x4040_2000)
            .expect("room");
        let table = HostTable {
            root: Gpa(root),
            levels: LEVELS,
            track: Track::default(),
        };
        let find = |at| {
            let leaf = table.walk(&memory, at, Access::BOTH).ok()?;
            Some((leaf.target(at), leaf.shift))
        };
        assert_eq!(find(0x3fff_f123), Some((0x3fff_f123, 12)));
        assert_eq!(find(0x4012_3456), Some((0x4012_3456, 30)));
        assert_eq!(find(0x8000_0000), Some((0x8000_0000, 21)));
        assert_eq!(find(0x8040_0fff), Some((0x8040_0fff, 12)));
        for outside in [0x3fff_e000, 0x8040_1000, 1 << 40, 1 << 50] {
            assert_eq!(find(outside), None, "{outside:#x}");
        }
    }

    #[test]
    fn tables_end_where_their_pages_do() {
        let memory = memory();
        let mut pages = TablePages::new(OWN, OWN + 0x2000);
        let root = pages.table().expect("room");
        let refused = pages.map(&memory, root, 0, 0, 0x1000).expect_err("no room");
        assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory);
    }
}
