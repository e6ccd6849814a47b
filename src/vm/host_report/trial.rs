//! What the running kernel answers for mode `hw` and for functions in one another's memory, with a function that nobody uses.

use serde::Serialize;

use super::{HostFunction, HostIommu, HostReport, chain};
use crate::iommu::iommufd::Abi;
use crate::iommu::iommufd::viommu::Tried;
use crate::platform::addr::Sbdf;
use crate::vm::hardware::{TriedOut, try_out};
use crate::vm::host_functions::HostFunctions;

/// What one host IOMMU's driver answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnitTrial {
    /// The kernel's name of the IOMMU.
    pub iommu: String,
    /// The function behind it with which it was asked.
    pub function: Sbdf,
    /// The answers, or why there are none.
    pub answers: Result<Tried, String>,
    /// Whether the kernel hands out memory of the function, so that others of a guest reach it, or why not; `None` where it could
    /// not be asked.
    pub exports: Option<Result<(), String>>,
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

/// The functions behind `iommu` that vfio-pci has.
fn bound<'a>(host: &'a HostReport, iommu: &'a HostIommu) -> impl Iterator<Item = Sbdf> + 'a {
    let functions = host.groups.iter().flat_map(|group| &group.functions);
    let behind = functions.filter(|function| function.iommu.as_ref() == Some(&iommu.name));
    let bound = behind.filter(|function| function.node.is_some());
    bound.map(|function: &HostFunction| function.address)
}

/// Ask with the first function behind `iommu` that can be had; `None` where none is bound.
fn unit(host: &HostReport, iommu: &HostIommu, abis: &[Abi]) -> Option<UnitTrial> {
    let mut first_refused = None;
    for function in bound(host, iommu) {
        let tried = try_out(&HostFunctions::here(), function, abis).map_err(|error| chain(&error));
        let had = tried.is_ok();
        let (answers, exports) = match tried {
            Ok(TriedOut { steps, exports }) => (Ok(steps), Some(exports)),
            Err(why) => (Err(why), None),
        };
        let trial = UnitTrial {
            iommu: iommu.name.clone(),
            function,
            answers,
            exports,
        };
        if had {
            return Some(trial);
        }
        first_refused.get_or_insert(trial);
    }
    first_refused
}
