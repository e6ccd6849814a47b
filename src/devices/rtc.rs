//! The clock of the board: an MC146818 with its CMOS memory, ports 0x70 and 0x71, GSI 8.
//!
//! What it offers: the time of day in UTC, BCD or binary, 24 or 12 hours, with the century in register 0x32;
//! alarm, periodic and update-ended interrupts; 114 bytes of memory that live as long as the process.
//!
//! Nothing here ticks. Every register is computed when it is read, interrupt flags included, and the one timer
//! is set only for an interrupt that the guest enabled and has not been sent yet. Linux waits for the end of
//! an update only in the 244 us before one, as on hardware.
//!
//! Motorola MC146818A data sheet; the century register is the FADT's.

mod alarm;
mod date;
#[cfg(test)]
mod tests;
pub mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bitfield_struct::bitfield;

use self::alarm::AlarmTime;
use self::date::{Date, Format, day_of_week};
use super::Device;
use super::clock::{Alarm, Clock, Expire};
use super::register::{read_bytes, write_bytes};
use crate::guest_warn;
use crate::platform::bus::BusDevice;
use crate::platform::irq::IrqLine;

/// The index port; the data port follows it.
pub const RTC_PORT: u64 = 0x70;
/// Ports the clock owns.
pub const RTC_PORTS: u64 = 2;
/// The IOAPIC input its wire goes to.
pub const RTC_GSI: u32 = 8;
/// The register that holds the century, which the FADT names.
pub const CENTURY: u8 = 0x32;

/// Registers by index.
mod index {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const SECONDS_ALARM: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const MINUTES_ALARM: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const HOURS_ALARM: u8 = 0x05;
    pub(super) const DAY_OF_WEEK: u8 = 0x06;
    pub(super) const DAY_OF_MONTH: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const CENTURY: u8 = super::CENTURY;
    /// Bits of the index port that select; bit 7 gates the NMI, which this board does not have.
    pub(super) const MASK: u8 = 0x7f;
}

/// Register A.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
struct A {
    /// Rate of the periodic interrupt.
    #[bits(4)]
    rate: u8,
    /// Divider control: 11x holds the clock in reset.
    #[bits(3)]
    divider: u8,
    /// An update comes within 244 us, or is under way. Read-only.
    update_in_progress: bool,
}

impl A {
    /// A 32.768 kHz crystal, 1024 Hz.
    const RESET: Self = Self::new().with_divider(0b010).with_rate(0b0110);

    const fn in_reset(self) -> bool {
        self.divider() & 0b110 == 0b110
    }

    /// Periods of the periodic interrupt are this many 32768ths of a second; `None` for no interrupt.
    const fn period(self) -> Option<u32> {
        match self.rate() {
            0 => None,
            // The two fastest taps are taken by 3.90625 ms and 7.8125 ms.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }
}

/// Register B.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
struct B {
    /// Daylight saving. Stored only.
    daylight_saving: bool,
    hours_24: bool,
    binary: bool,
    /// Square wave. Stored only.
    square_wave: bool,
    update_ended: bool,
    alarm: bool,
    periodic: bool,
    /// Updates stop so that the time can be set.
    set: bool,
}

impl B {
    const RESET: Self = Self::new().with_hours_24(true);

    const fn format(self) -> Format {
        Format {
            binary: self.binary(),
            hours_24: self.hours_24(),
        }
    }
}

/// Register C: what happened since it was last read. The enables of register B are in the same places.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
struct C {
    #[bits(4)]
    __: u8,
    update_ended: bool,
    alarm: bool,
    periodic: bool,
    /// Some flag and its enable are set.
    interrupt: bool,
}

/// Register D: the memory and the time are valid, as a battery would keep them.
const D_VALID: u8 = 0x80;

/// How long before an update the update-in-progress bit is set.
const UPDATE_AHEAD: i128 = 244_000;
const NANOS: i128 = 1_000_000_000;
/// Ticks of the crystal per second.
const TICKS: i128 = 32_768;

/// The time as registers, while updates are stopped.
#[derive(Debug, Clone, Copy)]
struct Held {
    registers: [u8; 8],
}

/// Which registers hold the time, in the order of [`Held`].
const TIME: [u8; 8] = [
    index::SECONDS,
    index::MINUTES,
    index::HOURS,
    index::DAY_OF_WEEK,
    index::DAY_OF_MONTH,
    index::MONTH,
    index::YEAR,
    index::CENTURY,
];

fn time_register(index: u8) -> Option<usize> {
    TIME.iter().position(|time| *time == index)
}

impl Held {
    fn at(seconds: i64, format: Format) -> Self {
        let date = Date::from_unix(seconds);
        let (century, year) = (date.year / 100, date.year % 100);
        let number = |value: u16| format.encode(u8::try_from(value).expect("two digits"));
        Self {
            registers: [
                format.encode(date.second),
                format.encode(date.minute),
                format.encode_hour(date.hour),
                day_of_week(seconds),
                format.encode(date.day),
                format.encode(date.month),
                number(year),
                number(century),
            ],
        }
    }

    /// The moment, or `None` when the registers hold no date. The day of the week follows from the date.
    fn seconds(&self, format: Format) -> Option<i64> {
        let [second, minute, hour, _, day, month, year, century] = self.registers;
        let number = |register| format.decode(register);
        let date = Date {
            year: u16::from(number(century)?) * 100 + u16::from(number(year)?),
            month: number(month)?,
            day: number(day)?,
            hour: format.decode_hour(hour)?,
            minute: number(minute)?,
            second: number(second)?,
        };
        date.to_unix()
    }
}

/// The host's clocks at one look.
#[derive(Debug, Clone, Copy)]
struct Now {
    monotonic: Duration,
    /// Nanoseconds since 1970.
    utc: i128,
}

#[derive(Debug)]
struct State {
    index: u8,
    memory: [u8; 128],
    a: A,
    b: B,
    flags: C,
    /// The guest's time less the host's, in nanoseconds.
    offset: i128,
    /// The time registers while updates are stopped.
    held: Option<Held>,
    /// Up to which second of the guest's time updates and alarms have been counted.
    counted_second: i64,
    /// Up to which tick of the crystal periods have been counted.
    counted_tick: i128,
}

fn nanos(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

fn ticks(now: Now) -> i128 {
    nanos(now.monotonic).saturating_mul(TICKS) / NANOS
}

impl State {
    fn new(now: Now) -> Self {
        let mut state = Self {
            index: 0,
            memory: [0; 128],
            a: A::RESET,
            b: B::RESET,
            flags: C::new(),
            offset: 0,
            held: None,
            counted_second: 0,
            counted_tick: ticks(now),
        };
        state.counted_second = state.second(now);
        state
    }

    /// The guest's time in nanoseconds since 1970.
    fn time(&self, now: Now) -> i128 {
        now.utc.saturating_add(self.offset)
    }

    /// The guest's time in seconds since 1970.
    fn second(&self, now: Now) -> i64 {
        // Beyond what a date of four digits needs the value does not matter.
        let second = self.time(now).div_euclid(NANOS);
        i64::try_from(second.clamp(-(1 << 40), 1 << 40)).expect("fits after the clamp")
    }

    const fn stopped(&self) -> bool {
        self.b.set() || self.a.in_reset()
    }

    fn alarm(&self) -> AlarmTime {
        let register = |index: u8| self.memory[usize::from(index)];
        AlarmTime::new(
            register(index::SECONDS_ALARM),
            register(index::MINUTES_ALARM),
            register(index::HOURS_ALARM),
            self.b.format(),
        )
    }

    /// Set the flags of what happened since the last look.
    fn count(&mut self, now: Now) {
        let (second, tick) = (self.second(now), ticks(now));
        if !self.stopped() && second > self.counted_second {
            self.flags.set_update_ended(true);
            let rang = self.alarm().next(self.counted_second);
            if rang.is_some_and(|at| at <= second) {
                self.flags.set_alarm(true);
            }
        }
        let period = self.a.period().filter(|_| !self.a.in_reset()).map(i128::from);
        if period.is_some_and(|period| tick / period > self.counted_tick / period) {
            self.flags.set_periodic(true);
        }
        // The operator may have set the host's clock back.
        self.counted_second = second;
        self.counted_tick = tick;
    }

    /// Whether an enabled flag is set: the interrupt output.
    const fn interrupts(&self) -> bool {
        let enabled = self.b.into_bits() & self.flags.into_bits();
        enabled & 0b0111_0000 != 0
    }

    /// When the next enabled flag will be set that is not set yet, on the monotonic clock.
    fn next_interrupt(&self, now: Now) -> Option<Duration> {
        let in_nanos = |nanos: i128| {
            let nanos = u64::try_from(nanos.max(0)).unwrap_or(u64::MAX);
            now.monotonic.checked_add(Duration::from_nanos(nanos))
        };
        // Counted from the present second, so that the moment lies ahead whatever the time is.
        let into_second = self.time(now).rem_euclid(NANOS);
        let after_seconds = |ahead: i64| in_nanos(i128::from(ahead) * NANOS - into_second);
        let second = self.second(now);
        let running = !self.stopped();
        let update =
            (running && self.b.update_ended() && !self.flags.update_ended()).then(|| after_seconds(1));
        let alarm = (running && self.b.alarm() && !self.flags.alarm())
            .then(|| after_seconds(self.alarm().next(second)? - second));
        let periodic = self
            .a
            .period()
            .filter(|_| !self.a.in_reset() && self.b.periodic() && !self.flags.periodic())
            .map(|period| {
                let period = i128::from(period);
                let next = (ticks(now) / period + 1) * period;
                // Rounded up, so that the tick has passed by then.
                in_nanos((next * NANOS + TICKS - 1) / TICKS - nanos(now.monotonic))
            });
        [update, alarm, periodic].into_iter().flatten().flatten().min()
    }

    fn read(&mut self, now: Now) -> u8 {
        match self.index {
            index::A => {
                let into_second = self.time(now).rem_euclid(NANOS);
                let soon = !self.stopped() && into_second >= NANOS - UPDATE_AHEAD;
                self.a.with_update_in_progress(soon).into_bits()
            }
            index::B => self.b.into_bits(),
            index::C => {
                self.count(now);
                let flags = self.flags.with_interrupt(self.interrupts());
                self.flags = C::new();
                flags.into_bits()
            }
            index::D => D_VALID,
            index => match time_register(index) {
                Some(register) => {
                    let running = || Held::at(self.second(now), self.b.format());
                    self.held.unwrap_or_else(running).registers[register]
                }
                None => self.memory[usize::from(index & index::MASK)],
            },
        }
    }

    fn write(&mut self, value: u8, now: Now) {
        self.count(now);
        match self.index {
            index::A => {
                let a = A::from_bits(value).with_update_in_progress(false);
                self.change(a, self.b, now);
            }
            index::B => {
                let mut b = B::from_bits(value);
                if b.set() && !self.b.set() {
                    b.set_update_ended(false);
                }
                self.change(self.a, b, now);
            }
            index::C | index::D => guest_warn!(
                "guest wrote {value:#x} to clock register {:#x}, which is read-only",
                self.index
            ),
            index => match time_register(index) {
                Some(register) => self.write_time(register, value, now),
                None => self.memory[usize::from(index & index::MASK)] = value,
            },
        }
    }

    fn write_time(&mut self, register: usize, value: u8, now: Now) {
        if let Some(held) = &mut self.held {
            held.registers[register] = value;
            return;
        }
        let mut held = Held::at(self.second(now), self.b.format());
        held.registers[register] = value;
        let into_second = self.time(now).rem_euclid(NANOS);
        self.set_time(held, into_second, now);
    }

    /// Change the control registers, and with them whether updates go on.
    fn change(&mut self, a: A, b: B, now: Now) {
        let (was_stopped, was_in_reset) = (self.stopped(), self.a.in_reset());
        let before = self.second(now);
        let format = self.b.format();
        (self.a, self.b) = (a, b);
        match (was_stopped, self.stopped()) {
            (false, true) => self.held = Some(Held::at(before, format)),
            (true, false) => {
                if let Some(held) = self.held.take() {
                    // Out of its reset the divider needs half a second to the first update.
                    let half = NANOS / 2;
                    let running_on = self.time(now).rem_euclid(NANOS);
                    self.set_time(held, if was_in_reset { half } else { running_on }, now);
                }
            }
            _ => {}
        }
    }

    fn set_time(&mut self, held: Held, into_second: i128, now: Now) {
        match held.seconds(self.b.format()) {
            Some(seconds) => {
                self.offset = i128::from(seconds) * NANOS + into_second - now.utc;
                self.counted_second = self.second(now);
            }
            None => guest_warn!(
                "guest set its clock to {:02x?}, which is no date; it goes on as before",
                held.registers
            ),
        }
    }
}

/// The clock.
pub struct Rtc {
    state: Mutex<State>,
    line: IrqLine,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
}

impl Rtc {
    /// A clock that shows the host's time, interrupts by `line` and is called back by `alarm`.
    #[must_use]
    pub fn new(line: IrqLine, clock: Arc<dyn Clock>, alarm: Arc<dyn Alarm>) -> Arc<Self> {
        let state = State::new(Self::look(&*clock));
        Arc::new(Self {
            state: Mutex::new(state),
            line,
            clock,
            alarm,
        })
    }

    fn look(clock: &dyn Clock) -> Now {
        Now {
            monotonic: clock.monotonic(),
            utc: nanos(clock.utc()),
        }
    }

    fn now(&self) -> Now {
        Self::look(&*self.clock)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drive the wire and the timer as the registers say. Under the lock, so that both end up as the last
    /// change left the registers; neither calls back.
    fn settle(&self, state: &State, now: Now) {
        self.line.set(state.interrupts());
        self.alarm.set(state.next_interrupt(now));
    }

    fn read(&self, port: u64) -> u8 {
        const DATA: u64 = 1;
        if port != DATA {
            // The index port cannot be read, here as on most boards.
            return 0xff;
        }
        let (mut state, now) = (self.state(), self.now());
        let value = state.read(now);
        if state.index == index::C {
            self.settle(&state, now);
        }
        value
    }

    fn write(&self, port: u64, value: u8) {
        const INDEX: u64 = 0;
        const DATA: u64 = 1;
        let mut state = self.state();
        match port {
            INDEX => state.index = value & index::MASK,
            DATA => {
                let now = self.now();
                state.write(value, now);
                self.settle(&state, now);
            }
            _ => {}
        }
    }
}

impl Expire for Rtc {
    fn expired(&self) {
        let (mut state, now) = (self.state(), self.now());
        state.count(now);
        self.settle(&state, now);
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| self.read(port));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |port, value| self.write(port, value));
    }
}

/// A reset leaves the time, the memory and the divider alone: a battery and a crystal of their own keep them.
impl Device for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }

    fn reset(&self) {
        let (mut state, now) = (self.state(), self.now());
        state.count(now);
        let kept = state.b;
        state.b = kept
            .with_periodic(false)
            .with_alarm(false)
            .with_update_ended(false)
            .with_square_wave(false);
        state.flags = C::new();
        state.index = 0;
        self.settle(&state, now);
    }
}
