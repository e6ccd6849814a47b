//! What processors pass on their way into the guest, and what keeps them out while memory slots change.
//!
//! A processor says that it goes inside and then looks whether the gate is closed; who closes it says so and then
//! looks who is inside. One of the two sees the other, so nobody is inside when [`Gate::close`] returns. A processor
//! that handles an exit is not inside, whatever it waits for: whoever closes waits only for processors to leave the
//! guest, and they are made to. Processors that find the gate closed hold no lock while they wait.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Makes a processor leave the guest.
pub(super) trait Stop: Send + Sync {
    /// The processor is inside, or is just about to go there or come back. It leaves, or does not even enter.
    fn stop(&self);
}

/// One processor's way through the gate.
pub(super) struct Passage {
    inside: AtomicBool,
    stop: Box<dyn Stop>,
}

/// The gate was closed for good, for this reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Jammed(pub(super) Arc<str>);

/// Between the processors and the guest.
#[derive(Default)]
pub(super) struct Gate {
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    stopped: AtomicU64,
}

#[derive(Default)]
struct State {
    passages: Vec<Arc<Passage>>,
    jammed: Option<Jammed>,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A way through for a processor that `stop` stops.
    pub(super) fn passage(&self, stop: Box<dyn Stop>) -> Arc<Passage> {
        let passage = Arc::new(Passage {
            inside: AtomicBool::new(false),
            stop,
        });
        self.lock().passages.push(passage.clone());
        passage
    }

    /// The processor of `passage` is no more.
    pub(super) fn forget(&self, passage: &Arc<Passage>) {
        self.lock().passages.retain(|there| !Arc::ptr_eq(there, passage));
    }

    /// The processor of `passage` goes inside, once the gate is open.
    ///
    /// # Errors
    /// When the gate will never be open again.
    pub(super) fn enter(&self, passage: &Passage) -> Result<(), Jammed> {
        loop {
            passage.inside.store(true, Ordering::SeqCst);
            if !self.closed.load(Ordering::SeqCst) {
                return Ok(());
            }
            self.leave(passage);
            let waits = |state: &mut State| state.jammed.is_none() && self.closed.load(Ordering::SeqCst);
            let state = self.changed.wait_while(self.lock(), waits);
            let state = state.unwrap_or_else(PoisonError::into_inner);
            if let Some(jammed) = &state.jammed {
                return Err(jammed.clone());
            }
        }
    }

    /// The processor of `passage` is back.
    pub(super) fn leave(&self, passage: &Passage) {
        passage.inside.store(false, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            // Under the lock, so that it cannot fall between the other's look and its wait.
            let _state = self.lock();
            self.changed.notify_all();
        }
    }

    /// Get everybody out, and nobody in until what is returned is dropped. One at a time; the caller's own processor
    /// must be outside.
    pub(super) fn close(&self) -> Closed<'_> {
        self.closed.store(true, Ordering::SeqCst);
        let state = self.lock();
        for passage in &state.passages {
            if passage.inside.load(Ordering::SeqCst) {
                passage.stop.stop();
                self.stopped.fetch_add(1, Ordering::Relaxed);
            }
        }
        let occupied = |state: &mut State| {
            let mut passages = state.passages.iter();
            passages.any(|passage| passage.inside.load(Ordering::SeqCst))
        };
        let state = self.changed.wait_while(state, occupied);
        drop(state.unwrap_or_else(PoisonError::into_inner));
        Closed(self)
    }

    /// How many times a processor was made to leave.
    pub(super) fn stopped(&self) -> u64 {
        self.stopped.load(Ordering::Relaxed)
    }
}

/// While it lives, nobody is inside.
pub(super) struct Closed<'a>(&'a Gate);

impl Closed<'_> {
    /// Never open again, because of `why`.
    pub(super) fn jam(self, why: &str) {
        self.0.lock().jammed = Some(Jammed(why.into()));
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        let state = self.0.lock();
        if state.jammed.is_none() {
            self.0.closed.store(false, Ordering::SeqCst);
        }
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::thread;
    use std::time::Duration;

    /// A processor that stays inside until it is stopped.
    #[derive(Clone, Default)]
    struct Guest(Arc<(Mutex<bool>, Condvar)>);

    impl Stop for Guest {
        fn stop(&self) {
            *self.0.0.lock().expect("not poisoned") = true;
            self.0.1.notify_all();
        }
    }

    impl Guest {
        fn run(&self) {
            let stopped = self.0.0.lock().expect("not poisoned");
            let mut stopped = self.0.1.wait_while(stopped, |stopped| !*stopped).expect("ok");
            *stopped = false;
        }
    }

    #[test]
    fn nobody_is_inside_a_closed_gate_whoever_closes_it() {
        const VCPUS: usize = 4;
        const CLOSINGS: usize = 100;
        let gate = Gate::default();
        // What two that change slots share, as they share the lock on the slots.
        let changing = Mutex::new(());
        let inside = AtomicUsize::new(0);
        let over = AtomicBool::new(false);
        let guests: Vec<Guest> = (0..VCPUS).map(|_| Guest::default()).collect();
        thread::scope(|scope| {
            for guest in &guests {
                let passage = gate.passage(Box::new(guest.clone()));
                let (gate, changing, inside, over) = (&gate, &changing, &inside, &over);
                scope.spawn(move || {
                    let mut round = 0;
                    while !over.load(Ordering::SeqCst) {
                        gate.enter(&passage).expect("never jammed");
                        inside.fetch_add(1, Ordering::SeqCst);
                        guest.run();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        gate.leave(&passage);
                        // From an exit, as a guest's own doing.
                        round += 1;
                        if round % 4 == 0 {
                            let _changing = changing.lock().expect("not poisoned");
                            let closed = gate.close();
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                            drop(closed);
                        }
                    }
                });
            }
            // Somebody has to come out.
            while inside.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            for _ in 0..CLOSINGS {
                let _changing = changing.lock().expect("not poisoned");
                let closed = gate.close();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                thread::yield_now();
                assert_eq!(inside.load(Ordering::SeqCst), 0);
                drop(closed);
            }
            over.store(true, Ordering::SeqCst);
            // Those that went in after the last closing come out by another.
            let _changing = changing.lock().expect("not poisoned");
            drop(gate.close());
            guests.iter().for_each(Stop::stop);
        });
        assert!(gate.stopped() > 0);
    }

    #[test]
    fn a_processor_in_an_exit_is_not_waited_for() {
        let gate = Gate::default();
        let passage = gate.passage(Box::new(Guest::default()));
        gate.enter(&passage).expect("open");
        gate.leave(&passage);
        drop(gate.close());
        assert_eq!(gate.stopped(), 0);
        gate.enter(&passage).expect("open again");
    }

    #[test]
    fn a_processor_that_is_gone_is_not_waited_for() {
        let gate = Gate::default();
        let passage = gate.passage(Box::new(Guest::default()));
        gate.enter(&passage).expect("open");
        gate.forget(&passage);
        drop(gate.close());
        assert_eq!(gate.stopped(), 0);
    }

    #[test]
    fn a_jammed_gate_says_why_to_those_who_wait_and_those_who_come() {
        let gate = Gate::default();
        let waiting = gate.passage(Box::new(Guest::default()));
        let closed = gate.close();
        let expected = Err(Jammed("a hole".into()));
        thread::scope(|scope| {
            let waiter = scope.spawn(|| gate.enter(&waiting));
            thread::sleep(Duration::from_millis(5));
            assert!(!waiter.is_finished());
            closed.jam("a hole");
            assert_eq!(waiter.join().expect("no panic"), expected);
        });
        let coming = gate.passage(Box::new(Guest::default()));
        assert_eq!(gate.enter(&coming), expected);
    }
}
