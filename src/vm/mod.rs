//! The machine: what was said, what was planned from it, and the machine built and run.

pub mod config;
pub mod boot;
pub mod layout;
pub mod plan;
