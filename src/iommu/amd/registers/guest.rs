//! The registers of a guest's unit that the hardware keeps: those of page 3, and what VF control MMIO says of its rings.
//!
//! It is the same file as the unit's own. What Control and the base registers are to the unit, VF control MMIO is to a
//! guest's page: the host writes it, and the guest has no way to.

use super::Registers;
use crate::iommu::amd::features::Features;
use crate::iommu::amd::log::Log;
use crate::iommu::amd::ring::Ring;
use crate::iommu::amd::spec::registers::{Control, Reg, RingBase, Status};
use crate::iommu::amd::spec::viommu::{CommandControl, EventControl, PprControl};

/// What the host said of a guest's rings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rings {
    /// Guest command control.
    pub command: CommandControl,
    /// Guest event control.
    pub event: EventControl,
    /// Guest PPR control.
    pub ppr: PprControl,
}

impl Registers {
    /// A guest's page as after reset. While no ring is given, heads and tails keep every bit they can have.
    #[must_use]
    pub fn of_guest(features: Features) -> Self {
        let mut registers = Self::new(features);
        let longest = RingBase::new().with_length(15);
        registers.command.set_base(longest);
        registers.event.ring.set_base(longest);
        registers.ppr.ring.set_base(longest);
        registers.control = Control::new();
        registers
    }

    /// Whether `reg` is in a guest's page.
    #[must_use]
    pub const fn in_page(reg: Reg) -> bool {
        matches!(
            reg,
            Reg::CommandHead
                | Reg::CommandTail
                | Reg::EventHead
                | Reg::EventTail
                | Reg::Status
                | Reg::PprHead
                | Reg::PprTail
        )
    }

    /// Work on `rings`, as far as Control of the unit (`unit`) lets guests' rings run. A ring that is switched off stays
    /// where it was.
    pub fn set_rings(&mut self, rings: &Rings, unit: Control) {
        let Rings { command, event, ppr } = rings;
        let base = |frame, length| RingBase::new().with_frame(frame).with_length(length);
        if command.enable() {
            self.command.move_to(base(command.frame(), command.length()));
        }
        if event.enable() {
            self.event.ring.move_to(base(event.frame(), event.length()));
        }
        if ppr.enable() {
            self.ppr.ring.move_to(base(ppr.frame(), ppr.length()));
        }
        let serves = unit.iommu_en() && unit.viommu_en() && unit.gst_buffer_trp_mode();
        let after = Control::new()
            .with_iommu_en(serves)
            .with_cmd_buf_en(unit.vcmd_en() && command.enable())
            .with_com_wait_int_en(command.interrupt())
            .with_event_log_en(event.enable())
            .with_event_int_en(event.interrupt())
            .with_ppr_log_en(ppr.enable())
            .with_ppr_int_en(ppr.interrupt())
            .with_ppr_en(ppr.requests());
        self.switch(after);
    }

    /// RESET_VMMIO: heads, tails and Status as after reset, and what stopped a ring forgotten.
    pub fn reset_page(&mut self) {
        let empty = |ring: &mut Ring| ring.set_base(ring.base());
        empty(&mut self.command);
        self.command_stopped = false;
        for log in [&mut self.event, &mut self.ppr] {
            let Log { ring, overflowed } = log;
            empty(ring);
            *overflowed = false;
        }
        self.latched = Status::new();
        self.signalled = Status::new();
    }
}
