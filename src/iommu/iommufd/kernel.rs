//! Requests of /dev/iommu as bytes: what mode `hw` asks of the kernel, structure by structure.
//!
//! AMD's requests are not settled: numbers, lengths and places of fields differ between kernels. They are data here, and
//! the kernel is told bytes. A fake that stands below this seam sees all that the kernel would.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Iommufd, uapi};
use crate::platform::device_memory::DeviceMemory;

/// What takes requests for iommufd objects.
pub trait Kernel: Send + Sync {
    /// Issue request `number` (80h and on; behind the type `;`) with the structure `argument`, which begins with its size.
    ///
    /// Where the structure has room for the address and length of further data, `data` is that data; both fields are 0 in
    /// `argument` and filled in below. Otherwise `data` is empty. The kernel writes to either.
    ///
    /// # Errors
    /// The kernel's errno; `InvalidInput` for a request that is none of those known here.
    fn request(&self, number: u32, argument: &mut [u8], data: &mut [u8]) -> io::Result<()>;

    /// Issue VEVENTQ_ALLOC (93h) with its structure of 32 bytes; the descriptor that the kernel made. The queue itself, whose
    /// number the kernel wrote, can be destroyed once that is closed.
    ///
    /// # Errors
    /// The kernel's errno; `InvalidInput` for a structure of another size.
    fn event_queue(&self, argument: &mut [u8]) -> io::Result<OwnedFd>;

    /// Map `len` bytes that the kernel offered at `offset`. The object they belong to stays until they are unmapped.
    ///
    /// # Errors
    /// The kernel's errno.
    fn map(&self, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>>;
}

impl Kernel for Iommufd {
    fn request(&self, number: u32, argument: &mut [u8], data: &mut [u8]) -> io::Result<()> {
        uapi::request(&self.file, number, argument, data)
    }

    fn event_queue(&self, argument: &mut [u8]) -> io::Result<OwnedFd> {
        uapi::event_queue(&self.file, argument)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>> {
        DeviceMemory::map(&self.file, offset, len).map(Arc::new)
    }
}

/// A structure of a request's, or data that goes with it: little-endian fields at offsets.
///
/// Offsets are of the interface or of a checked table; a field outside is a broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fields(Vec<u8>);

impl Fields {
    /// `len` bytes of 0.
    pub(super) fn data(len: usize) -> Self {
        Self(vec![0; len])
    }

    /// A structure of `len` bytes, which begins with that number.
    pub(super) fn structure(len: u32) -> Self {
        Self::data(len as usize).u32(0, len)
    }

    pub(super) fn u16(self, at: usize, value: u16) -> Self {
        self.set(at, &value.to_le_bytes())
    }

    pub(super) fn u32(self, at: usize, value: u32) -> Self {
        self.set(at, &value.to_le_bytes())
    }

    pub(super) fn u64(self, at: usize, value: u64) -> Self {
        self.set(at, &value.to_le_bytes())
    }

    pub(super) fn u8(self, at: usize, value: u8) -> Self {
        self.set(at, &[value])
    }

    fn set(mut self, at: usize, value: &[u8]) -> Self {
        let field = self.0.get_mut(at..at + value.len());
        field.expect("the field is inside").copy_from_slice(value);
        self
    }

    pub(super) fn get_u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    pub(super) fn get_u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = self.0.get(at..at + N);
        let field = field.and_then(|field| field.try_into().ok());
        field.expect("the field is inside")
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_little_endian_at_their_offsets() {
        let fields = Fields::structure(16)
            .u16(4, 0x1234)
            .u8(6, 5)
            .u64(8, 0x0102_0304_0506_0708);
        assert_eq!(
            fields.clone().bytes(),
            [16, 0, 0, 0, 0x34, 0x12, 5, 0, 8, 7, 6, 5, 4, 3, 2, 1]
        );
        assert_eq!(
            (fields.get_u32(0), fields.get_u64(8)),
            (16, 0x0102_0304_0506_0708)
        );
    }

    #[test]
    #[should_panic(expected = "the field is inside")]
    fn a_field_outside_is_a_broken_promise() {
        let _ = Fields::structure(8).u32(6, 1);
    }
}
