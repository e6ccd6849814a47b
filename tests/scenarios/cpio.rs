//! A cpio archive in the "newc" format, which the kernel unpacks over those before it in an initramfs.
//!
//! Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// An archive in the making.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

const EXECUTABLE: u32 = 0o100_755;
const TRAILER: &str = "TRAILER!!!";
/// The kernel looks for an archive on such a border.
pub(crate) const ALIGNMENT: usize = 4;

impl Archive {
    /// Add an executable file at `path`, which has no leading slash.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.files += 1;
        self.entry(path, self.files, EXECUTABLE, content);
    }

    /// The archive's bytes, a multiple of [`ALIGNMENT`].
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, inode: u32, mode: u32, content: &[u8]) {
        let size = u32::try_from(content.len()).expect("a file below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a short name");
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum.
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[test]
fn an_archive_is_aligned_headers_and_a_trailer() {
    let mut archive = Archive::default();
    archive.file("scenario", b"exit 0\n");
    let bytes = archive.finish();
    // Header of 110 bytes and a name of 9, padded to 120; 7 bytes padded to 8; then the trailer.
    assert!(bytes.starts_with(b"070701"));
    assert_eq!(&bytes[110..119], b"scenario\0");
    assert_eq!(&bytes[120..127], b"exit 0\n");
    assert_eq!(&bytes[128 + 110..128 + 120], b"TRAILER!!!");
    assert!(bytes.len().is_multiple_of(ALIGNMENT));
}
