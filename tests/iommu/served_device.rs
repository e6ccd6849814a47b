//! Test devices behind a unit of the guest's that a model of a host's unit serves: process address spaces by the guest's
//! own tables, page requests in the guest's own log, and translations that the guest has its devices forget.
//!
//! The guest has other numbers of its devices and domains than the host, so that a number that is not translated on its
//! way is found out.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, Weak};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use ravelin::devices::test_device::{Flags, Reg, Rights, Space, Status};
use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::features::Wanted;
use ravelin::iommu::amd::processor::{Follower, NoAnswer};
use ravelin::iommu::amd::spec::dte::Dte;
use ravelin::iommu::sim::{self, SimHost, SimParts};
use ravelin::iommu::viommu::features::offer;
use ravelin::iommu::viommu::host::HostDevice;
use ravelin::iommu::viommu::{ServedParts, ServedUnit};
use ravelin::pci::Function as _;
use ravelin::pci::topology::Observer as _;
use ravelin::platform::addr::{Bdf, Gpa, GpaRange, Sbdf};
use ravelin::platform::bus::BusDevice;
use ravelin::platform::dma::{Dma, Requester};
use ravelin::platform::host::HostError;
use ravelin::platform::memory::GuestRam;
use ravelin::platform::msi::{MsiMessage, MsiRoute, MsiSink};
use ravelin::platform::protection::{Watcher, WriteProtection};

use crate::driver::{GN, command, guest_dte, invalidate_device, invalidate_pages, wait};
use crate::function::{Function, READ, REQUEST_PAGE, WRITE};

const RAM: usize = 0x80_0000;
const RING: u64 = 0x1_0000;
const LOG: u64 = 0x2_0000;
const PPR_LOG: u64 = 0x3_0000;
const FLAG: u64 = 0x4_0000;
const DEVICE_TABLE: u64 = 0x20_0000;
/// The GCR3 tables of two domains, and behind them the tables of each space.
const GCR3: [u64; 2] = [0x10_0000, 0x10_1000];
const SPACES: u64 = 0x12_0000;
const BUFFER: u64 = 0x40_0000;

/// What the guest calls its devices.
const NAMES: [u16; 2] = [0x0100, 0x0108];
/// What the model's host calls the first: nothing of the guest's.
const HOSTS_NAME: u16 = 0xc000;
/// The space that is mapped at the beginning, and where.
const SPACE: u64 = 5;
const AT: u64 = 0x7000;

/// Vectors of the unit's interrupts.
const EVENT: u8 = 0x31;
const PPR: u8 = 0x32;

const BOTH_WAYS: [Flags; 2] = [Flags::PASID, Flags::PASID.union(Flags::TRANSLATED)];

/// What went out as the unit.
#[derive(Default)]
struct Messages(Mutex<Vec<MsiMessage>>);

impl MsiSink for Messages {
    fn signal(&self, _requester: &Requester, message: MsiMessage) {
        self.0.lock().expect("not poisoned").push(message);
    }

    fn route(&self, _requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        Err(HostError::new(
            "route an interrupt to nobody",
            std::io::Error::other("nobody"),
        ))
    }
}

/// Who watches which pages.
type Watched = (Weak<dyn Watcher>, BTreeSet<Gpa>);

/// That, where anybody does.
#[derive(Default)]
struct Pages(Mutex<Option<Watched>>);

impl WriteProtection for Pages {
    fn watch(&self, watcher: &Weak<dyn Watcher>, pages: &BTreeSet<Gpa>) -> Result<(), HostError> {
        *self.0.lock().expect("not poisoned") = Some((watcher.clone(), pages.clone()));
        Ok(())
    }
}

/// The guest, its unit and its devices.
struct Guest {
    ram: GuestRam,
    unit: Arc<ServedUnit>,
    host: Arc<SimHost>,
    messages: Arc<Messages>,
    pages: Arc<Pages>,
    requesters: [Arc<Requester>; 2],
    devices: [Function; 2],
}

fn sbdf(id: u16) -> Sbdf {
    Sbdf {
        segment: 0,
        bdf: Bdf::from_requester_id(id),
    }
}

/// INVALIDATE_IOTLB_PAGES of the page at [`AT`] in `space`: bits 15:8 of the PASID in the first dword, 7:0 in the second, GN.
fn forget(device: u16, space: u64) -> u128 {
    let [b0, b1, ..] = space.to_le_bytes();
    let (d0, d1) = (u32::from(device) | u32::from(b1) << 16, u32::from(b0) << 16);
    command(4, d0, d1, 0x7000 | 4, 0)
}

/// COMPLETE_PPR_REQUEST for `group` in [`SPACE`].
fn complete(device: u16, response: u32, group: u32) -> u128 {
    command(7, device.into(), 5, 4, response << 12 | group)
}

fn rights(group: u16) -> u32 {
    let rights = Rights::new().with_read(true).with_write(true);
    rights.with_last(true).with_group(group).into_bits()
}

impl Guest {
    /// A unit as after power-on, its devices too.
    fn at_reset() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).expect("a mapping");
        let ram = GuestRam::new(ram);
        let (messages, pages) = (Arc::new(Messages::default()), Arc::new(Pages::default()));
        let requesters = NAMES.map(|name| Arc::new(Requester::new(sbdf(name))));
        let host = SimHost::new(SimParts {
            name: "iommu0".to_owned(),
            at: sbdf(2),
            ram: ram.clone(),
            devices: 2,
            ats: true,
            messages: messages.clone(),
        })
        .expect("memory and an eventfd");
        let wanted = Wanted {
            pasid_bits: 16,
            ats: true,
            ..Wanted::DEFAULT
        };
        let unit = ServedUnit::new(ServedParts {
            name: "iommu0".to_owned(),
            at: sbdf(2),
            mmio: GpaRange::new(Gpa(0xfeb0_4000), 0x4000).expect("valid"),
            features: offer(&[sim::features()], &wanted),
            ram: ram.clone(),
            host: host.clone(),
            protection: pages.clone(),
            functions: requesters.iter().cloned().zip((0..).map(HostDevice)).collect(),
        });
        let unit = unit.unwrap_or_else(|error| panic!("{error}: {}", error.source));
        let device = |index: usize| {
            let (requester, device) = (requesters[index].clone(), HostDevice(index));
            requester.set_bus_master(true);
            let dma = Dma::translated(requester.clone(), ram.clone(), host.translator(device));
            let function = Function::new(requester.clone(), dma, host.agent(device));
            host.add_follower(device, requester, function.function.follower());
            function
        };
        let devices = [device(0), device(1)];
        Self {
            ram,
            unit,
            host,
            messages,
            pages,
            requesters,
            devices,
        }
    }

    /// The unit at work, each device in a domain of its own with services on: each finds 0x7000 of its space 5, the first in
    /// the buffer's first page, the other in its second.
    fn running() -> Self {
        let guest = Self::at_reset();
        guest.start();
        for index in [0, 1] {
            guest.space(index, SPACE, BUFFER + 0x1000 * index as u64);
            guest.entry(index, guest.dte(index));
            let device = &guest.devices[index];
            device.enable();
            device.set(Reg::Space, Space::new().with_pasid(5).into_bits());
        }
        guest
    }

    /// What Linux does with the unit.
    fn start(&self) {
        for (at, value) in [
            (0x00, DEVICE_TABLE | 2),
            (0x08, RING | 8 << 56),
            (0x10, LOG | 8 << 56),
            (0x38, PPR_LOG | 8 << 56),
            (0x170, u64::from(EVENT) << 32 | 0x100),
            (0x178, u64::from(PPR) << 32 | 0x100),
            // The unit, events, commands, page requests, their interrupts, guest tables, x2APIC.
            (0x18, 1 << 51 | 1 << 50 | 0x1f << 12 | 3 << 2 | 1),
        ] {
            self.unit.write(at, &u64::to_le_bytes(value));
        }
    }

    /// An entry with guest tables, page requests allowed, without the bit by which the guest would trust the device: whether
    /// it is, is for the host to say.
    fn dte(&self, index: usize) -> Dte {
        let mut dte = guest_dte(GCR3[index], 7 + u16::try_from(index).expect("0 or 1"));
        dte.host.set_giov(true);
        dte.host.set_ppr(true);
        dte
    }

    /// Write the entry of device `index` where it is called `name` now, upper half first, and have it looked at.
    fn entry(&self, index: usize, dte: Dte) {
        let name = self.requesters[index].sbdf().bdf;
        let at = DEVICE_TABLE + 32 * u64::from(name.requester_id());
        let [a, b, c, d] = dte.into_quadwords();
        for (at, value) in [(at + 16, c), (at + 24, d), (at + 8, b), (at, a)] {
            self.store(at, value);
        }
        self.flush(&[invalidate_device(name)]);
    }

    /// Store as a processor does: whoever watches hears of it.
    fn store(&self, at: u64, value: u64) {
        self.ram.write(Gpa(at), &value.to_le_bytes()).expect("RAM");
        let watched = self.pages.0.lock().expect("not poisoned").clone();
        if let Some((watcher, pages)) = watched
            && pages.contains(&Gpa(at & !0xfff))
        {
            let range = GpaRange::new(Gpa(at), 8).expect("valid");
            watcher.upgrade().expect("the unit").written(range);
        }
    }

    /// Have `AT` of `space` of device `index` lead to `target`.
    fn space(&self, index: usize, space: u64, target: u64) {
        let tables = SPACES + 0x2_0000 * index as u64 + 0x4000 * (space & 7);
        self.store(GCR3[index] + 8 * space, tables | 1);
        for level in 0..3 {
            self.store(tables + 0x1000 * level, (tables + 0x1000 * (level + 1)) | 7);
        }
        self.store(tables + 0x3000 + 8 * (AT >> 12), target | 7);
    }

    fn load(&self, at: u64) -> u64 {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }

    fn dwords(&self, at: u64) -> [u32; 4] {
        self.ram.read_obj(Gpa(at)).expect("RAM")
    }

    /// A 32-bit register of page 3.
    fn running_register(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(0x2000 + at, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_running_register(&self, at: u64, value: u32) {
        self.unit.write(0x2000 + at, &value.to_le_bytes());
    }

    /// Submit `commands`, with a COMPLETION_WAIT that has to answer.
    fn flush(&self, commands: &[u128]) {
        self.store(FLAG, 0);
        let mut tail = self.running_register(0x08);
        for command in commands.iter().copied().chain([wait(FLAG, 7)]) {
            self.ram
                .write(Gpa(RING + u64::from(tail)), &command.to_le_bytes())
                .expect("RAM");
            tail = (tail + 16) % 0x1000;
        }
        self.set_running_register(0x08, tail);
        assert_eq!(self.load(FLAG), 7, "the wait was answered");
    }

    /// Records in the event log since the last time.
    fn events(&self) -> Vec<[u32; 4]> {
        let (mut head, tail) = (self.running_register(0x10), self.running_register(0x18));
        let mut records = Vec::new();
        while head != tail {
            records.push(self.dwords(LOG + u64::from(head)));
            head = (head + 16) % 0x1000;
        }
        self.set_running_register(0x10, head);
        records
    }

    /// Vectors of interrupts since the last time.
    fn interrupts(&self) -> Vec<u8> {
        let sent = std::mem::take(&mut *self.messages.0.lock().expect("not poisoned"));
        sent.iter().map(|message| message.data.to_le_bytes()[0]).collect()
    }

    /// Device `index` writes a word to [`AT`] of its space.
    fn write(&self, index: usize, flags: Flags) -> Status {
        self.devices[index].run(WRITE, flags, 0, AT, 8)
    }

    /// Device `index` asks for a page far away in its space.
    fn ask(&self, index: usize) -> Status {
        self.devices[index].run(REQUEST_PAGE, Flags::PASID, 0x7f00_0000_1000, 0, 0)
    }
}

const REFUSED: Status = Status::WRITE_FAIL.union(Status::DESTINATION_INVALID);

#[test]
fn what_is_kept_without_a_space_is_forgotten_with_space_0() {
    let guest = Guest::running();
    guest.space(0, 0, BUFFER);
    assert_eq!(guest.write(0, Flags::TRANSLATED), Status::WRITE_SUCCESS);
    assert_eq!(
        (guest.devices[0].get(Reg::Kept), guest.load(BUFFER) != 0),
        (1, true)
    );
    guest.space(0, 0, BUFFER + 0x5000);
    // Both name space 0, as Linux 7.3 unmaps.
    guest.flush(&[invalidate_pages(7, 0, AT | GN), forget(NAMES[0], 0)]);
    assert_eq!(guest.devices[0].get(Reg::Kept), 0);
    assert_eq!(guest.write(0, Flags::TRANSLATED), Status::WRITE_SUCCESS);
    assert_ne!(guest.load(BUFFER + 0x5000), 0);
}

#[test]
fn each_process_address_space_is_reached_by_the_guests_own_tables() {
    let guest = Guest::running();
    for flags in BOTH_WAYS {
        for index in [0, 1] {
            let (own, other) = (
                BUFFER + 0x1000 * index as u64,
                BUFFER + 0x1000 * (1 - index as u64),
            );
            guest.store(own, 0);
            guest.store(other, 0);
            assert_eq!(guest.write(index, flags), Status::WRITE_SUCCESS);
            assert!(guest.load(own) != 0 && guest.load(other) == 0, "device {index}");
        }
    }
    // Another space of the same device is another memory.
    guest.space(0, 6, BUFFER + 0x5000);
    guest.devices[0].set(Reg::Space, Space::new().with_pasid(6).into_bits());
    for flags in BOTH_WAYS {
        guest.store(BUFFER + 0x5000, 0);
        assert_eq!(guest.write(0, flags), Status::WRITE_SUCCESS);
        assert_ne!(guest.load(BUFFER + 0x5000), 0);
    }
    assert_eq!((guest.events(), guest.interrupts()), (vec![], vec![]));
}

#[test]
fn a_space_that_is_not_there_is_a_fault_in_the_guests_log_by_its_own_number() {
    let guest = Guest::running();
    guest.devices[1].set(Reg::Space, Space::new().with_pasid(9).into_bits());
    assert_eq!(guest.write(1, Flags::PASID), REFUSED);
    let [[device, second, low, high]] = guest.events()[..] else {
        panic!("one event");
    };
    assert_eq!((device, low, high), (0x0108, 0x7000, 0));
    // IO_PAGE_FAULT, of a guest virtual address, in space 9.
    assert_eq!((second >> 28, second >> 16 & 1, second & 0xffff), (2, 1, 9));
    assert_eq!(guest.interrupts(), [EVENT]);
    // Asked for a translation, it is told that there is none, and nobody else is.
    let (status, _, info) = guest.devices[1].translate(AT, Flags::PASID);
    assert_eq!((status, info & 0x300), (Status::TRANSLATE_SUCCESS, 0));
    assert_eq!(guest.events(), [[0; 4]; 0]);
    // Nor is memory that the guest does not have.
    guest.space(1, 9, 0x4000_0000);
    guest.flush(&[invalidate_device(guest.requesters[1].sbdf().bdf)]);
    for flags in BOTH_WAYS {
        assert_eq!(guest.write(1, flags), REFUSED);
    }
}

#[test]
fn a_page_request_is_in_the_guests_log_and_its_response_comes_back_to_the_device_it_names() {
    let guest = Guest::running();
    for (index, group) in [(1, 7), (0, 5)] {
        guest.devices[index].set(Reg::Rights, rights(group));
        assert_eq!(guest.ask(index), Status::PAGE_REQUEST_SUCCESS);
    }
    assert_eq!(guest.interrupts(), [PPR], "once until the guest has looked");
    assert_eq!(guest.running_register(0x38), 0x20);
    for (at, name, group) in [(0, 0x0108, 7), (0x10, 0x0100, 5)] {
        let [first, second, low, high] = guest.dwords(PPR_LOG + at);
        // Who, in which space; what kind of record it is, and of which group.
        assert_eq!((first & 0xffff, first >> 16), (name, 5));
        assert_eq!((second >> 28, second & 0x1ff), (1, group));
        assert_eq!((low, high), (0x1000, 0x7f00));
    }
    // PPRInt, in Status.
    assert_eq!(guest.running_register(0x20) & 1 << 6, 1 << 6);
    guest.set_running_register(0x20, 1 << 6);
    guest.set_running_register(0x30, 0x20);
    let response = |index: usize| guest.devices[index].get(Reg::Response);
    // The host's name of a device, and nobody's, are none of the guest's.
    guest.flush(&[complete(HOSTS_NAME, 0, 5), complete(0x0110, 0, 5)]);
    assert_eq!((response(0), response(1)), (0, 0));
    guest.flush(&[complete(0x0100, 0, 5)]);
    assert_eq!((response(0), response(1)), (0x8000_0005, 0));
    // Failure: that one may not ask again until it is switched on anew, and the other may.
    guest.flush(&[complete(0x0108, 15, 7)]);
    assert_eq!((response(0), response(1)), (0x8000_0005, 0x8000_f007));
    assert_eq!(guest.ask(1), Status::PAGE_REQUEST_FAIL);
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_SUCCESS);
    assert_eq!(guest.interrupts(), [PPR]);
    assert_eq!(guest.events(), [[0; 4]; 0]);
}

#[test]
fn what_the_guest_does_not_want_to_hear_of_is_answered_by_the_unit() {
    // No page requests of this device: the guest is told, by its own name.
    let guest = Guest::running();
    let mut dte = guest.dte(0);
    dte.host.set_ppr(false);
    guest.entry(0, dte);
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_FAIL);
    let events = guest.events();
    assert_eq!(events.len(), 1);
    // INVALID_PPR_REQUEST.
    assert_eq!((events[0][0] & 0xffff, events[0][1] >> 28), (0x0100, 9));
    assert_eq!(guest.running_register(0x38), 0);
    // The log is off: a failure, and nothing to tell.
    let guest = Guest::running();
    guest
        .unit
        .write(0x18, &(1_u64 << 50 | 0x11 << 12 | 3 << 2 | 1).to_le_bytes());
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_FAIL);
    assert_eq!(guest.events(), [[0; 4]; 0]);
    // The log is full, which is said once; the device fails, and asks again once there is room.
    let guest = Guest::running();
    guest.devices[0].configure(guest.devices[0].capability(crate::function::PRI) + 2, 2);
    let mut taken = 0;
    while guest.ask(0) == Status::PAGE_REQUEST_SUCCESS {
        taken += 1;
        assert!(taken <= 256, "a log of 256");
        guest.flush(&[complete(0x0100, 0, 0)]);
    }
    assert_eq!(taken, 255);
    // PPROverflow.
    assert_eq!(guest.running_register(0x20) & 1 << 5, 1 << 5);
}

#[test]
fn translations_are_kept_until_the_guest_has_the_device_forget_them() {
    let guest = Guest::running();
    let flags = Flags::PASID | Flags::TRANSLATED;
    for index in [0, 1] {
        assert_eq!(guest.write(index, flags), Status::WRITE_SUCCESS);
        assert_eq!(guest.devices[index].get(Reg::Kept), 1);
        guest.space(index, SPACE, BUFFER + 0x8000 + 0x1000 * index as u64);
    }
    let kept = || [0, 1].map(|index| guest.devices[index].get(Reg::Kept));
    let told = || [0, 1].map(|index| guest.devices[index].get(Reg::Invalidations));
    // Of another name, the host's, and of another space.
    guest.flush(&[forget(HOSTS_NAME, SPACE), forget(0x0110, SPACE)]);
    assert_eq!((kept(), told()), ([1, 1], [0, 0]));
    guest.flush(&[forget(0x0100, 6)]);
    assert_eq!((kept(), told()), ([1, 1], [1, 0]));
    guest.flush(&[forget(0x0108, SPACE)]);
    assert_eq!((kept(), told()), ([1, 0], [1, 1]));
    for at in [0x8000, 0x9000] {
        assert_eq!(guest.load(BUFFER + at), 0);
    }
    for index in [0, 1] {
        assert_eq!(guest.write(index, flags), Status::WRITE_SUCCESS);
    }
    assert_eq!(
        guest.load(BUFFER + 0x8000),
        0,
        "the first still goes where it went"
    );
    assert_ne!(guest.load(BUFFER + 0x9000), 0);
    guest.flush(&[forget(0x0100, SPACE)]);
    assert_eq!(guest.write(0, flags), Status::WRITE_SUCCESS);
    assert_ne!(guest.load(BUFFER + 0x8000), 0);
}

/// A device that never answers.
struct Silent;

impl Follower for Silent {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        match *batch {
            [Command::InvalidateIotlb { device, .. }] => Err(NoAnswer { device, index: 0 }),
            _ => Ok(()),
        }
    }
}

#[test]
fn a_device_that_does_not_acknowledge_is_told_to_the_guest_by_its_own_number() {
    let guest = Guest::running();
    let requester = guest.requesters[1].clone();
    guest
        .host
        .add_follower(HostDevice(1), requester, Arc::new(Silent));
    let flags = Flags::PASID | Flags::TRANSLATED;
    for index in [0, 1] {
        assert_eq!(guest.write(index, flags), Status::WRITE_SUCCESS);
    }
    let tail = guest.running_register(0x08);
    guest.flush(&[
        forget(0x0100, SPACE),
        complete(0x0108, 0, 1),
        forget(0x0108, SPACE),
    ]);
    let [[device, second, low, high]] = guest.events()[..] else {
        panic!("one event");
    };
    // IOTLB_INV_TIMEOUT, and where the command stands.
    assert_eq!((device, second >> 28), (0x0108, 7));
    let ring = u32::try_from(RING).expect("low");
    assert_eq!((low, high), (ring + tail + 0x20, 0));
    // Others heard all the same.
    assert_eq!([0, 1].map(|index| guest.devices[index].get(Reg::Kept)), [0, 0]);
}

#[test]
fn a_device_that_is_blocked_reaches_nothing_by_what_it_kept() {
    let guest = Guest::running();
    let flags = Flags::PASID | Flags::TRANSLATED;
    assert_eq!(guest.write(0, flags), Status::WRITE_SUCCESS);
    guest.store(BUFFER, 0);
    // As Linux detaches: valid, and nothing else.
    guest.entry(0, Dte::from_quadwords([1, 0, 0, 0]));
    assert_eq!(guest.devices[0].get(Reg::Kept), 1, "nobody told it");
    for flags in [flags, Flags::PASID, Flags::TRANSLATED, Flags::empty()] {
        assert_eq!(guest.write(0, flags), REFUSED, "{flags:?}");
    }
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_FAIL);
    assert_eq!(
        guest.devices[0].translate(AT, Flags::PASID).0,
        Status::TRANSLATE_FAIL
    );
    assert_eq!(guest.load(BUFFER), 0);
    assert_eq!(guest.write(1, flags), Status::WRITE_SUCCESS, "the other works on");
    // And once it is attached again, it is there again.
    guest.entry(0, guest.dte(0));
    assert_eq!(guest.write(0, Flags::PASID), Status::WRITE_SUCCESS);
    assert_ne!(guest.load(BUFFER), 0);
}

#[test]
fn without_a_space_a_device_passes_through_beside_its_spaces() {
    // Linux's identity domain of a device with PASIDs: guest tables, and none for requests without.
    let guest = Guest::running();
    let mut dte = guest.dte(0);
    dte.host.set_giov(false);
    guest.entry(0, dte);
    let flags = Flags::TRANSLATED;
    for (flags, to) in [(Flags::empty(), 0x50_0000), (flags, 0x50_1000)] {
        let device = &guest.devices[0];
        assert_eq!(device.run(WRITE, flags, 0, to, 8), Status::WRITE_SUCCESS);
        assert_ne!(guest.load(to), 0, "{flags:?}");
        let beyond = device.run(READ, flags, 0x4000_0000, 0, 8);
        assert_eq!(beyond, Status::READ_FAIL | Status::SOURCE_INVALID);
    }
    assert_eq!(guest.write(0, Flags::PASID), Status::WRITE_SUCCESS);
    assert_ne!(guest.load(BUFFER), 0);
}

#[test]
fn a_device_that_is_renumbered_is_known_by_its_new_number() {
    let guest = Guest::running();
    let flags = Flags::PASID | Flags::TRANSLATED;
    guest.requesters[0].renumber(sbdf(0x0118));
    guest.unit.renumbered();
    guest.entry(0, guest.dte(0));
    assert_eq!(guest.write(0, flags), Status::WRITE_SUCCESS);
    guest.devices[0].set(Reg::Rights, rights(3));
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_SUCCESS);
    assert_eq!(guest.dwords(PPR_LOG)[0] & 0xffff, 0x0118);
    guest.flush(&[forget(0x0100, SPACE), complete(0x0100, 0, 3)]);
    let heard = || {
        let device = &guest.devices[0];
        (device.get(Reg::Kept), device.get(Reg::Response))
    };
    assert_eq!(heard(), (1, 0));
    guest.flush(&[forget(0x0118, SPACE), complete(0x0118, 0, 3)]);
    assert_eq!(heard(), (0, 0x8000_0003));
}

#[test]
fn a_reset_leaves_nothing_of_spaces_and_requests() {
    let guest = Guest::running();
    let flags = Flags::PASID | Flags::TRANSLATED;
    assert_eq!(guest.write(0, flags), Status::WRITE_SUCCESS);
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_SUCCESS);
    for device in &guest.devices {
        device.function.reset();
    }
    guest.unit.reset();
    guest.host.reset();
    assert_eq!(
        (guest.running_register(0x38), guest.running_register(0x20)),
        (0, 0)
    );
    let device = &guest.devices[0];
    assert_eq!((device.get(Reg::Kept), device.get(Reg::Response)), (0, 0));
    assert_eq!(guest.write(0, flags), REFUSED, "its services are off");
    // The unit is: the device reaches the guest's memory, and has no translations there.
    device.enable();
    assert_eq!(
        device.run(WRITE, Flags::empty(), 0, 0x50_0000, 8),
        Status::WRITE_SUCCESS
    );
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_FAIL);
    // The next kernel finds its tables where they were.
    guest.interrupts();
    guest.start();
    device.set(Reg::Space, Space::new().with_pasid(5).into_bits());
    guest.entry(0, guest.dte(0));
    assert_eq!(guest.write(0, flags), Status::WRITE_SUCCESS);
    device.set(Reg::Rights, rights(2));
    assert_eq!(guest.ask(0), Status::PAGE_REQUEST_SUCCESS);
    assert_eq!(
        (guest.running_register(0x38), guest.interrupts()),
        (0x10, vec![PPR])
    );
}

#[test]
fn without_translation_services_in_the_machine_a_device_has_none() {
    let guest = Guest::at_reset();
    let host = SimHost::new(SimParts {
        name: "iommu1".to_owned(),
        at: sbdf(2),
        ram: guest.ram.clone(),
        devices: 1,
        ats: false,
        messages: guest.messages.clone(),
    });
    let host = host.expect("memory and an eventfd");
    assert!(host.agent(HostDevice(0)).is_none());
    let requester = Arc::new(Requester::new(sbdf(0x0200)));
    let dma = Dma::translated(
        requester.clone(),
        guest.ram.clone(),
        host.translator(HostDevice(0)),
    );
    let device = Function::new(requester, dma, None);
    let caps = device.get(Reg::Caps);
    assert_eq!(caps >> 29, 0, "{caps:#x}");
    assert_eq!(guest.devices[0].get(Reg::Caps) >> 29, 7);
}
