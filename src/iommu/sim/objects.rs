//! What the host was asked to make, as the kernel keeps it: objects by number, who hangs on whom, and the checks.

use std::collections::BTreeMap;
use std::io;

use super::kernel::{FIRST_DOMAIN, GUEST};
use crate::iommu::amd::spec::dte::{Attribute, Dte, Guest, Host, Interrupt};
use crate::iommu::viommu::host::{HostDevice, ObjectId, Queue, QueueKind};
use crate::platform::addr::{Bdf, PAGE_SIZE};

/// The nest parent.
pub(super) const PARENT: ObjectId = ObjectId(1);
/// Tables that map nothing.
pub(super) const BLOCKED: ObjectId = ObjectId(2);

/// Reasons the kernel gives.
pub(super) mod refuse {
    use std::io;

    pub(in super::super) fn absent() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOENT)
    }

    pub(in super::super) fn invalid() -> io::Error {
        io::Error::from_raw_os_error(libc::EINVAL)
    }

    pub(in super::super) fn busy() -> io::Error {
        io::Error::from_raw_os_error(libc::EBUSY)
    }

    pub(in super::super) fn exists() -> io::Error {
        io::Error::from_raw_os_error(libc::EEXIST)
    }

    pub(in super::super) fn unsupported() -> io::Error {
        io::Error::from_raw_os_error(libc::EOPNOTSUPP)
    }

    pub(in super::super) fn exhausted() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOSPC)
    }
}

/// An object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Object {
    /// The guest's unit.
    Viommu,
    /// A device by the name the guest has for it.
    Vdevice { device: HostDevice, name: Bdf },
    /// Tables of the guest's.
    Nested {
        /// The guest's part of an entry.
        dte: Dte,
        /// What the host calls their domain.
        domain: u16,
    },
    /// A ring of the guest's.
    Queue(QueueKind),
}

/// All of them.
pub(super) struct Objects {
    next: u32,
    made: BTreeMap<ObjectId, Object>,
    /// By device: what it is attached to.
    pub(super) attached: Vec<ObjectId>,
    /// By the guest's number: the host's, and how many tables are in the domain.
    domains: BTreeMap<u16, (u16, u32)>,
    /// The host's numbers that no domain has any more, and the first that none ever had; `None` after the last.
    free: Vec<u16>,
    unused: Option<u16>,
}

impl Objects {
    /// Nothing is made, and `devices` devices reach nothing.
    pub(super) fn new(devices: usize) -> Self {
        Self {
            next: BLOCKED.0 + 1,
            made: BTreeMap::new(),
            attached: vec![BLOCKED; devices],
            domains: BTreeMap::new(),
            free: Vec::new(),
            unused: Some(FIRST_DOMAIN),
        }
    }

    /// Keep `object`.
    pub(super) fn add(&mut self, object: Object) -> ObjectId {
        let id = ObjectId(self.next);
        self.next += 1;
        self.made.insert(id, object);
        id
    }

    /// The object `id`, which is none of the two that are always there.
    pub(super) fn get(&self, id: ObjectId) -> io::Result<Object> {
        match self.made.get(&id) {
            Some(object) => Ok(*object),
            None if id == PARENT || id == BLOCKED => Err(refuse::invalid()),
            None => Err(refuse::absent()),
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = Object> + '_ {
        self.made.values().copied()
    }

    /// Whether `id` is the guest's unit.
    pub(super) fn viommu(&self, id: ObjectId) -> io::Result<()> {
        match self.get(id)? {
            Object::Viommu => Ok(()),
            _ => Err(refuse::invalid()),
        }
    }

    /// Whether there is a device `device`.
    pub(super) fn device(&self, device: HostDevice) -> io::Result<()> {
        let known = device.0 < self.attached.len();
        known.then_some(()).ok_or_else(refuse::absent)
    }

    /// What the guest calls `device`, if it has a name for it.
    pub(super) fn name(&self, device: HostDevice) -> Option<Bdf> {
        self.all().find_map(|object| match object {
            Object::Vdevice { device: of, name } if of == device => Some(name),
            _ => None,
        })
    }

    /// Whether `device` may be called `name`.
    pub(super) fn check_name(&self, device: HostDevice, name: Bdf) -> io::Result<()> {
        self.device(device)?;
        let clashes = |object| match object {
            Object::Vdevice {
                device: of,
                name: taken,
            } => of == device || taken == name,
            _ => false,
        };
        if self.all().any(clashes) {
            return Err(refuse::exists());
        }
        Ok(())
    }

    /// Whether `queue` can be made.
    pub(super) fn check_queue(&self, queue: &Queue) -> io::Result<()> {
        let base = queue.base.0;
        if !base.is_multiple_of(PAGE_SIZE) || base >> 52 != 0 || !(8..=15).contains(&queue.length) {
            return Err(refuse::invalid());
        }
        if self.all().any(|object| object == Object::Queue(queue.kind)) {
            return Err(refuse::exists());
        }
        Ok(())
    }

    /// The host's number for the guest's domain `domain`, which has one more table in it; whether it is new.
    pub(super) fn enter_domain(&mut self, domain: u16) -> io::Result<(u16, bool)> {
        if let Some((host, tables)) = self.domains.get_mut(&domain) {
            *tables += 1;
            return Ok((*host, false));
        }
        let host = self.free.pop().or_else(|| {
            let unused = self.unused?;
            self.unused = unused.checked_add(1);
            Some(unused)
        });
        let host = host.ok_or_else(refuse::exhausted)?;
        self.domains.insert(domain, (host, 1));
        Ok((host, true))
    }

    /// A table of the guest's domain `domain` went; whether it was the last.
    pub(super) fn leave_domain(&mut self, domain: u16) -> bool {
        let Some((host, tables)) = self.domains.get_mut(&domain) else {
            return false;
        };
        *tables -= 1;
        let last = *tables == 0;
        if last {
            self.free.push(*host);
            self.domains.remove(&domain);
        }
        last
    }

    /// Take `id` away, if nothing uses it.
    pub(super) fn remove(&mut self, id: ObjectId) -> io::Result<Object> {
        if id == PARENT || id == BLOCKED {
            return Err(refuse::busy());
        }
        let object = self.get(id)?;
        let nested = |table: &ObjectId| matches!(self.made.get(table), Some(Object::Nested { .. }));
        let used = match object {
            Object::Viommu => self.made.len() > 1,
            Object::Vdevice { device, .. } => self.attached.get(device.0).is_some_and(nested),
            Object::Nested { .. } => self.attached.contains(&id),
            Object::Queue(_) => false,
        };
        if used {
            return Err(refuse::busy());
        }
        self.made.remove(&id);
        Ok(object)
    }
}

/// What the kernel lets a guest say in an entry; the rest is dropped.
pub(super) fn guest_part(dte: &Dte) -> io::Result<Dte> {
    let Dte {
        host,
        guest,
        interrupt,
        ..
    } = *dte;
    if host.mode() != 0 || host.root() != 0 || !host.v() {
        return Err(refuse::invalid());
    }
    if host.gv() && dte.gcr3_root() == 0 || host.glx() == 3 {
        return Err(refuse::invalid());
    }
    match interrupt.guest_paging_mode() {
        0 => {}
        // The unit has no tables of five levels.
        1 => return Err(refuse::unsupported()),
        _ => return Err(refuse::invalid()),
    }
    let kept = Dte {
        host: Host::new()
            .with_ppr(host.ppr())
            .with_giov(host.giov())
            .with_gv(host.gv())
            .with_glx(host.glx()),
        guest: Guest::new().with_domain(guest.domain()),
        interrupt: Interrupt::new().with_guest_paging_mode(interrupt.guest_paging_mode()),
        ..Dte::default()
    };
    Ok(kept.with_gcr3_root(dte.gcr3_root()))
}

/// The entry of a device that the guest calls `name`: the guest's part over `parent`, in the host's domain `domain`. Whether
/// the device may translate by itself is as in `parent`, whatever the guest says.
pub(super) fn nested_entry(parent: &Dte, part: &Dte, domain: u16, name: Bdf) -> Dte {
    let host = Host::from_bits(parent.host.into_bits() | part.host.into_bits());
    Dte {
        host,
        guest: part.guest.with_domain(domain).with_iotlb(parent.guest.iotlb()),
        interrupt: part.interrupt,
        attribute: Attribute::new()
            .with_vimu_en(true)
            .with_guest_id(GUEST)
            .with_guest_device_id(name.requester_id()),
    }
}
