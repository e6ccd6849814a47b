//! Guest writes that the kernel puts aside: coalesced MMIO.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::IoEventAddress;

use super::os;
use super::sys::CoalescedRing;
use super::vm::Machine;
use crate::platform::addr::GpaRange;
use crate::platform::doorbell::{CoalescedWrite, CoalescedWrites};
use crate::platform::host::HostError;

/// The kernel's ring of writes put aside; a machine has one.
pub(super) struct KvmCoalescedWrites {
    pub(super) machine: Arc<Machine>,
    /// The ring has one reader at a time.
    pub(super) ring: Mutex<CoalescedRing>,
}

/// `range` as the kernel takes it.
fn zone(range: GpaRange) -> (IoEventAddress, u32) {
    let len = u32::try_from(range.len()).expect("registers are a few bytes");
    (IoEventAddress::Mmio(range.start().0), len)
}

impl CoalescedWrites for KvmCoalescedWrites {
    fn put_aside(&self, range: GpaRange) -> Result<(), HostError> {
        let (at, len) = zone(range);
        self.machine
            .fd
            .register_coalesced_mmio(at, len)
            .map_err(|error| HostError::new(format!("put guest writes to {range} aside"), os(error)))
    }

    fn let_through(&self, range: GpaRange) -> Result<(), HostError> {
        let (at, len) = zone(range);
        self.machine
            .fd
            .unregister_coalesced_mmio(at, len)
            .map_err(|error| HostError::new(format!("let guest writes to {range} through again"), os(error)))
    }

    fn take(&self) -> Option<CoalescedWrite> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
