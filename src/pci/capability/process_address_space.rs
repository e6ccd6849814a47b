//! Process address spaces of a function: PASID (PCI Express Base Specification 6.20 and 7.8.9).

use super::one_register::OneRegister;
use crate::pci::access::Register;

/// Execute permission and privileged mode, which the control register switches by the same bits.
const MODES: u32 = 0x6;
const ENABLE: u32 = 1 << 16;
const EXECUTE: u32 = 1 << 17;
const PRIVILEGED: u32 = 1 << 18;

/// PASID of one function, with execute permission and privileged mode.
pub struct ProcessAddressSpace {
    /// Capability in the lower half, control in the upper.
    register: Register,
}

impl ProcessAddressSpace {
    /// Of a function whose PASIDs have `width` bits, 1 to 20.
    ///
    /// # Panics
    ///
    /// When `width` is out of range: the device's code is wrong then.
    #[must_use]
    pub fn new(width: u8) -> Self {
        assert!(
            (1..=20).contains(&width),
            "PASIDs of {width} bits: 1 to 20 are possible"
        );
        Self {
            register: Register::writable(u32::from(width) << 8 | MODES, ENABLE | EXECUTE | PRIVILEGED),
        }
    }

    /// Whether the function may use PASIDs.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.register.get() & ENABLE != 0
    }

    /// Whether it may ask to execute.
    #[must_use]
    pub const fn may_execute(&self) -> bool {
        self.enabled() && self.register.get() & EXECUTE != 0
    }

    /// Whether it may ask for supervisor privilege.
    #[must_use]
    pub const fn may_be_privileged(&self) -> bool {
        self.enabled() && self.register.get() & PRIVILEGED != 0
    }
}

impl OneRegister for ProcessAddressSpace {
    const ID: u16 = 0x001b;

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

    fn written(value: u32) -> ProcessAddressSpace {
        let mut pasid = ProcessAddressSpace::new(16);
        let _ = pasid.write(1, DwordWrite::whole(value));
        pasid
    }

    #[test]
    fn only_the_control_bits_can_be_written() {
        let mut pasid = written(u32::MAX);
        assert_eq!(pasid.read(1), 0x0007_1006);
        let _ = pasid.write(0, DwordWrite::whole(0));
        let _ = pasid.write(2, DwordWrite::whole(0));
        assert_eq!(pasid.read(1), 0x0007_1006);
        pasid.reset();
        assert_eq!(pasid.read(1), 0x1006);
    }

    #[test]
    fn modes_count_only_while_pasids_do() {
        let modes = |pasid: ProcessAddressSpace| (pasid.may_execute(), pasid.may_be_privileged());
        assert_eq!(modes(written(EXECUTE | PRIVILEGED)), (false, false));
        assert_eq!(modes(written(ENABLE | EXECUTE)), (true, false));
        assert_eq!(modes(written(ENABLE | PRIVILEGED)), (false, true));
        assert!(written(ENABLE).enabled() && !written(0).enabled());
    }

    #[test]
    #[should_panic(expected = "1 to 20")]
    fn more_than_twenty_bits_are_refused() {
        let _pasid = ProcessAddressSpace::new(21);
    }
}
