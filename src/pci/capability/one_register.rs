//! Extended capabilities that are one register behind their header: capability in its lower half, control in
//! the upper.

use std::any::Any;

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;

/// Where the register is, in dwords from the header.
const AT: u16 = 1;

/// A capability of that kind, in version 1 of its layout. Writing its register has no effect besides.
pub(super) trait OneRegister: Any + Send {
    /// Extended capability ID.
    const ID: u16;

    /// The register.
    fn register(&self) -> &Register;

    /// The register, to be written.
    fn register_mut(&mut self) -> &mut Register;
}

impl<T: OneRegister> Capability for T {
    fn id(&self) -> CapabilityId {
        CapabilityId::Extended {
            id: T::ID,
            version: 1,
        }
    }

    fn len(&self) -> u16 {
        8
    }

    fn read(&self, dword: u16) -> u32 {
        if dword == AT { self.register().get() } else { 0 }
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        if dword == AT {
            self.register_mut().write(write);
        }
        ConfigEffect::empty()
    }

    fn reset(&mut self) {
        self.register_mut().reset();
    }
}
