//! ACPI's fixed power hardware: the power button, soft-off, and the system control interrupt.
//!
//! What it offers: PM1a event block at 0x600 (status and enable, 16 bits each) and PM1a control block at 0x604,
//! in ACPI mode from power-on; a power button; the clock's interrupt as an event that wakes; the soft-off state
//! S5. It has no sleep button, no PM timer, no
//! SMI, no other sleep state and no general-purpose events, and the FADT says so.
//!
//! ACPI specification 6.5, section 4.8.3.

use std::sync::{Arc, Mutex, PoisonError};

use bitfield_struct::bitfield;

use super::Device;
use super::register::answer;
use super::request::{Request, RequestQueue};
use crate::guest_warn;
use crate::platform::bus::BusDevice;
use crate::platform::irq::IrqLine;
use crate::platform::lanes::LaneWrite;

/// The first port of the PM1a event block; the control block follows it.
pub const PM1A_PORT: u64 = 0x600;
/// Ports of both blocks.
pub const PM1A_PORTS: u64 = 6;
/// The IOAPIC input of the system control interrupt, level-triggered.
pub const SCI_GSI: u32 = 9;
/// What SLP_TYP is for soft-off; the DSDT's `_S5` says the same.
pub const SLP_TYP_S5: u8 = 5;

/// PM1 event grouping: the bits of the status register, and of the enable register where they are enables
/// (ACPI tables 4.12 and 4.13). Those that this board never sets are reserved.
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Events {
    #[bits(5)]
    __: u8,
    /// The firmware released the global lock. There is none, so it is never set, yet guests enable it.
    pub global_lock: bool,
    #[bits(2)]
    __: u8,
    /// The power button was pressed.
    pub power_button: bool,
    __: bool,
    /// The clock interrupts. Enabled by a guest that sleeps, which the clock's own interrupt does not reach.
    pub clock: bool,
    #[bits(5)]
    __: u8,
}

impl Events {
    /// What a guest may enable.
    const ENABLES: Self = Self::new()
        .with_global_lock(true)
        .with_power_button(true)
        .with_clock(true);
    /// What the board may set and the guest clears by writing one.
    const STATUS: Self = Self::new().with_power_button(true).with_clock(true);
}

/// PM1 control (ACPI table 4.14).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct Control {
    /// Power events are the guest's business (SCI), not a firmware's (SMI). Always so here.
    pub sci_enable: bool,
    /// Bus master requests wake a processor from C3. Stored only: there is no C3.
    pub bus_master_reload: bool,
    /// Writing one tells the firmware that the global lock is free. There is no firmware.
    pub global_lock_release: bool,
    #[bits(7)]
    __: u8,
    /// The sleep state that SLP_EN enters.
    #[bits(3)]
    pub sleep_type: u8,
    /// Writing one enters the sleep state; reads as zero.
    pub sleep_enable: bool,
    #[bits(2)]
    __: u8,
}

impl Control {
    const RESET: Self = Self::new().with_sci_enable(true);
    const STORED: Self = Self::new().with_bus_master_reload(true).with_sleep_type(0b111);
}

/// Where the registers lie in the block.
mod offset {
    pub(super) const STATUS: u64 = 0;
    pub(super) const ENABLE: u64 = 2;
    pub(super) const CONTROL: u64 = 4;
    /// Each register's bytes.
    pub(super) const LEN: u64 = 2;
}

#[derive(Debug, Clone, Copy)]
struct Registers {
    status: Events,
    enable: Events,
    control: Control,
}

impl Registers {
    const RESET: Self = Self {
        status: Events::new(),
        enable: Events::new(),
        control: Control::RESET,
    };

    fn bytes(&self) -> u64 {
        let words = [
            self.status.into_bits(),
            self.enable.into_bits(),
            self.control.into_bits(),
        ];
        words
            .into_iter()
            .rev()
            .fold(0, |bytes, word| bytes << 16 | u64::from(word))
    }

    const fn interrupts(&self) -> bool {
        self.status.into_bits() & self.enable.into_bits() != 0
    }

    /// Returns the sleep state that the write enters.
    fn write(&mut self, offset: u64, data: &[u8]) -> Option<u8> {
        let lanes = |register| LaneWrite::of(offset, data, register, offset::LEN);
        let word = |bits: u64| u16::try_from(bits).expect("lanes of a 16-bit register");
        if let Some(lanes) = lanes(offset::STATUS) {
            let bits = lanes.clear(self.status.into_bits().into(), Events::STATUS.into_bits().into());
            self.status = Events::from_bits(word(bits));
        }
        if let Some(lanes) = lanes(offset::ENABLE) {
            let bits = lanes.store(self.enable.into_bits().into(), Events::ENABLES.into_bits().into());
            self.enable = Events::from_bits(word(bits));
        }
        let lanes = lanes(offset::CONTROL)?;
        let bits = lanes.store(
            self.control.into_bits().into(),
            Control::STORED.into_bits().into(),
        );
        self.control = Control::from_bits(word(bits));
        let written = Control::from_bits(word(lanes.store(0, u64::MAX)));
        written.sleep_enable().then_some(self.control.sleep_type())
    }
}

/// The power hardware.
pub struct Power {
    registers: Mutex<Registers>,
    sci: IrqLine,
    requests: Arc<RequestQueue>,
}

impl Power {
    /// Power hardware that interrupts by `sci` and asks `requests` to switch the machine off.
    #[must_use]
    pub fn new(sci: IrqLine, requests: Arc<RequestQueue>) -> Arc<Self> {
        Arc::new(Self {
            registers: Mutex::new(Registers::RESET),
            sci,
            requests,
        })
    }

    /// Press the power button. `false` when the guest has not enabled it, so nobody will answer.
    pub fn press_button(&self) -> bool {
        self.with(|registers| {
            registers.status.set_power_button(true);
            registers.enable.power_button()
        })
    }

    /// The clock began to interrupt.
    pub fn clock_rang(&self) {
        self.with(|registers| registers.status.set_clock(true));
    }

    /// Change the registers, then drive the interrupt as they say.
    fn with<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut registers);
        // Under the lock, so that the wire ends up as the last change left the registers; the controller
        // never calls back here.
        self.sci.set(registers.interrupts());
        result
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes();
        answer(
            data,
            u32::try_from(8 * offset)
                .ok()
                .and_then(|by| bytes.checked_shr(by))
                .unwrap_or(0),
        );
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.with(|registers| registers.write(offset, data)) {
            None => {}
            Some(SLP_TYP_S5) => self.requests.raise(Request::PowerOff),
            Some(other) => {
                guest_warn!("guest asked for sleep type {other}; this machine has only S5, type {SLP_TYP_S5}")
            }
        }
    }
}

impl Device for Power {
    fn name(&self) -> &'static str {
        "acpi-pm"
    }

    fn reset(&self) {
        self.with(|registers| *registers = Registers::RESET);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::irq::InterruptController;
    use std::sync::atomic::{AtomicBool, Ordering};

    const POWER_BUTTON: u16 = 1 << 8;
    const CLOCK: u16 = 1 << 10;
    const SLP_EN: u16 = 1 << 13;

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl InterruptController for Wire {
        fn line_changed(&self, gsi: u32, asserted: bool) {
            assert_eq!(gsi, SCI_GSI);
            self.0.store(asserted, Ordering::Relaxed);
        }
        fn pulse(&self, _gsi: u32) {}
    }

    struct Board {
        wire: Arc<Wire>,
        requests: Arc<RequestQueue>,
        power: Arc<Power>,
    }

    impl Board {
        fn new() -> Self {
            let wire = Arc::new(Wire::default());
            let requests = RequestQueue::new().expect("a descriptor");
            let power = Power::new(IrqLine::new(wire.clone(), SCI_GSI), requests.clone());
            Self {
                wire,
                requests,
                power,
            }
        }

        fn read(&self, offset: u64) -> u16 {
            let mut data = [0; 2];
            self.power.read(offset, &mut data);
            u16::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u16) {
            self.power.write(offset, &value.to_le_bytes());
        }

        fn interrupts(&self) -> bool {
            self.wire.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn bits_are_where_acpi_puts_them() {
        assert_eq!(Events::new().with_global_lock(true).into_bits(), 1 << 5);
        assert_eq!(Events::new().with_power_button(true).into_bits(), POWER_BUTTON);
        assert_eq!(Events::new().with_clock(true).into_bits(), CLOCK);
        assert_eq!(Control::new().with_sci_enable(true).into_bits(), 1);
        assert_eq!(Control::new().with_sleep_type(7).into_bits(), 7 << 10);
        assert_eq!(Control::new().with_sleep_enable(true).into_bits(), SLP_EN);
    }

    #[test]
    fn the_machine_is_in_acpi_mode_from_power_on() {
        let board = Board::new();
        assert_eq!((board.read(0), board.read(2), board.read(4)), (0, 0, 1));
    }

    #[test]
    fn reserved_bits_do_not_stick_and_status_is_not_set_by_writing() {
        let board = Board::new();
        (0..3).for_each(|register| board.write(2 * register, !SLP_EN));
        assert_eq!((board.read(0), board.read(2), board.read(4)), (0, 0x0520, 0x1c03));
    }

    #[test]
    fn an_enabled_button_interrupts_until_it_is_acknowledged() {
        let board = Board::new();
        board.write(2, POWER_BUTTON);
        assert!(board.power.press_button());
        assert!(board.interrupts());
        assert_eq!(board.read(0), POWER_BUTTON);
        board.write(0, POWER_BUTTON);
        assert!(!board.interrupts());
        assert_eq!(board.read(0), 0);
    }

    #[test]
    fn a_button_nobody_enabled_says_so_and_interrupts_once_enabled() {
        let board = Board::new();
        assert!(!board.power.press_button());
        assert!(!board.interrupts());
        board.write(2, POWER_BUTTON);
        assert!(board.interrupts());
    }

    #[test]
    fn a_clock_that_rang_wakes_only_a_guest_that_asked_for_it() {
        let board = Board::new();
        board.power.clock_rang();
        assert!(!board.interrupts());
        assert_eq!(board.read(0), CLOCK);
        board.write(0, CLOCK);
        board.write(2, CLOCK);
        assert!(!board.interrupts());
        board.power.clock_rang();
        assert!(board.interrupts());
        board.write(0, CLOCK);
        assert!(!board.interrupts());
        assert_eq!(board.read(0), 0);
    }

    #[test]
    fn acknowledging_takes_the_lanes_written_and_no_others() {
        let board = Board::new();
        board.power.press_button();
        board.power.write(0, &[0xff]);
        assert_eq!(board.read(0), POWER_BUTTON);
        board.power.write(2, &[0xff, 0xff]);
        assert_eq!(board.read(0), POWER_BUTTON);
        board.power.write(1, &[0x01]);
        assert_eq!(board.read(0), 0);
    }

    #[test]
    fn soft_off_powers_off_whatever_the_width() {
        let value = SLP_EN | u16::from(SLP_TYP_S5) << 10;
        let [_, high] = value.to_le_bytes();
        for (offset, data) in [
            (4, value.to_le_bytes().to_vec()),
            (5, vec![high]),
            (2, [[0, 0], value.to_le_bytes()].concat()),
            (
                0,
                [[0; 4].to_vec(), value.to_le_bytes().to_vec(), vec![0, 0]].concat(),
            ),
        ] {
            let board = Board::new();
            board.power.write(offset, &data);
            assert_eq!(
                board.requests.take(),
                Some(Request::PowerOff),
                "{data:?} at {offset}"
            );
            assert_eq!(board.read(4) & SLP_EN, 0);
        }
    }

    #[test]
    fn choosing_a_sleep_type_first_and_entering_it_later_works() {
        let board = Board::new();
        board.write(4, u16::from(SLP_TYP_S5) << 10);
        assert_eq!(board.requests.take(), None);
        board.write(4, board.read(4) | SLP_EN);
        assert_eq!(board.requests.take(), Some(Request::PowerOff));
    }

    #[test]
    fn sleep_states_the_machine_lacks_do_nothing() {
        let board = Board::new();
        for sleep_type in (0..8).filter(|sleep_type| *sleep_type != u16::from(SLP_TYP_S5)) {
            board.write(4, SLP_EN | sleep_type << 10);
        }
        assert_eq!(board.requests.take(), None);
    }

    #[test]
    fn every_width_at_every_offset_is_answered_within_its_bytes() {
        let board = Board::new();
        board.write(2, POWER_BUTTON);
        board.power.press_button();
        let all = [0x00, 0x01, 0x00, 0x01, 0x01, 0x00, 0, 0, 0, 0, 0, 0, 0, 0];
        for width in [1, 2, 4, 8] {
            for offset in 0..6 {
                let mut data = vec![0xee; width];
                board.power.read(offset as u64, &mut data);
                assert_eq!(data, all[offset..offset + width], "{width} bytes at {offset}");
            }
        }
    }

    #[test]
    fn a_reset_releases_the_interrupt_and_forgets_the_button() {
        let board = Board::new();
        board.write(2, POWER_BUTTON);
        board.power.press_button();
        board.power.reset();
        assert!(!board.interrupts());
        assert_eq!((board.read(0), board.read(2), board.read(4)), (0, 0, 1));
    }
}
