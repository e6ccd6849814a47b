//! What the guest sees of a topology equals the plan, and stays usable when the guest orders otherwise.

use crate::machine::Machine;
