//! Who goes by the numbers that functions have, and is told when the guest changes them, or when a function leaves.

use std::sync::{Arc, PoisonError, Weak};

use super::Topology;
use crate::platform::dma::Requester;

/// Who holds something for functions by their numbers: an IOMMU, which looks them up in tables of the guest's.
pub trait Observer: Send + Sync {
    /// Some functions have other numbers than before, which their requesters know already. Called on the processor that
    /// wrote the number, with no lock held and before its access is over: it does no more than is needed for nobody to go by the
    /// old number, once for each function behind the bridge.
    fn renumbered(&self);

    /// The function that issues requests as `requester` issues none any more and will not come back. A function of the host's is
    /// still there, and the host has it after this. Called with no lock held.
    fn left(&self, requester: &Arc<Requester>) {
        let _ = requester;
    }
}

impl Topology {
    /// Tell `observer` from now on, for as long as it lives. It sees by itself what is so by now.
    pub fn tell(&self, observer: Weak<dyn Observer>) {
        let mut observers = self.observers.write().unwrap_or_else(PoisonError::into_inner);
        observers.push(observer);
    }

    /// Somebody has another number. No lock is held.
    pub(super) fn tell_renumbered(&self) {
        self.observers().iter().for_each(|observer| observer.renumbered());
    }

    /// A function left. No lock is held.
    pub(super) fn tell_left(&self, requester: &Arc<Requester>) {
        self.observers()
            .iter()
            .for_each(|observer| observer.left(requester));
    }

    fn observers(&self) -> Vec<Arc<dyn Observer>> {
        let observers = self.observers.read().unwrap_or_else(PoisonError::into_inner);
        observers.iter().filter_map(Weak::upgrade).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, OnceLock};

    use super::*;
    use crate::pci::Function as _;
    use crate::pci::testing::{Machine, two_roots};
    use crate::platform::addr::Bdf;

    const COMMAND: u16 = 1;
    const BUSES: u16 = 6;
    const CONTROL: u16 = 15;
    /// The Express capability comes first.
    const LINK_CONTROL: u16 = 0x10 + 4;

    /// Writes down as whom `near` issues requests whenever somebody has another number, and who left.
    #[derive(Default)]
    struct Listener {
        machine: OnceLock<Arc<Machine>>,
        heard: Mutex<Vec<Bdf>>,
        gone: Mutex<Vec<Bdf>>,
    }

    impl Listener {
        fn heard(&self) -> Vec<Bdf> {
            std::mem::take(&mut self.heard.lock().expect("not poisoned"))
        }
    }

    impl Observer for Listener {
        fn renumbered(&self) {
            let machine = self.machine.get().expect("set");
            let near = machine.probe("near").requester();
            // No lock is held that this needs.
            let other = machine.node("other").bdf;
            machine.write(other, COMMAND, machine.read(other, COMMAND));
            self.heard.lock().expect("not poisoned").push(near.sbdf().bdf);
        }

        fn left(&self, requester: &Arc<Requester>) {
            self.gone.lock().expect("not poisoned").push(requester.sbdf().bdf);
        }
    }

    fn listening() -> (Arc<Machine>, Arc<Listener>) {
        let machine = Arc::new(Machine::new(two_roots()));
        let listener = Arc::new(Listener::default());
        assert!(listener.machine.set(machine.clone()).is_ok());
        let weak: Weak<dyn Observer> = Arc::downgrade(&listener) as Weak<dyn Observer>;
        machine.topology.tell(weak);
        (machine, listener)
    }

    fn bus(number: u8) -> Bdf {
        Bdf::new(number, 0, 0).expect("in range")
    }

    #[test]
    fn who_goes_by_numbers_is_told_of_new_ones_and_of_nothing_else() {
        let (machine, listener) = listening();
        machine.enable();
        let (port, near) = (machine.node("rp0").bdf, machine.node("near").bdf);
        let buses = machine.read(port, BUSES);
        for (dword, value) in [(COMMAND, 0), (COMMAND, 7), (CONTROL, 0x0040 << 16), (CONTROL, 0)] {
            machine.write(port, dword, value);
        }
        // A number that leads nowhere is no function's, and the old one again is no news.
        machine.write(port, BUSES, 0x00ff_ff00);
        machine.write(port, BUSES, buses);
        assert_eq!(listener.heard(), []);
        machine.write(port, BUSES, 0x0030_3000);
        assert_eq!(listener.heard(), [bus(0x30)]);
        machine.write(port, BUSES, buses);
        assert_eq!(listener.heard(), [near]);
    }

    #[test]
    fn what_is_renumbered_while_its_link_is_down_is_told_when_it_comes_up() {
        let (machine, listener) = listening();
        machine.enable();
        let port = machine.node("rp0").bdf;
        machine.write(port, LINK_CONTROL, 1 << 4);
        machine.write(port, BUSES, 0x0030_3000);
        assert_eq!(listener.heard(), []);
        machine.write(port, LINK_CONTROL, 0);
        assert_eq!(listener.heard(), [bus(0x30)]);
    }

    #[test]
    fn it_is_told_who_left_and_that_is_no_other_number() {
        let (machine, listener) = listening();
        machine.enable();
        let near = machine.node("near").bdf;
        let function = machine.topology.function(0, near).expect("there");
        machine.topology.removed(function);
        assert_eq!(*listener.gone.lock().expect("not poisoned"), [near]);
        assert_eq!(listener.heard(), []);
    }

    #[test]
    fn who_is_gone_is_not_told_and_a_reset_is_told_to_nobody() {
        let (machine, listener) = listening();
        let port = machine.node("rp0").bdf;
        machine.write(port, BUSES, 0x0030_3000);
        assert_eq!(listener.heard().len(), 1);
        machine.topology.reset();
        assert_eq!(listener.heard(), []);
        assert_eq!(
            machine.probe("near").requester().sbdf().bdf,
            machine.node("near").bdf
        );
        drop(listener);
        machine.write(port, BUSES, 0x0030_3000);
    }
}
