//! A unit among doubles: its driver in miniature, and a recorder where the processors would be.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{EmulatedUnit, MMIO_LEN, UnitParts};
use crate::iommu::amd::features::{Features, Wanted};
use crate::iommu::amd::spec::registers::Control;
use crate::pci::testing::Messages;
use crate::platform::addr::{Bdf, Gpa, GpaRange, Sbdf};
use crate::platform::bus::BusDevice;
use crate::platform::dma::Requester;
use crate::platform::memory::GuestRam;
use crate::platform::msi::MsiMessage;

const RING: u64 = 0x1_0000;
const LOG: u64 = 0x2_0000;
const FLAG: u64 = 0x3_0000;
const INTERRUPT_TABLE: u64 = 0x4_0000;
const HOST_TABLE: u64 = 0x5_0000;
const DEVICE_TABLE: u64 = 0x20_0000;
/// Bytes of RAM.
const RAM: usize = 0x60_0000;

/// A unit with its driver: rings and tables in place, everything on.
pub(crate) struct Rig {
    pub(crate) ram: GuestRam,
    pub(crate) unit: Arc<EmulatedUnit>,
    pub(crate) processors: Arc<Messages>,
    tail: std::cell::Cell<u64>,
}

/// The device under test: 01:00.0.
pub(crate) fn device() -> Bdf {
    Bdf::new(1, 0, 0).expect("valid")
}

/// Its requester, with Bus Master Enable.
pub(crate) fn requester() -> Arc<Requester> {
    let requester = Arc::new(Requester::new(Sbdf {
        segment: 0,
        bdf: device(),
    }));
    requester.set_bus_master(true);
    requester
}

/// What a device sends that Linux gave entry `index` of its table.
pub(crate) fn indexed(index: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data: index,
    }
}

impl Rig {
    /// A unit as after power-on.
    pub(crate) fn at_reset() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let processors = Messages::new();
        let unit = EmulatedUnit::new(UnitParts {
            name: "iommu0".to_owned(),
            at: Sbdf {
                segment: 0,
                bdf: Bdf::new(0, 0, 2).expect("valid"),
            },
            mmio: GpaRange::new(Gpa(0xfeb0_4000), MMIO_LEN).expect("valid"),
            features: Features::offer(Wanted::DEFAULT),
            guests: None,
            ram: ram.clone(),
            messages: processors.clone(),
        });
        Self {
            ram,
            unit: unit.expect("an eventfd"),
            processors,
            tail: std::cell::Cell::new(0),
        }
    }

    /// Rings in place, everything on.
    pub(crate) fn running() -> Self {
        let rig = Self::at_reset();
        let length = 8_u64 << 56;
        rig.write(0x00, DEVICE_TABLE | 0x1ff);
        rig.write(0x08, RING | length);
        rig.write(0x10, LOG | length);
        let on = Control::new()
            .with_cmd_buf_en(true)
            .with_ga_en(true)
            .with_xt_en(true)
            .with_event_log_en(true)
            .with_event_int_en(true)
            .with_iommu_en(true);
        rig.write(0x18, on.into_bits());
        rig
    }

    /// Write a register.
    pub(crate) fn write(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    /// Read a register.
    pub(crate) fn read(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    /// The device's entry: interrupts by a table of 16 entries, memory by a host table of one level.
    pub(crate) fn cover(&self) {
        let at = Gpa(DEVICE_TABLE + 32 * u64::from(device().requester_id()));
        let translation = 1 << 62 | 1 << 61 | HOST_TABLE | 1 << 9 | 1 << 1 | 1;
        let interrupts = 2 << 60 | INTERRUPT_TABLE | 4 << 1 | 1;
        self.store(at.0, translation);
        self.store(at.0 + 8, 1);
        self.store(at.0 + 16, interrupts);
        self.command(2, device().requester_id().into());
    }

    /// The device's entry lets it reach nothing (V=1, TV=0): the table is written, and the command put into the ring.
    pub(crate) fn block(&self) {
        self.store(DEVICE_TABLE + 32 * u64::from(device().requester_id()), 1);
        self.put(2 << 60 | u64::from(device().requester_id()), 0);
    }

    /// Set bit `bit` of the second quadword of the device's entry, and no other beside the domain.
    pub(crate) fn suppress(&self, bit: u32) {
        let at = DEVICE_TABLE + 32 * u64::from(device().requester_id()) + 8;
        self.store(at, 1 << bit | 1);
        self.command(2, device().requester_id().into());
    }

    /// An entry for the unit itself that blocks every interrupt (IV=1, IntCtl=0), as that of any function can.
    pub(crate) fn block_its_own(&self) {
        let own = self.unit.own.sbdf().bdf;
        let at = DEVICE_TABLE + 32 * u64::from(own.requester_id());
        self.store(at + 16, 1);
        self.command(2, own.requester_id().into());
        assert_eq!(self.unit.routed(own, indexed(0x31)), None, "it would be blocked");
    }

    /// Map page `page` of the device's addresses to `target`.
    pub(crate) fn map(&self, page: u64, target: u64) {
        self.store(HOST_TABLE + 8 * page, 1 << 62 | 1 << 61 | target | 1);
    }

    /// Entry `index` of the device's remapping table: `vector` to APIC `destination`; `None` switches it off.
    pub(crate) fn remap(&self, index: u64, to: Option<(u32, u8)>) {
        let [low, high] = to.map_or([0, 0], |(destination, vector)| {
            let low = u64::from(destination & 0xff_ffff) << 8 | 1;
            [low, u64::from(destination >> 24) << 56 | u64::from(vector)]
        });
        self.store(INTERRUPT_TABLE + 16 * index, low);
        self.store(INTERRUPT_TABLE + 16 * index + 8, high);
    }

    /// Entry `index` of the device's remapping table, on: `vector` to `destination`, in the way that `bits` of the entry's
    /// lowest byte say.
    pub(crate) fn remap_as(&self, index: u64, bits: u64, destination: u32, vector: u8) {
        self.remap(index, Some((destination, vector)));
        let at = INTERRUPT_TABLE + 16 * index;
        self.store(at, self.load(at) | bits);
    }

    /// The third quadword of the device's entry.
    pub(crate) fn interrupt_half(&self) -> u64 {
        self.load(DEVICE_TABLE + 32 * u64::from(device().requester_id()) + 16)
    }

    /// Another one, and the unit is told.
    pub(crate) fn set_interrupt_half(&self, value: u64) {
        self.store(DEVICE_TABLE + 32 * u64::from(device().requester_id()) + 16, value);
        self.command(2, device().requester_id().into());
    }

    /// Tell the unit that the device's remapping entries changed, and wait until it has obeyed.
    pub(crate) fn invalidate_interrupts(&self) {
        self.command(5, device().requester_id().into());
    }

    /// Ring for a command, and for a COMPLETION_WAIT whose store is waited for.
    pub(crate) fn command(&self, code: u64, low: u64) {
        self.store(FLAG, 0);
        self.put(code << 60 | low, 0);
        self.put(1 << 60 | FLAG | 1, 0x5a);
        self.write(0x2008, self.tail.get());
        assert_eq!(self.load(FLAG), 0x5a, "the command was carried out");
    }

    /// Put a command into the ring.
    pub(crate) fn put(&self, low: u64, high: u64) {
        let at = self.tail.get();
        self.store(RING + at, low);
        self.store(RING + at + 8, high);
        self.tail.set((at + 16) % 0x1000);
    }

    /// Put a COMPLETION_WAIT into the ring that stores `value`, not 0, where [`Rig::flag`] looks.
    pub(crate) fn put_wait(&self, value: u64) {
        self.put(1 << 60 | FLAG | 1, value);
    }

    /// What the last COMPLETION_WAIT stored.
    pub(crate) fn flag(&self) -> u64 {
        self.load(FLAG)
    }

    /// What the doorbell is rung with.
    pub(crate) fn tail(&self) -> u64 {
        self.tail.get()
    }

    /// Ring the doorbell.
    pub(crate) fn ring(&self) {
        self.write(0x2008, self.tail.get());
    }

    /// The events in the log, by code.
    pub(crate) fn events(&self) -> Vec<u64> {
        let tail = self.read(0x2018);
        (0..tail / 16).map(|at| self.load(LOG + 16 * at) >> 60).collect()
    }

    pub(crate) fn store(&self, at: u64, value: u64) {
        self.ram.write_obj(Gpa(at), &value).expect("RAM");
    }

    pub(crate) fn load(&self, at: u64) -> u64 {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }
}
