//! A driver that means harm, and one that is in a hurry.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;

use ravelin::iommu::amd::Unit;
use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::memory::{SystemMemory, Unreachable};
use ravelin::iommu::amd::remap::Remapped;
use ravelin::iommu::amd::spec::dte::{Dte, Interrupt};
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::Gpa;
use ravelin::platform::memory::GuestRam;
use ravelin::platform::msi::MsiMessage;

use crate::crowd;
use crate::driver::{
    DEVICE_TABLE, Driver, HOLE, INTERRUPT_TABLE, LOG, RAM, RING, device, host_dte, invalidate_pages, own,
    pte, read, reg, ring_base, wait, write,
};
use crate::scribble::{fed, run};

#[test]
fn a_log_on_top_of_the_ring_harms_nobody_else() {
    let driver = Driver::running();
    driver.disable(Control::new().with_event_log_en(true));
    driver.write(reg::EVENT_BASE, ring_base(RING, 9));
    driver.enable(Control::new().with_event_log_en(true));
    driver.submit(&[0; 64]);
    assert_eq!(driver.status() & 0x10, 0, "stopped by the first illegal command");
    assert_eq!(driver.get(RING + 16 * 64), 0);
}

#[test]
fn a_wait_that_overwrites_the_ring_is_carried_out_once() {
    let driver = Driver::running();
    driver.submit(&[wait(RING + 16, u64::MAX), wait(LOG, 1)]);
    assert_eq!(driver.unit.counts().commands[0], 2, "both were fetched together");
    assert_eq!(driver.get(RING + 16), u64::MAX);
}

#[test]
fn a_tail_beyond_the_ring_is_a_tail_inside_it() {
    let driver = Driver::running();
    driver.ram.write(Gpa(RING), &[0x10; 0x2000]).expect("RAM");
    driver.write(reg::COMMAND_TAIL, u64::MAX);
    assert_eq!(driver.read(reg::COMMAND_TAIL), 0x1ff0);
    assert_eq!(driver.read(reg::COMMAND_HEAD), 0, "the first entry is no command");
}

#[test]
fn every_device_number_and_domain_can_be_used_without_growing() {
    let mut driver = Driver::running();
    let root = driver.table();
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    for id in 0..=u16::MAX {
        let who = ravelin::platform::addr::Bdf::from_requester_id(id);
        driver.set_dte(who, host_dte(root, 4, id));
        assert_eq!(driver.target(&read(who, 0x1000)), Some(0x5000), "{id:#x}");
    }
}

#[test]
fn tables_anywhere_end_in_a_page_or_a_fault() {
    for at in [
        0,
        1 << 51,
        0x000f_ffff_ffff_f000,
        RAM,
        RAM - 0x1000,
        DEVICE_TABLE,
        0xfee0_0000,
    ] {
        let driver = Driver::running();
        driver.set_dte(device(), host_dte(at, 4, 1));
        assert_eq!(driver.target(&write(device(), 0xffff_ffff_f000)), None, "{at:#x}");
        assert_eq!(driver.events().len(), 1, "{at:#x}");
    }
}

/// Frames that devices may be given, in turn.
const FRAMES: u64 = 64;

#[test]
fn under_load_no_access_goes_on_in_a_page_that_was_given_back() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x100_0000));
    let freed: Vec<_> = (0..FRAMES).map(|frame| AtomicBool::new(frame != 0)).collect();
    let leaf = {
        let level3 = driver.get(root) & 0x000f_ffff_ffff_f000;
        let level2 = driver.get(level3) & 0x000f_ffff_ffff_f000;
        (driver.get(level2) & 0x000f_ffff_ffff_f000) + 8
    };
    let stop = AtomicBool::new(false);
    let accesses = AtomicU64::new(0);
    let unit = driver.unit.clone();
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let bus = unit.begin();
                    let found = bus.translate(&write(device(), 0x1000)).expect("always mapped");
                    let frame = usize::try_from((found.target.0 - 0x100_0000) >> 12).expect("small");
                    std::hint::spin_loop();
                    assert!(
                        !freed[frame].load(Ordering::SeqCst),
                        "frame {frame} was given back"
                    );
                    accesses.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // On a busy machine all turns may be over before a device has begun.
        while accesses.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        for turn in 1..400_u64 {
            let place = |turn: u64| usize::try_from(turn % FRAMES).expect("small");
            freed[place(turn)].store(false, Ordering::SeqCst);
            driver.put(leaf, pte(0x100_0000 + ((turn % FRAMES) << 12)));
            let page = invalidate_pages(1, 0, 0x1000);
            let everything = invalidate_pages(1, 0, 0x7fff_ffff_ffff_f001);
            driver.flush(&[[page, page, everything][place(turn) % 3]]);
            freed[place(turn - 1)].store(true, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(accesses.load(Ordering::Relaxed) > 0);
}

#[test]
fn doorbells_from_many_processors_lose_no_command() {
    let driver = Driver::running();
    let commands = 400_u64;
    for index in 0..commands {
        driver
            .ram
            .write(
                Gpa(RING + index * 16),
                &wait(LOG + 0x1000 + index * 8, 1).to_le_bytes(),
            )
            .expect("RAM");
    }
    let next = AtomicU64::new(1);
    std::thread::scope(|threads| {
        for _ in 0..4 {
            threads.spawn(|| {
                // Tails go forward only: a lower one that comes later would look like a lap.
                while next.load(Ordering::SeqCst) <= commands {
                    let lock = driver.interrupts.lock().expect("not poisoned");
                    let tail = next.fetch_add(1, Ordering::SeqCst).min(commands) * 16;
                    let tail = u32::try_from(tail).expect("small");
                    let effects = driver.unit.mmio_write(reg::COMMAND_TAIL, &tail.to_le_bytes());
                    drop(lock);
                    driver.carry_out(effects);
                }
            });
        }
    });
    assert_eq!(driver.read(reg::COMMAND_HEAD), commands * 16);
    assert!((0..commands).all(|index| driver.get(LOG + 0x1000 + index * 8) == 1));
}

#[test]
fn an_interrupt_entry_that_changes_all_the_time_is_old_or_new() {
    let driver = Driver::running();
    driver.set_dte(device(), remapped());
    driver.disable(Control::new().with_ga_en(true));
    let at = Gpa(INTERRUPT_TABLE);
    driver.ram.write_obj(at, &0x0041_0201_u32).expect("RAM");
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                driver.ram.write_obj(at, &0x0052_0301_u32).expect("RAM");
                driver.ram.write_obj(at, &0x0041_0201_u32).expect("RAM");
            }
        });
        for _ in 0..5000 {
            let Remapped::To(to) = driver.msi(device(), 0xfee0_0000, 0).expect("always valid") else {
                panic!("remapped");
            };
            assert!(matches!((to.destination, to.vector), (2, 0x41) | (3, 0x52)));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// RAM in which sixteen bytes are changed twice, each time as a whole, while the unit reads them.
struct Turning {
    ram: GuestRam,
    at: u64,
    values: [[u64; 2]; 3],
    /// How many quadwords of them were read before each change.
    turns: [usize; 2],
    read: Cell<usize>,
}

impl SystemMemory for Turning {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        SystemMemory::read(&self.ram, at, data)
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        SystemMemory::write(&self.ram, at, data)
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        let half = match at.0.wrapping_sub(self.at) {
            0 => 0,
            8 => 1,
            _ => return self.ram.load(at),
        };
        let read = self.read.replace(self.read.get() + 1);
        let turn = self.turns.iter().filter(|turn| **turn <= read).count();
        Ok(self.values[turn][half])
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        self.ram.store(at, value)
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        self.ram.compare_exchange(at, old, new)
    }
}

/// A unit that is on over the memory of `driver`, for each way in which what stands at `at` becomes the second of `values`
/// and then the third.
fn units_over_turning(
    driver: &Driver,
    at: u64,
    values: [[u64; 2]; 3],
) -> impl Iterator<Item = ([usize; 2], Unit<Turning>)> {
    let all = (0..10).flat_map(|first| (first..10).map(move |second| [first, second]));
    all.map(move |turns| {
        let memory = Turning {
            ram: driver.ram.clone(),
            at,
            values,
            turns,
            read: Cell::new(0),
        };
        let unit = Unit::new(own(), Features::offer(Wanted::EVERYTHING), memory);
        let on = Control::new()
            .with_iommu_en(true)
            .with_ga_en(true)
            .with_xt_en(true);
        for (at, value) in [
            (reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff),
            (reg::CONTROL, on.into_bits()),
        ] {
            let _nothing = unit.mmio_write(at, &value.to_le_bytes());
        }
        (turns, unit)
    })
}

/// The device's entry says that its messages are remapped.
fn remapped() -> Dte {
    let mut dte = host_dte(0, 0, 0);
    dte.interrupt = Interrupt::new()
        .with_iv(true)
        .with_int_ctl(2)
        .with_table_length(9)
        .with_root(INTERRUPT_TABLE >> 6);
    dte
}

#[test]
fn a_long_interrupt_entry_that_changes_while_it_is_read_is_one_of_those_that_stood_there() {
    let driver = Driver::running();
    driver.set_dte(device(), remapped());
    // The third has the first half of the first.
    let values = [[0x201, 0x41], [0x301, 0x52], [0x201, 0x63]];
    for (turns, unit) in units_over_turning(&driver, INTERRUPT_TABLE, values) {
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0,
        };
        let Ok(Remapped::To(to)) = unit.begin().remap(device(), message) else {
            panic!("remapped");
        };
        let found = [u64::from(to.destination) << 8 | 1, u64::from(to.vector)];
        assert!(values.contains(&found), "{found:x?} with changes at {turns:?}");
    }
}

#[test]
fn half_a_device_entry_that_changes_while_it_is_read_is_one_of_those_that_stood_there() {
    let driver = Driver::running();
    driver.set_dte(device(), host_dte(HOLE, 4, 1));
    let half = |root, domain| {
        let [first, second, ..] = host_dte(root, 4, domain).into_quadwords();
        [first, second]
    };
    // Tables that are not there, so that the record names both halves.
    let values = [half(HOLE, 1), half(HOLE + 0x1000, 2), half(HOLE, 3)];
    let at = DEVICE_TABLE + u64::from(device().requester_id()) * 32;
    for (turns, unit) in units_over_turning(&driver, at, values) {
        let abort = unit.begin().translate(&read(device(), 0)).expect_err("no table");
        let record = abort.event.expect("reported").record();
        let (table, domain) = (record >> 64, record >> 32 & 0xffff);
        let found = [(HOLE, 1), (HOLE + 0x1000, 2), (HOLE, 3)].contains(&(
            u64::try_from(table).expect("64 bits"),
            u16::try_from(domain).expect("16 bits"),
        ));
        assert!(found, "{table:#x} in {domain} with changes at {turns:?}");
    }
}

#[test]
fn what_the_fuzzer_keeps_shows_no_difference_from_the_model() {
    let kept = std::fs::read_dir("fuzz/corpus/iommu").expect("kept inputs");
    let ran = kept
        .map(|entry| fed(&std::fs::read(entry.expect("an entry").path()).expect("an input")))
        .count();
    assert!(ran > 100, "{ran} inputs");
}

#[test]
fn what_the_fuzzer_keeps_of_guests_reaches_nobody_elses() {
    let kept = std::fs::read_dir("fuzz/corpus/unit_guests").expect("kept inputs");
    let ran = kept
        .map(|entry| crowd::run(&std::fs::read(entry.expect("an entry").path()).expect("an input")))
        .count();
    assert!(ran > 100, "{ran} inputs");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_unit_panic_or_differ_from_the_model(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        run(&bytes);
    }

    #[test]
    fn guests_of_one_unit_reach_nothing_of_each_others_whatever_they_do(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        crowd::run(&bytes);
    }
}
