//! The host's NIC in a guest, on a host without iommufd: Debian's own kernel.

use std::path::Path;

use crate::given::Given;
use crate::machine::Machine;
use crate::vfio::{BEHIND_AN_IOMMU, NETWORK, machine};

/// The exit status for what the host refused.
const REFUSED: i32 = 1;

/// The host's NIC, where the host is as the module says.
fn nic() -> Given {
    let iommufd = Path::new("/dev/iommu").exists();
    assert!(
        !iommufd,
        "this host has iommufd; run `scripts/test lab legacy_host`"
    );
    Given::nic()
}

#[test]
fn the_hosts_nic_gets_an_address_by_its_group_and_belongs_to_one_guest() {
    let nic = nic();
    let mut running = machine("lab", &nic, "")
        .arguments(["--log", "info"])
        .script(&format!("{NETWORK}\necho @@there; sleep 8"))
        .start();
    running.wait_for("@@there", 1);
    let second = machine("lab", &nic, "").run().with(REFUSED);
    assert!(
        second.log.contains("another process has a function of the group"),
        "{}",
        second.log
    );
    let ended = running.end().well();
    assert!(
        ended
            .log
            .contains("functions of the host are opened by their IOMMU groups"),
        "{}",
        ended.log
    );
    assert!(!ended.log.contains("ERROR"), "{}", ended.log);
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    nic.works_on_the_host();
}

#[test]
fn behind_an_emulated_iommu_the_nic_is_refused_for_want_of_iommufd() {
    let nic = nic();
    let ended = Machine::new("lab")
        .arguments(BEHIND_AN_IOMMU)
        .arguments(["--vfio-device", &nic.at])
        .run()
        .with(2);
    let expected = "it would be behind iommu0, and only /dev/iommu gives out the address spaces";
    assert!(ended.log.contains(expected), "{}", ended.log);
    nic.works_on_the_host();
}
