//! The AMD IOMMU unit as a driver sees it: tables built in memory, doorbells rung, records read back.
//!
//! Cases are named after their number in the conformance list they come from (R registers, C commands,
//! I invalidation, D device table, P page tables, E events, X interrupts) and the rule they check.

mod commands;
mod crowd;
mod device_table;
mod driver;
mod events;
mod function;
mod guest;
mod guests;
mod hostile;
mod hypervisor;
mod interrupts;
mod invalidation;
mod model;
mod orderly;
mod page;
mod private;
mod reference;
mod registers;
mod scribble;
mod served_device;
mod switching;
mod tables;
mod test_device;
