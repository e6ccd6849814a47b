//! E: the event log, the PPR log, and the unit's own interrupts.

use std::sync::Arc;

use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::events::Event;
use ravelin::iommu::amd::ppr::{Answer, PageRequest};
use ravelin::iommu::amd::registers::Interrupt;
use ravelin::iommu::amd::request::Access;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::Iova;

use crate::driver::{
    Driver, FLAG, HOLE, LOG, PPR_LOG, RING, Recorder, command, device, guest_dte, host_dte, pasid, pte, read,
    reg, ring_base, wait, write,
};

const MSI: Interrupt = Interrupt::Msi { number: 0 };

/// A device whose every access faults, and a unit with event interrupts on.
fn faulting() -> Driver {
    let driver = Driver::running();
    driver.set_dte(device(), host_dte(0x10_0000 - 0x1000, 4, 7));
    driver.enable(Control::new().with_event_int_en(true));
    driver
}

fn fault(driver: &Driver, times: usize) {
    let aborted = (0..times)
        .filter(|_| driver.target(&read(device(), 0x1000)).is_none())
        .count();
    assert_eq!(aborted, times);
}

#[test]
fn e1_a_record_names_device_domain_address_and_direction() {
    let driver = faulting();
    assert_eq!(driver.target(&write(device(), 0x1_2345_6000)), None);
    assert_eq!(driver.events(), [[0x0000_0219, 0x2020_0007, 0x2345_6000, 1]]);
}

#[test]
fn counters_tell_page_faults_by_kind() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x5000) & !(1 << 62));
    driver.map(root, 4, 0x2000, 1, pte(0x5000) | 1 << 52);
    driver.map(root, 4, 0x3000, 1, pte(0x000f_ffff_ffff_f000 | 7 << 9));
    for at in [0x1000, 0x2000, 0x3000, 0x4000, 0x5000] {
        assert_eq!(driver.target(&write(device(), at)), None, "{at:#x}");
    }
    let mut dte = guest_dte(root, 1);
    dte.interrupt.set_iv(true);
    dte.interrupt.set_int_ctl(2);
    driver.set_dte(device(), dte);
    driver.flush(&[crate::driver::INVALIDATE_ALL]);
    // No index but 0 is in a table of one entry, and that one is off.
    for data in [0, 1, 2] {
        assert!(driver.msi(device(), 0xfee0_0000, data).is_err(), "{data}");
    }
    let counts = driver.unit.counts();
    let of = |name| {
        let place = Event::FAULTS.iter().position(|fault| *fault == name);
        counts.faults[place.expect("a kind")]
    };
    assert_eq!(
        ["not_present", "denied", "malformed", "reserved", "supervisor"].map(of),
        [2, 1, 1, 1, 0]
    );
    assert_eq!(of("interrupt_not_present"), 3);
    assert_eq!(counts.faults.iter().sum::<u64>(), counts.events[2]);
}

#[test]
fn e2_the_status_bit_does_not_need_the_interrupt_enable() {
    let driver = faulting();
    driver.disable(Control::new().with_event_int_en(true));
    fault(&driver, 1);
    assert_eq!(driver.status() & 2, 2);
    assert_eq!(driver.take_interrupts(), []);
}

#[test]
fn e3_a_full_log_keeps_one_slot_free_stops_and_interrupts() {
    let driver = faulting();
    fault(&driver, 255);
    assert_eq!(driver.take_interrupts(), [MSI]);
    driver.write_dword(reg::STATUS, 2);
    fault(&driver, 1);
    assert_eq!(driver.status() & 0x9, 1, "overflow, and the log has stopped");
    assert_eq!(driver.take_interrupts(), [MSI]);
    assert_eq!(driver.events().len(), 255);
}

#[test]
fn e3_an_overflow_interrupts_even_while_a_record_is_unseen() {
    let driver = faulting();
    fault(&driver, 255);
    assert_eq!(driver.take_interrupts(), [MSI]);
    fault(&driver, 1);
    assert_eq!(driver.take_interrupts(), [MSI]);
}

#[test]
fn e4_while_an_overflow_stands_records_are_dropped() {
    let driver = faulting();
    fault(&driver, 256);
    assert_eq!(driver.events().len(), 255);
    fault(&driver, 1);
    assert_eq!(driver.events().len(), 0);
}

#[test]
fn e5_the_log_goes_on_where_it_was_once_switched_on_anew() {
    let driver = faulting();
    fault(&driver, 256);
    assert_eq!(driver.events().len(), 255);
    driver.disable(Control::new().with_event_log_en(true));
    assert_eq!(driver.status() & 8, 0);
    driver.write_dword(reg::STATUS, 1);
    driver.enable(Control::new().with_event_log_en(true));
    assert_eq!(driver.status() & 9, 8);
    fault(&driver, 1);
    assert_eq!(driver.read(reg::EVENT_TAIL), 0);
    assert_eq!(driver.dwords(LOG + 0xff0)[0], 0x0219);
}

#[test]
fn c17_with_c10_and_e5_a_ring_goes_on_across_its_end_with_a_log_that_is_full_and_one_that_goes_on() {
    // Commands without meaning and waits in turn, past the ring's end; each of the former stops the ring.
    const PAIRS: u64 = 300;
    let driver = faulting();
    let restart = |driver: &Driver| {
        let stopped = driver.read(reg::COMMAND_HEAD);
        assert_eq!(driver.status() & 0x10, 0);
        driver.disable(Control::new().with_cmd_buf_en(true));
        let next = u32::try_from((stopped + 16) % 0x2000).expect("in the ring");
        driver.write_dword(reg::COMMAND_HEAD, next);
        driver.enable(Control::new().with_cmd_buf_en(true));
        assert_eq!(driver.status() & 0x10, 0x10);
        stopped
    };
    let mut places = Vec::new();
    for pair in 1..=PAIRS {
        driver.submit(&[0, wait(FLAG, pair)]);
        assert_eq!(driver.get(FLAG), pair - 1, "behind what stopped the ring");
        places.push(RING + restart(&driver));
        assert_eq!(driver.get(FLAG), pair);
        assert_eq!(driver.status() & 9, if pair < 256 { 8 } else { 1 }, "{pair}");
    }
    let named = |records: &[[u32; 4]]| -> Vec<u64> {
        let address = |record: &[u32; 4]| {
            assert_eq!(record[..2], [0, 0x5000_0000]);
            u64::from(record[2]) | u64::from(record[3]) << 32
        };
        records.iter().map(address).collect()
    };
    assert_eq!(named(&driver.events()), places[..255], "those that found room");
    assert!(
        places.contains(&(RING + 0x1fe0)) && places[256..].contains(&RING),
        "past the end"
    );
    driver.disable(Control::new().with_event_log_en(true));
    driver.write_dword(reg::STATUS, 1);
    driver.enable(Control::new().with_event_log_en(true));
    driver.submit(&[0, wait(FLAG, PAIRS + 1)]);
    let place = RING + restart(&driver);
    assert_eq!(driver.get(FLAG), PAIRS + 1);
    assert_eq!(named(&driver.events()), [place], "from where the log was");
}

#[test]
fn e6_an_event_from_before_the_enable_interrupts_at_the_enable() {
    let driver = faulting();
    driver.disable(Control::new().with_event_int_en(true));
    fault(&driver, 1);
    driver.enable(Control::new().with_event_int_en(true));
    assert_eq!(driver.take_interrupts(), [MSI]);
}

#[test]
fn e7_a_record_after_the_clearing_interrupts_again() {
    let driver = faulting();
    fault(&driver, 2);
    assert_eq!(driver.take_interrupts(), [MSI]);
    driver.write_dword(reg::STATUS, 2);
    fault(&driver, 1);
    assert_eq!(driver.status() & 2, 2);
    assert_eq!(driver.take_interrupts(), [MSI]);
}

#[test]
fn e8_in_x2apic_mode_the_register_says_where_interrupts_go() {
    let driver = faulting();
    driver.write(reg::XT_EVENT, 0x0000_0055_0102_0300);
    driver.enable(Control::new().with_int_cap_xt_en(true));
    fault(&driver, 1);
    let expected = Interrupt::X2apic {
        destination: 0x0001_0203,
        logical: false,
        vector: 0x55,
        arbitrated: false,
    };
    assert_eq!(driver.take_interrupts(), [expected]);
}

#[test]
fn e9_a_log_that_is_not_memory_takes_nothing_and_harms_nothing() {
    let driver = faulting();
    driver.disable(Control::new().with_event_log_en(true));
    driver.write(reg::EVENT_BASE, ring_base(HOLE, 8));
    driver.enable(Control::new().with_event_log_en(true));
    fault(&driver, 3);
    assert_eq!(driver.read(reg::EVENT_TAIL), 0);
    assert_eq!(driver.status() & 2, 0);
}

/// A device that may send page requests, and a unit that logs them.
fn paging() -> Driver {
    let driver = Driver::running();
    let mut dte = guest_dte(0, 7);
    dte.host.set_ppr(true);
    driver.set_dte(device(), dte);
    driver.enable(Control::new().with_ppr_en(true));
    driver.write(reg::PPR_BASE, ring_base(PPR_LOG, 8));
    driver.enable(Control::new().with_ppr_int_en(true).with_ppr_log_en(true));
    driver
}

fn page_request() -> PageRequest {
    PageRequest {
        device: device(),
        pasid: Some(pasid(0x1_0005)),
        at: Iova(0x7f00_0000_1000),
        access: Access::BOTH,
        execute: false,
        privileged: false,
        group: 5,
        last: true,
    }
}

fn ask(driver: &Driver, request: &PageRequest) -> Answer {
    let (answer, effects) = driver.unit.page_request(request);
    driver.carry_out(effects);
    answer
}

#[test]
fn e10_a_page_request_is_logged_and_interrupts_by_its_own_register() {
    let driver = paging();
    driver.write(reg::XT_PPR, 0x0000_0066_0000_0100);
    driver.enable(Control::new().with_int_cap_xt_en(true));
    assert_eq!(ask(&driver, &page_request()), Answer::Later);
    assert_eq!(driver.status() & 0xe0, 0xc0);
    assert_eq!(driver.read(reg::PPR_TAIL), 0x10);
    assert_eq!(driver.dwords(PPR_LOG), [0x0005_0219, 0x1164_0605, 0x1000, 0x7f00]);
    let expected = Interrupt::X2apic {
        destination: 1,
        logical: false,
        vector: 0x66,
        arbitrated: false,
    };
    assert_eq!(driver.take_interrupts(), [expected]);
}

#[test]
fn e11_a_full_page_request_log_stops_and_answers_for_software() {
    let driver = paging();
    let logged = (0..255)
        .filter(|_| ask(&driver, &page_request()) == Answer::Later)
        .count();
    assert_eq!(logged, 255);
    assert_eq!(ask(&driver, &page_request()), Answer::Failure);
    assert_eq!(driver.status() & 0xa0, 0x20);
    driver.write_dword(reg::PPR_HEAD, 0xff0);
    assert_eq!(
        ask(&driver, &page_request()),
        Answer::Failure,
        "until it is switched on anew"
    );
    driver.disable(Control::new().with_ppr_log_en(true));
    driver.enable(Control::new().with_ppr_log_en(true));
    assert_eq!(ask(&driver, &page_request()), Answer::Later);
}

#[test]
fn e12_the_answer_reaches_the_device() {
    let mut driver = paging();
    let recorder = Arc::new(Recorder::default());
    driver.unit.add_follower(recorder.clone());
    driver.flush(&[command(7, 0x219, 0x1_0005, 4, 0xf005)]);
    let expected = Command::CompletePageRequest {
        device: device(),
        pasid: Some(pasid(0x1_0005)),
        group: 5,
        response: 15,
    };
    assert_eq!(*recorder.heard.lock().expect("not poisoned"), [expected]);
}

#[test]
fn a_page_request_from_a_device_that_may_send_none_is_invalid_and_reported() {
    let mut driver = paging();
    driver.set_dte(device(), guest_dte(0, 7));
    driver.flush(&[crate::driver::INVALIDATE_ALL]);
    assert_eq!(ask(&driver, &page_request()), Answer::Invalid);
    assert_eq!(driver.events(), [[0x0005_0219, 0x9201_0405, 0x1000, 0x7f00]]);
}

#[test]
fn page_requests_fail_while_they_are_off() {
    let driver = paging();
    driver.disable(Control::new().with_ppr_en(true));
    assert_eq!(ask(&driver, &page_request()), Answer::Failure);
    let off = Driver::at_reset();
    assert_eq!(ask(&off, &page_request()), Answer::Failure);
}
