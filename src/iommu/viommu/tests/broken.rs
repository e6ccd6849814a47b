//! A host whose unit errs while it serves the guest's.

use super::super::host::{HardwareErrors, QueueKind};
use super::super::testing::{DEVICE_TABLE, Reached, Rig, dte};
use crate::pci::topology::Observer;
use crate::platform::addr::Bdf;

/// What serves the guest does not answer there.
const BROKEN: HardwareErrors = HardwareErrors {
    lost_records: 0,
    broken_at: Some(0x10_0000_1234),
};

impl Rig {
    /// What the host's unit says, and the front end hears.
    fn hears(&self, errors: HardwareErrors) {
        self.host.err(errors);
        self.unit.hear_errors();
    }
}

/// One function in guest tables, one passing, one blocked.
fn busy() -> Rig {
    let rig = Rig::running();
    rig.entry(0, dte(0x5000, 7));
    rig.entry(1, [0; 4]);
    rig.host.granted();
    rig
}

#[test]
fn a_unit_that_the_hosts_cannot_serve_is_stopped_rings_first_and_functions_blocked() {
    let rig = busy();
    let registers = [0x00, 0x08, 0x10, 0x18, 0x38, 0x170].map(|at| rig.read(at));
    rig.hears(BROKEN);
    let (queue, name) = ("destroy queue", "destroy vdevice");
    assert_eq!(
        rig.host.granted(),
        [
            queue,
            queue,
            queue,
            "block 0",
            "destroy nested",
            "block 1",
            name,
            name,
            name
        ]
    );
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    assert_eq!(rig.unit.counts().stops, 1);
    let told = "STOPPED, as the host's unit cannot read 0x1000001234; rings on: none";
    assert!(rig.unit.state().contains(told), "{}", rig.unit.state());
    rig.check();
    // The guest finds its registers as they were; page 3 says by itself that no ring runs.
    assert_eq!(
        [0x00, 0x08, 0x10, 0x18, 0x38, 0x170].map(|at| rig.read(at)),
        registers
    );
    assert_ne!(rig.read(0x2020), u64::MAX);
}

#[test]
fn nothing_but_switching_it_off_moves_a_unit_that_is_stopped() {
    let rig = busy();
    rig.hears(BROKEN);
    rig.host.granted();
    // Entries, rings, the table, other bits of Control, and the same trouble again.
    rig.entry(0, dte(0x6000, 8));
    rig.entry(2, [3 << 61 | 3 | 1 << 9, 0, 0, 0]);
    rig.write(0x08, 8, 0x5_0000 | 8 << 56);
    for bit in [12, 2, 13, 16, 4] {
        rig.control(bit, false);
        rig.control(bit, true);
    }
    rig.write(0x00, 8, (DEVICE_TABLE + 0x1000) | 0x3f);
    rig.hears(BROKEN);
    rig.unit.renumbered();
    assert_eq!(rig.host.granted(), Vec::<String>::new());
    assert_eq!(rig.host.events(), Vec::<[u32; 4]>::new());
    assert_eq!(rig.unit.counts().stops, 1, "and told once");
    rig.check();
}

#[test]
fn a_unit_that_is_stopped_comes_back_when_it_is_switched_off_and_on() {
    let rig = busy();
    rig.hears(BROKEN);
    rig.control(0, false);
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Memory));
    assert_eq!(rig.host.resets(), 1, "heads and tails begin anew");
    rig.check();
    rig.control(0, true);
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    assert_eq!(rig.host.place(1), Reached::Memory);
    assert!(rig.host.queue(QueueKind::Command).is_some());
    assert_eq!(rig.host.name(2), Bdf::new(2, 0, 0));
    assert!(!rig.is_stopped());
    rig.check();
    // It is still broken: once more.
    rig.hears(BROKEN);
    assert_eq!(rig.unit.counts().stops, 2);
    rig.check();
    // A reset of the machine is as good.
    rig.unit.reset();
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Memory));
    rig.check();
    rig.start();
    rig.entry(0, dte(0x5000, 7));
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    rig.check();
}

#[test]
fn what_broke_before_the_guest_switched_off_stops_nothing_after() {
    let rig = busy();
    rig.host.err(BROKEN);
    rig.control(0, false);
    rig.control(0, true);
    assert!(!rig.is_stopped());
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    rig.check();
    // Whoever writes a register finds what nobody has heard yet.
    rig.host.err(BROKEN);
    rig.control(8, true);
    assert!(rig.is_stopped());
    rig.check();
    // While it is off there is nothing to stop.
    rig.control(0, false);
    rig.hears(BROKEN);
    assert!(!rig.is_stopped());
    rig.check();
}

#[test]
fn records_that_a_guest_loses_are_counted_and_stop_nothing() {
    let rig = busy();
    let lost = |lost_records| HardwareErrors {
        lost_records,
        broken_at: None,
    };
    rig.hears(lost(3));
    rig.host.err(lost(2));
    rig.hears(lost(1));
    assert_eq!(rig.unit.counts().lost_records, 6);
    assert!(!rig.is_stopped() && rig.host.granted().is_empty());
    // Nothing new is nothing to do.
    rig.protection.refuse(true);
    rig.unit.hear_errors();
    assert_eq!(rig.unit.counts().refusals, 0);
    rig.check();
}

#[test]
fn a_host_that_refuses_while_its_unit_is_stopped_is_asked_again() {
    for name in ["destroy", "block"] {
        let rig = busy();
        rig.host.refuse(Some(name));
        rig.hears(BROKEN);
        rig.check_refused();
        rig.host.refuse(None);
        // Any register that the guest writes.
        rig.write(0x170, 8, rig.read(0x170));
        rig.check();
        assert!((0..3).all(|index| rig.host.name(index).is_none()), "{name}");
        rig.control(0, false);
        rig.control(0, true);
        rig.check();
    }
    // Nor does a host have to know how to put heads and tails back.
    let rig = busy();
    rig.host.support_little();
    rig.hears(BROKEN);
    rig.control(0, false);
    rig.control(0, true);
    rig.check();
    assert_eq!((rig.host.resets(), rig.unit.counts().refusals), (0, 0));
}

#[test]
fn a_unit_that_is_stopped_gives_everything_back_in_order() {
    let rig = busy();
    rig.hears(BROKEN);
    let host = rig.host.clone();
    drop(rig.unit);
    host.check();
    assert_eq!(host.left(), 0);
}
