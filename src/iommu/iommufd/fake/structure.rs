//! Structures as the fake kernel reads and writes them.

use std::io;
use std::ops::Range;

use super::refuse;

/// The structure of a request, of exactly the size that the kernel knows.
pub(super) struct Structure<'a>(&'a mut [u8]);

impl<'a> Structure<'a> {
    /// `bytes` as a structure of which the kernel knows `size` bytes and needs `least`.
    pub(super) fn read(bytes: &'a mut [u8], size: usize, least: usize) -> io::Result<Self> {
        let said = bytes
            .get(..4)
            .and_then(|said| said.try_into().ok())
            .map(u32::from_le_bytes);
        assert_eq!(
            said,
            u32::try_from(bytes.len()).ok(),
            "a structure begins with its size"
        );
        if bytes.len() < least {
            return refuse(libc::EINVAL);
        }
        if bytes.len() > size {
            return refuse(libc::E2BIG);
        }
        assert_eq!(
            bytes.len(),
            size,
            "a structure that is shorter than it was ever published"
        );
        Ok(Self(bytes))
    }

    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = self.0.get(at..at + N).expect("inside");
        field.try_into().expect("so many bytes")
    }

    pub(super) fn u8(&self, at: usize) -> u8 {
        u8::from_le_bytes(self.get(at))
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    /// Refuse with `errno` unless all of `range` is 0.
    pub(super) fn zero(&self, range: Range<usize>, errno: i32) -> io::Result<()> {
        let zero = self.0.get(range).expect("inside").iter().all(|byte| *byte == 0);
        if zero { Ok(()) } else { refuse(errno) }
    }

    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        self.0
            .get_mut(at..at + 4)
            .expect("inside")
            .copy_from_slice(&value.to_le_bytes());
    }
}

/// User data of a driver's: as long as the driver's structure, or as short as it takes. Longer data is invalid whatever it
/// says, other than a longer structure of a request is (include/linux/iommu.h of Linux 7.3).
pub(super) struct Tail<'a>(&'a mut [u8]);

impl<'a> Tail<'a> {
    /// `bytes` as a structure of `len` bytes of which the driver needs `least`.
    pub(super) fn read(bytes: &'a mut [u8], len: usize, least: usize) -> io::Result<Self> {
        if (least..=len).contains(&bytes.len()) {
            Ok(Self(bytes))
        } else {
            refuse(libc::EINVAL)
        }
    }

    pub(super) fn zero(&self, range: Range<usize>) -> io::Result<()> {
        let zero = self.0.get(range).expect("inside").iter().all(|byte| *byte == 0);
        if zero { Ok(()) } else { refuse(libc::EOPNOTSUPP) }
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        let field = self.0.get(at..at + 4).expect("inside");
        u32::from_le_bytes(field.try_into().expect("so many bytes"))
    }

    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        self.0
            .get_mut(at..at + 4)
            .expect("inside")
            .copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn set_u64(&mut self, at: usize, value: u64) {
        self.0
            .get_mut(at..at + 8)
            .expect("inside")
            .copy_from_slice(&value.to_le_bytes());
    }
}
