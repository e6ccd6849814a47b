//! The machine: what was said, what was planned from it, and the machine built and run.

pub mod layout;
pub mod plan;
