//! `scripts/epyc-check`: the report that it writes, what it skips, and what it refuses.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A `ravelin` whose host lacks two things, or what `$STATUS` says.
const RAVELIN: &str = r#"#!/bin/bash
case $* in
    --version) echo 'ravelin 9.9' ;;
    'host --json') echo '{}' ;;
    host)
        echo "AMD's vIOMMU not asked for: no function is bound"
        echo 'hw           not ready: the hardware; it needs'
        echo '             - GIOSup; ivhd0 has it not'
        echo '             - a kernel'
        echo '             - better with avic'
        echo 'sim          ready: a model'
        exit "${STATUS:-0}"
        ;;
    *) exit 2 ;;
esac
"#;
/// A `scripts/test` that says what it was asked for.
const TESTS: &str = "#!/bin/bash\necho \"running 1 test\"\necho \"asked for $*\"\n";
const BENCH: &str = "#!/bin/bash\necho \"measured: $*\"\n";

struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(tempfile::tempdir().expect("a folder"));
        for (name, text) in [("ravelin", RAVELIN), ("test", TESTS), ("bench", BENCH)] {
            let path = bench.path(name);
            fs::write(&path, text).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its own");
        }
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn script(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/epyc-check"));
        command
            .args(arguments)
            .current_dir(self.0.path())
            .env("RAVELIN_BIN", self.path("ravelin"))
            .env("RAVELIN_CHECK_TEST", self.path("test"))
            .env("RAVELIN_CHECK_BENCH", self.path("bench"));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.script(arguments).output().expect("bash runs it")
    }

    fn report(&self) -> String {
        fs::read_to_string(self.path("report")).expect("a report")
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether KVM here runs unmodified kernels, as `scripts/lab.d/native.sh` has it.
fn native() -> bool {
    let loaded = ["kvm_amd", "kvm_intel"]
        .iter()
        .any(|module| Path::new("/sys/module").join(module).exists());
    loaded
        && fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

#[test]
fn the_report_begins_with_a_summary_and_has_a_section_for_each_thing_that_was_done() {
    let bench = Bench::new();
    let output = bench.run(&["--report", "report"]);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let report = bench.report();
    let mut titles: Vec<_> = report
        .lines()
        .filter_map(|line| line.strip_prefix("== "))
        .collect();
    titles.retain(|title| !title.starts_with("scenarios "));
    assert_eq!(
        titles,
        [
            "summary",
            "the host",
            "what the kernel said of its IOMMUs",
            "ravelin host",
            "ravelin host --json",
            "what mode hw misses",
            "the emulated IOMMU (scripts/bench iommu --micro)",
        ]
    );
    let has = |line: &str| assert!(report.lines().any(|other| other == line), "{line}:\n{report}");
    has("host     passed, but the kernel was not asked: no function is bound");
    has("hw       skipped: 2 conditions do not hold");
    has("GIOSup; ivhd0 has it not");
    has("bench    passed");
    has("measured: iommu --micro");
    has("ravelin    ravelin 9.9");
    if native() {
        has("native   passed");
        has("asked for native viommu::");
    } else {
        let skipped = report.lines().find(|line| line.starts_with("native   skipped: "));
        assert!(skipped.is_some_and(|line| line.contains("kvm")), "{report}");
    }
}

#[test]
fn what_fails_is_in_the_summary_and_in_the_exit_status() {
    let bench = Bench::new();
    let output = bench
        .script(&["--report", "report", "host"])
        .env("STATUS", "1")
        .output()
        .expect("bash runs it");
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    let report = bench.report();
    assert!(report.contains("\nhost     FAILED\n"), "{report}");
    assert!(report.contains("sim          ready: a model\n[1]\n"), "{report}");
}

#[test]
fn what_ravelin_says_of_this_host_is_understood() {
    let bench = Bench::new();
    let output = bench
        .script(&["--report", "report", "host", "hw"])
        .env("RAVELIN_BIN", env!("CARGO_BIN_EXE_ravelin"))
        .output()
        .expect("bash runs it");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let report = bench.report();
    if !Path::new("/dev/iommu").exists() {
        let line = "\nhost     passed, but the kernel was not asked: /dev/iommu is not there\n";
        assert!(report.contains(line), "{report}");
        assert!(report.contains("\nhw       skipped: "), "{report}");
        assert!(
            report.contains("\na kernel with AMD's vIOMMU: not asked: /dev/iommu is not there\n"),
            "{report}"
        );
    }
}

#[test]
fn what_cannot_be_followed_is_refused_before_anything_is_done() {
    let bench = Bench::new();
    fs::write(bench.path("there"), "mine").expect("written");
    for (arguments, problem) in [
        (
            &["lab"][..],
            "unknown part 'lab'; there are host native hw bench nic all",
        ),
        (&["--quiet"], "unknown part '--quiet'; "),
        (&["--report"], "--report needs a file"),
        (
            &["--report", "there"],
            "there is there already; name another with --report",
        ),
        (
            &["--report", "no/such/folder"],
            "no/such/folder cannot be written",
        ),
    ] {
        let output = bench.run(arguments);
        let said = errors(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.starts_with(&format!("epyc-check: error: {problem}")),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let output = bench
        .script(&["--report", "report"])
        .env("RAVELIN_BIN", bench.path("absent"))
        .output()
        .expect("bash runs it");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(fs::read_to_string(bench.path("there")).expect("still"), "mine");
    let left: Vec<_> = fs::read_dir(bench.0.path()).expect("readable").collect();
    assert_eq!(left.len(), 4, "no report");
}

#[test]
fn the_help_is_the_head_of_the_script() {
    let output = Bench::new().run(&["--help"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("Tries Ravelin on this host"), "{text}");
    assert!(
        text.contains("never run here") && !text.contains("set -e"),
        "{text}"
    );
}
