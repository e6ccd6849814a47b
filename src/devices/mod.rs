//! The devices a machine is made of.

pub mod virtio;
