//! PCI functions from the plan: every node of the tree becomes what it says it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::RunError;
use super::board::Board;
use super::plan::{CharBackend, DeviceKind, DevicePlan, NetBackend, NetPlan, Plan};
use crate::devices::isa_bridge::IsaBridge;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, BlockConfig};
use crate::devices::virtio::console::{Console, ConsoleConfig};
use crate::devices::virtio::net::{self, Net, NetConfig};
use crate::devices::virtio::pci::{VirtioPci, VirtioPciParts};
use crate::devices::virtio::rng::Rng;
use crate::pci::port::PortInterrupts;
use crate::pci::topology::{Topology, TopologyBuilder};
use crate::pci::tree::{Node, NodeKind};
use crate::platform::addr::Sbdf;
use crate::platform::dma::{Dma, Requester};
use crate::platform::doorbell::DoorbellHost;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;
use crate::platform::msi::{MsiPort, MsiSink};

/// What functions are connected to.
pub(super) struct Connections<'a> {
    pub(super) board: &'a Board,
    pub(super) ram: &'a GuestRam,
    pub(super) messages: Arc<dyn MsiSink>,
    pub(super) doorbells: Arc<dyn DoorbellHost>,
}

/// Build the whole hierarchy of `plan`, its devices opened and attached.
pub(super) fn build(plan: &Plan, connections: &Connections<'_>) -> Result<Arc<Topology>, RunError> {
    let interrupts = PortInterrupts {
        messages: connections.messages.clone(),
        wires: connections.board.ioapic.clone(),
    };
    let mut builder = TopologyBuilder::new(&plan.pci, interrupts);
    for segment in &plan.pci.segments {
        for root in &segment.roots {
            for node in &root.functions {
                attach(&mut builder, plan, connections, segment.number, node, true)?;
            }
        }
    }
    let board = connections.board;
    Ok(builder.finish(board.mmio.clone(), board.ports.clone()))
}

/// Attach `node` and all behind it.
fn attach(
    builder: &mut TopologyBuilder,
    plan: &Plan,
    connections: &Connections<'_>,
    segment: u16,
    node: &Node,
    on_root_bus: bool,
) -> Result<(), RunError> {
    let at = Sbdf {
        segment,
        bdf: node.bdf,
    };
    match node.kind {
        NodeKind::RootPort | NodeKind::UpstreamPort | NodeKind::DownstreamPort => {}
        NodeKind::IsaBridge => {
            let requester = Arc::new(Requester::new(at));
            builder.attach(at, IsaBridge::new(&node.identity, requester))?;
        }
        NodeKind::Endpoint(index) => {
            let planned = plan
                .devices
                .get(index)
                .expect("a plan's endpoints name its devices");
            let device = open(planned)?;
            let requester = Arc::new(Requester::new(at));
            let parts = VirtioPciParts {
                dma: Dma::new(requester.clone(), connections.ram.clone()),
                msi: MsiPort::new(requester, connections.messages.clone()),
                doorbells: connections.doorbells.clone(),
                intx: node.intx.map(|intx| (intx.pin, connections.board.wire(intx.gsi))),
                on_root_bus,
                access_platform: false,
            };
            builder.attach(at, VirtioPci::new(device, parts)?)?;
        }
    }
    let behind = node.bridge.iter().flat_map(|bridge| &bridge.children);
    for child in behind {
        attach(builder, plan, connections, segment, child, false)?;
    }
    Ok(())
}

/// Open what a device needs of the host.
fn open(planned: &DevicePlan) -> Result<Arc<dyn VirtioDevice>, HostError> {
    let name = planned.name.clone();
    Ok(match &planned.kind {
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
            let (input, output) = terminal(&name, &console.backend)?;
            Arc::new(Console::new(ConsoleConfig {
                name,
                input,
                output,
                size: None,
            }))
        }
        DeviceKind::Rng(_) => Arc::new(Rng::new(name)),
    })
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
fn inherited(name: &str, number: i32) -> Result<OwnedFd, HostError> {
    let taken = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|process| pidfd_getfd(process, number, PidfdGetfdFlags::empty()));
    taken.map_err(|source| {
        HostError::new(
            format!("take the inherited descriptor {number} for {name}"),
            source,
        )
    })
}

/// What a virtio console named `name` reads and writes.
fn terminal(name: &str, plan: &CharBackend) -> Result<(Option<OwnedFd>, Option<OwnedFd>), HostError> {
    let refused = |source: io::Error| HostError::new(format!("connect the console {name}"), source);
    let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().map_err(refused);
    Ok(match plan {
        CharBackend::Null => (None, None),
        CharBackend::Stdio => (Some(copy(&io::stdin())?), Some(copy(&io::stdout())?)),
        CharBackend::File(path) => {
            let file = File::options().append(true).create(true).open(path);
            let file = file.map_err(|source| {
                HostError::new(format!("open {} for the console {name}", path.display()), source)
            })?;
            (None, Some(file.into()))
        }
        CharBackend::Pty => {
            let (master, place) = pty().map_err(refused)?;
            tracing::info!(name, place, "the console is connected");
            (Some(copy(&master)?), Some(master))
        }
        CharBackend::Socket(path) => {
            return Err(HostError::new(
                format!("connect the console {name} to the socket {}", path.display()),
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    "a virtio console takes stdio, file, pty or null; use the serial port for a socket",
                ),
            ));
        }
    })
}

/// A pseudo-terminal: our side of it and where the other is.
fn pty() -> io::Result<(OwnedFd, String)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    Ok((master, name.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;

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

    #[test]
    fn a_console_on_a_socket_is_refused_with_what_is_valid() {
        let socket = CharBackend::Socket(PathBuf::from("/tmp/console.sock"));
        let error = terminal("console0", &socket).expect_err("not offered");
        assert_eq!(
            error.to_string(),
            "cannot connect the console console0 to the socket /tmp/console.sock"
        );
        assert!(error.source.to_string().contains("stdio, file, pty or null"));
    }

    #[test]
    fn a_pseudo_terminal_can_be_opened_by_its_name() {
        let (_master, place) = pty().expect("the host has ptys");
        assert!(File::options().read(true).write(true).open(place).is_ok());
    }
}
