//! From the plan to a machine that can be started, in the order in which a board is powered on.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::RunError;
use super::board::Board;
use super::boot::{Entry, Images, acpi, cpuid};
use super::events::{EventLoop, Signals};
use super::functions::{self, Connections};
use super::lifecycle::Life;
use super::passed::Passed;
use super::plan::{CharBackend, DeviceKind, MemoryBacking, MemoryPlan, Plan};
use super::stats::Milestones;
use super::vcpu_loop::{Crew, Notices, Station, Surroundings};
use super::viommus::Viommus;
use crate::devices::request::RequestQueue;
use crate::pci::topology::Topology;
use crate::platform::host::HostError;
use crate::platform::kvm::{self, Kvm, KvmVm};
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiSink;
use crate::platform::ram::{self, Backing, HugePage, RamOptions};

/// A machine: everything between the plan and the guest.
///
/// Fields are dropped in order: processors first, then what they reach, then the machine's memory.
pub struct Machine<'a> {
    pub(super) crew: Crew,
    pub(super) life: Life,
    pub(super) events: EventLoop,
    pub(super) signals: Signals,
    pub(super) reports: Signals,
    pub(super) pauses: Signals,
    pub(super) resumes: Signals,
    pub(super) requests: Arc<RequestQueue>,
    pub(super) notices: Arc<Notices>,
    pub(super) surroundings: Arc<Surroundings>,
    /// Where guest RAM lies in this process.
    pub(super) host_ram: Vec<RangeInclusive<u64>>,
    images: Images,
    topology: Arc<Topology>,
    pub(super) board: Board,
    /// After all that knows them: where the host serves one, what the guest reaches of it goes first, then what the
    /// host made for it.
    pub(super) viommus: Viommus<'a>,
    ram: GuestRam,
    plan: &'a Plan,
    _vm: KvmVm,
}

impl<'a> Machine<'a> {
    /// Build the machine of `plan`, ready to start. The process started at `started`.
    pub(super) fn build(plan: &'a Plan, started: Instant) -> Result<Self, RunError> {
        let boot = plan.boot.as_ref().ok_or(RunError::NoKernel)?;

        // What can fail for the operator's reasons comes first: files, capabilities, memory.
        let mut images = Images::open(boot, default_cmdline(plan))?;
        let kvm = Kvm::open()?;
        let cpuid = kvm.supported_cpuid()?;
        check_reach(plan, &cpuid)?;
        let last_id = plan.cpus.apic_ids.last().copied().unwrap_or_default();
        kvm.check_vcpus(plan.cpus.apic_ids.len(), last_id)?;

        // RAM, then the kernel's part of the machine with it.
        let ram = ram::allocate(&plan.memory.regions, &ram_options(&plan.memory))?;
        let vm = KvmVm::new(&kvm, &ram)?;
        kvm::allow_kicks()?;
        let passed = Passed::open(plan, &ram, &vm)?;

        // The operator's way in, before devices that may make their terminal raw.
        let signals = Signals::stop()?;
        let reports = Signals::report()?;
        let pauses = Signals::pause()?;
        let resumes = Signals::resume()?;
        let mut events = EventLoop::new()?;
        let requests = RequestQueue::new()?;
        let notices = Notices::new()?;
        events.wake_for(&signals);
        events.wake_for(&reports);
        events.wake_for(&pauses);
        events.wake_for(&resumes);
        events.wake_for(&*requests);
        events.wake_for(&*notices);

        // Interrupts before those who interrupt, buses before those on them; configuration space opens when
        // everything in it is in its place.
        let delivery = Arc::new(vm.delivery().clone());
        let messages: Arc<dyn MsiSink> = delivery.clone();
        let mut viommus = Viommus::new(plan, &ram, &messages, &vm, &passed, &mut events)?;
        let mut board = Board::new(viommus.ioapic_host(delivery), requests.clone(), &mut events)?;
        board.populate(plan, &mut events)?;
        viommus.place(&mut board, &vm)?;
        let topology = functions::build(
            plan,
            &mut Connections {
                board: &board,
                viommus: &viommus,
                events: &mut events,
                ram: &ram,
                messages,
                doorbells: vm.doorbells(),
                passed: &passed,
                device_memory: vm.device_memory(),
                host_functions: Vec::new(),
            },
        )?;
        board.open_config_space(plan, &topology)?;

        // What the guest is started from, then the processors that start it.
        let entry = load(&mut images, &ram, plan)?;
        let surroundings = Arc::new(Surroundings {
            mmio: board.mmio.clone(),
            ports: board.ports.clone(),
            eoi: board.ioapic.clone(),
            watched: vm.watched_pages().clone(),
            milestones: Arc::new(Milestones::new(started)),
        });
        let stations = stations(plan, &vm)?;
        viommus.poll_doorbells(|| vm.coalesced_writes(&stations[0].vcpu))?;
        let crew = processors(plan, &kvm, &cpuid, stations, entry, &surroundings, &notices)?;
        Ok(Self {
            crew,
            life: Life::default(),
            events,
            signals,
            reports,
            pauses,
            resumes,
            requests,
            notices,
            surroundings,
            host_ram: host_ranges(&ram),
            images,
            topology,
            board,
            viommus,
            ram,
            plan,
            _vm: vm,
        })
    }

    /// Put kernel, tables and all else that a start needs into RAM.
    pub(super) fn load(&mut self) -> Result<Entry, RunError> {
        load(&mut self.images, &self.ram, self.plan)
    }

    /// Return once no thread of a device touches guest memory. No processor runs.
    pub(super) fn pause_devices(&self) {
        self.topology.pause();
    }

    /// Let all devices go on, before the processors do.
    pub(super) fn resume_devices(&self) {
        self.topology.resume();
    }

    /// All devices as after power-on. No processor runs.
    pub(super) fn reset_devices(&self) {
        // Functions first: they let go of their wires before the controller forgets what was asserted, and
        // send no request that an IOMMU would no longer translate.
        self.topology.reset();
        self.viommus.reset();
        self.board.reset();
    }
}

fn load(images: &mut Images, ram: &GuestRam, plan: &Plan) -> Result<Entry, RunError> {
    let ecams = plan.pci.segments.iter().map(|segment| segment.ecam);
    Ok(images.load(ram, |at| acpi::tables(plan, at), ecams)?)
}

/// Make the processors, at least one.
fn stations(plan: &Plan, vm: &KvmVm) -> Result<Vec<Station>, HostError> {
    let pinning = plan.cpus.pinning.iter().cloned().chain(std::iter::repeat(None));
    let stations = plan.cpus.apic_ids.iter().zip(pinning);
    stations
        .map(|(&apic_id, pinning)| {
            Ok(Station {
                vcpu: vm.vcpu(apic_id)?,
                pinning,
            })
        })
        .collect()
}

/// Start the processors' threads.
fn processors(
    plan: &Plan,
    kvm: &Kvm,
    supported: &kvm_bindings::CpuId,
    stations: Vec<Station>,
    entry: Entry,
    surroundings: &Arc<Surroundings>,
    notices: &Arc<Notices>,
) -> Result<Crew, RunError> {
    let first = stations.first().expect("a plan has at least one processor");
    // Where nothing remaps messages, devices may name any of the processors directly.
    let direct = !plan.viommus.iter().any(|viommu| viommu.offer.intremap);
    let model = cpuid::Model::new(supported, &plan.cpus, first.vcpu.tsc_khz()?, direct);
    let msrs = kvm.msr_indices()?;
    Ok(Crew::start(
        stations,
        &Arc::new(model),
        &msrs.into(),
        entry,
        surroundings,
        notices,
    )?)
}

/// Whether the host's processors can map every address of `plan`.
fn check_reach(plan: &Plan, supported: &kvm_bindings::CpuId) -> Result<(), RunError> {
    let (bits, reach) = cpuid::address_reach(supported);
    let highest = plan.layout.highest.0;
    if highest <= reach {
        return Ok(());
    }
    Err(RunError::AddressBits { highest, bits, reach })
}

/// What a Linux guest is told where the operator says nothing: where its console is.
fn default_cmdline(plan: &Plan) -> &'static str {
    let has_console = plan
        .devices
        .iter()
        .any(|device| matches!(device.kind, DeviceKind::Console(_)));
    match (&plan.serial, has_console) {
        (CharBackend::Null, true) => "console=hvc0",
        _ => "console=ttyS0",
    }
}

fn ram_options(plan: &MemoryPlan) -> RamOptions {
    let backing = match plan.backing {
        MemoryBacking::Anonymous => Backing::Anonymous,
        MemoryBacking::Shared => Backing::Shared,
        MemoryBacking::HugePages { page_size, .. } if page_size == HugePage::Gib1.bytes() => {
            Backing::Huge(HugePage::Gib1)
        }
        MemoryBacking::HugePages { .. } => Backing::Huge(HugePage::Mib2),
    };
    RamOptions {
        backing,
        transparent_huge_pages: plan.transparent_huge_pages,
        prefault: plan.prefault,
        host_numa_node: plan.host_numa_node,
    }
}

/// Where `ram` lies in this process.
fn host_ranges(ram: &GuestRam) -> Vec<RangeInclusive<u64>> {
    let host = |region: &vm_memory::GuestRegionMmap<()>| {
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()? as u64;
        Some(start..=start + (region.len() - 1))
    };
    ram.backend().iter().filter_map(host).collect()
}
