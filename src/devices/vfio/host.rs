//! The seam to the host: everything that is ever asked of a function that is passed through.
//!
//! [`super::cdev::Cdev`] asks the kernel; tests put a function of their own behind it, whose registers and failures
//! they choose.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::iommu::iommufd::Attach;
use crate::platform::addr::Sbdf;
use crate::platform::device_memory::DeviceMemory;

/// Bytes of a page, in which memory is mapped.
pub const PAGE: u64 = 0x1000;

/// A stretch of a function's own addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Region {
    /// The BAR of this register, 0 to 5.
    Bar(u8),
    /// Configuration space.
    Config,
}

/// What a region is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0 for a region that is not there.
    pub size: u64,
    /// Stretches that may be mapped, as offset and length; empty when none may.
    pub mappable: Vec<(u64, u64)>,
}

/// A kind of interrupt of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Interrupt {
    /// By wire, a level.
    Intx,
    /// By MSI.
    Msi,
    /// By MSI-X.
    Msix,
}

/// What interrupts of one kind a function has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InterruptInfo {
    /// How many.
    pub count: u32,
    /// Whether vectors can be added while others are in use.
    pub grows: bool,
}

/// The answer of a host that has fewer vectors to give than were asked for. It set up none of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the host has {has} to give of {asked} vectors")]
pub struct Fewer {
    /// How many can be had, at least 1.
    pub has: u32,
    /// How many were asked for.
    pub asked: u32,
}

impl Fewer {
    /// What `error` says, if it says that.
    #[must_use]
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

impl From<Fewer> for io::Error {
    fn from(fewer: Fewer) -> Self {
        Self::other(fewer)
    }
}

/// What the host has to say about a function while a guest has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Notice {
    /// It reported an error that it does not recover from by itself.
    Error,
    /// The host wants it back: its driver is being unbound, or it is being removed.
    Wanted,
}

/// A function of the host that a reset of a bus or slot concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Companion {
    /// Which.
    pub at: Sbdf,
    /// Nobody else can have it: it is bound as the function that was asked is, or belongs to an IOMMU group of such, or to a
    /// group that the machine has.
    pub ours: bool,
}

/// A function of the host, open and bound, and attached to an address space from [`Attach::attach`] on.
///
/// Dropping it detaches, resets and closes it. Every refusal leaves the function as it was.
pub trait HostFunction: Attach {
    /// The number of its binding, by which requests for objects of IOMMUs name it; 0, which names
    /// nothing, for one of a group. Never changes.
    fn id(&self) -> u32;

    /// What `region` is. Never changes.
    fn region(&self, region: Region) -> RegionInfo;

    /// What interrupts of `kind` there are. Never changes.
    fn interrupt(&self, kind: Interrupt) -> InterruptInfo;

    /// Whether [`HostFunction::reset`] can work.
    fn resets(&self) -> bool;

    /// Read `data.len()` bytes at `offset` of `region`.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Write `data` at `offset` of `region`.
    fn write(&self, region: Region, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Map `len` bytes from `offset` of `region` on, both multiples of 4 KiB.
    fn map(&self, region: Region, offset: u64, len: u64) -> io::Result<Arc<DeviceMemory>>;

    /// `len` bytes from `offset` of `region` on, both multiples of 4 KiB, as a dma-buf for other devices' address spaces. What
    /// it is mapped to leads nowhere once the function was reset or closed.
    ///
    /// # Errors
    /// When the host gives none of this function: kernels before Linux 7 do not.
    fn export(&self, region: Region, offset: u64, len: u64) -> io::Result<OwnedFd>;

    /// Signal `eventfds` when the vectors of `kind` from `first` on interrupt; `None` for nothing. Interrupts of this
    /// kind are on from here on.
    ///
    /// # Errors
    /// When the host refuses it, as it does while interrupts of another kind are on; [`Fewer`] when it has not that many. If
    /// none of this kind were on, none are.
    fn set_interrupts(&self, kind: Interrupt, first: u32, eventfds: &[Option<&EventFd>]) -> io::Result<()>;

    /// Interrupts of `kind` are off from here on, all of them.
    ///
    /// # Errors
    /// When the host refuses it, as it does where none of this kind are on.
    fn disable_interrupts(&self, kind: Interrupt) -> io::Result<()>;

    /// The wire may interrupt again, which it did once.
    fn unmask_intx(&self) -> io::Result<()>;

    /// Signal `eventfd` when the host has `notice` to give.
    fn notify(&self, notice: Notice, eventfd: &EventFd) -> io::Result<()>;

    /// The file by which the kernel's VFIO knows it, for a hypervisor to be told; `None` where there is none.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Back to the state after power-on.
    fn reset(&self) -> io::Result<()>;

    /// All functions that [`HostFunction::hot_reset`] resets, this one among them.
    ///
    /// # Errors
    /// When there is no such reset.
    fn companions(&self) -> io::Result<Vec<Companion>>;

    /// All functions of the bus or slot back to the state after power-on. Their configuration is kept.
    ///
    /// # Errors
    /// When there is no such reset, or one of the functions is not ours.
    fn hot_reset(&self) -> io::Result<()>;
}
