//! A served unit among doubles: a host that checks what it is asked, pages whose stores are noticed, and a driver in
//! miniature.

mod driver;
mod host;
mod protection;

pub(super) use driver::{DEVICE_TABLE, LOG, RING, Reached, Rig, dte};
pub(super) use host::FakeHost;
pub(super) use protection::FakeProtection;
