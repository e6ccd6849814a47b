//! The BARs that are nothing but memory: of every kind and of different sizes, so that a guest that reads back
//! what it wrote has tried every kind of window on the way.

use crate::pci::bar::BarSpec;
use crate::pci::tree::BarKind;

/// The BARs that are memory. Together they are all that the device holds for a guest.
pub const MEMORY_BARS: [BarSpec; 4] = [
    BarSpec {
        index: 1,
        kind: BarKind::Mem32 { prefetchable: false },
        size: 0x100,
    },
    BarSpec {
        index: 2,
        kind: BarKind::Mem64 { prefetchable: true },
        size: 0x4000,
    },
    BarSpec {
        index: 4,
        kind: BarKind::Mem32 { prefetchable: true },
        size: 0x1000,
    },
    BarSpec {
        index: 5,
        kind: BarKind::Mem32 { prefetchable: false },
        size: 0x400,
    },
];

/// What one of them holds.
#[derive(Debug)]
struct Memory {
    spec: BarSpec,
    bytes: Vec<u8>,
    /// Each half shows where the other one belongs.
    swapped: bool,
}

/// What all of them hold.
#[derive(Debug)]
pub(super) struct Memories(Vec<Memory>);

/// There is no such BAR of memory, or it is not in the state that the command needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refused;

impl Memories {
    /// All zero.
    pub(super) fn new() -> Self {
        let memory = |spec: BarSpec| Memory {
            spec,
            bytes: vec![0; usize::try_from(spec.size).expect("a few pages")],
            swapped: false,
        };
        Self(MEMORY_BARS.map(memory).into())
    }

    /// A guest's read; what is not memory reads zero.
    pub(super) fn read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let memory = self.0.iter().find(|memory| memory.spec.index == bar);
        for (byte, at) in data.iter_mut().zip(0..) {
            *byte = memory
                .and_then(|memory| Some(*memory.bytes.get(memory.place(offset, at)?)?))
                .unwrap_or(0);
        }
    }

    /// A guest's write; what is not memory ignores it.
    pub(super) fn write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let Some(memory) = self.0.iter_mut().find(|memory| memory.spec.index == bar) else {
            return;
        };
        for (byte, at) in data.iter().zip(0..) {
            if let Some(cell) = memory
                .place(offset, at)
                .and_then(|place| memory.bytes.get_mut(place))
            {
                *cell = *byte;
            }
        }
    }

    /// Let the halves of `bar` change places, and put in each the signature that the driver looks for.
    pub(super) fn swap(&mut self, bar: u32) -> Result<(), Refused> {
        let memory = self.find(bar)?;
        memory.swapped = true;
        let index = memory.spec.index;
        let middle = memory.bytes.len() / 2;
        let (low, high) = memory.bytes.split_at_mut(middle);
        high.fill(signature(index, 0));
        low.fill(signature(index, 1));
        Ok(())
    }

    /// Put the halves of `bar` where they belong.
    pub(super) fn unswap(&mut self, bar: u32) -> Result<(), Refused> {
        let memory = self.find(bar)?;
        if std::mem::take(&mut memory.swapped) {
            Ok(())
        } else {
            Err(Refused)
        }
    }

    /// All zero, and in its place.
    pub(super) fn reset(&mut self) {
        for memory in &mut self.0 {
            memory.bytes.fill(0);
            memory.swapped = false;
        }
    }

    fn find(&mut self, bar: u32) -> Result<&mut Memory, Refused> {
        let found = self
            .0
            .iter_mut()
            .find(|memory| u32::from(memory.spec.index) == bar);
        found.ok_or(Refused)
    }
}

impl Memory {
    /// Which byte shows `at` bytes behind `offset` of the BAR.
    fn place(&self, offset: u64, at: u64) -> Option<usize> {
        let offset = offset.checked_add(at).filter(|offset| *offset < self.spec.size)?;
        let half = if self.swapped { self.spec.size / 2 } else { 0 };
        usize::try_from(offset ^ half).ok()
    }
}

/// What the driver looks for in the half of `bar` that shows as number `half`.
const fn signature(bar: u8, half: u8) -> u8 {
    0x50 + bar * 8 + half
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(memories: &Memories, bar: u8, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        memories.read(bar, offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn what_is_written_is_read_in_every_bar_and_in_no_other() {
        let mut memories = Memories::new();
        for spec in MEMORY_BARS {
            memories.write(spec.index, spec.size - 4, &[spec.index; 4]);
        }
        for spec in MEMORY_BARS {
            assert_eq!(
                read(&memories, spec.index, spec.size - 4),
                u32::from_ne_bytes([spec.index; 4])
            );
            assert_eq!(read(&memories, spec.index, spec.size - 8), 0);
        }
        memories.reset();
        assert_eq!(read(&memories, 1, 0xfc), 0);
    }

    #[test]
    fn bars_that_are_no_memory_and_ends_of_bars_hold_nothing() {
        let mut memories = Memories::new();
        for (bar, offset) in [(0, 0), (3, 0), (6, 0), (0xff, 0), (1, 0x100), (1, u64::MAX - 2)] {
            memories.write(bar, offset, &[0xff; 4]);
            assert_eq!(read(&memories, bar, offset), 0, "BAR {bar} {offset:#x}");
        }
        memories.write(1, 0xfe, &[1, 2, 3, 4]);
        assert_eq!(read(&memories, 1, 0xfe), 0x0201);
    }

    #[test]
    fn swapped_halves_show_their_signatures_and_stay_apart() {
        let mut memories = Memories::new();
        memories.swap(2).expect("memory");
        assert_eq!(
            [0, 0x1ffc, 0x2000, 0x3ffc].map(|at| read(&memories, 2, at)),
            [0x6060_6060, 0x6060_6060, 0x6161_6161, 0x6161_6161]
        );
        memories.write(2, 0, &[9; 4]);
        assert_eq!(memories.unswap(2), Ok(()));
        assert_eq!(read(&memories, 2, 0x2000), 0x0909_0909);
        assert_eq!(read(&memories, 2, 0), 0x6161_6161);
    }

    #[test]
    fn halves_of_nothing_and_halves_in_their_places_are_refused() {
        let mut memories = Memories::new();
        for bar in [0, 3, 6, u32::MAX] {
            assert_eq!(memories.swap(bar), Err(Refused));
            assert_eq!(memories.unswap(bar), Err(Refused));
        }
        assert_eq!(memories.unswap(1), Err(Refused));
    }
}
