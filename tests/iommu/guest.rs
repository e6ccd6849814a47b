//! Two guests on one unit: the host lays out their maps and entries, and each has a driver in miniature that fills rings
//! and v2 tables in its own memory.

use ravelin::iommu::amd::Effects;
use ravelin::iommu::amd::features::Wanted;
use ravelin::iommu::amd::spec::dte::Dte;
use ravelin::iommu::amd::spec::registers::Control;
use ravelin::iommu::amd::spec::viommu::{COMMAND_DIRTY, DEVICE_MAPS, DOMAIN_MAPS, MapControl};
use ravelin::iommu::amd::viommu::Owed;
use ravelin::platform::addr::{Bdf, Gpa};

use crate::driver::{Driver, device, guest_dte, host_dte, invalidate_device, other_device, own, pte, wait};

/// What each guest calls its device, and a domain.
pub(crate) const NAME: u16 = 0x0008;
pub(crate) const DOMAIN: u16 = 3;

/// Where a guest's rings and tables are in its memory.
pub(crate) const RING: u64 = 0x1000;
pub(crate) const LOG: u64 = 0x2000;
pub(crate) const FLAG: u64 = 0x3000;
pub(crate) const PPR_LOG: u64 = 0x4000;
pub(crate) const GCR3: u64 = 0x5000;
const TABLES: u64 = 0x6000;
/// A guest's memory ends here.
pub(crate) const END: u64 = 0x4_0000;

/// System memory of the maps: 2 MiB each, for both guests.
pub(crate) const DEVICE_MAP_AT: u64 = 0x140_0000;
pub(crate) const DOMAIN_MAP_AT: u64 = 0x160_0000;
/// And of the dirty status.
pub(crate) const DIRTY_AT: u64 = 0x180_0000;

/// Registers of a guest's page.
pub(crate) mod page {
    pub(crate) const COMMAND_HEAD: u64 = 0x00;
    pub(crate) const COMMAND_TAIL: u64 = 0x08;
    pub(crate) const EVENT_HEAD: u64 = 0x10;
    pub(crate) const EVENT_TAIL: u64 = 0x18;
    pub(crate) const STATUS: u64 = 0x20;
    pub(crate) const PPR_TAIL: u64 = 0x38;
}

/// Registers that control a guest.
pub(crate) mod control {
    pub(crate) const DEVICE_MAP: u64 = 0x00;
    pub(crate) const DOMAIN_MAP: u64 = 0x08;
    pub(crate) const MISC: u64 = 0x10;
    pub(crate) const COMMAND: u64 = 0x20;
    pub(crate) const EVENT: u64 = 0x28;
    pub(crate) const PPR: u64 = 0x30;
    /// Length 256 entries, on, interrupt on.
    pub(crate) const ON: u64 = 1 << 9 | 1 << 8 | 8;
    /// The same for the PPR log, and PprEn.
    pub(crate) const PPR_ON: u64 = 1 << 10 | ON;
}

/// A guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guest {
    pub(crate) id: u16,
    /// Its device, as the host calls it.
    pub(crate) device: Bdf,
    /// Its domain, as the host calls it.
    pub(crate) domain: u16,
    /// By whose entry its memory is found.
    pub(crate) translate: Bdf,
    /// Root of the host table of its memory.
    pub(crate) root: u64,
    /// Its first byte of memory in the system's.
    base: u64,
}

/// The machine: a host with two guests.
pub(crate) struct Machine {
    pub(crate) host: Driver,
    /// Root of the private address space.
    pub(crate) private: u64,
    pub(crate) a: Guest,
    pub(crate) b: Guest,
}

impl Machine {
    /// Guests whose maps name one device and one domain each, both by the same names; no ring runs yet.
    pub(crate) fn at_reset() -> Self {
        let wanted = Wanted {
            virtualizable: true,
            ..Wanted::EVERYTHING
        };
        let mut host = Driver::with(wanted).started();
        let on = Control::new()
            .with_vcmd_en(true)
            .with_viommu_en(true)
            .with_gst_buffer_trp_mode(true)
            .with_gcr3_trp_mode(true);
        host.enable(on.with_ppr_en(true));
        // The private address space, as far as the maps of guests 4 and 5 go.
        let private = host.attach(own(), 1);
        host.map(private, 4, DEVICE_MAPS + (4 << 20), 2, pte(DEVICE_MAP_AT));
        host.map(private, 4, DOMAIN_MAPS + (4 << 19), 2, pte(DOMAIN_MAP_AT));
        host.map(private, 4, COMMAND_DIRTY, 1, pte(DIRTY_AT));
        let mut guest = |id: u16, device| {
            let translate = Bdf::from_requester_id(0x4800 + id);
            let base = 0x100_0000 + u64::from(id) * 0x4_0000;
            let root = host.attach(translate, 0x10 * id);
            for page in (0..END).step_by(0x1000) {
                host.map(root, 4, page, 1, pte(base + page));
            }
            let domain = 0x10 * id + 1;
            Guest {
                id,
                device,
                domain,
                translate,
                root,
                base,
            }
        };
        let (a, b) = (guest(4, device()), guest(5, other_device()));
        let machine = Self { host, private, a, b };
        for guest in [&a, &b] {
            machine.control(
                guest,
                control::MISC,
                u64::from(guest.translate.requester_id()) << 16,
            );
            machine.map_device(guest, NAME, guest.device.requester_id(), true);
            machine.map_domain(guest, DOMAIN, guest.domain, true);
            machine.host.set_dte(guest.device, machine.nested(guest));
        }
        let (a, b) = (a.device, b.device);
        machine.host.submit(&[invalidate_device(a), invalidate_device(b)]);
        machine
    }

    /// Rings on, and one page of each device's addresses mapped, 1000h to 10000h.
    pub(crate) fn running() -> Self {
        let machine = Self::at_reset();
        for guest in [&machine.a, &machine.b] {
            machine.control(guest, control::COMMAND, RING | control::ON);
            machine.control(guest, control::EVENT, LOG | control::ON);
            machine.put(guest, GCR3, TABLES | 1);
            for level in 0..3 {
                let table = TABLES + level * 0x1000;
                machine.put(guest, table, (table + 0x1000) | 7);
            }
            machine.map(guest, 0x1_0000);
        }
        machine
    }

    /// The entry of the device of `guest`: v2 over v1.
    pub(crate) fn nested(&self, guest: &Guest) -> Dte {
        let mut dte = guest_dte(GCR3, guest.domain);
        let host = host_dte(guest.root, 4, guest.domain).host;
        dte.host = host
            .with_gv(true)
            .with_giov(true)
            .with_ppr(true)
            .with_gcr3_14_12(dte.host.gcr3_14_12());
        dte.attribute = dte
            .attribute
            .with_vimu_en(true)
            .with_guest_id(guest.id)
            .with_guest_device_id(NAME);
        dte
    }

    /// Lead page 1000h of the guest's device to `to`, in the guest's table; 0 to nothing.
    pub(crate) fn map(&self, guest: &Guest, to: u64) {
        self.put(guest, TABLES + 0x3008, if to == 0 { 0 } else { to | 7 });
    }

    /// Where a write of the guest's device to page 1000h goes in the guest's memory.
    pub(crate) fn target(&self, guest: &Guest) -> Option<u64> {
        let found = self.host.target(&crate::driver::write(guest.device, 0x1000));
        found.map(|at| at - guest.base)
    }

    /// The host writes a register that controls `guest`.
    pub(crate) fn control(&self, guest: &Guest, at: u64, value: u64) {
        self.carry_out(
            self.host
                .unit
                .vf_control_write(guest.id, at, &value.to_le_bytes()),
        );
    }

    pub(crate) fn map_device(&self, guest: &Guest, name: u16, host: u16, valid: bool) {
        self.control(guest, control::DEVICE_MAP, entry(name, host, valid));
    }

    pub(crate) fn map_domain(&self, guest: &Guest, name: u16, host: u16, valid: bool) {
        self.control(guest, control::DOMAIN_MAP, entry(name, host, valid));
    }

    /// What guests are owed stays so until somebody asks.
    fn carry_out(&self, effects: Effects) {
        self.host.carry_out(effects);
    }

    /// `guest` writes a register of its page.
    pub(crate) fn write(&self, guest: &Guest, at: u64, value: u32) {
        self.carry_out(self.host.unit.vf_write(guest.id, at, &value.to_le_bytes()));
    }

    /// `guest` reads a register of its page.
    pub(crate) fn read(&self, guest: &Guest, at: u64) -> u32 {
        let mut data = [0; 4];
        self.host.unit.vf_read(guest.id, at, &mut data);
        u32::from_le_bytes(data)
    }

    /// What `guest` is owed; what others are is forgotten.
    pub(crate) fn owed(&self, guest: &Guest) -> Owed {
        self.host.unit.take_owed().remove(&guest.id).unwrap_or_default()
    }

    /// Write a quadword of the guest's memory.
    pub(crate) fn put(&self, guest: &Guest, at: u64, value: u64) {
        self.host.put(guest.base + at, value);
    }

    /// Read a quadword of the guest's memory.
    pub(crate) fn get(&self, guest: &Guest, at: u64) -> u64 {
        self.host.get(guest.base + at)
    }

    /// `guest` puts commands into its ring and rings its doorbell once.
    pub(crate) fn submit(&self, guest: &Guest, commands: &[u128]) {
        let tail = u64::from(self.read(guest, page::COMMAND_TAIL)) / 16;
        for (index, command) in (tail..).zip(commands) {
            let at = guest.base + RING + index % 256 * 16;
            self.host.ram.write(Gpa(at), &command.to_le_bytes()).expect("RAM");
        }
        let tail = (tail + commands.len() as u64) % 256 * 16;
        self.write(
            guest,
            page::COMMAND_TAIL,
            u32::try_from(tail).expect("in the ring"),
        );
    }

    /// `guest` submits `commands` and a COMPLETION_WAIT that has to answer.
    pub(crate) fn flush(&self, guest: &Guest, commands: &[u128]) {
        self.put(guest, FLAG, 0);
        let all: Vec<_> = commands.iter().copied().chain([wait(FLAG, 7)]).collect();
        self.submit(guest, &all);
        while self.owed(guest).more_commands {
            self.carry_out(self.host.unit.run_guest_commands(guest.id));
        }
        assert_eq!(self.get(guest, FLAG), 7, "the wait was answered");
    }

    /// Records in the guest's event log since the last time.
    pub(crate) fn events(&self, guest: &Guest) -> Vec<[u32; 4]> {
        let (mut head, tail) = (
            self.read(guest, page::EVENT_HEAD),
            self.read(guest, page::EVENT_TAIL),
        );
        let mut records = Vec::new();
        while head != tail {
            records.push(self.host.dwords(guest.base + LOG + u64::from(head)));
            head = (head + 16) % 0x1000;
        }
        self.write(guest, page::EVENT_HEAD, head);
        records
    }

    /// The first record of the guest's PPR log.
    pub(crate) fn page_request(&self, guest: &Guest) -> [u32; 4] {
        self.host.dwords(guest.base + PPR_LOG)
    }
}

/// The order to write an entry of a map.
fn entry(name: u16, host: u16, valid: bool) -> u64 {
    MapControl::new()
        .with_guest(name)
        .with_host(host)
        .with_valid(valid)
        .with_write(true)
        .into_bits()
}
