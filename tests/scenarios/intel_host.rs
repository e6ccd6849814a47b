//! The host's NIC in a guest, on a host whose IOMMU is Intel's and remaps interrupts, so that nothing is allowed that is
//! unsafe.

use std::fs;

use crate::given::Given;
use crate::vfio::{BEHIND, BEHIND_AN_IOMMU, NETWORK, machine};

/// The host's NIC, where the host is as the module says.
fn nic() -> Given {
    let nic = Given::nic();
    let iommu = fs::read_link(format!("/sys/bus/pci/devices/{}/iommu", nic.at)).expect("an IOMMU");
    let name = iommu.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(
        name.starts_with("dmar"),
        "{name}; run `scripts/test lab intel_host`"
    );
    for module in ["iommufd", "vfio_iommu_type1"] {
        let file = format!("/sys/module/{module}/parameters/allow_unsafe_interrupts");
        // A module that is not there allows nothing.
        let allowed = fs::read_to_string(file).unwrap_or_default();
        assert_ne!(allowed.trim(), "Y", "{module}");
    }
    nic
}

#[test]
fn the_hosts_nic_gets_an_address_by_interrupts_that_the_host_remaps() {
    let nic = nic();
    let mut running = machine("lab", &nic, "")
        .script(&format!("{NETWORK}\necho @@there; sleep 8"))
        .start();
    running.wait_for("@@there", 1);
    let interrupts = fs::read_to_string("/proc/interrupts").expect("readable");
    let own = format!("({})", nic.at);
    let passed: Vec<_> = interrupts
        .lines()
        .filter(|line| line.contains("vfio-msi") && line.contains(&own))
        .collect();
    assert!(!passed.is_empty(), "{interrupts}");
    assert!(
        passed.iter().all(|line| line.contains(" IR-")),
        "not remapped:\n{}",
        passed.join("\n")
    );
    let ended = running.end().well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    nic.works_on_the_host();
}

#[test]
fn the_hosts_nic_works_behind_an_emulated_iommu_in_front_of_intels() {
    let nic = nic();
    let ended = machine("lab", &nic, ",viommu=iommu0")
        .arguments(BEHIND_AN_IOMMU)
        .script(&format!("{NETWORK}{BEHIND}"))
        .run()
        .well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    assert_eq!(ended.console.said("domain"), "DMA");
    nic.works_on_the_host();
}
