//! What the running kernel answers for mode `hw`, with a function that nobody uses.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::{HostFunction, HostIommu, HostReport, chain};
use crate::devices::vfio::cdev::Cdev;
use crate::devices::vfio::host::HostFunction as _;
use crate::iommu::iommufd::viommu::{Functions, HwDevice, Trial, Tried};
use crate::iommu::iommufd::{Abi, Iommufd, Kernel};
use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::host::HostError;
use crate::platform::kvm::Kvm;

/// What one host IOMMU's driver answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnitTrial {
    /// The kernel's name of the IOMMU.
    pub iommu: String,
    /// The function behind it with which it was asked.
    pub function: Sbdf,
    /// The answers, or why there are none.
    pub answers: Result<Tried, String>,
}

/// Said of a host of which there is only a copy.
pub(super) const RECORDED: &str = "only the running kernel can be asked, and this is a copy of a host";
/// Said where there is no node.
const NO_NODE: &str = "/dev/iommu is not there";
/// Said where there is nothing to ask with.
const NOT_BOUND: &str =
    "no function is bound to vfio-pci; `scripts/bind-vfio bind FUNCTION` binds one that the host can spare";

/// Ask the running kernel once for each IOMMU with a function that is free; why it cannot be asked, else.
///
/// `abis` are the versions to try. Each function is opened, asked with, and closed again.
pub(super) fn of_this_host(host: &HostReport, abis: &[Abi]) -> Result<Vec<UnitTrial>, String> {
    if !host.iommufd {
        return Err(NO_NODE.to_owned());
    }
    let trials: Vec<_> = host
        .iommus
        .iter()
        .filter_map(|iommu| unit(host, iommu, abis))
        .collect();
    if trials.is_empty() {
        return Err(NOT_BOUND.to_owned());
    }
    Ok(trials)
}

/// The functions behind `iommu` that vfio-pci has, with their nodes.
fn bound<'a>(host: &'a HostReport, iommu: &'a HostIommu) -> impl Iterator<Item = (Sbdf, &'a Path)> {
    let functions = host.groups.iter().flat_map(|group| &group.functions);
    let behind = functions.filter(|function| function.iommu.as_ref() == Some(&iommu.name));
    behind.filter_map(|function: &HostFunction| Some((function.address, function.node.as_deref()?)))
}

/// Ask with the first function behind `iommu` that can be had; `None` where none is bound.
fn unit(host: &HostReport, iommu: &HostIommu, abis: &[Abi]) -> Option<UnitTrial> {
    let mut first_refused = None;
    for (function, node) in bound(host, iommu) {
        let answers = ask(host, iommu, function, node, abis).map_err(|error| chain(&error));
        let had = answers.is_ok();
        let trial = UnitTrial {
            iommu: iommu.name.clone(),
            function,
            answers,
        };
        if had {
            return Some(trial);
        }
        first_refused.get_or_insert(trial);
    }
    first_refused
}

fn ask(
    host: &HostReport,
    iommu: &HostIommu,
    function: Sbdf,
    node: &Path,
    abis: &[Abi],
) -> Result<Tried, HostError> {
    let iommufd = Iommufd::open()?;
    let cdev = Cdev::open(function, node, &iommufd)?;
    let kernel: Arc<dyn Kernel> = iommufd;
    let device = HwDevice {
        id: cdev.id(),
        function: Arc::new(cdev),
    };
    // Only some versions ask for it.
    let vm = Kvm::open().ok().and_then(|kvm| kvm.blank_vm().ok());
    let own = iommu.function.map_or(Bdf::from_requester_id(0), |own| own.bdf);
    let trial = Trial {
        kernel: &kernel,
        device: &device,
        abis,
        functions: Functions {
            host_iommu: own,
            guest_iommu: own,
            translate_device: nobody(host, function),
        },
        vm: vm.as_ref().map(AsRawFd::as_raw_fd),
    };
    Ok(trial.run())
}

/// A number that no function of the host has in the segment of `function`.
fn nobody(host: &HostReport, function: Sbdf) -> Bdf {
    let grouped = host.groups.iter().flat_map(|group| &group.functions);
    let all = grouped.chain(&host.ungrouped).map(|function| function.address);
    let taken: BTreeSet<Bdf> = all
        .filter(|at| at.segment == function.segment)
        .map(|at| at.bdf)
        .collect();
    let mut numbers = (0..=u16::MAX).rev().map(Bdf::from_requester_id);
    let free = numbers.find(|bdf| !taken.contains(bdf));
    free.expect("a host has fewer functions than a segment has numbers")
}
