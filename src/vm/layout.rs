//! The guest physical map and why each window is where it is.
//!
//! ```text
//! 0                     RAM, up to the 32-bit hole
//! pci hole .. 0xfebfffff  ECAM of the first segments, then the root complexes' 32-bit windows
//! 0xfec00000            IOAPIC
//! 0xfed00000            HPET, where there is one
//! 0xfed80000-0xfed8ffff nothing: Zen guests read the southbridge's reset status there and expect all ones
//! 0xfee00000-0xfeefffff local APICs; MSI writes
//! 4 GiB                 RAM, around the HyperTransport hole
//! after RAM             ECAM of further segments, then the root complexes' 64-bit windows
//! ```

use serde::Serialize;

use crate::platform::addr::{Gpa, GpaRange};

/// The I/O APIC's registers: one page.
pub const IOAPIC: GpaRange = fixed(0xfec0_0000, 0x1000);
/// The HPET's registers.
pub const HPET: GpaRange = fixed(0xfed0_0000, 0x400);
/// Where no unit may be: Linux on Zen reads and writes back 0xfed803c0, i2c-piix4 reads 0xfed80300.
pub const SOUTHBRIDGE: GpaRange = fixed(0xfed8_0000, 0x1_0000);
/// Local APICs, and where MSI writes go.
pub const LOCAL_APIC: GpaRange = fixed(0xfee0_0000, 0x10_0000);
/// The end of what PCI may use below 4 GiB: the fixed units begin here.
pub const PCI_HOLE_END: Gpa = Gpa(0xfec0_0000);
/// Addresses that AMD processors route to HyperTransport, not to memory: neither RAM nor a window may lie
/// there (AMD I/O Virtualization Technology Specification 2.1.2).
pub const HYPERTRANSPORT: GpaRange = fixed(0xfd_0000_0000, 0x3_0000_0000);
/// The first address that 32 bits do not reach.
pub const FOUR_GIB: Gpa = Gpa(1 << 32);

const fn fixed(start: u64, len: u64) -> GpaRange {
    GpaRange::new(Gpa(start), len).expect("a constant range is not empty and does not wrap")
}

/// Where everything but RAM may lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Where RAM below 4 GiB ends at the latest and the PCI hole begins.
    pub low_ram_end: Gpa,
    /// What the root complexes' 32-bit windows are cut from.
    pub mem32: GpaRange,
    /// What the root complexes' 64-bit windows are cut from; `None` when nothing needs one.
    pub mem64: Option<GpaRange>,
    /// The highest address in use: the guest's and the host's processors must reach it.
    pub highest: Gpa,
}
