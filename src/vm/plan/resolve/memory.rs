//! How much RAM, and what it is made of.

use crate::platform::addr::{GpaRange, PAGE_SIZE};
use crate::vm::config::said::ConfigError;
use crate::vm::config::sections::Memory;
use crate::vm::config::values::{HugePages, Switch, size_text};
use crate::vm::layout::{MAX_RAM, Ram};
use crate::vm::plan::{MemoryBacking, MemoryPlan};

use super::memory_source;

/// What a machine has when nobody says: enough for a distribution's kernel and initramfs.
const DEFAULT_SIZE: u64 = 512 << 20;
/// The least that holds boot structures and a small multiboot image.
const MIN_SIZE: u64 = 8 << 20;

fn on(switch: Option<Switch>, default: bool) -> bool {
    switch.map_or(default, |switch| switch.0)
}

/// Bytes per page of the backing.
fn page_size(said: Option<&Memory>) -> u64 {
    match said.and_then(|said| said.hugepages) {
        Some(HugePages::Of(size)) => size,
        Some(HugePages::Off) | None => PAGE_SIZE,
    }
}

/// How much RAM there is, and of what pages.
pub(super) fn ram(said: Option<&Memory>) -> Result<Ram, ConfigError> {
    let size = said
        .and_then(|said| said.size)
        .map_or(DEFAULT_SIZE, |size| size.0);
    let page = page_size(said);
    let wrong = |problem: String| Err(memory_source(said).wrong("size", problem));
    if !(MIN_SIZE..=MAX_RAM).contains(&size) {
        return wrong(format!(
            "a machine has {} to {} of RAM",
            size_text(MIN_SIZE),
            size_text(MAX_RAM)
        ));
    }
    if !size.is_multiple_of(page) {
        let below = size / page * page;
        let above = size_text(below + page);
        let near = if below < MIN_SIZE {
            above
        } else {
            format!("{} or {above}", size_text(below))
        };
        return wrong(format!(
            "no whole number of pages of {}; {near} would be",
            size_text(page)
        ));
    }
    Ok(Ram { size, page })
}

pub(super) fn resolve(
    said: Option<&Memory>,
    size: u64,
    regions: Vec<GpaRange>,
) -> Result<MemoryPlan, ConfigError> {
    let shared = on(said.and_then(|said| said.shared), false);
    let huge = said.and_then(|said| said.hugepages);
    let backing = match (huge, shared) {
        (Some(HugePages::Of(page_size)), shared) => MemoryBacking::HugePages { page_size, shared },
        (_, true) => MemoryBacking::Shared,
        (_, false) => MemoryBacking::Anonymous,
    };
    let pooled = matches!(backing, MemoryBacking::HugePages { .. });
    let asked = said.and_then(|said| said.thp);
    if pooled && on(asked, false) {
        let problem = "huge pages from the pool are never transparent; leave thp or hugepages out";
        return Err(memory_source(said).wrong("thp", problem));
    }
    Ok(MemoryPlan {
        size,
        regions,
        backing,
        transparent_huge_pages: !pooled && on(asked, true),
        prefault: on(said.and_then(|said| said.prefault), false),
        host_numa_node: said.and_then(|said| said.host_node),
    })
}
