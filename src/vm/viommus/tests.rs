//! Units beside a hierarchy that their guest changes.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::iommu::viommu::testing::{DEVICE_TABLE, FakeProtection};
use crate::pci::testing::{Machine, Messages, Probe};
use crate::platform::addr::{Bdf, Sbdf};
use crate::platform::dma::Dma;
use crate::vm::config::Config;

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
    registers: Arc<dyn crate::platform::bus::BusDevice>,
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
