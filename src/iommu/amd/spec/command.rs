//! Command buffer entries, 128 bits (section 2.4).

use bitfield_struct::bitfield;

/// What an entry asks for, bits 63:60 of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opcode(pub u8);

impl Opcode {
    /// Section 2.4.1.
    pub const COMPLETION_WAIT: Self = Self(1);
    /// Section 2.4.2.
    pub const INVALIDATE_DEVTAB_ENTRY: Self = Self(2);
    /// Section 2.4.3.
    pub const INVALIDATE_IOMMU_PAGES: Self = Self(3);
    /// Section 2.4.4.
    pub const INVALIDATE_IOTLB_PAGES: Self = Self(4);
    /// Section 2.4.5.
    pub const INVALIDATE_INTERRUPT_TABLE: Self = Self(5);
    /// Section 2.4.6.
    pub const PREFETCH_IOMMU_PAGES: Self = Self(6);
    /// Section 2.4.7.
    pub const COMPLETE_PPR_REQUEST: Self = Self(7);
    /// Section 2.4.8.
    pub const INVALIDATE_IOMMU_ALL: Self = Self(8);
    /// Of the vIOMMU extension: a record for a guest's event log.
    pub const INSERT_GUEST_EVENT: Self = Self(9);
    /// Of the vIOMMU extension: a guest's registers as after reset.
    pub const RESET_VMMIO: Self = Self(10);
}

/// What every entry has.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Generic {
    #[bits(60)]
    __: u64,
    /// An [`Opcode`].
    #[bits(4)]
    pub opcode: u8,
    #[bits(64)]
    __: u64,
}

/// COMPLETION_WAIT.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct CompletionWait {
    /// Store `data` at the address.
    pub store: bool,
    /// Set ComWaitInt.
    pub interrupt: bool,
    /// Flush queued writes first.
    pub flush: bool,
    /// Store address, bits 51:3.
    #[bits(49)]
    pub address_51_3: u64,
    #[bits(8)]
    __: u8,
    #[bits(4)]
    pub opcode: u8,
    /// What to store.
    pub data: u64,
}

impl CompletionWait {
    /// Bits that must be 0.
    pub const RESERVED: u128 = 0xff << 52;
}

/// INVALIDATE_DEVTAB_ENTRY, and INVALIDATE_INTERRUPT_TABLE, which has the same form.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct InvalidateDevice {
    pub device: u16,
    #[bits(44)]
    __: u64,
    #[bits(4)]
    pub opcode: u8,
    #[bits(64)]
    __: u64,
}

impl InvalidateDevice {
    /// Bits that must be 0.
    pub const RESERVED: u128 = !(0xf << 60 | 0xffff);
}

/// INVALIDATE_IOMMU_PAGES.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct InvalidatePages {
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    __: u16,
    pub domain: u16,
    #[bits(12)]
    __: u16,
    #[bits(4)]
    pub opcode: u8,
    /// The address says how many pages.
    pub size: bool,
    /// Cached table entries that are not leaves too.
    pub pde: bool,
    /// The address is a guest virtual one of `pasid`.
    pub gn: bool,
    #[bits(9)]
    __: u16,
    /// Address bits 63:12.
    #[bits(52)]
    pub page: u64,
}

/// INVALIDATE_IOTLB_PAGES.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct InvalidateIotlb {
    pub device: u16,
    pub pasid_15_8: u8,
    /// Invalidations the device may have outstanding.
    pub max_pending: u8,
    pub queue: u16,
    pub pasid_7_0: u8,
    #[bits(4)]
    pub pasid_19_16: u8,
    #[bits(4)]
    pub opcode: u8,
    /// The address says how many pages.
    pub size: bool,
    __: bool,
    /// The address is a guest virtual one of the PASID.
    pub gn: bool,
    __: bool,
    #[bits(2)]
    pub kind: u8,
    #[bits(6)]
    __: u8,
    /// Address bits 63:12.
    #[bits(52)]
    pub page: u64,
}

impl InvalidateIotlb {
    /// The PASID, gathered from its three pieces.
    #[must_use]
    pub const fn pasid(self) -> u32 {
        (self.pasid_19_16() as u32) << 16 | (self.pasid_15_8() as u32) << 8 | self.pasid_7_0() as u32
    }
}

/// PREFETCH_IOMMU_PAGES.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Prefetch {
    pub device: u16,
    __: u8,
    /// Pages.
    pub count: u8,
    #[bits(20)]
    pub pasid: u32,
    #[bits(8)]
    __: u8,
    #[bits(4)]
    pub opcode: u8,
    /// The address says how large each page is.
    pub size: bool,
    __: bool,
    /// The address is a guest virtual one of `pasid`.
    pub gn: bool,
    __: bool,
    /// Drop what is cached first.
    pub invalidate: bool,
    #[bits(7)]
    __: u8,
    /// Address bits 63:12.
    #[bits(52)]
    pub page: u64,
}

/// COMPLETE_PPR_REQUEST.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct CompletePpr {
    pub device: u16,
    __: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(8)]
    __: u8,
    #[bits(4)]
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// The response carries the PASID.
    pub gn: bool,
    #[bits(29)]
    __: u32,
    /// Page request group index.
    #[bits(9)]
    pub group: u16,
    #[bits(3)]
    __: u8,
    /// 0 success, 1 invalid request, 15 failure.
    #[bits(4)]
    pub response: u8,
    __: u16,
}

/// INVALIDATE_IOMMU_ALL has nothing but an opcode: the bits that must be 0.
pub const INVALIDATE_ALL_RESERVED: u128 = !(0xf << 60);

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry from its four dwords, as the manual draws them.
    const fn dwords(d: [u32; 4]) -> u128 {
        d[0] as u128 | (d[1] as u128) << 32 | (d[2] as u128) << 64 | (d[3] as u128) << 96
    }

    #[test]
    fn a_completion_wait_is_where_the_specification_puts_it() {
        let wait = CompletionWait::from_bits(dwords([0x8765_4329, 0x100a_bcde, 0x1111_2222, 0x3333_4444]));
        assert!(wait.store() && !wait.interrupt() && !wait.flush());
        assert_eq!(wait.address_51_3() << 3, 0x000a_bcde_8765_4328);
        assert_eq!(wait.data(), 0x3333_4444_1111_2222);
        assert_eq!(wait.opcode(), 1);
        assert_eq!(CompletionWait::RESERVED, dwords([0, 0x0ff0_0000, 0, 0]));
    }

    #[test]
    fn invalidations_are_where_the_specification_puts_them() {
        let pages = InvalidatePages::from_bits(dwords([0x000a_bcde, 0x3000_1234, 0xffff_f007, 0x7fff_ffff]));
        assert_eq!(
            (pages.pasid(), pages.domain(), pages.opcode()),
            (0xa_bcde, 0x1234, 3)
        );
        assert!(pages.size() && pages.pde() && pages.gn());
        assert_eq!(pages.page() << 12, 0x7fff_ffff_ffff_f000);
        assert_eq!(
            InvalidateDevice::RESERVED,
            dwords([0xffff_0000, 0x0fff_ffff, !0, !0])
        );
        assert_eq!(INVALIDATE_ALL_RESERVED, dwords([!0, 0x0fff_ffff, !0, !0]));
    }

    #[test]
    fn the_pasid_of_an_iotlb_invalidation_is_gathered_from_three_pieces() {
        let raw = dwords([0x20cd_1234, 0x4aef_5678, 0x35, 0]);
        let command = InvalidateIotlb::from_bits(raw);
        assert_eq!(
            (command.device(), command.queue(), command.max_pending()),
            (0x1234, 0x5678, 0x20)
        );
        assert_eq!(command.pasid(), 0xa_cdef);
        assert!(command.size() && command.gn());
        assert_eq!(command.kind(), 3);
    }

    #[test]
    fn prefetches_and_page_responses_are_where_the_specification_puts_them() {
        let prefetch = Prefetch::from_bits(dwords([0x0500_0019, 0x600f_0001, 0x2015, 1]));
        assert_eq!(
            (prefetch.device(), prefetch.count(), prefetch.pasid()),
            (0x19, 5, 0xf_0001)
        );
        assert!(prefetch.size() && prefetch.gn() && prefetch.invalidate());
        assert_eq!(prefetch.page(), 0x10_0002);
        let response = CompletePpr::from_bits(dwords([0x19, 0x700f_0001, 4, 0xf105]));
        assert_eq!((response.device(), response.pasid()), (0x19, 0xf_0001));
        assert!(response.gn());
        assert_eq!((response.group(), response.response()), (0x105, 15));
    }
}
