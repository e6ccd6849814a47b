//! Registers that change while devices are at it: the unit off and on, another device table, guest tables off and on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ravelin::iommu::amd::remap::Remapped;
use ravelin::iommu::amd::request::Request;
use ravelin::iommu::amd::spec::dte::Interrupt;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::Gpa;

use crate::driver::{DEVICE_TABLE, Driver, INTERRUPT_TABLE, device, guest_dte, host_dte, pte, reg, write};

/// Another device table, of as many pages.
const OTHER_TABLE: u64 = 0x100_0000;
/// How often a register changes.
const TURNS: u64 = 600;

/// What the driver has made of the registers: an even number once a change is over, an odd one during the next.
#[derive(Default)]
struct Turn(AtomicU64);

impl Turn {
    /// Do `change`, which is the one of `turn`.
    fn take(&self, turn: u64, change: impl FnOnce()) {
        self.0.store(2 * turn - 1, Ordering::SeqCst);
        change();
        self.0.store(2 * turn, Ordering::SeqCst);
    }

    /// What `ask` says, and the turn that it was asked in if that was over before and none began until it had been
    /// answered.
    fn ask<T>(&self, ask: impl FnOnce() -> T) -> (Option<u64>, T) {
        let before = self.0.load(Ordering::SeqCst);
        let said = ask();
        let after = self.0.load(Ordering::SeqCst);
        let settled = before == after && before.is_multiple_of(2);
        (settled.then_some(before / 2), said)
    }
}

/// Have two devices' threads ask `ask` and write where they are told while `change` is called for one turn after the other.
/// `expected` is the answer in turns, by the rest modulo its length: whoever asks between two changes is told that of the
/// turn, and whoever asks during one is told one of them.
fn under_way<T: PartialEq + std::fmt::Debug + Sync>(
    expected: &[T],
    ask: impl Fn() -> T + Sync,
    mut change: impl FnMut(u64),
) {
    let (turn, stop) = (Turn::default(), AtomicBool::new(false));
    let (asked, settled) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (in_turn, said) = turn.ask(&ask);
                    asked.fetch_add(1, Ordering::Relaxed);
                    let Some(in_turn) = in_turn else {
                        assert!(expected.contains(&said), "{said:?} during a change");
                        continue;
                    };
                    let index = usize::try_from(in_turn).expect("small") % expected.len();
                    assert_eq!(said, expected[index], "in turn {in_turn}");
                    settled.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for number in 1..=TURNS {
            // Each turn is seen by somebody, however busy the machine is, unless a thread has given up.
            let before = settled.load(Ordering::Relaxed);
            turn.take(number, || change(number));
            let mut waits = 0;
            while number.is_multiple_of(8) && settled.load(Ordering::Relaxed) == before && waits < 100_000 {
                std::thread::yield_now();
                waits += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(settled.load(Ordering::Relaxed) > 0 && asked.load(Ordering::Relaxed) > 0);
}

/// Translate `request`, access what that says, and say it.
fn access(driver: &Driver, request: &Request) -> Option<u64> {
    let bus = driver.unit.begin();
    let target = bus.translate(request).ok()?.target;
    driver.ram.write(target, &[1]).expect("RAM");
    Some(target.0)
}

#[test]
fn a_unit_that_is_switched_off_and_on_translates_as_it_stands() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x180_0000));
    let request = write(device(), 0x1000);
    let on = driver.control();
    under_way(
        &[Some(0x180_0000), Some(0x1000)],
        || access(&driver, &request),
        |turn| {
            let control = on.with_iommu_en(turn.is_multiple_of(2));
            driver.write(reg::CONTROL, control.into_bits());
        },
    );
}

#[test]
fn a_device_table_that_is_replaced_is_used_as_a_whole() {
    let mut driver = Driver::running();
    let old = driver.attach(device(), 1);
    driver.map(old, 4, 0x1000, 1, pte(0x180_0000));
    let new = driver.table();
    driver.map(new, 4, 0x1000, 1, pte(0x181_0000));
    // In the same domain, so that nothing but the register tells the two apart.
    let at = OTHER_TABLE + 32 * u64::from(device().requester_id());
    let words = host_dte(new, 4, 1).into_quadwords();
    (0..)
        .zip(words)
        .for_each(|(index, word)| driver.put(at + 8 * index, word));
    let request = write(device(), 0x1000);
    under_way(
        &[Some(0x180_0000), Some(0x181_0000), None],
        || access(&driver, &request),
        |turn| {
            // The third has no entry of the device.
            let base = [DEVICE_TABLE | 0x1ff, OTHER_TABLE | 0x1ff, OTHER_TABLE];
            driver.write(reg::DEVICE_TABLE, base[usize::try_from(turn % 3).expect("small")]);
        },
    );
}

#[test]
fn guest_tables_that_are_switched_off_and_on_are_used_as_it_stands() {
    let mut driver = Driver::running();
    let (gcr3, root, host) = (driver.table(), driver.table(), driver.table());
    driver.put(gcr3, root | 1);
    driver.map_guest(root, 4, 0x1000, 1, 0x180_0007);
    driver.map(host, 4, 0x1000, 1, pte(0x181_0000));
    for page in [0x180_0000]
        .into_iter()
        .chain((0x40_0000..0x42_0000).step_by(0x1000))
    {
        driver.map(host, 4, page, 1, pte(page));
    }
    let mut dte = guest_dte(gcr3, 1);
    dte.host.set_giov(true);
    dte.host.set_mode(4);
    dte.host.set_root(host >> 12);
    driver.set_dte(device(), dte);
    let request = write(device(), 0x1000);
    let on = driver.control();
    under_way(
        &[Some(0x180_0000), Some(0x181_0000)],
        || access(&driver, &request),
        |turn| {
            let control = on.with_gt_en(turn.is_multiple_of(2));
            driver.write(reg::CONTROL, control.into_bits());
        },
    );
}

#[test]
fn messages_are_remapped_as_the_unit_stands() {
    let driver = Driver::running();
    let mut dte = host_dte(0, 0, 0);
    dte.interrupt = Interrupt::new()
        .with_iv(true)
        .with_int_ctl(2)
        .with_table_length(9)
        .with_root(INTERRUPT_TABLE >> 6);
    driver.set_dte(device(), dte);
    // As the format of 128 bits, and as the one of 32: what Control says decides which.
    driver
        .ram
        .write_obj(Gpa(INTERRUPT_TABLE), &[0x0041_0201_u64, 0x52])
        .expect("RAM");
    driver
        .ram
        .write_obj(Gpa(INTERRUPT_TABLE), &0x0041_0201_u32)
        .expect("RAM");
    let ask = || match driver.unit.begin().remap(
        device(),
        ravelin::platform::msi::MsiMessage {
            address: 0xfee0_0000,
            data: 0,
        },
    ) {
        Ok(Remapped::To(to)) => Some(to.vector),
        Ok(Remapped::Unchanged) => Some(0),
        _ => None,
    };
    let on = driver.control();
    under_way(&[Some(0x52), Some(0x41), Some(0)], ask, |turn| {
        let control = match turn % 3 {
            0 => on,
            1 => on.with_ga_en(false),
            _ => on.with_iommu_en(false),
        };
        driver.write(reg::CONTROL, control.into_bits());
    });
}

#[test]
fn a_unit_is_switched_off_while_requests_are_in_flight_and_the_next_pass() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x180_0000));
    let request = write(device(), 0x1000);
    let bus = driver.unit.begin();
    let target = || bus.translate(&request).map(|found| found.target.0).ok();
    assert_eq!(target(), Some(0x180_0000));
    // A register is not held up by who is in flight.
    driver.disable(Control::new().with_iommu_en(true));
    let next = driver.unit.begin().translate(&request);
    assert_eq!(next.map(|found| found.target.0).ok(), Some(0x1000));
    drop(bus);
    driver.enable(Control::new().with_iommu_en(true));
    assert_eq!(driver.target(&request), Some(0x180_0000));
}
