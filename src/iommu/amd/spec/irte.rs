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
    /// Bits that must be 0: those that only the virtual APIC form has. Destination bits that are of no use without x2APIC
    /// are not among them.
    pub const RESERVED: u128 = 0x00ff_ffff_ffff_ff00_ffff_ffff_0000_0000;
}

/// The 128-bit entry in its virtual APIC form: GuestMode is 1.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct IrteGuest {
    /// The entry means something.
    pub remap_en: bool,
    /// Log no fault of this interrupt.
    pub sup_iopf: bool,
    /// Log the interrupt while the processor does not run.
    pub ga_log_intr: bool,
    #[bits(2)]
    __: u8,
    /// No interrupt wakes up a processor that does not run.
    pub gappi_dis: bool,
    /// The processor runs, at the destination.
    pub is_run: bool,
    /// The entry posts to a virtual APIC.
    pub guest_mode: bool,
    /// Destination bits 23:0.
    #[bits(24)]
    pub destination_23_0: u32,
    /// What software calls the processor.
    pub ga_tag: u32,
    pub vector: u8,
    #[bits(4)]
    __: u8,
    /// The virtual APIC's backing page, address bits 51:12.
    #[bits(40)]
    pub backing_page: u64,
    #[bits(4)]
    __: u8,
    /// Destination bits 31:24.
    pub destination_31_24: u8,
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
        let every_field = IrteGa::new()
            .with_remap_en(true)
            .with_sup_iopf(true)
            .with_int_type(7)
            .with_rq_eoi(true)
            .with_dm(true)
            .with_guest_mode(true)
            .with_destination_23_0(0xff_ffff)
            .with_vector(0xff)
            .with_destination_31_24(0xff);
        assert_eq!(every_field.into_bits(), !IrteGa::RESERVED);
    }

    #[test]
    fn the_long_entry_of_a_virtual_apic_is_where_drivers_write_it() {
        let entry = IrteGuest::from_bits(0x0100_0012_3456_7041_89ab_cdef_0002_03c1);
        assert!(entry.remap_en() && entry.is_run() && entry.guest_mode() && !entry.gappi_dis());
        assert_eq!((entry.ga_tag(), entry.vector()), (0x89ab_cdef, 0x41));
        assert_eq!(entry.backing_page(), 0x0123_4567);
        assert_eq!((entry.destination_23_0(), entry.destination_31_24()), (0x203, 1));
    }
}
