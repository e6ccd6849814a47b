//! The parts of KVM's interface that are raw addresses: memory slots and the run area.

#![expect(
    unsafe_code,
    reason = "memory slots and the run area are raw addresses in KVM's interface"
)]

use std::arch::asm;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use kvm_bindings::{
    KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_MEM_READONLY, kvm_coalesced_mmio, kvm_coalesced_mmio_ring,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_run,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};
use crate::platform::device_memory::DeviceMemory;
use crate::platform::doorbell::CoalescedWrite;
use crate::platform::memory::GuestRam;

use super::page;

/// What a guest may do with a memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SlotKind {
    /// Read, write and execute: RAM.
    Ram,
    /// Read; a write is an exit.
    ReadOnly,
}

/// Make `range`, which lies in one mapping of `ram`, memory slot `slot` of `vm`.
///
/// The caller keeps `ram` alive for as long as `vm` lives; [`super::vm::Machine`] owns both.
pub(super) fn add_slot(
    vm: &VmFd,
    slot: u32,
    ram: &GuestRam,
    range: GpaRange,
    kind: SlotKind,
) -> io::Result<()> {
    let (start, size) = (range.start(), range.len());
    let len = usize::try_from(size).map_err(io::Error::other)?;
    let memory = ram.backend().get_slice(GuestAddress(start.0), len);
    let memory = memory.map_err(io::Error::other)?;
    let slot = kvm_userspace_memory_region {
        slot,
        flags: match kind {
            SlotKind::Ram => 0,
            SlotKind::ReadOnly => KVM_MEM_READONLY,
        },
        guest_phys_addr: start.0,
        memory_size: size,
        userspace_addr: memory.ptr_guard().as_ptr() as u64,
    };
    // SAFETY: vm-memory checked that `memory` is `memory_size` bytes of one live mapping; the owner of `vm` holds
    // that mapping until after `vm` is closed, so the guest can reach nothing but it.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Compare the 16 bytes of `ram` at `at`, a multiple of 16, with `expected`, and make them `replacement` if they are
/// that, in one step for whoever looks. Returns what they were; `None` where they are not all RAM.
pub(super) fn compare_exchange(ram: &GuestRam, at: Gpa, expected: u128, replacement: u128) -> Option<u128> {
    let memory = ram
        .backend()
        .get_slice(GuestAddress(at.0), size_of::<u128>())
        .ok()?;
    let guard = memory.ptr_guard_mut();
    let bytes = guard.as_ptr().cast::<u128>();
    if !bytes.is_aligned() || !std::arch::is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    let [mut low, mut high] = halves(expected);
    let [new_low, new_high] = halves(replacement);
    // SAFETY: the processor has the instruction; `bytes` is aligned and points to 16 bytes of a live mapping that
    // `guard` borrows from. No Rust reference to guest RAM exists, and others reach it by volatile or atomic accesses.
    // RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") bytes,
            inout("rsi") new_low => _,
            in("rcx") new_high,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    Some(u128::from(high) << 64 | u128::from(low))
}

/// The lower and the upper half of `value`.
pub(super) fn halves(value: u128) -> [u64; 2] {
    [value, value >> 64].map(|half| u64::try_from(half & u128::from(u64::MAX)).expect("64 bits"))
}

/// The thread that calls, as the kernel numbers it.
pub(super) fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Send `signal` to thread `thread` of this process. One that has ended needs none.
pub(super) fn signal_thread(thread: i32, signal: i32) {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the call takes numbers only. The signal stays in this process, where it has a handler that only sets
    // a flag, whichever of its threads has that number by now.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    if result != 0 {
        tracing::debug!(thread, error = %io::Error::last_os_error(), "a thread was not signalled");
    }
}

/// Make `memory` memory slot `slot` of `vm`, at `at`.
///
/// The caller keeps `memory` mapped until the slot is removed or `vm` is closed; the slot's handle owns both.
pub(super) fn add_device_slot(vm: &VmFd, slot: u32, at: Gpa, memory: &DeviceMemory) -> io::Result<()> {
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: at.0,
        memory_size: memory.len(),
        userspace_addr: memory.address(),
    };
    // SAFETY: the addresses are a live mapping of `memory_size` bytes of a device, which this process itself never
    // accesses; its owner holds it until after the slot is removed, so the guest can reach nothing else.
    unsafe { vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Remove memory slot `slot` of `vm`, which is at `at`.
pub(super) fn remove_slot(vm: &VmFd, slot: u32, at: Gpa) -> io::Result<()> {
    let slot = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: at.0,
        ..Default::default()
    };
    // SAFETY: a length of zero removes the slot: the guest reaches less than before.
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

/// The descriptor of `vm`.
pub(super) fn borrowed(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: `vm` is open for as long as it is borrowed, which is how long the result lives.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

/// Map `len` bytes of `vcpu`'s file from byte `offset` on, to be read and written.
fn map(vcpu: &VcpuFd, len: usize, offset: u64) -> io::Result<NonNull<u8>> {
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
            offset,
        )
    }?;
    NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory.into())
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
        let at = map(vcpu, len, 0)?;
        Ok(Self { at: at.cast(), len })
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

/// Entries of the ring, which is a page (KVM_COALESCED_MMIO_MAX).
const RING_ENTRIES: u64 =
    (PAGE_SIZE - size_of::<kvm_coalesced_mmio_ring>() as u64) / size_of::<kvm_coalesced_mmio>() as u64;

/// The ring of guest writes that the kernel put aside. It belongs to the machine; any processor's file shows it.
pub(super) struct CoalescedRing {
    at: NonNull<kvm_coalesced_mmio_ring>,
}

// SAFETY: the ring is plain memory shared with the kernel, and nothing of it is tied to a thread. Only its one
// owner takes from it, by `&mut`.
unsafe impl Send for CoalescedRing {}

impl CoalescedRing {
    /// Map the ring of `vcpu`'s machine, of which this must be the only one.
    pub(super) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE_SIZE;
        let at = map(vcpu, page(), offset)?;
        Ok(Self { at: at.cast() })
    }

    /// The oldest entry.
    pub(super) fn take(&mut self) -> Option<CoalescedWrite> {
        let ring = self.at.as_ptr();
        // SAFETY: `at` is a live mapping of the ring's page; `first` and `last` are only ever accessed atomically
        // by us, and the kernel writes `last` alone.
        let (first, last) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*ring).first),
                AtomicU32::from_ptr(&raw mut (*ring).last),
            )
        };
        let index = first.load(Ordering::Relaxed);
        // The kernel fills an entry before it moves `last` over it.
        if index == last.load(Ordering::Acquire) || u64::from(index) >= RING_ENTRIES {
            return None;
        }
        // SAFETY: `index` is below the number of entries in the page, which is mapped; the kernel does not touch
        // this entry until `first` has moved over it. Any bytes are valid integers.
        let entry = unsafe {
            let entries = (&raw const (*ring).coalesced_mmio).cast::<kvm_coalesced_mmio>();
            ptr::read_volatile(entries.add(index as usize))
        };
        let next = index + 1;
        let wraps = u64::from(next) == RING_ENTRIES;
        first.store(if wraps { 0 } else { next }, Ordering::Release);
        let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
        Some(CoalescedWrite::new(Gpa(entry.phys_addr), entry.data, len))
    }
}

impl Drop for CoalescedRing {
    fn drop(&mut self) {
        // SAFETY: `at` is what `map` got, for as many bytes, nothing borrows from the mapping, and it is unmapped once.
        let unmapped = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), page()) };
        unmapped.expect("a mapping that mmap made can be unmapped");
    }
}

impl Drop for RunArea {
    fn drop(&mut self) {
        // SAFETY: `at` and `len` are what `map` got, nothing borrows from the mapping, and it is unmapped once.
        let unmapped = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) };
        unmapped.expect("a mapping that mmap made can be unmapped");
    }
}
