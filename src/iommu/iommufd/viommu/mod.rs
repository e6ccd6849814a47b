//! Mode `hw`: a unit of the host's that serves a unit of the guest's, by AMD's requests to /dev/iommu.
//!
//! Objects of the kernel's, each hanging on the one it is indented under:
//!
//! ```text
//! address space with guest RAM, the caller's
//!   nest parent
//!     vIOMMU, with the VF page mapped
//!       HW queues, nested tables, vDevices, an event queue
//! empty address space
//!   tables that map nothing
//! ```
//!
//! A stock kernel takes the request for a vIOMMU of any type and does nothing about it. So success proves nothing: the
//! offset of the VF page must have been written, and HW queues must be known.

mod events;
mod requests;
mod rings;
#[cfg(any(test, fuzzing))]
pub mod testing;
mod trial;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::abi::{Abi, Rings};
use super::kernel::{Fields, Kernel};
use super::{Attach, abi};
use crate::iommu::amd::spec::dte::{Dte, Guest, Host, Interrupt};
use crate::iommu::amd::spec::registers::Control;
use crate::iommu::viommu::features::missing;
use crate::iommu::viommu::host::{
    HostDevice, HostEvents, HostFeatures, InterruptTarget, ObjectId, Queue, QueueKind, UnitInterrupt, VfPage,
    Viommu, ViommuHost,
};
use crate::platform::addr::{Bdf, PAGE_SIZE};
use crate::platform::device_memory::DeviceMemory;
use crate::platform::host::HostError;

use events::EventQueue;
pub use requests::NestParent;
use requests::{Made, Route, refusal};
use rings::Working;
pub use trial::{Answer, PAGE_OFFSET, Step, Trial, Tried, VIOMMU_ALLOC, Version};

/// A function of the host's behind the unit.
pub struct HwDevice {
    /// The number of its binding to /dev/iommu.
    pub id: u32,
    /// What attaches it to tables.
    pub function: Arc<dyn Attach>,
}

/// Names of functions that some versions of the interface ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Functions {
    /// The host's IOMMU.
    pub host_iommu: Bdf,
    /// The guest's.
    pub guest_iommu: Bdf,
    /// One that the host does not have: in its device table entry are the tables for the guest's rings.
    pub translate_device: Bdf,
}

/// Where interrupts of the unit's go: a guest of KVM's.
pub trait Processors: Send + Sync {
    /// The VM.
    fn vm(&self) -> BorrowedFd<'_>;

    /// The number of the vCPU that a target names, if it names one.
    fn vcpu(&self, target: InterruptTarget) -> Option<u32>;
}

/// What a host is made of.
pub struct HwParts {
    /// What the operator calls the unit that it serves.
    pub name: String,
    /// Who is asked.
    pub kernel: Arc<dyn Kernel>,
    /// Guest memory.
    pub parent: Arc<NestParent>,
    /// All behind the same unit, at least one; attached to nothing.
    pub devices: Vec<HwDevice>,
    /// Versions that the kernel may have, the likeliest first; the first that it answers to counts.
    pub abis: Vec<Abi>,
    /// For versions that ask.
    pub functions: Functions,
    /// For versions that ask, and for interrupts.
    pub processors: Option<Arc<dyn Processors>>,
}

/// A unit of the host's that serves a unit of the guest's.
///
/// Dropping it destroys what was made here; whoever has the VF page or reads events gives that back before, and devices
/// are attached to nothing then.
pub struct HwHost {
    name: String,
    kernel: Arc<dyn Kernel>,
    devices: Vec<HwDevice>,
    abi: Abi,
    functions: Functions,
    processors: Option<Arc<dyn Processors>>,
    features: HostFeatures,
    state: Mutex<State>,
    // In the order in which they go.
    blocked: Made,
    _empty: Made,
    parent: Arc<NestParent>,
}

struct State {
    made: BTreeMap<ObjectId, Object>,
    /// By device; `None` is nothing.
    attached: Vec<Option<ObjectId>>,
    /// What the kernel was told that the guest's Control is, where it is told registers.
    control: Control,
    /// The number that the unit has for the guest, where the kernel tells it.
    guest_id: u32,
}

/// What hangs on the vIOMMU, and itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Object {
    Viommu,
    Vdevice(HostDevice),
    Nested,
    /// A ring by an object of the kernel's, which goes by a number of ours: it is made anew to be switched off.
    Queue(Queue, Working),
    /// A ring for which there is no object but registers that were forwarded.
    Ring(QueueKind),
    Events,
}

/// What it means that no offset was written.
const NO_PAGE: &str =
    "; the host's kernel made a vIOMMU and told no VF page, as a stock kernel does for any type";

/// Status in the VF page: MMIO 2020h of the guest's unit.
const STATUS: usize = 0x20;

/// What it means that the page does not answer.
const NO_ANSWER: &str = "; the unit's BAR of VF pages is off, or somewhere else than its capability says: the firmware assigns \
                         and enables it";

fn errno<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl HwHost {
    /// A host made of `parts`; its devices reach nothing yet.
    ///
    /// # Errors
    /// What the host lacks or refused. Nothing is left of it then.
    pub fn new(parts: HwParts) -> Result<Arc<Self>, HostError> {
        let HwParts {
            name,
            kernel,
            parent,
            devices,
            abis,
            functions,
            processors,
        } = parts;
        let refused = |source| HostError::new(format!("have the host's IOMMU serve {name}"), source);
        let (Some(first), Some(abi)) = (devices.first(), abis.first().cloned()) else {
            return Err(refused(io::ErrorKind::InvalidInput.into()));
        };
        let features = requests::hw_info(&*kernel, first.id).map_err(&refused)?;
        for device in devices.iter().skip(1) {
            if requests::hw_info(&*kernel, device.id).map_err(&refused)? != features {
                return Err(refused(io::Error::other(
                    "its devices are behind different units",
                )));
            }
        }
        let missing = missing(features);
        if !missing.is_empty() {
            let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
            let reason = format!("the host's IOMMU lacks {}", missing.join(", "));
            return Err(refused(io::Error::new(io::ErrorKind::Unsupported, reason)));
        }
        let empty = requests::ioas_alloc(&*kernel).map_err(&refused)?;
        let empty = Made::new(&kernel, empty);
        let blocked = requests::paging_alloc(&*kernel, first.id, empty.id, false).map_err(&refused)?;
        let blocked = Made::new(&kernel, blocked);
        let mut host = Self {
            state: Mutex::new(State {
                made: BTreeMap::new(),
                attached: vec![None; devices.len()],
                control: Control::RESET,
                guest_id: 0,
            }),
            name,
            kernel,
            devices,
            abi,
            functions,
            processors,
            features,
            blocked,
            _empty: empty,
            parent,
        };
        let refused = |host: &Self, source| {
            HostError::new(format!("have the host's IOMMU serve {}", host.name), source)
        };
        for device in 0..host.devices.len() {
            let attached = host.attach(HostDevice(device), host.blocked());
            attached.map_err(|source| refused(&host, source))?;
        }
        if abis.len() > 1 {
            host.choose(abis).map_err(|source| refused(&host, source))?;
        }
        Ok(Arc::new(host))
    }

    /// The version of the interface that is used.
    #[must_use]
    pub fn abi(&self) -> &Abi {
        &self.abi
    }

    /// Take the first of `abis` that the kernel answers to.
    fn choose(&mut self, abis: Vec<Abi>) -> io::Result<()> {
        let mut reasons = Vec::new();
        for abi in abis {
            self.abi = abi;
            match self.viommu_alloc() {
                Ok(Viommu { id, page }) => {
                    drop(page);
                    return self.destroy(id);
                }
                // Structures of another length or with bits where another version has none.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Unsupported
                            | io::ErrorKind::InvalidInput
                            | io::ErrorKind::ArgumentListTooLong
                    ) =>
                {
                    reasons.push(format!("{}: {error}", self.abi.name));
                }
                Err(error) => return Err(error),
            }
        }
        let reason = format!(
            "no version of AMD's interface is the kernel's: {}",
            reasons.join("; ")
        );
        Err(io::Error::new(io::ErrorKind::Unsupported, reason))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self, device: HostDevice) -> io::Result<&HwDevice> {
        self.devices.get(device.0).map_or_else(|| errno(libc::ENOENT), Ok)
    }

    /// The device by which the kernel finds the unit, before the host can have taken any back.
    fn first(&self) -> u32 {
        self.devices.first().expect("a host has a device").id
    }

    /// Whether the kernel knows nothing of `device` any more.
    fn is_unbound(&self, device: HostDevice) -> bool {
        let told = self
            .device(device)
            .and_then(|device| requests::hw_info(&*self.kernel, device.id));
        told.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    fn user_data(&self) -> io::Result<Fields> {
        let vm = self
            .processors
            .as_ref()
            .map(|processors| processors.vm().as_raw_fd());
        user_data(&self.abi, &self.functions, vm)
    }

    /// Whether the vIOMMU that the kernel made is one: it told the `offset` of its page, and knows queues where it has
    /// any. The page is mapped then, and answers.
    fn prove(&self, id: u32, offset: u64) -> io::Result<VfPage> {
        if let Rings::Queues(queues) = &self.abi.rings {
            rings::probe(&*self.kernel, id, queues)?;
        }
        // The kernel keeps the first page free, so that an offset of 0 is none.
        if offset == 0 {
            return Err(refusal(
                "VIOMMU_ALLOC",
                io::ErrorKind::Unsupported.into(),
                NO_PAGE,
            ));
        }
        map_page(&*self.kernel, offset).map(VfPage::Mapped)
    }

    fn whose(&self, viommu: ObjectId, guest_id: u32) -> requests::Whose {
        requests::Whose {
            viommu: viommu.0,
            host_iommu: self.functions.host_iommu,
            guest_id,
        }
    }
}

/// The VF page that the kernel told the `offset` of, from which the unit answers.
fn map_page(kernel: &dyn Kernel, offset: u64) -> io::Result<Arc<DeviceMemory>> {
    const STEP: &str = "mmap of the VF page";
    let page = kernel.map(offset, PAGE_SIZE);
    let page = page.map_err(|reason| refusal(STEP, reason, ""))?;
    // Of Status most bits are reserved, and a read changes none: all of them are 1 only where nobody answers.
    if page.register(STATUS) == u32::MAX {
        let reason = io::Error::other("all ones where Status is");
        return Err(refusal(STEP, reason, NO_ANSWER));
    }
    Ok(page)
}

/// What goes with VIOMMU_ALLOC, by the table.
fn user_data(abi: &Abi, functions: &Functions, vm: Option<RawFd>) -> io::Result<Fields> {
    let abi::UserData {
        len,
        host_iommu,
        guest_iommu,
        translate_device,
        kvm,
        ..
    } = abi.user_data;
    let mut data = Fields::data(len as usize);
    for (at, function) in [
        (host_iommu, functions.host_iommu),
        (guest_iommu, functions.guest_iommu),
        (translate_device, functions.translate_device),
    ] {
        if let Some(at) = at {
            data = data.u32(at as usize, function.requester_id().into());
        }
    }
    if let Some(at) = kvm {
        let Some(vm) = vm else {
            return Err(refusal(
                "VIOMMU_ALLOC",
                io::ErrorKind::InvalidInput.into(),
                "; it takes a guest of KVM's",
            ));
        };
        data = data.u32(at as usize, u32::try_from(vm).map_err(io::Error::other)?);
    }
    Ok(data)
}

/// The error of a request that the kernel has, as a table says: it did not do it this time, and may another time.
fn known(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::Unsupported => io::Error::other(error),
        _ => error,
    }
}

impl State {
    fn viommu(&self, id: ObjectId) -> io::Result<()> {
        match self.made.get(&id) {
            Some(Object::Viommu) => Ok(()),
            Some(_) => errno(libc::EINVAL),
            None => errno(libc::ENOENT),
        }
    }

    /// Keep `object`, which the kernel calls `id`.
    fn keep(&mut self, id: u32, object: Object) -> ObjectId {
        self.made.insert(ObjectId(id), object);
        ObjectId(id)
    }

    fn has(&self, object: Object) -> bool {
        self.made.values().any(|made| *made == object)
    }

    /// The vIOMMU, which is there as long as anything hangs on it.
    fn whole(&self) -> ObjectId {
        let mut made = self.made.iter();
        let found = made.find(|(_, object)| **object == Object::Viommu);
        *found.expect("a ring goes before its vIOMMU").0
    }
}

/// What of an entry counts for nested tables, in the one form that every kernel takes.
fn canonical(dte: &Dte) -> io::Result<Dte> {
    let Dte {
        host,
        guest,
        interrupt,
        ..
    } = *dte;
    // Kernels take a root of 0 for no table, and translate nevertheless.
    let nested = host.v() && host.gv() && dte.gcr3_root() != 0;
    if !nested || host.mode() != 0 || host.root() != 0 {
        return errno(libc::EINVAL);
    }
    let kept = Dte {
        host: Host::new()
            .with_v(true)
            .with_tv(true)
            .with_ir(true)
            .with_iw(true)
            .with_gv(true)
            .with_ppr(host.ppr())
            .with_giov(host.giov())
            .with_glx(host.glx()),
        guest: Guest::new().with_domain(guest.domain()),
        interrupt: Interrupt::new().with_guest_paging_mode(interrupt.guest_paging_mode()),
        ..Dte::default()
    };
    Ok(kept.with_gcr3_root(dte.gcr3_root()))
}

impl ViommuHost for HwHost {
    fn features(&self) -> io::Result<HostFeatures> {
        Ok(self.features)
    }

    fn parent(&self) -> ObjectId {
        ObjectId(self.parent.id())
    }

    fn blocked(&self) -> ObjectId {
        ObjectId(self.blocked.id)
    }

    fn viommu_alloc(&self) -> io::Result<Viommu> {
        let mut state = self.state();
        if state.has(Object::Viommu) {
            return errno(libc::EBUSY);
        }
        let mut data = self.user_data()?;
        let parent = self.parent.id();
        let id = requests::viommu_alloc(
            &*self.kernel,
            self.abi.viommu_type,
            self.first(),
            parent,
            &mut data,
        )?;
        // Destroyed again unless it is one.
        let made = Made::new(&self.kernel, id);
        let at = self.abi.user_data.mmap_offset as usize;
        let page = self.prove(id, data.get_u64(at))?;
        state.control = Control::RESET;
        let guest_id = self.abi.user_data.guest_id;
        state.guest_id = guest_id.map_or(0, |at| data.get_u32(at as usize));
        let id = state.keep(made.keep(), Object::Viommu);
        Ok(Viommu { id, page })
    }

    fn vdevice_alloc(&self, viommu: ObjectId, device: HostDevice, guest: Bdf) -> io::Result<ObjectId> {
        let mut state = self.state();
        state.viommu(viommu)?;
        let of = self.device(device)?.id;
        let id = requests::vdevice_alloc(&*self.kernel, viommu.0, of, guest)?;
        Ok(state.keep(id, Object::Vdevice(device)))
    }

    fn nested_alloc(&self, viommu: ObjectId, device: HostDevice, dte: &Dte) -> io::Result<ObjectId> {
        let mut state = self.state();
        state.viommu(viommu)?;
        // Any device of the unit would do, but for those that the host has taken back.
        let of = self.device(device)?.id;
        let id = requests::nested_alloc(&*self.kernel, viommu.0, of, &canonical(dte)?)?;
        Ok(state.keep(id, Object::Nested))
    }

    fn attach(&self, device: HostDevice, table: ObjectId) -> io::Result<()> {
        let mut state = self.state();
        let HwDevice { function, .. } = self.device(device)?;
        if table != self.parent() && table != self.blocked() {
            match state.made.get(&table) {
                Some(Object::Nested) if state.has(Object::Vdevice(device)) => {}
                Some(_) => return errno(libc::EINVAL),
                None => return errno(libc::ENOENT),
            }
        }
        function
            .attach(table.0)
            .map_err(|reason| refusal("attach", reason, ""))?;
        if let Some(attached) = state.attached.get_mut(device.0) {
            *attached = Some(table);
        }
        Ok(())
    }

    fn queue_alloc(&self, viommu: ObjectId, queue: &Queue) -> io::Result<ObjectId> {
        let mut state = self.state();
        state.viommu(viommu)?;
        rings::check(queue)?;
        let id = rings::ring_id(queue.kind);
        if state.made.contains_key(&ObjectId(id)) {
            return errno(libc::EEXIST);
        }
        match &self.abi.rings {
            Rings::Queues(queues) => {
                let made =
                    requests::queue_alloc(&*self.kernel, viommu.0, &rings::as_hw_queue(queues, queue))?;
                Ok(state.keep(id, Object::Queue(*queue, Working::On(made))))
            }
            Rings::Registers(by) => {
                let whose = self.whose(viommu, state.guest_id);
                let (register, base) = rings::base_register(queue);
                let control = rings::with_ring(state.control, queue);
                requests::forward(&*self.kernel, *by, &whose, register, base)?;
                requests::forward(&*self.kernel, *by, &whose, rings::CONTROL, control.into_bits())?;
                state.control = control;
                Ok(state.keep(id, Object::Ring(queue.kind)))
            }
        }
    }

    /// Where the request is known, a target that is no vCPU's is invalid.
    fn route(
        &self,
        viommu: ObjectId,
        interrupt: UnitInterrupt,
        target: Option<InterruptTarget>,
    ) -> io::Result<()> {
        let state = self.state();
        state.viommu(viommu)?;
        let (Some(layout), Some(processors)) = (&self.abi.interrupts, &self.processors) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let (vcpu, vector) = match target {
            None => (0, 0),
            Some(target) => match processors.vcpu(target) {
                Some(vcpu) if target.vector != 0 => (vcpu, target.vector),
                _ => return errno(libc::EINVAL),
            },
        };
        let kind = match interrupt {
            UnitInterrupt::Event => layout.event,
            UnitInterrupt::Ppr => layout.ppr,
        };
        let route = Route {
            viommu: viommu.0,
            kind,
            vm: processors.vm().as_raw_fd(),
            vcpu,
            vector,
        };
        requests::route(&*self.kernel, layout, &route).map_err(known)
    }

    /// No version of the interface has a request for it.
    fn insert_event(&self, viommu: ObjectId, _record: [u32; 4]) -> io::Result<()> {
        self.state().viommu(viommu)?;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// No version of the interface has a request for it.
    fn reset_page(&self, viommu: ObjectId) -> io::Result<()> {
        self.state().viommu(viommu)?;
        Err(io::ErrorKind::Unsupported.into())
    }

    fn events_alloc(&self, viommu: ObjectId) -> io::Result<(ObjectId, Box<dyn HostEvents>)> {
        let mut state = self.state();
        state.viommu(viommu)?;
        let Some(abi::EventQueues { queue_type, record }) = self.abi.events else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        if state.has(Object::Events) {
            return errno(libc::EEXIST);
        }
        let made = requests::events_alloc(&*self.kernel, viommu.0, queue_type, events::DEPTH);
        let (id, fd) = made.map_err(known)?;
        Ok((
            state.keep(id, Object::Events),
            Box::new(EventQueue::new(fd, record)),
        ))
    }

    fn destroy(&self, id: ObjectId) -> io::Result<()> {
        let mut state = self.state();
        if id == self.parent() || id == self.blocked() {
            return errno(libc::EBUSY);
        }
        let Some(&object) = state.made.get(&id) else {
            return errno(libc::ENOENT);
        };
        let nested = |table: &ObjectId| state.made.get(table) == Some(&Object::Nested);
        // A kernel need not refuse the second, after which the device's requests would have no name for the guest.
        let used = match object {
            Object::Viommu => state.made.len() > 1,
            Object::Vdevice(device) => state
                .attached
                .get(device.0)
                .is_some_and(|table| table.as_ref().is_some_and(nested)),
            _ => state.attached.contains(&Some(id)),
        };
        if used {
            return errno(libc::EBUSY);
        }
        match (object, &self.abi.rings) {
            (Object::Queue(queue, mut working), Rings::Queues(queues)) => {
                let stopped = rings::stop(&*self.kernel, state.whole().0, queues, &queue, &mut working);
                // As far as it came: the rest is done when this is called again.
                state.made.insert(id, Object::Queue(queue, working));
                stopped?;
            }
            (Object::Ring(kind), Rings::Registers(by)) => {
                let control = rings::without_ring(state.control, kind);
                let whose = self.whose(state.whole(), state.guest_id);
                requests::forward(&*self.kernel, *by, &whose, rings::CONTROL, control.into_bits())?;
                state.control = control;
            }
            (Object::Vdevice(device), _) => match requests::destroy(&*self.kernel, id.0) {
                // It went with the binding of its device, and the kernel gives its number to nothing else.
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.is_unbound(device) => {}
                answer => answer?,
            },
            _ => requests::destroy(&*self.kernel, id.0)?,
        }
        state.made.remove(&id);
        Ok(())
    }
}

impl Drop for HwHost {
    fn drop(&mut self) {
        let kept = |error: io::Error| {
            tracing::warn!(iommu = self.name, %error, "the host keeps an object of an IOMMU until the end");
        };
        let made = |wanted: fn(&Object) -> bool| {
            let state = self.state();
            let found = state.made.iter().filter(|(_, object)| wanted(object));
            found.map(|(id, _)| *id).collect::<Vec<_>>()
        };
        let destroy = |ids: Vec<ObjectId>| {
            for id in ids {
                self.destroy(id).unwrap_or_else(kept);
            }
        };
        destroy(made(|object| {
            matches!(object, Object::Queue(..) | Object::Ring(_) | Object::Events)
        }));
        for (device, HwDevice { function, .. }) in self.devices.iter().enumerate() {
            let mut state = self.state();
            let attached = state.attached.get_mut(device).and_then(Option::take);
            if attached.is_some() {
                function.detach().unwrap_or_else(kept);
            }
        }
        destroy(made(|object| *object == Object::Nested));
        destroy(made(|object| matches!(object, Object::Vdevice(_))));
        destroy(made(|object| *object == Object::Viommu));
    }
}

#[cfg(test)]
mod tests;
