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

    /// Look at the functions at `places` anew: what they answer, and whether they may issue requests.
    pub(super) fn refresh(&mut self, topology: &Topology, places: Range<usize>) {
        let mut wanted = Vec::new();
        let mut released = false;
        for index in places {
            let place = &topology.places[index];
            let Some(function) = &place.function else {
                continue;
            };
            let above = Above::of(topology, place);
            let command = function.command() & above.command;
            function
                .requester()
                .set_bus_master(command.contains(Command::BUS_MASTER));
            let slots = &mut self.bars[index];
            slots.resize_with(function.bars().len(), Slot::default);
            for (position, (bar, slot)) in function.bars().iter().zip(slots).enumerate() {
                let decodes = command.contains(bar.address_space());
                let addresses = decodes.then(|| above.reach(bar, &**function)).flatten();
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
    }

    /// Try those again that were in each other's way.
    fn retry(&mut self, topology: &Topology) {
        for (index, position) in std::mem::take(&mut self.refused) {
            let place = &topology.places[index];
            let Some(function) = &place.function else {
                continue;
            };
            let above = Above::of(topology, place);
            if let Some(addresses) = above.reach(&function.bars()[position], &**function) {
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

/// What lies between a function and the root.
struct Above {
    windows: Windows,
    ports: Vec<PortState>,
    /// What every port on the way allows.
    command: Command,
}

impl Above {
    fn of(topology: &Topology, place: &Place) -> Self {
        let mut bus = &topology.buses[place.bus];
        let windows = topology.roots[bus.root].windows;
        let (mut ports, mut command) = (Vec::new(), Command::all());
        while let Some((port, above)) = bus.above.and_then(|above| {
            let place = &topology.places[above];
            place.port.as_ref().map(|(port, _)| (port, place))
        }) {
            let state = port.state();
            command &= if state.passes {
                state.command
            } else {
                Command::empty()
            };
            ports.push(state);
            bus = &topology.buses[above.bus];
        }
        Self {
            windows,
            ports,
            command,
        }
    }

    /// The addresses `bar` is programmed to, if accesses to all of them get here.
    fn reach(&self, bar: &BarSpec, function: &dyn Function) -> Option<Addresses> {
        let address = bar.address(|index| function.config_read(4 + u16::from(index)));
        if bar.address_space() == Command::IO {
            let start = u16::try_from(address).ok()?;
            let last = u16::try_from(address.checked_add(bar.size - 1)?).ok()?;
            let range = PortRange::new(start, last)?;
            let inside = |window: Option<PortRange>| {
                window.is_some_and(|window| window.start() <= start && last <= window.last())
            };
            let open = inside(self.windows.io) && self.ports.iter().all(|port| inside(port.windows.io));
            return open.then_some(Addresses::Ports(range));
        }
        let range = GpaRange::new(Gpa(address), bar.size)?;
        let inside = |window: Option<GpaRange>| window.is_some_and(|window| window.contains_range(range));
        let open = (inside(self.windows.mem32) || inside(self.windows.mem64))
            && self
                .ports
                .iter()
                .all(|port| inside(port.windows.memory) || inside(port.windows.prefetchable));
        open.then_some(Addresses::Memory(range))
    }
}
