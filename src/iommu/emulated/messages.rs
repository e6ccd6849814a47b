//! Messages of the functions behind a unit, and the kernel routes that carry them past us.
//!
//! A route holds what a message becomes at present. The unit's commands say when that may have changed
//! (INVALIDATE_INTERRUPT_TABLE and those that invalidate more), and every route of the device concerned is
//! set anew before the COMPLETION_WAIT that follows is answered, some in each call: the host's kernel takes its time for
//! each. A message that would go nowhere has no route: it is sent one by one, so that the unit can report it. Functions of
//! the host signal the route's eventfd all the same, which the event loop then hears instead of the kernel.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{EmulatedUnit, data};
use crate::guest_warn;
use crate::iommu::amd::Effects;
use crate::iommu::amd::commands::Command;
use crate::iommu::amd::dma::InFlight;
use crate::iommu::amd::effort::Effort;
use crate::iommu::amd::processor::{Follower, NoAnswer};
use crate::iommu::amd::remap::{Delivery, Remapped};
use crate::iommu::amd::request::{Access, Request};
use crate::platform::addr::{Bdf, Iova};
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::lock::lock;
use crate::platform::memory::GuestRam;
use crate::platform::msi::{MsiMessage, MsiRoute, MsiSink};

/// An interrupt as the processors' side takes it.
fn message(delivery: &Delivery) -> MsiMessage {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    let data = u32::from(delivery.vector)
        | bit(delivery.arbitrated, data::ARBITRATED)
        | bit(delivery.asserted, data::ASSERTED)
        | bit(delivery.level, data::LEVEL);
    MsiMessage::remapped(delivery.destination, delivery.logical, data)
}

impl EmulatedUnit {
    /// Send `sent` of `device` through the unit; what comes out goes to `out`.
    pub(super) fn send(&self, device: Bdf, sent: MsiMessage, out: impl FnOnce(MsiMessage)) {
        let bus = self.unit.begin();
        let effects = match bus.remap(device, sent) {
            Ok(Remapped::Unchanged) => {
                out(sent);
                Effects::default()
            }
            Ok(Remapped::To(delivery)) => {
                out(message(&delivery));
                Effects::default()
            }
            Ok(Remapped::MemoryWrite) => self.write(&bus, device, sent),
            Err(abort) => abort.effects,
        };
        drop(bus);
        self.perform(effects);
    }

    /// A message to elsewhere than the interrupt window is what it is on the bus: a write of four bytes.
    fn write(&self, bus: &InFlight<'_, GuestRam>, device: Bdf, sent: MsiMessage) -> Effects {
        let bytes = sent.data.to_le_bytes();
        let request = Request::plain(device, Iova(sent.address), Access::WRITE);
        let checked = bus
            .check(&request, bytes.len() as u64)
            .and_then(|()| bus.translate(&request));
        match checked {
            Ok(found) => {
                if found.run < bytes.len() as u64 || self.ram.write(found.target, &bytes).is_err() {
                    guest_warn!(address = %format_args!("{:#x}", sent.address), "a message to what is no memory vanishes");
                }
                Effects::default()
            }
            Err(abort) => abort.effects,
        }
    }

    /// What a route for `sent` of `device` would carry at present; `None` where it would carry nothing.
    pub(super) fn routed(&self, device: Bdf, sent: MsiMessage) -> Option<MsiMessage> {
        match self.unit.begin().route(device, sent)? {
            Remapped::Unchanged => Some(sent),
            Remapped::To(delivery) => Some(message(&delivery)),
            Remapped::MemoryWrite => None,
        }
    }
}

/// What the event loop hears of a unit: that it has commands to carry out, and what signals blocked messages.
pub(super) struct Wakes(Epoll);

/// Blocked messages that are sent in one go. The event loop has other things to do.
const MOST_HEARD: usize = 16;

impl Wakes {
    /// To be heard while `commands` is readable, for one.
    pub(super) fn new(commands: &EventFd) -> std::io::Result<Self> {
        let wakes = Self(Epoll::new()?);
        wakes.hear(commands)?;
        Ok(wakes)
    }

    pub(super) fn descriptor(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }

    fn hear(&self, eventfd: &EventFd) -> std::io::Result<()> {
        let fd = eventfd.as_raw_fd();
        let number = u64::try_from(fd).expect("an open descriptor");
        self.0
            .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, number))
    }

    fn ignore(&self, eventfd: &EventFd) {
        let fd = eventfd.as_raw_fd();
        self.0
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
            .expect("it is heard until now");
    }

    /// The descriptors that are readable now, some of them.
    fn heard(&self) -> Vec<u64> {
        let mut events = [EpollEvent::default(); MOST_HEARD];
        // Where it is interrupted the event loop comes again.
        let count = self.0.wait(0, &mut events).unwrap_or(0);
        events.iter().take(count).map(EpollEvent::data).collect()
    }
}

impl EmulatedUnit {
    /// Send messages that were signalled while the unit blocks them, so that it reports them.
    pub(super) fn send_blocked(&self) {
        let heard = self.wakes.heard();
        let is_heard = |route: &Arc<Route>| {
            let fd = u64::try_from(route.kernel.eventfd().as_raw_fd());
            fd.is_ok_and(|fd| heard.contains(&fd))
        };
        let mut routes: Vec<_> = lock(&self.routes.all).iter().filter_map(Weak::upgrade).collect();
        routes.retain(is_heard);
        for route in routes {
            if let Some(message) = route.take_blocked() {
                let device = route.requester.sbdf().bdf;
                // It may pass by now.
                self.send(device, message, |message| {
                    self.messages.signal(&route.requester, message);
                });
            }
        }
    }
}

/// Where the functions behind a unit send their messages.
pub struct RemappingSink(Arc<EmulatedUnit>);

impl RemappingSink {
    /// Messages pass `unit`.
    #[must_use]
    pub fn new(unit: Arc<EmulatedUnit>) -> Self {
        Self(unit)
    }
}

impl MsiSink for RemappingSink {
    fn signal(&self, requester: &Requester, message: MsiMessage) {
        let Self(unit) = self;
        unit.send(requester.sbdf().bdf, message, |message| {
            unit.messages.signal(requester, message);
        });
    }

    fn route(&self, requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        let Self(unit) = self;
        let route = Arc::new(Route {
            unit: unit.clone(),
            requester: requester.clone(),
            kernel: unit.messages.route(requester)?,
            asked: Mutex::default(),
            carries_for: AtomicU32::new(NOBODY),
            stale: AtomicBool::new(false),
        });
        let mut routes = lock(&unit.routes.all);
        routes.retain(|route| route.strong_count() > 0);
        routes.push(Arc::downgrade(&route));
        Ok(Box::new(Handle(route)))
    }
}

/// A route that carries nobody's message.
const NOBODY: u32 = u32::MAX;

/// One route through a unit.
struct Route {
    unit: Arc<EmulatedUnit>,
    requester: Arc<Requester>,
    kernel: Box<dyn MsiRoute>,
    /// What it was set to; held across a change of the kernel's route.
    asked: Mutex<Asked>,
    /// The requester ID whose message the kernel's route has, or [`NOBODY`].
    carries_for: AtomicU32,
    /// It is among those that are to be brought up to date.
    stale: AtomicBool,
}

/// What a route was set to.
#[derive(Clone, Copy, Default)]
struct Asked {
    /// The message before remapping; `None` while its vector is masked, and what is signalled meanwhile is kept.
    message: Option<MsiMessage>,
    /// By whose entries that was remapped.
    device: Bdf,
    /// The unit blocks the message: what is signalled meanwhile goes nowhere.
    blocked: bool,
    /// The event loop hears what is signalled.
    heard: bool,
}

impl Route {
    /// Bring the kernel's route to what `message` becomes at present, which is `asked` from here on.
    fn bring(&self, asked: &mut Asked, message: Option<MsiMessage>) -> Result<(), HostError> {
        let device = self.requester.sbdf().bdf;
        let routed = message.and_then(|message| self.unit.routed(device, message));
        let blocked = message.is_some() && routed.is_none();
        if asked.blocked && !blocked {
            // Signals of the time when it was blocked. What a masked vector owes is another matter: that stays.
            let _ = self.kernel.eventfd().read();
        }
        if routed.is_none() {
            self.carries_for.store(NOBODY, Ordering::Release);
        }
        (asked.device, asked.blocked) = (device, blocked);
        if !blocked {
            self.ignore(asked);
        }
        self.kernel.set(routed)?;
        if routed.is_some() {
            self.carries_for
                .store(device.requester_id().into(), Ordering::Release);
        }
        asked.message = message;
        if blocked && !asked.heard {
            match self.unit.wakes.hear(self.kernel.eventfd()) {
                Ok(()) => asked.heard = true,
                Err(error) => {
                    guest_warn!(device = %self.requester.sbdf(), %error, "the host has no room to hear of an interrupt that the unit blocks: it leaves no event");
                }
            }
        }
        Ok(())
    }

    /// The event loop hears nothing of it any more.
    fn ignore(&self, asked: &mut Asked) {
        if std::mem::take(&mut asked.heard) {
            self.unit.wakes.ignore(self.kernel.eventfd());
        }
    }

    /// The message that was signalled while the unit blocks it, if one was.
    fn take_blocked(&self) -> Option<MsiMessage> {
        let asked = lock(&self.asked);
        let signalled = asked.blocked && self.kernel.eventfd().read().is_ok();
        asked.message.filter(|_| signalled)
    }

    /// Whether it is set to a message of a device of those, or of one that has another number by now.
    fn is_concerned(&self, concerns: impl Fn(Bdf) -> bool) -> bool {
        let asked = lock(&self.asked);
        asked.message.is_some() && (self.requester.sbdf().bdf != asked.device || concerns(asked.device))
    }

    /// What the message becomes may have changed.
    fn refresh(&self) {
        let mut asked = lock(&self.asked);
        let message = asked.message;
        if let Err(error) = self.bring(&mut asked, message) {
            // What the route carries may be out of date, so nothing goes by it: not what a worker of ours sends, nor what
            // a device of the host signals, which the eventfd keeps.
            self.carries_for.store(NOBODY, Ordering::Release);
            let error: &(dyn std::error::Error + 'static) = &error;
            guest_warn!(
                device = %self.requester.sbdf(),
                error,
                "no kernel route for a remapped interrupt: it is sent one by one; one of a function of the host's waits for a route"
            );
            if let Err(error) = self.kernel.set(None) {
                let error: &(dyn std::error::Error + 'static) = &error;
                guest_warn!(
                    device = %self.requester.sbdf(),
                    error,
                    "a function of the host's may still interrupt as the guest's table said before"
                );
            }
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut asked = *lock(&self.asked);
        self.ignore(&mut asked);
    }
}

/// What a function holds.
struct Handle(Arc<Route>);

impl MsiRoute for Handle {
    fn eventfd(&self) -> &EventFd {
        self.0.kernel.eventfd()
    }

    fn set(&self, message: Option<MsiMessage>) -> Result<(), HostError> {
        let mut asked = lock(&self.0.asked);
        self.0.bring(&mut asked, message)
    }

    fn carries(&self) -> bool {
        let now = self.0.requester.sbdf().bdf.requester_id();
        self.0.carries_for.load(Ordering::Acquire) == u32::from(now)
    }
}

/// Whose interrupts a batch of commands concerns; `None` when nobody's.
pub(super) fn concerned(batch: &[Command]) -> Option<impl Fn(Bdf) -> bool + '_> {
    let by = |command: &Command, device: Option<Bdf>| match command {
        Command::InvalidateAll => true,
        Command::InvalidateInterrupts { device: of } | Command::InvalidateDevice { device: of } => {
            device.is_none_or(|device| device == *of)
        }
        _ => false,
    };
    batch
        .iter()
        .any(|command| by(command, None))
        .then_some(move |device| batch.iter().any(|command| by(command, Some(device))))
}

/// Every route through a unit.
#[derive(Default)]
pub(super) struct Routes {
    all: Mutex<Vec<Weak<Route>>>,
    /// Those to be brought to what the unit says, each once. Held while one is.
    stale: Mutex<VecDeque<Weak<Route>>>,
}

impl Routes {
    /// Those that are set to a message of a device of those, or of one that has another number by now.
    fn concerned(&self, concerns: impl Fn(Bdf) -> bool) -> Vec<Arc<Route>> {
        let mut routes: Vec<_> = lock(&self.all).iter().filter_map(Weak::upgrade).collect();
        routes.retain(|route| route.is_concerned(&concerns));
        routes
    }

    /// Functions have other numbers: the kernel knows only the message, and would carry what the old number's entry made of
    /// it.
    pub(super) fn renumbered(&self) {
        self.concerned(|_| false).iter().for_each(|route| route.refresh());
    }
}

impl Follower for Routes {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        if let Some(concerns) = concerned(batch) {
            let mut stale = lock(&self.stale);
            for route in self.concerned(concerns) {
                if !route.stale.swap(true, Ordering::Relaxed) {
                    stale.push_back(Arc::downgrade(&route));
                }
            }
        }
        Ok(())
    }

    fn settle(&self, effort: &mut Effort) -> bool {
        let mut stale = lock(&self.stale);
        while !stale.is_empty() {
            if !effort.spend(1) {
                return false;
            }
            if let Some(route) = stale.pop_front().and_then(|route| route.upgrade()) {
                route.stale.store(false, Ordering::Relaxed);
                route.refresh();
            }
        }
        true
    }
}
