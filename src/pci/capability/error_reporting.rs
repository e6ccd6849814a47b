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
const ROOT_COMMAND: usize = 11;
const ROOT_STATUS: usize = 12;
const SOURCES: usize = 13;
/// Root Error Command: fatal errors interrupt.
const REPORT_FATAL: u32 = 1 << 2;
/// Root Error Command: those that are not fatal do.
const REPORT_NON_FATAL: u32 = 1 << 1;
/// Root Error Status (7.8.4.10): an uncorrectable error was received; another before that was cleared; the first was
/// fatal; and which there were.
const RECEIVED: u32 = 1 << 2;
const SEVERAL_RECEIVED: u32 = 1 << 3;
const FIRST_IS_FATAL: u32 = 1 << 4;
const NON_FATAL_RECEIVED: u32 = 1 << 5;
const FATAL_RECEIVED: u32 = 1 << 6;
/// Registers of a function, and those a root port has behind them.
const FUNCTION_DWORDS: usize = 11;
const ROOT_DWORDS: usize = 14;

/// How bad an uncorrectable error is (6.2.2.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    /// The transaction is lost, the link is not.
    NonFatal,
    /// What lies behind the link has to be reset.
    Fatal,
}

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

    fn value(&self, index: usize) -> u32 {
        self.registers.get(index).map_or(0, |register| register.get())
    }

    fn update(&mut self, index: usize, bits: u32, value: u32) {
        if let Some(register) = self.registers.get_mut(index) {
            register.update(bits, value);
        }
    }

    /// Of a root port: the function with requester ID `source` reported an error (6.2.6). The first one's source stays
    /// until the guest has cleared what was received.
    pub fn receive(&mut self, severity: Severity, source: u16) {
        let several = self.value(ROOT_STATUS) & RECEIVED != 0;
        let (first, kind) = match severity {
            Severity::Fatal => (FIRST_IS_FATAL, FATAL_RECEIVED),
            Severity::NonFatal => (0, NON_FATAL_RECEIVED),
        };
        let new = if several {
            SEVERAL_RECEIVED
        } else {
            RECEIVED | first
        };
        self.update(ROOT_STATUS, new | kind, new | kind);
        if !several {
            self.update(SOURCES, 0xffff_0000, u32::from(source) << 16);
        }
    }

    /// Of a root port: whether the guest wants to hear of errors of this severity.
    #[must_use]
    pub fn reports(&self, severity: Severity) -> bool {
        let bit = match severity {
            Severity::Fatal => REPORT_FATAL,
            Severity::NonFatal => REPORT_NON_FATAL,
        };
        self.value(ROOT_COMMAND) & bit != 0
    }

    /// Of a root port: whether there is something that the guest wants to be interrupted for (6.2.4.1.2).
    #[must_use]
    pub fn interrupts(&self) -> bool {
        let status = self.value(ROOT_STATUS);
        let fatal = self.reports(Severity::Fatal) && status & FATAL_RECEIVED != 0;
        fatal || self.reports(Severity::NonFatal) && status & NON_FATAL_RECEIVED != 0
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
    fn the_root_port_keeps_the_first_source_until_it_is_cleared() {
        let mut aer = ErrorReporting::root_port();
        aer.receive(Severity::Fatal, 0x0100);
        assert_eq!((aer.read(12), aer.read(13)), (0x54, 0x0100_0000));
        assert!(!aer.interrupts());
        let _ = aer.write(11, DwordWrite::whole(REPORT_FATAL));
        assert!(aer.interrupts());
        aer.receive(Severity::NonFatal, 0x0208);
        assert_eq!((aer.read(12), aer.read(13)), (0x7c, 0x0100_0000));
        let _ = aer.write(12, DwordWrite::whole(0x7c));
        assert!(aer.read(12) == 0 && !aer.interrupts());
        aer.receive(Severity::NonFatal, 0x0208);
        assert_eq!((aer.read(12), aer.read(13)), (0x24, 0x0208_0000));
        assert!(!aer.interrupts());
    }

    #[test]
    fn what_is_no_root_port_receives_nothing() {
        let mut aer = ErrorReporting::function();
        aer.receive(Severity::Fatal, 8);
        assert!(!aer.interrupts() && !aer.reports(Severity::Fatal));
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
