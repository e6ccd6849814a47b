//! From the plan to an entry point: kernels, what they are told, and the tables that describe the machine.

pub mod acpi;
