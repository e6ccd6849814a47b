//! A bare-metal image: multiboot 1 in, the test-only exit port out.
//!
//! The image is written here, byte by byte, so that the contract with such a guest stands in one place:
//! Multiboot Specification 0.6.96, sections 3.1 to 3.3.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::machine::{Ended, Machine, Running};
use crate::prerequisites::{binary, kvm};
use crate::vfio::hash_of;

/// Where the image is loaded and starts.
const LOAD: u32 = 0x10_0000;
/// Where the loaded part begins in the file.
const OFFSET: u32 = 0x1000;
/// What the header is told by.
const MAGIC: u32 = 0x1bad_b002;
/// Modules on page borders, memory information wanted.
const FLAGS: u32 = 0b11;
/// Bytes of the header.
const HEADER: u32 = 12;

/// Prints the command line and the first module on COM1, each up to its zero byte, and leaves with 20 plus
/// the number of modules; with 127 when it was not started as multiboot says.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xfc,                               // cld
    0x3d, 0x02, 0xb0, 0xad, 0x2b,       // cmp eax, 0x2badb002
    0x75, 0x2b,                         // jne failed
    0xf6, 0x03, 0x0c,                   // test byte [ebx], command line | modules
    0x74, 0x26,                         // jz failed
    0x66, 0xba, 0xf8, 0x03,             // mov dx, 0x3f8
    0x8b, 0x73, 0x10,                   // mov esi, [ebx + 16]      the command line
    0xac,                               // lodsb
    0x84, 0xc0,                         // test al, al
    0x74, 0x03,                         // jz over the loop
    0xee,                               // out dx, al
    0xeb, 0xf8,                         // jmp lodsb
    0xb0, 0x0a,                         // mov al, newline
    0xee,                               // out dx, al
    0x8b, 0x7b, 0x18,                   // mov edi, [ebx + 24]      the modules
    0x8b, 0x37,                         // mov esi, [edi]           the first one's start
    0xac,                               // lodsb
    0x84, 0xc0,                         // test al, al
    0x74, 0x03,                         // jz over the loop
    0xee,                               // out dx, al
    0xeb, 0xf8,                         // jmp lodsb
    0x8b, 0x43, 0x14,                   // mov eax, [ebx + 20]      how many modules
    0x04, 0x14,                         // add al, 20
    0xeb, 0x02,                         // jmp leave
    0xb0, 0x7f,                         // failed: mov al, 127
    0x66, 0xba, 0x01, 0x05,             // leave: mov dx, 0x501
    0xee,                               // out dx, al
    0xf4,                               // hlt
    0xeb, 0xfd,                         // jmp hlt
];

/// An ELF32 executable with the header and `code` in its one segment.
pub(crate) fn image(code: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    for word in [MAGIC, FLAGS, 0_u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS)] {
        segment.extend(word.to_le_bytes());
    }
    segment.extend(code);
    let size = u32::try_from(segment.len()).expect("small");

    // 32 bits, little-endian, version 1; an executable for the i386.
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2_u16, 3].map(u16::to_le_bytes).as_flattened());
    // Version, entry, program headers, section headers, flags.
    file.extend([1, LOAD + HEADER, 52, 0, 0].map(u32::to_le_bytes).as_flattened());
    // Sizes of this header and of a program header, their count; no sections.
    file.extend([52_u16, 32, 1, 0, 0, 0].map(u16::to_le_bytes).as_flattened());
    // PT_LOAD, offset, addresses, sizes, flags, alignment.
    file.extend(
        [1, OFFSET, LOAD, LOAD, size, size, 7, OFFSET]
            .map(u32::to_le_bytes)
            .as_flattened(),
    );
    file.resize(OFFSET as usize, 0);
    file.extend(segment);
    file
}

/// Start the image with a module and further arguments.
fn run(folder: tempfile::TempDir, arguments: &[&str]) -> Ended {
    kvm();
    let path = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("the folder takes a file");
        path
    };
    let kernel = path("image", &image(CODE));
    let module = path("module", b"what the module holds\n\0");
    let said = |option: &str, path: &Path| format!("{option}{}", path.display());
    let mut command = Command::new(binary());
    command
        .args(["run", "--memory", "64M", "--kernel", &said("", &kernel)])
        .args(["--cmdline", "words for the image"])
        .args(["--module", &said("path=", &module)])
        .args(arguments);
    Running::spawn(command, Duration::from_secs(60), folder).end()
}

#[test]
fn a_multiboot_image_gets_its_command_line_and_module_and_leaves_by_the_exit_port() {
    let folder = tempfile::tempdir().expect("a folder");
    let ended = run(folder, &["--board", "exit-port=on"]);
    let text = ended.console.text();
    // What stands before the words is the image's name, which some loaders put there.
    assert!(
        text.contains("words for the image\nwhat the module holds\n"),
        "{}",
        ended.story()
    );
    // One module: 21, and the exit port makes 2 v + 1 of it.
    ended.with(43);
}

/// The hypervisor tries the timer of old PCs by the I/O APIC, which is not there, then the HPET in its place; it has no
/// firmware to call.
#[test]
fn xen_starts_debian_as_its_first_domain_whose_disk_works() {
    let machine = Machine::new("debian-6.12")
        .below_xen("com1=115200,8n1 console=com1 loglvl=all no-real-mode dom0_mem=448M")
        .arguments(["--memory", "1G", "--board", "hpet=on"]);
    // Beside the machine's folder, which goes away with it.
    let folder = tempfile::tempdir().expect("a folder");
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![0; 8 << 20]).expect("room");
    let ended = machine
        .arguments([OsStr::new("--disk"), disk.as_os_str()])
        .script(
            r#"
say hypervisor "$(cat /sys/hypervisor/type)"
check writes dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct
check reads sh -c 'dd if=/dev/vda bs=1M count=8 iflag=direct | sha256sum >/tmp/sum'
say sum "$(cut -c 1-64 /tmp/sum)"
say interrupts "$(grep -c 'virtio0-req' /proc/interrupts)"
"#,
        )
        .run()
        // Paravirtualized domains have none.
        .well_but(|line| line.contains("no supported hugepage sizes"));
    assert_eq!(ended.console.said("hypervisor"), "xen");
    assert_eq!(ended.console.said("interrupts"), "1");
    assert_eq!(ended.console.said("sum"), hash_of(&disk));
    assert!(
        ended
            .console
            .text()
            .contains("trying HPET Legacy Replacement Mode"),
        "{}",
        ended.story()
    );
}
