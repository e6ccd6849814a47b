//! The operator's terminal in raw mode, and back, whatever way the process ends.
//!
//! A terminal left raw shows no typing and ends no line. It is therefore given back when its handle is
//! dropped, when a thread panics (the release build aborts after that, without dropping anything), and by
//! [`restore`] for ways out that drop nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::panic;
use std::sync::{Mutex, Once, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

use crate::platform::host::HostError;

/// The terminal and the mode it had, while it is raw.
static ORIGINAL: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

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

/// The process's terminal in raw mode; dropping it restores the mode before.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Make `terminal` raw: each key reaches the guest as it is typed, Ctrl-C included. Output keeps its
    /// processing, so that Ravelin's own log lines still begin at the left.
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
        if tcgetpgrp(&terminal).ok() != Some(getpgrp()) {
            return Ok(Entered::Background);
        }
        let failed = |source| HostError::new("put the terminal into raw mode", source);
        let original = tcgetattr(&terminal).map_err(failed)?;
        let kept = terminal
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| HostError::new("duplicate the terminal's descriptor", source))?;
        let mut raw = original.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        let mut slot = ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(slot.is_none(), "the terminal is raw already");
        tcsetattr(&terminal, OptionalActions::Now, &raw).map_err(failed)?;
        *slot = Some((kept, original));
        drop(slot);
        restore_on_panic();
        Ok(Entered::Raw(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Give the terminal its mode back, if it is raw. Safe to call at any time and more than once.
pub fn restore() {
    let raw = ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((terminal, original)) = raw {
        // A terminal that is gone needs no mode; there is nobody left to tell otherwise.
        let _ = tcsetattr(terminal, OptionalActions::Now, &original);
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
