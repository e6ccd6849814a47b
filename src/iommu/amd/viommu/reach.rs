//! Memory as the host table of one device's entry maps it: a guest's own, or the unit's private address space.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::iommu::amd::Unit;
use crate::iommu::amd::device_table::{Decision, decide};
use crate::iommu::amd::memory::{SystemMemory, Unreachable};
use crate::iommu::amd::registers::Exclusion;
use crate::iommu::amd::request::{Access, Request};
use crate::iommu::amd::spec::registers::Control;
use crate::iommu::amd::walk::HostTable;
use crate::platform::addr::{Bdf, Gpa, Iova};

/// Memory by the addresses of one device.
pub(super) struct Reached<'a, M> {
    memory: &'a M,
    allowed: Access,
    /// `None`: every address is its own.
    table: Option<HostTable>,
}

impl<M: SystemMemory> Unit<M> {
    /// Memory as `device` reaches it; `None` when its entry names no host table.
    pub(super) fn reach(&self, device: Bdf) -> Option<Reached<'_, M>> {
        let dte = self.entry(device).ok()?;
        let control = Control::from_bits(self.control.load(Ordering::Acquire));
        let anything = Request::plain(device, Iova(0), Access::NONE);
        let (allowed, table) = match decide(control, Exclusion::default(), &dte, &anything) {
            Decision::Identity(allowed) => (allowed, None),
            Decision::Host { allowed, table, .. } => (allowed, Some(table)),
            _ => return None,
        };
        Some(Reached {
            memory: &self.memory,
            allowed,
            table,
        })
    }
}

impl<M: SystemMemory> Reached<'_, M> {
    /// Where `at` lies, and how many bytes follow it there.
    fn place(&self, at: u64, need: Access) -> Result<(Gpa, u64), Unreachable> {
        if !self.allowed.allows(need) {
            return Err(Unreachable);
        }
        let Some(table) = &self.table else {
            return Ok((Gpa(at), u64::MAX - at));
        };
        let leaf = table.walk(self.memory, at, need).map_err(|_| Unreachable)?;
        let size = 1 << leaf.shift;
        Ok((Gpa(leaf.target(at)), size - (at & (size - 1))))
    }

    /// Call `each` for every piece of `len` bytes from `at` on, with its place among them.
    fn pieces(
        &self,
        at: Gpa,
        len: usize,
        need: Access,
        mut each: impl FnMut(Gpa, Range<usize>) -> Result<(), Unreachable>,
    ) -> Result<(), Unreachable> {
        let mut done = 0;
        while done < len {
            let from = at.0.checked_add(done as u64).ok_or(Unreachable)?;
            let (target, run) = self.place(from, need)?;
            let run = usize::try_from(run).unwrap_or(usize::MAX).min(len - done);
            if run == 0 {
                return Err(Unreachable);
            }
            each(target, done..done + run)?;
            done += run;
        }
        Ok(())
    }

    /// Do `f` where the quadword at `at` lies.
    fn quadword<T>(
        &self,
        at: Gpa,
        need: Access,
        f: impl FnOnce(Gpa) -> Result<T, Unreachable>,
    ) -> Result<T, Unreachable> {
        self.place(at.0, need).and_then(|(target, _)| f(target))
    }
}

impl<M: SystemMemory> SystemMemory for Reached<'_, M> {
    fn read(&self, at: Gpa, data: &mut [u8]) -> Result<(), Unreachable> {
        self.pieces(at, data.len(), Access::READ, |target, part| {
            self.memory.read(target, &mut data[part])
        })
    }

    fn write(&self, at: Gpa, data: &[u8]) -> Result<(), Unreachable> {
        // All of it or none: every page is asked for before the first is written.
        self.pieces(at, data.len(), Access::WRITE, |_, _| Ok(()))?;
        self.pieces(at, data.len(), Access::WRITE, |target, part| {
            self.memory.write(target, &data[part])
        })
    }

    fn load(&self, at: Gpa) -> Result<u64, Unreachable> {
        self.quadword(at, Access::READ, |target| self.memory.load(target))
    }

    fn store(&self, at: Gpa, value: u64) -> Result<(), Unreachable> {
        self.quadword(at, Access::WRITE, |target| self.memory.store(target, value))
    }

    fn compare_exchange(&self, at: Gpa, old: u64, new: u64) -> Result<Result<(), u64>, Unreachable> {
        self.quadword(at, Access::BOTH, |target| {
            self.memory.compare_exchange(target, old, new)
        })
    }
}
