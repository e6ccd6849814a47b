//! The AMD IOMMU unit in software.

pub mod device_table;
pub mod dte_cache;
pub mod features;
pub mod grace;
pub mod iotlb;
pub mod lanes;
pub mod log;
pub mod memory;
pub mod pages;
pub mod registers;
pub mod request;
pub mod ring;
pub mod slot;
pub mod spec;
pub mod sync;
pub mod walk;
