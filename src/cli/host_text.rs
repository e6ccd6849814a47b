//! What a host offers, for people.

use ravelin::iommu::iommufd::viommu::Step;
use ravelin::platform::kvm::Capabilities;
use ravelin::vm::config::values::size_text;
use ravelin::vm::host_report::{
    HostFunction, HostIommu, HostReport, IommuGroup, IommuKind, Mode, UnitTrial, verdict,
};

/// The whole report.
pub(super) fn text(report: &HostReport) -> String {
    let yes = |there: bool, what: &str| {
        if there {
            what.to_owned()
        } else {
            "not there".to_owned()
        }
    };
    let iommufd = match report.kernel.unsafe_interrupts {
        Some(true) => "/dev/iommu, allow_unsafe_interrupts",
        Some(false) | None => "/dev/iommu",
    };
    let mut lines = vec![
        row("processor", report.processor.as_deref().unwrap_or("unknown")),
        row("kernel", report.kernel.release.as_deref().unwrap_or("unknown")),
        row("KVM", &kvm(report)),
    ];
    lines.extend(report.kvm.capabilities.iter().flat_map(capabilities));
    lines.extend([
        row("iommufd", &yes(report.iommufd, iommufd)),
        row("VFIO groups", &yes(report.vfio_groups, "/dev/vfio/vfio")),
        row("vfio-pci", &yes(report.vfio_pci, "loaded")),
        row(
            "memlock",
            &report.memlock.map_or_else(|| "unlimited".to_owned(), size_text),
        ),
    ]);
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
    match &report.trials {
        Ok(trials) => {
            lines.extend(trials.iter().flat_map(trial));
            lines.extend(trials.iter().filter_map(peers));
        }
        Err(why) => {
            lines.push(row("AMD's vIOMMU", &format!("not asked for: {why}")));
            lines.push(row("peer-to-peer", &format!("not asked for: {why}")));
        }
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
    let avic = match report.kvm.avic {
        Some(true) => ", avic",
        Some(false) => ", no avic",
        None => "",
    };
    match &report.kvm.usable {
        Ok(()) => format!("usable ({module}{nested}{avic})"),
        Err(why) => format!("not usable ({module}{nested}{avic}): {why}"),
    }
}

fn capabilities(kvm: &Capabilities) -> [String; 2] {
    let limits = format!(
        "{} vCPUs ({} recommended), APIC IDs up to {}, {} memory slots",
        kvm.vcpus, kvm.recommended_vcpus, kvm.apic_id, kvm.memory_slots
    );
    let lacks = match kvm.lacks.join(", ") {
        none if none.is_empty() => none,
        lacks => format!("; lacks {lacks}"),
    };
    let has = match kvm.has.join(", ") {
        none if none.is_empty() => "nothing that counts here".to_owned(),
        has => has,
    };
    [
        row("KVM limits", &limits),
        row("KVM has", &format!("{has}{lacks}")),
    ]
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

/// What the kernel answered for one IOMMU: every step of the version it answers to, or of the first that was tried.
fn trial(trial: &UnitTrial) -> Vec<String> {
    let of = format!("{} asked for with {}", trial.iommu, trial.function);
    let tried = match &trial.answers {
        Ok(tried) => tried,
        Err(why) => return vec![row("AMD's vIOMMU", &format!("{of}: {why}"))],
    };
    let mut lines = vec![row("AMD's vIOMMU", &format!("{of}, of which nothing is left"))];
    lines.extend(tried.steps.iter().map(step));
    let shown = tried.version().or(tried.versions.first());
    for version in &tried.versions {
        if shown == Some(version) {
            lines.push(row("", &format!("by version {}:", version.name)));
            lines.extend(version.steps.iter().map(step));
        } else {
            let refused = version
                .first_refusal()
                .map_or("every step ok".to_owned(), |step| {
                    format!("{} is the first that fails: {}", step.name, step.answer)
                });
            lines.push(row("", &format!("by version {}: {refused}", version.name)));
        }
    }
    lines.push(row("", &format!("version it answers to: {}", verdict(tried))));
    lines
}

/// Whether passed functions behind one IOMMU reach one another's memory, as far as the kernel tells without doing it.
fn peers(trial: &UnitTrial) -> Option<String> {
    let said = match trial.exports.as_ref()? {
        Ok(()) => "the kernel hands out its memory for other functions of a guest".to_owned(),
        Err(why) => format!("other functions of a guest will not reach its memory: {why}"),
    };
    let of = format!("{} asked for with {}", trial.iommu, trial.function);
    Some(row("peer-to-peer", &format!("{of}: {said}")))
}

fn step(step: &Step) -> String {
    row("", &format!("  {:<33} {}", step.name, step.answer))
}

fn mode(mode: &Mode) -> Vec<String> {
    let without = mode
        .without
        .iter()
        .map(|what| row("", &format!("- better with {what}")));
    let head = if mode.missing.is_empty() {
        format!("ready: {}", mode.gives)
    } else {
        format!("not ready: {}; it needs", mode.gives)
    };
    std::iter::once(row(mode.name, &head))
        .chain(mode.missing.iter().map(|what| row("", &format!("- {what}"))))
        .chain(without)
        .collect()
}

#[cfg(test)]
mod tests {
    use ravelin::iommu::iommufd::viommu::{Answer, Tried, VIOMMU_ALLOC, Version};

    use ravelin::vm::host_report::Probed;

    use super::*;

    /// The lines about a host's hypervisor and limits, which no recorded tree can tell.
    fn probed(
        kvm: Result<(), String>,
        capabilities: Option<Capabilities>,
        memlock: Option<u64>,
    ) -> Vec<String> {
        let host = tempfile::tempdir().expect("a folder");
        let probed = Probed {
            kvm,
            capabilities,
            memlock,
        };
        let text = super::text(&HostReport::read(host.path(), &probed));
        let lines = text.lines().map(str::to_owned);
        lines
            .filter(|line| line.starts_with("KVM") || line.starts_with("memlock"))
            .collect()
    }

    #[test]
    fn a_hypervisor_is_told_with_its_limits_and_what_it_lacks() {
        let capabilities = Capabilities {
            vcpus: 1024,
            recommended_vcpus: 16,
            apic_id: 4095,
            memory_slots: 32764,
            has: vec!["split irqchip", "irqfd"],
            lacks: vec!["irqfd resample"],
        };
        assert_eq!(
            probed(Ok(()), Some(capabilities), Some(8 << 20)),
            [
                "KVM          usable (no module)",
                "KVM limits   1024 vCPUs (16 recommended), APIC IDs up to 4095, 32764 memory slots",
                "KVM has      split irqchip, irqfd; lacks irqfd resample",
                "memlock      8M",
            ]
        );
    }

    #[test]
    fn without_a_hypervisor_its_line_says_why_and_there_are_no_limits() {
        let why = "cannot open /dev/kvm: Permission denied".to_owned();
        assert_eq!(
            probed(Err(why), None, None),
            [
                "KVM          not usable (no module): cannot open /dev/kvm: Permission denied",
                "memlock      unlimited",
            ]
        );
    }

    fn version(name: &'static str, answers: bool, steps: &[(&'static str, Answer)]) -> Version {
        let steps = steps.iter().map(|(name, answer)| Step {
            name,
            answer: answer.clone(),
        });
        Version {
            name,
            answers,
            steps: steps.collect(),
        }
    }

    fn text(versions: Vec<Version>) -> String {
        let unit = UnitTrial {
            iommu: "ivhd0".to_owned(),
            function: "0000:01:00.0".parse().expect("an address"),
            answers: Ok(Tried {
                features: None,
                steps: vec![Step {
                    name: "GET_HW_INFO",
                    answer: Answer::Ok,
                }],
                versions,
            }),
            exports: None,
        };
        trial(&unit).join("\n")
    }

    #[test]
    fn a_kernel_that_answers_to_nothing_is_told_by_each_step_of_the_first_version() {
        let refused = Answer::Refused {
            errno: "EOPNOTSUPP".to_owned(),
            hint: "it has none".to_owned(),
        };
        let first = [
            (VIOMMU_ALLOC, Answer::Ok),
            ("offset of the VF page", Answer::NotWritten),
            ("mmap of the VF page", Answer::NotAsked),
            ("HW_QUEUE_ALLOC", refused.clone()),
        ];
        let text = text(vec![
            version("v-e", false, &first),
            version("v-d", false, &[(VIOMMU_ALLOC, refused)]),
        ]);
        assert_eq!(
            text,
            "AMD's vIOMMU ivhd0 asked for with 0000:01:00.0, of which nothing is left\n\
             \x20              GET_HW_INFO                       ok\n\
             \x20            by version v-e:\n\
             \x20              VIOMMU_ALLOC                      ok\n\
             \x20              offset of the VF page             not written\n\
             \x20              mmap of the VF page               not asked\n\
             \x20              HW_QUEUE_ALLOC                    EOPNOTSUPP: it has none\n\
             \x20            by version v-d: VIOMMU_ALLOC is the first that fails: EOPNOTSUPP: it has none\n\
             \x20            version it answers to: none: a stock kernel, which makes a vIOMMU of any type and does \
             nothing about it"
        );
    }

    #[test]
    fn the_version_that_the_kernel_answers_to_is_the_one_that_is_shown() {
        let text = text(vec![
            version("v-e", false, &[(VIOMMU_ALLOC, Answer::NotAsked)]),
            version("v-d", true, &[(VIOMMU_ALLOC, Answer::Ok)]),
        ]);
        assert!(
            text.contains("by version v-e: VIOMMU_ALLOC is the first that fails: not asked\n"),
            "{text}"
        );
        assert!(text.contains("by version v-d:\n"), "{text}");
        assert!(text.ends_with("version it answers to: v-d"), "{text}");
    }

    #[test]
    fn a_function_that_could_not_be_had_says_why() {
        let unit = UnitTrial {
            iommu: "ivhd0".to_owned(),
            function: "0000:01:00.0".parse().expect("an address"),
            answers: Err("cannot open /dev/vfio/devices/vfio0: Permission denied".to_owned()),
            exports: None,
        };
        assert_eq!(
            trial(&unit),
            [
                "AMD's vIOMMU ivhd0 asked for with 0000:01:00.0: cannot open /dev/vfio/devices/vfio0: Permission denied"
            ]
        );
        assert_eq!(peers(&unit), None, "one reason is enough");
    }

    #[test]
    fn what_the_kernel_says_of_peers_is_told_with_the_function_it_was_asked_with() {
        let line = |exports| {
            let unit = UnitTrial {
                iommu: "ivhd0".to_owned(),
                function: "0000:01:00.0".parse().expect("an address"),
                answers: Err(String::new()),
                exports: Some(exports),
            };
            peers(&unit).expect("asked")
        };
        assert_eq!(
            line(Ok(())),
            "peer-to-peer ivhd0 asked for with 0000:01:00.0: the kernel hands out its memory for other functions of a guest"
        );
        assert_eq!(
            line(Err("it has no such feature".to_owned())),
            "peer-to-peer ivhd0 asked for with 0000:01:00.0: other functions of a guest will not reach its memory: it has no \
             such feature"
        );
    }
}
