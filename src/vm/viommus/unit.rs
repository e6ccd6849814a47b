//! One unit of the guest's, whoever works it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock, Weak};

use event_manager::{EventOps, EventSubscriber, Events};
use vmm_sys_util::epoll::EventSet;

use crate::iommu::agent::TranslationAgent;
use crate::iommu::amd::counters::Counts;
use crate::iommu::amd::processor::Follower;
use crate::iommu::amd::spec::registers::Reg;
use crate::iommu::amd::window::RegisterWindow;
use crate::iommu::emulated::{EmulatedUnit, UnitParts};
use crate::iommu::iommufd::Ioas;
use crate::iommu::iommufd::viommu::HwHost;
use crate::iommu::polling::{Polled, Polling};
use crate::iommu::sim::{SimHost, SimParts};
use crate::iommu::viommu::host::{HostDevice, ViommuHost};
use crate::iommu::viommu::{Counts as Asked, ServedParts, ServedUnit};
use crate::pci::Function;
use crate::pci::topology::Observer;
use crate::pci::tree::{NodeKind, RootComplex};
use crate::platform::addr::{GpaRange, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::dma::{Requester, Translator};
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiSink;
use crate::platform::protection::WriteProtection;
use crate::vm::events::EventLoop;
use crate::vm::plan::{ViommuMode, ViommuPlan};

use super::hardware::Hardware;

/// A unit, by who works it.
#[derive(Clone)]
pub(in crate::vm) enum Unit {
    /// Ravelin.
    Emulated(Arc<EmulatedUnit>),
    /// A unit of the host's.
    Hardware(Arc<Hardware>),
    /// A model of a host's unit.
    Simulated(Arc<Simulated>),
}

/// A unit that a model serves.
pub(in crate::vm) struct Simulated {
    unit: Arc<ServedUnit>,
    host: Arc<SimHost>,
    /// The functions behind it: as whom each issues requests. The model knows them by their place here.
    functions: Vec<Arc<Requester>>,
}

/// What units are connected to.
pub(super) struct Surroundings<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) messages: &'a Arc<dyn MsiSink>,
    /// Where a unit is served.
    pub(super) protection: Option<Arc<dyn WriteProtection>>,
}

impl AsRawFd for Simulated {
    fn as_raw_fd(&self) -> RawFd {
        self.host.as_raw_fd()
    }
}

/// What a processor is not held up with, the event loop does.
struct Rest<U> {
    unit: Arc<U>,
    run_commands: fn(&U),
}

impl<U: AsRawFd> EventSubscriber for Rest<U> {
    fn process(&self, _events: Events, _ops: &mut EventOps) {
        (self.run_commands)(&self.unit);
    }

    fn init(&self, ops: &mut EventOps) {
        ops.add(Events::new_raw(self.unit.as_raw_fd(), EventSet::IN))
            .expect("the descriptor is open and watched once");
    }
}

impl Unit {
    /// The unit `planned`, which covers `root`; `host` serves it, over that address space, where one of the host's does.
    pub(super) fn new(
        planned: &ViommuPlan,
        root: &RootComplex,
        around: &Surroundings<'_>,
        host: Option<(Arc<HwHost>, Arc<Ioas>)>,
        events: &mut EventLoop,
    ) -> Result<Self, HostError> {
        match planned.mode {
            ViommuMode::Emulated => Self::emulated(planned, around, events),
            ViommuMode::Hardware => {
                let (host, space) = host.expect("the host's unit was made for the plan's");
                let hardware = Hardware::new(planned, root, around, host, space, events)?;
                Ok(Self::Hardware(Arc::new(hardware)))
            }
            ViommuMode::Simulated => Self::simulated(planned, root, around, events),
        }
    }

    fn emulated(
        planned: &ViommuPlan,
        around: &Surroundings<'_>,
        events: &mut EventLoop,
    ) -> Result<Self, HostError> {
        let unit = EmulatedUnit::new(UnitParts {
            name: planned.name.clone(),
            at: planned.sbdf(),
            mmio: planned.mmio,
            features: planned.offer.features(),
            guests: planned.guests,
            ram: around.ram.clone(),
            messages: around.messages.clone(),
        })?;
        events.add(Arc::new(Rest {
            unit: unit.clone(),
            run_commands: EmulatedUnit::run_commands,
        }));
        Ok(Self::Emulated(unit))
    }

    fn simulated(
        planned: &ViommuPlan,
        root: &RootComplex,
        around: &Surroundings<'_>,
        events: &mut EventLoop,
    ) -> Result<Self, HostError> {
        let functions = requesters(root);
        let host = SimHost::new(SimParts {
            name: planned.name.clone(),
            at: planned.sbdf(),
            ram: around.ram.clone(),
            devices: functions.len(),
            ats: planned.offer.ats,
            messages: around.messages.clone(),
        })?;
        let unit = served(planned, around, host.clone(), &functions)?;
        let simulated = Arc::new(Simulated {
            unit,
            host,
            functions,
        });
        events.add(Arc::new(Rest {
            unit: simulated.clone(),
            run_commands: Simulated::run_commands,
        }));
        Ok(Self::Simulated(simulated))
    }

    /// What the operator calls it.
    pub(in crate::vm) fn name(&self) -> &str {
        match self {
            Self::Emulated(unit) => unit.name(),
            Self::Hardware(hardware) => hardware.unit().name(),
            Self::Simulated(simulated) => simulated.unit.name(),
        }
    }

    /// Its PCI function.
    pub(in crate::vm) fn function(&self) -> Arc<dyn Function> {
        match self {
            Self::Emulated(unit) => unit.clone(),
            Self::Hardware(hardware) => hardware.unit().clone(),
            Self::Simulated(simulated) => simulated.unit.clone(),
        }
    }

    /// Its registers.
    pub(super) fn registers(&self) -> Arc<dyn BusDevice> {
        match self {
            Self::Emulated(unit) => unit.clone(),
            Self::Hardware(hardware) => hardware.unit().clone(),
            Self::Simulated(simulated) => simulated.unit.clone(),
        }
    }

    /// What of it goes by functions' numbers.
    pub(super) fn observer(&self) -> Weak<dyn Observer> {
        match self {
            Self::Emulated(unit) => Arc::downgrade(unit) as Weak<dyn Observer>,
            Self::Hardware(hardware) => Arc::downgrade(hardware.unit()) as Weak<dyn Observer>,
            Self::Simulated(simulated) => Arc::downgrade(&simulated.unit) as Weak<dyn Observer>,
        }
    }

    /// What it did so far, and what it asked of the host that serves it.
    pub(in crate::vm) fn counts(&self) -> (Counts, Option<Asked>) {
        match self {
            Self::Emulated(unit) => (unit.counts(), None),
            // What the host's unit does it counts for the host.
            Self::Hardware(hardware) => (Counts::default(), Some(hardware.unit().counts())),
            Self::Simulated(simulated) => (simulated.host.counts(), Some(simulated.unit.counts())),
        }
    }

    /// Its registers as the guest would read them, and what it did so far, in one line.
    pub(in crate::vm) fn state(&self) -> String {
        match self {
            Self::Emulated(unit) => unit.state(),
            Self::Hardware(hardware) => hardware.state(),
            Self::Simulated(simulated) => format!("{}; {}", simulated.unit.state(), simulated.host.state()),
        }
    }

    /// See to it that it has heard all that the guest told it. No processor runs.
    pub(super) fn catch_up(&self) {
        match self {
            Self::Emulated(unit) => unit.catch_up(),
            // The host's unit hears of them itself.
            Self::Hardware(_) => {}
            Self::Simulated(simulated) => simulated.unit.catch_up(),
        }
    }

    /// What has its doorbell polled.
    pub(super) fn polled(&self) -> Arc<dyn Polled> {
        match self {
            Self::Emulated(unit) => unit.clone(),
            Self::Hardware(_) => unreachable!("a plan has no doorbell of the host's units polled"),
            Self::Simulated(simulated) => simulated.clone(),
        }
    }

    /// As after power-on. No processor and no device runs.
    pub(super) fn reset(&self) {
        match self {
            Self::Emulated(unit) => unit.reset(),
            Self::Hardware(hardware) => hardware.unit().reset(),
            Self::Simulated(simulated) => {
                simulated.unit.reset();
                simulated.host.reset();
            }
        }
    }
}

/// As whom the endpoints of `root` issue requests, in the order of the tree.
pub(super) fn requesters(root: &RootComplex) -> Vec<Arc<Requester>> {
    let endpoints = root
        .nodes()
        .filter(|node| matches!(node.kind, NodeKind::Endpoint(_)));
    let requester = |bdf| {
        Arc::new(Requester::new(Sbdf {
            segment: root.segment,
            bdf,
        }))
    };
    endpoints.map(|node| requester(node.bdf)).collect()
}

/// The unit `planned`, which `host` serves; it knows `functions` by their places there.
pub(super) fn served(
    planned: &ViommuPlan,
    around: &Surroundings<'_>,
    host: Arc<dyn ViommuHost>,
    functions: &[Arc<Requester>],
) -> Result<Arc<ServedUnit>, HostError> {
    let protection = around.protection.clone();
    ServedUnit::new(ServedParts {
        name: planned.name.clone(),
        at: planned.sbdf(),
        mmio: planned.mmio,
        features: planned.offer.features(),
        ram: around.ram.clone(),
        host,
        protection: protection.expect("it is asked for where a unit is served"),
        functions: functions.iter().cloned().zip((0..).map(HostDevice)).collect(),
    })
}

impl Polled for Simulated {
    fn name(&self) -> &str {
        self.unit.name()
    }

    fn registers(&self) -> GpaRange {
        self.unit.mmio()
    }

    fn polling(&self) -> &OnceLock<Polling> {
        self.unit.polling()
    }

    fn late_doorbell(&self, offset: u64, data: &[u8]) -> bool {
        let page = offset.checked_sub(Reg::RUNNING_AT);
        page.is_some_and(|offset| self.host.late_doorbell(offset, data))
    }

    fn run_late_commands(&self) -> bool {
        self.host.run_late_commands()
    }

    fn run_commands(&self) {
        self.run_commands();
    }
}

impl Simulated {
    /// From now on `window` shows heads, tails and Status.
    pub(super) fn show_registers(&self, window: Box<dyn RegisterWindow>) {
        self.host.show_registers(window);
    }

    /// Do what its host has for the event loop.
    fn run_commands(&self) {
        self.host.run_commands();
        self.unit.hear_errors();
    }

    /// The function at `at`, by the number that the model has for it, if it is behind the unit.
    fn device_at(&self, at: Sbdf) -> Option<(HostDevice, &Arc<Requester>)> {
        let mut functions = self.functions.iter().enumerate();
        let found = functions.find(|(_, requester)| requester.sbdf() == at);
        found.map(|(index, requester)| (HostDevice(index), requester))
    }

    /// As whom the function at `at` issues requests, and where those go, if it is behind the unit.
    pub(super) fn function_at(&self, at: Sbdf) -> Option<(Arc<Requester>, Arc<dyn Translator>)> {
        let (device, requester) = self.device_at(at)?;
        Some((requester.clone(), self.host.translator(device)))
    }

    /// Whom the function at `at` asks for translations and pages, where the unit speaks of that with functions.
    pub(super) fn agent(&self, at: Sbdf) -> Option<Arc<dyn TranslationAgent>> {
        let (device, _) = self.device_at(at)?;
        self.host.agent(device)
    }

    /// Have `follower` hear what the guest has invalidated of the function at `at`.
    pub(super) fn add_follower(&self, at: Sbdf, follower: Arc<dyn Follower>) {
        if let Some((device, requester)) = self.device_at(at) {
            self.host.add_follower(device, requester.clone(), follower);
        }
    }
}
