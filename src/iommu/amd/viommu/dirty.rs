//! Command-buffer dirty status: a bit for each guest in the private address space.
//!
//! Drivers clear the bit of a guest that comes or goes and never look, so when else it changes is this model's own: it stands
//! from before the unit fetches commands of the guest until none waits, or its ring is off.

use super::maps::Broken;
use super::{Guest, Guests};
use crate::iommu::amd::Unit;
use crate::iommu::amd::memory::{SystemMemory, Unreachable, change};
use crate::iommu::amd::spec::viommu::command_dirty;
use crate::platform::addr::Gpa;
use crate::platform::lock::lock;

impl<M: SystemMemory> Unit<M> {
    /// Commands of `guest` are about to be fetched.
    pub(super) fn mark_dirty(&self, guests: &Guests, guest: &Guest) -> Result<(), Broken> {
        let mut dirty = lock(&guests.dirty);
        if dirty.contains(&guest.id) {
            return Ok(());
        }
        self.change_dirty(guests, guest, true)?;
        dirty.insert(guest.id);
        Ok(())
    }

    /// Commands of `guest` were carried out, or its ring changed: perhaps none waits any more.
    pub(super) fn mark_clean(&self, guests: &Guests, guest: &Guest) -> Result<(), Broken> {
        let mut dirty = lock(&guests.dirty);
        if !dirty.contains(&guest.id) {
            return Ok(());
        }
        // Looked at with the bits locked: whoever rings later marks it anew.
        let waits = {
            let registers = guest.registers();
            registers.control().cmd_buf_en() && registers.command.waiting() > 0
        };
        if waits {
            return Ok(());
        }
        // Where the bit cannot be cleared it cannot be set either, and the next doorbell says so.
        dirty.remove(&guest.id);
        self.change_dirty(guests, guest, false)
    }

    fn change_dirty(&self, guests: &Guests, guest: &Guest, set: bool) -> Result<(), Broken> {
        let (at, bit) = command_dirty(guest.id);
        let private = self.reach(guests.own).ok_or(Broken { at })?;
        let new = |old| if set { old | bit } else { old & !bit };
        change(&private, Gpa(at), new).map_err(|Unreachable| Broken { at })
    }
}
