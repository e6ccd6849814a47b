//! The configuration space of an emulated function: a type 0 or type 1 header and its capabilities.
//!
//! PCI Express Base Specification 7.5.1. Plain state: whoever embeds it locks it, and performs the effects
//! it returns after unlocking.

use super::access::{DwordWrite, Register};
use super::bar::{BarSpec, Bars};
use super::bridge::BridgeRegisters;
use super::capability::{Capability, CapabilityList, PowerManagement};
use super::function::{Command, ConfigEffect};
use super::tree::{Identity, Pin};

const STATUS_CAPABILITIES: u32 = 1 << 20;
/// Parity, aborts, system error: of nothing that happens here, but a guest may clear them.
const STATUS_CLEARS: u32 = 0xf900 << 16;
const TYPE_1: u32 = 1 << 16;
/// Dwords of the header; capabilities follow.
const HEADER_DWORDS: u16 = 16;

/// The registers of one function.
pub struct ConfigSpace {
    identity: Identity,
    command: Register,
    cache_line_size: Register,
    interrupt: Register,
    bars: Bars,
    bridge: Option<BridgeRegisters>,
    capabilities: CapabilityList,
}

impl ConfigSpace {
    /// A type 0 header without BARs, interrupt pin and capabilities.
    #[must_use]
    pub fn endpoint(identity: &Identity) -> Self {
        Self {
            identity: *identity,
            command: Register::writable(0, command_bits(Command::empty())).clears(STATUS_CLEARS),
            cache_line_size: Register::writable(0, 0xff),
            interrupt: Register::writable(0, 0xff),
            bars: Bars::default(),
            bridge: None,
            capabilities: CapabilityList::default(),
        }
    }

    /// A type 1 header without interrupt pin and capabilities. It has no BARs.
    #[must_use]
    pub fn bridge(identity: &Identity) -> Self {
        let decodes = Command::IO | Command::MEMORY;
        Self {
            command: Register::writable(0, command_bits(decodes)).clears(STATUS_CLEARS),
            cache_line_size: Register::writable(TYPE_1, 0xff),
            bridge: Some(BridgeRegisters::new()),
            ..Self::endpoint(identity)
        }
    }

    /// Add a BAR.
    ///
    /// # Panics
    ///
    /// As [`Bars::add`]; and in a bridge.
    #[must_use]
    pub fn bar(mut self, spec: BarSpec) -> Self {
        assert!(self.bridge.is_none(), "{spec:?}: ports have no BARs");
        self.bars.add(spec);
        let io = self
            .bars
            .specs()
            .iter()
            .any(|spec| spec.address_space() == Command::IO);
        let memory = self
            .bars
            .specs()
            .iter()
            .any(|spec| spec.address_space() == Command::MEMORY);
        let mut decodes = Command::empty();
        decodes.set(Command::IO, io);
        decodes.set(Command::MEMORY, memory);
        self.command = Register::writable(0, command_bits(decodes)).clears(STATUS_CLEARS);
        self
    }

    /// Add a capability at the end of its list.
    ///
    /// # Panics
    ///
    /// As [`CapabilityList::push`].
    #[must_use]
    pub fn capability(mut self, capability: impl Capability) -> Self {
        self.push_capability(Box::new(capability));
        self
    }

    /// Add a capability at the end of its list and return its offset in bytes.
    ///
    /// # Panics
    ///
    /// As [`CapabilityList::push`].
    pub fn push_capability(&mut self, capability: Box<dyn Capability>) -> u16 {
        self.capabilities.push(capability)
    }

    /// Say which INTx pin the function uses.
    #[must_use]
    pub fn interrupt_pin(mut self, pin: Pin) -> Self {
        self.interrupt = Register::writable((pin as u32) << 8, 0xff);
        self
    }

    /// What the function decodes.
    #[must_use]
    pub fn bars(&self) -> &[BarSpec] {
        self.bars.specs()
    }

    /// Its capabilities.
    #[must_use]
    pub const fn capabilities(&self) -> &CapabilityList {
        &self.capabilities
    }

    /// Its capabilities, to change what the guest sees of them.
    pub const fn capabilities_mut(&mut self) -> &mut CapabilityList {
        &mut self.capabilities
    }

    /// What a type 1 header adds; `None` in a type 0 header.
    #[must_use]
    pub const fn bridge_registers(&self) -> Option<&BridgeRegisters> {
        self.bridge.as_ref()
    }

    /// The same, to change what the bridge has.
    pub const fn bridge_registers_mut(&mut self) -> Option<&mut BridgeRegisters> {
        self.bridge.as_mut()
    }

    /// What the function answers and may issue: the Command register, less what D3hot takes away.
    #[must_use]
    pub fn command(&self) -> Command {
        let command = Command::of_dword(self.command.get());
        let asleep = self
            .capabilities
            .get::<PowerManagement>()
            .is_some_and(PowerManagement::is_asleep);
        if asleep {
            command - (Command::IO | Command::MEMORY | Command::BUS_MASTER)
        } else {
            command
        }
    }

    /// Read `dword`; registers that do not exist are zero.
    #[must_use]
    pub fn read(&self, dword: u16) -> u32 {
        let pair = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        let identity = &self.identity;
        match (dword, &self.bridge) {
            (0, _) => pair(identity.vendor, identity.device),
            (1, _) => {
                let linked = if self.capabilities.first() == 0 {
                    0
                } else {
                    STATUS_CAPABILITIES
                };
                self.command.get() | linked
            }
            (2, _) => u32::from(identity.revision) | identity.class << 8,
            (3, _) => self.cache_line_size.get(),
            (13, _) => u32::from(self.capabilities.first()),
            (15, None) => self.interrupt.get(),
            (15, Some(bridge)) => self.interrupt.get() | bridge.read(15),
            (4..=9, None) => self.bars.read(bar_index(dword)),
            (11, None) => pair(identity.subsystem_vendor, identity.subsystem),
            (4..=14, Some(bridge)) => bridge.read(dword),
            (0..HEADER_DWORDS, _) => 0,
            _ => self.capabilities.read(dword),
        }
    }

    /// Write `dword`; registers that do not exist ignore it.
    pub fn write(&mut self, dword: u16, write: DwordWrite) -> ConfigEffect {
        match (dword, &mut self.bridge) {
            (1, _) => self.write_command(write),
            (3, _) => {
                self.cache_line_size.write(write);
                ConfigEffect::empty()
            }
            (15, bridge) => {
                self.interrupt.write(write);
                bridge
                    .as_mut()
                    .map_or(ConfigEffect::empty(), |bridge| bridge.write(15, write))
            }
            (4..=9, None) => {
                let changed = self.bars.write(bar_index(dword), write);
                self.if_decoding(changed)
            }
            (4..=14, Some(bridge)) => {
                let effect = bridge.write(dword, write);
                let moved = self.if_decoding(effect.contains(ConfigEffect::DECODING));
                (effect - ConfigEffect::DECODING) | moved
            }
            (0..HEADER_DWORDS, _) => ConfigEffect::empty(),
            _ => self.capabilities.write(dword, write),
        }
    }

    /// Every register as after power-on.
    pub fn reset(&mut self) {
        self.command.reset();
        self.cache_line_size.reset();
        self.interrupt.reset();
        self.bars.reset();
        if let Some(bridge) = &mut self.bridge {
            bridge.reset();
        }
        self.capabilities.reset();
    }

    fn write_command(&mut self, write: DwordWrite) -> ConfigEffect {
        let old = Command::of_dword(self.command.get());
        self.command.write(write);
        let changed = old ^ Command::of_dword(self.command.get());
        let mut effect = ConfigEffect::empty();
        let decoding = Command::IO | Command::MEMORY | Command::BUS_MASTER;
        effect.set(ConfigEffect::DECODING, changed.intersects(decoding));
        effect.set(ConfigEffect::INTERRUPTS, changed.contains(Command::INTX_DISABLE));
        effect
    }

    /// An address register matters only while the function decodes: sizing a BAR moves nothing.
    fn if_decoding(&self, changed: bool) -> ConfigEffect {
        if changed && self.command().intersects(Command::IO | Command::MEMORY) {
            ConfigEffect::DECODING
        } else {
            ConfigEffect::empty()
        }
    }
}

/// The writable bits of the Command register for a function that can decode `decodes`.
const fn command_bits(decodes: Command) -> u32 {
    let always = Command::BUS_MASTER
        .union(Command::PARITY_ERROR_RESPONSE)
        .union(Command::SERR)
        .union(Command::INTX_DISABLE);
    always.union(decodes).bits() as u32
}

/// Which BAR register dword 4 to 9 is.
fn bar_index(dword: u16) -> u8 {
    u8::try_from(dword - 4).expect("only dwords 4 to 9 are BARs")
}

#[cfg(test)]
mod tests;
