//! What a served unit advertises: what every unit of the host that serves the guest has, as far as it means something
//! there, and as far as it is asked for.
//!
//! | Bit | On when asked by, and every host unit has it |
//! |---|---|
//! | EFR 1, PPR, and EFR 50, EPH | `pasid_bits` |
//! | EFR 2, XT | `xt` |
//! | EFR 4, GT, and EFR 48, GIO | always: guests have v2 tables and nothing else |
//! | EFR 7, GA | always |
//! | EFR 13:12, GATS | `five_levels` |
//! | EFR 15:14, GLX | always |
//! | EFR 36:32, PASmax | `pasid_bits`, at most 16 bits: Linux stops at more |
//! | EFR 39:38, segments | `segments`; the host never sees the guest's device table, so its units are not asked |
//! | capability 24, IOTLB | `ats`; the host's driver decides, so its units are not asked |
//!
//! All else is 0. HATS as well: v1 tables belong to the host, and the IVHD says so (HATDis). So is Extended Feature 2,
//! and NpCache, with which Linux would flush whatever it maps.

use std::fmt;

use super::host::HostFeatures;
use crate::iommu::amd::features::{Features, Wanted};
use crate::iommu::amd::spec::capability::Header;
use crate::iommu::amd::spec::registers::{Control, Efr, Efr2};

/// Most levels of GCR3 tables that a field can say: three.
const MOST_GLX: u8 = 2;

/// What `hosts` all have of what is `wanted`. All units of a guest are given the same (Linux uses only what all have),
/// so `hosts` are those that serve any of them; without one, nothing is offered.
#[must_use]
pub fn offer(hosts: &[HostFeatures], wanted: &Wanted) -> Features {
    let have =
        |bit: fn(&Efr) -> bool| !hosts.is_empty() && hosts.iter().all(|host| bit(&Efr::from(host.efr)));
    let least = |field: fn(&Efr) -> u8| {
        let values = hosts.iter().map(|host| field(&Efr::from(host.efr)));
        values.min().unwrap_or(0)
    };
    let pasid_bits = wanted.pasid_bits.min(16);
    let pasid = pasid_bits > 0 && have(Efr::ppr) && have(Efr::eph);
    let five_levels = wanted.five_levels && least(Efr::gats) > 0;
    let efr = Efr::new()
        .with_ppr(pasid)
        .with_xt(wanted.xt && have(Efr::xt))
        .with_gt(have(Efr::gt))
        .with_ga(have(Efr::ga))
        .with_gats(u8::from(five_levels))
        .with_glx(least(Efr::glx).min(MOST_GLX))
        .with_pas_max(if pasid {
            least(Efr::pas_max).min(pasid_bits - 1)
        } else {
            0
        })
        .with_dev_tbl_seg(wanted.segments.min(3))
        .with_gio(have(Efr::gio))
        .with_eph(pasid);
    let header = Header::new()
        .with_kind(3)
        .with_revision(1)
        .with_iotlb(wanted.ats)
        .with_efr(true)
        .with_extended(true);
    Features {
        efr,
        efr2: Efr2::new(),
        header,
    }
}

/// What `one` and `other` both have, as if it were one unit: [`offer`] makes the same of it as of the two.
#[must_use]
pub fn common(one: HostFeatures, other: HostFeatures) -> HostFeatures {
    let (first, second) = (Efr::from(one.efr), Efr::from(other.efr));
    let both = Efr::from(one.efr & other.efr)
        .with_gats(first.gats().min(second.gats()))
        .with_glx(first.glx().min(second.glx()))
        .with_pas_max(first.pas_max().min(second.pas_max()));
    HostFeatures {
        efr: both.into_bits(),
        efr2: one.efr2 & other.efr2,
    }
}

/// Control bits that change something where the host's unit serves: the others read as 0.
///
/// How entries of tables are updated, and whether GCR3 roots and rings of guests are translated, is set in the host's
/// unit for all of its guests, and so not here.
#[must_use]
pub fn control_writable(features: &Features) -> Control {
    features
        .control_writable()
        .with_had_update(0)
        .with_gd_update_dis(false)
        .with_ga_update_dis(false)
        .with_num_int_remap_mode(0)
        .with_gcr3_trp_mode(false)
        .with_vcmd_en(false)
        .with_viommu_en(false)
        .with_gst_buffer_trp_mode(false)
}

/// What a unit of the host's lacks to serve a guest's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// v2 tables.
    GtSup,
    /// v2 tables for requests without PASID.
    GioSup,
    /// GCR3 roots translated by the host's table.
    Gcr3TrpMode,
    /// Rings of guests.
    ViommuSup,
}

/// As the manual calls it, with where it is and what it is for.
impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GtSup => "GTSup (EFR bit 4): v2 tables",
            Self::GioSup => "GIOSup (EFR bit 48): v2 tables for requests without PASID",
            Self::Gcr3TrpMode => "GCR3TRPMode (EFR2 bit 3): v2 tables over the host's",
            Self::ViommuSup => "vIOMMUSup (EFR bit 55): a guest's own rings",
        })
    }
}

/// What `host` lacks; nothing, where it can serve.
#[must_use]
pub fn missing(host: HostFeatures) -> Vec<Missing> {
    let (efr, efr2) = (Efr::from(host.efr), Efr2::from(host.efr2));
    let conditions = [
        (Missing::GtSup, efr.gt()),
        (Missing::GioSup, efr.gio()),
        (Missing::Gcr3TrpMode, efr2.gcr3_trp_mode()),
        (Missing::ViommuSup, efr.viommu()),
    ];
    let missing = conditions.into_iter().filter(|(_, there)| !there);
    missing.map(|(condition, _)| condition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bit set, EFR2 as well.
    const ALL: HostFeatures = HostFeatures {
        efr: u64::MAX,
        efr2: u64::MAX,
    };

    fn without(bits: u64) -> HostFeatures {
        HostFeatures {
            efr: ALL.efr & !bits,
            ..ALL
        }
    }

    #[test]
    fn a_host_with_everything_lends_only_what_a_guest_may_have() {
        let features = offer(&[ALL, ALL], &Wanted::EVERYTHING);
        assert_eq!(features.efr.into_bits(), 0x0005_00cf_0000_9096);
        assert_eq!(features.efr2.into_bits(), 0);
        assert!(!features.header.np_cache() && features.header.iotlb());
    }

    #[test]
    fn what_is_not_asked_for_is_not_offered() {
        let modest = Wanted {
            xt: false,
            ..Wanted::DEFAULT
        };
        // GT, GA, GLX and GIO are left.
        assert_eq!(offer(&[ALL], &modest).efr.into_bits(), 0x0001_0000_0000_8090);
        assert!(!offer(&[ALL], &modest).header.iotlb());
    }

    #[test]
    fn one_unit_of_the_host_that_lacks_something_makes_all_do_without() {
        let lacks = |bits| offer(&[ALL, without(bits), ALL], &Wanted::EVERYTHING).efr;
        assert!(!lacks(1 << 2).xt());
        assert!(!lacks(1 << 7).ga());
        assert_eq!(lacks(2 << 14).glx(), 1);
        assert_eq!(lacks(3 << 12).gats(), 0);
        assert_eq!(lacks(0x19 << 32).pas_max(), 6);
        // Without page requests Linux has no use for PASIDs.
        let efr = lacks(1 << 50);
        assert_eq!((efr.ppr(), efr.eph(), efr.pas_max()), (false, false, 0));
    }

    #[test]
    fn two_units_offer_as_one_with_what_both_have() {
        let levels = |efr: u64| HostFeatures { efr, ..ALL };
        // GLX 1 and 2 have no bit in common; the least is 1.
        let (one, other) = (levels(!(2 << 14)), levels(!(1 << 14) & !(1 << 2)));
        let offered = offer(&[common(one, other)], &Wanted::EVERYTHING);
        assert_eq!(offered, offer(&[one, other], &Wanted::EVERYTHING));
        assert!(offered.efr.glx() == 1 && !offered.efr.xt());
        assert_eq!(common(ALL, ALL), ALL);
    }

    #[test]
    fn without_a_host_nothing_is_offered() {
        assert_eq!(offer(&[], &Wanted::EVERYTHING).efr.into_bits(), 3 << 38);
    }

    #[test]
    fn control_bits_of_the_hosts_own_affairs_cannot_be_set() {
        let features = offer(&[ALL], &Wanted::EVERYTHING);
        let writable = control_writable(&features).into_bits();
        assert_eq!(writable, 0x000c_201c_0003_ffff);
        // GAM, GA log, dual logs, MARC, vCmdEn, vIommuEn, TMPM, GCR3TRPMode, GstBufferTRPMode, SNPAVIC.
        assert_eq!(
            writable & (0xf << 25 | 0x1f << 29 | 1 << 40 | 3 << 52 | 0xff << 56),
            0
        );
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        assert_eq!(missing(ALL), []);
        let none = HostFeatures { efr: 0, efr2: 0 };
        let names: Vec<_> = missing(none).iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), 4);
        assert!(names[2].starts_with("GCR3TRPMode (EFR2 bit 3)"), "{names:?}");
        assert_eq!(missing(without(1 << 55)), [Missing::ViommuSup]);
        assert_eq!(
            missing(without(1 << 48 | 1 << 4)),
            [Missing::GtSup, Missing::GioSup]
        );
    }
}
