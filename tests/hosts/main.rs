//! What Ravelin says of hosts, and plans for them: recorded sysfs trees stand for hosts that are not at hand.
//!
//! `INSTA_UPDATE=always cargo test --test hosts` records anew; the difference is then for review.

mod layouts;
mod recorded;
mod report;

use std::path::Path;

use assert_cmd::Command;

use recorded::Recorded;

/// What a terminal would show of `ravelin ARGUMENTS --host-root HOST`.
fn session(host: &Recorded, folder: &Path, arguments: &[&str]) -> String {
    let output = Command::cargo_bin("ravelin")
        .expect("the binary is built")
        .args(arguments)
        .arg("--host-root")
        .arg(host.root())
        .current_dir(folder)
        .output()
        .expect("it runs");
    format!(
        "$ ravelin {}\n{}{}[{}]\n",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        output.status.code().expect("no signal ended it")
    )
}

fn compare(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../golden/hosts");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}
