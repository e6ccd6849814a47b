//! Addresses, which travel down from the root complexes, and the finished tree.

use crate::pci::tree::{
    Bar, Bridge, Intx, Node, NodeKind, PciTree, Pin, PortRange, RootComplex, Segment, Windows, intx_gsi,
};
use crate::platform::addr::{Bdf, Gpa, GpaRange};

use super::number::{bus_of, is_bridge};
use super::pack::{Measured, SPACES, Target};
use super::{AssignError, Parent, Pools};

/// The highest physical slot number (PCI Express Base Specification 7.5.3.9: 13 bits).
const LAST_SLOT: u32 = 8191;

/// Start and size of a window per space, in the order of [`SPACES`].
type Window = [Option<(u64, u64)>; 3];

impl Measured<'_> {
    /// Give everything its address.
    pub fn place(&self, pools: &Pools) -> Result<PciTree, AssignError> {
        let slots = self.slot_numbers()?;
        let windows = self.windows(pools)?;
        let nodes = self.nodes(&windows, &slots);
        Ok(self.segments_of(nodes, &windows, pools))
    }

    /// The window on each bus.
    fn windows(&self, pools: &Pools) -> Result<Vec<Window>, AssignError> {
        let roots = self.numbered.spec.roots.len();
        let limits = [
            u64::from(pools.io.start())..=u64::from(pools.io.last()),
            pools.mem32.start().0..=pools.mem32.last().0,
            pools.mem64.start().0..=pools.mem64.last().0,
        ];
        let mut windows: Vec<Window> = vec![[None; 3]; self.numbered.order.len()];
        for (space, limit) in SPACES.into_iter().zip(limits) {
            let cut = self.root_windows(space, limit)?;
            for (root, window) in cut.into_iter().enumerate() {
                windows[root][space as usize] = window;
            }
        }
        // Parents first: a bridge's window is known before what is behind it is placed.
        let buses = (0..roots).chain(self.numbered.met.iter().map(|at| roots + at));
        for bus in buses {
            for space in SPACES {
                let Some((base, _)) = windows[bus][space as usize] else {
                    continue;
                };
                for (item, offset) in &self.needs[bus][space as usize].starts {
                    if let Target::Window(at) = item.target {
                        windows[roots + at][space as usize] = Some((base + offset, item.size));
                    }
                }
            }
        }
        Ok(windows)
    }

    /// Where the BARs of every function start.
    fn bar_addresses(&self, windows: &[Window]) -> Vec<Vec<u64>> {
        let functions = &self.numbered.spec.functions;
        let mut addresses: Vec<Vec<u64>> = functions.iter().map(|f| vec![0; f.bars.len()]).collect();
        for (window, needs) in windows.iter().zip(&self.needs) {
            for (base, packed) in window.iter().zip(needs) {
                let Some((base, _)) = base else { continue };
                for (item, offset) in &packed.starts {
                    if let Target::Bar(at, index) = item.target {
                        addresses[at][index] = base + offset;
                    }
                }
            }
        }
        addresses
    }

    /// Physical slot numbers: 1, 2, ... in the order of the tree.
    fn slot_numbers(&self) -> Result<Vec<Option<u16>>, AssignError> {
        let mut numbers = vec![None; self.numbered.spec.functions.len()];
        let has_slot = |at: &&usize| {
            matches!(
                self.numbered.spec.functions[**at].kind,
                NodeKind::RootPort | NodeKind::DownstreamPort
            )
        };
        for (slot, at) in (1_u32..).zip(self.numbered.met.iter().filter(has_slot)) {
            let number = u16::try_from(slot).ok().filter(|_| slot <= LAST_SLOT);
            numbers[*at] = Some(number.ok_or_else(|| AssignError::TooManySlots {
                name: self.numbered.spec.functions[*at].name.clone(),
                slot,
            })?);
        }
        Ok(numbers)
    }

    /// The functions of every root bus, with all that is behind them. Put together leaves first, so that
    /// depth costs no stack.
    fn nodes(&self, windows: &[Window], slots: &[Option<u16>]) -> Vec<Vec<Node>> {
        let roots = self.numbered.spec.roots.len();
        let addresses = self.bar_addresses(windows);
        let mut nodes: Vec<Option<Node>> = vec![None; self.numbered.spec.functions.len()];
        for &at in self.numbered.met.iter().rev() {
            let mut node = self.node(at, &addresses[at]);
            if is_bridge(node.kind) {
                node.bridge = Some(Bridge {
                    secondary: self.numbered.placed[at].secondary,
                    subordinate: self.numbered.placed[at].subordinate,
                    windows: to_windows(&windows[roots + at]),
                    slot: slots[at],
                    children: self.numbered.order[roots + at]
                        .iter()
                        .filter_map(|child| nodes[*child].take())
                        .collect(),
                });
            }
            nodes[at] = Some(node);
        }
        let on_root = self.numbered.order[..roots].iter();
        on_root
            .map(|order| order.iter().filter_map(|at| nodes[*at].take()).collect())
            .collect()
    }

    /// One function, without what is behind it.
    fn node(&self, at: usize, addresses: &[u64]) -> Node {
        let function = &self.numbered.spec.functions[at];
        let placed = &self.numbered.placed[at];
        let device = placed.slot.device();
        let siblings = &self.numbered.order[bus_of(self.numbered.spec, function.parent)];
        let of_device = siblings
            .iter()
            .filter(|other| self.numbered.placed[**other].slot.device() == device);
        Node {
            name: function.name.clone(),
            bdf: Bdf::new(placed.bus, device, placed.slot.function()).expect("slots are in range"),
            kind: function.kind,
            identity: function.identity,
            multi_function: of_device.count() > 1,
            bars: function
                .bars
                .iter()
                .zip(addresses)
                .map(|(bar, address)| Bar {
                    index: bar.index,
                    kind: bar.kind,
                    size: bar.size,
                    address: *address,
                })
                .collect(),
            intx: function.intx.then(|| self.intx(at)),
            bridge: None,
        }
    }

    /// Functions of a device use the four pins in turn; each bridge on the way up swizzles.
    fn intx(&self, at: usize) -> Intx {
        let own = Pin::A.rotated(self.numbered.placed[at].slot.function());
        let (mut pin, mut at) = (own, at);
        loop {
            let device = self.numbered.placed[at].slot.device();
            match self.numbered.spec.functions[at].parent {
                Parent::Port(port) => {
                    pin = pin.swizzled(device);
                    at = port;
                }
                Parent::Root(root) => {
                    let gsi = intx_gsi(self.numbered.uids[root], device, pin);
                    return Intx { pin: own, gsi };
                }
            }
        }
    }

    fn segments_of(&self, mut nodes: Vec<Vec<Node>>, windows: &[Window], pools: &Pools) -> PciTree {
        let mut by_uid: Vec<usize> = (0..self.numbered.spec.roots.len()).collect();
        by_uid.sort_by_key(|root| self.numbered.uids[*root]);
        let mut ecams = pools.ecam.iter();
        let mut segments: Vec<Segment> = Vec::new();
        for root in by_uid {
            let spec = &self.numbered.spec.roots[root];
            let complex = RootComplex {
                name: spec.name.clone(),
                segment: spec.segment,
                buses: self.numbered.buses[root].clone(),
                windows: to_windows(&windows[root]),
                functions: std::mem::take(&mut nodes[root]),
                uid: self.numbered.uids[root],
            };
            match segments.last_mut().filter(|last| last.number == spec.segment) {
                Some(segment) => segment.roots.push(complex),
                None => segments.push(Segment {
                    number: spec.segment,
                    ecam: *ecams.next().expect("the pools hold one ECAM per segment"),
                    roots: vec![complex],
                }),
            }
        }
        PciTree { segments }
    }
}

fn to_windows(window: &Window) -> Windows {
    let range = |(start, size)| GpaRange::new(Gpa(start), size).expect("a window lies inside its pool");
    let ports = |(start, size): (u64, u64)| {
        let port = |at: u64| u16::try_from(at).expect("the pool of ports ends at 0xffff");
        PortRange::new(port(start), port(start + size - 1)).expect("a window is not empty")
    };
    let [io, mem32, mem64] = *window;
    Windows {
        io: io.map(ports),
        mem32: mem32.map(range),
        mem64: mem64.map(range),
    }
}
