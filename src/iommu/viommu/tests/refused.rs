//! A host that refuses.

use std::sync::Arc;

use super::super::asking::MOST_LEFTOVERS;
use super::super::host::{InterruptTarget, QueueKind, UnitInterrupt};
use super::super::testing::{DEVICE_TABLE, FakeHost, LOG, RING, Reached, Rig, dte};
use crate::iommu::amd::features::Wanted;
use crate::pci::topology::Observer;
use crate::platform::addr::{Bdf, Gpa, Sbdf};

/// What a guest does in its life, step by step.
const LIFE: [fn(&Rig); 16] = [
    Rig::start,
    |rig| rig.entry(0, dte(0x5000, 7)),
    |rig| rig.entry(1, dte(0x5000, 7)),
    |rig| rig.entry(0, dte(0x6000, 8)),
    |rig| rig.entry(1, [1, 0, 0, 0]),
    |rig| rig.entry(1, [3 << 61 | 3, 0, 0, 0]),
    |rig| rig.entry(2, [3 << 61 | 3 | 1 << 9, 0, 0, 0]),
    |rig| rig.entry(2, dte(0x7000, 9)),
    |rig| rig.control(4, true),
    |rig| rig.write(0x170, 8, 0x55 << 32),
    |rig| {
        let [first, last] = [0, 2].map(|index| rig.requesters[index].sbdf());
        rig.requesters[0].renumber(last);
        rig.requesters[2].renumber(first);
        rig.unit.renumbered();
    },
    |rig| rig.write(0x00, 8, (DEVICE_TABLE + 0x1000) | 0x3f),
    |rig| rig.control(0, false),
    |rig| rig.unit.reset(),
    Rig::start,
    |rig| rig.entry(0, dte(0x8000, 1)),
];

/// A register write that says nothing new.
fn touch(rig: &Rig) {
    rig.write(0x18, 8, rig.read(0x18));
}

#[test]
fn any_one_request_may_be_refused_and_nothing_is_lost() {
    let mut at = 1;
    loop {
        let host = FakeHost::new();
        host.refuse_at(Some(at));
        let Ok(rig) = Rig::try_over(host.clone(), &Wanted::EVERYTHING) else {
            host.check();
            assert_eq!(host.left(), 0, "request {at}");
            at += 1;
            continue;
        };
        for step in LIFE {
            step(&rig);
            rig.check_refused();
        }
        touch(&rig);
        rig.check();
        let Rig { unit, .. } = rig;
        assert_eq!(Arc::strong_count(&unit), 1);
        drop(unit);
        host.check();
        assert_eq!(host.left(), 0, "request {at}");
        assert!(
            (0..3).all(|index| host.place(index) == Reached::Nothing),
            "request {at}"
        );
        if host.asked() < at {
            break;
        }
        at += 1;
    }
    assert!(at > 60, "{at} requests are no life");
}

#[test]
fn a_host_that_refuses_a_kind_of_request_leaves_less_and_never_more() {
    for name in [
        "vdevice", "nested", "attach", "pass", "block", "queue", "route", "event", "destroy", "reset",
    ] {
        let host = FakeHost::new();
        let rig = Rig::over(host.clone(), &Wanted::EVERYTHING);
        host.refuse(Some(name));
        for step in LIFE {
            step(&rig);
            rig.check_refused();
        }
        assert!(rig.unit.counts().refusals > 0, "{name}");
        host.refuse(None);
        touch(&rig);
        rig.check();
        drop(rig.unit);
        host.check();
        assert_eq!(host.left(), 0, "{name}");
    }
}

#[test]
fn a_function_whose_tables_are_refused_is_blocked_until_they_are_not() {
    for name in ["nested", "attach"] {
        let rig = Rig::running();
        rig.entry(0, dte(0x5000, 7));
        rig.entry(1, [0; 4]);
        rig.host.refuse(Some(name));
        rig.entry(0, dte(0x6000, 7));
        rig.entry(1, dte(0x6000, 7));
        // Neither in its old tables nor passing.
        assert_eq!(rig.host.place(0), Reached::Nothing);
        assert_eq!(rig.host.place(1), Reached::Nothing);
        assert_eq!(rig.host.tables(), 0, "what was made for nothing is gone");
        rig.host.refuse(None);
        rig.half(0, 0, dte(0x6000, 7));
        assert!(matches!(rig.host.place(0), Reached::Tables(_)));
        touch(&rig);
        rig.check();
    }
}

#[test]
fn a_ring_that_was_to_go_in_vain_goes_before_it_is_wanted_again() {
    let rig = Rig::running();
    rig.host.refuse(Some("destroy"));
    rig.control(12, false);
    rig.host.refuse(None);
    rig.host.granted();
    rig.control(12, true);
    let granted = rig.host.granted();
    assert_eq!(granted.len(), 2, "{granted:?}");
    assert_eq!(granted[0], "destroy queue");
    assert!(rig.host.queue(QueueKind::Command).is_some());
    rig.check();
}

#[test]
fn an_interrupt_that_cannot_go_where_it_is_wanted_goes_nowhere_and_not_where_it_went() {
    let rig = Rig::running();
    let register = |vector: u64, to: u64| vector << 32 | to << 8;
    rig.write(0x170, 8, register(0x31, 2));
    let target = |vector, destination| {
        Some(InterruptTarget {
            destination,
            logical: false,
            vector,
        })
    };
    assert_eq!(rig.host.target(UnitInterrupt::Event), target(0x31, 2));
    rig.host.refuse_soon(0);
    rig.write(0x170, 8, register(0x41, 9));
    assert_eq!(rig.host.target(UnitInterrupt::Event), None);
    touch(&rig);
    assert_eq!(rig.host.target(UnitInterrupt::Event), target(0x41, 9));
    // A host that does not even do that leaves it, and is asked again.
    rig.host.refuse(Some("route"));
    rig.write(0x170, 8, register(0x51, 2));
    assert_eq!(rig.host.target(UnitInterrupt::Event), target(0x41, 9));
    rig.host.refuse(None);
    touch(&rig);
    assert_eq!(rig.host.target(UnitInterrupt::Event), target(0x51, 2));
    rig.check();
}

#[test]
fn a_host_that_destroys_nothing_is_not_asked_for_more_and_more() {
    let rig = Rig::running();
    rig.host.refuse(Some("destroy"));
    let roots = (1..=7).map(|at| at * 0x1000);
    for root in roots.cycle().take(500) {
        rig.entry(0, dte(root, 7));
        rig.check_refused();
    }
    // One more than are left over was in use before them.
    assert_eq!(rig.host.tables(), MOST_LEFTOVERS + 1);
    assert_eq!(rig.host.place(0), Reached::Nothing);
    rig.host.refuse(None);
    rig.entry(0, dte(0x9000, 7));
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    touch(&rig);
    assert_eq!(rig.host.tables(), 1);
    rig.check();
}

/// DEV_TAB_HARDWARE_ERROR, target abort, of the entry of the function `id`.
fn hardware_error(id: u16) -> [u32; 4] {
    let at = u32::try_from(DEVICE_TABLE).expect("low") + 32 * u32::from(id);
    [id.into(), 3 << 28 | 2 << 25, at, 0]
}

#[test]
fn a_guest_hears_once_of_tables_that_its_host_refuses() {
    let rig = Rig::running();
    rig.host.refuse(Some("nested"));
    rig.entry(0, dte(0x5000, 7));
    let first = hardware_error(rig.id(0));
    assert_eq!(rig.host.events(), [first]);
    // As often as it is asked.
    for _ in 0..100 {
        touch(&rig);
        rig.half(0, 0, dte(0x5000, 7));
    }
    assert_eq!(rig.host.events(), [first]);
    assert!(
        rig.unit
            .state()
            .contains("01:00.0 is blocked: the host refuses what it asks for")
    );
    rig.host.refuse(None);
    touch(&rig);
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    // It works meanwhile, so that the next is news.
    rig.host.refuse(Some("attach"));
    rig.half(0, 0, dte(0x6000, 7));
    assert_eq!(rig.host.events(), [first, first]);
    rig.host.refuse(Some("pass"));
    rig.entry(1, [0; 4]);
    assert_eq!(rig.host.events()[2..], [hardware_error(rig.id(1))]);
    // What the guest wants blocked is blocked, whatever the host says.
    rig.host.refuse(None);
    rig.entry(0, [1, 0, 0, 0]);
    assert_eq!(rig.host.events().len(), 3);
    touch(&rig);
    rig.check();
}

#[test]
fn a_function_without_a_name_is_reported_as_any_other() {
    let rig = Rig::at_reset();
    rig.host.refuse(Some("vdevice"));
    rig.start();
    assert!(rig.host.events().is_empty(), "blocked functions need none");
    rig.entry(2, dte(0x5000, 7));
    assert_eq!(rig.host.events(), [hardware_error(rig.id(2))]);
    rig.host.refuse(None);
    touch(&rig);
    assert!(matches!(rig.host.place(2), Reached::Tables(_)));
    rig.check();
}

#[test]
fn an_event_that_the_host_refuses_to_put_in_is_not_tried_again() {
    let rig = Rig::running();
    rig.host.refuse(Some("event"));
    rig.entry(0, [3 << 61 | 3 | 4 << 9 | 0x5000, 7, 0, 0]);
    rig.host.refuse(None);
    let asked = rig.host.asked();
    touch(&rig);
    assert_eq!((rig.host.asked(), rig.host.events().len()), (asked, 0));
    assert_eq!(rig.unit.counts().refusals, 1);
    rig.check();
}

#[test]
fn a_function_that_cannot_even_be_blocked_is_told_of() {
    let rig = Rig::running();
    let entry = dte(0x5000, 7);
    rig.entry(0, entry);
    rig.host.refuse(Some("block"));
    rig.entry(0, [1, 0, 0, 0]);
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    let told = "has guest tables at 0x5000 in domain 7, NOT as its guest wants";
    assert!(rig.unit.state().contains(told), "{}", rig.unit.state());
    // What it wants is what it has again.
    rig.entry(0, entry);
    assert!(!rig.unit.state().contains("NOT"), "{}", rig.unit.state());
    rig.entry(0, [1, 0, 0, 0]);
    rig.host.refuse(None);
    touch(&rig);
    assert_eq!(rig.host.place(0), Reached::Nothing);
    rig.check();
}

#[test]
fn a_ring_that_is_refused_stays_off_and_the_rest_goes_on() {
    let rig = Rig::at_reset();
    rig.host.refuse(Some("queue"));
    rig.start();
    assert_eq!(rig.host.queue(QueueKind::Command), None);
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    rig.host.refuse(None);
    // The driver tries again elsewhere.
    rig.control(2, false);
    rig.write(0x10, 8, (LOG + 0x8000) | 8 << 56);
    rig.control(2, true);
    assert_eq!(
        rig.host.queue(QueueKind::Event).expect("on").base,
        Gpa(LOG + 0x8000)
    );
    assert_eq!(rig.host.queue(QueueKind::Command).expect("on").base, Gpa(RING));
    rig.check();
}

#[test]
fn a_function_has_no_tables_under_a_name_that_is_no_longer_its_own() {
    let rig = Rig::running();
    let bdf = Bdf::new(2, 1, 0).expect("valid");
    rig.word(bdf.requester_id(), 0, 0);
    rig.requesters[1].renumber(Sbdf { segment: 0, bdf });
    rig.host.refuse(Some("destroy"));
    rig.unit.renumbered();
    rig.entry(1, dte(0x5000, 7));
    assert_eq!(rig.host.place(1), Reached::Nothing);
    assert_eq!(rig.host.name(1), Bdf::new(1, 1, 0));
    rig.check_refused();
    rig.host.refuse(None);
    touch(&rig);
    assert_eq!(rig.host.name(1), Some(bdf));
    rig.check();
}

#[test]
fn tables_that_the_host_keeps_go_later() {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.host.refuse(Some("destroy"));
    rig.entry(0, dte(0x6000, 7));
    rig.check();
    assert_eq!(rig.host.tables(), 2);
    rig.host.refuse(None);
    touch(&rig);
    assert_eq!(rig.host.tables(), 1);
    rig.check();
}

#[test]
fn a_queue_that_the_host_keeps_is_asked_for_again() {
    let rig = Rig::running();
    rig.host.refuse(Some("destroy"));
    rig.control(12, false);
    assert!(rig.host.queue(QueueKind::Command).is_some());
    rig.host.refuse(None);
    touch(&rig);
    assert_eq!(rig.host.queue(QueueKind::Command), None);
    rig.check();
}

#[test]
fn a_table_that_cannot_be_watched_blocks_its_functions() {
    let rig = Rig::at_reset();
    for index in 0..3 {
        rig.entry(index, dte(0x5000, 7));
    }
    rig.protection.refuse(true);
    rig.start();
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    assert!(rig.unit.state().contains("CANNOT be watched"));
    // Off is off.
    rig.control(0, false);
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Memory));
    rig.control(0, true);
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    rig.protection.refuse(false);
    touch(&rig);
    rig.check();
    assert!(!rig.unit.state().contains("CANNOT"));
    // Moved where it cannot be watched: what is watched stays so, and nobody reads what is not.
    rig.protection.refuse(true);
    rig.write(0x00, 8, 0x30_0000 | 0x3f);
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    rig.write(0x00, 8, DEVICE_TABLE | 0x3f);
    rig.check();
}

#[test]
fn a_unit_that_cannot_be_made_leaves_nothing() {
    let host = FakeHost::new();
    host.refuse(Some("pass"));
    let error = Rig::try_over(host.clone(), &Wanted::DEFAULT)
        .err()
        .expect("refused");
    assert_eq!(
        error.to_string(),
        "cannot attach 0000:01:00.0 behind iommu0 to guest memory"
    );
    assert_eq!(host.left(), 0);
    host.refuse(Some("viommu"));
    let error = Rig::try_over(host, &Wanted::DEFAULT).err().expect("refused");
    assert_eq!(error.to_string(), "cannot make the vIOMMU iommu0 of the host");
}
