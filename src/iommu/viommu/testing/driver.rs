//! A driver in miniature, and what it may expect.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{FakeHost, FakeProtection};
use crate::iommu::amd::features::{Features, Wanted};
use crate::iommu::amd::spec::dte::Dte;
use crate::iommu::viommu::features::offer;
use crate::iommu::viommu::host::{HostDevice, HostFeatures, QueueKind};
use crate::iommu::viommu::{ServedParts, ServedUnit};
use crate::platform::addr::{Bdf, Gpa, GpaRange, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::dma::Requester;
use crate::platform::host::HostError;
use crate::platform::memory::GuestRam;

/// Where the driver has its command buffer.
pub const RING: u64 = 0x1_0000;
/// Where its event log is.
pub const LOG: u64 = 0x2_0000;
/// Where its PPR log is.
const PAGE_REQUESTS: u64 = 0x3_0000;
/// Where its device table is.
pub const DEVICE_TABLE: u64 = 0x20_0000;
/// Bytes of RAM.
const RAM: usize = 0x60_0000;

/// An entry with guest tables at `root` in `domain`, as Linux makes it.
pub fn dte(root: u64, domain: u16) -> [u64; 4] {
    let bits = [3 << 61 | 3 << 54 | 3, domain.into(), 0, 0];
    Dte::from_quadwords(bits).with_gcr3_root(root).into_quadwords()
}

/// What a function reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reached {
    /// Guest physical memory.
    Memory,
    /// Nothing.
    Nothing,
    /// What the guest tables of an entry say.
    Tables(Dte),
}

/// A unit with two functions in one page of the device table and one in another.
pub struct Rig {
    /// The machine's.
    pub ram: GuestRam,
    /// What serves the unit.
    pub host: Arc<FakeHost>,
    /// What notices stores.
    pub protection: Arc<FakeProtection>,
    /// The unit.
    pub unit: Arc<ServedUnit>,
    /// The functions behind it.
    pub requesters: Vec<Arc<Requester>>,
}

fn sbdf(bus: u8, device: u8) -> Sbdf {
    Sbdf {
        segment: 0,
        bdf: Bdf::new(bus, device, 0).expect("valid"),
    }
}

/// What a host with everything offers.
fn features(wanted: &Wanted) -> Features {
    let all = HostFeatures {
        efr: u64::MAX,
        efr2: u64::MAX,
    };
    offer(&[all], wanted)
}

impl Rig {
    /// A unit as after power-on.
    pub fn at_reset() -> Self {
        Self::over(FakeHost::new(), &Wanted::EVERYTHING)
    }

    /// A unit that `host` serves.
    pub fn over(host: Arc<FakeHost>, wanted: &Wanted) -> Self {
        Self::try_over(host, wanted).expect("a host that refuses nothing")
    }

    /// The same, with a host that may refuse that.
    pub fn try_over(host: Arc<FakeHost>, wanted: &Wanted) -> Result<Self, HostError> {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let protection = FakeProtection::new(ram.clone());
        Self::made(
            host,
            wanted,
            ram,
            protection,
            [sbdf(1, 0), sbdf(1, 1), sbdf(2, 0)],
        )
    }

    /// A unit in the machine of `other`, for further functions of the same buses.
    pub fn sharing(other: &Self, host: Arc<FakeHost>) -> Self {
        let (ram, protection) = (other.ram.clone(), other.protection.clone());
        let functions = [sbdf(1, 2), sbdf(1, 3), sbdf(3, 0)];
        Self::made(host, &Wanted::EVERYTHING, ram, protection, functions)
            .expect("a host that refuses nothing")
    }

    fn made(
        host: Arc<FakeHost>,
        wanted: &Wanted,
        ram: GuestRam,
        protection: Arc<FakeProtection>,
        functions: [Sbdf; 3],
    ) -> Result<Self, HostError> {
        let requesters: Vec<_> = functions
            .into_iter()
            .map(|at| Arc::new(Requester::new(at)))
            .collect();
        let functions = requesters.iter().cloned().enumerate();
        let unit = ServedUnit::new(ServedParts {
            name: "iommu0".to_owned(),
            at: sbdf(0, 2),
            mmio: GpaRange::new(Gpa(0xfeb0_4000), 0x4000).expect("valid"),
            features: features(wanted),
            ram: ram.clone(),
            host: host.clone(),
            protection: protection.clone(),
            functions: functions
                .map(|(at, requester)| (requester, HostDevice(at)))
                .collect(),
        })?;
        Ok(Self {
            unit,
            ram,
            host,
            protection,
            requesters,
        })
    }

    /// The driver is through with its start: everything is on, every entry blocked.
    pub fn running() -> Self {
        let rig = Self::at_reset();
        rig.start();
        rig
    }

    /// What Linux does, in its order.
    pub fn start(&self) {
        for bit in [12, 3, 2, 28, 29, 13, 14, 0, 59] {
            self.control(bit, false);
        }
        // The table, 4 bytes at a time as a copy to I/O memory may be.
        self.write(0x00, 4, DEVICE_TABLE | 0x3f);
        self.write(0x04, 4, 0);
        self.write(0x08, 8, RING | 9 << 56);
        self.control(12, false);
        self.write(0x2000, 4, 0);
        self.write(0x2008, 4, 0);
        self.control(12, true);
        for bit in [16, 17, 50, 0] {
            self.control(bit, true);
        }
        self.write(0x10, 8, LOG | 9 << 56);
        self.write(0x2010, 4, 0);
        self.write(0x2018, 4, 0);
        self.control(2, true);
        self.control(16, true);
        // V, then TV, everywhere.
        for id in (0..0x240).chain(self.requesters.iter().map(|at| at.sbdf().bdf.requester_id())) {
            self.word(id, 0, 1);
            self.word(id, 0, 3);
        }
        self.write(0x170, 8, 0x31 << 32 | 2 << 8);
        self.write(0x178, 8, 0x32 << 32 | 2 << 8);
        self.control(51, true);
        self.control(3, true);
        self.control(15, true);
        self.write(0x38, 8, PAGE_REQUESTS | 9 << 56);
        self.write(0x2030, 4, 0);
        self.write(0x2038, 4, 0);
        self.control(14, true);
        self.control(13, true);
    }

    /// Write the lowest `len` bytes of `value`.
    pub fn write(&self, at: u64, len: usize, value: u64) {
        self.unit.write(at, &value.to_le_bytes()[..len]);
    }

    /// Read a quadword.
    pub fn read(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    /// Set or clear a bit of Control.
    pub fn control(&self, bit: u32, on: bool) {
        let control = self.read(0x18) & !(1 << bit) | u64::from(on) << bit;
        self.write(0x18, 8, control);
    }

    /// The number of function `index`.
    pub fn id(&self, index: usize) -> u16 {
        self.requesters[index].sbdf().bdf.requester_id()
    }

    /// Store word `word` of the entry of `id` where the driver has its table.
    pub fn word(&self, id: u16, word: u64, value: u64) {
        let at = DEVICE_TABLE + 32 * u64::from(id) + 8 * word;
        self.protection.store(Gpa(at), &value.to_le_bytes());
    }

    /// Store the half `half` of the entry of function `index` as one.
    pub fn half(&self, index: usize, half: usize, entry: [u64; 4]) {
        let at = DEVICE_TABLE + 32 * u64::from(self.id(index)) + 16 * half as u64;
        let words = [entry[2 * half], entry[2 * half + 1]];
        let bytes: Vec<_> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        self.protection.store(Gpa(at), &bytes);
    }

    /// Write the whole entry of function `index`, upper half first, and lower half then.
    pub fn entry(&self, index: usize, entry: [u64; 4]) {
        self.half(index, 1, entry);
        self.half(index, 0, entry);
    }

    /// What function `index` is to reach by registers and memory: the manual's rules and what hosts cannot do, written
    /// down once more.
    pub fn expected(&self, index: usize) -> Reached {
        let control = self.read(0x18);
        if control & 1 == 0 {
            return Reached::Memory;
        }
        if self.is_stopped() {
            return Reached::Nothing;
        }
        let bits = (control >> 34 & 7).min(3);
        let id = u64::from(self.id(index));
        let segment = id >> (16 - bits);
        let base = self.read(if segment == 0 { 0 } else { 0xf8 + 8 * segment });
        let place = id & (0xffff >> bits);
        if place >= ((base & 0x1ff) + 1) * 128 {
            return Reached::Nothing;
        }
        let at = (base & 0x000f_ffff_ffff_f000) + 32 * place;
        let Ok([a, b, c, _]) = self.ram.read_obj::<[u64; 4]>(Gpa(at)) else {
            return Reached::Nothing;
        };
        let (rights, mode) = (a >> 61 & 3, a >> 9 & 7);
        if a & 1 == 0 {
            return Reached::Memory;
        }
        if a & 2 == 0 || a & 0x8000_0000_0000_007c != 0 || rights != 3 || mode != 0 {
            return Reached::Nothing;
        }
        if a >> 55 & 1 == 0 || control >> 16 & 1 == 0 {
            return Reached::Memory;
        }
        let root = (a >> 58 & 7) << 12 | (b >> 16 & 0xffff) << 15 | (b >> 43) << 31;
        let (levels, paging) = (a >> 56 & 3, c >> 54 & 3);
        let everything = features(&Wanted::EVERYTHING).efr;
        if root == 0 || levels > everything.glx().into() || paging > everything.gats().into() {
            return Reached::Nothing;
        }
        // V, TV, PPR, GIOV, GV, GLX, root, IR, IW; root and domain; paging mode.
        let words = [
            a & 0x7fd0_0000_0000_0003,
            b & 0xffff_f800_ffff_ffff,
            c & 3 << 54,
            0,
        ];
        Reached::Tables(Dte::from_quadwords(words))
    }

    /// Whether what serves the unit failed it since it was switched on.
    pub fn is_stopped(&self) -> bool {
        self.unit.state().contains("STOPPED")
    }

    /// Everything is as the guest says.
    pub fn check(&self) {
        self.host.check();
        for index in 0..self.requesters.len() {
            assert_eq!(self.host.place(index), self.expected(index), "function {index}");
        }
        self.check_rings(true);
    }

    /// Everything is as the guest says, or less, after the host refused something. What is not blocked as it should be is
    /// told.
    pub fn check_refused(&self) {
        self.host.check();
        let told = self.unit.state().contains("NOT as its guest wants");
        for index in 0..self.requesters.len() {
            let place = self.host.place(index);
            let right = place == self.expected(index) || place == Reached::Nothing || told;
            assert!(right, "function {index} is at {place:?}: {}", self.unit.state());
            // Events and commands are about functions by name.
            let named = self.host.name(index) == Some(self.requesters[index].sbdf().bdf);
            assert!(
                named || !matches!(place, Reached::Tables(_)) || told,
                "function {index}"
            );
        }
        self.check_rings(false);
    }

    /// Rings are on exactly while the registers say so, or not at all after a refusal.
    fn check_rings(&self, exactly: bool) {
        let control = self.read(0x18);
        let runs = !self.is_stopped();
        let bit = |bit: u32| runs && control >> bit & 1 == 1;
        for (kind, register, on, interrupts) in [
            (QueueKind::Command, 0x08, bit(12), bit(4)),
            (QueueKind::Event, 0x10, bit(2), bit(3)),
            (QueueKind::Ppr, 0x38, bit(13) && bit(15), bit(14)),
        ] {
            let base = self.read(register);
            let length = base >> 56 & 0xf;
            let Some(queue) = self.host.queue(kind) else {
                assert!(!(exactly && bit(0) && on && length >= 8), "{kind:?} is off");
                continue;
            };
            if exactly {
                assert!(bit(0) && on, "{kind:?} is on");
                assert_eq!(queue.base.0, base & 0x000f_ffff_ffff_f000);
                assert_eq!(u64::from(queue.length), length);
                assert_eq!(queue.interrupts, interrupts);
            }
        }
    }
}
