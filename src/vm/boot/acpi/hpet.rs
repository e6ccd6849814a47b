//! HPET: where the event timer is, in the machine that asks for one.
//!
//! IA-PC HPET specification 1.0a, section 3.2.4.

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{board, bytes_of, table};
use crate::vm::layout;

const REVISION: u8 = 1;
/// The shortest period that loses no interrupt in periodic mode, in counter ticks.
const MINIMUM_TICKS: u16 = 0x80;

/// The table for the board's HPET.
pub(super) fn hpet() -> Vec<u8> {
    let base = GAS::new(
        AddressSpace::SystemMemory,
        64,
        0,
        AccessSize::Undefined,
        layout::HPET.start().0,
    );
    let mut body = board::HPET_ID.to_le_bytes().to_vec();
    body.extend(bytes_of(&base));
    // The first and only block.
    body.push(0);
    body.extend(MINIMUM_TICKS.to_le_bytes());
    // No page protection promised, no OEM attribute.
    body.push(0);
    table(*b"HPET", REVISION, &body)
}
