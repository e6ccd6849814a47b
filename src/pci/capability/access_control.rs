//! Access control services (PCI Express Base Specification 7.7.11): what keeps peers apart.

use super::one_register::OneRegister;
use crate::pci::access::Register;

/// Source validation, translation blocking, request and completion redirect, upstream forwarding, direct
/// translated: what a downstream port of a root complex or switch implements.
const PORT: u32 = 0x5f;

/// ACS without egress control.
///
/// Every request of an emulated function goes through the root complex, so all that is offered is true
/// whether the guest switches it on or not.
pub struct AccessControl {
    /// Capability in the lower half, control in the upper.
    register: Register,
}

impl AccessControl {
    /// Of a root port or a switch's downstream port.
    #[must_use]
    pub const fn port() -> Self {
        Self {
            register: Register::writable(PORT, PORT << 16),
        }
    }
}

impl OneRegister for AccessControl {
    const ID: u16 = 0x000d;

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
    fn only_what_is_offered_can_be_switched_on() {
        let mut acs = AccessControl::port();
        let _ = acs.write(1, DwordWrite::whole(u32::MAX));
        assert_eq!(acs.read(1), PORT << 16 | PORT);
        acs.reset();
        assert_eq!(acs.read(1), PORT);
        let _ = acs.write(1, DwordWrite::new(3, &[0xff]).expect("inside"));
        assert_eq!(acs.read(1), PORT);
    }
}
