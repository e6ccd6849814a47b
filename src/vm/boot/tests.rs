//! Images made here are loaded into RAM and looked at as the kernel would.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::acpi::{AcpiTables, RSDP_LEN};
use super::images::{BootError, Images};
use super::registers::{Entry, Mode};
use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::memory::GuestRam;
use crate::vm::plan::{BootModule, BootPlan, BootProtocol};

/// Bytes of low RAM of the machines here.
const LOW_RAM: u64 = 64 << 20;
/// Where the zero page lies.
const ZERO_PAGE: u64 = 0x7000;
/// Where the start information of PVH and multiboot lies.
const START_INFO: u64 = 0x6000;
/// Pages the stand-in for the ACPI tables takes.
const TABLES: u64 = 0x1000;

/// A folder with files, and a machine to load them into.
struct Bench {
    folder: TempDir,
    ram: GuestRam,
}

impl Bench {
    fn new() -> Self {
        let low = usize::try_from(LOW_RAM).expect("small");
        let ranges = [(GuestAddress(0), low), (GuestAddress(1 << 32), 32 << 20)];
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            ram: GuestRam::new(GuestMemoryMmap::from_ranges(&ranges).expect("mappings")),
        }
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).expect("room");
        path
    }

    fn plan(&self, kernel: &[u8]) -> BootPlan {
        BootPlan {
            kernel: self.file("kernel", kernel),
            protocol: BootProtocol::Auto,
            initramfs: None,
            modules: Vec::new(),
            cmdline: None,
        }
    }

    fn load(&self, plan: &BootPlan) -> Result<Entry, BootError> {
        Images::open(plan, "console=ttyS0")?.load(&self.ram, tables, [ecam()].into_iter())
    }

    fn refused(&self, plan: &BootPlan) -> String {
        let error = self.load(plan).expect_err("cannot be loaded");
        let source = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default()).replace(&self.place(), "")
    }

    fn place(&self) -> String {
        format!("{}/", self.folder.path().display())
    }

    fn word(&self, at: u64) -> u32 {
        self.ram.read_obj(Gpa(at)).expect("inside RAM")
    }

    fn long(&self, at: u64) -> u64 {
        self.ram.read_obj(Gpa(at)).expect("inside RAM")
    }

    fn text(&self, at: u64) -> String {
        let mut bytes = [0; 256];
        self.ram.read(Gpa(at), &mut bytes).expect("inside RAM");
        let end = bytes.iter().position(|byte| *byte == 0).expect("a final zero");
        String::from_utf8(bytes[..end].to_vec()).expect("text")
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(Gpa(at), &mut bytes).expect("inside RAM");
        bytes
    }
}

fn tables(at: Gpa) -> AcpiTables {
    let mut bytes = vec![0x5a; 100];
    bytes[..8].copy_from_slice(b"RSD PTR ");
    bytes[16..24].copy_from_slice(&at.0.to_le_bytes());
    AcpiTables { bytes, rsdp: at }
}

fn ecam() -> GpaRange {
    GpaRange::new(Gpa(0xe000_0000), 0x1000_0000).expect("valid")
}

/// Overwrite a part of `image`.
fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Setup of one sector besides the boot sector, and 48 bytes of kernel that say so.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 48];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &3_u32.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &3_u16.to_le_bytes());
    put(&mut image, 0x238, &200_u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut image, 0x260, &0x80_0000_u32.to_le_bytes());
    image[1024..].fill(0x90);
    image
}

/// The e820 entries in the zero page, as start, length and type.
fn e820(bench: &Bench) -> Vec<(u64, u64, u32)> {
    let count = bench.bytes(ZERO_PAGE + 0x1e8, 1)[0];
    let entry = |n: u64| ZERO_PAGE + 0x2d0 + n * 20;
    (0..u64::from(count))
        .map(|n| {
            (
                bench.long(entry(n)),
                bench.long(entry(n) + 8),
                bench.word(entry(n) + 16),
            )
        })
        .collect()
}

#[test]
fn a_bzimage_lies_where_it_wants_and_starts_at_its_64_bit_entry() {
    let bench = Bench::new();
    let entry = bench.load(&bench.plan(&bzimage())).expect("it fits");
    assert_eq!(
        (entry.mode, entry.rip, entry.rsi),
        (Mode::Long, 0x100_0200, ZERO_PAGE)
    );
    assert_eq!(bench.bytes(0x100_0000, 49), [vec![0x90; 48], vec![0]].concat());
}

#[test]
fn a_bzimage_longer_than_what_it_starts_in_is_refused() {
    let bench = Bench::new();
    let mut image = bzimage();
    put(&mut image, 0x260, &0x1000_u32.to_le_bytes());
    image.resize(1024 + 0x1000, 0x90);
    bench.load(&bench.plan(&image)).expect("it fits");
    image.push(0x90);
    let refused = bench.refused(&bench.plan(&image));
    assert!(
        refused.contains("starts in 0x1000 bytes, and has 0x1001"),
        "{refused}"
    );
}

#[test]
fn the_zero_page_tells_command_line_root_pointer_and_memory() {
    let bench = Bench::new();
    let plan = BootPlan {
        cmdline: Some("root=/dev/vda ro".to_owned()),
        ..bench.plan(&bzimage())
    };
    bench.load(&plan).expect("it fits");
    let cmdline = bench.word(ZERO_PAGE + 0x228);
    assert_eq!(bench.text(cmdline.into()), "root=/dev/vda ro");
    assert_eq!(bench.bytes(ZERO_PAGE + 0x210, 1), [0xff]);
    assert_eq!(bench.bytes(bench.long(ZERO_PAGE + 0x70), 8), b"RSD PTR ");
    let top = LOW_RAM - TABLES;
    assert_eq!(
        e820(&bench),
        [
            (0, 0xa_0000, 1),
            (0xa_0000, 0x6_0000, 2),
            (0x10_0000, top - 0x10_0000, 1),
            (top, TABLES, 3),
            (0xe000_0000, 0x1000_0000, 2),
            (1 << 32, 32 << 20, 1),
        ]
    );
}

#[test]
fn guests_that_search_find_the_root_pointer_below_1_mib() {
    let bench = Bench::new();
    bench.load(&bench.plan(&bzimage())).expect("it fits");
    let there = bench.bytes(LOW_RAM - TABLES, RSDP_LEN);
    assert_eq!(bench.bytes(0xe_0000, RSDP_LEN), there);
    assert_eq!(bench.long(0xe_0010), LOW_RAM - TABLES);
}

#[test]
fn without_a_command_line_the_default_is_used() {
    let bench = Bench::new();
    bench.load(&bench.plan(&bzimage())).expect("it fits");
    assert_eq!(bench.text(0x2_0000), "console=ttyS0");
}

#[test]
fn an_initramfs_lies_at_the_top_of_low_ram_below_the_tables() {
    let bench = Bench::new();
    let plan = BootPlan {
        initramfs: Some(bench.file("initramfs", &[7; 5000])),
        ..bench.plan(&bzimage())
    };
    bench.load(&plan).expect("it fits");
    let at = u64::from(bench.word(ZERO_PAGE + 0x218));
    assert_eq!(at, LOW_RAM - TABLES - 0x2000);
    assert_eq!(bench.word(ZERO_PAGE + 0x21c), 5000);
    assert_eq!(bench.bytes(at, 5000), [7; 5000]);
}

#[test]
fn an_initramfs_too_large_for_low_ram_goes_above_4_gib() {
    let bench = Bench::new();
    let path = bench.file("initramfs", &[7]);
    // 30 MiB fit above 4 GiB; below, the kernel and its room are in the way up to 24 MiB of 64.
    fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(30 << 20))
        .expect("a sparse file");
    let mut image = bzimage();
    put(&mut image, 0x260, &0x280_0000_u32.to_le_bytes());
    let plan = BootPlan {
        initramfs: Some(path),
        ..bench.plan(&image)
    };
    bench.load(&plan).expect("it fits");
    let at = u64::from(bench.word(ZERO_PAGE + 0xc0)) << 32 | u64::from(bench.word(ZERO_PAGE + 0x218));
    assert_eq!(at, (1 << 32) + (2 << 20));
    assert_eq!(bench.bytes(at, 2), [7, 0]);
}

#[test]
fn an_initramfs_that_fits_nowhere_says_what_it_needs() {
    let bench = Bench::new();
    let path = bench.file("initramfs", &[]);
    fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(100 << 20))
        .expect("a sparse file");
    let plan = BootPlan {
        initramfs: Some(path),
        ..bench.plan(&bzimage())
    };
    let refused = bench.refused(&plan);
    assert!(
        refused.starts_with("the initramfs initramfs needs 0x6400000 bytes"),
        "{refused}"
    );
}

#[test]
fn empty_files_and_folders_are_refused_by_name() {
    let bench = Bench::new();
    let with = |initramfs| BootPlan {
        initramfs: Some(initramfs),
        ..bench.plan(&bzimage())
    };
    let empty = bench.refused(&with(bench.file("empty", &[])));
    assert_eq!(empty, "cannot read the initramfs empty: the file is empty");
    let folder = bench.refused(&with(bench.folder.path().to_owned()));
    assert!(folder.starts_with("cannot open the initramfs"), "{folder}");
    let missing = bench.refused(&with(bench.folder.path().join("missing")));
    assert!(
        missing.starts_with("cannot open the initramfs missing: No such file"),
        "{missing}"
    );
}

#[test]
fn a_command_line_is_as_long_as_the_kernel_reads_at_most() {
    let bench = Bench::new();
    let plan = |len| BootPlan {
        cmdline: Some("x".repeat(len)),
        ..bench.plan(&bzimage())
    };
    assert!(bench.load(&plan(200)).is_ok());
    let refused = bench.refused(&plan(201));
    assert_eq!(
        refused,
        "the command line has 201 bytes; kernel reads at most 200: "
    );
}

#[test]
fn a_command_line_with_a_zero_byte_is_refused() {
    let bench = Bench::new();
    let plan = BootPlan {
        cmdline: Some("ro\0root=/dev/sda".to_owned()),
        ..bench.plan(&bzimage())
    };
    assert!(
        bench
            .refused(&plan)
            .starts_with("the command line has a zero byte at offset 2")
    );
}

#[test]
fn a_truncated_bzimage_is_refused_with_both_lengths() {
    let bench = Bench::new();
    let mut image = bzimage();
    image.pop();
    let refused = bench.refused(&bench.plan(&image));
    assert_eq!(
        refused,
        "the kernel kernel is broken: the file has 1071 bytes of 1072: "
    );
    image.truncate(0x230);
    assert!(bench.refused(&bench.plan(&image)).contains("setup header"));
}

#[test]
fn a_kernel_that_needs_more_ram_than_there_is_says_how_much() {
    let bench = Bench::new();
    let mut image = bzimage();
    put(&mut image, 0x260, &0x1000_0000_u32.to_le_bytes());
    let refused = bench.refused(&bench.plan(&image));
    assert!(
        refused.contains("needs 0x10000000 bytes of guest RAM from 0x1000000 on"),
        "{refused}"
    );
}

#[test]
fn an_old_kernel_without_a_64_bit_entry_is_refused_with_its_protocol() {
    let bench = Bench::new();
    let mut image = bzimage();
    put(&mut image, 0x206, &0x020b_u16.to_le_bytes());
    // Before protocol 2.10 there was no such field.
    put(&mut image, 0x260, &[0; 4]);
    assert!(bench.refused(&bench.plan(&image)).contains("boot protocol 2.11"));
}

#[test]
fn no_byte_of_a_setup_header_makes_loading_panic() {
    let bench = Bench::new();
    for at in 0x1f1..0x270 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = bzimage();
            image[at] = value;
            // Refused or loaded: either will do.
            let _ = bench.load(&bench.plan(&image));
        }
    }
}

#[test]
fn what_is_no_kernel_is_told_apart() {
    let bench = Bench::new();
    let of = |bytes: &[u8]| bench.refused(&bench.plan(bytes));
    assert!(of(b"\x1f\x8b\x08").starts_with("kernel is compressed with gzip (unpack it first);"));
    assert!(of(&[]).starts_with("kernel is empty;"));
    assert!(of(b"#!/bin/sh\n").starts_with("kernel is of an unknown kind;"));
}

/// A 64-bit ELF image: one segment of 16 bytes and as much .bss at 2 MiB, linked 1 GiB higher, and one
/// note segment where `note` is not empty.
fn elf64(note: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 0x100];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 18, &62_u16.to_le_bytes());
    put(&mut image, 24, &0x4020_0004_u64.to_le_bytes());
    put(&mut image, 32, &64_u64.to_le_bytes());
    put(&mut image, 54, &56_u16.to_le_bytes());
    put(&mut image, 56, &2_u16.to_le_bytes());
    let header = |kind: u32, offset: u64, virt: u64, phys: u64, file: u64, memory: u64| {
        let mut bytes = [kind.to_le_bytes(), 5_u32.to_le_bytes()].concat();
        for field in [offset, virt, phys, file, memory, 0x1000] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    };
    put(&mut image, 64, &header(1, 0xc0, 0x4020_0000, 0x20_0000, 16, 32));
    let len = note.len() as u64;
    put(&mut image, 120, &header(4, 0x100, 0, 0, len, len));
    image[0xc0..0xd0].fill(0xcc);
    image.extend_from_slice(note);
    image
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = [4_u32, 4, 18].map(u32::to_le_bytes).concat();
    note.extend_from_slice(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

#[test]
fn an_elf_kernel_without_pvh_starts_at_the_physical_address_of_its_entry() {
    let bench = Bench::new();
    // RAM is not fresh after a reset.
    bench.ram.write(Gpa(0x20_0000), &[0xee; 64]).expect("inside RAM");
    let entry = bench.load(&bench.plan(&elf64(&[]))).expect("it fits");
    assert_eq!(
        (entry.mode, entry.rip, entry.rsi),
        (Mode::Long, 0x20_0004, ZERO_PAGE)
    );
    let expected = [vec![0xcc; 16], vec![0; 16], vec![0xee; 32]].concat();
    assert_eq!(bench.bytes(0x20_0000, 64), expected);
    assert_eq!(bench.bytes(ZERO_PAGE + 0x202, 4), b"HdrS");
}

#[test]
fn a_pvh_kernel_starts_in_32_bits_with_its_start_information() {
    let bench = Bench::new();
    let plan = BootPlan {
        cmdline: Some("quiet".to_owned()),
        initramfs: Some(bench.file("initramfs", &[7; 10])),
        ..bench.plan(&elf64(&pvh_note(0x20_0008)))
    };
    let entry = bench.load(&plan).expect("it fits");
    assert_eq!(
        (entry.mode, entry.rip, entry.rbx),
        (Mode::Protected, 0x20_0008, START_INFO)
    );
    assert_eq!(
        (bench.word(START_INFO), bench.word(START_INFO + 4)),
        (0x336e_c578, 1)
    );
    assert_eq!(bench.word(START_INFO + 12), 1);
    let module = bench.long(START_INFO + 16);
    assert_eq!(bench.bytes(bench.long(module), 10), [7; 10]);
    assert_eq!(bench.long(module + 8), 10);
    assert_eq!(bench.text(bench.long(START_INFO + 24)), "quiet");
    assert_eq!(bench.bytes(bench.long(START_INFO + 32), 8), b"RSD PTR ");
    let map = bench.long(START_INFO + 40);
    assert_eq!(bench.word(START_INFO + 48), 6);
    assert_eq!(
        (bench.long(map), bench.long(map + 8), bench.word(map + 16)),
        (0, 0xa_0000, 1)
    );
}

#[test]
fn the_protocol_asked_for_overrides_what_the_image_offers_first() {
    let bench = Bench::new();
    let plan = BootPlan {
        protocol: BootProtocol::Linux,
        ..bench.plan(&elf64(&pvh_note(0x20_0008)))
    };
    assert_eq!(bench.load(&plan).expect("it fits").mode, Mode::Long);
}

#[test]
fn a_protocol_the_image_lacks_is_refused_with_why() {
    let bench = Bench::new();
    let of = |image: &[u8], protocol| {
        let plan = BootPlan {
            protocol,
            ..bench.plan(image)
        };
        bench.refused(&plan)
    };
    let pvh = of(&elf64(&[]), BootProtocol::Pvh);
    assert_eq!(
        pvh,
        "kernel cannot be started by pvh: no note of it names a PVH entry point: "
    );
    assert!(of(&bzimage(), BootProtocol::Pvh).contains("vmlinux"));
    assert!(of(&bzimage(), BootProtocol::Multiboot).contains("it is a bzImage"));
    assert!(of(&elf64(&[]), BootProtocol::Multiboot).contains("no multiboot header"));
}

#[test]
fn an_elf_segment_outside_ram_for_kernels_is_refused_with_both_ranges() {
    let bench = Bench::new();
    for at in [0_u64, 0xf_0000, LOW_RAM - 16, 1 << 40] {
        let mut image = elf64(&[]);
        put(&mut image, 64 + 24, &at.to_le_bytes());
        let refused = bench.refused(&bench.plan(&image));
        assert!(
            refused.contains("RAM for kernels is 00100000-03ffefff"),
            "{refused}"
        );
    }
}

#[test]
fn no_byte_of_elf_headers_makes_loading_panic() {
    let bench = Bench::new();
    let whole = elf64(&pvh_note(0x20_0008));
    for at in 0..0xb0 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = whole.clone();
            image[at] = value;
            // Refused or loaded: either will do.
            let _ = bench.load(&bench.plan(&image));
        }
    }
    for len in 0..whole.len() {
        let _ = bench.load(&bench.plan(&whole[..len]));
    }
}

/// A flat multiboot image loaded at 2 MiB, with `flags` in its header besides its addresses.
fn multiboot(flags: u32) -> Vec<u8> {
    let flags = flags | 1 << 16;
    let mut image = vec![0xf4; 0x80];
    let header = [
        0x1bad_b002,
        flags,
        0_u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags),
        0x20_0010,
        0x20_0000,
        0x20_0080,
        0x20_0100,
        0x20_0040,
    ];
    put(&mut image, 0x10, &header.map(u32::to_le_bytes).concat());
    image
}

#[test]
fn a_multiboot_image_with_addresses_starts_with_everything_it_was_promised() {
    let bench = Bench::new();
    let plan = BootPlan {
        cmdline: Some("a b".to_owned()),
        modules: vec![BootModule {
            path: bench.file("dom0", &[3; 20]),
            cmdline: "console=hvc0".to_owned(),
        }],
        initramfs: Some(bench.file("initramfs", &[4; 20])),
        ..bench.plan(&multiboot(3))
    };
    bench
        .ram
        .write(Gpa(0x20_0080), &[0xee; 0x100])
        .expect("inside RAM");
    let entry = bench.load(&plan).expect("it fits");
    assert_eq!(
        (entry.mode, entry.rip, entry.rax, entry.rbx),
        (Mode::Protected, 0x20_0040, 0x2bad_b002, START_INFO)
    );
    assert_eq!(bench.bytes(0x20_007f, 3), [0xf4, 0, 0]);
    assert_eq!(bench.bytes(0x20_00ff, 2), [0, 0xee]);
    assert_eq!(bench.word(START_INFO) & 0x4d, 0x4d);
    // As the BIOS data area has it.
    assert_eq!(bench.word(START_INFO + 4), bench.word(0x413) & 0xffff);
    assert_eq!(bench.word(START_INFO + 4), 640);
    assert_eq!(
        bench.word(START_INFO + 8),
        u32::try_from((LOW_RAM - TABLES) / 1024 - 1024).expect("small")
    );
    assert_eq!(bench.text(bench.word(START_INFO + 16).into()), "kernel a b");
    assert_eq!(bench.word(START_INFO + 20), 2);
    let modules = u64::from(bench.word(START_INFO + 24));
    let first = u64::from(bench.word(modules));
    assert_eq!(
        (first, u64::from(bench.word(modules + 4))),
        (0x20_1000, 0x20_1014)
    );
    assert_eq!(bench.bytes(first, 20), [3; 20]);
    assert_eq!(bench.text(bench.word(modules + 8).into()), "dom0 console=hvc0");
    assert_eq!(bench.bytes(bench.word(modules + 16).into(), 20), [4; 20]);
    let map = u64::from(bench.word(START_INFO + 48));
    assert_eq!(bench.word(START_INFO + 44), 6 * 24);
    assert_eq!(
        (
            bench.word(map),
            bench.long(map + 4),
            bench.long(map + 12),
            bench.word(map + 20)
        ),
        (20, 0, 0xa_0000, 1)
    );
}

#[test]
fn a_multiboot_image_that_ends_before_it_begins_is_refused_and_clears_nothing() {
    let bench = Bench::new();
    let mut image = multiboot(3);
    put(&mut image, 0x10 + 20, &0x1000_u32.to_le_bytes());
    bench.ram.write(Gpa(0x1000), &[0xee; 0x1000]).expect("inside RAM");
    let refused = bench.refused(&bench.plan(&image));
    assert!(refused.contains("loads 0x200000 to 0x1000"), "{refused}");
    assert_eq!(bench.bytes(0x1000, 0x1000), [0xee; 0x1000]);
}

#[test]
fn demands_that_cannot_be_met_are_refused_by_bit() {
    let bench = Bench::new();
    let refused = bench.refused(&bench.plan(&multiboot(4)));
    assert!(refused.contains("demands 0x4; only bits 0x3"), "{refused}");
}

#[test]
fn a_header_whose_checksum_is_wrong_is_none() {
    let bench = Bench::new();
    let mut image = multiboot(0);
    image[0x18] ^= 1;
    assert!(bench.refused(&bench.plan(&image)).contains("of an unknown kind"));
}

#[test]
fn no_byte_of_a_multiboot_header_makes_loading_panic() {
    let bench = Bench::new();
    for at in 0x1c..0x30 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut image = multiboot(0);
            image[at] = value;
            // Refused or loaded: either will do.
            let _ = bench.load(&bench.plan(&image));
        }
    }
    for len in 0x10..0x30 {
        let _ = bench.load(&bench.plan(&multiboot(0)[..len]));
    }
}

#[test]
fn modules_are_refused_for_kernels_that_take_none() {
    let bench = Bench::new();
    let plan = BootPlan {
        modules: vec![BootModule {
            path: bench.file("module", &[1]),
            cmdline: String::new(),
        }],
        ..bench.plan(&bzimage())
    };
    assert!(bench.refused(&plan).contains("modules are given"));
}

#[test]
fn loading_again_gives_the_same_memory() {
    let bench = Bench::new();
    let plan = BootPlan {
        initramfs: Some(bench.file("initramfs", &[7; 5000])),
        ..bench.plan(&bzimage())
    };
    let mut images = Images::open(&plan, "").expect("files");
    let mut load = || {
        images
            .load(&bench.ram, tables, std::iter::empty())
            .expect("it fits")
    };
    let first = load();
    let pages = bench.bytes(ZERO_PAGE, 0x1000);
    bench
        .ram
        .write(Gpa(ZERO_PAGE), &[0xff; 0x1000])
        .expect("inside RAM");
    bench.ram.write(Gpa(0x100_0000), &[0xff; 64]).expect("inside RAM");
    assert_eq!(load(), first);
    assert_eq!(bench.bytes(ZERO_PAGE, 0x1000), pages);
    assert_eq!(bench.bytes(0x100_0000, 48), [0x90; 48]);
}

#[test]
fn a_machine_without_room_above_1_mib_is_refused() {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("a MiB");
    let bench = Bench {
        ram: GuestRam::new(ram),
        ..Bench::new()
    };
    let refused = bench.refused(&bench.plan(&bzimage()));
    assert!(
        refused.contains("ACPI tables needs 0x1000 bytes of guest RAM above 1 MiB"),
        "{refused}"
    );
}
