//! Host (v1) and guest (v2) page table entries, and GCR3 table entries (sections 2.2.3 and 2.2.6).

use bitfield_struct::bitfield;

/// Host (v1) entry: a table pointer while `next_level` is 1 to 6, else a page (Tables 14 and 15).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct HostPte {
    /// Present; else every other bit is ignored.
    pub pr: bool,
    #[bits(4)]
    __: u8,
    /// Accessed.
    pub a: bool,
    /// Dirty, of a page.
    pub d: bool,
    #[bits(2)]
    __: u8,
    /// Level of the table pointed to; 0 a page of the level's size, 7 one whose size the address tells.
    #[bits(3)]
    pub next_level: u8,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(7)]
    __: u8,
    /// Devices may only use the page untranslated.
    pub u: bool,
    /// Coherence is forced.
    pub fc: bool,
    /// Reads allowed.
    pub ir: bool,
    /// Writes allowed.
    pub iw: bool,
    __: bool,
}

impl HostPte {
    /// Bits that must be 0 in a present page entry: 56:52.
    pub const RESERVED_LEAF: u64 = 0x1f << 52;
    /// Bits that must be 0 in a present table pointer: 60:52.
    pub const RESERVED_TABLE: u64 = 0x1ff << 52;
}

/// Guest (v2) entry, as x86-64 has it.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct GuestPte {
    /// Present, and readable.
    pub p: bool,
    /// Writes allowed.
    pub rw: bool,
    /// User requests allowed.
    pub us: bool,
    #[bits(2)]
    __: u8,
    /// Accessed.
    pub a: bool,
    /// Dirty, of a page.
    pub d: bool,
    /// A page rather than a table, at levels 2 and 3.
    pub ps: bool,
    #[bits(4)]
    __: u8,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(11)]
    __: u16,
    /// Not executable.
    pub nx: bool,
}

/// Entry of a GCR3 table: a further level of it, or the root of a guest table.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Gcr3Entry {
    pub valid: bool,
    #[bits(11)]
    __: u16,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_where_the_specification_puts_them() {
        assert_eq!(
            HostPte::new().with_pr(true).with_a(true).with_d(true).into_bits(),
            0x61
        );
        assert_eq!(HostPte::new().with_next_level(7).into_bits(), 0xe00);
        assert_eq!(
            HostPte::new().with_frame((1 << 40) - 1).into_bits(),
            0x000f_ffff_ffff_f000
        );
        assert_eq!(HostPte::new().with_u(true).into_bits(), 1 << 59);
        assert_eq!(HostPte::new().with_fc(true).into_bits(), 1 << 60);
        assert_eq!(HostPte::new().with_ir(true).into_bits(), 1 << 61);
        assert_eq!(HostPte::new().with_iw(true).into_bits(), 1 << 62);
        assert_eq!(HostPte::RESERVED_TABLE, 0x1ff0_0000_0000_0000);
    }

    #[test]
    fn guest_bits_are_where_the_specification_puts_them() {
        let all = GuestPte::new()
            .with_p(true)
            .with_rw(true)
            .with_us(true)
            .with_a(true)
            .with_d(true);
        assert_eq!(all.with_ps(true).into_bits(), 0xe7);
        assert_eq!(GuestPte::new().with_nx(true).into_bits(), 1 << 63);
        assert_eq!(
            GuestPte::new().with_frame((1 << 40) - 1).into_bits(),
            0x000f_ffff_ffff_f000
        );
        assert_eq!(
            Gcr3Entry::new().with_valid(true).with_frame(1).into_bits(),
            0x1001
        );
    }
}
