//! Guests on one unit of the vIOMMU extension, each of which does anything, before a host that keeps its books or none:
//! no guest reaches another's devices, domains, memory, records or registers, and every call is bounded.
#![no_main]

#[path = "../../tests/iommu/crowd.rs"]
mod crowd;

libfuzzer_sys::fuzz_target!(|input: &[u8]| crowd::run(input));
