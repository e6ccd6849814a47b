//! A machine under test: what it is started with, what it is doing, how it ended.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::complaints::complaints;
use crate::console::{Console, PRELUDE};
use crate::cpio::{ALIGNMENT, Archive};
use crate::prerequisites::{GuestImage, binary, guest, kernel_test, kvm, program_files, xen};
use crate::vmlinux::vmlinux;

/// How long a guest may take in all unless its scenario says otherwise: only a guest that hangs takes that
/// long. The lab's software CPU needs ten seconds or so for the fastest, natively one.
const DEADLINE: Duration = Duration::from_secs(240);
/// By how much to multiply that on a machine which is busy with other things, from `RAVELIN_PATIENCE`.
fn patience() -> u32 {
    let said = std::env::var("RAVELIN_PATIENCE");
    said.map_or(1, |text| {
        text.parse().expect("RAVELIN_PATIENCE is a whole number")
    })
}

/// How often a state that nobody announces is looked at.
const POLL: Duration = Duration::from_millis(50);
/// The line by which the guest's init says that it runs.
pub(crate) const INIT: &str = "ravelin-guest: init";
/// What the guest is told where a scenario adds nothing: little is printed, for each byte is an exit.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// The exit status by which a script asks for a reboot instead of the end.
pub(crate) const REBOOT: i32 = 75;

/// What a machine is started with.
pub(crate) struct Machine {
    guest: &'static str,
    arguments: Vec<OsString>,
    cmdline: String,
    script: Option<String>,
    /// Further files of the guest, by path.
    files: Vec<(String, Vec<u8>)>,
    deadline: Duration,
    /// What is open in it when it starts: paths, by the number of the descriptor.
    descriptors: Vec<(i32, String)>,
    /// The protocol by which the ELF file in the guest's kernel is started; without one it is the bzImage.
    elf: Option<&'static str>,
    /// The command line of Xen, which starts the guest as its first domain.
    xen: Option<&'static str>,
    folder: tempfile::TempDir,
}

impl Machine {
    /// One with a guest, which `RAVELIN_GUESTS` has under this name, and 256 MiB.
    pub(crate) fn new(guest: &'static str) -> Self {
        Self {
            guest,
            arguments: Vec::new(),
            cmdline: CMDLINE.to_owned(),
            script: None,
            files: Vec::new(),
            descriptors: Vec::new(),
            deadline: DEADLINE,
            elf: None,
            xen: None,
            folder: tempfile::tempdir().expect("a folder for temporary files"),
        }
        .arguments(["--memory", "256M"])
    }

    /// Further arguments of `ravelin run`.
    pub(crate) fn arguments<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// A machine file with this content.
    pub(crate) fn file(mut self, toml: &str) -> Self {
        let path = self.path("machine.toml");
        fs::write(&path, toml).expect("the folder takes a file");
        self.arguments.insert(0, path.into_os_string());
        self
    }

    /// Further words of the kernel's command line.
    pub(crate) fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// What the guest's init runs; its functions are those of the console's prelude.
    pub(crate) fn script(mut self, script: &str) -> Self {
        self.script = Some(scenario(script));
        self
    }

    /// An executable file of the guest, at `path` without a leading slash, in a folder that is there.
    pub(crate) fn guest_file(mut self, path: &str, content: &[u8]) -> Self {
        self.files.push((path.to_owned(), content.to_vec()));
        self
    }

    /// A program of this host in the guest's `/bin`, with the libraries it loads.
    pub(crate) fn guest_program(mut self, program: &str) -> Self {
        self.files.extend(program_files(Path::new(program)));
        self
    }

    /// A test of the kernel's in the guest's `/bin`.
    pub(crate) fn kernel_test(self, name: &str) -> Self {
        self.guest_file(&format!("bin/{name}"), &kernel_test(name))
    }

    /// Start the ELF file that is in the guest's kernel, by this protocol.
    pub(crate) fn elf(mut self, protocol: &'static str) -> Self {
        self.elf = Some(protocol);
        self
    }

    /// Start the guest as the first domain of Xen, whose command line this is.
    pub(crate) fn below_xen(mut self, words: &'static str) -> Self {
        self.xen = Some(words);
        self.cmdline = self.cmdline.replace("console=ttyS0", "console=hvc0");
        self
    }

    /// Have `path` open, for reading and writing, as descriptor `number` from 3 to 9.
    pub(crate) fn descriptor(mut self, number: i32, path: &str) -> Self {
        self.descriptors.push((number, path.to_owned()));
        self
    }

    /// How long it may take.
    pub(crate) fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// A path in the machine's own folder, which goes away with it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk of `mebibytes`, empty, in the machine's folder.
    pub(crate) fn disk(&self, name: &str, mebibytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = fs::File::create(&path).expect("the folder takes a file");
        file.set_len(mebibytes << 20).expect("a sparse file");
        path
    }

    /// Start it.
    pub(crate) fn start(self) -> Running {
        kvm();
        let image = guest(self.guest);
        let booted = self.booted(&image);
        let open = |(number, path): &(i32, String)| format!("{number}<>{path}");
        let open: Vec<_> = self.descriptors.iter().map(open).collect();
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("exec \"$@\" {}", open.join(" ")), "bash"])
            .arg(binary())
            .arg("run")
            .args(&self.arguments)
            .args(booted);
        Running::spawn(command, self.deadline, self.folder)
    }

    /// Run it to its end.
    pub(crate) fn run(self) -> Ended {
        self.start().end()
    }

    /// The arguments that say what is started.
    fn booted(&self, image: &GuestImage) -> Vec<String> {
        let initramfs = self.initramfs(&image.initramfs);
        let (kernel, initramfs) = (image.kernel.display(), initramfs.display());
        if let Some(words) = self.xen {
            let cmdline = &self.cmdline;
            return vec![
                format!("--kernel=path={},protocol=multiboot", xen().display()),
                format!("--cmdline={words}"),
                format!("--module=path={kernel},cmdline={cmdline}"),
                format!("--module=path={initramfs}"),
            ];
        }
        let kernel = match self.elf {
            None => kernel.to_string(),
            Some(protocol) => {
                let path = self.path("vmlinux");
                fs::write(&path, vmlinux(&image.kernel)).expect("the folder takes a kernel");
                format!("path={},protocol={protocol}", path.display())
            }
        };
        vec![
            format!("--kernel={kernel}"),
            format!("--initramfs={initramfs}"),
            format!("--cmdline={}", self.cmdline),
        ]
    }

    fn initramfs(&self, base: &Path) -> PathBuf {
        let script = self.script.as_ref().map(|script| ("scenario", script.as_bytes()));
        let files = self
            .files
            .iter()
            .map(|(path, content)| (path.as_str(), content.as_slice()));
        let path = self.path("initramfs");
        fs::write(&path, initramfs(base, script.into_iter().chain(files)))
            .expect("the folder takes an initramfs");
        path
    }
}

/// The initramfs `base` with further executable files.
pub(crate) fn initramfs<'a>(base: &Path, files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut bytes = fs::read(base).expect("the guest's initramfs is readable");
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let mut archive = Archive::default();
    for (path, content) in files {
        archive.file(path, content);
    }
    bytes.extend(archive.finish());
    bytes
}

/// What the guest's init runs: `script`, with the functions of the console's prelude.
pub(crate) fn scenario(script: &str) -> String {
    format!("{PRELUDE}\n{script}")
}

/// What a thread reads of a pipe, and whether the pipe has ended.
#[derive(Default)]
struct Stream {
    state: Mutex<(Vec<u8>, bool)>,
    news: Condvar,
}

impl Stream {
    fn of(mut pipe: impl Read + Send + 'static) -> (Arc<Self>, JoinHandle<()>) {
        let stream = Arc::new(Self::default());
        let writer = Arc::clone(&stream);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = pipe.read(&mut buffer).unwrap_or(0);
                let mut state = writer.state.lock().expect("no reader panics");
                state.0.extend_from_slice(&buffer[..count]);
                state.1 = count == 0;
                writer.news.notify_all();
                if state.1 {
                    return;
                }
            }
        });
        (stream, reader)
    }

    fn text(&self) -> Console {
        Console::new(&self.state.lock().expect("no reader panics").0)
    }

    /// Wait until `enough` holds; `false` when the pipe or the time ended first.
    fn wait(&self, until: Instant, enough: impl Fn(&Console) -> bool) -> bool {
        let mut state = self.state.lock().expect("no reader panics");
        loop {
            if enough(&Console::new(&state.0)) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                return false;
            }
            state = self.news.wait_timeout(state, left).expect("no reader panics").0;
        }
    }
}

/// A machine that runs. Dropping it kills it.
pub(crate) struct Running {
    child: Child,
    console: Arc<Stream>,
    log: Arc<Stream>,
    readers: Vec<JoinHandle<()>>,
    started: Instant,
    until: Instant,
    folder: Option<tempfile::TempDir>,
}

/// What the process of a machine holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
    /// Anonymous memory in KiB without guest RAM.
    pub(crate) anonymous: u64,
}

impl Running {
    /// A process with this command, which may take so long.
    pub(crate) fn spawn(mut command: Command, deadline: Duration, folder: tempfile::TempDir) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let (console, console_reader) = Stream::of(child.stdout.take().expect("piped"));
        let (log, log_reader) = Stream::of(child.stderr.take().expect("piped"));
        Self {
            child,
            console,
            log,
            readers: vec![console_reader, log_reader],
            started: Instant::now(),
            until: Instant::now() + deadline * patience(),
            folder: Some(folder),
        }
    }

    /// Wait until `text` has come on the console `times` times.
    pub(crate) fn wait_for(&mut self, text: &str, times: usize) {
        let came = self
            .console
            .wait(self.until, |console| console.count(text) >= times);
        assert!(
            came,
            "`{text}` did not come {times} times\n{}\n{}",
            self.story(),
            self.threads()
        );
    }

    /// How often `text` has come on the console so far.
    pub(crate) fn count(&self, text: &str) -> usize {
        self.console.text().count(text)
    }

    /// Wait until Ravelin has logged `text` `times` times.
    pub(crate) fn wait_for_log(&mut self, text: &str, times: usize) {
        let came = self.log.wait(self.until, |log| log.count(text) >= times);
        assert!(came, "`{text}` was not logged {times} times\n{}", self.story());
    }

    /// Type on the console.
    pub(crate) fn write(&mut self, text: &str) {
        let input = self.child.stdin.as_mut().expect("piped");
        input.write_all(text.as_bytes()).expect("the console takes input");
        input.flush().expect("a pipe");
    }

    /// Send a signal by name, as `kill` knows it.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(status.success(), "cannot send {name}");
    }

    /// What its process holds now.
    pub(crate) fn held(&self) -> Held {
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let entries = |folder: &str| {
            fs::read_dir(process.join(folder))
                .expect("a live process")
                .count()
        };
        let mappings = fs::read_to_string(process.join("smaps")).expect("a live process");
        Held {
            descriptors: entries("fd"),
            threads: entries("task"),
            anonymous: anonymous_beyond_ram(&mappings),
        }
    }

    /// Wait for its end.
    pub(crate) fn end(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            assert!(
                Instant::now() < self.until,
                "the deadline has passed\n{}\n{}",
                self.story(),
                self.threads()
            );
            thread::sleep(POLL);
        };
        for reader in self.readers.drain(..) {
            reader.join().expect("a reader ends with its pipe");
        }
        self.say_how_long();
        Ended {
            status,
            console: self.console.text(),
            log: self.log.text().text().to_owned(),
            _folder: self.folder.take(),
        }
    }

    /// A line of progress, past the capture of a test's output: a suite that takes half an hour shows what of it does.
    fn say_how_long(&self) {
        let scenario = thread::current();
        let name = scenario.name().unwrap_or("a scenario");
        let seconds = self.started.elapsed().as_secs_f32();
        // Nobody to read it is no failure.
        let _ = writeln!(std::io::stderr(), "{name}: a machine ended after {seconds:.1} s");
    }

    /// What its threads do: of a guest that hangs it tells whether its processors spin or wait for an interrupt.
    fn threads(&self) -> String {
        let folder = PathBuf::from(format!("/proc/{}/task", self.child.id()));
        let look = || -> Vec<(String, u64)> {
            let threads = fs::read_dir(&folder).into_iter().flatten().flatten();
            let of = |path: PathBuf| {
                // NUMBER (NAME) STATE ..., of which the 14th and 15th are hundredths of a second.
                let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
                let (name, rest) = stat.rsplit_once(") ").unwrap_or_default();
                let ticks = rest.split_whitespace().skip(11).take(2);
                (name.to_owned(), ticks.filter_map(|n| n.parse::<u64>().ok()).sum())
            };
            threads.map(|thread| of(thread.path())).collect()
        };
        let before = look();
        thread::sleep(Duration::from_secs(1));
        let lines = before.iter().zip(look()).map(|((name, before), (_, after))| {
            let number = name.split(' ').next().unwrap_or_default();
            // Where in the kernel it sleeps; 0 where it does not.
            let sleeps = fs::read_to_string(folder.join(number).join("wchan")).unwrap_or_default();
            format!("{name}): {} ms, in {sleeps}", after.saturating_sub(*before) * 10)
        });
        let lines: Vec<_> = lines.collect();
        format!("--- its threads ran, of the next second\n{}", lines.join("\n"))
    }

    fn story(&self) -> String {
        story(&self.console.text(), self.log.text().text())
    }
}

/// KiB of anonymous memory in the text of /proc/PID/smaps, guest RAM left out: the only mapping so large.
fn anonymous_beyond_ram(mappings: &str) -> u64 {
    /// KiB. A thread's share of the heap is half of it at most.
    const LARGE: u64 = 128 << 10;
    let number = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    let (mut size, mut sum) = (0, 0);
    for line in mappings.lines() {
        if line.starts_with("Size:") {
            size = number(line);
        } else if line.starts_with("Anonymous:") && size < LARGE {
            sum += number(line);
        }
    }
    sum
}

#[test]
fn guest_ram_is_told_from_the_rest_by_its_size() {
    let mappings = "7f00-7f10 rw-p 0 00:00 0\nSize:             262144 kB\nAnonymous:         90000 kB\n\
        7f20-7f21 rw-p 0 00:00 0 [heap]\nSize:                132 kB\nAnonymous:           100 kB\n";
    assert_eq!(anonymous_beyond_ram(mappings), 100);
}

impl Drop for Running {
    fn drop(&mut self) {
        // A scenario that failed leaves no guest behind; one that ended has none left to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a machine ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) console: Console,
    /// What the binary wrote to standard error.
    pub(crate) log: String,
    /// Kept until the scenario has read what it wants of it.
    _folder: Option<tempfile::TempDir>,
}

impl Ended {
    /// The guest's script and every check in it succeeded, the guest switched the machine off, and its
    /// kernel complained about nothing.
    pub(crate) fn well(self) -> Self {
        self.well_but(|_| false)
    }

    /// The same of a guest whose kernel is made to complain: lines that are `foreseen` are none.
    pub(crate) fn well_but(self, foreseen: impl Fn(&str) -> bool) -> Self {
        let failed = self.console.failed_checks();
        assert!(
            failed.is_empty(),
            "in the guest:\n{}\n{}",
            failed.join("\n"),
            self.story()
        );
        assert_eq!(self.console.guest_exit(), Some(0), "the script\n{}", self.story());
        assert_eq!(self.status.code(), Some(0), "the binary\n{}", self.story());
        for log in self.console.sections("dmesg") {
            let mut complaints = complaints(&log);
            complaints.retain(|line| !foreseen(line));
            assert!(
                complaints.is_empty(),
                "the guest's kernel complains:\n{}",
                complaints.join("\n")
            );
        }
        self
    }

    /// The binary ended with this exit status.
    pub(crate) fn with(self, status: i32) -> Self {
        assert_eq!(self.status.code(), Some(status), "{}", self.story());
        self
    }

    pub(crate) fn story(&self) -> String {
        story(&self.console, &self.log)
    }
}

fn story(console: &Console, log: &str) -> String {
    format!(
        "--- the console ended with\n{}\n--- standard error\n{log}",
        console.tail()
    )
}
