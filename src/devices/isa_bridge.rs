//! The ISA bridge at 00:14.0: a function without registers of its own.
//!
//! The board's legacy devices decode their ports whether or not this bridge is there. It exists for its
//! address: the IVRS of a machine with IOMMUs names 00:14.0 as the requester of the IOAPIC's messages, and
//! Linux believes that only if it finds an ISA bridge or an SMBus controller there (checked in its AMD IOMMU
//! driver before interrupt remapping is turned on).

use std::sync::Arc;

use super::Device;
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::Identity;
use crate::pci::{Command, ConfigEffect, Function};
use crate::platform::dma::Requester;

/// Class, sub-class and programming interface of an ISA bridge.
pub const CLASS: u32 = 0x06_01_00;

/// The bridge.
pub struct IsaBridge {
    endpoint: Endpoint,
}

impl IsaBridge {
    /// A bridge that identifies itself as `identity`. It never issues requests as `requester`.
    #[must_use]
    pub fn new(identity: &Identity, requester: Arc<Requester>) -> Arc<Self> {
        Arc::new(Self {
            endpoint: Endpoint::new(ConfigSpace::endpoint(identity), requester),
        })
    }
}

impl Function for IsaBridge {
    fn name(&self) -> &'static str {
        "isa-bridge"
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

impl Device for IsaBridge {
    fn name(&self) -> &'static str {
        "isa-bridge"
    }

    fn reset(&self) {
        self.endpoint.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge() -> Arc<IsaBridge> {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x1234,
            class: CLASS,
            revision: 1,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        IsaBridge::new(&identity, Arc::default())
    }

    #[test]
    fn it_is_an_isa_bridge_of_one_function_without_bars_and_capabilities() {
        let bridge = bridge();
        assert_eq!(bridge.config_read(0), 0x1234_1b36);
        assert_eq!(bridge.config_read(2), 0x0601_0001);
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
