//! The port by which a test image ends the machine with a status: 0x501, present only when asked for.
//!
//! Writing v ends the process with the status (v << 1) | 1, so that no value passes for the success of a guest
//! that shut down properly. Bare-metal test suites for KVM expect a port of this kind.

use std::sync::Arc;

use super::Device;
use super::request::{Request, RequestQueue};
use crate::platform::bus::BusDevice;

/// The first port.
pub const EXIT_PORT: u64 = 0x501;
/// Ports it owns: a value may be written with 1, 2 or 4 bytes.
pub const PORTS: u64 = 4;

/// The port.
pub struct ExitPort {
    requests: Arc<RequestQueue>,
}

impl ExitPort {
    /// A port that tells `requests`.
    #[must_use]
    pub fn new(requests: Arc<RequestQueue>) -> Arc<Self> {
        Arc::new(Self { requests })
    }
}

impl BusDevice for ExitPort {
    /// Zeros: how a guest sees that the port is there.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [lowest, ..]) = (offset, data) {
            self.requests.raise(Request::Exit(lowest << 1 | 1));
        }
    }
}

impl Device for ExitPort {
    fn name(&self) -> &'static str {
        "exit-port"
    }

    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(offset: u64, data: &[u8]) -> Option<Request> {
        let requests = RequestQueue::new().expect("a descriptor");
        ExitPort::new(requests.clone()).write(offset, data);
        requests.take()
    }

    #[test]
    fn the_status_is_odd_and_tells_the_value() {
        assert_eq!(written(0, &[0]), Some(Request::Exit(1)));
        assert_eq!(written(0, &[0x10]), Some(Request::Exit(0x21)));
    }

    #[test]
    fn a_status_has_eight_bits() {
        assert_eq!(written(0, &[0xff]), Some(Request::Exit(0xff)));
        assert_eq!(written(0, &[0x80, 0, 0, 0]), Some(Request::Exit(1)));
    }

    #[test]
    fn every_width_ends_the_machine_and_other_offsets_do_not() {
        for width in [1, 2, 4, 8] {
            assert_eq!(written(0, &vec![3; width]), Some(Request::Exit(7)));
            assert_eq!(written(1, &vec![3; width]), None);
        }
        assert_eq!(written(0, &[]), None);
    }

    #[test]
    fn reading_shows_that_it_is_there_and_ends_nothing() {
        let requests = RequestQueue::new().expect("a descriptor");
        let mut data = [0xff; 4];
        ExitPort::new(requests.clone()).read(0, &mut data);
        assert_eq!(data, [0; 4]);
        assert_eq!(requests.take(), None);
    }
}
