//! Functions of the host that can be passed through, as sysfs tells about them.
//!
//! A plan needs what a function decodes, and nothing is opened for that; whether it can be used now is looked at
//! apart ([`check`]). All is read below a root path, so that a recorded tree stands for a host that is not at hand.

use std::fs;
use std::path::{Path, PathBuf};

use super::config::Config;
use super::config::said::ConfigError;
use super::config::section::Section;
use crate::iommu::iommufd;
use crate::pci::bar::BarSpec;
use crate::pci::tree::{BarKind, Identity};
use crate::platform::addr::Sbdf;

/// The functions of a host.
#[derive(Debug, Clone)]
pub struct HostFunctions {
    root: PathBuf,
}

/// How a function shows itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Face {
    /// Its identification registers.
    pub identity: Identity,
    /// What it decodes, ascending.
    pub bars: Vec<BarSpec>,
    /// Whether it has a wired interrupt.
    pub intx: bool,
}

/// Said of a function that has no IOMMU.
pub const UNCONFINED: &str = "no IOMMU translates for it, so that nothing would confine it; switch the host's IOMMU on, \
    in its firmware and with amd_iommu=on or intel_iommu=on";

/// Flags of a resource (include/linux/ioport.h).
const IO: u64 = 0x100;
const MEMORY: u64 = 0x200;
const PREFETCH: u64 = 0x2000;
const MEMORY_64: u64 = 0x10_0000;

/// Bytes of configuration space that anybody may read: the header.
const HEADER: usize = 64;
const HEADER_TYPE: usize = 0x0e;
const INTERRUPT_PIN: usize = 0x3d;
/// Sub-class of bridges between PCI buses.
const BRIDGE: u32 = 0x0604;

impl HostFunctions {
    /// Of this host.
    #[must_use]
    pub fn here() -> Self {
        Self::below(Path::new("/"))
    }

    /// Of the host whose file systems begin at `root`.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Where a path of the host is here.
    fn found(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn folder(&self, at: Sbdf) -> PathBuf {
        self.found(&folder(at))
    }

    /// How the function at `at` shows itself; else what is wrong with it.
    pub fn face(&self, at: Sbdf) -> Result<Face, String> {
        let own = folder(at);
        let folder = self.found(&own);
        if !folder.exists() {
            return Err("this host has no function there; `lspci -D` lists those it has".to_owned());
        }
        let number = |name: &str| {
            let text = fs::read_to_string(folder.join(name)).ok()?;
            u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
        };
        let unreadable = |name: &str| format!("{} cannot be read", own.join(name).display());
        let short = |name: &str| {
            let value = number(name).and_then(|value| u16::try_from(value).ok());
            value.ok_or_else(|| unreadable(name))
        };
        let class = number("class").ok_or_else(|| unreadable("class"))?;
        let header = fs::read(folder.join("config"))
            .ok()
            .filter(|bytes| bytes.len() >= HEADER);
        let header = header.ok_or_else(|| unreadable("config"))?;
        if class >> 8 == BRIDGE || header[HEADER_TYPE] & 0x7f != 0 {
            return Err(
                "it is a bridge, and what is behind it would go with it; name the functions there".to_owned(),
            );
        }
        let resources = fs::read_to_string(folder.join("resource")).map_err(|_| unreadable("resource"))?;
        Ok(Face {
            identity: Identity {
                vendor: short("vendor")?,
                device: short("device")?,
                class,
                revision: number("revision")
                    .and_then(|value| u8::try_from(value).ok())
                    .unwrap_or(0),
                subsystem_vendor: short("subsystem_vendor").unwrap_or(0),
                subsystem: short("subsystem_device").unwrap_or(0),
            },
            bars: bars(&resources)?,
            intx: (1..=4).contains(&header[INTERRUPT_PIN]),
        })
    }

    /// The VFIO device node of the function at `at`, if it has one, as the host knows it.
    #[must_use]
    pub fn node(&self, at: Sbdf) -> Option<PathBuf> {
        let mut names = fs::read_dir(self.folder(at).join("vfio-dev")).ok()?.flatten();
        let name = names.next()?.file_name();
        Some(Path::new("/dev/vfio/devices").join(name))
    }

    /// The IOMMU that translates for the function at `at`, by the kernel's name.
    #[must_use]
    pub fn iommu(&self, at: Sbdf) -> Option<String> {
        link_name(&self.folder(at).join("iommu"))
    }

    /// The IOMMU group of the function at `at`: the kernel's number.
    #[must_use]
    pub fn iommu_group(&self, at: Sbdf) -> Option<String> {
        link_name(&self.folder(at).join("iommu_group"))
    }

    /// Whether the function at `at` is one that can be passed through, and can be now; else what is wrong or missing,
    /// and what to do.
    pub fn passable(&self, at: Sbdf) -> Result<(), String> {
        self.face(at).and_then(|_| self.usable(at))
    }

    /// Whether nothing is in the way of passing the function at `at` through now; else what is missing and what to do.
    fn usable(&self, at: Sbdf) -> Result<(), String> {
        let folder = self.folder(at);
        let Some(group) = self.iommu_group(at) else {
            return Err(UNCONFINED.to_owned());
        };
        let Some(node) = self.node(at) else {
            return Err(format!(
                "{}; `scripts/bind-vfio bind {at}` gives it to vfio-pci",
                bound(&folder)
            ));
        };
        for other in self.group(&group) {
            let folder = self.folder(other);
            if other != at && !self.leaves_alone(other) {
                return Err(format!(
                    "{other} is in the same IOMMU group, {group}, and {}; `scripts/bind-vfio bind {other}` gives it to \
                     vfio-pci",
                    bound(&folder)
                ));
            }
        }
        let iommufd = PathBuf::from(iommufd::NODE);
        for (path, module) in [(iommufd, "iommufd"), (node, "vfio-pci")] {
            if !self.found(&path).exists() {
                return Err(format!(
                    "{} is not there; load the module {module}, of a kernel with CONFIG_IOMMUFD and \
                     CONFIG_VFIO_DEVICE_CDEV",
                    path.display()
                ));
            }
        }
        Ok(())
    }

    /// The functions of an IOMMU group, ascending.
    fn group(&self, group: &str) -> Vec<Sbdf> {
        let folder = self.root.join(format!("sys/kernel/iommu_groups/{group}/devices"));
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut found: Vec<Sbdf> = entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        found.sort_unstable();
        found
    }

    /// Whether nothing of the host's drives the function at `at`, so that others of its group can be given away.
    fn leaves_alone(&self, at: Sbdf) -> bool {
        let folder = self.folder(at);
        let driver = link_name(&folder.join("driver"));
        let harmless = matches!(
            driver.as_deref(),
            None | Some("pcieport" | "pci-stub" | "vfio-pci")
        );
        harmless || folder.join("vfio-dev").exists()
    }
}

/// Where the host tells about the function at `at`.
fn folder(at: Sbdf) -> PathBuf {
    PathBuf::from(format!("/sys/bus/pci/devices/{at}"))
}

/// What drives the function of `folder`, as half a sentence.
fn bound(folder: &Path) -> String {
    match link_name(&folder.join("driver")) {
        Some(driver) => format!("the driver {driver} has it"),
        None => "no driver has it".to_owned(),
    }
}

/// The last part of what a link points at.
fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    target.file_name()?.to_str().map(str::to_owned)
}

/// The BARs among a function's resources: six lines of first and last address and flags.
fn bars(resources: &str) -> Result<Vec<BarSpec>, String> {
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let mut found = Vec::new();
    for (index, line) in (0..6).zip(resources.lines()) {
        let mut words = line.split_whitespace().map(hex);
        let (Some(Some(start)), Some(Some(last)), Some(Some(flags))) =
            (words.next(), words.next(), words.next())
        else {
            return Err(format!("its resource {index} is not three numbers: {line}"));
        };
        if flags & (IO | MEMORY) == 0 {
            continue;
        }
        let prefetchable = flags & PREFETCH != 0;
        let kind = match flags {
            _ if flags & IO != 0 => BarKind::Io,
            _ if flags & MEMORY_64 != 0 => BarKind::Mem64 { prefetchable },
            _ => BarKind::Mem32 { prefetchable },
        };
        // The upper half of a 64-bit BAR is the next register, which is nobody else's.
        let taken = |before: &BarSpec| before.kind.is_64_bit() && before.index + 1 == index;
        let fits = (index < 5 || !kind.is_64_bit()) && !found.last().is_some_and(taken);
        let limits = match kind {
            BarKind::Io => 4..=256,
            BarKind::Mem32 { .. } => 16..=1 << 31,
            BarKind::Mem64 { .. } => 16..=1 << 62,
        };
        let size = last.checked_sub(start).and_then(|more| more.checked_add(1));
        let size = size.filter(|size| size.is_power_of_two() && limits.contains(size) && fits);
        let size = size.ok_or_else(|| {
            format!("its BAR {index} lies at {start:#x}-{last:#x} with flags {flags:#x}, which no function can have")
        })?;
        found.push(BarSpec { index, kind, size });
    }
    Ok(found)
}

/// Whether the functions that `config` passes through can be used now.
pub fn check(config: &Config, host: &HostFunctions) -> Result<(), ConfigError> {
    config.vfio_devices.iter().try_for_each(|device| {
        host.usable(device.host.0.0)
            .map_err(|problem| device.source().wrong("host", problem))
    })
}

#[cfg(test)]
pub(super) mod recorded;
#[cfg(test)]
mod tests;
