//! A second translator, slow and obvious, to compare the unit with: no cache, no types, one step after the
//! other as the manual's tables list them. It shares no code with the unit.

#![expect(
    clippy::cast_possible_truncation,
    reason = "bit fields of a few bits, and halves that are meant"
)]

/// Memory as quadwords.
pub(crate) trait Words {
    /// The quadword at `at`; `None` where there is no memory.
    fn load(&mut self, at: u64) -> Option<u64>;
    /// Change it.
    fn store(&mut self, at: u64, value: u64);
}

/// The registers that decide about translations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Registers {
    pub(crate) control: u64,
    pub(crate) exclusion_base: u64,
    pub(crate) exclusion_limit: u64,
    pub(crate) device_table: [u64; 8],
}

/// A memory request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) device: u16,
    pub(crate) pasid: Option<u32>,
    pub(crate) privileged: bool,
    pub(crate) at: u64,
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Passes {
        target: u64,
        read: bool,
        write: bool,
    },
    /// Aborted, with the dwords of the record.
    Aborts([u32; 4]),
}

/// A message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    pub(crate) device: u16,
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Interrupted {
    Passes,
    MemoryWrite,
    To {
        destination: u32,
        logical: bool,
        arbitrated: bool,
        vector: u8,
        level: bool,
        asserted: bool,
    },
    /// With the dwords of the record, if there is one.
    Lost(Option<[u32; 4]>),
}

/// A page request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) device: u16,
    pub(crate) pasid: Option<u32>,
    pub(crate) at: u64,
    pub(crate) group: u16,
    pub(crate) read: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wished {
    /// Nobody takes any.
    Fails,
    /// This device may send none.
    Invalid,
    /// Those two quadwords are for the log, if that runs and has room.
    Logged([u64; 2]),
}

const FRAME: u64 = 0x000f_ffff_ffff_f000;

fn bit(value: u64, at: u32) -> bool {
    value >> at & 1 == 1
}

fn field(value: u64, high: u32, low: u32) -> u64 {
    value << (63 - high) >> (63 - high + low)
}

/// How a walk fails.
enum Failure {
    NotPresent,
    Permission,
    User,
    Level,
    Reserved,
    Memory(u64),
    /// In the host table below a guest's, at this guest physical address.
    Below(Box<Failure>, u64),
}

struct Found {
    target: u64,
    read: bool,
    write: bool,
}

/// Flags of the second dword.
const GN: u32 = 1 << 16;
const I: u32 = 1 << 19;
const US: u32 = 1 << 18;
const PR: u32 = 1 << 20;
const RW: u32 = 1 << 21;
const PE: u32 = 1 << 22;
const RZ: u32 = 1 << 23;
const TARGET_ABORT: u32 = 2 << 25;

fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

/// Ask the manual.
pub(crate) fn answer(memory: &mut dyn Words, registers: &Registers, q: &Question) -> Outcome {
    let pass = |read, write| Outcome::Passes {
        target: q.at,
        read,
        write,
    };
    if !bit(registers.control, 0) {
        return pass(true, true);
    }
    let rw = if q.write { RW } else { 0 };
    let device = u32::from(q.device);
    let who = |domain: u32| match q.pasid {
        None => (device, domain),
        Some(pasid) => (device | (pasid >> 16) << 16, GN | pasid & 0xffff),
    };
    let abort = |code: u32, flags: u32, tag: (u32, u32), address: u64| {
        Outcome::Aborts([tag.0, code << 28 | flags | tag.1, low(address), high(address)])
    };
    if q.pasid.is_none() && (0xfee0_0000..=0xfeef_ffff).contains(&q.at) {
        let kind: u32 = if q.read { 0 } else { 6 };
        return abort(8, kind << 25, who(0), q.at);
    }
    let dte = match entry(memory, registers, q.device) {
        Ok(dte) => dte,
        Err(Entryless::Beyond) => return abort(2, rw, who(0), q.at),
        Err(Entryless::Memory(at)) => return abort(3, rw | TARGET_ABORT, (device, 0), at),
    };
    // 2.2.2, Table 8: what the entry says.
    if !bit(dte[0], 0) {
        return pass(true, true);
    }
    let domain = field(dte[1], 15, 0) as u32;
    if field(dte[0], 6, 2) != 0 || bit(dte[0], 63) {
        return abort(1, rw | RZ, who(0), q.at & !3);
    }
    if bit(registers.exclusion_base, 0) && (bit(registers.exclusion_base, 1) || bit(dte[1], 39)) {
        let first = registers.exclusion_base & FRAME;
        let last = registers.exclusion_limit & FRAME | 0xfff;
        if first <= q.at && q.at <= last {
            return pass(true, true);
        }
    }
    if !bit(dte[0], 1) {
        return abort(2, rw, who(domain), q.at);
    }
    let has_guest = bit(dte[0], 55) && bit(registers.control, 16);
    if q.pasid.is_some() && !has_guest {
        return abort(2, rw, who(domain), q.at);
    }
    let (ir, iw) = (bit(dte[0], 61), bit(dte[0], 62));
    if q.read && !ir || q.write && !iw {
        return abort(2, rw | PR | PE, who(domain), q.at);
    }
    let mode = field(dte[0], 11, 9);
    if mode == 7 {
        return abort(1, rw, who(0), q.at & !3);
    }
    let host = (mode != 0).then(|| Host {
        root: dte[0] & FRAME,
        mode,
        accessed: bit(dte[0], 7),
        dirty: field(dte[0], 8, 7) == 3,
    });
    let by_guest = has_guest && (q.pasid.is_some() || bit(dte[0], 54));
    let walked = if by_guest {
        if field(dte[0], 57, 56) == 3 || field(dte[2], 55, 54) > 1 {
            return abort(1, rw, who(0), q.at & !3);
        }
        by_guest_table(memory, registers, &dte, host.as_ref(), q)
    } else if let Some(host) = &host {
        host.walk(memory, q.at, q.read, q.write)
    } else {
        return pass(ir, iw);
    };
    let failure = match walked {
        Ok(found) => {
            return Outcome::Passes {
                target: found.target,
                read: found.read && ir,
                write: found.write && iw,
            };
        }
        Err(failure) => failure,
    };
    let guest_space = match q.pasid {
        Some(_) => who(0),
        None => (device, GN),
    };
    let (failure, tag, address) = match failure {
        Failure::Below(inner, at) => (*inner, (device, domain), at),
        other if by_guest => (other, guest_space, q.at),
        other => (other, (device, domain), q.at),
    };
    match failure {
        Failure::NotPresent | Failure::Below(..) => abort(2, rw, tag, address),
        Failure::Permission => abort(2, rw | PR | PE, tag, address),
        Failure::User => abort(2, rw | PR | PE | US, tag, address),
        Failure::Level => abort(2, rw | PR, tag, address),
        Failure::Reserved => abort(2, rw | PR | RZ, tag, address),
        Failure::Memory(at) => abort(4, rw | TARGET_ABORT, tag, at),
    }
}

/// How a device has no entry.
enum Entryless {
    Beyond,
    Memory(u64),
}

/// 2.2.1: which entry, and what it holds.
fn entry(memory: &mut dyn Words, registers: &Registers, device: u16) -> Result<[u64; 4], Entryless> {
    let segments = field(registers.control, 36, 34) as u32;
    let number = u64::from(device);
    let segment = number >> (16 - segments);
    let index = number - (segment << (16 - segments));
    let base = registers.device_table[segment as usize];
    if index >= (field(base, 8, 0) + 1) * 128 {
        return Err(Entryless::Beyond);
    }
    let at = (base & FRAME) + index * 32;
    let mut dte = [0; 4];
    for (number, word) in (0..).zip(dte.iter_mut()) {
        *word = memory.load(at + number * 8).ok_or(Entryless::Memory(at))?;
    }
    Ok(dte)
}

/// Ask the manual what becomes of a message: 2.2.5.
pub(crate) fn interrupt(memory: &mut dyn Words, registers: &Registers, m: &Message) -> Interrupted {
    if !(0xfee0_0000..=0xfeef_ffff).contains(&m.address) {
        return Interrupted::MemoryWrite;
    }
    if !bit(registers.control, 0) {
        return Interrupted::Passes;
    }
    let record = |code: u32, flags: u32, domain: u32, address: u64| {
        let second = code << 28 | flags | I | domain;
        Interrupted::Lost(Some([u32::from(m.device), second, low(address), high(address)]))
    };
    let dte = match entry(memory, registers, m.device) {
        Ok(dte) => dte,
        Err(Entryless::Beyond) => return record(2, 0, 0, m.address),
        Err(Entryless::Memory(at)) => return record(3, TARGET_ABORT, 0, at),
    };
    if !bit(dte[2], 0) {
        return Interrupted::Passes;
    }
    let domain = field(dte[1], 15, 0) as u32;
    let illegal = |flags| record(1, flags, 0, m.address & !3);
    let fault = |flags| {
        if bit(dte[2], 5) {
            Interrupted::Lost(None)
        } else {
            record(2, flags, domain, m.address)
        }
    };
    if field(dte[2], 53, 52) != 0 || field(dte[3], 14, 0) != 0 || field(dte[3], 53, 48) != 0 {
        return illegal(RZ);
    }
    let all_index = field(registers.control, 44, 43) == 1 && bit(m.address, 2);
    let passes = match m.data >> 8 & 7 {
        _ if all_index => None,
        0 | 1 => None,
        4 => Some(58),
        5 => Some(56),
        7 => Some(57),
        _ => return Interrupted::Lost(None),
    };
    match passes {
        Some(at) if bit(dte[2], at) => return Interrupted::Passes,
        Some(_) => return fault(0),
        None => {}
    }
    match field(dte[2], 61, 60) {
        0 => {
            // An invalid request, of type 5, and no interrupt's bit in its record.
            let second = 8 << 28 | 5 << 25;
            return Interrupted::Lost(Some([
                u32::from(m.device),
                second,
                low(m.address),
                high(m.address),
            ]));
        }
        1 => return Interrupted::Passes,
        3 => return illegal(RZ),
        _ => {}
    }
    let length = field(dte[2], 4, 1);
    if length > 11 {
        return illegal(0);
    }
    let index = u64::from(m.data & 0x7ff);
    if index >= 1 << length {
        return fault(0);
    }
    let table = field(dte[2], 51, 6) << 6;
    let unreadable = |at| record(4, TARGET_ABORT, domain, at);
    let (lower, upper) = if bit(registers.control, 17) {
        let at = table + index * 16;
        match (memory.load(at), memory.load(at + 8)) {
            (Some(lower), Some(upper)) => (lower, Some(upper)),
            _ => return unreadable(at),
        }
    } else {
        let at = table + index * 4;
        match memory.load(at & !7) {
            Some(both) if at & 4 == 0 => (both & 0xffff_ffff, None),
            Some(both) => (both >> 32, None),
            None => return unreadable(at),
        }
    };
    if !bit(lower, 0) {
        return fault(0);
    }
    let reserved = match upper {
        Some(upper) => field(lower, 63, 32) != 0 || field(upper, 55, 8) != 0,
        None => field(lower, 31, 24) != 0,
    };
    let kind = field(lower, 4, 2);
    if reserved || bit(lower, 7) || kind > 1 {
        return if bit(lower, 1) {
            Interrupted::Lost(None)
        } else {
            fault(PR | RZ)
        };
    }
    let (destination, vector) = match upper {
        Some(upper) if bit(registers.control, 50) => (
            field(upper, 63, 56) << 24 | field(lower, 31, 8),
            field(upper, 7, 0),
        ),
        Some(upper) => (field(lower, 15, 8), field(upper, 7, 0)),
        None => (field(lower, 15, 8), field(lower, 23, 16)),
    };
    Interrupted::To {
        destination: low(destination),
        logical: bit(lower, 6),
        arbitrated: kind == 1,
        vector: vector as u8,
        level: m.data >> 15 & 1 == 1,
        asserted: m.data >> 14 & 1 == 1,
    }
}

/// Ask the manual what becomes of a page request of one page, the last of its group: 2.6.
pub(crate) fn page_request(memory: &mut dyn Words, registers: &Registers, w: &Wish) -> Wished {
    if !bit(registers.control, 0) || !bit(registers.control, 15) {
        return Wished::Fails;
    }
    let Ok(dte) = entry(memory, registers, w.device) else {
        return Wished::Invalid;
    };
    let has_guest = bit(dte[0], 55) && bit(registers.control, 16);
    if !bit(dte[0], 0) || !bit(dte[0], 1) || !bit(dte[0], 52) || w.pasid.is_some() && !has_guest {
        return Wished::Invalid;
    }
    let pasid = u64::from(w.pasid.unwrap_or(0));
    let flag = |set: bool, bit: u64| if set { bit << 48 } else { 0 };
    let flags = flag(w.read, 0x004) | flag(true, 0x040) | flag(w.pasid.is_some(), 0x100);
    let group = u64::from(w.group & 0x1ff) << 32 | 1 << 41;
    Wished::Logged([
        u64::from(w.device) | (pasid & 0xffff) << 16 | group | (pasid >> 16) << 42 | flags | 1 << 60,
        w.at & !0xfff,
    ])
}

struct Host {
    root: u64,
    mode: u64,
    accessed: bool,
    dirty: bool,
}

impl Host {
    fn walk(&self, memory: &mut dyn Words, at: u64, read: bool, write: bool) -> Result<Found, Failure> {
        // Offset bits below each level: 12, 21, 30, 39, 48, 57.
        let below = |level: u64| 12 + 9 * (level as u32 - 1);
        let mut level = self.mode;
        if level < 6 && at >> below(level + 1) != 0 {
            return Err(Failure::NotPresent);
        }
        let mut table = self.root;
        let (mut may_read, mut may_write) = (true, true);
        let mut used = Vec::new();
        let target = loop {
            let slot = table + (at >> below(level)) % 512 * 8;
            let entry = memory.load(slot).ok_or(Failure::Memory(slot))?;
            if !bit(entry, 0) {
                return Err(Failure::NotPresent);
            }
            let next = field(entry, 11, 9);
            let is_page = next == 0 || next == 7;
            if field(entry, 56, 52) != 0 || !is_page && field(entry, 60, 57) != 0 {
                return Err(Failure::Reserved);
            }
            may_read &= bit(entry, 61);
            may_write &= bit(entry, 62);
            if read && !may_read || write && !may_write {
                return Err(Failure::Permission);
            }
            used.push((slot, entry, is_page));
            if !is_page {
                if next >= level {
                    return Err(Failure::Level);
                }
                for skipped in next + 1..level {
                    if at >> below(skipped) & 511 != 0 {
                        return Err(Failure::Level);
                    }
                }
                table = entry & FRAME;
                level = next;
                continue;
            }
            if level == 6 {
                return Err(Failure::Level);
            }
            let mut size_bits = below(level);
            if next == 7 {
                let clear = (12..52).find(|b| !bit(entry, *b)).ok_or(Failure::Level)?;
                size_bits = clear + 1;
                if size_bits <= below(level) || size_bits >= below(level + 1) {
                    return Err(Failure::Level);
                }
            }
            let size = 1_u64 << size_bits;
            break (entry & FRAME) / size * size + at % size;
        };
        for (slot, entry, is_page) in used {
            let accessed = if self.accessed { 1 << 5 } else { 0 };
            let dirty = if self.dirty && write && is_page { 1 << 6 } else { 0 };
            memory.store(slot, entry | accessed | dirty);
        }
        Ok(Found {
            target,
            read: may_read,
            write: may_write,
        })
    }
}

/// Where a guest physical address lies.
fn system(
    memory: &mut dyn Words,
    host: Option<&Host>,
    at: u64,
    read: bool,
    write: bool,
) -> Result<Found, Failure> {
    match host {
        None => Ok(Found {
            target: at,
            read: true,
            write: true,
        }),
        Some(host) => host
            .walk(memory, at, read, write)
            .map_err(|failure| Failure::Below(Box::new(failure), at)),
    }
}

fn by_guest_table(
    memory: &mut dyn Words,
    registers: &Registers,
    dte: &[u64; 4],
    host: Option<&Host>,
    q: &Question,
) -> Result<Found, Failure> {
    let pasid = u64::from(q.pasid.unwrap_or(0));
    let glx = field(dte[0], 57, 56);
    let mut table = field(dte[0], 60, 58) << 12 | field(dte[1], 31, 16) << 15 | field(dte[1], 63, 43) << 31;
    if pasid >= 1 << (9 * (glx + 1)) {
        return Err(Failure::NotPresent);
    }
    let mut through_host = bit(registers.control, 58);
    for level in (0..=glx).rev() {
        let slot = table + (pasid >> (9 * level)) % 512 * 8;
        let below = if through_host { host } else { None };
        let slot = system(memory, below, slot, true, false)?.target;
        let entry = memory.load(slot).ok_or(Failure::Memory(slot))?;
        if !bit(entry, 0) {
            return Err(Failure::NotPresent);
        }
        table = entry & FRAME;
        through_host = true;
    }
    let levels = 4 + field(dte[2], 55, 54);
    let width = 12 + 9 * levels as u32;
    let sign = bit(q.at, width - 1);
    let upper_ones = q.at >> (width - 1) == u64::MAX >> (width - 1);
    let fits = q.at >> width == 0;
    let canonical = if q.pasid.is_some() {
        fits && !sign || upper_ones
    } else {
        fits
    };
    if !canonical {
        return Err(Failure::NotPresent);
    }
    let user = q.pasid.is_some() && !q.privileged;
    let (mut may_write, mut all_user) = (true, true);
    let mut used = Vec::new();
    let mut level = levels;
    let gpa = loop {
        let below = 12 + 9 * (level as u32 - 1);
        let guest_slot = table + (q.at >> below) % 512 * 8;
        let slot = system(memory, host, guest_slot, true, false)?.target;
        let entry = memory.load(slot).ok_or(Failure::Memory(slot))?;
        if !bit(entry, 0) {
            return Err(Failure::NotPresent);
        }
        may_write &= bit(entry, 1);
        all_user &= bit(entry, 2);
        if bit(entry, 7) && level > 3 {
            return Err(Failure::Reserved);
        }
        if user && !all_user {
            return Err(Failure::User);
        }
        if q.write && !may_write {
            return Err(Failure::Permission);
        }
        used.push((guest_slot, entry));
        if level == 1 || bit(entry, 7) {
            let size = 1_u64 << below;
            break (entry & FRAME) / size * size + q.at % size;
        }
        table = entry & FRAME;
        level -= 1;
    };
    let last = used.len() - 1;
    for (number, (guest_slot, entry)) in used.into_iter().enumerate() {
        let accessed = if bit(registers.control, 54) { 0 } else { 1 << 5 };
        let dirty = if bit(registers.control, 48) || !q.write || number != last {
            0
        } else {
            1 << 6
        };
        if entry | accessed | dirty != entry {
            let slot = system(memory, host, guest_slot, true, true)?.target;
            memory.store(slot, entry | accessed | dirty);
        }
    }
    let found = system(memory, host, gpa, q.read, q.write)?;
    Ok(Found {
        target: found.target,
        read: found.read,
        write: found.write && may_write,
    })
}
