//! The registers with which a processor enters a kernel.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::platform::addr::Gpa;
use crate::platform::host::HostError;
use crate::platform::kvm::Vcpu;
use crate::platform::memory::{GuestRam, OutsideRam};

/// Where the flat descriptors lie that the segment registers claim to be loaded from.
const GDT: Gpa = Gpa(0x500);
/// The top-level page table of the identity map; four more levels of tables follow.
const PAGE_TABLES: Gpa = Gpa(0x9000);
/// How much the identity map covers: all that a boot protocol hands over lies below.
const MAPPED_GIB: u64 = 4;

/// CR0: protection enabled, extension type.
const CR0_PROTECTED: u64 = 0x11;
/// CR0: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// RFLAGS: only the bit that is always one; interrupts are off.
const RFLAGS: u64 = 2;

/// Page table entry: present, writable, accessed, dirty.
const TABLE: u64 = 0x63;
/// Page table entry: as above, and a page of 2 MiB.
const PAGE_2M: u64 = TABLE | 0x80;

/// Which mode the processor is in at the entry point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit, paging on with an identity map of the lowest 4 GiB.
    Long,
    /// 32-bit protected mode, flat segments, paging off.
    Protected,
}

/// Where and with what the boot processor starts. All addresses are physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The processor's mode.
    pub mode: Mode,
    /// The first instruction.
    pub rip: u64,
    /// Multiboot's mark.
    pub rax: u64,
    /// PVH's and multiboot's information structure.
    pub rbx: u64,
    /// Linux's zero page.
    pub rsi: u64,
}

/// A segment register and the descriptor it was loaded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    selector: u16,
    kind: u8,
    code_or_data: bool,
    long: bool,
    limit: u32,
}

impl Segment {
    /// Execute, read, accessed. Linux's 64-bit protocol wants selector 10h.
    const fn code(mode: Mode) -> Self {
        Self {
            selector: 0x10,
            kind: 0xb,
            code_or_data: true,
            long: matches!(mode, Mode::Long),
            limit: u32::MAX,
        }
    }

    /// Read, write, accessed. Linux's 64-bit protocol wants selector 18h.
    const DATA: Self = Self {
        selector: 0x18,
        kind: 3,
        code_or_data: true,
        long: false,
        limit: u32::MAX,
    };

    /// A busy 32-bit task state segment: without one no processor is entered.
    const TASK: Self = Self {
        selector: 0x20,
        kind: 0xb,
        code_or_data: false,
        long: false,
        limit: 0x67,
    };

    /// Whether the limit counts pages.
    const fn pages(self) -> bool {
        self.limit > 0xf_ffff
    }

    fn kvm(self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: self.limit,
            selector: self.selector,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(self.code_or_data && !self.long),
            s: u8::from(self.code_or_data),
            l: u8::from(self.long),
            g: u8::from(self.pages()),
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }

    /// As the eight bytes of a descriptor with base 0 (AMD64 Architecture Programmer's Manual, volume 2, 4.7).
    fn descriptor(self) -> u64 {
        let limit = if self.pages() {
            self.limit >> 12
        } else {
            self.limit
        };
        let kvm = self.kvm();
        u64::from(limit & 0xffff)
            | u64::from(self.kind) << 40
            | u64::from(kvm.s) << 44
            | 1 << 47
            | u64::from(limit >> 16) << 48
            | u64::from(kvm.l) << 53
            | u64::from(kvm.db) << 54
            | u64::from(kvm.g) << 55
    }
}

impl Entry {
    /// Write what the registers point to: the descriptors, and the page tables where paging is on.
    pub fn write_tables(&self, ram: &GuestRam) -> Result<(), OutsideRam> {
        let mut gdt = [0_u64; 6];
        for segment in [Segment::code(self.mode), Segment::DATA, Segment::TASK] {
            gdt[usize::from(segment.selector / 8)] = segment.descriptor();
        }
        ram.write_obj(GDT, &gdt)?;
        if self.mode == Mode::Protected {
            return Ok(());
        }
        // One table of level 4, one of level 3, then one of level 2 for each GiB.
        let table = |n: u64| PAGE_TABLES.0 + n * 0x1000;
        let mut level4 = [0_u64; 512];
        level4[0] = table(1) | TABLE;
        ram.write_obj(PAGE_TABLES, &level4)?;
        let mut level3 = [0_u64; 512];
        for (gib, entry) in (0..MAPPED_GIB).zip(&mut level3) {
            *entry = table(2 + gib) | TABLE;
            let first = gib << 30;
            let mut level2 = [0_u64; 512];
            for (page, entry) in (0..).zip(&mut level2) {
                *entry = first | page << 21 | PAGE_2M;
            }
            ram.write_obj(Gpa(table(2 + gib)), &level2)?;
        }
        ram.write_obj(Gpa(table(1)), &level3)
    }

    /// Put `vcpu`, which is in its power-on state, at the entry point.
    pub fn apply(&self, vcpu: &Vcpu) -> Result<(), HostError> {
        vcpu.set_sregs(&self.system_registers(vcpu.sregs()?))?;
        vcpu.set_regs(&kvm_regs {
            rip: self.rip,
            rax: self.rax,
            rbx: self.rbx,
            rsi: self.rsi,
            rflags: RFLAGS,
            ..Default::default()
        })
    }

    /// `reset`, the registers after power-on, with what the entry's mode needs.
    fn system_registers(&self, reset: kvm_sregs) -> kvm_sregs {
        let data = Segment::DATA.kvm();
        let mut sregs = kvm_sregs {
            cs: Segment::code(self.mode).kvm(),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment::TASK.kvm(),
            cr0: CR0_PROTECTED,
            cr3: 0,
            cr4: 0,
            efer: 0,
            ..reset
        };
        sregs.gdt.base = GDT.0;
        sregs.gdt.limit = 6 * 8 - 1;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        if self.mode == Mode::Long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PAGE_TABLES.0;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG;
        }
        sregs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const LONG: Entry = Entry {
        mode: Mode::Long,
        rip: 0x100_0200,
        rax: 0,
        rbx: 0,
        rsi: 0x7000,
    };

    fn ram() -> GuestRam {
        GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("a MiB"))
    }

    /// Walk the four levels as the processor does.
    fn translate(ram: &GuestRam, at: u64) -> u64 {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let entry = |table: u64, shift: u32| {
            let entry: u64 = ram
                .read_obj(Gpa((table & ADDRESS) + (at >> shift & 0x1ff) * 8))
                .expect("inside RAM");
            assert_eq!(entry & 1, 1, "{at:#x} is mapped");
            entry
        };
        let page = entry(entry(entry(PAGE_TABLES.0, 39), 30), 21);
        assert_eq!(page & 0x80, 0x80);
        (page & ADDRESS & !0x1f_ffff) | at & 0x1f_ffff
    }

    #[test]
    fn the_lowest_4_gib_are_mapped_to_themselves() {
        let ram = ram();
        LONG.write_tables(&ram).expect("room");
        for at in [
            0,
            0x7000,
            0x1f_ffff,
            0x20_0000,
            0x4000_0000,
            0xfee0_0000,
            0xffff_ffff,
        ] {
            assert_eq!(translate(&ram, at), at);
        }
        assert_eq!(ram.read_obj::<u64>(Gpa(PAGE_TABLES.0 + 8)), Ok(0));
    }

    #[test]
    fn descriptors_say_what_the_segment_registers_hold() {
        assert_eq!(Segment::code(Mode::Long).descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Segment::code(Mode::Protected).descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(Segment::DATA.descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::TASK.descriptor(), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn protected_mode_has_paging_off() {
        let entry = Entry {
            mode: Mode::Protected,
            ..LONG
        };
        let sregs = entry.system_registers(kvm_sregs::default());
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.selector), (1, 0, 0x10));
    }

    #[test]
    fn long_mode_keeps_what_the_reset_state_says_otherwise() {
        let reset = kvm_sregs {
            apic_base: 0xfee0_0900,
            ..Default::default()
        };
        let sregs = LONG.system_registers(reset);
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!((sregs.cs.db, sregs.cs.l), (0, 1));
    }
}
