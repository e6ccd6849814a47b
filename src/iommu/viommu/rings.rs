//! The guest's rings, in the host's hands while they are on.

use super::asking::{Asking, Leftovers, Refused};
use super::counters::Count;
use super::host::{ObjectId, Queue, QueueKind};
use crate::iommu::amd::registers::Registers;
use crate::iommu::amd::ring::Ring;
use crate::platform::addr::Gpa;

/// The rings that are to be on, by [`QueueKind`]: the unit is on, the ring is, and its length means something.
pub(super) type Wanted = [Option<Queue>; 3];

/// Every kind, in the order of the host's objects.
const KINDS: [QueueKind; 3] = [QueueKind::Command, QueueKind::Event, QueueKind::Ppr];

/// What `registers` say of rings.
pub(super) fn wanted(registers: &Registers) -> Wanted {
    let control = registers.control();
    KINDS.map(|kind| {
        let (on, ring, interrupts): (bool, &Ring, bool) = match kind {
            QueueKind::Command => (
                control.cmd_buf_en(),
                &registers.command,
                control.com_wait_int_en(),
            ),
            QueueKind::Event => (
                control.event_log_en(),
                &registers.event.ring,
                control.event_int_en(),
            ),
            QueueKind::Ppr => (
                control.ppr_log_en() && control.ppr_en(),
                &registers.ppr.ring,
                control.ppr_int_en(),
            ),
        };
        (control.iommu_en() && on && ring.is_valid()).then(|| Queue {
            kind,
            base: Gpa(ring.base().frame() << 12),
            length: ring.base().length(),
            interrupts,
        })
    })
}

/// A ring that the host works on.
struct Held {
    queue: Queue,
    id: ObjectId,
    /// It was to go, and the host refused: how far it got with that is not known.
    leaving: bool,
}

/// The rings that the host works on.
#[derive(Default)]
pub(super) struct Rings([Option<Held>; 3]);

impl Rings {
    /// Have the host work on what is `wanted` and on nothing else. What it refuses stays off, or as it was where it
    /// refuses to let go of it, until this is called again.
    pub(super) fn bring(&mut self, wanted: &Wanted, asking: &Asking) {
        for (wanted, held) in wanted.iter().zip(&mut self.0) {
            let settled = match held {
                Some(held) => !held.leaving && *wanted == Some(held.queue),
                None => wanted.is_none(),
            };
            if settled {
                continue;
            }
            if let Some(Held { queue, id, leaving }) = held {
                let what = match queue.kind {
                    QueueKind::Command => "destroy the queue of a command buffer",
                    QueueKind::Event => "destroy the queue of an event log",
                    QueueKind::Ppr => "destroy the queue of a PPR log",
                };
                if let Err(Refused) = asking.ask(what, |host| host.destroy(*id)) {
                    *leaving = true;
                    continue;
                }
                asking.counters.add(Count::QueuesDestroyed);
                *held = None;
            }
            if let Some(queue) = wanted {
                let what = match queue.kind {
                    QueueKind::Command => "make a queue of a command buffer, which stays off",
                    QueueKind::Event => "make a queue of an event log, which stays off",
                    QueueKind::Ppr => "make a queue of a PPR log, which stays off",
                };
                let made = asking.ask(what, |host| host.queue_alloc(asking.viommu, queue));
                if let Ok(id) = made {
                    asking.counters.add(Count::QueuesMade);
                    *held = Some(Held {
                        queue: *queue,
                        id,
                        leaving: false,
                    });
                }
            }
        }
    }

    /// Whether the host works on the ring of `kind`.
    pub(super) fn is_on(&self, kind: QueueKind) -> bool {
        self.0.iter().flatten().any(|held| held.queue.kind == kind)
    }

    /// Take every ring back for good.
    pub(super) fn end(&mut self, asking: &Asking, leftovers: &mut Leftovers) {
        for held in self.0.iter_mut().filter_map(Option::take) {
            leftovers.destroy(held.id, asking);
        }
    }
}
