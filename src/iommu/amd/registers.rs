//! The register file: storage, access classes, and what a write sets in motion.
//!
//! Reserved bits read as zero, read-only bits never change by a write, and write-one-to-clear sees only the
//! lanes that were written. A write returns its [`Effect`]; the unit performs it once the file is unlocked.

use super::features::Features;
use super::log::Log;
use super::ring::Ring;
use super::spec::registers::{
    Control, DeviceTableBase, ExclusionBase, ExclusionLimit, Reg, RingBase, RingPointer, Status, XtInterrupt,
};
use crate::platform::lanes::LaneWrite;

/// What the unit owes the guest after a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Effect {
    /// Nothing more.
    None,
    /// Commands may be waiting.
    RunCommands,
    /// What is translated, or how, may have changed.
    Reconfigure {
        /// Control before the write.
        before: Control,
    },
    /// The MSI capability in configuration space takes this.
    ProgramMsi(MsiMirror),
}

/// The MSI capability of the unit's PCI function, as MMIO 0158h to 0164h mirror it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MsiMirror {
    /// Dword 0 of the capability: ID, link and message control.
    pub header: u32,
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

impl MsiMirror {
    /// MSI Enable, the bit of the header that MMIO can write.
    const ENABLE: u64 = 1 << 16;
    /// Message address bits; the lowest two are reserved.
    const ADDRESS: u64 = !3;
    /// Message data has 16 bits.
    const DATA: u64 = 0xffff;

    /// MMIO 0158h: header, and lower address in the upper half.
    const fn header_address(self) -> u64 {
        self.header as u64 | self.address << 32
    }

    /// MMIO 0160h: upper address, and data in the upper half.
    const fn address_data(self) -> u64 {
        self.address >> 32 | (self.data as u64) << 32
    }
}

/// An interrupt of the unit itself. It is not remapped (section 2.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupt {
    /// The message that the MSI capability of the unit's function holds, plus this number.
    Msi {
        /// Message number, added to the data of a multi-message capability.
        number: u8,
    },
    /// Straight from an x2APIC interrupt register.
    X2apic {
        /// 32-bit destination.
        destination: u32,
        /// Logical rather than physical destination.
        logical: bool,
        /// Vector, not 0.
        vector: u8,
        /// Arbitrated (lowest priority) rather than fixed delivery.
        arbitrated: bool,
    },
}

/// The interrupts that one action raised: at most one for each log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Interrupts {
    /// From event log and COMPLETION_WAIT.
    pub event: Option<Interrupt>,
    /// From the PPR log.
    pub ppr: Option<Interrupt>,
}

/// What requests are checked against, apart from tables: published to those who translate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Configuration {
    /// Control.
    pub control: Control,
    /// Exclusion range.
    pub exclusion: Exclusion,
    /// Device table, by segment.
    pub device_table: [DeviceTableBase; 8],
}

/// The range that some or all devices reach untranslated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exclusion {
    /// First page, and for whom.
    pub base: ExclusionBase,
    /// Last page.
    pub limit: ExclusionLimit,
}

impl Interrupts {
    /// Add what a later action raised.
    pub const fn join(&mut self, later: Self) {
        if later.event.is_some() {
            self.event = later.event;
        }
        if later.ppr.is_some() {
            self.ppr = later.ppr;
        }
    }
}

/// Every register of the unit.
#[derive(Clone, Debug)]
pub struct Registers {
    features: Features,
    control: Control,
    device_table: [DeviceTableBase; 8],
    exclusion: Exclusion,
    /// Command buffer.
    pub command: Ring,
    /// An error stopped the command processor until the buffer is switched on anew.
    command_stopped: bool,
    /// Event log.
    pub event: Log,
    /// PPR log.
    pub ppr: Log,
    /// The bits of Status that are kept; run bits follow from the rest.
    latched: Status,
    /// Bits of Status for which an interrupt went out.
    signalled: Status,
    msi_ga: u8,
    msi: MsiMirror,
    xt_event: XtInterrupt,
    xt_ppr: XtInterrupt,
    xt_ga: XtInterrupt,
}

impl Registers {
    /// After reset (section 3.4).
    #[must_use]
    pub fn new(features: Features) -> Self {
        Self {
            features,
            control: Control::RESET,
            device_table: [DeviceTableBase::new(); 8],
            exclusion: Exclusion::default(),
            command: Ring::RESET,
            command_stopped: false,
            event: Log::RESET,
            ppr: Log::RESET,
            latched: Status::new(),
            signalled: Status::new(),
            msi_ga: 0,
            msi: MsiMirror::default(),
            xt_event: XtInterrupt::new(),
            xt_ppr: XtInterrupt::new(),
            xt_ga: XtInterrupt::new(),
        }
    }

    /// Everything but the mirror of configuration space, which has a reset of its own, as after power-on.
    pub fn reset(&mut self) {
        *self = Self {
            msi: self.msi,
            ..Self::new(self.features)
        };
    }

    /// Control.
    #[must_use]
    pub const fn control(&self) -> Control {
        self.control
    }

    /// What translations are checked against.
    #[must_use]
    pub const fn configuration(&self) -> Configuration {
        Configuration {
            control: self.control,
            exclusion: self.exclusion,
            device_table: self.device_table,
        }
    }

    /// Whether commands are fetched (CmdBufRun).
    #[must_use]
    pub const fn command_runs(&self) -> bool {
        self.control.iommu_en()
            && self.control.cmd_buf_en()
            && self.command.is_valid()
            && !self.command_stopped
    }

    /// Whether events are logged (EventLogRun).
    #[must_use]
    pub const fn event_log_runs(&self) -> bool {
        self.control.iommu_en()
            && self.control.event_log_en()
            && self.event.ring.is_valid()
            && !self.event.overflowed
    }

    /// Whether page requests are logged (PprLogRun).
    #[must_use]
    pub const fn ppr_log_runs(&self) -> bool {
        self.control.iommu_en()
            && self.control.ppr_log_en()
            && self.control.ppr_en()
            && self.ppr.ring.is_valid()
            && !self.ppr.overflowed
    }

    /// An error stops the command processor with the head at the command.
    pub const fn stop_commands(&mut self) {
        self.command_stopped = true;
    }

    /// Set bits of Status that a guest clears by writing one.
    pub const fn latch(&mut self, bits: Status) {
        self.latched = Status::from_bits(self.latched.into_bits() | bits.into_bits() & Status::W1C);
    }

    /// Status as it reads.
    #[must_use]
    pub const fn status(&self) -> Status {
        self.latched
            .with_event_log_run(self.event_log_runs())
            .with_cmd_buf_run(self.command_runs())
            .with_ppr_log_run(self.ppr_log_runs())
    }

    /// The MSI capability in configuration space changed.
    pub const fn mirror_msi(&mut self, msi: MsiMirror) {
        self.msi = msi;
    }

    /// The quadword that `reg` names.
    #[must_use]
    pub fn read(&self, reg: Reg) -> u64 {
        match reg {
            Reg::DeviceTableBase => self.device_table[0].into_bits(),
            Reg::SegmentBase(segment) => self.device_table[1 + segment.index()].into_bits(),
            Reg::CommandBase => self.command.base().into_bits(),
            Reg::EventBase => self.event.ring.base().into_bits(),
            Reg::PprBase => self.ppr.ring.base().into_bits(),
            Reg::Control => self.control.into_bits(),
            Reg::ExclusionBase => self.exclusion.base.into_bits(),
            Reg::ExclusionLimit => self.exclusion.limit.into_bits(),
            Reg::Efr => self.features.efr.into_bits(),
            Reg::Efr2 => self.features.efr2.into_bits(),
            Reg::Misc => u64::from(self.features.misc0().into_bits()) | u64::from(self.msi_ga) << 32,
            Reg::MsiHeaderAddress if self.features.efr.msi_cap_mmio() => self.msi.header_address(),
            Reg::MsiAddressData if self.features.efr.msi_cap_mmio() => self.msi.address_data(),
            Reg::MsiHeaderAddress | Reg::MsiAddressData => 0,
            Reg::XtEvent => self.xt_event.into_bits(),
            Reg::XtPpr => self.xt_ppr.into_bits(),
            Reg::XtGa => self.xt_ga.into_bits(),
            Reg::CommandHead => self.command.head_register().into_bits(),
            Reg::CommandTail => self.command.tail_register().into_bits(),
            Reg::EventHead => self.event.ring.head_register().into_bits(),
            Reg::EventTail => self.event.ring.tail_register().into_bits(),
            Reg::Status => self.status().into_bits(),
            Reg::PprHead => self.ppr.ring.head_register().into_bits(),
            Reg::PprTail => self.ppr.ring.tail_register().into_bits(),
        }
    }

    /// The guest wrote lanes of `reg`.
    pub fn write(&mut self, reg: Reg, lanes: LaneWrite) -> Effect {
        match reg {
            Reg::DeviceTableBase => self.write_device_table(0, lanes, 0x1ff),
            Reg::SegmentBase(segment) => {
                self.write_device_table(1 + segment.index(), lanes, segment.largest_size())
            }
            Reg::CommandBase if self.command_runs() => Effect::None,
            Reg::CommandBase => rebase(&mut self.command, lanes),
            Reg::EventBase if self.event_log_runs() => Effect::None,
            Reg::EventBase => rebase(&mut self.event.ring, lanes),
            Reg::PprBase if self.ppr_log_runs() || !self.features.efr.ppr() => Effect::None,
            Reg::PprBase => rebase(&mut self.ppr.ring, lanes),
            Reg::Control => self.write_control(lanes),
            Reg::ExclusionBase => {
                let value = lanes.store(self.exclusion.base.into_bits(), ExclusionBase::WRITABLE);
                self.exclusion.base = ExclusionBase::from_bits(value);
                self.reconfigure()
            }
            Reg::ExclusionLimit => {
                let value = lanes.store(self.exclusion.limit.into_bits(), ExclusionLimit::WRITABLE);
                self.exclusion.limit = ExclusionLimit::from_bits(value);
                self.reconfigure()
            }
            Reg::Efr | Reg::Efr2 => Effect::None,
            Reg::Misc => {
                let value = lanes.store(u64::from(self.msi_ga) << 32, 0x1f << 32);
                self.msi_ga = value.to_be_bytes()[3];
                Effect::None
            }
            Reg::MsiHeaderAddress | Reg::MsiAddressData => self.write_msi(reg, lanes),
            Reg::XtEvent => write_xt(&mut self.xt_event, self.features.efr.xt(), lanes),
            Reg::XtPpr => write_xt(&mut self.xt_ppr, self.features.efr.xt(), lanes),
            Reg::XtGa => write_xt(&mut self.xt_ga, self.features.efr.xt(), lanes),
            Reg::CommandHead if self.command_runs() => Effect::None,
            Reg::CommandHead => {
                self.command
                    .set_head(pointer(self.command.head_register(), lanes));
                Effect::None
            }
            Reg::CommandTail => {
                self.command
                    .set_tail(pointer(self.command.tail_register(), lanes));
                Effect::RunCommands
            }
            Reg::EventHead => {
                let ring = &mut self.event.ring;
                ring.set_head(pointer(ring.head_register(), lanes));
                Effect::None
            }
            Reg::EventTail if self.event_log_runs() => Effect::None,
            Reg::EventTail => {
                let ring = &mut self.event.ring;
                ring.set_tail(pointer(ring.tail_register(), lanes));
                Effect::None
            }
            Reg::PprHead if self.features.efr.ppr() => {
                let ring = &mut self.ppr.ring;
                ring.set_head(pointer(ring.head_register(), lanes));
                Effect::None
            }
            Reg::PprTail if self.features.efr.ppr() && !self.ppr_log_runs() => {
                let ring = &mut self.ppr.ring;
                ring.set_tail(pointer(ring.tail_register(), lanes));
                Effect::None
            }
            Reg::PprHead | Reg::PprTail => Effect::None,
            Reg::Status => {
                self.latched = Status::from_bits(lanes.clear(self.latched.into_bits(), Status::W1C));
                self.signalled = Status::from_bits(self.signalled.into_bits() & self.latched.into_bits());
                Effect::None
            }
        }
    }

    /// The guest wrote lanes of the base register of a ring that somebody else works on: it moves, whether it runs or not.
    /// Other registers, and that of a log that is not offered, stay as they are.
    pub fn move_ring(&mut self, reg: Reg, lanes: LaneWrite) {
        let ring = match reg {
            Reg::CommandBase => &mut self.command,
            Reg::EventBase => &mut self.event.ring,
            Reg::PprBase if self.features.efr.ppr() => &mut self.ppr.ring,
            _ => return,
        };
        let _nothing_more = rebase(ring, lanes);
    }

    /// Interrupts that became due: a status bit and its enable are both set, and no interrupt went out
    /// since the bit was last clear (section 2.8). A register that names no vector keeps it due.
    pub fn take_interrupts(&mut self) -> Interrupts {
        let enabled = Status::new()
            .with_event_overflow(self.control.event_int_en())
            .with_event_log_int(self.control.event_int_en())
            .with_com_wait_int(self.control.com_wait_int_en())
            .with_ppr_overflow(self.control.ppr_int_en())
            .with_ppr_int(self.control.ppr_int_en())
            .into_bits();
        // A source that is switched off and on again signals anew.
        self.signalled = Status::from_bits(self.signalled.into_bits() & enabled);
        let due = Status::from_bits(self.latched.into_bits() & enabled & !self.signalled.into_bits());
        let mut raised = Interrupts::default();
        if due.event_overflow() || due.event_log_int() || due.com_wait_int() {
            raised.event = self.interrupt(self.xt_event);
            if raised.event.is_some() {
                self.signalled = self
                    .signalled
                    .with_event_overflow(self.signalled.event_overflow() || due.event_overflow())
                    .with_event_log_int(self.signalled.event_log_int() || due.event_log_int())
                    .with_com_wait_int(self.signalled.com_wait_int() || due.com_wait_int());
            }
        }
        if due.ppr_overflow() || due.ppr_int() {
            raised.ppr = self.interrupt(self.xt_ppr);
            if raised.ppr.is_some() {
                self.signalled = self
                    .signalled
                    .with_ppr_overflow(self.signalled.ppr_overflow() || due.ppr_overflow())
                    .with_ppr_int(self.signalled.ppr_int() || due.ppr_int());
            }
        }
        raised
    }

    /// The interrupt that goes out now by `register` or by the MSI capability; every log uses message 0 of
    /// the latter, as the capability block says.
    fn interrupt(&self, register: XtInterrupt) -> Option<Interrupt> {
        if !self.control.int_cap_xt_en() {
            return Some(Interrupt::Msi { number: 0 });
        }
        (register.vector() != 0).then(|| Interrupt::X2apic {
            destination: register.destination(),
            logical: register.logical(),
            vector: register.vector(),
            arbitrated: register.arbitrated(),
        })
    }

    const fn reconfigure(&self) -> Effect {
        Effect::Reconfigure { before: self.control }
    }

    fn write_device_table(&mut self, index: usize, lanes: LaneWrite, largest: u16) -> Effect {
        if index > 0 && index >> self.features.efr.dev_tbl_seg() != 0 {
            return Effect::None;
        }
        let base = &mut self.device_table[index];
        let writable = DeviceTableBase::WRITABLE & !u64::from(0x1ff & !largest);
        *base = DeviceTableBase::from_bits(lanes.store(base.into_bits(), writable));
        self.reconfigure()
    }

    /// Section 3.4.4; what several bits of one write do has an order that the unit keeps.
    fn write_control(&mut self, lanes: LaneWrite) -> Effect {
        let before = self.control;
        let writable = self.features.control_writable().into_bits();
        let after = Control::from_bits(lanes.store(before.into_bits(), writable));
        if after.dev_tbl_seg_en() > self.features.efr.dev_tbl_seg() {
            return Effect::None;
        }
        self.switch(after);
        Effect::Reconfigure { before }
    }

    /// Put `after` into Control; a log that is switched on has lost nothing yet, and a command buffer no error.
    fn switch(&mut self, after: Control) {
        let before = self.control;
        let rises = |bit: fn(&Control) -> bool| !bit(&before) && bit(&after);
        if rises(Control::cmd_buf_en) {
            self.command_stopped = false;
        }
        if rises(Control::event_log_en) {
            self.event.overflowed = false;
            self.latched.set_event_overflow(false);
        }
        if rises(Control::ppr_log_en) {
            self.ppr.overflowed = false;
            self.latched.set_ppr_overflow(false);
        }
        self.control = after;
    }

    fn write_msi(&mut self, reg: Reg, lanes: LaneWrite) -> Effect {
        if !self.features.efr.msi_cap_mmio() {
            return Effect::None;
        }
        if reg == Reg::MsiHeaderAddress {
            let writable = MsiMirror::ENABLE | (MsiMirror::ADDRESS & 0xffff_ffff) << 32;
            let [header, address] = halves(lanes.store(self.msi.header_address(), writable));
            self.msi.header = header;
            self.msi.address = self.msi.address & !0xffff_ffff | u64::from(address);
        } else {
            let writable = 0xffff_ffff | MsiMirror::DATA << 32;
            let [address, data] = halves(lanes.store(self.msi.address_data(), writable));
            self.msi.address = self.msi.address & 0xffff_ffff | u64::from(address) << 32;
            self.msi.data = data;
        }
        Effect::ProgramMsi(self.msi)
    }
}

/// Lower and upper half.
const fn halves(quadword: u64) -> [u32; 2] {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = quadword.to_le_bytes();
    [
        u32::from_le_bytes([b0, b1, b2, b3]),
        u32::from_le_bytes([b4, b5, b6, b7]),
    ]
}

/// Write the base register of a ring that does not run.
fn rebase(ring: &mut Ring, lanes: LaneWrite) -> Effect {
    let base = RingBase::from_bits(lanes.store(ring.base().into_bits(), RingBase::WRITABLE));
    ring.set_base(base);
    Effect::None
}

/// The entry that a write to a head or tail register leaves there.
fn pointer(old: RingPointer, lanes: LaneWrite) -> u16 {
    RingPointer::from_bits(lanes.store(old.into_bits(), RingPointer::WRITABLE)).entry()
}

fn write_xt(register: &mut XtInterrupt, exists: bool, lanes: LaneWrite) -> Effect {
    let writable = if exists { XtInterrupt::WRITABLE } else { 0 };
    *register = XtInterrupt::from_bits(lanes.store(register.into_bits(), writable));
    Effect::None
}

pub mod guest;

#[cfg(test)]
mod tests;
