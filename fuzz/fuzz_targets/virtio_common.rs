//! Accesses of any width to a virtio function: its BAR, its configuration space with the window into the BAR,
//! moves of the BAR, interrupts of the device, resets.
//!
//! Nothing may panic; a device runs exactly when its registers say so, whatever they were told, and while it
//! does no write changes a queue or the features; interrupts leave by the way the guest chose and no other;
//! after a reset nothing is left.

#![no_main]

mod steps;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::virtio::pci::{BAR, VirtioPci, VirtioPciParts};
use ravelin::devices::virtio::worker::Unit;
use ravelin::devices::virtio::{Activation, Features, Interrupts, Kind, VirtioDevice};
use ravelin::pci::Function;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::testing::Messages;
use ravelin::pci::tree::Pin;
use ravelin::platform::addr::Gpa;
use ravelin::platform::dma::Dma;
use ravelin::platform::doorbell::{Doorbell, DoorbellHost};
use ravelin::platform::host::HostError;
use ravelin::platform::irq::{InterruptController, IrqLine};
use ravelin::platform::memory::GuestRam;
use steps::steps;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

#[derive(Arbitrary, Debug)]
enum Step {
    Write {
        offset: u16,
        bytes: [u8; 8],
        width: u8,
    },
    Read {
        offset: u16,
        width: u8,
    },
    /// A whole field of the common configuration, so that negotiations get somewhere.
    Field {
        field: u8,
        value: u64,
    },
    /// What a driver does, with features of the input's choice.
    Negotiate {
        features: u64,
    },
    /// A queue, set up with good addresses or any.
    Queue {
        queue: u8,
        size: u8,
        addresses: [u32; 3],
        aligned: bool,
    },
    /// The driver's last step.
    Run,
    /// Other values for everything that is fixed while the device runs.
    Poison {
        queue: u16,
        value: u64,
    },
    ConfigWrite {
        dword: u16,
        lane: u8,
        bytes: [u8; 4],
        len: u8,
    },
    ConfigRead {
        dword: u16,
    },
    /// MSI-X on or off, and one vector unmasked or masked.
    Vectors {
        enabled: bool,
        vector: u8,
        masked: bool,
    },
    /// The device interrupts.
    Signal {
        queue: u16,
    },
    ConfigurationChanged,
    NeedsReset,
    BusMaster {
        enabled: bool,
    },
    Move {
        to: Option<u64>,
    },
    Pause,
    FunctionLevelReset,
}

/// Offsets and widths of fields in the common configuration.
const FIELDS: [(u64, usize); 15] = [
    (0x00, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x14, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x20, 4),
    (0x20, 8),
    (0x28, 8),
    (0x2c, 4),
    (0x30, 8),
    (0x34, 4),
];

/// Has queues that nobody serves, and knows whether it runs.
#[derive(Default)]
struct Still {
    interrupts: Mutex<Option<Arc<dyn Interrupts>>>,
}

impl Still {
    fn interrupts(&self) -> Option<Arc<dyn Interrupts>> {
        self.interrupts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

const QUEUES: [u16; 3] = [256, 64, 4];

impl VirtioDevice for Still {
    fn kind(&self) -> Kind {
        Kind::Block
    }
    fn name(&self) -> &str {
        "still"
    }
    fn features(&self) -> Features {
        Features::bit(5) | Features::bit(50)
    }
    fn accepts(&self, chosen: Features) -> bool {
        !chosen.contains(Features::bit(50)) || chosen.contains(Features::bit(5))
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < 0x1000);
        data.fill(0x5a);
    }
    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        assert!(activation.features.contains(Features::VERSION_1));
        assert!(self.accepts(activation.features));
        assert_eq!(activation.queues.len(), QUEUES.len());
        let mut interrupts = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner);
        let before = interrupts.replace(activation.interrupts);
        assert!(before.is_none(), "one driver at a time");
        Ok(Vec::new())
    }
    fn reset(&self) {
        *self.interrupts.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The level of the interrupt input.
#[derive(Default)]
struct Wire(AtomicBool);

impl InterruptController for Wire {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        self.0.store(asserted, Ordering::Relaxed);
    }
    fn pulse(&self, _gsi: u32) {
        unreachable!("PCI interrupts are levels");
    }
}

/// How many doorbells there are.
#[derive(Clone, Default)]
struct Doorbells(Arc<AtomicUsize>);

impl Doorbell for Doorbells {}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl DoorbellHost for Doorbells {
    fn attach(&self, _at: Gpa, _fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(self.clone()))
    }
}

const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const RUNS: u8 = 4;
const BROKEN: u8 = 0x40;
const MSIX_TABLE: u64 = 0x4000;

/// What the driver sees of `queue`: size to used ring, without the vector.
fn queue_registers(function: &VirtioPci, queue: u16) -> [u8; 0x20] {
    let mut data = [0; 0x20];
    function.bar_write(0, QUEUE_SELECT, &queue.to_le_bytes());
    for (at, part) in (0x18..).step_by(4).zip(data.chunks_mut(4)) {
        function.bar_read(0, at, part);
    }
    // The vector, which a driver may read back as none.
    data[2..4].fill(0);
    data
}

fn status(function: &VirtioPci) -> u8 {
    let mut status = [0];
    function.bar_read(0, STATUS, &mut status);
    status[0]
}

/// The dword of the MSI-X capability.
fn msix_capability(function: &VirtioPci) -> u16 {
    let at = |byte: u32| function.config_read(u16::try_from(byte / 4).expect("a byte"));
    let mut next = at(0x34) & 0xff;
    while at(next) & 0xff != 0x11 {
        next = at(next) >> 8 & 0xff;
    }
    u16::try_from(next / 4).expect("a byte")
}

fuzz_target!(|input: &[u8]| {
    let messages = Messages::new();
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
    let (device, wire, doorbells) = (
        Arc::new(Still::default()),
        Arc::<Wire>::default(),
        Doorbells::default(),
    );
    // The one in hand.
    doorbells.0.store(1, Ordering::Relaxed);
    let parts = VirtioPciParts {
        dma: Dma::new(messages.requester().clone(), GuestRam::new(ram)),
        msi: messages.port(),
        doorbells: Arc::new(doorbells.clone()),
        intx: Some((Pin::A, IrqLine::new(wire.clone(), 16))),
        on_root_bus: true,
        access_platform: false,
    };
    let function = VirtioPci::new(device.clone(), parts).expect("a good device");
    let msix = msix_capability(&function);
    let field = |offset: u64, value: &[u8]| function.bar_write(0, offset, value);
    for step in steps::<Step>(input) {
        match step {
            Step::Write { offset, bytes, width } => {
                let len = 1 << (width % 4);
                let offset = u64::from(offset).min(BAR.size - 8);
                function.bar_write(0, offset, &bytes[..len]);
            }
            Step::Read { offset, width } => {
                let len = 1 << (width % 4);
                let offset = u64::from(offset).min(BAR.size - 8);
                function.bar_read(0, offset, &mut [0; 8][..len]);
            }
            Step::Field { field: which, value } => {
                let (offset, len) = FIELDS[usize::from(which) % FIELDS.len()];
                field(offset, &value.to_le_bytes()[..len]);
            }
            Step::Negotiate { features } => {
                field(STATUS, &[3]);
                let features = (features | 1 << 32).to_le_bytes();
                for half in 0..2_u8 {
                    field(0x08, &[half, 0, 0, 0]);
                    field(0x0c, &features[4 * usize::from(half)..][..4]);
                }
                field(STATUS, &[0xb]);
            }
            Step::Queue {
                queue,
                size,
                addresses,
                aligned,
            } => {
                field(QUEUE_SELECT, &u16::from(queue % 4).to_le_bytes());
                field(0x18, &(1_u16 << (size % 10)).to_le_bytes());
                for (at, address) in (0x20..).step_by(8).zip(addresses) {
                    let address = if aligned { address & !0xf } else { address };
                    field(at, &u64::from(address).to_le_bytes());
                }
                field(0x1c, &[1, 0]);
            }
            Step::Run => field(STATUS, &[0xf]),
            Step::Poison { queue, value } => {
                let before = queue_registers(&function, queue);
                let frozen = status(&function) & RUNS != 0;
                for (offset, len) in FIELDS
                    .into_iter()
                    .filter(|(offset, len)| *offset > QUEUE_SELECT && (*offset, *len) != (0x1a, 2))
                {
                    field(offset, &value.to_le_bytes()[..len]);
                }
                let after = queue_registers(&function, queue);
                assert!(
                    !frozen || before == after,
                    "queue {queue} changed while the device runs"
                );
            }
            Step::ConfigWrite {
                dword,
                lane,
                bytes,
                len,
            } => {
                let lane = usize::from(lane % 4);
                let len = (usize::from(len) % 4 + 1).min(4 - lane);
                let write = DwordWrite::new(lane, &bytes[..len]).expect("inside the dword");
                let _effect = function.config_write(dword % 1024, write);
            }
            Step::ConfigRead { dword } => {
                let _value = function.config_read(dword % 1024);
            }
            Step::Vectors {
                enabled,
                vector,
                masked,
            } => {
                let control = DwordWrite::new(3, &[u8::from(enabled) << 7]).expect("one lane");
                let _effect = function.config_write(msix, control);
                let at = MSIX_TABLE + 16 * u64::from(vector % 5) + 12;
                function.bar_write(0, at, &[u8::from(masked), 0, 0, 0]);
            }
            Step::Signal { queue } => {
                if let Some(interrupts) = device.interrupts() {
                    let (before, by_message) = (messages.count(), function.config_read(msix) >> 31 != 0);
                    interrupts.queue(queue);
                    let sent = messages.count() - before;
                    let may = by_message && messages.requester().bus_master();
                    assert!(sent <= u64::from(may), "{sent} messages");
                }
            }
            Step::ConfigurationChanged => {
                if let Some(interrupts) = device.interrupts() {
                    interrupts.configuration_changed();
                }
            }
            Step::NeedsReset => {
                if let Some(interrupts) = device.interrupts() {
                    interrupts.needs_reset();
                    assert_eq!(status(&function) & BROKEN, BROKEN);
                }
            }
            Step::BusMaster { enabled } => {
                function.bus_mastering(enabled);
                messages.requester().set_bus_master(enabled);
            }
            Step::Move { to } => {
                function.bar_moved(0, to.map(Gpa));
                let there = doorbells.0.load(Ordering::Relaxed);
                assert!(
                    there <= 2 + QUEUES.len(),
                    "{there} doorbells for {} queues",
                    QUEUES.len()
                );
            }
            Step::Pause => {
                function.pause();
                function.resume();
            }
            Step::FunctionLevelReset => {
                function.reset();
                assert!(device.interrupts().is_none());
            }
        }
        let (status, runs) = (status(&function), device.interrupts().is_some());
        assert!(
            !runs || status & RUNS != 0,
            "the device runs at status {status:#x}"
        );
        assert!(
            runs || status & RUNS == 0 || status & BROKEN != 0,
            "the device stands still at status {status:#x}"
        );
        let loud = wire.0.load(Ordering::Relaxed);
        let by_message = function.config_read(msix) >> 31 != 0;
        assert!(!(loud && by_message), "a wire besides messages");
    }
    function.reset();
    assert_eq!(status(&function), 0);
    assert!(device.interrupts().is_none());
    assert!(!wire.0.load(Ordering::Relaxed));
});
