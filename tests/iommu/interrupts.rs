//! X: interrupt remapping.

use ravelin::iommu::amd::remap::{Delivery, Remapped};
use ravelin::iommu::amd::spec::dte::{Dte, Host, Interrupt};
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::platform::addr::Bdf;

use crate::driver::{Driver, HOLE, INTERRUPT_TABLE, device, invalidate_device};

const MESSAGE: u64 = 0xfee0_0000;

/// An interrupt half that remaps by a table of `1 << length` entries.
fn remapping(length: u8) -> Interrupt {
    Interrupt::new()
        .with_iv(true)
        .with_int_ctl(2)
        .with_table_length(length)
        .with_root(INTERRUPT_TABLE >> 6)
}

fn entry(interrupt: Interrupt) -> Dte {
    Dte {
        host: Host::new().with_v(true).with_tv(true),
        interrupt,
        ..Dte::default()
    }
}

/// A unit with 32-bit entries.
fn short(interrupt: Interrupt) -> Driver {
    let driver = Driver::running();
    driver.disable(Control::new().with_ga_en(true));
    driver.set_dte(device(), entry(interrupt));
    driver
}

/// A unit with 128-bit entries.
fn long(interrupt: Interrupt) -> Driver {
    let driver = Driver::running();
    driver.set_dte(device(), entry(interrupt));
    driver
}

fn set_short(driver: &Driver, index: u64, value: u32) {
    let at = ravelin::platform::addr::Gpa(INTERRUPT_TABLE + index * 4);
    driver.ram.write_obj(at, &value).expect("RAM");
}

fn set_long(driver: &Driver, index: u64, low: u64, high: u64) {
    driver.put(INTERRUPT_TABLE + index * 16, low);
    driver.put(INTERRUPT_TABLE + index * 16 + 8, high);
}

fn to(destination: u32, vector: u8) -> Remapped {
    Remapped::To(Delivery {
        destination,
        logical: false,
        arbitrated: false,
        vector,
        level: false,
        asserted: false,
    })
}

fn codes(driver: &Driver) -> Vec<u32> {
    driver.events().iter().map(|record| record[1] >> 16).collect()
}

#[test]
fn x1_without_iv_messages_pass() {
    for valid in [false, true] {
        let driver = Driver::running();
        let mut dte = Dte::from_quadwords([0, 0, !1, !0]);
        dte.host = Host::new().with_v(valid);
        driver.set_dte(device(), dte);
        assert_eq!(
            driver.msi(device(), MESSAGE, 0x41),
            Ok(Remapped::Unchanged),
            "{valid}"
        );
    }
}

#[test]
fn x2_iv_counts_without_v() {
    let driver = short(remapping(9));
    let mut dte = entry(remapping(9));
    dte.host = Host::new();
    driver.set_dte(device(), dte);
    set_short(&driver, 3, 0x0041_0201);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(2, 0x41)));
}

#[test]
fn x3_int_ctl_zero_drops_the_message() {
    let driver = short(remapping(9).with_int_ctl(0));
    assert!(driver.msi(device(), MESSAGE, 3).is_err());
    assert_eq!(codes(&driver), [0x8a00]);
}

#[test]
fn x4_int_ctl_one_forwards() {
    let driver = short(remapping(9).with_int_ctl(1));
    assert_eq!(driver.msi(device(), MESSAGE, 0x41), Ok(Remapped::Unchanged));
}

#[test]
fn x5_int_ctl_three_is_illegal() {
    let driver = short(remapping(9).with_int_ctl(3));
    assert!(driver.msi(device(), MESSAGE, 0x41).is_err());
    assert_eq!(driver.events(), [[0x0219, 0x1088_0000, 0xfee0_0000, 0]]);
}

#[test]
fn x6_bit_eight_of_the_data_belongs_to_the_index() {
    let driver = short(remapping(9));
    set_short(&driver, 0x1ff, 0x0041_0201);
    assert_eq!(driver.msi(device(), MESSAGE, 0x1ff), Ok(to(2, 0x41)));
}

#[test]
fn x7_an_index_past_the_table_is_a_fault_with_the_messages_address() {
    let driver = short(remapping(4));
    set_short(&driver, 16, 0x0041_0201);
    assert!(driver.msi(device(), MESSAGE | 0x1000, 16).is_err());
    assert_eq!(driver.events(), [[0x0219, 0x2008_0000, 0xfee0_1000, 0]]);
}

#[test]
fn x8_a_reserved_table_length_is_illegal() {
    for length in 12..16 {
        let driver = short(remapping(length));
        assert!(driver.msi(device(), MESSAGE, 0).is_err());
        assert_eq!(codes(&driver), [0x1008], "{length}");
    }
}

#[test]
fn x9_what_linux_leaves_in_reserved_entries_is_an_absent_entry() {
    let driver = short(remapping(9));
    set_short(&driver, 3, 0xffff_fffe);
    assert!(driver.msi(device(), MESSAGE, 3).is_err());
    assert_eq!(codes(&driver), [0x2008]);
    let driver = long(remapping(9));
    set_long(&driver, 3, 0, 0xff);
    assert!(driver.msi(device(), MESSAGE, 3).is_err());
    assert_eq!(codes(&driver), [0x2008]);
}

#[test]
fn x10_x2apic_destinations_have_32_bits() {
    let driver = long(remapping(9));
    driver.enable(Control::new().with_xt_en(true));
    set_long(&driver, 3, 0x0001_0201, 0x0100_0000_0000_0055);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(0x0100_0102, 0x55)));
}

#[test]
fn x11_without_x2apic_only_eight_bits_count() {
    let driver = long(remapping(9));
    set_long(&driver, 3, 0x0001_0201, 0x0100_0000_0000_0055);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(2, 0x55)));
}

#[test]
fn x12_large_tables_take_the_whole_index_when_the_address_says_so() {
    let driver = long(remapping(11));
    driver.enable(Control::new().with_num_int_remap_mode(1));
    set_long(&driver, 0x7ff, 0x0241, 0x55);
    let Ok(Remapped::To(found)) = driver.msi(device(), MESSAGE | 4, 0x7ff) else {
        panic!("remapped by the last entry");
    };
    assert_eq!((found.destination, found.logical, found.vector), (2, true, 0x55));
    assert!(
        driver.msi(device(), MESSAGE, 0x7ff).is_err(),
        "ExtINT, without the address bit"
    );
}

#[test]
fn x13_interrupts_that_no_table_remaps_pass_by_a_bit_each() {
    let kinds: [(u32, Interrupt); 3] = [
        (4, remapping(9).with_nmi_pass(true)),
        (5, remapping(9).with_init_pass(true)),
        (7, remapping(9).with_eint_pass(true)),
    ];
    for (mode, passing) in kinds {
        let data = mode << 8 | 2;
        assert_eq!(
            short(passing).msi(device(), MESSAGE, data),
            Ok(Remapped::Unchanged),
            "{mode}"
        );
        let driver = short(remapping(9));
        assert!(driver.msi(device(), MESSAGE, data).is_err(), "{mode}");
        assert_eq!(codes(&driver), [0x2008], "{mode}");
    }
}

#[test]
fn x13_smi_and_reserved_modes_vanish() {
    for mode in [2, 3, 6] {
        let driver = short(Interrupt::from_bits(
            0xc700_0000_0000_0000 | remapping(9).into_bits(),
        ));
        assert!(driver.msi(device(), MESSAGE, mode << 8).is_err(), "{mode}");
        assert_eq!(codes(&driver).len(), 0, "{mode}");
    }
}

#[test]
fn x14_the_ioapic_is_a_requester_like_any_other() {
    let driver = short(remapping(9));
    let ioapic = Bdf::new(0, 0x1f, 0).expect("valid");
    driver.set_dte(ioapic, entry(remapping(5)));
    set_short(&driver, 9, 0x0061_0001);
    let Ok(Remapped::To(found)) = driver.msi(ioapic, MESSAGE, 0xc009) else {
        panic!("remapped");
    };
    assert_eq!((found.vector, found.level, found.asserted), (0x61, true, true));
}

#[test]
fn x16_a_changed_entry_is_used_for_the_next_message() {
    let mut driver = short(remapping(9));
    set_short(&driver, 3, 0x0041_0201);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(2, 0x41)));
    set_short(&driver, 3, 0x0042_0301);
    driver.flush(&[crate::driver::command(5, 0x219, 0, 0, 0)]);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(3, 0x42)));
}

#[test]
fn x17_a_moved_table_is_used_once_the_entry_is_invalidated() {
    let mut driver = short(remapping(9));
    set_short(&driver, 3, 0x0041_0201);
    set_short(&driver, 0x400 + 3, 0x0042_0301);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(2, 0x41)));
    let moved = remapping(9).with_root((INTERRUPT_TABLE + 0x1000) >> 6);
    driver.set_dte(device(), entry(moved));
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(2, 0x41)));
    driver.flush(&[invalidate_device(device())]);
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(to(3, 0x42)));
}

#[test]
fn x18_faults_are_suppressed_by_device_and_by_entry() {
    // SupIOPF with an impossible type; without SupIOPF; and the same with IG.
    for (value, ig, expected) in [
        (0x0f, false, 0),
        (0x0d, false, 1),
        (0x0d, true, 0),
        (0x0f, true, 0),
    ] {
        let driver = short(remapping(9).with_ig(ig));
        set_short(&driver, 3, value);
        assert!(driver.msi(device(), MESSAGE, 3).is_err());
        assert_eq!(codes(&driver).len(), expected, "{value:#x} {ig}");
    }
}

#[test]
fn malformed_entries_are_reserved_bit_faults() {
    for value in [0x0100_0001, 0x8000_0001, 0x81, 0x09, 0x1d] {
        let driver = short(remapping(9));
        set_short(&driver, 3, value);
        assert!(driver.msi(device(), MESSAGE, 3).is_err());
        assert_eq!(codes(&driver), [0x2098], "{value:#x}");
    }
}

#[test]
fn malformed_long_entries_are_reserved_bit_faults() {
    let fields = [(0x81, 0), (0x09, 0), (0x1d, 0)];
    let lower = (32..64).map(|bit| (1 | 1 << bit, 0));
    let upper = (8..56).map(|bit| (1, 1 << bit));
    for (low, high) in fields.into_iter().chain(lower).chain(upper) {
        for x2apic in [false, true] {
            let driver = long(remapping(9));
            driver.enable(Control::new().with_xt_en(x2apic));
            set_long(&driver, 3, low, 0x55 | high);
            assert!(driver.msi(device(), MESSAGE, 3).is_err());
            assert_eq!(codes(&driver), [0x2098], "{high:#x} {low:#x}");
        }
    }
}

#[test]
fn what_linux_writes_into_long_entries_is_well_formed() {
    // Destinations of the three widths that its three drivers of local APICs have, physical and logical.
    for (low, high, destination, logical) in [
        (0x0000_0201, 0x31, 2, false),
        (0x0000_0341, 0x31, 3, true),
        (0x00ff_ff01, 0x31, 0xffff, false),
        (0xffff_ff41, 0xff00_0000_0000_00ef, u32::MAX, true),
    ] {
        let driver = long(remapping(9));
        driver.enable(Control::new().with_xt_en(true));
        set_long(&driver, 3, low, high);
        let Ok(Remapped::To(found)) = driver.msi(device(), MESSAGE, 3) else {
            panic!("{high:#x} {low:#x}");
        };
        assert_eq!((found.destination, found.logical), (destination, logical));
        assert_eq!(u64::from(found.vector), high & 0xff);
    }
}

#[test]
fn reserved_bits_of_the_interrupt_half_are_illegal() {
    for bit in [52, 53] {
        let driver = short(Interrupt::from_bits(remapping(9).into_bits() | 1 << bit));
        assert!(driver.msi(device(), MESSAGE, 3).is_err());
        assert_eq!(codes(&driver), [0x1088], "{bit}");
    }
}

/// An entry that remaps and whose third and fourth quadword have these bits as well.
fn remapping_with(third: u64, fourth: u64) -> Dte {
    let mut words = entry(remapping(9)).into_quadwords();
    words[2] |= third;
    words[3] |= fourth;
    Dte::from_quadwords(words)
}

#[test]
fn reserved_bits_of_the_last_quadword_are_illegal_where_interrupts_are_remapped() {
    for bit in (0..15).chain(48..54) {
        let driver = short(remapping(9));
        set_short(&driver, 3, 0x0041_0201);
        driver.set_dte(device(), remapping_with(0, 1 << bit));
        assert!(driver.msi(device(), MESSAGE, 3).is_err());
        let illegal = [0x0219, 0x1088_0000, 0xfee0_0000, 0];
        assert_eq!(driver.events(), [illegal], "{bit}");
        // They are nobody's business where the entry says nothing about interrupts.
        let driver = short(remapping(9));
        let mut dte = remapping_with(0, 1 << bit);
        dte.interrupt.set_iv(false);
        driver.set_dte(device(), dte);
        assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(Remapped::Unchanged), "{bit}");
    }
}

#[test]
fn bits_of_the_interrupt_half_that_mean_something_else_do_no_harm() {
    // IG, the passes, HPTMode and the guest's paging mode; an interrupt of another kind, and DMA, are by other tests.
    let third = [5, 54, 55, 56, 57, 58, 59, 62, 63].map(|bit| (1 << bit, 0));
    // VImuEn, GuestID, GuestDeviceID, AttrV, Mode0FC and SnoopAttr.
    let fourth = (15..48).chain(54..64).map(|bit| (0, 1 << bit));
    for (third, fourth) in third.into_iter().chain(fourth) {
        let driver = short(remapping(9));
        set_short(&driver, 3, 0x0041_0201);
        driver.set_dte(device(), remapping_with(third, fourth));
        let found = driver.msi(device(), MESSAGE, 3);
        assert_eq!(found, Ok(to(2, 0x41)), "{third:#x} {fourth:#x}");
    }
}

#[test]
fn a_reserved_bit_of_one_half_of_an_entry_is_no_matter_of_the_other() {
    let mut words = entry(remapping(9)).into_quadwords();
    words[0] |= 3 << 61;
    for (index, bit) in [
        (0, 2),
        (0, 6),
        (0, 63),
        (2, 52),
        (2, 53),
        (3, 0),
        (3, 14),
        (3, 48),
    ] {
        let driver = short(remapping(9));
        set_short(&driver, 3, 0x0041_0201);
        let mut words = words;
        words[index] |= 1 << bit;
        driver.set_dte(device(), Dte::from_quadwords(words));
        let concerns_memory = index == 0;
        let request = crate::driver::read(device(), 0x1000);
        assert_eq!(
            driver.target(&request).is_none(),
            concerns_memory,
            "{index} {bit}"
        );
        let remapped = driver.msi(device(), MESSAGE, 3);
        assert_eq!(remapped.is_ok(), concerns_memory, "{index} {bit}");
    }
}

#[test]
fn an_unreadable_table_is_a_hardware_error_with_the_entrys_address() {
    let driver = short(remapping(9).with_root(HOLE >> 6));
    assert!(driver.msi(device(), MESSAGE, 3).is_err());
    assert_eq!(driver.events(), [[0x0219, 0x4408_0000, 0x8000_000c, 0]]);
    let driver = long(remapping(9).with_root(HOLE >> 6));
    assert!(driver.msi(device(), MESSAGE, 3).is_err());
    assert_eq!(driver.events(), [[0x0219, 0x4408_0000, 0x8000_0030, 0]]);
}

#[test]
fn a_device_past_the_table_loses_its_interrupts() {
    let driver = Driver::running();
    driver.write(crate::driver::reg::DEVICE_TABLE, crate::driver::DEVICE_TABLE);
    assert!(driver.msi(device(), MESSAGE, 3).is_err());
    assert_eq!(driver.events(), [[0x0219, 0x2008_0000, 0xfee0_0000, 0]]);
}

#[test]
fn what_is_no_interrupt_is_a_memory_write() {
    let driver = short(remapping(9));
    for address in [0, 0xfef0_0000, 0x1_fee0_0000] {
        assert_eq!(
            driver.msi(device(), address, 3),
            Ok(Remapped::MemoryWrite),
            "{address:#x}"
        );
    }
}

#[test]
fn a_unit_that_is_off_passes_messages() {
    let driver = short(remapping(9).with_int_ctl(0));
    driver.disable(Control::new().with_iommu_en(true));
    assert_eq!(driver.msi(device(), MESSAGE, 3), Ok(Remapped::Unchanged));
}
