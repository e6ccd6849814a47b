//! What any device may rely on: addresses, guest memory, buses, interrupts and the hypervisor.
//!
//! The lowest layer; it uses nothing of the rest of the crate.

pub mod addr;
pub mod assigned;
pub mod bus;
pub mod device_memory;
pub mod dma;
pub mod doorbell;
pub mod host;
pub mod irq;
pub mod kvm;
pub mod lanes;
pub mod lock;
pub mod log;
pub mod memory;
mod mmap;
pub mod msi;
pub mod protection;
pub mod ram;
pub mod tap;
pub mod vectored;
