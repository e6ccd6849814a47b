//! The files that tell about a host. What is absent or unreadable is left out of the report.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::iommu::viommu::host::HostFeatures;
use crate::platform::addr::Sbdf;
use crate::vm::host_functions::{HostFunctions, amd_features, unit_function};

use super::{HostFunction, HostIommu, IommuGroup, IommuKind, KernelReport};

/// What functions of the host, and AMD's vIOMMU before them, need of a kernel.
const NEEDED_OPTIONS: [&str; 3] = [
    "CONFIG_IOMMUFD",
    "CONFIG_VFIO_DEVICE_CDEV",
    "CONFIG_AMD_IOMMU_IOMMUFD",
];

/// A host's file systems.
pub(super) struct Host {
    root: PathBuf,
    passing: HostFunctions,
}

impl Host {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            passing: HostFunctions::below(root),
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    pub(super) fn processor(&self) -> Option<String> {
        let text = fs::read_to_string(self.path("proc/cpuinfo")).ok()?;
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        line.split_once(':').map(|(_, name)| name.trim().to_owned())
    }

    /// The kernel, as far as it tells.
    pub(super) fn kernel(&self) -> KernelReport {
        let release = word(&self.path("proc/sys/kernel/osrelease"));
        let config = release
            .as_ref()
            .and_then(|release| fs::read_to_string(self.path(&format!("boot/config-{release}"))).ok());
        let built = |option: &str, config: &str| {
            let lines = config.lines().filter_map(|line| line.strip_prefix(option));
            lines.into_iter().any(|rest| matches!(rest, "=y" | "=m"))
        };
        let not_built = config.map(|config| {
            let absent = NEEDED_OPTIONS.iter().filter(|option| !built(option, &config));
            absent.map(|option| (*option).to_owned()).collect()
        });
        KernelReport {
            not_built: not_built.unwrap_or_default(),
            release,
            unsafe_interrupts: self.option("iommufd", "allow_unsafe_interrupts"),
        }
    }

    /// The KVM module for this processor.
    pub(super) fn kvm_module(&self) -> Option<String> {
        let modules = names(&self.path("sys/module"));
        modules.into_iter().find(|name| name.starts_with("kvm_"))
    }

    /// An option of a module that is on or off; options that the kernel decides itself count as on.
    pub(super) fn option(&self, module: &str, option: &str) -> Option<bool> {
        let value = word(&self.path(&format!("sys/module/{module}/parameters/{option}")))?;
        Some(matches!(value.as_str(), "1" | "Y" | "-1"))
    }

    pub(super) fn iommus(&self) -> Vec<HostIommu> {
        let class = self.path("sys/class/iommu");
        let mut names = names(&class);
        names.sort_by_key(|name| numbered(name));
        names
            .into_iter()
            .map(|name| self.iommu(&class.join(&name), name))
            .collect()
    }

    fn iommu(&self, path: &Path, name: String) -> HostIommu {
        let mut devices: Vec<Sbdf> = names(&path.join("devices"))
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        devices.sort_unstable();
        let function = unit_function(path);
        let config =
            function.and_then(|at| fs::read(self.path(&format!("sys/bus/pci/devices/{at}/config"))).ok());
        HostIommu {
            kind: kind(path),
            viommu_bars: config.and_then(|config| viommu_bars(&config)),
            name,
            function,
            devices,
        }
    }

    /// The groups, and the functions that are in none: those that no IOMMU translates for.
    pub(super) fn functions(&self) -> (Vec<IommuGroup>, Vec<HostFunction>) {
        let mut groups: BTreeMap<u32, Vec<HostFunction>> = BTreeMap::new();
        let mut ungrouped = Vec::new();
        let devices = self.path("sys/bus/pci/devices");
        for name in names(&devices) {
            let path = devices.join(&name);
            let Ok(address) = name.parse() else { continue };
            let group = link_name(&path.join("iommu_group")).and_then(|number| number.parse().ok());
            let list = match group {
                Some(group) => groups.entry(group).or_default(),
                None => &mut ungrouped,
            };
            list.push(self.function(&path, address));
        }
        ungrouped.sort_by_key(|function| function.address);
        let with_domain = groups.into_iter().map(|(number, mut functions)| {
            functions.sort_by_key(|function| function.address);
            IommuGroup {
                number,
                domain: word(&self.path(&format!("sys/kernel/iommu_groups/{number}/type"))),
                functions,
            }
        });
        (with_domain.collect(), ungrouped)
    }

    fn function(&self, path: &Path, address: Sbdf) -> HostFunction {
        let register = |name: &str| word(&path.join(name)).and_then(|text| hex(&text));
        let count = |name: &str| word(&path.join(name)).and_then(|text| text.parse().ok());
        let resets = word(&path.join("reset_method")).unwrap_or_default();
        HostFunction {
            address,
            vendor: register("vendor").and_then(|value| u16::try_from(value).ok()),
            device: register("device").and_then(|value| u16::try_from(value).ok()),
            class: register("class").and_then(|value| u32::try_from(value).ok()),
            driver: link_name(&path.join("driver")),
            iommu: link_name(&path.join("iommu")),
            // -1 says that no node is closer than another.
            numa_node: count("numa_node"),
            virtual_functions: count("sriov_numvfs").zip(count("sriov_totalvfs")),
            resets: resets.split_whitespace().map(str::to_owned).collect(),
            node: self.passing.node(address),
            passable: self.passing.passable(address),
        }
    }
}

/// Whether both BARs in the vendor-specific capability of an AMD IOMMU's configuration space are enabled: VF MMIO and VF
/// control MMIO (bit 0 of the dwords 8 and 16 bytes behind its header). `None` where there is no such capability.
fn viommu_bars(config: &[u8]) -> Option<bool> {
    const CAPABILITIES: usize = 0x34;
    const VENDOR_SPECIFIC: u8 = 9;
    const MOST_CAPABILITIES: usize = 48;
    let byte = |at: usize| config.get(at).copied();
    let mut at = usize::from(byte(CAPABILITIES)? & !3);
    for _ in 0..MOST_CAPABILITIES {
        if at < 0x40 {
            return None;
        }
        if byte(at)? == VENDOR_SPECIFIC {
            return Some(byte(at + 0x8)? & byte(at + 0x10)? & 1 != 0);
        }
        at = usize::from(byte(at + 1)? & !3);
    }
    None
}

fn kind(path: &Path) -> IommuKind {
    let register = |path: PathBuf| word(&path).and_then(|text| hex(&text));
    if let Some(HostFeatures { efr, efr2 }) = amd_features(path) {
        return IommuKind::Amd { efr, efr2 };
    }
    let (cap, ecap) = (
        register(path.join("intel-iommu/cap")),
        register(path.join("intel-iommu/ecap")),
    );
    match (cap, ecap) {
        (Some(cap), Some(ecap)) => IommuKind::Intel { cap, ecap },
        _ => IommuKind::Other,
    }
}

/// What is in a folder, sorted; nothing when it cannot be read.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// A name that ends in a number, in the order of numbers.
fn numbered(name: &str) -> (String, u64) {
    let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[prefix.len()..].parse().unwrap_or(0);
    (prefix.to_owned(), number)
}

/// The content of a short file without the space around it.
fn word(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The last part of what a link points at.
fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    target.file_name()?.to_str().map(str::to_owned)
}

fn hex(text: &str) -> Option<u64> {
    let digits = text.trim().trim_start_matches("0x");
    u64::from_str_radix(digits, 16).ok()
}
