//! The host's functions of a plan: opened, attached to guest RAM, and only then part of a machine.

use std::sync::Arc;

use super::opening::Opening;
use super::plan::{DeviceKind, Plan};
use crate::devices::vfio::host::{Companion, HostFunction};
use crate::devices::vfio::hot_reset::{HotResetMember, HotResetSet};
use crate::devices::vfio::lent::Lent;
use crate::iommu::iommufd::{Ioas, Memlock, Requests};
use crate::platform::addr::Sbdf;
use crate::platform::assigned::AssignedDevices;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

/// The functions that are passed through, all attached to one address space with guest RAM in it.
pub(super) struct Passed {
    /// By the device's index in the plan. They go before what they are attached to.
    functions: Vec<Option<Arc<Lent>>>,
    space: Option<Arc<Ioas>>,
    /// By the device's index, those that are reset with others.
    reset_with: Vec<Option<HotResetMember>>,
}

impl Passed {
    /// Those of `plan`. Nothing of the host's is opened when there are none.
    pub(super) fn open(
        plan: &Plan,
        ram: &GuestRam,
        hypervisor: &dyn AssignedDevices,
    ) -> Result<Self, HostError> {
        let addresses = addresses(plan);
        if addresses.iter().all(Option::is_none) {
            return Ok(Self {
                functions: Vec::new(),
                space: None,
                reset_with: Vec::new(),
            });
        }
        let mut host = Opening::of(plan)?;
        let requests = host.requests();
        let open = |at: Sbdf| -> Result<Arc<dyn HostFunction>, HostError> { Ok(Arc::new(host.open(at)?)) };
        let passed = Self::attach(&addresses, ram, requests, open, Memlock::here())?;
        for (at, function) in addresses.iter().zip(&passed.functions) {
            if let (Some(at), Some(function)) = (at, function)
                && let Err(error) = function.tell(hypervisor)
            {
                // A host without KVM's list of them, for one.
                tracing::info!(function = %at, %error, reason = %error.source, "the hypervisor does not know of the function, which works all the same");
            }
        }
        Ok(passed)
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
            let function = at.map(&mut open).transpose()?.map(Lent::new);
            if let (Some(function), Some(at)) = (&function, at) {
                function
                    .attach(space.id())
                    .map_err(|source| HostError::new(format!("attach {at} to the guest's RAM"), source))?;
            }
            functions.push(function);
        }
        space.map_ram(limit)?;
        Ok(Self {
            reset_with: reset_together(addresses, &functions),
            functions,
            space: Some(space),
        })
    }

    /// The function of device number `index` of the plan, and what it is attached to.
    pub(super) fn function(&self, index: usize) -> Option<(Arc<Lent>, Arc<Ioas>)> {
        let function = self.functions.get(index)?.clone()?;
        Some((function, self.space.clone()?))
    }

    /// Whether the function of device number `index` of the plan is reset with others.
    pub(super) fn reset_with(&self, index: usize) -> Option<HotResetMember> {
        self.reset_with.get(index)?.clone()
    }
}

/// Which of `functions`, those at `addresses`, are reset together, because the host cannot reset one of them alone. Why
/// one cannot be reset at all is logged.
fn reset_together(
    addresses: &[Option<Sbdf>],
    functions: &[Option<Arc<Lent>>],
) -> Vec<Option<HotResetMember>> {
    let mut members: Vec<Option<HotResetMember>> = vec![None; functions.len()];
    for (index, (at, function)) in addresses.iter().zip(functions).enumerate() {
        let (Some(at), Some(function)) = (at, function) else {
            continue;
        };
        if function.resets() || members[index].is_some() {
            continue;
        }
        let companions = match function.companions() {
            Ok(companions) => companions,
            Err(error) => {
                tracing::warn!(function = %at, %error, "the host resets neither the function nor its bus or slot");
                continue;
            }
        };
        let foreign = |companion: &&Companion| !companion.ours;
        if let Some(other) = companions.iter().find(foreign) {
            tracing::warn!(
                function = %at, with = %other.at,
                "the host can reset the function only together with another, which is not this machine's; bind that to \
                 vfio-pci and pass it to this machine, too"
            );
            continue;
        }
        let concerned = |at: &Option<Sbdf>| companions.iter().any(|companion| Some(companion.at) == *at);
        let set: Vec<usize> = (0..addresses.len())
            .filter(|other| concerned(&addresses[*other]))
            .collect();
        for (other, member) in set.iter().zip(HotResetSet::of(set.len())) {
            members[*other] = Some(member);
        }
    }
    members
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
    use crate::devices::vfio::testing::{Asked, Device, nic_config};
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

    /// A card of two functions at 41:00.0 and 41:00.1, the second of which cannot be reset alone.
    fn card(second_is_ours: bool) -> Passed {
        let at = |text: &str| text.parse().expect("valid");
        let companion = |text, ours| Companion { at: at(text), ours };
        let companions = [companion("41:00.0", true), companion("41:00.1", second_is_ours)];
        let open = |asked: Sbdf| -> Result<Arc<dyn HostFunction>, HostError> {
            let device = Device::with(&nic_config()).beside(&companions);
            let alone = asked == at("41:00.0");
            Ok(Arc::new(if alone { device } else { device.without_reset() }))
        };
        Passed::attach(&two(), &ram(), Host::new(), open, ANY).expect("attached")
    }

    #[test]
    fn a_function_that_cannot_be_reset_alone_is_reset_with_those_beside_it() {
        let passed = card(true);
        assert!(
            passed.reset_with(0).is_some()
                && passed.reset_with(1).is_none()
                && passed.reset_with(2).is_some()
        );
    }

    #[test]
    fn nothing_is_reset_together_with_a_function_of_somebody_else() {
        let passed = card(false);
        assert!((0..4).all(|index| passed.reset_with(index).is_none()));
    }

    #[test]
    fn a_function_whose_bus_cannot_be_reset_is_not_reset_with_anything() {
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> {
            Ok(Arc::new(Device::with(&nic_config()).without_reset()))
        };
        let passed = Passed::attach(&two(), &ram(), Host::new(), open, ANY).expect("attached");
        assert!(passed.reset_with(0).is_none());
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
