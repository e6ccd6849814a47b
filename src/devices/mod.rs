//! The devices: the board's own (the interrupt controller, the console, the clocks, power, and the small ports by
//! which a guest tells the machine something), virtio's, and one for testing.
//!
//! A device answers accesses ([`crate::platform::bus::BusDevice`]), drives wires
//! ([`crate::platform::irq::IrqLine`]), and asks the machine's owner for what is not its own to do
//! ([`request::Request`]). It never ends, pauses or resets the machine itself.

pub mod board_bridge;
pub mod character;
pub mod clock;
pub mod exit_port;
pub mod hpet;
pub mod ioapic;
pub mod milestone;
pub mod power;
pub mod pvpanic;
pub mod register;
pub mod request;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod test_device;
pub mod vfio;
pub mod virtio;

/// What the machine asks of every device, whatever else it is.
pub trait Device: Send + Sync {
    /// What logs, statistics and conflicts call it.
    fn name(&self) -> &str;

    /// The state after power-on. Called while no vCPU runs; wires it holds are released.
    fn reset(&self);
}
