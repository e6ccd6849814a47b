//! Doorbells: guest writes that signal an eventfd in the kernel instead of leaving it.

use vmm_sys_util::eventfd::EventFd;

use super::addr::Gpa;
use super::host::HostError;

/// What turns guest writes into eventfd signals: KVM's ioeventfd.
pub trait DoorbellHost: Send + Sync {
    /// While the returned handle lives, guest writes of any width at exactly `at` signal `fd` and do not
    /// exit. The value written is lost.
    fn attach(&self, at: Gpa, fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError>;
}

/// An attached doorbell; dropping it detaches.
pub trait Doorbell: Send + Sync {}
