//! The port by which a guest says how far its boot has come: 0x80, where firmware writes its progress codes.
//!
//! One code means something here: 0x41, written by a guest's init, whose time is kept for the statistics.
//! Others, and the writes by which drivers merely pass time, are ignored.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::Device;
use super::clock::Clock;
use crate::platform::bus::BusDevice;

/// The one port.
pub const MILESTONE_PORT: u64 = 0x80;
/// What a guest's init writes.
pub const INIT_REACHED: u8 = 0x41;

/// The port.
pub struct Milestone {
    clock: Arc<dyn Clock>,
    init_reached: OnceLock<Duration>,
}

impl Milestone {
    /// A port that takes the time from `clock`.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            clock,
            init_reached: OnceLock::new(),
        })
    }

    /// When init was first reached, on the monotonic clock.
    #[must_use]
    pub fn init_reached(&self) -> Option<Duration> {
        self.init_reached.get().copied()
    }
}

impl BusDevice for Milestone {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data.first()) == (0, Some(&INIT_REACHED)) {
            self.init_reached.get_or_init(|| self.clock.monotonic());
        }
    }
}

/// The first boot is what the statistics are about, so a reset forgets nothing.
impl Device for Milestone {
    fn name(&self) -> &'static str {
        "milestone"
    }

    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::clock::manual::ManualClock;

    fn port() -> (Arc<ManualClock>, Arc<Milestone>) {
        let clock = ManualClock::at(Duration::ZERO);
        (clock.clone(), Milestone::new(clock))
    }

    #[test]
    fn the_first_time_init_is_reached_counts() {
        let (clock, port) = port();
        clock.advance(Duration::from_millis(700));
        port.write(0, &[INIT_REACHED]);
        clock.advance(Duration::from_millis(700));
        port.reset();
        port.write(0, &[INIT_REACHED]);
        assert_eq!(port.init_reached(), Some(Duration::from_millis(700)));
    }

    #[test]
    fn other_codes_and_reads_are_no_milestones() {
        let (_, port) = port();
        (0..=u8::MAX)
            .filter(|code| *code != INIT_REACHED)
            .for_each(|code| port.write(0, &[code]));
        port.write(1, &[INIT_REACHED]);
        port.write(0, &[]);
        for width in [1, 2, 4, 8] {
            let mut data = vec![0; width];
            port.read(0, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff));
        }
        assert_eq!(port.init_reached(), None);
    }

    #[test]
    fn every_width_carries_the_code_in_its_lowest_byte() {
        for width in [1, 2, 4, 8] {
            let (_, port) = port();
            let mut data = vec![0; width];
            data[0] = INIT_REACHED;
            port.write(0, &data);
            assert!(port.init_reached().is_some(), "{width} bytes");
        }
    }
}
