//! One virtual machine: its memory slots, its interrupt controllers and its processors.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::doorbell::Ioeventfds;
use super::irq::MsiDelivery;
use super::vcpu::Vcpu;
use super::{Kvm, KvmError, os, sys};
use crate::platform::doorbell::DoorbellHost;
use crate::platform::host::HostError;
use crate::platform::irq::IOAPIC_INPUTS;
use crate::platform::memory::GuestRam;

/// First of four pages that KVM needs on Intel hosts, between the local APICs' window and the end of 4 GiB: one for
/// an identity map, three for a task state segment. Nothing of the guest's may lie there.
pub const INTEL_RESERVED: u64 = 0xfeff_c000;

/// The kernel's VM and the RAM it can reach, as one: whoever holds the descriptor holds the mapping. The
/// descriptor is closed first, since fields are dropped in order.
pub(super) struct Machine {
    pub(super) fd: VmFd,
    _ram: GuestRam,
}

/// A virtual machine.
pub struct KvmVm {
    machine: Arc<Machine>,
    delivery: MsiDelivery,
    run_area: usize,
}

impl KvmVm {
    /// A machine with `ram` in it, local APICs with 32-bit IDs, and 24 inputs reserved for the IOAPIC.
    ///
    /// # Errors
    /// What the host refused, with the range or the capability.
    pub fn new(kvm: &Kvm, ram: &GuestRam) -> Result<Self, KvmError> {
        let fd = kvm
            .fd
            .create_vm()
            .map_err(|error| HostError::new("create a virtual machine", os(error)))?;
        for (index, range) in ram.ranges().enumerate() {
            let slot = u32::try_from(index).expect("a plan has a handful of RAM ranges");
            sys::add_ram_slot(&fd, slot, ram, index)
                .map_err(|source| HostError::new(format!("give the guest RAM at {range}"), source))?;
        }
        let at = usize::try_from(INTEL_RESERVED).expect("this program is 64-bit");
        fd.set_identity_map_address(INTEL_RESERVED)
            .and_then(|()| fd.set_tss_address(at + 0x1000))
            .map_err(|error| HostError::new(format!("reserve {at:#x}-{:#x}", at + 0x3fff), os(error)))?;
        enable(
            &fd,
            "KVM_CAP_SPLIT_IRQCHIP",
            KVM_CAP_SPLIT_IRQCHIP,
            u64::from(IOAPIC_INPUTS),
        )?;
        // Destinations of 32 bits, and 0xff is then the processor with that ID, not everybody.
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&fd, "KVM_CAP_X2APIC_API", KVM_CAP_X2APIC_API, u64::from(x2apic))?;
        let machine = Arc::new(Machine {
            fd,
            _ram: ram.clone(),
        });
        Ok(Self {
            delivery: MsiDelivery::new(machine.clone()),
            machine,
            run_area: kvm.run_area,
        })
    }

    /// A processor whose APIC has ID `apic_id`; it is the boot processor if that is 0.
    pub fn vcpu(&self, apic_id: u32) -> Result<Vcpu, HostError> {
        Vcpu::new(&self.machine, apic_id, self.run_area)
    }

    /// How messages and the IOAPIC reach the processors.
    #[must_use]
    pub fn delivery(&self) -> &MsiDelivery {
        &self.delivery
    }

    /// How guest writes become eventfd signals.
    #[must_use]
    pub fn doorbells(&self) -> Arc<dyn DoorbellHost> {
        Arc::new(Ioeventfds {
            machine: self.machine.clone(),
        })
    }
}

fn enable(vm: &VmFd, name: &str, cap: u32, argument: u64) -> Result<(), HostError> {
    let request = kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&request)
        .map_err(|error| HostError::new(format!("enable {name} with {argument:#x}"), os(error)))
}
