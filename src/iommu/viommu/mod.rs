//! Modes `hw` and `sim`: a unit of the guest's that a unit of the host's serves.
//!
//! The guest finds the unit it finds in mode `emulated`. Its rings and its tables are worked on by the host's unit
//! itself, by the seam [`host::ViommuHost`]; what is left to do is here:
//!
//! ```text
//! MMIO page 1          registers, kept here; what they say is brought to the host       [this file]
//! MMIO page 3          heads, tails, Status: the host's own page, mapped or forwarded
//! rings                a queue of the host's exactly while they are on                  [rings]
//! unit's interrupts    sent where registers or the MSI capability say                   [interrupts]
//! device table         entries of functions behind the unit, as they change: attached   [following, intent]
//! host's events         what it tells of the unit: told to the operator, or the unit stops  [hearing]
//! ```
//!
//! # Following the device table
//!
//! The host never reads the guest's table. While the unit is on, the pages that hold entries of its functions are watched
//! ([`WriteProtection`]): a store there is followed before the processor that made it goes on, whatever the entry then
//! says, half-written or not; hardware may read it at any time, too. What stood there before is taken over when the
//! watch begins. Stores of devices to the table are not noticed, until something else has the entry read again.
//!
//! A function is never without confinement: it passes from guest tables to others by one request, and what the host
//! refuses, or the guest's entry asks for in vain, leaves it blocked.
//!
//! # Locks, and who waits for whom
//!
//! Two, taken in this order where both are: the host's side (`service`), held across requests to the host; the registers,
//! held for a look or a change only. Reads of registers and everything about page 3 pass without the first.
//!
//! Watching other pages stops all other processors until their exits are over, and those may want either lock, for a
//! store to a watched page or a register. So none is held across it. Who is at it says so (`rewatching`); another
//! processor that changes registers meanwhile leaves what follows from that to it, and goes on. It is brought before
//! that one's access is over. Only a guest whose processors write one unit's registers at the same time sees this.
//!
//! Nothing the host is asked under the lock may wait for a processor of the guest.

pub mod features;
pub mod host;
#[cfg(any(test, fuzzing))]
pub mod testing;

mod asking;
mod counters;
mod following;
mod hearing;
mod intent;
mod interrupts;
mod rings;
mod service;
#[cfg(test)]
mod tests;

pub use counters::Counts;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use super::amd::features::Features;
use super::amd::registers::{Effect, Registers};
use super::amd::spec::registers::Reg;
use super::function::UnitFunction;
use super::polling::Polling;
use crate::guest_warn;
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::topology::Observer;
use crate::pci::{Command, ConfigEffect, Function};
use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::device_memory::DeviceMemory;
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::lanes::{LaneWrite, read_lanes};
use crate::platform::memory::GuestRam;
use crate::platform::msi::{MsiMessage, MsiPort, MsiRoute, MsiSink};
use crate::platform::protection::{Watcher, WriteProtection};

use asking::Asking;
use counters::{Count, Counters};
use following::Followed;
use hearing::Ear;
use host::{HardwareErrors, HostDevice, VfPage, Viommu, ViommuHost};
use interrupts::MsiState;
use service::{Said, Service, Table, entry};

/// What a served unit is made of.
pub struct ServedParts {
    /// What the operator calls it.
    pub name: String,
    /// Where its PCI function is.
    pub at: Sbdf,
    /// Its registers: 16 KiB at a multiple of that.
    pub mmio: GpaRange,
    /// What it offers: [`features::offer`], the same for all units of a guest.
    pub features: Features,
    /// The memory its device table is in.
    pub ram: GuestRam,
    /// The unit of the host's.
    pub host: Arc<dyn ViommuHost>,
    /// What notices stores to the device table.
    pub protection: Arc<dyn WriteProtection>,
    /// The functions behind it: as whom the guest knows each at present, and as whom the host does.
    pub functions: Vec<(Arc<Requester>, HostDevice)>,
}

/// A unit in a machine that the host serves.
///
/// Whoever maps its page 3 for the guest takes that away before the unit is dropped.
pub struct ServedUnit {
    name: String,
    mmio: GpaRange,
    /// Set where the host is in this process and a thread polls its doorbell.
    polling: OnceLock<Polling>,
    features: Features,
    ram: GuestRam,
    registers: Mutex<Registers>,
    function: UnitFunction,
    /// `None` only while this is dropped.
    page: Option<VfPage>,
    /// Where the host tells of the unit, if it does; `None` also while this is dropped.
    ear: Option<Ear>,
    requesters: Vec<Arc<Requester>>,
    asking: Asking,
    service: Mutex<Service>,
    protection: Arc<dyn WriteProtection>,
    me: Weak<dyn Watcher>,
}

/// Where an access goes.
enum At {
    /// To a register, or a gap between registers, of page 1.
    Register,
    /// To page 3, so many bytes in.
    Running(u64),
    /// Nowhere: pages 2 and 4, and what no register takes.
    Nowhere,
}

impl At {
    /// An access of `len` bytes at `offset`. Registers take powers of two up to 8 that are aligned to themselves; so none
    /// lies in two pages.
    fn of(offset: u64, len: usize) -> Self {
        let len = len as u64;
        if !matches!(len, 1 | 2 | 4 | 8) || !offset.is_multiple_of(len) {
            return Self::Nowhere;
        }
        match offset / PAGE_SIZE {
            0 => Self::Register,
            2 => Self::Running(offset % PAGE_SIZE),
            _ => Self::Nowhere,
        }
    }
}

/// The way out for messages of a unit whose interrupts the host sends: nothing leaves here.
struct NoWay;

impl MsiSink for NoWay {
    fn signal(&self, _requester: &Requester, _message: MsiMessage) {}

    fn route(&self, _requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        Err(HostError::new(
            "route an interrupt of a served unit",
            io::ErrorKind::Unsupported,
        ))
    }
}

impl ServedUnit {
    /// A unit made of `parts`, as after power-on: off, its functions attached to guest physical memory.
    ///
    /// # Errors
    /// When the host makes no vIOMMU, attaches a function to no memory, or has event queues and gives none. Nothing is left of
    /// it then.
    pub fn new(parts: ServedParts) -> Result<Arc<Self>, HostError> {
        let name = &parts.name;
        let Viommu { id, page } = parts
            .host
            .viommu_alloc()
            .map_err(|source| HostError::new(format!("make the vIOMMU {name} of the host"), source))?;
        for (requester, device) in &parts.functions {
            if let Err(source) = parts.host.attach(*device, parts.host.parent()) {
                let at = requester.sbdf();
                drop(page);
                // The error at hand is the one that counts.
                let _ = parts.host.destroy(id);
                return Err(HostError::new(
                    format!("attach {at} behind {name} to guest memory"),
                    source,
                ));
            }
        }
        let ear = match parts.host.events_alloc(id) {
            Ok((object, reader)) => Some(Ear::new(object, reader)),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => None,
            Err(source) => {
                drop(page);
                // The error at hand is the one that counts.
                let _ = parts.host.destroy(id);
                let action = format!("have the host tell what goes wrong with {name}");
                return Err(HostError::new(action, source));
            }
        };
        let own = MsiPort::new(Arc::new(Requester::new(parts.at)), Arc::new(NoWay));
        let requesters = parts.functions.iter().map(|(requester, _)| requester.clone());
        let requesters = requesters.collect();
        let functions = parts.functions.into_iter();
        let functions = functions.map(|(requester, device)| Followed::new(requester, device));
        let service = Service::new(functions.collect());
        let function = UnitFunction::new(&parts.features, parts.mmio, parts.at, own);
        let mut registers = Registers::new(parts.features);
        registers.mirror_msi(function.msi());
        Ok(Arc::new_cyclic(|me: &Weak<Self>| Self {
            registers: Mutex::new(registers),
            mmio: parts.mmio,
            polling: OnceLock::new(),
            features: parts.features,
            ram: parts.ram,
            function,
            page: Some(page),
            ear,
            requesters,
            asking: Asking {
                name: parts.name.clone(),
                host: parts.host,
                viommu: id,
                counters: Counters::default(),
            },
            service: Mutex::new(service),
            protection: parts.protection,
            me: me.clone() as Weak<dyn Watcher>,
            name: parts.name,
        }))
    }

    /// What the operator calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Page 3 where it is memory of the host's unit, to be put 2000h bytes after the first register. `None` where
    /// accesses to it come here.
    #[must_use]
    pub fn page(&self) -> Option<&Arc<DeviceMemory>> {
        match &self.page {
            Some(VfPage::Mapped(memory)) => Some(memory),
            _ => None,
        }
    }

    /// Its registers.
    #[must_use]
    pub const fn mmio(&self) -> GpaRange {
        self.mmio
    }

    /// Where it has what it takes for its doorbell to be polled. Only of units whose page 3 answers accesses.
    #[must_use]
    pub const fn polling(&self) -> &OnceLock<Polling> {
        &self.polling
    }

    /// See to it that every doorbell the guest rang until now has arrived.
    pub fn catch_up(&self) {
        if let Some(polling) = self.polling.get() {
            polling.catch_up();
        }
    }

    /// What it asked of its host so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.asking.counters.counts()
    }

    /// Registers, what functions reach, and what was asked of the host, in one line.
    #[must_use]
    pub fn state(&self) -> String {
        const SHOWN: [(&str, Reg); 8] = [
            ("control", Reg::Control),
            ("device table", Reg::DeviceTableBase),
            ("commands", Reg::CommandBase),
            ("events", Reg::EventBase),
            ("page requests", Reg::PprBase),
            ("x2APIC event", Reg::XtEvent),
            ("x2APIC PPR", Reg::XtPpr),
            ("EFR", Reg::Efr),
        ];
        self.catch_up();
        let registers = {
            let registers = self.registers();
            SHOWN.map(|(name, reg)| format!("{name} {:#x}", registers.read(reg)))
        };
        let service = self.service().state();
        let deaf = if self.ear.as_ref().is_some_and(Ear::is_deaf) {
            "; the host's event queue is NOT READ any more"
        } else {
            ""
        };
        format!("{}; {service}{deaf}; {}", registers.join(", "), self.counts())
    }

    /// Everything but the PCI function as after power-on. No processor runs: functions reach guest memory untranslated.
    pub fn reset(&self) {
        if let Some(polling) = self.polling.get() {
            polling.reset();
        }
        self.registers().reset();
        self.serve();
        // Where that is not supported, the driver clears them itself.
        let _ = self.asking.put_page_back();
    }

    /// The host says that something went wrong: hear what, and do what follows. Called by whoever it says that to, without
    /// a lock. Without this the next write to a register finds out.
    pub fn hear_errors(&self) {
        let mut service = self.service();
        // Taken under the lock: what the guest switches off meanwhile is switched off after this is heard.
        let errors = self.errors();
        service.hear(errors, &self.asking);
        drop(service);
        // Lost records are counted, and change nothing.
        if errors.broken_at.is_some() {
            self.serve();
        }
    }

    /// Readable while the host has something to tell of the unit, where it tells anything: [`Self::host_told`] is to be
    /// called then. Open as long as the unit is.
    #[must_use]
    pub fn host_events(&self) -> Option<BorrowedFd<'_>> {
        self.ear.as_ref().map(Ear::descriptor)
    }

    /// [`Self::host_events`] is readable, or, `ended`, never will be again: hear what the host tells, as much as it keeps at
    /// a time, and do what follows. Whether to wait for it any longer: what cannot be read or understood for some time is not
    /// worth it. Called without a lock.
    #[must_use]
    pub fn host_told(&self, ended: bool) -> bool {
        self.hear_errors();
        let ear = self.ear.as_ref();
        ear.is_some_and(|ear| ear.is_worth_waiting(ended, &self.asking))
    }

    /// What went wrong in the host's unit since the last call.
    fn errors(&self) -> HardwareErrors {
        let mut errors = self.asking.host.take_errors();
        if let Some(ear) = &self.ear {
            errors.join(ear.listen(&self.asking));
        }
        errors
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn service(&self) -> MutexGuard<'_, Service> {
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> Table<'_> {
        Table {
            ram: &self.ram,
            features: &self.features,
        }
    }

    fn msi(&self) -> MsiState {
        MsiState {
            message: self.function.msi(),
            masked: self.function.msi_is_masked(),
        }
    }

    /// What the guest has the host do at present.
    fn said(&self) -> Said {
        let msi = self.msi();
        let registers = self.registers();
        Said {
            configuration: registers.configuration(),
            rings: rings::wanted(&registers),
            routes: interrupts::wanted(&registers, &msi),
        }
    }

    /// Bring the host to what the guest says by now. No lock is held.
    fn serve(&self) {
        let mut service = self.service();
        if !service.rewatching {
            // What could not be watched is tried again.
            service.unwatchable = None;
        }
        loop {
            // Before the registers are looked at: what switched the unit off came later.
            service.hear(self.errors(), &self.asking);
            let said = self.said();
            service.bring(&said, &self.table(), &self.asking);
            let wanted: BTreeSet<Gpa> = self
                .requesters
                .iter()
                .filter_map(|requester| self.table().page(&said.configuration, requester.sbdf().bdf))
                .collect();
            let settled = service.watched == wanted || service.unwatchable.as_ref() == Some(&wanted);
            if service.rewatching || settled {
                return;
            }
            service.rewatching = true;
            drop(service);
            let answer = self.protection.watch(&self.me, &wanted);
            service = self.service();
            service.rewatching = false;
            match answer {
                Ok(()) => {
                    self.asking.counters.add(Count::Watches);
                    service.watched = wanted;
                    service.unwatchable = None;
                }
                Err(error) => {
                    self.asking.counters.add(Count::Refusals);
                    guest_warn!(iommu = self.name, %error, reason = %error.source, "stores to a device table are not noticed; functions with entries there are blocked");
                    service.unwatchable = Some(wanted);
                }
            }
        }
    }

    /// Bring what the MSI capability says. A configuration access changes nothing else.
    fn serve_interrupts(&self) {
        self.registers().mirror_msi(self.function.msi());
        let mut service = self.service();
        let routes = self.said().routes;
        service.bring_routes(&routes, &self.asking);
    }

    fn write_register(&self, offset: u64, data: &[u8]) {
        let (reg, within) = (Reg::at(offset & !7), offset & 7);
        let within = usize::try_from(within).expect("less than 8");
        let Some((reg, lanes)) = reg.zip(LaneWrite::new(within, data)) else {
            return;
        };
        let mut registers = self.registers();
        match reg {
            // No request of a function passes here that could be excluded.
            Reg::ExclusionBase | Reg::ExclusionLimit => return,
            // A kernel that finds a ring of its predecessor's on may move it as it is.
            Reg::CommandBase | Reg::EventBase | Reg::PprBase => registers.move_ring(reg, lanes),
            _ => {
                let lanes = match reg {
                    Reg::Control => lanes.only(features::control_writable(&self.features).into_bits()),
                    _ => lanes,
                };
                let effect = registers.write(reg, lanes);
                if let Effect::ProgramMsi(msi) = effect {
                    self.function.program_msi(msi);
                }
            }
        }
        drop(registers);
        self.serve();
    }
}

/// Names that commands and events use are made anew, and the entries of the new numbers are watched and obeyed from here on.
/// The host makes nothing any more for a function that left.
impl Observer for ServedUnit {
    fn renumbered(&self) {
        // Commands of the time before are about the names of then.
        self.catch_up();
        self.serve();
    }

    fn left(&self, requester: &Arc<Requester>) {
        self.service().leave(requester, &self.asking);
    }
}

impl Watcher for ServedUnit {
    fn written(&self, range: GpaRange) {
        let hit = |entry: Option<GpaRange>| entry.is_some_and(|entry| entry.overlaps(range));
        let configuration = self.registers().configuration();
        let owned = self
            .requesters
            .iter()
            .any(|requester| hit(entry(&configuration, requester.sbdf().bdf)));
        if !owned {
            self.asking.counters.add(Count::StrangeStores);
            return;
        }
        self.asking.counters.add(Count::Stores);
        let mut service = self.service();
        // Registers may have changed while others were at it.
        let configuration = self.registers().configuration();
        service.follow(&configuration, &self.table(), &self.asking, hit);
    }
}

impl BusDevice for ServedUnit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.catch_up();
        data.fill(0);
        match At::of(offset, data.len()) {
            At::Register => {
                let value = Reg::at(offset & !7).map_or(0, |reg| self.registers().read(reg));
                let within = usize::try_from(offset & 7).expect("less than 8");
                read_lanes(value, within, data);
            }
            At::Running(offset) => {
                if let Some(VfPage::Trapped(device)) = &self.page {
                    device.read(offset, data);
                }
            }
            At::Nowhere => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.catch_up();
        match At::of(offset, data.len()) {
            At::Register => self.write_register(offset, data),
            At::Running(offset) => {
                if let Some(VfPage::Trapped(device)) = &self.page {
                    device.write(offset, data);
                }
            }
            At::Nowhere => {}
        }
        if let Some(polling) = self.polling.get() {
            polling.written(offset, Instant::now());
        }
    }
}

impl Function for ServedUnit {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, dword: u16) -> u32 {
        self.function.endpoint().config_read(dword)
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let effect = self.function.endpoint().config_write(dword, write);
        if effect.contains(ConfigEffect::INTERRUPTS) {
            self.serve_interrupts();
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
        self.serve_interrupts();
    }
}

impl Drop for ServedUnit {
    fn drop(&mut self) {
        self.page = None;
        // Nobody may read it when it goes.
        let events = self.ear.take().map(|ear| ear.object);
        let service = self.service.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !service.watched.is_empty()
            && let Err(error) = self.protection.watch(&self.me, &BTreeSet::new())
        {
            tracing::warn!(iommu = self.name, %error, reason = %error.source, "pages of a device table stay watched");
        }
        service.end(events, &self.asking);
    }
}
