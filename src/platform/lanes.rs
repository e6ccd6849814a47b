//! Writes to parts of a register.

/// The bytes a guest wrote of one register of at most eight bytes. Lanes outside `mask` hold zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneWrite {
    value: u64,
    mask: u64,
}

/// The byte lanes `from..from + len` of a quadword as a mask, if a register takes such an access.
fn lanes(from: usize, len: usize) -> Option<u64> {
    let aligned = matches!(len, 1 | 2 | 4 | 8) && from.is_multiple_of(len) && from + len <= 8;
    aligned.then(|| (u64::MAX >> (64 - 8 * len)) << (8 * from))
}

impl LaneWrite {
    /// `bytes` written `from` bytes into an aligned quadword; `None` for an access that no register takes: one that is no
    /// power of two, not aligned to itself, or leaves the quadword.
    #[must_use]
    pub fn new(from: usize, bytes: &[u8]) -> Option<Self> {
        let mask = lanes(from, bytes.len())?;
        let mut quadword = [0; 8];
        quadword[from..from + bytes.len()].copy_from_slice(bytes);
        let value = u64::from_le_bytes(quadword);
        Some(Self { value, mask })
    }

    /// The lanes that a write of `data` at `offset`, of whatever length, has in the register of `len` bytes (at most 8) that
    /// begins at `register`; `None` when they do not touch. All offsets are into the same device.
    #[must_use]
    pub fn of(offset: u64, data: &[u8], register: u64, len: u64) -> Option<Self> {
        let mut lanes = Self { value: 0, mask: 0 };
        for (at, byte) in (offset..).zip(data) {
            let lane = at.checked_sub(register).filter(|lane| *lane < len.min(8));
            if let Some(lane) = lane {
                lanes.value |= u64::from(*byte) << (8 * lane);
                lanes.mask |= 0xff << (8 * lane);
            }
        }
        (lanes.mask != 0).then_some(lanes)
    }

    /// Ordinary storage: written lanes of writable bits replace the old value.
    #[must_use]
    pub const fn store(self, old: u64, writable: u64) -> u64 {
        let mask = self.mask & writable;
        old & !mask | self.value & mask
    }

    /// This write with zeros in place of ones outside `bits`.
    #[must_use]
    pub const fn only(self, bits: u64) -> Self {
        Self {
            value: self.value & bits,
            mask: self.mask,
        }
    }

    /// Write-one-to-clear: only ones that were really written clear a bit.
    #[must_use]
    pub const fn clear(self, old: u64, w1c: u64) -> u64 {
        old & !(self.value & w1c)
    }
}

/// Copy lanes of a register's value to the guest; an access that no register takes reads zero.
pub fn read_lanes(value: u64, from: usize, data: &mut [u8]) {
    data.fill(0);
    if lanes(from, data.len()).is_some() {
        data.copy_from_slice(&value.to_le_bytes()[from..from + data.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_the_upper_half_clears_nothing_in_the_lower() {
        let write = LaneWrite::new(4, &[0xff; 4]).expect("aligned");
        assert_eq!(write.clear(0x7, 0x67), 0x7);
        let write = LaneWrite::new(0, &[0x2, 0, 0, 0]).expect("aligned");
        assert_eq!(write.clear(0x7, 0x67), 0x5);
    }

    #[test]
    fn reserved_bits_do_not_stick_and_lanes_do_not_cross() {
        let write = LaneWrite::new(4, &[0xff; 4]).expect("aligned");
        assert_eq!(write.store(0x1234, 0x0f0f_ffff_ffff_f000), 0x0f0f_ffff_0000_1234);
        let write = LaneWrite::new(1, &[0xab]).expect("aligned");
        assert_eq!(write.store(u64::MAX, u64::MAX), 0xffff_ffff_ffff_abff);
    }

    #[test]
    fn ones_that_are_not_to_be_written_become_zeros() {
        let write = LaneWrite::new(0, &[0xff, 0xff]).expect("aligned").only(0x0f0f);
        assert_eq!(write.store(0xffff_aaaa, u64::MAX), 0xffff_0f0f);
    }

    #[test]
    fn accesses_that_no_register_takes_are_refused() {
        for (from, len) in [(1, 2), (2, 4), (4, 8), (0, 3), (6, 4), (7, 2), (0, 0), (0, 16)] {
            assert_eq!(LaneWrite::new(from, &vec![0; len]), None, "{from} {len}");
            let mut data = vec![0xee; len];
            read_lanes(u64::MAX, from, &mut data);
            assert!(data.iter().all(|byte| *byte == 0), "{from} {len}");
        }
    }

    #[test]
    fn reads_return_the_lanes_asked_for() {
        let mut half = [0; 4];
        read_lanes(0x1122_3344_5566_7788, 4, &mut half);
        assert_eq!(u32::from_le_bytes(half), 0x1122_3344);
    }

    #[test]
    fn a_narrow_write_leaves_the_other_lanes_alone() {
        let lanes = LaneWrite::of(1, &[0xaa], 0, 4).expect("touches");
        assert_eq!(lanes.store(0x1122_3344, u64::MAX), 0x1122_aa44);
        assert_eq!(lanes.store(0x1122_3344, 0x0f00), 0x1122_3a44);
    }

    #[test]
    fn a_wide_write_reaches_each_register_with_its_own_lanes() {
        let data = [1, 2, 3, 4];
        assert_eq!(
            LaneWrite::of(0, &data, 0, 2).expect("touches").store(0, !0),
            0x0201
        );
        assert_eq!(
            LaneWrite::of(0, &data, 2, 2).expect("touches").store(0, !0),
            0x0403
        );
        assert_eq!(LaneWrite::of(0, &data, 4, 2), None);
        assert_eq!(LaneWrite::of(2, &data, 0, 2), None);
    }
}
