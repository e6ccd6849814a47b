//! A BAR as the guest reaches it: pages that are the device's own memory, and pages that are trapped.
//!
//! Trapped are the MSI-X table and its pending bits with all of their pages, what the host does not let map, and BARs
//! that are smaller than a page. Everything else costs the guest no exit, and other functions of the host reach it as well,
//! where the host lets them.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::host::{HostFunction, PAGE, Region};
use super::peers::Peers;
use crate::guest_warn;
use crate::iommu::iommufd::Shared;
use crate::pci::bar::BarSpec;
use crate::pci::tree::BarKind;
use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::device_memory::{DeviceMemory, DeviceMemoryHost, MappedDeviceMemory};

/// The mapped pages of one BAR.
pub(super) struct MappedBar {
    /// Its register.
    pub(super) index: u8,
    memory: Mutex<Memory>,
}

struct Memory {
    /// What other functions reach of the spans now; goes before them.
    shared: Vec<Shared>,
    /// What the guest has of the spans now; goes before them.
    live: Vec<Box<dyn MappedDeviceMemory>>,
    /// Where the guest has the BAR.
    at: Option<Gpa>,
    spans: Vec<Span>,
}

/// Pages of the BAR.
struct Span {
    /// Of the first byte, in the BAR.
    offset: u64,
    memory: Arc<DeviceMemory>,
    /// The same for other functions, where there are any and the host lets them.
    exported: Option<OwnedFd>,
}

impl MappedBar {
    /// The BAR `spec` of `host`, of which `trapped` are not mapped, for the guest and for `peers`.
    pub(super) fn new(
        name: &str,
        host: &dyn HostFunction,
        spec: &BarSpec,
        trapped: &[Range<u64>],
        peers: Option<&Peers>,
    ) -> Self {
        let region = Region::Bar(spec.index);
        let mappable = match spec.kind {
            BarKind::Io => Vec::new(),
            BarKind::Mem32 { .. } | BarKind::Mem64 { .. } => host.region(region).mappable,
        };
        let mut mapped = Vec::new();
        for (offset, len) in spans(&mappable, trapped) {
            match host.map(region, offset, len) {
                Ok(memory) => mapped.push(Span {
                    offset,
                    memory,
                    exported: peers.and_then(|peers| peers.export(host, region, offset, len)),
                }),
                // It works without, an exit per access.
                Err(error) => tracing::warn!(
                    name, bar = spec.index, offset, len, %error,
                    "the host does not map a stretch of the BAR; every access to it will cost an exit"
                ),
            }
        }
        Self {
            index: spec.index,
            memory: Mutex::new(Memory {
                shared: Vec::new(),
                live: Vec::new(),
                at: None,
                spans: mapped,
            }),
        }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing of the device's memory is mapped from here on, wherever the guest has the BAR.
    pub(super) fn unmap(&self) {
        let mut memory = self.memory();
        memory.shared.clear();
        memory.live.clear();
        memory.spans.clear();
    }

    /// No other function reaches the BAR from here on.
    pub(super) fn withdraw(&self) {
        self.memory().shared.clear();
    }

    /// The others reach the BAR where the guest has it, whatever became of mappings that there were: a reset ends them.
    pub(super) fn share(&self, peers: &Peers) {
        self.memory().share(peers);
    }

    /// The guest has the BAR at `at` from here on, or nowhere.
    pub(super) fn moved(
        &self,
        name: &str,
        host: &dyn DeviceMemoryHost,
        peers: Option<&Peers>,
        at: Option<Gpa>,
    ) {
        let mut memory = self.memory();
        memory.shared.clear();
        memory.live.clear();
        memory.at = at;
        let Some(at) = at else { return };
        let Memory { live, spans, .. } = &mut *memory;
        for span in spans {
            let Some(at) = at.checked_add(span.offset) else {
                continue;
            };
            match host.map(at, &span.memory) {
                Ok(mapped) => live.push(mapped),
                Err(error) => {
                    let error: &(dyn std::error::Error + 'static) = &error;
                    guest_warn!(name, error, "accesses to a stretch of a BAR cost an exit each");
                }
            }
        }
        if let Some(peers) = peers {
            memory.share(peers);
        }
    }
}

impl Memory {
    fn share(&mut self, peers: &Peers) {
        // What was there goes first: it is in the way.
        self.shared.clear();
        let Some(at) = self.at else { return };
        for span in &self.spans {
            let range = at
                .checked_add(span.offset)
                .and_then(|at| GpaRange::new(at, span.memory.len()));
            let shared = range
                .zip(span.exported.as_ref())
                .and_then(|(range, exported)| peers.share(range, exported));
            self.shared.extend(shared);
        }
    }
}

/// The pages of `mappable` that have nothing of `trapped` in them, as offset and length, ascending.
fn spans(mappable: &[(u64, u64)], trapped: &[Range<u64>]) -> Vec<(u64, u64)> {
    let mut holes: Vec<Range<u64>> = trapped
        .iter()
        .filter(|range| !range.is_empty())
        .map(|range| range.start & !(PAGE - 1)..range.end.next_multiple_of(PAGE))
        .collect();
    holes.sort_by_key(|hole| hole.start);
    let mut found = Vec::new();
    for (start, len) in mappable {
        let mut at = start.next_multiple_of(PAGE);
        let end = start.saturating_add(*len) & !(PAGE - 1);
        for hole in &holes {
            let until = hole.start.min(end);
            if at < until {
                found.push((at, until - at));
            }
            at = at.max(hole.end);
        }
        if at < end {
            found.push((at, end - at));
        }
    }
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One stretch that is trapped.
    fn trap(start: u64, end: u64) -> Vec<Range<u64>> {
        std::iter::once(start..end).collect()
    }

    #[test]
    fn without_anything_to_trap_all_is_one_span() {
        assert_eq!(spans(&[(0, 0x2_0000)], &[]), [(0, 0x2_0000)]);
        assert_eq!(spans(&[], &trap(0, 0x10)), []);
    }

    #[test]
    fn the_pages_of_table_and_pending_bits_are_left_out_in_either_order() {
        let expected = [(0, 0x2000), (0x4000, 0x1000), (0x6000, 0x2000)];
        assert_eq!(spans(&[(0, 0x8000)], &[0x2ff0..0x3010, 0x5800..0x5808]), expected);
        // Pending bits before the table.
        assert_eq!(spans(&[(0, 0x8000)], &[0x5800..0x5808, 0x2ff0..0x3010]), expected);
    }

    #[test]
    fn a_bar_that_is_all_table_or_smaller_than_a_page_has_no_span() {
        assert_eq!(
            spans(&[(0, 0x4000)], &[0..0x50, 0x2000..0x2008]),
            [(0x1000, 0x1000), (0x3000, 0x1000)]
        );
        assert_eq!(spans(&[(0, 0x1000)], &trap(0x20, 0x30)), []);
        assert_eq!(spans(&[(0, 0x80)], &[]), []);
    }

    #[test]
    fn holes_of_a_sparse_region_stay_holes_and_odd_ends_are_cut_to_pages() {
        assert_eq!(
            spans(&[(0x3800, 0x2000), (0, 0x1800)], &trap(0, 0)),
            [(0, 0x1000), (0x4000, 0x1000)]
        );
    }

    #[test]
    fn a_table_at_the_end_takes_the_last_pages() {
        assert_eq!(spans(&[(0, 0x4000)], &trap(0x3000, 0x4000)), [(0, 0x3000)]);
        assert_eq!(spans(&[(u64::MAX - 0xfff, 0x1000)], &[]), []);
    }
}
