//! Message-signalled interrupts: the message, where it is sent, and routes that bypass us.
//!
//! A device owns an [`MsiPort`] for its function. For a rare interrupt it calls [`MsiPort::signal`]; for a
//! busy vector it asks for an [`MsiRoute`], whose eventfd the kernel turns into an interrupt without us.
//! Either way the message passes whatever stands between the function and the processors: nothing, or an
//! IOMMU's interrupt remapping, which is why the port knows the requester.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::dma::Requester;
use super::host::HostError;

/// The address and data of an MSI write.
///
/// PCI Express Base Specification 7.7.1 and 7.7.2; on x86 the address lies in 0xfee00000-0xfeefffff.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct MsiMessage {
    /// Where the write goes, in bytes.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

impl MsiMessage {
    /// A message to a processor by its 32-bit APIC ID, or to several by a logical destination, as an IOMMU
    /// sends it once it has remapped one. No device can: bits 31:8 of the destination are in address bits
    /// 63:40, where [`MsiSink`]s look for them.
    #[must_use]
    pub const fn remapped(destination: u32, logical: bool, data: u32) -> Self {
        let high = (destination as u64 >> 8) << 40;
        let low = (destination as u64 & 0xff) << 12;
        Self {
            address: high | 0xfee0_0000 | low | (logical as u64) << 2,
            data,
        }
    }
}

/// What carries messages to the processors.
pub trait MsiSink: Send + Sync {
    /// Deliver `message` from `requester` now. A message that names no processor vanishes, as on hardware.
    fn signal(&self, requester: &Requester, message: MsiMessage);

    /// A kernel route for messages from `requester`, off at first.
    fn route(&self, requester: &Arc<Requester>) -> Result<Box<dyn MsiRoute>, HostError>;
}

/// An eventfd that becomes a message without passing through user space.
///
/// A route is either off or matches the last message set. Signals while it is off are kept by the eventfd
/// and delivered when it is set again only if the implementation says so; devices therefore latch pending
/// bits of masked vectors themselves.
pub trait MsiRoute: Send + Sync {
    /// The descriptor to signal: by us, by the kernel's vhost or by VFIO.
    fn eventfd(&self) -> &EventFd;

    /// Send `message` from now on, or nothing (`None`). On failure the previous message stays in force.
    fn set(&self, message: Option<MsiMessage>) -> Result<(), HostError>;

    /// Whether a signal of the eventfd arrives as the message set last would, were it sent now by
    /// [`MsiPort::signal`]. Where it does not, because something on the way blocks the message or the function
    /// has another number by now, it is to be sent so: then whoever blocks it can say so.
    fn carries(&self) -> bool {
        true
    }
}

/// A function's way out for messages.
#[derive(Clone)]
pub struct MsiPort {
    requester: Arc<Requester>,
    sink: Arc<dyn MsiSink>,
}

impl MsiPort {
    /// Messages of `requester` go to `sink`.
    #[must_use]
    pub fn new(requester: Arc<Requester>, sink: Arc<dyn MsiSink>) -> Self {
        Self { requester, sink }
    }

    /// As whom messages are sent.
    #[must_use]
    pub fn requester(&self) -> &Arc<Requester> {
        &self.requester
    }

    /// Deliver `message` now, if the function may issue requests at all.
    ///
    /// An MSI is a memory write, so Bus Master Enable gates it (PCI Express Base Specification 7.5.1.1.3).
    pub fn signal(&self, message: MsiMessage) {
        if self.requester.bus_master() {
            self.sink.signal(&self.requester, message);
        }
    }

    /// A kernel route for one vector, off at first.
    pub fn route(&self) -> Result<Box<dyn MsiRoute>, HostError> {
        self.sink.route(&self.requester)
    }
}
