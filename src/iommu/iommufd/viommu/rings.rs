//! The guest's rings, as HW queue objects or as registers of the guest's.

use std::io;

use super::requests::{self, HwQueue};
use crate::guest_warn;
use crate::iommu::amd::spec::registers::Control;
use crate::iommu::iommufd::Kernel;
use crate::iommu::iommufd::abi::Queues;
use crate::iommu::viommu::host::{Queue, QueueKind};
use crate::platform::addr::{Gpa, PAGE_SIZE};

/// Control, MMIO 0018h.
pub(super) const CONTROL: u16 = 0x18;

/// Whether a ring is what the unit can have.
pub(super) fn check(queue: &Queue) -> io::Result<()> {
    let base = queue.base.0;
    if base.is_multiple_of(PAGE_SIZE) && base >> 52 == 0 && (8..=15).contains(&queue.length) {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

/// Type and flags of a ring's HW queue, and where it is.
pub(super) fn as_hw_queue(queues: &Queues, queue: &Queue) -> HwQueue {
    let (queue_type, enable, interrupts) = match queue.kind {
        QueueKind::Command => (queues.command, queues.command_enable, queues.command_interrupts),
        QueueKind::Event => (queues.event, queues.event_enable, queues.event_interrupts),
        QueueKind::Ppr => (queues.ppr, queues.ppr_enable, queues.ppr_interrupts),
    };
    HwQueue {
        queue_type,
        flags: if queue.interrupts {
            enable | interrupts
        } else {
            enable
        },
        base: queue.base,
        length: queue.length.into(),
    }
}

/// How far the object of a ring is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Working {
    /// The unit works on the ring, by the object of this number.
    On(u32),
    /// The object is gone, and the unit may work on the ring all the same.
    Gone,
    /// The unit was told to stop by the object of this number, which is still there.
    Off(u32),
}

/// Have the unit work on `queue` no more, which is `working` until now. What fails changed nothing but that; the rest is
/// done when this is called again.
///
/// AMD's kernel tells its unit of a ring when an object is made, and of nothing when it goes: the unit would go on. So one
/// more is made, of a ring that is off. A kernel that knows no such ring has stopped it by itself, or never does; what the
/// unit goes on to reach then is the guest's own memory.
pub(super) fn stop(
    kernel: &dyn Kernel,
    viommu: u32,
    queues: &Queues,
    queue: &Queue,
    working: &mut Working,
) -> io::Result<()> {
    if let Working::On(id) = *working {
        requests::destroy(kernel, id)?;
        *working = Working::Gone;
    }
    if *working == Working::Gone {
        let off = HwQueue {
            flags: 0,
            ..as_hw_queue(queues, queue)
        };
        match requests::queue_alloc(kernel, viommu, &off) {
            Ok(id) => *working = Working::Off(id),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
                ) =>
            {
                guest_warn!(%error, ring = ?queue.kind, "the host's kernel knows no ring that is off: its unit may go on with one that the guest switched off");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    if let Working::Off(id) = *working {
        requests::destroy(kernel, id)?;
    }
    Ok(())
}

/// Ask for a HW queue that is off and too short for a ring: a kernel that has them takes it, as AMD's does, or finds it
/// invalid, and one that has none says so.
pub(super) fn probe(kernel: &dyn Kernel, viommu: u32, queues: &Queues) -> io::Result<()> {
    // A length of 0 is invalid everywhere.
    const TOO_SHORT: u64 = 1;
    let queue = HwQueue {
        queue_type: queues.command,
        flags: 0,
        base: Gpa(0),
        length: TOO_SHORT,
    };
    match requests::queue_alloc(kernel, viommu, &queue) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        Err(error) => Err(error),
        Ok(id) => requests::destroy(kernel, id).inspect_err(|_| {
            // The vIOMMU cannot go while it is there. The first error is the one that counts.
            let _ = requests::destroy(kernel, id);
        }),
    }
}

/// The register with a ring's base and length, and what the guest has there (section 3.4).
pub(super) fn base_register(queue: &Queue) -> (u16, u64) {
    let register = match queue.kind {
        QueueKind::Command => 0x08,
        QueueKind::Event => 0x10,
        QueueKind::Ppr => 0x38,
    };
    (register, queue.base.0 | u64::from(queue.length) << 56)
}

/// `control` with a ring on. The guest's unit is on then, too.
pub(super) fn with_ring(control: Control, queue: &Queue) -> Control {
    let control = control.with_iommu_en(true);
    let interrupts = queue.interrupts;
    match queue.kind {
        QueueKind::Command => control.with_cmd_buf_en(true).with_com_wait_int_en(interrupts),
        QueueKind::Event => control.with_event_log_en(true).with_event_int_en(interrupts),
        QueueKind::Ppr => control
            .with_ppr_log_en(true)
            .with_ppr_en(true)
            .with_ppr_int_en(interrupts),
    }
}

/// `control` with a ring off.
pub(super) fn without_ring(control: Control, kind: QueueKind) -> Control {
    match kind {
        QueueKind::Command => control.with_cmd_buf_en(false).with_com_wait_int_en(false),
        QueueKind::Event => control.with_event_log_en(false).with_event_int_en(false),
        QueueKind::Ppr => control
            .with_ppr_log_en(false)
            .with_ppr_en(false)
            .with_ppr_int_en(false),
    }
}

/// What a ring without an object is called here: the kernel's own numbers have 31 bits.
pub(super) const fn ring_id(kind: QueueKind) -> u32 {
    match kind {
        QueueKind::Command => 0x8000_0000,
        QueueKind::Event => 0x8000_0001,
        QueueKind::Ppr => 0x8000_0002,
    }
}
