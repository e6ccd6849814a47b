//! What of the host's functions the guest's IOMMUs would have to confine, and refusals of what they cannot.

use std::collections::BTreeMap;

use crate::pci::tree::{NodeKind, PciTree};
use crate::platform::addr::Sbdf;
use crate::vm::config::Config;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::Section;
use crate::vm::host_functions::HostFunctions;
use crate::vm::plan::{DeviceKind, DevicePlan, Plan, ViommuPlan};

/// The functions of the host among `devices`, in their order: index, name and address.
fn passed(devices: &[DevicePlan]) -> impl Iterator<Item = (usize, &str, Sbdf)> {
    devices
        .iter()
        .enumerate()
        .filter_map(|(index, device)| match &device.kind {
            DeviceKind::Vfio(vfio) => Some((index, device.name.as_str(), vfio.host)),
            _ => None,
        })
}

/// Whether `viommu` covers what is called `name`.
fn covers(viommu: &ViommuPlan, name: &str) -> bool {
    viommu.covers.iter().any(|covered| covered == name)
}

/// A function of the host is not put behind an IOMMU that could not confine it.
pub(super) fn refuse_unconfined(config: &Config, plan: &Plan) -> Result<(), ConfigError> {
    for (device, (_, name, _)) in config.vfio_devices.iter().zip(passed(&plan.devices)) {
        let covering = plan.viommus.iter().find(|viommu| covers(viommu, name));
        let source = device.source();
        if let Some(viommu) = covering {
            let problem = format!(
                "{name} would be behind {}, which cannot confine functions of the host in this version; put it on a \
                 root complex without an IOMMU",
                viommu.name
            );
            return Err(source.wrong("host", problem));
        }
        if device.viommu.is_some() {
            let problem = "functions of the host behind an IOMMU of the guest are not built in this version";
            return Err(source.wrong("viommu", problem));
        }
    }
    Ok(())
}

/// Functions of one group of the host are not put where the guest could tell them apart: whatever it lets one of them
/// access, the host lets all of them. Functions of one device are one group to the guest.
pub(super) fn refuse_split_groups(
    config: &Config,
    pci: &PciTree,
    devices: &[DevicePlan],
    viommus: &[ViommuPlan],
    host: &HostFunctions,
) -> Result<(), ConfigError> {
    let mut seen: BTreeMap<String, (&str, Option<GuestDevice>)> = BTreeMap::new();
    for (device, (index, name, at)) in config.vfio_devices.iter().zip(passed(devices)) {
        let covered = viommus.iter().any(|viommu| covers(viommu, name));
        let Some(group) = host.iommu_group(at).filter(|_| covered) else {
            continue;
        };
        let own = guest_device(pci, index);
        let (other, others) = *seen.entry(group.clone()).or_insert((name, own));
        if own != others {
            let problem = format!(
                "{other} is in the same IOMMU group of the host, {group}, and the guest would have them in different \
                 ones; say the same port for both, and slots 0.0, 0.1 and so on"
            );
            return Err(device.source().wrong("host", problem));
        }
    }
    Ok(())
}

/// Segment, bus and device.
type GuestDevice = (u16, u8, u8);

/// Where the guest has device number `index` of the plan.
fn guest_device(pci: &PciTree, index: usize) -> Option<GuestDevice> {
    let (segment, node) = pci
        .nodes()
        .find(|(_, node)| node.kind == NodeKind::Endpoint(index))?;
    Some((segment, node.bdf.bus(), node.bdf.device()))
}

/// Say which IOMMUs of the host each of `viommus` stands for.
pub(super) fn name_host_iommus(viommus: &mut [ViommuPlan], devices: &[DevicePlan], host: &HostFunctions) {
    for viommu in viommus {
        let behind = passed(devices).filter(|(_, name, _)| covers(viommu, name));
        let mut names: Vec<String> = behind.filter_map(|(_, _, at)| host.iommu(at)).collect();
        names.sort();
        names.dedup();
        viommu.stands_for = names;
    }
}
