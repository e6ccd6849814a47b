//! Accesses of any width to every BAR of a test device and to its configuration space, commands among them, with
//! memory that has holes, an IOMMU that answers anything, and resets at any time.
//!
//! Nothing may panic; a command ends; nothing leaves the device without Bus Master Enable, nothing but pages goes
//! through the IOMMU, and no translated address but after a translation; after a reset nothing is left.

#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::test_device::{Reg, TestDevice, TestDeviceParts, bars};
use ravelin::iommu::agent::{AddressType, Refused, TranslationAgent};
use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::pages::PageRange;
use ravelin::iommu::amd::ppr::{Answer, PageRequest};
use ravelin::iommu::amd::request::{Access, AtsCompletion, Pasid, Request};
use ravelin::pci::Function;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::testing::Messages;
use ravelin::platform::addr::Gpa;
use ravelin::platform::dma::{Dma, Requester};
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
    /// ATS, PRI and PASID on, with so many page requests.
    Enable { allocation: u32 },
    /// What the IOMMU answers from now on.
    Answers { seed: u64 },
    Invalidate { page: u64, size: bool, space: Option<u32> },
    Respond { group: u16, response: u8 },
    Settle,
    FunctionLevelReset,
}

/// Where memory begins and ends, and where addresses do.
const BORDERS: [u64; 6] = [0, 0x1_0000, 0x2_0000, 0x3_0000, 0xfee0_0000, u64::MAX];

/// The control dwords of ATS, PRI (and what software allows) and PASID.
const CONTROLS: [u16; 4] = [0x41, 0x43, 0x45, 0x47];

/// Answers as its seed says, and holds the device to what it may ask.
struct Fickle {
    requester: Arc<Requester>,
    seed: AtomicU64,
    translated: AtomicBool,
}

impl Fickle {
    /// Something that depends on the seed and on `at`.
    fn of(&self, at: u64) -> u64 {
        (self.seed.load(Ordering::Relaxed) ^ at >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn refuses(&self, request: &Request, address: AddressType, len: usize) -> Result<(), Refused> {
        assert!(len > 0 && request.at.0 % 0x1000 + len as u64 <= 0x1000, "one page");
        let translated = self.translated.load(Ordering::Relaxed);
        assert!(address == AddressType::Untranslated || translated, "after a translation");
        if self.of(request.at.0) >> 60 == 0 { Err(Refused) } else { Ok(()) }
    }
}

impl TranslationAgent for Fickle {
    fn translate(&self, request: &Request) -> Result<AtsCompletion, Refused> {
        self.translated.store(true, Ordering::Relaxed);
        let [shift, rights, low, ..] = self.of(request.at.0).to_le_bytes();
        if low == 0 {
            return Err(Refused);
        }
        Ok(AtsCompletion {
            target: Gpa(self.of(!request.at.0) & !0xfff),
            shift: u32::from(shift) % 64,
            allowed: Access::new(rights & 1 != 0, rights & 2 != 0),
            untranslated_only: rights & 4 != 0,
        })
    }
    fn read(&self, request: &Request, address: AddressType, data: &mut [u8]) -> Result<(), Refused> {
        self.refuses(request, address, data.len())?;
        data.fill(0x5a);
        Ok(())
    }
    fn write(&self, request: &Request, address: AddressType, data: &[u8]) -> Result<(), Refused> {
        self.refuses(request, address, data.len())
    }
    fn page_request(&self, request: &PageRequest) -> Answer {
        assert!(request.group < 512 && request.device == self.requester.sbdf().bdf);
        match self.of(request.at.0) % 3 {
            0 => Answer::Later,
            1 => Answer::Failure,
            _ => Answer::Invalid,
        }
    }
}

fn near(border: u8, by: i8) -> u64 {
    BORDERS[usize::from(border) % BORDERS.len()].wrapping_add_signed(by.into())
}

fuzz_target!(|steps: Vec<Step>| {
    let messages = Messages::new();
    let ranges = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x2_0000), 0x1_0000)];
    let ram = GuestMemoryMmap::from_ranges(&ranges).expect("two ranges");
    let agent = Arc::new(Fickle {
        requester: messages.requester().clone(),
        seed: AtomicU64::new(0),
        translated: AtomicBool::new(false),
    });
    let device = TestDevice::new(TestDeviceParts {
        name: "test0".to_owned(),
        msix_vectors: 3,
        dma: Dma::new(messages.requester().clone(), GuestRam::new(ram)),
        msi: messages.port(),
        intx: None,
        on_root_bus: true,
        agent: Some(agent.clone()),
    })
    .expect("a thread");
    let follower = device.follower();
    let own = messages.requester().sbdf().bdf;
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
            Step::Command { bit } => set(Reg::Command, 1 << (bit % 26)),
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
            Step::Enable { allocation } => {
                for (dword, value) in CONTROLS.into_iter().zip([1 << 31, 1, allocation, 7 << 16]) {
                    let _effect = device.config_write(dword, DwordWrite::whole(value));
                }
            }
            Step::Answers { seed } => agent.seed.store(seed, Ordering::Relaxed),
            Step::Invalidate { page, size, space } => {
                let command = Command::InvalidateIotlb {
                    device: own,
                    space: space.and_then(Pasid::new),
                    pages: PageRange::decode(page >> 12, size),
                };
                assert!(follower.follow(&[command]).is_ok());
            }
            Step::Respond { group, response } => {
                let command = Command::CompletePageRequest {
                    device: own,
                    pasid: None,
                    group,
                    response,
                };
                assert!(follower.follow(&[command]).is_ok());
            }
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
