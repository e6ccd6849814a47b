//! Why a processor stopped running, as data.

use std::fmt::{self, Write as _};

use crate::platform::addr::Gpa;
use crate::platform::kvm::sys::InternalError;

/// KVM_INTERNAL_ERROR_EMULATION: an instruction that KVM does not emulate.
pub(super) const EMULATION: u32 = 1;

/// Why the guest stopped running. What the guest reads is written through the borrow before the next run.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `IN`, or `INS` with several elements.
    PortRead {
        /// First port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        width: usize,
        /// To be filled, a whole number of elements.
        data: &'a mut [u8],
    },
    /// `OUT`, or `OUTS` with several elements.
    PortWrite {
        /// First port.
        port: u16,
        /// Bytes per element: 1, 2 or 4.
        width: usize,
        /// A whole number of elements.
        data: &'a [u8],
    },
    /// A read where there is no RAM.
    MmioRead {
        /// Guest physical address.
        at: u64,
        /// To be filled, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// A write where there is no RAM.
    MmioWrite {
        /// Guest physical address.
        at: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A write where there is RAM, which the guest could only read when it wrote: for
    /// [`WatchedPages::store`](crate::platform::kvm::WatchedPages::store).
    RamWrite {
        /// Guest physical address.
        at: Gpa,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// An instruction that KVM does not emulate: for [`Vcpu::carry_out`](super::Vcpu::carry_out).
    Unemulated(Unemulated),
    /// A level-triggered interrupt of this vector ended.
    Eoi(u8),
    /// The processor halted outside the kernel's local APIC.
    Halt,
    /// A kick, a signal, or nothing to do yet: look for requests and run again.
    Interrupted,
    /// A triple fault: on a PC, a reset.
    TripleFault,
    /// The guest asked its hypervisor for something: KVM_SYSTEM_EVENT_*.
    SystemEvent(u32),
    /// The processor's state cannot be entered, or KVM met what it cannot handle. Says what the kernel says;
    /// [`Vcpu::registers`](super::Vcpu::registers) tells the rest.
    Broken(String),
}

/// An instruction that KVM handed over because it does not emulate it. Displayed, it is what KVM says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unemulated {
    /// As many bytes as KVM had fetched: none, or up to 15, the next instruction's among them.
    code: Vec<u8>,
    what: String,
}

impl Unemulated {
    /// What `error`, of [`EMULATION`], is about.
    pub(super) fn new(error: &InternalError) -> Self {
        Self {
            code: code(error),
            what: describe(error),
        }
    }

    /// Its bytes.
    pub(super) fn code(&self) -> &[u8] {
        &self.code
    }
}

impl fmt::Display for Unemulated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// The bytes that KVM_INTERNAL_ERROR_EMULATION carries when its flag bit 0 is set (Documentation/virt/kvm/api.rst, 5
/// "The `kvm_run` structure"): a length, and as many of 15. None otherwise.
fn code(error: &InternalError) -> Vec<u8> {
    match error.data.get(..error.valid).unwrap_or_default() {
        [flags, rest @ ..] if error.suberror == EMULATION && flags & 1 != 0 => {
            let mut bytes = rest.iter().flat_map(|word| word.to_le_bytes());
            let len = bytes.next().map_or(0, usize::from);
            bytes.take(len.min(15)).collect()
        }
        _ => Vec::new(),
    }
}

/// What KVM_EXIT_INTERNAL_ERROR says, for the log.
pub(super) fn describe(error: &InternalError) -> String {
    let words = error.data.get(..error.valid).unwrap_or_default();
    let kind = match error.suberror {
        EMULATION => "KVM cannot emulate an instruction".to_owned(),
        2 => "KVM met a fault while it delivered an event".to_owned(),
        3 => "an event could not be delivered because of an unexpected exit".to_owned(),
        4 => "the processor gave an exit KVM does not know".to_owned(),
        other => format!("KVM gave internal error {other}"),
    };
    let code = code(error);
    if code.is_empty() {
        return format!("{kind}, details {words:x?}");
    }
    let mut text = format!("{kind}:");
    for byte in code {
        write!(text, " {byte:02x}").expect("a string takes all text");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_that_cannot_be_emulated_is_shown_in_bytes() {
        let mut data = [0; 16];
        data[0] = 1;
        data[1] = u64::from_le_bytes([5, 0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0x90, 0x90]);
        let text = describe(&InternalError {
            suberror: 1,
            data,
            valid: 4,
        });
        assert_eq!(text, "KVM cannot emulate an instruction: f0 48 0f c7 0f");
    }

    #[test]
    fn an_internal_error_without_bytes_shows_its_words() {
        let mut data = [0; 16];
        data[..2].copy_from_slice(&[0x80, 0xff]);
        let text = describe(&InternalError {
            suberror: 9,
            data,
            valid: 2,
        });
        assert_eq!(text, "KVM gave internal error 9, details [80, ff]");
    }

    #[test]
    fn a_length_byte_larger_than_the_bytes_is_harmless() {
        let mut data = [0; 16];
        data[..2].copy_from_slice(&[1, 0xff]);
        let text = describe(&InternalError {
            suberror: 1,
            data,
            valid: 2,
        });
        assert_eq!(text, "KVM cannot emulate an instruction: 00 00 00 00 00 00 00");
    }
}
