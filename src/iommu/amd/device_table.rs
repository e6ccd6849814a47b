//! From a device to its entry, and from an entry to a decision (sections 2.2.1 and 2.2.2).

use super::memory::{SystemMemory, Unreachable};
use super::registers::{Configuration, Exclusion};
use super::request::{Access, Pasid, Request};
use super::spec::dte::{Attribute, Dte, Host, Interrupt};
use super::spec::registers::Control;
use super::walk::{GuestTable, HostTable, Track};
use crate::platform::addr::{Bdf, Gpa, Iova, PAGE_SIZE};

/// Pairs of reads before a half that changes all the time is taken as it is.
const ATTEMPTS: usize = 8;

/// Where the entry of `device` lies; `None` past the end of its table.
///
/// With segments, the highest bits of the device's number choose the table (section 2.2.1.1).
#[must_use]
pub fn locate(configuration: &Configuration, device: Bdf) -> Option<Gpa> {
    let id = device.requester_id();
    let segment_bits = configuration.control.dev_tbl_seg_en().min(3);
    let index_bits = 16 - u32::from(segment_bits);
    let segment = usize::from(id.checked_shr(index_bits).unwrap_or(0));
    let index = u64::from(id) & ((1 << index_bits) - 1);
    let base = configuration.device_table[segment];
    let entries = (u64::from(base.size()) + 1) * (PAGE_SIZE / Dte::LEN);
    (index < entries).then(|| Gpa((base.frame() << 12) + index * Dte::LEN))
}

/// Read an entry. Software changes its halves by 16-byte exchanges, so neither half is ever a mixture.
pub fn fetch<M: SystemMemory>(memory: &M, at: Gpa) -> Result<Dte, Unreachable> {
    let [q0, q1] = read_pair(memory, at)?;
    let [q2, q3] = read_pair(memory, Gpa(at.0 + 16))?;
    Ok(Dte::from_quadwords([q0, q1, q2, q3]))
}

/// Two quadwords that stood in memory together: read twice, because one may be again what it was before the other changed.
pub(super) fn read_pair<M: SystemMemory>(memory: &M, at: Gpa) -> Result<[u64; 2], Unreachable> {
    let read = || Ok([memory.load(at)?, memory.load(Gpa(at.0 + 8))?]);
    let mut pair = read()?;
    for _ in 0..ATTEMPTS {
        let again = read()?;
        if again == pair {
            break;
        }
        pair = again;
    }
    Ok(pair)
}

/// What becomes of a memory request, as far as registers and the device's entry decide.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// It passes untranslated, in any direction.
    Forward,
    /// It passes untranslated in the directions allowed.
    Identity(Access),
    /// A host table translates it.
    Host {
        /// Cache tag.
        domain: u16,
        /// What the entry allows.
        allowed: Access,
        /// The table.
        table: HostTable,
    },
    /// A guest table translates it.
    Guest {
        /// Cache tag, together with the table's PASID.
        domain: u16,
        /// What the entry allows.
        allowed: Access,
        /// The table.
        table: GuestTable,
    },
    /// The entry blocks everything (V=1, TV=0).
    Blocked,
    /// The request names an address space and the device has none.
    NoGuestTable,
    /// The entry denies the direction.
    Denied,
    /// Reserved bits are set where the entry is used.
    Reserved,
    /// A field holds a value that means nothing.
    Illegal,
}

/// Decide about `request` by the entry `dte` (section 2.2.2, Table 8; the order of the questions counts).
///
/// Always inline: what a hit does not ask for is then never put together.
#[must_use]
#[inline(always)]
pub fn decide(control: Control, exclusion: Exclusion, dte: &Dte, request: &Request) -> Decision {
    let (host, guest) = (dte.host, dte.guest);
    if !host.v() {
        return Decision::Forward;
    }
    if host.into_bits() & Host::RESERVED != 0 {
        return Decision::Reserved;
    }
    if is_excluded(exclusion, dte, request.at) {
        return Decision::Forward;
    }
    if !host.tv() {
        return Decision::Blocked;
    }
    let guest_valid = host.gv() && control.gt_en();
    if request.pasid.is_some() && !guest_valid {
        return Decision::NoGuestTable;
    }
    let allowed = Access::new(host.ir(), host.iw());
    if !allowed.allows(request.access) {
        return Decision::Denied;
    }
    let domain = guest.domain();
    let host_table = match host.mode() {
        0 => None,
        levels @ 1..=6 => Some(HostTable {
            root: Gpa(host.root() << 12),
            levels,
            track: host_track(host),
        }),
        _ => return Decision::Illegal,
    };
    let is_guest = guest_valid && (request.pasid.is_some() || host.giov());
    match (is_guest, host_table) {
        (false, None) => Decision::Identity(allowed),
        (false, Some(table)) => Decision::Host {
            domain,
            allowed,
            table,
        },
        (true, under) => match guest_table(control, dte, request, under) {
            Some(table) => Decision::Guest {
                domain,
                allowed,
                table,
            },
            None => Decision::Illegal,
        },
    }
}

/// Which marks the host table wants: 1 accessed, 3 accessed and dirty, 2 reserved and nothing.
const fn host_track(host: Host) -> Track {
    Track {
        accessed: host.had() & 1 != 0,
        dirty: host.had() == 3,
    }
}

/// The guest table of the request's address space; `None` where GLX or the paging mode is reserved.
#[inline(always)]
fn guest_table(
    control: Control,
    dte: &Dte,
    request: &Request,
    host: Option<HostTable>,
) -> Option<GuestTable> {
    let levels = match dte.interrupt.guest_paging_mode() {
        0 => 4,
        1 => 5,
        _ => return None,
    };
    (dte.host.glx() < 3).then(|| GuestTable {
        gcr3: dte.gcr3_root(),
        glx: dte.host.glx(),
        pasid: request.pasid.unwrap_or(Pasid::ZERO),
        levels,
        signed: request.pasid.is_some(),
        user: request.pasid.is_some() && !request.privileged,
        track: Track {
            accessed: !control.ga_update_dis(),
            dirty: !control.gd_update_dis(),
        },
        host,
        root_is_guest: control.gcr3_trp_mode(),
    })
}

/// Whether the exclusion range lets the request pass (section 3.4.5). Both ends are pages of the range.
fn is_excluded(exclusion: Exclusion, dte: &Dte, at: Iova) -> bool {
    let base = exclusion.base;
    let inside = || (base.frame()..=exclusion.limit.frame()).contains(&(at.0 >> 12));
    base.enable() && (base.allow() || dte.guest.ex()) && inside()
}

/// What becomes of an interrupt, as far as the device's entry decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InterruptControl {
    /// It passes unchanged.
    Forward,
    /// It vanishes.
    Abort,
    /// The device's table remaps it.
    Remap,
    /// The field is reserved.
    Reserved,
}

impl InterruptControl {
    /// What IntCtl says about fixed and arbitrated interrupts.
    #[must_use]
    pub const fn of(interrupt: Interrupt) -> Self {
        match interrupt.int_ctl() {
            0 => Self::Abort,
            1 => Self::Forward,
            2 => Self::Remap,
            _ => Self::Reserved,
        }
    }
}

/// Whether the interrupt half of an entry has reserved bits set.
#[must_use]
pub const fn interrupt_half_is_reserved(dte: &Dte) -> bool {
    dte.interrupt.into_bits() & Interrupt::RESERVED != 0
        || dte.attribute.into_bits() & Attribute::RESERVED != 0
}

#[cfg(test)]
mod tests;
