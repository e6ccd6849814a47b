//! What a served unit asked of its host, in numbers.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Running totals.
#[derive(Default)]
pub(super) struct Counters([AtomicU64; Count::ALL.len()]);

/// What is counted.
#[derive(Clone, Copy)]
pub(super) enum Count {
    Stores,
    StrangeStores,
    PassThrough,
    Blocked,
    Nested,
    QueuesMade,
    QueuesDestroyed,
    Routes,
    Events,
    Watches,
    LostRecords,
    HostEvents,
    LostEvents,
    Stops,
    Refusals,
}

impl Count {
    const ALL: [Self; 15] = [
        Self::Stores,
        Self::StrangeStores,
        Self::PassThrough,
        Self::Blocked,
        Self::Nested,
        Self::QueuesMade,
        Self::QueuesDestroyed,
        Self::Routes,
        Self::Events,
        Self::Watches,
        Self::LostRecords,
        Self::HostEvents,
        Self::LostEvents,
        Self::Stops,
        Self::Refusals,
    ];
}

/// Totals since the unit was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Counts {
    /// Stores to device table entries of functions behind the unit.
    pub stores: u64,
    /// Stores to other bytes of the pages with such entries.
    pub strange_stores: u64,
    /// Functions attached to guest physical memory.
    pub pass_through: u64,
    /// Functions blocked.
    pub blocked: u64,
    /// Functions attached to tables of the guest's.
    pub nested: u64,
    /// Rings handed to the host.
    pub queues_made: u64,
    /// Rings taken back.
    pub queues_destroyed: u64,
    /// Changes of where interrupts go.
    pub routes: u64,
    /// Events put into the guest's log.
    pub events: u64,
    /// Changes of the pages whose stores are noticed.
    pub watches: u64,
    /// Records that the guest's logs did not take.
    pub lost_records: u64,
    /// Events that the host told of the unit.
    pub host_events: u64,
    /// Events that the host lost before anybody heard of them.
    pub lost_events: u64,
    /// How often the unit was stopped because what serves it did not answer.
    pub stops: u64,
    /// Requests the host refused.
    pub refusals: u64,
}

impl Counters {
    pub(super) fn add(&self, what: Count) {
        self.add_many(what, 1);
    }

    pub(super) fn add_many(&self, what: Count, many: u64) {
        self.0[what as usize].fetch_add(many, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> Counts {
        let of = |what: Count| self.0[what as usize].load(Ordering::Relaxed);
        Counts {
            stores: of(Count::Stores),
            strange_stores: of(Count::StrangeStores),
            pass_through: of(Count::PassThrough),
            blocked: of(Count::Blocked),
            nested: of(Count::Nested),
            queues_made: of(Count::QueuesMade),
            queues_destroyed: of(Count::QueuesDestroyed),
            routes: of(Count::Routes),
            events: of(Count::Events),
            watches: of(Count::Watches),
            lost_records: of(Count::LostRecords),
            host_events: of(Count::HostEvents),
            lost_events: of(Count::LostEvents),
            stops: of(Count::Stops),
            refusals: of(Count::Refusals),
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stores,
            strange_stores,
            pass_through,
            blocked,
            nested,
            queues_made,
            queues_destroyed,
            routes,
            events,
            watches,
            lost_records,
            host_events,
            lost_events,
            stops,
            refusals,
        } = self;
        write!(
            f,
            "{stores} stores to entries, {strange_stores} beside them, {watches} changes of watched pages; attached {nested} times to \
             guest tables, {pass_through} to memory, {blocked} to nothing; {queues_made} rings made, {queues_destroyed} destroyed, \
             {routes} interrupt routes, {stops} stops, {lost_records} records lost, {host_events} events told by the \
             host, {lost_events} lost there, {events} events put in, {refusals} refusals"
        )
    }
}
