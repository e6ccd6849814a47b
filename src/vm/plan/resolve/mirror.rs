//! The layout that mirrors the host: what `viommu = per-host` stands for, and `auto` and `hw` without a root complex when
//! functions of the host say no place.
//!
//! An IOMMU of the guest stands for one of the host's. So each of the host's that serves such a function is given a
//! root complex, and an IOMMU over it. A group of the host is what an IOMMU tells apart at all: each becomes
//! one device behind a root port of its own, since the guest puts functions of one device into one group, and what is
//! behind different ports into different ones.
//!
//! The first root complex is where devices go that say no place. It stands for the first IOMMU of the host, unless
//! that one is to serve the guest's itself: what Ravelin emulates cannot be behind it, and is given an emulated one.
//!
//! All of it is said as the operator could have said it, in a configuration that is resolved like any other.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::pci::assign::Slot;
use crate::platform::addr::Sbdf;
use crate::vm::config::Config;
use crate::vm::config::said::{ConfigError, Kind, Place, Table, Value};
use crate::vm::config::section::Section;
use crate::vm::config::sections::{RootComplex, VfioDevice, Viommu};
use crate::vm::config::values::{Name, ViommuMode};
use crate::vm::host_functions::{HostFunctions, UNCONFINED};

use super::hardware;

/// The functions of a device.
const MOST_FUNCTIONS: usize = 8;
/// What the root complex is called that a machine has without one being said.
const FIRST_ROOT: &str = "rc0";

/// A function without a place: which one of those that were said, and where it is on the host.
type Placeless = (usize, Sbdf);

/// An IOMMU of the host that serves functions without a place.
struct Served {
    /// The kernel's name.
    iommu: String,
    /// Its functions by group, in the order of the lowest address of each.
    groups: Vec<Vec<Placeless>>,
}

/// `config` with the layout that mirrors `host` said in it, where that was asked for.
pub(super) fn mirrored<'a>(config: &'a Config, host: &HostFunctions) -> Result<Cow<'a, Config>, ConfigError> {
    let mut per_host = config
        .viommus
        .iter()
        .filter(|viommu| viommu.mode == Some(ViommuMode::PerHost));
    if let Some(viommu) = per_host.clone().find(|viommu| viommu.on.is_some()) {
        let problem =
            "per-host stands for IOMMUs over root complexes of their own; leave it out, or say mode=auto";
        return Err(viommu.source().wrong("on", problem));
    }
    let Some(template) = config.viommus.iter().position(mirrors) else {
        return Ok(Cow::Borrowed(config));
    };
    let served = served(config, host)?;
    if served.is_empty() {
        return match per_host.next() {
            Some(viommu) => {
                let problem = "no function of the host is left without a place, for whose IOMMU it would stand; say a \
                               vfio-device without port, on and slot, or mode=auto";
                Err(viommu.source().wrong("mode", problem))
            }
            None => Ok(Cow::Borrowed(config)),
        };
    }
    laid_out(config, template, &served, host).map(Cow::Owned)
}

/// `config` with an IOMMU like number `template` of it for each that is `served`, over a root complex with the functions of
/// that one.
fn laid_out(
    config: &Config,
    template: usize,
    served: &[Served],
    host: &HostFunctions,
) -> Result<Config, ConfigError> {
    let units: Vec<&str> = served.iter().map(|served| served.iommu.as_str()).collect();
    let mut said = config.clone();
    let mut template = said.viommus.remove(template);
    if template.mode == Some(ViommuMode::PerHost) {
        template.mode = Some(ViommuMode::Auto);
    }
    refuse_ambiguous(&template, &said.viommus, &units)?;
    if said.root_complexes.is_empty() {
        let root = section::<RootComplex>(template.source().place_of("mode"), &[("id", FIRST_ROOT)])?;
        said.root_complexes.push(root);
    }
    let ids = ids(&said);
    let mut roots = free_names(
        &ids,
        "rc",
        unnamed(said.root_complexes.iter().map(|root| &root.id)),
    );
    let mut iommus = free_names(
        &ids,
        "iommu",
        unnamed(said.viommus.iter().map(|viommu| &viommu.id)),
    );
    let mut ports = free_names(&ids, "rp", unnamed(said.root_ports.iter().map(|port| &port.id)));
    let mut first_root = uncovered_first_root(&said, &ids);
    let crowded = first_root.as_ref().is_some_and(|root| has_emulated(&said, root));
    if crowded && is_hardware(config, &template, &served[0], host)? {
        let mut unit = template.clone();
        (unit.mode, unit.abi) = (Some(ViommuMode::Emulated), None);
        unit.id = iommus.next().map(Name);
        unit.on = first_root.take().map(Name);
        said.viommus.push(unit);
    }
    for Served { iommu, groups } in served {
        let lowest = groups[0][0];
        let root = match first_root.take() {
            Some(root) => root,
            None => added_root(&mut said, lowest, iommu, roots.next())?,
        };
        let mut unit = template.clone();
        unit.id = unit.id.or_else(|| iommus.next().map(Name));
        unit.on = Some(Name(root.clone()));
        said.viommus.push(unit);
        for group in groups {
            let port = ports.next().expect("numbers do not end");
            let place = config.vfio_devices[group[0].0].source().place_of("host");
            said.root_ports
                .push(section(place, &[("id", &port), ("on", &root)])?);
            for ((index, _), slot) in group.iter().zip(slots(group)) {
                let device = &mut said.vfio_devices[*index];
                device.port = Some(Name(port.clone()));
                device.slot = Some(slot);
            }
        }
    }
    Ok(said)
}

/// Whether it is left to us what this IOMMU covers.
fn mirrors(viommu: &Viommu) -> bool {
    use ViommuMode::{Auto, Hardware, PerHost};
    viommu.on.is_none() && matches!(viommu.mode, None | Some(Auto | Hardware | PerHost))
}

/// Whether the IOMMU of the host itself will serve what is made of `template` for it.
fn is_hardware(
    config: &Config,
    template: &Viommu,
    served: &Served,
    host: &HostFunctions,
) -> Result<bool, ConfigError> {
    if template.mode == Some(ViommuMode::Hardware) {
        return Ok(true);
    }
    let (_, lowest) = served.groups[0][0];
    let possible = hardware::possible(config, template, &served.iommu, lowest, host)?;
    Ok(possible.is_ok())
}

/// Whether a device that Ravelin emulates is on the root complex `root`, the first, or behind a port that may be.
fn has_emulated(said: &Config, root: &str) -> bool {
    let elsewhere = |on: &Option<Name>| on.as_ref().is_some_and(|on| on.0 != root);
    let behind = |port: &Name| {
        let mut ports = said.root_ports.iter();
        let port = ports.find(|other| other.id.as_ref() == Some(port));
        port.is_none_or(|port| !elsewhere(&port.on))
    };
    let there = |(port, on): (&Option<Name>, &Option<Name>)| match port {
        Some(port) => behind(port),
        None => !elsewhere(on),
    };
    macro_rules! any_there {
        ($($list:ident)+) => {
            false $(|| said.$list.iter().any(|device| there((&device.port, &device.on))))+
        };
    }
    any_there!(disks nets consoles rngs test_devices)
}

fn is_placeless(device: &VfioDevice) -> bool {
    device.port.is_none() && device.on.is_none() && device.slot.is_none() && device.viommu.is_none()
}

/// The functions without a place, by group, by the IOMMU of the host that serves them: in the order of the lowest
/// address of each.
fn served(config: &Config, host: &HostFunctions) -> Result<Vec<Served>, ConfigError> {
    let mut placeless: Vec<Placeless> = Vec::new();
    for (index, device) in config.vfio_devices.iter().enumerate() {
        if is_placeless(device) {
            placeless.push((index, device.host.0.0));
        }
    }
    placeless.sort_by_key(|(_, at)| *at);
    let mut served: Vec<Served> = Vec::new();
    let mut groups: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (index, at) in placeless {
        let wrong = |problem: String| config.vfio_devices[index].source().wrong("host", problem);
        // What is no function that can be passed at all is said first.
        host.face(at).map_err(wrong)?;
        let (Some(iommu), Some(group)) = (host.iommu(at), host.iommu_group(at)) else {
            return Err(wrong(UNCONFINED.to_owned()));
        };
        if let Some((unit, group_index)) = groups.get(&group) {
            let members = &mut served[*unit].groups[*group_index];
            if members.len() == MOST_FUNCTIONS {
                return Err(wrong(format!(
                    "{MOST_FUNCTIONS} functions of its IOMMU group, {group}, are passed already, and a device has no \
                     more; leave it out, since the guest could not have it in the same group"
                )));
            }
            members.push((index, at));
            continue;
        }
        let unit = served
            .iter()
            .position(|served| served.iommu == iommu)
            .unwrap_or_else(|| {
                served.push(Served {
                    iommu,
                    groups: Vec::new(),
                });
                served.len() - 1
            });
        groups.insert(group, (unit, served[unit].groups.len()));
        served[unit].groups.push(vec![(index, at)]);
    }
    Ok(served)
}

/// Where the functions of one group are on their bus: as on the host when they are one device there.
fn slots(group: &[Placeless]) -> Vec<Slot> {
    let device = |at: Sbdf| (at.segment, at.bdf.bus(), at.bdf.device());
    let first = group[0].1;
    let as_there = first.bdf.function() == 0 && group.iter().all(|(_, at)| device(*at) == device(first));
    let counted = (0..).zip(group);
    counted
        .map(|(count, (_, at))| if as_there { at.bdf.function() } else { count })
        .map(|function| Slot::new(0, function).expect("eight functions at most"))
        .collect()
}

/// One IOMMU was said: it cannot be two, have one name for several, or cover what another does.
fn refuse_ambiguous(template: &Viommu, others: &[Viommu], units: &[&str]) -> Result<(), ConfigError> {
    if let Some(other) = others.iter().find(|other| mirrors(other)) {
        let problem = "another viommu stands for all of the host's that serve functions without a place; say which \
                       root complex this one is on";
        return Err(other.source().wrong("on", problem));
    }
    if template.id.is_some() && units.len() > 1 {
        let problem = format!(
            "it stands for {} IOMMUs of the host, {}, by one each; leave id out, or say a viommu with `on` for each",
            units.len(),
            units.join(", ")
        );
        return Err(template.source().wrong("id", problem));
    }
    Ok(())
}

/// A root complex called `name` for what `iommu` of the host serves, the lowest function of which is `lowest`.
fn added_root(
    said: &mut Config,
    (lowest, _): Placeless,
    iommu: &str,
    name: Option<String>,
) -> Result<String, ConfigError> {
    let source = said.vfio_devices[lowest].source();
    let takes = |root: &&RootComplex| root.segment.unwrap_or(0) == 0 && root.bus.is_some();
    if let Some(root) = said.root_complexes.iter().find(takes) {
        let problem = format!(
            "{iommu} of the host serves it, for which a root complex would be added; that gets no buses, as {} says \
             which others have; say a port for it, and a viommu with `on`",
            root.source().place_of("bus")
        );
        return Err(source.wrong("host", problem));
    }
    let name = name.expect("numbers do not end");
    let root = section(source.place_of("host"), &[("id", &name)])?;
    said.root_complexes.push(root);
    Ok(name)
}

/// The first root complex, unless an IOMMU that was said covers it.
fn uncovered_first_root(said: &Config, ids: &BTreeSet<String>) -> Option<String> {
    let root = said.root_complexes.first()?;
    let name = match &root.id {
        Some(id) => id.0.clone(),
        None => free_names(ids, "rc", 0).next()?,
    };
    let covers = |viommu: &Viommu| viommu.on.as_ref().is_none_or(|on| on.0 == name);
    (!said.viommus.iter().any(covers)).then_some(name)
}

/// A section as if `keys` had been said at `place`.
fn section<T: Section>(place: &Place, keys: &[(&str, &str)]) -> Result<T, ConfigError> {
    let text = |text: &str| Value {
        place: place.clone(),
        kind: Kind::Text(text.to_owned()),
    };
    let keys: Table = keys
        .iter()
        .map(|(key, value)| ((*key).to_owned(), text(value)))
        .collect();
    T::read(&Value {
        place: place.clone(),
        kind: Kind::Table(keys),
    })
}

/// Every name that was said.
fn ids(config: &Config) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    macro_rules! ids_of {
        ($($list:ident)+) => {
            $(ids.extend(config.$list.iter().filter_map(|entry| entry.id.as_ref()).map(|id| id.0.clone()));)+
        };
    }
    ids_of!(disks nets consoles rngs test_devices root_complexes root_ports switches viommus vfio_devices);
    ids
}

/// How many of the entries with these names will be given one.
fn unnamed<'b>(ids: impl Iterator<Item = &'b Option<Name>>) -> usize {
    ids.filter(|id| id.is_none()).count()
}

/// Names of the form `prefix`0, `prefix`1, ... that nothing has or will be given: the first `given` go to entries that
/// said none.
fn free_names<'b>(
    ids: &'b BTreeSet<String>,
    prefix: &'b str,
    given: usize,
) -> impl Iterator<Item = String> + 'b {
    (0_u32..)
        .map(move |number| format!("{prefix}{number}"))
        .filter(move |name| !ids.contains(name))
        .skip(given)
}

#[cfg(test)]
mod tests;
