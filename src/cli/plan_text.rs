//! A plan for people: what the machine is made of, in a few lines.

use std::path::Path;

use ravelin::vm::config::values::size_text;
use ravelin::vm::plan::{
    BlockPlan, BootPlan, BootProtocol, CharBackend, DeviceKind, Doorbell, MemoryBacking, MemoryPlan,
    NetBackend, NetPlan, OnReboot, PageTable, Plan, ViommuOffer, ViommuPlan,
};

use super::topology;

/// Everything the plan decides.
pub(super) fn text(plan: &Plan) -> String {
    let mut lines = vec![
        row("processors", &processors(plan)),
        row("memory", &memory(&plan.memory)),
    ];
    lines.extend(
        plan.memory
            .regions
            .iter()
            .map(|region| row("", &region.to_string())),
    );
    match &plan.boot {
        Some(boot) => lines.extend(self::boot(boot)),
        None => lines.push(row("kernel", "none")),
    }
    lines.push(row("serial", &stream(&plan.serial)));
    lines.push(row("board", &board(plan)));
    for device in &plan.devices {
        lines.push(row(&device.name, &self::device(&device.kind)));
    }
    for viommu in &plan.viommus {
        lines.push(row(&viommu.name, &self::viommu(viommu)));
        lines.push(row("", &format!("covers {}", viommu.covers.join(", "))));
        if !viommu.stands_for.is_empty() {
            let host = viommu.stands_for.join(" and ");
            lines.push(row("", &format!("stands for {host} of the host")));
        }
    }
    lines.push(String::new());
    lines.join("\n") + "\n" + &topology::tree(plan)
}

fn row(name: &str, what: &str) -> String {
    format!("{name:<12} {what}").trim_end().to_owned()
}

fn processors(plan: &Plan) -> String {
    let cpus = &plan.cpus;
    let pinned = cpus
        .pinning
        .iter()
        .flatten()
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    let last = cpus.apic_ids.last().copied().unwrap_or(0);
    let mut text = format!(
        "{} vCPUs: sockets {}, cores {}, threads {}; APIC IDs 0 to {last}",
        cpus.count, cpus.sockets, cpus.cores, cpus.threads
    );
    if !pinned.is_empty() {
        text.push_str(&format!("; on host CPUs [{}]", pinned.join(",")));
    }
    text
}

fn memory(memory: &MemoryPlan) -> String {
    let mut text = size_text(memory.size);
    match memory.backing {
        MemoryBacking::Anonymous => {}
        MemoryBacking::Shared => text.push_str(", shared"),
        MemoryBacking::HugePages { page_size, shared } => {
            text.push_str(&format!(", in pages of {}", size_text(page_size)));
            text.push_str(if shared { ", shared" } else { "" });
        }
    }
    if memory.transparent_huge_pages {
        text.push_str(", transparent huge pages");
    }
    if memory.prefault {
        text.push_str(", prefaulted");
    }
    if let Some(node) = memory.host_numa_node {
        text.push_str(&format!(", from host node {node}"));
    }
    text
}

fn boot(boot: &BootPlan) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    let protocol = match boot.protocol {
        BootProtocol::Auto => "",
        BootProtocol::Linux => " (linux)",
        BootProtocol::Pvh => " (pvh)",
        BootProtocol::Multiboot => " (multiboot)",
    };
    let mut lines = vec![row("kernel", &format!("{}{protocol}", path(&boot.kernel)))];
    lines.extend(
        boot.initramfs
            .iter()
            .map(|initramfs| row("initramfs", &path(initramfs))),
    );
    for module in &boot.modules {
        lines.push(row(
            "module",
            &format!("{} {}", path(&module.path), module.cmdline),
        ));
    }
    lines.extend(boot.cmdline.iter().map(|cmdline| row("cmdline", cmdline)));
    lines
}

fn board(plan: &Plan) -> String {
    let board = plan.board;
    let mut parts = vec!["IOAPIC", "RTC"];
    parts.extend(board.hpet.then_some("HPET"));
    parts.extend(board.pvpanic.then_some("pvpanic"));
    parts.extend(board.exit_port.then_some("exit port"));
    let reset = match board.on_reboot {
        OnReboot::Restart => "a reset restarts it",
        OnReboot::Exit => "a reset ends it",
    };
    format!("{}; {reset}", parts.join(", "))
}

fn stream(backend: &CharBackend) -> String {
    match backend {
        CharBackend::Null => "null".to_owned(),
        CharBackend::Stdio => "stdio".to_owned(),
        CharBackend::Pty => "pty".to_owned(),
        CharBackend::File(path) => format!("file:{}", path.display()),
        CharBackend::Socket(path) => format!("socket:{}", path.display()),
    }
}

fn device(kind: &DeviceKind) -> String {
    match kind {
        DeviceKind::Block(block) => disk(block),
        DeviceKind::Net(net) => nic(net),
        DeviceKind::Console(console) => format!("console on {}", stream(&console.backend)),
        DeviceKind::Rng(_) => "entropy source".to_owned(),
        DeviceKind::Vfio(vfio) => format!("the host's function {}", vfio.host),
        DeviceKind::Test(test) => format!("test device, {} MSI-X vectors", test.msix_vectors),
    }
}

fn viommu(viommu: &ViommuPlan) -> String {
    let ViommuOffer {
        xt,
        page_table,
        intremap,
        pasid_bits,
        ats,
        np_cache,
        virtualizable,
        large_irt,
        // Nobody has asked the host yet.
        five_levels: _,
        // What follows from it is told piece by piece.
        served: _,
    } = viommu.offer;
    let mode = viommu.mode.name();
    let because = viommu
        .because
        .as_ref()
        .map_or_else(String::new, |because| format!(" ({because})"));
    let tables = match page_table {
        PageTable::V1 => "v1 tables",
        PageTable::V2 => "v2 tables",
        PageTable::Any => "v1 or v2 tables",
    };
    let mut parts = vec![tables.to_owned()];
    parts.push(match (intremap, viommu.remaps_ioapic) {
        (false, _) => "no remapping told".to_owned(),
        (true, true) => "remaps interrupts, the IOAPIC's too".to_owned(),
        (true, false) => "remaps interrupts".to_owned(),
    });
    parts.extend(xt.then(|| "x2APIC".to_owned()));
    parts.extend((pasid_bits > 0).then(|| format!("{pasid_bits} PASID bits")));
    parts.extend(ats.then(|| "ATS".to_owned()));
    parts.extend(np_cache.then(|| "NpCache".to_owned()));
    parts.extend(large_irt.then(|| "2048 remapped interrupts a function".to_owned()));
    parts.extend(virtualizable.then(|| "serves guests".to_owned()));
    parts.extend((viommu.doorbell == Doorbell::Poll).then(|| "doorbell polled".to_owned()));
    let guests = viommu.guests.map_or_else(String::new, |guests| {
        format!(", those of guests {} and {}", guests.pages, guests.control)
    });
    format!(
        "AMD IOMMU, {mode}{because}, on {} at {:04x}:{}, registers {}{guests}: {}",
        viommu.root_complex,
        viommu.segment,
        viommu.bdf,
        viommu.mmio,
        parts.join(", ")
    )
}

fn disk(block: &BlockPlan) -> String {
    format!(
        "disk on {}{}{}, {} queues of {}, serial {}",
        block.path.display(),
        if block.readonly { ", read-only" } else { "" },
        if block.direct { ", direct" } else { "" },
        block.queues,
        block.queue_size,
        block.serial
    )
}

fn nic(net: &NetPlan) -> String {
    let backend = match &net.backend {
        NetBackend::None => "nothing".to_owned(),
        NetBackend::Tap(name) => format!("tap {name}"),
        NetBackend::Fds(fds) => format!("descriptors {fds:?}"),
    };
    let mtu = net.mtu.map_or(String::new(), |mtu| format!(", MTU {mtu}"));
    let pairs = if net.queue_pairs == 1 { "pair" } else { "pairs" };
    format!(
        "NIC on {backend}, {}{mtu}, {} queue {pairs} of {}{}",
        net.mac,
        net.queue_pairs,
        net.queue_size,
        if net.offload { ", offloads" } else { "" }
    )
}
