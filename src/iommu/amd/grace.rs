//! How COMPLETION_WAIT knows that no access goes on with a translation that was invalidated before it.
//!
//! Whoever translates and accesses memory is *inside* while doing so. After an invalidation, one thread waits
//! until everybody who was inside then has left; who enters later sees the invalidation. Two counters take
//! turns, so that a stream of new accesses does not hold up the wait.

use std::cell::Cell;

use super::sync::{
    AtomicU64, AtomicUsize, Ordering, SHARDS, fence_after_exchange, full_fence, pause, thread_number,
};

/// The lowest so many bits of a counter are how many are inside, the others the total of what those who left
/// had counted: leaving has to change the counter anyway, and a second change would cost as much again.
const INSIDE_BITS: u32 = 16;

#[derive(Default)]
#[repr(align(128))]
struct Shard {
    counters: [AtomicU64; 2],
}

/// Who is inside.
#[derive(Default)]
pub struct Grace {
    turn: AtomicUsize,
    shards: [Shard; SHARDS],
}

/// Somebody is inside until this is dropped.
pub struct Inside<'a> {
    counter: &'a AtomicU64,
    counted: Cell<u64>,
}

impl Grace {
    /// Enter. Leave soon: invalidations wait. Never call [`Grace::wait`] from inside.
    #[inline]
    #[must_use]
    pub fn enter(&self) -> Inside<'_> {
        let turn = self.turn.load(Ordering::Relaxed);
        let counter = &self.shards[thread_number() % SHARDS].counters[turn % 2];
        counter.fetch_add(1, Ordering::SeqCst);
        fence_after_exchange();
        Inside {
            counter,
            counted: Cell::new(0),
        }
    }

    /// Return once everybody has left who was inside when this was called. One caller at a time. Whether there was anybody
    /// to wait for.
    pub fn wait(&self) -> bool {
        full_fence();
        let turn = self.turn.load(Ordering::Relaxed);
        // Late ones, who read the turn before the last change of it, count in the other counter.
        let late = self.drained(turn + 1);
        self.turn.store(turn + 1, Ordering::Relaxed);
        full_fence();
        let inside = self.drained(turn);
        full_fence();
        late || inside
    }

    /// Wait until nobody is inside of those who entered in `turn`; whether anybody was.
    fn drained(&self, turn: usize) -> bool {
        let mut waited = false;
        for shard in &self.shards {
            while shard.counters[turn % 2].load(Ordering::Acquire) % (1 << INSIDE_BITS) != 0 {
                waited = true;
                pause();
            }
        }
        waited
    }

    /// The total that those who left had counted, modulo 2^48.
    pub fn counted(&self) -> u64 {
        let counters = self.shards.iter().flat_map(|shard| &shard.counters);
        let totals = counters.map(|counter| counter.load(Ordering::Relaxed) >> INSIDE_BITS);
        totals.fold(0, u64::wrapping_add)
    }
}

impl Inside<'_> {
    /// Count one more of whatever those inside do.
    #[inline]
    pub fn count(&self) {
        self.counted.set(self.counted.get() + 1);
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        let counted = self.counted.get() << INSIDE_BITS;
        // Never borrows: whoever is inside is counted in the lowest bits.
        self.counter.fetch_add(counted.wrapping_sub(1), Ordering::Release);
    }
}
