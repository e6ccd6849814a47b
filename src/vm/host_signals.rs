//! What the host signals of a function while the guest runs: interrupts of its wire, errors, and that it wants it back.
//!
//! An error stops the device's requests until the guest resets it, and the guest is told by its root port, whose driver
//! then does that. A function that the host wants back is asked for by the button of its slot; once the guest has
//! let it go, or has taken too long, or has no such slot, it answers nothing any more and the host has it. The machine
//! goes on in every case.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::epoll::EventSet;

use super::events::EventLoop;
use crate::devices::clock::{Alarm, Clock, Expire, HostAlarm, HostClock};
use crate::devices::vfio::VfioFunction;
use crate::devices::vfio::host::Notice;
use crate::guest_warn;
use crate::pci::Function;
use crate::pci::capability::Severity;
use crate::pci::topology::Topology;
use crate::platform::host::HostError;

/// How long a guest may take to let go of a function. Linux waits five seconds after the button before it begins.
const TIME_TO_LET_GO: Duration = Duration::from_secs(30);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(200);
/// Nothing is asked of the guest.
const NEVER: u64 = u64::MAX;

/// The event loop's end of what the host signals of a function.
pub(super) struct HostSignals {
    function: Arc<VfioFunction>,
    topology: Arc<Topology>,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
    /// When the guest's time to let go is up, in milliseconds of the clock; or [`NEVER`].
    deadline: AtomicU64,
}

impl HostSignals {
    /// Listen to `function` by `events`, which is in its place in `topology`.
    pub(super) fn listen(
        function: Arc<VfioFunction>,
        topology: &Arc<Topology>,
        events: &mut EventLoop,
    ) -> Result<(), HostError> {
        let alarm = HostAlarm::new()?;
        let signals = Self::new(function, topology, Arc::new(HostClock), alarm.clone());
        events.add(alarm.calls(signals.clone()));
        events.add(signals);
        Ok(())
    }

    fn new(
        function: Arc<VfioFunction>,
        topology: &Arc<Topology>,
        clock: Arc<dyn Clock>,
        alarm: Arc<dyn Alarm>,
    ) -> Arc<Self> {
        let signals = Self {
            function,
            topology: topology.clone(),
            clock,
            alarm,
            deadline: AtomicU64::new(NEVER),
        };
        topology.make_removable(&signals.placed());
        Arc::new(signals)
    }

    fn placed(&self) -> Arc<dyn Function> {
        self.function.clone()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_millis()).unwrap_or(NEVER)
    }

    fn heard(&self, notice: Notice) {
        match notice {
            Notice::Error => self.failed(),
            Notice::Wanted => self.wanted(),
        }
    }

    fn failed(&self) {
        if !self.function.is_present() {
            return;
        }
        self.function.contain();
        let name = self.function.name();
        if self.topology.report_error(&self.placed(), Severity::Fatal) {
            guest_warn!(
                name,
                "the function has an error that it does not recover from by itself: its requests are stopped until the \
                 guest, which its root port told, resets it; the host's kernel log says what it was"
            );
        } else {
            guest_warn!(
                name,
                "the function has an error that it does not recover from by itself, and the guest does not listen to \
                 its root port: its requests are stopped until the guest resets it or reboots; the host's kernel log \
                 says what it was"
            );
        }
    }

    fn wanted(&self) {
        // The host repeats itself until it has the function.
        if !self.function.is_present() || self.deadline.load(Ordering::Relaxed) != NEVER {
            return;
        }
        let (name, seconds) = (self.function.name(), TIME_TO_LET_GO.as_secs());
        if self.topology.ask_to_let_go(&self.placed()) {
            let limit = u64::try_from(TIME_TO_LET_GO.as_millis()).unwrap_or(NEVER);
            self.deadline
                .store(self.now().saturating_add(limit), Ordering::Relaxed);
            tracing::info!(
                name,
                seconds,
                "the host wants the function back: the guest is asked to let go of it, and loses it after that time"
            );
            self.look_again();
        } else {
            tracing::warn!(
                name,
                "the host wants the function back, and the guest cannot be asked to let go of it: it loses it now"
            );
            self.take();
        }
    }

    fn look_again(&self) {
        self.alarm.set(self.clock.monotonic().checked_add(LOOK));
    }

    /// Take the function from the guest and give it back to the host.
    fn take(&self) {
        self.deadline.store(NEVER, Ordering::Relaxed);
        self.function.leave();
        self.topology.removed(&self.placed());
        self.function.give_back();
        tracing::info!(name = self.function.name(), "the host has the function again");
    }
}

impl Expire for HostSignals {
    fn expired(&self) {
        let deadline = self.deadline.load(Ordering::Relaxed);
        if deadline == NEVER {
            return;
        }
        let name = self.function.name();
        if self.topology.has_let_go(&self.placed()) {
            tracing::info!(name, "the guest let go of the function");
            self.take();
        } else if self.now() >= deadline {
            tracing::warn!(
                name,
                "the guest did not let go of the function in time: it loses it now"
            );
            self.take();
        } else {
            self.look_again();
        }
    }
}

impl EventSubscriber for HostSignals {
    fn process(&self, _events: Events, _ops: &mut EventOps) {
        for notice in self.function.signalled() {
            self.heard(notice);
        }
    }

    fn init(&self, ops: &mut EventOps) {
        for descriptor in self.function.descriptors() {
            ops.add(Events::new_raw(descriptor, EventSet::IN))
                .expect("the descriptor is open and watched once");
        }
    }
}

#[cfg(test)]
mod tests;
