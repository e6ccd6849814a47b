//! What a guest should see of a planned PCI tree, and what it does see.
//!
//! The plan is turned into what the guest's tools print (`lspci -t`, /proc/iomem) or their output into facts
//! (`lspci -vvv`), so that equality is plain equality and a difference shows both sides.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use ravelin::pci::tree::{Bar, BarKind, ECAM_BYTES_PER_BUS, Node, PciTree, Windows};
use ravelin::platform::addr::Sbdf;

/// One function as `lspci -vvv -nn` tells of it, in a form that the plan gives as well.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Function {
    /// `vendor:device`.
    pub(crate) ids: String,
    /// Base class and sub-class, four digits.
    pub(crate) class: String,
    /// "0 memory 32 febd0000 4096" and so on: register, kind, address, size.
    pub(crate) regions: BTreeSet<String>,
    /// Secondary and subordinate bus.
    pub(crate) buses: Option<(u8, u8)>,
    /// Open windows: "io", "memory" or "prefetchable", first and last address.
    pub(crate) windows: BTreeSet<String>,
    /// Whether it has a pin and which interrupt it got; only presence can be planned.
    pub(crate) pin: Option<char>,
}

/// Every planned function.
pub(crate) fn planned(tree: &PciTree) -> BTreeMap<String, Function> {
    tree.nodes()
        .map(|(segment, node)| {
            (
                Sbdf {
                    segment,
                    bdf: node.bdf,
                }
                .to_string(),
                planned_function(node),
            )
        })
        .collect()
}

fn planned_function(node: &Node) -> Function {
    let identity = &node.identity;
    Function {
        ids: format!("{:04x}:{:04x}", identity.vendor, identity.device),
        class: format!("{:04x}", identity.class >> 8),
        regions: node.bars.iter().map(planned_region).collect(),
        buses: node
            .bridge
            .as_ref()
            .map(|bridge| (bridge.secondary, bridge.subordinate)),
        windows: node
            .bridge
            .as_ref()
            .map(|bridge| planned_windows(&bridge.windows))
            .unwrap_or_default(),
        pin: node.intx.map(|intx| char::from(b'A' - 1 + intx.pin as u8)),
    }
}

fn planned_region(bar: &Bar) -> String {
    let kind = match bar.kind {
        BarKind::Io => "io",
        BarKind::Mem32 { prefetchable: false } => "memory 32",
        BarKind::Mem32 { prefetchable: true } => "memory 32 prefetchable",
        BarKind::Mem64 { prefetchable: false } => "memory 64",
        BarKind::Mem64 { prefetchable: true } => "memory 64 prefetchable",
    };
    format!("{} {kind} {:x} {}", bar.index, bar.address, bar.size)
}

fn planned_windows(windows: &Windows) -> BTreeSet<String> {
    let memory = |name: &'static str| {
        move |w: ravelin::platform::addr::GpaRange| format!("{name} {:x}-{:x}", w.start().0, w.last().0)
    };
    windows
        .io
        .map(|w| format!("io {:x}-{:x}", w.start(), w.last()))
        .into_iter()
        .chain(windows.mem32.map(memory("memory")))
        .chain(windows.mem64.map(memory("prefetchable")))
        .collect()
}

/// The functions in the output of `lspci -D -nn -vvv`.
pub(crate) fn listed(output: &str) -> BTreeMap<String, Function> {
    let mut functions = BTreeMap::new();
    for record in output
        .split("\n\n")
        .map(str::trim_start)
        .filter(|record| !record.is_empty())
    {
        let (address, _) = record
            .split_once(' ')
            .unwrap_or_else(|| panic!("no address in: {record}"));
        functions.insert(address.to_owned(), listed_function(record));
    }
    functions
}

fn listed_function(record: &str) -> Function {
    let mut lines = record.lines();
    let title = lines.next().expect("a record has a line");
    let bracketed: Vec<&str> = title
        .split('[')
        .skip(1)
        .filter_map(|rest| Some(rest.split_once(']')?.0))
        .collect();
    let mut function = Function {
        class: bracketed.first().copied().unwrap_or_default().to_owned(),
        ids: bracketed
            .iter()
            .find(|text| text.contains(':'))
            .copied()
            .unwrap_or_default()
            .to_owned(),
        ..Function::default()
    };
    for line in lines.map(str::trim) {
        if let Some(rest) = line.strip_prefix("Region ") {
            function.regions.insert(listed_region(rest));
        } else if let Some(rest) = line.strip_prefix("Bus: ") {
            function.buses = Some((bus(rest, "secondary="), bus(rest, "subordinate=")));
        } else if let Some(rest) = line.strip_prefix("I/O behind bridge: ") {
            function.windows.extend(listed_window("io", rest));
        } else if let Some(rest) = line.strip_prefix("Memory behind bridge: ") {
            function.windows.extend(listed_window("memory", rest));
        } else if let Some(rest) = line.strip_prefix("Prefetchable memory behind bridge: ") {
            function.windows.extend(listed_window("prefetchable", rest));
        } else if let Some(rest) = line.strip_prefix("Interrupt: pin ") {
            function.pin = rest.chars().next();
        }
    }
    function
}

/// `0: Memory at febd0000 (64-bit, prefetchable) [size=16K]`, or `1: I/O ports at 1000 [size=32]`.
fn listed_region(text: &str) -> String {
    let (index, rest) = text.split_once(": ").unwrap_or((text, ""));
    let address = rest
        .split_once(" at ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .unwrap_or("nowhere");
    let size = rest
        .split_once("[size=")
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or(0, |(size, _)| bytes(size));
    let kind = match (
        rest.starts_with("I/O"),
        rest.contains("64-bit"),
        rest.contains("non-prefetchable"),
    ) {
        (true, _, _) => "io",
        (_, false, true) => "memory 32",
        (_, false, false) => "memory 32 prefetchable",
        (_, true, true) => "memory 64",
        (_, true, false) => "memory 64 prefetchable",
    };
    // A region that is switched off or has no address is no planned one.
    let flaw = ["[disabled]", "[virtual]", "<unassigned>", "<ignored>", "<broken>"]
        .iter()
        .find(|flaw| text.contains(**flaw));
    format!("{index} {kind} {address} {size}{}", flaw.unwrap_or(&""))
}

/// `fe000000-fe1fffff [size=2M] [32-bit]`; nothing for a closed window.
fn listed_window(name: &str, text: &str) -> Option<String> {
    let range = text.split(' ').next()?;
    let (first, last) = range.split_once('-')?;
    let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then(|| format!("{name} {first:x}-{last:x}"))
}

fn bus(text: &str, name: &str) -> u8 {
    let digits = text
        .split_once(name)
        .map_or("", |(_, rest)| rest.get(..2).unwrap_or(""));
    u8::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("no {name} in `{text}`"))
}

fn bytes(size: &str) -> u64 {
    let (digits, unit) = size.split_at(size.find(|c: char| !c.is_ascii_digit()).unwrap_or(size.len()));
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        unknown => panic!("an unknown unit `{unknown}` in a size"),
    };
    digits.parse::<u64>().expect("digits") << shift
}

/// What /proc/iomem and /proc/ioports should say about the PCI tree: the entries `first-last : name`.
pub(crate) fn planned_resources(tree: &PciTree) -> BTreeSet<String> {
    let mut entries = BTreeSet::new();
    for segment in &tree.segments {
        for root in &segment.roots {
            let (first, last) = (*root.buses.start(), *root.buses.end());
            let at = |bus: u64| segment.ecam.start().0 + bus * ECAM_BYTES_PER_BUS;
            let (start, end) = (at(first.into()), at(u64::from(last) + 1) - 1);
            let name = format!("PCI ECAM {:04x} [bus {first:02x}-{last:02x}]", segment.number);
            entries.insert(format!("{start:08x}-{end:08x} : {name}"));
            entries.extend(window_entries(&root.windows, segment.number, root.first_bus()));
        }
    }
    for (segment, node) in tree.nodes() {
        let name = Sbdf {
            segment,
            bdf: node.bdf,
        };
        for bar in &node.bars {
            let last = bar.address + bar.size - 1;
            let width = if bar.kind == BarKind::Io { 4 } else { 8 };
            entries.insert(format!("{:0width$x}-{last:0width$x} : {name}", bar.address));
        }
        if let Some(bridge) = &node.bridge {
            entries.extend(window_entries(&bridge.windows, segment, bridge.secondary));
        }
    }
    entries
}

fn window_entries(windows: &Windows, segment: u16, bus: u8) -> Vec<String> {
    let name = format!("PCI Bus {segment:04x}:{bus:02x}");
    let io = windows.io.map(|w| format!("{w} : {name}"));
    let memory = [windows.mem32, windows.mem64]
        .into_iter()
        .flatten()
        .map(|w| format!("{w} : {name}"));
    io.into_iter().chain(memory).collect()
}

/// The entries about the PCI tree in /proc/iomem and /proc/ioports.
pub(crate) fn listed_resources(files: &str) -> BTreeSet<String> {
    let about_pci = |name: &str| {
        let address =
            name.len() == "0000:00:00.0".len() && name.as_bytes()[4] == b':' && name.as_bytes()[10] == b'.';
        address || name.starts_with("PCI Bus ") || name.starts_with("PCI ECAM ")
    };
    files
        .lines()
        .map(str::trim)
        .filter(|line| line.split_once(" : ").is_some_and(|(_, name)| about_pci(name)))
        .map(str::to_owned)
        .collect()
}

/// What `lspci -t` prints for the tree: segments and root buses in ascending order, a bus with one device on
/// the same line.
pub(crate) fn planned_picture(tree: &PciTree) -> String {
    let mut picture = String::new();
    for segment in &tree.segments {
        let last = segment.roots.len() - 1;
        for (at, root) in segment.roots.iter().enumerate() {
            let label = format!("[{:04x}:{:02x}]-", segment.number, root.first_bus());
            let line = match (last, at) {
                (0, _) => format!("-{label}"),
                (_, 0) => format!("-+-{label}"),
                (_, at) if at < last => format!(" +-{label}"),
                _ => format!(" \\-{label}"),
            };
            draw_bus(&root.functions, &line, &mut picture);
        }
    }
    picture
}

fn draw_bus(nodes: &[Node], line: &str, picture: &mut String) {
    match nodes {
        [] => writeln!(picture, "{line}").expect("a string takes text"),
        [only] => draw_node(only, &format!("{line}--"), picture),
        [first, middle @ .., last] => {
            draw_node(first, &format!("{line}+-"), picture);
            let margin = margin(line);
            for node in middle {
                draw_node(node, &format!("{margin}+-"), picture);
            }
            draw_node(last, &format!("{margin}\\-"), picture);
        }
    }
}

fn draw_node(node: &Node, line: &str, picture: &mut String) {
    let name = format!("{line}{:02x}.{}", node.bdf.device(), node.bdf.function());
    match &node.bridge {
        None => writeln!(picture, "{name}").expect("a string takes text"),
        Some(bridge) if bridge.secondary == bridge.subordinate => {
            draw_bus(
                &bridge.children,
                &format!("{name}-[{:02x}]--", bridge.secondary),
                picture,
            );
        }
        Some(bridge) => {
            let buses = format!("[{:02x}-{:02x}]", bridge.secondary, bridge.subordinate);
            draw_bus(&bridge.children, &format!("{name}-{buses}--"), picture);
        }
    }
}

/// What stands to the left of the lines after `line`: its verticals go on.
fn margin(line: &str) -> String {
    line.chars()
        .map(|c| if matches!(c, '+' | '|') { '|' } else { ' ' })
        .collect()
}

#[test]
fn a_bridge_is_read_out_of_lspci() {
    let output = "\
0000:00:01.0 PCI bridge [0604]: Red Hat, Inc. QEMU PCIe Root port [1b36:000c] (prog-if 00 [Normal decode])
\tInterrupt: pin A routed to IRQ 24
\tRegion 0: Memory at febd0000 (32-bit, non-prefetchable) [size=4K]
\tRegion 2: Memory at 380000000000 (64-bit, prefetchable) [size=16K]
\tBus: primary=00, secondary=01, subordinate=0f, sec-latency=0
\tI/O behind bridge: 0000f000-00000fff [disabled] [32-bit]
\tMemory behind bridge: fe000000-fe1fffff [size=2M] [32-bit]
\tPrefetchable memory behind bridge: 0000380000000000-00003807ffffffff [size=32G] [64-bit]

0001:40:00.0 Ethernet controller [0200]: Red Hat, Inc. Virtio 1.0 network device [1af4:1041] (rev 01)
\tRegion 0: I/O ports at 1000 [size=32]
";
    let functions = listed(output);
    let bridge = &functions["0000:00:01.0"];
    assert_eq!(
        (bridge.class.as_str(), bridge.ids.as_str()),
        ("0604", "1b36:000c")
    );
    assert_eq!(bridge.buses, Some((1, 15)));
    assert_eq!(bridge.pin, Some('A'));
    let regions = [
        "0 memory 32 febd0000 4096",
        "2 memory 64 prefetchable 380000000000 16384",
    ];
    assert_eq!(
        bridge.regions.iter().map(String::as_str).collect::<Vec<_>>(),
        regions
    );
    let windows = [
        "memory fe000000-fe1fffff",
        "prefetchable 380000000000-3807ffffffff",
    ];
    assert_eq!(
        bridge.windows.iter().map(String::as_str).collect::<Vec<_>>(),
        windows
    );
    assert_eq!(
        functions["0001:40:00.0"].regions.first().map(String::as_str),
        Some("0 io 1000 32")
    );
}

#[test]
fn only_entries_about_pci_are_taken_from_iomem() {
    let files = "00000000-0009ffff : System RAM\n  e0000000-efffffff : PCI ECAM 0000 [bus 00-ff]\n\
        d0000000-dfffffff : PCI Bus 0000:00\n  d0000000-d0003fff : 0000:00:01.0\n    d0000000-d0003fff : virtio-pci\n";
    assert_eq!(listed_resources(files).len(), 3);
}
