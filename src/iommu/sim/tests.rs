//! The host through its requests, with a guest in miniature that has rings and v2 tables in its RAM.

mod broken;
mod rings;

use std::sync::atomic::{AtomicBool, AtomicU64};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::memory::OWN;
use super::*;
use crate::iommu::amd::spec::dte::{Guest, Host};
use crate::pci::testing::Messages;
use crate::platform::addr::Gpa;
use crate::platform::bus::BusDevice;
use crate::platform::dma::Dma;

const RAM: u64 = 0x80_0000;
const RING: u64 = 0x1_0000;
const LOG: u64 = 0x2_0000;
const FLAG: u64 = 0x3_0000;
const PPR_LOG: u64 = 0x4_0000;
/// GCR3 tables, with page tables behind, one set for each guest domain.
const TABLES: u64 = 0x10_0000;
/// What the guest maps.
const BUFFER: u64 = 0x20_0000;
const OTHER_BUFFER: u64 = 0x20_1000;
/// Where, in its devices' addresses.
const AT: u64 = 0x1000;

const TAIL: u64 = 0x08;
const STATUS: u64 = 0x20;

/// The guest's own numbers of its devices.
const NAMES: [u16; 2] = [0x0008, 0x0100];

fn name(device: usize) -> Bdf {
    Bdf::from_requester_id(NAMES[device])
}

/// A host, and the guest that it serves.
struct Rig {
    ram: GuestRam,
    host: Arc<SimHost>,
    messages: Arc<Messages>,
    devices: [Dma; 2],
}

/// The guest's unit.
struct Served {
    id: ObjectId,
    page: Arc<dyn BusDevice>,
    vdevices: [ObjectId; 2],
}

fn errno<T>(outcome: io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

fn queue(kind: QueueKind, base: u64) -> Queue {
    Queue {
        kind,
        base: Gpa(base),
        length: 8,
        interrupts: true,
    }
}

/// An entry as Linux writes it for v2 tables in domain `domain`.
fn guest_dte(domain: u16) -> Dte {
    let entry = Dte {
        host: Host::new()
            .with_v(true)
            .with_tv(true)
            .with_gv(true)
            .with_giov(true)
            .with_ir(true)
            .with_iw(true),
        guest: Guest::new().with_domain(domain),
        ..Dte::default()
    };
    entry.with_gcr3_root(tables(domain))
}

fn tables(domain: u16) -> u64 {
    TABLES + u64::from(domain) * 0x8000
}

fn target(vector: u8) -> InterruptTarget {
    InterruptTarget {
        destination: 0x102,
        logical: false,
        vector,
    }
}

fn message(vector: u8) -> MsiMessage {
    MsiMessage::remapped(0x102, false, vector.into())
}

impl Rig {
    fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x80_0000)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        assert_eq!(ram.size(), RAM);
        let messages = Messages::new();
        let host = SimHost::new(SimParts {
            name: "iommu0".to_owned(),
            at: Sbdf {
                segment: 0,
                bdf: Bdf::from_requester_id(2),
            },
            ram: ram.clone(),
            devices: 2,
            ats: false,
            messages: messages.clone(),
        });
        let host = host.expect("memory and an eventfd");
        let devices = [0, 1].map(|device| {
            let requester = Arc::new(Requester::new(Sbdf {
                segment: 0,
                bdf: name(device),
            }));
            requester.set_bus_master(true);
            Dma::translated(requester, ram.clone(), host.translator(HostDevice(device)))
        });
        Self {
            ram,
            host,
            messages,
            devices,
        }
    }

    /// The guest's unit with names for both devices; rings run if `rings`.
    fn served(&self) -> Served {
        let Viommu { id, page } = self.host.viommu_alloc().expect("the first");
        let VfPage::Trapped(page) = page else {
            panic!("the model's page is no memory");
        };
        let vdevices = [0, 1].map(|device| {
            let vdevice = self.host.vdevice_alloc(id, HostDevice(device), name(device));
            vdevice.expect("a new name")
        });
        Served { id, page, vdevices }
    }

    /// The same, with rings.
    fn running(&self) -> (Served, [ObjectId; 2]) {
        let served = self.served();
        let queues = [(QueueKind::Command, RING), (QueueKind::Event, LOG)].map(|(kind, base)| {
            let made = self.host.queue_alloc(served.id, &queue(kind, base));
            made.expect("a ring")
        });
        (served, queues)
    }

    /// Attach `device` to tables of the guest's domain `domain`, which lead `AT` to `BUFFER`.
    fn nest(&self, served: &Served, device: usize, domain: u16) -> ObjectId {
        let base = tables(domain);
        self.store(base, (base + 0x1000) | 1);
        for level in 1..4 {
            let table = base + level * 0x1000;
            self.store(table, (table + 0x1000) | 7);
        }
        self.map(domain, BUFFER);
        let nested = self
            .host
            .nested_alloc(served.id, HostDevice(device), &guest_dte(domain))
            .expect("legal");
        self.host
            .attach(HostDevice(device), nested)
            .expect("it has a name");
        nested
    }

    /// Lead `AT` in tables of `domain` to `to`; 0 to nothing.
    fn map(&self, domain: u16, to: u64) {
        let entry = if to == 0 { 0 } else { to | 7 };
        self.store(tables(domain) + 0x4000 + AT / 0x1000 * 8, entry);
    }

    fn store(&self, at: u64, value: u64) {
        self.ram.write_obj(Gpa(at), &value).expect("RAM");
    }

    fn load(&self, at: u64) -> u64 {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }

    /// Whether `device` may write `value` at `at`.
    fn dma(&self, device: usize, at: u64, value: u64) -> bool {
        self.devices[device]
            .view()
            .write_obj(value, GuestAddress(at))
            .is_ok()
    }

    /// Put commands into the guest's ring, and ring.
    fn submit(&self, served: &Served, commands: &[[u64; 2]]) {
        let mut tail = u64::from(served.read(TAIL));
        for [low, high] in commands {
            self.store(RING + tail, *low);
            self.store(RING + tail + 8, *high);
            tail = (tail + 16) % 0x1000;
        }
        served.write(TAIL, u32::try_from(tail).expect("in the ring"));
    }

    /// The same with a COMPLETION_WAIT that has to answer.
    fn flush(&self, served: &Served, commands: &[[u64; 2]]) {
        self.store(FLAG, 0);
        let wait = [1 << 60 | FLAG | 1, 0x5a];
        self.submit(served, &[commands, &[wait]].concat());
        assert_eq!(self.load(FLAG), 0x5a, "the wait was answered");
    }

    /// Record `at` of the guest's event log.
    fn event(&self, at: u64) -> [u32; 4] {
        self.ram.read_obj(Gpa(LOG + 16 * at)).expect("RAM")
    }
}

impl Served {
    fn read(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.page.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, at: u64, value: u32) {
        self.page.write(at, &value.to_le_bytes());
    }
}

/// INVALIDATE_IOMMU_PAGES of all of a domain's PASID 0.
const fn forget(domain: u16) -> [u64; 2] {
    [3 << 60 | (domain as u64) << 32, 0x7fff_ffff_ffff_f007]
}

#[test]
fn a_guests_unit_lives_from_its_making_to_its_end() {
    let rig = Rig::new();
    assert!(!rig.dma(0, AT, 1), "nothing is reached at first");
    let (served, queues) = rig.running();
    let nested = [rig.nest(&served, 0, 1), rig.nest(&served, 1, 2)];
    assert!(rig.dma(0, AT, 7));
    assert_eq!(rig.load(BUFFER), 7);
    assert!(!rig.dma(0, BUFFER, 7), "not by the physical address");
    // The guest moves the page of one device, and says so.
    rig.map(1, OTHER_BUFFER);
    assert!(rig.dma(0, AT, 8));
    assert_eq!(rig.load(OTHER_BUFFER), 0, "as it is cached");
    rig.flush(&served, &[forget(2)]);
    assert!(rig.dma(0, AT, 8));
    assert_eq!(rig.load(OTHER_BUFFER), 0, "another domain was meant");
    rig.flush(&served, &[forget(1)]);
    assert!(rig.dma(0, AT, 9) && rig.dma(1, AT, 10));
    assert_eq!((rig.load(OTHER_BUFFER), rig.load(BUFFER)), (9, 10));
    assert_eq!(rig.host.counts().commands[..3], [2, 0, 2]);
    assert_eq!(rig.host.counts().doorbells, 2);
    assert!(rig.host.counts().hits > 0 && rig.host.counts().walks > 0);
    // To the end, in order.
    for id in queues {
        rig.host.destroy(id).expect("nothing uses a ring");
    }
    for device in [0, 1] {
        rig.host.attach(HostDevice(device), PARENT).expect("always there");
    }
    for id in nested.into_iter().chain(served.vdevices).chain([served.id]) {
        rig.host.destroy(id).expect("nothing uses it any more");
        assert_eq!(errno(rig.host.destroy(id)), Some(libc::ENOENT));
    }
    assert_eq!(served.read(STATUS), u32::MAX, "nothing answers");
    let (again, _) = rig.running();
    assert_eq!(again.read(TAIL), 0);
    assert_eq!(served.read(TAIL), u32::MAX, "not for the one before");
    rig.flush(&again, &[]);
}

#[test]
fn a_fault_is_in_the_guests_log_by_its_own_number_and_interrupts() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    rig.nest(&served, 1, 1);
    rig.host
        .route(served.id, UnitInterrupt::Event, Some(target(0x41)))
        .expect("a unit");
    rig.map(1, 0);
    assert!(!rig.dma(1, AT, 1));
    assert_eq!(rig.event(0), [0x0100, 0x2021_0000, 0x1000, 0]);
    assert_eq!(served.read(STATUS) & 2, 2);
    assert_eq!(rig.messages.take(), [message(0x41)]);
    assert!(!rig.dma(1, AT, 1));
    assert_eq!(rig.messages.take(), [], "the bit was not cleared");
    served.write(STATUS, 2);
    rig.map(1, BUFFER);
    assert!(rig.dma(1, AT, 1), "what is absent is not cached");
    assert_eq!(rig.host.counts().events[2], 2);
    assert_eq!(rig.host.host_counts().events, [0; 16]);
}

#[test]
fn devices_pass_through_or_reach_nothing_without_the_guest_knowing() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    let device = HostDevice(0);
    rig.host.attach(device, rig.host.parent()).expect("always there");
    assert!(rig.dma(0, BUFFER, 5));
    assert_eq!(rig.load(BUFFER), 5);
    for outside in [RAM, OWN, OWN + 0x20_0000] {
        assert!(!rig.dma(0, outside, 6), "{outside:#x}");
    }
    rig.host.attach(device, rig.host.blocked()).expect("always there");
    assert!(!rig.dma(0, BUFFER, 6));
    assert_eq!(rig.load(BUFFER), 5);
    assert_eq!(served.read(0x18), 0, "the guest's log is empty");
    assert_eq!(rig.host.host_counts().events[2], 4);
    // Again, so that the log was read and goes on.
    for _ in 0..1_000 {
        assert!(!rig.dma(0, BUFFER, 6));
    }
    assert_eq!(rig.host.host_counts().events[2], 1_004);
}

#[test]
fn a_guest_that_leads_its_tables_elsewhere_reaches_nothing_of_the_hosts() {
    let rig = Rig::new();
    let (served, queues) = rig.running();
    rig.nest(&served, 0, 1);
    for outside in [RAM, OWN, OWN + 0x20_0000, 0x000f_ffff_ffff_f000] {
        rig.map(1, outside);
        assert!(!rig.dma(0, AT, 1), "{outside:#x}");
    }
    assert_eq!(rig.host.host_counts().events[2], 4, "the host's table refused it");
    assert_eq!(served.read(0x18), 0);
    // Nor do its rings.
    for outside in [RAM, OWN + 0x20_0000] {
        for id in queues {
            let _ = rig.host.destroy(id);
        }
        let made = rig
            .host
            .queue_alloc(served.id, &queue(QueueKind::Command, outside));
        let log = rig
            .host
            .queue_alloc(served.id, &queue(QueueKind::Event, LOG))
            .expect("one");
        served.write(0x18, 0);
        served.write(TAIL, 0x10);
        assert_eq!(served.read(STATUS) & 0x10, 0, "the ring stopped");
        let at = served.read(0x18) / 16 - 1;
        assert_eq!(rig.event(at.into())[1], 0x6400_0000);
        served.write(TAIL, 0);
        for id in [made.expect("where it is, is the guest's affair"), log] {
            rig.host.destroy(id).expect("made above");
        }
    }
}

#[test]
fn what_the_kernel_refuses_is_refused() {
    let rig = Rig::new();
    let none = ObjectId(77);
    assert_eq!(
        errno(rig.host.vdevice_alloc(none, HostDevice(0), name(0))),
        Some(libc::ENOENT)
    );
    assert_eq!(
        errno(rig.host.vdevice_alloc(PARENT, HostDevice(0), name(0))),
        Some(libc::EINVAL)
    );
    let served = rig.served();
    let id = served.id;
    assert_eq!(errno(rig.host.viommu_alloc().map(drop)), Some(libc::EBUSY));
    let vdevice = |device, bdf| errno(rig.host.vdevice_alloc(id, HostDevice(device), bdf));
    assert_eq!(
        vdevice(0, Bdf::from_requester_id(0x18)),
        Some(libc::EEXIST),
        "it has a name"
    );
    assert_eq!(vdevice(2, Bdf::from_requester_id(0x18)), Some(libc::ENOENT));
    rig.host.destroy(served.vdevices[1]).expect("unused");
    assert_eq!(vdevice(1, name(0)), Some(libc::EEXIST), "another's name");
    assert_eq!(
        errno(
            rig.host
                .nested_alloc(served.vdevices[0], HostDevice(0), &guest_dte(1))
        ),
        Some(libc::EINVAL)
    );

    assert_eq!(
        errno(rig.host.nested_alloc(id, HostDevice(2), &guest_dte(1))),
        Some(libc::ENOENT)
    );

    let refused = |change: fn(&mut Dte)| {
        let mut dte = guest_dte(1);
        change(&mut dte);
        errno(rig.host.nested_alloc(id, HostDevice(0), &dte))
    };
    assert_eq!(refused(|dte| dte.host.set_v(false)), Some(libc::EINVAL));
    assert_eq!(refused(|dte| dte.host.set_mode(4)), Some(libc::EINVAL));
    assert_eq!(refused(|dte| dte.host.set_root(1)), Some(libc::EINVAL));
    assert_eq!(refused(|dte| dte.host.set_glx(3)), Some(libc::EINVAL));
    assert_eq!(refused(|dte| *dte = dte.with_gcr3_root(0)), Some(libc::EINVAL));
    assert_eq!(
        refused(|dte| dte.interrupt.set_guest_paging_mode(1)),
        Some(libc::EOPNOTSUPP)
    );
    assert_eq!(
        refused(|dte| dte.interrupt.set_guest_paging_mode(2)),
        Some(libc::EINVAL)
    );

    let refused = |change: fn(&mut Queue)| {
        let mut queue = queue(QueueKind::Command, RING);
        change(&mut queue);
        errno(rig.host.queue_alloc(id, &queue))
    };
    assert_eq!(refused(|queue| queue.length = 7), Some(libc::EINVAL));
    assert_eq!(refused(|queue| queue.length = 16), Some(libc::EINVAL));
    assert_eq!(refused(|queue| queue.base = Gpa(RING + 8)), Some(libc::EINVAL));
    assert_eq!(refused(|queue| queue.base = Gpa(1 << 52)), Some(libc::EINVAL));
    assert_eq!(refused(|_| ()), None);
    assert_eq!(refused(|_| ()), Some(libc::EEXIST));

    let nested = rig
        .host
        .nested_alloc(id, HostDevice(0), &guest_dte(1))
        .expect("legal");
    let attach = |device, table| errno(rig.host.attach(HostDevice(device), table));
    assert_eq!(
        attach(1, nested),
        Some(libc::EINVAL),
        "the guest has no name for it"
    );
    assert_eq!(attach(0, id), Some(libc::EINVAL), "no table");
    assert_eq!(attach(0, none), Some(libc::ENOENT));
    assert_eq!(attach(2, PARENT), Some(libc::ENOENT));
    assert!(!rig.dma(0, AT, 1) && !rig.dma(0, BUFFER, 1), "nothing changed");
    let route = rig.host.route(id, UnitInterrupt::Event, Some(target(0)));
    assert_eq!(errno(route), Some(libc::EINVAL));
}

#[test]
fn what_is_used_is_not_destroyed() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    let nested = rig.nest(&served, 0, 1);
    for id in [PARENT, BLOCKED, served.id, served.vdevices[0], nested] {
        assert_eq!(errno(rig.host.destroy(id)), Some(libc::EBUSY), "{id:?}");
    }
    assert!(rig.dma(0, AT, 3), "and works on");
    rig.host.attach(HostDevice(0), BLOCKED).expect("always there");
    rig.host.destroy(nested).expect("unused");
    rig.host.destroy(served.vdevices[0]).expect("unused");
}

#[test]
fn tables_of_one_domain_share_its_number_and_the_last_takes_it_along() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    let first = rig.nest(&served, 0, 1);
    let second = rig.nest(&served, 1, 1);
    assert!(rig.dma(0, AT, 1) && rig.dma(1, AT, 1));
    rig.map(1, OTHER_BUFFER);
    rig.flush(&served, &[forget(1)]);
    assert!(rig.dma(0, AT, 2) && rig.dma(1, AT, 3));
    assert_eq!((rig.load(BUFFER), rig.load(OTHER_BUFFER)), (1, 3));
    rig.host.attach(HostDevice(0), BLOCKED).expect("always there");
    rig.host.destroy(first).expect("unused");
    rig.map(1, BUFFER);
    rig.flush(&served, &[forget(1)]);
    assert!(rig.dma(1, AT, 4));
    assert_eq!(rig.load(BUFFER), 4, "the domain is still known");
    rig.host.attach(HostDevice(1), BLOCKED).expect("always there");
    rig.host.destroy(second).expect("unused");
    // The same number of the host's may serve another domain now, and knows nothing.
    rig.nest(&served, 1, 2);
    rig.map(2, OTHER_BUFFER);
    assert!(rig.dma(1, AT, 5));
    assert_eq!(rig.load(OTHER_BUFFER), 5);
}

#[test]
fn every_domain_of_a_guest_has_a_number_until_there_are_no_more() {
    let mut objects = Objects::new(0);
    let mut last = 0;
    for domain in 0..=u16::MAX {
        match objects.enter_domain(domain) {
            Ok((host, new)) => {
                assert!(new && host >= kernel::FIRST_DOMAIN, "{domain}");
                last = host;
            }
            Err(error) => {
                assert_eq!((last, domain), (u16::MAX, u16::MAX - 0xff));
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                break;
            }
        }
    }
    assert!(objects.leave_domain(5));
    assert_eq!(
        objects.enter_domain(u16::MAX).expect("one is free"),
        (0x105, true)
    );
}

#[test]
fn an_interrupt_waits_until_it_has_somewhere_to_go() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    rig.submit(&served, &[[1 << 60 | 2, 0]]);
    assert_eq!(rig.messages.take(), []);
    let route = |target| {
        rig.host
            .route(served.id, UnitInterrupt::Event, target)
            .expect("a unit")
    };
    route(Some(target(0x31)));
    assert_eq!(rig.messages.take(), [message(0x31)]);
    route(Some(target(0x32)));
    assert_eq!(rig.messages.take(), [], "it went out");
    served.write(STATUS, 4);
    rig.submit(&served, &[[1 << 60 | 2, 0]]);
    assert_eq!(rig.messages.take(), [message(0x32)]);
    route(None);
    served.write(STATUS, 4);
    rig.submit(&served, &[[1 << 60 | 2, 0]]);
    rig.host.reset();
    route(Some(target(0x33)));
    assert_eq!(rig.messages.take(), [], "the machine was reset");
}

#[test]
fn a_ring_that_does_not_interrupt_interrupts_nobody() {
    let rig = Rig::new();
    let served = rig.served();
    let quiet = Queue {
        interrupts: false,
        ..queue(QueueKind::Command, RING)
    };
    rig.host.queue_alloc(served.id, &quiet).expect("a ring");
    rig.host
        .route(served.id, UnitInterrupt::Event, Some(target(0x41)))
        .expect("a unit");
    rig.submit(&served, &[[1 << 60 | 2, 0]]);
    assert_eq!(served.read(STATUS) & 4, 4);
    assert_eq!(rig.messages.take(), []);
}

#[test]
fn the_host_adds_to_the_guests_log_and_resets_its_page() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    let record = [0x0008, 0x10a0_0000, 0x2345_6788, 1];
    rig.host
        .insert_event(served.id, record)
        .expect("it has such a request");
    assert_eq!(rig.event(0), record);
    assert_eq!(served.read(0x18), 0x10);
    let refused = rig.host.insert_event(served.id, [8, 0x2000_0001, 0, 0]);
    assert_eq!(errno(refused), Some(libc::EINVAL));
    assert_eq!(served.read(0x18), 0x10);
    rig.submit(&served, &[[0, 0]]);
    assert_eq!(served.read(STATUS) & 0x10, 0, "stopped");
    rig.host.reset_page(served.id).expect("it has such a request");
    assert_eq!(
        (served.read(0x18), served.read(TAIL), served.read(STATUS)),
        (0, 0, 0x18)
    );
    rig.flush(&served, &[]);
    for id in [PARENT, ObjectId(77)] {
        assert!(rig.host.reset_page(id).is_err() && rig.host.insert_event(id, record).is_err());
    }
}

#[test]
fn a_long_ring_goes_on_from_the_event_loop() {
    let rig = Rig::new();
    let served = rig.served();
    let long = Queue {
        length: 12,
        ..queue(QueueKind::Command, RING)
    };
    rig.host.queue_alloc(served.id, &long).expect("a ring");
    for entry in 0..2_000 {
        rig.store(RING + 16 * entry, 2 << 60);
        rig.store(RING + 16 * entry + 8, 0);
    }
    served.write(TAIL, 2_000 * 16);
    assert_eq!(served.read(0x00), 1_024 * 16);
    rig.host.run_commands();
    assert_eq!(served.read(0x00), 2_000 * 16);
    rig.host.run_commands();
    assert!(rig.host.more.read().is_err(), "nothing is left");
    assert!(rig.host.as_raw_fd() >= 0);
}

#[test]
fn page_requests_have_a_ring_of_their_own() {
    let rig = Rig::new();
    let (served, _) = rig.running();
    assert_eq!(served.read(STATUS) & 0x80, 0);
    let ppr = rig
        .host
        .queue_alloc(served.id, &queue(QueueKind::Ppr, PPR_LOG))
        .expect("a ring");
    assert_eq!(served.read(STATUS) & 0x80, 0x80);
    rig.host.destroy(ppr).expect("made above");
    assert_eq!(served.read(STATUS) & 0x80, 0);
}

/// What the window shows.
struct Window(Arc<[AtomicU64; 8]>);

impl RegisterWindow for Window {
    fn show(&self, offset: u64, value: u64) {
        self.0[usize::try_from(offset / 8).expect("small")].store(value, Ordering::Relaxed);
    }
}

#[test]
fn a_window_shows_the_guests_page() {
    let rig = Rig::new();
    let shown = Arc::new(std::array::from_fn(|_| AtomicU64::new(9)));
    rig.host.show_registers(Box::new(Window(shown.clone())));
    let (served, _) = rig.running();
    rig.flush(&served, &[]);
    let value = |at: usize| shown[at / 8].load(Ordering::Relaxed);
    assert_eq!((value(0x00), value(0x08), value(0x20)), (0x10, 0x10, 0x18));
    let state = rig.host.state();
    assert!(state.contains("commands head 0x10, tail 0x10"), "{state}");
    assert!(state.contains("devices reach nothing, nothing"), "{state}");
}

#[test]
fn once_a_device_is_blocked_nothing_of_it_arrives() {
    let rig = Rig::new();
    let device = HostDevice(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut value = 0;
            while !stop.load(Ordering::Relaxed) {
                value += 1;
                rig.dma(0, BUFFER, value);
            }
        });
        for _ in 0..50 {
            rig.host.attach(device, PARENT).expect("always there");
            rig.host.attach(device, BLOCKED).expect("always there");
            let before = rig.load(BUFFER);
            std::thread::yield_now();
            assert_eq!(rig.load(BUFFER), before);
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().expect("no panic");
    });
}

#[test]
fn hosts_that_cannot_be_are_refused() {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a mapping");
    let parts = |devices, ram| SimParts {
        name: "iommu0".to_owned(),
        at: Sbdf::default(),
        ram: GuestRam::new(ram),
        devices,
        ats: false,
        messages: Messages::new(),
    };
    assert!(SimHost::new(parts(MOST_DEVICES, ram.clone())).is_ok());
    let refused = SimHost::new(parts(MOST_DEVICES + 1, ram))
        .err()
        .expect("too many");
    assert_eq!(refused.to_string(), "cannot model the host's unit behind iommu0");
    let high = GuestMemoryMmap::from_ranges(&[(GuestAddress(OWN), 0x1000)]).expect("a mapping");
    assert!(SimHost::new(parts(1, high)).is_err());
}

#[test]
fn features_are_those_of_a_unit_that_serves_guests() {
    let features = Rig::new().host.features().expect("always known");
    assert_eq!(features.efr >> 55 & 1, 1);
    assert_eq!(features.efr2 & 8, 8);
    // GT, XT, GIO, and page requests.
    assert_eq!(features.efr & (1 << 48 | 0x16), 1 << 48 | 0x16);
}
