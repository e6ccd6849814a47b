//! Linux's 64-bit boot protocol: bzImage and ELF kernels, the initramfs and the zero page.
//!
//! Documentation/arch/x86/boot.rst and zero-page.rst of the kernel.

use std::fs::File;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader, bootparam};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::elf::Elf;
use super::images::{BootError, CMDLINE, Loading, Module, no_room};
use super::memory_map::Use;
use super::registers::{Entry, Mode};
use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};

/// Where the zero page lies.
const ZERO_PAGE: Gpa = Gpa(0x7000);
/// Offset of the setup header in an image.
const SETUP_HEADER: usize = 0x1f1;
/// `boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// `type_of_loader`: none that has a number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: the initramfs may lie above 4 GiB.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// Protocol 2.12, the first with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// Where the 64-bit entry point lies behind the load address.
const ENTRY_64: u64 = 0x200;
/// Command line bytes an ELF kernel reads (COMMAND_LINE_SIZE on x86 without the final zero).
const ELF_CMDLINE: usize = 2047;

/// Whether `start`, the first bytes of a file, begin a bzImage.
pub(super) fn is_bzimage(start: &[u8]) -> bool {
    let word = |at: usize, len: usize| start.get(at..at + len);
    word(0x1fe, 2) == Some(&BOOT_FLAG.to_le_bytes()) && word(0x202, 4) == Some(b"HdrS".as_slice())
}

/// Load a bzImage and what it is told.
pub(super) fn load_bzimage(
    loading: &Loading<'_>,
    file: &mut File,
    initramfs: Option<&mut Module>,
) -> Result<Entry, BootError> {
    let header = read_header(loading, file)?;
    let broken = |what: String| BootError::Broken {
        path: loading.kernel.to_owned(),
        what,
    };
    // The kernel runs where it prefers to whatever we do; load it there and it need not move.
    let at = Gpa(header.pref_address);
    let room = loading.room;
    let needed = u64::from(header.init_size);
    let range = GpaRange::new(at, needed)
        .ok_or_else(|| broken(format!("it wants {needed:#x} bytes from {at} on to start in")))?;
    if !room.contains_range(range) {
        let free = (room.last().0 + 1).saturating_sub(at.0.max(room.start().0));
        let what = format!("the kernel {}", loading.kernel.display());
        return Err(no_room(what, needed, format!("from {at} on"), free));
    }
    let loaded = BzImage::load(loading.ram.backend(), Some(GuestAddress(at.0)), file, None)
        .map_err(|error| broken(error.to_string()))?;
    let loaded = loaded
        .setup_header
        .expect("the loader returns the header of a bzImage");
    let cmdline_size = header.cmdline_size;
    loading.write_cmdline(
        loading.cmdline,
        usize::try_from(cmdline_size).expect("this program is 64-bit"),
    )?;

    let mut params = boot_params {
        hdr: loaded,
        ..Default::default()
    };
    let floor = Gpa(range.last().0 + 1);
    if let Some(initramfs) = initramfs {
        let last = Gpa(u64::from(header.initrd_addr_max));
        let above = header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
        let placed = place_initramfs(loading, initramfs, floor, last, above)?;
        set_initramfs(&mut params, placed);
    }
    Ok(finish(loading, params, at.0 + ENTRY_64))
}

/// Load an ELF kernel and what it is told; it starts at its 64-bit entry point.
pub(super) fn load_elf(
    loading: &Loading<'_>,
    elf: &Elf,
    file: &mut File,
    initramfs: Option<&mut Module>,
) -> Result<Entry, BootError> {
    let end = loading.load_elf(elf, file)?;
    loading.write_cmdline(loading.cmdline, ELF_CMDLINE)?;
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_2_12;
    params.hdr.kernel_alignment = 0x20_0000;
    if let Some(initramfs) = initramfs {
        let floor = Gpa(end.0.next_multiple_of(PAGE_SIZE));
        let last = Gpa(u64::from(u32::MAX));
        let placed = place_initramfs(loading, initramfs, floor, last, true)?;
        set_initramfs(&mut params, placed);
    }
    Ok(finish(loading, params, elf.physical_entry()))
}

/// The setup header of a bzImage, which is known to be one: of a kernel with a 64-bit entry point, and whole.
fn read_header(loading: &Loading<'_>, file: &File) -> Result<setup_header, BootError> {
    use std::os::unix::fs::FileExt;

    let mut header = bootparam::setup_header::default();
    let read = |source| BootError::File {
        action: "read",
        what: "the setup header of the kernel",
        path: loading.kernel.to_owned(),
        source,
    };
    file.read_exact_at(header.as_mut_slice(), SETUP_HEADER as u64)
        .map_err(read)?;
    // syssize counts 16 bytes; a file may be longer (signatures), never shorter.
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let (syssize, init_size) = (header.syssize, header.init_size);
    let setup = (sectors + 1) * 512;
    let whole = setup + u64::from(syssize) * 16;
    let len = file.metadata().map_err(read)?.len();
    let broken = |what| {
        Err(BootError::Broken {
            path: loading.kernel.to_owned(),
            what,
        })
    };
    if len < whole {
        return broken(format!("the file has {len} bytes of {whole}"));
    }
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::NoSuchEntry {
            path: loading.kernel.to_owned(),
            asked: "linux",
            why: format!(
                "it is a 32-bit kernel or one from before Linux 3.8 (boot protocol {}.{:02})",
                version >> 8,
                version & 0xff
            ),
        });
    }
    // All of what follows the setup is loaded, to where the kernel says that it needs this much.
    if len - setup > u64::from(init_size) {
        return broken(format!(
            "it says that it starts in {init_size:#x} bytes, and has {:#x} to be loaded there",
            len - setup
        ));
    }
    Ok(header)
}

/// As high as possible up to `last`; above 4 GiB where the kernel allows that and it does not fit below.
fn place_initramfs(
    loading: &Loading<'_>,
    initramfs: &mut Module,
    floor: Gpa,
    last: Gpa,
    above_4_gib: bool,
) -> Result<GpaRange, BootError> {
    let below = loading.load_high(initramfs, floor, last);
    if !above_4_gib || !matches!(below, Err(BootError::NoRoom { .. })) {
        return below;
    }
    let size = initramfs.size()?;
    let high = loading.ram.ranges().skip(1).find(|range| range.len() >= size);
    let Some(high) = high else { return below };
    let at = (high.last().0 + 1 - size) & !(PAGE_SIZE - 1);
    match at >= high.start().0 {
        true => initramfs.load(loading.ram, Gpa(at), size),
        false => below,
    }
}

fn set_initramfs(params: &mut boot_params, at: GpaRange) {
    let [low, high] = halves(at.start().0);
    params.hdr.ramdisk_image = low;
    params.ext_ramdisk_image = high;
    let [low, high] = halves(at.len());
    params.hdr.ramdisk_size = low;
    params.ext_ramdisk_size = high;
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// Complete the zero page and write it.
fn finish(loading: &Loading<'_>, mut params: boot_params, rip: u64) -> Entry {
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    let [low, _] = halves(CMDLINE.0);
    params.hdr.cmd_line_ptr = low;
    params.acpi_rsdp_addr = loading.rsdp.0;
    let mut entries = 0;
    // RAM comes first where the table is too small for all: what is reserved, ACPI reserves too.
    let (mut listed, rest): (Vec<_>, Vec<_>) =
        loading.map.iter().partition(|(_, kind)| *kind != Use::Reserved);
    let left = params.e820_table.len().saturating_sub(listed.len());
    listed.extend(rest.into_iter().take(left));
    listed.sort_unstable_by_key(|(range, _)| range.start());
    let mut table = params.e820_table;
    for (slot, (range, kind)) in table.iter_mut().zip(listed) {
        *slot = boot_e820_entry {
            addr: range.start().0,
            size: range.len(),
            r#type: kind as u32,
        };
        entries += 1;
    }
    params.e820_table = table;
    params.e820_entries = entries;
    loading
        .ram
        .backend()
        .write_obj(params, GuestAddress(ZERO_PAGE.0))
        .expect("the plan's lowest RAM range holds the first MiB");
    Entry {
        mode: Mode::Long,
        rip,
        rax: 0,
        rbx: 0,
        rsi: ZERO_PAGE.0,
    }
}
