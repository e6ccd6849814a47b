//! The PCI Express capability (PCI Express Base Specification 7.5.3): what kind of port a function is, its
//! link, its slot, and function-level reset.

use super::{Capability, CapabilityId};
use crate::pci::access::{DwordWrite, Register};
use crate::pci::function::ConfigEffect;

const DEVICE_CAPABILITIES: usize = 1;
const DEVICE_CONTROL: usize = 2;
const LINK_CAPABILITIES: usize = 3;
const LINK_CONTROL: usize = 4;
const SLOT_CAPABILITIES: usize = 5;
const SLOT_CONTROL: usize = 6;
const ROOT_CONTROL: usize = 7;
const ROOT_STATUS: usize = 8;
const DEVICE_CAPABILITIES_2: usize = 9;
const DEVICE_CONTROL_2: usize = 10;
const LINK_CAPABILITIES_2: usize = 11;
const LINK_CONTROL_2: usize = 12;
const DWORDS: usize = 15;

/// Version 2 of the layout; every register of it is there.
const VERSION: u32 = 2 << 16;
const SLOT_IMPLEMENTED: u32 = 1 << 24;

/// Extended tags, and error reporting by role, which is required; payloads of 128 bytes.
const DEVICE: u32 = 1 << 5 | 1 << 15;
const FLR_CAPABLE: u32 = 1 << 28;
const INITIATE_FLR: u32 = 1 << 15;
/// Error reporting, relaxed ordering, extended tags, no snoop, read request size. The payload size is fixed,
/// as 7.5.3.4 allows where 128 bytes is the largest.
const DEVICE_CONTROL_WRITABLE: u32 = 0x791f;
/// Relaxed ordering and no snoop on, read requests of 512 bytes (7.5.3.4).
const DEVICE_CONTROL_RESET: u32 = 0x2810;
/// Correctable, non-fatal, fatal error and unsupported request detected.
const DEVICE_STATUS_CLEARS: u32 = 0xf << 16;

/// 16 GT/s and 16 lanes: more than any function passed through is likely to need, so that no driver
/// reports its slot as a bottleneck.
const SPEED_AND_WIDTH: u32 = 0x4 | 16 << 4;
const ASPM_OPTIONALITY: u32 = 1 << 22;
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
const READ_COMPLETION_BOUNDARY: u32 = 1 << 3;
const LINK_DISABLE: u32 = 1 << 4;
/// Common clock and extended synch.
const LINK_CONTROL_WRITABLE: u32 = 0xc0;
const SLOT_CLOCK: u32 = 1 << 28;
const LINK_ACTIVE: u32 = 1 << 29;
/// 2.5 to 16 GT/s.
const SPEEDS: u32 = 0x1e;
const TARGET_SPEED: u32 = 0xf;

/// Link Capabilities: a link that goes down by itself is an error (7.5.3.6).
const SURPRISE_DOWN_REPORTING: u32 = 1 << 19;

/// Slot Capabilities of a slot that can be emptied while the guest runs (7.5.3.9): attention button, power controller, a
/// device may also leave unasked, hot-plug, and commands take effect at once, without an event for each.
const HOT_PLUG_SLOT: u32 = 1 | 1 << 1 | 1 << 5 | 1 << 6 | 1 << 18;
/// Slot Control (7.5.3.10): which events interrupt - the button, presence, the link's state - and whether any does.
const BUTTON_ENABLE: u32 = 1;
const PRESENCE_ENABLE: u32 = 1 << 3;
const HOT_PLUG_INTERRUPT: u32 = 1 << 5;
const LINK_ENABLE: u32 = 1 << 12;
/// Slot Control: the power is off.
const POWER_OFF: u32 = 1 << 10;
/// Slot Status (7.5.3.11), in the same dword: the events.
const BUTTON_PRESSED: u32 = 1 << 16;
const PRESENCE_CHANGED: u32 = 1 << 19;
const LINK_CHANGED: u32 = 1 << 24;
const PRESENCE_DETECT: u32 = 1 << 22;
/// System errors on the three severities, and the PME interrupt.
const ROOT_CONTROL_WRITABLE: u32 = 0xf;
const PME_STATUS: u32 = 1 << 16;

const COMPLETION_TIMEOUT_DISABLE: u32 = 1 << 4;
const ARI_FORWARDING: u32 = 1 << 5;
/// Three bits of Fmt, which prefixes need, and which all functions of a device say alike (7.5.3.15).
const EXTENDED_FMT: u32 = 1 << 20;
/// Requests with End-End TLP prefixes are understood.
const END_END_PREFIX: u32 = 1 << 21;
/// At most one of them per request; 0 in this field stands for four, which switches must have.
const ONE_PREFIX: u32 = 1 << 22;
/// Device Control 2, of ports: what leaves by this one has no End-End TLP prefix (7.5.3.16).
const PREFIX_BLOCKING: u32 = 1 << 15;

/// Device/Port Type (7.5.3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum PortType {
    /// A device behind a port.
    Endpoint = 0,
    /// A port of a root complex.
    RootPort = 4,
    /// The port of a switch that faces the root.
    UpstreamPort = 5,
    /// A port of a switch that faces a device.
    DownstreamPort = 6,
    /// A device on a root bus.
    RootComplexIntegratedEndpoint = 9,
}

impl PortType {
    /// Whether a link and a slot hang below it.
    const fn faces_a_device(self) -> bool {
        matches!(self, Self::RootPort | Self::DownstreamPort)
    }

    const fn is_endpoint(self) -> bool {
        matches!(self, Self::Endpoint | Self::RootComplexIntegratedEndpoint)
    }

    const fn has_a_link(self) -> bool {
        !matches!(self, Self::RootComplexIntegratedEndpoint)
    }
}

/// The PCI Express capability.
pub struct Express {
    port: PortType,
    registers: [Register; DWORDS],
    /// Of a port that faces a device: something is in the slot.
    occupied: bool,
}

impl Express {
    /// Of a device behind a port ([`PortType::Endpoint`]) or on a root bus
    /// ([`PortType::RootComplexIntegratedEndpoint`]); it can be reset by itself.
    #[must_use]
    pub fn endpoint(on_root_bus: bool) -> Self {
        Self::new(if on_root_bus {
            PortType::RootComplexIntegratedEndpoint
        } else {
            PortType::Endpoint
        })
    }

    /// Of a root port with the physical slot number `slot` (13 bits), or none, and link number `number`.
    #[must_use]
    pub fn root_port(slot: Option<u16>, number: u8) -> Self {
        Self::new(PortType::RootPort).with_slot(slot, number)
    }

    /// Of a switch's upstream port.
    #[must_use]
    pub fn upstream_port() -> Self {
        Self::new(PortType::UpstreamPort)
    }

    /// Of a switch's downstream port with the physical slot number `slot` (13 bits), or none, and link
    /// number `number`.
    #[must_use]
    pub fn downstream_port(slot: Option<u16>, number: u8) -> Self {
        Self::new(PortType::DownstreamPort).with_slot(slot, number)
    }

    fn new(port: PortType) -> Self {
        let mut registers = [Register::read_only(0); DWORDS];
        let flr = if port.is_endpoint() { FLR_CAPABLE } else { 0 };
        registers[0] = Register::read_only(VERSION | (port as u32) << 20);
        registers[DEVICE_CAPABILITIES] = Register::read_only(DEVICE | flr);
        registers[DEVICE_CONTROL] =
            Register::writable(DEVICE_CONTROL_RESET, DEVICE_CONTROL_WRITABLE).clears(DEVICE_STATUS_CLEARS);
        let ari = if port.faces_a_device() { ARI_FORWARDING } else { 0 };
        // Every port forwards prefixes, up to four: whatever is behind it may use PASIDs.
        let (prefixes, blocking) = if port.is_endpoint() {
            (0, 0)
        } else {
            (END_END_PREFIX, PREFIX_BLOCKING)
        };
        registers[DEVICE_CAPABILITIES_2] =
            Register::read_only(COMPLETION_TIMEOUT_DISABLE | ari | EXTENDED_FMT | prefixes);
        registers[DEVICE_CONTROL_2] = Register::writable(0, COMPLETION_TIMEOUT_DISABLE | ari | blocking);
        if port.has_a_link() {
            let (reporting, control, active) = if port.faces_a_device() {
                (LINK_ACTIVE_REPORTING | SURPRISE_DOWN_REPORTING, LINK_DISABLE, 0)
            } else {
                (0, READ_COMPLETION_BOUNDARY, SPEED_AND_WIDTH << 16)
            };
            registers[LINK_CAPABILITIES] =
                Register::read_only(SPEED_AND_WIDTH | ASPM_OPTIONALITY | reporting);
            registers[LINK_CONTROL] =
                Register::writable(SLOT_CLOCK | active, LINK_CONTROL_WRITABLE | control);
            registers[LINK_CAPABILITIES_2] = Register::read_only(SPEEDS);
            registers[LINK_CONTROL_2] = Register::writable(SPEED_AND_WIDTH & TARGET_SPEED, TARGET_SPEED);
        }
        if port == PortType::RootPort {
            registers[ROOT_CONTROL] = Register::writable(0, ROOT_CONTROL_WRITABLE);
            registers[ROOT_STATUS] = Register::writable(0, 0).clears(PME_STATUS);
        }
        Self {
            port,
            registers,
            occupied: false,
        }
    }

    /// Of a device whose requests can have one prefix, as PASID needs it.
    #[must_use]
    pub fn with_end_end_prefix(mut self) -> Self {
        let capabilities = self.registers[DEVICE_CAPABILITIES_2].get() | END_END_PREFIX | ONE_PREFIX;
        self.registers[DEVICE_CAPABILITIES_2] = Register::read_only(capabilities);
        self
    }

    fn with_slot(mut self, slot: Option<u16>, number: u8) -> Self {
        let link = self.registers[LINK_CAPABILITIES].get() | u32::from(number) << 24;
        self.registers[LINK_CAPABILITIES] = Register::read_only(link);
        if let Some(slot) = slot {
            let kind = self.registers[0].get() | SLOT_IMPLEMENTED;
            self.registers[0] = Register::read_only(kind);
            self.registers[SLOT_CAPABILITIES] = Register::read_only(u32::from(slot & 0x1fff) << 19);
        }
        self
    }

    /// What kind of port it is.
    #[must_use]
    pub const fn port_type(&self) -> PortType {
        self.port
    }

    /// Of a port that faces a device: whether one is there. Presence and link state follow.
    pub fn set_occupied(&mut self, occupied: bool) {
        let changed = self.occupied != occupied;
        self.occupied = occupied;
        self.link_may_have_changed();
        if changed && self.is_hot_plug() {
            self.registers[SLOT_CONTROL].update(PRESENCE_CHANGED, PRESENCE_CHANGED);
        }
    }

    /// Of a port with a slot: what is in it can leave while the guest runs. `false` where there is no slot.
    pub fn set_hot_plug(&mut self) -> bool {
        if self.registers[0].get() & SLOT_IMPLEMENTED == 0 {
            return false;
        }
        let slot = self.registers[SLOT_CAPABILITIES].get() | HOT_PLUG_SLOT;
        self.registers[SLOT_CAPABILITIES] = Register::read_only(slot);
        let control = BUTTON_ENABLE | PRESENCE_ENABLE | HOT_PLUG_INTERRUPT | POWER_OFF | LINK_ENABLE;
        self.registers[SLOT_CONTROL] =
            Register::writable(0, control).clears(BUTTON_PRESSED | PRESENCE_CHANGED | LINK_CHANGED);
        self.show_link();
        true
    }

    /// Whether what is in the slot can leave while the guest runs.
    #[must_use]
    pub const fn is_hot_plug(&self) -> bool {
        self.registers[SLOT_CAPABILITIES].get() & HOT_PLUG_SLOT != 0
    }

    /// Ask the guest to let go of what is in the slot, or not to after all when it is pressed again. Whether the guest
    /// listens.
    pub fn press_attention_button(&mut self) -> bool {
        if !self.is_hot_plug() {
            return false;
        }
        self.registers[SLOT_CONTROL].update(BUTTON_PRESSED, BUTTON_PRESSED);
        let listens = BUTTON_ENABLE | HOT_PLUG_INTERRUPT;
        self.registers[SLOT_CONTROL].get() & listens == listens
    }

    /// Whether the guest has not switched the slot off.
    #[must_use]
    pub const fn slot_is_on(&self) -> bool {
        self.registers[SLOT_CONTROL].get() & POWER_OFF == 0
    }

    /// Whether there is an event of the slot that the guest wants to be interrupted for (6.7.3.4).
    #[must_use]
    pub fn interrupts(&self) -> bool {
        let slot = self.registers[SLOT_CONTROL].get();
        let events = [
            (BUTTON_ENABLE, BUTTON_PRESSED),
            (PRESENCE_ENABLE, PRESENCE_CHANGED),
            (LINK_ENABLE, LINK_CHANGED),
        ];
        let wanted = |(enable, event)| slot & enable != 0 && slot & event != 0;
        slot & HOT_PLUG_INTERRUPT != 0 && events.into_iter().any(wanted)
    }

    /// Whether configuration requests and memory requests reach what is below: a device is there, and the guest neither
    /// disabled the link nor switched the slot off.
    #[must_use]
    pub const fn link_is_active(&self) -> bool {
        self.occupied && self.slot_is_on() && self.registers[LINK_CONTROL].get() & LINK_DISABLE == 0
    }

    /// Whether the guest lets the device behind this port use the device number as part of its function
    /// number (7.5.3.16).
    #[must_use]
    pub const fn ari_forwarding(&self) -> bool {
        self.registers[DEVICE_CONTROL_2].get() & ARI_FORWARDING != 0
    }

    /// Whether requests from below end here when they have an End-End TLP prefix. Only the upstream port of a
    /// switch stops them: the bit concerns what leaves by the port it is in, and by a port that faces a device
    /// requests from below come in.
    #[must_use]
    pub fn blocks_prefixes(&self) -> bool {
        self.port == PortType::UpstreamPort && self.registers[DEVICE_CONTROL_2].get() & PREFIX_BLOCKING != 0
    }

    fn link_may_have_changed(&mut self) {
        let before = self.registers[LINK_CONTROL].get();
        self.show_link();
        let changed = (before ^ self.registers[LINK_CONTROL].get()) & LINK_ACTIVE != 0;
        if changed && self.is_hot_plug() {
            self.registers[SLOT_CONTROL].update(LINK_CHANGED, LINK_CHANGED);
        }
    }

    fn show_link(&mut self) {
        if !self.port.faces_a_device() {
            return;
        }
        let present = if self.occupied { PRESENCE_DETECT } else { 0 };
        self.registers[SLOT_CONTROL].update(PRESENCE_DETECT, present);
        let state = LINK_ACTIVE | SPEED_AND_WIDTH << 16;
        let active = if self.link_is_active() { state } else { 0 };
        self.registers[LINK_CONTROL].update(state, active);
    }
}

impl Capability for Express {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(0x10)
    }

    fn len(&self) -> u16 {
        0x3c
    }

    fn read(&self, dword: u16) -> u32 {
        self.registers
            .get(usize::from(dword))
            .map_or(0, |register| register.get())
    }

    fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let index = usize::from(dword);
        let Some(register) = self.registers.get_mut(index) else {
            return ConfigEffect::empty();
        };
        let old = register.get();
        register.write(write);
        let changed = old ^ register.get();
        match index {
            DEVICE_CONTROL if self.port.is_endpoint() && write.ones(INITIATE_FLR) != 0 => {
                ConfigEffect::FUNCTION_RESET
            }
            DEVICE_CONTROL_2 => {
                let mut effect = ConfigEffect::empty();
                effect.set(ConfigEffect::ROUTING, changed & ARI_FORWARDING != 0);
                effect.set(ConfigEffect::DECODING, changed & PREFIX_BLOCKING != 0);
                effect
            }
            LINK_CONTROL if changed & LINK_DISABLE != 0 => {
                self.link_may_have_changed();
                // A link that goes down resets what is behind it (6.6.1).
                ConfigEffect::ROUTING | ConfigEffect::SECONDARY_RESET
            }
            SLOT_CONTROL if changed & POWER_OFF != 0 => {
                self.link_may_have_changed();
                ConfigEffect::ROUTING | ConfigEffect::SECONDARY_RESET
            }
            _ => ConfigEffect::empty(),
        }
    }

    fn reset(&mut self) {
        self.registers.iter_mut().for_each(Register::reset);
        self.show_link();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(index: usize) -> u16 {
        u16::try_from(index).expect("small")
    }

    #[test]
    fn function_level_reset_is_asked_for_by_a_one_and_reads_zero() {
        let mut express = Express::endpoint(false);
        let byte = |value| DwordWrite::new(1, &[value]).expect("inside");
        assert_eq!(
            express.write(dword(DEVICE_CONTROL), byte(0xa8)),
            ConfigEffect::FUNCTION_RESET
        );
        assert_eq!(express.read(dword(DEVICE_CONTROL)), 0x2810);
        assert_eq!(
            express.write(dword(DEVICE_CONTROL), byte(0x28)),
            ConfigEffect::empty()
        );
    }

    #[test]
    fn a_port_cannot_be_reset_by_itself() {
        let mut express = Express::root_port(Some(1), 1);
        let write = DwordWrite::whole(INITIATE_FLR);
        assert_eq!(express.write(dword(DEVICE_CONTROL), write), ConfigEffect::empty());
        assert_eq!(express.read(dword(DEVICE_CAPABILITIES)) & FLR_CAPABLE, 0);
    }

    #[test]
    fn the_slot_number_and_the_link_number_are_shown() {
        let express = Express::downstream_port(Some(0x1fff), 7);
        assert_eq!(express.read(dword(SLOT_CAPABILITIES)), 0x1fff << 19);
        assert_eq!(express.read(dword(LINK_CAPABILITIES)) >> 24, 7);
        assert_eq!(express.read(0), VERSION | 6 << 20 | SLOT_IMPLEMENTED);
    }

    #[test]
    fn presence_and_link_follow_the_device_and_survive_reset() {
        let mut express = Express::root_port(Some(3), 0);
        assert!(!express.link_is_active());
        assert_eq!(express.read(dword(LINK_CONTROL)), SLOT_CLOCK);
        express.set_occupied(true);
        express.reset();
        assert!(express.link_is_active());
        assert_eq!(express.read(dword(SLOT_CONTROL)), PRESENCE_DETECT);
        assert_eq!(
            express.read(dword(LINK_CONTROL)),
            SLOT_CLOCK | LINK_ACTIVE | SPEED_AND_WIDTH << 16
        );
    }

    #[test]
    fn a_slot_that_can_be_emptied_asks_by_its_button_and_tells_of_the_link() {
        let mut express = Express::root_port(Some(3), 0);
        express.set_occupied(true);
        assert!(!express.press_attention_button() && !express.is_hot_plug());
        assert!(express.set_hot_plug());
        assert_eq!(express.read(dword(SLOT_CAPABILITIES)), HOT_PLUG_SLOT | 3 << 19);
        assert_eq!(express.read(dword(SLOT_CONTROL)), PRESENCE_DETECT);
        // Nobody listens yet.
        assert!(!express.press_attention_button() && !express.interrupts());
        let listening = BUTTON_ENABLE | HOT_PLUG_INTERRUPT | LINK_ENABLE;
        let _ = express.write(dword(SLOT_CONTROL), DwordWrite::whole(listening | BUTTON_PRESSED));
        assert!(!express.interrupts());
        assert!(express.press_attention_button() && express.interrupts());
        let off = listening | BUTTON_PRESSED | POWER_OFF;
        let effect = express.write(dword(SLOT_CONTROL), DwordWrite::whole(off));
        assert_eq!(effect, ConfigEffect::ROUTING | ConfigEffect::SECONDARY_RESET);
        assert!(!express.slot_is_on() && !express.link_is_active() && express.interrupts());
        let _ = express.write(
            dword(SLOT_CONTROL),
            DwordWrite::whole(listening | POWER_OFF | LINK_CHANGED),
        );
        express.set_occupied(false);
        assert_eq!(
            express.read(dword(SLOT_CONTROL)) & (PRESENCE_DETECT | PRESENCE_CHANGED),
            PRESENCE_CHANGED
        );
        // The guest did not want to hear of that.
        assert!(!express.interrupts());
        express.reset();
        assert_eq!(
            (express.read(dword(SLOT_CONTROL)), express.is_hot_plug()),
            (0, true)
        );
    }

    #[test]
    fn a_port_without_a_slot_has_nothing_to_switch_off() {
        let mut express = Express::root_port(None, 0);
        assert!(!express.set_hot_plug());
        assert_eq!(
            express.write(dword(SLOT_CONTROL), DwordWrite::whole(POWER_OFF)),
            ConfigEffect::empty()
        );
        assert!(express.slot_is_on() && !express.press_attention_button());
    }

    #[test]
    fn a_disabled_link_is_down_and_resets_what_is_behind_it() {
        let mut express = Express::root_port(Some(3), 0);
        express.set_occupied(true);
        let effect = express.write(dword(LINK_CONTROL), DwordWrite::whole(LINK_DISABLE));
        assert_eq!(effect, ConfigEffect::ROUTING | ConfigEffect::SECONDARY_RESET);
        assert!(!express.link_is_active());
        assert_eq!(express.read(dword(LINK_CONTROL)), SLOT_CLOCK | LINK_DISABLE);
    }

    #[test]
    fn a_function_on_a_root_bus_has_no_link() {
        let mut express = Express::endpoint(true);
        for index in [
            LINK_CAPABILITIES,
            LINK_CONTROL,
            LINK_CAPABILITIES_2,
            LINK_CONTROL_2,
        ] {
            let _ = express.write(dword(index), DwordWrite::whole(u32::MAX));
            assert_eq!(express.read(dword(index)), 0, "{index}");
        }
    }

    #[test]
    fn prefixes_are_understood_only_where_that_was_said() {
        let shown = |express: &Express| express.read(dword(DEVICE_CAPABILITIES_2)) >> 20 & 0xf;
        assert_eq!(shown(&Express::endpoint(true)), 0b0001);
        let mut express = Express::endpoint(true).with_end_end_prefix();
        express.reset();
        let _ = express.write(dword(DEVICE_CAPABILITIES_2), DwordWrite::whole(0));
        assert_eq!(shown(&express), 0b0111);
        // Four of them: the field is 0.
        let ports = [
            Express::root_port(None, 0),
            Express::upstream_port(),
            Express::downstream_port(None, 0),
        ];
        assert_eq!(ports.each_ref().map(shown), [0b0011; 3]);
    }

    #[test]
    fn prefixes_are_blocked_where_requests_leave_a_switch_and_nowhere_else() {
        let blocking = |mut express: Express| {
            let effect = express.write(dword(DEVICE_CONTROL_2), DwordWrite::whole(PREFIX_BLOCKING));
            let blocks = express.blocks_prefixes();
            express.reset();
            assert!(!express.blocks_prefixes());
            (effect, blocks)
        };
        assert_eq!(blocking(Express::upstream_port()), (ConfigEffect::DECODING, true));
        assert_eq!(
            blocking(Express::root_port(None, 0)),
            (ConfigEffect::DECODING, false)
        );
        assert_eq!(
            blocking(Express::downstream_port(None, 0)),
            (ConfigEffect::DECODING, false)
        );
        let device = Express::endpoint(false).with_end_end_prefix();
        assert_eq!(blocking(device), (ConfigEffect::empty(), false));
    }

    #[test]
    fn ari_forwarding_exists_on_ports_that_face_a_device_only() {
        let mut port = Express::downstream_port(None, 0);
        let write = DwordWrite::whole(u32::MAX);
        let effect = port.write(dword(DEVICE_CONTROL_2), write);
        assert_eq!(effect & ConfigEffect::ROUTING, ConfigEffect::ROUTING);
        assert!(port.ari_forwarding());
        let mut switch = Express::upstream_port();
        let effect = switch.write(dword(DEVICE_CONTROL_2), write);
        assert_eq!(effect & ConfigEffect::ROUTING, ConfigEffect::empty());
        assert!(!switch.ari_forwarding());
    }

    #[test]
    fn reserved_bits_of_every_register_stay() {
        let mut express = Express::root_port(Some(1), 0);
        let before: Vec<u32> = (0..16).map(|index| express.read(index)).collect();
        (0..16).for_each(|index| {
            let _ = express.write(index, DwordWrite::whole(u32::MAX));
        });
        let changed: Vec<u32> = (0..16)
            .map(|index| express.read(index) ^ before[usize::from(index)])
            .collect();
        let mut writable = vec![0; 16];
        writable[DEVICE_CONTROL] = DEVICE_CONTROL_WRITABLE & !DEVICE_CONTROL_RESET;
        writable[LINK_CONTROL] = LINK_CONTROL_WRITABLE | LINK_DISABLE;
        writable[ROOT_CONTROL] = ROOT_CONTROL_WRITABLE;
        writable[DEVICE_CONTROL_2] = COMPLETION_TIMEOUT_DISABLE | ARI_FORWARDING | PREFIX_BLOCKING;
        writable[LINK_CONTROL_2] = TARGET_SPEED & !4;
        assert_eq!(changed, writable);
    }
}
