//! Recorded hosts: a NIC of two functions in one group, a bridge, and what is wrong with each.

use super::recorded::{NIC, SECOND, nic};
use super::*;
use crate::vm::plan::Plan;

#[test]
fn a_function_is_what_sysfs_says() {
    let face = nic().face(NIC).expect("a NIC");
    assert_eq!((face.identity.vendor, face.identity.device), (0x8086, 0x10d3));
    assert_eq!((face.identity.class, face.identity.revision), (0x02_0000, 2));
    assert_eq!(
        (face.identity.subsystem_vendor, face.identity.subsystem),
        (0x8086, 0xa01f)
    );
    assert!(face.intx);
    let bars: Vec<_> = face
        .bars
        .iter()
        .map(|bar| (bar.index, bar.kind, bar.size))
        .collect();
    assert_eq!(
        bars,
        [
            (0, BarKind::Mem32 { prefetchable: false }, 0x2_0000),
            (1, BarKind::Io, 0x20),
            (3, BarKind::Mem64 { prefetchable: true }, 0x4000),
        ]
    );
}

#[test]
fn a_function_that_is_not_there_or_a_bridge_is_refused() {
    let host = nic();
    assert!(
        host.face("0000:42:00.0")
            .expect_err("absent")
            .contains("no function there")
    );
    host.function("0000:40:01.0", "0x060400\n", 1);
    assert!(
        host.face("0000:40:01.0")
            .expect_err("a bridge")
            .contains("it is a bridge")
    );
    host.function("0000:40:02.0", "0x020000\n", 1);
    assert!(
        host.face("0000:40:02.0")
            .expect_err("a lie")
            .contains("it is a bridge")
    );
}

#[test]
fn files_that_say_nothing_are_named() {
    let host = nic();
    let home = format!("sys/bus/pci/devices/{NIC}");
    host.file(&format!("{home}/config"), [0; 63]);
    assert!(
        host.face(NIC)
            .expect_err("short")
            .ends_with("/config cannot be read")
    );
    host.function(NIC, "x\n", 0);
    assert!(
        host.face(NIC)
            .expect_err("no class")
            .ends_with("/class cannot be read")
    );
}

#[test]
fn bars_that_no_function_can_have_are_refused_by_number() {
    let line = |start: u64, last: u64, flags: u64| format!("{start:#x} {last:#x} {flags:#x}\n");
    let refused = [
        line(0, 0x2fff, MEMORY),
        line(0x1000, 0, MEMORY),
        line(0, u64::MAX, MEMORY | MEMORY_64),
        line(0, 0x1ff, IO),
        line(0, 7, MEMORY),
    ];
    for text in refused {
        assert!(
            bars(&text).expect_err(&text).starts_with("its BAR 0 lies at"),
            "{text}"
        );
    }
    let last = format!(
        "{}{}",
        line(0, 0, 0).repeat(5),
        line(0, 0xfff, MEMORY | MEMORY_64)
    );
    assert!(bars(&last).expect_err("no room").starts_with("its BAR 5"));
    let halves = format!("{}{}", line(0, 0xfff, MEMORY | MEMORY_64), line(0, 0xfff, MEMORY));
    assert!(bars(&halves).expect_err("taken").starts_with("its BAR 1"));
    assert!(
        bars("nonsense\n")
            .expect_err("text")
            .contains("not three numbers")
    );
    assert_eq!(bars(""), Ok(vec![]));
}

#[test]
fn a_function_of_another_driver_is_refused_with_the_command_that_helps() {
    let host = nic();
    assert_eq!(
        host.usable(NIC).expect_err("unbound"),
        "no driver has it; `scripts/bind-vfio bind 0000:41:00.0` gives it to vfio-pci"
    );
    host.bound(NIC, "e1000e");
    assert!(
        host.usable(NIC)
            .expect_err("bound")
            .starts_with("the driver e1000e has it; ")
    );
    host.node(NIC, "vfio0");
    assert_eq!(host.usable(NIC), Ok(()));
}

#[test]
fn every_function_that_keeps_a_group_is_named_with_what_has_it() {
    let host = nic();
    host.node(NIC, "vfio0")
        .function(SECOND, "0x020000\n", 0x80)
        .function("0000:41:00.2", "0x020000\n", 0x80)
        .function("0000:40:01.0", "0x060400\n", 1)
        .bound("0000:40:01.0", "pcieport");
    assert!(host.in_the_way(NIC).is_empty());
    host.bound(SECOND, "igb");
    let second = "0000:41:00.1 is in the group, and the driver igb has it; `scripts/bind-vfio bind 0000:41:00.1` gives it \
        to vfio-pci";
    assert_eq!(host.in_the_way(NIC), [second]);
    // The function itself may have been taken back meanwhile.
    host.function("0000:41:00.3", "0x020000\n", 0x80)
        .bound("0000:41:00.3", "e1000e");
    let all = host.in_the_way("0000:41:00.3");
    assert_eq!(all.len(), 2);
    assert!(all[1].starts_with("0000:41:00.3 is in the group, and the driver e1000e has it"));
    assert!(host.in_the_way("0000:99:00.0").is_empty());
}

#[test]
fn the_function_of_the_group_that_is_in_the_way_is_named_with_its_driver() {
    let host = nic();
    host.node(NIC, "vfio0")
        .function(SECOND, "0x020000\n", 0x80)
        .function("0000:40:01.0", "0x060400\n", 1)
        .bound("0000:40:01.0", "pcieport");
    assert_eq!(host.usable(NIC), Ok(()));
    host.bound(SECOND, "e1000e");
    assert_eq!(
        host.usable(NIC).expect_err("not alone"),
        "0000:41:00.1 is in the same IOMMU group, 12, and the driver e1000e has it; `scripts/bind-vfio bind \
         0000:41:00.1` gives it to vfio-pci"
    );
    host.node(SECOND, "vfio1");
    assert_eq!(host.usable(NIC), Ok(()));
}

#[test]
fn without_an_iommu_or_a_node_nothing_is_passed() {
    let host = nic();
    host.node(NIC, "vfio0");
    fs::remove_file(host.root().join("dev/iommu")).expect("there");
    let text = host.usable(NIC).expect_err("no iommufd");
    assert_eq!(
        text,
        "/dev/iommu is not there; load the modules iommufd and vfio-pci, of a kernel with CONFIG_IOMMUFD and \
         CONFIG_VFIO_DEVICE_CDEV; or, for the older interface, vfio_iommu_type1: /dev/vfio/vfio is not there either"
    );
    host.file("dev/iommu", "");
    fs::remove_file(host.root().join("dev/vfio/devices/vfio0")).expect("there");
    let text = host.usable(NIC).expect_err("no node");
    assert!(
        text.starts_with("/dev/vfio/devices/vfio0 is not there; load the modules"),
        "{text}"
    );
    fs::remove_file(host.root().join(format!("sys/bus/pci/devices/{NIC}/iommu_group"))).expect("there");
    assert!(
        host.usable(NIC)
            .expect_err("no IOMMU")
            .starts_with("no IOMMU translates for it")
    );
}

/// What the older interface has for the NIC.
fn older(host: &super::recorded::Recorded) {
    host.file("dev/vfio/vfio", "").file("dev/vfio/12", "");
}

#[test]
fn a_host_without_iommufd_gives_functions_out_by_their_groups() {
    let host = nic();
    let way =
        || HostFunctions::below(host.root()).way([(NIC.parse().expect("an address"), Handed::default())]);
    // As kernels do that have no name for the device.
    host.bound(NIC, "vfio-pci");
    older(&host);
    assert_eq!((host.usable(NIC), way()), (Ok(()), Way::Groups));
    fs::remove_file(host.root().join("dev/vfio/12")).expect("there");
    let text = host.usable(NIC).expect_err("no node");
    assert!(text.ends_with("/dev/vfio/12 is not there either"), "{text}");
    // The newer one is taken where there are both, and where all functions have it.
    older(&host);
    host.node(NIC, "vfio0");
    assert_eq!((host.usable(NIC), way()), (Ok(()), Way::Iommufd));
    host.function(SECOND, "0x020000\n", 0x80)
        .bound(SECOND, "vfio-pci");
    let both = [NIC, SECOND].map(|at| (at.parse().expect("an address"), Handed::default()));
    assert_eq!(HostFunctions::below(host.root()).way(both), Way::Groups);
}

#[test]
fn a_function_that_is_given_out_without_an_iommu_is_refused() {
    let host = nic();
    host.node(NIC, "vfio0");
    older(&host);
    host.file("sys/kernel/iommu_groups/12/name", "vfio-noiommu\n");
    assert_eq!(host.usable(NIC).expect_err("not confined"), UNCONFINED);
    host.file("sys/kernel/iommu_groups/12/name", "rack 7\n");
    assert_eq!(host.usable(NIC), Ok(()));
}

#[test]
fn behind_an_emulated_iommu_a_function_needs_iommufd() {
    let host = nic();
    host.bound(NIC, "vfio-pci");
    older(&host);
    let here = HostFunctions::below(host.root());
    let checked = |units: &str| {
        let text = format!("[[root-complex]]\n[[root-complex]]\n[[vfio-device]]\nhost = \"{NIC}\"\n{units}");
        let config = Config::parse(Path::new("m.toml"), &text).expect("a machine file");
        let plan = Plan::resolve_on(&config, &here).expect("possible");
        check(&config, &plan, &here).map_err(|error| error.to_string())
    };
    assert_eq!(checked(""), Ok(()));
    assert_eq!(checked("[[viommu]]\non = \"rc1\"\n"), Ok(()));
    assert_eq!(
        checked("[[viommu]]\n").expect_err("no copies"),
        "m.toml:4: vfio-device.host = 0000:41:00.0: it would be behind iommu0, and only /dev/iommu gives out the address \
         spaces that copies of the guest's tables need: /dev/iommu is not there; load the module iommufd, of a kernel \
         with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, or put it on a root complex without an IOMMU"
    );
    host.node(NIC, "vfio0");
    assert_eq!(checked("[[viommu]]\n"), Ok(()));
}

#[test]
fn what_was_handed_over_need_not_be_there() {
    let host = nic();
    host.node(NIC, "vfio0");
    for path in ["dev/iommu", "dev/vfio/devices/vfio0"] {
        fs::remove_file(host.root().join(path)).expect("there");
    }
    let here = HostFunctions::below(host.root());
    let checked = |units: &str| {
        let text = format!("[[vfio-device]]\nhost = \"{NIC}\"\n{units}");
        let config = Config::parse(Path::new("m.toml"), &text).expect("a machine file");
        let plan = Plan::resolve_on(&config, &here).expect("possible");
        check(&config, &plan, &here).map_err(|error| error.to_string())
    };
    assert_eq!(checked("fd = 7\n[iommufd]\nfd = 8\n"), Ok(()));
    let text = checked("fd = 7\n").expect_err("no iommufd");
    assert!(
        text.contains("host = 0000:41:00.0: /dev/iommu is not there;"),
        "{text}"
    );
    let text = checked("[iommufd]\nfd = 8\n").expect_err("no node");
    assert!(text.contains("/dev/vfio/devices/vfio0 is not there;"), "{text}");
    // By its group it could be opened; not with what was handed over.
    older(&host);
    assert_eq!(checked(""), Ok(()));
    assert_eq!(
        checked("fd = 7\n").expect_err("by groups"),
        "m.toml:3: vfio-device.fd = 7: all functions are opened in one way, and 0000:41:00.0 cannot be opened like this \
         one: /dev/iommu is not there"
    );
    assert_eq!(
        checked("[iommufd]\nfd = 8\n").expect_err("by groups"),
        "m.toml:4: iommufd.fd = 8: 0000:41:00.0 cannot be opened with it: /dev/vfio/devices/vfio0 is not there, nor was \
         it handed over"
    );
}

#[test]
fn a_descriptor_is_one_functions_or_that_of_the_iommus() {
    let device = format!("[[vfio-device]]\nhost = \"{NIC}\"\nfd = 7\n");
    let plan = planned(&format!("{device}[iommufd]\nfd = 8\n")).expect("possible");
    assert_eq!(plan.iommufd, Some(8));
    let taken = planned(&format!("{device}[iommufd]\nfd = 7\n")).expect_err("the same");
    assert_eq!(
        taken,
        "m.toml:3: vfio-device.fd = 7: this descriptor is that of /dev/iommu; each function has one of its own"
    );
    assert_eq!(
        planned("[iommufd]\nfd = 8\n").expect_err("nobody uses it"),
        "m.toml:2: iommufd.fd = 8: no function of the host is passed through, and nothing else uses it; leave it out"
    );
}

#[test]
fn an_open_node_is_found_in_sysfs_by_its_numbers() {
    let host = nic();
    host.link("sys/dev/char/1:3", "../../devices/virtual/mem/null");
    let here = HostFunctions::below(host.root());
    let of = |path: &str| here.device_of(&File::open(path).expect("there"));
    assert_eq!(of("/dev/null"), Some("../../devices/virtual/mem/null".into()));
    // A device that sysfs does not tell of, and none.
    assert_eq!(
        (of("/dev/zero"), of("/dev"), of("/proc/version")),
        (None, None, None)
    );
}

/// The plan of a machine file on a host with the NIC.
fn planned(text: &str) -> Result<Plan, String> {
    let config = Config::parse(Path::new("m.toml"), text).expect("a machine file");
    let host = nic();
    Plan::resolve_on(&config, &HostFunctions::below(host.root())).map_err(|error| error.to_string())
}

#[test]
fn a_planned_function_has_the_devices_face_in_the_place_that_was_said() {
    let text = "[[root-port]]\n[[vfio-device]]\nhost = \"0000:41:00.0\"\nport = \"rp0\"\nid = \"nic\"\n";
    let plan = planned(text).expect("possible");
    let (_, node) = plan
        .pci
        .nodes()
        .find(|(_, node)| node.name == "nic")
        .expect("planned");
    assert_eq!(
        (node.bdf.to_string(), node.identity.device),
        ("01:00.0".to_owned(), 0x10d3)
    );
    let bars: Vec<_> = node.bars.iter().map(|bar| (bar.index, bar.size)).collect();
    assert_eq!(bars, [(0, 0x2_0000), (1, 0x20), (3, 0x4000)]);
    assert!(node.intx.is_some());
}

#[test]
fn a_folder_in_sysfs_names_a_function_as_its_address_does() {
    let by = |host: &str| planned(&format!("[[vfio-device]]\nhost = \"{host}\"\n")).map(|plan| plan.devices);
    let address = by(NIC).expect("possible");
    assert_eq!(
        by("/sys/bus/pci/devices/0000:41:00.0/").expect("possible"),
        address
    );
    assert_eq!(by("41:00.0").expect("possible"), address);
    assert_eq!(
        by("0000:42:00.0").expect_err("absent"),
        "m.toml:2: vfio-device.host = 0000:42:00.0: this host has no function there; `lspci -D` lists those it has"
    );
}

#[test]
fn the_same_function_twice_is_refused() {
    let twice = format!("[[vfio-device]]\nhost = \"{NIC}\"\n").repeat(2);
    assert_eq!(
        planned(&twice).expect_err("twice"),
        "m.toml:4: vfio-device.host = 0000:41:00.0: vfio0 is this function too, and it can be passed once"
    );
}

#[test]
fn behind_an_iommu_of_the_guest_every_unit_has_the_guest_announce_what_it_maps() {
    let device = format!("[[vfio-device]]\nhost = \"{NIC}\"\n");
    let roots = "[[root-complex]]\n[[root-complex]]\n";
    let covered = planned(&format!("{device}{roots}[[viommu]]\n[[viommu]]\non = \"rc1\"\n"));
    let units = covered.expect("possible").viommus;
    assert_eq!(units.len(), 2);
    assert!(units.iter().all(|unit| unit.offer.np_cache));
    let efr = units[0].offer.features().efr;
    assert!(efr.hats() == 0 && !efr.ha() && !efr.hd());
    let beside = planned(&format!("{roots}[[viommu]]\non = \"rc1\"\n{device}"));
    assert!(!beside.expect("possible").viommus[0].offer.np_cache);
}

#[test]
fn a_guest_that_is_not_to_announce_what_it_maps_cannot_have_functions_behind_its_iommu() {
    let device = format!("[[vfio-device]]\nhost = \"{NIC}\"\n");
    let text = planned(&format!("{device}[[viommu]]\nnpcache = false\n")).expect_err("not announced");
    assert!(
        text.starts_with("m.toml:4: viommu.npcache = off: vfio0, a function of the host, is behind iommu0"),
        "{text}"
    );
}

#[test]
fn functions_of_the_host_are_refused_behind_a_model() {
    let device = format!("[[vfio-device]]\nhost = \"{NIC}\"\n");
    let text = planned(&format!("{device}[[viommu]]\nmode = \"sim\"\n")).expect_err("not confined");
    assert!(text.contains("it would be behind iommu0, a model"), "{text}");
    let roots = "[[root-complex]]\n[[root-complex]]\n";
    assert!(
        planned(&format!(
            "{roots}[[viommu]]\nmode = \"sim\"\non = \"rc1\"\n{device}"
        ))
        .is_ok()
    );
}

#[test]
fn a_unit_that_confines_a_function_of_the_host_serves_no_guests() {
    let device = format!("[[vfio-device]]\nhost = \"{NIC}\"\n");
    let text = planned(&format!("{device}[[viommu]]\nvirtualizable = true\n")).expect_err("not followed");
    let start = "m.toml:4: viommu.virtualizable = on: vfio0, a function of the host, is behind iommu0";
    assert!(text.starts_with(start), "{text}");
    let roots = "[[root-complex]]\n[[root-complex]]\n";
    let beside = planned(&format!(
        "{roots}[[viommu]]\non = \"rc1\"\nvirtualizable = true\n{device}"
    ));
    assert!(beside.expect("possible").viommus[0].guests.is_some());
}

#[test]
fn the_iommu_a_function_is_said_to_be_behind_is_the_one_it_is_behind() {
    let device = format!("[[vfio-device]]\nhost = \"{NIC}\"\nviommu = \"iommu0\"\n");
    assert!(planned(&format!("{device}[[viommu]]\n")).is_ok());
    let text = planned(&device).expect_err("there is none");
    assert!(
        text.contains("vfio-device.viommu = iommu0: vfio0 is behind no IOMMU where it is"),
        "{text}"
    );
    let roots = "[[root-complex]]\n[[root-complex]]\n";
    let other = planned(&format!("{roots}[[viommu]]\non = \"rc1\"\n{device}")).expect_err("elsewhere");
    assert!(other.contains("vfio0 is behind no IOMMU where it is"), "{other}");
}

#[test]
fn a_host_that_is_only_read_is_not_asked_and_one_that_is_asked_is_asked_once_for_each_version() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    fn ask(_: &HostFunctions, _: Sbdf, abis: &[Abi]) -> Result<(), String> {
        ASKED.fetch_add(1, Ordering::Relaxed);
        Err(format!("type {}", abis[0].viommu_type))
    }
    let at: Sbdf = NIC.parse().expect("an address");
    let [stock, ..] = Abi::built_in();
    let host = nic();
    let read = HostFunctions::below(host.root());
    assert_eq!(read.answers(at, std::slice::from_ref(&stock)), None);
    let asked = read.answering(ask);
    // Of one name, as tables over one version are.
    let other = Abi {
        viommu_type: stock.viommu_type + 1,
        ..stock.clone()
    };
    for abi in [&stock, &other, &stock] {
        let expected = Err(format!("type {}", abi.viommu_type));
        assert_eq!(asked.answers(at, std::slice::from_ref(abi)), Some(expected));
    }
    assert_eq!(ASKED.load(Ordering::Relaxed), 2);
}
