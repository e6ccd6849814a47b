//! Guests' event logs and PPR logs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::maps::Broken;
use super::{Guest, Guests};
use crate::iommu::amd::events::Event;
use crate::iommu::amd::log::{Appended, Log};
use crate::iommu::amd::memory::SystemMemory;
use crate::iommu::amd::ppr::{Answer, PageRequest, record};
use crate::iommu::amd::registers::Registers;
use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::amd::spec::registers::{Control, Status};
use crate::iommu::amd::{Effects, Unit};
use crate::platform::addr::Bdf;

/// One of a guest's logs.
struct Which {
    log: fn(&mut Registers) -> &mut Log,
    runs: fn(&Registers) -> bool,
    logged: Status,
    overflowed: Status,
}

const EVENT: Which = Which {
    log: |registers| &mut registers.event,
    runs: Registers::event_log_runs,
    logged: Status::new().with_event_log_int(true),
    overflowed: Status::new().with_event_overflow(true),
};

const PPR: Which = Which {
    log: |registers| &mut registers.ppr,
    runs: Registers::ppr_log_runs,
    logged: Status::new().with_ppr_int(true),
    overflowed: Status::new().with_ppr_overflow(true),
};

impl<M: SystemMemory> Unit<M> {
    /// Whose device has the entry `dte`.
    fn guest_of(&self, dte: &Dte) -> Option<(&Guests, Arc<Guest>)> {
        let serves = Control::from_bits(self.control.load(Ordering::Acquire)).viommu_en();
        let owned = serves && dte.host.v() && dte.attribute.vimu_en();
        owned.then(|| self.guest(dte.attribute.guest_id())).flatten()
    }

    /// Tell the guest whose device `event` is about, by the names it knows; `None` when that is none.
    #[cold]
    pub(in crate::iommu::amd) fn report_to_guest(&self, event: &Event) -> Option<Effects> {
        self.guests.as_ref()?;
        let dte = self.entry(event.requester()?).ok()?;
        let (guests, guest) = self.guest_of(&dte)?;
        let device = Bdf::from_requester_id(dte.attribute.guest_device_id());
        let domain = event
            .domain()
            .map_or(Ok(None), |domain| self.guest_domain(guests, &guest, domain));
        let mut effects = Effects::default();
        let domain = domain.unwrap_or_else(|broken: Broken| {
            effects = self.unbroken(&guest, Err(broken));
            None
        });
        // A domain that the guest has no name for is one it never asked for.
        let event = event.renamed(device, domain.unwrap_or(0));
        effects.join(self.log_event(guests, &guest, event.record()));
        Some(effects)
    }

    /// Append a record to the event log of `guest`.
    pub(super) fn log_event(&self, guests: &Guests, guest: &Guest, record: u128) -> Effects {
        guests.counters.event(record);
        self.append(guests, guest, &EVENT, record).1
    }

    /// Append a record to a log of `guest`; what became of it if the log runs.
    fn append(
        &self,
        guests: &Guests,
        guest: &Guest,
        which: &Which,
        record: u128,
    ) -> (Option<Appended>, Effects) {
        let memory = self.reach(guest.translate_device());
        let mut registers = guest.change();
        if !(which.runs)(&registers) {
            return (None, Effects::default());
        }
        let Some(memory) = memory else {
            drop(registers);
            let at = guest.translate_device().requester_id().into();
            return (
                Some(Appended::Unreachable),
                self.unbroken(guest, Err(Broken { at })),
            );
        };
        let log = (which.log)(&mut registers);
        let at = log.ring.slot(log.ring.tail());
        let appended = log.append(&memory, record);
        match appended {
            Appended::Logged => registers.latch(which.logged),
            Appended::Overflowed => registers.latch(which.overflowed),
            Appended::Unreachable => {
                drop(registers);
                let event = Event::GuestEventFault { guest: guest.id, at };
                return (Some(appended), self.report(&event));
            }
        }
        let raised = registers.take_interrupts();
        drop(registers);
        (Some(appended), guests.interrupted(guest.id, raised))
    }

    /// Put a page request of a device with the entry `dte` in its guest's log; `None` when it is no guest's.
    pub(in crate::iommu::amd) fn page_request_of_guest(
        &self,
        dte: &Dte,
        request: &PageRequest,
    ) -> Option<(Answer, Effects)> {
        let (guests, guest) = self.guest_of(dte)?;
        let renamed = PageRequest {
            device: Bdf::from_requester_id(dte.attribute.guest_device_id()),
            ..*request
        };
        let (appended, effects) = self.append(guests, &guest, &PPR, record(&renamed));
        let answer = match appended {
            Some(Appended::Logged) => Answer::Later,
            Some(Appended::Overflowed | Appended::Unreachable) | None => Answer::Failure,
        };
        Some((answer, effects))
    }
}
