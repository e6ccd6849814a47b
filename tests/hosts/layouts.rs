//! Plans of machines with functions of a recorded host.

use std::fs;
use std::path::Path;

use crate::recorded::{Recorded, server, serving};
use crate::{compare, session};

/// NIC 0, NIC 1 and NIC 4, in the layout that mirrors the host.
const NICS: [&str; 8] = [
    "--viommu",
    "per-host",
    "--vfio-device",
    "0000:41:00.0",
    "--vfio-device",
    "0000:42:00.0",
    "--vfio-device",
    "0000:c1:00.0",
];
/// What a kernel of somebody's has that no version built in does.
const KERNEL: &str = "base = 'v-e'\nviommu-type = 4\n";

/// What `ravelin check` says of each of `machines` on `host`.
fn checked(host: &Recorded, machines: &[&[&str]]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("disk.img"), [0; 4096]).expect("an image");
    fs::write(folder.path().join("kernel.toml"), KERNEL).expect("a table");
    fs::write(
        folder.path().join("broken.toml"),
        "base = 'v-e'\n\n[queues]\ncommand = 0\n",
    )
    .expect("a table");
    let check = |flags: &&[&str]| {
        let arguments: Vec<&str> = std::iter::once("check").chain(flags.iter().copied()).collect();
        session(host, folder.path(), &arguments)
    };
    machines.iter().map(check).collect::<Vec<_>>().join("\n")
}

#[test]
fn passed_functions_without_an_iommu_of_the_guest_are_planned() {
    let machine: &[&str] = &[
        "--root-port",
        "id=rp0",
        "--root-port",
        "id=rp1",
        "--vfio-device",
        "host=0000:41:00.0,port=rp0",
        "--vfio-device",
        "host=0000:c1:00.0,port=rp1",
    ];
    compare("passed", &checked(&server(), &[machine]));
}

#[test]
fn what_the_host_cannot_pass_now_is_refused_with_what_to_do() {
    let machines: [&[&str]; 6] = [
        &["--vfio-device", "0000:01:00.0"],
        &["--vfio-device", "0000:02:00.0"],
        &["--vfio-device", "0000:03:00.0"],
        &["--vfio-device", "0000:40:01.1"],
        &["--vfio-device", "0000:c8:00.0"],
        &["--vfio-device", "0000:41:00.0", "--vfio-device", "0000:41:00.0"],
    ];
    compare("not-passable", &checked(&server(), &machines));
}

#[test]
fn functions_whose_bars_do_not_fit_are_refused_by_key_file_and_line() {
    let host = server();
    host.grow("0000:42:00.0", 1 << 31);
    let folder = tempfile::tempdir().expect("a folder");
    let file =
        "[[vfio-device]]\nhost = \"0000:41:00.0\"\n[[vfio-device]]\nid = \"big\"\nhost = \"0000:42:00.0\"\n";
    fs::write(folder.path().join("big.toml"), file).expect("written");
    let text = session(&host, folder.path(), &["check", "big.toml"]);
    let start = "error: big.toml:5: vfio-device.host = 0000:42:00.0: the 32-bit memory windows do not fit: ";
    let refused = text.lines().nth(1).unwrap_or_default();
    assert!(refused.starts_with(start), "{text}");
    assert!(refused.ends_with("big needs the most, 0x80000000"), "{text}");
    assert!(text.ends_with("[2]\n"), "{text}");
}

#[test]
fn machine_files_with_functions_of_a_host_are_as_recorded() {
    for name in ["vfio", "handed-over"] {
        let folder = tempfile::tempdir().expect("a folder");
        let (configs, file) = (
            concat!(env!("CARGO_MANIFEST_DIR"), "/configs"),
            format!("{name}.toml"),
        );
        fs::copy(Path::new(configs).join(&file), folder.path().join(&file)).expect("a copy");
        compare(name, &session(&server(), folder.path(), &["check", &file]));
    }
}

#[test]
fn functions_of_hosts_whose_iommus_serve_guests_are_behind_them_and_a_disk_behind_an_emulated_one() {
    let with_disk = [&NICS[..], &["--disk", "disk.img"]].concat();
    compare("per-host-hw", &checked(&serving(), &[&with_disk]));
    let folder = tempfile::tempdir().expect("a folder");
    let topology = [&["topology"], &NICS[..]].concat();
    compare(
        "per-host-topology",
        &session(&serving(), folder.path(), &topology),
    );
}

#[test]
fn the_same_machine_is_emulated_where_they_do_not_and_says_what_they_lack() {
    let with_disk = [&NICS[..], &["--disk", "disk.img"]].concat();
    compare("per-host-emulated", &checked(&server(), &[&with_disk]));
}

#[test]
fn a_unit_that_is_said_to_be_the_hosts_is_tried_whatever_the_host_tells() {
    let machine: &[&str] = &["--viommu", "hw,abi=kernel.toml", "--vfio-device", "0000:41:00.0"];
    compare("hw-said", &checked(&server(), &[machine]));
}

#[test]
fn what_no_unit_of_the_hosts_can_serve_is_refused_with_what_can() {
    let behind = |others: &[&'static str]| {
        let first: &[&str] = &["--root-port", "id=rp0", "--vfio-device", "0000:41:00.0,port=rp0"];
        [first, others].concat()
    };
    let machines = [
        vec!["--viommu", "hw"],
        vec!["--viommu", "per-host"],
        vec!["--viommu", "per-host,on=rc0", "--vfio-device", "0000:41:00.0"],
        behind(&[
            "--viommu",
            "hw,on=rc0",
            "--disk",
            "path=disk.img,on=rc0",
            "--root-complex",
            "rc0",
        ]),
        behind(&["--viommu", "hw", "--disk", "disk.img"]),
        behind(&[
            "--viommu",
            "hw",
            "--root-port",
            "id=rp1",
            "--vfio-device",
            "0000:c1:00.0,port=rp1",
        ]),
        behind(&["--viommu", "hw,intremap=on"]),
        behind(&["--viommu", "hw,ats=on"]),
        behind(&["--viommu", "hw,pasid-bits=8"]),
        behind(&["--viommu", "hw,doorbell=poll"]),
        behind(&["--viommu", "hw,abi=v-z"]),
        behind(&["--viommu", "hw,abi=broken.toml"]),
        behind(&["--viommu", "emulated,abi=v-e"]),
    ];
    let machines: Vec<&[&str]> = machines.iter().map(Vec::as_slice).collect();
    compare("hw-refused", &checked(&serving(), &machines));
}
