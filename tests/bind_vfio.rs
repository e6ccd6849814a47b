//! `scripts/bind-vfio` over trees that stand for sysfs and /dev: what it writes where, and how it refuses.
//!
//! The kernel's part, that a driver really changes, is seen in the lab (scenarios of `vfio`).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use assert_cmd::Command;
use tempfile::TempDir;

const NIC: &str = "0000:41:00.0";
const NEIGHBOUR: &str = "0000:41:00.1";
const BRIDGE: &str = "0000:40:01.0";
const NO_IOMMU: &str = "0001:02:03.4";

/// A host with two functions in group 7, a bridge, and a function for which no IOMMU translates.
struct Host {
    sys: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            sys: tempfile::tempdir().expect("a folder"),
        };
        for driver in ["vfio-pci", "igb"] {
            host.folder(&format!("bus/pci/drivers/{driver}"));
        }
        for (at, class) in [
            (NIC, "0x020000"),
            (NEIGHBOUR, "0x020000"),
            (BRIDGE, "0x060400"),
            (NO_IOMMU, "0x010802"),
        ] {
            host.folder(&format!("bus/pci/devices/{at}"));
            host.put(&format!("bus/pci/devices/{at}/class"), &format!("{class}\n"));
        }
        for at in [NIC, NEIGHBOUR] {
            host.folder(&format!("kernel/iommu_groups/7/devices/{at}"));
            let group = host.path("kernel/iommu_groups/7");
            symlink(group, host.path(&format!("bus/pci/devices/{at}/iommu_group"))).expect("a link");
        }
        host
    }

    fn path(&self, below: &str) -> PathBuf {
        self.sys.path().join(below)
    }

    fn folder(&self, below: &str) {
        fs::create_dir_all(self.path(below)).expect("a folder");
    }

    fn put(&self, below: &str, text: &str) {
        fs::write(self.path(below), text).expect("a file");
    }

    fn said(&self, below: &str) -> Option<String> {
        fs::read_to_string(self.path(below)).ok()
    }

    /// Bind `at` to `driver`.
    fn drive(&self, at: &str, driver: &str) {
        let folder = self.path(&format!("bus/pci/drivers/{driver}"));
        symlink(folder, self.path(&format!("bus/pci/devices/{at}/driver"))).expect("a link");
    }

    /// Status, what was said, and what was complained of.
    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/bind-vfio"))
            .args(arguments)
            .env("RAVELIN_SYS", self.sys.path())
            .env("RAVELIN_DEV", self.path("dev"))
            .env("LC_ALL", "C")
            .output()
            .expect("it runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let status = output.status.code().expect("no signal ended it");
        (status, text(&output.stdout), text(&output.stderr))
    }

    /// What it complains of, in one line, as it fails.
    fn refusal(&self, arguments: &[&str]) -> String {
        let (status, _, complaint) = self.run(arguments);
        assert_eq!(status, 1, "{complaint}");
        assert_eq!(complaint.matches("bind-vfio: error: ").count(), 1, "{complaint}");
        complaint
    }
}

#[test]
fn all_functions_or_those_named_are_shown_with_group_and_driver() {
    let host = Host::new();
    host.drive(NIC, "vfio-pci");
    host.folder(&format!("bus/pci/devices/{NIC}/vfio-dev/vfio3"));
    // Some kernels name the device and make no node for it.
    let (_, by_group, _) = host.run(&["show", NIC]);
    assert!(by_group.trim_end().ends_with("/dev/vfio/7"), "{by_group}");
    host.folder("dev/vfio/devices");
    host.put("dev/vfio/devices/vfio3", "");
    let (status, shown, _) = host.run(&["show"]);
    assert_eq!(status, 0);
    let lines: Vec<Vec<&str>> = shown
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 4);
    let nic = [
        NIC,
        "class",
        "0x020000",
        "group",
        "7",
        "driver",
        "vfio-pci",
        "/dev/vfio/devices/vfio3",
    ];
    assert!(lines.contains(&nic.to_vec()), "{shown}");
    let alone = [NO_IOMMU, "class", "0x010802", "group", "-", "driver", "-"];
    assert!(lines.contains(&alone.to_vec()), "{shown}");
    let (_, one, _) = host.run(&["show", "41:00.0"]);
    assert_eq!(one.lines().count(), 1);
}

#[test]
fn a_function_is_kept_for_vfio_and_let_go_by_its_driver_before_the_kernel_looks_for_one() {
    let host = Host::new();
    host.drive(NIC, "igb");
    host.put("bus/pci/drivers/igb/unbind", "");
    // Nobody binds anything in a tree of files: it says so, having asked for all it could.
    let complaint = host.refusal(&["bind", "41:00.0"]);
    assert!(
        complaint.contains("vfio-pci does not take 0000:41:00.0"),
        "{complaint}"
    );
    let kept = host.said(&format!("bus/pci/devices/{NIC}/driver_override"));
    assert_eq!(kept.as_deref(), Some("vfio-pci\n"));
    let let_go = host.said("bus/pci/drivers/igb/unbind");
    assert_eq!(let_go.as_deref(), Some("0000:41:00.0\n"));
    let looked = host.said("bus/pci/drivers_probe");
    assert_eq!(looked.as_deref(), Some("0000:41:00.0\n"));
    assert_eq!(
        host.said(&format!("bus/pci/devices/{NEIGHBOUR}/driver_override")),
        None
    );
}

#[test]
fn a_neighbour_in_the_group_that_its_driver_keeps_is_named() {
    let host = Host::new();
    host.drive(NIC, "vfio-pci");
    host.drive(NEIGHBOUR, "igb");
    let (status, shown, warning) = host.run(&["bind", NIC]);
    assert_eq!(status, 0);
    assert_eq!(shown.lines().count(), 1);
    assert!(
        warning.contains("0000:41:00.1 is in group 7 too and has the driver igb; bind it as well"),
        "{warning}"
    );
}

#[test]
fn unbinding_forgets_the_driver_and_has_the_kernel_look_for_one() {
    let host = Host::new();
    host.drive(NIC, "vfio-pci");
    host.put("bus/pci/drivers/vfio-pci/unbind", "");
    let (status, ..) = host.run(&["unbind", NIC]);
    assert_eq!(status, 0);
    let kept = host.said(&format!("bus/pci/devices/{NIC}/driver_override"));
    assert_eq!(kept.as_deref(), Some("\n"), "an empty line takes it away");
    let let_go = host.said("bus/pci/drivers/vfio-pci/unbind");
    assert_eq!(let_go.as_deref(), Some("0000:41:00.0\n"));
}

#[test]
fn what_the_kernel_refuses_is_said_with_what_was_written_where() {
    // A folder in the place of the file: writing fails for root too.
    for (refused, what) in [
        (
            format!("bus/pci/devices/{NIC}/driver_override"),
            "keep 0000:41:00.0 for vfio-pci",
        ),
        (
            "bus/pci/drivers/igb/unbind".to_owned(),
            "take 0000:41:00.0 from igb",
        ),
        (
            "bus/pci/drivers_probe".to_owned(),
            "look for a driver for 0000:41:00.0",
        ),
    ] {
        let host = Host::new();
        host.drive(NIC, "igb");
        host.put("bus/pci/drivers/igb/unbind", "");
        let _ = fs::remove_file(host.path(&refused));
        host.folder(&refused);
        let complaint = host.refusal(&["bind", NIC]);
        assert!(
            complaint.contains(&format!("the kernel does not {what}: Is a directory")),
            "{complaint}"
        );
        let file = refused.rsplit('/').next().expect("a name");
        assert!(complaint.contains(file), "{complaint}");
    }
}

#[test]
fn what_cannot_be_bound_is_refused_by_name() {
    let host = Host::new();
    for (arguments, reason) in [
        (
            ["bind", BRIDGE],
            "0000:40:01.0 is a bridge; bind the functions behind it",
        ),
        (["bind", NO_IOMMU], "no IOMMU translates for 0001:02:03.4"),
        (
            ["bind", "0000:99:00.0"],
            "this host has no function at 0000:99:00.0",
        ),
        (["unbind", "41:0.0"], "'41:0.0' is no PCI address"),
    ] {
        let complaint = host.refusal(&arguments);
        assert!(complaint.contains(reason), "{complaint}");
    }
    assert!(
        host.refusal(&["bind"])
            .contains("bind needs a function, like 0000:41:00.0")
    );
    let (status, _, usage) = host.run(&["give"]);
    assert_eq!(status, 2);
    assert!(usage.contains("bind-vfio bind FUNCTION"), "{usage}");
}
