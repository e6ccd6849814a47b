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
/// A `scripts/test` that says what it was asked for, and with which disk. One scenario of `nested_vfio` wants a NIC; one of
/// what `$BROKEN` names fails.
const TESTS: &str = r#"#!/bin/bash
echo 'running 2 tests'
echo "asked for $*, disk ${RAVELIN_DISK-unnamed}"
status=0
if [[ $2 == nested_vfio:: && -z ${RAVELIN_NIC-} ]]; then
    echo 'test nested_vfio::drives_the_nic ... FAILED'
    echo '---- nested_vfio::drives_the_nic stdout ----'
    echo "thread 'nested_vfio::drives_the_nic' panicked at tests/scenarios/given.rs:91:13:"
    echo 'RAVELIN_NIC is not set; outside the lab it names a NIC that the host can do without'
    status=101
fi
if [[ $2 == "${BROKEN-}" ]]; then
    echo "test $2fails ... FAILED"
    status=101
fi
exit "$status"
"#;
const BENCH: &str = "#!/bin/bash\necho \"measured: $* ${RAVELIN_HW_FUNCTION:-nothing}\"\n";

/// What the operator names functions by.
const NAMES: [&str; 5] = [
    "RAVELIN_NIC",
    "RAVELIN_DISK",
    "RAVELIN_SRIOV_NIC",
    "RAVELIN_WIRED_NIC",
    "RAVELIN_HW_FUNCTION",
];

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
        for name in NAMES {
            command.env_remove(name);
        }
        command
    }

    /// The report of `arguments` where KVM runs guests, and the exit status; with these variables set.
    fn native(&self, arguments: &[&str], variables: &[(&str, &str)]) -> (String, Option<i32>) {
        let _ = fs::remove_file(self.path("report"));
        let output = self
            .script(&["--report", "report"])
            .args(arguments)
            .env("RAVELIN_CHECK_NATIVE", "yes")
            .envs(variables.iter().copied())
            .output()
            .expect("bash runs it");
        (self.report(), output.status.code())
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
    titles
        .retain(|title| !title.starts_with("scenarios ") && *title != "scenarios that are about other hosts");
    assert_eq!(
        titles,
        [
            "summary",
            "the host",
            "what the kernel said of its IOMMUs",
            "ravelin host",
            "ravelin host --json",
            "what mode hw misses",
            if native() {
                "IOMMUs (scripts/bench iommu --native)"
            } else {
                "IOMMUs (scripts/bench iommu --micro)"
            },
        ]
    );
    let has = |line: &str| assert!(report.lines().any(|other| other == line), "{line}:\n{report}");
    has("host     passed, but the kernel was not asked: no function is bound");
    has("hw       skipped: 2 conditions do not hold");
    has("GIOSup; ivhd0 has it not");
    has("bench    passed");
    has("ravelin    ravelin 9.9");
    has(
        "passed   skipped: no function was named for it: RAVELIN_NIC, RAVELIN_DISK (all content is lost), RAVELIN_SRIOV_NIC, RAVELIN_WIRED_NIC",
    );
    if native() {
        has("native   passed");
        has("asked for native viommu::, disk unnamed");
    } else {
        has("measured: iommu --micro nothing");
        let skipped = report.lines().find(|line| line.starts_with("native   skipped: "));
        assert!(skipped.is_some_and(|line| line.contains("kvm")), "{report}");
    }
}

/// The groups that `report` says were asked for, and with which disk.
fn asked(report: &str) -> Vec<(&str, &str)> {
    let asked = report
        .lines()
        .filter_map(|line| line.strip_prefix("asked for native "));
    asked
        .map(|line| line.split_once("::, disk "))
        .map(|line| line.expect("a group and a disk"))
        .collect()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn scenarios_whose_function_nobody_named_are_left_out_and_no_disk_is_named() {
    let bench = Bench::new();
    let (report, status) = bench.native(&["native", "passed"], &[]);
    assert_eq!(status, Some(0), "{report}");
    let asked = asked(&report);
    assert!(
        asked.iter().all(|(_, disk)| *disk == "unnamed"),
        "no disk but the operator's: {asked:?}"
    );
    assert!(
        asked.contains(&("kexec", "unnamed")) && !asked.iter().any(|(group, _)| *group == "vfio"),
        "{asked:?}"
    );
    let line = "native   passed, but 1 left out, as nobody set RAVELIN_NIC\n";
    assert!(report.contains(line), "{report}");
    assert!(
        report.contains("\nnested_vfio::drives_the_nic RAVELIN_NIC\n"),
        "{report}"
    );
    assert!(
        report.contains("\npassed   skipped: no function was named for it: "),
        "{report}"
    );
    // A scenario that fails for another reason has failed.
    let (report, status) = bench.native(&["native"], &[("BROKEN", "nested_vfio::")]);
    assert_eq!(status, Some(1), "{report}");
    let line = "native   FAILED: nested_vfio, but 1 left out, as nobody set RAVELIN_NIC\n";
    assert!(report.contains(line), "{report}");
    let (report, status) = bench.native(&["native"], &[("BROKEN", "boot::")]);
    assert!(
        status == Some(1) && report.contains("native   FAILED: boot"),
        "{report}"
    );
}

#[test]
fn functions_that_are_named_are_tried_as_far_as_they_go() {
    let bench = Bench::new();
    if !is_root() {
        let (report, _) = bench.native(&["passed"], &[("RAVELIN_NIC", "0000:41:00.0")]);
        assert!(report.contains("passed   skipped: it takes root"), "{report}");
        return;
    }
    let at = "0000:c1:00.0";
    for (named, groups) in [
        (&["RAVELIN_NIC"][..], &["vfio"][..]),
        (&["RAVELIN_DISK"], &["vfio"]),
        (&["RAVELIN_NIC", "RAVELIN_DISK"], &["vfio", "peers"]),
        (&["RAVELIN_SRIOV_NIC"], &["virtual_functions"]),
        (&["RAVELIN_WIRED_NIC"], &["wired"]),
    ] {
        let variables: Vec<_> = named.iter().map(|name| (*name, at)).collect();
        let (report, status) = bench.native(&["passed"], &variables);
        assert_eq!(status, Some(0), "{report}");
        let disk = if named.contains(&"RAVELIN_DISK") {
            at
        } else {
            "unnamed"
        };
        let expected: Vec<_> = groups.iter().map(|group| (*group, disk)).collect();
        assert_eq!(asked(&report), expected);
    }
}

#[test]
fn the_bench_runs_guests_where_it_can_and_behind_the_hosts_unit_where_that_is_ready() {
    let bench = Bench::new();
    let (report, _) = bench.native(&["bench"], &[]);
    let kind = if is_root() { "--native" } else { "--micro" };
    assert!(
        report.contains(&format!("\nmeasured: iommu {kind} nothing\n")),
        "{report}"
    );
    // It does not say that it is ready.
    let named = ("RAVELIN_HW_FUNCTION", "0000:41:00.0");
    let (report, _) = bench.native(&["bench"], &[named]);
    assert!(
        report.contains(&format!("\nmeasured: iommu {kind} nothing\n")),
        "{report}"
    );
    let ready = RAVELIN.replace(
        "hw           not ready: the hardware; it needs",
        "hw           ready: by v-e",
    );
    let ready = ready
        .lines()
        .filter(|line| !line.contains("             - "))
        .collect::<Vec<_>>()
        .join("\n");
    fs::write(bench.path("ravelin"), ready).expect("written");
    if is_root() {
        let (report, _) = bench.native(&["hw", "bench"], &[named]);
        assert!(
            report.contains("\nmeasured: iommu --native 0000:41:00.0\n"),
            "{report}"
        );
        assert_eq!(asked(&report), [("hw", "unnamed")]);
    }
}

/// What the script has in the array `name`, each a word; of an associative one, its keys.
fn words<'a>(script: &'a str, name: &str) -> Vec<&'a str> {
    let (_, rest) = script
        .split_once(&format!("{name}=("))
        .expect("there is such an array");
    let (list, _) = rest
        .split_once("\n)")
        .or_else(|| rest.split_once(')'))
        .expect("it ends");
    if list.trim_start().starts_with('[') {
        let keys = list.lines().filter_map(|line| line.trim().strip_prefix('['));
        return keys.filter_map(|key| key.split(']').next()).collect();
    }
    let (list, _) = list.split_once(')').unwrap_or((list, ""));
    list.split_whitespace().collect()
}

#[test]
fn every_module_of_scenarios_is_tried_or_said_to_be_about_other_hosts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).expect("it is there");
    let script = read("scripts/epyc-check");
    let mut known: Vec<_> = ["native_groups", "passed_groups", "elsewhere"]
        .iter()
        .flat_map(|name| words(&script, name))
        .map(|group| group.trim_end_matches("::").to_owned())
        .collect();
    known.push("hw".to_owned());
    known.sort_unstable();
    let main = read("tests/scenarios/main.rs");
    // What scenarios are made of comes first, and they come last.
    let last = main.trim_end().rsplit("\n\n").next().expect("modules");
    let modules = last
        .lines()
        .map(|line| line.strip_prefix("mod ").and_then(|line| line.strip_suffix(';')));
    let mut scenarios: Vec<_> = modules
        .map(|module| module.expect("a module").to_owned())
        .collect();
    scenarios.sort_unstable();
    assert_eq!(known, scenarios);
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
            "unknown part 'lab'; there are host native passed hw bench all",
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
        text.contains("No disk is touched that RAVELIN_DISK does not name") && !text.contains("set -e"),
        "{text}"
    );
}
