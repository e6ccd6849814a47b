//! The host's IOMMUs as its kernel gives them out: /dev/iommu and the address spaces made there.
//!
//! Documentation/userspace-api/iommufd.rst. An object of the kernel's lives exactly as long as its handle here.
//! What the kernel is asked passes one seam, [`Requests`], so that tests refuse any of it.

pub mod abi;
#[cfg(any(test, fuzzing))]
pub mod fake;
mod ioas;
mod kernel;
mod shared;
#[cfg(any(test, fuzzing))]
pub mod testing;
mod uapi;
pub mod viommu;

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use crate::iommu::amd::request::Access;
use crate::platform::addr::GpaRange;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

pub use abi::{Abi, AbiError};
pub use ioas::{Ioas, Memlock};
pub use kernel::Kernel;
pub use shared::{Copies, Shared};

/// Where it is.
pub const NODE: &str = "/dev/iommu";

/// What is asked of /dev/iommu; or of a [`super::container::Container`], which has one address space and no copies.
pub trait Requests: Send + Sync {
    /// Make an address space with nothing in it; its number.
    fn alloc(&self) -> io::Result<u32>;

    /// Destroy object `id`, which nothing uses any more.
    fn destroy(&self, id: u32) -> io::Result<()>;

    /// Map region number `region` of `ram` where the guest has it. `ram` stays until the address space is destroyed.
    fn map(&self, ioas: u32, ram: &GuestRam, region: usize) -> io::Result<()>;

    /// Map the first bytes of `file`, a dma-buf of a device's memory, at `range`: whole pages, for reading and writing.
    fn map_file(&self, ioas: u32, file: BorrowedFd<'_>, range: GpaRange) -> io::Result<()>;

    /// What may be mapped, with the devices attached now.
    fn windows(&self, ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>>;

    /// Map in one address space what another has mapped, at other addresses or the same. Nothing is mapped there yet.
    fn copy(&self, copy: &Copied) -> io::Result<()>;

    /// Unmap all that lies in `range` of `ioas`: whole mappings, as they were made, and at least one.
    fn unmap(&self, ioas: u32, range: RangeInclusive<u64>) -> io::Result<()>;
}

/// What [`Requests::copy`] maps: whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// From which address space.
    pub from: u32,
    /// The first byte there, which is mapped with all that follow.
    pub source: u64,
    /// Into which.
    pub to: u32,
    /// The first byte there.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// What devices may do there; something.
    pub access: Access,
}

/// A function of the host's whose requests pass address spaces.
pub trait Attach: Send + Sync {
    /// Requests of the function reach the address space with number `ioas` from here on, and no other. Where it is
    /// attached already this replaces the one for the other. One that came by its group is attached to its container's
    /// address space, always.
    fn attach(&self, ioas: u32) -> io::Result<()>;

    /// Requests of the function reach nothing from here on; those of one that came by its group, from when it is closed.
    fn detach(&self) -> io::Result<()>;
}

/// A function of the host's that can be kept from issuing requests at all.
pub trait Silence: Attach {
    /// The function issues no requests from here on, whatever its guest lets it, until it is attached again.
    ///
    /// # Errors
    /// When it does not take that.
    fn silence(&self) -> io::Result<()>;
}

/// An open /dev/iommu.
pub struct Iommufd {
    file: File,
}

impl Iommufd {
    /// Open [`NODE`].
    ///
    /// # Errors
    /// What the host refused, and what to do about it.
    pub fn open() -> Result<Arc<Self>, HostError> {
        Self::open_at(Path::new(NODE))
    }

    fn open_at(path: &Path) -> Result<Arc<Self>, HostError> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|source| not_opened(path, source))?;
        Ok(Self::of_descriptor(file))
    }

    /// The /dev/iommu that somebody else opened.
    #[must_use]
    pub fn of_descriptor(file: File) -> Arc<Self> {
        Arc::new(Self { file })
    }
}

/// Why `path` could not be opened, and what to do about it.
fn not_opened(path: &Path, source: io::Error) -> HostError {
    let what = match source.kind() {
        io::ErrorKind::NotFound => {
            "; is the module iommufd loaded, and was the host's kernel built with CONFIG_IOMMUFD?"
        }
        io::ErrorKind::PermissionDenied => "; it belongs to root unless a udev rule says otherwise",
        _ => "",
    };
    HostError::new(format!("open {}{what}", path.display()), source)
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Requests for Iommufd {
    fn alloc(&self) -> io::Result<u32> {
        uapi::alloc(&self.file)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        uapi::destroy(&self.file, id)
    }

    fn map(&self, ioas: u32, ram: &GuestRam, region: usize) -> io::Result<()> {
        uapi::map_ram(&self.file, ioas, ram, region)
    }

    fn map_file(&self, ioas: u32, file: BorrowedFd<'_>, range: GpaRange) -> io::Result<()> {
        uapi::map_file(&self.file, ioas, file, range)
    }

    fn windows(&self, ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
        uapi::windows(&self.file, ioas)
    }

    fn copy(&self, copy: &Copied) -> io::Result<()> {
        uapi::copy(&self.file, copy)
    }

    fn unmap(&self, ioas: u32, range: RangeInclusive<u64>) -> io::Result<()> {
        uapi::unmap(&self.file, ioas, range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_the_node_is_told_what_makes_it() {
        let error = Iommufd::open_at(Path::new("/nonexistent/iommu"))
            .err()
            .expect("absent");
        assert_eq!(
            error.to_string(),
            "cannot open /nonexistent/iommu; is the module iommufd loaded, and was the host's kernel built with \
             CONFIG_IOMMUFD?"
        );
    }

    #[test]
    fn who_may_not_open_it_is_told_whose_it_is_and_other_reasons_stand_alone() {
        let text = |errno| not_opened(Path::new(NODE), io::Error::from_raw_os_error(errno)).to_string();
        assert_eq!(
            text(libc::EACCES),
            "cannot open /dev/iommu; it belongs to root unless a udev rule says otherwise"
        );
        assert_eq!(text(libc::EMFILE), "cannot open /dev/iommu");
    }

    #[test]
    fn a_file_that_is_no_iommufd_refuses_every_request() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("iommu");
        std::fs::write(&path, "").expect("written");
        let iommufd = Iommufd::open_at(&path).expect("a file");
        assert!(iommufd.alloc().is_err() && iommufd.windows(1).is_err() && iommufd.destroy(1).is_err());
    }
}
