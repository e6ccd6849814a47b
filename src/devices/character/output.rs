//! What the guest sends, on its way to the host: written at once where the host takes it, else kept in a
//! bounded backlog.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::guest_warn;

/// Bytes that wait at most.
pub(super) const BACKLOG: usize = 64 << 10;

/// How a descriptor is written without waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    /// It is ours alone and answers "try again" rather than blocking.
    NonBlocking,
    /// It may block and be shared with others, so it is asked first and given one byte at a time, which a
    /// descriptor that says it is ready always takes.
    AskFirst,
}

/// What to do with bytes when the backlog is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WhenFull {
    /// Make the guest wait; what it sends regardless is lost, and said so.
    GuestWaits,
    /// Forget the oldest: perhaps nobody reads at all.
    ForgetOldest,
}

/// The way out.
pub(super) struct Output {
    fd: Option<(OwnedFd, Mode)>,
    backlog: VecDeque<u8>,
    when_full: WhenFull,
}

impl Output {
    pub(super) const fn nowhere() -> Self {
        Self {
            fd: None,
            backlog: VecDeque::new(),
            when_full: WhenFull::ForgetOldest,
        }
    }

    pub(super) const fn to(fd: OwnedFd, mode: Mode, when_full: WhenFull) -> Self {
        Self {
            fd: Some((fd, mode)),
            backlog: VecDeque::new(),
            when_full,
        }
    }

    /// A client came; what was meant for the one before is not for it.
    pub(super) fn connect(&mut self, fd: OwnedFd) {
        self.fd = Some((fd, Mode::NonBlocking));
        self.backlog.clear();
    }

    /// The client left.
    pub(super) fn disconnect(&mut self) {
        self.fd = None;
        self.backlog.clear();
    }

    /// The descriptor to watch for becoming writable.
    pub(super) fn watched(&self) -> Option<RawFd> {
        self.fd.as_ref().map(|(fd, _)| fd.as_raw_fd())
    }

    pub(super) fn is_full(&self) -> bool {
        self.when_full == WhenFull::GuestWaits && self.backlog.len() >= BACKLOG
    }

    /// How many bytes can be written before any is lost for want of room.
    pub(super) fn room(&self) -> usize {
        match self.when_full {
            WhenFull::GuestWaits => BACKLOG.saturating_sub(self.backlog.len()),
            WhenFull::ForgetOldest => usize::MAX,
        }
    }

    /// Send `bytes` after what waits already.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        let sent = if self.backlog.is_empty() {
            self.push(bytes)
        } else {
            0
        };
        // Without anybody to read them they are not kept either.
        if self.fd.is_none() {
            return;
        }
        for byte in &bytes[sent..] {
            if self.backlog.len() >= BACKLOG {
                match self.when_full {
                    WhenFull::ForgetOldest => {
                        self.backlog.pop_front();
                    }
                    WhenFull::GuestWaits => {
                        guest_warn!(
                            "lost console output: its reader is {BACKLOG} bytes behind and the guest did not wait"
                        );
                        return;
                    }
                }
            }
            self.backlog.push_back(*byte);
        }
    }

    /// Write what waits, as far as the host takes it. `true` when that ended a full backlog.
    pub(super) fn flush(&mut self) -> bool {
        let was_full = self.is_full();
        while !self.backlog.is_empty() {
            let mut waiting = std::mem::take(&mut self.backlog);
            let sent = self.push(waiting.as_slices().0);
            waiting.drain(..sent);
            if self.fd.is_none() {
                break;
            }
            self.backlog = waiting;
            if sent == 0 {
                break;
            }
        }
        was_full && !self.is_full()
    }

    /// How many of `bytes` the host takes now. A descriptor that refuses for good is given up.
    fn push(&mut self, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            let Some((fd, mode)) = &self.fd else {
                return sent;
            };
            let attempt = match mode {
                Mode::NonBlocking => rustix::io::write(fd, &bytes[sent..]),
                Mode::AskFirst => {
                    let mut ready = [PollFd::new(fd, PollFlags::OUT)];
                    match poll(&mut ready, Some(&Timespec::default())) {
                        Ok(0) => Err(Errno::AGAIN),
                        // A pseudo-terminal that nobody has open would keep it for whoever comes much later.
                        Ok(_) if hung_up(&ready) && rustix::termios::isatty(fd) => return bytes.len(),
                        Ok(_) => rustix::io::write(fd, &bytes[sent..=sent]),
                        Err(error) => Err(error),
                    }
                }
            };
            match attempt {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return sent,
                Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => {
                    guest_warn!(%error, "lost console output: its file does not grow");
                    return bytes.len();
                }
                Err(error) => {
                    tracing::warn!(%error, "console output goes nowhere from here on");
                    self.fd = None;
                }
            }
        }
        sent
    }
}

fn hung_up(ready: &[PollFd<'_>]) -> bool {
    ready.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
}
