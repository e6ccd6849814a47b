//! Allocating guest RAM: from what, with which pages, on which NUMA node.

use std::fs::File;
use std::io;

use rustix::fs::MemfdFlags;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::addr::GpaRange;
use super::host::HostError;
use super::memory::GuestRam;
use super::mmap::{self, KeepingAdvice};

/// What backs guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd that other processes may be given.
    Shared,
    /// Huge pages of the host's pool.
    Huge(HugePage),
}

/// Sizes of huge pages an x86 host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePage {
    /// Size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Mib2 => 2 << 20,
            Self::Gib1 => 1 << 30,
        }
    }
}

/// How guest RAM is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RamOptions {
    /// What it is made of.
    pub backing: Backing,
    /// Ask for transparent huge pages; no effect on pages of the host's pool, which are huge anyway.
    pub transparent_huge_pages: bool,
    /// Touch every page now rather than when the guest does. Pages of the host's pool always are, since a
    /// shortage would otherwise end the process in the middle of the guest's run.
    pub prefault: bool,
    /// Take pages from this host NUMA node only.
    pub host_numa_node: Option<u32>,
}

/// Allocate RAM at `ranges`, which are ascending, page-aligned and do not overlap.
///
/// # Errors
/// What the host refused, with the range and what it was to be made of.
pub fn allocate(ranges: &[GpaRange], options: &RamOptions) -> Result<GuestRam, HostError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for range in ranges {
        let region = region(*range, options).map_err(|source| {
            let what = match options.backing {
                Backing::Anonymous => "anonymous memory",
                Backing::Shared => "a memfd",
                Backing::Huge(HugePage::Mib2) => "2 MiB pages; see /proc/sys/vm/nr_hugepages",
                Backing::Huge(HugePage::Gib1) => {
                    "1 GiB pages; see /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
                }
            };
            let size = range.len() >> 20;
            let node = options
                .host_numa_node
                .map(|node| format!(" on host NUMA node {node}"));
            let node = node.unwrap_or_default();
            HostError::new(
                format!("allocate {size} MiB of guest RAM at {range}{node} from {what}"),
                source,
            )
        })?;
        regions.push(region);
    }
    let regions =
        GuestMemoryMmap::from_regions(regions).expect("a plan's RAM ranges ascend and do not overlap");
    Ok(GuestRam::new(regions))
}

fn region(range: GpaRange, options: &RamOptions) -> io::Result<GuestRegionMmap<()>> {
    let size = usize::try_from(range.len()).map_err(io::Error::other)?;
    let file = match options.backing {
        Backing::Anonymous => None,
        Backing::Shared => Some(memfd(range, MemfdFlags::empty())?),
        Backing::Huge(HugePage::Mib2) => Some(memfd(range, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?),
        Backing::Huge(HugePage::Gib1) => Some(memfd(range, MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB)?),
    };
    let region = GuestRegionMmap::from_range(
        GuestAddress(range.start().0),
        size,
        file.map(|file| FileOffset::new(file, 0)),
    )
    .map_err(io::Error::other)?;
    let huge = matches!(options.backing, Backing::Huge(_));
    // The node before the pages: pages that exist are not moved.
    if let Some(node) = options.host_numa_node {
        mmap::bind_to_node(&region, node)?;
    }
    if options.transparent_huge_pages && !huge {
        mmap::advise(&region, KeepingAdvice::HugePages)?;
    }
    if options.prefault || huge {
        mmap::advise(&region, KeepingAdvice::Populate)?;
    }
    Ok(region)
}

/// A file of memory as long as `range`.
fn memfd(range: GpaRange, flags: MemfdFlags) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create(
        "guest-ram",
        flags | MemfdFlags::CLOEXEC,
    )?);
    file.set_len(range.len())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::addr::Gpa;

    const TWO: [(u64, u64); 2] = [(0, 4 << 20), (1 << 32, 2 << 20)];

    fn ranges() -> Vec<GpaRange> {
        let valid = |(start, len)| GpaRange::new(Gpa(start), len).expect("valid");
        TWO.into_iter().map(valid).collect()
    }

    fn holds_what_is_written(options: &RamOptions) {
        let ram = allocate(&ranges(), options).expect("a few MiB");
        assert_eq!(ram.ranges().collect::<Vec<_>>(), ranges());
        ram.write_obj(Gpa((1 << 32) + 0x1000), &7_u64).expect("inside");
        assert_eq!(ram.read_obj::<u64>(Gpa((1 << 32) + 0x1000)), Ok(7));
        assert_eq!(ram.read_obj::<u64>(Gpa(0)), Ok(0));
    }

    #[test]
    fn anonymous_ram_holds_what_is_written() {
        holds_what_is_written(&RamOptions::default());
    }

    #[test]
    fn shared_prefaulted_ram_holds_what_is_written() {
        holds_what_is_written(&RamOptions {
            backing: Backing::Shared,
            prefault: true,
            ..RamOptions::default()
        });
    }

    #[test]
    fn ram_from_a_node_that_does_not_exist_is_refused_by_number() {
        let options = RamOptions {
            host_numa_node: Some(1000),
            ..RamOptions::default()
        };
        let error = allocate(&ranges(), &options).err().expect("no such node");
        assert_eq!(
            error.to_string(),
            "cannot allocate 4 MiB of guest RAM at 00000000-003fffff on host NUMA node 1000 from anonymous memory"
        );
    }

    #[test]
    fn huge_pages_the_host_does_not_have_are_refused_at_start() {
        let options = RamOptions {
            backing: Backing::Huge(HugePage::Gib1),
            ..RamOptions::default()
        };
        // More than any pool has.
        let absurd = [GpaRange::new(Gpa(0), 1 << 46).expect("valid")];
        let error = allocate(&absurd, &options).err().expect("no pool is that large");
        assert!(error.to_string().contains("1 GiB pages"), "{error}");
    }
}
