//! The I/O APIC: wires become messages, which reach the processors as any device's messages do.
//!
//! What it offers: 24 inputs, GSIs 0 to 23; version 0x20 with the EOI register; edge and level triggering;
//! every delivery mode a processor takes without an 8259.
//!
//! The local APICs are the kernel's (a split interrupt controller), so that an entry's message may pass through
//! interrupt remapping before it is delivered. A level-triggered interrupt is in service (Remote IRR) from its
//! message until the kernel reports its end, and is sent again then while a wire still asserts.
//!
//! Locks: `routing` before an input's; never two inputs' at once. No lock is held while the kernel or a
//! listener is called, except `routing`, which orders what the kernel is told.

mod input;
pub mod spec;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use self::input::{Ended, Input};
use self::spec::{Direct, Indirect, VERSION};
use super::Device;
use super::clock::{Alarm, Clock, Expire};
use super::register::answer;
use crate::guest_warn;
use crate::platform::bus::BusDevice;
use crate::platform::irq::{EoiListener, IOAPIC_INPUTS, InterruptController, IoApicHost};
use crate::platform::lanes::LaneWrite;
use crate::platform::lock::lock;
use crate::platform::msi::MsiMessage;

/// How long an input rests that interrupted very often without anybody releasing it.
const REST: Duration = Duration::from_millis(10);

/// Who is told that an interrupt of one input ended: a device behind a wire that is asserted anew when its
/// cause persists, as VFIO's INTx is.
pub trait Resample: Send + Sync {
    /// A processor ended an interrupt of the input. Called with no lock of the controller held; may assert and
    /// release wires.
    fn interrupt_ended(&self);
}

/// What the select and window registers show.
#[derive(Debug, Clone, Copy)]
struct Window {
    select: u8,
    /// Bits 27:24 of IOAPICID.
    id: u8,
}

/// The controller.
pub struct IoApic {
    /// The identification after reset, as the MADT says it.
    initial_id: u8,
    window: Mutex<Window>,
    inputs: [Mutex<Input>; IOAPIC_INPUTS as usize],
    listeners: [Mutex<Vec<Weak<dyn Resample>>>; IOAPIC_INPUTS as usize],
    /// Held while the kernel is told of a route, so that what it knows last is the entry's last state.
    routing: Mutex<()>,
    host: Arc<dyn IoApicHost>,
    clock: Arc<dyn Clock>,
    alarm: Arc<dyn Alarm>,
}

impl IoApic {
    /// A controller that the MADT calls `id` (0 to 15), with every input masked. `alarm` calls it back.
    ///
    /// # Panics
    /// When `id` has more than the four bits IOAPICID has for it.
    #[must_use]
    pub fn new(id: u8, host: Arc<dyn IoApicHost>, clock: Arc<dyn Clock>, alarm: Arc<dyn Alarm>) -> Arc<Self> {
        assert!(id < 16, "IOAPIC ID {id} has more than four bits");
        Arc::new(Self {
            initial_id: id,
            window: Mutex::new(Window { select: 0, id }),
            inputs: Default::default(),
            listeners: Default::default(),
            routing: Mutex::default(),
            host,
            clock,
            alarm,
        })
    }

    /// Tell `listener` of every interrupt of input `gsi` that ends, for as long as it lives.
    ///
    /// # Panics
    /// When `gsi` is none of this controller's.
    pub fn resample(&self, gsi: u32, listener: Weak<dyn Resample>) {
        lock(&self.listeners[Self::pin(gsi)]).push(listener);
    }

    /// The input of `gsi`: the plan gives wires to inputs that exist.
    fn pin(gsi: u32) -> usize {
        let pin = usize::try_from(gsi)
            .ok()
            .filter(|pin| *pin < usize::from(IOAPIC_INPUTS));
        pin.expect("a GSI of the one IOAPIC")
    }

    fn read_indirect(&self, select: u8) -> u32 {
        let id = || u32::from(lock(&self.window).id) << 24;
        let entry = |pin: u8| lock(&self.inputs[usize::from(pin)]).entry().into_bits();
        // Narrowing keeps the half that was asked for.
        #[expect(clippy::cast_possible_truncation, reason = "each half is 32 bits")]
        match Indirect::at(select) {
            Some(Indirect::Id | Indirect::Arbitration) => id(),
            Some(Indirect::Version) => VERSION,
            Some(Indirect::EntryLow(pin)) => entry(pin) as u32,
            Some(Indirect::EntryHigh(pin)) => (entry(pin) >> 32) as u32,
            None => u32::MAX,
        }
    }

    fn write_indirect(&self, select: u8, value: u32) {
        let data = value.to_le_bytes();
        let (pin, half) = match Indirect::at(select) {
            Some(Indirect::Id) => {
                lock(&self.window).id = data[3] & 0xf;
                return;
            }
            Some(Indirect::EntryLow(pin)) => (usize::from(pin), 0),
            Some(Indirect::EntryHigh(pin)) => (usize::from(pin), 4),
            Some(Indirect::Version | Indirect::Arbitration) | None => {
                guest_warn!("guest wrote {value:#x} to IOAPIC register {select:#x}, which is not writable");
                return;
            }
        };
        let lanes = LaneWrite::of(half, &data, 0, 8).expect("half an entry touches the entry");
        lock(&self.inputs[pin]).write(lanes);
        self.update_route(pin);
        self.service(pin);
    }

    /// Bring what the kernel knows of input `pin` to what the entry says.
    fn update_route(&self, pin: usize) {
        let _order = lock(&self.routing);
        let (wanted, known) = {
            let input = lock(&self.inputs[pin]);
            (input.wanted_route(), input.route())
        };
        if wanted == known {
            return;
        }
        let number = u8::try_from(pin).expect("fewer than 256 inputs");
        match self.host.set_route(number, wanted) {
            Ok(()) => lock(&self.inputs[pin]).routed(wanted),
            // Its interrupts wait: without the route the kernel would not say when they end.
            Err(error) => guest_warn!(
                pin,
                error = &error as &dyn std::error::Error,
                "the input's interrupts stay off: the kernel refused its route"
            ),
        }
    }

    /// Send what a level-triggered input owes.
    fn service(&self, pin: usize) {
        let message = lock(&self.inputs[pin]).take_message();
        self.send(message);
    }

    /// The guest wrote `vector` to the EOI register: it ends the interrupts of entries that have it.
    fn directed_end(&self, vector: u8) {
        for pin in 0..self.inputs.len() {
            let ended = lock(&self.inputs[pin]).end_of_entry(vector);
            if ended == Ended::Ours {
                self.ended(pin);
            }
        }
    }

    fn send(&self, message: Option<MsiMessage>) {
        if let Some(message) = message {
            self.host.signal(message);
        }
    }

    /// An interrupt of input `pin` ended: let those who re-assert do so, then send the next one.
    fn ended(&self, pin: usize) {
        let listeners: Vec<_> = {
            let mut listeners = lock(&self.listeners[pin]);
            listeners.retain(|listener| listener.strong_count() > 0);
            listeners.iter().filter_map(Weak::upgrade).collect()
        };
        listeners.iter().for_each(|listener| listener.interrupt_ended());
        let after = lock(&self.inputs[pin]).after_end();
        if after == Ended::PutOff {
            guest_warn!(
                pin,
                "the guest ends this input's interrupts without serving them; slowing down"
            );
            self.alarm.set(Some(self.clock.monotonic() + REST));
        }
        self.service(pin);
    }
}

impl InterruptController for IoApic {
    fn line_changed(&self, gsi: u32, asserted: bool) {
        let message = lock(&self.inputs[Self::pin(gsi)]).wire_changed(asserted);
        self.send(message);
    }

    fn pulse(&self, gsi: u32) {
        let message = lock(&self.inputs[Self::pin(gsi)]).pulse();
        self.send(message);
    }
}

/// Processors end what they were sent, which remapping may have changed: the host knows whose it was.
impl EoiListener for IoApic {
    fn end_of_interrupt(&self, vector: u8) {
        let pins = self.host.pins_of(vector);
        for pin in (0..self.inputs.len()).filter(|pin| pins >> pin & 1 != 0) {
            let ended = lock(&self.inputs[pin]).end();
            if ended == Ended::Ours {
                self.ended(pin);
            }
        }
    }
}

impl Expire for IoApic {
    fn expired(&self) {
        for pin in 0..self.inputs.len() {
            lock(&self.inputs[pin]).relent();
            self.service(pin);
        }
    }
}

/// The registers are 32 bits wide. A read of another width is cut or filled with zeros; a write to the window
/// that does not cover the register is lost, as on hardware. Where no register begins: all ones.
impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let select = lock(&self.window).select;
        match Direct::at(offset) {
            Some(Direct::Select) => answer(data, select.into()),
            Some(Direct::Window) => answer(data, self.read_indirect(select).into()),
            // Write-only.
            Some(Direct::EndOfInterrupt) => answer(data, 0),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((lowest, _)) = data.split_first() else {
            return;
        };
        match Direct::at(offset) {
            Some(Direct::Select) => lock(&self.window).select = *lowest,
            Some(Direct::Window) => {
                let select = lock(&self.window).select;
                match data.first_chunk() {
                    Some(value) => self.write_indirect(select, u32::from_le_bytes(*value)),
                    None => guest_warn!(
                        "guest wrote {} bytes to the IOAPIC window; 4 are one register",
                        data.len()
                    ),
                }
            }
            Some(Direct::EndOfInterrupt) => self.directed_end(*lowest),
            None => guest_warn!("guest wrote to IOAPIC offset {offset:#x}, where no register begins"),
        }
    }
}

impl Device for IoApic {
    fn name(&self) -> &'static str {
        "ioapic"
    }

    fn reset(&self) {
        *lock(&self.window) = Window {
            select: 0,
            id: self.initial_id,
        };
        for pin in 0..self.inputs.len() {
            lock(&self.inputs[pin]).reset();
            self.update_route(pin);
        }
        self.alarm.set(None);
    }
}
