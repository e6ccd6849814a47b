//! A unit that serves guests of the guest's: the registers by which these are served, and what the unit owes them.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::{EmulatedUnit, data};
use crate::iommu::amd::Effects;
use crate::iommu::amd::remap::Delivery;
use crate::iommu::amd::spec::viommu::{VF_CONTROL_LEN, VF_LEN};
use crate::iommu::amd::viommu::{GuestInterrupt, GuestLog};
use crate::platform::bus::BusDevice;
use crate::platform::msi::MsiMessage;

/// Guests whose commands wait, served in turn.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    guests: BTreeSet<u16>,
    /// Whose turn it was last.
    last: u16,
}

impl Waiting {
    fn next(&mut self) -> Option<u16> {
        let after = (Bound::Excluded(self.last), Bound::Unbounded);
        let next = self.guests.range(after).next().copied();
        let next = next.or_else(|| self.guests.first().copied())?;
        self.guests.remove(&next);
        self.last = next;
        Some(next)
    }
}

/// The pages of all guests (VF MMIO).
pub struct GuestPages(pub Arc<EmulatedUnit>);

/// The registers that control guests (VF control MMIO).
pub struct GuestControls(pub Arc<EmulatedUnit>);

/// Which guest's registers of `len` bytes each `offset` is in, and where. Guests have numbers of 16 bits.
fn place(offset: u64, len: u64) -> (u16, u64) {
    let [b0, b1, ..] = (offset / len).to_le_bytes();
    (u16::from_le_bytes([b0, b1]), offset % len)
}

impl BusDevice for GuestPages {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (guest, at) = place(offset, VF_LEN);
        self.0.unit.vf_read(guest, at, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.catch_up();
        let (guest, at) = place(offset, VF_LEN);
        let effects = self.0.unit.vf_write(guest, at, data);
        self.0.perform(effects);
    }
}

impl BusDevice for GuestControls {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (guest, at) = place(offset, VF_CONTROL_LEN);
        self.0.unit.vf_control_read(guest, at, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.catch_up();
        let (guest, at) = place(offset, VF_CONTROL_LEN);
        let effects = self.0.unit.vf_control_write(guest, at, data);
        self.0.perform(effects);
    }
}

impl EmulatedUnit {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No guest has anything due any more.
    pub(super) fn forget_guests(&self) {
        *self.waiting() = Waiting::default();
    }

    /// Carry out some commands of one guest whose turn it is. One at a time: the event loop has other things to do.
    pub(super) fn run_a_guests_commands(&self) -> Effects {
        let next = self.waiting().next();
        let mut effects = next.map_or_else(Effects::default, |guest| self.unit.run_guest_commands(guest));
        // The others' turn comes, even if this one has nothing left.
        effects.more_commands |= !self.waiting().guests.is_empty();
        effects
    }

    /// Do what guests are owed; whether commands of any wait.
    pub(super) fn perform_for_guests(&self) -> bool {
        let mut more = false;
        for (guest, owed) in self.unit.take_owed() {
            if owed.more_commands {
                self.waiting().guests.insert(guest);
                more = true;
            }
            for (due, log) in [(owed.event, GuestLog::Event), (owed.ppr, GuestLog::Ppr)] {
                if due {
                    self.interrupt_guest(guest, log);
                }
            }
        }
        more
    }

    /// Send an interrupt of a guest. What is held back is lost, as nobody here waits for an entry to change.
    fn interrupt_guest(&self, guest: u16, log: GuestLog) {
        let (sent, effects) = self.unit.remap_guest_interrupt(guest, log);
        // Events of the unit's own, none of a guest's.
        self.perform(effects);
        // There is no virtual APIC here that a doorbell would wake: who reads the backing page finds what was posted.
        if let Some(GuestInterrupt::Message(delivery)) = sent {
            let Delivery {
                destination,
                logical,
                arbitrated,
                vector,
                ..
            } = delivery;
            let mode = if arbitrated { data::ARBITRATED } else { 0 };
            let message = MsiMessage::remapped(destination, logical, u32::from(vector) | mode);
            self.messages.signal(&self.own, message);
        }
    }
}
