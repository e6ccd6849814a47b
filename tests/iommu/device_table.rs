//! D: the device table.

use ravelin::iommu::amd::spec::dte::{Dte, Guest};
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::{Bdf, Gpa, Iova};

use ravelin::iommu::amd::request::{Access, Request};

use crate::driver::{
    DEVICE_TABLE, Driver, HOLE, device, guest_dte, host_dte, invalidate_device, pasid, pte, read, reg, write,
};

/// Flags of a record's second dword, and the code above them.
fn codes(driver: &Driver) -> Vec<u32> {
    driver.events().iter().map(|record| record[1] >> 16).collect()
}

#[test]
fn d1_an_invalid_entry_forwards_whatever_its_reserved_bits() {
    let driver = Driver::running();
    driver.set_dte(device(), Dte::from_quadwords([!1, !0, !0, !0]));
    assert_eq!(driver.target(&write(device(), 0x1234)), Some(0x1234));
    assert_eq!(codes(&driver).len(), 0);
}

#[test]
fn d2_without_translation_fields_dma_is_blocked_and_reported() {
    let driver = Driver::running();
    let mut dte = host_dte(0, 0, 7);
    dte.host.set_tv(false);
    driver.set_dte(device(), dte);
    assert_eq!(driver.target(&write(device(), 0x1000)), None);
    assert_eq!(driver.events(), [[0x0219, 0x2020_0007, 0x1000, 0]]);
}

#[test]
fn d3_linuxs_boot_entry_blocks() {
    let driver = Driver::running();
    driver.set_dte(device(), Dte::from_quadwords([3, 0, 0, 0]));
    assert_eq!(driver.target(&read(device(), 0x1000)), None);
    assert_eq!(codes(&driver), [0x2050]);
}

#[test]
fn d4_identity_keeps_to_the_entrys_permissions() {
    let driver = Driver::running();
    let mut dte = host_dte(0, 0, 0);
    dte.host.set_iw(false);
    driver.set_dte(device(), dte);
    assert_eq!(driver.target(&read(device(), 0x1234)), Some(0x1234));
    assert_eq!(driver.target(&write(device(), 0x1234)), None);
    assert_eq!(codes(&driver), [0x2070]);
}

#[test]
fn d5_a_reserved_bit_in_a_valid_entry_is_illegal() {
    let driver = Driver::running();
    let mut words = host_dte(0, 0, 0).into_quadwords();
    words[0] |= 1 << 63;
    driver.set_dte(device(), Dte::from_quadwords(words));
    assert_eq!(driver.target(&read(device(), 0x1000)), None);
    assert_eq!(codes(&driver), [0x1080]);
}

#[test]
fn d6_mode_seven_is_illegal() {
    let driver = Driver::running();
    driver.set_dte(device(), host_dte(0x5000, 7, 0));
    assert_eq!(driver.target(&read(device(), 0x1000)), None);
    assert_eq!(codes(&driver), [0x1000]);
}

#[test]
fn d7_a_device_past_the_end_of_the_table_is_a_page_fault() {
    let driver = Driver::running();
    driver.write(reg::DEVICE_TABLE, DEVICE_TABLE);
    let beyond = Bdf::new(1, 0, 0).expect("valid");
    driver.set_dte(beyond, host_dte(0, 0, 0));
    assert_eq!(
        driver.target(&read(beyond, 0x1000)),
        None,
        "nothing is read past the end"
    );
    assert_eq!(driver.events(), [[0x0100, 0x2000_0000, 0x1000, 0]]);
}

#[test]
fn d8_an_unreadable_entry_is_a_hardware_error_with_its_address() {
    let driver = Driver::running();
    driver.write(reg::DEVICE_TABLE, HOLE | 0x1ff);
    assert_eq!(driver.target(&read(device(), 0x1000)), None);
    assert_eq!(
        driver.events(),
        [[0x0219, 0x3400_0000, 0x8000_0000 + 0x219 * 32, 0]]
    );
}

#[test]
fn d9_sa_keeps_all_page_faults_from_the_log() {
    let driver = Driver::running();
    let mut dte = host_dte(0x10_0000 - 0x1000, 4, 0);
    dte.guest = Guest::new().with_sa(true);
    driver.set_dte(device(), dte);
    let aborted = (0..3)
        .filter(|_| driver.target(&read(device(), 0x1000)).is_none())
        .count();
    assert_eq!((aborted, codes(&driver).len()), (3, 0));
}

#[test]
fn d10_se_logs_the_first_page_fault_until_the_entry_is_invalidated() {
    let mut driver = Driver::running();
    let mut dte = host_dte(0x10_0000 - 0x1000, 4, 0);
    dte.guest = Guest::new().with_se(true);
    driver.set_dte(device(), dte);
    let three = |driver: &Driver| {
        let aborted = (0..3)
            .filter(|_| driver.target(&read(device(), 0x1000)).is_none())
            .count();
        (aborted, codes(driver).len())
    };
    assert_eq!(three(&driver), (3, 1));
    driver.flush(&[invalidate_device(device())]);
    assert_eq!(three(&driver), (3, 1));
}

#[test]
fn d11_the_exclusion_range_is_untranslated_and_the_rest_is_not() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x3000, 1, pte(0x5000));
    let mut dte = host_dte(root, 4, 1);
    dte.guest.set_ex(true);
    driver.set_dte(device(), dte);
    driver.write(reg::EXCLUSION_LIMIT, 0x2000);
    driver.write(reg::EXCLUSION_BASE, 0x1001);
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x1000));
    assert_eq!(driver.target(&write(device(), 0x2fff)), Some(0x2fff));
    assert_eq!(driver.target(&write(device(), 0x3000)), Some(0x5000));
    assert_eq!(driver.target(&write(device(), 0xfff)), None);
}

#[test]
fn a_range_that_is_excluded_while_requests_are_in_flight_is_heeded_by_the_next_that_is_decided() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x20_0000, 2, pte(0x100_0000));
    let bus = driver.unit.begin();
    let target = |at| bus.translate(&write(device(), at)).map(|found| found.target);
    assert_eq!(target(0x20_0000), Ok(Gpa(0x100_0000)));
    driver.write(reg::EXCLUSION_LIMIT, 0x20_1000);
    driver.write(reg::EXCLUSION_BASE, 0x20_1003);
    assert_eq!(
        target(0x20_0000),
        Ok(Gpa(0x100_0000)),
        "the large page is cached again"
    );
    assert_eq!(target(0x20_1000), Ok(Gpa(0x20_1000)));
}

#[test]
fn d12_a_unit_that_is_off_passes_everything() {
    let driver = Driver::running();
    let mut dte = host_dte(0, 0, 0);
    dte.host.set_tv(false);
    driver.set_dte(device(), dte);
    driver.disable(Control::new().with_iommu_en(true));
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x1000));
    assert_eq!(driver.target(&write(device(), u64::MAX)), Some(u64::MAX));
}

#[test]
fn d13_an_update_by_halves_gives_the_old_or_a_blocked_then_the_new_entry() {
    let mut driver = Driver::running();
    let old = driver.attach(device(), 1);
    driver.map(old, 4, 0x1000, 1, pte(0x5000));
    let new = driver.table();
    driver.map(new, 4, 0x1000, 1, pte(0x6000));
    assert_eq!(driver.target(&read(device(), 0x1000)), Some(0x5000));
    let entry = DEVICE_TABLE + 0x219 * 32;
    let words = host_dte(new, 4, 2).into_quadwords();
    driver.put(entry + 16, words[2]);
    driver.put(entry + 24, words[3]);
    driver.flush(&[invalidate_device(device())]);
    assert_eq!(driver.target(&read(device(), 0x1000)), Some(0x5000));
    driver.put(entry + 8, words[1]);
    driver.put(entry, words[0]);
    driver.flush(&[invalidate_device(device())]);
    assert_eq!(driver.target(&read(device(), 0x1000)), Some(0x6000));
}

#[test]
fn segments_divide_the_table_by_the_highest_bits() {
    let driver = Driver::at_reset();
    driver.write(reg::DEVICE_TABLE, DEVICE_TABLE | 0x3f);
    driver.write(0x108, 0x30_0000);
    driver.enable(Control::new().with_dev_tbl_seg_en(3).with_iommu_en(true));
    let in_second = Bdf::from_requester_id(0x4003);
    let entry = 0x30_0000 + 3 * 32;
    driver.put(entry, host_dte(0, 0, 0).into_quadwords()[0] & !(1 << 62));
    assert_eq!(driver.target(&read(in_second, 0x1000)), Some(0x1000));
    assert_eq!(driver.target(&write(in_second, 0x1000)), None);
    let beyond = Bdf::from_requester_id(0x4080);
    assert_eq!(driver.target(&read(beyond, 0x1000)), None);
    let absent = Bdf::from_requester_id(0x2080);
    assert_eq!(driver.target(&read(absent, 0x1000)), None);
}

#[test]
fn an_entry_that_maps_a_page_as_well_is_illegal_once_the_walk_has_marked_it() {
    let mut driver = Driver::running();
    let (gcr3, root) = (driver.table(), driver.table());
    driver.put(gcr3, root | 1);
    // The page of entries is a table, and this device's entry the page of 0x64000 in it, at 0x9000.
    let entry = DEVICE_TABLE + u64::from(device().requester_id()) * 32;
    driver.map_guest(root, 4, 0x6_4000, 2, entry & !0xfff | 7);
    let mut dte = guest_dte(gcr3, 1);
    dte.host.set_giov(true);
    dte.host.set_root(9);
    driver.set_dte(device(), dte);
    let before = driver.get(entry);
    assert_eq!(driver.target(&read(device(), 0x6_4123)), Some(0x9123));
    assert_eq!(
        driver.get(entry),
        before | 1 << 5,
        "accessed, which is reserved in a device's entry"
    );
    driver.flush(&[invalidate_device(device())]);
    assert_eq!(driver.target(&read(device(), 0x6_4123)), None);
    assert_eq!(driver.events(), [[0x0219, 0x1080_0000, 0x6_4120, 0]]);
}

#[test]
fn a_pasid_that_the_entry_has_no_table_for_is_blocked() {
    let driver = Driver::running();
    driver.set_dte(device(), host_dte(0, 0, 7));
    let request = read(device(), 0x1000).in_space(pasid(0xa_1234));
    assert_eq!(driver.target(&request), None);
    assert_eq!(driver.events(), [[0x000a_0219, 0x2001_1234, 0x1000, 0]]);
}

#[test]
fn memory_requests_never_become_interrupts() {
    let driver = Driver::running();
    driver.set_dte(device(), host_dte(0, 0, 7));
    for at in [0xfee0_0000, 0xfeef_ffff] {
        assert_eq!(driver.target(&write(device(), at)), None, "{at:#x}");
        assert_eq!(driver.target(&read(device(), at)), None, "{at:#x}");
    }
    assert_eq!(codes(&driver), [0x8c00, 0x8000, 0x8c00, 0x8000]);
    let below = Request::plain(device(), Iova(0xfedf_fffc), Access::WRITE);
    let run = driver.on_bus(|bus| bus.translate(&below)).map(|found| found.run);
    assert_eq!(run, Ok(4), "a run ends where the window begins");
}

#[test]
fn a_table_that_ends_with_memory_is_used_up_to_there() {
    let driver = Driver::running();
    let end = crate::driver::RAM;
    driver.write(reg::DEVICE_TABLE, (end - 0x1000) | 1);
    let last = Bdf::from_requester_id(127);
    driver
        .ram
        .write_obj(Gpa(end - 32), &host_dte(0, 0, 0).into_quadwords())
        .expect("RAM");
    assert_eq!(driver.target(&read(last, 0x1000)), Some(0x1000));
    assert_eq!(driver.target(&read(Bdf::from_requester_id(128), 0x1000)), None);
    assert_eq!(codes(&driver), [0x3400]);
}
