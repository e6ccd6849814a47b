//! Layouts for a recorded host of two IOMMUs.

use std::path::Path;

use super::*;
use crate::iommu::iommufd::Abi;
use crate::vm::host_functions::recorded::Recorded;
use crate::vm::plan::Plan;
use crate::vm::plan::resolve::decide;

/// NICs 41 and 42 are served by ivhd1, NIC c1, a device of two functions and two devices in one group by ivhd3.
fn server() -> Recorded {
    let host = Recorded::new();
    for (at, iommu, group) in [
        ("0000:41:00.0", "ivhd1", 12),
        ("0000:42:00.0", "ivhd1", 13),
        ("0000:c1:00.0", "ivhd3", 30),
        ("0000:c2:00.0", "ivhd3", 31),
        ("0000:c2:00.1", "ivhd3", 31),
        ("0000:c5:00.0", "ivhd3", 35),
        ("0000:c6:00.1", "ivhd3", 35),
    ] {
        host.function(at, "0x020000\n", 0x80).served(at, iommu, group);
    }
    host
}

/// The plan as if every function could be confined.
fn decided(text: &str, host: &Recorded) -> Result<Plan, String> {
    let config = Config::parse(Path::new("m.toml"), text).expect("a machine file");
    let host = HostFunctions::below(host.root());
    let said = mirrored(&config, &host).map_err(|error| error.to_string())?;
    decide(&said, &host).map_err(|error| error.to_string())
}

/// Every function of the guest but the board's, with what it is and which IOMMUs of the host its own stands for.
fn layout(text: &str) -> Vec<String> {
    let plan = decided(text, &server()).unwrap_or_else(|error| panic!("{error}"));
    let board = |name: &str| name.ends_with("-bridge");
    let line = |root: &crate::pci::tree::RootComplex| {
        let unit = plan.viommu_of(root);
        let unit = unit.map_or("no IOMMU".to_owned(), |unit| {
            format!("{} for {}", unit.name, unit.stands_for.join(","))
        });
        let nodes = root.nodes().filter(|node| !board(&node.name));
        let nodes: Vec<String> = nodes.map(|node| format!("{} {}", node.bdf, node.name)).collect();
        format!("{} ({unit}): {}", root.name, nodes.join(", "))
    };
    plan.pci.roots().map(line).collect()
}

fn refused(text: &str) -> String {
    decided(text, &server()).expect_err(text)
}

/// A machine file with a function of the host each.
fn devices(hosts: &[&str]) -> String {
    hosts
        .iter()
        .map(|host| format!("[[vfio-device]]\nhost = \"{host}\"\n"))
        .collect()
}

#[test]
fn each_iommu_of_the_host_that_serves_a_function_has_a_root_complex_and_an_iommu_in_the_guest() {
    let nics = devices(&["c1:00.0", "41:00.0", "42:00.0"]);
    assert_eq!(
        layout(&format!("[[viommu]]\nmode = \"auto\"\n{nics}")),
        [
            "rc0 (iommu0 for ivhd1): 00:00.2 iommu0, 00:01.0 rp0, 01:00.0 vfio1, 00:02.0 rp1, 02:00.0 vfio2",
            "rc1 (iommu1 for ivhd3): 80:00.2 iommu1, 80:01.0 rp2, 81:00.0 vfio0",
        ]
    );
}

#[test]
fn functions_of_one_group_are_one_device_and_others_are_behind_ports_of_their_own() {
    let nics = devices(&["c2:00.1", "c2:00.0", "c6:00.1", "c1:00.0", "c5:00.0"]);
    assert_eq!(
        layout(&format!("[[viommu]]\n{nics}")),
        [
            "rc0 (iommu0 for ivhd3): 00:00.2 iommu0, 00:01.0 rp0, 01:00.0 vfio3, 00:02.0 rp1, 02:00.0 vfio1, \
          02:00.1 vfio0, 00:03.0 rp2, 03:00.0 vfio4, 03:00.1 vfio2"
        ]
    );
}

#[test]
fn a_function_that_is_passed_without_function_0_of_its_device_becomes_function_0() {
    let nics = devices(&["c2:00.1"]);
    assert_eq!(
        layout(&format!("[[viommu]]\n{nics}")),
        ["rc0 (iommu0 for ivhd3): 00:00.2 iommu0, 00:01.0 rp0, 01:00.0 vfio0"]
    );
}

#[test]
fn what_was_said_of_the_iommu_holds_for_each_and_names_that_were_said_stay() {
    let text = format!(
        "[[viommu]]\nxt = false\ndoorbell = \"poll\"\n[[root-port]]\n[[rng]]\nid = \"rp1\"\n[[root-port]]\nid = \
         \"rp2\"\n{}",
        devices(&["41:00.0", "c1:00.0"])
    );
    let plan = decided(&text, &server()).expect("possible");
    let offers: Vec<_> = plan
        .viommus
        .iter()
        .map(|unit| (unit.offer.xt, unit.doorbell))
        .collect();
    assert_eq!(offers, [(false, crate::vm::plan::Doorbell::Poll); 2]);
    let ports: Vec<_> = plan
        .pci
        .nodes()
        .filter(|(_, node)| node.kind == crate::pci::tree::NodeKind::RootPort)
        .map(|(_, node)| node.name.as_str())
        .collect();
    assert_eq!(ports, ["rp0", "rp2", "rp3", "rp4"]);
}

#[test]
fn an_iommu_that_was_said_keeps_its_root_complex_to_itself() {
    let text = format!(
        "[[viommu]]\nmode = \"emulated\"\n[[rng]]\n[[viommu]]\nmode = \"auto\"\n{}",
        devices(&["41:00.0"])
    );
    assert_eq!(
        layout(&text),
        [
            "rc0 (iommu0 for ): 00:00.2 iommu0, 00:01.0 rng0",
            "rc1 (iommu1 for ivhd1): 80:00.2 iommu1, 80:01.0 rp0, 81:00.0 vfio0",
        ]
    );
}

#[test]
fn functions_with_a_place_stay_there_and_the_layout_is_for_the_others() {
    let text = format!(
        "[[root-complex]]\nid = \"left\"\n[[root-complex]]\nid = \"right\"\n[[root-port]]\nid = \"port\"\non = \
         \"right\"\n[[viommu]]\n{}[[vfio-device]]\nhost = \"c1:00.0\"\nport = \"port\"\n",
        devices(&["41:00.0"])
    );
    assert_eq!(
        layout(&text),
        [
            "left (iommu0 for ivhd1): 00:00.2 iommu0, 00:01.0 rp0, 01:00.0 vfio0",
            "right (no IOMMU): 80:01.0 port, 81:00.0 vfio1",
        ]
    );
}

#[test]
fn without_an_iommu_or_with_one_that_has_a_place_nothing_is_laid_out() {
    let nic = devices(&["41:00.0"]);
    assert_eq!(layout(&nic), ["rc0 (no IOMMU): 00:01.0 vfio0"]);
    assert_eq!(
        layout(&format!("[[viommu]]\nmode = \"emulated\"\n{nic}")),
        ["rc0 (iommu0 for ivhd1): 00:00.2 iommu0, 00:01.0 vfio0"]
    );
    assert_eq!(
        layout("[[viommu]]\n[[rng]]\n"),
        ["rc0 (iommu0 for ): 00:00.2 iommu0, 00:01.0 rng0"]
    );
}

#[test]
fn a_function_that_no_iommu_serves_is_refused_by_name() {
    let host = server();
    std::fs::remove_file(host.root().join("sys/bus/pci/devices/0000:41:00.0/iommu")).expect("there");
    let text = format!("[[viommu]]\n{}", devices(&["41:00.0"]));
    let problem = decided(&text, &host).expect_err("nothing stands for it");
    assert!(
        problem.starts_with("m.toml:3: vfio-device.host = 41:00.0: no IOMMU translates for it"),
        "{problem}"
    );
}

#[test]
fn what_is_no_function_or_is_said_twice_is_refused_as_such() {
    let absent = refused(&format!("[[viommu]]\n{}", devices(&["43:00.0"])));
    assert!(absent.contains("this host has no function there"), "{absent}");
    let twice = refused(&format!("[[viommu]]\n{}", devices(&["41:00.0", "41:00.0"])));
    assert!(
        twice.ends_with("vfio0 is this function too, and it can be passed once"),
        "{twice}"
    );
}

#[test]
fn one_name_for_several_iommus_is_refused() {
    let text = format!("[[viommu]]\nid = \"unit\"\n{}", devices(&["41:00.0", "c1:00.0"]));
    assert_eq!(
        refused(&text),
        "m.toml:2: viommu.id = unit: it stands for 2 IOMMUs of the host, ivhd1, ivhd3, by one each; leave id out, or \
         say a viommu with `on` for each"
    );
    let one = format!("[[viommu]]\nid = \"unit\"\n{}", devices(&["41:00.0"]));
    assert_eq!(
        layout(&one),
        ["rc0 (unit for ivhd1): 00:00.2 unit, 00:01.0 rp0, 01:00.0 vfio0"]
    );
}

#[test]
fn two_iommus_that_would_both_mirror_the_host_are_refused() {
    let text = refused(&format!("[[viommu]]\n[[viommu]]\n{}", devices(&["41:00.0"])));
    assert!(
        text.starts_with("m.toml:2: viommu.on: another viommu stands for all"),
        "{text}"
    );
}

#[test]
fn a_root_complex_is_not_added_where_others_have_said_which_buses_they_have() {
    let text = format!(
        "[[root-complex]]\nbus = \"0x00-0x3f\"\n[[viommu]]\n{}",
        devices(&["41:00.0", "c1:00.0"])
    );
    assert_eq!(
        refused(&text),
        "m.toml:7: vfio-device.host = c1:00.0: ivhd3 of the host serves it, for which a root complex would be added; \
         that gets no buses, as m.toml:2 says which others have; say a port for it, and a viommu with `on`"
    );
}

#[test]
fn more_functions_of_one_group_than_a_device_has_are_refused() {
    let host = server();
    let names: Vec<String> = (0..9).map(|bus| format!("0000:d{bus}:00.0")).collect();
    for name in &names {
        host.function(name, "0x020000\n", 0).served(name, "ivhd3", 50);
    }
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let problem = decided(&format!("[[viommu]]\n{}", devices(&all)), &host).expect_err("nine");
    assert!(
        problem.contains("0000:d8:00.0: 8 functions of its IOMMU group, 50, are passed already"),
        "{problem}"
    );
    let eight = decided(&format!("[[viommu]]\n{}", devices(&all[..8])), &host).expect("eight");
    assert_eq!(eight.devices.len(), 8);
}

#[test]
fn a_group_that_the_guest_would_see_as_two_is_refused() {
    let text = format!(
        "[[viommu]]\n[[root-port]]\n[[vfio-device]]\nhost = \"c2:00.0\"\nport = \"rp0\"\n{}",
        devices(&["c2:00.1"])
    );
    let problem = refused(&text);
    assert!(
        problem.contains(
            "vfio0 is in the same IOMMU group of the host, 31, and the guest would have them in different"
        ),
        "{problem}"
    );
}

/// Both IOMMUs of the host have what a guest's needs.
fn serving() -> Recorded {
    let host = server();
    for iommu in ["ivhd1", "ivhd3"] {
        host.file(
            &format!("sys/class/iommu/{iommu}/amd-iommu/features"),
            "81000000000014:8\n",
        );
    }
    host
}

/// Mode of each IOMMU, and why it is that, where the host's kernel answers by `ask`.
fn modes(
    text: &str,
    host: &Recorded,
    ask: fn(&HostFunctions, Sbdf, &[Abi]) -> Result<(), String>,
) -> Vec<(&'static str, String)> {
    let config = Config::parse(Path::new("m.toml"), text).expect("a machine file");
    let host = HostFunctions::below(host.root()).answering(ask);
    let plan = Plan::resolve_on(&config, &host).unwrap_or_else(|error| panic!("{text}: {error}"));
    let units = plan.viommus.into_iter();
    units
        .map(|unit| (unit.mode.name(), unit.because.unwrap_or_default()))
        .collect()
}

#[test]
fn each_iommu_of_the_host_serves_where_it_can_and_the_kernel_answers() {
    let text = format!(
        "[[viommu]]\nmode = \"per-host\"\n{}",
        devices(&["41:00.0", "c1:00.0"])
    );
    let of = |ask| modes(&text, &serving(), ask);
    let answered = of(|_, _, _| Ok(()));
    assert_eq!(
        answered[0].1,
        "auto: ivhd1 has what it takes, and so has the kernel"
    );
    assert_eq!([answered[0].0, answered[1].0], ["hw", "hw"]);
    let one = of(|_, at, _| match at.bdf.bus() {
        0x41 => Ok(()),
        _ => Err("VIOMMU_ALLOC: no".to_owned()),
    });
    assert_eq!(one[0].0, "hw");
    assert_eq!(
        one[1],
        (
            "emulated",
            "auto: ivhd3 has what it takes, but VIOMMU_ALLOC: no".to_owned()
        )
    );
    let abis = |_: &HostFunctions, _, abis: &[Abi]| {
        let names: Vec<_> = abis.iter().map(|abi| abi.name).collect();
        Err(names.join(" "))
    };
    assert!(of(abis)[0].1.ends_with("but v-e v-d v-c v-a"));
    let never = |_: &HostFunctions, _, _: &[Abi]| panic!("it has not what it takes");
    let lacking = modes(&text, &server(), never);
    assert_eq!(
        lacking[0],
        (
            "emulated",
            "auto: ivhd1 of the host is none of AMD's: there is no /sys/class/iommu/ivhd1/amd-iommu/features"
                .to_owned()
        )
    );
}

#[test]
fn what_was_said_that_no_unit_of_the_hosts_has_is_kept_and_hardware_is_not() {
    let never = |_: &HostFunctions, _, _: &[Abi]| panic!("nobody need ask");
    for (line, because) in [
        (
            "intremap = true",
            "auto: intremap was said, which no unit of a host's has",
        ),
        (
            "page-table = \"v1\"",
            "auto: page-table was said, which no unit of a host's has",
        ),
        ("ats = true", "auto: ats was said, which no unit of a host's has"),
        (
            "pasid-bits = 8",
            "auto: pasid-bits was said, which no unit of a host's has",
        ),
        (
            "doorbell = \"poll\"",
            "auto: doorbell=poll was said, and a unit of the host's has its own",
        ),
    ] {
        let text = format!("[[viommu]]\n{line}\n{}", devices(&["41:00.0"]));
        assert_eq!(
            modes(&text, &serving(), never),
            [("emulated", because.to_owned())]
        );
    }
}

#[test]
fn devices_that_are_emulated_stay_on_the_first_root_complex_behind_an_iommu_of_their_own() {
    let nics = devices(&["c1:00.0", "41:00.0", "42:00.0"]);
    let text = format!("[[viommu]]\nmode = \"per-host\"\n[[rng]]\n{nics}");
    let ask: fn(&HostFunctions, Sbdf, &[Abi]) -> Result<(), String> = |_, _, _| Ok(());
    let hybrid = modes(&text, &serving(), ask);
    let names: Vec<_> = hybrid.iter().map(|(mode, _)| *mode).collect();
    assert_eq!(names, ["emulated", "hw", "hw"]);
    // On a root complex of their own they are in nobody's way.
    let text = format!(
        "[[viommu]]\nmode = \"per-host\"\n[[root-complex]]\n[[root-complex]]\nid = \"own\"\n[[rng]]\non = \"own\"\n{nics}"
    );
    assert_eq!(modes(&text, &serving(), ask).len(), 2);
    // Where the IOMMU of the host does not serve, the first root complex stands for it as well.
    let text = format!("[[viommu]]\nmode = \"per-host\"\n[[rng]]\n{nics}");
    assert_eq!(modes(&text, &server(), ask).len(), 2);
}
