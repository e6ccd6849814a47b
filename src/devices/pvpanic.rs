//! The port by which a guest's kernel says that it has panicked: pvpanic, at 0x505.
//!
//! What it offers: the events "panicked", "crash loaded" and "shut down". The guest reads which events there
//! are and writes the one that happened (Linux, include/uapi/misc/pvpanic.h).

use std::sync::Arc;

use bitflags::bitflags;

use super::Device;
use super::register::{read_bytes, write_bytes};
use super::request::{Request, RequestQueue};
use crate::guest_warn;
use crate::platform::bus::BusDevice;

/// The one port.
pub const PVPANIC_PORT: u64 = 0x505;

bitflags! {
    /// What may happen to a guest's kernel.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Events: u8 {
        /// It panicked and stays that way.
        const PANICKED = 1 << 0;
        /// It panicked and its crash kernel takes over.
        const CRASH_LOADED = 1 << 1;
        /// It shuts the machine down by this port.
        const SHUTDOWN = 1 << 2;
    }
}

/// The device.
pub struct Pvpanic {
    requests: Arc<RequestQueue>,
}

impl Pvpanic {
    /// A port that tells `requests`.
    #[must_use]
    pub fn new(requests: Arc<RequestQueue>) -> Arc<Self> {
        Arc::new(Self { requests })
    }

    fn happened(&self, value: u8) {
        let events = Events::from_bits_truncate(value);
        let asks = [
            (Events::PANICKED, Request::GuestPanicked),
            (Events::CRASH_LOADED, Request::CrashLoaded),
            (Events::SHUTDOWN, Request::PowerOff),
        ];
        match asks.into_iter().find(|(event, _)| events.contains(*event)) {
            Some((_, request)) => self.requests.raise(request),
            None => guest_warn!("guest wrote {value:#x} to pvpanic; 1, 2 and 4 are the events there are"),
        }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(
            offset,
            data,
            |at| if at == 0 { Events::all().bits() } else { 0xff },
        );
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |at, value| {
            if at == 0 {
                self.happened(value);
            }
        });
    }
}

impl Device for Pvpanic {
    fn name(&self) -> &'static str {
        "pvpanic"
    }

    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(data: &[u8]) -> Option<Request> {
        let requests = RequestQueue::new().expect("a descriptor");
        Pvpanic::new(requests.clone()).write(0, data);
        requests.take()
    }

    #[test]
    fn a_guest_learns_which_events_there_are() {
        let pvpanic = Pvpanic::new(RequestQueue::new().expect("a descriptor"));
        let mut data = [0; 4];
        pvpanic.read(0, &mut data);
        assert_eq!(data, [0x07, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn each_event_has_its_request() {
        assert_eq!(written(&[1]), Some(Request::GuestPanicked));
        assert_eq!(written(&[2]), Some(Request::CrashLoaded));
        assert_eq!(written(&[4]), Some(Request::PowerOff));
    }

    #[test]
    fn of_several_events_the_gravest_counts() {
        assert_eq!(written(&[7]), Some(Request::GuestPanicked));
        assert_eq!(written(&[6]), Some(Request::CrashLoaded));
    }

    #[test]
    fn what_is_no_event_is_ignored_whatever_the_width() {
        assert_eq!(written(&[0]), None);
        assert_eq!(written(&[0xf8]), None);
        assert_eq!(written(&[0, 1]), None);
        assert_eq!(written(&[0, 1, 2, 4]), None);
        assert_eq!(written(&[0, 1, 2, 4, 1, 2, 4, 1]), None);
        assert_eq!(written(&[1, 0, 0, 0]), Some(Request::GuestPanicked));
    }
}
