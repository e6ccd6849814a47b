//! A unit of the guest's that a unit of the host's serves: modes `hw` and `sim`.

pub mod host;
