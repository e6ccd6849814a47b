//! IOMMUs between functions and guest memory.

pub mod amd;
pub mod emulated;
