//! Who hears of which store, by a kernel that only keeps slots.

use super::*;
use crate::platform::kvm::gate::{Jammed, Passage, Stop};
use crate::platform::kvm::slots::tests::FakeSlots;
use crate::platform::kvm::sys::SlotKind;
use std::thread;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const SIZE: u64 = 0x10_000;

/// A machine whose kernel is a fake.
struct Rig {
    host: FakeSlots,
    watched: WatchedPages,
}

impl Rig {
    fn new() -> Self {
        let len = usize::try_from(SIZE).expect("small");
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).expect("a small mapping");
        let rig = Self {
            host: FakeSlots::default(),
            watched: WatchedPages::new(GuestRam::new(ram)),
        };
        rig.watched.fill(&rig.host).expect("not refused");
        rig
    }

    fn watch(&self, watcher: &Arc<impl Watcher + 'static>, pages: &[u64]) -> Result<(), HostError> {
        let watcher: Arc<dyn Watcher> = watcher.clone();
        let pages = pages.iter().copied().map(Gpa).collect();
        self.watched.watch(&self.host, &Arc::downgrade(&watcher), &pages)
    }

    fn is_read_only(&self, page: u64) -> bool {
        self.host.kind(Gpa(page)) == Some(SlotKind::ReadOnly)
    }

    fn read(&self, at: u64) -> u64 {
        self.watched.ram().read_obj(Gpa(at)).expect("RAM")
    }
}

/// Keeps what it hears.
#[derive(Default)]
struct Ear(Mutex<Vec<(u64, u64)>>);

impl Watcher for Ear {
    fn written(&self, range: GpaRange) {
        lock(&self.0).push((range.start().0, range.len()));
    }
}

impl Ear {
    fn heard(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *lock(&self.0))
    }
}

#[test]
fn a_store_is_in_memory_and_heard_by_those_who_watch_its_page() {
    let (rig, one, both, none) = (Rig::new(), Arc::default(), Arc::default(), Arc::default());
    let ears: [&Arc<Ear>; 3] = [&one, &both, &none];
    for (ear, pages) in ears
        .into_iter()
        .zip([&[0x1000][..], &[0x1000, 0x2000], &[0x4000]])
    {
        rig.watch(ear, pages).expect("RAM");
    }
    rig.watched.store(Gpa(0x1ff8), &7_u64.to_le_bytes());
    assert_eq!(rig.read(0x1ff8), 7);
    assert_eq!(
        ears.map(|ear| ear.heard()),
        [vec![(0x1ff8, 8)], vec![(0x1ff8, 8)], vec![]]
    );
    rig.watched.store(Gpa(0x1ffe), &[1, 2, 3, 4]);
    rig.watched.store(Gpa(0x2fff), &[1]);
    assert_eq!(one.heard(), [(0x1ffe, 4)]);
    assert_eq!(both.heard(), [(0x1ffe, 4), (0x2fff, 1)], "across pages once");
    let counts = rig.watched.counts();
    assert_eq!((counts.pages, counts.stores, counts.compare_exchanges), (3, 3, 0));
}

#[test]
fn a_store_that_nobody_watches_any_more_is_carried_out_plainly() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.watch(&ear, &[0x1000]).expect("RAM");
    rig.watch(&ear, &[]).expect("nothing");
    rig.watched.store(Gpa(0x1000), &[9]);
    assert_eq!((rig.read(0x1000), ear.heard()), (9, vec![]));
}

#[test]
fn a_store_beyond_ram_is_neither_carried_out_nor_heard() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.watch(&ear, &[SIZE - PAGE_SIZE]).expect("RAM");
    assert!(rig.watched.has(Gpa(SIZE - 8), 8));
    for (at, len) in [(SIZE - 4, 8), (SIZE, 1), (u64::MAX, 8), (0, 0)] {
        assert!(!rig.watched.has(Gpa(at), len), "{at:#x}");
        rig.watched.store(Gpa(at), &vec![0xff; len]);
    }
    assert_eq!((rig.read(SIZE - 8), ear.heard()), (0, vec![]));
}

#[test]
fn a_compare_exchange_is_heard_if_it_stored() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.watch(&ear, &[0x1000]).expect("RAM");
    let (old, new) = (5_u128 << 64, 6_u128 << 64 | 7);
    assert_eq!(rig.watched.compare_exchange(Gpa(0x1010), old, new), Some(0));
    assert_eq!((rig.read(0x1018), ear.heard()), (0, vec![]));
    assert_eq!(rig.watched.compare_exchange(Gpa(0x1010), 0, new), Some(0));
    assert_eq!((rig.read(0x1010), rig.read(0x1018)), (7, 6));
    assert_eq!(ear.heard(), [(0x1010, 16)]);
    for nowhere in [SIZE - 8, SIZE, u64::MAX - 15, 0x1008] {
        assert_eq!(
            rig.watched.compare_exchange(Gpa(nowhere), 0, 1),
            None,
            "{nowhere:#x}"
        );
    }
    assert_eq!(rig.watched.counts().compare_exchanges, 2);
}

#[test]
fn what_is_watched_is_replaced_and_its_slots_go_with_it() {
    let (rig, ear, other) = (Rig::new(), Arc::new(Ear::default()), Arc::new(Ear::default()));
    let before = rig.host.pieces();
    rig.watch(&ear, &[0x1000, 0x2000]).expect("RAM");
    rig.watch(&other, &[0x2000]).expect("RAM");
    rig.watch(&ear, &[0x5000]).expect("RAM");
    let read_only = [0x1000, 0x2000, 0x5000].map(|page| rig.is_read_only(page));
    assert_eq!(read_only, [false, true, true]);
    rig.watched.store(Gpa(0x2000), &[1]);
    assert_eq!((ear.heard().len(), other.heard().len()), (0, 1));
    rig.watch(&ear, &[]).expect("nothing");
    rig.watch(&other, &[]).expect("nothing");
    assert_eq!(rig.host.pieces(), before);
    assert_eq!(rig.watched.counts().pages, 0);
}

#[test]
fn a_page_that_has_a_watcher_costs_the_next_one_no_slot() {
    let (rig, ear, other) = (Rig::new(), Arc::new(Ear::default()), Arc::new(Ear::default()));
    rig.watch(&ear, &[0x1000]).expect("RAM");
    let calls = rig.host.calls();
    rig.watch(&other, &[0x1000]).expect("RAM");
    rig.watch(&ear, &[]).expect("nothing");
    assert_eq!(rig.host.calls(), calls);
    assert!(rig.is_read_only(0x1000));
}

#[test]
fn a_watcher_that_is_gone_is_forgotten_by_the_next_change() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.watch(&Arc::new(Ear::default()), &[0x1000]).expect("RAM");
    rig.watched.store(Gpa(0x1000), &[3]);
    assert_eq!(rig.read(0x1000), 3);
    rig.watch(&ear, &[0x2000]).expect("RAM");
    assert!(!rig.is_read_only(0x1000));
    assert_eq!(rig.watched.counts().pages, 1);
}

#[test]
fn only_pages_of_ram_can_be_watched() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.watch(&ear, &[0x3000]).expect("RAM");
    let calls = rig.host.calls();
    for wrong in [0x1008, SIZE, u64::MAX - 4095] {
        let error = rig.watch(&ear, &[0x1000, wrong]).expect_err("no page of RAM");
        let expected = format!("cannot watch stores at {wrong:#x}, which is no page of guest RAM");
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(rig.host.calls(), calls);
    rig.watched.store(Gpa(0x3000), &[1]);
    assert_eq!(ear.heard(), [(0x3000, 1)], "as before");
}

struct Nobody;

impl Stop for Nobody {
    fn stop(&self) {}
}

fn passage(rig: &Rig) -> Arc<Passage> {
    rig.watched.gate().passage(Box::new(Nobody))
}

#[test]
fn a_host_that_refuses_leaves_what_was_watched_and_the_guest_goes_on() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.watch(&ear, &[0x3000]).expect("RAM");
    let before = rig.host.pieces();
    // Three go, the first comes.
    rig.host.refuse(&[4]);
    let error = rig.watch(&ear, &[0x1000]).expect_err("refused");
    assert_eq!(
        error.to_string(),
        "cannot change what the guest may store to in RAM at 00001000-00001fff"
    );
    assert_eq!(rig.host.pieces(), before);
    rig.watched.store(Gpa(0x3000), &[1]);
    rig.watched.store(Gpa(0x1000), &[1]);
    assert_eq!(ear.heard(), [(0x3000, 1)]);
    assert_eq!(rig.watched.gate().enter(&passage(&rig)), Ok(()));
}

#[test]
fn a_guest_with_a_hole_in_its_memory_does_not_run() {
    let (rig, ear) = (Rig::new(), Arc::new(Ear::default()));
    rig.host.refuse(&[1, 2]);
    rig.watch(&ear, &[0x1000]).expect_err("refused");
    let jammed = rig.watched.gate().enter(&passage(&rig));
    let why = "guest RAM at 00000000-0000ffff could not be put back: out of memory";
    assert_eq!(jammed, Err(Jammed(why.into())));
}

/// Moves its page up with every store, as a front end follows a table that moves.
struct Follower {
    rig: Rig,
    this: Weak<Self>,
}

impl Watcher for Follower {
    fn written(&self, range: GpaRange) {
        let pages = BTreeSet::from([Gpa(range.start().0 + PAGE_SIZE)]);
        let this: Weak<dyn Watcher> = self.this.clone();
        let watched = &self.rig.watched;
        watched.watch(&self.rig.host, &this, &pages).expect("RAM");
    }
}

#[test]
fn a_watcher_may_watch_others_from_inside_a_store() {
    let follower = Arc::new_cyclic(|this| Follower {
        rig: Rig::new(),
        this: this.clone(),
    });
    let rig = &follower.rig;
    rig.watch(&follower, &[0]).expect("RAM");
    rig.watched.store(Gpa(0), &[1]);
    rig.watched.store(Gpa(0x1000), &[2]);
    let read_only = [0, 0x1000, 0x2000].map(|page| rig.is_read_only(page));
    assert_eq!(read_only, [false, false, true]);
}

/// Keeps the newest contents of each processor's cell that it has heard of.
struct Copyist<'a> {
    ram: &'a GuestRam,
    cells: [AtomicU64; CELLS],
}

const CELLS: usize = 3;
const ROUNDS: usize = 50;
const PAGE: u64 = 0x2000;

fn cell(index: usize) -> Gpa {
    Gpa(PAGE + 8 * index as u64)
}

impl Watcher for Copyist<'static> {
    fn written(&self, range: GpaRange) {
        let index = usize::try_from((range.start().0 - PAGE) / 8).expect("a cell");
        let value = self.ram.read_obj(range.start()).expect("RAM");
        self.cells[index].store(value, Ordering::SeqCst);
    }
}

#[test]
fn no_store_is_missed_while_processors_run_and_watching_begins_and_ends() {
    let rig: &'static Rig = Box::leak(Box::new(Rig::new()));
    let copyist = Arc::new(Copyist {
        ram: rig.watched.ram(),
        cells: Default::default(),
    });
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let processors: Vec<_> = (0..CELLS)
            .map(|index| {
                let (passage, over) = (passage(rig), &over);
                scope.spawn(move || {
                    for value in 1_u64.. {
                        if over.load(Ordering::SeqCst) {
                            return;
                        }
                        rig.watched.gate().enter(&passage).expect("no hole");
                        let kind = rig.host.kind(cell(index)).expect("no hole");
                        if kind == SlotKind::Ram {
                            rig.watched.ram().write_obj(cell(index), &value).expect("RAM");
                        }
                        rig.watched.gate().leave(&passage);
                        if kind == SlotKind::ReadOnly {
                            rig.watched.store(cell(index), &value.to_le_bytes());
                        }
                    }
                })
            })
            .collect();
        for round in 0..ROUNDS {
            rig.watch(&copyist, &[PAGE]).expect("RAM");
            // Stores may come between the look at memory and this, and were heard then.
            for index in 0..CELLS {
                let there = rig.watched.ram().read_obj(cell(index)).expect("RAM");
                copyist.cells[index].fetch_max(there, Ordering::SeqCst);
            }
            thread::yield_now();
            if round + 1 < ROUNDS {
                rig.watch(&copyist, &[]).expect("nothing");
            }
        }
        over.store(true, Ordering::SeqCst);
        for processor in processors {
            processor.join().expect("no panic");
        }
    });
    for index in 0..CELLS {
        let there: u64 = rig.watched.ram().read_obj(cell(index)).expect("RAM");
        assert!(there > 0);
        assert_eq!(copyist.cells[index].load(Ordering::SeqCst), there);
    }
    assert!(rig.watched.counts().stores > 0);
}
