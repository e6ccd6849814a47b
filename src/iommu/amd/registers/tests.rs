//! Registers one by one: access classes, widths, locks and effects.

use super::*;
use crate::iommu::amd::features::Wanted;

fn registers() -> Registers {
    Registers::new(Features::offer(Wanted::EVERYTHING))
}

fn write(registers: &mut Registers, reg: Reg, value: u64) -> Effect {
    registers.write(reg, LaneWrite::new(0, &value.to_le_bytes()).expect("a quadword"))
}

/// From and to which bytes a quadword is written, access by access: as a whole, and by halves in either order.
const WIDTHS: [&[(usize, usize)]; 3] = [&[(0, 8)], &[(0, 4), (4, 8)], &[(4, 8), (0, 4)]];

fn write_by(width: &[(usize, usize)], registers: &mut Registers, reg: Reg, value: u64) {
    for (from, to) in width {
        let lanes = LaneWrite::new(*from, &value.to_le_bytes()[*from..*to]).expect("lanes of a quadword");
        let _ = registers.write(reg, lanes);
    }
}

fn enable(registers: &mut Registers, control: Control) {
    let value = registers.control().into_bits() | control.into_bits();
    let _ = write(registers, Reg::Control, value);
}

#[test]
fn what_is_not_writable_reads_back_as_zero() {
    let masks = [
        (Reg::DeviceTableBase, 0x000f_ffff_ffff_f1ff),
        (Reg::CommandBase, 0x0f0f_ffff_ffff_f000),
        (Reg::EventBase, 0x0f0f_ffff_ffff_f000),
        (Reg::PprBase, 0x0f0f_ffff_ffff_f000),
        (Reg::ExclusionBase, 0x000f_ffff_ffff_f003),
        (Reg::ExclusionLimit, 0x000f_ffff_ffff_f000),
        (Reg::XtEvent, 0xff00_01ff_ffff_ff04),
        (Reg::XtPpr, 0xff00_01ff_ffff_ff04),
        (Reg::XtGa, 0xff00_01ff_ffff_ff04),
        (Reg::CommandHead, 0x7_fff0),
        (Reg::CommandTail, 0x7_fff0),
        (Reg::EventHead, 0x7_fff0),
        (Reg::EventTail, 0x7_fff0),
        (Reg::PprHead, 0x7_fff0),
        (Reg::PprTail, 0x7_fff0),
        (Reg::Status, 0),
    ];
    for width in WIDTHS {
        let mut registers = registers();
        for (reg, mask) in masks {
            write_by(width, &mut registers, reg, u64::MAX);
            assert_eq!(registers.read(reg), mask, "{reg:?} {width:?}");
        }
        let writable = registers.features.control_writable();
        let all = writable.with_dev_tbl_seg_en(3).into_bits();
        write_by(width, &mut registers, Reg::Control, all | !writable.into_bits());
        assert_eq!(registers.read(Reg::Control), all, "{width:?}");
    }
}

#[test]
fn a_half_that_is_written_leaves_the_other_as_it_was() {
    let both = [
        Reg::DeviceTableBase,
        Reg::CommandBase,
        Reg::EventBase,
        Reg::PprBase,
        Reg::ExclusionBase,
        Reg::ExclusionLimit,
        Reg::XtEvent,
        Reg::XtPpr,
        Reg::XtGa,
    ];
    for reg in both {
        let mut registers = registers();
        let before = registers.read(reg);
        write_by(&[(0, 4)], &mut registers, reg, u64::MAX);
        let lower = registers.read(reg);
        assert_ne!(lower & 0xffff_ffff, before & 0xffff_ffff, "{reg:?}");
        assert_eq!(lower >> 32, before >> 32, "{reg:?}");
        write_by(&[(4, 8)], &mut registers, reg, 0);
        assert_eq!(registers.read(reg), lower & 0xffff_ffff, "{reg:?}");
    }
}

#[test]
fn what_is_cleared_by_ones_is_cleared_by_ones_of_either_half_alone() {
    let latched = Status::from_bits(Status::W1C);
    for width in WIDTHS {
        let mut registers = registers();
        registers.latch(latched);
        write_by(width, &mut registers, Reg::Status, 2);
        assert_eq!(registers.read(Reg::Status), Status::W1C & !2, "{width:?}");
        write_by(&[(4, 8)], &mut registers, Reg::Status, u64::MAX);
        assert_eq!(registers.read(Reg::Status), Status::W1C & !2, "{width:?}");
        write_by(width, &mut registers, Reg::Status, u64::MAX);
        assert_eq!(registers.read(Reg::Status), 0, "{width:?}");
    }
}

#[test]
fn feature_registers_never_change() {
    let mut registers = registers();
    let before = (registers.read(Reg::Efr), registers.read(Reg::Efr2));
    assert_eq!(write(&mut registers, Reg::Efr, u64::MAX), Effect::None);
    assert_eq!(write(&mut registers, Reg::Efr2, 0), Effect::None);
    assert_eq!((registers.read(Reg::Efr), registers.read(Reg::Efr2)), before);
}

#[test]
fn more_segments_than_offered_leave_control_as_it_was() {
    let mut registers = registers();
    let before = registers.control();
    let too_many = before.with_iommu_en(true).with_dev_tbl_seg_en(4);
    assert_eq!(
        write(&mut registers, Reg::Control, too_many.into_bits()),
        Effect::None
    );
    assert_eq!(registers.control(), before);
}

#[test]
fn a_segment_takes_no_more_pages_than_its_share() {
    for width in WIDTHS {
        a_segment_takes_no_more_pages_than_its_share_by(width);
    }
}

fn a_segment_takes_no_more_pages_than_its_share_by(width: &[(usize, usize)]) {
    let mut registers = registers();
    for (offset, size) in [
        (0x100, 0xff),
        (0x108, 0x7f),
        (0x110, 0x7f),
        (0x118, 0x3f),
        (0x130, 0x3f),
    ] {
        let reg = Reg::at(offset).expect("a segment");
        write_by(width, &mut registers, reg, u64::MAX);
        assert_eq!(registers.read(reg), 0x000f_ffff_ffff_f000 | size, "{offset:#x}");
    }
}

#[test]
fn segments_that_are_not_offered_do_not_exist() {
    let mut registers = Registers::new(Features::offer(Wanted {
        segments: 1,
        ..Wanted::EVERYTHING
    }));
    let beyond = Reg::at(0x108).expect("segment 2");
    let _ = write(&mut registers, beyond, u64::MAX);
    assert_eq!(registers.read(beyond), 0);
}

#[test]
fn run_bits_follow_their_enables() {
    let mut registers = registers();
    enable(
        &mut registers,
        Control::new().with_cmd_buf_en(true).with_event_log_en(true),
    );
    assert_eq!(registers.status(), Status::new());
    enable(&mut registers, Control::new().with_iommu_en(true));
    assert!(registers.status().cmd_buf_run() && registers.status().event_log_run());
    let off = registers.control().with_iommu_en(false);
    let _ = write(&mut registers, Reg::Control, off.into_bits());
    assert_eq!(registers.status(), Status::new());
}

#[test]
fn a_reserved_length_never_runs() {
    let mut registers = registers();
    let _ = write(&mut registers, Reg::CommandBase, 7 << 56);
    enable(
        &mut registers,
        Control::new().with_cmd_buf_en(true).with_iommu_en(true),
    );
    assert!(!registers.status().cmd_buf_run());
}

#[test]
fn an_error_stop_lasts_until_the_buffer_is_switched_on_anew() {
    let mut registers = registers();
    enable(
        &mut registers,
        Control::new().with_cmd_buf_en(true).with_iommu_en(true),
    );
    registers.stop_commands();
    enable(&mut registers, Control::new().with_cmd_buf_en(true));
    assert!(!registers.command_runs());
    let off = registers.control().with_cmd_buf_en(false);
    let _ = write(&mut registers, Reg::Control, off.into_bits());
    enable(&mut registers, Control::new().with_cmd_buf_en(true));
    assert!(registers.command_runs());
}

#[test]
fn an_interrupt_goes_out_once_until_its_bit_is_cleared() {
    let mut registers = registers();
    enable(&mut registers, Control::new().with_event_int_en(true));
    registers.latch(Status::new().with_event_log_int(true));
    assert_eq!(
        registers.take_interrupts().event,
        Some(Interrupt::Msi { number: 0 })
    );
    registers.latch(Status::new().with_event_log_int(true));
    assert_eq!(registers.take_interrupts(), Interrupts::default());
    let _ = write(&mut registers, Reg::Status, 2);
    assert_eq!(registers.take_interrupts(), Interrupts::default());
    registers.latch(Status::new().with_event_log_int(true));
    assert_eq!(
        registers.take_interrupts().event,
        Some(Interrupt::Msi { number: 0 })
    );
}

#[test]
fn an_interrupt_without_vector_waits_for_one() {
    let mut registers = registers();
    enable(
        &mut registers,
        Control::new().with_event_int_en(true).with_int_cap_xt_en(true),
    );
    registers.latch(Status::new().with_event_log_int(true));
    assert_eq!(registers.take_interrupts(), Interrupts::default());
    let _ = write(&mut registers, Reg::XtEvent, 0x0200_0055_0001_0304);
    let due = Interrupt::X2apic {
        destination: 0x0200_0103,
        logical: true,
        vector: 0x55,
        arbitrated: false,
    };
    assert_eq!(registers.take_interrupts().event, Some(due));
    assert_eq!(registers.take_interrupts(), Interrupts::default());
}

#[test]
fn the_msi_mirror_takes_halves_and_reports_them() {
    let mut registers = registers();
    registers.mirror_msi(MsiMirror {
        header: 0x0080_0005,
        address: 0,
        data: 0,
    });
    let half = |bytes: u32, from| LaneWrite::new(from, &bytes.to_le_bytes()).expect("a dword");
    let _ = registers.write(Reg::MsiHeaderAddress, half(u32::MAX, 0));
    let _ = registers.write(Reg::MsiHeaderAddress, half(0xfee0_1003, 4));
    let _ = registers.write(Reg::MsiAddressData, half(0x12, 0));
    let effect = registers.write(Reg::MsiAddressData, half(0xffff_0045, 4));
    let programmed = MsiMirror {
        header: 0x0081_0005,
        address: 0x12_fee0_1000,
        data: 0x45,
    };
    assert_eq!(effect, Effect::ProgramMsi(programmed));
    assert_eq!(registers.read(Reg::MsiHeaderAddress), 0xfee0_1000_0081_0005);
    assert_eq!(registers.read(Reg::MsiAddressData), 0x0000_0045_0000_0012);
}

#[test]
fn reset_keeps_nothing_a_guest_wrote() {
    let mut registers = registers();
    for offset in (0..0x3000).step_by(8) {
        let _ = Reg::at(offset).map(|reg| write(&mut registers, reg, u64::MAX));
    }
    registers.reset();
    let fresh = self::registers();
    for offset in (0..0x3000)
        .step_by(8)
        .filter(|offset| !matches!(offset, 0x158 | 0x160))
    {
        let read = |registers: &Registers| Reg::at(offset).map(|reg| registers.read(reg));
        assert_eq!(read(&registers), read(&fresh), "{offset:#x}");
    }
}

#[test]
fn a_ring_that_somebody_else_works_on_moves_while_it_runs() {
    let mut registers = Registers::new(Features::offer(Wanted::DEFAULT));
    let on = Control::new().with_iommu_en(true).with_cmd_buf_en(true);
    let lanes = |value: u64| LaneWrite::new(0, &value.to_le_bytes()).expect("a quadword");
    enable(&mut registers, on);
    assert!(registers.command_runs());
    let _ = write(&mut registers, Reg::CommandBase, 0x5000 | 9 << 56);
    assert_eq!(registers.read(Reg::CommandBase), 8 << 56);
    registers.move_ring(Reg::CommandBase, lanes(0x5000 | 9 << 56));
    assert_eq!(registers.read(Reg::CommandBase), 0x5000 | 9 << 56);
    // Not offered, and no ring.
    registers.move_ring(Reg::PprBase, lanes(0x5000 | 9 << 56));
    registers.move_ring(Reg::DeviceTableBase, lanes(0x5000));
    assert_eq!(registers.read(Reg::PprBase), 8 << 56);
    assert_eq!(registers.read(Reg::DeviceTableBase), 0);
}
