//! Mode `hw` over a kernel that is none, for every version of the interface and every failure.

mod failing;
mod life;

use super::testing::{Bench, FUNCTIONS, named, routing};
use super::*;
use crate::iommu::amd::spec::event::Record;
use crate::iommu::iommufd::fake::{EFR, EFR2, Object as Kept, Version};
use crate::iommu::viommu::host::HostEvent;
use crate::platform::addr::Gpa;

const NIC: HostDevice = HostDevice(0);
const DISK: HostDevice = HostDevice(1);

fn name(number: u16) -> Bdf {
    Bdf::from_requester_id(number)
}

fn queue(kind: QueueKind) -> Queue {
    Queue {
        kind,
        base: Gpa(0x10_0000),
        length: 9,
        interrupts: true,
    }
}

/// An entry with guest tables, and bits that do not count.
fn entry() -> Dte {
    let [host, guest, interrupt, attribute] = Dte {
        host: Host::new().with_v(true).with_gv(true).with_giov(true).with_had(3),
        guest: Guest::new().with_domain(7).with_iotlb(true),
        interrupt: Interrupt::new().with_iv(true).with_int_ctl(2),
        ..Dte::default()
    }
    .with_gcr3_root(0x000a_5a5a_5a5a_5000)
    .into_quadwords();
    Dte::from_quadwords([host, guest, interrupt, attribute | u64::MAX])
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    let error = result.err().expect("refused");
    error.raw_os_error()
}

fn said<T>(result: io::Result<T>) -> (io::ErrorKind, String) {
    let error = result.err().expect("refused");
    (error.kind(), error.to_string())
}

/// Once more what was refused once, which has changed nothing.
fn again<T, E>(request: impl Fn() -> Result<T, E>) -> T {
    let Ok(done) = request().or_else(|_| request()) else {
        panic!("what was refused once is refused again");
    };
    done
}

/// All that a guest's life needs, up to the end of the host.
fn live(bench: &Bench, abi: &Abi) -> Arc<HwHost> {
    let host = again(|| bench.host(vec![abi.clone()]));
    let Viommu { id: viommu, page } = again(|| host.viommu_alloc());
    again(|| host.attach(NIC, host.parent()));
    let vdevice = again(|| host.vdevice_alloc(viommu, NIC, name(0x2100)));
    let event = again(|| host.queue_alloc(viommu, &queue(QueueKind::Event)));
    let command = again(|| host.queue_alloc(viommu, &queue(QueueKind::Command)));
    again(|| host.queue_alloc(viommu, &queue(QueueKind::Ppr)));
    let nested = again(|| host.nested_alloc(viommu, NIC, &entry()));
    again(|| host.attach(NIC, nested));
    let other = again(|| host.nested_alloc(viommu, NIC, &entry()));
    again(|| host.attach(NIC, other));
    again(|| host.destroy(nested));
    if abi.interrupts.is_some() {
        let target = InterruptTarget {
            destination: 2,
            logical: false,
            vector: 0x31,
        };
        again(|| host.route(viommu, UnitInterrupt::Event, Some(target)));
        again(|| host.route(viommu, UnitInterrupt::Event, None));
    }
    if abi.events.is_some() {
        let (events, reader) = again(|| host.events_alloc(viommu));
        drop(reader);
        again(|| host.destroy(events));
        let (_, reader) = again(|| host.events_alloc(viommu));
        drop(reader);
    }
    // The guest is reset, and starts anew.
    again(|| host.destroy(event));
    again(|| host.destroy(command));
    again(|| host.attach(NIC, host.blocked()));
    again(|| host.destroy(other));
    again(|| host.destroy(vdevice));
    again(|| host.vdevice_alloc(viommu, DISK, name(0x2100)));
    let nested = again(|| host.nested_alloc(viommu, DISK, &entry()));
    again(|| host.attach(DISK, nested));
    again(|| host.queue_alloc(viommu, &queue(QueueKind::Command)));
    drop(page);
    host
}

#[test]
fn a_whole_life_leaves_nothing_behind() {
    for (version, abi) in versions() {
        let bench = Bench::new(version);
        drop(live(&bench, &abi));
        bench.assert_empty(abi.name);
    }
}

/// Every kernel of AMD's, with what it is asked by.
fn versions() -> [(Version, Abi); 4] {
    [
        (Version::E, routing()),
        (Version::D, named("v-d")),
        (Version::C, named("v-c")),
        (Version::A, named("v-a")),
    ]
}

#[test]
fn features_are_raw_and_those_that_are_missing_are_named() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    assert_eq!(
        host.features().expect("known"),
        HostFeatures { efr: EFR, efr2: EFR2 }
    );
    drop(host);
    // Of this the kernel refuses the parent.
    bench.fake.set_efr(EFR & !(1 << 48));
    let error = bench.host(vec![named("v-e")]).err().expect("refused");
    assert_eq!(
        error.to_string(),
        "cannot make guest memory the parent of a guest's own tables"
    );
    assert!(
        error
            .source
            .to_string()
            .ends_with("lacks GTSup, GIOSup or GCR3TRPMode, or its driver has translation off"),
        "{}",
        error.source
    );
    // What is there is enough for that.
    bench.fake.set_efr(EFR & !(1 << 55));
    let error = bench.host(vec![named("v-e")]).err().expect("refused");
    assert_eq!(error.to_string(), "cannot have the host's IOMMU serve viommu0");
    assert_eq!(
        error.source.to_string(),
        "the host's IOMMU lacks vIOMMUSup (EFR bit 55): a guest's own rings"
    );
    bench.fake.set_efr(EFR);
    bench.fake.set_info_type(1);
    let error = bench.host(vec![named("v-e")]).err().expect("refused");
    assert_eq!(error.source.kind(), io::ErrorKind::Unsupported);
    assert!(
        error.source.to_string().starts_with("GET_HW_INFO: "),
        "{}",
        error.source
    );
    bench.assert_empty("refused");
}

/// As drivers/iommu/amd of Linux 7.3 has it.
#[test]
fn tables_are_made_by_what_the_unit_has() {
    const HD: u64 = 1 << 52;
    let bench = Bench::new(Version::Stock);
    let nic = bench.devices[0];
    let alloc = |flags: u32| {
        let mut argument = Fields::structure(48)
            .u32(4, flags)
            .u32(8, nic)
            .u32(12, bench.ioas);
        bench.kernel.request(0x89, argument.bytes(), &mut [])
    };
    let unsupported = |flags: u32| assert_eq!(errno(alloc(flags)), Some(libc::EOPNOTSUPP), "{flags:#x}");
    alloc(0).expect("tables");
    alloc(1).expect("a parent");
    [2, 3, 9, 0x10].into_iter().for_each(unsupported);
    bench.fake.set_efr(EFR | HD);
    alloc(2).expect("dirty tracking");
    alloc(3).expect("both");
    for (efr, efr2) in [(EFR & !(1 << 4), EFR2), (EFR & !(1 << 48), EFR2), (EFR, 0)] {
        bench.fake.set_efr(efr | HD);
        bench.fake.set_efr2(efr2);
        [1, 3].into_iter().for_each(unsupported);
        alloc(0).expect("tables");
    }
}

#[test]
fn tables_of_five_levels_are_made_where_the_unit_has_them() {
    let bench = Bench::new(Version::E);
    bench.fake.set_efr(EFR | 1 << 12);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let five = Dte {
        interrupt: entry().interrupt.with_guest_paging_mode(1),
        ..entry()
    };
    host.nested_alloc(viommu, NIC, &five).expect("made");
}

#[test]
fn rings_are_queue_objects_with_type_place_length_code_and_flags() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    host.queue_alloc(viommu, &queue(QueueKind::Command))
        .expect("made");
    let silent = Queue {
        interrupts: false,
        ..queue(QueueKind::Ppr)
    };
    host.queue_alloc(viommu, &silent).expect("made");
    let kept = |queue_type, flags| Kept::Queue {
        viommu: viommu.0,
        queue_type,
        flags,
        base: 0x10_0000,
        length: 9,
    };
    let objects = bench.fake.objects();
    assert!(
        objects.contains(&kept(2, 0x300)) && objects.contains(&kept(4, 0x500)),
        "{objects:?}"
    );
    assert_eq!(errno(host.queue_alloc(viommu, &silent)), Some(libc::EEXIST));
    let event = queue(QueueKind::Event);
    let odd = Queue {
        base: Gpa(0x800),
        ..event
    };
    assert_eq!(errno(host.queue_alloc(viommu, &odd)), Some(libc::EINVAL));
    let long = Queue { length: 16, ..event };
    assert_eq!(errno(host.queue_alloc(viommu, &long)), Some(libc::EINVAL));
    assert_eq!(errno(host.queue_alloc(ObjectId(99), &event)), Some(libc::ENOENT));
    assert_eq!(errno(host.queue_alloc(host.parent(), &event)), Some(libc::ENOENT));
}

#[test]
fn a_ring_that_is_taken_back_is_off_though_its_object_alone_stops_nothing() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, page } = host.viommu_alloc().expect("made");
    let command = host.queue_alloc(viommu, &queue(QueueKind::Command));
    let command = command.expect("made");
    let event = host.queue_alloc(viommu, &queue(QueueKind::Event)).expect("made");
    assert_eq!(bench.fake.rings_at_work(), [2, 3]);
    host.destroy(command).expect("off");
    assert_eq!(bench.fake.rings_at_work(), [3]);
    assert_eq!(errno(host.destroy(command)), Some(libc::ENOENT), "once");
    // Refused half-way: it counts as on, and whatever was made meanwhile is another object.
    for before in 0..3 {
        bench.fake.fail(before, libc::ENOMEM);
        assert!(host.destroy(event).is_err(), "request {before}");
        let again = host.queue_alloc(viommu, &queue(QueueKind::Event));
        assert_eq!(errno(again), Some(libc::EEXIST), "request {before}");
        let vdevice = host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
        host.destroy(event).expect("off");
        host.destroy(vdevice).expect("unused");
        assert!(bench.fake.rings_at_work().is_empty());
        host.queue_alloc(viommu, &queue(QueueKind::Event)).expect("made");
        assert_eq!(bench.fake.rings_at_work(), [3]);
    }
    // With the host, too.
    drop(page);
    drop(host);
    assert!(bench.fake.rings_at_work().is_empty());
    bench.assert_empty("dropped");
}

#[test]
fn a_kernel_that_knows_no_ring_that_is_off_is_asked_once_and_the_ring_can_be_made_anew() {
    for kernels in [libc::EINVAL, libc::EOPNOTSUPP] {
        let bench = Bench::new(Version::E);
        let host = bench.made("v-e");
        let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
        let event = host.queue_alloc(viommu, &queue(QueueKind::Event)).expect("made");
        bench.fake.fail(1, kernels);
        host.destroy(event).expect("as far as that kernel goes");
        host.queue_alloc(viommu, &queue(QueueKind::Event)).expect("made");
    }
}

#[test]
fn a_kernel_has_queues_whether_or_not_it_looks_at_their_length() {
    for checks in [false, true] {
        let bench = Bench::new(Version::E);
        if checks {
            bench.fake.check_queues();
        }
        let host = bench.host(Abi::built_in().into()).expect("one of them");
        assert_eq!(host.abi().name, "v-e");
        let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
        assert!(bench.fake.rings_at_work().is_empty(), "what was asked for is off");
        host.queue_alloc(viommu, &queue(QueueKind::Command))
            .expect("made");
    }
}

#[test]
fn rings_are_registers_where_the_kernel_wants_those() {
    const BASE: u64 = 0x0900_0000_0010_0000;
    for (version, name) in [(Version::A, "v-a"), (Version::C, "v-c"), (Version::D, "v-d")] {
        let bench = Bench::new(version);
        let host = bench.made(name);
        let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
        let command = host
            .queue_alloc(viommu, &queue(QueueKind::Command))
            .expect("made");
        let event = host.queue_alloc(viommu, &queue(QueueKind::Event)).expect("made");
        assert_eq!(
            errno(host.queue_alloc(viommu, &queue(QueueKind::Event))),
            Some(libc::EEXIST)
        );
        assert_eq!(errno(host.destroy(viommu)), Some(libc::EBUSY));
        host.destroy(command).expect("off");
        assert_eq!(errno(host.destroy(command)), Some(libc::ENOENT));
        host.destroy(event).expect("off");
        let bit = |bits: &[u32]| bits.iter().fold(1 | 1 << 10, |all, bit| all | 1_u64 << bit);
        let on = |register, value| (viommu.0, register, value);
        assert_eq!(
            bench.fake.registers(),
            [
                on(0x08, BASE),
                on(0x18, bit(&[12, 4])),
                on(0x10, BASE),
                on(0x18, bit(&[12, 4, 2, 3])),
                on(0x18, bit(&[2, 3])),
                on(0x18, bit(&[])),
            ],
            "{name}"
        );
    }
}

#[test]
fn a_table_of_the_guests_is_reached_by_devices_that_have_a_name() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let strange = host.nested_alloc(viommu, HostDevice(2), &entry());
    assert_eq!(errno(strange), Some(libc::ENOENT));
    let nested = host.nested_alloc(viommu, NIC, &entry()).expect("made");
    assert_eq!(errno(host.attach(NIC, nested)), Some(libc::EINVAL), "no name");
    assert_eq!(errno(host.attach(NIC, viommu)), Some(libc::EINVAL), "no table");
    assert_eq!(errno(host.attach(NIC, ObjectId(99))), Some(libc::ENOENT));
    assert_eq!(errno(host.attach(HostDevice(2), nested)), Some(libc::ENOENT));
    let vdevice = host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
    host.attach(NIC, nested).expect("named");
    assert_eq!(bench.fake.attached(bench.devices[0]), Some(nested.0));
    assert_eq!(bench.fake.attached(bench.devices[1]), Some(host.blocked().0));
    for used in [nested, vdevice, viommu, host.parent(), host.blocked()] {
        assert_eq!(errno(host.destroy(used)), Some(libc::EBUSY), "{used:?}");
    }
    host.attach(NIC, host.parent()).expect("out of it");
    host.destroy(nested).expect("unused");
    host.destroy(vdevice).expect("unused");
    host.destroy(viommu).expect("unused");
    assert_eq!(errno(host.destroy(viommu)), Some(libc::ENOENT));
}

#[test]
fn a_device_that_is_bound_no_longer_has_no_name_to_be_destroyed_and_its_tables_go() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, page } = host.viommu_alloc().expect("made");
    let of_nic = host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
    let of_disk = host.vdevice_alloc(viommu, DISK, name(0x2108)).expect("made");
    let nested = host.nested_alloc(viommu, NIC, &entry()).expect("made");
    host.attach(NIC, nested).expect("named");
    bench.fake.unbind(bench.devices[0]);
    let (kind, text) = said(host.nested_alloc(viommu, NIC, &entry()));
    assert_eq!(kind, io::ErrorKind::NotFound, "{text}");
    let other = host.nested_alloc(viommu, DISK, &entry()).expect("it is there");
    host.attach(NIC, host.blocked()).expect("as good as attached");
    host.destroy(nested).expect("unused");
    host.destroy(of_nic).expect("it went with its device");
    assert_eq!(errno(host.destroy(of_nic)), Some(libc::ENOENT), "once");
    host.destroy(of_disk).expect("unused");
    host.destroy(other).expect("unused");
    drop(page);
    host.destroy(viommu).expect("nothing uses it");
    drop(host);
    assert_eq!(bench.fake.objects(), [Kept::Ioas]);
}

#[test]
fn entries_without_guest_tables_are_no_nested_tables() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let good = entry();
    let with = |change: fn(Host) -> Host| Dte {
        host: change(good.host),
        ..good
    };
    for (dte, why) in [
        (with(|host| host.with_v(false)), "not valid"),
        (with(|host| host.with_gv(false)), "no guest tables"),
        (with(|host| host.with_mode(4)), "host tables"),
        (with(|host| host.with_root(1)), "a host root"),
        (good.with_gcr3_root(0), "no root"),
        (with(|host| host.with_glx(3)), "too many levels"),
    ] {
        let (kind, _) = said(host.nested_alloc(viommu, NIC, &dte));
        assert_eq!(kind, io::ErrorKind::InvalidInput, "{why}");
    }
    let five = Dte {
        interrupt: good.interrupt.with_guest_paging_mode(1),
        ..good
    };
    let (kind, text) = said(host.nested_alloc(viommu, NIC, &five));
    assert_eq!(kind, io::ErrorKind::Unsupported, "{text}");
    let nested = |object: &Kept| matches!(object, Kept::Nested { .. });
    assert!(!bench.fake.objects().iter().any(nested));
}

#[test]
fn names_are_given_once() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    host.vdevice_alloc(viommu, NIC, name(0x2100)).expect("made");
    let (kind, text) = said(host.vdevice_alloc(viommu, DISK, name(0x2100)));
    assert_eq!(
        (kind, text.as_str()),
        (
            io::ErrorKind::AlreadyExists,
            "VDEVICE_ALLOC: File exists (os error 17)"
        )
    );
    let (kind, _) = said(host.vdevice_alloc(viommu, NIC, name(0x2108)));
    assert_eq!(kind, io::ErrorKind::AlreadyExists);
    assert_eq!(
        errno(host.vdevice_alloc(viommu, HostDevice(9), name(0))),
        Some(libc::ENOENT)
    );
    assert_eq!(errno(host.viommu_alloc()), Some(libc::EBUSY));
}

#[test]
fn a_device_behind_another_unit_has_no_name() {
    let mut bench = Bench::new(Version::E);
    bench.devices[1] = bench.fake.bind(1);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let (kind, _) = said(host.vdevice_alloc(viommu, DISK, name(0x2100)));
    assert_eq!(kind, io::ErrorKind::InvalidInput);
}

#[test]
fn a_unit_whose_page_is_mapped_stays() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id, page } = host.viommu_alloc().expect("made");
    let VfPage::Mapped(memory) = &page else {
        panic!("memory of the unit's");
    };
    assert_eq!(memory.len(), 0x1000);
    let (kind, text) = said(host.destroy(id));
    assert_eq!(
        (kind, text.as_str()),
        (
            io::ErrorKind::ResourceBusy,
            "DESTROY: Device or resource busy (os error 16)"
        )
    );
    drop(page);
    host.destroy(id).expect("unmapped");
    drop(host.viommu_alloc().expect("another"));
}

#[test]
fn a_page_that_nobody_answers_from_is_refused_and_nothing_is_left() {
    let bench = Bench::new(Version::E);
    bench.fake.switch_pages_off(true);
    let host = bench.made("v-e");
    let (kind, text) = said(host.viommu_alloc());
    assert_eq!(kind, io::ErrorKind::Other);
    assert!(
        text.starts_with("mmap of the VF page: all ones where Status is; the unit's BAR of VF pages is off"),
        "{text}"
    );
    drop(host);
    bench.assert_empty("it does not answer");
    // No other version is tried: this one is the kernel's.
    let error = bench.host(Abi::built_in().into()).err().expect("refused");
    assert_eq!(error.source.to_string(), text);
    bench.assert_empty("it does not answer");
    bench.fake.switch_pages_off(false);
    drop(bench.made("v-e").viommu_alloc().expect("it answers"));
}

#[test]
fn interrupts_are_routed_where_the_request_is_known() {
    let bench = Bench::new(Version::E);
    let host = bench.host(vec![routing()]).expect("made");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let target = |destination, vector| InterruptTarget {
        destination,
        logical: false,
        vector,
    };
    host.route(viommu, UnitInterrupt::Ppr, Some(target(4, 0x41)))
        .expect("a vCPU");
    host.route(viommu, UnitInterrupt::Event, None).expect("nowhere");
    let vm = u32::try_from(bench.vm.vm().as_raw_fd()).expect("open");
    assert_eq!(bench.fake.routes(), [[1, vm, 2, 0x41], [0, vm, 0, 0]]);
    for wrong in [target(3, 0x41), target(4, 0)] {
        assert_eq!(
            errno(host.route(viommu, UnitInterrupt::Event, Some(wrong))),
            Some(libc::EINVAL)
        );
    }
    assert_eq!(
        errno(host.route(ObjectId(99), UnitInterrupt::Event, None)),
        Some(libc::ENOENT)
    );
    assert_eq!(bench.fake.routes().len(), 2);
    let without = Bench::new(Version::E);
    let host = without.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    for absent in [
        host.route(viommu, UnitInterrupt::Event, None),
        host.insert_event(viommu, [0; 4]),
        host.reset_page(viommu),
    ] {
        assert_eq!(said(absent).0, io::ErrorKind::Unsupported);
    }
}

#[test]
fn what_the_kernel_tells_is_read_in_its_order_with_what_was_lost() {
    let bench = Bench::new(Version::E);
    let host = bench.host(vec![routing()]).expect("made");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let (events, reader) = host.events_alloc(viommu).expect("made");
    assert_eq!(reader.take().expect("open"), []);
    let fault = Record::new().with_code(12).with_domain(1).with_address(0x1000);
    let header = |flags: u32, number: u32| [flags.to_le_bytes(), number.to_le_bytes()].concat();
    let record = fault.into_bits().to_le_bytes().to_vec();
    assert!(
        bench
            .fake
            .tell(&[header(0, 2), record.clone(), header(1, 4)].concat())
    );
    assert!(bench.fake.tell(&[header(0, 5), record].concat()));
    let mut told = reader.take().expect("open");
    told.extend(reader.take().expect("open"));
    let (fault, lost) = (HostEvent::Record(fault), HostEvent::Lost(2));
    assert_eq!(told, [lost.clone(), fault.clone(), lost, fault]);
    assert_eq!(reader.take().expect("open"), []);
    assert!(bench.fake.tell(&header(4, 6)));
    assert!(matches!(*reader.take().expect("open"), [HostEvent::Garbage(_)]));
    assert_eq!(
        host.events_alloc(viommu)
            .err()
            .and_then(|error| error.raw_os_error()),
        Some(libc::EEXIST)
    );
    let (kind, _) = said(host.destroy(events));
    assert_eq!(kind, io::ErrorKind::ResourceBusy, "somebody reads it");
    drop(reader);
    host.destroy(events).expect("nobody reads it");
    host.destroy(viommu).expect("unused");
    let gone = host
        .events_alloc(viommu)
        .err()
        .and_then(|error| error.raw_os_error());
    assert_eq!(gone, Some(libc::ENOENT));
}

#[test]
fn without_a_type_for_them_there_are_no_events() {
    let bench = Bench::new(Version::E);
    let host = bench.made("v-e");
    let Viommu { id: viommu, .. } = host.viommu_alloc().expect("made");
    let error = host.events_alloc(viommu).err().expect("refused");
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
}

#[test]
fn the_version_is_found_by_what_the_kernel_answers() {
    for (version, name) in [
        (Version::E, "v-e"),
        (Version::D, "v-d"),
        (Version::C, "v-c"),
        (Version::A, "v-a"),
    ] {
        let bench = Bench::new(version);
        let host = bench.host(Abi::built_in().into()).expect("one of them");
        assert_eq!(host.abi().name, name);
        host.viommu_alloc().expect("nothing is left of the trial");
        drop(host);
        bench.assert_empty(name);
    }
}

#[test]
fn another_type_number_is_refused_by_the_step() {
    let bench = Bench::new(Version::E);
    let abi = Abi::from_toml("base = 'v-e'\nviommu-type = 4").expect("a table");
    let host = bench.host(vec![abi]).expect("nothing of AMD's yet");
    let (kind, text) = said(host.viommu_alloc());
    assert_eq!(kind, io::ErrorKind::Unsupported);
    assert!(
        text.starts_with("VIOMMU_ALLOC: Operation not supported (os error 95); "),
        "{text}"
    );
    assert!(text.contains("type number"), "{text}");
}

/// As the lab's kernel answers its mock's user data: scenario `a_viommu_of_another_type_or_over_other_tables_is_refused`.
#[test]
fn user_data_of_another_length_than_the_versions_is_invalid() {
    for (version, name, least) in [
        (Version::E, "v-e", 8),
        (Version::D, "v-d", 24),
        (Version::C, "v-c", 12),
        (Version::A, "v-a", 28),
    ] {
        let bench = Bench::new(version);
        let nic = bench.devices[0];
        let parent = NestParent::new(&bench.kernel, nic, bench.ioas).expect("made");
        let right = user_data(&named(name), &FUNCTIONS, Some(bench.vm.vm().as_raw_fd()));
        let right = right.expect("a VM").bytes().to_vec();
        let alloc = |data: &[u8]| {
            let mut fields = Fields::data(data.len());
            fields.bytes().copy_from_slice(data);
            let made = requests::viommu_alloc(&*bench.kernel, 3, nic, parent.id(), &mut fields)?;
            requests::destroy(&*bench.kernel, made)
        };
        for len in least..=right.len() {
            alloc(&right[..len]).unwrap_or_else(|error| panic!("{name}, {len} bytes: {error}"));
        }
        for (data, what) in [
            (right[..least - 1].to_vec(), "too short"),
            (Vec::new(), "nothing"),
            ([&*right, &[0]].concat(), "longer, and zero"),
            ([&*right, &[1]].concat(), "longer"),
        ] {
            let (kind, text) = said(alloc(&data));
            assert_eq!(kind, io::ErrorKind::InvalidInput, "{name}, {what}: {text}");
        }
    }
}

#[test]
fn a_stock_kernel_is_told_from_amds_by_what_it_does_not_do() {
    let bench = Bench::new(Version::Stock);
    let unsupported = |name: &str, start: &str| {
        let host = bench.made(name);
        let (kind, text) = said(host.viommu_alloc());
        assert_eq!(kind, io::ErrorKind::Unsupported);
        assert!(text.starts_with(start) && text.contains("stock kernel"), "{text}");
        drop(host);
        bench.assert_empty(name);
    };
    unsupported("v-e", "HW_QUEUE_ALLOC: Operation not supported (os error 95); ");
    for name in ["v-a", "v-c", "v-d"] {
        unsupported(
            name,
            "VIOMMU_ALLOC: unsupported; the host's kernel made a vIOMMU and told no VF page",
        );
    }
    let error = bench.host(Abi::built_in().into()).err().expect("none of them");
    let text = error.source.to_string();
    assert!(
        text.contains("v-e: HW_QUEUE_ALLOC: ") && text.contains("v-a: VIOMMU_ALLOC: "),
        "{text}"
    );
    bench.assert_empty("all versions");
}

#[test]
fn a_stock_kernel_says_at_each_step_what_linux_7_3_says() {
    let bench = Bench::new(Version::Stock);
    let kernel = &*bench.kernel;
    let nic = bench.devices[0];
    let parent = NestParent::new(&bench.kernel, nic, bench.ioas).expect("works");
    let mut data = Fields::data(8);
    let viommu = requests::viommu_alloc(kernel, 3, nic, parent.id(), &mut data).expect("any type");
    assert_eq!(data.get_u64(0), 0, "and nothing is written");
    requests::vdevice_alloc(kernel, viommu, nic, name(0x2100)).expect("works");
    let nested = requests::nested_alloc(kernel, viommu, nic, &canonical(&entry()).expect("nested"));
    let (kind, text) = said(nested);
    assert_eq!(kind, io::ErrorKind::Unsupported);
    assert!(
        text.starts_with("HWPT_ALLOC of the guest's tables: Operation not supported (os error 95); "),
        "{text}"
    );
    let whose = requests::Whose {
        viommu,
        host_iommu: FUNCTIONS.host_iommu,
        guest_id: 1,
    };
    for by in [
        abi::Forwarding::MmioAccess,
        abi::Forwarding::Option(2),
        abi::Forwarding::Command,
    ] {
        let (kind, text) = said(requests::forward(kernel, by, &whose, 0x18, 0));
        assert_eq!(kind, io::ErrorKind::Unsupported, "{text}");
    }
    let none = requests::viommu_alloc(kernel, 0, nic, parent.id(), &mut data);
    assert_eq!(said(none).0, io::ErrorKind::Unsupported);
}
