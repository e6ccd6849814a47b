//! The command processor: fetches, carries out, stops (section 2.4).
//!
//! Work per call is bounded, that of followers too; what is left is said in the effects. Commands are carried out in
//! order. At a COMPLETION_WAIT, everything before it has taken effect everywhere: in the caches, with followers, and for
//! accesses that began earlier. One that had to wait for such an access is the last of its call.

use super::commands::{Command, Illegal};
use super::counters::Counters;
use super::device_table::{Decision, decide};
use super::effort::Effort;
use super::events::Event;
use super::memory::{SystemMemory, Unreachable};
use super::pages::PageRange;
use super::registers::{Interrupts, Registers};
use super::request::{Access, Pasid, Request};
use super::ring::{ENTRY, Ring};
use super::spec::registers::{Control, Status};
use super::viommu::OfHost;
use super::window::Change;
use super::{Effects, Unit};
use crate::platform::addr::{Bdf, Gpa, Iova};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Commands carried out per call, a prefetched page counting as one.
pub const COMMANDS_PER_CALL: usize = 1024;

/// Commands fetched at once, and invalidations passed to followers at once.
const BATCH: usize = 32;

/// Whatever keeps copies of what the unit said: interrupt routes, devices' own IOTLBs, shadow tables.
pub trait Follower: Send + Sync {
    /// Obey `batch`, in order. Once this returned and [`Follower::settle`] left nothing, nothing older than it is used.
    /// It is called before the COMPLETION_WAIT that follows is answered, and must not write the unit's registers. What
    /// takes requests to the host is noted here and done by [`Follower::settle`], or a guest could have it done for each
    /// of a thousand commands.
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer>;

    /// A register changed by which everything may mean something else: forget all. No wait comes behind that, so memory that a
    /// device is no longer to reach is out of its reach once this returned, whatever [`Follower::settle`] has yet to do.
    /// Interrupts may go their old way until then.
    fn forget(&self) -> Result<(), NoAnswer> {
        self.follow(&[Command::InvalidateAll])
    }

    /// Do what obeying left to be done, as far as `effort` goes; whether nothing is left. COMPLETION_WAIT is not answered
    /// before. Followers that obey at once have nothing to do here; one that cannot go on says so by [`Effort::stick`], and is
    /// asked again with the next command.
    fn settle(&self, _effort: &mut Effort) -> bool {
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

/// A ring's processor, which one thread at a time has.
#[derive(Debug, Default)]
pub struct Seat {
    processor: Mutex<Processor>,
    /// Somebody found it taken, and went away.
    missed: AtomicBool,
}

impl Seat {
    /// Have the processor. Who has it already learns from [`Seat::missed`] that he was asked.
    fn try_take(&self) -> Option<MutexGuard<'_, Processor>> {
        self.missed.store(true, Ordering::SeqCst);
        let processor = match self.processor.try_lock() {
            Ok(processor) => processor,
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => return None,
        };
        // Whatever was asked for until now, the caller does.
        self.missed.swap(false, Ordering::SeqCst);
        Some(processor)
    }

    /// Have the processor once nobody else has it: while this lives no command is in hand.
    pub(super) fn take(&self) -> MutexGuard<'_, Processor> {
        self.processor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody went away since the processor was taken. To be asked once it has been given back.
    fn missed(&self) -> bool {
        self.missed.swap(false, Ordering::SeqCst)
    }
}

/// What a call may cost.
struct Budget {
    /// Commands.
    commands: usize,
    /// What followers do.
    effort: Effort,
    /// The next command waits for them.
    waits: bool,
}

impl Budget {
    /// No more commands in this call.
    const fn end(&mut self) {
        self.commands = 0;
    }

    /// `counted` further commands were carried out.
    const fn count(&mut self, counted: usize) {
        self.commands = self.commands.saturating_sub(counted);
    }
}

/// What became of a command.
enum Carried {
    /// It took effect.
    Out,
    /// It waits for followers.
    Not,
}

/// Why the processor stops.
pub(super) enum Stop {
    /// A command means nothing.
    Illegal {
        /// Where it stands.
        at: Gpa,
    },
    /// Memory did not answer.
    Hardware {
        /// Where.
        at: Gpa,
    },
}

/// What an entry asks for.
pub(super) enum Asked {
    /// A command that anybody may give.
    Command(Command),
    /// One about guests.
    OfHost(OfHost),
}

/// Whose ring it is: that says how addresses, devices and domains in it are meant, and who is told.
pub(super) trait Issuer {
    /// What the unit works on.
    type Memory: SystemMemory;

    /// The unit.
    fn unit(&self) -> &Unit<Self::Memory>;

    /// What the processor remembers of this ring.
    fn processor(&self) -> &Seat;

    /// The ring's registers, to be looked at.
    fn registers(&self) -> impl Deref<Target = Registers> + '_;

    /// The ring's registers, to be changed.
    fn change(&self) -> Change<'_>;

    /// Read from the ring.
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable>;

    /// Store for a COMPLETION_WAIT.
    fn store(&self, at: Gpa, data: u64) -> Result<(), Unreachable>;

    /// Read an entry.
    fn parse(&self, raw: u128) -> Result<Asked, Illegal>;

    /// Call `each` with what `command` means to the unit, nothing where it is about what is not the issuer's. The result
    /// is for how many further commands this counts.
    fn mean(&self, command: Command, each: impl FnMut(Command)) -> Result<usize, Unreachable>;

    /// Tell the issuer's software.
    fn report(&self, event: &Event) -> Effects;

    /// What is owed when interrupts of the issuer's are due.
    fn interrupted(&self, raised: Interrupts) -> Effects;

    /// What is owed when commands are left.
    fn left(&self) -> Effects;

    /// Where this is counted.
    fn counters(&self) -> &Counters;
}

/// The unit's own ring.
struct Own<'a, M>(&'a Unit<M>);

impl<M: SystemMemory> Issuer for Own<'_, M> {
    type Memory = M;

    fn unit(&self) -> &Unit<M> {
        self.0
    }

    fn processor(&self) -> &Seat {
        &self.0.processor
    }

    fn registers(&self) -> impl Deref<Target = Registers> + '_ {
        self.0.registers()
    }

    fn change(&self) -> Change<'_> {
        self.0.change()
    }

    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        self.0.memory.read(at, data)
    }

    fn store(&self, at: Gpa, data: u64) -> Result<(), Unreachable> {
        self.0.memory.store(at, data)
    }

    fn parse(&self, raw: u128) -> Result<Asked, Illegal> {
        let features = &self.0.features;
        OfHost::parse(raw, features).map_or_else(
            || Command::parse(raw, features).map(Asked::Command),
            |command| Ok(Asked::OfHost(command)),
        )
    }

    fn mean(&self, command: Command, mut each: impl FnMut(Command)) -> Result<usize, Unreachable> {
        each(command);
        Ok(0)
    }

    fn report(&self, event: &Event) -> Effects {
        self.0.report(event)
    }

    fn interrupted(&self, raised: Interrupts) -> Effects {
        Effects::of(raised)
    }

    fn left(&self) -> Effects {
        Effects {
            more_commands: true,
            ..Effects::default()
        }
    }

    fn counters(&self) -> &Counters {
        &self.0.counters
    }
}

impl<M: SystemMemory> Unit<M> {
    /// Carry out commands that wait in the ring, at most [`COMMANDS_PER_CALL`]. A call while another thread
    /// is at it leaves the work to that thread.
    pub fn run_commands(&self) -> Effects {
        run_ring(&Own(self))
    }

    /// Have followers do what is left to them, as far as `effort` goes; whether nothing is left to any.
    pub(super) fn settle(&self, effort: &mut Effort) -> bool {
        let followers = self.followers.read().unwrap_or_else(PoisonError::into_inner);
        let mut settled = true;
        for follower in followers.iter() {
            settled &= follower.settle(effort);
        }
        settled
    }

    /// Have followers obey `batch`; `silent` hears of devices that did not answer.
    fn tell(&self, batch: &[Command], mut silent: impl FnMut(NoAnswer)) {
        if batch.is_empty() {
            return;
        }
        let followers = self.followers.read().unwrap_or_else(PoisonError::into_inner);
        for follower in followers.iter() {
            follower.follow(batch).unwrap_or_else(&mut silent);
        }
    }

    /// Have followers drop everything.
    pub(super) fn tell_all(&self) -> Effects {
        let mut effects = Effects::default();
        let followers = self.followers.read().unwrap_or_else(PoisonError::into_inner);
        for follower in followers.iter() {
            if let Err(NoAnswer { device, .. }) = follower.forget() {
                let at = Gpa::default();
                effects.join(self.report(&Event::IotlbInvalidationTimeout { device, at }));
            }
        }
        effects
    }

    /// Return once whoever was in flight when this was called has left; whether anybody was.
    fn wait_for_flights(&self) -> bool {
        let _alone = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.grace.wait()
    }

    /// Do to the unit's own caches what `command` asks for. For how many further commands that counts.
    fn apply(&self, command: Command) -> usize {
        match command {
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
                self.prefetch(device, space, first, count, invalidate);
                return count.into();
            }
            // The unit itself keeps neither remapping entries nor devices' translations nor page requests.
            Command::CompletionWait { .. }
            | Command::InvalidateInterrupts { .. }
            | Command::InvalidateIotlb { .. }
            | Command::CompletePageRequest { .. } => {}
        }
        0
    }

    /// Walk for pages that will be wanted. What cannot be found is not reported (section 2.4.6).
    fn prefetch(&self, device: Bdf, space: Option<Pasid>, first: PageRange, count: u8, invalidate: bool) {
        let PageRange::Span { first, last } = first else {
            return;
        };
        if invalidate
            && let Ok(dte) = self.entry(device)
            && dte.host.v()
        {
            self.iotlb
                .invalidate_pages(dte.guest.domain(), space, PageRange::Span { first, last });
        }
        // Other rings' invalidations come at any time.
        let ticket = self.iotlb.ticket();
        let Ok(dte) = self.entry(device) else {
            return;
        };
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
            if !control.iommu_en() || self.walk_and_keep(ticket, &decision, &request).is_none() {
                return;
            }
        }
    }
}

/// Carry out commands that wait in the ring of `issuer`, at most [`COMMANDS_PER_CALL`]. A call while another thread is at
/// it leaves the work to that thread.
pub(super) fn run_ring<I: Issuer>(issuer: &I) -> Effects {
    let mut effects = Effects::default();
    let Some(mut processor) = issuer.processor().try_take() else {
        return effects;
    };
    let more = run(issuer, &mut processor, &mut effects);
    drop(processor);
    // Who rang meanwhile found the processor taken and went away. What he rang for is left to another call: a guest that
    // goes on ringing would have this one never end.
    if more || issuer.processor().missed() {
        effects.join(issuer.left());
    }
    effects
}

/// Whether anything is left that nobody has to ring for.
fn run<I: Issuer>(issuer: &I, processor: &mut Processor, effects: &mut Effects) -> bool {
    let mut more = false;
    let mut budget = Budget {
        commands: COMMANDS_PER_CALL,
        effort: Effort::of_a_call(),
        waits: false,
    };
    while let Some(ring) = waiting_commands(issuer) {
        if budget.commands == 0 {
            more = true;
            break;
        }
        let stopped = run_batch(issuer, processor, ring, &mut budget, effects);
        if let Err(stop) = stopped {
            effects.join(pass_on(issuer, processor));
            effects.join(halt(issuer, &stop));
            break;
        }
    }
    effects.join(pass_on(issuer, processor));
    let settled = issuer.unit().settle(&mut budget.effort);
    if settled || budget.effort.goes_on() {
        more |= !settled;
    } else {
        // Nobody is to try that over and over: the guest's next doorbell is when it is tried again.
        more &= !budget.waits;
    }
    issuer
        .counters()
        .commands(&std::mem::take(&mut processor.carried_out));
    more
}

/// The ring, while it runs and holds commands.
fn waiting_commands<I: Issuer>(issuer: &I) -> Option<Ring> {
    let registers = issuer.registers();
    let waits = registers.command_runs() && registers.command.waiting() > 0;
    waits.then_some(registers.command)
}

/// Fetch and carry out some commands from the head on; the head ends up behind the last that succeeded.
fn run_batch<I: Issuer>(
    issuer: &I,
    processor: &mut Processor,
    ring: Ring,
    budget: &mut Budget,
    effects: &mut Effects,
) -> Result<(), Stop> {
    let mut bytes = [0; BATCH * ENTRY];
    let wanted = usize::from(ring.waiting_in_a_row())
        .min(BATCH)
        .min(budget.commands);
    let (fetched, unreadable) = fetch_commands(issuer, ring, wanted, &mut bytes);
    let mut entry = ring.head();
    let mut outcome = Ok(());
    for (done, raw) in bytes.as_chunks().0.iter().take(fetched).enumerate() {
        if budget.commands == 0 && done > 0 {
            // One of those before counted for many, or was to be the last.
            issuer.change().command.set_head(entry);
            return Ok(());
        }
        let slot = ring.slot(entry);
        match execute(
            issuer,
            processor,
            u128::from_le_bytes(*raw),
            slot,
            budget,
            effects,
        ) {
            Ok(Carried::Out) => entry = ring.after(entry),
            Ok(Carried::Not) => {
                // The call ends here, and the next begins with this command.
                budget.end();
                budget.waits = true;
                issuer.change().command.set_head(entry);
                return Ok(());
            }
            Err(stop) => {
                outcome = Err(stop);
                break;
            }
        }
    }
    issuer.change().command.set_head(entry);
    outcome?;
    unreadable.map_or(Ok(()), |at| Err(Stop::Hardware { at }))
}

/// Read up to `wanted` commands; the second value is where memory did not answer.
fn fetch_commands<I: Issuer>(
    issuer: &I,
    ring: Ring,
    wanted: usize,
    bytes: &mut [u8],
) -> (usize, Option<Gpa>) {
    if issuer
        .read(ring.slot(ring.head()), &mut bytes[..wanted * ENTRY])
        .is_ok()
    {
        return (wanted, None);
    }
    let mut from = ring.head();
    for (count, raw) in bytes[..wanted * ENTRY].chunks_mut(ENTRY).enumerate() {
        if issuer.read(ring.slot(from), raw).is_err() {
            return (count, Some(ring.slot(from)));
        }
        from = ring.after(from);
    }
    (wanted, None)
}

/// Carry out one command.
fn execute<I: Issuer>(
    issuer: &I,
    processor: &mut Processor,
    raw: u128,
    at: Gpa,
    budget: &mut Budget,
    effects: &mut Effects,
) -> Result<Carried, Stop> {
    let unit = issuer.unit();
    let command = match issuer.parse(raw).map_err(|_| Stop::Illegal { at })? {
        Asked::Command(command) => command,
        Asked::OfHost(command) => {
            let (owed, counted) = unit.carry_out_of_host(command);
            effects.join(owed);
            budget.count(counted);
            return Ok(Carried::Out);
        }
    };
    if matches!(command, Command::CompletionWait { .. }) {
        effects.join(pass_on(issuer, processor));
        if !unit.settle(&mut budget.effort) {
            return Ok(Carried::Not);
        }
    }
    budget.count(1);
    processor.carried_out[command.kind()] += 1;
    if let Command::CompletionWait { store, interrupt } = command {
        if std::mem::take(&mut processor.unsettled) && unit.wait_for_flights() {
            // An access may take as long as the host's medium does.
            budget.end();
        }
        complete(issuer, store, interrupt, effects)?;
        return Ok(Carried::Out);
    }
    let mut counted = 0;
    let meant = issuer.mean(command, |command| {
        counted += unit.apply(command);
        processor.unsettled = true;
        for told in std::iter::once(command).chain(also_untagged(command)) {
            processor.untold.push(told);
            processor.untold_at.push(at);
        }
    });
    counted += meant.map_err(|Unreachable| Stop::Hardware { at })?;
    budget.count(counted);
    if processor.untold.len() >= BATCH {
        effects.join(pass_on(issuer, processor));
    }
    Ok(Carried::Out)
}

/// What a device is told beside `command`.
///
/// Behind an entry with GIOV, requests without PASID are translated by the tables of PASID 0, and what the device keeps of
/// them has no PASID either: Linux 7.3 has it forget them as those of PASID 0. The entry may have changed since the device
/// asked, so that it is not looked at; to forget more than was meant costs a translation request.
fn also_untagged(command: Command) -> Option<Command> {
    match command {
        Command::InvalidateIotlb {
            device,
            space: Some(Pasid::ZERO),
            pages,
        } => Some(Command::InvalidateIotlb {
            device,
            space: None,
            pages,
        }),
        _ => None,
    }
}

/// Tell followers of what they have not heard.
fn pass_on<I: Issuer>(issuer: &I, processor: &mut Processor) -> Effects {
    let mut effects = Effects::default();
    let places = processor.untold_at.chunks(BATCH);
    for (batch, places) in processor.untold.chunks(BATCH).zip(places) {
        issuer.unit().tell(batch, |NoAnswer { device, index }| {
            let at = places.get(index).copied().unwrap_or_default();
            effects.join(issuer.report(&Event::IotlbInvalidationTimeout { device, at }));
        });
    }
    processor.untold.clear();
    processor.untold_at.clear();
    effects
}

/// Answer a COMPLETION_WAIT: store, status, interrupt, in this order (section 2.4.1).
fn complete<I: Issuer>(
    issuer: &I,
    store: Option<(Gpa, u64)>,
    interrupt: bool,
    effects: &mut Effects,
) -> Result<(), Stop> {
    if let Some((at, data)) = store {
        issuer
            .store(at, data)
            .map_err(|Unreachable| Stop::Hardware { at })?;
    }
    if interrupt {
        let mut registers = issuer.change();
        registers.latch(Status::new().with_com_wait_int(true));
        let raised = registers.take_interrupts();
        drop(registers);
        effects.join(issuer.interrupted(raised));
    }
    Ok(())
}

/// Stop with the head where it is, and say why.
fn halt<I: Issuer>(issuer: &I, stop: &Stop) -> Effects {
    issuer.change().stop_commands();
    issuer.counters().stop();
    let event = match *stop {
        Stop::Illegal { at } => Event::IllegalCommand { at },
        Stop::Hardware { at } => Event::CommandHardwareError { at },
    };
    issuer.report(&event)
}
