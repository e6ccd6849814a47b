//! What a configuration becomes, and which cannot become anything.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::pci::tree::{Node, NodeKind};
use crate::vm::plan::{MemoryBacking, NetBackend};

fn plan(text: &str) -> Plan {
    let config = Config::parse(Path::new("m.toml"), text).expect("a machine file");
    Plan::resolve(&config).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> String {
    let config = Config::parse(Path::new("m.toml"), text).expect("a machine file");
    Plan::resolve(&config).expect_err(text).to_string()
}

fn node<'a>(plan: &'a Plan, name: &str) -> &'a Node {
    let mut nodes = plan.pci.nodes().map(|(_, node)| node);
    nodes.find(|node| node.name == name).expect("it was said")
}

fn address(plan: &Plan, name: &str) -> String {
    node(plan, name).bdf.to_string()
}

#[test]
fn nothing_said_is_a_small_machine() {
    let plan = plan("");
    assert_eq!((plan.cpus.count, &plan.cpus.apic_ids[..]), (1, &[0][..]));
    assert_eq!(plan.memory.size, 512 << 20);
    assert_eq!(plan.memory.backing, MemoryBacking::Anonymous);
    assert!(plan.memory.transparent_huge_pages);
    assert_eq!(
        (plan.boot.clone(), plan.serial.clone()),
        (None, CharBackend::Stdio)
    );
    let names: Vec<_> = plan.pci.nodes().map(|(_, node)| node.name.as_str()).collect();
    assert_eq!(names, ["rc0.host-bridge", "isa-bridge"]);
    let addresses = ["rc0.host-bridge", "isa-bridge"].map(|name| address(&plan, name));
    assert_eq!(addresses, ["00:00.0", "00:14.0"]);
}

#[test]
fn devices_without_a_place_are_integrated_in_the_order_of_their_kinds() {
    let plan = plan("[[net]]\nbackend = \"none\"\n[[disk]]\npath = \"a\"\n[[rng]]\n");
    let addresses = ["disk0", "net0", "rng0"].map(|name| address(&plan, name));
    assert_eq!(addresses, ["00:01.0", "00:02.0", "00:03.0"]);
    let devices: Vec<_> = plan.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(devices, ["disk0", "net0", "rng0"]);
}

#[test]
fn endpoints_point_at_their_devices() {
    let plan = plan("[[disk]]\npath = \"a\"\n[[net]]\nbackend = \"none\"\nid = \"nic\"\n");
    let kinds = ["disk0", "nic"].map(|name| node(&plan, name).kind);
    assert_eq!(kinds, [NodeKind::Endpoint(0), NodeKind::Endpoint(1)]);
    let nic = node(&plan, "nic").identity;
    assert_eq!((nic.vendor, nic.device, nic.class), (0x1af4, 0x1041, 0x02_0000));
}

#[test]
fn test_devices_are_those_that_were_said_and_no_more() {
    let plan = plan(
        "[[root-port]]\n[[test-device]]\n[[test-device]]\nid = \"t\"\nport = \"rp0\"\nmsix-vectors = 2048\n",
    );
    let vectors: Vec<_> = plan
        .devices
        .iter()
        .map(|device| match &device.kind {
            DeviceKind::Test(test) => (device.name.as_str(), test.msix_vectors),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(vectors, [("test0", 32), ("t", 2048)]);
    assert_eq!(address(&plan, "t"), "01:00.0");
    let bars: Vec<_> = node(&plan, "t").bars.iter().map(|bar| bar.index).collect();
    assert_eq!(bars, [0, 1, 2, 4, 5]);
}

#[test]
fn test_devices_have_as_many_vectors_as_msix_allows() {
    assert_eq!(
        refused("[[test-device]]\nmsix-vectors = 2049\n"),
        "m.toml:2: test-device.msix-vectors = 2049: must be 1 to 2048"
    );
    assert!(refused("[[test-device]]\nid = \"isa-bridge\"\n").ends_with("names are unique"));
    assert!(
        refused("[[root-port]]\n[[test-device]]\n[[rng]]\nport = \"test0\"\n")
            .ends_with("`test0` is a test device; ports are rp0")
    );
}

#[test]
fn names_that_are_said_are_not_given_away() {
    let plan = plan("[[rng]]\n[[rng]]\nid = \"rng0\"\n[[rng]]\n");
    let names: Vec<_> = plan.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["rng1", "rng0", "rng2"]);
}

#[test]
fn a_name_twice_is_refused_with_the_other_place() {
    assert_eq!(
        refused("[[rng]]\nid = \"x\"\n[[disk]]\npath = \"a\"\nid = \"x\"\n"),
        "m.toml:2: rng.id = x: `x` is the name of a disk (m.toml:5) already; names are unique"
    );
    assert_eq!(
        refused("[[rng]]\nid = \"isa-bridge\"\n"),
        "m.toml:2: rng.id = isa-bridge: `isa-bridge` is the name of a bridge of the board already; names are unique"
    );
}

#[test]
fn devices_behind_ports_and_switches_are_where_they_were_asked_to_be() {
    let plan = plan(
        "[[root-port]]\n[[switch]]\non = \"rp0\"\ndownstream = 2\n[[net]]\nbackend = \"none\"\nport = \"sw0.1\"\n",
    );
    let addresses = ["rp0", "sw0", "sw0.0", "sw0.1", "net0"].map(|name| address(&plan, name));
    assert_eq!(addresses, ["00:01.0", "01:00.0", "02:00.0", "02:01.0", "04:00.0"]);
}

#[test]
fn a_port_may_be_named_before_it_is_said() {
    let plan = plan(
        "[[switch]]\non = \"sw1.0\"\ndownstream = 1\n[[switch]]\non = \"rp0\"\ndownstream = 1\n[[root-port]]\n",
    );
    assert_eq!(address(&plan, "sw0"), "03:00.0");
}

#[test]
fn a_port_that_does_not_exist_is_refused_with_those_that_do() {
    assert_eq!(
        refused("[[root-port]]\n[[rng]]\nport = \"rp1\"\n"),
        "m.toml:3: rng.port = rp1: no port has this name; did you mean `rp0`? ports are rp0"
    );
    assert_eq!(
        refused("[[rng]]\non = \"rc7\"\n"),
        "m.toml:2: rng.on = rc7: no root complex has this name; did you mean `rc0`? root complexes are rc0"
    );
}

#[test]
fn something_else_of_that_name_is_said_to_be_something_else() {
    let switch = "[[root-port]]\n[[switch]]\non = \"rp0\"\ndownstream = 2\n";
    assert!(
        refused(&format!("{switch}[[rng]]\nport = \"sw0\"\n"))
            .ends_with("`sw0` is a switch; name one of its downstream ports, sw0.0 and so on")
    );
    assert!(refused("[[rng]]\nport = \"rc0\"\n").ends_with("`rc0` is a root complex; say on=rc0"));
    assert!(refused("[[root-port]]\n[[rng]]\non = \"rp0\"\n").ends_with("`rp0` is a port; say port=rp0"));
    assert!(
        refused("[[root-port]]\n[[rng]]\n[[rng]]\nport = \"rng0\"\n")
            .ends_with("`rng0` is an entropy source; ports are rp0")
    );
}

#[test]
fn a_device_in_two_places_is_refused() {
    assert!(
        refused("[[root-port]]\n[[rng]]\nport = \"rp0\"\non = \"rc0\"\n")
            .ends_with("rng.on = rc0: a device is behind a port or on a root complex, not both")
    );
}

#[test]
fn impossible_places_are_refused_with_the_line_of_their_key() {
    assert!(
        refused("[[rng]]\nslot = \"4.0\"\n[[rng]]\nslot = \"4.0\"\n").starts_with(
            "m.toml:4: rng.slot = 4.0: rng1 cannot be at slot 4.0 of rc0: rng0 is there; free are 4.1 and 1.0"
        )
    );
    assert!(refused("[[rng]]\nslot = \"20.0\"\n").contains("isa-bridge is there"));
    assert!(refused("[[rng]]\nslot = \"0.0\"\n").contains("rc0.host-bridge is there"));
    assert!(refused("[[rng]]\nslot = \"4.1\"\n").starts_with("m.toml:2: rng.slot = 4.1: rng0 is function 1"));
    assert!(
        refused("[[root-port]]\n[[rng]]\nport = \"rp0\"\nslot = \"1.0\"\n").starts_with("m.toml:4: rng.slot")
    );
    assert!(
        refused("[[root-port]]\n[[rng]]\nport = \"rp0\"\n[[rng]]\nport = \"rp0\"\n")
            .starts_with("m.toml:5: rng.port = rp0: rng1 finds no free slot on rp0")
    );
}

#[test]
fn a_switch_behind_itself_is_refused() {
    let text = refused("[[switch]]\non = \"sw0.0\"\ndownstream = 1\n");
    assert!(text.starts_with("m.toml:2: switch.on = sw0.0: "), "{text}");
    assert!(text.contains("is behind itself"), "{text}");
}

#[test]
fn bus_ranges_that_cannot_be_are_refused_with_their_line() {
    let roots = |first: &str, second: &str| {
        format!("[[root-complex]]\nbus = \"{first}\"\n[[root-complex]]\nbus = \"{second}\"\n")
    };
    assert!(
        refused(&roots("0-63", "32-95")).starts_with("m.toml:4: root-complex.bus = 32-95: rc1 cannot have")
    );
    assert!(
        refused(&roots("1-63", "64-95")).starts_with("m.toml:2: root-complex.bus = 1-63: no root complex")
    );
    assert!(
        refused("[[root-complex]]\nbus = \"0-1\"\n[[root-port]]\n[[root-port]]\n")
            .starts_with("m.toml:2: root-complex.bus = 0-1: rc0 needs 3 bus numbers")
    );
    assert!(
        refused("[[root-complex]]\nbus = \"0-1\"\n[[root-complex]]\n")
            .starts_with("m.toml:3: root-complex.bus: rc1 needs a bus range")
    );
}

#[test]
fn more_segments_than_fit_are_refused() {
    let segments: String = (0..12)
        .map(|at| format!("[[root-complex]]\nsegment = {at}\n"))
        .collect();
    assert!(refused(&segments).starts_with("m.toml:24: root-complex.segment = 11: 12 PCI segments"));
}

#[test]
fn a_flat_machine_with_too_many_devices_is_refused_at_the_first_too_many() {
    let many = "[[rng]]\n".repeat(31);
    assert!(refused(&many).starts_with("m.toml:31: rng: rng30 finds no free slot on rc0"));
}

#[test]
fn switches_have_as_many_ports_as_a_bus_has_devices() {
    let with = |ports: u32| format!("[[root-port]]\n[[switch]]\non = \"rp0\"\ndownstream = {ports}\n");
    assert_eq!(address(&plan(&with(32)), "sw0.31"), "02:1f.0");
    assert!(refused(&with(33)).ends_with("a switch has 1 to 32 downstream ports"));
    let absurd = "[[switch]]\non = \"rp0\"\ndownstream = 32\n".repeat(200);
    assert!(refused(&format!("[[root-port]]\n{absurd}")).ends_with("a machine has at most 4096 ports"));
}

#[test]
fn processors_multiply() {
    let cpus = |text: &str| {
        let cpus = plan(&format!("[cpus]\n{text}\n")).cpus;
        (cpus.count, cpus.sockets, cpus.cores, cpus.threads)
    };
    assert_eq!(cpus("count = 8"), (8, 1, 8, 1));
    assert_eq!(cpus("count = 8\nsockets = 2\nthreads = 2"), (8, 2, 2, 2));
    assert_eq!(cpus("sockets = 2\ncores = 3"), (6, 2, 3, 1));
}

#[test]
fn apic_ids_have_fields_of_whole_bits() {
    let ids = plan("[cpus]\nsockets = 2\ncores = 3\nthreads = 2\n")
        .cpus
        .apic_ids;
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    let largest = plan("cpus = 1024\n").cpus;
    assert_eq!(largest.apic_ids.last(), Some(&1023));
    let sparse = plan("[cpus]\nsockets = 341\ncores = 3\n").cpus;
    assert_eq!(
        (sparse.count, sparse.apic_ids.last()),
        (1023, Some(&(340 << 2 | 2)))
    );
}

#[test]
fn processors_that_do_not_add_up_are_refused() {
    let refused = |text: &str| refused(&format!("[cpus]\n{text}\n"));
    assert_eq!(
        refused("count = 7\nsockets = 2"),
        "m.toml:2: cpus.count = 7: not a multiple of sockets x threads = 2; 6 or 8 would be"
    );
    assert_eq!(
        refused("count = 8\nsockets = 2\ncores = 2\nthreads = 1"),
        "m.toml:2: cpus.count = 8: 2 sockets x 2 cores x 1 threads are 4 vCPUs, not 8; leave one of the four out"
    );
    assert_eq!(
        refused("count = 1025"),
        "m.toml:2: cpus.count = 1025: a machine has at most 1024 vCPUs"
    );
    assert!(refused("cores = 4294967295\nsockets = 2").contains("at most 1024"));
    assert!(refused("sockets = 4294967295\nthreads = 4294967295").contains("more than 1024"));
}

#[test]
fn pins_are_one_host_cpu_or_one_set_per_vcpu() {
    let pins = |text: &str| -> Vec<String> {
        let cpus = plan(&format!("[cpus]\ncount = 2\n{text}\n")).cpus;
        cpus.pinning
            .iter()
            .map(|pin| pin.as_ref().expect("pinned").to_string())
            .collect()
    };
    assert_eq!(pins("pin = \"4-5\""), ["4", "5"]);
    assert_eq!(pins("pin = [\"0-1\", \"2-3\"]"), ["0-1", "2-3"]);
    let error = refused("[cpus]\ncount = 4\npin = \"0-2\"\n");
    assert!(
        error.starts_with("m.toml:3: cpus.pin = 0-2: names 3 for 4 vCPUs"),
        "{error}"
    );
}

#[test]
fn memory_is_in_whole_pages_and_within_limits() {
    let refused = |text: &str| refused(&format!("[memory]\n{text}\n"));
    assert!(refused("size = \"1M\"").ends_with("a machine has 8M to 64T of RAM"));
    assert!(refused("size = \"65T\"").ends_with("a machine has 8M to 64T of RAM"));
    assert_eq!(
        refused("size = 16777217"),
        "m.toml:2: memory.size = 16777217: no whole number of pages of 4K; 16M or 16388K would be"
    );
    assert!(refused("size = \"1025M\"\nhugepages = \"2M\"").ends_with("1G or 1026M would be"));
    assert!(refused("size = \"2G\"\nhugepages = \"1G\"\nthp = true").contains("never transparent"));
}

#[test]
fn memory_is_backed_as_it_was_asked_to_be() {
    let backing = |text: &str| plan(&format!("[memory]\nsize = \"2G\"\n{text}\n")).memory.backing;
    assert_eq!(backing("shared = true"), MemoryBacking::Shared);
    assert_eq!(
        backing("hugepages = \"1G\""),
        MemoryBacking::HugePages {
            page_size: 1 << 30,
            shared: false
        }
    );
}

#[test]
fn nics_have_one_backend() {
    let refused = |text: &str| refused(&format!("[[net]]\n{text}\n"));
    assert_eq!(
        refused("id = \"a\""),
        "m.toml:1: net: a NIC needs tap=NAME, fd=NUMBER or backend=none"
    );
    assert_eq!(
        refused("backend = \"tap\""),
        "m.toml:1: net: a NIC needs tap=NAME, fd=NUMBER or backend=none"
    );
    assert!(refused("tap = \"t\"\nbackend = \"none\"").contains("say backend=tap, or leave the tap out"));
    assert!(refused("tap = \"t\"\nfd = 3").ends_with("a NIC has a tap or descriptors of one, not both"));
    assert!(refused("fd = [3, 4]\nqueues = 3").contains("2 descriptors for 3 queue pairs"));
    assert!(refused("backend = \"none\"\nmtu = 60").ends_with("must be 68 to 65535"));
    assert!(refused("backend = \"none\"\nqueues = 65").ends_with("must be 1 to 64"));
    assert!(refused("backend = \"none\"\nqueue-size = 100").contains("a power of two"));
}

#[test]
fn addresses_of_nics_are_unique_and_stay() {
    let macs = |text: &str| -> Vec<String> {
        let nets = plan(text)
            .devices
            .into_iter()
            .filter_map(|device| match device.kind {
                DeviceKind::Net(net) => Some(net.mac.to_string()),
                _ => None,
            });
        nets.collect()
    };
    let two = "[[net]]\ntap = \"t0\"\n[[net]]\ntap = \"t1\"\n";
    let found = macs(two);
    assert_ne!(found[0], found[1]);
    assert_eq!(found, macs(two));
    assert!(found.iter().all(|mac| mac.starts_with("52:54:00:")));
    let mac = "mac = \"52:54:00:00:00:01\"\nbackend = \"none\"\n";
    assert_eq!(
        refused(&format!("[[net]]\n{mac}[[net]]\n{mac}")),
        "m.toml:5: net.mac = 52:54:00:00:00:01: net0 has it already"
    );
}

#[test]
fn a_tap_and_a_descriptor_serve_one_nic() {
    assert!(
        refused("[[net]]\ntap = \"t\"\n[[net]]\ntap = \"t\"\n").ends_with("net.tap = t: net0 has it already")
    );
    assert!(refused("[[net]]\nfd = [3, 3]\n").ends_with("net.fd = [3,3]: net0 has it already"));
    let plan = plan("[[net]]\nfd = [3, 4]\n");
    assert!(
        matches!(&plan.devices[0].kind, DeviceKind::Net(net) if net.backend == NetBackend::Fds(vec![3, 4]) && net.queue_pairs == 2)
    );
}

#[test]
fn an_image_has_one_writer() {
    let disk = "[[disk]]\npath = \"a\"\n";
    assert!(
        refused(&format!("{disk}{disk}")).starts_with("m.toml:4: disk.path = a: disk0 has this image too")
    );
    assert!(refused(&format!("{disk}{disk}readonly = true\n")).contains("disk0 has this image too"));
    let both = format!("{disk}readonly = true\n{disk}readonly = true\n");
    assert_eq!(plan(&both).devices.len(), 2);
}

#[test]
fn one_thing_is_on_the_terminal() {
    let console = "[[console]]\nbackend = \"stdio\"\n";
    assert_eq!(plan(console).serial, CharBackend::Null);
    assert!(
        refused(&format!("serial = \"stdio\"\n{console}")).contains("console0 is on the terminal already")
    );
    assert!(refused(&format!("{console}{console}")).contains("console0 is on the terminal already"));
}

#[test]
fn paths_are_relative_to_the_file_they_stand_in() {
    let config =
        Config::parse(Path::new("dir/m.toml"), "kernel = \"k\"\nserial = \"file:log\"\n").expect("fine");
    let plan = Plan::resolve(&config).expect("fine");
    assert_eq!(plan.boot.expect("a kernel").kernel, Path::new("dir/k"));
    assert_eq!(plan.serial, CharBackend::File("dir/log".into()));
}

#[test]
fn kernels_get_only_what_their_protocol_takes() {
    let kernel = |protocol: &str| format!("[kernel]\npath = \"k\"\nprotocol = \"{protocol}\"\n");
    let module = "[[module]]\npath = \"m\"\ncmdline = \"x\"\n";
    assert!(
        refused(&format!("{}{module}", kernel("linux"))).contains("multiboot and PVH kernels take modules")
    );
    for protocol in ["auto", "multiboot", "pvh"] {
        let boot = plan(&format!("initramfs = \"i\"\n{}{module}", kernel(protocol))).boot;
        let boot = boot.expect("a kernel");
        assert_eq!(
            (boot.modules[0].cmdline.as_str(), boot.initramfs.is_some()),
            ("x", true),
            "{protocol}"
        );
    }
}

#[test]
fn a_unit_of_the_hosts_needs_a_function_of_the_host() {
    assert_eq!(
        refused("[[viommu]]\nmode = \"hw\"\n"),
        "m.toml:2: viommu.mode = hw: no function of the host is behind it, by which the host's IOMMU would be known; \
         say a vfio-device there, or another mode"
    );
}

#[test]
fn a_large_machine_is_planned() {
    let plan = plan("cpus = 1024\nmemory = \"4T\"\n");
    assert_eq!(plan.memory.regions.len(), 3);
    assert!(plan.layout.highest.0 > 4 << 40);
}

/// Machines with everything in them, in small and sometimes wrong numbers.
fn any_machine() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "rc0", "rc1", "rp0", "rp1", "rp2", "sw0.0", "sw0.1", "sw1.0", "sw0",
    ]);
    let entry = (0_u8..7, name, 0_u8..33, 0_u8..8, any::<bool>()).prop_map(
        |(kind, name, device, function, placed)| {
            let slot = if placed {
                format!("slot = \"{device}.{function}\"\n")
            } else {
                String::new()
            };
            match kind {
                0 => "[[root-complex]]\n".to_owned(),
                1 => format!("[[root-port]]\n{slot}"),
                2 => format!("[[switch]]\non = \"{name}\"\ndownstream = {}\n", function + 1),
                3 => format!("[[rng]]\nport = \"{name}\"\n"),
                5 => format!("[[viommu]]\non = \"{name}\"\nxt = {placed}\n"),
                4 => format!("[[rng]]\non = \"{name}\"\n{slot}"),
                _ => "[[net]]\nbackend = \"none\"\n".to_owned(),
            }
        },
    );
    prop::collection::vec(entry, 0..20).prop_map(|entries| entries.concat())
}

proptest! {
    #[test]
    fn every_machine_becomes_a_plan_or_an_error_with_a_line(text in any_machine()) {
        let Ok(config) = Config::parse(Path::new("m.toml"), &text) else {
            return Ok(());
        };
        match Plan::resolve(&config) {
            Ok(plan) => {
                let endpoints = plan.pci.nodes().filter(|(_, node)| matches!(node.kind, NodeKind::Endpoint(_)));
                prop_assert_eq!(endpoints.count(), plan.devices.len());
                let units = plan.pci.nodes().filter(|(_, node)| matches!(node.kind, NodeKind::Iommu(_)));
                prop_assert_eq!(units.count(), plan.viommus.len());
            }
            Err(error) => prop_assert!(error.to_string().starts_with("m.toml:"), "{}", error),
        }
    }
}
