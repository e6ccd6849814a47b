//! All that a table maps in a range, a bounded piece at a time.
//!
//! What a walk finds for one address this finds for many, without asking for each page: an entry that is absent is
//! absent for all it spans. Entries are read once, as in a walk, and none is marked as used: what reads through a copy
//! of a table leaves no marks in it.

use std::ops::ControlFlow::{self, Break, Continue};

use super::memory::SystemMemory;
use super::request::Access;
use super::spec::pte::{GuestPte, HostPte};
use super::walk::{GuestTable, HostTable, page, span};
use crate::platform::addr::{Gpa, PAGE_SIZE};

/// Bytes that follow one another and lead to bytes that do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first one's address for the device.
    pub iova: u64,
    /// How many, at least one.
    pub len: u64,
    /// The first one's address in system memory.
    pub target: u64,
    /// What may be done there; something.
    pub access: Access,
}

impl Run {
    /// Its last byte's address for the device.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.iova + (self.len - 1)
    }

    /// What of it lies in `first..=last`.
    #[must_use]
    pub fn within(&self, first: u64, last: u64) -> Option<Self> {
        let from = self.iova.max(first);
        let to = self.last().min(last);
        (from <= to).then(|| Self {
            iova: from,
            len: to - from + 1,
            target: self.target + (from - self.iova),
            access: self.access,
        })
    }

    /// Whether `self` says of each byte of `other` what `other` says.
    #[must_use]
    pub fn says(&self, other: &Self) -> bool {
        self.within(other.iova, other.last()) == Some(*other)
    }

    /// Append `next` to `runs`, to the last of them where it goes on.
    pub fn push(runs: &mut Vec<Self>, next: Self) {
        if let Some(before) = runs.last_mut()
            && before.iova.checked_add(before.len) == Some(next.iova)
            && before.target.checked_add(before.len) == Some(next.target)
            && before.access == next.access
        {
            before.len += next.len;
        } else {
            runs.push(next);
        }
    }
}

/// What a piece of a scan may cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound {
    /// Entries looked at, at least 1.
    pub entries: usize,
    /// Runs found, at least 1.
    pub runs: usize,
}

/// What a piece of a scan found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scanned {
    /// What is mapped, ascending.
    pub runs: Vec<Run>,
    /// Where to go on; `None` at the end of the range.
    pub next: Option<u64>,
    /// Entries looked at.
    pub entries: usize,
}

/// A scan under way. It breaks with the address to go on at.
struct Scan<'a, M> {
    memory: &'a M,
    at: u64,
    last: u64,
    left: usize,
    most_runs: usize,
    runs: Vec<Run>,
}

impl<'a, M: SystemMemory> Scan<'a, M> {
    const fn new(memory: &'a M, at: u64, last: u64, bound: Bound) -> Self {
        Self {
            memory,
            at,
            last,
            left: bound.entries,
            most_runs: bound.runs,
            runs: Vec::new(),
        }
    }

    fn ended(self, bound: Bound, flow: ControlFlow<u64>) -> Scanned {
        Scanned {
            runs: self.runs,
            next: flow.break_value(),
            entries: bound.entries - self.left,
        }
    }

    /// One more entry is looked at, for what begins at `at`.
    fn look(&mut self, at: u64) -> ControlFlow<u64> {
        if self.left == 0 {
            return Break(at.max(self.at));
        }
        self.left -= 1;
        Continue(())
    }

    /// A page that may go beyond the range.
    fn found(&mut self, run: Run) -> ControlFlow<u64> {
        let Some(run) = run
            .within(self.at, self.last)
            .filter(|run| run.access != Access::NONE)
        else {
            return Continue(());
        };
        if self.runs.len() >= self.most_runs {
            let full = self.runs.len();
            Run::push(&mut self.runs, run);
            if self.runs.len() > full {
                self.runs.truncate(full);
                return Break(run.iova);
            }
            return Continue(());
        }
        Run::push(&mut self.runs, run);
        Continue(())
    }

    /// The entries of a table whose first one is for `base`, by index and first byte, as far as the range goes.
    fn slots(&self, level: u8, base: u64) -> impl Iterator<Item = (u64, u64)> + use<M> {
        let shift = span(level);
        let first = self.at.saturating_sub(base) >> shift;
        let end = match self.last.checked_sub(base) {
            Some(more) => (more >> shift).min(0x1ff) + 1,
            None => 0,
        };
        (first..end).map(move |index| (index, base + (index << shift)))
    }

    fn host_table(&mut self, table: u64, level: u8, base: u64, allowed: Access) -> ControlFlow<u64> {
        for (index, iova) in self.slots(level, base) {
            self.look(iova)?;
            let Ok(raw) = self.memory.load(Gpa(table + index * 8)) else {
                continue;
            };
            let entry = HostPte::from_bits(raw);
            let next = entry.next_level();
            let is_table = matches!(next, 1..=6);
            let reserved = if is_table {
                HostPte::RESERVED_TABLE
            } else {
                HostPte::RESERVED_LEAF
            };
            if !entry.pr() || raw & reserved != 0 {
                continue;
            }
            let allowed = allowed.and(Access::new(entry.ir(), entry.iw()));
            if !is_table {
                let Some((base, shift)) = page(entry, level) else {
                    continue;
                };
                self.found(Run {
                    iova,
                    len: 1 << span(level),
                    target: base | iova & ((1 << shift) - 1),
                    access: allowed,
                })?;
            } else if next < level {
                // Where levels are skipped, all but the first table's worth of addresses is malformed: not reached.
                self.host_table(entry.frame() << 12, next, iova, allowed)?;
            }
        }
        Continue(())
    }

    fn guest_table(
        &mut self,
        tables: &GuestTable,
        table: u64,
        level: u8,
        base: u64,
        write: bool,
    ) -> ControlFlow<u64> {
        for (index, iova) in self.slots(level, base) {
            self.look(iova)?;
            let Ok(raw) = tables.peek(self.memory, table + index * 8) else {
                continue;
            };
            let entry = GuestPte::from_bits(raw);
            if !entry.p() || level > 3 && entry.ps() {
                continue;
            }
            let write = write && entry.rw();
            if level == 1 || entry.ps() {
                let page = Run {
                    iova,
                    len: 1 << span(level),
                    target: (entry.frame() << 12) & !((1 << span(level)) - 1),
                    access: Access::new(true, write),
                };
                match &tables.host {
                    None => self.found(page)?,
                    Some(host) => self.below(host, page)?,
                }
            } else {
                self.guest_table(tables, entry.frame() << 12, level - 1, iova, write)?;
            }
        }
        Continue(())
    }

    /// The parts of `page`, whose targets pass `host`.
    fn below(&mut self, host: &HostTable, page: Run) -> ControlFlow<u64> {
        let Some(page) = page.within(self.at, self.last) else {
            return Continue(());
        };
        let mut done = 0;
        while done < page.len {
            let (iova, inner) = (page.iova + done, page.target + done);
            self.look(iova)?;
            let found = host.walk(self.memory, inner, Access::NONE);
            let shift = found
                .as_ref()
                .map_or(PAGE_SIZE.trailing_zeros(), |leaf| leaf.shift);
            let len = ((1 << shift) - (inner & ((1 << shift) - 1))).min(page.len - done);
            if let Ok(leaf) = found {
                self.found(Run {
                    iova,
                    len,
                    target: leaf.target(inner),
                    access: page.access.and(leaf.allowed),
                })?;
            }
            done += len;
        }
        Continue(())
    }
}

impl HostTable {
    /// What is mapped from `first` to `last`, as far as `bound` lets it look.
    #[must_use]
    pub fn scan<M: SystemMemory>(&self, memory: &M, first: u64, last: u64, bound: Bound) -> Scanned {
        let mut scan = Scan::new(memory, first, last, bound);
        let flow = scan.host_table(self.root.0, self.levels, 0, Access::BOTH);
        scan.ended(bound, flow)
    }
}

impl GuestTable {
    /// What is mapped from `first` to `last`, as far as `bound` lets it look. Addresses are not sign-extended.
    #[must_use]
    pub fn scan<M: SystemMemory>(&self, memory: &M, first: u64, last: u64, bound: Bound) -> Scanned {
        // What is read through the host table is read only; nothing is marked.
        let mut scan = Scan::new(memory, first, last, bound);
        let flow = match self.root(memory) {
            Ok(root) => scan.guest_table(self, root, self.levels, 0, true),
            Err(_) => Continue(()),
        };
        scan.ended(bound, flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::request::Pasid;
    use crate::iommu::amd::walk::Track;
    use crate::platform::memory::GuestRam;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const ANY: Bound = Bound {
        entries: 1 << 20,
        runs: 1 << 10,
    };
    const LEAF: u64 = 1 << 62 | 1 << 61 | 1;

    fn ram() -> GuestRam {
        GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("a MiB"))
    }

    fn put(ram: &GuestRam, at: u64, value: u64) {
        ram.write_obj(Gpa(at), &value).expect("RAM");
    }

    const fn table(root: u64, levels: u8) -> HostTable {
        HostTable {
            root: Gpa(root),
            levels,
            track: Track {
                accessed: false,
                dirty: false,
            },
        }
    }

    /// A table of two levels at 0x1000, whose entry 1 names the one at 0x2000.
    fn two_levels(ram: &GuestRam) -> HostTable {
        put(ram, 0x1008, LEAF | 1 << 9 | 0x2000);
        table(0x1000, 2)
    }

    fn run(iova: u64, len: u64, target: u64, access: Access) -> Run {
        Run {
            iova,
            len,
            target,
            access,
        }
    }

    #[test]
    fn pages_that_follow_one_another_are_one_run_and_large_ones_are_pages_too() {
        let ram = ram();
        let tables = two_levels(&ram);
        for page in 0..4 {
            put(&ram, 0x2000 + page * 8, LEAF | (0x8_0000 + page * 0x1000));
        }
        put(&ram, 0x2020, 1 << 61 | 1 | 0x8_4000);
        put(&ram, 0x1010, LEAF | 0x4000_0000);
        let found = tables.scan(&ram, 0, u64::MAX, ANY);
        assert_eq!(
            found.runs,
            [
                run(0x20_0000, 0x4000, 0x8_0000, Access::BOTH),
                run(0x20_4000, 0x1000, 0x8_4000, Access::READ),
                run(0x40_0000, 0x20_0000, 0x4000_0000, Access::BOTH),
            ]
        );
        assert_eq!((found.next, found.entries), (None, 1024));
    }

    #[test]
    fn only_the_range_is_told_and_only_its_entries_are_read() {
        let ram = ram();
        let tables = two_levels(&ram);
        put(&ram, 0x2008, LEAF | 0x8_0000);
        put(&ram, 0x1010, LEAF | 0x4000_0000);
        let found = tables.scan(&ram, 0x20_1000, 0x20_1fff, ANY);
        assert_eq!(found.runs, [run(0x20_1000, 0x1000, 0x8_0000, Access::BOTH)]);
        assert_eq!(found.entries, 2);
        let half = tables.scan(&ram, 0x50_0000, 0x5f_ffff, ANY);
        assert_eq!(half.runs, [run(0x50_0000, 0x10_0000, 0x4010_0000, Access::BOTH)]);
    }

    #[test]
    fn a_scan_in_pieces_finds_what_one_scan_finds() {
        let ram = ram();
        let tables = two_levels(&ram);
        for page in 0..512 {
            put(&ram, 0x2000 + page * 8, LEAF | ((page ^ 1) << 12));
        }
        let whole = tables.scan(&ram, 0, u64::MAX, ANY).runs;
        assert_eq!(whole.len(), 512);
        let bound = Bound { entries: 7, runs: 3 };
        let mut next = Some(0);
        let mut runs = Vec::new();
        while let Some(at) = next {
            let piece = tables.scan(&ram, at, u64::MAX, bound);
            assert!(piece.runs.len() <= 3 && piece.entries <= 7);
            runs.extend(piece.runs);
            next = piece.next;
        }
        assert_eq!(runs, whole);
    }

    #[test]
    fn skipped_levels_reach_only_what_a_walk_reaches() {
        let ram = ram();
        // From level 4 to level 1: the first 2 MiB of 512 GiB.
        put(&ram, 0x1000, LEAF | 1 << 9 | 0x2000);
        put(&ram, 0x2000 + 511 * 8, LEAF | 0x8_0000);
        let tables = table(0x1000, 4);
        let found = tables.scan(&ram, 0, u64::MAX, ANY).runs;
        assert_eq!(found, [run(0x1f_f000, 0x1000, 0x8_0000, Access::BOTH)]);
        assert!(tables.walk(&ram, 0x1f_f000, Access::READ).is_ok());
        assert!(tables.walk(&ram, 0x3f_f000, Access::READ).is_err());
    }

    #[test]
    fn a_table_that_names_itself_ends_with_its_bound() {
        let ram = ram();
        for entry in 0..512 {
            put(&ram, 0x1000 + entry * 8, LEAF | 5 << 9 | 0x1000);
        }
        let tables = table(0x1000, 6);
        let bound = Bound {
            entries: 5000,
            runs: 10,
        };
        let found = tables.scan(&ram, 0, u64::MAX, bound);
        assert!(found.runs.is_empty() && found.next.is_some());
        assert_eq!(found.entries, 5000);
    }

    #[test]
    fn the_last_page_of_all_is_found() {
        let ram = ram();
        for (level, table) in [
            (6_u64, 0x1000_u64),
            (5, 0x2000),
            (4, 0x3000),
            (3, 0x4000),
            (2, 0x5000),
        ] {
            let index = if level == 6 { 127 } else { 511 };
            put(
                &ram,
                table + index * 8,
                LEAF | (level - 1) << 9 | (table + 0x1000),
            );
        }
        put(&ram, 0x6000 + 511 * 8, LEAF | 0x8_0000);
        let page = run(u64::MAX - 0xfff, 0x1000, 0x8_0000, Access::BOTH);
        let tables = table(0x1000, 6);
        assert_eq!(tables.scan(&ram, 0, u64::MAX, ANY).runs, [page]);
        assert_eq!(tables.scan(&ram, page.iova, u64::MAX, ANY).runs, [page]);
        assert!(tables.scan(&ram, 0, page.iova - 1, ANY).runs.is_empty());
    }

    #[test]
    fn guest_tables_are_scanned_and_what_they_name_passes_the_host_table() {
        let ram = ram();
        put(&ram, 0x1000, 0x2000 | 1);
        put(&ram, 0x2000, 0x3000 | 0x7);
        put(&ram, 0x3000, 0x4000 | 0x7);
        put(&ram, 0x4000, 0x5000 | 0x7);
        put(&ram, 0x5008, 0x8_0000 | 0x7);
        put(&ram, 0x5010, 0x8_1000 | 0x5);
        let mut tables = GuestTable {
            gcr3: 0x1000,
            glx: 0,
            pasid: Pasid::ZERO,
            levels: 4,
            signed: false,
            user: false,
            track: Track::default(),
            host: None,
            root_is_guest: false,
        };
        let found = tables.scan(&ram, 0, u64::MAX, ANY).runs;
        assert_eq!(
            found,
            [
                run(0x1000, 0x1000, 0x8_0000, Access::BOTH),
                run(0x2000, 0x1000, 0x8_1000, Access::READ)
            ]
        );
        // The same memory again one page further up, but for the second page.
        put(&ram, 0x1_0000, LEAF | 1 << 9 | 0x1_1000);
        for page in (0..0x81).filter(|page| *page != 0x80) {
            put(&ram, 0x1_1000 + page * 8, LEAF | page << 12);
        }
        put(&ram, 0x1_1000 + 0x80 * 8, LEAF | 0x9_0000);
        tables.host = Some(table(0x1_0000, 2));
        let nested = tables.scan(&ram, 0, u64::MAX, ANY).runs;
        assert_eq!(nested, [run(0x1000, 0x1000, 0x9_0000, Access::BOTH)]);
    }
}
