//! What it takes that the guest's IOMMUs confine functions of the host, and refusals of what they could not.

use std::collections::BTreeMap;

use crate::pci::tree::{NodeKind, PciTree};
use crate::platform::addr::Sbdf;
use crate::vm::config::Config;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::Section;
use crate::vm::config::sections::Viommu;
use crate::vm::host_functions::HostFunctions;
use crate::vm::plan::{DeviceKind, DevicePlan, ViommuMode, ViommuPlan};

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

/// Functions of the host are confined by copies of the guest's tables, so the guest has to announce all it maps: to
/// every unit, since a guest expects units to be alike.
pub(super) fn have_maps_announced(
    config: &Config,
    devices: &[DevicePlan],
    viommus: &mut [ViommuPlan],
) -> Result<(), ConfigError> {
    let mut confined = None;
    for (device, (_, name, _)) in config.vfio_devices.iter().zip(passed(devices)) {
        let covering = viommus.iter().find(|viommu| covers(viommu, name));
        let is = covering.map(|viommu| viommu.name.as_str());
        if let Some(said) = &device.viommu
            && is != Some(said.0.as_str())
        {
            let place = is.map_or_else(
                || "behind no IOMMU".to_owned(),
                |viommu| format!("behind {viommu}"),
            );
            let problem =
                format!("{name} is {place} where it is; an IOMMU covers the root complex that it is on");
            return Err(device.source().wrong("viommu", problem));
        }
        if let Some(model) = covering.filter(|viommu| viommu.mode == ViommuMode::Simulated) {
            let problem = format!(
                "it would be behind {}, a model, which no IOMMU of the host follows; put it on another root complex, or \
                 say mode=emulated for that one",
                model.name
            );
            return Err(device.source().wrong("host", problem));
        }
        // The host's unit follows the guest's tables by itself.
        let shadowed = covering.filter(|viommu| viommu.mode == ViommuMode::Emulated);
        confined = confined.or(shadowed.map(|viommu| (name, viommu.name.clone())));
    }
    let Some((name, viommu)) = confined else {
        return Ok(());
    };
    let silent = |viommu: &&Viommu| viommu.np_cache.is_some_and(|said| !said.0);
    if let Some(silent) = config.viommus.iter().find(silent) {
        let problem = format!(
            "{name}, a function of the host, is behind {viommu}, and the host can follow what a guest maps only when \
             that is announced; leave this out, or say on"
        );
        return Err(silent.source().wrong("npcache", problem));
    }
    let serving = |viommu: &&Viommu| viommu.virtualizable.is_some_and(|said| said.0);
    if let Some(serving) = config.viommus.iter().find(serving) {
        let problem = format!(
            "{name}, a function of the host, is behind {viommu}, and the host cannot follow tables of a guest over those \
             of its hypervisor; leave this out, or put the function on a root complex without an IOMMU"
        );
        return Err(serving.source().wrong("virtualizable", problem));
    }
    viommus.iter_mut().for_each(|viommu| viommu.offer.np_cache = true);
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
