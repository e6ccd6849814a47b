//! Power management (PCI Express Base Specification 7.5.2).

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;

/// Version 3 of the interface, no auxiliary power, no PME.
const CAPABILITIES: u32 = 3 << 16;
/// PowerState: D0 is 0, D3hot is 3. D1 and D2 are not supported.
const POWER_STATE: u32 = 0x3;
const D3_HOT: u32 = 0x3;
/// Going from D3hot to D0 keeps every register, so that suspend and resume need no re-initialisation.
const NO_SOFT_RESET: u32 = 1 << 3;

/// The power management capability of a function that knows D0 and D3hot.
pub struct PowerManagement {
    control: Register,
}

impl Default for PowerManagement {
    fn default() -> Self {
        Self::new()
    }
}

impl PowerManagement {
    /// In D0.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            control: Register::writable(NO_SOFT_RESET, POWER_STATE),
        }
    }

    /// Whether the guest put the function to sleep: it then answers configuration accesses only.
    #[must_use]
    pub const fn is_asleep(&self) -> bool {
        self.control.get() & POWER_STATE == D3_HOT
    }
}

impl Capability for PowerManagement {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x01)
    }

    fn len(&self) -> u16 {
        8
    }

    fn read(&self, dword: u16) -> u32 {
        if dword == 0 {
            CAPABILITIES
        } else {
            self.control.get()
        }
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let old = self.control.get();
        if dword == 1 {
            let mut new = self.control;
            new.write(write);
            // A write of a state that is not supported is discarded (7.5.2.2).
            if matches!(new.get() & POWER_STATE, 0 | D3_HOT) {
                self.control = new;
            }
        }
        if self.control.get() == old {
            ConfigEffect::empty()
        } else {
            ConfigEffect::DECODING
        }
    }

    fn reset(&mut self) {
        self.control.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d3hot_sleeps_and_d0_wakes() {
        let mut power = PowerManagement::new();
        assert_eq!(power.write(1, DwordWrite::whole(3)), ConfigEffect::DECODING);
        assert!(power.is_asleep());
        assert_eq!(power.read(1), NO_SOFT_RESET | 3);
        assert_eq!(power.write(1, DwordWrite::whole(0)), ConfigEffect::DECODING);
        assert!(!power.is_asleep());
    }

    #[test]
    fn states_that_are_not_supported_are_discarded() {
        let mut power = PowerManagement::new();
        for state in [1, 2] {
            assert_eq!(power.write(1, DwordWrite::whole(state)), ConfigEffect::empty());
            assert_eq!(power.read(1), NO_SOFT_RESET);
        }
    }

    #[test]
    fn reserved_bits_and_capabilities_do_not_change() {
        let mut power = PowerManagement::new();
        let _ = power.write(0, DwordWrite::whole(u32::MAX));
        let _ = power.write(1, DwordWrite::whole(0xffff_fffc));
        assert_eq!((power.read(0), power.read(1)), (CAPABILITIES, NO_SOFT_RESET));
    }
}
