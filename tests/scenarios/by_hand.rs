//! The crate's own tests that need KVM, on a host that has it.

use std::process::Command;

use crate::prerequisites;

#[test]
fn instructions_written_by_hand_do_on_kvm_what_their_tests_say() {
    prerequisites::kvm();
    let output = Command::new(prerequisites::by_hand())
        .args(["--ignored", "--test-threads=1"])
        .output()
        .expect("a test program");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    // None at all would pass as well.
    let mut lines = said.lines();
    let ran = lines.any(|line| line.contains("hand_written::") && line.ends_with("... ok"));
    assert!(ran, "{said}");
}
