//! The AMD IOMMU unit against a hostile guest: registers, memory and DMA from one input, every quadword of
//! memory answered from it, every request compared with the second translator.
#![no_main]

#[path = "../../tests/iommu/model.rs"]
mod model;
#[path = "../../tests/iommu/page.rs"]
mod page;
#[path = "../../tests/iommu/scribble.rs"]
mod scribble;

libfuzzer_sys::fuzz_target!(|input: &[u8]| scribble::run(input));
