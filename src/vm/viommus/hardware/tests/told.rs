//! What the kernel tells of units while their guest runs, by way of the event loop.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::iommu::amd::spec::event::{Code, Record};
use crate::platform::log::testing::logged;

/// The flag of a header that says so.
const LOST: u32 = 1;
/// More wake-ups in vain than anybody has patience for.
const MANY: usize = 40;

/// A guest of a kernel that has event queues, with a loop that listens.
struct Heard {
    made: Made,
    bench: Bench,
    /// Of the next event.
    number: u32,
    _folder: tempfile::TempDir,
}

fn bench() -> (Bench, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let table = folder.path().join("kernel.toml");
    std::fs::write(&table, "base = 'v-e'\n[events]\ntype = 9\n").expect("written");
    let viommu = format!("mode = \"hw\"\nabi = \"{}\"\n", table.display());
    (Bench::new(Version::E, &viommu), folder)
}

impl Heard {
    fn new() -> Self {
        let (bench, folder) = bench();
        let made = bench.build().expect("a kernel of AMD's");
        made.start(0);
        bench.entry(made.id(0, 0), dte(0x30_0000, 1));
        Self {
            made,
            bench,
            number: 0,
            _folder: folder,
        }
    }

    fn unit(&self) -> &ServedUnit {
        self.made.units[0].unit()
    }

    /// Events of `codes`, as the kernel tells them.
    fn events(&mut self, codes: &[Code]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for code in codes {
            let record = Record::new().with_code(code.0).with_address(0x1234);
            bytes.extend(0_u32.to_le_bytes());
            bytes.extend(self.number.to_le_bytes());
            bytes.extend(record.into_bits().to_le_bytes());
            self.number += 1;
        }
        bytes
    }

    /// The kernel tells of `codes`.
    fn tell(&mut self, codes: &[Code]) {
        let bytes = self.events(codes);
        assert!(self.bench.fake.tell(&bytes), "somebody reads");
    }

    /// One turn of the loop, which something wakes.
    fn turn(&mut self) {
        let (begun, time) = (Instant::now(), Duration::from_secs(20));
        self.made.events.turn(Some(begun + time)).expect("no error");
        assert!(begun.elapsed() < time, "nothing woke it");
    }

    /// Whether nothing wakes the loop.
    fn is_quiet(&mut self) -> bool {
        // Who is woken may be late on a busy machine, but not each time.
        (0..5).all(|_| {
            let (begun, time) = (Instant::now(), Duration::from_millis(20));
            self.made.events.turn(Some(begun + time)).expect("no error");
            begun.elapsed() >= time
        })
    }

    fn is_stopped(&self) -> bool {
        self.unit().state().contains("STOPPED")
    }

    fn is_deaf(&self) -> bool {
        self.unit().state().contains("NOT READ any more")
    }

    /// The guest switches its unit off and on, as Linux does when it is loaded again.
    fn restart(&self) {
        self.made.write(0, 0x18, 0);
        self.made.start(0);
    }
}

#[test]
fn a_hardware_error_that_the_kernel_tells_stops_the_unit_and_switching_it_off_brings_it_back() {
    let mut heard = Heard::new();
    let parent = heard.bench.attached(1);
    let tables = heard.bench.attached(0);
    heard.tell(&[Code::VIOMMU_HARDWARE_ERROR]);
    assert!(!heard.is_stopped(), "nobody has heard of it yet");
    heard.turn();
    let state = heard.unit().state();
    assert!(
        state.contains("STOPPED, as the host's unit cannot read 0x1234; rings on: none"),
        "{state}"
    );
    let fake = &heard.bench.fake;
    let gone = (
        count(fake, is_queue),
        count(fake, is_nested),
        count(fake, is_vdevice),
    );
    assert_eq!(gone, (0, 0, 0));
    let blocked = heard.bench.attached(0);
    assert!(blocked != tables && blocked != parent && heard.bench.attached(1) == blocked);
    assert!(heard.is_quiet(), "it is heard once");
    heard.restart();
    assert!(!heard.is_stopped());
    let fake = &heard.bench.fake;
    assert_eq!((count(fake, is_queue), count(fake, is_nested)), (2, 1));
    // And once more: by a reset of the machine.
    heard.tell(&[Code::VIOMMU_HARDWARE_ERROR]);
    heard.turn();
    assert!(heard.is_stopped());
    heard.unit().reset();
    assert!(!heard.is_stopped());
    assert_eq!([0, 1].map(|nic| heard.bench.attached(nic)), [parent, parent]);
    assert_eq!(heard.unit().counts().stops, 2);
}

#[test]
fn what_goes_wrong_with_a_unit_is_in_the_operators_log_by_its_name_and_once() {
    let mut heard = Heard::new();
    let lines = |heard: &mut Heard, codes: &[Code]| {
        heard.tell(codes);
        logged(|| heard.turn())
    };
    let fault = lines(
        &mut heard,
        &[Code::GUEST_EVENT_FAULT, Code::PAGE_TAB_HARDWARE_ERROR],
    );
    let [other, lost] = &fault[..] else {
        panic!("{fault:?}");
    };
    assert!(
        other.contains("WARN") && other.contains("iommu0") && other.contains("page_tab_hardware_error"),
        "{other}"
    );
    assert!(
        lost.contains("WARN") && lost.contains("iommu0") && lost.contains("lost_records=1"),
        "{lost}"
    );
    let broken = lines(&mut heard, &[Code::VIOMMU_HARDWARE_ERROR]);
    let [line] = &broken[..] else {
        panic!("{broken:?}");
    };
    assert!(
        line.contains("ERROR") && line.contains("iommu0") && line.contains("at=0x1234"),
        "{line}"
    );
    assert!(
        line.contains("its rings are off and its functions blocked until the guest switches its IOMMU off"),
        "{line}"
    );
    // It is stopped already.
    let again = lines(&mut heard, &[Code::VIOMMU_HARDWARE_ERROR]);
    assert_eq!(again, Vec::<String>::new());
    heard.number += 3;
    let gap = lines(&mut heard, &[Code::GUEST_EVENT_FAULT]);
    assert!(
        gap.iter()
            .any(|line| line.contains("events=3") && line.contains("lost events")),
        "{gap:?}"
    );
    // And that it hears nothing more.
    heard.bench.fake.end_events();
    let ended = logged(|| heard.turn());
    let [line] = &ended[..] else {
        panic!("{ended:?}");
    };
    assert!(
        line.contains("ERROR") && line.contains("not read any more") && line.contains("the host closed it"),
        "{line}"
    );
}

#[test]
fn faults_and_what_the_kernel_lost_are_counted_and_stop_nothing() {
    let mut heard = Heard::new();
    heard.tell(&[Code::GUEST_EVENT_FAULT, Code::PAGE_TAB_HARDWARE_ERROR]);
    // Two are missing, and three at the end.
    heard.number += 2;
    let mut bytes = heard.events(&[Code::GUEST_EVENT_FAULT]);
    bytes.extend(LOST.to_le_bytes());
    bytes.extend((heard.number + 2).to_le_bytes());
    assert!(heard.bench.fake.tell(&bytes));
    heard.turn();
    heard.turn();
    assert!(heard.is_quiet());
    let counts = heard.unit().counts();
    assert_eq!(
        (counts.host_events, counts.lost_records, counts.lost_events),
        (3, 2, 5)
    );
    assert_eq!((counts.stops, counts.refusals), (0, 0));
    assert!(!heard.is_stopped() && !heard.is_deaf());
}

/// Who is always ready, and counts how often it was called.
struct Neighbour(EventFd, AtomicUsize);

impl EventSubscriber for Neighbour {
    fn process(&self, _events: Events, _ops: &mut EventOps) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }

    fn init(&self, ops: &mut EventOps) {
        ops.add(Events::new_raw(self.0.as_raw_fd(), EventSet::IN))
            .expect("open");
    }
}

#[test]
fn a_kernel_that_tells_without_end_delays_others_and_holds_up_nobody() {
    const TIMES: usize = 300;
    const AT_ONCE: usize = 500;
    let mut heard = Heard::new();
    let neighbour = Arc::new(Neighbour(
        EventFd::new(0).expect("an eventfd"),
        AtomicUsize::new(0),
    ));
    neighbour.0.write(1).expect("room");
    heard.made.events.add(neighbour.clone());
    let flood: Vec<_> = (0..TIMES)
        .map(|_| heard.events(&[Code::GUEST_EVENT_FAULT; AT_ONCE]))
        .collect();
    let fake = heard.bench.fake.clone();
    let telling = std::thread::spawn(move || flood.iter().all(|bytes| fake.tell(bytes)));
    let all = (TIMES * AT_ONCE) as u64;
    let (mut before, mut most, mut turns) = (0, 0, 0);
    while before < all {
        heard.turn();
        let now = heard.unit().counts().host_events;
        most = most.max(now - before);
        before = now;
        turns += 1;
        assert_eq!(neighbour.1.load(Ordering::Relaxed), turns, "it has its turn");
    }
    assert!(telling.join().expect("no panic"));
    assert!(most <= 513, "{most} at once");
    let counts = heard.unit().counts();
    assert_eq!((counts.lost_records, counts.lost_events), (all, 0));
    // The guest's processors are not held up either.
    heard.restart();
    assert!(!heard.is_stopped());
}

#[test]
fn what_is_no_event_is_told_and_in_the_end_not_listened_to() {
    let mut heard = Heard::new();
    for _ in 0..3 {
        assert!(heard.bench.fake.tell(&[0xff; 7]));
        heard.turn();
    }
    // What is understood is acted on all the same.
    heard.tell(&[Code::GUEST_EVENT_FAULT]);
    heard.turn();
    assert_eq!(heard.unit().counts().lost_records, 1);
    for _ in 0..MANY {
        assert!(heard.bench.fake.tell(&[0xff; 9]));
    }
    for _ in 0..MANY {
        if !heard.is_deaf() {
            heard.turn();
        }
    }
    assert!(heard.is_deaf());
    assert!(heard.is_quiet(), "the loop waits, though there is more to read");
    // The unit works as before a kernel without such a queue.
    heard.bench.entry(heard.made.id(0, 1), dte(0x31_0000, 2));
    assert_eq!(count(&heard.bench.fake, is_nested), 2);
    heard.restart();
    let Heard { bench, made, .. } = heard;
    drop(made);
    bench.assert_empty("not listened to");
}

#[test]
fn a_queue_that_ends_is_read_to_its_end_and_wakes_nobody_any_more() {
    let mut heard = Heard::new();
    heard.tell(&[Code::VIOMMU_HARDWARE_ERROR]);
    heard.bench.fake.end_events();
    heard.turn();
    assert!(heard.is_stopped() && heard.is_deaf());
    assert!(heard.is_quiet());
    heard.restart();
    assert!(!heard.is_stopped());
    // The other unit's is another.
    assert!(!heard.made.units[1].unit().state().contains("NOT READ"));
    heard.tell(&[Code::GUEST_EVENT_FAULT]);
    heard.turn();
    assert_eq!(heard.made.units[1].unit().counts().lost_records, 1);
}

#[test]
fn what_is_pending_at_the_end_goes_with_its_queue_before_the_unit() {
    let mut heard = Heard::new();
    for _ in 0..10 {
        heard.tell(&[Code::VIOMMU_HARDWARE_ERROR, Code::GUEST_EVENT_FAULT]);
    }
    let before = heard.bench.fake.destroyed().len();
    let Heard { made, bench, .. } = heard;
    // The loop first, as in a machine.
    drop(made);
    bench.assert_empty("events are pending");
    let gone = bench.fake.destroyed().split_off(before);
    let is_events = |object: &Object| matches!(object, Object::Events { .. });
    for (at, object) in gone.iter().enumerate().filter(|(_, object)| is_viommu(object)) {
        assert!(
            gone[..at].iter().any(is_events),
            "{object:?} goes after its queue: {gone:?}"
        );
    }
    assert_eq!(gone.iter().filter(|object| is_events(object)).count(), 2);
    let first = |kind: &dyn Fn(&Object) -> bool| gone.iter().position(kind).expect("one of them");
    assert!(first(&is_queue) < first(&is_events) && first(&is_events) < first(&is_nested));
    // A machine that is given up half made has it the other way around.
    let Made { events, units, .. } = bench.build().expect("a kernel of AMD's");
    drop(units);
    drop(events);
    bench.assert_empty("the loop last");
}

#[test]
fn a_kernel_that_refuses_any_request_of_a_machine_with_event_queues_is_left_with_nothing() {
    let (bench, _folder) = bench();
    let before = bench.fake.asked();
    drop(bench.build().expect("a kernel of AMD's"));
    let requests = bench.fake.asked() - before;
    let mut told = 0;
    for request in 0..requests {
        for errno in ERRNOS {
            bench.fake.fail(request, errno);
            let Some(error) = bench.build().err() else {
                // What was refused was to destroy something of a machine that ended.
                bench.fake.relent();
                continue;
            };
            told += usize::from(error.source.to_string().starts_with("VEVENTQ_ALLOC: "));
            bench.fake.relent();
            bench.assert_empty(&format!("request {request}"));
        }
    }
    assert_eq!(told, 2 * ERRNOS.len(), "two units, and each reason");
}
