//! The hypervisor as this program uses it: KVM with a split interrupt controller.
//!
//! The local APICs are the kernel's, the IOAPIC is ours (its messages must be able to pass interrupt
//! remapping), and there is neither PIC nor PIT. Every exit is a value, every kernel object a handle, and a
//! kick makes a running processor return. Nothing above this module looks at `kvm_run`.

mod assigned;
mod capabilities;
mod cmpxchg16b;
mod coalesced;
mod device_memory;
mod doorbell;
mod gate;
#[cfg(test)]
mod hand_written;
mod irq;
mod slots;
mod sys;
mod vcpu;
mod vm;
mod watched;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, VmFd};

use super::addr::PAGE_SIZE;
use super::host::HostError;

pub use capabilities::Capabilities;
pub use irq::MsiDelivery;
pub use vcpu::{Exit, Kick, PowerOnState, Unemulated, Vcpu, allow_kicks, kick_signal};
pub use vm::{INTEL_RESERVED, KvmVm, ReadOnlyPage};
pub use watched::{WatchCounts, WatchedPages};

/// What this program cannot do without, as KVM names it, and what for.
const REQUIRED: [(Cap, &str); 17] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY (guest RAM)"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID (processor features)"),
    (
        Cap::SplitIrqchip,
        "KVM_CAP_SPLIT_IRQCHIP (local APICs in the kernel, the IOAPIC outside)",
    ),
    (Cap::X2ApicApi, "KVM_CAP_X2APIC_API (APIC IDs of 32 bits)"),
    (
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER (a timer that needs no calibration)",
    ),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ (the guest's TSC frequency)"),
    (
        Cap::ReadonlyMem,
        "KVM_CAP_READONLY_MEM (registers read without an exit)",
    ),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI (interrupt messages)"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING (interrupt routes)"),
    (Cap::Irqfd, "KVM_CAP_IRQFD (interrupts from eventfds)"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD (doorbells)"),
    (
        Cap::IoeventfdNoLength,
        "KVM_CAP_IOEVENTFD_NO_LENGTH (doorbells of any width)",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT (stopping a processor without a race)",
    ),
    (Cap::MpState, "KVM_CAP_MP_STATE (resetting processors)"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS (resetting processors)"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS (resetting processors)"),
    (Cap::Xcrs, "KVM_CAP_XCRS (resetting processors)"),
];

/// Why KVM cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host refused.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The kernel lacks capabilities.
    #[error("this host's KVM lacks {}", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// More processors than the kernel takes.
    #[error("{wanted} processors asked for; this host's KVM takes at most {most}")]
    TooManyVcpus {
        /// How many were asked for.
        wanted: usize,
        /// How many the host takes.
        most: usize,
    },
    /// An APIC ID beyond what the kernel takes.
    #[error("APIC ID {wanted} is needed; this host's KVM takes IDs below {limit}")]
    ApicIdTooLarge {
        /// The largest ID needed.
        wanted: u32,
        /// The first ID the host does not take.
        limit: usize,
    },
}

/// A guest that never runs, for requests that take one.
pub struct BlankVm(VmFd);

impl AsRawFd for BlankVm {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An open /dev/kvm that has what this program needs.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    run_area: usize,
}

impl Kvm {
    /// Open `/dev/kvm` and check it.
    ///
    /// # Errors
    /// [`KvmError::Host`] when it cannot be opened, [`KvmError::Missing`] with every capability that is not
    /// there.
    pub fn open() -> Result<Self, KvmError> {
        let path = Path::new("/dev/kvm");
        let fd = kvm_ioctls::Kvm::new().map_err(|error| {
            let what = match error.errno() {
                ENOENT => "; is the module kvm_amd or kvm_intel loaded?",
                EACCES => "; is this user in the group that owns it?",
                _ => "",
            };
            HostError::new(format!("open {}{what}", path.display()), os(error))
        })?;
        let missing = missing(|cap| fd.check_extension(cap));
        if !missing.is_empty() {
            return Err(KvmError::Missing(missing));
        }
        let run_area = fd
            .get_vcpu_mmap_size()
            .map_err(|error| HostError::new("ask KVM for the size of a processor's run area", os(error)))?;
        Ok(Self { fd, run_area })
    }

    /// What this host's KVM has, be it enough or not; `None` where it cannot be opened.
    #[must_use]
    pub fn capabilities() -> Option<Capabilities> {
        let fd = kvm_ioctls::Kvm::new().ok()?;
        let ask = |cap: u32| usize::try_from(fd.check_extension_raw(cap.into())).unwrap_or(0);
        Some(Capabilities::of(ask))
    }

    /// A guest without anything: neither memory nor processors.
    ///
    /// # Errors
    /// What the host refused.
    pub fn blank_vm(&self) -> Result<BlankVm, HostError> {
        let fd = self.fd.create_vm();
        fd.map(BlankVm)
            .map_err(|error| HostError::new("create a virtual machine", os(error)))
    }

    /// What KVM and this host's processor can show a guest.
    pub fn supported_cpuid(&self) -> Result<CpuId, HostError> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| HostError::new("ask KVM for the CPUID leaves it supports", os(error)))
    }

    /// The model-specific registers that make up a processor's state.
    pub fn msr_indices(&self) -> Result<Vec<u32>, HostError> {
        let list = self
            .fd
            .get_msr_index_list()
            .map_err(|error| HostError::new("ask KVM for its model-specific registers", os(error)))?;
        let mut indices = list.as_slice().to_vec();
        // The memory type registers are not in the list of every kernel.
        indices.extend(
            (0x200..=0x20f)
                .chain([0x250, 0x258, 0x259])
                .chain(0x268..=0x26f)
                .chain([0x2ff]),
        );
        indices.sort_unstable();
        indices.dedup();
        Ok(indices)
    }

    /// Whether `vcpus` processors whose largest APIC ID is `last_id` can be made here.
    pub fn check_vcpus(&self, vcpus: usize, last_id: u32) -> Result<(), KvmError> {
        let most = self.fd.get_max_vcpus();
        if vcpus > most {
            return Err(KvmError::TooManyVcpus { wanted: vcpus, most });
        }
        let limit = self.fd.get_max_vcpu_id();
        if usize::try_from(last_id).is_ok_and(|id| id < limit) {
            return Ok(());
        }
        Err(KvmError::ApicIdTooLarge {
            wanted: last_id,
            limit,
        })
    }
}

/// Bytes of a page, as this process counts its own memory.
fn page() -> usize {
    usize::try_from(PAGE_SIZE).expect("this program is 64-bit")
}

/// `No such file or directory`.
const ENOENT: i32 = 2;
/// `Permission denied`.
const EACCES: i32 = 13;

/// Every required capability that `has` denies, by name.
fn missing(has: impl Fn(Cap) -> bool) -> Vec<&'static str> {
    let lacking = REQUIRED.into_iter().filter(|(cap, _)| !has(*cap));
    lacking.map(|(_, name)| name).collect()
}

/// The operating system's error behind one of the crate's.
fn os(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_capability_is_named() {
        assert_eq!(missing(|_| true), Vec::<&str>::new());
        assert_eq!(missing(|_| false).len(), REQUIRED.len());
        let error = KvmError::Missing(missing(|cap| !matches!(cap, Cap::SplitIrqchip | Cap::X2ApicApi)));
        assert_eq!(
            error.to_string(),
            "this host's KVM lacks KVM_CAP_SPLIT_IRQCHIP (local APICs in the kernel, the IOAPIC outside), \
             KVM_CAP_X2APIC_API (APIC IDs of 32 bits)"
        );
    }
}
