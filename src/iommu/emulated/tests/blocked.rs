//! Messages of functions of the host that the unit blocks.

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;

/// Whether the event loop has reason to come.
fn wakes(rig: &Rig) -> bool {
    let watching = Epoll::new().expect("an epoll instance");
    let unit = EpollEvent::new(EventSet::IN, 0);
    watching
        .ctl(ControlOperation::Add, rig.unit.as_raw_fd(), unit)
        .expect("watched");
    let mut events = [EpollEvent::default()];
    watching.wait(0, &mut events).expect("asked") > 0
}

#[test]
fn a_message_that_is_signalled_while_the_unit_blocks_it_is_an_event_once_the_event_loop_comes() {
    let rig = Rig::running();
    rig.cover();
    let sink = RemappingSink::new(rig.unit.clone());
    let route = sink.route(&requester()).expect("made");
    rig.remap(5, None);
    route.set(Some(indexed(5))).expect("blocked");
    assert!(!wakes(&rig));
    let signal = || route.eventfd().write(1).expect("signalled");
    signal();
    assert!(wakes(&rig));
    rig.unit.run_commands();
    // IO_PAGE_FAULT, of an interrupt.
    assert_eq!((rig.events(), rig.load(0x2_0000) >> 51 & 1), (vec![2], 1));
    assert!(!wakes(&rig), "nothing is left");
    // Each time, however often it was signalled until it was heard.
    signal();
    signal();
    rig.unit.run_commands();
    assert_eq!((rig.events(), rig.processors.take()), (vec![2, 2], vec![]));
    // What passes the kernel carries, and what is masked is owed.
    rig.remap(5, Some((1, 0x31)));
    rig.invalidate_interrupts();
    signal();
    assert!(!wakes(&rig));
    rig.unit.run_commands();
    route.set(None).expect("masked");
    signal();
    assert!(!wakes(&rig));
    rig.unit.run_commands();
    assert_eq!((rig.events().len(), route.eventfd().read().ok()), (2, Some(2)));
}

#[test]
fn a_message_that_is_signalled_before_its_block_ends_is_sent_or_gone_with_that() {
    let rig = Rig::running();
    rig.cover();
    let sink = RemappingSink::new(rig.unit.clone());
    let route = sink.route(&requester()).expect("made");
    rig.remap(5, None);
    route.set(Some(indexed(5))).expect("blocked");
    route.eventfd().write(1).expect("signalled");
    // The entry is there, and not yet announced.
    rig.remap(5, Some((1, 0x31)));
    rig.unit.run_commands();
    assert_eq!(
        (rig.events(), rig.processors.take()),
        (vec![], vec![remapped(1, 0x31)])
    );
    route.eventfd().write(1).expect("signalled");
    rig.invalidate_interrupts();
    rig.unit.run_commands();
    assert_eq!((rig.events(), rig.processors.take()), (vec![], vec![]));
    assert!(route.eventfd().read().is_err());
}

#[test]
fn a_signalled_message_to_memory_is_written_where_it_is_mapped() {
    let rig = Rig::running();
    rig.cover();
    rig.map(1, 0x50_0000);
    let sink = RemappingSink::new(rig.unit.clone());
    let route = sink.route(&requester()).expect("made");
    let (address, data) = (0x1010, 0xabcd);
    route.set(Some(MsiMessage { address, data })).expect("no route");
    route.eventfd().write(1).expect("signalled");
    rig.unit.run_commands();
    assert_eq!((rig.load(0x50_0010), rig.events()), (0xabcd, vec![]));
}

#[test]
fn a_blocked_route_that_goes_is_heard_no_more() {
    let rig = Rig::running();
    rig.cover();
    let sink = RemappingSink::new(rig.unit.clone());
    let routes: Vec<_> = (0..40).map(|_| sink.route(&requester()).expect("made")).collect();
    rig.remap(5, None);
    for route in &routes {
        route.set(Some(indexed(5))).expect("blocked");
        route.eventfd().write(1).expect("signalled");
    }
    // Some in each turn, and nobody forgotten.
    let turns = (1..10).take_while(|_| {
        let more = wakes(&rig);
        rig.unit.run_commands();
        more
    });
    assert_eq!((turns.count(), rig.events().len()), (3, 40));
    routes[0].eventfd().write(1).expect("signalled");
    drop(routes);
    assert!(!wakes(&rig));
    rig.unit.run_commands();
    assert_eq!(rig.events().len(), 40);
}
