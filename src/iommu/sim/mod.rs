//! Mode `sim`: a host's IOMMU in software, and the part of a host's kernel that has it serve a guest.
//!
//! The unit is the one of mode `emulated`, with the vIOMMU extension on; nobody but the host in here drives it, by
//! registers, tables and commands. What it offers outside is what the kernel offers for the real thing ([`ViommuHost`]),
//! so that whoever asks sees no difference. Nothing of a guest's numbers is the host's: devices, domains and the guest
//! itself have others here, so that what translates them is really used.
//!
//! | of the host's | number |
//! |---|---|
//! | the unit's own function | 00:00.2 |
//! | devices | c0:00.0 and on, each a device of its own |
//! | translate device | 48:00.0 |
//! | the guest | 1 |
//! | domains | 1 private address space, 2 nest parent, 3 blocked, from 256 on the guest's |
//!
//! Guest RAM is at its own addresses, and what the host needs for itself lies at 64 TiB.
//!
//! # Who waits for whom
//!
//! As in mode `emulated`: COMPLETION_WAIT waits for requests in flight, the guest's on the thread that rings its doorbell
//! and the host's on the one that asks for something. Neither is in flight. Whatever an access sets off is carried out
//! once no lock is held.

mod function;
mod kernel;
mod memory;
mod objects;
mod page;
mod tables;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::agent::TranslationAgent;
use super::amd::agent::UnitOwner;
use super::amd::counters::Counts;
use super::amd::features::{Features, Wanted};
use super::amd::processor::Follower;
use super::amd::spec::command::Opcode;
use super::amd::spec::dte::Dte;
use super::amd::spec::event::Record;
use super::amd::spec::viommu::{
    CommandControl, ControlReg, EventControl, InsertGuestEvent, MapControl, MiscControl, PprControl,
    ResetVmmio,
};
use super::amd::viommu::{FIRST_VECTOR, GuestInterrupt, GuestLog};
use super::amd::window::RegisterWindow;
use super::amd::{Effects, Unit};
use super::viommu::host::{
    HardwareErrors, HostDevice, HostFeatures, InterruptTarget, ObjectId, Queue, QueueKind, UnitInterrupt,
    VfPage, Viommu, ViommuHost,
};
use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::dma::{Requester, Translator};
use crate::platform::host::HostError;
use crate::platform::lock::lock;
use crate::platform::memory::GuestRam;
use crate::platform::msi::{MsiMessage, MsiSink};

use function::{Function, Told};
use kernel::{GUEST, Kernel, OWN_FUNCTION, TRANSLATE_DEVICE, control_guest, read_events};
use objects::{BLOCKED, Object, Objects, PARENT, guest_part, nested_entry, refuse};
use page::Page;

pub use memory::SimMemory;

/// The first device; further ones are one device number apart.
const FIRST_DEVICE: u16 = 0xc000;
/// Device numbers from there on.
const MOST_DEVICES: usize = 0x4000 / 8;

/// What a host is made of.
pub struct SimParts {
    /// What the operator calls the unit that it serves.
    pub name: String,
    /// Where the guest has that unit's function: as it, the unit's interrupts are sent.
    pub at: Sbdf,
    /// The guest's RAM.
    pub ram: GuestRam,
    /// How many functions the unit serves, at most 2,048.
    pub devices: usize,
    /// The functions have translation services, and the host has switched ATS on for each: its driver does so where device
    /// and unit have it, and no guest has a say in that.
    pub ats: bool,
    /// Where the unit's interrupts go, which nothing remaps.
    pub messages: Arc<dyn MsiSink>,
}

/// A host with one unit that serves one guest.
pub struct SimHost {
    name: String,
    me: Weak<Self>,
    memory: SimMemory,
    unit: Unit<SimMemory>,
    state: Mutex<State>,
    /// The guest's unit, or [`NOBODY`].
    viommu: AtomicU32,
    interrupts: Mutex<Interrupts>,
    /// Held by who reads the event log.
    log: Mutex<()>,
    /// What that told about the guest, and nobody took yet.
    errors: Mutex<HardwareErrors>,
    own: Arc<Requester>,
    messages: Arc<dyn MsiSink>,
    /// Readable while commands of the guest's wait that no processor is to be held up with, or errors are to be taken.
    more: EventFd,
    /// Devices have translation services.
    ats: bool,
}

/// No guest has a unit.
const NOBODY: u32 = 0;

/// What requests of the front end change.
struct State {
    kernel: Kernel,
    objects: Objects,
}

/// Which interrupts of the guest's unit are due that went nowhere yet.
#[derive(Clone, Copy, Default)]
struct Interrupts {
    event: bool,
    ppr: bool,
}

/// What the host calls a device.
fn function(device: HostDevice) -> Bdf {
    let number = u16::try_from(device.0 * 8).expect("fewer devices than there are numbers");
    Bdf::from_requester_id(FIRST_DEVICE + number)
}

/// What the host's unit offers its kernel.
fn offer(ats: bool) -> Features {
    Features::offer(Wanted {
        pasid_bits: 16,
        ats,
        virtualizable: true,
        ..Wanted::DEFAULT
    })
}

/// What every such unit has.
#[must_use]
pub fn features() -> HostFeatures {
    let Features { efr, efr2, .. } = offer(false);
    HostFeatures {
        efr: efr.into_bits(),
        efr2: efr2.into_bits(),
    }
}

impl SimHost {
    /// A host made of `parts`, whose devices reach nothing yet.
    ///
    /// # Errors
    /// When the host, the real one, has no memory or no eventfd for it, guest RAM reaches 64 TiB, or there are more
    /// devices than numbers for them.
    pub fn new(parts: SimParts) -> Result<Arc<Self>, HostError> {
        let SimParts {
            name,
            at,
            ram,
            devices,
            ats,
            messages,
        } = parts;
        let refused = |source| HostError::new(format!("model the host's unit behind {name}"), source);
        if devices > MOST_DEVICES {
            return Err(refused(refuse::exhausted()));
        }
        let more = EventFd::new(EFD_NONBLOCK).map_err(refused)?;
        let memory = SimMemory::new(&name, ram)?;
        let unit = Unit::new(OWN_FUNCTION, offer(ats), memory.clone());
        let functions = (0..devices).map(|device| function(HostDevice(device)));
        let kernel = Kernel::start(&unit, &memory, ats, functions).map_err(refused)?;
        let own = Arc::new(Requester::new(at));
        own.set_bus_master(true);
        Ok(Arc::new_cyclic(|me| Self {
            name,
            me: me.clone(),
            memory,
            unit,
            state: Mutex::new(State {
                kernel,
                objects: Objects::new(devices),
            }),
            viommu: AtomicU32::new(NOBODY),
            interrupts: Mutex::default(),
            log: Mutex::default(),
            errors: Mutex::default(),
            own,
            messages,
            more,
            ats,
        }))
    }

    /// What stands between memory and `device`, whose requests arrive here by whatever number the guest has for it.
    #[must_use]
    pub fn translator(self: &Arc<Self>, device: HostDevice) -> Arc<dyn Translator> {
        Arc::new(Function {
            host: self.clone(),
            function: function(device),
        })
    }

    /// Whom `device` asks for translations and pages, where devices have such services.
    #[must_use]
    pub fn agent(self: &Arc<Self>, device: HostDevice) -> Option<Arc<dyn TranslationAgent>> {
        self.ats.then(|| -> Arc<dyn TranslationAgent> {
            Arc::new(Function {
                host: self.clone(),
                function: function(device),
            })
        })
    }

    /// Have `follower` hear of commands that go to `device`, invalidations of what it keeps and responses to its page
    /// requests, by the number that `requester` has in the guest. For as long as the host lives.
    pub fn add_follower(&self, device: HostDevice, requester: Arc<Requester>, follower: Arc<dyn Follower>) {
        self.unit.add_follower(Arc::new(Told {
            function: function(device),
            requester,
            follower,
        }));
    }

    /// From now on `window` shows heads, tails and Status of the guest's unit. There is one at most; another is ignored.
    pub fn show_registers(&self, window: Box<dyn RegisterWindow>) {
        self.unit.show_guest_registers(GUEST, window);
    }

    /// What the guest had the unit do so far; translations are all the unit's.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let Counts { hits, walks, .. } = self.unit.counts();
        Counts {
            hits,
            walks,
            ..self.unit.guests_counts()
        }
    }

    /// What the host's own log was told so far: all that went wrong by the host's tables or by what serves the guest.
    #[must_use]
    pub fn host_counts(&self) -> Counts {
        self.unit.counts()
    }

    /// The guest's page, to what devices are attached, and what happened so far, in one line.
    #[must_use]
    pub fn state(&self) -> String {
        const SHOWN: [(&str, u64); 7] = [
            ("commands head", 0x00),
            ("tail", 0x08),
            ("events head", 0x10),
            ("tail", 0x18),
            ("status", 0x20),
            ("page requests head", 0x30),
            ("tail", 0x38),
        ];
        let page = SHOWN.map(|(name, at)| {
            let mut data = [0; 8];
            self.unit.vf_read(GUEST, at, &mut data);
            format!("{name} {:#x}", u64::from_le_bytes(data))
        });
        let state = lock(&self.state);
        let attached = state.objects.attached.iter().map(|table| match *table {
            PARENT => "guest memory".to_owned(),
            BLOCKED => "nothing".to_owned(),
            ObjectId(id) => format!("tables {id}"),
        });
        let attached = attached.collect::<Vec<_>>().join(", ");
        drop(state);
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
            "{}; devices reach {attached}; {doorbells} doorbells, {polled} of them polled, {} commands in {batches} batches, {stops} \
             stops, {hits} translations from the cache, {walks} by a walk, {} events, {} page faults among them, {} of the host's",
            page.join(", "),
            sum(&commands),
            sum(&events),
            sum(&faults),
            sum(&self.host_counts().events)
        )
    }

    /// Carry out commands of the guest's that a processor was not held up with. Called when [`AsRawFd`] is readable;
    /// whoever uses the unit hears of errors then.
    pub fn run_commands(&self) {
        // Somebody else may have been faster.
        let _ = self.more.read();
        let effects = self.unit.run_guest_commands(GUEST);
        UnitOwner::perform(self, effects);
    }

    /// The guest wrote `data` at `offset` of its page a while ago. Whether commands wait because of it.
    #[must_use]
    pub fn late_doorbell(&self, offset: u64, data: &[u8]) -> bool {
        self.unit.vf_late_doorbell(GUEST, offset, data)
    }

    /// Carry out commands that late doorbells announced, a bounded number. Whether some are left.
    #[must_use]
    pub fn run_late_commands(&self) -> bool {
        self.settle(self.unit.run_guest_commands(GUEST))
    }

    /// The machine is reset: nothing that was due is remembered. Objects stay, and whoever made them destroys or resets
    /// them. No processor runs, and no device.
    pub fn reset(&self) {
        let _ = self.more.read();
        let _forgotten = self.unit.take_owed();
        let _forgotten = self.take_errors();
        let mut interrupts = lock(&self.interrupts);
        *interrupts = Interrupts::default();
    }

    /// Do `f` with everything the front end changes, and then what that set off.
    fn request<T>(&self, f: impl FnOnce(&mut State, &mut Effects) -> io::Result<T>) -> io::Result<T> {
        let mut effects = Effects::default();
        let outcome = f(&mut lock(&self.state), &mut effects);
        UnitOwner::perform(self, effects);
        outcome
    }

    /// Write a register of the unit that controls the guest.
    fn control(&self, reg: ControlReg, value: u64) -> Effects {
        control_guest(&self.unit, reg, value)
    }

    /// Have the event loop look.
    fn wake(&self) {
        self.more
            .write(1)
            .expect("one more on an eventfd that is read long before it overflows");
    }

    /// Have interrupts of the guest's unit become due, and send those that the host's table sends anywhere. What that
    /// sets off is the caller's to carry out.
    fn interrupt(&self, change: impl FnOnce(&mut Interrupts)) -> Effects {
        let mut interrupts = lock(&self.interrupts);
        change(&mut interrupts);
        let Interrupts { event, ppr } = &mut *interrupts;
        let (mut effects, mut messages) = (Effects::default(), Vec::new());
        for (due, log) in [(event, GuestLog::Event), (ppr, GuestLog::Ppr)] {
            if !*due {
                continue;
            }
            let (sent, owed) = self.unit.remap_guest_interrupt(GUEST, log);
            effects.join(owed);
            *due = sent.is_none();
            // The host names no virtual APIC.
            if let Some(GuestInterrupt::Message(delivery)) = sent {
                messages.push(MsiMessage::remapped(
                    delivery.destination,
                    delivery.logical,
                    delivery.vector.into(),
                ));
            }
        }
        drop(interrupts);
        for message in messages {
            self.messages.signal(&self.own, message);
        }
        effects
    }

    /// Read the host's log as long as it interrupts, and keep what it says of hardware.
    fn heed_log(&self, mut effects: Effects) -> Effects {
        while effects.interrupts.event.take().is_some() {
            let mut errors = HardwareErrors::default();
            {
                let _one_reader = lock(&self.log);
                effects.join(read_events(&self.unit, &self.memory, &self.name, &mut errors));
            }
            if errors != HardwareErrors::default() {
                lock(&self.errors).join(errors);
                self.wake();
            }
        }
        effects
    }
}

impl UnitOwner for SimHost {
    type Memory = SimMemory;

    fn unit(&self) -> &Unit<SimMemory> {
        &self.unit
    }

    fn perform(&self, effects: Effects) {
        if self.settle(effects) {
            self.wake();
        }
    }
}

impl SimHost {
    /// Do what `effects` say. Whether commands of the guest's are left.
    fn settle(&self, effects: Effects) -> bool {
        let effects = self.heed_log(effects);
        if !effects.guests {
            return false;
        }
        let Some(owed) = self.unit.take_owed().remove(&GUEST) else {
            return false;
        };
        let told = self.interrupt(|interrupts| {
            interrupts.event |= owed.event;
            interrupts.ppr |= owed.ppr;
        });
        let _of_the_host_only = self.heed_log(told);
        owed.more_commands
    }
}

impl ViommuHost for SimHost {
    fn features(&self) -> io::Result<HostFeatures> {
        Ok(features())
    }

    fn parent(&self) -> ObjectId {
        PARENT
    }

    fn blocked(&self) -> ObjectId {
        BLOCKED
    }

    fn viommu_alloc(&self) -> io::Result<Viommu> {
        self.request(|State { kernel, objects }, effects| {
            if objects.all().any(|object| object == Object::Viommu) {
                return Err(refuse::busy());
            }
            Kernel::clear_maps(&self.memory);
            let reset = ResetVmmio::new()
                .with_guest(GUEST)
                .with_commands(true)
                .with_opcode(Opcode::RESET_VMMIO.0);
            effects.join(kernel.submit(&self.unit, &self.memory, &[reset.into_bits()]));
            let parent = kernel.parent();
            effects.join(kernel.set_entry(&self.unit, &self.memory, TRANSLATE_DEVICE, &parent));
            let misc = MiscControl::new().with_translate_device(TRANSLATE_DEVICE.requester_id());
            effects.join(self.control(ControlReg::Misc, misc.into_bits()));
            let id = objects.add(Object::Viommu);
            self.viommu.store(id.0, Ordering::Release);
            let page = VfPage::Trapped(Arc::new(Page::new(self.me.clone(), id)));
            Ok(Viommu { id, page })
        })
    }

    fn vdevice_alloc(&self, viommu: ObjectId, device: HostDevice, guest: Bdf) -> io::Result<ObjectId> {
        self.request(|State { objects, .. }, effects| {
            objects.viommu(viommu)?;
            objects.check_name(device, guest)?;
            let map = MapControl::new()
                .with_valid(true)
                .with_guest(guest.requester_id())
                .with_host(function(device).requester_id());
            effects.join(self.control(ControlReg::DeviceMap, map.with_write(true).into_bits()));
            Ok(objects.add(Object::Vdevice { device, name: guest }))
        })
    }

    fn nested_alloc(&self, viommu: ObjectId, device: HostDevice, dte: &Dte) -> io::Result<ObjectId> {
        self.request(|State { objects, .. }, effects| {
            objects.viommu(viommu)?;
            objects.device(device)?;
            let part = guest_part(dte)?;
            let name = part.guest.domain();
            let (domain, new) = objects.enter_domain(name)?;
            if new {
                let map = MapControl::new()
                    .with_valid(true)
                    .with_guest(name)
                    .with_host(domain);
                effects.join(self.control(ControlReg::DomainMap, map.with_write(true).into_bits()));
            }
            Ok(objects.add(Object::Nested { dte: part, domain }))
        })
    }

    fn attach(&self, device: HostDevice, table: ObjectId) -> io::Result<()> {
        self.request(|State { kernel, objects }, effects| {
            objects.device(device)?;
            let (entry, flushed) = match table {
                PARENT => (kernel.passing(), None),
                BLOCKED => (kernel.blocked(), None),
                _ => {
                    let Object::Nested { dte, domain } = objects.get(table)? else {
                        return Err(refuse::invalid());
                    };
                    let name = objects.name(device).ok_or_else(refuse::invalid)?;
                    (nested_entry(&kernel.passing(), &dte, domain, name), Some(domain))
                }
            };
            effects.join(kernel.set_entry(&self.unit, &self.memory, function(device), &entry));
            if let Some(domain) = flushed {
                // Another table may have been in the domain before.
                effects.join(kernel.forget(&self.unit, &self.memory, domain));
            }
            objects.attached[device.0] = table;
            Ok(())
        })
    }

    fn queue_alloc(&self, viommu: ObjectId, queue: &Queue) -> io::Result<ObjectId> {
        self.request(|State { objects, .. }, effects| {
            objects.viommu(viommu)?;
            objects.check_queue(queue)?;
            let frame = queue.base.0 >> 12;
            let (length, interrupts) = (queue.length, queue.interrupts);
            effects.join(match queue.kind {
                QueueKind::Command => {
                    let control = CommandControl::new()
                        .with_frame(frame)
                        .with_length(length)
                        .with_interrupt(interrupts)
                        .with_enable(true);
                    self.control(ControlReg::Command, control.into_bits())
                }
                QueueKind::Event => {
                    let control = EventControl::new()
                        .with_frame(frame)
                        .with_length(length)
                        .with_interrupt(interrupts)
                        .with_enable(true);
                    self.control(ControlReg::Event, control.into_bits())
                }
                QueueKind::Ppr => {
                    let control = PprControl::new()
                        .with_frame(frame)
                        .with_length(length)
                        .with_interrupt(interrupts)
                        .with_requests(true)
                        .with_enable(true);
                    self.control(ControlReg::Ppr, control.into_bits())
                }
            });
            Ok(objects.add(Object::Queue(queue.kind)))
        })
    }

    fn route(
        &self,
        viommu: ObjectId,
        interrupt: UnitInterrupt,
        target: Option<InterruptTarget>,
    ) -> io::Result<()> {
        let log = match interrupt {
            UnitInterrupt::Event => GuestLog::Event,
            UnitInterrupt::Ppr => GuestLog::Ppr,
        };
        self.request(|State { kernel, objects }, effects| {
            objects.viommu(viommu)?;
            if target.is_some_and(|target| target.vector < FIRST_VECTOR) {
                return Err(refuse::invalid());
            }
            effects.join(kernel.route(&self.unit, &self.memory, log, target));
            effects.join(self.interrupt(|_what_is_due| {}));
            Ok(())
        })
    }

    /// A record's second dword has no room in the command for a domain or the lower bits of a PASID: a record with any
    /// is refused as invalid.
    fn insert_event(&self, viommu: ObjectId, record: [u32; 4]) -> io::Result<()> {
        self.request(|State { kernel, objects }, effects| {
            objects.viommu(viommu)?;
            let bits = record
                .iter()
                .rev()
                .fold(0, |bits, dword| bits << 32 | u128::from(*dword));
            let record = Record::from_bits(bits);
            if record.domain() != 0 {
                return Err(refuse::invalid());
            }
            let [_, _, _, _, _, _, b6, b7, ..] = bits.to_le_bytes();
            let insert = InsertGuestEvent::new()
                .with_guest(GUEST)
                .with_device(record.device())
                .with_pasid_19_16(record.pasid_19_16())
                .with_flags(u16::from_le_bytes([b6, b7]) & 0xfff)
                .with_code(record.code())
                .with_address(record.address())
                .with_opcode(Opcode::INSERT_GUEST_EVENT.0);
            effects.join(kernel.submit(&self.unit, &self.memory, &[insert.into_bits()]));
            Ok(())
        })
    }

    fn reset_page(&self, viommu: ObjectId) -> io::Result<()> {
        self.request(|State { kernel, objects }, effects| {
            objects.viommu(viommu)?;
            let reset = ResetVmmio::new()
                .with_guest(GUEST)
                .with_commands(true)
                .with_opcode(Opcode::RESET_VMMIO.0);
            effects.join(kernel.submit(&self.unit, &self.memory, &[reset.into_bits()]));
            Ok(())
        })
    }

    fn take_errors(&self) -> HardwareErrors {
        std::mem::take(&mut *lock(&self.errors))
    }

    fn destroy(&self, id: ObjectId) -> io::Result<()> {
        self.request(|State { kernel, objects }, effects| {
            match objects.remove(id)? {
                Object::Queue(QueueKind::Command) => effects.join(self.control(ControlReg::Command, 0)),
                Object::Queue(QueueKind::Event) => effects.join(self.control(ControlReg::Event, 0)),
                Object::Queue(QueueKind::Ppr) => effects.join(self.control(ControlReg::Ppr, 0)),
                Object::Vdevice { name, .. } => {
                    let map = MapControl::new().with_guest(name.requester_id());
                    effects.join(self.control(ControlReg::DeviceMap, map.with_write(true).into_bits()));
                }
                Object::Nested { dte, domain } => {
                    let name = dte.guest.domain();
                    if objects.leave_domain(name) {
                        let map = MapControl::new().with_guest(name);
                        effects.join(self.control(ControlReg::DomainMap, map.with_write(true).into_bits()));
                        effects.join(kernel.forget(&self.unit, &self.memory, domain));
                    }
                }
                Object::Viommu => {
                    self.viommu.store(NOBODY, Ordering::Release);
                    *lock(&self.interrupts) = Interrupts::default();
                    for log in [GuestLog::Event, GuestLog::Ppr] {
                        effects.join(kernel.route(&self.unit, &self.memory, log, None));
                    }
                    *lock(&self.errors) = HardwareErrors::default();
                    effects.join(self.control(ControlReg::Misc, 0));
                    let nothing = kernel.blocked();
                    effects.join(kernel.set_entry(&self.unit, &self.memory, TRANSLATE_DEVICE, &nothing));
                }
            }
            Ok(())
        })
    }
}

impl AsRawFd for SimHost {
    fn as_raw_fd(&self) -> RawFd {
        self.more.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
