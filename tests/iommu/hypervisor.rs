//! A kernel with a driver for the vIOMMU hardware, in a machine whose emulated unit has it: it finds all by configuration
//! space and registers, and serves guests of its own as AMD's driver would.

use std::sync::{Arc, Mutex};

use ravelin::iommu::agent::{AddressType, TranslationAgent};
use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::request::{Access, Request};
use ravelin::iommu::amd::spec::dte::{Attribute, Dte, Interrupt};
use ravelin::iommu::amd::spec::viommu::{COMMAND_DIRTY, DEVICE_MAPS, DOMAIN_MAPS};
use ravelin::iommu::emulated::{
    EmulatedUnit, GuestControls, GuestPages, GuestRegisters, MMIO_LEN, UnitParts,
};
use ravelin::pci::Function;
use ravelin::platform::addr::{Bdf, Gpa, GpaRange, Iova, Sbdf};
use ravelin::platform::bus::BusDevice;
use ravelin::platform::dma::Requester;
use ravelin::platform::host::HostError;
use ravelin::platform::memory::GuestRam;
use ravelin::platform::msi::{MsiMessage, MsiRoute, MsiSink};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::driver::{
    EVERYTHING, GN, INVALIDATE_ALL, PDE, S, WAIT_INTERRUPT, command, guest_dte, host_dte, invalidate_device,
    invalidate_pages, pte, wait,
};

const RAM: u64 = 0x200_0000;
const RING: u64 = 0x4_0000;
const LOG: u64 = 0x5_0000;
const FLAG: u64 = 0x7_0000;
const DEVICE_TABLE: u64 = 0x10_0000;
const TABLES: u64 = 0x40_0000;
/// Memory of the guests, 256 KiB each.
const GUESTS: u64 = 0x100_0000;
const GUEST_LEN: u64 = 0x4_0000;
/// Maps of the guests, 2 MiB each.
const MAPS: u64 = 0x140_0000;
const DIRTY: u64 = 0x1c0_0000;
const INTERRUPTS: u64 = 0x1d0_0000;
const INTERRUPT_ENTRIES: u64 = 0x1d0_2000;

/// In a guest's memory.
mod guest {
    pub(super) const RING: u64 = 0x1000;
    pub(super) const LOG: u64 = 0x2000;
    pub(super) const FLAG: u64 = 0x3000;
    pub(super) const GCR3: u64 = 0x5000;
    pub(super) const TABLES: u64 = 0x6000;
    pub(super) const BUFFER: u64 = 0x1_0000;
    /// What it calls its device and its domain.
    pub(super) const NAME: u16 = 0x0018;
    pub(super) const DOMAIN: u16 = 9;
}

/// Where the unit's own function is.
fn own() -> Bdf {
    Bdf::new(0, 0, 2).expect("valid")
}

/// The device of guest `id`.
fn device(id: u16) -> Bdf {
    Bdf::from_requester_id(0x0100 + id * 8)
}

/// Where interrupts arrive.
#[derive(Default)]
struct Processors(Mutex<Vec<MsiMessage>>);

impl MsiSink for Processors {
    fn signal(&self, _requester: &Requester, message: MsiMessage) {
        self.0.lock().expect("not poisoned").push(message);
    }

    fn route(&self, _requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        unreachable!("a unit makes no route")
    }
}

/// The machine, and what its kernel found in it.
struct Kernel {
    ram: GuestRam,
    unit: Arc<EmulatedUnit>,
    processors: Arc<Processors>,
    /// Where the guests' registers are on the bus.
    placed: Option<GuestRegisters>,
    /// Where the kernel found that they are: VF MMIO and VF control MMIO.
    found: [u64; 2],
    next_table: u64,
    tail: u64,
}

impl Kernel {
    fn new(virtualizable: bool) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(RAM).expect("small"))]);
        let ram = GuestRam::new(ram.expect("a mapping"));
        let processors = Arc::new(Processors::default());
        let wanted = Wanted {
            virtualizable,
            ..Wanted::DEFAULT
        };
        let placed = GuestRegisters::at(Gpa(0x12_4000_0000)).filter(|_| virtualizable);
        let unit = EmulatedUnit::new(UnitParts {
            name: "iommu0".to_owned(),
            at: Sbdf {
                segment: 0,
                bdf: own(),
            },
            mmio: GpaRange::new(Gpa(0xfeb0_0000), MMIO_LEN).expect("valid"),
            features: Features::offer(wanted),
            guests: placed,
            ram: ram.clone(),
            messages: processors.clone(),
        });
        Self {
            ram,
            unit: unit.expect("an eventfd"),
            processors,
            placed,
            found: [0; 2],
            next_table: TABLES,
            tail: 0,
        }
    }

    fn config(&self, at: u16) -> u32 {
        self.unit.config_read(at / 4)
    }

    /// Where the capability `id` is in configuration space.
    fn capability(&self, id: u32) -> Option<u16> {
        let mut at = u16::try_from(self.config(0x34) & 0xfc).expect("8 bits");
        while at != 0 {
            let header = self.config(at);
            if header & 0xff == id {
                return Some(at);
            }
            at = u16::try_from(header >> 8 & 0xfc).expect("8 bits");
        }
        None
    }

    /// What is on the bus at `at`, and which byte of it.
    fn on_bus(&self, at: u64) -> (Box<dyn BusDevice>, u64) {
        let placed = self.placed.expect("a unit that serves guests");
        if placed.pages.contains(Gpa(at)) {
            let device = Box::new(GuestPages(self.unit.clone()));
            return (device, at - placed.pages.start().0);
        }
        assert!(placed.control.contains(Gpa(at)), "{at:#x} is nobody's");
        let device = Box::new(GuestControls(self.unit.clone()));
        (device, at - placed.control.start().0)
    }

    /// Write a register of a guest's page, as the guest does.
    fn page_write(&self, id: u16, at: u64, value: u32) {
        let (device, offset) = self.on_bus(self.found[0] + u64::from(id) * 0x1000 + at);
        device.write(offset, &value.to_le_bytes());
    }

    fn page_read(&self, id: u16, at: u64) -> u32 {
        let mut data = [0; 4];
        let (device, offset) = self.on_bus(self.found[0] + u64::from(id) * 0x1000 + at);
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Write a register that controls a guest.
    fn control(&self, id: u16, at: u64, value: u64) {
        let (device, offset) = self.on_bus(self.found[1] + u64::from(id) * 0x40 + at);
        device.write(offset, &value.to_le_bytes());
    }

    fn register(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        BusDevice::read(&*self.unit, at, &mut data);
        u64::from_le_bytes(data)
    }

    fn set_register(&self, at: u64, value: u64) {
        BusDevice::write(&*self.unit, at, &value.to_le_bytes());
    }

    fn put(&self, at: u64, value: u64) {
        self.ram.write_obj(Gpa(at), &value).expect("RAM");
    }

    fn get(&self, at: u64) -> u64 {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }

    fn table(&mut self) -> u64 {
        self.next_table += 0x1000;
        self.next_table
    }

    /// Map pages in a host table of four levels.
    fn map(&mut self, root: u64, iova: u64, to: u64, pages: u64) {
        for page in 0..pages {
            let at = iova + (page << 12);
            let mut table = root;
            for level in (2..=4_u64).rev() {
                let slot = table + (at >> (9 * level + 3) & 0x1ff) * 8;
                if self.get(slot) & 1 == 0 {
                    let next = self.table();
                    self.put(slot, 3 << 61 | next | (level - 1) << 9 | 1);
                }
                table = self.get(slot) & 0x000f_ffff_ffff_f000;
            }
            self.put(table + (at >> 12 & 0x1ff) * 8, pte(to + (page << 12)));
        }
    }

    fn set_entry(&mut self, device: Bdf, dte: &Dte) {
        let at = DEVICE_TABLE + u64::from(device.requester_id()) * 32;
        for (index, word) in (0..).zip(dte.into_quadwords()) {
            self.put(at + index * 8, word);
        }
        self.submit(&[invalidate_device(device)]);
    }

    fn submit(&mut self, commands: &[u128]) {
        for command in commands {
            self.ram
                .write(Gpa(RING + self.tail), &command.to_le_bytes())
                .expect("RAM");
            self.tail = (self.tail + 16) % 0x1000;
        }
        self.set_register(0x2008, self.tail);
    }

    /// Host boot: find the extension, give it its private address space, and switch it on.
    fn started() -> Self {
        let mut kernel = Self::new(true);
        let at = kernel.capability(0x09).expect("a vendor-specific capability");
        for (index, offset) in [8, 16].into_iter().enumerate() {
            let [low, high] = [0, 4].map(|half| u64::from(kernel.config(at + offset + half)));
            assert_eq!(low & 1, 1, "firmware has enabled it");
            kernel.found[index] = high << 32 | low & !1;
        }
        kernel.set_register(0x00, DEVICE_TABLE | 0x1ff);
        kernel.set_register(0x08, RING | 8 << 56);
        kernel.set_register(0x10, LOG | 8 << 56);
        // vCmdEn, vIommuEn, GCR3TRPMode, GstBufferTRPMode beside what every driver sets.
        let on = 1 << 52 | 1 << 53 | 1 << 58 | 1 << 60;
        kernel.set_register(0x18, on | 1 << 16 | 1 << 12 | 1 << 2 | 1 << 3 | 1);
        assert_eq!(kernel.register(0x18) & on, on, "they stay set");
        let private = kernel.table();
        for id in 1..=2_u16 {
            let maps = MAPS + u64::from(id - 1) * 0x20_0000;
            kernel.map(private, DEVICE_MAPS + (u64::from(id) << 20), maps, 0x100);
            kernel.map(
                private,
                DOMAIN_MAPS + (u64::from(id) << 19),
                maps + 0x10_0000,
                0x80,
            );
        }
        kernel.map(private, COMMAND_DIRTY, DIRTY, 2);
        kernel.put(INTERRUPTS, INTERRUPT_ENTRIES | 1);
        let entry = Dte {
            interrupt: Interrupt::new()
                .with_iv(true)
                .with_int_ctl(2)
                .with_root(INTERRUPTS >> 6),
            ..host_dte(private, 4, 1)
        };
        kernel.set_entry(own(), &entry);
        kernel
    }

    /// Serve guest `id`: its memory, its names, its device, its rings and its interrupt.
    fn serve(&mut self, id: u16) {
        let base = base(id);
        let parent = self.table();
        self.map(parent, 0, base, GUEST_LEN >> 12);
        let translate = Bdf::from_requester_id(0x4800 + id);
        self.submit(&[command(10, u32::from(id) | 1 << 31, 0, 0, 0)]);
        self.set_entry(translate, &host_dte(parent, 4, 0x10 + id));
        self.control(id, 0x10, u64::from(translate.requester_id()) << 16);
        let entry = |name: u16, host: u16| 1 << 63 | u64::from(name) << 46 | u64::from(host) << 14 | 1;
        self.control(id, 0x00, entry(guest::NAME, device(id).requester_id()));
        self.control(id, 0x08, entry(guest::DOMAIN, 0x20 + id));
        let mut nested = guest_dte(guest::GCR3, 0x20 + id);
        let host = host_dte(parent, 4, 0).host;
        nested.host = host
            .with_gv(true)
            .with_giov(true)
            .with_gcr3_14_12(nested.host.gcr3_14_12());
        nested.attribute = Attribute::new()
            .with_vimu_en(true)
            .with_guest_id(id)
            .with_guest_device_id(guest::NAME);
        self.set_entry(device(id), &nested);
        // A message to processor 3, vector 40h and the guest's number.
        self.put(INTERRUPT_ENTRIES + u64::from(id) * 16, 3 << 8 | 1);
        self.put(INTERRUPT_ENTRIES + u64::from(id) * 16 + 8, 0x40 + u64::from(id));
        self.submit(&[command(5, own().requester_id().into(), 0, 0, 0)]);
        self.control(id, 0x20, guest::RING | 0x308);
        self.control(id, 0x28, guest::LOG | 0x308);
        // And in the guest, tables that lead 1000h to its buffer.
        self.put(base + guest::GCR3, guest::TABLES | 1);
        for level in 0..3 {
            let table = guest::TABLES + level * 0x1000;
            self.put(base + table, (table + 0x1000) | 7);
        }
        self.put(base + guest::TABLES + 0x3008, guest::BUFFER | 7);
    }

    /// A guest submits commands.
    fn ring(&self, id: u16, commands: &[u128]) {
        let mut tail = u64::from(self.page_read(id, 0x08));
        for command in commands {
            let at = base(id) + guest::RING + tail;
            self.ram.write(Gpa(at), &command.to_le_bytes()).expect("RAM");
            tail = (tail + 16) % 0x1000;
        }
        self.page_write(id, 0x08, u32::try_from(tail).expect("in the ring"));
    }

    /// The guest's device writes `data` at 1000h.
    fn dma(&self, id: u16, data: u64) -> bool {
        let request = Request::plain(device(id), Iova(0x1000), Access::WRITE);
        let data = data.to_le_bytes();
        TranslationAgent::write(&*self.unit, &request, AddressType::Untranslated, &data).is_ok()
    }

    fn interrupts(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut *self.processors.0.lock().expect("not poisoned"))
    }
}

fn base(id: u16) -> u64 {
    GUESTS + u64::from(id) * GUEST_LEN
}

#[test]
fn the_extension_is_found_as_a_driver_looks_for_it() {
    let kernel = Kernel::started();
    let placed = kernel.placed.expect("planned");
    assert_eq!(kernel.found, [placed.pages.start().0, placed.control.start().0]);
    assert_eq!((placed.pages.len(), placed.control.len()), (256 << 20, 4 << 20));
    assert_eq!(kernel.register(0x30) >> 55 & 1, 1, "EFR.vIOMMUSup");
    assert_eq!(kernel.register(0x1a0) >> 3 & 1, 1, "EFR2.GCR3TRPMode");
    assert_eq!(kernel.register(0x190), 0, "nothing is wrong");
    // The other capabilities are where they have to be.
    assert_eq!(kernel.capability(0x0f), Some(0x40));
    let msi = kernel.capability(0x05).expect("MSI");
    let write = ravelin::pci::access::DwordWrite::whole(0xfee0_1000);
    let _interrupts_only = kernel.unit.config_write(msi / 4 + 1, write);
    assert_eq!(kernel.config(msi + 4), 0xfee0_1000);
}

#[test]
fn the_addresses_of_guests_registers_cannot_be_moved() {
    let kernel = Kernel::started();
    let at = kernel.capability(0x09).expect("a vendor-specific capability");
    let before = (0..6)
        .map(|dword| kernel.config(at + dword * 4))
        .collect::<Vec<_>>();
    for dword in 0..6 {
        let write = ravelin::pci::access::DwordWrite::whole(u32::MAX);
        let _nothing = kernel.unit.config_write(at / 4 + dword, write);
    }
    let after = (0..6)
        .map(|dword| kernel.config(at + dword * 4))
        .collect::<Vec<_>>();
    assert_eq!(before, after);
}

#[test]
fn a_unit_that_serves_no_guests_shows_nothing_of_it() {
    let kernel = Kernel::new(false);
    assert_eq!(kernel.capability(0x09), None);
    assert_eq!(kernel.register(0x30) >> 55 & 1, 0);
    kernel.set_register(0x18, u64::MAX);
    assert_eq!(kernel.register(0x18) & (1 << 52 | 1 << 53 | 1 << 60), 0);
}

#[test]
fn a_guest_of_the_guests_is_served_from_its_own_registers_and_memory() {
    let mut kernel = Kernel::started();
    kernel.serve(1);
    assert_eq!(kernel.page_read(1, 0x20), 0x18, "both rings run");
    assert!(kernel.dma(1, 0x1122_3344));
    assert_eq!(kernel.get(base(1) + guest::BUFFER), 0x1122_3344);
    // A new mapping, an invalidation by the guest's numbers, a wait.
    kernel.put(base(1) + guest::TABLES + 0x3008, (guest::BUFFER + 0x1000) | 7);
    let flush = invalidate_pages(guest::DOMAIN, 0, EVERYTHING | S | PDE | GN);
    kernel.ring(1, &[flush, wait(guest::FLAG, 7)]);
    assert_eq!(kernel.get(base(1) + guest::FLAG), 7);
    assert!(kernel.dma(1, 0x55));
    assert_eq!(kernel.get(base(1) + guest::BUFFER + 0x1000), 0x55);
    assert_eq!(kernel.interrupts(), []);
    // A fault is in the guest's log by its number, and interrupts where the kernel had it routed.
    kernel.put(base(1) + guest::TABLES + 0x3008, 0);
    kernel.ring(1, &[flush]);
    assert!(!kernel.dma(1, 0));
    assert_eq!(kernel.page_read(1, 0x18), 0x10);
    let record = kernel.get(base(1) + guest::LOG);
    assert_eq!(record & 0xffff, u64::from(guest::NAME));
    assert_eq!(record >> 60, 2);
    assert_eq!(kernel.interrupts(), [MsiMessage::remapped(3, false, 0x41)]);
    kernel.ring(1, &[WAIT_INTERRUPT]);
    assert_eq!(kernel.interrupts(), [MsiMessage::remapped(3, false, 0x41)]);
    assert_eq!(kernel.register(0x2018), 0, "none of it is the kernel's affair");
}

#[test]
fn a_guest_that_is_let_go_reaches_nothing_any_more() {
    let mut kernel = Kernel::started();
    kernel.serve(1);
    kernel.serve(2);
    // Rings, tables, names, the translate device: in the order of a kernel's.
    kernel.control(1, 0x20, 0);
    kernel.control(1, 0x28, 0);
    let blocked = Dte {
        host: host_dte(0, 0, 0).host.with_tv(false),
        ..Dte::default()
    };
    kernel.set_entry(device(1), &blocked);
    kernel.control(1, 0x00, 1 << 63 | u64::from(guest::NAME) << 46);
    kernel.control(1, 0x08, 1 << 63 | u64::from(guest::DOMAIN) << 46);
    kernel.control(1, 0x10, 0);
    kernel.set_entry(Bdf::from_requester_id(0x4801), &blocked);
    kernel.ring(1, &[wait(guest::FLAG, 7)]);
    assert_eq!(kernel.get(base(1) + guest::FLAG), 0);
    assert!(!kernel.dma(1, 1));
    assert!(kernel.dma(2, 1), "the other is served");
    kernel.ring(2, &[wait(guest::FLAG, 8)]);
    assert_eq!(kernel.get(base(2) + guest::FLAG), 8);
    let names = MAPS + u64::from(guest::NAME) * 16;
    assert_eq!(kernel.get(names), 0);
}

#[test]
fn commands_of_many_guests_hold_up_nobody_and_are_carried_out_in_turn() {
    let mut kernel = Kernel::started();
    for id in 1..=2 {
        kernel.serve(id);
        let mut commands = vec![INVALIDATE_ALL; 5];
        commands.push(wait(guest::FLAG, 7));
        kernel.ring(id, &commands);
        assert_eq!(
            kernel.page_read(id, 0x00),
            0x10,
            "one, by the processor that rang"
        );
    }
    for step in 2..=6 {
        for id in 1..=2 {
            assert_eq!(kernel.get(base(id) + guest::FLAG), 0, "{step}");
            kernel.unit.run_commands();
        }
    }
    for id in 1..=2 {
        kernel.unit.run_commands();
        assert_eq!(kernel.get(base(id) + guest::FLAG), 7);
    }
    kernel.submit(&[wait(FLAG, 9)]);
    assert_eq!(kernel.get(FLAG), 9, "the kernel's own ring goes on");
}

#[test]
fn a_reset_of_the_machine_ends_what_guests_had() {
    let mut kernel = Kernel::started();
    kernel.serve(1);
    kernel.ring(1, &[INVALIDATE_ALL, INVALIDATE_ALL, wait(guest::FLAG, 7)]);
    kernel.unit.reset();
    kernel.unit.run_commands();
    assert_eq!(kernel.page_read(1, 0x08), 0);
    assert_eq!(kernel.page_read(1, 0x20), 0);
    assert_eq!(kernel.get(base(1) + guest::FLAG), 0);
    assert_eq!(kernel.interrupts(), []);
}
