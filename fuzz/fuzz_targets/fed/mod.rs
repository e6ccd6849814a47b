//! Guest memory that says whatever the input says: each read of a device is answered with the next bytes of the
//! input, so that rings, descriptors and the buffers they point to need no grammar.
//!
//! Random bytes are no ring, though: the first index is out of range and the queue is broken. So what is read
//! decides what the bytes are made into, an index that moves on a little or a descriptor of a handy length, and
//! one answer in sixteen stays as wild as it was.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ravelin::devices::virtio::Interrupts;
use ravelin::devices::virtio::queue::{QueueLayout, VirtQueue};
use ravelin::devices::virtio::worker::ServedQueue;
use ravelin::platform::addr::Iova;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Permissions, Result};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of memory; addresses wrap around.
const LEN: usize = 256 << 10;
/// Reads up to this length are answered from the input; longer ones see what is there.
const FED: usize = 512;

/// Bytes of memory that one queue's rings take: table, available ring, used ring, a page each.
const RINGS: u64 = 0x4000;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Queues that have rings.
const QUEUES: u64 = 2;

/// Lengths of buffers that mean something to some device; 0 stands for any.
const LENGTHS: [u16; 8] = [1, 12, 16, 16, 512, 1024, 4096, 0];
/// Flags of descriptors, in the frequency that chains need: 1 goes on, 2 is written, 4 is a table.
const FLAGS: [u8; 8] = [0, 1, 1, 1, 2, 3, 3, 4];
/// Operations of a disk; 0xff stands for any.
const OPERATIONS: [u8; 8] = [0, 1, 1, 4, 8, 11, 13, 0xff];

/// Memory fed from an input.
pub struct FedMemory {
    arena: GuestMemoryMmap<()>,
    input: RefCell<Vec<u8>>,
    at: Cell<usize>,
    /// Entries of a queue.
    size: u8,
    /// Per queue: the available index told last.
    told: [Cell<u16>; QUEUES as usize],
}

impl FedMemory {
    /// Memory that says `input`, once, to queues made with the same `choice`.
    pub fn new(input: &[u8], choice: u8) -> Self {
        Self {
            arena: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LEN)]).expect("some memory"),
            input: RefCell::new(input.to_vec()),
            at: Cell::new(0),
            size: 1 << (choice & 7),
            told: Default::default(),
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

    /// The next `count` bytes for a device that reads at `addr`.
    fn answer(&self, addr: u64, count: usize) -> Vec<u8> {
        let mut bytes = self.next(count);
        bytes.resize(count, 0);
        let wild = bytes.last().is_some_and(|last| *last >= 0xf0);
        let (queue, within) = (addr / RINGS, addr % RINGS);
        let in_ring = queue < QUEUES && (AVAILABLE..USED).contains(&within);
        match &mut bytes[..] {
            _ if wild => {}
            [low, high] if in_ring && within == AVAILABLE + 2 => {
                let told = &self.told[queue as usize];
                told.set(told.get().wrapping_add(u16::from(*low % 4 == 1)));
                [*low, *high] = told.get().to_le_bytes();
            }
            [head, high] if in_ring && within > AVAILABLE + 2 => [*head, *high] = [*head % self.size, 0],
            [a, b, c, _, _, _, _, _, sector, l1, _, _, flags, _, next, last] => {
                let in_table = queue < QUEUES && (TABLE..AVAILABLE).contains(&within);
                if in_table || *last < 0x60 {
                    return self
                        .descriptor([*a, *b, *c], [*sector, *l1], *flags, *next)
                        .to_vec();
                }
                if let Some(header) = header(*a, *sector) {
                    return header.to_vec();
                }
            }
            _ => {}
        }
        bytes
    }

    /// A descriptor in the arena, somewhere in its first 16 MiB before it wraps.
    fn descriptor(&self, address: [u8; 3], length: [u8; 2], flags: u8, next: u8) -> [u8; 16] {
        let [a, b, c] = address;
        let length = match LENGTHS[usize::from(length[0] % 8)] {
            0 => u16::from_le_bytes(length),
            length => length,
        };
        let [l0, l1] = length.to_le_bytes();
        let flags = FLAGS[usize::from(flags % 8)];
        [
            a,
            b,
            c,
            0,
            0,
            0,
            0,
            0,
            l0,
            l1,
            0,
            0,
            flags,
            0,
            next % self.size,
            0,
        ]
    }

    /// Where an access lands, or nowhere: one address in sixteen is no memory.
    fn place(&self, addr: GuestAddress, count: usize) -> Option<GuestAddress> {
        let hole = addr.0 >> 60 == 0xf;
        let room = LEN - count.min(LEN);
        (!hole && count <= LEN).then(|| GuestAddress(addr.0 % (room as u64 + 1)))
    }
}

/// A request's header as disks know it: operation and sector. `None` leaves it as it is.
fn header(operation: u8, sector: u8) -> Option<[u8; 16]> {
    let operation = OPERATIONS[usize::from(operation % 8)];
    let header = [operation, 0, 0, 0, 0, 0, 0, 0, sector, 0, 0, 0, 0, 0, 0, 0];
    (operation != 0xff).then_some(header)
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
            let bytes = self.answer(addr.0, count);
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

/// Queue number `index` (0 or 1), its size and suppression by `choice`.
pub fn queue(index: u16, choice: u8) -> ServedQueue {
    let rings = u64::from(index) * RINGS;
    let layout = QueueLayout {
        size: 1 << (choice & 7),
        descriptors: Iova(rings + TABLE),
        available: Iova(rings + AVAILABLE),
        used: Iova(rings + USED),
    };
    let queue = VirtQueue::new(layout, choice & 8 != 0).expect("a good layout");
    let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    ServedQueue::new(index, queue, kick, Arc::new(Told::default()))
}
