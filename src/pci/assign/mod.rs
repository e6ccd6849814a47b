//! From what hangs where to a [`PciTree`](super::tree::PciTree): device numbers, bus numbers, windows, BARs and interrupt pins.
//!
//! Pure and deterministic: the same specification gives the same tree, in time that grows with the number
//! of functions (times its logarithm, for sorting). There is no firmware to do this later, and the guest is
//! told to keep the result, so what does not fit is an error here that says how much would.
//!
//! The work has two steps, because how much address space the hierarchy needs decides where RAM ends:
//! [`measure`] numbers everything, [`Measured::root_windows`] says whether a stretch of address space would
//! do, and [`Measured::place`] gives addresses.
//!
//! Bus numbers go depth first without gaps: nothing comes into a slot while the guest runs (it may leave), and Linux
//! keeps numbers that are programmed, spare ones or none. Windows have slack at the root complexes only, which is where a guest that
//! reassigns (`pci=realloc`) needs it.

mod number;
mod pack;
mod place;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;

use crate::platform::addr::GpaRange;

#[cfg(any(test, fuzzing))]
use super::tree::PciTree;
use super::tree::{Identity, NodeKind, PortRange};

pub use super::bar::BarSpec;
pub use number::measure;
pub use pack::Measured;

/// A hierarchy as it was asked for. Functions name their parents by index, so that any order will do.
#[derive(Debug, Clone, Default)]
pub struct TreeSpec {
    /// Root complexes, in the order they were named.
    pub roots: Vec<RootSpec>,
    /// Functions, in the order they were named; free slots are given out in this order.
    pub functions: Vec<FunctionSpec>,
}

/// A root complex as it was asked for.
#[derive(Debug, Clone)]
pub struct RootSpec {
    /// What the operator calls it.
    pub name: String,
    /// Its segment.
    pub segment: u16,
    /// Its bus numbers; `None` shares the segment's evenly between its root complexes.
    pub buses: Option<RangeInclusive<u8>>,
}

/// A function as it was asked for.
#[derive(Debug, Clone)]
pub struct FunctionSpec {
    /// What the operator calls it; unique.
    pub name: String,
    /// What it is: decides what may be above and below it.
    pub kind: NodeKind,
    /// What its header says.
    pub identity: Identity,
    /// What it hangs off.
    pub parent: Parent,
    /// Its device and function number; `None` takes the next free device.
    pub slot: Option<Slot>,
    /// Its BARs.
    pub bars: Vec<BarSpec>,
    /// Whether it has a wired interrupt.
    pub intx: bool,
    /// Whether it may leave while the guest runs. The memory window of the port above is then open, whatever the
    /// function has: the one window that a bridge cannot be without, and that a guest wants in a slot that can be filled.
    pub removable: bool,
}

/// What a function hangs off: an index into one of the two lists of [`TreeSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// The root bus of a root complex.
    Root(usize),
    /// The secondary bus of a port.
    Port(usize),
}

/// A place on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Slot {
    device: u8,
    function: u8,
}

impl Slot {
    /// `None` when `device` exceeds 31 or `function` exceeds 7.
    #[must_use]
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self { device, function })
    }

    /// Device number, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.device
    }

    /// Function number, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.function
    }
}

/// `DEVICE.FUNCTION` in decimal, as it is said on the command line.
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.device, self.function)
    }
}

/// The address space there is to give out.
#[derive(Debug, Clone)]
pub struct Pools {
    /// Ports for I/O windows.
    pub io: PortRange,
    /// For the 32-bit windows of all root complexes.
    pub mem32: GpaRange,
    /// For the 64-bit windows of all root complexes.
    pub mem64: GpaRange,
    /// One ECAM per segment, in ascending order of segment number.
    pub ecam: Vec<GpaRange>,
}

/// Which of the three address spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32,
    /// Memory above 4 GiB.
    Mem64,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io => "I/O port",
            Self::Mem32 => "32-bit memory",
            Self::Mem64 => "64-bit memory",
        })
    }
}

/// A hierarchy that cannot be. [`AssignError::culprit`] names the function or root complex to look at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// Two functions asked for one place.
    #[error("{name} cannot be at slot {slot} of {bus}: {other} is there; free are {free}")]
    SlotTaken {
        /// Who asked.
        name: String,
        /// For which place.
        slot: Slot,
        /// What the bus belongs to.
        bus: String,
        /// Who is there.
        other: String,
        /// What is free on the bus.
        free: String,
    },
    /// A link has one device only.
    #[error(
        "{name} cannot be at slot {slot} of {bus}: a link has one device, number 0; write slot=0.{} or use \
         another port",
        slot.function()
    )]
    NotDeviceZero {
        /// Who asked.
        name: String,
        /// For which place.
        slot: Slot,
        /// The port.
        bus: String,
    },
    /// More functions than places.
    #[error("{name} finds no free slot on {bus}, which has {places}")]
    BusFull {
        /// Who asked.
        name: String,
        /// What the bus belongs to.
        bus: String,
        /// What the bus offers.
        places: &'static str,
    },
    /// A device must have a function 0, or nobody looks for the others (PCI Express Base Specification
    /// 7.5.1.1.9).
    #[error(
        "{name} is function {function} of device {device} on {bus}, but that device has no function 0; put \
         something at slot {device}.0",
        function = slot.function(),
        device = slot.device()
    )]
    NoFunctionZero {
        /// The function that would not be found.
        name: String,
        /// Where it is.
        slot: Slot,
        /// What the bus belongs to.
        bus: String,
    },
    /// A port, switch or device in a place for something else.
    #[error("{name} cannot hang off {bus}: {rule}")]
    WrongParent {
        /// Who.
        name: String,
        /// What it hangs off.
        bus: String,
        /// What would be right.
        rule: &'static str,
    },
    /// A port that is behind itself.
    #[error("{name} is behind itself: {path}")]
    Cycle {
        /// One of those in the circle.
        name: String,
        /// The circle, each behind the next.
        path: String,
    },
    /// Bus ranges of one segment that overlap.
    #[error(
        "{name} cannot have buses {buses}: {other} in the same segment has {other_buses}; free are {free}"
    )]
    BusesOverlap {
        /// Who.
        name: String,
        /// Its range.
        buses: String,
        /// Who has them.
        other: String,
        /// The other's range.
        other_buses: String,
        /// Ranges of the segment that nobody has.
        free: String,
    },
    /// Ranges for some of a segment's root complexes only.
    #[error(
        "{name} needs a bus range, because {other} in the same segment {segment} has one; free are {free}"
    )]
    BusesMissing {
        /// Who has no range.
        name: String,
        /// Who has one.
        other: String,
        /// The segment.
        segment: u16,
        /// Ranges of the segment that nobody has.
        free: String,
    },
    /// More root complexes than a segment can share its buses between.
    #[error("{name} is one of {roots} root complexes in segment {segment}, which has 256 buses")]
    TooManyRoots {
        /// The last of them.
        name: String,
        /// How many.
        roots: usize,
        /// The segment.
        segment: u16,
    },
    /// More buses than the range has.
    #[error("{name} needs {needed} bus numbers (one, and one per port), but its range {buses} has {have}")]
    BusesExhausted {
        /// The root complex.
        name: String,
        /// How many it needs.
        needed: usize,
        /// Its range.
        buses: String,
        /// How many that is.
        have: usize,
    },
    /// No root complex where the machine needs one.
    #[error("no root complex begins at bus 0x00 of segment 0, where the ISA bridge (00:14.0) belongs")]
    NoFirstRoot,
    /// A BAR that the specification does not allow.
    #[error("BAR {index} of {name} cannot be: {rule}")]
    BadBar {
        /// Whose.
        name: String,
        /// Which.
        index: u8,
        /// What would be right.
        rule: &'static str,
    },
    /// Address space that is not there.
    #[error(
        "the {space} windows do not fit: {needed:#x} bytes are needed, {available:#x} are there; {name} needs \
         the most, {largest:#x}"
    )]
    WindowsDoNotFit {
        /// Which space.
        space: Space,
        /// How much is needed in all.
        needed: u64,
        /// How much there is.
        available: u64,
        /// The function that needs most.
        name: String,
        /// How much it needs.
        largest: u64,
    },
    /// More slots than there are slot numbers.
    #[error("{name} is slot {slot} of the machine, and slot numbers end at 8191")]
    TooManySlots {
        /// The port.
        name: String,
        /// The number it would have.
        slot: u32,
    },
}

impl AssignError {
    /// The function or root complex the error is about; `None` when it is about all of them.
    #[must_use]
    pub fn culprit(&self) -> Option<&str> {
        match self {
            Self::SlotTaken { name, .. }
            | Self::NotDeviceZero { name, .. }
            | Self::BusFull { name, .. }
            | Self::NoFunctionZero { name, .. }
            | Self::WrongParent { name, .. }
            | Self::Cycle { name, .. }
            | Self::BusesOverlap { name, .. }
            | Self::BusesMissing { name, .. }
            | Self::TooManyRoots { name, .. }
            | Self::BusesExhausted { name, .. }
            | Self::BadBar { name, .. }
            | Self::WindowsDoNotFit { name, .. }
            | Self::TooManySlots { name, .. } => Some(name),
            Self::NoFirstRoot => None,
        }
    }
}

/// Number and place `spec` in one go, where the pools do not depend on what is needed.
#[cfg(any(test, fuzzing))]
pub fn assign(spec: &TreeSpec, pools: &Pools) -> Result<PciTree, AssignError> {
    measure(spec)?.place(pools)
}
