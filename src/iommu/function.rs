//! A unit's PCI function, which a guest finds in every mode: who finds it there learns where its registers are, and it
//! interrupts by MSI.
//!
//! Publication 48882, section 3.2. Conventional, as on boards: no PCI Express capability, no BARs; the address
//! of the registers was enabled before the guest starts, which makes it read-only.

use std::sync::Arc;

use serde::Serialize;

use super::amd::features::Features;
use super::amd::registers::MsiMirror;
use super::amd::spec::capability::{BaseLow, GUESTS_LEN, GuestsLow, Header, ID, LEN, Range};
use super::amd::spec::viommu::{VF_CONTROL_LEN, VF_LEN};
use crate::pci::ConfigEffect;
use crate::pci::access::DwordWrite;
use crate::pci::capability::{Capability, CapabilityId, VendorSpecific};
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::Identity;
use crate::platform::addr::{Gpa, GpaRange, Sbdf};
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
        Self::serving(features, mmio, None, at, own)
    }

    /// The same of a unit that has registers of guests at `guests`, which it serves.
    #[must_use]
    pub fn serving(
        features: &Features,
        mmio: GpaRange,
        guests: Option<GuestRegisters>,
        at: Sbdf,
        own: MsiPort,
    ) -> Self {
        let mut config = ConfigSpace::endpoint(&IDENTITY);
        let offset = config.push_capability(Box::new(Block::new(features, mmio)));
        assert_eq!(offset, CAPABILITY_AT, "the IVRS says where the block is");
        let mut msi_at = CAPABILITY_AT + LEN;
        if let Some(guests) = guests {
            config.push_capability(Box::new(guests.capability()));
            msi_at += GUESTS_LEN;
        }
        Self {
            // Its requests are its own affair, so Bus Master Enable of this one changes nothing.
            endpoint: Endpoint::new(config, Arc::new(Requester::new(at))).with_msi(1, own),
            msi_at: msi_at / 4,
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

/// Where a unit that serves guests has their registers. Guests have numbers of 16 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct GuestRegisters {
    /// A page for each guest (VF MMIO): what the hypervisor gives the guest as page 3 of its unit.
    pub pages: GpaRange,
    /// 64 bytes for each, by which the hypervisor controls it (VF control MMIO).
    pub control: GpaRange,
}

impl GuestRegisters {
    /// Bytes that both take in a row, which their address is a multiple of.
    pub const LEN: u64 = 2 * Self::PAGES_LEN;
    /// Bytes of the pages: 256 MiB.
    const PAGES_LEN: u64 = VF_LEN << 16;
    /// Bytes of the rest: 4 MiB.
    const CONTROL_LEN: u64 = VF_CONTROL_LEN << 16;

    /// The pages at `start`, a multiple of their length, and the rest behind them; `None` past the end of addresses.
    #[must_use]
    pub fn at(start: Gpa) -> Option<Self> {
        let control = start.0.checked_add(Self::PAGES_LEN)?;
        Some(Self {
            pages: GpaRange::new(start, Self::PAGES_LEN)?,
            control: GpaRange::new(Gpa(control), Self::CONTROL_LEN)?,
        })
    }

    /// The capability by which drivers find both.
    fn capability(self) -> VendorSpecific {
        let mut body = [0; GUESTS_LEN as usize - 3];
        for (at, range) in [(5, self.pages), (13, self.control)] {
            let [low, high] = halves(range.start().0);
            let low = GuestsLow::new().with_enable(true).with_base_31_12(low >> 12);
            body[at..at + 4].copy_from_slice(&low.into_bits().to_le_bytes());
            body[at + 4..at + 8].copy_from_slice(&high.to_le_bytes());
        }
        VendorSpecific::new(&body)
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
