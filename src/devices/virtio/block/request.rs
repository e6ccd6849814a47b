//! What a driver asks of a disk: parsed once into a closed set of requests, each checked against the medium.
//!
//! Virtual I/O Device 1.2, 5.2.6 (Block Device, Device Operation). The SCSI commands of the legacy interface
//! do not exist here.

use virtio_bindings::virtio_blk;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::queue::Buffers;
use super::image::SECTOR;

/// Bytes of data one request may carry, or have written for it: whoever stops a disk or changes what its addresses
/// mean waits for a request. A driver that keeps to `seg_max` and `size_max` never asks for more.
pub const MOST_DATA: u64 = 64 << 20;

/// Sectors one discard or write-zeroes segment may cover: 1 GiB.
pub const MOST_SEGMENT_SECTORS: u32 = 1 << 21;

/// Segments in one discard or write-zeroes request.
pub const MOST_SEGMENTS: u32 = 16;

/// How much one discard or write-zeroes request may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges {
    /// Sectors of each segment.
    pub sectors: u32,
    /// Segments.
    pub segments: u32,
}

impl Ranges {
    /// Of what the host does without moving data.
    pub const NOTED: Self = Self {
        sectors: MOST_SEGMENT_SECTORS,
        segments: MOST_SEGMENTS,
    };
    /// Of what may have to be written.
    pub const WRITTEN: Self = Self {
        sectors: 1 << 17,
        segments: 1,
    };
}

const _: () = assert!(Ranges::WRITTEN.sectors as u64 * SECTOR == MOST_DATA);

/// Bytes of a disk's identification string.
pub const ID_LEN: usize = 20;

/// `struct virtio_blk_req` up to its data, little endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Header {
    /// The operation, one of [`Operation`]'s.
    pub operation: u32,
    /// Reserved.
    pub reserved: u32,
    /// Where, in units of 512 bytes.
    pub sector: u64,
}

/// An operation code as the driver writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation(pub u32);

impl Operation {
    /// Read sectors.
    pub const IN: Self = Self(virtio_blk::VIRTIO_BLK_T_IN);
    /// Write sectors.
    pub const OUT: Self = Self(virtio_blk::VIRTIO_BLK_T_OUT);
    /// Make writes durable.
    pub const FLUSH: Self = Self(virtio_blk::VIRTIO_BLK_T_FLUSH);
    /// Read the identification string.
    pub const GET_ID: Self = Self(virtio_blk::VIRTIO_BLK_T_GET_ID);
    /// Give ranges back.
    pub const DISCARD: Self = Self(virtio_blk::VIRTIO_BLK_T_DISCARD);
    /// Zero ranges.
    pub const WRITE_ZEROES: Self = Self(virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES);
}

/// One entry of a discard or write-zeroes request, little endian.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct RawSegment {
    /// First unit of 512 bytes.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// Bit 0: the host may take the space back (write zeroes only).
    pub flags: u32,
}

/// What the driver reads in the last byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The medium or the request is bad.
    IoError = 1,
    /// There is no such request.
    Unsupported = 2,
}

/// A range of the medium, inside its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

/// A request that can be carried out.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable part from this byte on.
    Read(u64),
    /// Store the readable part from this byte on.
    Write(u64),
    /// Say who the disk is.
    Id,
    /// Work on the medium.
    Upkeep(Upkeep),
}

/// What the host does to the medium without a look at guest memory.
#[derive(Debug, PartialEq, Eq)]
pub enum Upkeep {
    /// Make completed writes durable.
    Flush,
    /// Give ranges back.
    Discard(Vec<Extent>),
    /// Zero ranges; `true`: their space may be given back.
    WriteZeroes(Vec<(Extent, bool)>),
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Medium {
    /// Capacity in units of 512 bytes.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Ranges can be given back.
    pub discards: bool,
    /// What one request may zero.
    pub zeroes: Ranges,
}

impl Request {
    /// Understand a request with `data` to read from and `room` bytes of data to fill, or say what the driver
    /// is told.
    pub fn parse(header: Header, data: &Buffers<'_>, room: usize, medium: Medium) -> Result<Self, Status> {
        let sector = u64::from_le(header.sector);
        let may_write = || {
            if medium.read_only {
                Err(Status::IoError)
            } else {
                Ok(())
            }
        };
        match Operation(u32::from_le(header.operation)) {
            Operation::IN => Ok(Self::Read(medium.transfer(sector, room)?.at)),
            Operation::OUT => {
                may_write()?;
                Ok(Self::Write(medium.transfer(sector, data.len())?.at))
            }
            Operation::FLUSH => Ok(Self::Upkeep(Upkeep::Flush)),
            Operation::GET_ID => Ok(Self::Id),
            Operation::DISCARD if medium.discards => {
                may_write()?;
                let discard = |segment: RawSegment| {
                    // "Unmap" is reserved here (5.2.6.2).
                    if u32::from_le(segment.flags) != 0 {
                        return Err(Status::Unsupported);
                    }
                    medium.segment(segment, Ranges::NOTED)
                };
                let extents = segments(data, Ranges::NOTED)?.into_iter().map(discard);
                Ok(Self::Upkeep(Upkeep::Discard(extents.collect::<Result<_, _>>()?)))
            }
            Operation::WRITE_ZEROES => {
                may_write()?;
                let zero = |segment: RawSegment| {
                    let unmap = match u32::from_le(segment.flags) {
                        0 => false,
                        virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => true,
                        _ => return Err(Status::Unsupported),
                    };
                    Ok((medium.segment(segment, medium.zeroes)?, unmap))
                };
                let extents = segments(data, medium.zeroes)?.into_iter().map(zero);
                Ok(Self::Upkeep(Upkeep::WriteZeroes(
                    extents.collect::<Result<_, _>>()?,
                )))
            }
            _ => Err(Status::Unsupported),
        }
    }
}

impl Medium {
    /// `len` bytes from `sector` on, if they are whole sectors inside the medium.
    fn extent(&self, sector: u64, len: u64) -> Result<Extent, Status> {
        let capacity = self.sectors * SECTOR;
        let inside = |at: &u64| at.checked_add(len).is_some_and(|end| end <= capacity);
        let at = sector.checked_mul(SECTOR).filter(inside).ok_or(Status::IoError)?;
        if !len.is_multiple_of(SECTOR) {
            return Err(Status::IoError);
        }
        Ok(Extent { at, len })
    }

    /// Where `len` bytes of data go or come from.
    fn transfer(&self, sector: u64, len: usize) -> Result<Extent, Status> {
        match len as u64 {
            len if len > MOST_DATA => Err(Status::IoError),
            len => self.extent(sector, len),
        }
    }

    fn segment(&self, segment: RawSegment, most: Ranges) -> Result<Extent, Status> {
        let sectors = u32::from_le(segment.sectors);
        if sectors > most.sectors {
            return Err(Status::IoError);
        }
        self.extent(u64::from_le(segment.sector), u64::from(sectors) * SECTOR)
    }
}

/// The entries of a discard or write-zeroes request: 1 to as many as `most` says.
fn segments(data: &Buffers<'_>, most: Ranges) -> Result<Vec<RawSegment>, Status> {
    let size = size_of::<RawSegment>();
    let most = size * most.segments as usize;
    if data.is_empty() || !data.len().is_multiple_of(size) || data.len() > most {
        return Err(Status::IoError);
    }
    let mut bytes = vec![0; data.len()];
    data.copy_to(&mut bytes);
    Ok(bytes
        .chunks_exact(size)
        .map(|entry| RawSegment::read_from_bytes(entry).expect("as long as an entry"))
        .collect())
}
