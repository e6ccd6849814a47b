//! The unit as the agent of functions that speak translation services with it.

use std::ops::Range;

use super::dma::{Abort, InFlight};
use super::memory::SystemMemory;
use super::ppr::{Answer, PageRequest};
use super::request::{AtsCompletion, Request};
use super::{Effects, Unit};
use crate::iommu::agent::{AddressType, Refused, TranslationAgent};
use crate::platform::addr::{Gpa, Iova};

/// Whoever has a unit and carries out what it owes the machine: with that it is a translation agent.
pub trait UnitOwner: Send + Sync {
    /// What the unit works on, and translates to.
    type Memory: SystemMemory;

    /// The unit.
    fn unit(&self) -> &Unit<Self::Memory>;

    /// Carry out what it owes. Nothing of the caller's is in flight.
    fn perform(&self, effects: Effects);
}

/// Do `f` with requests in flight, and have what an abort owes carried out afterwards.
fn in_flight<O: UnitOwner + ?Sized, T>(
    owner: &O,
    f: impl FnOnce(&InFlight<'_, O::Memory>) -> Result<T, Box<Abort>>,
) -> Result<T, Refused> {
    let outcome = f(&owner.unit().begin());
    outcome.map_err(|abort| {
        owner.perform(abort.effects);
        Refused
    })
}

/// Call `each` with where each part of `len` bytes of `request` lies and its place among them, once all may be
/// accessed. Memory that does not answer, for which `each` says `false`, refuses as well.
fn access<O: UnitOwner + ?Sized>(
    owner: &O,
    request: &Request,
    address: AddressType,
    len: usize,
    mut each: impl FnMut(&O::Memory, Gpa, Range<usize>) -> bool,
) -> Result<(), Refused> {
    let memory = &owner.unit().memory;
    let answered = in_flight(owner, |bus| {
        if address == AddressType::Translated {
            bus.check_translated(request)?;
            return Ok(each(memory, Gpa(request.at.0), 0..len));
        }
        bus.check(request, len as u64)?;
        let mut done = 0;
        while done < len {
            // Checked above not to wrap.
            let at = Iova(request.at.0.wrapping_add(done as u64));
            let found = bus.translate(&request.moved_to(at))?;
            let run = usize::try_from(found.run).unwrap_or(usize::MAX).min(len - done);
            if !each(memory, found.target, done..done + run) {
                return Ok(false);
            }
            done += run;
        }
        Ok(true)
    })?;
    if answered { Ok(()) } else { Err(Refused) }
}

impl<O: UnitOwner + ?Sized> TranslationAgent for O {
    fn translate(&self, request: &Request) -> Result<AtsCompletion, Refused> {
        in_flight(self, |bus| bus.translate_for_device(request))
    }

    fn read(&self, request: &Request, address: AddressType, data: &mut [u8]) -> Result<(), Refused> {
        access(self, request, address, data.len(), |memory, at, part| {
            memory.read(at, &mut data[part]).is_ok()
        })
    }

    fn write(&self, request: &Request, address: AddressType, data: &[u8]) -> Result<(), Refused> {
        access(self, request, address, data.len(), |memory, at, part| {
            memory.write(at, &data[part]).is_ok()
        })
    }

    fn page_request(&self, request: &PageRequest) -> Answer {
        let (answer, effects) = self.unit().page_request(request);
        self.perform(effects);
        answer
    }
}
