//! Device numbers and bus numbers.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::pci::tree::{BarKind, NodeKind};

use super::pack::Measured;
use super::{AssignError, FunctionSpec, Parent, Slot, TreeSpec};

/// Bus numbers of a segment.
const BUSES: usize = 256;

/// Where a function is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) slot: Slot,
    pub(super) bus: u8,
    /// For a bridge: the bus behind it.
    pub(super) secondary: u8,
    /// For a bridge: the last bus behind it.
    pub(super) subordinate: u8,
}

impl Placed {
    fn at(slot: Slot) -> Self {
        Self {
            slot,
            bus: 0,
            secondary: 0,
            subordinate: 0,
        }
    }
}

/// A hierarchy in which everything has its number.
#[derive(Debug)]
pub(super) struct Numbered<'a> {
    pub(super) spec: &'a TreeSpec,
    /// Who is on which bus, in ascending order of slot; buses as [`bus_of`] counts them.
    pub(super) order: Vec<Vec<usize>>,
    /// The bus range of each root complex.
    pub(super) buses: Vec<RangeInclusive<u8>>,
    /// The `_UID` of each root complex: its rank in the tree.
    pub(super) uids: Vec<u32>,
    pub(super) placed: Vec<Placed>,
    /// Every function in the order of the tree, parents first.
    pub(super) met: Vec<usize>,
}

/// A bus while it is filled: who is where.
struct Bus<'a> {
    /// What it belongs to, for messages.
    name: &'a str,
    /// The device numbers it has.
    devices: RangeInclusive<u8>,
    /// The first device number that is given to those who ask for none.
    first_free: u8,
    slots: BTreeMap<Slot, usize>,
}

/// Give every function a place and every bus a number, and say how much address space that takes.
pub fn measure(spec: &TreeSpec) -> Result<Measured<'_>, AssignError> {
    spec.functions.iter().try_for_each(check_bars)?;
    let below = children(spec)?;
    let mut buses = bus_ranges(spec)?;
    let mut slots = vec![Slot::default(); spec.functions.len()];
    let mut order: Vec<Vec<usize>> = Vec::with_capacity(below.len());
    for (bus, functions) in below.iter().enumerate() {
        order.push(fill(spec, bus, functions, &mut slots)?);
    }
    for (root, range) in buses.iter_mut().enumerate() {
        if spec.roots[root].buses.is_none() {
            *range = trimmed(range, 1 + bridges(spec, &order, root));
        }
    }
    let mut placed: Vec<Placed> = slots.into_iter().map(Placed::at).collect();
    let mut met = Vec::with_capacity(spec.functions.len());
    let mut uids = vec![0; spec.roots.len()];
    for (uid, root) in (0..).zip(in_tree_order(spec, &buses)) {
        uids[root] = uid;
        met.extend(number_buses(spec, &order, root, &buses[root], &mut placed)?);
    }
    Ok(Measured::new(Numbered {
        spec,
        order,
        buses,
        uids,
        placed,
        met,
    }))
}

/// Root complexes in ascending order of segment and bus.
fn in_tree_order(spec: &TreeSpec, buses: &[RangeInclusive<u8>]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..spec.roots.len()).collect();
    order.sort_by_key(|root| (spec.roots[*root].segment, *buses[*root].start()));
    order
}

/// The index of a function's bus in the list of all buses: root buses first, then one per function (used for
/// ports only).
pub(super) fn bus_of(spec: &TreeSpec, parent: Parent) -> usize {
    match parent {
        Parent::Root(root) => root,
        Parent::Port(port) => spec.roots.len() + port,
    }
}

fn bus_name(spec: &TreeSpec, bus: usize) -> &str {
    match bus.checked_sub(spec.roots.len()) {
        None => &spec.roots[bus].name,
        Some(port) => &spec.functions[port].name,
    }
}

/// Who is on which bus, in the order they were named. Refuses parents of the wrong kind, and circles.
fn children(spec: &TreeSpec) -> Result<Vec<Vec<usize>>, AssignError> {
    let mut below = vec![Vec::new(); spec.roots.len() + spec.functions.len()];
    for (at, function) in spec.functions.iter().enumerate() {
        check_parent(spec, function)?;
        below[bus_of(spec, function.parent)].push(at);
    }
    let mut reached = vec![false; spec.functions.len()];
    let mut next: Vec<usize> = (0..spec.roots.len())
        .flat_map(|root| below[root].clone())
        .collect();
    while let Some(at) = next.pop() {
        reached[at] = true;
        next.extend(&below[spec.roots.len() + at]);
    }
    match reached.iter().position(|reached| !reached) {
        None => Ok(below),
        Some(lost) => Err(cycle(spec, lost)),
    }
}

/// Who cannot be reached from a root complex is in a circle or behind one: follow the parents into it.
fn cycle(spec: &TreeSpec, lost: usize) -> AssignError {
    let above = |at: usize| match spec.functions[at].parent {
        Parent::Port(port) => port,
        Parent::Root(_) => at,
    };
    let start = (0..spec.functions.len()).fold(lost, |at, _| above(at));
    let mut path = vec![spec.functions[start].name.as_str()];
    let mut at = above(start);
    while at != start {
        path.push(&spec.functions[at].name);
        at = above(at);
    }
    path.push(&spec.functions[start].name);
    AssignError::Cycle {
        name: spec.functions[start].name.clone(),
        path: path.join(", behind "),
    }
}

/// What may be above what (PCI Express Base Specification 1.3).
fn check_parent(spec: &TreeSpec, function: &FunctionSpec) -> Result<(), AssignError> {
    let parent = match function.parent {
        Parent::Root(_) => None,
        Parent::Port(port) => Some(spec.functions[port].kind),
    };
    let rule = match (function.kind, parent) {
        (NodeKind::RootPort, Some(_)) => "a root port belongs on a root complex",
        (NodeKind::HostBridge, Some(_)) => "a host bridge belongs on a root complex",
        (NodeKind::IsaBridge, Some(_)) => "the ISA bridge belongs on a root complex",
        (NodeKind::Iommu(_), Some(_)) => "an IOMMU belongs on a root complex",
        (NodeKind::UpstreamPort, None | Some(NodeKind::UpstreamPort)) => {
            "a switch belongs behind a root port or a downstream port"
        }
        (NodeKind::DownstreamPort, parent) if parent != Some(NodeKind::UpstreamPort) => {
            "a downstream port belongs behind an upstream port"
        }
        (NodeKind::Endpoint(_), Some(NodeKind::UpstreamPort)) => {
            "a device belongs behind a downstream port of the switch"
        }
        (
            _,
            Some(NodeKind::Endpoint(_) | NodeKind::HostBridge | NodeKind::IsaBridge | NodeKind::Iommu(_)),
        ) => "nothing can be behind a device",
        _ => return Ok(()),
    };
    Err(AssignError::WrongParent {
        name: function.name.clone(),
        bus: bus_name(spec, bus_of(spec, function.parent)).to_owned(),
        rule,
    })
}

fn check_bars(function: &FunctionSpec) -> Result<(), AssignError> {
    let mut next = 0;
    for bar in &function.bars {
        let wide = bar.kind.is_64_bit();
        let least = if bar.kind == BarKind::Io { 4 } else { 16 };
        let rule = if bar.index < next {
            "BARs come in ascending order, and a 64-bit BAR takes two registers"
        } else if bar.index > 5 || (wide && bar.index > 4) {
            "there are six registers"
        } else if !bar.size.is_power_of_two() || bar.size < least {
            "a size is a power of two, at least 16 bytes or 4 ports"
        } else if bar.kind == BarKind::Io && bar.size > 256 {
            "an I/O BAR has at most 256 ports"
        } else if matches!(bar.kind, BarKind::Mem32 { .. }) && bar.size > 1 << 31 {
            "a 32-bit BAR has at most 2 GiB"
        } else {
            next = bar.index + if wide { 2 } else { 1 };
            continue;
        };
        return Err(AssignError::BadBar {
            name: function.name.clone(),
            index: bar.index,
            rule,
        });
    }
    Ok(())
}

/// Give the functions of one bus their slots: first those who asked for one, then the others in order.
/// Returns them in ascending order of slot.
fn fill(
    spec: &TreeSpec,
    bus: usize,
    functions: &[usize],
    slots: &mut [Slot],
) -> Result<Vec<usize>, AssignError> {
    let mut filled = Bus::new(spec, bus);
    let asked = |at: &&usize| spec.functions[**at].slot.is_some();
    for &at in functions.iter().filter(asked) {
        let slot = spec.functions[at].slot.expect("just filtered");
        filled.put(spec, at, slot)?;
    }
    for &at in functions.iter().filter(|at| !asked(at)) {
        let slot = filled.next_free(&spec.functions[at].name)?;
        filled.put(spec, at, slot)?;
    }
    filled.check_function_zero(spec)?;
    for (slot, at) in &filled.slots {
        slots[*at] = *slot;
    }
    Ok(filled.slots.into_values().collect())
}

impl<'a> Bus<'a> {
    fn new(spec: &'a TreeSpec, bus: usize) -> Self {
        let kind = bus
            .checked_sub(spec.roots.len())
            .map(|port| spec.functions[port].kind);
        let (devices, first_free) = match kind {
            // Device 0 of a root complex is where its IOMMU would be.
            None => (0..=31, 1),
            // The bus inside a switch.
            Some(NodeKind::UpstreamPort) => (0..=31, 0),
            Some(_) => (0..=0, 0),
        };
        Self {
            name: bus_name(spec, bus),
            devices,
            first_free,
            slots: BTreeMap::new(),
        }
    }

    fn is_free(&self, device: u8) -> bool {
        (0..8).all(|function| {
            let slot = Slot { device, function };
            !self.slots.contains_key(&slot)
        })
    }

    fn next_free(&self, name: &str) -> Result<Slot, AssignError> {
        (self.first_free..=*self.devices.end())
            .find(|device| self.is_free(*device))
            .map(|device| Slot { device, function: 0 })
            .ok_or_else(|| AssignError::BusFull {
                name: name.to_owned(),
                bus: self.name.to_owned(),
                places: match (self.devices.end(), self.first_free) {
                    (0, _) => "one device; its functions need slot=0.0, slot=0.1 and so on",
                    (_, 0) => "32 devices",
                    _ => "devices 1 to 31; a device can have 8 functions, slot=DEVICE.FUNCTION",
                },
            })
    }

    fn put(&mut self, spec: &TreeSpec, at: usize, slot: Slot) -> Result<(), AssignError> {
        let name = &spec.functions[at].name;
        if !self.devices.contains(&slot.device()) {
            return Err(AssignError::NotDeviceZero {
                name: name.clone(),
                slot,
                bus: self.name.to_owned(),
            });
        }
        if let Some(other) = self.slots.get(&slot) {
            return Err(AssignError::SlotTaken {
                name: name.clone(),
                slot,
                bus: self.name.to_owned(),
                other: spec.functions[*other].name.clone(),
                free: self.free(slot),
            });
        }
        self.slots.insert(slot, at);
        Ok(())
    }

    /// The nearest choices to a slot that is taken: another function of the device, and another device.
    fn free(&self, taken: Slot) -> String {
        let function = (0..8)
            .map(|function| Slot { function, ..taken })
            .find(|slot| !self.slots.contains_key(slot));
        let device = (self.first_free..=*self.devices.end())
            .find(|device| self.is_free(*device))
            .map(|device| Slot { device, function: 0 });
        let found: Vec<_> = function
            .into_iter()
            .chain(device)
            .map(|s| s.to_string())
            .collect();
        if found.is_empty() {
            "none".to_owned()
        } else {
            found.join(" and ")
        }
    }

    fn check_function_zero(&self, spec: &TreeSpec) -> Result<(), AssignError> {
        let orphan = self.slots.iter().find(|(slot, _)| {
            !self.slots.contains_key(&Slot {
                function: 0,
                ..**slot
            })
        });
        match orphan {
            None => Ok(()),
            Some((slot, at)) => Err(AssignError::NoFunctionZero {
                name: spec.functions[*at].name.clone(),
                slot: *slot,
                bus: self.name.to_owned(),
            }),
        }
    }
}

/// The bus range of every root complex.
fn bus_ranges(spec: &TreeSpec) -> Result<Vec<RangeInclusive<u8>>, AssignError> {
    let mut segments: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
    for (at, root) in spec.roots.iter().enumerate() {
        segments.entry(root.segment).or_default().push(at);
    }
    let mut ranges = vec![0..=0; spec.roots.len()];
    for (segment, roots) in segments {
        let named = roots.iter().find(|at| spec.roots[**at].buses.is_some());
        let found = match named {
            Some(&named) => said_ranges(spec, &roots, named)?,
            None => shared_ranges(spec, segment, &roots)?,
        };
        for (at, range) in roots.into_iter().zip(found) {
            ranges[at] = range;
        }
    }
    let first =
        |(root, range): (&super::RootSpec, &RangeInclusive<u8>)| root.segment == 0 && *range.start() == 0;
    if !spec.roots.iter().zip(&ranges).any(first) {
        return Err(AssignError::NoFirstRoot);
    }
    Ok(ranges)
}

/// As much of the share `range` as a root complex that needs `needed` buses keeps.
///
/// Linux reads every device number of every bus that a root complex might have and that it has not found
/// (pcibios_fixup_peer_bridges): 32 exits a bus. The share's first bus stays, so no number changes; a few more
/// than needed are kept for a guest that numbers less tightly.
fn trimmed(range: &RangeInclusive<u8>, needed: usize) -> RangeInclusive<u8> {
    const SPARE: usize = 3;
    const UNIT: usize = 8;
    let first = usize::from(*range.start());
    let kept = (needed + SPARE).next_multiple_of(UNIT);
    let last = (first + kept - 1).min(usize::from(*range.end()));
    *range.start()..=u8::try_from(last).expect("within the share")
}

/// All ranges were said, or must have been because `named` was.
fn said_ranges(
    spec: &TreeSpec,
    roots: &[usize],
    named: usize,
) -> Result<Vec<RangeInclusive<u8>>, AssignError> {
    let mut owner: [Option<usize>; BUSES] = [None; BUSES];
    let mut found = Vec::with_capacity(roots.len());
    for &at in roots {
        let root = &spec.roots[at];
        let Some(range) = root.buses.clone() else {
            continue;
        };
        for bus in range.clone() {
            if let Some(other) = owner[usize::from(bus)] {
                let other_buses = spec.roots[other].buses.as_ref().expect("owners have ranges");
                return Err(AssignError::BusesOverlap {
                    name: root.name.clone(),
                    buses: buses_text(&range),
                    other: spec.roots[other].name.clone(),
                    other_buses: buses_text(other_buses),
                    free: free_buses(&owner),
                });
            }
        }
        range.clone().for_each(|bus| owner[usize::from(bus)] = Some(at));
        found.push(range);
    }
    match roots.iter().find(|at| spec.roots[**at].buses.is_none()) {
        None => Ok(found),
        Some(at) => Err(AssignError::BusesMissing {
            name: spec.roots[*at].name.clone(),
            other: spec.roots[named].name.clone(),
            segment: spec.roots[*at].segment,
            free: free_buses(&owner),
        }),
    }
}

/// Nobody asked: equal shares, so that a device added under one root complex renumbers no other.
fn shared_ranges(
    spec: &TreeSpec,
    segment: u16,
    roots: &[usize],
) -> Result<Vec<RangeInclusive<u8>>, AssignError> {
    let shares = roots.len().next_power_of_two();
    let share = BUSES / shares;
    if share == 0 {
        return Err(AssignError::TooManyRoots {
            name: spec.roots[*roots.last().expect("a segment has a root complex")]
                .name
                .clone(),
            roots: roots.len(),
            segment,
        });
    }
    let bus = |number: usize| u8::try_from(number).expect("shares lie within 256 buses");
    Ok((0..roots.len())
        .map(|at| bus(at * share)..=bus(at * share + share - 1))
        .collect())
}

pub(super) fn buses_text(range: &RangeInclusive<u8>) -> String {
    format!("{:#04x}-{:#04x}", range.start(), range.end())
}

fn free_buses(owner: &[Option<usize>; BUSES]) -> String {
    let mut runs: Vec<RangeInclusive<u8>> = Vec::new();
    let free = (0..=u8::MAX).filter(|bus| owner[usize::from(*bus)].is_none());
    for bus in free {
        match runs.last_mut() {
            Some(run) if run.end().checked_add(1) == Some(bus) => *run = *run.start()..=bus,
            _ => runs.push(bus..=bus),
        }
    }
    if runs.is_empty() {
        return "none".to_owned();
    }
    runs.iter().map(buses_text).collect::<Vec<_>>().join(", ")
}

/// Depth first: a bridge's secondary bus is the next number, its subordinate the last one given behind it.
/// Returns the functions in the order they were met, parents first.
fn number_buses(
    spec: &TreeSpec,
    order: &[Vec<usize>],
    root: usize,
    range: &RangeInclusive<u8>,
    placed: &mut [Placed],
) -> Result<Vec<usize>, AssignError> {
    // The stack holds what is still to be numbered; a port comes back once everything behind it is done.
    enum Step {
        Visit(usize, u8),
        Close(usize),
    }
    let visit = |bus: usize, number: u8| order[bus].iter().rev().map(move |at| Step::Visit(*at, number));
    let have = usize::from(range.end() - range.start()) + 1;
    let needed = 1 + bridges(spec, order, root);
    if needed > have {
        return Err(AssignError::BusesExhausted {
            name: spec.roots[root].name.clone(),
            needed,
            buses: buses_text(range),
            have,
        });
    }
    let mut met = Vec::new();
    let mut last = *range.start();
    let mut steps: Vec<Step> = visit(root, last).collect();
    while let Some(step) = steps.pop() {
        match step {
            Step::Visit(at, bus) => {
                met.push(at);
                placed[at].bus = bus;
                if is_bridge(spec.functions[at].kind) {
                    last += 1;
                    placed[at].secondary = last;
                    steps.push(Step::Close(at));
                    steps.extend(visit(spec.roots.len() + at, last));
                }
            }
            Step::Close(at) => placed[at].subordinate = last,
        }
    }
    Ok(met)
}

/// How many bridges a root complex has at any depth.
fn bridges(spec: &TreeSpec, order: &[Vec<usize>], root: usize) -> usize {
    let mut found = 0;
    let mut buses = vec![root];
    while let Some(bus) = buses.pop() {
        let behind = order[bus]
            .iter()
            .filter(|at| is_bridge(spec.functions[**at].kind));
        let before = buses.len();
        buses.extend(behind.map(|at| spec.roots.len() + at));
        found += buses.len() - before;
    }
    found
}

pub(super) fn is_bridge(kind: NodeKind) -> bool {
    matches!(
        kind,
        NodeKind::RootPort | NodeKind::UpstreamPort | NodeKind::DownstreamPort
    )
}
