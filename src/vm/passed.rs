//! The host's functions of a plan: opened, attached to guest RAM, and only then part of a machine.

use std::sync::Arc;

use super::hardware::{self, GuestProcessors, Serving};
use super::opening::Opening;
use super::plan::{DeviceKind, Plan};
use crate::devices::vfio::host::{Companion, HostFunction};
use crate::devices::vfio::hot_reset::{HotResetMember, HotResetSet};
use crate::devices::vfio::lent::Lent;
use crate::iommu::iommufd::viommu::HwHost;
use crate::iommu::iommufd::{Attach as _, Ioas, Memlock, Requests};
use crate::platform::addr::Sbdf;
use crate::platform::host::HostError;
use crate::platform::kvm::KvmVm;
use crate::platform::memory::GuestRam;

/// The functions that are passed through, all reaching one address space with guest RAM in it: attached to it, or where
/// a unit of the host's serves the guest's before them, to the parent of the guest's tables over it.
pub(super) struct Passed {
    /// By the device's index in the plan. They go before what they are attached to.
    functions: Vec<Option<Arc<Lent>>>,
    /// By the unit's index in the plan.
    hosts: Vec<Option<Arc<HwHost>>>,
    space: Option<Arc<Ioas>>,
    /// By the device's index, those that are reset with others.
    reset_with: Vec<Option<HotResetMember>>,
}

/// A device of a plan that is a function of the host.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    at: Sbdf,
    /// A unit of the host's serves the guest's before it.
    served: bool,
}

impl Passed {
    /// Those of `plan`, which becomes `vm`. Nothing of the host's is opened when there are none.
    pub(super) fn open(plan: &Plan, ram: &GuestRam, vm: &KvmVm) -> Result<Self, HostError> {
        let wanted = wanted(plan);
        if wanted.iter().all(Option::is_none) {
            return Ok(Self {
                functions: Vec::new(),
                hosts: Vec::new(),
                space: None,
                reset_with: Vec::new(),
            });
        }
        let mut opening = Opening::of(plan)?;
        let requests = opening.requests();
        let serving = Serving {
            plan,
            kernel: opening.kernel(),
            processors: Arc::new(GuestProcessors::new(vm.descriptor(), plan.cpus.apic_ids.clone())),
            host: opening.host().clone(),
        };
        let serve = |functions: &[_], space: &Ioas| serving.hosts(functions, space);
        let open = |at: Sbdf| -> Result<Arc<dyn HostFunction>, HostError> { Ok(Arc::new(opening.open(at)?)) };
        let passed = Self::attach(&wanted, ram, requests, open, serve, Memlock::here())?;
        let hypervisor = vm.assigned_devices();
        for (wanted, function) in wanted.iter().zip(&passed.functions) {
            if let (Some(wanted), Some(function)) = (wanted, function)
                && let Err(error) = function.tell(&*hypervisor)
            {
                // A host without KVM's list of them, for one.
                tracing::info!(function = %wanted.at, %error, reason = %error.source, "the hypervisor does not know of the function, which works all the same");
            }
        }
        Ok(passed)
    }

    /// Open each of `wanted` by `open`, attach it, or have `serve` do that for those that are served, and give all of
    /// them `ram`.
    pub(super) fn attach(
        wanted: &[Option<Wanted>],
        ram: &GuestRam,
        requests: Arc<dyn Requests>,
        mut open: impl FnMut(Sbdf) -> Result<Arc<dyn HostFunction>, HostError>,
        serve: impl FnOnce(&[Option<Arc<Lent>>], &Ioas) -> Result<Vec<Option<Arc<HwHost>>>, HostError>,
        limit: Memlock,
    ) -> Result<Self, HostError> {
        // Dropped in reverse where a step fails: the functions, then what they are attached to.
        let space = Arc::new(Ioas::new(requests, ram.clone())?);
        let mut functions = Vec::with_capacity(wanted.len());
        for wanted in wanted {
            let function = wanted.map(|wanted| open(wanted.at)).transpose()?.map(Lent::new);
            if let (Some(function), Some(Wanted { at, served: false })) = (&function, *wanted) {
                function
                    .attach(space.id())
                    .map_err(|source| HostError::new(format!("attach {at} to the guest's RAM"), source))?;
            }
            functions.push(function);
        }
        let hosts = serve(&functions, &space)?;
        space.map_ram(limit)?;
        Ok(Self {
            reset_with: reset_together(wanted, &functions),
            functions,
            hosts,
            space: Some(space),
        })
    }

    /// The function of device number `index` of the plan, and what its requests reach.
    pub(super) fn function(&self, index: usize) -> Option<(Arc<Lent>, Arc<Ioas>)> {
        let function = self.functions.get(index)?.clone()?;
        Some((function, self.space.clone()?))
    }

    /// Whether there are several functions, which may have to do with one another.
    pub(super) fn has_several(&self) -> bool {
        self.functions.iter().flatten().nth(1).is_some()
    }

    /// The unit of the host's that serves unit number `index` of the plan, and what it is over, which goes after it.
    pub(super) fn host(&self, index: usize) -> Option<(Arc<HwHost>, Arc<Ioas>)> {
        let host = self.hosts.get(index)?.clone()?;
        Some((host, self.space.clone()?))
    }

    /// Whether the function of device number `index` of the plan is reset with others.
    pub(super) fn reset_with(&self, index: usize) -> Option<HotResetMember> {
        self.reset_with.get(index)?.clone()
    }
}

/// Which of `functions`, those of `all`, are reset together, because the host cannot reset one of them alone. Why
/// one cannot be reset at all is logged.
fn reset_together(all: &[Option<Wanted>], functions: &[Option<Arc<Lent>>]) -> Vec<Option<HotResetMember>> {
    let mut members: Vec<Option<HotResetMember>> = vec![None; functions.len()];
    for (index, (wanted, function)) in all.iter().zip(functions).enumerate() {
        let (Some(Wanted { at, .. }), Some(function)) = (wanted, function) else {
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
        let concerned = |other: &Wanted| companions.iter().any(|companion| companion.at == other.at);
        let set: Vec<usize> = (0..all.len())
            .filter(|other| all[*other].as_ref().is_some_and(concerned))
            .collect();
        for (other, member) in set.iter().zip(HotResetSet::of(set.len())) {
            members[*other] = Some(member);
        }
    }
    members
}

/// What each device of `plan` is on the host, if it is the host's.
pub(super) fn wanted(plan: &Plan) -> Vec<Option<Wanted>> {
    let hardware = plan.viommus.iter().filter(|unit| unit.hardware.is_some());
    let served: Vec<usize> = hardware
        .flat_map(|unit| hardware::behind(plan, unit))
        .map(|(index, _)| index)
        .collect();
    let devices = plan.devices.iter().enumerate();
    let wanted = devices.map(|(index, device)| match &device.kind {
        DeviceKind::Vfio(vfio) => Some(Wanted {
            at: vfio.host,
            served: served.contains(&index),
        }),
        _ => None,
    });
    wanted.collect()
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

    fn two() -> [Option<Wanted>; 3] {
        let wanted = |at: &str| {
            Some(Wanted {
                at: at.parse().expect("valid"),
                served: false,
            })
        };
        [wanted("41:00.0"), None, wanted("41:00.1")]
    }

    /// No unit of the host's serves any of the guest's.
    fn none(_: &[Option<Arc<Lent>>], _: &Ioas) -> Result<Vec<Option<Arc<HwHost>>>, HostError> {
        Ok(Vec::new())
    }

    #[test]
    fn every_function_is_attached_before_ram_is_mapped_for_all_of_them() {
        let (host, device) = (Host::new(), Device::nic());
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> { Ok(device.clone()) };
        let passed = Passed::attach(&two(), &ram(), host.clone(), open, none, ANY).expect("attached");
        let (_, space) = passed.function(0).expect("the first");
        assert!(passed.has_several());
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
        Passed::attach(&two(), &ram(), Host::new(), open, none, ANY).expect("attached")
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
        let passed = Passed::attach(&two(), &ram(), Host::new(), open, none, ANY).expect("attached");
        assert!(passed.reset_with(0).is_none());
    }

    #[test]
    fn a_function_that_cannot_be_attached_ends_it_and_nothing_stays_mapped() {
        let (host, device) = (Host::new(), Device::nic());
        device.refuse(Asked::Attach, libc::EINVAL);
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> { Ok(device.clone()) };
        let error = Passed::attach(&two(), &ram(), host.clone(), open, none, ANY)
            .err()
            .expect("refused");
        assert_eq!(error.to_string(), "cannot attach 0000:41:00.0 to the guest's RAM");
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn a_function_that_cannot_be_opened_ends_it_and_nothing_stays_mapped() {
        let host = Host::new();
        let open = |_| Err(HostError::new("open it", std::io::ErrorKind::PermissionDenied));
        let error = Passed::attach(&two(), &ram(), host.clone(), open, none, ANY)
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
        assert!(Passed::attach(&two(), &ram(), host.clone(), open, none, ANY).is_err());
        assert!(host.spaces().is_empty());
    }
}
