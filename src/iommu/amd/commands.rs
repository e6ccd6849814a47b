//! Commands: what a command buffer entry asks for, parsed once (section 2.4).

use super::features::Features;
use super::pages::PageRange;
use super::request::Pasid;
use super::spec::command::{
    CompletePpr, CompletionWait, Generic, INVALIDATE_ALL_RESERVED, InvalidateDevice, InvalidateIotlb,
    InvalidatePages, Opcode, Prefetch,
};
use crate::platform::addr::{Bdf, Gpa};

/// A command the unit knows how to carry out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Once everything before has happened, store and interrupt.
    CompletionWait {
        /// What to store where.
        store: Option<(Gpa, u64)>,
        /// Set ComWaitInt.
        interrupt: bool,
    },
    /// The device's table entry changed.
    InvalidateDevice {
        /// Whose.
        device: Bdf,
    },
    /// Translations of a domain changed.
    InvalidatePages {
        /// DomainID.
        domain: u16,
        /// In this process address space; `None` in any table of the domain.
        space: Option<Pasid>,
        /// Where.
        pages: PageRange,
        /// Tables changed as well as pages.
        tables: bool,
    },
    /// The device is to forget translations it asked for.
    InvalidateIotlb {
        /// Which device.
        device: Bdf,
        /// In this process address space; `None` without PASID.
        space: Option<Pasid>,
        /// Where.
        pages: PageRange,
    },
    /// The device's interrupt remapping entries changed.
    InvalidateInterrupts {
        /// Whose.
        device: Bdf,
    },
    /// Translations will be wanted soon.
    Prefetch {
        /// By which device.
        device: Bdf,
        /// In this process address space; `None` in the host table.
        space: Option<Pasid>,
        /// Each page's size and the first page's place.
        first: PageRange,
        /// How many pages follow each other.
        count: u8,
        /// What is cached there is out of date.
        invalidate: bool,
    },
    /// The answer to a page request group.
    CompletePageRequest {
        /// Who asked.
        device: Bdf,
        /// For whom, if the answer says so.
        pasid: Option<Pasid>,
        /// Page request group index.
        group: u16,
        /// 0 success, 1 invalid request, 15 failure.
        response: u8,
    },
    /// Everything changed.
    InvalidateAll,
}

/// An entry that is no command: an unknown or absent opcode, or reserved bits where they are checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Illegal;

/// The address space a command names: of the PASID when GN is set.
fn space(gn: bool, pasid: u32) -> Option<Pasid> {
    Pasid::new(pasid).filter(|_| gn)
}

impl Command {
    /// Kinds of commands, for counters.
    pub const KINDS: [&'static str; 8] = [
        "completion_wait",
        "invalidate_devtab_entry",
        "invalidate_iommu_pages",
        "invalidate_iotlb_pages",
        "invalidate_interrupt_table",
        "prefetch_iommu_pages",
        "complete_ppr_request",
        "invalidate_iommu_all",
    ];

    /// Its place in [`Self::KINDS`].
    #[must_use]
    pub const fn kind(&self) -> usize {
        match self {
            Self::CompletionWait { .. } => 0,
            Self::InvalidateDevice { .. } => 1,
            Self::InvalidatePages { .. } => 2,
            Self::InvalidateIotlb { .. } => 3,
            Self::InvalidateInterrupts { .. } => 4,
            Self::Prefetch { .. } => 5,
            Self::CompletePageRequest { .. } => 6,
            Self::InvalidateAll => 7,
        }
    }

    /// Read an entry. Reserved bits count where every driver leaves them 0: drivers disagree about the form
    /// of commands 3, 4, 6 and 7.
    pub fn parse(raw: u128, features: &Features) -> Result<Self, Illegal> {
        let legal = |reserved: u128| if raw & reserved == 0 { Ok(()) } else { Err(Illegal) };
        let offered = |feature: bool| if feature { Ok(()) } else { Err(Illegal) };
        match Opcode(Generic::from_bits(raw).opcode()) {
            Opcode::COMPLETION_WAIT => {
                legal(CompletionWait::RESERVED)?;
                let wait = CompletionWait::from_bits(raw);
                let target = Gpa(wait.address_51_3() << 3);
                Ok(Self::CompletionWait {
                    store: wait.store().then_some((target, wait.data())),
                    interrupt: wait.interrupt(),
                })
            }
            Opcode::INVALIDATE_DEVTAB_ENTRY => {
                legal(InvalidateDevice::RESERVED)?;
                let device = Bdf::from_requester_id(InvalidateDevice::from_bits(raw).device());
                Ok(Self::InvalidateDevice { device })
            }
            Opcode::INVALIDATE_IOMMU_PAGES => {
                let pages = InvalidatePages::from_bits(raw);
                Ok(Self::InvalidatePages {
                    domain: pages.domain(),
                    space: space(pages.gn(), pages.pasid()),
                    pages: PageRange::decode(pages.page(), pages.size()),
                    tables: pages.pde(),
                })
            }
            Opcode::INVALIDATE_IOTLB_PAGES => {
                offered(features.ats())?;
                let pages = InvalidateIotlb::from_bits(raw);
                Ok(Self::InvalidateIotlb {
                    device: Bdf::from_requester_id(pages.device()),
                    space: space(pages.gn(), pages.pasid()),
                    pages: PageRange::decode(pages.page(), pages.size()),
                })
            }
            Opcode::INVALIDATE_INTERRUPT_TABLE => {
                legal(InvalidateDevice::RESERVED)?;
                let device = Bdf::from_requester_id(InvalidateDevice::from_bits(raw).device());
                Ok(Self::InvalidateInterrupts { device })
            }
            Opcode::PREFETCH_IOMMU_PAGES => {
                offered(features.efr.prefetch())?;
                let prefetch = Prefetch::from_bits(raw);
                Ok(Self::Prefetch {
                    device: Bdf::from_requester_id(prefetch.device()),
                    space: space(prefetch.gn(), prefetch.pasid()),
                    first: PageRange::decode(prefetch.page(), prefetch.size()),
                    count: prefetch.count(),
                    invalidate: prefetch.invalidate(),
                })
            }
            Opcode::COMPLETE_PPR_REQUEST => {
                offered(features.efr.ppr())?;
                let answer = CompletePpr::from_bits(raw);
                Ok(Self::CompletePageRequest {
                    device: Bdf::from_requester_id(answer.device()),
                    pasid: space(answer.gn(), answer.pasid()),
                    group: answer.group(),
                    response: answer.response(),
                })
            }
            Opcode::INVALIDATE_IOMMU_ALL => {
                offered(features.efr.ia())?;
                legal(INVALIDATE_ALL_RESERVED)?;
                Ok(Self::InvalidateAll)
            }
            _ => Err(Illegal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::amd::features::Wanted;

    fn all() -> Features {
        Features::offer(Wanted::EVERYTHING)
    }

    fn opcode(opcode: u128) -> u128 {
        opcode << 60
    }

    #[test]
    fn a_completion_wait_stores_only_when_asked() {
        let raw = opcode(1) | 0x1234_5678 | 7 << 64;
        let quiet = Command::CompletionWait {
            store: None,
            interrupt: false,
        };
        assert_eq!(Command::parse(raw, &all()), Ok(quiet));
        let store = Some((Gpa(0x1234_5678), 7));
        let loud = Command::CompletionWait {
            store,
            interrupt: true,
        };
        assert_eq!(Command::parse(raw | 3, &all()), Ok(loud));
    }

    #[test]
    fn every_reserved_bit_of_the_plain_commands_is_refused() {
        let checked = [
            (1, CompletionWait::RESERVED),
            (2, InvalidateDevice::RESERVED),
            (5, InvalidateDevice::RESERVED),
            (8, INVALIDATE_ALL_RESERVED),
        ];
        for (code, reserved) in checked {
            assert!(Command::parse(opcode(code), &all()).is_ok(), "{code}");
            for bit in (0..128).filter(|bit| reserved >> bit & 1 == 1) {
                assert_eq!(
                    Command::parse(opcode(code) | 1 << bit, &all()),
                    Err(Illegal),
                    "{code} {bit}"
                );
            }
        }
    }

    #[test]
    fn opcodes_without_a_meaning_are_illegal() {
        for code in [0, 9, 10, 11, 12, 13, 14, 15] {
            assert_eq!(Command::parse(opcode(code), &all()), Err(Illegal), "{code}");
        }
    }

    #[test]
    fn commands_of_absent_features_are_illegal() {
        let bare = Features::offer(Wanted::DEFAULT);
        for code in [4, 7] {
            assert_eq!(Command::parse(opcode(code), &bare), Err(Illegal), "{code}");
            assert!(Command::parse(opcode(code), &all()).is_ok(), "{code}");
        }
    }

    #[test]
    fn only_gn_makes_a_pasid_count() {
        let raw = opcode(3) | 5 | 0x11 << 32;
        let in_space = |raw| match Command::parse(raw, &all()) {
            Ok(Command::InvalidatePages {
                domain: 0x11, space, ..
            }) => Some(space),
            _ => None,
        };
        assert_eq!(in_space(raw), Some(None));
        assert_eq!(in_space(raw | 4 << 64), Some(Pasid::new(5)));
    }
}
