//! From the plan to the topology: every port is made here, every device attached by whoever made it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};

use super::decoding::Decoding;
use super::{LogicalBus, Place, Root, Segment, Topology};
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::function::Function;
use crate::pci::port::{Port, PortInterrupts};
use crate::pci::tree::{Bar, Node, NodeKind, PciTree, RootComplex, Windows};
use crate::platform::addr::{GpaRange, Sbdf};
use crate::platform::bus::Bus;

/// First BAR register.
const BARS: u16 = 4;
const BUS_NUMBERS: u16 = 6;
const IO_WINDOW: u16 = 7;
const MEMORY_WINDOW: u16 = 8;
const PREFETCHABLE_WINDOW: u16 = 9;
const PREFETCHABLE_BASE_UPPER: u16 = 10;
const PREFETCHABLE_LIMIT_UPPER: u16 = 11;
const INTERRUPT: u16 = 15;

/// A function that cannot be where it was attached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The plan has no endpoint there.
    #[error("cannot attach {name} at {at}: the plan has no device there")]
    NoSuchPlace {
        /// Who was attached.
        name: String,
        /// Where.
        at: Sbdf,
    },
    /// Somebody is there already.
    #[error("cannot attach {name} at {at}: {owner} is there")]
    Occupied {
        /// Who was attached.
        name: String,
        /// Where.
        at: Sbdf,
        /// Who is there.
        owner: String,
    },
    /// The plan made room for other BARs.
    #[error("cannot attach {name} at {at}: it has the BARs {has:?}, the plan made room for {planned:?}")]
    OtherBars {
        /// Who was attached.
        name: String,
        /// Where.
        at: Sbdf,
        /// What it has.
        has: Vec<BarSpec>,
        /// What was planned.
        planned: Vec<BarSpec>,
    },
}

/// A topology with its ports, while devices are attached.
pub struct TopologyBuilder {
    segments: Vec<Segment>,
    roots: Vec<Root>,
    buses: Vec<LogicalBus>,
    places: Vec<Place>,
    /// Planned address to place.
    planned: HashMap<Sbdf, usize>,
}

impl TopologyBuilder {
    /// Every port of `tree`; those of a root complex interrupt through what `interrupts` gives for it.
    #[must_use]
    pub fn new(tree: &PciTree, interrupts: impl Fn(&RootComplex) -> PortInterrupts) -> Self {
        let mut builder = Self {
            segments: Vec::new(),
            roots: Vec::new(),
            buses: Vec::new(),
            places: Vec::new(),
            planned: HashMap::new(),
        };
        for segment in &tree.segments {
            let first = builder.roots.len();
            for root in &segment.roots {
                let bus = builder.bus(builder.roots.len(), None, false);
                builder.roots.push(Root {
                    segment: root.segment,
                    buses: root.buses.clone(),
                    windows: root.windows,
                    bus,
                });
                let interrupts = interrupts(root);
                root.functions
                    .iter()
                    .for_each(|node| builder.place(bus, node, &interrupts));
            }
            builder.segments.push(Segment {
                number: segment.number,
                roots: first..builder.roots.len(),
                routes: RwLock::new(Box::new([None; 256])),
            });
        }
        builder.segments.sort_by_key(|segment| segment.number);
        builder
    }

    /// Put `function` where the plan has a device at `at`.
    ///
    /// # Errors
    ///
    /// When the plan has none there, somebody is there already, or the BARs are not those planned.
    pub fn attach(&mut self, at: Sbdf, function: Arc<dyn Function>) -> Result<(), AttachError> {
        let name = function.name().to_owned();
        let found = self.planned.get(&at).map(|index| &mut self.places[*index]);
        let Some(place) = found else {
            return Err(AttachError::NoSuchPlace { name, at });
        };
        if let Some(owner) = &place.function {
            let owner = owner.name().to_owned();
            return Err(AttachError::Occupied { name, at, owner });
        }
        let planned: Vec<BarSpec> = place.start.bars.iter().map(spec).collect();
        if planned != function.bars() {
            let has = function.bars().to_vec();
            return Err(AttachError::OtherBars {
                name,
                at,
                has,
                planned,
            });
        }
        function.requester().renumber(at);
        place.function = Some(function);
        Ok(())
    }

    /// The finished topology, programmed as planned. BARs are claimed on `mmio` and `ports` while the guest
    /// decodes them.
    #[must_use]
    pub fn finish(self, mmio: Arc<Bus>, ports: Arc<Bus>) -> Arc<Topology> {
        for bus in &self.buses {
            let present = bus
                .functions
                .iter()
                .flatten()
                .any(|place| self.places[*place].function.is_some());
            let above = bus.above.and_then(|place| self.places[place].port.as_ref());
            if let Some((port, _)) = above {
                port.set_occupied(present);
            }
        }
        let topology = Arc::new(Topology {
            decoding: Mutex::new(Decoding::new(self.places.len())),
            segments: self.segments,
            roots: self.roots,
            buses: self.buses,
            places: self.places,
            mmio,
            ports,
            observers: RwLock::default(),
        });
        topology.program();
        topology
    }

    fn bus(&mut self, root: usize, above: Option<usize>, behind_a_link: bool) -> usize {
        self.buses.push(LogicalBus {
            root,
            above,
            behind_a_link,
            functions: Box::new([None; 256]),
        });
        self.buses.len() - 1
    }

    /// Put `node` on `bus`, and everything behind it on buses of their own.
    fn place(&mut self, bus: usize, node: &Node, interrupts: &PortInterrupts) {
        let index = self.places.len();
        let root = self.buses[bus].root;
        let at = Sbdf {
            segment: self.roots[root].segment,
            bdf: node.bdf,
        };
        let [device_function, _] = node.bdf.requester_id().to_le_bytes();
        self.buses[bus].functions[usize::from(device_function)] = Some(index);
        self.planned.insert(at, index);
        let port = Port::new(node, at, interrupts);
        self.places.push(Place {
            bus,
            device_function,
            start: Start::new(node),
            below: index + 1..index + 1,
            function: port.clone().map(|port| port as Arc<dyn Function>),
            port: None,
        });
        if let (Some(port), Some(bridge)) = (port, &node.bridge) {
            let behind_a_link = node.kind != NodeKind::UpstreamPort;
            let below = self.bus(root, Some(index), behind_a_link);
            self.places[index].port = Some((port, below));
            bridge
                .children
                .iter()
                .for_each(|child| self.place(below, child, interrupts));
        }
        self.places[index].below.end = self.places.len();
    }
}

fn spec(bar: &Bar) -> BarSpec {
    BarSpec {
        index: bar.index,
        kind: bar.kind,
        size: bar.size,
    }
}

/// What a function's registers hold when the guest starts.
pub(super) struct Start {
    bars: Vec<Bar>,
    bridge: Option<BridgeStart>,
    gsi: Option<u32>,
    /// Whether there are further functions at the same device.
    pub(super) multi_function: bool,
}

struct BridgeStart {
    primary: u8,
    secondary: u8,
    subordinate: u8,
    windows: Windows,
}

impl Start {
    fn new(node: &Node) -> Self {
        Self {
            bars: node.bars.clone(),
            bridge: node.bridge.as_ref().map(|bridge| BridgeStart {
                primary: node.bdf.bus(),
                secondary: bridge.secondary,
                subordinate: bridge.subordinate,
                windows: bridge.windows,
            }),
            gsi: node.intx.map(|intx| intx.gsi),
            multi_function: node.multi_function,
        }
    }

    /// Write the registers. Decoding is off, so that no write has an effect to perform.
    pub(super) fn program(&self, function: &dyn Function) {
        let write = |dword: u16, value: u32| {
            let _off = function.config_write(dword, DwordWrite::whole(value));
        };
        for bar in &self.bars {
            let [low, high] = halves(bar.address);
            write(BARS + u16::from(bar.index), low);
            if bar.kind.is_64_bit() {
                write(BARS + u16::from(bar.index) + 1, high);
            }
        }
        if let Some(bridge) = &self.bridge {
            write(
                BUS_NUMBERS,
                u32::from_le_bytes([bridge.primary, bridge.secondary, bridge.subordinate, 0]),
            );
            write(IO_WINDOW, io_window(&bridge.windows));
            write(MEMORY_WINDOW, memory_window(bridge.windows.mem32));
            write(PREFETCHABLE_WINDOW, memory_window(bridge.windows.mem64));
            let ends = bridge
                .windows
                .mem64
                .map(|window| (window.start().0, window.last().0));
            let (base, limit) = ends.unwrap_or_default();
            write(PREFETCHABLE_BASE_UPPER, halves(base)[1]);
            write(PREFETCHABLE_LIMIT_UPPER, halves(limit)[1]);
        }
        // Scratch that firmware fills: what some drivers print as "irq".
        if let Some(line) = self.gsi.and_then(|gsi| u8::try_from(gsi).ok())
            && let Some(line) = DwordWrite::new(0, &[line])
        {
            let _off = function.config_write(INTERRUPT, line);
        }
    }
}

/// Base and limit of a closed window lie the wrong way round.
const CLOSED_IO: u32 = 0x00f0;
const CLOSED_MEMORY: u32 = 0x0000_fff0;

fn io_window(windows: &Windows) -> u32 {
    windows.io.map_or(CLOSED_IO, |window| {
        let ([_, base], [_, limit]) = (window.start().to_le_bytes(), window.last().to_le_bytes());
        u32::from_le_bytes([base & 0xf0, limit & 0xf0, 0, 0])
    })
}

fn memory_window(window: Option<GpaRange>) -> u32 {
    window.map_or(CLOSED_MEMORY, |window| {
        let ([base, _], [limit, _]) = (halves(window.start().0), halves(window.last().0));
        limit & 0xfff0_0000 | (base & 0xfff0_0000) >> 16
    })
}

const fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}
