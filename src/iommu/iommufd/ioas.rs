//! Guest RAM as an I/O address space: every byte at the address where the guest has it.
//!
//! Memory of devices may be beside it ([`Ioas::share`]).

use std::ops::RangeInclusive;
use std::sync::Arc;

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::Requests;
use super::shared::Sharing;
use crate::platform::addr::GpaRange;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

/// An I/O address space of the host's with guest RAM in it, once [`Ioas::map_ram`] was called.
///
/// Dropping it unmaps and destroys it; what was attached to it is detached before that.
pub struct Ioas {
    pub(super) requests: Arc<dyn Requests>,
    pub(super) id: u32,
    /// What is mapped; it lives for as long as devices may reach it.
    ram: GuestRam,
    pub(super) sharing: Sharing,
}

impl Ioas {
    /// An address space for `ram`, with nothing mapped yet.
    pub fn new(requests: Arc<dyn Requests>, ram: GuestRam) -> Result<Self, HostError> {
        let id = requests
            .alloc()
            .map_err(|source| HostError::new("make an I/O address space for guest RAM", source))?;
        Ok(Self {
            requests,
            id,
            ram,
            sharing: Sharing::default(),
        })
    }

    /// The host it is of.
    #[must_use]
    pub fn requests(&self) -> &Arc<dyn Requests> {
        &self.requests
    }

    /// Its number, for what is attached to it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The addresses that may be mapped for the devices that are attached now.
    ///
    /// # Errors
    /// When the host does not tell.
    pub fn windows(&self) -> Result<Vec<RangeInclusive<u64>>, HostError> {
        self.requests
            .windows(self.id)
            .map_err(|source| HostError::new("ask the host which addresses its devices can reach", source))
    }

    /// Map all of guest RAM, for the devices that are attached now.
    ///
    /// Every page is pinned from here on. The devices come first, since each narrows what may be mapped.
    ///
    /// # Errors
    /// When the host reserves addresses where the guest has RAM, when more memory would be locked than may be, or
    /// for what else the host refuses. Nothing is mapped then that devices could use: the address space goes.
    pub fn map_ram(&self, limit: Memlock) -> Result<(), HostError> {
        let windows = self.windows()?;
        let mut below = 0;
        for range in self.ram.ranges() {
            inside(range, below, &windows)?;
            below += range.len();
        }
        limit.allows(self.ram.size())?;
        for (index, range) in self.ram.ranges().enumerate() {
            self.requests.map(self.id, &self.ram, index).map_err(|source| {
                let hint = match source.raw_os_error() {
                    Some(libc::ENOMEM) => limit.hint(self.ram.size()),
                    Some(libc::ENOSPC) => "; a container takes as many mappings as dma_entry_limit of the module \
                                           vfio_iommu_type1 says, and each range of guest RAM is one; /dev/iommu has no such limit"
                        .to_owned(),
                    _ => String::new(),
                };
                HostError::new(format!("map guest RAM at {range} for devices{hint}"), source)
            })?;
        }
        tracing::info!(
            mebibytes = self.ram.size() >> 20,
            "guest RAM is mapped for devices of the host, and pinned"
        );
        Ok(())
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        // Mappings go with the address space. One that is still in use cannot be destroyed; the kernel does that when
        // the process ends, and until then RAM stays pinned: devices never reach memory that has been given back.
        if let Err(error) = self.requests.destroy(self.id) {
            tracing::error!(ioas = self.id, %error, "cannot destroy an I/O address space; it stays until this process ends");
        }
    }
}

/// Whether the host lets devices use all of `range`, below which guest RAM has `below` bytes.
fn inside(range: GpaRange, below: u64, windows: &[RangeInclusive<u64>]) -> Result<(), HostError> {
    let (first, last) = (range.start().0, range.last().0);
    let begins = windows.iter().find(|window| window.contains(&first));
    if begins.is_some_and(|window| window.contains(&last)) {
        return Ok(());
    }
    let listed: Vec<_> = windows
        .iter()
        .map(|window| format!("{:#x}-{:#x}", window.start(), window.end()))
        .collect();
    let reason = format!("devices can use {}", listed.join(", "));
    // RAM grows upwards, so that less of it ends before what is reserved.
    let most = below + begins.map_or(0, |window| window.end() - first + 1);
    let less = match most >> 20 {
        0 => String::new(),
        mebibytes => format!("; memory.size={mebibytes}M is the most that ends before it"),
    };
    Err(HostError::new(
        format!(
            "give devices guest RAM at {range}: the host reserves a part of that (see reserved_regions of their IOMMU \
             groups in /sys/kernel/iommu_groups){less}"
        ),
        std::io::Error::other(reason),
    ))
}

/// How much memory this process may lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memlock {
    /// Bytes; `None` for any amount.
    pub limit: Option<u64>,
}

impl Memlock {
    /// What holds for this process: RLIMIT_MEMLOCK, unless it has CAP_IPC_LOCK.
    #[must_use]
    pub fn here() -> Self {
        let exempt = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
        let limit = getrlimit(Resource::Memlock).current;
        Self {
            limit: limit.filter(|_| !exempt),
        }
    }

    /// Whether `need` bytes may be locked.
    fn allows(self, need: u64) -> Result<(), HostError> {
        match self.limit {
            Some(limit) if limit < need => Err(HostError::new(
                format!("pin {} KiB of guest RAM{}", need >> 10, self.hint(need)),
                std::io::Error::from_raw_os_error(libc::ENOMEM),
            )),
            _ => Ok(()),
        }
    }

    /// How to raise it to `need`.
    fn hint(self, need: u64) -> String {
        let kibibytes = need.div_ceil(1024);
        self.limit.map_or(String::new(), |limit| {
            format!(
                ": this process may lock {} KiB; `ulimit -l {kibibytes}` in the shell that starts it raises that, or \
                 LimitMEMLOCK={kibibytes}K in a systemd unit, or the capability CAP_IPC_LOCK",
                limit >> 10
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommu::iommufd::testing::{Call, Host};
    use crate::platform::addr::Gpa;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const MIB: u64 = 1 << 20;
    const ANY: Memlock = Memlock { limit: None };

    fn ram() -> GuestRam {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 2 << 20)];
        GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("a few MiB"))
    }

    #[test]
    fn every_range_of_ram_is_mapped_where_the_guest_has_it_and_goes_with_the_space() {
        let host = Host::new();
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        ioas.map_ram(ANY).expect("mapped");
        let id = ioas.id();
        assert_eq!(host.mapped(id), [(0, MIB), (1 << 32, 2 * MIB)]);
        drop(ioas);
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn an_address_space_the_host_refuses_says_what_it_was_for() {
        let host = Host::new();
        host.refuse(Call::Alloc, libc::ENOMEM);
        let error = Ioas::new(host, ram()).err().expect("refused");
        assert_eq!(
            error.to_string(),
            "cannot make an I/O address space for guest RAM"
        );
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOMEM));
    }

    #[test]
    fn ram_in_a_reserved_window_is_refused_with_the_windows_and_nothing_is_mapped() {
        let host = Host::new();
        host.set_windows(&[0..=0x7_ffff, 0x10_0000..=u64::MAX]);
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        let error = ioas.map_ram(ANY).expect_err("reserved");
        assert!(
            error.to_string().contains("00000000-000fffff: the host reserves"),
            "{error}"
        );
        assert!(
            error
                .source
                .to_string()
                .contains("0x0-0x7ffff, 0x100000-0xffffffffffffffff")
        );
        assert!(host.mapped(ioas.id()).is_empty());
    }

    #[test]
    fn ram_in_a_reserved_window_is_refused_with_the_most_that_is_not() {
        let refused = |first: u64, len: u64, below: u64, windows: &[RangeInclusive<u64>]| {
            let range = GpaRange::new(Gpa(first), len).expect("valid");
            inside(range, below, windows).expect_err("reserved").to_string()
        };
        let split = [0..=12 * MIB - 1, 16 * MIB..=(1 << 39) - 1];
        let text = refused(0, 64 * MIB, 0, &split);
        assert!(
            text.ends_with("; memory.size=12M is the most that ends before it"),
            "{text}"
        );
        // RAM above 4 GiB that a host with 39 bits does not reach.
        let text = refused(1 << 32, 1 << 39, 3 << 30, &split);
        let most = (3_u64 << 10) + (508 << 10);
        assert!(text.contains(&format!("memory.size={most}M is")), "{text}");
        // None of it, and nothing below.
        assert!(!refused(12 * MIB, MIB, 0, &split).contains("memory.size"));
    }

    #[test]
    fn windows_the_host_does_not_tell_are_no_permission() {
        let host = Host::new();
        host.refuse(Call::Windows, libc::EINVAL);
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        let error = ioas.map_ram(ANY).expect_err("refused");
        assert_eq!(
            error.to_string(),
            "cannot ask the host which addresses its devices can reach"
        );
        assert!(host.mapped(ioas.id()).is_empty());
    }

    #[test]
    fn more_ram_than_may_be_locked_is_refused_with_the_command_that_raises_the_limit() {
        let host = Host::new();
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        let limit = Memlock {
            limit: Some(3 * MIB - 1),
        };
        let error = ioas.map_ram(limit).expect_err("too much");
        let text = error.to_string();
        assert!(
            text.contains("this process may lock 3071 KiB; `ulimit -l 3072`"),
            "{text}"
        );
        assert!(host.mapped(ioas.id()).is_empty());
        let enough = Memlock { limit: Some(3 * MIB) };
        ioas.map_ram(enough).expect("just enough");
    }

    #[test]
    fn a_mapping_the_host_refuses_names_the_range_and_leaves_no_space_behind() {
        let host = Host::new();
        host.refuse(Call::Map, libc::ENOMEM);
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        let limit = Memlock { limit: Some(8 * MIB) };
        let error = ioas.map_ram(limit).expect_err("refused");
        let text = error.to_string();
        assert!(
            text.starts_with("cannot map guest RAM at 00000000-000fffff for devices: this process"),
            "{text}"
        );
        drop(ioas);
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn a_container_that_takes_no_more_mappings_is_told_with_the_parameter_that_says_how_many() {
        let host = Host::new();
        host.refuse_once(Call::Map, 1, libc::ENOSPC);
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        let text = ioas.map_ram(ANY).expect_err("refused").to_string();
        assert!(
            text.starts_with(
                "cannot map guest RAM at 100000000-1001fffff for devices; a container takes as many"
            ),
            "{text}"
        );
        assert!(
            text.contains("dma_entry_limit of the module vfio_iommu_type1"),
            "{text}"
        );
        drop(ioas);
        assert!(host.spaces().is_empty());
    }

    #[test]
    fn a_space_that_cannot_be_destroyed_is_no_panic() {
        let host = Host::new();
        let ioas = Ioas::new(host.clone(), ram()).expect("made");
        host.refuse(Call::Destroy, libc::EBUSY);
        drop(ioas);
        assert_eq!(host.spaces().len(), 1);
    }

    #[test]
    fn a_range_is_inside_one_window_or_outside() {
        let range = GpaRange::new(Gpa(0x1000), 0x2000).expect("valid");
        assert!(inside(range, 0, &[0x1000..=0x2fff]).is_ok());
        assert!(inside(range, 0, &[0x1000..=0x1fff, 0x2000..=0x2fff]).is_err());
        assert!(inside(range, 0, &[]).is_err());
    }
}
