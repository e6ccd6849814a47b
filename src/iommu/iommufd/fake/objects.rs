//! The fake kernel's objects, and who refers to whom.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::refuse;

/// An object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// A function that is bound.
    Device {
        /// The unit that it is behind.
        unit: u32,
        /// What its requests pass.
        attached: Option<u32>,
    },
    /// An address space.
    Ioas,
    /// Tables of the host's.
    Hwpt {
        /// What they map.
        ioas: u32,
        /// Tables of guests may be over them.
        nest_parent: bool,
    },
    /// A guest's unit.
    Viommu {
        /// The tables that map the guest's memory.
        parent: u32,
        /// The unit that serves it.
        unit: u32,
        /// Where its page is mapped; 0 where it has none.
        offset: u64,
        /// The number that the unit has for the guest.
        gid: u32,
    },
    /// Tables of a guest's.
    Nested {
        /// Of which.
        viommu: u32,
        /// The entry that they were made of.
        dte: [u64; 4],
    },
    /// A guest's name of a device.
    Vdevice {
        /// Of which guest's unit.
        viommu: u32,
        /// Of which function.
        device: u32,
        /// The guest's number of it.
        name: u64,
    },
    /// A ring.
    Queue {
        /// Of which guest's unit.
        viommu: u32,
        /// As the request had it.
        queue_type: u32,
        /// As the request had them.
        flags: u32,
        /// Guest physical.
        base: u64,
        /// The length code.
        length: u64,
    },
    /// An event queue.
    Events {
        /// Of which guest's unit.
        viommu: u32,
    },
}

impl Object {
    /// The objects that must stay as long as it is there.
    fn refers_to(self) -> [Option<u32>; 2] {
        match self {
            Self::Ioas => [None, None],
            Self::Device { attached, .. } => [attached, None],
            Self::Hwpt { ioas, .. } => [Some(ioas), None],
            Self::Viommu { parent, .. } => [Some(parent), None],
            Self::Nested { viommu, .. } | Self::Queue { viommu, .. } | Self::Events { viommu } => {
                [Some(viommu), None]
            }
            Self::Vdevice { viommu, device, .. } => [Some(viommu), Some(device)],
        }
    }
}

/// All of them, by number. The next has the lowest that is free, so that one of something that is gone soon is another's.
#[derive(Default)]
pub(super) struct Objects {
    made: BTreeMap<u32, Object>,
    /// Numbers that nothing has ever after.
    buried: BTreeSet<u32>,
}

impl Objects {
    pub(super) fn add(&mut self, object: Object) -> u32 {
        let free = |id: &u32| !self.made.contains_key(id) && !self.buried.contains(id);
        let id = (1..=u32::MAX >> 1).find(free).expect("some are free");
        self.made.insert(id, object);
        id
    }

    pub(super) fn get(&self, id: u32) -> io::Result<Object> {
        self.made
            .get(&id)
            .copied()
            .map_or_else(|| refuse(libc::ENOENT), Ok)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Object> {
        self.made.values()
    }

    pub(super) fn find(&self, wanted: impl Fn(&Object) -> bool) -> Option<u32> {
        let found = self.made.iter().find(|(_, object)| wanted(object));
        found.map(|(id, _)| *id)
    }

    /// Behind which unit `device` is.
    pub(super) fn unit(&self, device: u32) -> io::Result<u32> {
        match self.get(device)? {
            Object::Device { unit, .. } => Ok(unit),
            _ => refuse(libc::ENOENT),
        }
    }

    /// Of which unit `id`, a vIOMMU, is.
    pub(super) fn viommu(&self, id: u32) -> io::Result<u32> {
        match self.get(id)? {
            Object::Viommu { unit, .. } => Ok(unit),
            _ => refuse(libc::ENOENT),
        }
    }

    /// The lowest number that the units have for no guest; there is none with number 0.
    pub(super) fn free_guest(&self) -> u32 {
        let taken = |of: u32| {
            self.all()
                .any(|object| matches!(*object, Object::Viommu { gid, .. } if gid == of))
        };
        (1..).find(|gid| !taken(*gid)).expect("a few guests")
    }

    pub(super) fn is_used(&self, id: u32) -> bool {
        self.all().any(|object| object.refers_to().contains(&Some(id)))
    }

    pub(super) fn remove(&mut self, id: u32) {
        self.made.remove(&id);
    }

    /// Remove it by no request of its owner's, who must find that out.
    pub(super) fn bury(&mut self, id: u32) {
        self.made.remove(&id);
        self.buried.insert(id);
    }

    pub(super) fn attach(&mut self, device: u32, table: Option<u32>) {
        if let Some(Object::Device { attached, .. }) = self.made.get_mut(&device) {
            *attached = table;
        }
    }
}
