//! Mode `hw` in a machine: units of the host's that serve the guest's, and the kernel asked beforehand whether they do.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::host_functions::HostFunctions;
use super::opening::open_node;
use super::plan::{DeviceKind, HardwarePlan, Plan, ViommuPlan};
use crate::devices::vfio::host::HostFunction as _;
use crate::devices::vfio::lent::Lent;
use crate::iommu::amd::features::Wanted;
use crate::iommu::iommufd::viommu::{
    Functions, HwDevice, HwHost, HwParts, NestParent, Processors, Trial, Tried,
};
use crate::iommu::iommufd::{Abi, Ioas, Iommufd, Kernel};
use crate::iommu::viommu::features::offer;
use crate::iommu::viommu::host::{HostDevice, InterruptTarget, ViommuHost};
use crate::pci::tree::NodeKind;
use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::host::HostError;
use crate::platform::kvm::Kvm;

/// The guest's processors, to which the host's units send interrupts.
pub(super) struct GuestProcessors {
    vm: Arc<dyn AsFd + Send + Sync>,
    /// Of every processor. KVM knows them by the same numbers.
    apic_ids: Vec<u32>,
}

impl GuestProcessors {
    /// Those with `apic_ids` of `vm`.
    pub(super) fn new(vm: Arc<dyn AsFd + Send + Sync>, apic_ids: Vec<u32>) -> Self {
        Self { vm, apic_ids }
    }
}

/// Whether the logical destination `destination` names the processor with `apic_id`: by its x2APIC cluster and its bit
/// there (Intel SDM volume 3, 12.12.10.2). Linux gives processors the same bits in the flat model of xAPIC.
const fn names(destination: u32, apic_id: u32) -> bool {
    destination >> 16 == apic_id >> 4 && destination >> (apic_id & 0xf) & 1 == 1
}

impl Processors for GuestProcessors {
    fn vm(&self) -> BorrowedFd<'_> {
        self.vm.as_fd()
    }

    /// Of several that a logical destination names, the first: the host's unit sends to one.
    fn vcpu(&self, target: InterruptTarget) -> Option<u32> {
        let InterruptTarget {
            destination, logical, ..
        } = target;
        let named = |id: &u32| {
            if logical {
                names(destination, *id)
            } else {
                *id == destination
            }
        };
        self.apic_ids.iter().copied().find(named)
    }
}

/// What makes hosts of a machine's units: who is asked, and who the guest's processors are.
pub(super) struct Serving<'a> {
    pub(super) plan: &'a Plan,
    /// `None` where the host has no iommufd for its functions.
    pub(super) kernel: Option<Arc<dyn Kernel>>,
    pub(super) processors: Arc<dyn Processors>,
    /// For names of functions that nobody has.
    pub(super) host: HostFunctions,
}

impl Serving<'_> {
    /// The host of each unit of the plan that is served by one, over guest memory in `space`; `functions` are those of the
    /// devices of the plan. Functions behind such a unit reach what `space` has from here on, and no other was touched.
    ///
    /// # Errors
    /// What the host lacks or refused, for which unit and function. Nothing is left of any of them then.
    pub(super) fn hosts(
        &self,
        functions: &[Option<Arc<Lent>>],
        space: &Ioas,
    ) -> Result<Vec<Option<Arc<HwHost>>>, HostError> {
        let mut parent: Option<Arc<NestParent>> = None;
        let mut hosts = Vec::with_capacity(self.plan.viommus.len());
        for planned in &self.plan.viommus {
            let Some(hardware) = &planned.hardware else {
                hosts.push(None);
                continue;
            };
            let behind: Vec<_> = behind(self.plan, planned).collect();
            let (_, first) = *behind
                .first()
                .expect("a planned unit of the host's serves a function");
            let refused = |error: HostError| {
                let (iommu, name) = (&hardware.iommu, &planned.name);
                let action = format!(
                    "have {iommu} of the host serve {name}, with {first} behind it (`ravelin host` says what is \
                     missing for mode hw)"
                );
                HostError::new(action, error.source)
            };
            let kernel = self.kernel.as_ref().ok_or_else(|| {
                let source = "functions are opened by their IOMMU groups here, and only /dev/iommu has units serve guests";
                refused(HostError::new("", io::Error::new(io::ErrorKind::Unsupported, source)))
            })?;
            let devices: Vec<HwDevice> = behind
                .iter()
                .map(|(index, _)| {
                    let function = functions.get(*index).cloned().flatten();
                    let function = function.expect("every function of the host in a plan is opened");
                    HwDevice {
                        id: function.id(),
                        function,
                    }
                })
                .collect();
            // One for all: it says where guest memory is, whichever unit looks.
            let over = match &parent {
                Some(parent) => parent.clone(),
                None => NestParent::new(kernel, devices[0].id, space.id()).map_err(refused)?,
            };
            parent = Some(over.clone());
            let count = devices.len();
            let host = HwHost::new(HwParts {
                name: planned.name.clone(),
                kernel: kernel.clone(),
                parent: over,
                devices,
                abis: hardware.abis(),
                functions: self.names(planned, hardware, hosts.len()),
                processors: Some(self.processors.clone()),
            })
            .map_err(refused)?;
            check_features(&host, hardware).map_err(|source| refused(HostError::new("", source)))?;
            // The device table says nothing yet, and where guest memory may be depends on who is attached.
            for device in (0..count).map(HostDevice) {
                let attached = host.attach(device, host.parent());
                attached.map_err(|source| refused(HostError::new("", source)))?;
            }
            tracing::info!(
                unit = planned.name,
                iommu = hardware.iommu,
                interface = host.abi().name,
                "the host's IOMMU serves the guest's"
            );
            hosts.push(Some(host));
        }
        Ok(hosts)
    }

    /// The names that some versions of the interface take, of unit number `index`.
    fn names(&self, planned: &ViommuPlan, hardware: &HardwarePlan, index: usize) -> Functions {
        let at = hardware.function;
        let segment = at.map_or(0, |at| at.segment);
        Functions {
            host_iommu: at.map_or(Bdf::from_requester_id(0), |at| at.bdf),
            guest_iommu: planned.bdf,
            // Each has its own, as what the kernel writes there goes with the unit.
            translate_device: nobody(&self.host, segment, index),
        }
    }
}

/// The functions of the host behind `unit`: their devices' numbers and their addresses there, in the order of the tree.
pub(super) fn behind<'a>(plan: &'a Plan, unit: &ViommuPlan) -> impl Iterator<Item = (usize, Sbdf)> + use<'a> {
    let root = plan.pci.roots().find(|root| root.name == unit.root_complex);
    let root = root.expect("a planned IOMMU covers a planned root complex");
    root.nodes().filter_map(|node| match node.kind {
        NodeKind::Endpoint(index) => match &plan.devices.get(index)?.kind {
            DeviceKind::Vfio(vfio) => Some((index, vfio.host)),
            _ => None,
        },
        _ => None,
    })
}

/// Whether the kernel tells of the unit what the plan went by: a guest is offered nothing that is not there.
fn check_features(host: &HwHost, hardware: &HardwarePlan) -> io::Result<()> {
    let told = host.features()?;
    let planned = hardware.features;
    let offered = |features| offer(&[features], &Wanted::EVERYTHING);
    if offered(told) == offered(planned) {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "GET_HW_INFO tells EFR {:#x} and EFR2 {:#x}, and sysfs EFR {:#x} and EFR2 {:#x}",
        told.efr, told.efr2, planned.efr, planned.efr2
    )))
}

/// What the kernel of this host answered when it was asked with a function.
pub(super) struct TriedOut {
    /// To each step of a guest's life.
    pub(super) steps: Tried,
    /// Whether it hands out memory of the function for others; why not, else.
    pub(super) exports: Result<(), String>,
}

/// What the kernel of this host answers to each step of a guest's life by each of `abis`, asked with the function at
/// `at`, which is opened and closed again.
///
/// # Errors
/// When the function cannot be had.
pub(super) fn try_out(host: &HostFunctions, at: Sbdf, abis: &[Abi]) -> Result<TriedOut, HostError> {
    let iommufd = Iommufd::open()?;
    let function = open_node(host, at, &iommufd)?;
    let exports = function.exports();
    let kernel: Arc<dyn Kernel> = iommufd;
    let device = HwDevice {
        id: function.id(),
        function: Arc::new(function),
    };
    // Only some versions ask for it; what KVM itself lacks is told elsewhere.
    let vm = Kvm::open().ok().and_then(|kvm| kvm.blank_vm().ok());
    let iommu = host.iommu(at).and_then(|name| host.iommu_function(&name));
    let own = iommu.map_or(Bdf::from_requester_id(0), |iommu| iommu.bdf);
    let trial = Trial {
        kernel: &kernel,
        device: &device,
        abis,
        functions: Functions {
            host_iommu: own,
            guest_iommu: own,
            translate_device: nobody(host, at.segment, 0),
        },
        vm: vm.as_ref().map(AsRawFd::as_raw_fd),
    };
    Ok(TriedOut {
        steps: trial.run(),
        exports,
    })
}

/// Whether the kernel of this host has the unit of the function at `at` serve guests by one of `abis`; else what it did not
/// do, and what it said.
pub(super) fn ask(host: &HostFunctions, at: Sbdf, abis: &[Abi]) -> Result<(), String> {
    let tried = try_out(host, at, abis).map_err(|error| format!("{error}: {}", error.source))?;
    let tried = tried.steps;
    if tried.version().is_some() {
        return Ok(());
    }
    let versions = tried.versions.iter();
    let refused = versions.filter_map(|version| Some((version.name, version.first_refusal()?)));
    let refused = refused.map(|(name, step)| format!("{} of version {name}: {}", step.name, step.answer));
    let refused = refused.collect::<Vec<_>>().join("; ");
    Err(format!("the kernel does not have it serve guests: {refused}"))
}

/// The `index`th of the numbers, from the highest down, that no function of `host` has in `segment`.
fn nobody(host: &HostFunctions, segment: u16, index: usize) -> Bdf {
    let numbers = (0..=u16::MAX).rev().map(Bdf::from_requester_id);
    let mut free = numbers.filter(|bdf| !host.has(Sbdf { segment, bdf: *bdf }));
    free.nth(index)
        .expect("a host has fewer functions than a segment has numbers")
}

#[cfg(test)]
mod tests;
