//! The unit as devices and processors of a machine meet it.

mod beyond_ram;
mod blocked;
mod kinds;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::testing::{Rig, device, indexed, requester};
use super::*;
use crate::iommu::amd::effort::Effort;
use crate::iommu::amd::request::Access;
use crate::iommu::iommufd::testing::{Call, DEVICE, Function as HostFunction, Host};
use crate::iommu::iommufd::{Attach as _, Copies, Ioas, Memlock, Silence};
use crate::iommu::shadow::{Limits, Shadow, ShadowParts};
use crate::pci::Function;
use crate::pci::access::DwordWrite;
use crate::platform::addr::Gpa;
use crate::platform::irq::IoApicHost;

/// What a remapped interrupt reaches the processors as.
fn remapped(destination: u32, vector: u8) -> MsiMessage {
    MsiMessage::remapped(destination, false, vector.into())
}

fn dma(rig: &Rig) -> crate::platform::dma::Dma {
    crate::platform::dma::Dma::translated(requester(), rig.ram.clone(), rig.unit.clone())
}

#[test]
fn the_function_says_what_it_is_and_where_its_registers_are() {
    let rig = Rig::at_reset();
    let read = |at: u16| rig.unit.config_read(at / 4);
    assert_eq!(read(0x00), 0x1481_1022);
    assert_eq!(read(0x08) >> 8, 0x08_0600);
    assert_eq!(read(0x34) & 0xff, u32::from(CAPABILITY_AT));
    assert_eq!(read(CAPABILITY_AT), 0x180b_580f);
    assert_eq!(read(CAPABILITY_AT + 4), 0xfeb0_4001);
    assert_eq!(read(CAPABILITY_AT + 8), 0);
    assert_eq!(read(CAPABILITY_AT + 0x10), 0x0020_3040);
    assert_eq!(read(0x58) & 0xff, 0x05);
}

#[test]
fn r11_nothing_written_moves_the_registers() {
    let rig = Rig::at_reset();
    let before: Vec<u32> = (0x10..0x16).map(|dword| rig.unit.config_read(dword)).collect();
    for dword in 0x10..0x16 {
        let _nothing = rig.unit.config_write(dword, DwordWrite::whole(u32::MAX));
    }
    let after: Vec<u32> = (0x10..0x16).map(|dword| rig.unit.config_read(dword)).collect();
    assert_eq!(before, after);
    // The address, enabled: what locks it.
    assert_eq!(before[1] & 1, 1);
    let parts = (0..4).flat_map(|lane| [(lane, 1), (lane & 2, 2)]);
    for (lane, len) in parts {
        let lanes = DwordWrite::new(lane, &[0xff, 0xff][..len]).expect("in the dword");
        for dword in [0x11, 0x12] {
            let _nothing = rig.unit.config_write(dword, lanes);
        }
    }
    assert_eq!(
        [0x11, 0x12].map(|dword| rig.unit.config_read(dword)),
        before[1..3]
    );
}

#[test]
fn the_msi_capability_and_its_mirror_hold_the_same() {
    let rig = Rig::at_reset();
    for (dword, value) in [(0x17, 0xfee0_1000), (0x19, 0x41), (0x16, 1 << 16)] {
        let _interrupts = rig.unit.config_write(dword, DwordWrite::whole(value));
    }
    assert_eq!(rig.read(0x158) >> 32, 0xfee0_1000);
    let header = u64::from(rig.unit.config_read(0x16));
    assert_eq!(rig.read(0x158) & 0xffff_ffff, header);
    rig.write(0x160, 0x55 << 32 | 0x7);
    assert_eq!(rig.unit.config_read(0x19), 0x55);
    assert_eq!(rig.unit.config_read(0x18), 0x7);
    Function::reset(&*rig.unit);
    assert_eq!((rig.unit.config_read(0x19), rig.read(0x160)), (0, 0));
}

#[test]
fn x19_its_own_interrupt_needs_no_bus_master_and_is_not_remapped() {
    let rig = Rig::running();
    rig.cover();
    rig.block_its_own();
    for (dword, value) in [(0x17, 0xfee0_1000), (0x19, 0x41), (0x16, 1 << 16)] {
        let _interrupts = rig.unit.config_write(dword, DwordWrite::whole(value));
    }
    RemappingSink::new(rig.unit.clone()).signal(&requester(), indexed(3));
    let sent = MsiMessage {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(rig.processors.take(), [sent]);
}

#[test]
fn x19_its_own_interrupt_reaches_32_bit_ids_by_its_register() {
    let rig = Rig::running();
    rig.cover();
    rig.block_its_own();
    rig.write(0x170, 0x12 << 56 | 0x61 << 32 | 0x34_5678 << 8);
    rig.write(0x18, rig.read(0x18) | 1 << 51);
    assert!(dma(&rig).view().read_obj::<u8>(GuestAddress(0)).is_err());
    assert_eq!(rig.processors.take(), [remapped(0x1234_5678, 0x61)]);
}

#[test]
fn before_it_is_switched_on_everything_passes_as_it_is() {
    let rig = Rig::at_reset();
    rig.store(0x5000, 7);
    assert_eq!(
        dma(&rig).view().read_obj::<u64>(GuestAddress(0x5000)).ok(),
        Some(7)
    );
    RemappingSink::new(rig.unit.clone()).signal(&requester(), indexed(0x31));
    assert_eq!(rig.processors.take(), [indexed(0x31)]);
}

#[test]
fn devices_reach_what_is_mapped_and_nothing_else() {
    let rig = Rig::running();
    rig.cover();
    rig.map(3, 0x50_0000);
    rig.store(0x50_0008, 0x1122);
    let dma = dma(&rig);
    assert_eq!(
        dma.view().read_obj::<u64>(GuestAddress(0x3008)).ok(),
        Some(0x1122)
    );
    assert!(dma.view().read_obj::<u64>(GuestAddress(0x50_0008)).is_err());
    assert!(dma.view().write_obj(1_u64, GuestAddress(0x3ffc)).is_err());
    assert_eq!(rig.load(0x50_0ff8), 0);
    assert_eq!(rig.events(), [2, 2]);
}

#[test]
fn an_invalidation_waits_for_requests_in_flight_and_later_ones_see_it() {
    let rig = Rig::running();
    rig.cover();
    rig.map(0, 0x50_0000);
    let dma = dma(&rig);
    let (begun, waits) = std::sync::mpsc::channel();
    let ended = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let request = || {
            let view = dma.view();
            view.write_obj(1_u64, GuestAddress(0)).expect("mapped");
            begun.send(()).expect("the test waits");
            std::thread::sleep(Duration::from_millis(100));
            ended.store(true, Ordering::SeqCst);
            drop(view);
        };
        threads.spawn(request);
        waits.recv().expect("it begins");
        rig.map(0, 0x51_0000);
        // The whole domain: what was cached is forgotten. Returns when the wait behind it was answered.
        rig.put(INVALIDATE, 0x7fff_ffff_ffff_f003);
        rig.command(8, 0);
        assert!(ended.load(Ordering::SeqCst), "the request had ended");
    });
    dma.view().write_obj(2_u64, GuestAddress(0)).expect("mapped");
    assert_eq!((rig.load(0x50_0000), rig.load(0x51_0000)), (1, 2));
}

#[test]
fn messages_become_what_their_entry_says() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((0x102, 0x77)));
    let sink = RemappingSink::new(rig.unit.clone());
    sink.signal(&requester(), indexed(5));
    assert_eq!(rig.processors.take(), [remapped(0x102, 0x77)]);
    sink.signal(&requester(), indexed(6));
    assert_eq!((rig.processors.take().len(), rig.events()), (0, vec![2]));
}

#[test]
fn a_message_to_memory_is_a_write_to_where_it_is_mapped() {
    let rig = Rig::running();
    rig.cover();
    rig.map(1, 0x50_0000);
    let sink = RemappingSink::new(rig.unit.clone());
    let to = |address| MsiMessage {
        address,
        data: 0xabcd,
    };
    sink.signal(&requester(), to(0x1010));
    sink.signal(&requester(), to(0x2010));
    assert_eq!(rig.load(0x50_0010), 0xabcd);
    assert_eq!(rig.events(), [2]);
}

#[test]
fn a_route_follows_its_entry_once_the_guest_says_that_it_changed() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let route = RemappingSink::new(rig.unit.clone())
        .route(&requester())
        .expect("a route");
    route.set(Some(indexed(5))).expect("the host takes it");
    let kernel = rig.processors.routes().remove(0);
    assert!(route.carries());
    rig.remap(5, Some((2, 0x32)));
    assert_eq!(kernel.history(), [Some(remapped(1, 0x31))]);
    rig.invalidate_interrupts();
    assert_eq!(kernel.history().last(), Some(&Some(remapped(2, 0x32))));
    rig.remap(5, None);
    rig.invalidate_interrupts();
    assert_eq!(kernel.history().last(), Some(&None));
    assert!(!route.carries());
    assert!(rig.events().is_empty(), "looking ahead is no interrupt");
}

#[test]
fn a_route_that_led_nowhere_forgets_what_was_sent_meanwhile() {
    let rig = Rig::running();
    rig.cover();
    let route = RemappingSink::new(rig.unit.clone())
        .route(&requester())
        .expect("a route");
    route.set(Some(indexed(5))).expect("the host takes it");
    assert!(!route.carries());
    route.eventfd().write(1).expect("room");
    rig.remap(5, Some((1, 0x31)));
    rig.invalidate_interrupts();
    assert!(route.carries());
    assert_eq!(rig.processors.routes()[0].signals(), 0);
}

#[test]
fn a_route_that_is_off_keeps_what_was_sent_meanwhile() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let route = RemappingSink::new(rig.unit.clone())
        .route(&requester())
        .expect("a route");
    let set = |message| route.set(message).expect("the host takes it");
    set(Some(indexed(5)));
    set(None);
    route.eventfd().write(1).expect("room");
    // An invalidation of the time when it is off is none of its business.
    rig.invalidate_interrupts();
    set(Some(indexed(5)));
    let kernel = rig.processors.routes().remove(0);
    assert_eq!(kernel.signals(), 1);
    // On while the unit blocks it: what was owed went nowhere, too.
    set(None);
    route.eventfd().write(1).expect("room");
    rig.remap(5, None);
    rig.invalidate_interrupts();
    set(Some(indexed(5)));
    rig.remap(5, Some((1, 0x31)));
    rig.invalidate_interrupts();
    assert!(route.carries());
    assert_eq!(kernel.signals(), 0);
    // Off again while the unit blocks it: what comes from here on is owed, and nothing of before.
    rig.remap(5, None);
    rig.invalidate_interrupts();
    route.eventfd().write(1).expect("room");
    set(None);
    route.eventfd().write(2).expect("room");
    rig.remap(5, Some((1, 0x31)));
    set(Some(indexed(5)));
    assert_eq!(kernel.signals(), 2);
}

#[test]
fn a_route_carries_nothing_for_a_function_that_was_renumbered() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let function = requester();
    let route = RemappingSink::new(rig.unit.clone())
        .route(&function)
        .expect("a route");
    route.set(Some(indexed(5))).expect("the host takes it");
    function.renumber(Sbdf {
        segment: 0,
        bdf: Bdf::new(9, 0, 0).expect("valid"),
    });
    assert!(!route.carries());
    // The kernel's has the old message until the guest changes the entries of either number; the new one's remap nothing.
    let kernel = rig.processors.routes().remove(0);
    assert_eq!(kernel.history(), [Some(remapped(1, 0x31))]);
    rig.remap(5, None);
    rig.invalidate_interrupts();
    assert_eq!(kernel.history().last(), Some(&Some(indexed(5))));
    assert!(route.carries());
}

#[test]
fn a_route_of_a_function_that_is_renumbered_follows_the_entry_of_its_new_number() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let function = requester();
    let route = RemappingSink::new(rig.unit.clone())
        .route(&function)
        .expect("a route");
    route.set(Some(indexed(5))).expect("the host takes it");
    let kernel = rig.processors.routes().remove(0);
    // Somebody else having another number is none of its business.
    rig.unit.renumbered();
    assert_eq!(kernel.history(), [Some(remapped(1, 0x31))]);
    let old = function.sbdf();
    // The host's kernel signals for a function of its own, without asking whether the route carries.
    function.renumber(Sbdf {
        segment: 0,
        bdf: Bdf::new(9, 0, 0).expect("valid"),
    });
    assert_eq!(kernel.history().last(), Some(&Some(remapped(1, 0x31))));
    rig.unit.renumbered();
    // An entry that says nothing.
    assert_eq!(kernel.history().last(), Some(&Some(indexed(5))));
    assert!(route.carries());
    function.renumber(old);
    rig.unit.renumbered();
    assert_eq!(kernel.history().last(), Some(&Some(remapped(1, 0x31))));
    assert!(route.carries());
}

#[test]
fn a_route_that_the_host_refuses_to_change_carries_nothing() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let route = RemappingSink::new(rig.unit.clone())
        .route(&requester())
        .expect("a route");
    route.set(Some(indexed(5))).expect("the host takes it");
    rig.processors.refuse(true);
    rig.remap(5, Some((2, 0x32)));
    rig.invalidate_interrupts();
    assert!(!route.carries());
    // Nor does the old message go out by it: what is signalled waits.
    let kernel = rig.processors.routes().remove(0);
    assert_eq!(kernel.history(), [Some(remapped(1, 0x31)), None]);
    route.eventfd().write(1).expect("room");
    rig.processors.refuse(false);
    rig.invalidate_interrupts();
    assert!(route.carries());
    assert_eq!(kernel.history().last(), Some(&Some(remapped(2, 0x32))));
    assert_eq!(kernel.signals(), 1);
}

#[test]
fn switching_the_unit_off_sends_messages_as_they_are_again() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let route = RemappingSink::new(rig.unit.clone())
        .route(&requester())
        .expect("a route");
    route.set(Some(indexed(5))).expect("the host takes it");
    rig.write(0x18, 0);
    let kernel = rig.processors.routes().remove(0);
    assert_eq!(kernel.history().last(), Some(&Some(indexed(5))));
}

/// How often INVALIDATE_IOMMU_ALL and a COMPLETION_WAIT behind it have room in the ring.
const WAITS: u64 = 127;
/// What the wait before the first of them would store.
const NONE: u64 = 1000;

fn put_many_waits(rig: &Rig) {
    for wait in 1..=WAITS {
        rig.put(8 << 60, 0);
        rig.put_wait(NONE + wait);
    }
}

/// How many of these waits were answered.
fn answered(rig: &Rig) -> u64 {
    rig.flag().saturating_sub(NONE)
}

#[test]
fn many_routes_are_set_anew_some_in_each_call_and_all_of_them_before_the_wait_is_answered() {
    const ROUTES: usize = 300;
    let rig = Rig::running();
    rig.cover();
    rig.remap(5, Some((1, 0x31)));
    let sink = RemappingSink::new(rig.unit.clone());
    let route = |_| {
        let route = sink.route(&requester()).expect("a route");
        route.set(Some(indexed(5))).expect("the host takes it");
        route
    };
    let _routes: Vec<_> = (0..ROUTES).map(route).collect();
    let kernel = rig.processors.routes();
    let set = || -> usize { kernel.iter().map(|route| route.history().len()).sum() };
    // How often the one was set that was set least, beyond the first time.
    let least = || {
        let least = kernel.iter().map(|route| route.history().len()).min();
        least.expect("there are routes") as u64 - 1
    };
    put_many_waits(&rig);
    let mut before = set();
    rig.ring();
    let mut calls = 1;
    loop {
        let requests = set() - before;
        assert!(
            requests <= Effort::PER_CALL,
            "{requests} requests in call {calls}"
        );
        let waits = answered(&rig);
        assert!(waits <= least(), "{waits} waits in call {calls}");
        if waits == WAITS {
            break;
        }
        assert!(rig.unit.more.read().is_ok(), "the event loop is told of the rest");
        before = set();
        rig.unit.run_commands();
        calls += 1;
    }
    assert_eq!(least(), WAITS);
    assert!(rig.unit.more.read().is_err(), "nothing is left");
}

/// The kernel's side of the IOAPIC, as a recorder.
#[derive(Default)]
struct Kernel(std::sync::Mutex<Vec<(u8, Option<MsiMessage>)>>);

impl Kernel {
    fn last(&self) -> Option<(u8, Option<MsiMessage>)> {
        self.0.lock().expect("not poisoned").last().copied()
    }
}

impl IoApicHost for Kernel {
    fn signal(&self, message: MsiMessage) {
        self.0
            .lock()
            .expect("not poisoned")
            .push((u8::MAX, Some(message)));
    }

    fn set_route(&self, pin: u8, message: Option<MsiMessage>) -> Result<(), HostError> {
        self.0.lock().expect("not poisoned").push((pin, message));
        Ok(())
    }

    fn pins_of(&self, _vector: u8) -> u32 {
        0
    }
}

#[test]
fn the_ioapics_inputs_end_by_the_vector_that_processors_saw() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(9, Some((1, 0x39)));
    let kernel = Arc::new(Kernel::default());
    let host = RemappingIoApic::new(rig.unit.clone(), device(), kernel.clone());
    let level = MsiMessage {
        data: 0xc009,
        ..indexed(0)
    };
    host.set_route(9, Some(level)).expect("the host takes it");
    assert_eq!(
        kernel.last(),
        Some((9, Some(MsiMessage::remapped(1, false, 0xc039))))
    );
    host.signal(level);
    assert_eq!(
        kernel.last(),
        Some((u8::MAX, Some(MsiMessage::remapped(1, false, 0xc039))))
    );
    assert_eq!((host.pins_of(0x39), host.pins_of(0x09)), (1 << 9, 0));

    rig.remap(9, Some((2, 0x49)));
    rig.invalidate_interrupts();
    assert_eq!(
        kernel.last(),
        Some((9, Some(MsiMessage::remapped(2, false, 0xc049))))
    );
    assert_eq!(
        (host.pins_of(0x49), host.pins_of(0x39)),
        (1 << 9, 1 << 9),
        "one may be in service yet"
    );
    rig.remap(9, None);
    rig.invalidate_interrupts();
    assert_eq!(kernel.last(), Some((9, None)));
}

#[test]
fn the_ioapics_inputs_are_set_anew_some_in_each_call() {
    let rig = Rig::running();
    rig.cover();
    rig.remap(9, Some((1, 0x39)));
    let kernel = Arc::new(Kernel::default());
    let host = RemappingIoApic::new(rig.unit.clone(), device(), kernel.clone());
    for pin in 0..24 {
        host.set_route(pin, Some(indexed(9))).expect("the host takes it");
    }
    put_many_waits(&rig);
    let told = || kernel.0.lock().expect("not poisoned").len();
    let mut before = told();
    rig.ring();
    for _ in 0..1000 {
        assert!(told() - before <= Effort::PER_CALL);
        before = told();
        rig.unit.run_commands();
    }
    assert_eq!((answered(&rig), told() as u64), (WAITS, 24 * (WAITS + 1)));
}

#[test]
fn a_long_ring_is_left_to_the_event_loop() {
    let rig = Rig::running();
    for _ in 0..255 {
        rig.put(6 << 60 | 0xff << 24, 0);
    }
    rig.ring();
    // Each round's announcement is taken and given back, as the event loop finds it.
    let announced = || rig.unit.more.read().is_ok_and(|_| rig.unit.more.write(1).is_ok());
    let rounds = (0..100).take_while(|_| {
        let more = announced();
        rig.unit.run_commands();
        more
    });
    assert!((2..100).contains(&rounds.count()));
    assert_eq!(rig.read(0x2000), rig.read(0x2008));
}

#[test]
fn after_a_reset_nothing_waits_and_everything_passes() {
    let rig = Rig::running();
    rig.cover();
    for _ in 0..255 {
        rig.put(6 << 60 | 0xff << 24, 0);
    }
    rig.ring();
    rig.unit.reset();
    assert_eq!(rig.read(0x18) & 1, 0);
    rig.store(0x5000, 9);
    assert_eq!(
        dma(&rig).view().read_obj::<u64>(GuestAddress(0x5000)).ok(),
        Some(9)
    );
    assert!(rig.unit.more.read().is_err());
}

#[test]
fn its_state_is_told_in_one_line() {
    let rig = Rig::running();
    rig.cover();
    let state = rig.unit.state();
    assert!(state.contains("commands 0x800000000010000,"), "{state}");
    assert!(
        state.contains("1 doorbells, 0 of them polled, 2 commands in 1 batches, 0 stops"),
        "{state}"
    );
    assert_eq!(state.lines().count(), 1);
}

/// A function of the host's at the place of the device under test, behind the unit.
fn of_the_host(rig: &Rig) -> (Arc<Host>, Arc<HostFunction>, Weak<Ioas>) {
    let kernel = Host::new();
    let function = kernel.function();
    let space = Arc::new(Ioas::new(kernel.clone(), rig.ram.clone()).expect("made"));
    function.attach(space.id()).expect("attached");
    space.map_ram(Memlock { limit: None }).expect("mapped");
    let weak = Arc::downgrade(&space);
    let unit: Weak<dyn Views> = Arc::downgrade(&rig.unit) as Weak<dyn Views>;
    let behind: Arc<dyn Silence> = function.clone();
    let shadow = Shadow::new(ShadowParts {
        name: "iommu0".to_owned(),
        unit,
        requests: kernel.clone(),
        space: space.clone(),
        ram: rig.ram.clone(),
        last: rig.unit.last_address(),
        limits: Limits::DEFAULT,
        functions: vec![(requester(), behind)],
    });
    let shadow = Arc::new(shadow.expect("made"));
    space.tell(Arc::downgrade(&shadow) as Weak<dyn Copies>);
    rig.unit.add_follower(shadow);
    (kernel, function, weak)
}

/// INVALIDATE_IOMMU_PAGES of the device's domain.
const INVALIDATE: u64 = 3 << 60 | 1 << 32;

#[test]
fn i11_a_function_of_the_host_reaches_what_was_mapped_once_the_wait_is_answered() {
    let rig = Rig::running();
    let (kernel, function, _) = of_the_host(&rig);
    assert_eq!(function.reaches(0x3008), Some((0x3008, Access::BOTH)));
    rig.cover();
    assert_eq!(function.reaches(0x3008), None);
    rig.map(3, 0x50_0000);
    rig.put(INVALIDATE, 0x3000);
    rig.put_wait(9);
    rig.ring();
    assert_eq!(rig.flag(), 9);
    assert_eq!(function.reaches(0x3008), Some((0x50_0008, Access::BOTH)));
    rig.unit.reset();
    assert_eq!(function.reaches(0x3008), Some((0x3008, Access::BOTH)));
    // Guest RAM, and nothing.
    assert_eq!(kernel.spaces().len(), 2);
}

#[test]
fn a_page_that_the_host_does_not_map_for_a_function_is_an_event_before_the_wait_is_answered() {
    let rig = Rig::running();
    let (kernel, function, _) = of_the_host(&rig);
    rig.cover();
    rig.map(3, 0x50_0000);
    kernel.refuse(Call::Copy, libc::ENOSPC);
    let invalidate = || {
        rig.put(INVALIDATE, 0x3000);
        rig.put_wait(9);
        rig.ring();
    };
    invalidate();
    assert_eq!((rig.flag(), function.reaches(0x3008)), (9, None));
    // IO_PAGE_FAULT of the device, in its domain: nothing is present there.
    let record = |at: u64| [rig.load(0x2_0000 + 16 * at), rig.load(0x2_0008 + 16 * at)];
    let fault = u64::from(device().requester_id()) | 2 << 60 | 1 << 32;
    assert_eq!((rig.events(), record(0)), (vec![2], [fault, 0x3000]));
    assert_eq!(rig.read(0x2020) & 2, 2, "EventLogInt");
    // Each time it is refused, as a device would try each time.
    invalidate();
    assert_eq!(rig.events().len(), 2);
    // Until its entry says that one is enough (SE), or that none is to come (SA).
    for (bit, events) in [(33, 3), (34, 3)] {
        rig.suppress(bit);
        invalidate();
        invalidate();
        assert_eq!(rig.events().len(), events, "bit {bit}");
    }
    kernel.relent();
    invalidate();
    assert_eq!(
        (rig.events().len(), function.reaches(0x3008).is_some()),
        (3, true)
    );
}

#[test]
fn a_function_that_the_host_does_not_attach_is_an_event_that_names_its_entry() {
    let rig = Rig::running();
    let (kernel, function, _) = of_the_host(&rig);
    kernel.refuse_once(Call::Attach, 0, libc::EINVAL);
    rig.cover();
    assert_eq!(function.reaches(0x3008), None);
    // DEV_TAB_HARDWARE_ERROR.
    let id = u64::from(device().requester_id());
    assert_eq!(rig.events(), [3]);
    assert_eq!(
        (rig.load(0x2_0000) & 0xffff, rig.load(0x2_0008)),
        (id, 0x20_0000 + 32 * id)
    );
}

#[test]
fn a_wait_behind_much_work_is_answered_when_the_work_is_done_and_holds_up_no_processor() {
    let rig = Rig::running();
    let (kernel, function, _) = of_the_host(&rig);
    rig.cover();
    (0..512).for_each(|page| rig.map(page, 0x50_0000));
    rig.put(INVALIDATE, 0x7fff_ffff_ffff_f000 | 1);
    rig.put_wait(9);
    rig.ring();
    let calls = (1..10).take_while(|_| {
        let waits = rig.flag() != 9;
        rig.unit.run_commands();
        waits
    });
    assert!((1..9).contains(&calls.count()), "some, and not for ever");
    assert_eq!(rig.flag(), 9);
    let place = function.place().expect("attached");
    assert_eq!(kernel.mapped(place).len(), 512);
}

#[test]
fn a_wait_is_not_answered_while_a_function_reaches_what_it_reached_and_the_next_doorbell_tries_again() {
    let rig = Rig::running();
    let (kernel, function, _) = of_the_host(&rig);
    for call in [Call::Attach, Call::Detach, Call::Silence] {
        kernel.refuse(call, libc::EIO);
    }
    rig.block();
    rig.put_wait(9);
    rig.ring();
    rig.unit.run_commands();
    assert_eq!((rig.flag(), function.reaches(0x3008).is_some()), (0, true));
    assert!(rig.unit.more.read().is_err(), "the event loop has better to do");
    kernel.relent();
    for call in [Call::Attach, Call::Detach] {
        kernel.refuse(call, libc::EIO);
    }
    rig.ring();
    assert_eq!((rig.flag(), function.is_silent()), (9, true));
    kernel.relent();
    rig.unit.run_commands();
    assert_eq!((function.is_silent(), function.reaches(0x3008)), (false, None));
}

#[test]
fn a_reset_comes_to_an_end_though_a_function_is_not_to_be_kept_from_what_it_reaches() {
    let rig = Rig::running();
    let (kernel, function, _) = of_the_host(&rig);
    rig.cover();
    for call in [Call::Attach, Call::Detach, Call::Silence] {
        kernel.refuse(call, libc::EIO);
    }
    rig.unit.reset();
    assert_eq!(function.reaches(0x3008), None, "its old tables, which are empty");
    kernel.relent();
    rig.unit.reset();
    assert_eq!(function.reaches(0x3008), Some((0x3008, Access::BOTH)));
}

#[test]
fn memory_of_another_function_that_comes_is_reached_without_a_command() {
    const BAR: u64 = 0xe000_0000;
    let rig = Rig::running();
    let (_kernel, function, space) = of_the_host(&rig);
    rig.cover();
    rig.map(3, BAR);
    rig.put(INVALIDATE, 0x3000);
    rig.put_wait(9);
    rig.ring();
    assert_eq!((rig.flag(), function.reaches(0x3008)), (9, None));
    let _ = rig.unit.more.read();
    let file = std::fs::File::open("/dev/null").expect("every host has it");
    let range = GpaRange::new(Gpa(BAR), 0x1000).expect("valid");
    let space = space.upgrade().expect("the shadow has it");
    let shared = space.share(range, file.as_fd()).expect("mapped");
    // As the event loop does when it finds that readable.
    assert!(rig.unit.more.read().is_ok());
    rig.unit.run_commands();
    assert_eq!(function.reaches(0x3008), Some((DEVICE + 8, Access::BOTH)));
    drop(shared);
    assert_eq!(function.reaches(0x3008), None);
}
