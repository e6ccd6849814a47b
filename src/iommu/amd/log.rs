//! A log in guest memory: the event log and the PPR log behave alike (sections 2.5.1 and 2.6.1).

use super::memory::SystemMemory;
use super::ring::Ring;

/// A ring that the unit fills and software drains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Log {
    /// Base and pointers.
    pub ring: Ring,
    /// A record was lost; nothing is logged until the log is switched on anew.
    pub overflowed: bool,
}

/// What became of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Appended {
    /// It stands in the log.
    Logged,
    /// There was no room: it is lost, and the log has stopped.
    Overflowed,
    /// It is lost without a trace: memory did not take it.
    Unreachable,
}

impl Log {
    /// After reset.
    pub const RESET: Self = Self {
        ring: Ring::RESET,
        overflowed: false,
    };

    /// Append `record` to a log that runs. The record is complete in memory before the tail moves.
    pub fn append<M: SystemMemory>(&mut self, memory: &M, record: u128) -> Appended {
        if self.ring.is_full() {
            self.overflowed = true;
            return Appended::Overflowed;
        }
        let tail = self.ring.tail();
        match memory.write(self.ring.slot(tail), &record.to_le_bytes()) {
            Ok(()) => {
                self.ring.set_tail(self.ring.after(tail));
                Appended::Logged
            }
            Err(_) => Appended::Unreachable,
        }
    }
}
