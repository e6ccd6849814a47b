//! Mode `hw` on a host whose IOMMU serves guests: no lab has one, so `scripts/test native hw::` runs these on a host that
//! has, with `RAVELIN_HW_FUNCTION` naming a function that is bound to vfio-pci (`scripts/epyc-check` does both).

use std::env;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::machine::Machine;
use crate::viommu::{LOOK_AROUND, NOT_NAMED};

/// The function that guests may have.
fn function() -> String {
    env::var("RAVELIN_HW_FUNCTION")
        .expect("RAVELIN_HW_FUNCTION is not set; it names a function bound to vfio-pci, like 0000:41:00.0")
}

/// Linux takes the unit, the function works behind v2 tables, and what the guest does to unmap costs no exit.
#[test]
fn the_hosts_unit_serves_a_guest_that_knows_nothing_of_it() {
    let machine = Machine::new("debian-7.3").deadline(Duration::from_secs(120));
    let stats = machine.path("stats.json");
    let given = format!("host={},port=rp0", function());
    let ended = machine
        .arguments([
            "--cpus",
            "2",
            "--memory",
            "512M",
            "--viommu",
            "hw",
            "--root-port",
            "rp0",
        ])
        .arguments(["--vfio-device", &given, "--stats"])
        .arguments([&stats])
        .script(&format!(
            r#"{LOOK_AROUND}
for function in /sys/bus/pci/devices/*; do
    [ ! -e "$function/iommu_group" ] || say "domain_${{function##*/}}" "$(cat "$function/iommu_group/type")"
done
check behind_a_unit sh -c 'ls /sys/class/iommu/*/devices | grep -q :'
"#
        ))
        .run()
        .well_but(|line| NOT_NAMED.iter().any(|said| line.contains(said)));
    let said = ended.console.section("amd_vi");
    assert_eq!(ended.console.said("units"), "1", "{said}");
    assert!(said.contains("V2 page table enabled"), "{said}");
    let stats = fs::read_to_string(&stats).expect("statistics");
    let stats: Value = serde_json::from_str(&stats).expect("JSON");
    let host = &stats["viommus"][0]["host"];
    assert!(
        host["nested"].as_u64() > Some(0),
        "attached to tables of the guest's: {host}"
    );
    assert_eq!(host["refusals"].as_u64(), Some(0), "{host}");
    let devices = stats["exits"]["by_device"].as_array().expect("a list");
    let unit = devices.iter().find(|device| device["name"] == "iommu0");
    let accesses =
        ["reads", "writes"].map(|kind| unit.and_then(|unit| unit[kind].as_u64()).expect("a count"));
    // Heads, tails and doorbells are on a page of the hardware's; Linux sets the unit up by some dozen registers.
    assert!(
        accesses.iter().sum::<u64>() < 400,
        "{accesses:?} exits of the unit's registers"
    );
}
