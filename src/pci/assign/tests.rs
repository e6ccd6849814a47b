//! Trees that must be, trees that cannot be, and what holds for any tree.

use proptest::prelude::*;

use super::*;
use crate::pci::tree::{Bar, BarKind, ECAM_BYTES, Node, Windows};
use crate::platform::addr::Gpa;

const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    class: 0x02_0000,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};
const PREFETCHABLE: BarKind = BarKind::Mem64 { prefetchable: true };

fn range(start: u64, len: u64) -> GpaRange {
    GpaRange::new(Gpa(start), len).expect("a valid range")
}

fn pools(segments: u64) -> Pools {
    Pools {
        io: PortRange::new(0x1000, 0xffff).expect("not empty"),
        mem32: range(0xd000_0000, 0x2ec0_0000),
        mem64: range(0x40_0000_0000, 0x40_0000_0000),
        ecam: (0..segments)
            .map(|at| range(0x1_0000_0000 + at * ECAM_BYTES, ECAM_BYTES))
            .collect(),
    }
}

fn root(name: &str) -> RootSpec {
    RootSpec {
        name: name.to_owned(),
        segment: 0,
        buses: None,
    }
}

fn function(name: &str, kind: NodeKind, parent: Parent) -> FunctionSpec {
    FunctionSpec {
        name: name.to_owned(),
        kind,
        identity: IDENTITY,
        parent,
        slot: None,
        bars: Vec::new(),
        intx: true,
        removable: false,
    }
}

fn device(name: &str, parent: Parent) -> FunctionSpec {
    FunctionSpec {
        bars: vec![bar(0, PREFETCHABLE, 0x4000)],
        ..function(name, NodeKind::Endpoint(0), parent)
    }
}

fn bar(index: u8, kind: BarKind, size: u64) -> BarSpec {
    BarSpec { index, kind, size }
}

fn at(function: FunctionSpec, device: u8, number: u8) -> FunctionSpec {
    FunctionSpec {
        slot: Slot::new(device, number),
        ..function
    }
}

fn one_root(functions: Vec<FunctionSpec>) -> TreeSpec {
    TreeSpec {
        roots: vec![root("rc0")],
        functions,
    }
}

fn placed(spec: &TreeSpec) -> PciTree {
    assign(spec, &pools(4)).expect("a possible tree")
}

fn refused(spec: &TreeSpec) -> AssignError {
    assign(spec, &pools(4)).expect_err("an impossible tree")
}

fn find<'a>(tree: &'a PciTree, name: &str) -> &'a Node {
    let mut nodes = tree.nodes().map(|(_, node)| node);
    nodes.find(|node| node.name == name).expect("it was asked for")
}

fn address(tree: &PciTree, name: &str) -> String {
    find(tree, name).bdf.to_string()
}

/// rc0 - rp0 - switch sw0 with two downstream ports - nic0, nic1; rc0 - rp1 - nic2.
fn switched() -> TreeSpec {
    one_root(vec![
        function("rp0", NodeKind::RootPort, Parent::Root(0)),
        function("rp1", NodeKind::RootPort, Parent::Root(0)),
        function("sw0", NodeKind::UpstreamPort, Parent::Port(0)),
        function("sw0.0", NodeKind::DownstreamPort, Parent::Port(2)),
        function("sw0.1", NodeKind::DownstreamPort, Parent::Port(2)),
        device("nic0", Parent::Port(3)),
        device("nic1", Parent::Port(4)),
        device("nic2", Parent::Port(1)),
    ])
}

#[test]
fn buses_are_numbered_depth_first() {
    let tree = placed(&switched());
    let names = ["rp0", "sw0", "sw0.0", "nic0", "sw0.1", "nic1", "rp1", "nic2"];
    let addresses = names.map(|name| address(&tree, name));
    assert_eq!(
        addresses,
        [
            "00:01.0", "01:00.0", "02:00.0", "03:00.0", "02:01.0", "04:00.0", "00:02.0", "05:00.0"
        ]
    );
    let rp0 = find(&tree, "rp0").bridge.as_ref().expect("a port");
    assert_eq!((rp0.secondary, rp0.subordinate), (1, 4));
}

#[test]
fn ports_with_slots_are_numbered_from_one_and_upstream_ports_have_none() {
    let tree = placed(&switched());
    let slot = |name| find(&tree, name).bridge.as_ref().expect("a port").slot;
    assert_eq!(
        ["rp0", "sw0", "sw0.0", "sw0.1", "rp1"].map(slot),
        [Some(1), None, Some(2), Some(3), Some(4)]
    );
}

#[test]
fn a_line_reaches_the_input_that_the_bridges_lead_it_to() {
    let tree = placed(&switched());
    // nic1 INTA, device 1 of the switch: INTB at sw0, INTB at rp0 which is device 1: 16 + 1 + 1.
    let intx = find(&tree, "nic1").intx.expect("it has a pin");
    assert_eq!((intx.pin, intx.gsi), (crate::pci::tree::Pin::A, 18));
    assert_eq!(find(&tree, "nic0").intx.expect("it has a pin").gsi, 17);
}

#[test]
fn functions_of_one_device_use_different_pins_and_announce_each_other() {
    let tree = placed(&one_root(vec![
        at(device("a", Parent::Root(0)), 3, 0),
        at(device("b", Parent::Root(0)), 3, 1),
        device("c", Parent::Root(0)),
    ]));
    let pins = ["a", "b"].map(|name| find(&tree, name).intx.expect("it has a pin").pin as u8);
    assert_eq!(pins, [1, 2]);
    assert!(find(&tree, "a").multi_function);
    assert!(!find(&tree, "c").multi_function);
}

#[test]
fn whoever_asks_for_no_slot_gets_one_that_nobody_asked_for() {
    let tree = placed(&one_root(vec![
        device("late", Parent::Root(0)),
        at(device("first", Parent::Root(0)), 1, 0),
        device("later", Parent::Root(0)),
    ]));
    let addresses = ["first", "late", "later"].map(|name| address(&tree, name));
    assert_eq!(addresses, ["00:01.0", "00:02.0", "00:03.0"]);
}

#[test]
fn device_zero_of_a_root_bus_is_given_only_to_those_who_ask() {
    let tree = placed(&one_root(vec![at(device("asked", Parent::Root(0)), 0, 0)]));
    assert_eq!(address(&tree, "asked"), "00:00.0");
}

#[test]
fn two_functions_in_one_slot_are_refused_with_what_is_free() {
    let error = refused(&one_root(vec![
        at(device("nic0", Parent::Root(0)), 4, 0),
        at(device("nic1", Parent::Root(0)), 4, 0),
    ]));
    assert_eq!(
        error.to_string(),
        "nic1 cannot be at slot 4.0 of rc0: nic0 is there; free are 4.1 and 1.0"
    );
    assert_eq!(error.culprit(), Some("nic1"));
}

#[test]
fn a_device_without_function_zero_is_refused() {
    let error = refused(&one_root(vec![at(device("nic0", Parent::Root(0)), 4, 2)]));
    assert!(error.to_string().contains("put something at slot 4.0"), "{error}");
}

#[test]
fn a_second_device_on_a_link_is_refused() {
    let port = function("rp0", NodeKind::RootPort, Parent::Root(0));
    let named = one_root(vec![port.clone(), at(device("nic0", Parent::Port(0)), 1, 0)]);
    assert!(matches!(refused(&named), AssignError::NotDeviceZero { .. }));
    let nic = |name| device(name, Parent::Port(0));
    let unnamed = refused(&one_root(vec![port, nic("nic0"), nic("nic1")]));
    assert_eq!(
        unnamed.to_string(),
        "nic1 finds no free slot on rp0, which has one device; its functions need slot=0.0, slot=0.1 and so on"
    );
}

#[test]
fn the_thirty_second_device_on_a_root_bus_is_refused() {
    let devices = |count: usize| {
        let names = (0..count).map(|at| device(&format!("d{at}"), Parent::Root(0)));
        one_root(names.collect())
    };
    assert_eq!(address(&placed(&devices(31)), "d30"), "00:1f.0");
    assert!(matches!(refused(&devices(32)), AssignError::BusFull { name, .. } if name == "d31"));
}

#[test]
fn each_kind_of_function_has_its_place() {
    let rp = || function("rp0", NodeKind::RootPort, Parent::Root(0));
    let up = || function("sw0", NodeKind::UpstreamPort, Parent::Port(0));
    let wrong = [
        vec![rp(), function("x", NodeKind::RootPort, Parent::Port(0))],
        vec![rp(), function("x", NodeKind::HostBridge, Parent::Port(0))],
        vec![rp(), function("x", NodeKind::IsaBridge, Parent::Port(0))],
        vec![rp(), function("x", NodeKind::Iommu(0), Parent::Port(0))],
        vec![function("x", NodeKind::UpstreamPort, Parent::Root(0))],
        vec![rp(), up(), function("x", NodeKind::UpstreamPort, Parent::Port(1))],
        vec![rp(), function("x", NodeKind::DownstreamPort, Parent::Port(0))],
        vec![rp(), up(), device("x", Parent::Port(1))],
        vec![device("a", Parent::Root(0)), device("x", Parent::Port(0))],
    ];
    for functions in wrong {
        let error = refused(&one_root(functions));
        assert!(
            matches!(&error, AssignError::WrongParent { name, .. } if name == "x"),
            "{error:?}"
        );
    }
}

#[test]
fn a_switch_behind_itself_is_refused_with_the_circle() {
    let error = refused(&one_root(vec![
        function("sw0", NodeKind::UpstreamPort, Parent::Port(1)),
        function("sw0.0", NodeKind::DownstreamPort, Parent::Port(0)),
        device("nic0", Parent::Port(1)),
    ]));
    let text = error.to_string();
    assert!(text.ends_with("sw0.0, behind sw0, behind sw0.0"), "{text}");
}

#[test]
fn a_share_is_trimmed_to_what_is_needed_and_three_to_spare() {
    let ports = |count: usize| {
        let port = |n| function(&format!("rp{n}"), NodeKind::RootPort, Parent::Root(0));
        let tree = placed(&one_root((0..count).map(port).collect()));
        let range = tree.roots().next().map(|root| root.buses.clone());
        range.expect("one root complex")
    };
    assert_eq!(
        [ports(0), ports(4), ports(5), ports(13)],
        [0..=7, 0..=7, 0..=15, 0..=23]
    );
}

#[test]
fn root_complexes_share_a_segment_evenly_when_nobody_asks() {
    let spec = TreeSpec {
        roots: ["a", "b", "c"].map(root).to_vec(),
        functions: Vec::new(),
    };
    let tree = placed(&spec);
    let ranges: Vec<_> = tree.roots().map(|root| root.buses.clone()).collect();
    // A quarter of 256 each; of it only what is needed is kept, and some to spare.
    assert_eq!(ranges, [0..=7, 64..=71, 128..=135]);
    let uids: Vec<_> = tree.roots().map(|root| root.uid).collect();
    assert_eq!(uids, [0, 1, 2]);
}

#[test]
fn segments_and_root_complexes_come_in_order_of_number() {
    let with = |name, segment, buses| RootSpec {
        segment,
        buses,
        ..root(name)
    };
    let spec = TreeSpec {
        roots: vec![
            with("far", 7, None),
            with("high", 0, Some(0x80..=0xff)),
            with("low", 0, Some(0..=0x7f)),
        ],
        functions: Vec::new(),
    };
    let tree = placed(&spec);
    let names: Vec<_> = tree.roots().map(|root| root.name.as_str()).collect();
    assert_eq!(names, ["low", "high", "far"]);
    let numbers: Vec<_> = tree.segments.iter().map(|segment| segment.number).collect();
    assert_eq!(numbers, [0, 7]);
    assert_ne!(tree.segments[0].ecam, tree.segments[1].ecam);
}

#[test]
fn bus_ranges_that_overlap_or_are_missing_are_refused_with_what_is_free() {
    let with = |name, buses| RootSpec { buses, ..root(name) };
    let spec = |roots: Vec<RootSpec>| TreeSpec {
        roots,
        functions: Vec::new(),
    };
    let overlap = refused(&spec(vec![
        with("a", Some(0..=0x3f)),
        with("b", Some(0x30..=0x4f)),
    ]));
    assert_eq!(
        overlap.to_string(),
        "b cannot have buses 0x30-0x4f: a in the same segment has 0x00-0x3f; free are 0x40-0xff"
    );
    let missing = refused(&spec(vec![with("a", Some(0..=0x3f)), with("b", None)]));
    assert!(missing.to_string().ends_with("free are 0x40-0xff"), "{missing}");
    let nowhere = refused(&spec(vec![with("a", Some(1..=0x3f))]));
    assert_eq!(nowhere, AssignError::NoFirstRoot);
}

#[test]
fn more_root_complexes_than_buses_are_refused() {
    let spec = TreeSpec {
        roots: (0..257).map(|at| root(&format!("rc{at}"))).collect(),
        functions: Vec::new(),
    };
    assert!(matches!(
        refused(&spec),
        AssignError::TooManyRoots { roots: 257, .. }
    ));
}

#[test]
fn a_hierarchy_with_more_ports_than_buses_is_refused_with_the_number_needed() {
    let mut spec = switched();
    spec.roots[0].buses = Some(0..=4);
    let error = refused(&spec);
    assert_eq!(
        error.to_string(),
        "rc0 needs 6 bus numbers (one, and one per port), but its range 0x00-0x04 has 5"
    );
    spec.roots[0].buses = Some(0..=5);
    assert_eq!(address(&placed(&spec), "nic2"), "05:00.0");
}

#[test]
fn ports_nest_until_the_last_bus() {
    let mut functions = vec![function("rp", NodeKind::RootPort, Parent::Root(0))];
    for level in 0..127 {
        let up = functions.len();
        functions.push(function(
            &format!("u{level}"),
            NodeKind::UpstreamPort,
            Parent::Port(up - 1),
        ));
        functions.push(function(
            &format!("d{level}"),
            NodeKind::DownstreamPort,
            Parent::Port(up),
        ));
    }
    let last = functions.len() - 1;
    functions.push(device("end", Parent::Port(last)));
    assert_eq!(address(&placed(&one_root(functions.clone())), "end"), "ff:00.0");
    functions.push(function("one-more", NodeKind::RootPort, Parent::Root(0)));
    assert!(matches!(
        refused(&one_root(functions)),
        AssignError::BusesExhausted { needed: 257, .. }
    ));
}

#[test]
fn each_bar_goes_where_its_kind_can_go() {
    let bars = |parent| FunctionSpec {
        bars: vec![
            bar(0, BarKind::Mem32 { prefetchable: false }, 0x1000),
            bar(1, BarKind::Io, 0x20),
            bar(2, BarKind::Mem64 { prefetchable: false }, 0x10_0000),
            bar(4, PREFETCHABLE, 1 << 30),
        ],
        ..function("x", NodeKind::Endpoint(0), parent)
    };
    let behind = placed(&one_root(vec![
        function("rp0", NodeKind::RootPort, Parent::Root(0)),
        bars(Parent::Port(0)),
    ]));
    let below_four_gib = |tree: &PciTree| -> Vec<bool> {
        let bars = find(tree, "x").bars.iter();
        bars.map(|bar| bar.address < 1 << 32).collect()
    };
    assert_eq!(below_four_gib(&behind), [true, true, true, false]);
    let integrated = placed(&one_root(vec![bars(Parent::Root(0))]));
    assert_eq!(below_four_gib(&integrated), [true, true, false, false]);
}

#[test]
fn windows_are_closed_where_nothing_needs_them() {
    let tree = placed(&one_root(vec![
        function("rp0", NodeKind::RootPort, Parent::Root(0)),
        function("rp1", NodeKind::RootPort, Parent::Root(0)),
        device("nic0", Parent::Port(1)),
    ]));
    let windows = |name| find(&tree, name).bridge.as_ref().expect("a port").windows;
    assert_eq!(windows("rp0"), Windows::default());
    assert_eq!(windows("rp1").mem64.map(GpaRange::len), Some(1 << 20));
    assert_eq!((windows("rp1").io, windows("rp1").mem32), (None, None));
}

#[test]
fn what_may_leave_has_a_memory_window_above_it_whatever_it_decodes() {
    let removable = |parent| FunctionSpec {
        removable: true,
        ..device("nic0", parent)
    };
    let tree = placed(&one_root(vec![
        function("rp0", NodeKind::RootPort, Parent::Root(0)),
        function("up", NodeKind::UpstreamPort, Parent::Port(0)),
        function("down", NodeKind::DownstreamPort, Parent::Port(1)),
        removable(Parent::Port(2)),
    ]));
    for port in ["rp0", "up", "down"] {
        let windows = find(&tree, port).bridge.as_ref().expect("a port").windows;
        assert_eq!(windows.mem32.map(GpaRange::len), Some(1 << 20), "{port}");
        assert_eq!(windows.io, None, "{port}");
    }
    // A root bus has no slots.
    let on_root = |removable_too| {
        let nic = device("nic0", Parent::Root(0));
        placed(&one_root(vec![if removable_too {
            removable(Parent::Root(0))
        } else {
            nic
        }]))
    };
    assert_eq!(on_root(true), on_root(false));
}

#[test]
fn two_functions_never_share_a_page() {
    let small = |name| FunctionSpec {
        bars: vec![bar(0, BarKind::Mem32 { prefetchable: false }, 0x10)],
        ..function(name, NodeKind::Endpoint(0), Parent::Root(0))
    };
    let tree = placed(&one_root(vec![small("a"), small("b")]));
    let address = |name| find(&tree, name).bars[0].address;
    assert_eq!(address("b") - address("a"), 0x1000);
}

#[test]
fn windows_that_do_not_fit_are_refused_with_how_much_is_missing() {
    let big = FunctionSpec {
        bars: vec![bar(0, BarKind::Mem32 { prefetchable: false }, 1 << 30)],
        ..function("gpu0", NodeKind::Endpoint(0), Parent::Root(0))
    };
    let error = refused(&one_root(vec![big]));
    assert!(
        matches!(&error, AssignError::WindowsDoNotFit { space: Space::Mem32, available: 0x2ec0_0000, name, largest: 0x4000_0000, .. } if name == "gpu0"),
        "{error:?}"
    );
}

#[test]
fn sizes_that_would_wrap_are_refused_like_any_that_do_not_fit() {
    let huge = |name| FunctionSpec {
        bars: vec![bar(0, PREFETCHABLE, 1 << 63), bar(2, PREFETCHABLE, 1 << 63)],
        ..function(name, NodeKind::Endpoint(0), Parent::Root(0))
    };
    let error = refused(&one_root(vec![huge("a"), huge("b")]));
    assert!(matches!(error, AssignError::WindowsDoNotFit { .. }), "{error:?}");
}

#[test]
fn bars_that_cannot_be_are_refused() {
    let memory = BarKind::Mem32 { prefetchable: false };
    let wrong = [
        vec![bar(0, memory, 0x1800)],
        vec![bar(0, memory, 8)],
        vec![bar(0, memory, 1 << 32)],
        vec![bar(6, memory, 0x1000)],
        vec![bar(5, PREFETCHABLE, 0x1000)],
        vec![bar(0, PREFETCHABLE, 0x1000), bar(1, memory, 0x1000)],
        vec![bar(0, BarKind::Io, 2)],
        vec![bar(0, BarKind::Io, 512)],
    ];
    for bars in wrong {
        let x = FunctionSpec {
            bars,
            ..function("x", NodeKind::Endpoint(0), Parent::Root(0))
        };
        let error = refused(&one_root(vec![x]));
        assert!(matches!(error, AssignError::BadBar { .. }), "{error:?}");
    }
}

#[test]
fn slot_numbers_that_thirteen_bits_do_not_hold_are_refused() {
    // 32 root complexes of 256 buses, with 255 ports each on devices of eight functions.
    let roots: Vec<RootSpec> = (0..33)
        .map(|segment| RootSpec {
            segment,
            ..root(&format!("rc{segment}"))
        })
        .collect();
    let port = |root: usize, n: usize| {
        let device = u8::try_from(n / 8).expect("small");
        let number = u8::try_from(n % 8).expect("small");
        at(
            function(&format!("rp{root}-{n}"), NodeKind::RootPort, Parent::Root(root)),
            device,
            number,
        )
    };
    let functions = (0..33)
        .flat_map(|root| (0..255).map(move |n| port(root, n)))
        .collect();
    let spec = TreeSpec { roots, functions };
    let error = assign(&spec, &pools(33)).expect_err("8,415 slots");
    assert!(
        matches!(error, AssignError::TooManySlots { slot: 8192, .. }),
        "{error:?}"
    );
}

fn kind() -> impl Strategy<Value = BarKind> {
    prop_oneof![
        any::<bool>().prop_map(|prefetchable| BarKind::Mem32 { prefetchable }),
        any::<bool>().prop_map(|prefetchable| BarKind::Mem64 { prefetchable }),
    ]
}

/// Any hierarchy that respects who may be behind whom: each new function picks a parent among those before.
fn any_spec() -> impl Strategy<Value = TreeSpec> {
    let pick = (
        0_u8..3,
        any::<prop::sample::Index>(),
        kind(),
        4_u32..24,
        any::<bool>(),
    );
    (1_usize..4, prop::collection::vec(pick, 0..60)).prop_map(|(roots, picks)| {
        let mut spec = TreeSpec {
            roots: (0..roots).map(|at| root(&format!("rc{at}"))).collect(),
            functions: Vec::new(),
        };
        for (choice, parent, kind, bits, removable) in picks {
            let name = format!("f{}", spec.functions.len());
            let ports = |wanted: fn(NodeKind) -> bool, spec: &TreeSpec| -> Vec<Parent> {
                let functions = spec.functions.iter().enumerate();
                functions
                    .filter(|(_, f)| wanted(f.kind))
                    .map(|(at, _)| Parent::Port(at))
                    .collect()
            };
            let slotted = |kind| matches!(kind, NodeKind::RootPort | NodeKind::DownstreamPort);
            let roots: Vec<Parent> = (0..roots).map(Parent::Root).collect();
            let (kind_of, parents) = match choice {
                0 => (NodeKind::RootPort, roots),
                1 => {
                    let ups = ports(|kind| kind == NodeKind::UpstreamPort, &spec);
                    if ups.is_empty() || parent.index(2) == 0 {
                        (NodeKind::UpstreamPort, ports(slotted, &spec))
                    } else {
                        (NodeKind::DownstreamPort, ups)
                    }
                }
                _ => (NodeKind::Endpoint(0), [roots, ports(slotted, &spec)].concat()),
            };
            if parents.is_empty() {
                continue;
            }
            spec.functions.push(FunctionSpec {
                bars: vec![bar(0, kind, 1 << bits)],
                removable,
                ..function(&name, kind_of, parents[parent.index(parents.len())])
            });
        }
        spec
    })
}

fn inside(outer: &Windows, inner: &Windows) -> bool {
    let memory = |outer: Option<GpaRange>, inner: Option<GpaRange>| {
        inner.is_none_or(|inner| outer.is_some_and(|outer| outer.contains_range(inner)))
    };
    memory(outer.mem32, inner.mem32) && memory(outer.mem64, inner.mem64)
}

/// What a BAR covers, in trees without ports.
fn memory(bar: &Bar) -> GpaRange {
    assert_ne!(bar.kind, BarKind::Io);
    GpaRange::new(Gpa(bar.address), bar.size).expect("it does not wrap")
}

fn check_bus(nodes: &[Node], windows: &Windows, buses: &RangeInclusive<u8>) -> Result<(), TestCaseError> {
    for node in nodes {
        for bar in &node.bars {
            let memory = memory(bar);
            let held = [windows.mem32, windows.mem64];
            prop_assert!(
                held.into_iter()
                    .flatten()
                    .any(|window| window.contains_range(memory))
            );
            prop_assert_eq!(bar.address % bar.size, 0);
        }
        if let Some(bridge) = &node.bridge {
            prop_assert!(inside(windows, &bridge.windows));
            prop_assert!(buses.contains(&bridge.secondary) && buses.contains(&bridge.subordinate));
            prop_assert!(bridge.secondary <= bridge.subordinate && bridge.secondary > node.bdf.bus());
            check_bus(
                &bridge.children,
                &bridge.windows,
                &(bridge.secondary..=bridge.subordinate),
            )?;
        }
    }
    let mut claimed: Vec<GpaRange> = nodes.iter().flat_map(|n| n.bars.iter().map(memory)).collect();
    let bridges = nodes.iter().filter_map(|node| node.bridge.as_ref());
    claimed.extend(
        bridges
            .clone()
            .flat_map(|b| [b.windows.mem32, b.windows.mem64].into_iter().flatten()),
    );
    claimed.sort();
    prop_assert!(claimed.windows(2).all(|pair| !pair[0].overlaps(pair[1])));
    let mut behind: Vec<_> = bridges.map(|b| (b.secondary, b.subordinate)).collect();
    behind.sort_unstable();
    prop_assert!(behind.windows(2).all(|pair| pair[0].1 < pair[1].0));
    Ok(())
}

proptest! {
    #[test]
    fn children_lie_inside_their_parents_and_siblings_apart(spec in any_spec()) {
        let Ok(tree) = assign(&spec, &pools(1)) else {
            return Ok(());
        };
        prop_assert_eq!(tree.nodes().count(), spec.functions.len());
        for root in tree.roots() {
            check_bus(&root.functions, &root.windows, &root.buses)?;
        }
    }

    #[test]
    fn the_same_specification_gives_the_same_tree(spec in any_spec()) {
        prop_assert_eq!(assign(&spec, &pools(1)), assign(&spec, &pools(1)));
    }
}
