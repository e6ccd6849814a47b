//! MSI of an emulated function: 64-bit address, per-vector masks (PCI Express Base Specification 7.7.1).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;
use crate::platform::msi::{MsiMessage, MsiPort};

/// Message Control, in the upper half of the first dword.
const ENABLE: u32 = 1 << 16;
const ENABLED_VECTORS: u32 = 0x7 << 20;
const ADDRESS_64: u32 = 1 << 23;
const PER_VECTOR_MASKING: u32 = 1 << 24;

const ADDRESS: usize = 1;
const UPPER_ADDRESS: usize = 2;
const DATA: usize = 3;
const MASK: usize = 4;
const DWORDS: usize = 6;

/// MSI of one emulated function. Shared by its configuration space and whatever signals.
pub struct Msi {
    vectors: u8,
    port: MsiPort,
    state: Mutex<State>,
}

struct State {
    /// All but the pending bits.
    registers: [Register; DWORDS],
    pending: u32,
}

impl State {
    const fn enabled(&self) -> bool {
        self.registers[0].get() & ENABLE != 0
    }

    /// What `vector` of `allocated` sends: the function changes the low data bits (7.7.1.5).
    fn message(&self, vector: u32, allocated: u32) -> MsiMessage {
        let data = self.registers[DATA].get();
        MsiMessage {
            address: u64::from(self.registers[UPPER_ADDRESS].get()) << 32
                | u64::from(self.registers[ADDRESS].get()),
            data: data & !(allocated - 1) | vector,
        }
    }
}

impl Msi {
    /// MSI with `vectors` vectors, off; messages leave by `port`.
    ///
    /// # Panics
    ///
    /// When `vectors` is not 1, 2, 4, 8, 16 or 32.
    #[must_use]
    pub fn new(vectors: u8, port: MsiPort) -> Arc<Self> {
        assert!(
            vectors.is_power_of_two() && vectors <= 32,
            "{vectors} MSI vectors: a power of two up to 32 is possible"
        );
        let control = vectors.trailing_zeros() << 17 | ADDRESS_64 | PER_VECTOR_MASKING;
        let mask = u32::MAX >> (32 - u32::from(vectors));
        Arc::new(Self {
            vectors,
            port,
            state: Mutex::new(State {
                registers: [
                    Register::writable(control, ENABLE | ENABLED_VECTORS),
                    Register::writable(0, !3),
                    Register::writable(0, u32::MAX),
                    Register::writable(0, 0xffff),
                    Register::writable(0, mask),
                    Register::read_only(0),
                ],
                pending: 0,
            }),
        })
    }

    /// What goes into the capability list. Its effect [`ConfigEffect::INTERRUPTS`] is performed by
    /// [`Msi::refresh`].
    #[must_use]
    pub fn capability(self: &Arc<Self>) -> Box<dyn Capability> {
        Box::new(MsiCapability(self.clone()))
    }

    /// Whether the guest uses MSI.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.state().enabled()
    }

    /// How many vectors the guest allocated, at most what there is: 1 to 32.
    #[must_use]
    pub fn allocated_vectors(&self) -> u8 {
        u8::try_from(self.allocated(&self.state())).expect("at most what there is")
    }

    /// Interrupt by `vector`: at once, or once it is unmasked. Where the guest allocated fewer vectors than
    /// there are, several share one. Nothing happens while MSI is off or without Bus Master Enable.
    pub fn signal(&self, vector: u8) {
        let mut state = self.state();
        if !state.enabled() {
            return;
        }
        let allocated = self.allocated(&state);
        let vector = u32::from(vector) & (allocated - 1);
        if state.registers[MASK].get() & 1 << vector != 0 {
            state.pending |= 1 << vector;
        } else {
            self.port.signal(state.message(vector, allocated));
        }
    }

    /// The capability changed: send what is owed and may go now.
    pub fn refresh(&self) {
        let mut state = self.state();
        if !state.enabled() {
            return;
        }
        let allocated = self.allocated(&state);
        let due = state.pending & !state.registers[MASK].get();
        state.pending &= !due;
        for vector in (0..allocated).filter(|vector| due & 1 << vector != 0) {
            self.port.signal(state.message(vector, allocated));
        }
    }

    fn allocated(&self, state: &State) -> u32 {
        let exponent = (state.registers[0].get() & ENABLED_VECTORS) >> 20;
        (1 << exponent).min(u32::from(self.vectors))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct MsiCapability(Arc<Msi>);

impl Capability for MsiCapability {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x05)
    }

    fn len(&self) -> u16 {
        24
    }

    fn read(&self, dword: u16) -> u32 {
        let state = self.0.state();
        match usize::from(dword) {
            5 => state.pending,
            index => state.registers.get(index).map_or(0, |register| register.get()),
        }
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let mut state = self.0.state();
        let Some(register) = state.registers.get_mut(usize::from(dword)) else {
            return ConfigEffect::empty();
        };
        let old = register.get();
        register.write(write);
        if register.get() == old {
            ConfigEffect::empty()
        } else {
            ConfigEffect::INTERRUPTS
        }
    }

    fn reset(&mut self) {
        let mut state = self.0.state();
        state.registers.iter_mut().for_each(Register::reset);
        state.pending = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::Messages;

    fn parts(vectors: u8) -> (Arc<Msi>, Box<dyn Capability>, Arc<Messages>) {
        let messages = Messages::new();
        let msi = Msi::new(vectors, messages.port());
        let capability = msi.capability();
        (msi, capability, messages)
    }

    fn program(capability: &mut Box<dyn Capability>, enabled_vectors: u32) {
        for (dword, value) in [
            (1, 0xfee0_0003),
            (2, 0x1),
            (3, 0xffff_4041),
            (0, ENABLE | enabled_vectors << 20),
        ] {
            let _ = capability.write(dword, DwordWrite::whole(value));
        }
    }

    #[test]
    fn a_vector_replaces_the_low_data_bits_the_guest_allocated() {
        let (msi, mut capability, messages) = parts(4);
        program(&mut capability, 1);
        msi.signal(1);
        msi.signal(2);
        let sent = |data| MsiMessage {
            address: 0x1_fee0_0000,
            data,
        };
        assert_eq!(messages.take(), [sent(0x4041), sent(0x4040)]);
    }

    #[test]
    fn a_guest_that_allocates_more_than_there_is_gets_what_there_is() {
        let (msi, mut capability, messages) = parts(2);
        program(&mut capability, 7);
        msi.signal(255);
        assert_eq!(
            messages.take(),
            [MsiMessage {
                address: 0x1_fee0_0000,
                data: 0x4041
            }]
        );
    }

    #[test]
    fn a_masked_vector_is_sent_once_when_it_is_unmasked() {
        let (msi, mut capability, messages) = parts(2);
        program(&mut capability, 1);
        assert_eq!(
            capability.write(4, DwordWrite::whole(u32::MAX)),
            ConfigEffect::INTERRUPTS
        );
        assert_eq!(capability.read(4), 0b11);
        msi.signal(1);
        msi.signal(1);
        assert_eq!((messages.take().len(), capability.read(5)), (0, 0b10));
        assert_eq!(
            capability.write(4, DwordWrite::whole(0)),
            ConfigEffect::INTERRUPTS
        );
        msi.refresh();
        msi.refresh();
        assert_eq!((messages.take().len(), capability.read(5)), (1, 0));
    }

    #[test]
    fn nothing_is_sent_while_off_or_without_bus_master() {
        let (msi, mut capability, messages) = parts(1);
        msi.signal(0);
        program(&mut capability, 0);
        messages.requester().set_bus_master(false);
        msi.signal(0);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn class_12_writes_that_span_fields_change_only_what_is_writable() {
        let (_msi, mut capability, _messages) = parts(1);
        (0..8).for_each(|dword| {
            let _ = capability.write(dword, DwordWrite::whole(u32::MAX));
        });
        let values: Vec<u32> = (0..7).map(|dword| capability.read(dword)).collect();
        assert_eq!(values, [0x01f1_0000, 0xffff_fffc, u32::MAX, 0xffff, 1, 0, 0]);
        capability.reset();
        let values: Vec<u32> = (0..7).map(|dword| capability.read(dword)).collect();
        assert_eq!(values, [0x0180_0000, 0, 0, 0, 0, 0, 0]);
    }
}
