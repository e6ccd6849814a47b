//! One virtual machine: its memory slots, its interrupt controllers and its processors.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::assigned::VfioFiles;
use super::coalesced::KvmCoalescedWrites;
use super::device_memory::DeviceSlots;
use super::doorbell::Ioeventfds;
use super::irq::MsiDelivery;
use super::slots::{Piece, SlotHost};
use super::sys::SlotKind;
use super::vcpu::Vcpu;
use super::watched::WatchedPages;
use super::{Kvm, KvmError, os, page, sys};
use crate::platform::addr::Gpa;
use crate::platform::assigned::AssignedDevices;
use crate::platform::device_memory::DeviceMemoryHost;
use crate::platform::doorbell::{CoalescedWrites, DoorbellHost};
use crate::platform::host::HostError;
use crate::platform::irq::IOAPIC_INPUTS;
use crate::platform::memory::GuestRam;
use crate::platform::protection::{Watcher, WriteProtection};

/// First of four pages that KVM needs on Intel hosts, between the local APICs' window and the end of 4 GiB: one for
/// an identity map, three for a task state segment. Nothing of the guest's may lie there.
pub const INTEL_RESERVED: u64 = 0xfeff_c000;

/// The kernel's VM and the memory it can reach, as one: whoever holds the descriptor holds the mappings. The
/// descriptor is closed first, since fields are dropped in order.
pub(super) struct Machine {
    pub(super) fd: VmFd,
    /// Pages of registers that the guest can only read.
    memory: Mutex<Vec<GuestRam>>,
    slots: Mutex<SlotNumbers>,
    /// RAM, and who hears of stores to it.
    pub(super) watched: Arc<WatchedPages>,
}

impl SlotHost for Machine {
    fn add(&self, piece: Piece) -> io::Result<u32> {
        self.fill_slot(|slot| sys::add_slot(&self.fd, slot, self.watched.ram(), piece.range, piece.kind))
    }

    fn remove(&self, slot: u32, piece: Piece) -> io::Result<()> {
        sys::remove_slot(&self.fd, slot, piece.range.start())?;
        self.slots().give_back(slot);
        Ok(())
    }
}

impl AsFd for Machine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::borrowed(&self.fd)
    }
}

impl Machine {
    /// The numbers of its memory slots.
    pub(super) fn slots(&self) -> MutexGuard<'_, SlotNumbers> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Have `add` make a slot of a free number, which is free again if the host refuses; the number.
    pub(super) fn fill_slot(&self, add: impl FnOnce(u32) -> io::Result<()>) -> io::Result<u32> {
        let slot = self.slots().take();
        add(slot)
            .inspect_err(|_| self.slots().give_back(slot))
            .map(|()| slot)
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
        let machine = Arc::new(Machine {
            fd,
            memory: Mutex::default(),
            slots: Mutex::default(),
            watched: Arc::new(WatchedPages::new(ram.clone())),
        });
        machine.watched.fill(&*machine)?;
        let fd = &machine.fd;
        let at = usize::try_from(INTEL_RESERVED).expect("this program is 64-bit");
        fd.set_identity_map_address(INTEL_RESERVED)
            .and_then(|()| fd.set_tss_address(at + page()))
            .map_err(|error| {
                HostError::new(format!("reserve {at:#x}-{:#x}", at + (4 * page() - 1)), os(error))
            })?;
        enable(
            fd,
            "KVM_CAP_SPLIT_IRQCHIP",
            KVM_CAP_SPLIT_IRQCHIP,
            u64::from(IOAPIC_INPUTS),
        )?;
        // Destinations of 32 bits, and 0xff is then the processor with that ID, not everybody.
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(fd, "KVM_CAP_X2APIC_API", KVM_CAP_X2APIC_API, u64::from(x2apic))?;
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
        let range = page.ranges().next().expect("a page");
        let mut memory = self.machine.memory.lock().unwrap_or_else(PoisonError::into_inner);
        self.machine
            .fill_slot(|slot| sys::add_slot(&self.machine.fd, slot, &page, range, SlotKind::ReadOnly))
            .map_err(failed)?;
        memory.push(page.clone());
        Ok(ReadOnlyPage { page, at })
    }

    /// The machine's descriptor, for requests to the kernel that take one.
    #[must_use]
    pub fn descriptor(&self) -> Arc<dyn AsFd + Send + Sync> {
        self.machine.clone()
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

    /// Who is told which devices of the host the machine has.
    #[must_use]
    pub fn assigned_devices(&self) -> Arc<dyn AssignedDevices> {
        Arc::new(VfioFiles {
            machine: self.machine.clone(),
            list: Mutex::default(),
        })
    }

    /// How stores to pages of RAM are noticed. A machine that never asks has none of the exits this makes.
    ///
    /// # Errors
    /// When this host's KVM cannot hand over an instruction it does not emulate.
    pub fn write_protection(&self) -> Result<Arc<dyn WriteProtection>, HostError> {
        enable(
            &self.machine.fd,
            "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
            KVM_CAP_EXIT_ON_EMULATION_FAILURE,
            1,
        )?;
        self.machine.watched.enable();
        Ok(Arc::new(ReadOnlySlots(self.machine.clone())))
    }

    /// Who carries out stores to RAM that are exits, and counts them.
    #[must_use]
    pub fn watched_pages(&self) -> &Arc<WatchedPages> {
        &self.machine.watched
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

/// Notices stores to pages of RAM by making them memory slots that the guest can only read.
struct ReadOnlySlots(Arc<Machine>);

impl WriteProtection for ReadOnlySlots {
    fn watch(&self, watcher: &Weak<dyn Watcher>, pages: &BTreeSet<Gpa>) -> Result<(), HostError> {
        self.0.watched.watch(&*self.0, watcher, pages)
    }
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
