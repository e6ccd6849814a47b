//! How COMPLETION_WAIT knows that no access goes on with a translation that was invalidated before it.
//!
//! Whoever translates and accesses memory is *inside* while doing so. After an invalidation, one thread waits
//! until everybody who was inside then has left; who enters later sees the invalidation. Two counters take
//! turns, so that a stream of new accesses does not hold up the wait.

use super::sync::{AtomicUsize, Ordering, SHARDS, fence_after_exchange, full_fence, pause, thread_number};

#[derive(Default)]
#[repr(align(128))]
struct Shard {
    inside: [AtomicUsize; 2],
}

/// Who is inside.
#[derive(Default)]
pub struct Grace {
    turn: AtomicUsize,
    shards: [Shard; SHARDS],
}

/// Somebody is inside until this is dropped.
pub struct Inside<'a>(&'a AtomicUsize);

impl Grace {
    /// Enter. Leave soon: invalidations wait. Never call [`Grace::wait`] from inside.
    #[inline]
    #[must_use]
    pub fn enter(&self) -> Inside<'_> {
        let turn = self.turn.load(Ordering::Relaxed);
        let counter = &self.shards[thread_number() % SHARDS].inside[turn % 2];
        counter.fetch_add(1, Ordering::SeqCst);
        fence_after_exchange();
        Inside(counter)
    }

    /// Return once everybody has left who was inside when this was called. One caller at a time.
    pub fn wait(&self) {
        full_fence();
        let turn = self.turn.load(Ordering::Relaxed);
        // Late ones, who read the turn before the last change of it, count in the other counter.
        self.drained(turn + 1);
        self.turn.store(turn + 1, Ordering::Relaxed);
        full_fence();
        self.drained(turn);
        full_fence();
    }

    fn drained(&self, turn: usize) {
        for shard in &self.shards {
            while shard.inside[turn % 2].load(Ordering::Acquire) != 0 {
                pause();
            }
        }
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}
