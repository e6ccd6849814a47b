//! The whole way of a driver: configuration space, BAR, queue, doorbell, thread, interrupt, reset.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::lines::{ISR_CONFIGURATION, ISR_QUEUE};
use super::window::CFG_PCI;
use super::*;
use crate::devices::virtio::driver::{Driver, Part};
use crate::devices::virtio::registers::NO_VECTOR;
use crate::devices::virtio::rng::Rng;
use crate::pci::testing::Messages;
use crate::platform::irq::InterruptController;

const SOON: Duration = Duration::from_secs(20);

/// Keeps which eventfd is attached where.
#[derive(Default)]
struct Doorbells {
    attached: Arc<Mutex<BTreeMap<u64, EventFd>>>,
    refuse: AtomicBool,
}

struct Attached(u64, Arc<Mutex<BTreeMap<u64, EventFd>>>);

impl Doorbell for Attached {}

impl Drop for Attached {
    fn drop(&mut self) {
        self.1.lock().expect("not poisoned").remove(&self.0);
    }
}

impl DoorbellHost for Doorbells {
    fn attach(&self, at: Gpa, fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(HostError::new("attach", io::Error::from_raw_os_error(28)));
        }
        let mut attached = self.attached.lock().expect("not poisoned");
        let before = attached.insert(at.0, fd.try_clone().expect("a copy"));
        assert!(before.is_none(), "two doorbells at {at}");
        Ok(Box::new(Attached(at.0, self.attached.clone())))
    }
}

impl Doorbells {
    fn addresses(&self) -> Vec<u64> {
        self.attached
            .lock()
            .expect("not poisoned")
            .keys()
            .copied()
            .collect()
    }

    /// The guest writes there.
    fn ring(&self, at: u64) {
        let attached = self.attached.lock().expect("not poisoned");
        attached[&at].write(1).expect("a kick");
    }
}

#[derive(Default)]
struct Wire(AtomicBool);

impl InterruptController for Wire {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
    fn pulse(&self, _gsi: u32) {}
}

/// A machine with an entropy device in it.
struct Machine {
    function: Arc<VirtioPci>,
    doorbells: Arc<Doorbells>,
    messages: Arc<Messages>,
    wire: Arc<Wire>,
    driver: Driver,
}

const ADDRESS: u64 = 0x80_0000_0000;

fn machine() -> Machine {
    let driver = Driver::new(64);
    let messages = Messages::new();
    let doorbells = Arc::new(Doorbells::default());
    let wire = Arc::new(Wire::default());
    let parts = VirtioPciParts {
        dma: Dma::new(messages.requester().clone(), driver.ram()),
        msi: messages.port(),
        doorbells: doorbells.clone(),
        intx: Some((Pin::A, IrqLine::new(wire.clone(), 16))),
        on_root_bus: false,
        access_platform: false,
    };
    let function = VirtioPci::new(Arc::new(Rng::new("rng0")), parts).expect("a good device");
    function.bar_moved(0, Some(Gpa(ADDRESS)));
    function.bus_mastering(true);
    Machine {
        function,
        doorbells,
        messages,
        wire,
        driver,
    }
}

impl Machine {
    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.bar_read(0, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, len: usize, value: u64) {
        self.function.bar_write(0, offset, &value.to_le_bytes()[..len]);
    }

    fn status(&self, value: u8) {
        self.write(0x14, 1, value.into());
    }

    fn negotiate(&self) {
        self.status(1);
        self.status(3);
        self.write(0x08, 4, 1);
        self.write(0x0c, 4, 1);
        self.status(11);
        assert_eq!(self.read(0x14, 1), 11);
    }

    fn set_up_queue(&self) {
        let layout = self.driver.layout();
        self.write(0x16, 2, 0);
        self.write(0x18, 2, layout.size.into());
        self.write(0x20, 8, layout.descriptors.0);
        self.write(0x28, 8, layout.available.0);
        self.write(0x30, 8, layout.used.0);
        self.write(0x1c, 2, 1);
    }

    /// MSI-X on, vector 1 to address 0xfee00000 with data 0x41, the queue to vector 1.
    fn use_msix(&self) {
        let entry = u64::from(MSIX_TABLE) + 16;
        self.write(entry, 8, 0xfee0_0000);
        self.write(entry + 8, 8, 0x41);
        let capability = self.capability(0x11, |_| true);
        let _ = self
            .function
            .config_write(capability, DwordWrite::whole(0x8000_0000));
        self.write(0x16, 2, 0);
        self.write(0x1a, 2, 1);
        assert_eq!(self.read(0x1a, 2), 1);
    }

    fn run(&self) {
        self.negotiate();
        self.set_up_queue();
        self.status(15);
    }

    fn doorbell(&self) -> u64 {
        ADDRESS + NOTIFY.0
    }

    /// The dword where a capability begins.
    fn capability(&self, id: u32, that: impl Fn(u32) -> bool) -> u16 {
        let mut at = self.function.config_read(13) & 0xff;
        for _ in 0..48 {
            let dword = u16::try_from(at / 4).expect("a byte");
            let header = self.function.config_read(dword);
            if header & 0xff == id && that(header) {
                return dword;
            }
            at = header >> 8 & 0xff;
        }
        panic!("no capability {id:#x}");
    }

    /// Offer a buffer of 16 bytes.
    fn offer(&mut self) -> u64 {
        let at = self.driver.place(&[0; 16]);
        self.driver.offer(&[Part::write(at, 16)]);
        at
    }

    /// Wait until `what` holds.
    fn eventually(&mut self, what: impl Fn(&mut Self) -> bool) {
        let begin = Instant::now();
        while !what(self) {
            assert!(begin.elapsed() < SOON, "it never happens");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_driver_finds_the_device_and_where_its_structures_are() {
    let machine = machine();
    assert_eq!(machine.function.config_read(0), 0x1044_1af4);
    assert_eq!(machine.function.config_read(11), 0x0044_1af4);
    for (kind, (offset, len)) in [
        (CFG_COMMON, COMMON),
        (CFG_NOTIFY, NOTIFY),
        (CFG_ISR, ISR),
        (CFG_DEVICE, DEVICE),
    ] {
        let at = machine.capability(0x09, |header| header >> 24 == u32::from(kind));
        assert_eq!(machine.function.config_read(at + 1), 0, "BAR 0");
        assert_eq!(u64::from(machine.function.config_read(at + 2)), offset);
        assert_eq!(u64::from(machine.function.config_read(at + 3)), len);
    }
    let notify = machine.capability(0x09, |header| header >> 24 == u32::from(CFG_NOTIFY));
    assert_eq!(machine.function.config_read(notify + 4), NOTIFY_MULTIPLIER);
}

#[test]
fn a_request_goes_from_the_doorbell_to_the_interrupt() {
    let mut machine = machine();
    machine.run();
    let at = machine.offer();
    machine.doorbells.ring(machine.doorbell());
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
    assert_ne!(machine.driver.bytes(at, 16), [0; 16]);
}

#[test]
fn with_msix_the_interrupt_is_a_signal_of_its_route() {
    let mut machine = machine();
    machine.negotiate();
    machine.use_msix();
    machine.set_up_queue();
    machine.status(15);
    machine.offer();
    machine.doorbells.ring(machine.doorbell());
    machine.eventually(|machine| {
        let routes = machine.messages.routes();
        routes.iter().map(|route| route.signals()).sum::<u64>() == 1
    });
    assert!(machine.messages.take().is_empty(), "nothing is sent one by one");
    assert!(!machine.wire.0.load(Ordering::SeqCst));
    assert_eq!(machine.read(ISR.0, 1), 0);
}

#[test]
fn without_msix_the_wire_is_held_until_the_status_is_read() {
    let mut machine = machine();
    machine.run();
    machine.offer();
    machine.doorbells.ring(machine.doorbell());
    machine.eventually(|machine| machine.wire.0.load(Ordering::SeqCst));
    assert_eq!(machine.read(ISR.0, 1), u64::from(ISR_QUEUE));
    assert!(!machine.wire.0.load(Ordering::SeqCst));
    assert_eq!(machine.read(ISR.0, 1), 0, "reading cleared it");
}

#[test]
fn a_notification_that_exits_kicks_as_well() {
    let mut machine = machine();
    machine.run();
    machine.offer();
    machine.write(NOTIFY.0, 2, 0);
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
}

#[test]
fn doorbells_follow_the_bar() {
    let machine = machine();
    assert_eq!(machine.doorbells.addresses(), [ADDRESS + NOTIFY.0]);
    machine.function.bar_moved(0, Some(Gpa(0x1000_0000)));
    assert_eq!(machine.doorbells.addresses(), [0x1000_0000 + NOTIFY.0]);
    machine.function.bar_moved(0, None);
    assert!(machine.doorbells.addresses().is_empty());
    machine.function.bar_moved(0, Some(Gpa(u64::MAX - 0x10)));
    assert!(machine.doorbells.addresses().is_empty());
}

#[test]
fn without_doorbells_the_device_works_on() {
    let mut machine = machine();
    machine.doorbells.refuse.store(true, Ordering::SeqCst);
    machine.function.bar_moved(0, Some(Gpa(0x1000_0000)));
    assert!(machine.doorbells.addresses().is_empty());
    machine.run();
    machine.offer();
    machine.write(NOTIFY.0, 2, 0);
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
}

#[test]
fn a_broken_queue_needs_a_reset_and_works_after_it() {
    let mut machine = machine();
    machine.run();
    machine.driver.set_available_index(0x8000);
    machine.doorbells.ring(machine.doorbell());
    machine.eventually(|machine| machine.read(0x14, 1) == 0x40 | 15);
    assert_eq!(
        machine.read(ISR.0, 1),
        u64::from(ISR_CONFIGURATION),
        "the driver is told"
    );
    machine.status(0);
    assert_eq!(machine.read(0x14, 1), 0);
    machine.driver.set_available_index(0);
    machine.run();
    machine.offer();
    machine.doorbells.ring(machine.doorbell());
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
}

#[test]
fn a_queue_that_cannot_be_needs_a_reset() {
    let machine = machine();
    machine.negotiate();
    machine.write(0x20, 8, 8);
    machine.write(0x1c, 2, 1);
    machine.status(15);
    assert_eq!(machine.read(0x14, 1), 0x40 | 15);
    machine.status(0);
    assert_eq!(machine.read(0x14, 1), 0);
}

#[test]
fn after_a_reset_nothing_touches_memory() {
    let mut machine = machine();
    machine.run();
    machine.status(0);
    let at = machine.offer();
    machine.doorbells.ring(machine.doorbell());
    std::thread::sleep(Duration::from_millis(20));
    assert!(machine.driver.used().is_empty());
    assert_eq!(machine.driver.bytes(at, 16), [0; 16]);
    assert!(machine.function.life().workers.is_none());
}

#[test]
fn a_function_level_reset_forgets_everything() {
    let machine = machine();
    machine.use_msix();
    machine.run();
    machine.function.reset();
    assert!(machine.function.life().workers.is_none());
    assert_eq!(machine.read(0x14, 1), 0);
    assert_eq!(machine.read(0x1a, 2), u64::from(NO_VECTOR));
    let capability = machine.capability(0x11, |_| true);
    assert_eq!(machine.function.config_read(capability) >> 31, 0, "MSI-X is off");
}

#[test]
fn while_paused_requests_wait() {
    let mut machine = machine();
    machine.run();
    machine.function.pause();
    machine.offer();
    machine.doorbells.ring(machine.doorbell());
    std::thread::sleep(Duration::from_millis(20));
    assert!(machine.driver.used().is_empty());
    machine.function.resume();
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
}

// As when the machine starts again.
#[test]
fn a_device_that_was_reset_in_a_pause_works_after_it() {
    let mut machine = machine();
    machine.run();
    machine.function.pause();
    machine.function.reset();
    machine.function.resume();
    machine.function.bus_mastering(true);
    machine.run();
    machine.offer();
    machine.write(NOTIFY.0, 2, 0);
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
}

// As Linux suspends a function without a soft reset: its queues stay set up.
#[test]
fn without_bus_master_requests_wait_as_they_do_in_a_pause() {
    let mut machine = machine();
    machine.run();
    for round in 0..3 {
        machine.function.bus_mastering(false);
        machine.messages.requester().set_bus_master(false);
        machine.offer();
        // In the last round the doorbell is lost with the BAR, as in a sleep.
        if round < 2 {
            machine.doorbells.ring(machine.doorbell());
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(machine.driver.used().is_empty(), "round {round}");
        // The end of a pause changes nothing of it.
        machine.function.pause();
        machine.function.resume();
        std::thread::sleep(Duration::from_millis(20));
        assert!(machine.driver.used().is_empty(), "round {round}");
        machine.messages.requester().set_bus_master(true);
        machine.function.bus_mastering(true);
        machine.eventually(|machine| !machine.driver.used().is_empty());
        assert_eq!(
            machine.read(0x14, 1) & 0x40,
            0,
            "round {round}: no reset is needed"
        );
    }
}

#[test]
fn a_driver_that_starts_queues_before_bus_master_is_served_after_it() {
    let mut machine = machine();
    machine.function.bus_mastering(false);
    machine.messages.requester().set_bus_master(false);
    machine.run();
    machine.offer();
    machine.doorbells.ring(machine.doorbell());
    std::thread::sleep(Duration::from_millis(20));
    machine.messages.requester().set_bus_master(true);
    machine.function.bus_mastering(true);
    machine.eventually(|machine| machine.driver.used() == [(0, 16)]);
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let machine = machine();
    let at = machine.capability(0x09, |header| header >> 24 == u32::from(CFG_PCI));
    let set = |offset: u32, len: u32| {
        let _ = machine.function.config_write(at + 1, DwordWrite::whole(0));
        let _ = machine.function.config_write(at + 2, DwordWrite::whole(offset));
        let _ = machine.function.config_write(at + 3, DwordWrite::whole(len));
    };
    set(0x12, 2);
    assert_eq!(machine.function.config_read(at + 4), 1, "one queue");
    set(0x14, 1);
    let _ = machine
        .function
        .config_write(at + 4, DwordWrite::new(0, &[3]).expect("a lane"));
    assert_eq!(machine.read(0x14, 1), 3);
}

#[test]
fn a_window_that_leaves_the_bar_reads_zero_and_writes_nothing() {
    let machine = machine();
    let at = machine.capability(0x09, |header| header >> 24 == u32::from(CFG_PCI));
    for (bar, offset, len) in [
        (1, 0x12, 2),
        (6, 0x12, 2),
        (0xff, 0x12, 2),
        (0, 0x8000, 4),
        (0, 0x7ffe, 4),
        (0, 0xffff_fffc, 4),
        (0, 0x13, 2),
        (0, 0x12, 0),
        (0, 0x12, 3),
        (0, 0x10, 8),
        (0, 0x10, 0xffff_ffff),
    ] {
        let _ = machine.function.config_write(at + 1, DwordWrite::whole(bar));
        let _ = machine.function.config_write(at + 2, DwordWrite::whole(offset));
        let _ = machine.function.config_write(at + 3, DwordWrite::whole(len));
        assert_eq!(
            machine.function.config_read(at + 4),
            0,
            "{bar} {offset:#x} {len:#x}"
        );
        let _ = machine
            .function
            .config_write(at + 4, DwordWrite::whole(0xffff_ffff));
    }
    assert_eq!(machine.read(0x14, 1), 0);
}

#[test]
fn a_window_written_in_part_writes_nothing() {
    let machine = machine();
    let at = machine.capability(0x09, |header| header >> 24 == u32::from(CFG_PCI));
    let _ = machine.function.config_write(at + 2, DwordWrite::whole(0));
    let _ = machine.function.config_write(at + 3, DwordWrite::whole(4));
    let _ = machine
        .function
        .config_write(at + 4, DwordWrite::new(1, &[0xff]).expect("a lane"));
    assert_eq!(machine.read(0, 4), 0);
}

// Cloud Hypervisor 3b431afba and 7fbc5a135: a vector or a width nobody expected was a panic.
#[test]
fn every_width_at_every_offset_of_the_bar_is_harmless() {
    let machine = machine();
    machine.run();
    for offset in (0..0x50)
        .chain(0xff8..0x1008)
        .chain(0x1ff8..0x2010)
        .chain(0x2ff8..0x3410)
        .chain(0x3ff8..0x4040)
        .chain(0x47f8..0x4818)
        .chain(0x7ff0..0x8000)
    {
        for len in [1, 2, 4, 8].into_iter().filter(|len| offset + len <= 0x8000) {
            let len = usize::try_from(len).expect("small");
            let _ = machine.read(offset, len);
            machine.write(offset, len, 0xfffe_fffe_fffe_fffe);
        }
    }
    machine.status(0);
    assert_eq!(machine.read(0x14, 1), 0);
}

#[test]
fn a_reset_and_a_start_on_two_processors_end_in_one_state() {
    let machine = machine();
    for _ in 0..50 {
        machine.negotiate();
        machine.set_up_queue();
        std::thread::scope(|scope| {
            scope.spawn(|| machine.status(15));
            scope.spawn(|| machine.status(0));
        });
        assert_eq!(
            machine.function.life().workers.is_some(),
            machine.function.registers().running()
        );
        machine.status(0);
        assert!(machine.function.life().workers.is_none());
    }
}

struct TooMany;

impl VirtioDevice for TooMany {
    fn kind(&self) -> Kind {
        Kind::Rng
    }
    fn name(&self) -> &str {
        "many0"
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8; MOST_QUEUES + 1]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&self, _activation: Activation) -> Result<Vec<super::super::worker::Unit>, HostError> {
        Ok(Vec::new())
    }
}

#[test]
fn a_device_with_too_many_queues_is_refused_by_name() {
    let messages = Messages::new();
    let parts = VirtioPciParts {
        dma: Dma::new(messages.requester().clone(), Driver::new(8).ram()),
        msi: messages.port(),
        doorbells: Arc::new(Doorbells::default()),
        intx: None,
        on_root_bus: false,
        access_platform: false,
    };
    let error = VirtioPci::new(Arc::new(TooMany), parts).err().expect("refused");
    assert!(error.to_string().contains("many0 256 queues"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_accesses_to_bar_and_configuration_never_panic(
        accesses in prop::collection::vec((any::<bool>(), 0_u64..0x8000, 0_u32..4, any::<u64>()), 1..100),
    ) {
        let machine = machine();
        for (config, offset, width, value) in accesses {
            let dword = u16::try_from(offset % 1024).expect("small");
            let narrow = u32::try_from(value & 0xffff_ffff).expect("masked");
            let len = 1_u64 << width;
            if config {
                let _ = machine.function.config_write(dword % 0x40, DwordWrite::whole(narrow));
                let _ = machine.function.config_read(dword);
            } else {
                let offset = offset.min(0x8000 - len);
                let len = usize::try_from(len).expect("small");
                machine.write(offset, len, value);
                let _ = machine.read(offset, len);
            }
        }
        machine.function.reset();
        prop_assert!(machine.function.life().workers.is_none());
    }
}
