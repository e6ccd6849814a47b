//! One function of the host's: what it is attached to, after what the guest's table says.
//!
//! It is attached to something at all times, and passes from one to another by one request. What the host refuses leaves
//! it with less than the guest asked for: blocked.

use std::sync::Arc;

use super::asking::{Answer, Asking, Leftovers, Refused};
use super::counters::Count;
use super::host::{HostDevice, ObjectId};
use super::intent::{Intent, Refusal};
use crate::guest_warn;
use crate::iommu::amd::events::{Event, Kind, Source, Tag};
use crate::iommu::amd::spec::dte::Dte;
use crate::platform::addr::{Bdf, Gpa};
use crate::platform::dma::Requester;

/// What a function is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    PassThrough,
    Blocked,
    Nested { dte: Dte, table: ObjectId },
}

/// A function behind the unit.
pub(super) struct Followed {
    requester: Arc<Requester>,
    device: HostDevice,
    place: Place,
    /// By which number commands and events name it.
    vdevice: Option<(Bdf, ObjectId)>,
    /// Why it was blocked against its entry's word when that was last read.
    refusal: Option<Refusal>,
    /// The guest was told of that, as far as it can be.
    told: bool,
    /// The host did not even block it: it reaches what it reached.
    unconfined: bool,
}

impl Followed {
    /// A function that is attached to guest physical memory.
    pub(super) fn new(requester: Arc<Requester>, device: HostDevice) -> Self {
        Self {
            requester,
            device,
            place: Place::PassThrough,
            vdevice: None,
            refusal: None,
            told: false,
            unconfined: false,
        }
    }

    /// As whom the guest knows it at present.
    pub(super) fn at(&self) -> Bdf {
        self.requester.sbdf().bdf
    }

    /// Take back a name that is no longer the guest's.
    pub(super) fn forget_old_name(&mut self, asking: &Asking, leftovers: &mut Leftovers) {
        if self.vdevice.is_some_and(|(name, _)| name != self.at()) {
            self.forget_name(asking, leftovers);
        }
    }

    /// Take back its name, if it has one. The function is blocked if it used tables of the guest's.
    pub(super) fn forget_name(&mut self, asking: &Asking, leftovers: &mut Leftovers) {
        if matches!(self.place, Place::Nested { .. }) && self.block(asking, leftovers).is_err() {
            return;
        }
        self.end_name(asking);
    }

    fn end_name(&mut self, asking: &Asking) {
        if let Some((_, id)) = self.vdevice
            && asking.ask("destroy a vDevice", |host| host.destroy(id)).is_ok()
        {
            self.vdevice = None;
        }
    }

    /// Give the host the name by which the guest knows the function, where it has none.
    pub(super) fn name(&mut self, asking: &Asking) {
        if self.vdevice.is_none() {
            let at = self.at();
            let made = asking.ask("make a vDevice; its function has no guest tables", |host| {
                host.vdevice_alloc(asking.viommu, self.device, at)
            });
            self.vdevice = made.ok().map(|id| (at, id));
        }
    }

    /// Attach the function to what it is to reach. What the host refuses leaves it blocked until this is called again.
    ///
    /// Why it is blocked against the word of its entry, which is at `entry`, the operator is told, and the guest as soon
    /// as it has a log: once while the reason stays the same, and so at most once for each store or register that the
    /// guest writes. What may pass by itself is not worth it.
    pub(super) fn follow(
        &mut self,
        intent: Intent,
        entry: Option<Gpa>,
        has_log: bool,
        asking: &Asking,
        leftovers: &mut Leftovers,
    ) {
        let done = match intent {
            Intent::PassThrough => self.pass(asking, leftovers),
            Intent::Nested(dte) => self.nest(&dte, asking, leftovers),
            Intent::Blocked | Intent::Refused(_) => self.block(asking, leftovers),
        };
        let refusal = match intent {
            Intent::Refused(refusal) => Some(refusal),
            Intent::PassThrough | Intent::Nested(_) if done.is_err() => {
                // It has said so itself if even that fails.
                let _ = self.block(asking, leftovers);
                Some(Refusal::Host)
            }
            Intent::PassThrough | Intent::Nested(_) | Intent::Blocked => None,
        };
        if refusal != self.refusal {
            self.refusal = refusal;
            self.told = false;
            // What the host refused was said where it did.
            if let Some(refusal) = refusal.filter(|refusal| !refusal.may_pass() && *refusal != Refusal::Host)
            {
                guest_warn!(iommu = asking.name, function = %self.at(), "a device table entry is refused, and its function blocked: {refusal}");
            }
        }
        if let Some(refusal) = refusal.filter(|refusal| !refusal.may_pass())
            && has_log
            && !std::mem::replace(&mut self.told, true)
        {
            self.report(refusal, entry, asking);
        }
    }

    fn pass(&mut self, asking: &Asking, leftovers: &mut Leftovers) -> Result<(), Refused> {
        if self.place == Place::PassThrough {
            self.unconfined = false;
            return Ok(());
        }
        asking.ask("attach a function to guest memory; it is blocked", |host| {
            host.attach(self.device, host.parent())
        })?;
        asking.counters.add(Count::PassThrough);
        self.moved(Place::PassThrough, asking, leftovers);
        Ok(())
    }

    fn nest(&mut self, wanted: &Dte, asking: &Asking, leftovers: &mut Leftovers) -> Result<(), Refused> {
        if matches!(&self.place, Place::Nested { dte, .. } if dte == wanted) {
            self.unconfined = false;
            return Ok(());
        }
        if self.vdevice.is_none_or(|(name, _)| name != self.at()) {
            return Err(Refused);
        }
        leftovers.have_room(asking)?;
        let table = asking.ask("make a guest's tables; their function is blocked", |host| {
            host.nested_alloc(asking.viommu, self.device, wanted)
        })?;
        let attached = asking.ask("attach a function to a guest's tables; it is blocked", |host| {
            host.attach(self.device, table)
        });
        if let Err(Refused) = attached {
            leftovers.destroy(table, asking);
            return Err(Refused);
        }
        asking.counters.add(Count::Nested);
        self.moved(Place::Nested { dte: *wanted, table }, asking, leftovers);
        Ok(())
    }

    fn block(&mut self, asking: &Asking, leftovers: &mut Leftovers) -> Result<(), Refused> {
        if self.place == Place::Blocked {
            self.unconfined = false;
            return Ok(());
        }
        let blocked = asking.ask("block a function", |host| {
            host.attach(self.device, host.blocked())
        });
        if let Err(Refused) = blocked {
            self.unconfined = true;
            asking.alarm(
                "a function of the host is not blocked as its guest wants: it reaches what it reached",
            );
            return Err(Refused);
        }
        asking.counters.add(Count::Blocked);
        self.moved(Place::Blocked, asking, leftovers);
        Ok(())
    }

    /// It is attached elsewhere: the tables it left go.
    fn moved(&mut self, to: Place, asking: &Asking, leftovers: &mut Leftovers) {
        self.unconfined = false;
        let from = std::mem::replace(&mut self.place, to);
        if let Place::Nested { table, .. } = from {
            leftovers.destroy(table, asking);
        }
    }

    /// Tell the guest, as a unit would that met the entry: one whose bits it cannot obey is illegal; one that is not there,
    /// or comes to nothing for reasons of the host's, is the hardware's error.
    fn report(&self, refusal: Refusal, entry: Option<Gpa>, asking: &Asking) {
        let source = Source {
            device: self.at(),
            address: 0,
            tag: Tag::Domain(0),
            write: false,
            kind: Kind::Memory,
        };
        let event = match refusal {
            Refusal::NoMemory { at } => Event::DeviceTableHardwareError { source, at },
            Refusal::Host => {
                let Some(at) = entry else { return };
                Event::DeviceTableHardwareError { source, at }
            }
            _ => Event::IllegalDeviceTableEntry {
                source,
                reserved: refusal == Refusal::Reserved,
            },
        };
        let answer = asking.ask_if_supported("put an event into a guest's log", |host| {
            host.insert_event(asking.viommu, dwords(event.record()))
        });
        if answer == Answer::Done {
            asking.counters.add(Count::Events);
        }
    }

    /// Whether it issues its requests as `requester`.
    pub(super) fn is(&self, requester: &Arc<Requester>) -> bool {
        Arc::ptr_eq(&self.requester, requester)
    }

    /// Block it and give back what it has, before the host has it back. Whether that is all there is to do for it.
    pub(super) fn leave(&mut self, asking: &Asking, leftovers: &mut Leftovers) -> bool {
        let blocked = self.block(asking, leftovers).is_ok();
        self.end_vdevice(asking, leftovers);
        blocked
    }

    /// Block it for good and give back what it has.
    pub(super) fn end(&mut self, asking: &Asking, leftovers: &mut Leftovers) {
        if self.block(asking, leftovers).is_err() {
            // Once more: tables cannot go while it uses them.
            let _ = self.block(asking, leftovers);
        }
    }

    /// Give its name back, the function being blocked.
    pub(super) fn end_vdevice(&mut self, asking: &Asking, leftovers: &mut Leftovers) {
        if let Some((_, id)) = self.vdevice.take() {
            leftovers.destroy(id, asking);
        }
    }

    /// What it reaches, for the operator.
    pub(super) fn state(&self) -> String {
        let at = self.at();
        let place = match (self.place, self.refusal) {
            (Place::PassThrough, _) => "passes through".to_owned(),
            (Place::Blocked, None) => "is blocked".to_owned(),
            (Place::Blocked, Some(refusal)) => format!("is blocked: {refusal}"),
            (Place::Nested { dte, .. }, _) => format!(
                "has guest tables at {:#x} in domain {}",
                dte.gcr3_root(),
                dte.guest.domain()
            ),
        };
        let warning = if self.unconfined {
            ", NOT as its guest wants"
        } else {
            ""
        };
        format!("{at} {place}{warning}")
    }
}

/// A record as the four dwords of memory.
fn dwords(record: u128) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = record.to_le_bytes();
    [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]].map(u32::from_le_bytes)
}
