//! The clock as a guest and the interrupt controller see it.

use super::*;
use crate::devices::clock::manual::{ManualAlarm, ManualClock};
use crate::platform::irq::InterruptController;
use std::sync::atomic::{AtomicBool, Ordering};

/// 2026-11-22 16:39:58 UTC, a Sunday.
const START: Duration = Duration::from_secs(1_795_365_598);
const SECOND: Duration = Duration::from_secs(1);

const PIE: u8 = 0x40;
const AIE: u8 = 0x20;
const UIE: u8 = 0x10;
const SET: u8 = 0x80;
const H24: u8 = 0x02;

#[derive(Default)]
struct Wire(AtomicBool);

impl InterruptController for Wire {
    fn line_changed(&self, gsi: u32, asserted: bool) {
        assert_eq!(gsi, RTC_GSI);
        self.0.store(asserted, Ordering::Relaxed);
    }
    fn pulse(&self, _gsi: u32) {}
}

struct Board {
    clock: Arc<ManualClock>,
    alarm: Arc<ManualAlarm>,
    wire: Arc<Wire>,
    rtc: Arc<Rtc>,
}

impl Board {
    fn new() -> Self {
        let (clock, alarm) = (ManualClock::at(START), Arc::new(ManualAlarm::default()));
        let wire = Arc::new(Wire::default());
        let line = IrqLine::new(wire.clone(), RTC_GSI);
        let rtc = Rtc::new(line, clock.clone(), alarm.clone());
        Self {
            clock,
            alarm,
            wire,
            rtc,
        }
    }

    fn read(&self, index: u8) -> u8 {
        BusDevice::write(&*self.rtc, 0, &[index]);
        let mut data = [0];
        BusDevice::read(&*self.rtc, 1, &mut data);
        data[0]
    }

    fn write(&self, index: u8, value: u8) {
        BusDevice::write(&*self.rtc, 0, &[index]);
        BusDevice::write(&*self.rtc, 1, &[value]);
    }

    fn time(&self) -> [u8; 8] {
        TIME.map(|index| self.read(index))
    }

    fn interrupts(&self) -> bool {
        self.wire.0.load(Ordering::Relaxed)
    }

    /// Let time pass up to when the alarm goes off, and let it.
    fn sleep(&self) {
        let at = self.alarm.at().expect("the alarm is set");
        self.clock
            .advance(at.checked_sub(self.clock.monotonic()).expect("not in the past"));
        self.rtc.expired();
    }
}

#[test]
fn registers_have_their_reset_values() {
    let board = Board::new();
    assert_eq!(
        [0x0a, 0x0b, 0x0c, 0x0d].map(|index| board.read(index)),
        [0x26, 0x02, 0x00, 0x80]
    );
}

#[test]
fn the_time_is_the_hosts_in_bcd() {
    let board = Board::new();
    assert_eq!(board.time(), [0x58, 0x39, 0x16, 1, 0x22, 0x11, 0x26, 0x20]);
    board.clock.advance(3 * SECOND);
    assert_eq!(board.time(), [0x01, 0x40, 0x16, 1, 0x22, 0x11, 0x26, 0x20]);
}

#[test]
fn binary_and_twelve_hours_are_formats_of_the_same_time() {
    let board = Board::new();
    board.write(index::B, H24 | 0x04);
    assert_eq!(board.time(), [58, 39, 16, 1, 22, 11, 26, 20]);
    board.write(index::B, 0x00);
    assert_eq!(board.read(index::HOURS), 0x84);
    board.write(index::B, 0x04);
    assert_eq!(board.read(index::HOURS), 0x80 | 4);
}

#[test]
fn a_time_that_was_set_goes_on_from_there() {
    let board = Board::new();
    board.write(index::B, SET | H24);
    for (index, value) in TIME
        .into_iter()
        .zip([0x59, 0x59, 0x23, 3, 0x28, 0x02, 0x24, 0x20])
    {
        board.write(index, value);
    }
    board.clock.advance(100 * SECOND);
    assert_eq!(board.time(), [0x59, 0x59, 0x23, 3, 0x28, 0x02, 0x24, 0x20]);
    board.write(index::B, H24);
    board.clock.advance(SECOND);
    assert_eq!(board.time(), [0x00, 0x00, 0x00, 5, 0x29, 0x02, 0x24, 0x20]);
}

#[test]
fn out_of_its_reset_the_clock_updates_after_half_a_second() {
    let board = Board::new();
    board.write(index::B, SET | H24);
    board.write(index::A, 0x76);
    board.write(index::SECONDS, 0x10);
    board.clock.advance(Duration::from_millis(700));
    board.write(index::B, H24);
    assert_eq!(board.read(index::SECONDS), 0x10);
    board.clock.advance(5 * SECOND);
    assert_eq!(board.read(index::SECONDS), 0x10);
    board.write(index::A, 0x26);
    board.clock.advance(Duration::from_millis(499));
    assert_eq!(board.read(index::SECONDS), 0x10);
    board.clock.advance(Duration::from_millis(1));
    assert_eq!(board.read(index::SECONDS), 0x11);
}

#[test]
fn one_field_can_be_set_while_the_clock_runs() {
    let board = Board::new();
    board.write(index::MINUTES, 0x07);
    assert_eq!(board.time(), [0x58, 0x07, 0x16, 1, 0x22, 0x11, 0x26, 0x20]);
}

#[test]
fn a_time_that_is_none_changes_nothing() {
    let board = Board::new();
    for (index, value) in [
        (index::MONTH, 0x13),
        (index::MONTH, 0x02 | 0x80),
        (index::DAY_OF_MONTH, 0x31),
        (index::HOURS, 0x24),
        (index::SECONDS, 0x5a),
        (index::CENTURY, 0xff),
    ] {
        board.write(index, value);
        board.write(index::B, SET | H24);
        board.write(index, value);
        board.write(index::B, H24);
        assert_eq!(
            board.time(),
            [0x58, 0x39, 0x16, 1, 0x22, 0x11, 0x26, 0x20],
            "{index:#x}"
        );
    }
}

#[test]
fn an_update_is_announced_244_microseconds_ahead() {
    let board = Board::new();
    board.clock.advance(Duration::from_micros(999_755));
    assert_eq!(board.read(index::A), 0x26);
    board.clock.advance(Duration::from_micros(1));
    assert_eq!(board.read(index::A), 0xa6);
    board.write(index::B, SET | H24);
    assert_eq!(board.read(index::A), 0x26);
}

#[test]
fn an_update_interrupts_once_a_second_until_acknowledged() {
    let board = Board::new();
    board.clock.advance(Duration::from_millis(300));
    board.write(index::B, H24 | UIE);
    board.read(index::C);
    assert_eq!(board.alarm.at(), Some(SECOND));
    board.sleep();
    assert!(board.interrupts());
    assert_eq!(board.alarm.at(), None);
    assert_eq!(board.read(index::C) & 0x90, 0x90);
    assert!(!board.interrupts());
    assert_eq!(board.alarm.at(), Some(2 * SECOND));
}

#[test]
fn flags_are_set_whether_or_not_they_interrupt() {
    let board = Board::new();
    board.write(index::A, 0x20);
    board.clock.advance(SECOND);
    assert_eq!(board.read(index::C), 0x10);
    assert_eq!(board.read(index::C), 0x00);
    assert!(!board.interrupts());
}

#[test]
fn an_alarm_rings_at_its_second() {
    let board = Board::new();
    board.write(index::SECONDS_ALARM, 0x00);
    board.write(index::MINUTES_ALARM, 0x45);
    board.write(index::HOURS_ALARM, 0x16);
    board.write(index::B, H24 | AIE);
    assert_eq!(board.alarm.at(), Some(Duration::from_secs(302)));
    board.sleep();
    assert!(board.interrupts());
    assert_eq!(board.read(index::C) & 0xa0, 0xa0);
    assert_eq!(
        board.alarm.at(),
        Some(Duration::from_secs(302) + Duration::from_secs(86_400))
    );
}

#[test]
fn an_alarm_that_nobody_waits_for_sets_no_timer() {
    let board = Board::new();
    board.write(index::SECONDS_ALARM, 0xff);
    board.write(index::MINUTES_ALARM, 0xff);
    board.write(index::HOURS_ALARM, 0xff);
    assert_eq!(board.alarm.at(), None);
    board.clock.advance(SECOND);
    assert_eq!(board.read(index::C) & 0xb0, 0x30);
}

#[test]
fn an_alarm_that_never_comes_sets_no_timer() {
    let board = Board::new();
    board.write(index::HOURS_ALARM, 0x24);
    board.write(index::B, H24 | AIE);
    assert_eq!(board.alarm.at(), None);
}

#[test]
fn periods_interrupt_at_their_rate_and_wait_for_the_guest() {
    let board = Board::new();
    board.write(index::A, 0x26);
    board.write(index::B, H24 | PIE);
    // 32 of 32768 ticks, rounded up to whole nanoseconds.
    assert_eq!(board.alarm.at(), Some(Duration::from_nanos(976_563)));
    board.sleep();
    assert!(board.interrupts());
    assert_eq!(board.alarm.at(), None);
    board.clock.advance(Duration::from_millis(10));
    assert_eq!(board.read(index::C), 0xc0);
    assert_eq!(board.alarm.at(), Some(Duration::from_nanos(11_718_750)));
}

#[test]
fn every_rate_has_the_period_of_the_data_sheet() {
    let micros = |rate| {
        A::new()
            .with_rate(rate)
            .period()
            .map(|ticks| u64::from(ticks) * 1_000_000 / 32_768)
    };
    assert_eq!(micros(0), None);
    assert_eq!(
        [1, 2, 3, 6, 8, 9, 15].map(|rate| micros(rate).expect("a rate")),
        [3_906, 7_812, 122, 976, 3_906, 7_812, 500_000]
    );
}

#[test]
fn setting_the_time_turns_the_update_interrupt_off() {
    let board = Board::new();
    board.write(index::B, H24 | UIE);
    board.write(index::B, SET | H24 | UIE);
    assert_eq!(board.read(index::B), SET | H24);
    board.clock.advance(5 * SECOND);
    assert_eq!(board.read(index::C) & 0x10, 0);
}

#[test]
fn a_host_clock_set_back_stops_no_interrupt_for_good() {
    let board = Board::new();
    board.write(index::B, H24 | UIE);
    board.clock.set_utc(Duration::from_secs(1_000_000_000));
    board.rtc.expired();
    board.clock.advance(SECOND);
    board.rtc.expired();
    assert!(board.interrupts());
}

#[test]
fn a_host_clock_beyond_all_dates_does_not_call_back_for_ever() {
    let board = Board::new();
    board.write(index::SECONDS_ALARM, 0xff);
    board.write(index::MINUTES_ALARM, 0xff);
    board.write(index::HOURS_ALARM, 0xff);
    board.write(index::B, H24 | UIE | AIE);
    board.clock.set_utc(Duration::from_secs(u64::MAX));
    board.rtc.expired();
    board.read(index::C);
    assert_eq!(board.alarm.at(), Some(SECOND));
}

#[test]
fn memory_keeps_every_byte_and_read_only_registers_keep_theirs() {
    let board = Board::new();
    let memory: Vec<u8> = (0x0e..0x80).filter(|index| *index != index::CENTURY).collect();
    memory.iter().for_each(|index| board.write(*index, !index));
    assert!(memory.iter().all(|index| board.read(*index) == !index));
    board.write(index::C, 0xff);
    board.write(index::D, 0x00);
    board.write(index::A, 0xa6);
    assert_eq!(
        [index::A, index::C, index::D].map(|index| board.read(index)),
        [0x26, 0x00, 0x80]
    );
}

#[test]
fn the_nmi_bit_selects_nothing() {
    let board = Board::new();
    board.write(0x80 | 0x20, 0x5a);
    assert_eq!(board.read(0x20), 0x5a);
}

#[test]
fn a_wide_write_is_index_and_data() {
    let board = Board::new();
    BusDevice::write(&*board.rtc, 0, &[0x20, 0x5a]);
    assert_eq!(board.read(0x20), 0x5a);
    let mut both = [0; 2];
    BusDevice::read(&*board.rtc, 0, &mut both);
    assert_eq!(both, [0xff, 0x5a]);
}

#[test]
fn every_width_at_every_offset_and_index_is_survived() {
    let board = Board::new();
    for value in [0x00, 0x5a, 0xff] {
        for index in 0..=0xff {
            for (width, offset) in [(1, 0), (1, 1), (2, 0), (2, 1), (4, 0), (8, 0)] {
                BusDevice::write(&*board.rtc, 0, &[index]);
                BusDevice::write(&*board.rtc, offset, &vec![value; width]);
                BusDevice::read(&*board.rtc, offset, &mut vec![0; width]);
            }
        }
    }
    board.write(index::A, 0x26);
    board.write(index::B, SET | H24);
    for (index, value) in TIME
        .into_iter()
        .zip([0x59, 0x59, 0x23, 3, 0x28, 0x02, 0x24, 0x20])
    {
        board.write(index, value);
    }
    board.write(index::B, H24);
    assert_eq!(board.time(), [0x59, 0x59, 0x23, 4, 0x28, 0x02, 0x24, 0x20]);
}

#[test]
fn a_reset_stops_interrupts_and_keeps_time_and_memory() {
    let board = Board::new();
    board.write(0x40, 0x77);
    board.write(index::MINUTES, 0x07);
    board.write(index::B, H24 | UIE | AIE | PIE);
    board.clock.advance(SECOND);
    board.rtc.expired();
    assert!(board.interrupts());
    board.rtc.reset();
    assert!(!board.interrupts());
    assert_eq!(board.alarm.at(), None);
    assert_eq!(
        (board.read(index::B), board.read(0x40), board.read(index::MINUTES)),
        (H24, 0x77, 0x07)
    );
}
