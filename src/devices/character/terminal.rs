//! The operator's terminal in raw mode, and back, whatever way the process ends or stops.
//!
//! A terminal left raw shows no typing and ends no line. It is therefore given back when its handle is
//! dropped, when a thread panics (the release build aborts after that, without dropping anything), by
//! [`restore`] for ways out that drop nothing, and while the process is stopped by SIGTSTP.
//!
//! A process in the background leaves the terminal alone: its mode is the shell's then, and changing it would stop
//! the process.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{
    OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};
use signal_hook::SigId;
use signal_hook::consts::{SIGCONT, SIGTSTP, SIGWINCH};
use signal_hook::low_level;

use crate::platform::host::HostError;

/// The terminal that is ours to set, from [`RawTerminal::enter`] to [`restore`].
static KEPT: Mutex<Option<Kept>> = Mutex::new(None);

/// A terminal, and the mode it had.
struct Kept {
    terminal: OwnedFd,
    original: Termios,
}

impl Kept {
    fn set(&self, mode: &Termios) -> rustix::io::Result<()> {
        tcsetattr(&self.terminal, OptionalActions::Now, mode)
    }

    /// Each key reaches the guest as it is typed, Ctrl-C included. Output keeps its processing, so that Ravelin's
    /// own log lines still begin at the left.
    fn raw(&self) -> Termios {
        let mut raw = self.original.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        raw
    }
}

fn kept() -> MutexGuard<'static, Option<Kept>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this process is in the foreground of `terminal`: it may read it and set its mode.
#[must_use]
pub fn is_ours(terminal: impl AsFd) -> bool {
    tcgetpgrp(terminal).ok() == Some(getpgrp())
}

/// What became of an attempt to make a terminal raw.
#[derive(Debug)]
pub enum Entered {
    /// It is raw until the handle is dropped.
    Raw(RawTerminal),
    /// It is no terminal: there is nothing to change.
    NotATerminal,
    /// It is the terminal of a job in the background, which may neither read it nor change its mode: either
    /// would stop the process.
    Background,
}

/// Signals of one kind that are waiting to be heeded.
#[derive(Debug)]
struct Waiting {
    received: UnixStream,
    id: SigId,
}

impl Waiting {
    /// Take `signal` from now on, which then does nothing more by itself.
    fn new(signal: i32) -> Result<Self, HostError> {
        let failed = |source| HostError::new("handle SIGTSTP, SIGCONT and SIGWINCH for the terminal", source);
        let (received, sent) = UnixStream::pair().map_err(failed)?;
        received.set_nonblocking(true).map_err(failed)?;
        let id = low_level::pipe::register(signal, sent).map_err(failed)?;
        Ok(Self { received, id })
    }

    /// Whether there were any since the last look.
    fn take(&self) -> bool {
        let mut some = false;
        while (&self.received).read(&mut [0; 64]).is_ok_and(|count| count > 0) {
            some = true;
        }
        some
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        low_level::unregister(self.id);
    }
}

/// The process's terminal in raw mode; dropping it restores the mode before.
#[derive(Debug)]
pub struct RawTerminal {
    suspend: Waiting,
    resume: Waiting,
    resize: Waiting,
}

impl RawTerminal {
    /// Make `terminal` raw.
    ///
    /// # Errors
    /// When the terminal refuses the mode.
    ///
    /// # Panics
    /// When another handle lives: a process has one terminal.
    pub fn enter(terminal: impl AsFd) -> Result<Entered, HostError> {
        if !isatty(&terminal) {
            return Ok(Entered::NotATerminal);
        }
        if !is_ours(&terminal) {
            return Ok(Entered::Background);
        }
        let failed = |source| HostError::new("put the terminal into raw mode", source);
        let original = tcgetattr(&terminal).map_err(failed)?;
        let terminal = terminal
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| HostError::new("duplicate the terminal's descriptor", source))?;
        let signals = Self {
            suspend: Waiting::new(SIGTSTP)?,
            resume: Waiting::new(SIGCONT)?,
            resize: Waiting::new(SIGWINCH)?,
        };
        // Not under the lock, which the hook of a panic takes.
        let is_raw = kept().is_some();
        assert!(!is_raw, "the terminal is raw already");
        let ours = Kept { terminal, original };
        ours.set(&ours.raw()).map_err(failed)?;
        *kept() = Some(ours);
        restore_on_panic();
        Ok(Entered::Raw(signals))
    }

    /// Columns and rows, if the terminal knows them.
    #[must_use]
    pub fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&kept().as_ref()?.terminal).ok()?;
        (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    }

    /// What becomes readable when [`Self::heed_signals`] has something to do.
    pub fn signals(&self) -> impl Iterator<Item = &UnixStream> {
        [&self.suspend, &self.resume, &self.resize]
            .into_iter()
            .map(|waiting| &waiting.received)
    }

    /// Do what the signals say that came since the last look; `true` when the terminal may have another size, and
    /// may hold input that was not read. A SIGTSTP stops the process in here.
    pub fn heed_signals(&self) -> bool {
        if self.suspend.take() {
            give_back();
            // Raises SIGSTOP, which always stops.
            if let Err(error) = low_level::emulate_default_handler(SIGTSTP) {
                tracing::warn!(%error, "cannot stop as SIGTSTP asks for");
            }
        }
        let resumed = self.resume.take();
        if resumed {
            take_again();
        }
        self.resize.take() || resumed
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Give the terminal its mode back for good, if it is raw. Safe to call at any time and more than once.
pub fn restore() {
    give_back();
    *kept() = None;
}

/// Give the terminal its mode back for now.
fn give_back() {
    if let Some(kept) = kept().as_ref().filter(|kept| is_ours(&kept.terminal)) {
        // A terminal that is gone needs no mode; there is nobody left to tell otherwise.
        let _ = kept.set(&kept.original);
    }
}

/// Make the terminal raw again: the process goes on, in the foreground or not.
fn take_again() {
    if let Some(kept) = kept().as_ref().filter(|kept| is_ours(&kept.terminal))
        && let Err(error) = kept.set(&kept.raw())
    {
        tracing::warn!(%error, "cannot put the terminal into raw mode again");
    }
}

/// Before the panic's message is printed, so that it can be read.
fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let next = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            next(info);
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let null = File::open("/dev/null").expect("every Linux has it");
        assert!(matches!(RawTerminal::enter(null), Ok(Entered::NotATerminal)));
        restore();
    }

    #[test]
    fn a_terminal_that_is_not_ours_to_change_is_left_alone() {
        let ours = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY)
            .expect("a pseudo-terminal");
        let before = tcgetattr(&ours).expect("a terminal").local_modes;
        assert!(matches!(RawTerminal::enter(&ours), Ok(Entered::Background)));
        assert_eq!(tcgetattr(&ours).expect("a terminal").local_modes, before);
    }
}
