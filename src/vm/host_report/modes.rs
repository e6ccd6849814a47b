//! What each way of serving a guest needs, and what of it is not there.

use serde::Serialize;

use crate::iommu::amd::spec::registers::{Efr, Efr2};

use super::{HostReport, IommuKind};

/// What is said of everything that no code does yet.
const NOT_BUILT: &str = "a version of Ravelin that has it: this one does not";
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
}

/// Each mode, and what this host lacks for it.
pub(super) fn judge(host: &HostReport) -> Vec<Mode> {
    let mut passing = machine(host);
    passing.extend(passthrough(host));
    let mut shadowed = passing.clone();
    shadowed.push(NOT_BUILT.to_owned());
    let mut hardware = passing.clone();
    hardware.extend(hardware_unit(host));
    hardware.push(NOT_BUILT.to_owned());
    let mut modelled = machine(host);
    modelled.push(NOT_BUILT.to_owned());
    vec![
        Mode {
            name: "machine",
            gives: "guests with emulated devices",
            missing: machine(host),
        },
        Mode {
            name: "passed",
            gives: "functions of the host, without an IOMMU of the guest",
            missing: passing,
        },
        Mode {
            name: "emulated",
            gives: "an emulated IOMMU before emulated devices",
            missing: machine(host),
        },
        Mode {
            name: "shadowed",
            gives: "an emulated IOMMU before functions of the host",
            missing: shadowed,
        },
        Mode {
            name: "hw",
            gives: "the host IOMMU's vIOMMU hardware for passed-through functions",
            missing: hardware,
        },
        Mode {
            name: "sim",
            gives: "a model of that hardware",
            missing: modelled,
        },
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

fn passthrough(host: &HostReport) -> Vec<String> {
    let functions = || host.groups.iter().flat_map(|group| &group.functions);
    let bound = functions().any(|function| function.driver.as_deref() == Some(VFIO_PCI));
    let lacks = [
        (
            host.iommus.is_empty(),
            "an IOMMU: none is in use; look for it in the firmware's settings and the kernel's command line",
        ),
        (
            !host.iommufd,
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

/// What the unit itself must offer, unless one of the host's does.
fn hardware_unit(host: &HostReport) -> Option<String> {
    let lacks = host.iommus.iter().filter_map(|iommu| match iommu.kind {
        IommuKind::Amd { efr, efr2 } => {
            Some((&iommu.name, lacking(Efr::from_bits(efr), Efr2::from_bits(efr2))))
        }
        IommuKind::Intel { .. } | IommuKind::Other => None,
    });
    let best = lacks.min_by_key(|(_, lacks)| lacks.len());
    match best {
        None => Some("an AMD IOMMU: there is none".to_owned()),
        Some((_, lacks)) if lacks.is_empty() => None,
        Some((name, lacks)) => Some(format!("{} of the IOMMU: {name} comes nearest", lacks.join(", "))),
    }
}

fn lacking(efr: Efr, efr2: Efr2) -> Vec<&'static str> {
    let needed = [
        (efr.viommu(), "vIOMMU"),
        (efr.gt(), "GT"),
        (efr.gio(), "GIO"),
        (efr2.gcr3_trp_mode(), "GCR3TRP"),
    ];
    needed
        .into_iter()
        .filter(|(has, _)| !has)
        .map(|(_, name)| name)
        .collect()
}
