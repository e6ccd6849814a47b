//! The hierarchy at run time: which function a configuration access finds, and what follows from a write.
//!
//! A *logical* bus is what hangs behind a port: it never changes. Its *routed* number is what the guest
//! programs into the port, and may change at any write. The planned numbers are programmed at power-on, as
//! firmware would; a guest that renumbers everything and moves every window works as well.
//!
//! Lock order: the decoding lock (one change at a time), then a segment's routes, then a function's own.
//! Functions are read, written and reset with no lock held but, in [`Function::bar_moved`], the first; and none is held while
//! an [`Observer`] is told.

mod build;
mod decoding;
mod observer;
mod removal;

use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use build::Start;
pub use build::{AttachError, TopologyBuilder};
use decoding::Decoding;
pub use observer::Observer;

use super::access::DwordWrite;
use super::function::{CONFIG_DWORDS, ConfigEffect, Function};
use super::port::{Port, PortState};
use super::tree::Windows;
use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::bus::Bus;

/// Header Type: further functions at this device.
const MULTI_FUNCTION: u32 = 1 << 23;
/// Configuration dword of the Cache Line Size, Header Type and their neighbours.
const HEADER_TYPE: u16 = 3;

/// Every function of the machine, as the guest reaches them.
pub struct Topology {
    /// In ascending order of number.
    segments: Vec<Segment>,
    roots: Vec<Root>,
    /// Logical buses; a root complex's first, then depth first.
    buses: Vec<LogicalBus>,
    /// Every function's place, parents before children, so that a subtree is a range.
    places: Vec<Place>,
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    decoding: Mutex<Decoding>,
    observers: RwLock<Vec<Weak<dyn Observer>>>,
}

struct Segment {
    number: u16,
    roots: Range<usize>,
    /// By routed bus number.
    routes: RwLock<Box<[Option<Route>; 256]>>,
}

/// Where configuration accesses to one bus number go.
#[derive(Clone, Copy)]
struct Route {
    bus: usize,
    /// Whether devices other than 0 exist there.
    all_devices: bool,
}

struct Root {
    segment: u16,
    buses: RangeInclusive<u8>,
    windows: Windows,
    bus: usize,
}

struct LogicalBus {
    root: usize,
    /// The port it hangs behind; `None` for a root bus.
    above: Option<usize>,
    /// Whether a link leads here, with one device at its end.
    behind_a_link: bool,
    /// Which place answers, by device and function number.
    functions: Box<[Option<usize>; 256]>,
}

/// Where a function is, and what is there.
struct Place {
    bus: usize,
    /// Device number in the upper five bits, function number in the lower three.
    device_function: u8,
    /// How its registers start.
    start: Start,
    /// Places behind this one.
    below: Range<usize>,
    /// The function, if it is attached; for ports the same object as `port`.
    function: Option<Arc<dyn Function>>,
    port: Option<(Arc<Port>, usize)>,
}

impl Topology {
    /// Read `dword` (0 to 1023) of the function that `bdf` of segment `segment` routes to at present; all
    /// ones where none is.
    #[must_use]
    pub fn config_read(&self, segment: u16, bdf: Bdf, dword: u16) -> u32 {
        let Some((place, function)) = self.find(segment, bdf) else {
            return u32::MAX;
        };
        if dword >= CONFIG_DWORDS {
            return u32::MAX;
        }
        let value = function.config_read(dword);
        if dword != HEADER_TYPE {
            return value;
        }
        // The function does not know its neighbours.
        let several = if place.start.multi_function {
            MULTI_FUNCTION
        } else {
            0
        };
        value & !MULTI_FUNCTION | several
    }

    /// Write `dword` (0 to 1023) of the function that `bdf` of segment `segment` routes to at present, and
    /// perform what that sets off; nothing happens where none is.
    pub fn config_write(&self, segment: u16, bdf: Bdf, dword: u16, write: DwordWrite) {
        let Some((place, function)) = self.find(segment, bdf) else {
            return;
        };
        if dword < CONFIG_DWORDS {
            let effect = function.config_write(dword, write);
            self.perform(place, &**function, effect);
        }
    }

    /// Every function as after power-on, then programmed as planned. The vCPUs are paused. Observers are not told: whoever goes
    /// by numbers is reset after this.
    pub fn reset(&self) {
        self.attached().for_each(|function| function.reset());
        self.program();
    }

    /// Return once no thread of any function touches guest memory. The vCPUs are paused.
    pub fn pause(&self) {
        self.attached().for_each(|function| function.pause());
    }

    /// Let all functions go on, before the vCPUs do.
    pub fn resume(&self) {
        self.attached().for_each(|function| function.resume());
    }

    fn attached(&self) -> impl Iterator<Item = &Arc<dyn Function>> {
        self.places.iter().filter_map(|place| place.function.as_ref())
    }

    /// The present address of every attached function, in the order of the plan, with its name. `None` for
    /// one that no configuration access reaches at present.
    #[cfg(any(test, fuzzing))]
    pub fn functions(&self) -> impl Iterator<Item = (&str, Option<Sbdf>)> {
        self.places.iter().filter_map(|place| {
            let function = place.function.as_ref()?;
            let at = function.requester().sbdf();
            let found = self.find(at.segment, at.bdf);
            let reached = found.is_some_and(|(other, _)| std::ptr::eq(other, place));
            Some((function.name(), reached.then_some(at)))
        })
    }

    /// The function that `bdf` of segment `segment` routes to at present.
    #[must_use]
    pub fn function(&self, segment: u16, bdf: Bdf) -> Option<&Arc<dyn Function>> {
        self.find(segment, bdf).map(|(_, function)| function)
    }

    fn find(&self, segment: u16, bdf: Bdf) -> Option<(&Place, &Arc<dyn Function>)> {
        let index = self
            .segments
            .binary_search_by_key(&segment, |segment| segment.number)
            .ok()?;
        let routes = self.segments[index]
            .routes
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let route = routes[usize::from(bdf.bus())]?;
        drop(routes);
        if bdf.device() != 0 && !route.all_devices {
            return None;
        }
        let [device_function, _] = bdf.requester_id().to_le_bytes();
        let place = &self.places[self.buses[route.bus].functions[usize::from(device_function)]?];
        Some((place, place.function.as_ref()?))
    }

    /// Carry out what a configuration write set off. No lock is held on entry.
    fn perform(&self, place: &Place, function: &dyn Function, mut effect: ConfigEffect) {
        if effect.contains(ConfigEffect::FUNCTION_RESET) {
            function.reset();
            effect |= ConfigEffect::DECODING;
        }
        if effect.contains(ConfigEffect::SECONDARY_RESET) {
            for function in self
                .below(place)
                .iter()
                .filter_map(|below| below.function.as_ref())
            {
                function.reset();
            }
            effect |= ConfigEffect::ROUTING;
        }
        if !effect.intersects(ConfigEffect::ROUTING | ConfigEffect::DECODING) {
            return;
        }
        let mut decoding = self.decoding.lock().unwrap_or_else(PoisonError::into_inner);
        let segment = self.roots[self.buses[place.bus].root].segment;
        let renumbered = effect.contains(ConfigEffect::ROUTING) && self.route(segment);
        let first = place.below.start - 1;
        decoding.refresh(self, first..place.below.end);
        drop(decoding);
        if renumbered {
            self.tell_renumbered();
        }
    }

    fn below(&self, place: &Place) -> &[Place] {
        &self.places[place.below.clone()]
    }

    /// What is programmed when no firmware runs: bus numbers, windows, BARs and interrupt lines of the plan.
    fn program(&self) {
        let mut decoding = self.decoding.lock().unwrap_or_else(PoisonError::into_inner);
        for place in &self.places {
            if let Some(function) = &place.function {
                place.start.program(&**function);
            }
        }
        for segment in &self.segments {
            // Of these numbers nobody has to be told.
            let _renumbered = self.route(segment.number);
        }
        decoding.refresh(self, 0..self.places.len());
    }

    /// Work out anew where each bus number of `segment` leads, and tell every requester its number before
    /// the next access is routed. Whether any has another than before.
    fn route(&self, segment: u16) -> bool {
        let Ok(index) = self
            .segments
            .binary_search_by_key(&segment, |segment| segment.number)
        else {
            return false;
        };
        let segment = &self.segments[index];
        let mut routes = segment.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.fill(None);
        for root in &self.roots[segment.roots.clone()] {
            self.route_below(root, &mut routes);
        }
        let mut renumbered = false;
        for (number, route) in routes.iter().enumerate() {
            let number = u8::try_from(number).expect("256 buses");
            if let Some(route) = route {
                renumbered |= self.renumber(segment.number, number, &self.buses[route.bus]);
            }
        }
        renumbered
    }

    /// Follow the ports of one root complex downwards.
    fn route_below(&self, root: &Root, routes: &mut [Option<Route>; 256]) {
        let mut open = vec![(root.bus, root.buses.clone(), true)];
        while let Some((bus, numbers, all_devices)) = open.pop() {
            let slot = &mut routes[usize::from(*numbers.start())];
            // Two ports with the same number: the first keeps it.
            if slot.is_some() {
                continue;
            }
            *slot = Some(Route { bus, all_devices });
            // In reverse, so that the lowest device is popped first.
            for place in self.buses[bus].functions.iter().rev().flatten() {
                if let Some((state, below)) = self.port_below(*place) {
                    let first = *state.buses.start();
                    let last = *state.buses.end().min(numbers.end());
                    if state.passes && *numbers.start() < first && first <= last {
                        let all_devices = !self.buses[below].behind_a_link || state.ari_forwarding;
                        open.push((below, first..=last, all_devices));
                    }
                }
            }
        }
    }

    /// The state of the port at `place` and the bus behind it; `None` when no port is there.
    fn port_below(&self, place: usize) -> Option<(PortState, usize)> {
        self.places[place]
            .port
            .as_ref()
            .map(|(port, bus)| (port.state(), *bus))
    }

    /// Tell the functions on `bus` that it is number `number`. Whether that is news to any.
    fn renumber(&self, segment: u16, number: u8, bus: &LogicalBus) -> bool {
        let mut renumbered = false;
        for place in bus.functions.iter().flatten().map(|place| &self.places[*place]) {
            if let Some(function) = &place.function {
                let bdf = Bdf::from_requester_id(u16::from_be_bytes([number, place.device_function]));
                let (requester, at) = (function.requester(), Sbdf { segment, bdf });
                renumbered |= requester.sbdf() != at;
                requester.renumber(at);
            }
        }
        renumbered
    }
}

#[cfg(test)]
mod tests;
