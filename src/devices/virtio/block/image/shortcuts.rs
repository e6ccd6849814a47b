//! What the host does with ranges of an image without their bytes being written.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate};

use super::COARSE;

/// What the host can do with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shortcuts {
    /// Take it back.
    pub(super) punches_holes: bool,
    /// Make it zeros.
    pub(super) zeroes_ranges: bool,
}

impl Shortcuts {
    /// Nothing.
    pub(super) const NONE: Self = Self {
        punches_holes: false,
        zeroes_ranges: false,
    };
    /// Everything.
    pub(super) const ALL: Self = Self {
        punches_holes: true,
        zeroes_ranges: true,
    };

    /// Those for the regular file `image`, which is at `path`.
    ///
    /// A file without a name beside it answers for it: asked of the image itself, beyond its end, either question moves its
    /// times, and the one about zeros reserves space there that nothing gives back. Where no such file can be made, the
    /// image is asked about holes alone, and zeros are written.
    pub(super) fn of_file(image: &File, path: &Path) -> io::Result<Self> {
        match unnamed_beside(image, path) {
            Ok(unnamed) => Ok(Self {
                punches_holes: takes(&unnamed, FallocateFlags::PUNCH_HOLE, 0),
                zeroes_ranges: takes(&unnamed, FallocateFlags::ZERO_RANGE, 0),
            }),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "zeros are written: no file beside the disk image tells whether there is a shortcut");
                let end = image.metadata()?.len().next_multiple_of(COARSE as u64);
                Ok(Self {
                    punches_holes: takes(image, FallocateFlags::PUNCH_HOLE, end),
                    zeroes_ranges: false,
                })
            }
        }
    }
}

/// Whether the file system of `file` takes `request`, for a page at `at`.
fn takes(file: &File, request: FallocateFlags, at: u64) -> bool {
    fallocate(file, request | FallocateFlags::KEEP_SIZE, at, COARSE as u64).is_ok()
}

/// A file without a name, gone when it is closed, in the folder and the file system of `image`.
fn unnamed_beside(image: &impl AsFd, path: &Path) -> io::Result<File> {
    let elsewhere = || {
        io::Error::new(
            io::ErrorKind::CrossesDevices,
            "its folder is of another file system",
        )
    };
    // Behind symbolic links: the folder of the file itself.
    let path = path.canonicalize()?;
    let folder = path.parent().ok_or_else(elsewhere)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let unnamed = File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)?);
    if unnamed.metadata()?.dev() != rustix::fs::fstat(image)?.st_dev {
        return Err(elsewhere());
    }
    Ok(unnamed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn an_image_in_a_folder_that_takes_no_file_is_not_asked_about_zeros() {
        let image = tempfile::tempfile().expect("a file");
        let shortcuts = Shortcuts::of_file(&image, Path::new("/proc/version")).expect("measured");
        assert!(shortcuts.punches_holes, "the test's file system punches holes");
        assert!(!shortcuts.zeroes_ranges);
    }

    #[test]
    fn a_link_to_an_image_leads_to_the_file_system_that_has_it() {
        let (here, elsewhere) = (
            tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a folder"),
            tempfile::tempdir().expect("a folder"),
        );
        let (path, link) = (here.path().join("disk.img"), elsewhere.path().join("disk.img"));
        let image = File::create(&path).expect("created");
        symlink(&path, &link).expect("linked");
        assert!(unnamed_beside(&image, &link).is_ok());
        let names = |folder: &Path| std::fs::read_dir(folder).expect("a folder").count();
        assert_eq!((names(here.path()), names(elsewhere.path())), (1, 1));
    }
}
