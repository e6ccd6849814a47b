//! The guest's PCI hierarchy with every number and address resolved: what the machine is built from.
//!
//! Plain data. [`super::assign`] makes it; the run-time topology, the ACPI tables and `ravelin topology`
//! read it, so that what is planned, what is built and what the guest is told cannot differ. The guest may
//! renumber and move everything later; the tree says how it starts.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Serialize, Serializer};

use crate::platform::addr::{Bdf, GpaRange};

/// Bytes of ECAM per bus: 32 devices of 8 functions of 4 KiB (PCI Express Base Specification 7.2.2).
pub const ECAM_BYTES_PER_BUS: u64 = 1 << 20;
/// Bytes of ECAM per segment: all 256 buses.
pub const ECAM_BYTES: u64 = ECAM_BYTES_PER_BUS * 256;
/// The first IOAPIC input that INTx uses; those below belong to ISA devices.
pub const INTX_FIRST_GSI: u32 = 16;
/// How many IOAPIC inputs INTx is spread over.
pub const INTX_GSIS: u32 = 8;

/// Every segment of the machine, in ascending order of number.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PciTree {
    /// At least one; segment 0 comes first.
    pub segments: Vec<Segment>,
}

/// A PCI segment group: 256 bus numbers and the ECAM that reaches them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Segment {
    /// Segment number, the kernel's "domain".
    pub number: u16,
    /// Always [`ECAM_BYTES`] long: bus `b` begins [`ECAM_BYTES_PER_BUS`] times `b` into it.
    pub ecam: GpaRange,
    /// In ascending order of bus ranges, which do not overlap.
    pub roots: Vec<RootComplex>,
}

/// A host bridge and what hangs off it: one ACPI PNP0A08 object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootComplex {
    /// What the operator calls it.
    pub name: String,
    /// The segment it belongs to.
    pub segment: u16,
    /// The bus numbers it decodes; its root bus is the first.
    #[serde(serialize_with = "buses")]
    pub buses: RangeInclusive<u8>,
    /// The addresses it decodes: its `_CRS`.
    pub windows: Windows,
    /// The functions on the root bus, in ascending order of BDF.
    pub functions: Vec<Node>,
    /// ACPI `_UID`: unique in the machine, counted from 0 in tree order.
    pub uid: u32,
}

/// The addresses a bridge forwards. A `None` window is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Windows {
    /// I/O ports; behind a PCI-to-PCI bridge in units of 4 KiB.
    pub io: Option<PortRange>,
    /// Non-prefetchable memory below 4 GiB, in units of 1 MiB.
    pub mem32: Option<GpaRange>,
    /// Prefetchable memory above 4 GiB, in units of 1 MiB.
    pub mem64: Option<GpaRange>,
}

/// A stretch of I/O ports that is not empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    start: u16,
    last: u16,
}

impl PortRange {
    /// Both ports belong to the range; `None` when `last` lies before `start`.
    #[must_use]
    pub const fn new(start: u16, last: u16) -> Option<Self> {
        if last < start {
            return None;
        }
        Some(Self { start, last })
    }

    /// The first port.
    #[must_use]
    pub const fn start(self) -> u16 {
        self.start
    }

    /// The last port that belongs to the range.
    #[must_use]
    pub const fn last(self) -> u16 {
        self.last
    }

    /// How many ports, 1 to 65,536.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u32 {
        (self.last - self.start) as u32 + 1
    }
}

impl fmt::Debug for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `start-last` in hexadecimal, as /proc/ioports writes it.
impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}-{:04x}", self.start, self.last)
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// What the operator calls it, or what it was named for them; unique in the machine.
    pub name: String,
    /// Where it is found at start; the segment is its root complex's.
    pub bdf: Bdf,
    /// What it is.
    pub kind: NodeKind,
    /// What its configuration header says it is.
    pub identity: Identity,
    /// Whether function 0 of its device must announce further functions (header type bit 7).
    pub multi_function: bool,
    /// Its base address registers, in ascending order of index.
    pub bars: Vec<Bar>,
    /// Its legacy interrupt, where it has one.
    pub intx: Option<Intx>,
    /// What is behind it, where it is a bridge.
    pub bridge: Option<Bridge>,
}

/// What a function is, for whoever builds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeKind {
    /// A root port; always on a root bus.
    RootPort,
    /// The port of a switch that faces the root.
    UpstreamPort,
    /// A port of a switch that faces a device.
    DownstreamPort,
    /// Device 0 of a root bus: the root complex itself, as configuration space shows it.
    HostBridge,
    /// The ISA bridge at 00:14.0, whose requester ID stands for the IOAPIC.
    IsaBridge,
    /// An IOMMU, by its index in the plan's list: function 2 of device 0 of the root bus it covers.
    Iommu(usize),
    /// A device: the index into the plan's list. Integrated into the root complex when on a root bus.
    Endpoint(usize),
}

/// The identification registers of a function (PCI Express Base Specification 7.5.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, sub-class and programming interface: 24 bits, as lspci -n writes them.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

impl Identity {
    /// A root port: the generic one that every guest knows from virtual machines.
    pub const ROOT_PORT: Self = Self::port(0x1b36, 0x000c);
    /// The upstream port of a switch (TI XIO3130, which needs no driver beyond the port driver).
    pub const UPSTREAM_PORT: Self = Self::port(0x104c, 0x8232);
    /// A downstream port of the same switch.
    pub const DOWNSTREAM_PORT: Self = Self::port(0x104c, 0x8233);
    /// A host bridge: the generic one of virtual machines. An AMD one would have registers that Linux reads.
    pub const HOST_BRIDGE: Self = Self {
        class: 0x06_0000,
        ..Self::port(0x1b36, 0x0008)
    };
    /// The ISA bridge of an AMD southbridge: Linux matches the class, other guests the ID.
    pub const ISA_BRIDGE: Self = Self {
        class: 0x06_0100,
        revision: 0x51,
        ..Self::port(0x1022, 0x790e)
    };

    /// A PCI-to-PCI bridge.
    const fn port(vendor: u16, device: u16) -> Self {
        Self {
            vendor,
            device,
            class: 0x06_0400,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        }
    }
}

/// The bridge side of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bridge {
    /// The bus right behind it.
    pub secondary: u8,
    /// The highest bus number behind it.
    pub subordinate: u8,
    /// What it forwards.
    pub windows: Windows,
    /// Physical slot number, 1 to 8,191 and unique in the machine; `None` for an upstream port, which has
    /// no slot (PCI Express Base Specification 7.5.3.9).
    pub slot: Option<u16>,
    /// The functions on the secondary bus, in ascending order of BDF.
    pub children: Vec<Node>,
}

/// One base address register, placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// Register number 0 to 5; a 64-bit BAR takes the next one as well.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes (ports for I/O): a power of two, at least 16 for memory and 4 for ports.
    pub size: u64,
    /// Where it starts: naturally aligned.
    #[serde(serialize_with = "hex")]
    pub address: u64,
}

/// What a base address register decodes (PCI Express Base Specification 7.5.1.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere.
    Mem64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

/// A function's wired interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Intx {
    /// INTA to INTD.
    pub pin: Pin,
    /// The IOAPIC input it reaches, after every bridge on the way has swizzled it.
    pub gsi: u32,
}

/// INTA to INTD; the discriminant is the value of the Interrupt Pin register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Pin {
    /// INTA.
    A = 1,
    /// INTB.
    B = 2,
    /// INTC.
    C = 3,
    /// INTD.
    D = 4,
}

impl Pin {
    /// All four, in order.
    pub const ALL: [Self; 4] = [Self::A, Self::B, Self::C, Self::D];

    /// The pin `steps` further, going round after INTD.
    #[must_use]
    pub const fn rotated(self, steps: u8) -> Self {
        Self::ALL[((self as u8 - 1) as usize + steps as usize) % 4]
    }

    /// The pin of the bridge above that `self` of `device` behind it reaches
    /// (PCI-to-PCI Bridge Architecture Specification 9.1).
    #[must_use]
    pub const fn swizzled(self, device: u8) -> Self {
        self.rotated(device % 4)
    }
}

/// [`RootComplex::intx_gsi`] for a root complex that is being made.
pub(super) const fn intx_gsi(uid: u32, device: u8, pin: Pin) -> u32 {
    let turn = device as u32 + (pin as u32 - 1) + (uid % INTX_GSIS) * 4;
    INTX_FIRST_GSI + turn % INTX_GSIS
}

impl RootComplex {
    /// The root bus.
    #[must_use]
    pub fn first_bus(&self) -> u8 {
        *self.buses.start()
    }

    /// The IOAPIC input that `pin` of `device` on the root bus reaches: what `_PRT` says.
    ///
    /// Spread over all eight inputs, shifted per root complex, so that neighbours share as little as they can.
    #[must_use]
    pub const fn intx_gsi(&self, device: u8, pin: Pin) -> u32 {
        intx_gsi(self.uid, device, pin)
    }

    /// Every function of the root complex, parents before children, in the order a depth-first scan finds
    /// them.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        Nodes {
            levels: vec![self.functions.iter()],
        }
    }
}

impl PciTree {
    /// Every root complex, in tree order.
    pub fn roots(&self) -> impl Iterator<Item = &RootComplex> {
        self.segments.iter().flat_map(|segment| &segment.roots)
    }

    /// Every function with the number of its segment, parents before children.
    pub fn nodes(&self) -> impl Iterator<Item = (u16, &Node)> {
        self.roots()
            .flat_map(|root| root.nodes().map(|node| (root.segment, node)))
    }
}

impl Node {
    /// The functions right behind this one; none unless it is a bridge.
    #[must_use]
    pub fn children(&self) -> &[Node] {
        self.bridge.as_ref().map_or(&[], |bridge| &bridge.children)
    }
}

/// A depth-first walk that keeps its place on the heap: nesting is as deep as the operator says.
struct Nodes<'a> {
    levels: Vec<std::slice::Iter<'a, Node>>,
}

impl<'a> Iterator for Nodes<'a> {
    type Item = &'a Node;

    fn next(&mut self) -> Option<&'a Node> {
        while let Some(level) = self.levels.last_mut() {
            if let Some(node) = level.next() {
                self.levels.push(node.children().iter());
                return Some(node);
            }
            self.levels.pop();
        }
        None
    }
}

impl BarKind {
    /// Whether the BAR takes two registers.
    #[must_use]
    pub const fn is_64_bit(self) -> bool {
        matches!(self, Self::Mem64 { .. })
    }
}

fn buses<S: Serializer>(buses: &RangeInclusive<u8>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{:02x}-{:02x}", buses.start(), buses.end()))
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, bus: u8, children: Option<Vec<Node>>) -> Node {
        Node {
            name: name.to_owned(),
            bdf: Bdf::new(bus, 1, 0).expect("in range"),
            kind: NodeKind::RootPort,
            identity: Identity {
                vendor: 1,
                device: 2,
                class: 0x06_0400,
                revision: 0,
                subsystem_vendor: 0,
                subsystem: 0,
            },
            multi_function: false,
            bars: Vec::new(),
            intx: None,
            bridge: children.map(|children| Bridge {
                secondary: bus + 1,
                subordinate: bus + 1,
                windows: Windows::default(),
                slot: None,
                children,
            }),
        }
    }

    fn root(uid: u32, functions: Vec<Node>) -> RootComplex {
        RootComplex {
            name: "rc".to_owned(),
            segment: 0,
            buses: 0..=255,
            windows: Windows::default(),
            functions,
            uid,
        }
    }

    #[test]
    fn the_walk_meets_parents_before_children_and_siblings_in_order() {
        let inner = node("b", 1, Some(vec![node("c", 2, None)]));
        let root = root(0, vec![node("a", 0, Some(vec![inner])), node("d", 0, None)]);
        let names: Vec<_> = root.nodes().map(|node| node.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "d"]);
    }

    #[test]
    fn four_devices_behind_a_bridge_use_four_pins() {
        let pins: Vec<_> = (0..4).map(|device| Pin::A.swizzled(device)).collect();
        assert_eq!(pins, Pin::ALL);
        assert_eq!(Pin::D.swizzled(1), Pin::A);
        assert_eq!(Pin::B.swizzled(31), Pin::A);
    }

    #[test]
    fn every_root_pin_reaches_an_input_kept_for_intx() {
        let roots: Vec<_> = (0..20).map(|uid| root(uid, Vec::new())).collect();
        let all = roots
            .iter()
            .flat_map(|root| (0..32).flat_map(move |device| Pin::ALL.map(|pin| root.intx_gsi(device, pin))));
        assert!(all.clone().all(|gsi| (16..24).contains(&gsi)));
        assert_eq!(root(0, Vec::new()).intx_gsi(0, Pin::A), 16);
        assert_eq!(root(1, Vec::new()).intx_gsi(0, Pin::A), 20);
    }

    #[test]
    fn a_port_range_may_be_one_port_but_not_backwards() {
        assert_eq!(PortRange::new(5, 5).map(PortRange::len), Some(1));
        assert_eq!(PortRange::new(0, 0xffff).map(PortRange::len), Some(65_536));
        assert_eq!(PortRange::new(6, 5), None);
    }
}
