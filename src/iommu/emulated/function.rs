//! The unit's PCI function: who finds it there learns where its registers are, and it interrupts by MSI.
//!
//! Publication 48882, section 3.2. Conventional, as on boards: no PCI Express capability, no BARs; the address
//! of the registers was enabled before the guest starts, which makes it read-only.

use std::sync::Arc;

use super::EmulatedUnit;
use crate::iommu::amd::features::Features;
use crate::iommu::amd::registers::MsiMirror;
use crate::iommu::amd::spec::capability::{BaseLow, Header, ID, LEN, Range};
use crate::pci::access::DwordWrite;
use crate::pci::bar::BarSpec;
use crate::pci::capability::{Capability, CapabilityId};
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::Identity;
use crate::pci::{Command, ConfigEffect, Function};
use crate::platform::addr::{GpaRange, Sbdf};
use crate::platform::dma::Requester;
use crate::platform::msi::MsiPort;

/// The IOMMU of EPYC 7002 (Rome), by its IDs.
pub const IDENTITY: Identity = Identity {
    vendor: 0x1022,
    device: 0x1481,
    class: 0x08_0600,
    revision: 0,
    subsystem_vendor: 0x1022,
    subsystem: 0x1481,
};

/// Where the capability block is in configuration space: it is the first capability.
pub const CAPABILITY_AT: u16 = 0x40;

/// Dwords of the MSI capability that the unit's registers mirror: header, address, upper address, data.
const MSI_DWORDS: usize = 4;

/// The configuration space of a unit at `at`, and in which of its dwords the MSI capability begins.
pub(super) fn endpoint(features: &Features, mmio: GpaRange, at: Sbdf, own: MsiPort) -> (Endpoint, u16) {
    let mut config = ConfigSpace::endpoint(&IDENTITY);
    let offset = config.push_capability(Box::new(Block::new(features, mmio)));
    assert_eq!(offset, CAPABILITY_AT, "the IVRS says where the block is");
    // Its requests are its own affair, so Bus Master Enable of this one changes nothing.
    let endpoint = Endpoint::new(config, Arc::new(Requester::new(at))).with_msi(1, own);
    let msi_at = (CAPABILITY_AT + LEN) / 4;
    (endpoint, msi_at)
}

/// Capability 0Fh of a unit.
struct Block([u32; LEN as usize / 4]);

impl Block {
    fn new(features: &Features, mmio: GpaRange) -> Self {
        let [low, high] = halves(mmio.start().0);
        let base = BaseLow::new().with_enable(true).with_base_31_14(low >> 14);
        Self([
            Header::into_bits(features.header),
            base.into_bits(),
            high,
            Range::new().into_bits(),
            features.misc0().into_bits(),
            // The GA log's message number: there is no GA log.
            0,
        ])
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

impl Capability for Block {
    fn id(&self) -> CapabilityId {
        CapabilityId::Standard(ID)
    }

    fn len(&self) -> u16 {
        LEN
    }

    fn read(&self, dword: u16) -> u32 {
        self.0.get(usize::from(dword)).copied().unwrap_or(0)
    }

    fn write(&mut self, _dword: u16, _write: DwordWrite) -> ConfigEffect {
        ConfigEffect::empty()
    }

    fn reset(&mut self) {}
}

impl EmulatedUnit {
    /// Show the registers what the MSI capability holds.
    pub(super) fn mirror_msi(&self) {
        let [header, low, high, data] = self.msi_dwords();
        self.unit.mirror_msi(MsiMirror {
            header,
            address: u64::from(high) << 32 | u64::from(low),
            data,
        });
    }

    fn msi_dwords(&self) -> [u32; MSI_DWORDS] {
        let mut dword = self.msi_at;
        [(); MSI_DWORDS].map(|()| {
            let value = self.endpoint.config_read(dword);
            dword += 1;
            value
        })
    }

    /// The guest wrote the MSI capability by its mirror. The registers' own copy is as written already.
    pub(super) fn program_msi(&self, msi: MsiMirror) {
        let [low, high] = halves(msi.address);
        // The header last: it enables what the others describe.
        for (dword, value) in [(1, low), (2, high), (3, msi.data), (0, msi.header)] {
            let _interrupts_only = self
                .endpoint
                .config_write(self.msi_at + dword, DwordWrite::whole(value));
        }
    }
}

impl Function for EmulatedUnit {
    fn name(&self) -> &str {
        &self.name
    }

    fn config_read(&self, dword: u16) -> u32 {
        self.endpoint.config_read(dword)
    }

    fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
        let effect = self.endpoint.config_write(dword, write);
        if effect.contains(ConfigEffect::INTERRUPTS) {
            self.mirror_msi();
        }
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

    /// The configuration registers alone: while devices run, the unit must not stop confining them.
    fn reset(&self) {
        self.endpoint.reset();
        self.mirror_msi();
    }
}
