//! MMIO registers, bit by bit (section 3.4).

use bitfield_struct::bitfield;

/// Bytes of MMIO that a unit without performance counters decodes, and what their address is a multiple of.
pub const MMIO_LEN: u64 = 0x4000;

/// An aligned quadword of MMIO that holds at least one register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Reg {
    /// Device Table Base, also of segment 0.
    DeviceTableBase,
    /// Command Buffer Base.
    CommandBase,
    /// Event Log Base.
    EventBase,
    /// Control.
    Control,
    /// Exclusion Base.
    ExclusionBase,
    /// Exclusion Range Limit.
    ExclusionLimit,
    /// Extended Feature.
    Efr,
    /// PPR Log Base.
    PprBase,
    /// Device Table Segment 1 to 7 Base.
    SegmentBase(Segment),
    /// Misc 0 and Misc 1, mirrors of the capability block.
    Misc,
    /// MSI capability header, and lower message address, mirrors of configuration space.
    MsiHeaderAddress,
    /// Upper message address, and message data.
    MsiAddressData,
    /// x2APIC Control of event-log and completion interrupts.
    XtEvent,
    /// x2APIC Control of PPR-log interrupts.
    XtPpr,
    /// x2APIC Control of GA-log interrupts.
    XtGa,
    /// Extended Feature 2.
    Efr2,
    /// Command Buffer Head Pointer.
    CommandHead,
    /// Command Buffer Tail Pointer.
    CommandTail,
    /// Event Log Head Pointer.
    EventHead,
    /// Event Log Tail Pointer.
    EventTail,
    /// Status.
    Status,
    /// PPR Log Head Pointer.
    PprHead,
    /// PPR Log Tail Pointer.
    PprTail,
}

/// Number of a further segment of the device table, 1 to 7.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Segment(u8);

impl Segment {
    /// The segment whose base register lies at `offset`, 100h to 130h.
    const fn at(offset: u64) -> Option<Self> {
        match offset {
            0x100 => Some(Self(1)),
            0x108 => Some(Self(2)),
            0x110 => Some(Self(3)),
            0x118 => Some(Self(4)),
            0x120 => Some(Self(5)),
            0x128 => Some(Self(6)),
            0x130 => Some(Self(7)),
            _ => None,
        }
    }

    /// Its place among the seven, 0 to 6.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize - 1
    }

    /// Largest value of its size field (section 3.4.17: the more segments, the shorter each).
    #[must_use]
    pub const fn largest_size(self) -> u16 {
        match self.0 {
            1 => 0xff,
            2 | 3 => 0x7f,
            _ => 0x3f,
        }
    }
}

impl Reg {
    /// Bytes from 2000h on that hold every register which changes while the unit runs.
    pub const RUNNING_LEN: u64 = 0x40;
    /// Where these begin: a page of MMIO that reading changes nothing of.
    pub const RUNNING_AT: u64 = 0x2000;
    /// Where the command buffer's tail is: the doorbell.
    pub const COMMAND_TAIL_AT: u64 = 0x2008;

    /// The quadword at `offset`, which must be a multiple of 8; `None` where there is no register.
    #[must_use]
    pub const fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x0000 => Self::DeviceTableBase,
            0x0008 => Self::CommandBase,
            0x0010 => Self::EventBase,
            0x0018 => Self::Control,
            0x0020 => Self::ExclusionBase,
            0x0028 => Self::ExclusionLimit,
            0x0030 => Self::Efr,
            0x0038 => Self::PprBase,
            0x0150 => Self::Misc,
            0x0158 => Self::MsiHeaderAddress,
            0x0160 => Self::MsiAddressData,
            0x0170 => Self::XtEvent,
            0x0178 => Self::XtPpr,
            0x0180 => Self::XtGa,
            0x01a0 => Self::Efr2,
            0x2000 => Self::CommandHead,
            Self::COMMAND_TAIL_AT => Self::CommandTail,
            0x2010 => Self::EventHead,
            0x2018 => Self::EventTail,
            0x2020 => Self::Status,
            0x2030 => Self::PprHead,
            0x2038 => Self::PprTail,
            _ => match Segment::at(offset) {
                Some(segment) => Self::SegmentBase(segment),
                None => return None,
            },
        })
    }
}

/// Device Table Base, MMIO 0000h, and the segment bases (sections 3.4.1 and 3.4.17).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct DeviceTableBase {
    /// 4 KiB pages of the table, less one.
    #[bits(9)]
    pub size: u16,
    #[bits(3)]
    __: u8,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

impl DeviceTableBase {
    /// Bits a guest can write.
    pub const WRITABLE: u64 = Self::new()
        .with_size(0x1ff)
        .with_frame(0xff_ffff_ffff)
        .into_bits();
}

/// Base of the command buffer, event log or PPR log (MMIO 0008h, 0010h, 0038h; section 3.4.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct RingBase {
    #[bits(12)]
    __: u16,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(4)]
    __: u8,
    /// Logarithm of the number of entries, 8 to 15; less is reserved.
    #[bits(4)]
    pub length: u8,
    #[bits(4)]
    __: u8,
}

impl RingBase {
    /// Bits a guest can write.
    pub const WRITABLE: u64 = Self::new()
        .with_frame(0xff_ffff_ffff)
        .with_length(0xf)
        .into_bits();
    /// After reset: no address, 256 entries.
    pub const RESET: Self = Self::new().with_length(8);
}

/// Head or tail of a ring whose entries have 16 bytes (MMIO 2000h to 2038h).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct RingPointer {
    #[bits(4)]
    __: u8,
    /// Entry, counted from the base.
    #[bits(15)]
    pub entry: u16,
    #[bits(45)]
    __: u64,
}

impl RingPointer {
    /// Bits a guest can write.
    pub const WRITABLE: u64 = Self::new().with_entry(0x7fff).into_bits();
}

/// Control, MMIO 0018h (section 3.4.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Control {
    /// The unit translates and remaps; off, everything passes.
    pub iommu_en: bool,
    /// HyperTransport tunnel traffic is translated.
    pub ht_tun_en: bool,
    /// Event log on.
    pub event_log_en: bool,
    /// Event log interrupts on.
    pub event_int_en: bool,
    /// COMPLETION_WAIT interrupts on.
    pub com_wait_int_en: bool,
    /// How long a device may take to acknowledge an invalidation: 0 for ever, then 1 ms times 10 each.
    #[bits(3)]
    pub inv_timeout: u8,
    /// PassPW of requests.
    pub pass_pw: bool,
    /// PassPW of responses.
    pub res_pass_pw: bool,
    /// Device table reads are snooped.
    pub coherent: bool,
    /// Isochronous requests.
    pub isoc: bool,
    /// Command buffer on.
    pub cmd_buf_en: bool,
    /// PPR log on.
    pub ppr_log_en: bool,
    /// PPR log interrupts on.
    pub ppr_int_en: bool,
    /// Page requests are accepted.
    pub ppr_en: bool,
    /// Guest (v2) translation on.
    pub gt_en: bool,
    /// 128-bit interrupt remapping entries.
    pub ga_en: bool,
    #[bits(7)]
    __: u8,
    /// Guest virtual APIC mode.
    #[bits(3)]
    pub gam_en: u8,
    /// GA log on.
    pub ga_log_en: bool,
    /// GA log interrupts on.
    pub ga_int_en: bool,
    #[bits(2)]
    pub dual_ppr_log_en: u8,
    #[bits(2)]
    pub dual_event_log_en: u8,
    /// Logarithm of the number of device table segments.
    #[bits(3)]
    pub dev_tbl_seg_en: u8,
    #[bits(2)]
    pub priv_abrt_en: u8,
    pub ppr_auto_rsp_en: bool,
    pub marc_en: bool,
    pub blk_stop_mrk_en: bool,
    pub ppr_auto_rsp_aon: bool,
    /// Interrupt remapping tables: 0 up to 512 entries, 1 up to 2,048.
    #[bits(2)]
    pub num_int_remap_mode: u8,
    /// Enhanced PPR handling.
    pub eph_en: bool,
    /// Global mode of host access and dirty updates.
    #[bits(2)]
    pub had_update: u8,
    /// No dirty updates in guest (v2) tables.
    pub gd_update_dis: bool,
    __: bool,
    /// 32-bit destinations in interrupt remapping entries.
    pub xt_en: bool,
    /// The unit's own interrupts come from the x2APIC registers.
    pub int_cap_xt_en: bool,
    pub vcmd_en: bool,
    pub viommu_en: bool,
    /// No access updates in guest (v2) tables.
    pub ga_update_dis: bool,
    pub gappi_en: bool,
    pub tmpm_en: bool,
    __: bool,
    /// GCR3 roots are guest physical: translated by the host table.
    pub gcr3_trp_mode: bool,
    /// Interrupt remapping entries are not cached.
    pub irt_cache_dis: bool,
    pub gst_buffer_trp_mode: bool,
    #[bits(3)]
    pub snp_avic_en: u8,
}

impl Control {
    /// After reset: only Coherent.
    pub const RESET: Self = Self::new().with_coherent(true);
}

/// Exclusion Base, MMIO 0020h (section 3.4.5).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ExclusionBase {
    /// The range is in force.
    pub enable: bool,
    /// For every device, not only those whose entry allows it.
    pub allow: bool,
    #[bits(10)]
    __: u16,
    /// Address bits 51:12.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

impl ExclusionBase {
    /// Bits a guest can write.
    pub const WRITABLE: u64 = Self::new()
        .with_enable(true)
        .with_allow(true)
        .with_frame(0xff_ffff_ffff)
        .into_bits();
}

/// Exclusion Range Limit, MMIO 0028h (section 3.4.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ExclusionLimit {
    #[bits(12)]
    __: u16,
    /// Address bits 51:12 of the last page.
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

impl ExclusionLimit {
    /// Bits a guest can write.
    pub const WRITABLE: u64 = Self::new().with_frame(0xff_ffff_ffff).into_bits();
}

/// Extended Feature, MMIO 0030h (section 3.4.7).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Efr {
    /// PREFETCH_IOMMU_PAGES.
    pub prefetch: bool,
    /// Page requests.
    pub ppr: bool,
    /// x2APIC: 32-bit destinations.
    pub xt: bool,
    /// No-execute in guest tables.
    pub nx: bool,
    /// Guest (v2) translation.
    pub gt: bool,
    __: bool,
    /// INVALIDATE_IOMMU_ALL.
    pub ia: bool,
    /// 128-bit interrupt remapping entries.
    pub ga: bool,
    /// Hardware error registers.
    pub he: bool,
    /// Performance counters.
    pub pc: bool,
    /// Levels of host (v1) tables: 0 four, 1 five, 2 six.
    #[bits(2)]
    pub hats: u8,
    /// Levels of guest (v2) tables: 0 four, 1 five.
    #[bits(2)]
    pub gats: u8,
    /// Levels of the GCR3 table: 0 one, 1 two, 2 three.
    #[bits(2)]
    pub glx: u8,
    #[bits(5)]
    __: u8,
    /// Guest virtual APIC modes.
    #[bits(3)]
    pub gam: u8,
    #[bits(8)]
    __: u8,
    /// PASID bits, less one.
    #[bits(5)]
    pub pas_max: u8,
    __: bool,
    /// Logarithm of the largest number of device table segments.
    #[bits(2)]
    pub dev_tbl_seg: u8,
    #[bits(6)]
    __: u8,
    /// The MSI capability is mirrored in MMIO.
    pub msi_cap_mmio: bool,
    __: bool,
    /// Guest translation of requests without PASID.
    pub gio: bool,
    /// Access bits in host tables.
    pub ha: bool,
    /// Enhanced PPR handling.
    pub eph: bool,
    __: bool,
    /// Dirty bits in host tables.
    pub hd: bool,
    #[bits(2)]
    __: u8,
    pub viommu: bool,
    #[bits(7)]
    __: u8,
    pub snp: bool,
}

/// Extended Feature 2, MMIO 01A0h.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Efr2 {
    #[bits(3)]
    __: u8,
    /// GCR3 roots may be guest physical.
    pub gcr3_trp_mode: bool,
    #[bits(4)]
    __: u8,
    /// Interrupt remapping tables of up to: 0 512 entries, 1 2,048.
    #[bits(2)]
    pub num_int_remap: u8,
    __: bool,
    /// The HyperTransport address range is ordinary memory.
    pub ht_range_ignore: bool,
    #[bits(52)]
    __: u64,
}

/// Status, MMIO 2020h (section 3.4.22).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Status {
    /// An event was lost.
    pub event_overflow: bool,
    /// An event was logged.
    pub event_log_int: bool,
    /// A COMPLETION_WAIT asked for an interrupt.
    pub com_wait_int: bool,
    /// The event log accepts records.
    pub event_log_run: bool,
    /// Commands are fetched.
    pub cmd_buf_run: bool,
    /// A page request was lost.
    pub ppr_overflow: bool,
    /// A page request was logged.
    pub ppr_int: bool,
    /// The PPR log accepts records.
    pub ppr_log_run: bool,
    #[bits(56)]
    __: u64,
}

impl Status {
    /// Bits the guest clears by writing one to them.
    pub const W1C: u64 = Self::new()
        .with_event_overflow(true)
        .with_event_log_int(true)
        .with_com_wait_int(true)
        .with_ppr_overflow(true)
        .with_ppr_int(true)
        .into_bits();
}

/// x2APIC Interrupt Control, MMIO 0170h, 0178h and 0180h (section 3.4.14).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct XtInterrupt {
    #[bits(2)]
    __: u8,
    /// Destination mode: logical rather than physical.
    pub logical: bool,
    #[bits(5)]
    __: u8,
    /// Destination bits 23:0.
    #[bits(24)]
    pub destination_23_0: u32,
    /// Vector; 0 sends nothing.
    pub vector: u8,
    /// Delivery mode: arbitrated (lowest priority) rather than fixed.
    pub arbitrated: bool,
    #[bits(15)]
    __: u16,
    /// Destination bits 31:24.
    pub destination_31_24: u8,
}

impl XtInterrupt {
    /// Bits a guest can write.
    pub const WRITABLE: u64 = Self::new()
        .with_logical(true)
        .with_destination_23_0(0xff_ffff)
        .with_vector(0xff)
        .with_arbitrated(true)
        .with_destination_31_24(0xff)
        .into_bits();

    /// The 32-bit destination, gathered from its two pieces.
    #[must_use]
    pub const fn destination(self) -> u32 {
        (self.destination_31_24() as u32) << 24 | self.destination_23_0()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_the_specification_puts_them() {
        assert_eq!(DeviceTableBase::WRITABLE, 0x000f_ffff_ffff_f1ff);
        assert_eq!(RingBase::WRITABLE, 0x0f0f_ffff_ffff_f000);
        assert_eq!(RingBase::RESET.into_bits(), 0x0800_0000_0000_0000);
        assert_eq!(RingPointer::WRITABLE, 0x7_fff0);
        assert_eq!(Control::RESET.into_bits(), 0x400);
        assert_eq!(ExclusionBase::WRITABLE, 0x000f_ffff_ffff_f003);
        assert_eq!(ExclusionLimit::WRITABLE, 0x000f_ffff_ffff_f000);
        assert_eq!(Status::W1C, 0x67);
        assert_eq!(XtInterrupt::WRITABLE, 0xff00_01ff_ffff_ff04);
    }

    #[test]
    fn control_bits_are_where_the_specification_puts_them() {
        let bit = |control: Control| control.into_bits().trailing_zeros();
        assert_eq!(bit(Control::new().with_iommu_en(true)), 0);
        assert_eq!(bit(Control::new().with_event_log_en(true)), 2);
        assert_eq!(bit(Control::new().with_event_int_en(true)), 3);
        assert_eq!(bit(Control::new().with_com_wait_int_en(true)), 4);
        assert_eq!(Control::new().with_inv_timeout(7).into_bits(), 0xe0);
        assert_eq!(bit(Control::new().with_cmd_buf_en(true)), 12);
        assert_eq!(bit(Control::new().with_ppr_log_en(true)), 13);
        assert_eq!(bit(Control::new().with_ppr_int_en(true)), 14);
        assert_eq!(bit(Control::new().with_ppr_en(true)), 15);
        assert_eq!(bit(Control::new().with_gt_en(true)), 16);
        assert_eq!(bit(Control::new().with_ga_en(true)), 17);
        assert_eq!(Control::new().with_gam_en(7).into_bits(), 7 << 25);
        assert_eq!(bit(Control::new().with_ga_log_en(true)), 28);
        assert_eq!(Control::new().with_dev_tbl_seg_en(7).into_bits(), 7 << 34);
        assert_eq!(bit(Control::new().with_ppr_auto_rsp_en(true)), 39);
        assert_eq!(Control::new().with_num_int_remap_mode(3).into_bits(), 3 << 43);
        assert_eq!(bit(Control::new().with_eph_en(true)), 45);
        assert_eq!(bit(Control::new().with_gd_update_dis(true)), 48);
        assert_eq!(bit(Control::new().with_xt_en(true)), 50);
        assert_eq!(bit(Control::new().with_int_cap_xt_en(true)), 51);
        assert_eq!(bit(Control::new().with_ga_update_dis(true)), 54);
        assert_eq!(bit(Control::new().with_gcr3_trp_mode(true)), 58);
        assert_eq!(bit(Control::new().with_irt_cache_dis(true)), 59);
        assert_eq!(Control::new().with_snp_avic_en(7).into_bits(), 7 << 61);
    }

    #[test]
    fn feature_bits_are_where_the_specification_puts_them() {
        let bit = |efr: Efr| efr.into_bits().trailing_zeros();
        assert_eq!(bit(Efr::new().with_ppr(true)), 1);
        assert_eq!(bit(Efr::new().with_xt(true)), 2);
        assert_eq!(bit(Efr::new().with_gt(true)), 4);
        assert_eq!(bit(Efr::new().with_ia(true)), 6);
        assert_eq!(bit(Efr::new().with_ga(true)), 7);
        assert_eq!(Efr::new().with_hats(3).into_bits(), 0xc00);
        assert_eq!(Efr::new().with_gats(3).into_bits(), 0x3000);
        assert_eq!(Efr::new().with_glx(3).into_bits(), 0xc000);
        assert_eq!(Efr::new().with_gam(7).into_bits(), 7 << 21);
        assert_eq!(Efr::new().with_pas_max(31).into_bits(), 31 << 32);
        assert_eq!(Efr::new().with_dev_tbl_seg(3).into_bits(), 3 << 38);
        assert_eq!(bit(Efr::new().with_msi_cap_mmio(true)), 46);
        assert_eq!(bit(Efr::new().with_gio(true)), 48);
        assert_eq!(bit(Efr::new().with_ha(true)), 49);
        assert_eq!(bit(Efr::new().with_eph(true)), 50);
        assert_eq!(bit(Efr::new().with_hd(true)), 52);
        assert_eq!(bit(Efr::new().with_viommu(true)), 55);
        assert_eq!(bit(Efr::new().with_snp(true)), 63);
        assert_eq!(Efr2::new().with_gcr3_trp_mode(true).into_bits(), 1 << 3);
        assert_eq!(Efr2::new().with_num_int_remap(3).into_bits(), 3 << 8);
        assert_eq!(Efr2::new().with_ht_range_ignore(true).into_bits(), 1 << 11);
    }

    #[test]
    fn an_x2apic_destination_is_gathered_from_its_two_pieces() {
        let register = XtInterrupt::from_bits(0x0100_0055_0001_0200 | 0x300);
        assert_eq!(register.destination(), 0x0100_0103);
        assert_eq!(register.vector(), 0x55);
        assert!(!register.logical());
    }

    #[test]
    fn quadwords_without_a_register_have_no_name() {
        for offset in [
            0x40, 0xe0, 0x138, 0x140, 0x148, 0x168, 0x190, 0x2040, 0x3000, 0x4000, !7,
        ] {
            assert_eq!(Reg::at(offset), None, "{offset:#x}");
        }
        assert_eq!(
            Reg::at(0x100).map(|reg| matches!(reg, Reg::SegmentBase(s) if s.index() == 0)),
            Some(true)
        );
        assert_eq!(
            Reg::at(0x130).map(|reg| matches!(reg, Reg::SegmentBase(s) if s.index() == 6)),
            Some(true)
        );
    }
}
