//! The test device behind the unit: translations it asks for and has to forget, requests with a process address
//! space, page requests and their answers.

use std::ops::Deref;
use std::sync::Arc;

use ravelin::devices::test_device::{Flags, Reg, Rights, Space, Status};
use ravelin::iommu::amd::agent::UnitOwner;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::iommu::amd::{Effects, Unit};
use ravelin::pci::Function as _;
use ravelin::platform::addr::{Gpa, Sbdf};
use ravelin::platform::dma::{Dma, Requester};
use ravelin::platform::memory::GuestRam;

use crate::driver::{
    Driver, GN, INVALIDATE_ALL, PPR_LOG, command, device, guest_dte, host_dte, invalidate_pages,
    other_device, pte, reg, ring_base,
};
use crate::function::{ATS, COPY, Function, PASID, PRI, READ, REQUEST_PAGE, WRITE};

/// Has the unit, and lets its interrupts go by.
struct Owner(Arc<Unit<GuestRam>>);

impl UnitOwner for Owner {
    type Memory = GuestRam;

    fn unit(&self) -> &Unit<GuestRam> {
        &self.0
    }

    fn perform(&self, effects: Effects) {
        assert!(!effects.more_commands, "requests leave no commands behind");
    }
}

/// A driver of the unit and one of the device.
struct Bench {
    driver: Driver,
    device: Function,
}

fn bench(driver: Driver) -> Bench {
    let requester = Arc::new(Requester::new(Sbdf {
        segment: 0,
        bdf: device(),
    }));
    requester.set_bus_master(true);
    let dma = Dma::new(requester.clone(), driver.ram.clone());
    let device = Function::new(requester, dma, Some(Arc::new(Owner(driver.unit.clone()))));
    driver.unit.add_follower(device.function.follower());
    Bench { driver, device }
}

impl Deref for Bench {
    type Target = Function;

    fn deref(&self) -> &Function {
        &self.device
    }
}

impl Bench {
    fn bytes(&self, at: u64) -> [u8; 16] {
        self.driver.ram.read_obj(Gpa(at)).expect("RAM")
    }
}

/// A bench whose device may ask for translations in a host table that maps two pages: 0x1000 to 0x20_5000, and
/// 0x2000, which may only be read, to 0x20_9000.
fn translating() -> Bench {
    let mut driver = Driver::running();
    let root = driver.table();
    let mut dte = host_dte(root, 4, 1);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    driver.map(root, 4, 0x1000, 1, pte(0x20_5000));
    driver.map(root, 4, 0x2000, 1, pte(0x20_9000) & !(1 << 62));
    let bench = bench(driver);
    bench.enable();
    bench
}

/// INVALIDATE_IOTLB_PAGES of one page without a process address space.
fn forget(device: ravelin::platform::addr::Bdf, page: u32) -> u128 {
    command(4, device.requester_id().into(), 0, page, 0)
}

const TRANSLATED: Flags = Flags::TRANSLATED;

#[test]
fn a_translation_says_where_and_what_for() {
    let bench = translating();
    let answered = Status::TRANSLATE_SUCCESS;
    // Pages of 4 KiB; bit 8 to read, bit 9 to write.
    assert_eq!(bench.translate(0x1234, TRANSLATED), (answered, 0x20_5000, 0x30c));
    assert_eq!(bench.translate(0x2000, TRANSLATED), (answered, 0x20_9000, 0x10c));
    assert_eq!(bench.get(Reg::Kept), 2);
    let (status, _, info) = bench.translate(0x3000, TRANSLATED);
    assert_eq!((status, info & 0x300), (answered, 0));
    assert_eq!(bench.get(Reg::Kept), 2);
}

#[test]
fn translated_requests_go_where_the_translation_says_and_no_further() {
    let bench = translating();
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1008, 8), Status::WRITE_SUCCESS);
    assert_ne!(bench.bytes(0x20_5000)[8..], [0; 8]);
    assert_eq!(
        bench.run(COPY, TRANSLATED, 0x1008, 0x1ff8, 8),
        Status::COPY_SUCCESS
    );
    assert_eq!(bench.bytes(0x20_5ff0)[8..], bench.bytes(0x20_5000)[8..]);
    let read_only = Status::WRITE_FAIL | Status::DESTINATION_INVALID;
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x2000, 8), read_only);
    // The second half is on a page that may only be read.
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1ffc, 8), read_only);
    assert_eq!(bench.bytes(0x20_9000), [0; 16]);
    let nowhere = Status::READ_FAIL | Status::SOURCE_INVALID;
    assert_eq!(bench.run(READ, TRANSLATED, 0x3000, 0, 8), nowhere);
    assert_eq!(bench.run(READ, TRANSLATED, u64::MAX, 0, 8), nowhere);
}

#[test]
fn a_kept_translation_is_used_until_the_device_is_told_to_forget_it() {
    let mut bench = translating();
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), Status::WRITE_SUCCESS);
    let root = bench.driver.table();
    let mut dte = host_dte(root, 4, 1);
    dte.guest.set_iotlb(true);
    bench.driver.set_dte(device(), dte);
    bench.driver.map(root, 4, 0x1000, 1, pte(0x30_0000));
    bench.driver.flush(&[
        INVALIDATE_ALL,
        forget(other_device(), 0x1000),
        forget(device(), 0x8000),
    ]);
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), Status::WRITE_SUCCESS);
    assert_eq!(bench.bytes(0x30_0000), [0; 16]);
    assert_eq!((bench.get(Reg::Kept), bench.get(Reg::Invalidations)), (1, 1));
    bench.driver.flush(&[forget(device(), 0x1000)]);
    assert_eq!((bench.get(Reg::Kept), bench.get(Reg::Invalidations)), (0, 2));
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), Status::WRITE_SUCCESS);
    assert_ne!(bench.bytes(0x30_0000)[..8], [0; 8]);
}

#[test]
fn what_is_kept_without_a_space_is_forgotten_with_space_0_whose_tables_say_it() {
    let mut driver = Driver::running();
    let (gcr3, root) = (driver.table(), driver.table());
    driver.put(gcr3, root | 1);
    driver.map_guest(root, 4, 0x1000, 1, 0x20_5007);
    let mut dte = guest_dte(gcr3, 7);
    dte.host.set_giov(true);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    let mut bench = bench(driver);
    bench.enable();
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), Status::WRITE_SUCCESS);
    assert_ne!(bench.bytes(0x20_5000)[..8], [0; 8]);
    bench.driver.map_guest(root, 4, 0x1000, 1, 0x30_0007);
    let id = u32::from(device().requester_id());
    // As Linux 7.3 unmaps: both name space 0.
    bench.driver.flush(&[
        invalidate_pages(7, 0, 0x1000 | GN),
        command(4, id, id, 0x1000 | 4, 0),
    ]);
    assert_eq!(bench.get(Reg::Kept), 0);
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), Status::WRITE_SUCCESS);
    assert_ne!(bench.bytes(0x30_0000)[..8], [0; 8]);
    // Another space's are no such.
    assert_eq!(bench.get(Reg::Kept), 1);
    bench.driver.flush(&[command(4, id, id | 5 << 16, 0x1000 | 4, 0)]);
    assert_eq!(bench.get(Reg::Kept), 1);
}

#[test]
fn of_many_translations_the_oldest_is_forgotten() {
    let mut driver = Driver::running();
    let root = driver.table();
    let mut dte = host_dte(root, 4, 1);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    for page in 0..100 {
        driver.map(root, 4, page << 12, 1, pte(0x20_0000 + (page << 12)));
    }
    let bench = bench(driver);
    bench.enable();
    let length = 100 << 12;
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0, length), Status::WRITE_SUCCESS);
    assert_eq!(bench.get(Reg::Kept), 64);
}

#[test]
fn an_entry_that_no_longer_trusts_the_device_stops_translated_requests() {
    let mut bench = translating();
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), Status::WRITE_SUCCESS);
    let root = bench.driver.table();
    bench.driver.set_dte(device(), host_dte(root, 4, 1));
    bench.driver.flush(&[INVALIDATE_ALL]);
    let refused = Status::WRITE_FAIL | Status::DESTINATION_INVALID;
    assert_eq!(bench.run(WRITE, TRANSLATED, 0, 0x1000, 8), refused);
    assert_eq!(bench.translate(0x1000, TRANSLATED).0, Status::TRANSLATE_FAIL);
}

#[test]
fn what_is_switched_off_is_not_used() {
    let bench = translating();
    bench.configure(bench.capability(ATS), 0);
    bench.configure(bench.capability(PASID), 0);
    bench.configure(bench.capability(PRI), 0);
    assert_eq!(bench.translate(0x1000, TRANSLATED).0, Status::TRANSLATE_FAIL);
    let refused = Status::READ_FAIL | Status::SOURCE_INVALID;
    assert_eq!(bench.run(READ, TRANSLATED, 0x1000, 0, 8), refused);
    assert_eq!(bench.run(READ, Flags::PASID, 0x1000, 0, 8), refused);
    let page = bench.run(REQUEST_PAGE, Flags::empty(), 0x1000, 0, 0);
    assert_eq!(page, Status::PAGE_REQUEST_FAIL);
    assert_eq!(bench.driver.events().len(), 0);
}

#[test]
fn without_bus_master_nothing_is_asked() {
    let bench = translating();
    bench.function.requester().set_bus_master(false);
    assert_eq!(bench.translate(0x1000, TRANSLATED).0, Status::TRANSLATE_FAIL);
    let page = bench.run(REQUEST_PAGE, Flags::empty(), 0x1000, 0, 0);
    assert_eq!(page, Status::PAGE_REQUEST_FAIL);
    assert_eq!((bench.get(Reg::Kept), bench.driver.events().len()), (0, 0));
}

/// A bench whose device has process address spaces and may ask for pages: space 5 maps 0x7000 to 0x20_5000.
fn paging() -> Bench {
    let mut driver = Driver::running();
    let (gcr3, root) = (driver.table(), driver.table());
    driver.put(gcr3 + 5 * 8, root | 1);
    driver.map_guest(root, 4, 0x7000, 1, 0x20_5000 | 7);
    let mut dte = guest_dte(gcr3, 7);
    dte.host.set_ppr(true);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    driver.enable(Control::new().with_ppr_en(true));
    driver.write(reg::PPR_BASE, ring_base(PPR_LOG, 8));
    driver.enable(Control::new().with_ppr_log_en(true));
    let bench = bench(driver);
    bench.enable();
    bench.set(Reg::Space, Space::new().with_pasid(5).into_bits());
    bench
}

#[test]
fn behind_a_switch_that_blocks_prefixes_no_space_is_reached_and_all_else_is() {
    let bench = paging();
    let requester = bench.function.requester().clone();
    requester.block_prefixes(true);
    let refused = Status::READ_FAIL | Status::SOURCE_INVALID;
    assert_eq!(bench.run(READ, Flags::PASID, 0x7000, 0, 8) & refused, refused);
    let page = bench.run(REQUEST_PAGE, Flags::PASID, 0x7000, 0, 0);
    assert_eq!(page, Status::PAGE_REQUEST_FAIL);
    assert_eq!(bench.translate(0x7000, Flags::PASID).0, Status::TRANSLATE_FAIL);
    assert_eq!(bench.driver.events().len(), 0);
    requester.block_prefixes(false);
    assert_eq!(bench.translate(0x7000, Flags::PASID).0, Status::TRANSLATE_SUCCESS);
}

#[test]
fn each_process_address_space_is_another_memory() {
    let bench = paging();
    for flags in [Flags::PASID, Flags::PASID | TRANSLATED] {
        bench.driver.put(0x20_5000, 0);
        assert_eq!(bench.run(WRITE, flags, 0, 0x7000, 8), Status::WRITE_SUCCESS);
        assert_ne!(bench.driver.get(0x20_5000), 0);
    }
    bench.set(Reg::Space, Space::new().with_pasid(6).into_bits());
    let refused = Status::WRITE_FAIL | Status::DESTINATION_INVALID;
    assert_eq!(bench.run(WRITE, Flags::PASID, 0, 0x7000, 8), refused);
    // The record names the space: 6.
    let events = bench.driver.events();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0][1] >> 28, events[0][1] & 0xffff), (2, 6));
}

#[test]
fn a_page_request_is_logged_and_its_response_comes_back() {
    let mut bench = paging();
    let rights = Rights::new()
        .with_read(true)
        .with_write(true)
        .with_last(true)
        .with_group(5);
    bench.set(Reg::Rights, rights.into_bits());
    let asked = bench.run(REQUEST_PAGE, Flags::PASID, 0x7f00_0000_1000, 0, 0);
    assert_eq!(
        (asked, bench.get(Reg::Response)),
        (Status::PAGE_REQUEST_SUCCESS, 0)
    );
    assert_eq!(bench.driver.read(reg::PPR_TAIL), 0x10);
    let [_, flags, low, high] = bench.driver.dwords(PPR_LOG);
    assert_eq!((flags >> 28, low, high), (1, 0x1000, 0x7f00));
    // COMPLETE_PPR_REQUEST for group 5: success.
    let id = u32::from(device().requester_id());
    bench.driver.flush(&[command(7, id, 5, 4, 5)]);
    assert_eq!(bench.get(Reg::Response), 0x8000_0005);
    // Failure: the device may not ask again until it is switched on anew.
    assert_eq!(
        bench.run(REQUEST_PAGE, Flags::PASID, 0x1000, 0, 0),
        Status::PAGE_REQUEST_SUCCESS
    );
    bench.driver.flush(&[command(7, id, 5, 4, 0xf005)]);
    assert_eq!(bench.get(Reg::Response), 0x8000_f005);
    assert_eq!(
        bench.run(REQUEST_PAGE, Flags::PASID, 0x1000, 0, 0),
        Status::PAGE_REQUEST_FAIL
    );
}

#[test]
fn no_more_pages_are_asked_for_than_software_allows() {
    let bench = paging();
    bench.configure(bench.capability(PRI) + 2, 2);
    let ask = |_| bench.run(REQUEST_PAGE, Flags::empty(), 0x1000, 0, 0);
    let asked = [0, 1, 2].map(ask);
    let taken = Status::PAGE_REQUEST_SUCCESS;
    assert_eq!(asked, [taken, taken, Status::PAGE_REQUEST_FAIL]);
    assert_eq!(bench.driver.read(reg::PPR_TAIL), 0x20);
}

#[test]
fn a_reset_forgets_translations_requests_and_answers() {
    let bench = paging();
    assert_eq!(bench.translate(0x7000, Flags::PASID).0, Status::TRANSLATE_SUCCESS);
    let asked = bench.run(REQUEST_PAGE, Flags::PASID, 0x1000, 0, 0);
    assert_eq!((asked, bench.get(Reg::Kept)), (Status::PAGE_REQUEST_SUCCESS, 1));
    bench.function.reset();
    let registers = [Reg::Kept, Reg::Response, Reg::Space, Reg::TranslationInfo];
    assert_eq!(registers.map(|register| bench.get(register)), [0; 4]);
    assert_eq!(bench.function.config_read(bench.capability(ATS)) >> 31, 0);
    // Stopped again, as nothing is outstanding.
    assert_eq!(bench.function.config_read(bench.capability(PRI)) >> 24 & 1, 1);
}
