//! A network card: a tap interface of the host as a virtio network device.
//!
//! | offered | when |
//! | --- | --- |
//! | `MAC`, `STATUS`, `MRG_RXBUF`, `CTRL_VQ` | always |
//! | `MTU` | one is configured |
//! | `MQ` | more than one queue pair |
//! | `CSUM`, `HOST_TSO4`, `HOST_TSO6`, `HOST_ECN`, `HOST_UFO` | offloads are on, with a tap or without |
//! | `HOST_USO`, `GUEST_*`, `CTRL_GUEST_OFFLOADS` | offloads are on and the host's tun driver has them |
//!
//! Virtual I/O Device 1.2, 5.1 (Network Device). Each queue pair has a thread; frames move between the tap and
//! guest memory in one system call.

mod control;
mod pair;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_net;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::worker::{ServedQueue, Unit};
use super::{Activation, Features, Kind, VirtioDevice, read_structure};
use crate::platform::host::HostError;
use crate::platform::tap::{Offloads, Tap};
use control::Control;
pub use pair::{FrameDescriptor, Pair};

const MAC: Features = Features::bit(virtio_net::VIRTIO_NET_F_MAC);
const STATUS: Features = Features::bit(virtio_net::VIRTIO_NET_F_STATUS);
const MERGEABLE: Features = Features::bit(virtio_net::VIRTIO_NET_F_MRG_RXBUF);
const CONTROL: Features = Features::bit(virtio_net::VIRTIO_NET_F_CTRL_VQ);
const CONTROL_OFFLOADS: Features = Features::bit(virtio_net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
const MTU: Features = Features::bit(virtio_net::VIRTIO_NET_F_MTU);
const MULTI_QUEUE: Features = Features::bit(virtio_net::VIRTIO_NET_F_MQ);
const CSUM: Features = Features::bit(virtio_net::VIRTIO_NET_F_CSUM);
const GUEST_CSUM: Features = Features::bit(virtio_net::VIRTIO_NET_F_GUEST_CSUM);
const HOST_USO: Features = Features::bit(virtio_net::VIRTIO_NET_F_HOST_USO);

/// Segmentation of what the driver sends: each needs [`CSUM`].
const HOST_SEGMENTS: Features = Features::bit(virtio_net::VIRTIO_NET_F_HOST_TSO4)
    .union(Features::bit(virtio_net::VIRTIO_NET_F_HOST_TSO6))
    .union(Features::bit(virtio_net::VIRTIO_NET_F_HOST_ECN))
    .union(Features::bit(virtio_net::VIRTIO_NET_F_HOST_UFO));

/// What the driver takes over from the host, feature by feature: the tun driver's word for it.
const GUEST_OFFLOADS: [(Features, Offloads); 7] = [
    (GUEST_CSUM, Offloads::CSUM),
    (Features::bit(virtio_net::VIRTIO_NET_F_GUEST_TSO4), Offloads::TSO4),
    (Features::bit(virtio_net::VIRTIO_NET_F_GUEST_TSO6), Offloads::TSO6),
    (
        Features::bit(virtio_net::VIRTIO_NET_F_GUEST_ECN),
        Offloads::TSO_ECN,
    ),
    (Features::bit(virtio_net::VIRTIO_NET_F_GUEST_UFO), Offloads::UFO),
    (Features::bit(virtio_net::VIRTIO_NET_F_GUEST_USO4), Offloads::USO4),
    (Features::bit(virtio_net::VIRTIO_NET_F_GUEST_USO6), Offloads::USO6),
];

/// What the tun driver is told when the driver takes over `features`.
///
/// A driver may choose what the tun driver has no word for; the host then does that work itself.
fn offloads(features: Features) -> Offloads {
    let mut chosen = GUEST_OFFLOADS
        .into_iter()
        .filter(|(feature, _)| features.contains(*feature))
        .fold(Offloads::empty(), |all, (_, offload)| all | offload);
    if !chosen.contains(Offloads::CSUM) {
        return Offloads::empty();
    }
    if !chosen.intersects(Offloads::TSO4 | Offloads::TSO6) {
        chosen.remove(Offloads::TSO_ECN);
    }
    let both = Offloads::USO4 | Offloads::USO6;
    if !chosen.contains(both) {
        chosen.remove(both);
    }
    chosen
}

/// Where frames go to and come from.
#[derive(Debug)]
pub enum NetBackend {
    /// Nowhere: the link is down.
    None,
    /// The tap interface of this name.
    TapName(String),
    /// Descriptors attached to a tap interface, one per queue pair.
    TapDescriptors(Vec<OwnedFd>),
}

/// A network card as the operator describes it.
#[derive(Debug)]
pub struct NetConfig {
    /// What messages and threads call it.
    pub name: String,
    /// Where frames go.
    pub backend: NetBackend,
    /// The card's Ethernet address.
    pub mac: [u8; 6],
    /// What the guest is told of the largest frame, without Ethernet header.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 64; with descriptors, as many as those.
    pub queue_pairs: u16,
    /// Entries of each queue: a power of two, 4 to [`super::queue::LARGEST_QUEUE`].
    pub queue_size: u16,
    /// Leave checksums and segmentation to whoever can do them best.
    pub offloads: bool,
}

/// `struct virtio_net_config` up to the fields of features that are offered, little endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Configuration {
    mac: [u8; 6],
    status: u16,
    max_virtqueue_pairs: u16,
    mtu: u16,
}

/// A virtio network device.
pub struct Net {
    name: String,
    taps: Arc<Vec<Arc<Tap>>>,
    features: Features,
    pairs: u16,
    queue_sizes: Vec<u16>,
    configuration: Configuration,
}

impl Net {
    /// Attach to the host's interface and describe the card to the guest.
    pub fn open(config: NetConfig) -> Result<Self, HostError> {
        let taps = match config.backend {
            NetBackend::None => Vec::new(),
            NetBackend::TapName(name) => Tap::open(&name, config.queue_pairs.clamp(1, 64))?,
            NetBackend::TapDescriptors(descriptors) => descriptors
                .into_iter()
                .map(Tap::from_fd)
                .collect::<Result<_, _>>()?,
        };
        let pairs = match u16::try_from(taps.len()) {
            Ok(0) | Err(_) => config.queue_pairs,
            Ok(count) => count,
        };
        let pairs = pairs.clamp(1, 64);
        let mut features = MAC | STATUS | MERGEABLE | CONTROL;
        features.set(MTU, config.mtu.is_some());
        features.set(MULTI_QUEUE, pairs > 1);
        if config.offloads {
            let host = taps
                .first()
                .map_or(Offloads::empty(), |tap| tap.supported_offloads());
            features |= CSUM | HOST_SEGMENTS;
            features.set(HOST_USO, host.contains(Offloads::USO4));
            features.set(CONTROL_OFFLOADS, !host.is_empty());
            for (feature, offload) in GUEST_OFFLOADS {
                features.set(feature, host.contains(offload));
            }
        }
        let link = if taps.is_empty() {
            0
        } else {
            u16::from(virtio_net::VIRTIO_NET_S_LINK_UP.to_le_bytes()[0])
        };
        // Pairs, then the control queue.
        let queue_sizes = std::iter::repeat_n(config.queue_size, 2 * usize::from(pairs))
            .chain([64])
            .collect();
        Ok(Self {
            name: config.name,
            taps: Arc::new(taps.into_iter().map(Arc::new).collect()),
            features,
            pairs,
            queue_sizes,
            configuration: Configuration {
                mac: config.mac,
                status: link.to_le(),
                max_virtqueue_pairs: pairs.to_le(),
                mtu: config.mtu.unwrap_or(0).to_le(),
            },
        })
    }
}

/// Use the first `count` of `taps`' queues, the others rest.
fn attach_first(taps: &[Arc<Tap>], count: usize) -> Result<(), HostError> {
    let mut queues = taps.iter().enumerate();
    queues.try_for_each(|(position, tap)| tap.set_attached(position < count))
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> Features {
        self.features
    }

    /// 5.1.3.1: what each feature needs beside it.
    fn accepts(&self, chosen: Features) -> bool {
        let needs = |these: Features, that: Features| !chosen.intersects(these) || chosen.contains(that);
        let guest_segments = GUEST_OFFLOADS[1..]
            .iter()
            .fold(Features::empty(), |all, (feature, _)| all | *feature);
        needs(MULTI_QUEUE | CONTROL_OFFLOADS, CONTROL)
            && needs(HOST_SEGMENTS | HOST_USO, CSUM)
            && needs(guest_segments, GUEST_CSUM)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(self.configuration.as_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        let features = activation.features;
        for tap in self.taps.iter() {
            tap.set_offloads(offloads(features))?;
        }
        // The driver asks for more pairs by the control queue (5.1.6.5.5).
        attach_first(&self.taps, 1)?;
        let pairs = if features.contains(MULTI_QUEUE) {
            usize::from(self.pairs)
        } else {
            1
        };
        let mut queues = activation.queues.into_iter();
        let mut units = Vec::with_capacity(pairs + 1);
        for position in 0..pairs {
            let two: Vec<ServedQueue> = queues.by_ref().take(2).flatten().collect();
            // A pair that the driver enabled by half does nothing.
            if two.len() < 2 {
                continue;
            }
            let tap = self.taps.get(position).cloned();
            units.push(Unit {
                name: format!("{}-q{position}", self.name),
                service: Box::new(Pair::new(
                    self.name.clone(),
                    tap.map(|tap| tap as Arc<dyn FrameDescriptor>),
                    features.contains(MERGEABLE),
                )),
                queues: two,
            });
        }
        // Without MQ the control queue is the third (5.1.2).
        if let Some(queue) = queues.next().flatten().filter(|_| features.contains(CONTROL)) {
            units.push(Unit {
                name: format!("{}-ctrl", self.name),
                service: Box::new(Control::new(self.taps.clone(), self.pairs, features)),
                queues: vec![queue],
            });
        }
        Ok(units)
    }
}

#[cfg(test)]
mod tests;
