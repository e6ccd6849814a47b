//! C: the command buffer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::effort::Effort;
use ravelin::iommu::amd::features::Wanted;
use ravelin::iommu::amd::processor::{COMMANDS_PER_CALL, Follower, NoAnswer};
use ravelin::iommu::amd::registers::Interrupt;
use ravelin::iommu::amd::spec::registers::{Control, Reg};
use ravelin::iommu::amd::{Effects, Unit};
use ravelin::platform::addr::Gpa;
use ravelin::platform::memory::GuestRam;

use crate::driver::{
    Driver, FLAG, HOLE, INVALIDATE_ALL, RING, Recorder, WAIT_INTERRUPT, command, device, invalidate_device,
    invalidate_pages, pte, reg, ring_base, wait, write,
};

fn with_one_wait() -> Driver {
    let driver = Driver::at_reset();
    driver.write(reg::COMMAND_BASE, ring_base(RING, 9));
    driver.enable(Control::new().with_cmd_buf_en(true));
    driver
        .ram
        .write(Gpa(RING), &wait(FLAG, 7).to_le_bytes())
        .expect("RAM");
    driver.write_dword(reg::COMMAND_TAIL, 0x10);
    driver
}

#[test]
fn c1_commands_that_wait_run_when_the_unit_is_switched_on() {
    let driver = with_one_wait();
    driver.enable(Control::new().with_iommu_en(true));
    assert_eq!((driver.get(FLAG), driver.read(reg::COMMAND_HEAD)), (7, 0x10));
}

#[test]
fn c2_nothing_runs_while_the_unit_is_off() {
    let driver = with_one_wait();
    assert_eq!((driver.get(FLAG), driver.status() & 0x10), (0, 0));
}

#[test]
fn c3_a_completion_wait_stores_eight_bytes_and_no_more() {
    let driver = Driver::running();
    driver.put(FLAG - 8, u64::MAX);
    driver.put(FLAG + 8, u64::MAX);
    driver.submit(&[wait(FLAG, 0x1122_3344_5566_7788)]);
    let found = [FLAG - 8, FLAG, FLAG + 8].map(|at| driver.get(at));
    assert_eq!(found, [u64::MAX, 0x1122_3344_5566_7788, u64::MAX]);
}

#[test]
fn c4_the_status_bit_does_not_need_the_interrupt_enable() {
    let driver = Driver::running();
    driver.submit(&[WAIT_INTERRUPT]);
    assert_eq!(driver.status() & 4, 4);
    assert_eq!(driver.take_interrupts(), []);
}

#[test]
fn c5_the_store_is_visible_before_the_interrupt() {
    let driver = Driver::running();
    driver.enable(Control::new().with_com_wait_int_en(true));
    driver
        .ram
        .write(Gpa(RING), &(wait(FLAG, 7) | 2).to_le_bytes())
        .expect("RAM");
    let effects = driver.unit.mmio_write(reg::COMMAND_TAIL, &0x10_u32.to_le_bytes());
    assert_eq!(driver.get(FLAG), 7, "while the interrupt is still to be sent");
    assert_eq!(effects.interrupts.event, Some(Interrupt::Msi { number: 0 }));
    assert_eq!(driver.status() & 4, 4);
}

#[test]
fn c6_a_second_wait_interrupts_only_after_the_bit_was_cleared() {
    let driver = Driver::running();
    driver.enable(Control::new().with_com_wait_int_en(true));
    driver.submit(&[WAIT_INTERRUPT]);
    assert_eq!(driver.take_interrupts().len(), 1);
    driver.submit(&[WAIT_INTERRUPT]);
    assert_eq!(driver.take_interrupts(), []);
    driver.write_dword(reg::STATUS, 4);
    driver.submit(&[WAIT_INTERRUPT]);
    assert_eq!(driver.take_interrupts().len(), 1);
}

/// Watches the head while commands run.
struct Heads {
    unit: Weak<Unit<GuestRam>>,
    seen: std::sync::Mutex<Vec<u64>>,
}

impl Follower for Heads {
    fn follow(&self, _batch: &[Command]) -> Result<(), NoAnswer> {
        let unit = self.unit.upgrade().expect("alive");
        let head = unit.register(Reg::CommandHead);
        self.seen.lock().expect("not poisoned").push(head);
        Ok(())
    }
}

#[test]
fn c7_the_head_wraps_to_zero_and_never_shows_the_ring_size() {
    let driver = Driver::running();
    let heads = Arc::new(Heads {
        unit: Arc::downgrade(&driver.unit),
        seen: std::sync::Mutex::default(),
    });
    driver.unit.add_follower(heads.clone());
    driver.disable(Control::new().with_cmd_buf_en(true));
    driver.write_dword(reg::COMMAND_HEAD, 0x1ff0);
    driver.write_dword(reg::COMMAND_TAIL, 0x1ff0);
    driver.enable(Control::new().with_cmd_buf_en(true));
    driver.submit(&[invalidate_device(device())]);
    assert_eq!(driver.read(reg::COMMAND_TAIL), 0);
    assert_eq!(driver.read(reg::COMMAND_HEAD), 0);
    assert!(
        heads
            .seen
            .lock()
            .expect("not poisoned")
            .iter()
            .all(|head| *head < 0x2000)
    );
}

#[test]
fn c7_every_length_wraps_at_its_own_end() {
    for length in 8..=15_u8 {
        let driver = Driver::at_reset();
        let base = 0x100_0000;
        let last = (1_u32 << length) * 16 - 16;
        driver.write(reg::COMMAND_BASE, ring_base(base, length));
        driver.write_dword(reg::COMMAND_HEAD, last);
        driver.write_dword(reg::COMMAND_TAIL, 0x10);
        driver
            .ram
            .write(Gpa(base + u64::from(last)), &wait(FLAG, 1).to_le_bytes())
            .expect("RAM");
        driver
            .ram
            .write(Gpa(base), &wait(FLAG + 8, 2).to_le_bytes())
            .expect("RAM");
        driver.enable(Control::new().with_iommu_en(true).with_cmd_buf_en(true));
        assert_eq!((driver.get(FLAG), driver.get(FLAG + 8)), (1, 2), "{length}");
        assert_eq!(driver.read(reg::COMMAND_HEAD), 0x10, "{length}");
    }
}

fn stopped_by_an_illegal_command() -> Driver {
    let driver = Driver::running();
    driver.submit(&[
        wait(FLAG, 1),
        wait(FLAG + 8, 2),
        command(0xf, 0, 0, 0, 0),
        wait(FLAG + 16, 3),
    ]);
    driver
}

#[test]
fn c8_an_illegal_command_stops_the_ring_where_it_stands() {
    let driver = stopped_by_an_illegal_command();
    assert_eq!([FLAG, FLAG + 8, FLAG + 16].map(|at| driver.get(at)), [1, 2, 0]);
    assert_eq!(driver.events(), [[0, 0x5000_0000, 0x4_0020, 0]]);
    assert_eq!(driver.status() & 0x10, 0);
    assert_eq!(driver.read(reg::COMMAND_HEAD), 0x20);
}

#[test]
fn c9_a_stopped_ring_does_not_start_by_a_doorbell() {
    let driver = stopped_by_an_illegal_command();
    assert_eq!(driver.events().len(), 1);
    driver.submit(&[wait(FLAG + 16, 3)]);
    assert_eq!((driver.get(FLAG + 16), driver.events().len()), (0, 0));
}

#[test]
fn c10_a_stopped_ring_starts_when_it_is_switched_on_anew() {
    let mut driver = stopped_by_an_illegal_command();
    driver.disable(Control::new().with_cmd_buf_en(true));
    driver.write_dword(reg::COMMAND_HEAD, 0);
    driver.write_dword(reg::COMMAND_TAIL, 0);
    driver.enable(Control::new().with_cmd_buf_en(true));
    assert_eq!(driver.status() & 0x10, 0x10);
    driver.flush(&[]);
}

#[test]
fn c11_an_unreadable_ring_is_a_hardware_error() {
    let driver = Driver::running();
    driver.disable(Control::new().with_cmd_buf_en(true));
    driver.write(reg::COMMAND_BASE, ring_base(HOLE, 9));
    driver.enable(Control::new().with_cmd_buf_en(true));
    driver.write_dword(reg::COMMAND_TAIL, 0x10);
    assert_eq!(driver.events(), [[0, 0x6400_0000, 0x8000_0000, 0]]);
    assert_eq!(driver.status() & 0x10, 0);
}

#[test]
fn c11_a_ring_that_leaves_memory_runs_up_to_there() {
    let driver = Driver::running();
    driver.disable(Control::new().with_cmd_buf_en(true));
    let end = crate::driver::RAM;
    driver.write(reg::COMMAND_BASE, ring_base(end - 0x1000, 9));
    driver
        .ram
        .write(Gpa(end - 16), &wait(FLAG, 9).to_le_bytes())
        .expect("RAM");
    driver.write_dword(reg::COMMAND_HEAD, 0xff0);
    driver.write_dword(reg::COMMAND_TAIL, 0x1020);
    driver.enable(Control::new().with_cmd_buf_en(true));
    assert_eq!(driver.get(FLAG), 9);
    assert_eq!(driver.events(), [[0, 0x6400_0000, 0x200_0000, 0]]);
    assert_eq!(driver.read(reg::COMMAND_HEAD), 0x1000);
}

#[test]
fn c12_a_store_that_fails_is_a_hardware_error_with_the_stores_address() {
    let driver = Driver::running();
    driver.submit(&[wait(HOLE, 1), wait(FLAG, 2)]);
    assert_eq!(driver.events(), [[0, 0x6400_0000, 0x8000_0000, 0]]);
    assert_eq!((driver.get(FLAG), driver.status() & 0x10), (0, 0));
    assert_eq!(driver.read(reg::COMMAND_HEAD), 0);
}

#[test]
fn c12_the_last_address_that_a_wait_can_name_is_a_hardware_error_and_nothing_wraps() {
    let driver = Driver::running();
    driver.put(0, 0x5a);
    // Every bit of address and data.
    driver.submit(&[command(1, 0xffff_fff9, 0x000f_ffff, u32::MAX, u32::MAX)]);
    assert_eq!(driver.events(), [[0, 0x6400_0000, 0xffff_fff8, 0x000f_ffff]]);
    assert_eq!((driver.get(0), driver.status() & 0x10), (0x5a, 0));
    // The end of RAM, from within and from without; and all ones as what is stored.
    let last = crate::driver::RAM - 8;
    let driver = Driver::running();
    driver.submit(&[wait(last, u64::MAX), wait(last + 8, 1)]);
    assert_eq!(driver.get(last), u64::MAX);
    assert_eq!(driver.events(), [[0, 0x6400_0000, 0x200_0000, 0]]);
}

#[test]
fn commands_whose_every_field_is_all_ones_are_carried_out_or_illegal_and_drop_too_much_at_most() {
    let ones = [
        // Device 0xffff.
        command(2, 0xffff, 0, 0, 0),
        command(3, 0xf_ffff, 0xffff, 0xffff_f007, u32::MAX),
        command(4, u32::MAX, 0x0fff_ffff, 0xffff_f035, u32::MAX),
        command(5, 0xffff, 0, 0, 0),
        command(6, 0xff00_ffff, 0xf_ffff, 0xffff_f015, u32::MAX),
        command(7, 0xffff, 0xf_ffff, 4, 0xf1ff),
        command(8, 0, 0, 0, 0),
    ];
    for raw in ones {
        let mut driver = Driver::running();
        let root = driver.attach(device(), 1);
        driver.map(root, 4, 0x1000, 1, pte(0x5000));
        assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000));
        driver.flush(&[raw]);
        assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000), "{raw:#x}");
        assert_eq!(driver.events(), Vec::<[u32; 4]>::new(), "{raw:#x}");
    }
    // The same with the bits that are nobody's, where they count.
    for raw in [
        command(1, u32::MAX, 0x0fff_ffff, u32::MAX, u32::MAX),
        command(2, u32::MAX, 0x0fff_ffff, u32::MAX, u32::MAX),
        command(5, u32::MAX, 0x0fff_ffff, u32::MAX, u32::MAX),
        command(8, u32::MAX, 0x0fff_ffff, u32::MAX, u32::MAX),
        u128::MAX,
    ] {
        let driver = Driver::running();
        driver.submit(&[raw]);
        assert_eq!(driver.events(), [[0, 0x5000_0000, 0x4_0000, 0]], "{raw:#x}");
        assert_eq!(driver.status() & 0x10, 0, "{raw:#x}");
    }
}

#[test]
fn the_entry_of_the_last_device_is_forgotten_when_it_is_named() {
    let mut driver = Driver::running();
    let last = ravelin::platform::addr::Bdf::from_requester_id(0xffff);
    driver.set_dte(last, crate::driver::host_dte(0, 0, 1));
    assert_eq!(driver.target(&write(last, 0x1000)), Some(0x1000));
    driver.set_dte(
        last,
        ravelin::iommu::amd::spec::dte::Dte::from_quadwords([3, 0, 0, 0]),
    );
    assert_eq!(driver.target(&write(last, 0x1000)), Some(0x1000), "cached");
    driver.flush(&[invalidate_device(last)]);
    assert_eq!(driver.target(&write(last, 0x1000)), None);
}

#[test]
fn c13_reserved_bits_make_a_command_illegal() {
    let driver = Driver::running();
    driver.submit(&[invalidate_device(device()) | 1 << 64]);
    assert_eq!(driver.events(), [[0, 0x5000_0000, 0x4_0000, 0]]);
    assert_eq!(driver.status() & 0x10, 0);
}

#[test]
fn c14_an_iotlb_invalidation_without_iotlbs_is_illegal() {
    let driver = Driver::with(Wanted::DEFAULT).started();
    driver.submit(&[command(4, device().requester_id().into(), 0, 0, 0)]);
    assert_eq!(driver.events().len(), 1);
    assert_eq!(driver.status() & 0x10, 0);
}

#[test]
fn c15_a_page_response_without_page_requests_is_illegal() {
    let driver = Driver::with(Wanted::DEFAULT).started();
    driver.submit(&[command(7, device().requester_id().into(), 0, 0, 0)]);
    assert_eq!(driver.events().len(), 1);
    assert_eq!(driver.status() & 0x10, 0);
}

#[test]
fn c16_invalidate_all_drops_entries_and_translations() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000));
    let other = driver.attach(device(), 1);
    driver.map(other, 4, 0x1000, 1, pte(0x6000));
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000), "cached");
    driver.flush(&[INVALIDATE_ALL]);
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x6000));
}

#[test]
fn c17_a_full_ring_is_carried_out_in_order_across_its_end() {
    let driver = Driver::running();
    driver.disable(Control::new().with_cmd_buf_en(true));
    driver.write_dword(reg::COMMAND_HEAD, 0x100);
    driver.write_dword(reg::COMMAND_TAIL, 0x100);
    driver.enable(Control::new().with_cmd_buf_en(true));
    let commands: Vec<_> = (1..=511).map(|data| wait(FLAG, data)).collect();
    driver.submit(&commands);
    assert_eq!(driver.get(FLAG), 511);
    assert_eq!(driver.read(reg::COMMAND_HEAD), driver.read(reg::COMMAND_TAIL));
}

#[test]
fn c18_an_illegal_command_stops_the_ring_with_the_log_off() {
    let driver = Driver::running();
    driver.disable(Control::new().with_event_log_en(true));
    driver.submit(&[0, wait(FLAG, 1)]);
    assert_eq!((driver.get(FLAG), driver.status() & 0x12), (0, 0));
    assert_eq!(driver.events().len(), 0);
}

#[test]
fn commands_of_one_call_are_bounded_and_the_rest_is_announced() {
    let driver = Driver::at_reset();
    let base = 0x100_0000;
    driver.write(reg::COMMAND_BASE, ring_base(base, 15));
    driver.enable(Control::new().with_iommu_en(true).with_cmd_buf_en(true));
    let total = 32_767;
    for entry in 0..total {
        let raw = invalidate_pages(1, 0, entry << 12).to_le_bytes();
        driver.ram.write(Gpa(base + entry * 16), &raw).expect("RAM");
    }
    let tail = u32::try_from(total * 16).expect("in the ring");
    let mut effects = driver.unit.mmio_write(reg::COMMAND_TAIL, &tail.to_le_bytes());
    assert!(effects.more_commands);
    assert_eq!(driver.read(reg::COMMAND_HEAD), COMMANDS_PER_CALL as u64 * 16);
    let mut calls = 1;
    while effects.more_commands {
        effects = driver.unit.run_commands();
        calls += 1;
    }
    assert_eq!(driver.read(reg::COMMAND_HEAD), u64::from(tail));
    assert_eq!(calls, 32_767_usize.div_ceil(COMMANDS_PER_CALL));
}

/// Another processor of the guest's: whenever commands were passed on, it rings for one more.
struct Ringing {
    unit: Weak<Unit<GuestRam>>,
    ram: GuestRam,
    /// How often it will ring yet.
    left: AtomicUsize,
}

impl Follower for Ringing {
    fn follow(&self, _batch: &[Command]) -> Result<(), NoAnswer> {
        let one_less = |left: usize| left.checked_sub(1);
        let rings = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        if rings.is_err() {
            return Ok(());
        }
        let unit = self.unit.upgrade().expect("alive");
        let tail = unit.register(Reg::CommandTail);
        let command = invalidate_device(device()).to_le_bytes();
        self.ram.write(Gpa(RING + tail), &command).expect("RAM");
        let tail = u32::try_from((tail + 16) % 0x2000).expect("in the ring");
        let ring = || unit.mmio_write(reg::COMMAND_TAIL, &tail.to_le_bytes());
        let owed = std::thread::scope(|threads| threads.spawn(ring).join().expect("no panic"));
        assert_eq!(owed, Effects::default(), "another thread is at it");
        Ok(())
    }
}

#[test]
fn a_guest_that_goes_on_ringing_does_not_hold_up_who_carries_out_its_commands() {
    const RINGS: usize = 500;
    let driver = Driver::running();
    let ringing = Arc::new(Ringing {
        unit: Arc::downgrade(&driver.unit),
        ram: driver.ram.clone(),
        left: AtomicUsize::new(RINGS),
    });
    driver.unit.add_follower(ringing.clone());
    let command = invalidate_device(device()).to_le_bytes();
    driver.ram.write(Gpa(RING), &command).expect("RAM");
    let mut effects = driver.unit.mmio_write(reg::COMMAND_TAIL, &0x10_u32.to_le_bytes());
    let mut calls = 1;
    while effects.more_commands {
        effects = driver.unit.run_commands();
        calls += 1;
    }
    assert_eq!(ringing.left.load(Ordering::SeqCst), 0, "it was always heard");
    assert_eq!(calls, RINGS + 1, "a call ends, however often it rings");
    assert_eq!(driver.read(reg::COMMAND_HEAD), driver.read(reg::COMMAND_TAIL));
}

/// A follower that obeys a part at a time.
#[derive(Default)]
struct Slow {
    /// How often it has to be called yet.
    left: AtomicUsize,
    calls: AtomicUsize,
}

impl Follower for Slow {
    fn follow(&self, _batch: &[Command]) -> Result<(), NoAnswer> {
        self.left.store(20, Ordering::SeqCst);
        Ok(())
    }

    fn settle(&self, _effort: &mut Effort) -> bool {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let one_less = |left: usize| left.checked_sub(1);
        self.left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less)
            .is_err()
    }
}

/// While it settles for the first time, another thread has commands carried out, for whatever reason.
struct Asked {
    unit: Weak<Unit<GuestRam>>,
    left: AtomicUsize,
}

impl Follower for Asked {
    fn follow(&self, _batch: &[Command]) -> Result<(), NoAnswer> {
        Ok(())
    }

    fn settle(&self, _effort: &mut Effort) -> bool {
        if self.left.swap(0, Ordering::SeqCst) > 0 {
            let unit = self.unit.upgrade().expect("alive");
            let other = || unit.run_commands();
            let owed = std::thread::scope(|threads| threads.spawn(other).join().expect("no panic"));
            assert_eq!(owed, Effects::default(), "another thread is at it");
        }
        true
    }
}

#[test]
fn a_call_that_found_another_thread_at_it_is_made_up_for_though_the_ring_is_empty() {
    let driver = Driver::running();
    let asked = Asked {
        unit: Arc::downgrade(&driver.unit),
        left: AtomicUsize::new(1),
    };
    driver.unit.add_follower(Arc::new(asked));
    assert!(driver.unit.run_commands().more_commands);
    assert!(!driver.unit.run_commands().more_commands);
}

#[test]
fn a_register_does_not_hold_up_the_processor_until_followers_have_obeyed() {
    let driver = Driver::running();
    let slow = Arc::new(Slow::default());
    driver.unit.add_follower(slow.clone());
    let base = driver.read(reg::DEVICE_TABLE);
    let control = driver.read(reg::CONTROL);
    for (at, value) in [
        (reg::DEVICE_TABLE, base ^ 1),
        (reg::EXCLUSION_LIMIT, 0x5000),
        (reg::CONTROL, control & !1),
        (reg::CONTROL, control),
    ] {
        slow.calls.store(0, Ordering::SeqCst);
        let mut effects = driver.unit.mmio_write(at, &value.to_le_bytes());
        assert!(effects.more_commands, "{at:#x}");
        assert!(slow.calls.load(Ordering::SeqCst) <= 2, "{at:#x}");
        while effects.more_commands {
            effects = driver.unit.run_commands();
        }
        assert_eq!(slow.left.load(Ordering::SeqCst), 0, "{at:#x}");
    }
    // A wait that comes meanwhile is answered behind it.
    let off = driver
        .unit
        .mmio_write(reg::CONTROL, &(control & !1).to_le_bytes());
    assert!(off.more_commands);
    driver
        .ram
        .write(Gpa(RING), &wait(FLAG, 7).to_le_bytes())
        .expect("RAM");
    let on = driver.unit.mmio_write(reg::CONTROL, &control.to_le_bytes());
    let rung = driver.unit.mmio_write(reg::COMMAND_TAIL, &0x10_u32.to_le_bytes());
    assert!(on.more_commands && rung.more_commands);
    assert_eq!(driver.get(FLAG), 0);
    driver.carry_out(rung);
    assert_eq!((driver.get(FLAG), slow.left.load(Ordering::SeqCst)), (7, 0));
}

#[test]
fn a_reset_is_over_when_followers_have_obeyed() {
    let driver = Driver::running();
    let slow = Arc::new(Slow::default());
    driver.unit.add_follower(slow.clone());
    driver.unit.reset();
    assert_eq!(slow.left.load(Ordering::SeqCst), 0);
}

#[test]
fn followers_hear_everything_before_a_wait_in_order_and_before_its_store() {
    struct Watch {
        ram: GuestRam,
        heard: Recorder,
    }
    impl Follower for Watch {
        fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
            let flag: u64 = self.ram.read_obj(Gpa(FLAG)).expect("RAM");
            assert_eq!(flag, 0, "told before the store");
            self.heard.follow(batch)
        }
    }
    let mut driver = Driver::running();
    let watch = Arc::new(Watch {
        ram: driver.ram.clone(),
        heard: Recorder::default(),
    });
    driver.unit.add_follower(watch.clone());
    let interrupts = command(5, 0x219, 0, 0, 0);
    driver.flush(&[invalidate_device(device()), interrupts, INVALIDATE_ALL]);
    let heard = watch.heard.heard.lock().expect("not poisoned").clone();
    let expected = [
        Command::InvalidateDevice { device: device() },
        Command::InvalidateInterrupts { device: device() },
        Command::InvalidateAll,
    ];
    assert_eq!(heard, expected);
}

#[test]
fn a_device_that_does_not_acknowledge_is_reported_with_the_command() {
    struct Mute;
    impl Follower for Mute {
        fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
            let index = batch.len() - 1;
            Err(NoAnswer {
                device: device(),
                index,
            })
        }
    }
    let mut driver = Driver::running();
    driver.unit.add_follower(Arc::new(Mute));
    driver.flush(&[INVALIDATE_ALL, command(4, 0x219, 0, 0, 0)]);
    assert_eq!(driver.events(), [[0x219, 0x7000_0000, 0x4_0010, 0]]);
}

#[test]
fn prefetch_fills_the_cache_and_reports_nothing() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    driver.map(root, 4, 0x2000, 1, pte(0x6000));
    driver.flush(&[command(6, 3 << 24 | 0x219, 0, 0x1000, 0)]);
    driver.map(root, 4, 0x1000, 1, 0);
    driver.map(root, 4, 0x2000, 1, 0);
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000));
    assert_eq!(driver.target(&write(device(), 0x2000)), Some(0x6000));
    assert_eq!(driver.events(), Vec::<[u32; 4]>::new());
}

#[test]
fn prefetch_at_the_end_of_the_address_space_ends() {
    let mut driver = Driver::running();
    driver.attach(device(), 1);
    driver.flush(&[
        command(6, 0xff00_0219, 0, 0xffff_f010, 0xffff_ffff),
        command(6, 0xff00_0219, 0, 0xffff_f011, 0xffff_ffff),
        command(6, 0xff00_ffff, 0xf_ffff, 0x1005, 0),
    ]);
    assert_eq!(driver.events(), Vec::<[u32; 4]>::new());
}

#[test]
fn counters_tell_commands_by_kind() {
    let mut driver = Driver::running();
    driver.flush(&[
        invalidate_device(device()),
        invalidate_pages(1, 0, 0),
        invalidate_pages(2, 0, 0),
    ]);
    let counts = driver.unit.counts();
    assert_eq!(counts.commands, [1, 1, 2, 0, 0, 0, 0, 0]);
    assert_eq!((counts.doorbells, counts.batches, counts.stops), (1, 1, 0));
    // A batch is one in which something was carried out.
    driver.submit(&[0]);
    let counts = driver.unit.counts();
    assert_eq!((counts.doorbells, counts.batches, counts.stops), (2, 1, 1));
}
