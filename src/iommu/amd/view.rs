//! What a device reaches altogether, for whoever keeps a copy of that.

use super::Unit;
use super::device_table::{Decision, decide};
use super::memory::SystemMemory;
use super::registers::Exclusion;
use super::request::{Access, Request};
use super::scan::{Bound, Scanned};
use super::walk::{GuestTable, HostTable, Track};
use crate::platform::addr::{Bdf, Iova};

/// What requests of a device without PASID reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum View {
    /// Nothing.
    Nothing,
    /// All memory, each byte at its own address.
    Identity(Access),
    /// What tables say.
    Translated {
        /// What commands about it call it.
        domain: u16,
        /// What the device table entry allows.
        allowed: Access,
        /// The tables.
        tables: Tables,
    },
}

/// Tables of either kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tables {
    /// The IOMMU's own.
    Host(HostTable),
    /// The processors', of PASID 0.
    Guest(GuestTable),
}

impl Tables {
    /// What is mapped from `first` to `last`, as far as `bound` lets it look.
    #[must_use]
    pub fn scan<M: SystemMemory>(&self, memory: &M, first: u64, last: u64, bound: Bound) -> Scanned {
        match self {
            Self::Host(table) => table.scan(memory, first, last, bound),
            Self::Guest(table) => table.scan(memory, first, last, bound),
        }
    }

    /// The same, but that nothing which uses them leaves a mark.
    const fn unmarked(self) -> Self {
        const NONE: Track = Track {
            accessed: false,
            dirty: false,
        };
        match self {
            Self::Host(table) => Self::Host(HostTable { track: NONE, ..table }),
            Self::Guest(table) => {
                let host = match table.host {
                    Some(host) => Some(HostTable { track: NONE, ..host }),
                    None => None,
                };
                Self::Guest(GuestTable {
                    track: NONE,
                    host,
                    ..table
                })
            }
        }
    }
}

impl<M: SystemMemory> Unit<M> {
    /// What `device` reaches by registers and device table as they are now.
    ///
    /// The exclusion range is no part of it: a device whose view is copied does not pass there.
    #[must_use]
    pub fn view(&self, device: Bdf) -> View {
        let control = self.configuration().control;
        if !control.iommu_en() {
            return View::Identity(Access::BOTH);
        }
        let Ok(dte) = self.entry(device) else {
            return View::Nothing;
        };
        let anything = Request::plain(device, Iova(0), Access::NONE);
        match decide(control, Exclusion::default(), &dte, &anything) {
            Decision::Forward => View::Identity(Access::BOTH),
            Decision::Identity(Access::NONE)
            | Decision::Host {
                allowed: Access::NONE,
                ..
            }
            | Decision::Guest {
                allowed: Access::NONE,
                ..
            }
            | Decision::Blocked
            | Decision::NoGuestTable
            | Decision::Denied
            | Decision::Reserved
            | Decision::Illegal => View::Nothing,
            Decision::Identity(allowed) => View::Identity(allowed),
            Decision::Host {
                domain,
                allowed,
                table,
            } => View::Translated {
                domain,
                allowed,
                tables: Tables::Host(table).unmarked(),
            },
            Decision::Guest {
                domain,
                allowed,
                table,
            } => View::Translated {
                domain,
                allowed,
                tables: Tables::Guest(table).unmarked(),
            },
        }
    }
}
