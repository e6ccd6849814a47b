//! What a unit did, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use super::events::Event;
use super::spec::event::Record;

/// Running totals.
#[derive(Default)]
pub struct Counters {
    doorbells: AtomicU64,
    polled: AtomicU64,
    commands: [AtomicU64; 8],
    batches: AtomicU64,
    stops: AtomicU64,
    walks: AtomicU64,
    events: [AtomicU64; 16],
    faults: [AtomicU64; Event::FAULTS.len()],
}

/// Totals since the unit was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Writes to the command buffer's tail.
    pub doorbells: u64,
    /// Those among them that came late, by whoever polls, and cost no exit.
    pub polled: u64,
    /// Commands carried out, by [`super::commands::Command::KINDS`].
    pub commands: [u64; 8],
    /// How often the processor went to work and carried out any: with their number, how many come at once.
    pub batches: u64,
    /// Errors that stopped the command processor.
    pub stops: u64,
    /// Translations from the cache.
    pub hits: u64,
    /// Translations by a walk, found or not.
    pub walks: u64,
    /// Events by code, logged or lost.
    pub events: [u64; 16],
    /// Page faults among them, by [`Event::FAULTS`].
    pub faults: [u64; Event::FAULTS.len()],
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn doorbell(&self) {
        add(&self.doorbells, 1);
    }

    pub(super) fn polled_doorbell(&self) {
        add(&self.doorbells, 1);
        add(&self.polled, 1);
    }

    /// Add commands of one run, by kind.
    pub(super) fn commands(&self, by_kind: &[u64; 8]) {
        if by_kind.iter().any(|more| *more > 0) {
            add(&self.batches, 1);
        }
        for (counter, more) in self.commands.iter().zip(by_kind) {
            if *more > 0 {
                add(counter, *more);
            }
        }
    }

    pub(super) fn stop(&self) {
        add(&self.stops, 1);
    }

    pub(super) fn walk(&self) {
        add(&self.walks, 1);
    }

    /// Add what `record` reports.
    pub(super) fn event(&self, record: u128) {
        add(
            &self.events[usize::from(Record::from_bits(record).code() & 0xf)],
            1,
        );
        if let Some(fault) = Event::fault_in(record) {
            add(&self.faults[fault], 1);
        }
    }

    /// All but the hits, which are counted where requests are in flight.
    pub(super) fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            doorbells: get(&self.doorbells),
            polled: get(&self.polled),
            commands: self.commands.each_ref().map(get),
            batches: get(&self.batches),
            stops: get(&self.stops),
            hits: 0,
            walks: get(&self.walks),
            events: self.events.each_ref().map(get),
            faults: self.faults.each_ref().map(get),
        }
    }
}
