//! One queue pair: frames from the tap to the driver, and back.
//!
//! Virtual I/O Device 1.2, 5.1.6 (Network Device, Device Operation).

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use virtio_bindings::virtio_net as spec;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::queue::{Broken, Buffers, MemoryViews, QueueMemory};
use super::super::worker::{Notify, ServedQueue, Service, Source, Turn, Woken};
use crate::guest_warn;
use crate::platform::dma::Dma;
use crate::platform::tap::HEADER_LEN;
use crate::platform::vectored;

/// The largest frame with its virtio-net header: 64 KiB of IP packet, Ethernet and VLAN headers.
const LARGEST_FRAME: usize = HEADER_LEN + 18 + 65535;

/// Positions of the pair's queues among the service's.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A descriptor that yields and takes whole frames behind a virtio-net header, without blocking.
pub trait FrameDescriptor: AsFd + Send + Sync {}

impl<T: AsFd + Send + Sync> FrameDescriptor for T {}

/// `struct virtio_net_hdr_v1`, little endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

const _: () = assert!(size_of::<Header>() == HEADER_LEN);

/// Where `num_buffers` is.
const NUM_BUFFERS: usize = 10;

impl Header {
    /// The header with nothing in it that could point outside a frame of `len` bytes; `None` if something does.
    ///
    /// Bits that mean nothing to the device are dropped (5.1.6.2.2).
    fn bounded(self, len: usize) -> Option<Self> {
        let [needs_csum] = [spec::VIRTIO_NET_HDR_F_NEEDS_CSUM.to_le_bytes()[0]];
        let [none, tcp4, udp, tcp6, udp_l4, ecn] = [
            spec::VIRTIO_NET_HDR_GSO_NONE,
            spec::VIRTIO_NET_HDR_GSO_TCPV4,
            spec::VIRTIO_NET_HDR_GSO_UDP,
            spec::VIRTIO_NET_HDR_GSO_TCPV6,
            spec::VIRTIO_NET_HDR_GSO_UDP_L4,
            spec::VIRTIO_NET_HDR_GSO_ECN,
        ]
        .map(|value| value.to_le_bytes()[0]);
        let flags = self.flags & needs_csum;
        if flags != 0 {
            let (start, offset) = (u16::from_le(self.csum_start), u16::from_le(self.csum_offset));
            if usize::from(start) + usize::from(offset) + 2 > len {
                return None;
            }
        }
        let segments = self.gso_type & !ecn;
        if segments != none {
            let known = [tcp4, udp, tcp6, udp_l4].contains(&segments);
            if !known || self.gso_size == 0 || usize::from(u16::from_le(self.hdr_len)) > len {
                return None;
            }
        }
        Some(Self {
            flags,
            num_buffers: 0,
            ..self
        })
    }
}

/// Serves one queue pair of a card.
pub struct Pair {
    name: String,
    tap: Option<Arc<dyn FrameDescriptor>>,
    mergeable: bool,
    /// A frame may wait in the tap that its descriptor told of before: the driver's next kick resumes, or the next turn.
    stalled: bool,
    /// Where the part of a frame lands that exceeds the first chain.
    spill: Vec<u8>,
}

impl Service for Pair {
    fn sources(&self) -> Vec<Source<'_>> {
        let tap = self.tap.iter();
        tap.map(|tap| Source {
            fd: tap.as_fd(),
            output: false,
        })
        .collect()
    }

    fn turn(&mut self, woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        let mut turn = Turn::Idle;
        if let Some(queue) = queues.get_mut(TRANSMIT).filter(|_| woken.queue(TRANSMIT)) {
            turn = turn.or(self.transmit(dma, queue)?);
        }
        let kicked = self.stalled && woken.queue(RECEIVE);
        if let Some(queue) = queues.get_mut(RECEIVE).filter(|_| kicked || woken.source(0)) {
            turn = turn.or(self.receive(dma, queue)?);
        }
        Ok(turn)
    }
}

impl Pair {
    /// A pair between a driver and `tap`; `mergeable`: frames may take several chains (`MRG_RXBUF`).
    #[must_use]
    pub fn new(name: String, tap: Option<Arc<dyn FrameDescriptor>>, mergeable: bool) -> Self {
        Self {
            name,
            tap,
            mergeable,
            stalled: true,
            spill: vec![0; LARGEST_FRAME],
        }
    }

    /// Give the driver the frames that wait, one ring's worth at most.
    pub fn receive<V: MemoryViews>(&mut self, mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        let Some(tap) = self.tap.clone() else {
            return Ok(Turn::Idle);
        };
        self.stalled = true;
        queue.disarm(&mem.view())?;
        let mut turn = Turn::Again;
        for _ in 0..queue.size() {
            if queue.waits() {
                break;
            }
            let view = &mem.view();
            let Some(first) = queue.pop(view)? else {
                if queue.rearm(view)? {
                    continue;
                }
                turn = Turn::Idle;
                break;
            };
            if first.writable.len() < HEADER_LEN {
                return Err(Broken::Request {
                    readable: first.readable.len(),
                    writable: first.writable.len(),
                    wanted: "a card's receive buffer has room for a 12-byte header",
                });
            }
            let room = first.writable.len();
            let mut slices = first.writable.slices().to_vec();
            slices.truncate(vectored::MOST_SLICES - 1);
            let direct: usize = slices.iter().map(VolatileSlice::len).sum();
            slices.push(VolatileSlice::from(&mut self.spill[..]));
            let len = match vectored::read(tap.as_fd(), &slices) {
                Ok(len) => len,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::debug!(card = %self.name, %error, "the tap gives no frame");
                    }
                    queue.put_back(first.head);
                    self.stalled = false;
                    turn = Turn::Idle;
                    break;
                }
            };
            let spilled = len.saturating_sub(direct);
            if len < HEADER_LEN || spilled > self.spill.len() || (spilled > 0 && direct < room) {
                queue.put_back(first.head);
                tracing::debug!(card = %self.name, len, "a frame does not fit the driver's buffers and is dropped");
            } else if spilled == 0 {
                first.writable.number_of_buffers(1);
                queue.complete(view, first.head, u32::try_from(len).expect("a frame"))?;
            } else if !self.mergeable || !self.spread(view, queue, &first.writable, first.head, spilled)? {
                queue.put_back(first.head);
                tracing::debug!(card = %self.name, len, "a frame does not fit the driver's buffers and is dropped");
            }
        }
        queue.notify(&mem.view())?;
        Ok(turn)
    }

    /// Put the `spilled` bytes of a frame into further chains and complete all of them; `false`, and all
    /// further chains given back, if the driver has not enough.
    fn spread<M: QueueMemory>(
        &mut self,
        mem: &M,
        queue: &mut ServedQueue,
        first: &Buffers<'_>,
        head: u16,
        spilled: usize,
    ) -> Result<bool, Broken> {
        let mut rest = &self.spill[..spilled];
        let mut filled = vec![(head, first.len())];
        while !rest.is_empty() {
            let Some(chain) = queue.pop(mem)? else {
                for (head, _) in filled.drain(1..).rev() {
                    queue.put_back(head);
                }
                return Ok(false);
            };
            let count = chain.writable.copy_from(rest);
            rest = &rest[count..];
            filled.push((chain.head, count));
        }
        first.number_of_buffers(u16::try_from(filled.len()).expect("at most a ring of chains"));
        for (head, count) in filled {
            queue.complete(mem, head, u32::try_from(count).expect("part of a frame"))?;
        }
        Ok(true)
    }

    /// Send the frames the driver has for us, one ring's worth at most.
    pub fn transmit<V: MemoryViews>(&mut self, mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        let (name, tap) = (&self.name, &self.tap);
        queue.drain(mem, Notify::Batch, |chain| {
            let malformed = Broken::Request {
                readable: chain.readable.len(),
                writable: chain.writable.len(),
                wanted: "a card's frame has a 12-byte header to read",
            };
            let Some(frame) = chain.readable.split_off(HEADER_LEN) else {
                return Err(malformed);
            };
            let mut header = [0; HEADER_LEN];
            chain.readable.copy_to(&mut header);
            let header = Header::read_from_bytes(&header).expect("as long as a header");
            let Some(mut header) = header.bounded(frame.len()) else {
                guest_warn!(card = %name, "a frame of {} bytes with {header:?} is dropped", frame.len());
                return Ok(Some(0));
            };
            if let Some(tap) = tap {
                let mut slices = vec![VolatileSlice::from(header.as_mut_bytes())];
                slices.extend(frame.slices().iter().cloned());
                // A frame that needs more vectors than a call takes would be sent cut.
                if slices.len() > vectored::MOST_SLICES || frame.len() > LARGEST_FRAME {
                    guest_warn!(card = %name, "a frame of {} bytes in {} parts is dropped", frame.len(), slices.len());
                } else if let Err(error) = vectored::write(tap.as_fd(), &slices) {
                    guest_warn!(card = %name, "the tap refused a frame of {} bytes: {error}", frame.len());
                }
            }
            Ok(Some(0))
        })
    }
}

impl Buffers<'_> {
    /// Say in the header at the beginning how many chains the frame takes.
    fn number_of_buffers(&self, count: u16) {
        let mut field = self.clone();
        if let Some(field) = field.split_off(NUM_BUFFERS) {
            field.copy_from(&count.to_le_bytes());
        }
    }
}
