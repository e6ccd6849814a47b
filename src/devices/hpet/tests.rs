//! The timers as a guest and the interrupt controller see them.

use super::*;
use crate::devices::clock::manual::{ManualAlarm, ManualClock};
use crate::devices::power::{Power, SCI_GSI};
use crate::devices::request::RequestQueue;
use crate::devices::rtc::RTC_GSI;

/// [`WINDOW_LEN`] as lengths of slices are counted.
const WINDOW: usize = 0x400;
const COUNTER: u64 = 0xf0;
const LEVEL: u64 = 1 << 1;
const ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const VALUE_SET: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const ROUTE_21: u64 = 21 << 9;

/// What reached the controller: pulses as `(gsi, None)`.
#[derive(Default)]
struct Wires(Mutex<Vec<(u32, Option<bool>)>>);

impl InterruptController for Wires {
    fn line_changed(&self, gsi: u32, asserted: bool) {
        self.0.lock().expect("not poisoned").push((gsi, Some(asserted)));
    }
    fn pulse(&self, gsi: u32) {
        self.0.lock().expect("not poisoned").push((gsi, None));
    }
}

struct Board {
    clock: Arc<ManualClock>,
    alarm: Arc<ManualAlarm>,
    wires: Arc<Wires>,
    /// The end that the clock of the board would drive.
    rtc: IrqLine,
    hpet: Arc<Hpet>,
}

impl Board {
    fn new() -> Self {
        let (clock, alarm) = (ManualClock::at(Duration::ZERO), Arc::new(ManualAlarm::default()));
        let wires = Arc::new(Wires::default());
        let requests = RequestQueue::new().expect("a descriptor");
        let power = Power::new(IrqLine::new(wires.clone(), SCI_GSI), requests);
        let clock_wire = ClockWire::new(wires.clone(), power);
        let rtc = IrqLine::new(clock_wire.clone(), RTC_GSI);
        let hpet = Hpet::new(wires.clone(), clock_wire, clock.clone(), alarm.clone());
        // Away from the moment of power-on, which a lower bound on intervals would show.
        clock.advance(Duration::from_millis(10));
        Self {
            clock,
            alarm,
            wires,
            rtc,
            hpet,
        }
    }

    fn read(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.hpet.read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u64) {
        self.hpet.write(offset, &value.to_le_bytes());
    }

    fn seen(&self) -> Vec<(u32, Option<bool>)> {
        std::mem::take(&mut *self.wires.0.lock().expect("not poisoned"))
    }

    fn micros(&self, micros: u64) {
        self.clock.advance(Duration::from_micros(micros));
    }

    /// Let time pass up to when the alarm goes off, and let it.
    fn sleep(&self) {
        let at = self.alarm.at().expect("the alarm is set");
        self.clock.advance(at.saturating_sub(self.clock.monotonic()));
        self.hpet.expired();
    }
}

#[test]
fn capabilities_say_three_64_bit_timers_at_10_mhz() {
    let board = Board::new();
    assert_eq!(board.read(0), 0x05f5_e100_8086_a201);
    assert_eq!(board.read(0x100), 0x00f0_0000_0000_0030);
    assert_eq!(board.read(0x108), u64::MAX);
}

#[test]
fn reserved_and_read_only_bits_do_not_stick() {
    let board = Board::new();
    for offset in (0..WINDOW_LEN)
        .step_by(8)
        .filter(|offset| ![0x20, COUNTER].contains(offset))
    {
        board.write(offset, u64::MAX);
    }
    assert_eq!(board.read(0), CAPABILITIES);
    assert_eq!(board.read(0x10), 3);
    assert_eq!(board.read(0x20), 0);
    assert_eq!(board.read(0x100), 0x00f0_0000_0000_0000 | 0x3f3e);
    assert_eq!(
        (board.read(0x18), board.read(0x110), board.read(0x160)),
        (0, 0, 0)
    );
}

#[test]
fn the_counter_runs_while_enabled_and_is_set_while_not() {
    let board = Board::new();
    board.write(COUNTER, 1_000);
    board.micros(10);
    assert_eq!(board.read(COUNTER), 1_000);
    board.write(0x10, 1);
    board.micros(10);
    assert_eq!(board.read(COUNTER), 1_100);
    board.write(COUNTER, 0);
    assert_eq!(board.read(COUNTER), 1_100);
    board.write(0x10, 0);
    board.micros(10);
    assert_eq!(board.read(COUNTER), 1_100);
}

#[test]
fn a_one_shot_timer_fires_once() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | ROUTE_21);
    board.write(0x108, 5_000);
    assert_eq!(board.alarm.at(), Some(Duration::from_micros(10_500)));
    board.sleep();
    assert_eq!(board.seen(), [(21, None)]);
    assert_eq!(board.alarm.at(), None);
    board.micros(10_000);
    board.read(COUNTER);
    assert_eq!(board.seen(), []);
}

#[test]
fn a_comparator_written_too_late_fires_at_once() {
    let board = Board::new();
    board.write(0x10, 1);
    board.micros(1_000);
    board.write(0x100, ENABLE | ROUTE_21);
    assert_eq!(board.seen(), []);
    board.write(0x108, 9_000);
    assert_eq!(board.seen(), [(21, None)]);
}

#[test]
fn a_comparator_of_all_ones_is_never() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | ROUTE_21);
    board.write(0x108, u64::MAX);
    assert_eq!(board.alarm.at(), None);
    assert_eq!(board.seen(), []);
}

#[test]
fn a_periodic_timer_keeps_its_beat() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | PERIODIC | VALUE_SET | MODE_32 | ROUTE_21);
    board.hpet.write(0x108, &2_000_u32.to_le_bytes());
    board.hpet.write(0x108, &1_000_u32.to_le_bytes());
    board.sleep();
    board.sleep();
    board.sleep();
    assert_eq!(board.seen(), [(21, None); 3]);
    assert_eq!(board.clock.monotonic(), Duration::from_micros(10_400));
    assert_eq!(board.read(0x108), 5_000);
}

#[test]
fn periods_that_nobody_looked_at_are_one_interrupt() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | PERIODIC | VALUE_SET | ROUTE_21);
    board.write(0x108, 1_000);
    board.micros(1_000_050);
    board.hpet.expired();
    assert_eq!(board.seen(), [(21, None)]);
    assert_eq!(board.read(0x108), 10_001_000);
}

#[test]
fn a_period_of_one_tick_leaves_the_event_loop_free() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | PERIODIC | VALUE_SET | ROUTE_21);
    board.write(0x108, 1);
    for _ in 0..100 {
        board.sleep();
    }
    assert!(board.clock.monotonic() >= Duration::from_micros(10_000) + 99 * LEAST_INTERVAL);
}

#[test]
fn a_period_of_zero_fires_once() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | PERIODIC | VALUE_SET | ROUTE_21);
    board.write(0x108, 0);
    assert_eq!(board.seen(), [(21, None)]);
    assert_eq!(board.alarm.at(), None);
}

#[test]
fn a_level_triggered_timer_holds_its_wire_until_acknowledged() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x120, ENABLE | LEVEL | ROUTE_21);
    board.write(0x128, 1_000);
    board.sleep();
    assert_eq!(board.seen(), [(21, Some(true))]);
    assert_eq!(board.read(0x20), 0b010);
    board.hpet.write(0x24, &[0xff; 4]);
    assert_eq!(board.read(0x20), 0b010);
    board.hpet.write(0x20, &[0b010]);
    assert_eq!(board.read(0x20), 0);
    assert_eq!(board.seen(), [(21, Some(false))]);
}

#[test]
fn a_timer_without_its_interrupt_enabled_sets_its_status_only() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x120, LEVEL | ROUTE_21);
    board.write(0x128, 1_000);
    assert_eq!(board.alarm.at(), None);
    board.micros(101);
    assert_eq!(board.read(0x20), 0b010);
    assert_eq!(board.seen(), []);
}

#[test]
fn legacy_replacement_takes_gsi_2_and_8() {
    let board = Board::new();
    board.write(0x10, 3);
    for timer in 0..3 {
        board.write(0x100 + 0x20 * timer, ENABLE | ROUTE_21);
        board.write(0x108 + 0x20 * timer, 1_000 * (timer + 1));
    }
    (0..3).for_each(|_| board.sleep());
    assert_eq!(board.seen(), [(2, None), (8, None), (21, None)]);
}

#[test]
fn under_legacy_replacement_the_clock_does_not_interrupt_beside_timer_1() {
    let board = Board::new();
    let ring = || {
        board.rtc.set(true);
        board.rtc.set(false);
        board.seen()
    };
    let rang = [(RTC_GSI, Some(true)), (RTC_GSI, Some(false))];
    assert_eq!(ring(), rang);
    // Not while the timers stand still, and not once they are stopped or reset.
    board.write(0x10, 2);
    assert_eq!(ring(), rang);
    board.write(0x10, 3);
    assert_eq!(ring(), []);
    board.write(0x120, ENABLE);
    board.write(0x128, 1_000);
    board.sleep();
    assert_eq!(board.seen(), [(RTC_GSI, None)]);
    board.write(0x10, 2);
    assert_eq!(ring(), rang);
    board.write(0x10, 3);
    board.hpet.reset();
    assert_eq!(ring(), rang);
}

#[test]
fn a_route_that_is_not_offered_goes_nowhere() {
    let board = Board::new();
    board.write(0x10, 1);
    for route in (0..32).filter(|route| ROUTES & 1 << route == 0) {
        board.write(0x100, ENABLE | route << 9);
        board.write(0x108, board.read(COUNTER));
        board.write(0x100, ENABLE | LEVEL | route << 9);
        board.write(0x108, board.read(COUNTER));
        board.write(0x20, 1);
    }
    assert_eq!(board.seen(), []);
}

#[test]
fn rerouting_an_asserted_timer_lets_go_of_the_old_wire() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | LEVEL | ROUTE_21);
    board.write(0x108, 0);
    board.seen();
    board.write(0x100, ENABLE | LEVEL | 22 << 9);
    assert_eq!(board.seen(), [(21, Some(false)), (22, Some(true))]);
}

#[test]
fn a_32_bit_timer_compares_the_lower_half() {
    let board = Board::new();
    board.write(COUNTER, 0x1_ffff_ff00);
    board.write(0x10, 1);
    board.write(0x100, ENABLE | MODE_32 | ROUTE_21);
    board.write(0x108, 0x100);
    assert_eq!(
        board.alarm.at(),
        Some(Duration::from_micros(10_000) + Duration::from_nanos(0x200 * 100))
    );
    board.sleep();
    assert_eq!(board.seen(), [(21, None)]);
}

#[test]
fn every_width_at_every_offset_is_the_bytes_of_the_registers() {
    let board = Board::new();
    board.write(0x10, 2);
    board.write(COUNTER, 0x1122_3344_5566_7788);
    board.write(0x108, 0x99aa_bbcc_ddee_ff00);
    let bytes: Vec<u8> = (0..WINDOW_LEN + 8)
        .step_by(8)
        .flat_map(|offset| board.read(offset).to_le_bytes())
        .collect();
    for width in [1, 2, 4, 8] {
        for offset in 0..=WINDOW - width {
            let mut data = vec![0xee; width];
            board.hpet.read(offset as u64, &mut data);
            assert_eq!(
                data,
                bytes[offset..offset + width],
                "{width} bytes at {offset:#x}"
            );
        }
    }
}

#[test]
fn every_write_of_every_width_is_survived_while_time_passes() {
    let board = Board::new();
    for value in [0x00, 0x46, 0x7f, 0xff] {
        for width in [1, 2, 4, 8] {
            for offset in 0..=WINDOW - width {
                board.hpet.write(offset as u64, &vec![value; width]);
                board.micros(7);
                board.hpet.expired();
            }
        }
    }
    assert_eq!(board.read(0), CAPABILITIES);
}

#[test]
fn a_reset_stops_the_counter_and_lets_go_of_wires() {
    let board = Board::new();
    board.write(0x10, 1);
    board.write(0x100, ENABLE | LEVEL | ROUTE_21);
    board.write(0x108, 0);
    board.seen();
    board.hpet.reset();
    assert_eq!(board.seen(), [(21, Some(false))]);
    assert_eq!(board.alarm.at(), None);
    assert_eq!(
        (board.read(0x10), board.read(0x20), board.read(COUNTER)),
        (0, 0, 0)
    );
    assert_eq!(board.read(0x100), Config::RESET.into_bits());
}
