//! A byte string as a hostile guest: registers, memory and DMA together, every request compared with the
//! model, every message and every page request too. The fuzz target runs the same.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use ravelin::iommu::amd::features::{Features, Wanted};
use ravelin::iommu::amd::memory::{SystemMemory, Unreachable};
use ravelin::iommu::amd::ppr::{Answer, PageRequest};
use ravelin::iommu::amd::request::{Access, Pasid};
use ravelin::iommu::amd::{Effects, Unit};
use ravelin::platform::addr::{Bdf, Gpa, Iova};
use ravelin::platform::msi::MsiMessage;

use crate::model::{
    Message, Outcome, Question, Registers, Wish, Wished, Words, answer, interrupt, page_request,
};
use crate::orderly::{self, in_terms_of_the_model, remapped_in_terms_of_the_model, request};
use crate::page::Page;

/// Memory whose every quadword is the next of the input when it is first read, and keeps its value: nested
/// pointers are explored without anybody building tables. Addresses from `END` on do not answer.
#[derive(Default)]
struct Dreamt {
    input: Vec<u8>,
    used: usize,
    words: HashMap<u64, u64>,
    /// What the unit exchanged since the last look, as it stands now.
    exchanged: BTreeMap<u64, u64>,
}

/// Memory ends here, so that some pointers lead nowhere.
const END: u64 = 1 << 50;
/// Pointers are folded into this much, most of the time, so that they meet.
const FOLD: u64 = 0xff_f000;

impl Dreamt {
    fn byte(&mut self) -> u8 {
        let byte = self.input.get(self.used).copied().unwrap_or(0);
        self.used += 1;
        byte
    }

    fn quadword(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    fn at(&mut self, at: u64) -> Option<u64> {
        if at >= END {
            return None;
        }
        if let Some(word) = self.words.get(&at) {
            return Some(*word);
        }
        let fold = self.byte();
        let raw = self.quadword();
        // Address bits 51:24 are cleared in most words, and bits that the formats reserve.
        let word = match fold % 8 {
            0 => raw,
            1 => raw & !(0x7f << 52) & !(0x000f_ffff_ff00_0000) | 1,
            _ => raw & (FOLD | 0xe63 | 7 << 61) | 1,
        };
        self.words.insert(at, word);
        Some(word)
    }
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Dreamt>>);

impl Memory {
    fn with<T>(&self, f: impl FnOnce(&mut Dreamt) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl SystemMemory for Memory {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        for (offset, part) in (0..).step_by(8).zip(data.chunks_mut(8)) {
            let word = self.load(Gpa(at.0 + offset))?;
            part.copy_from_slice(&word.to_le_bytes()[..part.len()]);
        }
        Ok(())
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        for (offset, part) in (0..).step_by(8).zip(data.chunks(8)) {
            let word = part.try_into().map(u64::from_le_bytes).expect("whole quadwords");
            self.store(Gpa(at.0 + offset), word)?;
        }
        Ok(())
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        assert_eq!(at.0 % 8, 0, "quadwords are aligned");
        self.with(|memory| memory.at(at.0)).ok_or(Unreachable)
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        assert_eq!(at.0 % 8, 0, "quadwords are aligned");
        if at.0 >= END {
            return Err(Unreachable);
        }
        self.with(|memory| memory.words.insert(at.0, value));
        Ok(())
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        let found = self.load(at)?;
        if found != old {
            return Ok(Err(found));
        }
        self.with(|memory| memory.exchanged.insert(at.0, new));
        self.store(at, new).map(Ok)
    }
}

/// The memory as the model would leave it. Its marks lie beside, so that the unit finds what the model found: an
/// entry may be a device's and a table's at once, and a mark in it is a reserved bit to whoever reads it next.
struct Beside<'a> {
    memory: &'a Memory,
    stored: BTreeMap<u64, u64>,
}

impl Words for Beside<'_> {
    fn load(&mut self, at: u64) -> Option<u64> {
        let stored = self.stored.get(&at).copied();
        stored.or_else(|| SystemMemory::load(self.memory, Gpa(at)).ok())
    }

    fn store(&mut self, at: u64, value: u64) {
        // Marks that are there already are no exchange of the unit's either.
        if self.load(at) != Some(value) {
            self.stored.insert(at, value);
        }
    }
}

/// Every register, and places where there is none.
const OFFSETS: [u64; 32] = [
    0x00, 0x08, 0x10, 0x18, 0x18, 0x20, 0x28, 0x30, 0x38, 0x40, 0x100, 0x108, 0x130, 0x150, 0x158, 0x160,
    0x170, 0x178, 0x180, 0x1a0, 0x2000, 0x2008, 0x2008, 0x2010, 0x2018, 0x2020, 0x2030, 0x2038, 0x2040,
    0x3000, 0x3ff8, 0x4000,
];

/// Calls that a doorbell may leave to somebody else before the test gives up on the unit.
const MOST_CALLS: usize = 64;

/// First byte of inputs that are a guest which keeps to the rules. To a hostile one it would be a page request to a unit
/// that is off.
const ORDERLY: u8 = 0xfe;

/// Carry out what the guest in `input` does, whichever kind it is of.
pub(crate) fn fed(input: &[u8]) {
    match input {
        [ORDERLY, steps @ ..] => orderly::run(steps),
        _ => run(input),
    }
}

/// Carry out what a hostile guest in `input` does.
pub(crate) fn run(input: &[u8]) {
    let memory = Memory::default();
    memory.with(|dreamt| dreamt.input = input.to_vec());
    let unit = Unit::new(
        Bdf::from_requester_id(2),
        Features::offer(Wanted::EVERYTHING),
        memory.clone(),
    );
    let page = Page::default();
    unit.show_registers(Box::new(page.clone()));
    let settle = |effects: Effects| {
        let mut more = effects.more_commands;
        let mut calls = 0;
        while more {
            more = unit.run_commands().more_commands;
            calls += 1;
            assert!(calls < MOST_CALLS, "a ring ends after one lap");
        }
    };
    while memory.with(|dreamt| dreamt.used < dreamt.input.len()) {
        let (kind, which) = memory.with(|dreamt| (dreamt.byte(), dreamt.byte()));
        match kind % 8 {
            0..=2 => {
                let value = memory.with(Dreamt::quadword).to_le_bytes();
                let width = [8, 8, 4, 8, 2, 1, 4, 3][usize::from(kind >> 5)];
                let offset = OFFSETS[usize::from(which % 32)] + u64::from(which >> 5 & 4);
                settle(unit.mmio_write(offset, &value[..width]));
                unit.mmio_read(offset, &mut [0; 8][..width]);
            }
            3 => settle(unit.mmio_write(0x18, &(0x1_1005_u64 | u64::from(which) << 48).to_le_bytes())),
            4 => {
                let (at, value) = memory.with(|dreamt| (dreamt.quadword(), dreamt.quadword()));
                let _ = SystemMemory::store(&memory, Gpa(at & (FOLD | 0xff8)), value);
            }
            5 => compare_message(&unit, &memory, which),
            6 => compare_page_request(&unit, &memory, kind, which),
            _ => compare(&unit, &memory, kind, which),
        }
        page.agrees_with(&unit);
    }
}

fn quadword(unit: &Unit<Memory>, offset: u64) -> u64 {
    let mut data = [0; 8];
    unit.mmio_read(offset, &mut data);
    u64::from_le_bytes(data)
}

/// The registers that decide, of a unit that knows nothing of before.
fn forgetful(unit: &Unit<Memory>) -> Registers {
    let read = |offset| quadword(unit, offset);
    let registers = Registers {
        control: read(0x18),
        exclusion_base: read(0x20),
        exclusion_limit: read(0x28),
        device_table: [0, 0x100, 0x108, 0x110, 0x118, 0x120, 0x128, 0x130].map(read),
    };
    // A write of the exclusion limit as it is: no change, and everything cached is dropped.
    let _ = unit.mmio_write(0x28, &registers.exclusion_limit.to_le_bytes());
    registers
}

/// Have the unit and the model remap the same message.
fn compare_message(unit: &Unit<Memory>, memory: &Memory, which: u8) {
    let word = memory.with(Dreamt::quadword);
    let [.., low] = word.to_be_bytes();
    let message = Message {
        device: 3,
        address: 0xfee0_0000 | word & 0xf_fffc,
        data: u32::from(which) << 8 | u32::from(low),
    };
    let registers = forgetful(unit);
    let mut beside = Beside {
        memory,
        stored: BTreeMap::new(),
    };
    let expected = interrupt(&mut beside, &registers, &message);
    let sent = MsiMessage {
        address: message.address,
        data: message.data,
    };
    let found = unit.begin().remap(Bdf::from_requester_id(message.device), sent);
    let found = remapped_in_terms_of_the_model(found);
    assert_eq!(found, expected, "{message:x?} with {registers:x?}");
}

/// Send the unit a page request, and ask the model what becomes of it.
fn compare_page_request(unit: &Unit<Memory>, memory: &Memory, kind: u8, which: u8) {
    let wish = Wish {
        device: which.into(),
        pasid: Some(kind.into()),
        at: memory.with(Dreamt::quadword),
        group: which.into(),
        read: true,
    };
    let registers = forgetful(unit);
    let mut beside = Beside {
        memory,
        stored: BTreeMap::new(),
    };
    let expected = page_request(&mut beside, &registers, &wish);
    let [status, base, head, tail] = [0x2020, 0x38, 0x2030, 0x2038].map(|offset| quadword(unit, offset));
    let next = (tail + 16) % (16 << (base >> 56 & 0xf));
    let place = (base & 0x000f_ffff_ffff_f000) + tail;
    let is_logged = status & 0x80 != 0 && next != head && place < END;
    let request = PageRequest {
        device: Bdf::from_requester_id(wish.device),
        pasid: wish.pasid.and_then(Pasid::new),
        at: Iova(wish.at),
        access: Access::READ,
        execute: false,
        privileged: false,
        group: wish.group,
        last: true,
    };
    let (answer, _effects) = unit.page_request(&request);
    let expected = match expected {
        Wished::Fails => Answer::Failure,
        Wished::Invalid => Answer::Invalid,
        Wished::Logged(_) if !is_logged => Answer::Failure,
        Wished::Logged(words) => {
            let found = [place, place + 8].map(|at| SystemMemory::load(memory, Gpa(at)));
            assert_eq!(found, words.map(Ok), "{wish:x?} with {registers:x?}");
            assert_eq!(quadword(unit, 0x2038), next, "{wish:x?} with {registers:x?}");
            Answer::Later
        }
    };
    assert_eq!(answer, expected, "{wish:x?} with {registers:x?}");
}

/// Ask the unit and the model for the same, on caches that know nothing of before. Both leave the same marks, and
/// the unit says the same once more, from its caches.
fn compare(unit: &Unit<Memory>, memory: &Memory, kind: u8, which: u8) {
    let at = memory.with(Dreamt::quadword);
    let at = if kind & 8 == 0 { at & 0xffff_ffff_ffff } else { at };
    let q = Question {
        device: u16::from(which & 15),
        pasid: (kind & 16 != 0).then_some(u32::from(which)),
        privileged: kind & 32 != 0,
        at,
        read: kind & 64 != 0,
        write: kind & 128 != 0,
    };
    let registers = forgetful(unit);
    let mut beside = Beside {
        memory,
        stored: BTreeMap::new(),
    };
    let expected = answer(&mut beside, &registers, &q);
    memory.with(|memory| memory.exchanged.clear());
    let request = request(&q);
    let bus = unit.begin();
    let ask = || in_terms_of_the_model(bus.translate(&request));
    let found = ask();
    assert_eq!(found, expected, "{q:x?} with {registers:x?}");
    let marked = memory.with(|memory| std::mem::take(&mut memory.exchanged));
    assert_eq!(marked, beside.stored, "marks of {q:x?} with {registers:x?}");
    // The record of an abort may have changed a table; what passed is known by now.
    if matches!(found, Outcome::Passes { .. }) {
        assert_eq!(ask(), found, "{q:x?} once more, with {registers:x?}");
    }
}
