//! The guest's IOMMUs: made from the plan before anything that passes them.

mod hardware;
mod unit;
mod upstream;

pub(super) use unit::Unit;
pub(super) use upstream::Upstream;

use std::sync::{Arc, Weak};

use super::RunError;
use super::board::Board;
use super::events::EventLoop;
use super::passed::Passed;
use super::plan::{Doorbell, Plan, ViommuPlan};
use crate::iommu::amd::spec::registers::Reg;
use crate::iommu::amd::window::RegisterWindow;
use crate::iommu::emulated::{GuestControls, GuestPages, RemappingIoApic};
use crate::iommu::iommufd::{Copies, Silence};
use crate::iommu::polling::{DoorbellThread, LateWrites};
use crate::iommu::shadow::{Limits, Shadow, ShadowParts, Views};
use crate::pci::topology::{Observer, Topology};
use crate::pci::tree::{NodeKind, RootComplex};
use crate::platform::addr::Gpa;
use crate::platform::dma::Requester;
use crate::platform::doorbell::CoalescedWrites;
use crate::platform::host::HostError;
use crate::platform::irq::IoApicHost;
use crate::platform::kvm::{KvmVm, ReadOnlyPage};
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiSink;
use unit::Surroundings;

/// Every unit, in the order of the plan.
pub(super) struct Viommus<'a> {
    /// Of units whose doorbell is polled. They end before the units do.
    doorbells: Vec<DoorbellThread>,
    plan: &'a Plan,
    units: Vec<Unit>,
}

/// The page in which a guest reads heads, tails and Status.
struct Window(ReadOnlyPage);

impl RegisterWindow for Window {
    fn show(&self, offset: u64, value: u64) {
        self.0.store(offset, value);
    }
}

impl<'a> Viommus<'a> {
    /// The units of `plan`, which work on `ram` and send what they remapped to `messages`.
    pub(super) fn new(
        plan: &'a Plan,
        ram: &GuestRam,
        messages: &Arc<dyn MsiSink>,
        vm: &KvmVm,
        passed: &Passed,
        events: &mut EventLoop,
    ) -> Result<Self, HostError> {
        let served = plan.viommus.iter().any(|planned| planned.mode.is_served());
        let around = Surroundings {
            ram,
            messages,
            protection: served.then(|| vm.write_protection()).transpose()?,
        };
        let mut units = Vec::with_capacity(plan.viommus.len());
        for (index, planned) in plan.viommus.iter().enumerate() {
            let root = plan.pci.roots().find(|root| root.name == planned.root_complex);
            let root = root.expect("a planned IOMMU covers a planned root complex");
            units.push(Unit::new(planned, root, &around, passed.host(index), events)?);
        }
        Ok(Self {
            doorbells: Vec::new(),
            plan,
            units,
        })
    }

    /// Have every unit hear of functions that the guest renumbers in `topology`.
    pub(super) fn observe(&self, topology: &Topology) {
        self.units.iter().for_each(|unit| topology.tell(unit.observer()));
    }

    /// Have what the guest's tables say hold for those of `passed` that are behind a unit, by whatever number the guest
    /// has for each.
    pub(super) fn confine(
        &self,
        passed: &Passed,
        topology: &Topology,
        ram: &GuestRam,
    ) -> Result<(), HostError> {
        for root in self.plan.pci.roots() {
            let Some(Unit::Emulated(unit)) = self.covering(root) else {
                continue;
            };
            let mut functions: Vec<(Arc<Requester>, Arc<dyn Silence>)> = Vec::new();
            let mut space = None;
            for node in root.nodes() {
                if let NodeKind::Endpoint(index) = node.kind
                    && let Some((function, attached)) = passed.function(index)
                {
                    let function: Arc<dyn Silence> = function;
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
                space: space.clone(),
                ram: ram.clone(),
                last: unit.last_address(),
                limits: Limits::DEFAULT,
                functions,
            })?;
            let shadow = Arc::new(shadow);
            space.tell(Arc::downgrade(&shadow) as Weak<dyn Copies>);
            topology.tell(Arc::downgrade(&shadow) as Weak<dyn Observer>);
            unit.add_follower(shadow);
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
            self.doorbells
                .push(DoorbellThread::start(unit.polled(), &writes)?);
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
        match &self.units[index] {
            Unit::Emulated(unit) => Arc::new(RemappingIoApic::new(unit.clone(), sender.1.bdf, host)),
            Unit::Hardware(_) | Unit::Simulated(_) => unreachable!("a plan has served units remap nothing"),
        }
    }

    /// Make every unit's registers reachable on `board`, and those that change while it runs readable in `vm`
    /// without an exit; or written as well, where they are a page of a unit of the host's.
    pub(super) fn place(&self, board: &mut Board, vm: &KvmVm) -> Result<(), RunError> {
        for (unit, planned) in self.units.iter().zip(&self.plan.viommus) {
            board.claim_mmio(unit.name(), planned.mmio, unit.registers())?;
            if let (Unit::Emulated(unit), Some(guests)) = (unit, planned.guests) {
                board.claim_mmio(unit.name(), guests.pages, Arc::new(GuestPages(unit.clone())))?;
                board.claim_mmio(unit.name(), guests.control, Arc::new(GuestControls(unit.clone())))?;
            }
            let at = Gpa(planned.mmio.start().0 + Reg::RUNNING_AT);
            match unit {
                Unit::Hardware(hardware) => hardware.map_page(at, &*vm.device_memory())?,
                Unit::Emulated(unit) => {
                    let page = vm.read_only_page(unit.name(), at)?;
                    unit.show_registers(Box::new(Window(page)));
                }
                Unit::Simulated(simulated) => {
                    let page = vm.read_only_page(unit.name(), at)?;
                    simulated.show_registers(Box::new(Window(page)));
                }
            }
        }
        Ok(())
    }

    /// Unit number `index` of the plan.
    pub(super) fn unit(&self, index: usize) -> &Unit {
        &self.units[index]
    }

    /// The unit that covers `root`, if one does.
    pub(super) fn covering(&self, root: &RootComplex) -> Option<&Unit> {
        let covers = |index: &usize| self.plan.viommus[*index].root_complex == root.name;
        (0..self.units.len()).find(covers).map(|index| &self.units[index])
    }

    /// Every unit.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Unit> {
        self.units.iter()
    }

    /// See to it that the units have heard all that the guest told them. No processor runs.
    pub(super) fn catch_up(&self) {
        self.units.iter().for_each(Unit::catch_up);
    }

    /// All as after power-on. No processor and no device runs.
    pub(super) fn reset(&self) {
        self.units.iter().for_each(Unit::reset);
    }
}

#[cfg(test)]
mod tests;
