//! How an access of 1, 2, 4 or 8 bytes meets registers of another width: devices of eight bits, where a wider access is a
//! row of byte accesses, as the chipset splits it on the way to an 8-bit device. What a write has of wider registers is a
//! [`LaneWrite`](crate::platform::lanes::LaneWrite).

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
    fn an_answer_is_cut_or_filled_with_zeros() {
        let (mut narrow, mut wide) = ([0; 2], [0xee; 9]);
        answer(&mut narrow, 0x1122_3344);
        answer(&mut wide, 0x1122_3344);
        assert_eq!(narrow, [0x44, 0x33]);
        assert_eq!(wide, [0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0, 0]);
    }
}
