//! The whole machine, decided: every address, BDF, name and choice resolved, and nothing opened.
//!
//! A [`Plan`] comes from a `Config`, and from what the host's functions in it look like, so that two runs of the same
//! configuration give equal plans and tests compare them. Whoever builds from it may rely on it: references exist, ranges do not
//! overlap, numbers are in their fields' ranges. What only the host can tell (whether a file opens, whether
//! KVM has enough address bits) is not decided here.

mod resolve;

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

pub use crate::devices::character::Backend as CharBackend;
use crate::iommu::amd::features::{Features, Wanted};
use crate::iommu::emulated::GuestRegisters;
use crate::iommu::iommufd::Abi;
use crate::iommu::viommu;
use crate::iommu::viommu::host::HostFeatures;
use crate::pci::tree::{PciTree, RootComplex};
use crate::platform::addr::{Bdf, GpaRange, Sbdf};

use super::layout::Layout;

/// The most vCPUs a machine has.
pub const MAX_CPUS: u32 = 1024;

/// A machine, ready to be built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Processors.
    pub cpus: CpuPlan,
    /// RAM.
    pub memory: MemoryPlan,
    /// The guest physical map around RAM.
    pub layout: Layout,
    /// The PCI hierarchy; its endpoints point into `devices`.
    pub pci: PciTree,
    /// The devices behind the endpoints of `pci`.
    pub devices: Vec<DevicePlan>,
    /// The IOMMUs of `pci`.
    pub viommus: Vec<ViommuPlan>,
    /// The inherited descriptor of /dev/iommu, where that was opened by whoever starts the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<i32>,
    /// What to start; `None` when no kernel was named, which is enough to look at a machine but not to run it.
    pub boot: Option<BootPlan>,
    /// What the 16550 at port 0x3f8 is connected to.
    pub serial: CharBackend,
    /// What else sits on the board.
    pub board: BoardPlan,
}

impl Plan {
    /// The IOMMU that covers `root`, if one does.
    #[must_use]
    pub fn viommu_of(&self, root: &RootComplex) -> Option<&ViommuPlan> {
        self.viommus
            .iter()
            .find(|viommu| viommu.root_complex == root.name)
    }

    /// The processors are known: whether their own page tables may have five levels. Linux gives processes of such
    /// processors no PASID where IOMMUs walk four (GATS), so units with PASIDs walk five then, but for those whose
    /// tables are copied into the host's.
    pub fn match_processors(&mut self, five_levels: bool) {
        for ViommuPlan { offer, .. } in &mut self.viommus {
            offer.five_levels = five_levels && offer.pasid_bits > 0 && !offer.np_cache;
        }
    }
}

/// The processors and how they are numbered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuPlan {
    /// vCPUs: `sockets` x `cores` x `threads`, 1 to [`MAX_CPUS`].
    pub count: u32,
    /// Packages, at least 1.
    pub sockets: u32,
    /// Cores per package, at least 1.
    pub cores: u32,
    /// Hardware threads per core, at least 1.
    pub threads: u32,
    /// APIC ID of each vCPU, ascending. Sparse where cores or threads are no powers of two. From 255 on
    /// an ID exists in x2APIC mode only.
    pub apic_ids: Vec<u32>,
    /// The host CPUs each vCPU's thread may run on; `None` leaves it to the host.
    pub pinning: Vec<Option<CpuSet>>,
}

impl CpuPlan {
    /// Width of the thread field of an APIC ID (CPUID leaf 0xB, sub-leaf 0, EAX).
    #[must_use]
    pub const fn thread_bits(&self) -> u32 {
        field_bits(self.threads)
    }

    /// Width of the thread and core fields together: the package number begins above them (CPUID leaf 0xB,
    /// sub-leaf 1, EAX).
    #[must_use]
    pub const fn package_shift(&self) -> u32 {
        field_bits(self.threads) + field_bits(self.cores)
    }
}

/// How many bits number `count` things.
pub(crate) const fn field_bits(count: u32) -> u32 {
    match count {
        0 | 1 => 0,
        more => u32::BITS - (more - 1).leading_zeros(),
    }
}

/// A set of host CPUs that is not empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// `None` when there is no CPU in it.
    pub fn new(cpus: impl IntoIterator<Item = u32>) -> Option<Self> {
        let cpus: BTreeSet<u32> = cpus.into_iter().collect();
        (!cpus.is_empty()).then_some(Self(cpus))
    }

    /// The CPUs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }
}

/// As the kernel writes CPU lists: `0-3,8`.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for cpu in self.iter() {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(cpu) => *last = cpu,
                _ => runs.push((cpu, cpu)),
            }
        }
        for (at, (first, last)) in runs.into_iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

impl Serialize for CpuSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Bytes in all: a multiple of the backing's page size.
    pub size: u64,
    /// Where it lies, ascending: from 0 up to the 32-bit hole, and from 4 GiB on around the HyperTransport
    /// hole. The ranges add up to `size`.
    pub regions: Vec<GpaRange>,
    /// What it is made of.
    pub backing: MemoryBacking,
    /// Whether the kernel is asked for transparent huge pages.
    pub transparent_huge_pages: bool,
    /// Whether every page is populated before the guest starts.
    pub prefault: bool,
    /// The host NUMA node whose memory is used.
    pub host_numa_node: Option<u32>,
}

/// What guest RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBacking {
    /// Private anonymous pages.
    Anonymous,
    /// A memfd that other processes can map.
    Shared,
    /// A memfd of huge pages.
    HugePages {
        /// Bytes per page: 2 MiB or 1 GiB.
        page_size: u64,
        /// Whether other processes can map it.
        shared: bool,
    },
}

/// An IOMMU for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ViommuPlan {
    /// The name of its [`crate::pci::tree::Node`].
    pub name: String,
    /// What it is.
    pub mode: ViommuMode,
    /// Why it is that, where the choice was left to us, or what is against it.
    pub because: Option<String>,
    /// The unit of the host's that serves it, in mode `hw` and in no other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hardware: Option<HardwarePlan>,
    /// The root complex it covers.
    pub root_complex: String,
    /// The PCI segment of that.
    pub segment: u16,
    /// Its own function.
    pub bdf: Bdf,
    /// Its registers.
    pub mmio: GpaRange,
    /// Where it has those of guests that it serves.
    pub guests: Option<GuestRegisters>,
    /// The bus numbers it covers: all that the root complex decodes.
    #[serde(serialize_with = "buses")]
    pub buses: RangeInclusive<u8>,
    /// The functions it covers, by name, in the order of the tree.
    pub covers: Vec<String>,
    /// The IOMMUs of the host, by the kernel's names, that serve the host's functions among those.
    pub stands_for: Vec<String>,
    /// What it offers; the same for all of a machine.
    pub offer: ViommuOffer,
    /// Whether the IOAPIC's messages pass it.
    pub remaps_ioapic: bool,
    /// How it hears of commands.
    pub doorbell: Doorbell,
}

/// How an IOMMU hears that commands wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doorbell {
    /// Each time by an exit.
    Exit,
    /// By a thread that polls while the guest is busy.
    Poll,
}

/// What the IOMMUs of a machine offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ViommuOffer {
    /// Interrupts reach APIC IDs above 255.
    pub xt: bool,
    /// The page tables a guest uses.
    pub page_table: PageTable,
    /// The guest is told who remaps the IOAPIC's interrupts.
    pub intremap: bool,
    /// Width of process address space IDs; 0 for none.
    pub pasid_bits: u8,
    /// Devices may keep translations.
    pub ats: bool,
    /// The guest announces new mappings as well, because its tables are copied. They then have four levels, which is
    /// as far as hosts let devices reach, and leave no marks of what was used, which copies could not.
    pub np_cache: bool,
    /// Tables of processes may have five levels: [`Plan::match_processors`] says so, and no key does.
    pub five_levels: bool,
    /// They serve guests of the guest's.
    pub virtualizable: bool,
    /// A function's interrupt remapping table may have 2,048 entries. A guest that does not know that goes on with 512.
    pub large_irt: bool,
    /// Where units are served by a host's or a model of one: what all of those have. None of the guest's then offers
    /// what they leave to the hypervisor: only tables of the processors' format, and no remapped interrupts.
    #[serde(serialize_with = "is_some")]
    pub served: Option<HostFeatures>,
}

/// A unit of the host's that serves one of the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HardwarePlan {
    /// The kernel's name of it.
    pub iommu: String,
    /// Its own function, where the host tells.
    pub function: Option<Sbdf>,
    /// What it has, as the host tells before anything is opened.
    #[serde(serialize_with = "registers")]
    pub features: HostFeatures,
    /// The version of AMD's interface; `None` for whichever the kernel answers to.
    #[serde(serialize_with = "abi_name")]
    pub abi: Option<Abi>,
}

impl HardwarePlan {
    /// The versions that the kernel may have, the likeliest first.
    #[must_use]
    pub fn abis(&self) -> Vec<Abi> {
        self.abi
            .clone()
            .map_or_else(|| Abi::built_in().into(), |abi| vec![abi])
    }
}

fn is_some<T, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bool(value.is_some())
}

fn registers<S: Serializer>(features: &HostFeatures, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{:#x}:{:#x}", features.efr, features.efr2))
}

fn abi_name<S: Serializer>(abi: &Option<Abi>, serializer: S) -> Result<S::Ok, S::Error> {
    match abi {
        Some(abi) => serializer.serialize_some(abi.name),
        None => serializer.serialize_none(),
    }
}

impl ViommuPlan {
    /// Where its own function is.
    #[must_use]
    pub const fn sbdf(&self) -> Sbdf {
        Sbdf {
            segment: self.segment,
            bdf: self.bdf,
        }
    }
}

impl ViommuOffer {
    /// The registers' view of it: what each unit shows, and the ACPI tables repeat.
    #[must_use]
    pub fn features(&self) -> Features {
        let wanted = Wanted {
            xt: self.xt,
            guest_tables: self.page_table != PageTable::V1,
            pasid_bits: self.pasid_bits,
            five_levels: self.five_levels,
            ats: self.ats,
            np_cache: self.np_cache,
            host_levels: if self.np_cache { 4 } else { 6 },
            host_tracking: !self.np_cache,
            virtualizable: self.virtualizable,
            large_interrupt_tables: self.large_irt,
            ..Wanted::DEFAULT
        };
        let Some(hosts) = self.served else {
            return Features::offer(wanted);
        };
        let served = viommu::features::offer(&[hosts], &wanted);
        Features {
            header: served.header.with_np_cache(self.np_cache),
            ..served
        }
    }
}

impl ViommuMode {
    /// As the operator says it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Emulated => "emulated",
            Self::Hardware => "hw",
            Self::Simulated => "sim",
        }
    }

    /// Whether a unit of a host's, or a model of one, works it.
    #[must_use]
    pub const fn is_served(self) -> bool {
        match self {
            Self::Emulated => false,
            Self::Hardware | Self::Simulated => true,
        }
    }
}

/// How an IOMMU works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ViommuMode {
    /// By Ravelin.
    Emulated,
    /// By a unit of the host's.
    #[serde(rename = "hw")]
    Hardware,
    /// By a model of a host's unit that serves guests.
    #[serde(rename = "sim")]
    Simulated,
}

/// The page tables of an IOMMU that a guest uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageTable {
    /// The IOMMU's own.
    V1,
    /// The processors'.
    V2,
    /// Either.
    Any,
}

fn buses<S: Serializer>(buses: &RangeInclusive<u8>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{:02x}-{:02x}", buses.start(), buses.end()))
}

/// A device and how it is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DevicePlan {
    /// The name of its [`crate::pci::tree::Node`].
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// A virtio disk.
    Block(BlockPlan),
    /// A virtio NIC.
    Net(NetPlan),
    /// A virtio console.
    Console(ConsolePlan),
    /// A virtio entropy source.
    Rng(RngPlan),
    /// A function for testing.
    Test(TestPlan),
    /// A function of the host.
    Vfio(VfioPlan),
}

/// A virtio disk on a raw image or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlockPlan {
    /// The image. Always raw: its format is never probed.
    pub path: PathBuf,
    /// Whether the guest may write.
    pub readonly: bool,
    /// Whether the host's page cache is bypassed (O_DIRECT).
    pub direct: bool,
    /// Request queues, at least 1.
    pub queues: u16,
    /// Entries per queue: a power of two.
    pub queue_size: u16,
    /// What the guest reads as the disk's serial number: at most 20 bytes of ASCII.
    pub serial: String,
}

/// A virtio NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetPlan {
    /// Where its frames go.
    pub backend: NetBackend,
    /// Its address.
    pub mac: MacAddress,
    /// The MTU the guest is told; `None` tells none.
    pub mtu: Option<u16>,
    /// Pairs of a receive and a transmit queue, at least 1.
    pub queue_pairs: u16,
    /// Entries per queue: a power of two.
    pub queue_size: u16,
    /// Whether checksum and segmentation offloads are offered.
    pub offload: bool,
}

/// Where a NIC's frames go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// Nowhere: the link is down.
    None,
    /// A tap interface by name.
    Tap(String),
    /// Open descriptors of a tap interface, one per queue pair, inherited from whoever started us.
    Fds(Vec<i32>),
}

/// An Ethernet address, unicast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsolePlan {
    /// What it is connected to.
    pub backend: CharBackend,
}

/// A virtio entropy source; the host's random number generator feeds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RngPlan {}

/// A function for testing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TestPlan {
    /// MSI-X vectors, 1 to 2048.
    pub msix_vectors: u16,
}

/// A function of the host, passed through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VfioPlan {
    /// Where it is on the host.
    pub host: Sbdf,
    /// The inherited descriptor of its VFIO device, where that was opened by whoever starts the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
}

/// What to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootPlan {
    /// The kernel image.
    pub kernel: PathBuf,
    /// How it is started.
    pub protocol: BootProtocol,
    /// The initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Further modules, for multiboot: the file and its command line.
    pub modules: Vec<BootModule>,
    /// The kernel's command line; `None` asks for the default one.
    pub cmdline: Option<String>,
}

/// How a kernel is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// Whatever the image offers: bzImage, then PVH, then 64-bit ELF, then multiboot.
    Auto,
    /// Linux's 64-bit protocol: a bzImage or an ELF vmlinux.
    Linux,
    /// The PVH entry of an ELF image.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

/// A file that a multiboot or PVH kernel finds in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootModule {
    /// The file.
    pub path: PathBuf,
    /// The string that goes with it.
    pub cmdline: String,
}

/// What else sits on the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BoardPlan {
    /// An HPET with legacy replacement, for guests that want a timer behind the IOAPIC.
    pub hpet: bool,
    /// The port at 0x501 by which a test image ends the machine.
    pub exit_port: bool,
    /// The port at 0x505 by which a guest says that it panicked.
    pub pvpanic: bool,
    /// What a reset asked for by the guest does.
    pub on_reboot: OnReboot,
}

/// What a reset asked for by the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The machine starts again.
    Restart,
    /// The machine ends, as after a shutdown.
    Exit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_as_wide_as_their_largest_number_needs() {
        let widths = [1, 2, 3, 4, 5, 8, 9, 1024].map(field_bits);
        assert_eq!(widths, [0, 1, 2, 2, 3, 3, 4, 10]);
    }

    #[test]
    fn cpu_sets_are_written_as_the_kernel_writes_them() {
        let set = CpuSet::new([9, 0, 1, 2, 4, 8]).expect("not empty");
        assert_eq!(set.to_string(), "0-2,4,8-9");
        assert_eq!(CpuSet::new([]), None);
    }
}
