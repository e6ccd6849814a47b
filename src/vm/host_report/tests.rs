//! Recorded hosts: a server with two AMD IOMMUs, a machine with nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;
use crate::iommu::iommufd::viommu::{Answer, PAGE_OFFSET, Step, Tried, VIOMMU_ALLOC, Version};
use crate::iommu::viommu::host::HostFeatures;

/// A tree that looks like a host's file systems.
struct Recorded(tempfile::TempDir);

impl Recorded {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        fs::write(path, text).expect("written");
        self
    }

    fn link(&self, path: &str, target: &str) -> &Self {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        symlink(target, path).expect("linked");
        self
    }

    /// An IOMMU of AMD's at `function`, for `devices`.
    fn ivhd(&self, number: u32, function: &str, features: &str, devices: &[&str]) -> &Self {
        let home = format!("sys/devices/pci0000:00/{function}/iommu/ivhd{number}");
        self.file(&format!("{home}/amd-iommu/features"), features);
        for device in devices {
            self.link(&format!("{home}/devices/{device}"), &format!("../../../{device}"));
        }
        self.link(
            &format!("sys/class/iommu/ivhd{number}"),
            &format!("../../devices/pci0000:00/{function}/iommu/ivhd{number}"),
        )
    }

    fn function(&self, address: &str, ids: (&str, &str), driver: &str, group: u32, iommu: &str) -> &Self {
        let home = format!("sys/bus/pci/devices/{address}");
        self.file(&format!("{home}/vendor"), &format!("{}\n", ids.0))
            .file(&format!("{home}/device"), &format!("{}\n", ids.1))
            .file(&format!("{home}/class"), "0x020000\n")
            .file(&format!("{home}/numa_node"), "-1\n")
            .link(
                &format!("{home}/driver"),
                &format!("../../../bus/pci/drivers/{driver}"),
            )
            .link(
                &format!("{home}/iommu_group"),
                &format!("../../../kernel/iommu_groups/{group}"),
            )
            .link(
                &format!("{home}/iommu"),
                &format!("../../0000:00:00.2/iommu/{iommu}"),
            )
            .file(&format!("sys/kernel/iommu_groups/{group}/type"), "DMA-FQ\n")
    }

    fn read(&self, probed: &Probed) -> HostReport {
        HostReport::read(self.root(), probed)
    }
}

/// A server with two IOMMUs, the second of which could do everything.
fn server() -> Recorded {
    let host = Recorded::new();
    host.file(
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: AMD EPYC 9575F 64-Core Processor\n",
    )
    .file("sys/module/kvm_amd/parameters/nested", "1\n")
    .file("dev/iommu", "")
    .file("sys/bus/pci/drivers/vfio-pci/new_id", "")
    .ivhd(10, "0000:40:00.2", "80000000000\n", &[])
    .ivhd(0, "0000:00:00.2", "29d7:0\n", &["0000:01:00.0", "0000:01:00.1"])
    .ivhd(1, "0000:20:00.2", "81000000000010:8\n", &["0000:21:00.0"])
    .function("0000:01:00.1", ("0x8086", "0x10d3"), "vfio-pci", 12, "ivhd0")
    .function("0000:01:00.0", ("0x8086", "0x10d3"), "e1000e", 12, "ivhd0")
    .function("0000:21:00.0", ("0x15b3", "0x101e"), "mlx5_core", 3, "ivhd1")
    .file("sys/bus/pci/devices/0000:21:00.0/sriov_numvfs", "2\n")
    .file("sys/bus/pci/devices/0000:21:00.0/sriov_totalvfs", "16\n");
    host
}

fn usable() -> Probed {
    Probed {
        capabilities: None,
        kvm: Ok(()),
        memlock: None,
    }
}

fn missing(report: &HostReport, name: &str) -> String {
    let mode = report
        .modes
        .iter()
        .find(|mode| mode.name == name)
        .expect("a mode");
    mode.missing.join("\n")
}

#[test]
fn iommus_come_in_the_order_of_their_numbers_with_what_they_serve() {
    let report = server().read(&usable());
    let names: Vec<_> = report.iommus.iter().map(|iommu| iommu.name.as_str()).collect();
    assert_eq!(names, ["ivhd0", "ivhd1", "ivhd10"]);
    let first = &report.iommus[0];
    assert_eq!(
        first.function.map(|at| at.to_string()).as_deref(),
        Some("0000:00:00.2")
    );
    let devices: Vec<_> = first.devices.iter().map(ToString::to_string).collect();
    assert_eq!(devices, ["0000:01:00.0", "0000:01:00.1"]);
}

#[test]
fn features_are_read_with_and_without_the_second_register() {
    let report = server().read(&usable());
    let kinds: Vec<_> = report.iommus.iter().map(|iommu| iommu.kind.clone()).collect();
    assert_eq!(
        kinds,
        [
            IommuKind::Amd { efr: 0x29d7, efr2: 0 },
            IommuKind::Amd {
                efr: 0x81_0000_0000_0010,
                efr2: 8
            },
            IommuKind::Amd {
                efr: 0x800_0000_0000,
                efr2: 0
            },
        ]
    );
    let names = kinds[1].features();
    assert_eq!(
        names,
        ["GT(4 levels)", "HATS(4 levels)", "GIO", "vIOMMU", "GCR3TRP"]
    );
}

#[test]
fn groups_hold_their_functions_with_drivers() {
    let report = server().read(&usable());
    let numbers: Vec<_> = report.groups.iter().map(|group| group.number).collect();
    assert_eq!(numbers, [3, 12]);
    let drivers: Vec<_> = report.groups[1]
        .functions
        .iter()
        .map(|function| function.driver.as_deref())
        .collect();
    assert_eq!(drivers, [Some("e1000e"), Some("vfio-pci")]);
    let nic = &report.groups[0].functions[0];
    assert_eq!(
        (nic.vendor, nic.class, nic.numa_node),
        (Some(0x15b3), Some(0x02_0000), None)
    );
    assert_eq!(nic.virtual_functions, Some((2, 16)));
    assert_eq!(nic.iommu.as_deref(), Some("ivhd1"));
    assert_eq!(report.groups[0].domain.as_deref(), Some("DMA-FQ"));
}

#[test]
fn a_function_has_its_resets_in_the_kernels_order_and_its_node() {
    let host = server();
    let home = "sys/bus/pci/devices/0000:01:00.1";
    host.file(&format!("{home}/reset_method"), "flr bus\n")
        .file(&format!("{home}/vfio-dev/vfio3"), "");
    let report = host.read(&usable());
    let [first, second] = &report.groups[1].functions[..] else {
        panic!("two functions")
    };
    assert_eq!((first.resets.len(), &first.node), (0, &None));
    assert_eq!(second.resets, ["flr", "bus"]);
    assert_eq!(second.node.as_deref(), Some(Path::new("/dev/vfio/devices/vfio3")));
}

#[test]
fn a_function_that_no_iommu_translates_for_is_reported_and_cannot_be_passed() {
    let host = server();
    let home = "sys/bus/pci/devices/0000:03:00.0";
    host.file(&format!("{home}/vendor"), "0x1af4\n")
        .file(&format!("{home}/device"), "0x1000\n")
        .file(&format!("{home}/class"), "0x020000\n")
        .file(&format!("{home}/config"), &"\0".repeat(64))
        .file(&format!("{home}/resource"), "");
    let report = host.read(&usable());
    assert_eq!(report.ungrouped.len(), 1);
    let why = report.ungrouped[0].passable.as_ref().expect_err("unconfined");
    assert!(why.starts_with("no IOMMU translates for it"), "{why}");
}

#[test]
fn the_machine_itself_is_known() {
    let report = server().read(&usable());
    assert_eq!(
        report.processor.as_deref(),
        Some("AMD EPYC 9575F 64-Core Processor")
    );
    assert_eq!(
        (report.kvm.module.as_deref(), report.kvm.nested),
        (Some("kvm_amd"), Some(true))
    );
    assert!(report.iommufd && report.vfio_pci && !report.vfio_groups);
}

#[test]
fn a_host_that_has_everything_is_asked_for_the_rest() {
    let report = server().read(&usable());
    for mode in ["machine", "passed", "emulated", "shadowed", "sim"] {
        assert_eq!(missing(&report, mode), "", "{mode}");
    }
    assert_eq!(
        missing(&report, "hw"),
        "a kernel with AMD's vIOMMU: not asked: only the running kernel can be asked, and this is a copy of a host"
    );
}

/// What the kernel would have said with the function behind ivhd1 of [`server`].
fn judged(answers: Result<Tried, String>) -> HostReport {
    let mut report = server().read(&usable());
    report.trials = Ok(vec![UnitTrial {
        iommu: "ivhd1".to_owned(),
        function: "0000:21:00.0".parse().expect("an address"),
        answers,
        exports: None,
    }]);
    report.modes = modes::judge(&report);
    report
}

fn step(name: &'static str, answer: Answer) -> Step {
    Step { name, answer }
}

fn refused(errno: &str) -> Answer {
    Answer::Refused {
        errno: errno.to_owned(),
        hint: String::new(),
    }
}

fn tried(answers: bool, steps: Vec<Step>) -> Tried {
    Tried {
        features: None,
        steps: Vec::new(),
        versions: vec![Version {
            name: "v-e",
            answers,
            steps,
        }],
    }
}

#[test]
fn what_the_kernel_answered_decides_about_the_hardware() {
    let says = |answers| missing(&judged(answers), "hw");
    assert_eq!(says(Ok(tried(true, vec![step(VIOMMU_ALLOC, Answer::Ok)]))), "");
    assert_eq!(
        says(Err("cannot open /dev/iommu".to_owned())),
        "a kernel with AMD's vIOMMU: not asked with 0000:21:00.0: cannot open /dev/iommu"
    );
    assert_eq!(
        says(Ok(tried(false, vec![step(VIOMMU_ALLOC, Answer::Ok)]))),
        "a kernel with AMD's vIOMMU: the version it answers to is none: a stock kernel, which makes a vIOMMU of any type \
         and does nothing about it"
    );
    assert_eq!(
        says(Ok(tried(false, vec![step(VIOMMU_ALLOC, refused("EOPNOTSUPP"))]))),
        "a kernel with AMD's vIOMMU: the version it answers to is none"
    );
    let other = vec![step(VIOMMU_ALLOC, Answer::Ok), step(PAGE_OFFSET, Answer::Ok)];
    assert_eq!(
        says(Ok(tried(false, other))),
        "a kernel with AMD's vIOMMU: the version it answers to is none, though it has a VF page: a kernel of AMD's with \
         another version, which a file for --abi can say"
    );
    let half = vec![
        step(VIOMMU_ALLOC, Answer::Ok),
        step("VDEVICE_ALLOC", refused("EINVAL")),
    ];
    assert_eq!(
        says(Ok(tried(true, half))),
        "a kernel with AMD's vIOMMU: VDEVICE_ALLOC of v-e is answered with EINVAL"
    );
}

#[test]
fn what_the_kernel_tells_of_its_units_counts_more_than_sysfs() {
    let features = HostFeatures { efr: 1 << 4, efr2: 8 };
    let answers = Tried {
        features: Some(features),
        ..tried(true, Vec::new())
    };
    assert_eq!(
        missing(&judged(Ok(answers)), "hw"),
        "GIOSup (EFR bit 48): v2 tables for requests without PASID; ivhd1 has it not\n\
         vIOMMUSup (EFR bit 55): a guest's own rings; ivhd1 has it not"
    );
}

#[test]
fn bars_of_the_viommu_extension_are_enabled_by_the_firmware_or_missing() {
    let host = server();
    let mut config = [0_u8; 256];
    let bars = |config: &[u8]| {
        let path = host.root().join("sys/bus/pci/devices/0000:20:00.2/config");
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, config).expect("written");
        let report = host.read(&usable());
        (report.iommus[1].viommu_bars, missing(&report, "hw"))
    };
    let needed = "a firmware that enables the BARs of the vIOMMU extension: those of ivhd1 are off\n";
    assert_eq!(bars(&config).0, None, "no capabilities");
    // The IOMMU's own capability, then the vendor-specific one.
    config[0x34] = 0x40;
    config[0x40..0x42].copy_from_slice(&[0x0f, 0x60]);
    assert_eq!(bars(&config).0, None, "a chain that ends");
    config[0x60] = 9;
    config[0x68] = 1;
    let (enabled, hw) = bars(&config);
    assert_eq!(enabled, Some(false), "one of two");
    assert!(hw.starts_with(needed), "{hw}");
    config[0x70] = 1;
    let (enabled, hw) = bars(&config);
    assert_eq!(enabled, Some(true));
    assert!(!hw.contains("firmware"), "{hw}");
    config[0x60..0x62].copy_from_slice(&[1, 0x40]);
    assert_eq!(bars(&config).0, None, "a chain without end");
    assert_eq!(bars(&config[..64]).0, None, "what anybody may read");
}

#[test]
fn options_of_modules_and_of_the_kernels_build_are_told() {
    let host = server();
    host.file("proc/sys/kernel/osrelease", "7.3.4-amd64\n")
        .file(
            "boot/config-7.3.4-amd64",
            "CONFIG_IOMMUFD=m\n# CONFIG_AMD_IOMMU_IOMMUFD is not set\nCONFIG_VFIO_DEVICE_CDEV=y\n",
        )
        .file("sys/module/kvm_amd/parameters/avic", "N\n")
        .file("sys/module/iommufd/parameters/allow_unsafe_interrupts", "Y\n");
    let report = host.read(&usable());
    assert_eq!(
        (report.kvm.avic, report.kernel.unsafe_interrupts),
        (Some(false), Some(true))
    );
    assert_eq!(report.kernel.not_built, ["CONFIG_AMD_IOMMU_IOMMUFD"]);
    assert!(
        missing(&report, "hw")
            .starts_with("a kernel with CONFIG_AMD_IOMMU_IOMMUFD: /boot/config-7.3.4-amd64 is without\n")
    );
    let hw = report
        .modes
        .iter()
        .find(|mode| mode.name == "hw")
        .expect("a mode");
    assert_eq!(hw.without.len(), 1);
    host.file("sys/module/kvm_amd/parameters/avic", "1\n");
    let report = host.read(&usable());
    assert!(report.modes.iter().all(|mode| mode.without.is_empty()));
}

#[test]
fn functions_without_an_iommu_before_them_may_be_opened_by_their_groups() {
    let host = server();
    fs::remove_file(host.root().join("dev/iommu")).expect("it had one");
    let report = host.file("dev/vfio/vfio", "").read(&usable());
    assert_eq!(missing(&report, "passed"), "");
    assert!(missing(&report, "shadowed").starts_with("/dev/iommu: load iommufd"));
    fs::remove_file(host.root().join("dev/vfio/vfio")).expect("there");
    let report = host.read(&usable());
    assert!(missing(&report, "passed").starts_with("/dev/iommu: load iommufd"));
}

#[test]
fn a_host_is_not_asked_without_a_node_or_a_function() {
    let mut report = server().read(&usable());
    let why = trial::of_this_host(&report, &[]).expect_err("none has a node");
    assert!(
        why.starts_with("no function is bound to vfio-pci; `scripts/bind-vfio"),
        "{why}"
    );
    report.iommufd = false;
    let why = trial::of_this_host(&report, &[]).expect_err("no node");
    assert_eq!(why, "/dev/iommu is not there");
}

#[test]
fn a_host_without_anything_is_told_everything_that_is_missing() {
    let probed = Probed {
        kvm: Err("cannot open /dev/kvm".to_owned()),
        capabilities: None,
        memlock: Some(8 << 20),
    };
    let report = Recorded::new().read(&probed);
    assert_eq!(missing(&report, "machine"), "KVM: cannot open /dev/kvm");
    let hardware = missing(&report, "hw");
    for part in [
        "KVM:",
        "an IOMMU: none",
        "/dev/iommu:",
        "the driver vfio-pci",
        "bound to vfio-pci",
        "it is 8 MiB",
        "an AMD IOMMU: there is none",
    ] {
        assert!(hardware.contains(part), "{part}: {hardware}");
    }
}

#[test]
fn the_nearest_unit_is_named_with_what_it_lacks() {
    let host = Recorded::new();
    host.ivhd(0, "0000:00:00.2", "29d7\n", &[])
        .ivhd(1, "0000:20:00.2", "0\n", &[]);
    let hardware = missing(&host.read(&usable()), "hw");
    assert!(
        hardware.contains("GIOSup (EFR bit 48): v2 tables for requests without PASID; ivhd0 has it not"),
        "{hardware}"
    );
}

#[test]
fn an_intel_unit_is_known_and_any_other_is_shown() {
    let host = Recorded::new();
    host.file(
        "sys/devices/virtual/iommu/dmar0/intel-iommu/cap",
        "d2008c40660462\n",
    )
    .file("sys/devices/virtual/iommu/dmar0/intel-iommu/ecap", "f050da\n")
    .link("sys/class/iommu/dmar0", "../../devices/virtual/iommu/dmar0")
    .file("sys/devices/virtual/iommu/smmu3.0x1/x", "")
    .link(
        "sys/class/iommu/smmu3.0x1",
        "../../devices/virtual/iommu/smmu3.0x1",
    );
    let report = host.read(&usable());
    let kinds: Vec<_> = report
        .iommus
        .iter()
        .map(|iommu| (&iommu.kind, iommu.function))
        .collect();
    assert_eq!(
        kinds,
        [
            (
                &IommuKind::Intel {
                    cap: 0xd2_008c_4066_0462,
                    ecap: 0xf0_50da
                },
                None
            ),
            (&IommuKind::Other, None)
        ]
    );
}

#[test]
fn files_that_make_no_sense_are_left_out() {
    let host = Recorded::new();
    host.ivhd(0, "0000:00:00.2", "features?\n", &["not-a-device"])
        .function("0000:01:00.0", ("0xfffff", "x"), "d", 1, "ivhd0")
        .file("sys/bus/pci/devices/nonsense/vendor", "0x1\n");
    let report = host.read(&usable());
    assert_eq!(
        (&report.iommus[0].kind, report.iommus[0].devices.len()),
        (&IommuKind::Other, 0)
    );
    let function = &report.groups[0].functions[0];
    assert_eq!((function.vendor, function.device), (None, None));
}
