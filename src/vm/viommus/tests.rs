//! Units beside a hierarchy that their guest changes.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::request::RequestQueue;
use crate::devices::vfio::host::HostFunction;
use crate::devices::vfio::testing::{Device, GuestSpace};
use crate::iommu::iommufd::Memlock;
use crate::iommu::iommufd::testing::Host;
use crate::iommu::viommu::testing::{DEVICE_TABLE, FakeProtection};
use crate::pci::access::DwordWrite;
use crate::pci::testing::{Machine, Messages, Probe};
use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::dma::Dma;
use crate::platform::doorbell::{Doorbell, DoorbellHost};
use crate::platform::msi::MsiMessage;
use crate::vm::config::Config;
use crate::vm::functions::{self, Connections};
use crate::vm::host_functions::{HostFunctions, recorded};
use crate::vm::passed::wanted;

const BUSES: u16 = 6;
/// Bus 5, and no bus below it.
const BUS_5: u32 = 0x0005_0500;

/// A machine with a unit as `viommu` says, and a device behind it and a root port: its hierarchy, the way of the device to
/// memory, and as whom that is.
struct Guest {
    machine: Machine,
    ram: GuestRam,
    requester: Arc<Requester>,
    dma: Dma,
    registers: Arc<dyn BusDevice>,
    unit: Unit,
}

fn guest(viommu: &str) -> Guest {
    let text =
        format!("{viommu}[[root-port]]\nid = \"rp0\"\n[[test-device]]\nid = \"test0\"\nport = \"rp0\"\n");
    let config = Config::parse(Path::new("m.toml"), &text).expect("a machine file");
    let plan = Plan::resolve(&config).unwrap_or_else(|error| panic!("{error}"));
    let root = plan.pci.roots().next().expect("one");
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x60_0000)]).expect("a mapping");
    let ram = GuestRam::new(ram);
    let messages: Arc<dyn MsiSink> = Messages::new();
    let around = Surroundings {
        ram: &ram,
        messages: &messages,
        protection: Some(FakeProtection::new(ram.clone())),
    };
    let mut events = EventLoop::new().expect("an epoll descriptor");
    let unit = Unit::new(&plan.viommus[0], root, &around, None, &mut events).expect("made");
    let registers = unit.registers();
    let device = root.nodes().find(|node| node.name == "test0").expect("planned");
    let at = Sbdf {
        segment: root.segment,
        bdf: device.bdf,
    };
    let (requester, dma) = Upstream::new(Some(&unit), &messages).dma(at, ram.clone());
    let machine = Machine::with_devices(plan.pci.clone(), |node| match node.name.as_str() {
        "test0" => Probe::issuing_as(node, requester.clone()),
        _ => Probe::new(node),
    });
    let units = Viommus {
        doorbells: Vec::new(),
        plan: &plan,
        units: vec![unit.clone()],
    };
    units.observe(&machine.topology);
    machine.enable();
    Guest {
        machine,
        ram,
        requester,
        dma,
        registers,
        unit,
    }
}

impl Guest {
    /// Whether the device reaches memory.
    fn reaches(&self) -> bool {
        self.requester.set_bus_master(true);
        self.dma.view().read_obj::<u64>(GuestAddress(0x50_0000)).is_ok()
    }

    fn entry(&self, device: Bdf, word: u64) {
        let at = DEVICE_TABLE + 32 * u64::from(device.requester_id());
        self.ram.write(Gpa(at), &word.to_le_bytes()).expect("RAM");
    }
}

/// The same before the requests of mode `hw`: `hardware/tests/paused.rs`.
#[test]
fn a_pause_asks_the_model_that_serves_a_unit_for_nothing() {
    let guest = guest("[[viommu]]\nmode = \"sim\"\n");
    let bus_1 = guest.requester.sbdf().bdf;
    guest.entry(bus_1, 3 << 61 | 3);
    guest.registers.write(0x00, &(DEVICE_TABLE | 0x3f).to_le_bytes());
    guest.registers.write(0x18, &1_u64.to_le_bytes());
    assert!(guest.reaches());
    let before = (guest.unit.counts(), guest.unit.state());
    let (_, asked) = before.0;
    assert!(asked.is_some_and(|asked| asked.watches > 0), "{asked:?}");
    guest.machine.topology.pause();
    guest.unit.catch_up();
    assert_eq!((guest.unit.counts(), guest.unit.state()), before);
    guest.machine.topology.resume();
    assert_eq!((guest.unit.counts(), guest.unit.state()), before);
    assert!(guest.reaches());
}

#[test]
fn a_unit_goes_by_the_number_that_the_guest_gave_last() {
    for mode in ["emulated", "sim"] {
        let guest = guest(&format!("[[viommu]]\nmode = \"{mode}\"\n"));
        let bus_5 = Bdf::new(5, 0, 0).expect("valid");
        // All of bus 5 is blocked, and nothing of bus 1 is.
        guest.entry(bus_5, 3);
        guest.registers.write(0x00, &(DEVICE_TABLE | 0x3f).to_le_bytes());
        guest.registers.write(0x18, &1_u64.to_le_bytes());
        assert!(guest.reaches(), "{mode}");
        let port = guest.machine.node("rp0").bdf;
        let before = guest.machine.read(port, BUSES);
        guest.machine.write(port, BUSES, BUS_5);
        assert_eq!(guest.requester.sbdf().bdf, bus_5);
        assert!(!guest.reaches(), "{mode}");
        guest.machine.write(port, BUSES, before);
        assert!(guest.reaches(), "{mode}");
    }
}

/// An interrupt controller's host, and doorbells, of a machine that never runs.
struct NeverRuns;

impl IoApicHost for NeverRuns {
    fn signal(&self, _message: MsiMessage) {}

    fn set_route(&self, _pin: u8, _message: Option<MsiMessage>) -> Result<(), HostError> {
        Ok(())
    }

    fn pins_of(&self, _vector: u8) -> u32 {
        0
    }
}

impl DoorbellHost for NeverRuns {
    fn attach(&self, at: Gpa, _fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError> {
        unreachable!("no device has a doorbell at {at}")
    }
}

/// A machine as it is built, up to its hierarchy: one unit of `mode`, and behind it and a root port the device `device`, a
/// machine file's section.
struct Built {
    topology: Arc<Topology>,
    ram: GuestRam,
    unit: Unit,
    /// Before the unit.
    messages: Arc<dyn MsiSink>,
    port: Bdf,
    device: Sbdf,
    /// What a function of the host would be.
    nic: Arc<Device>,
    _events: EventLoop,
}

impl Built {
    fn new(mode: &str, device: &str) -> Self {
        let text =
            format!("[[viommu]]\nmode = \"{mode}\"\n[[root-port]]\nid = \"rp0\"\n{device}port = \"rp0\"\n");
        let config = Config::parse(Path::new("m.toml"), &text).expect("a machine file");
        // As the function that stands for it has them: memory, ports, memory.
        let host = recorded::nic();
        let [none, memory, ports, table] = [
            "0x0 0x0 0x0\n",
            "0xfea00000 0xfea1ffff 0x40200\n",
            "0xc000 0xc01f 0x40101\n",
            "0xfea40000 0xfea43fff 0x40200\n",
        ];
        let bars = [memory, none, ports, table, none, none, none].concat();
        host.file(&format!("sys/bus/pci/devices/{}/resource", recorded::NIC), bars);
        let plan = Plan::resolve_on(&config, &HostFunctions::below(host.root()));
        let plan = plan.unwrap_or_else(|error| panic!("{error}"));
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x60_0000)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let nic = Device::nic();
        let open = |_| -> Result<Arc<dyn HostFunction>, HostError> { Ok(nic.clone()) };
        let any = Memlock { limit: None };
        let passed = Passed::attach(
            &wanted(&plan),
            &ram,
            Host::new(),
            open,
            |_, _| Ok(Vec::new()),
            any,
        );
        let passed = passed.expect("attached");
        let messages: Arc<dyn MsiSink> = Messages::new();
        let around = Surroundings {
            ram: &ram,
            messages: &messages,
            protection: Some(FakeProtection::new(ram.clone())),
        };
        let mut events = EventLoop::new().expect("an epoll descriptor");
        let root = plan.pci.roots().next().expect("one");
        let unit = Unit::new(&plan.viommus[0], root, &around, None, &mut events).expect("made");
        let viommus = Viommus {
            doorbells: Vec::new(),
            plan: &plan,
            units: vec![unit.clone()],
        };
        let requests = RequestQueue::new().expect("an eventfd");
        let board = Board::new(Arc::new(NeverRuns), requests, &mut events).expect("a timer");
        let topology = functions::build(
            &plan,
            &mut Connections {
                board: &board,
                viommus: &viommus,
                events: &mut events,
                ram: &ram,
                messages: messages.clone(),
                doorbells: Arc::new(NeverRuns),
                passed: &passed,
                device_memory: GuestSpace::new(),
                host_functions: Vec::new(),
            },
        );
        let topology = topology.unwrap_or_else(|error| panic!("{error}"));
        let at = |wanted: fn(&NodeKind) -> bool| {
            let found = root.nodes().find(|node| wanted(&node.kind));
            found.expect("planned").bdf
        };
        let port = at(|kind| matches!(kind, NodeKind::RootPort));
        let device = Sbdf {
            segment: root.segment,
            bdf: at(|kind| matches!(kind, NodeKind::Endpoint(_))),
        };
        Self {
            topology,
            ram,
            unit,
            messages,
            port,
            device,
            nic,
            _events: events,
        }
    }

    /// Have the unit on, with a table in which all of bus 5 is blocked and nothing else is.
    fn start(&self) {
        let at = DEVICE_TABLE + 32 * 0x500;
        self.ram.write(Gpa(at), &3_u64.to_le_bytes()).expect("RAM");
        let registers = self.unit.registers();
        registers.write(0x00, &(DEVICE_TABLE | 0x3f).to_le_bytes());
        registers.write(0x18, &1_u64.to_le_bytes());
    }

    /// Have the port lead to the buses that `numbers` says.
    fn renumber(&self, numbers: u32) {
        let write = DwordWrite::whole(numbers);
        self.topology
            .config_write(self.device.segment, self.port, BUSES, write);
    }

    fn numbers(&self) -> u32 {
        self.topology.config_read(self.device.segment, self.port, BUSES)
    }
}

#[test]
fn a_served_unit_of_a_machine_as_it_is_built_goes_by_the_guests_numbers() {
    let built = Built::new("sim", "[[test-device]]\n");
    let (requester, dma) =
        Upstream::new(Some(&built.unit), &built.messages).dma(built.device, built.ram.clone());
    let reaches = || {
        requester.set_bus_master(true);
        dma.view().read_obj::<u64>(GuestAddress(0x50_0000)).is_ok()
    };
    built.start();
    assert!(reaches());
    let before = built.numbers();
    built.renumber(BUS_5);
    assert!(!reaches(), "by the entry of its new number");
    built.renumber(before);
    assert!(reaches());
}

#[test]
fn a_shadow_of_a_machine_as_it_is_built_goes_by_the_guests_numbers() {
    let built = Built::new("emulated", "[[vfio-device]]\nhost = \"0000:41:00.0\"\n");
    built.start();
    let memory = built.nic.attached();
    let before = built.numbers();
    built.renumber(BUS_5);
    let blocked = built.nic.attached();
    assert_ne!(blocked.last(), memory.last(), "by the entry of its new number");
    built.renumber(before);
    assert_eq!(built.nic.attached().last(), memory.last());
}
