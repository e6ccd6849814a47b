//! PCI functions from the plan: every node of the tree becomes what it says it is.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::RunError;
use super::board::Board;
use super::events::EventLoop;
use super::host_signals::HostSignals;
use super::passed::Passed;
use super::plan::{DeviceKind, DevicePlan, NetBackend, NetPlan, Plan};
use super::viommus::{Upstream, Viommus};
use crate::devices::board_bridge::BoardBridge;
use crate::devices::ioapic::Resample;
use crate::devices::test_device::{TestDevice, TestDeviceParts};
use crate::devices::vfio::{VfioFunction, VfioParts};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, BlockConfig};
use crate::devices::virtio::console::Console;
use crate::devices::virtio::net::{self, Net, NetConfig};
use crate::devices::virtio::pci::{VirtioPci, VirtioPciParts};
use crate::devices::virtio::rng::Rng;
use crate::pci::Function;
use crate::pci::bar::BarSpec;
use crate::pci::port::PortInterrupts;
use crate::pci::topology::{Topology, TopologyBuilder};
use crate::pci::tree::{Bar, Node, NodeKind, RootComplex};
use crate::platform::addr::Sbdf;
use crate::platform::device_memory::DeviceMemoryHost;
use crate::platform::dma::Requester;
use crate::platform::doorbell::DoorbellHost;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;
use crate::platform::msi::{MsiPort, MsiSink};

/// What functions are connected to.
pub(super) struct Connections<'a> {
    pub(super) board: &'a Board,
    pub(super) viommus: &'a Viommus<'a>,
    pub(super) events: &'a mut EventLoop,
    pub(super) ram: &'a GuestRam,
    pub(super) messages: Arc<dyn MsiSink>,
    pub(super) doorbells: Arc<dyn DoorbellHost>,
    pub(super) passed: &'a Passed,
    pub(super) device_memory: Arc<dyn DeviceMemoryHost>,
    /// Functions of the host that were made, to be listened to when the hierarchy stands.
    pub(super) host_functions: Vec<Arc<VfioFunction>>,
}

/// Build the whole hierarchy of `plan`, its devices opened and attached, and those who go by functions' numbers told of new
/// ones from here on.
pub(super) fn build(plan: &Plan, connections: &mut Connections<'_>) -> Result<Arc<Topology>, RunError> {
    let upstream = |root: &RootComplex| {
        let unit = connections.viommus.covering(root);
        Upstream::new(unit, &connections.messages)
    };
    let upstreams: Vec<Upstream> = plan.pci.roots().map(upstream).collect();
    let interrupts = |root: &RootComplex| PortInterrupts {
        messages: upstream(root).messages,
        wires: connections.board.ioapic.clone(),
    };
    let mut builder = TopologyBuilder::new(&plan.pci, interrupts);
    for (root, upstream) in plan.pci.roots().zip(&upstreams) {
        let place = Place {
            segment: root.segment,
            upstream,
            on_root_bus: true,
        };
        for node in &root.functions {
            attach(&mut builder, plan, connections, place, node)?;
        }
    }
    let board = connections.board;
    let topology = builder.finish(board.mmio.clone(), board.ports.clone());
    for function in connections.host_functions.drain(..) {
        HostSignals::listen(function, &topology, connections.events)?;
    }
    connections.viommus.observe(&topology);
    connections
        .viommus
        .confine(connections.passed, &topology, connections.ram)?;
    Ok(topology)
}

/// What a function's place says about it.
#[derive(Clone, Copy)]
struct Place<'a> {
    segment: u16,
    upstream: &'a Upstream,
    on_root_bus: bool,
}

impl Place<'_> {
    /// The address of `node`, which is there.
    const fn of(&self, node: &Node) -> Sbdf {
        Sbdf {
            segment: self.segment,
            bdf: node.bdf,
        }
    }
}

/// Attach `node` and all behind it.
fn attach(
    builder: &mut TopologyBuilder,
    plan: &Plan,
    connections: &mut Connections<'_>,
    place: Place<'_>,
    node: &Node,
) -> Result<(), RunError> {
    let at = place.of(node);
    match node.kind {
        NodeKind::RootPort | NodeKind::UpstreamPort | NodeKind::DownstreamPort => {}
        NodeKind::HostBridge | NodeKind::IsaBridge => {
            let requester = Arc::new(Requester::new(at));
            builder.attach(at, BoardBridge::new(&node.name, &node.identity, requester))?;
        }
        NodeKind::Iommu(index) => builder.attach(at, connections.viommus.unit(index).function())?,
        NodeKind::Endpoint(index) => {
            let planned = plan
                .devices
                .get(index)
                .expect("a plan's endpoints name its devices");
            let function = match &planned.kind {
                DeviceKind::Vfio(_) => host_function(index, planned, connections, place, node)?,
                _ => endpoint(planned, connections, place, node)?,
            };
            builder.attach(at, function)?;
        }
    }
    let behind = node.bridge.iter().flat_map(|bridge| &bridge.children);
    for child in behind {
        let place = Place {
            on_root_bus: false,
            ..place
        };
        attach(builder, plan, connections, place, child)?;
    }
    Ok(())
}

/// The function of the device `planned`, with what it needs of the host opened.
fn endpoint(
    planned: &DevicePlan,
    connections: &mut Connections<'_>,
    place: Place<'_>,
    node: &Node,
) -> Result<Arc<dyn Function>, RunError> {
    let Place {
        upstream,
        on_root_bus,
        ..
    } = place;
    let (name, at) = (planned.name.clone(), place.of(node));
    let (requester, dma) = upstream.dma(at, connections.ram.clone());
    let msi = MsiPort::new(requester, upstream.messages.clone());
    let intx = node.intx.map(|intx| (intx.pin, connections.board.wire(intx.gsi)));
    let device: Arc<dyn VirtioDevice> = match &planned.kind {
        DeviceKind::Block(block) => Arc::new(Block::open(&BlockConfig {
            name,
            path: block.path.clone(),
            read_only: block.readonly,
            direct: block.direct,
            queues: block.queues,
            queue_size: block.queue_size,
            serial: Some(block.serial.clone()),
        })?),
        DeviceKind::Net(net) => Arc::new(Net::open(NetConfig {
            backend: net_backend(&name, net)?,
            name,
            mac: net.mac.0,
            mtu: net.mtu,
            queue_pairs: net.queue_pairs,
            queue_size: net.queue_size,
            offloads: net.offload,
        })?),
        DeviceKind::Console(console) => {
            let host = connections
                .board
                .connect(&name, &console.backend, connections.events)?;
            Arc::new(Console::new(name, host)?)
        }
        DeviceKind::Rng(_) => Arc::new(Rng::new(name)),
        DeviceKind::Test(test) => {
            let device = TestDevice::new(TestDeviceParts {
                name,
                msix_vectors: test.msix_vectors,
                dma,
                msi,
                intx,
                on_root_bus,
                agent: upstream.agent(at),
            })?;
            upstream.tell_of_invalidations(at, device.follower());
            return Ok(device);
        }
        DeviceKind::Vfio(vfio) => unreachable!("{} is no device of ours", vfio.host),
    };
    let parts = VirtioPciParts {
        dma,
        msi,
        doorbells: connections.doorbells.clone(),
        intx,
        on_root_bus,
        access_platform: upstream.translates(),
    };
    Ok(VirtioPci::new(device, parts)?)
}

/// The host's function that device number `index` of the plan is.
fn host_function(
    index: usize,
    planned: &DevicePlan,
    connections: &mut Connections<'_>,
    place: Place<'_>,
    node: &Node,
) -> Result<Arc<dyn Function>, RunError> {
    let (host, space) = connections
        .passed
        .function(index)
        .expect("every function of the host in a plan is opened");
    let requester = place.upstream.requester(place.of(node));
    let spec = |bar: &Bar| BarSpec {
        index: bar.index,
        kind: bar.kind,
        size: bar.size,
    };
    let function = VfioFunction::new(VfioParts {
        name: planned.name.clone(),
        host,
        reset_with: connections.passed.reset_with(index),
        space,
        has_peers: connections.passed.has_several(),
        identity: node.identity,
        bars: node.bars.iter().map(spec).collect(),
        memory: connections.device_memory.clone(),
        msi: MsiPort::new(requester, place.upstream.messages.clone()),
        intx: node.intx.map(|intx| (intx.pin, connections.board.wire(intx.gsi))),
        on_root_bus: place.on_root_bus,
    })?;
    if let Some(intx) = node.intx {
        let listener: Weak<dyn Resample> = Arc::downgrade(&function) as Weak<dyn Resample>;
        connections.board.ioapic.resample(intx.gsi, listener);
    }
    connections.host_functions.push(function.clone());
    Ok(function)
}

fn net_backend(name: &str, plan: &NetPlan) -> Result<net::NetBackend, HostError> {
    Ok(match &plan.backend {
        NetBackend::None => net::NetBackend::None,
        NetBackend::Tap(interface) => net::NetBackend::TapName(interface.clone()),
        NetBackend::Fds(numbers) => {
            let fds = numbers.iter().map(|number| inherited(name, *number));
            net::NetBackend::TapDescriptors(fds.collect::<Result<_, _>>()?)
        }
    })
}

/// A descriptor that whoever started us left open, by its number; a duplicate of it.
pub(super) fn inherited(name: &str, number: i32) -> Result<OwnedFd, HostError> {
    let taken = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|process| pidfd_getfd(process, number, PidfdGetfdFlags::empty()));
    taken.map_err(|source| {
        HostError::new(
            format!("take the inherited descriptor {number} for {name}"),
            source,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn an_inherited_descriptor_is_duplicated() {
        let file = tempfile::tempfile().expect("a file");
        let taken = inherited("net0", file.as_raw_fd()).expect("it is open");
        assert_ne!(taken.as_raw_fd(), file.as_raw_fd());
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused_by_number() {
        let error = inherited("net0", 9999).expect_err("not open");
        assert_eq!(
            error.to_string(),
            "cannot take the inherited descriptor 9999 for net0"
        );
    }
}
