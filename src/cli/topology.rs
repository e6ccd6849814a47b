//! A planned PCI hierarchy for people, like `lspci -tv`, and for Graphviz.

use std::fmt::Write;

use ravelin::pci::tree::{BarKind, Bridge, Node, NodeKind, RootComplex, Windows};
use ravelin::vm::plan::{DeviceKind, Plan};

/// The hierarchy as a tree of lines.
pub(super) fn tree(plan: &Plan) -> String {
    let mut text = String::new();
    for segment in &plan.pci.segments {
        line(
            &mut text,
            &format!("segment {:04x}: ECAM {}", segment.number, segment.ecam),
        );
        for (at, root) in segment.roots.iter().enumerate() {
            let last = at + 1 == segment.roots.len();
            let root_text = root_text(plan, root);
            line(&mut text, &format!("{}{root_text}", branch("", last)));
            branches(&mut text, plan, &root.functions, deeper(last));
        }
    }
    text
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

fn branch(indent: &str, last: bool) -> String {
    format!("{indent}{}", if last { "`- " } else { "+- " })
}

fn deeper(last: bool) -> &'static str {
    if last { "   " } else { "|  " }
}

/// Lines for functions at one level and all below. Each level's indent is a level's parent's and its own.
fn branches(text: &mut String, plan: &Plan, functions: &[Node], indent: &str) {
    let mut levels = vec![(functions, 0, indent.to_owned())];
    while let Some((nodes, at, indent)) = levels.pop() {
        let Some(node) = nodes.get(at) else { continue };
        let last = at + 1 == nodes.len();
        line(
            text,
            &format!("{}{}", branch(&indent, last), node_text(plan, node)),
        );
        let below = format!("{indent}{}", deeper(last));
        levels.push((nodes, at + 1, indent));
        levels.push((node.children(), 0, below));
    }
}

fn root_text(plan: &Plan, root: &RootComplex) -> String {
    let viommu = plan.viommu_of(root).map_or(String::new(), |viommu| {
        format!(", behind {} ({})", viommu.name, viommu.mode.name())
    });
    format!(
        "{}: root complex, buses {:02x}-{:02x}{}{viommu}",
        root.name,
        root.buses.start(),
        root.buses.end(),
        windows_text(&root.windows)
    )
}

fn windows_text(windows: &Windows) -> String {
    let mut text = String::new();
    if let Some(io) = windows.io {
        text.push_str(&format!(", I/O {io}"));
    }
    if let Some(mem32) = windows.mem32 {
        text.push_str(&format!(", mem32 {mem32}"));
    }
    if let Some(mem64) = windows.mem64 {
        text.push_str(&format!(", mem64 {mem64}"));
    }
    text
}

fn node_text(plan: &Plan, node: &Node) -> String {
    let mut text = format!("{} {}: {}", node.bdf, node.name, what(plan, node.kind));
    text.push_str(&format!(
        " [{:04x}:{:04x}]",
        node.identity.vendor, node.identity.device
    ));
    if let Some(bridge) = &node.bridge {
        text.push_str(&bridge_text(bridge));
    }
    for bar in &node.bars {
        let last = bar.address + (bar.size - 1);
        let kind = match bar.kind {
            BarKind::Io => "I/O",
            BarKind::Mem32 { prefetchable: false } => "32-bit",
            BarKind::Mem32 { prefetchable: true } => "32-bit prefetchable",
            BarKind::Mem64 { prefetchable: false } => "64-bit",
            BarKind::Mem64 { prefetchable: true } => "64-bit prefetchable",
        };
        text.push_str(&format!(
            ", BAR {} {:08x}-{last:08x} {kind}",
            bar.index, bar.address
        ));
    }
    if let Some(intx) = node.intx {
        text.push_str(&format!(", INT{:?} to GSI {}", intx.pin, intx.gsi));
    }
    text
}

fn bridge_text(bridge: &Bridge) -> String {
    let slot = bridge.slot.map_or(String::new(), |slot| format!(", slot {slot}"));
    format!(
        ", buses {:02x}-{:02x}{slot}{}",
        bridge.secondary,
        bridge.subordinate,
        windows_text(&bridge.windows)
    )
}

fn what(plan: &Plan, kind: NodeKind) -> &'static str {
    let device = match kind {
        NodeKind::RootPort => return "root port",
        NodeKind::UpstreamPort => return "upstream port",
        NodeKind::DownstreamPort => return "downstream port",
        NodeKind::HostBridge => return "host bridge",
        NodeKind::IsaBridge => return "ISA bridge",
        NodeKind::Iommu(_) => return "IOMMU",
        NodeKind::Endpoint(index) => plan.devices.get(index).map(|device| &device.kind),
    };
    match device.expect("a planned endpoint points at a planned device") {
        DeviceKind::Block(_) => "virtio disk",
        DeviceKind::Net(_) => "virtio NIC",
        DeviceKind::Console(_) => "virtio console",
        DeviceKind::Rng(_) => "virtio entropy source",
        DeviceKind::Test(_) => "test device",
        DeviceKind::Vfio(_) => "host function",
    }
}

/// The hierarchy as a Graphviz graph.
pub(super) fn dot(plan: &Plan) -> String {
    let mut text = String::from(
        "digraph pci {\n  rankdir = LR;\n  node [shape = box, fontname = monospace];\n  edge [dir = none];\n",
    );
    for root in plan.pci.roots() {
        let viommu = plan
            .viommu_of(root)
            .map_or(String::new(), |viommu| format!("\\nbehind {}", viommu.name));
        let about = format!(
            "{}\\n{:04x}:[{:02x}-{:02x}]{viommu}",
            root.name,
            root.segment,
            root.buses.start(),
            root.buses.end()
        );
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  \"{}\" [label = \"{about}\", style = bold];", root.name);
        for node in &root.functions {
            let _ = writeln!(text, "  \"{}\" -> \"{}\";", root.name, node.name);
        }
        for node in root.nodes() {
            let about = format!("{}\\n{}\\n{}", node.name, node.bdf, what(plan, node.kind));
            let _ = writeln!(text, "  \"{}\" [label = \"{about}\"];", node.name);
            for child in node.children() {
                let _ = writeln!(text, "  \"{}\" -> \"{}\";", node.name, child.name);
            }
        }
    }
    text.push_str("}\n");
    text
}
