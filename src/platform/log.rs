//! Log lines that a guest can cause, limited so that it cannot flood the operator.
//!
//! What a guest can trigger once it can trigger a million times. Each `guest_warn!` or `guest_info!` has a limiter of its
//! own: a burst, then a line every so often, with the count of what was swallowed.

#[cfg(test)]
pub(crate) mod testing;

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines let through at once, before the limit bites.
const BURST: u32 = 10;
/// One further line per this time.
const REFILL: Duration = Duration::from_secs(1);

/// The limiter of one call site.
pub struct Limiter(Mutex<Bucket>);

struct Bucket {
    tokens: u32,
    refilled: Option<Instant>,
    swallowed: u64,
}

impl Limiter {
    /// A full one.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "made by macros in statics only")]
    pub const fn new() -> Self {
        Self(Mutex::new(Bucket {
            tokens: BURST,
            refilled: None,
            swallowed: 0,
        }))
    }

    /// Whether a line may be written now, and how many were swallowed before it.
    pub fn admit_now(&self) -> Option<u64> {
        #[cfg(test)]
        if testing::is_heard() {
            return Some(0);
        }
        self.admit(Instant::now())
    }

    /// Whether a line may be written at `now`, and how many were swallowed before it.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let since = *bucket.refilled.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_secs() / REFILL.as_secs();
        if earned > 0 {
            bucket.tokens = BURST.min(
                bucket
                    .tokens
                    .saturating_add(u32::try_from(earned).unwrap_or(u32::MAX)),
            );
            bucket.refilled = Some(now);
        }
        if bucket.tokens == 0 {
            bucket.swallowed += 1;
            return None;
        }
        bucket.tokens -= 1;
        Some(std::mem::take(&mut bucket.swallowed))
    }
}

/// Warn about something the guest did. Takes what `format!` takes; limited per call site.
#[macro_export]
macro_rules! guest_warn {
    ($($arg:tt)+) => { $crate::guest_line!(warn, $($arg)+) };
}

/// Tell what the guest did that it may do. Takes what `format!` takes; limited per call site.
#[macro_export]
macro_rules! guest_info {
    ($($arg:tt)+) => { $crate::guest_line!(info, $($arg)+) };
}

/// What [`guest_warn!`] and [`guest_info!`] share: a line of `tracing`'s macro `$level`, limited per call site.
#[doc(hidden)]
#[macro_export]
macro_rules! guest_line {
    ($level:ident, $($arg:tt)+) => {{
        static LIMITER: $crate::platform::log::Limiter = $crate::platform::log::Limiter::new();
        if let Some(swallowed) = LIMITER.admit_now() {
            if swallowed > 0 {
                tracing::$level!(swallowed, $($arg)+);
            } else {
                tracing::$level!($($arg)+);
            }
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_one_line_a_second() {
        let limiter = Limiter::new();
        let start = Instant::now();
        let passed = (0..100).filter(|_| limiter.admit(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(limiter.admit(start + REFILL), Some(90));
        assert_eq!(limiter.admit(start + REFILL), None);
    }

    #[test]
    fn time_that_runs_backwards_admits_nothing_extra() {
        let limiter = Limiter::new();
        let later = Instant::now() + Duration::from_secs(60);
        (0..BURST).for_each(|_| assert!(limiter.admit(later).is_some()));
        assert_eq!(
            limiter.admit(later.checked_sub(Duration::from_secs(30)).expect("in range")),
            None
        );
    }
}
