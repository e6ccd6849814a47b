//! Requests of functions on their way through a unit, as [`Translations`].

use std::cell::Cell;

use vm_memory::Permissions;

use super::Effects;
use super::agent::UnitOwner;
use super::dma::InFlight;
use super::request::{Access, Request};
use crate::platform::addr::{Bdf, Iova};
use crate::platform::dma::{Run, Translations};

/// Requests in flight through a unit. Its owner carries out what refusals set off once they no longer are.
pub struct Passing<'a, O: UnitOwner + ?Sized> {
    owner: &'a O,
    /// `None` only while this is dropped.
    bus: Option<InFlight<'a, O::Memory>>,
    /// What refusals set off.
    owed: Cell<Effects>,
}

impl<'a, O: UnitOwner + ?Sized> Passing<'a, O> {
    /// Requests pass the unit of `owner` until this is dropped.
    pub fn begin(owner: &'a O) -> Self {
        Self {
            owner,
            bus: Some(owner.unit().begin()),
            owed: Cell::default(),
        }
    }
}

impl<O: UnitOwner + ?Sized> Translations for Passing<'_, O> {
    fn translate(&self, requester: Bdf, at: Iova, access: Permissions) -> Option<Run> {
        let bus = self.bus.as_ref().expect("a passage is open until it is dropped");
        let access = Access::new(access.allow(Permissions::Read), access.allow(Permissions::Write));
        match bus.translate(&Request::plain(requester, at, access)) {
            Ok(found) => Some(Run {
                target: found.target,
                len: found.run,
            }),
            Err(abort) => {
                let mut owed = self.owed.take();
                owed.join(abort.effects);
                self.owed.set(owed);
                None
            }
        }
    }
}

impl<O: UnitOwner + ?Sized> Drop for Passing<'_, O> {
    fn drop(&mut self) {
        self.bus = None;
        self.owner.perform(self.owed.take());
    }
}
