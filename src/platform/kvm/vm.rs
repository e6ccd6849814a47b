//! One virtual machine: its memory slots, its interrupt controllers and its processors.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::coalesced::KvmCoalescedWrites;
use super::device_memory::DeviceSlots;
use super::doorbell::Ioeventfds;
use super::irq::MsiDelivery;
use super::sys::SlotKind;
use super::vcpu::Vcpu;
use super::{Kvm, KvmError, os, page, sys};
use crate::platform::addr::Gpa;
use crate::platform::device_memory::DeviceMemoryHost;
use crate::platform::doorbell::{CoalescedWrites, DoorbellHost};
use crate::platform::host::HostError;
use crate::platform::irq::IOAPIC_INPUTS;
use crate::platform::memory::GuestRam;

/// First of four pages that KVM needs on Intel hosts, between the local APICs' window and the end of 4 GiB: one for
/// an identity map, three for a task state segment. Nothing of the guest's may lie there.
pub const INTEL_RESERVED: u64 = 0xfeff_c000;

/// The kernel's VM and the memory it can reach, as one: whoever holds the descriptor holds the mappings. The
/// descriptor is closed first, since fields are dropped in order.
pub(super) struct Machine {
    pub(super) fd: VmFd,
    /// RAM, and the pages that the guest can only read.
    memory: Mutex<Vec<GuestRam>>,
    slots: Mutex<SlotNumbers>,
}

impl Machine {
    /// The numbers of its memory slots.
    pub(super) fn slots(&self) -> MutexGuard<'_, SlotNumbers> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which memory slots are in use.
#[derive(Default)]
pub(super) struct SlotNumbers(BTreeSet<u32>);

impl SlotNumbers {
    /// The lowest number that is free. The kernel refuses one beyond what it has.
    pub(super) fn take(&mut self) -> u32 {
        let free = (0..)
            .find(|slot| !self.0.contains(slot))
            .expect("2^32 slots are never in use");
        self.0.insert(free);
        free
    }

    /// Slot number `slot` is gone.
    pub(super) fn give_back(&mut self, slot: u32) {
        self.0.remove(&slot);
    }
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
        let mut slots = SlotNumbers::default();
        for (index, range) in ram.ranges().enumerate() {
            let slot = slots.take();
            sys::add_slot(&fd, slot, ram, index, SlotKind::Ram)
                .map_err(|source| HostError::new(format!("give the guest RAM at {range}"), source))?;
        }
        let at = usize::try_from(INTEL_RESERVED).expect("this program is 64-bit");
        fd.set_identity_map_address(INTEL_RESERVED)
            .and_then(|()| fd.set_tss_address(at + page()))
            .map_err(|error| {
                HostError::new(format!("reserve {at:#x}-{:#x}", at + (4 * page() - 1)), os(error))
            })?;
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
            memory: Mutex::new(vec![ram.clone()]),
            slots: Mutex::new(slots),
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

    /// A page of `owner` at `at`, a multiple of 4 KiB where nothing else is mapped, that the guest reads without an
    /// exit. Its writes to it are exits as they are to registers.
    ///
    /// # Errors
    /// What the host refused, with the owner and the address.
    pub fn read_only_page(&self, owner: &str, at: Gpa) -> Result<ReadOnlyPage, HostError> {
        let failed = |source| refused_page(owner, at, source);
        let regions = GuestMemoryMmap::from_ranges(&[(GuestAddress(at.0), page())])
            .map_err(|error| failed(io::Error::other(error)))?;
        let page = GuestRam::new(regions);
        let mut memory = self.machine.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = self.machine.slots().take();
        sys::add_slot(&self.machine.fd, slot, &page, 0, SlotKind::ReadOnly).map_err(failed)?;
        memory.push(page.clone());
        Ok(ReadOnlyPage { page, at })
    }

    /// How messages and the IOAPIC reach the processors.
    #[must_use]
    pub fn delivery(&self) -> &MsiDelivery {
        &self.delivery
    }

    /// What puts guest writes aside. Once per machine: the kernel's ring has one reader.
    ///
    /// # Errors
    /// When this host's KVM has no such ring.
    pub fn coalesced_writes(&self, vcpu: &Vcpu) -> Result<Arc<dyn CoalescedWrites>, HostError> {
        let refused = |source| HostError::new("map KVM's ring of guest writes put aside", source);
        if !self.machine.fd.check_extension(Cap::CoalescedMmio) {
            let missing = io::Error::new(
                io::ErrorKind::Unsupported,
                "this host's KVM lacks KVM_CAP_COALESCED_MMIO; say doorbell=exit",
            );
            return Err(refused(missing));
        }
        let ring = vcpu.coalesced_ring().map_err(refused)?;
        Ok(Arc::new(KvmCoalescedWrites {
            machine: self.machine.clone(),
            ring: Mutex::new(ring),
        }))
    }

    /// How memory of devices gets to the guest.
    #[must_use]
    pub fn device_memory(&self) -> Arc<dyn DeviceMemoryHost> {
        Arc::new(DeviceSlots {
            machine: self.machine.clone(),
        })
    }

    /// How guest writes become eventfd signals.
    #[must_use]
    pub fn doorbells(&self) -> Arc<dyn DoorbellHost> {
        Arc::new(Ioeventfds {
            machine: self.machine.clone(),
        })
    }
}

/// The host does not give the guest a page of `owner` to read.
fn refused_page(owner: &str, at: Gpa, source: io::Error) -> HostError {
    HostError::new(
        format!("give the guest a page of {owner} to read at {at}"),
        source,
    )
}

/// A page that the guest can only read.
pub struct ReadOnlyPage {
    page: GuestRam,
    at: Gpa,
}

impl ReadOnlyPage {
    /// From now on the guest reads `value` at `offset`, a multiple of 8 below 4 KiB, and whatever was stored
    /// before it is there for who sees it.
    pub fn store(&self, offset: u64, value: u64) {
        let at = GuestAddress(self.at.0 + offset);
        let stored = self.page.backend().store(value, at, Ordering::Release);
        stored.expect("an aligned quadword of the page");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_the_host_refuses_names_whose_it_is_and_where() {
        let error = refused_page("iommu7", Gpa(0xfeb0_2000), io::ErrorKind::AlreadyExists.into());
        assert_eq!(
            error.to_string(),
            "cannot give the guest a page of iommu7 to read at 0xfeb02000"
        );
    }

    #[test]
    fn a_slot_that_was_given_back_is_taken_again_first() {
        let mut slots = SlotNumbers::default();
        assert_eq!([slots.take(), slots.take(), slots.take()], [0, 1, 2]);
        slots.give_back(1);
        assert_eq!([slots.take(), slots.take()], [1, 3]);
    }
}
