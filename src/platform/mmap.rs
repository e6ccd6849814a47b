//! Mappings of this process: what the kernel is told about those of guest RAM (page size, population and NUMA node),
//! and memory of devices.

#![expect(unsafe_code, reason = "mappings are made and advised on by raw address")]

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::MmapRegion;

/// Give `advice` on all of `region`.
///
/// Only advice that keeps the contents is given here, so that no other user of the mapping can notice.
pub(super) fn advise(region: &MmapRegion, advice: KeepingAdvice) -> io::Result<()> {
    let advice = match advice {
        KeepingAdvice::HugePages => Advice::LinuxHugepage,
        KeepingAdvice::Populate => Advice::LinuxPopulateWrite,
    };
    // SAFETY: the range is `region`'s own live mapping, and the two kinds of advice neither unmap it nor
    // change what is in it.
    unsafe { rustix::mm::madvise(region.as_ptr().cast::<c_void>(), region.size(), advice) }?;
    Ok(())
}

/// Advice that never changes what a mapping holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeepingAdvice {
    /// Use transparent huge pages.
    HugePages,
    /// Make every page present and writable now.
    Populate,
}

/// Take `region`'s pages from host NUMA node `node` only.
pub(super) fn bind_to_node(region: &MmapRegion, node: u32) -> io::Result<()> {
    const BITS: u32 = u64::BITS;
    let mut mask = vec![0_u64; usize::try_from(node / BITS).map_err(io::Error::other)? + 1];
    if let Some(word) = mask.last_mut() {
        *word = 1 << (node % BITS);
    }
    // The kernel reads one bit fewer than it is told of.
    let bits = mask.len() * 64 + 1;
    // SAFETY: the range is `region`'s own live mapping, whose contents a policy does not change; `mask` holds
    // the number of bits announced, rounded up to words, and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            libc::MPOL_BIND,
            mask.as_ptr(),
            bits,
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A stretch of a device's memory, mapped into this process so that a guest can be given it.
///
/// Nothing here accesses it but [`Self::register`]: reading a register may change the device, and a device that is gone may
/// answer with a signal.
#[derive(Debug)]
pub struct DeviceMemory {
    at: NonNull<c_void>,
    len: usize,
}

// SAFETY: the address only names the mapping to the kernel, but for single aligned reads, which any thread may do.
unsafe impl Send for DeviceMemory {}
// SAFETY: as above.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// Map `len` bytes (a multiple of 4 KiB, not 0) from `offset` of `device` on.
    pub fn map(device: &impl AsFd, offset: u64, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: the kernel chooses the address, so no mapping is replaced, and nothing refers to the new one.
        let at = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                device,
                offset,
            )
        }?;
        let at = NonNull::new(at).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len })
    }

    /// Where it is in this process, for the kernel.
    pub(in crate::platform) fn address(&self) -> u64 {
        self.at.as_ptr() as u64
    }

    /// The 32-bit register at `offset`, a multiple of 4 inside, read once. Only for memory that its driver maps whole at the
    /// start, so that no access to it fails, and for a register that reading does not change.
    #[must_use]
    pub fn register(&self, offset: usize) -> u32 {
        let end = offset.checked_add(4).filter(|end| *end <= self.len);
        assert!(
            end.is_some() && offset.is_multiple_of(4),
            "a register lies inside, at a multiple of its size"
        );
        // SAFETY: four bytes from `offset` on are inside the live mapping, which is readable, and aligned, since a mapping
        // begins at a page. The device or another process may change them meanwhile, so the access is volatile.
        unsafe { self.at.cast::<u8>().add(offset).cast::<u32>().read_volatile() }
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an empty mapping cannot be made")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: `at` and `len` are what `map` got, nothing borrows from the mapping, and it is unmapped once.
        let unmapped = unsafe { rustix::mm::munmap(self.at.as_ptr(), self.len) };
        unmapped.expect("a mapping that mmap made can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_file_is_mapped_at_an_address_of_the_kernels_choice() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(0x2000).expect("room");
        let memory = DeviceMemory::map(&file, 0x1000, 0x1000).expect("mapped");
        assert_eq!((memory.len(), memory.address() % 0x1000), (0x1000, 0));
    }

    #[test]
    fn a_register_is_four_bytes_of_it() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(0x2000).expect("room");
        std::os::unix::fs::FileExt::write_all_at(&file, &[1, 2, 3, 4], 0x1ffc).expect("room");
        let memory = DeviceMemory::map(&file, 0x1000, 0x1000).expect("mapped");
        assert_eq!((memory.register(0xffc), memory.register(0)), (0x0403_0201, 0));
    }

    #[test]
    #[should_panic(expected = "a register lies inside")]
    fn a_register_beyond_the_end_is_a_broken_promise() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(0x1000).expect("room");
        let memory = DeviceMemory::map(&file, 0, 0x1000).expect("mapped");
        let _ = memory.register(0x1000);
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let file = tempfile::tempfile().expect("a file");
        assert!(DeviceMemory::map(&file, 0x10, 0x1000).is_err(), "an odd offset");
        assert!(DeviceMemory::map(&file, 0, 0).is_err(), "nothing");
    }
}
