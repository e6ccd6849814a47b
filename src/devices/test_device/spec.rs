//! The registers of the test device, bit by bit.
//!
//! Offsets, commands and status bits are those that Linux's `pci_endpoint_test` driver knows
//! (Documentation/PCI/endpoint/pci-test-function.rst, and the driver for what that page lacks). The bits named
//! here as ours are taken from the top, which the driver ignores.

use bitfield_struct::bitfield;
use bitflags::bitflags;

/// Where our own registers begin: far behind what Linux may add.
const OURS: u64 = 0x100;

/// One register: a dword of BAR 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reg {
    /// Storage, by which the driver tests BAR 0.
    Magic,
    /// Writing it starts a command; reads as the command that runs, or 0.
    Command,
    /// How the last command ended.
    Status,
    /// Where to read, bits 31:0.
    SourceLow,
    /// Where to read, bits 63:32.
    SourceHigh,
    /// Where to write, bits 31:0.
    DestinationLow,
    /// Where to write, bits 63:32.
    DestinationHigh,
    /// Bytes; of the subrange commands, the BAR.
    Size,
    /// CRC-32 of the data.
    Checksum,
    /// How to interrupt: [`IrqType`].
    IrqType,
    /// Which message, from 1 on.
    IrqNumber,
    /// How to transfer; kept and without effect, every transfer is DMA.
    Flags,
    /// What the device can do: [`Caps`].
    Caps,
    /// The BAR that the doorbell is in, or all ones.
    DoorbellBar,
    /// Where it is there.
    DoorbellOffset,
    /// What rings it.
    DoorbellData,
    /// Ours: the process address space of requests: [`Space`].
    Space,
    /// Ours: what translation and page requests ask for: [`Rights`].
    Rights,
    /// Ours: what the last translation request was answered, bits 31:0 of the address.
    TranslationLow,
    /// Ours: bits 63:32 of it.
    TranslationHigh,
    /// Ours: the rest of the answer: [`TranslationInfo`].
    TranslationInfo,
    /// Ours: the last response to a page request.
    Response,
    /// Ours: how many translations are kept.
    Kept,
    /// Ours: how many invalidations came.
    Invalidations,
}

impl Reg {
    /// Those that Linux knows, one behind the other from the beginning.
    const LINUX: [Self; 16] = [
        Self::Magic,
        Self::Command,
        Self::Status,
        Self::SourceLow,
        Self::SourceHigh,
        Self::DestinationLow,
        Self::DestinationHigh,
        Self::Size,
        Self::Checksum,
        Self::IrqType,
        Self::IrqNumber,
        Self::Flags,
        Self::Caps,
        Self::DoorbellBar,
        Self::DoorbellOffset,
        Self::DoorbellData,
    ];

    /// Ours, from [`OURS`] on.
    const OURS: [Self; 8] = [
        Self::Space,
        Self::Rights,
        Self::TranslationLow,
        Self::TranslationHigh,
        Self::TranslationInfo,
        Self::Response,
        Self::Kept,
        Self::Invalidations,
    ];

    /// The register that is dword `dword` of BAR 0.
    #[must_use]
    pub fn at(dword: u64) -> Option<Self> {
        let within = |list: &[Self], dword: u64| list.get(usize::try_from(dword).ok()?).copied();
        match dword.checked_sub(OURS / 4) {
            Some(dword) => within(&Self::OURS, dword),
            None => within(&Self::LINUX, dword),
        }
    }

    /// Its offset in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        let ours = Self::Space as u64;
        let index = self as u64;
        if index < ours {
            index * 4
        } else {
            OURS + (index - ours) * 4
        }
    }
}

bitflags! {
    /// How commands ended.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Status: u32 {
        /// Memory was read, and its checksum is right.
        const READ_SUCCESS = 1 << 0;
        /// Memory could not be read, or its checksum is wrong.
        const READ_FAIL = 1 << 1;
        /// Memory was written.
        const WRITE_SUCCESS = 1 << 2;
        /// Memory could not be written.
        const WRITE_FAIL = 1 << 3;
        /// Memory was copied.
        const COPY_SUCCESS = 1 << 4;
        /// Memory could not be copied.
        const COPY_FAIL = 1 << 5;
        /// The interrupt is the device's.
        const IRQ_RAISED = 1 << 6;
        /// Some of the source could not be read.
        const SOURCE_INVALID = 1 << 7;
        /// Some of the destination could not be written.
        const DESTINATION_INVALID = 1 << 8;
        /// The doorbell was rung.
        const DOORBELL_SUCCESS = 1 << 9;
        /// There is a doorbell now.
        const DOORBELL_ENABLE_SUCCESS = 1 << 10;
        /// There was one already.
        const DOORBELL_ENABLE_FAIL = 1 << 11;
        /// There is no doorbell any more.
        const DOORBELL_DISABLE_SUCCESS = 1 << 12;
        /// There was none.
        const DOORBELL_DISABLE_FAIL = 1 << 13;
        /// The halves of the BAR have changed places, and hold their signatures.
        const SUBRANGE_SETUP_SUCCESS = 1 << 14;
        /// There is no such BAR of memory.
        const SUBRANGE_SETUP_FAIL = 1 << 15;
        /// The halves of the BAR are where they belong.
        const SUBRANGE_CLEAR_SUCCESS = 1 << 16;
        /// They were there before, or there is no such BAR.
        const SUBRANGE_CLEAR_FAIL = 1 << 17;
        /// Ours: the page request was refused, or may not be issued.
        const PAGE_REQUEST_FAIL = 1 << 25;
        /// Ours: the page request was taken; the response is still to come.
        const PAGE_REQUEST_SUCCESS = 1 << 26;
        /// Ours: the translation request was refused, or may not be issued.
        const TRANSLATE_FAIL = 1 << 27;
        /// Ours: the translation request was answered, perhaps by no rights at all.
        const TRANSLATE_SUCCESS = 1 << 28;
        /// Ours: no interrupt says that the command is over, because the guest does not receive that kind, or
        /// not that number.
        const UNSIGNALLED = 1 << 29;
        /// Ours: a command came while another one ran, and was dropped.
        const BUSY = 1 << 30;
        /// Ours: what was written to the command register is no command.
        const COMMAND_INVALID = 1 << 31;
        /// What the guest writes here, it reads here.
        const _ = !0;
    }
}

bitflags! {
    /// What the device can do.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Caps: u32 {
        /// Transfers may start anywhere.
        const UNALIGNED_ACCESS = 1 << 0;
        /// It has MSI.
        const MSI = 1 << 1;
        /// It has MSI-X.
        const MSIX = 1 << 2;
        /// It has a wire.
        const INTX = 1 << 3;
        /// The halves of its BARs can change places.
        const SUBRANGE_MAPPING = 1 << 4;
        /// It can show a doorbell.
        const DYNAMIC_INBOUND_MAPPING = 1 << 5;
        /// Ours: it can ask for translations (ATS).
        const TRANSLATIONS = 1 << 29;
        /// Ours: it can ask for pages (PRI).
        const PAGE_REQUESTS = 1 << 30;
        /// Ours: it has process address spaces (PASID).
        const PASID = 1 << 31;
    }
}

bitflags! {
    /// How to transfer.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Flags: u32 {
        /// By DMA: every transfer is.
        const USE_DMA = 1 << 0;
        /// Ours: by addresses that the device asks to have translated, and keeps.
        const TRANSLATED = 1 << 30;
        /// Ours: in the process address space of [`Space`].
        const PASID = 1 << 31;
        /// What the guest writes here, it reads here.
        const _ = !0;
    }
}

/// A process address space, and with which privilege.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Space {
    /// Process address space ID.
    #[bits(20)]
    pub pasid: u32,
    #[bits(11)]
    __: u32,
    /// As a supervisor.
    pub privileged: bool,
}

/// What a translation or page request asks for.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Rights {
    /// To read.
    pub read: bool,
    /// To write.
    pub write: bool,
    /// To execute.
    pub execute: bool,
    /// Of a page request: the last of its group.
    pub last: bool,
    #[bits(12)]
    __: u32,
    /// Of a page request: its group.
    #[bits(9)]
    pub group: u16,
    #[bits(7)]
    __: u32,
}

/// What a translation request was answered, but for the address.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TranslationInfo {
    /// Logarithm of the page's size.
    pub shift: u8,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// By untranslated requests only.
    pub untranslated_only: bool,
    #[bits(21)]
    __: u32,
}

/// How to interrupt when a command is over. Anything but these is no interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IrqType(pub u32);

impl IrqType {
    /// By wire.
    pub const INTX: Self = Self(0);
    /// By MSI.
    pub const MSI: Self = Self(1);
    /// By MSI-X.
    pub const MSIX: Self = Self(2);
}

/// What the command register starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Interrupt, and nothing else. By what is in the type register: the bit of the command does not count.
    RaiseIrq,
    /// Read memory and compare its checksum with the register.
    Read,
    /// Write what nobody can foresee to memory, and its checksum to the register.
    Write,
    /// Copy memory.
    Copy,
    /// Show a doorbell.
    EnableDoorbell,
    /// Take it away.
    DisableDoorbell,
    /// Let the halves of a BAR change places.
    SetupSubranges,
    /// Put them where they belong.
    ClearSubranges,
    /// Ours: ask where the source is.
    Translate,
    /// Ours: ask for the page of the source.
    RequestPage,
}

/// What was written is no command: not exactly one bit that is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnknownCommand(pub u32);

impl TryFrom<u32> for Command {
    type Error = UnknownCommand;

    fn try_from(code: u32) -> Result<Self, UnknownCommand> {
        Ok(match code {
            0x001 | 0x002 | 0x004 => Self::RaiseIrq,
            0x008 => Self::Read,
            0x010 => Self::Write,
            0x020 => Self::Copy,
            0x040 => Self::EnableDoorbell,
            0x080 => Self::DisableDoorbell,
            0x100 => Self::SetupSubranges,
            0x200 => Self::ClearSubranges,
            0x0100_0000 => Self::Translate,
            0x0200_0000 => Self::RequestPage,
            unknown => return Err(UnknownCommand(unknown)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_driver_looks_for_them() {
        let offsets = [
            (Reg::Magic, 0x00),
            (Reg::Command, 0x04),
            (Reg::Status, 0x08),
            (Reg::SourceLow, 0x0c),
            (Reg::DestinationHigh, 0x18),
            (Reg::Size, 0x1c),
            (Reg::Checksum, 0x20),
            (Reg::IrqType, 0x24),
            (Reg::IrqNumber, 0x28),
            (Reg::Flags, 0x2c),
            (Reg::Caps, 0x30),
            (Reg::DoorbellBar, 0x34),
            (Reg::DoorbellData, 0x3c),
            (Reg::Space, 0x100),
            (Reg::Invalidations, 0x11c),
        ];
        for (register, offset) in offsets {
            assert_eq!(register.offset(), offset, "{register:?}");
            assert_eq!(Reg::at(offset / 4), Some(register));
        }
        for dword in [16, 0x3f, 0x48, u64::MAX] {
            assert_eq!(Reg::at(dword), None, "{dword:#x}");
        }
    }

    #[test]
    fn a_command_is_exactly_one_known_bit() {
        let known = (0..32).filter(|bit| Command::try_from(1 << bit).is_ok()).count();
        assert_eq!(known, 12);
        for code in [0, 0x3, 0x18, 0x400, 0x8000_0008, u32::MAX] {
            assert_eq!(Command::try_from(code), Err(UnknownCommand(code)));
        }
    }
}
