//! What a host offers, for people.

use ravelin::vm::config::values::size_text;
use ravelin::vm::host_report::{HostFunction, HostIommu, HostReport, IommuGroup, IommuKind, Mode};

/// The whole report.
pub(super) fn text(report: &HostReport) -> String {
    let yes = |there: bool, what: &str| {
        if there {
            what.to_owned()
        } else {
            "not there".to_owned()
        }
    };
    let mut lines = vec![
        row("processor", report.processor.as_deref().unwrap_or("unknown")),
        row("KVM", &kvm(report)),
        row("iommufd", &yes(report.iommufd, "/dev/iommu")),
        row("VFIO groups", &yes(report.vfio_groups, "/dev/vfio/vfio")),
        row("vfio-pci", &yes(report.vfio_pci, "loaded")),
        row(
            "memlock",
            &report.memlock.map_or_else(|| "unlimited".to_owned(), size_text),
        ),
    ];
    lines.push(String::new());
    if report.iommus.is_empty() {
        lines.push(row("IOMMUs", "none in use"));
    }
    lines.extend(report.iommus.iter().map(iommu));
    for group in &report.groups {
        lines.extend(self::group(group));
    }
    if !report.ungrouped.is_empty() {
        lines.push(row("no group", "no IOMMU translates for these"));
        lines.extend(report.ungrouped.iter().flat_map(function));
    }
    lines.push(String::new());
    for mode in &report.modes {
        lines.extend(self::mode(mode));
    }
    lines.join("\n") + "\n"
}

fn row(name: &str, what: &str) -> String {
    format!("{name:<12} {what}").trim_end().to_owned()
}

fn kvm(report: &HostReport) -> String {
    let module = report.kvm.module.as_deref().unwrap_or("no module");
    let nested = match report.kvm.nested {
        Some(true) => ", nested",
        Some(false) => ", not nested",
        None => "",
    };
    match &report.kvm.usable {
        Ok(()) => format!("usable ({module}{nested})"),
        Err(why) => format!("not usable ({module}{nested}): {why}"),
    }
}

fn iommu(iommu: &HostIommu) -> String {
    let at = iommu
        .function
        .map_or(String::new(), |function| format!(" at {function}"));
    let kind = match iommu.kind {
        IommuKind::Amd { efr, efr2 } => {
            format!(
                "AMD{at}, EFR {efr:#x}, EFR2 {efr2:#x}: {}",
                iommu.kind.features().join(" ")
            )
        }
        IommuKind::Intel { cap, ecap } => format!("Intel{at}, CAP {cap:#x}, ECAP {ecap:#x}"),
        IommuKind::Other => format!("of another kind{at}"),
    };
    row(
        &iommu.name,
        &format!("{kind}; serves {} functions", iommu.devices.len()),
    )
}

fn group(group: &IommuGroup) -> Vec<String> {
    let domain = group.domain.as_deref().unwrap_or("unknown");
    let head = row(&format!("group {}", group.number), &format!("domain {domain}"));
    let functions = group.functions.iter().flat_map(function);
    std::iter::once(head).chain(functions).collect()
}

/// What it is, and below that whether a guest can have it.
fn function(function: &HostFunction) -> [String; 2] {
    let id = |id: Option<u16>| id.map_or_else(|| "????".to_owned(), |id| format!("{id:04x}"));
    let class = function
        .class
        .map_or_else(|| "??????".to_owned(), |class| format!("{class:06x}"));
    let driver = function.driver.as_deref().unwrap_or("no driver");
    let mut text = format!(
        "{} [{}:{}] class {class}, {driver}",
        function.address,
        id(function.vendor),
        id(function.device)
    );
    if let Some(iommu) = &function.iommu {
        text.push_str(&format!(", behind {iommu}"));
    }
    if let Some(node) = function.numa_node {
        text.push_str(&format!(", node {node}"));
    }
    if let Some((now, most)) = function.virtual_functions {
        text.push_str(&format!(", {now} of {most} virtual functions"));
    }
    [row("", &text), row("", &format!("  {}", passing(function)))]
}

fn passing(function: &HostFunction) -> String {
    let why = match &function.passable {
        Ok(()) => None,
        Err(why) => Some(format!("cannot be passed now: {why}")),
    };
    let resets = match function.resets.join(", ") {
        none if none.is_empty() => "no reset".to_owned(),
        methods => format!("resets: {methods}"),
    };
    let node = function.node.as_ref().map(|node| node.display().to_string());
    let verdict = why.unwrap_or_else(|| "can be passed now".to_owned());
    [Some(resets), node, Some(verdict)]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("; ")
}

fn mode(mode: &Mode) -> Vec<String> {
    if mode.missing.is_empty() {
        return vec![row(mode.name, &format!("ready: {}", mode.gives))];
    }
    let head = row(mode.name, &format!("not ready: {}; it needs", mode.gives));
    std::iter::once(head)
        .chain(mode.missing.iter().map(|what| row("", &format!("- {what}"))))
        .collect()
}
