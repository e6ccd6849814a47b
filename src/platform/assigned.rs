//! Devices of the host that a machine has: what its hypervisor wants to know of them.

use std::os::fd::BorrowedFd;

use super::host::HostError;

/// A hypervisor that is told which devices of the host its machine has.
pub trait AssignedDevices: Send + Sync {
    /// The machine has the device of the VFIO file `file` while the returned handle lives.
    ///
    /// # Errors
    /// What the host refused. The device works all the same.
    fn add(&self, file: BorrowedFd<'_>) -> Result<Box<dyn Assigned>, HostError>;
}

/// A device that a machine has; dropping it takes it away. The hypervisor holds the file open until then.
pub trait Assigned: Send + Sync {}
