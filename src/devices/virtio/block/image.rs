//! A raw disk image: a file or a block device of the host, read and written in place.
//!
//! The format is what the operator says (raw), never what the content suggests: a guest writes the content.

mod shortcuts;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use vm_memory::VolatileSlice;

use super::super::queue::Buffers;
use crate::platform::host::HostError;
use crate::platform::vectored;
use shortcuts::Shortcuts;

/// Bytes in virtio's unit of addressing, whatever the block size.
pub const SECTOR: u64 = 512;

/// Bytes moved at once where a copy cannot be avoided.
const PIECE: usize = 256 << 10;

/// The alignment every medium takes.
const COARSE: usize = 4096;

/// How to open an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

impl ImageOptions {
    fn file(&self) -> io::Result<File> {
        let mut flags = if self.read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        flags.set(OFlags::DIRECT, self.direct);
        Ok(rustix::fs::open(&self.path, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    }
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    read_only: bool,
    sectors: u64,
    block_size: u32,
    physical_block_size: u32,
    /// What buffers, lengths and offsets are multiples of for the kernel to take them; 1 when cached.
    alignment: usize,
    shortcuts: Shortcuts,
}

impl Image {
    /// Open, lock and measure an image.
    ///
    /// A writable image is locked for this process alone, a read-only one may be shared with other readers.
    pub fn open(options: &ImageOptions) -> Result<Self, HostError> {
        let path = &options.path;
        let failed = |what: &str| {
            let action = format!("{what} disk image {}", path.display());
            move |error: io::Error| HostError::new(action, error)
        };
        let mut file = options.file().map_err(failed("open"))?;
        let kind = file.metadata().map_err(failed("examine"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let neither = io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a regular file nor a block device",
            );
            return Err(failed("use")(neither));
        }
        lock(&file, path, options.read_only)?;
        let (logical, physical) = if kind.is_block_device() {
            block_sizes(&file).map_err(failed("ask for the block size of"))?
        } else {
            (512, 4096)
        };
        let size = file.seek(SeekFrom::End(0)).map_err(failed("measure"))?;
        let alignment = if options.direct {
            direct_alignment(&file).map_err(failed("read, bypassing the page cache,"))?
        } else {
            1
        };
        let block_size = logical.max(u32::try_from(alignment).expect("a small number"));
        let usable = size - size % u64::from(block_size);
        if usable == 0 {
            let small = io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("it has {size} bytes; at least {block_size} are needed"),
            );
            return Err(failed("use")(small));
        }
        if usable != size {
            tracing::warn!(
                path = %path.display(),
                "the last {} bytes of the disk image are no whole block of {block_size} and stay hidden",
                size - usable
            );
        }
        let shortcuts = if options.read_only {
            Shortcuts::NONE
        } else if kind.is_block_device() {
            Shortcuts::ALL
        } else {
            Shortcuts::of_file(&file, path).map_err(failed("examine"))?
        };
        Ok(Self {
            file,
            path: path.clone(),
            read_only: options.read_only,
            sectors: usable / SECTOR,
            block_size,
            physical_block_size: physical.max(block_size),
            alignment,
            shortcuts,
        })
    }

    /// Capacity in units of [`SECTOR`].
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Bytes in the smallest transfer the medium does well: a power of two, 512 at least.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Bytes the medium writes at once; a multiple of [`Self::block_size`].
    #[must_use]
    pub fn physical_block_size(&self) -> u32 {
        self.physical_block_size
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether ranges can be given back to the host.
    #[must_use]
    pub fn punches_holes(&self) -> bool {
        self.shortcuts.punches_holes
    }

    /// Where it is on the host.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fill `into` from byte `at` on, which with the length lies inside the capacity.
    pub fn read(&self, at: u64, into: &Buffers<'_>) -> io::Result<()> {
        if self.fits(at, into) {
            return vectored::read_exact_at(&self.file, into.slices(), at);
        }
        self.by_pieces(at, into.len(), |slice, at, done| {
            vectored::read_exact_at(&self.file, std::slice::from_ref(slice), at)?;
            let mut rest = into.clone();
            if let Some(rest) = rest.split_off(done) {
                let mut piece = vec![0; slice.len()];
                slice.copy_to(&mut piece[..]);
                rest.copy_from(&piece);
            }
            Ok(())
        })
    }

    /// Write `from` to byte `at` on, which with the length lies inside the capacity.
    pub fn write(&self, at: u64, from: &Buffers<'_>) -> io::Result<()> {
        if self.fits(at, from) {
            return vectored::write_all_at(&self.file, from.slices(), at);
        }
        self.by_pieces(at, from.len(), |slice, at, done| {
            let mut rest = from.clone();
            if let Some(rest) = rest.split_off(done) {
                let mut piece = vec![0; slice.len()];
                rest.copy_to(&mut piece);
                slice.copy_from(&piece[..]);
            }
            vectored::write_all_at(&self.file, std::slice::from_ref(slice), at)
        })
    }

    /// Make all completed writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Give `len` bytes at `at` back to the host; they read as zeros then.
    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, at, len).map_err(io::Error::from)
    }

    /// Whether the host makes zeros without writing them. Of a block device nobody knows: its driver may write.
    #[must_use]
    pub fn zeroes_cheaply(&self) -> bool {
        self.shortcuts.zeroes_ranges && self.file.metadata().is_ok_and(|metadata| metadata.is_file())
    }

    /// Make `len` bytes at `at` zeros, giving them back to the host if `unmap`.
    ///
    /// Where the host has no shortcut they are written, and taken off `left`; EOPNOTSUPP, and nothing written, when
    /// fewer are.
    pub fn write_zeroes(&self, at: u64, len: u64, unmap: bool, left: &mut u64) -> io::Result<()> {
        if unmap && self.shortcuts.punches_holes && self.discard(at, len).is_ok() {
            return Ok(());
        }
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if self.shortcuts.zeroes_ranges && rustix::fs::fallocate(&self.file, flags, at, len).is_ok() {
            return Ok(());
        }
        *left = left.checked_sub(len).ok_or(rustix::io::Errno::OPNOTSUPP)?;
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.by_pieces(at, len, |slice, at, _done| {
            vectored::write_all_at(&self.file, std::slice::from_ref(slice), at)
        })
    }

    /// The same on a host that zeroes ranges and takes them back, or does neither.
    #[cfg(test)]
    pub(super) fn with_shortcuts(mut self, has: bool) -> Self {
        self.shortcuts = if has { Shortcuts::ALL } else { Shortcuts::NONE };
        self
    }

    /// Whether the kernel takes these buffers as they are.
    fn fits(&self, at: u64, buffers: &Buffers<'_>) -> bool {
        let aligned = |slice: &VolatileSlice<'_>| {
            slice.ptr_guard().as_ptr().addr().is_multiple_of(self.alignment)
                && slice.len().is_multiple_of(self.alignment)
        };
        at.is_multiple_of(self.alignment as u64) && buffers.slices().iter().all(aligned)
    }

    /// Call `step` with an aligned buffer of zeros, file position and bytes done, until `len` bytes are done.
    /// EINVAL when the position or the length is no multiple of what the medium needs.
    fn by_pieces(
        &self,
        at: u64,
        len: usize,
        mut step: impl FnMut(&VolatileSlice<'_>, u64, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        if !at.is_multiple_of(self.alignment as u64) || !len.is_multiple_of(self.alignment) {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let mut buffer = vec![0; PIECE.min(len) + COARSE];
        let buffer = aligned(&mut buffer);
        let mut done = 0;
        while done < len {
            let part = PIECE.min(len - done);
            step(&VolatileSlice::from(&mut buffer[..part]), at + done as u64, done)?;
            done += part;
        }
        Ok(())
    }
}

/// Logical and physical block size of a block device.
fn block_sizes(device: &File) -> io::Result<(u32, u32)> {
    let logical = rustix::fs::ioctl_blksszget(device)?;
    Ok((logical, rustix::fs::ioctl_blkpbszget(device)?))
}

/// The part of `buffer` that begins at a multiple of [`COARSE`].
fn aligned(buffer: &mut [u8]) -> &mut [u8] {
    let skip = buffer.as_ptr().align_offset(COARSE).min(buffer.len());
    &mut buffer[skip..]
}

/// The smallest alignment by which the kernel reads `file` past its page cache.
fn direct_alignment(file: &File) -> io::Result<usize> {
    let mut buffer = vec![0; 2 * COARSE];
    let buffer = aligned(&mut buffer);
    // An aligned buffer at an offset of 512 fails where 4096 are needed.
    if rustix::io::pread(file, &mut buffer[..512], SECTOR).is_ok() {
        return Ok(512);
    }
    rustix::io::pread(file, &mut buffer[..COARSE], 0)?;
    Ok(COARSE)
}

/// Keep other processes from writing what this one uses.
fn lock(file: &File, path: &Path, shared: bool) -> Result<(), HostError> {
    let operation = if shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(file, operation) {
        Ok(()) => Ok(()),
        Err(error) if error == rustix::io::Errno::WOULDBLOCK => Err(HostError::new(
            format!(
                "lock disk image {}; another virtual machine or disk uses it (several may share an image \
                 only if all are read-only)",
                path.display()
            ),
            error,
        )),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the file system has no locks; nothing keeps others from the disk image");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
