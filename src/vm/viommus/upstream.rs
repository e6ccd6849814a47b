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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Mutex, PoisonError};

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::super::unit::Surroundings;
    use super::*;
    use crate::iommu::amd::commands::Command;
    use crate::iommu::amd::processor::NoAnswer;
    use crate::iommu::viommu::testing::{FakeProtection, RING};
    use crate::pci::testing::Messages;
    use crate::platform::addr::{Bdf, Gpa};
    use crate::vm::config::Config;
    use crate::vm::events::EventLoop;
    use crate::vm::plan::Plan;

    /// Who writes down what it is told.
    #[derive(Default)]
    struct Listener(Mutex<Vec<Command>>);

    impl Follower for Listener {
        fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
            let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            heard.extend(batch);
            Ok(())
        }
    }

    /// The function of the test device, and what is before it where its IOMMU is as `viommu` says; `None` for none.
    fn upstream(viommu: &str) -> (Sbdf, GuestRam, Upstream) {
        let device =
            |id, slot| format!("[[test-device]]\nid = \"{id}\"\nport = \"rp0\"\nslot = \"{slot}\"\n");
        let devices = [device("test0", "0.0"), device("test1", "0.1")].concat();
        let text = format!("{viommu}[[root-port]]\nid = \"rp0\"\n{devices}");
        let config = Config::parse(Path::new("m.toml"), &text).expect("a machine file");
        let plan = Plan::resolve(&config).unwrap_or_else(|error| panic!("{error}"));
        let root = plan.pci.roots().next().expect("one");
        let device = root.nodes().find(|node| node.name == "test0").expect("planned");
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x60_0000)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let messages: Arc<dyn MsiSink> = Messages::new();
        let around = Surroundings {
            ram: &ram,
            messages: &messages,
            protection: Some(FakeProtection::new(ram.clone())),
        };
        let mut events = EventLoop::new().expect("an epoll descriptor");
        let unit = plan
            .viommus
            .first()
            .map(|planned| Unit::new(planned, root, &around, None, &mut events).expect("made"));
        let at = Sbdf {
            segment: 0,
            bdf: device.bdf,
        };
        (at, ram.clone(), Upstream::new(unit.as_ref(), &messages))
    }

    const ATS: &str = "ats = true\npasid-bits = 8\n";

    #[test]
    fn functions_have_an_agent_where_their_unit_has_translation_services() {
        for (viommu, has) in [
            (String::new(), false),
            ("[[viommu]]\n".to_owned(), false),
            (format!("[[viommu]]\n{ATS}"), true),
            ("[[viommu]]\nmode = \"sim\"\n".to_owned(), false),
            (format!("[[viommu]]\nmode = \"sim\"\n{ATS}"), true),
        ] {
            let (at, _, upstream) = upstream(&viommu);
            assert_eq!(upstream.agent(at).is_some(), has, "{viommu}");
        }
    }

    #[test]
    fn a_function_behind_a_served_unit_hears_what_the_guest_invalidates_of_it_alone() {
        let (at, ram, upstream) = upstream(&format!("[[viommu]]\nmode = \"sim\"\n{ATS}"));
        let listener = Arc::new(Listener::default());
        upstream.tell_of_invalidations(at, listener.clone());
        let other = Bdf::from_requester_id(at.bdf.requester_id() + 1);
        // INVALIDATE_IOTLB_PAGES of each, and of nobody.
        let devices = [other, at.bdf, Bdf::from_requester_id(0xc000)];
        for (index, device) in (0..).zip(devices) {
            let command = 4_u128 << 60 | u128::from(device.requester_id());
            ram.write(Gpa(RING + 16 * index), &command.to_le_bytes())
                .expect("RAM");
        }
        let unit = upstream.unit.as_ref().expect("one");
        let registers = unit.registers();
        for (at, value) in [
            (0x00, 0x20_0000 | 2),
            (0x08, RING | 8 << 56),
            (0x18, 1 << 12 | 1),
            (0x2008, 0x30),
        ] {
            registers.write(at, &u64::to_le_bytes(value));
        }
        let heard = listener.0.lock().expect("not poisoned");
        let [Command::InvalidateIotlb { device, .. }] = heard[..] else {
            panic!("{heard:?}");
        };
        assert_eq!(device, at.bdf);
    }
}
