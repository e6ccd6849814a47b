//! A host that keeps its objects as a kernel does and remembers whoever did not.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::event::{EventfdFlags, eventfd};

use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::viommu::host::{
    HardwareErrors, HostDevice, HostEvent, HostEvents, HostFeatures, InterruptTarget, ObjectId, Queue,
    QueueKind, UnitInterrupt, VfPage, Viommu, ViommuHost,
};
use crate::platform::addr::Bdf;
use crate::platform::bus::BusDevice;
use crate::platform::device_memory::DeviceMemory;

const PARENT: ObjectId = ObjectId(1);
const BLOCKED: ObjectId = ObjectId(2);

/// What the host made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Object {
    Viommu,
    Vdevice(HostDevice, Bdf),
    Nested(Dte),
    Queue(Queue),
    Events,
}

/// What the host told, one look after the other.
type Told = Arc<Mutex<VecDeque<io::Result<Vec<HostEvent>>>>>;

/// Who reads that. The descriptor stands for one and is never readable.
struct Reader {
    told: Told,
    descriptor: OwnedFd,
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl HostEvents for Reader {
    fn take(&self) -> io::Result<Vec<HostEvent>> {
        let mut told = self.told.lock().expect("not poisoned");
        told.pop_front().unwrap_or_else(|| Ok(Vec::new()))
    }
}

#[derive(Default)]
struct State {
    next: u32,
    objects: BTreeMap<ObjectId, Object>,
    attached: BTreeMap<HostDevice, ObjectId>,
    routes: BTreeMap<UnitInterrupt, InterruptTarget>,
    /// What was asked, and granted.
    granted: Vec<String>,
    asked: usize,
    /// The request with this number is refused.
    refused_at: Option<usize>,
    /// Requests of this name are refused.
    refused_name: Option<&'static str>,
    unsupported: bool,
    mapped: Option<Arc<DeviceMemory>>,
    events: Vec<[u32; 4]>,
    errors: HardwareErrors,
    /// Where it tells what it was not asked, if it has event queues.
    told: Option<Told>,
    resets: usize,
    /// Who broke which rule of the host's.
    wrongs: Vec<String>,
}

/// The host.
pub struct FakeHost {
    state: Mutex<State>,
    /// What was written to page 3.
    pub page: Arc<Running>,
}

/// Page 3, which records.
#[derive(Default)]
pub struct Running(pub Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for Running {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset.to_le_bytes()[0] | 1);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().expect("not poisoned").push((offset, data.to_vec()));
    }
}

impl FakeHost {
    /// A host that made nothing yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                next: 10,
                ..State::default()
            }),
            page: Arc::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }

    /// Refuse request number `at`, counted from 1 and from the first, and no other.
    pub fn refuse_at(&self, at: Option<usize>) {
        self.state().refused_at = at;
    }

    /// Refuse the next request but `after`.
    pub fn refuse_soon(&self, after: usize) {
        let mut state = self.state();
        state.refused_at = Some(state.asked + 1 + after);
    }

    /// Refuse every request of this name from now on, or none.
    pub fn refuse(&self, name: Option<&'static str>) {
        self.state().refused_name = name;
    }

    /// Have no requests that some hosts have not.
    pub fn support_little(&self) {
        self.state().unsupported = true;
    }

    /// Have page 3 mapped rather than answer accesses.
    pub fn map_page(&self, page: Arc<DeviceMemory>) {
        self.state().mapped = Some(page);
    }

    /// Have had `errors` with the guest.
    pub fn err(&self, errors: HardwareErrors) {
        self.state().errors.join(errors);
    }

    /// Have event queues.
    pub fn have_events(&self) {
        self.state().told = Some(Arc::default());
    }

    /// Answer one look of who reads the event queue.
    pub fn tell(&self, answer: io::Result<Vec<HostEvent>>) {
        let state = self.state();
        let told = state.told.as_ref().expect("event queues");
        told.lock().expect("not poisoned").push_back(answer);
    }

    /// What nobody has looked at yet.
    pub fn untold(&self) -> usize {
        let state = self.state();
        let told = state.told.as_ref();
        told.map_or(0, |told| told.lock().expect("not poisoned").len())
    }

    /// How many requests were made.
    pub fn asked(&self) -> usize {
        self.state().asked
    }

    /// What was asked and granted since the last call.
    pub fn granted(&self) -> Vec<String> {
        std::mem::take(&mut self.state().granted)
    }

    /// Events inserted.
    pub fn events(&self) -> Vec<[u32; 4]> {
        self.state().events.clone()
    }

    /// How often page 3 was put back.
    pub fn resets(&self) -> usize {
        self.state().resets
    }

    /// Rings it works on.
    pub fn queue(&self, kind: QueueKind) -> Option<Queue> {
        self.state().objects.values().find_map(|object| match object {
            Object::Queue(queue) if queue.kind == kind => Some(*queue),
            _ => None,
        })
    }

    /// Where it sends an interrupt.
    pub fn target(&self, interrupt: UnitInterrupt) -> Option<InterruptTarget> {
        self.state().routes.get(&interrupt).copied()
    }

    /// What `device` reaches: `None` for guest memory, no table for nothing.
    pub fn place(&self, device: usize) -> super::Reached {
        let state = self.state();
        match state.attached.get(&HostDevice(device)) {
            Some(&PARENT) => super::Reached::Memory,
            Some(&BLOCKED) => super::Reached::Nothing,
            Some(table) => match state.objects.get(table) {
                Some(Object::Nested(dte)) => super::Reached::Tables(*dte),
                other => panic!("attached to {other:?}"),
            },
            None => panic!("device {device} is attached to nothing at all"),
        }
    }

    /// The name of `device`.
    pub fn name(&self, device: usize) -> Option<Bdf> {
        self.state().objects.values().find_map(|object| match object {
            Object::Vdevice(of, name) if of.0 == device => Some(*name),
            _ => None,
        })
    }

    /// How many tables of guests there are.
    pub fn tables(&self) -> usize {
        let state = self.state();
        let tables = state.objects.values();
        tables
            .filter(|object| matches!(object, Object::Nested(_)))
            .count()
    }

    /// Objects that are left.
    pub fn left(&self) -> usize {
        self.state().objects.len()
    }

    /// No rule of the host's was broken.
    pub fn check(&self) {
        assert_eq!(self.state().wrongs, Vec::<String>::new());
    }

    /// Take a request, or refuse it.
    fn enter(&self, name: &'static str) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.asked += 1;
        if state.refused_at == Some(state.asked) || state.refused_name == Some(name) {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(state)
    }
}

impl State {
    fn wrong(&mut self, what: String, errno: i32) -> io::Error {
        self.wrongs.push(what);
        io::Error::from_raw_os_error(errno)
    }

    fn add(&mut self, object: Object, what: String) -> ObjectId {
        let id = ObjectId(self.next);
        self.next += 1;
        self.objects.insert(id, object);
        self.granted.push(what);
        id
    }

    fn is_viommu(&mut self, id: ObjectId) -> io::Result<()> {
        if self.objects.get(&id) == Some(&Object::Viommu) {
            Ok(())
        } else {
            Err(self.wrong(format!("{id:?} is no vIOMMU"), 2))
        }
    }
}

impl ViommuHost for FakeHost {
    fn features(&self) -> io::Result<HostFeatures> {
        Ok(HostFeatures {
            efr: u64::MAX,
            efr2: u64::MAX,
        })
    }

    fn parent(&self) -> ObjectId {
        PARENT
    }

    fn blocked(&self) -> ObjectId {
        BLOCKED
    }

    fn viommu_alloc(&self) -> io::Result<Viommu> {
        let mut state = self.enter("viommu")?;
        if state.objects.values().any(|object| *object == Object::Viommu) {
            return Err(state.wrong("a second vIOMMU".to_owned(), 17));
        }
        let id = state.add(Object::Viommu, "viommu".to_owned());
        let page = match &state.mapped {
            Some(memory) => VfPage::Mapped(memory.clone()),
            None => VfPage::Trapped(self.page.clone()),
        };
        Ok(Viommu { id, page })
    }

    fn vdevice_alloc(&self, viommu: ObjectId, device: HostDevice, guest: Bdf) -> io::Result<ObjectId> {
        let mut state = self.enter("vdevice")?;
        state.is_viommu(viommu)?;
        let taken =
            |object: &Object| matches!(object, Object::Vdevice(of, name) if *of == device || *name == guest);
        if state.objects.values().any(taken) {
            // Two functions may have one number while a guest renumbers; two names of one function are wrong.
            let twice = |object: &Object| matches!(object, Object::Vdevice(of, _) if *of == device);
            if state.objects.values().any(twice) {
                return Err(state.wrong(format!("a second vDevice for {device:?}"), 17));
            }
            return Err(io::Error::from_raw_os_error(17));
        }
        Ok(state.add(
            Object::Vdevice(device, guest),
            format!("vdevice {} {guest}", device.0),
        ))
    }

    fn nested_alloc(&self, viommu: ObjectId, device: HostDevice, dte: &Dte) -> io::Result<ObjectId> {
        let mut state = self.enter("nested")?;
        state.is_viommu(viommu)?;
        let (host, mode) = (dte.host, dte.interrupt.guest_paging_mode());
        let right = host.v()
            && host.gv()
            && host.mode() == 0
            && host.root() == 0
            && dte.gcr3_root() != 0
            && mode <= 1
            && host.glx() != 3;
        if !right {
            return Err(state.wrong(format!("tables of {dte:x?}"), 22));
        }
        let named = |object: &Object| matches!(object, Object::Vdevice(of, _) if *of == device);
        if !state.objects.values().any(named) {
            return Err(state.wrong(format!("tables for {device:?}, which has no name"), 22));
        }
        let what = format!("nested {:#x}", dte.gcr3_root());
        Ok(state.add(Object::Nested(*dte), what))
    }

    fn attach(&self, device: HostDevice, table: ObjectId) -> io::Result<()> {
        let name = match table {
            PARENT => "pass",
            BLOCKED => "block",
            _ => "attach",
        };
        let mut state = self.enter(name)?;
        if name == "attach" {
            if !matches!(state.objects.get(&table), Some(Object::Nested(_))) {
                return Err(state.wrong(format!("{table:?} is no table"), 2));
            }
            let named = |object: &Object| matches!(object, Object::Vdevice(of, _) if *of == device);
            if !state.objects.values().any(named) {
                return Err(state.wrong(format!("{device:?} has no name"), 22));
            }
        }
        if state.attached.get(&device) == Some(&table) {
            state
                .wrongs
                .push(format!("{device:?} is attached to {table:?} twice"));
        }
        state.attached.insert(device, table);
        state.granted.push(format!("{name} {}", device.0));
        Ok(())
    }

    fn queue_alloc(&self, viommu: ObjectId, queue: &Queue) -> io::Result<ObjectId> {
        let mut state = self.enter("queue")?;
        state.is_viommu(viommu)?;
        let same = |object: &Object| matches!(object, Object::Queue(other) if other.kind == queue.kind);
        if state.objects.values().any(same) {
            return Err(state.wrong(format!("a second {:?} queue", queue.kind), 17));
        }
        if !(8..=15).contains(&queue.length) || !queue.base.0.is_multiple_of(4096) {
            return Err(state.wrong(format!("{queue:?}"), 22));
        }
        Ok(state.add(Object::Queue(*queue), format!("queue {:?}", queue.kind)))
    }

    fn route(
        &self,
        viommu: ObjectId,
        interrupt: UnitInterrupt,
        target: Option<InterruptTarget>,
    ) -> io::Result<()> {
        let mut state = self.enter("route")?;
        if state.unsupported {
            return Err(io::ErrorKind::Unsupported.into());
        }
        state.is_viommu(viommu)?;
        let before = match target {
            Some(target) if target.vector == 0 => return Err(state.wrong("vector 0".to_owned(), 22)),
            Some(target) => state.routes.insert(interrupt, target),
            None => state.routes.remove(&interrupt),
        };
        if before == target {
            state
                .wrongs
                .push(format!("{interrupt:?} is routed to {target:?} twice"));
        }
        state.granted.push(format!("route {interrupt:?}"));
        Ok(())
    }

    fn insert_event(&self, viommu: ObjectId, record: [u32; 4]) -> io::Result<()> {
        let mut state = self.enter("event")?;
        if state.unsupported {
            return Err(io::ErrorKind::Unsupported.into());
        }
        state.is_viommu(viommu)?;
        state.events.push(record);
        state.granted.push("event".to_owned());
        Ok(())
    }

    fn reset_page(&self, viommu: ObjectId) -> io::Result<()> {
        let mut state = self.enter("reset")?;
        if state.unsupported {
            return Err(io::ErrorKind::Unsupported.into());
        }
        state.is_viommu(viommu)?;
        state.resets += 1;
        Ok(())
    }

    fn take_errors(&self) -> HardwareErrors {
        std::mem::take(&mut self.state().errors)
    }

    fn events_alloc(&self, viommu: ObjectId) -> io::Result<(ObjectId, Box<dyn HostEvents>)> {
        let Some(told) = self.state().told.clone() else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let mut state = self.enter("events")?;
        state.is_viommu(viommu)?;
        if state.objects.values().any(|object| *object == Object::Events) {
            return Err(state.wrong("a second event queue".to_owned(), 17));
        }
        let reader = Reader {
            told,
            descriptor: eventfd(0, EventfdFlags::empty())?,
        };
        Ok((state.add(Object::Events, "events".to_owned()), Box::new(reader)))
    }

    fn destroy(&self, id: ObjectId) -> io::Result<()> {
        let mut state = self.enter("destroy")?;
        let Some(object) = state.objects.get(&id).copied() else {
            return Err(state.wrong(format!("{id:?} is destroyed and does not exist"), 2));
        };
        let in_use = match object {
            Object::Viommu => state.objects.len() > 1,
            Object::Nested(_) => state.attached.values().any(|table| *table == id),
            Object::Vdevice(device, _) => {
                let table = state.attached.get(&device);
                table.is_some_and(|table| state.objects.contains_key(table))
            }
            Object::Queue(_) => false,
            Object::Events => state
                .told
                .as_ref()
                .is_some_and(|told| Arc::strong_count(told) > 1),
        };
        // Its page is to be unmapped first.
        let page = state.mapped.as_ref().filter(|_| object == Object::Viommu);
        let mapped = page.is_some_and(|page| Arc::strong_count(page) > 1);
        if in_use || mapped {
            // After a refusal that is how it has to be; the owner asks again.
            if state.refused_at.is_none_or(|at| at > state.asked) && state.refused_name.is_none() {
                return Err(state.wrong(format!("{object:?} is destroyed in use"), 16));
            }
            return Err(io::Error::from_raw_os_error(16));
        }
        state.objects.remove(&id);
        let kind = match object {
            Object::Viommu => "viommu",
            Object::Nested(_) => "nested",
            Object::Vdevice(..) => "vdevice",
            Object::Queue(_) => "queue",
            Object::Events => "events",
        };
        state.granted.push(format!("destroy {kind}"));
        Ok(())
    }
}
