//! The requests of a VFIO container whose IOMMUs are of type 1.
//!
//! Documentation/driver-api/vfio.rst and include/uapi/linux/vfio.h.

#![expect(
    unsafe_code,
    reason = "requests to the kernel, one of which carries an address of this process"
)]

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;

use vfio_bindings::bindings::vfio as abi;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::platform::memory::GuestRam;

/// VFIO_GET_API_VERSION.
const GET_API_VERSION: u32 = 0;
/// VFIO_CHECK_EXTENSION.
const CHECK_EXTENSION: u32 = 1;
/// VFIO_SET_IOMMU.
const SET_IOMMU: u32 = 2;
/// VFIO_IOMMU_GET_INFO.
const GET_INFO: u32 = 12;
/// VFIO_IOMMU_MAP_DMA.
const MAP_DMA: u32 = 13;
/// VFIO_IOMMU_UNMAP_DMA.
const UNMAP_DMA: u32 = 14;

/// Words of what [`info`] gives without capabilities: argsz, flags, page sizes (two), offset of the first one, padding.
const INFO_WORDS: usize = 6;
/// The most words of it with capabilities: a few dozen windows.
const MOST_INFO_WORDS: usize = 4096;

const fn number(request: u32) -> libc::c_ulong {
    (abi::VFIO_TYPE as libc::c_ulong) << 8 | (abi::VFIO_BASE + request) as libc::c_ulong
}

/// Bytes of a request's structure, as its first field says them.
fn size_of_request<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a request has a few dozen bytes")
}

/// What the kernel answered: not negative, or its reason.
fn answered(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Issue a request whose argument is a number.
fn say(container: &File, request: u32, value: u32) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is open for as long as `container` lives; the callers' requests take a number, or nothing,
    // as argument, never an address.
    answered(unsafe { libc::ioctl(container.as_raw_fd(), number(request), libc::c_ulong::from(value)) })
}

/// The version of the interface.
pub(super) fn api_version(container: &File) -> io::Result<i32> {
    say(container, GET_API_VERSION, 0)
}

/// Whether there is this kind of IOMMU driver.
pub(super) fn has(container: &File, kind: u32) -> io::Result<bool> {
    Ok(say(container, CHECK_EXTENSION, kind)? > 0)
}

/// Have the container's groups translated by this kind of IOMMU driver.
pub(super) fn set_iommu(container: &File, kind: u32) -> io::Result<()> {
    say(container, SET_IOMMU, kind).map(drop)
}

/// What the container's IOMMUs can do, as words, with capabilities behind.
pub(super) fn info(container: &File) -> io::Result<Vec<u32>> {
    let mut words = vec![0; INFO_WORDS];
    issue_info(container, &mut words)?;
    // The kernel says how long the structure is with all its capabilities.
    let whole = usize::try_from(words[0]).unwrap_or(usize::MAX).div_ceil(4);
    if (INFO_WORDS + 1..=MOST_INFO_WORDS).contains(&whole) {
        words = vec![0; whole];
        issue_info(container, &mut words)?;
    }
    Ok(words)
}

fn issue_info(container: &File, words: &mut [u32]) -> io::Result<()> {
    let size = u32::try_from(size_of_val(words)).map_err(io::Error::other)?;
    *words.first_mut().ok_or(io::ErrorKind::InvalidInput)? = size;
    // SAFETY: the descriptor is open for as long as `container` lives; the request reads and writes at most as many
    // bytes as the structure's first word says, which is the length of the live, exclusive `words`.
    answered(unsafe { libc::ioctl(container.as_raw_fd(), number(GET_INFO), words.as_mut_ptr()) }).map(drop)
}

/// Map region number `region` of `ram` to the guest's own addresses of it, for reading and writing.
///
/// The caller keeps `ram` alive until it is unmapped; [`crate::iommu::iommufd::Ioas`] owns both.
pub(super) fn map_ram(container: &File, ram: &GuestRam, region: usize) -> io::Result<()> {
    let region = ram.backend().iter().nth(region).ok_or(io::ErrorKind::NotFound)?;
    let memory = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(io::Error::other)?;
    let mut argument = abi::vfio_iommu_type1_dma_map {
        argsz: size_of_request::<abi::vfio_iommu_type1_dma_map>(),
        flags: abi::VFIO_DMA_MAP_FLAG_READ | abi::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: memory as u64,
        iova: region.start_addr().0,
        size: region.len(),
    };
    // SAFETY: the size is the structure's; `vaddr` is the start of a live mapping of `size` bytes, which is guest RAM:
    // nothing in this process refers to it but by volatile copies, so that devices may write there at any time.
    answered(unsafe { libc::ioctl(container.as_raw_fd(), number(MAP_DMA), &raw mut argument) }).map(drop)
}

/// Unmap what lies in `range`, whole mappings as they were made; how many bytes that was.
pub(super) fn unmap(container: &File, range: RangeInclusive<u64>) -> io::Result<u64> {
    let (first, last) = range.into_inner();
    let size = last.checked_sub(first).and_then(|more| more.checked_add(1));
    let mut argument = abi::vfio_iommu_type1_dma_unmap {
        argsz: size_of_request::<abi::vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova: first,
        size: size.ok_or(io::ErrorKind::InvalidInput)?,
        ..Default::default()
    };
    // SAFETY: the size is the structure's, and without flags there is no address of this process in it.
    answered(unsafe { libc::ioctl(container.as_raw_fd(), number(UNMAP_DMA), &raw mut argument) })?;
    Ok(argument.size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    #[test]
    fn requests_have_the_numbers_and_sizes_of_the_kernels_interface() {
        assert_eq!((number(GET_API_VERSION), number(SET_IOMMU)), (0x3b64, 0x3b66));
        assert_eq!(
            (number(GET_INFO), number(MAP_DMA), number(UNMAP_DMA)),
            (0x3b70, 0x3b71, 0x3b72)
        );
        assert_eq!(size_of::<abi::vfio_iommu_type1_dma_map>(), 32);
        assert_eq!(size_of::<abi::vfio_iommu_type1_dma_unmap>(), 24);
    }

    #[test]
    fn a_file_that_is_no_container_refuses_with_the_kernels_reason() {
        let file = tempfile::tempfile().expect("a file");
        let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("a MiB"));
        let enotty = |result: io::Result<()>| {
            let error = result.expect_err("no such request");
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        };
        enotty(api_version(&file).map(drop));
        enotty(has(&file, 3).map(drop));
        enotty(set_iommu(&file, 3));
        enotty(info(&file).map(drop));
        enotty(map_ram(&file, &ram, 0));
        enotty(unmap(&file, 0..=0xfff).map(drop));
        assert_eq!(
            map_ram(&file, &ram, 1).expect_err("one region").kind(),
            io::ErrorKind::NotFound
        );
        let all = unmap(&file, 0..=u64::MAX).expect_err("a length that is no number");
        assert_eq!(all.kind(), io::ErrorKind::InvalidInput);
    }
}
