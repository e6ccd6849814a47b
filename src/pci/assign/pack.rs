//! How much address space each bus needs, and what the root complexes' windows are.
//!
//! Sizes travel up: what is behind a bridge decides its window. On each bus the items lie in descending
//! order of alignment, so that natural alignment costs no gaps between BARs.

use std::cmp::Reverse;
use std::ops::RangeInclusive;

use crate::pci::tree::BarKind;
use crate::platform::addr::PAGE_SIZE;

use super::number::Numbered;
use super::{AssignError, Parent, Space};

/// The unit of a bridge's memory windows (PCI-to-PCI Bridge Architecture Specification 3.2.5.8).
const MEMORY_UNIT: u64 = 1 << 20;
/// The unit of a bridge's I/O window (3.2.5.6).
const IO_UNIT: u64 = 1 << 12;
/// A root complex's 64-bit window comes in steps of this: address space is plentiful there.
const ROOT_MEM64_UNIT: u64 = 1 << 28;
/// A root complex's 32-bit window is at least this while there are few of them.
const ROOT_MEM32_LEAST: u64 = 16 << 20;
/// How many root complexes are few: together they take half of the 1 GiB hole at most.
const FEW_ROOTS: usize = 32;
/// All three, in the order their results are kept.
pub(super) const SPACES: [Space; 3] = [Space::Io, Space::Mem32, Space::Mem64];

/// A hierarchy that is numbered but has no addresses yet.
#[derive(Debug)]
pub struct Measured<'a> {
    pub(super) numbered: Numbered<'a>,
    /// What each bus needs of each space, in the order of [`SPACES`].
    pub(super) needs: Vec<[Packed; 3]>,
}

/// What gets a stretch of address space.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// A BAR: the function and the position in its list.
    Bar(usize, usize),
    /// A bridge's window.
    Window(usize),
    /// A root complex's window.
    Root(usize),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) target: Target,
    pub(super) size: u64,
    align: u64,
}

/// Items side by side. Sizes saturate: what reaches the end of 64 bits fits nowhere and is refused later.
#[derive(Debug, Clone, Default)]
pub(super) struct Packed {
    /// Each item with its start, in ascending order.
    pub(super) starts: Vec<(Item, u64)>,
    /// The first address after the last item.
    end: u64,
    /// The strictest alignment among them.
    align: u64,
}

fn pack(base: u64, mut items: Vec<Item>) -> Packed {
    items.sort_by_key(|item| Reverse(item.align));
    let mut packed = Packed {
        starts: Vec::with_capacity(items.len()),
        end: base,
        align: items.first().map_or(1, |item| item.align),
    };
    for item in items {
        let start = packed
            .end
            .checked_next_multiple_of(item.align)
            .unwrap_or(u64::MAX);
        packed.starts.push((item, start));
        packed.end = start.saturating_add(item.size);
    }
    packed
}

fn unit(space: Space) -> u64 {
    match space {
        Space::Io => IO_UNIT,
        Space::Mem32 | Space::Mem64 => MEMORY_UNIT,
    }
}

fn rounded(size: u64, unit: u64) -> u64 {
    size.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}

/// Where a BAR goes. Behind a bridge only prefetchable BARs can be above 4 GiB, because the window there is
/// prefetchable; a root complex's windows are neither.
fn space_of(kind: BarKind, on_root: bool) -> Space {
    match kind {
        BarKind::Io => Space::Io,
        BarKind::Mem32 { .. } => Space::Mem32,
        BarKind::Mem64 { prefetchable } if prefetchable || on_root => Space::Mem64,
        BarKind::Mem64 { .. } => Space::Mem32,
    }
}

impl<'a> Measured<'a> {
    pub(super) fn new(numbered: Numbered<'a>) -> Self {
        let mut measured = Self {
            needs: vec![Default::default(); numbered.order.len()],
            numbered,
        };
        let roots = measured.numbered.spec.roots.len();
        // Children before parents: a window is as large as what is behind it.
        for at in (0..measured.numbered.met.len()).rev() {
            measured.measure_bus(roots + measured.numbered.met[at]);
        }
        (0..roots).for_each(|root| measured.measure_bus(root));
        measured
    }

    fn measure_bus(&mut self, bus: usize) {
        self.needs[bus] = SPACES.map(|space| {
            let items = self.numbered.order[bus]
                .iter()
                .flat_map(|at| self.items(*at, space));
            pack(0, items.collect())
        });
    }

    /// What one function takes of its bus.
    fn items(&self, at: usize, space: Space) -> Vec<Item> {
        let function = &self.numbered.spec.functions[at];
        let on_root = matches!(function.parent, Parent::Root(_));
        let bars = function.bars.iter().enumerate();
        let mut items: Vec<Item> = bars
            .filter(|(_, bar)| space_of(bar.kind, on_root) == space)
            .map(|(index, bar)| {
                // Two functions never share a page, so that each BAR can be mapped by itself.
                let size = if space == Space::Io {
                    bar.size
                } else {
                    bar.size.max(PAGE_SIZE)
                };
                Item {
                    target: Target::Bar(at, index),
                    size,
                    align: size,
                }
            })
            .collect();
        if let Some((size, align)) = self.window(self.numbered.spec.roots.len() + at, space) {
            items.push(Item {
                target: Target::Window(at),
                size,
                align,
            });
        }
        items
    }

    /// Size and alignment of the window that the bridge above `bus` needs.
    pub(super) fn window(&self, bus: usize, space: Space) -> Option<(u64, u64)> {
        let packed = &self.needs[bus][space as usize];
        let least = if space == Space::Mem32 && self.can_be_emptied(bus) {
            MEMORY_UNIT
        } else {
            0
        };
        let size = rounded(packed.end, unit(space)).max(least);
        (size > 0).then(|| (size, packed.align.max(unit(space))))
    }

    /// Whether `bus` is behind a port that something may leave while the guest runs.
    fn can_be_emptied(&self, bus: usize) -> bool {
        let functions = &self.numbered.spec.functions;
        let mut on_bus = self.numbered.order[bus].iter().map(|at| &functions[*at]);
        on_bus.any(|function| function.removable && matches!(function.parent, Parent::Port(_)))
    }

    /// How many segments there are.
    #[must_use]
    pub fn segments(&self) -> usize {
        let mut numbers: Vec<u16> = self.numbered.spec.roots.iter().map(|root| root.segment).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.len()
    }

    /// Cut the windows of all root complexes out of `pool`, first to last address: the start and size of
    /// each. With slack where there is room for it.
    pub fn root_windows(
        &self,
        space: Space,
        pool: RangeInclusive<u64>,
    ) -> Result<Vec<Option<(u64, u64)>>, AssignError> {
        let with_slack = self.cut(space, *pool.start(), true);
        let tight = self.cut(space, *pool.start(), false);
        let fits = |cut: &(u64, Vec<_>)| cut.0.checked_sub(1).is_none_or(|last| last <= *pool.end());
        [with_slack, tight.clone()]
            .into_iter()
            .find(fits)
            .map(|(_, windows)| windows)
            .ok_or_else(|| self.too_large(space, tight.0 - pool.start(), pool.end() - pool.start() + 1))
    }

    /// The end of all windows when they begin at `base`, and each window.
    fn cut(&self, space: Space, base: u64, slack: bool) -> (u64, Vec<Option<(u64, u64)>>) {
        let roots = self.numbered.spec.roots.len();
        let items: Vec<Item> = (0..roots)
            .filter_map(|root| {
                let (size, align) = self.root_window(root, space, slack)?;
                Some(Item {
                    target: Target::Root(root),
                    size,
                    align,
                })
            })
            .collect();
        let packed = pack(base, items);
        let mut windows = vec![None; roots];
        for (item, start) in packed.starts {
            if let Target::Root(root) = item.target {
                windows[root] = Some((start, item.size));
            }
        }
        (packed.end, windows)
    }

    fn root_window(&self, root: usize, space: Space, slack: bool) -> Option<(u64, u64)> {
        let need = self.window(root, space);
        let Some((size, align)) = need else {
            return match space {
                Space::Mem32 if slack && self.numbered.spec.roots.len() <= FEW_ROOTS => {
                    Some((ROOT_MEM32_LEAST, MEMORY_UNIT))
                }
                Space::Mem64 if slack => Some((ROOT_MEM64_UNIT, ROOT_MEM64_UNIT)),
                _ => None,
            };
        };
        if !slack {
            return Some((size, align));
        }
        let roomy = size.saturating_add(size / 4);
        Some(match space {
            Space::Io => (size, align),
            Space::Mem32 if self.numbered.spec.roots.len() <= FEW_ROOTS => {
                (rounded(roomy, MEMORY_UNIT).max(ROOT_MEM32_LEAST), align)
            }
            Space::Mem32 => (rounded(roomy, MEMORY_UNIT), align),
            Space::Mem64 => (rounded(roomy, ROOT_MEM64_UNIT), align.max(ROOT_MEM64_UNIT)),
        })
    }

    fn too_large(&self, space: Space, needed: u64, available: u64) -> AssignError {
        let need = |at: &usize| {
            let function = &self.numbered.spec.functions[*at];
            let on_root = matches!(function.parent, Parent::Root(_));
            let bars = function
                .bars
                .iter()
                .filter(|bar| space_of(bar.kind, on_root) == space);
            bars.map(|bar| bar.size).fold(0, u64::saturating_add)
        };
        let largest = self.numbered.met.iter().max_by_key(|at| need(at));
        AssignError::WindowsDoNotFit {
            space,
            needed,
            available,
            name: largest.map_or_else(String::new, |at| self.numbered.spec.functions[*at].name.clone()),
            largest: largest.map_or(0, need),
        }
    }
}
