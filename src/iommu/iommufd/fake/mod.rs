//! A kernel that is none: it takes the bytes of /dev/iommu's requests, and checks them as iommufd and AMD's driver do.
//!
//! Numbers and layouts are written out here and not taken from the tables that say them elsewhere, so that each checks
//! the other. It keeps objects and who refers to whom, and fails the n-th request when told to.

mod objects;
mod requests;
mod structure;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

use super::{Attach, Kernel};
use crate::platform::device_memory::DeviceMemory;

pub use objects::Object;
use objects::Objects;
use structure::{Structure, Tail};

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Linux 7.3 as published.
    Stock,
    /// AMD's, `v-a`.
    A,
    /// AMD's, `v-c`.
    C,
    /// AMD's, `v-d`.
    D,
    /// AMD's, `v-e`.
    E,
}

/// EFR with GTSup, GIOSup, vIOMMUSup and PPRSup.
pub const EFR: u64 = 1 << 55 | 1 << 48 | 1 << 4 | 1 << 1;
/// EFR2 with GCR3TRPMode.
pub const EFR2: u64 = 1 << 3;
/// The number of the request that routes interrupts; no published text has it.
pub const EXT_INT: u32 = 0x98;
/// What a request may fail with, whatever it is. Some mean something of their own to whoever asked.
pub const ERRNOS: [i32; 13] = [
    libc::ENOMEM,
    libc::EIO,
    libc::EINVAL,
    libc::ENOENT,
    libc::EBUSY,
    libc::EOPNOTSUPP,
    libc::ENODEV,
    libc::EPERM,
    libc::EFAULT,
    libc::EEXIST,
    libc::ENOSPC,
    libc::ENOTTY,
    libc::E2BIG,
];
/// Guests for which the units have memory.
const MOST_GUESTS: u64 = 64;

/// The kernel.
pub struct Fake {
    version: Version,
    /// What is mapped instead of a unit's memory: a page for each guest.
    memory: File,
    state: Mutex<State>,
}

struct State {
    objects: Objects,
    efr: u64,
    efr2: u64,
    info_type: u32,
    /// What is answered to which request from now on, the next being 0.
    fails: Option<(u64, i32)>,
    asked: u64,
    /// How often something was to be destroyed in use.
    in_use: u64,
    /// Registers that were forwarded: the vIOMMU, offset and value.
    registers: Vec<(u32, u16, u64)>,
    /// Interrupts that were routed: kind, VM, vCPU, vector.
    routes: Vec<[u32; 4]>,
    mapped: Vec<(u32, Weak<DeviceMemory>)>,
    /// The ends of event queues that the kernel has, by number.
    events: Vec<(u32, Arc<OwnedFd>)>,
    /// What its units were last told of each ring: the vIOMMU, type and flags.
    rings: BTreeMap<(u32, u32), u32>,
    /// It looks at what queues are asked for, which AMD's does not.
    checks_queues: bool,
    /// Address spaces with memory in them.
    filled: Vec<u32>,
    /// What was destroyed, in order.
    destroyed: Vec<Object>,
}

/// The error of a kernel that answers `errno`.
fn refuse<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

impl Fake {
    /// A kernel of this version that made nothing yet.
    #[must_use]
    pub fn new(version: Version) -> Arc<Self> {
        let memory = rustix::fs::memfd_create("unit", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
        let memory = File::from(memory);
        memory.set_len(MOST_GUESTS * 0x1000).expect("room");
        Arc::new(Self {
            version,
            memory,
            state: Mutex::new(State {
                objects: Objects::default(),
                efr: EFR,
                efr2: EFR2,
                info_type: 4,
                fails: None,
                asked: 0,
                in_use: 0,
                registers: Vec::new(),
                routes: Vec::new(),
                mapped: Vec::new(),
                events: Vec::new(),
                rings: BTreeMap::new(),
                checks_queues: false,
                filled: Vec::new(),
                destroyed: Vec::new(),
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device behind unit `unit` that is bound; its number.
    pub fn bind(&self, unit: u32) -> u32 {
        self.state().objects.add(Object::Device { unit, attached: None })
    }

    /// `device` is bound no longer, as when its last descriptor is closed: what the guest calls it goes with it, by no
    /// request, and nothing has the number of that ever after.
    pub fn unbind(&self, device: u32) {
        let objects = &mut self.state().objects;
        let of = |object: &Object| matches!(*object, Object::Vdevice { device: of, .. } if of == device);
        if let Some(name) = objects.find(of) {
            objects.bury(name);
        }
        objects.remove(device);
    }

    /// What attaches `device`.
    pub fn function(self: &Arc<Self>, device: u32) -> Arc<Function> {
        Arc::new(Function {
            kernel: self.clone(),
            device,
        })
    }

    /// All but devices.
    pub fn objects(&self) -> Vec<Object> {
        let state = self.state();
        let all = state.objects.all().copied();
        all.filter(|object| !matches!(object, Object::Device { .. }))
            .collect()
    }

    /// What has this number.
    pub fn object(&self, id: u32) -> Option<Object> {
        self.state().objects.get(id).ok()
    }

    /// The tables or address space that `device` is attached to.
    pub fn attached(&self, device: u32) -> Option<u32> {
        match self.state().objects.get(device) {
            Ok(Object::Device { attached, .. }) => attached,
            _ => None,
        }
    }

    /// How often something was to be destroyed that was in use, which is nobody's intention.
    pub fn destroyed_in_use(&self) -> u64 {
        self.state().in_use
    }

    /// What was destroyed so far, in order.
    pub fn destroyed(&self) -> Vec<Object> {
        self.state().destroyed.clone()
    }

    /// Tell this EFR from here on, and go by it.
    pub fn set_efr(&self, efr: u64) {
        self.state().efr = efr;
    }

    /// The same for EFR2.
    pub fn set_efr2(&self, efr2: u64) {
        self.state().efr2 = efr2;
    }

    /// Say from here on that units are of this type.
    pub fn set_info_type(&self, info_type: u32) {
        self.state().info_type = info_type;
    }

    /// Refuse queues that are none from now on.
    pub(crate) fn check_queues(&self) {
        self.state().checks_queues = true;
    }

    /// Types of the rings that its units work on, whether they have an object or not: making one tells the unit, and
    /// destroying it tells nothing.
    pub(crate) fn rings_at_work(&self) -> Vec<u32> {
        let rings = &self.state().rings;
        let on = rings.iter().filter(|(_, flags)| **flags & 0x100 != 0);
        on.map(|((_, queue_type), _)| *queue_type).collect()
    }

    /// Answer one request with `errno`, after `before` others.
    pub fn fail(&self, before: u64, errno: i32) {
        self.state().fails = Some((before, errno));
    }

    /// Whether a request is still to be failed.
    pub fn fails(&self) -> bool {
        self.state().fails.is_some()
    }

    /// Fail nothing any more.
    pub fn relent(&self) {
        self.state().fails = None;
    }

    /// How often it was asked for anything.
    pub fn asked(&self) -> u64 {
        self.state().asked
    }

    /// Registers that were forwarded: the vIOMMU, offset and value.
    pub fn registers(&self) -> Vec<(u32, u16, u64)> {
        self.state().registers.clone()
    }

    /// Interrupts that were routed: kind, VM, vCPU, vector.
    pub fn routes(&self) -> Vec<[u32; 4]> {
        self.state().routes.clone()
    }

    /// Put `bytes`, headers and records, into the first event queue there is, to be read at once; waits for room. `false`
    /// where nobody can read them any more.
    pub fn tell(&self, bytes: &[u8]) -> bool {
        let queue = self.state().events.first().expect("an event queue").1.clone();
        send(&queue, bytes, SendFlags::NOSIGNAL).is_ok()
    }

    /// All of the units' memory reads all ones from here on, as of a BAR that is off; or as after power-on.
    ///
    /// # Panics
    /// When its file cannot be written.
    pub fn switch_pages_off(&self, off: bool) {
        let page = [if off { 0xff } else { 0 }; 0x1000];
        for gid in 0..MOST_GUESTS {
            self.memory.write_all_at(&page, gid * 0x1000).expect("room");
        }
    }

    /// Tell nothing more by the first event queue there is, which no kernel does.
    pub fn end_events(&self) {
        self.state().events.remove(0);
    }

    /// Begin to answer a request.
    fn ask(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.asked += 1;
        if let Some((before, errno)) = state.fails {
            state.fails = before.checked_sub(1).map(|left| (left, errno));
            if before == 0 {
                return refuse(errno);
            }
        }
        state.mapped.retain(|(_, page)| page.strong_count() > 0);
        Ok(state)
    }
}

impl Kernel for Fake {
    fn request(&self, number: u32, argument: &mut [u8], data: &mut [u8]) -> io::Result<()> {
        let version = self.version;
        let mut state = self.ask()?;
        let state = &mut *state;
        match number {
            0x80 => state.destroy(Structure::read(argument, 8, 8)?.u32(4)),
            0x81 => state.ioas_alloc(&mut Structure::read(argument, 12, 12)?),
            0x87 if version == Version::C => state.option(&Structure::read(argument, 24, 24)?),
            0x89 => state.hwpt_alloc(version, &mut Structure::read(argument, 48, 40)?, data),
            0x8a => state.hw_info(&mut Structure::read(argument, 40, 40)?, data),
            0x90 => state.viommu_alloc(version, &mut Structure::read(argument, 40, 40)?, data),
            0x91 => state.vdevice_alloc(&mut Structure::read(argument, 24, 24)?),
            0x94 => state.queue_alloc(version, &mut Structure::read(argument, 40, 40)?),
            0x60 if version == Version::A => state.mmio_access(&Structure::read(argument, 32, 32)?),
            0x95 if version == Version::D => state.command(&Structure::read(argument, 24, 24)?),
            EXT_INT if version == Version::E => state.ext_int(&Structure::read(argument, 32, 24)?),
            0x87 => refuse(libc::EOPNOTSUPP),
            _ => refuse(libc::ENOTTY),
        }
    }

    fn event_queue(&self, argument: &mut [u8]) -> io::Result<OwnedFd> {
        let mut state = self.ask()?;
        let mut structure = Structure::read(argument, 32, 32)?;
        let (viommu, queue_type, depth) = (structure.u32(8), structure.u32(12), structure.u32(16));
        structure.zero(4..8, libc::EOPNOTSUPP)?;
        structure.zero(28..32, libc::EOPNOTSUPP)?;
        if queue_type == 0 {
            return refuse(libc::EOPNOTSUPP);
        }
        if !(1..=1 << 19).contains(&depth) {
            return refuse(libc::EINVAL);
        }
        state.objects.viommu(viommu)?;
        let same = |object: &Object| *object == Object::Events { viommu };
        if state.objects.all().any(same) {
            return refuse(libc::EEXIST);
        }
        // What is sent at once is read at once.
        let (read, write) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&read, true)?;
        let id = state.objects.add(Object::Events { viommu });
        structure.set_u32(20, id);
        structure.set_u32(24, u32::try_from(read.as_raw_fd()).expect("open"));
        state.events.push((id, Arc::new(write)));
        Ok(read)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        let mut state = self.ask()?;
        let owner = state
            .objects
            .find(|object| matches!(object, Object::Viommu { offset: of, .. } if *of == offset));
        let Some(owner) = owner.filter(|_| len == 0x1000 && offset != 0) else {
            return refuse(libc::ENXIO);
        };
        let page = Arc::new(DeviceMemory::map(&self.memory, offset, len)?);
        state.mapped.push((owner, Arc::downgrade(&page)));
        Ok(page)
    }
}

impl State {
    fn destroy(&mut self, id: u32) -> io::Result<()> {
        let object = self.objects.get(id)?;
        // A function is unbound by closing it.
        if matches!(object, Object::Device { .. }) {
            return refuse(libc::EBUSY);
        }
        // Whoever reads a queue keeps it.
        let read = |(queue, end): &(u32, Arc<OwnedFd>)| *queue == id && has_reader(end);
        if self.objects.is_used(id)
            || self.mapped.iter().any(|(owner, _)| *owner == id)
            || self.events.iter().any(read)
        {
            self.in_use += 1;
            return refuse(libc::EBUSY);
        }
        self.events.retain(|(queue, _)| *queue != id);
        self.objects.remove(id);
        self.destroyed.push(object);
        Ok(())
    }

    fn ioas_alloc(&mut self, structure: &mut Structure<'_>) -> io::Result<()> {
        structure.zero(4..8, libc::EOPNOTSUPP)?;
        structure.set_u32(8, self.objects.add(Object::Ioas));
        Ok(())
    }

    fn hwpt_alloc(&mut self, version: Version, structure: &mut Structure<'_>, data: &[u8]) -> io::Result<()> {
        let (flags, device, over) = (structure.u32(4), structure.u32(8), structure.u32(12));
        structure.zero(20..24, libc::EOPNOTSUPP)?;
        // Pointers and lengths are the seam's; fault queues are not asked for.
        structure.zero(28..48, libc::EOPNOTSUPP)?;
        let data_type = structure.u32(24);
        if (data_type == 0) != data.is_empty() {
            return refuse(libc::EINVAL);
        }
        let unit = self.objects.unit(device)?;
        let made = match self.objects.get(over) {
            Ok(Object::Ioas) => {
                if data_type != 0 || !self.has_tables(flags) {
                    return refuse(libc::EOPNOTSUPP);
                }
                Object::Hwpt {
                    ioas: over,
                    nest_parent: flags & 1 != 0,
                }
            }
            Ok(Object::Viommu { unit: of, .. }) => {
                if unit != of {
                    return refuse(libc::EINVAL);
                }
                if version == Version::Stock || data_type != 3 || flags != 0 {
                    return refuse(libc::EOPNOTSUPP);
                }
                let dte = check_dte(data, self.has_five_levels())?;
                Object::Nested { viommu: over, dte }
            }
            // AMD's driver has no nested tables without a vIOMMU.
            Ok(Object::Hwpt { .. }) => return refuse(libc::EOPNOTSUPP),
            _ => return refuse(libc::EINVAL),
        };
        structure.set_u32(16, self.objects.add(made));
        Ok(())
    }

    /// Whether the driver makes tables of the host's with these flags of HWPT_ALLOC: a parent of nested ones (1), dirty
    /// tracking (2), PASIDs (8), as far as the unit has what each takes.
    fn has_tables(&self, flags: u32) -> bool {
        let efr = |bit: u32| self.efr >> bit & 1 == 1;
        let parent = efr(4) && efr(48) && self.efr2 >> 3 & 1 == 1;
        let dirty = efr(52);
        match flags {
            0 => true,
            1 => parent,
            2 => dirty,
            3 => parent && dirty,
            // PASIDs take guest tables and page requests.
            8 => efr(4) && efr(1),
            _ => false,
        }
    }

    /// GATS says exactly that; and so do the processors here.
    const fn has_five_levels(&self) -> bool {
        self.efr >> 12 & 3 == 1
    }

    fn hw_info(&mut self, structure: &mut Structure<'_>, data: &mut [u8]) -> io::Result<()> {
        structure.zero(4..8, libc::EOPNOTSUPP)?;
        structure.zero(12..40, libc::EOPNOTSUPP)?;
        self.objects.unit(structure.u32(8))?;
        let known = [self.efr.to_le_bytes(), self.efr2.to_le_bytes()].concat();
        data.fill(0);
        data.iter_mut().zip(known).for_each(|(to, from)| *to = from);
        structure.set_u32(12, 16);
        structure.set_u32(24, self.info_type);
        Ok(())
    }

    fn viommu_alloc(
        &mut self,
        version: Version,
        structure: &mut Structure<'_>,
        data: &mut [u8],
    ) -> io::Result<()> {
        let (viommu_type, device, parent) = (structure.u32(8), structure.u32(12), structure.u32(16));
        structure.zero(4..8, libc::EOPNOTSUPP)?;
        structure.zero(28..32, libc::EOPNOTSUPP)?;
        structure.zero(24..28, libc::EOPNOTSUPP)?;
        structure.zero(32..40, libc::EOPNOTSUPP)?;
        if viommu_type == 0 {
            return refuse(libc::EOPNOTSUPP);
        }
        let unit = self.objects.unit(device)?;
        let serves = viommu_type == 3 && self.efr >> 55 & 1 == 1;
        if version != Version::Stock && !serves {
            return refuse(libc::EOPNOTSUPP);
        }
        match self.objects.get(parent)? {
            Object::Hwpt {
                nest_parent: true, ..
            } => {}
            Object::Hwpt { .. } => return refuse(libc::EINVAL),
            _ => return refuse(libc::ENOENT),
        }
        // Bytes, least bytes, where the offset goes, and where nothing may be.
        let layout = match version {
            Version::Stock => None,
            Version::A => Some((32, 28, 16, 24..28)),
            Version::C => Some((16, 12, 0, 8..12)),
            Version::D => Some((24, 24, 8, 20..24)),
            Version::E => Some((8, 8, 0, 0..0)),
        };
        let mut offset = 0;
        let gid = self.objects.free_guest();
        if let Some((len, least, at, reserved)) = layout {
            let mut tail = Tail::read(data, len, least)?;
            tail.zero(reserved)?;
            if version == Version::A {
                // The host's IOMMU, and a function that is nobody's.
                if tail.u32(0) != 0x4002 || tail.u32(8) == 0 || tail.u32(4) > 0xffff {
                    return refuse(libc::EINVAL);
                }
                tail.set_u32(12, gid);
            }
            if version == Version::D && (tail.u32(0) != 0 || tail.u32(16) < 3) {
                return refuse(libc::EBADF);
            }
            offset = u64::from(gid) * 0x1000;
            tail.set_u64(at, offset);
        }
        let id = self.objects.add(Object::Viommu {
            parent,
            unit,
            offset,
            gid,
        });
        structure.set_u32(20, id);
        Ok(())
    }

    fn vdevice_alloc(&mut self, structure: &mut Structure<'_>) -> io::Result<()> {
        let (viommu, device, name) = (structure.u32(4), structure.u32(8), structure.u64(16));
        let of = self.objects.viommu(viommu)?;
        if self.objects.unit(device)? != of || name > 0xffff {
            return refuse(libc::EINVAL);
        }
        let taken = |object: &Object| matches!(*object, Object::Vdevice { viommu: v, device: d, name: n } if d == device || (v == viommu && n == name));
        if self.objects.all().any(taken) {
            return refuse(libc::EEXIST);
        }
        structure.set_u32(12, self.objects.add(Object::Vdevice { viommu, device, name }));
        Ok(())
    }

    fn queue_alloc(&mut self, version: Version, structure: &mut Structure<'_>) -> io::Result<()> {
        let (flags, viommu, queue_type) = (structure.u32(4), structure.u32(8), structure.u32(12));
        let (index, base, length) = (structure.u32(16), structure.u64(24), structure.u64(32));
        if queue_type == 0 || version != Version::E && flags != 0 {
            return refuse(libc::EOPNOTSUPP);
        }
        let Some(more) = length.checked_sub(1) else {
            return refuse(libc::EINVAL);
        };
        if base.checked_add(more).is_none() {
            return refuse(libc::EOVERFLOW);
        }
        self.objects.viommu(viommu)?;
        if version != Version::E || !(2..=4).contains(&queue_type) {
            return refuse(libc::EOPNOTSUPP);
        }
        let known = if queue_type == 4 { 0xff00 } else { 0x300 };
        let none = index != 0
            || base & 0xfff != 0
            || base >> 52 != 0
            || !(8..=15).contains(&length)
            || flags & !known != 0;
        if none && self.checks_queues {
            return refuse(libc::EINVAL);
        }
        assert!(
            !none || flags == 0,
            "a ring that the unit has not: {flags:x} {base:x} {length}"
        );
        let same = |object: &Object| matches!(*object, Object::Queue { viommu: v, queue_type: t, .. } if v == viommu && t == queue_type);
        if self.objects.all().any(same) {
            return refuse(libc::EEXIST);
        }
        self.rings.insert((viommu, queue_type), flags);
        let queue = Object::Queue {
            viommu,
            queue_type,
            flags,
            base,
            length,
        };
        structure.set_u32(20, self.objects.add(queue));
        Ok(())
    }

    fn mmio_access(&mut self, structure: &Structure<'_>) -> io::Result<()> {
        structure.zero(29..32, libc::EINVAL)?;
        let gid = structure.u32(8);
        let viommu = self
            .objects
            .find(|object| matches!(*object, Object::Viommu { gid: of, .. } if of == gid));
        let width = (structure.u32(24), structure.u8(28));
        let Some(viommu) = viommu.filter(|_| structure.u32(4) == 0x4002 && width == (8, 1)) else {
            return refuse(libc::EINVAL);
        };
        self.register(viommu, structure.u32(12), structure.u64(16))
    }

    fn option(&mut self, structure: &Structure<'_>) -> io::Result<()> {
        if structure.u32(4) != 2 || structure.u16(8) != 0 {
            return refuse(libc::EOPNOTSUPP);
        }
        let viommu = structure.u32(12);
        self.objects.viommu(viommu)?;
        self.register(viommu, structure.u16(10).into(), structure.u64(16))
    }

    fn command(&mut self, structure: &Structure<'_>) -> io::Result<()> {
        structure.zero(12..16, libc::EOPNOTSUPP)?;
        if structure.u16(8) != 0 {
            return refuse(libc::EOPNOTSUPP);
        }
        let viommu = structure.u32(4);
        self.objects.viommu(viommu)?;
        self.register(viommu, structure.u16(10).into(), structure.u64(16))
    }

    /// Registers of page 1 that are known, and values without reserved bits.
    fn register(&mut self, viommu: u32, offset: u32, value: u64) -> io::Result<()> {
        let bases = 0x0f0f_ffff_ffff_f000;
        match offset {
            0x08 | 0x10 | 0x38 if value & !bases == 0 => {}
            0x18 => {}
            _ => return refuse(libc::EINVAL),
        }
        let offset = u16::try_from(offset).expect("one of four");
        self.registers.push((viommu, offset, value));
        Ok(())
    }

    fn ext_int(&mut self, structure: &Structure<'_>) -> io::Result<()> {
        structure.zero(24..32, libc::EOPNOTSUPP)?;
        self.objects.viommu(structure.u32(4))?;
        let route = [8, 12, 16, 20].map(|at| structure.u32(at));
        let [kind, vm, _, vector] = route;
        if kind > 1 || vector > 0xff {
            return refuse(libc::EINVAL);
        }
        if vm < 3 {
            return refuse(libc::EBADF);
        }
        self.routes.push(route);
        Ok(())
    }
}

/// Whether anybody has the other end.
fn has_reader(end: &OwnedFd) -> bool {
    let mut poll = [PollFd::new(end, PollFlags::empty())];
    let now = Timespec::default();
    rustix::event::poll(&mut poll, Some(&now)).expect("open");
    !poll[0].revents().contains(PollFlags::HUP)
}

/// A guest's entry, after what the driver checks of it; and nothing else is in it.
fn check_dte(data: &[u8], five_levels: bool) -> io::Result<[u64; 4]> {
    if data.len() != 32 {
        return refuse(libc::EINVAL);
    }
    let quadword = |at: usize| {
        let bytes = data.get(8 * at..8 * at + 8).expect("32 bytes");
        u64::from_le_bytes(bytes.try_into().expect("8 of them"))
    };
    let [d0, d1, d2, d3] = [0, 1, 2, 3].map(quadword);
    let host = d0 & (7 << 9 | 0x000f_ffff_ffff_f000);
    let root = (d0 >> 58 & 7) | (d1 >> 16 & 0xffff) | d1 >> 43;
    let rootless = d0 & 1 != 0 && d0 >> 55 & 1 != 0 && root == 0;
    if host != 0 || rootless || d2 >> 54 & 3 > 1 || d0 >> 56 & 3 == 3 {
        return refuse(libc::EINVAL);
    }
    if d2 >> 54 & 3 == 1 && !five_levels {
        return refuse(libc::EOPNOTSUPP);
    }
    let kept = [0x7ff0_0000_0000_0003, 0xffff_f800_ffff_ffff, 3 << 54, 0];
    for (quadword, kept) in [d0, d1, d2, d3].into_iter().zip(kept) {
        assert_eq!(
            quadword & !kept,
            0,
            "bits that say nothing: {d0:x} {d1:x} {d2:x} {d3:x}"
        );
    }
    Ok([d0, d1, d2, d3])
}

/// A device's way to tables.
pub struct Function {
    kernel: Arc<Fake>,
    device: u32,
}

impl Attach for Function {
    fn attach(&self, table: u32) -> io::Result<()> {
        let mut state = self.kernel.ask()?;
        match state.objects.get(table)? {
            Object::Ioas | Object::Hwpt { .. } => {}
            Object::Nested { viommu, .. } => {
                let named = |object: &Object| matches!(*object, Object::Vdevice { viommu: v, device: d, .. } if v == viommu && d == self.device);
                if !state.objects.all().any(named) {
                    return refuse(libc::EINVAL);
                }
            }
            _ => return refuse(libc::EINVAL),
        }
        state.objects.attach(self.device, Some(table));
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        let mut state = self.kernel.ask()?;
        state.objects.attach(self.device, None);
        Ok(())
    }
}
