//! How fast the IOMMU translates and obeys: `cargo bench --bench iommu`.
//!
//! Beside a hit of the cache stand a plain access to guest memory and one through the IOMMU of the vm-memory crate,
//! with the same mappings, taken in the same run, because only ratios travel between machines. `scripts/bench iommu`
//! makes rows of it. What is kept of each answer is the address, as a device would: to have the compiler keep all of it
//! costs another 7 ns, which the processor waits for bytes that were just stored to be read as words.

use std::hint::black_box;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use criterion::{Criterion, Throughput};
use ravelin::iommu::amd::Unit;
use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::request::{Access, Request};
use ravelin::platform::addr::{Bdf, Gpa, Iova};
use ravelin::platform::memory::GuestRam;
use vm_memory::iommu::{Error, IotlbIterator};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};

const RING: u64 = 0x10_0000;
const DEVICE_TABLE: u64 = 0x20_0000;
const TABLES: u64 = 0x40_0000;
const PAGES: u64 = 256;
/// Entries of the command ring, less the one that stays free.
const COMMANDS: u64 = 32_767;

fn device() -> Bdf {
    Bdf::new(1, 0, 0).expect("valid")
}

fn put(ram: &GuestRam, at: u64, value: u64) {
    ram.write_obj(Gpa(at), &value).expect("RAM");
}

/// Where page number `page` is mapped to. Backwards, so that no cache can take several pages for one.
fn frame(page: u64) -> u64 {
    0x100_0000 + ((PAGES - 1 - page) << 12)
}

/// vm-memory's own, with every mapping in its cache.
#[derive(Debug)]
struct Peer(RwLock<Iotlb>);

impl Iommu for Peer {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let cache = self.0.read().expect("nobody panics");
        Iotlb::lookup(cache, iova, length, access).map_err(|_| Error::IommuMisconfigured {
            reason: "every mapping is in the cache".to_owned(),
        })
    }
}

/// Memory behind it, with the mappings of [`unit`].
fn peer(ram: &GuestRam) -> IommuMemory<GuestMemoryMmap, Peer> {
    let mut cache = Iotlb::new();
    for page in 0..PAGES {
        let (at, to) = (GuestAddress(page << 12), GuestAddress(frame(page)));
        cache
            .set_mapping(at, to, 0x1000, Permissions::ReadWrite)
            .expect("a mapping");
    }
    IommuMemory::new(ram.backend().clone(), Peer(RwLock::new(cache)), true, ())
}

/// A unit that is on, and a device with `PAGES` pages of 4 KiB in a table of four levels.
fn unit() -> (GuestRam, Unit<GuestRam>) {
    let ranges = [(GuestAddress(0), 64 << 20)];
    let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("a mapping"));
    let pointer = |at: u64, level: u64| 3 << 61 | at | level << 9 | 1;
    (0..3).for_each(|step| {
        put(
            &ram,
            TABLES + step * 0x1000,
            pointer(TABLES + (step + 1) * 0x1000, 3 - step),
        )
    });
    (0..PAGES).for_each(|page| {
        put(&ram, TABLES + 0x3000 + page * 8, pointer(frame(page), 0));
    });
    let entry = DEVICE_TABLE + u64::from(device().requester_id()) * 32;
    put(&ram, entry, TABLES | 4 << 9 | 3 << 61 | 3);
    put(&ram, entry + 8, 1);
    let own = Bdf::new(0, 0, 2).expect("valid");
    let unit = Unit::new(own, Features::offer(Wanted::DEFAULT), ram.clone());
    let write = |offset: u64, value: u64| {
        let _ = unit.mmio_write(offset, &value.to_le_bytes());
    };
    write(0x00, DEVICE_TABLE | 0x1ff);
    write(0x08, RING | 15 << 56);
    write(0x18, 0x1001);
    (ram, unit)
}

fn at(page: u64) -> Request {
    Request::plain(device(), Iova(page << 12 | 0x123), Access::WRITE)
}

fn translate(criterion: &mut Criterion) {
    let (ram, unit) = unit();
    let mut group = criterion.benchmark_group("translate");
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("hit, guard held", |bencher| {
        let bus = unit.begin();
        bencher.iter(|| {
            for page in 0..PAGES {
                black_box(bus.translate(black_box(&at(page))).expect("mapped").target);
            }
        });
    });
    group.bench_function("hit, guard taken each time", |bencher| {
        bencher.iter(|| {
            for page in 0..PAGES {
                black_box(
                    unit.begin()
                        .translate(black_box(&at(page)))
                        .expect("mapped")
                        .target,
                );
            }
        });
    });
    group.bench_function("direct access of eight bytes", |bencher| {
        bencher.iter(|| {
            for page in 0..PAGES {
                let at = Gpa(frame(page) + 0x120);
                black_box(ram.read_obj::<u64>(black_box(at))).expect("RAM");
            }
        });
    });
    let peer = peer(&ram);
    group.bench_function("hit of vm-memory's", |bencher| {
        bencher.iter(|| {
            for page in 0..PAGES {
                let at = GuestAddress(page << 12 | 0x120);
                let slice = peer
                    .get_slices(black_box(at), 8, Permissions::Read)
                    .expect("mapped")
                    .next();
                let slice = slice.expect("mapped").expect("RAM");
                black_box(slice.ptr_guard().as_ptr());
            }
        });
    });
    group.bench_function("access of eight bytes through vm-memory's", |bencher| {
        bencher.iter(|| {
            for page in 0..PAGES {
                let at = GuestAddress(page << 12 | 0x120);
                black_box(peer.read_obj::<u64>(black_box(at))).expect("mapped");
            }
        });
    });
    group.bench_function("hit and access of eight bytes", |bencher| {
        let bus = unit.begin();
        bencher.iter(|| {
            for page in 0..PAGES {
                let found = bus.translate(black_box(&at(page))).expect("mapped");
                black_box(ram.read_obj::<u64>(Gpa(found.target.0 & !7))).expect("RAM");
            }
        });
    });
    group.bench_function("miss, four levels", |bencher| {
        bencher.iter(|| {
            // Far more pages than the cache holds would leave the processor's caches too: drop them instead.
            let _ = unit.mmio_write(0x28, &[0; 8]);
            let bus = unit.begin();
            for page in 0..PAGES {
                black_box(bus.translate(black_box(&at(page))).expect("mapped").target);
            }
        });
    });
    group.finish();
}

fn hits_by_two_threads(criterion: &mut Criterion) {
    let unit = Arc::new(unit().1);
    let mut group = criterion.benchmark_group("two threads");
    group.throughput(Throughput::Elements(2 * 64 * PAGES));
    group.bench_function("hit, guard taken each page", |bencher| {
        bencher.iter(|| {
            std::thread::scope(|threads| {
                for _ in 0..2 {
                    threads.spawn(|| {
                        for page in (0..64).flat_map(|_| 0..PAGES) {
                            black_box(unit.begin().translate(&at(page)).expect("mapped").target);
                        }
                    });
                }
            });
        });
    });
    group.finish();
}

fn obey(criterion: &mut Criterion) {
    let (ram, unit) = unit();
    let mut group = criterion.benchmark_group("commands");
    group.throughput(Throughput::Elements(COMMANDS));
    let fill = |command: &dyn Fn(u64) -> u128| {
        for entry in 0..=COMMANDS {
            ram.write(Gpa(RING + entry * 16), &command(entry).to_le_bytes())
                .expect("RAM");
        }
    };
    let pages = |entry: u64| u128::from((entry % PAGES) << 12) << 64 | 3 << 60 | 1 << 32;
    let wait = |entry: u64| {
        let store = u128::from(entry) << 64 | 1 << 60 | 0x8001;
        if entry % 2 == 1 { store } else { pages(entry) }
    };
    let forms: [(&str, &dyn Fn(u64) -> u128); 2] = [
        ("invalidate one page", &pages),
        ("invalidate one page and wait, in turn", &wait),
    ];
    for (name, form) in forms {
        fill(form);
        (0..PAGES).for_each(|page| assert!(unit.begin().translate(&at(page)).is_ok()));
        let mut tail = 0;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                tail = (tail + COMMANDS) % (COMMANDS + 1);
                let bytes = u32::try_from(tail * 16).expect("in the ring").to_le_bytes();
                let mut more = unit.mmio_write(0x2008, &bytes).more_commands;
                while more {
                    more = unit.run_commands().more_commands;
                }
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    translate(&mut criterion);
    hits_by_two_threads(&mut criterion);
    obey(&mut criterion);
    criterion.final_summary();
}
