//! PCI Express: functions, configuration space, capabilities, topology.
//!
//! An emulated device embeds an [`endpoint::Endpoint`], which owns its configuration space and interrupts,
//! and implements [`Function`]:
//!
//! ```
//! use std::sync::Arc;
//! use ravelin::pci::access::DwordWrite;
//! use ravelin::pci::bar::BarSpec;
//! use ravelin::pci::capability::{Express, MsixLayout, PowerManagement};
//! use ravelin::pci::config_space::ConfigSpace;
//! use ravelin::pci::endpoint::Endpoint;
//! use ravelin::pci::tree::{BarKind, Identity};
//! use ravelin::pci::{Command, ConfigEffect, Function};
//! use ravelin::platform::dma::Requester;
//! use ravelin::platform::msi::MsiPort;
//!
//! /// MSI-X at the start of BAR 0, the device's own register behind it.
//! const MSIX: MsixLayout = MsixLayout::new(0, 0, 1);
//! const DOORBELL: u64 = 0x1000;
//!
//! struct Bell {
//!     endpoint: Endpoint,
//! }
//!
//! impl Bell {
//!     fn new(identity: &Identity, port: MsiPort) -> Arc<dyn Function> {
//!         let config = ConfigSpace::endpoint(identity)
//!             .bar(BarSpec { index: 0, kind: BarKind::Mem64 { prefetchable: true }, size: 0x2000 })
//!             .capability(PowerManagement::new())
//!             .capability(Express::endpoint(true));
//!         let endpoint = Endpoint::new(config, port.requester().clone()).with_msix(MSIX, port);
//!         Arc::new(Self { endpoint })
//!     }
//! }
//!
//! impl Function for Bell {
//!     fn name(&self) -> &str {
//!         "bell"
//!     }
//!     fn config_read(&self, dword: u16) -> u32 {
//!         self.endpoint.config_read(dword)
//!     }
//!     fn config_write(&self, dword: u16, write: DwordWrite) -> ConfigEffect {
//!         self.endpoint.config_write(dword, write)
//!     }
//!     fn requester(&self) -> &Arc<Requester> {
//!         self.endpoint.requester()
//!     }
//!     fn bars(&self) -> &[BarSpec] {
//!         self.endpoint.bars()
//!     }
//!     fn command(&self) -> Command {
//!         self.endpoint.command()
//!     }
//!     fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
//!         if !self.endpoint.bar_read(bar, offset, data) {
//!             data.fill(0);
//!         }
//!     }
//!     fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
//!         if !self.endpoint.bar_write(bar, offset, data) && offset == DOORBELL {
//!             self.endpoint.signal(0);
//!         }
//!     }
//!     fn reset(&self) {
//!         self.endpoint.reset();
//!     }
//! }
//! ```
//!
//! A configuration access finds its function by the routed bus number ([`topology`]), the function answers
//! from its registers and returns a [`ConfigEffect`], and the topology carries that out with no lock of the
//! function held: ranges move on the buses, requesters get new numbers, functions are reset.

pub mod access;
pub mod assign;
pub mod bar;
pub mod bridge;
pub mod capability;
pub mod config_ports;
pub mod config_space;
pub mod ecam;
pub mod endpoint;
mod function;
pub mod port;
pub mod topology;
pub mod tree;

pub use function::{CONFIG_DWORDS, Command, ConfigEffect, Function};

#[cfg(any(test, fuzzing))]
pub mod testing;
