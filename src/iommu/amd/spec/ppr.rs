//! PPR log records, 128 bits (section 2.6).

use bitfield_struct::bitfield;

/// A page service request.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Record {
    pub device: u16,
    pub pasid_15_0: u16,
    /// Page request group index.
    #[bits(9)]
    pub group: u16,
    /// The last request of its group.
    pub last: bool,
    #[bits(4)]
    pub pasid_19_16: u8,
    #[bits(3)]
    __: u8,
    /// To be executed.
    pub execute: bool,
    /// To be read.
    pub read: bool,
    #[bits(2)]
    __: u8,
    /// To be written.
    pub write: bool,
    /// By a user-mode request.
    pub user: bool,
    /// A reserved bit of the request was set.
    pub reserved: bool,
    /// The address is a guest virtual one of the PASID.
    pub gn: bool,
    #[bits(3)]
    __: u8,
    /// 1: page service request.
    #[bits(4)]
    pub code: u8,
    #[bits(12)]
    __: u16,
    /// Address bits 63:12.
    #[bits(52)]
    pub page: u64,
}

impl Record {
    /// `code` of a page service request.
    pub const PAGE_SERVICE_REQUEST: u8 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        let flags = |record: Record| record.into_bits() >> 48;
        assert_eq!(flags(Record::new().with_execute(true)), 0x002);
        assert_eq!(flags(Record::new().with_read(true)), 0x004);
        assert_eq!(flags(Record::new().with_write(true)), 0x020);
        assert_eq!(flags(Record::new().with_user(true)), 0x040);
        assert_eq!(flags(Record::new().with_reserved(true)), 0x080);
        assert_eq!(flags(Record::new().with_gn(true)), 0x100);
        assert_eq!(flags(Record::new().with_code(1)), 0x1000);
        assert_eq!(Record::new().with_group(0x1ff).into_bits(), 0x1ff << 32);
        assert_eq!(Record::new().with_last(true).into_bits(), 1 << 41);
        assert_eq!(Record::new().with_pasid_19_16(0xf).into_bits(), 0xf << 42);
        assert_eq!(
            Record::new().with_page((1 << 52) - 1).into_bits(),
            u128::MAX << 76
        );
    }
}
