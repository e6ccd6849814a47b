//! Mode `hw` on a host whose IOMMU does not serve guests, as the lab's: refused by the step that the kernel refuses, and
//! left to `auto`, emulated.

use std::process::Command;
use std::time::Duration;

use crate::given::Given;
use crate::machine::Machine;
use crate::prerequisites::binary;
use crate::vfio::NETWORK;

/// How long one boot may take; it takes half a minute.
const DEADLINE: Duration = Duration::from_secs(150);
/// The exit status for what the host refused.
const HOST_REFUSED: i32 = 1;

/// What `ravelin check` plans with these flags.
fn planned(flags: &[&str]) -> String {
    let output = Command::new(binary()).arg("check").args(flags).output();
    let output = output.expect("the binary starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn an_iommu_of_the_hosts_that_serves_no_guests_is_refused_by_step_and_the_nic_works_again() {
    let nic = Given::nic();
    let said = planned(&["--viommu", "hw", "--vfio-device", &nic.at]);
    assert!(
        said.contains("AMD IOMMU, hw (ivhd0 lacks GIOSup (EFR bit 48)"),
        "{said}"
    );
    let ended = Machine::new("lab")
        .deadline(DEADLINE)
        .arguments(["--viommu", "hw", "--vfio-device", &nic.at])
        .run()
        .with(HOST_REFUSED);
    let action = format!(
        "cannot have ivhd0 of the host serve iommu0, with {} behind it (`ravelin host` says what is missing for mode hw)",
        nic.at
    );
    let step = "HWPT_ALLOC of the nest parent: Operation not supported (os error 95)";
    assert!(
        ended.log.contains(&action) && ended.log.contains(step),
        "{}",
        ended.log
    );
    nic.works_on_the_host();
}

#[test]
fn what_the_host_cannot_serve_is_emulated_when_that_is_left_to_us() {
    let nic = Given::nic();
    let flags = ["--viommu", "per-host", "--vfio-device", &nic.at];
    let said = planned(&flags);
    assert!(
        said.contains("AMD IOMMU, emulated (auto: ivhd0 lacks GIOSup"),
        "{said}"
    );
    let ended = Machine::new("lab")
        .deadline(DEADLINE)
        .arguments(["--cpus", "2"])
        .arguments(flags)
        .script(&format!(
            "{NETWORK}\nsay domain \"$(cat \"$at/iommu_group/type\")\"\n"
        ))
        .run()
        .well();
    assert_eq!(ended.console.said("address"), "10.0.2.15");
    assert_eq!(ended.console.said("domain"), "DMA");
    nic.works_on_the_host();
}
