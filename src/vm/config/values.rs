//! What single values can be: sizes, ranges, addresses, choices.

use std::num::{NonZeroU16, NonZeroU32};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use crate::pci::assign::Slot;
use crate::platform::addr::Sbdf;
use crate::vm::plan::{BootProtocol, CharBackend, CpuSet, Doorbell, MacAddress, OnReboot, PageTable};

use super::near;
use super::section::Word;

/// The longest name of anything.
const NAME_LENGTH: usize = 63;
/// The longest serial number of a disk (virtio 1.3, 5.2.6: 20 bytes).
const SERIAL_LENGTH: usize = 20;
/// The longest name of a network interface (IFNAMSIZ less the final zero).
const INTERFACE_LENGTH: usize = 15;
/// The most host CPUs a list names, so that a slip of the finger costs no memory.
const MAX_HOST_CPUS: u32 = 1 << 16;

/// A number in decimal, or in hexadecimal after 0x; underscores may group digits.
fn number(text: &str) -> Option<u64> {
    let digits = text.replace('_', "");
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok(),
        None => None,
    }
}

fn limited<T: TryFrom<u64>>(text: &str, limits: &str) -> Result<T, String> {
    number(text)
        .and_then(|value| T::try_from(value).ok())
        .ok_or_else(|| format!("not a whole number from {limits}"))
}

impl Word for u16 {
    fn read(text: &str) -> Result<Self, String> {
        limited(text, "0 to 65535")
    }
}

impl Word for u32 {
    fn read(text: &str) -> Result<Self, String> {
        limited(text, "0 to 4294967295")
    }
}

impl Word for NonZeroU16 {
    fn read(text: &str) -> Result<Self, String> {
        limited::<u16>(text, "1 to 65535")
            .and_then(|value| Self::new(value).ok_or("must be at least 1".into()))
    }
}

impl Word for NonZeroU32 {
    fn read(text: &str) -> Result<Self, String> {
        limited::<u32>(text, "1 to 4294967295")
            .and_then(|value| Self::new(value).ok_or("must be at least 1".into()))
    }
}

/// Any text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text(pub String);

impl Word for Text {
    fn read(text: &str) -> Result<Self, String> {
        if text.contains('\0') {
            return Err("a text cannot hold a zero byte".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

/// A path of the host; relative ones start at the machine file they stand in, or at the working folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath(pub PathBuf);

impl Word for HostPath {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("a path cannot be empty".to_owned()),
            _ if text.contains('\0') => Err("a path cannot hold a zero byte".to_owned()),
            _ => Ok(Self(PathBuf::from(text))),
        }
    }
}

/// What something is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(pub String);

impl Word for Name {
    fn read(text: &str) -> Result<Self, String> {
        let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let plain = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if starts && plain && text.len() <= NAME_LENGTH {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "not a name; names have 1 to {NAME_LENGTH} letters, digits, `-`, `_` and `.`, and begin with a \
             letter or digit"
        ))
    }
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl Word for Size {
    fn read(text: &str) -> Result<Self, String> {
        let units = [("K", 10), ("M", 20), ("G", 30), ("T", 40)];
        let spelled = text.strip_suffix("iB").unwrap_or(text);
        let (digits, shift) = units
            .into_iter()
            .find_map(|(unit, shift)| {
                let lower = unit.to_ascii_lowercase();
                let digits = spelled
                    .strip_suffix(unit)
                    .or_else(|| spelled.strip_suffix(&lower))?;
                Some((digits, shift))
            })
            .unwrap_or((text, 0));
        number(digits)
            .filter(|_| !digits.is_empty())
            .and_then(|count| count.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| {
                "not a size; write bytes, or a number with K, M, G or T, like 512M or 4G".to_owned()
            })
    }
}

/// A size as it would be said: in the largest unit that gives a whole number.
#[must_use]
pub fn size_text(bytes: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    units
        .into_iter()
        .find(|(_, shift)| bytes != 0 && bytes.is_multiple_of(1_u64 << shift))
        .map_or_else(
            || bytes.to_string(),
            |(unit, shift)| format!("{}{unit}", bytes >> shift),
        )
}

/// on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switch(pub bool);

impl Word for Switch {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "on" | "true" | "yes" => Ok(Self(true)),
            "off" | "false" | "no" => Ok(Self(false)),
            other => Err(near::instead(other, "values", &["on", "off"])),
        }
    }
}

/// The pages of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePages {
    /// The base page size.
    Off,
    /// Huge pages of so many bytes.
    Of(u64),
}

impl Word for HugePages {
    fn read(text: &str) -> Result<Self, String> {
        match (text, Size::read(text)) {
            ("off", _) => Ok(Self::Off),
            (_, Ok(Size(size @ (0x20_0000 | 0x4000_0000)))) => Ok(Self::Of(size)),
            _ => Err("values are off, 2M, 1G".to_owned()),
        }
    }
}

/// `0x00-0x3f`, or one bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusRange(pub RangeInclusive<u8>);

impl Word for BusRange {
    fn read(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let bus = |text: &str| number(text).and_then(|bus| u8::try_from(bus).ok());
        match (bus(first), bus(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self(first..=last)),
            _ => Err("not a range of buses; write FIRST-LAST with 0x00 to 0xff, like 0x00-0x3f".to_owned()),
        }
    }
}

/// `DEVICE.FUNCTION`, or a device for its function 0.
impl Word for Slot {
    fn read(text: &str) -> Result<Self, String> {
        let (device, function) = text.split_once('.').unwrap_or((text, "0"));
        let small = |text: &str| number(text).and_then(|value| u8::try_from(value).ok());
        match (small(device), small(function)) {
            (Some(32..), _) => Err("a bus has devices 0 to 31; write DEVICE.FUNCTION, like 4.0".to_owned()),
            (_, Some(8..)) => {
                Err("a device has functions 0 to 7; write DEVICE.FUNCTION, like 4.0".to_owned())
            }
            (Some(device), Some(function)) => {
                Slot::new(device, function).ok_or_else(|| "no such slot".to_owned())
            }
            _ => Err(
                "not a slot; write DEVICE.FUNCTION in decimal, or in hexadecimal after 0x, like 4.0 or \
                      0x1f.0"
                    .to_owned(),
            ),
        }
    }
}

/// A PCI function of the host, by its address or its folder in sysfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFunction(pub Sbdf);

impl Word for HostFunction {
    fn read(text: &str) -> Result<Self, String> {
        let name = match text.strip_prefix("/sys/") {
            Some(path) => path.trim_end_matches('/').rsplit('/').next().unwrap_or(path),
            None => text,
        };
        name.parse().map(Self).map_err(|_| {
            "not a PCI address of the host; write SEGMENT:BUS:DEVICE.FUNCTION, like 0000:41:00.0, or the folder \
             /sys/bus/pci/devices/0000:41:00.0"
                .to_owned()
        })
    }
}

impl Word for MacAddress {
    fn read(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let octet = |part: &&str| {
            let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let octets: Option<Vec<u8>> = parts.iter().map(octet).collect();
        let Some(octets) = octets.and_then(|octets| <[u8; 6]>::try_from(octets).ok()) else {
            return Err(
                "not an Ethernet address; write six bytes in hexadecimal, like 52:54:00:12:34:56".into(),
            );
        };
        if octets[0] & 1 != 0 {
            return Err(
                "a group address; the lowest bit of the first byte must be 0 for one station".to_owned(),
            );
        }
        if octets == [0; 6] {
            return Err("the zero address belongs to nobody; write one like 52:54:00:12:34:56".to_owned());
        }
        Ok(Self(octets))
    }
}

/// The name of a host network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface(pub String);

impl Word for Interface {
    fn read(text: &str) -> Result<Self, String> {
        let plain = text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
        if plain && !matches!(text, "" | "." | "..") && text.len() <= INTERFACE_LENGTH {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "not the name of an interface; those have 1 to {INTERFACE_LENGTH} characters, like tap0"
        ))
    }
}

/// An open descriptor inherited from whoever started us; the first three are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor(pub i32);

impl Word for Descriptor {
    fn read(text: &str) -> Result<Self, String> {
        number(text)
            .and_then(|value| i32::try_from(value).ok())
            .filter(|value| *value > 2)
            .map(Self)
            .ok_or_else(|| "not an inherited descriptor; those are numbers from 3 on".to_owned())
    }
}

/// What a NIC is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetBackendName {
    /// Nothing; the link is down.
    None,
    /// A tap interface, which other keys name.
    Tap,
}

/// A disk's serial number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serial(pub String);

impl Word for Serial {
    fn read(text: &str) -> Result<Self, String> {
        if text.len() <= SERIAL_LENGTH && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "a serial number has at most {SERIAL_LENGTH} printable ASCII characters"
        ))
    }
}

/// A list of host CPUs as the kernel writes it: `0-3,8`.
impl Word for CpuSet {
    fn read(text: &str) -> Result<Self, String> {
        let refused = || "not a list of host CPUs; write numbers and ranges, like 0-3 or 0-3,8".to_owned();
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let cpu = |text: &str| {
                number(text)
                    .and_then(|cpu| u32::try_from(cpu).ok())
                    .ok_or_else(refused)
            };
            let (first, last) = (cpu(first)?, cpu(last)?);
            if last < first {
                return Err(format!("the range {part} runs backwards"));
            }
            if last >= MAX_HOST_CPUS {
                return Err(format!(
                    "host CPU {last} is beyond any host; numbers end at {}",
                    MAX_HOST_CPUS - 1
                ));
            }
            cpus.extend(first..=last);
        }
        Self::new(cpus).ok_or_else(refused)
    }
}

/// `null`, `stdio`, `pty`, `file:PATH`, `socket:PATH`.
impl Word for CharBackend {
    fn read(text: &str) -> Result<Self, String> {
        let forms = ["null", "stdio", "pty", "file:PATH", "socket:PATH"];
        match text.split_once(':') {
            None if text == "null" => Ok(Self::Null),
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            Some(("file", path)) => HostPath::read(path).map(|path| Self::File(path.0)),
            Some(("socket", path)) => HostPath::read(path).map(|path| Self::Socket(path.0)),
            _ => Err(near::instead(text, "values", &forms)),
        }
    }
}

/// A word that names one of a few things.
macro_rules! choice {
    ($Type:ty { $($word:literal => $value:expr,)+ }) => {
        impl Word for $Type {
            fn read(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok($value),)+
                    other => Err(near::instead(other, "values", &[$($word),+])),
                }
            }
        }
    };
}

choice!(BootProtocol {
    "auto" => Self::Auto,
    "linux" => Self::Linux,
    "pvh" => Self::Pvh,
    "multiboot" => Self::Multiboot,
});

choice!(OnReboot {
    "restart" => Self::Restart,
    "exit" => Self::Exit,
});

choice!(NetBackendName {
    "none" => Self::None,
    "tap" => Self::Tap,
});

choice!(Doorbell {
    "exit" => Self::Exit,
    "poll" => Self::Poll,
});

choice!(PageTable {
    "v1" => Self::V1,
    "v2" => Self::V2,
    "any" => Self::Any,
});

/// How a vIOMMU works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViommuMode {
    /// Hardware where it can, else emulated.
    Auto,
    /// The host IOMMU's hardware.
    Hardware,
    /// Ravelin.
    Emulated,
    /// A model of the hardware.
    Simulated,
    /// One for each IOMMU of the host that serves functions without a place, each as [`ViommuMode::Auto`].
    PerHost,
}

choice!(ViommuMode {
    "auto" => Self::Auto,
    "hw" => Self::Hardware,
    "emulated" => Self::Emulated,
    "sim" => Self::Simulated,
    "per-host" => Self::PerHost,
});

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: Word>(text: &str) -> T {
        T::read(text).unwrap_or_else(|problem| panic!("{text}: {problem}"))
    }

    fn refused<T: Word>(texts: &[&str]) {
        let taken: Vec<_> = texts.iter().filter(|text| T::read(text).is_ok()).collect();
        assert!(taken.is_empty(), "taken: {taken:?}");
    }

    #[test]
    fn sizes_have_binary_units() {
        let sizes = ["4096", "4K", "512M", "4g", "2GiB", "3T", "0x1000"].map(|text| read::<Size>(text).0);
        assert_eq!(sizes, [4096, 4096, 512 << 20, 4 << 30, 2 << 30, 3 << 40, 4096]);
        refused::<Size>(&[
            "",
            "G",
            "4X",
            "4.5G",
            "-1",
            "4GB",
            "99999999T",
            "0x",
            " 4G",
            "4 G",
        ]);
    }

    #[test]
    fn sizes_are_written_in_the_largest_whole_unit() {
        let texts = [0, 512, 4096, 3 << 29, 1 << 40].map(size_text);
        assert_eq!(texts, ["0", "512", "4K", "1536M", "1T"]);
    }

    #[test]
    fn slots_are_decimal_unless_they_say_otherwise() {
        let slots = ["4.0", "31.7", "0x1f.0", "5"].map(|text| read::<Slot>(text).to_string());
        assert_eq!(slots, ["4.0", "31.7", "31.0", "5.0"]);
        refused::<Slot>(&["32.0", "4.8", "1f.0", "4.", ".1", "4.0.0", "-1.0", "+1.0", ""]);
        let problem = Slot::read("40.0").expect_err("beyond 31");
        assert!(problem.contains("0 to 31"), "{problem}");
    }

    #[test]
    fn bus_ranges_run_forwards() {
        assert_eq!(read::<BusRange>("0x00-0x3f").0, 0..=0x3f);
        assert_eq!(read::<BusRange>("64").0, 64..=64);
        refused::<BusRange>(&["0x3f-0x00", "0-256", "0x-1", "a-b", "", "-"]);
    }

    #[test]
    fn addresses_of_stations_are_unicast() {
        assert_eq!(
            read::<MacAddress>("52:54:00:12:34:56").to_string(),
            "52:54:00:12:34:56"
        );
        refused::<MacAddress>(&[
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "5:54:00:12:34:56",
            "+5:54:00:12:34:56",
        ]);
    }

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(read::<CpuSet>("0-3,8").to_string(), "0-3,8");
        refused::<CpuSet>(&["", "3-0", "a", "0,", "0-4294967295", "0-"]);
    }

    #[test]
    fn streams_name_their_file() {
        assert_eq!(
            read::<CharBackend>("file:a:b"),
            CharBackend::File(PathBuf::from("a:b"))
        );
        assert_eq!(read::<CharBackend>("pty"), CharBackend::Pty);
        refused::<CharBackend>(&["", "file", "file:", "tcp:1", "stdout"]);
    }

    #[test]
    fn names_are_plain() {
        assert_eq!(read::<Name>("sw0.1").0, "sw0.1");
        refused::<Name>(&["", "-a", ".a", "a b", "a/b", "ü", &"a".repeat(64)]);
    }

    #[test]
    fn interfaces_and_descriptors_are_such_that_the_kernel_has() {
        assert_eq!(read::<Interface>("tap0").0, "tap0");
        refused::<Interface>(&["", "..", "a/b", "tap%d", "sixteen-letters-"]);
        assert_eq!(read::<Descriptor>("3"), Descriptor(3));
        refused::<Descriptor>(&["2", "-1", "2147483648", "x"]);
    }

    #[test]
    fn huge_pages_come_in_two_sizes() {
        assert_eq!(read::<HugePages>("2M"), HugePages::Of(2 << 20));
        assert_eq!(read::<HugePages>("1G"), HugePages::Of(1 << 30));
        assert_eq!(read::<HugePages>("off"), HugePages::Off);
        refused::<HugePages>(&["on", "4M", "4K", ""]);
    }

    #[test]
    fn a_choice_that_is_none_names_the_nearest() {
        let problem = BootProtocol::read("linx").expect_err("no protocol");
        assert_eq!(
            problem,
            "did you mean `linux`? values are auto, linux, pvh, multiboot"
        );
    }

    #[test]
    fn numbers_may_be_grouped_but_not_signed() {
        assert_eq!(read::<u32>("1_000"), 1000);
        assert_eq!(read::<u16>("0xffff"), 0xffff);
        refused::<u16>(&["65536", "-1", "+1", "1.0", "", "0xg", "0x+1"]);
        refused::<NonZeroU16>(&["0"]);
    }
}
