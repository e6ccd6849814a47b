//! A function's ways out.

use std::sync::Arc;

use super::unit::Unit;
use crate::iommu::agent::TranslationAgent;
use crate::iommu::amd::processor::Follower;
use crate::iommu::emulated::RemappingSink;
use crate::platform::addr::Sbdf;
use crate::platform::dma::{Dma, Requester};
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiSink;

/// The ways out of the functions behind a root complex: through a unit, or straight.
#[derive(Clone)]
pub(in crate::vm) struct Upstream {
    unit: Option<Unit>,
    /// Where their messages go.
    pub(in crate::vm) messages: Arc<dyn MsiSink>,
}

impl Upstream {
    /// Behind `unit`, if there is one; `messages` lead to the processors.
    pub(in crate::vm) fn new(unit: Option<&Unit>, messages: &Arc<dyn MsiSink>) -> Self {
        let messages: Arc<dyn MsiSink> = match unit {
            Some(Unit::Emulated(unit)) => Arc::new(RemappingSink::new(unit.clone())),
            // A unit that serves guests remaps no messages of theirs.
            Some(Unit::Hardware(_) | Unit::Simulated(_)) | None => messages.clone(),
        };
        Self {
            unit: unit.cloned(),
            messages,
        }
    }

    /// As whom the host's function at `at` issues requests, which take no way of ours.
    pub(in crate::vm) fn requester(&self, at: Sbdf) -> Arc<Requester> {
        match &self.unit {
            Some(Unit::Hardware(hardware)) => {
                let behind = hardware.requester(at);
                behind.expect("the unit was made for every function behind it")
            }
            _ => Arc::new(Requester::new(at)),
        }
    }

    /// As whom the function at `at` issues requests, and its way to `ram`.
    pub(in crate::vm) fn dma(&self, at: Sbdf, ram: GuestRam) -> (Arc<Requester>, Dma) {
        let own = || Arc::new(Requester::new(at));
        match &self.unit {
            Some(Unit::Emulated(unit)) => {
                let requester = own();
                (requester.clone(), Dma::translated(requester, ram, unit.clone()))
            }
            Some(Unit::Simulated(simulated)) => {
                let behind = simulated.function_at(at);
                let (requester, way) = behind.expect("the unit was made for every function behind it");
                (requester.clone(), Dma::translated(requester, ram, way))
            }
            Some(Unit::Hardware(_)) => {
                unreachable!("a plan has no device of ours behind a unit of the host's")
            }
            None => {
                let requester = own();
                (requester.clone(), Dma::new(requester, ram))
            }
        }
    }

    /// The unit, as the function at `at` has it before itself, where it speaks translation services with functions.
    pub(in crate::vm) fn agent(&self, at: Sbdf) -> Option<Arc<dyn TranslationAgent>> {
        match &self.unit {
            Some(Unit::Emulated(unit)) if unit.offers_ats() => Some(unit.clone()),
            Some(Unit::Simulated(simulated)) => simulated.agent(at),
            Some(Unit::Emulated(_) | Unit::Hardware(_)) | None => None,
        }
    }

    /// Have `follower`, of the function at `at`, hear what the unit has invalidated, where it tells.
    pub(in crate::vm) fn tell_of_invalidations(&self, at: Sbdf, follower: Arc<dyn Follower>) {
        match &self.unit {
            Some(Unit::Emulated(unit)) => unit.add_follower(follower),
            Some(Unit::Simulated(simulated)) => simulated.add_follower(at, follower),
            Some(Unit::Hardware(_)) | None => {}
        }
    }

    /// Whether a unit translates.
    pub(in crate::vm) const fn translates(&self) -> bool {
        self.unit.is_some()
    }
}
