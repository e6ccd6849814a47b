//! ELF kernels of both classes: headers read with every field checked, segments loaded, and the note that
//! names the PVH entry.
//!
//! Tool Interface Standard, "Executable and Linking Format" 1.2, and its 64-bit form.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::platform::addr::{Gpa, GpaRange};
use crate::platform::memory::GuestRam;

const MAGIC: [u8; 4] = *b"\x7fELF";
/// e_ident: little endian.
const DATA_LITTLE: u8 = 1;
/// e_machine.
const MACHINE_386: u16 = 3;
/// e_machine.
const MACHINE_X86_64: u16 = 62;
/// p_type: to be loaded.
const SEGMENT_LOAD: u32 = 1;
/// p_type: notes.
const SEGMENT_NOTE: u32 = 4;
/// Type of the note with the owner "Xen" that holds the PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY).
const NOTE_PHYS32_ENTRY: u32 = 18;
/// More program headers than any kernel has.
const MOST_SEGMENTS: u16 = 128;
/// More bytes of notes than any kernel has.
const MOST_NOTE_BYTES: u64 = 1 << 20;
/// Zeros are written in pieces of this size.
const ZEROS: [u8; 4096] = [0; 4096];

/// Word width of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// ELFCLASS32.
    Elf32,
    /// ELFCLASS64.
    Elf64,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub(super) enum ElfError {
    /// It ends early, or cannot be read.
    #[error("cannot read {what} at offset {at:#x}")]
    Read {
        /// What was being read.
        what: &'static str,
        /// Where in the file.
        at: u64,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// For another machine.
    #[error("the image is {0}; valid are little-endian ELF files for x86 and x86-64")]
    Foreign(String),
    /// The headers contradict themselves.
    #[error("the image is broken: {0}")]
    Broken(String),
    /// A segment is to go where it cannot.
    #[error("segment {index} is to be loaded at {range}; RAM for kernels is {room}")]
    NoRoom {
        /// Which program header.
        index: usize,
        /// Where it is to go.
        range: GpaRange,
        /// Where it could.
        room: GpaRange,
    },
}

/// The part of the file header that follows e_ident, after the entry; both classes.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header64 {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    program_headers: u64,
    section_headers: u64,
    flags: u32,
    size: u16,
    program_header_size: u16,
    program_header_count: u16,
    rest: [u16; 3],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header32 {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u32,
    program_headers: u32,
    section_headers: u32,
    flags: u32,
    size: u16,
    program_header_size: u16,
    program_header_count: u16,
    rest: [u16; 3],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProgramHeader64 {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProgramHeader32 {
    kind: u32,
    offset: u32,
    virtual_address: u32,
    physical_address: u32,
    file_size: u32,
    memory_size: u32,
    flags: u32,
    align: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct NoteHeader {
    name_size: u32,
    descriptor_size: u32,
    kind: u32,
}

/// A program header, whichever class it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
}

/// An ELF image whose headers have been read.
#[derive(Debug)]
pub(super) struct Elf {
    /// Word width.
    pub(super) class: Class,
    /// e_entry as the file has it.
    pub(super) entry: u64,
    segments: Vec<Segment>,
}

impl Elf {
    /// Whether `start`, the first bytes of a file, begin an ELF image.
    pub(super) fn recognises(start: &[u8]) -> bool {
        start.starts_with(&MAGIC)
    }

    /// Read the headers of `file`.
    pub(super) fn read(file: &File) -> Result<Self, ElfError> {
        let ident: [u8; 16] = read(file, "the ELF identification", 0)?;
        if ident[5] != DATA_LITTLE {
            return Err(ElfError::Foreign("big-endian".to_owned()));
        }
        let class = match ident[4] {
            1 => Class::Elf32,
            2 => Class::Elf64,
            other => return Err(ElfError::Foreign(format!("of ELF class {other}"))),
        };
        let (machine, entry, at, size, count) = match class {
            Class::Elf64 => {
                let h: Header64 = read(file, "the ELF header", 0)?;
                (
                    h.machine,
                    h.entry,
                    h.program_headers,
                    h.program_header_size,
                    h.program_header_count,
                )
            }
            Class::Elf32 => {
                let h: Header32 = read(file, "the ELF header", 0)?;
                let (entry, at) = (u64::from(h.entry), u64::from(h.program_headers));
                (
                    h.machine,
                    entry,
                    at,
                    h.program_header_size,
                    h.program_header_count,
                )
            }
        };
        if !matches!(machine, MACHINE_386 | MACHINE_X86_64) {
            return Err(ElfError::Foreign(format!("for ELF machine {machine}")));
        }
        let stride = match class {
            Class::Elf64 => size_of::<ProgramHeader64>(),
            Class::Elf32 => size_of::<ProgramHeader32>(),
        };
        if usize::from(size) != stride {
            return Err(ElfError::Broken(format!(
                "its program headers have {size} bytes, not {stride}"
            )));
        }
        if count > MOST_SEGMENTS {
            return Err(ElfError::Broken(format!(
                "it has {count} program headers; a kernel has at most {MOST_SEGMENTS}"
            )));
        }
        let segments = (0..u64::from(count))
            .map(|index| {
                let at = index
                    .checked_mul(stride as u64)
                    .and_then(|offset| at.checked_add(offset))
                    .ok_or_else(|| ElfError::Broken(format!("its program headers lie at {at:#x}")))?;
                Segment::read(file, class, at)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            class,
            entry,
            segments,
        })
    }

    /// The entry point as a physical address: kernels are linked to run elsewhere than they are loaded, and
    /// some give the virtual address of the first instruction.
    pub(super) fn physical_entry(&self) -> u64 {
        let loaded = self
            .segments
            .iter()
            .filter(|segment| segment.kind == SEGMENT_LOAD);
        let holds = |start: u64, segment: &Segment| {
            self.entry
                .checked_sub(start)
                .filter(|offset| *offset < segment.memory_size)
        };
        let physical = loaded.clone().find(|s| holds(s.physical_address, s).is_some());
        if physical.is_some() {
            return self.entry;
        }
        let by_virtual = |s: &Segment| {
            let offset = holds(s.virtual_address, s)?;
            s.physical_address.checked_add(offset)
        };
        loaded.clone().find_map(by_virtual).unwrap_or(self.entry)
    }

    /// Load every segment of `file` into `room`, which is RAM, and return the end of the highest.
    pub(super) fn load(&self, file: &mut File, ram: &GuestRam, room: GpaRange) -> Result<Gpa, ElfError> {
        let mut end = None;
        for (index, segment) in self.segments.iter().enumerate() {
            if segment.kind != SEGMENT_LOAD || segment.memory_size == 0 {
                continue;
            }
            if segment.file_size > segment.memory_size {
                return Err(ElfError::Broken(format!(
                    "segment {index} has {:#x} bytes in the file and {:#x} in memory",
                    segment.file_size, segment.memory_size
                )));
            }
            let start = Gpa(segment.physical_address);
            let range = GpaRange::new(start, segment.memory_size).ok_or_else(|| {
                ElfError::Broken(format!(
                    "segment {index} begins at {start} and is too long to end"
                ))
            })?;
            if !room.contains_range(range) {
                return Err(ElfError::NoRoom { index, range, room });
            }
            segment.load(file, ram)?;
            end = end.max(Some(Gpa(range.last().0 + 1)));
        }
        end.ok_or_else(|| ElfError::Broken("no segment of it is to be loaded".to_owned()))
    }

    /// The PVH entry point, where a note names one.
    pub(super) fn pvh_entry(&self, file: &File) -> Result<Option<u32>, ElfError> {
        for segment in self
            .segments
            .iter()
            .filter(|segment| segment.kind == SEGMENT_NOTE)
        {
            if segment.file_size > MOST_NOTE_BYTES {
                return Err(ElfError::Broken(format!(
                    "it has {:#x} bytes of notes",
                    segment.file_size
                )));
            }
            let len = usize::try_from(segment.file_size).expect("bounded above");
            let mut notes = vec![0; len];
            read_into(file, "the notes", segment.offset, &mut notes)?;
            if let Some(entry) = pvh_note(&notes) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }
}

impl Segment {
    fn read(file: &File, class: Class, at: u64) -> Result<Self, ElfError> {
        Ok(match class {
            Class::Elf64 => {
                let p: ProgramHeader64 = read(file, "a program header", at)?;
                Self {
                    kind: p.kind,
                    offset: p.offset,
                    virtual_address: p.virtual_address,
                    physical_address: p.physical_address,
                    file_size: p.file_size,
                    memory_size: p.memory_size,
                }
            }
            Class::Elf32 => {
                let p: ProgramHeader32 = read(file, "a program header", at)?;
                Self {
                    kind: p.kind,
                    offset: p.offset.into(),
                    virtual_address: p.virtual_address.into(),
                    physical_address: p.physical_address.into(),
                    file_size: p.file_size.into(),
                    memory_size: p.memory_size.into(),
                }
            }
        })
    }

    /// Copy the file's part and clear the rest; the range is known to be RAM.
    fn load(&self, file: &mut File, ram: &GuestRam) -> Result<(), ElfError> {
        load_part(file, self.offset, self.file_size, Gpa(self.physical_address), ram)?;
        clear(
            ram,
            Gpa(self.physical_address + self.file_size),
            self.memory_size - self.file_size,
        );
        Ok(())
    }
}

/// Copy `len` bytes at `offset` of `file` to `at`, which is known to be RAM for that length.
pub(super) fn load_part(
    file: &mut File,
    offset: u64,
    len: u64,
    at: Gpa,
    ram: &GuestRam,
) -> Result<(), ElfError> {
    use std::io::{Seek, SeekFrom};

    let what = "the kernel";
    let failed = |source| ElfError::Read {
        what,
        at: offset,
        source,
    };
    let available = file.metadata().map_err(failed)?.len();
    if offset.checked_add(len).is_none_or(|end| end > available) {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let len = usize::try_from(len).expect("this program is 64-bit");
    ram.backend()
        .read_exact_volatile_from(GuestAddress(at.0), file, len)
        .map_err(|error| failed(io::Error::other(error)))
}

/// Clear `len` bytes from `at`, which are known to be RAM.
pub(super) fn clear(ram: &GuestRam, at: Gpa, len: u64) {
    let mut done = 0;
    while done < len {
        let piece = usize::try_from(len - done).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        ram.write(Gpa(at.0 + done), &ZEROS[..piece])
            .expect("the range was checked to be RAM");
        done += piece as u64;
    }
}

/// The entry point in the first PVH note among `notes`.
fn pvh_note(mut notes: &[u8]) -> Option<u32> {
    /// Names and descriptors are padded to this.
    const ALIGN: usize = 4;
    let padded = |len: u32| usize::try_from(len).ok()?.checked_next_multiple_of(ALIGN);
    loop {
        let (header, rest) = NoteHeader::read_from_prefix(notes).ok()?;
        let (name, rest) = rest.split_at_checked(padded(header.name_size)?)?;
        // The last descriptor may go without its padding.
        let descriptor = rest.get(..usize::try_from(header.descriptor_size).ok()?)?;
        if header.kind == NOTE_PHYS32_ENTRY && name.starts_with(b"Xen\0") {
            let (entry, _) = u32::read_from_prefix(descriptor).ok()?;
            return Some(entry);
        }
        notes = rest.get(padded(header.descriptor_size)?..)?;
    }
}

fn read<T: FromBytes + IntoBytes>(file: &File, what: &'static str, at: u64) -> Result<T, ElfError> {
    let mut value = T::new_zeroed();
    read_into(file, what, at, value.as_mut_bytes())?;
    Ok(value)
}

fn read_into(file: &File, what: &'static str, at: u64, bytes: &mut [u8]) -> Result<(), ElfError> {
    file.read_exact_at(bytes, at)
        .map_err(|source| ElfError::Read { what, at, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("short").to_le_bytes();
        let mut bytes = [len(name), len(descriptor), kind.to_le_bytes()].concat();
        for part in [name, descriptor] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let notes = [
            note(b"GNU\0", 18, &[9; 4]),
            note(b"Xen\0", 6, &[1, 2, 3]),
            note(b"Xen\0", 18, &0x100_0740_u64.to_le_bytes()),
        ]
        .concat();
        assert_eq!(pvh_note(&notes), Some(0x100_0740));
    }

    #[test]
    fn notes_that_lie_about_their_length_end_the_search() {
        let mut long = note(b"Xen\0", 18, &[0; 4]);
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(pvh_note(&long), None);
        assert_eq!(pvh_note(&note(b"Xen\0", 18, &[0; 2])), None);
        assert_eq!(pvh_note(&[]), None);
        assert_eq!(pvh_note(&[0; 11]), None);
        assert_eq!(pvh_note(&[0; 4096]), None);
    }
}
