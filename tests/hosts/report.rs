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
    let nic = &report["groups"][4]["functions"][0];
    assert_eq!(nic["address"], "0000:42:00.0");
    assert_eq!(nic["node"], "/dev/vfio/devices/vfio1");
    assert_eq!(nic["resets"], serde_json::json!(["flr", "bus"]));
    assert_eq!(nic["passable"], serde_json::json!({ "Ok": null }));
}
