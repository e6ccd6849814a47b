//! The host's NIC in a guest, on a host without iommufd: Debian's own kernel.

use std::path::Path;

use crate::card::{Card, is_not_reset_with_one_of_the_hosts, works_through_resets};
use crate::given::Given;
use crate::machine::Machine;
use crate::vfio::{BEHIND_AN_IOMMU, NETWORK, machine};

/// The exit status for what the host refused.
const REFUSED: i32 = 1;

/// The host is as the module says.
fn without_iommufd() {
    let iommufd = Path::new("/dev/iommu").exists();
    assert!(
        !iommufd,
        "this host has iommufd; run `scripts/test lab legacy_host`"
    );
}

fn nic() -> Given {
    without_iommufd();
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

/// The kernel is shown two groups, each with a function of the card.
#[test]
fn functions_of_two_groups_are_reset_together_and_work_through_resets() {
    without_iommufd();
    let ended = works_through_resets(Card::apart());
    let by_groups = "functions of the host are opened by their IOMMU groups";
    assert!(ended.log.contains(by_groups), "{}", ended.log);
}

#[test]
fn a_function_whose_card_is_in_another_group_of_the_hosts_is_silenced_and_the_log_names_that() {
    without_iommufd();
    is_not_reset_with_one_of_the_hosts(Card::apart());
}
