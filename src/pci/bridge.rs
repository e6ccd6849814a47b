//! What a type 1 header adds: bus numbers, forwarding windows, bridge control.
//!
//! PCI Express Base Specification 7.5.1.3. The registers read as written; whether a window is open and what
//! it means is said by [`BridgeRegisters::windows`].

use std::ops::RangeInclusive;

use super::access::{DwordWrite, Register};
use super::function::ConfigEffect;
use super::tree::PortRange;
use crate::platform::addr::{Gpa, GpaRange};

/// Primary, secondary and subordinate bus number; there is no secondary latency.
const BUS_NUMBERS: u32 = 0x00ff_ffff;
/// The writable bits of I/O base and limit; 16-bit ports, so the low nibbles are zero.
const IO_WINDOW: u32 = 0xf0f0;
/// Secondary Status: the bits a guest may clear.
const SECONDARY_STATUS_CLEARS: u32 = 0xf900 << 16;
const MEMORY_WINDOW: u32 = 0xfff0_fff0;
/// Prefetchable windows are 64-bit.
const PREFETCHABLE_64: u32 = 0x0001_0001;
/// Bridge Control: parity error response, SERR, secondary bus reset.
const BRIDGE_CONTROL: u32 = 0x0043 << 16;
const SECONDARY_BUS_RESET: u32 = 0x0040 << 16;
/// Windows end at the last byte of a unit.
const IO_UNIT_LAST: u16 = 0xfff;
const MEMORY_UNIT_LAST: u64 = 0xf_ffff;

/// What a bridge forwards downwards. A `None` window is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Forwarded {
    /// I/O ports.
    pub io: Option<PortRange>,
    /// The memory window below 4 GiB.
    pub memory: Option<GpaRange>,
    /// The prefetchable memory window.
    pub prefetchable: Option<GpaRange>,
}

/// The registers of a type 1 header that a type 0 header has not.
#[derive(Clone)]
pub struct BridgeRegisters {
    buses: Register,
    io: Register,
    memory: Register,
    prefetchable: Register,
    prefetchable_base_upper: Register,
    prefetchable_limit_upper: Register,
    control: Register,
    /// Whether it has the windows that a bridge may be without.
    has_io: bool,
    has_prefetchable: bool,
}

impl BridgeRegisters {
    /// As after reset: all bus numbers 0.
    pub(super) const fn new() -> Self {
        Self {
            buses: Register::writable(0, BUS_NUMBERS),
            io: Register::writable(0, IO_WINDOW).clears(SECONDARY_STATUS_CLEARS),
            memory: Register::writable(0, MEMORY_WINDOW),
            prefetchable: Register::writable(PREFETCHABLE_64, MEMORY_WINDOW),
            prefetchable_base_upper: Register::writable(0, u32::MAX),
            prefetchable_limit_upper: Register::writable(0, u32::MAX),
            control: Register::writable(0, BRIDGE_CONTROL),
            has_io: true,
            has_prefetchable: true,
        }
    }

    /// Be without the optional windows that are closed now: their registers read as zero and stay so (PCI-to-PCI Bridge
    /// Architecture Specification 3.2.5.6 and 3.2.5.9), and a guest looks for no addresses for them. Before it runs.
    pub(super) fn drop_closed_windows(&mut self) {
        let open = self.windows();
        if open.io.is_none() {
            self.has_io = false;
            self.io = Register::writable(0, 0).clears(SECONDARY_STATUS_CLEARS);
        }
        if open.prefetchable.is_none() {
            self.has_prefetchable = false;
            self.prefetchable = Register::read_only(0);
            self.prefetchable_base_upper = Register::read_only(0);
            self.prefetchable_limit_upper = Register::read_only(0);
        }
    }

    /// The buses it forwards configuration requests to, the one right behind it first; empty when the guest programmed
    /// none.
    #[must_use]
    pub const fn buses(&self) -> RangeInclusive<u8> {
        let [_, secondary, subordinate, _] = self.buses.get().to_le_bytes();
        secondary..=subordinate
    }

    /// Whether everything behind the bridge is held in reset.
    #[must_use]
    pub const fn in_reset(&self) -> bool {
        self.control.get() & SECONDARY_BUS_RESET != 0
    }

    /// The windows as programmed. A base beyond its limit closes a window.
    #[must_use]
    pub fn windows(&self) -> Forwarded {
        let [base, limit, ..] = self.io.get().to_le_bytes();
        let port = |byte: u8| u16::from(byte & 0xf0) << 8;
        let high = |register: Register| u64::from(register.get()) << 32;
        let prefetchable = window(
            self.prefetchable,
            high(self.prefetchable_base_upper),
            high(self.prefetchable_limit_upper),
        );
        Forwarded {
            io: PortRange::new(port(base), port(limit) | IO_UNIT_LAST).filter(|_| self.has_io),
            memory: window(self.memory, 0, 0),
            prefetchable: prefetchable.filter(|_| self.has_prefetchable),
        }
    }

    fn register(&mut self, dword: u16) -> Option<&mut Register> {
        match dword {
            6 => Some(&mut self.buses),
            7 => Some(&mut self.io),
            8 => Some(&mut self.memory),
            9 => Some(&mut self.prefetchable),
            10 => Some(&mut self.prefetchable_base_upper),
            11 => Some(&mut self.prefetchable_limit_upper),
            15 => Some(&mut self.control),
            _ => None,
        }
    }

    pub(super) const fn read(&self, dword: u16) -> u32 {
        match dword {
            6 => self.buses.get(),
            7 => self.io.get(),
            8 => self.memory.get(),
            9 => self.prefetchable.get(),
            10 => self.prefetchable_base_upper.get(),
            11 => self.prefetchable_limit_upper.get(),
            15 => self.control.get(),
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let Some(register) = self.register(dword) else {
            return ConfigEffect::empty();
        };
        let old = register.get();
        register.write(write);
        let (new, changed) = (register.get(), register.get() ^ old);
        match dword {
            // The primary number serves conventional PCI only.
            6 if changed & 0x00ff_ff00 != 0 => ConfigEffect::ROUTING,
            7..=11 if changed != 0 => ConfigEffect::DECODING,
            15 if changed & SECONDARY_BUS_RESET == 0 => ConfigEffect::empty(),
            15 if new & SECONDARY_BUS_RESET != 0 => ConfigEffect::SECONDARY_RESET | ConfigEffect::ROUTING,
            15 => ConfigEffect::ROUTING,
            _ => ConfigEffect::empty(),
        }
    }

    pub(super) fn reset(&mut self) {
        for dword in 6..=15 {
            if let Some(register) = self.register(dword) {
                register.reset();
            }
        }
    }
}

/// The window of a base and limit register, with the upper halves of the addresses.
fn window(register: Register, base_upper: u64, limit_upper: u64) -> Option<GpaRange> {
    let base = base_upper | u64::from(register.get() & 0xfff0) << 16;
    let limit = limit_upper | u64::from(register.get() & 0xfff0_0000) | MEMORY_UNIT_LAST;
    // A window of all 2^64 bytes has no length in 64 bits; no bridge needs more than all but one.
    let len = limit.checked_sub(base)?.saturating_add(1);
    GpaRange::new(Gpa(base), len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(values: &[(u16, u32)]) -> BridgeRegisters {
        let mut bridge = BridgeRegisters::new();
        for (dword, value) in values {
            let _ = bridge.write(*dword, DwordWrite::whole(*value));
        }
        bridge
    }

    #[test]
    fn windows_cover_whole_units() {
        let bridge = written(&[
            (7, 0x2010),
            (8, 0xe010_e000),
            (9, 0x0fff_0000),
            (10, 0x80),
            (11, 0x80),
        ]);
        let windows = bridge.windows();
        assert_eq!(windows.io, PortRange::new(0x1000, 0x2fff));
        assert_eq!(windows.memory.expect("open").to_string(), "e0000000-e01fffff");
        assert_eq!(
            windows.prefetchable.expect("open").to_string(),
            "8000000000-800fffffff"
        );
    }

    #[test]
    fn a_base_beyond_its_limit_closes_the_window() {
        let bridge = written(&[(7, 0x00f0), (8, 0x0000_fff0), (9, 0x0000_fff0), (10, 0), (11, 0)]);
        assert_eq!(bridge.windows(), Forwarded::default());
        let crossed = written(&[(9, 0xfff0_0000), (10, 2), (11, 1)]);
        assert_eq!(crossed.windows().prefetchable, None);
    }

    #[test]
    fn optional_windows_that_are_dropped_read_as_zero_and_never_open() {
        let closed = [(7, 0x00f0), (8, 0xe010_e000), (9, 0x0000_fff0)];
        let mut bridge = written(&closed);
        bridge.drop_closed_windows();
        (7..12).for_each(|dword| {
            let _ = bridge.write(dword, DwordWrite::whole(0x1234_5678));
        });
        let read = |bridge: &BridgeRegisters| (7..12).map(|dword| bridge.read(dword)).collect::<Vec<u32>>();
        assert_eq!(read(&bridge), [0, 0x1230_5670, 0, 0, 0]);
        let _ = bridge.write(8, DwordWrite::whole(0xe010_e000));
        let memory_alone = Forwarded {
            memory: bridge.windows().memory,
            ..Forwarded::default()
        };
        assert_eq!(bridge.windows(), memory_alone);
        assert!(memory_alone.memory.is_some());
        bridge.reset();
        assert_eq!(read(&bridge), [0; 5]);
        assert_eq!(bridge.windows().io, None);
    }

    #[test]
    fn windows_that_are_open_are_not_dropped() {
        let open = [(7, 0x2010), (9, 0x0fff_0000), (10, 0x80), (11, 0x80)];
        let mut bridge = written(&open);
        let before = bridge.windows();
        bridge.drop_closed_windows();
        assert_eq!(bridge.windows(), before);
        let _ = bridge.write(7, DwordWrite::whole(0x00f0));
        assert_eq!((bridge.read(7), bridge.windows().io), (0x00f0, None));
    }

    #[test]
    fn the_widest_window_does_not_wrap() {
        let bridge = written(&[(9, 0xfff0_0000), (11, u32::MAX)]);
        assert_eq!(bridge.windows().prefetchable.expect("open").len(), u64::MAX);
    }

    #[test]
    fn only_real_bits_stick() {
        let mut bridge = BridgeRegisters::new();
        (0..16).for_each(|dword| {
            let _ = bridge.write(dword, DwordWrite::whole(u32::MAX));
        });
        let values: Vec<u32> = (4..16).map(|dword| bridge.read(dword)).collect();
        let ones = u32::MAX;
        assert_eq!(
            values,
            [
                0,
                0,
                0x00ff_ffff,
                0xf0f0,
                0xfff0_fff0,
                0xfff1_fff1,
                ones,
                ones,
                0,
                0,
                0,
                0x0043_0000
            ]
        );
        bridge.reset();
        assert_eq!(
            (bridge.read(6), bridge.read(9), bridge.read(15)),
            (0, PREFETCHABLE_64, 0)
        );
    }

    #[test]
    fn bus_numbers_route_and_the_primary_number_does_not() {
        let mut bridge = BridgeRegisters::new();
        assert_eq!(
            bridge.write(6, DwordWrite::new(0, &[7]).expect("inside")),
            ConfigEffect::empty()
        );
        assert_eq!(
            bridge.write(6, DwordWrite::new(1, &[8, 9]).expect("inside")),
            ConfigEffect::ROUTING
        );
        assert_eq!(bridge.buses(), 8..=9);
        assert_eq!(
            bridge.write(6, DwordWrite::whole(0x0009_0807)),
            ConfigEffect::empty()
        );
    }

    #[test]
    fn secondary_bus_reset_starts_at_the_edge_and_holds() {
        let mut bridge = BridgeRegisters::new();
        let set = DwordWrite::new(2, &[0x40]).expect("inside");
        let clear = DwordWrite::new(2, &[0]).expect("inside");
        assert_eq!(
            bridge.write(15, set),
            ConfigEffect::SECONDARY_RESET | ConfigEffect::ROUTING
        );
        assert!(bridge.in_reset());
        assert_eq!(bridge.write(15, set), ConfigEffect::empty());
        assert_eq!(bridge.write(15, clear), ConfigEffect::ROUTING);
        assert!(!bridge.in_reset());
    }
}
