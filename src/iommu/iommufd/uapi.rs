//! The requests of /dev/iommu.
//!
//! Documentation/userspace-api/iommufd.rst and include/uapi/linux/iommufd.h. Every structure begins with its own
//! size, up to which the kernel reads and writes it.

#![expect(
    unsafe_code,
    reason = "requests to the kernel, some of which carry addresses of this process"
)]

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use iommufd_bindings::iommufd as abi;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::Copied;
use crate::platform::addr::GpaRange;
use crate::platform::memory::GuestRam;

/// A structure of /dev/iommu's and the request it belongs to.
trait Request {
    /// The request's number behind the type `;` (0x3b).
    const NUMBER: u32;
}

macro_rules! requests {
    ($($structure:ident: $number:ident,)+) => {$(
        impl Request for abi::$structure {
            const NUMBER: u32 = abi::$number;
        }
    )+};
}

requests! {
    iommu_destroy: IOMMUFD_CMD_DESTROY,
    iommu_ioas_alloc: IOMMUFD_CMD_IOAS_ALLOC,
    iommu_ioas_copy: IOMMUFD_CMD_IOAS_COPY,
    iommu_ioas_iova_ranges: IOMMUFD_CMD_IOAS_IOVA_RANGES,
    iommu_ioas_map: IOMMUFD_CMD_IOAS_MAP,
    iommu_ioas_map_file: IOMMUFD_CMD_IOAS_MAP_FILE,
    iommu_ioas_unmap: IOMMUFD_CMD_IOAS_UNMAP,
}

/// Bytes of a request's structure, as its first field says them.
fn size_of_request<T: Request>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a request has a few dozen bytes")
}

/// Issue the request `T` belongs to.
///
/// # Safety
/// The structure's first field is its size, and every address in it stays valid for the length that goes with it
/// for as long as the request's effect lasts.
unsafe fn issue<T: Request>(iommufd: &File, argument: &mut T) -> io::Result<()> {
    let request = libc::c_ulong::from(u32::from(abi::IOMMUFD_TYPE) << 8 | T::NUMBER);
    // SAFETY: the descriptor is open for as long as `iommufd` lives; `argument` is a live, exclusive structure of
    // the kind this request reads and writes, and what it points at the caller vouches for.
    let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), request, ptr::from_mut(argument)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Make an address space; its number.
pub(super) fn alloc(iommufd: &File) -> io::Result<u32> {
    let mut argument = abi::iommu_ioas_alloc {
        size: size_of_request::<abi::iommu_ioas_alloc>(),
        flags: 0,
        out_ioas_id: 0,
    };
    // SAFETY: the size is the structure's, and there is no address in it.
    unsafe { issue(iommufd, &mut argument) }?;
    Ok(argument.out_ioas_id)
}

/// Destroy the object with number `id`.
pub(super) fn destroy(iommufd: &File, id: u32) -> io::Result<()> {
    let mut argument = abi::iommu_destroy {
        size: size_of_request::<abi::iommu_destroy>(),
        id,
    };
    // SAFETY: the size is the structure's, and there is no address in it.
    unsafe { issue(iommufd, &mut argument) }
}

/// Map region number `region` of `ram` to the guest's own addresses of it, for reading and writing.
///
/// The caller keeps `ram` alive until it is unmapped or the address space destroyed; [`super::Ioas`] owns both.
pub(super) fn map_ram(iommufd: &File, ioas: u32, ram: &GuestRam, region: usize) -> io::Result<()> {
    let mut argument = map_argument(ioas, ram, region)?;
    // SAFETY: the size is the structure's; `user_va` is the start of a live mapping of `length` bytes, which is guest
    // RAM: nothing in this process refers to it but by volatile copies, so that devices may write there at any time.
    unsafe { issue(iommufd, &mut argument) }
}

/// All of region number `region` of `ram`, in one piece, where the guest has it.
fn map_argument(ioas: u32, ram: &GuestRam, region: usize) -> io::Result<abi::iommu_ioas_map> {
    let region = ram.backend().iter().nth(region).ok_or(io::ErrorKind::NotFound)?;
    let memory = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(io::Error::other)?;
    Ok(abi::iommu_ioas_map {
        size: size_of_request::<abi::iommu_ioas_map>(),
        flags: abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
            | abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE
            | abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id: ioas,
        __reserved: 0,
        user_va: memory as u64,
        length: region.len(),
        iova: region.start_addr().0,
    })
}

/// Map the first bytes of `memory` at `range`, for reading and writing.
pub(super) fn map_file(iommufd: &File, ioas: u32, memory: BorrowedFd<'_>, range: GpaRange) -> io::Result<()> {
    let mut argument = abi::iommu_ioas_map_file {
        size: size_of_request::<abi::iommu_ioas_map_file>(),
        flags: abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
            | abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE
            | abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
        ioas_id: ioas,
        fd: memory.as_raw_fd(),
        start: 0,
        length: range.len(),
        iova: range.start().0,
    };
    // SAFETY: the size is the structure's, and there is no address of this process in it: what is mapped belongs to the
    // file, which the kernel itself keeps for as long as anything maps it.
    unsafe { issue(iommufd, &mut argument) }
}

/// Map in one address space what another has.
pub(super) fn copy(iommufd: &File, copy: &Copied) -> io::Result<()> {
    let mut flags = abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    if copy.access.read {
        flags |= abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
    }
    if copy.access.write {
        flags |= abi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    }
    let mut argument = abi::iommu_ioas_copy {
        size: size_of_request::<abi::iommu_ioas_copy>(),
        flags,
        dst_ioas_id: copy.to,
        src_ioas_id: copy.from,
        length: copy.len,
        dst_iova: copy.iova,
        src_iova: copy.source,
    };
    // SAFETY: the size is the structure's, and there is no address of this process in it: what is mapped is memory
    // that was mapped for devices before, which the kernel itself keeps for as long as anything maps it.
    unsafe { issue(iommufd, &mut argument) }
}

/// Unmap what lies in `range`.
pub(super) fn unmap(iommufd: &File, ioas: u32, range: RangeInclusive<u64>) -> io::Result<()> {
    let (first, last) = range.into_inner();
    let more = last.checked_sub(first).ok_or(io::ErrorKind::InvalidInput)?;
    let mut argument = abi::iommu_ioas_unmap {
        size: size_of_request::<abi::iommu_ioas_unmap>(),
        ioas_id: ioas,
        iova: first,
        // All there are is said by the number that has no successor.
        length: more.saturating_add(1),
    };
    // SAFETY: the size is the structure's, and there is no address of this process in it.
    unsafe { issue(iommufd, &mut argument) }
}

/// Most windows that an address space is asked for: a host reserves a handful of ranges.
const MOST_WINDOWS: usize = 256;

/// The addresses that may be mapped in the address space `ioas`, with the devices it has now.
pub(super) fn windows(iommufd: &File, ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
    let mut ranges = vec![abi::iommu_iova_range { start: 0, last: 0 }; MOST_WINDOWS];
    let mut argument = abi::iommu_ioas_iova_ranges {
        size: size_of_request::<abi::iommu_ioas_iova_ranges>(),
        ioas_id: ioas,
        num_iovas: u32::try_from(ranges.len()).expect("a few hundred"),
        __reserved: 0,
        allowed_iovas: ranges.as_mut_ptr() as u64,
        out_iova_alignment: 0,
    };
    // SAFETY: the size is the structure's; `allowed_iovas` is the start of `num_iovas` ranges that live until the
    // request returns, and its effect ends there.
    unsafe { issue(iommufd, &mut argument) }?;
    let count = usize::try_from(argument.num_iovas).unwrap_or(usize::MAX);
    Ok(ranges
        .iter()
        .take(count)
        .map(|range| range.start..=range.last)
        .collect())
}

/// Where a structure has the length of further data, and where its address.
struct DataPlace {
    len: usize,
    address: usize,
}

/// What is known of request `number`: that it has no address in its structure, or where it is. Requests that have others
/// are not made here.
fn data_place(number: u32) -> io::Result<Option<DataPlace>> {
    match number {
        abi::IOMMUFD_CMD_HWPT_ALLOC => Ok(Some(DataPlace { len: 28, address: 32 })),
        abi::IOMMUFD_CMD_GET_HW_INFO => Ok(Some(DataPlace { len: 12, address: 16 })),
        abi::IOMMUFD_CMD_VIOMMU_ALLOC => Ok(Some(DataPlace { len: 24, address: 32 })),
        abi::IOMMUFD_CMD_DESTROY
        | abi::IOMMUFD_CMD_IOAS_ALLOC
        | abi::IOMMUFD_CMD_OPTION
        | abi::IOMMUFD_CMD_VDEVICE_ALLOC
        | abi::IOMMUFD_CMD_HW_QUEUE_ALLOC => Ok(None),
        number if is_amds(number) => Ok(None),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Whether request `number` may be one of AMD's for its units: none of upstream's, and none with addresses in it, which
/// were those for command buffers and GCR3 tables (65h, 67h, 68h) and are two for confidential devices (96h and 97h).
pub(super) const fn is_amds(number: u32) -> bool {
    matches!(number, 0x60..=0x64 | 0x66 | 0x69..=0x7f | 0x95 | 0x98..=0xff)
}

/// Issue request `number` with a structure of its own size in bytes, and data that the structure is to point at.
///
/// # Errors
/// The kernel's, and `InvalidInput` for what is not known to be harmless: see [`super::Kernel::request`].
pub(super) fn request(iommufd: &File, number: u32, argument: &mut [u8], data: &mut [u8]) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let size = argument.get(..4).and_then(|size| size.try_into().ok());
    let size = size.map(u32::from_le_bytes).ok_or_else(invalid)?;
    if usize::try_from(size).ok() != Some(argument.len()) {
        return Err(invalid());
    }
    match data_place(number)? {
        Some(place) => {
            let len = u32::try_from(data.len()).map_err(|_| invalid())?.to_le_bytes();
            // The kernel takes no data to be at no address.
            let address = if data.is_empty() {
                0
            } else {
                data.as_mut_ptr() as u64
            };
            let field = argument.get_mut(place.len..place.len + 4).ok_or_else(invalid)?;
            field.copy_from_slice(&len);
            let field = argument
                .get_mut(place.address..place.address + 8)
                .ok_or_else(invalid)?;
            field.copy_from_slice(&address.to_le_bytes());
        }
        None if !data.is_empty() => return Err(invalid()),
        None => {}
    }
    let request = libc::c_ulong::from(u32::from(abi::IOMMUFD_TYPE) << 8 | number);
    // SAFETY: the descriptor is open for as long as `iommufd` lives. `argument` is live and exclusive, and its first
    // field is its length, past which the kernel does not go. The only address in a structure of this request is the one
    // of `data`, written above with its length; it is live and exclusive too, and the effect ends with the call. The
    // kernel copies in and out, so that alignment does not matter.
    let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), request, argument.as_mut_ptr()) };
    // An address says nothing to anybody once the call is over.
    if let Some(place) = data_place(number)?
        && let Some(field) = argument.get_mut(place.address..place.address + 8)
    {
        field.fill(0);
    }
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Ask for an event queue; the descriptor it is read from.
///
/// # Errors
/// The kernel's, and `InvalidInput` for a structure that is not of this request.
pub(super) fn event_queue(iommufd: &File, argument: &mut [u8]) -> io::Result<OwnedFd> {
    const LEN: u32 = 32;
    const OUT_FD: usize = 24;
    let field = |argument: &[u8], at: usize| {
        let field = argument.get(at..at + 4).and_then(|field| field.try_into().ok());
        field.map(i32::from_le_bytes)
    };
    if argument.len() != LEN as usize || field(argument, 0) != Some(LEN.cast_signed()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let number = libc::c_ulong::from(u32::from(abi::IOMMUFD_TYPE) << 8 | abi::IOMMUFD_CMD_VEVENTQ_ALLOC);
    // SAFETY: the descriptor is open for as long as `iommufd` lives; `argument` is live and exclusive, and its first field
    // is its length, past which the kernel does not go. There is no address in it.
    let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), number, argument.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = field(argument, OUT_FD).filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(|| io::Error::other("the kernel made an event queue without a descriptor"))?;
    // SAFETY: the kernel has just made this descriptor for this request and gave it to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::request::Access;
    use crate::platform::addr::Gpa;
    use std::os::fd::AsFd;

    #[test]
    fn data_is_pointed_at_where_the_structures_of_the_kernels_interface_have_room() {
        use std::mem::offset_of;
        let place = |number| {
            let place = data_place(number).expect("known").expect("has data");
            (place.len, place.address)
        };
        assert_eq!(
            place(0x89),
            (
                offset_of!(abi::iommu_hwpt_alloc, data_len),
                offset_of!(abi::iommu_hwpt_alloc, data_uptr)
            )
        );
        assert_eq!(
            place(0x8a),
            (
                offset_of!(abi::iommu_hw_info, data_len),
                offset_of!(abi::iommu_hw_info, data_uptr)
            )
        );
        assert_eq!(
            place(0x90),
            (
                offset_of!(abi::iommu_viommu_alloc, data_len),
                offset_of!(abi::iommu_viommu_alloc, data_uptr)
            )
        );
    }

    #[test]
    fn only_requests_without_unknown_addresses_are_made() {
        let file = tempfile::tempfile().expect("a file");
        let mut structure = [40, 0, 0, 0].to_vec();
        structure.resize(40, 0);
        // IOAS_MAP and its kin, and AMD's that have addresses.
        for number in [
            0x83, 0x84, 0x85, 0x86, 0x8d, 0x8f, 0x93, 0x96, 0x97, 0x65, 0x67, 0x68, 0x5f, 0x100,
        ] {
            let error = request(&file, number, &mut structure, &mut []).expect_err("not made");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{number:#x}");
        }
        for number in [0x60, 0x80, 0x89, 0x90, 0x91, 0x94, 0x95, 0x98] {
            let error = request(&file, number, &mut structure, &mut []).expect_err("no iommufd");
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{number:#x}");
        }
        let invalid = |number, structure: &mut [u8], data: &mut [u8]| {
            let error = request(&file, number, structure, data).expect_err("not made");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        };
        invalid(0x91, &mut structure, &mut [0; 8]);
        invalid(0x91, &mut structure[..24], &mut []);
        invalid(0x91, &mut [], &mut []);
        invalid(0x90, &mut [8, 0, 0, 0, 0, 0, 0, 0], &mut [0; 8]);
        let error = event_queue(&file, &mut structure).expect_err("not made");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let mut structure = vec![0; 32];
        structure[0] = 32;
        let error = event_queue(&file, &mut structure).expect_err("no iommufd");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn requests_have_the_numbers_and_sizes_of_the_kernels_interface() {
        assert_eq!(
            (abi::iommu_destroy::NUMBER, size_of::<abi::iommu_destroy>()),
            (0x80, 8)
        );
        assert_eq!(
            (abi::iommu_ioas_alloc::NUMBER, size_of::<abi::iommu_ioas_alloc>()),
            (0x81, 12)
        );
        assert_eq!(
            (
                abi::iommu_ioas_iova_ranges::NUMBER,
                size_of::<abi::iommu_ioas_iova_ranges>()
            ),
            (0x84, 32)
        );
        assert_eq!(
            (abi::iommu_ioas_copy::NUMBER, size_of::<abi::iommu_ioas_copy>()),
            (0x83, 40)
        );
        assert_eq!(
            (abi::iommu_ioas_map::NUMBER, size_of::<abi::iommu_ioas_map>()),
            (0x85, 40)
        );
        assert_eq!(
            (abi::iommu_ioas_unmap::NUMBER, size_of::<abi::iommu_ioas_unmap>()),
            (0x86, 24)
        );
        assert_eq!(
            (
                abi::iommu_ioas_map_file::NUMBER,
                size_of::<abi::iommu_ioas_map_file>()
            ),
            (0x8f, 40)
        );
    }

    const HUGE: u64 = 2 << 20;

    /// That each region of `ram` goes by one request, whose addresses on both sides are the same distance from a page of `size`
    /// bytes: then the host's IOMMU has entries of that size wherever memory has such pages.
    fn goes_in_pages_of(size: u64, ram: &GuestRam) {
        for (region, range) in ram.ranges().enumerate() {
            let argument = map_argument(7, ram, region).expect("there is one");
            assert_eq!((argument.iova, argument.length), (range.start().0, range.len()));
            assert_eq!(argument.user_va % size, argument.iova % size, "{range}");
        }
        assert!(map_argument(7, ram, ram.ranges().count()).is_err());
    }

    #[test]
    fn ram_of_the_hosts_huge_pages_goes_to_devices_in_large_pages() {
        use rustix::fs::{MemfdFlags, memfd_create};
        use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
        let ranges = [(0, 2 * HUGE), (1 << 32, HUGE)].map(|(start, len)| {
            // Nothing is taken from the pool, which may be empty, before somebody touches it.
            let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::CLOEXEC;
            let file = File::from(memfd_create("huge", flags).expect("a kernel with hugetlbfs"));
            file.set_len(len).expect("whole pages");
            let len = usize::try_from(len).expect("64 bits");
            (GuestAddress(start), len, Some(FileOffset::new(file, 0)))
        });
        let ram = GuestMemoryMmap::from_ranges_with_files(ranges).expect("mapped");
        goes_in_pages_of(HUGE, &GuestRam::new(ram));
    }

    #[test]
    fn ram_of_transparent_huge_pages_goes_to_devices_in_large_pages() {
        use crate::platform::ram::{RamOptions, allocate};
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release
            .split(['.', '-'])
            .map_while(|part| part.parse::<u32>().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        // Kernels before put anonymous memory at any page.
        let size = if version < (6, 7) { 0x1000 } else { HUGE };
        let ranges = [(0, 2 * HUGE), (1 << 32, HUGE)];
        let ranges = ranges.map(|(start, len)| GpaRange::new(Gpa(start), len).expect("valid"));
        let options = RamOptions {
            transparent_huge_pages: true,
            ..RamOptions::default()
        };
        goes_in_pages_of(size, &allocate(&ranges, &options).expect("a few MiB"));
    }

    #[test]
    fn a_file_that_is_not_dev_iommu_refuses_with_the_kernels_reason() {
        let file = tempfile::tempfile().expect("a file");
        let enotty = |result: io::Result<()>| result.expect_err("no such request").raw_os_error();
        assert_eq!(enotty(alloc(&file).map(drop)), Some(libc::ENOTTY));
        assert_eq!(enotty(destroy(&file, 1)), Some(libc::ENOTTY));
        assert_eq!(enotty(windows(&file, 1).map(drop)), Some(libc::ENOTTY));
        assert_eq!(enotty(unmap(&file, 1, 0..=u64::MAX)), Some(libc::ENOTTY));
        let page = Copied {
            from: 1,
            source: 0,
            to: 2,
            iova: 0,
            len: 0x1000,
            access: Access::BOTH,
        };
        assert_eq!(enotty(copy(&file, &page)), Some(libc::ENOTTY));
        let range = GpaRange::new(Gpa(0xe000_0000), 0x1000).expect("valid");
        assert_eq!(
            enotty(map_file(&file, 1, file.as_fd(), range)),
            Some(libc::ENOTTY)
        );
    }
}
