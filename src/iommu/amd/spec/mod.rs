//! The manual as types: every bit position of the unit, and no algorithm.
//!
//! Section numbers are those of AMD publication 48882, revision 3.x. Any bit pattern is a value of these
//! types, because a guest may write any; what a pattern means is decided by the modules above.

pub mod capability;
pub mod command;
pub mod dte;
pub mod event;
pub mod irte;
pub mod ppr;
pub mod pte;
pub mod registers;
pub mod viommu;
