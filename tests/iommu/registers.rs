//! R: registers.

use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::registers::MsiMirror;
use ravelin::iommu::amd::spec::registers::Control;

use crate::driver::{
    DEVICE_TABLE, Driver, FLAG, LOG, RING, WIDTHS, device, host_dte, reg, ring_base, wait, write,
};

#[test]
fn r1_reset_values_are_those_of_the_manual() {
    let driver = Driver::at_reset();
    let offered = Features::offer(Wanted::EVERYTHING);
    for offset in (0..0x4000).step_by(8) {
        let expected = match offset {
            reg::COMMAND_BASE | reg::EVENT_BASE | reg::PPR_BASE => 0x0800_0000_0000_0000,
            reg::CONTROL => 0x400,
            reg::EFR => offered.efr.into_bits(),
            reg::EFR2 => offered.efr2.into_bits(),
            reg::MISC => u64::from(offered.misc0().into_bits()),
            _ => 0,
        };
        assert_eq!(driver.read(offset), expected, "{offset:#x}");
        let halves = [0, 4].map(|half| u64::from(driver.read_dword(offset + half)));
        assert_eq!(halves[0] | halves[1] << 32, expected, "{offset:#x} by halves");
    }
}

#[test]
fn r2_feature_registers_do_not_change() {
    for width in WIDTHS {
        let mut driver = Driver::at_reset();
        driver.width = width;
        let before = (driver.read(reg::EFR), driver.read(reg::EFR2));
        driver.write(reg::EFR, u64::MAX);
        driver.write(reg::EFR2, u64::MAX);
        assert_eq!(
            (driver.read(reg::EFR), driver.read(reg::EFR2)),
            before,
            "{width:?}"
        );
    }
}

#[test]
fn r3_base_registers_take_halves_in_either_order() {
    for width in WIDTHS {
        let mut driver = Driver::at_reset();
        driver.width = width;
        for offset in [reg::COMMAND_BASE, reg::EVENT_BASE, reg::PPR_BASE] {
            driver.write(offset, 0x0912_3456_789a_b000);
            assert_eq!(
                driver.read(offset),
                0x0902_3456_789a_b000,
                "{width:?} {offset:#x}"
            );
        }
        driver.write(reg::DEVICE_TABLE, 0x0001_2345_6789_a1ff);
        assert_eq!(driver.read(reg::DEVICE_TABLE), 0x0001_2345_6789_a1ff, "{width:?}");
        assert_eq!(driver.status(), 0, "{width:?}");
    }
}

#[test]
fn r4_writing_the_upper_half_of_status_clears_nothing() {
    let driver = Driver::running();
    let _ = driver.dma_write(device(), 0, &[1]);
    driver.set_dte(device(), host_dte(0, 0, 0));
    driver.submit(&[0]);
    assert_eq!(driver.status() & 2, 2);
    driver.write_dword(reg::STATUS + 4, u32::MAX);
    assert_eq!(driver.status() & 2, 2);
}

#[test]
fn r5_only_the_written_ones_of_status_are_cleared() {
    for width in WIDTHS {
        let mut driver = Driver::running();
        driver.width = width;
        driver.submit(&[crate::driver::WAIT_INTERRUPT]);
        driver.submit(&[0]);
        assert_eq!(
            driver.status(),
            0x0e,
            "illegal command logged, wait signalled, log runs"
        );
        driver.write(reg::STATUS, 2);
        assert_eq!(driver.status(), 0x0c, "{width:?}");
    }
}

#[test]
fn r6_control_bits_without_a_feature_read_zero() {
    for width in WIDTHS {
        let mut driver = Driver::with(Wanted {
            xt: false,
            guest_tables: false,
            host_tracking: false,
            ..Wanted::DEFAULT
        });
        driver.width = width;
        driver.write(reg::CONTROL, Control::new().with_irt_cache_dis(true).into_bits());
        assert!(!driver.control().irt_cache_dis(), "{width:?}");
        driver.write(reg::CONTROL, !1);
        assert_eq!(driver.read(reg::CONTROL), 0x2_1ffe, "{width:?}");
    }
}

#[test]
fn r7_the_event_log_can_be_placed_while_the_unit_is_on() {
    for width in WIDTHS {
        let mut driver = Driver::at_reset();
        driver.width = width;
        driver.write(reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff);
        driver.enable(Control::new().with_iommu_en(true));
        driver.write(reg::EVENT_BASE, ring_base(LOG, 8));
        driver.enable(Control::new().with_event_log_en(true));
        let mut blocked = host_dte(0, 0, 0);
        blocked.host.set_tv(false);
        driver.set_dte(device(), blocked);
        let _ = driver.target(&write(device(), 0x1000));
        assert_eq!(driver.events().len(), 1, "{width:?}");
        assert_eq!(driver.dwords(LOG)[0], 0x0219, "{width:?}");
    }
}

#[test]
fn r7_variant_the_event_log_can_be_moved_with_an_interrupt_pending() {
    let driver = Driver::running();
    driver.submit(&[0]);
    assert_eq!(driver.status() & 2, 2);
    driver.disable(Control::new().with_event_log_en(true));
    driver.write(reg::EVENT_BASE, ring_base(LOG + 0x1000, 8));
    assert_eq!(driver.read(reg::EVENT_BASE), ring_base(LOG + 0x1000, 8));
    assert_eq!(driver.read(reg::EVENT_TAIL), 0);
}

#[test]
fn r8_a_new_base_resets_the_pointers_of_a_stopped_ring() {
    for width in WIDTHS {
        let mut driver = Driver::at_reset();
        driver.width = width;
        driver.write(reg::COMMAND_HEAD, 0x40);
        driver.write(reg::COMMAND_TAIL, 0x80);
        driver.write(reg::COMMAND_BASE, ring_base(RING, 9));
        let pointers = (driver.read(reg::COMMAND_HEAD), driver.read(reg::COMMAND_TAIL));
        assert_eq!(pointers, (0, 0), "{width:?}");
    }
}

#[test]
fn r9_the_head_of_a_running_ring_does_not_take_writes() {
    for width in WIDTHS {
        let mut driver = Driver::running();
        driver.width = width;
        driver.flush(&[]);
        driver.write(reg::COMMAND_HEAD, 0);
        assert_eq!(driver.read(reg::COMMAND_HEAD), 0x10, "{width:?}");
    }
}

#[test]
fn r9_variant_the_base_of_a_running_ring_does_not_take_writes() {
    for width in WIDTHS {
        let mut driver = Driver::running();
        driver.width = width;
        driver.write(reg::COMMAND_BASE, ring_base(0x9_0000, 8));
        driver.write(reg::EVENT_BASE, ring_base(0x9_0000, 8));
        assert_eq!(driver.read(reg::COMMAND_BASE), ring_base(RING, 9), "{width:?}");
        assert_eq!(driver.read(reg::EVENT_BASE), ring_base(LOG, 8), "{width:?}");
    }
}

#[test]
fn r10_a_ring_of_reserved_length_does_not_run() {
    for (length, width) in (0..8).flat_map(|length| WIDTHS.map(|width| (length, width))) {
        let mut driver = Driver::at_reset();
        driver.width = width;
        driver.write(reg::COMMAND_BASE, ring_base(RING, length));
        driver.enable(Control::new().with_iommu_en(true).with_cmd_buf_en(true));
        driver
            .ram
            .write(ravelin::platform::addr::Gpa(RING), &wait(FLAG, 7).to_le_bytes())
            .expect("RAM");
        driver.write(reg::COMMAND_TAIL, 0x10);
        assert_eq!(driver.status() & 0x10, 0, "{length} {width:?}");
        assert_eq!(driver.get(FLAG), 0, "{length} {width:?}");
    }
}

#[test]
fn r12_the_capability_header_says_what_the_unit_does() {
    let header = |wanted| Features::offer(wanted).header.into_bits() & 0xffff_0000;
    assert_eq!(header(Wanted::DEFAULT), 0x180b_0000);
    assert_eq!(header(Wanted::EVERYTHING), 0x190b_0000);
    let shadowing = Wanted {
        np_cache: true,
        ..Wanted::DEFAULT
    };
    assert_eq!(header(shadowing), 0x1c0b_0000);
    let gats = Features::offer(Wanted::EVERYTHING).efr.gats();
    assert!(gats < 2, "values from 2 on are reserved");
}

#[test]
fn r13_one_write_that_sets_everything_starts_everything() {
    for width in WIDTHS {
        let mut driver = Driver::at_reset();
        driver.write(reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff);
        driver.write(reg::COMMAND_BASE, ring_base(RING, 9));
        driver.write(reg::EVENT_BASE, ring_base(LOG, 8));
        driver.width = width;
        driver.write(reg::CONTROL, 0x100d);
        assert_eq!(driver.status(), 0x18, "{width:?}");
        driver.flush(&[crate::driver::INVALIDATE_ALL]);
    }
}

#[test]
fn every_offset_reads_and_takes_writes_of_every_width() {
    for wanted in [Wanted::DEFAULT, Wanted::EVERYTHING] {
        let driver = Driver::with(wanted);
        for offset in 0..0x4010 {
            for width in [1, 2, 4, 8] {
                let mut data = vec![0; width];
                driver.unit.mmio_read(offset, &mut data);
                data.fill(0xff);
                driver.carry_out(driver.unit.mmio_write(offset, &data));
            }
        }
        assert_eq!(driver.read(reg::EFR), Features::offer(wanted).efr.into_bits());
    }
}

#[test]
fn msi_mirror_shows_and_programs_the_capability_only_when_offered() {
    let msi = MsiMirror {
        header: 0x0080_0005,
        address: 0xfee0_0000,
        data: 0x41,
    };
    let driver = Driver::with(Wanted::DEFAULT);
    driver.unit.mirror_msi(msi);
    assert_eq!(driver.read_dword(0x158), 0x0080_0005);
    assert_eq!(driver.read_dword(0x15c), 0xfee0_0000);
    assert_eq!(driver.read_dword(0x160), 0);
    assert_eq!(driver.read_dword(0x164), 0x41);
    let effects = driver.unit.mmio_write(0x164, &0x42_u32.to_le_bytes());
    assert_eq!(effects.program_msi, Some(MsiMirror { data: 0x42, ..msi }));
    let without = Driver::with(Wanted {
        xt: false,
        ..Wanted::DEFAULT
    });
    without.unit.mirror_msi(msi);
    assert_eq!((without.read(0x158), without.read(0x160)), (0, 0));
    assert_eq!(without.unit.mmio_write(0x164, &[1; 4]).program_msi, None);
}

#[test]
fn reset_stops_everything_and_forgets_everything() {
    let mut driver = Driver::running();
    let root = driver.attach(device(), 1);
    driver.map(root, 4, 0x1000, 1, crate::driver::pte(0x5000));
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x5000));
    driver.unit.reset();
    assert_eq!(driver.read(reg::CONTROL), 0x400);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x1000));
    let mut driver = driver.started();
    driver.map(root, 4, 0x1000, 1, crate::driver::pte(0x6000));
    assert_eq!(driver.target(&write(device(), 0x1000)), Some(0x6000));
}
