//! What other functions of the machine reach of one: the pages of its memory that the guest reaches without an exit.
//!
//! include/uapi/linux/vfio.h, VFIO_DEVICE_FEATURE_DMA_BUF. Each stretch is exported as a dma-buf once, and is in the address
//! space of guest RAM where the guest has it. What the kernel refuses is left out: a guest without peer-to-peer is one that
//! works.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::host::{HostFunction, Region};
use crate::iommu::iommufd::{Ioas, Shared};
use crate::platform::addr::GpaRange;

/// The way of one function's memory to the others.
pub(super) struct Peers {
    /// What messages call the function.
    name: String,
    space: Arc<Ioas>,
    /// Why they do not reach it was said.
    warned: AtomicBool,
    /// That they reach it was said.
    told: AtomicBool,
}

impl Peers {
    /// Those of the function called `name`, which are attached to `space`.
    pub(super) const fn new(name: String, space: Arc<Ioas>) -> Self {
        Self {
            name,
            space,
            warned: AtomicBool::new(false),
            told: AtomicBool::new(false),
        }
    }

    /// `len` bytes from `offset` of `region` of `host` on, to be shared; `None` where the host does not give them.
    pub(super) fn export(
        &self,
        host: &dyn HostFunction,
        region: Region,
        offset: u64,
        len: u64,
    ) -> Option<OwnedFd> {
        let exported = host.export(region, offset, len);
        exported
            .map_err(|error| self.refused(not_exported(&error), &error))
            .ok()
    }

    /// Have them reach all of `memory` at `range` for as long as the result lives; `None` where the host refuses it.
    pub(super) fn share(&self, range: GpaRange, memory: &OwnedFd) -> Option<Shared> {
        match self.space.share(range, memory.as_fd()) {
            Ok(shared) => {
                if !self.told.swap(true, Ordering::Relaxed) {
                    tracing::info!(name = self.name, %range, "other functions of the host reach memory of this one");
                }
                Some(shared)
            }
            Err(error) => {
                self.refused(
                    match error.raw_os_error() {
                        Some(libc::EINVAL) => {
                            "the host maps none of it there: its kernel may be too old for that, or its IOMMU may not reach it"
                        }
                        _ => "the host does not map its memory for devices",
                    },
                    &error,
                );
                None
            }
        }
    }

    /// Say once why they do not reach it, or not all of it.
    fn refused(&self, reason: &str, error: &io::Error) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(name = self.name, reason, %error, "other functions of the host do not reach the memory of this one; all else works");
        }
    }
}

/// Why a host that refuses with `error` exports no memory of a function.
pub(super) fn not_exported(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOTTY) => "the host's kernel has no VFIO_DEVICE_FEATURE_DMA_BUF",
        Some(libc::EOPNOTSUPP) => "the host's driver of it exports no memory",
        _ => "the host does not export its memory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::vfio::testing::{Asked, Device};
    use crate::iommu::iommufd::testing::{Call, Host};
    use crate::platform::addr::Gpa;
    use crate::platform::log::testing;
    use crate::platform::memory::GuestRam;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    /// What is logged while `work` is done with the peers of a function, on `host`.
    fn logged(host: &Arc<Host>, work: impl Fn(&Peers)) -> Vec<String> {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
        let space = Ioas::new(host.clone(), GuestRam::new(ram)).expect("made");
        let peers = Peers::new("vfio0".to_owned(), Arc::new(space));
        testing::logged(|| work(&peers))
    }

    #[test]
    fn a_host_that_exports_nothing_is_told_of_in_one_line_with_the_reason() {
        let reasons = [
            (libc::ENOTTY, "no VFIO_DEVICE_FEATURE_DMA_BUF"),
            (libc::EOPNOTSUPP, "driver of it exports no memory"),
            (libc::ENOMEM, "does not export its memory"),
        ];
        for (errno, reason) in reasons {
            let device = Device::nic();
            device.refuse(Asked::Export, errno);
            let lines = logged(&Host::new(), |peers| {
                for offset in [0, 0x1000] {
                    assert!(peers.export(&*device, Region::Bar(0), offset, 0x1000).is_none());
                }
            });
            let [line] = lines.as_slice() else {
                panic!("{lines:?}");
            };
            assert!(
                line.contains("WARN") && line.contains(reason) && line.contains("vfio0"),
                "{line}"
            );
        }
    }

    #[test]
    fn memory_that_is_mapped_and_memory_that_is_not_are_each_told_of_once() {
        let (host, device) = (Host::new(), Device::nic());
        let lines = logged(&host, |peers| {
            let memory = peers
                .export(&*device, Region::Bar(0), 0, 0x1000)
                .expect("exported");
            let share = |at| peers.share(GpaRange::new(Gpa(at), 0x1000).expect("valid"), &memory);
            let both = [share(0x1000), share(0x2000)];
            host.refuse(Call::MapFile, libc::EINVAL);
            assert!(share(0x3000).is_none() && share(0x4000).is_none());
            assert!(both.iter().all(Option::is_some));
        });
        let [reached, not] = lines.as_slice() else {
            panic!("{lines:?}");
        };
        assert!(
            reached.contains("INFO") && not.contains("WARN") && not.contains("too old"),
            "{lines:?}"
        );
    }
}
