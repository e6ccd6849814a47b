//! What the kernel is told about mappings of guest RAM: page size, population and NUMA node.

#![expect(unsafe_code, reason = "advice on mappings is given by raw address")]

use std::ffi::c_void;
use std::io;

use rustix::mm::Advice;
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
