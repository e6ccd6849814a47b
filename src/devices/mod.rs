//! The devices a machine is made of.
