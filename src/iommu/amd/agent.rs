//! The unit as the agent of functions that speak translation services with it.

use std::sync::Arc;

use super::dma::{Abort, InFlight};
use super::memory::SystemMemory;
use super::ppr::{Answer, PageRequest};
use super::request::{AtsCompletion, Request};
use super::{Effects, Unit};
use crate::iommu::agent::{AddressType, Refused, TranslationAgent};
use crate::platform::addr::{Gpa, Iova};

/// A unit with whoever carries out its effects.
pub struct UnitAgent<M, F> {
    unit: Arc<Unit<M>>,
    owner: F,
}

impl<M: SystemMemory, F: Fn(Effects)> UnitAgent<M, F> {
    /// The agent `unit`; `owner` carries out what it owes the machine, with nothing in flight.
    pub const fn new(unit: Arc<Unit<M>>, owner: F) -> Self {
        Self { unit, owner }
    }

    /// Do `f` with requests in flight, and have an abort carried out afterwards.
    fn in_flight<T>(&self, f: impl FnOnce(&InFlight<'_, M>) -> Result<T, Abort>) -> Result<T, Refused> {
        let outcome = f(&self.unit.begin());
        outcome.map_err(|abort| {
            (self.owner)(abort.effects);
            Refused
        })
    }

    /// Call `each` with where each part of `len` bytes of `request` lies and its place among them, once all may be
    /// accessed. `false` where memory did not answer.
    fn access(
        &self,
        request: &Request,
        address: AddressType,
        len: usize,
        mut each: impl FnMut(Gpa, std::ops::Range<usize>) -> bool,
    ) -> Result<(), Refused> {
        let answered = self.in_flight(|bus| {
            if address == AddressType::Translated {
                bus.check_translated(request)?;
                return Ok(each(Gpa(request.at.0), 0..len));
            }
            bus.check(request, len as u64)?;
            let mut done = 0;
            while done < len {
                // Checked above not to wrap.
                let at = Iova(request.at.0.wrapping_add(done as u64));
                let found = bus.translate(&request.moved_to(at))?;
                let run = usize::try_from(found.run).unwrap_or(usize::MAX).min(len - done);
                if !each(found.target, done..done + run) {
                    return Ok(false);
                }
                done += run;
            }
            Ok(true)
        })?;
        if answered { Ok(()) } else { Err(Refused) }
    }
}

impl<M, F> TranslationAgent for UnitAgent<M, F>
where
    M: SystemMemory + Send + Sync,
    F: Fn(Effects) + Send + Sync,
{
    fn translate(&self, request: &Request) -> Result<AtsCompletion, Refused> {
        self.in_flight(|bus| bus.translate_for_device(request))
    }

    fn read(&self, request: &Request, address: AddressType, data: &mut [u8]) -> Result<(), Refused> {
        self.access(request, address, data.len(), |at, part| {
            self.unit.memory.read(at, &mut data[part]).is_ok()
        })
    }

    fn write(&self, request: &Request, address: AddressType, data: &[u8]) -> Result<(), Refused> {
        self.access(request, address, data.len(), |at, part| {
            self.unit.memory.write(at, &data[part]).is_ok()
        })
    }

    fn page_request(&self, request: &PageRequest) -> Answer {
        let (answer, effects) = self.unit.page_request(request);
        (self.owner)(effects);
        answer
    }
}
