//! I: what invalidations drop, and when.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::memory::{SystemMemory, Unreachable};
use ravelin::iommu::amd::processor::{Follower, NoAnswer};
use ravelin::iommu::amd::request::Request;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::iommu::amd::{Effects, Unit};
use ravelin::platform::addr::Gpa;
use ravelin::platform::memory::GuestRam;

use crate::driver::{
    DEVICE_TABLE, Driver, EVERYTHING, FLAG, GN, INVALIDATE_ALL, PDE, RING, RING_LENGTH, S, device, guest_dte,
    host_dte, invalidate_device, invalidate_pages, other_device, own, pasid, pde, pte, read, reg, ring_base,
    wait, write,
};

fn with_pages(count: u64) -> (Driver, u64) {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    (0..count).for_each(|n| driver.map(root, 4, n << 12, 1, pte(0x10_0000 + (n << 12))));
    (0..count).for_each(|n| {
        assert_eq!(
            driver.target(&read(device(), n << 12)),
            Some(0x10_0000 + (n << 12))
        );
    });
    (0..count).for_each(|n| driver.map(root, 4, n << 12, 1, pte(0x80_0000 + (n << 12))));
    (driver, root)
}

/// Pages that are translated by the entries of now rather than by those of before.
fn renewed(driver: &Driver, count: u64) -> Vec<u64> {
    let target = |n: &u64| driver.target(&read(device(), n << 12));
    (0..count)
        .filter(|n| target(n) == Some(0x80_0000 + (n << 12)))
        .collect()
}

#[test]
fn i1_after_an_invalidation_the_new_entry_is_used() {
    let (mut driver, _) = with_pages(1);
    assert_eq!(renewed(&driver, 1).len(), 0);
    driver.flush(&[invalidate_pages(1, 0, 0)]);
    assert_eq!(renewed(&driver, 1), [0]);
}

#[test]
fn i2_one_invalidation_reaches_every_device_of_the_domain() {
    let (mut driver, root) = with_pages(1);
    driver.set_dte(other_device(), host_dte(root, 4, 1));
    assert_eq!(
        driver.target(&read(other_device(), 0)),
        Some(0x10_0000),
        "shared with the first device"
    );
    driver.flush(&[invalidate_pages(1, 0, 0)]);
    assert_eq!(driver.target(&read(other_device(), 0)), Some(0x80_0000));
    assert_eq!(renewed(&driver, 1), [0]);
}

#[test]
fn i3_the_size_code_says_how_many_pages() {
    let (mut driver, _) = with_pages(8);
    driver.flush(&[invalidate_pages(1, 0, 0x1000 | S)]);
    assert_eq!(renewed(&driver, 8), [0, 1, 2, 3]);
}

#[test]
fn i4_a_part_of_a_large_page_drops_all_of_it() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0, 2, pte(0x40_0000));
    assert_eq!(driver.target(&read(device(), 0x1f_f123)), Some(0x5f_f123));
    driver.map(root, 4, 0, 2, pte(0x80_0000));
    driver.flush(&[invalidate_pages(1, 0, 0x7000)]);
    assert_eq!(driver.target(&read(device(), 0x1f_f123)), Some(0x9f_f123));
}

#[test]
fn i5_the_code_for_everything_drops_the_domain() {
    let (mut driver, _) = with_pages(16);
    driver.flush(&[invalidate_pages(1, 0, EVERYTHING | S | PDE)]);
    assert_eq!(renewed(&driver, 16).len(), 16);
}

#[test]
fn i6_all_ones_mean_everything_too() {
    let (mut driver, _) = with_pages(16);
    driver.flush(&[invalidate_pages(1, 0, 0xffff_ffff_ffff_f000 | S)]);
    assert_eq!(renewed(&driver, 16).len(), 16);
}

#[test]
fn i7_a_replaced_table_is_used_after_an_invalidation_of_tables() {
    let mut driver = Driver::running();
    let root = driver.table();
    let (old, new) = (driver.table(), driver.table());
    driver.set_dte(device(), host_dte(root, 2, 1));
    driver.put(root, pde(old, 1));
    driver.put(old, pte(0x5000));
    driver.put(new, pte(0x6000));
    assert_eq!(driver.target(&read(device(), 0)), Some(0x5000));
    driver.put(root, pde(new, 1));
    driver.flush(&[invalidate_pages(1, 0, PDE)]);
    assert_eq!(driver.target(&read(device(), 0)), Some(0x6000));
}

#[test]
fn i8_a_changed_device_entry_is_used_after_its_invalidation() {
    let (mut driver, _) = with_pages(1);
    let other = driver.attach(device(), 2);
    driver.map(other, 4, 0, 1, pte(0x7000));
    driver.flush(&[invalidate_device(device())]);
    assert_eq!(driver.target(&read(device(), 0)), Some(0x7000));
}

#[test]
fn i9_without_invalidation_an_entry_is_old_or_new_as_a_whole() {
    let (mut driver, _) = with_pages(1);
    let other = driver.attach(device(), 2);
    driver.map(other, 4, 0, 1, pte(0x7000));
    assert_eq!(
        driver.target(&read(device(), 0)),
        Some(0x10_0000),
        "the old entry with its own domain"
    );
}

#[test]
fn i10_a_page_that_appears_is_seen_without_any_command() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    assert_eq!(driver.target(&read(device(), 0x1000)), None);
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    assert_eq!(driver.target(&read(device(), 0x1000)), Some(0x5000));
}

#[test]
fn a_page_that_gains_a_permission_is_seen_without_any_command() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x5000) & !(1 << 62));
    assert_eq!(driver.target(&read(device(), 0x1000)), Some(0x5000));
    assert_eq!(driver.target(&write(device(), 0x1000)), None);
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000));
}

#[test]
fn i12_a_wait_is_answered_only_after_accesses_in_flight_have_ended() {
    let (driver, _) = with_pages(1);
    let commands = [invalidate_pages(1, 0, 0), wait(FLAG, 1)];
    for (index, command) in (0..).zip(commands) {
        let at = Gpa(RING + index * 16);
        driver.ram.write(at, &command.to_le_bytes()).expect("RAM");
    }
    let ended = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let in_flight = driver.unit.begin();
        let found = in_flight.translate(&write(device(), 0)).expect("mapped");
        let doorbell = threads.spawn(|| {
            driver.write_dword(reg::COMMAND_TAIL, 0x20);
            assert!(ended.load(Ordering::SeqCst), "the access had ended");
            driver.get(FLAG)
        });
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(driver.get(FLAG), 0);
        driver.ram.write(found.target, &[1]).expect("RAM");
        ended.store(true, Ordering::SeqCst);
        drop(in_flight);
        assert_eq!(doorbell.join().expect("no panic"), 1);
    });
}

/// Says when invalidations were passed on, which is before the wait behind them.
#[derive(Default)]
struct Passed(AtomicBool);

impl Follower for Passed {
    fn follow(&self, _batch: &[Command]) -> Result<(), NoAnswer> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn a_wait_that_had_to_wait_for_an_access_is_the_last_of_its_call() {
    let (driver, _) = with_pages(1);
    let passed = Arc::new(Passed::default());
    driver.unit.add_follower(passed.clone());
    let invalidate = invalidate_pages(1, 0, 0);
    let commands = [invalidate, wait(FLAG, 1), invalidate, wait(FLAG, 2)];
    for (index, command) in (0..).zip(commands) {
        let at = Gpa(RING + index * 16);
        driver.ram.write(at, &command.to_le_bytes()).expect("RAM");
    }
    let effects = std::thread::scope(|threads| {
        let in_flight = driver.unit.begin();
        let ring = || driver.unit.mmio_write(reg::COMMAND_TAIL, &0x40_u32.to_le_bytes());
        let doorbell = threads.spawn(ring);
        while !passed.0.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(100));
        drop(in_flight);
        doorbell.join().expect("no panic")
    });
    assert!(effects.more_commands);
    assert_eq!((driver.get(FLAG), driver.read(reg::COMMAND_HEAD)), (1, 0x20));
    assert!(!driver.unit.run_commands().more_commands, "nobody was in flight");
    assert_eq!((driver.get(FLAG), driver.read(reg::COMMAND_HEAD)), (2, 0x40));
}

/// What a test does in between.
type Act = Rc<RefCell<Option<Box<dyn FnOnce()>>>>;

/// RAM in which something happens, once, right after the quadword at `at` was read.
struct Meddled {
    ram: GuestRam,
    at: u64,
    act: Act,
}

impl SystemMemory for Meddled {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        SystemMemory::read(&self.ram, at, data)
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        SystemMemory::write(&self.ram, at, data)
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        let found = self.ram.load(at);
        if at.0 == self.at
            && let Some(act) = self.act.take()
        {
            act();
        }
        found
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        self.ram.store(at, value)
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        self.ram.compare_exchange(at, old, new)
    }
}

#[test]
fn a_walk_by_an_entry_that_was_invalidated_meanwhile_is_kept_for_nobody() {
    let mut driver = Driver::at_reset();
    let (old, new) = (driver.attach(device(), 1), driver.attach(other_device(), 1));
    driver.map(old, 4, 0x1000, 1, pte(0x5000));
    driver.map(new, 4, 0x1000, 1, pte(0x6000));
    let act = Act::default();
    let unit = Rc::new(Unit::new(
        own(),
        Features::offer(Wanted::EVERYTHING),
        Meddled {
            ram: driver.ram.clone(),
            // The last quadword of the first device's entry.
            at: DEVICE_TABLE + u64::from(device().requester_id()) * 32 + 24,
            act: act.clone(),
        },
    ));
    let on = Control::new().with_iommu_en(true).with_cmd_buf_en(true);
    for (at, value) in [
        (reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff),
        (reg::COMMAND_BASE, ring_base(RING, RING_LENGTH)),
        (reg::CONTROL, on.into_bits()),
    ] {
        let owed = unit.mmio_write(at, &value.to_le_bytes());
        assert_eq!(owed, Effects::default());
    }
    let target = |device| {
        let found = unit.begin().translate(&read(device, 0x1000));
        found.ok().map(|found| found.target.0)
    };
    // The guest takes the device out of the domain, whose tables it has others for, and does not wait yet.
    let (ram, weak) = (driver.ram.clone(), Rc::downgrade(&unit));
    driver.set_dte(device(), host_dte(old, 4, 1));
    let moved = host_dte(new, 4, 2).into_quadwords();
    *act.borrow_mut() = Some(Box::new(move || {
        for (index, quadword) in (0..).zip(moved) {
            let at = DEVICE_TABLE + u64::from(device().requester_id()) * 32 + index * 8;
            ram.write_obj(Gpa(at), &quadword).expect("RAM");
        }
        let commands = [
            invalidate_device(device()),
            invalidate_pages(1, 0, EVERYTHING | S | PDE),
        ];
        for (index, command) in (0..).zip(commands) {
            ram.write(Gpa(RING + index * 16), &command.to_le_bytes())
                .expect("RAM");
        }
        let unit: Rc<Unit<Meddled>> = weak.upgrade().expect("alive");
        let owed = unit.mmio_write(reg::COMMAND_TAIL, &0x20_u32.to_le_bytes());
        assert_eq!(owed, Effects::default());
    }));
    assert_eq!(target(device()), Some(0x5000), "in flight since before");
    assert!(act.borrow().is_none(), "it happened");
    assert_eq!(target(other_device()), Some(0x6000));
    assert_eq!(target(device()), Some(0x6000));
}

fn with_spaces() -> (Driver, [u64; 2]) {
    let mut driver = Driver::running();
    let gcr3 = driver.table();
    let roots = [driver.table(), driver.table()];
    driver.put(gcr3, roots[0] | 1);
    driver.put(gcr3 + 5 * 8, roots[1] | 1);
    let mut dte = guest_dte(gcr3, 1);
    dte.host.set_giov(true);
    driver.set_dte(device(), dte);
    roots
        .iter()
        .for_each(|root| driver.map_guest(*root, 4, 0x1000, 1, 0x5007));
    (driver, roots)
}

#[test]
fn i13_an_invalidation_of_one_space_drops_that_space() {
    let (mut driver, roots) = with_spaces();
    let plain = read(device(), 0x1000);
    let in_space: Request = plain.in_space(pasid(5));
    assert_eq!(
        (driver.target(&plain), driver.target(&in_space)),
        (Some(0x5000), Some(0x5000))
    );
    roots
        .iter()
        .for_each(|root| driver.map_guest(*root, 4, 0x1000, 1, 0x6007));
    driver.flush(&[invalidate_pages(1, 0, 0x1000 | GN)]);
    assert_eq!(driver.target(&plain), Some(0x6000));
    driver.flush(&[invalidate_pages(1, 5, 0x1000 | GN)]);
    assert_eq!(driver.target(&in_space), Some(0x6000));
}

#[test]
fn an_invalidation_without_a_space_drops_the_page_in_every_space() {
    for pasids in [vec![None], vec![Some(5)], vec![None, Some(5)]] {
        let (mut driver, roots) = with_spaces();
        let asked: Vec<_> = pasids
            .iter()
            .map(|space| {
                let plain = read(device(), 0x1000);
                space.map_or(plain, |space| plain.in_space(pasid(space)))
            })
            .collect();
        for request in &asked {
            assert_eq!(driver.target(request), Some(0x5000));
        }
        roots
            .iter()
            .for_each(|root| driver.map_guest(*root, 4, 0x1000, 1, 0x6007));
        // As Linux 6.1 to 6.7 unmaps one page of a v2 table.
        driver.flush(&[invalidate_pages(1, 0, 0x1000)]);
        for request in &asked {
            assert_eq!(driver.target(request), Some(0x6000), "{request:?}");
        }
    }
}

#[test]
fn a_host_invalidation_of_everything_drops_guest_spaces_too() {
    let (mut driver, roots) = with_spaces();
    let in_space = read(device(), 0x1000).in_space(pasid(5));
    assert_eq!(driver.target(&in_space), Some(0x5000));
    driver.map_guest(roots[1], 4, 0x1000, 1, 0x6007);
    driver.flush(&[invalidate_pages(1, 0, EVERYTHING | S | PDE)]);
    assert_eq!(driver.target(&in_space), Some(0x6000));
}

#[test]
fn switching_the_unit_off_and_on_forgets_everything() {
    let (driver, _) = with_pages(1);
    driver.disable(Control::new().with_iommu_en(true));
    assert_eq!(driver.target(&read(device(), 0)), Some(0), "passes while off");
    driver.enable(Control::new().with_iommu_en(true));
    assert_eq!(renewed(&driver, 1), [0]);
}

#[test]
fn a_page_may_become_large_and_small_again_with_and_without_invalidation() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    let small = driver.table();
    driver.put(small + 3 * 8, pte(0x5000));
    let at = |driver: &Driver| driver.target(&read(device(), 0x3123));
    driver.map(root, 4, 0, 2, pde(small, 1));
    assert_eq!(at(&driver), Some(0x5123));
    driver.map(root, 4, 0, 2, pte(0x40_0000));
    driver.flush(&[invalidate_pages(1, 0, 0xf_f000 | S | PDE)]);
    assert_eq!(at(&driver), Some(0x40_3123));
    driver.map(root, 4, 0, 2, pde(small, 1));
    assert_eq!(at(&driver), Some(0x40_3123), "not invalidated");
    driver.flush(&[invalidate_pages(1, 0, 0x3000)]);
    assert_eq!(at(&driver), Some(0x5123));
    driver.map(root, 4, 0, 3, pte(0));
    driver.flush(&[INVALIDATE_ALL]);
    assert_eq!(at(&driver), Some(0x3123));
}
