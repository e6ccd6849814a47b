//! Guest RAM in memory slots: what a set of pages the guest must not write makes of them, and getting there.
//!
//! The kernel neither resizes a slot nor makes one read-only in place, so a change takes slots away and adds others.
//! In between the guest would find no memory there: whoever calls keeps its processors out.

use std::collections::BTreeSet;
use std::io;

use super::sys::SlotKind;
use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};

/// A stretch of RAM that is one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Piece {
    pub(super) range: GpaRange,
    pub(super) kind: SlotKind,
}

/// The fewest slots in which the guest has all of `ram` and can write all but `pages`.
///
/// `ram` ascends, its ranges are whole pages and do not touch one slot's neighbours across a range's end; of `pages`
/// those count that lie in `ram`.
pub(super) fn plan(ram: impl Iterator<Item = GpaRange>, pages: &BTreeSet<Gpa>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for region in ram {
        let mut add = |start: u64, end: u64, kind| {
            let range = end
                .checked_sub(start)
                .and_then(|len| GpaRange::new(Gpa(start), len));
            pieces.extend(range.map(|range| Piece { range, kind }));
        };
        // RAM ends far below 2^64.
        let (mut open, end) = (region.start().0, region.last().0 + 1);
        let mut inside = pages.range(region.start()..=region.last()).peekable();
        while let Some(first) = inside.next() {
            let mut after = first.0 + PAGE_SIZE;
            while let Some(next) = inside.next_if(|next| next.0 == after) {
                after = next.0 + PAGE_SIZE;
            }
            add(open, first.0, SlotKind::Ram);
            add(first.0, after, SlotKind::ReadOnly);
            open = after;
        }
        add(open, end, SlotKind::Ram);
    }
    pieces
}

/// Who makes slots of stretches of RAM.
pub(super) trait SlotHost {
    /// Make a slot of `piece`; its number.
    fn add(&self, piece: Piece) -> io::Result<u32>;

    /// Take slot `slot`, which is `piece`, away.
    fn remove(&self, slot: u32, piece: Piece) -> io::Result<()>;
}

/// Why slots are not as they were to be.
#[derive(Debug)]
pub(super) enum SlotError {
    /// The host refused a step about this stretch; all slots are as before.
    Refused(Piece, io::Error),
    /// It then refused to put this stretch back too, and the guest has a hole there.
    Hole(Piece, io::Error),
}

/// The slots that RAM is in, in ascending order.
#[derive(Debug, Default)]
pub(super) struct RamSlots(Vec<(Piece, u32)>);

impl RamSlots {
    /// What they are.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.0.iter().map(|(piece, _)| *piece)
    }

    /// Make them `wanted`, which covers the same RAM if any is covered.
    ///
    /// # Errors
    /// When `host` refuses a step. Those before it are taken back.
    pub(super) fn change(&mut self, host: &impl SlotHost, wanted: &[Piece]) -> Result<(), SlotError> {
        let before = self.0.clone();
        let Err((piece, refused)) = self.steps(host, wanted) else {
            return Ok(());
        };
        let pieces: Vec<Piece> = before.iter().map(|(piece, _)| *piece).collect();
        match self.steps(host, &pieces) {
            Ok(()) => Err(SlotError::Refused(piece, refused)),
            Err((piece, error)) => Err(SlotError::Hole(piece, error)),
        }
    }

    /// Take away what is not `wanted`, then add what is missing. Slots that stay are not touched.
    fn steps(&mut self, host: &impl SlotHost, wanted: &[Piece]) -> Result<(), (Piece, io::Error)> {
        let keep: BTreeSet<Piece> = wanted.iter().copied().collect();
        while let Some(at) = self.0.iter().position(|(piece, _)| !keep.contains(piece)) {
            let (piece, slot) = self.0[at];
            host.remove(slot, piece).map_err(|error| (piece, error))?;
            self.0.remove(at);
        }
        for &piece in wanted {
            let at = self.0.partition_point(|(there, _)| *there < piece);
            if self.0.get(at).is_none_or(|(there, _)| *there != piece) {
                let slot = host.add(piece).map_err(|error| (piece, error))?;
                self.0.insert(at, (piece, slot));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn range(start: u64, len: u64) -> GpaRange {
        GpaRange::new(Gpa(start), len).expect("a range")
    }

    fn ram(start: u64, len: u64) -> Piece {
        Piece {
            range: range(start, len),
            kind: SlotKind::Ram,
        }
    }

    fn read_only(start: u64, len: u64) -> Piece {
        Piece {
            range: range(start, len),
            kind: SlotKind::ReadOnly,
        }
    }

    const LOW: u64 = 0x10_0000;
    const HIGH: u64 = 1 << 32;

    fn regions() -> [GpaRange; 2] {
        [range(0, LOW), range(HIGH, 0x4000)]
    }

    fn planned(pages: &[u64]) -> Vec<Piece> {
        plan(regions().into_iter(), &pages.iter().copied().map(Gpa).collect())
    }

    #[test]
    fn without_pages_every_region_is_one_slot() {
        assert_eq!(planned(&[]), [ram(0, LOW), ram(HIGH, 0x4000)]);
    }

    #[test]
    fn a_page_splits_its_region_and_neighbours_merge() {
        let expected = [
            ram(0, 0x5000),
            read_only(0x5000, 0x2000),
            ram(0x7000, 0x1000),
            read_only(0x8000, 0x1000),
            ram(0x9000, LOW - 0x9000),
            ram(HIGH, 0x4000),
        ];
        assert_eq!(planned(&[0x8000, 0x5000, 0x6000]), expected);
    }

    #[test]
    fn pages_at_a_regions_ends_leave_no_empty_slot() {
        let expected = [
            read_only(0, 0x1000),
            ram(0x1000, LOW - 0x2000),
            read_only(LOW - 0x1000, 0x1000),
            read_only(HIGH, 0x4000),
        ];
        let high = [0, 0x1000, 0x2000, 0x3000].map(|page| HIGH + page);
        let pages: Vec<u64> = [0, LOW - 0x1000].into_iter().chain(high).collect();
        assert_eq!(planned(&pages), expected);
    }

    #[test]
    fn pages_outside_ram_count_for_nothing() {
        assert_eq!(planned(&[LOW, HIGH + 0x4000]), planned(&[]));
    }

    proptest::proptest! {
        #[test]
        fn every_page_is_in_one_slot_of_its_kind(pages in proptest::collection::btree_set(0_u64..0x110, 0..40)) {
            let pages: BTreeSet<Gpa> = pages.into_iter().map(|page| Gpa(page * PAGE_SIZE)).collect();
            let pieces = plan(regions().into_iter(), &pages);
            let mut at = 0;
            for (index, region) in regions().into_iter().enumerate() {
                let mut next = region.start().0;
                while next <= region.last().0 {
                    let piece = pieces[at];
                    proptest::prop_assert_eq!(piece.range.start().0, next, "no gap in region {}", index);
                    for page in (next..=piece.range.last().0).step_by(4096) {
                        let kind = if pages.contains(&Gpa(page)) { SlotKind::ReadOnly } else { SlotKind::Ram };
                        proptest::prop_assert_eq!(piece.kind, kind);
                    }
                    next = piece.range.last().0 + 1;
                    at += 1;
                }
            }
            proptest::prop_assert_eq!(at, pieces.len());
        }
    }

    /// A kernel that keeps slots and takes none that overlap.
    #[derive(Default)]
    pub(in crate::platform::kvm) struct FakeSlots {
        slots: Mutex<BTreeMap<u32, Piece>>,
        calls: AtomicUsize,
        /// The calls, counted from 0, that are refused.
        refused: Mutex<Vec<usize>>,
    }

    impl FakeSlots {
        /// Refuse the calls that come after so many others.
        pub(in crate::platform::kvm) fn refuse(&self, after: &[usize]) {
            let calls = self.calls();
            *self.refused.lock().expect("not poisoned") = after.iter().map(|more| calls + more).collect();
        }

        pub(in crate::platform::kvm) fn calls(&self) -> usize {
            self.calls.load(Ordering::SeqCst)
        }

        fn call(&self) -> io::Result<()> {
            let call = self.calls.fetch_add(1, Ordering::SeqCst);
            if self.refused.lock().expect("not poisoned").contains(&call) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            Ok(())
        }

        pub(in crate::platform::kvm) fn pieces(&self) -> Vec<Piece> {
            let slots = self.slots.lock().expect("not poisoned");
            let mut pieces: Vec<Piece> = slots.values().copied().collect();
            pieces.sort_unstable();
            pieces
        }

        /// What a guest finds at `at`.
        pub(in crate::platform::kvm) fn kind(&self, at: Gpa) -> Option<SlotKind> {
            let pieces = self.pieces();
            let piece = pieces.iter().find(|piece| piece.range.contains(at));
            piece.map(|piece| piece.kind)
        }
    }

    impl SlotHost for FakeSlots {
        fn add(&self, piece: Piece) -> io::Result<u32> {
            self.call()?;
            let mut slots = self.slots.lock().expect("not poisoned");
            assert!(
                slots.values().all(|there| !there.range.overlaps(piece.range)),
                "{piece:?} overlaps"
            );
            let slot = (0..).find(|slot| !slots.contains_key(slot)).expect("free");
            slots.insert(slot, piece);
            Ok(slot)
        }

        fn remove(&self, slot: u32, piece: Piece) -> io::Result<()> {
            self.call()?;
            let removed = self.slots.lock().expect("not poisoned").remove(&slot);
            assert_eq!(removed, Some(piece));
            Ok(())
        }
    }

    /// RAM as it is at first, and the calls that took.
    fn at_first(host: &FakeSlots) -> RamSlots {
        let mut slots = RamSlots::default();
        slots.change(host, &planned(&[])).expect("nothing is refused");
        slots
    }

    #[test]
    fn a_change_touches_only_what_differs_and_back_again() {
        let host = FakeSlots::default();
        let mut slots = at_first(&host);
        slots.change(&host, &planned(&[0x5000])).expect("not refused");
        assert_eq!(host.pieces(), planned(&[0x5000]));
        let calls = host.calls();
        assert_eq!(
            calls,
            2 + 1 + 3,
            "two regions; one taken away and three of it added"
        );
        slots.change(&host, &planned(&[])).expect("not refused");
        assert_eq!(host.pieces(), planned(&[]));
        slots.change(&host, &planned(&[])).expect("not refused");
        assert_eq!(host.calls(), calls + 3 + 1);
    }

    #[test]
    fn every_refused_step_leaves_all_as_it_was() {
        let (from, to) = ([0x5000, HIGH], [0x6000, 0x7000, 0x9000]);
        for refused in 0.. {
            let host = FakeSlots::default();
            let mut slots = at_first(&host);
            slots.change(&host, &planned(&from)).expect("not refused");
            host.refuse(&[refused]);
            match slots.change(&host, &planned(&to)) {
                Ok(()) => {
                    assert!(refused > 6, "all steps were tried");
                    assert_eq!(host.pieces(), planned(&to));
                    return;
                }
                Err(SlotError::Refused(_, error)) => {
                    assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
                    assert_eq!(host.pieces(), planned(&from), "step {refused}");
                    assert_eq!(slots.pieces().collect::<Vec<_>>(), planned(&from));
                }
                Err(SlotError::Hole(..)) => panic!("only one call was refused"),
            }
        }
    }

    #[test]
    fn a_stretch_that_cannot_be_put_back_is_named_as_a_hole() {
        let host = FakeSlots::default();
        let mut slots = at_first(&host);
        // The first region goes; neither its first piece nor itself comes back.
        host.refuse(&[1, 2]);
        let Err(SlotError::Hole(piece, _)) = slots.change(&host, &planned(&[0x5000])) else {
            panic!("a hole");
        };
        assert_eq!(piece, ram(0, LOW));
        assert_eq!(host.pieces(), [ram(HIGH, 0x4000)]);
    }
}
