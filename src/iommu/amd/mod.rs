//! The AMD IOMMU unit in software.
pub mod spec;
