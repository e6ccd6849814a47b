//! What the host has mapped, and what brings it to what it should have.
//!
//! The host unmaps only what it mapped in one piece, so a run of which a part changes goes as a whole, and what stays of
//! it comes again. Runs that are right are never touched.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::iommu::amd::scan::Run;

/// The runs that the host has mapped in one address space, each by one request.
#[derive(Debug, Default)]
pub(super) struct Record {
    runs: BTreeMap<u64, Run>,
}

/// What to ask of the host, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Ranges of which all is to be unmapped; there is something in each.
    pub(super) unmap: Vec<RangeInclusive<u64>>,
    /// What is to be mapped.
    pub(super) map: Vec<Run>,
}

impl Record {
    /// How many runs there are.
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    /// The runs that share a byte with `first..=last`, ascending.
    fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = Run> + '_ {
        let before = self.runs.range(..first).next_back();
        let before = before.filter(move |(_, run)| run.last() >= first);
        let others = self.runs.range(first..=last);
        before.into_iter().chain(others).map(|(_, run)| *run)
    }

    /// The runs that lead to a byte in `first..=last` of memory, ascending.
    pub(super) fn leading_to(&self, first: u64, last: u64) -> Vec<Run> {
        let leads = |run: &&Run| run.target <= last && first <= run.target + (run.len - 1);
        self.runs.values().filter(leads).copied().collect()
    }

    /// `first..=last` and all of every run that has a part there: as a unit forgets the whole of a page when a part
    /// of it is invalidated.
    pub(super) fn around(&self, first: u64, last: u64) -> (u64, u64) {
        let begins = self.overlapping(first, first).next();
        let ends = self.overlapping(last, last).next();
        (
            begins.map_or(first, |run| run.iova),
            ends.map_or(last, |run| run.last()),
        )
    }

    /// What makes `first..=last` hold `wanted`, which is ascending and lies inside, and leaves all else as it is.
    pub(super) fn change(&self, first: u64, last: u64, wanted: &[Run]) -> Change {
        let mut change = Change::default();
        let mut pieces: Vec<Run> = Vec::new();
        let mut kept: Vec<Run> = Vec::new();
        let mut group: Option<(u64, u64)> = None;
        for run in self.overlapping(first, last) {
            let inside = run.within(first, last).expect("it overlaps");
            let at = wanted.partition_point(|piece| piece.iova <= inside.iova);
            let right = at.checked_sub(1).is_some_and(|at| wanted[at].says(&inside));
            if right {
                kept.push(inside);
                change.unmap.extend(group.take().map(|(from, to)| from..=to));
                continue;
            }
            let from = group.map_or(run.iova, |(from, _)| from);
            group = Some((from, run.last()));
            let before = first.checked_sub(1).and_then(|end| run.within(0, end));
            let behind = last.checked_add(1).and_then(|start| run.within(start, u64::MAX));
            pieces.extend(before.into_iter().chain(behind));
        }
        change.unmap.extend(group.map(|(from, to)| from..=to));
        let mut kept = kept.into_iter().peekable();
        for run in wanted {
            let mut rest = Some(*run);
            while let Some(right) = kept.next_if(|right| right.iova <= run.last()) {
                let Some(open) = rest else { break };
                let before = right.iova.checked_sub(1).and_then(|end| open.within(0, end));
                pieces.extend(before);
                rest = right
                    .last()
                    .checked_add(1)
                    .and_then(|start| open.within(start, u64::MAX));
            }
            pieces.extend(rest);
        }
        pieces.sort_unstable_by_key(|run| run.iova);
        for piece in pieces {
            Run::push(&mut change.map, piece);
        }
        change
    }

    /// All in `range` was unmapped.
    pub(super) fn unmapped(&mut self, range: &RangeInclusive<u64>) {
        let gone: Vec<u64> = self.runs.range(range.clone()).map(|(at, _)| *at).collect();
        for at in gone {
            self.runs.remove(&at);
        }
    }

    /// `run` was mapped.
    pub(super) fn mapped(&mut self, run: Run) {
        self.runs.insert(run.iova, run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::request::Access;
    use proptest::prelude::*;

    const fn run(iova: u64, len: u64, target: u64) -> Run {
        Run {
            iova,
            len,
            target,
            access: Access::BOTH,
        }
    }

    /// Do what `change` says, as a host does it.
    fn carry_out(record: &mut Record, change: &Change) {
        for range in &change.unmap {
            assert!(record.overlapping(*range.start(), *range.end()).next().is_some());
            let cut = record
                .overlapping(*range.start(), *range.end())
                .find(|run| !range.contains(&run.iova) || !range.contains(&run.last()));
            assert_eq!(cut, None, "a host cuts nothing");
            record.unmapped(range);
        }
        for run in &change.map {
            assert_eq!(record.overlapping(run.iova, run.last()).next(), None);
            record.mapped(*run);
        }
    }

    fn holding(runs: &[Run]) -> Record {
        let mut record = Record::default();
        runs.iter().for_each(|run| record.mapped(*run));
        record
    }

    #[test]
    fn a_contiguous_run_is_one_request_and_what_is_right_is_none() {
        let mut record = Record::default();
        let wanted = [run(0x1000, 0x8000, 0x10_0000)];
        let change = record.change(0, u64::MAX, &wanted);
        assert_eq!(
            (change.unmap.len(), change.map.as_slice()),
            (0, wanted.as_slice())
        );
        carry_out(&mut record, &change);
        assert_eq!(record.change(0, u64::MAX, &wanted), Change::default());
        let page = [run(0x3000, 0x1000, 0x10_2000)];
        assert_eq!(record.change(0x3000, 0x3fff, &page), Change::default());
    }

    #[test]
    fn half_of_a_large_page_unmapped_leaves_the_other_half() {
        let mut record = holding(&[run(0x20_0000, 0x20_0000, 0x40_0000)]);
        let change = record.change(0x30_0000, 0x3f_ffff, &[]);
        assert_eq!(change.unmap, [0x20_0000..=0x3f_ffff]);
        assert_eq!(change.map, [run(0x20_0000, 0x10_0000, 0x40_0000)]);
        carry_out(&mut record, &change);
        let change = record.change(0x20_1000, 0x20_1fff, &[]);
        let halves = [
            run(0x20_0000, 0x1000, 0x40_0000),
            run(0x20_2000, 0xf_e000, 0x40_2000),
        ];
        assert_eq!(change.map, halves);
    }

    #[test]
    fn neighbours_that_go_together_go_by_one_request() {
        let record = holding(&[run(0, 0x1000, 0), run(0x4000, 0x1000, 0), run(0x9000, 0x1000, 0)]);
        assert_eq!(record.change(0, u64::MAX, &[]).unmap, [0..=0x9fff]);
        let kept = [run(0x4000, 0x1000, 0)];
        assert_eq!(
            record.change(0, u64::MAX, &kept).unmap,
            [0..=0xfff, 0x9000..=0x9fff]
        );
    }

    #[test]
    fn other_permissions_are_another_mapping() {
        let record = holding(&[run(0, 0x2000, 0)]);
        let read = Run {
            access: Access::READ,
            ..run(0, 0x2000, 0)
        };
        let change = record.change(0, 0x1fff, &[read]);
        assert_eq!((change.unmap, change.map), (vec![0..=0x1fff], vec![read]));
    }

    #[test]
    fn a_run_that_grows_keeps_what_it_had() {
        let record = holding(&[run(0x2000, 0x1000, 0x12000)]);
        let change = record.change(0, u64::MAX, &[run(0x1000, 0x4000, 0x11000)]);
        assert!(change.unmap.is_empty());
        assert_eq!(
            change.map,
            [run(0x1000, 0x1000, 0x11000), run(0x3000, 0x2000, 0x13000)]
        );
    }

    #[test]
    fn a_part_of_a_run_stands_for_all_of_it() {
        let record = holding(&[run(0x2000, 0x4000, 0)]);
        assert_eq!(record.around(0x3000, 0x3fff), (0x2000, 0x5fff));
        assert_eq!(record.around(0x1000, 0x2fff), (0x1000, 0x5fff));
        assert_eq!(record.around(0x6000, 0x6fff), (0x6000, 0x6fff));
        assert_eq!(record.around(0, u64::MAX), (0, u64::MAX));
    }

    #[test]
    fn runs_are_found_by_where_they_lead() {
        let runs = [
            run(0x1000, 0x2000, 0x8000),
            run(0x4000, 0x1000, 0x20_0000),
            run(0x9000, 0x1000, 0x9000),
        ];
        let record = holding(&runs);
        assert_eq!(record.leading_to(0x9000, 0x9fff), [runs[0], runs[2]]);
        assert_eq!(record.leading_to(0x9fff, 0x20_0000), [runs[0], runs[1], runs[2]]);
        assert_eq!(record.leading_to(0xa000, 0x1f_ffff), []);
    }

    #[test]
    fn the_last_page_of_all_is_a_page_like_others() {
        let last = run(u64::MAX - 0xfff, 0x1000, 0x5000);
        let mut record = Record::default();
        let change = record.change(0, u64::MAX, &[last]);
        carry_out(&mut record, &change);
        assert_eq!(record.around(u64::MAX - 5, u64::MAX), (last.iova, u64::MAX));
        assert_eq!(
            record.change(last.iova, u64::MAX, &[]).unmap,
            [last.iova..=u64::MAX]
        );
    }

    /// Pages 0 to 31, each mapped to one of a few targets or not at all; here as runs between two pages.
    fn runs(pages: &[Option<u8>], from: usize, to: usize) -> Vec<Run> {
        let mut found = Vec::new();
        for (at, target) in pages.iter().enumerate().take(to + 1).skip(from) {
            let at = at as u64;
            let page = target.map(|target| run(at << 12, 0x1000, (at + u64::from(target) * 64) << 12));
            page.into_iter().for_each(|page| Run::push(&mut found, page));
        }
        found
    }

    /// Page by page, where the record leads.
    fn pages(record: &Record) -> Vec<Option<u64>> {
        (0..32_u64)
            .map(|page| {
                let run = record.overlapping(page << 12, page << 12).next()?;
                run.within(page << 12, page << 12).map(|byte| byte.target)
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_record_becomes_what_is_wanted_and_nothing_else_changes(
            steps in prop::collection::vec(
                (prop::collection::vec(prop::option::of(0..3_u8), 32), 0..32_usize, 0..32_usize),
                1..12,
            ),
        ) {
            let mut record = Record::default();
            let mut model: Vec<Option<u64>> = vec![None; 32];
            for (view, one, other) in steps {
                let (from, to) = (one.min(other), one.max(other));
                let wanted = runs(&view, from, to);
                let change = record.change((from as u64) << 12, ((to as u64) << 12) | 0xfff, &wanted);
                carry_out(&mut record, &change);
                for (page, entry) in model.iter_mut().enumerate().take(to + 1).skip(from) {
                    *entry = view[page].map(|target| (page as u64 + u64::from(target) * 64) << 12);
                }
                prop_assert_eq!(pages(&record), model.clone());
            }
        }
    }
}
