//! A byte string as three guests of one unit and the host between them. Every access to memory, every record, every
//! invalidation and every register is held against the rule of who owns what. The fuzz target runs the same.
//!
//! The host is either a kernel, which keeps its books, or anybody: then it writes what the input says, and what is left
//! to hold is that nothing panics, leaves memory or goes on for ever.

#[path = "crowd/memory.rs"]
mod memory;

use std::sync::{Arc, Mutex, PoisonError};

use ravelin::iommu::amd::commands::Command;
use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::ppr::PageRequest;
use ravelin::iommu::amd::processor::{Follower, NoAnswer};
use ravelin::iommu::amd::request::{Access, Pasid, Request};
use ravelin::iommu::amd::spec::dte::{Attribute, Dte};
use ravelin::iommu::amd::spec::viommu::MapControl;
use ravelin::iommu::amd::{Effects, Unit};
use ravelin::platform::addr::{Bdf, Iova};

use memory::{
    Acting, DEVICE_TABLE, DEVICES, DOMAINS, FIRST_DEVICE, FIRST_NAME, FIRST_TRANSLATE, GCR3, GUEST_LEN,
    GUEST_RAM, GUESTS, HOST_LOG, HOST_RING, Image, LOG, Memory, OWN, PPR_LOG, RING, TABLES, Touched, Whose,
    base, blocked, host_domain, host_table, nth, number, page_of,
};

/// Accesses to memory that one step may take: each of its calls reads a guest's maps by the page, or carries out some
/// thousand commands, walks and all.
const MOST_TOUCHES: usize = 500_000;
/// Calls for what a doorbell left. Who wants more rings again.
const MOST_CALLS: usize = 4;

/// What the unit did to its caches, and has everybody do to theirs.
#[derive(Default)]
struct Heard(Mutex<Vec<Command>>);

impl Follower for Heard {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(batch);
        Ok(())
    }
}

/// The input, and zeros behind it.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self
            .0
            .split_first()
            .map_or((0, self.0), |(first, rest)| (*first, rest));
        self.0 = rest;
        first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// An address, mostly in a guest's memory.
    fn address(&mut self) -> u64 {
        match self.byte() {
            0..0x08 => self.word(),
            0x08..0x20 => (self.word() & 0x1f_ffff) << 12,
            page => u64::from(page % 0x24) << 12,
        }
    }
}

/// Where a guest's page has registers, and where it has none.
const PAGE: [u64; 12] = [
    0x00, 0x08, 0x08, 0x08, 0x10, 0x18, 0x20, 0x30, 0x38, 0x28, 0x40, 0xff8,
];
/// What the host says of a guest's rings: command, event, PPR.
const RINGS: [u64; 3] = [0x20, 0x28, 0x30];
/// Registers of the unit.
const OFFSETS: [u64; 16] = [
    0x00, 0x08, 0x10, 0x18, 0x18, 0x20, 0x28, 0x38, 0x100, 0x190, 0x2000, 0x2008, 0x2010, 0x2018, 0x2020,
    0x2030,
];

/// IommuEn, EventLogEn, EventIntEn, CmdBufEn, PprEn, GTEn, GAEn, vCmdEn, vIommuEn, GCR3TRPMode, GstBufferTRPMode.
const CONTROL: u64 =
    1 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 52 | 1 << 53 | 1 << 58 | 1 << 60;

/// The machine, and the books of its host.
struct Crowd {
    memory: Memory,
    unit: Unit<Memory>,
    heard: Arc<Heard>,
    /// By device: whose it is and by what name.
    owners: [Option<(usize, u16)>; DEVICES],
    /// By guest: what each of its domains is called by the host.
    domains: [[Option<u16>; DOMAINS as usize]; GUESTS],
}

impl Crowd {
    fn new() -> Self {
        let image = Image::get();
        let memory = Memory(Arc::new(Mutex::new(Touched {
            words: image.words.clone(),
            ..Touched::default()
        })));
        let wanted = Wanted {
            virtualizable: true,
            ..Wanted::EVERYTHING
        };
        let own = Bdf::from_requester_id(OWN);
        let unit = Unit::new(own, Features::offer(wanted), memory.clone());
        let heard = Arc::new(Heard::default());
        unit.add_follower(heard.clone());
        let crowd = Self {
            memory,
            unit,
            heard,
            owners: [None; DEVICES],
            domains: [[None; DOMAINS as usize]; GUESTS],
        };
        for (at, value) in [
            (0x00, DEVICE_TABLE),
            (0x08, HOST_RING | 8 << 56),
            (0x10, HOST_LOG | 8 << 56),
            (0x18, CONTROL),
        ] {
            let _ = crowd.unit.mmio_write(at, &value.to_le_bytes());
        }
        for guest in 0..GUESTS {
            let translate = u64::from(nth(FIRST_TRANSLATE, guest));
            crowd.control(guest, 0x10, translate << 16);
            crowd.control(guest, 0x20, RING | 0x308);
            crowd.control(guest, 0x28, LOG | 0x308);
            crowd.control(guest, 0x30, PPR_LOG << 4 | 0x708);
        }
        crowd
    }

    /// The host writes a register that controls `guest`.
    fn control(&self, guest: usize, at: u64, value: u64) {
        let effects = self
            .unit
            .vf_control_write(number(guest), at, &value.to_le_bytes());
        self.go_on(effects);
    }

    /// Have what guests' doorbells left carried out, for a while.
    fn go_on(&self, effects: Effects) {
        let mut more = effects.guests;
        for _ in 0..MOST_CALLS {
            if !more {
                return;
            }
            more = false;
            for (guest, owed) in self.unit.take_owed() {
                more |= owed.more_commands && self.unit.run_guest_commands(guest).guests;
            }
        }
    }

    /// The host submits commands.
    fn submit(&self, commands: &[u128]) {
        let read = || {
            let mut data = [0; 8];
            self.unit.mmio_read(0x2008, &mut data);
            u64::from_le_bytes(data)
        };
        let mut tail = read();
        for command in commands {
            let [low, high] = [*command, *command >> 64].map(|half| half & u128::from(u64::MAX));
            self.memory
                .put(HOST_RING + tail % 0x1000, u64::try_from(low).expect("a half"));
            self.memory.put(
                HOST_RING + tail % 0x1000 + 8,
                u64::try_from(high).expect("a half"),
            );
            tail = (tail + 16) % 0x1000;
        }
        let effects = self.unit.mmio_write(0x2008, &tail.to_le_bytes());
        self.go_on(effects);
    }

    /// Give `device` an entry.
    fn set_entry(&self, device: usize, dte: &Dte) {
        let number = nth(FIRST_DEVICE, device);
        for (at, word) in (0..).step_by(8).zip(dte.into_quadwords()) {
            self.memory.put(DEVICE_TABLE + u64::from(number) * 32 + at, word);
        }
        self.submit(&[u128::from(number) | 2 << 60]);
    }

    fn map(&self, guest: usize, at: u64, name: u16, host: Option<u16>) {
        let map = MapControl::new()
            .with_guest(name)
            .with_host(host.unwrap_or(0))
            .with_valid(host.is_some())
            .with_write(true);
        self.control(guest, at, map.into_bits());
    }

    /// Take `device` from whom it is, and give it to `guest` by the name `name`, in its domain `domain`.
    fn assign(&mut self, device: usize, to: Option<(usize, u16, u16)>) {
        if let Some((before, name)) = self.owners[device].take() {
            self.set_entry(device, &blocked());
            self.checked(true, Some(before), |crowd| crowd.map(before, 0, name, None));
        }
        let Some((guest, name, domain)) = to else { return };
        let host_number = nth(FIRST_DEVICE, device);
        if self.owners.contains(&Some((guest, name))) {
            return;
        }
        self.owners[device] = Some((guest, name));
        self.checked(true, Some(guest), |crowd| {
            let host = host_domain(guest, domain);
            let mut dte = host_table(Image::get().roots[guest], host).with_gcr3_root(GCR3);
            dte.host = dte.host.with_gv(true).with_giov(true).with_ppr(true);
            dte.attribute = Attribute::new()
                .with_vimu_en(true)
                .with_guest_id(number(guest))
                .with_guest_device_id(name);
            crowd.map(guest, 0, name, Some(host_number));
            // An entry of a domain that was another's before.
            let flush = u128::from(host) << 32 | 3 << 60 | 0x7fff_ffff_ffff_f003_u128 << 64;
            crowd.submit(&[flush]);
            crowd.set_entry(device, &dte);
        });
    }

    /// Registers of every guest's page.
    fn pages(&self) -> [[u64; 8]; GUESTS] {
        std::array::from_fn(|guest| {
            std::array::from_fn(|index| {
                let mut data = [0; 8];
                self.unit.vf_read(number(guest), index as u64 * 8, &mut data);
                u64::from_le_bytes(data)
            })
        })
    }

    /// Do `f`, which concerns `guest` alone, and hold what the unit did against the rule.
    fn checked<T>(&mut self, host: bool, guest: Option<usize>, f: impl FnOnce(&mut Self) -> T) -> T {
        {
            let mut memory = self.memory.lock();
            memory.touches.clear();
            memory.records.clear();
            memory.count = 0;
        }
        self.heard
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        drop(self.unit.take_owed());
        let before = self.pages();
        let outcome = f(self);
        let acting = Acting { host, guest };
        let after = self.pages();
        for (other, (before, after)) in before.iter().zip(&after).enumerate() {
            assert!(
                guest == Some(other) || before == after,
                "{acting:?} changed registers of {other}"
            );
        }
        for (other, owed) in self.unit.take_owed() {
            let concerned = guest.is_some_and(|guest| number(guest) == other);
            assert!(concerned, "{acting:?} owes {owed:?} to guest {other}");
        }
        let memory = self.memory.lock();
        assert!(memory.count <= MOST_TOUCHES, "{} accesses", memory.count);
        for (page, write) in &memory.touches {
            let whose = Image::get().whose[*page];
            assert!(
                acting.may(whose, *write),
                "{acting:?} touched page {page:#x}, {whose:?}, write {write}"
            );
        }
        drop(memory);
        if let Some(guest) = guest
            && !host
        {
            self.check_invalidations(guest);
        }
        outcome
    }

    /// What was invalidated is the guest's.
    fn check_invalidations(&self, guest: usize) {
        let is_device = |device: Bdf| {
            let index = device.requester_id().wrapping_sub(FIRST_DEVICE);
            let owner = self.owners.get(usize::from(index)).copied().flatten();
            owner.is_some_and(|(owner, _)| owner == guest)
        };
        for command in self.heard.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let owned = match command {
                Command::InvalidateDevice { device }
                | Command::InvalidateIotlb { device, .. }
                | Command::InvalidateInterrupts { device }
                | Command::Prefetch { device, .. }
                | Command::CompletePageRequest { device, .. } => is_device(*device),
                Command::InvalidatePages { domain, .. } => self.domains[guest].contains(&Some(*domain)),
                Command::InvalidateAll | Command::CompletionWait { .. } => false,
            };
            assert!(owned, "guest {guest} had {command:?} carried out");
        }
    }

    /// Records about what `guest` did, or about its device, are by its names in its log, or by the host's in the host's.
    fn check_records(&self, guest: usize, device: Option<(usize, u16)>) {
        for (page, record) in &self.memory.lock().records {
            let about = u16::try_from(record[0] & 0xffff).expect("16 bits");
            let concerned = u16::try_from(record[1] & 0xffff).expect("16 bits");
            let right = match (Image::get().whose[*page], record[1] >> 28) {
                (Whose::HostLog, 0xb) => concerned == number(guest),
                (Whose::HostLog, 0xc) => about == number(guest),
                (Whose::HostLog, _) => device.is_some_and(|(device, _)| about == nth(FIRST_DEVICE, device)),
                (_, code) => match device {
                    Some((_, name)) => about == name,
                    None => (5..=7).contains(&code) && about == 0,
                },
            };
            assert!(right, "{record:x?} for guest {guest}, {device:x?}");
        }
    }

    /// The host reads its log.
    fn read_log(&self) {
        let mut tail = [0; 8];
        self.unit.mmio_read(0x2018, &mut tail);
        let _ = self.unit.mmio_write(0x2010, &tail);
        let _ = self.unit.mmio_write(0x2020, &[0xff; 8]);
    }
}

/// A command of a guest's: mostly one that exists, about something that could be its own.
fn command(input: &mut Input<'_>, guest: usize) -> u128 {
    let kind = input.byte();
    let (low, high) = (input.word(), input.word());
    let name = u64::from(nth(FIRST_NAME, input.below(DEVICES)));
    let domain = u64::from(input.byte()) % u64::from(DOMAINS);
    let opcode = u64::from(1 + kind % 8) << 60;
    let (low, high) = match kind >> 4 {
        0 => (low, high),
        1 => (low & !(0xf << 60) | opcode, high),
        2 => (1 << 60 | input.address() & !7 | 1 | low & 2, high),
        3 => (2 << 60 | low & 0x7f, 0),
        // The numbers of the host's.
        4 => (2 << 60 | u64::from(nth(FIRST_DEVICE, guest + 1)), 0),
        5 => (3 << 60 | (0x80 | low & 0x3f) << 32, high & 0xffff_f007),
        6 | 7 => (3 << 60 | domain << 32, high & 0xffff_f007),
        8 => (4 << 60 | name, high & 0xffff_f005),
        9 => (5 << 60 | name, 0),
        10 => (6 << 60 | (low & 0xff) << 24 | name, high & 0xffff_f005),
        11 => (7 << 60 | name, high),
        12 => (8 << 60, 0),
        13 => (
            u64::from(9 + kind % 2) << 60 | low & 0x1000_ffff | (low >> 32 & 3) << 32,
            high,
        ),
        _ => (opcode | name | domain << 32, high & 0xffff_f007),
    };
    u128::from(low) | u128::from(high) << 64
}

/// Carry out what guests and their host in `input` do.
pub(crate) fn run(input: &[u8]) {
    let mut input = Input(input);
    let wild = input.byte() % 4 == 3;
    let mut crowd = Crowd::new();
    for (device, guest) in (0..DEVICES).zip([0, 1, 2, 0]) {
        let name = nth(FIRST_NAME, device / GUESTS);
        let host = Some(host_domain(guest, 1));
        crowd.domains[guest][1] = host;
        crowd.checked(true, Some(guest), |crowd| crowd.map(guest, 8, 1, host));
        crowd.assign(device, Some((guest, name, 1)));
    }
    // No input is to run for long.
    for _ in 0..256 {
        if input.0.is_empty() {
            return;
        }
        let kind = input.byte();
        let guest = usize::from(kind >> 4) % GUESTS;
        match kind % 16 {
            0..10 if wild => wild_guest_step(&crowd, &mut input, kind % 16, guest),
            0..10 => guest_step(&mut crowd, &mut input, kind % 16, guest),
            _ if wild => wild_host_step(&crowd, &mut input, guest),
            step => host_step(&mut crowd, &mut input, step, guest),
        }
        crowd.read_log();
    }
}

/// What `guest` or a device of its does.
fn guest_step(crowd: &mut Crowd, input: &mut Input<'_>, step: u8, guest: usize) {
    if step < 8 {
        crowd.checked(false, Some(guest), |crowd| {
            guest_writes(crowd, input, step, guest)
        });
        return crowd.check_records(guest, None);
    }
    let device = input.below(DEVICES);
    let Some((owner, name)) = crowd.owners[device] else {
        let reached = crowd.checked(false, None, |crowd| device_asks(crowd, input, step, device));
        return assert_eq!(reached, None, "device {device} belongs to nobody");
    };
    let reached = crowd.checked(false, Some(owner), |crowd| {
        device_asks(crowd, input, step, device)
    });
    if let Some(target) = reached {
        let whose = Image::get().whose.get(page_of(target)).copied();
        assert_eq!(
            whose,
            Some(Whose::Ram(owner)),
            "device {device} reaches {target:#x}"
        );
    }
    crowd.check_records(owner, Some((device, name)));
}

/// The guest writes its memory or its page.
fn guest_writes(crowd: &Crowd, input: &mut Input<'_>, step: u8, guest: usize) {
    let unit = &crowd.unit;
    let id = number(guest);
    match step {
        0..=1 => {
            let at = PAGE[input.below(PAGE.len())];
            let which = input.byte();
            let value = (input.word() & 0x000f_ffff_0000_fff0).to_le_bytes();
            let len = [8, 4, 4, 2, 1, 3, 8, 4][usize::from(which % 8)];
            let effects = unit.vf_write(id, at + u64::from(which >> 6 & 4), &value[..len]);
            crowd.go_on(effects);
        }
        2..=5 => {
            let mut tail = [0; 4];
            unit.vf_read(id, 8, &mut tail);
            let mut tail = u32::from_le_bytes(tail);
            for _ in 0..1 + input.below(4) {
                let at = base(guest) + RING + u64::from(tail % 0x1000);
                let command = command(input, guest);
                for (at, half) in [(at, command), (at + 8, command >> 64)] {
                    let half = u64::try_from(half & u128::from(u64::MAX)).expect("a half");
                    crowd.memory.put(at, half);
                }
                tail = (tail + 16) % 0x1000;
            }
            let effects = unit.vf_write(id, 8, &tail.to_le_bytes());
            crowd.go_on(effects);
        }
        6 => {
            // Mostly an entry of a table, which leads somewhere in the guest's memory or behind it.
            let (at, value) = (input.word(), input.word());
            let shaped = value & 0x2_fff0 | 7;
            let table = TABLES + (at & 0x3fff);
            let (at, value) = if at >> 62 == 0 {
                (at, value)
            } else {
                (table, shaped)
            };
            crowd.memory.put(base(guest) + ((at % GUEST_LEN) & !7), value);
        }
        _ => {
            let effects = unit.run_guest_commands(id);
            crowd.go_on(effects);
        }
    }
}

/// A device sends a request; where it leads.
fn device_asks(crowd: &Crowd, input: &mut Input<'_>, step: u8, device: usize) -> Option<u64> {
    let requester = Bdf::from_requester_id(nth(FIRST_DEVICE, device));
    let which = input.byte();
    let at = match which & 3 {
        0 => input.word(),
        1 => 0x1000 | u64::from(input.byte()) << 10,
        // The page that is mapped at first.
        _ => 0x1000 | u64::from(input.byte()),
    };
    let pasid = (which & 4 != 0)
        .then(|| Pasid::new((which >> 4).into()))
        .flatten();
    let access = Access::new(which & 8 != 0, which & 8 == 0);
    if step == 9 && which & 0x80 != 0 {
        let request = PageRequest {
            device: requester,
            pasid,
            at: Iova(at & !0xfff),
            access,
            execute: false,
            privileged: false,
            group: which.into(),
            last: true,
        };
        let (_, effects) = crowd.unit.page_request(&request);
        crowd.go_on(effects);
        return None;
    }
    let request = Request {
        requester,
        pasid,
        privileged: which & 0x40 != 0,
        at: Iova(at),
        access,
    };
    let bus = crowd.unit.begin();
    match bus.translate(&request) {
        Ok(found) => Some(found.target.0),
        Err(abort) => {
            drop(bus);
            crowd.go_on(abort.effects);
            None
        }
    }
}

/// What a host that keeps its books does.
fn host_step(crowd: &mut Crowd, input: &mut Input<'_>, step: u8, guest: usize) {
    match step {
        10 => {
            // The guest chose where its ring is to be.
            let which = input.below(RINGS.len());
            let (at, flags) = (input.address() & 0x000f_ffff_ffff_f000, u64::from(input.byte()));
            let flags = flags & 0xf | (flags >> 4) << 8;
            let value = if which == 2 {
                at << 4 | flags
            } else {
                at | flags & 0x30f
            };
            crowd.checked(false, Some(guest), |crowd| {
                crowd.control(guest, RINGS[which], value)
            });
        }
        11 => {
            let device = input.below(DEVICES);
            let name = nth(FIRST_NAME, input.below(DEVICES));
            let domain = u16::from(input.byte()) % DOMAINS;
            let given = input.byte() & 7 != 0;
            crowd.assign(device, given.then_some((guest, name, domain)));
        }
        12 => {
            let name = u16::from(input.byte()) % DOMAINS;
            let host = (input.byte() & 3 != 0).then(|| host_domain(guest, name));
            crowd.domains[guest][usize::from(name)] = host;
            crowd.checked(true, Some(guest), |crowd| crowd.map(guest, 8, name, host));
        }
        13 => {
            let (low, high) = (u128::from(input.word()), u128::from(input.word()));
            let record = low & !(0xffff << 32 | 0xf << 60) | u128::from(number(guest)) << 32;
            crowd.checked(true, Some(guest), |crowd| {
                crowd.submit(&[record | 9 << 60 | high << 64])
            });
        }
        14 => {
            let reset = u128::from(number(guest)) | 10 << 60;
            crowd.checked(true, Some(guest), |crowd| crowd.submit(&[reset]));
        }
        _ => {
            // Guests are not served for a while.
            let bits = [1 << 52, 1 << 53, 1 << 60][input.below(3)];
            for value in [CONTROL & !bits, CONTROL] {
                let effects = crowd.unit.mmio_write(0x18, &value.to_le_bytes());
                crowd.go_on(effects);
            }
        }
    }
}

/// The same as [`guest_step`], where nothing says who owns what.
fn wild_guest_step(crowd: &Crowd, input: &mut Input<'_>, step: u8, guest: usize) {
    if step < 8 {
        guest_writes(crowd, input, step, guest);
    } else {
        let device = input.below(DEVICES);
        let _anywhere = device_asks(crowd, input, step, device);
    }
    let mut memory = crowd.memory.lock();
    assert!(memory.count <= MOST_TOUCHES, "{} accesses", memory.count);
    memory.count = 0;
}

/// What anybody in the host's place does.
fn wild_host_step(crowd: &Crowd, input: &mut Input<'_>, guest: usize) {
    let which = input.byte();
    let value = input.word();
    let id = if which & 0x80 == 0 {
        number(guest)
    } else {
        u16::from(which) << 9
    };
    let effects = match which % 4 {
        0 => {
            let at = OFFSETS[input.below(OFFSETS.len())];
            let value = if at == 0x18 {
                CONTROL ^ 1 << (value & 63)
            } else {
                value
            };
            crowd.unit.mmio_write(at, &value.to_le_bytes())
        }
        1 => crowd
            .unit
            .vf_control_write(id, u64::from(which >> 2 & 7) * 8, &value.to_le_bytes()),
        2 => {
            let at = (input.word() % GUEST_RAM) & !7;
            crowd.memory.put(at, value);
            // Forget what was cached of it.
            crowd.unit.mmio_write(0x28, &[0; 8])
        }
        _ => {
            let low = u128::from(value) & !(0xf << 60) | u128::from(9 + which % 2) << 60;
            crowd.submit(&[low, u128::from(input.word()) | 1 << 60]);
            Effects::default()
        }
    };
    crowd.go_on(effects);
    let mut more = effects.more_commands;
    for _ in 0..MOST_CALLS {
        more = more && crowd.unit.run_commands().more_commands;
    }
    let mut memory = crowd.memory.lock();
    assert!(memory.count <= 8 * MOST_TOUCHES, "{} accesses", memory.count);
    memory.count = 0;
    memory.touches.clear();
    memory.records.clear();
}
