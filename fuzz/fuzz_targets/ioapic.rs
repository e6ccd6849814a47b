//! The I/O APIC under any sequence of register accesses, wires, ends of interrupts and resets.
//!
//! Holds: a level-triggered message is sent only while the kernel knows it, and one event sends at most one
//! message per input.

#![no_main]

mod access;
mod steps;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use access::Access;
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::Device;
use ravelin::devices::clock::Expire;
use ravelin::devices::clock::manual::{ManualAlarm, ManualClock};
use ravelin::devices::ioapic::{IoApic, spec};
use ravelin::platform::bus::BusDevice;
use ravelin::platform::host::HostError;
use ravelin::platform::irq::{EoiListener, IOAPIC_INPUTS, InterruptController, IoApicHost, IrqLine};
use ravelin::platform::msi::MsiMessage;
use steps::steps;

const PINS: usize = IOAPIC_INPUTS as usize;

#[derive(Arbitrary, Debug)]
enum Step {
    Access(Access),
    Entry { pin: u8, high: bool, value: u32 },
    Wire { pin: u8, asserted: bool },
    Pulse(u8),
    End(u8),
    Expired,
    Reset,
}

#[derive(Default)]
struct Kernel {
    routes: Mutex<[Option<MsiMessage>; PINS]>,
    sent: Mutex<Vec<MsiMessage>>,
}

impl IoApicHost for Kernel {
    fn signal(&self, message: MsiMessage) {
        let level = message.data & 1 << 15 != 0;
        let routes = self.routes.lock().expect("not poisoned");
        assert!(
            !level || routes.contains(&Some(message)),
            "{message:x?} is not routed"
        );
        self.sent.lock().expect("not poisoned").push(message);
    }

    fn set_route(&self, pin: u8, message: Option<MsiMessage>) -> Result<(), HostError> {
        self.routes.lock().expect("not poisoned")[usize::from(pin)] = message;
        Ok(())
    }

    fn pins_of(&self, vector: u8) -> u32 {
        let routes = self.routes.lock().expect("not poisoned");
        let sends = |route: &Option<MsiMessage>| route.is_some_and(|m| m.data.to_le_bytes()[0] == vector);
        (0..PINS)
            .filter(|pin| sends(&routes[*pin]))
            .fold(0, |found, pin| found | 1 << pin)
    }
}

fuzz_target!(|input: &[u8]| {
    let kernel = Arc::new(Kernel::default());
    let clock = ManualClock::at(Duration::ZERO);
    let ioapic = IoApic::new(0, kernel.clone(), clock, Arc::new(ManualAlarm::default()));
    let gsi = |pin: u8| u32::from(pin % IOAPIC_INPUTS);
    let wires: Vec<IrqLine> = (0..u32::from(IOAPIC_INPUTS))
        .map(|gsi| IrqLine::new(ioapic.clone(), gsi))
        .collect();
    for step in steps::<Step>(input) {
        match step {
            Step::Access(access) => access.run(&*ioapic, spec::WINDOW_LEN),
            Step::Entry { pin, high, value } => {
                ioapic.write(0, &[0x10 + 2 * (pin % IOAPIC_INPUTS) + u8::from(high)]);
                ioapic.write(0x10, &value.to_le_bytes());
            }
            Step::Wire { pin, asserted } => wires[usize::from(pin) % PINS].set(asserted),
            Step::Pulse(pin) => ioapic.pulse(gsi(pin)),
            Step::End(vector) => ioapic.end_of_interrupt(vector),
            Step::Expired => ioapic.expired(),
            Step::Reset => ioapic.reset(),
        }
        let sent = std::mem::take(&mut *kernel.sent.lock().expect("not poisoned"));
        assert!(sent.len() <= PINS, "one event sent {} messages", sent.len());
    }
});
