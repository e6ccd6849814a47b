//! Hosts as their file systems tell of them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// A tree that looks like a host's file systems.
pub(crate) struct Recorded(tempfile::TempDir);

/// A function as the kernel shows it.
pub(crate) struct Function {
    pub(crate) address: &'static str,
    /// Vendor and device.
    pub(crate) ids: (&'static str, &'static str),
    pub(crate) class: &'static str,
    pub(crate) driver: Option<&'static str>,
    /// Its IOMMU group and the function and name of its IOMMU.
    pub(crate) confined: Option<(u32, &'static str, &'static str)>,
    pub(crate) resets: &'static str,
    /// Its VFIO device.
    pub(crate) vfio: Option<&'static str>,
}

/// A NIC of Intel's that no driver has and no IOMMU serves.
pub(crate) const NIC: Function = Function {
    address: "0000:00:01.0",
    ids: ("0x8086", "0x10d3"),
    class: "0x020000",
    driver: None,
    confined: None,
    resets: "flr bus",
    vfio: None,
};

/// 128 KiB of registers, 32 ports, and 16 KiB prefetchable above 4 GiB.
const RESOURCES: &str = "0x00000000fea00000 0x00000000fea1ffff 0x0000000000040200\n\
    0x000000000000c000 0x000000000000c01f 0x0000000000040101\n\
    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
    0x000000c000000000 0x000000c000003fff 0x000000000014220c\n\
    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
    0x0000000000000000 0x0000000000000000 0x0000000000000000\n";

/// Header type of a bridge.
const BRIDGE: u8 = 1;
const HEADER_TYPE: usize = 0x0e;
const INTERRUPT_PIN: usize = 0x3d;

impl Recorded {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub(crate) fn root(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, path: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        fs::write(path, content).expect("written");
        self
    }

    /// The first BAR of the function at `at` is of 32 bits and has this many bytes, a power of two.
    pub(crate) fn grow(&self, at: &str, bytes: u64) {
        let last = bytes - 1;
        let first = format!("0x0000000000000000 {last:#018x} 0x0000000000040200\n");
        let (_, others) = RESOURCES.split_once('\n').expect("six lines");
        self.file(&format!("sys/bus/pci/devices/{at}/resource"), first + others);
    }

    fn link(&self, path: &str, target: &str) -> &Self {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        symlink(target, path).expect("linked");
        self
    }

    fn function(&self, function: &Function) -> &Self {
        let at = function.address;
        let home = format!("sys/bus/pci/devices/{at}");
        let mut header = [0; 64];
        header[HEADER_TYPE] = u8::from(function.class.starts_with("0x0604")) * BRIDGE;
        header[INTERRUPT_PIN] = 1;
        self.file(&format!("{home}/vendor"), function.ids.0)
            .file(&format!("{home}/device"), function.ids.1)
            .file(&format!("{home}/class"), function.class)
            .file(&format!("{home}/numa_node"), "0\n")
            .file(&format!("{home}/resource"), RESOURCES)
            .file(&format!("{home}/config"), header)
            .file(&format!("{home}/reset_method"), function.resets);
        if let Some(driver) = function.driver {
            self.link(&format!("{home}/driver"), &format!("../../drivers/{driver}"));
        }
        if let Some((group, unit, name)) = function.confined {
            self.link(
                &format!("{home}/iommu_group"),
                &format!("../../../kernel/iommu_groups/{group}"),
            )
            .link(&format!("{home}/iommu"), &format!("../../../{unit}/iommu/{name}"))
            .link(
                &format!("sys/devices/{unit}/iommu/{name}/devices/{at}"),
                &format!("../../../{at}"),
            )
            .file(&format!("sys/kernel/iommu_groups/{group}/devices/{at}"), "")
            .file(&format!("sys/kernel/iommu_groups/{group}/type"), "DMA-FQ\n");
        }
        if let Some(vfio) = function.vfio {
            self.file(&format!("{home}/vfio-dev/{vfio}/dev"), "511:0\n")
                .file(&format!("dev/vfio/devices/{vfio}"), "");
        }
        self
    }

    /// An IOMMU of AMD's with these features.
    fn iommu(&self, unit: &str, name: &str, features: &str) -> &Self {
        self.file(
            &format!("sys/devices/{unit}/iommu/{name}/amd-iommu/features"),
            features,
        )
        .link(
            &format!("sys/class/iommu/{name}"),
            &format!("../../devices/{unit}/iommu/{name}"),
        )
    }
}

/// An EPYC server with three IOMMUs, most of its NICs given to vfio-pci.
pub(crate) fn server() -> Recorded {
    server_with("246577efa2254afa:0\n")
}

/// The same of a generation whose IOMMUs serve guests: vIOMMUSup, and GCR3TRPMode.
pub(crate) fn serving() -> Recorded {
    server_with("24e577efa2254afa:8\n")
}

fn server_with(features: &str) -> Recorded {
    const FIRST: (&str, &str) = ("0000:00:00.2", "ivhd2");
    const SECOND: (&str, &str) = ("0000:40:00.2", "ivhd1");
    const THIRD: (&str, &str) = ("0000:c0:00.2", "ivhd3");
    let host = Recorded::new();
    host.file(
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: AMD EPYC 9575F 64-Core Processor\n",
    )
    .file("sys/module/kvm_amd/parameters/nested", "1\n")
    .file("sys/bus/pci/drivers/vfio-pci/new_id", "")
    .file("dev/iommu", "");
    for (unit, name) in [FIRST, SECOND, THIRD] {
        host.iommu(unit, name, features);
    }
    let on = |(unit, name): (&'static str, &'static str), group| Some((group, unit, name));
    let nic = |address, iommu, group, vfio| Function {
        address,
        driver: Some("vfio-pci"),
        confined: on(iommu, group),
        vfio: Some(vfio),
        ..NIC
    };
    let functions = [
        // With its own driver, and with none.
        Function {
            address: "0000:01:00.0",
            driver: Some("e1000e"),
            confined: on(FIRST, 1),
            ..NIC
        },
        Function {
            address: "0000:02:00.0",
            confined: on(FIRST, 2),
            ..NIC
        },
        // A port and, behind it and its neighbour, the NICs 0 and 1.
        Function {
            address: "0000:40:01.1",
            ids: ("0x1022", "0x14ab"),
            class: "0x060400",
            driver: Some("pcieport"),
            confined: on(SECOND, 10),
            resets: "pm",
            ..NIC
        },
        nic("0000:41:00.0", SECOND, 12, "vfio0"),
        nic("0000:42:00.0", SECOND, 13, "vfio1"),
        // NIC 4.
        nic("0000:c1:00.0", THIRD, 30, "vfio2"),
        // Two functions of one device in one group, then two that are groups of their own.
        nic("0000:c2:00.0", THIRD, 31, "vfio3"),
        nic("0000:c2:00.1", THIRD, 31, "vfio4"),
        nic("0000:c3:00.0", THIRD, 32, "vfio5"),
        nic("0000:c3:00.1", THIRD, 33, "vfio6"),
        // Two devices in one group: a switch above them cannot keep them apart.
        nic("0000:c5:00.0", THIRD, 35, "vfio7"),
        nic("0000:c6:00.0", THIRD, 35, "vfio8"),
        // The disk of the host is in the way of the NIC beside it.
        nic("0000:c8:00.0", THIRD, 36, "vfio9"),
        Function {
            address: "0000:c9:00.0",
            ids: ("0x144d", "0xa80a"),
            class: "0x010802",
            driver: Some("nvme"),
            confined: on(THIRD, 36),
            resets: "",
            ..NIC
        },
    ];
    for function in functions {
        host.function(&function);
    }
    host
}

/// A machine whose IOMMU is off.
pub(crate) fn without_iommus() -> Recorded {
    let host = Recorded::new();
    host.file("proc/cpuinfo", "model name\t: AMD Ryzen 5 PRO 4650G\n")
        .file("sys/module/kvm_amd/parameters/nested", "0\n")
        .function(&Function {
            address: "0000:01:00.0",
            driver: Some("e1000e"),
            ..NIC
        })
        .function(&Function {
            address: "0000:02:00.0",
            driver: Some("vfio-pci"),
            ..NIC
        });
    host
}
