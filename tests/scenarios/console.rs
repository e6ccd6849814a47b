//! What came out of a guest's serial console, and the sections that its script put there.
//!
//! A file of the guest travels as a *section*: compressed and in base64 between two markers, so that a line
//! of the kernel's in between would be noticed, and that 100 KiB of `lspci -vvv` cost few exits.

use std::io::Write;
use std::process::{Command, Stdio};

/// The shell functions a scenario's script may use. On its way out it always leaves the kernel's log.
pub(crate) const PRELUDE: &str = r#"
dmesg -n 1
# section NAME: standard input, to be read by the test under that name
section() {
    printf '\n@@begin %s\n' "$1"
    gzip -c | base64
    printf '@@end %s\n' "$1"
}
# check NAME COMMAND...: the command succeeds, or the scenario fails in its name
failures=0
check() {
    name=$1
    shift
    if "$@" >/tmp/check.out 2>&1; then
        echo "@@passed $name"
    else
        failures=$((failures + 1))
        echo "@@failed $name: $*"
        sed 's/^/    /' /tmp/check.out
    fi
}
# say NAME VALUE: a value, to be read by the test
say() {
    echo "@@say $1=$2"
}
trap 'status=$?; dmesg | section dmesg; [ $failures = 0 ] || exit 99; exit $status' EXIT
"#;

/// The console's text.
#[derive(Clone)]
pub(crate) struct Console(String);

impl Console {
    /// From what was read of the serial port: what is no text is replaced, carriage returns are dropped.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(String::from_utf8_lossy(bytes).replace('\r', ""))
    }

    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    /// How often `text` came.
    pub(crate) fn count(&self, text: &str) -> usize {
        self.0.matches(text).count()
    }

    /// The last lines, for a failure's message; sections are only named.
    pub(crate) fn tail(&self) -> String {
        let mut inside = false;
        let mut lines: Vec<&str> = Vec::new();
        for line in self.0.lines() {
            inside = (inside || line.starts_with("@@begin ")) && !line.starts_with("@@end ");
            if !inside || line.starts_with("@@begin ") {
                lines.push(line);
            }
        }
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// What the script said last under `name`.
    pub(crate) fn said(&self, name: &str) -> &str {
        let prefix = format!("@@say {name}=");
        let value = self.0.lines().rev().find_map(|line| line.strip_prefix(&prefix));
        value.unwrap_or_else(|| {
            panic!(
                "the guest said no `{name}`; its console ended with\n{}",
                self.tail()
            )
        })
    }

    /// Every value the script said under `name`, in order.
    pub(crate) fn said_each(&self, name: &str) -> Vec<&str> {
        let prefix = format!("@@say {name}=");
        self.0
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix))
            .collect()
    }

    /// The checks that did not hold, with what they printed.
    pub(crate) fn failed_checks(&self) -> Vec<String> {
        let lines: Vec<&str> = self.0.lines().collect();
        let failed = lines
            .iter()
            .enumerate()
            .filter(|(_, line)| line.starts_with("@@failed "));
        failed
            .map(|(at, _)| {
                let output = lines[at + 1..].iter().take_while(|line| line.starts_with("    "));
                std::iter::once(&lines[at])
                    .chain(output)
                    .copied()
                    .collect::<Vec<_>>()
                    .join("\n")
            })
            .collect()
    }

    /// Whether the check called `name` was made and held.
    pub(crate) fn passed(&self, name: &str) -> bool {
        self.0
            .lines()
            .any(|line| line.strip_prefix("@@passed ") == Some(name))
    }

    /// The last section called `name`, decoded.
    pub(crate) fn section(&self, name: &str) -> String {
        self.sections(name)
            .pop()
            .unwrap_or_else(|| panic!("no section `{name}`; the console ended with\n{}", self.tail()))
    }

    /// Every section called `name`, decoded, in order.
    pub(crate) fn sections(&self, name: &str) -> Vec<String> {
        let (begin, end) = (format!("@@begin {name}\n"), format!("@@end {name}\n"));
        let bodies = self.0.split(&begin).skip(1);
        bodies
            .map(|body| {
                let (body, _) = body
                    .split_once(&end)
                    .unwrap_or_else(|| panic!("section `{name}` is cut short:\n{}", self.tail()));
                decoded(body)
            })
            .collect()
    }

    /// The exit status that the guest's init reported last.
    pub(crate) fn guest_exit(&self) -> Option<i32> {
        let mut lines = self.0.lines().rev();
        lines.find_map(|line| line.strip_prefix("ravelin-guest: exit ")?.trim().parse().ok())
    }
}

fn decoded(base64: &str) -> String {
    let mut decoder = Command::new("sh")
        .args(["-c", "base64 -d | gzip -dc"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sh, base64 and gzip are there");
    let mut input = decoder.stdin.take().expect("piped");
    input
        .write_all(base64.as_bytes())
        .expect("the decoder reads all of it");
    drop(input);
    let output = decoder.wait_with_output().expect("the decoder ends");
    assert!(output.status.success(), "a section is damaged:\n{base64}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn sections_and_words_come_back_and_the_last_one_counts() {
    // `echo one | gzip -n | base64`, and the same for two.
    let text = "boot\n@@begin log\nH4sIAAAAAAAAA8vPS+UCAJ+oF/gEAAAA\n@@end log\r\n@@say disk=vda\n@@say disk=vdb\n\
        @@begin log\nH4sIAAAAAAAAAyspz+cCAHQIF5YEAAAA\n@@end log\nravelin-guest: exit 3\n";
    let console = Console::new(text.as_bytes());
    assert_eq!(console.sections("log"), ["one\n", "two\n"]);
    assert_eq!(console.said("disk"), "vdb");
    assert_eq!(console.said_each("disk"), ["vda", "vdb"]);
    assert_eq!(console.guest_exit(), Some(3));
}

#[test]
fn a_failed_check_brings_its_output() {
    let console = Console::new(b"@@passed a\n@@failed b: test 1 = 2\n    no\n    way\n@@passed c\n");
    assert_eq!(
        console.failed_checks(),
        ["@@failed b: test 1 = 2\n    no\n    way"]
    );
    assert!(console.passed("c") && !console.passed("b"));
}
