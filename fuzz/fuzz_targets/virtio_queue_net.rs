//! A card whose every look at guest memory is answered from the input, and whose frames are from it too.
//!
//! Nothing may panic or hang, and what reaches the host is a frame with a header that stays inside it.

#![no_main]

mod fed;

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use fed::FedMemory;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::virtio::net::Pair;

const HEADER: usize = 12;

fuzz_target!(|input: &[u8]| {
    let Some((choice, input)) = input.split_first() else {
        return;
    };
    let (ours, host) = UnixDatagram::pair().expect("a pair of sockets");
    for socket in [&ours, &host] {
        socket.set_nonblocking(true).expect("possible");
    }
    let memory = FedMemory::new(input, *choice);
    let (mut receive, mut transmit) = (fed::queue(0, *choice), fed::queue(1, *choice));
    let mut pair = Pair::new("net0".to_owned(), Some(Arc::new(ours)), choice & 16 != 0);
    for _ in 0..16 {
        let len = memory
            .next(2)
            .iter()
            .fold(0, |len, byte| len << 8 | usize::from(*byte));
        let mut frame = memory.next(HEADER);
        frame.resize(HEADER + len, 0x5a);
        // A full socket takes no more, as a tap would.
        let _dropped = host.send(&frame);
        if pair.receive(&memory, &mut receive).is_err() || pair.transmit(&memory, &mut transmit).is_err() {
            break;
        }
        let mut sent = vec![0; 1 << 17];
        while let Ok(len) = host.recv(&mut sent) {
            let header = &sent[..len][..HEADER];
            let short = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
            assert!(header[0] & !1 == 0, "only the checksum flag passes");
            assert!(header[0] == 0 || short(6) + short(8) + 2 <= len - HEADER);
            assert!(header[1] & 0x7f == 0 || short(4) != 0);
        }
        if memory.is_dry() {
            break;
        }
    }
});
