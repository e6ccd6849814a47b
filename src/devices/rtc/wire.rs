//! Where the clock's interrupt goes: to its input of the I/O APIC, unless the HPET has taken that one over, and
//! to the power hardware in any case, which wakes a guest that sleeps.
//!
//! Under legacy replacement timer 1 of the HPET has GSI 8 to itself: a guest that counts on ticks of the timer
//! there must not get the clock's as well.
//!
//! IA-PC HPET specification 1.0a, section 2.3.5; ACPI specification 6.5, section 4.8.2.4.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::RTC_GSI;
use crate::devices::power::Power;
use crate::platform::irq::{InterruptController, IrqLine};

/// What the clock's wire leads to.
///
/// Locks: the clock's or the HPET's before this one's, this one's before the controller's.
pub struct ClockWire {
    line: IrqLine,
    power: Arc<Power>,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// What the clock drives.
    asserted: bool,
    /// The input is another timer's.
    replaced: bool,
}

impl ClockWire {
    /// A wire to GSI 8 of `controller`, and to `power`.
    #[must_use]
    pub fn new(controller: Arc<dyn InterruptController>, power: Arc<Power>) -> Arc<Self> {
        Arc::new(Self {
            line: IrqLine::new(controller, RTC_GSI),
            power,
            state: Mutex::default(),
        })
    }

    /// Whether another timer has the clock's input to itself. What the clock drives meanwhile arrives when it
    /// gets its input back.
    pub fn replace(&self, replaced: bool) {
        self.change(|state| state.replaced = replaced);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Change the state, then drive the line as it says. Under the lock, so that the line ends up as the last
    /// change left the state; the controller never calls back.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        self.line.set(state.asserted && !state.replaced);
    }
}

impl InterruptController for ClockWire {
    fn line_changed(&self, _gsi: u32, asserted: bool) {
        self.change(|state| state.asserted = asserted);
        if asserted {
            self.power.clock_rang();
        }
    }

    fn pulse(&self, _gsi: u32) {
        if !self.state().replaced {
            self.line.pulse();
        }
        self.power.clock_rang();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::power::{Events, SCI_GSI};
    use crate::devices::request::RequestQueue;
    use crate::platform::bus::BusDevice;

    /// What reached the controller: pulses as `(gsi, None)`.
    #[derive(Default)]
    struct Inputs(Mutex<Vec<(u32, Option<bool>)>>);

    impl InterruptController for Inputs {
        fn line_changed(&self, gsi: u32, asserted: bool) {
            self.0.lock().expect("not poisoned").push((gsi, Some(asserted)));
        }
        fn pulse(&self, gsi: u32) {
            self.0.lock().expect("not poisoned").push((gsi, None));
        }
    }

    struct Board {
        inputs: Arc<Inputs>,
        power: Arc<Power>,
        wire: Arc<ClockWire>,
        /// The clock's own end.
        clock: IrqLine,
    }

    impl Board {
        fn new() -> Self {
            let inputs = Arc::new(Inputs::default());
            let requests = RequestQueue::new().expect("a descriptor");
            let power = Power::new(IrqLine::new(inputs.clone(), SCI_GSI), requests);
            let wire = ClockWire::new(inputs.clone(), power.clone());
            let clock = IrqLine::new(wire.clone(), RTC_GSI);
            Self {
                inputs,
                power,
                wire,
                clock,
            }
        }

        fn seen(&self) -> Vec<(u32, Option<bool>)> {
            std::mem::take(&mut *self.inputs.0.lock().expect("not poisoned"))
        }

        fn status(&self) -> Events {
            let mut data = [0; 2];
            self.power.read(0, &mut data);
            Events::from_bits(u16::from_le_bytes(data))
        }
    }

    #[test]
    fn the_clock_has_its_input_and_says_so_to_the_power_hardware() {
        let board = Board::new();
        board.clock.set(true);
        board.clock.set(false);
        board.clock.pulse();
        assert_eq!(
            board.seen(),
            [(RTC_GSI, Some(true)), (RTC_GSI, Some(false)), (RTC_GSI, None)]
        );
        assert!(board.status().clock());
    }

    #[test]
    fn a_replaced_clock_interrupts_nobody_and_wakes_all_the_same() {
        let board = Board::new();
        board.wire.replace(true);
        board.clock.set(true);
        board.clock.pulse();
        assert_eq!(board.seen(), []);
        assert!(board.status().clock());
    }

    #[test]
    fn a_clock_that_is_replaced_while_it_interrupts_lets_go_and_gets_its_input_back() {
        let board = Board::new();
        board.clock.set(true);
        board.wire.replace(true);
        board.wire.replace(false);
        assert_eq!(
            board.seen(),
            [Some(true), Some(false), Some(true)].map(|level| (RTC_GSI, level))
        );
        board.wire.replace(true);
        board.clock.set(false);
        board.wire.replace(false);
        assert_eq!(board.seen(), [(RTC_GSI, Some(false))]);
    }
}
