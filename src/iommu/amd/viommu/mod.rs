//! The vIOMMU extension: one unit that serves the units of up to 65,536 guests.
//!
//! A guest has a page of registers of its own (VF MMIO: heads, tails and Status), which it reaches without anybody's
//! help, and rings in its own memory. The host says where they lie and by what names the guest calls its devices and
//! domains (VF control MMIO). The rest is the unit's: it fetches the guest's commands, puts the host's numbers in place
//! of the guest's, carries them out, and writes the guest's events and page requests into the guest's logs by the guest's
//! numbers.
//!
//! # What a guest reaches
//!
//! Memory of a guest is what the host table maps in the device table entry of the guest's *translate device*. Devices and
//! domains are those its maps name; a command about any other does nothing. The maps lie in the unit's *private address
//! space*, which is what the host table maps in the entry of the unit's own function.
//!
//! | what goes wrong | guest | host |
//! |---|---|---|
//! | a command means nothing, or its memory does not answer | event; its ring stops | |
//! | a log has no room | overflow, as on any unit | |
//! | a log's memory does not answer | the record is lost | GUEST_EVENT_FAULT |
//! | a map, its dirty bit, or the translate device's entry, does not answer | its ring stops | VIOMMU_HARDWARE_ERROR |
//! | the extended interrupt remapping table does not answer | its interrupt is held back | VIOMMU_HARDWARE_ERROR |
//! | a request finds no page in the guest's tables | event | |
//! | a request finds no page in the host's table | | event |
//!
//! Guests' buffers by guest physical address (GstBufferTRPMode) are the only kind there is: while that bit of Control is
//! 0, no ring of a guest runs.
//!
//! # Locks
//!
//! Of one guest: processor, VF control, registers, in this order. No two guests' at a time; the unit's own processor comes
//! before all of them, its registers after. The dirty bits come between a guest's processor and its registers.

mod dirty;
mod interrupts;
mod issuer;
mod logs;
mod maps;
mod reach;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use super::counters::{Counters, Counts};
use super::features::Features;
use super::memory::SystemMemory;
use super::processor::Seat;
use super::registers::guest::Rings;
use super::registers::{Effect, Interrupts, Registers};
use super::spec::command::{Generic, Opcode};
use super::spec::event::Record;
use super::spec::registers::{Control, Reg};
use super::spec::viommu::{
    CommandControl, ControlReg, EventControl, InsertGuestEvent, MapControl, MiscControl, PprControl,
    ResetVmmio,
};
use super::window::{Change, RegisterWindow};
use super::{Effects, Unit, within};
use crate::platform::addr::Bdf;
use crate::platform::lanes::{LaneWrite, read_lanes};
use crate::platform::lock::lock;

pub use interrupts::{FIRST_VECTOR, GuestInterrupt, GuestLog, Posted};

/// A command that only the host gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OfHost {
    /// INSERT_GUEST_EVENT.
    InsertEvent {
        /// Into whose log.
        guest: u16,
        /// The record.
        record: Record,
    },
    /// RESET_VMMIO; `None` for everybody's.
    Reset(Option<u16>),
}

impl OfHost {
    /// Read an entry of the host's ring; `None` when it is none of these.
    pub(super) fn parse(raw: u128, features: &Features) -> Option<Self> {
        if !features.efr.viommu() {
            return None;
        }
        match Opcode(Generic::from_bits(raw).opcode()) {
            Opcode::INSERT_GUEST_EVENT => {
                let insert = InsertGuestEvent::from_bits(raw);
                let flags = u128::from(insert.flags()) << 48;
                let record = Record::from_bits(flags)
                    .with_device(insert.device())
                    .with_pasid_19_16(insert.pasid_19_16())
                    .with_code(insert.code())
                    .with_address(insert.address());
                let guest = insert.guest();
                Some(Self::InsertEvent { guest, record })
            }
            Opcode::RESET_VMMIO => {
                let reset = ResetVmmio::from_bits(raw);
                Some(Self::Reset((!reset.all()).then_some(reset.guest())))
            }
            _ => None,
        }
    }
}

/// What the machine owes a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Owed {
    /// The interrupt of its event log and of COMPLETION_WAIT.
    pub event: bool,
    /// The interrupt of its PPR log.
    pub ppr: bool,
    /// Commands are left: call [`Unit::run_guest_commands`] again, from a thread that holds up nobody.
    pub more_commands: bool,
}

/// The guests of a unit.
pub(super) struct Guests {
    /// The unit's own function.
    own: Bdf,
    /// Those who were ever spoken of.
    guests: RwLock<BTreeMap<u16, Arc<Guest>>>,
    owed: Mutex<BTreeMap<u16, Owed>>,
    /// Whose bit of the command-buffer dirty status is set.
    dirty: Mutex<BTreeSet<u16>>,
    counters: Counters,
}

/// A guest.
pub(super) struct Guest {
    id: u16,
    processor: Seat,
    control: Mutex<VfControl>,
    registers: Mutex<Registers>,
    window: OnceLock<Box<dyn RegisterWindow>>,
    /// By whose device table entry its buffers are reached.
    translate_device: AtomicU16,
}

/// What was written to VF control MMIO.
#[derive(Clone, Copy, Debug, Default)]
struct VfControl {
    device_map: MapControl,
    domain_map: MapControl,
    misc: MiscControl,
    rings: Rings,
}

impl Guests {
    pub(super) fn new(own: Bdf) -> Self {
        Self {
            own,
            guests: RwLock::default(),
            owed: Mutex::default(),
            dirty: Mutex::default(),
            counters: Counters::default(),
        }
    }

    /// The guest `id`, if anybody ever spoke of it.
    fn known(&self, id: u16) -> Option<Arc<Guest>> {
        let guests = self.guests.read().unwrap_or_else(PoisonError::into_inner);
        guests.get(&id).cloned()
    }

    /// The guest `id`.
    fn guest(&self, id: u16, features: Features) -> Arc<Guest> {
        self.known(id).unwrap_or_else(|| {
            let mut guests = self.guests.write().unwrap_or_else(PoisonError::into_inner);
            guests
                .entry(id)
                .or_insert_with(|| Arc::new(Guest::new(id, features)))
                .clone()
        })
    }

    fn all(&self) -> Vec<Arc<Guest>> {
        let guests = self.guests.read().unwrap_or_else(PoisonError::into_inner);
        guests.values().cloned().collect()
    }

    /// Owe `guest` what `change` says.
    fn owe(&self, guest: u16, change: impl FnOnce(&mut Owed)) -> Effects {
        change(lock(&self.owed).entry(guest).or_default());
        Effects {
            guests: true,
            ..Effects::default()
        }
    }

    /// Interrupts of `guest` became due.
    fn interrupted(&self, guest: u16, raised: Interrupts) -> Effects {
        if raised == Interrupts::default() {
            return Effects::default();
        }
        self.owe(guest, |owed| {
            owed.event |= raised.event.is_some();
            owed.ppr |= raised.ppr.is_some();
        })
    }
}

impl Guest {
    fn new(id: u16, features: Features) -> Self {
        Self {
            id,
            processor: Seat::default(),
            control: Mutex::default(),
            registers: Mutex::new(Registers::of_guest(features)),
            window: OnceLock::new(),
            translate_device: AtomicU16::new(0),
        }
    }

    fn registers(&self) -> impl Deref<Target = Registers> + '_ {
        lock(&self.registers)
    }

    fn change(&self) -> Change<'_> {
        Change::new(lock(&self.registers), self.window.get().map(Box::as_ref))
    }

    fn translate_device(&self) -> Bdf {
        Bdf::from_requester_id(self.translate_device.load(Ordering::Acquire))
    }
}

/// The register at `offset` of a guest's page.
fn page_register(offset: u64) -> Option<Reg> {
    let offset = (offset < Reg::RUNNING_LEN).then_some(offset & !7)?;
    Reg::at(Reg::RUNNING_AT + offset).filter(|reg| Registers::in_page(*reg))
}

impl<M: SystemMemory> Unit<M> {
    /// The guest `id`, where the unit serves guests.
    fn guest(&self, id: u16) -> Option<(&Guests, Arc<Guest>)> {
        let guests = self.guests.as_deref()?;
        Some((guests, guests.guest(id, self.features)))
    }

    /// The guest `id`, if anybody ever wrote about it. All registers of any other are 0.
    fn known_guest(&self, id: u16) -> Option<Arc<Guest>> {
        self.guests.as_ref()?.known(id)
    }

    /// `guest` reads `data.len()` bytes at `offset` of its page (VF MMIO). Where there is no register it reads 0.
    pub fn vf_read(&self, guest: u16, offset: u64, data: &mut [u8]) {
        let value = page_register(offset)
            .zip(self.known_guest(guest))
            .map_or(0, |(reg, guest)| guest.registers().read(reg));
        read_lanes(value, within(offset), data);
    }

    /// `guest` writes `data` at `offset` of its page (VF MMIO). Where there is no register nothing happens.
    pub fn vf_write(&self, guest: u16, offset: u64, data: &[u8]) -> Effects {
        let write = page_register(offset).zip(LaneWrite::new(within(offset), data));
        let Some(((reg, lanes), (guests, guest))) = write.zip(self.guest(guest)) else {
            return Effects::default();
        };
        let mut registers = guest.change();
        let effect = registers.write(reg, lanes);
        let raised = registers.take_interrupts();
        drop(registers);
        let mut effects = guests.interrupted(guest.id, raised);
        if effect == Effect::RunCommands {
            guests.counters.doorbell();
            effects.join(self.run_commands_of(guests, &guest));
        }
        effects
    }

    /// `guest` wrote `data` to its command buffer's tail at `offset` of its page, and nobody has looked until now. Whether
    /// that leaves commands to whoever calls [`Unit::run_guest_commands`]. At other offsets nothing happens.
    pub fn vf_late_doorbell(&self, guest: u16, offset: u64, data: &[u8]) -> bool {
        let write = page_register(offset).zip(LaneWrite::new(within(offset), data));
        let Some(((Reg::CommandTail, lanes), (guests, guest))) = write.zip(self.guest(guest)) else {
            return false;
        };
        let rings = guest.change().write(Reg::CommandTail, lanes) == Effect::RunCommands;
        if rings {
            guests.counters.polled_doorbell();
        }
        rings
    }

    /// The host reads `data.len()` bytes at `offset` of the 64 that control `guest` (VF control MMIO). Where there is no
    /// register it reads 0.
    pub fn vf_control_read(&self, guest: u16, offset: u64, data: &mut [u8]) {
        let reg = ControlReg::at(offset & !7);
        let value = reg.zip(self.known_guest(guest)).map_or(0, |(reg, guest)| {
            let control = lock(&guest.control);
            match reg {
                ControlReg::DeviceMap => control.device_map.into_bits(),
                ControlReg::DomainMap => control.domain_map.into_bits(),
                ControlReg::Misc => control.misc.into_bits(),
                ControlReg::Command => control.rings.command.into_bits(),
                ControlReg::Event => control.rings.event.into_bits(),
                ControlReg::Ppr => control.rings.ppr.into_bits(),
            }
        });
        read_lanes(value, within(offset), data);
    }

    /// The host writes `data` at `offset` of the 64 bytes that control `guest` (VF control MMIO). Where there is no
    /// register nothing happens.
    pub fn vf_control_write(&self, guest: u16, offset: u64, data: &[u8]) -> Effects {
        let write = ControlReg::at(offset & !7).zip(LaneWrite::new(within(offset), data));
        let Some(((reg, lanes), (guests, guest))) = write.zip(self.guest(guest)) else {
            return Effects::default();
        };
        let mut control = lock(&guest.control);
        match reg {
            ControlReg::DeviceMap => {
                let entry = map_control(&mut control.device_map, lanes);
                drop(control);
                entry.map_or_else(Effects::default, |entry| self.map_device(guests, &guest, entry))
            }
            ControlReg::DomainMap => {
                let entry = map_control(&mut control.domain_map, lanes);
                drop(control);
                entry.map_or_else(Effects::default, |entry| self.map_domain(guests, &guest, entry))
            }
            ControlReg::Misc => {
                let misc = lanes.store(control.misc.into_bits(), MiscControl::WRITABLE);
                control.misc = MiscControl::from_bits(misc);
                let device = control.misc.translate_device();
                guest.translate_device.store(device, Ordering::Release);
                Effects::default()
            }
            ControlReg::Command => {
                let command = control.rings.command.into_bits();
                let command = lanes.store(command, CommandControl::WRITABLE);
                control.rings.command = CommandControl::from_bits(command);
                drop(control);
                self.set_rings(guests, &guest)
            }
            ControlReg::Event => {
                let event = lanes.store(control.rings.event.into_bits(), EventControl::WRITABLE);
                control.rings.event = EventControl::from_bits(event);
                drop(control);
                self.set_rings(guests, &guest)
            }
            ControlReg::Ppr => {
                let ppr = lanes.store(control.rings.ppr.into_bits(), PprControl::WRITABLE);
                control.rings.ppr = PprControl::from_bits(ppr);
                drop(control);
                self.set_rings(guests, &guest)
            }
        }
    }

    /// What guests are owed since the last call.
    #[must_use]
    pub fn take_owed(&self) -> BTreeMap<u16, Owed> {
        let owed = self
            .guests
            .as_ref()
            .map(|guests| std::mem::take(&mut *lock(&guests.owed)));
        owed.unwrap_or_default()
    }

    /// Carry out commands that wait in the ring of `guest`, as [`Unit::run_commands`] does in the unit's own.
    pub fn run_guest_commands(&self, guest: u16) -> Effects {
        self.guest(guest)
            .map_or_else(Effects::default, |(guests, guest)| {
                self.run_commands_of(guests, &guest)
            })
    }

    /// From now on `window` shows the page of `guest`. There is one at most; another is ignored.
    pub fn show_guest_registers(&self, guest: u16, window: Box<dyn RegisterWindow>) {
        if let Some((_, guest)) = self.guest(guest) {
            let _ = guest.window.set(window);
            drop(guest.change());
        }
    }

    /// What guests had done so far: doorbells, commands, stops and events. Translations are counted with the unit's.
    #[must_use]
    pub fn guests_counts(&self) -> Counts {
        let counts = self.guests.as_ref().map(|guests| guests.counters.counts());
        counts.unwrap_or_default()
    }

    /// Carry out a command that only the host gives; for how many that counts.
    pub(super) fn carry_out_of_host(&self, command: OfHost) -> (Effects, usize) {
        let Some(guests) = &self.guests else {
            return (Effects::default(), 1);
        };
        match command {
            OfHost::InsertEvent { guest, record } => {
                let guest = guests.guest(guest, self.features);
                let effects = self.log_event(guests, &guest, record.into_bits());
                (effects, 1)
            }
            OfHost::Reset(guest) => {
                let reset: Vec<_> =
                    guest.map_or_else(|| guests.all(), |guest| guests.known(guest).into_iter().collect());
                let mut effects = Effects::default();
                let counted = reset.len().max(1);
                for guest in reset {
                    let idle = guest.processor.take();
                    guest.change().reset_page();
                    drop(idle);
                    // Who rang once the page was reset may have found the processor taken.
                    effects.join(Self::owe_waiting(guests, &guest));
                    effects.join(self.unbroken(&guest, self.mark_clean(guests, &guest)));
                }
                (effects, counted)
            }
        }
    }

    /// Bring the rings of `guest` to what VF control and Control say, and carry out what waits.
    fn set_rings(&self, guests: &Guests, guest: &Guest) -> Effects {
        let mut effects = guests.interrupted(guest.id, self.bring_rings(guest));
        effects.join(self.run_commands_of(guests, guest));
        effects
    }

    fn bring_rings(&self, guest: &Guest) -> Interrupts {
        // The command in hand is finished before its ring stops or moves.
        let _idle = guest.processor.take();
        let rings = lock(&guest.control).rings;
        let control = Control::from_bits(self.control.load(Ordering::Acquire));
        let mut registers = guest.change();
        registers.set_rings(&rings, control);
        registers.take_interrupts()
    }

    /// Control changed, and with it perhaps which rings of guests run.
    pub(super) fn reconfigure_guests(&self) -> Effects {
        let mut effects = Effects::default();
        let Some(guests) = &self.guests else {
            return effects;
        };
        for guest in guests.all() {
            effects.join(guests.interrupted(guest.id, self.bring_rings(&guest)));
            effects.join(Self::owe_waiting(guests, &guest));
        }
        effects
    }

    /// Owe `guest` what waits in its ring.
    fn owe_waiting(guests: &Guests, guest: &Guest) -> Effects {
        let registers = guest.registers();
        if registers.command_runs() && registers.command.waiting() > 0 {
            guests.owe(guest.id, |owed| owed.more_commands = true)
        } else {
            Effects::default()
        }
    }

    /// Everything about guests as after power-on.
    pub(super) fn reset_guests(&self) {
        let Some(guests) = &self.guests else { return };
        for guest in guests.all() {
            let _idle = guest.processor.take();
            *lock(&guest.control) = VfControl::default();
            guest.translate_device.store(0, Ordering::Release);
            *guest.change() = Registers::of_guest(self.features);
        }
        lock(&guests.owed).clear();
        lock(&guests.dirty).clear();
    }
}

/// Store `lanes` in a map control register; the entry to be written if they order that.
fn map_control(register: &mut MapControl, lanes: LaneWrite) -> Option<MapControl> {
    let written = MapControl::from_bits(lanes.store(register.into_bits(), MapControl::WRITABLE));
    *register = written.with_write(false);
    written.write().then_some(*register)
}
