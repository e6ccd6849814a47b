//! What the tables tell the guest about the board's fixed devices; `layout` says where those in memory lie.

/// I/O APIC's own ID. Processors may have the same one: the two kinds are numbered apart since the xAPIC.
pub const IOAPIC_ID: u8 = 0;

/// PM1a event block: status and enable, 16 bits each.
pub(super) const PM1A_EVENT_PORT: u16 = 0x600;
/// PM1a control block, 16 bits.
pub(super) const PM1A_CONTROL_PORT: u16 = 0x604;
/// What SLP_TYP must be for SLP_EN to switch the machine off: S5.
pub(super) const SLP_TYP_S5: u8 = 5;
/// The ISA interrupt that the system control interrupt takes the place of.
pub(super) const SCI_IRQ: u8 = 9;
/// The system control interrupt's I/O APIC input.
pub(super) const SCI_GSI: u16 = 9;
/// Reset control register.
pub(super) const RESET_PORT: u16 = 0xcf9;
/// A full reset: the processors (bit 2) and the system (bit 1).
pub(super) const RESET_VALUE: u8 = 0x06;

/// First serial port, 8 ports.
pub(super) const COM1_PORT: u16 = 0x3f8;
/// Its I/O APIC input.
pub(super) const COM1_GSI: u8 = 4;

/// Clock: index and data port.
pub(super) const RTC_PORT: u16 = 0x70;
/// Its I/O APIC input.
pub(super) const RTC_GSI: u8 = 8;
/// The clock's register that holds the century.
pub(super) const RTC_CENTURY: u8 = 0x32;

/// Where a guest reports that it has panicked, one port.
pub(super) const PVPANIC_PORT: u16 = 0x505;

/// The I/O APIC input of the HPET's timer 0 under legacy replacement (HPET specification 1.0a, 2.4.2).
pub(super) const HPET_LEGACY_GSI: u16 = 2;
/// The low half of the HPET's General Capabilities register: 64-bit counter, legacy replacement, three timers,
/// revision 1, and 8086h as the vendor.
pub(super) const HPET_ID: u32 = 0x8086_a201;

/// The configuration mechanism's ports, which a root complex must not hand to a device.
pub(super) const CONFIG_PORTS: (u16, u8) = (0xcf8, 8);
