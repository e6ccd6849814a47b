//! The reset control register at port 0xcf9.
//!
//! It lies inside the ports of PCI's configuration mechanism #1 (0xcf8 to 0xcff), which takes accesses to its
//! address register only as whole dwords (PCI Local Bus Specification 3.0, 3.2.2.3.2). A byte access at 0xcf9
//! is this register's; [`crate::pci::config_ports::ConfigPorts`] passes it on, as a chipset does.

use std::sync::{Arc, Mutex, PoisonError};

use bitfield_struct::bitfield;

use super::Device;
use super::register::{read_bytes, write_bytes};
use super::request::{Request, RequestQueue};
use crate::platform::bus::BusDevice;

/// The register's port.
pub const RESET_PORT: u64 = 0xcf9;

/// RST_CNT (Intel 7 Series PCH data sheet 13.7.5).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ResetControl {
    __: bool,
    /// What a reset reaches: the whole system, rather than the processors only. Every reset is the system's
    /// here, as no guest tells them apart.
    pub system: bool,
    /// Going from zero to one resets.
    pub reset: bool,
    /// The reset cycles power as well. Stored only.
    pub full: bool,
    #[bits(4)]
    __: u8,
}

impl ResetControl {
    const WRITABLE: Self = Self::new().with_system(true).with_reset(true).with_full(true);
}

/// The register.
pub struct ResetRegister {
    control: Mutex<ResetControl>,
    requests: Arc<RequestQueue>,
}

impl ResetRegister {
    /// A register that asks `requests` to reset the machine.
    #[must_use]
    pub fn new(requests: Arc<RequestQueue>) -> Arc<Self> {
        Arc::new(Self {
            control: Mutex::default(),
            requests,
        })
    }

    fn write_byte(&self, value: u8) {
        let written = ResetControl::from_bits(value & ResetControl::WRITABLE.into_bits());
        let before = std::mem::replace(
            &mut *self.control.lock().unwrap_or_else(PoisonError::into_inner),
            written,
        );
        if written.reset() && !before.reset() {
            self.requests.raise(Request::Reset);
        }
    }
}

/// One byte wide.
impl BusDevice for ResetRegister {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let control = *self.control.lock().unwrap_or_else(PoisonError::into_inner);
        read_bytes(
            offset,
            data,
            |at| if at == 0 { control.into_bits() } else { 0xff },
        );
    }

    fn write(&self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |at, value| {
            if at == 0 {
                self.write_byte(value);
            }
        });
    }
}

impl Device for ResetRegister {
    fn name(&self) -> &'static str {
        "reset-register"
    }

    fn reset(&self) {
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = ResetControl::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register() -> (Arc<ResetRegister>, Arc<RequestQueue>) {
        let requests = RequestQueue::new().expect("a descriptor");
        (ResetRegister::new(requests.clone()), requests)
    }

    #[test]
    fn setting_the_reset_bit_resets() {
        let (register, requests) = register();
        register.write(0, &[0x02]);
        assert_eq!(requests.take(), None);
        register.write(0, &[0x06]);
        assert_eq!(requests.take(), Some(Request::Reset));
    }

    #[test]
    fn a_reset_bit_that_stays_set_resets_once() {
        let (register, requests) = register();
        register.write(0, &[0x0e]);
        requests.take();
        register.write(0, &[0x06]);
        assert_eq!(requests.take(), None);
    }

    #[test]
    fn reserved_bits_do_not_stick() {
        let (register, _) = register();
        register.write(0, &[0xff]);
        let mut data = [0];
        register.read(0, &mut data);
        assert_eq!(data, [0x0e]);
    }

    #[test]
    fn bytes_that_are_not_the_register_read_all_ones_and_reset_nothing() {
        for width in [1, 2, 4, 8] {
            let (register, requests) = register();
            let mut data = vec![0; width];
            register.write(1, &vec![0xff; width]);
            register.read(1, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff));
            register.write(0, &[&[0x02], vec![0xff; width - 1].as_slice()].concat());
            assert_eq!(requests.take(), None);
        }
    }

    #[test]
    fn after_a_reset_the_next_one_works() {
        let (register, requests) = register();
        register.write(0, &[0x06]);
        requests.take();
        register.reset();
        register.write(0, &[0x06]);
        assert_eq!(requests.take(), Some(Request::Reset));
    }
}
