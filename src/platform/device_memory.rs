//! Memory of a host's device in guest physical space: what a guest reaches there costs no exit.

use std::sync::Arc;

use super::addr::Gpa;
use super::host::HostError;

pub use super::mmap::DeviceMemory;

/// What puts memory of devices where a guest has it: KVM's memory slots.
pub trait DeviceMemoryHost: Send + Sync {
    /// While the returned handle lives, the guest reads and writes `memory` at `at`, a multiple of 4 KiB where nothing
    /// else is mapped.
    ///
    /// # Errors
    /// What the host refused; nothing is mapped then.
    fn map(&self, at: Gpa, memory: &Arc<DeviceMemory>) -> Result<Box<dyn MappedDeviceMemory>, HostError>;
}

/// Memory of a device that a guest reaches; dropping it takes it away.
pub trait MappedDeviceMemory: Send + Sync {}
