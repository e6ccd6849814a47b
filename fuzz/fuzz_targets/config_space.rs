//! Configuration accesses of any width to every kind of port and to devices with all that a function can
//! have, accesses to whatever BARs they leave open, and interrupts of the devices in between.
//!
//! Nothing may panic or answer outside its root complex; a write changes nothing but the bits it was made
//! for, and what identifies a function never; interrupts leave only as the guest asked for them; and after a
//! reset everything is as it was.

#![no_main]

mod steps;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::bar::BarSpec;
use ravelin::pci::capability::{
    AccessControl, ErrorReporting, Express, MsixLayout, PowerManagement, Subsystem, VendorSpecific,
};
use ravelin::pci::config_ports::ConfigPorts;
use ravelin::pci::config_space::ConfigSpace;
use ravelin::pci::ecam::Ecam;
use ravelin::pci::endpoint::{Endpoint, InterruptMode};
use ravelin::pci::testing::{Machine, Messages, two_roots};
use ravelin::pci::tree::Node;
use ravelin::pci::{Command, ConfigEffect, Function};
use ravelin::platform::addr::Sbdf;
use ravelin::platform::bus::BusDevice;
use ravelin::platform::dma::Requester;
use ravelin::platform::irq::{InterruptController, IrqLine};
use ravelin::platform::msi::MsiPort;
use steps::steps;

#[derive(Arbitrary, Debug)]
enum Step {
    /// Anywhere in the configuration space of the segment, and a little behind it.
    Ecam {
        offset: u32,
        bytes: [u8; 8],
        len: u8,
        write: bool,
    },
    /// A register of a function, where the plan has it.
    Register {
        function: u8,
        dword: u8,
        lane: u8,
        bytes: [u8; 4],
        len: u8,
    },
    /// The same register, as it is but for some bits: what a driver does.
    Flip {
        function: u8,
        dword: u8,
        bits: u32,
    },
    /// Through the window of conventional configuration space.
    Ports {
        offset: u8,
        bytes: [u8; 4],
        len: u8,
        write: bool,
    },
    /// In some BAR that answers at present.
    Memory {
        which: u8,
        offset: u16,
        bytes: [u8; 8],
        len: u8,
        write: bool,
    },
    /// A device interrupts by message.
    Signal {
        device: u8,
        vector: u16,
    },
    /// A device drives its wire.
    Wire {
        device: u8,
        pending: bool,
    },
    Reset,
}

/// An endpoint with every capability.
struct Loaded {
    name: String,
    endpoint: Endpoint,
    messages: Arc<Messages>,
    wire: Arc<Wire>,
}

/// The level of one device's interrupt input.
#[derive(Default)]
struct Wire {
    asserted: AtomicBool,
    pending: AtomicBool,
}

impl InterruptController for Wire {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        let before = self.asserted.swap(asserted, Ordering::Relaxed);
        assert_ne!(before, asserted, "the controller hears of changes only");
    }
    fn pulse(&self, _gsi: u32) {
        unreachable!("PCI interrupts are levels");
    }
}

/// In BAR 0, where the pending bits end just before the BAR does.
const MSIX: MsixLayout = MsixLayout::new(0, 0x2800, 128);
const MSI_VECTORS: u8 = 8;

impl Loaded {
    fn new(node: &Node) -> Arc<Self> {
        let mut config = ConfigSpace::endpoint(&node.identity)
            .capability(PowerManagement::new())
            .capability(Express::endpoint(false))
            .capability(Subsystem {
                vendor: 0x1af4,
                id: 0x1100,
            })
            .capability(VendorSpecific::with_writable(&[0x5a; 13], 4..9))
            .capability(ErrorReporting::function())
            .capability(AccessControl::port());
        for bar in &node.bars {
            config = config.bar(BarSpec {
                index: bar.index,
                kind: bar.kind,
                size: bar.size,
            });
        }
        let (messages, wire) = (Messages::new(), Arc::<Wire>::default());
        let requester = Arc::new(Requester::default());
        let port = || MsiPort::new(requester.clone(), messages.clone());
        let intx = node.intx.expect("every function has a wire");
        let endpoint = Endpoint::new(config, requester.clone())
            .with_intx(intx.pin, IrqLine::new(wire.clone(), intx.gsi))
            .with_msi(MSI_VECTORS, port())
            .with_msix(MSIX, port());
        Arc::new(Self {
            name: node.name.clone(),
            endpoint,
            messages,
            wire,
        })
    }

    /// Messages leave one at a time, as the guest enabled them, and only from a bus master.
    fn signal(&self, vector: u16) {
        let before = self.messages.count();
        self.endpoint.signal(vector);
        let sent = self.messages.count() - before;
        let may =
            self.endpoint.interrupt_mode() != InterruptMode::Intx && self.endpoint.requester().bus_master();
        assert!(sent <= u64::from(may), "{} sent {sent} messages", self.name);
    }

    fn drive(&self, pending: bool) {
        self.wire.pending.store(pending, Ordering::Relaxed);
        self.endpoint.set_intx(pending);
    }

    /// The wire shows what the device wants and the guest lets through.
    fn check(&self) {
        let wanted = self.wire.pending.load(Ordering::Relaxed)
            && self.endpoint.interrupt_mode() == InterruptMode::Intx
            && !self.endpoint.command().contains(Command::INTX_DISABLE);
        let asserted = self.wire.asserted.load(Ordering::Relaxed);
        assert_eq!(asserted, wanted, "the wire of {}", self.name);
    }
}

impl Function for Loaded {
    fn name(&self) -> &str {
        &self.name
    }
    fn config_read(&self, dword: u16) -> u32 {
        self.endpoint.config_read(dword)
    }
    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        self.endpoint.config_write(dword, write)
    }
    fn requester(&self) -> &Arc<Requester> {
        self.endpoint.requester()
    }
    fn bars(&self) -> &[BarSpec] {
        self.endpoint.bars()
    }
    fn command(&self) -> Command {
        self.endpoint.command()
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.endpoint.bar_read(bar, offset, data) {
            data.fill(0);
        }
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let _of_the_device = self.endpoint.bar_write(bar, offset, data);
    }
    fn reset(&self) {
        self.wire.pending.store(false, Ordering::Relaxed);
        self.endpoint.reset();
    }
}

/// Registers that are looked at: the header, its capabilities, and the extended ones there are.
const DWORDS: u16 = 0x60;

/// What a function shows after power-on.
struct Shown {
    name: String,
    registers: Vec<u32>,
    /// What never changes: dwords, and which of their bits.
    fixed: Vec<(u16, u32)>,
    /// Dwords where a write shows more than what was written: the state of the link is next to its control,
    /// and a bit resets the function.
    express: std::ops::Range<u16>,
}

impl Shown {
    fn new(function: &dyn Function) -> Self {
        let registers: Vec<u32> = (0..DWORDS).map(|dword| function.config_read(dword)).collect();
        let at = |dword: u16| registers[usize::from(dword)];
        let (mut fixed, mut express) = (
            vec![(0, u32::MAX), (2, u32::MAX), (3, 0x7f << 16), (13, 0xff)],
            0..0,
        );
        let mut next = at(13) & 0xff;
        while next != 0 {
            let dword = u16::try_from(next / 4).expect("a byte");
            fixed.push((dword, 0xffff));
            if at(dword) & 0xff == 0x10 {
                express = dword..dword + 0xf;
            }
            next = at(dword) >> 8 & 0xff;
        }
        let mut next = 0x100;
        while next != 0 {
            let dword = u16::try_from(next / 4).expect("twelve bits");
            fixed.push((dword, u32::MAX));
            next = at(dword) >> 20;
        }
        Self {
            name: function.name().to_owned(),
            registers,
            fixed,
            express,
        }
    }

    /// That `function` shows what it showed.
    fn check(&self, function: &dyn Function) {
        for (dword, expected) in (0..).zip(&self.registers) {
            let found = function.config_read(dword);
            assert_eq!(
                found, *expected,
                "dword {dword:#x} of {} after a reset",
                self.name
            );
        }
    }

    /// That `function` can still be recognised.
    fn check_fixed(&self, function: &dyn Function) {
        for (dword, bits) in &self.fixed {
            let (found, expected) = (function.config_read(*dword), self.registers[usize::from(*dword)]);
            assert_eq!(found & bits, expected & bits, "dword {dword:#x} of {}", self.name);
        }
    }
}

/// Every function in the order of the plan, as after power-on; the same for every input.
fn shown(machine: &Machine) -> &'static [Shown] {
    static SHOWN: OnceLock<Vec<Shown>> = OnceLock::new();
    SHOWN.get_or_init(|| {
        functions(machine)
            .iter()
            .map(|function| Shown::new(&**function))
            .collect()
    })
}

fn functions(machine: &Machine) -> Vec<Arc<dyn Function>> {
    let nodes = machine.tree.nodes();
    nodes
        .map(|(segment, node)| {
            machine
                .topology
                .function(segment, node.bdf)
                .expect("as planned")
                .clone()
        })
        .collect()
}

/// Write a register of `function` where the plan has it, and look at what became of it.
fn write(machine: &Machine, at: Sbdf, function: &dyn Function, shown: &Shown, dword: u16, write: DwordWrite) {
    let reached = machine.topology.function(at.segment, at.bdf);
    let reached = reached.is_some_and(|found| std::ptr::addr_eq(Arc::as_ptr(found), function));
    let before = function.config_read(dword);
    machine.topology.config_write(at.segment, at.bdf, dword, write);
    if !reached || shown.express.contains(&dword) {
        return;
    }
    let after = function.config_read(dword);
    let changed = before ^ after;
    let (stored, cleared) = (after ^ !write.value(), before & write.value() & !after);
    assert_eq!(
        changed & !(write.mask() & (stored | cleared)),
        0,
        "{write:x?} made {before:#x} of dword {dword:#x} of {} into {after:#x}",
        shown.name
    );
}

fn width(len: u8, most: usize) -> usize {
    usize::from(len) % most + 1
}

fuzz_target!(|input: &[u8]| {
    let devices = Mutex::new(Vec::new());
    let machine = Machine::with_devices(two_roots(), |node| {
        let device = Loaded::new(node);
        devices.lock().expect("not poisoned").push(device.clone());
        device
    });
    let devices: Vec<Arc<Loaded>> = devices.into_inner().expect("not poisoned");
    let functions = functions(&machine);
    let shown = shown(&machine);
    let at: Vec<Sbdf> = machine
        .tree
        .nodes()
        .map(|(segment, node)| Sbdf {
            segment,
            bdf: node.bdf,
        })
        .collect();
    let ecam = Ecam::new(machine.topology.clone(), 0);
    let ports = ConfigPorts::new(machine.topology.clone());
    machine.enable();
    for step in steps::<Step>(input) {
        match step {
            Step::Ecam {
                offset,
                bytes,
                len,
                write,
            } => {
                let (offset, len) = (u64::from(offset) % (257 << 20), width(len, 8));
                if write {
                    ecam.write(offset, &bytes[..len]);
                } else {
                    ecam.read(offset, &mut [0; 8][..len]);
                }
            }
            Step::Register {
                function,
                dword,
                lane,
                bytes,
                len,
            } => {
                let index = usize::from(function) % functions.len();
                let lane = usize::from(lane % 4);
                let len = width(len, 4).min(4 - lane);
                let bytes = DwordWrite::new(lane, &bytes[..len]).expect("inside the dword");
                let dword = u16::from(dword) % DWORDS;
                write(
                    &machine,
                    at[index],
                    &*functions[index],
                    &shown[index],
                    dword,
                    bytes,
                );
            }
            Step::Flip {
                function,
                dword,
                bits,
            } => {
                let index = usize::from(function) % functions.len();
                let dword = u16::from(dword) % DWORDS;
                let value = DwordWrite::whole(functions[index].config_read(dword) ^ bits);
                write(
                    &machine,
                    at[index],
                    &*functions[index],
                    &shown[index],
                    dword,
                    value,
                );
            }
            Step::Ports {
                offset,
                bytes,
                len,
                write,
            } => {
                let (offset, len) = (u64::from(offset % 8), width(len, 4));
                if write {
                    ports.write(offset, &bytes[..len]);
                } else {
                    ports.read(offset, &mut [0; 4][..len]);
                }
            }
            Step::Memory {
                which,
                offset,
                bytes,
                len,
                write,
            } => {
                let open = machine.mmio.traffic();
                if let Some(bar) = open.get(usize::from(which) % open.len().max(1)) {
                    let at = bar.start + u64::from(offset) % (bar.last - bar.start + 1);
                    let len = width(len, 8);
                    if write {
                        machine.mmio.write(at, &bytes[..len]);
                    } else {
                        machine.mmio.read(at, &mut [0; 8][..len]);
                    }
                }
            }
            Step::Signal { device, vector } => devices[usize::from(device) % devices.len()].signal(vector),
            Step::Wire { device, pending } => devices[usize::from(device) % devices.len()].drive(pending),
            Step::Reset => {
                machine.topology.reset();
                ports.reset();
            }
        }
        machine.check();
        devices.iter().for_each(|device| device.check());
    }
    let both = || functions.iter().zip(shown);
    both().for_each(|(function, shown)| shown.check_fixed(&**function));
    machine.topology.reset();
    both().for_each(|(function, shown)| shown.check(&**function));
    machine.enable();
    machine.check_as_planned();
});
