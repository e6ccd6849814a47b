//! Address spaces of the fake kernel, by the seam that all modes use.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;

use super::{Fake, Object, refuse};
use crate::iommu::iommufd::{Copied, Requests};
use crate::platform::addr::GpaRange;
use crate::platform::memory::GuestRam;

impl Fake {
    /// Whether anything is mapped in address space `ioas`.
    pub fn is_filled(&self, ioas: u32) -> bool {
        self.state().filled.contains(&ioas)
    }
}

impl Requests for Fake {
    fn alloc(&self) -> io::Result<u32> {
        Ok(self.ask()?.objects.add(Object::Ioas))
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        self.ask()?.destroy(id)
    }

    fn map(&self, ioas: u32, _ram: &GuestRam, _region: usize) -> io::Result<()> {
        let mut state = self.ask()?;
        match state.objects.get(ioas)? {
            Object::Ioas => state.filled.push(ioas),
            _ => return refuse(libc::ENOENT),
        }
        Ok(())
    }

    fn map_file(&self, ioas: u32, _file: BorrowedFd<'_>, _range: GpaRange) -> io::Result<()> {
        self.ask()?.objects.get(ioas)?;
        Ok(())
    }

    fn windows(&self, ioas: u32) -> io::Result<Vec<RangeInclusive<u64>>> {
        self.ask()?.objects.get(ioas)?;
        Ok(vec![0..=u64::MAX])
    }

    /// Shadows are no part of mode `hw`.
    fn copy(&self, _copy: &Copied) -> io::Result<()> {
        refuse(libc::EOPNOTSUPP)
    }

    /// Shadows are no part of mode `hw`.
    fn unmap(&self, _ioas: u32, _range: RangeInclusive<u64>) -> io::Result<()> {
        refuse(libc::EOPNOTSUPP)
    }
}
