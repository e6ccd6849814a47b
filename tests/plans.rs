//! Each file in configs/ gives the recorded plan.
//!
//! `INSTA_UPDATE=always cargo test --test plans` records anew; the difference is then for review.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use ravelin::vm::config::Config;
use ravelin::vm::plan::Plan;

/// Files with functions of a host, whose plans `tests/hosts` records for a host that is recorded too.
const OF_A_HOST: [&str; 2] = ["handed-over", "vfio"];
/// What the files name: present, of a size that a disk can have.
const IMAGES: [&str; 5] = ["disk.img", "seed.img", "kernel", "initrd", "xen"];

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

/// A folder with a copy of every machine file, and the images they name.
fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(configs()).expect("the machine files") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    for image in IMAGES {
        fs::write(folder.path().join(image), [0; 4096]).expect("an image");
    }
    folder
}

/// What `ravelin SUBCOMMAND NAME.toml` prints.
fn printed(arguments: &[&str], name: &str) -> String {
    let folder = prepared();
    let output = Command::cargo_bin("ravelin")
        .expect("the binary is built")
        .args(arguments)
        .arg(format!("{name}.toml"))
        .current_dir(folder.path())
        .output()
        .expect("it runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(errors, "");
    String::from_utf8(output.stdout).expect("text")
}

fn compare(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("golden/plans");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

macro_rules! golden {
    ($($test:ident: $name:literal,)+) => {
        /// The files that have a test.
        const NAMES: &[&str] = &[$($name),+];

        $(
            #[test]
            fn $test() {
                compare($name, &printed(&["check"], $name));
            }
        )+
    };
}

golden! {
    minimal_is_as_recorded: "minimal",
    disk_is_as_recorded: "disk",
    quickstart_is_as_recorded: "quickstart",
    flat_is_as_recorded: "flat",
    deep_switches_is_as_recorded: "deep-switches",
    multi_function_is_as_recorded: "multi-function",
    segments_is_as_recorded: "segments",
    viommu_is_as_recorded: "viommu",
    big_is_as_recorded: "big",
    test_device_is_as_recorded: "test-device",
    talk_is_as_recorded: "talk",
    hypervisor_is_as_recorded: "hypervisor",
    pinned_is_as_recorded: "pinned",
    multiboot_is_as_recorded: "multiboot",
}

#[test]
fn every_machine_file_has_a_recorded_plan() {
    let mut files: Vec<String> = fs::read_dir(configs())
        .expect("the machine files")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .collect();
    files.sort();
    let mut named: Vec<&str> = NAMES.iter().copied().chain(OF_A_HOST).collect();
    named.sort_unstable();
    assert_eq!(files, named);
}

#[test]
fn every_machine_file_begins_by_saying_what_it_is_for() {
    for name in NAMES.iter().copied().chain(OF_A_HOST) {
        let text = fs::read_to_string(configs().join(format!("{name}.toml"))).expect("readable");
        assert!(text.starts_with("# "), "{name}");
    }
}

#[test]
fn the_whole_plan_of_the_quickstart_machine_is_as_recorded() {
    compare("quickstart-json", &printed(&["check", "--json"], "quickstart"));
}

#[test]
fn the_graph_of_the_quickstart_machine_is_as_recorded() {
    compare("quickstart-dot", &printed(&["topology", "--dot"], "quickstart"));
}

#[test]
fn the_topology_as_json_is_the_one_in_the_plan() {
    let read = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&printed(arguments, "segments")).expect("JSON")
    };
    assert_eq!(read(&["topology", "--json"]), read(&["check", "--json"])["pci"]);
}

#[test]
fn the_big_machine_has_256_devices_behind_16_root_complexes() {
    let config = Config::load(Some(&configs().join("big.toml")), &[]).expect("a machine file");
    let plan = Plan::resolve(&config).expect("a possible machine");
    assert_eq!((plan.devices.len(), plan.pci.roots().count()), (256, 16));
}
