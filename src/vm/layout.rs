//! The guest physical map and why each window is where it is.
//!
//! ```text
//! 0                     RAM, up to the 32-bit hole
//! pci hole .. 0xfebfffff  the ECAM of each segment, then the root complexes' 32-bit windows; at the end the
//!                       IOMMUs' registers, where there are some
//! 0xfec00000            IOAPIC
//! 0xfed00000            HPET, where there is one
//! 0xfed80000-0xfed8ffff nothing: Zen guests read the southbridge's reset status there and expect all ones
//! 0xfee00000-0xfeefffff local APICs; MSI writes
//! 4 GiB                 RAM, around the HyperTransport hole
//! after RAM             where IOMMUs that serve guests have these guests' registers, where there are some, then the root
//!                       complexes' 64-bit windows
//! ```
//!
//! All ECAMs lie below 4 GiB: Linux drops the whole MCFG table when one lies above, unless firmware of 2010 or
//! later vouches for it through SMBIOS. That costs RAM nothing, what the hole displaces continues at 4 GiB.

use serde::Serialize;

use crate::devices::{hpet, ioapic};
use crate::iommu::emulated::{self, GuestRegisters};
use crate::pci::assign::{AssignError, FunctionSpec, Measured, Pools, Space, TreeSpec, measure};
use crate::pci::tree::{ECAM_BYTES, NodeKind, PciTree, PortRange};
use crate::platform::addr::{Gpa, GpaRange};

/// The I/O APIC's registers: one page.
pub const IOAPIC: GpaRange = fixed(0xfec0_0000, ioapic::spec::WINDOW_LEN);
/// The HPET's registers.
pub const HPET: GpaRange = fixed(0xfed0_0000, hpet::WINDOW_LEN);
/// Local APICs, and where MSI writes go.
pub const LOCAL_APIC: GpaRange = fixed(0xfee0_0000, 0x10_0000);
/// The end of what PCI may use below 4 GiB: the fixed units begin here.
pub const PCI_HOLE_END: Gpa = Gpa(0xfec0_0000);
/// Addresses that AMD processors route to HyperTransport, not to memory: neither RAM nor a window may lie
/// there (AMD I/O Virtualization Technology Specification 2.1.2).
pub const HYPERTRANSPORT: GpaRange = fixed(0xfd_0000_0000, 0x3_0000_0000);
/// The first address that 32 bits do not reach.
pub const FOUR_GIB: Gpa = Gpa(1 << 32);

/// The highest address of a guest: physical addresses have 52 bits at most (AMD64 Architecture Programmer's
/// Manual Volume 2, 5.1).
const LAST_ADDRESS: u64 = (1 << 52) - 1;
/// The most RAM a machine has. Leaves most of the address space to windows.
pub const MAX_RAM: u64 = 64 << 40;
/// Where the PCI hole begins when little is asked of it.
const SMALLEST_HOLE_START: u64 = 3 << 30;
/// Where it begins at the earliest: a 32-bit kernel still finds 1 GiB of RAM in one piece.
const LARGEST_HOLE_START: u64 = 1 << 30;
/// The hole grows in steps of this, so that ECAMs in it are aligned.
const HOLE_STEP: u64 = 256 << 20;
/// Windows end at a multiple of this, so the registers of the IOMMUs behind them begin there.
const VIOMMU_ALIGN: u64 = 1 << 20;
/// 64-bit windows begin at a multiple of this.
const MEM64_ALIGN: u64 = 1 << 30;
/// Ports that I/O windows are cut from: those below belong to the board.
const IO_WINDOWS: PortRange = PortRange::new(0x1000, 0xffff).expect("constant");

const fn fixed(start: u64, len: u64) -> GpaRange {
    GpaRange::new(Gpa(start), len).expect("a constant range is not empty and does not wrap")
}

/// Where everything but RAM lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Where RAM below 4 GiB ends at the latest; the PCI hole begins here or less than a page of RAM further up.
    pub low_ram_end: Gpa,
    /// What the root complexes' 32-bit windows are cut from.
    pub mem32: GpaRange,
    /// The registers of the IOMMUs, one after the other; `None` when there are none.
    pub viommus: Option<GpaRange>,
    /// The registers of guests that IOMMUs serve, one IOMMU after the other; `None` when none serves any.
    pub guest_registers: Option<GpaRange>,
    /// From the first to the last of the root complexes' 64-bit windows; `None` when there is none.
    pub mem64: Option<GpaRange>,
    /// The highest address in use: the guest's and the host's processors must reach it.
    pub highest: Gpa,
}

/// A machine that has no room in guest physical space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// More ECAMs than fit below 4 GiB.
    #[error(
        "{segments} PCI segments do not fit: each has 256 MiB of configuration space below 4 GiB, and {most} \
         are the most"
    )]
    TooManySegments {
        /// How many there are.
        segments: usize,
        /// How many there may be.
        most: usize,
    },
    /// The hierarchy cannot be.
    #[error(transparent)]
    Pci(#[from] AssignError),
}

/// A guest physical map with everything in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapped {
    /// The windows.
    pub layout: Layout,
    /// RAM, ascending.
    pub ram: Vec<GpaRange>,
    /// The hierarchy with its addresses.
    pub pci: PciTree,
}

/// RAM that is to be laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ram {
    /// In bytes, at most [`MAX_RAM`].
    pub size: u64,
    /// Bytes of a page of what backs it, a power of two up to 1 GiB: [`Ram::size`] and all its ranges are multiples of
    /// this.
    pub page: u64,
}

/// Lay out `ram` and the hierarchy `spec` asks for, whose IOMMUs serve guests if `serving` says so.
pub fn map(ram: Ram, spec: &TreeSpec, serving: bool) -> Result<Mapped, LayoutError> {
    let measured = measure(spec)?;
    let viommus = viommu_registers(spec);
    let hole_end = viommus.map_or(PCI_HOLE_END, GpaRange::start);
    let (hole, ecam, mem32) = low_windows(&measured, hole_end)?;
    let low_ram_end = Gpa(hole.0 - hole.0 % ram.page);
    let ram = ram_regions(ram.size, low_ram_end);
    let ram_end = ram.last().map_or(0, |region| region.last().0 + 1);
    let guest_registers = serving.then(|| guest_registers(spec, ram_end)).flatten();
    let mem64_from = guest_registers.map_or(ram_end, |range| range.last().0 + 1);
    let pools = Pools {
        io: IO_WINDOWS,
        mem32,
        mem64: high_windows(&measured, mem64_from)?,
        ecam,
    };
    let pci = measured.place(&pools)?;
    let mem64 = span(pci.roots().filter_map(|root| root.windows.mem64));
    let top = [ram.last().copied(), guest_registers, mem64, Some(LOCAL_APIC)]
        .into_iter()
        .flatten();
    let highest = top.map(GpaRange::last).max().expect("the list is not empty");
    let layout = Layout {
        low_ram_end,
        mem32,
        viommus,
        guest_registers,
        mem64,
        highest,
    };
    Ok(Mapped { layout, ram, pci })
}

/// Where the registers of the IOMMUs among the functions of `spec` are: at the end of the PCI hole, and outside
/// every window, so that a guest never gives the addresses to a device.
fn viommu_registers(spec: &TreeSpec) -> Option<GpaRange> {
    let len = (units(spec) * emulated::MMIO_LEN).next_multiple_of(VIOMMU_ALIGN);
    GpaRange::new(Gpa(PCI_HOLE_END.0 - len), len)
}

/// How many IOMMUs there are.
fn units(spec: &TreeSpec) -> u64 {
    let is_unit = |function: &&FunctionSpec| matches!(function.kind, NodeKind::Iommu(_));
    spec.functions.iter().filter(is_unit).count() as u64
}

/// Where the registers of guests are that the IOMMUs among the functions of `spec` serve: after RAM, on one side of the
/// HyperTransport hole, and like the IOMMUs' own outside every window.
fn guest_registers(spec: &TreeSpec, ram_end: u64) -> Option<GpaRange> {
    let len = units(spec) * GuestRegisters::LEN;
    let base = ram_end.max(FOUR_GIB.0).next_multiple_of(MEM64_ALIGN);
    let nearest = GpaRange::new(Gpa(base), len)?;
    if !nearest.overlaps(HYPERTRANSPORT) {
        return Some(nearest);
    }
    GpaRange::new(Gpa(HYPERTRANSPORT.last().0 + 1), len)
}

/// The smallest hole up to `hole_end` that holds the ECAMs and the 32-bit windows.
fn low_windows(
    measured: &Measured<'_>,
    hole_end: Gpa,
) -> Result<(Gpa, Vec<GpaRange>, GpaRange), LayoutError> {
    let segments = measured.segments();
    let most = usize::try_from((PCI_HOLE_END.0 - LARGEST_HOLE_START) / ECAM_BYTES).expect("a dozen");
    if segments > most {
        return Err(LayoutError::TooManySegments { segments, most });
    }
    let ecam_at = |start: u64| (0..segments as u64).map(move |at| fixed(start + at * ECAM_BYTES, ECAM_BYTES));
    let mut start = SMALLEST_HOLE_START;
    loop {
        let ecam: Vec<GpaRange> = ecam_at(start).collect();
        let mem32 = start + segments as u64 * ECAM_BYTES;
        let tried = match hole_end
            .0
            .checked_sub(mem32)
            .and_then(|len| GpaRange::new(Gpa(mem32), len))
        {
            None => None,
            Some(pool) => match measured.root_windows(Space::Mem32, mem32..=pool.last().0) {
                Ok(_) => return Ok((Gpa(start), ecam, pool)),
                Err(error) => Some(error),
            },
        };
        match tried {
            Some(error) if start == LARGEST_HOLE_START => return Err(error.into()),
            _ => start -= HOLE_STEP,
        }
    }
}

/// Where the 64-bit windows go: after RAM, on one side of the HyperTransport hole.
fn high_windows(measured: &Measured<'_>, ram_end: u64) -> Result<GpaRange, LayoutError> {
    let base = ram_end.max(FOUR_GIB.0).next_multiple_of(MEM64_ALIGN);
    let below = HYPERTRANSPORT
        .start()
        .0
        .checked_sub(base)
        .and_then(|len| GpaRange::new(Gpa(base), len));
    let fits = |pool: &GpaRange| {
        let limits = pool.start().0..=pool.last().0;
        measured.root_windows(Space::Mem64, limits).is_ok()
    };
    if let Some(pool) = below.filter(fits) {
        return Ok(pool);
    }
    let base = base.max(HYPERTRANSPORT.last().0 + 1);
    measured.root_windows(Space::Mem64, base..=LAST_ADDRESS)?;
    Ok(fixed(base, LAST_ADDRESS - base + 1))
}

/// RAM from 0 to the hole, then from 4 GiB on, then from the end of the HyperTransport hole on.
fn ram_regions(size: u64, low_end: Gpa) -> Vec<GpaRange> {
    let places = [
        (0, low_end.0),
        (FOUR_GIB.0, HYPERTRANSPORT.start().0),
        (HYPERTRANSPORT.last().0 + 1, LAST_ADDRESS + 1),
    ];
    let mut left = size;
    let mut regions = Vec::new();
    for (start, end) in places {
        let len = left.min(end - start);
        regions.extend(GpaRange::new(Gpa(start), len));
        left -= len;
    }
    regions
}

/// From the first to the last of some ranges.
fn span(ranges: impl Iterator<Item = GpaRange>) -> Option<GpaRange> {
    ranges.reduce(|a, b| {
        let (start, last) = (a.start().min(b.start()), a.last().max(b.last()));
        fixed(start.0, last.0 - start.0 + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::assign::{Parent, RootSpec};
    use crate::pci::bar::BarSpec;
    use crate::pci::tree::{BarKind, Identity};

    fn roots(segments: u16) -> TreeSpec {
        let root = |segment| RootSpec {
            name: format!("rc{segment}"),
            segment,
            buses: None,
        };
        TreeSpec {
            roots: (0..segments).map(root).collect(),
            functions: Vec::new(),
        }
    }

    /// Root complexes of one segment.
    fn shared(roots: usize) -> TreeSpec {
        let root = |at| RootSpec {
            name: format!("rc{at}"),
            segment: 0,
            buses: None,
        };
        TreeSpec {
            roots: (0..roots).map(root).collect(),
            functions: Vec::new(),
        }
    }

    fn with_bar(kind: BarKind, size: u64) -> TreeSpec {
        let gpu = FunctionSpec {
            name: "gpu0".to_owned(),
            kind: NodeKind::Endpoint(0),
            identity: Identity::ROOT_PORT,
            parent: Parent::Root(0),
            slot: None,
            bars: vec![BarSpec { index: 0, kind, size }],
            intx: false,
            removable: false,
        };
        TreeSpec {
            functions: vec![gpu],
            ..roots(1)
        }
    }

    fn small_pages(size: u64) -> Ram {
        let page = 0x1000;
        Ram { size, page }
    }

    fn mapped(ram: u64, spec: &TreeSpec) -> Mapped {
        map(small_pages(ram), spec, false).expect("a machine that fits")
    }

    fn texts(ranges: &[GpaRange]) -> Vec<String> {
        ranges.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn little_ram_lies_below_the_hole() {
        let mapped = mapped(512 << 20, &roots(1));
        assert_eq!(texts(&mapped.ram), ["00000000-1fffffff"]);
        assert_eq!(mapped.pci.segments[0].ecam.to_string(), "c0000000-cfffffff");
        assert_eq!(mapped.layout.mem32.to_string(), "d0000000-febfffff");
    }

    #[test]
    fn ram_that_the_hole_displaces_continues_at_four_gib() {
        let mapped = mapped(4 << 30, &roots(1));
        assert_eq!(texts(&mapped.ram), ["00000000-bfffffff", "100000000-13fffffff"]);
        let window = mapped.pci.segments[0].roots[0].windows.mem64.expect("it has one");
        assert_eq!(window.start(), Gpa(0x1_4000_0000));
    }

    #[test]
    fn neither_ram_nor_windows_enter_the_hypertransport_hole() {
        for size in [900_u64 << 30, 1011 << 30, 1 << 40, 3 << 40, MAX_RAM] {
            let mapped = mapped(size, &roots(3));
            let windows = mapped.pci.roots().filter_map(|root| root.windows.mem64);
            let all: Vec<GpaRange> = mapped.ram.iter().copied().chain(windows).collect();
            assert!(all.iter().all(|range| !range.overlaps(HYPERTRANSPORT)), "{all:?}");
            assert_eq!(mapped.ram.iter().map(|range| range.len()).sum::<u64>(), size);
        }
    }

    #[test]
    fn nothing_overlaps_the_fixed_units() {
        // Linux on Zen reads and writes back 0xfed803c0, i2c-piix4 reads 0xfed80300.
        const SOUTHBRIDGE: GpaRange = fixed(0xfed8_0000, 0x1_0000);
        let mapped = mapped(8 << 30, &roots(4));
        let ecams = mapped.pci.segments.iter().map(|segment| segment.ecam);
        let all: Vec<GpaRange> = ecams
            .chain([mapped.layout.mem32])
            .chain(mapped.ram.clone())
            .collect();
        for unit in [IOAPIC, HPET, SOUTHBRIDGE, LOCAL_APIC] {
            assert!(all.iter().all(|range| !range.overlaps(unit)), "{unit}");
        }
    }

    #[test]
    fn ram_begins_and_ends_at_pages_of_what_backs_it() {
        let large = BarKind::Mem32 { prefetchable: false };
        for spec in [roots(1), roots(4), with_bar(large, 1 << 30)] {
            let (size, page) = (4 << 30, 1 << 30);
            let mapped = map(Ram { size, page }, &spec, false).expect("a machine that fits");
            let whole = |range: &GpaRange| (range.start().0 | range.len()).is_multiple_of(page);
            assert!(mapped.ram.iter().all(whole), "{:?}", mapped.ram);
            assert_eq!(mapped.ram.iter().map(|range| range.len()).sum::<u64>(), size);
        }
    }

    #[test]
    fn the_hole_grows_with_what_must_lie_below_four_gib() {
        let large = BarKind::Mem32 { prefetchable: false };
        assert_eq!(mapped(4 << 30, &roots(4)).layout.low_ram_end, Gpa(0xb000_0000));
        assert_eq!(
            mapped(4 << 30, &with_bar(large, 1 << 30)).layout.low_ram_end,
            Gpa(0x7000_0000)
        );
        let error = map(small_pages(4 << 30), &with_bar(large, 1 << 31), false)
            .expect_err("2 GiB at 2 GiB cover the local APIC");
        assert!(
            matches!(error, LayoutError::Pci(AssignError::WindowsDoNotFit { .. })),
            "{error:?}"
        );
    }

    /// The IOMMU of root complex number `root`.
    fn unit(root: usize) -> FunctionSpec {
        FunctionSpec {
            name: format!("iommu{root}"),
            kind: NodeKind::Iommu(root),
            identity: emulated::IDENTITY,
            parent: Parent::Root(root),
            slot: None,
            bars: Vec::new(),
            intx: false,
            removable: false,
        }
    }

    #[test]
    fn the_registers_of_iommus_are_at_the_end_of_the_hole_and_in_no_window() {
        let spec = |units| TreeSpec {
            functions: (0..units).map(unit).collect(),
            ..shared(65)
        };
        let one = mapped(4 << 30, &spec(1)).layout;
        assert_eq!(
            one.viommus.map(|r| r.to_string()).as_deref(),
            Some("feb00000-febfffff")
        );
        assert_eq!(one.mem32.last(), Gpa(0xfeaf_ffff));
        let many = mapped(4 << 30, &spec(65)).layout;
        assert_eq!(many.viommus.map(GpaRange::start), Some(Gpa(0xfea0_0000)));
        assert_eq!(mapped(4 << 30, &spec(0)).layout.viommus, None);
    }

    #[test]
    fn registers_of_guests_are_after_ram_and_before_every_window() {
        let spec = TreeSpec {
            functions: (0..3).map(unit).collect(),
            ..shared(3)
        };
        for (ram, start) in [
            (1 << 30, FOUR_GIB.0),
            (64 << 30, 0x10_4000_0000),
            (HYPERTRANSPORT.start().0 - (1 << 30), HYPERTRANSPORT.last().0 + 1),
        ] {
            let mapped = map(small_pages(ram), &spec, true).expect("a machine that fits");
            let all = mapped.layout.guest_registers.expect("they are asked for");
            assert_eq!(
                (all.start(), all.len()),
                (Gpa(start), 3 * GuestRegisters::LEN),
                "{ram:#x}"
            );
            assert!(mapped.ram.iter().all(|range| !range.overlaps(all)));
            let mut windows = mapped.pci.roots().filter_map(|root| root.windows.mem64);
            assert!(windows.all(|window| window.start() > all.last()));
            assert!(mapped.layout.highest >= all.last());
        }
        assert_eq!(mapped(1 << 30, &spec).layout.guest_registers, None);
    }

    #[test]
    fn segments_end_where_their_ecams_no_longer_fit() {
        assert!(map(small_pages(1 << 30), &roots(10), false).is_ok());
        let error = map(small_pages(1 << 30), &roots(12), false).expect_err("3 GiB of ECAM");
        assert_eq!(
            error,
            LayoutError::TooManySegments {
                segments: 12,
                most: 11
            }
        );
    }

    #[test]
    fn windows_too_large_for_the_space_below_one_tib_go_above() {
        let wide = BarKind::Mem64 { prefetchable: true };
        let mapped = mapped(4 << 30, &with_bar(wide, 1 << 40));
        assert_eq!(
            mapped.pci.nodes().next().expect("the gpu").1.bars[0].address,
            1 << 40
        );
        assert_eq!(mapped.layout.highest, Gpa((2 << 40) + (1 << 38) - 1));
    }
}
