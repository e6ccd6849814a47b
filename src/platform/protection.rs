//! Pages of guest memory whose changes somebody must hear of before the guest goes on.

use std::collections::BTreeSet;
use std::sync::Weak;

use super::addr::{Gpa, GpaRange};
use super::host::HostError;

/// Who hears of changes.
pub trait Watcher: Send + Sync {
    /// A processor of the guest stored to `range`, which is in pages this one watches. The bytes are in memory; the
    /// processor goes on when this returns. Calls come one after another and hold no lock that an access of the guest's
    /// would need.
    fn written(&self, range: GpaRange);
}

/// What sees to it that stores of the guest's processors to some pages of its memory are noticed: the hypervisor, which
/// has them in read-only memory slots.
///
/// Reads cost nothing, stores an exit each. Stores of devices are not noticed.
pub trait WriteProtection: Send + Sync {
    /// From the return of this on, `watcher` hears of every store to `pages` (each the first byte of a page of guest
    /// RAM), and of no other, save one that was being carried out meanwhile. This replaces what it watched before;
    /// nothing watched, it is forgotten. Pages may have several watchers.
    ///
    /// May be called by a watcher's owner while a processor's access is being carried out, and stops every other
    /// processor for a moment. No lock that an access of the guest's would need may be held.
    ///
    /// # Errors
    /// When the host refuses, or a page is none of guest RAM. What was watched before stays watched.
    fn watch(&self, watcher: &Weak<dyn Watcher>, pages: &BTreeSet<Gpa>) -> Result<(), HostError>;
}
