//! What a guest without manners does to a unit that a host serves, and its host with it, from bytes.

use arbitrary::Arbitrary;
use ravelin::iommu::viommu::testing::{Deed, dte};

use crate::steps::steps;

#[derive(Arbitrary, Debug)]
enum Step {
    Register {
        at: u16,
        len: u8,
        value: u64,
    },
    Base {
        register: u8,
        page: u32,
        length: u8,
    },
    Control {
        bit: u8,
        on: bool,
    },
    Table {
        page: u16,
        size: u16,
    },
    Word {
        index: u8,
        word: u8,
        value: u64,
    },
    Entry {
        index: u8,
        flags: u8,
        root: u32,
        domain: u16,
    },
    Renumber {
        index: u8,
        id: u16,
    },
    Configuration {
        dword: u8,
        value: u32,
    },
    Reset,
    Refuse(u8),
    Watchable(bool),
    Break,
}

/// A page of the first gigabyte, mostly one of RAM.
fn page(number: impl Into<u64>) -> u64 {
    (number.into() & 0x3_ffff) << 12
}

impl From<Step> for Deed {
    fn from(step: Step) -> Self {
        let function = |index: u8| usize::from(index) % 3;
        match step {
            Step::Register { at, len, value } => Self::Register {
                at: at.into(),
                len: 1 << (len & 3),
                value,
            },
            Step::Base {
                register,
                page: number,
                length,
            } => Self::Register {
                at: [0x08, 0x10, 0x38, 0x100][usize::from(register & 3)],
                len: 8,
                value: page(number) | u64::from(length & 15) << 56,
            },
            Step::Control { bit, on } => Self::Control {
                bit: u32::from(bit & 63),
                on,
            },
            Step::Table { page: number, size } => Self::Table {
                base: page(number & 0x7ff),
                size: u64::from(size & 0x1ff),
            },
            Step::Word { index, word, value } => Self::Word {
                index: function(index),
                word: u64::from(word & 3),
                value,
            },
            Step::Entry {
                index,
                flags,
                root,
                domain,
            } => {
                let [host, guest, ..] = dte(u64::from(root) << 12, domain);
                // V, TV, GIOV, GV, IR, IW: mostly set.
                let bits = [0, 1, 54, 55, 61, 62];
                let clear = |(at, bit): (usize, &u64)| u64::from(flags >> at & 1) << bit;
                let cleared: u64 = bits.iter().enumerate().map(clear).sum();
                Self::Entry {
                    index: function(index),
                    entry: [host & !cleared, guest, u64::from(flags >> 6) << 54, 0],
                }
            }
            Step::Renumber { index, id } => Self::Renumber {
                index: function(index),
                id,
            },
            Step::Configuration { dword, value } => Self::Configuration {
                dword: u16::from(dword & 0x3f),
                value,
            },
            Step::Reset => Self::Reset,
            Step::Refuse(after) => Self::Refuse {
                after: usize::from(after & 7),
            },
            Step::Watchable(watchable) => Self::Watchable(watchable),
            Step::Break => Self::Break,
        }
    }
}

/// The deeds that `input` stands for.
pub fn deeds(input: &[u8]) -> impl Iterator<Item = Deed> {
    steps::<Step>(input).map(Deed::from)
}
