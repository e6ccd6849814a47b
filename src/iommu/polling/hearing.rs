//! How a unit hears its doorbell: by exits, or late, from a ring of writes that the hypervisor put aside.
//!
//! Nothing tells that a write was put aside, so somebody has to look. Two rules keep the guest from noticing:
//! whoever handles an exit of the unit first delivers what waits in the ring, so that accesses take effect in the
//! order the guest made them; and writes are put aside only while a thread looks for them. When it stops, it has
//! the hypervisor let them through first and looks once more then: what came before is found by this look, and
//! what comes later is an exit. `tests/iommu_interleavings.rs` tries every order of the two.

use super::sync::{AtomicUsize, Ordering};

/// What lies between the guest's writes and the unit.
pub(super) trait Line {
    /// Have writes to the doorbell put aside from now on. Whether they are.
    fn put_aside(&self) -> bool;

    /// Have them come as exits from now on. Whether they do; then those that did not are in the ring.
    fn let_through(&self) -> bool;

    /// Take what was put aside to the units. When this returns, all that was there when it was called has arrived,
    /// whoever took it.
    fn deliver(&self);
}

/// What the threads of a unit agree about its doorbell.
#[derive(Default)]
pub(super) struct Hearing {
    /// 1 while writes may wait in the ring.
    aside: AtomicUsize,
    /// 1 while commands wait that a late write announced, and nobody has begun with.
    rung: AtomicUsize,
}

impl Hearing {
    /// An access of the guest came as an exit: what was written before it arrives before it.
    pub(super) fn catch_up(&self, line: &impl Line) {
        if self.aside.load(Ordering::SeqCst) != 0 {
            line.deliver();
        }
    }

    /// A late write arrived.
    pub(super) fn arrived(&self) {
        self.rung.store(1, Ordering::SeqCst);
    }

    /// Whether late writes arrived since the last call.
    pub(super) fn take_rung(&self) -> bool {
        self.rung.swap(0, Ordering::SeqCst) != 0
    }

    /// From now on the caller looks. Whether there will be anything to see.
    pub(super) fn begin(&self, line: &impl Line) -> bool {
        // Before the first write can be put aside, so that no exit after it passes it by.
        self.aside.store(1, Ordering::SeqCst);
        let aside = line.put_aside();
        if !aside {
            self.aside.store(0, Ordering::SeqCst);
        }
        aside
    }

    /// The caller stops looking, unless the hypervisor goes on putting writes aside. Either way all that it did has
    /// arrived; the caller still has to ask [`Self::take_rung`].
    pub(super) fn end(&self, line: &impl Line) -> bool {
        let through = line.let_through();
        line.deliver();
        if through {
            self.aside.store(0, Ordering::SeqCst);
        }
        through
    }
}
