//! The host's functions of a plan: opened, attached to guest RAM, and only then part of a machine.

use std::sync::Arc;

use super::opening::Opening;
use super::plan::{DeviceKind, Plan};
use crate::devices::vfio::host::HostFunction;
use crate::iommu::iommufd::{Ioas, Memlock, Requests};
use crate::platform::addr::Sbdf;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

/// The functions that are passed through, all attached to one address space with guest RAM in it.
pub(super) struct Passed {
    /// By the device's index in the plan. They go before what they are attached to.
    functions: Vec<Option<Arc<dyn HostFunction>>>,
    space: Option<Arc<Ioas>>,
}

impl Passed {
    /// Those of `plan`. Nothing of the host's is opened when there are none.
    pub(super) fn open(plan: &Plan, ram: &GuestRam) -> Result<Self, HostError> {
        let addresses = addresses(plan);
        if addresses.iter().all(Option::is_none) {
            return Ok(Self {
                functions: Vec::new(),
                space: None,
            });
        }
        let mut host = Opening::of(plan)?;
        let requests = host.requests();
        let open = |at: Sbdf| -> Result<Arc<dyn HostFunction>, HostError> { Ok(Arc::new(host.open(at)?)) };
        Self::attach(&addresses, ram, requests, open, Memlock::here())
    }

    /// Open each of `addresses` by `open`, attach it, and give all of them `ram`.
    fn attach(
        addresses: &[Option<Sbdf>],
        ram: &GuestRam,
        requests: Arc<dyn Requests>,
        mut open: impl FnMut(Sbdf) -> Result<Arc<dyn HostFunction>, HostError>,
        limit: Memlock,
    ) -> Result<Self, HostError> {
        // Dropped in reverse where a step fails: the functions, then what they are attached to.
        let space = Arc::new(Ioas::new(requests, ram.clone())?);
        let mut functions = Vec::with_capacity(addresses.len());
        for at in addresses {
            let function = at.map(&mut open).transpose()?;
            if let (Some(function), Some(at)) = (&function, at) {
                function
                    .attach(space.id())
                    .map_err(|source| HostError::new(format!("attach {at} to the guest's RAM"), source))?;
            }
            functions.push(function);
        }
        space.map_ram(limit)?;
        Ok(Self {
            functions,
            space: Some(space),
        })
    }

    /// The function of device number `index` of the plan, and what it is attached to.
    pub(super) fn function(&self, index: usize) -> Option<(Arc<dyn HostFunction>, Arc<Ioas>)> {
        let function = self.functions.get(index)?.clone()?;
        Some((function, self.space.clone()?))
    }
}

/// Where each device of `plan` is on the host, if it is the host's.
fn addresses(plan: &Plan) -> Vec<Option<Sbdf>> {
    let host = |kind: &DeviceKind| match kind {
        DeviceKind::Vfio(vfio) => Some(vfio.host),
        _ => None,
    };
    plan.devices.iter().map(|device| host(&device.kind)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::vfio::testing::{Asked, Device};
    use crate::iommu::iommufd::testing::{Call, Host};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const ANY: Memlock = Memlock { limit: None };

    fn ram() -> GuestRam {
        GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("a MiB"))
    }

    fn two() -> [Option<Sbdf>; 3] {
        [
            Some("41:00.0".parse().expect("valid")),
            None,
            Some("41:00.1".parse().expect("valid")),
        ]
    }

    #[test]
    fn every_function_is_attached_before_ram_is_mapped_for_all_of_them() {
        let (host, device) = (Host::new(), Device::nic());
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> { Ok(device.clone()) };
        let passed = Passed::attach(&two(), &ram(), host.clone(), open, ANY).expect("attached");
        let (_, space) = passed.function(0).expect("the first");
        assert!(passed.function(1).is_none() && passed.function(2).is_some() && passed.function(3).is_none());
        assert_eq!(device.attached(), [space.id(), space.id()]);
        assert_eq!(host.mapped(space.id()), [(0, 1 << 20)]);
        drop((passed, space));
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn a_function_that_cannot_be_attached_ends_it_and_nothing_stays_mapped() {
        let (host, device) = (Host::new(), Device::nic());
        device.refuse(Asked::Attach, libc::EINVAL);
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> { Ok(device.clone()) };
        let error = Passed::attach(&two(), &ram(), host.clone(), open, ANY)
            .err()
            .expect("refused");
        assert_eq!(error.to_string(), "cannot attach 0000:41:00.0 to the guest's RAM");
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn a_function_that_cannot_be_opened_ends_it_and_nothing_stays_mapped() {
        let host = Host::new();
        let open = |_| Err(HostError::new("open it", std::io::ErrorKind::PermissionDenied));
        let error = Passed::attach(&two(), &ram(), host.clone(), open, ANY)
            .err()
            .expect("refused");
        assert_eq!(error.to_string(), "cannot open it");
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn ram_that_cannot_be_mapped_ends_it() {
        let (host, device) = (Host::new(), Device::nic());
        host.refuse(Call::Map, libc::ENOMEM);
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> { Ok(device.clone()) };
        assert!(Passed::attach(&two(), &ram(), host.clone(), open, ANY).is_err());
        assert!(host.spaces().is_empty());
    }
}
