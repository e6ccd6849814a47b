//! Model-specific registers as firmware leaves them, where the kernel's reset values are not that.

use kvm_bindings::{kvm_lapic_state, kvm_sregs};

/// IA32_MISC_ENABLE: the processor's general switches.
const MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations.
const FAST_STRINGS: u64 = 1 << 0;
/// IA32_MTRR_DEF_TYPE: what memory is where no range says otherwise.
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Memory type ranges are enabled.
const MTRR_ENABLE: u64 = 1 << 11;
/// Write-back.
const WRITE_BACK: u64 = 6;

/// What every processor is given at start and after a reset: RAM is cached, as firmware sees to.
pub const AT_START: [(u32, u64); 2] = [
    (MISC_ENABLE, FAST_STRINGS),
    (MTRR_DEF_TYPE, MTRR_ENABLE | WRITE_BACK),
];

/// The local vector table entry of LINT1 (AMD64 Architecture Programmer's Manual volume 2, 16.4).
const LVT_LINT1: usize = 0x360;
/// Delivery mode NMI, not masked.
const NMI: u32 = 4 << 8;

/// Wire LINT1 to NMI, as the MADT says. LINT0 stays masked: there is no 8259.
pub fn wire_local_interrupts(lapic: &mut kvm_lapic_state) {
    for (register, byte) in lapic.regs[LVT_LINT1..].iter_mut().zip(NMI.to_le_bytes()) {
        *register = i8::from_ne_bytes([byte]);
    }
}

/// APIC_BASE: the local APIC is in x2APIC mode (AMD64 Architecture Programmer's Manual volume 2, 16.9).
const EXTENDED: u64 = 1 << 10;

/// Have the local APIC start in x2APIC mode.
pub const fn start_in_x2apic(sregs: &mut kvm_sregs) {
    sregs.apic_base |= EXTENDED;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lint1_is_an_nmi_and_lint0_is_left_alone() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x352] = 1;
        wire_local_interrupts(&mut lapic);
        assert_eq!(lapic.regs[0x360..0x364], [0, 4, 0, 0]);
        assert_eq!(lapic.regs[0x350..0x354], [0, 0, 1, 0]);
    }

    #[test]
    fn x2apic_mode_is_added_to_what_the_kernel_chose() {
        let mut sregs = kvm_sregs {
            apic_base: 0xfee0_0900,
            ..Default::default()
        };
        start_in_x2apic(&mut sregs);
        assert_eq!(sregs.apic_base, 0xfee0_0d00);
    }
}
