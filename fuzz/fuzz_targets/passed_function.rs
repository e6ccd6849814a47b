//! A function of the host whose configuration space, BARs, interrupts and refusals are the input, under a guest whose
//! accesses are the input too: configuration space of any lanes, BARs and the MSI-X structures of any width, moved
//! BARs, resets at any time.
//!
//! Nothing may panic. Nothing is asked of the host beyond what it said it has. Configuration writes reach the device
//! in Command and in capabilities that are passed, never in BARs, power management, MSI or MSI-X, and it decodes as long
//! as the guest has it. What the guest sees is a list that ends and an identity that stays. Nothing of the MSI-X
//! structures is mapped into the guest, and other functions reach what the guest reaches and no more. In the end the device
//! is silent, reset and detached.

#![no_main]

mod steps;

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use ravelin::devices::vfio::host::{Companion, HostFunction, Interrupt, InterruptInfo, Notice, Region, RegionInfo};
use ravelin::devices::vfio::lent::Lent;
use ravelin::devices::vfio::testing::{Asked, Device, GuestSpace, Told, nic_config};
use ravelin::devices::vfio::{VfioFunction, VfioParts};
use ravelin::iommu::iommufd::{Attach, Ioas};
use ravelin::iommu::iommufd::testing::Host;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::bar::BarSpec;
use ravelin::pci::testing::Messages;
use ravelin::pci::tree::{BarKind, Identity, Pin};
use ravelin::pci::{Command, Function};
use ravelin::platform::addr::Gpa;
use ravelin::platform::device_memory::DeviceMemory;
use ravelin::platform::irq::{InterruptController, IrqLine};
use ravelin::platform::memory::GuestRam;
use steps::steps;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// The device.
#[derive(Arbitrary, Debug)]
struct Shape {
    /// A NIC's configuration space to begin with, or nothing.
    blank: bool,
    /// What is different in it.
    patches: [(u16, [u8; 4]); 8],
    /// Bytes of configuration space: 4 KiB, 256, as functions have, or next to none.
    config_len: u16,
    /// Kind and size per BAR register.
    bars: [u8; 6],
    /// What of each BAR may be mapped.
    mappable: u8,
    msi: u8,
    msix: u16,
    grows: bool,
    wired: bool,
    resets: bool,
    on_root_bus: bool,
    /// Requests that are refused from the start.
    refused: Option<u8>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    ConfigWrite { dword: u16, lane: u8, bytes: [u8; 4], len: u8 },
    /// Whole dwords, as drivers write them, in standard configuration space.
    Register { dword: u8, value: u32 },
    ConfigRead { dword: u16 },
    BarWrite { bar: u8, offset: u32, bytes: [u8; 8], len: u8 },
    BarRead { bar: u8, offset: u32, len: u8 },
    /// One dword of an entry of the MSI-X table, wherever it is.
    Entry { vector: u16, field: u8, value: u32 },
    /// Message Control of MSI-X, wherever it is.
    Enable { control: u8 },
    Moved { bar: u8, at: Option<u64> },
    BusMaster { allowed: bool },
    Interrupted { kind: u8, vector: u16 },
    Notice { wanted: bool },
    Ended,
    Refuse { asked: u8, errno: u8 },
    Relent,
    /// The device's own registers change.
    Changes { at: u16, bytes: [u8; 4] },
    Reset,
}

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x10d3,
    class: 0x02_0000,
    revision: 2,
    subsystem_vendor: 0x8086,
    subsystem: 0xa01f,
};
const ASKED: [Asked; 11] = [
    Asked::Read,
    Asked::Write,
    Asked::Map,
    Asked::SetInterrupts,
    Asked::DisableInterrupts,
    Asked::Unmask,
    Asked::Notify,
    Asked::Reset,
    Asked::Attach,
    Asked::Detach,
    Asked::Export,
];
const KINDS: [Interrupt; 3] = [Interrupt::Intx, Interrupt::Msi, Interrupt::Msix];
const COMMAND: u64 = 4;
const CAPABILITIES: u8 = 0x34;
const EXTENDED: u64 = 0x100;
const MSIX: u8 = 0x11;
/// Capabilities of which the device hears: PCI Express, vital product data, vendor-specific.
const HEARD: [u8; 3] = [0x10, 0x03, 0x09];
/// Standard and extended capabilities that fit.
const MOST: usize = 48;
const MOST_EXTENDED: usize = 960;

/// The device with somebody who holds every request against what it said it has.
struct Watched {
    device: Arc<Device>,
    /// Stretches of standard configuration space that may be written.
    heard: Vec<Range<u64>>,
    decodes: Command,
    /// The device is attached by whoever opened it, and let go once.
    attached: AtomicBool,
}

impl Watched {
    fn inside(&self, region: Region, offset: u64, len: usize) {
        let size = self.region(region).size;
        let end = offset.checked_add(len as u64).expect("an end");
        assert!(len > 0 && end <= size, "{region:?}: {offset:#x} + {len} of {size:#x}");
    }
}

impl HostFunction for Watched {
    fn id(&self) -> u32 {
        self.device.id()
    }

    fn region(&self, region: Region) -> RegionInfo {
        HostFunction::region(&*self.device, region)
    }
    fn interrupt(&self, kind: Interrupt) -> InterruptInfo {
        HostFunction::interrupt(&*self.device, kind)
    }
    fn resets(&self) -> bool {
        self.device.resets()
    }
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.inside(region, offset, data.len());
        self.device.read(region, offset, data)
    }
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inside(region, offset, data.len());
        let end = offset + data.len() as u64;
        if region == Region::Config && end <= EXTENDED {
            let heard = |range: &Range<u64>| range.start <= offset && end <= range.end;
            assert!(self.heard.iter().any(heard), "{offset:#x}-{end:#x} of {:?}", self.heard);
            assert!(matches!(data.len(), 1 | 2 | 4) && offset % data.len() as u64 == 0);
        }
        if let (Region::Config, COMMAND, [low, high]) = (region, offset, data) {
            let command = Command::from_bits_retain(u16::from_le_bytes([*low, *high]));
            assert!(command.contains(self.decodes), "{command:?}");
        }
        self.device.write(region, offset, data)
    }
    fn map(&self, region: Region, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        assert!(len > 0 && offset % 0x1000 == 0 && len % 0x1000 == 0);
        let inside = |(start, of): &(u64, u64)| *start <= offset && offset + len <= start + of;
        assert!(self.region(region).mappable.iter().any(inside));
        HostFunction::map(&*self.device, region, offset, len)
    }
    fn export(&self, region: Region, offset: u64, len: u64) -> io::Result<OwnedFd> {
        assert!(len > 0 && offset % 0x1000 == 0 && len % 0x1000 == 0);
        let inside = |(start, of): &(u64, u64)| *start <= offset && offset + len <= start + of;
        assert!(self.region(region).mappable.iter().any(inside));
        self.device.export(region, offset, len)
    }
    fn set_interrupts(&self, kind: Interrupt, first: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()> {
        let count = HostFunction::interrupt(&*self.device, kind).count as usize;
        assert!(!eventfds.is_empty() && first as usize + eventfds.len() <= count, "{kind:?}");
        self.device.set_interrupts(kind, first, eventfds)
    }
    fn disable_interrupts(&self, kind: Interrupt) -> io::Result<()> {
        self.device.disable_interrupts(kind)
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.device.unmask_intx()
    }
    fn notify(&self, notice: Notice, eventfd: &EventFd) -> io::Result<()> {
        self.device.notify(notice, eventfd)
    }
    fn reset(&self) -> io::Result<()> {
        assert!(self.device.resets());
        self.device.reset()
    }
    fn companions(&self) -> io::Result<Vec<Companion>> {
        self.device.companions()
    }
    fn hot_reset(&self) -> io::Result<()> {
        panic!("it is reset with no other")
    }
}

impl Attach for Watched {
    fn attach(&self, _ioas: u32) -> io::Result<()> {
        panic!("whoever opens the function attaches it")
    }
    fn detach(&self) -> io::Result<()> {
        assert!(self.attached.swap(false, Ordering::Relaxed), "detached twice");
        self.device.detach()
    }
}

/// The wire, which nobody looks at.
struct Wire;

impl InterruptController for Wire {
    fn line_changed(&self, _gsi: u32, _asserted: bool) {}
    fn pulse(&self, _gsi: u32) {}
}

impl Shape {
    fn config(&self) -> Vec<u8> {
        let mut config = if self.blank { vec![0; 4096] } else { nic_config() };
        for (at, bytes) in self.patches {
            let at = usize::from(at % 1024) * 4;
            config[at..at + 4].copy_from_slice(&bytes);
        }
        config.truncate(match self.config_len % 4 {
            0 | 1 => 4096,
            2 => 256,
            _ => usize::from(self.config_len % 12),
        });
        config
    }

    /// What the plan has: BARs that a function can have.
    fn specs(&self) -> Vec<BarSpec> {
        let mut specs: Vec<BarSpec> = Vec::new();
        for (index, bar) in (0..).zip(self.bars) {
            let upper_half = specs.last().is_some_and(|last| last.kind.is_64_bit() && last.index + 1 == index);
            let prefetchable = bar & 0x80 != 0;
            let (kind, exponent) = match bar & 3 {
                _ if upper_half => continue,
                0 => continue,
                1 => (BarKind::Io, 2 + (bar >> 2 & 0x1f) % 7),
                3 if index < 5 => (BarKind::Mem64 { prefetchable }, 4 + (bar >> 2 & 0x1f) % 14),
                _ => (BarKind::Mem32 { prefetchable }, 4 + (bar >> 2 & 0x1f) % 14),
            };
            specs.push(BarSpec { index, kind, size: 1 << exponent });
        }
        specs
    }

    fn device(&self, specs: &[BarSpec]) -> Device {
        let none = RegionInfo::default();
        let bare = (0..6).fold(Device::with(&self.config()), |device, bar| {
            device.region(Region::Bar(bar), none.clone())
        });
        let with_bars = specs.iter().fold(bare, |device, spec| {
            let size = spec.size;
            let mappable = match self.mappable.rotate_left(spec.index.into()) & 3 {
                _ if spec.kind == BarKind::Io => Vec::new(),
                0 => Vec::new(),
                // A hole in the middle, and ends that are no pages.
                1 => vec![(size / 2 + 0x800, size / 2 - (size / 2).min(0x800)), (0, size / 4)],
                _ => vec![(0, size)],
            };
            device.region(Region::Bar(spec.index), RegionInfo { size, mappable })
        });
        let device = with_bars
            .interrupting(Interrupt::Intx, u32::from(self.wired), false)
            .interrupting(Interrupt::Msi, u32::from(self.msi % 40), false)
            .interrupting(Interrupt::Msix, u32::from(self.msix % 2050), self.grows);
        if self.resets { device } else { device.without_reset() }
    }

    /// Where the device may be written in standard configuration space, by a walk of our own.
    fn heard(&self) -> Vec<Range<u64>> {
        let config = self.config();
        let byte = |at: u8| config.get(usize::from(at)).copied().unwrap_or(0);
        let mut found: Vec<u8> = Vec::new();
        let mut at = byte(CAPABILITIES) & !3;
        while byte(6) & 0x10 != 0 && at >= 0x40 && !found.contains(&at) {
            found.push(at);
            at = byte(at + 1) & !3;
        }
        found.sort_unstable();
        let ends = found.iter().skip(1).map(|next| u64::from(*next)).chain([EXTENDED]);
        let ranges = found.iter().map(|at| u64::from(*at)).zip(ends);
        let heard = ranges.filter(|(start, _)| HEARD.contains(&byte(*start as u8)));
        let mut heard: Vec<Range<u64>> = heard.map(|(start, end)| start + 2..end).collect();
        heard.push(COMMAND..COMMAND + 2);
        heard
    }
}

/// What the guest finds at the end of a walk: offset of each standard capability and its ID.
fn capabilities(function: &VfioFunction) -> Vec<(u16, u8)> {
    let mut found: Vec<(u16, u8)> = Vec::new();
    let [mut at, ..] = function.config_read(u16::from(CAPABILITIES) / 4).to_le_bytes();
    while at != 0 {
        assert!(at >= 0x40 && at % 4 == 0 && found.len() < MOST, "{found:x?}");
        let [id, next, ..] = function.config_read(u16::from(at) / 4).to_le_bytes();
        found.push((at.into(), id));
        at = next;
    }
    let mut extended = 0;
    let mut at = 0x100;
    while at != 0 {
        assert!(at >= 0x100 && at % 4 == 0 && extended < MOST_EXTENDED);
        at = function.config_read(at / 4).to_be_bytes()[..2]
            .try_into()
            .map(|bytes| u16::from_be_bytes(bytes) >> 4)
            .expect("two bytes");
        extended += 1;
    }
    found
}

/// BAR and bytes of the MSI-X table and of its pending bits, as the guest is told, and where Message Control is.
fn structures(function: &VfioFunction) -> Option<(u16, [(u8, Range<u64>); 2])> {
    let (at, _) = capabilities(function).into_iter().find(|(_, id)| *id == MSIX)?;
    let vectors = u64::from(function.config_read(at / 4) >> 16 & 0x7ff) + 1;
    let place = |dword: u16, len: u64| {
        let register = function.config_read(dword);
        let start = u64::from(register & !7);
        ((register & 7) as u8, start..start + len)
    };
    let pending = vectors.div_ceil(64) * 8;
    Some((at / 4, [place(at / 4 + 1, vectors * 16), place(at / 4 + 2, pending)]))
}

fn run(function: &VfioFunction, device: &Device, space: &GuestSpace, specs: &[BarSpec], step: Step) {
    let spec = |bar: u8| specs.get(usize::from(bar) % specs.len().max(1));
    match step {
        Step::ConfigWrite { dword, lane, bytes, len } => {
            let lane = usize::from(lane % 4);
            let len = (usize::from(len) % 4 + 1).min(4 - lane);
            if let Some(write) = DwordWrite::new(lane, &bytes[..len]) {
                let _effect = function.config_write(dword % 1024, write);
            }
        }
        Step::Register { dword, value } => {
            let _effect = function.config_write(u16::from(dword % 64), DwordWrite::whole(value));
        }
        Step::ConfigRead { dword } => {
            let _value = function.config_read(dword % 1024);
        }
        Step::BarWrite { bar, offset, bytes, len } => {
            let Some(spec) = spec(bar) else { return };
            let len = (usize::from(len) % 8 + 1).min(spec.size as usize);
            let offset = u64::from(offset) % (spec.size - len as u64 + 1);
            function.bar_write(spec.index, offset, &bytes[..len]);
        }
        Step::BarRead { bar, offset, len } => {
            let Some(spec) = spec(bar) else { return };
            let len = (usize::from(len) % 8 + 1).min(spec.size as usize);
            let offset = u64::from(offset) % (spec.size - len as u64 + 1);
            function.bar_read(spec.index, offset, &mut [0; 8][..len]);
        }
        Step::Entry { vector, field, value } => {
            let Some((_, [(bar, table), _])) = structures(function) else { return };
            let entries = (table.end - table.start) / 16;
            let offset = table.start + u64::from(vector) % entries * 16 + u64::from(field % 4) * 4;
            function.bar_write(bar, offset, &value.to_le_bytes());
            let mut read = [0; 4];
            function.bar_read(bar, offset, &mut read);
            let kept = if field % 4 == 3 { 1 } else { u32::MAX & if field % 4 == 0 { !3 } else { !0 } };
            assert_eq!(u32::from_le_bytes(read) & kept, value & kept);
        }
        Step::Enable { control } => {
            let Some((dword, _)) = structures(function) else { return };
            let value = u32::from(control) << 24;
            let _effect = function.config_write(dword, DwordWrite::whole(value));
        }
        Step::Moved { bar, at } => {
            let Some(spec) = spec(bar) else { return };
            let at = at.map(|at| Gpa(at & !(spec.size - 1) & !0xfff));
            specs.iter().for_each(|spec| function.bar_moved(spec.index, None));
            assert_eq!(space.mapped(), []);
            function.bar_moved(spec.index, at);
            let Some(at) = at else { return };
            let trapped = structures(function).into_iter().flat_map(|(_, both)| both);
            let trapped: Vec<_> = trapped.filter(|(bar, _)| *bar == spec.index).collect();
            for (start, len) in space.mapped() {
                let from = start - at.0;
                assert!(from + len <= spec.size);
                assert!(trapped.iter().all(|(_, range)| range.end <= from || from + len <= range.start));
            }
        }
        Step::BusMaster { allowed } => function.bus_mastering(allowed),
        Step::Interrupted { kind, vector } => {
            let kind = KINDS[usize::from(kind) % KINDS.len()];
            let _listened = device.interrupt(kind, vector.into());
            let _notices = function.signalled();
        }
        Step::Notice { wanted } => {
            let notice = if wanted { Notice::Wanted } else { Notice::Error };
            let given = device.give(notice);
            assert_eq!(function.signalled().contains(&notice), given);
        }
        Step::Ended => {
            use ravelin::devices::ioapic::Resample as _;
            function.interrupt_ended();
        }
        Step::Refuse { asked, errno } => {
            device.refuse(ASKED[usize::from(asked) % ASKED.len()], i32::from(errno % 40) + 1);
        }
        Step::Relent => device.relent(),
        Step::Changes { at, bytes } => {
            let len = HostFunction::region(device, Region::Config).size as usize / 4;
            if len > 0 {
                device.set_config(at % len as u16 * 4, &bytes);
            }
        }
        Step::Reset => function.reset(),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let Ok(shape) = Shape::arbitrary(&mut input) else { return };
    let specs = shape.specs();
    let device = Arc::new(shape.device(&specs));
    let refused = shape.refused.map(|asked| ASKED[usize::from(asked) % ASKED.len()]);
    if let Some(asked) = refused {
        device.refuse(asked, 22);
    }
    let mut decodes = Command::empty();
    for spec in &specs {
        decodes |= if spec.kind == BarKind::Io { Command::IO } else { Command::MEMORY };
    }
    let watched = Arc::new(Watched {
        device: device.clone(),
        heard: shape.heard(),
        decodes,
        attached: AtomicBool::new(true),
    });
    let (messages, space, host) = (Messages::new(), GuestSpace::new(), Host::new());
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a page");
    let parts = VfioParts {
        name: "vfio0".to_owned(),
        host: Lent::new(watched.clone()),
        reset_with: None,
        space: Arc::new(Ioas::new(host.clone(), GuestRam::new(ram)).expect("made")),
        has_peers: true,
        identity: IDENTITY,
        bars: specs.clone(),
        memory: space.clone(),
        msi: messages.port(),
        intx: Some((Pin::A, IrqLine::new(Arc::new(Wire), 17))),
        on_root_bus: shape.on_root_bus,
    };
    let Ok(function) = VfioFunction::new(parts) else { return };
    let identity = || [0, 2, 11].map(|dword| function.config_read(dword));
    let is = identity();
    for step in steps::<Step>(input.take_rest()) {
        run(&function, &device, &space, &specs, step);
        assert_eq!(identity(), is);
        for stretch in host.spaces().into_iter().flat_map(|space| host.mapped(space)) {
            assert!(space.mapped().contains(&stretch), "{stretch:x?}");
        }
        let _heard = device.told();
    }
    let _seen = capabilities(&function);
    device.relent();
    drop(function);
    assert_eq!(space.mapped(), []);
    assert!(host.spaces().is_empty(), "others reach it still");
    assert!(!watched.attached.load(Ordering::Relaxed), "still attached");
    assert!(KINDS.iter().all(|kind| !device.is_on(*kind)), "interrupts stay on");
    assert!(!shape.resets || device.told().contains(&Told::Reset));
});
