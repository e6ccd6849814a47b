//! Accesses of any width to every BAR of a test device and to its configuration space, commands among them, with
//! memory that has holes, and resets at any time.
//!
//! Nothing may panic; a command ends; what is not memory is never read or written as if it were; after a reset
//! nothing is left.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::test_device::{Reg, TestDevice, TestDeviceParts, bars};
use ravelin::pci::Function;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::testing::Messages;
use ravelin::platform::dma::Dma;
use ravelin::platform::memory::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[derive(Arbitrary, Debug)]
enum Step {
    Write { bar: u8, offset: u16, bytes: [u8; 8], width: u8 },
    Read { bar: u8, offset: u16, width: u8 },
    /// A whole register, so that commands get somewhere.
    Register { dword: u8, value: u32 },
    /// One of the commands there are.
    Command { bit: u8 },
    /// Where transfers go: near the places where memory begins and ends.
    Aim { from: u8, to: u8, near: i8, size: u32 },
    ConfigWrite { dword: u16, lane: u8, bytes: [u8; 4], len: u8 },
    ConfigRead { dword: u16 },
    BusMaster { enabled: bool },
    Settle,
    FunctionLevelReset,
}

/// Where memory begins and ends, and where addresses do.
const BORDERS: [u64; 6] = [0, 0x1_0000, 0x2_0000, 0x3_0000, 0xfee0_0000, u64::MAX];

fn near(border: u8, by: i8) -> u64 {
    BORDERS[usize::from(border) % BORDERS.len()].wrapping_add_signed(by.into())
}

fuzz_target!(|steps: Vec<Step>| {
    let messages = Messages::new();
    let ranges = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x2_0000), 0x1_0000)];
    let ram = GuestMemoryMmap::from_ranges(&ranges).expect("two ranges");
    let device = TestDevice::new(TestDeviceParts {
        name: "test0".to_owned(),
        msix_vectors: 3,
        dma: Dma::new(messages.requester().clone(), GuestRam::new(ram)),
        msi: messages.port(),
        intx: None,
        on_root_bus: true,
        agent: None,
    })
    .expect("a thread");
    let bars = bars();
    let place = |bar: u8, offset: u16| {
        let spec = bars[usize::from(bar) % bars.len()];
        (spec.index, u64::from(offset) % (spec.size - 7))
    };
    let set = |register: Reg, value: u32| device.bar_write(0, register.offset(), &value.to_le_bytes());
    for step in steps.into_iter().take(256) {
        match step {
            Step::Write { bar, offset, bytes, width } => {
                let (bar, offset) = place(bar, offset);
                device.bar_write(bar, offset, &bytes[..1 << (width % 4)]);
            }
            Step::Read { bar, offset, width } => {
                let (bar, offset) = place(bar, offset);
                device.bar_read(bar, offset, &mut [0; 8][..1 << (width % 4)]);
            }
            Step::Register { dword, value } => {
                device.bar_write(0, u64::from(dword) * 4, &value.to_le_bytes());
            }
            Step::Command { bit } => set(Reg::Command, 1 << (bit % 10)),
            Step::Aim { from, to, near: by, size } => {
                device.bar_write(0, Reg::SourceLow.offset(), &near(from, by).to_le_bytes());
                device.bar_write(0, Reg::DestinationLow.offset(), &near(to, by).to_le_bytes());
                set(Reg::Size, size);
            }
            Step::ConfigWrite { dword, lane, bytes, len } => {
                let lane = usize::from(lane % 4);
                let len = (usize::from(len) % 4 + 1).min(4 - lane);
                if let Some(write) = DwordWrite::new(lane, &bytes[..len]) {
                    let _effect = device.config_write(dword % 1024, write);
                }
            }
            Step::ConfigRead { dword } => {
                let _value = device.config_read(dword % 1024);
            }
            Step::BusMaster { enabled } => messages.requester().set_bus_master(enabled),
            Step::Settle => device.settle(),
            Step::FunctionLevelReset => device.reset(),
        }
    }
    device.reset();
    for spec in &bars {
        let mut data = [0xff; 8];
        device.bar_read(spec.index, 0, &mut data);
        assert_eq!(data, [0; 8], "BAR {}", spec.index);
    }
});
