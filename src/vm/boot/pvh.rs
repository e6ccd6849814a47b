//! The PVH entry of ELF kernels: the start information and what it points to.
//!
//! Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::images::{BootError, CMDLINE, CMDLINE_ROOM, Loading, Module};
use super::low_memory::LowMemory;
use super::registers::{Entry, Mode};
use crate::platform::addr::{Gpa, PAGE_SIZE};

/// Where the start information lies.
const START_INFO: Gpa = Gpa(0x6000);

/// Write the start information, with `modules` loaded above `kernel_end`, and return the entry point.
pub(super) fn describe<'a>(
    loading: &Loading<'_>,
    kernel_end: Gpa,
    modules: impl Iterator<Item = &'a mut Module>,
    entry: u32,
) -> Result<Entry, BootError> {
    loading.write_cmdline(loading.cmdline, CMDLINE_ROOM)?;
    let mut below = loading.room.last();
    let floor = Gpa(kernel_end.0.next_multiple_of(PAGE_SIZE));
    let mut tables = LowMemory::new(loading.ram);
    let mut list = Vec::new();
    for module in modules {
        let at = loading.load_high(module, floor, below)?;
        below = Gpa(at.start().0 - 1);
        let cmdline_paddr = tables.text(&module.cmdline)?.into();
        list.push(hvm_modlist_entry {
            paddr: at.start().0,
            size: at.len(),
            cmdline_paddr,
            reserved: 0,
        });
    }
    let map = loading.map.iter().map(|(range, kind)| hvm_memmap_table_entry {
        addr: range.start().0,
        size: range.len(),
        type_: kind as u32,
        reserved: 0,
    });
    let map: Vec<_> = map.collect();
    let count = |len: usize| u32::try_from(len).expect("a table of at most 384 KiB");
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: count(list.len()),
        modlist_paddr: tables.table(&list)?.into(),
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: loading.rsdp.0,
        memmap_paddr: tables.table(&map)?.into(),
        memmap_entries: count(map.len()),
        reserved: 0,
    };
    loading
        .ram
        .backend()
        .write_obj(start_info, GuestAddress(START_INFO.0))
        .expect("the plan's lowest RAM range holds the first MiB");
    Ok(Entry {
        mode: Mode::Protected,
        rip: entry.into(),
        rax: 0,
        rbx: START_INFO.0,
        rsi: 0,
    })
}
