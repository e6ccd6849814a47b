//! A disk: raw images of the host as virtio block devices.
//!
//! | offered | when |
//! | --- | --- |
//! | `RO` | the image is read-only |
//! | `FLUSH` | always; a driver without it gets writes that are durable when they complete |
//! | `SEG_MAX`, `SIZE_MAX`, `BLK_SIZE`, `TOPOLOGY` | always; the first two keep a request below [`request::MOST_DATA`] |
//! | `MQ` | more than one queue |
//! | `DISCARD` | writable, and the host's file system can punch holes |
//! | `WRITE_ZEROES` | writable |
//!
//! Virtual I/O Device 1.2, 5.2 (Block Device). Each queue has a thread; a request is one system call from or
//! to guest memory. What moves no data of the guest's is done with no view of its memory held: a change of translations,
//! which waits for views, does not wait for a flush.

pub mod image;
pub mod request;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use virtio_bindings::virtio_blk;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::queue::{Broken, Chain, MemoryViews};
use super::worker::{Notify, Served, ServedQueue, Service, Turn, Unit, Woken};
use super::{Activation, Features, Kind, VirtioDevice, read_structure};
use crate::guest_warn;
use crate::platform::dma::Dma;
use crate::platform::host::HostError;
use image::{Image, ImageOptions};
use request::{Header, ID_LEN, MOST_DATA, Medium, Ranges, Request, Status, Upkeep};

const FLUSH: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_FLUSH);
const READ_ONLY: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_RO);
const MULTI_QUEUE: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_MQ);
const DISCARD: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_DISCARD);
const WRITE_ZEROES: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES);
const SEG_MAX: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_SEG_MAX);
const SIZE_MAX: Features = Features::bit(virtio_blk::VIRTIO_BLK_F_SIZE_MAX);
const ALWAYS: Features = FLUSH
    .union(SEG_MAX)
    .union(SIZE_MAX)
    .union(Features::bit(virtio_blk::VIRTIO_BLK_F_BLK_SIZE))
    .union(Features::bit(virtio_blk::VIRTIO_BLK_F_TOPOLOGY));

/// A disk as the operator describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockConfig {
    /// What messages and threads call it.
    pub name: String,
    /// A raw image: a regular file or a block device.
    pub path: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Queues, 1 to 64; as many as the guest has processors is a good number.
    pub queues: u16,
    /// Entries of each: a power of two, 4 to [`super::queue::LARGEST_QUEUE`].
    pub queue_size: u16,
    /// What the guest finds as the disk's serial number; at most 20 bytes count.
    pub serial: Option<String>,
}

#[cfg(any(test, fuzzing))]
impl BlockConfig {
    /// The image at `path`, writable and cached, one queue of 256 entries.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            read_only: false,
            direct: false,
            queues: 1,
            queue_size: 256,
            serial: None,
        }
    }
}

/// `struct virtio_blk_config` up to the fields of features that are offered, little endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Configuration {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    geometry: [u8; 4],
    blk_size: u32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: u16,
    opt_io_size: u32,
    writeback: u8,
    unused0: u8,
    num_queues: u16,
    max_discard_sectors: u32,
    max_discard_seg: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_seg: u32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
    max_secure_erase_sectors: u32,
}

const _: () = assert!(size_of::<Configuration>() == 64);

/// A virtio block device.
pub struct Block {
    name: String,
    image: Arc<Image>,
    id: [u8; ID_LEN],
    queue_sizes: Vec<u16>,
    configuration: Configuration,
}

impl Block {
    /// Open the image and describe it to the guest.
    pub fn open(config: &BlockConfig) -> Result<Self, HostError> {
        let image = Image::open(&ImageOptions {
            path: config.path.clone(),
            read_only: config.read_only,
            direct: config.direct,
        })?;
        Ok(Self::on(image, config))
    }

    /// `image` as the disk that `config` describes.
    fn on(image: Image, config: &BlockConfig) -> Self {
        let mut id = [0; ID_LEN];
        let serial = config.serial.as_deref().unwrap_or(&config.name).as_bytes();
        let len = serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&serial[..len]);
        let queues = config.queues.clamp(1, 64);
        let block_size = image.block_size();
        let (discard, zeroes) = (image.punches_holes(), !image.read_only());
        let if_offered = |offered: bool, value: u32| if offered { value.to_le() } else { 0 };
        // A request has a header and a status descriptor besides its data.
        let segments = config.queue_size.saturating_sub(2).max(1);
        let zeroed = zeroed_at_once(&image);
        let configuration = Configuration {
            capacity: image.sectors().to_le(),
            size_max: (1_u32 << (MOST_DATA / u64::from(segments)).ilog2()).to_le(),
            seg_max: u32::from(segments).to_le(),
            geometry: [0; 4],
            blk_size: block_size.to_le(),
            physical_block_exp: u8::try_from((image.physical_block_size() / block_size).ilog2())
                .expect("a logarithm of 32 bits"),
            alignment_offset: 0,
            min_io_size: 1_u16.to_le(),
            opt_io_size: 0,
            writeback: 0,
            unused0: 0,
            num_queues: queues.to_le(),
            max_discard_sectors: if_offered(discard, Ranges::NOTED.sectors),
            max_discard_seg: if_offered(discard, Ranges::NOTED.segments),
            discard_sector_alignment: if_offered(discard, block_size / 512),
            max_write_zeroes_sectors: if_offered(zeroes, zeroed.sectors),
            max_write_zeroes_seg: if_offered(zeroes, zeroed.segments),
            write_zeroes_may_unmap: u8::from(discard),
            unused1: [0; 3],
            max_secure_erase_sectors: 0,
        };
        Self {
            name: config.name.clone(),
            image: Arc::new(image),
            id,
            queue_sizes: vec![config.queue_size; usize::from(queues)],
            configuration,
        }
    }

    /// What serves one queue for a driver that chose `features`.
    #[must_use]
    pub fn queue(&self, features: Features) -> BlockQueue {
        BlockQueue {
            name: self.name.clone(),
            image: self.image.clone(),
            id: self.id,
            zeroed_at_once: zeroed_at_once(&self.image),
            write_through: !features.contains(FLUSH),
        }
    }
}

/// What one request may zero on `image`.
fn zeroed_at_once(image: &Image) -> Ranges {
    if image.zeroes_cheaply() {
        Ranges::NOTED
    } else {
        Ranges::WRITTEN
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> Features {
        let mut features = ALWAYS;
        features.set(READ_ONLY, self.image.read_only());
        features.set(WRITE_ZEROES, !self.image.read_only());
        features.set(DISCARD, self.image.punches_holes());
        features.set(MULTI_QUEUE, self.queue_sizes.len() > 1);
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_structure(self.configuration.as_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) -> Result<Vec<Unit>, HostError> {
        let unit = |queue: ServedQueue| Unit {
            name: format!("{}-q{}", self.name, queue.index()),
            service: Box::new(self.queue(activation.features)),
            queues: vec![queue],
        };
        Ok(activation.queues.into_iter().flatten().map(unit).collect())
    }
}

/// Serves one queue of a disk.
pub struct BlockQueue {
    name: String,
    image: Arc<Image>,
    id: [u8; ID_LEN],
    zeroed_at_once: Ranges,
    /// The driver cannot flush, so each write is durable when it completes (5.2.6.2).
    write_through: bool,
}

impl Service for BlockQueue {
    fn turn(&mut self, _woken: Woken, dma: &Dma, queues: &mut [ServedQueue]) -> Result<Turn, Broken> {
        let mut turn = Turn::Idle;
        for queue in queues {
            turn = turn.or(self.serve(dma, queue)?);
        }
        Ok(turn)
    }
}

impl BlockQueue {
    /// Serve what is available in `queue`, one ring's worth at most.
    pub fn serve<V: MemoryViews>(&self, mem: &V, queue: &mut ServedQueue) -> Result<Turn, Broken> {
        self.serve_with(mem, queue, |upkeep| self.keep_up(&upkeep))
    }

    /// The same, with `keep_up` for what is done without a view of memory.
    fn serve_with<V: MemoryViews>(
        &self,
        mem: &V,
        queue: &mut ServedQueue,
        mut keep_up: impl FnMut(Upkeep) -> Status,
    ) -> Result<Turn, Broken> {
        queue.drain_apart(
            mem,
            Notify::Each,
            |chain| self.request(chain),
            |upkeep| keep_up(upkeep) as u8,
        )
    }

    /// Carry one request out, as far as that needs its buffers.
    fn request(&self, chain: &mut Chain<'_>) -> Result<Served<Upkeep>, Broken> {
        let malformed = Broken::Request {
            readable: chain.readable.len(),
            writable: chain.writable.len(),
            wanted: "a disk's has a 16-byte header to read and a status byte to write",
        };
        let Some(data) = chain.readable.split_off(size_of::<Header>()) else {
            return Err(malformed);
        };
        let status_at = chain.writable.len().checked_sub(1);
        let Some(status) = status_at.and_then(|at| chain.writable.split_off(at)) else {
            return Err(malformed);
        };
        let room = &chain.writable;
        let mut header = [0; size_of::<Header>()];
        chain.readable.copy_to(&mut header);
        let header = Header::read_from_bytes(&header).expect("as long as a header");
        let outcome = Request::parse(header, &data, room.len(), self.medium())
            .and_then(|request| self.carry_out(request, &data, room));
        let (answer, filled) = match outcome {
            Ok(Step::Filled(filled)) => (Status::Ok, filled),
            Ok(Step::Left(upkeep)) => {
                let status_at = chain.last_writable.expect("the status byte is the last");
                return Ok(Served::Apart(upkeep, status_at));
            }
            Err(answer) => (answer, 0),
        };
        status.copy_from(&[answer as u8]);
        Ok(Served::Done(u32::try_from(filled + 1).unwrap_or(u32::MAX)))
    }

    fn medium(&self) -> Medium {
        Medium {
            sectors: self.image.sectors(),
            read_only: self.image.read_only(),
            discards: self.image.punches_holes(),
            zeroes: self.zeroed_at_once,
        }
    }

    /// Do what needs `data` or `room`.
    fn carry_out(
        &self,
        request: Request,
        data: &super::queue::Buffers<'_>,
        room: &super::queue::Buffers<'_>,
    ) -> Result<Step, Status> {
        let image = &self.image;
        let failed = |error| self.failed(&request, &error);
        Ok(match request {
            Request::Read(at) => {
                image.read(at, room).map_err(failed)?;
                Step::Filled(room.len())
            }
            Request::Write(at) => {
                image.write(at, data).map_err(failed)?;
                if self.write_through {
                    Step::Left(Upkeep::Flush)
                } else {
                    Step::Filled(0)
                }
            }
            Request::Id => Step::Filled(room.copy_from(&self.id)),
            Request::Upkeep(upkeep) => Step::Left(upkeep),
        })
    }

    /// Do what needs no guest memory.
    fn keep_up(&self, upkeep: &Upkeep) -> Status {
        let image = &self.image;
        let done =
            match upkeep {
                Upkeep::Flush => image.flush(),
                Upkeep::Discard(extents) => extents
                    .iter()
                    .filter(|extent| extent.len > 0)
                    .try_for_each(|extent| image.discard(extent.at, extent.len)),
                Upkeep::WriteZeroes(extents) => {
                    let mut left = MOST_DATA;
                    let zeroed = extents.iter().filter(|(extent, _)| extent.len > 0).try_for_each(
                        |(extent, unmap)| image.write_zeroes(extent.at, extent.len, *unmap, &mut left),
                    );
                    let durable = || if self.write_through { image.flush() } else { Ok(()) };
                    zeroed.and_then(|()| durable())
                }
            };
        match done {
            Ok(()) => Status::Ok,
            Err(error) => self.failed(upkeep, &error),
        }
    }

    /// What the driver is told of an `error` of the host's.
    fn failed(&self, what: &dyn std::fmt::Debug, error: &io::Error) -> Status {
        guest_warn!(
            disk = %self.name,
            path = %self.image.path().display(),
            "the host failed a request {what:?}: {error}"
        );
        if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            Status::Unsupported
        } else {
            Status::IoError
        }
    }
}

/// How far a request has come when its buffers are needed no more.
enum Step {
    /// It is done, and so many bytes of its room are filled.
    Filled(usize),
    /// This is left to do.
    Left(Upkeep),
}

#[cfg(test)]
mod tests;
