//! A unit's PCI function, which a guest finds in every mode: who finds it there learns where its registers are, and it
//! interrupts by MSI.
//!
//! Publication 48882, section 3.2. Conventional, as on boards: no PCI Express capability, no BARs; the address
//! of the registers was enabled before the guest starts, which makes it read-only.

use std::sync::Arc;

use super::amd::features::Features;
use super::amd::registers::MsiMirror;
use super::amd::spec::capability::{BaseLow, Header, ID, LEN, Range};
use crate::pci::ConfigEffect;
use crate::pci::access::DwordWrite;
use crate::pci::capability::{Capability, CapabilityId};
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::Identity;
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

/// The PCI function of a unit, whoever serves that.
pub struct UnitFunction {
    endpoint: Endpoint,
    /// Where the MSI capability is in configuration space, in dwords.
    msi_at: u16,
}

impl UnitFunction {
    /// The function of a unit at `at` that offers `features` and has its registers at `mmio`. What is signalled by
    /// [`Endpoint::signal`] leaves by `own`.
    #[must_use]
    pub fn new(features: &Features, mmio: GpaRange, at: Sbdf, own: MsiPort) -> Self {
        let mut config = ConfigSpace::endpoint(&IDENTITY);
        let offset = config.push_capability(Box::new(Block::new(features, mmio)));
        assert_eq!(offset, CAPABILITY_AT, "the IVRS says where the block is");
        Self {
            // Its requests are its own affair, so Bus Master Enable of this one changes nothing.
            endpoint: Endpoint::new(config, Arc::new(Requester::new(at))).with_msi(1, own),
            msi_at: (CAPABILITY_AT + LEN) / 4,
        }
    }

    /// Its registers.
    #[must_use]
    pub const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// What the MSI capability holds, as far as registers of a unit mirror it.
    #[must_use]
    pub fn msi(&self) -> MsiMirror {
        let [header, low, high, data] = [0, 1, 2, 3].map(|dword| self.msi_dword(dword));
        MsiMirror {
            header,
            address: u64::from(high) << 32 | u64::from(low),
            data,
        }
    }

    /// Whether the guest masked the one vector there is.
    #[must_use]
    pub fn msi_is_masked(&self) -> bool {
        self.msi_dword(4) & 1 != 0
    }

    fn msi_dword(&self, dword: u16) -> u32 {
        self.endpoint.config_read(self.msi_at + dword)
    }

    /// The guest wrote the MSI capability by its mirror. The registers' own copy is as written already.
    pub fn program_msi(&self, msi: MsiMirror) {
        let [low, high] = halves(msi.address);
        // The header last: it enables what the others describe.
        for (dword, value) in [(1, low), (2, high), (3, msi.data), (0, msi.header)] {
            let _interrupts_only = self
                .endpoint
                .config_write(self.msi_at + dword, DwordWrite::whole(value));
        }
    }
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
