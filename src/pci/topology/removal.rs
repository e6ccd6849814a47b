//! Functions that leave while the guest runs, and errors they report: what the ports above tell the guest.
//!
//! A function of the host may be taken back, or fail. Where it is behind a port with a slot, the slot can be emptied: its
//! button asks the guest to let go (PCI Express Base Specification 6.7), and where it does not, the link goes
//! down, as when a device is pulled out. Errors of the function are reported by its root port (6.2). On a root bus there is
//! nobody to tell the guest.

use std::sync::Arc;

use super::{Place, Topology};
use crate::pci::capability::Severity;
use crate::pci::function::{ConfigEffect, Function};
use crate::pci::port::Port;

impl Topology {
    /// What is in the slot of `function` can be asked for while the guest runs; nothing where it has no slot. Before the
    /// guest runs. The port needs an open memory window, which [`crate::pci::assign::FunctionSpec::removable`] gives it.
    pub fn make_removable(&self, function: &Arc<dyn Function>) {
        let _has_a_slot = self
            .port_above(function)
            .is_some_and(|(_, port)| port.set_hot_plug());
    }

    /// Ask the guest to let go of `function` and what else is in its slot. Whether the guest listens; then
    /// [`Topology::has_let_go`] will say so once it did.
    pub fn ask_to_let_go(&self, function: &Arc<dyn Function>) -> bool {
        self.port_above(function)
            .is_some_and(|(_, port)| port.press_attention_button())
    }

    /// Whether the guest has switched the slot of `function` off.
    #[must_use]
    pub fn has_let_go(&self, function: &Arc<dyn Function>) -> bool {
        self.port_above(function)
            .is_some_and(|(_, port)| !port.slot_is_on())
    }

    /// `function` answers nothing any more ([`Function::is_present`]). Its BARs and its requests end before this returns, of
    /// which observers are told, and where nothing is left in its slot, the link goes down, of which the slot tells the
    /// guest (6.7.6).
    pub fn removed(&self, function: &Arc<dyn Function>) {
        let Some(place) = self.place_of(function) else {
            return;
        };
        self.perform(place, &**function, ConfigEffect::DECODING);
        self.tell_left(function.requester());
        let bus = &self.buses[place.bus];
        let present = |index: &usize| {
            let there = self.places[*index].function.as_ref();
            there.is_some_and(|there| there.is_present())
        };
        if let Some((above, port)) = self.port_above(function)
            && !bus.functions.iter().flatten().any(present)
        {
            port.set_occupied(false);
            self.perform(above, &*port, ConfigEffect::ROUTING);
        }
    }

    /// `function` has an uncorrectable error: what its root port tells the guest, whether the function has error reporting
    /// in the guest or not. Whether the guest listens; never on a root bus.
    pub fn report_error(&self, function: &Arc<dyn Function>, severity: Severity) -> bool {
        let Some(place) = self.place_of(function) else {
            return false;
        };
        // A root port reports its own errors.
        let mut root_port = place.port.as_ref().map(|(port, _)| port);
        let mut above = self.buses[place.bus].above;
        while let Some(index) = above {
            root_port = self.places[index].port.as_ref().map(|(port, _)| port);
            above = self.buses[self.places[index].bus].above;
        }
        let source = function.requester().sbdf().bdf.requester_id();
        root_port.is_some_and(|port| port.receive_error(severity, source))
    }

    fn place_of(&self, function: &Arc<dyn Function>) -> Option<&Place> {
        let is = |place: &&Place| {
            let there = place.function.as_ref();
            there.is_some_and(|there| Arc::ptr_eq(there, function))
        };
        self.places.iter().find(is)
    }

    /// The port whose link leads to `function`.
    fn port_above(&self, function: &Arc<dyn Function>) -> Option<(&Place, Arc<Port>)> {
        let bus = &self.buses[self.place_of(function)?.bus];
        let place = &self.places[bus.above.filter(|_| bus.behind_a_link)?];
        let (port, _) = place.port.as_ref()?;
        Some((place, port.clone()))
    }
}
