//! A console whose every look at guest memory is answered from the input, and whose keys are from it too.
//!
//! Nothing may panic or hang, and it takes no more keys than are typed.

#![no_main]

mod fed;

use fed::FedMemory;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::character::Backend;
use ravelin::devices::request::RequestQueue;
use ravelin::devices::virtio::console::Console;

fuzz_target!(|input: &[u8]| {
    let Some((choice, input)) = input.split_first() else {
        return;
    };
    let requests = RequestQueue::new().expect("an eventfd");
    let host = Backend::Null.open(&requests).expect("nothing to open");
    let console = Console::new("console0", host).expect("an eventfd");
    let (keyboard, mut queues) = (console.guest_end(), console.queues());
    let memory = FedMemory::new(input, *choice);
    let (mut receive, mut transmit) = (fed::queue(0, *choice), fed::queue(1, *choice));
    for _ in 0..16 {
        let typed = memory.next(1).first().map_or(0, |len| usize::from(*len));
        let keys = memory.next(typed);
        assert!(keyboard.receive(&keys) <= keys.len());
        let served = queues.receive(&memory, &mut receive);
        if served.is_err() || queues.transmit(&memory, &mut transmit).is_err() || memory.is_dry() {
            break;
        }
    }
});
