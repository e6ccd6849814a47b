//! A function of the host by an open VFIO device: its node, bound to /dev/iommu, or what its group gave out.
//!
//! Documentation/driver-api/vfio.rst, "VFIO Device cdev" and "Group".

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio as abi;
use vmm_sys_util::eventfd::EventFd;

use super::group::Group;
use super::host::{
    Companion, Fewer, HostFunction, Interrupt, InterruptInfo, Notice, PAGE, Region, RegionInfo,
};
use super::hot_reset;
use super::peers::not_exported;
use super::uapi::{self, Request};
use crate::iommu::container::{capability, wide};
use crate::iommu::iommufd::{Attach, Iommufd};
use crate::platform::addr::Sbdf;
use crate::platform::device_memory::DeviceMemory;
use crate::platform::host::HostError;

/// Words of a region's structure without capabilities.
const REGION_WORDS: usize = 8;
/// The most words of one with capabilities: a few dozen mappable stretches.
const MOST_REGION_WORDS: usize = 1024;

/// An open VFIO device.
pub struct Cdev {
    device: File,
    /// By register, then configuration space.
    regions: [Place; 7],
    /// INTx, MSI, MSI-X.
    interrupts: [InterruptInfo; 3],
    resets: bool,
    way: Way,
}

/// How a device's requests get to memory. It is closed after the device.
enum Way {
    /// By /dev/iommu.
    Iommufd {
        /// What the binding calls the function.
        id: u32,
        _iommufd: Arc<Iommufd>,
    },
    /// By the container that its group is in.
    Group { group: Arc<Group> },
}

/// Where a region is in the node, and what it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Place {
    offset: u64,
    info: RegionInfo,
}

impl Cdev {
    /// Open `node`, the node of the function at `at`, and bind it to `iommufd`. Its requests reach nothing yet.
    ///
    /// # Errors
    /// What the host refused: the node, the binding, or what the function is.
    pub fn open(at: Sbdf, node: &Path, iommufd: &Arc<Iommufd>) -> Result<Self, HostError> {
        let device = File::options().read(true).write(true).open(node);
        let device = device.map_err(|source| {
            let what = match source.kind() {
                io::ErrorKind::PermissionDenied => "; it belongs to root unless a udev rule says otherwise",
                io::ErrorKind::ResourceBusy => "; another process has the function",
                _ => "",
            };
            HostError::new(format!("open {} of {at}{what}", node.display()), source)
        })?;
        Self::of_descriptor(at, device, iommufd)
    }

    /// Bind `device`, the open node of the function at `at`, to `iommufd`. Its requests reach nothing yet.
    ///
    /// # Errors
    /// What the host refused: the binding, or what the function is.
    pub fn of_descriptor(at: Sbdf, device: File, iommufd: &Arc<Iommufd>) -> Result<Self, HostError> {
        let id = bind(&device, iommufd).map_err(|source| {
            let what = match source.raw_os_error() {
                Some(libc::EPERM) => {
                    "; does the host remap interrupts? Where it cannot, and whoever uses the guest is trusted, \
                     iommufd.allow_unsafe_interrupts=1 lets it"
                }
                Some(libc::EBUSY | libc::EINVAL) => {
                    "; another process may have it, or another function of its IOMMU group"
                }
                _ => "",
            };
            HostError::new(format!("bind {at} to /dev/iommu{what}"), source)
        })?;
        let iommufd = iommufd.clone();
        let way = Way::Iommufd {
            id,
            _iommufd: iommufd,
        };
        Self::described(at, device, way)
    }

    /// Open the function at `at` of `group`. Its requests reach what the group's container has.
    ///
    /// # Errors
    /// What the host refused: the function, or what it is.
    pub fn of_group(at: Sbdf, group: &Arc<Group>) -> Result<Self, HostError> {
        let device = group.device(at)?;
        let group = group.clone();
        Self::described(at, device, Way::Group { group })
    }

    /// Whether the host's kernel hands out memory of the function as dma-bufs (VFIO_DEVICE_FEATURE_DMA_BUF), by which other
    /// functions of a guest reach it; else why not. Nothing is handed out. Whether /dev/iommu maps what is, only mapping it tells.
    ///
    /// # Errors
    /// Why it does not.
    pub fn exports(&self) -> Result<(), String> {
        exports(&self.device)
    }

    /// What the host says of `device`, the open function at `at`.
    fn described(at: Sbdf, device: File, way: Way) -> Result<Self, HostError> {
        let mut info = [0; 6];
        uapi::issue(&device, Request::GetInfo, &mut info)
            .map_err(|source| HostError::new(format!("ask what {at} is"), source))?;
        let [_, flags, regions, interrupts, ..] = info;
        let few = regions <= abi::VFIO_PCI_CONFIG_REGION_INDEX || interrupts <= abi::VFIO_PCI_MSIX_IRQ_INDEX;
        if flags & abi::VFIO_DEVICE_FLAGS_PCI == 0 || few {
            let reason = io::Error::other(format!(
                "flags {flags:#x}, {regions} regions, {interrupts} kinds of interrupt"
            ));
            return Err(HostError::new(format!("use {at} as a PCI function"), reason));
        }
        let places = [0, 1, 2, 3, 4, 5, abi::VFIO_PCI_CONFIG_REGION_INDEX];
        let kinds = [
            abi::VFIO_PCI_INTX_IRQ_INDEX,
            abi::VFIO_PCI_MSI_IRQ_INDEX,
            abi::VFIO_PCI_MSIX_IRQ_INDEX,
        ];
        let mut cdev = Self {
            device,
            regions: Default::default(),
            interrupts: Default::default(),
            resets: flags & abi::VFIO_DEVICE_FLAGS_RESET != 0,
            way,
        };
        for (place, index) in cdev.regions.iter_mut().zip(places) {
            *place = region_info(&cdev.device, index)
                .map_err(|source| HostError::new(format!("ask what region {index} of {at} is"), source))?;
        }
        for (interrupt, index) in cdev.interrupts.iter_mut().zip(kinds) {
            *interrupt = interrupt_info(&cdev.device, index).map_err(|source| {
                HostError::new(format!("ask what interrupts of kind {index} {at} has"), source)
            })?;
        }
        Ok(cdev)
    }

    fn place(&self, region: Region) -> Option<&Place> {
        match region {
            Region::Bar(index) => self.regions.get(..6)?.get(usize::from(index)),
            Region::Config => self.regions.last(),
        }
    }

    /// Where `len` bytes at `offset` of `region` are in the node.
    fn within(&self, region: Region, offset: u64, len: u64) -> io::Result<u64> {
        let place = self.place(region).ok_or(io::ErrorKind::NotFound)?;
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        if end > place.info.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        place
            .offset
            .checked_add(offset)
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn set_irqs(&self, index: u32, flags: u32, first: u32, count: usize, data: &[u32]) -> io::Result<()> {
        let count = u32::try_from(count).map_err(io::Error::other)?;
        let mut words = vec![0, flags, index, first, count];
        words.extend_from_slice(data);
        let answer = uapi::answer(&self.device, Request::SetIrqs, &mut words)?;
        all_set_up(answer, first.saturating_add(count))
    }
}

fn exports(device: &File) -> Result<(), String> {
    let asked =
        abi::VFIO_DEVICE_FEATURE_PROBE | abi::VFIO_DEVICE_FEATURE_GET | abi::VFIO_DEVICE_FEATURE_DMA_BUF;
    let probed = uapi::issue(device, Request::Feature, &mut [0, asked]);
    probed.map_err(|error| format!("{}: {error}", not_exported(&error)))
}

const fn irq_index(kind: Interrupt) -> u32 {
    match kind {
        Interrupt::Intx => abi::VFIO_PCI_INTX_IRQ_INDEX,
        Interrupt::Msi => abi::VFIO_PCI_MSI_IRQ_INDEX,
        Interrupt::Msix => abi::VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

/// Whether `answer` to a request for `asked` vectors says that they are set up: 0 does. A number says how many could be had,
/// and that none is.
fn all_set_up(answer: i32, asked: u32) -> io::Result<()> {
    match u32::try_from(answer).map_err(io::Error::other)? {
        0 => Ok(()),
        has => Err(Fewer { has, asked }.into()),
    }
}

/// Bind `device`; what the binding calls it.
fn bind(device: &File, iommufd: &Iommufd) -> io::Result<u32> {
    let number = iommufd.as_fd().as_raw_fd();
    let number = u32::try_from(number).map_err(io::Error::other)?;
    // argsz, flags, iommufd, out_devid, token (two words).
    let mut words = [0, 0, number, 0, 0, 0];
    uapi::issue(device, Request::BindIommufd, &mut words)?;
    let [_, _, _, id, ..] = words;
    Ok(id)
}

fn region_info(device: &File, index: u32) -> io::Result<Place> {
    let mut words = vec![0; REGION_WORDS];
    words[2] = index;
    uapi::issue(device, Request::GetRegionInfo, &mut words)?;
    // The kernel says how long the structure is with all its capabilities.
    let whole = usize::try_from(words[0]).unwrap_or(usize::MAX).div_ceil(4);
    if words[1] & abi::VFIO_REGION_INFO_FLAG_CAPS != 0 && (REGION_WORDS..=MOST_REGION_WORDS).contains(&whole)
    {
        words = vec![0; whole];
        words[2] = index;
        uapi::issue(device, Request::GetRegionInfo, &mut words)?;
    }
    Ok(place_of(&words))
}

/// What a filled-in structure says: argsz, flags, index, cap_offset, size, offset, and capabilities behind.
fn place_of(words: &[u32]) -> Place {
    let word = |at: usize| words.get(at).copied().unwrap_or(0);
    let (flags, size, offset) = (word(1), wide(word(4), word(5)), wide(word(6), word(7)));
    let whole = vec![(0, size & !(PAGE - 1))];
    let mappable = if flags & abi::VFIO_REGION_INFO_FLAG_MMAP == 0 {
        Vec::new()
    } else if flags & abi::VFIO_REGION_INFO_FLAG_CAPS == 0 {
        whole
    } else {
        sparse_areas(words).unwrap_or(whole)
    };
    // Nothing outside the region, and no stretch that is empty.
    let fits = |(start, len): &(u64, u64)| *len > 0 && start.checked_add(*len).is_some_and(|end| end <= size);
    let mappable = mappable.into_iter().filter(fits).collect();
    Place {
        offset,
        info: RegionInfo { size, mappable },
    }
}

/// The stretches of a sparse region, by its capability: id and version, next, count, reserved, then offset and size of
/// each. `None` where there is no such capability.
fn sparse_areas(words: &[u32]) -> Option<Vec<(u64, u64)>> {
    let found = capability(words, *words.get(3)?, abi::VFIO_REGION_INFO_CAP_SPARSE_MMAP)?;
    let count = usize::try_from(*found.get(2)?).ok()?;
    let areas = found.get(4..)?.chunks_exact(4).take(count);
    let area = |words: &[u32]| (wide(words[0], words[1]), wide(words[2], words[3]));
    Some(areas.map(area).collect())
}

fn interrupt_info(device: &File, index: u32) -> io::Result<InterruptInfo> {
    let mut words = [0, 0, index, 0];
    uapi::issue(device, Request::GetIrqInfo, &mut words)?;
    let [_, flags, _, count] = words;
    let signals = flags & abi::VFIO_IRQ_INFO_EVENTFD != 0;
    Ok(InterruptInfo {
        count: if signals { count } else { 0 },
        grows: flags & abi::VFIO_IRQ_INFO_NORESIZE == 0,
    })
}

impl HostFunction for Cdev {
    fn id(&self) -> u32 {
        match &self.way {
            Way::Iommufd { id, .. } => *id,
            Way::Group { .. } => 0,
        }
    }

    fn region(&self, region: Region) -> RegionInfo {
        self.place(region)
            .map(|place| place.info.clone())
            .unwrap_or_default()
    }

    fn interrupt(&self, kind: Interrupt) -> InterruptInfo {
        match kind {
            Interrupt::Intx => self.interrupts[0],
            Interrupt::Msi => self.interrupts[1],
            Interrupt::Msix => self.interrupts[2],
        }
    }

    fn resets(&self) -> bool {
        self.resets
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.within(region, offset, data.len() as u64)?;
        self.device.read_exact_at(data, at)
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.within(region, offset, data.len() as u64)?;
        self.device.write_all_at(data, at)
    }

    fn map(&self, region: Region, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        let at = self.within(region, offset, len)?;
        DeviceMemory::map(&self.device, at, len).map(Arc::new)
    }

    fn export(&self, region: Region, offset: u64, len: u64) -> io::Result<OwnedFd> {
        let Region::Bar(bar) = region else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.within(region, offset, len)?;
        uapi::export(&self.device, bar.into(), offset, len)
    }

    fn set_interrupts(&self, kind: Interrupt, first: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()> {
        let number = |fd: &Option<&EventFd>| fd.map_or(-1, |fd| fd.as_raw_fd()).cast_unsigned();
        let numbers: Vec<u32> = eventfds.iter().map(number).collect();
        let flags = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(irq_index(kind), flags, first, numbers.len(), &numbers)
    }

    fn disable_interrupts(&self, kind: Interrupt) -> io::Result<()> {
        let flags = abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(irq_index(kind), flags, 0, 0, &[])
    }

    fn unmask_intx(&self) -> io::Result<()> {
        let flags = abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_irqs(irq_index(Interrupt::Intx), flags, 0, 1, &[])
    }

    fn notify(&self, notice: Notice, eventfd: &EventFd) -> io::Result<()> {
        let index = match notice {
            Notice::Error => abi::VFIO_PCI_ERR_IRQ_INDEX,
            Notice::Wanted => abi::VFIO_PCI_REQ_IRQ_INDEX,
        };
        let flags = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(index, flags, 0, 1, &[eventfd.as_raw_fd().cast_unsigned()])
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }

    fn reset(&self) -> io::Result<()> {
        uapi::reset(&self.device)
    }

    fn companions(&self) -> io::Result<Vec<Companion>> {
        match &self.way {
            Way::Iommufd { .. } => hot_reset::companions(&self.device),
            Way::Group { group } => hot_reset::companions_by_groups(&self.device, group.groups()),
        }
    }

    fn hot_reset(&self) -> io::Result<()> {
        match &self.way {
            Way::Iommufd { .. } => hot_reset::reset(&self.device),
            Way::Group { group } => hot_reset::reset_by_groups(&self.device, group.groups()),
        }
    }
}

impl Attach for Cdev {
    fn attach(&self, ioas: u32) -> io::Result<()> {
        match &self.way {
            Way::Iommufd { .. } => uapi::issue(&self.device, Request::AttachIommufd, &mut [0, 0, ioas]),
            // It is, from when it was opened, and to nothing else.
            Way::Group { .. } => Ok(()),
        }
    }

    fn detach(&self) -> io::Result<()> {
        match &self.way {
            Way::Iommufd { .. } => uapi::issue(&self.device, Request::DetachIommufd, &mut [0, 0]),
            // When the last function of the group is closed.
            Way::Group { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MMAP: u32 = abi::VFIO_REGION_INFO_FLAG_MMAP;
    const CAPS: u32 = abi::VFIO_REGION_INFO_FLAG_CAPS;

    fn region(flags: u32, size: u32, capabilities: &[u32]) -> Place {
        let mut words = vec![0, flags, 0, 32, size, 0, 0x10_0000, 0];
        words.extend_from_slice(capabilities);
        place_of(&words)
    }

    #[test]
    fn an_answer_that_counts_vectors_is_a_refusal_that_names_them() {
        assert!(all_set_up(0, 4).is_ok());
        let refused = all_set_up(1, 4).expect_err("fewer");
        assert_eq!(Fewer::of(&refused), Some(Fewer { has: 1, asked: 4 }));
        assert_eq!(refused.to_string(), "the host has 1 to give of 4 vectors");
        assert_eq!(Fewer::of(&io::Error::from_raw_os_error(libc::ENOSPC)), None);
    }

    #[test]
    fn what_does_not_know_of_dma_bufs_exports_none_and_says_why() {
        let file = tempfile::tempfile().expect("a file");
        let why = exports(&file).expect_err("no device");
        assert!(
            why.starts_with("the host's kernel has no VFIO_DEVICE_FEATURE_DMA_BUF: "),
            "{why}"
        );
    }

    #[test]
    fn a_region_that_may_be_mapped_is_so_as_a_whole() {
        let place = region(MMAP, 0x2_0000, &[]);
        assert_eq!(
            (place.offset, place.info.mappable),
            (0x10_0000, vec![(0, 0x2_0000)])
        );
        assert_eq!(region(MMAP, 0x80, &[]).info.mappable, []);
        assert_eq!(region(0, 0x2_0000, &[]).info.mappable, []);
    }

    #[test]
    fn a_sparse_region_is_mapped_in_its_stretches_only() {
        // Another capability first, whose version is 1 and which leads to the second.
        let areas = [
            0x1_0003, 40, 0x1_0001, 0, 2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x5000, 0,
        ];
        let place = region(MMAP | CAPS, 0x8000, &areas);
        assert_eq!(place.info.mappable, [(0, 0x1000), (0x3000, 0x5000)]);
    }

    #[test]
    fn stretches_outside_the_region_are_left_out() {
        let areas = [
            0x1_0001,
            0,
            3,
            0,
            0x7000,
            0,
            0x2000,
            0,
            0,
            0,
            0,
            0,
            u32::MAX,
            u32::MAX,
            0x1000,
            0,
        ];
        assert_eq!(region(MMAP | CAPS, 0x8000, &areas).info.mappable, []);
    }

    #[test]
    fn a_chain_of_capabilities_that_goes_back_or_out_ends() {
        assert_eq!(
            region(MMAP | CAPS, 0x1000, &[0x1_0003, 32]).info.mappable,
            [(0, 0x1000)]
        );
        assert_eq!(
            region(MMAP | CAPS, 0x1000, &[0x1_0003, 4000]).info.mappable,
            [(0, 0x1000)]
        );
        assert_eq!(region(MMAP | CAPS, 0x1000, &[]).info.mappable, [(0, 0x1000)]);
    }
}
