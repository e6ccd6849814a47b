//! Device table entry, 256 bits (section 2.2.2, Tables 7 and 8).

use bitfield_struct::bitfield;

/// Quadword 0: what is translated, and the host table.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Host {
    /// The entry means something; else DMA passes untranslated.
    pub v: bool,
    /// The translation fields mean something; else DMA is blocked.
    pub tv: bool,
    #[bits(5)]
    __: u8,
    /// Access and dirty updates in the host table: 0 none, 1 access, 3 both.
    #[bits(2)]
    pub had: u8,
    /// Levels of the host table, 0 none.
    #[bits(3)]
    pub mode: u8,
    /// Host table root, bits 51:12.
    #[bits(40)]
    pub root: u64,
    /// Page requests are accepted.
    pub ppr: bool,
    /// PPR responses carry the PASID.
    pub gprp: bool,
    /// Requests without PASID use the guest table of PASID 0.
    pub giov: bool,
    /// The guest fields mean something.
    pub gv: bool,
    /// Levels of the GCR3 table, less one.
    #[bits(2)]
    pub glx: u8,
    /// GCR3 root, bits 14:12.
    #[bits(3)]
    pub gcr3_14_12: u8,
    /// Reads allowed.
    pub ir: bool,
    /// Writes allowed.
    pub iw: bool,
    __: bool,
}

impl Host {
    /// Bits that must be 0 in an entry that is used.
    pub const RESERVED: u64 = 0x8000_0000_0000_007c;
}

/// Quadword 1: domain and guest table.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Guest {
    /// Tag of everything cached for this entry.
    pub domain: u16,
    /// GCR3 root, bits 30:15.
    pub gcr3_30_15: u16,
    /// The device may translate by itself (ATS) and send translated requests.
    pub iotlb: bool,
    /// Log only the first page fault.
    pub se: bool,
    /// Log no page fault.
    pub sa: bool,
    #[bits(2)]
    pub io_ctl: u8,
    pub cache: bool,
    pub sd: bool,
    /// The exclusion range applies.
    pub ex: bool,
    #[bits(2)]
    pub sys_mgt: u8,
    pub sats: bool,
    /// GCR3 root, bits 51:31.
    #[bits(21)]
    pub gcr3_51_31: u32,
}

/// Quadword 2: interrupts, and the format of guest tables.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Interrupt {
    /// The interrupt fields mean something; else interrupts pass unchanged.
    pub iv: bool,
    /// Logarithm of the number of entries, 0 to 11.
    #[bits(4)]
    pub table_length: u8,
    /// Log no fault of interrupts.
    pub ig: bool,
    /// Table root, bits 51:6.
    #[bits(46)]
    pub root: u64,
    #[bits(2)]
    __: u8,
    /// Guest tables: 0 four levels, 1 five.
    #[bits(2)]
    pub guest_paging_mode: u8,
    /// INIT passes.
    pub init_pass: bool,
    /// ExtINT passes.
    pub eint_pass: bool,
    /// NMI passes.
    pub nmi_pass: bool,
    pub hpt_mode: bool,
    /// Fixed and arbitrated interrupts: 0 aborted, 1 forwarded, 2 remapped.
    #[bits(2)]
    pub int_ctl: u8,
    pub lint0_pass: bool,
    pub lint1_pass: bool,
}

impl Interrupt {
    /// Bits that must be 0 in an entry that is used.
    pub const RESERVED: u64 = 0x0030_0000_0000_0000;
}

/// Quadword 3: identities under a hardware vIOMMU, and attribute overrides.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Attribute {
    #[bits(15)]
    __: u16,
    pub vimu_en: bool,
    pub guest_id: u16,
    pub guest_device_id: u16,
    #[bits(6)]
    __: u8,
    pub attr_v: bool,
    pub mode0_fc: bool,
    pub snoop: u8,
}

impl Attribute {
    /// Bits that must be 0 in an entry that is used.
    pub const RESERVED: u64 = 0x003f_0000_0000_7fff;
}

/// A whole entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dte {
    /// Quadword 0.
    pub host: Host,
    /// Quadword 1.
    pub guest: Guest,
    /// Quadword 2.
    pub interrupt: Interrupt,
    /// Quadword 3.
    pub attribute: Attribute,
}

const _: () = assert!(size_of::<Dte>() as u64 == Dte::LEN);

impl Dte {
    /// Bytes of an entry.
    pub const LEN: u64 = 32;

    /// From the four quadwords in memory.
    #[must_use]
    pub const fn from_quadwords(quadwords: [u64; 4]) -> Self {
        Self {
            host: Host::from_bits(quadwords[0]),
            guest: Guest::from_bits(quadwords[1]),
            interrupt: Interrupt::from_bits(quadwords[2]),
            attribute: Attribute::from_bits(quadwords[3]),
        }
    }

    /// As the four quadwords in memory.
    #[must_use]
    pub const fn into_quadwords(self) -> [u64; 4] {
        [
            self.host.into_bits(),
            self.guest.into_bits(),
            self.interrupt.into_bits(),
            self.attribute.into_bits(),
        ]
    }

    /// The GCR3 root, gathered from its three pieces.
    #[must_use]
    pub const fn gcr3_root(self) -> u64 {
        (self.guest.gcr3_51_31() as u64) << 31
            | (self.guest.gcr3_30_15() as u64) << 15
            | (self.host.gcr3_14_12() as u64) << 12
    }

    /// This entry with another GCR3 root; bits of `root` outside 51:12 are dropped.
    #[must_use]
    pub const fn with_gcr3_root(self, root: u64) -> Self {
        let [host, guest, interrupt, attribute] = self.into_quadwords();
        let host = host & !(7 << 58) | (root >> 12 & 7) << 58;
        let guest = guest & !(0xffff << 16 | 0x1f_ffff << 43)
            | (root >> 15 & 0xffff) << 16
            | (root >> 31 & 0x1f_ffff) << 43;
        Self::from_quadwords([host, guest, interrupt, attribute])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translation_bits_are_where_the_specification_puts_them() {
        assert_eq!(Host::new().with_v(true).with_tv(true).into_bits(), 3);
        assert_eq!(Host::new().with_had(3).into_bits(), 0x180);
        assert_eq!(Host::new().with_mode(7).into_bits(), 0xe00);
        assert_eq!(
            Host::new().with_root(0xff_ffff_ffff).into_bits(),
            0x000f_ffff_ffff_f000
        );
        assert_eq!(Host::new().with_ppr(true).into_bits(), 1 << 52);
        assert_eq!(Host::new().with_giov(true).into_bits(), 1 << 54);
        assert_eq!(Host::new().with_gv(true).into_bits(), 1 << 55);
        assert_eq!(Host::new().with_glx(3).into_bits(), 3 << 56);
        assert_eq!(Host::new().with_ir(true).into_bits(), 1 << 61);
        assert_eq!(Host::new().with_iw(true).into_bits(), 1 << 62);
        assert_eq!(Guest::new().with_iotlb(true).into_bits(), 1 << 32);
        assert_eq!(Guest::new().with_se(true).into_bits(), 1 << 33);
        assert_eq!(Guest::new().with_sa(true).into_bits(), 1 << 34);
        assert_eq!(Guest::new().with_ex(true).into_bits(), 1 << 39);
        assert_eq!(Guest::new().with_sys_mgt(3).into_bits(), 3 << 40);
    }

    #[test]
    fn interrupt_bits_are_where_the_specification_puts_them() {
        assert_eq!(Interrupt::new().with_iv(true).into_bits(), 1);
        assert_eq!(Interrupt::new().with_table_length(15).into_bits(), 0x1e);
        assert_eq!(Interrupt::new().with_ig(true).into_bits(), 1 << 5);
        assert_eq!(
            Interrupt::new().with_root((1 << 46) - 1).into_bits(),
            0x000f_ffff_ffff_ffc0
        );
        assert_eq!(Interrupt::new().with_guest_paging_mode(3).into_bits(), 3 << 54);
        assert_eq!(Interrupt::new().with_init_pass(true).into_bits(), 1 << 56);
        assert_eq!(Interrupt::new().with_eint_pass(true).into_bits(), 1 << 57);
        assert_eq!(Interrupt::new().with_nmi_pass(true).into_bits(), 1 << 58);
        assert_eq!(Interrupt::new().with_int_ctl(3).into_bits(), 3 << 60);
        assert_eq!(Interrupt::new().with_lint1_pass(true).into_bits(), 1 << 63);
        assert_eq!(Attribute::new().with_vimu_en(true).into_bits(), 1 << 15);
        assert_eq!(Attribute::new().with_mode0_fc(true).into_bits(), 1 << 55);
    }

    #[test]
    fn the_gcr3_root_survives_its_three_pieces() {
        let root = 0x000a_5a5a_5a5a_5000;
        let entry = Dte::default().with_gcr3_root(root);
        assert_eq!(entry.gcr3_root(), root);
        assert_eq!(
            Dte::from_quadwords([u64::MAX; 4]).with_gcr3_root(0).gcr3_root(),
            0
        );
        let rest = Dte::from_quadwords([u64::MAX; 4]).with_gcr3_root(0);
        assert_eq!(rest.host.into_bits(), !(7 << 58));
        assert_eq!(rest.guest.into_bits(), 0x0000_07ff_0000_ffff);
    }
}
