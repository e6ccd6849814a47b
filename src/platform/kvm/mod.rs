//! The hypervisor as this program uses it.
