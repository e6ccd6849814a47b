//! Register masks of both headers, by every width.

use super::*;
use crate::pci::access::{read_dwords, write_dwords};
use crate::pci::capability::Express;
use crate::pci::tree::BarKind;

const IDENTITY: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1041,
    class: 0x02_0000,
    revision: 1,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

fn endpoint() -> ConfigSpace {
    ConfigSpace::endpoint(&IDENTITY)
        .bar(BarSpec {
            index: 0,
            kind: BarKind::Mem64 { prefetchable: true },
            size: 0x4000,
        })
        .bar(BarSpec {
            index: 2,
            kind: BarKind::Io,
            size: 0x20,
        })
        .interrupt_pin(Pin::B)
        .capability(PowerManagement::new())
        .capability(Express::endpoint(true))
}

fn bridge() -> ConfigSpace {
    ConfigSpace::bridge(&IDENTITY).capability(Express::root_port(Some(1), 0))
}

fn header(config: &ConfigSpace) -> Vec<u32> {
    (0..16).map(|dword| config.read(dword)).collect()
}

/// Write ones by accesses of `width` bytes over the whole space.
fn write_ones(config: &mut ConfigSpace, width: usize) {
    (0..4096).step_by(width).for_each(|at| {
        write_dwords(at, &[0xff; 4][..width], |dword, write| {
            let _ = config.write(u16::try_from(dword).expect("below 1024"), write);
        });
    });
}

#[test]
fn a_type_0_header_takes_what_the_specification_lets_it() {
    for width in [1, 2, 4] {
        let mut config = endpoint();
        write_ones(&mut config, width);
        let expected = [
            0x1041_1af4,
            0x0010_0547,
            0x0200_0001,
            0x0000_00ff,
            0xffff_c00c,
            0xffff_ffff,
            0xffff_ffe1,
            0,
            0,
            0,
            0,
            0x1100_1af4,
            0,
            0x40,
            0,
            0x0000_02ff,
        ];
        assert_eq!(header(&config), expected, "{width}");
    }
}

#[test]
fn a_type_1_header_takes_what_the_specification_lets_it() {
    for width in [1, 2, 4] {
        let mut config = bridge();
        write_ones(&mut config, width);
        let expected = [
            0x1041_1af4,
            0x0010_0547,
            0x0200_0001,
            0x0001_00ff,
            0,
            0,
            0x00ff_ffff,
            0x0000_f0f0,
            0xfff0_fff0,
            0xfff1_fff1,
            u32::MAX,
            u32::MAX,
            0,
            0x40,
            0,
            0x0043_00ff,
        ];
        assert_eq!(header(&config), expected, "{width}");
    }
}

#[test]
fn reset_brings_every_register_back() {
    let spaces: [fn() -> ConfigSpace; 2] = [endpoint, bridge];
    for make in spaces {
        let (mut config, fresh) = (make(), make());
        write_ones(&mut config, 4);
        config.reset();
        let all = |config: &ConfigSpace| (0..1024).map(|dword| config.read(dword)).collect::<Vec<_>>();
        assert_eq!(all(&config), all(&fresh));
    }
}

#[test]
fn every_width_at_every_offset_reads_the_same_bytes() {
    let config = endpoint();
    let read = |at: u64, data: &mut [u8]| {
        read_dwords(at, data, |dword| {
            config.read(u16::try_from(dword).expect("small"))
        });
    };
    let mut bytes = [0; 4096];
    bytes
        .chunks_mut(4)
        .enumerate()
        .for_each(|(dword, chunk)| read(dword as u64 * 4, chunk));
    for (at, width) in (0..4095_usize).flat_map(|at| [1, 2].map(|width| (at, width))) {
        let mut data = [0; 2];
        read(at as u64, &mut data[..width]);
        assert_eq!(data[..width], bytes[at..at + width], "{at:#x}");
    }
}

#[test]
fn class_12_a_write_over_status_leaves_the_command_alone() {
    let mut config = endpoint();
    let _ = config.write(1, DwordWrite::whole(0x7));
    let _ = config.write(1, DwordWrite::new(2, &[0xff, 0xff]).expect("inside"));
    assert_eq!(config.read(1), 0x0010_0007);
    let _ = config.write(1, DwordWrite::new(1, &[0x04]).expect("inside"));
    assert_eq!(config.read(1), 0x0010_0407);
}

#[test]
fn a_function_without_bars_decodes_nothing() {
    let mut config = ConfigSpace::endpoint(&IDENTITY);
    let _ = config.write(1, DwordWrite::whole(u32::MAX));
    assert_eq!(
        config.command() & (Command::IO | Command::MEMORY),
        Command::empty()
    );
}

#[test]
fn the_absent_rom_reads_zero_after_sizing() {
    let mut config = endpoint();
    assert_eq!(
        config.write(12, DwordWrite::whole(0xffff_f801)),
        ConfigEffect::empty()
    );
    assert_eq!(config.read(12), 0);
}

#[test]
fn sizing_a_bar_moves_nothing_while_decode_is_off() {
    let mut config = endpoint();
    assert_eq!(
        config.write(4, DwordWrite::whole(u32::MAX)),
        ConfigEffect::empty()
    );
    assert_eq!(config.write(1, DwordWrite::whole(2)), ConfigEffect::DECODING);
    assert_eq!(
        config.write(4, DwordWrite::whole(0xe000_0000)),
        ConfigEffect::DECODING
    );
    assert_eq!(
        config.write(4, DwordWrite::whole(0xe000_0000)),
        ConfigEffect::empty()
    );
}

#[test]
fn bridge_windows_matter_only_while_it_forwards() {
    let mut config = bridge();
    assert_eq!(
        config.write(8, DwordWrite::whole(0xe000_e000)),
        ConfigEffect::empty()
    );
    let _ = config.write(1, DwordWrite::whole(2));
    assert_eq!(
        config.write(8, DwordWrite::whole(0xe010_e000)),
        ConfigEffect::DECODING
    );
    assert_eq!(
        config.write(6, DwordWrite::whole(0x0002_0100)),
        ConfigEffect::ROUTING
    );
}

#[test]
fn the_interrupt_pin_stays_and_the_line_is_scratch() {
    let mut config = endpoint();
    assert_eq!(
        config.write(15, DwordWrite::whole(0xffff_ff0b)),
        ConfigEffect::empty()
    );
    assert_eq!(config.read(15), 0x020b);
}

#[test]
fn disabling_intx_is_an_interrupt_effect_only() {
    let mut config = endpoint();
    assert_eq!(
        config.write(1, DwordWrite::whole(0x400)),
        ConfigEffect::INTERRUPTS
    );
    assert_eq!(config.write(1, DwordWrite::whole(0x404)), ConfigEffect::DECODING);
}

#[test]
fn class_13_a_sleeping_function_neither_decodes_nor_issues() {
    let mut config = endpoint();
    let _ = config.write(1, DwordWrite::whole(0x7));
    assert_eq!(config.write(0x11, DwordWrite::whole(3)), ConfigEffect::DECODING);
    assert_eq!(config.command(), Command::empty());
    assert_eq!(config.read(1) & 0xffff, 7);
    let _ = config.write(0x11, DwordWrite::whole(0));
    assert_eq!(
        config.command(),
        Command::IO | Command::MEMORY | Command::BUS_MASTER
    );
}

#[test]
#[should_panic(expected = "ports have no BARs")]
fn a_bridge_has_no_bars() {
    let _ = bridge().bar(BarSpec {
        index: 0,
        kind: BarKind::Io,
        size: 4,
    });
}
