//! What a device asks of the unit, and what it is answered.

use crate::platform::addr::{Bdf, Gpa, Iova};

/// A set of directions: what a request needs, or what a table allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Access {
    /// From memory to the device.
    pub read: bool,
    /// From the device to memory.
    pub write: bool,
}

impl Access {
    /// Neither.
    pub const NONE: Self = Self::new(false, false);
    /// To read.
    pub const READ: Self = Self::new(true, false);
    /// To write.
    pub const WRITE: Self = Self::new(false, true);
    /// Both, as an atomic operation needs.
    pub const BOTH: Self = Self::new(true, true);

    /// The given directions.
    #[must_use]
    pub const fn new(read: bool, write: bool) -> Self {
        Self { read, write }
    }

    /// The directions both sets have.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self::new(self.read && other.read, self.write && other.write)
    }

    /// Whether everything in `need` is in this set.
    #[must_use]
    pub const fn allows(self, need: Self) -> bool {
        (self.read || !need.read) && (self.write || !need.write)
    }
}

/// Process address space ID, 20 bits.
///
/// PCI Express Base Specification 6.20.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Pasid(u32);

impl Pasid {
    /// The one that requests without a prefix use under GIOV.
    pub const ZERO: Self = Self(0);

    /// `None` above 20 bits.
    #[must_use]
    pub const fn new(value: u32) -> Option<Self> {
        if value >> 20 == 0 { Some(Self(value)) } else { None }
    }

    /// Its 20 bits.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }
}

/// One memory request, or one translation request, of a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Who asks.
    pub requester: Bdf,
    /// In which address space, where the request says so.
    pub pasid: Option<Pasid>,
    /// Whether the PASID prefix asks for supervisor privilege.
    pub privileged: bool,
    /// Its first byte.
    pub at: Iova,
    /// What it does there.
    pub access: Access,
}

impl Request {
    /// An ordinary request, without PASID.
    #[must_use]
    pub const fn plain(requester: Bdf, at: Iova, access: Access) -> Self {
        Self {
            requester,
            pasid: None,
            privileged: false,
            at,
            access,
        }
    }

    /// The same in the address space of `pasid`.
    #[must_use]
    pub const fn in_space(self, pasid: Pasid) -> Self {
        Self {
            pasid: Some(pasid),
            ..self
        }
    }

    /// The same at another address.
    #[must_use]
    pub const fn moved_to(self, at: Iova) -> Self {
        Self { at, ..self }
    }
}

/// Where a request's first byte lies, and how far that holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The address in system memory.
    pub target: Gpa,
    /// Bytes from there that follow one another, at least 1.
    pub run: u64,
    /// What may be done there.
    pub allowed: Access,
}

/// Answer to a translation request (ATS).
///
/// PCI Express Base Specification 10.2.3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AtsCompletion {
    /// First byte of the page in system memory; nothing when `allowed` is empty.
    pub target: Gpa,
    /// Logarithm of the page's size in bytes.
    pub shift: u32,
    /// What may be done there; empty where the tables map nothing.
    pub allowed: Access,
    /// Only untranslated requests may use the page.
    pub untranslated_only: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_allowed_only_where_every_direction_is() {
        assert!(Access::READ.allows(Access::NONE));
        assert!(Access::BOTH.allows(Access::WRITE));
        assert!(!Access::READ.allows(Access::BOTH));
        assert_eq!(Access::BOTH.and(Access::WRITE), Access::WRITE);
        assert_eq!(Access::READ.and(Access::WRITE), Access::NONE);
    }

    #[test]
    fn a_pasid_has_twenty_bits() {
        assert_eq!(Pasid::new(0xf_ffff).map(Pasid::value), Some(0xf_ffff));
        assert_eq!(Pasid::new(0x10_0000), None);
    }
}
