//! Interrupt remapping table entries, both formats (section 2.2.5, Tables 19 to 21).

use bitfield_struct::bitfield;

/// The 32-bit entry, in force while Control.GAEn is 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Irte {
    /// The entry means something.
    pub remap_en: bool,
    /// Log no fault of this interrupt.
    pub sup_iopf: bool,
    /// Delivery mode: 0 fixed, 1 arbitrated.
    #[bits(3)]
    pub int_type: u8,
    /// The source wants an end of interrupt.
    pub rq_eoi: bool,
    /// Destination mode: logical.
    pub dm: bool,
    /// The entry posts to a virtual APIC.
    pub guest_mode: bool,
    pub destination: u8,
    pub vector: u8,
    #[bits(8)]
    __: u8,
}

impl Irte {
    /// Bytes of an entry.
    pub const LEN: u64 = 4;
    /// Bits that must be 0.
    pub const RESERVED: u32 = 0xff00_0000;
}

/// The 128-bit entry, in force while Control.GAEn is 1, in its remapping (not virtual APIC) form.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct IrteGa {
    /// The entry means something.
    pub remap_en: bool,
    /// Log no fault of this interrupt.
    pub sup_iopf: bool,
    /// Delivery mode: 0 fixed, 1 arbitrated.
    #[bits(3)]
    pub int_type: u8,
    /// The source wants an end of interrupt.
    pub rq_eoi: bool,
    /// Destination mode: logical.
    pub dm: bool,
    /// The entry posts to a virtual APIC.
    pub guest_mode: bool,
    /// Destination bits 23:0; only 7:0 without x2APIC.
    #[bits(24)]
    pub destination_23_0: u32,
    #[bits(32)]
    __: u32,
    pub vector: u8,
    #[bits(48)]
    __: u64,
    /// Destination bits 31:24 under x2APIC.
    pub destination_31_24: u8,
}

impl IrteGa {
    /// Bytes of an entry.
    pub const LEN: u64 = 16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_entry_is_where_the_specification_puts_it() {
        let entry = Irte::from_bits(0x0031_0245);
        assert!(entry.remap_en() && entry.dm() && !entry.sup_iopf());
        assert_eq!(
            (entry.int_type(), entry.destination(), entry.vector()),
            (1, 2, 0x31)
        );
        assert_eq!(Irte::new().with_guest_mode(true).into_bits(), 0x80);
        assert_eq!(Irte::new().with_rq_eoi(true).into_bits(), 0x20);
    }

    #[test]
    fn the_long_entry_is_where_the_specification_puts_it() {
        let entry = IrteGa::from_bits(0x0100_0000_0000_0055_0000_0000_0001_0201);
        assert!(entry.remap_en());
        assert_eq!(entry.destination_23_0(), 0x0102);
        assert_eq!((entry.vector(), entry.destination_31_24()), (0x55, 1));
    }
}
