//! An AMD IOMMU in software (publication 48882): registers, rings, tables, translation, remapping, and
//! nothing of the machine around it.
//!
//! The unit walks whatever memory it is given, so it serves a guest's devices as well as it stands for a
//! physical unit with nested tables. The PCI function, the address in MMIO and the interrupts' way to the
//! processors belong to whoever owns it: an access returns its [`Effects`], and the owner carries them out.
//!
//! # One request
//!
//! ```text
//! Unit::begin        whoever accesses memory is in flight until the guard is dropped
//! InFlight::translate   control, device table entry, decision, cache or walk
//! ```
//!
//! # One doorbell
//!
//! ```text
//! Unit::mmio_write   offset    ->  Reg + LaneWrite
//! Registers::write   register  ->  Effect::RunCommands            [register lock]
//! Unit::run_commands ring      ->  Command, Command, ...          [processor lock]
//!                    COMPLETION_WAIT: followers, accesses in flight, store, interrupt
//! ```
//!
//! # Locks
//!
//! The processor's lock comes before the registers'; nobody holding the registers' waits for anything.
//! Translations take none unless they have an event to report.

pub mod agent;
pub mod commands;
pub mod counters;
pub mod device_table;
pub mod dma;
pub mod dte_cache;
pub mod effort;
pub mod events;
pub mod features;
pub mod grace;
pub mod iotlb;
pub mod log;
pub mod memory;
pub mod pages;
pub mod passing;
pub mod ppr;
pub mod processor;
pub mod registers;
pub mod remap;
pub mod request;
pub mod ring;
pub mod scan;
pub mod slot;
pub mod spec;
pub mod sync;
pub mod view;
pub mod viommu;
pub mod walk;
pub mod window;

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use crate::platform::lanes::{LaneWrite, read_lanes};
use counters::{Counters, Counts};
use device_table::{fetch, locate};
use dma::InFlight;
use dte_cache::DteCache;
use effort::Effort;
use events::Event;
use features::Features;
use grace::Grace;
use iotlb::Iotlb;
use log::Appended;
use memory::SystemMemory;
use processor::{Follower, Processor, Seat};
use registers::{Configuration, Effect, Exclusion, Interrupts, MsiMirror, Registers};
use slot::Slot;
use spec::dte::Dte;
use spec::registers::{Control, DeviceTableBase, ExclusionBase, ExclusionLimit, Reg, Status};
use viommu::Guests;
use window::{Change, RegisterWindow};

use crate::platform::addr::{Bdf, Gpa};

/// What the unit owes the machine after an access, to be carried out with no lock held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[must_use]
pub struct Effects {
    /// Interrupts of the unit itself, not to be remapped.
    pub interrupts: Interrupts,
    /// Commands are left, or work of followers: call [`Unit::run_commands`] again, from a thread that holds up nobody.
    pub more_commands: bool,
    /// The MSI capability of the unit's function takes this.
    pub program_msi: Option<MsiMirror>,
    /// Guests are owed something: ask [`Unit::take_owed`] what.
    pub guests: bool,
}

impl Effects {
    /// Nothing but interrupts.
    pub(super) fn of(interrupts: Interrupts) -> Self {
        Self {
            interrupts,
            ..Self::default()
        }
    }

    /// Add what happened later.
    pub fn join(&mut self, later: Self) {
        self.interrupts.join(later.interrupts);
        self.more_commands |= later.more_commands;
        self.program_msi = later.program_msi.or(self.program_msi);
        self.guests |= later.guests;
    }
}

/// Why a device has no entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NoEntry {
    /// The table ends before it.
    Beyond,
    /// Memory does not answer where it should lie.
    Unreadable(Gpa),
}

/// The unit. Shared by vCPUs, which access its registers, and devices, which pass it.
pub struct Unit<M> {
    memory: M,
    features: Features,
    /// Taken before `registers` where both are.
    processor: Seat,
    registers: Mutex<Registers>,
    window: OnceLock<Box<dyn RegisterWindow>>,
    /// Control, as translations see it.
    control: AtomicU64,
    /// Exclusion Base, likewise.
    exclusion: AtomicU64,
    /// The whole [`Configuration`], likewise.
    configuration: Slot<11>,
    entries: DteCache,
    iotlb: Iotlb,
    grace: Grace,
    /// Held by who waits for accesses in flight, one at a time.
    waiting: Mutex<()>,
    /// Devices whose entry asks for one page fault at most (SE), and that have had it: one bit each.
    reported: Box<[AtomicU64]>,
    followers: RwLock<Vec<Arc<dyn Follower>>>,
    counters: Counters,
    /// Where the unit has the vIOMMU extension.
    guests: Option<Box<Guests>>,
}

impl<M: SystemMemory> Unit<M> {
    /// A unit at `own` as after power-on that offers `features` and works on `memory`. By its own device table entry it
    /// finds what it needs to serve guests, if `features` say that it does.
    #[must_use]
    pub fn new(own: Bdf, features: Features, memory: M) -> Self {
        let guests = features.efr.viommu().then(|| Box::new(Guests::new(own)));
        let registers = Registers::new(features);
        let unit = Self {
            memory,
            features,
            processor: Seat::default(),
            control: AtomicU64::new(0),
            exclusion: AtomicU64::new(0),
            configuration: Slot::default(),
            entries: DteCache::default(),
            iotlb: Iotlb::new(iotlb::SETS),
            grace: Grace::default(),
            waiting: Mutex::default(),
            reported: (0..1024).map(|_| AtomicU64::new(0)).collect(),
            followers: RwLock::default(),
            counters: Counters::default(),
            guests,
            registers: Mutex::new(registers),
            window: OnceLock::new(),
        };
        unit.publish(&unit.registers());
        unit
    }

    /// The last address that tables of the features that it offers can map.
    #[must_use]
    pub const fn last_address(&self) -> u64 {
        self.features.last_address()
    }

    /// From now on `follower` hears of every invalidation.
    pub fn add_follower(&self, follower: Arc<dyn Follower>) {
        let mut followers = self.followers.write().unwrap_or_else(PoisonError::into_inner);
        followers.push(follower);
    }

    /// From now on `window` shows the registers that change while the unit runs. There is one at most; another
    /// is ignored.
    pub fn show_registers(&self, window: Box<dyn RegisterWindow>) {
        let _ = self.window.set(window);
        drop(self.change());
    }

    /// The MSI capability of the unit's function changed in configuration space.
    pub fn mirror_msi(&self, msi: MsiMirror) {
        self.change().mirror_msi(msi);
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            hits: self.grace.counted(),
            ..self.counters.counts()
        }
    }

    /// The register `reg` as the guest would read it.
    #[must_use]
    pub fn register(&self, reg: Reg) -> u64 {
        self.registers().read(reg)
    }

    /// Whoever translates and accesses memory is in flight until the guard is dropped. Take one per piece of
    /// work and drop it soon: COMPLETION_WAIT waits for it. Never access the unit's registers meanwhile.
    #[inline]
    #[must_use]
    pub fn begin(&self) -> InFlight<'_, M> {
        InFlight::new(self)
    }

    /// The guest reads `data.len()` bytes at `offset`. Where there is no register it reads 0.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = Reg::at(offset & !7).map_or(0, |reg| self.register(reg));
        read_lanes(value, within(offset), data);
    }

    /// The guest writes `data` at `offset`. Where there is no register nothing happens.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> Effects {
        let (effect, mut effects) = self.write_register(offset, data);
        match effect {
            Effect::None => {}
            Effect::ProgramMsi(msi) => effects.program_msi = Some(msi),
            Effect::RunCommands => {
                self.counters.doorbell();
                effects.join(self.run_commands());
            }
            Effect::Reconfigure { before } => effects.join(self.reconfigured(before)),
        }
        effects
    }

    /// The guest wrote `data` to the command buffer's tail at `offset`, and nobody has looked until now. Commands are
    /// left, as the effects say, to whoever calls [`Unit::run_commands`]. At other offsets nothing happens.
    pub fn late_doorbell(&self, offset: u64, data: &[u8]) -> Effects {
        if Reg::at(offset & !7) != Some(Reg::CommandTail) {
            return Effects::default();
        }
        let (effect, mut effects) = self.write_register(offset, data);
        if effect == Effect::RunCommands {
            self.counters.polled_doorbell();
            effects.more_commands = true;
        }
        effects
    }

    /// Change a register: what that sets off, and the interrupts it released.
    fn write_register(&self, offset: u64, data: &[u8]) -> (Effect, Effects) {
        let reg = Reg::at(offset & !7);
        let Some((reg, lanes)) = reg.zip(LaneWrite::new(within(offset), data)) else {
            return (Effect::None, Effects::default());
        };
        let mut registers = self.change();
        let effect = registers.write(reg, lanes);
        if matches!(effect, Effect::Reconfigure { .. }) {
            self.publish(&registers);
        }
        (effect, Effects::of(registers.take_interrupts()))
    }

    /// As after power-on.
    pub fn reset(&self) {
        let _idle = self.processor();
        {
            let mut registers = self.change();
            registers.reset();
            self.publish(&registers);
        }
        self.reset_guests();
        // With the log off there is nothing to report. What followers still have to do is little: behind a unit that is off
        // no tables are looked at. Nobody would call for it, as nothing of before a reset is owed.
        let _ = self.forget();
        let mut effort = Effort::of_a_call();
        while !self.settle(&mut effort) && effort.goes_on() {
            effort = Effort::of_a_call();
        }
    }

    /// The registers, to be looked at.
    fn registers(&self) -> impl Deref<Target = Registers> + '_ {
        self.locked_registers()
    }

    /// The registers, to be changed.
    fn change(&self) -> Change<'_> {
        Change::new(self.locked_registers(), self.window.get().map(Box::as_ref))
    }

    fn locked_registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn processor(&self) -> MutexGuard<'_, Processor> {
        self.processor.take()
    }

    /// Show translations what the registers say.
    fn publish(&self, registers: &Registers) {
        let Configuration {
            control,
            exclusion,
            device_table: t,
        } = registers.configuration();
        let [control, base, limit] = [
            control.into_bits(),
            exclusion.base.into_bits(),
            exclusion.limit.into_bits(),
        ];
        let t = t.map(DeviceTableBase::into_bits);
        let words = [
            control, base, limit, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7],
        ];
        self.configuration.replace(words);
        self.exclusion.store(base, Ordering::Release);
        self.control.store(control, Ordering::Release);
    }

    /// What the registers said when they were last published.
    fn configuration(&self) -> Configuration {
        let [control, base, limit, tables @ ..] = self.configuration.read();
        Configuration {
            control: Control::from_bits(control),
            exclusion: Exclusion {
                base: ExclusionBase::from_bits(base),
                limit: ExclusionLimit::from_bits(limit),
            },
            device_table: tables.map(DeviceTableBase::from_bits),
        }
    }

    /// Control, tables or exclusion changed: what was cached under the old ones goes, and then commands run.
    fn reconfigured(&self, before: Control) -> Effects {
        let control = Control::from_bits(self.control.load(Ordering::Acquire));
        let ran = before.iommu_en() && before.cmd_buf_en();
        if ran && !(control.iommu_en() && control.cmd_buf_en()) {
            // The command in hand is finished once the processor's lock is free, and no other begins.
            drop(self.processor());
        }
        let mut effects = self.reconfigure_guests();
        effects.join(self.forget());
        effects.join(self.run_commands());
        effects
    }

    /// Drop everything cached, and have followers do so, as far as one call goes: whoever writes a register is in the middle
    /// of an exit.
    fn forget(&self) -> Effects {
        self.invalidate_all();
        let mut effects = self.tell_all();
        let mut effort = Effort::of_a_call();
        effects.more_commands |= !self.settle(&mut effort) && effort.goes_on();
        effects
    }

    fn invalidate_all(&self) {
        self.entries.invalidate_all();
        self.iotlb.invalidate_all();
        self.reported
            .iter()
            .for_each(|devices| devices.store(0, Ordering::Relaxed));
    }

    /// Forget that `device` had its one page fault.
    fn rearm(&self, device: Bdf) {
        let (word, bit) = place(device);
        self.reported[word].fetch_and(!bit, Ordering::Relaxed);
    }

    /// Whether this is the first page fault of `device` since its entry was invalidated.
    fn is_first_fault(&self, device: Bdf) -> bool {
        let (word, bit) = place(device);
        self.reported[word].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// Tell the software of the device that `event` is about: a guest, or whoever drives the unit.
    fn report_request(&self, event: &Event) -> Effects {
        self.report_to_guest(event).unwrap_or_else(|| self.report(event))
    }

    /// Tell software by the event log.
    fn report(&self, event: &Event) -> Effects {
        let record = event.record();
        self.counters.event(record);
        let mut registers = self.change();
        if registers.event_log_runs() {
            match registers.event.append(&self.memory, record) {
                Appended::Logged => registers.latch(Status::new().with_event_log_int(true)),
                Appended::Overflowed => registers.latch(Status::new().with_event_overflow(true)),
                Appended::Unreachable => {}
            }
        }
        Effects::of(registers.take_interrupts())
    }

    /// The entry of `device`, from the cache or from memory.
    #[inline]
    fn entry(&self, device: Bdf) -> Result<Dte, NoEntry> {
        match self.entries.find(device) {
            Some(dte) => Ok(dte),
            None => self.fetch_entry(device),
        }
    }

    #[cold]
    fn fetch_entry(&self, device: Bdf) -> Result<Dte, NoEntry> {
        let ticket = self.entries.ticket();
        let at = locate(&self.configuration(), device).ok_or(NoEntry::Beyond)?;
        let mut dte = fetch(&self.memory, at).map_err(|_| NoEntry::Unreadable(at))?;
        // Marks that the unit does not offer it does not leave, whatever an entry asks for.
        let offered = u8::from(self.features.efr.ha()) | u8::from(self.features.efr.hd()) << 1;
        dte.host.set_had(dte.host.had() & offered);
        self.entries.keep(ticket, device, &dte);
        Ok(dte)
    }
}

/// Byte of its quadword that `offset` names.
const fn within(offset: u64) -> usize {
    (offset & 7) as usize
}

/// Where the bit of `device` lies among 65,536.
fn place(device: Bdf) -> (usize, u64) {
    let id = device.requester_id();
    (usize::from(id >> 6), 1 << (id & 63))
}
