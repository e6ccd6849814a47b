//! How an access of 1, 2, 4 or 8 bytes meets registers of another width.
//!
//! Two shapes cover the board: devices of eight bits, where a wider access is a row of byte accesses, as the
//! chipset splits it on the way to an 8-bit device; and wider registers, where a write carries its lanes, so
//! that a narrow write never touches what it did not write.

/// Answer a read of an 8-bit device: one byte register after the other, in ascending order.
pub fn read_bytes(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (at, byte) in (offset..).zip(data) {
        *byte = register(at);
    }
}

/// Carry out a write to an 8-bit device: one byte register after the other, in ascending order.
pub fn write_bytes(offset: u64, data: &[u8], mut register: impl FnMut(u64, u8)) {
    for (at, byte) in (offset..).zip(data) {
        register(at, *byte);
    }
}

/// Answer a read with the bytes of `value`, least significant first; zeros beyond eight.
pub fn answer(data: &mut [u8], value: u64) {
    let mut bytes = value.to_le_bytes().into_iter();
    data.fill_with(|| bytes.next().unwrap_or(0));
}

/// The part of a write that falls into one register. Lanes outside `mask` hold zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lanes {
    value: u64,
    mask: u64,
}

impl Lanes {
    /// The lanes that a write of `data` at `offset` has in the register of `len` bytes (at most 8) that begins
    /// at `register`; `None` when they do not touch. All offsets are into the same device.
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

    /// Write one to clear: only ones the guest really wrote clear a bit.
    #[must_use]
    pub const fn clear(self, old: u64, w1c: u64) -> u64 {
        old & !(self.value & w1c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_access_to_an_8_bit_device_goes_byte_by_byte_upwards() {
        let mut seen = Vec::new();
        write_bytes(3, &[1, 2, 3, 4], |at, byte| seen.push((at, byte)));
        assert_eq!(seen, [(3, 1), (4, 2), (5, 3), (6, 4)]);
        let mut data = [0; 4];
        read_bytes(3, &mut data, |at| at.to_le_bytes()[0]);
        assert_eq!(data, [3, 4, 5, 6]);
    }

    #[test]
    fn a_narrow_write_leaves_the_other_lanes_alone() {
        let lanes = Lanes::of(1, &[0xaa], 0, 4).expect("touches");
        assert_eq!(lanes.store(0x1122_3344, u64::MAX), 0x1122_aa44);
        assert_eq!(lanes.store(0x1122_3344, 0x0f00), 0x1122_3a44);
    }

    #[test]
    fn writing_the_upper_half_clears_nothing_below() {
        let lanes = Lanes::of(4, &[0xff; 4], 0, 8).expect("touches");
        assert_eq!(lanes.clear(u64::MAX, u64::MAX), 0xffff_ffff);
    }

    #[test]
    fn a_wide_write_reaches_each_register_with_its_own_lanes() {
        let data = [1, 2, 3, 4];
        assert_eq!(Lanes::of(0, &data, 0, 2).expect("touches").store(0, !0), 0x0201);
        assert_eq!(Lanes::of(0, &data, 2, 2).expect("touches").store(0, !0), 0x0403);
        assert_eq!(Lanes::of(0, &data, 4, 2), None);
        assert_eq!(Lanes::of(2, &data, 0, 2), None);
    }

    #[test]
    fn an_answer_is_cut_or_filled_with_zeros() {
        let (mut narrow, mut wide) = ([0; 2], [0xee; 9]);
        answer(&mut narrow, 0x1122_3344);
        answer(&mut wide, 0x1122_3344);
        assert_eq!(narrow, [0x44, 0x33]);
        assert_eq!(wide, [0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0, 0]);
    }
}
