//! The unit's translation cache: tagged by domain and address space, bounded, without locks on a hit.
//!
//! Entries are pages of four granules; a page of the tables is kept under the largest granule that fits it.
//! An entry knows nothing of the device table entry: permissions there are applied by the caller, so that
//! devices of one domain share entries (section 2.2.2).
//!
//! Invalidating a domain or everything changes a stamp that entries must match. Invalidating pages looks for
//! them. An entry never comes from a walk that began before an invalidation it should have obeyed, and a walk begins where
//! it is read by which tables: with Control and the device table entry. So the ticket is taken before both are read.

use super::pages::PageRange;
use super::request::{Access, Pasid};
use super::slot::{Announced, Slot};
use super::sync::{AtomicU64, Ordering};
use super::walk::Leaf;

/// Sets of the cache of a unit; with two entries each, 2,048 in all.
pub const SETS: usize = 1024;
/// Entries of a set.
const WAYS: usize = 2;
/// Domains share stamps by the lowest bits of their number.
const STAMPS: usize = 1024;
/// Logarithms of the granules.
const GRANULES: [u32; 4] = [12, 16, 21, 30];
/// Granules an invalidation looks for one by one; past that it drops the domain.
const MOST_PROBES: u64 = 256;

/// Whose translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key {
    /// DomainID of the device table entry.
    pub domain: u16,
    /// By which table.
    pub space: Space,
}

/// By which table an address is translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// The host table.
    Host,
    /// The guest table of a process address space.
    Guest {
        /// Whose.
        pasid: Pasid,
        /// The host table lies below it.
        nested: bool,
    },
}

impl Key {
    /// What the tags of its entries have in common, never 0.
    const fn tags(self) -> u64 {
        const VALID: u64 = 1 << 63;
        let space = match self.space {
            Space::Host => 0,
            Space::Guest { nested: false, .. } => 1,
            Space::Guest { nested: true, .. } => 2,
        };
        VALID | space << 53
    }

    /// First quadword of an entry for the granule that begins at `at`.
    const fn tag(self, class: usize, at: u64) -> u64 {
        tag(self.tags(), class, at)
    }

    /// Second quadword of an entry.
    const fn owner(self) -> u64 {
        let pasid = match self.space {
            Space::Host => 0,
            Space::Guest { pasid, .. } => pasid.value(),
        };
        self.domain as u64 | (pasid as u64) << 16
    }
}

/// The tag of the granule of `class` that begins at `at`, among `tags`.
#[inline]
const fn tag(tags: u64, class: usize, at: u64) -> u64 {
    tags | (class as u64) << 56 | at >> GRANULES[class] & ((1 << 52) - 1)
}

/// An address space as the cache had it at some moment. By it entries of that moment are found, also those that were
/// dropped since by domain: whoever keeps one is inside ([`super::grace`]), so that invalidations wait.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    tags: u64,
    owner: u64,
    stamp: u64,
    /// A bit for each class of which there are entries.
    classes: u8,
}

/// What a hit says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    /// The address in system memory.
    pub target: u64,
    /// Bytes from there to the end of the granule.
    pub run: u64,
    /// What the tables allow.
    pub allowed: Access,
}

/// How many invalidations there had been when a walk began.
#[derive(Clone, Copy, Debug)]
pub struct Ticket(u64);

/// Third quadword of an entry: target, and beside it what a page cannot need below bit 12.
mod value {
    use super::Access;

    pub(super) const READ: u64 = 1;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const SETTLED: u64 = 1 << 3;
    pub(super) const SHIFT: u32 = 4;
    pub(super) const SHIFT_MASK: u64 = 0x3f;
    pub(super) const FRAME: u64 = !0xfff;

    /// What is set where `need` is allowed and leaves no mark undone.
    #[inline]
    pub(super) fn needed(need: Access, user: bool) -> u64 {
        u64::from(need.read) * READ + u64::from(need.write) * (WRITE | SETTLED) + u64::from(user) * USER
    }
}

/// An entry: tag, owner, value, stamp. One cache line each.
#[derive(Default)]
#[repr(align(64))]
struct Entry(Slot<4>);

impl Entry {
    /// Its value, if it is of this granule of that space.
    #[inline]
    fn value(&self, tag: u64, seen: Seen) -> Option<u64> {
        let [_, owner, value, stamp] = self.0.find(tag)?;
        (owner == seen.owner && stamp == seen.stamp).then_some(value)
    }
}

/// The cache.
pub struct Iotlb {
    sets: Box<[[Entry; WAYS]]>,
    /// What is left of a 64-bit hash after this many bits is the number of a set.
    set_shift: u32,
    /// Changes when everything is invalidated.
    all: AtomicU64,
    /// Change when their domains are invalidated.
    domains: Box<[AtomicU64; STAMPS]>,
    announced: Announced,
    /// By class, in eight bits each: the largest page ever kept there, as a logarithm; 0 for none.
    largest: AtomicU64,
    /// By stamp: of which kinds of guest tables translations were ever kept, see [`kept`].
    guests: Box<[AtomicU64; STAMPS]>,
}

/// Kinds of guest tables.
mod kept {
    use super::Space;

    /// Of PASID 0, without a host table below.
    pub(super) const ZERO: u64 = 1;
    /// Of other PASIDs.
    pub(super) const OTHERS: u64 = 1 << 1;
    /// Over a host table.
    pub(super) const NESTED: u64 = 1 << 2;

    /// What is to be noted before a translation of `space` is kept.
    pub(super) const fn of(space: Space) -> u64 {
        match space {
            Space::Host => 0,
            Space::Guest { nested: true, .. } => NESTED,
            Space::Guest { pasid, nested: false } => {
                if pasid.value() == 0 {
                    ZERO
                } else {
                    OTHERS
                }
            }
        }
    }
}

impl Iotlb {
    /// An empty cache of `sets` sets, a power of two from 2 on.
    #[must_use]
    pub fn new(sets: usize) -> Self {
        assert!(
            sets.is_power_of_two() && sets > 1,
            "sets are found by the highest bits of a hash"
        );
        Self {
            set_shift: u64::BITS - sets.trailing_zeros(),
            sets: (0..sets).map(|_| Default::default()).collect(),
            all: AtomicU64::new(0),
            domains: Box::new(std::array::from_fn(|_| AtomicU64::new(0))),
            announced: Announced::default(),
            largest: AtomicU64::new(0),
            guests: Box::new(std::array::from_fn(|_| AtomicU64::new(0))),
        }
    }

    /// The present stamp of `domain`. Both parts only grow, so equal sums mean equal parts.
    #[inline]
    fn stamp(&self, domain: u16) -> u64 {
        let domain = self.domains[usize::from(domain) % STAMPS].load(Ordering::Acquire);
        self.all.load(Ordering::Acquire).wrapping_add(domain)
    }

    /// The entries in which a tag may stand.
    #[inline]
    fn set(&self, tag: u64, owner: u64) -> &[Entry; WAYS] {
        let mixed = (tag ^ owner.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The highest bits of the product depend on every bit of both.
        #[expect(clippy::cast_possible_truncation, reason = "less than the number of sets")]
        let set = (mixed >> self.set_shift) as usize;
        &self.sets[set]
    }

    /// The largest page ever kept under a granule, as a logarithm; 0 for none.
    #[inline]
    fn largest(kept: u64, class: usize) -> u32 {
        u32::from(kept.to_le_bytes()[class])
    }

    /// The space of `key` as it is now.
    #[inline]
    pub fn seen(&self, key: Key) -> Seen {
        Seen {
            tags: key.tags(),
            owner: key.owner(),
            stamp: self.stamp(key.domain),
            classes: self.classes(),
        }
    }

    /// A bit for each class in which something was ever kept.
    fn classes(&self) -> u8 {
        let kept = self.largest.load(Ordering::Relaxed);
        (0..GRANULES.len()).fold(0, |classes, class| {
            classes | u8::from(Self::largest(kept, class) != 0) << class
        })
    }

    /// Find a translation of `at` that allows `need` and leaves no mark undone.
    #[inline(always)]
    pub fn find(&self, seen: Seen, at: u64, need: Access, user: bool) -> Option<Hit> {
        let needed = value::needed(need, user);
        let mut left = seen.classes;
        while left != 0 {
            let class = left.trailing_zeros() as usize;
            left &= left - 1;
            let tag = tag(seen.tags, class, at);
            let mut set = self.set(tag, seen.owner).iter();
            let Some(value) = set.find_map(|entry| entry.value(tag, seen)) else {
                continue;
            };
            if value & needed != needed {
                return None;
            }
            let allowed = Access::new(value & value::READ != 0, value & value::WRITE != 0);
            let granule = 1 << GRANULES[class];
            let within = at & (granule - 1);
            return Some(Hit {
                target: (value & value::FRAME) + within,
                run: granule - within,
                allowed,
            });
        }
        None
    }

    /// Take this before a walk whose result is to be kept, and before it is read which tables are walked.
    #[inline]
    pub fn ticket(&self) -> Ticket {
        Ticket(self.announced.count())
    }

    /// Keep what a walk for `at` found, unless an invalidation came between.
    pub fn keep(&self, ticket: Ticket, key: Key, at: u64, leaf: &Leaf) {
        let class = match leaf.shift {
            30.. => 3,
            21..30 => 2,
            16..21 => 1,
            _ => 0,
        };
        self.note(class, leaf.shift);
        self.note_guest(key);
        let tag = key.tag(class, at);
        let owner = key.owner();
        let granule = at & !((1 << GRANULES[class]) - 1);
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        let value = leaf.target(granule)
            | flag(leaf.allowed.read, value::READ)
            | flag(leaf.allowed.write, value::WRITE)
            | flag(leaf.user, value::USER)
            | flag(leaf.settled, value::SETTLED)
            | u64::from(leaf.shift) << value::SHIFT;
        let set = self.set(tag, owner);
        let same = set.iter().find(|entry| entry.0.find(tag).is_some());
        let free = || set.iter().find(|entry| entry.0.find(0).is_some());
        // Any victim will do; a bit of the page number spreads the choice.
        let victim = || &set[usize::from(leaf.base >> 12 & 1 == 1)];
        let entry = same.or_else(free).unwrap_or_else(victim);
        // Of an invalidation whose stamp this is already, the count is seen below.
        let stamp = self.stamp(key.domain);
        let still_true = || self.announced.count() == ticket.0;
        entry.0.fill([tag, owner, value, stamp], still_true);
    }

    /// Say that a page of `1 << shift` bytes is kept in `class`, before it is.
    fn note(&self, class: usize, shift: u32) {
        let mut kept = self.largest.load(Ordering::Relaxed);
        while Self::largest(kept, class) < shift {
            let cleared = kept & !(0xff << (8 * class));
            let noted = cleared | u64::from(shift) << (8 * class);
            let outcome = self
                .largest
                .compare_exchange(kept, noted, Ordering::SeqCst, Ordering::Relaxed);
            kept = outcome.map_or_else(|found| found, |_| noted);
        }
    }

    /// Say of which kind `key` is, before a translation of it is kept.
    fn note_guest(&self, key: Key) {
        let kind = kept::of(key.space);
        let kinds = &self.guests[usize::from(key.domain) % STAMPS];
        if kinds.load(Ordering::SeqCst) & kind != kind {
            kinds.fetch_or(kind, Ordering::SeqCst);
        }
    }

    /// Drop everything.
    pub fn invalidate_all(&self) {
        self.announced.invalidation();
        self.all.fetch_add(1, Ordering::SeqCst);
    }

    /// Drop all translations of `domain`, of every space; others of the same stamp go with it.
    pub fn invalidate_domain(&self, domain: u16) {
        self.announced.invalidation();
        self.domains[usize::from(domain) % STAMPS].fetch_add(1, Ordering::SeqCst);
    }

    /// Drop the translations of `domain` in `space` whose page shares a byte with `range`.
    ///
    /// `None` is every table of the domain: Linux 6.1 to 6.7 names no space (GN=0) when it unmaps in v2 tables. Of host
    /// tables and of PASID 0 the pages are looked for; where others were ever kept, of PASIDs that nobody remembers here,
    /// or nested, so that their addresses are not those of the host table, the domain goes.
    pub fn invalidate_pages(&self, domain: u16, space: Option<Pasid>, range: PageRange) {
        self.announced.invalidation();
        let guests = self.guests[usize::from(domain) % STAMPS].load(Ordering::SeqCst);
        let PageRange::Span { first, last } = range else {
            return self.invalidate_domain(domain);
        };
        if space.is_none() && guests & (kept::OTHERS | kept::NESTED) != 0 {
            return self.invalidate_domain(domain);
        }
        let kept = self.largest.load(Ordering::SeqCst);
        let classes = || (0..GRANULES.len()).filter(|class| Self::largest(kept, *class) != 0);
        // A page that shares a byte with the range may begin before it and end behind it.
        let around = |class: usize| {
            let page = (1 << Self::largest(kept, class)) - 1;
            (
                (first & !page) >> GRANULES[class],
                (last | page) >> GRANULES[class],
            )
        };
        let probes = classes().map(|class| around(class).1 - around(class).0 + 1);
        if probes.fold(0, u64::saturating_add) > MOST_PROBES {
            return self.invalidate_domain(domain);
        }
        let guest = |pasid, nested| Space::Guest { pasid, nested };
        let spaces = match space {
            None => {
                let zero = guests & kept::ZERO != 0;
                [Some(Space::Host), zero.then(|| guest(Pasid::ZERO, false))]
            }
            Some(pasid) => {
                let nested = guests & kept::NESTED != 0;
                [Some(guest(pasid, false)), nested.then(|| guest(pasid, true))]
            }
        };
        for space in spaces.into_iter().flatten() {
            let key = Key { domain, space };
            for class in classes() {
                let (from, to) = around(class);
                for granule in from..=to {
                    self.drop_granule(key, class, granule << GRANULES[class], first, last);
                }
            }
        }
    }

    /// Drop the entry of the granule at `at` if its page shares a byte with `first..=last`.
    fn drop_granule(&self, key: Key, class: usize, at: u64, first: u64, last: u64) {
        let (tag, owner) = (key.tag(class, at), key.owner());
        for entry in self.set(tag, owner) {
            entry.0.clear_if(|[found, whose, value, _]| {
                let page = (1 << (value >> value::SHIFT & value::SHIFT_MASK)) - 1;
                *found == tag && *whose == owner && at & !page <= last && first <= at | page
            });
        }
    }
}

#[cfg(test)]
mod tests;
