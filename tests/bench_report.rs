//! `scripts/bench.d/report.awk`: what rows it makes of samples, and when it fails.

use std::fs;
use std::process::{Command, Output};

/// A target by a ratio, one by a value, and a row without one.
const ROWS: &str = r#"END {
    begin_report()
    row("time-us", "time", "ms", 1000, "ratio", 0.9)
    row("bytes", "bytes", "B", 1, "value", 100)
    row("note", "note", "s", 1, "", 0)
    end_report()
}
"#;
/// Medians: 2 ms for us; 4 ms for the better of two peers.
const MET: &str = "ravelin time-us 9000\nravelin time-us 1000\nravelin time-us 2000\n\
    near time-us 3000\nnear time-us 5000\nfar time-us 8000\nravelin bytes 100\nravelin note 5\n";

fn report(samples: &str, rows: &str, json: bool) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        path
    };
    Command::new("awk")
        .arg("-v")
        .arg(format!("json={}", u8::from(json)))
        .args(["-f", "scripts/bench.d/report.awk", "-f"])
        .arg(file("rows.awk", rows))
        .arg(file("samples", samples))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("awk runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The words of the row that begins with `name`.
fn words(output: &Output, name: &str) -> Vec<String> {
    let text = text(output);
    let row = text.lines().find(|line| line.starts_with(name));
    let row = row.unwrap_or_else(|| panic!("no row {name}:\n{text}"));
    row.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn a_row_has_our_median_and_that_of_the_best_peer_and_their_ratio() {
    let output = report(MET, ROWS, false);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(
        words(&output, "time"),
        [
            "time", "(ms)", "2.00", "4.00", "near", "0.500", "ratio", "<=", "0.9", "met"
        ]
    );
    assert_eq!(
        words(&output, "bytes"),
        ["bytes", "(B)", "100.00", "-", "-", "<=", "100", "B", "met"]
    );
    assert_eq!(words(&output, "note"), ["note", "(s)", "5.00", "-", "-"]);
}

#[test]
fn a_missed_target_is_named_and_the_status_is_1() {
    for (was, is, row) in [
        ("ravelin bytes 100\n", "ravelin bytes 101\n", "bytes"),
        // 0.925 of the best peer.
        ("ravelin time-us 2000\n", "ravelin time-us 3700\n", "time"),
    ] {
        let output = report(&MET.replace(was, is), ROWS, false);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert_eq!(words(&output, row).last().map(String::as_str), Some("MISSED"));
    }
}

#[test]
fn what_else_meets_a_target_is_said_with_it() {
    let rows = r#"END { begin_report(); row("time-us", "time", "ms", 1000, "ratio", 0.1, "a reason"); end_report() }"#;
    let output = report(MET, rows, false);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        text(&output).contains("ratio <= 0.1, or a reason"),
        "{}",
        text(&output)
    );
}

#[test]
fn samples_that_are_missing_fail_and_are_named() {
    let ours = MET.replace("ravelin bytes 100\n", "");
    let peers = MET.replace("near", "ravelin").replace("far", "ravelin");
    for (samples, complaint) in [
        (ours, "bench: no samples of bytes"),
        (peers, "bench: no peer has samples of time-us"),
    ] {
        let output = report(&samples, ROWS, false);
        assert_eq!(output.status.code(), Some(1));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(errors.contains(complaint), "{errors}");
    }
}

#[test]
fn the_same_rows_come_as_json() {
    let output = report(&MET.replace("bytes 100", "bytes 101"), ROWS, true);
    assert_eq!(output.status.code(), Some(1));
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        rows,
        serde_json::json!([
            {
                "measure": "time", "unit": "ms", "ours": 2.0, "peer": 4.0, "peer_name": "near", "ratio": 0.5,
                "target": "ratio <= 0.9", "met": true, "runs": 3
            },
            {
                "measure": "bytes", "unit": "B", "ours": 101.0, "peer": null, "peer_name": null, "ratio": null,
                "target": "<= 100 B", "met": false, "runs": 1
            },
            {
                "measure": "note", "unit": "s", "ours": 5.0, "peer": null, "peer_name": null, "ratio": null,
                "target": null, "met": null, "runs": 1
            }
        ])
    );
}
