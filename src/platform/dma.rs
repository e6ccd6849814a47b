//! How a device reaches guest memory, and as whom.
//!
//! A device holds a [`Dma`] for its function and asks it for a [`DmaView`] at each piece of work. The view is
//! what vm-memory calls `GuestMemory`, so virtqueues run on it unchanged, whether or not something
//! translates. Nothing outlives a view: a device never keeps a translated address or a slice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Permissions, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap};

use super::addr::{Bdf, Sbdf};
use super::memory::GuestRam;

/// Who issues a function's requests: its present segment, bus, device and function, and whether it may
/// issue any.
///
/// The guest renumbers buses and sets Bus Master Enable while devices run; they resolve this at use and
/// never store the numbers.
#[derive(Debug, Default)]
pub struct Requester {
    /// Segment in the upper half, requester ID in the lower.
    id: AtomicU32,
    bus_master: AtomicBool,
}

impl Requester {
    /// A requester at `at` that may not issue requests yet.
    #[must_use]
    pub fn new(at: Sbdf) -> Self {
        let requester = Self::default();
        requester.renumber(at);
        requester
    }

    /// Its present address.
    #[must_use]
    pub fn sbdf(&self) -> Sbdf {
        let [s1, s0, b1, b0] = self.id.load(Ordering::Acquire).to_be_bytes();
        Sbdf {
            segment: u16::from_be_bytes([s1, s0]),
            bdf: Bdf::from_requester_id(u16::from_be_bytes([b1, b0])),
        }
    }

    /// The guest renumbered the bus above.
    pub fn renumber(&self, at: Sbdf) {
        self.id.store(
            u32::from(at.segment) << 16 | u32::from(at.bdf.requester_id()),
            Ordering::Release,
        );
    }

    /// Whether the function may issue memory requests and messages (Command register, bit 2).
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }

    /// The guest wrote Bus Master Enable.
    pub fn set_bus_master(&self, enabled: bool) {
        self.bus_master.store(enabled, Ordering::Release);
    }
}

/// A function's way to guest memory. Cloning shares it.
#[derive(Clone)]
pub struct Dma {
    requester: Arc<Requester>,
    ram: GuestRam,
}

impl Dma {
    /// Requests of `requester` reach `ram` untranslated.
    #[must_use]
    pub fn new(requester: Arc<Requester>, ram: GuestRam) -> Self {
        Self { requester, ram }
    }

    /// Memory as the function sees it now. Take one per piece of work and drop it soon: what changes
    /// translations waits for it.
    #[must_use]
    pub fn view(&self) -> DmaView<'_> {
        DmaView {
            ram: &self.ram,
            open: self.requester.bus_master(),
        }
    }
}

/// Memory as one function sees it for the length of one piece of work.
///
/// Accesses to anything but RAM fail, the function's own and other devices' registers included: a request
/// of an emulated device never re-enters a device.
pub struct DmaView<'a> {
    ram: &'a GuestRam,
    open: bool,
}

impl GuestMemory for DmaView<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.open && GuestMemoryBackend::check_range(self.ram.backend(), addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        if !self.open {
            return Err(Error::InvalidGuestAddress(addr));
        }
        Ok(GuestMemoryBackend::get_slices(self.ram.backend(), addr, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn device() -> (Arc<Requester>, Dma) {
        let requester = Arc::new(Requester::default());
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
        (requester.clone(), Dma::new(requester, GuestRam::new(ram)))
    }

    #[test]
    fn without_bus_master_nothing_is_reached() {
        let (requester, dma) = device();
        assert!(dma.view().read_obj::<u32>(GuestAddress(0)).is_err());
        assert!(dma.view().write_obj(1_u32, GuestAddress(0)).is_err());
        requester.set_bus_master(true);
        dma.view().write_obj(7_u32, GuestAddress(8)).expect("enabled");
        assert_eq!(dma.view().read_obj::<u32>(GuestAddress(8)).expect("enabled"), 7);
    }

    #[test]
    fn requests_outside_ram_fail() {
        let (requester, dma) = device();
        requester.set_bus_master(true);
        for at in [0x1000, 0xffd, 0xfee0_0000, u64::MAX] {
            assert!(dma.view().write_obj(1_u32, GuestAddress(at)).is_err(), "{at:#x}");
        }
    }

    #[test]
    fn a_requester_answers_with_its_present_number() {
        let requester = Requester::new(Sbdf {
            segment: 3,
            bdf: Bdf::new(1, 2, 3).expect("valid"),
        });
        assert_eq!(requester.sbdf().to_string(), "0003:01:02.3");
        requester.renumber(Sbdf {
            segment: 3,
            bdf: Bdf::new(0xff, 31, 7).expect("valid"),
        });
        assert_eq!(requester.sbdf().to_string(), "0003:ff:1f.7");
    }
}
