//! What this host offers a guest, and what is missing for each way of serving it.
//!
//! The facts come from sysfs, /proc and /dev below a root path, so that a recorded tree stands for a host that
//! is not at hand; what only a system call tells (KVM's capabilities, the memlock limit) is passed in.
//! A host that lacks something is not an error here: it is what the report is for.
//!
//! Of AMD's vIOMMU no file tells whether the kernel has it, nor whether it hands out memory of functions for others. The
//! running kernel is asked, step by step, with a function that is bound to vfio-pci and that nobody uses; nothing is left of
//! that.

mod modes;
mod sysfs;
#[cfg(test)]
mod tests;
mod trial;

use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};
use serde::{Serialize, Serializer};

use crate::iommu::amd::spec::registers::{Efr, Efr2};
use crate::iommu::iommufd::Abi;
use crate::platform::addr::Sbdf;
use crate::platform::kvm::{Capabilities, Kvm};

pub use modes::{Mode, verdict};
pub use trial::UnitTrial;

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// The processor's model, as /proc/cpuinfo names it.
    pub processor: Option<String>,
    /// The kernel.
    pub kernel: KernelReport,
    /// The hypervisor.
    pub kvm: KvmReport,
    /// Whether /dev/iommu exists.
    pub iommufd: bool,
    /// Whether /dev/vfio/vfio exists: the legacy group interface.
    pub vfio_groups: bool,
    /// Whether vfio-pci is there to be bound to.
    pub vfio_pci: bool,
    /// Bytes that may be locked in memory; `None` when there is no limit.
    pub memlock: Option<u64>,
    /// In the order of their numbers.
    pub iommus: Vec<HostIommu>,
    /// In the order of their numbers.
    pub groups: Vec<IommuGroup>,
    /// The functions in no group, ascending: nothing confines what they access.
    pub ungrouped: Vec<HostFunction>,
    /// What the running kernel answers with functions in hand, by IOMMU, or why it was not asked.
    pub trials: Result<Vec<UnitTrial>, String>,
    /// Each way of serving a guest, and what it lacks.
    pub modes: Vec<Mode>,
}

/// The kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelReport {
    /// Its release: 7.3.4-amd64.
    pub release: Option<String>,
    /// What counts here and its configuration below /boot says is not built; empty also where there is none.
    pub not_built: Vec<String>,
    /// Whether iommufd takes functions whose interrupts nothing confines (its option `allow_unsafe_interrupts`).
    pub unsafe_interrupts: Option<bool>,
}

/// The hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KvmReport {
    /// The module for this processor: kvm_amd, kvm_intel or another.
    pub module: Option<String>,
    /// Whether guests can be hypervisors.
    pub nested: Option<bool>,
    /// Whether interrupts reach running processors without an exit (kvm_amd's option `avic`).
    pub avic: Option<bool>,
    /// Whether it has what Ravelin needs, or why not.
    pub usable: Result<(), String>,
    /// What it has, and how much of it; nothing where it cannot be opened.
    pub capabilities: Option<Capabilities>,
}

/// What asking KVM gave; apart from the rest, because no recorded tree can tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// Whether KVM has what Ravelin needs, or why not.
    pub kvm: Result<(), String>,
    /// What it has, and how much of it.
    pub capabilities: Option<Capabilities>,
    /// Bytes that may be locked in memory; `None` when there is no limit.
    pub memlock: Option<u64>,
}

impl Probed {
    /// Ask this host.
    #[must_use]
    pub fn here() -> Self {
        Self {
            kvm: Kvm::open().map(|_| ()).map_err(|error| chain(&error)),
            capabilities: Kvm::capabilities(),
            memlock: getrlimit(Resource::Memlock).current,
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A host IOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostIommu {
    /// The kernel's name: ivhd0, dmar1.
    pub name: String,
    /// Its own PCI function, where it has one.
    pub function: Option<Sbdf>,
    /// What it is and can do.
    pub kind: IommuKind,
    /// Whether the firmware has enabled the BARs of its vIOMMU extension; `None` where there are none, or nobody tells.
    pub viommu_bars: Option<bool>,
    /// The functions it translates for, ascending.
    pub devices: Vec<Sbdf>,
}

/// What a host IOMMU is and can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IommuKind {
    /// AMD, with its extended feature registers.
    Amd {
        /// Extended Feature Register, MMIO 0x30.
        #[serde(serialize_with = "hex")]
        efr: u64,
        /// Extended Feature 2 Register, MMIO 0x1a0; zero on kernels that do not tell.
        #[serde(serialize_with = "hex")]
        efr2: u64,
    },
    /// Intel, with its capability registers.
    Intel {
        /// Capability Register.
        #[serde(serialize_with = "hex")]
        cap: u64,
        /// Extended Capability Register.
        #[serde(serialize_with = "hex")]
        ecap: u64,
    },
    /// Another, or one whose registers the kernel does not tell.
    Other,
}

impl IommuKind {
    /// What the feature registers say, by the manual's names.
    #[must_use]
    pub fn features(&self) -> Vec<String> {
        let Self::Amd { efr, efr2 } = *self else {
            return Vec::new();
        };
        let (efr, efr2) = (Efr::from_bits(efr), Efr2::from_bits(efr2));
        let levels = |code: u8| u32::from(code) + 4;
        let named = [
            (efr.prefetch(), "PreF".to_owned()),
            (efr.ppr(), "PPR".to_owned()),
            (efr.xt(), "XT".to_owned()),
            (efr.nx(), "NX".to_owned()),
            (efr.gt(), format!("GT({} levels)", levels(efr.gats()))),
            (efr.ia(), "IA".to_owned()),
            (efr.ga(), "GA".to_owned()),
            (efr.he(), "HE".to_owned()),
            (efr.pc(), "PC".to_owned()),
            (efr.hats() < 3, format!("HATS({} levels)", levels(efr.hats()))),
            (efr.gam() != 0, "GAM".to_owned()),
            (efr.gio(), "GIO".to_owned()),
            (efr.ha(), "HA".to_owned()),
            (efr.hd(), "HD".to_owned()),
            (efr.eph(), "EPH".to_owned()),
            (efr.viommu(), "vIOMMU".to_owned()),
            (efr.snp(), "SNP".to_owned()),
            (efr2.gcr3_trp_mode(), "GCR3TRP".to_owned()),
            (efr2.num_int_remap() != 0, "NumIntRemap".to_owned()),
            (efr2.ht_range_ignore(), "HTRangeIgnore".to_owned()),
        ];
        named
            .into_iter()
            .filter_map(|(has, name)| has.then_some(name))
            .collect()
    }
}

/// Functions that can only be given away together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IommuGroup {
    /// The kernel's number.
    pub number: u32,
    /// The domain type in use: identity, DMA, DMA-FQ, or whatever the kernel says.
    pub domain: Option<String>,
    /// Its functions, ascending.
    pub functions: Vec<HostFunction>,
}

/// A PCI function of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostFunction {
    /// Where it is.
    pub address: Sbdf,
    /// Vendor ID.
    pub vendor: Option<u16>,
    /// Device ID.
    pub device: Option<u16>,
    /// Class, sub-class and interface: 24 bits.
    pub class: Option<u32>,
    /// The driver bound to it.
    pub driver: Option<String>,
    /// The IOMMU that translates for it.
    pub iommu: Option<String>,
    /// The NUMA node it is close to.
    pub numa_node: Option<u32>,
    /// How many virtual functions it has, and how many it can have.
    pub virtual_functions: Option<(u32, u32)>,
    /// How the kernel can reset it without others, in the order in which it tries.
    pub resets: Vec<String>,
    /// Its VFIO device node, from when it is bound to a driver of VFIO's.
    pub node: Option<PathBuf>,
    /// Whether it can be passed through now, or why not and what to do.
    pub passable: Result<(), String>,
}

impl HostReport {
    /// Read the host whose file systems begin at `root`: a copy, whose kernel is not asked anything.
    #[must_use]
    pub fn read(root: &Path, probed: &Probed) -> Self {
        let mut report = Self::facts(root, probed);
        report.trials = Err(trial::RECORDED.to_owned());
        report.modes = modes::judge(&report);
        report
    }

    /// This host; its kernel is asked which of `abis` is its own.
    #[must_use]
    pub fn here(abis: &[Abi]) -> Self {
        let mut report = Self::facts(Path::new("/"), &Probed::here());
        report.trials = trial::of_this_host(&report, abis);
        report.modes = modes::judge(&report);
        report
    }

    fn facts(root: &Path, probed: &Probed) -> Self {
        let host = sysfs::Host::new(root);
        let module = host.kvm_module();
        let (groups, ungrouped) = host.functions();
        Self {
            processor: host.processor(),
            kernel: host.kernel(),
            kvm: KvmReport {
                nested: module.as_ref().and_then(|module| host.option(module, "nested")),
                avic: module.as_ref().and_then(|module| host.option(module, "avic")),
                module,
                usable: probed.kvm.clone(),
                capabilities: probed.capabilities.clone(),
            },
            iommufd: host.exists("dev/iommu"),
            vfio_groups: host.exists("dev/vfio/vfio"),
            vfio_pci: host.exists("sys/bus/pci/drivers/vfio-pci"),
            memlock: probed.memlock,
            iommus: host.iommus(),
            groups,
            ungrouped,
            trials: Ok(Vec::new()),
            modes: Vec::new(),
        }
    }
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:#x}"))
}
