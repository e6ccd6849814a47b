//! What the model's host does with its unit: memory laid out, the unit switched on, entries written, commands submitted,
//! events read. All of it goes by registers and memory, as a kernel's would.

use std::io;

use super::memory::{OWN, SimMemory};
use super::tables::{LEVELS, TablePages};
use crate::guest_warn;
use crate::iommu::amd::memory::SystemMemory;
use crate::iommu::amd::spec::command::{CompletionWait, InvalidateDevice, InvalidatePages, Opcode};
use crate::iommu::amd::spec::dte::{Dte, Guest, Host, Interrupt};
use crate::iommu::amd::spec::event::{Code, Record};
use crate::iommu::amd::spec::irte::IrteGa;
use crate::iommu::amd::spec::registers::{Control, RingBase, RingPointer, Status};
use crate::iommu::amd::spec::viommu::{
    COMMAND_DIRTY, COMMAND_DIRTY_LEN, ControlReg, DEVICE_MAP_LEN, DEVICE_MAPS, DOMAIN_MAP_LEN, DOMAIN_MAPS,
    InterruptTablePointer,
};
use crate::iommu::amd::viommu::GuestLog;
use crate::iommu::amd::{Effects, Unit};
use crate::iommu::viommu::host::{HardwareErrors, InterruptTarget};
use crate::platform::addr::{Bdf, Gpa, PAGE_SIZE};

/// The number by which the unit knows the guest. Drivers for the hardware use no 0.
pub(super) const GUEST: u16 = 1;
/// The unit's own function.
pub(super) const OWN_FUNCTION: Bdf = Bdf::from_requester_id(0x0002);
/// By whose entry the unit finds the guest's buffers: a function that there is not.
pub(super) const TRANSLATE_DEVICE: Bdf = Bdf::from_requester_id(0x4800);

/// Domains of the host's own.
const PRIVATE_DOMAIN: u16 = 1;
const PARENT_DOMAIN: u16 = 2;
const BLOCKED_DOMAIN: u16 = 3;
/// Domains of the guest's come from here on.
pub(super) const FIRST_DOMAIN: u16 = 0x100;

/// Where things are in the host's own memory.
const DEVICE_TABLE: u64 = OWN;
const RING: u64 = OWN + 0x20_0000;
const LOG: u64 = OWN + 0x20_1000;
const FLAG: u64 = OWN + 0x20_2000;
/// First level of the extended interrupt remapping table, and behind it a second level for each log.
const INTERRUPTS: u64 = OWN + 0x20_4000;
const INTERRUPTS_OF: u64 = INTERRUPTS + InterruptTablePointer::TABLE_LEN;
const DIRTY: u64 = OWN + 0x20_8000;
const MAPS: u64 = OWN + 0x40_0000;
const TABLES: u64 = OWN + 0x60_0000;

/// Logarithm of the entries of ring and log.
const LENGTH: u8 = 8;
/// Bytes of them.
const RING_LEN: u64 = 0x1000;

/// Offsets of the unit's registers.
mod reg {
    pub(super) const DEVICE_TABLE: u64 = 0x00;
    pub(super) const COMMAND_BASE: u64 = 0x08;
    pub(super) const EVENT_BASE: u64 = 0x10;
    pub(super) const CONTROL: u64 = 0x18;
    pub(super) const COMMAND_TAIL: u64 = 0x2008;
    pub(super) const EVENT_HEAD: u64 = 0x2010;
    pub(super) const EVENT_TAIL: u64 = 0x2018;
    pub(super) const STATUS: u64 = 0x2020;
}

/// Everything the host switches on.
fn control() -> Control {
    Control::new()
        .with_iommu_en(true)
        .with_coherent(true)
        .with_cmd_buf_en(true)
        .with_event_log_en(true)
        .with_event_int_en(true)
        .with_ppr_en(true)
        .with_gt_en(true)
        .with_vcmd_en(true)
        .with_viommu_en(true)
        .with_gcr3_trp_mode(true)
        .with_gst_buffer_trp_mode(true)
}

/// The host's tables, and its place in its command ring. Who has it exclusively submits commands.
pub(super) struct Kernel {
    /// Guest physical memory.
    parent: u64,
    /// Nothing.
    blocked: u64,
    /// ATS is on for every device.
    ats: bool,
    /// Byte of the ring.
    tail: u64,
    sequence: u64,
}

/// Write a 64-bit register of the unit.
fn write(unit: &Unit<SimMemory>, at: u64, value: u64) -> Effects {
    unit.mmio_write(at, &value.to_le_bytes())
}

fn read(unit: &Unit<SimMemory>, at: u64) -> u64 {
    let mut data = [0; 8];
    unit.mmio_read(at, &mut data);
    u64::from_le_bytes(data)
}

fn store(memory: &SimMemory, at: u64, value: u64) {
    memory.store(Gpa(at), value).expect("the host's own memory");
}

impl Kernel {
    /// Lay out memory, and switch `unit` on. `devices` reach nothing, and have ATS on if `ats`.
    pub(super) fn start(
        unit: &Unit<SimMemory>,
        memory: &SimMemory,
        ats: bool,
        devices: impl Iterator<Item = Bdf>,
    ) -> io::Result<Self> {
        let mut pages = TablePages::new(TABLES, SimMemory::end());
        let parent = pages.table()?;
        for range in memory.guest().ranges() {
            // What is left of a page at either end is no page.
            let first = range.start().0.next_multiple_of(PAGE_SIZE);
            let end = (range.start().0 + range.len()) & !(PAGE_SIZE - 1);
            pages.map(memory, parent, first, first, end.saturating_sub(first))?;
        }
        let blocked = pages.table()?;
        let private = pages.table()?;
        let guest = u64::from(GUEST);
        let device_maps = DEVICE_MAPS + guest * DEVICE_MAP_LEN;
        pages.map(memory, private, device_maps, MAPS, DEVICE_MAP_LEN)?;
        pages.map(memory, private, COMMAND_DIRTY, DIRTY, COMMAND_DIRTY_LEN)?;
        let domain_maps = DOMAIN_MAPS + guest * DOMAIN_MAP_LEN;
        pages.map(
            memory,
            private,
            domain_maps,
            MAPS + DEVICE_MAP_LEN,
            DOMAIN_MAP_LEN,
        )?;
        let kernel = Self {
            parent,
            blocked,
            ats,
            tail: 0,
            sequence: 0,
        };
        for log in [GuestLog::Event, GuestLog::Ppr] {
            let pointer = InterruptTablePointer::new()
                .with_valid(true)
                .with_root(second_level(log) >> 6);
            let at = INTERRUPTS + (log.index(GUEST) >> 8) * InterruptTablePointer::LEN;
            store(memory, at, pointer.into_bits());
        }
        let own = Dte {
            interrupt: Interrupt::new()
                .with_iv(true)
                .with_int_ctl(2)
                .with_root(INTERRUPTS >> 6),
            ..table(private, PRIVATE_DOMAIN)
        };
        write_entry(memory, OWN_FUNCTION, &own);
        for device in devices {
            write_entry(memory, device, &kernel.blocked());
        }
        let ring = |at: u64| {
            RingBase::new()
                .with_frame(at >> 12)
                .with_length(LENGTH)
                .into_bits()
        };
        for (at, value) in [
            (reg::DEVICE_TABLE, DEVICE_TABLE | 0x1ff),
            (reg::COMMAND_BASE, ring(RING)),
            (reg::EVENT_BASE, ring(LOG)),
            (reg::CONTROL, control().into_bits()),
        ] {
            let effects = write(unit, at, value);
            assert_eq!(effects, Effects::default(), "a unit that comes up owes nothing");
        }
        Ok(kernel)
    }

    /// An entry that leads to guest physical memory.
    pub(super) fn parent(&self) -> Dte {
        table(self.parent, PARENT_DOMAIN)
    }

    /// The same for a device, which the unit trusts to translate by itself where ATS is on.
    pub(super) fn passing(&self) -> Dte {
        let parent = self.parent();
        Dte {
            guest: parent.guest.with_iotlb(self.ats),
            ..parent
        }
    }

    /// An entry that leads nowhere. What the device has translated before is of no use to it.
    pub(super) fn blocked(&self) -> Dte {
        table(self.blocked, BLOCKED_DOMAIN)
    }

    /// Have the unit use `entry` for `device`; when this returns, nothing goes by the old one.
    pub(super) fn set_entry(
        &mut self,
        unit: &Unit<SimMemory>,
        memory: &SimMemory,
        device: Bdf,
        entry: &Dte,
    ) -> Effects {
        write_entry(memory, device, entry);
        let device = InvalidateDevice::new()
            .with_device(device.requester_id())
            .with_opcode(Opcode::INVALIDATE_DEVTAB_ENTRY.0);
        self.submit(unit, memory, &[device.into_bits()])
    }

    /// Have the unit forget what it knows of `domain`.
    pub(super) fn forget(&mut self, unit: &Unit<SimMemory>, memory: &SimMemory, domain: u16) -> Effects {
        let pages = InvalidatePages::new()
            .with_domain(domain)
            .with_size(true)
            .with_pde(true)
            .with_page(u64::MAX >> 13)
            .with_opcode(Opcode::INVALIDATE_IOMMU_PAGES.0);
        self.submit(unit, memory, &[pages.into_bits()])
    }

    /// Have interrupts of `log` of the guest go to `target`, or nowhere.
    ///
    /// AMD's kernel names the virtual APIC of a processor; a machine before the model has none, so that the entry is one
    /// like any device's.
    pub(super) fn route(
        &mut self,
        unit: &Unit<SimMemory>,
        memory: &SimMemory,
        log: GuestLog,
        target: Option<InterruptTarget>,
    ) -> Effects {
        let entry = target.map_or_else(IrteGa::new, |target| {
            let [low @ .., high] = target.destination.to_le_bytes();
            let [b0, b1, b2] = low;
            IrteGa::new()
                .with_remap_en(true)
                .with_dm(target.logical)
                .with_vector(target.vector)
                .with_destination_23_0(u32::from_le_bytes([b0, b1, b2, 0]))
                .with_destination_31_24(high)
        });
        let at = second_level(log) + (log.index(GUEST) & 0xff) * IrteGa::LEN;
        let [b0, b1, b2, b3, b4, b5, b6, b7, rest @ ..] = entry.into_bits().to_le_bytes();
        // Off, then the half that says nothing by itself, then the one that switches it on.
        store(memory, at, 0);
        store(memory, at + 8, u64::from_le_bytes(rest));
        store(memory, at, u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]));
        let own = InvalidateDevice::new()
            .with_device(OWN_FUNCTION.requester_id())
            .with_opcode(Opcode::INVALIDATE_INTERRUPT_TABLE.0);
        self.submit(unit, memory, &[own.into_bits()])
    }

    /// Submit `commands`, fewer than the ring has entries, and wait until all are done.
    pub(super) fn submit(
        &mut self,
        unit: &Unit<SimMemory>,
        memory: &SimMemory,
        commands: &[u128],
    ) -> Effects {
        self.sequence += 1;
        let wait = CompletionWait::new()
            .with_store(true)
            .with_address_51_3(FLAG >> 3)
            .with_data(self.sequence)
            .with_opcode(Opcode::COMPLETION_WAIT.0);
        for command in commands.iter().copied().chain([wait.into_bits()]) {
            memory
                .write(Gpa(RING + self.tail), &command.to_le_bytes())
                .expect("the host's own memory");
            self.tail = (self.tail + 16) % RING_LEN;
        }
        let mut effects = write(unit, reg::COMMAND_TAIL, self.tail);
        // Another thread may be at it, who switched the log on anew.
        while memory.load(Gpa(FLAG)).expect("the host's own memory") != self.sequence {
            std::thread::yield_now();
            effects.join(unit.run_commands());
        }
        effects.more_commands = false;
        effects
    }

    /// Empty the guest's maps, which nobody uses.
    pub(super) fn clear_maps(memory: &SimMemory) {
        let zeros = [0; 0x1000];
        for at in (MAPS..MAPS + DEVICE_MAP_LEN + DOMAIN_MAP_LEN).step_by(zeros.len()) {
            memory.write(Gpa(at), &zeros).expect("the host's own memory");
        }
    }
}

/// The second level that has the entry of the guest's `log`.
const fn second_level(log: GuestLog) -> u64 {
    match log {
        GuestLog::Event => INTERRUPTS_OF,
        GuestLog::Ppr => INTERRUPTS_OF + PAGE_SIZE,
    }
}

/// Write a register that controls the guest.
pub(super) fn control_guest(unit: &Unit<SimMemory>, reg: ControlReg, value: u64) -> Effects {
    unit.vf_control_write(GUEST, reg.offset(), &value.to_le_bytes())
}

/// An entry of a host table.
fn table(root: u64, domain: u16) -> Dte {
    Dte {
        host: Host::new()
            .with_v(true)
            .with_tv(true)
            .with_mode(LEVELS)
            .with_root(root >> 12)
            .with_ir(true)
            .with_iw(true),
        guest: Guest::new().with_domain(domain),
        ..Dte::default()
    }
}

/// Write the entry of `device`. Whoever reads it meanwhile finds the old one, the new one or a blocked device, and never
/// halves of two.
fn write_entry(memory: &SimMemory, device: Bdf, entry: &Dte) {
    let at = DEVICE_TABLE + u64::from(device.requester_id()) * Dte::LEN;
    let [host, guest, interrupt, attribute] = entry.into_quadwords();
    store(memory, at, Host::new().with_v(true).into_bits());
    store(memory, at + 8, guest);
    store(memory, at + 16, interrupt);
    store(memory, at + 24, attribute);
    store(memory, at, host);
}

/// Read the unit's event log to its end. What guests do to themselves goes to their own, so what stands here concerns
/// the operator; but for `errors` with the guest, which whoever serves it takes.
pub(super) fn read_events(
    unit: &Unit<SimMemory>,
    memory: &SimMemory,
    name: &str,
    errors: &mut HardwareErrors,
) -> Effects {
    // Bits first, so that a record that comes later sets them again.
    let status = Status::from_bits(read(unit, reg::STATUS));
    let mut effects = write(unit, reg::STATUS, Status::W1C);
    let entry = |at| u64::from(RingPointer::from_bits(read(unit, at)).entry()) * 16;
    let (mut head, tail) = (entry(reg::EVENT_HEAD), entry(reg::EVENT_TAIL));
    while head != tail {
        let mut bytes = [0; 16];
        memory
            .read(Gpa(LOG + head), &mut bytes)
            .expect("the host's own memory");
        head = (head + 16) % RING_LEN;
        let record = Record::from_bits(u128::from_le_bytes(bytes));
        // Of guests there is one.
        match Code(record.code()) {
            Code::GUEST_EVENT_FAULT => {
                errors.lost_records += 1;
                continue;
            }
            Code::VIOMMU_HARDWARE_ERROR => {
                errors.broken_at = errors.broken_at.or(Some(record.address()));
                continue;
            }
            _ => {}
        }
        let device = Bdf::from_requester_id(record.device());
        guest_warn!(
            unit = name,
            event = %Code(record.code()),
            device = %device,
            domain = record.domain(),
            address = format_args!("{:#x}", record.address()),
            "the modelled host's IOMMU reports"
        );
    }
    effects.join(write(unit, reg::EVENT_HEAD, head));
    if status.event_overflow() {
        effects.join(write(
            unit,
            reg::CONTROL,
            control().with_event_log_en(false).into_bits(),
        ));
        effects.join(write(unit, reg::CONTROL, control().into_bits()));
    }
    effects
}
