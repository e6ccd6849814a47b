//! The host's IOMMUs as kernels without iommufd give them out: a VFIO container.
//!
//! Documentation/driver-api/vfio.rst. A container is one I/O address space. It is shared by the IOMMU groups that were
//! put into it, and a group leaves it only when none of its functions is open any more: a function cannot pass from one
//! address space to another. That is enough to give functions guest RAM, and too little for one that is behind an IOMMU of
//! the guest's, so that only [`super::iommufd`] serves those.

mod uapi;

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vfio_bindings::bindings::vfio as abi;

use super::iommufd::{Copied, Requests};
use crate::platform::addr::GpaRange;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

/// Where it is.
pub const NODE: &str = "/dev/vfio/vfio";

/// The number of a container's only address space.
const SPACE: u32 = 1;
/// What one request unmaps: all but the last page, which no guest RAM is mapped to. No length says the whole.
const EVERYTHING: RangeInclusive<u64> = 0..=u64::MAX - 0x1000;

/// An open container.
pub struct Container {
    file: File,
    /// There is an IOMMU driver, which there is from the first group on.
    translates: Mutex<bool>,
    /// Its address space is somebody's.
    taken: AtomicBool,
}

impl Container {
    /// Open [`NODE`].
    ///
    /// # Errors
    /// What the host refused, and what to do about it; or when it has none of the IOMMU drivers that are known here.
    pub fn open() -> Result<Arc<Self>, HostError> {
        Self::open_at(Path::new(NODE))
    }

    fn open_at(path: &Path) -> Result<Arc<Self>, HostError> {
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(|source| not_opened(path, source))?;
        let path = path.display();
        let version = uapi::api_version(&file)
            .map_err(|source| HostError::new(format!("ask {path} for its version"), source))?;
        let known = |kind| {
            uapi::has(&file, kind)
                .map_err(|source| HostError::new(format!("ask {path} for its IOMMU drivers"), source))
        };
        usable(&path, version, known)?;
        Ok(Arc::new(Self::of(file)))
    }

    /// One of an open file, which may be none.
    pub(crate) const fn of(file: File) -> Self {
        Self {
            file,
            translates: Mutex::new(false),
            taken: AtomicBool::new(false),
        }
    }

    /// Have the groups that are in it translated. To be called when one was put into it: the driver comes with the first.
    ///
    /// # Errors
    /// The kernel's: `EPERM` where interrupts are not remapped.
    pub fn translate(&self) -> io::Result<()> {
        let mut translates = self.translates.lock().unwrap_or_else(PoisonError::into_inner);
        if !*translates {
            uapi::set_iommu(&self.file, abi::VFIO_TYPE1v2_IOMMU)?;
            *translates = true;
        }
        Ok(())
    }
}

/// Why `path` could not be opened, and what to do about it.
fn not_opened(path: &Path, source: io::Error) -> HostError {
    let what = match source.kind() {
        io::ErrorKind::NotFound => {
            "; is the module vfio loaded, and was the host's kernel built with CONFIG_VFIO_CONTAINER?"
        }
        io::ErrorKind::PermissionDenied => "; it belongs to root unless a udev rule says otherwise",
        _ => "",
    };
    HostError::new(format!("open {}{what}", path.display()), source)
}

/// Whether a container of `version` is one of those known here, with an IOMMU driver of `has`.
fn usable(
    path: &dyn Display,
    version: i32,
    has: impl FnOnce(u32) -> Result<bool, HostError>,
) -> Result<(), HostError> {
    if i64::from(version) != i64::from(abi::VFIO_API_VERSION) {
        let reason = io::Error::other(format!(
            "its version is {version}, and {} is known here",
            abi::VFIO_API_VERSION
        ));
        return Err(HostError::new(format!("use {path}"), reason));
    }
    if !has(abi::VFIO_TYPE1v2_IOMMU)? {
        let reason = io::Error::other("there is no IOMMU driver of type 1, version 2");
        return Err(HostError::new(
            format!("use {path}; is the module vfio_iommu_type1 loaded?"),
            reason,
        ));
    }
    Ok(())
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Requests for Container {
    fn alloc(&self) -> io::Result<u32> {
        if self.taken.swap(true, Ordering::AcqRel) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(SPACE)
    }

    fn destroy(&self, _id: u32) -> io::Result<()> {
        match uapi::unmap(&self.file, EVERYTHING) {
            // The driver went with the last group, and took all mappings with it.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            _ => self.taken.store(false, Ordering::Release),
        }
        Ok(())
    }

    fn map(&self, _ioas: u32, ram: &GuestRam, region: usize) -> io::Result<()> {
        uapi::map_ram(&self.file, ram, region)
    }

    fn map_file(&self, _ioas: u32, _file: BorrowedFd<'_>, _range: GpaRange) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "a container takes no dma-buf; that takes /dev/iommu",
        ))
    }

    fn windows(&self, _ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
        let words = uapi::info(&self.file)?;
        windows_of(&words).ok_or_else(|| {
            io::Error::other("its kernel does not tell (VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, Linux 5.4)")
        })
    }

    fn copy(&self, _copy: &Copied) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unmap(&self, _ioas: u32, range: RangeInclusive<u64>) -> io::Result<()> {
        match uapi::unmap(&self.file, range)? {
            0 => Err(io::ErrorKind::NotFound.into()),
            _ => Ok(()),
        }
    }
}

/// The windows that a filled-in structure tells of; `None` where it tells of none. Its capability: header, how many,
/// reserved, then first and last address of each.
fn windows_of(words: &[u32]) -> Option<Vec<RangeInclusive<u64>>> {
    let flags = *words.get(1)?;
    if flags & abi::VFIO_IOMMU_INFO_CAPS == 0 {
        return None;
    }
    let found = capability(words, *words.get(4)?, abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)?;
    let count = usize::try_from(*found.get(2)?).ok()?;
    let ranges = found.get(4..)?.chunks_exact(4).take(count);
    Some(
        ranges
            .map(|words| wide(words[0], words[1])..=wide(words[2], words[3]))
            .collect(),
    )
}

/// Two words as the 64-bit field they are.
#[must_use]
pub const fn wide(low: u32, high: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

/// The capability `id` of a structure of VFIO's whose first one is `first` bytes into it: its words, and all behind them.
/// Each begins with its ID and version, and the offset of the next.
#[must_use]
pub fn capability(words: &[u32], first: u32, id: u32) -> Option<&[u32]> {
    let index = |offset: u32| usize::try_from(offset).ok().map(|offset| offset / 4);
    let mut at = index(first)?;
    // The chain leads forwards only, so that it ends.
    loop {
        let (header, next) = (*words.get(at)?, index(*words.get(at + 1)?)?);
        if header & 0xffff == id {
            return words.get(at..);
        }
        if next <= at {
            return None;
        }
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::request::Access;
    use crate::platform::addr::Gpa;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const CAPS: u32 = abi::VFIO_IOMMU_INFO_CAPS;

    #[test]
    fn a_host_without_the_node_is_told_what_makes_it() {
        let error = Container::open_at(Path::new("/nonexistent/vfio")).err();
        assert_eq!(
            error.expect("absent").to_string(),
            "cannot open /nonexistent/vfio; is the module vfio loaded, and was the host's kernel built with \
             CONFIG_VFIO_CONTAINER?"
        );
    }

    #[test]
    fn a_file_that_is_no_container_is_refused_when_it_is_opened() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = Container::open_at(file.path()).err().expect("none");
        assert!(error.to_string().ends_with(" for its version"), "{error}");
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn who_may_not_open_it_is_told_whose_it_is_and_other_reasons_stand_alone() {
        let text = |errno| not_opened(Path::new(NODE), io::Error::from_raw_os_error(errno)).to_string();
        assert_eq!(
            text(libc::EACCES),
            "cannot open /dev/vfio/vfio; it belongs to root unless a udev rule says otherwise"
        );
        assert_eq!(text(libc::EMFILE), "cannot open /dev/vfio/vfio");
    }

    #[test]
    fn a_container_of_another_version_or_without_a_driver_is_refused_with_what_it_lacks() {
        let refused = |version, has: fn(u32) -> Result<bool, HostError>| {
            usable(&NODE, version, has).expect_err("not usable")
        };
        let error = refused(1, |_| panic!("nobody asks further"));
        assert_eq!(error.to_string(), "cannot use /dev/vfio/vfio");
        assert_eq!(error.source.to_string(), "its version is 1, and 0 is known here");
        let error = refused(0, |_| Ok(false));
        assert_eq!(
            error.to_string(),
            "cannot use /dev/vfio/vfio; is the module vfio_iommu_type1 loaded?"
        );
        let error = refused(0, |_| Err(HostError::new("ask", io::ErrorKind::Other)));
        assert_eq!(error.to_string(), "cannot ask");
        let asked_for = |kind| Ok(kind == abi::VFIO_TYPE1v2_IOMMU);
        usable(&NODE, 0, asked_for).expect("usable");
    }

    #[test]
    fn there_is_one_address_space_and_no_copies() {
        let container = Container::of(tempfile::tempfile().expect("a file"));
        assert_eq!(container.alloc().expect("the first"), SPACE);
        let second = container.alloc().expect_err("there is one");
        assert_eq!(second.kind(), io::ErrorKind::Unsupported);
        let copied = Copied {
            from: SPACE,
            source: 0,
            to: SPACE,
            iova: 0,
            len: 0x1000,
            access: Access::BOTH,
        };
        let copy = container.copy(&copied).expect_err("there is no such request");
        assert_eq!(copy.kind(), io::ErrorKind::Unsupported);
        let range = GpaRange::new(Gpa(0xe000_0000), 0x1000).expect("valid");
        let shared = container.map_file(SPACE, container.as_fd(), range);
        let shared = shared.expect_err("there is no such request");
        assert_eq!(
            shared.to_string(),
            "a container takes no dma-buf; that takes /dev/iommu"
        );
    }

    #[test]
    fn what_the_kernel_refuses_changes_nothing() {
        let container = Container::of(tempfile::tempfile().expect("a file"));
        assert!(container.translate().is_err());
        assert!(!*container.translates.lock().expect("nobody panicked"));
        container.alloc().expect("the first");
        assert!(container.destroy(SPACE).is_err());
        assert!(container.alloc().is_err(), "what is mapped still is");
        assert!(container.windows(SPACE).is_err() && container.unmap(SPACE, 0..=0xfff).is_err());
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
        assert!(container.map(SPACE, &GuestRam::new(ram), 0).is_err());
    }

    #[test]
    fn windows_are_those_of_the_capability_behind_others() {
        // DMA_AVAIL first, then two windows.
        let words = [
            88,
            CAPS,
            0x1000,
            0,
            24,
            0,
            0x1_0003,
            36,
            0xffff,
            0x1_0001,
            0,
            2,
            0,
            0,
            0,
            0xfedf_ffff,
            0,
            0xfef0_0000,
            0,
            u32::MAX,
            0xff,
        ];
        assert_eq!(
            windows_of(&words).expect("told"),
            [0..=0xfedf_ffff, 0xfef0_0000..=0xff_ffff_ffff]
        );
        // One fewer than it says.
        assert_eq!(windows_of(&words[..20]).expect("told").len(), 1);
    }

    #[test]
    fn a_kernel_that_tells_of_no_windows_or_nonsense_gives_none() {
        assert_eq!(windows_of(&[]), None);
        assert_eq!(windows_of(&[24, 0, 0x1000, 0, 0, 0]), None);
        assert_eq!(windows_of(&[24, CAPS, 0x1000, 0, 24, 0]), None);
        // A chain that leads to itself, and one that leads out.
        assert_eq!(windows_of(&[32, CAPS, 0, 0, 24, 0, 0x1_0003, 24]), None);
        assert_eq!(windows_of(&[32, CAPS, 0, 0, 24, 0, 0x1_0003, 4000]), None);
    }
}
