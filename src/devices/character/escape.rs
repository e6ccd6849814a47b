//! The keys by which the operator talks to Ravelin itself at a console that belongs to the guest.
//!
//! Ctrl-A is the prefix, as in QEMU and screen. What is no command reaches the guest unchanged, prefix
//! included, so that a habit like Ctrl-A for "start of line" costs one key more and loses nothing.

use std::mem;

/// Ctrl-A.
pub const PREFIX: u8 = 0x01;

/// What Ctrl-A h shows.
pub const HELP: &[u8] = b"\n\
    Ctrl-A h       this help\n\
    Ctrl-A x       end the machine at once\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\n\
    Ctrl-A other   send both keys to the guest\n";

/// A command of the operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// End the machine at once.
    Quit,
    /// Show [`HELP`].
    Help,
}

/// Tells commands from input.
#[derive(Debug, Default)]
pub struct Escape {
    prefixed: bool,
}

impl Escape {
    /// Take one byte the operator typed. Bytes for the guest go to `input`, at most two.
    pub fn feed(&mut self, byte: u8, input: &mut impl Extend<u8>) -> Option<Command> {
        if !mem::take(&mut self.prefixed) {
            if byte == PREFIX {
                self.prefixed = true;
            } else {
                input.extend([byte]);
            }
            return None;
        }
        match byte {
            b'x' | b'X' => return Some(Command::Quit),
            b'h' | b'H' | b'?' => return Some(Command::Help),
            PREFIX => input.extend([PREFIX]),
            other => input.extend([PREFIX, other]),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8]) -> (Vec<u8>, Vec<Command>) {
        let (mut escape, mut input) = (Escape::default(), Vec::new());
        let commands = keys
            .iter()
            .filter_map(|key| escape.feed(*key, &mut input))
            .collect();
        (input, commands)
    }

    #[test]
    fn plain_keys_reach_the_guest() {
        assert_eq!(typed(b"xh?\x03"), (b"xh?\x03".to_vec(), vec![]));
    }

    #[test]
    fn the_prefix_and_x_quit_without_reaching_the_guest() {
        assert_eq!(typed(b"a\x01xb"), (b"ab".to_vec(), vec![Command::Quit]));
    }

    #[test]
    fn the_prefix_and_h_ask_for_help() {
        assert_eq!(typed(b"\x01h\x01?").1, [Command::Help, Command::Help]);
    }

    #[test]
    fn the_prefix_twice_is_the_prefix_once() {
        assert_eq!(typed(b"\x01\x01x"), (b"\x01x".to_vec(), vec![]));
    }

    #[test]
    fn what_is_no_command_reaches_the_guest_whole() {
        assert_eq!(typed(b"\x01e\x01\x04"), (b"\x01e\x01\x04".to_vec(), vec![]));
    }

    #[test]
    fn a_prefix_waits_for_its_key() {
        assert_eq!(typed(b"\x01"), (vec![], vec![]));
    }
}
