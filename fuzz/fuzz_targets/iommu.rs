//! The AMD IOMMU unit against a hostile guest: registers, memory and DMA from one input, every quadword of
//! memory answered from it, every request compared with the second translator. Or against one that keeps to the rules,
//! behind which nothing stale may be used.
#![no_main]

#[path = "../../tests/iommu/driver.rs"]
#[expect(dead_code, reason = "a driver in miniature; the tests use all of it")]
mod driver;
#[path = "../../tests/iommu/model.rs"]
mod model;
#[path = "../../tests/iommu/orderly.rs"]
mod orderly;
#[path = "../../tests/iommu/page.rs"]
mod page;
#[path = "../../tests/iommu/scribble.rs"]
mod scribble;

libfuzzer_sys::fuzz_target!(|input: &[u8]| scribble::fed(input));
