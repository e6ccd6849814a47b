//! Byte-enabled dwords: how a guest's access of any width at any offset reaches 32-bit registers.
//!
//! Hardware reads and writes configuration space in dwords with a byte-enable per lane (PCI Express Base
//! Specification 2.2.5). Keeping the lanes matters for write-one-to-clear bits: "read, merge, write back"
//! of a narrow write would clear bits in the bytes the guest did not touch.

/// The bytes a guest wrote inside one aligned dword.
///
/// At least one lane is enabled, and lanes that are not hold zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DwordWrite {
    value: u32,
    mask: u32,
}

impl DwordWrite {
    /// `bytes` written from byte `lane` (0 to 3) on; `None` when there are none or they leave the dword.
    #[must_use]
    pub fn new(lane: usize, bytes: &[u8]) -> Option<Self> {
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        let end = lane.checked_add(bytes.len())?;
        value
            .get_mut(lane..end)
            .filter(|lanes| !lanes.is_empty())?
            .copy_from_slice(bytes);
        mask.get_mut(lane..end)?.fill(0xff);
        Some(Self {
            value: u32::from_le_bytes(value),
            mask: u32::from_le_bytes(mask),
        })
    }

    /// All four lanes.
    #[must_use]
    pub const fn whole(value: u32) -> Self {
        Self {
            value,
            mask: u32::MAX,
        }
    }

    /// What was written; zero in lanes that were not.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.value
    }

    /// 0xff in each lane that was written.
    #[must_use]
    pub const fn mask(self) -> u32 {
        self.mask
    }

    /// The part of the write that falls into `lanes`, or `None` when none does.
    ///
    /// `lanes` has 0xff in each lane to keep.
    #[must_use]
    pub const fn restrict(self, lanes: u32) -> Option<Self> {
        let mask = self.mask & lanes;
        if mask == 0 {
            return None;
        }
        Some(Self {
            value: self.value & mask,
            mask,
        })
    }

    /// Ordinary storage: written lanes of `writable` bits replace `old`.
    #[must_use]
    pub const fn store(self, old: u32, writable: u32) -> u32 {
        let mask = self.mask & writable;
        old & !mask | self.value & mask
    }

    /// Write-one-to-clear: only ones the guest really wrote clear a bit of `w1c`.
    #[must_use]
    pub const fn clear(self, old: u32, w1c: u32) -> u32 {
        old & !(self.value & w1c)
    }

    /// The bits of `bits` that were written as one, for bits that start something.
    #[must_use]
    pub const fn ones(self, bits: u32) -> u32 {
        self.value & bits
    }
}

/// A dword of storage with its access classes: the simplest register, and most of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Register {
    value: u32,
    reset: u32,
    writable: u32,
    write_one_to_clear: u32,
}

impl Register {
    /// Always `value`.
    #[must_use]
    pub const fn read_only(value: u32) -> Self {
        Self {
            value,
            reset: value,
            writable: 0,
            write_one_to_clear: 0,
        }
    }

    /// `reset` after reset, of which the guest may change `writable`.
    #[must_use]
    pub const fn writable(reset: u32, writable: u32) -> Self {
        Self {
            value: reset,
            reset,
            writable,
            write_one_to_clear: 0,
        }
    }

    /// The same, where ones written to `bits` clear them.
    #[must_use]
    pub const fn clears(self, bits: u32) -> Self {
        Self {
            write_one_to_clear: bits,
            ..self
        }
    }

    /// The present value.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.value
    }

    /// A guest's write.
    pub const fn write(&mut self, write: DwordWrite) {
        self.value = write.clear(write.store(self.value, self.writable), self.write_one_to_clear);
    }

    /// Our own change of what the guest sees: `bits` become those of `value`.
    pub const fn update(&mut self, bits: u32, value: u32) {
        self.value = self.value & !bits | value & bits;
    }

    /// As after reset. Bits changed by [`Register::update`] go back too.
    pub const fn reset(&mut self) {
        self.value = self.reset;
    }
}

/// Fill `data` from `offset` bytes into a space of dwords; `read` gets dword indices.
pub fn read_dwords(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u32) {
    for (dword, lane, piece) in pieces(offset, data.len()) {
        let bytes = read(dword).to_le_bytes();
        let len = piece.len();
        data[piece].copy_from_slice(&bytes[lane..lane + len]);
    }
}

/// Take `data` at `offset` bytes into a space of dwords; `write` gets dword indices, in ascending order.
pub fn write_dwords(offset: u64, data: &[u8], mut write: impl FnMut(u64, DwordWrite)) {
    for (dword, lane, piece) in pieces(offset, data.len()) {
        let lanes = DwordWrite::new(lane, &data[piece]).expect("a piece is a non-empty part of one dword");
        write(dword, lanes);
    }
}

/// `len` bytes from `offset` cut at dword borders: dword index, first lane, and which bytes.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let lane = usize::from(offset.to_le_bytes()[0] & 3);
    let first = offset / 4;
    let dwords = (lane + len).div_ceil(4);
    (0..dwords).map(move |index| {
        let start = (index * 4).saturating_sub(lane);
        let end = ((index + 1) * 4 - lane).min(len);
        (
            first + index as u64,
            if index == 0 { lane } else { 0 },
            start..end,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_the_upper_half_of_status_clears_nothing_in_the_lower() {
        let upper = DwordWrite::new(2, &[0xff, 0xff]).expect("inside");
        assert_eq!(upper.clear(0xf0f0_f0f0, u32::MAX), 0x0000_f0f0);
    }

    #[test]
    fn lanes_do_not_cross_and_reserved_bits_do_not_stick() {
        let byte = DwordWrite::new(1, &[0xff]).expect("inside");
        assert_eq!(byte.store(0, 0x00ff_3f00), 0x3f00);
        assert_eq!((byte.value(), byte.mask()), (0xff00, 0xff00));
    }

    #[test]
    fn a_write_that_leaves_the_dword_or_has_no_bytes_is_none() {
        assert_eq!(DwordWrite::new(3, &[0; 2]), None);
        assert_eq!(DwordWrite::new(4, &[0]), None);
        assert_eq!(DwordWrite::new(0, &[]), None);
        assert_eq!(DwordWrite::new(usize::MAX, &[0]), None);
    }

    #[test]
    fn a_restricted_write_keeps_only_its_lanes() {
        let write = DwordWrite::whole(0x1122_3344);
        assert_eq!(write.restrict(0xffff_0000), DwordWrite::new(2, &[0x22, 0x11]));
        let low = DwordWrite::new(0, &[0x44]).expect("inside");
        assert_eq!(low.restrict(0xffff_0000), None);
    }

    #[test]
    fn a_register_stores_clears_and_resets_by_class() {
        let mut register = Register::writable(0x0000_0001, 0xff).clears(0xf000_0000);
        register.update(0x5000_0000, u32::MAX);
        register.write(DwordWrite::whole(0x1000_ffaa));
        assert_eq!(register.get(), 0x4000_00aa);
        register.reset();
        assert_eq!(register.get(), 1);
    }

    #[test]
    fn accesses_of_every_width_at_every_offset_see_the_same_bytes() {
        let bytes: Vec<u8> = (0..24).collect();
        let dword = |index: u64| {
            let at = usize::try_from(index).expect("small") * 4;
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"))
        };
        for (offset, len) in (0..12_usize).flat_map(|offset| (1..=8).map(move |len| (offset, len))) {
            let mut data = vec![0xee; len];
            read_dwords(offset as u64, &mut data, dword);
            assert_eq!(data, bytes[offset..offset + len], "{offset} {len}");
            let mut copy = [0_u32; 6];
            write_dwords(offset as u64, &data, |index, write| {
                let slot = &mut copy[usize::try_from(index).expect("small")];
                *slot = write.store(*slot, u32::MAX);
            });
            let written: Vec<u8> = copy.iter().flat_map(|dword| dword.to_le_bytes()).collect();
            assert_eq!(written[offset..offset + len], data, "{offset} {len}");
            assert_eq!(
                written.iter().map(|b| u32::from(*b)).sum::<u32>(),
                data.iter().map(|b| u32::from(*b)).sum::<u32>()
            );
        }
    }
}
