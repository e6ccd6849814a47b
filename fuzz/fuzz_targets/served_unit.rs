//! A unit that a host serves, under any sequence of register accesses, stores to its device table, bus numbers, resets,
//! and refusals of the host.
//!
//! Holds: functions reach what registers and the table say, and less after a refusal; rings are on exactly while they are
//! to be; the host's objects are used and destroyed as a kernel wants it, and none is left.

#![no_main]

mod deeds;
mod steps;

use deeds::deeds;
use libfuzzer_sys::fuzz_target;
use ravelin::iommu::viommu::testing::Rig;

fuzz_target!(|input: &[u8]| {
    let rig = Rig::at_reset();
    rig.start();
    deeds(input).fold(true, |settled, deed| deed.perform_and_check(&rig, settled));
    rig.host.refuse_at(None);
    let host = rig.host.clone();
    drop(rig.unit);
    host.check();
    assert_eq!(host.left(), 0, "objects are left");
});
