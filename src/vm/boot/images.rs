//! The files a guest starts from: opened once, recognised, and loaded at every start.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::acpi::{AcpiTables, RSDP_LEN};
use super::elf::{self, Class, Elf, ElfError};
use super::memory_map::{HIGH_MEMORY, MemoryMap};
use super::registers::Entry;
use super::{linux, multiboot, pvh};
use crate::platform::addr::{Gpa, GpaRange, PAGE_SIZE};
use crate::platform::memory::GuestRam;
use crate::vm::plan::{BootPlan, BootProtocol};

/// Where the command line is put: one string below 1 MiB whatever the protocol.
pub(super) const CMDLINE: Gpa = Gpa(0x2_0000);
/// The longest command line there is room for, without the final zero.
pub(super) const CMDLINE_ROOM: usize = 0xffff;
/// Where guests without a better hint look for the root pointer (ACPI 5.2.5.1: 0xe0000-0xfffff).
const RSDP_SEARCHED: Gpa = Gpa(0xe_0000);
/// How much of a file tells what it is: multiboot headers lie within the first 8 KiB.
const PROBED: usize = 8192;

/// Why a guest cannot be started. All of it the operator can mend.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot {action} {what} {}", path.display())]
    File {
        /// "open" or "read".
        action: &'static str,
        /// "the kernel", "the initramfs", "the module".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// Not a kernel that can be started here.
    #[error("{} is {found}; a kernel is a bzImage, an ELF image for x86, or a multiboot image", path.display())]
    NotAKernel {
        /// Which file.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// The image does not offer the protocol asked for.
    #[error("{} cannot be started by {asked}: {why}", path.display())]
    NoSuchEntry {
        /// Which file.
        path: PathBuf,
        /// The protocol, as the operator names it.
        asked: &'static str,
        /// What it lacks.
        why: String,
    },
    /// An ELF image is broken or does not fit.
    #[error("cannot load the kernel {}", path.display())]
    Elf {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The image is broken or ends early.
    #[error("the kernel {} is broken: {what}", path.display())]
    Broken {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The command line is longer than the kernel reads.
    #[error("the command line has {len} bytes; {} reads at most {most}", path.display())]
    CmdlineTooLong {
        /// Which kernel.
        path: PathBuf,
        /// How long it is.
        len: usize,
        /// How long it may be.
        most: usize,
    },
    /// The command line has a byte that ends it.
    #[error("the command line has a zero byte at offset {at}; a kernel would stop reading there")]
    CmdlineZero {
        /// Where.
        at: usize,
    },
    /// Something does not fit.
    #[error(
        "{what} needs {needed:#x} bytes of guest RAM {place}; {room:#x} are free there; give the guest more memory"
    )]
    NoRoom {
        /// What was to be placed.
        what: String,
        /// Its size in bytes.
        needed: u64,
        /// Where it was to go.
        place: String,
        /// What is free there, in bytes.
        room: u64,
    },
}

/// A file beside the kernel, and the string that goes with it.
pub(super) struct Module {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) cmdline: String,
    pub(super) what: &'static str,
}

/// A kernel, recognised.
enum Kernel {
    BzImage,
    Elf64(Elf),
    Pvh(Elf, u32),
    Multiboot(multiboot::Header, Option<Elf>),
}

/// The files, open.
pub struct Images {
    kernel: File,
    path: PathBuf,
    kind: Kernel,
    initramfs: Option<Module>,
    modules: Vec<Module>,
    cmdline: String,
}

/// What every protocol needs to know of the machine while it loads.
pub(super) struct Loading<'a> {
    pub(super) ram: &'a GuestRam,
    /// RAM for the kernel and what goes with it: from 1 MiB up to the ACPI tables.
    pub(super) room: GpaRange,
    pub(super) map: MemoryMap,
    pub(super) rsdp: Gpa,
    pub(super) kernel: &'a Path,
    pub(super) cmdline: &'a str,
}

impl Images {
    /// Open the files of `plan` and find out how the kernel is started. `default_cmdline` is used where the
    /// plan has none.
    ///
    /// # Errors
    /// When a file cannot be read, is no kernel, or does not offer the protocol asked for.
    pub fn open(plan: &BootPlan, default_cmdline: &str) -> Result<Self, BootError> {
        let kernel = open("the kernel", &plan.kernel)?;
        let kind = recognise(&kernel, &plan.kernel, plan.protocol)?;
        let module = |what, path: &Path, cmdline: &str| {
            Ok(Module {
                file: open(what, path)?,
                path: path.to_owned(),
                cmdline: cmdline.to_owned(),
                what,
            })
        };
        let initramfs = plan.initramfs.as_deref();
        let initramfs = initramfs
            .map(|path| module("the initramfs", path, ""))
            .transpose()?;
        let modules = plan.modules.iter();
        let modules = modules
            .map(|planned| module("the module", &planned.path, &planned.cmdline))
            .collect::<Result<Vec<_>, _>>()?;
        if !modules.is_empty() && !matches!(kind, Kernel::Multiboot(..) | Kernel::Pvh(..)) {
            return Err(BootError::NoSuchEntry {
                path: plan.kernel.clone(),
                asked: "multiboot",
                why: "modules are given, which only multiboot and PVH kernels take".to_owned(),
            });
        }
        let cmdline = plan.cmdline.clone().unwrap_or_else(|| default_cmdline.to_owned());
        if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
            return Err(BootError::CmdlineZero { at });
        }
        Ok(Self {
            kernel,
            path: plan.kernel.clone(),
            kind,
            initramfs,
            modules,
            cmdline,
        })
    }

    /// Load everything into `ram`, with the ACPI tables that `tables` makes for an address, and with what
    /// `reserved` lists kept out of the guest's hands. Returns where the boot processor starts.
    ///
    /// # Errors
    /// When something does not fit or a file changed or cannot be read any more.
    pub fn load(
        &mut self,
        ram: &GuestRam,
        tables: impl Fn(Gpa) -> AcpiTables,
        reserved: impl Iterator<Item = GpaRange>,
    ) -> Result<Entry, BootError> {
        let (acpi, rsdp) = place_tables(ram, tables)?;
        let room = GpaRange::new(HIGH_MEMORY, acpi.start().0.saturating_sub(HIGH_MEMORY.0));
        let loading = Loading {
            ram,
            room: room.ok_or_else(|| no_room("a kernel", PAGE_SIZE, "above 1 MiB", 0))?,
            map: MemoryMap::new(ram, acpi, reserved),
            rsdp,
            kernel: &self.path,
            cmdline: &self.cmdline,
        };
        let initramfs = self.initramfs.as_mut();
        let entry = match &self.kind {
            Kernel::BzImage => linux::load_bzimage(&loading, &mut self.kernel, initramfs)?,
            Kernel::Elf64(elf) => linux::load_elf(&loading, elf, &mut self.kernel, initramfs)?,
            Kernel::Pvh(elf, entry) => {
                let end = loading.load_elf(elf, &mut self.kernel)?;
                let modules = initramfs.into_iter().chain(&mut self.modules);
                pvh::describe(&loading, end, modules, *entry)?
            }
            Kernel::Multiboot(header, elf) => {
                let (entry, end) = match elf {
                    Some(elf) if !header.has_addresses() => {
                        (elf.physical_entry(), loading.load_elf(elf, &mut self.kernel)?)
                    }
                    _ => header.load(&loading, &mut self.kernel)?,
                };
                let modules = self.modules.iter_mut().chain(initramfs);
                multiboot::describe(&loading, end, modules, entry)?
            }
        };
        entry
            .write_tables(ram)
            .expect("the plan's lowest RAM range holds the first MiB");
        Ok(entry)
    }
}

/// Put the tables at the top of low RAM, and a root pointer where guests search for one. Returns the range
/// of the tables and where the root pointer lies among them.
fn place_tables(ram: &GuestRam, tables: impl Fn(Gpa) -> AcpiTables) -> Result<(GpaRange, Gpa), BootError> {
    let low = ram.ranges().next().expect("a plan has RAM");
    let end = low.last().0 + 1;
    // What the tables say depends on where they are; how long they are does not.
    let len = (tables(HIGH_MEMORY).bytes.len() as u64).next_multiple_of(PAGE_SIZE);
    let at = end.checked_sub(len).filter(|at| *at > HIGH_MEMORY.0);
    let room = end.saturating_sub(HIGH_MEMORY.0);
    let at = at.ok_or_else(|| no_room("the set of ACPI tables", len, "above 1 MiB", room))?;
    let made = tables(Gpa(at));
    ram.write(Gpa(at), &made.bytes)
        .expect("the range was cut from RAM");
    ram.read_obj::<[u8; RSDP_LEN]>(made.rsdp)
        .and_then(|root| ram.write(RSDP_SEARCHED, &root))
        .expect("the root pointer lies in the tables, and RAM goes on to 1 MiB");
    let range = GpaRange::new(Gpa(at), len).expect("the tables are not empty");
    Ok((range, made.rsdp))
}

pub(super) fn no_room(
    what: impl Into<String>,
    needed: u64,
    place: impl Into<String>,
    room: u64,
) -> BootError {
    BootError::NoRoom {
        what: what.into(),
        needed,
        place: place.into(),
        room,
    }
}

impl Loading<'_> {
    /// Load an ELF image; returns the end of what it uses.
    pub(super) fn load_elf(&self, elf: &Elf, file: &mut File) -> Result<Gpa, BootError> {
        elf.load(file, self.ram, self.room)
            .map_err(|error| self.elf_error(error))
    }

    pub(super) fn elf_error(&self, source: ElfError) -> BootError {
        elf_error(self.kernel, source)
    }

    /// Write the command line and its final zero; `most` is what the kernel reads without it.
    pub(super) fn write_cmdline(&self, text: &str, most: usize) -> Result<(), BootError> {
        let most = most.min(CMDLINE_ROOM);
        if text.len() > most {
            return Err(BootError::CmdlineTooLong {
                path: self.kernel.to_owned(),
                len: text.len(),
                most,
            });
        }
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.ram
            .write(CMDLINE, &bytes)
            .expect("the plan's lowest RAM range holds the first MiB");
        Ok(())
    }

    /// Load `module` as high as possible above `floor` in RAM below 4 GiB, not beyond `last`.
    pub(super) fn load_high(
        &self,
        module: &mut Module,
        floor: Gpa,
        last: Gpa,
    ) -> Result<GpaRange, BootError> {
        let size = module.size()?;
        let end = last.0.min(self.room.last().0).saturating_add(1);
        let room = end.saturating_sub(floor.0);
        let at = end.checked_sub(size).map(|at| at & !(PAGE_SIZE - 1));
        let Some(at) = at.filter(|at| *at >= floor.0) else {
            let what = format!("{} {}", module.what, module.path.display());
            return Err(no_room(
                what,
                size,
                format!("between {floor} and {:#x}", end - 1),
                room,
            ));
        };
        module.load(self.ram, Gpa(at), size)
    }
}

impl Module {
    /// Bytes of the file, at least 1.
    pub(super) fn size(&self) -> Result<u64, BootError> {
        let size = self
            .file
            .metadata()
            .map_err(|error| self.unreadable(error))?
            .len();
        if size == 0 {
            return Err(self.unreadable(io::Error::other("the file is empty")));
        }
        Ok(size)
    }

    /// Copy the file's `size` bytes to `at`, which is RAM for that length.
    pub(super) fn load(&mut self, ram: &GuestRam, at: Gpa, size: u64) -> Result<GpaRange, BootError> {
        if let Err(ElfError::Read { source, .. }) = elf::load_part(&mut self.file, 0, size, at, ram) {
            return Err(self.unreadable(source));
        }
        Ok(GpaRange::new(at, size).expect("a file that was loaded is not empty"))
    }

    fn unreadable(&self, source: io::Error) -> BootError {
        BootError::File {
            action: "read",
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }
}

fn elf_error(path: &Path, source: ElfError) -> BootError {
    BootError::Elf {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::File {
        action: "open",
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

/// Find out what the kernel is and how it is to be started.
fn recognise(file: &File, path: &Path, asked: BootProtocol) -> Result<Kernel, BootError> {
    let mut start = vec![0; PROBED];
    let read = read_start(file, &mut start).map_err(|source| BootError::File {
        action: "read",
        what: "the kernel",
        path: path.to_owned(),
        source,
    })?;
    let start = &start[..read];
    let lacks = |asked, why: &str| BootError::NoSuchEntry {
        path: path.to_owned(),
        asked,
        why: why.to_owned(),
    };
    if linux::is_bzimage(start) {
        return match asked {
            BootProtocol::Auto | BootProtocol::Linux => Ok(Kernel::BzImage),
            BootProtocol::Pvh => Err(lacks(
                "pvh",
                "it is a bzImage; PVH needs the ELF image inside it (vmlinux)",
            )),
            BootProtocol::Multiboot => Err(lacks("multiboot", "it is a bzImage")),
        };
    }
    let elf = match Elf::recognises(start) {
        true => Some(Elf::read(file).map_err(|error| elf_error(path, error))?),
        false => None,
    };
    let header = multiboot::Header::find(start).map_err(|what| BootError::Broken {
        path: path.to_owned(),
        what,
    })?;
    let pvh = match &elf {
        Some(elf) => elf.pvh_entry(file).map_err(|error| elf_error(path, error))?,
        None => None,
    };
    let wants = |protocol| asked == protocol || asked == BootProtocol::Auto;
    match (elf, pvh, header) {
        (Some(elf), Some(entry), _) if wants(BootProtocol::Pvh) => Ok(Kernel::Pvh(elf, entry)),
        (Some(elf), _, _) if elf.class == Class::Elf64 && wants(BootProtocol::Linux) => {
            Ok(Kernel::Elf64(elf))
        }
        (elf, _, Some(header)) if wants(BootProtocol::Multiboot) => {
            let loadable =
                header.has_addresses() || elf.as_ref().is_some_and(|elf| elf.class == Class::Elf32);
            match loadable {
                true => Ok(Kernel::Multiboot(header, elf)),
                false => Err(lacks(
                    "multiboot",
                    "it is neither a 32-bit ELF image nor has load addresses in its header",
                )),
            }
        }
        (None, _, None) => Err(BootError::NotAKernel {
            path: path.to_owned(),
            found: describe(start),
        }),
        _ => Err(match asked {
            BootProtocol::Pvh => lacks("pvh", "no note of it names a PVH entry point"),
            BootProtocol::Linux => lacks("linux", "it is neither a bzImage nor a 64-bit ELF image"),
            BootProtocol::Multiboot | BootProtocol::Auto => {
                lacks("multiboot", "it has no multiboot header in its first 8 KiB")
            }
        }),
    }
}

/// Fill `start` from the beginning of `file` as far as it goes.
fn read_start(file: &File, start: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < start.len() {
        match file.read_at(&mut start[read..], read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// What a file that is no kernel probably is.
fn describe(start: &[u8]) -> String {
    let compressed: [(&[u8], &str); 5] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"\x02\x21\x4c\x18", "lz4"),
    ];
    let with = compressed.iter().find(|(magic, _)| start.starts_with(magic));
    match with {
        Some((_, name)) => format!("compressed with {name} (unpack it first)"),
        None if start.is_empty() => "empty".to_owned(),
        None => "of an unknown kind".to_owned(),
    }
}
