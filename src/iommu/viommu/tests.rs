//! A guest with a driver, a guest without manners, a host that refuses.

mod hostile;
mod linux;
mod refused;
