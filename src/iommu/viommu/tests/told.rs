//! A host that tells of the guest's unit by an event queue, well or badly.

use std::io;
use std::os::fd::AsRawFd;

use super::super::host::HostEvent;
use super::super::testing::{FakeHost, Reached, Rig, dte};
use crate::iommu::amd::features::Wanted;
use crate::iommu::amd::spec::event::{Code, Record};

/// As many as nobody has patience for.
const MANY: usize = 16;

fn event(code: Code) -> HostEvent {
    HostEvent::Record(Record::new().with_code(code.0).with_address(0x10_0000_1234))
}

fn broken() -> HostEvent {
    event(Code::VIOMMU_HARDWARE_ERROR)
}

fn fault() -> HostEvent {
    event(Code::GUEST_EVENT_FAULT)
}

fn garbage() -> HostEvent {
    HostEvent::Garbage("an event of which there are only 7 bytes".to_owned())
}

/// A unit at work whose host has event queues: one function in guest tables, one passing, one blocked.
fn busy() -> Rig {
    let host = FakeHost::new();
    host.have_events();
    let rig = Rig::over(host, &Wanted::EVERYTHING);
    rig.start();
    rig.entry(0, dte(0x5000, 7));
    rig.entry(1, [0; 4]);
    rig.host.granted();
    rig
}

impl Rig {
    /// The host tells `answer`, and the event loop is woken. Whether it goes on waiting.
    fn woken(&self, answer: io::Result<Vec<HostEvent>>) -> bool {
        self.host.tell(answer);
        self.unit.host_told(false)
    }

    fn is_deaf(&self) -> bool {
        self.unit.state().contains("event queue is NOT READ any more")
    }
}

#[test]
fn a_unit_has_a_descriptor_exactly_where_its_host_tells_something() {
    let rig = busy();
    let descriptor = rig.unit.host_events().expect("event queues");
    assert!(descriptor.as_raw_fd() >= 0);
    let quiet = Rig::running();
    assert!(quiet.unit.host_events().is_none());
    assert!(!quiet.unit.host_told(false), "nothing to wait for");
}

#[test]
fn a_hardware_error_that_the_host_tells_stops_the_unit_until_it_is_switched_off_and_on() {
    let rig = busy();
    assert!(rig.woken(Ok(vec![fault(), broken(), fault()])));
    assert!((0..3).all(|index| rig.host.place(index) == Reached::Nothing));
    let told = "STOPPED, as the host's unit cannot read 0x1000001234; rings on: none";
    assert!(rig.unit.state().contains(told), "{}", rig.unit.state());
    let counts = rig.unit.counts();
    assert_eq!((counts.stops, counts.lost_records, counts.host_events), (1, 2, 3));
    rig.check();
    // The same again is no second stop.
    assert!(rig.woken(Ok(vec![broken()])));
    assert_eq!(rig.unit.counts().stops, 1);
    rig.control(0, false);
    rig.control(0, true);
    assert!(!rig.is_stopped());
    assert!(matches!(rig.host.place(0), Reached::Tables(_)));
    rig.check();
    // And a reset of the machine is as good.
    assert!(rig.woken(Ok(vec![broken()])));
    assert!(rig.is_stopped());
    rig.unit.reset();
    assert!(!rig.is_stopped());
    rig.check();
}

#[test]
fn what_was_lost_and_what_is_about_neither_is_counted_and_stops_nothing() {
    let rig = busy();
    assert!(rig.woken(Ok(vec![
        HostEvent::Lost(3),
        event(Code::PAGE_TAB_HARDWARE_ERROR),
        event(Code(15)),
        HostEvent::Lost(u32::MAX),
        fault(),
    ])));
    let counts = rig.unit.counts();
    assert_eq!(
        (counts.host_events, counts.lost_events, counts.lost_records),
        (3, 0x1_0000_0002, 1)
    );
    assert!(!rig.is_stopped() && rig.host.granted().is_empty());
    rig.check();
}

#[test]
fn what_came_before_garbage_counts() {
    let rig = busy();
    assert!(rig.woken(Ok(vec![broken(), garbage()])));
    assert!(rig.is_stopped());
    rig.check();
}

#[test]
fn a_host_that_tells_nothing_but_garbage_is_not_listened_to_for_ever() {
    for answer in [
        || Ok(vec![garbage()]),
        || Ok(vec![fault(), garbage()]),
        || Err(io::Error::from_raw_os_error(libc::EIO)),
        || Ok(vec![]),
    ] {
        let rig = busy();
        for time in 1..MANY {
            assert!(rig.woken(answer()), "time {time}");
        }
        // One that is understood, and all of it once more.
        assert!(rig.woken(Ok(vec![fault()])));
        for time in 1..MANY {
            assert!(rig.woken(answer()), "time {time} of the second");
        }
        assert!(!rig.is_deaf());
        assert!(!rig.woken(answer()));
        assert!(rig.is_deaf());
        // Nobody reads it any more, and the unit goes on.
        assert!(!rig.woken(Ok(vec![broken()])));
        assert_eq!(rig.host.untold(), 1);
        rig.entry(0, dte(0x6000, 8));
        assert!(!rig.is_stopped());
        rig.unit.reset();
        assert_eq!(rig.host.untold(), 1);
        rig.check();
    }
}

#[test]
fn an_event_that_a_processor_was_faster_to_hear_is_no_wake_up_in_vain() {
    let rig = busy();
    for _ in 0..3 * MANY {
        rig.host.tell(Ok(vec![fault()]));
        // Any register that the guest writes.
        rig.write(0x170, 8, rig.read(0x170));
        assert_eq!(rig.host.untold(), 0);
        assert!(rig.unit.host_told(false));
    }
    assert_eq!(rig.unit.counts().lost_records, 3 * MANY as u64);
}

#[test]
fn a_queue_that_ends_is_heard_to_its_end() {
    let rig = busy();
    rig.host.tell(Ok(vec![broken()]));
    assert!(!rig.unit.host_told(true));
    assert!(rig.is_stopped() && rig.is_deaf());
    rig.control(0, false);
    rig.control(0, true);
    assert!(!rig.is_stopped());
    rig.check();
}

#[test]
fn what_is_told_of_the_time_before_the_guest_switched_off_stops_nothing_after() {
    let rig = busy();
    rig.host.tell(Ok(vec![broken()]));
    rig.control(0, false);
    rig.control(0, true);
    assert!(!rig.is_stopped());
    assert_eq!(rig.host.untold(), 0);
    rig.host.tell(Ok(vec![broken()]));
    rig.unit.reset();
    rig.start();
    assert!(!rig.is_stopped());
    rig.check();
}

#[test]
fn a_unit_that_goes_with_events_pending_gives_everything_back_in_order() {
    let rig = busy();
    for _ in 0..100 {
        rig.host.tell(Ok(vec![broken(), fault(), garbage()]));
    }
    let host = rig.host.clone();
    drop(rig.unit);
    host.check();
    assert_eq!(host.left(), 0);
    let granted = host.granted();
    let at = |what: &str| {
        let found = granted.iter().position(|granted| granted == what);
        found.unwrap_or_else(|| panic!("{what} in {granted:?}"))
    };
    assert!(at("destroy queue") < at("destroy events"), "{granted:?}");
    assert!(at("destroy events") < at("destroy vdevice"), "{granted:?}");
    assert_eq!(at("destroy viommu"), granted.len() - 1, "{granted:?}");
    // Once more, with a host that refuses once.
    for after in 0..12 {
        let rig = busy();
        rig.host.refuse_soon(after);
        let host = rig.host.clone();
        drop(rig.unit);
        assert_eq!(host.left(), 0, "after {after}");
    }
}

#[test]
fn a_host_that_has_event_queues_and_gives_none_makes_no_unit() {
    let host = FakeHost::new();
    host.have_events();
    host.refuse(Some("events"));
    let error = Rig::try_over(host.clone(), &Wanted::EVERYTHING).err();
    let error = error.expect("it is not made");
    assert_eq!(error.action, "have the host tell what goes wrong with iommu0");
    host.refuse(None);
    host.check();
    assert_eq!(host.left(), 0);
}
