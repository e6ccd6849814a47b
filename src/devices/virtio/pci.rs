//! virtio over PCI: a device's registers, interrupts and doorbells as a PCI function.
//!
//! Virtual I/O Device 1.2, 4.1 (Virtio Over PCI Bus), without the legacy interface. One BAR holds all:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | notifications, 4 bytes per queue |
//! | 0x4000 | MSI-X table, and behind it the pending bits |
//!
//! A driver's notification is an eventfd signal inside KVM, an interrupt one of a worker to KVM: while queues
//! run, neither passes through here.
//!
//! Lock order: the device's life, then its common configuration, then what [`Endpoint`] has. Workers take only
//! the endpoint's, so that a reset may wait for them with the first one held.

mod lines;
mod window;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{LARGEST_QUEUE, VirtQueue};
use super::registers::{Effect, Registers};
use super::worker::{ServedQueue, Workers};
use super::{Activation, Features, Interrupts, Kind, VirtioDevice};
use crate::guest_warn;
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::capability::{Express, MsixLayout, PowerManagement, VendorSpecific};
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::{BarKind, Identity, Pin};
use crate::pci::{Command, ConfigEffect, Function};
use crate::platform::addr::Gpa;
use crate::platform::dma::{Dma, Requester};
use crate::platform::doorbell::{Doorbell, DoorbellHost};
use crate::platform::host::HostError;
use crate::platform::irq::IrqLine;
use crate::platform::msi::MsiPort;
use lines::Lines;
use window::Window;

/// Most queues a device may have; each has a vector, and the configuration one more.
pub const MOST_QUEUES: usize = 255;

/// The one BAR of every virtio function.
pub const BAR: BarSpec = BarSpec {
    index: 0,
    kind: BarKind::Mem64 { prefetchable: true },
    size: 0x8000,
};

/// Offset and length of each structure in the BAR.
const COMMON: (u64, u64) = (0x0000, super::registers::LEN);
const ISR: (u64, u64) = (0x1000, 1);
const DEVICE: (u64, u64) = (0x2000, 0x1000);
const NOTIFY: (u64, u64) = (0x3000, 0x400);
const MSIX_TABLE: u32 = 0x4000;

/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

/// Structure types of the capabilities (4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;

/// The identification registers of a virtio function (4.1.2).
#[must_use]
pub const fn identity(kind: Kind) -> Identity {
    let class = match kind {
        // Ethernet controller.
        Kind::Net => 0x02_0000,
        // SCSI storage controller, as other VMMs have it for disks.
        Kind::Block => 0x01_0000,
        // Communication controller, other.
        Kind::Console => 0x07_8000,
        // Unclassified.
        Kind::Rng => 0x00_ff00,
    };
    Identity {
        vendor: 0x1af4,
        device: 0x1040 + kind.id(),
        class,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x0040 + kind.id(),
    }
}

/// What the machine gives a virtio function.
pub struct VirtioPciParts {
    /// The way to guest memory. Its requester is the port's.
    pub dma: Dma,
    /// The way out for messages, and whose they are.
    pub msi: MsiPort,
    /// What turns notifications into eventfd signals.
    pub doorbells: Arc<dyn DoorbellHost>,
    /// The wire, if there is one.
    pub intx: Option<(Pin, IrqLine)>,
    /// On a root complex's first bus, not behind a port.
    pub on_root_bus: bool,
    /// Behind an IOMMU: drivers must use the addresses the platform gives them.
    pub access_platform: bool,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    endpoint: Arc<Endpoint>,
    dma: Dma,
    doorbells: Arc<dyn DoorbellHost>,
    /// Per queue: signalled by the driver.
    kicks: Vec<Arc<EventFd>>,
    attached: Mutex<Vec<Box<dyn Doorbell>>>,
    lines: Arc<Lines>,
    life: Mutex<Life>,
    registers: Mutex<Registers>,
    /// The dword of configuration space behind which the BAR shows (4.1.4.9), and where in the BAR.
    window: u16,
}

/// The threads, and what may keep them waiting.
#[derive(Default)]
struct Life {
    /// There while the driver runs.
    workers: Option<Workers>,
    /// The machine is paused.
    paused: bool,
    /// Requests get anywhere. A driver may put the function to sleep with its queues running; the threads wait
    /// then, as a queue out of reach would count as broken.
    bus_master: bool,
}

impl Life {
    /// Let the threads work or wait, whatever holds at present. When they shall wait, none works any more on return.
    fn settle(&self) {
        if let Some(workers) = &self.workers {
            if self.bus_master && !self.paused {
                workers.resume();
            } else {
                workers.pause();
            }
        }
    }
}

impl VirtioPci {
    /// `device` as a function made of `parts`.
    pub fn new(device: Arc<dyn VirtioDevice>, parts: VirtioPciParts) -> Result<Arc<Self>, HostError> {
        let sizes = device.queue_sizes();
        let possible = |size: &u16| size.is_power_of_two() && *size <= LARGEST_QUEUE;
        if sizes.len() > MOST_QUEUES || !sizes.iter().all(possible) {
            return Err(HostError::new(
                format!(
                    "give virtio device {} {} queues of {:?} entries; at most {MOST_QUEUES} queues are \
                     possible, and powers of two up to {LARGEST_QUEUE} entries",
                    device.name(),
                    sizes.len(),
                    sizes.first()
                ),
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new))
            .collect::<io::Result<Vec<_>>>();
        let kicks = kicks.map_err(|error| {
            HostError::new(
                format!("make doorbells of virtio device {}", device.name()),
                error,
            )
        })?;
        let queues = u16::try_from(sizes.len()).expect("at most MOST_QUEUES");
        let vectors = queues + 1;
        let mut config = ConfigSpace::endpoint(&identity(device.kind())).bar(BAR);
        for capability in structures() {
            let _offset = config.push_capability(Box::new(capability));
        }
        let window = config.push_capability(Box::new(Window::default())) / 4 + Window::DATA;
        let config = config
            .capability(PowerManagement::new())
            .capability(Express::endpoint(parts.on_root_bus));
        let requester = parts.msi.requester().clone();
        let mut endpoint = Endpoint::new(config, requester)
            .with_msix(MsixLayout::new(BAR.index, MSIX_TABLE, vectors), parts.msi);
        if let Some((pin, line)) = parts.intx {
            endpoint = endpoint.with_intx(pin, line);
        }
        let mut features =
            device.features() | Features::INDIRECT_DESC | Features::EVENT_IDX | Features::VERSION_1;
        features.set(Features::ACCESS_PLATFORM, parts.access_platform);
        let registers = Registers::new(features, sizes, vectors);
        let endpoint = Arc::new(endpoint);
        Ok(Arc::new(Self {
            lines: Arc::new(Lines::new(endpoint.clone(), queues)),
            device,
            endpoint,
            dma: parts.dma,
            doorbells: parts.doorbells,
            kicks,
            attached: Mutex::default(),
            life: Mutex::default(),
            registers: Mutex::new(registers),
            window,
        }))
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a write to the common configuration sets off.
    fn perform(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Reset | Effect::Activate => self.settle(),
            Effect::CheckFeatures(chosen) => {
                if self.device.accepts(chosen) {
                    self.registers().accept_features(chosen);
                }
            }
            Effect::ConfigVector(vector) => self.lines.config_vector.store(vector, Ordering::Release),
            Effect::QueueVector { queue, vector } => {
                if let Some(slot) = self.lines.queue_vectors.get(usize::from(queue)) {
                    slot.store(vector, Ordering::Release);
                }
            }
        }
    }

    /// Make the threads agree with the registers, whatever several processors wrote meanwhile.
    fn settle(&self) {
        let mut life = self.life();
        if self.registers().resetting() {
            self.stop(&mut life);
            self.registers().finish_reset();
        }
        let (running, features, layouts) = {
            let registers = self.registers();
            (registers.running(), registers.features(), registers.layouts())
        };
        if running && life.workers.is_none() {
            match self.start(features, layouts) {
                Ok(workers) => {
                    life.workers = Some(workers);
                    life.settle();
                }
                Err(error) => {
                    tracing::error!(
                        device = self.device.name(),
                        error = &error as &dyn std::error::Error,
                        "the device cannot start"
                    );
                    // The failed start leaves no thread; the driver resets before it tries again.
                    life.workers = Some(Workers::none());
                    self.lines.needs_reset();
                }
            }
        }
    }

    /// Stop the threads and forget everything about the driver but its registers.
    fn stop(&self, life: &mut Life) {
        if life.workers.take().is_some() {
            self.device.reset();
        }
        self.lines.reset();
        for kick in &self.kicks {
            // Kicks of the driver that is gone.
            let _none_left = kick.read();
        }
    }

    /// The threads for a driver that wants queues at `layouts`; they wait to be let go.
    fn start(
        &self,
        features: Features,
        layouts: Vec<Option<super::queue::QueueLayout>>,
    ) -> Result<Workers, HostError> {
        let interrupts: Arc<dyn Interrupts> = self.lines.clone();
        let event_idx = features.contains(Features::EVENT_IDX);
        let mut queues = Vec::with_capacity(layouts.len());
        for ((index, layout), kick) in (0..).zip(layouts).zip(&self.kicks) {
            let queue = match layout.map(|layout| VirtQueue::new(layout, event_idx)).transpose() {
                Ok(queue) => queue,
                Err(broken) => {
                    guest_warn!(
                        device = self.device.name(),
                        "the device asks for a reset: {broken}"
                    );
                    self.lines.needs_reset();
                    return Ok(Workers::none());
                }
            };
            queues.push(queue.map(|queue| ServedQueue::new(index, queue, kick.clone(), interrupts.clone())));
        }
        let units = self.device.activate(Activation {
            features,
            queues,
            interrupts: interrupts.clone(),
        })?;
        Workers::start(units, &self.dma, &interrupts)
    }

    /// A guest read in the BAR.
    fn read(&self, offset: u64, data: &mut [u8]) {
        if self.endpoint.bar_read(BAR.index, offset, data) {
            return;
        }
        data.fill(0);
        if let Some(at) = within(offset, COMMON) {
            let live = self.lines.live();
            self.registers().read(at, data, live);
        } else if within(offset, ISR).is_some() {
            data[0] = self.lines.take_isr();
        } else if let Some(at) = within(offset, DEVICE) {
            self.device.read_config(at, data);
        }
    }

    /// A guest write in the BAR.
    fn write(&self, offset: u64, data: &[u8]) {
        if self.endpoint.bar_write(BAR.index, offset, data) {
            return;
        }
        if let Some(at) = within(offset, COMMON) {
            let effect = self.registers().write(at, data);
            self.perform(effect);
        } else if let Some(at) = within(offset, DEVICE) {
            self.device.write_config(at, data);
        } else if let Some(at) = within(offset, NOTIFY) {
            // Only where KVM does not take it: no doorbell is attached, or the access came by the window.
            let queue = usize::try_from(at / u64::from(NOTIFY_MULTIPLIER)).expect("inside the structure");
            if let Some(kick) = self.kicks.get(queue)
                && let Err(error) = kick.write(1)
            {
                tracing::debug!(queue, %error, "kicks are pending already");
            }
        }
    }

    /// Where the window of configuration space points: offset and length in the BAR.
    fn window(&self) -> Option<(u64, usize)> {
        let config = self.endpoint.config();
        config.capabilities().get::<Window>().and_then(Window::target)
    }
}

/// How far `offset` is inside a structure.
fn within(offset: u64, (start, len): (u64, u64)) -> Option<u64> {
    offset.checked_sub(start).filter(|at| *at < len)
}

impl Function for VirtioPci {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn config_read(&self, dword: u16) -> u32 {
        if dword == self.window
            && let Some((offset, len)) = self.window()
        {
            let mut data = [0; 4];
            self.read(offset, &mut data[..len]);
            return u32::from_le_bytes(data);
        }
        self.endpoint.config_read(dword)
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        if dword == self.window {
            // All bytes the window is wide, or none: a register is not written in parts.
            if let Some((offset, len)) = self.window()
                && let lanes = u32::MAX >> (32 - 8 * len)
                && write.mask() & lanes == lanes
            {
                self.write(offset, &write.value().to_le_bytes()[..len]);
            }
            return ConfigEffect::empty();
        }
        self.endpoint.config_write(dword, write)
    }

    fn requester(&self) -> &Arc<Requester> {
        self.endpoint.requester()
    }

    fn bars(&self) -> &[BarSpec] {
        self.endpoint.bars()
    }

    fn command(&self) -> Command {
        self.endpoint.command()
    }

    fn bus_mastering(&self, allowed: bool) {
        let mut life = self.life();
        if life.bus_master != allowed {
            life.bus_master = allowed;
            life.settle();
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if bar == BAR.index {
            self.read(offset, data);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == BAR.index {
            self.write(offset, data);
        }
    }

    fn bar_moved(&self, bar: u8, at: Option<Gpa>) {
        if bar != BAR.index {
            return;
        }
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        // The old ones first: the same eventfd at two addresses is two doorbells.
        attached.clear();
        let Some(first) = at.and_then(|at| at.checked_add(NOTIFY.0)) else {
            return;
        };
        for (queue, kick) in (0..).zip(&self.kicks) {
            let Some(at) = first.checked_add(u64::from(NOTIFY_MULTIPLIER) * queue) else {
                return;
            };
            match self.doorbells.attach(at, kick) {
                Ok(doorbell) => attached.push(doorbell),
                Err(error) => {
                    guest_warn!(
                        device = self.device.name(),
                        "notifications of queue {queue} cost an exit each: {error}: {}",
                        error.source
                    );
                    return;
                }
            }
        }
    }

    fn pause(&self) {
        let mut life = self.life();
        life.paused = true;
        life.settle();
    }

    fn resume(&self) {
        let mut life = self.life();
        life.paused = false;
        life.settle();
    }

    fn reset(&self) {
        let mut life = self.life();
        self.stop(&mut life);
        self.registers().finish_reset();
        self.endpoint.reset();
    }
}

/// The capabilities that say where each structure is (4.1.4).
fn structures() -> [VendorSpecific; 4] {
    let body = |kind: u8, (offset, len): (u64, u64), more: &[u8]| {
        let [offset, len] = [offset, len].map(|value| u32::try_from(value).expect("inside the BAR"));
        let mut body = vec![kind, BAR.index, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(more);
        VendorSpecific::new(&body)
    };
    [
        body(CFG_COMMON, COMMON, &[]),
        body(CFG_NOTIFY, NOTIFY, &NOTIFY_MULTIPLIER.to_le_bytes()),
        body(CFG_ISR, ISR, &[]),
        body(CFG_DEVICE, DEVICE, &[]),
    ]
}

#[cfg(test)]
mod tests;
