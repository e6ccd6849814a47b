//! What cannot start says why, and ends with the status that tells whose mistake it is.

use std::fs;
use std::process::{Command, Output};

use crate::prerequisites::{binary, guest, kvm};

fn run(arguments: &[&str]) -> Output {
    kvm();
    // What is wrongly taken would run, and its guest hang.
    Command::new("timeout")
        .arg("120")
        .arg(binary())
        .arg("run")
        .args(arguments)
        .output()
        .expect("the binary starts")
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_kernel_that_is_none_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let kernel = folder.path().join("not-a-kernel");
    fs::write(&kernel, vec![0x5a; 100_000]).expect("a file");
    let output = run(&[
        "--memory",
        "128M",
        "--kernel",
        kernel.to_str().expect("a plain path"),
    ]);
    assert_ne!(output.status.code(), Some(0));
    assert!(message(&output).contains("not-a-kernel"), "{}", message(&output));
}

#[test]
fn a_kernel_cut_short_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let kernel = folder.path().join("half-a-kernel");
    let whole = fs::read(guest("lab").kernel).expect("a kernel");
    fs::write(&kernel, &whole[..whole.len() / 2]).expect("a file");
    let output = run(&[
        "--memory",
        "256M",
        "--kernel",
        kernel.to_str().expect("a plain path"),
    ]);
    assert_ne!(output.status.code(), Some(0));
    assert!(message(&output).contains("half-a-kernel"), "{}", message(&output));
}

#[test]
fn a_tap_that_is_not_there_is_refused_by_name() {
    let kernel = guest("lab").kernel;
    let output = run(&[
        "--memory",
        "128M",
        "--kernel",
        kernel.to_str().expect("plain"),
        "--net",
        "tap=no/such",
    ]);
    assert_ne!(output.status.code(), Some(0));
    assert!(message(&output).contains("no/such"), "{}", message(&output));
}
