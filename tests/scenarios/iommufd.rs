//! The objects of the kernel's that mode `hw` is made of, real ones: those of iommufd's own mock of a unit.
//!
//! They need a kernel with CONFIG_IOMMUFD_TEST, which the lab's has, and no hardware. The mock has vIOMMUs with a page to
//! map, queues, nested tables and event queues of a type of its own; [`Mock`] says AMD's words in the mock's.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use ravelin::iommu::amd::features::Wanted;
use ravelin::iommu::amd::spec::dte::{Dte, Host};
use ravelin::iommu::amd::spec::event::Record;
use ravelin::iommu::iommufd::viommu::{Functions, HwDevice, HwHost, HwParts, NestParent};
use ravelin::iommu::iommufd::{Abi, Attach, Ioas, Iommufd, Kernel, Memlock};
use ravelin::iommu::viommu::features::offer;
use ravelin::iommu::viommu::host::{HostDevice, HostEvent, Queue, QueueKind, VfPage, Viommu, ViommuHost};
use ravelin::iommu::viommu::{ServedParts, ServedUnit};
use ravelin::platform::addr::{Bdf, Gpa, GpaRange, Sbdf};
use ravelin::platform::bus::BusDevice;
use ravelin::platform::device_memory::DeviceMemory;
use ravelin::platform::dma::Requester;
use ravelin::platform::host::HostError;
use ravelin::platform::memory::GuestRam;
use ravelin::platform::protection::{Watcher, WriteProtection};
use ravelin::vm::events::EventLoop;
use ravelin::vm::unit_signals::UnitSignals;

const DESTROY: u32 = 0x80;
const HWPT_ALLOC: u32 = 0x89;
/// IOMMU_HWPT_ALLOC_NEST_PARENT.
const NEST_PARENT: u32 = 1;
const GET_HW_INFO: u32 = 0x8a;
const VIOMMU_ALLOC: u32 = 0x90;
const HW_QUEUE_ALLOC: u32 = 0x94;
/// IOMMU_TEST_CMD.
const TEST: u32 = 0xa0;
/// What the test command does: make a device, attach one to other tables, have one report an event.
const MOCK_DOMAIN: u32 = 2;
const MOCK_DOMAIN_REPLACE: u32 = 10;
const TRIGGER_VEVENT: u32 = 17;
/// Bytes of the test command's structure.
const TEST_LEN: u32 = 72;

/// Types of the mock's vIOMMUs and queues.
const SELFTEST: u32 = 0xdead_beef;
/// Its nested tables.
const SELFTEST_TABLES: u32 = 0xdead;
/// Where guest memory begins: the mock's addresses do at 16 MiB.
const RAM: u64 = 0x100_0000;
const PAGE: u64 = 0x1000;

/// How the mock has it, over the version with queues.
const ABI: &str = "base = 'v-e'\nviommu-type = 0xdeadbeef\n\
    [user-data]\nlen = 24\nmmap-offset = 8\nhost-iommu = 0\nguest-id = 4\n\
    [queues]\ncommand = 0xdeadbeef\ncommand-enable = 0\ncommand-interrupts = 0\n\
    [events]\ntype = 0xbeefbeef\nrecord = 4\n";

/// A structure of words, which begins with its size in bytes.
fn words(words: &[u32]) -> Vec<u8> {
    let size = u32::try_from(4 * (words.len() + 1)).expect("a few dozen");
    let all = std::iter::once(&size).chain(words);
    all.flat_map(|word| word.to_le_bytes()).collect()
}

fn word(structure: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(structure[at..at + 4].try_into().expect("four bytes"))
}

fn set(structure: &mut [u8], at: usize, value: u32) {
    structure[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().expect("refused").raw_os_error()
}

/// The kernel's test command `operation` on object `id`, with further words; the structure as it came back.
fn test(kernel: &dyn Kernel, operation: u32, id: u32, further: &[u32]) -> io::Result<Vec<u8>> {
    let mut structure = words(&[operation, id, 0]);
    structure.extend(further.iter().flat_map(|word| word.to_le_bytes()));
    structure.resize(TEST_LEN as usize, 0);
    set(&mut structure, 0, TEST_LEN);
    kernel.request(TEST, &mut structure, &mut [])?;
    Ok(structure)
}

/// The kernel, for whoever takes its mock for a unit of AMD's.
struct Mock(Arc<Iommufd>);

impl Kernel for Mock {
    fn request(&self, number: u32, argument: &mut [u8], data: &mut [u8]) -> io::Result<()> {
        match number {
            GET_HW_INFO => {
                self.0.request(number, argument, data)?;
                assert_eq!(word(argument, 24), 0xfeed_beef, "the mock is no unit of AMD's");
                // It lends what the front end cannot do without.
                set(argument, 24, 4);
                set(argument, 12, 16);
                let (efr, efr2) = (1_u64 << 55 | 1 << 48 | 1 << 4, 1_u64 << 3);
                data.copy_from_slice(&[efr.to_le_bytes(), efr2.to_le_bytes()].concat());
                Ok(())
            }
            HWPT_ALLOC if word(argument, 24) == 3 => {
                assert_eq!(data.len(), 32, "an entry of a device table");
                set(argument, 24, SELFTEST_TABLES);
                let answer = self.0.request(number, argument, &mut [0; 8]);
                set(argument, 24, 3);
                answer
            }
            // AMD's lengths are logarithms, of which 1 is none; the mock's are bytes.
            HW_QUEUE_ALLOC if word(argument, 32) == 1 => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            _ => self.0.request(number, argument, data),
        }
    }

    fn event_queue(&self, argument: &mut [u8]) -> io::Result<OwnedFd> {
        self.0.event_queue(argument)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        assert_eq!(len, PAGE, "AMD's is one page");
        assert_eq!(
            errno(self.0.map(offset, len)),
            Some(libc::ENXIO),
            "the mock's are two"
        );
        assert_eq!(errno(self.0.map(offset + PAGE, len)), Some(libc::ENXIO));
        self.0.map(offset, 2 * PAGE)
    }
}

/// A device of the mock's: its object, and the tables it goes back to.
struct MockDevice {
    kernel: Arc<Iommufd>,
    object: u32,
    home: u32,
}

impl Attach for MockDevice {
    fn attach(&self, table: u32) -> io::Result<()> {
        test(&*self.kernel, MOCK_DOMAIN_REPLACE, self.object, &[table]).map(drop)
    }

    fn detach(&self) -> io::Result<()> {
        self.attach(self.home)
    }
}

/// An open iommufd with guest memory of 2 MiB in an address space, and devices of the mock's.
struct Bench {
    iommufd: Arc<Iommufd>,
    kernel: Arc<dyn Kernel>,
    ioas: Ioas,
    /// An address space with nothing in it, where devices are at first.
    home: u32,
}

impl Bench {
    fn new() -> Self {
        let iommufd = Iommufd::open().expect("/dev/iommu, and root");
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), 2 << 20)]).expect("memory");
        let ioas = Ioas::new(iommufd.clone(), GuestRam::new(ram)).expect("an address space");
        ioas.map_ram(Memlock::here()).expect("mapped");
        let mut structure = words(&[0, 0]);
        iommufd.request(0x81, &mut structure, &mut []).expect("another");
        Self {
            kernel: Arc::new(Mock(iommufd.clone())),
            iommufd,
            ioas,
            home: word(&structure, 8),
        }
    }

    /// A device, by the number of its binding, and by what attaches it.
    fn device(&self) -> (u32, Arc<MockDevice>) {
        let made = test(&*self.iommufd, MOCK_DOMAIN, self.home, &[]).unwrap_or_else(|error| {
            panic!(
                "no device of the mock's: {error}; the kernel needs CONFIG_IOMMUFD_TEST, as the lab's has it"
            )
        });
        let device = MockDevice {
            kernel: self.iommufd.clone(),
            object: word(&made, 16),
            home: self.home,
        };
        (word(&made, 24), Arc::new(device))
    }

    fn host(&self) -> (Arc<HwHost>, [u32; 2], [Arc<MockDevice>; 2]) {
        let (ids, devices): (Vec<u32>, Vec<Arc<MockDevice>>) =
            [self.device(), self.device()].into_iter().unzip();
        let parent = NestParent::new(&self.kernel, ids[0], self.ioas.id()).expect("a nest parent");
        let hw = ids.iter().zip(&devices).map(|(id, function)| HwDevice {
            id: *id,
            function: function.clone(),
        });
        let function = Bdf::from_requester_id;
        let host = HwHost::new(HwParts {
            name: "viommu0".to_owned(),
            kernel: self.kernel.clone(),
            parent,
            devices: hw.collect(),
            abis: vec![Abi::from_toml(ABI).expect("a table")],
            functions: Functions {
                host_iommu: function(0x4002),
                guest_iommu: function(0x10),
                translate_device: function(0x4800),
            },
            processors: None,
        })
        .expect("a host");
        let pair = |devices: Vec<_>| devices.try_into().ok().expect("two");
        (host, pair_of(ids), pair(devices))
    }

    fn request(&self, number: u32, structure: &[u32]) -> io::Result<Vec<u8>> {
        let mut structure = words(structure);
        self.iommufd.request(number, &mut structure, &mut [])?;
        Ok(structure)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        self.request(DESTROY, &[id]).map(drop)
    }
}

fn pair_of(ids: Vec<u32>) -> [u32; 2] {
    ids.try_into().expect("two")
}

const NIC: HostDevice = HostDevice(0);
const DISK: HostDevice = HostDevice(1);

fn name(number: u16) -> Bdf {
    Bdf::from_requester_id(number)
}

fn ring(kind: QueueKind) -> Queue {
    Queue {
        kind,
        base: Gpa(RAM + PAGE),
        length: 9,
        interrupts: false,
    }
}

fn entry() -> Dte {
    let host = Host::new().with_v(true).with_gv(true).with_giov(true);
    let dte = Dte {
        host,
        ..Dte::default()
    };
    dte.with_gcr3_root(RAM)
}

fn kind<T>(result: io::Result<T>) -> io::ErrorKind {
    result.err().expect("refused").kind()
}

#[test]
fn a_guests_life_is_made_of_the_kernels_own_objects_and_ends_without_any() {
    let bench = Bench::new();
    for _ in 0..2 {
        let (host, ids, devices) = bench.host();
        let Viommu { id: viommu, page } = host.viommu_alloc().expect("made");
        let VfPage::Mapped(memory) = &page else {
            panic!("memory of the kernel's");
        };
        assert_eq!(memory.len(), 2 * PAGE);
        let vdevice = host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
        assert_eq!(
            kind(host.vdevice_alloc(viommu, NIC, name(0x2108))),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(
            kind(host.vdevice_alloc(viommu, DISK, name(0x2100))),
            io::ErrorKind::AlreadyExists
        );
        let nested = host.nested_alloc(viommu, NIC, &entry()).expect("made");
        host.attach(NIC, host.parent()).expect("passes through");
        host.attach(NIC, nested).expect("translated");
        let command = host.queue_alloc(viommu, &ring(QueueKind::Command)).expect("made");
        // The mock has queues of one type only.
        assert_eq!(
            kind(host.queue_alloc(viommu, &ring(QueueKind::Event))),
            io::ErrorKind::Unsupported
        );
        // Whatever is used stays, by the kernel itself.
        for used in [viommu, nested, host.parent(), host.blocked()] {
            assert_eq!(errno(bench.destroy(used.0)), Some(libc::EBUSY), "{used:?}");
        }
        let (events, reader) = host.events_alloc(viommu).expect("made");
        assert_eq!(reader.take().expect("open"), []);
        test(&*bench.iommufd, TRIGGER_VEVENT, 0, &[ids[0]]).expect("reported");
        test(&*bench.iommufd, TRIGGER_VEVENT, 0, &[ids[0]]).expect("reported");
        let told = HostEvent::Record(Record::new().with_device(0x2100));
        assert_eq!(reader.take().expect("open"), [told.clone(), told.clone()]);
        // 512 fit, and three are too many.
        for _ in 0..515 {
            test(&*bench.iommufd, TRIGGER_VEVENT, 0, &[ids[0]]).expect("reported");
        }
        let mut all = Vec::new();
        loop {
            let some = reader.take().expect("open");
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        assert_eq!(all.len(), 513);
        assert_eq!(all.last(), Some(&HostEvent::Lost(3)));
        test(&*bench.iommufd, TRIGGER_VEVENT, 0, &[ids[0]]).expect("reported");
        assert_eq!(reader.take().expect("open"), [told], "nothing is lost twice");
        assert_eq!(
            kind(host.destroy(events)),
            io::ErrorKind::ResourceBusy,
            "somebody reads it"
        );
        drop(reader);
        host.destroy(events).expect("nobody does");

        host.destroy(command).expect("unused");
        host.attach(NIC, host.blocked()).expect("reaches nothing");
        host.destroy(nested).expect("unused");
        host.destroy(vdevice).expect("unused");
        assert_eq!(
            kind(host.destroy(viommu)),
            io::ErrorKind::ResourceBusy,
            "its page is mapped"
        );
        drop(page);
        host.destroy(viommu).expect("unused");
        assert_eq!(errno(bench.destroy(viommu.0)), Some(libc::ENOENT));

        // Once more, and the host ends with all of it there.
        let Viommu { id: viommu, page } = host.viommu_alloc().expect("made");
        host.vdevice_alloc(viommu, DISK, name(0x2100)).expect("made");
        let nested = host.nested_alloc(viommu, DISK, &entry()).expect("made");
        host.attach(DISK, nested).expect("translated");
        host.queue_alloc(viommu, &ring(QueueKind::Command)).expect("made");
        drop(page);
        let parent = host.parent();
        drop(host);
        for gone in [viommu, nested, parent] {
            assert_eq!(errno(bench.destroy(gone.0)), Some(libc::ENOENT), "{gone:?}");
        }
        for device in devices {
            bench.destroy(device.object).expect("nobody uses it");
        }
    }
    // Nothing hangs on either address space any more.
    bench.destroy(bench.home).expect("unused");
}

#[test]
fn a_viommu_of_another_type_or_over_other_tables_is_refused() {
    let bench = Bench::new();
    let (id, _device) = bench.device();
    let tables = |flags: u32| {
        let made = bench.request(HWPT_ALLOC, &[flags, id, bench.ioas.id(), 0, 0, 0, 0, 0, 0, 0, 0]);
        word(&made.expect("made"), 16)
    };
    let (tables, over) = (tables(0), tables(NEST_PARENT));
    let viommu = |viommu_type: u32, over: u32, data: &mut [u8]| {
        let mut structure = words(&[0, viommu_type, id, over, 0, 0, 0, 0, 0]);
        bench.iommufd.request(VIOMMU_ALLOC, &mut structure, data)?;
        io::Result::Ok(word(&structure, 20))
    };
    assert_eq!(errno(viommu(0, over, &mut [])), Some(libc::EOPNOTSUPP));
    assert_eq!(
        errno(viommu(3, over, &mut [])),
        Some(libc::EOPNOTSUPP),
        "AMD's type"
    );
    assert_eq!(
        errno(viommu(SELFTEST, tables, &mut [])),
        Some(libc::EINVAL),
        "no nest parent"
    );
    assert_eq!(errno(viommu(SELFTEST, 0xffff, &mut [])), Some(libc::ENOENT));
    assert_eq!(
        errno(viommu(SELFTEST, over, &mut [0; 4])),
        Some(libc::EINVAL),
        "too short"
    );
    // Longer than the kernel's own, whatever is there.
    for last in [0, 1] {
        let mut long = [0; 32];
        long[31] = last;
        assert_eq!(
            errno(viommu(SELFTEST, over, &mut long)),
            Some(libc::EINVAL),
            "{last}"
        );
    }
}

/// Nobody stores to the device table of a guest that has no processor.
struct NoStores;

impl WriteProtection for NoStores {
    fn watch(&self, _watcher: &Weak<dyn Watcher>, _pages: &BTreeSet<Gpa>) -> Result<(), HostError> {
        Ok(())
    }
}

#[test]
fn what_the_kernel_tells_of_a_unit_wakes_the_event_loop_and_goes_with_the_unit() {
    let bench = Bench::new();
    let (host, ids, devices) = bench.host();
    let features = host.features().expect("known");
    let at = |bdf| Arc::new(Requester::new(Sbdf { segment: 0, bdf }));
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), 2 << 20)]).expect("memory");
    let ram = GuestRam::new(ram);
    // The mock reports of devices that are behind tables of a guest's.
    let mut dte = entry();
    dte.host = dte.host.with_tv(true).with_ir(true).with_iw(true);
    for (at, word) in (0..).zip(dte.into_quadwords()) {
        let at = Gpa(RAM + 32 * 0x0100 + 8 * at);
        ram.write(at, &word.to_le_bytes()).expect("memory");
    }
    let unit = ServedUnit::new(ServedParts {
        name: "iommu0".to_owned(),
        at: Sbdf::default(),
        mmio: GpaRange::new(Gpa(0xfeb0_4000), 0x4000).expect("valid"),
        features: offer(&[features], &Wanted::DEFAULT),
        ram,
        host,
        protection: Arc::new(NoStores),
        functions: vec![(at(name(0x0100)), NIC), (at(name(0x0108)), DISK)],
    });
    let unit = unit.unwrap_or_else(|error| panic!("{error}: {}", error.source));
    let mut events = EventLoop::new().expect("an epoll descriptor");
    UnitSignals::listen(&unit, &mut events);
    let soon = || Some(Instant::now() + Duration::from_millis(50));
    let tell = |times: u32| {
        for _ in 0..times {
            test(&*bench.iommufd, TRIGGER_VEVENT, 0, &[ids[0]]).expect("reported");
        }
    };
    let told = || (unit.counts().host_events, unit.counts().lost_events);
    // Switched on, with guest tables, it has the first function in those.
    unit.write(0x00, &(RAM | 2).to_le_bytes());
    unit.write(0x18, &(1_u64 << 16 | 1).to_le_bytes());
    assert_eq!(unit.counts().nested, 1, "{}", unit.state());
    events.turn(soon()).expect("no error");
    assert_eq!(told(), (0, 0));
    tell(2);
    assert_eq!(told(), (0, 0), "nobody has looked");
    events.turn(soon()).expect("no error");
    assert_eq!(told(), (2, 0));
    // 512 fit, and three are too many; one look takes all of it.
    tell(515);
    events.turn(soon()).expect("no error");
    assert_eq!(told(), (514, 3));
    let before = Instant::now();
    events.turn(soon()).expect("no error");
    assert!(
        before.elapsed() >= Duration::from_millis(50),
        "nothing is left to hear"
    );
    // The next one is heard as well.
    tell(1);
    events.turn(soon()).expect("no error");
    assert_eq!(told(), (515, 3));
    assert!(!unit.state().contains("NOT READ"), "{}", unit.state());
    // It ends with events pending, the loop last.
    tell(600);
    drop(unit);
    events.turn(soon()).expect("no error");
    drop(events);
    for device in devices {
        bench.destroy(device.object).expect("nobody uses it");
    }
    bench.destroy(bench.home).expect("unused");
}
