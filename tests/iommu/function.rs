//! A test device, and a driver in miniature of it.

use std::sync::Arc;

use ravelin::devices::test_device::{Flags, Reg, Status, TestDevice, TestDeviceParts};
use ravelin::iommu::agent::TranslationAgent;
use ravelin::pci::Function as _;
use ravelin::pci::access::DwordWrite;
use ravelin::platform::dma::{Dma, Requester};
use ravelin::platform::host::HostError;
use ravelin::platform::msi::{MsiMessage, MsiPort, MsiRoute, MsiSink};

pub(crate) const READ: u32 = 0x8;
pub(crate) const WRITE: u32 = 0x10;
pub(crate) const COPY: u32 = 0x20;
pub(crate) const TRANSLATE: u32 = 0x0100_0000;
pub(crate) const REQUEST_PAGE: u32 = 0x0200_0000;

/// Extended capabilities that the guest switches on.
pub(crate) const ATS: u16 = 0x0f;
pub(crate) const PRI: u16 = 0x13;
pub(crate) const PASID: u16 = 0x1b;

/// Nobody listens.
struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _requester: &Requester, _message: MsiMessage) {}
    fn route(&self, _requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError> {
        Err(HostError::new(
            "route an interrupt to nobody",
            std::io::Error::other("nobody"),
        ))
    }
}

/// The device.
pub(crate) struct Function {
    pub(crate) function: Arc<TestDevice>,
}

impl Function {
    /// A device that issues requests as `requester`, by the way of `dma`, and asks `agent` for translations and pages.
    pub(crate) fn new(requester: Arc<Requester>, dma: Dma, agent: Option<Arc<dyn TranslationAgent>>) -> Self {
        let function = TestDevice::new(TestDeviceParts {
            name: "test0".to_owned(),
            msix_vectors: 1,
            msi: MsiPort::new(requester, Arc::new(Nowhere)),
            dma,
            intx: None,
            on_root_bus: false,
            agent,
        });
        Self {
            function: function.expect("a thread"),
        }
    }

    pub(crate) fn get(&self, register: Reg) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(0, register.offset(), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set(&self, register: Reg, value: u32) {
        self.function
            .bar_write(0, register.offset(), &value.to_le_bytes());
    }

    /// The dword behind the header of the extended capability `id`.
    pub(crate) fn capability(&self, id: u16) -> u16 {
        let mut chain = std::iter::successors(Some(0x40_u16), |at| {
            let next = self.function.config_read(*at) >> 22;
            u16::try_from(next).ok().filter(|next| *next > 0)
        });
        let found = chain.find(|at| self.function.config_read(*at) & 0xffff == u32::from(id));
        found.expect("a capability") + 1
    }

    pub(crate) fn configure(&self, dword: u16, value: u32) {
        let _effect = self.function.config_write(dword, DwordWrite::whole(value));
    }

    /// ATS, PRI with as many requests as it can have, and PASID with its modes, on.
    pub(crate) fn enable(&self) {
        self.configure(self.capability(ATS), 1 << 31);
        self.configure(self.capability(PASID), 7 << 16);
        self.configure(self.capability(PRI) + 2, u32::MAX);
        self.configure(self.capability(PRI), 1);
    }

    /// Have `command` carried out with requests as `flags` say; how it ended, but for the interrupt.
    pub(crate) fn run(&self, command: u32, flags: Flags, from: u64, to: u64, len: u32) -> Status {
        self.function
            .bar_write(0, Reg::SourceLow.offset(), &from.to_le_bytes());
        self.function
            .bar_write(0, Reg::DestinationLow.offset(), &to.to_le_bytes());
        self.set(Reg::Size, len);
        self.set(Reg::Flags, flags.bits());
        self.set(Reg::IrqType, u32::MAX);
        self.set(Reg::Command, command);
        self.function.settle();
        Status::from_bits_retain(self.get(Reg::Status)) - (Status::IRQ_RAISED | Status::UNSIGNALLED)
    }

    pub(crate) fn translate(&self, at: u64, flags: Flags) -> (Status, u32, u32) {
        let status = self.run(TRANSLATE, flags, at, 0, 0);
        (
            status,
            self.get(Reg::TranslationLow),
            self.get(Reg::TranslationInfo),
        )
    }
}
