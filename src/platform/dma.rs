//! How a device reaches guest memory, and as whom.
//!
//! A device holds a [`Dma`] for its function and asks it for a [`DmaView`] at each piece of work. The view is
//! what vm-memory calls `GuestMemory`, so virtqueues run on it unchanged, whether or not something
//! translates. Nothing outlives a view: a device never keeps a translated address or a slice.

use std::iter::FusedIterator;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vm_memory::guest_memory::{
    Error, GuestMemoryBackendSliceIterator, GuestMemorySliceIterator, Permissions, Result,
};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::addr::{Bdf, Gpa, Iova, Sbdf};
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
    prefixes_blocked: AtomicBool,
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

    /// Whether requests with an End-End TLP prefix, as PASIDs are, are stopped on their way to the root complex (PCI
    /// Express Base Specification 2.2.10.4).
    #[must_use]
    pub fn prefixes_blocked(&self) -> bool {
        self.prefixes_blocked.load(Ordering::Acquire)
    }

    /// A switch on the way stops such requests from now on, or none does.
    pub fn block_prefixes(&self, blocked: bool) {
        self.prefixes_blocked.store(blocked, Ordering::Release);
    }
}

/// What stands between functions and memory and decides where their requests go: an IOMMU.
pub trait Translator: Send + Sync {
    /// Requests in flight until the result is dropped: what they are told stays true that long, and whoever
    /// changes translations waits for them.
    fn begin(&self) -> Box<dyn Translations + '_>;
}

/// Requests in flight through a [`Translator`].
pub trait Translations {
    /// Where byte `at` of the address space of `requester` lies, and how far that holds; `None` when it may not
    /// be accessed so. The refusal has been reported to the guest then, as far as it wants to know.
    fn translate(&self, requester: Bdf, at: Iova, access: Permissions) -> Option<Run>;
}

/// A stretch of physical addresses that follow one another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first of them.
    pub target: Gpa,
    /// How many bytes, at least 1.
    pub len: u64,
}

/// A function's way to guest memory. Cloning shares it.
#[derive(Clone)]
pub struct Dma {
    requester: Arc<Requester>,
    ram: GuestRam,
    translator: Option<Arc<dyn Translator>>,
}

impl Dma {
    /// Requests of `requester` reach `ram` untranslated.
    #[must_use]
    pub fn new(requester: Arc<Requester>, ram: GuestRam) -> Self {
        Self {
            requester,
            ram,
            translator: None,
        }
    }

    /// Requests of `requester` reach `ram` where `translator` says.
    #[must_use]
    pub fn translated(requester: Arc<Requester>, ram: GuestRam, translator: Arc<dyn Translator>) -> Self {
        Self {
            translator: Some(translator),
            ..Self::new(requester, ram)
        }
    }

    /// Memory as the function sees it now. Take one per piece of work and drop it soon: what changes
    /// translations waits for it.
    #[must_use]
    pub fn view(&self) -> DmaView<'_> {
        let way = match &self.translator {
            _ if !self.requester.bus_master() => Way::Closed,
            None => Way::Plain,
            Some(translator) => Way::Translated {
                requester: self.requester.sbdf().bdf,
                translations: translator.begin(),
            },
        };
        DmaView { ram: &self.ram, way }
    }
}

/// Memory as one function sees it for the length of one piece of work.
///
/// Accesses to anything but RAM fail, the function's own and other devices' registers included: a request
/// of an emulated device never re-enters a device.
pub struct DmaView<'a> {
    ram: &'a GuestRam,
    way: Way<'a>,
}

enum Way<'a> {
    /// The function may issue no requests.
    Closed,
    /// Addresses are physical.
    Plain,
    /// Addresses are `requester`'s own.
    Translated {
        requester: Bdf,
        translations: Box<dyn Translations + 'a>,
    },
}

/// The most stretches of memory that one translated access falls into: 64 MiB of single pages. A guest can
/// map every page of 4 GiB to the same one; what describes them stays small.
const MOST_PIECES: usize = 16_384;

impl DmaView<'_> {
    /// All of `count` bytes at `addr`, in stretches: every page is asked for before the first is touched.
    fn pieces(
        &self,
        requester: Bdf,
        translations: &dyn Translations,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<Pieces<'_>> {
        let mut pieces = Pieces::default();
        let mut at = addr.0;
        let mut left = count as u64;
        let mut run: Option<Run> = None;
        while left > 0 {
            let found = translations
                .translate(requester, Iova(at), access)
                .ok_or(Error::InvalidGuestAddress(GuestAddress(at)))?;
            let len = found.len.min(left);
            run = match run {
                Some(open) if open.target.0.checked_add(open.len) == Some(found.target.0) => Some(Run {
                    len: open.len + len,
                    ..open
                }),
                other => {
                    other.map_or(Ok(()), |done| pieces.add(self.ram, done))?;
                    Some(Run { len, ..found })
                }
            };
            left -= len;
            // The last byte may be the last of all.
            at = match at.checked_add(len) {
                Some(next) => next,
                None if left == 0 => at,
                None => return Err(Error::GuestAddressOverflow),
            };
        }
        run.map_or(Ok(()), |done| pieces.add(self.ram, done))?;
        Ok(pieces)
    }
}

/// Stretches of RAM in order; the first has a place of its own, since mostly there is no other.
#[derive(Default)]
struct Pieces<'a> {
    first: Option<VolatileSlice<'a>>,
    rest: Vec<VolatileSlice<'a>>,
}

impl<'a> Pieces<'a> {
    fn add(&mut self, ram: &'a GuestRam, run: Run) -> Result<()> {
        let len = usize::try_from(run.len).map_err(|_| Error::GuestAddressOverflow)?;
        for slice in GuestMemoryBackend::get_slices(ram.backend(), GuestAddress(run.target.0), len) {
            let slice = slice?;
            if self.first.is_none() {
                self.first = Some(slice);
            } else if self.rest.len() < MOST_PIECES {
                self.rest.push(slice);
            } else {
                return Err(Error::InvalidGuestAddress(GuestAddress(run.target.0)));
            }
        }
        Ok(())
    }
}

/// The memory of one access.
enum Slices<'a> {
    /// As RAM has it.
    Plain(GuestMemoryBackendSliceIterator<'a, GuestMemoryMmap<()>>),
    /// As it was translated.
    Translated(
        std::iter::Chain<std::option::IntoIter<VolatileSlice<'a>>, std::vec::IntoIter<VolatileSlice<'a>>>,
    ),
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Plain(slices) => slices.next(),
            Self::Translated(slices) => slices.next().map(Ok),
        }
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}

impl GuestMemory for DmaView<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        match &self.way {
            Way::Closed => false,
            Way::Plain => GuestMemoryBackend::check_range(self.ram.backend(), addr, count),
            Way::Translated {
                requester,
                translations,
            } => self
                .pieces(*requester, &**translations, addr, count, access)
                .is_ok(),
        }
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        match &self.way {
            Way::Closed => Err(Error::InvalidGuestAddress(addr)),
            Way::Plain => {
                let slices = GuestMemoryBackend::get_slices(self.ram.backend(), addr, count);
                Ok(Slices::Plain(slices))
            }
            Way::Translated {
                requester,
                translations,
            } => {
                let pieces = self.pieces(*requester, &**translations, addr, count, access)?;
                Ok(Slices::Translated(pieces.first.into_iter().chain(pieces.rest)))
            }
        }
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

    /// Maps each page of the first 64 KiB to another page of RAM, backwards; only even pages may be written.
    struct Backwards;

    impl Translator for Backwards {
        fn begin(&self) -> Box<dyn Translations + '_> {
            Box::new(Self)
        }
    }

    impl Translations for Backwards {
        fn translate(&self, requester: Bdf, at: Iova, access: Permissions) -> Option<Run> {
            let page = at.0 / 0x1000;
            let allowed = page.is_multiple_of(2) || !access.has_write();
            let within = at.0 % 0x1000;
            (requester == Bdf::default() && page < 16 && allowed).then_some(Run {
                target: Gpa((15 - page) * 0x1000 + within),
                len: 0x1000 - within,
            })
        }
    }

    fn translated() -> (GuestRam, Dma) {
        let requester = Arc::new(Requester::default());
        requester.set_bus_master(true);
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("pages");
        let ram = GuestRam::new(ram);
        (ram.clone(), Dma::translated(requester, ram, Arc::new(Backwards)))
    }

    #[test]
    fn an_access_over_two_pages_falls_into_two_places() {
        let (ram, dma) = translated();
        ram.write_obj(Gpa(0xfffc), &0x1111_2222_u32).expect("RAM");
        ram.write_obj(Gpa(0xe000), &0x3333_4444_u32).expect("RAM");
        let read = dma.view().read_obj::<u64>(GuestAddress(0xffc)).expect("mapped");
        assert_eq!(read, 0x3333_4444_1111_2222);
    }

    #[test]
    fn an_access_that_is_refused_in_part_touches_nothing() {
        let (ram, dma) = translated();
        assert!(dma.view().write_obj(u64::MAX, GuestAddress(0xffc)).is_err());
        assert!(dma.view().write_slice(&[1; 8], GuestAddress(0xfffc)).is_err());
        let bytes = (0..0x1_0000 / 8).map(|at| ram.read_obj::<u64>(Gpa(8 * at)).expect("RAM"));
        assert_eq!(bytes.sum::<u64>(), 0);
    }

    #[test]
    fn translation_is_asked_as_the_present_requester_and_only_with_bus_master() {
        let (_, dma) = translated();
        assert!(dma.view().read_obj::<u32>(GuestAddress(0)).is_ok());
        dma.requester.set_bus_master(false);
        assert!(dma.view().read_obj::<u32>(GuestAddress(0)).is_err());
        dma.requester.set_bus_master(true);
        dma.requester.renumber(Sbdf {
            segment: 0,
            bdf: Bdf::new(1, 0, 0).expect("valid"),
        });
        assert!(dma.view().read_obj::<u32>(GuestAddress(0)).is_err());
    }

    /// Maps everything to one page.
    struct OnePage;

    impl Translator for OnePage {
        fn begin(&self) -> Box<dyn Translations + '_> {
            Box::new(Self)
        }
    }

    impl Translations for OnePage {
        fn translate(&self, _requester: Bdf, at: Iova, _access: Permissions) -> Option<Run> {
            let within = at.0 % 0x1000;
            Some(Run {
                target: Gpa(within),
                len: 0x1000 - within,
            })
        }
    }

    #[test]
    fn what_describes_an_access_is_bounded_and_the_address_space_has_an_end() {
        let (ram, dma) = translated();
        let dma = Dma::translated(dma.requester, ram, Arc::new(OnePage));
        let view = dma.view();
        let slices = |at, count| {
            let slices = view.get_slices(GuestAddress(at), count, Permissions::Read);
            slices.map(Iterator::count).ok()
        };
        assert_eq!(slices(0, 0), Some(0));
        assert_eq!(slices(0x800, 0x1000), Some(2));
        assert_eq!(slices(0, MOST_PIECES << 12), Some(MOST_PIECES));
        assert_eq!(slices(0, 0xffff_ffff), None);
        assert_eq!(slices(u64::MAX - 0xfff, 0x1000), Some(1));
        assert_eq!(slices(u64::MAX - 0xfff, 0x1001), None);
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
