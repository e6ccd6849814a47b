//! Images on the host: what opens and what does not, and transfers the kernel does not take as they are.

use std::io::Write;
use std::os::unix::fs::MetadataExt;

use tempfile::NamedTempFile;

use super::*;
use crate::devices::virtio::driver::{Driver, Part};

fn options(path: &Path) -> ImageOptions {
    ImageOptions {
        path: path.to_owned(),
        read_only: false,
        direct: false,
    }
}

fn file(len: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a file");
    let content: Vec<u8> = (0..len).map(|at| (at / 512).to_le_bytes()[0]).collect();
    file.write_all(&content).expect("written");
    file
}

fn refusal(options: &ImageOptions) -> String {
    let error = Image::open(options).expect_err("no image");
    format!("{error}: {}", error.source)
}

#[test]
fn a_missing_image_is_refused_by_name() {
    let text = refusal(&options(Path::new("/nowhere/disk.img")));
    assert!(
        text.starts_with("cannot open disk image /nowhere/disk.img: "),
        "{text}"
    );
}

#[test]
fn what_is_no_file_and_no_block_device_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut of_folder = options(folder.path());
    of_folder.read_only = true;
    assert!(refusal(&of_folder).ends_with("it is neither a regular file nor a block device"));
    assert!(
        refusal(&options(Path::new("/dev/null")))
            .ends_with("it is neither a regular file nor a block device")
    );
}

#[test]
fn an_image_smaller_than_a_block_is_refused_with_its_size() {
    let file = file(511);
    assert!(refusal(&options(file.path())).ends_with("it has 511 bytes; at least 512 are needed"));
}

#[test]
fn the_part_behind_the_last_whole_block_stays_hidden_and_as_it_is() {
    let mut file = NamedTempFile::new().expect("a file");
    let content = [0xa5; 1024 + 100];
    file.write_all(&content).expect("written");
    let image = Image::open(&options(file.path())).expect("two sectors");
    assert_eq!(image.sectors(), 2);
    drop(image);
    let kept = std::fs::read(file.path()).expect("still there");
    assert!(kept == content, "byte for byte");
}

#[test]
fn what_its_file_system_can_do_is_asked_without_changing_the_image() {
    let file = file(5000);
    let state = || {
        let now = file.as_file().metadata().expect("examined");
        (now.len(), now.blocks(), now.mtime_nsec(), now.ctime_nsec())
    };
    file.as_file().sync_all().expect("written");
    let before = state();
    // Longer than the kernel's clock for times of files takes for a tick.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let image = Image::open(&options(file.path())).expect("nine sectors");
    assert!(
        image.punches_holes(),
        "it was asked, and the test's file system punches holes"
    );
    assert_eq!(state(), before);
}

#[test]
fn an_image_that_looks_like_another_format_is_read_as_it_is() {
    // A header of another format (version 3, big-endian) that names a file of the host as what it is based on.
    let mut content = vec![0; 4096];
    content[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    content[8..16].copy_from_slice(&0x200_u64.to_be_bytes());
    content[16..20].copy_from_slice(&11_u32.to_be_bytes());
    content[0x200..0x20b].copy_from_slice(b"/etc/passwd");
    let mut file = NamedTempFile::new().expect("a file");
    file.write_all(&content).expect("written");
    let image = Image::open(&options(file.path())).expect("eight sectors");
    assert_eq!(image.sectors(), 8);
    let whole = Part::write(0, 4096);
    let (read, result) = with_buffers(&[whole], &[0xee; 4096], |buffers| image.read(0, buffers));
    result.expect("all of it is there");
    assert!(read == content, "byte for byte");
}

#[test]
fn a_writable_image_has_one_user() {
    let file = file(4096);
    let first = Image::open(&options(file.path())).expect("nobody has it");
    let text = refusal(&options(file.path()));
    assert!(text.contains("another virtual machine or disk uses it"), "{text}");
    let mut shared = options(file.path());
    shared.read_only = true;
    assert!(refusal(&shared).contains("another virtual machine or disk uses it"));
    drop(first);
    let _one = Image::open(&shared).expect("nobody has it");
    let _two = Image::open(&shared).expect("both only read");
}

/// Buffers in memory of a driver's.
fn with_buffers<T>(parts: &[Part], content: &[u8], use_them: impl FnOnce(&Buffers<'_>) -> T) -> (Vec<u8>, T) {
    let mut driver = Driver::new(64);
    let at = driver.place(content);
    let moved = parts.iter().map(|part| Part {
        at: at + part.at,
        ..*part
    });
    driver.offer(&moved.collect::<Vec<_>>());
    let ram = driver.ram();
    let chain = driver
        .queue
        .pop(ram.backend())
        .expect("good")
        .expect("there is one");
    let buffers = if chain.readable.is_empty() {
        &chain.writable
    } else {
        &chain.readable
    };
    let result = use_them(buffers);
    (driver.bytes(at, content.len()), result)
}

/// An image on a medium that takes blocks of 4096 only, whatever is below.
fn strict(file: &NamedTempFile) -> Image {
    let mut image = Image::open(&options(file.path())).expect("a good image");
    image.alignment = COARSE;
    image
}

#[test]
fn buffers_the_kernel_does_not_take_are_copied() {
    let file = file(64 << 10);
    let image = strict(&file);
    let parts = [Part::write(1, 100), Part::write(200, 8092)];
    let (bytes, result) = with_buffers(&parts, &[0xee; 9000], |buffers| {
        assert!(!image.fits(4096, buffers));
        image.read(4096, buffers)
    });
    result.expect("copied");
    assert_eq!(bytes[0], 0xee);
    assert_eq!((bytes[1], bytes[200], bytes[200 + 8091]), (8, 8, 23));
    assert_eq!((bytes[150], bytes[200 + 8092]), (0xee, 0xee));

    let content: Vec<u8> = (0..9000_u32).map(|at| (at / 100).to_le_bytes()[0]).collect();
    let parts = [Part::read(1, 100), Part::read(200, 8092)];
    let (_, result) = with_buffers(&parts, &content, |buffers| image.write(8192, buffers));
    result.expect("copied");
    let written = std::fs::read(file.path()).expect("readable");
    assert_eq!((written[8191], written[8192], written[8192 + 8191]), (15, 0, 82));
    assert_eq!(written[8192 + 8192], 32);
}

#[test]
fn transfers_larger_than_a_piece_are_copied_whole() {
    let file = file(1 << 20);
    let image = strict(&file);
    let len = 3 * PIECE;
    let parts = [Part::write(1, u32::try_from(len).expect("small"))];
    let (bytes, result) = with_buffers(&parts, &vec![0xee; len + 2], |buffers| image.read(0, buffers));
    result.expect("copied");
    let expected = std::fs::read(file.path()).expect("readable");
    assert_eq!(bytes[1..=len], expected[..len]);
}

#[test]
fn positions_the_medium_does_not_take_are_an_error() {
    let file = file(64 << 10);
    let image = strict(&file);
    for (at, len) in [(512, 4096), (0, 512), (4096, 4608)] {
        let parts = [Part::write(0, len)];
        let (_, result) = with_buffers(&parts, &[0; 8192], |buffers| image.read(at, buffers));
        assert_eq!(
            result.expect_err("refused").raw_os_error(),
            Some(libc::EINVAL),
            "{at} {len}"
        );
    }
}

#[test]
fn zeros_are_written_where_the_host_has_no_shortcut() {
    let file = file(1 << 20);
    let image = Image::open(&options(file.path())).expect("a good image");
    let image = image.with_shortcuts(false);
    let mut left = 600 << 10;
    image
        .write_zeroes(512, 600 << 10, true, &mut left)
        .expect("written");
    assert_eq!(left, 0);
    let content = std::fs::read(file.path()).expect("readable");
    let end = 512 + (600 << 10);
    assert!(content[512..end].iter().all(|byte| *byte == 0));
    assert_eq!(content[end], 177);
}

#[test]
fn zeros_are_written_as_far_as_they_may_be_and_no_further() {
    let file = file(1 << 20);
    let image = Image::open(&options(file.path())).expect("a good image");
    let image = image.with_shortcuts(false);
    let mut left = 1 << 10;
    image.write_zeroes(512, 512, false, &mut left).expect("written");
    let error = image.write_zeroes(1024, 1024, false, &mut left);
    let error = error.expect_err("512 bytes are left");
    assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    let content = std::fs::read(file.path()).expect("readable");
    assert_eq!((content[512], content[1023], content[1024]), (0, 0, 2));
}

#[test]
fn only_of_a_file_with_shortcuts_zeros_are_cheap() {
    let file = file(1 << 20);
    for has in [false, true] {
        let image = Image::open(&options(file.path())).expect("nobody has it");
        assert_eq!(image.with_shortcuts(has).zeroes_cheaply(), has);
    }
}

#[test]
fn ranges_that_the_host_takes_back_count_for_nothing() {
    let file = file(1 << 20);
    let image = Image::open(&options(file.path())).expect("a good image");
    assert!(image.punches_holes(), "the test's file system punches holes");
    let mut left = 7;
    image
        .write_zeroes(0, 1 << 20, true, &mut left)
        .expect("by the host");
    assert_eq!(left, 7);
}

#[test]
fn an_image_that_bypasses_the_cache_reads_and_writes() {
    // The build folder: a temporary folder may be in memory, which older kernels have no bypass for.
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder");
    let path = folder.path().join("disk.img");
    let content: Vec<u8> = (0..128 << 10)
        .map(|at: u32| (at / 512).to_le_bytes()[0])
        .collect();
    std::fs::write(&path, &content).expect("written");
    let mut direct = options(&path);
    direct.direct = true;
    let image = Image::open(&direct).expect("a file system with O_DIRECT");
    assert!(image.alignment >= 512);
    for offset in [0, 3] {
        let parts = [Part::write(offset, 8192)];
        let (bytes, result) = with_buffers(&parts, &[0xee; 8200], |buffers| image.read(4096, buffers));
        result.expect("read");
        let from = usize::try_from(offset).expect("small");
        assert_eq!(bytes[from..from + 8192], content[4096..4096 + 8192]);
    }
    let parts = [Part::read(5, 4096)];
    let (_, result) = with_buffers(&parts, &[0x77; 4200], |buffers| image.write(4096, buffers));
    result.expect("written");
    assert_eq!(std::fs::read(&path).expect("readable")[4096..8192], [0x77; 4096]);
}
