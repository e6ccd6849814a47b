//! Base address registers: what a function decodes, sizing, and where the guest put it.
//!
//! PCI Express Base Specification 7.5.1.2.1.

use super::access::DwordWrite;
use super::function::Command;
pub use super::tree::BarKind;

impl BarKind {
    /// The read-only low bits of the register.
    const fn flags(self) -> u32 {
        match self {
            Self::Io => 0x1,
            Self::Mem32 { prefetchable: false } => 0x0,
            Self::Mem32 { prefetchable: true } => 0x8,
            Self::Mem64 { prefetchable: false } => 0x4,
            Self::Mem64 { prefetchable: true } => 0xc,
        }
    }

    /// How many registers it takes: 2 for 64-bit memory.
    const fn registers(self) -> u8 {
        match self {
            Self::Io | Self::Mem32 { .. } => 1,
            Self::Mem64 { .. } => 2,
        }
    }

    /// Bytes a BAR of this kind may cover: a power of two between these.
    const fn sizes(self) -> (u64, u64) {
        match self {
            Self::Io => (4, 256),
            Self::Mem32 { .. } => (16, 1 << 31),
            Self::Mem64 { .. } => (16, 1 << 62),
        }
    }
}

/// One BAR as a function declares it. It never changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BarSpec {
    /// The first register it takes, 0 to 5.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes it covers: a power of two, 4 to 256 for I/O, at least 16 for memory.
    pub size: u64,
}

impl BarSpec {
    /// The Command register bit that switches it.
    #[must_use]
    pub const fn address_space(&self) -> Command {
        match self.kind {
            BarKind::Io => Command::IO,
            BarKind::Mem32 { .. } | BarKind::Mem64 { .. } => Command::MEMORY,
        }
    }

    /// Where this BAR points, out of the registers' present values (index to dword).
    #[must_use]
    pub fn address(&self, register: impl Fn(u8) -> u32) -> u64 {
        let low = u64::from(register(self.index));
        let whole = match self.kind {
            BarKind::Io | BarKind::Mem32 { .. } => low,
            BarKind::Mem64 { .. } => u64::from(register(self.index + 1)) << 32 | low,
        };
        whole & !(self.size - 1)
    }
}

/// The BAR registers of one function: six in a type 0 header, two in a type 1 header.
#[derive(Clone, Debug, Default)]
pub struct Bars {
    specs: Vec<BarSpec>,
    /// Per register: what it reads, and which bits the guest may change. Absent ones are all zero.
    registers: [(u32, u32); 6],
}

impl Bars {
    /// Add `spec`.
    ///
    /// # Panics
    ///
    /// When the registers are taken or do not exist, or the size is none for that kind: the device's code
    /// is wrong then, whatever the guest does.
    pub fn add(&mut self, spec: BarSpec) {
        let first = usize::from(spec.index);
        let taken = first..first + usize::from(spec.kind.registers());
        let (least, most) = spec.kind.sizes();
        assert!(
            spec.size.is_power_of_two() && (least..=most).contains(&spec.size),
            "{spec:?}: the size is a power of two from {least} to {most}"
        );
        let writable = !(spec.size - 1);
        let halves = [low_half(writable), high_half(writable)];
        let registers = self
            .registers
            .get_mut(taken)
            .expect("a BAR lies in registers 0 to 5");
        assert!(
            registers.iter().all(|(value, mask)| value | mask == 0),
            "{spec:?}: the register is taken"
        );
        for (register, writable) in registers.iter_mut().zip(halves) {
            *register = (0, writable);
        }
        registers[0].0 = spec.kind.flags();
        self.specs.push(spec);
        self.specs.sort_by_key(|spec| spec.index);
    }

    /// Every BAR there is, in ascending order.
    #[must_use]
    pub fn specs(&self) -> &[BarSpec] {
        &self.specs
    }

    /// Register `index`; 0 where there is none.
    #[must_use]
    pub fn read(&self, index: u8) -> u32 {
        self.registers
            .get(usize::from(index))
            .map_or(0, |(value, _)| *value)
    }

    /// A guest's write to register `index`; whether it changed.
    pub fn write(&mut self, index: u8, write: DwordWrite) -> bool {
        let Some((value, writable)) = self.registers.get_mut(usize::from(index)) else {
            return false;
        };
        let old = std::mem::replace(value, write.store(*value, *writable));
        old != *value
    }

    /// All addresses back to zero.
    pub fn reset(&mut self) {
        for (value, writable) in &mut self.registers {
            *value &= !*writable;
        }
    }
}

const fn low_half(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

const fn high_half(value: u64) -> u32 {
    low_half(value >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(kind: BarKind, size: u64) -> Bars {
        let mut bars = Bars::default();
        bars.add(BarSpec { index: 2, kind, size });
        bars
    }

    #[test]
    fn all_ones_read_back_as_the_size_mask_and_the_kind() {
        let cases = [
            (BarKind::Io, 0x20, 0xffff_ffe1, 0),
            (BarKind::Mem32 { prefetchable: false }, 0x1000, 0xffff_f000, 0),
            (BarKind::Mem32 { prefetchable: true }, 0x10, 0xffff_fff8, 0),
            (
                BarKind::Mem64 { prefetchable: false },
                0x4000,
                0xffff_c004,
                u32::MAX,
            ),
            (
                BarKind::Mem64 { prefetchable: true },
                1 << 34,
                0x0000_000c,
                0xffff_fffc,
            ),
        ];
        for (kind, size, low, high) in cases {
            let mut bars = one(kind, size);
            bars.write(2, DwordWrite::whole(u32::MAX));
            bars.write(3, DwordWrite::whole(u32::MAX));
            assert_eq!((bars.read(2), bars.read(3)), (low, high), "{kind:?} {size:#x}");
        }
    }

    #[test]
    fn registers_that_are_absent_stay_zero() {
        let mut bars = one(BarKind::Io, 8);
        for index in [0, 1, 3, 4, 5, 6, 0xff] {
            assert!(!bars.write(index, DwordWrite::whole(u32::MAX)));
            assert_eq!(bars.read(index), 0);
        }
    }

    #[test]
    fn a_byte_write_moves_only_its_lane() {
        let mut bars = one(BarKind::Mem32 { prefetchable: false }, 0x1000);
        bars.write(2, DwordWrite::whole(0xe000_1000));
        assert!(bars.write(2, DwordWrite::new(3, &[0xd0]).expect("inside")));
        assert_eq!(bars.read(2), 0xd000_1000);
        assert!(!bars.write(2, DwordWrite::new(0, &[0xff]).expect("inside")));
    }

    #[test]
    fn an_address_joins_both_halves_and_loses_the_flags() {
        let mut bars = one(BarKind::Mem64 { prefetchable: true }, 0x1000);
        bars.write(2, DwordWrite::whole(0x8000_0000));
        bars.write(3, DwordWrite::whole(0x12));
        assert_eq!(bars.specs()[0].address(|index| bars.read(index)), 0x12_8000_0000);
        bars.reset();
        assert_eq!(bars.specs()[0].address(|index| bars.read(index)), 0);
        assert_eq!(bars.read(2), 0xc);
    }

    #[test]
    #[should_panic(expected = "the register is taken")]
    fn the_upper_half_of_a_64_bit_bar_cannot_be_given_away() {
        let mut bars = one(BarKind::Mem64 { prefetchable: false }, 0x1000);
        bars.add(BarSpec {
            index: 3,
            kind: BarKind::Io,
            size: 4,
        });
    }

    #[test]
    #[should_panic(expected = "registers 0 to 5")]
    fn a_64_bit_bar_does_not_fit_the_last_register() {
        Bars::default().add(BarSpec {
            index: 5,
            kind: BarKind::Mem64 { prefetchable: false },
            size: 0x1000,
        });
    }

    #[test]
    #[should_panic(expected = "a power of two")]
    fn a_size_that_is_no_power_of_two_is_refused() {
        one(BarKind::Mem32 { prefetchable: false }, 0x3000);
    }
}
