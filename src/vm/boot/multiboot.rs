//! Multiboot 1: what bare-metal test images and the Xen hypervisor start by.
//!
//! "Multiboot Specification version 0.6.96". The image is a 32-bit ELF file, or of any kind with its load
//! addresses in the multiboot header.

use std::fs::File;

use bitflags::bitflags;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::elf;
use super::images::{BootError, CMDLINE, CMDLINE_ROOM, Loading, Module, no_room};
use super::low_memory::LowMemory;
use super::registers::{Entry, Mode};
use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};

/// In the header, to be found (3.1.1).
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// In EAX at the entry point (3.2).
const BOOT_MAGIC: u64 = 0x2bad_b002;
/// How far into the image the header may lie.
const SEARCHED: usize = 8192;
/// Where the boot information lies.
const INFO: Gpa = Gpa(0x6000);
/// How many KiB of RAM begin at address 0.
const LOWER_KIB: u16 = 640;
/// Where a PC's firmware leaves the same (BIOS data area, 40h:13h). Xen looks here before it believes the boot
/// information, and puts what it starts processors with at the end of it.
const BASE_MEMORY: Gpa = Gpa(0x413);

bitflags! {
    /// Flags of the header (3.1.2). Bits 0 to 15 are demands.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Demands: u32 {
        /// Modules on page borders: they always are.
        const PAGE_ALIGNED_MODULES = 1 << 0;
        /// Memory information: it is always given.
        const MEMORY_INFORMATION = 1 << 1;
        /// The header has load addresses.
        const ADDRESSES = 1 << 16;
        const _ = !0;
    }

    /// Flags of the boot information (3.3).
    struct Given: u32 {
        const MEMORY = 1 << 0;
        const CMDLINE = 1 << 2;
        const MODULES = 1 << 3;
        const MEMORY_MAP = 1 << 6;
        const LOADER_NAME = 1 << 9;
    }
}

/// The demands that are met.
const MET: u32 = Demands::PAGE_ALIGNED_MODULES.bits() | Demands::MEMORY_INFORMATION.bits();

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: u32,
    flags: u32,
    checksum: u32,
    header_addr: u32,
    load_addr: u32,
    load_end_addr: u32,
    bss_end_addr: u32,
    entry_addr: u32,
}

/// The header of an image, and where in the file it lies.
#[derive(Clone, Copy)]
pub(super) struct Header {
    at: u32,
    flags: Demands,
    raw: RawHeader,
}

/// The boot information (3.3), up to the boot loader's name.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Default)]
#[repr(C)]
struct Info {
    flags: u32,
    mem_lower: u32,
    mem_upper: u32,
    boot_device: u32,
    cmdline: u32,
    mods_count: u32,
    mods_addr: u32,
    syms: [u32; 4],
    mmap_length: u32,
    mmap_addr: u32,
    drives_length: u32,
    drives_addr: u32,
    config_table: u32,
    boot_loader_name: u32,
    apm_table: u32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ModuleEntry {
    start: u32,
    /// One past the last byte.
    end: u32,
    string: u32,
    reserved: u32,
}

/// `size` counts what follows it.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct MapEntry {
    size: u32,
    base: u64,
    length: u64,
    kind: u32,
}

impl Header {
    /// The header among `start`, the first bytes of an image, if there is one.
    ///
    /// # Errors
    /// What is wrong with one that demands what cannot be given or is cut off.
    pub(super) fn find(start: &[u8]) -> Result<Option<Self>, String> {
        /// The part that every header has.
        const SHORT: usize = 12;
        let start = start.get(..SEARCHED).unwrap_or(start);
        let candidates = (0..start.len()).step_by(4).filter_map(|at| {
            let words: &[u8; SHORT] = start.get(at..at + SHORT)?.try_into().ok()?;
            let word = |n: usize| u32::from_le_bytes([words[n], words[n + 1], words[n + 2], words[n + 3]]);
            let (magic, flags, checksum) = (word(0), word(4), word(8));
            let sums_up = magic.wrapping_add(flags).wrapping_add(checksum) == 0;
            (magic == HEADER_MAGIC && sums_up).then_some((at, flags))
        });
        let Some((at, flags)) = candidates.into_iter().next() else {
            return Ok(None);
        };
        let unmet = flags & 0xffff & !MET;
        if unmet != 0 {
            return Err(format!(
                "its multiboot header demands {unmet:#x}; only bits {MET:#x} can be met"
            ));
        }
        let flags = Demands::from_bits_retain(flags);
        let bytes = start.get(at..at + size_of::<RawHeader>());
        let raw = match bytes.and_then(|bytes| RawHeader::read_from_bytes(bytes).ok()) {
            Some(raw) => raw,
            None if flags.contains(Demands::ADDRESSES) => {
                return Err("its multiboot header is cut off".to_owned());
            }
            None => RawHeader::new_zeroed(),
        };
        let at = u32::try_from(at).expect("within the first 8 KiB");
        Ok(Some(Self { at, flags, raw }))
    }

    /// Whether the header itself says where the image goes.
    pub(super) fn has_addresses(&self) -> bool {
        self.flags.contains(Demands::ADDRESSES)
    }

    /// Load the image where its header says; returns the entry point and the end of what it uses.
    pub(super) fn load(&self, loading: &Loading<'_>, file: &mut File) -> Result<(u64, Gpa), BootError> {
        let broken = |what: String| BootError::Broken {
            path: loading.kernel.to_owned(),
            what,
        };
        let RawHeader {
            header_addr,
            load_addr,
            load_end_addr,
            bss_end_addr,
            entry_addr,
            ..
        } = self.raw;
        let metadata = file.metadata().map_err(|source| BootError::File {
            action: "read",
            what: "the kernel",
            path: loading.kernel.to_owned(),
            source,
        })?;
        // The byte of the file that goes to load_addr.
        let offset = header_addr
            .checked_sub(load_addr)
            .and_then(|before| self.at.checked_sub(before))
            .map(u64::from);
        let offset = offset.ok_or_else(|| {
            broken(format!(
                "its multiboot header says it lies at {header_addr:#x}, {load_addr:#x} being the start"
            ))
        })?;
        let end = match load_end_addr {
            0 => u64::from(load_addr) + metadata.len().saturating_sub(offset),
            end => u64::from(end),
        };
        let clear_to = end.max(u64::from(bss_end_addr));
        let start = Gpa(load_addr.into());
        let nothing = || broken(format!("its multiboot header loads {start} to {end:#x}"));
        let len = end.checked_sub(start.0).ok_or_else(nothing)?;
        let range = GpaRange::new(start, clear_to - start.0).ok_or_else(nothing)?;
        if !loading.room.contains_range(range) {
            let place = format!("at {range}");
            return Err(no_room(
                "the multiboot kernel",
                range.len(),
                place,
                loading.room.len(),
            ));
        }
        elf::load_part(file, offset, len, start, loading.ram).map_err(|error| loading.elf_error(error))?;
        elf::clear(loading.ram, Gpa(end), clear_to - end);
        Ok((entry_addr.into(), Gpa(clear_to)))
    }
}

/// Write the boot information, with `modules` loaded above `kernel_end`, and return the entry point.
pub(super) fn describe<'a>(
    loading: &Loading<'_>,
    kernel_end: Gpa,
    modules: impl Iterator<Item = &'a mut Module>,
    entry: u64,
) -> Result<Entry, BootError> {
    // The command line begins with the image's name, by the custom of boot loaders; kernels skip a word.
    let name = |path: &std::path::Path, rest: &str| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match rest {
            "" => name.into_owned(),
            rest => format!("{name} {rest}"),
        }
    };
    loading.write_cmdline(&name(loading.kernel, loading.cmdline), CMDLINE_ROOM)?;
    let mut tables = LowMemory::new(loading.ram);
    let mut from = Gpa(kernel_end.0.next_multiple_of(PAGE_SIZE));
    let mut list = Vec::new();
    for module in modules {
        // One after the other behind the kernel: images that find no memory map expect them there.
        let at = load_low(loading, module, from)?;
        from = Gpa((at.last().0 + 1).next_multiple_of(PAGE_SIZE));
        list.push(ModuleEntry {
            start: low(at.start().0),
            end: low(at.last().0 + 1),
            string: tables.text(&name(&module.path, &module.cmdline))?,
            reserved: 0,
        });
    }
    let map = loading.map.iter().map(|(range, kind)| MapEntry {
        size: 20,
        base: range.start().0,
        length: range.len(),
        kind: kind as u32,
    });
    let map: Vec<MapEntry> = map.collect();
    let info = Info {
        flags: (Given::MEMORY | Given::CMDLINE | Given::MODULES | Given::MEMORY_MAP | Given::LOADER_NAME)
            .bits(),
        mem_lower: LOWER_KIB.into(),
        mem_upper: u32::try_from(loading.map.contiguous_high_memory() >> 10).unwrap_or(u32::MAX),
        cmdline: low(CMDLINE.0),
        mods_count: u32::try_from(list.len()).expect("their table lies below 1 MiB"),
        mods_addr: tables.put(list.as_slice().as_bytes())?,
        mmap_length: u32::try_from(size_of_val(map.as_slice())).expect("a short list"),
        mmap_addr: tables.put(map.as_slice().as_bytes())?,
        boot_loader_name: tables.text("ravelin")?,
        ..Info::default()
    };
    let told = loading.ram.write_obj(INFO, &info);
    told.and_then(|()| loading.ram.write_obj(BASE_MEMORY, &LOWER_KIB.to_le_bytes()))
        .expect("the plan's lowest RAM range holds the first MiB");
    Ok(Entry {
        mode: Mode::Protected,
        rip: entry,
        rax: BOOT_MAGIC,
        rbx: INFO.0,
        rsi: 0,
    })
}

/// Load `module` at `from` or above, in RAM below 4 GiB.
fn load_low(loading: &Loading<'_>, module: &mut Module, from: Gpa) -> Result<GpaRange, BootError> {
    let size = module.size()?;
    let range = GpaRange::new(from, size).filter(|range| loading.room.contains_range(*range));
    if range.is_none() {
        let room = (loading.room.last().0 + 1).saturating_sub(from.0);
        let what = format!("{} {}", module.what, module.path.display());
        return Err(no_room(what, size, format!("from {from} on"), room));
    }
    module.load(loading.ram, from, size)
}

/// An address below 4 GiB as the protocol takes it.
fn low(at: u64) -> u32 {
    u32::try_from(at).expect("what a multiboot image is told lies below 4 GiB")
}
