//! P: page tables.

use ravelin::iommu::amd::features::Wanted;
use ravelin::iommu::amd::request::{Access, Request};
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::Iova;

use crate::driver::{Driver, HOLE, RAM, device, guest_dte, host_dte, pasid, pde, pte, read, write};

fn codes(driver: &Driver) -> Vec<u32> {
    driver.events().iter().map(|record| record[1] >> 16).collect()
}

#[test]
fn p1_a_small_page_keeps_the_offset() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    assert_eq!(driver.target(&read(device(), 0x1123)), Some(0x5123));
}

#[test]
fn p2_a_plain_leaf_of_level_two_is_two_mebibytes() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0, 2, pte(0x40_0000));
    assert_eq!(driver.target(&read(device(), 0x12_3456)), Some(0x52_3456));
}

#[test]
fn p3_sixteen_copies_of_a_coded_leaf_are_one_page() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    (0..16).for_each(|n| driver.map(root, 4, n << 12, 1, pte(0x47_7000 | 7 << 9)));
    for n in 0..16 {
        let at = (n << 12) + 0x123;
        assert_eq!(driver.target(&read(device(), at)), Some(0x47_0000 + at), "{n}");
    }
}

#[test]
fn p4_skipped_levels_need_a_zero_index() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    let last = driver.table();
    driver.put(root, pde(last, 1));
    driver.put(last + 8, pte(0x5000));
    assert_eq!(driver.target(&read(device(), 0x1123)), Some(0x5123));
    assert_eq!(driver.target(&read(device(), 0x1123 | 1 << 30)), None);
    assert_eq!(codes(&driver), [0x2010]);
}

#[test]
fn p5_a_table_that_points_to_its_own_level_is_a_fault() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.put(root, pde(root, 4));
    assert_eq!(driver.target(&read(device(), 0)), None);
    assert_eq!(codes(&driver), [0x2010]);
}

#[test]
fn p6_a_size_code_without_a_zero_is_a_fault() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.put(root, pte(0x000f_ffff_ffff_f000 | 7 << 9));
    assert_eq!(driver.target(&read(device(), 0)), None);
    assert_eq!(codes(&driver), [0x2010]);
}

#[test]
fn p7_an_address_beyond_the_table_is_not_aliased_into_it() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0, 1, pte(0x5000));
    assert_eq!(driver.target(&read(device(), 1 << 48)), None);
    assert_eq!(driver.events(), [[0x0219, 0x2000_0001, 0, 1 << 16]]);
}

#[test]
fn p8_a_table_pointer_can_deny_writing() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    let last = driver.table();
    driver.put(root, pde(last, 1) & !(1 << 62));
    driver.put(last, pte(0x5000));
    assert_eq!(driver.target(&read(device(), 0)), Some(0x5000));
    assert_eq!(driver.target(&write(device(), 0)), None);
    assert_eq!(codes(&driver), [0x2070]);
}

#[test]
fn p9_a_page_can_be_written_without_being_readable() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0, 1, pte(0x5000) & !(1 << 61));
    assert_eq!(driver.target(&write(device(), 0)), Some(0x5000));
    assert_eq!(driver.target(&read(device(), 0)), None);
    assert_eq!(codes(&driver), [0x2050]);
}

#[test]
fn p10_an_access_into_an_absent_page_is_aborted_as_a_whole() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, pte(0x5000));
    assert!(driver.dma_write(device(), 0x1ff0, &[0xaa; 32]).is_err());
    assert_eq!(driver.get(0x5ff0), 0, "nothing was written");
    assert_eq!(driver.events(), [[0x0219, 0x2020_0001, 0x2000, 0]]);
    driver.map(root, 4, 0x2000, 1, pte(0x9000));
    assert!(driver.dma_write(device(), 0x1ff0, &[0xaa; 32]).is_ok());
    assert_eq!(
        (driver.get(0x5ff8), driver.get(0x9008)),
        (0xaaaa_aaaa_aaaa_aaaa, 0xaaaa_aaaa_aaaa_aaaa)
    );
}

#[test]
fn p10_an_access_that_wraps_is_aborted_as_a_whole() {
    let mut driver = Driver::running();
    let root = driver.table();
    driver.set_dte(device(), host_dte(root, 6, 1));
    driver.map(root, 6, 0xffff_ffff_ffff_f000, 1, pte(0x5000));
    driver.map(root, 6, 0, 1, pte(0x6000));
    assert!(
        driver
            .dma_write(device(), 0xffff_ffff_ffff_fff0, &[0xaa; 16])
            .is_ok()
    );
    assert!(
        driver
            .dma_write(device(), 0xffff_ffff_ffff_fff8, &[0xbb; 16])
            .is_err()
    );
    assert_eq!(
        (driver.get(0x5ff8), driver.get(0x6000)),
        (0xaaaa_aaaa_aaaa_aaaa, 0)
    );
}

#[test]
fn p11_a_read_marks_accessed_and_a_write_marks_dirty() {
    let mut driver = Driver::running();
    let root = driver.table();
    let mut dte = host_dte(root, 1, 1);
    dte.host.set_had(3);
    driver.set_dte(device(), dte);
    driver.put(root, pte(0x5000));
    assert_eq!(driver.target(&read(device(), 0)), Some(0x5000));
    assert_eq!(driver.get(root) & 0x60, 0x20);
    assert_eq!(
        driver.target(&write(device(), 0)),
        Some(0x5000),
        "past the cached entry"
    );
    assert_eq!(driver.get(root) & 0x60, 0x60);
}

#[test]
fn p11_a_unit_that_offers_no_marks_leaves_none() {
    let mut driver = Driver::with(Wanted {
        host_tracking: false,
        ..Wanted::EVERYTHING
    })
    .started();
    let root = driver.table();
    driver.put(root, pte(0x5000));
    for had in 0..4 {
        let mut dte = host_dte(root, 1, 1);
        dte.host.set_had(had);
        driver.set_dte(device(), dte);
        driver.flush(&[crate::driver::INVALIDATE_ALL]);
        assert_eq!(driver.target(&read(device(), 0)), Some(0x5000), "{had}");
        assert_eq!(driver.target(&write(device(), 0)), Some(0x5000), "{had}");
        assert_eq!(driver.get(root), pte(0x5000), "{had}");
    }
}

#[test]
fn p12_an_unreadable_table_is_a_hardware_error_with_the_entrys_address() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 7);
    driver.put(root, pde(HOLE, 3));
    assert_eq!(driver.target(&read(device(), 0x4000_0000)), None);
    assert_eq!(driver.events(), [[0x0219, 0x4400_0007, 0x8000_0008, 0]]);
}

/// A guest table in space `space`, with `giov`, that maps nothing yet: driver and page table root.
fn with_space(space: u64, giov: bool) -> (Driver, u64) {
    let mut driver = Driver::running();
    let gcr3 = driver.table();
    let root = driver.table();
    driver.put(gcr3 + space * 8, root | 1);
    let mut dte = guest_dte(gcr3, 1);
    dte.host.set_giov(giov);
    driver.set_dte(device(), dte);
    (driver, root)
}

#[test]
fn p13_requests_without_pasid_are_unsigned_under_giov() {
    let (mut driver, root) = with_space(0, true);
    driver.map_guest(root, 4, 1 << 47, 1, 0x5007);
    assert_eq!(driver.target(&write(device(), (1 << 47) + 0x123)), Some(0x5123));
    assert_eq!(driver.target(&write(device(), 0xffff_8000_0000_0000)), None);
    assert_eq!(driver.events()[0][1], 0x2021_0000);
}

#[test]
fn p13_requests_with_pasid_are_sign_extended() {
    let (mut driver, root) = with_space(5, false);
    driver.map_guest(root, 4, 1 << 47, 1, 0x5007);
    let at = |at| write(device(), at).in_space(pasid(5));
    assert_eq!(driver.target(&at(0xffff_8000_0000_0123)), Some(0x5123));
    assert_eq!(driver.target(&at(1 << 47)), None);
    assert_eq!(
        driver.target(&write(device(), 0x1234)),
        Some(0x1234),
        "identity without PASID"
    );
}

#[test]
fn p14_a_pasid_beyond_the_gcr3_table_is_a_fault_in_its_space() {
    let (driver, _) = with_space(0, false);
    assert_eq!(
        driver.target(&read(device(), 0x1000).in_space(pasid(0x200))),
        None
    );
    assert_eq!(driver.events(), [[0x0219, 0x2001_0200, 0x1000, 0]]);
}

#[test]
fn p14_three_levels_of_gcr3_reach_twenty_bits() {
    let mut driver = Driver::running();
    let tables = [driver.table(), driver.table(), driver.table()];
    let root = driver.table();
    driver.put(tables[0] + 3 * 8, tables[1] | 1);
    driver.put(tables[1] + 0x1ff * 8, tables[2] | 1);
    driver.put(tables[2] + 0x1fe * 8, root | 1);
    driver.map_guest(root, 4, 0x1000, 1, 0x5007);
    let mut dte = guest_dte(tables[0], 1);
    dte.host.set_glx(2);
    driver.set_dte(device(), dte);
    assert_eq!(
        driver.target(&read(device(), 0x1000).in_space(pasid(0xf_fffe))),
        Some(0x5000)
    );
    assert_eq!(
        driver.target(&read(device(), 0x1000).in_space(pasid(0xf_ffff))),
        None
    );
}

#[test]
fn p15_a_supervisor_page_refuses_a_user() {
    let (mut driver, root) = with_space(5, false);
    driver.map_guest(root, 4, 0x1000, 1, 0x5003);
    let user = read(device(), 0x1000).in_space(pasid(5));
    assert_eq!(driver.target(&user), None);
    assert_eq!(driver.events(), [[0x0219, 0x2055_0005, 0x1000, 0]]);
    let supervisor = Request {
        privileged: true,
        ..user
    };
    assert_eq!(driver.target(&supervisor), Some(0x5000));
    assert_eq!(driver.target(&user), None, "a cached supervisor page too");
}

#[test]
fn p15_guest_marks_are_left_and_can_be_suppressed() {
    let (mut driver, root) = with_space(0, true);
    driver.map_guest(root, 4, 0, 2, 0x40_0087);
    let leaf = |driver: &Driver| {
        let third = driver.get(root) & !0xfff;
        let second = driver.get(third) & 0x000f_ffff_ffff_f000;
        driver.get(second) & 0x60
    };
    driver.enable(Control::new().with_gd_update_dis(true).with_ga_update_dis(true));
    assert_eq!(driver.target(&write(device(), 0x123)), Some(0x40_0123));
    assert_eq!(leaf(&driver), 0);
    driver.disable(Control::new().with_gd_update_dis(true).with_ga_update_dis(true));
    assert_eq!(driver.target(&read(device(), 0x123)), Some(0x40_0123));
    assert_eq!(leaf(&driver), 0x20);
    assert_eq!(driver.target(&write(device(), 0x123)), Some(0x40_0123));
    assert_eq!(leaf(&driver), 0x60);
}

#[test]
fn guest_tables_of_five_levels_reach_57_bits() {
    let mut driver = Driver::running();
    let (gcr3, root) = (driver.table(), driver.table());
    driver.put(gcr3, root | 1);
    driver.map_guest(root, 5, 1 << 56, 1, 0x5007);
    let mut dte = guest_dte(gcr3, 1);
    dte.host.set_giov(true);
    dte.interrupt.set_guest_paging_mode(1);
    driver.set_dte(device(), dte);
    assert_eq!(driver.target(&read(device(), (1 << 56) + 5)), Some(0x5005));
    assert_eq!(driver.target(&read(device(), 1 << 57)), None);
}

/// A guest table in space 5 over a host table that maps RAM to itself except for `missing`.
fn nested(missing: u64, gcr3_is_guest: bool) -> Driver {
    let (mut driver, root) = with_space(5, false);
    driver.map_guest(root, 4, 0x1000, 1, 0x5007);
    let gcr3 = driver.get(crate::driver::DEVICE_TABLE + 0x219 * 32 + 8);
    let host = driver.table();
    (0..RAM >> 12)
        .filter(|page| page << 12 != missing)
        .for_each(|page| driver.map(host, 4, page << 12, 1, pte(page << 12)));
    let at = crate::driver::DEVICE_TABLE + 0x219 * 32;
    driver.put(at, driver.get(at) | host_dte(host, 4, 0).into_quadwords()[0]);
    assert_eq!(driver.get(at + 8), gcr3);
    driver.enable(Control::new().with_gcr3_trp_mode(gcr3_is_guest));
    driver
}

#[test]
fn p16_a_guest_table_that_the_host_table_lacks_is_one_fault_of_the_domain() {
    let mut probe = Driver::running();
    let (_gcr3, root) = (probe.table(), probe.table());
    let driver = nested(root, false);
    let request = write(device(), 0x1000).in_space(pasid(5));
    assert_eq!(driver.target(&request), None);
    let address = u32::try_from(root).expect("low");
    assert_eq!(driver.events(), [[0x0219, 0x2020_0001, address, 0]]);
}

#[test]
fn p16_variant_nested_translation_reaches_the_page() {
    let driver = nested(0x7000, false);
    let request = write(device(), 0x1123).in_space(pasid(5));
    assert_eq!(driver.target(&request), Some(0x5123));
    assert_eq!(
        driver.target(&write(device(), 0x6123)),
        Some(0x6123),
        "host table alone without PASID"
    );
    assert_eq!(driver.target(&write(device(), 0x7123)), None);
}

#[test]
fn p17_a_guest_physical_gcr3_root_passes_the_host_table() {
    let mut driver = Driver::running();
    let (gcr3, root, host) = (driver.table(), driver.table(), driver.table());
    driver.put(gcr3 + 5 * 8, root | 1);
    driver.map_guest(root, 4, 0x1000, 1, 0x5007);
    (0..RAM >> 12).for_each(|page| driver.map(host, 4, page << 12, 1, pte(page << 12)));
    let moved = 0x1_2345_6000;
    driver.map(host, 4, moved, 1, pte(gcr3));
    let mut dte = guest_dte(moved, 1);
    dte.host.set_mode(4);
    dte.host.set_root(host >> 12);
    driver.set_dte(device(), dte);
    let request = read(device(), 0x1000).in_space(pasid(5));
    assert_eq!(
        driver.target(&request),
        None,
        "there is nothing at the root's system address"
    );
    driver.enable(Control::new().with_gcr3_trp_mode(true));
    assert_eq!(driver.target(&request), Some(0x5000));
}

#[test]
fn ats_answers_what_the_tables_say_and_never_logs_a_page_fault() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x20_0000, 2, pte(0x40_0000) & !(1 << 62));
    let ask = |driver: &Driver, at| driver.on_bus(|bus| bus.translate_for_device(&read(device(), at)));
    assert!(
        ask(&driver, 0x20_1234).is_err(),
        "the entry does not allow translation requests"
    );
    assert_eq!(codes(&driver), [0x8100]);
    let mut dte = host_dte(root, 4, 1);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    driver.flush(&[crate::driver::INVALIDATE_ALL]);
    let found = ask(&driver, 0x20_1234).expect("answered");
    assert_eq!(
        (found.target.0, found.shift, found.allowed),
        (0x40_0000, 21, Access::READ)
    );
    let nothing = ask(&driver, 0x1000).expect("answered");
    assert_eq!(nothing.allowed, Access::NONE);
    assert_eq!(codes(&driver).len(), 0);
    assert!(ask(&driver, 0xfee0_0000).is_err());
    assert_eq!(codes(&driver), [0x8300]);
}

#[test]
fn ats_marks_a_page_dirty_before_it_grants_writing() {
    let mut driver = Driver::running();
    let root = driver.table();
    let mut dte = host_dte(root, 1, 1);
    dte.host.set_had(3);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    driver.put(root, pte(0x5000));
    let ask = |request| {
        driver
            .on_bus(|bus| bus.translate_for_device(&request))
            .expect("answered")
            .allowed
    };
    assert_eq!(ask(read(device(), 0)), Access::READ);
    assert_eq!(driver.get(root) & 0x40, 0);
    assert_eq!(ask(write(device(), 0)), Access::BOTH);
    assert_eq!(driver.get(root) & 0x40, 0x40);
}

#[test]
fn translated_requests_pass_only_where_the_entry_trusts_the_device() {
    let driver = Driver::running();
    let mut dte = host_dte(0, 0, 1);
    driver.set_dte(device(), dte);
    let request = Request::plain(device(), Iova(0x5000), Access::WRITE);
    assert!(driver.on_bus(|bus| bus.check_translated(&request)).is_err());
    assert_eq!(codes(&driver), [0x8200]);
    dte.guest.set_iotlb(true);
    driver.set_dte(device(), dte);
    driver.submit(&[crate::driver::INVALIDATE_ALL]);
    assert!(driver.on_bus(|bus| bus.check_translated(&request)).is_ok());
    assert!(
        driver
            .on_bus(|bus| bus.check_translated(&request.moved_to(Iova(0xfee0_0000))))
            .is_err()
    );
}
