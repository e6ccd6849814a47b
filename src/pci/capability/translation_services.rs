//! Address translation services of a function: ATS (PCI Express Base Specification 10.2 and 10.5.1). The function
//! may ask for translations, and has to forget them when it is told to.

use super::one_register::OneRegister;
use crate::pci::access::Register;

/// Invalidations may come one behind the other without end (a depth of 32 is written 0), translation requests
/// are for whole pages, and an invalidation may be for every process address space.
const CAPABILITY: u32 = 1 << 5 | 1 << 6;
/// Smallest translation unit, as a power of two of 4 KiB.
const UNIT: u32 = 0x1f << 16;
const ENABLE: u32 = 1 << 31;

/// ATS of one function.
pub struct TranslationServices {
    /// Capability in the lower half, control in the upper.
    register: Register,
}

impl TranslationServices {
    /// Off.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            register: Register::writable(CAPABILITY, UNIT | ENABLE),
        }
    }

    /// Whether the function may ask for translations and use them.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.register.get() & ENABLE != 0
    }
}

impl Default for TranslationServices {
    fn default() -> Self {
        Self::new()
    }
}

impl OneRegister for TranslationServices {
    const ID: u16 = 0x000f;

    fn register(&self) -> &Register {
        &self.register
    }

    fn register_mut(&mut self) -> &mut Register {
        &mut self.register
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::access::DwordWrite;
    use crate::pci::capability::Capability;

    #[test]
    fn only_the_unit_and_the_switch_can_be_written() {
        let mut ats = TranslationServices::new();
        assert!(!ats.enabled());
        let _ = ats.write(1, DwordWrite::whole(u32::MAX));
        assert_eq!(ats.read(1), 0x801f_0060);
        assert!(ats.enabled());
        let _ = ats.write(1, DwordWrite::new(3, &[0]).expect("inside"));
        assert_eq!((ats.enabled(), ats.read(1)), (false, 0x001f_0060));
        let _ = ats.write(0, DwordWrite::whole(u32::MAX));
        let _ = ats.write(2, DwordWrite::whole(u32::MAX));
        assert_eq!((ats.read(0), ats.read(2)), (0, 0));
        ats.reset();
        assert_eq!(ats.read(1), 0x60);
    }
}
