//! The kernel inside a bzImage, for the protocols that start an ELF file.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

/// Header fields of a bzImage (Documentation/arch/x86/boot.rst).
mod header {
    /// Sectors of 512 bytes before the protected-mode kernel, less one; 0 means 4.
    pub(super) const SETUP_SECTORS: usize = 0x1f1;
    /// Where the compressed kernel is in the protected-mode kernel.
    pub(super) const PAYLOAD_OFFSET: usize = 0x248;
    /// Its bytes, the length when decompressed behind it included.
    pub(super) const PAYLOAD_LENGTH: usize = 0x24c;
}

/// Bytes behind the compressed kernel that say how long the decompressed one is.
const LENGTH_BEHIND: usize = 4;

/// By what a payload is decompressed that begins so.
const TOOLS: [(&[u8], &str); 3] = [
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    (&[0xfd, b'7', b'z'], "xz"),
    (&[0x1f, 0x8b], "gzip"),
];

/// The ELF file in the bzImage at `path`.
pub(crate) fn vmlinux(path: &Path) -> Vec<u8> {
    let image = fs::read(path).expect("the guest's kernel is readable");
    let dword = |at: usize| {
        let bytes = image[at..].first_chunk().expect("a header");
        usize::try_from(u32::from_le_bytes(*bytes)).expect("this program is 64-bit")
    };
    let sectors = match image[header::SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let from = (sectors + 1) * 512 + dword(header::PAYLOAD_OFFSET);
    let payload = &image[from..][..dword(header::PAYLOAD_LENGTH) - LENGTH_BEHIND];
    let tool = TOOLS.iter().find(|(magic, _)| payload.starts_with(magic));
    let (_, tool) =
        tool.unwrap_or_else(|| panic!("{}: compressed by what is none of {TOOLS:?}", path.display()));
    let elf = decompressed(tool, payload);
    assert!(
        elf.starts_with(b"\x7fELF"),
        "{}: no ELF file in it",
        path.display()
    );
    elf
}

fn decompressed(tool: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new(tool)
        .args(["-d", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {tool}: {error}"));
    let mut input = child.stdin.take().expect("piped");
    let output = thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes).expect("the tool takes all of it"));
        child.wait_with_output().expect("the tool ends")
    });
    assert!(output.status.success(), "{tool} failed");
    output.stdout
}
