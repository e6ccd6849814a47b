//! What the guest sees of a topology equals the plan, and stays usable when the guest orders otherwise.

use std::path::Path;

use ravelin::vm::config::Config;
use ravelin::vm::plan::Plan;

use crate::machine::Machine;
use crate::tree::{listed, listed_resources, planned, planned_picture, planned_resources};

/// Integrated devices on the root bus and nothing else.
const FLAT: &str = r#"
[[net]]
backend = "none"
[[net]]
backend = "none"
[[rng]]
"#;

/// Three NICs, each behind a root port of its own: two under one root complex, one under another.
const TALK: &str = r#"
[[root-complex]]
id = "rc0"
[[root-complex]]
id = "rc1"
[[root-port]]
id = "rp0"
on = "rc0"
[[root-port]]
id = "rp1"
on = "rc0"
[[root-port]]
id = "rp4"
on = "rc1"
[[net]]
id = "nic0"
backend = "none"
port = "rp0"
[[net]]
id = "nic1"
backend = "none"
port = "rp1"
[[net]]
id = "nic4"
backend = "none"
port = "rp4"
"#;

/// Switches in switches, with a device at every level.
const DEEP_SWITCHES: &str = r#"
[[root-port]]
id = "rp0"
[[switch]]
id = "a"
on = "rp0"
downstream = 3
[[switch]]
id = "b"
on = "a.1"
downstream = 2
[[switch]]
id = "c"
on = "b.1"
downstream = 4
[[net]]
backend = "none"
port = "a.0"
[[net]]
backend = "none"
port = "b.0"
[[net]]
backend = "none"
port = "c.2"
[[rng]]
port = "c.3"
"#;

/// Several functions in one device: of endpoints, of root ports, and integrated ones.
const MULTI_FUNCTION: &str = r#"
[[root-port]]
id = "rp0"
slot = "3.0"
[[root-port]]
id = "rp1"
slot = "3.1"
[[root-port]]
id = "rp7"
slot = "3.7"
[[net]]
backend = "none"
port = "rp0"
slot = "0.0"
[[net]]
backend = "none"
port = "rp0"
slot = "0.3"
[[rng]]
port = "rp7"
slot = "0.0"
[[net]]
backend = "none"
slot = "31.0"
[[rng]]
slot = "31.6"
"#;

/// Three root complexes in two segments.
const SEGMENTS: &str = r#"
[[root-complex]]
id = "rc0"
bus = "0x00-0x3f"
[[root-complex]]
id = "rc1"
bus = "0x40-0xff"
[[root-complex]]
id = "rc2"
segment = 1
[[root-port]]
id = "rp1"
on = "rc1"
[[root-port]]
id = "rp2"
on = "rc2"
[[net]]
backend = "none"
on = "rc0"
[[net]]
backend = "none"
port = "rp1"
[[rng]]
port = "rp2"
"#;

/// Every topology here with its plan.
pub(crate) fn plans() -> Vec<(&'static str, Plan)> {
    let topologies = [
        ("flat", FLAT),
        ("talk", TALK),
        ("deep switches", DEEP_SWITCHES),
        ("multi-function", MULTI_FUNCTION),
        ("segments", SEGMENTS),
    ];
    topologies.map(|(name, toml)| (name, plan(toml))).to_vec()
}

fn plan(toml: &str) -> Plan {
    let config = Config::parse(Path::new("machine.toml"), toml).unwrap_or_else(|error| panic!("{error}"));
    Plan::resolve(&config).unwrap_or_else(|error| panic!("{error}"))
}

/// Lays the guest's whole view on the console.
const LOOK: &str = r#"
lspci -D -nn -vvv | section functions
lspci -t | section picture
cat /proc/iomem /proc/ioports | section resources
check config_spaces_are_4_kib test -z "$(find /sys/bus/pci/devices/*/ -name config ! -size 4096c)"
"#;

/// The guest's view of `toml` equals the plan.
fn is_seen_as_planned(guest: &'static str, toml: &str) {
    let plan = plan(toml);
    let console = Machine::new(guest).file(toml).script(LOOK).run().well().console;
    assert_eq!(console.section("picture"), planned_picture(&plan.pci));
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
fn works_after_reassignment(toml: &str, words: &str) -> crate::console::Console {
    let plan = plan(toml);
    let console = Machine::new("lab")
        .file(toml)
        .cmdline(words)
        .script(
            r#"
lspci -D -nn -vvv | section functions
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
    let nics = toml.matches("[[net]]").count();
    assert_eq!(console.said("nics"), nics.to_string(), "every NIC has its driver");
    console
}

#[test]
fn a_guest_may_reassign_every_window() {
    works_after_reassignment(DEEP_SWITCHES, "pci=realloc");
}

#[test]
fn a_guest_may_renumber_every_bus() {
    works_after_reassignment(DEEP_SWITCHES, "pci=assign-busses");
}
