//! PCI Express: functions, configuration space, capabilities, topology.

pub mod tree;
