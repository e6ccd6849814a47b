//! What other functions of the host reach of a function's memory.

use super::super::hot_reset::HotResetSet;
use super::*;
use crate::iommu::iommufd::testing::Call;

const AT: u64 = 0xe000_0000;
const BAR0: u64 = 0x2_0000;

impl Bench {
    /// Where others reach memory of the function: start and length of each stretch.
    fn reached(&self) -> Vec<(u64, u64)> {
        let spaces = self.host.spaces();
        spaces.iter().flat_map(|space| self.host.mapped(*space)).collect()
    }

    fn moved(&self, bar: u8, at: u64) {
        self.function.bar_moved(bar, Some(Gpa(at)));
    }
}

#[test]
fn others_reach_what_the_guest_reaches_where_the_guest_has_it() {
    let bench = bench();
    assert_eq!((bench.device.exported(), bench.reached()), (3, Vec::new()));
    bench.moved(3, 0x10_0000);
    bench.moved(0, AT);
    let around_the_table = [(0x10_1000, 0x1000), (0x10_3000, 0x1000), (AT, BAR0)];
    assert_eq!(bench.reached(), around_the_table);
    assert_eq!(bench.space.mapped(), around_the_table);
    bench.moved(3, 0x30_0000);
    bench.function.bar_moved(0, None);
    assert_eq!(bench.reached(), [(0x30_1000, 0x1000), (0x30_3000, 0x1000)]);
    // Each stretch is exported once.
    assert_eq!(bench.device.exported(), 3);
}

#[test]
fn without_others_nothing_is_exported_or_asked_for() {
    let (messages, space, host) = (Messages::new(), GuestSpace::new(), Host::new());
    let (wires, device) = (Arc::new(Wires::default()), Device::nic());
    let parts = VfioParts {
        has_peers: false,
        ..parts(device.clone(), (&messages, &space, &host, &wires))
    };
    let function = VfioFunction::new(parts).unwrap_or_else(|error| panic!("{error}"));
    function.bar_moved(0, Some(Gpa(AT)));
    function.reset();
    assert_eq!(space.mapped(), [(AT, BAR0)]);
    assert_eq!((device.exported(), host.count(Call::MapFile)), (0, 0));
}

#[test]
fn a_function_whose_memory_is_not_exported_works_without() {
    for errno in [libc::ENOTTY, libc::EOPNOTSUPP, libc::ENODEV, libc::ENOMEM] {
        let device = Device::with(&nic_config());
        device.refuse(Asked::Export, errno);
        let bench = bench_with(device);
        bench.moved(0, AT);
        assert_eq!(
            (bench.space.mapped(), bench.reached()),
            (vec![(AT, BAR0)], vec![])
        );
        assert_eq!(bench.host.count(Call::MapFile), 0);
    }
}

#[test]
fn memory_that_the_host_does_not_map_for_others_is_tried_again_where_the_guest_moves_it() {
    let bench = bench();
    bench.host.set_windows(&[0..=AT - 1, AT + BAR0..=u64::MAX]);
    bench.moved(0, AT);
    assert_eq!(
        (bench.space.mapped(), bench.reached()),
        (vec![(AT, BAR0)], vec![])
    );
    bench.moved(0, AT + BAR0);
    assert_eq!(bench.reached(), [(AT + BAR0, BAR0)]);
    bench.host.refuse(Call::MapFile, libc::EOPNOTSUPP);
    bench.moved(0, AT - BAR0);
    assert_eq!(
        (bench.space.mapped(), bench.reached()),
        (vec![(AT - BAR0, BAR0)], vec![])
    );
}

#[test]
fn memory_that_the_host_does_not_unmap_stays_in_its_way_only() {
    let bench = bench();
    bench.moved(0, AT);
    bench.host.refuse(Call::Unmap, libc::EIO);
    bench.function.bar_moved(0, None);
    bench.host.relent();
    bench.moved(0, AT);
    assert_eq!(bench.host.count(Call::MapFile), 2);
    bench.moved(0, AT + BAR0);
    assert_eq!(bench.reached(), [(AT, BAR0), (AT + BAR0, BAR0)]);
    drop(bench.function);
    assert!(bench.host.spaces().is_empty());
}

/// A NIC that finds out before each of its resets how much of it others reach, in stretches.
fn watched(host: &Arc<Host>) -> (Device, Arc<Mutex<Vec<usize>>>) {
    let found = Arc::new(Mutex::new(Vec::new()));
    let (host, list) = (host.clone(), found.clone());
    let device = Device::with(&nic_config()).before_reset(move || {
        let reached = host.spaces().iter().map(|space| host.mapped(*space).len()).sum();
        list.lock().expect("a test's own").push(reached);
    });
    (device, found)
}

fn bench_on(host: &Arc<Host>, device: Device, reset_with: Option<HotResetMember>) -> Bench {
    let (messages, space) = (Messages::new(), GuestSpace::new());
    let (wires, device) = (Arc::new(Wires::default()), Arc::new(device));
    let parts = VfioParts {
        reset_with,
        ..parts(device.clone(), (&messages, &space, host, &wires))
    };
    Bench {
        function: VfioFunction::new(parts).unwrap_or_else(|error| panic!("{error}")),
        device,
        messages,
        space,
        host: host.clone(),
        wires,
    }
}

#[test]
fn nothing_is_reached_while_the_function_is_reset_and_the_same_as_before_afterwards() {
    let host = Host::new();
    let (device, found) = watched(&host);
    let bench = bench_on(&host, device, None);
    bench.moved(0, AT);
    bench.function.reset();
    assert_eq!(bench.reached(), [(AT, BAR0)]);
    // One that fails may have ended mappings all the same.
    bench.device.refuse(Asked::Reset, libc::EIO);
    bench.function.reset();
    assert_eq!(bench.reached(), [(AT, BAR0)]);
    assert_eq!(host.count(Call::MapFile), 3);
    bench.function.bar_moved(0, None);
    bench.function.reset();
    assert!(bench.reached().is_empty());
    assert_eq!(*found.lock().expect("a test's own"), [0, 0, 0]);
}

#[test]
fn nothing_is_reached_of_a_function_that_is_given_back() {
    let host = Host::new();
    let (device, found) = watched(&host);
    let bench = bench_on(&host, device, None);
    bench.moved(0, AT);
    bench.function.leave();
    bench.function.give_back();
    assert!(bench.reached().is_empty());
    assert_eq!(*found.lock().expect("a test's own"), [0]);
    // A BAR of it that moves once more is nobody's.
    bench.moved(0, AT);
    assert!(bench.reached().is_empty());
}

#[test]
fn a_function_that_another_reset_with_it_is_reached_again_once_it_is_used() {
    let host = Host::new();
    let mut members = HotResetSet::of(2).into_iter();
    let mut card = || {
        let device = Device::with(&nic_config()).without_reset();
        bench_on(&host, device, members.next())
    };
    let (first, second) = (card(), card());
    first.function.reset();
    first.moved(0, AT);
    let mapped = host.count(Call::MapFile);
    // What others had mapped of the first is dead now, which the host does not tell.
    second.function.reset();
    assert!(second.device.told().contains(&Told::HotReset));
    first.function.bus_mastering(true);
    assert_eq!(host.count(Call::MapFile), mapped + 1);
    assert_eq!(first.reached(), [(AT, BAR0)]);
    // Once is enough.
    first.function.bus_mastering(false);
    first.function.bus_mastering(true);
    assert_eq!(host.count(Call::MapFile), mapped + 1);
}
