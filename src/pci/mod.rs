//! PCI Express: functions, configuration space, capabilities, topology.
