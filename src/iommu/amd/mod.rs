//! The AMD IOMMU unit in software.

pub mod device_table;
pub mod features;
pub mod lanes;
pub mod log;
pub mod memory;
pub mod registers;
pub mod request;
pub mod ring;
pub mod spec;
pub mod walk;
