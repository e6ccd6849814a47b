//! The command processor: fetches, carries out, stops (section 2.4).
//!
//! Work per call is bounded; what is left is said in the effects. Commands are carried out in order. At a
//! COMPLETION_WAIT, everything before it has taken effect everywhere: in the caches, with followers, and for
//! accesses that began earlier.

use super::commands::Command;
use super::device_table::{Decision, decide};
use super::events::Event;
use super::memory::{SystemMemory, Unreachable};
use super::pages::PageRange;
use super::request::{Access, Pasid, Request};
use super::ring::{ENTRY, Ring};
use super::spec::registers::{Control, Status};
use super::{Effects, Unit};
use crate::platform::addr::{Bdf, Gpa, Iova};
use std::sync::{PoisonError, TryLockError};

/// Commands carried out per call, a prefetched page counting as one.
pub const COMMANDS_PER_CALL: usize = 1024;

/// Commands fetched at once, and invalidations passed to followers at once.
const BATCH: usize = 32;

/// Whatever keeps copies of what the unit said: interrupt routes, devices' own IOTLBs, shadow tables.
pub trait Follower: Send + Sync {
    /// Obey `batch`, in order. Once this returned and [`Follower::settle`] left nothing, nothing older than it is used.
    /// It is called before the COMPLETION_WAIT that follows is answered, and must not write the unit's registers.
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer>;

    /// Do a bounded part of what obeying left to be done; whether nothing is left. COMPLETION_WAIT is not answered
    /// before. Followers that obey at once have nothing to do here.
    fn settle(&self) -> bool {
        true
    }
}

/// A device did not acknowledge an invalidation in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoAnswer {
    /// The device.
    pub device: Bdf,
    /// Which command of the batch.
    pub index: usize,
}

/// What the processor remembers between calls.
#[derive(Debug, Default)]
pub struct Processor {
    /// Commands that followers have not heard of, and where they stood.
    untold: Vec<Command>,
    untold_at: Vec<Gpa>,
    /// Something was invalidated since accesses in flight were last waited for.
    unsettled: bool,
    /// Commands of this call, by kind.
    carried_out: [u64; 8],
}

/// What became of a command.
enum Carried {
    /// It took effect.
    Out,
    /// It waits for followers.
    Not,
}

/// Why the processor stops.
enum Stop {
    Illegal { at: Gpa },
    Hardware { at: Gpa },
}

impl<M: SystemMemory> Unit<M> {
    /// Carry out commands that wait in the ring, at most [`COMMANDS_PER_CALL`]. A call while another thread
    /// is at it leaves the work to that thread.
    pub fn run_commands(&self) -> Effects {
        let mut effects = Effects::default();
        loop {
            let mut processor = match self.processor.try_lock() {
                Ok(processor) => processor,
                Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
                Err(TryLockError::WouldBlock) => return effects,
            };
            effects.join(self.run(&mut processor));
            drop(processor);
            // Who rang meanwhile found the lock taken and went away.
            let registers = self.registers();
            let waiting = registers.command_runs() && registers.command.waiting() > 0;
            if !waiting || effects.more_commands {
                return effects;
            }
        }
    }

    fn run(&self, processor: &mut Processor) -> Effects {
        let mut effects = Effects::default();
        let mut budget = COMMANDS_PER_CALL;
        while let Some(ring) = self.waiting_commands() {
            if budget == 0 {
                effects.more_commands = true;
                break;
            }
            let stopped = self.run_batch(processor, ring, &mut budget, &mut effects);
            if let Err(stop) = stopped {
                effects.join(self.pass_on(processor));
                effects.join(self.stop(&stop));
                break;
            }
        }
        effects.join(self.pass_on(processor));
        effects.more_commands |= !self.settle();
        self.counters
            .commands(&std::mem::take(&mut processor.carried_out));
        effects
    }

    /// The ring, while it runs and holds commands.
    fn waiting_commands(&self) -> Option<Ring> {
        let registers = self.registers();
        let waits = registers.command_runs() && registers.command.waiting() > 0;
        waits.then_some(registers.command)
    }

    /// Fetch and carry out some commands from the head on; the head ends up behind the last that succeeded.
    fn run_batch(
        &self,
        processor: &mut Processor,
        ring: Ring,
        budget: &mut usize,
        effects: &mut Effects,
    ) -> Result<(), Stop> {
        let mut bytes = [0; BATCH * ENTRY];
        let wanted = usize::from(ring.waiting_in_a_row()).min(BATCH).min(*budget);
        let (fetched, unreadable) = self.fetch_commands(ring, wanted, &mut bytes);
        let mut entry = ring.head();
        let mut outcome = Ok(());
        for raw in bytes.as_chunks().0.iter().take(fetched) {
            let slot = ring.slot(entry);
            match self.execute(processor, u128::from_le_bytes(*raw), slot, budget, effects) {
                Ok(Carried::Out) => entry = ring.after(entry),
                Ok(Carried::Not) => {
                    // The call ends here, and the next begins with this command.
                    *budget = 0;
                    self.change().command.set_head(entry);
                    return Ok(());
                }
                Err(stop) => {
                    outcome = Err(stop);
                    break;
                }
            }
        }
        self.change().command.set_head(entry);
        outcome?;
        unreadable.map_or(Ok(()), |at| Err(Stop::Hardware { at }))
    }

    /// Read up to `wanted` commands; the second value is where memory did not answer.
    fn fetch_commands(&self, ring: Ring, wanted: usize, bytes: &mut [u8]) -> (usize, Option<Gpa>) {
        if self
            .memory
            .read(ring.slot(ring.head()), &mut bytes[..wanted * ENTRY])
            .is_ok()
        {
            return (wanted, None);
        }
        let mut from = ring.head();
        for (count, raw) in bytes[..wanted * ENTRY].chunks_mut(ENTRY).enumerate() {
            if self.memory.read(ring.slot(from), raw).is_err() {
                return (count, Some(ring.slot(from)));
            }
            from = ring.after(from);
        }
        (wanted, None)
    }

    /// Carry out one command.
    fn execute(
        &self,
        processor: &mut Processor,
        raw: u128,
        at: Gpa,
        budget: &mut usize,
        effects: &mut Effects,
    ) -> Result<Carried, Stop> {
        let command = Command::parse(raw, &self.features).map_err(|_| Stop::Illegal { at })?;
        if matches!(command, Command::CompletionWait { .. }) {
            effects.join(self.pass_on(processor));
            if !self.settle() {
                return Ok(Carried::Not);
            }
        }
        *budget = budget.saturating_sub(1);
        processor.carried_out[command.kind()] += 1;
        match command {
            Command::CompletionWait { store, interrupt } => {
                if std::mem::take(&mut processor.unsettled) {
                    self.grace.wait();
                }
                self.complete(store, interrupt, effects)?;
                return Ok(Carried::Out);
            }
            Command::InvalidateDevice { device } => {
                self.entries.invalidate(device);
                self.rearm(device);
            }
            Command::InvalidatePages {
                domain, space, pages, ..
            } => self.iotlb.invalidate_pages(domain, space, pages),
            Command::InvalidateAll => self.invalidate_all(),
            Command::Prefetch {
                device,
                space,
                first,
                count,
                invalidate,
            } => {
                *budget = budget.saturating_sub(usize::from(count));
                self.prefetch(device, space, first, count, invalidate);
            }
            // The unit itself keeps neither remapping entries nor devices' translations nor page requests.
            Command::InvalidateInterrupts { .. }
            | Command::InvalidateIotlb { .. }
            | Command::CompletePageRequest { .. } => {}
        }
        processor.unsettled = true;
        processor.untold.push(command);
        processor.untold_at.push(at);
        if processor.untold.len() >= BATCH {
            effects.join(self.pass_on(processor));
        }
        Ok(Carried::Out)
    }

    /// Have followers do a part of what is left to them; whether nothing is left to any.
    pub(super) fn settle(&self) -> bool {
        let followers = self.followers.read().unwrap_or_else(PoisonError::into_inner);
        let mut settled = true;
        for follower in followers.iter() {
            settled &= follower.settle();
        }
        settled
    }

    /// Tell followers of what they have not heard.
    fn pass_on(&self, processor: &mut Processor) -> Effects {
        let effects = self.tell(&processor.untold, &processor.untold_at);
        processor.untold.clear();
        processor.untold_at.clear();
        effects
    }

    /// Have followers obey `batch`, whose commands stand at `places`.
    pub(super) fn tell(&self, batch: &[Command], places: &[Gpa]) -> Effects {
        let mut effects = Effects::default();
        if batch.is_empty() {
            return effects;
        }
        let followers = self.followers.read().unwrap_or_else(PoisonError::into_inner);
        for follower in followers.iter() {
            if let Err(NoAnswer { device, index }) = follower.follow(batch) {
                let at = places.get(index).copied().unwrap_or_default();
                let event = Event::IotlbInvalidationTimeout { device, at };
                effects.join(Effects::of(self.report(&event)));
            }
        }
        effects
    }

    /// Answer a COMPLETION_WAIT: store, status, interrupt, in this order (section 2.4.1).
    fn complete(
        &self,
        store: Option<(Gpa, u64)>,
        interrupt: bool,
        effects: &mut Effects,
    ) -> Result<(), Stop> {
        if let Some((at, data)) = store {
            self.memory
                .store(at, data)
                .map_err(|Unreachable| Stop::Hardware { at })?;
        }
        if interrupt {
            let mut registers = self.change();
            registers.latch(Status::new().with_com_wait_int(true));
            effects.join(Effects::of(registers.take_interrupts()));
        }
        Ok(())
    }

    /// Stop with the head where it is, and say why.
    fn stop(&self, stop: &Stop) -> Effects {
        self.change().stop_commands();
        self.counters.stop();
        let event = match *stop {
            Stop::Illegal { at } => Event::IllegalCommand { at },
            Stop::Hardware { at } => Event::CommandHardwareError { at },
        };
        Effects::of(self.report(&event))
    }

    /// Walk for pages that will be wanted. What cannot be found is not reported (section 2.4.6).
    fn prefetch(&self, device: Bdf, space: Option<Pasid>, first: PageRange, count: u8, invalidate: bool) {
        let PageRange::Span { first, last } = first else {
            return;
        };
        let Ok(dte) = self.entry(device) else {
            return;
        };
        if invalidate && dte.host.v() {
            self.iotlb
                .invalidate_pages(dte.guest.domain(), space, PageRange::Span { first, last });
        }
        let size = last - first + 1;
        let configuration = self.configuration();
        let control: Control = configuration.control;
        for page in 0..u64::from(count) {
            let Some(at) = size.checked_mul(page).and_then(|ahead| first.checked_add(ahead)) else {
                return;
            };
            let request = Request {
                pasid: space,
                ..Request::plain(device, Iova(at), Access::NONE)
            };
            let decision: Decision = decide(control, configuration.exclusion, &dte, &request);
            if !control.iommu_en() || self.walk_and_keep(&decision, &request).is_none() {
                return;
            }
        }
    }
}
