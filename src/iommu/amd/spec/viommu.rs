//! The vIOMMU extension: VF control MMIO, the private address space, and the host's commands about guests.
//!
//! The manual is not public in this respect. Offsets and fields of the registers, and where the regions lie, are those
//! that drivers for the hardware use, and so is what drivers read and write in memory. What a driver never sees, as the
//! form of the maps' entries, is this model's own.

use bitfield_struct::bitfield;

/// Bytes of VF MMIO of one guest.
pub const VF_LEN: u64 = 0x1000;
/// Bytes of VF control MMIO of one guest.
pub const VF_CONTROL_LEN: u64 = 0x40;

/// Where the command-buffer dirty status is in the private address space: one bit for each guest.
pub const COMMAND_DIRTY: u64 = 0x40_0000;
/// Bytes of it.
pub const COMMAND_DIRTY_LEN: u64 = 0x2000;

/// Where the dirty status has the bit of `guest`: a quadword of the private address space, and the bit in it.
///
/// AMD's driver clears it there. Bits 7:0 of the guest's number choose 16 bytes, bits 14:8 the bit in those. It has no guest
/// with bit 15, which stands for guests of another kind; that those are in the other half of the region is a choice.
#[must_use]
pub const fn command_dirty(guest: u16) -> (u64, u64) {
    let guest = guest as u64;
    let at = COMMAND_DIRTY + (guest >> 15) * (COMMAND_DIRTY_LEN / 2) + (guest & 0xff) * 16;
    (at + (guest >> 14 & 1) * 8, 1 << (guest >> 8 & 0x3f))
}

/// Where the device-ID maps begin in the private address space.
pub const DEVICE_MAPS: u64 = 0x10_0000_0000;
/// Bytes of the device-ID map of one guest.
pub const DEVICE_MAP_LEN: u64 = 1 << 20;
/// Bytes of an entry of a device-ID map; only the first quadword is used.
pub const DEVICE_ENTRY: u64 = 16;
/// Where the domain-ID maps begin in the private address space.
pub const DOMAIN_MAPS: u64 = 0x20_0000_0000;
/// Bytes of the domain-ID map of one guest.
pub const DOMAIN_MAP_LEN: u64 = 1 << 19;
/// Bytes of an entry of a domain-ID map.
pub const DOMAIN_ENTRY: u64 = 8;

/// A quadword of VF control MMIO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ControlReg {
    /// Device-ID map control.
    DeviceMap,
    /// Domain-ID map control.
    DomainMap,
    /// Translate device ID.
    Misc,
    /// Guest command control.
    Command,
    /// Guest event control.
    Event,
    /// Guest PPR control.
    Ppr,
}

impl ControlReg {
    /// Where it is.
    #[must_use]
    pub const fn offset(self) -> u64 {
        match self {
            Self::DeviceMap => 0x00,
            Self::DomainMap => 0x08,
            Self::Misc => 0x10,
            Self::Command => 0x20,
            Self::Event => 0x28,
            Self::Ppr => 0x30,
        }
    }

    /// The quadword at `offset`, a multiple of 8; `None` where there is no register.
    #[must_use]
    pub const fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x00 => Self::DeviceMap,
            0x08 => Self::DomainMap,
            0x10 => Self::Misc,
            0x20 => Self::Command,
            0x28 => Self::Event,
            0x30 => Self::Ppr,
            _ => return None,
        })
    }
}

/// Device-ID map control and domain-ID map control: one entry of the map, and the order to write it.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct MapControl {
    /// The entry means something.
    pub valid: bool,
    #[bits(13)]
    __: u16,
    /// What the host calls it.
    pub host: u16,
    __: u16,
    /// What the guest calls it.
    pub guest: u16,
    __: bool,
    /// Write the entry now; reads as 0.
    pub write: bool,
}

impl MapControl {
    /// Bits that can be written.
    pub const WRITABLE: u64 = Self::new()
        .with_valid(true)
        .with_host(0xffff)
        .with_guest(0xffff)
        .with_write(true)
        .into_bits();
}

/// Guest misc control.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct MiscControl {
    __: u16,
    /// By whose entry the guest's buffers are reached.
    pub translate_device: u16,
    __: u32,
}

impl MiscControl {
    /// Bits that can be written.
    pub const WRITABLE: u64 = Self::new().with_translate_device(0xffff).into_bits();
}

/// Guest command control.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CommandControl {
    /// Logarithm of the number of entries, 8 to 15.
    #[bits(4)]
    pub length: u8,
    #[bits(4)]
    __: u8,
    /// CmdBufEn.
    pub enable: bool,
    /// ComWaitIntEn.
    pub interrupt: bool,
    #[bits(2)]
    __: u8,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

impl CommandControl {
    /// Bits that can be written.
    pub const WRITABLE: u64 = Self::new()
        .with_length(0xf)
        .with_enable(true)
        .with_interrupt(true)
        .with_frame(0xff_ffff_ffff)
        .into_bits();
}

/// Guest event control.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EventControl {
    /// Logarithm of the number of entries, 8 to 15.
    #[bits(4)]
    pub length: u8,
    #[bits(4)]
    pub length_b: u8,
    /// EventLogEn.
    pub enable: bool,
    /// EventIntEn.
    pub interrupt: bool,
    #[bits(2)]
    pub dual: u8,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

impl EventControl {
    /// Bits that can be written: there is one log.
    pub const WRITABLE: u64 = Self::new()
        .with_length(0xf)
        .with_enable(true)
        .with_interrupt(true)
        .with_frame(0xff_ffff_ffff)
        .into_bits();
}

/// Guest PPR control.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PprControl {
    /// Logarithm of the number of entries, 8 to 15.
    #[bits(4)]
    pub length: u8,
    #[bits(4)]
    pub length_b: u8,
    /// PprLogEn.
    pub enable: bool,
    /// PprIntEn.
    pub interrupt: bool,
    /// PprEn.
    pub requests: bool,
    #[bits(2)]
    pub dual: u8,
    pub auto_response: bool,
    pub block_stop_mark: bool,
    pub auto_response_always: bool,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    __: u8,
}

impl PprControl {
    /// Bits that can be written: there is one log, and nothing answers by itself.
    pub const WRITABLE: u64 = Self::new()
        .with_length(0xf)
        .with_enable(true)
        .with_interrupt(true)
        .with_requests(true)
        .with_frame(0xff_ffff_ffff)
        .into_bits();
}

/// What a map says of one number, in either direction.
///
/// The first dword of an entry leads from the guest's number, which is the entry's place, to the host's. In the
/// domain-ID map the second one leads from the host's number to the guest's, for events.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct MapEntry {
    /// The number on the other side.
    pub number: u16,
    #[bits(15)]
    __: u16,
    /// There is one.
    pub valid: bool,
}

/// An entry of the first level of the extended interrupt remapping table: where a table of the second level is, as AMD's
/// driver writes it.
///
/// An interrupt of a guest has the number of its log in bits 17:16, 0 event and 1 PPR, and that of the guest in bits 15:0.
/// Bits 17:8 choose the entry of the first level, and bits 7:0 that of the second, which has 128 bits.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct InterruptTablePointer {
    /// There is one.
    pub valid: bool,
    __: bool,
    /// How long it is. What each value means no driver tells; the index has 8 bits for it.
    #[bits(4)]
    pub length: u8,
    /// Address bits 51:6.
    #[bits(46)]
    pub root: u64,
    #[bits(12)]
    __: u16,
}

impl InterruptTablePointer {
    /// Bytes of an entry.
    pub const LEN: u64 = 8;
    /// Bytes of the first level.
    pub const TABLE_LEN: u64 = 0x2000;
}

/// INSERT_GUEST_EVENT.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct InsertGuestEvent {
    /// The record's DeviceID.
    pub device: u16,
    /// The record's PASID bits 19:16.
    #[bits(4)]
    pub pasid_19_16: u8,
    __: u8,
    /// The record's code, whose own place the opcode has.
    #[bits(4)]
    pub code: u8,
    /// Into whose log.
    pub guest: u16,
    /// The record's bits 59:48.
    #[bits(12)]
    pub flags: u16,
    #[bits(4)]
    pub opcode: u8,
    /// The record's second quadword.
    pub address: u64,
}

/// RESET_VMMIO.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct ResetVmmio {
    /// Whose registers.
    pub guest: u16,
    #[bits(12)]
    __: u16,
    /// Everybody's.
    pub all: bool,
    #[bits(2)]
    __: u8,
    /// The command buffer's among them; a driver sets it always.
    pub commands: bool,
    #[bits(28)]
    __: u32,
    #[bits(4)]
    pub opcode: u8,
    __: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_bits_are_where_drivers_write_them() {
        let map = MapControl::from_bits(1 << 63 | 0x0219 << 46 | 0x4001 << 14 | 1);
        assert_eq!((map.guest(), map.host(), map.valid()), (0x0219, 0x4001, true));
        assert!(map.write());
        assert_eq!(
            MiscControl::new().with_translate_device(0x4800).into_bits(),
            0x4800 << 16
        );
        assert_eq!(CommandControl::WRITABLE, 0x000f_ffff_ffff_f30f);
        assert_eq!(EventControl::WRITABLE, 0x000f_ffff_ffff_f30f);
        assert_eq!(PprControl::WRITABLE, 0x00ff_ffff_ffff_070f);
    }

    #[test]
    fn a_table_of_the_second_level_is_where_drivers_write_it() {
        let pointer = InterruptTablePointer::from_bits(0x000f_ffff_ffff_ffc0 | 0xa << 2 | 1);
        assert!(pointer.valid());
        assert_eq!((pointer.root(), pointer.length()), ((1 << 46) - 1, 0xa));
    }

    #[test]
    fn commands_about_guests_are_where_drivers_write_them() {
        let insert = InsertGuestEvent::from_bits(0x9020_0005_2000_0219);
        assert_eq!((insert.guest(), insert.device(), insert.code()), (5, 0x0219, 2));
        assert_eq!((insert.flags(), insert.opcode()), (0x020, 9));
        let reset = ResetVmmio::from_bits(0xa000_0000_9000_0007);
        assert_eq!((reset.guest(), reset.opcode()), (7, 10));
        assert!(reset.all() && reset.commands());
    }

    #[test]
    fn each_guest_has_a_dirty_bit_of_its_own_where_drivers_clear_it() {
        assert_eq!(command_dirty(0), (COMMAND_DIRTY, 1));
        assert_eq!(command_dirty(5), (COMMAND_DIRTY + 0x50, 1));
        assert_eq!(command_dirty(0x0105), (COMMAND_DIRTY + 0x50, 2));
        assert_eq!(command_dirty(0x3f05), (COMMAND_DIRTY + 0x50, 1 << 63));
        assert_eq!(command_dirty(0x7fff), (COMMAND_DIRTY + 0xff8, 1 << 63));
        // As dwords, which the driver has: bits 14:13 choose one of four, bits 12:8 its bit.
        assert_eq!(command_dirty(0x2305), (COMMAND_DIRTY + 0x50, 1 << (32 + 3)));
        let bits: std::collections::BTreeSet<_> = (0..=u16::MAX).map(command_dirty).collect();
        assert_eq!(bits.len(), 0x1_0000);
        let last = bits.last().map(|(at, _)| at + 8);
        assert_eq!(last, Some(COMMAND_DIRTY + COMMAND_DIRTY_LEN));
    }

    #[test]
    fn quadwords_without_a_register_have_no_name() {
        for offset in [0x18, 0x38, 0x40, 0x01, !7] {
            assert_eq!(ControlReg::at(offset), None, "{offset:#x}");
        }
        for offset in [0x00, 0x08, 0x10, 0x20, 0x28, 0x30] {
            assert_eq!(ControlReg::at(offset).map(ControlReg::offset), Some(offset));
        }
    }
}
