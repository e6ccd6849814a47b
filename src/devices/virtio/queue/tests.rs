//! Queues under honest and hostile drivers. The names of the hostile ones are the bug classes of other VMMs.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::driver::{Driver, HIGH, HIGH_END, INDIRECT_FLAG, LOW_END, Part};
use crate::devices::virtio::worker::ServedQueue;
use crate::platform::addr::{Bdf, Gpa};
use crate::platform::dma::{Requester, Run, Translations, Translator};

/// Take one chain and describe it: head, readable bytes, writable length.
fn take(driver: &mut Driver) -> Result<Option<(u16, Vec<u8>, usize)>, Broken> {
    let ram = driver.ram();
    let chain = driver.queue.pop(ram.backend())?;
    Ok(chain.map(|chain| {
        let mut bytes = vec![0; chain.readable.len()];
        chain.readable.copy_to(&mut bytes);
        (chain.head, bytes, chain.writable.len())
    }))
}

fn complete(queue: &mut ServedQueue, driver_ram: &crate::platform::memory::GuestRam, head: u16) {
    queue
        .complete(driver_ram.backend(), head, 0)
        .expect("a good queue");
}

#[test]
fn a_chain_has_its_readable_and_its_writable_parts_in_order() {
    let mut driver = Driver::new(8);
    let (a, b, c) = (driver.place(b"ab"), driver.place(b"cd"), driver.place(b"??"));
    driver.offer(&[Part::read(a, 2), Part::read(b, 2), Part::write(c, 2)]);
    let taken = take(&mut driver).expect("a good chain");
    assert_eq!(taken, Some((0, b"abcd".to_vec(), 2)));
    assert_eq!(take(&mut driver).expect("an empty ring"), None);
}

#[test]
fn a_chain_may_have_a_table_of_its_own() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"abcdefgh");
    let parts: Vec<_> = (0..8).map(|i| Part::read(at + i, 1)).collect();
    driver.offer_indirect(&parts);
    let taken = take(&mut driver).expect("a good chain");
    assert_eq!(taken, Some((0, b"abcdefgh".to_vec(), 0)));
}

#[test]
fn the_ring_wraps_around() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"x");
    for round in 0..70_000_u32 {
        let head = driver.offer(&[Part::read(at, 1)]);
        let (taken, _, _) = take(&mut driver).expect("a good chain").expect("there is one");
        assert_eq!(taken, head, "{round}");
        let ram = driver.ram();
        complete(&mut driver.queue, &ram, head);
    }
    assert_eq!(driver.used().len(), 70_000 % 65_536);
}

// Cloud Hypervisor CVE-2026-45782: the first completion freed a buffer that was in flight.
#[test]
fn the_same_head_twice_breaks_the_queue() {
    let mut driver = Driver::new(8);
    let at = driver.place(b"x");
    let head = driver.offer(&[Part::read(at, 1)]);
    driver.make_available(head);
    take(&mut driver).expect("the first is good");
    assert!(matches!(take(&mut driver), Err(Broken::Duplicate(0))));
}

#[test]
fn the_same_head_again_after_its_completion_is_fine() {
    let mut driver = Driver::new(8);
    let at = driver.place(b"x");
    let head = driver.offer(&[Part::read(at, 1)]);
    take(&mut driver).expect("good");
    let ram = driver.ram();
    complete(&mut driver.queue, &ram, head);
    driver.make_available(head);
    assert!(take(&mut driver).expect("good").is_some());
}

// Cloud Hypervisor fbcf2fd6b, DPDK CVE-2024-11614: an index that ran away was followed, or ignored.
#[test]
fn an_available_index_beyond_the_ring_breaks_the_queue() {
    for index in [9, 0x8000, 0xffff] {
        let mut driver = Driver::new(8);
        driver.set_available_index(index);
        assert!(matches!(
            take(&mut driver),
            Err(Broken::Ring(Error::InvalidAvailRingIndex))
        ));
    }
}

#[test]
fn a_head_outside_the_table_breaks_the_queue() {
    for head in [8, 0xffff] {
        let mut driver = Driver::new(8);
        driver.make_available(head);
        assert!(matches!(take(&mut driver), Err(Broken::Head { size: 8, .. })));
    }
}

#[test]
fn a_chain_that_loops_breaks_the_queue() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"x");
    driver.raw_descriptor(0, Part::read(at, 1), Some(1));
    driver.raw_descriptor(1, Part::read(at, 1), Some(0));
    driver.make_available(0);
    assert!(matches!(take(&mut driver), Err(Broken::Chain(0))));
}

#[test]
fn a_chain_that_leaves_its_table_breaks_the_queue() {
    for next in [4, 0xffff] {
        let mut driver = Driver::new(4);
        let at = driver.place(b"x");
        driver.raw_descriptor(0, Part::read(at, 1), Some(next));
        driver.make_available(0);
        assert!(matches!(take(&mut driver), Err(Broken::Chain(0))));
    }
}

#[test]
fn a_table_in_a_table_breaks_the_queue() {
    let mut driver = Driver::new(4);
    let at = driver.place(&[0; 64]);
    driver.offer_indirect(&[Part {
        at,
        len: 16,
        flags: INDIRECT_FLAG,
    }]);
    assert!(matches!(take(&mut driver), Err(Broken::Chain(0))));
}

#[test]
fn a_table_that_is_none_breaks_the_queue() {
    for (at, len) in [
        (0x1000, 0),
        (0x1000, 15),
        (0x1000, 17),
        (0x1000, !15),
        (LOW_END, 16),
        (u64::MAX - 7, 16),
    ] {
        let mut driver = Driver::new(4);
        driver.offer(&[Part {
            at,
            len,
            flags: INDIRECT_FLAG,
        }]);
        assert!(
            matches!(take(&mut driver), Err(Broken::Chain(0))),
            "{at:#x} {len}"
        );
    }
}

// vm-virtio change 196: a table of 2^16 entries kept the device busy with one chain.
#[test]
fn a_chain_longer_than_the_bound_breaks_the_queue() {
    let mut driver = Driver::new(4);
    let at = driver.place(b"x");
    driver.offer_indirect(&vec![Part::read(at, 1); LONGEST_CHAIN + 1]);
    assert!(matches!(take(&mut driver), Err(Broken::Chain(0))));
    driver.offer_indirect(&vec![Part::read(at, 1); LONGEST_CHAIN]);
    let taken = take(&mut driver)
        .expect("as long as allowed")
        .expect("there is one");
    assert_eq!(taken.1.len(), LONGEST_CHAIN);
}

/// Low addresses as they are, all others in one page.
struct OnePage;

impl Translator for OnePage {
    fn begin(&self) -> Box<dyn Translations + '_> {
        Box::new(Self)
    }
}

impl Translations for OnePage {
    fn translate(&self, _requester: Bdf, at: Iova, _access: Permissions) -> Option<Run> {
        let within = at.0 % 0x1000;
        let target = if at.0 < LOW_END { at.0 } else { HIGH + within };
        Some(Run {
            target: Gpa(target),
            len: 0x1000 - within,
        })
    }
}

// What a disk says of its largest request; no two pages of it lie beside each other.
#[test]
fn a_chain_of_64_mib_that_is_scattered_over_pages_is_taken_however_it_is_cut() {
    for (buffers, len) in [(254, 256 << 10), (1022, 64 << 10)] {
        let mut driver = Driver::new(4);
        let requester = Arc::new(Requester::default());
        requester.set_bus_master(true);
        let dma = Dma::translated(requester, driver.ram(), Arc::new(OnePage));
        // Each begins and ends inside a page.
        let data = (0..buffers).map(|nth| Part::write((1 << 32) + nth * (1 << 20) + 512, len));
        let header = [Part::read(LOW_END - 512, 16)];
        let status = [Part::write(LOW_END - 1024, 1)];
        let parts: Vec<_> = header.into_iter().chain(data).chain(status).collect();
        driver.offer_indirect(&parts);
        let view = dma.view();
        let chain = driver.queue.pop(&view).expect("as long as allowed");
        let chain = chain.expect("there is one");
        let whole = usize::try_from(buffers * u64::from(len)).expect("small");
        assert_eq!(chain.writable.len(), whole + 1);
    }
}

/// As [`OnePage`], and counts what is asked.
struct Counted(std::sync::atomic::AtomicUsize);

impl Translator for Counted {
    fn begin(&self) -> Box<dyn Translations + '_> {
        Box::new(self)
    }
}

impl Translations for &Counted {
    fn translate(&self, requester: Bdf, at: Iova, access: Permissions) -> Option<Run> {
        self.0.fetch_add(1, Ordering::Relaxed);
        OnePage.translate(requester, at, access)
    }
}

// One descriptor may say four gigabytes; each of its pages would be a walk while a guest's invalidation waits.
#[test]
fn a_chain_of_more_bytes_than_any_device_takes_breaks_the_queue_before_they_are_looked_up() {
    for parts in [
        vec![Part::write(1 << 32, u32::MAX)],
        vec![
            Part::write(1 << 32, 1),
            Part::write(1 << 32, u32::try_from(MOST_BYTES).expect("small")),
        ],
    ] {
        let mut driver = Driver::new(4);
        let requester = Arc::new(Requester::default());
        requester.set_bus_master(true);
        let counted = Arc::new(Counted(Default::default()));
        let dma = Dma::translated(requester, driver.ram(), counted.clone());
        driver.offer(&parts);
        let view = dma.view();
        assert!(matches!(driver.queue.pop(&view), Err(Broken::Chain(0))));
        assert!(
            counted.0.load(Ordering::Relaxed) < 20,
            "only rings and descriptors"
        );
    }
}

#[test]
fn a_readable_part_after_a_writable_one_breaks_the_queue() {
    let mut driver = Driver::new(8);
    let at = driver.place(&[0; 8]);
    driver.offer(&[Part::write(at, 4), Part::read(at, 4)]);
    assert!(matches!(take(&mut driver), Err(Broken::Order(0))));
}

// CVE-2021-3748, CVE-2021-20255 and their kind: a buffer in the device's own or another's registers.
#[test]
fn a_buffer_that_is_not_memory_breaks_the_queue() {
    for at in [
        LOW_END,
        LOW_END - 1,
        HIGH - 1,
        HIGH_END - 1,
        HIGH_END,
        0xfee0_0000,
        0xe000_0000,
        1 << 63,
        u64::MAX,
        u64::MAX - 1,
    ] {
        for part in [Part::read(at, 2), Part::write(at, 2)] {
            let mut driver = Driver::new(8);
            driver.offer(&[part]);
            assert!(
                matches!(take(&mut driver), Err(Broken::Buffer { head: 0, .. })),
                "{at:#x}"
            );
        }
    }
}

// CVE-2019-18960: a buffer over the end of a region went on in host memory.
#[test]
fn a_buffer_over_the_end_of_a_region_is_never_taken_as_one_piece() {
    let regions = [
        (vm_memory::GuestAddress(0), 0x20_0000),
        (vm_memory::GuestAddress(0x20_0000), 0x10_0000),
    ];
    let ram = crate::platform::memory::GuestRam::new(
        vm_memory::GuestMemoryMmap::from_ranges(&regions).expect("neighbours"),
    );
    let mut driver = Driver::on(ram, 0, 8, false);
    driver.store(0x20_0000 - 2, b"ab");
    driver.store(0x20_0000, b"cd");
    driver.offer(&[Part::read(0x20_0000 - 2, 4)]);
    let ram = driver.ram();
    let chain = driver
        .queue
        .pop(ram.backend())
        .expect("both are memory")
        .expect("there is one");
    assert_eq!(chain.readable.slices().len(), 2);
    let mut bytes = [0; 4];
    chain.readable.copy_to(&mut bytes);
    assert_eq!(&bytes, b"abcd");
}

// The same at every end of every region: between neighbours, at a hole on either side, at the end of all.
#[test]
fn class_16_a_buffer_over_any_end_of_a_region_is_cut_there_or_refused_as_a_whole() {
    const REGIONS: [(u64, u64); 4] = [
        (0, 0x20_0000),
        (0x20_0000, 0x30_0000),
        (0x30_0000, 0x34_0000),
        (0x40_0000, 0x44_0000),
    ];
    const LEN: u64 = 8;
    let is_ram = |at: u64| REGIONS.iter().any(|(start, end)| (*start..*end).contains(&at));
    let ends = REGIONS.into_iter().flat_map(|(start, end)| [start, end]);
    let cases = ends
        .filter(|end| *end > 0)
        .flat_map(|end| (1..LEN).map(move |before| end - before));
    let mut cut = 0;
    for at in cases {
        let places = (at..at + LEN).collect::<Vec<_>>();
        let whole = places.iter().all(|place| is_ram(*place));
        let regions = REGIONS.map(|(start, end)| {
            let len = usize::try_from(end - start).expect("small");
            (vm_memory::GuestAddress(start), len)
        });
        let ram = vm_memory::GuestMemoryMmap::from_ranges(&regions).expect("none over another");
        let ram = crate::platform::memory::GuestRam::new(ram);
        for part in [Part::read(at, 8), Part::write(at, 8)] {
            let mut driver = Driver::on(ram.clone(), 0, 8, false);
            driver.offer(&[part]);
            let chain = driver.queue.pop(ram.backend());
            if !whole {
                assert!(matches!(chain, Err(Broken::Buffer { head: 0, .. })), "{at:#x}");
                continue;
            }
            let chain = chain.expect("all of it is memory").expect("there is one");
            let pieces = chain.readable.slices().len() + chain.writable.slices().len();
            assert_eq!(pieces, 2, "{at:#x}");
            // Byte by byte, no access of the test's own is over an end.
            for (value, place) in (1..).zip(&places) {
                ram.write(Gpa(*place), &[value]).expect("RAM");
            }
            let mut bytes = [0; 8];
            let read = chain.readable.copy_to(&mut bytes);
            let written = chain.writable.copy_from(&[0x5a; 8]);
            let there: Vec<u8> = places
                .iter()
                .map(|place| ram.read_obj(Gpa(*place)).expect("RAM"))
                .collect();
            match (read, written) {
                (8, 0) => assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8], "{at:#x}"),
                (0, 8) => assert_eq!(there, [0x5a; 8], "{at:#x}"),
                other => panic!("{at:#x}: {other:?}"),
            }
            cut += 1;
        }
    }
    // Two pairs of neighbours, each met by the end of one and the start of the other, seven places, two directions.
    assert_eq!(cut, 2 * 2 * 7 * 2);
}

#[test]
fn a_layout_that_is_none_is_refused() {
    let good = Driver::new(8).layout();
    let bad = [
        QueueLayout { size: 0, ..good },
        QueueLayout { size: 6, ..good },
        QueueLayout {
            size: LARGEST_QUEUE * 2,
            ..good
        },
        QueueLayout {
            descriptors: Iova(8),
            ..good
        },
        QueueLayout {
            available: Iova(1),
            ..good
        },
        QueueLayout {
            used: Iova(2),
            ..good
        },
    ];
    for layout in bad {
        assert!(matches!(
            VirtQueue::new(layout, false),
            Err(Broken::Layout { .. })
        ));
    }
}

#[test]
fn rings_that_are_not_memory_break_the_queue() {
    for at in [LOW_END, HIGH_END, !0xf] {
        let driver = Driver::new(8);
        let good = driver.layout();
        let (descriptors, available, used) = (Iova(at), Iova(at), Iova(at));
        let mut queue = VirtQueue::new(QueueLayout { available, ..good }, false).expect("aligned");
        assert!(matches!(queue.pop(driver.ram().backend()), Err(Broken::Ring(_))));

        driver.set_available_index(1);
        let mut queue = VirtQueue::new(QueueLayout { descriptors, ..good }, false).expect("aligned");
        assert!(matches!(queue.pop(driver.ram().backend()), Err(Broken::Chain(0))));

        let mut queue = VirtQueue::new(QueueLayout { used, ..good }, false).expect("aligned");
        let ram = driver.ram();
        let head = queue
            .pop(ram.backend())
            .map(|chain| chain.map(|chain| chain.head));
        let head = head.expect("the chain is good").expect("there is one");
        assert!(matches!(
            queue.complete(driver.ram().backend(), head, 0),
            Err(Broken::Ring(_))
        ));
    }
}

#[test]
fn without_bus_master_the_queue_breaks_instead_of_reaching_memory() {
    let mut driver = Driver::new(8);
    let dma = crate::platform::dma::Dma::new(std::sync::Arc::default(), driver.ram());
    assert!(matches!(driver.queue.pop(&dma.view()), Err(Broken::Ring(_))));
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut driver = Driver::new(8);
    let at = driver.place(b"x");
    for (flags, expected) in [(1, 0), (0, 1)] {
        driver.set_available_flags(flags);
        let head = driver.offer(&[Part::read(at, 1)]);
        take(&mut driver).expect("good");
        let ram = driver.ram();
        complete(&mut driver.queue, &ram, head);
        driver.queue.notify(ram.backend()).expect("good");
        assert_eq!(driver.interrupts(), expected);
    }
}

#[test]
fn with_an_event_index_the_interrupt_comes_when_the_index_is_passed() {
    let mut driver = Driver::with_event_idx(8);
    let at = driver.place(b"x");
    driver.set_used_event(1);
    for expected in [0, 1, 1] {
        let head = driver.offer(&[Part::read(at, 1)]);
        take(&mut driver).expect("good");
        let ram = driver.ram();
        complete(&mut driver.queue, &ram, head);
        driver.queue.notify(ram.backend()).expect("good");
        assert_eq!(driver.interrupts(), expected);
    }
}

#[test]
fn with_an_event_index_the_device_says_which_chain_it_waits_for() {
    let mut driver = Driver::with_event_idx(8);
    let at = driver.place(b"x");
    driver.offer(&[Part::read(at, 1)]);
    take(&mut driver).expect("good");
    let ram = driver.ram();
    assert!(!driver.queue.rearm(ram.backend()).expect("good"));
    assert_eq!(driver.available_event(), 1);
    driver.offer(&[Part::read(at, 1)]);
    assert!(
        driver.queue.rearm(ram.backend()).expect("good"),
        "one came meanwhile"
    );
}

#[test]
fn buffers_are_split_where_asked_and_not_beyond() {
    let (mut a, mut b) = (*b"abc", *b"def");
    let mut buffers = Buffers::default();
    buffers.push(VolatileSlice::from(&mut a[..]));
    buffers.push(VolatileSlice::from(&mut b[..]));
    assert!(buffers.split_off(7).is_none());
    let tail = buffers.split_off(4).expect("within");
    let (mut head_bytes, mut tail_bytes) = ([0; 4], [0; 4]);
    assert_eq!(buffers.copy_to(&mut head_bytes), 4);
    assert_eq!(tail.copy_to(&mut tail_bytes), 2);
    assert_eq!((&head_bytes, &tail_bytes), (b"abcd", b"ef\0\0"));
    assert_eq!((buffers.len(), tail.len()), (4, 2));
    assert!(tail.clone().split_off(2).expect("the end").is_empty());
}

#[test]
fn bytes_copied_in_stop_at_the_end_of_the_buffers() {
    let mut a = [0; 3];
    let mut buffers = Buffers::default();
    buffers.push(VolatileSlice::from(&mut a[..]));
    assert_eq!(buffers.copy_from(b"abcdef"), 3);
    assert_eq!(buffers.copy_from(b"x"), 1);
    let mut out = [0; 3];
    buffers.copy_to(&mut out);
    assert_eq!(&out, b"xbc");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    // Whatever the rings and the table contain: an answer, within bounds, and never a panic.
    #[test]
    fn random_rings_and_tables_never_panic(
        table in prop::collection::vec((any::<u64>(), any::<u32>(), 0_u16..8, 0_u16..10), 8),
        near in any::<bool>(),
        heads in prop::collection::vec(any::<u16>(), 8),
        index in 0_u16..10,
    ) {
        let driver = Driver::new(8);
        for (slot, (at, len, flags, next)) in table.into_iter().enumerate() {
            let (at, len) = if near { (at % LOW_END, len % 0x2000) } else { (at, len) };
            let slot = u16::try_from(slot).expect("eight");
            driver.raw_descriptor(slot, Part { at, len, flags: flags & !1 }, Some(next).filter(|_| flags & 1 != 0));
        }
        let available = driver.layout().available.0;
        for (slot, head) in heads.into_iter().enumerate() {
            let head = if near { head % 9 } else { head };
            driver.store(available + 4 + slot as u64 * 2, &head.to_le_bytes());
        }
        driver.set_available_index(index);
        let ram = driver.ram();
        let mut queue = driver.queue;
        for _ in 0..10 {
            let Ok(Some(chain)) = queue.pop(ram.backend()) else { break };
            prop_assert!(chain.readable.slices().len() <= 2 * LONGEST_CHAIN);
            prop_assert!(queue.complete(ram.backend(), chain.head, 0).is_ok());
        }
    }
}
