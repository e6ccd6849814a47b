//! A function of the host in a hierarchy, a host that wants it back or sees it fail, and a guest's driver of the ports.

use super::*;
use crate::devices::clock::manual::{ManualAlarm, ManualClock};
use crate::devices::vfio::VfioParts;
use crate::devices::vfio::host::Interrupt;
use crate::devices::vfio::lent::Lent;
use crate::devices::vfio::testing::{Device, GuestSpace, Told};
use crate::iommu::iommufd::Ioas;
use crate::iommu::iommufd::testing::Host;
use crate::pci::assign::FunctionSpec;
use crate::pci::assign::Parent;
use crate::pci::bar::BarSpec;
use crate::pci::testing::{Machine, Messages, function, plan};
use crate::pci::tree::{BarKind, NodeKind, PciTree};
use crate::platform::memory::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Dwords of a port: the PCI Express capability comes first, AER is at 0x100.
const LINK_CONTROL: u16 = 0x10 + 4;
const SLOT_CONTROL: u16 = 0x10 + 6;
const ROOT_COMMAND: u16 = 0x40 + 11;
const ROOT_STATUS: u16 = 0x40 + 12;
const SOURCES: u16 = 0x40 + 13;
const LINK_ACTIVE: u32 = 1 << 29;
/// What Linux's driver of slots writes: the button, the link and the interrupt.
const LISTENS: u32 = 1 | 1 << 5 | 1 << 12;
const BUTTON_PRESSED: u32 = 1 << 16;
const POWER_OFF: u32 = 1 << 10;
/// A device without Bus Master Enable.
const QUIET: [u8; 2] = [0x03, 0x04];

struct Bench {
    machine: Machine,
    device: Arc<Device>,
    space: Arc<GuestSpace>,
    clock: Arc<ManualClock>,
    alarm: Arc<ManualAlarm>,
    signals: Arc<HostSignals>,
}

fn bars() -> [BarSpec; 3] {
    let memory = BarKind::Mem32 { prefetchable: false };
    [(0, memory, 0x2_0000), (2, BarKind::Io, 0x20), (3, memory, 0x4000)].map(|(index, kind, size)| BarSpec {
        index,
        kind,
        size,
    })
}

/// The function behind a root port, or beside it on the root bus.
fn tree(parent: Parent) -> PciTree {
    let port = function("rp0", NodeKind::RootPort, Parent::Root(0), &[]);
    let nic = FunctionSpec {
        removable: true,
        ..function("nic", NodeKind::Endpoint(0), parent, &bars())
    };
    plan(&[("rc0", 0..=255)], vec![port, nic])
}

fn bench(parent: Parent) -> Bench {
    let (device, space) = (Device::nic(), GuestSpace::new());
    let mut made = None;
    let machine = Machine::with_devices(tree(parent), |node| {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
        let function = VfioFunction::new(VfioParts {
            name: "nic".to_owned(),
            host: Lent::new(device.clone()),
            reset_with: None,
            has_peers: true,
            space: Arc::new(Ioas::new(Host::new(), GuestRam::new(ram)).expect("made")),
            identity: node.identity,
            bars: bars().to_vec(),
            memory: space.clone(),
            msi: Messages::new().port(),
            intx: None,
            on_root_bus: false,
        });
        let function = function.unwrap_or_else(|error| panic!("{error}"));
        made = Some(function.clone());
        function
    });
    let (clock, alarm) = (ManualClock::at(Duration::ZERO), Arc::new(ManualAlarm::default()));
    let made = made.expect("planned");
    let signals = HostSignals::new(made, &machine.topology, clock.clone(), alarm.clone());
    machine.enable();
    device.told();
    Bench {
        machine,
        device,
        space,
        clock,
        alarm,
        signals,
    }
}

impl Bench {
    /// The host gives `notice`, and the event loop hears of it.
    fn given(&self, notice: Notice) {
        assert!(self.device.give(notice));
        self.signals
            .function
            .signalled()
            .into_iter()
            .for_each(|notice| self.signals.heard(notice));
    }

    fn port(&self, dword: u16) -> u32 {
        self.machine.read(self.machine.node("rp0").bdf, dword)
    }

    fn write_port(&self, dword: u16, value: u32) {
        self.machine.write(self.machine.node("rp0").bdf, dword, value);
    }

    fn nic(&self, dword: u16) -> u32 {
        self.machine.read(self.machine.node("nic").bdf, dword)
    }

    /// Let `time` pass; the alarm goes off when it is due.
    fn pass(&self, time: Duration) {
        self.clock.advance(time);
        if self.alarm.at().is_some_and(|at| at <= self.clock.monotonic()) {
            self.alarm.set(None);
            self.signals.expired();
        }
    }

    /// The device is silent, as after power-on and closed, and the guest finds all ones where it was.
    fn is_gone(&self) {
        assert_eq!((self.nic(0), self.machine.answering()), (u32::MAX, vec![]));
        assert_eq!(self.space.mapped(), []);
        let told = self.device.told();
        let last = [Told::Config(4, QUIET.to_vec()), Told::Reset, Told::Detached];
        assert!(told.ends_with(&last), "{told:?}");
        assert!(!self.device.is_on(Interrupt::Msix) && !self.device.is_on(Interrupt::Intx));
        // The test's own is the last handle.
        assert_eq!(Arc::strong_count(&self.device), 1);
    }
}

#[test]
fn a_wanted_function_is_asked_for_by_the_button_and_goes_when_the_guest_lets_go() {
    let bench = bench(Parent::Port(0));
    bench.write_port(SLOT_CONTROL, LISTENS);
    bench.given(Notice::Wanted);
    assert_eq!(bench.port(SLOT_CONTROL) & BUTTON_PRESSED, BUTTON_PRESSED);
    // Pressed again it would mean: not after all.
    bench.write_port(SLOT_CONTROL, LISTENS | BUTTON_PRESSED);
    bench.given(Notice::Wanted);
    bench.pass(LOOK);
    assert_eq!(bench.port(SLOT_CONTROL) & BUTTON_PRESSED, 0);
    assert_ne!(bench.nic(0), u32::MAX);
    bench.write_port(SLOT_CONTROL, LISTENS | POWER_OFF);
    bench.pass(LOOK);
    bench.is_gone();
    // Nothing went wrong that the guest would have to hear of.
    assert_eq!((bench.port(ROOT_STATUS), bench.alarm.at()), (0, None));
    // It does not come back, not with the slot's power nor with a reset of the machine.
    bench.write_port(SLOT_CONTROL, LISTENS);
    bench.machine.topology.reset();
    bench.machine.enable();
    assert_eq!(
        (bench.nic(0), bench.port(LINK_CONTROL) & LINK_ACTIVE),
        (u32::MAX, 0)
    );
    assert_eq!(bench.device.told(), []);
}

#[test]
fn a_guest_that_does_not_let_go_loses_the_function_when_its_time_is_up() {
    let bench = bench(Parent::Port(0));
    bench.write_port(SLOT_CONTROL, LISTENS);
    bench.given(Notice::Wanted);
    bench.pass(TIME_TO_LET_GO - LOOK);
    assert_ne!(bench.nic(0), u32::MAX);
    bench.pass(LOOK);
    bench.is_gone();
    // The slot says that the link changed, which is how a device that was pulled out shows.
    assert_eq!(bench.port(SLOT_CONTROL) & 1 << 24, 1 << 24);
}

#[test]
fn a_guest_that_cannot_be_asked_loses_the_function_at_once() {
    let bench = bench(Parent::Port(0));
    bench.given(Notice::Wanted);
    bench.is_gone();
    assert_eq!(
        (bench.port(LINK_CONTROL) & LINK_ACTIVE, bench.port(ROOT_STATUS)),
        (0, 0)
    );
}

#[test]
fn a_slot_that_can_be_emptied_wants_no_addresses_that_its_function_does_not_need() {
    let bench = bench(Parent::Port(0));
    // I/O and memory are open, as the function needs them; there is no prefetchable window.
    (9..12).for_each(|dword| bench.write_port(dword, u32::MAX));
    assert_eq!([9, 10, 11].map(|dword| bench.port(dword)), [0; 3]);
    assert_ne!((bench.port(7) & 0xffff, bench.port(8)), (0, 0));
    bench.machine.topology.reset();
    bench.machine.enable();
    bench.machine.check_as_planned();
}

#[test]
fn on_a_root_bus_a_wanted_function_answers_all_ones() {
    let bench = bench(Parent::Root(0));
    bench.given(Notice::Wanted);
    bench.is_gone();
    // Whatever is said of it now, nothing happens.
    bench.signals.heard(Notice::Wanted);
    bench.signals.heard(Notice::Error);
    assert_eq!(bench.device.told(), []);
}

#[test]
fn an_error_is_told_by_the_root_port_and_stops_requests_until_the_reset() {
    let bench = bench(Parent::Port(0));
    bench.write_port(ROOT_COMMAND, 0x7);
    bench.given(Notice::Error);
    assert_eq!(
        (bench.port(ROOT_STATUS), bench.port(SOURCES)),
        (0x54, 0x0100_0000)
    );
    assert_eq!(bench.device.told(), [Told::Config(4, QUIET.to_vec())]);
    // The driver stays with what it has; its requests are not let out again.
    let nic = bench.machine.node("nic").bdf;
    bench.machine.write(nic, 1, 0x3);
    bench.machine.write(nic, 1, 0x7);
    assert_eq!(bench.device.told(), []);
    // A reset by the port above, as error recovery does it.
    bench.write_port(15, 0x0040 << 16);
    bench.write_port(15, 0);
    assert!(bench.device.told().contains(&Told::Reset));
    bench.machine.write(nic, 1, 0x7);
    assert_eq!(bench.device.told(), [Told::Config(4, vec![0x07, 0x04])]);
}

#[test]
fn an_error_that_nobody_listens_to_is_kept_in_the_root_port_and_stops_requests_all_the_same() {
    for parent in [Parent::Port(0), Parent::Root(0)] {
        let bench = bench(parent);
        bench.given(Notice::Error);
        assert_eq!(bench.device.told(), [Told::Config(4, QUIET.to_vec())]);
    }
}
