//! Configuration space as the guest sees it: per bit, whether it is the device's or ours.
//!
//! A register is a dword with three masks: which bits the device answers, which the guest may change here, and which
//! of the guest's writes the device hears of. A write of any width at any offset arrives as lanes, so that no byte
//! that was not written is touched. What the masks are, [`super::survey`] decides once.

use crate::pci::CONFIG_DWORDS;
use crate::pci::access::DwordWrite;

/// One dword.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Dword {
    value: u32,
    reset: u32,
    /// Bits that the device answers.
    passed: u32,
    /// Bits of ours that the guest may change.
    writable: u32,
    /// Bits that the device hears of, besides.
    forwarded: u32,
}

impl Dword {
    /// Always `value`.
    pub(super) const fn fixed(value: u32) -> Self {
        Self::writable(value, 0)
    }

    /// `value` after reset, of which the guest may change `writable`.
    pub(super) const fn writable(value: u32, writable: u32) -> Self {
        Self {
            value,
            reset: value,
            passed: 0,
            writable,
            forwarded: 0,
        }
    }

    /// The same, where the device answers `bits`.
    pub(super) const fn passing(self, bits: u32) -> Self {
        Self { passed: bits, ..self }
    }

    /// The same, where the device hears of writes to `bits`.
    pub(super) const fn forwarding(self, bits: u32) -> Self {
        Self {
            forwarded: bits,
            ..self
        }
    }
}

/// What a write is to the device: these bits of this dword become those of `value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Forward {
    /// Bits to change.
    pub(super) bits: u32,
    /// What they become.
    pub(super) value: u32,
}

impl Forward {
    /// The bytes to write where the dword holds `old`, as first lane and bytes: runs of lanes with a bit to change, cut
    /// as a bus would, to 1, 2 or 4 bytes at their own alignment.
    pub(super) fn pieces(self, old: u32) -> impl Iterator<Item = (usize, Vec<u8>)> {
        let new = (old & !self.bits | self.value & self.bits).to_le_bytes();
        let touched = self.bits.to_le_bytes().map(|bits| bits != 0);
        let pieces: &[(usize, usize)] = match touched {
            [true, true, true, true] => &[(0, 4)],
            [true, true, _, _] => &[(0, 2), (2, 1), (3, 1)],
            [_, _, true, true] => &[(0, 1), (1, 1), (2, 2)],
            _ => &[(0, 1), (1, 1), (2, 1), (3, 1)],
        };
        let pieces = pieces.iter().filter(move |(first, _)| touched[*first]);
        pieces.map(move |(first, len)| (*first, new[*first..first + len].to_vec()))
    }
}

/// The whole of configuration space, behind the BARs which are kept by themselves.
pub(super) struct ConfigTable(Vec<Dword>);

impl ConfigTable {
    /// Nothing but zeros.
    pub(super) fn new() -> Self {
        Self(vec![Dword::default(); usize::from(CONFIG_DWORDS)])
    }

    /// Dword number `dword` is `register` from here on.
    pub(super) fn set(&mut self, dword: u16, register: Dword) {
        if let Some(slot) = self.0.get_mut(usize::from(dword)) {
            *slot = register;
        }
    }

    /// Of `dword`, `bits` are ours and always those of `value`.
    pub(super) fn head(&mut self, dword: u16, bits: u32, value: u32) {
        if let Some(register) = self.0.get_mut(usize::from(dword)) {
            register.reset = register.reset & !bits | value & bits;
            register.value = register.value & !bits | value & bits;
            register.passed &= !bits;
            register.writable &= !bits;
            register.forwarded &= !bits;
        }
    }

    /// Our bits of `dword`.
    pub(super) fn value(&self, dword: u16) -> u32 {
        self.0
            .get(usize::from(dword))
            .map_or(0, |register| register.value)
    }

    /// Keep our bits of `dword` as they were: what was written there is discarded.
    pub(super) fn restore(&mut self, dword: u16, value: u32) {
        if let Some(register) = self.0.get_mut(usize::from(dword)) {
            register.value = value;
        }
    }

    /// What the guest reads, where `device` answers for the device's bits, if there are any.
    pub(super) fn read(&self, dword: u16, device: impl FnOnce() -> u32) -> u32 {
        let register = self.0.get(usize::from(dword)).copied().unwrap_or_default();
        match register.passed {
            0 => register.value,
            passed => register.value & !passed | device() & passed,
        }
    }

    /// A guest's write; what the device hears of it.
    pub(super) fn write(&mut self, dword: u16, write: DwordWrite) -> Option<Forward> {
        let register = self.0.get_mut(usize::from(dword))?;
        register.value = write.store(register.value, register.writable);
        let bits = write.mask() & register.forwarded;
        (bits != 0).then(|| Forward {
            bits,
            value: write.value(),
        })
    }

    /// As after reset.
    pub(super) fn reset(&mut self) {
        for register in &mut self.0 {
            register.value = register.reset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(register: Dword) -> ConfigTable {
        let mut table = ConfigTable::new();
        table.set(20, register);
        table
    }

    fn bytes(forward: Forward, old: u32) -> Vec<(usize, Vec<u8>)> {
        forward.pieces(old).collect()
    }

    #[test]
    fn the_device_is_asked_for_its_own_bits_only() {
        let table = one(Dword::fixed(0x1111_0000).passing(0xffff));
        assert_eq!(table.read(20, || 0xdead_beef), 0x1111_beef);
        assert_eq!(
            one(Dword::fixed(7)).read(20, || unreachable!("nothing is passed")),
            7
        );
        assert_eq!(table.read(1024, || 5), 0);
    }

    #[test]
    fn a_narrow_write_changes_no_byte_beside_it() {
        let mut table = one(Dword::writable(0x4433_2211, u32::MAX).forwarding(u32::MAX));
        let forward = table.write(20, DwordWrite::new(1, &[0xaa, 0xbb]).expect("inside"));
        assert_eq!(table.value(20), 0x44bb_aa11);
        let forward = forward.expect("heard");
        assert_eq!(forward.bits, 0x00ff_ff00);
        assert_eq!(bytes(forward, 0x4433_2211), [(1, vec![0xaa]), (2, vec![0xbb])]);
    }

    #[test]
    fn bits_that_are_not_forwarded_reach_the_device_as_it_has_them() {
        let mut table = one(Dword::writable(0, 0xffff).forwarding(0x0010));
        let forward = table.write(20, DwordWrite::whole(u32::MAX)).expect("heard");
        assert_eq!(bytes(forward, 0x1234_5600), [(0, vec![0x10])]);
        assert_eq!(table.value(20), 0xffff);
        assert_eq!(
            table.write(20, DwordWrite::new(1, &[0xff]).expect("inside")),
            None
        );
    }

    #[test]
    fn whole_and_half_dwords_go_as_one() {
        let forward = |bits| Forward {
            bits,
            value: 0x4433_2211,
        };
        assert_eq!(bytes(forward(u32::MAX), 0), [(0, vec![0x11, 0x22, 0x33, 0x44])]);
        assert_eq!(bytes(forward(0xffff), 0), [(0, vec![0x11, 0x22])]);
        assert_eq!(bytes(forward(0xffff_0000), 0), [(2, vec![0x33, 0x44])]);
        assert_eq!(
            bytes(forward(0xff_ffff), 0),
            [(0, vec![0x11, 0x22]), (2, vec![0x33])]
        );
    }

    #[test]
    fn read_only_bits_stay_and_reset_takes_all_back() {
        let mut table = one(Dword::writable(0x8000_0001, 0xff00));
        assert_eq!(table.write(20, DwordWrite::whole(0)), None);
        assert_eq!(table.value(20), 0x8000_0001);
        table.write(20, DwordWrite::whole(0xff00));
        table.reset();
        assert_eq!(table.value(20), 0x8000_0001);
        assert_eq!(table.write(2000, DwordWrite::whole(1)), None);
    }
}
