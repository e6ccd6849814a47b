//! What a stream of characters can be connected to on the host.

use std::io::{ErrorKind, stdin, stdout};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode as Permissions, OFlags, fstat, open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use serde::Serialize;

use super::output::{Mode, Output, WhenFull};
use super::terminal::{Entered, RawTerminal};
use super::{HostEnd, Listener, duplicate};
use crate::devices::request::RequestQueue;
use crate::platform::host::HostError;

/// What to connect a stream to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Output vanishes, there is no input.
    Null,
    /// Standard input and output: raw mode and escape keys where they are the terminal.
    Stdio,
    /// Output is appended to a file, there is no input.
    File(PathBuf),
    /// A pseudo-terminal; [`HostEnd::place`] says which.
    Pty,
    /// A Unix socket to listen on, one client at a time. The file goes when the machine ends.
    Socket(PathBuf),
}

impl Backend {
    /// Open it. What the operator asks for by escape keys goes to `requests`.
    ///
    /// # Errors
    /// When the host refuses; the message names the file.
    pub fn open(&self, requests: &Arc<RequestQueue>) -> Result<Arc<HostEnd>, HostError> {
        let end = match self {
            Self::Null => HostEnd::new("nowhere".to_owned(), None, Output::nowhere()),
            Self::Stdio => stdio(requests),
            Self::File(path) => file(path),
            Self::Pty => pty(),
            Self::Socket(path) => socket(path),
        };
        end.map(Arc::new)
    }
}

fn stdio(requests: &Arc<RequestQueue>) -> Result<HostEnd, HostError> {
    let entered = RawTerminal::enter(stdin())?;
    let input = match entered {
        Entered::Background => {
            tracing::warn!("started in the background of a terminal: the console takes no input");
            None
        }
        _ => Some(duplicate(stdin(), "standard input")?),
    };
    let (output, mode) = without_blocking(duplicate(stdout(), "standard output")?);
    let output = Output::to(output, mode, WhenFull::GuestWaits);
    let mut end = HostEnd::new("the terminal".to_owned(), input, output)?;
    if let Entered::Raw(terminal) = entered {
        end.terminal = Some(terminal);
        end.requests = Some(requests.clone());
    }
    Ok(end)
}

/// A non-blocking descriptor for the same terminal or pipe, where the host gives one: the mode belongs to the
/// open file, and the one we were given is shared with the shell and with the other standard streams.
fn without_blocking(fd: OwnedFd) -> (OwnedFd, Mode) {
    let is_pipe = fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
    if !is_pipe && !isatty(&fd) {
        return (fd, Mode::AskFirst);
    }
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let again = open(
        format!("/proc/self/fd/{}", fd.as_raw_fd()),
        flags,
        Permissions::empty(),
    );
    match again {
        Ok(ours) => (ours, Mode::NonBlocking),
        // Another user's terminal, say, after su.
        Err(_) => (fd, Mode::AskFirst),
    }
}

fn file(path: &Path) -> Result<HostEnd, HostError> {
    // Without blocking, so that a named pipe that nobody reads is an error instead of a wait for ever.
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let permissions = Permissions::from_raw_mode(0o644);
    let fd = open(path, flags, permissions).map_err(|source| {
        HostError::new(
            format!("open {} to append the console's output", path.display()),
            source,
        )
    })?;
    let output = Output::to(fd, Mode::NonBlocking, WhenFull::GuestWaits);
    HostEnd::new(path.display().to_string(), None, output)
}

fn pty() -> Result<HostEnd, HostError> {
    let failed = |source: rustix::io::Errno| HostError::new("open a pseudo-terminal for a console", source);
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(failed)?;
    grantpt(&ours).map_err(failed)?;
    unlockpt(&ours).map_err(failed)?;
    let place = ptsname(&ours, Vec::new()).map_err(failed)?;
    // The operator's side starts raw: the guest's terminal driver does the echoing. Opening and closing it
    // also tells the kernel that nobody is there, so that output is dropped until somebody is.
    let theirs = ioctl_tiocgptpeer(
        &ours,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .map_err(failed)?;
    let mut raw = tcgetattr(&theirs).map_err(failed)?;
    raw.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &raw).map_err(failed)?;
    drop(theirs);
    rustix::io::ioctl_fionbio(&ours, true).map_err(failed)?;
    let writes = duplicate(&ours, "a pseudo-terminal")?;
    let output = Output::to(writes, Mode::AskFirst, WhenFull::ForgetOldest);
    HostEnd::new(place.to_string_lossy().into_owned(), Some(ours), output)
}

fn socket(path: &Path) -> Result<HostEnd, HostError> {
    let failed = |source| {
        HostError::new(
            format!("listen on {} for a console's client", path.display()),
            source,
        )
    };
    remove_stale(path);
    let socket = UnixListener::bind(path).map_err(failed)?;
    // From here on the file is ours to remove.
    let listener = Listener {
        socket,
        path: path.to_owned(),
    };
    listener.socket.set_nonblocking(true).map_err(failed)?;
    let output = Output::nowhere();
    let mut end = HostEnd::new(path.display().to_string(), None, output)?;
    end.listener = Some(listener);
    Ok(end)
}

/// Remove a socket that a process before us left behind, and nothing else.
fn remove_stale(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let is_dead =
        || UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
    if is_socket && is_dead() {
        // If this fails, binding says why.
        let _ = std::fs::remove_file(path);
    }
}
