//! The memory of the machine: who owns which page, and what the unit touched of it for whom.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ravelin::iommu::amd::memory::{SystemMemory, Unreachable};
use ravelin::iommu::amd::spec::dte::{Dte, Guest, Host};
use ravelin::iommu::amd::spec::viommu::{COMMAND_DIRTY, DEVICE_MAPS, DOMAIN_MAPS};
use ravelin::platform::addr::Gpa;

/// Guests; the number of the first is 1.
pub(super) const GUESTS: usize = 3;
/// Devices, as the host calls them, from [`FIRST_DEVICE`] on.
pub(super) const DEVICES: usize = 4;
pub(super) const FIRST_DEVICE: u16 = 0x08;
/// What guests call their devices, from here on: no number of the host's.
pub(super) const FIRST_NAME: u16 = 0x40;
/// By whose entry the buffers of the first guest are found.
pub(super) const FIRST_TRANSLATE: u16 = 0x70;
/// The unit's own function.
pub(super) const OWN: u16 = 0x02;
/// What guests call their domains is less than this, and what the host calls them is more.
pub(super) const DOMAINS: u16 = 4;
pub(super) const FIRST_DOMAIN: u16 = 0x80;

/// Bytes of memory.
pub(super) const RAM: u64 = 0x10_0000;
/// A page of entries, for 128 device numbers.
pub(super) const DEVICE_TABLE: u64 = 0;
pub(super) const HOST_RING: u64 = 0x1000;
pub(super) const HOST_LOG: u64 = 0x2000;
/// What most of every map is: nothing.
pub(super) const ZEROS: u64 = 0x4000;
pub(super) const PAGES: u64 = 0x5000;
/// Guests' memory, one after another; what is behind it belongs to nobody.
pub(super) const GUEST_RAM: u64 = 0x4_0000;
pub(super) const GUEST_LEN: u64 = 0x2_0000;
/// Where each guest has its rings and tables at first.
pub(super) const RING: u64 = 0x1000;
pub(super) const LOG: u64 = 0x2000;
pub(super) const PPR_LOG: u64 = 0x4000;
pub(super) const GCR3: u64 = 0x5000;
pub(super) const TABLES: u64 = 0x6000;

/// Whose a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Whose {
    Nobody,
    /// The device table, and what the private address space is made of.
    Tables,
    /// What the unit keeps for all guests together.
    Shared,
    HostRing,
    HostLog,
    /// A guest's maps.
    Maps(usize),
    /// The host table of a guest's memory.
    HostTable(usize),
    /// A guest's memory.
    Ram(usize),
}

/// Who has the unit do something, and for which guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Acting {
    pub(super) host: bool,
    pub(super) guest: Option<usize>,
}

impl Acting {
    /// Whether the unit may touch a page of `whose` for it.
    pub(super) fn may(self, whose: Whose, write: bool) -> bool {
        match whose {
            Whose::Nobody => false,
            Whose::Tables => !write,
            Whose::Shared | Whose::HostLog => true,
            Whose::HostRing => self.host,
            Whose::Maps(guest) => self.guest == Some(guest) && (self.host || !write),
            Whose::HostTable(guest) => self.guest == Some(guest) && !write,
            Whose::Ram(guest) => self.guest == Some(guest),
        }
    }
}

/// Memory as it is laid out before anybody runs, and whose each page is.
pub(super) struct Image {
    pub(super) words: Vec<u64>,
    pub(super) whose: Vec<Whose>,
    pub(super) private: u64,
    pub(super) roots: [u64; GUESTS],
    pub(super) next: u64,
}

pub(super) fn page_of(at: u64) -> usize {
    usize::try_from(at >> 12).expect("small")
}

pub(super) fn number(guest: usize) -> u16 {
    u16::try_from(guest + 1).expect("few")
}

/// What the host calls the domain that `guest` calls `domain`.
pub(super) fn host_domain(guest: usize, domain: u16) -> u16 {
    FIRST_DOMAIN + 8 * number(guest) + domain
}

/// The `index`th number from `first` on.
pub(super) fn nth(first: u16, index: usize) -> u16 {
    first + u16::try_from(index).expect("few")
}

impl Image {
    pub(super) fn get() -> &'static Self {
        static IMAGE: OnceLock<Image> = OnceLock::new();
        IMAGE.get_or_init(Self::new)
    }

    fn new() -> Self {
        let mut image = Self {
            words: vec![0; usize::try_from(RAM / 8).expect("small")],
            whose: vec![Whose::Nobody; page_of(RAM)],
            private: 0,
            roots: [0; GUESTS],
            next: PAGES,
        };
        image.whose[page_of(DEVICE_TABLE)] = Whose::Tables;
        image.whose[page_of(ZEROS)] = Whose::Tables;
        image.whose[page_of(HOST_RING)] = Whose::HostRing;
        image.whose[page_of(HOST_LOG)] = Whose::HostLog;
        image.private = image.page(Whose::Tables);
        let dirty = image.page(Whose::Shared);
        image.map(image.private, Whose::Tables, COMMAND_DIRTY, dirty, true);
        for guest in 0..GUESTS {
            image.add_guest(guest);
        }
        for device in 0..DEVICES {
            image.set_entry(nth(FIRST_DEVICE, device), &blocked());
        }
        let own = host_table(image.private, 1);
        image.set_entry(OWN, &own);
        assert!(image.next <= GUEST_RAM, "tables end before guests' memory");
        image
    }

    fn add_guest(&mut self, guest: usize) {
        let id = u64::from(number(guest));
        let (private, shared) = (self.private, Whose::Tables);
        for (at, pages) in [
            (DEVICE_MAPS + (id << 20), 0x100),
            (DOMAIN_MAPS + (id << 19), 0x80),
        ] {
            let first = self.page(Whose::Maps(guest));
            self.map(private, shared, at, first, true);
            for page in 1..pages {
                self.map(private, shared, at + (page << 12), ZEROS, false);
            }
        }
        let whose = Whose::HostTable(guest);
        let root = self.page(whose);
        self.roots[guest] = root;
        let base = base(guest);
        for at in (0..GUEST_LEN).step_by(0x1000) {
            self.whose[page_of(base + at)] = Whose::Ram(guest);
            self.map(root, whose, at, base + at, true);
        }
        self.set_entry(nth(FIRST_TRANSLATE, guest), &host_table(root, 2));
        self.put(base + GCR3, TABLES | 1);
        for level in 0..3 {
            let table = TABLES + level * 0x1000;
            self.put(base + table, (table + 0x1000) | 7);
        }
        self.put(base + TABLES + 0x3008, 0x1_0000 | 7);
    }

    /// A page of zeros.
    fn page(&mut self, whose: Whose) -> u64 {
        let page = self.next;
        self.next += 0x1000;
        self.whose[page_of(page)] = whose;
        page
    }

    fn slot(at: u64) -> usize {
        usize::try_from(at / 8).expect("small")
    }

    pub(super) fn put(&mut self, at: u64, value: u64) {
        self.words[Self::slot(at)] = value;
    }

    fn set_entry(&mut self, device: u16, dte: &Dte) {
        for (at, word) in (0..).step_by(8).zip(dte.into_quadwords()) {
            self.put(DEVICE_TABLE + u64::from(device) * 32 + at, word);
        }
    }

    /// Map a page in a host table of four levels, whose own pages are of `whose`.
    fn map(&mut self, root: u64, whose: Whose, iova: u64, to: u64, write: bool) {
        let mut table = root;
        for level in (2..=4_u64).rev() {
            let at = table + (iova >> (9 * level + 3) & 0x1ff) * 8;
            let found = self.words[Self::slot(at)];
            table = if found & 1 == 1 {
                found & 0xf_f000
            } else {
                let next = self.page(whose);
                self.put(at, 3 << 61 | next | (level - 1) << 9 | 1);
                next
            };
        }
        self.put(
            table + (iova >> 12 & 0x1ff) * 8,
            1 << 61 | u64::from(write) << 62 | to | 1,
        );
    }
}

pub(super) fn base(guest: usize) -> u64 {
    GUEST_RAM + guest as u64 * GUEST_LEN
}

/// An entry that leads nowhere.
pub(super) fn blocked() -> Dte {
    Dte {
        host: Host::new().with_v(true),
        ..Dte::default()
    }
}

pub(super) fn host_table(root: u64, domain: u16) -> Dte {
    Dte {
        host: Host::new()
            .with_v(true)
            .with_tv(true)
            .with_mode(4)
            .with_root(root >> 12)
            .with_ir(true)
            .with_iw(true),
        guest: Guest::new().with_domain(domain),
        ..Dte::default()
    }
}

/// Memory that remembers who touched it.
#[derive(Default)]
pub(super) struct Touched {
    pub(super) words: Vec<u64>,
    /// Page, and whether it was written.
    pub(super) touches: Vec<(usize, bool)>,
    pub(super) count: usize,
    /// Records of logs, and in which page.
    pub(super) records: Vec<(usize, [u32; 4])>,
}

#[derive(Clone)]
pub(super) struct Memory(pub(super) Arc<Mutex<Touched>>);

impl Memory {
    pub(super) fn lock(&self) -> MutexGuard<'_, Touched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The word at `at`, an address in memory that is a multiple of 8.
    fn word<T>(&self, at: u64, write: bool, f: impl FnOnce(&mut u64) -> T) -> Result<T, Unreachable> {
        assert_eq!(at % 8, 0, "quadwords are aligned");
        let mut memory = self.lock();
        if at >= RAM {
            return Err(Unreachable);
        }
        memory.count += 1;
        let touch = (page_of(at), write);
        if memory.touches.last() != Some(&touch) {
            memory.touches.push(touch);
        }
        Ok(f(&mut memory.words[Image::slot(at)]))
    }

    /// Write without anybody's noticing.
    pub(super) fn put(&self, at: u64, value: u64) {
        self.lock().words[Image::slot(at)] = value;
    }
}

impl SystemMemory for Memory {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        assert_eq!(at.0 % 8, 0, "whoever reads begins at a quadword");
        let end = at.0.checked_add(data.len() as u64).ok_or(Unreachable)?;
        if end > RAM {
            return Err(Unreachable);
        }
        let mut memory = self.lock();
        memory.count += 1;
        for page in page_of(at.0)..=page_of(end - 1) {
            memory.touches.push((page, false));
        }
        let words = &memory.words[Image::slot(at.0)..];
        for (part, word) in data.chunks_mut(8).zip(words) {
            part.copy_from_slice(&word.to_le_bytes()[..part.len()]);
        }
        Ok(())
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        let end = at.0.checked_add(data.len() as u64).ok_or(Unreachable)?;
        if end > RAM {
            return Err(Unreachable);
        }
        for (offset, part) in (0..).step_by(8).zip(data.chunks(8)) {
            let value = part.try_into().map(u64::from_le_bytes).expect("whole quadwords");
            self.word(at.0 + offset, true, |word| *word = value)?;
        }
        if let Ok(record) = <[u8; 16]>::try_from(data) {
            let dwords = record.as_chunks::<4>().0;
            let record = std::array::from_fn(|index| u32::from_le_bytes(dwords[index]));
            self.lock().records.push((page_of(at.0), record));
        }
        Ok(())
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        self.word(at.0, false, |word| *word)
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        self.word(at.0, true, |word| *word = value)
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        self.word(at.0, true, |word| {
            let found = *word;
            if found == old {
                *word = new;
                Ok(())
            } else {
                Err(found)
            }
        })
    }
}
