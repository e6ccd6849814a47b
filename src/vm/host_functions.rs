//! Functions of the host that can be passed through, as sysfs tells about them.
//!
//! A plan needs what a function decodes, and nothing is opened for that; whether it can be used now is looked at
//! apart ([`check`]). All is read below a root path, so that a recorded tree stands for a host that is not at hand.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::config::Config;
use super::config::said::ConfigError;
use super::config::section::Section;
use super::config::sections::VfioDevice;
use super::hardware;
use super::plan::{DeviceKind, Plan, ViommuPlan};
use crate::iommu::container;
use crate::iommu::iommufd::{self, Abi};
use crate::iommu::viommu::host::HostFeatures;
use crate::pci::bar::BarSpec;
use crate::pci::tree::{BarKind, Identity};
use crate::platform::addr::Sbdf;

/// The functions of a host.
#[derive(Debug, Clone)]
pub struct HostFunctions {
    root: PathBuf,
    /// How its kernel is asked; `None` where it is only read.
    ask: Option<Ask>,
    /// What it answered: it is asked once.
    answers: Arc<Mutex<Vec<Answer>>>,
}

/// Ask a host's kernel whether the unit of a function serves guests by one of these versions of its interface.
type Ask = fn(&HostFunctions, Sbdf, &[Abi]) -> Result<(), String>;

/// The function and the versions that a kernel was asked with, and what it said.
#[derive(Debug)]
struct Answer {
    at: Sbdf,
    abis: Vec<Abi>,
    said: Result<(), String>,
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

/// How functions of the host are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By their own nodes, bound to /dev/iommu.
    Iommufd,
    /// By the nodes of their IOMMU groups, in a container: the older interface.
    Groups,
}

/// What whoever starts the machine opened for a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Handed {
    /// /dev/iommu.
    pub iommufd: bool,
    /// The function's own node.
    pub node: bool,
}

/// What a kernel without iommufd calls the groups of functions that no IOMMU translates for.
const NO_IOMMU: &str = "vfio-noiommu";

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
    /// Of this host, which is only read.
    #[must_use]
    pub fn here() -> Self {
        Self::below(Path::new("/"))
    }

    /// Of the host whose file systems begin at `root`, which is only read.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            ask: None,
            answers: Arc::default(),
        }
    }

    /// The same of this host, whose kernel is asked where what it has is in no file. For machines that are about to run.
    #[must_use]
    pub fn asking(self) -> Self {
        Self {
            ask: Some(hardware::ask),
            ..self
        }
    }

    /// The same, whose kernel answers what `ask` says.
    #[cfg(test)]
    pub(super) fn answering(self, ask: Ask) -> Self {
        Self {
            ask: Some(ask),
            ..self
        }
    }

    /// Where a path of the host is here.
    fn found(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn folder(&self, at: Sbdf) -> PathBuf {
        self.found(&folder(at))
    }

    /// Whether the host has a function at `at`.
    #[must_use]
    pub fn has(&self, at: Sbdf) -> bool {
        self.folder(at).exists()
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

    /// The node of the IOMMU group of the function at `at`, as the host knows it.
    #[must_use]
    pub fn group_node(&self, at: Sbdf) -> Option<PathBuf> {
        Some(Path::new("/dev/vfio").join(self.iommu_group(at)?))
    }

    /// How `functions` are opened, all of them: the older way is for hosts that have no other.
    #[must_use]
    pub fn way(&self, functions: impl IntoIterator<Item = (Sbdf, Handed)>) -> Way {
        let lack = |(at, handed)| self.lacks_iommufd(at, handed);
        match functions.into_iter().find_map(lack) {
            None => Way::Iommufd,
            Some(_) => Way::Groups,
        }
    }

    /// What is neither there nor handed over of the nodes by which the function at `at` is opened with /dev/iommu.
    fn lacks_iommufd(&self, at: Sbdf, handed: Handed) -> Option<PathBuf> {
        let iommufd = (!handed.iommufd).then(|| PathBuf::from(iommufd::NODE));
        let absent = self.first_absent(iommufd);
        if absent.is_some() || handed.node {
            return absent;
        }
        match self.node(at) {
            Some(node) => self.first_absent([node]),
            // What would be in it has no name.
            None => Some(PathBuf::from("/dev/vfio/devices")),
        }
    }

    /// The device that `file` is the node of, as its folder in sysfs.
    #[must_use]
    pub fn device_of(&self, file: &File) -> Option<PathBuf> {
        let about = file.metadata().ok()?;
        if !about.file_type().is_char_device() {
            return None;
        }
        let (major, minor) = (rustix::fs::major(about.rdev()), rustix::fs::minor(about.rdev()));
        fs::read_link(self.root.join(format!("sys/dev/char/{major}:{minor}"))).ok()
    }

    fn first_absent(&self, paths: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
        paths.into_iter().find(|path| !self.found(path).exists())
    }

    /// The IOMMU that translates for the function at `at`, by the kernel's name.
    #[must_use]
    pub fn iommu(&self, at: Sbdf) -> Option<String> {
        link_name(&self.folder(at).join("iommu"))
    }

    /// What the IOMMU that the kernel calls `name` has, if it is AMD's.
    #[must_use]
    pub fn iommu_features(&self, name: &str) -> Option<HostFeatures> {
        amd_features(&self.iommu_folder(name))
    }

    /// The PCI function of the IOMMU that the kernel calls `name`, where it has one.
    #[must_use]
    pub fn iommu_function(&self, name: &str) -> Option<Sbdf> {
        unit_function(&self.iommu_folder(name))
    }

    fn iommu_folder(&self, name: &str) -> PathBuf {
        self.root.join("sys/class/iommu").join(name)
    }

    /// Whether the kernel has the unit of the function at `at` serve guests by one of `abis`; else what it says to which
    /// step. `None` where the host is only read. Asking takes the function for a moment.
    #[must_use]
    pub fn answers(&self, at: Sbdf, abis: &[Abi]) -> Option<Result<(), String>> {
        let ask = self.ask?;
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = answers.iter().find(|known| known.at == at && known.abis == abis) {
            return Some(known.said.clone());
        }
        let said = ask(self, at, abis);
        answers.push(Answer {
            at,
            abis: abis.to_vec(),
            said: said.clone(),
        });
        Some(said)
    }

    /// The IOMMU group of the function at `at`: the kernel's number.
    #[must_use]
    pub fn iommu_group(&self, at: Sbdf) -> Option<String> {
        link_name(&self.folder(at).join("iommu_group"))
    }

    /// Whether the function at `at` is one that can be passed through, and can be now; else what is wrong or missing,
    /// and what to do.
    pub fn passable(&self, at: Sbdf) -> Result<(), String> {
        self.face(at).and_then(|_| self.usable(at, Handed::default()))
    }

    /// Whether nothing is in the way of passing the function at `at` through now; else what is missing and what to do.
    fn usable(&self, at: Sbdf, handed: Handed) -> Result<(), String> {
        let folder = self.folder(at);
        let confined = |group: &String| {
            let name = self.root.join(format!("sys/kernel/iommu_groups/{group}/name"));
            !fs::read_to_string(name).is_ok_and(|name| name.trim() == NO_IOMMU)
        };
        let Some(group) = self.iommu_group(at).filter(confined) else {
            return Err(UNCONFINED.to_owned());
        };
        if !is_given(&folder) {
            return Err(self.how_to_give(at));
        }
        let others = self.group(&group).into_iter();
        if let Some(other) = others
            .filter(|other| *other != at)
            .find(|other| !self.leaves_alone(*other))
        {
            return Err(format!(
                "{other} is in the same IOMMU group, {group}, and {}",
                self.how_to_give(other)
            ));
        }
        self.reachable(at, handed)
    }

    /// What keeps the IOMMU group of the function at `at` from being given away: each of its functions that a driver of the
    /// host's has, with that, and what to do.
    #[must_use]
    pub fn in_the_way(&self, at: Sbdf) -> Vec<String> {
        let group = self.iommu_group(at).map(|group| self.group(&group));
        let kept = group
            .into_iter()
            .flatten()
            .filter(|other| !self.leaves_alone(*other));
        kept.map(|other| format!("{other} is in the group, and {}", self.how_to_give(other)))
            .collect()
    }

    /// What has the function at `at`, and the command that gives it away.
    fn how_to_give(&self, at: Sbdf) -> String {
        let has = bound(&self.folder(at));
        format!("{has}; `scripts/bind-vfio bind {at}` gives it to vfio-pci")
    }

    /// Whether the nodes are there by which the function at `at` is opened, one way or the other.
    fn reachable(&self, at: Sbdf, handed: Handed) -> Result<(), String> {
        let older = [Some(PathBuf::from(container::NODE)), self.group_node(at)];
        let lacks_older = self.first_absent(older.into_iter().flatten());
        match (self.lacks_iommufd(at, handed), lacks_older) {
            (None, _) | (_, None) => Ok(()),
            (Some(node), Some(older)) => Err(format!(
                "{} is not there; load the modules iommufd and vfio-pci, of a kernel with CONFIG_IOMMUFD and \
                 CONFIG_VFIO_DEVICE_CDEV; or, for the older interface, vfio_iommu_type1: {} is not there either",
                node.display(),
                older.display()
            )),
        }
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
        let harmless = matches!(driver.as_deref(), None | Some("pcieport" | "pci-stub"));
        harmless || is_given(&folder)
    }
}

/// Whether a driver of VFIO's has the function of `folder`. Kernels before 6.1 tell by the driver's name only.
fn is_given(folder: &Path) -> bool {
    folder.join("vfio-dev").exists() || link_name(&folder.join("driver")).as_deref() == Some("vfio-pci")
}

/// Where the host tells about the function at `at`.
fn folder(at: Sbdf) -> PathBuf {
    PathBuf::from(format!("/sys/bus/pci/devices/{at}"))
}

/// What the IOMMU of `folder` has, by AMD's extended feature registers: one on older kernels, EFR:EFR2 on newer ones.
pub(super) fn amd_features(folder: &Path) -> Option<HostFeatures> {
    let hex = |text: &str| u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok();
    let text = fs::read_to_string(folder.join("amd-iommu/features")).ok()?;
    let (efr, efr2) = text.split_once(':').unwrap_or((&text, "0"));
    Some(HostFeatures {
        efr: hex(efr)?,
        efr2: hex(efr2)?,
    })
}

/// The PCI function of the IOMMU of `folder`: the class folder links to .../FUNCTION/iommu/NAME, and units that are no
/// function have none on the way.
pub(super) fn unit_function(folder: &Path) -> Option<Sbdf> {
    let target = fs::read_link(folder).ok()?;
    let mut parts = target.iter().rev().filter_map(|part| part.to_str());
    parts.find_map(|part| part.parse().ok())
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

/// Whether the functions that `config` passes through can be used now, where `plan`, which came of it, has them.
pub fn check(config: &Config, plan: &Plan, host: &HostFunctions) -> Result<(), ConfigError> {
    let handed = |device: &VfioDevice| Handed {
        iommufd: config.iommufd.is_some(),
        node: device.fd.is_some(),
    };
    for device in &config.vfio_devices {
        host.usable(device.host.0.0, handed(device))
            .map_err(|problem| device.source().wrong("host", problem))?;
    }
    let all = || {
        config
            .vfio_devices
            .iter()
            .map(|device| (device.host.0.0, handed(device)))
    };
    let lacking = all().find_map(|(at, handed)| Some((at, host.lacks_iommufd(at, handed)?)));
    let Some((lacks, node)) = lacking else {
        return Ok(());
    };
    let node = node.display();
    // All functions are opened by their groups, then.
    if let Some(said) = &config.iommufd {
        let problem =
            format!("{lacks} cannot be opened with it: {node} is not there, nor was it handed over");
        return Err(said.source().wrong("fd", problem));
    }
    let devices = plan.devices.iter();
    let names = devices.filter_map(|device| match &device.kind {
        DeviceKind::Vfio(_) => Some(device.name.as_str()),
        _ => None,
    });
    for (device, name) in config.vfio_devices.iter().zip(names) {
        if device.fd.is_some() {
            let problem = format!(
                "all functions are opened in one way, and {lacks} cannot be opened like this one: {node} is not there"
            );
            return Err(device.source().wrong("fd", problem));
        }
        let covers = |unit: &&ViommuPlan| unit.covers.iter().any(|covered| covered == name);
        if let Some(unit) = plan.viommus.iter().find(covers) {
            let problem = format!(
                "it would be behind {}, and only /dev/iommu gives out the address spaces that copies of the guest's \
                 tables need: {node} is not there; load the module iommufd, of a kernel with CONFIG_IOMMUFD and \
                 CONFIG_VFIO_DEVICE_CDEV, or put it on a root complex without an IOMMU",
                unit.name
            );
            return Err(device.source().wrong("host", problem));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod recorded;
#[cfg(test)]
mod tests;
