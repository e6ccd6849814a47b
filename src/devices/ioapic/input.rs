//! One input of the I/O APIC: its redirection entry, the wires that assert it, and when it sends.
//!
//! No call here reaches outside. What is to be sent comes back as a value, and the caller sends it once it
//! holds no lock.

use super::spec::Redirection;
use crate::platform::lanes::LaneWrite;
use crate::platform::msi::MsiMessage;

/// Interrupts in a row that may end with the input still asserted before the next one is put off. A driver
/// that has not found its device yet (or is lost) would otherwise keep a processor in its handler for ever.
pub(super) const MOST_IN_A_ROW: u32 = 10_000;

/// What became of an interrupt that a processor ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// It was not one of this input's.
    NotOurs,
    /// It was; look with [`Input::take_message`] whether the next one is due.
    Ours,
    /// It was, and so were very many before it: the next one waits until [`Input::relent`].
    PutOff,
}

/// The state of one input.
#[derive(Debug, Clone)]
pub(super) struct Input {
    entry: Redirection,
    /// Wires that assert the input now.
    wires: u32,
    /// A pulse arrived that no message has carried yet.
    pulsed: bool,
    /// What the kernel knows this input to send.
    route: Option<MsiMessage>,
    /// Interrupts in a row that ended with the input still asserted.
    in_a_row: u32,
    put_off: bool,
}

impl Default for Input {
    fn default() -> Self {
        Self {
            entry: Redirection::RESET,
            wires: 0,
            pulsed: false,
            route: None,
            in_a_row: 0,
            put_off: false,
        }
    }
}

impl Input {
    /// The entry as the guest reads it.
    #[must_use]
    pub(super) const fn entry(&self) -> Redirection {
        self.entry
    }

    /// The guest wrote part of the entry.
    pub(super) fn write(&mut self, lanes: LaneWrite) {
        let bits = lanes.store(self.entry.into_bits(), Redirection::WRITABLE.into_bits());
        self.entry = Redirection::from_bits(bits);
        if !self.entry.is_level() {
            // Guests end an interrupt by force this way on controllers without an EOI register.
            self.entry.set_remote_irr(false);
            self.pulsed = false;
            self.calm();
        }
    }

    /// A wire was asserted or released. Returns the message of an edge.
    pub(super) fn wire_changed(&mut self, asserted: bool) -> Option<MsiMessage> {
        let before = self.wires;
        self.wires = if asserted {
            before.saturating_add(1)
        } else {
            before.saturating_sub(1)
        };
        let rose = before == 0 && self.wires > 0;
        if rose && !self.entry.is_level() {
            return self.edge();
        }
        self.take_message()
    }

    /// A pulse arrived: an edge, or one interrupt on a level-triggered input.
    pub(super) fn pulse(&mut self) -> Option<MsiMessage> {
        if self.entry.is_level() {
            self.pulsed = true;
            return self.take_message();
        }
        self.edge()
    }

    /// Edges that arrive while the input is masked are lost (82093AA, 3.2.4, bit 16).
    fn edge(&self) -> Option<MsiMessage> {
        if self.entry.masked() {
            return None;
        }
        self.entry.message()
    }

    /// The message a level-triggered input owes, if it owes one; it counts as sent from here on.
    ///
    /// It is owed only once the kernel knows the input's message: an end of interrupt that the kernel does
    /// not report would leave the input in service for ever.
    pub(super) fn take_message(&mut self) -> Option<MsiMessage> {
        let asserted = self.wires > 0 || self.pulsed;
        let open = self.entry.is_level() && !self.entry.masked() && !self.entry.remote_irr() && !self.put_off;
        let message = self.entry.message().filter(|_| open && asserted)?;
        if self.route != Some(message) {
            return None;
        }
        self.entry.set_remote_irr(true);
        self.pulsed = false;
        Some(message)
    }

    /// The guest ended the interrupt of entries with `vector`.
    pub(super) fn end_of_entry(&mut self, vector: u8) -> Ended {
        if self.entry.vector() == vector {
            self.end()
        } else {
            Ended::NotOurs
        }
    }

    /// Some processor ended an interrupt that this input's message brought it.
    pub(super) fn end(&mut self) -> Ended {
        if !self.entry.is_level() || !self.entry.remote_irr() {
            return Ended::NotOurs;
        }
        self.entry.set_remote_irr(false);
        Ended::Ours
    }

    /// Called after [`Ended::Ours`], once those who re-assert on the end of an interrupt have had their turn:
    /// counts interrupts that came to nothing, and puts the next one off when there were too many.
    pub(super) fn after_end(&mut self) -> Ended {
        if self.wires == 0 {
            self.calm();
            return Ended::Ours;
        }
        self.in_a_row += 1;
        if self.in_a_row < MOST_IN_A_ROW {
            return Ended::Ours;
        }
        self.in_a_row = 0;
        self.put_off = true;
        Ended::PutOff
    }

    /// What was put off may be sent again.
    pub(super) fn relent(&mut self) {
        self.put_off = false;
    }

    fn calm(&mut self) {
        self.in_a_row = 0;
        self.put_off = false;
    }

    /// What the kernel should know this input to send: messages whose end it is to report. It stays known
    /// while the input is masked, as an interrupt in service may end then, and goes when the guest gives the
    /// entry another vector.
    #[must_use]
    pub(super) fn wanted_route(&self) -> Option<MsiMessage> {
        self.entry.message().filter(|_| self.entry.is_level())
    }

    /// What the kernel knows this input to send.
    #[must_use]
    pub(super) const fn route(&self) -> Option<MsiMessage> {
        self.route
    }

    /// The kernel was told `route`.
    pub(super) const fn routed(&mut self, route: Option<MsiMessage>) {
        self.route = route;
    }

    /// The state after power-on. Wires stay as the devices drive them, and the kernel knows what it knew.
    pub(super) fn reset(&mut self) {
        *self = Self {
            wires: self.wires,
            route: self.route,
            ..Self::default()
        };
    }
}
