//! What the host does for the unit at present, and bringing it to what the guest says.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::asking::{Asking, Leftovers};
use super::counters::Count;
use super::following::Followed;
use super::host::{HardwareErrors, ObjectId, QueueKind};
use super::intent::{Intent, Refusal, judge};
use super::interrupts::{self, Routes};
use super::rings::{self, Rings};
use crate::iommu::amd::device_table::{fetch, locate};
use crate::iommu::amd::features::Features;
use crate::iommu::amd::registers::Configuration;
use crate::iommu::amd::spec::dte::Dte;
use crate::platform::addr::{Bdf, Gpa, GpaRange, PAGE_SIZE};
use crate::platform::dma::Requester;
use crate::platform::memory::GuestRam;
use crate::{guest_line, guest_warn};

/// What the registers say to the host.
pub(super) struct Said {
    pub(super) configuration: Configuration,
    pub(super) rings: rings::Wanted,
    pub(super) routes: interrupts::Wanted,
}

/// The guest's memory, as far as it says something to the host.
pub(super) struct Table<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) features: &'a Features,
}

impl Table<'_> {
    /// The page that holds the entry of `device`, where the unit is on and the page is RAM.
    pub(super) fn page(&self, configuration: &Configuration, device: Bdf) -> Option<Gpa> {
        if !configuration.control.iommu_en() {
            return None;
        }
        let at = locate(configuration, device)?;
        let page = Gpa(at.0 & !(PAGE_SIZE - 1));
        let whole = GpaRange::new(page, PAGE_SIZE)?;
        self.ram
            .ranges()
            .any(|range| range.contains_range(whole))
            .then_some(page)
    }

    /// What the entry of `device` asks for now, the unit being on.
    fn intent(&self, configuration: &Configuration, device: Bdf) -> Intent {
        let Some(at) = locate(configuration, device) else {
            return Intent::Blocked;
        };
        match fetch(self.ram, at) {
            Ok(dte) => judge(configuration.control, self.features, &dte),
            Err(_) => Intent::Refused(Refusal::NoMemory { at }),
        }
    }
}

/// Where the entry of a function lies, if it has one: 32 bytes.
pub(super) fn entry(configuration: &Configuration, device: Bdf) -> Option<GpaRange> {
    GpaRange::new(locate(configuration, device)?, Dte::LEN)
}

/// The host's side of the unit.
pub(super) struct Service {
    rings: Rings,
    routes: Routes,
    functions: Vec<Followed>,
    leftovers: Leftovers,
    /// Pages of the device table whose stores are noticed.
    pub(super) watched: BTreeSet<Gpa>,
    /// What could not be watched when it was last tried.
    pub(super) unwatchable: Option<BTreeSet<Gpa>>,
    /// Somebody is changing what is watched, and brings everything afterwards.
    pub(super) rewatching: bool,
    /// What serves the guest did not answer there: the unit is stopped until the guest switches it off.
    broken_at: Option<u64>,
}

impl Service {
    /// Functions that are attached to guest physical memory, and nothing else.
    pub(super) fn new(functions: Vec<Followed>) -> Self {
        Self {
            rings: Rings::default(),
            routes: Routes::default(),
            functions,
            leftovers: Leftovers::default(),
            watched: BTreeSet::new(),
            unwatchable: None,
            rewatching: false,
            broken_at: None,
        }
    }

    /// Bring the host to what the guest says. Names come first, since commands that wait in a ring use them; rings before
    /// functions, so that what is wrong with an entry can be reported.
    pub(super) fn bring(&mut self, said: &Said, table: &Table<'_>, asking: &Asking) {
        self.leftovers.retry(asking);
        if !said.configuration.control.iommu_en() && self.broken_at.take().is_some() {
            // Where that is not supported, the driver clears them itself.
            let _ = asking.put_page_back();
        }
        if self.broken_at.is_some() {
            self.rest(&said.configuration, table, asking);
            return;
        }
        if said.configuration.control.iommu_en() {
            for function in &mut self.functions {
                function.forget_old_name(asking, &mut self.leftovers);
            }
            self.functions
                .iter_mut()
                .for_each(|function| function.name(asking));
        }
        self.routes.bring(&said.routes, asking);
        self.rings.bring(&said.rings, asking);
        self.follow(&said.configuration, table, asking, |_| true);
    }

    /// The host's unit had `errors` with the guest's. If what serves it does not answer, it is stopped: rings are off and
    /// functions reach nothing until the guest switches it off, and on again, as after a hardware error of its own. Registers
    /// answer as before. All ones, as of a device that is gone, would keep Linux's handler in a loop that clears Status.
    pub(super) fn hear(&mut self, errors: HardwareErrors, asking: &Asking) {
        let HardwareErrors {
            lost_records,
            broken_at,
        } = errors;
        if lost_records > 0 {
            asking.counters.add_many(Count::LostRecords, lost_records);
            guest_warn!(
                iommu = asking.name,
                lost_records,
                "the host's IOMMU cannot write to a guest's log"
            );
        }
        if let Some(at) = broken_at.filter(|_| self.broken_at.is_none()) {
            asking.counters.add(Count::Stops);
            guest_line!(
                error,
                iommu = asking.name,
                at = format_args!("{at:#x}"),
                "the host's IOMMU cannot read what it needs to serve a guest: its rings are off and its functions blocked until the guest switches its IOMMU off"
            );
            self.broken_at = Some(at);
        }
    }

    /// Bring the host to a unit that is stopped. Names go too: making them anew is what may mend it.
    fn rest(&mut self, configuration: &Configuration, table: &Table<'_>, asking: &Asking) {
        self.rings.bring(&rings::Wanted::default(), asking);
        self.follow(configuration, table, asking, |_| true);
        for function in &mut self.functions {
            function.forget_name(asking, &mut self.leftovers);
        }
    }

    /// Where interrupts go changed.
    pub(super) fn bring_routes(&mut self, wanted: &interrupts::Wanted, asking: &Asking) {
        self.routes.bring(wanted, asking);
    }

    /// Read the entries again that `touched` says, by where they lie.
    pub(super) fn follow(
        &mut self,
        configuration: &Configuration,
        table: &Table<'_>,
        asking: &Asking,
        touched: impl Fn(Option<GpaRange>) -> bool,
    ) {
        let has_log = self.rings.is_on(QueueKind::Event);
        for function in &mut self.functions {
            let at = function.at();
            let entry = entry(configuration, at);
            if !touched(entry) {
                continue;
            }
            let intent = if !configuration.control.iommu_en() {
                Intent::PassThrough
            } else if self.broken_at.is_some() {
                Intent::Blocked
            } else {
                match table.page(configuration, at) {
                    Some(page) if self.watched.contains(&page) => table.intent(configuration, at),
                    // Whatever it says may change without our hearing of it.
                    Some(_) if self.unwatchable.is_some() => Intent::Blocked,
                    // It is about to be watched, and read then.
                    Some(_) => continue,
                    None => table.intent(configuration, at),
                }
            };
            let entry = entry.map(|entry| entry.start());
            function.follow(intent, entry, has_log, asking, &mut self.leftovers);
        }
    }

    /// The function that is `requester` leaves: what the host made for it goes while it still knows the function, and
    /// nothing is asked about it any more.
    pub(super) fn leave(&mut self, requester: &Arc<Requester>, asking: &Asking) {
        let leftovers = &mut self.leftovers;
        self.functions
            .retain_mut(|function| !function.is(requester) || !function.leave(asking, leftovers));
    }

    /// Give everything back in the order in which the host's objects hang on each other, with the event queue `events`.
    pub(super) fn end(&mut self, events: Option<ObjectId>, asking: &Asking) {
        let leftovers = &mut self.leftovers;
        self.rings.end(asking, leftovers);
        if let Some(events) = events {
            leftovers.destroy(events, asking);
        }
        for function in &mut self.functions {
            function.end(asking, leftovers);
        }
        for function in &mut self.functions {
            function.end_vdevice(asking, leftovers);
        }
        // The unit's own object goes after all that hangs on it.
        leftovers.retry(asking);
        leftovers.destroy(asking.viommu, asking);
        leftovers.retry(asking);
        if leftovers.len() > 0 {
            tracing::warn!(
                iommu = asking.name,
                objects = leftovers.len(),
                "the host does not destroy all that the unit made; closing it does"
            );
        }
    }

    /// What functions reach and which rings are on, for the operator.
    pub(super) fn state(&self) -> String {
        let kinds = [
            (QueueKind::Command, "commands"),
            (QueueKind::Event, "events"),
            (QueueKind::Ppr, "page requests"),
        ];
        let on = kinds.into_iter().filter(|(kind, _)| self.rings.is_on(*kind));
        let mut rings: Vec<_> = on.map(|(_, name)| name).collect();
        if rings.is_empty() {
            rings.push("none");
        }
        let functions: Vec<_> = self.functions.iter().map(Followed::state).collect();
        let watched = match &self.unwatchable {
            Some(pages) if !pages.is_empty() => {
                format!("{} pages of the device table CANNOT be watched", pages.len())
            }
            _ => format!("{} pages of the device table watched", self.watched.len()),
        };
        let stopped = self.broken_at.map_or_else(String::new, |at| {
            format!("STOPPED, as the host's unit cannot read {at:#x}; ")
        });
        format!(
            "{stopped}rings on: {}; {}; {watched}",
            rings.join(", "),
            functions.join(", ")
        )
    }
}
