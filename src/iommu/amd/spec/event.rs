//! Event log records, 128 bits (section 2.5).

use std::fmt;

use bitfield_struct::bitfield;

/// What a record reports, bits 63:60 of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Code(pub u8);

impl Code {
    /// Section 2.5.2.
    pub const ILLEGAL_DEV_TABLE_ENTRY: Self = Self(1);
    /// Section 2.5.3.
    pub const IO_PAGE_FAULT: Self = Self(2);
    /// Section 2.5.4.
    pub const DEV_TAB_HARDWARE_ERROR: Self = Self(3);
    /// Section 2.5.5.
    pub const PAGE_TAB_HARDWARE_ERROR: Self = Self(4);
    /// Section 2.5.6.
    pub const ILLEGAL_COMMAND_ERROR: Self = Self(5);
    /// Section 2.5.7.
    pub const COMMAND_HARDWARE_ERROR: Self = Self(6);
    /// Section 2.5.8.
    pub const IOTLB_INV_TIMEOUT: Self = Self(7);
    /// Section 2.5.9.
    pub const INVALID_DEVICE_REQUEST: Self = Self(8);
    /// Section 2.5.10.
    pub const INVALID_PPR_REQUEST: Self = Self(9);
    /// Of the vIOMMU extension: an event or a page request could not be written to a guest's log.
    pub const GUEST_EVENT_FAULT: Self = Self(11);
    /// Of the vIOMMU extension: what serves a guest could not be read or written.
    pub const VIOMMU_HARDWARE_ERROR: Self = Self(12);
}

/// As the manual calls it, in lower case; `code N` where it calls it nothing we report.
impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::ILLEGAL_DEV_TABLE_ENTRY => "illegal_dev_table_entry",
            Self::IO_PAGE_FAULT => "io_page_fault",
            Self::DEV_TAB_HARDWARE_ERROR => "dev_tab_hardware_error",
            Self::PAGE_TAB_HARDWARE_ERROR => "page_tab_hardware_error",
            Self::ILLEGAL_COMMAND_ERROR => "illegal_command_error",
            Self::COMMAND_HARDWARE_ERROR => "command_hardware_error",
            Self::IOTLB_INV_TIMEOUT => "iotlb_inv_timeout",
            Self::INVALID_DEVICE_REQUEST => "invalid_device_request",
            Self::INVALID_PPR_REQUEST => "invalid_ppr_request",
            Self::GUEST_EVENT_FAULT => "guest_event_fault",
            Self::VIOMMU_HARDWARE_ERROR => "viommu_hardware_error",
            Self(other) => return write!(f, "code {other}"),
        };
        f.write_str(name)
    }
}

/// What records 1 to 8 have in common. A bit that a code does not define is 0 in records of that code.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Record {
    pub device: u16,
    /// PASID bits 19:16 when `gn`.
    #[bits(4)]
    pub pasid_19_16: u8,
    #[bits(12)]
    __: u16,
    /// PASID bits 15:0 when `gn`, else the DomainID.
    pub domain: u16,
    /// The address is a guest virtual one.
    pub gn: bool,
    /// Execution was refused.
    pub nx: bool,
    /// A user request met a supervisor page.
    pub us: bool,
    /// The request was an interrupt.
    pub i: bool,
    /// The entry was present.
    pub pr: bool,
    /// The request was a write.
    pub rw: bool,
    /// The permissions did not suffice.
    pub pe: bool,
    /// A reserved bit was set.
    pub rz: bool,
    /// The request was a translation request.
    pub tr: bool,
    /// Kind of hardware error or invalid request.
    #[bits(3)]
    pub kind: u8,
    #[bits(4)]
    pub code: u8,
    pub address: u64,
}

impl Record {
    /// `kind` of a hardware error: the target did not answer.
    pub const TARGET_ABORT: u8 = 2;
}

/// INVALID_PPR_REQUEST.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct InvalidPpr {
    pub device: u16,
    pub pasid_15_0: u16,
    /// Group index and more of the request's tag.
    #[bits(10)]
    pub tag: u16,
    #[bits(4)]
    pub pasid_19_16: u8,
    #[bits(2)]
    __: u8,
    /// The unit has answered already.
    pub rx: bool,
    #[bits(8)]
    __: u8,
    /// The request carried a PASID.
    pub gn: bool,
    #[bits(2)]
    __: u8,
    #[bits(4)]
    pub code: u8,
    pub address: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn flags(record: Record) -> u128 {
        record.into_bits() >> 48
    }

    #[test]
    fn flags_are_where_linux_prints_them() {
        assert_eq!(flags(Record::new().with_gn(true)), 0x001);
        assert_eq!(flags(Record::new().with_nx(true)), 0x002);
        assert_eq!(flags(Record::new().with_us(true)), 0x004);
        assert_eq!(flags(Record::new().with_i(true)), 0x008);
        assert_eq!(flags(Record::new().with_pr(true)), 0x010);
        assert_eq!(flags(Record::new().with_rw(true)), 0x020);
        assert_eq!(flags(Record::new().with_pe(true)), 0x040);
        assert_eq!(flags(Record::new().with_rz(true)), 0x080);
        assert_eq!(flags(Record::new().with_tr(true)), 0x100);
        assert_eq!(flags(Record::new().with_kind(7)), 0xe00);
    }

    #[test]
    fn device_code_and_address_are_where_the_specification_puts_them() {
        let record = Record::new()
            .with_device(0x0219)
            .with_domain(7)
            .with_rw(true)
            .with_code(Code::IO_PAGE_FAULT.0)
            .with_address(0x1_2345_6000);
        assert_eq!(record.into_bits(), 0x0000_0001_2345_6000_2020_0007_0000_0219);
    }

    #[test]
    fn an_invalid_page_request_splits_its_pasid() {
        let record = InvalidPpr::new()
            .with_device(0x0219)
            .with_pasid_15_0(0x5678)
            .with_pasid_19_16(0xa)
            .with_tag(0x105)
            .with_rx(true)
            .with_gn(true)
            .with_code(Code::INVALID_PPR_REQUEST.0);
        assert_eq!(record.into_bits(), 0x9201_2905_5678_0219);
    }
}
