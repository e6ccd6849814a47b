//! What a host does for a vIOMMU, by the requests its kernel takes.
//!
//! One [`ViommuHost`] stands for one unit of the host that serves one unit of the guest. Two answer: the kernel, with
//! the unit's hardware behind it, and the model of that hardware with a driver of its own. Whoever asks knows neither.
//!
//! Objects form a tree, as iommufd has them: everything here hangs on the nest parent, which maps guest physical memory
//! and exists for as long as the host; queues, nested tables and vDevices hang on the vIOMMU and go before it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::amd::spec::event::Record;
use crate::platform::addr::{Bdf, Gpa};
use crate::platform::bus::BusDevice;
use crate::platform::device_memory::DeviceMemory;

/// An object of the host's, by the number it gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

/// A function of the host's that the unit serves: its place in the list with which the host was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostDevice(pub usize);

/// What the host's unit has, raw: Extended Feature and Extended Feature 2 (publication 48882, sections 3.4.8 and 3.4.60).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFeatures {
    /// MMIO 0030h.
    pub efr: u64,
    /// MMIO 01A0h.
    pub efr2: u64,
}

/// A ring of the guest's that the host's unit works on itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QueueKind {
    /// The command buffer.
    Command,
    /// The event log.
    Event,
    /// The log of page requests.
    Ppr,
}

/// A ring as the guest set it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Which.
    pub kind: QueueKind,
    /// Its first byte, a multiple of 4 KiB.
    pub base: Gpa,
    /// Logarithm of the number of its 16-byte entries, 8 to 15.
    pub length: u8,
    /// It interrupts: ComWaitIntEn, EventIntEn or PprIntEn.
    pub interrupts: bool,
}

/// Which interrupt of the unit's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnitInterrupt {
    /// Of the event log, and of COMPLETION_WAIT.
    Event,
    /// Of the log of page requests.
    Ppr,
}

/// Where an interrupt of the unit goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterruptTarget {
    /// APIC ID, or a logical destination.
    pub destination: u32,
    /// Logical rather than physical.
    pub logical: bool,
    /// Not 0.
    pub vector: u8,
}

/// Page 3 of a unit's registers: heads, tails, Status.
#[derive(Clone)]
pub enum VfPage {
    /// Memory of the host's unit, 4 KiB, which the guest reaches without an exit.
    Mapped(Arc<DeviceMemory>),
    /// What answers to accesses in the page, by their offset there (0 to 0FFFh).
    Trapped(Arc<dyn BusDevice>),
}

/// What a vIOMMU is, once made.
#[derive(Clone)]
pub struct Viommu {
    /// The object.
    pub id: ObjectId,
    /// Its guest's page 3.
    pub page: VfPage,
}

/// What the host tells about a guest's unit: records that its own log would have had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEvent {
    /// One of them.
    Record(Record),
    /// So many are missing between the one before and the one behind: nobody took them in time.
    Lost(u32),
    /// What is no event, and why; what came behind it went with it.
    Garbage(String),
}

/// Where the host puts what it tells about a guest's unit.
pub trait HostEvents: AsFd + Send + Sync {
    /// Take what has come, in its order: all that the host keeps at a time, which are some hundred, and nothing where
    /// nothing has. Does not wait. The descriptor is readable while there is more.
    ///
    /// # Errors
    /// The host's reason.
    fn take(&self) -> io::Result<Vec<HostEvent>>;
}

/// What went wrong in the host's unit while it served the guest's, and that no request was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardwareErrors {
    /// Records lost because the guest's event log or PPR log could not be written (GUEST_EVENT_FAULT).
    pub lost_records: u64,
    /// What serves the guest could not be read or written (VIOMMU_HARDWARE_ERROR); and where, as the unit's first record
    /// of it said.
    pub broken_at: Option<u64>,
}

impl HardwareErrors {
    /// Add what happened later.
    pub fn join(&mut self, later: Self) {
        self.lost_records = self.lost_records.saturating_add(later.lost_records);
        self.broken_at = self.broken_at.or(later.broken_at);
    }
}

/// A unit of the host's that can serve a unit of the guest's.
///
/// Errors are the host's reasons (errno). A request that failed changed nothing.
pub trait ViommuHost: Send + Sync {
    /// What the unit has.
    fn features(&self) -> io::Result<HostFeatures>;

    /// The nest parent: devices attached to it reach guest physical memory untranslated.
    fn parent(&self) -> ObjectId;

    /// Tables that map nothing, to which a device is attached that is to reach nothing.
    fn blocked(&self) -> ObjectId;

    /// Make the guest's unit. There is one at a time.
    fn viommu_alloc(&self) -> io::Result<Viommu>;

    /// Let commands and events of the guest name `device` by `guest`. Once for each device, each with another name.
    fn vdevice_alloc(&self, viommu: ObjectId, device: HostDevice, guest: Bdf) -> io::Result<ObjectId>;

    /// Tables for `device`, as the guest's `dte` says: its GCR3 root, of guest physical addresses, over the nest parent. Valid,
    /// without host tables (Mode 0); of the rest only the domain and what concerns v2 tables counts.
    fn nested_alloc(&self, viommu: ObjectId, device: HostDevice, dte: &Dte) -> io::Result<ObjectId>;

    /// Requests of `device` pass `table` from here on: the nest parent, the blocked one or a nested one. Replaces what it
    /// was attached to. For nested ones the device has its vDevice, and keeps it as long as it is attached there.
    fn attach(&self, device: HostDevice, table: ObjectId) -> io::Result<()>;

    /// Have the unit work on a ring of the guest's, from the head and tail in page 3 on. One of each kind at a time.
    fn queue_alloc(&self, viommu: ObjectId, queue: &Queue) -> io::Result<ObjectId>;

    /// Send an interrupt of the unit to `target`; nowhere, which is also so at first, for `None`. `Unsupported` where the
    /// host has no such request.
    fn route(
        &self,
        viommu: ObjectId,
        interrupt: UnitInterrupt,
        target: Option<InterruptTarget>,
    ) -> io::Result<()>;

    /// Append a record to the guest's event log as the unit would (INSERT_GUEST_EVENT). `Unsupported` where the host has
    /// no such request.
    fn insert_event(&self, viommu: ObjectId, record: [u32; 4]) -> io::Result<()>;

    /// Put heads, tails and Status of page 3 back to 0 (RESET_VMMIO). `Unsupported` where the host has no such request.
    fn reset_page(&self, viommu: ObjectId) -> io::Result<()>;

    /// Have the host tell what happens to the guest's unit and is not in the guest's own log. Once at a time; the number
    /// can be destroyed after the reader is gone, and is before the vIOMMU. `Unsupported` where the host has no such request.
    fn events_alloc(&self, viommu: ObjectId) -> io::Result<(ObjectId, Box<dyn HostEvents>)> {
        let _ = viommu;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What went wrong since the last call. A host that is told of none, as by default, has none.
    fn take_errors(&self) -> HardwareErrors {
        HardwareErrors::default()
    }

    /// Destroy what was made here and what nothing uses any more.
    fn destroy(&self, id: ObjectId) -> io::Result<()>;
}
