//! Accesses of any width anywhere in a BAR with MSI-X structures, between interrupts and resets, compared
//! with a model that is nothing but the table's bytes.
//!
//! Nothing may panic; every byte reads as the model has it; and after every step the guest has got exactly
//! the messages it asked for: none while masked, what was owed once, and never by a route that has another
//! message.

#![no_main]

mod steps;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::capability::{Msix, MsixLayout};
use ravelin::pci::testing::Messages;
use ravelin::platform::msi::MsiMessage;
use steps::steps;

#[derive(Arbitrary, Debug)]
enum Step {
    Control {
        lane: u8,
        bytes: [u8; 4],
        len: u8,
    },
    Write {
        offset: u16,
        bytes: [u8; 8],
        len: u8,
    },
    /// One dword of an entry, as drivers write them.
    Entry {
        vector: u8,
        field: u8,
        value: u32,
    },
    Read {
        offset: u16,
        len: u8,
    },
    /// Far from everything, where sums overflow.
    Anywhere {
        offset: u64,
        len: u8,
    },
    Signal {
        vector: u16,
    },
    RefuseRoutes {
        refuse: bool,
    },
    BusMaster {
        enabled: bool,
    },
    Reset,
}

const VECTORS: u16 = 70;
const TABLE: u64 = 0x100;
const LAYOUT: MsixLayout = MsixLayout::new(0, 0x100, VECTORS);
/// The pending bits are at the next multiple of 2 KiB behind the table.
const PENDING: u64 = 0x800;
const PENDING_LEN: u64 = 16;

#[derive(Clone, Copy)]
struct Vector {
    bytes: [u8; 16],
    pending: bool,
}

impl Vector {
    const RESET: Self = Self {
        bytes: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        pending: false,
    };

    fn masked(&self) -> bool {
        self.bytes[12] & 1 != 0
    }

    fn message(&self) -> MsiMessage {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = self.bytes;
        MsiMessage {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            data: u32::from_le_bytes([i, j, k, l]),
        }
    }
}

/// What the specification says, at its simplest.
struct Model {
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
    vectors: [Vector; VECTORS as usize],
    /// What the guest should have got since [`Model::take`].
    sent: Vec<MsiMessage>,
}

impl Model {
    fn new() -> Self {
        Self {
            enabled: false,
            function_masked: false,
            bus_master: true,
            vectors: [Vector::RESET; VECTORS as usize],
            sent: Vec::new(),
        }
    }

    fn send(&mut self, vector: usize) {
        if self.bus_master {
            self.sent.push(self.vectors[vector].message());
        }
    }

    /// Send what is owed and may go.
    fn settle(&mut self) {
        for vector in 0..self.vectors.len() {
            let entry = &mut self.vectors[vector];
            if self.enabled && !self.function_masked && !entry.masked() && entry.pending {
                entry.pending = false;
                self.send(vector);
            }
        }
    }

    fn control(&mut self, lane: usize, bytes: &[u8]) {
        for (byte, at) in bytes.iter().zip(lane..) {
            if at == 3 {
                self.enabled = byte & 0x80 != 0;
                self.function_masked = byte & 0x40 != 0;
            }
        }
        self.settle();
    }

    /// Dword by dword, each with its consequences, as the bus carries them.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (byte, at) in bytes.iter().zip(offset..) {
            let Some(within) = at.checked_sub(TABLE).map(|at| at as usize) else {
                continue;
            };
            if let Some(vector) = self.vectors.get_mut(within / 16) {
                vector.bytes[within % 16] = match within % 16 {
                    0 => byte & !3,
                    12 => byte & 1,
                    13..16 => 0,
                    _ => *byte,
                };
            }
        }
        self.settle();
    }

    fn read(&self, at: u64) -> u8 {
        if let Some(within) = at.checked_sub(PENDING).filter(|within| *within < PENDING_LEN) {
            let vectors = self.vectors.iter().skip(within as usize * 8).take(8);
            return vectors
                .enumerate()
                .fold(0, |bits, (bit, vector)| bits | u8::from(vector.pending) << bit);
        }
        let within = at.checked_sub(TABLE).map(|at| at as usize);
        within
            .and_then(|within| Some(self.vectors.get(within / 16)?.bytes[within % 16]))
            .unwrap_or(0)
    }

    fn signal(&mut self, vector: u16) {
        let vector = usize::from(vector);
        if vector >= self.vectors.len() || !self.enabled {
            return;
        }
        self.vectors[vector].pending = true;
        self.settle();
    }

    fn take(&mut self) -> Vec<MsiMessage> {
        let mut sent = std::mem::take(&mut self.sent);
        sent.sort_unstable_by_key(|message| (message.address, message.data));
        sent
    }
}

/// What the guest got since the last call, by route or one by one.
fn got(messages: &Messages) -> Vec<MsiMessage> {
    let mut got = messages.take();
    for route in messages.routes() {
        let signals = route.signals();
        if signals > 0 {
            let set = route
                .history()
                .last()
                .copied()
                .flatten()
                .expect("a signalled route has a message");
            got.extend((0..signals).map(|_| set));
        }
    }
    got.sort_unstable_by_key(|message| (message.address, message.data));
    got
}

fuzz_target!(|input: &[u8]| {
    let messages = Messages::new();
    let msix = Msix::new(LAYOUT, messages.port());
    let mut capability = msix.capability();
    let mut model = Model::new();
    let width = |len: u8| usize::from(len) % 8 + 1;
    for step in steps::<Step>(input) {
        match step {
            Step::Control { lane, bytes, len } => {
                let lane = usize::from(lane % 4);
                let bytes = &bytes[..(usize::from(len) % 4 + 1).min(4 - lane)];
                let write = DwordWrite::new(lane, bytes).expect("inside the dword");
                let _performed = capability.write(0, write);
                msix.refresh();
                model.control(lane, bytes);
            }
            Step::Write { offset, bytes, len } => {
                let (offset, bytes) = (u64::from(offset % 0x1000), &bytes[..width(len)]);
                msix.bar_write(0, offset, bytes);
                model.write(offset, bytes);
            }
            Step::Entry { vector, field, value } => {
                let offset = TABLE + 16 * u64::from(vector) + 4 * u64::from(field % 4);
                msix.bar_write(0, offset, &value.to_le_bytes());
                model.write(offset, &value.to_le_bytes());
            }
            Step::Read { offset, len } => {
                let offset = u64::from(offset % 0x1000);
                let mut data = [0; 8];
                msix.bar_read(0, offset, &mut data[..width(len)]);
                for (byte, at) in data[..width(len)].iter().zip(offset..) {
                    assert_eq!(*byte, model.read(at), "at {at:#x}");
                }
            }
            Step::Anywhere { offset, len } => {
                let offset = offset | 1 << 32;
                assert!(!msix.bar_write(0, offset, &[0; 8][..width(len)]));
                assert!(!msix.bar_read(0, offset, &mut [0; 8][..width(len)]));
            }
            Step::Signal { vector } => {
                msix.signal(vector);
                model.signal(vector);
            }
            Step::RefuseRoutes { refuse } => messages.refuse(refuse),
            Step::BusMaster { enabled } => {
                messages.requester().set_bus_master(enabled);
                model.bus_master = enabled;
            }
            Step::Reset => {
                capability.reset();
                model = Model {
                    bus_master: model.bus_master,
                    ..Model::new()
                };
            }
        }
        assert_eq!(got(&messages), model.take());
    }
});
