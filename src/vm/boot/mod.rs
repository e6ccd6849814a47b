//! From the plan to an entry point: kernels, what they are told, and the tables that describe the machine.
//!
//! [`Images`] holds the opened files; [`Images::load`] puts them and everything that describes the machine
//! into RAM and returns the [`Entry`] at which the boot processor starts. A reboot loads again.

pub mod acpi;
pub mod cpuid;
mod elf;
mod images;
mod linux;
mod low_memory;
mod memory_map;
pub mod msr;
mod multiboot;
mod pvh;
pub mod registers;

#[cfg(test)]
mod tests;

pub use images::{BootError, Images};
pub use registers::Entry;
