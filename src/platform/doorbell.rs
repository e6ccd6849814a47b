//! Doorbells: guest writes that the kernel takes without stopping the processor that makes them. Either they
//! signal an eventfd, or they are put aside until somebody looks.

use vmm_sys_util::eventfd::EventFd;

use super::addr::{Gpa, GpaRange};
use super::host::HostError;

/// What turns guest writes into eventfd signals: KVM's ioeventfd.
pub trait DoorbellHost: Send + Sync {
    /// While the returned handle lives, guest writes of any width at exactly `at` signal `fd` and do not
    /// exit. The value written is lost.
    fn attach(&self, at: Gpa, fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError>;
}

/// An attached doorbell; dropping it detaches.
pub trait Doorbell: Send + Sync {}

/// A guest write that was put aside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CoalescedWrite {
    /// Where the guest wrote.
    pub at: Gpa,
    data: [u8; 8],
    len: usize,
}

impl CoalescedWrite {
    /// The first `len` bytes of `data`, at most 8, written at `at`.
    #[must_use]
    pub fn new(at: Gpa, data: [u8; 8], len: usize) -> Self {
        Self {
            at,
            data,
            len: len.min(8),
        }
    }

    /// What the guest wrote.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data[..self.len]
    }
}

/// What puts guest writes aside: KVM's coalesced MMIO.
///
/// They wait in one ring for the whole machine, in the order they were made. Nobody is told that there are any. A
/// write that finds the ring full comes to the bus, so whoever handles it takes those before it first.
pub trait CoalescedWrites: Send + Sync {
    /// Put guest writes aside that lie inside `range` from now on.
    fn put_aside(&self, range: GpaRange) -> Result<(), HostError>;

    /// Have writes to `range` come to the bus again. When this returns, those that did not are in the ring.
    fn let_through(&self, range: GpaRange) -> Result<(), HostError>;

    /// The oldest write in the ring, to whatever range.
    fn take(&self) -> Option<CoalescedWrite>;
}
