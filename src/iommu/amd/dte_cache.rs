//! Device table entries as they were read last, until the guest invalidates them (section 2.4.2).

use super::slot::{Announced, Slot};
use super::spec::dte::Dte;
use super::sync::{AtomicU64, Ordering};
use crate::platform::addr::Bdf;

/// Entries kept; devices share them by the lowest bits of their number.
const ENTRIES: usize = 256;

/// An entry: tag, four quadwords, stamp.
#[derive(Default)]
#[repr(align(64))]
struct Entry(Slot<6>);

/// What was known when an entry was read.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    stamp: u64,
    announced: u64,
}

/// The cache.
pub struct DteCache {
    entries: Box<[Entry]>,
    stamp: AtomicU64,
    announced: Announced,
}

impl Default for DteCache {
    fn default() -> Self {
        Self {
            entries: (0..ENTRIES).map(|_| Entry::default()).collect(),
            stamp: AtomicU64::new(0),
            announced: Announced::default(),
        }
    }
}

impl DteCache {
    /// First quadword of the entry of `device`, never 0.
    const fn tag(device: Bdf) -> u64 {
        1 << 63 | device.requester_id() as u64
    }

    #[inline]
    fn entry(&self, device: Bdf) -> &Slot<6> {
        // Functions of one bus differ in the lower byte, devices behind ports in the upper one.
        let [bus, function] = device.requester_id().to_be_bytes();
        &self.entries[usize::from(bus.wrapping_mul(37) ^ function)].0
    }

    /// The entry of `device`, if it is known.
    #[inline]
    pub fn find(&self, device: Bdf) -> Option<Dte> {
        let [_, q0, q1, q2, q3, stamp] = self.entry(device).find(Self::tag(device))?;
        let present = stamp == self.stamp.load(Ordering::Acquire);
        present.then(|| Dte::from_quadwords([q0, q1, q2, q3]))
    }

    /// Take this before reading an entry that is to be kept.
    pub fn ticket(&self) -> Ticket {
        Ticket {
            announced: self.announced.count(),
            stamp: self.stamp.load(Ordering::Acquire),
        }
    }

    /// Keep the entry of `device`, unless an invalidation came between.
    pub fn keep(&self, ticket: Ticket, device: Bdf, dte: &Dte) {
        let [q0, q1, q2, q3] = dte.into_quadwords();
        let words = [Self::tag(device), q0, q1, q2, q3, ticket.stamp];
        let still_true = || self.announced.count() == ticket.announced;
        self.entry(device).fill(words, still_true);
    }

    /// Forget the entry of `device`.
    pub fn invalidate(&self, device: Bdf) {
        self.announced.invalidation();
        let tag = Self::tag(device);
        self.entry(device).clear_if(|[found, ..]| *found == tag);
    }

    /// Forget all entries.
    pub fn invalidate_all(&self) {
        self.announced.invalidation();
        self.stamp.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dte(word: u64) -> Dte {
        Dte::from_quadwords([word; 4])
    }

    fn device(id: u16) -> Bdf {
        Bdf::from_requester_id(id)
    }

    #[test]
    fn an_entry_is_known_until_it_is_invalidated() {
        let cache = DteCache::default();
        cache.keep(cache.ticket(), device(0x108), &dte(5));
        cache.keep(cache.ticket(), device(0x110), &dte(6));
        assert_eq!(cache.find(device(0x108)), Some(dte(5)));
        cache.invalidate(device(0x108));
        assert_eq!(cache.find(device(0x108)), None);
        assert_eq!(cache.find(device(0x110)), Some(dte(6)));
        cache.invalidate_all();
        assert_eq!(cache.find(device(0x110)), None);
    }

    #[test]
    fn an_entry_read_before_an_invalidation_is_not_kept() {
        let cache = DteCache::default();
        let ticket = cache.ticket();
        cache.invalidate(device(1));
        cache.keep(ticket, device(1), &dte(5));
        assert_eq!(cache.find(device(1)), None);
    }

    #[test]
    fn devices_that_share_a_place_do_not_see_each_others_entry() {
        let cache = DteCache::default();
        for id in 0..=u16::MAX {
            cache.keep(cache.ticket(), device(id), &dte(u64::from(id)));
            let other = cache
                .find(device(id.wrapping_add(1)))
                .filter(|found| *found == dte(u64::from(id)));
            assert_eq!(other, None, "{id:#x}");
        }
    }
}
