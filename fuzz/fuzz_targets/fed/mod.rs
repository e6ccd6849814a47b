//! Guest memory that says whatever the input says: each read of a device is answered with the next bytes of the
//! input, so that rings, descriptors and the buffers they point to need no grammar.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ravelin::devices::virtio::Interrupts;
use ravelin::devices::virtio::queue::{QueueLayout, VirtQueue};
use ravelin::devices::virtio::worker::ServedQueue;
use ravelin::platform::addr::Iova;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Permissions, Result};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of memory; addresses wrap around.
const LEN: usize = 256 << 10;
/// Reads up to this length are answered from the input; longer ones see what is there.
const FED: usize = 512;

/// Memory fed from an input.
pub struct FedMemory {
    arena: GuestMemoryMmap<()>,
    input: RefCell<Vec<u8>>,
    at: Cell<usize>,
}

impl FedMemory {
    /// Memory that says `input`, once.
    pub fn new(input: &[u8]) -> Self {
        Self {
            arena: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LEN)]).expect("some memory"),
            input: RefCell::new(input.to_vec()),
            at: Cell::new(0),
        }
    }

    /// Whether the input is used up.
    pub fn is_dry(&self) -> bool {
        self.at.get() >= self.input.borrow().len()
    }

    /// The next `count` bytes for a caller other than the device.
    pub fn next(&self, count: usize) -> Vec<u8> {
        let input = self.input.borrow();
        let from = self.at.get().min(input.len());
        let to = (from + count).min(input.len());
        self.at.set(to);
        input[from..to].to_vec()
    }

    /// Where an access lands, or nowhere: one address in sixteen is no memory.
    fn place(&self, addr: GuestAddress, count: usize) -> Option<GuestAddress> {
        let hole = addr.0 >> 60 == 0xf;
        let room = LEN - count.min(LEN);
        (!hole && count <= LEN).then(|| GuestAddress(addr.0 % (room as u64 + 1)))
    }
}

impl GuestMemory for FedMemory {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.place(addr, count).is_some()
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        // Rings are accessed atomically, so that what is aligned stays so.
        let at = self.place(addr, count).ok_or(Error::InvalidGuestAddress(addr))?;
        let at = if count.is_power_of_two() && count <= 8 {
            GuestAddress(at.0 & !(count as u64 - 1))
        } else {
            at
        };
        if access == Permissions::Read && count <= FED {
            let bytes = self.next(count);
            self.arena.write_slice(&bytes, at).expect("inside the arena");
        }
        Ok(GuestMemoryBackend::get_slices(&self.arena, at, count))
    }
}

/// Counts what a device tells its driver.
#[derive(Default)]
pub struct Told(AtomicU64);

impl Interrupts for Told {
    fn queue(&self, _queue: u16) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn configuration_changed(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn needs_reset(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Queue number `index`, its size and suppression by `choice`.
pub fn queue(index: u16, choice: u8) -> ServedQueue {
    let layout = QueueLayout {
        size: 1 << (choice & 7),
        descriptors: Iova(0x1000),
        available: Iova(0x2000),
        used: Iova(0x3000),
    };
    let queue = VirtQueue::new(layout, choice & 8 != 0).expect("a good layout");
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    ServedQueue::new(index, queue, kick, Arc::new(Told::default()))
}
