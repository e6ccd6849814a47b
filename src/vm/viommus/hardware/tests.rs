//! Mode `hw` in a machine, over a kernel that is none: from the plan to the last object.

mod leaving;
mod paused;
mod told;

use std::collections::BTreeMap;
use std::path::Path;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::devices::vfio::host::HostFunction;
use crate::devices::vfio::lent::Lent;
use crate::devices::vfio::testing::{Device, GuestSpace, nic_config};
use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::iommufd::fake::{EFR, EFR2, ERRNOS, EXT_INT, Fake, Object, Version};
use crate::iommu::iommufd::{Ioas, Kernel, Memlock};
use crate::iommu::viommu::testing::{DEVICE_TABLE, FakeProtection, LOG, RING, dte};
use crate::pci::Function;
use crate::pci::access::DwordWrite;
use crate::pci::testing::{Machine, Messages, Probe};
use crate::pci::tree::Node;
use crate::platform::bus::BusDevice;
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiSink;
use crate::vm::config::Config;
use crate::vm::events::EventLoop;
use crate::vm::hardware::{GuestProcessors, Serving};
use crate::vm::host_functions::HostFunctions;
use crate::vm::host_functions::recorded::Recorded;
use crate::vm::passed::{Passed, wanted};
use crate::vm::plan::Plan;
use crate::vm::viommus::Viommus;
use crate::vm::viommus::unit::Unit;

const NICS: [(&str, &str, u32); 3] = [
    ("0000:41:00.0", "ivhd1", 12),
    ("0000:42:00.0", "ivhd1", 13),
    ("0000:c1:00.0", "ivhd3", 30),
];
/// Bytes of RAM: the driver's table is below.
const RAM: usize = 0x60_0000;

/// A host, the plan of a guest for it, and what surrounds the guest.
struct Bench {
    fake: Arc<Fake>,
    /// By address; each bound.
    devices: BTreeMap<Sbdf, (u32, Arc<Device>)>,
    plan: Plan,
    ram: GuestRam,
    protection: Arc<FakeProtection>,
    space: Arc<GuestSpace>,
    host: Recorded,
}

/// The guest's units and the event loop, as a machine has them.
struct Made {
    events: EventLoop,
    units: Vec<Hardware>,
    /// What the guest has of each NIC.
    lent: Vec<Arc<Lent>>,
}

impl Bench {
    /// A kernel of `version`, and a guest with `viommu`, a machine file's section, for the three NICs.
    fn new(version: Version, viommu: &str) -> Self {
        let nics: String = NICS
            .iter()
            .map(|(at, ..)| format!("[[vfio-device]]\nhost = \"{at}\"\n"))
            .collect();
        Self::with(version, &format!("cpus = 4\n[[viommu]]\n{viommu}{nics}"))
    }

    /// The same for the machine file `text`.
    fn with(version: Version, text: &str) -> Self {
        let host = Recorded::new();
        for (at, iommu, group) in NICS {
            host.function(at, "0x020000\n", 0x80).served(at, iommu, group);
            // 40:00.2 is what the kernel expects to be told.
            let home = "sys/devices/0000:40:00.2/iommu";
            host.file(
                &format!("{home}/{iommu}/amd-iommu/features"),
                format!("{EFR:x}:{EFR2:x}\n"),
            )
            .link(
                &format!("sys/class/iommu/{iommu}"),
                &format!("../../devices/0000:40:00.2/iommu/{iommu}"),
            );
        }
        let config = Config::parse(Path::new("m.toml"), text);
        let functions = HostFunctions::below(host.root());
        let plan = Plan::resolve_on(&config.expect("a machine file"), &functions);
        let plan = plan.unwrap_or_else(|error| panic!("{error}"));
        let fake = Fake::new(version);
        let bound = NICS.map(|(at, iommu, _)| {
            let id = fake.bind(u32::from(iommu == "ivhd3"));
            let device = Device::with(&nic_config()).bound(id, fake.function(id));
            (at.parse().expect("an address"), (id, Arc::new(device)))
        });
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        Self {
            fake,
            devices: bound.into(),
            plan,
            protection: FakeProtection::new(ram.clone()),
            ram,
            space: GuestSpace::new(),
            host,
        }
    }

    /// What a machine does until its guest starts.
    fn build(&self) -> Result<Made, HostError> {
        let vm = tempfile::tempfile().expect("a file");
        let kernel: Arc<dyn Kernel> = self.fake.clone();
        let serving = Serving {
            plan: &self.plan,
            kernel: Some(kernel),
            processors: Arc::new(GuestProcessors::new(
                Arc::new(vm),
                self.plan.cpus.apic_ids.clone(),
            )),
            host: HostFunctions::below(self.host.root()),
        };
        let open = |at: Sbdf| -> Result<Arc<dyn HostFunction>, HostError> { Ok(self.devices[&at].1.clone()) };
        let serve = |functions: &[_], space: &Ioas| serving.hosts(functions, space);
        let any = Memlock { limit: None };
        let wanted = wanted(&self.plan);
        let passed = Passed::attach(&wanted, &self.ram, self.fake.clone(), open, serve, any)?;
        let messages: Arc<dyn MsiSink> = Messages::new();
        let around = Surroundings {
            ram: &self.ram,
            messages: &messages,
            protection: Some(self.protection.clone()),
        };
        let mut events = EventLoop::new()?;
        let mut units = Vec::new();
        for (index, planned) in self.plan.viommus.iter().enumerate() {
            let mut roots = self.plan.pci.roots();
            let root = roots.find(|root| root.name == planned.root_complex);
            let Some((host, space)) = passed.host(index) else {
                continue;
            };
            let root = root.expect("planned");
            let unit = Hardware::new(planned, root, &around, host, space, &mut events)?;
            unit.map_page(Gpa(planned.mmio.start().0 + 0x2000), &*self.space)?;
            units.push(unit);
        }
        let lent = (0..self.plan.devices.len()).filter_map(|index| passed.function(index));
        let lent = lent.map(|(lent, _)| lent).collect();
        Ok(Made { events, units, lent })
    }

    /// The guest's hierarchy; functions behind `unit` issue their requests as that has it.
    fn hierarchy(&self, unit: &Hardware) -> Machine {
        Machine::with_devices(self.plan.pci.clone(), |node| {
            let mut behind = unit.functions.iter();
            let requester = behind.find(|requester| requester.sbdf().bdf == node.bdf);
            Probe::issuing_as(node, requester.cloned().unwrap_or_default())
        })
    }

    /// Number `index` of the units of `made`, as a machine has them, and the hierarchy that it observes.
    fn machine<'a>(&'a self, made: &mut Made, index: usize) -> (Viommus<'a>, Machine) {
        let hardware = made.units.remove(index);
        let machine = self.hierarchy(&hardware);
        let viommus = Viommus {
            doorbells: Vec::new(),
            plan: &self.plan,
            units: vec![Unit::Hardware(Arc::new(hardware))],
        };
        viommus.observe(&machine.topology);
        (viommus, machine)
    }

    fn attached(&self, nic: usize) -> Option<u32> {
        let at: Sbdf = NICS[nic].0.parse().expect("an address");
        self.fake.attached(self.devices[&at].0)
    }

    /// Nothing of the guest's is left on the host or in the guest's space.
    fn assert_empty(&self, when: &str) {
        let left = self.fake.objects();
        assert!(left.is_empty(), "{when}: {left:?}");
        assert_eq!([0, 1, 2].map(|nic| self.attached(nic)), [None; 3], "{when}");
        assert!(self.space.mapped().is_empty(), "{when}");
    }

    /// Store the entry of the function with the guest's number `id`, upper half first.
    fn entry(&self, id: u16, entry: [u64; 4]) {
        let at = DEVICE_TABLE + 32 * u64::from(id);
        for half in [1, 0] {
            let words = [entry[2 * half], entry[2 * half + 1]];
            let bytes: Vec<_> = words.into_iter().flat_map(u64::to_le_bytes).collect();
            self.protection.store(Gpa(at + 16 * half as u64), &bytes);
        }
    }
}

impl Made {
    fn write(&self, unit: usize, at: u64, value: u64) {
        self.units[unit].unit().write(at, &value.to_le_bytes());
    }

    /// What Linux sets up, in its order: table, commands, events, its interrupt, and all of it on.
    fn start(&self, unit: usize) {
        self.write(unit, 0x00, DEVICE_TABLE | 0x1ff);
        self.write(unit, 0x08, RING | 9 << 56);
        self.write(unit, 0x10, LOG | 9 << 56);
        // XT, the event interrupt to the processor with APIC ID 2; commands, events, GT, the unit.
        self.write(unit, 0x170, 0x31 << 32 | 2 << 8);
        self.write(
            unit,
            0x18,
            1 << 51 | 1 << 50 | 1 << 16 | 1 << 12 | 1 << 3 | 1 << 2 | 1,
        );
    }

    /// The number by which the guest knows function `index` of `unit`.
    fn id(&self, unit: usize, index: usize) -> u16 {
        self.units[unit].functions[index].sbdf().bdf.requester_id()
    }
}

fn count(fake: &Fake, kind: fn(&Object) -> bool) -> usize {
    fake.objects().iter().filter(|object| kind(object)).count()
}

fn is_viommu(object: &Object) -> bool {
    matches!(object, Object::Viommu { .. })
}

fn is_parent(object: &Object) -> bool {
    matches!(
        object,
        Object::Hwpt {
            nest_parent: true,
            ..
        }
    )
}

fn is_nested(object: &Object) -> bool {
    matches!(object, Object::Nested { .. })
}

fn is_queue(object: &Object) -> bool {
    matches!(object, Object::Queue { .. })
}

fn is_vdevice(object: &Object) -> bool {
    matches!(object, Object::Vdevice { .. })
}

#[test]
fn each_unit_of_the_host_serves_one_of_the_guests_over_one_parent() {
    let bench = Bench::new(Version::E, "mode = \"per-host\"\n");
    let made = bench.build().expect("a kernel of AMD's");
    assert_eq!(made.units.len(), 2);
    assert_eq!(
        (count(&bench.fake, is_viommu), count(&bench.fake, is_parent)),
        (2, 1)
    );
    let parent = bench.attached(0);
    assert!(parent.is_some() && [1, 2].iter().all(|nic| bench.attached(*nic) == parent));
    // Page 3 of each, and nothing else.
    let pages = bench
        .plan
        .viommus
        .iter()
        .map(|unit| (unit.mmio.start().0 + 0x2000, 0x1000));
    assert_eq!(bench.space.mapped(), pages.collect::<Vec<_>>());
    assert!(made.units[0].state().ends_with("; interface v-e"));
    // Guest memory is in the address space under the parent.
    assert!(bench.fake.is_filled(space_of_parent(&bench.fake)));
    drop(made);
    bench.assert_empty("never started");
}

/// The address space that the parent maps.
fn space_of_parent(fake: &Fake) -> u32 {
    let objects = fake.objects();
    let space = objects.iter().find_map(|object| match *object {
        Object::Hwpt {
            ioas,
            nest_parent: true,
        } => Some(ioas),
        _ => None,
    });
    space.expect("a parent")
}

#[test]
fn a_guest_lives_over_the_hosts_unit_and_all_goes_in_order() {
    let bench = Bench::new(Version::E, "mode = \"hw\"\nabi = \"v-e\"\n");
    let made = bench.build().expect("a kernel of AMD's");
    let parent = bench.attached(0);
    made.start(0);
    made.start(1);
    assert_eq!(count(&bench.fake, is_queue), 4);
    assert_eq!(count(&bench.fake, is_vdevice), 3);
    bench.entry(made.id(0, 0), dte(0x30_0000, 1));
    bench.entry(made.id(1, 0), dte(0x31_0000, 1));
    assert_eq!(count(&bench.fake, is_nested), 2);
    let [first, second, third] = [0, 1, 2].map(|nic| bench.attached(nic));
    assert!(first != parent && third != parent && first != third && second == parent);
    // An entry that blocks, and the other unit's stays.
    bench.entry(made.id(0, 0), [3, 0, 0, 0]);
    assert!(bench.attached(0) != first && bench.attached(0) != parent && bench.attached(2) == third);
    bench.entry(made.id(0, 0), dte(0x32_0000, 2));
    // The guest resets.
    for unit in &made.units {
        unit.unit().reset();
    }
    assert!([0, 1, 2].iter().all(|nic| bench.attached(*nic) == parent));
    assert_eq!(
        (count(&bench.fake, is_nested), count(&bench.fake, is_queue)),
        (0, 0)
    );
    assert_eq!(
        (count(&bench.fake, is_viommu), bench.space.mapped().len()),
        (2, 2)
    );
    // And comes again, with the table where it left it, and ends in the middle of it.
    made.start(0);
    bench.entry(made.id(0, 1), dte(0x33_0000, 3));
    assert_eq!(
        (count(&bench.fake, is_nested), count(&bench.fake, is_queue)),
        (2, 2)
    );
    let before = bench.fake.destroyed().len();
    drop(made);
    bench.assert_empty("in the middle");
    assert_eq!(bench.fake.destroyed_in_use(), 0);
    let gone = bench.fake.destroyed().split_off(before);
    let last = |kind: fn(&Object) -> bool| gone.iter().rposition(kind).expect("one of them");
    let first = |kind: fn(&Object) -> bool| gone.iter().position(kind).expect("one of them");
    assert!(last(is_queue) < first(is_nested) && last(is_nested) < first(is_viommu));
    assert!(last(is_viommu) < first(is_parent));
    assert_eq!(gone.last(), Some(&Object::Ioas), "guest memory goes last");
}

#[test]
fn beside_them_functions_behind_an_emulated_unit_are_attached_to_guest_memory_itself() {
    let nic = |index: usize, port: &str| {
        let (at, ..) = NICS[index];
        format!(
            "[[root-port]]\nid = \"{port}\"\non = \"{port}-root\"\n[[vfio-device]]\nhost = \"{at}\"\nport = \"{port}\"\n"
        )
    };
    let bench = Bench::with(
        Version::E,
        &format!(
            "[[root-complex]]\nid = \"mine\"\n[[root-complex]]\nid = \"a-root\"\n[[root-complex]]\nid = \"b-root\"\n\
             [[rng]]\n[[viommu]]\nmode = \"emulated\"\non = \"a-root\"\n[[viommu]]\nmode = \"hw\"\non = \"b-root\"\n{}{}",
            nic(0, "a"),
            nic(2, "b")
        ),
    );
    let made = bench.build().expect("a kernel of AMD's");
    assert_eq!(made.units.len(), 1);
    let memory = space_of_parent(&bench.fake);
    assert_eq!(bench.attached(0), Some(memory));
    assert!(bench.attached(2).is_some_and(|parent| parent != memory));
    made.start(0);
    bench.entry(made.id(0, 0), dte(0x30_0000, 1));
    assert_eq!(
        (count(&bench.fake, is_nested), bench.attached(0)),
        (1, Some(memory))
    );
}

#[test]
fn the_units_interrupt_goes_to_the_processor_that_the_guest_names() {
    let folder = tempfile::tempdir().expect("a folder");
    // This host's units have no XT, so that messages say where.
    let bench = Bench::new(
        Version::E,
        &format!("mode = \"hw\"\nabi = \"{}\"\n", with_interrupts(folder.path())),
    );
    let made = bench.build().expect("a kernel of AMD's");
    made.start(0);
    let unit = made.units[0].unit();
    let write = |dword: u16, value: u32| {
        // Interrupts are all that it can be about, and those were served.
        let _effect = unit.config_write(dword, DwordWrite::whole(value));
    };
    let msi = msi_at(&**unit);
    // Address, upper half, data; then on.
    write(msi + 1, 0xfee0_2000);
    write(msi + 2, 0);
    write(msi + 3, 0x41);
    write(msi, 1 << 16);
    let routed = || -> Vec<_> {
        let routes = bench.fake.routes().into_iter();
        routes
            .map(|[kind, _, vcpu, vector]| (kind, vcpu, vector))
            .collect()
    };
    assert_eq!(routed().last_chunk(), Some(&[(0, 2, 0x41), (1, 2, 0x41)]));
    // A processor that is not there: nowhere, and not where they went.
    write(msi + 1, 0xfee0_9000);
    assert_eq!(routed().last_chunk(), Some(&[(0, 0, 0), (1, 0, 0)]));
    let asked = bench.fake.asked();
    write(msi + 1, 0xfee0_9000);
    assert_eq!(bench.fake.asked(), asked, "once");
}

/// A table in `folder` of a kernel that has the request for interrupts; where it is.
fn with_interrupts(folder: &Path) -> String {
    let table = folder.join("kernel.toml");
    let text = format!(
        "base = 'v-e'\n[ext-int]\nrequest = {EXT_INT}\nlen = 32\nviommu = 4\nkind = 8\nkvm = 12\nvcpu = 16\n\
         vector = 20\nevent = 0\nppr = 1\n"
    );
    std::fs::write(&table, text).expect("written");
    table.display().to_string()
}

/// The dword at which the MSI capability of `function` begins.
fn msi_at(function: &dyn Function) -> u16 {
    let mut at = function.config_read(0xd) & 0xfc;
    loop {
        let header = function.config_read(u16::try_from(at / 4).expect("below 256"));
        if header & 0xff == 5 {
            return u16::try_from(at / 4).expect("below 256");
        }
        at = header >> 8 & 0xfc;
        assert_ne!(at, 0, "no MSI");
    }
}

#[test]
fn a_machine_that_the_host_refuses_anything_is_not_built_and_leaves_nothing() {
    let bench = Bench::new(Version::E, "mode = \"per-host\"\n");
    let made = bench.build().expect("a kernel of AMD's");
    let requests = bench.fake.asked();
    drop(made);
    assert!(requests > 20, "{requests}");
    for errno in ERRNOS {
        let mut built = Vec::new();
        for request in 0..requests {
            bench.fake.fail(request, errno);
            match bench.build() {
                Ok(made) => {
                    built.push(request);
                    drop(made);
                }
                Err(error) => assert!(
                    error.source.to_string().contains(&format!("os error {errno})")),
                    "{error}: {}",
                    error.source
                ),
            }
            bench.fake.relent();
            bench.assert_empty(&format!("request {request}, errno {errno}"));
        }
        // Each of two units asks twice for a queue that cannot be, and is told that it is invalid.
        let invalid = if errno == libc::EINVAL { 4 } else { 0 };
        assert_eq!(built.len(), invalid, "errno {errno}: {built:?}");
    }
}

#[test]
fn a_guest_whose_host_refuses_any_one_request_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let viommu = format!("mode = \"hw\"\nabi = \"{}\"\n", with_interrupts(folder.path()));
    let life = |bench: &Bench, made: &Made| {
        made.start(0);
        bench.entry(made.id(0, 0), dte(0x30_0000, 1));
        bench.entry(made.id(0, 1), dte(0x31_0000, 2));
        bench.entry(made.id(0, 0), [0; 4]);
        made.units[0].unit().reset();
        made.start(0);
        bench.entry(made.id(0, 0), dte(0x32_0000, 1));
    };
    let bench = Bench::new(Version::E, &viommu);
    let made = bench.build().expect("a kernel of AMD's");
    let before = bench.fake.asked();
    life(&bench, &made);
    let requests = bench.fake.asked() - before;
    drop(made);
    assert!(requests > 10, "{requests}");
    for errno in ERRNOS {
        for request in 0..requests {
            let made = bench.build().expect("a kernel of AMD's");
            bench.fake.fail(request, errno);
            life(&bench, &made);
            assert!(!bench.fake.fails());
            // The guest tries again, and what was refused is there.
            made.units[0].unit().reset();
            life(&bench, &made);
            assert_eq!(
                count(&bench.fake, is_nested),
                2,
                "request {request}, errno {errno}"
            );
            assert_eq!(
                count(&bench.fake, is_queue),
                2,
                "request {request}, errno {errno}"
            );
            drop(made);
            bench.assert_empty(&format!("request {request}, errno {errno}"));
        }
    }
}

#[test]
fn an_interrupt_that_the_kernel_does_not_send_once_is_sent_after_the_next_register() {
    let folder = tempfile::tempdir().expect("a folder");
    let viommu = format!("mode = \"hw\"\nabi = \"{}\"\n", with_interrupts(folder.path()));
    let bench = Bench::new(Version::E, &viommu);
    for errno in ERRNOS {
        let made = bench.build().expect("a kernel of AMD's");
        made.start(0);
        let unit = made.units[0].unit();
        let write = |dword: u16, value: u32| {
            // Interrupts are all that it can be about, and those were served.
            let _effect = unit.config_write(dword, DwordWrite::whole(value));
        };
        let msi = msi_at(&**unit);
        write(msi + 1, 0xfee0_2000);
        write(msi + 3, 0x41);
        let before = bench.fake.routes().len();
        bench.fake.fail(0, errno);
        write(msi, 1 << 16);
        assert_eq!(bench.fake.routes().len(), before + 1, "the other, errno {errno}");
        assert_eq!(unit.counts().refusals, 1, "errno {errno}");
        made.write(0, 0x10, LOG | 9 << 56);
        let routed: Vec<_> = bench.fake.routes()[before..]
            .iter()
            .map(|[kind, _, vcpu, vector]| (*kind, *vcpu, *vector))
            .collect();
        assert_eq!(routed, [(1, 2, 0x41), (0, 2, 0x41)], "errno {errno}");
    }
}

#[test]
fn a_stock_kernel_is_refused_with_step_function_and_what_to_do() {
    let bench = Bench::new(Version::Stock, "mode = \"per-host\"\n");
    let error = bench.build().err().expect("nothing of AMD's");
    assert_eq!(
        error.action,
        "have ivhd1 of the host serve iommu0, with 0000:41:00.0 behind it (`ravelin host` says what is missing for mode \
         hw)"
    );
    let reason = error.source.to_string();
    assert!(
        reason.contains("v-e: HW_QUEUE_ALLOC: Operation not supported (os error 95)"),
        "{reason}"
    );
    bench.assert_empty("refused");
}

#[test]
fn a_kernel_that_tells_of_less_than_its_files_is_refused() {
    let bench = Bench::new(Version::E, "mode = \"per-host\"\n");
    // Two levels of GCR3 tables more than the file says.
    bench.fake.set_efr(EFR | 2 << 14);
    let error = bench.build().err().expect("not what was planned");
    let reason = error.source.to_string();
    assert!(
        reason.starts_with("GET_HW_INFO tells EFR ") && reason.contains("sysfs"),
        "{reason}"
    );
    bench.assert_empty("refused");
}

#[test]
fn a_function_of_the_hosts_that_the_guest_renumbers_has_its_new_numbers_entry_and_name() {
    let bench = Bench::new(Version::E, "mode = \"hw\"\nabi = \"v-e\"\n");
    let mut made = bench.build().expect("a kernel of AMD's");
    made.start(0);
    bench.entry(made.id(0, 0), dte(0x30_0000, 1));
    let parent = bench.attached(1);
    let machine = bench.hierarchy(&made.units[0]);
    let moved = made.units[0].functions[0].clone();
    let unit = Unit::Hardware(Arc::new(made.units.remove(0)));
    machine.topology.tell(unit.observer());
    let above = |node: &&Node| {
        let below = node.bridge.iter().flat_map(|bridge| &bridge.children);
        below.map(|child| child.bdf).any(|bdf| bdf == moved.sbdf().bdf)
    };
    let port = machine.tree.nodes().map(|(_, node)| node).find(above);
    // The last bus of the root complex, whose entries lie in a page that was not watched.
    let root = machine
        .tree
        .roots()
        .find(|root| root.nodes().any(|node| above(&node)));
    let last = *root.expect("the port is behind one").buses.end();
    let buses = u32::from_le_bytes([0, last, last, 0]);
    machine.write(port.expect("it is behind one").bdf, 6, buses);
    let id = moved.sbdf().bdf.requester_id();
    assert_eq!((id, bench.attached(0)), (u16::from(last) << 8, parent));
    let named = |object: &Object| matches!(*object, Object::Vdevice { name, .. } if name == u64::from(id));
    assert!(bench.fake.objects().iter().any(named));
    bench.entry(id, dte(0x31_0000, 2));
    // The table that it had before is gone, and something else may have that number by now.
    let table = bench.attached(0).and_then(|table| bench.fake.object(table));
    let Some(Object::Nested { dte: nested, .. }) = table else {
        panic!("{table:?}");
    };
    assert_eq!(Dte::from_quadwords(nested).gcr3_root(), 0x31_0000);
    drop((unit, machine, made));
    bench.assert_empty("renumbered");
}
