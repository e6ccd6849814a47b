//! A guest with a driver, a guest without manners, a host that refuses or breaks.

mod broken;
mod hostile;
mod linux;
mod refused;
mod renumbered;
mod told;
