//! Functions of the board that have no registers of their own: host bridges and the ISA bridge.
//!
//! Nothing behind them depends on them; each exists for its place and its class. A host bridge at device 0 of
//! a root bus tells Linux at its first look that configuration space works (it reads all of bus 0 by ports
//! until it meets one), and makes device 0 a place for other functions of the root complex. The ISA bridge is
//! at 00:14.0 because the IVRS of a machine with IOMMUs names that as the requester of the IOAPIC's messages,
//! which Linux's AMD IOMMU driver believes only if it finds an ISA bridge or an SMBus controller there
//! (checked before interrupt remapping is turned on).

use std::sync::Arc;

use super::Device;
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::Identity;
use crate::pci::{Command, ConfigEffect, Function};
use crate::platform::dma::Requester;

/// A bridge of the board.
pub struct BoardBridge {
    name: String,
    endpoint: Endpoint,
}

impl BoardBridge {
    /// A bridge called `name` that identifies itself as `identity`. It never issues requests as `requester`.
    #[must_use]
    pub fn new(name: &str, identity: &Identity, requester: Arc<Requester>) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            endpoint: Endpoint::new(ConfigSpace::endpoint(identity), requester),
        })
    }
}

impl Function for BoardBridge {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, dword: u16) -> u32 {
        self.endpoint.config_read(dword)
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        self.endpoint.config_write(dword, write)
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
    }
}

impl Device for BoardBridge {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.endpoint.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge() -> Arc<BoardBridge> {
        BoardBridge::new("isa-bridge", &Identity::ISA_BRIDGE, Arc::default())
    }

    #[test]
    fn it_is_what_its_identity_says_of_one_function_without_bars_and_capabilities() {
        let bridge = bridge();
        assert_eq!(bridge.config_read(0), 0x790e_1022);
        assert_eq!(bridge.config_read(2), 0x0601_0051);
        assert_eq!(bridge.config_read(3), 0);
        assert_eq!(bridge.config_read(1) >> 16 & 1 << 4, 0);
        assert!(bridge.bars().is_empty());
    }

    #[test]
    fn nothing_written_gives_it_bars_or_an_interrupt_pin() {
        let bridge = bridge();
        for dword in 0..crate::pci::CONFIG_DWORDS {
            let _nothing_to_move = bridge.config_write(dword, DwordWrite::whole(u32::MAX));
        }
        assert!((4..=10).all(|dword| bridge.config_read(dword) == 0));
        assert_eq!(bridge.config_read(15) & 0xff00, 0);
    }

    #[test]
    fn a_reset_clears_what_was_written() {
        let bridge = bridge();
        let _nothing_to_move = bridge.config_write(1, DwordWrite::whole(0x7));
        Device::reset(&*bridge);
        assert_eq!(bridge.config_read(1), 0);
    }
}
