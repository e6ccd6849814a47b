//! One address space of the host's, kept in step with one set of the guest's tables.

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::Host;
use super::record::Record;
use crate::guest_warn;
use crate::iommu::amd::pages::PageRange;
use crate::iommu::amd::request::Access;
use crate::iommu::amd::scan::{Bound, Run, Scanned};
use crate::iommu::amd::view::View;
use crate::iommu::iommufd::Copied;
use crate::platform::addr::GpaRange;
use crate::platform::host::HostError;

/// How far a shadow goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What one step looks at and asks of the host.
    pub step: Bound,
    /// Entries looked at for one range before it is given up. Tables that name themselves have no end.
    pub entries: usize,
    /// Runs of one address space: each is an object of the host kernel's.
    pub runs: usize,
    /// Ranges that wait to be looked at; past that everything is.
    pub pending: usize,
    /// What the guest is told at once of what is absent in one address space; of more only the host's log tells.
    pub told: usize,
}

impl Limits {
    /// What no sensible guest meets.
    pub const DEFAULT: Self = Self {
        // 64 MiB in small pages, or 64 runs. A step is some milliseconds at most.
        step: Bound {
            entries: 1 << 14,
            runs: 64,
        },
        // Tables for 256 GiB in small pages.
        entries: 1 << 26,
        runs: 1 << 20,
        pending: 256,
        told: 16,
    };
}

/// A range to be looked at, and how many entries that has cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pending {
    first: u64,
    last: u64,
    entries: usize,
}

/// Where the tables have a page and the host has nothing, and what is not done there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Absent {
    pub(super) iova: u64,
    pub(super) access: Access,
}

/// The host did not unmap: the space may hold what it should not.
#[derive(Debug)]
pub(super) struct Broken(pub(super) io::Error);

/// The address space.
pub(super) struct Space {
    host: Arc<Host>,
    id: u32,
    view: View,
    record: Record,
    /// Ascending, without overlaps.
    pending: Vec<Pending>,
    /// Something leads where nothing is, or was when it was looked at.
    leads_nowhere: bool,
    /// What the guest has yet to be told.
    absent: Vec<Absent>,
}

impl Space {
    /// One for `view`, with nothing in it yet, all of which is to be looked at.
    pub(super) fn new(host: &Arc<Host>, view: View) -> Result<Self, HostError> {
        let id = host.requests.alloc().map_err(|source| {
            HostError::new(
                format!("make an I/O address space for what {} translates", host.name),
                source,
            )
        })?;
        let mut space = Self {
            host: host.clone(),
            id,
            view,
            record: Record::default(),
            pending: Vec::new(),
            leads_nowhere: false,
            absent: Vec::new(),
        };
        space.invalidate(PageRange::Everything);
        Ok(space)
    }

    /// Its number.
    pub(super) const fn id(&self) -> u32 {
        self.id
    }

    /// What it is a copy of.
    pub(super) const fn view(&self) -> View {
        self.view
    }

    /// What turned out to be absent since the last call.
    pub(super) fn take_absent(&mut self) -> Vec<Absent> {
        std::mem::take(&mut self.absent)
    }

    /// The host has nothing at `iova`, where the tables let devices do `access`. Which of it one would try nobody knows.
    fn is_absent(&mut self, iova: u64, access: Access) {
        let access = if access.read { Access::READ } else { Access::WRITE };
        if self.absent.len() < self.host.limits.told {
            self.absent.push(Absent { iova, access });
        }
    }

    /// Whether nothing is left to be looked at.
    pub(super) const fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// Translations of `pages` may have changed.
    pub(super) fn invalidate(&mut self, pages: PageRange) {
        if self.view == View::Nothing {
            return;
        }
        let (first, last) = match pages {
            PageRange::Everything => (0, u64::MAX),
            PageRange::Span { first, last } => self.record.around(first, last),
        };
        let mut new = Pending {
            first,
            last,
            entries: 0,
        };
        // What overlaps or adjoins becomes one, so that what was mapped by several commands is one run.
        self.pending.retain(|old| {
            let apart = old.last.checked_add(1).is_some_and(|next| next < new.first)
                || new.last.checked_add(1).is_some_and(|next| next < old.first);
            if !apart {
                new.first = new.first.min(old.first);
                new.last = new.last.max(old.last);
            }
            apart
        });
        if self.pending.len() >= self.host.limits.pending {
            self.pending.clear();
            (new.first, new.last) = (0, u64::MAX);
        }
        let at = self.pending.partition_point(|old| old.first < new.first);
        self.pending.insert(at, new);
    }

    /// Memory came: what led nowhere is to be looked at again.
    pub(super) fn memory_came(&mut self) {
        if std::mem::take(&mut self.leads_nowhere) || matches!(self.view, View::Identity(_)) {
            self.invalidate(PageRange::Everything);
        }
    }

    /// Memory at `first..=last` goes: nothing leads there from here on.
    pub(super) fn memory_goes(&mut self, first: u64, last: u64) -> Result<(), Broken> {
        for run in self.record.leading_to(first, last) {
            self.leads_nowhere = true;
            let before = first.checked_sub(1).and_then(|end| in_memory(&run, 0, end));
            let behind = last
                .checked_add(1)
                .and_then(|start| in_memory(&run, start, u64::MAX));
            let kept: Vec<Run> = before.into_iter().chain(behind).collect();
            self.apply(run.iova, run.last(), &kept)?;
        }
        Ok(())
    }

    /// Look at a bounded piece of what may have changed, and have the host follow.
    pub(super) fn step(&mut self) -> Result<(), Broken> {
        let Some(Pending { first, last, entries }) = self.pending.first().copied() else {
            return Ok(());
        };
        let found = self.scan(first, last);
        let reached = found.next.map_or(last, |next| next - 1);
        let wanted = self.fitting(&found.runs);
        self.apply(first, reached, &wanted)?;
        let entries = entries.saturating_add(found.entries);
        match found.next {
            None => {
                self.pending.remove(0);
            }
            Some(next) if entries >= self.host.limits.entries => {
                guest_warn!(
                    iommu = self.host.name,
                    "tables have more entries than can be: nothing is mapped for devices of the host from {next:#x} on"
                );
                // Whether there is anything in the rest nobody knows: that it begins there is all that can be told.
                self.is_absent(next, Access::READ);
                self.apply(next, last, &[])?;
                self.pending.remove(0);
            }
            Some(next) => {
                self.pending[0] = Pending {
                    first: next,
                    last,
                    entries,
                };
            }
        }
        Ok(())
    }

    fn scan(&self, first: u64, last: u64) -> Scanned {
        let mut runs = Vec::new();
        match self.view {
            View::Nothing => {}
            View::Identity(access) => {
                let all = self.memory().into_iter().map(|range| Run {
                    iova: range.start().0,
                    len: range.len(),
                    target: range.start().0,
                    access,
                });
                runs.extend(all.filter_map(|run| run.within(first, last)));
            }
            View::Translated { allowed, tables, .. } => {
                let found = tables.scan(&self.host.ram, first, last, self.host.limits.step);
                for run in found.runs {
                    let access = run.access.and(allowed);
                    if access != Access::NONE {
                        Run::push(&mut runs, Run { access, ..run });
                    }
                }
                return Scanned { runs, ..found };
            }
        }
        Scanned {
            runs,
            next: None,
            entries: 1,
        }
    }

    /// What there is to lead to: regions of guest RAM, and memory of devices.
    fn memory(&self) -> Vec<GpaRange> {
        self.host.ram.ranges().chain(self.host.space.shared()).collect()
    }

    /// What of `runs` the host can map: from where it lets devices be, to memory, each in one region of it.
    fn fitting(&mut self, runs: &[Run]) -> Vec<Run> {
        let mut fitting = Vec::new();
        let host = self.host.clone();
        let regions = self.memory();
        for run in runs {
            let mut nowhere = run.len;
            for range in &regions {
                let Some(there) = in_memory(run, range.start().0, range.last().0) else {
                    continue;
                };
                nowhere -= there.len;
                let mut outside = there.len;
                for window in &host.windows {
                    if let Some(piece) = there.within(*window.start(), *window.end()) {
                        outside -= piece.len;
                        fitting.push(piece);
                    }
                }
                if outside > 0 {
                    let first = first_outside(there.iova, &host.windows);
                    guest_warn!(
                        iommu = host.name,
                        "the guest maps {:#x}-{:#x}, of which {outside:#x} bytes from {first:#x} on are where the host \
                         lets no device be (reserved_regions of its IOMMU group); they are not there",
                        there.iova,
                        there.last()
                    );
                    self.is_absent(first, there.access);
                }
            }
            if nowhere > 0 {
                // As behind a unit of hardware: the tables lead the request on, and nobody takes it.
                self.leads_nowhere = true;
                guest_warn!(
                    iommu = host.name,
                    "the guest maps {:#x}-{:#x} to {:#x}, of which {nowhere:#x} bytes are not there for devices of the \
                     host: neither guest RAM nor memory of theirs",
                    run.iova,
                    run.last(),
                    run.target
                );
            }
        }
        fitting.sort_unstable_by_key(|run| run.iova);
        fitting
    }

    /// Have the host hold `wanted`, and nothing else, from `first` to `last`.
    fn apply(&mut self, first: u64, last: u64, wanted: &[Run]) -> Result<(), Broken> {
        let change = self.record.change(first, last, wanted);
        for range in change.unmap {
            self.unmap(range)?;
        }
        for run in change.map {
            let most = self.host.limits.runs;
            if self.record.len() >= most {
                guest_warn!(
                    iommu = self.host.name,
                    "the guest maps more than {most} separate ranges for devices of the host; {:#x} is not there",
                    run.iova
                );
                self.is_absent(run.iova, run.access);
                continue;
            }
            let copied = self.host.requests.copy(&Copied {
                from: self.host.space.id(),
                source: run.target,
                to: self.id,
                iova: run.iova,
                len: run.len,
                access: run.access,
            });
            match copied {
                Ok(()) => self.record.mapped(run),
                Err(error) => {
                    guest_warn!(
                        iommu = self.host.name,
                        %error,
                        "the host does not map {:#x}-{:#x} for its devices; it is not there for them",
                        run.iova,
                        run.last()
                    );
                    self.is_absent(run.iova, run.access);
                }
            }
        }
        Ok(())
    }

    fn unmap(&mut self, range: RangeInclusive<u64>) -> Result<(), Broken> {
        self.host.requests.unmap(self.id, range.clone()).map_err(Broken)?;
        self.record.unmapped(&range);
        Ok(())
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if let Err(error) = self.host.requests.destroy(self.id) {
            tracing::error!(ioas = self.id, %error, "cannot destroy an I/O address space; it stays until this process ends");
        }
    }
}

/// The first address from `at` on that is in none of `windows`, which ascend.
fn first_outside(at: u64, windows: &[RangeInclusive<u64>]) -> u64 {
    let past = |at: u64, window: &RangeInclusive<u64>| {
        if window.contains(&at) {
            window.end().saturating_add(1)
        } else {
            at
        }
    };
    windows.iter().fold(at, past)
}

/// What of `run` leads to `first..=last` in memory.
fn in_memory(run: &Run, first: u64, last: u64) -> Option<Run> {
    let target_last = run.target.checked_add(run.len - 1)?;
    let from = run.target.max(first);
    let to = target_last.min(last);
    (from <= to).then(|| Run {
        iova: run.iova + (from - run.target),
        len: to - from + 1,
        target: from,
        access: run.access,
    })
}
