//! SPCR: which serial port is the console.
//!
//! Serial Port Console Redirection Table, revision 4. The crate's table knows only the firmware console of
//! another architecture.

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use zerocopy::{Immutable, IntoBytes};

use super::{board, bytes_of, table};

const REVISION: u8 = 4;
/// The port's device in the DSDT.
const NAMESPACE: [u8; 10] = *b"\\_SB.COM1\0";
/// Its length with the zero byte.
const NAMESPACE_LEN: u16 = 10;
/// Where that name begins in the table.
const NAMESPACE_AT: u16 = 88;

/// The table from byte 36 on.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Console {
    /// 0: fully 16550-compatible.
    interface: u8,
    reserved: [u8; 3],
    base: [u8; 12],
    /// Bit 0: an 8259 input, and bit 1: an I/O APIC input.
    interrupt_type: u8,
    /// The 8259's input, where there is one.
    irq: u8,
    gsi: [u8; 4],
    /// 7: 115200.
    baud_rate: u8,
    /// 0: none, the only one defined.
    parity: u8,
    stop_bits: u8,
    /// 0: none.
    flow_control: u8,
    /// 3: ANSI.
    terminal: u8,
    language: u8,
    pci_device: [u8; 2],
    pci_vendor: [u8; 2],
    pci_bus: u8,
    pci_slot: u8,
    pci_function: u8,
    pci_flags: [u8; 4],
    pci_segment: u8,
    /// 0: not known.
    clock_frequency: [u8; 4],
    /// Takes the place of `baud_rate`.
    precise_baud_rate: [u8; 4],
    namespace_len: [u8; 2],
    namespace_at: [u8; 2],
    namespace: [u8; 10],
}

const _: () = assert!(std::mem::offset_of!(Console, namespace) == NAMESPACE_AT as usize - 36);

/// The table for COM1.
pub(super) fn spcr() -> Vec<u8> {
    const IO_APIC: u8 = 1 << 1;
    const BAUD_115200: u8 = 7;
    const ANSI: u8 = 3;
    /// "Not a PCI device" in both ID fields.
    const NOT_PCI: [u8; 2] = [0xff; 2];
    let base = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(board::COM1_PORT),
    );
    let console = Console {
        interface: 0,
        reserved: [0; 3],
        base: bytes_of(&base)
            .try_into()
            .expect("an address structure has 12 bytes"),
        interrupt_type: IO_APIC,
        irq: 0,
        gsi: u32::from(board::COM1_GSI).to_le_bytes(),
        baud_rate: BAUD_115200,
        parity: 0,
        stop_bits: 1,
        flow_control: 0,
        terminal: ANSI,
        language: 0,
        pci_device: NOT_PCI,
        pci_vendor: NOT_PCI,
        pci_bus: 0,
        pci_slot: 0,
        pci_function: 0,
        pci_flags: [0; 4],
        pci_segment: 0,
        clock_frequency: [0; 4],
        precise_baud_rate: 115_200_u32.to_le_bytes(),
        namespace_len: NAMESPACE_LEN.to_le_bytes(),
        namespace_at: NAMESPACE_AT.to_le_bytes(),
        namespace: NAMESPACE,
    };
    table(*b"SPCR", REVISION, console.as_bytes())
}
