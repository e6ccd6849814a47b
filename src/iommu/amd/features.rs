//! What a unit advertises, and why each bit may be there.
//!
//! | Bit | On when | Shown by (in `tests/iommu`) |
//! |---|---|---|
//! | capability 27, EFR exists | always | `registers::r12` |
//! | capability 24, IOTLB; command 4 | `ats` | `commands::c14`, `tables::ats` |
//! | capability 26, NpCache | `np_cache` | `registers::r12` |
//! | EFR 0, prefetch; command 6 | always | `commands::prefetch` |
//! | EFR 1, PPR; command 7 | `pasid_bits` | `events::e10`, `e11`, `e12` |
//! | EFR 2, XT | `xt` | `interrupts::x10`, `events::e8` |
//! | EFR 4, GT and EFR 48, GIO | `guest_tables` | `tables::p13` |
//! | EFR 6, IA; command 8 | always | `commands::c16` |
//! | EFR 7, GA | always | `interrupts::x10`, `x11` |
//! | EFR 11:10, HATS = four to six levels | `host_levels` | `reference`, modes 1 to 6 |
//! | EFR 13:12, GATS = five levels | `five_levels` | `tables::guest_tables_of_five_levels` |
//! | EFR 15:14, GLX = three levels | `guest_tables` | `tables::p14` |
//! | EFR 36:32, PASmax | `pasid_bits` | `tables::p14` |
//! | EFR 39:38, segments | `segments` | `device_table::segments` |
//! | EFR 46, MSI capability in MMIO | `xt` | `registers::msi_mirror` |
//! | EFR 49 and 52, host access and dirty bits | `host_tracking` | `tables::p11` |
//! | EFR 50, enhanced PPR | `pasid_bits` | `registers::r6` |
//! | EFR 55, vIOMMU | `virtualizable` | `guests` |
//! | EFR2 3, GCR3 roots translated | `nested` | `tables::p17` |
//! | EFR2 9:8, 2,048 remapping entries | `large_interrupt_tables` | `interrupts::x12` |
//!
//! Everything else is 0, and its control bits read as 0: no virtual APIC (GAM), no performance counters,
//! no hardware error registers, no execute permission, no SNP.

use super::spec::capability::{Header, Misc0};
use super::spec::registers::{Control, Efr, Efr2};

/// What the configuration asks a unit to offer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent choices of the operator"
)]
pub struct Wanted {
    /// 32-bit destinations, and interrupts of the unit itself from registers.
    pub xt: bool,
    /// v2 tables, also for requests without PASID.
    pub guest_tables: bool,
    /// PASID bits, at most 16 (Linux stops at more); 0 for no PASID and no page requests.
    pub pasid_bits: u8,
    /// Five-level v2 tables.
    pub five_levels: bool,
    /// v2 over v1 with a translated GCR3 root.
    pub nested: bool,
    /// Devices may keep translations.
    pub ats: bool,
    /// Entries that are not present may be cached, because something shadows the tables.
    pub np_cache: bool,
    /// Levels of v1 tables, 4 to 6: addresses of 48, 57 or 64 bits.
    pub host_levels: u8,
    /// Access and dirty bits in v1 tables.
    pub host_tracking: bool,
    /// Remapping tables of 2,048 entries.
    pub large_interrupt_tables: bool,
    /// Logarithm of the largest number of device table segments, 0 to 3.
    pub segments: u8,
    /// The unit serves units of guests itself: the vIOMMU extension.
    pub virtualizable: bool,
}

impl Wanted {
    /// What Linux gets unless the operator says otherwise: v1 and v2 tables, remapping with x2APIC.
    pub const DEFAULT: Self = Self {
        xt: true,
        guest_tables: true,
        pasid_bits: 0,
        five_levels: false,
        nested: false,
        ats: false,
        np_cache: false,
        host_levels: 6,
        host_tracking: true,
        large_interrupt_tables: false,
        segments: 0,
        virtualizable: false,
    };

    /// Everything that is implemented, for a unit that serves no other.
    pub const EVERYTHING: Self = Self {
        xt: true,
        guest_tables: true,
        pasid_bits: 16,
        five_levels: true,
        nested: true,
        ats: true,
        np_cache: false,
        host_levels: 6,
        host_tracking: true,
        large_interrupt_tables: true,
        segments: 3,
        virtualizable: false,
    };
}

/// What a unit offers: constant from its making on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// MMIO 0030h, and the IVHD's copy.
    pub efr: Efr,
    /// MMIO 01A0h, and the IVHD's copy.
    pub efr2: Efr2,
    /// Bits 31:16 of the capability header.
    pub header: Header,
}

impl Features {
    /// What is asked for and implemented. PASIDs and nesting bring v2 tables with them, serving guests brings nesting,
    /// and more PASID bits than 16 are 16.
    #[must_use]
    pub fn offer(wanted: Wanted) -> Self {
        let pasid_bits = wanted.pasid_bits.min(16);
        let pasid = pasid_bits > 0;
        let nested = wanted.nested || wanted.virtualizable;
        let guest = wanted.guest_tables || pasid || nested;
        let efr = Efr::new()
            .with_prefetch(true)
            .with_ppr(pasid)
            .with_xt(wanted.xt)
            .with_gt(guest)
            .with_ia(true)
            .with_ga(true)
            .with_hats(wanted.host_levels.clamp(4, 6) - 4)
            .with_gats(u8::from(guest && wanted.five_levels))
            .with_glx(if guest { 2 } else { 0 })
            .with_pas_max(pasid_bits.saturating_sub(1))
            .with_dev_tbl_seg(wanted.segments.min(3))
            .with_msi_cap_mmio(wanted.xt)
            .with_gio(guest)
            .with_ha(wanted.host_tracking)
            .with_eph(pasid)
            .with_hd(wanted.host_tracking)
            .with_viommu(wanted.virtualizable);
        let efr2 = Efr2::new()
            .with_gcr3_trp_mode(nested)
            .with_num_int_remap(u8::from(wanted.large_interrupt_tables));
        let header = Header::new()
            .with_kind(3)
            .with_revision(1)
            .with_iotlb(wanted.ats)
            .with_np_cache(wanted.np_cache)
            .with_efr(true)
            .with_extended(true);
        Self { efr, efr2, header }
    }

    /// Whether commands about devices' own IOTLBs exist.
    #[must_use]
    pub const fn ats(&self) -> bool {
        self.header.iotlb()
    }

    /// The last address that tables of either format map, with as many levels as are offered. There are no fewer than four.
    #[must_use]
    pub const fn last_address(&self) -> u64 {
        const PAGE: u32 = 12;
        const LEVEL: u32 = 9;
        let efr = self.efr;
        let levels = if efr.gt() && efr.gats() > efr.hats() {
            efr.gats()
        } else {
            efr.hats()
        };
        // Six levels are more than 64 bits.
        match 1_u64.checked_shl(PAGE + LEVEL * (4 + levels as u32)) {
            Some(end) => end - 1,
            None => u64::MAX,
        }
    }

    /// Misc Information 0: 48-bit physical and guest addresses, 64-bit virtual ones, first MSI message.
    #[must_use]
    pub const fn misc0(&self) -> Misc0 {
        Misc0::new().with_gva_size(2).with_pa_size(48).with_va_size(64)
    }

    /// Control bits a guest can set; those of absent features stay 0.
    #[must_use]
    pub const fn control_writable(&self) -> Control {
        let efr = self.efr;
        Control::new()
            .with_iommu_en(true)
            .with_ht_tun_en(true)
            .with_event_log_en(true)
            .with_event_int_en(true)
            .with_com_wait_int_en(true)
            .with_inv_timeout(7)
            .with_pass_pw(true)
            .with_res_pass_pw(true)
            .with_coherent(true)
            .with_isoc(true)
            .with_cmd_buf_en(true)
            .with_ppr_log_en(efr.ppr())
            .with_ppr_int_en(efr.ppr())
            .with_ppr_en(efr.ppr())
            .with_gt_en(efr.gt())
            .with_ga_en(efr.ga())
            .with_dev_tbl_seg_en(if efr.dev_tbl_seg() > 0 { 7 } else { 0 })
            .with_num_int_remap_mode(if self.efr2.num_int_remap() > 0 { 3 } else { 0 })
            .with_eph_en(efr.eph())
            .with_had_update(if efr.ha() || efr.hd() { 3 } else { 0 })
            .with_gd_update_dis(efr.gt())
            .with_xt_en(efr.xt())
            .with_int_cap_xt_en(efr.xt())
            .with_ga_update_dis(efr.gt())
            .with_gcr3_trp_mode(self.efr2.gcr3_trp_mode())
            .with_vcmd_en(efr.viommu())
            .with_viommu_en(efr.viommu())
            .with_gst_buffer_trp_mode(efr.viommu())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_implemented_features_are_ever_offered() {
        let everything = Features::offer(Wanted::EVERYTHING);
        assert_eq!(everything.efr.into_bits(), 0x0017_40cf_0000_98d7);
        assert_eq!(everything.efr2.into_bits(), 0x108);
    }

    #[test]
    fn pasids_bring_all_that_linux_wants_for_them() {
        let wanted = Wanted {
            guest_tables: false,
            pasid_bits: 20,
            ..Wanted::DEFAULT
        };
        let efr = Features::offer(wanted).efr;
        assert!(efr.gt() && efr.gio() && efr.ppr() && efr.eph());
        assert_eq!(efr.pas_max(), 15);
    }

    #[test]
    fn control_bits_of_absent_features_cannot_be_set() {
        let bare = Wanted {
            xt: false,
            guest_tables: false,
            host_tracking: false,
            ..Wanted::DEFAULT
        };
        assert_eq!(Features::offer(bare).control_writable().into_bits(), 0x2_1fff);
        let all = Features::offer(Wanted::EVERYTHING).control_writable();
        assert_eq!(all.into_bits(), 0x044d_f81c_0003_ffff);
    }

    #[test]
    fn a_unit_that_serves_guests_says_so_and_can_be_switched_to_it() {
        let wanted = Wanted {
            virtualizable: true,
            ..Wanted::DEFAULT
        };
        let features = Features::offer(wanted);
        assert!(features.efr.viommu() && features.efr2.gcr3_trp_mode());
        let all = 1 << 52 | 1 << 53 | 1 << 58 | 1 << 60;
        let of = |features: Features| features.control_writable().into_bits() & all;
        assert_eq!(of(features), all);
        let plain = Features::offer(Wanted {
            nested: true,
            ..Wanted::DEFAULT
        });
        assert_eq!(of(plain), 1 << 58);
    }

    #[test]
    fn levels_of_tables_are_those_that_exist() {
        let hats = |host_levels| {
            let wanted = Wanted {
                host_levels,
                ..Wanted::DEFAULT
            };
            Features::offer(wanted).efr.hats()
        };
        assert_eq!([0, 4, 5, 6, 7].map(hats), [0, 0, 1, 2, 2]);
    }

    #[test]
    fn the_last_address_is_that_of_the_format_with_more_levels() {
        let last = |host_levels, guest_tables, five_levels| {
            let wanted = Wanted {
                host_levels,
                guest_tables,
                five_levels,
                ..Wanted::DEFAULT
            };
            Features::offer(wanted).last_address()
        };
        assert_eq!(last(4, true, false), 0xffff_ffff_ffff);
        assert_eq!(last(4, false, true), 0xffff_ffff_ffff);
        assert_eq!(last(4, true, true), 0x1ff_ffff_ffff_ffff);
        assert_eq!(last(5, false, false), 0x1ff_ffff_ffff_ffff);
        assert_eq!(last(6, true, true), u64::MAX);
    }
}
