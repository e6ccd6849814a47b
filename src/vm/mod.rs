//! The machine: what was said, what was planned from it, and the machine built and run.

pub mod boot;
pub mod config;
pub mod layout;
pub mod plan;
