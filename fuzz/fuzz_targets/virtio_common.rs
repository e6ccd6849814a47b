//! Accesses of any width to a virtio function: its BAR, its configuration space with the window into the BAR,
//! moves of the BAR, resets.
//!
//! Nothing may panic; a device runs exactly when its registers say so, whatever they were told; after a reset
//! nothing is left.

#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::virtio::pci::{BAR, VirtioPci, VirtioPciParts};
use ravelin::devices::virtio::worker::Unit;
use ravelin::devices::virtio::{Activation, Features, Kind, VirtioDevice};
use ravelin::pci::Function;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::testing::Messages;
use ravelin::platform::addr::Gpa;
use ravelin::platform::dma::Dma;
use ravelin::platform::doorbell::{Doorbell, DoorbellHost};
use ravelin::platform::host::HostError;
use ravelin::platform::memory::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

#[derive(Arbitrary, Debug)]
enum Step {
    Write { offset: u16, bytes: [u8; 8], width: u8 },
    Read { offset: u16, width: u8 },
    /// A whole field of the common configuration, so that negotiations get somewhere.
    Field { field: u8, value: u64 },
    ConfigWrite { dword: u16, lane: u8, bytes: [u8; 4], len: u8 },
    ConfigRead { dword: u16 },
    Move { to: Option<u64> },
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
struct Still {
    running: AtomicBool,
}

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
        &[256, 64, 4]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < 0x1000);
        data.fill(0x5a);
    }
    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        assert!(!self.running.swap(true, Ordering::SeqCst), "one driver at a time");
        assert!(activation.features.contains(Features::VERSION_1));
        assert!(self.accepts(activation.features));
        Ok(Vec::new())
    }
    fn reset(&self) {
        self.running.store(false, Ordering::SeqCst);
    }
}

struct NoDoorbells;
struct NoDoorbell;

impl Doorbell for NoDoorbell {}

impl DoorbellHost for NoDoorbells {
    fn attach(&self, _at: Gpa, _fd: &EventFd) -> Result<Box<dyn Doorbell>, HostError> {
        Ok(Box::new(NoDoorbell))
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let messages = Messages::new();
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
    let device = Arc::new(Still {
        running: AtomicBool::new(false),
    });
    let parts = VirtioPciParts {
        dma: Dma::new(messages.requester().clone(), GuestRam::new(ram)),
        msi: messages.port(),
        doorbells: Arc::new(NoDoorbells),
        intx: None,
        on_root_bus: true,
        access_platform: false,
    };
    let function = VirtioPci::new(device.clone(), parts).expect("a good device");
    for step in steps.into_iter().take(256) {
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
            Step::Field { field, value } => {
                let (offset, len) = FIELDS[usize::from(field) % FIELDS.len()];
                function.bar_write(0, offset, &value.to_le_bytes()[..len]);
            }
            Step::ConfigWrite { dword, lane, bytes, len } => {
                let lane = usize::from(lane % 4);
                let len = (usize::from(len) % 4 + 1).min(4 - lane);
                if let Some(write) = DwordWrite::new(lane, &bytes[..len]) {
                    let _effect = function.config_write(dword % 1024, write);
                }
            }
            Step::ConfigRead { dword } => {
                let _value = function.config_read(dword % 1024);
            }
            Step::Move { to } => function.bar_moved(0, to.map(Gpa)),
            Step::Pause => {
                function.pause();
                function.resume();
            }
            Step::FunctionLevelReset => {
                function.reset();
                assert!(!device.running.load(Ordering::SeqCst));
            }
        }
    }
    function.reset();
    let mut status = [0xff];
    function.bar_read(0, 0x14, &mut status);
    assert_eq!(status, [0]);
    assert!(!device.running.load(Ordering::SeqCst));
});
