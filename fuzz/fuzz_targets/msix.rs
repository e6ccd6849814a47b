//! Accesses of any width anywhere in a BAR with MSI-X structures, between interrupts and resets.
//!
//! Nothing may panic; a masked vector sends nothing; what was owed is sent once.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use ravelin::pci::access::DwordWrite;
use ravelin::pci::capability::{Msix, MsixLayout};
use ravelin::pci::testing::Messages;

#[derive(Arbitrary, Debug)]
enum Step {
    Control { lane: u8, bytes: [u8; 4], len: u8 },
    Write { offset: u16, bytes: [u8; 8], len: u8 },
    Read { offset: u64, len: u8 },
    WriteAnywhere { offset: u64, len: u8 },
    Signal { vector: u16 },
    RefuseRoutes { refuse: bool },
    BusMaster { enabled: bool },
    Reset,
}

const LAYOUT: MsixLayout = MsixLayout::new(0, 0x100, 70);

fuzz_target!(|steps: Vec<Step>| {
    let messages = Messages::new();
    let msix = Msix::new(LAYOUT, messages.port());
    let mut capability = msix.capability();
    for step in steps.into_iter().take(200) {
        match step {
            Step::Control { lane, bytes, len } => {
                let lane = usize::from(lane % 4);
                let len = (usize::from(len) % 4 + 1).min(4 - lane);
                if let Some(write) = DwordWrite::new(lane, &bytes[..len]) {
                    let _performed = capability.write(0, write);
                    msix.refresh();
                }
            }
            Step::Write { offset, bytes, len } => {
                msix.bar_write(0, u64::from(offset), &bytes[..usize::from(len) % 8 + 1]);
            }
            Step::Read { offset, len } => {
                msix.bar_read(0, offset, &mut [0; 8][..usize::from(len) % 8 + 1]);
            }
            Step::WriteAnywhere { offset, len } => {
                msix.bar_write(0, offset, &[0; 8][..usize::from(len) % 8 + 1]);
            }
            Step::Signal { vector } => {
                let before = messages.count();
                let may_send = msix.may_send(vector) && messages.requester().bus_master();
                msix.signal(vector);
                assert_eq!(messages.count() - before, u64::from(may_send), "vector {vector}");
            }
            Step::RefuseRoutes { refuse } => messages.refuse(refuse),
            Step::BusMaster { enabled } => messages.requester().set_bus_master(enabled),
            Step::Reset => capability.reset(),
        }
    }
});
