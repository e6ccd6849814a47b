//! The HPET, present only when asked for: guests that want a timer behind the IOAPIC (Xen, test images) use it;
//! Linux has better ones.
//!
//! What it offers: a 64-bit main counter at 10 MHz; three timers, each one-shot or periodic, 64 or 32 bits wide,
//! edge- or level-triggered, on GSIs 20 to 23; legacy replacement, by which timers 0 and 1 take GSIs 2 and 8, the
//! latter from the clock. No messages (FSB interrupts).
//!
//! Nothing ticks: counter and comparators are computed when looked at, and the one host timer is set only for
//! an interrupt that the guest enabled.
//!
//! IA-PC HPET specification 1.0a, section 2.3.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bitfield_struct::bitfield;

use super::Device;
use super::clock::{Alarm, Clock, Expire};
use super::rtc::wire::ClockWire;
use crate::guest_warn;
use crate::platform::bus::BusDevice;
use crate::platform::irq::{InterruptController, IrqLine};
use crate::platform::lanes::LaneWrite;

/// Bytes of guest physical space the registers take.
pub const WINDOW_LEN: u64 = 0x400;

/// Nanoseconds per tick of the main counter: the slowest that the specification allows.
const TICK_NANOS: u64 = 100;
const TIMERS: usize = 3;
/// GSIs a timer may be routed to, as a bit mask.
const ROUTES: u32 = 0b1111 << 20;
/// GSIs of the timers under legacy replacement; timer 2 keeps its route.
const LEGACY_GSIS: [Option<u32>; TIMERS] = [Some(2), Some(8), None];
/// The shortest time between two looks at the timers for the sake of an interrupt: a guest that sets a period
/// of one tick gets as many interrupts as this, and the event loop stays free for others.
const LEAST_INTERVAL: Duration = Duration::from_micros(50);

/// Ticks by which a guest may be late when it sets a comparator: a second.
const RECENT: u64 = 10_000_000;

/// General Capabilities and ID: the period in femtoseconds, vendor 8086h, legacy replacement, a 64-bit counter,
/// three timers, revision 1. The ACPI table repeats the lower half.
pub const CAPABILITIES: u64 = (TICK_NANOS * 1_000_000) << 32 | 0x8086_a201;

/// General Configuration.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct General {
    /// The counter runs and timers interrupt.
    enable: bool,
    legacy_replacement: bool,
    #[bits(62)]
    __: u64,
}

/// Timer n Configuration and Capability.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Config {
    __: bool,
    level: bool,
    interrupt_enable: bool,
    periodic: bool,
    periodic_capable: bool,
    size_64_capable: bool,
    /// The next write to a periodic comparator sets the comparator as well as the period.
    value_set: bool,
    __: bool,
    mode_32: bool,
    #[bits(5)]
    route: u8,
    #[bits(18)]
    __: u32,
    /// Which GSIs `route` may name.
    route_capable: u32,
}

impl Config {
    const RESET: Self = Self::new()
        .with_periodic_capable(true)
        .with_size_64_capable(true)
        .with_route_capable(ROUTES);

    const WRITABLE: Self = Self::new()
        .with_level(true)
        .with_interrupt_enable(true)
        .with_periodic(true)
        .with_value_set(true)
        .with_mode_32(true)
        .with_route(0b1_1111);
}

/// Registers, each eight bytes, by offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Register {
    Capabilities,
    Configuration,
    /// General Interrupt Status: a bit per level-triggered timer, cleared by writing one.
    Status,
    Counter,
    TimerConfig(usize),
    TimerComparator(usize),
}

impl Register {
    /// The register at `offset`, a multiple of eight.
    const fn at(offset: u64) -> Option<Self> {
        match offset {
            0x000 => Some(Self::Capabilities),
            0x010 => Some(Self::Configuration),
            0x020 => Some(Self::Status),
            0x0f0 => Some(Self::Counter),
            0x100 => Some(Self::TimerConfig(0)),
            0x120 => Some(Self::TimerConfig(1)),
            0x140 => Some(Self::TimerConfig(2)),
            0x108 => Some(Self::TimerComparator(0)),
            0x128 => Some(Self::TimerComparator(1)),
            0x148 => Some(Self::TimerComparator(2)),
            _ => None,
        }
    }
}

/// What to do with a comparator that the counter has passed by at most [`RECENT`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Passed {
    /// Interrupt at once: the guest meant a moment that went by while it told us.
    Fires,
    /// Leave it: it is left over from before.
    Waits,
}

#[derive(Debug, Clone)]
struct Timer {
    config: Config,
    comparator: u64,
    period: u64,
    /// At which value of the main counter it fires next.
    due: Option<u64>,
}

impl Timer {
    const RESET: Self = Self {
        config: Config::RESET,
        comparator: u64::MAX,
        period: 0,
        due: None,
    };

    /// The part of a value that takes part in comparisons.
    const fn width(&self) -> u64 {
        if self.config.mode_32() {
            u32::MAX as u64
        } else {
            u64::MAX
        }
    }

    /// Compute when the timer fires, from its comparator: when the counter next has its value.
    fn arm(&mut self, counter: u64, passed: Passed) {
        let (value, comparator) = (counter & self.width(), self.comparator & self.width());
        let ahead = comparator.wrapping_sub(value) & self.width();
        let behind = value.checked_sub(comparator);
        self.due = match passed {
            Passed::Fires if behind.is_some_and(|behind| behind <= RECENT) => Some(counter),
            // All of 32 bits is seven minutes, half of 64 bits is never.
            _ if ahead == 0 || ahead > u64::MAX / 2 => None,
            _ => Some(counter.wrapping_add(ahead)),
        };
    }

    /// Whether the timer fired by `counter`; a periodic one is set for its next period then, however many
    /// went by.
    fn fired(&mut self, counter: u64) -> bool {
        let late = |due: u64| counter.wrapping_sub(due);
        let Some(due) = self.due.filter(|due| late(*due) <= u64::MAX / 2) else {
            return false;
        };
        let period = self.period & self.width();
        if self.config.periodic() && period != 0 {
            let whole = (late(due) / period).wrapping_add(1).wrapping_mul(period);
            self.comparator = self.comparator.wrapping_add(whole) & self.width();
            self.due = Some(due.wrapping_add(whole));
        } else {
            self.due = None;
        }
        true
    }

    fn write_config(&mut self, lanes: LaneWrite, counter: u64) {
        let bits = lanes.store(self.config.into_bits(), Config::WRITABLE.into_bits());
        self.config = Config::from_bits(bits);
        self.comparator &= self.width();
        self.arm(counter, Passed::Waits);
    }

    fn write_comparator(&mut self, lanes: LaneWrite, counter: u64) {
        let periodic = self.config.periodic();
        if periodic {
            self.period = lanes.store(self.period, self.width());
        }
        if !periodic || self.config.value_set() {
            self.comparator = lanes.store(self.comparator, self.width());
            self.config.set_value_set(false);
            self.arm(counter, Passed::Fires);
        }
    }
}

struct State {
    general: General,
    /// A bit per timer.
    status: u64,
    timers: [Timer; TIMERS],
    /// The main counter when it was last started, stopped or written.
    counter: u64,
    /// Ticks of the host's clock at that moment.
    since: u64,
    /// Each timer's wire, and none where its route names no GSI.
    wires: [Option<IrqLine>; TIMERS],
    /// When the timers were last looked at because of an interrupt.
    expired: Duration,
}

fn ticks(now: Duration) -> u64 {
    u64::try_from(now.as_nanos() / u128::from(TICK_NANOS)).unwrap_or(u64::MAX)
}

impl State {
    fn counter(&self, now: Duration) -> u64 {
        if self.general.enable() {
            let since = ticks(now).saturating_sub(self.since);
            self.counter.wrapping_add(since)
        } else {
            self.counter
        }
    }

    /// Do what the timers have done since the last look.
    fn count(&mut self, now: Duration) {
        if !self.general.enable() {
            return;
        }
        let counter = self.counter(now);
        for (timer, (state, wire)) in self.timers.iter_mut().zip(&self.wires).enumerate() {
            if !state.fired(counter) {
                continue;
            }
            if state.config.level() {
                self.status |= 1 << timer;
            } else if let Some(wire) = wire.as_ref().filter(|_| state.config.interrupt_enable()) {
                wire.pulse();
            }
        }
    }

    /// Drive the wires of level-triggered timers as the status register says.
    fn drive(&self) {
        for (timer, (state, wire)) in self.timers.iter().zip(&self.wires).enumerate() {
            let pending = self.status & 1 << timer != 0;
            if let Some(wire) = wire {
                wire.set(pending && state.config.level() && state.config.interrupt_enable());
            }
        }
    }

    /// When the next interrupt is due that the guest would see.
    fn next_interrupt(&self, now: Duration) -> Option<Duration> {
        if !self.general.enable() {
            return None;
        }
        let counter = self.counter(now);
        let visible = |(timer, state): &(usize, &Timer)| {
            let already_pending = state.config.level() && self.status & 1 << timer != 0;
            state.config.interrupt_enable() && !already_pending
        };
        let ahead = self
            .timers
            .iter()
            .enumerate()
            .filter(visible)
            .filter_map(|(_, state)| state.due)
            .map(|due| due.wrapping_sub(counter))
            .min()?;
        let at = ticks(now).saturating_add(ahead).saturating_mul(TICK_NANOS);
        let earliest = self.expired.saturating_add(LEAST_INTERVAL);
        Some(Duration::from_nanos(at).max(earliest))
    }

    fn read(&self, register: Option<Register>, now: Duration) -> u64 {
        match register {
            Some(Register::Capabilities) => CAPABILITIES,
            Some(Register::Configuration) => self.general.into_bits(),
            Some(Register::Status) => self.status,
            Some(Register::Counter) => self.counter(now),
            Some(Register::TimerConfig(timer)) => self.timers[timer].config.into_bits(),
            Some(Register::TimerComparator(timer)) => self.timers[timer].comparator,
            None => 0,
        }
    }

    fn write(&mut self, register: Register, lanes: LaneWrite, now: Duration) {
        let counter = self.counter(now);
        match register {
            Register::Capabilities => {}
            Register::Configuration => self.write_configuration(lanes, now),
            Register::Status => self.status = lanes.clear(self.status, u64::MAX),
            Register::Counter if self.general.enable() => {
                guest_warn!("guest wrote to the HPET's counter while it runs; stop it first");
            }
            Register::Counter => {
                self.counter = lanes.store(self.counter, u64::MAX);
                self.timers
                    .iter_mut()
                    .for_each(|timer| timer.arm(self.counter, Passed::Waits));
            }
            Register::TimerConfig(timer) => {
                self.timers[timer].write_config(lanes, counter);
                if !self.timers[timer].config.level() {
                    self.status &= !(1 << timer);
                }
            }
            Register::TimerComparator(timer) => self.timers[timer].write_comparator(lanes, counter),
        }
    }

    fn write_configuration(&mut self, lanes: LaneWrite, now: Duration) {
        let writable = General::new().with_enable(true).with_legacy_replacement(true);
        let counter = self.counter(now);
        let was_enabled = self.general.enable();
        self.general = General::from_bits(lanes.store(self.general.into_bits(), writable.into_bits()));
        self.counter = counter;
        self.since = ticks(now);
        if self.general.enable() && !was_enabled {
            self.timers
                .iter_mut()
                .for_each(|timer| timer.arm(counter, Passed::Waits));
        }
    }

    /// Whether timers 0 and 1 are where the older timers were. Not while nothing counts: they need both bits.
    const fn replaces_legacy(&self) -> bool {
        self.general.enable() && self.general.legacy_replacement()
    }

    /// Where each timer's interrupts go.
    fn route(&self, timer: usize) -> Option<u32> {
        let legacy = LEGACY_GSIS[timer].filter(|_| self.replaces_legacy());
        let route = u32::from(self.timers[timer].config.route());
        legacy.or_else(|| (ROUTES & 1 << route != 0).then_some(route))
    }
}

/// The timer block.
pub struct Hpet {
    state: Mutex<State>,
    controller: Arc<dyn InterruptController>,
    clock_wire: Arc<ClockWire>,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
}

impl Hpet {
    /// A stopped timer block whose wires go to `controller`, one of them in place of the clock's; `alarm` calls it
    /// back.
    #[must_use]
    pub fn new(
        controller: Arc<dyn InterruptController>,
        clock_wire: Arc<ClockWire>,
        clock: Arc<dyn Clock>,
        alarm: Arc<dyn Alarm>,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(Self::power_on()),
            controller,
            clock_wire,
            clock,
            alarm,
        })
    }

    const fn power_on() -> State {
        State {
            general: General::new(),
            status: 0,
            timers: [Timer::RESET; TIMERS],
            counter: 0,
            since: 0,
            wires: [const { None }; TIMERS],
            expired: Duration::ZERO,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bring wires and timer to what the registers say. Under the lock, so that they end up as the last change
    /// left the registers; neither calls back.
    fn settle(&self, state: &mut State, now: Duration) {
        self.clock_wire.replace(state.replaces_legacy());
        for timer in 0..TIMERS {
            let wanted = state.route(timer);
            if state.wires[timer].as_ref().map(IrqLine::gsi) != wanted {
                state.wires[timer] = wanted.map(|gsi| IrqLine::new(self.controller.clone(), gsi));
            }
        }
        state.drive();
        self.alarm.set(state.next_interrupt(now));
    }
}

impl Expire for Hpet {
    fn expired(&self) {
        let (mut state, now) = (self.state(), self.clock.monotonic());
        state.count(now);
        state.expired = now;
        self.settle(&mut state, now);
    }
}

/// Bytes per register.
const QUAD: u64 = 8;

impl BusDevice for Hpet {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (mut state, now) = (self.state(), self.clock.monotonic());
        state.count(now);
        state.drive();
        let first = offset - offset % QUAD;
        let [low, high] = [first, first + QUAD].map(|at| state.read(Register::at(at), now).to_le_bytes());
        let bytes = [low, high].concat();
        let skip = usize::try_from(offset % QUAD).expect("below eight");
        data.iter_mut()
            .zip(bytes.into_iter().skip(skip))
            .for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (mut state, now) = (self.state(), self.clock.monotonic());
        state.count(now);
        let first = offset - offset % QUAD;
        for at in [first, first + QUAD] {
            let lanes = LaneWrite::of(offset, data, at, QUAD);
            if let Some((register, lanes)) = Register::at(at).zip(lanes) {
                state.write(register, lanes, now);
            }
        }
        state.count(now);
        self.settle(&mut state, now);
    }
}

impl Device for Hpet {
    fn name(&self) -> &'static str {
        "hpet"
    }

    fn reset(&self) {
        let (mut state, now) = (self.state(), self.clock.monotonic());
        *state = Self::power_on();
        self.settle(&mut state, now);
    }
}
