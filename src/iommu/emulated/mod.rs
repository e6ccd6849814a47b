//! Mode `emulated`: the unit as a guest finds it in its machine.
//!
//! The unit's model (`super::amd`) answers; this connects it: registers to the MMIO bus, its PCI function,
//! requests of the functions it covers, their messages and the IOAPIC's, and what an access of the guest
//! sets off.
//!
//! # Who waits for whom
//!
//! COMPLETION_WAIT waits for requests in flight, on the processor that rang the doorbell or on the event
//! loop. Whoever is in flight therefore writes no register of a unit and waits for nobody who might: devices
//! take a view of memory per request, and interrupts of the unit itself go out once the view is dropped.

mod ioapic;
mod messages;
mod serving;
#[cfg(test)]
pub(crate) mod testing;

pub use super::function::{CAPABILITY_AT, GuestRegisters, IDENTITY};
pub use ioapic::RemappingIoApic;
pub use messages::RemappingSink;
pub use serving::{GuestControls, GuestPages};

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::amd::agent::UnitOwner;
use super::amd::counters::Counts;
use super::amd::features::Features;
use super::amd::passing::Passing;
use super::amd::processor::Follower;
use super::amd::registers::Interrupt;
use super::amd::request::Access;
pub use super::amd::spec::registers::MMIO_LEN;
use super::amd::spec::registers::Reg;
use super::amd::view::View;
use super::amd::window::RegisterWindow;
use super::amd::{Effects, Unit};
use super::function::UnitFunction;
use super::polling::{Polled, Polling};
use super::shadow::Views;
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::topology::Observer;
use crate::pci::{Command, ConfigEffect, Function};
use crate::platform::addr::{Bdf, GpaRange, Iova, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::dma::{Requester, Translations, Translator};
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;
use crate::platform::msi::{MsiMessage, MsiPort, MsiSink};

use messages::{Routes, Wakes};
use serving::Waiting;

/// Data of a message, by what it delivers.
mod data {
    /// Delivery mode 1: arbitrated, or lowest priority.
    pub(super) const ARBITRATED: u32 = 1 << 8;
    /// The line is asserted.
    pub(super) const ASSERTED: u32 = 1 << 14;
    /// Level-triggered.
    pub(super) const LEVEL: u32 = 1 << 15;
}

/// What a unit is made of.
pub struct UnitParts {
    /// What the operator calls it.
    pub name: String,
    /// Where its PCI function is.
    pub at: Sbdf,
    /// Its registers: [`MMIO_LEN`] bytes at a multiple of that.
    pub mmio: GpaRange,
    /// What it offers.
    pub features: Features,
    /// Where it has registers of guests; `None` where it serves none.
    pub guests: Option<GuestRegisters>,
    /// The memory it works on and translates to.
    pub ram: GuestRam,
    /// Where messages go that nothing remaps any more.
    pub messages: Arc<dyn MsiSink>,
}

/// A unit in a machine.
pub struct EmulatedUnit {
    name: String,
    mmio: GpaRange,
    unit: Unit<GuestRam>,
    /// Set where a thread polls its doorbell.
    polling: OnceLock<Polling>,
    /// It speaks translation services with functions.
    ats: bool,
    ram: GuestRam,
    /// Its PCI function.
    function: UnitFunction,
    /// As whom its own interrupts are sent: no Bus Master Enable holds them up.
    own: Arc<Requester>,
    messages: Arc<dyn MsiSink>,
    routes: Arc<Routes>,
    /// Guests whose commands wait that no processor is to be held up with.
    waiting: Mutex<Waiting>,
    /// Readable while commands wait that no processor is to be held up with.
    more: EventFd,
    /// What the event loop hears.
    wakes: Wakes,
}

impl EmulatedUnit {
    /// A unit made of `parts`, as after power-on.
    ///
    /// # Errors
    /// When the host has no eventfd or epoll instance for it.
    pub fn new(parts: UnitParts) -> Result<Arc<Self>, HostError> {
        let more = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| HostError::new(format!("create the eventfd of {}", parts.name), source))?;
        let wakes = Wakes::new(&more).map_err(|source| {
            HostError::new(format!("create the epoll instance of {}", parts.name), source)
        })?;
        let own = Arc::new(Requester::new(parts.at));
        own.set_bus_master(true);
        let function = UnitFunction::serving(
            &parts.features,
            parts.mmio,
            parts.guests,
            parts.at,
            MsiPort::new(own.clone(), parts.messages.clone()),
        );
        let routes = Arc::new(Routes::default());
        let ats = parts.features.header.iotlb();
        let unit = Unit::new(parts.at.bdf, parts.features, parts.ram.clone());
        unit.add_follower(routes.clone());
        let connected = Self {
            name: parts.name,
            mmio: parts.mmio,
            unit,
            polling: OnceLock::new(),
            ats,
            ram: parts.ram,
            function,
            own,
            messages: parts.messages,
            routes,
            waiting: Mutex::default(),
            more,
            wakes,
        };
        connected.unit.mirror_msi(connected.function.msi());
        Ok(Arc::new(connected))
    }

    /// What the operator calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether functions may ask it for translations and keep them.
    #[must_use]
    pub const fn offers_ats(&self) -> bool {
        self.ats
    }

    /// The last address that the guest's tables can map.
    #[must_use]
    pub const fn last_address(&self) -> u64 {
        self.unit.last_address()
    }

    /// Have `follower` hear of every invalidation. For as long as the unit lives.
    pub fn add_follower(&self, follower: Arc<dyn Follower>) {
        self.unit.add_follower(follower);
    }

    /// From now on `window` shows heads, tails and Status.
    pub fn show_registers(&self, window: Box<dyn RegisterWindow>) {
        self.unit.show_registers(window);
    }

    /// What it did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.unit.counts()
    }

    /// Its registers as the guest would read them, and what it did so far, in one line.
    #[must_use]
    pub fn state(&self) -> String {
        const SHOWN: [(&str, Reg); 16] = [
            ("control", Reg::Control),
            ("status", Reg::Status),
            ("device table", Reg::DeviceTableBase),
            ("commands", Reg::CommandBase),
            ("head", Reg::CommandHead),
            ("tail", Reg::CommandTail),
            ("events", Reg::EventBase),
            ("head", Reg::EventHead),
            ("tail", Reg::EventTail),
            ("page requests", Reg::PprBase),
            ("head", Reg::PprHead),
            ("tail", Reg::PprTail),
            ("x2APIC event", Reg::XtEvent),
            ("exclusion", Reg::ExclusionBase),
            ("EFR", Reg::Efr),
            ("EFR2", Reg::Efr2),
        ];
        self.catch_up();
        let registers = SHOWN.map(|(name, reg)| format!("{name} {:#x}", self.unit.register(reg)));
        let Counts {
            doorbells,
            polled,
            commands,
            batches,
            stops,
            hits,
            walks,
            events,
            faults,
        } = self.counts();
        let sum = |counts: &[u64]| counts.iter().sum::<u64>();
        format!(
            "{}; {doorbells} doorbells, {polled} of them polled, {} commands in {batches} batches, {stops} stops, {hits} translations \
             from the cache, {walks} by a walk, {} events, {} page faults among them",
            registers.join(", "),
            sum(&commands),
            sum(&events),
            sum(&faults)
        )
    }

    /// Everything but the PCI function as after power-on. No processor runs, and no device: its requests
    /// would reach memory untranslated.
    pub fn reset(&self) {
        if let Some(polling) = self.polling.get() {
            polling.reset();
        }
        self.unit.reset();
        // Nothing waits any more.
        self.forget_guests();
        let _ = self.more.read();
    }

    /// Carry out commands that a processor was not held up with, and send messages that were signalled while the unit blocks
    /// them. Called when [`AsRawFd`] is readable.
    pub fn run_commands(&self) {
        self.send_blocked();
        // Somebody else may have been faster.
        let _ = self.more.read();
        let mut effects = self.unit.run_commands();
        effects.join(self.run_a_guests_commands());
        self.perform(effects);
    }

    /// See to it that every doorbell the guest rang until now has arrived.
    pub fn catch_up(&self) {
        if let Some(polling) = self.polling.get() {
            polling.catch_up();
        }
    }

    /// Do what an access or a request set off. The caller is not in flight.
    fn perform(&self, effects: Effects) {
        if let Some(msi) = effects.program_msi {
            self.function.program_msi(msi);
        }
        let interrupts = [effects.interrupts.event, effects.interrupts.ppr];
        interrupts
            .into_iter()
            .flatten()
            .for_each(|interrupt| self.interrupt(interrupt));
        let more_of_guests = effects.guests && self.perform_for_guests();
        if effects.more_commands || more_of_guests {
            self.more
                .write(1)
                .expect("one more on an eventfd that is read long before it overflows");
        }
    }

    /// Send an interrupt of the unit itself, which nothing remaps.
    fn interrupt(&self, interrupt: Interrupt) {
        match interrupt {
            Interrupt::Msi { number } => self.function.endpoint().signal(number.into()),
            Interrupt::X2apic {
                destination,
                logical,
                vector,
                arbitrated,
            } => {
                let mode = if arbitrated { data::ARBITRATED } else { 0 };
                let message = MsiMessage::remapped(destination, logical, u32::from(vector) | mode);
                self.messages.signal(&self.own, message);
            }
        }
    }
}

impl UnitOwner for EmulatedUnit {
    type Memory = GuestRam;

    fn unit(&self) -> &Unit<GuestRam> {
        &self.unit
    }

    fn perform(&self, effects: Effects) {
        self.perform(effects);
    }
}

impl Polled for EmulatedUnit {
    fn name(&self) -> &str {
        &self.name
    }

    fn registers(&self) -> GpaRange {
        self.mmio
    }

    fn polling(&self) -> &OnceLock<Polling> {
        &self.polling
    }

    fn late_doorbell(&self, offset: u64, data: &[u8]) -> bool {
        self.unit.late_doorbell(offset, data).more_commands
    }

    fn run_late_commands(&self) -> bool {
        let mut effects = self.unit.run_commands();
        let left = std::mem::take(&mut effects.more_commands);
        self.perform(effects);
        left
    }

    fn run_commands(&self) {
        self.run_commands();
    }
}

impl Views for EmulatedUnit {
    fn view(&self, device: Bdf) -> View {
        self.unit.view(device)
    }

    fn absent(&self, device: Bdf, address: Iova, access: Access) {
        let effects = self.unit.absent_in_copy(device, address, access);
        self.perform(effects);
    }

    fn blocked(&self, device: Bdf) {
        let effects = self.unit.entry_not_obeyed(device);
        self.perform(effects);
    }

    fn settle_soon(&self) {
        // The event loop does that with commands, of which there may be none.
        self.perform(Effects {
            more_commands: true,
            ..Effects::default()
        });
    }
}

impl AsRawFd for EmulatedUnit {
    fn as_raw_fd(&self) -> RawFd {
        self.wakes.descriptor()
    }
}

impl BusDevice for EmulatedUnit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.catch_up();
        self.unit.mmio_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.catch_up();
        let effects = self.unit.mmio_write(offset, data);
        self.perform(effects);
        if let Some(polling) = self.polling.get() {
            polling.written(offset, Instant::now());
        }
    }
}

impl Function for EmulatedUnit {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, dword: u16) -> u32 {
        self.function.endpoint().config_read(dword)
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let effect = self.function.endpoint().config_write(dword, write);
        if effect.contains(ConfigEffect::INTERRUPTS) {
            self.unit.mirror_msi(self.function.msi());
        }
        effect
    }

    fn requester(&self) -> &Arc<Requester> {
        self.function.endpoint().requester()
    }

    fn bars(&self) -> &[BarSpec] {
        self.function.endpoint().bars()
    }

    fn command(&self) -> Command {
        self.function.endpoint().command()
    }

    /// The configuration registers alone: while devices run, the unit must not stop confining them.
    fn reset(&self) {
        self.function.endpoint().reset();
        self.unit.mirror_msi(self.function.msi());
    }
}

/// Requests go by the number of the moment; messages that the kernel carries have to be followed.
impl Observer for EmulatedUnit {
    fn renumbered(&self) {
        self.routes.renumbered();
    }
}

impl Translator for EmulatedUnit {
    fn begin(&self) -> Box<dyn Translations + '_> {
        Box::new(Passing::begin(self))
    }
}

#[cfg(test)]
mod tests;
