//! Entries of the device table and the decisions they make, rule by rule.

use super::*;
use crate::iommu::amd::features::{Features, Wanted};
use crate::iommu::amd::registers::Registers;
use crate::iommu::amd::spec::dte::Guest;
use crate::iommu::amd::spec::registers::{DeviceTableBase, ExclusionBase, ExclusionLimit};

fn configuration() -> Configuration {
    let mut configuration = Registers::new(Features::offer(Wanted::EVERYTHING)).configuration();
    configuration.control = Control::new().with_iommu_en(true).with_gt_en(true);
    configuration
}

fn entry(host: Host) -> Dte {
    Dte {
        host: host.with_v(true).with_tv(true),
        ..Dte::default()
    }
}

fn decide(configuration: &Configuration, dte: &Dte, request: &Request) -> Decision {
    super::decide(configuration.control, configuration.exclusion, dte, request)
}

fn read() -> Request {
    Request::plain(Bdf::default(), Iova(0x1000), Access::READ)
}

const BOTH_WAYS: Host = Host::new().with_ir(true).with_iw(true);

#[test]
fn a_table_ends_where_its_size_says() {
    let mut configuration = configuration();
    configuration.device_table[0] = DeviceTableBase::new().with_frame(0x100).with_size(1);
    let at = |id| locate(&configuration, Bdf::from_requester_id(id));
    assert_eq!(at(0), Some(Gpa(0x10_0000)));
    assert_eq!(at(255), Some(Gpa(0x10_0000 + 255 * 32)));
    assert_eq!(at(256), None);
}

#[test]
fn the_highest_bits_choose_the_segment() {
    let mut configuration = configuration();
    for (segment, base) in configuration.device_table.iter_mut().enumerate() {
        *base = DeviceTableBase::new()
            .with_frame(0x1000 * segment as u64)
            .with_size(0x1ff);
    }
    for (log, id, segment, index) in [
        (0, 0xffff_u16, 0, 0xffff),
        (1, 0x8001, 1, 1),
        (2, 0xc002, 3, 2),
        (3, 0xffff, 7, 0x1fff),
        (3, 0x2003, 1, 3),
    ] {
        configuration.control = Control::new().with_dev_tbl_seg_en(log);
        let at = Gpa(0x100_0000 * segment + index * 32);
        assert_eq!(
            locate(&configuration, Bdf::from_requester_id(id)),
            Some(at),
            "{log} {id:#x}"
        );
    }
}

#[test]
fn an_invalid_entry_forwards_whatever_else_it_holds() {
    let dte = Dte::from_quadwords([!1, u64::MAX, u64::MAX, u64::MAX]);
    assert_eq!(decide(&configuration(), &dte, &read()), Decision::Forward);
}

#[test]
fn every_reserved_bit_of_a_valid_entry_is_found() {
    for bit in (2..=6).chain([63]) {
        let dte = Dte::from_quadwords([1 | 1 << bit, 0, 0, 0]);
        assert_eq!(
            decide(&configuration(), &dte, &read()),
            Decision::Reserved,
            "{bit}"
        );
    }
}

#[test]
fn without_translation_fields_everything_is_blocked() {
    let dte = Dte::from_quadwords([BOTH_WAYS.with_v(true).into_bits(), 0, 0, 0]);
    assert_eq!(decide(&configuration(), &dte, &read()), Decision::Blocked);
}

#[test]
fn mode_zero_is_identity_within_the_entrys_permissions() {
    let one_way = entry(Host::new().with_ir(true));
    assert_eq!(
        decide(&configuration(), &one_way, &read()),
        Decision::Identity(Access::READ)
    );
    let write = Request::plain(Bdf::default(), Iova(0x1000), Access::WRITE);
    assert_eq!(decide(&configuration(), &one_way, &write), Decision::Denied);
    assert_eq!(
        decide(&configuration(), &entry(Host::new()), &read()),
        Decision::Denied
    );
}

#[test]
fn reserved_modes_and_levels_are_illegal() {
    let pasid = read().in_space(Pasid::ZERO);
    let seven = entry(BOTH_WAYS.with_mode(7));
    assert_eq!(decide(&configuration(), &seven, &read()), Decision::Illegal);
    let glx = entry(BOTH_WAYS.with_gv(true).with_glx(3));
    assert_eq!(decide(&configuration(), &glx, &pasid), Decision::Illegal);
    assert_eq!(
        decide(&configuration(), &glx, &read()),
        Decision::Identity(Access::BOTH)
    );
    for mode in [2, 3] {
        let mut paging = entry(BOTH_WAYS.with_gv(true));
        paging.interrupt = Interrupt::new().with_guest_paging_mode(mode);
        assert_eq!(
            decide(&configuration(), &paging, &pasid),
            Decision::Illegal,
            "{mode}"
        );
    }
}

#[test]
fn a_pasid_needs_guest_tables_in_the_entry_and_in_control() {
    let pasid = read().in_space(Pasid::ZERO);
    let without = entry(BOTH_WAYS);
    assert_eq!(decide(&configuration(), &without, &pasid), Decision::NoGuestTable);
    let mut off = configuration();
    off.control.set_gt_en(false);
    let with = entry(BOTH_WAYS.with_gv(true).with_giov(true));
    assert_eq!(decide(&off, &with, &pasid), Decision::NoGuestTable);
    assert_eq!(decide(&off, &with, &read()), Decision::Identity(Access::BOTH));
}

#[test]
fn giov_sends_requests_without_pasid_to_the_guest_table() {
    let dte = entry(BOTH_WAYS.with_gv(true).with_giov(true).with_mode(4)).with_gcr3_root(0x1234_5000);
    let Decision::Guest { table, .. } = decide(&configuration(), &dte, &read()) else {
        panic!("translated by the guest table");
    };
    assert_eq!((table.gcr3, table.pasid), (0x1234_5000, Pasid::ZERO));
    assert!(!table.signed && !table.user && table.host.is_some());
    let without = entry(BOTH_WAYS.with_gv(true).with_mode(4));
    assert!(matches!(
        decide(&configuration(), &without, &read()),
        Decision::Host { .. }
    ));
}

#[test]
fn the_exclusion_range_includes_its_last_page_and_ignores_permissions() {
    let mut configuration = configuration();
    configuration.exclusion.base = ExclusionBase::new().with_enable(true).with_frame(1);
    configuration.exclusion.limit = ExclusionLimit::new().with_frame(2);
    let mut dte = entry(Host::new());
    let at = |dte: &Dte, at| decide(&configuration, dte, &read().moved_to(Iova(at)));
    assert_eq!(at(&dte, 0x1000), Decision::Denied);
    dte.guest = Guest::new().with_ex(true);
    assert_eq!(at(&dte, 0xfff), Decision::Denied);
    assert_eq!(at(&dte, 0x1000), Decision::Forward);
    assert_eq!(at(&dte, 0x2fff), Decision::Forward);
    assert_eq!(at(&dte, 0x3000), Decision::Denied);
    assert_eq!(at(&dte, 0x0010_0000_0000_1000), Decision::Denied);
}

#[test]
fn every_value_of_int_ctl_has_its_meaning() {
    let of = |value| InterruptControl::of(Interrupt::new().with_int_ctl(value));
    assert_eq!(of(0), InterruptControl::Abort);
    assert_eq!(of(1), InterruptControl::Forward);
    assert_eq!(of(2), InterruptControl::Remap);
    assert_eq!(of(3), InterruptControl::Reserved);
}
