//! virtio 1.x devices: what each of them is, and what all of them share.
//!
//! A device says which queues, features and configuration it has ([`VirtioDevice`]) and, once a driver has
//! negotiated, which threads serve its queues. The transport ([`pci`]) does the rest: registers, interrupts,
//! doorbells and the device's life. Source: Virtual I/O Device (VIRTIO) Version 1.2.

pub mod block;
pub mod console;
pub mod net;
pub mod pci;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod worker;

#[cfg(test)]
pub(crate) mod driver;

use std::sync::Arc;

use bitflags::bitflags;
use virtio_bindings::{virtio_config, virtio_ids, virtio_ring};

use crate::platform::host::HostError;
use worker::{ServedQueue, Unit};

/// What kind of device it is: the virtio device ID.
///
/// Virtual I/O Device 1.2, chapter 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Network card.
    Net,
    /// Disk.
    Block,
    /// Terminal.
    Console,
    /// Entropy source.
    Rng,
}

impl Kind {
    /// The virtio device ID.
    #[must_use]
    pub const fn id(self) -> u16 {
        let id = match self {
            Self::Net => virtio_ids::VIRTIO_ID_NET,
            Self::Block => virtio_ids::VIRTIO_ID_BLOCK,
            Self::Console => virtio_ids::VIRTIO_ID_CONSOLE,
            Self::Rng => virtio_ids::VIRTIO_ID_RNG,
        };
        id.to_le_bytes()[0] as u16
    }
}

bitflags! {
    /// Features that every device shares; a device's own have the low 24 bits and 50 on.
    ///
    /// Virtual I/O Device 1.2, chapter 6 (Reserved Feature Bits).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Descriptors may point to tables of descriptors.
        const INDIRECT_DESC = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
        /// Interrupts and kicks are suppressed by index.
        const EVENT_IDX = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
        /// The device follows version 1 of the specification.
        const VERSION_1 = 1 << virtio_config::VIRTIO_F_VERSION_1;
        /// The device reaches memory as the platform lets it, through an IOMMU for instance.
        const ACCESS_PLATFORM = 1 << virtio_config::VIRTIO_F_ACCESS_PLATFORM;
        /// Whatever bit the device type defines.
        const _ = !0;
    }
}

impl Features {
    /// The feature with number `bit`, 0 to 63.
    #[must_use]
    pub const fn bit(bit: u32) -> Self {
        Self::from_bits_retain(1 << bit)
    }
}

/// A device type behind a transport.
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn kind(&self) -> Kind;

    /// The name the operator knows it by.
    fn name(&self) -> &str;

    /// The features of its type that it offers; the transport adds the shared ones.
    fn features(&self) -> Features;

    /// Whether the driver's choice among the offered features makes sense (5.x.3.1, "feature bit
    /// requirements" of each type).
    fn accepts(&self, _chosen: Features) -> bool {
        true
    }

    /// The largest size of each queue: powers of two up to [`queue::LARGEST_QUEUE`]; at most 255 queues.
    fn queue_sizes(&self) -> &[u16];

    /// Fill `data` from byte `offset` of the configuration structure; zeros beyond its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Take a write to byte `offset` of the configuration structure. Most fields are read-only.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: the threads that serve the queues from now on.
    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError>;

    /// The threads of [`Self::activate`] ended; back to the state before it.
    fn reset(&self) {}
}

/// What a driver negotiated.
pub struct Activation {
    /// The features in use.
    pub features: Features,
    /// Each queue, `None` for those the driver did not enable.
    pub queues: Vec<Option<ServedQueue>>,
    /// The way to tell the driver of configuration changes.
    pub interrupts: Arc<dyn Interrupts>,
}

/// How a device reaches its driver.
pub trait Interrupts: Send + Sync {
    /// Buffers of queue number `queue` were used.
    fn queue(&self, queue: u16);

    /// The configuration structure changed.
    fn configuration_changed(&self);

    /// The driver broke the device: it must reset it before it works again (2.1.2, DEVICE_NEEDS_RESET).
    fn needs_reset(&self);
}

/// Answer a read of a configuration structure from its bytes; zeros beyond their end.
fn read_structure(bytes: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let there = bytes.get(from..).unwrap_or(&[]);
    let count = there.len().min(data.len());
    data[..count].copy_from_slice(&there[..count]);
}

#[cfg(test)]
mod tests {
    use super::*;

    // CVE-2021-45464: an offset beyond the structure read the heap.
    #[test]
    fn reads_past_the_end_of_the_configuration_are_zero() {
        for (offset, expected) in [
            (0, [1, 2, 3, 4]),
            (2, [3, 4, 0, 0]),
            (4, [0; 4]),
            (u64::MAX, [0; 4]),
        ] {
            let mut data = [0xff; 4];
            read_structure(&[1, 2, 3, 4], offset, &mut data);
            assert_eq!(data, expected, "{offset:#x}");
        }
    }

    #[test]
    fn kinds_have_the_numbers_of_the_specification() {
        assert_eq!(
            [Kind::Net, Kind::Block, Kind::Console, Kind::Rng].map(Kind::id),
            [1, 2, 3, 4]
        );
    }
}
