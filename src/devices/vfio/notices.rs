//! What the host has to say about a function while a guest has it.

use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::host::{HostFunction, Notice};
use crate::platform::host::HostError;

/// The eventfds by which the host speaks.
pub(super) struct Notices(Vec<(Notice, EventFd)>);

impl Notices {
    /// Listen to every kind that `host` gives.
    pub(super) fn new(name: &str, host: &dyn HostFunction) -> Result<Self, HostError> {
        let mut heard = Vec::new();
        for notice in [Notice::Error, Notice::Wanted] {
            let eventfd = EventFd::new(EFD_NONBLOCK)
                .map_err(|source| HostError::new(format!("make an eventfd for {name}"), source))?;
            match host.notify(notice, &eventfd) {
                Ok(()) => heard.push((notice, eventfd)),
                // Functions without PCI Express report no errors, for one.
                Err(error) => tracing::debug!(name, ?notice, %error, "the host does not give this notice"),
            }
        }
        Ok(Self(heard))
    }

    /// What the event loop watches.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.0.iter().map(|(_, eventfd)| eventfd.as_raw_fd())
    }

    /// Take every notice that has been given.
    pub(super) fn take(&self) -> Vec<Notice> {
        let given = self.0.iter().filter(|(_, eventfd)| eventfd.read().is_ok());
        given.map(|(notice, _)| *notice).collect()
    }
}
