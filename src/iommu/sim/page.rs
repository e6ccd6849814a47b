//! Page 3 of the guest's unit, as the host's unit answers for it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::SimHost;
use super::kernel::GUEST;
use crate::iommu::amd::agent::UnitOwner;
use crate::iommu::viommu::host::ObjectId;
use crate::platform::bus::BusDevice;

/// The page of one vIOMMU. Once that is destroyed, or its host gone, nothing answers: reads are all ones.
pub(super) struct Page {
    host: Weak<SimHost>,
    viommu: ObjectId,
}

impl Page {
    pub(super) const fn new(host: Weak<SimHost>, viommu: ObjectId) -> Self {
        Self { host, viommu }
    }

    /// The host, while the vIOMMU is there.
    fn host(&self) -> Option<Arc<SimHost>> {
        let host = self.host.upgrade()?;
        (host.viommu.load(Ordering::Acquire) == self.viommu.0).then_some(host)
    }
}

impl BusDevice for Page {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.host() {
            Some(host) => host.unit.vf_read(GUEST, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(host) = self.host() {
            let effects = host.unit.vf_write(GUEST, offset, data);
            host.perform(effects);
        }
    }
}
