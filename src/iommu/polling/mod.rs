//! `doorbell=poll`: while the guest is busy its doorbells cost no exit to user space.
//!
//! The first doorbells after a while are exits, and their commands run on the processor that rang. Where many come
//! one soon after the other, a thread of the unit has the hypervisor put them aside and polls: it finds the tail's
//! new value in the ring, runs the commands, and looks again. When none has come for a while it has doorbells
//! through again and sleeps. That costs the host a processor while the guest unmaps memory, and nothing
//! otherwise.
//!
//! The ring is the machine's. Whoever looks delivers to every unit, and each unit's thread runs its own commands: a
//! COMPLETION_WAIT that waits for a slow disk behind one unit holds up no other.

mod hearing;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::amd::spec::registers::Reg;
use super::amd::sync;
use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::doorbell::{CoalescedWrite, CoalescedWrites};
use crate::platform::host::HostError;

use hearing::{Hearing, Line};

/// A unit whose doorbell may be polled: its commands are Ravelin's to carry out.
///
/// It calls `Polling::catch_up` before an access of the guest's takes effect, and `Polling::written` after a write.
pub trait Polled: Send + Sync {
    /// What the operator calls it.
    fn name(&self) -> &str;

    /// Its registers.
    fn registers(&self) -> GpaRange;

    /// What it has for that, once it is polled.
    fn polling(&self) -> &OnceLock<Polling>;

    /// The guest wrote `data` at `offset` of the registers a while ago. Whether commands wait because of it.
    fn late_doorbell(&self, offset: u64, data: &[u8]) -> bool;

    /// Carry out commands that late doorbells announced, a bounded number. Whether some are left.
    fn run_late_commands(&self) -> bool;

    /// Carry out commands that late doorbells announced, and have the event loop do what is left.
    fn run_commands(&self);
}

/// Doorbells by exits within [`BURST`] that make a guest busy.
const BUSY: u32 = 16;
const BURST: Duration = Duration::from_millis(10);
/// How long a thread polls for nothing.
const QUIET: Duration = Duration::from_millis(10);
/// Looks in a row before others may have the processor.
const LOOKS: u32 = 64;
/// Writes delivered at a time: more than the ring holds. A guest that goes on writing holds up nobody.
const MOST_AT_ONCE: usize = 256;
/// Bytes of the command buffer's tail register.
const TAIL_LEN: u64 = 8;

/// The writes that the hypervisor put aside, and whose they are.
pub struct LateWrites {
    host: Arc<dyn CoalescedWrites>,
    /// Locked while a write is on its way, so that whoever gets the lock finds none under way.
    units: Mutex<Vec<(GpaRange, Weak<dyn Polled>)>>,
}

impl LateWrites {
    /// What `host` puts aside.
    #[must_use]
    pub fn new(host: Arc<dyn CoalescedWrites>) -> Arc<Self> {
        Arc::new(Self {
            host,
            units: Mutex::default(),
        })
    }

    fn units(&self) -> MutexGuard<'_, Vec<(GpaRange, Weak<dyn Polled>)>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deliver(&self) {
        let units = self.units();
        for write in std::iter::from_fn(|| self.host.take()).take(MOST_AT_ONCE) {
            let unit = units.iter().find(|(range, _)| range.contains(write.at));
            if let Some(unit) = unit.and_then(|(_, unit)| unit.upgrade()) {
                late_doorbell(&*unit, &write);
            }
        }
    }
}

/// The guest rang the doorbell of `unit` a while ago.
fn late_doorbell(unit: &dyn Polled, write: &CoalescedWrite) {
    let Some(offset) = write.at.0.checked_sub(unit.registers().start().0) else {
        return;
    };
    let waits = unit.late_doorbell(offset, write.data());
    if let Some(polling) = unit.polling().get().filter(|_| waits) {
        polling.arrived();
    }
}

/// The polling of `unit`, whose late writes come by `writes`.
fn polling_by<'a>(unit: &'a dyn Polled, writes: &Arc<LateWrites>) -> &'a Polling {
    unit.polling()
        .get_or_init(|| Polling::new(writes.clone(), unit.registers()))
}

/// A unit's doorbell and the ring.
struct DoorbellLine {
    writes: Arc<LateWrites>,
    /// The tail register.
    range: GpaRange,
}

impl DoorbellLine {
    fn said(done: Result<(), HostError>) -> bool {
        let Err(error) = done else { return true };
        tracing::error!(%error, source = %error.source, "a doorbell keeps the way it has");
        false
    }
}

impl Line for DoorbellLine {
    fn put_aside(&self) -> bool {
        Self::said(self.writes.host.put_aside(self.range))
    }

    fn let_through(&self) -> bool {
        Self::said(self.writes.host.let_through(self.range))
    }

    fn deliver(&self) {
        self.writes.deliver();
    }
}

/// What a unit has for its doorbell to be polled.
pub struct Polling {
    line: DoorbellLine,
    hearing: Hearing,
    /// Locked while the doorbell changes its way.
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    /// Doorbells are put aside.
    polled: bool,
    /// The guest is busy; the thread is to begin.
    wanted: bool,
    /// The thread is to end.
    leaving: bool,
    /// Doorbells by exits since `burst`.
    rings: u32,
    burst: Option<Instant>,
}

impl State {
    /// A doorbell came as an exit. Whether that makes the guest busy.
    fn rang(&mut self, now: Instant) -> bool {
        let fresh = self
            .burst
            .is_none_or(|burst| now.saturating_duration_since(burst) > BURST);
        if fresh {
            self.burst = Some(now);
            self.rings = 0;
        }
        self.rings += 1;
        self.rings >= BUSY
    }
}

impl Polling {
    fn new(writes: Arc<LateWrites>, registers: GpaRange) -> Self {
        let tail = Gpa(registers.start().0 + Reg::COMMAND_TAIL_AT);
        let range = GpaRange::new(tail, TAIL_LEN).expect("the registers do not wrap");
        Self {
            line: DoorbellLine { writes, range },
            hearing: Hearing::default(),
            state: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An access of the guest came as an exit: doorbells before it come first.
    pub(in crate::iommu) fn catch_up(&self) {
        self.hearing.catch_up(&self.line);
    }

    /// An exit at `offset` was a write; if it was the doorbell, count it.
    pub(in crate::iommu) fn written(&self, offset: u64, now: Instant) {
        if !(Reg::COMMAND_TAIL_AT..Reg::COMMAND_TAIL_AT + TAIL_LEN).contains(&offset) {
            return;
        }
        let mut state = self.state();
        if !state.polled && !state.wanted && state.rang(now) {
            state.wanted = true;
            self.wake.notify_all();
        }
    }

    /// A late doorbell arrived.
    fn arrived(&self) {
        self.hearing.arrived();
    }

    /// Sleep until the guest is busy, and begin to poll; `false` when it is time to leave.
    fn begin(&self) -> bool {
        let idle = |state: &mut State| !state.wanted && !state.leaving;
        let mut state = self
            .wake
            .wait_while(self.state(), idle)
            .unwrap_or_else(PoisonError::into_inner);
        state.wanted = false;
        state.rings = 0;
        state.burst = None;
        if !state.leaving {
            state.polled = self.hearing.begin(&self.line);
        }
        !state.leaving
    }

    /// Look once. Whether commands ran.
    fn look(&self, unit: &dyn Polled) -> bool {
        self.line.deliver();
        let rung = self.hearing.take_rung();
        if rung && unit.run_late_commands() {
            self.hearing.arrived();
        }
        rung
    }

    /// Whether the thread goes on polling: somebody else may have stopped that.
    fn goes_on(&self) -> bool {
        let state = self.state();
        state.polled && !state.leaving
    }

    /// Poll no more: doorbells are exits again, and all that were not have arrived. The host may refuse; then they
    /// are polled still, but none waits.
    fn end(&self) {
        let mut state = self.state();
        if state.polled {
            state.polled = !self.hearing.end(&self.line);
        }
    }

    /// Back to exits, and nothing that was rung is remembered. No processor runs.
    pub(in crate::iommu) fn reset(&self) {
        self.end();
        self.state().wanted = false;
        let _forgotten = self.hearing.take_rung();
    }

    /// The thread's life.
    fn work(&self, unit: &dyn Polled) {
        while self.begin() {
            let mut last = Instant::now();
            while self.goes_on() {
                if (0..LOOKS).any(|_| self.look_or_pause(unit)) {
                    last = Instant::now();
                } else if last.elapsed() >= QUIET {
                    self.end();
                    last = Instant::now();
                } else {
                    std::thread::yield_now();
                }
            }
            // What arrived with the last delivery, whoever made it.
            if self.hearing.take_rung() {
                unit.run_commands();
            }
        }
        self.end();
    }

    fn look_or_pause(&self, unit: &dyn Polled) -> bool {
        let ran = self.look(unit);
        if !ran {
            std::hint::spin_loop();
        }
        ran
    }
}

/// The thread that polls a unit's doorbell. It ends with this.
pub struct DoorbellThread {
    unit: Arc<dyn Polled>,
    thread: Option<JoinHandle<()>>,
}

impl DoorbellThread {
    /// Have the doorbell of `unit` polled while the guest is busy; late writes come by `writes`.
    ///
    /// # Errors
    /// When the host has no thread for it.
    pub fn start(unit: Arc<dyn Polled>, writes: &Arc<LateWrites>) -> Result<Self, HostError> {
        let polling = polling_by(&*unit, writes);
        writes.units().push((polling.line.range, Arc::downgrade(&unit)));
        let name = format!("{} doorbell", unit.name());
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn({
                let unit = unit.clone();
                move || unit.polling().get().expect("set above").work(&*unit)
            })
            .map_err(|source| HostError::new(format!("start the thread {name}"), source))?;
        Ok(Self {
            unit,
            thread: Some(thread),
        })
    }
}

impl Drop for DoorbellThread {
    fn drop(&mut self) {
        if let Some(polling) = self.unit.polling().get() {
            polling.state().leaving = true;
            polling.wake.notify_all();
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(
                unit = self.unit.name(),
                "the thread that polls a doorbell panicked"
            );
        }
    }
}

#[cfg(test)]
mod tests;
