//! E: the event log, the PPR log, and the unit's own interrupts.

use std::sync::Arc;

use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::ppr::{Answer, PageRequest};
use ravelin::iommu::amd::registers::Interrupt;
use ravelin::iommu::amd::request::Access;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::Iova;

use crate::driver::{
    Driver, HOLE, LOG, PPR_LOG, Recorder, command, device, guest_dte, host_dte, pasid, read, reg, ring_base,
    write,
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
