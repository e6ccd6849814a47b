//! What a device asks of the machine's owner: to power off, to reset, to end with a status.
//!
//! A guest can ask a million times before anybody looks. The queue holds each distinct request once, so it is
//! bounded by the number of things there are to ask for.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::platform::host::HostError;

/// Something that only the owner of the machine can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// The guest entered the soft-off state (ACPI S5).
    PowerOff,
    /// The guest asked for a reset of the whole machine.
    Reset,
    /// The guest's kernel panicked and nobody in the guest takes care of it.
    GuestPanicked,
    /// The guest's kernel panicked and its own crash kernel takes over; the machine goes on.
    CrashLoaded,
    /// A test image ended, and this is to be the exit status of the process.
    Exit(u8),
    /// The operator asked at the console to end the machine at once.
    Quit,
}

/// Requests that wait for the machine's owner, and a descriptor that is readable while there are any.
pub struct RequestQueue {
    waiting: Mutex<VecDeque<Request>>,
    readable: OwnedFd,
}

impl RequestQueue {
    /// An empty queue.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> Result<Arc<Self>, HostError> {
        let readable = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|source| HostError::new("create the eventfd of the machine's requests", source))?;
        Ok(Arc::new(Self {
            waiting: Mutex::default(),
            readable,
        }))
    }

    /// Ask. A request that already waits is not queued twice.
    pub fn raise(&self, request: Request) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.contains(&request) {
            return;
        }
        waiting.push_back(request);
        match rustix::io::write(&self.readable, &1_u64.to_ne_bytes()) {
            // A full counter is readable, which is all that is wanted of it.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, ?request, "cannot wake the machine's owner"),
        }
    }

    /// The oldest request, or `None`; the descriptor stops being readable with the last one.
    pub fn take(&self) -> Option<Request> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let request = waiting.pop_front();
        self.settle(&waiting);
        request
    }

    /// The guest starts anew: what it asked for until now is forgotten. What the operator asks for is not the guest's to undo.
    pub fn forget_the_guests(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|request| *request == Request::Quit);
        self.settle(&waiting);
    }

    /// Nothing to read is what an empty queue looks like.
    fn settle(&self, waiting: &VecDeque<Request>) {
        if waiting.is_empty() {
            let _ = rustix::io::read(&self.readable, &mut [0_u8; 8]);
        }
    }
}

/// Readable while a request waits.
impl AsRawFd for RequestQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_readable(queue: &RequestQueue) -> bool {
        let mut fds = [PollFd::new(&queue.readable, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).expect("a live descriptor") == 1
    }

    #[test]
    fn requests_come_out_in_the_order_they_were_raised() {
        let queue = RequestQueue::new().expect("a descriptor");
        queue.raise(Request::CrashLoaded);
        queue.raise(Request::PowerOff);
        assert_eq!(queue.take(), Some(Request::CrashLoaded));
        assert_eq!(queue.take(), Some(Request::PowerOff));
        assert_eq!(queue.take(), None);
    }

    #[test]
    fn the_descriptor_is_readable_exactly_while_something_waits() {
        let queue = RequestQueue::new().expect("a descriptor");
        assert!(!is_readable(&queue));
        queue.raise(Request::Reset);
        queue.raise(Request::Exit(3));
        assert!(is_readable(&queue));
        queue.take();
        assert!(is_readable(&queue));
        queue.take();
        assert!(!is_readable(&queue));
    }

    #[test]
    fn a_guest_that_starts_anew_undoes_its_own_requests_and_not_the_operators() {
        let queue = RequestQueue::new().expect("a descriptor");
        for request in [Request::Reset, Request::Quit, Request::PowerOff] {
            queue.raise(request);
        }
        queue.forget_the_guests();
        assert!(is_readable(&queue));
        assert_eq!((queue.take(), queue.take()), (Some(Request::Quit), None));
        queue.raise(Request::Reset);
        queue.forget_the_guests();
        assert!(!is_readable(&queue));
    }

    #[test]
    fn a_guest_that_asks_for_ever_fills_nothing() {
        let queue = RequestQueue::new().expect("a descriptor");
        (0..100_000).for_each(|_| queue.raise(Request::Reset));
        assert_eq!(queue.take(), Some(Request::Reset));
        assert_eq!(queue.take(), None);
    }
}
