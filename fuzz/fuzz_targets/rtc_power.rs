//! The clock, the power hardware and the reset register under any sequence of accesses while time passes.
//!
//! Holds: the clock's alarm is never set for a moment that would call it back without end, and what the guest
//! asks for stays bounded.

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
use ravelin::devices::power::{PM1A_PORTS, Power, SCI_GSI};
use ravelin::devices::request::RequestQueue;
use ravelin::devices::reset::{CONFIG_PORTS_LEN, ConfigPortsWithReset, ResetRegister};
use ravelin::devices::rtc::{RTC_GSI, RTC_PORTS, Rtc};
use ravelin::platform::bus::BusDevice;
use ravelin::platform::irq::{InterruptController, IrqLine};
use steps::steps;

#[derive(Arbitrary, Debug)]
enum Step {
    Clock(Access),
    Register { index: u8, value: u8 },
    Power(Access),
    Reset(Access),
    Button,
    Pass { seconds: u32, nanos: u32 },
    SetHostClock(u64),
    Expired,
    ResetAll,
}

struct Nobody;

impl InterruptController for Nobody {
    fn line_changed(&self, _gsi: u32, _asserted: bool) {}
    fn pulse(&self, _gsi: u32) {}
}

struct NoConfig;

impl BusDevice for NoConfig {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}
    fn write(&self, _offset: u64, _data: &[u8]) {}
}

fuzz_target!(|input: &[u8]| {
    let requests = RequestQueue::new().expect("a descriptor");
    let (clock, alarm) = (
        ManualClock::at(Duration::from_secs(1_800_000_000)),
        Arc::new(ManualAlarm::default()),
    );
    let rtc = Rtc::new(
        IrqLine::new(Arc::new(Nobody), RTC_GSI),
        clock.clone(),
        alarm.clone(),
    );
    let power = Power::new(IrqLine::new(Arc::new(Nobody), SCI_GSI), requests.clone());
    let reset = ResetRegister::new(requests.clone());
    let ports = ConfigPortsWithReset {
        config: Arc::new(NoConfig),
        reset: reset.clone(),
    };
    for step in steps::<Step>(input) {
        match step {
            Step::Clock(access) => access.run(&*rtc, RTC_PORTS),
            Step::Register { index, value } => BusDevice::write(&*rtc, 0, &[index, value]),
            Step::Power(access) => access.run(&*power, PM1A_PORTS),
            Step::Reset(access) => access.run(&ports, CONFIG_PORTS_LEN),
            Step::Button => {
                power.press_button();
            }
            Step::Pass { seconds, nanos } => {
                clock.advance(Duration::new(seconds.into(), nanos % 1_000_000_000));
            }
            Step::SetHostClock(seconds) => clock.set_utc(Duration::from_secs(seconds)),
            Step::Expired => {
                rtc.expired();
                let now = clock.monotonic();
                assert!(
                    alarm.at().is_none_or(|at| at > now),
                    "called back at once for ever"
                );
            }
            Step::ResetAll => {
                rtc.reset();
                power.reset();
                reset.reset();
            }
        }
    }
    let asked = std::iter::from_fn(|| requests.take()).count();
    assert!(asked <= 2, "{asked} requests wait");
});
