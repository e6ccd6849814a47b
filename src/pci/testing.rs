//! What tests of PCI functions share: a sink of messages that records, and routes that do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::msi::{MsiMessage, MsiPort, MsiRoute, MsiSink};

/// A requester at 0000:01:00.0 with Bus Master Enable.
pub(crate) fn requester() -> Arc<Requester> {
    let bdf = Bdf::new(1, 0, 0).expect("in range");
    let requester = Arc::new(Requester::new(Sbdf { segment: 0, bdf }));
    requester.set_bus_master(true);
    requester
}

/// Records the messages sent one by one and hands out routes, or refuses to.
pub(crate) struct Messages {
    requester: Arc<Requester>,
    sent: Mutex<Vec<MsiMessage>>,
    routes: Mutex<Vec<Arc<Route>>>,
    refuse: Arc<AtomicBool>,
}

impl Messages {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            requester: requester(),
            sent: Mutex::default(),
            routes: Mutex::default(),
            refuse: Arc::default(),
        })
    }

    pub(crate) fn port(self: &Arc<Self>) -> MsiPort {
        MsiPort::new(self.requester.clone(), self.clone())
    }

    pub(crate) fn requester(&self) -> &Arc<Requester> {
        &self.requester
    }

    /// The messages sent one by one since the last call.
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.sent.lock().expect("not poisoned"))
    }

    /// Every route handed out, dropped ones included.
    pub(crate) fn routes(&self) -> Vec<Arc<Route>> {
        self.routes.lock().expect("not poisoned").clone()
    }

    /// Refuse routes and changes of them from now on, or not.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }
}

fn answer(refuse: &AtomicBool) -> Result<(), HostError> {
    if refuse.load(Ordering::Relaxed) {
        return Err(HostError::new(
            "route an interrupt",
            std::io::Error::from_raw_os_error(28),
        ));
    }
    Ok(())
}

impl MsiSink for Messages {
    fn signal(&self, _requester: &Requester, message: MsiMessage) {
        self.sent.lock().expect("not poisoned").push(message);
    }

    fn route(&self, _requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        answer(&self.refuse)?;
        let route = Arc::new(Route {
            eventfd: EventFd::new(EFD_NONBLOCK).expect("a descriptor"),
            set: Mutex::default(),
        });
        self.routes.lock().expect("not poisoned").push(route.clone());
        Ok(Box::new(RouteHandle(self.refuse.clone(), route)))
    }
}

/// One route and every message it was given.
pub(crate) struct Route {
    eventfd: EventFd,
    set: Mutex<Vec<Option<MsiMessage>>>,
}

impl Route {
    /// How often it was signalled since the last call.
    pub(crate) fn signals(&self) -> u64 {
        self.eventfd.read().unwrap_or(0)
    }

    pub(crate) fn history(&self) -> Vec<Option<MsiMessage>> {
        self.set.lock().expect("not poisoned").clone()
    }
}

struct RouteHandle(Arc<AtomicBool>, Arc<Route>);

impl MsiRoute for RouteHandle {
    fn eventfd(&self) -> &EventFd {
        &self.1.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> Result<(), HostError> {
        answer(&self.0)?;
        self.1.set.lock().expect("not poisoned").push(message);
        Ok(())
    }
}

impl Drop for RouteHandle {
    fn drop(&mut self) {
        self.1.set.lock().expect("not poisoned").push(None);
    }
}
