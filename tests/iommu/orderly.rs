//! A byte string as a guest that keeps to the rules: devices, domains and process spaces, tables of both formats and one
//! over the other, changed in any order and invalidated as drivers do, and not once more. What the unit has cached stays
//! cached, so that what is stale shows against the model. The fuzz target runs the same.

use ravelin::iommu::amd::dma::Abort;
use ravelin::iommu::amd::events::Event;
use ravelin::iommu::amd::remap::Remapped;
use ravelin::iommu::amd::request::{Access, Pasid, Request, Translation};
use ravelin::iommu::amd::spec::dte::{Dte, Host, Interrupt};
use ravelin::platform::addr::{Bdf, Gpa, Iova};
use ravelin::platform::memory::GuestRam;

use crate::driver::{
    Driver, EVERYTHING, GN, INTERRUPT_TABLE, INVALIDATE_ALL, PDE, RAM, S, command, guest_dte, host_dte,
    invalidate_device, invalidate_pages, pde, pte, reg,
};
use crate::model::{Interrupted, Message, Outcome, Question, Registers, Words, answer, interrupt};

/// Guest RAM, for the model.
pub(crate) struct Ram(pub(crate) GuestRam);

impl Words for Ram {
    fn load(&mut self, at: u64) -> Option<u64> {
        self.0.read_obj(Gpa(at)).ok()
    }

    fn store(&mut self, at: u64, value: u64) {
        self.0
            .write_obj(Gpa(at), &value)
            .expect("it was loaded from there");
    }
}

/// The model's question as the unit is asked it.
pub(crate) fn request(q: &Question) -> Request {
    Request {
        requester: Bdf::from_requester_id(q.device),
        pasid: q.pasid.and_then(Pasid::new),
        privileged: q.privileged,
        at: Iova(q.at),
        access: Access::new(q.read, q.write),
    }
}

/// A record as dwords.
pub(crate) fn dwords(event: &Event) -> [u32; 4] {
    let bytes = event.record().to_le_bytes();
    std::array::from_fn(|at| u32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().expect("four")))
}

/// What the unit makes of a request, in the model's terms.
pub(crate) fn in_terms_of_the_model(answer: Result<Translation, Box<Abort>>) -> Outcome {
    match answer {
        Ok(found) => Outcome::Passes {
            target: found.target.0,
            read: found.allowed.read,
            write: found.allowed.write,
        },
        Err(abort) => Outcome::Aborts(dwords(&abort.event.expect("memory requests say why"))),
    }
}

/// What it makes of a message, likewise.
pub(crate) fn remapped_in_terms_of_the_model(answer: Result<Remapped, Box<Abort>>) -> Interrupted {
    match answer {
        Ok(Remapped::Unchanged) => Interrupted::Passes,
        Ok(Remapped::MemoryWrite) => Interrupted::MemoryWrite,
        Ok(Remapped::To(to)) => Interrupted::To {
            destination: to.destination,
            logical: to.logical,
            arbitrated: to.arbitrated,
            vector: to.vector,
            level: to.level,
            asserted: to.asserted,
        },
        Err(abort) => Interrupted::Lost(abort.event.as_ref().map(dwords)),
    }
}

/// What decides about requests.
pub(crate) fn registers(driver: &Driver) -> Registers {
    Registers {
        control: driver.read(reg::CONTROL),
        exclusion_base: driver.read(reg::EXCLUSION_BASE),
        exclusion_limit: driver.read(reg::EXCLUSION_LIMIT),
        device_table: std::array::from_fn(|segment| {
            let offset = [0, 0x100, 0x108, 0x110, 0x118, 0x120, 0x128, 0x130][segment];
            driver.read(offset)
        }),
    }
}

/// Devices under test, by requester ID; the third shares nothing with the second but its place in small caches.
const DEVICES: [u16; 4] = [5, 0x219, 0x100, 0xfff8];
/// Process spaces that tables are made for.
const SPACES: [u32; 3] = [0, 5, 0x1ff];
const HOSTS: usize = 2;
const GUESTS: usize = 2;
const ROOTS: usize = 3;
/// Windows of 2 MiB in each table.
const WINDOWS: usize = 4;
/// Where host tables have theirs; below, RAM is where it is, so that guests' tables are found through them.
const HOST_WINDOWS: u64 = 0x4000_0000;
/// Steps of one run: tables that were replaced are not used again.
const MOST_STEPS: usize = 160;

/// What is asked for, byte by byte.
struct Input<'a> {
    bytes: &'a [u8],
    used: usize,
}

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let byte = self.bytes.get(self.used).copied().unwrap_or(0);
        self.used += 1;
        byte
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn is_over(&self) -> bool {
        self.used >= self.bytes.len()
    }
}

struct World {
    driver: Driver,
    /// Roots of host tables, and whether each window maps anything.
    hosts: [(u64, [bool; WINDOWS]); HOSTS],
    /// Roots of processes' tables, likewise.
    roots: [(u64, [bool; WINDOWS]); ROOTS],
    gcr3s: [u64; GUESTS],
    /// Which of the roots each space has.
    spaces: [[Option<usize>; SPACES.len()]; GUESTS],
    /// Grows with each change, and is in what is mapped.
    salt: u64,
    /// No invalidation is ever sent.
    lazy: bool,
}

/// Two devices in a domain have the same tables: everything cached is by domain.
const fn domain_of_host(host: usize) -> u16 {
    [10, 11][host]
}

const fn domain_of_guest(guest: usize) -> u16 {
    [20, 21][guest]
}

const fn domain_of_nested(guest: usize, host: usize) -> u16 {
    [[30, 31], [32, 33]][guest][host]
}

impl World {
    fn new(lazy: bool) -> Self {
        let mut driver = Driver::running();
        let mut table = || driver.table();
        let hosts = std::array::from_fn(|_| (table(), [false; WINDOWS]));
        let roots = std::array::from_fn(|_| (table(), [false; WINDOWS]));
        let gcr3s = std::array::from_fn(|_| table());
        for (host, _) in hosts {
            for at in (0..RAM).step_by(2 << 20) {
                driver.map(host, 4, at, 2, pte(at));
            }
        }
        Self {
            driver,
            hosts,
            roots,
            gcr3s,
            spaces: [[None; SPACES.len()]; GUESTS],
            salt: 0,
            lazy,
        }
    }

    /// Have the unit forget what `commands` say.
    fn flush(&mut self, commands: &[u128]) {
        if !self.lazy && !commands.is_empty() {
            self.driver.flush(commands);
        }
    }

    /// Give device number `device` another entry.
    fn change_entry(&mut self, device: usize, input: &mut Input<'_>) {
        let (form, noise) = (input.byte(), input.byte());
        let (host, guest) = (usize::from(form >> 3 & 1), usize::from(form >> 4 & 1));
        let root = self.hosts[host].0;
        let mut dte = match form % 8 {
            0 => Dte {
                host: Host::new(),
                ..Dte::default()
            },
            1 => Dte {
                host: Host::new().with_v(true).with_tv(true),
                ..Dte::default()
            },
            2 => host_dte(0, 0, 1),
            3 | 4 => host_dte(root, 4, domain_of_host(host)),
            5 | 6 => guest_dte(self.gcr3s[guest], domain_of_guest(guest)),
            _ => {
                let mut dte = guest_dte(self.gcr3s[guest], domain_of_nested(guest, host));
                dte.host.set_mode(4);
                dte.host.set_root(root >> 12);
                dte
            }
        };
        if form % 8 > 4 {
            dte.host.set_giov(form & 0x20 != 0);
        }
        if form % 8 > 1 {
            dte.host.set_ir(noise & 3 != 1);
            dte.host.set_iw(noise & 3 != 2);
            dte.host.set_had(noise >> 2 & 3);
        }
        dte.interrupt = Interrupt::new()
            .with_iv(noise & 0x10 == 0)
            .with_int_ctl(if noise & 0x20 == 0 { 2 } else { noise >> 6 })
            .with_table_length(4)
            .with_root((INTERRUPT_TABLE + 0x100 * device as u64) >> 6)
            .with_nmi_pass(noise & 0x40 == 0);
        let device = Bdf::from_requester_id(DEVICES[device]);
        self.driver.set_dte(device, dte);
        self.flush(&[invalidate_device(device)]);
    }

    /// Put something else into a window of a host table. A page that was not there needs no command.
    fn change_host(&mut self, host: usize, window: usize, input: &mut Input<'_>) {
        let (what, how) = (input.byte(), input.byte());
        self.salt += 1;
        let (root, there) = &mut self.hosts[host];
        let start = HOST_WINDOWS + ((window as u64) << 21);
        let target = 0x100_0000_0000 + (self.salt << 30) + start;
        let rights = pte(0) & !(3 << 61) | rights_in(what) << 61;
        let before = std::mem::replace(&mut there[window], what % 8 != 0);
        self.driver.map(*root, 4, start, 2, 0);
        match what % 8 {
            0 => {}
            1 | 2 => self.driver.map(*root, 4, start, 2, rights | target),
            coded => {
                // Pages of 4 KiB, or coded ones of up to 1 MiB.
                let shift = 12 + 2 * u32::from(coded - 3);
                let (code, next) = if shift == 12 {
                    (0, 0)
                } else {
                    ((1 << (shift - 1)) - 0x1000, 7 << 9)
                };
                let entry = |page: u64| rights | (target + (page << 12 >> shift << shift)) | code | next;
                let table = filled(&mut self.driver, entry);
                self.driver.map(*root, 4, start, 2, pde(table, 1));
            }
        }
        if !before && how & 0x80 != 0 {
            return;
        }
        // A table over this one is another domain.
        let nested = (0..GUESTS).map(|guest| domain_of_nested(guest, host));
        let domains = std::iter::once(domain_of_host(host)).chain(nested);
        let range = [
            start | 0xf_f000 | S,
            HOST_WINDOWS | 0x3f_f000 | S | PDE,
            EVERYTHING | S | PDE,
        ];
        let commands: Vec<_> = match range.get(usize::from(how % 4)) {
            Some(range) => domains
                .map(|domain| invalidate_pages(domain, 0, *range))
                .collect(),
            None => vec![INVALIDATE_ALL],
        };
        self.flush(&commands);
    }

    /// The same in a process's table.
    fn change_guest(&mut self, root: usize, window: usize, input: &mut Input<'_>) {
        let (what, how) = (input.byte(), input.byte());
        self.salt += 1;
        let (table, there) = &mut self.roots[root];
        let start = (window as u64) << 21;
        let target = HOST_WINDOWS + (((window as u64 + self.salt) % WINDOWS as u64) << 21);
        let flags = 1 | rights_in(what) << 1;
        let before = std::mem::replace(&mut there[window], what % 4 != 0);
        self.driver.map_guest(*table, 4, start, 2, 0);
        match what % 4 {
            0 => {}
            1 => self.driver.map_guest(*table, 4, start, 2, target | flags | 0x80),
            _ => {
                let salt = self.salt;
                let entry = |page| target | ((page + salt) % 512) << 12 | flags;
                let pages = filled(&mut self.driver, entry);
                self.driver.map_guest(*table, 4, start, 2, pages | 7);
            }
        }
        if !before && how & 0x80 != 0 {
            return;
        }
        let range =
            [start | 0xf_f000 | S, 0x3f_f000 | S | PDE, EVERYTHING | S | PDE][usize::from(how >> 2 & 3) % 3];
        let mut commands = Vec::new();
        for (guest, spaces) in self.spaces.iter().enumerate() {
            let own = |(index, _): (usize, &Option<usize>)| SPACES[index];
            let using = || {
                spaces
                    .iter()
                    .enumerate()
                    .filter(|(_, of)| **of == Some(root))
                    .map(own)
            };
            for domain in domains_of_guest(guest) {
                match how % 4 {
                    0 | 1 => {
                        commands.extend(using().map(|pasid| invalidate_pages(domain, pasid, range | GN)))
                    }
                    // As Linux 6.1 to 6.7 does.
                    2 if using().count() > 0 => commands.push(invalidate_pages(domain, 0, range)),
                    2 => {}
                    _ => commands = vec![INVALIDATE_ALL],
                }
            }
        }
        self.flush(&commands);
    }

    /// Give a space another table, or none.
    fn change_space(&mut self, guest: usize, space: usize, input: &mut Input<'_>) {
        let (root, how) = (input.below(ROOTS + 1), input.byte());
        let root = (root < ROOTS).then_some(root);
        let entry = root.map_or(0, |root| self.roots[root].0 | 1);
        self.driver
            .put(self.gcr3s[guest] + u64::from(SPACES[space]) * 8, entry);
        let before = std::mem::replace(&mut self.spaces[guest][space], root);
        if before.is_none() && how & 0x80 != 0 {
            return;
        }
        let everything = EVERYTHING | S | PDE;
        let commands: Vec<_> = match how % 3 {
            0 => domains_of_guest(guest)
                .map(|domain| invalidate_pages(domain, SPACES[space], everything | GN))
                .to_vec(),
            1 => domains_of_guest(guest)
                .map(|domain| invalidate_pages(domain, 0, everything))
                .to_vec(),
            _ => vec![INVALIDATE_ALL],
        };
        self.flush(&commands);
    }

    /// Change a remapping entry of device number `device`.
    fn change_interrupt(&mut self, device: usize, input: &mut Input<'_>) {
        let (index, low, high) = (input.below(16), input.byte(), input.byte());
        let at = INTERRUPT_TABLE + 0x100 * device as u64 + 16 * index as u64;
        let reserved = if high & 0xc0 == 0xc0 {
            1 << (8 + high % 48)
        } else {
            0
        };
        self.driver
            .put(at, u64::from(low & 0x7f) | u64::from(high) << 8 | 1 << 17);
        self.driver.put(at + 8, u64::from(high) | reserved);
        self.flush(&[command(5, DEVICES[device].into(), 0, 0, 0)]);
    }

    /// What differs from the model, if anything does.
    fn step(&mut self, input: &mut Input<'_>) -> Option<String> {
        let (kind, which) = (input.byte(), input.below(DEVICES.len()));
        match kind % 16 {
            0 => self.change_entry(which, input),
            1 | 2 => self.change_host(which % HOSTS, usize::from(kind >> 4) % WINDOWS, input),
            3 | 4 => self.change_guest(which % ROOTS, usize::from(kind >> 4) % WINDOWS, input),
            5 => self.change_space(which % GUESTS, usize::from(kind >> 4) % SPACES.len(), input),
            6 => self.change_interrupt(which, input),
            7 => {
                let (space, at) = (input.below(SPACES.len() + 1), place(input));
                let named = SPACES.get(space).copied();
                let low =
                    u32::try_from(at & 0xffff_f000).expect("a half") | if named.is_some() { 4 } else { 0 };
                let device = u32::from(DEVICES[which]);
                // What is walked for is kept, and nothing more.
                self.driver
                    .flush(&[command(6, 8 << 24 | device, named.unwrap_or(0), low, 0)]);
            }
            8 => return self.compare_message(which, input),
            _ => return self.compare(which, input),
        }
        None
    }

    fn compare(&self, device: usize, input: &mut Input<'_>) -> Option<String> {
        let (space, access) = (input.below(SPACES.len() + 2), input.byte());
        let q = Question {
            device: DEVICES[device],
            pasid: SPACES.get(space).copied(),
            privileged: access & 4 != 0,
            at: place(input),
            read: access & 1 != 0,
            write: access & 2 != 0,
        };
        let expected = answer(&mut Ram(self.driver.ram.clone()), &registers(&self.driver), &q);
        let found = in_terms_of_the_model(self.driver.on_bus(|bus| bus.translate(&request(&q))));
        (found != expected).then(|| format!("{q:x?}: {found:x?} and not {expected:x?}"))
    }

    fn compare_message(&self, device: usize, input: &mut Input<'_>) -> Option<String> {
        let (index, mode) = (input.byte(), input.byte());
        let message = Message {
            device: DEVICES[device],
            address: 0xfee0_0000 | u64::from(mode >> 4) << 2,
            data: u32::from(index % 18)
                | if mode & 0xc == 0xc {
                    u32::from(mode & 7) << 8
                } else {
                    0
                },
        };
        let expected = interrupt(
            &mut Ram(self.driver.ram.clone()),
            &registers(&self.driver),
            &message,
        );
        let device = Bdf::from_requester_id(message.device);
        let found = remapped_in_terms_of_the_model(self.driver.msi(device, message.address, message.data));
        (found != expected).then(|| format!("{message:x?}: {found:x?} and not {expected:x?}"))
    }
}

/// Two bits of permissions, all of them mostly.
fn rights_in(what: u8) -> u64 {
    if what & 0xc0 == 0 {
        (what >> 4 & 3).into()
    } else {
        3
    }
}

/// A new table with an entry for each of its pages.
fn filled(driver: &mut Driver, entry: impl Fn(u64) -> u64) -> u64 {
    let table = driver.table();
    let entries: [u64; 512] = std::array::from_fn(|page| entry(page as u64));
    driver.ram.write_obj(Gpa(table), &entries).expect("RAM");
    table
}

const fn domains_of_guest(guest: usize) -> [u16; 1 + HOSTS] {
    [
        domain_of_guest(guest),
        domain_of_nested(guest, 0),
        domain_of_nested(guest, 1),
    ]
}

/// An address in a window of some table, or in RAM.
fn place(input: &mut Input<'_>) -> u64 {
    let (window, page, offset) = (input.byte(), input.byte(), input.byte());
    let base = if window & 0x40 == 0 { 0 } else { HOST_WINDOWS };
    let start = base + ((u64::from(window) % WINDOWS as u64) << 21);
    start + (u64::from(page) << 13) + (u64::from(offset) << 4)
}

/// Carry out what the guest in `input` does; the first answer that is not the model's. A `lazy` one invalidates nothing.
pub(crate) fn first_difference(input: &[u8], lazy: bool) -> Option<String> {
    let mut world = World::new(lazy);
    let mut input = Input {
        bytes: input,
        used: 0,
    };
    // Something to begin with, so that short inputs reach tables.
    for (device, form) in [0x03_u8, 0x25, 0x2f, 0x1e].into_iter().enumerate() {
        let bytes = [form, 0];
        world.change_entry(
            device,
            &mut Input {
                bytes: &bytes,
                used: 0,
            },
        );
    }
    for space in 0..SPACES.len() {
        for guest in 0..GUESTS {
            let bytes = [u8::try_from(space).expect("few"), 0];
            world.change_space(
                guest,
                space,
                &mut Input {
                    bytes: &bytes,
                    used: 0,
                },
            );
        }
    }
    let mut steps = 0;
    while !input.is_over() && steps < MOST_STEPS {
        if let Some(difference) = world.step(&mut input) {
            return Some(format!("step {steps}: {difference}"));
        }
        steps += 1;
    }
    None
}

/// The same of a guest that keeps to the rules.
pub(crate) fn run(input: &[u8]) {
    if let Some(difference) = first_difference(input, false) {
        panic!("{difference}");
    }
}
