//! The reset control register at port 0xcf9.
//!
//! It lies inside the ports of PCI's configuration mechanism #1 (0xcf8 to 0xcff), which takes accesses to its
//! address register only as whole dwords (PCI Local Bus Specification 3.0, 3.2.2.3.2). A byte access at 0xcf9
//! is therefore this register's, and [`ConfigPortsWithReset`] tells the two apart, as a chipset does.

use std::sync::{Arc, Mutex, PoisonError};

use bitfield_struct::bitfield;

use super::Device;
use super::request::{Request, RequestQueue};
use crate::platform::bus::BusDevice;

/// The register's port.
pub const RESET_PORT: u64 = 0xcf9;
/// First port of the configuration mechanism.
pub const CONFIG_PORTS: u64 = 0xcf8;
/// Ports of the configuration mechanism.
pub const CONFIG_PORTS_LEN: u64 = 8;

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

    fn read(&self) -> u8 {
        self.control
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .into_bits()
    }

    fn write(&self, value: u8) {
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

impl Device for ResetRegister {
    fn name(&self) -> &'static str {
        "reset-register"
    }

    fn reset(&self) {
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = ResetControl::new();
    }
}

/// The configuration ports with the reset register among them. Claim [`CONFIG_PORTS_LEN`] ports from
/// [`CONFIG_PORTS`] for it.
pub struct ConfigPortsWithReset {
    /// Configuration mechanism #1.
    pub config: Arc<dyn BusDevice>,
    /// What byte accesses to 0xcf9 reach.
    pub reset: Arc<ResetRegister>,
}

const RESET_OFFSET: u64 = RESET_PORT - CONFIG_PORTS;

impl BusDevice for ConfigPortsWithReset {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match data {
            [byte] if offset == RESET_OFFSET => *byte = self.reset.read(),
            _ => self.config.read(offset, data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match data {
            [byte] if offset == RESET_OFFSET => self.reset.write(*byte),
            _ => self.config.write(offset, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers which accesses reached it.
    #[derive(Default)]
    struct Config(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Config {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().expect("not poisoned").push((offset, data.len()));
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().expect("not poisoned").push((offset, data.len()));
        }
    }

    fn ports() -> (ConfigPortsWithReset, Arc<Config>, Arc<RequestQueue>) {
        let (config, requests) = (
            Arc::new(Config::default()),
            RequestQueue::new().expect("a descriptor"),
        );
        let reset = ResetRegister::new(requests.clone());
        let ports = ConfigPortsWithReset {
            config: config.clone(),
            reset,
        };
        (ports, config, requests)
    }

    #[test]
    fn setting_the_reset_bit_resets() {
        let (ports, _, requests) = ports();
        ports.write(RESET_OFFSET, &[0x02]);
        assert_eq!(requests.take(), None);
        ports.write(RESET_OFFSET, &[0x06]);
        assert_eq!(requests.take(), Some(Request::Reset));
    }

    #[test]
    fn a_reset_bit_that_stays_set_resets_once() {
        let (ports, _, requests) = ports();
        ports.write(RESET_OFFSET, &[0x0e]);
        requests.take();
        ports.write(RESET_OFFSET, &[0x06]);
        assert_eq!(requests.take(), None);
    }

    #[test]
    fn reserved_bits_do_not_stick() {
        let (ports, ..) = ports();
        ports.write(RESET_OFFSET, &[0xff]);
        let mut data = [0];
        ports.read(RESET_OFFSET, &mut data);
        assert_eq!(data, [0x0e]);
    }

    #[test]
    fn everything_but_the_one_byte_is_configuration() {
        let (ports, config, requests) = ports();
        let mut expected = Vec::new();
        for width in [1, 2, 4, 8] {
            for offset in (0..=8 - width).filter(|offset| (*offset, width) != (1, 1)) {
                ports.write(offset as u64, &vec![0xff; width]);
                ports.read(offset as u64, &mut vec![0; width]);
                expected.extend([(offset as u64, width); 2]);
            }
        }
        assert_eq!(*config.0.lock().expect("not poisoned"), expected);
        assert_eq!(requests.take(), None);
    }

    #[test]
    fn after_a_reset_the_next_one_works() {
        let (ports, _, requests) = ports();
        ports.write(RESET_OFFSET, &[0x06]);
        requests.take();
        ports.reset.reset();
        ports.write(RESET_OFFSET, &[0x06]);
        assert_eq!(requests.take(), Some(Request::Reset));
    }
}
