//! A split virtqueue as a device uses it: take chains, complete them, know when to interrupt.
//!
//! The ring's arithmetic is the virtio-queue crate's. What this adds is strictness: whatever a driver may
//! not do (Virtual I/O Device 1.2, section 2.7) breaks the queue visibly instead of being skipped, and no
//! chain is taken twice before it is completed. Packed rings are not offered: the crate has none.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions, VolatileSlice};

use crate::platform::addr::Iova;
use crate::platform::dma::{Dma, DmaView};
use crate::platform::vectored::MOST_SLICES;

/// The largest queue a device may offer; a larger one gains nothing and costs table space.
pub const LARGEST_QUEUE: u16 = 1024;

/// Descriptors in one chain, indirect ones included: as many as one system call takes buffers.
const LONGEST_CHAIN: usize = MOST_SLICES;

/// Stretches of memory in one chain: behind an IOMMU, one buffer may be as many as it has pages. 64 MiB of
/// single pages, and two more for each buffer that begins and ends inside one; no more than a megabyte describes them.
const MOST_PIECES: usize = 16_384 + 2 * LONGEST_CHAIN;

/// Bytes of one chain, twice what any device takes. Behind an IOMMU every page of it is looked up before the device sees
/// how long it is, and whoever changes translations waits for that.
const MOST_BYTES: u64 = 128 << 20;

/// Guest memory as queues use it.
pub trait QueueMemory: GuestMemory<Bitmap = ()> {}

impl<M: GuestMemory<Bitmap = ()>> QueueMemory for M {}

/// Where views of guest memory come from, one for each piece of work: a device's [`Dma`], or memory that
/// nothing stands before.
pub trait MemoryViews {
    /// Memory for the length of one piece of work.
    type View<'v>: QueueMemory
    where
        Self: 'v;

    /// Memory as it is seen now.
    fn view(&self) -> Self::View<'_>;
}

impl MemoryViews for Dma {
    type View<'v> = DmaView<'v>;

    fn view(&self) -> DmaView<'_> {
        Self::view(self)
    }
}

impl<M: QueueMemory> MemoryViews for M {
    type View<'v>
        = Untranslated<'v, M>
    where
        M: 'v;

    fn view(&self) -> Untranslated<'_, M> {
        Untranslated(self)
    }
}

/// Memory that looks the same to everybody at any time.
pub struct Untranslated<'m, M>(&'m M);

impl<M: QueueMemory> GuestMemory for Untranslated<'_, M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.0.check_range(addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>, GuestMemoryError> {
        self.0.get_slices(addr, count, access)
    }
}

/// Where a driver put a queue, and how long it is.
///
/// Virtual I/O Device 1.2, 2.7 (Split Virtqueues).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries; a power of two, at most [`LARGEST_QUEUE`].
    pub size: u16,
    /// Descriptor table, 16-byte aligned.
    pub descriptors: Iova,
    /// Available ring ("driver area"), 2-byte aligned.
    pub available: Iova,
    /// Used ring ("device area"), 4-byte aligned.
    pub used: Iova,
}

/// What a driver did that it may not do. The device asks to be reset.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The layout itself is none.
    #[error("queue of {} entries at {}, {}, {} is impossible: {error}", .layout.size, .layout.descriptors, .layout.available, .layout.used)]
    Layout {
        /// As the driver gave it.
        layout: QueueLayout,
        /// What is wrong with it.
        error: Error,
    },
    /// A ring is not memory, or its index ran away.
    #[error("ring unusable: {0}")]
    Ring(Error),
    /// More chains are available than the queue has entries, or the entry cannot be read.
    #[error("available ring entry {0} cannot be read")]
    Entry(u16),
    /// The head is no descriptor of the table.
    #[error("descriptor {head} is available, but the queue has {size} descriptors")]
    Head {
        /// As the available ring has it.
        head: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// The chain is available a second time before it was used.
    #[error("descriptor {0} is available twice")]
    Duplicate(u16),
    /// The chain loops, leaves its table, is too long, or a table is no memory or nested.
    #[error("the chain from descriptor {0} does not end properly")]
    Chain(u16),
    /// A part the device reads follows a part the device writes.
    #[error("the chain from descriptor {0} has a readable part after a writable part")]
    Order(u16),
    /// A buffer is not memory the device may reach.
    #[error("the chain from descriptor {head} names {len} bytes at {at} that are out of reach: {error}")]
    Buffer {
        /// Head of the chain.
        head: u16,
        /// Where the buffer begins.
        at: Iova,
        /// Its length in bytes.
        len: u32,
        /// Why.
        error: GuestMemoryError,
    },
    /// The chain lacks parts that the device type's format prescribes.
    #[error("a request has {readable} readable and {writable} writable bytes; {wanted}")]
    Request {
        /// Bytes the device may read.
        readable: usize,
        /// Bytes the device may write.
        writable: usize,
        /// The format's demand.
        wanted: &'static str,
    },
}

/// A running queue.
pub struct VirtQueue {
    queue: Queue,
    /// Heads taken and not completed.
    in_flight: Vec<bool>,
}

/// Buffers that a driver made available, for the length of one memory view.
pub struct Chain<'m> {
    /// The descriptor by which the chain is completed.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Buffers<'m>,
    /// What the device may write, in order.
    pub writable: Buffers<'m>,
    /// Where the last byte is that the device may write: good for a later view, which may not reach it any more.
    pub last_writable: Option<Iova>,
}

impl VirtQueue {
    /// A queue at `layout`, with index-based suppression (`VIRTIO_F_EVENT_IDX`) or without.
    pub fn new(layout: QueueLayout, event_idx: bool) -> Result<Self, Broken> {
        let impossible = |error| Broken::Layout { layout, error };
        let mut queue = Queue::new(LARGEST_QUEUE).map_err(impossible)?;
        queue.try_set_size(layout.size).map_err(impossible)?;
        queue
            .try_set_desc_table_address(GuestAddress(layout.descriptors.0))
            .map_err(impossible)?;
        queue
            .try_set_avail_ring_address(GuestAddress(layout.available.0))
            .map_err(impossible)?;
        queue
            .try_set_used_ring_address(GuestAddress(layout.used.0))
            .map_err(impossible)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(Self {
            queue,
            in_flight: vec![false; usize::from(layout.size)],
        })
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Take the next chain, if there is one.
    pub fn pop<'m, M: QueueMemory>(&mut self, mem: &'m M) -> Result<Option<Chain<'m>>, Broken> {
        let next = self.queue.next_avail();
        let available = self
            .queue
            .avail_idx(mem, Ordering::Acquire)
            .map_err(Broken::Ring)?;
        if available.0 == next {
            return Ok(None);
        }
        let mut entries = self.queue.iter(mem).map_err(Broken::Ring)?;
        let Some(descriptors) = entries.next() else {
            return Err(Broken::Entry(next));
        };
        let (head, size) = (descriptors.head_index(), self.size());
        let Some(taken) = self.in_flight.get_mut(usize::from(head)) else {
            return Err(Broken::Head { head, size });
        };
        if std::mem::replace(taken, true) {
            return Err(Broken::Duplicate(head));
        }
        let mut chain = Chain {
            head,
            readable: Buffers::default(),
            writable: Buffers::default(),
            last_writable: None,
        };
        let (mut more, mut writing) = (true, false);
        let mut bytes = 0;
        for (count, descriptor) in descriptors.enumerate() {
            if count >= LONGEST_CHAIN {
                return Err(Broken::Chain(head));
            }
            if writing && !descriptor.is_write_only() {
                return Err(Broken::Order(head));
            }
            writing = descriptor.is_write_only();
            more = descriptor.has_next();
            let (access, buffers) = if writing {
                (Permissions::Write, &mut chain.writable)
            } else {
                (Permissions::Read, &mut chain.readable)
            };
            let (at, len) = (descriptor.addr(), descriptor.len());
            bytes += u64::from(len);
            if bytes > MOST_BYTES {
                return Err(Broken::Chain(head));
            }
            let out_of_reach = |error| Broken::Buffer {
                head,
                at: Iova(at.0),
                len,
                error,
            };
            for slice in mem.get_slices(at, len as usize, access).map_err(out_of_reach)? {
                buffers.push(slice.map_err(out_of_reach)?);
            }
            if let Some(last) = len.checked_sub(1).filter(|_| writing) {
                // What was reached does not wrap.
                chain.last_writable = Some(Iova(at.0.wrapping_add(last.into())));
            }
            if chain.readable.slices.len() + chain.writable.slices.len() > MOST_PIECES {
                return Err(Broken::Chain(head));
            }
        }
        // The walk ends early where a descriptor or table cannot be read, is outside or nested.
        if more {
            return Err(Broken::Chain(head));
        }
        Ok(Some(chain))
    }

    /// Give the chain taken last back, untouched, to be taken again.
    pub fn put_back(&mut self, head: u16) {
        self.land(head);
        self.queue.go_to_previous_position();
    }

    /// Write `byte` to the address `at`, which belongs to the chain taken last. The driver may have taken its memory away
    /// since.
    pub fn answer<M: QueueMemory>(&self, mem: &M, head: u16, at: Iova, byte: u8) -> Result<(), Broken> {
        let out_of_reach = |error| Broken::Buffer {
            head,
            at,
            len: 1,
            error,
        };
        mem.write_obj(byte, GuestAddress(at.0)).map_err(out_of_reach)
    }

    /// Hand a chain back to the driver with `written` bytes of its writable part filled.
    pub fn complete<M: QueueMemory>(&mut self, mem: &M, head: u16, written: u32) -> Result<(), Broken> {
        self.land(head);
        self.queue.add_used(mem, head, written).map_err(Broken::Ring)
    }

    fn land(&mut self, head: u16) {
        let taken = self.in_flight.get_mut(usize::from(head));
        let was = taken.map(|taken| std::mem::replace(taken, false));
        assert_eq!(was, Some(true), "only chains taken from this queue are completed");
    }

    /// Whether the driver wants to hear of what was completed since this was asked last.
    pub fn should_interrupt<M: QueueMemory>(&mut self, mem: &M) -> Result<bool, Broken> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(mem).map_err(Broken::Ring);
        }
        // The used index is visible before the flag is read: the driver does the reverse.
        fence(Ordering::SeqCst);
        let flags: u16 = mem
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|error| Broken::Ring(Error::GuestMemory(error)))?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Ask for a kick with the next chain. `true` when chains are there already, and none may come.
    pub fn rearm<M: QueueMemory>(&mut self, mem: &M) -> Result<bool, Broken> {
        self.queue.enable_notification(mem).map_err(Broken::Ring)
    }

    /// Kicks are not needed for now.
    pub fn disarm<M: QueueMemory>(&mut self, mem: &M) -> Result<(), Broken> {
        self.queue.disable_notification(mem).map_err(Broken::Ring)
    }
}

/// One side of a chain: stretches of guest memory, read or written in order.
#[derive(Default, Clone)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Add a stretch at the end. The sum over a chain is below 2^32.
    fn push(&mut self, slice: VolatileSlice<'m>) {
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The stretches, in order.
    #[must_use]
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Keep the first `at` bytes and return the rest; `None`, nothing changed, if there are fewer.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Option<Buffers<'m>> {
        if at > self.len {
            return None;
        }
        let (mut head, mut tail) = (Buffers::default(), Buffers::default());
        for slice in self.slices.drain(..) {
            let keep = slice.len().min(at - head.len);
            let (first, second) = slice.split_at(keep).expect("within the slice");
            for (part, side) in [(first, &mut head), (second, &mut tail)] {
                if !part.is_empty() {
                    side.push(part);
                }
            }
        }
        *self = head;
        Some(tail)
    }

    /// Copy out from the beginning; returns how many bytes there were to fill `data` with.
    pub fn copy_to(&self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut data[done..]);
        }
        done
    }

    /// Copy in from the beginning; returns how many bytes of `data` there was room for.
    pub fn copy_from(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let part = slice.len().min(data.len() - done);
            slice.copy_from(&data[done..done + part]);
            done += part;
        }
        done
    }
}

#[cfg(test)]
mod tests;
