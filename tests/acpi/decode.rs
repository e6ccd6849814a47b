//! A decoder for ACPI tables that knows nothing of how they were made: it follows the root pointer and
//! writes down what a guest would learn, in a form that a person can compare with a machine file.
//!
//! It understands the part of AML that describes (names, packages, devices, resources). Methods are shown as
//! bytes; `iasl` reads those in the lab. Whatever it does not understand ends the test with a panic.

use std::fmt::Write;

/// What the tables in `memory`, which starts at address `base`, say to someone who is given `root`.
pub(crate) fn outline(memory: &[u8], base: u64, root: u64) -> String {
    let tables = Memory { bytes: memory, base };
    let mut out = String::new();
    let rsdp = tables.at(root, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ", "the root pointer's signature");
    assert_eq!(sum(&rsdp[..20]), 0, "the root pointer's first checksum");
    assert_eq!(sum(rsdp), 0, "the root pointer's second checksum");
    let xsdt = tables.table(u64_at(rsdp, 24));
    for entry in xsdt[36..].chunks_exact(8) {
        let table = tables.table(u64_at(entry, 0));
        let _ = writeln!(out, "{} revision {}", text(&table[..4]), table[8]);
        match &table[..4] {
            b"FACP" => {
                fadt(table, &mut out);
                let facs = tables.at(u64_at(table, 132), 64);
                assert_eq!(&facs[..4], b"FACS", "what the FADT points at");
                let dsdt = tables.table(u64_at(table, 140));
                assert_eq!(&dsdt[..4], b"DSDT", "what the FADT points at");
                let _ = writeln!(out, "DSDT revision {}", dsdt[8]);
                Aml { bytes: &dsdt[36..] }.terms(1, &mut out);
            }
            b"APIC" => madt(table, &mut out),
            b"MCFG" => mcfg(table, &mut out),
            b"SPCR" => spcr(table, &mut out),
            b"HPET" => {
                let _ = writeln!(out, "  at {:#x}, id {:#x}", u64_at(table, 44), u32_at(table, 36));
            }
            b"IVRS" => ivrs(table, &mut out),
            unknown => panic!("an unknown table {}", text(unknown)),
        }
    }
    out
}

struct Memory<'a> {
    bytes: &'a [u8],
    base: u64,
}

impl<'a> Memory<'a> {
    fn at(&self, address: u64, len: usize) -> &'a [u8] {
        let start = usize::try_from(address - self.base).expect("inside");
        &self.bytes[start..start + len]
    }

    /// A table by its own length, its checksum tested.
    fn table(&self, address: u64) -> &'a [u8] {
        let length = u32_at(self.at(address, 8), 4) as usize;
        let table = self.at(address, length);
        assert_eq!(sum(table), 0, "checksum of {}", text(&table[..4]));
        table
    }
}

fn fadt(table: &[u8], out: &mut String) {
    let _ = writeln!(
        out,
        "  SCI {}, SMI port {:#x}",
        u16_at(table, 46),
        u32_at(table, 48)
    );
    for (name, old, new) in [("PM1a event", 56, 148), ("PM1a control", 64, 172)] {
        assert_eq!(
            u64::from(u32_at(table, old)),
            u64_at(table, new + 4),
            "both addresses of {name}"
        );
        let _ = writeln!(out, "  {name} {}", register(table, new));
    }
    for (name, at) in [("PM2 control", 196), ("PM timer", 208), ("GPE0", 220)] {
        assert_eq!(u64_at(table, at + 4), 0, "there is no {name}");
    }
    let _ = writeln!(out, "  reset {} value {:#x}", register(table, 116), table[128]);
    let _ = writeln!(
        out,
        "  boot flags {:#06x}, flags {:#010x}",
        u16_at(table, 109),
        u32_at(table, 112)
    );
}

fn register(table: &[u8], at: usize) -> String {
    let space = ["memory", "port"][usize::from(table[at])];
    format!("{space} {:#x}, {} bits", u64_at(table, at + 4), table[at + 1])
}

fn madt(table: &[u8], out: &mut String) {
    let _ = writeln!(
        out,
        "  local APICs at {:#x}, flags {:#x}",
        u32_at(table, 36),
        u32_at(table, 40)
    );
    let mut rest = &table[44..];
    while let [kind, length, ..] = *rest {
        let (entry, after) = rest.split_at(usize::from(length));
        rest = after;
        let _ = match (kind, length) {
            (0, 8) => writeln!(
                out,
                "  processor {} APIC {} flags {}",
                entry[2],
                entry[3],
                u32_at(entry, 4)
            ),
            (9, 16) => {
                let (uid, id) = (u32_at(entry, 12), u32_at(entry, 4));
                writeln!(out, "  processor {uid} x2APIC {id} flags {}", u32_at(entry, 8))
            }
            (1, 12) => {
                let (at, gsi) = (u32_at(entry, 4), u32_at(entry, 8));
                writeln!(out, "  I/O APIC {} at {at:#x} from GSI {gsi}", entry[2])
            }
            (2, 10) => {
                let (gsi, flags) = (u32_at(entry, 4), u16_at(entry, 8));
                writeln!(
                    out,
                    "  bus {} IRQ {} is GSI {gsi}, flags {flags:#x}",
                    entry[2], entry[3]
                )
            }
            (4, 6) => writeln!(out, "  NMI at LINT{} of processor {:#x}", entry[5], entry[2]),
            (10, 12) => writeln!(
                out,
                "  NMI at LINT{} of x2APIC processor {:#x}",
                entry[8],
                u32_at(entry, 4)
            ),
            unknown => panic!("an unknown MADT entry {unknown:?}"),
        };
    }
}

fn mcfg(table: &[u8], out: &mut String) {
    for entry in table[44..].chunks_exact(16) {
        let (base, segment) = (u64_at(entry, 0), u16_at(entry, 8));
        let _ = writeln!(
            out,
            "  segment {segment} buses {:02x}-{:02x} at {base:#x}",
            entry[10], entry[11]
        );
    }
}

fn spcr(table: &[u8], out: &mut String) {
    let _ = writeln!(
        out,
        "  interface {} at {}, GSI {}",
        table[36],
        register(table, 40),
        u32_at(table, 54)
    );
}

fn ivrs(table: &[u8], out: &mut String) {
    let info = u32_at(table, 36);
    let _ = writeln!(
        out,
        "  info {info:#010x}: {} bits physical, {} virtual",
        info >> 8 & 0x7f,
        info >> 15 & 0x7f
    );
    assert_eq!(table[40..48], [0; 8], "reserved");
    let mut rest = &table[48..];
    while !rest.is_empty() {
        let (block, after) = rest.split_at(usize::from(u16_at(rest, 2)));
        rest = after;
        ivhd(block, out);
    }
}

/// One unit by one type of block: its header, then who it covers.
fn ivhd(block: &[u8], out: &mut String) {
    let header = if block[0] == 0x10 { 24 } else { 40 };
    let _ = writeln!(
        out,
        "  IVHD {:02x}h flags {:#04x}, {} of segment {}, capability at {:#x}, registers at {:#x}, info {:#x}",
        block[0],
        block[1],
        bdf(u16_at(block, 4)),
        u16_at(block, 16),
        u16_at(block, 6),
        u64_at(block, 8),
        u16_at(block, 18)
    );
    let _ = writeln!(out, "    features or attributes {:#010x}", u32_at(block, 20));
    if header == 40 {
        let _ = writeln!(
            out,
            "    EFR {:#018x}, EFR2 {:#x}",
            u64_at(block, 24),
            u64_at(block, 32)
        );
    }
    let mut entries = Aml {
        bytes: &block[header..],
    };
    while !entries.bytes.is_empty() {
        let kind = entries.byte();
        let _ = match kind {
            0x02..=0x04 => {
                let what = ["only", "from", "to"][usize::from(kind - 2)];
                let body = entries.take(3);
                assert_eq!(body[2], 0, "no data");
                writeln!(out, "    {what} {}", bdf(u16_at(body, 0)))
            }
            0x48 => {
                let body = entries.take(7);
                let what = ["", "I/O APIC", "HPET"][usize::from(body[6])];
                let sender = bdf(u16_at(body, 4));
                writeln!(
                    out,
                    "    {what} {} sends as {sender}, data {:#04x}",
                    body[3], body[2]
                )
            }
            unknown => panic!("an unknown device entry {unknown:#04x}"),
        };
    }
}

fn bdf(id: u16) -> String {
    format!("{:02x}:{:02x}.{}", id >> 8, id >> 3 & 0x1f, id & 7)
}

/// AML from some point on.
struct Aml<'a> {
    bytes: &'a [u8],
}

impl<'a> Aml<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(count);
        self.bytes = rest;
        taken
    }

    /// What a PkgLength at this point encloses.
    fn package(&mut self) -> Self {
        let before = self.bytes.len();
        let lead = self.byte();
        let more = usize::from(lead >> 6);
        let mut length = usize::from(lead & if more == 0 { 0x3f } else { 0x0f });
        for at in 0..more {
            length |= usize::from(self.byte()) << (4 + 8 * at);
        }
        let header = before - self.bytes.len();
        Self {
            bytes: self.take(length - header),
        }
    }

    fn name(&mut self) -> String {
        let root = if self.bytes[0] == b'\\' {
            text(self.take(1))
        } else {
            String::new()
        };
        let parts = match self.bytes[0] {
            0x2e => {
                self.byte();
                2
            }
            0x2f => {
                self.byte();
                usize::from(self.byte())
            }
            _ => 1,
        };
        let parts: Vec<String> = (0..parts).map(|_| text(self.take(4))).collect();
        format!("{root}{}", parts.join("."))
    }

    fn terms(&mut self, depth: usize, out: &mut String) {
        let margin = "  ".repeat(depth);
        while !self.bytes.is_empty() {
            match self.byte() {
                0x10 => {
                    let mut body = self.package();
                    let _ = writeln!(out, "{margin}scope {}", body.name());
                    body.terms(depth + 1, out);
                }
                0x08 => {
                    let name = self.name();
                    let data = self.data();
                    write_named(&margin, &name, &data, out);
                }
                0x14 => {
                    let mut body = self.package();
                    let name = body.name();
                    let flags = body.byte();
                    let serialized = if flags & 8 == 0 { "" } else { " serialized" };
                    let _ = writeln!(out, "{margin}method {name}, {} arguments{serialized}", flags & 7);
                    for line in body.bytes.chunks(32) {
                        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
                        let _ = writeln!(out, "{margin}  {}", hex.join(" "));
                    }
                }
                0x5b => {
                    assert_eq!(self.byte(), 0x82, "the only extended term known here is a device");
                    let mut body = self.package();
                    let _ = writeln!(out, "{margin}device {}", body.name());
                    body.terms(depth + 1, out);
                }
                unknown => panic!("an unknown term {unknown:#04x}"),
            }
        }
    }

    fn data(&mut self) -> Data<'a> {
        match self.byte() {
            0x00 => Data::Integer(0),
            0x01 => Data::Integer(1),
            0xff => Data::Integer(u64::MAX),
            0x0a => Data::Integer(u64::from(self.byte())),
            0x0b => Data::Integer(u64::from(u16_at(self.take(2), 0))),
            0x0c => Data::Integer(u64::from(u32_at(self.take(4), 0))),
            0x0e => Data::Integer(u64_at(self.take(8), 0)),
            0x0d => {
                let length = self
                    .bytes
                    .iter()
                    .position(|&byte| byte == 0)
                    .expect("a string ends");
                let string = text(self.take(length));
                self.byte();
                Data::Text(string)
            }
            0x11 => {
                let mut body = self.package();
                let Data::Integer(size) = body.data() else {
                    panic!("a buffer's size is a number")
                };
                assert_eq!(size, body.bytes.len() as u64, "a buffer's size");
                Data::Buffer(body.bytes)
            }
            0x12 => {
                let mut body = self.package();
                let count = body.byte();
                let elements: Vec<Data<'a>> = (0..count).map(|_| body.data()).collect();
                assert!(
                    body.bytes.is_empty(),
                    "a package holds as many elements as it says"
                );
                Data::Package(elements)
            }
            unknown => panic!("an unknown data object {unknown:#04x}"),
        }
    }
}

enum Data<'a> {
    Integer(u64),
    Text(String),
    Buffer(&'a [u8]),
    Package(Vec<Data<'a>>),
}

impl Data<'_> {
    fn integer(&self) -> u64 {
        let Self::Integer(value) = self else {
            panic!("not a number")
        };
        *value
    }
}

fn write_named(margin: &str, name: &str, data: &Data<'_>, out: &mut String) {
    let _ = match (name, data) {
        ("_HID" | "_CID", Data::Integer(id)) => writeln!(out, "{margin}{name} {}", eisa_id(*id)),
        ("_CRS", Data::Buffer(template)) => {
            let _ = writeln!(out, "{margin}{name}");
            resources(template, margin, out);
            Ok(())
        }
        ("_PRT", Data::Package(routes)) => {
            let _ = writeln!(out, "{margin}{name}");
            for route in routes {
                let Data::Package(route) = route else {
                    panic!("a route is a package")
                };
                let [address, pin, source, gsi] = route.iter().map(Data::integer).collect::<Vec<_>>()[..]
                else {
                    panic!("a route has four elements");
                };
                assert_eq!(
                    (address & 0xffff, source),
                    (0xffff, 0),
                    "any function, no link device"
                );
                let pin = char::from(b"ABCD"[usize::try_from(pin).expect("0 to 3")]);
                let _ = writeln!(
                    out,
                    "{margin}  device {:02x} INT{pin} is GSI {gsi}",
                    address >> 16
                );
            }
            Ok(())
        }
        (_, Data::Integer(value)) => writeln!(out, "{margin}{name} {value:#x}"),
        (_, Data::Text(value)) => writeln!(out, "{margin}{name} \"{value}\""),
        (_, Data::Package(values)) => {
            let values: Vec<u64> = values.iter().map(Data::integer).collect();
            writeln!(out, "{margin}{name} {values:?}")
        }
        (_, Data::Buffer(_)) => panic!("an unknown buffer {name}"),
    };
}

/// Resource descriptors (ACPI 6.5, section 6.4).
fn resources(template: &[u8], margin: &str, out: &mut String) {
    let mut rest = Aml { bytes: template };
    loop {
        let tag = rest.byte();
        if tag == 0x79 {
            assert_eq!(rest.take(1), [0], "the end tag, without a checksum");
            assert!(rest.bytes.is_empty(), "the end tag comes last");
            return;
        }
        let length = if tag & 0x80 == 0 {
            usize::from(tag & 7)
        } else {
            usize::from(u16_at(rest.take(2), 0))
        };
        let body = rest.take(length);
        let _ = match tag {
            0x47 => {
                let (first, last) = (u16_at(body, 1), u16_at(body, 3));
                assert_eq!(first, last, "ports have one place");
                writeln!(out, "{margin}  ports {first:04x}, {} of them", body[6])
            }
            0x87 => window(body, 4, margin, out),
            0x88 => window(body, 2, margin, out),
            0x8a => window(body, 8, margin, out),
            0x89 => {
                let how = ["level", "edge"][usize::from(body[0] >> 1 & 1)];
                let polarity = ["high", "low"][usize::from(body[0] >> 2 & 1)];
                assert_eq!(body[1], 1, "one interrupt");
                writeln!(out, "{margin}  GSI {}, {how}, active {polarity}", u32_at(body, 2))
            }
            unknown => panic!("an unknown resource descriptor {unknown:#04x}"),
        };
    }
}

/// An address space descriptor whose five numbers have `width` bytes each.
fn window(body: &[u8], width: usize, margin: &str, out: &mut String) -> std::fmt::Result {
    let number = |at: usize| {
        let bytes = &body[3 + at * width..3 + (at + 1) * width];
        bytes
            .iter()
            .rev()
            .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let kind = ["memory", "ports", "buses"][usize::from(body[0])];
    let role = ["forwards", "uses"][usize::from(body[1] & 1)];
    assert_eq!(body[1] & 0x0c, 0x0c, "both ends are fixed");
    let (granularity, first, last, translation, length) =
        (number(0), number(1), number(2), number(3), number(4));
    assert_eq!((granularity, translation), (0, 0), "untranslated");
    assert_eq!(last - first + 1, length, "a window's length");
    writeln!(out, "{margin}  {role} {kind} {first:x}-{last:x}")
}

fn eisa_id(id: u64) -> String {
    let id = u32::try_from(id).expect("an EISA ID has 32 bits").swap_bytes();
    let letter = |shift: u32| char::from(u8::try_from(id >> shift & 0x1f).expect("5 bits") + b'@');
    format!("{}{}{}{:04X}", letter(26), letter(21), letter(16), id & 0xffff)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("ASCII")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
