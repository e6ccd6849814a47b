//! Plans of machines with functions of a recorded host.

use std::fs;

use crate::recorded::{Recorded, server};
use crate::{compare, session};

/// What `ravelin check` says of each of `machines` on `host`.
fn checked(host: &Recorded, machines: &[&[&str]]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
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
fn the_machine_of_the_talk_is_as_recorded() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/vfio.toml");
    fs::copy(file, folder.path().join("vfio.toml")).expect("a copy");
    compare(
        "vfio",
        &session(&server(), folder.path(), &["check", "vfio.toml"]),
    );
}
