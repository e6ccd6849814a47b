//! The parts of KVM's interface that are raw addresses: memory slots and the run area.

#![expect(
    unsafe_code,
    reason = "memory slots and the run area are raw addresses in KVM's interface"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_MEM_READONLY, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi,
    kvm_run, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::platform::memory::GuestRam;

/// What a guest may do with a memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotKind {
    /// Read, write and execute: RAM.
    Ram,
    /// Read; a write is an exit.
    ReadOnly,
}

/// Make region `index` of `ram` memory slot `slot` of `vm`.
///
/// The caller keeps `ram` alive for as long as `vm` lives; [`super::vm::Machine`] owns both.
pub(super) fn add_slot(vm: &VmFd, slot: u32, ram: &GuestRam, index: usize, kind: SlotKind) -> io::Result<()> {
    let region = ram.backend().iter().nth(index).ok_or(io::ErrorKind::NotFound)?;
    let host = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(io::Error::other)?;
    let slot = kvm_userspace_memory_region {
        slot,
        flags: match kind {
            SlotKind::Ram => 0,
            SlotKind::ReadOnly => KVM_MEM_READONLY,
        },
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: host as u64,
    };
    // SAFETY: `host` is the start of a live mapping of `memory_size` bytes, which vm-memory made; the owner
    // of `vm` holds that mapping until after `vm` is closed, so the guest can reach nothing but it.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// A route from `gsi` to an interrupt message.
pub(super) fn msi_route(gsi: u32, address_hi: u32, address_lo: u32, data: u32) -> kvm_irq_routing_entry {
    let mut route = kvm_irq_routing_entry {
        gsi,
        type_: kvm_bindings::KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1::default(),
        ..Default::default()
    };
    route.u.msi = kvm_irq_routing_msi {
        address_lo,
        address_hi,
        data,
        ..Default::default()
    };
    route
}

/// The details of an exit that kvm-ioctls does not hand out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub(super) suberror: u32,
    /// Words the kernel filled in; their meaning depends on `suberror`.
    pub(super) data: [u64; 16],
    /// How many of them.
    pub(super) valid: usize,
}

/// A second mapping of a processor's run area, for what must be reached while the first is borrowed or from
/// other threads.
pub(super) struct RunArea {
    at: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the area is plain memory shared with the kernel. Other threads only ever reach `immediate_exit`,
// as an atomic; everything else is read through `&RunArea` by copies of single fields.
unsafe impl Send for RunArea {}
// SAFETY: as above: shared access is an atomic store, or copies by volatile reads.
unsafe impl Sync for RunArea {}

impl RunArea {
    /// Map the `len` bytes of `vcpu`'s run area.
    pub(super) fn map(vcpu: &VcpuFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // SAFETY: `vcpu` is open and stays so until this function returns, which is how long the borrow lives.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: the kernel chooses the address, so no mapping is replaced; the pages belong to the
        // processor's file, which the mapping keeps open.
        let at = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len })
    }

    /// Make the next, or the present, run return without entering the guest; or allow entry again.
    pub(super) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: `at` is a live mapping of at least a `kvm_run`; the byte is only ever accessed atomically
        // by us and read by the kernel.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.at.as_ptr()).immediate_exit) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }

    /// Bytes per element of the port access that the last exit reported: 1, 2 or 4.
    pub(super) fn io_width(&self) -> usize {
        // SAFETY: `at` is a live mapping of at least a `kvm_run`; any bytes are a valid `u8`.
        let width = unsafe { ptr::read_volatile(&raw const (*self.at.as_ptr()).__bindgen_anon_1.io.size) };
        usize::from(width.max(1))
    }

    /// What the last exit's KVM_EXIT_INTERNAL_ERROR said.
    pub(super) fn internal_error(&self) -> InternalError {
        // SAFETY: `at` is a live mapping of at least a `kvm_run`; any bytes are valid integers.
        let (suberror, ndata, data) = unsafe {
            let internal = &raw const (*self.at.as_ptr()).__bindgen_anon_1.internal;
            (
                ptr::read_volatile(&raw const (*internal).suberror),
                ptr::read_volatile(&raw const (*internal).ndata),
                ptr::read_volatile(&raw const (*internal).data),
            )
        };
        let valid = usize::try_from(ndata).map_or(data.len(), |words| words.min(data.len()));
        InternalError {
            suberror,
            data,
            valid,
        }
    }
}

impl Drop for RunArea {
    fn drop(&mut self) {
        // SAFETY: `at` and `len` are what `map` got, nothing borrows from the mapping, and it is unmapped once.
        let unmapped = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
        unmapped.expect("a mapping that mmap made can be unmapped");
    }
}
