//! What the ACPI tables tell a guest, read back by a decoder of its own and compared with recorded text.
//!
//! One record per layout, in `tests/golden/acpi/`. A change there is a change of what guests see:
//! `cargo insta review` shows it, or `INSTA_UPDATE=always cargo test --test acpi` takes it.

mod decode;

use std::path::Path;

use ravelin::pci::assign::{BarSpec, FunctionSpec, Parent, RootSpec, Slot, TreeSpec};
use ravelin::pci::tree::{BarKind, Identity, NodeKind};
use ravelin::platform::addr::Gpa;
use ravelin::vm::boot::acpi::{Hardware, describe, tables};
use ravelin::vm::config::Config;
use ravelin::vm::layout::{self, Ram};
use ravelin::vm::plan::Plan;

const AT: Gpa = Gpa(0xe_0000);
const RAM: u64 = 1 << 30;

const PORT: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    class: 0x06_0400,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};
const NIC: Identity = Identity {
    vendor: 0x1af4,
    device: 0x1041,
    class: 0x02_0000,
    revision: 1,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1041,
};

/// A hierarchy in the making.
#[derive(Default)]
struct Hierarchy(TreeSpec);

impl Hierarchy {
    fn root(&mut self, segment: u16, buses: Option<std::ops::RangeInclusive<u8>>) -> Parent {
        let name = format!("rc{}", self.0.roots.len());
        self.0.roots.push(RootSpec { name, segment, buses });
        Parent::Root(self.0.roots.len() - 1)
    }

    fn add(
        &mut self,
        kind: NodeKind,
        identity: Identity,
        parent: Parent,
        slot: Option<Slot>,
        bars: Vec<BarSpec>,
    ) -> Parent {
        let name = format!("f{}", self.0.functions.len());
        let intx = !matches!(kind, NodeKind::IsaBridge);
        self.0.functions.push(FunctionSpec {
            name,
            kind,
            identity,
            parent,
            slot,
            bars,
            intx,
            removable: false,
        });
        Parent::Port(self.0.functions.len() - 1)
    }

    fn isa_bridge(&mut self, parent: Parent) {
        self.add(
            NodeKind::IsaBridge,
            Identity::ISA_BRIDGE,
            parent,
            Slot::new(0x14, 0),
            Vec::new(),
        );
    }

    fn port(&mut self, kind: NodeKind, parent: Parent) -> Parent {
        self.add(kind, PORT, parent, None, Vec::new())
    }

    fn nic(&mut self, parent: Parent) {
        let bar = BarSpec {
            index: 0,
            kind: BarKind::Mem64 { prefetchable: true },
            size: 0x8000,
        };
        self.add(NodeKind::Endpoint(0), NIC, parent, None, vec![bar]);
    }

    /// What the tables say about it, on a machine with these processors.
    fn told(&self, apic_ids: &[u32], hpet: bool) -> String {
        let mapped = layout::map(
            Ram {
                size: RAM,
                page: 0x1000,
            },
            &self.0,
            false,
        )
        .expect("it fits");
        let hardware = Hardware {
            apic_ids,
            pci: &mapped.pci,
            viommus: &[],
            hpet,
            pvpanic: true,
        };
        let tables = describe(&hardware, AT);
        decode::outline(&tables.bytes, AT.0, tables.rsdp.0)
    }
}

fn recorded(name: &str, told: &str) {
    insta::with_settings!({snapshot_path => "../golden/acpi", prepend_module_to_snapshot => false, omit_expression => true}, {
        insta::assert_snapshot!(name, told);
    });
}

#[test]
fn three_integrated_devices_on_one_root_bus() {
    let mut pci = Hierarchy::default();
    let root = pci.root(0, None);
    pci.isa_bridge(root);
    (0..3).for_each(|_| pci.nic(root));
    recorded("flat", &pci.told(&[0], false));
}

#[test]
fn the_talk_has_three_nics_behind_ports_of_two_root_complexes() {
    let mut pci = Hierarchy::default();
    let (first, second) = (pci.root(0, None), pci.root(0, None));
    pci.isa_bridge(first);
    for root in [first, first, second] {
        let port = pci.port(NodeKind::RootPort, root);
        pci.nic(port);
    }
    recorded("talk", &pci.told(&[0, 1, 2, 3], false));
}

#[test]
fn switches_in_switches_route_their_pins_through_one_port() {
    let mut pci = Hierarchy::default();
    let root = pci.root(0, None);
    pci.isa_bridge(root);
    let mut above = pci.port(NodeKind::RootPort, root);
    for _ in 0..3 {
        let upstream = pci.port(NodeKind::UpstreamPort, above);
        let with_nic = pci.port(NodeKind::DownstreamPort, upstream);
        pci.nic(with_nic);
        above = pci.port(NodeKind::DownstreamPort, upstream);
    }
    recorded("deep-switches", &pci.told(&[0, 1], false));
}

/// What the tables say about the machine of `toml`.
fn told_of(toml: &str) -> String {
    let config = Config::parse(Path::new("machine.toml"), toml).expect("a machine");
    let plan = Plan::resolve(&config).expect("a machine that can be");
    let tables = tables(&plan, AT);
    decode::outline(&tables.bytes, AT.0, tables.rsdp.0)
}

/// What they say about its IOMMUs.
fn ivrs(toml: &str) -> String {
    let told = told_of(toml);
    let from = told.find("IVRS").expect("there are some");
    told[from..].to_owned()
}

#[test]
fn each_iommu_is_described_three_times_and_one_has_the_ioapic() {
    let toml = "[board]\nhpet = true\n[[root-complex]]\n[[root-complex]]\n[[root-complex]]\nsegment = 1\n\
        [[viommu]]\non = \"rc1\"\n[[viommu]]\non = \"rc0\"\n[[viommu]]\non = \"rc2\"\n\
        [[rng]]\non = \"rc1\"\nslot = \"0.1\"\n[[root-port]]\n[[rng]]\nport = \"rp0\"\n";
    recorded("viommus", &ivrs(toml));
}

#[test]
fn an_iommu_elsewhere_in_segment_0_has_the_ioapic_where_bus_0_has_none() {
    let toml = "[[root-complex]]\n[[root-complex]]\n[[viommu]]\non = \"rc1\"\n";
    recorded("viommu-beside", &ivrs(toml));
}

#[test]
fn v2_tables_alone_disable_host_tables_and_everything_optional_shows() {
    let toml = "[[viommu]]\npage-table = \"v2\"\npasid-bits = 16\nats = true\nxt = false\nintremap = false\n\
        npcache = true\n";
    recorded("viommu-v2", &ivrs(toml));
}

/// What a unit that serves guests does not do, none of the machine says it does.
#[test]
fn ivrs_of_a_served_unit_and_one_beside_it() {
    let toml = "[[root-complex]]\n[[root-complex]]\n[[viommu]]\nmode = \"sim\"\n[[viommu]]\non = \"rc1\"\n";
    recorded("viommu-served", &ivrs(toml));
}

#[test]
fn each_segment_has_its_own_bus_numbers_and_configuration_space() {
    let mut pci = Hierarchy::default();
    let roots = [
        pci.root(0, Some(0..=0x3f)),
        pci.root(0, Some(0x40..=0xff)),
        pci.root(1, Some(0..=0xff)),
    ];
    pci.isa_bridge(roots[0]);
    for root in roots {
        let port = pci.port(NodeKind::RootPort, root);
        pci.nic(port);
    }
    // Processors beyond what 8 bits number, and a timer.
    recorded("segments", &pci.told(&[0, 1, 254, 255, 1023], true));
}
