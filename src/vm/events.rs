//! The event loop for everything that is not a processor, and the signals by which the operator speaks.

use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSubscriber, Events, SubscriberOps};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use vmm_sys_util::epoll::EventSet;

use crate::platform::host::HostError;

/// Waits for descriptors and calls who watches them, one at a time.
pub struct EventLoop {
    manager: EventManager<Arc<dyn EventSubscriber>>,
}

/// A descriptor whose reader looks by himself once the loop returns.
struct Wake(RawFd);

impl EventSubscriber for Wake {
    fn process(&self, _events: Events, _ops: &mut EventOps) {}

    fn init(&self, ops: &mut EventOps) {
        ops.add(Events::new_raw(self.0, EventSet::IN))
            .expect("the descriptor is open and watched once");
    }
}

impl EventLoop {
    /// One that watches nothing yet.
    pub fn new() -> Result<Self, HostError> {
        let manager = EventManager::new().map_err(|error| refused("create the event loop", error))?;
        Ok(Self { manager })
    }

    /// Call `subscriber` for what it watches.
    pub fn add(&mut self, subscriber: Arc<dyn EventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Return from [`Self::turn`] when `source` is readable. It stays open for as long as the loop lives.
    pub fn wake_for(&mut self, source: &impl AsRawFd) {
        self.add(Arc::new(Wake(source.as_raw_fd())));
    }

    /// Wait, for `until` at the longest, and call whom it concerns.
    pub fn turn(&mut self, until: Option<Instant>) -> Result<(), HostError> {
        let timeout = until.map_or(-1, |until| {
            milliseconds(until.saturating_duration_since(Instant::now()))
        });
        self.manager
            .run_with_timeout(timeout)
            .map(drop)
            .map_err(|error| refused("wait for events", error))
    }
}

/// `time` as epoll takes it, rounded up so that a wait never ends early.
fn milliseconds(time: Duration) -> i32 {
    i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

fn refused(action: &str, error: event_manager::Error) -> HostError {
    let source = match error {
        event_manager::Error::Epoll(errno) => std::io::Error::from_raw_os_error(errno.errno()),
        other => std::io::Error::other(other),
    };
    HostError::new(action, source)
}

/// Signals by which the operator wants something.
pub struct Signals {
    received: UnixStream,
}

impl Signals {
    /// SIGTERM, SIGINT and SIGHUP: the machine is to end.
    pub fn stop() -> Result<Self, HostError> {
        Self::take(&[SIGTERM, SIGINT, SIGHUP], "handle SIGTERM, SIGINT and SIGHUP")
    }

    /// SIGUSR1: the machine is to tell its state.
    pub fn report() -> Result<Self, HostError> {
        Self::take(&[SIGUSR1], "handle SIGUSR1")
    }

    /// SIGUSR2: the guest is to pause.
    pub fn pause() -> Result<Self, HostError> {
        Self::take(&[SIGUSR2], "handle SIGUSR2")
    }

    /// SIGCONT: a paused guest is to go on. Two signals rather than one that toggles, so that who sends one knows what
    /// comes of it.
    pub fn resume() -> Result<Self, HostError> {
        Self::take(&[SIGCONT], "handle SIGCONT")
    }

    /// Take `signals` from now on; they end the process no more by themselves.
    fn take(signals: &[i32], action: &str) -> Result<Self, HostError> {
        let failed = |source| HostError::new(action, source);
        let (received, sent) = UnixStream::pair().map_err(failed)?;
        received.set_nonblocking(true).map_err(failed)?;
        for &signal in signals {
            let sent = sent.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, sent).map_err(failed)?;
        }
        Ok(Self { received })
    }

    /// How many have come since the last look, 16 at the most.
    pub fn count(&mut self) -> usize {
        self.received.read(&mut [0; 16]).unwrap_or(0)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.received.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// Who reads what woke it, and wakes itself again if it is never done.
    struct Worker {
        more: EventFd,
        never_done: bool,
        turns: AtomicUsize,
    }

    impl Worker {
        fn woken(never_done: bool) -> Arc<Self> {
            let more = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
            more.write(1).expect("room");
            let turns = AtomicUsize::new(0);
            Arc::new(Self {
                more,
                never_done,
                turns,
            })
        }
    }

    impl EventSubscriber for Worker {
        fn process(&self, _events: Events, _ops: &mut EventOps) {
            self.more.read().expect("it was woken");
            self.turns.fetch_add(1, Ordering::Relaxed);
            if self.never_done {
                self.more.write(1).expect("room");
            }
        }

        fn init(&self, ops: &mut EventOps) {
            ops.add(Events::new_raw(self.more.as_raw_fd(), EventSet::IN))
                .expect("the descriptor is open and watched once");
        }
    }

    #[test]
    fn who_is_never_done_has_one_turn_and_then_all_others_theirs() {
        let mut events = EventLoop::new().expect("an epoll descriptor");
        let (busy, others) = (Worker::woken(true), [(); 3].map(|()| Worker::woken(false)));
        events.add(busy.clone());
        others.iter().for_each(|other| events.add(other.clone()));
        // The loop comes back after each round, and whoever drives it looks at signals then.
        for round in 1..=3 {
            events.turn(None).expect("no error");
            assert_eq!(busy.turns.load(Ordering::Relaxed), round);
        }
        let turns = others.map(|other| other.turns.load(Ordering::Relaxed));
        assert_eq!(turns, [1; 3]);
    }

    #[test]
    fn a_wait_is_rounded_up_and_never_overflows() {
        assert_eq!(milliseconds(Duration::from_nanos(1)), 1);
        assert_eq!(milliseconds(Duration::from_millis(7)), 7);
        assert_eq!(milliseconds(Duration::ZERO), 0);
        assert_eq!(milliseconds(Duration::MAX), i32::MAX);
    }

    #[test]
    fn the_loop_returns_when_a_watched_descriptor_is_readable() {
        let (watched, mut other) = UnixStream::pair().expect("sockets");
        let mut events = EventLoop::new().expect("an epoll descriptor");
        events.wake_for(&watched);
        other.write_all(b"x").expect("room");
        // Without the byte this would never return.
        events.turn(None).expect("no error");
    }

    #[test]
    fn the_loop_returns_when_its_time_is_up() {
        let mut events = EventLoop::new().expect("an epoll descriptor");
        let until = Instant::now() + Duration::from_millis(5);
        events.turn(Some(until)).expect("no error");
        assert!(Instant::now() >= until);
    }

    #[test]
    fn a_signal_for_a_report_is_no_stop_signal() {
        let (mut stop, mut report) = (
            Signals::stop().expect("handlers"),
            Signals::report().expect("a handler"),
        );
        signal_hook::low_level::raise(SIGUSR1).expect("a valid signal");
        assert_eq!((stop.count(), report.count()), (0, 1));
    }

    #[test]
    fn signals_to_pause_and_to_go_on_are_told_apart() {
        let (mut pause, mut resume) = (
            Signals::pause().expect("a handler"),
            Signals::resume().expect("a handler"),
        );
        signal_hook::low_level::raise(SIGUSR2).expect("a valid signal");
        assert_eq!((pause.count(), resume.count()), (1, 0));
        signal_hook::low_level::raise(SIGCONT).expect("a valid signal");
        assert_eq!((pause.count(), resume.count()), (0, 1));
    }

    #[test]
    fn stop_signals_are_counted_instead_of_ending_the_process() {
        let mut signals = Signals::stop().expect("handlers");
        assert_eq!(signals.count(), 0);
        signal_hook::low_level::raise(SIGHUP).expect("a valid signal");
        signal_hook::low_level::raise(SIGHUP).expect("a valid signal");
        assert_eq!(signals.count(), 2);
        assert_eq!(signals.count(), 0);
    }
}
