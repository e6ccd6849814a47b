//! An entropy source whose every look at guest memory is answered from the input.
//!
//! Nothing may panic or hang.

#![no_main]

mod fed;

use fed::FedMemory;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::virtio::rng::RngQueue;

fuzz_target!(|input: &[u8]| {
    let Some((choice, input)) = input.split_first() else {
        return;
    };
    let memory = FedMemory::new(input, *choice);
    let mut queue = fed::queue(0, *choice);
    for _ in 0..16 {
        if RngQueue::serve(&memory, &mut queue).is_err() || memory.is_dry() {
            break;
        }
    }
});
