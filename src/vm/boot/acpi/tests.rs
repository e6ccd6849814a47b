//! The tables as bytes. What they mean is read back by a decoder of its own in `tests/acpi/`.

use super::*;
use crate::pci::tree::{
    Bridge, ECAM_BYTES, Identity, Node, NodeKind, PortRange, RootComplex, Segment, Windows,
};
use crate::platform::addr::{Bdf, GpaRange};

const AT: Gpa = Gpa(0x9_0000);

fn port(bus: u8, device: u8) -> Node {
    Node {
        name: format!("rp{bus}.{device}"),
        bdf: Bdf::new(bus, device, 0).expect("in range"),
        kind: NodeKind::RootPort,
        identity: Identity {
            vendor: 1,
            device: 2,
            class: 0x06_0400,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        },
        multi_function: false,
        bars: Vec::new(),
        intx: None,
        bridge: Some(Bridge {
            secondary: bus + 1,
            subordinate: bus + 1,
            windows: Windows::default(),
            slot: Some(1),
            children: Vec::new(),
        }),
    }
}

fn segment(number: u16, ecam: u64, roots: Vec<RootComplex>) -> Segment {
    Segment {
        number,
        ecam: GpaRange::new(Gpa(ecam), ECAM_BYTES).expect("valid"),
        roots,
    }
}

fn two_segments() -> PciTree {
    let windows = Windows {
        io: PortRange::new(0x1000, 0xffff),
        mem32: GpaRange::new(Gpa(0xd000_0000), 0x1000_0000),
        mem64: GpaRange::new(Gpa(0x80_0000_0000), 0x1_0000_0000),
    };
    let first = RootComplex {
        name: "rc0".to_owned(),
        segment: 0,
        buses: 0..=0x3f,
        windows,
        functions: vec![port(0, 1), port(0, 2)],
        uid: 0,
    };
    let second = RootComplex {
        name: "rc1".to_owned(),
        segment: 1,
        buses: 0x40..=0xff,
        windows: Windows::default(),
        functions: vec![port(0x40, 1)],
        uid: 1,
    };
    PciTree {
        segments: vec![
            segment(0, 0xc000_0000, vec![first]),
            segment(1, 0x40_0000_0000, vec![second]),
        ],
    }
}

fn described(apic_ids: &[u32]) -> AcpiTables {
    let pci = two_segments();
    let hardware = Hardware {
        apic_ids,
        pci: &pci,
        viommus: &[],
        hpet: true,
        pvpanic: true,
    };
    describe(&hardware, AT)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The table that starts at an address.
fn table(tables: &AcpiTables, at: u64) -> &[u8] {
    let start = usize::try_from(at - AT.0).expect("inside");
    let length = u32_at(&tables.bytes, start + 4) as usize;
    &tables.bytes[start..start + length]
}

fn listed(tables: &AcpiTables) -> Vec<&[u8]> {
    let xsdt = table(tables, u64_at(&tables.bytes, 24));
    xsdt[36..]
        .chunks_exact(8)
        .map(|entry| table(tables, u64_at(entry, 0)))
        .collect()
}

fn named<'a>(tables: &'a AcpiTables, signature: &[u8; 4]) -> &'a [u8] {
    listed(tables)
        .into_iter()
        .find(|table| table[..4] == signature[..])
        .expect("listed in the XSDT")
}

/// Each entry of the MADT, by its length field.
fn madt_entries(tables: &AcpiTables) -> Vec<&[u8]> {
    let mut rest = &named(tables, b"APIC")[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(usize::from(rest[1]));
        entries.push(entry);
        rest = after;
    }
    entries
}

fn of_kind<'a>(entries: &[&'a [u8]], kind: u8) -> Vec<&'a [u8]> {
    entries.iter().copied().filter(|entry| entry[0] == kind).collect()
}

#[test]
fn every_listed_table_sums_to_zero() {
    let tables = described(&[0, 1]);
    let signatures: Vec<_> = listed(&tables).iter().map(|table| table[..4].to_vec()).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"SPCR", b"HPET"]);
    assert!(listed(&tables).iter().all(|table| sum(table) == 0));
    assert_eq!(
        sum(table(&tables, u64_at(named(&tables, b"FACP"), 140))),
        0,
        "DSDT"
    );
    assert_eq!(sum(table(&tables, u64_at(&tables.bytes, 24))), 0, "XSDT");
}

#[test]
fn the_root_pointer_starts_the_blob_and_has_both_checksums() {
    let tables = described(&[0]);
    assert_eq!(tables.rsdp, AT);
    assert_eq!(&tables.bytes[..8], b"RSD PTR ");
    assert_eq!(sum(&tables.bytes[..20]), 0);
    assert_eq!(sum(&tables.bytes[..RSDP_LEN]), 0);
}

#[test]
fn tables_move_with_their_address_and_change_in_nothing_else() {
    let pci = two_segments();
    let hardware = Hardware {
        apic_ids: &[0],
        pci: &pci,
        viommus: &[],
        hpet: false,
        pvpanic: false,
    };
    let low = describe(&hardware, Gpa(0x9_0000));
    let high = describe(&hardware, Gpa(0x1_0000_0000));
    assert_eq!(low.bytes.len(), high.bytes.len());
    assert_eq!(
        u64_at(&high.bytes, 24) - u64_at(&low.bytes, 24),
        0x1_0000_0000 - 0x9_0000
    );
}

#[test]
fn the_facs_lies_on_a_64_byte_border() {
    let tables = described(&[0]);
    let facs = u64_at(named(&tables, b"FACP"), 132);
    assert!(facs.is_multiple_of(64));
    assert_eq!(&table(&tables, facs)[..4], b"FACS");
}

#[test]
fn apic_ids_from_255_on_are_x2apic_entries() {
    let tables = described(&[0, 254, 255, 256, 1023]);
    let entries = madt_entries(&tables);
    let local: Vec<_> = of_kind(&entries, 0).iter().map(|e| (e[2], e[3])).collect();
    let x2apic: Vec<_> = of_kind(&entries, 9)
        .iter()
        .map(|e| (u32_at(e, 12), u32_at(e, 4)))
        .collect();
    assert_eq!(local, [(0, 0), (1, 254)]);
    assert_eq!(x2apic, [(2, 255), (3, 256), (4, 1023)]);
    assert_eq!(of_kind(&entries, 4).len(), 1, "local APIC NMI");
    assert_eq!(of_kind(&entries, 10).len(), 1, "local x2APIC NMI");
}

#[test]
fn without_large_apic_ids_no_entry_needs_the_x2apic() {
    let tables = described(&[0, 1, 2, 3]);
    let entries = madt_entries(&tables);
    assert_eq!(of_kind(&entries, 0).len(), 4);
    assert!(of_kind(&entries, 9).is_empty() && of_kind(&entries, 10).is_empty());
}

#[test]
fn a_thousand_processors_have_a_thousand_entries_and_objects() {
    let ids: Vec<u32> = (0..1024).collect();
    let tables = described(&ids);
    let entries = madt_entries(&tables);
    assert_eq!(of_kind(&entries, 0).len() + of_kind(&entries, 9).len(), 1024);
    let dsdt = table(&tables, u64_at(named(&tables, b"FACP"), 140));
    let objects = dsdt.windows(8).filter(|bytes| *bytes == b"ACPI0007").count();
    assert_eq!(objects, 1024);
}

#[test]
fn the_sci_is_level_triggered_and_active_high() {
    let tables = described(&[0]);
    let entries = madt_entries(&tables);
    let overrides = of_kind(&entries, 2);
    let sci = overrides
        .iter()
        .find(|entry| entry[3] == 9)
        .expect("an override of IRQ 9");
    assert_eq!((u32_at(sci, 4), sci[8]), (9, 0b1101));
}

#[test]
fn irq_0_moves_to_input_2_only_with_an_hpet() {
    let pci = two_segments();
    let hardware = Hardware {
        apic_ids: &[0],
        pci: &pci,
        viommus: &[],
        hpet: false,
        pvpanic: true,
    };
    let without = describe(&hardware, AT);
    let with = described(&[0]);
    let sources = |tables: &AcpiTables| -> Vec<u8> {
        of_kind(&madt_entries(tables), 2)
            .iter()
            .map(|entry| entry[3])
            .collect()
    };
    assert_eq!(sources(&without), [9]);
    assert_eq!(sources(&with), [0, 9]);
    assert!(listed(&without).iter().all(|table| table[..4] != b"HPET"[..]));
}

#[test]
fn every_root_complex_has_its_part_of_an_ecam_below_or_above_4_gib() {
    let tables = described(&[0]);
    let ecams: Vec<_> = named(&tables, b"MCFG")[44..]
        .chunks_exact(16)
        .map(|e| (u64_at(e, 0), e[8], e[10], e[11]))
        .collect();
    assert_eq!(ecams, [(0xc000_0000, 0, 0, 63), (0x40_0000_0000, 1, 64, 255)]);
}

#[test]
#[should_panic(expected = "64-byte border")]
fn an_address_off_the_border_is_our_mistake() {
    let pci = two_segments();
    let hardware = Hardware {
        apic_ids: &[0],
        pci: &pci,
        viommus: &[],
        hpet: false,
        pvpanic: false,
    };
    let _ = describe(&hardware, Gpa(0x9_0008));
}
