//! Hosts that tests record: functions of one kind, whose groups, IOMMUs and drivers they choose.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::{Face, HEADER_TYPE, Handed, HostFunctions, INTERRUPT_PIN};

/// A tree that looks like a host's file systems.
pub(in crate::vm) struct Recorded(tempfile::TempDir);

pub(in crate::vm) const NIC: &str = "0000:41:00.0";
pub(in crate::vm) const SECOND: &str = "0000:41:00.1";
const NIC_RESOURCES: &str = "0x00000000fea00000 0x00000000fea1ffff 0x0000000000040200\n\
    0x000000000000c000 0x000000000000c01f 0x0000000000040101\n\
    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
    0x000000c000000000 0x000000c000003fff 0x000000000014220c\n\
    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
    0x00000000fea20000 0x00000000fea3ffff 0x0000000000046200\n";

impl Recorded {
    pub(in crate::vm) fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub(in crate::vm) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(in crate::vm) fn file(&self, path: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        fs::write(path, content).expect("written");
        self
    }

    pub(in crate::vm) fn link(&self, path: &str, target: &str) -> &Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        let _replaced = fs::remove_file(&path);
        symlink(target, path).expect("linked");
        self
    }

    pub(in crate::vm) fn function(&self, at: &str, class: &str, header_type: u8) -> &Self {
        let home = format!("sys/bus/pci/devices/{at}");
        let mut header = [0; 64];
        header[HEADER_TYPE] = header_type;
        header[INTERRUPT_PIN] = 1;
        self.file(&format!("{home}/vendor"), "0x8086\n")
            .file(&format!("{home}/device"), "0x10d3\n")
            .file(&format!("{home}/class"), class)
            .file(&format!("{home}/revision"), "0x02\n")
            .file(&format!("{home}/subsystem_vendor"), "0x8086\n")
            .file(&format!("{home}/subsystem_device"), "0xa01f\n")
            .file(&format!("{home}/resource"), NIC_RESOURCES)
            .file(&format!("{home}/config"), header)
            .served(at, "ivhd0", 12)
    }

    /// The function at `at` is behind the IOMMU `iommu`, in group `group` and in no other.
    pub(in crate::vm) fn served(&self, at: &str, iommu: &str, group: u32) -> &Self {
        let home = format!("sys/bus/pci/devices/{at}");
        if let Ok(old) = fs::read_link(self.root().join(format!("{home}/iommu_group"))) {
            let old = old.file_name().expect("a number").to_string_lossy().into_owned();
            let entry = self
                .root()
                .join(format!("sys/kernel/iommu_groups/{old}/devices/{at}"));
            fs::remove_file(entry).expect("it was in a group");
        }
        self.link(
            &format!("{home}/iommu_group"),
            &format!("../../../kernel/iommu_groups/{group}"),
        )
        .link(
            &format!("{home}/iommu"),
            &format!("../../0000:00:00.2/iommu/{iommu}"),
        )
        .file(&format!("sys/kernel/iommu_groups/{group}/devices/{at}"), "")
    }

    pub(in crate::vm) fn bound(&self, at: &str, driver: &str) -> &Self {
        self.link(
            &format!("sys/bus/pci/devices/{at}/driver"),
            &format!("../../drivers/{driver}"),
        )
    }

    pub(in crate::vm) fn node(&self, at: &str, name: &str) -> &Self {
        self.bound(at, "vfio-pci")
            .file(&format!("sys/bus/pci/devices/{at}/vfio-dev/{name}"), "")
            .file(&format!("dev/vfio/devices/{name}"), "")
            .file("dev/iommu", "")
    }

    pub(in crate::vm) fn face(&self, at: &str) -> Result<Face, String> {
        HostFunctions::below(self.0.path()).face(at.parse().expect("an address"))
    }

    pub(in crate::vm) fn usable(&self, at: &str) -> Result<(), String> {
        HostFunctions::below(self.0.path()).usable(at.parse().expect("an address"), Handed::default())
    }

    pub(in crate::vm) fn in_the_way(&self, at: &str) -> Vec<String> {
        HostFunctions::below(self.0.path()).in_the_way(at.parse().expect("an address"))
    }
}

/// A host with one NIC.
pub(in crate::vm) fn nic() -> Recorded {
    let host = Recorded::new();
    host.function(NIC, "0x020000\n", 0x80);
    host
}
