//! A unit that a unit of the host's serves, before a kernel that is none, under any sequence of register accesses, stores to
//! its device table, bus numbers, resets and hardware errors, and requests that the kernel fails, with any errno.
//!
//! Holds: the kernel takes every request, unless it is told not to; functions are attached to what registers and the table
//! say, and to less after a failure; rings are on exactly while they are to be; no object is left.

#![no_main]

mod deeds;
mod steps;

use deeds::deeds;
use libfuzzer_sys::fuzz_target;
use ravelin::iommu::iommufd::fake::{ERRNOS, Version};
use ravelin::iommu::iommufd::viommu::testing::Served;

fuzz_target!(|input: &[u8]| {
    let [version, errno, input @ ..] = input else {
        return;
    };
    let version = [Version::E, Version::D, Version::C, Version::A][usize::from(version & 3)];
    let served = Served::new(version, ERRNOS[usize::from(*errno) % ERRNOS.len()]);
    deeds(input).fold(true, |settled, deed| served.perform_and_check(&deed, settled));
    served.end();
});
