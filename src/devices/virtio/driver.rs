//! The driver's side of a queue, for tests: writes descriptors and rings as a guest would, honest or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Interrupts;
use super::queue::{QueueLayout, VirtQueue};
use super::worker::ServedQueue;
use crate::platform::addr::Iova;
use crate::platform::dma::{Dma, Requester};
use crate::platform::memory::GuestRam;

/// Two stretches of RAM with a hole between them.
pub(crate) const LOW_END: u64 = 8 << 20;
pub(crate) const HIGH: u64 = 16 << 20;
pub(crate) const HIGH_END: u64 = 24 << 20;

const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const INDIRECT: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// One descriptor of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

impl Part {
    pub(crate) fn read(at: u64, len: u32) -> Self {
        Self { at, len, flags: 0 }
    }

    pub(crate) fn write(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            flags: WRITE,
        }
    }
}

/// Counts what a device tells its driver.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) queues: AtomicU32,
    pub(crate) configuration: AtomicU32,
    pub(crate) resets: AtomicU32,
}

impl Interrupts for Told {
    fn queue(&self, _queue: u16) {
        self.queues.fetch_add(1, Ordering::SeqCst);
    }
    fn configuration_changed(&self) {
        self.configuration.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// A driver with one queue.
pub(crate) struct Driver {
    ram: GuestRam,
    requester: Arc<Requester>,
    size: u16,
    layout: QueueLayout,
    next_descriptor: u16,
    next_indirect: u64,
    next_data: u64,
    available: u16,
    used_seen: u16,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) told: Arc<Told>,
    pub(crate) queue: ServedQueue,
}

/// RAM as the tests have it: two stretches with a hole between.
pub(crate) fn ram() -> GuestRam {
    let ranges = [
        (GuestAddress(0), usize::try_from(LOW_END).expect("small")),
        (
            GuestAddress(HIGH),
            usize::try_from(HIGH_END - HIGH).expect("small"),
        ),
    ];
    GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("some memory"))
}

impl Driver {
    /// A queue of `size` entries without index-based suppression.
    pub(crate) fn new(size: u16) -> Self {
        Self::on(ram(), 0, size, false)
    }

    /// A queue of `size` entries with index-based suppression.
    pub(crate) fn with_event_idx(size: u16) -> Self {
        Self::on(ram(), 0, size, true)
    }

    /// Queue number `index` in memory shared with other queues: everything it places is moved up by
    /// `index` MiB.
    pub(crate) fn on(ram: GuestRam, index: u16, size: u16, event_idx: bool) -> Self {
        let base = u64::from(index) << 20;
        let layout = QueueLayout {
            size,
            descriptors: Iova(base + DESCRIPTORS),
            available: Iova(base + AVAILABLE),
            used: Iova(base + USED),
        };
        let requester = Arc::new(Requester::default());
        requester.set_bus_master(true);
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let told = Arc::new(Told::default());
        let queue = VirtQueue::new(layout, event_idx).expect("a good layout");
        Self {
            ram,
            requester,
            size,
            layout,
            next_descriptor: 0,
            next_indirect: base + INDIRECT,
            next_data: base + DATA,
            available: 0,
            used_seen: 0,
            queue: ServedQueue::new(index, queue, kick.clone(), told.clone()),
            kick,
            told,
        }
    }

    /// Memory without anything between.
    pub(crate) fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    /// The way a device has to memory.
    pub(crate) fn dma(&self) -> Dma {
        Dma::new(self.requester.clone(), self.ram.clone())
    }

    pub(crate) fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// Put `bytes` somewhere, and say where.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> u64 {
        let at = self.next_data;
        self.next_data += (bytes.len() as u64).next_multiple_of(4096).max(4096);
        self.store(at, bytes);
        at
    }

    pub(crate) fn store(&self, at: u64, bytes: &[u8]) {
        self.ram
            .backend()
            .write_slice(bytes, GuestAddress(at))
            .expect("RAM");
    }

    pub(crate) fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram
            .backend()
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("RAM");
        bytes
    }

    fn store_descriptor(&self, table: u64, index: u16, part: Part, next: Option<u16>) {
        let flags = part.flags | if next.is_some() { NEXT } else { 0 };
        let mut bytes = Vec::new();
        bytes.extend(part.at.to_le_bytes());
        bytes.extend(part.len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.unwrap_or(0).to_le_bytes());
        self.store(table + u64::from(index) * 16, &bytes);
    }

    /// Write a descriptor, whatever it says.
    pub(crate) fn raw_descriptor(&self, index: u16, part: Part, next: Option<u16>) {
        self.store_descriptor(self.layout.descriptors.0, index, part, next);
    }

    /// Write a chain into the table and return its head.
    pub(crate) fn chain(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_descriptor;
        for (position, part) in parts.iter().enumerate() {
            let index = self.next_descriptor % self.size;
            let next = (position + 1 < parts.len()).then_some((index + 1) % self.size);
            self.raw_descriptor(index, *part, next);
            self.next_descriptor = (index + 1) % self.size;
        }
        head
    }

    /// Make a chain available.
    pub(crate) fn offer(&mut self, parts: &[Part]) -> u16 {
        let head = self.chain(parts);
        self.make_available(head);
        head
    }

    /// Make a chain available whose descriptors are in a table of their own.
    pub(crate) fn offer_indirect(&mut self, parts: &[Part]) -> u16 {
        let table = self.next_indirect;
        self.next_indirect += (parts.len() as u64 * 16).next_multiple_of(4096);
        for (position, part) in parts.iter().enumerate() {
            let index = u16::try_from(position).expect("a short chain");
            let next = (position + 1 < parts.len()).then_some(index + 1);
            self.store_descriptor(table, index, *part, next);
        }
        let len = u32::try_from(parts.len() * 16).expect("a short chain");
        self.offer(&[Part {
            at: table,
            len,
            flags: INDIRECT_FLAG,
        }])
    }

    /// Put `head` into the available ring.
    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.store(self.layout.available.0 + 4 + slot * 2, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        self.store(self.layout.available.0 + 2, &index.to_le_bytes());
    }

    pub(crate) fn set_available_flags(&self, flags: u16) {
        self.store(self.layout.available.0, &flags.to_le_bytes());
    }

    /// Ask for an interrupt once the used index passes `index`.
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.layout.available.0 + 4 + u64::from(self.size) * 2;
        self.store(at, &index.to_le_bytes());
    }

    /// The index with which the device wants to be kicked.
    pub(crate) fn available_event(&self) -> u16 {
        let at = self.layout.used.0 + 4 + u64::from(self.size) * 8;
        u16::from_le_bytes(self.bytes(at, 2).try_into().expect("two bytes"))
    }

    /// Heads and lengths completed since this was asked last.
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let index = u16::from_le_bytes(
            self.bytes(self.layout.used.0 + 2, 2)
                .try_into()
                .expect("two bytes"),
        );
        let mut entries = Vec::new();
        while self.used_seen != index {
            let slot = u64::from(self.used_seen % self.size);
            let entry = self.bytes(self.layout.used.0 + 4 + slot * 8, 8);
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
            entries.push((word(0), word(4)));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        entries
    }

    pub(crate) fn interrupts(&self) -> u32 {
        self.told.queues.load(Ordering::SeqCst)
    }
}
