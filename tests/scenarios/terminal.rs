//! The operator's terminal: raw while the machine runs, and as it was after every way to end or to stop.
//!
//! The machine is a few instructions, so that what takes time is Ravelin's own. It gets a terminal of its own as a
//! shell would give it one, by `setsid --ctty`.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::multiboot::image;
use crate::prerequisites::{binary, kvm};

/// Halts for ever.
const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];
/// Writes 5 to the test-only exit port and halts: `mov al, 5; mov dx, 0x501; out dx, al; hlt; jmp`.
const LEAVE: &[u8] = &[0xb0, 0x05, 0x66, 0xba, 0x01, 0x05, 0xee, 0xf4, 0xeb, 0xfd];
/// What the process exits with when a guest writes 5 to the exit port.
const LEFT_WITH: i32 = 11;

const PATIENCE: Duration = Duration::from_secs(60);

/// A machine on a terminal of its own.
struct Session {
    /// The operator's side.
    terminal: fs::File,
    /// The process's side, kept open so that its mode is what the process left.
    theirs: OwnedFd,
    before: Termios,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Session {
    fn start(code: &[u8], arguments: &[&str]) -> Self {
        kvm();
        let folder = tempfile::tempdir().expect("a folder");
        let kernel = folder.path().join("image");
        fs::write(&kernel, image(code)).expect("the folder takes a file");
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).expect("a pseudo-terminal");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("it is ours");
        let theirs = ioctl_tiocgptpeer(&ours, flags).expect("its other side");
        let before = tcgetattr(&theirs).expect("a terminal");
        assert!(is_cooked(&before), "a new terminal");
        let twin = || Stdio::from(theirs.try_clone().expect("a descriptor"));
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(binary())
            .args(["run", "--memory", "64M", "--kernel"])
            .arg(&kernel)
            .args(arguments)
            .stdin(twin())
            .stdout(twin())
            .stderr(twin())
            .spawn()
            .expect("setsid (util-linux) is there");
        Self {
            terminal: fs::File::from(ours),
            theirs,
            before,
            child,
            _folder: folder,
        }
    }

    fn mode(&self) -> Termios {
        tcgetattr(&self.theirs).expect("a terminal")
    }

    /// Wait until `holds`, and say what was waited for if it never does.
    fn wait_until(&mut self, what: &str, mut holds: impl FnMut(&mut Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "{what}\n{}", self.shown());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_raw(&mut self) {
        self.wait_until("never raw", |session| !is_cooked(&session.mode()));
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-s", name, &id]).status();
        assert!(status.expect("kill is there").success(), "cannot send {name}");
    }

    /// Whether its process is stopped.
    fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("a live process");
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.terminal.write_all(keys).expect("the terminal takes keys");
    }

    /// Wait for its end, and check that the terminal is as it was.
    fn ends_with(mut self, status: i32) {
        self.wait_until("never ended", |session| {
            session.child.try_wait().expect("our child").is_some()
        });
        let ended = self.child.wait().expect("our child");
        let shown = self.shown();
        assert_eq!(ended.code(), Some(status), "{shown}");
        assert_eq!(modes(&self.mode()), modes(&self.before), "{shown}");
    }

    /// What the terminal shows that nobody has read.
    fn shown(&mut self) -> String {
        rustix::io::ioctl_fionbio(&self.terminal, true).expect("a descriptor");
        let mut shown = Vec::new();
        // It ends with the error that there is no more for now.
        let _ = self.terminal.read_to_end(&mut shown);
        String::from_utf8_lossy(&shown).into_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_cooked(mode: &Termios) -> bool {
    mode.local_modes
        .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

/// What can differ.
fn modes(mode: &Termios) -> [u32; 4] {
    [
        mode.input_modes.bits(),
        mode.output_modes.bits(),
        mode.control_modes.bits(),
        mode.local_modes.bits(),
    ]
}

#[test]
fn the_terminal_is_restored_when_the_guest_ends() {
    Session::start(LEAVE, &["--board", "exit-port=on"]).ends_with(LEFT_WITH);
}

#[test]
fn the_terminal_is_restored_when_the_operator_quits_at_the_console() {
    let mut session = Session::start(HALT, &[]);
    session.is_raw();
    session.type_keys(b"\x01x");
    session.ends_with(0);
}

#[test]
fn the_terminal_is_restored_when_signals_end_the_machine() {
    for name in ["TERM", "HUP", "INT"] {
        let mut session = Session::start(HALT, &[]);
        session.is_raw();
        session.signal(name);
        session.signal(name);
        session.ends_with(4);
    }
}

/// The second console cannot be opened, and by then the first one's terminal is raw.
#[test]
fn the_terminal_is_restored_when_the_host_refuses_something() {
    Session::start(HALT, &["--console", "socket:/nowhere/at/all"]).ends_with(1);
}

#[test]
fn a_machine_that_is_stopped_gives_the_terminal_back_and_takes_it_again_when_it_goes_on() {
    let mut session = Session::start(HALT, &[]);
    session.is_raw();
    for _ in 0..3 {
        session.signal("TSTP");
        session.wait_until("never stopped", |session| session.is_stopped());
        assert_eq!(modes(&session.mode()), modes(&session.before));
        session.signal("CONT");
        session.is_raw();
        assert!(!session.is_stopped());
    }
    // Keys arrive as before.
    session.type_keys(b"\x01x");
    session.ends_with(0);
}
