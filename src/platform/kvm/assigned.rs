//! The files of devices that this machine has, as KVM keeps them (Documentation/virt/kvm/devices/vfio.rst).
//!
//! KVM goes by them where a guest's idea of caching counts, which is where devices write past the caches, and some drivers
//! of devices by KVM. Nothing of a device depends on it here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::DeviceFd;

use super::os;
use super::vm::Machine;
use crate::platform::assigned::{Assigned, AssignedDevices};
use crate::platform::host::HostError;

/// KVM's list of them, made with the first.
pub(super) struct VfioFiles {
    pub(super) machine: Arc<Machine>,
    pub(super) list: Mutex<Option<Arc<DeviceFd>>>,
}

struct VfioFile {
    list: Arc<DeviceFd>,
    file: OwnedFd,
}

impl VfioFiles {
    fn list(&self) -> Result<Arc<DeviceFd>, HostError> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = &*list {
            return Ok(list.clone());
        }
        let mut asked = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let made = self.machine.fd.create_device(&mut asked);
        let made =
            Arc::new(made.map_err(|error| HostError::new("make KVM's list of VFIO files", os(error)))?);
        *list = Some(made.clone());
        Ok(made)
    }
}

impl AssignedDevices for VfioFiles {
    fn add(&self, file: BorrowedFd<'_>) -> Result<Box<dyn Assigned>, HostError> {
        let refused = |source| HostError::new("tell KVM of a VFIO file", source);
        let list = self.list()?;
        let file = file.try_clone_to_owned().map_err(refused)?;
        change(&list, KVM_DEV_VFIO_FILE_ADD, &file).map_err(refused)?;
        Ok(Box::new(VfioFile { list, file }))
    }
}

impl Assigned for VfioFile {}

impl Drop for VfioFile {
    fn drop(&mut self) {
        if let Err(error) = change(&self.list, KVM_DEV_VFIO_FILE_DEL, &self.file) {
            tracing::warn!(%error, "KVM does not forget a VFIO file; it stays open until the machine ends");
        }
    }
}

/// Add `file` to `list`, or take it away.
fn change(list: &DeviceFd, attribute: u32, file: &OwnedFd) -> io::Result<()> {
    let number = file.as_raw_fd();
    let attribute = kvm_device_attr {
        group: KVM_DEV_VFIO_FILE,
        attr: attribute.into(),
        addr: (&raw const number).expose_provenance() as u64,
        flags: 0,
    };
    list.set_device_attr(&attribute).map_err(os)
}
