//! What this host's KVM has and how much of it, whether or not that is enough for a machine.

use kvm_bindings::{
    KVM_CAP_COALESCED_MMIO, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_IRQFD, KVM_CAP_IRQFD_RESAMPLE,
    KVM_CAP_MAX_VCPU_ID, KVM_CAP_MAX_VCPUS, KVM_CAP_NR_MEMSLOTS, KVM_CAP_NR_VCPUS, KVM_CAP_READONLY_MEM,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
};
use serde::Serialize;

/// What is told by name.
const NAMED: [(u32, &str); 7] = [
    (KVM_CAP_SPLIT_IRQCHIP, "split irqchip"),
    (KVM_CAP_X2APIC_API, "32-bit APIC IDs"),
    (KVM_CAP_IRQFD, "irqfd"),
    (KVM_CAP_IRQFD_RESAMPLE, "irqfd resample"),
    (KVM_CAP_READONLY_MEM, "read-only memory"),
    (KVM_CAP_COALESCED_MMIO, "coalesced MMIO"),
    (KVM_CAP_EXIT_ON_EMULATION_FAILURE, "exit on emulation failure"),
];

/// Limits and capabilities.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Most processors of a machine.
    pub vcpus: usize,
    /// How many of them the kernel recommends at most.
    pub recommended_vcpus: usize,
    /// Largest APIC ID of a processor.
    pub apic_id: usize,
    /// Stretches of memory that a machine can have.
    pub memory_slots: usize,
    /// Of what counts here, what there is.
    pub has: Vec<&'static str>,
    /// And what there is not.
    pub lacks: Vec<&'static str>,
}

impl Capabilities {
    /// By what `ask` answers for the number of a capability: 0 for what there is not. What limits nothing by itself is
    /// limited as the kernel's documentation says.
    pub(super) fn of(ask: impl Fn(u32) -> usize) -> Self {
        let or = |cap, otherwise| match ask(cap) {
            0 => otherwise,
            limit => limit,
        };
        let recommended_vcpus = or(KVM_CAP_NR_VCPUS, 4);
        let vcpus = or(KVM_CAP_MAX_VCPUS, recommended_vcpus);
        let (has, lacks): (Vec<_>, Vec<_>) = NAMED.into_iter().partition(|(cap, _)| ask(*cap) > 0);
        let names = |named: Vec<(u32, &'static str)>| named.into_iter().map(|(_, name)| name).collect();
        Self {
            vcpus,
            recommended_vcpus,
            apic_id: or(KVM_CAP_MAX_VCPU_ID, vcpus).saturating_sub(1),
            memory_slots: or(KVM_CAP_NR_MEMSLOTS, 32),
            has: names(has),
            lacks: names(lacks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_names_are_what_the_kernel_answers() {
        let told = Capabilities::of(|cap| match cap {
            KVM_CAP_NR_VCPUS => 16,
            KVM_CAP_MAX_VCPUS => 1024,
            KVM_CAP_MAX_VCPU_ID => 4096,
            KVM_CAP_NR_MEMSLOTS => 32764,
            KVM_CAP_IRQFD_RESAMPLE | KVM_CAP_COALESCED_MMIO => 0,
            _ => 1,
        });
        assert_eq!((told.vcpus, told.recommended_vcpus), (1024, 16));
        assert_eq!((told.apic_id, told.memory_slots), (4095, 32764));
        assert_eq!(told.has.len(), NAMED.len() - 2);
        assert_eq!(told.lacks, ["irqfd resample", "coalesced MMIO"]);
    }

    #[test]
    fn a_kernel_that_answers_nothing_has_what_its_documentation_says() {
        let told = Capabilities::of(|_| 0);
        assert_eq!((told.vcpus, told.recommended_vcpus, told.apic_id), (4, 4, 3));
        assert_eq!(told.memory_slots, 32);
        assert_eq!(told.has, [] as [&str; 0]);
    }
}
