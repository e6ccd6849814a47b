//! `scripts/bench iommu --native`: its measurements with programs that are none in the place of Ravelin and QEMU, and the
//! rows that come of its samples.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A `ravelin` whose guests say what the script waits for: with a disk and an entropy source what all do, with a function of
/// the host's what its unit's does. A boot writes its statistics.
const RAVELIN: &str = r#"#!/bin/bash
echo "$*" >>"$RAVELIN_BENCH_SHARE/started"
unit= read=1 stats=
while (($#)); do
    case $1 in
        --stats) stats=$2 ;;
        --vfio-device) read=0 ;;
        --viommu) unit=$2 ;;
    esac
    shift
done
if [[ -n $stats ]]; then
    cat >"$stats" <<'END'
{
  "init": 100,
  "total": 3000,
END
    exit
fi
rings=0
trap 'rings=$((rings + 10)); echo "INFO $unit: $rings doorbells, 0 of them polled" >&2' USR1
((!read)) || echo '@@read 250'
# Without a unit there is nothing to map for.
[[ -n $unit ]] || threads=
for threads in ${threads-1 2}; do
    for pages in 1 16 512; do
        echo @@begin
        sleep 0.02
        echo "@@end $threads $pages 5 7"
        sleep 0.02
    done
done
echo @@done
while :; do sleep 0.2; done
"#;

struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(tempfile::tempdir().expect("a folder"));
        for folder in ["work", "guest", "bin", "tracing/events/kvm/kvm_userspace_exit"] {
            fs::create_dir_all(bench.path(folder)).expect("a folder");
        }
        for folder in [
            "tracing/events/kvm/kvm_entry",
            "tracing/events/raw_syscalls/sys_enter",
        ] {
            fs::create_dir_all(bench.path(folder)).expect("a folder");
        }
        let hist = "tracing/events/kvm/kvm_userspace_exit/hist";
        fs::write(bench.path(hist), "Totals:\n    Hits: 100\n").expect("written");
        fs::write(bench.path("guest/initramfs"), "").expect("written");
        bench.program("ravelin", RAVELIN);
        // No archive is needed: nobody unpacks it.
        bench.program("bin/cpio", "#!/bin/bash\ncat >/dev/null\n");
        for name in ["iommu", "guests.sh", "map_benchmark", "mappings", "random_reads"] {
            fs::copy(scripts().join(name), bench.path(name)).expect("copied");
        }
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("written");
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).expect("its own");
    }

    /// One run, with that function of the host.
    fn run(&self, function: &str) -> Output {
        // Without QEMU, wherever that may be.
        for tool in [
            "bash", "sh", "awk", "cat", "cp", "chmod", "dirname", "find", "grep", "ln", "mkdir", "mkfifo",
            "perl", "rm", "sed", "seq", "sleep", "tail", "timeout", "tr", "truncate",
        ] {
            let at = ["/usr/bin", "/bin"].map(|folder| Path::new(folder).join(tool));
            let at = at.iter().find(|at| at.exists()).expect("a usual program");
            let link = self.path("bin").join(tool);
            if !link.exists() {
                symlink(at, link).expect("linked");
            }
        }
        Command::new("/bin/bash")
            .args(["./iommu", "1"])
            .current_dir(self.0.path())
            .env("PATH", self.path("bin"))
            .env("RAVELIN_BENCH_SHARE", self.0.path())
            .env("RAVELIN_BENCH_WORK", self.path("work"))
            .env("RAVELIN_BENCH_TRACING", self.path("tracing"))
            .env("RAVELIN_BENCH_GUEST", self.path("guest"))
            .env("RAVELIN_HW_FUNCTION", function)
            .output()
            .expect("bash runs it")
    }

    fn samples(&self) -> String {
        fs::read_to_string(self.path("samples")).expect("samples")
    }
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench.d")
}

/// The rows that the samples in `file` give.
fn rows(file: &Path, variables: &[&str]) -> (String, Option<i32>) {
    let mut awk = Command::new("awk");
    for variable in ["json=0"].iter().chain(variables) {
        awk.args(["-v", variable]);
    }
    for program in ["report.awk", "iommu.awk"] {
        awk.arg("-f").arg(scripts().join(program));
    }
    let output = awk.arg(file).output().expect("awk runs");
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8(text).expect("text"), output.status.code())
}

/// What is measured without a guest.
const MICRO: &str = "ravelin guarded-ps 1000\nravelin hit-ps 1000\nvm-memory hit-ps 90000\ndirect access-ps 1000\n\
                     vm-memory access-ps 1000\nravelin access-ps 2000\nravelin miss-ps 1000\nravelin hit-2-ps 1000\n\
                     ravelin command-ps 1000\nravelin wait-ps 1000\n";

#[test]
fn a_host_of_its_own_has_every_row_but_the_peers_and_one_for_its_unit_where_a_function_was_named() {
    let bench = Bench::new();
    let output = bench.run("0000:41:00.0");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let samples = bench.samples();
    let has = |line: &str| assert!(samples.lines().any(|other| other == line), "{line}:\n{samples}");
    has("ravelin unmap-1-1 7");
    has("ravelin sim-map-2-512 5");
    has("ravelin hw-unmap-1-1 7");
    has("ravelin hw-lazy-map-2-16 5");
    assert!(!samples.contains("qemu"), "{samples}");
    // A unit of the host's counts no doorbells, and has no disk beside the function.
    has("ravelin hw-others-1-1 0");
    assert!(!samples.contains("hw-read"), "{samples}");
    let started = fs::read_to_string(bench.path("started")).expect("guests");
    let hw: Vec<_> = started
        .lines()
        .filter(|line| line.contains("--viommu hw "))
        .collect();
    assert_eq!(hw.len(), 2, "{started}");
    assert!(
        hw.iter()
            .all(|line| line.contains("--vfio-device host=0000:41:00.0,port=rp0") && !line.contains("--disk")),
        "{hw:?}"
    );
    fs::write(bench.path("samples"), format!("{MICRO}{samples}")).expect("written");
    let (table, status) = rows(&bench.path("samples"), &["alone=1", "hardware=1"]);
    assert!(
        !table.contains("no samples of") && !table.contains("no peer has"),
        "{table}"
    );
    assert!(
        table.contains("hw: unmap 4 KiB, 1 thread (us)")
            && table.contains("hw: exits, map and unmap, 2 threads"),
        "{table}"
    );
    assert!(table.contains("unmap 4 KiB, 1 thread (us)"), "{table}");
    assert_eq!(status, Some(0), "{table}");
    // Where there is to be a peer, it is missed.
    let (table, status) = rows(&bench.path("samples"), &["hardware=1"]);
    assert!(
        status == Some(1) && table.contains("no peer has samples of unmap-1-1"),
        "{table}"
    );
    // Without a function there are no such rows, unless they were to be there.
    let others = samples.lines().filter(|line| !line.contains(" hw-"));
    let others: String = others.map(|line| format!("{line}\n")).collect();
    fs::write(bench.path("samples"), format!("{MICRO}{others}")).expect("written");
    let (table, status) = rows(&bench.path("samples"), &["alone=1"]);
    assert!(status == Some(0) && !table.contains("hw: "), "{table}");
    let (table, status) = rows(&bench.path("samples"), &["alone=1", "hardware=1"]);
    assert!(
        status == Some(1) && table.contains("no samples of hw-unmap-1-1"),
        "{table}"
    );
}

#[test]
fn what_cannot_be_measured_here_is_refused_before_anything_is_built() {
    let bench = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench");
    let output = Command::new(bench)
        .args(["iommu", "--micro", "--native"])
        .output()
        .expect("bash runs it");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(
        said,
        "bench: error: iommu: --micro and --native exclude each other\n"
    );
}
