//! PCI Express: functions, configuration space, capabilities, topology.

pub mod assign;
pub mod tree;
