//! Negotiation and queue set-up, by honest drivers and by others.

use proptest::prelude::*;

use super::*;

const OFFERED: Features = Features::VERSION_1
    .union(Features::EVENT_IDX)
    .union(Features::bit(5));

fn registers() -> Registers {
    Registers::new(OFFERED, &[256, 128], 3)
}

fn read(registers: &Registers, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    registers.read(offset, &mut data[..len], Live::default());
    u64::from_le_bytes(data)
}

fn write(registers: &mut Registers, offset: u64, len: usize, value: u64) -> Effect {
    registers.write(offset, &value.to_le_bytes()[..len])
}

fn status(registers: &mut Registers, value: u8) -> Effect {
    let effect = write(registers, 0x14, 1, value.into());
    if let Effect::CheckFeatures(chosen) = effect {
        registers.accept_features(chosen);
    }
    effect
}

fn choose(registers: &mut Registers, features: Features) {
    for half in [0, 1] {
        assert_eq!(write(registers, 0x08, 4, half), Effect::None);
        let bits = features.bits() >> (32 * half) & 0xffff_ffff;
        assert_eq!(write(registers, 0x0c, 4, bits), Effect::None);
    }
}

/// Up to FEATURES_OK, with one queue set up.
fn negotiated() -> Registers {
    let mut registers = registers();
    let _ = status(&mut registers, 1);
    let _ = status(&mut registers, 3);
    choose(&mut registers, OFFERED);
    let _ = status(&mut registers, 11);
    assert_eq!(read(&registers, 0x14, 1), 11);
    for (offset, len, value) in [
        (0x16, 2, 1),
        (0x18, 2, 64),
        (0x20, 8, 0x1_2345_6780),
        (0x28, 8, 0x2_2345_6780),
        (0x30, 8, 0x3_2345_6780),
        (0x1c, 2, 1),
    ] {
        let _ = write(&mut registers, offset, len, value);
    }
    registers
}

/// Everything a queue has, as the guest reads it.
fn queue_fields(registers: &Registers) -> Vec<u64> {
    [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
        .map(|(offset, len)| read(registers, offset, len))
        .to_vec()
}

#[test]
fn fields_cover_the_structure_without_gaps() {
    let mut end = 0;
    for (offset, len, field) in FIELDS {
        assert_eq!(offset, end, "{field:?}");
        end += len as u64;
    }
    assert_eq!(end, LEN);
}

#[test]
fn features_are_shown_in_halves_and_nothing_beyond() {
    let mut registers = registers();
    for (select, expected) in [
        (0, 1 << 29 | 1 << 5),
        (1, 1),
        (2, 0),
        (0xffff, 0),
        (0xffff_ffff, 0),
    ] {
        let _ = write(&mut registers, 0x00, 4, select);
        assert_eq!(read(&registers, 0x04, 4), expected, "{select:#x}");
        let _ = write(&mut registers, 0x08, 4, select);
        let _ = write(&mut registers, 0x0c, 4, 0);
    }
}

#[test]
fn a_driver_gets_through_the_initialization() {
    let mut registers = negotiated();
    assert_eq!(registers.features(), OFFERED);
    assert!(!registers.running());
    assert_eq!(status(&mut registers, 15), Effect::Activate);
    assert!(registers.running());
    let layout = QueueLayout {
        size: 64,
        descriptors: Iova(0x1_2345_6780),
        available: Iova(0x2_2345_6780),
        used: Iova(0x3_2345_6780),
    };
    assert_eq!(registers.layouts(), [None, Some(layout)]);
}

#[test]
fn features_that_are_not_offered_are_refused() {
    for wrong in [
        OFFERED | Features::bit(34),
        OFFERED | Features::bit(63),
        OFFERED - Features::VERSION_1,
    ] {
        let mut registers = registers();
        let _ = status(&mut registers, 3);
        choose(&mut registers, wrong);
        assert_eq!(status(&mut registers, 11), Effect::None);
        assert_eq!(read(&registers, 0x14, 1), 3, "{wrong:?}");
    }
}

#[test]
fn behind_an_iommu_a_driver_must_use_platform_addresses() {
    let mut registers = Registers::new(OFFERED | Features::ACCESS_PLATFORM, &[8], 2);
    let _ = status(&mut registers, 3);
    choose(&mut registers, OFFERED);
    let _ = status(&mut registers, 11);
    assert_eq!(read(&registers, 0x14, 1), 3);
    choose(&mut registers, OFFERED | Features::ACCESS_PLATFORM);
    let _ = status(&mut registers, 11);
    assert_eq!(read(&registers, 0x14, 1), 11);
}

#[test]
fn features_changed_during_the_check_are_not_accepted() {
    let mut registers = registers();
    let _ = status(&mut registers, 3);
    choose(&mut registers, OFFERED);
    let effect = write(&mut registers, 0x14, 1, 11);
    assert_eq!(effect, Effect::CheckFeatures(OFFERED));
    choose(&mut registers, Features::all());
    registers.accept_features(OFFERED);
    assert_eq!(read(&registers, 0x14, 1), 3);
}

#[test]
fn features_are_frozen_once_agreed() {
    let mut registers = negotiated();
    choose(&mut registers, Features::all());
    assert_eq!(registers.features(), OFFERED);
}

#[test]
fn a_driver_cannot_start_before_features_are_agreed() {
    let mut registers = registers();
    assert_eq!(status(&mut registers, 7), Effect::None);
    assert_eq!(read(&registers, 0x14, 1), 3);
    // All at once is no agreement either: the driver has not read the status back.
    choose(&mut registers, OFFERED);
    let _ = status(&mut registers, 15);
    assert!(!registers.running());
}

#[test]
fn status_bits_go_by_reset_only_and_the_broken_bit_is_the_devices() {
    let mut registers = negotiated();
    let _ = status(&mut registers, 0x80 | 0x40 | 1);
    assert_eq!(read(&registers, 0x14, 1), 0x80 | 11);
    let live = Live {
        needs_reset: true,
        generation: 7,
    };
    let mut data = [0; 2];
    registers.read(0x14, &mut data, live);
    assert_eq!(data, [0x80 | 0x40 | 11, 7]);
}

#[test]
fn the_status_reads_as_before_until_the_reset_is_finished() {
    let mut registers = negotiated();
    let _ = status(&mut registers, 15);
    assert_eq!(status(&mut registers, 0), Effect::Reset);
    assert!(registers.resetting() && !registers.running());
    assert_eq!(read(&registers, 0x14, 1), 15);
    assert_eq!(status(&mut registers, 15), Effect::None, "ignored meanwhile");
    registers.finish_reset();
    assert_eq!(read(&registers, 0x14, 1), 0);
    assert_eq!(registers.layouts(), [None, None]);
    assert_eq!(registers.features(), Features::empty());
}

// Firecracker CVE-2026-5747: queue registers were writable after activation.
#[test]
fn queue_fields_are_frozen_while_the_driver_runs() {
    let mut registers = negotiated();
    let _ = write(&mut registers, 0x16, 2, 0);
    let _ = status(&mut registers, 15);
    for queue in [0, 1] {
        let _ = write(&mut registers, 0x16, 2, queue);
        let before = queue_fields(&registers);
        for (offset, len) in [
            (0x18, 2),
            (0x1a, 2),
            (0x1c, 2),
            (0x20, 8),
            (0x28, 8),
            (0x30, 8),
            (0x20, 4),
            (0x24, 4),
            (0x2c, 4),
            (0x34, 4),
        ] {
            for poison in [0, 1, 2, 0x5a5a_5a5a_5a5a_5a5a, u64::MAX] {
                assert_eq!(write(&mut registers, offset, len, poison), Effect::None);
            }
        }
        assert_eq!(queue_fields(&registers), before);
    }
}

#[test]
fn an_enabled_queue_is_frozen_and_cannot_be_disabled() {
    let mut registers = negotiated();
    let before = registers.layouts();
    for (offset, len, value) in [(0x1c, 2, 0), (0x18, 2, 8), (0x20, 8, 0)] {
        let _ = write(&mut registers, offset, len, value);
    }
    assert_eq!(registers.layouts(), before);
}

// QEMU CVE-2026-50626: a size above the device's maximum was accepted.
#[test]
fn a_queue_size_that_is_none_is_ignored() {
    let mut registers = registers();
    for size in [0, 3, 96, 257, 512, 0x8000, 0xffff] {
        let _ = write(&mut registers, 0x18, 2, size);
        assert_eq!(read(&registers, 0x18, 2), 256, "{size}");
    }
    let _ = write(&mut registers, 0x18, 2, 256);
    let _ = write(&mut registers, 0x18, 2, 2);
    assert_eq!(read(&registers, 0x18, 2), 2);
}

// Cloud Hypervisor 082fdc4d0: the selector indexed a vector.
#[test]
fn every_selector_value_is_harmless() {
    let mut registers = registers();
    for selector in 0..=0xffff {
        let _ = write(&mut registers, 0x16, 2, selector);
        let there = selector < 2;
        assert_eq!(read(&registers, 0x18, 2) != 0, there, "{selector:#x}");
        assert_eq!(
            read(&registers, 0x1e, 2),
            if there { selector } else { 0 },
            "{selector:#x}"
        );
        assert_eq!(read(&registers, 0x1a, 2), 0xffff);
    }
    for (offset, len) in [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)] {
        assert_eq!(write(&mut registers, offset, len, 1), Effect::None);
    }
    assert_eq!(registers.layouts(), [None, None]);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let mut registers = registers();
    for (vector, expected) in [(0, 0), (2, 2), (3, 0xffff), (0xfffe, 0xffff), (0xffff, 0xffff)] {
        let effect = write(&mut registers, 0x10, 2, vector);
        assert_eq!(effect, Effect::ConfigVector(expected));
        assert_eq!(read(&registers, 0x10, 2), u64::from(expected));
        let effect = write(&mut registers, 0x1a, 2, vector);
        assert_eq!(
            effect,
            Effect::QueueVector {
                queue: 0,
                vector: expected
            }
        );
        assert_eq!(read(&registers, 0x1a, 2), u64::from(expected));
    }
}

#[test]
fn writes_that_fit_no_field_change_nothing() {
    let mut registers = negotiated();
    let mut before = [0; 0x40];
    registers.read(0, &mut before, Live::default());
    for offset in 0..0x48_u64 {
        for len in 1..=8_usize {
            let fits = FIELDS.iter().any(|(at, width, _)| {
                *at == offset && (*width == len || (len == 8 && *width == 4))
                    || *at == offset + 4 && len == 8 && *width == 4
            });
            if !fits {
                let _ = registers.write(offset, &vec![0xff; len]);
            }
        }
    }
    let _ = registers.write(u64::MAX - 3, &[0xff; 8]);
    let mut after = [0; 0x40];
    registers.read(0, &mut after, Live::default());
    assert_eq!(after, before);
}

#[test]
fn read_only_fields_ignore_writes() {
    let mut registers = registers();
    for (offset, len) in [(0x04, 4), (0x12, 2), (0x15, 1), (0x1e, 2)] {
        let before = read(&registers, offset, len);
        assert_eq!(write(&mut registers, offset, len, 0x5a5a_5a5a), Effect::None);
        assert_eq!(read(&registers, offset, len), before);
    }
    assert_eq!(read(&registers, 0x12, 2), 2);
}

#[test]
fn reads_of_any_width_see_the_same_bytes() {
    let registers = negotiated();
    let mut whole = [0; 0x48];
    registers.read(0, &mut whole, Live::default());
    for offset in 0..0x40_usize {
        for len in 1..=8 {
            let mut data = vec![0xee; len];
            registers.read(offset as u64, &mut data, Live::default());
            assert_eq!(data, whole[offset..offset + len], "{offset:#x} {len}");
        }
    }
    assert_eq!(whole[0x38..], [0; 0x10]);
}

proptest! {
    #[test]
    fn random_writes_never_panic_and_never_make_an_impossible_queue(
        writes in prop::collection::vec((0_u64..0x40, 1_usize..=8, any::<u64>()), 1..200),
    ) {
        let mut registers = registers();
        for (offset, len, value) in writes {
            let effect = registers.write(offset, &value.to_le_bytes()[..len]);
            match effect {
                Effect::CheckFeatures(chosen) => registers.accept_features(chosen),
                Effect::Reset => registers.finish_reset(),
                _ => {}
            }
            let _ = read(&registers, offset, len);
            prop_assert!(OFFERED.contains(registers.features()) || !registers.running());
            for layout in registers.layouts().into_iter().flatten() {
                prop_assert!(layout.size.is_power_of_two() && layout.size <= 256);
            }
        }
    }
}
