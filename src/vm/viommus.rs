//! The guest's IOMMUs: made from the plan before anything that passes them.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::epoll::EventSet;

use super::RunError;
use super::board::Board;
use super::events::EventLoop;
use super::passed::Passed;
use super::plan::{Doorbell, Plan, ViommuPlan};
use crate::iommu::agent::TranslationAgent;
use crate::iommu::amd::processor::Follower;
use crate::iommu::amd::spec::registers::Reg;
use crate::iommu::amd::window::RegisterWindow;
use crate::iommu::emulated::{
    DoorbellThread, EmulatedUnit, LateWrites, RemappingIoApic, RemappingSink, UnitParts,
};
use crate::iommu::iommufd::Attach;
use crate::iommu::shadow::{Shadow, ShadowParts, Views};
use crate::pci::topology::Topology;
use crate::pci::tree::{NodeKind, RootComplex};
use crate::platform::addr::{Gpa, Sbdf};
use crate::platform::dma::{Dma, Requester};
use crate::platform::doorbell::CoalescedWrites;
use crate::platform::host::HostError;
use crate::platform::irq::IoApicHost;
use crate::platform::kvm::{KvmVm, ReadOnlyPage};
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiSink;

/// Every unit, in the order of the plan.
pub(super) struct Viommus<'a> {
    /// Of units whose doorbell is polled. They end before the units do.
    doorbells: Vec<DoorbellThread>,
    plan: &'a Plan,
    units: Vec<Arc<EmulatedUnit>>,
}

/// The page in which a guest reads heads, tails and Status.
struct Window(ReadOnlyPage);

impl RegisterWindow for Window {
    fn show(&self, offset: u64, value: u64) {
        self.0.store(offset, value);
    }
}

/// What a processor is not held up with, the event loop does.
struct Rest(Arc<EmulatedUnit>);

impl EventSubscriber for Rest {
    fn process(&self, _events: Events, _ops: &mut EventOps) {
        self.0.run_commands();
    }

    fn init(&self, ops: &mut EventOps) {
        ops.add(Events::new_raw(self.0.as_raw_fd(), EventSet::IN))
            .expect("the descriptor is open and watched once");
    }
}

impl<'a> Viommus<'a> {
    /// The units of `plan`, which work on `ram` and send what they remapped to `messages`.
    pub(super) fn new(
        plan: &'a Plan,
        ram: &GuestRam,
        messages: &Arc<dyn MsiSink>,
        events: &mut EventLoop,
    ) -> Result<Self, HostError> {
        let mut units = Vec::with_capacity(plan.viommus.len());
        for planned in &plan.viommus {
            let unit = EmulatedUnit::new(UnitParts {
                name: planned.name.clone(),
                at: Sbdf {
                    segment: planned.segment,
                    bdf: planned.bdf,
                },
                mmio: planned.mmio,
                features: planned.offer.features(),
                ram: ram.clone(),
                messages: messages.clone(),
            })?;
            events.add(Arc::new(Rest(unit.clone())));
            units.push(unit);
        }
        Ok(Self {
            doorbells: Vec::new(),
            plan,
            units,
        })
    }

    /// Have what the guest's tables say hold for those of `passed` that are behind a unit.
    pub(super) fn confine(
        &self,
        passed: &Passed,
        topology: &Topology,
        ram: &GuestRam,
    ) -> Result<(), HostError> {
        for root in self.plan.pci.roots() {
            let Some(unit) = self.covering(root) else {
                continue;
            };
            let mut functions: Vec<(Arc<Requester>, Arc<dyn Attach>)> = Vec::new();
            let mut space = None;
            for node in root.nodes() {
                if let NodeKind::Endpoint(index) = node.kind
                    && let Some((function, attached)) = passed.function(index)
                {
                    let function: Arc<dyn Attach> = function;
                    let placed = topology.function(root.segment, node.bdf);
                    let requester = placed.expect("it is where it was planned").requester();
                    functions.push((requester.clone(), function));
                    space = Some(attached);
                }
            }
            let Some(space) = space else {
                continue;
            };
            let views: Weak<dyn Views> = Arc::downgrade(unit) as Weak<dyn Views>;
            let shadow = Shadow::new(ShadowParts {
                name: unit.name().to_owned(),
                unit: views,
                requests: space.requests().clone(),
                space,
                ram: ram.clone(),
                functions,
            })?;
            unit.add_follower(Arc::new(shadow));
        }
        Ok(())
    }

    /// Have doorbells polled where the plan says so, by what `writes` gives: the hypervisor's ring of writes put
    /// aside, which is asked for only then.
    pub(super) fn poll_doorbells(
        &mut self,
        writes: impl FnOnce() -> Result<Arc<dyn CoalescedWrites>, HostError>,
    ) -> Result<(), HostError> {
        let polled = |(_, planned): &(_, &ViommuPlan)| planned.doorbell == Doorbell::Poll;
        let mut units = self
            .units
            .iter()
            .zip(&self.plan.viommus)
            .filter(polled)
            .peekable();
        if units.peek().is_none() {
            return Ok(());
        }
        let writes = LateWrites::new(writes()?);
        for (unit, _) in units {
            self.doorbells.push(DoorbellThread::start(unit.clone(), &writes)?);
        }
        Ok(())
    }

    /// What carries the IOAPIC's messages: `host`, behind the unit that remaps them where one does.
    pub(super) fn ioapic_host(&self, host: Arc<dyn IoApicHost>) -> Arc<dyn IoApicHost> {
        let Some(index) = self.plan.viommus.iter().position(|planned| planned.remaps_ioapic) else {
            return host;
        };
        let mut nodes = self.plan.pci.nodes();
        let sender = nodes
            .find(|(_, node)| node.kind == NodeKind::IsaBridge)
            .expect("every machine has an ISA bridge");
        let unit = self.units[index].clone();
        Arc::new(RemappingIoApic::new(unit, sender.1.bdf, host))
    }

    /// Make every unit's registers reachable on `board`, and those that change while it runs readable in `vm`
    /// without an exit.
    pub(super) fn place(&self, board: &mut Board, vm: &KvmVm) -> Result<(), RunError> {
        for (unit, planned) in self.units.iter().zip(&self.plan.viommus) {
            board.claim_mmio(unit.name(), planned.mmio, unit.clone())?;
            let page = vm.read_only_page(unit.name(), Gpa(planned.mmio.start().0 + Reg::RUNNING_AT))?;
            unit.show_registers(Box::new(Window(page)));
        }
        Ok(())
    }

    /// Unit number `index` of the plan.
    pub(super) fn unit(&self, index: usize) -> Arc<EmulatedUnit> {
        self.units[index].clone()
    }

    /// The unit that covers `root`, if one does.
    pub(super) fn covering(&self, root: &RootComplex) -> Option<&Arc<EmulatedUnit>> {
        let covers = |index: &usize| self.plan.viommus[*index].root_complex == root.name;
        (0..self.units.len()).find(covers).map(|index| &self.units[index])
    }

    /// Every unit.
    pub(super) fn iter(&self) -> impl Iterator<Item = &EmulatedUnit> {
        self.units.iter().map(|unit| &**unit)
    }

    /// See to it that the units have heard all that the guest told them. No processor runs.
    pub(super) fn catch_up(&self) {
        self.units.iter().for_each(|unit| unit.catch_up());
    }

    /// All as after power-on. No processor and no device runs.
    pub(super) fn reset(&self) {
        self.units.iter().for_each(|unit| unit.reset());
    }
}

/// A function's ways out: through a unit, or straight.
#[derive(Clone)]
pub(super) struct Upstream {
    unit: Option<Arc<EmulatedUnit>>,
    /// Where its messages go.
    pub(super) messages: Arc<dyn MsiSink>,
}

impl Upstream {
    /// Behind `unit`, if there is one; `messages` lead to the processors.
    pub(super) fn new(unit: Option<&Arc<EmulatedUnit>>, messages: &Arc<dyn MsiSink>) -> Self {
        let messages: Arc<dyn MsiSink> = match unit {
            Some(unit) => Arc::new(RemappingSink::new(unit.clone())),
            None => messages.clone(),
        };
        Self {
            unit: unit.cloned(),
            messages,
        }
    }

    /// The way of `requester` to `ram`.
    pub(super) fn dma(&self, requester: Arc<Requester>, ram: GuestRam) -> Dma {
        match &self.unit {
            Some(unit) => Dma::translated(requester, ram, unit.clone()),
            None => Dma::new(requester, ram),
        }
    }

    /// The unit, where it speaks translation services with functions.
    pub(super) fn agent(&self) -> Option<Arc<dyn TranslationAgent>> {
        let unit = self.unit.clone().filter(|unit| unit.offers_ats())?;
        Some(unit)
    }

    /// Have `follower` hear what the unit, if there is one, has invalidated.
    pub(super) fn tell_of_invalidations(&self, follower: Arc<dyn Follower>) {
        if let Some(unit) = &self.unit {
            unit.add_follower(follower);
        }
    }

    /// Whether a unit translates.
    pub(super) const fn translates(&self) -> bool {
        self.unit.is_some()
    }
}
