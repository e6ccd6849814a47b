//! Time as devices see it, and the timers that call them back.
//!
//! A device computes its state from [`Clock`] whenever it is looked at and keeps one [`Alarm`] for the moment
//! it must act unasked, so that an idle machine has no ticking timer. Both are seams: tests set the time.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, EventSubscriber, Events};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

use crate::platform::host::HostError;

/// Where a device takes the time from.
pub trait Clock: Send + Sync {
    /// Time since some fixed moment; never runs backwards.
    fn monotonic(&self) -> Duration;

    /// Time since 1970-01-01 00:00:00 UTC; the operator may set it.
    fn utc(&self) -> Duration;
}

/// One timer of one device.
pub trait Alarm: Send + Sync {
    /// Call the device at `at` on the monotonic clock, or not at all (`None`). Replaces what was set before;
    /// a moment that has passed calls at once.
    fn set(&self, at: Option<Duration>);
}

/// A device that is called when its alarm goes off.
pub trait Expire: Send + Sync {
    /// The moment has come. It may have been put off since: the device looks at the clock, not at the call.
    fn expired(&self);
}

/// The host's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostClock;

impl HostClock {
    fn now(clock: ClockId) -> Duration {
        // Before 1970 is before this program: zero serves as well as any answer.
        Duration::try_from(clock_gettime(clock)).unwrap_or_default()
    }
}

impl Clock for HostClock {
    fn monotonic(&self) -> Duration {
        Self::now(ClockId::Monotonic)
    }

    fn utc(&self) -> Duration {
        Self::now(ClockId::Realtime)
    }
}

/// A timer descriptor on the host's monotonic clock, to be given to the event loop with [`HostAlarm::calls`].
#[derive(Debug)]
pub struct HostAlarm {
    fd: OwnedFd,
}

impl HostAlarm {
    /// A timer that is not set.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> Result<Arc<Self>, HostError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|source| HostError::new("create a timer descriptor", source))?;
        Ok(Arc::new(Self { fd }))
    }

    /// What the event loop subscribes so that `device` is called when this timer expires.
    #[must_use]
    pub fn calls(self: &Arc<Self>, device: Arc<dyn Expire>) -> Arc<Expiry> {
        Arc::new(Expiry {
            alarm: self.clone(),
            device,
        })
    }
}

impl Alarm for HostAlarm {
    fn set(&self, at: Option<Duration>) {
        // The kernel reads an absolute time of zero as "disarm".
        let wanted = at.map_or(Duration::ZERO, |at| at.max(Duration::from_nanos(1)));
        let it_value = Timespec::try_from(wanted).unwrap_or(Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 0,
        });
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value,
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &value)
            .expect("the descriptor is a timer and the time is valid");
    }
}

/// Ties a timer to the device it calls, inside the event loop.
pub struct Expiry {
    alarm: Arc<HostAlarm>,
    device: Arc<dyn Expire>,
}

impl EventSubscriber for Expiry {
    fn process(&self, _events: Events, _ops: &mut EventOps) {
        // How often it expired does not matter to a device that looks at the clock, and a timer that was put
        // off between the wake-up and here has nothing to read.
        let _ = rustix::io::read(&self.alarm.fd, &mut [0_u8; 8]);
        self.device.expired();
    }

    fn init(&self, ops: &mut EventOps) {
        let fd = self.alarm.fd.as_raw_fd();
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            tracing::error!(%error, "cannot watch a device's timer; the device will not be called");
        }
    }
}

/// Clocks and alarms that tests set by hand.
#[cfg(any(test, fuzzing))]
pub mod manual {
    use super::{Alarm, Clock};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::Duration;

    /// A clock that stands still until it is moved.
    #[derive(Debug, Default)]
    pub struct ManualClock {
        now: Mutex<(Duration, Duration)>,
    }

    impl ManualClock {
        /// Monotonic zero at `utc` since 1970.
        #[must_use]
        pub fn at(utc: Duration) -> Arc<Self> {
            Arc::new(Self {
                now: Mutex::new((Duration::ZERO, utc)),
            })
        }

        /// Let `time` pass.
        pub fn advance(&self, time: Duration) {
            let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
            now.0 = now.0.saturating_add(time);
            now.1 = now.1.saturating_add(time);
        }

        /// Set the wall clock, as an operator may.
        pub fn set_utc(&self, utc: Duration) {
            self.now.lock().unwrap_or_else(PoisonError::into_inner).1 = utc;
        }
    }

    impl Clock for ManualClock {
        fn monotonic(&self) -> Duration {
            self.now.lock().unwrap_or_else(PoisonError::into_inner).0
        }

        fn utc(&self) -> Duration {
            self.now.lock().unwrap_or_else(PoisonError::into_inner).1
        }
    }

    /// An alarm that only remembers when it was set for.
    #[derive(Debug, Default)]
    pub struct ManualAlarm(Mutex<Option<Duration>>);

    impl ManualAlarm {
        /// When it goes off.
        #[must_use]
        pub fn at(&self) -> Option<Duration> {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Alarm for ManualAlarm {
        fn set(&self, at: Option<Duration>) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Default)]
    struct Counter(AtomicU32);

    impl Expire for Counter {
        fn expired(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn watched() -> (Arc<HostAlarm>, Arc<Counter>, EventManager<Arc<Expiry>>) {
        let (alarm, counter) = (
            HostAlarm::new().expect("a descriptor"),
            Arc::new(Counter::default()),
        );
        let mut events = EventManager::new().expect("an epoll descriptor");
        events.add_subscriber(alarm.calls(counter.clone()));
        (alarm, counter, events)
    }

    #[test]
    fn an_alarm_calls_its_device_once() {
        let (alarm, counter, mut events) = watched();
        alarm.set(Some(HostClock.monotonic() + Duration::from_millis(1)));
        events.run_with_timeout(5_000).expect("a live epoll");
        events.run_with_timeout(20).expect("a live epoll");
        assert_eq!(counter.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_moment_that_has_passed_calls_at_once() {
        let (alarm, counter, mut events) = watched();
        alarm.set(Some(Duration::ZERO));
        events.run_with_timeout(5_000).expect("a live epoll");
        assert_eq!(counter.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn an_alarm_that_was_called_off_stays_silent() {
        let (alarm, counter, mut events) = watched();
        alarm.set(Some(HostClock.monotonic() + Duration::from_millis(5)));
        alarm.set(None);
        events.run_with_timeout(30).expect("a live epoll");
        assert_eq!(counter.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_moment_beyond_the_kernels_range_is_never() {
        let (alarm, counter, mut events) = watched();
        alarm.set(Some(Duration::MAX));
        events.run_with_timeout(10).expect("a live epoll");
        assert_eq!(counter.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_wall_clock_is_past_the_year_2020() {
        assert!(HostClock.utc() > Duration::from_secs(1_577_836_800));
    }
}
