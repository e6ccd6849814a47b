//! Whether the files a machine names can be used: looked at, never changed.
//!
//! Separate from planning, which opens nothing: `check` and `run` ask, `topology` does not.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::Config;
use super::said::ConfigError;
use super::section::Section;
use super::sections::Disk;

/// Bytes of a disk's sector; images are made of whole ones.
const SECTOR: u64 = 512;
/// The shortest bzImage or ELF file with anything in it: a boot sector and the setup header behind it.
const SHORTEST_KERNEL: u64 = 1024;

/// Look at every file `config` names.
pub fn check(config: &Config) -> Result<(), ConfigError> {
    if let Some(kernel) = &config.kernel {
        readable(kernel, &kernel.path.0.0, SHORTEST_KERNEL, "a kernel")?;
    }
    if let Some(initramfs) = &config.initramfs {
        readable(initramfs, &initramfs.path.0.0, 1, "an initramfs")?;
    }
    for module in &config.modules {
        readable(module, &module.path.0.0, 0, "a module")?;
    }
    config.disks.iter().try_for_each(disk)
}

/// A regular file of at least `least` bytes that can be read.
fn readable(section: &impl Section, path: &Path, least: u64, what: &str) -> Result<(), ConfigError> {
    let path = section.source().place_of("path").resolve(path);
    let refused = |problem: String| section.source().wrong("path", problem);
    let unreadable = |error: io::Error| refused(format!("cannot read {what} from it: {error}"));
    let mut file = File::open(&path).map_err(unreadable)?;
    let about = file.metadata().map_err(unreadable)?;
    if !about.is_file() {
        return Err(refused(format!("not a regular file; {what} is one")));
    }
    if about.len() < least {
        return Err(refused(format!("{} bytes are too few for {what}", about.len())));
    }
    file.read(&mut [0]).map_err(unreadable)?;
    Ok(())
}

fn disk(disk: &Disk) -> Result<(), ConfigError> {
    let path = disk.source().place_of("path").resolve(&disk.path.0.0);
    let readonly = disk.readonly.is_some_and(|switch| switch.0);
    let refused = |problem: String| disk.source().wrong("path", problem);
    let hint = if readonly {
        ""
    } else {
        "; if the guest only reads, say readonly=on"
    };
    let access = if readonly { "read" } else { "read and write" };
    let about = std::fs::metadata(&path).map_err(|error| refused(format!("cannot {access} it: {error}")))?;
    let kind = about.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refused("neither a regular file nor a block device".to_owned()));
    }
    File::options()
        .read(true)
        .write(!readonly)
        .open(&path)
        .map_err(|error| refused(format!("cannot {access} it: {error}{hint}")))?;
    let size = about.len();
    if kind.is_file() && size == 0 {
        return Err(refused(
            "the image is empty; make it with truncate -s SIZE".to_owned(),
        ));
    }
    if kind.is_file() && !size.is_multiple_of(SECTOR) {
        let whole = size.next_multiple_of(SECTOR);
        return Err(refused(format!(
            "{size} bytes are no whole number of {SECTOR}-byte sectors; truncate -s {whole} makes it one"
        )));
    }
    Ok(())
}
