//! What a guest's device table entry asks for, in terms of what a host can do.
//!
//! The host's unit translates by the host's own entry: by no guest table, by one, or by a host table that maps
//! nothing. What is none of these is refused, and the device blocked: it never gets more than its entry allows.

use std::fmt;

use crate::iommu::amd::features::Features;
use crate::iommu::amd::spec::dte::{Dte, Guest, Host, Interrupt};
use crate::iommu::amd::spec::registers::Control;
use crate::platform::addr::Gpa;

/// What a device is to reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Intent {
    /// Guest physical memory, untranslated.
    PassThrough,
    /// Nothing.
    Blocked,
    /// What the tables of an entry say, which holds only what counts ([`judge`]).
    Nested(Dte),
    /// What no host can give; hence nothing.
    Refused(Refusal),
}

/// Why an entry is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refusal {
    /// Reserved bits are set.
    Reserved,
    /// It has v1 tables, of which the host has its own.
    HostTable,
    /// Reads are allowed and writes not, or the other way round.
    OneDirection,
    /// More levels of the GCR3 table, or another format of guest tables, than are offered.
    Levels,
    /// The guest table is at address 0, where hosts take it for absent.
    NoRoot,
    /// No memory is where it should lie.
    NoMemory {
        /// There.
        at: Gpa,
    },
    /// Nothing is wrong with it, but the host does not attach the device to what it asks for.
    Host,
}

impl Refusal {
    /// Whether an entry may be so for a moment, between two stores of a kernel that writes it 8 bytes at a time: the root's
    /// pieces lie in two quadwords, and the first may hold none of its bits.
    #[must_use]
    pub(super) fn may_pass(self) -> bool {
        self == Self::NoRoot
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reserved => "reserved bits are set",
            Self::HostTable => "v1 tables, where the guest has v2 tables only (Linux: amd_iommu=pgtbl_v2)",
            Self::OneDirection => "only one of read and write is allowed",
            Self::Levels => "table levels that the unit does not offer",
            Self::NoRoot => "a guest table at address 0",
            Self::NoMemory { .. } => "no memory is where it should lie",
            Self::Host => "the host refuses what it asks for",
        })
    }
}

/// What `dte` asks for under `control`, the unit being on (section 2.2.2, Table 8; the order of the questions counts).
///
/// Of entries with guest tables only this is kept: V, TV, IR, IW, GV, GIOV, the GCR3 root and its levels, the domain,
/// the paging mode, and PPR where page requests are offered. Two entries that differ elsewhere are the same.
#[must_use]
pub(super) fn judge(control: Control, features: &Features, dte: &Dte) -> Intent {
    let (host, guest) = (dte.host, dte.guest);
    if !host.v() {
        return Intent::PassThrough;
    }
    if host.into_bits() & Host::RESERVED != 0 {
        return Intent::Refused(Refusal::Reserved);
    }
    if !host.tv() || !(host.ir() || host.iw()) {
        return Intent::Blocked;
    }
    if host.mode() != 0 {
        return Intent::Refused(Refusal::HostTable);
    }
    if !(host.ir() && host.iw()) {
        return Intent::Refused(Refusal::OneDirection);
    }
    if !(host.gv() && control.gt_en()) {
        return Intent::PassThrough;
    }
    let paging_mode = dte.interrupt.guest_paging_mode();
    if host.glx() > features.efr.glx() || paging_mode > features.efr.gats() {
        return Intent::Refused(Refusal::Levels);
    }
    if dte.gcr3_root() == 0 {
        return Intent::Refused(Refusal::NoRoot);
    }
    let kept = Dte {
        host: Host::new()
            .with_v(true)
            .with_tv(true)
            .with_ir(true)
            .with_iw(true)
            .with_gv(true)
            .with_giov(host.giov())
            .with_glx(host.glx())
            .with_ppr(host.ppr() && features.efr.ppr()),
        guest: Guest::new().with_domain(guest.domain()),
        interrupt: Interrupt::new().with_guest_paging_mode(paging_mode),
        ..Dte::default()
    };
    Intent::Nested(kept.with_gcr3_root(dte.gcr3_root()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::features::Wanted;
    use crate::iommu::viommu::features::offer;
    use crate::iommu::viommu::host::HostFeatures;

    fn features(wanted: &Wanted) -> Features {
        let all = HostFeatures {
            efr: u64::MAX,
            efr2: u64::MAX,
        };
        offer(&[all], wanted)
    }

    fn of(quadwords: [u64; 4]) -> Intent {
        let control = Control::new().with_iommu_en(true).with_gt_en(true);
        judge(
            control,
            &features(&Wanted::DEFAULT),
            &Dte::from_quadwords(quadwords),
        )
    }

    const V: u64 = 1;
    const TV: u64 = 2;
    const IR: u64 = 1 << 61;
    const IW: u64 = 1 << 62;
    const GV: u64 = 1 << 55;
    const GIOV: u64 = 1 << 54;
    const ON: u64 = V | TV | IR | IW;
    /// Bits 14:12 of the root.
    const ROOT: u64 = 5 << 58;

    #[test]
    fn each_row_of_the_table_has_its_answer() {
        assert_eq!(of([0; 4]), Intent::PassThrough);
        assert_eq!(of([!V, u64::MAX, 0, 0]), Intent::PassThrough);
        assert_eq!(of([ON, 7, 0, 0]), Intent::PassThrough);
        assert_eq!(of([V | TV, 0, 0, 0]), Intent::Blocked);
        assert_eq!(of([V, 0, 0, 0]), Intent::Blocked);
        assert_eq!(of([V | IR | IW | GV, 0, 0, 0]), Intent::Blocked);
        assert_eq!(of([V | TV | GV | ROOT, 0, 0, 0]), Intent::Blocked);
        for giov in [0, GIOV] {
            let nested = Dte::from_quadwords([ON | GV | ROOT | giov, 7, 0, 0]);
            assert_eq!(of([ON | GV | ROOT | giov, 7, 0, 0]), Intent::Nested(nested));
        }
    }

    #[test]
    fn what_a_host_cannot_do_is_refused_and_never_approximated() {
        let refused = |quadwords, why| assert_eq!(of(quadwords), Intent::Refused(why), "{quadwords:x?}");
        refused([ON | 4, 0, 0, 0], Refusal::Reserved);
        refused([ON | 1 << 63, 0, 0, 0], Refusal::Reserved);
        for mode in 1..8 {
            refused([ON | mode << 9, 0, 0, 0], Refusal::HostTable);
            refused([ON | GV | GIOV | ROOT | mode << 9, 0, 0, 0], Refusal::HostTable);
        }
        refused([V | TV | IR, 0, 0, 0], Refusal::OneDirection);
        refused([V | TV | IW | GV | ROOT, 0, 0, 0], Refusal::OneDirection);
        refused([ON | GV | ROOT | 3 << 56, 0, 0, 0], Refusal::Levels);
        refused([ON | GV | ROOT, 0, 1 << 54, 0], Refusal::Levels);
        refused([ON | GV, 7, 0, 0], Refusal::NoRoot);
    }

    #[test]
    fn bits_that_do_not_count_make_no_other_entry() {
        let bare = of([ON | GV | GIOV | ROOT, 7, 0, 0]);
        // Access marks, GPRP and PPR, ATS and all of that word but the root, interrupts, host-only words.
        let noise = of([
            ON | GV | GIOV | ROOT | 3 << 7 | 3 << 52 | 0x1000,
            7 | 0x7ff << 32,
            !(3 << 54),
            u64::MAX,
        ]);
        assert_eq!(noise, bare);
        assert_ne!(of([ON | GV | GIOV | ROOT, 8, 0, 0]), bare);
        assert_ne!(of([ON | GV | GIOV | ROOT, 7 | 1 << 63, 0, 0]), bare);
    }

    #[test]
    fn features_decide_what_an_entry_may_hold() {
        let everything = features(&Wanted::EVERYTHING);
        let control = Control::new().with_iommu_en(true).with_gt_en(true);
        let asked = Dte::from_quadwords([ON | GV | ROOT | 1 << 52, 7, 1 << 54, 0]);
        assert_eq!(judge(control, &everything, &asked), Intent::Nested(asked));
        // Guest translation off: as if there were no guest table.
        let off = control.with_gt_en(false);
        assert_eq!(judge(off, &everything, &asked), Intent::PassThrough);
    }
}
