//! A guest's command buffer: commands as the guest means them, and what the unit makes of that.

use std::cell::Cell;
use std::ops::Deref;

use super::maps::Broken;
use super::reach::Reached;
use super::{Guest, Guests};
use crate::iommu::amd::commands::{Command, Illegal};
use crate::iommu::amd::counters::Counters;
use crate::iommu::amd::events::Event;
use crate::iommu::amd::memory::{SystemMemory, Unreachable};
use crate::iommu::amd::pages::PageRange;
use crate::iommu::amd::processor::{Asked, COMMANDS_PER_CALL, Issuer, Seat, run_ring};
use crate::iommu::amd::registers::{Interrupts, Registers};
use crate::iommu::amd::window::Change;
use crate::iommu::amd::{Effects, Unit};
use crate::platform::addr::{Bdf, Gpa};

/// A guest's ring, while its commands are carried out.
struct GuestRing<'a, M> {
    unit: &'a Unit<M>,
    guests: &'a Guests,
    guest: &'a Guest,
    /// What the host is owed for being told of what is broken.
    owed: Cell<Effects>,
}

impl<M: SystemMemory> Unit<M> {
    /// Carry out commands that wait in the ring of `guest`.
    pub(super) fn run_commands_of(&self, guests: &Guests, guest: &Guest) -> Effects {
        let ring = GuestRing {
            unit: self,
            guests,
            guest,
            owed: Cell::default(),
        };
        let mut effects = run_ring(&ring);
        effects.join(ring.owed.take());
        effects.join(self.unbroken(guest, self.mark_clean(guests, guest)));
        effects
    }
}

impl<M: SystemMemory> GuestRing<'_, M> {
    /// Tell the host what is broken.
    fn broken(&self, broken: Broken) -> Unreachable {
        let mut owed = self.owed.take();
        owed.join(self.unit.unbroken(self.guest, Err(broken)));
        self.owed.set(owed);
        Unreachable
    }

    /// The guest's memory.
    fn memory(&self) -> Result<Reached<'_, M>, Unreachable> {
        let device = self.guest.translate_device();
        let at = device.requester_id().into();
        self.unit.reach(device).ok_or_else(|| self.broken(Broken { at }))
    }

    /// What the host calls the guest's `device`.
    fn device(&self, device: Bdf) -> Result<Option<Bdf>, Unreachable> {
        let found = self.unit.host_device(self.guests, self.guest, device);
        found.map_err(|broken| self.broken(broken))
    }

    /// What the host calls the guest's `domain`.
    fn domain(&self, domain: u16) -> Result<Option<u16>, Unreachable> {
        let found = self.unit.host_domain(self.guests, self.guest, domain);
        found.map_err(|broken| self.broken(broken))
    }

    /// All that the guest has, for INVALIDATE_IOMMU_ALL.
    fn everything(&self, each: &mut impl FnMut(Command)) -> Result<(), Unreachable> {
        let devices = self.unit.devices_of(self.guests, self.guest, |device| {
            each(Command::InvalidateDevice { device });
            each(Command::InvalidateInterrupts { device });
        });
        let domains = devices.and_then(|()| {
            self.unit.domains_of(self.guests, self.guest, |domain| {
                each(Command::InvalidatePages {
                    domain,
                    space: None,
                    pages: PageRange::Everything,
                    tables: true,
                });
            })
        });
        domains.map_err(|broken| self.broken(broken))
    }
}

impl<M: SystemMemory> Issuer for GuestRing<'_, M> {
    type Memory = M;

    fn unit(&self) -> &Unit<M> {
        self.unit
    }

    fn processor(&self) -> &Seat {
        &self.guest.processor
    }

    fn registers(&self) -> impl Deref<Target = Registers> + '_ {
        self.guest.registers()
    }

    fn change(&self) -> Change<'_> {
        self.guest.change()
    }

    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        let dirty = self.unit.mark_dirty(self.guests, self.guest);
        dirty.map_err(|broken| self.broken(broken))?;
        self.memory()?.read(at, data)
    }

    fn store(&self, at: Gpa, data: u64) -> Result<(), Unreachable> {
        self.memory()?.store(at, data)
    }

    fn parse(&self, raw: u128) -> Result<Asked, Illegal> {
        Command::parse(raw, &self.unit.features).map(Asked::Command)
    }

    fn mean(&self, command: Command, mut each: impl FnMut(Command)) -> Result<usize, Unreachable> {
        let meant = match command {
            Command::CompletionWait { .. } => None,
            Command::InvalidateDevice { device } => self
                .device(device)?
                .map(|device| Command::InvalidateDevice { device }),
            Command::InvalidatePages {
                domain,
                space,
                pages,
                tables,
            } => self.domain(domain)?.map(|domain| Command::InvalidatePages {
                domain,
                space,
                pages,
                tables,
            }),
            Command::InvalidateIotlb { device, space, pages } => self
                .device(device)?
                .map(|device| Command::InvalidateIotlb { device, space, pages }),
            Command::InvalidateInterrupts { device } => self
                .device(device)?
                .map(|device| Command::InvalidateInterrupts { device }),
            Command::Prefetch {
                device,
                space,
                first,
                count,
                invalidate,
            } => self.device(device)?.map(|device| Command::Prefetch {
                device,
                space,
                first,
                count,
                invalidate,
            }),
            Command::CompletePageRequest {
                device,
                pasid,
                group,
                response,
            } => self.device(device)?.map(|device| Command::CompletePageRequest {
                device,
                pasid,
                group,
                response,
            }),
            Command::InvalidateAll => {
                self.everything(&mut each)?;
                return Ok(COMMANDS_PER_CALL);
            }
        };
        meant.into_iter().for_each(each);
        Ok(0)
    }

    fn report(&self, event: &Event) -> Effects {
        let event = match *event {
            Event::IotlbInvalidationTimeout { device, .. } => {
                let name = self
                    .unit
                    .entry(device)
                    .map_or(0, |dte| dte.attribute.guest_device_id());
                event.renamed(Bdf::from_requester_id(name), 0)
            }
            other => other,
        };
        self.unit.log_event(self.guests, self.guest, event.record())
    }

    fn interrupted(&self, raised: Interrupts) -> Effects {
        self.guests.interrupted(self.guest.id, raised)
    }

    fn left(&self) -> Effects {
        self.guests.owe(self.guest.id, |owed| owed.more_commands = true)
    }

    fn counters(&self) -> &Counters {
        &self.guests.counters
    }
}
