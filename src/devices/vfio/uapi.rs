//! The requests of a VFIO device, and of a group of them.
//!
//! Documentation/driver-api/vfio.rst and include/uapi/linux/vfio.h. Every structure that is used here consists of
//! 32-bit words (64-bit fields are two of them), begins with its own size in bytes, and holds no address.

#![expect(unsafe_code, reason = "requests to the kernel")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use vfio_bindings::bindings::vfio as abi;

/// A request whose structure is such words. No other may be added: [`issue`] relies on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// VFIO_GROUP_GET_STATUS, of a group.
    GetGroupStatus = 3,
    /// VFIO_DEVICE_GET_INFO.
    GetInfo = 7,
    /// VFIO_DEVICE_GET_REGION_INFO.
    GetRegionInfo = 8,
    /// VFIO_DEVICE_GET_IRQ_INFO.
    GetIrqInfo = 9,
    /// VFIO_DEVICE_SET_IRQS.
    SetIrqs = 10,
    /// VFIO_DEVICE_GET_PCI_HOT_RESET_INFO.
    GetHotResetInfo = 12,
    /// VFIO_DEVICE_PCI_HOT_RESET.
    HotReset = 13,
    /// VFIO_DEVICE_FEATURE; of all features only those of words.
    Feature = 17,
    /// VFIO_DEVICE_BIND_IOMMUFD.
    BindIommufd = 18,
    /// VFIO_DEVICE_ATTACH_IOMMUFD_PT.
    AttachIommufd = 19,
    /// VFIO_DEVICE_DETACH_IOMMUFD_PT.
    DetachIommufd = 20,
}

const fn number(request: u32) -> libc::c_ulong {
    (abi::VFIO_TYPE as libc::c_ulong) << 8 | (abi::VFIO_BASE + request) as libc::c_ulong
}

/// Issue `request` on `device` with the structure `words`, whose first word becomes its size.
pub(super) fn issue(device: &File, request: Request, words: &mut [u32]) -> io::Result<()> {
    answer(device, request, words).map(drop)
}

/// The same; what the call returned, which is no error.
pub(super) fn answer(device: &File, request: Request, words: &mut [u32]) -> io::Result<libc::c_int> {
    let size = u32::try_from(size_of_val(words)).map_err(io::Error::other)?;
    *words.first_mut().ok_or(io::ErrorKind::InvalidInput)? = size;
    // SAFETY: the descriptor is open for as long as `device` lives; each of these requests reads and writes at most as
    // many bytes as the structure's first word says, which is the length of the live, exclusive `words`, and what is in
    // it is no address.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), number(request as u32), words.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// `len` bytes from `offset` of region number `region` of `device` on, whole pages, as a dma-buf of their own.
pub(super) fn export(device: &File, region: u32, offset: u64, len: u64) -> io::Result<OwnedFd> {
    let halves = |value: u64| {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
    };
    let ([offset_low, offset_high], [len_low, len_high]) = (halves(offset), halves(len));
    let open = (libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned();
    // argsz, flags; region, flags of the file, flags, how many ranges; the range.
    let mut words = [
        0,
        abi::VFIO_DEVICE_FEATURE_GET | abi::VFIO_DEVICE_FEATURE_DMA_BUF,
        region,
        open,
        0,
        1,
        offset_low,
        offset_high,
        len_low,
        len_high,
    ];
    let descriptor = answer(device, Request::Feature, &mut words)?;
    // SAFETY: the kernel has just opened this descriptor for us, which is what this feature returns, and nobody else
    // knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Reset `device`.
pub(super) fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `device` lives; the request takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), number(VFIO_DEVICE_RESET)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// VFIO_DEVICE_RESET.
const VFIO_DEVICE_RESET: u32 = 11;

/// VFIO_GROUP_SET_CONTAINER.
const VFIO_GROUP_SET_CONTAINER: u32 = 4;
/// VFIO_GROUP_GET_DEVICE_FD.
const VFIO_GROUP_GET_DEVICE_FD: u32 = 6;

/// Put `group` into `container`.
pub(super) fn set_container(group: &File, container: BorrowedFd<'_>) -> io::Result<()> {
    let descriptor: libc::c_int = container.as_raw_fd();
    // SAFETY: both descriptors are open for as long as they are borrowed here; the request reads the one number that
    // its argument points at, which lives until the call returns.
    let result = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            number(VFIO_GROUP_SET_CONTAINER),
            &raw const descriptor,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Open the device called `name` of `group`.
pub(super) fn group_device(group: &File, name: &str) -> io::Result<File> {
    let name = CString::new(name)?;
    // SAFETY: the descriptor is open for as long as `group` lives; the request reads its argument up to the zero behind
    // it, which lives until the call returns.
    let result = unsafe { libc::ioctl(group.as_raw_fd(), number(VFIO_GROUP_GET_DEVICE_FD), name.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened this descriptor for us, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(result) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn requests_have_the_numbers_of_the_kernels_interface() {
        assert_eq!(number(Request::GetInfo as u32), 0x3b6b);
        assert_eq!(number(VFIO_DEVICE_RESET), 0x3b6f);
        assert_eq!(number(Request::GetHotResetInfo as u32), 0x3b70);
        assert_eq!(number(Request::HotReset as u32), 0x3b71);
        assert_eq!(number(Request::Feature as u32), 0x3b75);
        assert_eq!(number(Request::BindIommufd as u32), 0x3b76);
        assert_eq!(number(Request::DetachIommufd as u32), 0x3b78);
        assert_eq!(number(Request::GetGroupStatus as u32), 0x3b67);
        assert_eq!(number(VFIO_GROUP_SET_CONTAINER), 0x3b68);
        assert_eq!(number(VFIO_GROUP_GET_DEVICE_FD), 0x3b6a);
    }

    #[test]
    fn a_file_that_is_no_device_refuses_with_the_kernels_reason() {
        let file = tempfile::tempfile().expect("a file");
        let refused = issue(&file, Request::GetInfo, &mut [0; 6]).expect_err("no device");
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(
            reset(&file).expect_err("no device").raw_os_error(),
            Some(libc::ENOTTY)
        );
        let exported = export(&file, 0, 0, 0x1000).expect_err("no device");
        assert_eq!(exported.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_file_that_is_no_group_refuses_with_the_kernels_reason() {
        let file = tempfile::tempfile().expect("a file");
        let enotty = Some(libc::ENOTTY);
        let refused = set_container(&file, file.as_fd()).expect_err("no group");
        assert_eq!(refused.raw_os_error(), enotty);
        let refused = group_device(&file, "0000:41:00.0").expect_err("no group");
        assert_eq!(refused.raw_os_error(), enotty);
        let refused = group_device(&file, "41\0").expect_err("no name");
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_first_word_is_the_size() {
        let file = tempfile::tempfile().expect("a file");
        let mut words = [7; 5];
        assert!(issue(&file, Request::SetIrqs, &mut words).is_err());
        assert_eq!(words, [20, 7, 7, 7, 7]);
        assert!(issue(&file, Request::SetIrqs, &mut []).is_err());
    }
}
