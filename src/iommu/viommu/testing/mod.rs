//! A served unit among doubles: a host that checks what it is asked, pages whose stores are noticed, and a driver in
//! miniature.

mod deed;
mod driver;
mod host;
mod protection;

pub use deed::Deed;
pub use driver::{DEVICE_TABLE, LOG, RING, Reached, Rig, dte};
pub use host::{FakeHost, Running};
pub use protection::FakeProtection;
