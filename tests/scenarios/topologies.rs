//! What the guest sees of a topology equals the plan, and stays usable when the guest orders otherwise.

use std::fmt::Write as _;
use std::path::Path;

use ravelin::vm::config::Config;
use ravelin::vm::plan::{DeviceKind, Plan};

use crate::machine::Machine;
use crate::tree::{listed, listed_resources, planned, planned_picture, planned_resources};

/// The shipped machine files: integrated devices, the talk's machine, switches in switches, devices of several
/// functions, and several segments.
const FLAT: &str = include_str!("../../configs/flat.toml");
const TALK: &str = include_str!("../../configs/quickstart.toml");
const DEEP_SWITCHES: &str = include_str!("../../configs/deep-switches.toml");
const MULTI_FUNCTION: &str = include_str!("../../configs/multi-function.toml");
const VIOMMU: &str = include_str!("../../configs/viommu.toml");
const SEGMENTS: &str = include_str!("../../configs/segments.toml");

/// Every topology here with its plan.
pub(crate) fn plans() -> Vec<(&'static str, Plan)> {
    let topologies = [
        ("flat", FLAT),
        ("talk", TALK),
        ("deep switches", DEEP_SWITCHES),
        ("multi-function", MULTI_FUNCTION),
        ("segments", SEGMENTS),
        ("IOMMUs", VIOMMU),
    ];
    topologies.map(|(name, toml)| (name, plan(toml))).to_vec()
}

fn plan(toml: &str) -> Plan {
    let config = Config::parse(Path::new("machine.toml"), toml).unwrap_or_else(|error| panic!("{error}"));
    Plan::resolve(&config).unwrap_or_else(|error| panic!("{error}"))
}

/// Lays the guest's whole view on the console.
///
/// Of lspci only its standard output: it also says that there is no list of modules to name drivers from.
const LOOK: &str = r#"
lspci -D -nn -vvv 2>/dev/null | section functions
lspci -t 2>/dev/null | section picture
cat /proc/iomem /proc/ioports | section resources
# All but the board's bridges, which are conventional functions.
conventional() {
    for function in /sys/bus/pci/devices/*; do
        [ "$(stat -L -c %s $function/config)" = 4096 ] || cat $function/class
    done
}
check config_spaces_are_4_kib test -z "$(conventional | grep -v -e 0x060000 -e 0x060100)"
"#;

/// The guest's view of `toml` equals the plan.
fn is_seen_as_planned(guest: &'static str, toml: &str) {
    let plan = plan(toml);
    let console = Machine::new(guest).file(toml).script(LOOK).run().well().console;
    assert_eq!(console.section("picture"), planned_picture(&plan.pci));
    // No function has virtual ones, which a guest could make appear beside the plan.
    assert!(!console.section("functions").contains("SR-IOV"));
    let (seen, planned) = (listed(&console.section("functions")), planned(&plan.pci));
    for (address, function) in &planned {
        assert_eq!(seen.get(address), Some(function), "{address}");
    }
    assert_eq!(seen.len(), planned.len(), "no function beyond the plan");
    let resources = listed_resources(&console.section("resources"));
    assert_eq!(resources, planned_resources(&plan.pci));
}

#[test]
fn a_flat_root_bus_is_seen_as_planned() {
    is_seen_as_planned("lab", FLAT);
}

#[test]
fn the_talks_machine_is_seen_as_planned_by_debian_7_3() {
    is_seen_as_planned("debian-7.3", TALK);
}

#[test]
fn deep_switches_are_seen_as_planned() {
    is_seen_as_planned("lab", DEEP_SWITCHES);
}

#[test]
fn multi_function_devices_are_seen_as_planned() {
    is_seen_as_planned("lab", MULTI_FUNCTION);
}

#[test]
fn several_segments_are_seen_as_planned_by_debian_6_12() {
    is_seen_as_planned("debian-6.12", SEGMENTS);
}

/// Every device that the plan has still works, wherever the guest put it.
fn works_after_reassignment(toml: &str, words: &str) {
    let plan = plan(toml);
    let console = Machine::new("lab")
        .file(toml)
        .cmdline(words)
        .script(
            r#"
lspci -D -nn -vvv 2>/dev/null | section functions
say nics $(ls -d /sys/bus/virtio/drivers/virtio_net/virtio* 2>/dev/null | wc -l)
# Reading it takes an interrupt, so its MSI-X table is where the guest wrote it.
if [ -e /dev/hwrng ]; then
    check entropy_comes test $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c) = 64
fi
"#,
        )
        .run()
        .well()
        .console;
    let seen = listed(&console.section("functions"));
    assert_eq!(seen.len(), plan.pci.nodes().count(), "every function is found");
    let nics = plan
        .devices
        .iter()
        .filter(|device| matches!(device.kind, DeviceKind::Net(_)));
    let nics = nics.count().to_string();
    assert_eq!(console.said("nics"), nics, "every NIC has its driver");
}

#[test]
fn a_guest_may_reassign_every_window() {
    works_after_reassignment(DEEP_SWITCHES, "pci=realloc");
}

#[test]
fn a_guest_may_renumber_every_bus() {
    works_after_reassignment(DEEP_SWITCHES, "pci=assign-busses");
}

/// As many ports as a bus has places, which its host bridge does not take, each with a device.
#[test]
fn thirty_one_ports_of_one_root_complex_are_seen_as_planned() {
    let mut toml =
        "memory = \"512M\"\n[[root-complex]]\nid = \"rc0\"\n[[root-complex]]\nid = \"rc1\"\n".to_owned();
    for at in 0..31 {
        let _ = write!(
            toml,
            "[[root-port]]\nid = \"rp{at}\"\non = \"rc1\"\n[[rng]]\nport = \"rp{at}\"\n"
        );
    }
    let plan_of_it = plan(&toml);
    let bridges = plan_of_it
        .pci
        .nodes()
        .filter_map(|(_, node)| node.bridge.as_ref());
    let buses: Vec<_> = bridges
        .map(|bridge| (bridge.secondary, bridge.subordinate))
        .collect();
    assert_eq!(buses.len(), 31);
    let follows = |pair: &[(u8, u8)]| pair[0].1 + 1 == pair[1].0;
    assert!(buses.windows(2).all(follows), "{buses:?}");
    is_seen_as_planned("debian-7.3", &toml);
}
