//! Routing, decoding and reset over whole hierarchies.

use proptest::prelude::*;

use super::*;
use crate::pci::assign::{Parent, Slot};
use crate::pci::port::PortInterrupts;
use crate::pci::testing::{Event, Machine, Messages, Probe, bars, function, plan, two_roots};
use crate::pci::tree::{NodeKind, PciTree};
use crate::platform::addr::Gpa;
use crate::platform::bus::BusDevice;

const COMMAND: u16 = 1;
const BUSES: u16 = 6;
const CONTROL: u16 = 15;
const RESET_BELOW: u32 = 0x0040 << 16;
/// The Express capability comes first in ports and probes.
const DEVICE_CONTROL: u16 = 0x10 + 2;
const LINK_CONTROL: u16 = 0x10 + 4;
const DEVICE_CONTROL_2: u16 = 0x10 + 10;

fn bdf(bus: u8, device: u8, function: u8) -> Bdf {
    Bdf::new(bus, device, function).expect("in range")
}

fn machine() -> Machine {
    Machine::new(two_roots())
}

fn address(machine: &Machine, name: &str, index: u8) -> u64 {
    machine
        .node(name)
        .bars
        .iter()
        .find(|bar| bar.index == index)
        .expect("planned")
        .address
}

fn at(machine: &Machine, name: &str) -> Bdf {
    machine.node(name).bdf
}

#[test]
fn every_function_is_where_the_plan_says() {
    let machine = machine();
    for (segment, node) in machine.tree.nodes() {
        let function = machine.topology.function(segment, node.bdf).expect("routed");
        assert_eq!(function.name(), node.name);
        assert_eq!(function.requester().sbdf().bdf, node.bdf, "{}", node.name);
    }
    let reached = machine
        .topology
        .functions()
        .filter(|(_, at)| at.is_some())
        .count();
    assert_eq!(reached, machine.tree.nodes().count());
}

#[test]
fn a_root_bus_may_be_empty() {
    let machine = Machine::new(plan(&[("rc0", 0..=255)], Vec::new()));
    assert_eq!(machine.read(bdf(0, 0, 0), 0), u32::MAX);
    machine.topology.reset();
    assert_eq!(machine.answering(), []);
}

#[test]
fn the_guest_finds_buses_windows_and_bars_programmed() {
    let machine = machine();
    let (port, bridge) = (
        machine.node("rp1"),
        machine.node("rp1").bridge.as_ref().expect("a port"),
    );
    let buses = u32::from_le_bytes([0, bridge.secondary, bridge.subordinate, 0]);
    assert_eq!(machine.read(port.bdf, BUSES), buses);
    let memory = bridge.windows.mem32.expect("far0 and far1 have 32-bit BARs");
    let window = memory.last().0 & 0xfff0_0000 | memory.start().0 >> 16;
    assert_eq!(u64::from(machine.read(port.bdf, 8)), window);
    let wide = address(&machine, "far1", 0);
    assert_eq!(
        u64::from(machine.read(at(&machine, "far1"), 4)),
        wide & 0xffff_ffff | 0xc
    );
    assert_eq!(u64::from(machine.read(at(&machine, "far1"), 5)), wide >> 32);
    let gsi = machine.node("far1").intx.expect("wired").gsi;
    assert_eq!(machine.read(at(&machine, "far1"), 15) & 0xff, gsi);
}

#[test]
fn nothing_answers_before_it_is_enabled_and_everything_after() {
    let machine = machine();
    assert_eq!(machine.answering(), []);
    machine.enable();
    assert_eq!(machine.answering(), machine.planned());
}

#[test]
fn a_closed_window_hides_what_is_behind_it_until_it_opens() {
    let machine = machine();
    machine.enable();
    let (port, bar) = (at(&machine, "rp0"), address(&machine, "near", 2));
    let window = machine.read(port, 8);
    assert_eq!(machine.answer(bar), Some(2));
    machine.write(port, 8, 0x0000_fff0);
    assert_eq!(machine.answer(bar), None);
    assert_eq!(machine.answer(address(&machine, "near", 0)), Some(0));
    machine.write(port, 8, window);
    assert_eq!(machine.answer(bar), Some(2));
}

#[test]
fn every_port_on_the_way_must_forward() {
    for name in ["rp1", "up", "down0"] {
        let machine = machine();
        machine.enable();
        machine.write(at(&machine, name), COMMAND, 0);
        assert_eq!(machine.answer(address(&machine, "far0", 0)), None, "{name}");
        let requester = machine
            .topology
            .function(0, at(&machine, "far0"))
            .expect("routed")
            .requester();
        assert!(!requester.bus_master(), "{name}");
        machine.write(at(&machine, name), COMMAND, 7);
        assert_eq!(machine.answer(address(&machine, "far0", 0)), Some(0), "{name}");
        assert!(requester.bus_master(), "{name}");
    }
}

#[test]
fn a_switch_that_blocks_prefixes_stops_those_of_everything_behind_it_and_no_others() {
    const PREFIX_BLOCKING: u32 = 1 << 15;
    let machine = machine();
    let blocked = || {
        let names = ["near", "far0", "far1", "other"];
        names.map(|name| {
            let function = machine.topology.function(0, at(&machine, name)).expect("routed");
            function.requester().prefixes_blocked()
        })
    };
    machine.enable();
    for name in ["rp0", "rp1", "down0"] {
        machine.write(at(&machine, name), DEVICE_CONTROL_2, PREFIX_BLOCKING);
    }
    assert_eq!(blocked(), [false; 4]);
    machine.write(at(&machine, "up"), DEVICE_CONTROL_2, PREFIX_BLOCKING);
    assert_eq!(blocked(), [false, true, true, false]);
    machine.write(at(&machine, "up"), DEVICE_CONTROL_2, 0);
    assert_eq!(blocked(), [false; 4]);
    machine.write(at(&machine, "up"), DEVICE_CONTROL_2, PREFIX_BLOCKING);
    machine.topology.reset();
    assert_eq!(blocked(), [false; 4]);
}

#[test]
fn class_13_a_function_without_memory_decode_answers_nowhere_and_says_so_first() {
    let machine = machine();
    machine.enable();
    let probe = machine.probe("flat");
    probe.events();
    machine.write(at(&machine, "flat"), COMMAND, 5);
    assert_eq!(machine.answer(address(&machine, "flat", 0)), None);
    assert_eq!(probe.events(), [Event::Moved(0, None), Event::Moved(2, None)]);
}

#[test]
fn a_moved_bar_answers_at_its_new_address_only() {
    let machine = machine();
    machine.enable();
    let probe = machine.probe("flat");
    probe.events();
    let old = address(&machine, "flat", 2);
    let window = machine.tree.segments[0].roots[0].windows.mem32.expect("has BARs");
    let free = window.last().0 & !0xfff;
    machine.write(at(&machine, "flat"), 6, u32::try_from(free).expect("below 4 GiB"));
    assert_eq!((machine.answer(old), machine.answer(free)), (None, Some(2)));
    assert_eq!(
        probe.events(),
        [Event::Moved(2, None), Event::Moved(2, Some(Gpa(free)))]
    );
    machine.mmio.write(free + 8, &[1, 2]);
    assert_eq!(probe.events(), [Event::Written(2, 8, vec![1, 2])]);
}

#[test]
fn class_14_sizing_while_decoding_claims_nothing_and_restoring_brings_it_back() {
    let machine = machine();
    machine.enable();
    let before = machine.answering();
    let flat = at(&machine, "flat");
    for dword in 4..10 {
        let old = machine.read(flat, dword);
        machine.write(flat, dword, u32::MAX);
        let claimed = machine.answering();
        assert!(claimed.iter().all(|claim| before.contains(claim)), "{dword}");
        machine.write(flat, dword, old);
    }
    assert_eq!(machine.answering(), before);
}

#[test]
fn class_14_a_bar_that_cannot_be_had_answers_nowhere_until_it_can() {
    let machine = machine();
    machine.enable();
    let taken = address(&machine, "flat", 2);
    let flat = at(&machine, "flat");
    let claims = machine.mmio.traffic().len();
    let free = machine.tree.segments[0].roots[0]
        .windows
        .mem32
        .expect("open")
        .last()
        .0
        & !0xfff;
    let held = machine
        .mmio
        .claim("blocker", free, 0x1000, Arc::new(Nobody))
        .expect("free");
    machine.write(flat, 6, u32::try_from(free).expect("below 4 GiB"));
    assert_eq!(
        (machine.answer(taken), machine.mmio.traffic().len()),
        (None, claims)
    );
    drop(held);
    // Anything that lets go has the others tried again.
    machine.write(at(&machine, "near"), COMMAND, 0);
    assert_eq!(machine.answer(free), Some(2));
}

struct Nobody;

impl BusDevice for Nobody {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[test]
fn two_functions_at_one_address_the_first_keeps_it_and_the_second_inherits() {
    let machine = machine();
    machine.enable();
    let (first, second) = (at(&machine, "far0"), at(&machine, "far1"));
    let shared = address(&machine, "far0", 2);
    // far1 is behind a window of its own: open it over far0's as well.
    let window = machine.read(at(&machine, "down0"), 8);
    machine.write(at(&machine, "down1"), 8, window);
    machine.probe("far1").events();
    machine.write(second, 6, u32::try_from(shared).expect("below 4 GiB"));
    machine.mmio.write(shared, &[7]);
    assert_eq!(machine.probe("far1").events(), []);
    machine.write(first, COMMAND, 0);
    machine.mmio.write(shared, &[7]);
    let inherited = [Event::Moved(2, Some(Gpa(shared))), Event::Written(2, 0, vec![7])];
    assert_eq!(machine.probe("far1").events(), inherited);
}

#[test]
fn a_bar_outside_the_root_complex_answers_nowhere() {
    let machine = machine();
    machine.enable();
    for wrong in [0, 0x1000, 0xfee0_0000, 0xfec0_0000, 0xffff_f000] {
        machine.write(at(&machine, "flat"), 6, wrong);
        assert_eq!(machine.answer(u64::from(wrong)), None, "{wrong:#x}");
    }
    machine.write(at(&machine, "flat"), 4, 0xffff_c000);
    machine.write(at(&machine, "flat"), 5, u32::MAX);
    assert_eq!(machine.answer(u64::MAX), None);
}

#[test]
fn io_bars_answer_on_ports_and_only_below_64_ki() {
    let machine = machine();
    machine.enable();
    let port = address(&machine, "near", 3);
    assert!(machine.ports.read(port + 3, &mut [0]));
    machine.write(
        at(&machine, "near"),
        7,
        0x1_0000 + u32::try_from(port).expect("a port"),
    );
    assert!(!machine.ports.read(port + 3, &mut [0]));
    assert!(!machine.ports.read(0x1_0000 + port, &mut [0]));
}

#[test]
fn a_renumbered_bus_routes_by_its_new_number_at_once() {
    let machine = machine();
    machine.enable();
    machine.write(at(&machine, "rp0"), BUSES, 0x0030_3000);
    let moved = bdf(0x30, 0, 0);
    assert_eq!(machine.read(at(&machine, "near"), 0), u32::MAX);
    let near = machine.topology.function(0, moved).expect("routed");
    assert_eq!((near.name(), near.requester().sbdf().bdf), ("near", moved));
    assert_eq!(machine.answer(address(&machine, "near", 0)), Some(0));
}

#[test]
fn numbers_outside_what_is_above_lead_nowhere() {
    let machine = machine();
    let rp0 = at(&machine, "rp0");
    for buses in [0x00ff_ff00, 0x0040_4000, 0x0000_0000, 0x0001_0200, 0x00ff_0000] {
        machine.write(rp0, BUSES, buses);
        let leads = (0..=255).any(|bus| {
            let found = machine.topology.function(0, bdf(bus, 0, 0));
            found.is_some_and(|function| function.name() == "near")
        });
        assert!(!leads, "{buses:#x}");
    }
    machine.write(rp0, BUSES, 0x00ff_3f00);
    assert_eq!(
        machine
            .topology
            .function(0, bdf(0x3f, 0, 0))
            .expect("clipped")
            .name(),
        "near"
    );
}

#[test]
fn a_secondary_bus_reset_resets_and_hides_all_that_is_behind() {
    let machine = machine();
    machine.enable();
    let (rp1, far0) = (at(&machine, "rp1"), at(&machine, "far0"));
    let requester = machine
        .topology
        .function(0, far0)
        .expect("routed")
        .requester()
        .clone();
    machine.probe("far0").events();
    machine.write(rp1, CONTROL, RESET_BELOW);
    assert_eq!(machine.read(at(&machine, "up"), 0), u32::MAX);
    assert_eq!(machine.answer(address(&machine, "far0", 0)), None);
    assert!(!requester.bus_master());
    let events = machine.probe("far0").events();
    assert_eq!(
        events,
        [
            Event::Reset,
            Event::Mastering(false, true),
            Event::Moved(0, None),
            Event::Moved(2, None)
        ]
    );
    machine.write(rp1, CONTROL, 0);
    assert_eq!(machine.read(at(&machine, "up"), BUSES), 0);
    assert_eq!(machine.read(far0, 0), u32::MAX);
    assert_eq!(
        machine
            .probe("near")
            .events()
            .iter()
            .filter(|event| **event == Event::Reset)
            .count(),
        0
    );
}

#[test]
fn a_pause_reaches_every_function_wherever_it_is_and_decoding_stays() {
    let machine = machine();
    machine.enable();
    machine.write(at(&machine, "rp1"), CONTROL, RESET_BELOW);
    for name in ["near", "far0"] {
        machine.probe(name).events();
        let requester = machine.probe(name).requester().bus_master();
        machine.topology.pause();
        machine.topology.resume();
        assert_eq!(machine.probe(name).events(), [Event::Paused, Event::Resumed]);
        assert_eq!(machine.probe(name).requester().bus_master(), requester);
    }
}

#[test]
fn a_disabled_link_hides_what_is_behind_and_shows_it_again() {
    let machine = machine();
    let (rp0, near) = (at(&machine, "rp0"), at(&machine, "near"));
    machine.write(rp0, LINK_CONTROL, 1 << 4);
    assert_eq!(machine.read(near, 0), u32::MAX);
    machine.write(rp0, LINK_CONTROL, 0);
    assert_eq!(machine.read(near, 0), 0x5678_1234);
}

#[test]
fn a_function_level_reset_stops_decoding_and_mastering() {
    let machine = machine();
    machine.enable();
    let near = at(&machine, "near");
    machine.probe("near").events();
    // The probe's power management comes first.
    let control = DEVICE_CONTROL + 2;
    let initial = machine.read(near, control);
    machine.write(near, control, initial | 1 << 15);
    assert_eq!(machine.answer(address(&machine, "near", 0)), None);
    assert_eq!(machine.read(near, COMMAND) & 7, 0);
    assert!(
        !machine
            .topology
            .function(0, near)
            .expect("still there")
            .requester()
            .bus_master()
    );
    assert_eq!(machine.probe("near").events()[0], Event::Reset);
    assert_eq!(machine.read(near, control), initial);
}

#[test]
fn a_sleeping_function_answers_configuration_only() {
    let machine = machine();
    machine.enable();
    let near = at(&machine, "near");
    machine.write(near, 0x11, 3);
    assert_eq!(machine.answer(address(&machine, "near", 0)), None);
    assert_eq!(machine.read(near, 0), 0x5678_1234);
    machine.write(near, 0x11, 0);
    assert_eq!(machine.answer(address(&machine, "near", 0)), Some(0));
}

// Its driver may be interrupted on another processor before the write that wakes it has returned.
#[test]
fn a_function_issues_requests_only_while_it_answers() {
    let machine = machine();
    machine.enable();
    let (flat, bars) = (
        at(&machine, "flat"),
        [0, 2].map(|bar| address(&machine, "flat", bar)),
    );
    let [first, second] = bars.map(|at| Some(Gpa(at)));
    machine.probe("flat").events();
    machine.write(flat, COMMAND, 0);
    machine.write(flat, COMMAND, 7);
    let events = machine.probe("flat").events();
    assert_eq!(
        events,
        [
            Event::Mastering(false, true),
            Event::Moved(0, None),
            Event::Moved(2, None),
            Event::Moved(0, first),
            Event::Moved(2, second),
            Event::Mastering(true, true),
        ]
    );
    let requester = machine
        .topology
        .function(0, flat)
        .expect("there")
        .requester()
        .clone();
    machine.write(flat, COMMAND, 3);
    assert!(!requester.bus_master());
}

#[test]
fn behind_a_link_there_is_device_0_unless_ari_makes_it_a_function() {
    let mut tree = plan(
        &[("rc0", 0..=255)],
        vec![
            function("rp0", NodeKind::RootPort, Parent::Root(0), &[]),
            function("near", NodeKind::Endpoint(0), Parent::Port(0), &[]),
        ],
    );
    let port = &mut tree.segments[0].roots[0].functions[0];
    let bridge = port.bridge.as_mut().expect("a port");
    bridge.children[0].bdf = bdf(bridge.secondary, 2, 1);
    let machine = Machine::new(tree);
    let near = at(&machine, "near");
    assert_eq!(machine.read(near, 0), u32::MAX);
    machine.write(at(&machine, "rp0"), DEVICE_CONTROL_2, 1 << 5);
    assert_eq!(machine.read(near, 0), 0x5678_1234);
    machine.write(at(&machine, "rp0"), DEVICE_CONTROL_2, 0);
    assert_eq!(machine.read(near, 0), u32::MAX);
}

#[test]
fn an_empty_slot_has_no_link_and_a_full_one_has() {
    let machine = machine();
    let link = |name| machine.read(at(&machine, name), LINK_CONTROL) >> 29 & 1;
    let present = |name| machine.read(at(&machine, name), LINK_CONTROL + 2) >> 22 & 1;
    assert_eq!((link("empty"), present("empty")), (0, 0));
    assert_eq!((link("rp0"), present("rp0")), (1, 1));
    assert_eq!((link("down1"), present("down1")), (1, 1));
}

#[test]
fn only_function_0_of_several_announces_them() {
    let mut specs = vec![
        function("f0", NodeKind::Endpoint(0), Parent::Root(0), &[]),
        function("f3", NodeKind::Endpoint(0), Parent::Root(0), &[]),
        function("single", NodeKind::Endpoint(0), Parent::Root(0), &[]),
    ];
    specs[0].slot = Slot::new(5, 0);
    specs[1].slot = Slot::new(5, 3);
    let machine = Machine::new(plan(&[("rc0", 0..=255)], specs));
    let header = |name| machine.read(at(&machine, name), 3) >> 16 & 0xff;
    assert_eq!((header("f0"), header("single")), (0x80, 0));
}

#[test]
fn absent_functions_are_all_ones_and_take_nothing() {
    let machine = machine();
    for absent in [bdf(0, 31, 7), bdf(0x3f, 0, 0), bdf(0x80, 0, 0), bdf(0xff, 31, 7)] {
        assert_eq!(machine.read(absent, 0), u32::MAX);
        machine.write(absent, COMMAND, 7);
    }
    assert_eq!(machine.topology.config_read(1, bdf(0, 0, 0), 0), u32::MAX);
    assert_eq!(machine.read(at(&machine, "flat"), 1024), u32::MAX);
    machine.write(at(&machine, "flat"), 0xffff, 0);
}

#[test]
fn a_guest_that_renumbers_and_moves_everything_finds_it_all() {
    let machine = machine();
    machine.enable();
    let ports = ["rp0", "rp1"].map(|name| at(&machine, name));
    for port in ports {
        machine.write(port, COMMAND, 0);
        machine.write(port, BUSES, 0);
    }
    // rp1 first this time, with room between the buses; the switch is behind it.
    machine.write(ports[1], BUSES, 0x0020_1000);
    machine.write(bdf(0x10, 0, 0), BUSES, 0x0020_1110);
    machine.write(bdf(0x11, 0, 0), BUSES, 0x0018_1811);
    machine.write(bdf(0x11, 1, 0), BUSES, 0x001c_1c11);
    machine.write(ports[0], BUSES, 0x0021_2100);
    let name = |at| {
        machine
            .topology
            .function(0, at)
            .expect("routed")
            .name()
            .to_owned()
    };
    assert_eq!(name(bdf(0x18, 0, 0)), "far0");
    assert_eq!(name(bdf(0x1c, 0, 0)), "far1");
    assert_eq!(name(bdf(0x21, 0, 0)), "near");
    // One memory window for the switch, its devices' BARs the other way round.
    let base = address(&machine, "far0", 2).min(address(&machine, "far1", 2)) & !0xf_ffff;
    let window = u32::try_from(base >> 16 | (base + 0x10_0000) & 0xfff0_0000).expect("below 4 GiB");
    let low = u32::try_from(base).expect("below 4 GiB");
    for port in [ports[1], bdf(0x10, 0, 0)] {
        machine.write(port, 8, window);
        machine.write(port, COMMAND, 7);
    }
    for (port, device, base) in [
        (bdf(0x11, 0, 0), bdf(0x18, 0, 0), low + 0x10_0000),
        (bdf(0x11, 1, 0), bdf(0x1c, 0, 0), low),
    ] {
        machine.write(device, COMMAND, 0);
        machine.write(device, 6, base + 0x3000);
        machine.write(port, 8, base >> 16 | base);
        machine.write(port, COMMAND, 7);
        machine.write(device, COMMAND, 7);
    }
    machine.probe("far0").events();
    machine.mmio.write(u64::from(low) + 0x10_3010, &[1]);
    assert_eq!(machine.probe("far0").events(), [Event::Written(2, 0x10, vec![1])]);
    machine.topology.reset();
    machine.enable();
    assert_eq!(machine.answering(), machine.planned());
}

#[test]
fn what_cannot_be_attached_is_refused_with_the_reason() {
    let machine = machine();
    let messages = Messages::new();
    let interrupts = PortInterrupts {
        messages: messages.clone(),
        wires: messages,
    };
    let mut builder = TopologyBuilder::new(&machine.tree, |_| interrupts.clone());
    let node = machine.node("flat");
    let place = |bdf| Sbdf { segment: 0, bdf };
    let error = builder
        .attach(place(bdf(9, 9, 0)), Probe::new(node))
        .expect_err("nothing planned");
    assert_eq!(
        error.to_string(),
        "cannot attach flat at 0000:09:09.0: the plan has no device there"
    );
    let error = builder
        .attach(place(at(&machine, "rp0")), Probe::new(node))
        .expect_err("a port");
    assert!(error.to_string().ends_with(": rp0 is there"), "{error}");
    let mut other = node.clone();
    other.bars.pop();
    let error = builder
        .attach(place(node.bdf), Probe::new(&other))
        .expect_err("other BARs");
    assert!(matches!(error, AttachError::OtherBars { .. }), "{error}");
    builder
        .attach(place(node.bdf), Probe::new(node))
        .expect("as planned");
    let error = builder
        .attach(place(node.bdf), Probe::new(node))
        .expect_err("taken");
    assert!(matches!(error, AttachError::Occupied { .. }), "{error}");
}

#[test]
fn a_chain_as_deep_as_bus_numbers_allow_works() {
    let mut functions = vec![function("p0", NodeKind::RootPort, Parent::Root(0), &[])];
    for depth in 1..254_usize {
        let kind = if depth % 2 == 1 {
            NodeKind::UpstreamPort
        } else {
            NodeKind::DownstreamPort
        };
        functions.push(function(&format!("p{depth}"), kind, Parent::Port(depth - 1), &[]));
    }
    functions.truncate(253);
    functions.push(function(
        "deepest",
        NodeKind::Endpoint(0),
        Parent::Port(252),
        &bars(),
    ));
    let machine = Machine::new(plan(&[("rc0", 0..=255)], functions));
    machine.enable();
    assert_eq!(machine.answer(address(&machine, "deepest", 0)), Some(0));
}

/// What may hang off what, as the numbers a strategy draws: the parent is taken modulo the places there are.
fn trees() -> impl Strategy<Value = PciTree> {
    proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..4, any::<bool>()), 1..24).prop_map(
        |draws| {
            let mut functions = Vec::new();
            // Places where something fits: the parent, what its link leads to, and whether it is used up.
            let mut places = vec![(Parent::Root(0), None), (Parent::Root(1), None)];
            for (number, (place, bar, leaf)) in draws.into_iter().enumerate() {
                let index = place.index(places.len());
                let (parent, above) = places[index];
                let kind = match (above, leaf) {
                    (Some(NodeKind::UpstreamPort), _) => NodeKind::DownstreamPort,
                    (_, true) => NodeKind::Endpoint(0),
                    (None, false) => NodeKind::RootPort,
                    (Some(_), false) => NodeKind::UpstreamPort,
                };
                // One device at the end of a link.
                if !matches!(above, None | Some(NodeKind::UpstreamPort)) {
                    places.swap_remove(index);
                }
                let bars = if leaf && above != Some(NodeKind::UpstreamPort) {
                    &bars()[..bar]
                } else {
                    &[]
                };
                functions.push(function(&format!("f{number}"), kind, parent, bars));
                if !matches!(kind, NodeKind::Endpoint(_)) {
                    places.push((Parent::Port(number), Some(kind)));
                }
            }
            plan(&[("rc0", 0..=0x3f), ("rc1", 0x40..=0x7f)], functions)
        },
    )
}

/// A guest's write: where, what, and how wide.
fn writes() -> impl Strategy<Value = (u16, u16, usize, Vec<u8>)> {
    // Mostly buses that exist and registers that matter.
    let target = prop_oneof![2 => 0_u16..0x60, 4 => 0_u16..0x900, 2 => 0x4000_u16..0x4300, 1 => any::<u16>()];
    let dword = prop_oneof![6 => 0_u16..32, 1 => 0_u16..1024];
    let value = prop_oneof![
        Just(0_u32),
        Just(u32::MAX),
        Just(7),
        any::<u32>(),
        0xd000_0000..0xf000_0000_u32
    ];
    (target, dword, 0_usize..4, value, 1_usize..=4).prop_map(|(target, dword, lane, value, len)| {
        let len = len.min(4 - lane);
        (target, dword, lane, value.to_le_bytes()[..len].to_vec())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_is_written_nothing_leaves_its_root_complex_and_reset_repairs_all(
        tree in trees(),
        writes in proptest::collection::vec(writes(), 1..200),
    ) {
        let machine = Machine::new(tree);
        machine.enable();
        for (target, dword, lane, bytes) in writes {
            let write = DwordWrite::new(lane, &bytes).expect("inside");
            machine.topology.config_write(0, Bdf::from_requester_id(target), dword, write);
        }
        machine.check();
        machine.topology.reset();
        prop_assert_eq!(machine.answering(), []);
        machine.enable();
        prop_assert_eq!(machine.answering(), machine.planned());
    }
}

#[test]
fn processors_that_move_renumber_and_use_everything_at_once_neither_wait_for_ever_nor_disagree() {
    let machine = machine();
    machine.enable();
    let (near, rp0) = (at(&machine, "near"), at(&machine, "rp0"));
    let bar = u32::try_from(address(&machine, "near", 2)).expect("below 4 GiB");
    let others = [bar, bar + 0x1000, 0, u32::MAX];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..2_000 {
                machine.write(near, 6, others[round % others.len()]);
            }
        });
        scope.spawn(|| {
            for round in 0..2_000 {
                machine.write(rp0, COMMAND, if round % 2 == 0 { 0 } else { 7 });
            }
        });
        scope.spawn(|| {
            for round in 0..500_u32 {
                machine.write(rp0, CONTROL, (round % 2) << 22);
                machine.write(rp0, BUSES, 0x0001_0100 + (round % 3) * 0x0001_0100);
            }
        });
        scope.spawn(|| {
            for offset in 0..20_000_u64 {
                machine.mmio.write(u64::from(bar) + offset % 0x2000, &[1]);
            }
        });
    });
    machine.check();
    machine.topology.reset();
    machine.enable();
    machine.check_as_planned();
}
