//! The atomics under the lock-free parts. `tests/iommu_interleavings.rs` puts a model checker's in their
//! place, so those parts name no atomic but these.

pub use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use std::cell::Cell;
use std::sync::atomic::fence;

/// Counters that many threads change are spread over this many cache lines, by thread.
pub const SHARDS: usize = 16;

/// Order a read-modify-write of this thread before its later loads.
///
/// On x86-64 every read-modify-write already does; only the compiler has to be told.
#[inline]
pub fn fence_after_exchange() {
    if cfg!(target_arch = "x86_64") {
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// Order everything of this thread before against everything after.
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

/// Let another thread go on that this one waits for.
pub fn pause() {
    std::thread::yield_now();
}

/// A small number that differs between threads as far as possible.
#[inline]
pub fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    NUMBER.with(|number| {
        if number.get() == usize::MAX {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}
