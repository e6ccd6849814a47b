//! Memory of devices in the address space that has guest RAM: what lets functions of the host reach one another.
//!
//! Documentation/userspace-api/iommufd.rst and Documentation/driver-api/dma-buf.rst. The kernel maps a dma-buf of VFIO's that
//! is one range, and takes the mapping away by itself where the device stops answering: at a reset, and when it is closed. Such
//! a mapping leads nowhere from then on, and stays in the way until it is unmapped.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Ioas;
use crate::platform::addr::GpaRange;

/// Whoever copies from an address space, and hears of what comes to it and goes.
pub trait Copies: Send + Sync {
    /// Memory of a device is at `range` from here on.
    fn shared(&self, range: GpaRange);

    /// It goes: once this returned nothing there is mapped by a copy.
    fn withdrawn(&self, range: GpaRange);
}

/// What of an address space is memory of devices, and who copies it.
#[derive(Default)]
pub(super) struct Sharing {
    ranges: Mutex<Vec<GpaRange>>,
    copies: Mutex<Vec<Weak<dyn Copies>>>,
}

impl Sharing {
    fn ranges(&self) -> MutexGuard<'_, Vec<GpaRange>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Have all copies hear something. No lock is held while they do.
    fn tell(&self, what: impl Fn(&dyn Copies)) {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        copies.retain(|copy| copy.strong_count() > 0);
        let hearing: Vec<_> = copies.iter().filter_map(Weak::upgrade).collect();
        drop(copies);
        hearing.iter().for_each(|copy| what(&**copy));
    }
}

impl Ioas {
    /// Have the devices that are attached reach the memory of one at `range`, as the guest does: all of the dma-buf `memory`,
    /// for as long as the result lives.
    ///
    /// # Errors
    /// The host's reason. Nothing is mapped then.
    pub fn share(self: &Arc<Self>, range: GpaRange, memory: BorrowedFd<'_>) -> io::Result<Shared> {
        self.requests.map_file(self.id, memory, range)?;
        let sharing = &self.sharing;
        sharing.ranges().push(range);
        sharing.tell(|copy| copy.shared(range));
        Ok(Shared {
            space: self.clone(),
            range,
        })
    }

    /// Where memory of devices is.
    #[must_use]
    pub fn shared(&self) -> Vec<GpaRange> {
        self.sharing.ranges().clone()
    }

    /// Have `copies` hear of what is shared and withdrawn from here on.
    pub fn tell(&self, copies: Weak<dyn Copies>) {
        let mut list = self.sharing.copies.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(copies);
    }
}

/// Memory of a device that others reach; dropping it takes it away from all of them.
#[must_use]
pub struct Shared {
    space: Arc<Ioas>,
    range: GpaRange,
}

impl Drop for Shared {
    fn drop(&mut self) {
        let Self { space, range } = self;
        // In this order nobody copies it once more after copies went.
        space.sharing.ranges().retain(|other| other != range);
        space.sharing.tell(|copy| copy.withdrawn(*range));
        let all = range.start().0..=range.last().0;
        if let Err(error) = space.requests.unmap(space.id, all) {
            tracing::error!(%range, %error, "the host does not unmap memory of a device; other functions reach it until it is reset or closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::iommufd::testing::{Call, DEVICE, Host};
    use crate::platform::addr::Gpa;
    use crate::platform::memory::GuestRam;
    use std::fs::File;
    use std::os::fd::AsFd;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const AT: u64 = 0xe000_0000;

    fn range() -> GpaRange {
        GpaRange::new(Gpa(AT), 0x4000).expect("valid")
    }

    fn file() -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(0x4000).expect("of that length");
        file
    }

    fn space(host: &Arc<Host>) -> Arc<Ioas> {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
        Arc::new(Ioas::new(host.clone(), GuestRam::new(ram)).expect("made"))
    }

    /// What was heard, and what the address space had mapped then.
    struct Hearing {
        host: Arc<Host>,
        space: u32,
        heard: Mutex<Vec<(bool, GpaRange, usize)>>,
    }

    impl Hearing {
        fn hear(&self, came: bool, range: GpaRange) {
            let mapped = self.host.mapped(self.space).len();
            self.heard
                .lock()
                .expect("a test's own")
                .push((came, range, mapped));
        }
    }

    impl Copies for Hearing {
        fn shared(&self, range: GpaRange) {
            self.hear(true, range);
        }

        fn withdrawn(&self, range: GpaRange) {
            self.hear(false, range);
        }
    }

    #[test]
    fn memory_is_where_the_guest_has_it_until_it_is_dropped_and_copies_go_before_it() {
        let host = Host::new();
        let space = space(&host);
        let hearing = Arc::new(Hearing {
            host: host.clone(),
            space: space.id(),
            heard: Mutex::default(),
        });
        space.tell(Arc::downgrade(&hearing) as Weak<dyn Copies>);
        let shared = space.share(range(), file().as_fd()).expect("mapped");
        assert_eq!(space.shared(), [range()]);
        let (memory, _) = host.reaches(space.id(), AT + 0x3fff).expect("mapped");
        assert_eq!(memory, DEVICE + 0x3fff);
        drop(shared);
        assert!(space.shared().is_empty() && host.mapped(space.id()).is_empty());
        let heard = hearing.heard.lock().expect("a test's own");
        assert_eq!(*heard, [(true, range(), 1), (false, range(), 1)]);
    }

    #[test]
    fn what_the_host_refuses_to_map_is_not_shared_and_nobody_hears_of_it() {
        let host = Host::new();
        let space = space(&host);
        host.refuse(Call::MapFile, libc::EOPNOTSUPP);
        let error = space.share(range(), file().as_fd()).err().expect("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        assert!(space.shared().is_empty() && host.mapped(space.id()).is_empty());
        assert_eq!(host.count(Call::Unmap), 0);
    }

    #[test]
    fn memory_that_the_host_does_not_unmap_is_no_panic_and_copied_by_nobody() {
        let host = Host::new();
        let space = space(&host);
        let shared = space.share(range(), file().as_fd()).expect("mapped");
        host.refuse(Call::Unmap, libc::EIO);
        drop(shared);
        assert!(space.shared().is_empty());
        // It goes with the address space at the latest.
        drop(space);
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn an_address_space_stays_for_as_long_as_memory_is_shared_in_it() {
        let host = Host::new();
        let space = space(&host);
        let shared = space.share(range(), file().as_fd()).expect("mapped");
        drop(space);
        assert_eq!(host.spaces().len(), 1);
        drop(shared);
        assert!(host.spaces().is_empty());
    }
}
