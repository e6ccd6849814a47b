//! The serial port under any sequence of register accesses and input.
//!
//! Holds: the port never claims to have taken more input than there was, and never holds more than its FIFO.

#![no_main]

mod access;
mod steps;

use std::sync::Arc;

use access::Access;
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::Device;
use ravelin::devices::character::{Backend, GuestEnd};
use ravelin::devices::request::RequestQueue;
use ravelin::devices::serial::{COM1_GSI, PORTS, Serial};
use ravelin::platform::irq::{InterruptController, IrqLine};
use steps::steps;

#[derive(Arbitrary, Debug)]
enum Step {
    Access(Access),
    Input(Vec<u8>),
    MaySend,
    Reset,
}

struct Nobody;

impl InterruptController for Nobody {
    fn line_changed(&self, _gsi: u32, _asserted: bool) {}
    fn pulse(&self, gsi: u32) {
        assert_eq!(gsi, COM1_GSI);
    }
}

fuzz_target!(|input: &[u8]| {
    let requests = RequestQueue::new().expect("a descriptor");
    let host = Backend::Null.open(&requests).expect("nothing to open");
    let serial = Serial::new(host, IrqLine::new(Arc::new(Nobody), COM1_GSI));
    for step in steps::<Step>(input) {
        match step {
            Step::Access(access) => access.run(&*serial, PORTS),
            Step::Input(bytes) => {
                let taken = serial.receive(&bytes);
                assert!(taken <= bytes.len().min(64), "{taken} of {}", bytes.len());
            }
            Step::MaySend => serial.may_send(),
            Step::Reset => serial.reset(),
        }
    }
});
