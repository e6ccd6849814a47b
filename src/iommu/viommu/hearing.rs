//! What the host tells of the guest's unit without being asked: its event queue, emptied and sorted.
//!
//! The host is trusted to keep its interface, and may fail to: what cannot be read or is no event is told to the operator,
//! and after a while nobody listens any more. The unit goes on, as before a host that has no such queue.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::asking::Asking;
use super::counters::Count;
use super::host::{HardwareErrors, HostEvent, HostEvents, ObjectId};
use crate::guest_warn;
use crate::iommu::amd::spec::event::{Code, Record};

/// Wake-ups in a row without an event that could be understood, until nobody listens any more.
const PATIENCE: u32 = 16;

/// The queue of one unit.
pub(super) struct Ear {
    /// What the host made.
    pub(super) object: ObjectId,
    reader: Box<dyn HostEvents>,
    /// How often something came that could be understood.
    heard: AtomicU64,
    /// `heard` at the last wake-up.
    heard_before: AtomicU64,
    /// Wake-ups in a row that brought nothing.
    futile: AtomicU32,
    deaf: AtomicBool,
}

impl Ear {
    pub(super) fn new(object: ObjectId, reader: Box<dyn HostEvents>) -> Self {
        Self {
            object,
            reader,
            heard: AtomicU64::new(0),
            heard_before: AtomicU64::new(0),
            futile: AtomicU32::new(0),
            deaf: AtomicBool::new(false),
        }
    }

    /// Readable while the host has told something.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }

    /// Take what has come: all that the host keeps at a time, so that nothing of what happened before is heard later.
    pub(super) fn listen(&self, asking: &Asking) -> HardwareErrors {
        let mut errors = HardwareErrors::default();
        if self.is_deaf() {
            return errors;
        }
        let events = match self.reader.take() {
            Ok(events) => events,
            Err(error) => {
                guest_warn!(iommu = asking.name, %error, "what the host tells of a guest's IOMMU cannot be read");
                return errors;
            }
        };
        let mut understood = !events.is_empty();
        for event in events {
            match event {
                HostEvent::Record(record) => sort(record, &mut errors, asking),
                HostEvent::Lost(events) => {
                    asking.counters.add_many(Count::LostEvents, events.into());
                    guest_warn!(
                        iommu = asking.name,
                        events,
                        "the host lost events of a guest's IOMMU, and what they were"
                    );
                }
                HostEvent::Garbage(problem) => {
                    understood = false;
                    guest_warn!(
                        iommu = asking.name,
                        problem,
                        "what the host tells of a guest's IOMMU is not understood"
                    );
                }
            }
        }
        if understood {
            self.heard.fetch_add(1, Ordering::Relaxed);
        }
        errors
    }

    /// Whoever waits for the descriptor was woken, has listened, and asks whether it is worth waiting again. `ended`:
    /// the host will tell nothing more.
    pub(super) fn is_worth_waiting(&self, ended: bool, asking: &Asking) -> bool {
        if self.is_deaf() {
            return false;
        }
        let heard = self.heard.load(Ordering::Relaxed);
        // A processor of the guest's may have been faster.
        let futile = if self.heard_before.swap(heard, Ordering::Relaxed) == heard {
            self.futile.load(Ordering::Relaxed).saturating_add(1)
        } else {
            0
        };
        self.futile.store(futile, Ordering::Relaxed);
        let reason = if ended {
            "the host closed it"
        } else if futile >= PATIENCE {
            "nothing that could be understood came of it for some time"
        } else {
            return true;
        };
        self.deaf.store(true, Ordering::Relaxed);
        tracing::error!(
            iommu = asking.name,
            reason,
            "the host's event queue of a guest's IOMMU is not read any more: hardware errors will go unheard until the machine is started anew"
        );
        false
    }
}

/// What `record` says of the unit. Records about functions of the guest's are in the guest's own log, so what else comes
/// concerns the operator.
fn sort(record: Record, errors: &mut HardwareErrors, asking: &Asking) {
    asking.counters.add(Count::HostEvents);
    match Code(record.code()) {
        Code::GUEST_EVENT_FAULT => errors.join(HardwareErrors {
            lost_records: 1,
            broken_at: None,
        }),
        Code::VIOMMU_HARDWARE_ERROR => errors.join(HardwareErrors {
            lost_records: 0,
            broken_at: Some(record.address()),
        }),
        code => guest_warn!(
            iommu = asking.name,
            event = %code,
            device = format_args!("{:#06x}", record.device()),
            domain = record.domain(),
            address = format_args!("{:#x}", record.address()),
            "the host's IOMMU reports of a guest's"
        ),
    }
}
