//! Memory of devices in memory slots of their own.

use std::sync::Arc;

use super::sys;
use super::vm::Machine;
use crate::platform::addr::Gpa;
use crate::platform::device_memory::{DeviceMemory, DeviceMemoryHost, MappedDeviceMemory};
use crate::platform::host::HostError;

/// Makes memory slots of devices' memory.
pub(super) struct DeviceSlots {
    pub(super) machine: Arc<Machine>,
}

/// One such slot.
struct DeviceSlot {
    machine: Arc<Machine>,
    slot: u32,
    at: Gpa,
    /// What the guest reaches; unmapped once the slot is gone.
    memory: Arc<DeviceMemory>,
}

impl DeviceMemoryHost for DeviceSlots {
    fn map(&self, at: Gpa, memory: &Arc<DeviceMemory>) -> Result<Box<dyn MappedDeviceMemory>, HostError> {
        let slot = self
            .machine
            .fill_slot(|slot| sys::add_device_slot(&self.machine.fd, slot, at, memory))
            .map_err(|source| {
                HostError::new(
                    format!(
                        "give the guest {:#x} bytes of a device's memory at {at}",
                        memory.len()
                    ),
                    source,
                )
            })?;
        Ok(Box::new(DeviceSlot {
            machine: self.machine.clone(),
            slot,
            at,
            memory: memory.clone(),
        }))
    }
}

impl MappedDeviceMemory for DeviceSlot {}

impl Drop for DeviceSlot {
    fn drop(&mut self) {
        match sys::remove_slot(&self.machine.fd, self.slot, self.at) {
            Ok(()) => self.machine.slots().give_back(self.slot),
            Err(error) => {
                tracing::error!(
                    at = %self.at, %error,
                    "cannot take a device's memory away from the guest; it stays until the guest ends"
                );
                // Its addresses in this process must not become anything else's while the guest reaches them.
                std::mem::forget(self.memory.clone());
            }
        }
    }
}
