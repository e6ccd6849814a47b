//! From an address to a page: host (v1) tables, guest (v2) tables, and the one over the other
//! (sections 2.2.3 and 2.2.6).
//!
//! A table is a value that says all a walk needs; a walk reads each entry once, as a whole, and makes at
//! most one trip per level, so that no table a guest writes can hold it.

use super::memory::SystemMemory;
use super::request::{Access, Pasid};
use super::spec::pte::{Gcr3Entry, GuestPte, HostPte};
use crate::platform::addr::Gpa;

/// How often a walk starts anew because an entry changed between its reading and its marking as used.
const ATTEMPTS: usize = 16;

/// Which marks a walk leaves in the entries it uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Track {
    /// Accessed.
    pub accessed: bool,
    /// Dirty, in a page entry, by a write.
    pub dirty: bool,
}

/// What a walk found: one page, and what every entry on the way allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// First byte of the page.
    pub base: u64,
    /// Logarithm of its size in bytes, 12 to 56.
    pub shift: u32,
    /// What the tables allow, the device table entry aside.
    pub allowed: Access,
    /// User requests may pass.
    pub user: bool,
    /// A write leaves no mark that is not there yet.
    pub settled: bool,
    /// The U attribute: no translated requests.
    pub untranslated_only: bool,
}

impl Leaf {
    /// Where `at`, an address in the page, leads.
    #[must_use]
    pub const fn target(&self, at: u64) -> u64 {
        self.base | at & ((1 << self.shift) - 1)
    }
}

/// Why a walk ended without a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// Nothing is mapped there, or the address is too wide for the table.
    NotPresent,
    /// An entry denies the direction.
    Denied,
    /// A user request met a supervisor page.
    Supervisor,
    /// An entry names an impossible level, size, or skips levels whose index is not zero.
    Malformed,
    /// A reserved bit is set.
    Reserved,
    /// Memory did not answer for the entry at this address.
    Unreadable(Gpa),
}

/// A walk that found no page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stopped {
    /// The cause.
    pub why: Why,
    /// In the host table, at this address; `None` in the guest's.
    pub host: Option<u64>,
}

impl Stopped {
    const fn guest(why: Why) -> Self {
        Self { why, host: None }
    }
}

/// A host (v1) table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostTable {
    /// First table.
    pub root: Gpa,
    /// Its level, 1 to 6.
    pub levels: u8,
    /// Marks to leave.
    pub track: Track,
}

/// Logarithm of what one entry of `level` spans.
pub(super) const fn span(level: u8) -> u32 {
    9 * level as u32 + 3
}

/// Entries seen on the way down, to be marked when the walk succeeds.
struct Path<E> {
    entries: [(Gpa, E); 6],
    len: usize,
}

impl<E: Copy> Path<E> {
    const fn new(nothing: E) -> Self {
        Self {
            entries: [(Gpa(0), nothing); 6],
            len: 0,
        }
    }

    /// At most six levels, each below the one before.
    const fn push(&mut self, at: Gpa, entry: E) {
        self.entries[self.len] = (at, entry);
        self.len += 1;
    }

    fn iter(&self) -> impl Iterator<Item = (Gpa, E)> + '_ {
        self.entries[..self.len].iter().copied()
    }
}

/// Replace an entry that is as it was read. `Ok(false)`: it changed meanwhile.
fn mark<M: SystemMemory>(memory: &M, at: Gpa, old: u64, new: u64) -> Result<bool, Why> {
    if old == new {
        return Ok(true);
    }
    let outcome = memory.compare_exchange(at, old, new);
    outcome.map(|done| done.is_ok()).map_err(|_| Why::Unreadable(at))
}

impl HostTable {
    /// Find the page of `at` that allows `need`.
    pub fn walk<M: SystemMemory>(&self, memory: &M, at: u64, need: Access) -> Result<Leaf, Stopped> {
        for _ in 0..ATTEMPTS {
            let found = self.descend(memory, at, need);
            match found.and_then(|(leaf, path)| Ok((leaf, self.mark(memory, &path, need)?))) {
                Ok((leaf, true)) => return Ok(leaf),
                Ok((_, false)) => {}
                Err(why) => return Err(Stopped { why, host: Some(at) }),
            }
        }
        let why = Why::Unreadable(self.root);
        Err(Stopped { why, host: Some(at) })
    }

    fn descend<M: SystemMemory>(
        &self,
        memory: &M,
        at: u64,
        need: Access,
    ) -> Result<(Leaf, Path<HostPte>), Why> {
        let mut level = self.levels;
        if level < 6 && at >> span(level + 1) != 0 {
            return Err(Why::NotPresent);
        }
        let mut path = Path::new(HostPte::new());
        let mut table = self.root.0;
        let mut allowed = Access::BOTH;
        loop {
            let slot = Gpa(table + (at >> span(level) & 0x1ff) * 8);
            let entry = HostPte::from_bits(memory.load(slot).map_err(|_| Why::Unreadable(slot))?);
            if !entry.pr() {
                return Err(Why::NotPresent);
            }
            path.push(slot, entry);
            allowed = allowed.and(Access::new(entry.ir(), entry.iw()));
            let pointer = matches!(entry.next_level(), 1..=6);
            let reserved = if pointer {
                HostPte::RESERVED_TABLE
            } else {
                HostPte::RESERVED_LEAF
            };
            if entry.into_bits() & reserved != 0 {
                return Err(Why::Reserved);
            }
            if !allowed.allows(need) {
                return Err(Why::Denied);
            }
            if !pointer {
                let (base, shift) = page(entry, level).ok_or(Why::Malformed)?;
                let leaf = Leaf {
                    base,
                    shift,
                    allowed,
                    user: true,
                    settled: !self.track.dirty || entry.d() || need.write,
                    untranslated_only: entry.u(),
                };
                return Ok((leaf, path));
            }
            let next = entry.next_level();
            if next >= level {
                return Err(Why::Malformed);
            }
            // Levels between are skipped: their index must be 0 (section 2.2.3).
            let skipped = (1_u64 << span(level)) - (1 << span(next + 1));
            if at & skipped != 0 {
                return Err(Why::Malformed);
            }
            table = entry.frame() << 12;
            level = next;
        }
    }

    /// Leave the marks of a successful walk; `Ok(false)` when an entry changed meanwhile.
    fn mark<M: SystemMemory>(&self, memory: &M, path: &Path<HostPte>, need: Access) -> Result<bool, Why> {
        if !self.track.accessed {
            return Ok(true);
        }
        for (at, entry) in path.iter() {
            let leaf = !matches!(entry.next_level(), 1..=6);
            let dirty = entry.d() || leaf && need.write && self.track.dirty;
            let marked = entry.with_a(true).with_d(dirty);
            if !mark(memory, at, entry.into_bits(), marked.into_bits())? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Base and size of the page that `entry` at `level` describes; `None` for an encoding that is none.
///
/// NextLevel 0 is a page of the level's own size. NextLevel 7 says the size by the lowest clear address bit,
/// and must lie between the sizes of this level and the next (section 2.2.3).
pub(super) const fn page(entry: HostPte, level: u8) -> Option<(u64, u32)> {
    if level == 6 {
        return None;
    }
    let address = entry.frame() << 12;
    let shift = if entry.next_level() == 0 {
        span(level)
    } else {
        let lowest_clear = (!address >> 12).trailing_zeros() + 12;
        let shift = lowest_clear + 1;
        if lowest_clear > 51 || shift <= span(level) || shift >= span(level + 1) {
            return None;
        }
        shift
    };
    Some((address & !((1 << shift) - 1), shift))
}

/// A guest (v2) table of one address space, over a host table or over system memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestTable {
    /// GCR3 table.
    pub gcr3: u64,
    /// Levels of the GCR3 table, less one: 0 to 2.
    pub glx: u8,
    /// Whose space.
    pub pasid: Pasid,
    /// Levels of the page table, 4 or 5.
    pub levels: u8,
    /// Addresses are sign-extended (with PASID) rather than zero-extended (without, by GIOV).
    pub signed: bool,
    /// The request is a user's.
    pub user: bool,
    /// Marks to leave in the guest table.
    pub track: Track,
    /// What its own pointers pass through.
    pub host: Option<HostTable>,
    /// The GCR3 root passes through it as well.
    pub root_is_guest: bool,
}

impl GuestTable {
    /// Find the page of `at` that allows `need`, in system memory.
    pub fn walk<M: SystemMemory>(&self, memory: &M, at: u64, need: Access) -> Result<Leaf, Stopped> {
        for _ in 0..ATTEMPTS {
            let root = self.root(memory)?;
            let (leaf, path) = self.descend(memory, root, at, need)?;
            if self.mark(memory, &path, need)? {
                return self.below(memory, leaf, at, need);
            }
        }
        Err(Stopped::guest(Why::Unreadable(Gpa(self.gcr3))))
    }

    /// Where a quadword of the guest's tables lies in system memory.
    fn place<M: SystemMemory>(&self, memory: &M, at: u64, need: Access) -> Result<Gpa, Stopped> {
        match &self.host {
            Some(host) => Ok(Gpa(host.walk(memory, at, need)?.target(at))),
            None => Ok(Gpa(at)),
        }
    }

    /// The quadword of the guest's tables at `at`, looked at without any mark of it.
    pub(super) fn peek<M: SystemMemory>(&self, memory: &M, at: u64) -> Result<u64, Stopped> {
        let slot = self.place(memory, at, Access::READ)?;
        self.load(memory, slot)
    }

    fn load<M: SystemMemory>(&self, memory: &M, at: Gpa) -> Result<u64, Stopped> {
        let unreadable = |_| Stopped::guest(Why::Unreadable(at));
        memory.load(at).map_err(unreadable)
    }

    /// The page table's root, from the GCR3 table (section 2.2.6.3).
    pub(super) fn root<M: SystemMemory>(&self, memory: &M) -> Result<u64, Stopped> {
        let pasid = u64::from(self.pasid.value());
        if pasid >> (9 * (self.glx + 1)) != 0 {
            return Err(Stopped::guest(Why::NotPresent));
        }
        let mut table = self.gcr3;
        let mut is_guest = self.root_is_guest;
        for level in (0..=self.glx).rev() {
            let slot = table + (pasid >> (9 * level) & 0x1ff) * 8;
            let slot = if is_guest {
                self.place(memory, slot, Access::READ)?
            } else {
                Gpa(slot)
            };
            let entry = Gcr3Entry::from_bits(self.load(memory, slot)?);
            if !entry.valid() {
                return Err(Stopped::guest(Why::NotPresent));
            }
            table = entry.frame() << 12;
            is_guest = true;
        }
        Ok(table)
    }

    /// Whether `at` is an address this table can hold.
    const fn holds(&self, at: u64) -> bool {
        let width = span(self.levels + 1);
        let above = if self.signed {
            (at.cast_signed() >> (width - 1)).cast_unsigned()
        } else {
            at >> width
        };
        above == 0 || self.signed && above == u64::MAX
    }

    fn descend<M: SystemMemory>(
        &self,
        memory: &M,
        root: u64,
        at: u64,
        need: Access,
    ) -> Result<(Leaf, Path<GuestPte>), Stopped> {
        if !self.holds(at) {
            return Err(Stopped::guest(Why::NotPresent));
        }
        let mut path = Path::new(GuestPte::new());
        let mut table = root;
        let mut level = self.levels;
        let mut write = true;
        let mut user = true;
        loop {
            let slot = self.place(memory, table + (at >> span(level) & 0x1ff) * 8, Access::READ)?;
            let entry = GuestPte::from_bits(self.load(memory, slot)?);
            if !entry.p() {
                return Err(Stopped::guest(Why::NotPresent));
            }
            // The address as the guest sees it: marking may need another permission of the host table.
            path.push(Gpa(table + (at >> span(level) & 0x1ff) * 8), entry);
            write &= entry.rw();
            user &= entry.us();
            if level > 3 && entry.ps() {
                return Err(Stopped::guest(Why::Reserved));
            }
            if self.user && !user {
                return Err(Stopped::guest(Why::Supervisor));
            }
            if need.write && !write {
                return Err(Stopped::guest(Why::Denied));
            }
            if level == 1 || entry.ps() {
                let shift = span(level);
                let leaf = Leaf {
                    base: (entry.frame() << 12) & !((1 << shift) - 1),
                    shift,
                    allowed: Access::new(true, write),
                    user,
                    settled: !self.track.dirty || entry.d() || need.write,
                    untranslated_only: false,
                };
                return Ok((leaf, path));
            }
            table = entry.frame() << 12;
            level -= 1;
        }
    }

    /// Leave the marks of a successful walk; `Ok(false)` when an entry changed meanwhile.
    fn mark<M: SystemMemory>(
        &self,
        memory: &M,
        path: &Path<GuestPte>,
        need: Access,
    ) -> Result<bool, Stopped> {
        let last = path.len - 1;
        for (step, (at, entry)) in path.iter().enumerate() {
            let dirty = entry.d() || step == last && need.write && self.track.dirty;
            let marked = entry.with_a(entry.a() || self.track.accessed).with_d(dirty);
            if marked == entry {
                continue;
            }
            let slot = self.place(memory, at.0, Access::BOTH)?;
            if !mark(memory, slot, entry.into_bits(), marked.into_bits()).map_err(Stopped::guest)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The page in system memory: the guest's page, cut to the host's where that is smaller.
    fn below<M: SystemMemory>(&self, memory: &M, leaf: Leaf, at: u64, need: Access) -> Result<Leaf, Stopped> {
        let Some(host) = &self.host else {
            return Ok(leaf);
        };
        let inner = leaf.target(at);
        let under = host.walk(memory, inner, need)?;
        let shift = leaf.shift.min(under.shift);
        Ok(Leaf {
            base: under.target(inner) & !((1 << shift) - 1),
            shift,
            allowed: leaf.allowed.and(under.allowed),
            user: leaf.user,
            settled: leaf.settled && under.settled,
            untranslated_only: under.untranslated_only,
        })
    }
}

#[cfg(test)]
mod tests;
