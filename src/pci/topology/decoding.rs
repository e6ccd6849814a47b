//! Who answers at which address: the claims of every BAR on the buses, kept equal to what the guest
//! programmed.
//!
//! A BAR answers when its function decodes that space, every port above forwards it, and the root complex
//! has the addresses at all. It answers completely or not at all. One that runs into somebody else's
//! addresses answers nowhere, and is tried again whenever something else lets go: the guest is in the
//! middle of moving things around, or wrong.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::{Place, Topology};
use crate::guest_warn;
use crate::pci::bar::BarSpec;
use crate::pci::function::{Command, Function};
use crate::pci::port::PortState;
use crate::pci::tree::{PortRange, Windows};
use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::bus::{BusDevice, Claim};

/// What every BAR of the machine answers at present.
pub(super) struct Decoding {
    /// By place, then in the order of its BARs.
    bars: Vec<Vec<Slot>>,
    /// BARs that should answer and cannot: place and position.
    refused: BTreeSet<(usize, usize)>,
}

#[derive(Default)]
struct Slot {
    /// What it answers, while it does.
    live: Option<(Addresses, Claim)>,
}

/// Where a BAR answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Addresses {
    Memory(GpaRange),
    Ports(PortRange),
}

impl Addresses {
    fn memory(self) -> Option<Gpa> {
        match self {
            Self::Memory(range) => Some(range.start()),
            Self::Ports(_) => None,
        }
    }
}

/// A BAR as the bus sees it.
struct Bar {
    function: Arc<dyn Function>,
    index: u8,
}

impl BusDevice for Bar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.index, offset, data);
    }
}

impl Decoding {
    /// Nothing answers yet.
    pub(super) fn new(places: usize) -> Self {
        Self {
            bars: (0..places).map(|_| Vec::new()).collect(),
            refused: BTreeSet::new(),
        }
    }

    /// Look at the functions at `places` anew: what they answer, and which requests of theirs get anywhere.
    pub(super) fn refresh(&mut self, topology: &Topology, places: Range<usize>) {
        let mut wanted = Vec::new();
        let mut masters = Vec::new();
        let mut released = false;
        let Some(first) = topology.places.get(places.start) else {
            return;
        };
        let mut path = Path::to(topology, first);
        for index in places {
            let place = &topology.places[index];
            path.retreat(topology, place.bus);
            let (above, blocked) = (path.command(), path.blocks_prefixes());
            // A port has no BARs, so that it may be on its own way already.
            path.descend(topology, index);
            let Some(function) = &place.function else {
                continue;
            };
            let command = function.command() & above;
            let bus_master = command.contains(Command::BUS_MASTER);
            let requester = function.requester();
            requester.block_prefixes(blocked);
            if bus_master {
                masters.push(function);
            } else {
                // What is under way ends while it still gets anywhere.
                function.bus_mastering(false);
                requester.set_bus_master(false);
            }
            let windows = &topology.roots[topology.buses[place.bus].root].windows;
            let slots = &mut self.bars[index];
            slots.resize_with(function.bars().len(), Slot::default);
            for (position, (bar, slot)) in function.bars().iter().zip(slots).enumerate() {
                let decodes = command.contains(bar.address_space());
                let addresses = decodes.then(|| path.reach(windows, bar, &**function)).flatten();
                self.refused.remove(&(index, position));
                if slot.live.as_ref().map(|(live, _)| *live) != addresses {
                    released |= slot.release(bar, &**function);
                    wanted.extend(addresses.map(|addresses| (index, position, addresses)));
                }
            }
        }
        // Everything lets go before anything is claimed, so that two BARs may change places.
        for (index, position, addresses) in wanted {
            self.claim(topology, index, position, addresses);
        }
        if released {
            self.retry(topology);
        }
        // The BARs answer already when a function interrupts: the driver may be quick on another processor.
        for function in masters {
            function.requester().set_bus_master(true);
            function.bus_mastering(true);
        }
    }

    /// Try those again that were in each other's way.
    fn retry(&mut self, topology: &Topology) {
        for (index, position) in std::mem::take(&mut self.refused) {
            let place = &topology.places[index];
            let Some(function) = &place.function else {
                continue;
            };
            let windows = &topology.roots[topology.buses[place.bus].root].windows;
            let bar = &function.bars()[position];
            if let Some(addresses) = Path::to(topology, place).reach(windows, bar, &**function) {
                self.claim(topology, index, position, addresses);
            }
        }
    }

    fn claim(&mut self, topology: &Topology, index: usize, position: usize, addresses: Addresses) {
        let Some(function) = &topology.places[index].function else {
            return;
        };
        let bar = &function.bars()[position];
        let device = Arc::new(Bar {
            function: function.clone(),
            index: bar.index,
        });
        let name = format!("{} BAR {}", function.name(), bar.index);
        let claim = match addresses {
            Addresses::Memory(range) => topology.mmio.claim(name, range.start().0, range.len(), device),
            Addresses::Ports(range) => {
                topology
                    .ports
                    .claim(name, u64::from(range.start()), u64::from(range.len()), device)
            }
        };
        match claim {
            Ok(claim) => {
                self.bars[index][position].live = Some((addresses, claim));
                if let Some(at) = addresses.memory() {
                    function.bar_moved(bar.index, Some(at));
                }
            }
            Err(error) => {
                self.refused.insert((index, position));
                guest_warn!(%error, "a BAR is where the guest cannot have it; it answers nowhere until that is free");
            }
        }
    }
}

impl Slot {
    /// Answer nowhere; whether it answered before. The claim goes once accesses in flight are done.
    fn release(&mut self, bar: &BarSpec, function: &dyn Function) -> bool {
        let Some((addresses, claim)) = self.live.take() else {
            return false;
        };
        if addresses.memory().is_some() {
            function.bar_moved(bar.index, None);
        }
        drop(claim);
        true
    }
}

/// The way down to a function: what lies between it and the root.
struct Path {
    /// From the root downwards: a port's place, its state, and what it and all above it allow.
    ports: Vec<(usize, PortState, Command)>,
}

impl Path {
    /// The way to the functions on the bus of `place`.
    fn to(topology: &Topology, place: &Place) -> Self {
        let above = |bus: usize| topology.buses[bus].above;
        let mut upwards = vec![];
        let mut next = above(place.bus);
        while let Some(port) = next {
            upwards.push(port);
            next = above(topology.places[port].bus);
        }
        let mut path = Self { ports: vec![] };
        upwards
            .into_iter()
            .rev()
            .for_each(|port| path.descend(topology, port));
        path
    }

    /// What every port on the way allows.
    fn command(&self) -> Command {
        self.ports
            .last()
            .map_or(Command::all(), |(_, _, command)| *command)
    }

    /// Whether any port on the way stops requests with a prefix.
    fn blocks_prefixes(&self) -> bool {
        self.ports.iter().any(|(_, state, _)| state.blocks_prefixes)
    }

    /// Back to where `bus` hangs. It does hang on the way: places are visited depth first.
    fn retreat(&mut self, topology: &Topology, bus: usize) {
        let above = topology.buses[bus].above;
        while self.ports.last().map(|(port, ..)| *port) != above && self.ports.pop().is_some() {}
    }

    /// Through the port at `place`, if there is one.
    fn descend(&mut self, topology: &Topology, place: usize) {
        if let Some((port, _)) = &topology.places[place].port {
            let state = port.state();
            let command = if state.passes {
                state.command & self.command()
            } else {
                Command::empty()
            };
            self.ports.push((place, state, command));
        }
    }

    /// The addresses `bar` of a function under `windows` is programmed to, if accesses to all of them get
    /// there.
    fn reach(&self, windows: &Windows, bar: &BarSpec, function: &dyn Function) -> Option<Addresses> {
        let address = bar.address(|index| function.config_read(4 + u16::from(index)));
        let mut ports = self.ports.iter().map(|(_, state, _)| &state.windows);
        if bar.address_space() == Command::IO {
            let start = u16::try_from(address).ok()?;
            let last = u16::try_from(address.checked_add(bar.size - 1)?).ok()?;
            let range = PortRange::new(start, last)?;
            let inside = |window: Option<PortRange>| {
                window.is_some_and(|window| window.start() <= start && last <= window.last())
            };
            let open = inside(windows.io) && ports.all(|port| inside(port.io));
            return open.then_some(Addresses::Ports(range));
        }
        let range = GpaRange::new(Gpa(address), bar.size)?;
        let inside = |window: Option<GpaRange>| window.is_some_and(|window| window.contains_range(range));
        let open = (inside(windows.mem32) || inside(windows.mem64))
            && ports.all(|port| inside(port.memory) || inside(port.prefetchable));
        open.then_some(Addresses::Memory(range))
    }
}
