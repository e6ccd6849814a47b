//! Root ports and the ports of switches: bridges to one logical bus each.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use super::access::DwordWrite;
use super::bar::BarSpec;
use super::bridge::Forwarded;
use super::capability::{
    AccessControl, ErrorReporting, Express, PortType, PowerManagement, Severity, Subsystem,
};
use super::config_space::ConfigSpace;
use super::endpoint::Endpoint;
use super::function::{Command, ConfigEffect, Function};
use super::tree::Node;
use crate::platform::addr::Sbdf;
use crate::platform::dma::Requester;
use crate::platform::irq::{InterruptController, IrqLine};
use crate::platform::msi::{MsiPort, MsiSink};

/// What ports interrupt through.
#[derive(Clone)]
pub struct PortInterrupts {
    /// Where their messages go.
    pub messages: Arc<dyn MsiSink>,
    /// Where their wires end.
    pub wires: Arc<dyn InterruptController>,
}

/// What a port lets through at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortState {
    /// The Command register, less what the power state takes away.
    pub command: Command,
    /// The buses behind it, as programmed: the first is right behind it. Empty when the guest programmed
    /// them backwards.
    pub buses: RangeInclusive<u8>,
    /// Its windows as programmed; [`PortState::command`] says whether they count.
    pub windows: Forwarded,
    /// Whether anything passes: the link is up and nothing behind it is held in reset.
    pub passes: bool,
    /// Whether device numbers behind it are part of function numbers.
    pub ari_forwarding: bool,
    /// Whether requests from behind it that have an End-End TLP prefix, as PASIDs are, end here.
    pub blocks_prefixes: bool,
}

/// A root port, an upstream port or a downstream port.
pub struct Port {
    name: String,
    endpoint: Endpoint,
    /// What it interrupts for.
    causes: Mutex<Causes>,
}

/// What a port interrupts for at one moment, all by one message or wire.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Causes {
    slot: bool,
    errors: bool,
}

impl Port {
    /// The port `node` stands for, with all registers as after reset; `None` when `node` is no port.
    #[must_use]
    pub fn new(node: &Node, at: Sbdf, interrupts: &PortInterrupts) -> Option<Arc<Self>> {
        let express = express(node)?;
        let facing_a_device = express.port_type() != PortType::UpstreamPort;
        let errors = match express.port_type() {
            PortType::RootPort => ErrorReporting::root_port(),
            _ => ErrorReporting::function(),
        };
        let mut config = ConfigSpace::bridge(&node.identity)
            .capability(express)
            .capability(PowerManagement::new())
            .capability(errors);
        if node.identity.subsystem_vendor != 0 {
            config = config.capability(Subsystem {
                vendor: node.identity.subsystem_vendor,
                id: node.identity.subsystem,
            });
        }
        if facing_a_device {
            config = config.capability(AccessControl::port());
        }
        let requester = Arc::new(Requester::new(at));
        let messages = MsiPort::new(requester.clone(), interrupts.messages.clone());
        let mut endpoint = Endpoint::new(config, requester).with_msi(1, messages);
        if let Some(intx) = node.intx {
            endpoint = endpoint.with_intx(intx.pin, IrqLine::new(interrupts.wires.clone(), intx.gsi));
        }
        Some(Arc::new(Self {
            name: node.name.clone(),
            endpoint,
            causes: Mutex::default(),
        }))
    }

    /// Whether a device is in its slot from now on. An upstream port has none.
    pub fn set_occupied(&self, occupied: bool) {
        self.express(|express| express.set_occupied(occupied));
        self.follow_causes();
    }

    /// What is in its slot can leave while the guest runs; `false` where it has none. Optional windows that are closed
    /// are none of its windows from now on: a guest looks for addresses for whatever might come into such a slot, and
    /// complains where there are none to spare. The guest must not run yet.
    pub fn set_hot_plug(&self) -> bool {
        let has_a_slot = self.express(Express::set_hot_plug);
        if has_a_slot {
            let mut config = self.endpoint.config();
            let bridge = config.bridge_registers_mut();
            bridge.expect("a port has a type 1 header").drop_closed_windows();
        }
        has_a_slot
    }

    /// Ask the guest to let go of what is in the slot. Whether the guest listens.
    pub fn press_attention_button(&self) -> bool {
        let listens = self.express(Express::press_attention_button);
        self.follow_causes();
        listens
    }

    /// Whether the guest has not switched the slot off.
    #[must_use]
    pub fn slot_is_on(&self) -> bool {
        self.express(|express| express.slot_is_on())
    }

    /// As a root port: the function with requester ID `source` reported an error. Whether the guest wants to hear of
    /// those.
    pub fn receive_error(&self, severity: Severity, source: u16) -> bool {
        let heard = self.errors(|errors| {
            errors.receive(severity, source);
            errors.reports(severity)
        });
        self.follow_causes();
        heard
    }

    fn express<T>(&self, act: impl FnOnce(&mut Express) -> T) -> T {
        let mut config = self.endpoint.config();
        let express = config.capabilities_mut().get_mut::<Express>();
        act(express.expect("a port has a PCI Express capability"))
    }

    fn errors<T>(&self, act: impl FnOnce(&mut ErrorReporting) -> T) -> T {
        let mut config = self.endpoint.config();
        let errors = config.capabilities_mut().get_mut::<ErrorReporting>();
        act(errors.expect("a port has error reporting"))
    }

    /// Interrupt for what there is now: by message when something is new, by wire for as long as anything is there.
    fn follow_causes(&self) {
        let mut causes = self.causes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Causes {
            slot: self.express(|express| express.interrupts()),
            errors: self.errors(|errors| errors.interrupts()),
        };
        let fresh = now.slot && !causes.slot || now.errors && !causes.errors;
        *causes = now;
        self.endpoint.set_intx(now.slot || now.errors);
        if fresh {
            self.endpoint.signal(0);
        }
    }

    /// What it lets through now.
    #[must_use]
    pub fn state(&self) -> PortState {
        let config = self.endpoint.config();
        let bridge = config.bridge_registers().expect("a port has a type 1 header");
        let express = config
            .capabilities()
            .get::<Express>()
            .expect("a port has a PCI Express capability");
        let link = express.port_type() == PortType::UpstreamPort || express.link_is_active();
        PortState {
            command: config.command(),
            buses: bridge.buses(),
            windows: bridge.windows(),
            passes: link && !bridge.in_reset(),
            ari_forwarding: express.ari_forwarding(),
            blocks_prefixes: express.blocks_prefixes(),
        }
    }
}

/// The PCI Express capability of a port; `None` when `node` is something else.
fn express(node: &Node) -> Option<Express> {
    use super::tree::NodeKind;
    let slot = node.bridge.as_ref()?.slot;
    // Link numbers tell the ports of one device apart.
    let number = node.bdf.requester_id().to_le_bytes()[0];
    match node.kind {
        NodeKind::RootPort => Some(Express::root_port(slot, number)),
        NodeKind::UpstreamPort => Some(Express::upstream_port()),
        NodeKind::DownstreamPort => Some(Express::downstream_port(slot, number)),
        NodeKind::HostBridge | NodeKind::IsaBridge | NodeKind::Iommu(_) | NodeKind::Endpoint(_) => None,
    }
}

impl Function for Port {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, dword: u16) -> u32 {
        self.endpoint.config_read(dword)
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let effect = self.endpoint.config_write(dword, write);
        self.follow_causes();
        effect
    }

    fn requester(&self) -> &Arc<Requester> {
        self.endpoint.requester()
    }

    fn bars(&self) -> &[BarSpec] {
        self.endpoint.bars()
    }

    fn command(&self) -> Command {
        self.endpoint.command()
    }

    fn reset(&self) {
        self.endpoint.reset();
        self.follow_causes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::{Messages, two_ports};
    use crate::pci::tree::{Identity, NodeKind};

    fn interrupts() -> PortInterrupts {
        let messages = Messages::new();
        PortInterrupts {
            messages: messages.clone(),
            wires: messages,
        }
    }

    fn port(change: impl FnOnce(&mut Node)) -> Arc<Port> {
        let mut node = two_ports().segments[0].roots[0].functions[0].clone();
        change(&mut node);
        Port::new(&node, Sbdf::default(), &interrupts()).expect("a port")
    }

    /// Identities of all capabilities, as the guest finds them.
    fn capabilities(port: &Port) -> Vec<u32> {
        let standard = std::iter::successors(Some(port.config_read(13)), |at| {
            Some(port.config_read(u16::try_from(at / 4).expect("a byte")) >> 8 & 0xff)
        });
        let extended = std::iter::successors(Some(0x100), |at| {
            Some(port.config_read(u16::try_from(at / 4).expect("twelve bits")) >> 20)
        });
        let walk = standard
            .take_while(|at| *at != 0)
            .chain(extended.take_while(|at| *at != 0));
        walk.map(|at| port.config_read(u16::try_from(at / 4).expect("twelve bits")) & 0xff)
            .collect()
    }

    #[test]
    fn a_port_that_faces_a_device_controls_access_and_one_that_faces_the_root_does_not() {
        let kind = |kind| move |node: &mut Node| node.kind = kind;
        assert_eq!(capabilities(&port(|_| {})), [0x10, 0x01, 0x05, 0x01, 0x0d]);
        assert_eq!(
            capabilities(&port(kind(NodeKind::DownstreamPort))),
            [0x10, 0x01, 0x05, 0x01, 0x0d]
        );
        assert_eq!(
            capabilities(&port(kind(NodeKind::UpstreamPort))),
            [0x10, 0x01, 0x05, 0x01]
        );
    }

    #[test]
    fn a_port_with_subsystem_ids_shows_them() {
        let named = |node: &mut Node| {
            node.identity = Identity {
                subsystem_vendor: 0x1af4,
                subsystem: 0x1100,
                ..node.identity
            };
        };
        assert_eq!(capabilities(&port(named)), [0x10, 0x01, 0x0d, 0x05, 0x01, 0x0d]);
        assert_eq!(port(named).config_read(0x7c / 4 + 2 + 1), 0x1100_1af4);
    }

    #[test]
    fn what_is_no_port_makes_none() {
        let mut node = two_ports().segments[0].roots[0].functions[0].clone();
        node.kind = NodeKind::IsaBridge;
        assert!(Port::new(&node, Sbdf::default(), &interrupts()).is_none());
        node.kind = NodeKind::RootPort;
        node.bridge = None;
        assert!(Port::new(&node, Sbdf::default(), &interrupts()).is_none());
    }

    #[test]
    fn an_empty_port_passes_nothing_and_a_full_one_passes_until_held_in_reset() {
        let port = port(|_| {});
        assert!(!port.state().passes);
        port.set_occupied(true);
        assert!(port.state().passes);
        let effect = port.config_write(15, DwordWrite::whole(0x0040_0000));
        assert_eq!(effect, ConfigEffect::ROUTING | ConfigEffect::SECONDARY_RESET);
        assert!(!port.state().passes);
        port.reset();
        assert!(port.state().passes);
    }
}
