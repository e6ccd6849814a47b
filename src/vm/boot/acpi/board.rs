//! What the tables tell the guest about the board's fixed devices, in the widths that tables have.
//!
//! The devices' own files say where their ports and inputs are, `layout` where those in memory lie. Only
//! what no device knows of itself is decided here.

use crate::devices::{hpet, power, pvpanic, reset, rtc, serial};

/// I/O APIC's own ID. Processors may have the same one: the two kinds are numbered apart since the xAPIC.
pub const IOAPIC_ID: u8 = 0;

/// PM1a event block: status and enable, 16 bits each.
pub(super) const PM1A_EVENT_PORT: u16 = port(power::PM1A_PORT);
/// PM1a control block, 16 bits.
pub(super) const PM1A_CONTROL_PORT: u16 = PM1A_EVENT_PORT + 4;
/// How many ports the two have.
pub(super) const PM1A_PORTS: u8 = narrow(power::PM1A_PORTS);
/// What SLP_TYP must be for SLP_EN to switch the machine off: S5.
pub(super) const SLP_TYP_S5: u8 = power::SLP_TYP_S5;
/// The system control interrupt's I/O APIC input.
pub(super) const SCI_GSI: u8 = narrow(power::SCI_GSI as u64);
/// The ISA interrupt that the system control interrupt takes the place of.
pub(super) const SCI_IRQ: u8 = SCI_GSI;
/// Reset control register.
pub(super) const RESET_PORT: u16 = port(reset::RESET_PORT);
/// A full reset: the processors (bit 2) and the system (bit 1).
pub(super) const RESET_VALUE: u8 = reset::ResetControl::new()
    .with_system(true)
    .with_reset(true)
    .into_bits();

/// First serial port.
pub(super) const COM1_PORT: u16 = port(serial::COM1_PORT);
/// How many ports it has.
pub(super) const COM1_PORTS: u8 = narrow(serial::PORTS);
/// Its I/O APIC input.
pub(super) const COM1_GSI: u8 = narrow(serial::COM1_GSI as u64);

/// Clock: index and data port.
pub(super) const RTC_PORT: u16 = port(rtc::RTC_PORT);
/// How many ports it has.
pub(super) const RTC_PORTS: u8 = narrow(rtc::RTC_PORTS);
/// Its I/O APIC input.
pub(super) const RTC_GSI: u8 = narrow(rtc::RTC_GSI as u64);
/// The clock's register that holds the century.
pub(super) const RTC_CENTURY: u8 = rtc::CENTURY;

/// Where a guest reports that it has panicked, one port.
pub(super) const PVPANIC_PORT: u16 = port(pvpanic::PVPANIC_PORT);

/// The I/O APIC input of the HPET's timer 0 under legacy replacement (HPET specification 1.0a, 2.4.2).
pub(super) const HPET_LEGACY_GSI: u8 = 2;
/// The low half of the HPET's General Capabilities register.
pub(super) const HPET_ID: u32 = {
    #[expect(clippy::cast_possible_truncation, reason = "the table has the low half")]
    let low = hpet::CAPABILITIES as u32;
    low
};

/// The configuration mechanism's ports, which a root complex must not hand to a device.
pub(super) const CONFIG_PORTS: u16 = port(reset::CONFIG_PORTS);
/// How many there are.
pub(super) const CONFIG_PORTS_LEN: u8 = narrow(reset::CONFIG_PORTS_LEN);

const fn port(at: u64) -> u16 {
    assert!(at <= u16::MAX as u64);
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let at = at as u16;
    at
}

const fn narrow(value: u64) -> u8 {
    assert!(value <= u8::MAX as u64);
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let value = value as u8;
    value
}
