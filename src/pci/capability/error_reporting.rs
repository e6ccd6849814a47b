//! Advanced error reporting (PCI Express Base Specification 7.8.4).

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;

/// The uncorrectable errors there are: data link protocol, surprise down, poisoned TLP, flow control,
/// completion timeout, completer abort, unexpected completion, receiver overflow, malformed TLP, ECRC,
/// unsupported request, ACS violation, internal.
const UNCORRECTABLE: u32 = 0x007f_f030;
/// Those that are fatal by default: data link protocol, surprise down, flow control, receiver overflow,
/// malformed TLP, internal (7.8.4.4).
const FATAL_AT_RESET: u32 = 0x0046_2030;
/// Internal errors are masked by default (7.8.4.3).
const MASKED_AT_RESET: u32 = 0x0040_0000;
/// The correctable errors there are: receiver, bad TLP, bad DLLP, replay rollover, replay timeout,
/// advisory non-fatal, internal, header log overflow.
const CORRECTABLE: u32 = 0x0000_f1c1;
/// Advisory non-fatal, internal and header log overflow are masked by default (7.8.4.6).
const CORRECTABLE_MASKED_AT_RESET: u32 = 0x0000_e000;
/// Report correctable, non-fatal and fatal errors by interrupt.
const ROOT_ERROR_COMMAND: u32 = 0x7;
/// Everything received or repeated, first fatal, fatal.
const ROOT_ERROR_STATUS: u32 = 0x7f;
/// Registers of a function, and those a root port has behind them.
const FUNCTION_DWORDS: usize = 11;
const ROOT_DWORDS: usize = 14;

/// AER of a function, or of a root port.
pub struct ErrorReporting {
    registers: Vec<Register>,
}

impl ErrorReporting {
    /// Of an endpoint or a switch port.
    #[must_use]
    pub fn function() -> Self {
        let registers = [
            Register::read_only(0),
            Register::writable(0, 0).clears(UNCORRECTABLE),
            Register::writable(MASKED_AT_RESET, UNCORRECTABLE),
            Register::writable(FATAL_AT_RESET, UNCORRECTABLE),
            Register::writable(0, 0).clears(CORRECTABLE),
            Register::writable(CORRECTABLE_MASKED_AT_RESET, CORRECTABLE),
            // Neither ECRC nor multiple header recording.
            Register::read_only(0),
        ];
        // The header log follows: nothing was logged yet.
        let mut registers = registers.to_vec();
        registers.resize(FUNCTION_DWORDS, Register::read_only(0));
        Self { registers }
    }

    /// Of a root port, which gathers the errors of everything behind it.
    #[must_use]
    pub fn root_port() -> Self {
        let mut registers = Self::function().registers;
        registers.push(Register::writable(0, ROOT_ERROR_COMMAND));
        registers.push(Register::writable(0, 0).clears(ROOT_ERROR_STATUS));
        registers.resize(ROOT_DWORDS, Register::read_only(0));
        Self { registers }
    }
}

impl Capability for ErrorReporting {
    fn id(&self) -> CapabilityId {
        CapabilityId::Extended {
            id: 0x0001,
            version: 2,
        }
    }

    /// Room for the root port's registers and the prefix log is always there (7.8.4).
    fn len(&self) -> u16 {
        0x48
    }

    fn read(&self, dword: u16) -> u32 {
        self.registers
            .get(usize::from(dword))
            .map_or(0, |register| register.get())
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        if let Some(register) = self.registers.get_mut(usize::from(dword)) {
            register.write(write);
        }
        ConfigEffect::empty()
    }

    fn reset(&mut self) {
        self.registers.iter_mut().for_each(Register::reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bits_of_real_errors_stick() {
        let mut aer = ErrorReporting::root_port();
        (0..18).for_each(|dword| {
            let _ = aer.write(dword, DwordWrite::whole(u32::MAX));
        });
        let written: Vec<u32> = (1..18).map(|dword| aer.read(dword)).collect();
        let mut expected = vec![0, UNCORRECTABLE, UNCORRECTABLE, 0, CORRECTABLE];
        expected.resize(10, 0);
        expected.push(ROOT_ERROR_COMMAND);
        expected.resize(17, 0);
        assert_eq!(written, expected);
    }

    #[test]
    fn a_function_has_no_root_registers() {
        let mut aer = ErrorReporting::function();
        let _ = aer.write(11, DwordWrite::whole(u32::MAX));
        assert_eq!(aer.read(11), 0);
    }

    #[test]
    fn defaults_come_back_at_reset() {
        let mut aer = ErrorReporting::function();
        let _ = aer.write(3, DwordWrite::whole(0));
        aer.reset();
        assert_eq!(
            (aer.read(2), aer.read(3), aer.read(5)),
            (MASKED_AT_RESET, FATAL_AT_RESET, 0xe000)
        );
    }
}
