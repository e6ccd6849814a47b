//! A disk whose every look at guest memory is answered from the input.
//!
//! Nothing may panic or hang, and the image keeps its size.

#![no_main]

mod fed;

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use fed::FedMemory;
use libfuzzer_sys::fuzz_target;
use ravelin::devices::virtio::Features;
use ravelin::devices::virtio::VirtioDevice;
use ravelin::devices::virtio::block::{Block, BlockConfig};
use ravelin::devices::virtio::worker::Turn;

const SIZE: u64 = 128 << 10;

fn disk() -> &'static (PathBuf, Block) {
    static DISK: OnceLock<(PathBuf, Block)> = OnceLock::new();
    DISK.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("ravelin-fuzz-{}.img", std::process::id()));
        let mut file = std::fs::File::create(&path).expect("a file");
        file.write_all(&vec![0x5a; usize::try_from(SIZE).expect("small")])
            .expect("written");
        let block = Block::open(&BlockConfig::new("disk0", &path)).expect("a good image");
        (path, block)
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, input)) = input.split_first() else {
        return;
    };
    let (path, disk) = disk();
    let memory = FedMemory::new(input, *choice);
    let mut queue = fed::queue(0, *choice);
    let features = if choice & 16 != 0 {
        disk.features()
    } else {
        Features::empty()
    };
    let server = disk.queue(features);
    for _ in 0..16 {
        match server.serve(&memory, &mut queue) {
            Ok(Turn::Again) => {}
            Ok(Turn::Idle) if !memory.is_dry() => {}
            Ok(Turn::Idle) | Err(_) => break,
        }
    }
    let len = std::fs::metadata(path).expect("there").len();
    assert_eq!(len, SIZE);
});
