//! The state of a processor after power-on, to which a reset brings it back.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

use super::{Vcpu, msr_entry};
use crate::platform::host::HostError;

/// The time stamp counter. It keeps running over a reset: processors reset one after the other and would
/// otherwise no longer agree.
const IA32_TSC: u32 = 0x10;

/// Everything of a processor that a reset puts back, as it was when the processor was made.
///
/// Recording what the kernel itself made of a new processor, instead of a table of reset values, covers
/// every register the kernel knows, those of later kernels included.
pub struct PowerOnState {
    boot_processor: bool,
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
}

impl PowerOnState {
    /// The state of `vcpu`, which has its CPUID leaves and has not run, with the model-specific registers
    /// among `msrs` that it has.
    pub fn record(vcpu: &Vcpu, msrs: &[u32]) -> Result<Self, HostError> {
        let fd = &vcpu.fd;
        let read = |error| vcpu.refused("record the power-on state", error);
        let mut recorded = Vec::with_capacity(msrs.len());
        let mut rest: Vec<u32> = msrs.iter().copied().filter(|msr| *msr != IA32_TSC).collect();
        while !rest.is_empty() {
            let entries: Vec<_> = rest.iter().map(|&index| msr_entry(index, 0)).collect();
            let mut list = Msrs::from_entries(&entries).expect("an MSR list holds more than there are MSRs");
            let done = fd.get_msrs(&mut list).map_err(read)?;
            recorded.extend(list.as_slice().iter().take(done));
            // The kernel stops at the first it does not have for this processor; go on behind that one.
            rest.drain(..rest.len().min(done + 1));
        }
        Ok(Self {
            boot_processor: vcpu.apic_id == 0,
            regs: fd.get_regs().map_err(read)?,
            sregs: fd.get_sregs().map_err(read)?,
            fpu: fd.get_fpu().map_err(read)?,
            xcrs: fd.get_xcrs().map_err(read)?,
            debug: fd.get_debug_regs().map_err(read)?,
            events: fd.get_vcpu_events().map_err(read)?,
            lapic: Box::new(fd.get_lapic().map_err(read)?),
            msrs: recorded,
        })
    }

    /// Put `vcpu`, which must be the one recorded and not be running, back into that state.
    pub fn restore(&self, vcpu: &Vcpu) -> Result<(), HostError> {
        let fd = &vcpu.fd;
        let write = |error| vcpu.refused("reset", error);
        let state = match self.boot_processor {
            true => KVM_MP_STATE_RUNNABLE,
            false => KVM_MP_STATE_UNINITIALIZED,
        };
        // System registers first: clearing EFER.SVME takes the processor out of a guest of its own, and the
        // APIC base must be back before the APIC's registers. Events last: they depend on all else.
        fd.set_sregs(&self.sregs).map_err(write)?;
        fd.set_regs(&self.regs).map_err(write)?;
        fd.set_fpu(&self.fpu).map_err(write)?;
        fd.set_xcrs(&self.xcrs).map_err(write)?;
        fd.set_debug_regs(&self.debug).map_err(write)?;
        let mut rest = self.msrs.as_slice();
        while !rest.is_empty() {
            let done = vcpu.write_msrs(rest)?;
            // Some that can be read cannot be written, by the host either.
            if let Some(refused) = rest.get(done) {
                tracing::debug!(
                    msr = format_args!("{:#x}", refused.index),
                    "a model-specific register keeps its value over a reset"
                );
            }
            rest = rest.get(done + 1..).unwrap_or_default();
        }
        fd.set_lapic(&self.lapic).map_err(write)?;
        fd.set_mp_state(kvm_mp_state { mp_state: state }).map_err(write)?;
        fd.set_vcpu_events(&self.events).map_err(write)
    }
}
