//! Every interleaving of the IOMMU's lock-free parts, by a model checker: their sources are compiled here once
//! more, on the checker's atomics instead of the processor's.

#[expect(
    unreachable_pub,
    clippy::modulo_one,
    reason = "a module of the unit, compiled here once more with a single shard"
)]
#[path = "../src/iommu/amd/grace.rs"]
mod grace;
#[path = "../src/iommu/polling/hearing.rs"]
mod hearing;
#[expect(unreachable_pub, reason = "a module of the unit, compiled here once more")]
#[path = "../src/iommu/amd/slot.rs"]
mod slot;

/// What `src/iommu/amd/sync.rs` is to the unit.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    pub(crate) const SHARDS: usize = 1;

    /// The checker's exchanges order less than x86-64's, so this one is real.
    pub(crate) fn fence_after_exchange() {
        full_fence();
    }

    pub(crate) fn full_fence() {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }

    pub(crate) fn pause() {
        loom::thread::yield_now();
    }

    pub(crate) fn thread_number() -> usize {
        0
    }
}

use grace::Grace;
use hearing::{Hearing, Line};
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use slot::{Announced, Slot};

/// A device table entry, and two page tables of which it names one; each cached as the unit caches them.
#[derive(Default)]
struct Moved {
    /// The device's entry: the number of its table. Both tables are of one domain.
    device: AtomicU64,
    /// The same as it was read last: tag and number.
    known: Slot<2>,
    known_announced: Announced,
    /// The page of either table: tag and frame.
    entry: Slot<2>,
    announced: Announced,
    grace: Grace,
    /// The guest has the first table's frame back.
    freed: AtomicBool,
}

impl Moved {
    /// The frame that table `number` leads to.
    const fn frame(number: u64) -> u64 {
        if number == 0 { OLD } else { NEW }
    }

    /// The device's entry, from the cache or from memory.
    fn table(&self) -> u64 {
        if let Some([_, number]) = self.known.find(TAG) {
            return number;
        }
        let announced = self.known_announced.count();
        let number = self.device.load(Ordering::Acquire);
        self.known
            .fill([TAG, number], || self.known_announced.count() == announced);
        number
    }

    /// A device's access, as in [`Tiny`].
    fn access(&self) {
        let _inside = self.grace.enter();
        let announced = self.announced.count();
        let number = self.table();
        let frame = self.entry.find(TAG).map_or_else(
            || {
                let frame = Self::frame(number);
                self.entry
                    .fill([TAG, frame], || self.announced.count() == announced);
                frame
            },
            |[_, frame]| frame,
        );
        assert!(
            frame == NEW || !self.freed.load(Ordering::Acquire),
            "an access goes by a table that was given back"
        );
    }

    /// The guest gives the device the other table, invalidates entry and page, waits, and takes the first table back.
    fn switch(&self) {
        self.device.store(1, Ordering::Release);
        self.known_announced.invalidation();
        self.known.clear_if(|words| words[0] == TAG);
        self.announced.invalidation();
        self.entry.clear_if(|words| words[0] == TAG);
        self.grace.wait();
        self.freed.store(true, Ordering::Release);
    }
}

/// A cache of one entry over a page table of one entry, used as the unit uses its own.
#[derive(Default)]
struct Tiny {
    /// The page table: which frame is mapped.
    table: AtomicU64,
    entry: Slot<3>,
    announced: Announced,
    /// Changes when the whole domain is invalidated.
    stamp: AtomicU64,
    grace: Grace,
    /// The guest has the old frame back.
    freed: AtomicBool,
}

const TAG: u64 = 1 << 63;
const OLD: u64 = 1;
const NEW: u64 = 2;

impl Tiny {
    fn with_old_mapping() -> Arc<Self> {
        let tiny = Self::default();
        tiny.table.store(OLD, Ordering::Relaxed);
        Arc::new(tiny)
    }

    /// Translate, by the cache or by a walk that is then kept.
    fn translate(&self) -> u64 {
        let stamp = self.stamp.load(Ordering::Acquire);
        if let Some([_, frame, filled]) = self.entry.find(TAG).filter(|words| words[2] == stamp) {
            assert_eq!(filled, stamp);
            return frame;
        }
        let announced = self.announced.count();
        let stamp = self.stamp.load(Ordering::Acquire);
        let frame = self.table.load(Ordering::Acquire);
        self.entry
            .fill([TAG, frame, stamp], || self.announced.count() == announced);
        frame
    }

    /// A device's access: the frame it goes to is still the device's when the access ends.
    fn access(&self) {
        let _inside = self.grace.enter();
        let frame = self.translate();
        assert!(
            frame == NEW || !self.freed.load(Ordering::Acquire),
            "an access goes on in a frame that was given back"
        );
    }

    /// The guest maps another frame, invalidates by `how`, waits, and takes the old frame back.
    fn remap(&self, how: fn(&Self)) {
        self.table.store(NEW, Ordering::Release);
        how(self);
        self.grace.wait();
        self.freed.store(true, Ordering::Release);
    }

    fn drop_page(&self) {
        self.announced.invalidation();
        self.entry.clear_if(|words| words[0] == TAG);
    }

    fn drop_domain(&self) {
        self.announced.invalidation();
        self.stamp.fetch_add(1, Ordering::SeqCst);
    }
}

/// Try every schedule that takes the processor from a thread at most `preemptions` times.
fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(f);
}

#[test]
fn no_access_outlives_the_wait_after_an_invalidated_page() {
    check(2, || {
        let tiny = Tiny::with_old_mapping();
        let device = {
            let tiny = tiny.clone();
            loom::thread::spawn(move || tiny.access())
        };
        tiny.remap(Tiny::drop_page);
        tiny.access();
        device.join().expect("no panic");
    });
}

#[test]
fn no_access_outlives_the_wait_after_an_invalidated_domain() {
    check(2, || {
        let tiny = Tiny::with_old_mapping();
        let device = {
            let tiny = tiny.clone();
            loom::thread::spawn(move || tiny.access())
        };
        tiny.remap(Tiny::drop_domain);
        tiny.access();
        device.join().expect("no panic");
    });
}

#[test]
fn no_walk_of_one_device_is_left_for_another_after_the_wait() {
    check(1, || {
        let tiny = Tiny::with_old_mapping();
        let devices = [(); 2].map(|()| {
            let tiny = tiny.clone();
            loom::thread::spawn(move || tiny.access())
        });
        tiny.remap(Tiny::drop_page);
        devices
            .into_iter()
            .for_each(|device| device.join().expect("no panic"));
    });
}

#[test]
fn no_walk_by_a_device_table_entry_is_left_after_the_wait_behind_its_invalidation() {
    check(2, || {
        let moved = Arc::new(Moved::default());
        let device = {
            let moved = moved.clone();
            loom::thread::spawn(move || moved.access())
        };
        moved.switch();
        moved.access();
        device.join().expect("no panic");
    });
}

/// Which of two tables a register names, and a cache of one entry over both, used as the unit uses its registers.
#[derive(Default)]
struct Switched {
    register: AtomicU64,
    entry: Slot<3>,
    announced: Announced,
    /// Changes when everything is forgotten.
    stamp: AtomicU64,
}

impl Switched {
    /// A device's request: the frame it goes to.
    fn request(&self) -> u64 {
        let announced = self.announced.count();
        let number = self.register.load(Ordering::Acquire);
        let stamp = self.stamp.load(Ordering::Acquire);
        if let Some([_, frame, _]) = self.entry.find(TAG).filter(|words| words[2] == stamp) {
            return frame;
        }
        let frame = Moved::frame(number);
        self.entry
            .fill([TAG, frame, stamp], || self.announced.count() == announced);
        frame
    }

    /// The guest writes the register.
    fn switch(&self) {
        self.register.store(1, Ordering::Release);
        self.announced.invalidation();
        self.stamp.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn no_request_goes_by_a_register_of_before_once_it_is_written() {
    check(2, || {
        let switched = Arc::new(Switched::default());
        let device = {
            let switched = switched.clone();
            loom::thread::spawn(move || {
                switched.request();
            })
        };
        switched.switch();
        assert_eq!(switched.request(), NEW);
        device.join().expect("no panic");
        assert_eq!(switched.request(), NEW, "what the device left");
    });
}

#[test]
fn what_registers_say_is_read_as_it_stood_between_two_writes() {
    check(3, || {
        let slot = Arc::new(Slot::<2>::default());
        let guest = {
            let slot = slot.clone();
            loom::thread::spawn(move || (1..3).for_each(|value| slot.replace([value, value])))
        };
        let [first, second] = slot.read();
        assert_eq!(first, second);
        guest.join().expect("no panic");
        assert_eq!(slot.read(), [2, 2]);
    });
}

#[test]
fn the_words_of_a_slot_are_seen_together() {
    check(2, || {
        let slot = Arc::new(Slot::<3>::default());
        let writers = [5_u64, 6].map(|word| {
            let slot = slot.clone();
            loom::thread::spawn(move || slot.fill([TAG, word, word], || true))
        });
        let seen = slot.find(TAG).unwrap_or([TAG, 0, 0]);
        assert_eq!(seen[1], seen[2]);
        writers
            .into_iter()
            .for_each(|writer| writer.join().expect("no panic"));
    });
}

#[test]
fn two_waits_in_a_row_wait_for_late_arrivals() {
    check(2, || {
        let grace = Arc::new(Grace::default());
        let phase = Arc::new(AtomicU64::new(0));
        let visitor = {
            let (grace, phase) = (grace.clone(), phase.clone());
            loom::thread::spawn(move || {
                let _inside = grace.enter();
                let entered = phase.load(Ordering::Acquire);
                let later = phase.load(Ordering::Acquire);
                assert!(later <= entered + 1, "a wait passed over somebody inside");
            })
        };
        for step in [1, 2] {
            phase.store(step, Ordering::Release);
            grace.wait();
        }
        phase.store(3, Ordering::Release);
        visitor.join().expect("no panic");
    });
}

#[test]
fn what_is_counted_inside_adds_up_when_all_have_left() {
    check(2, || {
        let grace = Arc::new(Grace::default());
        let visitor = {
            let grace = grace.clone();
            loom::thread::spawn(move || {
                let inside = grace.enter();
                inside.count();
                inside.count();
            })
        };
        grace.wait();
        let inside = grace.enter();
        inside.count();
        assert!(grace.counted() <= 2, "who has not left is not counted");
        drop(inside);
        visitor.join().expect("no panic");
        assert_eq!(grace.counted(), 3);
    });
}

/// A unit with a doorbell and nothing else, behind a hypervisor that puts writes aside while it is told to.
#[derive(Default)]
struct Bell {
    hearing: Hearing,
    /// Whether writes are put aside, and those that were.
    hypervisor: Mutex<(bool, Vec<u64>)>,
    /// Locked while writes are delivered, as the machine's ring is.
    delivery: Mutex<()>,
    tail: AtomicU64,
    /// Commands run up to here.
    head: Mutex<u64>,
}

impl Line for Bell {
    fn put_aside(&self) -> bool {
        self.hypervisor.lock().expect("no panic").0 = true;
        true
    }

    fn let_through(&self) -> bool {
        self.hypervisor.lock().expect("no panic").0 = false;
        true
    }

    fn deliver(&self) {
        let _delivery = self.delivery.lock().expect("no panic");
        let waiting = std::mem::take(&mut self.hypervisor.lock().expect("no panic").1);
        for tail in waiting {
            self.tail.store(tail, Ordering::SeqCst);
            self.hearing.arrived();
        }
    }
}

impl Bell {
    fn run_commands(&self) {
        *self.head.lock().expect("no panic") = self.tail.load(Ordering::SeqCst);
    }

    /// The guest rings: aside, or as an exit that runs the commands at once.
    fn ring(&self, tail: u64) {
        {
            let mut hypervisor = self.hypervisor.lock().expect("no panic");
            if hypervisor.0 {
                hypervisor.1.push(tail);
                return;
            }
        }
        self.hearing.catch_up(self);
        self.tail.store(tail, Ordering::SeqCst);
        self.run_commands();
    }

    /// The thread polls once, and stops.
    fn poll_once(&self) {
        self.hearing.begin(self);
        self.deliver();
        if self.hearing.take_rung() {
            self.run_commands();
        }
        self.hearing.end(self);
        if self.hearing.take_rung() {
            self.run_commands();
        }
    }
}

#[test]
fn no_doorbell_is_lost_between_polling_and_exits() {
    check(3, || {
        let bell = Arc::new(Bell::default());
        let poller = {
            let bell = bell.clone();
            loom::thread::spawn(move || bell.poll_once())
        };
        bell.ring(1);
        bell.ring(2);
        poller.join().expect("no panic");
        assert_eq!(bell.tail.load(Ordering::SeqCst), 2);
        assert_eq!(*bell.head.lock().expect("no panic"), 2);
    });
}

#[test]
fn no_exit_overtakes_a_doorbell_that_was_put_aside() {
    check(3, || {
        let bell = Arc::new(Bell::default());
        let poller = {
            let bell = bell.clone();
            loom::thread::spawn(move || bell.poll_once())
        };
        bell.ring(1);
        // Another register, always an exit.
        bell.hearing.catch_up(&*bell);
        assert_eq!(bell.tail.load(Ordering::SeqCst), 1);
        poller.join().expect("no panic");
    });
}
