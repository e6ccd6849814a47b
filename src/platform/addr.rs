//! Addresses and identities as types: guest physical addresses, device-visible addresses, page
//! arithmetic that cannot wrap, and the bus/device/function number of a PCI function.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;

/// An address in guest physical space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(pub u64);

/// An address as a device issues it: a guest physical address where no IOMMU translates, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Iova(pub u64);

macro_rules! address {
    ($name:ident) => {
        impl $name {
            /// The address `bytes` further up, or `None` where that would wrap.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(at) => Some(Self(at)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(Gpa);
address!(Iova);

/// Plans are compared as text: every address type goes into JSON the way it is displayed.
macro_rules! serialized_as_displayed {
    ($($name:ident),+) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )+};
}

serialized_as_displayed!(Gpa, GpaRange, Bdf, Sbdf);

/// A stretch of guest physical space that is not empty and does not wrap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpaRange {
    start: Gpa,
    len: u64,
}

impl GpaRange {
    /// `len` bytes from `start`; `None` when `len` is zero or the last byte would lie beyond 2^64 - 1.
    #[must_use]
    pub const fn new(start: Gpa, len: u64) -> Option<Self> {
        if len == 0 || start.0.checked_add(len - 1).is_none() {
            return None;
        }
        Some(Self { start, len })
    }

    /// The first address.
    #[must_use]
    pub const fn start(self) -> Gpa {
        self.start
    }

    /// Length in bytes, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// The last address that belongs to the range.
    #[must_use]
    pub const fn last(self) -> Gpa {
        Gpa(self.start.0 + (self.len - 1))
    }

    /// Whether `at` lies inside.
    #[must_use]
    pub const fn contains(self, at: Gpa) -> bool {
        self.start.0 <= at.0 && at.0 <= self.last().0
    }

    /// Whether every byte of `other` lies inside.
    #[must_use]
    pub const fn contains_range(self, other: Self) -> bool {
        self.contains(other.start) && self.contains(other.last())
    }

    /// Whether the two share a byte.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 <= other.last().0 && other.start.0 <= self.last().0
    }
}

impl fmt::Debug for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `start-last` in hexadecimal, as /proc/iomem writes it.
impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:08x}", self.start.0, self.last().0)
    }
}

/// Bus, device and function number of a PCI function: its requester ID inside one segment.
///
/// PCI Express Base Specification 2.2.4.2 (Routing ID).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bdf(u16);

impl Bdf {
    /// `None` when `device` exceeds 31 or `function` exceeds 7.
    #[must_use]
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self((bus as u16) << 8 | (device as u16) << 3 | function as u16))
    }

    /// From the 16 bits a request carries.
    #[must_use]
    pub const fn from_requester_id(id: u16) -> Self {
        Self(id)
    }

    /// The 16 bits a request carries.
    #[must_use]
    pub const fn requester_id(self) -> u16 {
        self.0
    }

    /// Bus number.
    #[must_use]
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// Device number, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.0.to_be_bytes()[1] >> 3
    }

    /// Function number, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.0.to_be_bytes()[1] & 7
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `bus:device.function` in hexadecimal, as lspci writes it.
impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

/// A function's full address: the segment (PCI domain) and its BDF there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sbdf {
    /// PCI segment group, the kernel's "domain".
    pub segment: u16,
    /// Bus, device and function inside it.
    pub bdf: Bdf,
}

impl fmt::Debug for Sbdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `segment:bus:device.function`, as sysfs writes it.
impl fmt::Display for Sbdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}", self.segment, self.bdf)
    }
}

/// Not a PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address; write SEGMENT:BUS:DEVICE.FUNCTION like 0000:41:00.0")]
pub struct ParseSbdfError(String);

impl FromStr for Sbdf {
    type Err = ParseSbdfError;

    /// Reads `0000:41:00.0`, or `41:00.0` for segment 0.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseSbdfError(text.to_owned());
        let hex = |digits: &str, at_most: usize| {
            let plain =
                (1..=at_most).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain
                .then(|| u16::from_str_radix(digits, 16).ok())
                .flatten()
                .ok_or_else(refused)
        };
        let small = |value: u16| u8::try_from(value).map_err(|_| refused());
        let (rest, function) = text.rsplit_once('.').ok_or_else(refused)?;
        let (rest, device) = rest.rsplit_once(':').ok_or_else(refused)?;
        let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
        let bdf = Bdf::new(
            small(hex(bus, 2)?)?,
            small(hex(device, 2)?)?,
            small(hex(function, 1)?)?,
        );
        Ok(Self {
            segment: hex(segment, 4)?,
            bdf: bdf.ok_or_else(refused)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_may_end_at_the_last_address_but_not_wrap() {
        let top = GpaRange::new(Gpa(u64::MAX), 1).expect("one byte fits");
        assert_eq!(top.last(), Gpa(u64::MAX));
        assert_eq!(GpaRange::new(Gpa(u64::MAX), 2), None);
        assert_eq!(GpaRange::new(Gpa(0), 0), None);
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let low = GpaRange::new(Gpa(0x1000), 0x1000).expect("valid");
        let high = GpaRange::new(Gpa(0x2000), 0x1000).expect("valid");
        assert!(!low.overlaps(high));
        assert!(low.overlaps(GpaRange::new(Gpa(0x1fff), 1).expect("valid")));
        assert!(!low.contains_range(GpaRange::new(Gpa(0x1800), 0x1000).expect("valid")));
    }

    #[test]
    fn a_bdf_keeps_its_three_numbers_apart() {
        let bdf = Bdf::new(0xc1, 31, 7).expect("in range");
        assert_eq!((bdf.bus(), bdf.device(), bdf.function()), (0xc1, 31, 7));
        assert_eq!(bdf.to_string(), "c1:1f.7");
        assert_eq!(Bdf::from_requester_id(bdf.requester_id()), bdf);
        assert_eq!(Bdf::new(0, 32, 0), None);
        assert_eq!(Bdf::new(0, 0, 8), None);
    }

    #[test]
    fn pci_addresses_are_read_as_sysfs_writes_them() {
        let at: Sbdf = "0001:41:00.3".parse().expect("an address");
        assert_eq!((at.segment, at.bdf), (1, Bdf::new(0x41, 0, 3).expect("valid")));
        assert_eq!(
            "41:1f.0".parse::<Sbdf>().expect("an address").to_string(),
            "0000:41:1f.0"
        );
    }

    #[test]
    fn what_is_no_pci_address_is_refused_with_the_text() {
        for text in [
            "",
            "41",
            "41:00",
            "0000:41:20.0",
            "0000:41:00.8",
            "g:00.0",
            "0000:+1:00.0",
            "0:0:0:00.0",
            "1:100:0.0",
        ] {
            let error = text.parse::<Sbdf>().expect_err(text);
            assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
        }
    }
}
