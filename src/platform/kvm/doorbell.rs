//! Doorbells by ioeventfd.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::os;
use super::vm::Machine;
use crate::platform::addr::Gpa;
use crate::platform::doorbell::{Doorbell, DoorbellHost};
use crate::platform::host::HostError;

/// Turns guest writes into eventfd signals.
pub(super) struct Ioeventfds {
    pub(super) machine: Arc<Machine>,
}

/// One attached ioeventfd.
struct Ioeventfd {
    machine: Arc<Machine>,
    at: Gpa,
    /// A descriptor of our own to the same eventfd: the kernel finds the registration by eventfd, and the
    /// caller may have closed his.
    fd: EventFd,
}

impl DoorbellHost for Ioeventfds {
    fn attach(&self, at: Gpa, fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError> {
        let refused = |source| HostError::new(format!("attach a doorbell at {at}"), source);
        let fd = fd.try_clone().map_err(refused)?;
        // No value and no width to match: the kernel then decodes nothing, which is its fastest path.
        self.machine
            .fd
            .register_ioevent(&fd, &IoEventAddress::Mmio(at.0), NoDatamatch)
            .map_err(|error| refused(os(error)))?;
        Ok(Box::new(Ioeventfd {
            machine: self.machine.clone(),
            at,
            fd,
        }))
    }
}

impl Doorbell for Ioeventfd {}

impl Drop for Ioeventfd {
    fn drop(&mut self) {
        let at = IoEventAddress::Mmio(self.at.0);
        if let Err(error) = self.machine.fd.unregister_ioevent(&self.fd, &at, NoDatamatch) {
            tracing::error!(at = %self.at, error = %os(error), "cannot detach a doorbell; it stays until the guest ends");
        }
    }
}
