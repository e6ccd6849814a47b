//! What guest physical memory is for: the list that every boot protocol hands over in a form of its own.

use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::memory::GuestRam;

/// Where the video memory and option ROMs of a PC begin: no RAM from here to 1 MiB.
pub(super) const LEGACY_HOLE: Gpa = Gpa(0xa_0000);
/// Where RAM goes on after the legacy hole, and kernels may be loaded.
pub(super) const HIGH_MEMORY: Gpa = Gpa(0x10_0000);

/// What a range is for, with the numbers that ACPI (15, "System Address Map Interfaces"), PVH and multiboot
/// share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Use {
    /// For the guest to use.
    Ram = 1,
    /// Not RAM, or not to be touched.
    Reserved = 2,
    /// Holds ACPI tables; RAM once they are read.
    Acpi = 3,
}

/// The map: ascending, without overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MemoryMap {
    entries: Vec<(GpaRange, Use)>,
}

impl MemoryMap {
    /// RAM of `ram` without the legacy hole, with the ACPI tables at `acpi` and what `reserved` lists beside it.
    ///
    /// `acpi` lies inside one range of RAM above 1 MiB, `reserved` outside RAM.
    pub(super) fn new(ram: &GuestRam, acpi: GpaRange, reserved: impl Iterator<Item = GpaRange>) -> Self {
        let mut entries = Vec::new();
        let mut add = |from: Gpa, to: Gpa, kind| {
            let len = to.0.saturating_sub(from.0);
            entries.extend(GpaRange::new(from, len).map(|range| (range, kind)));
        };
        let end = |range: GpaRange| Gpa(range.last().0 + 1);
        for range in ram.ranges() {
            let mut from = range.start();
            if range.contains(LEGACY_HOLE) {
                add(from, LEGACY_HOLE, Use::Ram);
                add(LEGACY_HOLE, HIGH_MEMORY, Use::Reserved);
                from = HIGH_MEMORY;
            }
            if range.contains_range(acpi) {
                add(from, acpi.start(), Use::Ram);
                add(acpi.start(), end(acpi), Use::Acpi);
                from = end(acpi);
            }
            add(from, end(range), Use::Ram);
        }
        entries.extend(reserved.map(|range| (range, Use::Reserved)));
        entries.sort_unstable_by_key(|(range, _)| range.start());
        Self { entries }
    }

    /// The ranges and what each is for.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (GpaRange, Use)> + '_ {
        self.entries.iter().copied()
    }

    /// Bytes of usable RAM from 1 MiB up to the first hole.
    pub(super) fn contiguous_high_memory(&self) -> u64 {
        let from_1_mib = |(range, kind): &&(GpaRange, Use)| *kind == Use::Ram && range.start() == HIGH_MEMORY;
        self.entries
            .iter()
            .find(from_1_mib)
            .map_or(0, |(range, _)| range.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn range(start: u64, last: u64) -> GpaRange {
        GpaRange::new(Gpa(start), last - start + 1).expect("valid")
    }

    fn ram() -> GuestRam {
        let ranges = [(GuestAddress(0), 0x100_0000), (GuestAddress(1 << 32), 0x20_0000)];
        GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("small mappings"))
    }

    #[test]
    fn the_map_names_every_byte_once_and_in_order() {
        let ecam = range(0xe000_0000, 0xefff_ffff);
        let map = MemoryMap::new(&ram(), range(0xff_0000, 0xff_efff), [ecam].into_iter());
        let seen: Vec<_> = map.iter().collect();
        assert_eq!(
            seen,
            [
                (range(0, 0x9_ffff), Use::Ram),
                (range(0xa_0000, 0xf_ffff), Use::Reserved),
                (range(0x10_0000, 0xfe_ffff), Use::Ram),
                (range(0xff_0000, 0xff_efff), Use::Acpi),
                (range(0xff_f000, 0xff_ffff), Use::Ram),
                (ecam, Use::Reserved),
                (range(1 << 32, (1 << 32) + 0x1f_ffff), Use::Ram),
            ]
        );
        assert_eq!(map.contiguous_high_memory(), 0xef_0000);
    }

    #[test]
    fn tables_that_end_with_ram_leave_no_empty_entry() {
        let map = MemoryMap::new(&ram(), range(0xff_0000, 0xff_ffff), std::iter::empty());
        assert_eq!(map.iter().len(), 5);
    }
}
