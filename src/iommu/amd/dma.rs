//! Requests of devices on their way through the unit (sections 2.1 and 2.2).

use std::cell::Cell;
use std::sync::atomic::Ordering;

use super::device_table::{Decision, decide, locate};
use super::events::{Event, Kind, PageFault, Source, Tag};
use super::grace::Inside;
use super::iotlb::{Key, Seen, Space, Ticket};
use super::memory::SystemMemory;
use super::registers::Exclusion;
use super::remap::{Lost, Remapped, Remapping, is_interrupt};
use super::request::{Access, AtsCompletion, Pasid, Request, Translation};
use super::spec::dte::Dte;
use super::spec::registers::{Control, ExclusionBase};
use super::walk::{Leaf, Stopped, Why};
use super::{Effects, NoEntry, Unit};
use crate::platform::addr::{Bdf, Gpa, Iova, PAGE_SIZE};
use crate::platform::msi::MsiMessage;

/// First address of the interrupt window.
const WINDOW: u64 = 0xfee0_0000;

/// A request that was aborted. Boxed where it is returned: what a hit returns is copied as it is large.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Abort {
    /// Why; `None` where nothing is ever reported.
    pub event: Option<Event>,
    /// What the unit owes the machine for reporting it.
    pub effects: Effects,
}

/// Requests in flight: translations stay in force until this is dropped.
pub struct InFlight<'a, M> {
    unit: &'a Unit<M>,
    /// What was decided last. A request like that one need not be decided again: a changed entry is waited for as a
    /// changed page is.
    decided: Cell<Option<Decided>>,
    /// Counts hits.
    inside: Inside<'a>,
}

/// That tables translate requests of a device, whatever their addresses.
#[derive(Clone, Copy)]
struct Decided {
    requester: Bdf,
    pasid: Option<Pasid>,
    privileged: bool,
    lookup: Lookup,
}

/// How the cache is asked.
#[derive(Clone, Copy)]
struct Lookup {
    seen: Seen,
    /// What the entry allows.
    allowed: Access,
    user: bool,
}

/// Under which key tables are cached, what the entry allows, and whether a user asks.
#[derive(Clone, Copy)]
struct CachedAs {
    key: Key,
    allowed: Access,
    user: bool,
}

impl Decided {
    /// Whether it is about `request` as well.
    #[inline]
    fn is_about(&self, request: &Request) -> bool {
        self.requester == request.requester
            && self.pasid == request.pasid
            && self.privileged == request.privileged
            && self.lookup.allowed.allows(request.access)
    }
}

impl<'a, M: SystemMemory> InFlight<'a, M> {
    #[inline]
    pub(super) fn new(unit: &'a Unit<M>) -> Self {
        Self {
            unit,
            decided: Cell::new(None),
            inside: unit.grace.enter(),
        }
    }

    /// Where the first byte of `request` lies, and how far that holds. An access over several pages asks for
    /// each, and for all before it touches the first.
    #[inline]
    pub fn translate(&self, request: &Request) -> Result<Translation, Box<Abort>> {
        let decided = self.decided.get().filter(|decided| decided.is_about(request));
        if let Some(Decided { lookup, .. }) = decided
            && !is_interrupt(request.at.0)
            && let Some(hit) = self.find(lookup, request)
        {
            return Ok(hit);
        }
        self.translate_anew(request)
    }

    /// The same, from the registers on. Apart, so that callers have hits inline.
    #[inline(never)]
    fn translate_anew(&self, request: &Request) -> Result<Translation, Box<Abort>> {
        let unit = self.unit;
        // Registers may have changed since: nothing of before outlives a request that heeds them.
        self.decided.set(None);
        // Before anything is read by which a walk goes.
        let ticket = unit.iotlb.ticket();
        let control = Control::from_bits(unit.control.load(Ordering::Acquire));
        if !control.iommu_en() {
            return Ok(untranslated(request.at, Access::BOTH, u64::MAX));
        }
        if request.pasid.is_none() && is_interrupt(request.at.0) {
            return Err(unit.interrupt_range(request));
        }
        let dte = unit
            .entry(request.requester)
            .map_err(|none| unit.no_entry(request, none))?;
        let exclusion = unit.exclusion();
        match decide(control, exclusion, &dte, request) {
            Decision::Forward if !dte.host.v() => Ok(untranslated(request.at, Access::BOTH, u64::MAX)),
            // Excluded: the next page may not be.
            Decision::Forward => Ok(untranslated(request.at, Access::BOTH, PAGE_SIZE - 1)),
            Decision::Identity(allowed) => Ok(untranslated(request.at, allowed, u64::MAX)),
            decision => {
                let Some(CachedAs { key, allowed, user }) = cached_as(&decision) else {
                    // Copies, so that hits need neither in memory.
                    let (dte, decision) = (dte, decision);
                    return Err(unit.refuse(request, &dte, &decision));
                };
                let lookup = Lookup {
                    seen: unit.iotlb.seen(key),
                    allowed,
                    user,
                };
                // Where a range is excluded, the next address may be in it.
                if !exclusion.base.enable() {
                    self.decided.set(Some(Decided {
                        requester: request.requester,
                        pasid: request.pasid,
                        privileged: request.privileged,
                        lookup,
                    }));
                }
                match self.find(lookup, request) {
                    Some(hit) => Ok(hit),
                    None => {
                        // Copies, so that hits need neither in memory.
                        let (dte, decision) = (dte, decision);
                        unit.miss(request, &dte, &decision, allowed, ticket)
                    }
                }
            }
        }
    }

    /// What the cache has for `request`.
    #[inline(always)]
    fn find(&self, lookup: Lookup, request: &Request) -> Option<Translation> {
        let hit = self
            .unit
            .iotlb
            .find(lookup.seen, request.at.0, request.access, lookup.user)?;
        self.inside.count();
        Some(Translation {
            target: Gpa(hit.target),
            run: hit.run,
            allowed: hit.allowed.and(lookup.allowed),
        })
    }

    /// Check that all `len` bytes of a request can be reached, before any of them is. A request that wraps
    /// around the end of the address space reaches nothing.
    pub fn check(&self, request: &Request, len: u64) -> Result<(), Box<Abort>> {
        let mut at = request.at.0;
        let mut left = len;
        while left > 0 {
            let reached = self.translate(&request.moved_to(Iova(at)))?.run.min(left);
            left -= reached;
            match at.checked_add(reached) {
                Some(next) => at = next,
                None if left == 0 => {}
                None => return Err(self.unit.wrapped(request)),
            }
        }
        Ok(())
    }

    /// A translation request (ATS). What the tables do not map is answered with no permission and never
    /// reported; an `Abort` is an unsupported-request completion (section 2.1.3.2).
    pub fn translate_for_device(&self, request: &Request) -> Result<AtsCompletion, Box<Abort>> {
        self.unit.ats(request)
    }

    /// Whether a request with an address that the device translated itself may pass (ATS, section 2.1.3).
    pub fn check_translated(&self, request: &Request) -> Result<(), Box<Abort>> {
        let unit = self.unit;
        if !Control::from_bits(unit.control.load(Ordering::Acquire)).iommu_en() {
            return Ok(());
        }
        let dte = unit
            .entry(request.requester)
            .map_err(|none| unit.no_entry(request, none))?;
        if dte.host.v() && dte.guest.iotlb() && !is_interrupt(request.at.0) {
            return Ok(());
        }
        let source = Source::of(request, Kind::Memory, 0);
        Err(unit.abort(Event::InvalidDeviceRequest { source, kind: 1 }))
    }

    /// What becomes of a message of `device`. The guard is kept until the interrupt has gone out.
    pub fn remap(&self, device: Bdf, message: MsiMessage) -> Result<Remapped, Box<Abort>> {
        self.remapped(device, message)
            .map_err(|Lost { event }| event.map_or_else(Abort::silently, |event| self.unit.abort(event)))
    }

    /// What would become of a message of `device`, for a route that is made before it is sent. Nothing is
    /// reported; `None` where it would go nowhere.
    #[must_use]
    pub fn route(&self, device: Bdf, message: MsiMessage) -> Option<Remapped> {
        self.remapped(device, message).ok()
    }

    fn remapped(&self, device: Bdf, message: MsiMessage) -> Result<Remapped, Lost> {
        let unit = self.unit;
        if !is_interrupt(message.address) {
            return Ok(Remapped::MemoryWrite);
        }
        let control = Control::from_bits(unit.control.load(Ordering::Acquire));
        if !control.iommu_en() {
            return Ok(Remapped::Unchanged);
        }
        let dte = unit
            .entry(device)
            .map_err(|none| no_interrupt_entry(device, message, none))?;
        let remapping = Remapping {
            device,
            message,
            dte: &dte,
            control,
        };
        remapping.outcome(&unit.memory)
    }
}

impl Abort {
    fn silently() -> Box<Self> {
        Box::new(Self {
            event: None,
            effects: Effects::default(),
        })
    }
}

/// A request that keeps its address, up to where the bits of `within` are all ones and not into the
/// interrupt window.
const fn untranslated(at: Iova, allowed: Access, within: u64) -> Translation {
    let end_of_block = at.0 | within;
    let last = if at.0 < WINDOW && end_of_block >= WINDOW {
        WINDOW - 1
    } else {
        end_of_block
    };
    Translation {
        target: Gpa(at.0),
        run: (last - at.0).saturating_add(1),
        allowed,
    }
}

/// Under which key the tables of a decision are cached; `None` where it has none.
#[inline]
fn cached_as(decision: &Decision) -> Option<CachedAs> {
    match decision {
        Decision::Host { domain, allowed, .. } => {
            let space = Space::Host;
            let domain = *domain;
            Some(CachedAs {
                key: Key { domain, space },
                allowed: *allowed,
                user: false,
            })
        }
        Decision::Guest {
            domain,
            allowed,
            table,
        } => {
            let nested = table.host.is_some();
            let pasid = table.pasid;
            let space = Space::Guest { pasid, nested };
            let domain = *domain;
            Some(CachedAs {
                key: Key { domain, space },
                allowed: *allowed,
                user: table.user,
            })
        }
        _ => None,
    }
}

impl<M: SystemMemory> Unit<M> {
    /// The exclusion range, if there is one.
    #[inline]
    fn exclusion(&self) -> Exclusion {
        let base = ExclusionBase::from_bits(self.exclusion.load(Ordering::Acquire));
        if base.enable() {
            self.configuration().exclusion
        } else {
            Exclusion::default()
        }
    }

    /// Report `event` and abort the request it is about.
    #[cold]
    fn abort(&self, event: Event) -> Box<Abort> {
        Box::new(Abort {
            event: Some(event),
            effects: self.report_request(&event),
        })
    }

    /// A memory request into the interrupt window: messages come by another way, and nothing else is
    /// allowed there (section 2.5.9).
    #[cold]
    fn interrupt_range(&self, request: &Request) -> Box<Abort> {
        let source = Source::of(request, Kind::Memory, 0);
        let kind = if request.access.read { 0 } else { 6 };
        self.abort(Event::InvalidDeviceRequest { source, kind })
    }

    /// A request that runs past the last address.
    #[cold]
    fn wrapped(&self, request: &Request) -> Box<Abort> {
        let source = Source::of(&request.moved_to(Iova(0)), Kind::Memory, 0);
        let fault = PageFault::NotPresent;
        self.abort(Event::PageFault { source, fault })
    }

    #[cold]
    fn no_entry(&self, request: &Request, none: NoEntry) -> Box<Abort> {
        let source = Source::of(request, Kind::Memory, 0);
        self.abort(missing(source, none))
    }

    /// Walk for a request that the cache did not answer.
    fn miss(
        &self,
        request: &Request,
        dte: &Dte,
        decision: &Decision,
        allowed: Access,
        ticket: Ticket,
    ) -> Result<Translation, Box<Abort>> {
        match self.walk_and_keep(ticket, decision, request) {
            Some(Ok(leaf)) => {
                let size = 1 << leaf.shift;
                Ok(Translation {
                    target: Gpa(leaf.target(request.at.0)),
                    run: size - (request.at.0 & (size - 1)),
                    allowed: leaf.allowed.and(allowed),
                })
            }
            Some(Err(stopped)) => Err(self.page_fault(request, dte, &stopped)),
            None => Err(self.refuse(request, dte, decision)),
        }
    }

    /// Walk the tables of `decision` and keep what was found; `None` where it has none. The `ticket` is older than all by
    /// which it was decided.
    pub(super) fn walk_and_keep(
        &self,
        ticket: Ticket,
        decision: &Decision,
        request: &Request,
    ) -> Option<Result<Leaf, Stopped>> {
        let CachedAs { key, .. } = cached_as(decision)?;
        let found = self.walk(decision, request)?;
        if let Ok(leaf) = &found {
            self.iotlb.keep(ticket, key, request.at.0, leaf);
        }
        Some(found)
    }

    /// Walk the tables of `decision`; `None` where it has none.
    fn walk(&self, decision: &Decision, request: &Request) -> Option<Result<Leaf, Stopped>> {
        let Request { at, access, .. } = *request;
        let found = match decision {
            Decision::Host { table, .. } => table.walk(&self.memory, at.0, access),
            Decision::Guest { table, .. } => table.walk(&self.memory, at.0, access),
            _ => return None,
        };
        self.counters.walk();
        Some(found)
    }

    /// A request that its device's entry forbids, tables aside.
    #[cold]
    fn refuse(&self, request: &Request, dte: &Dte, decision: &Decision) -> Box<Abort> {
        let source = Source::of(request, Kind::Memory, dte.guest.domain());
        let fault = |fault| self.suppressible(dte, Event::PageFault { source, fault }, Self::report_request);
        match decision {
            Decision::Denied => fault(PageFault::Denied),
            Decision::Reserved | Decision::Illegal => self.abort(Event::IllegalDeviceTableEntry {
                source,
                reserved: *decision == Decision::Reserved,
            }),
            _ => fault(PageFault::NotPresent),
        }
    }

    #[cold]
    fn page_fault(&self, request: &Request, dte: &Dte, stopped: &Stopped) -> Box<Abort> {
        let mut source = Source::of(request, Kind::Memory, dte.guest.domain());
        if cached_as_guest(request, dte) {
            source.tag = Tag::Space(request.pasid.unwrap_or_default());
        }
        // A host table under a guest's is asked for the guest's physical addresses, in the domain.
        if let Some(at) = stopped.host {
            source.tag = Tag::Domain(dte.guest.domain());
            source.address = at;
        }
        let tell = if stopped.host.is_some() {
            // Host tables are the host's, whosever device it is.
            Self::report
        } else {
            Self::report_request
        };
        match fault_of(stopped.why) {
            Ok(fault) => self.suppressible(dte, Event::PageFault { source, fault }, tell),
            Err(at) => self.abort(Event::PageTableHardwareError { source, at }),
        }
    }

    /// Report that `address` is not present for requests of `device` without PASID, whatever its tables say: they go by a copy
    /// of these, which has nothing there. The record is that of an access of which `access` was asked.
    pub fn absent_in_copy(&self, device: Bdf, address: Iova, access: Access) -> Effects {
        let Ok(dte) = self.entry(device) else {
            // Whoever has no entry has no copy of tables.
            return Effects::default();
        };
        let stopped = Stopped {
            why: Why::NotPresent,
            host: None,
        };
        let request = Request::plain(device, address, access);
        self.page_fault(&request, &dte, &stopped).effects
    }

    /// Report that requests of `device` reach nothing, whatever its entry lets them: whoever serves them could not do what that
    /// says. The record is that of an entry that could not be read.
    pub fn entry_not_obeyed(&self, device: Bdf) -> Effects {
        let Some(at) = locate(&self.configuration(), device) else {
            return Effects::default();
        };
        let request = Request::plain(device, Iova(0), Access::NONE);
        let source = Source::of(&request, Kind::Memory, 0);
        self.report_request(&Event::DeviceTableHardwareError { source, at })
    }

    /// Abort for a page fault of a memory request, which the device's entry may keep from the log.
    fn suppressible(
        &self,
        dte: &Dte,
        event: Event,
        tell: impl FnOnce(&Self, &Event) -> Effects,
    ) -> Box<Abort> {
        let (all, repeated) = (dte.guest.sa(), dte.guest.se());
        let silent = |device| all || repeated && !self.is_first_fault(device);
        let effects = match event {
            Event::PageFault { source, .. } if silent(source.device) => Effects::default(),
            _ => tell(self, &event),
        };
        Box::new(Abort {
            event: Some(event),
            effects,
        })
    }

    /// Answer a translation request.
    fn ats(&self, request: &Request) -> Result<AtsCompletion, Box<Abort>> {
        let control = Control::from_bits(self.control.load(Ordering::Acquire));
        if !control.iommu_en() {
            return Err(Abort::silently());
        }
        let source = Source::of(request, Kind::Translation, 0);
        let invalid = |kind| self.abort(Event::InvalidDeviceRequest { source, kind });
        if request.pasid.is_none() && is_interrupt(request.at.0) {
            return Err(invalid(1));
        }
        let dte = match self.entry(request.requester) {
            Ok(dte) => dte,
            Err(NoEntry::Beyond) => return Err(invalid(2)),
            Err(none) => return Err(self.abort(missing(source, none))),
        };
        if !dte.host.v() || !dte.host.tv() || !dte.guest.iotlb() {
            return Err(invalid(0));
        }
        let probe = Request {
            access: Access::NONE,
            ..*request
        };
        let decision = decide(control, self.exclusion(), &dte, &probe);
        let (rights, leaf) = match decision {
            Decision::Forward => return Ok(identity(request.at, Access::BOTH)),
            Decision::Identity(allowed) => return Ok(identity(request.at, allowed)),
            Decision::Reserved | Decision::Illegal => {
                let reserved = decision == Decision::Reserved;
                return Err(self.abort(Event::IllegalDeviceTableEntry { source, reserved }));
            }
            _ => match (cached_as(&decision), self.walk(&decision, &probe)) {
                (Some(CachedAs { allowed, .. }), Some(Ok(leaf))) => (allowed, leaf),
                _ => return Ok(nothing(request.at)),
            },
        };
        let mut allowed = leaf.allowed.and(rights);
        if allowed.write && !leaf.settled {
            // Whoever may write later marks the page now, or may not write.
            let write = Request {
                access: Access::WRITE,
                ..*request
            };
            let marked = request.access.write && matches!(self.walk(&decision, &write), Some(Ok(_)));
            allowed.write = marked;
        }
        Ok(AtsCompletion {
            target: Gpa(leaf.base),
            shift: leaf.shift,
            allowed,
            untranslated_only: leaf.untranslated_only,
        })
    }
}

/// Whether the guest table translates this request.
const fn cached_as_guest(request: &Request, dte: &Dte) -> bool {
    dte.host.gv() && (request.pasid.is_some() || dte.host.giov())
}

/// What a walk's end is called in the log; an entry's address where memory did not answer.
const fn fault_of(why: Why) -> Result<PageFault, Gpa> {
    Ok(match why {
        Why::NotPresent => PageFault::NotPresent,
        Why::Denied => PageFault::Denied,
        Why::Supervisor => PageFault::Supervisor,
        Why::Malformed => PageFault::Malformed,
        Why::Reserved => PageFault::Reserved,
        Why::Unreadable(at) => return Err(at),
    })
}

/// A message of a device without an entry.
const fn no_interrupt_entry(device: Bdf, message: MsiMessage, none: NoEntry) -> Lost {
    let source = Source {
        device,
        address: message.address,
        tag: Tag::Domain(0),
        write: false,
        kind: Kind::Interrupt,
    };
    Lost {
        event: Some(missing(source, none)),
    }
}

/// A request of a device without an entry. Software that is told of an illegal entry looks it up, so a device
/// past the end of the table is a page fault instead.
const fn missing(source: Source, none: NoEntry) -> Event {
    match none {
        NoEntry::Beyond => Event::PageFault {
            source,
            fault: PageFault::NotPresent,
        },
        NoEntry::Unreadable(at) => Event::DeviceTableHardwareError { source, at },
    }
}

/// The page of an address that is not translated.
const fn identity(at: Iova, allowed: Access) -> AtsCompletion {
    AtsCompletion {
        target: Gpa(at.0 & !(PAGE_SIZE - 1)),
        shift: 12,
        allowed,
        untranslated_only: false,
    }
}

/// The answer where the tables map nothing.
const fn nothing(at: Iova) -> AtsCompletion {
    identity(at, Access::NONE)
}
