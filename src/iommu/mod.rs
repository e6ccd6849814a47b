//! IOMMUs between functions and guest memory.

pub mod agent;
pub mod amd;
pub mod container;
pub mod emulated;
pub mod function;
pub mod iommufd;
pub mod polling;
pub mod shadow;
pub mod sim;
pub mod viommu;
