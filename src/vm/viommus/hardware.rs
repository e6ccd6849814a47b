//! A unit of the guest's that a unit of the host's serves.

use std::sync::{Arc, OnceLock};

use super::unit::{self, Surroundings};
use crate::iommu::iommufd::Ioas;
use crate::iommu::iommufd::viommu::HwHost;
use crate::iommu::viommu::ServedUnit;
use crate::pci::tree::RootComplex;
use crate::platform::addr::{Gpa, Sbdf};
use crate::platform::device_memory::{DeviceMemoryHost, MappedDeviceMemory};
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::vm::events::EventLoop;
use crate::vm::plan::ViommuPlan;
use crate::vm::unit_signals::UnitSignals;

/// The unit, its page of the host's, and what that is over.
///
/// Fields are dropped in order: the guest's way to the page, the unit with all that the host made for it, and then what
/// that hung on. Functions behind it are silent before.
pub(in crate::vm) struct Hardware {
    page: OnceLock<Box<dyn MappedDeviceMemory>>,
    unit: Arc<ServedUnit>,
    host: Arc<HwHost>,
    /// The functions behind it: as whom each issues requests. The host knows them by their place here.
    functions: Vec<Arc<Requester>>,
    _space: Arc<Ioas>,
}

impl Hardware {
    /// The unit `planned`, which covers `root` and which `host` serves, over guest RAM in `space`; `events` hears what that
    /// tells of it. `host` knows the functions of `root` by their order there.
    ///
    /// # Errors
    /// When the host makes no vIOMMU or no event queue, or attaches a function to no memory.
    pub(super) fn new(
        planned: &ViommuPlan,
        root: &RootComplex,
        around: &Surroundings<'_>,
        host: Arc<HwHost>,
        space: Arc<Ioas>,
        events: &mut EventLoop,
    ) -> Result<Self, HostError> {
        let functions = unit::requesters(root);
        let unit = unit::served(planned, around, host.clone(), &functions)?;
        UnitSignals::listen(&unit, events);
        Ok(Self {
            page: OnceLock::new(),
            unit,
            host,
            functions,
            _space: space,
        })
    }

    /// The front end.
    pub(super) const fn unit(&self) -> &Arc<ServedUnit> {
        &self.unit
    }

    /// Have the guest reach heads, tails and Status of the host's unit at `at`, without an exit, by `memory`.
    ///
    /// # Errors
    /// What the host refused.
    pub(super) fn map_page(&self, at: Gpa, memory: &dyn DeviceMemoryHost) -> Result<(), HostError> {
        let page = self
            .unit
            .page()
            .expect("a unit of the host's has its page mapped");
        let mapped = memory.map(at, page)?;
        assert!(self.page.set(mapped).is_ok(), "a unit is placed once");
        Ok(())
    }

    /// As whom the function at `at` issues requests, if it is behind the unit.
    pub(super) fn requester(&self, at: Sbdf) -> Option<Arc<Requester>> {
        let planned = |requester: &&Arc<Requester>| requester.sbdf() == at;
        self.functions.iter().find(planned).cloned()
    }

    /// Registers, functions and requests so far, and how the kernel is asked, in one line.
    pub(super) fn state(&self) -> String {
        format!("{}; interface {}", self.unit.state(), self.host.abi().name)
    }
}

#[cfg(test)]
mod tests;
