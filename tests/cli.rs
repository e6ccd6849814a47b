//! Help, errors and exit statuses as recorded text: what somebody at a shell sees.
//!
//! `INSTA_UPDATE=always cargo test --test cli` records anew; the difference is then for review.

use std::fs;
use std::path::Path;
use std::process::Output;

use assert_cmd::Command;

/// Run `ravelin ARGUMENTS` in `folder`.
fn ravelin(folder: &Path, arguments: &[&str]) -> Output {
    Command::cargo_bin("ravelin")
        .expect("the binary is built")
        .args(arguments)
        .current_dir(folder)
        .env("COLUMNS", "100")
        .output()
        .expect("it runs")
}

fn compare(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("golden/cli");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// What a terminal would show of one command.
fn session(folder: &Path, arguments: &[&str]) -> String {
    let output = ravelin(folder, arguments);
    let quoted: Vec<String> = arguments
        .iter()
        .map(|argument| {
            if argument.contains([' ', '"', '[']) {
                format!("'{argument}'")
            } else {
                (*argument).to_owned()
            }
        })
        .collect();
    format!(
        "$ ravelin {}\n{}{}[{}]\n",
        quoted.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        output.status.code().expect("no signal ended it")
    )
}

/// A session of several commands, each of which must refuse with status 2 and one error.
fn refusals(folder: &Path, commands: &[&[&str]]) -> String {
    let sessions = commands.iter().map(|arguments| {
        let text = session(folder, arguments);
        assert!(text.ends_with("[2]\n"), "{text}");
        assert_eq!(text.matches("error: ").count(), 1, "{text}");
        assert!(!text.contains("panicked"), "{text}");
        text
    });
    sessions.collect::<Vec<_>>().join("\n")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Refusals of machine files: each text is one file.
fn file_refusals(files: &[(&str, &str)]) -> String {
    let folder = folder();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).expect("written");
    }
    let commands: Vec<[&str; 2]> = files.iter().map(|(name, _)| ["topology", *name]).collect();
    let commands: Vec<&[&str]> = commands.iter().map(|command| &command[..]).collect();
    refusals(folder.path(), &commands)
}

#[test]
fn the_help_is_as_recorded() {
    let folder = folder();
    let texts = [
        &["--help"][..],
        &["run", "--help"],
        &["check", "-h"],
        &["topology", "-h"],
        &["host", "-h"],
        &["completions", "-h"],
        &["man", "-h"],
    ];
    let sessions = texts.map(|arguments| session(folder.path(), arguments));
    compare("help", &sessions.join("\n"));
}

#[test]
fn unknown_names_are_refused_with_the_nearest() {
    let files = file_refusals(&[
        ("section.toml", "cpus = 2\n[[dsik]]\npath = \"a\"\n"),
        ("key.toml", "cpus = 2\n[[disk]]\npath = \"a\"\nredaonly = true\n"),
        (
            "port.toml",
            "[[root-port]]\nid = \"left\"\n[[root-port]]\nid = \"right\"\n[[rng]]\nport = \"rihgt\"\n",
        ),
        ("root.toml", "[[rng]]\non = \"rc1\"\n"),
        (
            "switch.toml",
            "[[root-port]]\n[[switch]]\non = \"rp0\"\ndownstream = 2\n[[rng]]\nport = \"sw0\"\n",
        ),
        ("choice.toml", "[kernel]\npath = \"k\"\nprotocol = \"linx\"\n"),
    ]);
    compare("unknown-names", &files);
}

#[test]
fn versions_of_amds_interface_that_cannot_be_are_refused() {
    let folder = folder();
    let files = [
        ("no-toml", "base = \n"),
        ("no-base", "viommu-type = 3\n"),
        ("unknown-base", "base = \"v-z\"\n"),
        ("unknown-key", "base = \"v-e\"\nviommu-typ = 3\n"),
        (
            "impossible",
            "base = \"v-e\"\n[user-data]\nlen = 8\nmmap-offset = 4\n",
        ),
    ];
    let mut commands = vec![
        vec!["host", "--abi", "v-b"],
        vec!["host", "--abi", "."],
        vec!["host", "--abi", "v-e", "--host-root", "."],
    ];
    for (name, text) in files {
        fs::write(folder.path().join(name), text).expect("written");
        commands.push(vec!["host", "--abi", name]);
    }
    let commands: Vec<&[&str]> = commands.iter().map(Vec::as_slice).collect();
    compare("versions-of-the-interface", &refusals(folder.path(), &commands));
}

#[test]
fn impossible_topologies_are_refused_with_what_would_fit() {
    let files = file_refusals(&[
        (
            "one-slot.toml",
            "[[rng]]\nslot = \"4.0\"\n[[rng]]\nslot = \"4.0\"\n",
        ),
        ("no-function-zero.toml", "[[rng]]\nslot = \"4.1\"\n"),
        ("beyond-31.toml", "[[rng]]\nslot = \"32.0\"\n"),
        ("beyond-7.toml", "[[rng]]\nslot = \"4.8\"\n"),
        (
            "two-behind-a-port.toml",
            "[[root-port]]\n[[rng]]\nport = \"rp0\"\n[[rng]]\nport = \"rp0\"\n",
        ),
        (
            "device-one.toml",
            "[[root-port]]\n[[rng]]\nport = \"rp0\"\nslot = \"1.0\"\n",
        ),
        ("isa.toml", "[[rng]]\nslot = \"0x14.0\"\n"),
        (
            "buses.toml",
            "[[root-complex]]\nbus = \"0x00-0x02\"\n[[root-port]]\n[[root-port]]\n[[root-port]]\n",
        ),
        (
            "overlap.toml",
            "[[root-complex]]\nbus = \"0x00-0x3f\"\n[[root-complex]]\nbus = \"0x20-0x5f\"\n",
        ),
        ("backwards.toml", "[[root-complex]]\nbus = \"0x3f-0x00\"\n"),
        ("no-bus-zero.toml", "[[root-complex]]\nbus = \"0x10-0x3f\"\n"),
        (
            "share.toml",
            "[[root-complex]]\nbus = \"0x00-0x3f\"\n[[root-complex]]\nid = \"other\"\n",
        ),
        (
            "circle.toml",
            "[[switch]]\nid = \"a\"\non = \"b.0\"\ndownstream = 1\n[[switch]]\nid = \"b\"\non = \"a.0\"\ndownstream = 1\n",
        ),
        (
            "twice.toml",
            "[[rng]]\nid = \"x\"\n[[net]]\nid = \"x\"\nbackend = \"none\"\n",
        ),
        (
            "both.toml",
            "[[root-port]]\n[[rng]]\nport = \"rp0\"\non = \"rc0\"\n",
        ),
        (
            "segments.toml",
            &(0..12)
                .map(|at| format!("[[root-complex]]\nsegment = {at}\n"))
                .collect::<String>(),
        ),
        ("full.toml", &"[[rng]]\n".repeat(31)),
    ]);
    compare("impossible-topologies", &files);
}

#[test]
fn bad_values_are_refused_with_what_would_be_right() {
    let folder = folder();
    let commands: [&[&str]; 31] = [
        &["topology", "--cpus", "0"],
        &["topology", "--cpus", "1025"],
        &["topology", "--cpus", "count=8,sockets=3"],
        &["topology", "--cpus", "count=8,sockets=2,cores=2,threads=1"],
        &["topology", "--cpus", "4,pin=0-2"],
        &["topology", "--memory", "4Q"],
        &["topology", "--memory", "1M"],
        &["topology", "--memory", "size=1025M,hugepages=2M"],
        &["topology", "--memory", "size=2G,hugepages=3M"],
        &["topology", "--memory", "size=2G,shared=maybe"],
        &["topology", "--net", "id=n"],
        &["topology", "--net", "tap=t,mac=01:00:5e:00:00:01"],
        &[
            "topology",
            "--net",
            "backend=none,mac=52:54:00:00:00:01",
            "--net",
            "backend=none,mac=52:54:00:00:00:01",
        ],
        &["topology", "--net", "a-name-that-is-too-long"],
        &["topology", "--disk", "a", "--disk", "a"],
        &["topology", "--disk", "a,queues=0"],
        &["topology", "--disk", "a,queue-size=100"],
        &["topology", "--disk", "readonly=on"],
        &["topology", "--disk", "a,readonly"],
        &["topology", "--serial", "tcp:1"],
        &["topology", "--viommu", "hw"],
        &["topology", "--viommu", "emulated,page-table=v3"],
        &["topology", "--viommu", "emulated,pasid-bits=17"],
        &["topology", "--viommu", "emulated,pasid-bits=8,page-table=v1"],
        &["topology", "--viommu", "emulated,on=rc1"],
        &["topology", "--viommu", "emulated", "--viommu", "emulated"],
        &["topology", "--viommu", "emulated", "--rng", "slot=0.2"],
        &["topology", "--viommu", "emulated,xt=off", "--cpus", "256"],
        &["topology", "--vfio-device", "ffff:ff:1f.7"],
        &["topology", "--vfio-device", "41:00"],
        &["topology", "--vfio-device", "host=ffff:ff:1f.7,mode=hw"],
    ];
    compare("bad-values", &refusals(folder.path(), &commands));
}

#[test]
fn files_that_cannot_be_used_are_refused() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("short-kernel"), [0; 100]).expect("written");
    fs::write(at("kernel"), [0; 4096]).expect("written");
    fs::write(at("empty"), []).expect("written");
    fs::write(at("odd.img"), [0; 1000]).expect("written");
    fs::create_dir(at("folder")).expect("made");
    fs::write(at("broken.toml"), "cpus = = 2\n").expect("written");
    fs::write(at("binary.toml"), [0xff; 16]).expect("written");
    let commands: [&[&str]; 13] = [
        &["check", "missing.toml"],
        &["check", "broken.toml"],
        &["check", "binary.toml"],
        &["check", "folder"],
        &["check", "--kernel", "missing"],
        &["check", "--kernel", "short-kernel"],
        &["check", "--kernel", "folder"],
        &["check", "--kernel", "kernel", "--initramfs", "empty"],
        &["check", "--disk", "missing.img"],
        &["check", "--disk", "odd.img"],
        &["check", "--disk", "empty"],
        &["check", "--disk", "folder,readonly=on"],
        &["run", "--disk", "odd.img"],
    ];
    compare("unusable-files", &refusals(folder.path(), &commands));
}

#[test]
fn a_run_without_a_kernel_is_refused() {
    compare(
        "no-kernel",
        &refusals(folder().path(), &[&["run"], &["run", "--cpus", "2"]]),
    );
}

#[test]
fn flags_that_do_not_exist_are_refused() {
    let commands: [&[&str]; 5] = [
        &["topology", "--dsik", "a"],
        &["chekc"],
        &["completions", "tcsh"],
        &["--log", "loud", "topology"],
        &["--log-format", "xml", "topology"],
    ];
    compare("unknown-flags", &refusals(folder().path(), &commands));
}

#[test]
fn flags_override_and_extend_the_file() {
    let folder = folder();
    let text = "cpus = 2\n[[net]]\nid = \"nic\"\nbackend = \"none\"\nmac = \"52:54:00:00:00:07\"\n";
    fs::write(folder.path().join("m.toml"), text).expect("written");
    let arguments = [
        "check",
        "m.toml",
        "--cpus",
        "4",
        "--memory",
        "1G",
        "--net",
        "id=nic,mtu=9000",
        "--net",
        "backend=none",
        "--rng",
        "r",
    ];
    let text = session(folder.path(), &arguments);
    assert!(text.ends_with("[0]\n"), "{text}");
    compare("flags-over-a-file", &text);
}

#[test]
fn completions_know_every_flag() {
    for shell in ["bash", "zsh", "fish"] {
        let output = ravelin(folder().path(), &["completions", shell]);
        let script = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && script.contains("root-complex"),
            "{shell}"
        );
    }
}

#[test]
fn the_manual_page_has_every_key_of_every_section() {
    let output = ravelin(folder().path(), &["man"]);
    let page = String::from_utf8_lossy(&output.stdout).replace("\\-", "-");
    for section in ravelin::vm::config::SECTIONS {
        assert!(page.contains(&format!("--{}", section.name)), "{}", section.name);
        let missing = section.keys.iter().find(|key| {
            !page.contains(&format!("{}:", key.name)) && !page.contains(&format!("{} (", key.name))
        });
        assert_eq!(missing, None, "{}", section.name);
    }
}

#[test]
fn output_into_a_closed_pipe_is_no_error() {
    let script = format!("{} topology --rng a | true", env!("CARGO_BIN_EXE_ravelin"));
    let output = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {script}")])
        .output()
        .expect("bash runs");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn the_page_on_the_machine_file_has_every_key_as_help_says_it() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/machine-file.md");
    let page = fs::read_to_string(page).expect("the page");
    for section in ravelin::vm::config::SECTIONS {
        let (_, after) = page
            .split_once(&format!("## `{}`\n\n{}\n", section.head(), section.doc.trim()))
            .unwrap_or_else(|| panic!("{}", section.name));
        let part = after
            .split("\n## ")
            .next()
            .expect("a part before the next heading");
        for key in section.keys {
            let star = if section.main == Some(key.name) { "*" } else { "" };
            let row = format!("| `{}`{star} | {} |\n", key.name, key.doc.trim());
            assert!(part.contains(&row), "{}: {row}", section.name);
        }
    }
}
