//! `ravelin host`.

use crate::recorded::{Recorded, server, without_iommus};
use crate::{compare, session};

/// The report but for KVM, memlock and what follows from them, which are of the machine that runs the test.
fn report(host: &Recorded) -> String {
    let text = session(host, host.root(), &["host"]);
    assert!(text.ends_with("[0]\n"), "{text}");
    let about_the_host = text.lines().take_while(|line| !line.starts_with("machine "));
    let ours = |line: &&str| !line.starts_with("KVM ") && !line.starts_with("memlock ");
    about_the_host.filter(ours).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_function_of_a_server_is_told_with_what_is_in_its_way() {
    compare("report-server", &report(&server()));
}

#[test]
fn a_host_without_iommus_can_pass_nothing_and_says_what_to_switch_on() {
    compare("report-without-iommus", &report(&without_iommus()));
}

#[test]
fn the_report_as_json_says_the_same_of_each_function() {
    let host = server();
    let text = session(&host, host.root(), &["host", "--json"]);
    let json = text
        .split_once('\n')
        .and_then(|(_, rest)| rest.strip_suffix("[0]\n"))
        .expect("a report");
    let report: serde_json::Value = serde_json::from_str(json).expect("JSON");
    // Of the machine that runs this, which may have none.
    let kvm = &report["kvm"]["capabilities"];
    assert!(
        kvm.is_null() || kvm["vcpus"].is_u64() && kvm["lacks"].is_array(),
        "{kvm}"
    );
    let nic = &report["groups"][4]["functions"][0];
    assert_eq!(nic["address"], "0000:42:00.0");
    assert_eq!(nic["node"], "/dev/vfio/devices/vfio1");
    assert_eq!(nic["resets"], serde_json::json!(["flr", "bus"]));
    assert_eq!(nic["passable"], serde_json::json!({ "Ok": null }));
}

#[test]
fn the_kernel_of_a_recorded_host_is_not_asked() {
    let host = server();
    let text = session(&host, host.root(), &["host"]);
    let why = "not asked for: only the running kernel can be asked, and this is a copy of a host";
    assert!(text.contains(&format!("AMD's vIOMMU {why}\n")), "{text}");
    let modes: Vec<_> = text.lines().skip_while(|line| !line.starts_with("hw ")).collect();
    let needs = |what: &str| modes.iter().any(|line| line.contains(what));
    assert!(
        needs("- GCR3TRPMode (EFR2 bit 3): v2 tables over the host's; ivhd"),
        "{text}"
    );
    assert!(
        needs("- vIOMMUSup (EFR bit 55): a guest's own rings; ivhd"),
        "{text}"
    );
    assert!(needs("- a kernel with AMD's vIOMMU: not asked: only"), "{text}");
    assert!(!text.contains("this one does not"), "{text}");
}
