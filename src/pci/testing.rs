//! What tests of PCI functions share: a sink of messages that records, devices that do, a machine of both,
//! and plans for it.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::access::DwordWrite;
use super::assign::{FunctionSpec, Parent, Pools, RootSpec, TreeSpec, assign};
use super::bar::BarSpec;
use super::capability::{Express, PowerManagement};
use super::config_space::ConfigSpace;
use super::endpoint::Endpoint;
use super::port::PortInterrupts;
use super::topology::{Topology, TopologyBuilder};
use super::tree::{Bar, BarKind, ECAM_BYTES, Identity, Node, NodeKind, PciTree, PortRange};
use super::{Command, ConfigEffect, Function};
use crate::platform::addr::{Bdf, Gpa, GpaRange, Sbdf};
use crate::platform::bus::Bus;
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::irq::InterruptController;
use crate::platform::msi::{MsiMessage, MsiPort, MsiRoute, MsiSink};

/// A requester at 0000:01:00.0 with Bus Master Enable.
pub fn requester() -> Arc<Requester> {
    let bdf = Bdf::new(1, 0, 0).expect("in range");
    let requester = Arc::new(Requester::new(Sbdf { segment: 0, bdf }));
    requester.set_bus_master(true);
    requester
}

/// Records the messages sent one by one and hands out routes, or refuses to.
pub struct Messages {
    requester: Arc<Requester>,
    sent: Mutex<Vec<MsiMessage>>,
    routes: Mutex<Vec<Arc<Route>>>,
    refuse: Arc<AtomicBool>,
}

impl Messages {
    /// Nothing sent yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            requester: requester(),
            sent: Mutex::default(),
            routes: Mutex::default(),
            refuse: Arc::default(),
        })
    }

    /// A way out that records.
    pub fn port(self: &Arc<Self>) -> MsiPort {
        MsiPort::new(self.requester.clone(), self.clone())
    }

    /// As whom messages are sent.
    pub fn requester(&self) -> &Arc<Requester> {
        &self.requester
    }

    /// The messages sent one by one since the last call.
    pub fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.sent.lock().expect("not poisoned"))
    }

    /// How many messages were sent, either way.
    pub fn count(&self) -> u64 {
        let routed: u64 = self.routes().iter().map(|route| route.count()).sum();
        routed + self.sent.lock().expect("not poisoned").len() as u64
    }

    /// Every route handed out, dropped ones included.
    pub fn routes(&self) -> Vec<Arc<Route>> {
        self.routes.lock().expect("not poisoned").clone()
    }

    /// Refuse routes and other messages for them from now on, or not. One can always be switched off, which takes nothing of
    /// the host.
    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }
}

fn answer(refuse: &AtomicBool) -> Result<(), HostError> {
    if refuse.load(Ordering::Relaxed) {
        return Err(HostError::new(
            "route an interrupt",
            std::io::Error::from_raw_os_error(28),
        ));
    }
    Ok(())
}

impl MsiSink for Messages {
    fn signal(&self, _requester: &Requester, message: MsiMessage) {
        self.sent.lock().expect("not poisoned").push(message);
    }

    fn route(&self, _requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        answer(&self.refuse)?;
        let route = Arc::new(Route {
            eventfd: EventFd::new(EFD_NONBLOCK).expect("a descriptor"),
            set: Mutex::default(),
        });
        self.routes.lock().expect("not poisoned").push(route.clone());
        Ok(Box::new(RouteHandle(self.refuse.clone(), route)))
    }
}

/// One route and every message it was given.
pub struct Route {
    eventfd: EventFd,
    set: Mutex<Vec<Option<MsiMessage>>>,
}

impl Route {
    /// How often it was signalled since the last call.
    pub fn signals(&self) -> u64 {
        self.eventfd.read().unwrap_or(0)
    }

    /// How often it was signalled since it was made or [`Route::signals`] was called.
    fn count(&self) -> u64 {
        let count = self.eventfd.read().unwrap_or(0);
        if count > 0 {
            self.eventfd.write(count).expect("room for what was there");
        }
        count
    }

    /// Every message it was given; `None` at its end.
    pub fn history(&self) -> Vec<Option<MsiMessage>> {
        self.set.lock().expect("not poisoned").clone()
    }
}

struct RouteHandle(Arc<AtomicBool>, Arc<Route>);

impl MsiRoute for RouteHandle {
    fn eventfd(&self) -> &EventFd {
        &self.1.eventfd
    }

    fn set(&self, message: Option<MsiMessage>) -> Result<(), HostError> {
        if message.is_some() {
            answer(&self.0)?;
        }
        self.1.set.lock().expect("not poisoned").push(message);
        Ok(())
    }
}

impl Drop for RouteHandle {
    fn drop(&mut self) {
        self.1.set.lock().expect("not poisoned").push(None);
    }
}

/// What happened to a [`Probe`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A BAR answers elsewhere, or nowhere.
    Moved(u8, Option<Gpa>),
    /// It may issue requests, or no longer; and what its requester said at that moment.
    Mastering(bool, bool),
    /// A BAR was written: which, where, what.
    Written(u8, u64, Vec<u8>),
    /// The machine is paused.
    Paused,
    /// The machine goes on.
    Resumed,
    /// It was reset.
    Reset,
}

/// An endpoint that answers its BARs with their number and remembers what happened to it.
pub struct Probe {
    name: String,
    endpoint: Endpoint,
    mastering: AtomicBool,
    events: Mutex<Vec<Event>>,
}

impl Probe {
    /// The device `node` plans.
    pub fn new(node: &Node) -> Arc<Self> {
        Self::issuing_as(node, Arc::default())
    }

    /// The same, whose requests are `requester`'s.
    pub fn issuing_as(node: &Node, requester: Arc<Requester>) -> Arc<Self> {
        let mut config = ConfigSpace::endpoint(&node.identity)
            .capability(PowerManagement::new())
            .capability(Express::endpoint(false));
        for Bar {
            index, kind, size, ..
        } in node.bars.clone()
        {
            config = config.bar(BarSpec { index, kind, size });
        }
        Arc::new(Self {
            name: node.name.clone(),
            endpoint: Endpoint::new(config, requester),
            mastering: AtomicBool::new(false),
            events: Mutex::default(),
        })
    }

    /// What happened since the last call.
    pub fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().expect("not poisoned"))
    }

    fn note(&self, event: Event) {
        self.events.lock().expect("not poisoned").push(event);
    }
}

impl Function for Probe {
    fn name(&self) -> &str {
        &self.name
    }
    fn config_read(&self, dword: u16) -> u32 {
        self.endpoint.config_read(dword)
    }
    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        self.endpoint.config_write(dword, write)
    }
    fn requester(&self) -> &Arc<Requester> {
        self.endpoint.requester()
    }
    fn bars(&self) -> &[BarSpec] {
        self.endpoint.bars()
    }
    fn command(&self) -> Command {
        self.endpoint.command()
    }
    fn bus_mastering(&self, allowed: bool) {
        if self.mastering.swap(allowed, Ordering::Relaxed) != allowed {
            self.note(Event::Mastering(allowed, self.requester().bus_master()));
        }
    }
    fn bar_read(&self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(bar);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.note(Event::Written(bar, offset, data.to_vec()));
    }
    fn bar_moved(&self, bar: u8, at: Option<Gpa>) {
        self.note(Event::Moved(bar, at));
    }
    fn pause(&self) {
        self.note(Event::Paused);
    }
    fn resume(&self) {
        self.note(Event::Resumed);
    }
    fn reset(&self) {
        self.endpoint.reset();
        self.note(Event::Reset);
    }
}

impl InterruptController for Messages {
    fn line_changed(&self, _gsi: u32, _asserted: bool) {}
    fn pulse(&self, _gsi: u32) {}
}

/// A machine that is nothing but its PCI hierarchy, with a [`Probe`] for every planned device.
pub struct Machine {
    /// As planned.
    pub tree: PciTree,
    /// Memory.
    pub mmio: Arc<Bus>,
    /// Ports.
    pub ports: Arc<Bus>,
    /// What is tested.
    pub topology: Arc<Topology>,
    probes: Vec<Arc<Probe>>,
}

impl Machine {
    /// `tree` with a [`Probe`] for every device.
    pub fn new(tree: PciTree) -> Self {
        let mut probes = Vec::new();
        let machine = Self::with_devices(tree, |node| {
            let probe = Probe::new(node);
            probes.push(probe.clone());
            probe
        });
        Self { probes, ..machine }
    }

    /// `tree` with what `device` makes of every planned device.
    pub fn with_devices(tree: PciTree, mut device: impl FnMut(&Node) -> Arc<dyn Function>) -> Self {
        let messages = Messages::new();
        let interrupts = PortInterrupts {
            messages: messages.clone(),
            wires: messages,
        };
        let mut builder = TopologyBuilder::new(&tree, |_| interrupts.clone());
        for (segment, node) in tree.nodes().filter(|(_, node)| node.bridge.is_none()) {
            let at = Sbdf {
                segment,
                bdf: node.bdf,
            };
            builder.attach(at, device(node)).expect("as planned");
        }
        let (mmio, ports) = (Bus::mmio(), Bus::ports());
        let topology = builder.finish(mmio.clone(), ports.clone());
        Self {
            tree,
            mmio,
            ports,
            topology,
            probes: Vec::new(),
        }
    }

    /// What is planned as `name`.
    pub fn node(&self, name: &str) -> &Node {
        self.tree
            .nodes()
            .map(|(_, node)| node)
            .find(|node| node.name == name)
            .expect("planned")
    }

    /// The device called `name`.
    pub fn probe(&self, name: &str) -> &Probe {
        self.probes
            .iter()
            .find(|probe| probe.name == name)
            .expect("attached")
    }

    /// Read a dword of segment 0.
    pub fn read(&self, bdf: Bdf, dword: u16) -> u32 {
        self.topology.config_read(0, bdf, dword)
    }

    /// Write a whole dword in segment 0.
    pub fn write(&self, bdf: Bdf, dword: u16, value: u32) {
        self.topology
            .config_write(0, bdf, dword, DwordWrite::whole(value));
    }

    /// Set the Command register of every planned function to all that it can do.
    pub fn enable(&self) {
        for (segment, node) in self.tree.nodes() {
            self.topology
                .config_write(segment, node.bdf, 1, DwordWrite::whole(0x7));
        }
    }

    /// Where every BAR should answer by the plan, and does when everything is enabled: memory before ports.
    pub fn planned(&self) -> Vec<(String, u64)> {
        let nodes = self.tree.nodes();
        let bars = nodes.flat_map(|(_, node)| node.bars.iter().map(move |bar| (node, bar)));
        let mut all: Vec<_> = bars
            .map(|(node, bar)| {
                (
                    bar.kind == BarKind::Io,
                    bar.address,
                    format!("{} BAR {}", node.name, bar.index),
                )
            })
            .collect();
        all.sort();
        all.into_iter()
            .map(|(_, address, name)| (name, address))
            .collect()
    }

    /// Where every BAR answers: name and first address, memory before ports.
    pub fn answering(&self) -> Vec<(String, u64)> {
        let ranges = self.mmio.traffic().into_iter().chain(self.ports.traffic());
        ranges.map(|range| (range.name, range.start)).collect()
    }

    /// Assert what holds whatever the guest does: nothing answers, and nobody is numbered, outside the root
    /// complex it belongs to.
    ///
    /// # Panics
    ///
    /// When it does not hold.
    pub fn check(&self) {
        let owner = |name: &str| {
            let roots = self.tree.roots();
            let mut owners = roots.filter(|root| root.nodes().any(|node| node.name == name));
            owners.next().expect("planned")
        };
        for claim in self.mmio.traffic() {
            let windows = owner(claim.name.split(" BAR ").next().expect("a name")).windows;
            let inside = |window: GpaRange| window.start().0 <= claim.start && claim.last <= window.last().0;
            assert!(
                [windows.mem32, windows.mem64].into_iter().flatten().any(inside),
                "{claim:?}"
            );
        }
        for claim in self.ports.traffic() {
            let window = owner(claim.name.split(" BAR ").next().expect("a name"))
                .windows
                .io;
            let inside =
                |w: PortRange| u64::from(w.start()) <= claim.start && claim.last <= u64::from(w.last());
            assert!(window.is_some_and(inside), "{claim:?}");
        }
        for (name, at) in self.topology.functions() {
            assert!(
                at.is_none_or(|at| owner(name).buses.contains(&at.bdf.bus())),
                "{name} {at:?}"
            );
        }
    }

    /// Assert that everything answers where it was planned.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn check_as_planned(&self) {
        assert_eq!(self.answering(), self.planned());
    }

    /// What answers at a memory address: its BAR's number, or nothing.
    pub fn answer(&self, at: u64) -> Option<u8> {
        let mut data = [0; 1];
        self.mmio.read(at, &mut data).then_some(data[0])
    }
}

/// A function without a chosen slot; a bridge by its class unless it is an endpoint.
pub fn function(name: &str, kind: NodeKind, parent: Parent, bars: &[BarSpec]) -> FunctionSpec {
    let class = if matches!(kind, NodeKind::Endpoint(_)) {
        0x02_0000
    } else {
        0x06_0400
    };
    FunctionSpec {
        name: name.to_owned(),
        kind,
        identity: Identity {
            vendor: 0x1234,
            device: 0x5678,
            class,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        },
        parent,
        slot: None,
        bars: bars.to_vec(),
        intx: true,
        removable: false,
    }
}

/// One BAR of each kind: 64-bit prefetchable, 32-bit, I/O.
pub fn bars() -> [BarSpec; 3] {
    let bar = |index, kind, size| BarSpec { index, kind, size };
    [
        bar(0, BarKind::Mem64 { prefetchable: true }, 0x4000),
        bar(2, BarKind::Mem32 { prefetchable: false }, 0x1000),
        bar(3, BarKind::Io, 0x20),
    ]
}

/// `functions` below root complexes of these names and buses, in segment 0.
///
/// # Panics
///
/// When there is no such tree.
pub fn plan(roots: &[(&str, RangeInclusive<u8>)], functions: Vec<FunctionSpec>) -> PciTree {
    let roots = roots.iter().map(|(name, buses)| RootSpec {
        name: (*name).to_owned(),
        segment: 0,
        buses: Some(buses.clone()),
    });
    let range = |start, len| GpaRange::new(Gpa(start), len).expect("a valid range");
    let pools = Pools {
        io: PortRange::new(0x1000, 0xffff).expect("not empty"),
        mem32: range(0xd000_0000, 0x2000_0000),
        mem64: range(0x40_0000_0000, 0x40_0000_0000),
        ecam: vec![range(0x1_0000_0000, ECAM_BYTES)],
    };
    let spec = TreeSpec {
        roots: roots.collect(),
        functions,
    };
    assign(&spec, &pools).expect("a possible tree")
}

/// Two root ports with a device each: `left` and `right`, each with a 4 KiB BAR 0. Nothing has a wire.
pub fn two_ports() -> PciTree {
    let bar = BarSpec {
        index: 0,
        kind: BarKind::Mem32 { prefetchable: false },
        size: 0x1000,
    };
    let unwired = |spec| FunctionSpec { intx: false, ..spec };
    let port = |name| unwired(function(name, NodeKind::RootPort, Parent::Root(0), &[]));
    let endpoint = |name, port| unwired(function(name, NodeKind::Endpoint(0), Parent::Port(port), &[bar]));
    plan(
        &[("rc0", 0..=255)],
        vec![
            port("rp0"),
            port("rp1"),
            endpoint("left", 0),
            endpoint("right", 1),
        ],
    )
}

/// Two root complexes with all that may hang there: `flat` on the first root bus, `near` behind `rp0`, `far0`
/// and `far1` behind a switch behind `rp1`; `other` and an empty port on the second.
pub fn two_roots() -> PciTree {
    let endpoint = |name, parent| function(name, NodeKind::Endpoint(0), parent, &bars());
    plan(
        &[("rc0", 0..=0x3f), ("rc1", 0x40..=0x7f)],
        vec![
            endpoint("flat", Parent::Root(0)),
            function("rp0", NodeKind::RootPort, Parent::Root(0), &[]),
            endpoint("near", Parent::Port(1)),
            function("rp1", NodeKind::RootPort, Parent::Root(0), &[]),
            function("up", NodeKind::UpstreamPort, Parent::Port(3), &[]),
            function("down0", NodeKind::DownstreamPort, Parent::Port(4), &[]),
            function("down1", NodeKind::DownstreamPort, Parent::Port(4), &[]),
            endpoint("far0", Parent::Port(5)),
            endpoint("far1", Parent::Port(6)),
            endpoint("other", Parent::Root(1)),
            function("empty", NodeKind::RootPort, Parent::Root(1), &[]),
        ],
    )
}
