//! What each way of serving a guest needs, and what of it is not there.

use serde::Serialize;

use super::{HostReport, IommuKind, UnitTrial};
use crate::iommu::iommufd::viommu::{Answer, PAGE_OFFSET, Tried, VIOMMU_ALLOC, Version};
use crate::iommu::viommu::features::{Missing, missing};
use crate::iommu::viommu::host::HostFeatures;

/// The driver a function must be bound to before it can be given away.
const VFIO_PCI: &str = "vfio-pci";

/// A way of serving a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mode {
    /// What it is called.
    pub name: &'static str,
    /// What it gives.
    pub gives: &'static str,
    /// What it needs and the host lacks; ready when empty.
    pub missing: Vec<String>,
    /// What it can do without, and how it is then.
    pub without: Vec<String>,
}

/// Each mode, and what this host lacks for it.
pub(super) fn judge(host: &HostReport) -> Vec<Mode> {
    let mode = |name, gives, missing| Mode {
        name,
        gives,
        missing,
        without: Vec::new(),
    };
    let passed = |by_groups| [machine(host), passthrough(host, by_groups)].concat();
    let hardware = [passed(false), hardware_unit(host), kernel(host)].concat();
    vec![
        mode("machine", "guests with emulated devices", machine(host)),
        mode(
            "passed",
            "functions of the host, without an IOMMU of the guest",
            passed(true),
        ),
        mode(
            "emulated",
            "an emulated IOMMU before emulated devices",
            machine(host),
        ),
        mode(
            "shadowed",
            "an emulated IOMMU before functions of the host",
            passed(false),
        ),
        Mode {
            without: avic(host),
            ..mode(
                "hw",
                "the host IOMMU's vIOMMU hardware for passed-through functions",
                hardware,
            )
        },
        mode("sim", "a model of that hardware", machine(host)),
    ]
}

fn machine(host: &HostReport) -> Vec<String> {
    host.kvm
        .usable
        .as_ref()
        .err()
        .map(|why| format!("KVM: {why}"))
        .into_iter()
        .collect()
}

/// What functions of the host need, which may also be opened by their groups where `by_groups` says so.
fn passthrough(host: &HostReport, by_groups: bool) -> Vec<String> {
    let functions = || host.groups.iter().flat_map(|group| &group.functions);
    let bound = functions().any(|function| function.driver.as_deref() == Some(VFIO_PCI));
    let lacks = [
        (
            host.iommus.is_empty(),
            "an IOMMU: none is in use; look for it in the firmware's settings and the kernel's command line",
        ),
        (
            !(host.iommufd || by_groups && host.vfio_groups),
            "/dev/iommu: load iommufd, of a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
        ),
        (!host.vfio_pci, "the driver vfio-pci: load it"),
        (!bound, "a function bound to vfio-pci: none is"),
    ];
    let mut missing: Vec<String> = lacks
        .into_iter()
        .filter(|(lacks, _)| *lacks)
        .map(|(_, what)| what.to_owned())
        .collect();
    if let Some(limit) = host.memlock {
        missing.push(format!(
            "a memlock limit of the guest's RAM and more: it is {} MiB (ulimit -l unlimited)",
            limit >> 20
        ));
    }
    missing
}

/// What the unit itself must offer, unless one of the host's does: of the one that comes nearest.
fn hardware_unit(host: &HostReport) -> Vec<String> {
    let told = |name: &str| {
        let trials = host.trials.iter().flatten();
        let mut of_unit = trials.filter(|trial| trial.iommu == name);
        of_unit.find_map(|trial| trial.answers.as_ref().ok()?.features)
    };
    let lacks = host.iommus.iter().filter_map(|iommu| match iommu.kind {
        IommuKind::Amd { efr, efr2 } => {
            // The kernel lends what all of its units have, which is what counts.
            let features = told(&iommu.name).unwrap_or(HostFeatures { efr, efr2 });
            Some((iommu, missing(features)))
        }
        IommuKind::Intel { .. } | IommuKind::Other => None,
    });
    let Some((iommu, lacks)) = lacks.min_by_key(|(_, lacks)| lacks.len()) else {
        return vec!["an AMD IOMMU: there is none".to_owned()];
    };
    let name = &iommu.name;
    let lacking = |missing: &Missing| format!("{missing}; {name} has it not");
    let mut lacking: Vec<String> = lacks.iter().map(lacking).collect();
    if iommu.viommu_bars == Some(false) {
        let firmware = "a firmware that enables the BARs of the vIOMMU extension";
        lacking.push(format!("{firmware}: those of {name} are off"));
    }
    lacking
}

/// What the kernel must offer.
fn kernel(host: &HostReport) -> Vec<String> {
    let release = host.kernel.release.as_deref().unwrap_or("unknown");
    let not_built = host.kernel.not_built.iter();
    let mut missing: Vec<String> = not_built
        .map(|option| format!("a kernel with {option}: /boot/config-{release} is without"))
        .collect();
    let why = match &host.trials {
        Err(why) => Some(format!("not asked: {why}")),
        Ok(trials) => {
            let mut reasons: Vec<_> = trials.iter().map(refusal).collect();
            reasons.sort_by_key(Option::is_some);
            reasons.into_iter().next().flatten()
        }
    };
    missing.extend(why.map(|why| format!("a kernel with AMD's vIOMMU: {why}")));
    missing
}

/// Why the kernel cannot serve a guest by the unit of `trial`, if it cannot.
fn refusal(trial: &UnitTrial) -> Option<String> {
    let tried = match &trial.answers {
        Err(why) => return Some(format!("not asked with {}: {why}", trial.function)),
        Ok(tried) => tried,
    };
    let Some(version) = tried.version() else {
        return Some(format!("the version it answers to is {}", verdict(tried)));
    };
    let step = version.first_refusal()?;
    let answer = match &step.answer {
        Answer::Refused { errno, .. } => errno,
        Answer::Ok | Answer::NotWritten | Answer::NotAsked => "nothing",
    };
    Some(format!(
        "{} of {} is answered with {answer}",
        step.name, version.name
    ))
}

/// Which version of AMD's interface the kernel answers to, or how it is told that it is none.
#[must_use]
pub fn verdict(tried: &Tried) -> &'static str {
    let any = |step: &str| {
        let says = |version: &Version| version.answer(step) == Some(&Answer::Ok);
        tried.versions.iter().any(says)
    };
    match tried.version() {
        Some(version) => version.name,
        None if any(PAGE_OFFSET) => {
            "none, though it has a VF page: a kernel of AMD's with another version, which a file for --abi can say"
        }
        None if any(VIOMMU_ALLOC) => {
            "none: a stock kernel, which makes a vIOMMU of any type and does nothing about it"
        }
        None => "none",
    }
}

/// What is lost without AVIC, where it is known to be off.
fn avic(host: &HostReport) -> Vec<String> {
    let off = host.kvm.avic == Some(false);
    let lost = "kvm_amd with avic=1: it is off, and the event log's interrupts do not reach a guest";
    off.then(|| lost.to_owned()).into_iter().collect()
}
