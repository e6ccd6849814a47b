//! What a guest without manners does, and what must hold after each deed.

use super::Rig;
use crate::iommu::viommu::host::HardwareErrors;
use crate::pci::Function;
use crate::pci::access::DwordWrite;
use crate::pci::topology::Observer;
use crate::platform::addr::{Bdf, Sbdf};

/// Something a guest, or what is around it, does.
#[derive(Clone, Debug)]
pub enum Deed {
    /// A write of `len` bytes, at most 8, somewhere in MMIO.
    Register {
        /// Bytes from the first register.
        at: u64,
        /// Bytes.
        len: usize,
        /// Its lowest bytes are written.
        value: u64,
    },
    /// A bit of Control.
    Control {
        /// Which, 0 to 63.
        bit: u32,
        /// Set or clear.
        on: bool,
    },
    /// Device Table Base.
    Table {
        /// A multiple of 4 KiB.
        base: u64,
        /// Pages less one.
        size: u64,
    },
    /// A store to a word of a function's entry where the driver has its table.
    Word {
        /// Which function, 0 to 2.
        index: usize,
        /// Which word, 0 to 3.
        word: u64,
        /// What is stored.
        value: u64,
    },
    /// A whole entry, upper half first.
    Entry {
        /// Whose, 0 to 2.
        index: usize,
        /// The words.
        entry: [u64; 4],
    },
    /// A function has another number, unless another function has that.
    Renumber {
        /// Which, 0 to 2.
        index: usize,
        /// Its requester ID.
        id: u16,
    },
    /// A write to configuration space.
    Configuration {
        /// Where, in dwords.
        dword: u16,
        /// What.
        value: u32,
    },
    /// A reset of the machine.
    Reset,
    /// The host refuses a request.
    Refuse {
        /// So many are granted before.
        after: usize,
    },
    /// Whether pages can be watched changes.
    Watchable(bool),
    /// The host's unit cannot read what serves the guest's.
    Break,
}

impl Deed {
    fn perform(&self, rig: &Rig) {
        match *self {
            Self::Register { at, len, value } => rig.write(at, len, value),
            Self::Control { bit, on } => rig.control(bit, on),
            Self::Table { base, size } => rig.write(0x00, 8, base | size),
            Self::Word { index, word, value } => rig.word(rig.id(index), word, value),
            Self::Entry { index, entry } => rig.entry(index, entry),
            Self::Renumber { index, id } => {
                let bdf = Bdf::from_requester_id(id);
                if rig.requesters.iter().all(|other| other.sbdf().bdf != bdf) {
                    rig.requesters[index].renumber(Sbdf { segment: 0, bdf });
                    rig.unit.renumbered();
                }
            }
            Self::Configuration { dword, value } => {
                // Nothing that it sets off concerns a topology.
                let _ = rig.unit.config_write(dword, DwordWrite::whole(value));
            }
            Self::Reset => rig.unit.reset(),
            Self::Refuse { after } => rig.host.refuse_soon(after),
            Self::Break => {
                rig.host.err(HardwareErrors {
                    lost_records: 1,
                    broken_at: Some(0x10_0000_0000),
                });
                rig.unit.hear_errors();
            }
            Self::Watchable(watchable) => rig.protection.refuse(!watchable),
        }
    }

    /// Do it. Functions reach what registers and memory say, and rings are on that are to be; after a refusal less, until
    /// a register is written that makes the unit ask again. Whether nothing is left to be asked again; `settled` is what
    /// the deed before returned.
    ///
    /// # Panics
    /// When that does not hold.
    #[must_use]
    pub fn perform_and_check(&self, rig: &Rig, settled: bool) -> bool {
        let refusals = || rig.unit.counts().refusals;
        let before = refusals();
        self.perform(rig);
        if settled && refusals() == before {
            rig.check();
            return true;
        }
        rig.check_refused();
        // As long as pages cannot be watched, each time is a refusal.
        let before = refusals();
        rig.write(0x18, 8, rig.read(0x18));
        if refusals() == before {
            rig.check();
            return true;
        }
        rig.check_refused();
        false
    }
}
