//! The HPET under any sequence of register accesses while time passes.
//!
//! Holds: after it was called back it is not called back again at once.

#![no_main]

mod access;
mod steps;

use std::sync::Arc;
use std::time::Duration;

use access::Access;
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::Device;
use ravelin::devices::clock::manual::{ManualAlarm, ManualClock};
use ravelin::devices::clock::{Clock, Expire};
use ravelin::devices::hpet::{Hpet, WINDOW_LEN};
use ravelin::devices::power::{Power, SCI_GSI};
use ravelin::devices::request::RequestQueue;
use ravelin::devices::rtc::wire::ClockWire;
use ravelin::platform::bus::BusDevice;
use ravelin::platform::irq::{InterruptController, IrqLine};
use steps::steps;

#[derive(Arbitrary, Debug)]
enum Step {
    Access(Access),
    Timer { timer: u8, config: u16, comparator: u64 },
    Enable(u8),
    Pass(u64),
    Expired,
    Reset,
}

struct Nobody;

impl InterruptController for Nobody {
    fn line_changed(&self, gsi: u32, _asserted: bool) {
        assert!(gsi < 24);
    }
    fn pulse(&self, gsi: u32) {
        assert!(gsi < 24);
    }
}

fuzz_target!(|input: &[u8]| {
    let (clock, alarm) = (ManualClock::at(Duration::ZERO), Arc::new(ManualAlarm::default()));
    let requests = RequestQueue::new().expect("a descriptor");
    let power = Power::new(IrqLine::new(Arc::new(Nobody), SCI_GSI), requests);
    let clock_wire = ClockWire::new(Arc::new(Nobody), power);
    let hpet = Hpet::new(Arc::new(Nobody), clock_wire, clock.clone(), alarm.clone());
    for step in steps::<Step>(input) {
        match step {
            Step::Access(access) => access.run(&*hpet, WINDOW_LEN),
            Step::Timer {
                timer,
                config,
                comparator,
            } => {
                let at = 0x100 + 0x20 * u64::from(timer % 3);
                hpet.write(at, &config.to_le_bytes());
                hpet.write(at + 8, &comparator.to_le_bytes());
            }
            Step::Enable(value) => hpet.write(0x10, &[value]),
            Step::Pass(nanos) => clock.advance(Duration::from_nanos(nanos)),
            Step::Expired => {
                hpet.expired();
                let now = clock.monotonic();
                assert!(
                    alarm.at().is_none_or(|at| at > now),
                    "called back at once for ever"
                );
            }
            Step::Reset => hpet.reset(),
        }
    }
});
