//! Ravelin: a virtual machine monitor that boots a Linux guest on KVM with an arbitrary PCI Express
//! topology.
//!
//! The modules are layers. Each uses only those to its left, and `tests/layering.rs` enforces it:
//!
//! ```text
//! platform  <-  pci  <-  iommu  <-  devices  <-  vm  <-  main
//! ```
//!
//! `ARCHITECTURE.md` tells how they work together; the binary in `main.rs` only parses, loads and runs.

pub mod devices;
pub mod iommu;
pub mod pci;
pub mod platform;
pub mod vm;
