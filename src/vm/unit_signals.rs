//! What the host tells, while the guest runs, of a unit that serves the guest's: errors of its hardware, and what was lost.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Weak};

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::epoll::EventSet;

use super::events::EventLoop;
use crate::iommu::viommu::ServedUnit;

/// The event loop's end of a unit's event queue.
pub struct UnitSignals {
    /// It goes with its machine's part of it, in the order in which the host's objects hang on each other.
    unit: Weak<ServedUnit>,
    descriptor: RawFd,
}

impl UnitSignals {
    /// Have `events` hear what the host tells of `unit`. Nothing where it tells nothing.
    ///
    /// One wake-up takes what the host keeps at a time, so that a host that tells without end delays others and stops nobody.
    /// Nothing further is watched after the unit is gone, with its descriptor.
    pub fn listen(unit: &Arc<ServedUnit>, events: &mut EventLoop) {
        if let Some(descriptor) = unit.host_events() {
            events.add(Arc::new(Self {
                descriptor: descriptor.as_raw_fd(),
                unit: Arc::downgrade(unit),
            }));
        }
    }
}

impl EventSubscriber for UnitSignals {
    fn process(&self, events: Events, ops: &mut EventOps) {
        let ended = events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
        let Some(unit) = self.unit.upgrade() else {
            return;
        };
        if !unit.host_told(ended) {
            ops.remove(Events::empty_raw(self.descriptor))
                .expect("the descriptor is open and watched");
        }
    }

    fn init(&self, ops: &mut EventOps) {
        ops.add(Events::new_raw(self.descriptor, EventSet::IN))
            .expect("the descriptor is open and watched once");
    }
}
