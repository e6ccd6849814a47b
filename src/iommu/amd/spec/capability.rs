//! The capability block in configuration space (section 3.2, capability 0Fh) and the fields of it that MMIO
//! mirrors.

use bitfield_struct::bitfield;

/// Capability ID: Secure Device.
pub const ID: u8 = 0x0f;

/// Bytes of the block, Misc Information 1 included.
pub const LEN: u16 = 0x18;

/// Capability Header, offset 00h, less the ID and the link that the capability list writes.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Header {
    /// ID and next pointer, kept by the list.
    pub link: u16,
    /// 3: IOMMU.
    #[bits(3)]
    pub kind: u8,
    /// 1.
    #[bits(5)]
    pub revision: u8,
    /// Devices may keep IOTLBs (ATS).
    pub iotlb: bool,
    /// HyperTransport tunnel.
    pub ht_tunnel: bool,
    /// Entries that are not present may be cached.
    pub np_cache: bool,
    /// The Extended Feature register exists.
    pub efr: bool,
    /// Misc Information 1 exists.
    pub extended: bool,
    #[bits(3)]
    __: u8,
}

/// Base Address Low, offset 04h.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct BaseLow {
    /// The unit answers at this address, and both address registers are read-only from now on.
    pub enable: bool,
    #[bits(13)]
    __: u16,
    /// Address bits 31:14.
    #[bits(18)]
    pub base_31_14: u32,
}

/// Range, offset 0Ch.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Range {
    #[bits(5)]
    pub unit_id: u8,
    #[bits(2)]
    __: u8,
    /// The rest means something.
    pub valid: bool,
    pub bus: u8,
    pub first_function: u8,
    pub last_function: u8,
}

/// Misc Information 0, offset 10h.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Misc0 {
    /// MSI message of event log and completion interrupts.
    #[bits(5)]
    pub msi: u8,
    /// Guest virtual address size: 2 is 48 bits.
    #[bits(3)]
    pub gva_size: u8,
    /// Physical address size in bits.
    #[bits(7)]
    pub pa_size: u8,
    /// Virtual address size in bits.
    #[bits(7)]
    pub va_size: u8,
    pub ht_ats_reserved: bool,
    #[bits(4)]
    __: u8,
    /// MSI message of PPR log interrupts.
    #[bits(5)]
    pub msi_ppr: u8,
}

/// Bytes of the vendor-specific capability of a unit that serves guests, which says where the guests' registers are.
///
/// Dword 0 is the header, dwords 2 and 3 are where the guests' pages are (VF MMIO), and dwords 4 and 5 where the host
/// controls them (VF control MMIO). Drivers read no more: dword 1 is 0 here, and the header as of any such capability.
pub const GUESTS_LEN: u16 = 0x18;

/// The lower half of either address.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GuestsLow {
    /// The registers answer there.
    pub enable: bool,
    #[bits(11)]
    __: u16,
    /// Address bits 31:12.
    #[bits(20)]
    pub base_31_12: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        assert_eq!(Header::new().with_kind(7).into_bits(), 7 << 16);
        assert_eq!(Header::new().with_revision(1).into_bits(), 1 << 19);
        assert_eq!(Header::new().with_iotlb(true).into_bits(), 1 << 24);
        assert_eq!(Header::new().with_np_cache(true).into_bits(), 1 << 26);
        assert_eq!(Header::new().with_efr(true).into_bits(), 1 << 27);
        assert_eq!(Header::new().with_extended(true).into_bits(), 1 << 28);
        assert_eq!(BaseLow::new().with_base_31_14(0x3_ffff).into_bits(), 0xffff_c000);
        assert_eq!(Misc0::new().with_msi_ppr(31).into_bits(), 31 << 27);
    }

    #[test]
    fn a_published_board_reads_back_as_its_sizes() {
        let misc = Misc0::from_bits(0x0020_3040);
        assert_eq!((misc.pa_size(), misc.va_size(), misc.gva_size()), (48, 64, 2));
    }
}
