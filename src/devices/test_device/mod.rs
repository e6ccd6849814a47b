//! A PCI function for testing: it interrupts, moves data and holds memory as it is told.
//!
//! Its registers are those of the test function that Linux has for PCI endpoints, so that the stock driver
//! (`pci_endpoint_test`) and its selftest check BARs, interrupts and DMA through whatever stands between the
//! function and memory. `docs/test-device.md` has the registers and what each test shows.
//!
//! | BAR | what |
//! | --- | --- |
//! | 0, 64 KiB | registers, and from 0x1000 on the MSI-X table and its pending bits |
//! | 1, 256 bytes | memory, 32-bit |
//! | 2, 16 KiB | memory, 64-bit prefetchable |
//! | 4, 4 KiB | memory, 32-bit prefetchable |
//! | 5, 1 KiB | memory, 32-bit |

mod engine;
mod memory;
mod registers;
mod services;
mod spec;
mod transfer;

pub use memory::MEMORY_BARS;
pub use registers::{DOORBELL, DOORBELL_DATA};
pub use spec::{Caps, Command, Flags, IrqType, Reg, Rights, Space, Status, TranslationInfo, UnknownCommand};

use std::sync::Arc;

use crate::iommu::agent::TranslationAgent;
use crate::iommu::amd::processor::Follower;
use crate::pci::access::{DwordWrite, read_dwords, write_dwords};
use crate::pci::bar::BarSpec;
use crate::pci::capability::{
    Express, MsixLayout, PageRequests, PowerManagement, ProcessAddressSpace, TranslationServices,
};
use crate::pci::config_space::ConfigSpace;
use crate::pci::endpoint::Endpoint;
use crate::pci::tree::{BarKind, Identity, Pin};
use crate::pci::{Command as PciCommand, ConfigEffect, Function};
use crate::platform::dma::{Dma, Requester};
use crate::platform::host::HostError;
use crate::platform::irq::IrqLine;
use crate::platform::msi::MsiPort;
use engine::Engine;
use services::Services;

/// The identification registers: a function that Linux's driver takes for one of its own, with the registers in
/// BAR 0 and no alignment (its table's entry for a Renesas endpoint controller), and nobody else does.
pub const IDENTITY: Identity = Identity {
    vendor: 0x1912,
    device: 0x002d,
    // Unassigned class.
    class: 0xff_0000,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The BAR with the registers.
pub const REGISTERS: BarSpec = BarSpec {
    index: 0,
    kind: BarKind::Mem32 { prefetchable: false },
    size: 0x1_0000,
};

/// MSI vectors: as many as MSI has.
const MSI_VECTORS: u8 = 32;
/// Most MSI-X vectors: as many as MSI-X has.
pub const MOST_MSIX_VECTORS: u16 = 2048;
/// Where the MSI-X table is in BAR 0.
const MSIX_TABLE: u32 = 0x1000;

/// Every BAR, in ascending order of register.
#[must_use]
pub fn bars() -> Vec<BarSpec> {
    [REGISTERS].into_iter().chain(MEMORY_BARS).collect()
}

/// What the machine gives a test device.
pub struct TestDeviceParts {
    /// What messages call it.
    pub name: String,
    /// MSI-X vectors, 1 to [`MOST_MSIX_VECTORS`].
    pub msix_vectors: u16,
    /// The way to guest memory. Its requester is the port's.
    pub dma: Dma,
    /// The way out for messages, and whose they are.
    pub msi: MsiPort,
    /// The wire, if there is one.
    pub intx: Option<(Pin, IrqLine)>,
    /// On a root complex's first bus, not behind a port.
    pub on_root_bus: bool,
    /// The IOMMU in front of it, where that has translation services for devices: then the device has ATS, PRI
    /// and PASID, and its [`TestDevice::follower`] belongs to that IOMMU.
    pub agent: Option<Arc<dyn TranslationAgent>>,
}

/// The test device as a PCI function.
pub struct TestDevice {
    name: String,
    engine: Engine,
    endpoint: Arc<Endpoint>,
    services: Arc<Services>,
}

impl TestDevice {
    /// A function made of `parts`.
    ///
    /// # Panics
    ///
    /// When the number of MSI-X vectors is out of range: the plan is wrong then.
    pub fn new(parts: TestDeviceParts) -> Result<Arc<Self>, HostError> {
        let mut config = bars()
            .into_iter()
            .fold(ConfigSpace::endpoint(&IDENTITY), ConfigSpace::bar)
            .capability(PowerManagement::new());
        let express = Express::endpoint(parts.on_root_bus);
        if parts.agent.is_none() {
            config = config.capability(express);
        } else {
            config = config
                .capability(express.with_end_end_prefix())
                .capability(TranslationServices::new())
                .capability(PageRequests::new(services::PAGE_REQUESTS))
                .capability(ProcessAddressSpace::new(services::PASID_WIDTH));
        }
        let layout = MsixLayout::new(REGISTERS.index, MSIX_TABLE, parts.msix_vectors);
        let mut endpoint = Endpoint::new(config, parts.msi.requester().clone())
            .with_msi(MSI_VECTORS, parts.msi.clone())
            .with_msix(layout, parts.msi);
        let mut caps = Caps::all();
        caps.set(Caps::INTX, parts.intx.is_some());
        if parts.agent.is_none() {
            caps -= Caps::TRANSLATIONS | Caps::PAGE_REQUESTS | Caps::PASID;
        }
        if let Some((pin, line)) = parts.intx {
            endpoint = endpoint.with_intx(pin, line);
        }
        let endpoint = Arc::new(endpoint);
        let services = Arc::new(Services::new(endpoint.clone(), parts.agent));
        let engine = Engine::start(&parts.name, caps, endpoint.clone(), parts.dma, services.clone())?;
        Ok(Arc::new(Self {
            name: parts.name,
            engine,
            endpoint,
            services,
        }))
    }

    /// Return once no command runs any more.
    pub fn settle(&self) {
        self.engine.settle();
    }

    /// What hears of the IOMMU's invalidations and of its responses to page requests.
    #[must_use]
    pub fn follower(&self) -> Arc<dyn Follower> {
        self.services.clone()
    }

    fn read_register(&self, dword: u64) -> u32 {
        let Some(register) = Reg::at(dword) else { return 0 };
        match register {
            Reg::Response => return self.services.response(),
            Reg::Kept => return self.services.kept(),
            Reg::Invalidations => return self.services.invalidations(),
            _ => {}
        }
        let state = self.engine.state();
        if register == Reg::Status {
            // Whoever looks has been interrupted.
            self.endpoint.set_intx(false);
        }
        state.registers.read(register)
    }

    fn write_register(&self, dword: u64, write: DwordWrite) {
        let mut state = self.engine.state();
        let job = match Reg::at(dword) {
            Some(register) => state.registers.write(register, write),
            None if dword == DOORBELL / 4 => state.registers.ring(write),
            None => None,
        };
        if let Some(job) = job {
            self.engine.submit(state, job);
        }
    }
}

impl Function for TestDevice {
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

    fn command(&self) -> PciCommand {
        self.endpoint.command()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.endpoint.bar_read(bar, offset, data) {
            return;
        }
        if bar == REGISTERS.index {
            read_dwords(offset, data, |dword| self.read_register(dword));
        } else {
            self.engine.memories().read(bar, offset, data);
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if self.endpoint.bar_write(bar, offset, data) {
            return;
        }
        if bar == REGISTERS.index {
            write_dwords(offset, data, |dword, write| self.write_register(dword, write));
        } else {
            self.engine.memories().write(bar, offset, data);
        }
    }

    fn pause(&self) {
        self.engine.pause();
    }

    fn resume(&self) {
        self.engine.resume();
    }

    fn reset(&self) {
        self.engine.reset();
    }
}

#[cfg(test)]
mod tests;
