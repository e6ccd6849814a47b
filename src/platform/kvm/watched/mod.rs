//! Pages of guest RAM whose changes somebody hears of: read-only memory slots, and the stores they turn into exits.
//!
//! Locks, in the order in which they are taken: `telling` (one store after another, with its watchers), `changing`
//! (one change of slots after another), `watchers` (for as long as bytes are put into RAM or a list is replaced).
//! `watch` does not take the first, so that a watcher may call it. A processor that waits for any of them is in an
//! exit, so that the gate can be closed meanwhile.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::cmpxchg16b::OPERAND;
use super::gate::Gate;
use super::slots::{Piece, RamSlots, SlotError, SlotHost, plan};
use super::sys;
use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};
use crate::platform::host::HostError;
use crate::platform::lock::lock;
use crate::platform::memory::GuestRam;
use crate::platform::protection::Watcher;

/// What following pages of guest RAM cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WatchCounts {
    /// Pages that are watched now.
    pub pages: u64,
    /// Plain stores that were exits.
    pub stores: u64,
    /// Compare-exchanges of 16 bytes that were carried out here, equal or not.
    pub compare_exchanges: u64,
    /// Times a processor had to leave the guest because slots changed.
    pub processors_stopped: u64,
}

/// Guest RAM as the guest's processors may store to it, and who hears of that.
pub struct WatchedPages {
    ram: GuestRam,
    gate: Gate,
    /// Whether stores that KVM cannot emulate are brought here.
    enabled: AtomicBool,
    telling: Mutex<()>,
    changing: Mutex<RamSlots>,
    watchers: Mutex<Vec<Watch>>,
    stores: AtomicU64,
    compare_exchanges: AtomicU64,
}

/// One watcher and its pages.
struct Watch {
    watcher: Weak<dyn Watcher>,
    pages: BTreeSet<Gpa>,
}

/// The page that `at` is in.
fn page_of(at: Gpa) -> Gpa {
    Gpa(at.0 - at.0 % PAGE_SIZE)
}

impl WatchedPages {
    /// All of `ram`, nothing watched, and no slot made yet.
    pub(super) fn new(ram: GuestRam) -> Self {
        Self {
            ram,
            gate: Gate::default(),
            enabled: AtomicBool::new(false),
            telling: Mutex::default(),
            changing: Mutex::default(),
            watchers: Mutex::default(),
            stores: AtomicU64::new(0),
            compare_exchanges: AtomicU64::new(0),
        }
    }

    /// What processors pass on their way into the guest.
    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Guest RAM.
    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// From now on KVM brings what it cannot emulate here.
    pub(super) fn enable(&self) {
        self.enabled.store(true, Ordering::Release);
    }

    /// Whether KVM brings what it cannot emulate here.
    pub(super) fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Give the guest all of RAM, before anything runs.
    pub(super) fn fill(&self, host: &impl SlotHost) -> Result<(), HostError> {
        let pieces = plan(self.ram.ranges(), &BTreeSet::new());
        let changed = lock(&self.changing).change(host, &pieces);
        changed.map_err(
            |(SlotError::Refused(piece, source) | SlotError::Hole(piece, source))| {
                HostError::new(format!("give the guest RAM at {}", piece.range), source)
            },
        )
    }

    /// What [`crate::platform::protection::WriteProtection::watch`] promises, by the slots of `host`.
    pub(super) fn watch(
        &self,
        host: &impl SlotHost,
        watcher: &Weak<dyn Watcher>,
        pages: &BTreeSet<Gpa>,
    ) -> Result<(), HostError> {
        self.check(pages)?;
        let mut slots = lock(&self.changing);
        // Only who holds `changing` replaces the list, so what is read here is still so below.
        let others = |watch: &Watch| watch.watcher.strong_count() > 0 && !watch.watcher.ptr_eq(watcher);
        let mut all = pages.clone();
        for watch in lock(&self.watchers).iter().filter(|watch| others(watch)) {
            all.extend(&watch.pages);
        }
        let wanted = plan(self.ram.ranges(), &all);
        if slots.pieces().ne(wanted.iter().copied()) {
            let closed = self.gate.close();
            if let Err(error) = slots.change(host, &wanted) {
                let (error, hole) = refused(error);
                if let Some(why) = hole {
                    closed.jam(&why);
                }
                return Err(error);
            }
        }
        let mut watchers = lock(&self.watchers);
        watchers.retain(others);
        if !pages.is_empty() {
            watchers.push(Watch {
                watcher: watcher.clone(),
                pages: pages.clone(),
            });
        }
        Ok(())
    }

    /// Whether each of `pages` is a page of RAM.
    fn check(&self, pages: &BTreeSet<Gpa>) -> Result<(), HostError> {
        let is_ram = |page: Gpa| {
            let range = GpaRange::new(page, PAGE_SIZE).filter(|_| page == page_of(page));
            range.is_some_and(|range| self.ram.ranges().any(|ram| ram.contains_range(range)))
        };
        match pages.iter().find(|page| !is_ram(**page)) {
            None => Ok(()),
            Some(page) => Err(HostError::new(
                format!("watch stores at {page}, which is no page of guest RAM"),
                io::ErrorKind::InvalidInput,
            )),
        }
    }

    /// Whether a store of `len` bytes at `at` is one to RAM.
    pub(super) fn has(&self, at: Gpa, len: usize) -> bool {
        let range = GpaRange::new(at, len as u64);
        range.is_some_and(|range| self.ram.ranges().any(|ram| ram.contains_range(range)))
    }

    /// A processor stores `data`, at most 8 bytes, at `at`, and it is an exit though there is RAM: the page was watched
    /// when it did. Once this returns the bytes are there and everybody who watches has heard.
    pub fn store(&self, at: Gpa, data: &[u8]) {
        self.stores.fetch_add(1, Ordering::Relaxed);
        self.tell_of(at, data.len(), || self.ram.write(at, data).is_ok());
    }

    /// A processor compares the 16 bytes at `at`, a multiple of 16, with `expected` and makes them `replacement` if they
    /// are that. Returns what they were, and `None`, with nothing done, where they are not RAM.
    pub(super) fn compare_exchange(&self, at: Gpa, expected: u128, replacement: u128) -> Option<u128> {
        let len = usize::try_from(OPERAND).expect("16");
        let mut found = None;
        self.tell_of(at, len, || {
            found = sys::compare_exchange(&self.ram, at, expected, replacement);
            found == Some(expected)
        });
        if found.is_some() {
            self.compare_exchanges.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// Do `access` to `len` bytes at `at`; if it says that it stored, tell who watches them.
    fn tell_of(&self, at: Gpa, len: usize, access: impl FnOnce() -> bool) {
        let Some(range) = GpaRange::new(at, len as u64) else {
            return;
        };
        let _telling = lock(&self.telling);
        let watchers: Vec<Arc<dyn Watcher>> = {
            // Held over the access: who begins to watch meanwhile finds the bytes there, or hears of them.
            let watchers = lock(&self.watchers);
            if !access() {
                return;
            }
            let touched = page_of(range.start())..=range.last();
            let concerned = watchers
                .iter()
                .filter(|watch| watch.pages.range(touched.clone()).next().is_some());
            concerned.filter_map(|watch| watch.watcher.upgrade()).collect()
        };
        for watcher in watchers {
            watcher.written(range);
        }
    }

    /// What it cost so far.
    #[must_use]
    pub fn counts(&self) -> WatchCounts {
        let watchers = lock(&self.watchers);
        let pages: BTreeSet<Gpa> = watchers
            .iter()
            .flat_map(|watch| watch.pages.iter().copied())
            .collect();
        WatchCounts {
            pages: pages.len() as u64,
            stores: self.stores.load(Ordering::Relaxed),
            compare_exchanges: self.compare_exchanges.load(Ordering::Relaxed),
            processors_stopped: self.gate.stopped(),
        }
    }
}

/// What the caller is told, and what every processor is told if the guest cannot go on.
fn refused(error: SlotError) -> (HostError, Option<String>) {
    let what = |piece: Piece| format!("change what the guest may store to in RAM at {}", piece.range);
    match error {
        SlotError::Refused(piece, source) => (HostError::new(what(piece), source), None),
        SlotError::Hole(piece, source) => {
            let why = format!("guest RAM at {} could not be put back: {source}", piece.range);
            (HostError::new(what(piece), source), Some(why))
        }
    }
}

#[cfg(test)]
mod tests;
