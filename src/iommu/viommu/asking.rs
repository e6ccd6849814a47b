//! Requests to the host, each counted when it is refused and told to the operator.

use std::io;
use std::sync::Arc;

use super::counters::{Count, Counters};
use super::host::{ObjectId, ViommuHost};
use crate::{guest_line, guest_warn};

/// A unit's host, and the guest's unit there.
pub(super) struct Asking {
    /// What the operator calls the unit.
    pub(super) name: String,
    pub(super) host: Arc<dyn ViommuHost>,
    pub(super) viommu: ObjectId,
    pub(super) counters: Counters,
}

/// The host refused, and the operator knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Refused;

/// What became of a request that not every host knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// Granted.
    Done,
    /// Refused, and the operator knows.
    Refused,
    /// This host has no such request, and never will.
    Unsupported,
}

impl Asking {
    /// Ask. `what` is what the host is to do.
    pub(super) fn ask<T>(
        &self,
        what: &str,
        request: impl FnOnce(&dyn ViommuHost) -> io::Result<T>,
    ) -> Result<T, Refused> {
        request(&*self.host).map_err(|error| {
            self.counters.add(Count::Refusals);
            guest_warn!(iommu = self.name, %error, "the host refuses to {what}");
            Refused
        })
    }

    /// Ask for what may be asked of some hosts only.
    pub(super) fn ask_if_supported(
        &self,
        what: &str,
        request: impl FnOnce(&dyn ViommuHost) -> io::Result<()>,
    ) -> Answer {
        match request(&*self.host) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Answer::Unsupported,
            answer => match self.ask(what, |_| answer) {
                Ok(()) => Answer::Done,
                Err(Refused) => Answer::Refused,
            },
        }
    }

    /// Put heads, tails and Status of page 3 back to 0.
    pub(super) fn put_page_back(&self) -> Answer {
        self.ask_if_supported("put heads and tails of a guest's rings back", |host| {
            host.reset_page(self.viommu)
        })
    }

    /// Something of the guest's is not confined as the guest wants it, and nothing can be done about it.
    pub(super) fn alarm(&self, what: &str) {
        guest_line!(error, iommu = self.name, "{what}");
    }
}

/// Objects that nothing uses any more and that the host did not destroy when it was asked to.
#[derive(Default)]
pub(super) struct Leftovers(Vec<ObjectId>);

/// With so many left over, no more are made: a guest could have a host that destroys nothing keep any number.
pub(super) const MOST_LEFTOVERS: usize = 64;

impl Leftovers {
    /// Make room for one more, where there is none. Whether there is.
    pub(super) fn have_room(&mut self, asking: &Asking) -> Result<(), Refused> {
        if self.0.len() >= MOST_LEFTOVERS {
            self.retry(asking);
        }
        if self.0.len() < MOST_LEFTOVERS {
            return Ok(());
        }
        guest_warn!(
            iommu = asking.name,
            objects = self.0.len(),
            "the host destroys nothing that a guest is through with: it is asked for no more tables until it does"
        );
        Err(Refused)
    }

    /// Destroy `id`, now or later.
    pub(super) fn destroy(&mut self, id: ObjectId, asking: &Asking) {
        if asking.ask("destroy an object", |host| host.destroy(id)).is_err() {
            self.0.push(id);
        }
    }

    /// Ask once more for what was refused before.
    pub(super) fn retry(&mut self, asking: &Asking) {
        self.0
            .retain(|id| asking.ask("destroy an object", |host| host.destroy(*id)).is_err());
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
