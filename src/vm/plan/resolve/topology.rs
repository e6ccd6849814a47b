//! Who hangs off whom: names looked up, and everything put into one [`TreeSpec`].
//!
//! Without a root complex there is one, with the whole of segment 0. A device that says no place is
//! integrated into the first root complex: that costs the guest the fewest configuration accesses at boot,
//! because there is no port to find, number and probe for each device. Whoever wants ports says them.

use std::collections::BTreeMap;

use crate::iommu::emulated;
use crate::pci::assign::{FunctionSpec, Parent, RootSpec, Slot, TreeSpec};
use crate::pci::tree::{Identity, NodeKind};
use crate::vm::config::Config;
use crate::vm::config::near;
use crate::vm::config::said::ConfigError;
use crate::vm::config::section::{Section, Source};
use crate::vm::config::values::Name;

use super::devices::Endpoint;
use super::names::{Names, What};

/// What the ISA bridge is called. Linux wants a function of its class where the IOAPIC's requester ID points.
pub(super) const ISA_BRIDGE: &str = "isa-bridge";
/// Where it is: device 14 hexadecimal.
const ISA_SLOT: Slot = Slot::new(0x14, 0).expect("constant");
/// Where the host bridge of each root complex is.
const HOST_SLOT: Slot = Slot::new(0, 0).expect("constant");
/// Where the IOMMU of a root complex is, as on boards.
const IOMMU_SLOT: Slot = Slot::new(0, 2).expect("constant");
/// The most downstream ports of one switch: the devices of its bus.
const MAX_DOWNSTREAM: u16 = 32;
/// The most ports of a machine: every bus of every segment that fits below 4 GiB, and more than any of them.
const MAX_PORTS: usize = 4096;

/// The names of everything, in the order it was said.
#[derive(Debug)]
pub(super) struct NamesOf {
    pub(super) root_complexes: Vec<String>,
    pub(super) root_ports: Vec<String>,
    pub(super) switches: Vec<String>,
    pub(super) viommus: Vec<String>,
    pub(super) disks: Vec<String>,
    pub(super) nets: Vec<String>,
    pub(super) consoles: Vec<String>,
    pub(super) rngs: Vec<String>,
    pub(super) test_devices: Vec<String>,
    pub(super) vfio_devices: Vec<String>,
}

/// Give everything its name.
pub(super) fn name_all<'a>(config: &'a Config, names: &mut Names<'a>) -> Result<NamesOf, ConfigError> {
    macro_rules! named {
        ($list:ident, $what:ident, $prefix:literal) => {
            names.name_kind(
                What::$what,
                $prefix,
                config
                    .$list
                    .iter()
                    .map(|entry| (entry.id.as_ref(), entry.source())),
            )?
        };
    }
    names.reserve(ISA_BRIDGE, What::BoardBridge);
    let mut root_complexes = named!(root_complexes, RootComplex, "rc");
    if root_complexes.is_empty() {
        names.reserve("rc0", What::RootComplex);
        root_complexes.push("rc0".to_owned());
    }
    for root in &root_complexes {
        names.reserve(&host_bridge_name(root), What::BoardBridge);
    }
    let root_ports = named!(root_ports, RootPort, "rp");
    let switches = named!(switches, Switch, "sw");
    let ports: usize = config
        .switches
        .iter()
        .map(|switch| usize::from(switch.downstream.0.get()))
        .sum();
    for (switch, name) in config.switches.iter().zip(&switches) {
        let downstream = switch.downstream.0.get();
        if downstream > MAX_DOWNSTREAM {
            let problem = format!("a switch has 1 to {MAX_DOWNSTREAM} downstream ports");
            return Err(switch.source().wrong("downstream", problem));
        }
        if ports.saturating_add(root_ports.len()) > MAX_PORTS {
            let problem = format!("a machine has at most {MAX_PORTS} ports");
            return Err(switch.source().wrong("downstream", problem));
        }
        for port in 0..downstream {
            names.take(
                &downstream_name(name, port),
                What::DownstreamPort,
                switch.source(),
            )?;
        }
    }
    Ok(NamesOf {
        root_complexes,
        root_ports,
        switches,
        viommus: named!(viommus, Viommu, "iommu"),
        disks: named!(disks, Disk, "disk"),
        nets: named!(nets, Nic, "net"),
        consoles: named!(consoles, Console, "console"),
        rngs: named!(rngs, EntropySource, "rng"),
        test_devices: named!(test_devices, TestDevice, "test"),
        vfio_devices: named!(vfio_devices, HostFunction, "vfio"),
    })
}

fn host_bridge_name(root: &str) -> String {
    format!("{root}.host-bridge")
}

fn downstream_name(switch: &str, port: u16) -> String {
    format!("{switch}.{port}")
}

/// The places that others name.
struct Places<'a> {
    names: &'a Names<'a>,
    roots: BTreeMap<&'a str, usize>,
    /// Ports that something can be behind, by their index among the functions.
    ports: BTreeMap<String, usize>,
}

/// Put everything into one specification.
pub(super) fn specify(
    config: &Config,
    names_of: &NamesOf,
    names: &Names<'_>,
    endpoints: Vec<Endpoint<'_>>,
) -> Result<TreeSpec, ConfigError> {
    let roots = root_specs(config, names_of);
    let isa = isa_root(&roots);
    let mut places = Places {
        names,
        roots: names_of
            .root_complexes
            .iter()
            .map(String::as_str)
            .zip(0..)
            .collect(),
        ports: BTreeMap::new(),
    };
    // Ports may be named before they are said: first every index, then every parent.
    let board = host_bridges(&roots).chain(isa.map(isa_bridge));
    let mut functions: Vec<FunctionSpec> = board.collect();
    functions.extend(viommus(config, names_of, &places)?);
    let mut next = functions.len();
    for name in &names_of.root_ports {
        places.ports.insert(name.clone(), next);
        next += 1;
    }
    let mut upstream = Vec::with_capacity(config.switches.len());
    for (switch, name) in config.switches.iter().zip(&names_of.switches) {
        upstream.push(next);
        next += 1;
        for port in 0..switch.downstream.0.get() {
            places.ports.insert(downstream_name(name, port), next);
            next += 1;
        }
    }
    for (port, name) in config.root_ports.iter().zip(&names_of.root_ports) {
        let root = match &port.on {
            Some(on) => places.root(on, port.source())?,
            None => 0,
        };
        let parent = Parent::Root(root);
        functions.push(self::port(name, NodeKind::RootPort, parent, port.slot));
    }
    for ((switch, name), up) in config.switches.iter().zip(&names_of.switches).zip(upstream) {
        let behind = Parent::Port(places.port("on", &switch.on.0, switch.source())?);
        functions.push(self::port(name, NodeKind::UpstreamPort, behind, switch.slot));
        for at in 0..switch.downstream.0.get() {
            let name = downstream_name(name, at);
            functions.push(port(&name, NodeKind::DownstreamPort, Parent::Port(up), None));
        }
    }
    for endpoint in endpoints {
        let parent = places.parent(&endpoint)?;
        functions.push(FunctionSpec {
            parent,
            ..endpoint.function
        });
    }
    Ok(TreeSpec { roots, functions })
}

fn root_specs(config: &Config, names_of: &NamesOf) -> Vec<RootSpec> {
    let said = |at: usize| config.root_complexes.get(at);
    names_of
        .root_complexes
        .iter()
        .enumerate()
        .map(|(at, name)| RootSpec {
            name: name.clone(),
            segment: said(at).and_then(|root| root.segment).unwrap_or(0),
            buses: said(at)
                .and_then(|root| root.bus.as_ref())
                .map(|bus| bus.0.clone()),
        })
        .collect()
}

/// The root complex that has bus 0 of segment 0. With shared bus numbers that is the first.
fn isa_root(roots: &[RootSpec]) -> Option<usize> {
    let has_bus_zero = |root: &RootSpec| root.buses.as_ref().is_none_or(|buses| *buses.start() == 0);
    roots
        .iter()
        .position(|root| root.segment == 0 && has_bus_zero(root))
}

fn host_bridges(roots: &[RootSpec]) -> impl Iterator<Item = FunctionSpec> {
    roots.iter().enumerate().map(|(root, spec)| FunctionSpec {
        name: host_bridge_name(&spec.name),
        kind: NodeKind::HostBridge,
        identity: Identity::HOST_BRIDGE,
        slot: Some(HOST_SLOT),
        ..isa_bridge(root)
    })
}

fn isa_bridge(root: usize) -> FunctionSpec {
    FunctionSpec {
        name: ISA_BRIDGE.to_owned(),
        kind: NodeKind::IsaBridge,
        identity: Identity::ISA_BRIDGE,
        parent: Parent::Root(root),
        slot: Some(ISA_SLOT),
        bars: Vec::new(),
        intx: false,
        removable: false,
    }
}

/// The functions of the IOMMUs, in the order they were said; at most one on a root complex.
fn viommus(
    config: &Config,
    names_of: &NamesOf,
    places: &Places<'_>,
) -> Result<Vec<FunctionSpec>, ConfigError> {
    let mut covered: BTreeMap<usize, &str> = BTreeMap::new();
    let mut functions = Vec::with_capacity(config.viommus.len());
    for (index, (viommu, name)) in config.viommus.iter().zip(&names_of.viommus).enumerate() {
        let root = match &viommu.on {
            Some(on) => places.root(on, viommu.source())?,
            None => 0,
        };
        if let Some(other) = covered.insert(root, name) {
            let root = &names_of.root_complexes[root];
            let problem =
                format!("{root} is covered by {other} already, and a root complex has one IOMMU at most");
            return Err(viommu.source().wrong("on", problem));
        }
        functions.push(FunctionSpec {
            name: name.clone(),
            kind: NodeKind::Iommu(index),
            identity: emulated::IDENTITY,
            slot: Some(IOMMU_SLOT),
            ..isa_bridge(root)
        });
    }
    Ok(functions)
}

fn port(name: &str, kind: NodeKind, parent: Parent, slot: Option<Slot>) -> FunctionSpec {
    FunctionSpec {
        name: name.to_owned(),
        kind,
        identity: match kind {
            NodeKind::UpstreamPort => Identity::UPSTREAM_PORT,
            NodeKind::DownstreamPort => Identity::DOWNSTREAM_PORT,
            _ => Identity::ROOT_PORT,
        },
        parent,
        slot,
        bars: Vec::new(),
        intx: true,
        removable: false,
    }
}

impl Places<'_> {
    /// What a device hangs off.
    fn parent(&self, endpoint: &Endpoint<'_>) -> Result<Parent, ConfigError> {
        match (endpoint.port, endpoint.on) {
            (Some(_), Some(_)) => {
                let problem = "a device is behind a port or on a root complex, not both";
                Err(endpoint.source.wrong("on", problem))
            }
            (Some(port), None) => self.port("port", port, endpoint.source).map(Parent::Port),
            (None, Some(on)) => self.root(on, endpoint.source).map(Parent::Root),
            (None, None) => Ok(Parent::Root(0)),
        }
    }

    fn root(&self, name: &Name, source: &Source) -> Result<usize, ConfigError> {
        if let Some(root) = self.roots.get(name.0.as_str()) {
            return Ok(*root);
        }
        let known: Vec<&str> = self.roots.keys().copied().collect();
        let problem = match self.names.what(&name.0) {
            Some(What::RootPort | What::DownstreamPort) => {
                format!("`{}` is a port; say port={}", name.0, name.0)
            }
            Some(what) => format!(
                "`{}` is {what}; {}",
                name.0,
                near::instead("", "root complexes", &known)
            ),
            None => format!(
                "no root complex has this name; {}",
                near::instead(&name.0, "root complexes", &known)
            ),
        };
        Err(source.wrong("on", problem))
    }

    fn port(&self, key: &str, name: &Name, source: &Source) -> Result<usize, ConfigError> {
        if let Some(port) = self.ports.get(&name.0) {
            return Ok(*port);
        }
        let known: Vec<&str> = self.ports.keys().map(String::as_str).collect();
        let problem = match self.names.what(&name.0) {
            Some(What::Switch) => format!(
                "`{}` is a switch; name one of its downstream ports, {} and so on",
                name.0,
                downstream_name(&name.0, 0)
            ),
            Some(What::RootComplex) if key == "port" => {
                format!("`{}` is a root complex; say on={}", name.0, name.0)
            }
            Some(what) => format!("`{}` is {what}; {}", name.0, near::instead("", "ports", &known)),
            None => format!(
                "no port has this name; {}",
                near::instead(&name.0, "ports", &known)
            ),
        };
        Err(source.wrong(key, problem))
    }
}
