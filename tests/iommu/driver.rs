//! A driver in miniature: it lays out rings and tables as an operating system would, and a device that does
//! DMA through the unit.

use std::sync::{Arc, Mutex};

use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::dma::{Abort, InFlight};
use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::processor::{Follower, NoAnswer};
use ravelin::iommu::amd::registers::Interrupt;
use ravelin::iommu::amd::remap::Remapped;
use ravelin::iommu::amd::request::{Access, Pasid, Request};
use ravelin::iommu::amd::spec::dte::{Dte, Guest, Host};
use ravelin::iommu::amd::spec::registers::{Control, RingBase};
use ravelin::iommu::amd::{Effects, Unit};
use ravelin::platform::addr::{Bdf, Gpa, Iova};
use ravelin::platform::memory::GuestRam;
use ravelin::platform::msi::MsiMessage;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::page::Page;

/// Bytes of RAM, from 0 on.
pub(crate) const RAM: u64 = 0x200_0000;
/// An address that is not RAM.
pub(crate) const HOLE: u64 = 0x8000_0000;

pub(crate) const RING: u64 = 0x4_0000;
pub(crate) const RING_LENGTH: u8 = 9;
pub(crate) const LOG: u64 = 0x5_0000;
pub(crate) const PPR_LOG: u64 = 0x6_0000;
/// Where COMPLETION_WAIT stores.
pub(crate) const FLAG: u64 = 0x7_0000;
pub(crate) const INTERRUPT_TABLE: u64 = 0x8_0000;
pub(crate) const DEVICE_TABLE: u64 = 0x10_0000;
const TABLES: u64 = 0x40_0000;

/// Register offsets.
pub(crate) mod reg {
    pub(crate) const DEVICE_TABLE: u64 = 0x00;
    pub(crate) const COMMAND_BASE: u64 = 0x08;
    pub(crate) const EVENT_BASE: u64 = 0x10;
    pub(crate) const CONTROL: u64 = 0x18;
    pub(crate) const EXCLUSION_BASE: u64 = 0x20;
    pub(crate) const EXCLUSION_LIMIT: u64 = 0x28;
    pub(crate) const EFR: u64 = 0x30;
    pub(crate) const PPR_BASE: u64 = 0x38;
    pub(crate) const MISC: u64 = 0x150;
    pub(crate) const XT_EVENT: u64 = 0x170;
    pub(crate) const XT_PPR: u64 = 0x178;
    pub(crate) const EFR2: u64 = 0x1a0;
    pub(crate) const COMMAND_HEAD: u64 = 0x2000;
    pub(crate) const COMMAND_TAIL: u64 = 0x2008;
    pub(crate) const EVENT_HEAD: u64 = 0x2010;
    pub(crate) const EVENT_TAIL: u64 = 0x2018;
    pub(crate) const STATUS: u64 = 0x2020;
    pub(crate) const PPR_HEAD: u64 = 0x2030;
    pub(crate) const PPR_TAIL: u64 = 0x2038;
}

/// How the driver writes 64-bit registers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Width {
    Quadword,
    LowThenHigh,
    HighThenLow,
}

pub(crate) const WIDTHS: [Width; 3] = [Width::Quadword, Width::LowThenHigh, Width::HighThenLow];

/// The unit's own function: 00:00.2.
pub(crate) fn own() -> Bdf {
    Bdf::new(0, 0, 2).expect("valid")
}

/// The device under test: 02:03.1.
pub(crate) fn device() -> Bdf {
    Bdf::new(2, 3, 1).expect("valid")
}

/// Another one: 02:04.0.
pub(crate) fn other_device() -> Bdf {
    Bdf::new(2, 4, 0).expect("valid")
}

pub(crate) fn pasid(value: u32) -> Pasid {
    Pasid::new(value).expect("20 bits")
}

/// A driver, its device, and the unit between them.
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) unit: Arc<Unit<GuestRam>>,
    page: Page,
    pub(crate) width: Width,
    /// Interrupts of the unit, in order.
    pub(crate) interrupts: Mutex<Vec<Interrupt>>,
    next_table: u64,
    sequence: u64,
}

impl Driver {
    /// A unit that offers everything, as after power-on.
    pub(crate) fn at_reset() -> Self {
        Self::with(Wanted::EVERYTHING)
    }

    /// A unit that offers `wanted`, as after power-on.
    pub(crate) fn with(wanted: Wanted) -> Self {
        let ranges = [(GuestAddress(0), usize::try_from(RAM).expect("small"))];
        let ram = GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("a mapping"));
        let unit = Unit::new(own(), Features::offer(wanted), ram.clone());
        let page = Page::default();
        unit.show_registers(Box::new(page.clone()));
        Self {
            unit: Arc::new(unit),
            page,
            ram,
            width: Width::Quadword,
            interrupts: Mutex::default(),
            next_table: TABLES,
            sequence: 0,
        }
    }

    /// Rings and tables in place, everything on.
    pub(crate) fn running() -> Self {
        Self::at_reset().started()
    }

    /// Set up and switch on, in Linux's order.
    pub(crate) fn started(self) -> Self {
        self.write(reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff);
        self.write(reg::COMMAND_BASE, ring_base(RING, RING_LENGTH));
        self.enable(Control::new().with_cmd_buf_en(true));
        self.enable(Control::new().with_gt_en(true).with_ga_en(true));
        self.enable(Control::new().with_iommu_en(true));
        self.write(reg::EVENT_BASE, ring_base(LOG, 8));
        self.enable(Control::new().with_event_log_en(true));
        self
    }

    pub(crate) fn carry_out(&self, effects: Effects) {
        let raised = [effects.interrupts.event, effects.interrupts.ppr];
        self.interrupts
            .lock()
            .expect("not poisoned")
            .extend(raised.into_iter().flatten());
        if effects.more_commands {
            self.carry_out(self.unit.run_commands());
        }
    }

    /// Interrupts since the last time.
    pub(crate) fn take_interrupts(&self) -> Vec<Interrupt> {
        std::mem::take(&mut *self.interrupts.lock().expect("not poisoned"))
    }

    /// Write a 64-bit register.
    pub(crate) fn write(&self, offset: u64, value: u64) {
        let bytes = value.to_le_bytes();
        let parts: &[(u64, &[u8])] = match self.width {
            Width::Quadword => &[(0, &bytes)],
            Width::LowThenHigh => &[(0, &bytes[..4]), (4, &bytes[4..])],
            Width::HighThenLow => &[(4, &bytes[4..]), (0, &bytes[..4])],
        };
        for (at, part) in parts {
            self.carry_out(self.unit.mmio_write(offset + at, part));
        }
    }

    /// Write a dword, as Linux writes ring pointers.
    pub(crate) fn write_dword(&self, offset: u64, value: u32) {
        self.carry_out(self.unit.mmio_write(offset, &value.to_le_bytes()));
    }

    /// Read a 64-bit register; whether the guest asks the unit or looks at the page is the same.
    pub(crate) fn read(&self, offset: u64) -> u64 {
        self.page.agrees_with(&self.unit);
        let mut data = [0; 8];
        self.unit.mmio_read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    pub(crate) fn read_dword(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn control(&self) -> Control {
        Control::from_bits(self.read(reg::CONTROL))
    }

    pub(crate) fn enable(&self, bits: Control) {
        self.write(reg::CONTROL, self.read(reg::CONTROL) | bits.into_bits());
    }

    pub(crate) fn disable(&self, bits: Control) {
        self.write(reg::CONTROL, self.read(reg::CONTROL) & !bits.into_bits());
    }

    pub(crate) fn status(&self) -> u64 {
        self.read(reg::STATUS)
    }

    pub(crate) fn put(&self, at: u64, value: u64) {
        self.ram.write_obj(Gpa(at), &value).expect("RAM");
    }

    pub(crate) fn get(&self, at: u64) -> u64 {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }

    /// A zeroed page for a table.
    pub(crate) fn table(&mut self) -> u64 {
        self.next_table += 0x1000;
        assert!(self.next_table < RAM, "tables do not fill RAM");
        self.ram.write(Gpa(self.next_table), &[0; 0x1000]).expect("RAM");
        self.next_table
    }

    /// Give `device` an entry, without telling the unit.
    pub(crate) fn set_dte(&self, device: Bdf, dte: Dte) {
        let at = DEVICE_TABLE + u64::from(device.requester_id()) * 32;
        for (index, quadword) in (0..).zip(dte.into_quadwords()) {
            self.put(at + index * 8, quadword);
        }
    }

    /// Put commands into the ring and ring the doorbell once.
    pub(crate) fn submit(&self, commands: &[u128]) {
        let length = 1 << RING_LENGTH;
        let tail = u64::from(self.read_dword(reg::COMMAND_TAIL)) / 16;
        for (index, command) in (tail..).zip(commands) {
            let at = RING + index % length * 16;
            self.ram.write(Gpa(at), &command.to_le_bytes()).expect("RAM");
        }
        let tail = (tail + commands.len() as u64) % length * 16;
        self.write_dword(reg::COMMAND_TAIL, u32::try_from(tail).expect("in the ring"));
    }

    /// Submit `commands`, and a COMPLETION_WAIT that has to answer.
    pub(crate) fn flush(&mut self, commands: &[u128]) {
        self.sequence += 1;
        let all: Vec<_> = commands
            .iter()
            .copied()
            .chain([wait(FLAG, self.sequence)])
            .collect();
        self.submit(&all);
        assert_eq!(self.get(FLAG), self.sequence, "the wait was answered");
    }

    /// Records the unit logged since the last time, as dwords.
    pub(crate) fn events(&self) -> Vec<[u32; 4]> {
        let (mut head, tail) = (self.read_dword(reg::EVENT_HEAD), self.read_dword(reg::EVENT_TAIL));
        let mut records = Vec::new();
        while head != tail {
            records.push(self.dwords(LOG + u64::from(head)));
            head = (head + 16) % 0x1000;
        }
        self.write_dword(reg::EVENT_HEAD, head);
        records
    }

    pub(crate) fn dwords(&self, at: u64) -> [u32; 4] {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }

    /// Map `size` bytes (the natural size of `level`) at `iova` in a host table, making tables as needed.
    pub(crate) fn map(&mut self, root: u64, levels: u8, iova: u64, level: u8, leaf: u64) {
        let mut table = root;
        for step in (level + 1..=levels).rev() {
            let at = table + (iova >> (9 * step + 3) & 0x1ff) * 8;
            let present = self.get(at);
            let next = if present & 1 == 1 {
                present & 0x000f_ffff_ffff_f000
            } else {
                self.table()
            };
            self.put(at, pde(next, step - 1));
            table = next;
        }
        self.put(table + (iova >> (9 * level + 3) & 0x1ff) * 8, leaf);
    }

    /// The same in a guest table.
    pub(crate) fn map_guest(&mut self, root: u64, levels: u8, gva: u64, level: u8, leaf: u64) {
        let mut table = root;
        for step in (level + 1..=levels).rev() {
            let at = table + (gva >> (9 * step + 3) & 0x1ff) * 8;
            let present = self.get(at);
            let next = if present & 1 == 1 {
                present & 0x000f_ffff_ffff_f000
            } else {
                self.table()
            };
            self.put(at, next | 7);
            table = next;
        }
        self.put(table + (gva >> (9 * level + 3) & 0x1ff) * 8, leaf);
    }

    /// Give `device` a host table of four levels in domain `domain` and return its root.
    pub(crate) fn attach(&mut self, device: Bdf, domain: u16) -> u64 {
        let root = self.table();
        self.set_dte(device, host_dte(root, 4, domain));
        root
    }

    /// Where the device's write to `iova` goes, and nothing is written.
    pub(crate) fn target(&self, request: &Request) -> Option<u64> {
        self.on_bus(|bus| bus.translate(request))
            .ok()
            .map(|found| found.target.0)
    }

    /// Do something with requests in flight, and carry out what an abort asks for.
    pub(crate) fn on_bus<T>(
        &self,
        f: impl FnOnce(&InFlight<'_, GuestRam>) -> Result<T, Box<Abort>>,
    ) -> Result<T, Box<Abort>> {
        let outcome = f(&self.unit.begin());
        if let Err(abort) = &outcome {
            self.carry_out(abort.effects);
        }
        outcome
    }

    /// The device writes `data`, all or nothing.
    pub(crate) fn dma_write(&self, device: Bdf, iova: u64, data: &[u8]) -> Result<(), Box<Abort>> {
        self.on_bus(|bus| {
            let request = Request::plain(device, Iova(iova), Access::WRITE);
            bus.check(&request, data.len() as u64)?;
            let mut done = 0;
            while done < data.len() {
                let found = bus.translate(&request.moved_to(Iova(iova + done as u64)))?;
                let run = (data.len() - done).min(usize::try_from(found.run).unwrap_or(usize::MAX));
                self.ram
                    .write(found.target, &data[done..done + run])
                    .expect("RAM");
                done += run;
            }
            Ok(())
        })
    }

    /// The device sends a message.
    pub(crate) fn msi(&self, device: Bdf, address: u64, data: u32) -> Result<Remapped, Box<Abort>> {
        self.on_bus(|bus| bus.remap(device, MsiMessage { address, data }))
    }
}

/// Read by `device` at `iova`.
pub(crate) fn read(device: Bdf, iova: u64) -> Request {
    Request::plain(device, Iova(iova), Access::READ)
}

/// Write by `device` at `iova`.
pub(crate) fn write(device: Bdf, iova: u64) -> Request {
    Request::plain(device, Iova(iova), Access::WRITE)
}

pub(crate) fn ring_base(at: u64, length: u8) -> u64 {
    RingBase::new()
        .with_frame(at >> 12)
        .with_length(length)
        .into_bits()
}

/// A host table entry that points to a table of `level`.
pub(crate) const fn pde(table: u64, level: u8) -> u64 {
    3 << 61 | table | (level as u64) << 9 | 1
}

/// A host table entry for a page of its level's size, readable and writable.
pub(crate) const fn pte(page: u64) -> u64 {
    3 << 61 | page | 1
}

/// A valid entry that allows both directions, with a host table.
pub(crate) fn host_dte(root: u64, mode: u8, domain: u16) -> Dte {
    Dte {
        host: Host::new()
            .with_v(true)
            .with_tv(true)
            .with_mode(mode)
            .with_root(root >> 12)
            .with_ir(true)
            .with_iw(true),
        guest: Guest::new().with_domain(domain),
        ..Dte::default()
    }
}

/// A valid entry that allows both directions, with a guest table.
pub(crate) fn guest_dte(gcr3: u64, domain: u16) -> Dte {
    let mut dte = host_dte(0, 0, domain);
    dte.host.set_gv(true);
    dte.with_gcr3_root(gcr3)
}

/// A command from its dwords.
pub(crate) const fn command(opcode: u32, d0: u32, d1: u32, low: u32, high: u32) -> u128 {
    d0 as u128 | ((opcode << 28 | d1) as u128) << 32 | (low as u128) << 64 | (high as u128) << 96
}

const fn halves(value: u64) -> (u32, u32) {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_le_bytes();
    (
        u32::from_le_bytes([b0, b1, b2, b3]),
        u32::from_le_bytes([b4, b5, b6, b7]),
    )
}

/// COMPLETION_WAIT that stores `data` at `at`.
pub(crate) const fn wait(at: u64, data: u64) -> u128 {
    let (low, high) = halves(at);
    let (data_low, data_high) = halves(data);
    command(1, low | 1, high, data_low, data_high)
}

/// COMPLETION_WAIT that interrupts, and stores nothing.
pub(crate) const WAIT_INTERRUPT: u128 = command(1, 2, 0, 0, 0);

pub(crate) fn invalidate_device(device: Bdf) -> u128 {
    command(2, device.requester_id().into(), 0, 0, 0)
}

/// INVALIDATE_IOMMU_PAGES with its three flags as the lowest bits of `address`.
pub(crate) const fn invalidate_pages(domain: u16, pasid: u32, address_and_flags: u64) -> u128 {
    let (low, high) = halves(address_and_flags);
    command(3, pasid, domain as u32, low, high)
}

pub(crate) const S: u64 = 1;
pub(crate) const PDE: u64 = 2;
pub(crate) const GN: u64 = 4;
pub(crate) const EVERYTHING: u64 = 0x7fff_ffff_ffff_f000;

pub(crate) const INVALIDATE_ALL: u128 = command(8, 0, 0, 0, 0);

/// A follower that remembers what it was told.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) heard: Mutex<Vec<Command>>,
}

impl Follower for Recorder {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        self.heard.lock().expect("not poisoned").extend(batch);
        Ok(())
    }
}
